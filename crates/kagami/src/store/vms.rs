//! VMs of the home: which `.vmx` files on its datastores are VMs.

use std::rc::Rc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vm::registry::{new_vmx, read_vmx, relative};
use vm::vmsnap::Place;
use vm::vmx::Mode;
use vm::{Datastore, Slot, Vm, VmError};
use vmdisk::folder::{Folder as _, Provision, directory, parent_path};
use vmfs::format::InodeKind;

use super::doing::Doing;
use super::rdms::parse_mode;
use super::{Folder, Store};
use crate::api::Change;
use crate::cli::images::vmfs_problem;
use crate::files::{Named, Versioned};
use crate::model::{AttachDisk, DetachDisk, HeldView, NewVm, Plan, RegisterVm, Removal, VmDiskView, VmView};
use crate::names::FileName;
use crate::problem::{Kind, Outcome, Problem, check_name};
use crate::units::show_size;

/// What the home remembers of a VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmRecord {
    /// Format of this record.
    pub format: u32,
    /// Name.
    pub name: String,
    /// Datastore that its directory is on.
    pub datastore: String,
    /// Its `.vmx`, absolute there.
    pub vmx: String,
}

impl Versioned for VmRecord {
    const FORMAT: u32 = 1;
}

impl Named for VmRecord {
    fn format(&self) -> u32 {
        self.format
    }

    fn unknown(name: String, format: u32) -> Self {
        Self { format, name, datastore: String::new(), vmx: String::new() }
    }
}

/// A VM of the home, open or not.
pub struct VmEntry {
    pub(super) record: VmRecord,
    pub(super) state: Result<Rc<Vm>, Problem>,
}

/// What went wrong with a VM.
pub fn vm_problem(what: impl Into<String>, error: &VmError) -> Problem {
    let (code, kind, hint) = match error {
        VmError::NoSlot | VmError::SlotTaken { .. } | VmError::AttachedAlready { .. } => {
            ("KGM-VMS-0001", Kind::Conflict, "kagami vm show VM")
        }
        VmError::Vmx { .. } => {
            ("KGM-VMS-0002", Kind::Corrupt, "restore it from a backup: kagami backup ls --repo DIR")
        }
        VmError::Folder(vmdisk::folder::FolderError::NotFound { .. }) => {
            ("KGM-VMS-0405", Kind::NotFound, "kagami datastore ls, then kagami disk ls")
        }
        VmError::Folder(_) => ("KGM-VMS-0003", Kind::Failed, "kagami datastore check DATASTORE"),
    };
    Problem::new(code, kind, what).why(error).hint(hint)
}

impl Store {
    pub(super) async fn open_one_vm(&self, record: &VmRecord) -> Outcome<Rc<Vm>> {
        self.known(Folder::Vms, &record.name, record)?;
        let datastore = self.open_datastore_now(&record.datastore)?;
        let place = Place { datastore: Rc::clone(&datastore), vmx_path: record.vmx.clone() };
        let set_aside = self.recover_vmsnap(place, &record.name).await?;
        let vm = Vm::open(&record.name, &datastore, &record.vmx, self)
            .await
            .map_err(|e| vm_problem(format!("VM \"{}\" cannot be opened", record.name), &e))?;
        vm.note_set_aside(set_aside);
        Ok(vm)
    }

    pub(super) async fn vm_records(&self) -> Outcome<Vec<VmRecord>> {
        self.load::<VmRecord>(Folder::Vms).await
    }

    pub(super) async fn open_vms(&self, records: Vec<VmRecord>) -> Outcome {
        for record in records {
            let state = self.open_one_vm(&record).await;
            if let Err(problem) = &state {
                tracing::error!(vm = record.name, %problem, "a VM is missing");
            }
            self.vms.borrow_mut().insert(record.name.clone(), VmEntry { record, state });
        }
        Ok(())
    }

    pub(super) async fn close_vms(&self) {
        let entries = std::mem::take(&mut *self.vms.borrow_mut());
        for (name, entry) in entries {
            let Ok(vm) = entry.state else { continue };
            for disk in vm.disks() {
                if let Err(error) = disk.disk.close().await {
                    tracing::error!(vm = name, slot = %disk.slot, %error, "a disk was not closed well");
                }
            }
        }
    }

