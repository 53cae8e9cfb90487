//! What a pool knows besides maps: LUNs, layers, snapshots, holds and groups. Small, wholly in memory.
//!
//! Objects are changed by putting them whole, so replaying a change twice does no harm.

use std::collections::BTreeMap;

use block::Generation;
use uuid::Uuid;

use crate::bytes::{Reader, Short, Writer};

/// Who stands on a LUN: it must not be exported, deleted or reverted by itself. The reverse pointer of R7.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Claim {
    /// A VMFS datastore lies on it.
    Datastore {
        /// The volume's uuid.
        uuid: Uuid,
        /// Its label.
        label: String,
    },
    /// A mapping file refers to it.
    Mapping {
        /// The datastore that holds the mapping file.
        datastore: String,
        /// Path of the descriptor on it.
        path: String,
        /// Physical mode; else virtual.
        physical: bool,
    },
}

impl std::fmt::Display for Claim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Datastore { label, .. } => write!(f, "datastore {label}"),
            Self::Mapping { datastore, path, .. } => write!(f, "the mapping [{datastore}] {path}"),
        }
    }
}

/// A LUN.
#[derive(Clone, Debug)]
pub struct LunRecord {
    /// Number within the pool, never used again.
    pub id: u64,
    /// Identity; NAA and serial follow from it.
    pub uuid: Uuid,
    /// Name, unique among living LUNs.
    pub name: String,
    /// Length in sectors.
    pub sectors: u64,
    /// The layer that takes the writes.
    pub top: u64,
    /// Creation, seconds since 1970.
    pub created: u64,
    /// Since when it lies in the trash, seconds since 1970.
    pub trashed: Option<u64>,
    /// Who stands on it.
    pub claim: Option<Claim>,
    /// The top layer of the branch that a revert left, kept until accepted.
    pub abandoned: Option<u64>,
}

/// A layer: what was written between two cuts.
#[derive(Clone, Debug)]
pub struct LayerRecord {
    /// Number within the pool, never used again; also the id of its map's tree.
    pub id: u64,
    /// The layer below; 0: none.
    pub parent: u64,
    /// Page pair of the map's root; 0: the map is empty.
    pub root: u64,
    /// Where map pages are taken from: the layer's newest metadata grain and how many pairs of it are used.
    pub meta_grain: u32,
    /// See `meta_grain`.
    pub meta_used: u32,
    /// Length of the disk when the layer was frozen (or now, for a top layer), in sectors.
    pub sectors: u64,
    /// The cut that froze it. A top layer has none.
    pub generation: Option<Generation>,
    /// It is being taken apart, and how far that is.
    pub dying: Option<u64>,
}

/// A name for a frozen layer.
#[derive(Clone, Debug)]
pub struct SnapshotRecord {
    /// Number within the pool.
    pub id: u64,
    /// Identity of the copy.
    pub uuid: Uuid,
    /// Whose snapshot.
    pub lun: u64,
    /// The frozen layer.
    pub layer: u64,
    /// Name, unique within the LUN.
    pub name: String,
    /// Creation, seconds since 1970.
    pub created: u64,
    /// The group it was cut with.
    pub group: Option<Uuid>,
}

/// Somebody needs a generation to stay known.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HoldRecord {
    /// Number within the pool.
    pub id: u64,
    /// The layer that the generation froze.
    pub layer: u64,
    /// Who, in words.
    pub holder: String,
}

/// Where the record lies that decides about a prepared cut.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Decider {
    /// In the pool with this uuid (this one or another).
    Pool(Uuid),
    /// Outside of all pools: in the job record of a VM.
    Outside,
}

/// A cut over several pools, from its preparation to its end.
#[derive(Clone, Debug)]
pub struct GroupRecord {
    /// Names the cut.
    pub group: Uuid,
    /// Who decides.
    pub decider: Decider,
    /// This pool is the decider, and it has decided that the cut happened.
    pub decided: bool,
    /// The members in this pool.
    pub members: Vec<GroupMember>,
}

/// One LUN of a prepared cut.
#[derive(Clone, Debug)]
pub struct GroupMember {
    /// The LUN.
    pub lun: u64,
    /// Its top layer, which freezes.
    pub old_top: u64,
    /// The layer that takes its place.
    pub new_top: u64,
    /// The generation of the cut.
    pub generation: Generation,
    /// The snapshot that it makes.
    pub snapshot: SnapshotRecord,
}

/// Everything a pool knows besides maps.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    /// The pool's name.
    pub name: String,
    /// LUNs by id, those in the trash too.
    pub luns: BTreeMap<u64, LunRecord>,
    /// Layers by id.
    pub layers: BTreeMap<u64, LayerRecord>,
    /// Snapshots by id.
    pub snapshots: BTreeMap<u64, SnapshotRecord>,
    /// Holds by id.
    pub holds: BTreeMap<u64, HoldRecord>,
    /// Cuts that are not over.
    pub groups: BTreeMap<Uuid, GroupRecord>,
    /// Next id of anything. Only rises.
    pub next_id: u64,
}

