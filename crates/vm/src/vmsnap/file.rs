//! The job record as a file of the VM's directory.

use std::rc::Rc;

use block::{Disk, SECTOR_BYTES};
use vmdisk::claims::{Claim, Hold};
use vmdisk::folder::{Folder, FolderError, Provision};

use super::VmsnapError;
use crate::job_record::{JOB_BYTES, JobError, JobRecord, Payload, State, Step};
use crate::registry::{Datastore, Surroundings, VmError, relative};

/// Where the job record of a VM is: next to its `.vmx`.
pub fn job_path(vmx_path: &str) -> String {
    format!("{}.vmsnap-job", vmx_path.strip_suffix(".vmx").unwrap_or(vmx_path))
}

/// An open job record. One has it open at a time.
pub(crate) struct JobFile {
    pub(crate) record: JobRecord,
    path: String,
    datastore: Rc<Datastore>,
    _claim: Claim,
}

fn claim(datastore: &Datastore, path: &str) -> Result<Claim, VmsnapError> {
    let taken = datastore.folder.claims().take(path, Hold::Write);
    taken.map_err(|_| VmsnapError::Busy { path: path.to_owned() })
}

impl JobFile {
    /// Makes it: preallocated, payload and first state durable.
    pub(crate) async fn create(
        datastore: &Rc<Datastore>,
        vmx_path: &str,
        payload: Payload,
        state: State,
    ) -> Result<Self, VmsnapError> {
        let path = job_path(vmx_path);
        let claim = claim(datastore, &path)?;
        let sectors = JOB_BYTES / SECTOR_BYTES;
        let file = datastore.folder.create(&path, sectors, 0, Provision::EagerZeroed).await?;
        match JobRecord::create(file as Rc<dyn Disk>, payload, state).await {
            Ok(record) => Ok(Self { record, path, datastore: Rc::clone(datastore), _claim: claim }),
            Err(source) => {
                if let Err(error) = datastore.folder.remove(&path).await {
                    tracing::warn!(path, %error, "a job record that was not begun stays");
                }
                Err(VmsnapError::Job { path, source })
            }
        }
    }

    /// Opens it, if there is one. One that never had a state is removed: no redo log was made for it. A damaged one is
    /// set aside, and files alone count.
    pub(crate) async fn open(datastore: &Rc<Datastore>, vmx_path: &str) -> Result<Option<Self>, VmsnapError> {
        let path = job_path(vmx_path);
        let claim = claim(datastore, &path)?;
        let file = match datastore.folder.open(&path, false).await {
            Ok(file) => file,
            Err(FolderError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        match JobRecord::open(file as Rc<dyn Disk>).await {
            Ok(record) => Ok(Some(Self { record, path, datastore: Rc::clone(datastore), _claim: claim })),
            Err(JobError::NotThere) => {
                tracing::info!(path, "a job record that was never begun is removed");
                datastore.folder.remove(&path).await?;
                Ok(None)
            }
            Err(error @ JobError::Damaged(_)) => {
                tracing::error!(path, %error, "set aside: the files alone count");
                super::quarantine::set_aside(datastore, &path).await?;
                Ok(None)
            }
            Err(source) => Err(VmsnapError::Job { path, source }),
        }
    }

    /// Writes the next state, durably.
    pub(crate) async fn set(&self, state: State) -> Result<(), VmsnapError> {
        let written = self.record.set(state).await;
        written.map_err(|source| VmsnapError::Job { path: self.path.clone(), source })
    }

    /// As [`JobFile::set`], keeping everything but the step.
    pub(crate) async fn step(&self, step: Step) -> Result<(), VmsnapError> {
        self.set(State { step, ..self.record.state() }).await
    }

    /// The job is over.
    pub(crate) async fn remove(self) -> Result<(), VmsnapError> {
        let Self { record, path, datastore, _claim } = self;
        // VMFS removes no file that somebody has open.
        drop(record);
        Ok(datastore.folder.remove(&path).await?)
    }
}

/// The UUID of a datastore's volume, as job records name it.
pub(super) fn volume_id(datastore: &Datastore) -> String {
    datastore.volume.info().uuid.to_string()
}

/// The datastore with this volume.
pub(super) fn datastore_of(
    own: &Rc<Datastore>,
    around: &dyn Surroundings,
    volume: &str,
    path: &str,
) -> Result<Rc<Datastore>, VmsnapError> {
    if own.folder.is_named(volume) {
        return Ok(Rc::clone(own));
    }
    let missing = || VmsnapError::NoDatastore { volume: volume.to_owned(), path: path.to_owned() };
    around.datastore(volume).ok_or_else(missing)
}

/// How a `.vmx` in `directory` of one datastore names a file that may lie on another.
pub(super) fn name_in_vmx(own: &Datastore, directory: &str, other: &Datastore, path: &str) -> String {
    if own.lun.uuid() == other.lun.uuid() {
        relative(directory, path, &own.name)
    } else {
        format!("/vmfs/volumes/{}{path}", other.name)
    }
}

/// The VM has snapshots of its user's, or what could say so cannot be read.
pub(super) async fn has_catalogue(datastore: &Datastore, vmx_path: &str) -> Result<bool, VmsnapError> {
    let path = format!("{}.vmsd", vmx_path.strip_suffix(".vmx").unwrap_or(vmx_path));
    match datastore.folder.read_text(&path).await {
        Ok(bytes) => Ok(!crate::vmsd::Vmsd::parse(&bytes).is_ok_and(|v| v.records.is_empty())),
        Err(FolderError::NotFound { .. }) => Ok(false),
        Err(error) => Err(VmError::Folder(error).into()),
    }
}