    pub(super) fn vm_troubles(&self) -> Vec<String> {
        let vms = self.vms.borrow();
        let mut all = Vec::new();
        for entry in vms.values() {
            match &entry.state {
                Ok(vm) => all.extend(
                    vm.troubles()
                        .iter()
                        .map(|t| format!("VM {}, {} {}: {}", vm.name, t.slot, t.file_name, t.why)),
                ),
                Err(problem) => all.push(format!("VM {}: {problem}", entry.record.name)),
            }
        }
        all
    }

    /// An open VM by name.
    pub(super) fn open_vm(&self, name: &str) -> Outcome<Rc<Vm>> {
        let vms = self.vms.borrow();
        vms.get(name).ok_or_else(|| Problem::not_found("vm", name))?.state.clone()
    }

    /// All open VMs.
    pub(super) fn open_vms_now(&self) -> Vec<Rc<Vm>> {
        self.vms.borrow().values().filter_map(|e| e.state.as_ref().ok().cloned()).collect()
    }

    /// Names of the open VMs whose configuration names this descriptor.
    pub(super) fn vms_with(&self, datastore: &Datastore, path: &str) -> Vec<String> {
        let mut found = Vec::new();
        for vm in self.open_vms_now() {
            let vmx = vm.vmx();
            let named = |e: &vm::vmx::DiskEntry| {
                let at = parent_path(&*datastore.folder, &vm.vmx_path, &e.file_name);
                vm.datastore.name == datastore.name && at.is_ok_and(|p| p == path)
            };
            if vmx.disks().iter().any(named) {
                found.push(vm.name.clone());
            }
        }
        found
    }

    /// Refuses when somebody works with the VM: a client of its disks, or a job.
    pub(super) fn vm_is_quiet(&self, name: &str, what: &str) -> Outcome {
        self.not_occupied(name)?;
        let clients = self.clients_of_vm(name);
        if clients == 0 {
            return Ok(());
        }
        Err(Problem::new("KGM-VMS-0008", Kind::Refused, format!("VM \"{name}\" is on: {what}"))
            .why(format!("{clients} connections to its disks"))
            .hint(match self.export_of_vm(name) {
                Some(export) => format!("shut it down, or kagami export stop {export}"),
                None => "shut it down first".into(),
            }))
    }

    /// Closes VMs that are quiet, with what is served of them.
    pub(super) async fn close_some(&self, names: &[String]) {
        for name in names {
            if let Ok(vm) = self.open_vm(name) {
                self.hold_no_more(&[vm]);
            }
            self.pause_exports(name).await;
            self.drop_frozen(name).await;
            let title = format!("VM \"{name}\" is being changed");
            if let Some(entry) = self.vms.borrow_mut().get_mut(name) {
                entry.state = Err(Problem::new("KGM-VMS-0004", Kind::Conflict, title));
            }
        }
    }

    /// Opens VMs again.
    pub(super) async fn reopen_vms(&self, names: &[String]) {
        for name in names {
            let record = self.vms.borrow().get(name).map(|e| e.record.clone());
            let Some(record) = record else { continue };
            let state = self.open_one_vm(&record).await;
            if let Err(problem) = &state {
                tracing::error!(vm = name, %problem, "a VM cannot be opened again");
            }
            if let Some(entry) = self.vms.borrow_mut().get_mut(name) {
                entry.state = state;
            }
        }
        self.retry_exports().await;
    }

    fn vm_disk_view(disk: &vm::OpenDisk) -> VmDiskView {
        let kind = disk.disk.rdm().map_or_else(
            || if disk.disk.links().len() > 1 { "delta" } else { "flat" },
            |(mode, _)| match mode {
                vmdisk::rdm::Mode::Virtual => "rdm",
                vmdisk::rdm::Mode::Physical => "rdmp",
            },
        );
        VmDiskView {
            slot: disk.slot.to_string(),
            disk: FileName { datastore: disk.datastore.name.clone(), path: disk.path.clone() }.to_string(),
            kind: kind.to_owned(),
            size_bytes: block::Disk::shape(&*disk.disk).bytes(),
            lun: disk.disk.rdm().map(|(_, identity)| identity.lun.display()),
            mode: disk.mode.name().to_owned(),
            held: disk
                .disk
                .held()
                .map(|held| HeldView { operations: held.operations, seconds: held.for_now.as_secs_f64() }),
            trouble: None,
        }
    }

