//! Backups by redo logs (vmsnap): which disks of a VM go to redo logs, which LUNs are cut with them, and what is copied.
//! How it is done, and what a crash leaves, is in [`vm::cut`] and [`vm::vmsnap`].

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use vm::cut::WantedVm;
use vm::vmsnap::{self, Place, Reserve, Vmsnap, VmsnapError};
use vm::{OpenDisk, Vm};

use super::Store;
use super::backups::{Frozen, FrozenDisk, Images, SNAP};
use super::cut::{Cut, cut_problem};
use super::disks::chain_problem;
use super::luns::FoundLun;
use super::pools::pool_problem;
use super::vms::{VmRecord, vm_problem};
use crate::cli::images::vmfs_problem;
use crate::jobs::Progress;
use crate::model::NewBackup;
use crate::problem::{Kind, Outcome, Problem};
use crate::units::{parse_size, show_size};

/// What went wrong with redo logs of a VM.
pub fn vmsnap_problem(what: impl Into<String>, vm: &str, error: &VmsnapError) -> Problem {
    let what = what.into();
    match error {
        VmsnapError::Refused { slot, .. } => {
            let title = format!("{vm}/{slot} gets no redo log");
            Problem::new("KGM-BKP-0016", Kind::Refused, title)
                .why(error)
                .hint(format!("kagami backup create {vm} --via snapshot"))
        }
        VmsnapError::Busy { .. } => {
            Problem::new("KGM-BKP-0017", Kind::Conflict, what).why(error).hint("kagami job ls")
        }
        VmsnapError::Reserve { place, free_bytes, wanted_bytes } => {
            let (free, wanted) = (show_size(*free_bytes), show_size(*wanted_bytes));
            Problem::new("KGM-BKP-0018", Kind::Refused, what)
                .why(format!("{place} has {free} free, the reserve for redo logs is {wanted}"))
                .hint("make room, set another --reserve, or take --via snapshot")
        }
        VmsnapError::InDoubt { .. } => {
            Problem::new("KGM-VMS-0012", Kind::Conflict, what).why(error).hint("kagami pool ls")
        }
        VmsnapError::NoDatastore { .. } => {
            Problem::new("KGM-VMS-0013", Kind::NotFound, what).why(error).hint("kagami datastore ls")
        }
        VmsnapError::Job { .. } => Problem::failed("KGM-VMS-0014", what, error),
        VmsnapError::Chain { what: step, source } => chain_problem(format!("{what}: {step}"), source),
        VmsnapError::Lun { source, .. } => pool_problem(what, source),
        VmsnapError::Volume { source, .. } => vmfs_problem(what, source),
        VmsnapError::Vm(source) => vm_problem(what, source),
    }
}

/// A reserve as users write it: a share of the disks' length such as `30%`, or a size such as `2G`.
pub fn parse_reserve(text: &str) -> Outcome<Reserve> {
    match text.trim().strip_suffix('%') {
        Some(share) => match share.trim().parse::<u64>() {
            Ok(per_cent) if per_cent <= 200 => Ok(Reserve::Share { per_cent, least_bytes: 0 }),
            _ => Err(Problem::usage(format!("\"{text}\" is no reserve")).hint("such as 20% or 2G")),
        },
        None => {
            let bytes =
                parse_size(text).map_err(|e| Problem::usage(e.to_string()).hint("such as 20% or 2G"))?;
            Ok(Reserve::Bytes(bytes))
        }
    }
}

