//! A VM is its directory on a datastore: the `.vmx` names the disks, and an opened VM has them open.
//!
//! Nothing of a VM lies anywhere else, so registering one is knowing where its `.vmx` is.

use std::cell::{Ref, RefCell};
use std::rc::Rc;
use std::time::Duration;

use array::{Lun, Pool};
use lane::sync::Turn;
use uuid::Uuid;
use vmdisk::folder::{Folder, FolderError, directory, parent_path};
use vmdisk::rdm::Luns;
use vmdisk::{ChainError, Open, VmDisk, VmfsFolder};

use crate::identity::vmx_uuid;
use crate::vmx::{DiskEntry, MAX_BYTES, Mode, Vmx, VmxError};
use crate::{Bus, Slot};

/// A VMFS volume that is served: on a LUN of a pool.
pub struct Datastore {
    /// Its name, which is the volume's label at creation.
    pub name: String,
    /// The volume; clones are the same volume.
    pub volume: vmfs::Volume,
    /// Its files as disks see them, with the claims on those that are open.
    pub folder: Rc<VmfsFolder>,
    /// The LUN under it.
    pub lun: Rc<Lun>,
    /// The pool of that LUN.
    pub pool: Rc<Pool>,
}

/// What opening a VM needs from outside of its directory.
pub trait Surroundings: Luns {
    /// A datastore by name or volume UUID.
    fn datastore(&self, name: &str) -> Option<Rc<Datastore>>;
}

/// Why a VM could not be opened or changed.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// A file of it could not be read or written.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The `.vmx` is none.
    #[error("{path}: {source}")]
    Vmx {
        /// The file.
        path: String,
        /// What is wrong with it.
        source: VmxError,
    },
    /// All 60 slots are in use.
    #[error("all SCSI slots of the VM are in use")]
    NoSlot,
    /// The slot has a disk.
    #[error("{slot} is in use by {file_name}")]
    SlotTaken {
        /// The slot.
        slot: Slot,
        /// What is in it.
        file_name: String,
    },
    /// The disk is plugged in already.
    #[error("{path} is in slot {slot} already")]
    AttachedAlready {
        /// The disk.
        path: String,
        /// Where it is.
        slot: Slot,
    },
}

/// An open disk of a VM.
#[derive(Clone)]
pub struct OpenDisk {
    /// Where it is plugged in.
    pub slot: Slot,
    /// Where it lies.
    pub datastore: Rc<Datastore>,
    /// Descriptor of the top link, absolute on the datastore.
    pub path: String,
    /// How snapshots see it.
    pub mode: Mode,
    /// The disk.
    pub disk: Rc<VmDisk>,
}

/// A disk that could not be opened.
#[derive(Clone, Debug)]
pub struct Trouble {
    /// Where it is plugged in.
    pub slot: Slot,
    /// As the `.vmx` names it.
    pub file_name: String,
    /// Why.
    pub why: String,
}

/// An open VM. Its disks stay open until it is dropped.
pub struct Vm {
    /// Its name in the registry.
    pub name: String,
    /// The datastore that its directory is on.
    pub datastore: Rc<Datastore>,
    /// Its `.vmx`, absolute on the datastore.
    pub vmx_path: String,
    vmx: RefCell<Vmx>,
    disks: RefCell<Vec<OpenDisk>>,
    troubles: RefCell<Vec<Trouble>>,
    /// Files that were set aside, see [`crate::vmsnap::quarantine`].
    set_aside: RefCell<Vec<String>>,
    /// Changes of the configuration go one at a time: each is read, changed, written, adopted.
    editing: Turn,
    /// So do commits.
    pub(crate) commits: Turn,
    /// How long commits closed gates, until somebody asks.
    pub(crate) commit_holds: RefCell<Vec<Duration>>,
}

impl Vm {
    /// Reads the `.vmx` and opens all disks that can be; the others are in [`Vm::troubles`].
    pub async fn open(
        name: &str,
        datastore: &Rc<Datastore>,
        vmx_path: &str,
        around: &dyn Surroundings,
    ) -> Result<Rc<Self>, VmError> {
        let vmx = read_vmx(datastore, vmx_path).await?;
        let vm = Rc::new(Self {
            name: name.to_owned(),
            datastore: Rc::clone(datastore),
            vmx_path: vmx_path.to_owned(),
            vmx: RefCell::new(vmx),
            disks: RefCell::default(),
            troubles: RefCell::default(),
            set_aside: RefCell::default(),
            editing: Turn::new(),
            commits: Turn::new(),
            commit_holds: RefCell::default(),
        });
        vm.open_disks(around).await;
        Ok(vm)
    }