    fn vm_view(&self, entry: &VmEntry) -> VmView {
        let record = &entry.record;
        let file = FileName { datastore: record.datastore.clone(), path: record.vmx.clone() };
        let mut view = VmView {
            id: String::new(),
            name: record.name.clone(),
            vmx: file.to_string(),
            state: "missing".into(),
            disks: Vec::new(),
            set_aside: Vec::new(),
            held_seconds: 0.0,
            trouble: None,
        };
        let vm = match &entry.state {
            Ok(vm) => vm,
            Err(problem) => {
                view.trouble = Some(problem.to_string());
                return view;
            }
        };
        view.id = vm.vmx().get("uuid.bios").unwrap_or_default().to_owned();
        for disk in vm.disks() {
            let mut shown = Self::vm_disk_view(&disk);
            if let Some(found) = self.claimed_by(&disk.datastore, &disk.path) {
                shown.lun = Some(found.lun.name());
            }
            view.disks.push(shown);
        }
        let show = |path| FileName { datastore: record.datastore.clone(), path }.to_string();
        view.set_aside = vm.set_aside().into_iter().map(show).collect();
        let troubles = vm.troubles();
        for trouble in &troubles {
            let at = parent_path(&*vm.datastore.folder, &vm.vmx_path, &trouble.file_name);
            let holder = at.ok().and_then(|path| self.holder_of(&vm.datastore, &path));
            let who = holder.map(|holder| format!(": {holder} has it")).unwrap_or_default();
            view.disks.push(VmDiskView {
                slot: trouble.slot.to_string(),
                disk: trouble.file_name.clone(),
                kind: "missing".into(),
                size_bytes: 0,
                lun: None,
                mode: String::new(),
                held: None,
                trouble: Some(format!("{}{who}", trouble.why)),
            });
        }
        let disks = vm.disks();
        view.held_seconds =
            disks.iter().map(|d| d.disk.held_in_all()).sum::<std::time::Duration>().as_secs_f64();
        let states = [
            (!troubles.is_empty(), "disk missing"),
            (view.disks.iter().any(|d| d.held.is_some()), "held: no room"),
            (disks.iter().any(|d| d.disk.is_undecided()), "in doubt: flushes are refused"),
            (view.disks.iter().any(|d| d.kind == "delta"), "needs consolidation"),
        ];
        let state = states.iter().find(|(is, _)| *is).map_or("ok", |(_, state)| *state);
        view.state = self.mixed_state(&record.name).unwrap_or(state).into();
        view
    }

    /// All VMs.
    pub async fn vms(&self) -> Outcome<Vec<VmView>> {
        Ok(self.vms.borrow().values().map(|e| self.vm_view(e)).collect())
    }

    /// One VM.
    pub async fn show_vm(&self, name: &str) -> Outcome<VmView> {
        let vms = self.vms.borrow();
        vms.get(name).map(|e| self.vm_view(e)).ok_or_else(|| Problem::not_found("vm", name))
    }

    /// Opens a VM whose `.vmx` is there, and remembers it.
    pub(super) async fn adopt_vm(&self, record: VmRecord) -> Outcome<Rc<Vm>> {
        let vm = self.open_one_vm(&record).await?;
        self.save(Folder::Vms, &record.name, record.clone()).await?;
        let entry = VmEntry { state: Ok(Rc::clone(&vm)), record };
        self.vms.borrow_mut().insert(entry.record.name.clone(), entry);
        self.retry_exports().await;
        Ok(vm)
    }

    /// Makes a VM: directory, disks, `.vmx` last.
    pub async fn create_vm(&self, new: NewVm, dry: bool) -> Outcome<Change<VmView>> {
        let _turn = self.turn.take().await;
        check_name("vm", &new.name)?;
        if self.vms.borrow().contains_key(&new.name) {
            return Err(Problem::exists("vm", &new.name));
        }
        let datastore = self.open_datastore_now(&new.datastore)?;
        let home = format!("/{}", new.name);
        if datastore.volume.entry(&home).await.is_ok() {
            return Err(Problem::new(
                "KGM-VMS-0005",
                Kind::Conflict,
                format!("VM \"{}\" was not made", new.name),
            )
            .why(format!("[{}] {} is there already", new.datastore, new.name))
            .hint(format!("kagami vm register {}:{home}/{}.vmx, or another name", new.datastore, new.name)));
        }
        let mut mapped = Vec::new();
        for rdm in &new.rdms {
            let found = self.lun(&rdm.lun)?;
            self.unclaimed(&found, "mapped")?;
            mapped.push((found, parse_mode(&rdm.mode)?));
        }
        if dry {
            let mut would = vec![format!("make VM {} in [{}] {}", new.name, new.datastore, new.name)];
            would.extend(new.disks.iter().map(|s| format!("make a thin disk of {}", show_size(*s))));
            would.extend(new.rdms.iter().map(|r| format!("map LUN {} ({})", r.lun, r.mode)));
            return Ok(Change::Would(Plan { would, ..Plan::default() }));
        }
        let doing = Doing::MakeVm { name: new.name.clone(), datastore: new.datastore.clone() };
        self.noted(doing, async || self.make_vm(&datastore, &new, &home, &mapped).await).await?;
        tracing::info!(vm = new.name, "VM made");
        self.show_vm(&new.name).await.map(Change::Done)
    }

