//! Folding a VM's redo logs back while it runs: steps 7 to 9 of chapter 7, one disk after the other.

use std::rc::Rc;
use std::time::Duration;

use block::DiskError;
use uuid::Uuid;
use vmdisk::folder::Folder;
use vmdisk::{Progress, remove_link};

use super::file::{JobFile, has_catalogue, volume_id};
use super::{Vmsnap, VmsnapError, name_top};
use crate::faults::{Fault, planted};
use crate::job_record::{DecidedBy, Payload, State, Step, Switched};
use crate::registry::{OpenDisk, Vm};
use crate::vmx::Vmx;

/// Folds whatever redo logs of ours a VM is on back into its bases: those of a job that was given up, and a chain
/// without a record whose VM has no snapshots. Nothing happens when there are none. One at a time for a VM; waits.
pub async fn consolidate(vm: &Rc<Vm>, told: &mut dyn FnMut(Progress)) -> Result<(), VmsnapError> {
    let _turn = vm.commits.take().await;
    match take_up(vm).await? {
        Some(job) => commit(vm, job, told).await,
        None => Ok(()),
    }
}

impl Vmsnap {
    /// Folds the redo logs back; the VM is on its bases when it returns, and J is gone.
    pub async fn commit(self, told: &mut dyn FnMut(Progress)) -> Result<(), VmsnapError> {
        let Self { vm, job, frozen, .. } = self;
        // They are not frozen any more.
        drop(frozen);
        let _turn = vm.commits.take().await;
        commit(&vm, job, told).await
    }
}

/// The record of a job to be finished. A VM that is on redo logs without a record gets one.
async fn take_up(vm: &Rc<Vm>) -> Result<Option<JobFile>, VmsnapError> {
    if let Some(job) = JobFile::open(&vm.datastore, &vm.vmx_path).await? {
        let state = job.record.state();
        return match state.step {
            Step::Intent => forget(vm, job).await.map(|()| None),
            Step::Prepared => own_word(vm, job).await,
            Step::Frozen | Step::Sealed | Step::Committing | Step::Flipped => Ok(Some(job)),
        };
    }
    let on_redo = |d: &OpenDisk| d.disk.links().len() > 1 && d.mode.left_out().is_none();
    let disks: Vec<OpenDisk> = vm.disks().into_iter().filter(on_redo).collect();
    if disks.is_empty() || has_catalogue(&vm.datastore, &vm.vmx_path).await? {
        return Ok(None);
    }
    let payload = Payload {
        vmx: vm.vmx_path.clone(),
        disks: disks.iter().map(as_found).collect(),
        vms: 1,
        repository: String::new(),
        begun_at: jiff::Timestamp::now().to_string(),
    };
    let state = State { step: Step::Frozen, group: Uuid::new_v4(), decided_by: DecidedBy::Job, flipped: 0 };
    JobFile::create(&vm.datastore, &vm.vmx_path, payload, state).await.map(Some)
}

/// The cut was given up in this session without a durable word, as media failed. An open VM knows what its record does
/// not: on the redo logs, they count from now on; on its bases, they were never used.
async fn own_word(vm: &Rc<Vm>, job: JobFile) -> Result<Option<JobFile>, VmsnapError> {
    let state = job.record.state();
    let entries = job.record.payload.disks.clone();
    let disks: Vec<OpenDisk> = entries.iter().filter_map(|entry| disk_of(vm, entry)).collect();
    let uses = |(open, entry): (&OpenDisk, &Switched)| entry.redos.contains(&open.disk.top_path());
    let using = disks.iter().zip(&entries).filter(|pair| uses(*pair)).count();
    if disks.len() == entries.len() && using == entries.len() {
        job.set(State { step: Step::Frozen, decided_by: DecidedBy::Known, ..state }).await?;
        disks.iter().for_each(|open| open.disk.decided());
        return Ok(Some(job));
    }
    if disks.len() == entries.len() && using == 0 {
        return forget(vm, job).await.map(|()| None);
    }
    let why = "the job record says prepared, and not all its disks are open".to_owned();
    Err(VmsnapError::InDoubt { group: state.group, why })
}

fn as_found(open: &OpenDisk) -> Switched {
    let mut links = open.disk.links().into_iter();
    let base = links.next();
    Switched {
        slot: open.slot.to_string(),
        volume: volume_id(&open.datastore),
        base_cid: base.as_ref().map_or(0, |b| b.cid.0),
        base: base.map(|b| b.path).unwrap_or_default(),
        redos: links.map(|l| l.path).collect(),
    }
}

/// The open disk that an entry of the record speaks of.
fn disk_of(vm: &Vm, entry: &Switched) -> Option<OpenDisk> {
    vm.disks()
        .into_iter()
        .find(|d| d.slot.to_string() == entry.slot && volume_id(&d.datastore) == entry.volume)
}

