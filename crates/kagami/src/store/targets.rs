//! What an export stands for: a LUN, a snapshot, a disk of a VM, or a disk of no VM, which is opened for it.

use std::rc::Rc;

use array::Lun;
use array::catalog::SnapshotRecord;
use block::{Disk, Generation};
use uuid::Uuid;
use vm::{Datastore, Slot, Vm};
use vmdisk::folder::{directory, parent_path};
use vmdisk::{Open, VmDisk};

use super::Store;
use super::disks::{chain_problem, folder};
use crate::names::{FileName, SnapName};
use crate::problem::{Kind, Outcome, Problem};

/// What an export stands for, however its target was written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Subject {
    /// A LUN by itself.
    Lun(Uuid),
    /// A snapshot of a LUN.
    Snapshot(Uuid, String),
    /// A disk of a VM.
    Disk(String, Slot),
    /// A disk that no VM has.
    File(FileName),
}

impl Subject {
    /// It is a disk of this VM.
    pub fn is_of(&self, vm: &str) -> bool {
        matches!(self, Self::Disk(name, _) if name == vm)
    }
}

/// Where the sectors of an export lie: two exports of one such place are one disk, by whatever names they go.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Below {
    /// A LUN, by itself or mapped.
    Lun(Uuid),
    /// A snapshot of a LUN.
    Snapshot(Uuid, String),
    /// A file on the datastore of this LUN.
    File(Uuid, String),
}

impl Below {
    fn of(datastore: &Datastore, disk: &VmDisk) -> Self {
        let mapped = disk.rdm().and_then(|(_, identity)| identity.lun.uuid);
        match (mapped, disk.links().first()) {
            (Some(lun), _) => Self::Lun(lun),
            (None, base) => {
                Self::File(datastore.lun.uuid(), base.map(|b| b.path.clone()).unwrap_or_default())
            }
        }
    }

    /// The LUN whose sectors they are, or that holds them.
    pub fn lun(&self) -> Uuid {
        match self {
            Self::Lun(lun) | Self::Snapshot(lun, _) | Self::File(lun, _) => *lun,
        }
    }
}

/// A disk to be served.
pub struct Served {
    pub(super) disk: Rc<dyn Disk>,
    pub(super) read_only: bool,
    pub(super) description: String,
    pub(super) fast_zero: bool,
    pub(super) subject: Subject,
    pub(super) below: Below,
    /// The disk of a VM or of none; whether it is one plain link decides what can be said of changes.
    pub(super) chain: Option<Rc<VmDisk>>,
}

impl Served {
    /// The disk, when it was opened for the export.
    pub fn own(&self) -> Option<&Rc<VmDisk>> {
        self.chain.as_ref().filter(|_| matches!(self.subject, Subject::File(_)))
    }

    /// Lets go of a disk that was opened for the export.
    pub async fn close(self) {
        if let Some(own) = self.own() {
            close(&self.subject, own).await;
        }
    }
}

/// Closes a disk that was opened for an export.
pub(super) async fn close(subject: &Subject, disk: &VmDisk) {
    if let Err(error) = disk.close().await {
        tracing::error!(?subject, %error, "a disk was not closed well");
    }
}

/// Snapshots of a LUN with the generations that changes can be asked for since; of an image only those before it.
fn changed_of(lun: &Lun, image: Option<Generation>) -> Vec<(String, Generation)> {
    let open = |s: SnapshotRecord| lun.open_snapshot(&s.name).ok().map(|open| (s.name, open.generation()));
    let before = |(_, at): &(String, Generation)| image.is_none_or(|image| at.counter < image.counter);
    lun.snapshots().into_iter().filter_map(open).filter(before).collect()
}

impl Store {
    /// What `kagami:changed:SNAP` can be asked for: a LUN's map knows, so it is for LUNs, their snapshots, and mappings
    /// that nothing lies above.
    pub(super) fn changed_since(&self, below: &Below, chain: Option<&VmDisk>) -> Vec<(String, Generation)> {
        if chain.is_some_and(|chain| chain.links().len() != 1) {
            return Vec::new();
        }
        let Ok(found) = self.lun(&below.lun().to_string()) else { return Vec::new() };
        match below {
            Below::Lun(_) => changed_of(&found.lun, None),
            Below::Snapshot(_, name) => {
                let image = found.lun.open_snapshot(name);
                image.map_or_else(|_| Vec::new(), |image| changed_of(&found.lun, Some(image.generation())))
            }
            Below::File(..) => Vec::new(),
        }
    }