    async fn make_vm(
        &self,
        datastore: &Rc<Datastore>,
        new: &NewVm,
        home: &str,
        mapped: &[(super::luns::FoundLun, vmdisk::rdm::Mode)],
    ) -> Outcome {
        if let Err(problem) = self.make_vm_files(datastore, new, home, mapped).await {
            self.remove_vm_files(datastore, home).await;
            return Err(problem);
        }
        let vmx = format!("{home}/{}.vmx", new.name);
        let record = VmRecord { format: 1, name: new.name.clone(), datastore: new.datastore.clone(), vmx };
        self.adopt_vm(record).await.map(drop)
    }

    async fn make_vm_files(
        &self,
        datastore: &Rc<Datastore>,
        new: &NewVm,
        home: &str,
        mapped: &[(super::luns::FoundLun, vmdisk::rdm::Mode)],
    ) -> Outcome {
        let mut vmx = new_vmx(&new.name, new.memory_mib, Uuid::new_v4());
        let mut slots = Slot::all_scsi();
        let mut number = 0;
        let mut next = || {
            let path = match number {
                0 => format!("{home}/{}.vmdk", new.name),
                n => format!("{home}/{}_{n}.vmdk", new.name),
            };
            number += 1;
            slots.next().map(|slot| (slot, path)).ok_or_else(|| Problem::usage("a VM has at most 60 disks"))
        };
        for size in &new.disks {
            let (slot, path) = next()?;
            self.make_disk(datastore, &path, *size, Provision::Thin).await?;
            vmx.attach(slot, &relative(home, &path, &datastore.name));
        }
        for (found, mode) in mapped {
            let (slot, path) = next()?;
            self.make_rdm(datastore, &path, found, *mode).await?;
            vmx.attach(slot, &relative(home, &path, &datastore.name));
        }
        let path = format!("{home}/{}.vmx", new.name);
        self.make_parents(datastore, &path).await?;
        datastore
            .folder
            .replace(&path, &vmx.to_bytes())
            .await
            .map_err(|e| vm_problem(format!("VM \"{}\" was not made", new.name), &VmError::Folder(e)))
    }

    /// Takes a VM's directory away as far as it goes: mappings give up their LUNs, which stay.
    pub(super) async fn remove_vm_files(&self, datastore: &Rc<Datastore>, home: &str) {
        self.remove_vm_files_but(datastore, home, None).await;
        if let Err(error) = datastore.volume.remove(home).await
            && !matches!(error, vmfs::Error::NotFound { .. })
        {
            tracing::warn!(home, %error, "the directory stays");
        }
    }

    /// Takes the files in a VM's directory away, but one.
    pub(super) async fn remove_vm_files_but(
        &self,
        datastore: &Rc<Datastore>,
        home: &str,
        stays: Option<&str>,
    ) {
        let Ok(entries) = datastore.volume.list(home).await else { return };
        let names: Vec<String> = entries
            .iter()
            .filter(|e| e.kind != InodeKind::Directory && stays.is_none_or(|stays| stays != e.name))
            .map(|e| format!("{home}/{}", e.name))
            .collect();
        for path in &names {
            // Descriptors first, by their own rules; what is left over are plain files.
            if path.ends_with(".vmdk")
                && let Err(problem) = self.delete_disk(datastore, path).await
            {
                tracing::debug!(path, %problem, "not a disk by itself");
            }
        }
        for path in &names {
            if datastore.volume.entry(path).await.is_ok()
                && let Err(error) = datastore.volume.remove(path).await
            {
                tracing::warn!(path, %error, "cannot be removed");
            }
        }
    }

