//! Cuts of backups that outlive the daemon: a backup that a restart interrupted goes on with the cut that it had made,
//! where that still stands, and reads only what it had not stored.
//!
//! The record is written when the cut is made and goes before the cut does, so a cut with a record is whole, and one
//! without belongs to nobody. At start, records that no job wants are dropped with their cuts.

use std::rc::Rc;
use std::time::Duration;

use backup::{BackupId, Manifest, Repository};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vm::Vm;
use vm::vmsnap::Vmsnap;

use super::backups::{Frozen, Images};
use super::cut::Cut;
use super::redo::{parse_reserve, vmsnap_problem};
use super::{Folder, Store};
use crate::files::Versioned;
use crate::jobs::Progress;
use crate::model::NewBackup;
use crate::problem::{Kind, Outcome, Problem};

/// Format of the record.
const FORMAT: u32 = 1;

/// What the home remembers of the cut of a backup under way: one for a VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CutRecord {
    format: u32,
    /// What was asked for: the job that asks for the same goes on.
    new: NewBackup,
    /// The backup to be.
    backup: BackupId,
    /// What it is compared with.
    base: Option<BackupId>,
    group: Uuid,
    hold_us: u64,
    at: jiff::Timestamp,
    /// Name of the snapshots.
    snap: String,
    /// LUNs that have one.
    luns: Vec<Uuid>,
    /// By redo logs: the VM's small files as they were before. Else they are in the snapshots.
    files: Vec<(String, Vec<u8>)>,
}

impl Versioned for CutRecord {
    const FORMAT: u32 = FORMAT;
}

impl CutRecord {
    /// The record of a cut that was just made.
    pub(super) fn new(new: &NewBackup, begun: &Begun) -> Self {
        let Begun { frozen, vmsnap, backup, base, .. } = begun;
        Self {
            format: FORMAT,
            new: new.clone(),
            backup: *backup,
            base: base.as_ref().map(|b| b.id),
            group: frozen.cut.group,
            hold_us: u64::try_from(frozen.cut.hold.as_micros()).unwrap_or(u64::MAX),
            at: frozen.cut.at,
            snap: frozen.images.snap.clone(),
            luns: frozen.images.luns.borrow().iter().map(|l| l.lun.uuid()).collect(),
            files: if vmsnap.is_some() { frozen.files.clone() } else { Vec::new() },
        }
    }

    fn is_redo(&self) -> bool {
        self.new.via == "redo"
    }
}

/// A backup that has its cut.
pub struct Begun {
    /// The disks, frozen.
    pub(super) frozen: Frozen,
    /// The redo logs above them.
    pub(super) vmsnap: Option<Vmsnap>,
    /// The backup to be.
    pub(super) backup: BackupId,
    /// What it is compared with.
    pub(super) base: Option<Manifest>,
}

impl Store {
    /// Reads the records, before any leftover of a backup is removed.
    pub(super) async fn load_cuts(&self) -> Outcome {
        let (records, unread) = self.load_kept::<CutRecord>(Folder::Cuts).await?;
        *self.cuts.borrow_mut() = records.into_iter().map(|r| (r.new.vm.clone(), r)).collect();
        *self.unread_cuts.borrow_mut() = unread.into_iter().collect();
        Ok(())
    }

    /// Reads the records of a folder, one for each VM; whatever this program cannot read, as what a newer one wrote, comes
    /// back as VM and reason: what it speaks of must be left alone.
    pub(super) async fn load_kept<T>(&self, folder: Folder) -> Outcome<Kept<T>>
    where
        T: Versioned + Send + 'static,
    {
        let (good, bad) = self.load_files::<T>(folder).await?;
        let mut unread = Vec::new();
        for (file, error) in bad {
            self.is_unreadable(folder, &file, &error);
            let vm = crate::cli::from_segment(file.trim_end_matches(".json"));
            tracing::error!(vm, %error, "left alone, with what it speaks of");
            unread.push((vm, error.to_string()));
        }
        Ok((good, unread))
    }