/// One change of the catalog.
#[derive(Clone, Debug)]
pub enum Put {
    /// The pool's name.
    Name(String),
    /// A LUN, new or changed.
    Lun(LunRecord),
    /// A LUN is gone.
    DropLun(u64),
    /// A layer, new or changed.
    Layer(LayerRecord),
    /// A layer is gone.
    DropLayer(u64),
    /// A snapshot.
    Snapshot(SnapshotRecord),
    /// A snapshot is gone.
    DropSnapshot(u64),
    /// A hold.
    Hold(HoldRecord),
    /// A hold is gone.
    DropHold(u64),
    /// A group.
    Group(GroupRecord),
    /// A group is over.
    DropGroup(Uuid),
}

impl Catalog {
    /// Applies a change.
    pub fn put(&mut self, put: Put) {
        let id = match &put {
            Put::Lun(r) => r.id,
            Put::Layer(r) => r.id,
            Put::Snapshot(r) => r.id,
            Put::Hold(r) => r.id,
            _ => 0,
        };
        self.next_id = self.next_id.max(id + 1);
        match put {
            Put::Name(name) => self.name = name,
            Put::Lun(r) => drop(self.luns.insert(r.id, r)),
            Put::DropLun(id) => drop(self.luns.remove(&id)),
            Put::Layer(r) => drop(self.layers.insert(r.id, r)),
            Put::DropLayer(id) => drop(self.layers.remove(&id)),
            Put::Snapshot(r) => drop(self.snapshots.insert(r.id, r)),
            Put::DropSnapshot(id) => drop(self.snapshots.remove(&id)),
            Put::Hold(r) => drop(self.holds.insert(r.id, r)),
            Put::DropHold(id) => drop(self.holds.remove(&id)),
            Put::Group(r) => drop(self.groups.insert(r.group, r)),
            Put::DropGroup(group) => drop(self.groups.remove(&group)),
        }
    }

    /// A new page of a layer's map: its root, perhaps, and where the next pair is taken from.
    pub fn node(&mut self, layer: u64, level: u32, pair: u64) {
        if let Some(record) = self.layers.get_mut(&layer) {
            if level + 1 == crate::map::HEIGHT {
                record.root = pair;
            }
            record.meta_grain = (pair / crate::format::GRAIN_PAIRS) as u32;
            record.meta_used = (pair % crate::format::GRAIN_PAIRS) as u32 + 1;
        }
    }

    /// The whole catalog as changes that make it from nothing.
    pub fn puts(&self) -> impl Iterator<Item = Put> + '_ {
        std::iter::once(Put::Name(self.name.clone()))
            .chain(self.layers.values().cloned().map(Put::Layer))
            .chain(self.luns.values().cloned().map(Put::Lun))
            .chain(self.snapshots.values().cloned().map(Put::Snapshot))
            .chain(self.holds.values().cloned().map(Put::Hold))
            .chain(self.groups.values().cloned().map(Put::Group))
    }

    /// The catalog's bytes, as written at a checkpoint.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        self.puts().for_each(|put| put.encode(&mut out));
        out.bytes
    }

    /// Reads what [`Catalog::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, Short> {
        let (mut catalog, mut reader) = (Self { next_id: 1, ..Self::default() }, Reader { rest: bytes });
        while !reader.rest.is_empty() {
            catalog.put(Put::decode(&mut reader)?);
        }
        Ok(catalog)
    }

    /// The layers of a chain from `top` down. Ends at a layer that is not there or at a circle.
    pub fn chain(&self, top: u64) -> impl Iterator<Item = &LayerRecord> {
        let mut next = top;
        std::iter::from_fn(move || {
            let layer = self.layers.get(&next)?;
            next = if layer.parent < layer.id { layer.parent } else { 0 };
            Some(layer)
        })
    }

    /// A snapshot or a hold keeps the boundary of a layer.
    pub fn keeps_generation(&self, layer: u64) -> bool {
        self.snapshots.values().any(|s| s.layer == layer) || self.holds.values().any(|h| h.layer == layer)
    }

    /// The layers that stand directly on `layer`.
    pub fn children(&self, layer: u64) -> impl Iterator<Item = &LayerRecord> {
        self.layers.values().filter(move |l| l.parent == layer)
    }

    /// A living LUN by name, uuid, NAA or serial.
    pub fn find_lun(&self, name: &str) -> Option<&LunRecord> {
        let living = || self.luns.values().filter(|l| l.trashed.is_none());
        let wanted = name.to_ascii_lowercase();
        living().find(|l| l.name == name).or_else(|| {
            living().find(|l| {
                let naa = crate::identity::naa_text(l.uuid);
                l.uuid.to_string() == wanted
                    || naa == wanted
                    || naa[4..] == wanted
                    || l.uuid.simple().to_string() == wanted
            })
        })
    }

    /// A snapshot of a LUN by name.
    pub fn find_snapshot(&self, lun: u64, name: &str) -> Option<&SnapshotRecord> {
        self.snapshots.values().find(|s| s.lun == lun && s.name == name)
    }
}