    /// Registers a VM that lies on a datastore.
    pub async fn register_vm(&self, new: RegisterVm, dry: bool) -> Outcome<Change<VmView>> {
        let _turn = self.turn.take().await;
        let (datastore, file) = self.file(&new.vmx)?;
        let vmx = read_vmx(&datastore, &file.path)
            .await
            .map_err(|e| vm_problem(format!("{file} was not registered"), &e))?;
        let name = new.name.or_else(|| vmx.get("displayName").map(str::to_owned)).unwrap_or_default();
        check_name("vm", &name).map_err(|p| p.hint("--name NAME"))?;
        if self.vms.borrow().contains_key(&name) {
            return Err(Problem::exists("vm", &name).hint("--name OTHER"));
        }
        let same = |r: &VmRecord| r.datastore == file.datastore && r.vmx == file.path;
        if let Some(other) = self.vms.borrow().values().find(|e| same(&e.record)) {
            let title = format!("{file} is registered already");
            return Err(
                Problem::new("KGM-VMS-0006", Kind::Conflict, title).why(format!("as {}", other.record.name))
            );
        }
        self.files_not_served(&datastore, &file.path, &vmx)?;
        if dry {
            return Ok(Change::would(format!("register {file} as {name}")));
        }
        let record = VmRecord { format: 1, name: name.clone(), datastore: file.datastore, vmx: file.path };
        self.adopt_vm(record).await?;
        self.show_vm(&name).await.map(Change::Done)
    }

    /// Registers all VMs in the directories of a datastore.
    pub(super) async fn register_all_on(&self, datastore: &Rc<Datastore>) -> Outcome {
        let failed =
            |e: vmfs::Error| vmfs_problem(format!("cannot list datastore \"{}\"", datastore.name), &e);
        for entry in datastore.volume.list("/").await.map_err(failed)? {
            if entry.kind != InodeKind::Directory {
                continue;
            }
            let home = format!("/{}", entry.name);
            for file in datastore.volume.list(&home).await.map_err(failed)? {
                if !file.name.ends_with(".vmx") {
                    continue;
                }
                let name = file.name.trim_end_matches(".vmx").to_owned();
                if check_name("vm", &name).is_err() || self.vms.borrow().contains_key(&name) {
                    tracing::warn!(vm = name, "not registered: the name is taken or none");
                    continue;
                }
                let vmx = format!("{home}/{}", file.name);
                let record = VmRecord { format: 1, name, datastore: datastore.name.clone(), vmx };
                if let Err(problem) = self.adopt_vm(record).await {
                    tracing::error!(%problem, "a VM was not registered");
                }
            }
        }
        Ok(())
    }

    /// Plugs a disk into a VM.
    pub async fn attach_disk(&self, name: &str, new: AttachDisk, dry: bool) -> Outcome<Change<VmView>> {
        let _turn = self.turn.take().await;
        let vm = self.open_vm(name)?;
        let (datastore, file) = self.file(&new.disk)?;
        if datastore.name != vm.datastore.name {
            return Err(Problem::usage(format!("{file} is on another datastore than VM \"{name}\"")));
        }
        let slot = match &new.slot {
            Some(text) => Some(text.parse::<Slot>().map_err(|e| Problem::usage(e.to_string()))?),
            None => None,
        };
        let mode = match new.mode.as_deref() {
            None | Some("persistent") => Mode::Persistent,
            Some("independent-persistent") => Mode::IndependentPersistent,
            Some(other) => return Err(Problem::usage(format!("a disk cannot be attached as \"{other}\""))),
        };
        let view = self.show_disk(&new.disk).await?;
        self.file_not_served(&datastore, &file.path, "attached")?;
        if dry {
            return Ok(Change::would(format!("attach {file} ({}) to {name}", kind_name(&view.kind))));
        }
        let holder = self.holder_of(&datastore, &file.path);
        self.not_occupied(name)?;
        let title = format!("{file} was not attached to \"{name}\"");
        let failed = |e: VmError| vm_problem(title.clone(), &e);
        let slot = vm.attach(&file.path, slot, mode, self).await.map_err(failed)?;
        // A disk that does not open is not left in the configuration.
        if let Some(trouble) = vm.troubles().into_iter().find(|t| t.slot == slot) {
            vm.edit_vmx(|vmx| _ = vmx.detach(slot), &[]).await.map_err(failed)?;
            vm.open_disks(self).await;
            let who = holder.map(|holder| format!(": {holder} has it")).unwrap_or_default();
            return Err(Problem::new("KGM-VMS-0010", Kind::Failed, title)
                .why(format!("{}{who}", trouble.why))
                .hint(format!("kagami disk show {}", new.disk)));
        }
        self.show_vm(name).await.map(Change::Done)
    }