    /// A snapshot that a record speaks of, or one that cannot be read may speak of.
    pub(super) fn is_standing(&self, snap: &str) -> bool {
        !self.unread_cuts.borrow().is_empty() || self.cuts.borrow().values().any(|r| r.snap == snap)
    }

    /// The VM is on redo logs that a backup goes on with.
    pub(super) fn stays_on_redo(&self, vm: &str) -> bool {
        self.unread_cuts.borrow().contains_key(vm)
            || self.cuts.borrow().get(vm).is_some_and(CutRecord::is_redo)
    }

    /// Refuses what would end a backup of which this program cannot say how far it is.
    pub(super) fn cut_is_known(&self, vm: &str) -> Outcome {
        let unread = self.unread_cuts.borrow();
        let Some(why) = unread.get(vm) else { return Ok(()) };
        let path = self.object_path(Folder::Cuts, vm);
        let title = format!("a backup of VM \"{vm}\" is under way that this kagami does not understand");
        Err(Problem::new("KGM-BKP-0022", Kind::Refused, title).why(why).hint(format!(
            "use the kagami that wrote it; or remove {} and restart the daemon: the backup is given up then",
            path.display()
        )))
    }

    /// Remembers the cut. Without the record the backup goes on, and begins anew after a restart.
    pub(super) async fn remember_cut(&self, record: CutRecord) {
        let vm = record.new.vm.clone();
        self.cuts.borrow_mut().insert(vm.clone(), record.clone());
        if let Err(problem) = self.save(Folder::Cuts, &vm, record).await {
            tracing::warn!(vm, %problem, "after a restart this backup would begin anew");
        }
    }

    /// The cut has served its purpose, or never will.
    pub(super) async fn forget_cut(&self, vm: &str) {
        let known = self.cuts.borrow_mut().remove(vm).is_some();
        if known && let Err(problem) = self.forget(Folder::Cuts, vm).await {
            tracing::warn!(vm, %problem, "the record of a cut stays; without the cut it does no harm");
        }
    }

    /// After start, before jobs go on: records that none of these backups wants are dropped with their cuts.
    pub async fn keep_cuts(self: &Rc<Self>, wanted: &[NewBackup]) {
        let records: Vec<CutRecord> = self.cuts.borrow().values().cloned().collect();
        for record in records.into_iter().filter(|r| !wanted.contains(&r.new)) {
            let name = record.new.vm.clone();
            tracing::info!(vm = name, "the cut of a backup that nobody goes on with is dropped");
            self.drop_cut(&record).await;
            if record.is_redo()
                && let Ok(vm) = self.open_vm(&name)
            {
                self.consolidate_later(vm);
            }
        }
    }

    /// Removes a record and the snapshots of its cut. Redo logs are for who calls.
    async fn drop_cut(&self, record: &CutRecord) {
        self.forget_cut(&record.new.vm).await;
        let (path, id) = (record.new.repo.clone(), record.backup);
        let forgotten = lane::offload(move || {
            Repository::open(&path, backup::Options::default()).and_then(|repository| repository.forget(id))
        });
        if let Err(error) = forgotten.await {
            tracing::debug!(%error, "what was stored of a backup stays until the next prune");
        }
        for uuid in &record.luns {
            let Ok(found) = self.lun(&uuid.to_string()) else { continue };
            if found.has_snapshot(&record.snap)
                && let Err(error) = found.lun.remove_snapshot(&record.snap).await
            {
                tracing::warn!(lun = found.lun.name(), snap = record.snap, %error, "a snapshot stays");
            }
        }
    }

