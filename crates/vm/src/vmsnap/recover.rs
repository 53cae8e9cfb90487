//! What a crash left of a vmsnap, brought to an end before the VM's disks open (chapter 7's crash table).
//!
//! Two passes. [`resolve`] asks the records that decide whether prepared switches happened, for all VMs together, and
//! writes the answer into each J; nothing that the answer can be read from may go before. [`finish`] then needs J alone.

use std::rc::Rc;

use array::Pool;
use vmdisk::{recover_flip, remove_link};

use super::file::{JobFile, datastore_of, name_in_vmx};
use super::{VmsnapError, quarantine};
use crate::job_record::{DecidedBy, State, Step, Switched};
use crate::registry::{Datastore, Surroundings, locate, read_vmx};
use crate::vmx::Vmx;

/// Where a VM is that may have a job record.
#[derive(Clone)]
pub struct Place {
    /// Its datastore.
    pub datastore: Rc<Datastore>,
    /// Its `.vmx`, absolute there.
    pub vmx_path: String,
}

/// Ends prepared switches as the deciding records say. `complete`: every pool, datastore and VM of the home is here, so
/// a record that is not found is nowhere. Answers, by their place in the list, the VMs that stay in doubt or whose record
/// cannot be read; they must not be opened, and snapshots that a decision can be read from must stay.
pub async fn resolve(places: &[Place], pools: &[Rc<Pool>], complete: bool) -> Vec<(usize, VmsnapError)> {
    let (mut jobs, mut failed) = (Vec::new(), Vec::new());
    for (number, place) in places.iter().enumerate() {
        match JobFile::open(&place.datastore, &place.vmx_path).await {
            Ok(Some(job)) => jobs.push((number, job)),
            Ok(None) => {}
            // Open since before: it was resolved then.
            Err(VmsnapError::Busy { .. }) => {}
            Err(error) => failed.push((number, error)),
        }
    }
    let complete = complete && failed.is_empty();
    for (number, job) in &jobs {
        let state = job.record.state();
        if state.step != Step::Prepared {
            continue;
        }
        let step = match verdict(&state, &jobs, pools, complete) {
            Ok(true) => Step::Frozen,
            Ok(false) => Step::Intent,
            Err(error) => {
                failed.push((*number, error));
                continue;
            }
        };
        tracing::info!(group = %state.group, ?step, vmx = job.record.payload.vmx, "a prepared switch was resolved");
        if let Err(error) = job.step(step).await {
            failed.push((*number, error));
        }
    }
    if complete && failed.is_empty() {
        failed.extend(all_know(&jobs).await);
    }
    failed
}

/// Whether a prepared switch happened.
fn verdict(
    state: &State,
    jobs: &[(usize, JobFile)],
    pools: &[Rc<Pool>],
    complete: bool,
) -> Result<bool, VmsnapError> {
    let in_doubt = |why: String| Err(VmsnapError::InDoubt { group: state.group, why });
    match state.decided_by {
        DecidedBy::Job | DecidedBy::Known => Ok(false),
        DecidedBy::Pool(uuid) => match pools.iter().find(|p| p.uuid() == uuid) {
            Some(pool) => Ok(pool.group_decided(state.group)),
            None => in_doubt(format!("pool {uuid} has the record and is not here")),
        },
        DecidedBy::FirstJob => {
            let first = jobs.iter().map(|(_, job)| job.record.state()).find(|other| {
                other.group == state.group && matches!(other.decided_by, DecidedBy::Job | DecidedBy::Known)
            });
            match first {
                Some(first) => Ok(first.step >= Step::Frozen),
                None if complete => Ok(false),
                None => in_doubt("another VM has the record, and not all VMs are here".to_owned()),
            }
        }
    }
}

/// Every VM of the cuts over several VMs knows the decision now: their first records may go.
async fn all_know(jobs: &[(usize, JobFile)]) -> Vec<(usize, VmsnapError)> {
    let mut failed = Vec::new();
    for (number, job) in jobs {
        let state = job.record.state();
        if state.decided_by == DecidedBy::Job
            && job.record.payload.vms > 1
            && let Err(error) = job.set(State { decided_by: DecidedBy::Known, ..state }).await
        {
            failed.push((*number, error));
        }
    }
    failed
}

/// Brings what a job left to where its VM can be opened: the `.vmx` names what J says, what J names and nobody uses is
/// removed, and J too when nothing is left to do. A redo log that neither names is set aside. Answers the files of the
/// VM that are set aside. Running it twice is harmless.
pub async fn finish(place: &Place, around: &dyn Surroundings) -> Result<Vec<String>, VmsnapError> {
    let Place { datastore, vmx_path } = place;
    match JobFile::open(datastore, vmx_path).await? {
        Some(job) => finish_job(place, job, around).await?,
        None => finish_flips(place, around).await?,
    }
    quarantine::sweep(place, around).await
}