    /// Opens what the `.vmx` names and is not open yet; closes what it names no more.
    pub async fn open_disks(&self, around: &dyn Surroundings) {
        let entries = self.vmx.borrow().disks();
        let (mut disks, mut troubles) = (Vec::new(), Vec::new());
        let open_now = std::mem::take(&mut *self.disks.borrow_mut());
        for entry in entries {
            let place = match &entry.refused {
                Some(why) => Err(why.clone()),
                None => self.locate(&entry.file_name, around),
            };
            if let (Ok((_, path)), Some(open)) = (&place, open_now.iter().find(|d| d.slot == entry.slot))
                && *path == open.path
            {
                disks.push(open.clone());
                continue;
            }
            let opened = match place {
                Ok((datastore, path)) => open_disk(&datastore, &path, &entry, around)
                    .await
                    .map(|disk| OpenDisk { slot: entry.slot, datastore, path, mode: entry.mode, disk })
                    .map_err(|e| e.to_string()),
                Err(why) => Err(why),
            };
            match opened {
                Ok(disk) => disks.push(disk),
                Err(why) => {
                    tracing::warn!(vm = self.name, slot = %entry.slot, why, "a disk cannot be opened");
                    troubles.push(Trouble { slot: entry.slot, file_name: entry.file_name, why });
                }
            }
        }
        *self.disks.borrow_mut() = disks;
        *self.troubles.borrow_mut() = troubles;
    }

    fn locate(&self, file_name: &str, around: &dyn Surroundings) -> Result<(Rc<Datastore>, String), String> {
        locate(&self.datastore, &self.vmx_path, file_name, around)
    }

    /// For how long commits have closed the gates of its disks since this was asked last.
    pub fn take_commit_holds(&self) -> Vec<Duration> {
        self.commit_holds.take()
    }

    /// Files of the VM that were set aside, absolute on its datastore.
    pub fn set_aside(&self) -> Vec<String> {
        self.set_aside.borrow().clone()
    }

    /// Notes what recovery found set aside.
    pub fn note_set_aside(&self, paths: Vec<String>) {
        *self.set_aside.borrow_mut() = paths;
    }

    /// The configuration as it is now.
    pub fn vmx(&self) -> Ref<'_, Vmx> {
        self.vmx.borrow()
    }

    /// The directory of the VM, absolute on its datastore, without a final slash.
    pub fn directory(&self) -> &str {
        directory(&self.vmx_path)
    }

    /// Its open disks, in slot order.
    pub fn disks(&self) -> Vec<OpenDisk> {
        self.disks.borrow().clone()
    }

    /// The open disk in a slot.
    pub fn disk(&self, slot: Slot) -> Option<OpenDisk> {
        self.disks.borrow().iter().find(|d| d.slot == slot).cloned()
    }

    /// Disks that could not be opened.
    pub fn troubles(&self) -> Vec<Trouble> {
        self.troubles.borrow().clone()
    }

    /// Changes the configuration: written durably (a new file, flush, rename: R10), then kept in memory, with the paths
    /// of the disks that moved. Does not open or close disks: see [`Vm::open_disks`].
    pub async fn edit_vmx(
        &self,
        edit: impl FnOnce(&mut Vmx),
        moved: &[(Slot, String)],
    ) -> Result<(), VmError> {
        let _turn = self.editing.take().await;
        let mut vmx = self.vmx.borrow().clone();
        edit(&mut vmx);
        self.datastore.folder.replace(&self.vmx_path, &vmx.to_bytes()).await?;
        *self.vmx.borrow_mut() = vmx;
        for disk in &mut *self.disks.borrow_mut() {
            if let Some((_, path)) = moved.iter().find(|(slot, _)| *slot == disk.slot) {
                path.clone_into(&mut disk.path);
            }
        }
        Ok(())
    }

    /// Plugs a disk into `slot`, or the first free SCSI slot; durable when this returns. `path` is absolute on the
    /// VM's own datastore.
    pub async fn attach(
        &self,
        path: &str,
        slot: Option<Slot>,
        mode: Mode,
        around: &dyn Surroundings,
    ) -> Result<Slot, VmError> {
        let entries = self.vmx.borrow().disks();
        for entry in &entries {
            if self.locate(&entry.file_name, around).is_ok_and(|(_, p)| p == path) {
                return Err(VmError::AttachedAlready { path: path.to_owned(), slot: entry.slot });
            }
        }
        let slot = match slot {
            Some(slot) => match entries.into_iter().find(|e| e.slot == slot) {
                Some(entry) => return Err(VmError::SlotTaken { slot, file_name: entry.file_name }),
                None => slot,
            },
            None => free_slot(&self.vmx.borrow()).ok_or(VmError::NoSlot)?,
        };
        let name = relative(self.directory(), path, &self.datastore.name);
        let edit = |vmx: &mut Vmx| {
            vmx.attach(slot, &name);
            if mode != Mode::Persistent {
                vmx.set(&format!("{slot}.mode"), mode.name());
            }
        };
        self.edit_vmx(edit, &[]).await?;
        self.open_disks(around).await;
        Ok(slot)
    }
}

