//! The life cycle of redo logs: made for a cut, frozen bases copied, folded back while the VM runs (semantics page,
//! chapter 7).
//!
//! The job record J ([`crate::job_record`]) is durable and names the redo logs before the first of them is made, and goes
//! when none is left, so whatever a crash leaves can be told from what belongs to the user:
//!
//! ```text
//! J          what may be there                         at start
//! Intent     redo logs nobody uses                     they are removed, J too
//! Prepared   the same; another record decides          Frozen or Intent, as that one says; in doubt: the VM stays shut
//! Frozen     VM on its redo logs, bases frozen         the VM opens on them; the backup goes on, or commit
//! Sealed     the same, backup in its place             commit
//! Committing some bases are mixtures, some complete    complete ones count, the others' redo logs; commit again
//! Flipped    all bases complete, redo logs left over   they are removed, J too
//! ```
//!
//! The `.vmx` follows J: recovery sets the slots that J names. Only what J names is ever removed, and nothing that the
//! `.vmx` names. A redo log that neither names is [set aside](quarantine), never deleted and never attached.

mod commit;
mod file;
pub mod quarantine;
mod recover;
mod reserve;
mod resume;
mod switch;

use std::rc::Rc;

use array::LunError;
use block::{Disk, DiskError};
use uuid::Uuid;
use vmdisk::ChainError;
use vmdisk::folder::FolderError;

use crate::job_record::{JobError, State, Step};
use crate::registry::{Datastore, OpenDisk, Vm, VmError};
use crate::vmx::Vmx;

pub use commit::consolidate;
pub use file::job_path;
pub use recover::{Place, finish, resolve};
pub use reserve::Reserve;
pub use switch::Wanted;
pub(crate) use switch::{PreparedVm, SwitchedVm};

use file::JobFile;
use reserve::Floors;

/// Why a VM's disks do not go to redo logs, or do not come back.
#[derive(Debug, thiserror::Error)]
pub enum VmsnapError {
    /// A redo log that could not be folded back afterwards is not made.
    #[error("{slot}: {why}")]
    Refused {
        /// The disk.
        slot: String,
        /// Why not.
        why: String,
    },
    /// Somebody else has the job record open.
    #[error("{path}: a backup by redo logs of this VM is under way")]
    Busy {
        /// The job record.
        path: String,
    },
    /// A datastore, or the pool below it, has not the room that the redo logs may take.
    #[error("{place} has {free_bytes} bytes free; the reserve for redo logs is {wanted_bytes}")]
    Reserve {
        /// The datastore or the pool.
        place: String,
        /// What it has.
        free_bytes: u64,
        /// What is wanted.
        wanted_bytes: u64,
    },
    /// The record that decides cannot be read now.
    #[error("the cut {group} is in doubt: {why}")]
    InDoubt {
        /// The cut.
        group: Uuid,
        /// What is missing.
        why: String,
    },
    /// A chain of disks says no.
    #[error("{what}: {source}")]
    Chain {
        /// What was to be done.
        what: String,
        /// Why not.
        source: ChainError,
    },
    /// The array says no.
    #[error("{what}: {source}")]
    Lun {
        /// What was to be done.
        what: String,
        /// Why not.
        source: LunError,
    },
    /// The datastore says no.
    #[error("datastore {datastore}: {source}")]
    Volume {
        /// The datastore.
        datastore: String,
        /// Why not.
        source: vmfs::Error,
    },
    /// The job record cannot be read or written.
    #[error("{path}: {source}")]
    Job {
        /// The job record.
        path: String,
        /// What is wrong with it.
        source: JobError,
    },
    /// A file of the VM cannot be read or written.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A datastore that the VM's disks lie on is not here.
    #[error("the datastore {volume} of {path} is not here")]
    NoDatastore {
        /// UUID of the volume.
        volume: String,
        /// The disk.
        path: String,
    },
}

impl From<FolderError> for VmsnapError {
    fn from(error: FolderError) -> Self {
        Self::Vm(VmError::Folder(error))
    }
}