impl Store {
    /// Puts VMs' disks on redo logs and cuts their mapped LUNs, all or none. A VM without disks on VMFS has no redo logs.
    /// On an error after the decision VMs are left on redo logs, for [`Store::consolidate`].
    pub(super) async fn freeze_by_redo(
        &self,
        vms: &[Rc<Vm>],
        new: &NewBackup,
    ) -> Outcome<Vec<(Frozen, Option<Vmsnap>)>> {
        let snap = format!("{SNAP}{}", uuid::Uuid::now_v7().simple());
        let reserve = new.reserve.as_deref().map_or(Ok(self.reserve), parse_reserve)?;
        let mut luns: Vec<FoundLun> = Vec::new();
        let (mut wanted_vms, mut parts) = (Vec::new(), Vec::new());
        for vm in vms {
            let (mapped, flat): (Vec<OpenDisk>, Vec<OpenDisk>) = vm
                .disks()
                .into_iter()
                .filter(|d| d.mode.left_out().is_none())
                .partition(|d| d.disk.rdm().is_some());
            let below = mapped.iter().map(|disk| self.lun_below(disk)).collect::<Outcome<Vec<FoundLun>>>()?;
            let files = self.small_files(vm, &vm.datastore.volume).await?;
            let has_redo = !flat.is_empty();
            if has_redo {
                wanted_vms.push(WantedVm {
                    vm: Rc::clone(vm),
                    disks: flat,
                    mapped: below.iter().map(|found| Rc::clone(&found.lun)).collect(),
                    repository: new.repo.display().to_string(),
                    reserve,
                });
            }
            luns.extend(below);
            parts.push((mapped, files, has_redo));
        }
        let mut wanted = self.wanted(&luns, &snap);
        wanted.vms = wanted_vms;
        let names = new.vms().join(", ");
        let cut = vm::cut::cut(&wanted).await;
        drop(wanted);
        let cut = cut.map_err(|e| cut_problem(format!("VM \"{names}\" was not backed up"), e))?;
        self.metrics.cut_held(cut.hold);
        let mut switched = cut.vms.into_iter();
        let cut = Cut { group: cut.group, hold: cut.hold, at: cut.at };
        let images = Images::new(snap, luns);
        let (mut all, mut failed) = (Vec::new(), None);
        for (vm, (mapped, files, has_redo)) in vms.iter().zip(parts) {
            let vmsnap = if has_redo { switched.next() } else { None };
            let mut frozen = Frozen::new(&vm.name, cut.clone(), Rc::clone(&images));
            frozen.files = files;
            if failed.is_none() {
                failed = self.frozen_by_redo(vmsnap.as_ref(), &mapped, &mut frozen).await.err();
            }
            all.push((frozen, vmsnap));
        }
        drop(images);
        let Some(problem) = failed else { return Ok(all) };
        for (frozen, vmsnap) in all {
            drop(vmsnap);
            self.thaw(frozen).await;
        }
        Err(problem)
    }

    /// The frozen disks with the generations that the next incremental asks about. The datastores' LUNs get theirs now,
    /// while the bases are frozen.
    async fn frozen_by_redo(
        &self,
        vmsnap: Option<&Vmsnap>,
        mapped: &[OpenDisk],
        whole: &mut Frozen,
    ) -> Outcome {
        if let Some(vmsnap) = vmsnap {
            let failed = |e| vmsnap_problem("the datastore was not cut", &vmsnap.vm().name, &e);
            for datastore in vmsnap.cut_below(&whole.images.snap).await.map_err(failed)? {
                let found = self.lun(&datastore.lun.uuid().to_string())?;
                whole.images.luns.borrow_mut().push(found);
            }
        }
        self.frozen_above(vmsnap, mapped, whole).await
    }

    /// The frozen disks of LUNs and datastores that have their cut.
    pub(super) async fn frozen_above(
        &self,
        vmsnap: Option<&Vmsnap>,
        mapped: &[OpenDisk],
        whole: &mut Frozen,
    ) -> Outcome {
        for frozen in vmsnap.iter().flat_map(|v| v.frozen()) {
            let (open, disk) = (frozen.open.clone(), Rc::clone(&frozen.disk));
            let below = self.lun_below(&open)?;
            let generation = below.open_snapshot(&whole.images.snap)?.generation();
            // One base and the redo log just made: the frozen part is a plain file.
            let blocks = self.blocks_of(&open.datastore.volume, &open).await;
            whole.disks.push(FrozenDisk { open, disk, generation, below, blocks });
        }
        for open in mapped {
            let below = self.lun_below(open)?;
            let disk = below.open_snapshot(&whole.images.snap)?;
            let generation = disk.generation();
            whole.disks.push(FrozenDisk { open: open.clone(), disk, generation, below, blocks: None });
        }
        whole.disks.sort_by_key(|d| d.open.slot);
        Ok(())
    }

    /// Folds the redo logs of a backup back while the VM runs; waits for room when there is none.
    pub(super) async fn commit(&self, vmsnap: Vmsnap, progress: Option<&Arc<Progress>>) -> Outcome {
        let vm = Rc::clone(vmsnap.vm());
        let done = vmsnap.commit(&mut |p| told(progress, p)).await;
        self.metrics.commits_held(&vm.take_commit_holds());
        match done {
            Err(error) if error.is_full() => self.consolidate(&vm, progress).await,
            done => done.map_err(|e| stays(&vm.name, &e)),
        }
    }