impl Put {
    /// Appends the change to a journal record or catalog.
    pub fn encode(&self, out: &mut Writer) {
        match self {
            Self::Name(name) => out.u8(16).text(name),
            Self::Lun(r) => {
                out.u8(17).u64(r.id).uuid(r.uuid).text(&r.name).u64(r.sectors).u64(r.top).u64(r.created);
                out.option(r.trashed, |o, t| o.u64(t)).option(r.abandoned, |o, t| o.u64(t));
                match &r.claim {
                    None => out.u8(0),
                    Some(Claim::Datastore { uuid, label }) => out.u8(1).uuid(*uuid).text(label),
                    Some(Claim::Mapping { datastore, path, physical }) => {
                        out.u8(2).text(datastore).text(path).u8(u8::from(*physical))
                    }
                }
            }
            Self::DropLun(id) => out.u8(18).u64(*id),
            Self::Layer(r) => {
                out.u8(19).u64(r.id).u64(r.parent).u64(r.root).u32(r.meta_grain).u32(r.meta_used);
                out.u64(r.sectors)
                    .option(r.generation, |o, g| o.generation(g))
                    .option(r.dying, |o, t| o.u64(t))
            }
            Self::DropLayer(id) => out.u8(20).u64(*id),
            Self::Snapshot(r) => {
                out.u8(21);
                r.encode(out)
            }
            Self::DropSnapshot(id) => out.u8(22).u64(*id),
            Self::Hold(r) => out.u8(23).u64(r.id).u64(r.layer).text(&r.holder),
            Self::DropHold(id) => out.u8(24).u64(*id),
            Self::Group(r) => {
                out.u8(25).uuid(r.group).u8(u8::from(r.decided)).u32(r.members.len() as u32);
                out.option(if let Decider::Pool(p) = r.decider { Some(p) } else { None }, |o, p| o.uuid(p));
                for m in &r.members {
                    out.u64(m.lun).u64(m.old_top).u64(m.new_top).generation(m.generation);
                    m.snapshot.encode(out);
                }
                out
            }
            Self::DropGroup(group) => out.u8(26).uuid(*group),
        };
    }

    /// Reads one change.
    pub fn decode(from: &mut Reader<'_>) -> Result<Self, Short> {
        let kind = from.u8()?;
        Self::decode_kind(kind, from)
    }

    /// Reads one change whose kind was read already.
    pub fn decode_kind(kind: u8, from: &mut Reader<'_>) -> Result<Self, Short> {
        let put = Self::decode_raw(kind, from)?;
        if put.is_plausible() { Ok(put) } else { Err(Short) }
    }

    /// Numbers are in the bounds that everything computed from them relies on.
    fn is_plausible(&self) -> bool {
        let number = |n: u64| n < 1 << 62;
        let snapshot = |s: &SnapshotRecord| number(s.id) && number(s.lun) && number(s.layer);
        match self {
            Self::Lun(r) => number(r.id) && number(r.top) && r.sectors <= crate::format::MOST_LUN_SECTORS,
            Self::Layer(r) => {
                number(r.id)
                    && number(r.parent)
                    && r.root < 1 << 35
                    && u64::from(r.meta_used) <= crate::format::GRAIN_PAIRS
                    && r.sectors <= crate::format::MOST_LUN_SECTORS
                    && r.generation.is_none_or(|g| number(g.counter))
            }
            Self::Snapshot(r) => snapshot(r),
            Self::Hold(r) => number(r.id) && number(r.layer),
            Self::Group(r) => {
                let member =
                    |m: &GroupMember| number(m.old_top) && number(m.new_top) && snapshot(&m.snapshot);
                r.members.iter().all(member)
            }
            Self::Name(_)
            | Self::DropLun(_)
            | Self::DropLayer(_)
            | Self::DropSnapshot(_)
            | Self::DropHold(_)
            | Self::DropGroup(_) => true,
        }
    }