async fn finish_job(place: &Place, job: JobFile, around: &dyn Surroundings) -> Result<(), VmsnapError> {
    let state = job.record.state();
    if state.step == Step::Prepared {
        let why = "no record decided it yet".to_owned();
        return Err(VmsnapError::InDoubt { group: state.group, why });
    }
    let mut vmx = read_vmx(&place.datastore, &place.vmx_path).await?;
    if state.step >= Step::Frozen {
        vmx = point_vmx(place, &job, vmx, around).await?;
    }
    let mut in_use = false;
    for (number, entry) in job.record.payload.disks.iter().enumerate() {
        let stays_on_redo = state.step >= Step::Frozen && !state.is_flipped(number);
        if stays_on_redo || names_any(place, &vmx, entry, around) {
            in_use = true;
            continue;
        }
        let disk = datastore_of(&place.datastore, around, &entry.volume, &entry.base)?;
        let failed = |source| VmsnapError::Chain { what: format!("{} is not finished", entry.base), source };
        recover_flip(&*disk.folder, &entry.base, true).await.map_err(failed)?;
        for redo in &entry.redos {
            remove_link(&*disk.folder, redo).await.map_err(failed)?;
        }
    }
    match (in_use, state.step) {
        (false, _) => job.remove().await,
        // Never by our order of writes; what the `.vmx` names may hold what a guest was promised.
        (true, Step::Intent) => {
            tracing::error!(vmx = place.vmx_path, "names redo logs that were not switched to: they are kept");
            job.set(State { step: Step::Frozen, decided_by: DecidedBy::Known, ..state }).await
        }
        (true, _) => Ok(()),
    }
}

/// The `.vmx` names a redo log of this entry, in whatever slot.
fn names_any(place: &Place, vmx: &Vmx, entry: &Switched, around: &dyn Surroundings) -> bool {
    vmx.disks().iter().any(|disk| {
        locate(&place.datastore, &place.vmx_path, &disk.file_name, around)
            .is_ok_and(|(_, path)| entry.redos.contains(&path))
    })
}

/// Sets the slots that J names to what J says; everything else in the `.vmx` stays.
async fn point_vmx(
    place: &Place,
    job: &JobFile,
    vmx: Vmx,
    around: &dyn Surroundings,
) -> Result<Vmx, VmsnapError> {
    let (own, state) = (&place.datastore, job.record.state());
    let mut new = vmx.clone();
    for (number, entry) in job.record.payload.disks.iter().enumerate() {
        let flipped = state.is_flipped(number);
        let Some(top) = (if flipped { Some(&entry.base) } else { entry.redos.last() }) else { continue };
        let Some(now) = vmx.disks().into_iter().find(|d| d.slot.to_string() == entry.slot) else { continue };
        let here = locate(own, &place.vmx_path, &now.file_name, around);
        let ours = |path: &String| *path == entry.base || entry.redos.contains(path);
        if !here.is_ok_and(|(_, path)| ours(&path) && path != *top) {
            continue;
        }
        let disk = datastore_of(own, around, &entry.volume, &entry.base)?;
        let name = name_in_vmx(own, vmdisk::folder::directory(&place.vmx_path), &disk, top);
        new.set(&format!("{}.fileName", entry.slot), &name);
        new.set(&format!("{}.redo", entry.slot), if flipped { "" } else { &name });
    }
    if new.to_bytes() != vmx.to_bytes() {
        use vmdisk::folder::Folder;
        own.folder.replace(&place.vmx_path, &new.to_bytes()).await?;
        tracing::info!(vmx = place.vmx_path, "names its disks as the job record says");
    }
    Ok(new)
}

/// Without a record: a base that the `.vmx` names is complete even where a commit marked it.
async fn finish_flips(place: &Place, around: &dyn Surroundings) -> Result<(), VmsnapError> {
    // A VM that cannot be read says so when it is opened.
    let Ok(vmx) = read_vmx(&place.datastore, &place.vmx_path).await else { return Ok(()) };
    for entry in vmx.disks() {
        let Ok((datastore, path)) = locate(&place.datastore, &place.vmx_path, &entry.file_name, around)
        else {
            continue;
        };
        if let Err(error) = recover_flip(&*datastore.folder, &path, true).await {
            tracing::warn!(path, %error, "a commit cannot be finished");
        }
    }
    Ok(())
}