/// Where a file name of a `.vmx` is: next to it, or `/vmfs/volumes/DATASTORE/...`.
pub(crate) fn locate(
    own: &Rc<Datastore>,
    vmx_path: &str,
    file_name: &str,
    around: &dyn Surroundings,
) -> Result<(Rc<Datastore>, String), String> {
    let mut datastore = Rc::clone(own);
    if let Some(rest) = file_name.strip_prefix("/vmfs/volumes/") {
        let volume = rest.split('/').next().unwrap_or_default();
        if !datastore.folder.is_named(volume) {
            datastore =
                around.datastore(volume).ok_or_else(|| format!("there is no datastore \"{volume}\""))?;
        }
    }
    let path = parent_path(&*datastore.folder, vmx_path, file_name).map_err(|e| e.to_string())?;
    Ok((datastore, path))
}

/// The first SCSI slot without anything in it.
pub fn free_slot(vmx: &Vmx) -> Option<Slot> {
    let is_free = |s: &Slot| ["fileName", "name"].iter().all(|key| vmx.get(&format!("{s}.{key}")).is_none());
    Slot::all_scsi().filter(|s| s.bus() == Bus::Scsi).find(is_free)
}

/// How a `.vmx` in `directory` names a file: by its name alone when it is next to it.
pub fn relative(directory: &str, path: &str, datastore: &str) -> String {
    match path.strip_prefix(directory).and_then(|rest| rest.strip_prefix('/')) {
        Some(rest) if !rest.contains('/') => rest.to_owned(),
        _ => format!("/vmfs/volumes/{datastore}{path}"),
    }
}

/// Reads a `.vmx`.
pub async fn read_vmx(datastore: &Datastore, path: &str) -> Result<Vmx, VmError> {
    let bytes = datastore.folder.read_text(path).await?;
    let source = match Vmx::parse(&bytes) {
        Ok(vmx) => return Ok(vmx),
        Err(source) => source,
    };
    debug_assert!(MAX_BYTES as u64 <= vmdisk::folder::MAX_TEXT_BYTES, "a .vmx is a small file");
    Err(VmError::Vmx { path: path.to_owned(), source })
}

async fn open_disk(
    datastore: &Rc<Datastore>,
    path: &str,
    entry: &DiskEntry,
    around: &dyn Surroundings,
) -> Result<Rc<VmDisk>, ChainError> {
    let folder: Rc<dyn Folder> = Rc::clone(&datastore.folder) as Rc<dyn Folder>;
    VmDisk::open(folder, path, Open { read_only: false, shared: entry.shared }, around).await
}

/// The `.vmx` of a new VM without disks.
pub fn new_vmx(name: &str, memory_mib: u64, uuid: Uuid) -> Vmx {
    let mut vmx = Vmx::new();
    for (key, value) in [
        ("config.version", "8"),
        ("virtualHW.version", "8"),
        ("displayName", name),
        ("guestOS", "other-64"),
        ("memsize", &memory_mib.to_string()),
        ("numvcpus", "1"),
        ("uuid.bios", &vmx_uuid(uuid)),
        ("uuid.location", &vmx_uuid(uuid)),
        ("disk.EnableUUID", "TRUE"),
    ] {
        vmx.set(key, value);
    }
    vmx
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_next_to_the_vmx_go_by_their_name() {
        assert_eq!(relative("/sql01", "/sql01/sql01.vmdk", "ds1"), "sql01.vmdk");
        assert_eq!(relative("/sql01", "/shared/d.vmdk", "ds1"), "/vmfs/volumes/ds1/shared/d.vmdk");
        assert_eq!(relative("/sql01", "/sql012/d.vmdk", "ds1"), "/vmfs/volumes/ds1/sql012/d.vmdk");
    }

    #[test]
    fn slots_are_taken_in_order() {
        let mut vmx = new_vmx("a", 512, Uuid::nil());
        for _ in 0..60 {
            let slot = free_slot(&vmx).unwrap();
            vmx.attach(slot, "x.vmdk");
        }
        assert_eq!((free_slot(&vmx), vmx.disks().len()), (None, 60));
    }
}