    fn decode_raw(kind: u8, from: &mut Reader<'_>) -> Result<Self, Short> {
        Ok(match kind {
            16 => Self::Name(from.text()?),
            17 => Self::Lun(LunRecord {
                id: from.u64()?,
                uuid: from.uuid()?,
                name: from.text()?,
                sectors: from.u64()?,
                top: from.u64()?,
                created: from.u64()?,
                trashed: from.option(|f| f.u64())?,
                abandoned: from.option(|f| f.u64())?,
                claim: match from.u8()? {
                    0 => None,
                    1 => Some(Claim::Datastore { uuid: from.uuid()?, label: from.text()? }),
                    2 => Some(Claim::Mapping {
                        datastore: from.text()?,
                        path: from.text()?,
                        physical: from.u8()? != 0,
                    }),
                    _ => return Err(Short),
                },
            }),
            18 => Self::DropLun(from.u64()?),
            19 => Self::Layer(LayerRecord {
                id: from.u64()?,
                parent: from.u64()?,
                root: from.u64()?,
                meta_grain: from.u32()?,
                meta_used: from.u32()?,
                sectors: from.u64()?,
                generation: from.option(|f| f.generation())?,
                dying: from.option(|f| f.u64())?,
            }),
            20 => Self::DropLayer(from.u64()?),
            21 => Self::Snapshot(SnapshotRecord::decode(from)?),
            22 => Self::DropSnapshot(from.u64()?),
            23 => Self::Hold(HoldRecord { id: from.u64()?, layer: from.u64()?, holder: from.text()? }),
            24 => Self::DropHold(from.u64()?),
            25 => {
                let (group, decided, count) = (from.uuid()?, from.u8()? != 0, from.u32()?);
                let decider = from.option(|f| f.uuid())?.map_or(Decider::Outside, Decider::Pool);
                let members = (0..count).map(|_| GroupMember::decode(from)).collect::<Result<_, _>>()?;
                Self::Group(GroupRecord { group, decider, decided, members })
            }
            26 => Self::DropGroup(from.uuid()?),
            _ => return Err(Short),
        })
    }
}

impl GroupMember {
    fn decode(from: &mut Reader<'_>) -> Result<Self, Short> {
        let (lun, old_top, new_top) = (from.u64()?, from.u64()?, from.u64()?);
        Ok(Self {
            lun,
            old_top,
            new_top,
            generation: from.generation()?,
            snapshot: SnapshotRecord::decode(from)?,
        })
    }
}

impl SnapshotRecord {
    fn encode<'a>(&self, out: &'a mut Writer) -> &'a mut Writer {
        out.u64(self.id).uuid(self.uuid).u64(self.lun).u64(self.layer).text(&self.name).u64(self.created);
        out.option(self.group, |o, g| o.uuid(g))
    }

    fn decode(from: &mut Reader<'_>) -> Result<Self, Short> {
        Ok(Self {
            id: from.u64()?,
            uuid: from.uuid()?,
            lun: from.u64()?,
            layer: from.u64()?,
            name: from.text()?,
            created: from.u64()?,
            group: from.option(|f| f.uuid())?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_catalog_survives_the_way_out_and_back_and_hostile_bytes_end() {
        let mut catalog = Catalog { name: "p".into(), next_id: 1, ..Catalog::default() };
        let cut = Generation { counter: 3, id: 1 << 100 };
        let generation = Some(cut);
        let snapshot = SnapshotRecord {
            id: 5,
            uuid: Uuid::from_u128(9),
            lun: 1,
            layer: 2,
            name: "s".into(),
            created: 7,
            group: Some(Uuid::from_u128(1)),
        };
        catalog.put(Put::Lun(LunRecord {
            id: 1,
            uuid: Uuid::from_u128(4),
            name: "d".into(),
            sectors: 8,
            top: 3,
            created: 1,
            trashed: Some(2),
            claim: Some(Claim::Mapping { datastore: "ds".into(), path: "a/b".into(), physical: true }),
            abandoned: None,
        }));
        let layer = LayerRecord {
            id: 2,
            parent: 0,
            root: 4,
            meta_grain: 9,
            meta_used: 1,
            sectors: 8,
            generation,
            dying: None,
        };
        catalog.put(Put::Layer(layer));
        catalog.put(Put::Snapshot(snapshot.clone()));
        let member = GroupMember { lun: 1, old_top: 2, new_top: 3, generation: cut, snapshot };
        let group = GroupRecord {
            group: Uuid::from_u128(1),
            decider: Decider::Outside,
            decided: false,
            members: vec![member],
        };
        catalog.put(Put::Group(group));
        let bytes = catalog.encode();
        let back = Catalog::decode(&bytes).unwrap();
        assert_eq!(format!("{back:?}"), format!("{catalog:?}"));
        for cut in 0..bytes.len() {
            let _ = Catalog::decode(&bytes[..cut]);
        }
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x55;
            let _ = Catalog::decode(&bad);
        }
    }
}