/// Redo logs that were made and never used, in a VM that is open: those that no disk uses are removed, then J.
async fn forget(vm: &Rc<Vm>, job: JobFile) -> Result<(), VmsnapError> {
    for entry in job.record.payload.disks.clone() {
        let Some(open) = disk_of(vm, &entry) else { continue };
        for redo in entry.redos.iter().rev().filter(|r| open.disk.links().iter().all(|l| l.path != **r)) {
            let failed = VmsnapError::chain(format!("{redo} stays"));
            remove_link(&*open.datastore.folder, redo).await.map_err(failed)?;
        }
    }
    job.remove().await
}

async fn commit(vm: &Rc<Vm>, job: JobFile, told: &mut dyn FnMut(Progress)) -> Result<(), VmsnapError> {
    let state = job.record.state();
    if state.decided_by == DecidedBy::Job && job.record.payload.vms > 1 {
        let why = "another VM of the same cut has not learned the decision from this job record".to_owned();
        return Err(VmsnapError::InDoubt { group: state.group, why });
    }
    if state.step < Step::Committing {
        job.step(Step::Committing).await?;
    }
    let entries = job.record.payload.disks.clone();
    for (number, entry) in entries.iter().enumerate() {
        let state = job.record.state();
        let Some(open) = disk_of(vm, entry) else {
            // Not plugged in any more, or not to be opened: its redo log is all that it has.
            if state.is_flipped(number) {
                continue;
            }
            return Err(VmsnapError::Refused {
                slot: entry.slot.clone(),
                why: "the disk is not open: its redo log stays".to_owned(),
            });
        };
        match (state.is_flipped(number), open.disk.links().len() > 1) {
            (true, false) => {
                remove_redos(&open, entry).await?;
                continue;
            }
            (false, true) => {}
            // The record of its flip failed: the disk writes both sides until it is opened again, then J decides.
            (true, true) | (false, false) => {
                let why = "the disk is not where its job record says: open the VM again".to_owned();
                return Err(VmsnapError::Refused { slot: entry.slot.clone(), why });
            }
        }
        let flipped = state.flipped | 1 << number;
        let after = State { flipped, ..state };
        let all = (0..entries.len()).all(|n| after.is_flipped(n));
        let step = if all { Step::Flipped } else { Step::Committing };
        fold(vm, &job, &open, State { step, ..after }, told).await?;
    }
    job.remove().await
}

async fn remove_redos(open: &OpenDisk, entry: &Switched) -> Result<(), VmsnapError> {
    for redo in &entry.redos {
        let failed = VmsnapError::chain(format!("{redo} stays"));
        remove_link(&*open.datastore.folder, redo).await.map_err(failed)?;
    }
    Ok(())
}

/// What failed for want of room is tried again in a moment, as long as the disk is not about to be closed.
async fn wait_for_room(open: &OpenDisk, error: VmsnapError) -> Result<(), VmsnapError> {
    if !error.is_full() || open.disk.is_closing() {
        return Err(error);
    }
    lane::sleep(Duration::from_millis(200)).await;
    Ok(())
}

/// Copies, then flips: `after` in J is the decision.
async fn fold(
    vm: &Rc<Vm>,
    job: &JobFile,
    open: &OpenDisk,
    after: State,
    told: &mut dyn FnMut(Progress),
) -> Result<(), VmsnapError> {
    let failed = |source| VmsnapError::Chain {
        what: format!("the redo log of {}/{} is not folded back", vm.name, open.slot),
        source,
    };
    let commit = open.disk.start_commit(0).await.map_err(failed)?;
    let mut go_on = |progress| {
        told(progress);
        true
    };
    commit.copy(&mut go_on).await.map_err(failed)?;
    let base = open.disk.links().first().map(|l| l.path.clone()).unwrap_or_default();
    let decide = async || {
        let failed = |e: &dyn std::error::Error| DiskError::from(std::io::Error::other(e.to_string()));
        if planted(Fault::RedoDeletedBeforeFlip) {
            open.datastore.folder.remove(&open.disk.top_path()).await.map_err(|e| failed(&e))?;
        }
        // Writes go to both sides meanwhile, so it may take as long as it takes until there is room.
        while let Err(error) = job.set(after).await {
            wait_for_room(open, error).await.map_err(|e| failed(&e))?;
        }
        // Before the base gets its new CID: should J be lost, the `.vmx` still names a chain that holds together.
        let edit = |vmx: &mut Vmx| name_top(vm, vmx, open, &base, false);
        while let Err(error) = vm.edit_vmx(edit, &[(open.slot, base.clone())]).await {
            wait_for_room(open, error.into()).await.map_err(|e| failed(&e))?;
        }
        Ok(())
    };
    let left = commit.flip(decide).await.map_err(failed)?;
    vm.commit_holds.borrow_mut().extend([commit.begin_held(), left.held]);
    drop(commit);
    left.remove().await.map_err(failed)?;
    tracing::info!(vm = vm.name, slot = %open.slot, held_us = left.held.as_micros() as u64, "committed");
    Ok(())
}