    /// The cut that an interrupted attempt at the same backup made, if there was one and it still stands. One of another
    /// request, or that does not stand any more, is dropped, which the job says.
    pub(super) async fn go_on(
        &self,
        vm: &Rc<Vm>,
        new: &NewBackup,
        repository: &Repository,
        progress: &Progress,
    ) -> Outcome<Option<Begun>> {
        let record = self.cuts.borrow().get(&new.vm).cloned();
        let Some(record) = record else { return Ok(None) };
        let reopened = if record.new == *new {
            self.reopen(vm, &record).await
        } else {
            Err(Problem::new("KGM-BKP-0020", Kind::Conflict, "another backup was asked for"))
        };
        match reopened {
            Ok((frozen, vmsnap)) => {
                let (repository, base) = (repository.clone(), record.base);
                let base = lane::offload(move || base.and_then(|id| repository.manifest(id).ok())).await;
                progress.note(&format!("goes on with the cut of {}", record.at));
                tracing::info!(vm = new.vm, snap = record.snap, "a backup goes on with its cut");
                Ok(Some(Begun { frozen, vmsnap, backup: record.backup, base }))
            }
            Err(problem) => {
                progress.note(&format!("a new cut: that of {} no longer stands: {problem}", record.at));
                tracing::warn!(vm = new.vm, %problem, "the cut of an interrupted backup is given up");
                self.drop_cut(&record).await;
                if record.is_redo() {
                    self.consolidate(vm, None).await?;
                }
                Ok(None)
            }
        }
    }

    /// Opens the disks of a cut again.
    async fn reopen(&self, vm: &Rc<Vm>, record: &CutRecord) -> Outcome<(Frozen, Option<Vmsnap>)> {
        let gone = |what: String| Problem::new("KGM-BKP-0021", Kind::Conflict, what);
        let mut luns = Vec::new();
        for uuid in &record.luns {
            let found = self.lun(&uuid.to_string())?;
            if !found.has_snapshot(&record.snap) {
                return Err(gone(format!("LUN {} has no snapshot {}", found.lun.name(), record.snap)));
            }
            luns.push(found);
        }
        let cut = Cut { group: record.group, hold: Duration::from_micros(record.hold_us), at: record.at };
        let files = record.files.clone();
        let mut frozen = Frozen::new(&vm.name, cut, Images::new(record.snap.clone(), luns));
        frozen.files = files;
        if !record.is_redo() {
            for found in self.luns_of(vm)? {
                if !record.luns.contains(&found.lun.uuid()) {
                    return Err(gone(format!("the VM lies on LUN {} too now", found.lun.name())));
                }
            }
            self.open_frozen(vm, &mut frozen).await?;
            return Ok((frozen, None));
        }
        let reserve = record.new.reserve.as_deref().map_or(Ok(self.reserve), parse_reserve)?;
        let (mapped, flat): (Vec<_>, Vec<_>) = vm
            .disks()
            .into_iter()
            .filter(|d| d.mode.left_out().is_none())
            .partition(|d| d.disk.rdm().is_some());
        let below = mapped.iter().map(|disk| self.lun_below(disk).map(|found| found.lun));
        let below = below.collect::<Outcome<Vec<_>>>()?;
        let taken = Vmsnap::take_up(vm, &below, reserve).await;
        let vmsnap = taken.map_err(|e| vmsnap_problem("the redo logs cannot be taken up", &vm.name, &e))?;
        if flat.is_empty() == vmsnap.is_some() {
            return Err(gone(format!("VM \"{}\" is not on the redo logs of that cut", vm.name)));
        }
        self.frozen_above(vmsnap.as_ref(), &mapped, &mut frozen).await?;
        Ok((frozen, vmsnap))
    }
}

/// Records that were read; and those that were not: VMs with reasons.
type Kept<T> = (Vec<T>, Vec<(String, String)>);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_cuts_of_format_1_are_read() {
        let record = crate::files::golden::<CutRecord>("cuts/sql01.json");
        assert!(record.is_redo() && record.new.vm == "sql01" && record.luns.len() == 1);
    }
}