    /// What a target is: `VM/SLOT`, `LUN@SNAP`, `datastore:dir/disk.vmdk`, or a LUN. A disk of no VM is opened.
    pub(super) async fn target(&self, text: &str, read_only: bool) -> Outcome<Served> {
        if text.starts_with('[') || text.contains(':') && !text.contains('/') || text.contains(":/") {
            return self.target_file(text, read_only).await;
        }
        if let Some((vm, slot)) = text.split_once('/')
            && let Ok(slot) = slot.parse::<Slot>()
        {
            let vm = self.open_vm(vm)?;
            return self.target_disk(&vm, slot);
        }
        if text.contains(':') {
            return self.target_file(text, read_only).await;
        }
        if text.contains('@') {
            let name = SnapName::parse(text)?;
            let (found, snapshot) = self.snapshot(&name)?;
            return Ok(Served {
                subject: Subject::Snapshot(found.lun.uuid(), name.snap.clone()),
                below: Below::Snapshot(found.lun.uuid(), name.snap.clone()),
                disk: snapshot,
                read_only: true,
                description: format!("snapshot {name}"),
                fast_zero: false,
                chain: None,
            });
        }
        let found = self.lun(text)?;
        if let Some(claim) = &found.lun.claimed_by() {
            return Err(Problem::new(
                "KGM-LUN-0002",
                Kind::Refused,
                format!("LUN \"{text}\" is not served by itself"),
            )
            .why(format!("it is in use: {claim}"))
            .hint("serve the VM's disk, or a snapshot of the LUN"));
        }
        Ok(Served {
            disk: Rc::clone(&found.lun) as Rc<dyn Disk>,
            read_only: false,
            description: format!("LUN {text}"),
            fast_zero: true,
            subject: Subject::Lun(found.lun.uuid()),
            below: Below::Lun(found.lun.uuid()),
            chain: None,
        })
    }

    async fn target_file(&self, text: &str, read_only: bool) -> Outcome<Served> {
        let file = FileName::parse(text)?;
        for vm in self.open_vms_now() {
            for disk in vm.disks() {
                if disk.datastore.name == file.datastore && disk.path == file.path {
                    return self.target_disk(&vm, disk.slot);
                }
            }
        }
        let datastore = self.open_datastore_now(&file.datastore)?;
        if let Some(holder) = self.vm_that_has(&datastore, &file.path) {
            return Err(Problem::new(
                "KGM-EXP-0009",
                Kind::Conflict,
                format!("{file} is not served by itself"),
            )
            .why(format!("{holder} has it"))
            .hint("kagami vm show VM, kagami export start VM/SLOT"));
        }
        self.open_file(&datastore, file, read_only).await
    }

    /// Opens a disk that no VM has. Its claims keep everybody else from writing it meanwhile.
    async fn open_file(&self, datastore: &Rc<Datastore>, file: FileName, read_only: bool) -> Outcome<Served> {
        let title = || format!("{file} cannot be served");
        let files = folder(datastore);
        let how = if read_only { Open::READ } else { Open::WRITE };
        let opened = VmDisk::open(Rc::clone(&files), &file.path, how, self).await;
        let disk = match opened {
            Ok(disk) => disk,
            Err(error) => {
                let problem = chain_problem(title(), &error);
                return Err(match self.holder_of(datastore, &file.path) {
                    Some(holder) => problem.clone().why(format!("{}: {holder} has it", problem.detail)),
                    None => problem,
                });
            }
        };
        // What lies above a base counts on it as it is (R16).
        let above = match read_only {
            true => Ok(Vec::new()),
            false => vmdisk::chain::children(&files, &file.path).await,
        };
        let above = above.map_err(|e| chain_problem(title(), &e))?;
        if let Some(child) = above.first() {
            return Err(Problem::new("KGM-EXP-0010", Kind::Refused, title())
                .why(format!("redo log {child} lies above it, which writes would break"))
                .hint(format!("kagami export start {}:{child}, or --read-only", file.datastore)));
        }
        Ok(Served {
            description: format!("disk {file}"),
            fast_zero: disk.rdm().is_some(),
            below: Below::of(datastore, &disk),
            disk: Rc::clone(&disk) as Rc<dyn Disk>,
            read_only: false,
            subject: Subject::File(file),
            chain: Some(disk),
        })
    }