    /// Unplugs a disk from a VM. Its files, and the LUN of a mapping, stay as they are.
    pub async fn detach_disk(&self, name: &str, new: DetachDisk, dry: bool) -> Outcome<Change<VmView>> {
        let _turn = self.turn.take().await;
        let vm = self.open_vm(name)?;
        let slot: Slot = new.slot.parse().map_err(|e: vm::SlotError| Problem::usage(e.to_string()))?;
        let Some(entry) = vm.vmx().disk(slot) else {
            return Err(Problem::new("KGM-VMS-0011", Kind::NotFound, format!("{name}/{slot} has no disk"))
                .hint(format!("kagami vm show {name}")));
        };
        self.not_occupied(name)?;
        if let Some(export) = self.export_of_disk(name, slot) {
            let title = format!("{name}/{slot} is not unplugged");
            return Err(Problem::new("KGM-VMS-0007", Kind::Conflict, title)
                .why(format!("it is served as \"{export}\""))
                .hint(format!("kagami export stop {export}")));
        }
        if dry {
            return Ok(Change::would(format!(
                "unplug {slot} ({}) from {name}; its files stay",
                entry.file_name
            )));
        }
        self.drop_frozen(name).await;
        let failed = |e| vm_problem(format!("{name}/{slot} was not unplugged"), &e);
        vm.edit_vmx(|vmx| _ = vmx.detach(slot), &[]).await.map_err(failed)?;
        vm.open_disks(self).await;
        self.show_vm(name).await.map(Change::Done)
    }

    /// Unregisters a VM, and removes its files if that is wanted.
    pub async fn remove_vm(&self, name: &str, how: Removal) -> Outcome<Change<VmView>> {
        let _turn = self.turn.take().await;
        let view = self.show_vm(name).await?;
        self.not_occupied(name)?;
        if let Some(export) = self.export_of_vm(name) {
            return Err(Problem::new(
                "KGM-VMS-0007",
                Kind::Conflict,
                format!("VM \"{name}\" is not removed"),
            )
            .why(format!("one of its disks is served as \"{export}\""))
            .hint(format!("kagami export stop {export}")));
        }
        let record = match self.vms.borrow().get(name) {
            Some(entry) => entry.record.clone(),
            None => return Err(Problem::not_found("vm", name)),
        };
        if how.all
            && let Some(export) = self.export_below(&record.datastore, directory(&record.vmx))
        {
            let title = format!("VM \"{name}\" is not removed");
            return Err(Problem::new("KGM-VMS-0007", Kind::Conflict, title)
                .why(format!("a disk in its directory is served as \"{export}\""))
                .hint(format!("kagami export stop {export}")));
        }
        if how.dry_run {
            let files = |d: &&VmDiskView| d.kind != "rdm" && d.kind != "rdmp" && d.trouble.is_none();
            let mut loses = Vec::new();
            if how.all {
                let home = directory(&record.vmx).trim_start_matches('/');
                loses.push(format!("the directory [{}] {home}", record.datastore));
                let disk = |d: &VmDiskView| format!("{} ({})", d.disk, show_size(d.size_bytes));
                loses.extend(view.disks.iter().filter(files).map(disk));
            }
            let would = match how.all {
                true => format!("remove VM {name} with its directory; mapped LUNs stay"),
                false => format!("unregister VM {name}; its files stay"),
            };
            return Ok(Change::Would(Plan { would: vec![would], loses, frees_bytes: 0 }));
        }
        let datastore = if how.all { Some(self.open_datastore_now(&record.datastore)?) } else { None };
        self.drop_frozen(name).await;
        let home = directory(&record.vmx);
        let doing = Doing::RemoveVm {
            name: name.to_owned(),
            datastore: record.datastore.clone(),
            home: home.to_owned(),
            all: how.all,
        };
        self.noted(doing, async || {
            self.forget(Folder::Vms, name).await?;
            drop(self.vms.borrow_mut().remove(name));
            if let Some(datastore) = datastore {
                self.forget_in_place(name).await?;
                self.remove_vm_files(&datastore, home).await;
            }
            Ok(())
        })
        .await?;
        tracing::info!(vm = name, files = how.all, "VM removed");
        Ok(Change::Done(view))
    }
}

/// A kind for people.
fn kind_name(kind: &str) -> &str {
    match kind {
        "rdm" => "raw device mapping, virtual",
        "rdmp" => "raw device mapping, physical",
        other => other,
    }
}