    /// Folds whatever redo logs of ours a VM is on back. With a snapshot in its catalogue the chain is the user's, and
    /// stays. Without room it is tried again until there is some, or until the job is cancelled.
    pub(super) async fn consolidate(&self, vm: &Rc<Vm>, progress: Option<&Arc<Progress>>) -> Outcome {
        let mut waits = false;
        loop {
            let done = vmsnap::consolidate(vm, &mut |p| told(progress, p)).await;
            self.metrics.commits_held(&vm.take_commit_holds());
            let error = match done {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            let cancelled = progress.is_some_and(|p| p.is_cancelled());
            let closing = vm.disks().iter().any(|open| open.disk.is_closing());
            if !error.is_full() || cancelled || closing {
                return Err(stays(&vm.name, &error));
            }
            if !waits {
                waits = true;
                tracing::error!(vm = vm.name, %error, "no room for the commit of its redo logs: it waits");
                if let Some(progress) = progress {
                    progress.phase("commit: waits for room");
                }
            }
            lane::sleep(WAIT).await;
        }
    }

    /// After start, before any VM opens and before any snapshot of a backup goes: switches that a crash left prepared
    /// end as the record says that decides. False when one of them stays in doubt.
    pub(super) async fn resolve_vmsnaps(&self, records: &[VmRecord]) -> bool {
        let place = |r: &VmRecord| {
            let datastore = self.open_datastore_now(&r.datastore).ok()?;
            Some(Place { datastore, vmx_path: r.vmx.clone() })
        };
        let places: Vec<Place> = records.iter().filter_map(place).collect();
        let here = self.troubles().is_empty() && places.len() == records.len();
        let pools: Vec<_> = self.open_pools_now().into_iter().map(|(_, p)| p.pool).collect();
        let in_doubt = vmsnap::resolve(&places, &pools, here).await;
        for (number, error) in &in_doubt {
            tracing::error!(vmx = places[*number].vmx_path, %error, "a VM stays shut");
        }
        in_doubt.is_empty() && here
    }

    /// Before a VM's disks open: what a crash left of a backup by redo logs is brought to an end. Answers the files that
    /// are set aside.
    pub(super) async fn recover_vmsnap(&self, place: Place, name: &str) -> Outcome<Vec<String>> {
        let failed = |e| vmsnap_problem(format!("VM \"{name}\" cannot be opened"), name, &e);
        let pools: Vec<_> = self.open_pools_now().into_iter().map(|(_, p)| p.pool).collect();
        if let Some((_, error)) = vmsnap::resolve(std::slice::from_ref(&place), &pools, false).await.pop() {
            return Err(failed(error));
        }
        vmsnap::finish(&place, self).await.map_err(failed)
    }

    /// After start: VMs that a crash left on redo logs of ours come back to their bases, but those whose backup goes on.
    pub(super) fn consolidate_all(self: &Rc<Self>) {
        for vm in self.open_vms_now() {
            if !self.stays_on_redo(&vm.name) {
                self.consolidate_later(vm);
            }
        }
    }

    /// Brings a VM back to its bases beside everything else.
    pub(super) fn consolidate_later(self: &Rc<Self>, vm: Rc<Vm>) {
        let store = Rc::clone(self);
        drop(lane::spawn(async move {
            if let Err(problem) = store.consolidate(&vm, None).await {
                tracing::error!(vm = vm.name, %problem, "needs consolidation");
            }
        }));
    }
}

/// A commit that finds no room is tried again so often.
const WAIT: Duration = Duration::from_millis(500);

fn stays(vm: &str, error: &VmsnapError) -> Problem {
    vmsnap_problem(format!("VM \"{vm}\" stays on redo logs"), vm, error)
}

fn told(progress: Option<&Arc<Progress>>, now: vmdisk::Progress) {
    if let Some(progress) = progress {
        progress.set(now.done_bytes, now.total_bytes);
        // All is copied: what is left of this disk is its flip.
        progress.phase(if now.done_bytes < now.total_bytes { "commit" } else { "flip" });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserves_as_people_write_them() {
        assert_eq!(parse_reserve("30%").unwrap(), Reserve::Share { per_cent: 30, least_bytes: 0 });
        assert_eq!(parse_reserve("2G").unwrap(), Reserve::Bytes(2 << 30));
        assert_eq!(parse_reserve("0").unwrap(), Reserve::Bytes(0));
        assert!(parse_reserve("x%").is_err() && parse_reserve("much").is_err());
    }
}
