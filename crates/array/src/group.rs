//! One cut over many LUNs, in one pool or several, all or none (R32 to R34, chapter 10 of the semantics).
//!
//! The order that a caller keeps: [`Pool::prepare_cut`] in every pool; close all gates and wait until they are empty;
//! [`Prepared::cut`] for each, in memory and without waiting; open the gates; [`Prepared::settle`] in every pool;
//! [`Pool::write_group_record`] in the deciding one; [`Prepared::commit`] in every pool, the deciding one last.
//! From the cut until the commit no flush of a member is answered.
//!
//! What a cut leaves without a decision is an empty layer under the LUN's top, which merges away by itself: rolling
//! back is dropping the group's record. Rolling forward gives the frozen layer its generation and its name.

use std::cell::Cell;
use std::rc::Rc;

use block::{DiskError, Generation};
use uuid::Uuid;

use crate::catalog::{Decider, GroupMember, GroupRecord, LayerRecord, Put, SnapshotRecord};
use crate::faults::{Fault, planted};
use crate::lun::Lun;
use crate::pool::Pool;
use crate::seconds_now;
use crate::snapshot::LunError;

/// A cut that is prepared in one pool: durable, and without effect yet.
pub struct Prepared {
    pool: Rc<Pool>,
    record: GroupRecord,
    luns: Vec<Rc<Lun>>,
    cut: Cell<bool>,
}

/// A cut that another place decides about, found after opening.
#[derive(Clone, Debug)]
pub struct InDoubt {
    /// Names the cut.
    pub group: Uuid,
    /// Where the decision is.
    pub decider: Decider,
    /// LUNs and the snapshots that they may have.
    pub members: Vec<(String, String)>,
}

impl Pool {
    /// Prepares a cut: each LUN with the name of its snapshot. Durable when it returns; nothing is to be seen of it.
    pub async fn prepare_cut(
        self: &Rc<Self>,
        group: Uuid,
        decider: Decider,
        members: &[(Rc<Lun>, String)],
    ) -> Result<Prepared, LunError> {
        self.writable()?;
        self.room_for_cut()?;
        for (number, (lun, name)) in members.iter().enumerate() {
            lun.check_snapshot_name(name)?;
            lun.refuse_if_in_doubt()?;
            if members[..number].iter().any(|(other, _)| other.id == lun.id) {
                return Err(LunError::Exists { kind: "member", name: lun.name() });
            }
        }
        let member = |(lun, name): &(Rc<Lun>, String)| {
            let record = lun.record().ok_or(LunError::Disk(DiskError::Gone))?;
            let (new_top, id) = (self.next_id(), self.next_id());
            let snapshot = SnapshotRecord {
                id,
                uuid: Uuid::new_v4(),
                lun: lun.id,
                layer: record.top,
                name: name.clone(),
                created: seconds_now(),
                group: Some(group),
            };
            let generation = Generation { counter: new_top, id: Uuid::new_v4().as_u128() };
            Ok(GroupMember { lun: lun.id, old_top: record.top, new_top, generation, snapshot })
        };
        let members_found = members.iter().map(member).collect::<Result<Vec<_>, LunError>>()?;
        let record = GroupRecord { group, decider, decided: false, members: members_found };
        self.put(Put::Group(record.clone()));
        if !planted(Fault::LegNotPrepared) || decider == Decider::Pool(self.uuid()) {
            self.commit().await?;
        }
        let luns = members.iter().map(|(lun, _)| Rc::clone(lun)).collect();
        Ok(Prepared { pool: Rc::clone(self), record, luns, cut: Cell::new(false) })
    }

    /// The decision that the cut happened: durable when it returns.
    pub async fn write_group_record(&self, group: Uuid) -> Result<(), DiskError> {
        self.writable()?;
        let record = self.catalog.borrow().groups.get(&group).cloned();
        let Some(record) = record else { return Err(DiskError::Gone) };
        self.put(Put::Group(GroupRecord { decided: true, ..record }));
        self.commit().await
    }

    /// This pool has decided that the cut happened.
    pub fn group_decided(&self, group: Uuid) -> bool {
        let catalog = self.catalog.borrow();
        catalog.groups.get(&group).is_some_and(|g| g.decided)
            || catalog.snapshots.values().any(|s| s.group == Some(group))
    }