    fn target_disk(&self, vm: &Vm, slot: Slot) -> Outcome<Served> {
        self.not_mixed(&vm.name)?;
        let Some(disk) = vm.disk(slot) else {
            let why = vm.troubles().into_iter().find(|t| t.slot == slot).map(|t| t.why);
            return Err(Problem::new(
                "KGM-EXP-0003",
                Kind::NotFound,
                format!("{}/{slot} cannot be served", vm.name),
            )
            .why(why.unwrap_or_else(|| "the VM has no disk there".into()))
            .hint(format!("kagami vm show {}", vm.name)));
        };
        Ok(Served {
            description: format!("{} of VM {}: {}", slot, vm.name, disk.path),
            disk: Rc::clone(&disk.disk) as Rc<dyn Disk>,
            read_only: false,
            fast_zero: disk.disk.rdm().is_some(),
            subject: Subject::Disk(vm.name.clone(), slot),
            below: Below::of(&disk.datastore, &disk.disk),
            chain: Some(disk.disk),
        })
    }

    /// The VM that has a disk which it does not serve under this name: as a link of a chain, as one that it cannot open,
    /// or in its directory while it is shut.
    fn vm_that_has(&self, datastore: &Rc<Datastore>, path: &str) -> Option<String> {
        let user = self.vm_user_of(datastore, path);
        let named = || self.vms_with(datastore, path).first().map(|vm| format!("VM {vm}"));
        let shut = || {
            let vms = self.vms.borrow();
            let shut = vms.values().filter(|e| e.state.is_err() && e.record.datastore == datastore.name);
            let mut here = shut.filter(|e| directory(&e.record.vmx) == directory(path));
            here.next().map(|e| format!("VM {}, which cannot be opened,", e.record.name))
        };
        user.or_else(named).or_else(shut)
    }

    /// Who has a disk open: `VM/SLOT`, or an export.
    pub(super) fn holder_of(&self, datastore: &Rc<Datastore>, path: &str) -> Option<String> {
        let export = || self.export_of_file(datastore, path).map(|name| format!("export \"{name}\""));
        self.vm_user_of(datastore, path).or_else(export)
    }

    /// The export that has a disk of no VM open, as its top or as a link below.
    fn export_of_file(&self, datastore: &Datastore, path: &str) -> Option<String> {
        let has = |served: &super::exports::Serving| match (&served.subject, &served.own) {
            (Subject::File(file), Some(disk)) => {
                file.datastore == datastore.name
                    && (file.path == path || disk.links().iter().any(|link| link.path == path))
            }
            _ => false,
        };
        self.exports_that(has).into_iter().next()
    }

    /// Refuses what is to be done with a disk that an export has open.
    pub(super) fn file_not_served(&self, datastore: &Datastore, path: &str, what: &str) -> Outcome {
        let Some(export) = self.export_of_file(datastore, path) else { return Ok(()) };
        let file = FileName { datastore: datastore.name.clone(), path: path.to_owned() };
        Err(Problem::new("KGM-DSK-0007", Kind::Conflict, format!("{file} is not {what}"))
            .why(format!("it is served as export \"{export}\""))
            .hint(format!("kagami export stop {export}")))
    }

    /// The same for every disk that a configuration names.
    pub(super) fn files_not_served(
        &self,
        datastore: &Datastore,
        vmx_path: &str,
        vmx: &vm::vmx::Vmx,
    ) -> Outcome {
        for entry in vmx.disks() {
            if let Ok(path) = parent_path(&*datastore.folder, vmx_path, &entry.file_name) {
                self.file_not_served(datastore, &path, "used by a VM")?;
            }
        }
        Ok(())
    }

    /// The export of a disk of no VM that lies on this datastore, in this directory or below.
    pub(super) fn export_below(&self, datastore: &str, home: &str) -> Option<String> {
        let inside = |path: &str| path.strip_prefix(home).is_some_and(|rest| rest.starts_with('/'));
        let fits = |s: &Subject| matches!(s, Subject::File(f) if f.datastore == datastore && inside(&f.path));
        self.exports_of(fits).into_iter().next()
    }

    /// Disks that were opened for exports and lie on one of these LUNs.
    pub(super) fn exported_above(&self, luns: &[Uuid]) -> Vec<Rc<VmDisk>> {
        let entries = self.exports.entries.borrow();
        let serving = entries.values().filter_map(|e| e.state.as_ref().ok());
        serving.filter(|s| luns.contains(&s.below.lun())).filter_map(|s| s.own.clone()).collect()
    }
}
