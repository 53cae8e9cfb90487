//! LUNs and snapshots as objects: create, find, grow, remove, cut, clone, revert, hold. Each of them takes the same
//! time at any size, and is one record of the journal.

use std::collections::BTreeSet;
use std::rc::Rc;

use block::{
    Disk, DiskError, Extents, Generation, Io, Safe, Sector, Segments, SegmentsMut, Shape, check_range,
};
use uuid::Uuid;

use crate::catalog::{Catalog, Claim, HoldRecord, LayerRecord, LunRecord, Put, SnapshotRecord};
use crate::format::MOST_LUN_SECTORS;
use crate::lun::Lun;
use crate::pool::Pool;
use crate::seconds_now;
use crate::space::Purpose;

/// Longest name of a LUN or snapshot, in bytes.
pub const MOST_NAME: usize = 128;

/// Why something could not be done with a LUN or snapshot.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LunError {
    /// There is no such LUN.
    #[error("no LUN {0}: see `lun ls`")]
    NoLun(String),
    /// There is no such snapshot.
    #[error("LUN {lun} has no snapshot {snapshot}: see `snap ls {lun}`")]
    NoSnapshot {
        /// The LUN.
        lun: String,
        /// What was asked for.
        snapshot: String,
    },
    /// The name is taken.
    #[error("there is a {kind} {name} already")]
    Exists {
        /// LUN or snapshot.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// Another LUN of the pool has the same identity (in the trash, perhaps).
    #[error("LUN {0} has the same SCSI identity")]
    SameIdentity(String),
    /// No name for a LUN or snapshot.
    #[error("{0:?} is no name: 1 to 128 bytes, without '/', '@', ':' and control characters")]
    Name(String),
    /// A length that cannot be.
    #[error("{sectors} sectors: a LUN has between 1 and {MOST_LUN_SECTORS} sectors of 512 bytes")]
    Size {
        /// Asked for.
        sectors: u64,
    },
    /// A LUN never shrinks.
    #[error("LUN {lun} has {has} sectors and cannot be made smaller ({wanted})")]
    Smaller {
        /// The LUN.
        lun: String,
        /// Its length.
        has: u64,
        /// Asked for.
        wanted: u64,
    },
    /// Somebody stands on it.
    #[error("LUN {lun} belongs to {claim}: do it there")]
    Claimed {
        /// The LUN.
        lun: String,
        /// Who.
        claim: Claim,
    },
    /// The generation is not in the LUN's history.
    #[error("LUN {lun} does not know this generation: everything has to be read")]
    UnknownGeneration {
        /// The LUN.
        lun: String,
    },
    /// There is no branch that a revert left.
    #[error("LUN {0} was not reverted")]
    NotReverted(String),
    /// What a revert left is still there, and a second one would leave another.
    #[error("LUN {0} was reverted already, and what it held before that is still kept")]
    Reverted(String),
    /// A group cut is not decided yet.
    #[error("LUN {0} is part of a cut that is not decided: `group resolve`")]
    InDoubt(String),
    /// The pool did not do it.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// A new LUN.
#[derive(Clone, Debug)]
pub struct NewLun {
    /// Its name.
    pub name: String,
    /// Length in sectors; a clone: 0 for that of the snapshot.
    pub sectors: u64,
    /// Its identity; a new one when none is given.
    pub uuid: Option<Uuid>,
}

impl NewLun {
    /// With an identity of its own.
    pub fn new(name: &str, sectors: u64) -> Self {
        Self { name: name.to_owned(), sectors, uuid: None }
    }
}

/// A snapshot, opened for reading.
pub struct Snapshot {
    pool: Rc<Pool>,
    id: u64,
    sectors: u64,
    generation: Generation,
    chain: std::cell::RefCell<(u64, Rc<[u64]>)>,
}

fn check_name(name: &str) -> Result<(), LunError> {
    let bad = |c: char| c.is_control() || matches!(c, '/' | '@' | ':');
    match name.is_empty() || name.len() > MOST_NAME || name.contains(bad) {
        true => Err(LunError::Name(name.to_owned())),
        false => Ok(()),
    }
}

fn check_new(catalog: &Catalog, new: &NewLun, uuid: Uuid) -> Result<(), LunError> {
    check_name(&new.name)?;
    if new.sectors == 0 || new.sectors > MOST_LUN_SECTORS {
        return Err(LunError::Size { sectors: new.sectors });
    }
    if catalog.luns.values().any(|l| l.trashed.is_none() && l.name == new.name) {
        return Err(LunError::Exists { kind: "LUN", name: new.name.clone() });
    }
    let naa = crate::identity::naa(uuid);
    match catalog.luns.values().find(|l| crate::identity::naa(l.uuid) == naa) {
        Some(other) => Err(LunError::SameIdentity(other.name.clone())),
        None => Ok(()),
    }
}

impl Pool {
    /// Makes a thin LUN.
    pub async fn create_lun(self: &Rc<Self>, new: NewLun) -> Result<Rc<Lun>, LunError> {
        self.add_lun(new, 0).await
    }

    /// Makes a LUN that begins as a snapshot of another one. It shares what it does not change, and has an identity
    /// of its own.
    pub async fn clone_lun(
        self: &Rc<Self>,
        lun: &str,
        snapshot: &str,
        mut new: NewLun,
    ) -> Result<Rc<Lun>, LunError> {
        let layer = {
            let catalog = self.catalog.borrow();
            let record = catalog.find_lun(lun).ok_or_else(|| LunError::NoLun(lun.to_owned()))?;
            let found = catalog
                .find_snapshot(record.id, snapshot)
                .ok_or_else(|| LunError::NoSnapshot { lun: lun.to_owned(), snapshot: snapshot.to_owned() })?;
            let has = catalog.layers.get(&found.layer).map_or(0, |l| l.sectors);
            if new.sectors == 0 {
                new.sectors = has;
            }
            if new.sectors < has {
                return Err(LunError::Smaller { lun: lun.to_owned(), has, wanted: new.sectors });
            }
            found.layer
        };
        self.add_lun(new, layer).await
    }

    async fn add_lun(self: &Rc<Self>, new: NewLun, parent: u64) -> Result<Rc<Lun>, LunError> {
        self.writable()?;
        self.room_for_cut()?;
        let uuid = new.uuid.unwrap_or_else(Uuid::new_v4);
        check_new(&self.catalog.borrow(), &new, uuid)?;
        let (id, top) = (self.next_id(), self.next_id());
        self.put(Put::Layer(LayerRecord { parent, ..LayerRecord::empty(top, new.sectors) }));
        self.put(Put::Lun(LunRecord {
            id,
            uuid,
            name: new.name,
            sectors: new.sectors,
            top,
            created: seconds_now(),
            trashed: None,
            claim: None,
            abandoned: None,
        }));
        self.commit().await?;
        self.lun_by_id(id).ok_or(LunError::Disk(DiskError::Gone))
    }

    /// A snapshot or clone takes little room, but what is written to it takes much: a pool that is nearly full
    /// refuses it first.
    pub(crate) fn room_for_cut(&self) -> Result<(), DiskError> {
        if self.space.has_room(Purpose::Cut) { Ok(()) } else { Err(DiskError::NoSpace) }
    }

    /// The LUN with this number, the trash included.
    pub fn lun_by_id(self: &Rc<Self>, id: u64) -> Option<Rc<Lun>> {
        if let Some(open) = self.luns.borrow().get(&id).and_then(std::rc::Weak::upgrade) {
            return Some(open);
        }
        let lun = Lun::new(Rc::clone(self), self.catalog.borrow().luns.get(&id)?);
        self.luns.borrow_mut().insert(id, Rc::downgrade(&lun));
        Some(lun)
    }

    /// A living LUN by name, uuid, NAA or serial.
    pub fn lun(self: &Rc<Self>, name: &str) -> Option<Rc<Lun>> {
        let id = self.catalog.borrow().find_lun(name)?.id;
        self.lun_by_id(id)
    }

    /// All living LUNs, by number.
    pub fn luns(self: &Rc<Self>) -> Vec<Rc<Lun>> {
        let living: Vec<u64> = {
            let catalog = self.catalog.borrow();
            catalog.luns.values().filter(|l| l.trashed.is_none()).map(|l| l.id).collect()
        };
        living.into_iter().filter_map(|id| self.lun_by_id(id)).collect()
    }

    /// LUNs in the trash.
    pub fn trash(&self) -> Vec<LunRecord> {
        self.catalog.borrow().luns.values().filter(|l| l.trashed.is_some()).cloned().collect()
    }

    /// The LUN whose writers may change this layer: its top, or one that only its top can reach, from which writers take
    /// grains over. The same LUN as long as nothing in the background begins or ends.
    pub(crate) fn lun_over(&self, layer: u64) -> Option<Rc<Lun>> {
        let id = {
            let catalog = self.catalog.borrow();
            let mut at = layer;
            loop {
                let stands = |l: &&LunRecord| l.top == at || l.abandoned == Some(at);
                if let Some(lun) = catalog.luns.values().find(stands) {
                    break lun.id;
                }
                let mut children = catalog.children(at).filter(|l| l.dying.is_none());
                at = children.next().filter(|_| children.next().is_none())?.id;
            }
        };
        self.me.upgrade()?.lun_by_id(id)
    }

    /// The LUN whose top layer this is.
    pub(crate) fn lun_with_top(&self, layer: u64) -> Option<Rc<Lun>> {
        let id = self.catalog.borrow().luns.values().find(|l| l.top == layer)?.id;
        self.me.upgrade()?.lun_by_id(id)
    }

    /// Removes a LUN: into the trash for 7 days or until its room is needed, or at once.
    pub async fn remove_lun(self: &Rc<Self>, name: &str, now: bool) -> Result<(), LunError> {
        self.writable()?;
        let lun = self.lun(name).ok_or_else(|| LunError::NoLun(name.to_owned()))?;
        lun.refuse_if_claimed()?;
        let gate = lun.close_gate().await;
        lun.refuse_if_in_doubt()?;
        lun.change(|l| l.trashed = Some(seconds_now()));
        self.chains_changed();
        drop(gate);
        match now {
            true => self.purge(lun.id).await?,
            false => self.commit().await?,
        }
        Ok(())
    }

    /// Takes a LUN out of the trash.
    pub async fn undelete_lun(self: &Rc<Self>, name: &str) -> Result<Rc<Lun>, LunError> {
        self.writable()?;
        let found = {
            let catalog = self.catalog.borrow();
            let trashed =
                |l: &&LunRecord| l.trashed.is_some() && (l.name == name || l.uuid.to_string() == name);
            let youngest = catalog.luns.values().filter(trashed).max_by_key(|l| (l.trashed, l.id));
            let found = youngest.cloned().ok_or_else(|| LunError::NoLun(name.to_owned()))?;
            if catalog.luns.values().any(|l| l.trashed.is_none() && l.name == found.name) {
                return Err(LunError::Exists { kind: "LUN", name: found.name });
            }
            found
        };
        let id = found.id;
        self.put(Put::Lun(LunRecord { trashed: None, ..found }));
        self.chains_changed();
        self.commit().await?;
        self.lun_by_id(id).ok_or(LunError::Disk(DiskError::Gone))
    }

    /// Removes a LUN in the trash for good.
    pub async fn empty_trash(self: &Rc<Self>, name: &str) -> Result<(), LunError> {
        self.writable()?;
        let found = self.trash().into_iter().find(|l| l.name == name || l.uuid.to_string() == name);
        let id = found.ok_or_else(|| LunError::NoLun(name.to_owned()))?.id;
        Ok(self.purge(id).await?)
    }
}

/// A closed and empty gate; it opens when dropped.
pub(crate) struct ClosedGate(Rc<block::Gate>);

impl Drop for ClosedGate {
    fn drop(&mut self) {
        self.0.open();
    }
}

impl Lun {
    /// What the catalog says of it.
    pub fn record(&self) -> Option<LunRecord> {
        self.pool.catalog.borrow().luns.get(&self.id).cloned()
    }

    /// Its name; empty when it is gone.
    pub fn name(&self) -> String {
        self.pool.catalog.borrow().luns.get(&self.id).map_or_else(String::new, |l| l.name.clone())
    }

    /// SCSI name: `naa.` and 32 hex digits.
    pub fn naa(&self) -> String {
        crate::identity::naa_text(self.uuid())
    }

    /// SCSI serial number.
    pub fn serial(&self) -> String {
        crate::identity::serial(self.uuid())
    }

    /// Who stands on it.
    pub fn claimed_by(&self) -> Option<Claim> {
        self.pool.catalog.borrow().luns.get(&self.id).and_then(|l| l.claim.clone())
    }

    fn refuse_if_claimed(&self) -> Result<(), LunError> {
        match self.claimed_by() {
            Some(claim) => Err(LunError::Claimed { lun: self.name(), claim }),
            None => Ok(()),
        }
    }

    /// While a cut is prepared its top layer stays what it is.
    pub(crate) fn refuse_if_in_doubt(&self) -> Result<(), LunError> {
        let catalog = self.pool.catalog.borrow();
        let member = catalog.groups.values().flat_map(|g| &g.members).any(|m| m.lun == self.id);
        if member {
            Err(LunError::InDoubt(catalog.luns.get(&self.id).map_or_else(String::new, |l| l.name.clone())))
        } else {
            Ok(())
        }
    }

    /// Somebody stands on it from now on (or nobody).
    pub async fn claim(&self, claim: Option<Claim>) -> Result<(), LunError> {
        self.pool.writable()?;
        if let (Some(has), Some(wanted)) = (self.claimed_by(), &claim)
            && has != *wanted
        {
            return Err(LunError::Claimed { lun: self.name(), claim: has });
        }
        self.change(|l| l.claim = claim);
        Ok(self.pool.commit().await?)
    }

    fn change(&self, change: impl FnOnce(&mut LunRecord)) {
        if let Some(mut record) = self.record() {
            change(&mut record);
            self.pool.put(Put::Lun(record));
        }
    }

    pub(crate) async fn close_gate(&self) -> ClosedGate {
        let gate = self.gate();
        gate.close();
        let closed = ClosedGate(Rc::clone(&gate));
        gate.drained().await;
        closed
    }

    /// Another name.
    pub async fn rename(&self, name: &str) -> Result<(), LunError> {
        self.pool.writable()?;
        check_name(name)?;
        let taken = |l: &LunRecord| l.trashed.is_none() && l.name == name && l.id != self.id;
        if self.pool.catalog.borrow().luns.values().any(taken) {
            return Err(LunError::Exists { kind: "LUN", name: name.to_owned() });
        }
        self.change(|l| l.name = name.to_owned());
        Ok(self.pool.commit().await?)
    }

    /// Makes it longer. The new part reads as zero.
    pub async fn resize(&self, sectors: u64) -> Result<(), LunError> {
        self.pool.writable()?;
        let Some(record) = self.record() else { return Err(LunError::Disk(DiskError::Gone)) };
        if sectors < record.sectors {
            return Err(LunError::Smaller { lun: record.name, has: record.sectors, wanted: sectors });
        }
        if sectors > MOST_LUN_SECTORS {
            return Err(LunError::Size { sectors });
        }
        self.change(|l| l.sectors = sectors);
        self.pool.change_layer(record.top, |l| l.sectors = sectors);
        if let Some(below) = self.pool.folds_into(record.top) {
            self.pool.change_layer(below, |l| l.sectors = l.sectors.max(sectors));
        }
        self.pool.commit().await?;
        self.sectors.set(sectors.max(self.sectors.get()));
        Ok(())
    }

    /// Cuts: what it holds now stays as a snapshot.
    pub async fn snapshot(self: &Rc<Self>, name: &str) -> Result<Rc<Snapshot>, LunError> {
        self.pool.writable()?;
        self.pool.room_for_cut()?;
        self.check_snapshot_name(name)?;
        let gate = self.close_gate().await;
        // Somebody else may have been faster while the gate closed.
        self.check_snapshot_name(name)?;
        self.refuse_if_in_doubt()?;
        let record = self.freeze(name, None).ok_or(LunError::Disk(DiskError::Gone))?;
        drop(gate);
        self.pool.commit().await?;
        self.open_snapshot(&record.name)
    }

    pub(crate) fn check_snapshot_name(&self, name: &str) -> Result<(), LunError> {
        check_name(name)?;
        match self.pool.catalog.borrow().find_snapshot(self.id, name) {
            Some(_) => Err(LunError::Exists { kind: "snapshot", name: name.to_owned() }),
            None => Ok(()),
        }
    }

    /// The cut itself, while nobody writes: an empty layer on top. In memory at once, durable with the next commit.
    pub(crate) fn freeze(&self, name: &str, group: Option<Uuid>) -> Option<SnapshotRecord> {
        let pool = &self.pool;
        let record = self.record()?;
        let (new_top, id) = (pool.next_id(), pool.next_id());
        let generation = Generation { counter: new_top, id: Uuid::new_v4().as_u128() };
        pool.change_layer(record.top, |l| {
            l.generation = Some(generation);
            l.sectors = record.sectors;
        });
        pool.put(Put::Layer(LayerRecord {
            parent: record.top,
            ..LayerRecord::empty(new_top, record.sectors)
        }));
        let snapshot = SnapshotRecord {
            id,
            uuid: Uuid::new_v4(),
            lun: self.id,
            layer: record.top,
            name: name.to_owned(),
            created: seconds_now(),
            group,
        };
        pool.put(Put::Snapshot(snapshot.clone()));
        pool.put(Put::Lun(LunRecord { top: new_top, ..record }));
        pool.chains_changed();
        Some(snapshot)
    }

    /// Its snapshots, oldest first.
    pub fn snapshots(&self) -> Vec<SnapshotRecord> {
        let catalog = self.pool.catalog.borrow();
        catalog.snapshots.values().filter(|s| s.lun == self.id).cloned().collect()
    }

    pub(crate) fn find_snapshot(&self, name: &str) -> Result<SnapshotRecord, LunError> {
        let found = self.pool.catalog.borrow().find_snapshot(self.id, name).cloned();
        found.ok_or_else(|| LunError::NoSnapshot { lun: self.name(), snapshot: name.to_owned() })
    }

    /// Opens a snapshot for reading.
    pub fn open_snapshot(&self, name: &str) -> Result<Rc<Snapshot>, LunError> {
        let record = self.find_snapshot(name)?;
        let catalog = self.pool.catalog.borrow();
        let layer = catalog.layers.get(&record.layer).ok_or(LunError::Disk(DiskError::Gone))?;
        let generation = layer.generation.ok_or(LunError::Disk(DiskError::Gone))?;
        Ok(Rc::new(Snapshot {
            pool: Rc::clone(&self.pool),
            id: record.id,
            sectors: layer.sectors,
            generation,
            chain: std::cell::RefCell::new((0, Rc::from([]))),
        }))
    }

    /// Removes a snapshot. What only it holds is given back in the background ([`Pool::tidy`]); its generation stays
    /// known as long as somebody holds it.
    pub async fn remove_snapshot(&self, name: &str) -> Result<(), LunError> {
        self.pool.writable()?;
        let record = self.find_snapshot(name)?;
        self.pool.put(Put::DropSnapshot(record.id));
        self.pool.chains_changed();
        Ok(self.pool.commit().await?)
    }

    /// Goes back to a snapshot. What was there is kept until [`Lun::accept`]; [`Lun::undo_revert`] returns to it. One of
    /// both comes before the next revert: only one branch is kept, and none is given up unasked.
    pub async fn revert(&self, snapshot: &str) -> Result<(), LunError> {
        self.refuse_if_claimed()?;
        self.pool.writable()?;
        self.pool.room_for_cut()?;
        self.find_snapshot(snapshot)?;
        self.refuse_if_reverted()?;
        let _gate = self.close_gate().await;
        self.refuse_if_in_doubt()?;
        self.refuse_if_reverted()?;
        let target = self.find_snapshot(snapshot)?.layer;
        let Some(record) = self.record() else { return Err(LunError::Disk(DiskError::Gone)) };
        let sectors = self.pool.catalog.borrow().layers.get(&target).map_or(0, |l| l.sectors);
        let top = self.pool.next_id();
        self.pool.put(Put::Layer(LayerRecord { parent: target, ..LayerRecord::empty(top, sectors) }));
        let abandoned = Some(record.top);
        self.pool.put(Put::Lun(LunRecord { top, sectors, abandoned, ..record }));
        self.pool.chains_changed();
        self.sectors.set(sectors);
        Ok(self.pool.commit().await?)
    }

    /// What an earlier revert left has no name but the LUN's: a second one would take it away.
    fn refuse_if_reverted(&self) -> Result<(), LunError> {
        match self.record().is_some_and(|r| r.abandoned.is_some()) {
            true => Err(LunError::Reverted(self.name())),
            false => Ok(()),
        }
    }

    /// Gives up what a revert left.
    pub async fn accept(&self) -> Result<(), LunError> {
        self.pool.writable()?;
        if self.record().is_none_or(|r| r.abandoned.is_none()) {
            return Err(LunError::NotReverted(self.name()));
        }
        self.change(|l| l.abandoned = None);
        Ok(self.pool.commit().await?)
    }

    /// Returns to what was there before the revert; what was written since is given up.
    pub async fn undo_revert(&self) -> Result<(), LunError> {
        self.refuse_if_claimed()?;
        self.pool.writable()?;
        let _gate = self.close_gate().await;
        self.refuse_if_in_doubt()?;
        let Some(record) = self.record() else { return Err(LunError::Disk(DiskError::Gone)) };
        let Some(top) = record.abandoned else { return Err(LunError::NotReverted(record.name)) };
        let sectors = self.pool.catalog.borrow().layers.get(&top).map_or(0, |l| l.sectors);
        self.pool.put(Put::Lun(LunRecord { top, sectors, abandoned: None, ..record }));
        self.pool.chains_changed();
        self.sectors.set(sectors);
        Ok(self.pool.commit().await?)
    }

    /// A generation of this LUN stays known until it is released, also when its snapshot goes.
    pub async fn hold(&self, generation: Generation, holder: &str) -> Result<(), LunError> {
        self.pool.writable()?;
        let layer = {
            let catalog = self.pool.catalog.borrow();
            let top = catalog.luns.get(&self.id).map_or(0, |l| l.top);
            let found = catalog.chain(top).find(|l| l.generation == Some(generation)).map(|l| l.id);
            // A layer that is being merged away knows its generation no longer.
            match found.filter(|l| catalog.keeps_generation(*l)) {
                Some(layer) if catalog.holds.values().any(|h| h.layer == layer && h.holder == holder) => None,
                Some(layer) => Some(layer),
                None => return Err(LunError::UnknownGeneration { lun: self.name() }),
            }
        };
        if let Some(layer) = layer {
            let id = self.pool.next_id();
            self.pool.put(Put::Hold(HoldRecord { id, layer, holder: holder.to_owned() }));
        }
        Ok(self.pool.commit().await?)
    }

    /// Undoes [`Lun::hold`]; nothing happens when it is not held.
    pub async fn release(&self, generation: Generation, holder: &str) -> Result<(), LunError> {
        self.pool.writable()?;
        let held: Vec<u64> = {
            let catalog = self.pool.catalog.borrow();
            let of = |layer: u64| catalog.layers.get(&layer).and_then(|l| l.generation) == Some(generation);
            catalog.holds.values().filter(|h| h.holder == holder && of(h.layer)).map(|h| h.id).collect()
        };
        held.into_iter().for_each(|id| self.pool.put(Put::DropHold(id)));
        Ok(self.pool.commit().await?)
    }

    /// Of all generations in this LUN's history that `holder` holds, only this one stays held: whatever else he left
    /// there (a job that was killed, a record that was lost) goes with one record of the journal. How many went. What he
    /// holds of other LUNs stays.
    pub async fn release_all_but(&self, generation: Generation, holder: &str) -> Result<usize, LunError> {
        self.pool.writable()?;
        let others: Vec<u64> = {
            let catalog = self.pool.catalog.borrow();
            let history = self.history(&catalog);
            let goes = |h: &&HoldRecord| {
                let kept = catalog.layers.get(&h.layer).and_then(|l| l.generation) == Some(generation);
                h.holder == holder && history.contains(&h.layer) && !kept
            };
            catalog.holds.values().filter(goes).map(|h| h.id).collect()
        };
        others.iter().for_each(|id| self.pool.put(Put::DropHold(*id)));
        self.pool.commit().await?;
        Ok(others.len())
    }

    /// The generations in this LUN's history that somebody holds, oldest first, and who.
    pub fn holds(&self) -> Vec<(Generation, String)> {
        let catalog = self.pool.catalog.borrow();
        let history = self.history(&catalog);
        let mut held: Vec<(Generation, String)> = catalog
            .holds
            .values()
            .filter(|h| history.contains(&h.layer))
            .filter_map(|h| Some((catalog.layers.get(&h.layer)?.generation?, h.holder.clone())))
            .collect();
        held.sort_by_key(|(generation, _)| generation.counter);
        held
    }

    /// Every layer that this LUN, its snapshots or what a revert left stand on.
    fn history(&self, catalog: &Catalog) -> BTreeSet<u64> {
        let record = catalog.luns.get(&self.id);
        let tops = record.into_iter().flat_map(|l| [Some(l.top), l.abandoned]).flatten();
        let snapshots = catalog.snapshots.values().filter(|s| s.lun == self.id).map(|s| s.layer);
        let mut history = BTreeSet::new();
        for top in tops.chain(snapshots) {
            for layer in catalog.chain(top) {
                if !history.insert(layer.id) {
                    break; // seen from here on
                }
            }
        }
        history
    }
}

impl LayerRecord {
    /// A layer that holds nothing and stands on nothing.
    pub(crate) fn empty(id: u64, sectors: u64) -> Self {
        Self { id, parent: 0, root: 0, meta_grain: 0, meta_used: 0, sectors, generation: None, dying: None }
    }
}

impl Snapshot {
    /// The cut that it shows.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// What the catalog says of it; `None` when it was removed.
    pub fn record(&self) -> Option<SnapshotRecord> {
        self.pool.catalog.borrow().snapshots.get(&self.id).cloned()
    }

    /// Its layers from the top down, while it is there.
    fn layers(&self) -> Result<Rc<[u64]>, DiskError> {
        let chains = self.pool.chains.get();
        {
            let chain = self.chain.borrow();
            if chain.0 == chains {
                return Ok(Rc::clone(&chain.1));
            }
        }
        let catalog = self.pool.catalog.borrow();
        let record = catalog.snapshots.get(&self.id).ok_or(DiskError::Gone)?;
        let layers: Rc<[u64]> = catalog.chain(record.layer).map(|l| l.id).collect();
        *self.chain.borrow_mut() = (chains, Rc::clone(&layers));
        Ok(layers)
    }
}

impl Disk for Snapshot {
    fn shape(&self) -> Shape {
        Shape {
            sectors: self.sectors,
            physical_block_bytes: block::BLOCK_BYTES as u32,
            read_only: true,
            unmap_reads_zero: true,
            memory_align: self.pool.memory_align(),
        }
    }

    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        Box::pin(async move {
            check_range(self.sectors, at, into.len() as u64 / 512)?;
            self.pool.read_chain(&self.layers()?, at, into).await?;
            // Removed meanwhile: its grains may have moved on before they were looked up.
            self.layers().map(drop)
        })
    }

    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, _safe: Safe) -> Io<'a> {
        Box::pin(std::future::ready(
            check_range(self.sectors, at, from.len() as u64 / 512)
                .and_then(|()| if from.is_empty() { Ok(()) } else { Err(DiskError::ReadOnly) }),
        ))
    }

    fn zero(&self, at: Sector, count: u64, _may_free: bool) -> Io<'_> {
        let refused = if count == 0 { Ok(()) } else { Err(DiskError::ReadOnly) };
        Box::pin(std::future::ready(check_range(self.sectors, at, count).and(refused)))
    }

    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        self.zero(at, count, true)
    }

    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        Box::pin(async move {
            check_range(self.sectors, at, count)?;
            self.pool.chain_status(&self.layers()?, at, count, since, out).await?;
            self.layers().map(drop)
        })
    }

    fn compare_and_write<'a>(
        &'a self,
        at: Sector,
        _expected: &'a Segments<'a>,
        new: &'a Segments<'a>,
    ) -> Io<'a> {
        self.write(at, new, Safe::AtNextFlush)
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(std::future::ready(Ok(())))
    }
}