impl VmsnapError {
    /// There is no room now; the same may work when there is some.
    pub fn is_full(&self) -> bool {
        let full = |e: &DiskError| matches!(e, DiskError::NoSpace);
        let in_folder = |e: &FolderError| match e {
            FolderError::Disk { source, .. } => full(source),
            FolderError::Datastore { source, .. } => {
                source.downcast_ref::<vmfs::Error>().is_some_and(|e| match e {
                    vmfs::Error::Disk(source) => full(source),
                    other => matches!(other, vmfs::Error::NoSpace { .. }),
                })
            }
            _ => false,
        };
        match self {
            Self::Chain { source: ChainError::Disk(source), .. } => full(source),
            Self::Chain { source: ChainError::Folder(source), .. } => in_folder(source),
            Self::Vm(VmError::Folder(source)) => in_folder(source),
            Self::Job { source: JobError::Disk(source), .. } => full(source),
            Self::Volume { source: vmfs::Error::Disk(source), .. } => full(source),
            Self::Volume { source, .. } => matches!(source, vmfs::Error::NoSpace { .. }),
            Self::Lun { source: LunError::Disk(source), .. } => full(source),
            _ => false,
        }
    }

    fn chain(what: impl Into<String>) -> impl FnOnce(ChainError) -> Self {
        let what = what.into();
        |source| Self::Chain { what, source }
    }
}

/// A disk as it was at the cut.
#[derive(Clone)]
pub struct FrozenBase {
    /// The disk as it is now.
    pub open: OpenDisk,
    /// Its base, read-only, unchanged until [`Vmsnap::commit`].
    pub disk: Rc<dyn Disk>,
}

/// A VM on redo logs of ours. Dropping it leaves the VM there; [`consolidate`] takes it up again.
pub struct Vmsnap {
    pub(crate) vm: Rc<Vm>,
    pub(crate) job: JobFile,
    frozen: Vec<FrozenBase>,
    /// What must stay free.
    floors: Floors,
}

impl Vmsnap {
    /// The VM.
    pub fn vm(&self) -> &Rc<Vm> {
        &self.vm
    }

    /// The frozen disks. Whoever has them lets go of them before [`Vmsnap::commit`].
    pub fn frozen(&self) -> &[FrozenBase] {
        &self.frozen
    }

    /// How far the job is, as last made durable.
    pub fn state(&self) -> State {
        self.job.record.state()
    }

    /// Cuts the LUNs below the frozen disks, each once, and none that another VM of the cut had cut already: their content does not change now, so the generation of this cut
    /// is that of the disks (an incremental backup asks for changes since it). Answers the LUNs' datastores.
    pub async fn cut_below(&self, snapshot: &str) -> Result<Vec<Rc<Datastore>>, VmsnapError> {
        let mut done: Vec<Rc<Datastore>> = Vec::new();
        for frozen in &self.frozen {
            let datastore = &frozen.open.datastore;
            let is_cut = datastore.lun.snapshots().iter().any(|s| s.name == snapshot);
            if is_cut || done.iter().any(|d| d.lun.uuid() == datastore.lun.uuid()) {
                continue;
            }
            let volume = |source| VmsnapError::Volume { datastore: datastore.name.clone(), source };
            datastore.volume.settle().await.map_err(volume)?;
            let cut = datastore.lun.snapshot(snapshot).await;
            cut.map_err(|source| VmsnapError::Lun {
                what: format!("LUN {} was not cut", datastore.lun.name()),
                source,
            })?;
            done.push(Rc::clone(datastore));
        }
        Ok(done)
    }

    /// The backup's manifest is in its place.
    pub async fn sealed(&self) -> Result<(), VmsnapError> {
        self.job.step(Step::Sealed).await
    }

    /// A datastore or a pool has fallen under the half of the reserve: the copy must be given up and the commit begin,
    /// which needs the other half where bases are thin.
    pub async fn is_short(&self) -> Result<bool, VmsnapError> {
        self.floors.is_short().await
    }
}

/// The `.vmx` names another descriptor for a slot.
fn name_top(vm: &Vm, vmx: &mut Vmx, open: &OpenDisk, path: &str, is_redo: bool) {
    let slot = open.slot;
    let name = file::name_in_vmx(&vm.datastore, vm.directory(), &open.datastore, path);
    vmx.set(&format!("{slot}.fileName"), &name);
    vmx.set(&format!("{slot}.redo"), if is_redo { &name } else { "" });
}