    /// Cuts that another place decides about.
    pub fn in_doubt(&self) -> Vec<InDoubt> {
        let catalog = self.catalog.borrow();
        let name = |m: &GroupMember| {
            let lun = catalog.luns.get(&m.lun).map_or_else(String::new, |l| l.name.clone());
            (lun, m.snapshot.name.clone())
        };
        catalog
            .groups
            .values()
            .map(|g| InDoubt {
                group: g.group,
                decider: g.decider,
                members: g.members.iter().map(name).collect(),
            })
            .collect()
    }

    /// Ends a cut that was in doubt, as the place decided that the record names.
    pub async fn resolve(&self, group: Uuid, happened: bool) -> Result<(), DiskError> {
        self.writable()?;
        self.finish_group(group, happened);
        self.commit().await
    }

    /// After opening: what this pool decides itself is over. Other groups stay in doubt.
    pub(crate) async fn finish_groups_at_open(&self) -> Result<(), DiskError> {
        let mine: Vec<(Uuid, bool)> = {
            let catalog = self.catalog.borrow();
            let own = |g: &&GroupRecord| g.decider == Decider::Pool(self.uuid());
            catalog.groups.values().filter(own).map(|g| (g.group, g.decided)).collect()
        };
        if mine.is_empty() {
            return Ok(());
        }
        for (group, happened) in mine {
            self.finish_group(group, happened);
        }
        if self.is_read_only() { Ok(()) } else { self.commit().await }
    }

    /// Gives the members their snapshots, or forgets the cut. In memory; durable with the next commit.
    fn finish_group(&self, group: Uuid, happened: bool) {
        let record = self.catalog.borrow().groups.get(&group).cloned();
        let Some(record) = record else { return };
        for member in record.members.iter().filter(|_| happened) {
            // The decision is durable after every leg; a leg without its layer was not part of it.
            if !self.catalog.borrow().layers.contains_key(&member.new_top) {
                tracing::error!(pool = %self.uuid(), %group, lun = member.lun, "a decided cut has no layer here");
                continue;
            }
            self.change_layer(member.old_top, |l| l.generation = Some(member.generation));
            self.put(Put::Snapshot(member.snapshot.clone()));
        }
        self.put(Put::DropGroup(group));
        self.chains_changed();
    }
}

impl Prepared {
    /// Names the cut.
    pub fn group(&self) -> Uuid {
        self.record.group
    }

    /// The generation of each member's cut, in the order in which they were given.
    pub fn generations(&self) -> Vec<Generation> {
        self.record.members.iter().map(|m| m.generation).collect()
    }

    /// The cut, while all gates are closed and empty. Takes no time and cannot fail.
    pub fn cut(&self) {
        assert!(!self.cut.replace(true), "a cut happens once");
        for (lun, member) in self.luns.iter().zip(&self.record.members) {
            let Some(record) = lun.record() else { continue };
            let layer =
                LayerRecord { parent: member.old_top, ..LayerRecord::empty(member.new_top, record.sectors) };
            self.pool.put(Put::Layer(layer));
            self.pool.put(Put::Lun(crate::catalog::LunRecord { top: member.new_top, ..record }));
            lun.undecided.set(lun.undecided.get() + 1);
        }
        self.pool.chains_changed();
    }

    /// Makes durable what was written before the cut. Needed in every pool before the decision is written.
    pub async fn settle(&self) -> Result<(), DiskError> {
        if planted(Fault::LegNotPrepared) && self.record.decider != Decider::Pool(self.pool.uuid()) {
            return Ok(());
        }
        self.pool.commit().await
    }

    /// The cut was decided: the snapshots are there. Flushes are answered again.
    pub async fn commit(self) -> Result<(), DiskError> {
        self.pool.finish_group(self.record.group, true);
        self.answer_flushes();
        self.pool.commit().await
    }

    /// There is no cut: what it left merges away.
    pub async fn abandon(self) -> Result<(), DiskError> {
        self.pool.finish_group(self.record.group, false);
        self.answer_flushes();
        self.pool.commit().await
    }

    fn answer_flushes(&self) {
        if self.cut.replace(false) {
            for lun in &self.luns {
                lun.undecided.set(lun.undecided.get() - 1);
                lun.decided.wake_all();
            }
        }
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        // I8: whoever could not decide must not leave a guest waiting. A flush that is answered now loses nothing: the
        // layer that an undecided cut leaves keeps its data when it merges away.
        self.answer_flushes();
    }
}
