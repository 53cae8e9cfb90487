//! Restoring: as a new VM with identities of its own, one disk to a LUN of its own; over the VM that the backup was made
//! from: `in_place`.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use array::Claim;
use backup::{DiskRecord, Manifest, Repository};
use block::Disk;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;
use vm::registry::relative;
use vm::vmx::Vmx;
use vm::{Datastore, Slot, Vm, VmError, identity};
use vmdisk::folder::{Folder as _, Provision, file_name};
use vmdisk::rdm::Mode;
use vmdisk::{Open, VmDisk};

use super::Store;
use super::backups::watch;
use super::disks::{chain_problem, check_descriptor_name, folder};
use super::luns::FoundLun;
use super::pools::pool_problem;
use super::rdms::parse_mode;
use super::vms::{VmRecord, vm_problem};
use crate::cli::backups::{repository_problem, resolve};
use crate::jobs::Progress;
use crate::model::{NewRestore, Plan};
use crate::names::FileName;
use crate::problem::{Kind, Outcome, Problem, check_name};
use crate::units::show_size;

/// Name of the file that says that a restore works in a directory.
const MARKER: &str = "restore.kagami";

/// What that file holds.
#[derive(Serialize, Deserialize)]
struct Marker {
    format: u32,
    /// The backup.
    backup: String,
    /// LUNs that the restore makes, `pool/lun`, noted before they are made.
    luns: Vec<String>,
}

/// Files of a VM beside its configuration and its disks: by their ends, and the key of the configuration that names them.
const BESIDE: [(&str, &str); 2] = [(".nvram", "nvram"), (".vmxf", "extendedConfigFile")];
/// Checks that `--force` overrides.
const CHECKS: [&str; 1] = ["identity"];

/// A backup that was found.
pub(super) struct Source {
    pub(super) repository: Repository,
    pub(super) manifest: Manifest,
}

/// Sums of a restore.
#[derive(Default)]
pub(super) struct Sums {
    pub(super) written: u64,
    pub(super) zeroed: u64,
    pub(super) compared: u64,
    pub(super) disks: Vec<String>,
    /// Snapshot that holds what was there before.
    pub(super) undo: Option<String>,
}

async fn source(repo: &Path, backup: &str) -> Outcome<Source> {
    let (repo, backup) = (repo.to_owned(), backup.to_owned());
    lane::offload(move || {
        let repository = crate::cli::backups::open(&repo)?;
        let id = resolve(&repository, &backup)?;
        let manifest = repository
            .manifest(id)
            .map_err(|e| repository_problem(format!("cannot read backup {id}"), &e))?;
        Ok(Source { repository, manifest })
    })
    .await
}

/// What the backup says of a disk.
pub(super) fn told<'a>(disk: &'a DiskRecord, name: &str) -> &'a str {
    disk.metadata.get(name).and_then(Value::as_str).unwrap_or_default()
}

fn is_rdm(disk: &DiskRecord) -> bool {
    !told(disk, "rdm_mode").is_empty()
}

impl Source {
    fn told(&self, name: &str) -> &str {
        self.manifest.metadata.get(name).and_then(Value::as_str).unwrap_or_default()
    }

    /// The disks wanted: all, or the one in a slot.
    pub(super) fn disks(&self, slot: Option<&str>) -> Outcome<Vec<&DiskRecord>> {
        match slot {
            None => Ok(self.manifest.disks.iter().collect()),
            Some(slot) => {
                let found = self.manifest.disk(slot);
                found.map(|d| vec![d]).map_err(|e| repository_problem(format!("there is no disk {slot}"), &e))
            }
        }
    }

    /// The disk in a slot, or the only one.
    fn only_disk(&self, slot: Option<&str>) -> Outcome<&DiskRecord> {
        match self.disks(slot)?[..] {
            [only] => Ok(only),
            _ => {
                let names: Vec<&str> = self.manifest.disks.iter().map(|d| d.name.as_str()).collect();
                Err(Problem::usage("the backup has several disks")
                    .hint(format!("--disk with one of {}", names.join(", "))))
            }
        }
    }

    /// The small file that ends like this.
    fn file_beside(&self, end: &str) -> Option<&str> {
        self.manifest.files.iter().map(|file| file.name.as_str()).find(|name| name.ends_with(end))
    }

    async fn file(&self, name: &str) -> Outcome<Vec<u8>> {
        let (repository, manifest, id) = (self.repository.clone(), self.manifest.clone(), self.manifest.id);
        let (shown, name) = (name.to_owned(), name.to_owned());
        let read = lane::offload(move || repository.file(&manifest, &name)).await;
        read.map_err(|e| repository_problem(format!("file {shown} in backup {id} cannot be read"), &e))
    }

    async fn vmx(&self) -> Outcome<Vmx> {
        let id = self.manifest.id;
        let bytes = self.file(self.told("vmx")).await?;
        Vmx::parse(&bytes)
            .map_err(|e| Problem::failed("KGM-VMX-0001", format!("the configuration in backup {id}"), e))
    }
}

impl Store {
    /// Checks a restore; what it would do.
    pub async fn plan_restore(&self, new: &NewRestore) -> Outcome<Plan> {
        let source = source(&new.repo, &new.backup).await?;
        let disks = source.disks(new.disk.as_deref())?;
        if let Some(word) = new.force.iter().find(|word| !CHECKS.contains(&word.as_str())) {
            return Err(Problem::usage(format!("there is no check \"{word}\" to override"))
                .hint(format!("--force={}", CHECKS.join(", --force="))));
        }
        if !new.force.is_empty() && !new.in_place {
            return Err(Problem::usage("only a restore in place writes over a disk that is there")
                .hint("without --force"));
        }
        if new.map.is_some() && new.new_lun.is_none() {
            return Err(Problem::usage("what is to be mapped is a new LUN").hint("--to-lun NAME --map DISK"));
        }
        let targets = [new.new_vm.is_some(), new.in_place, new.new_lun.is_some()];
        if targets.iter().filter(|t| **t).count() != 1 {
            return Err(
                Problem::usage("where to?").hint("as a new VM, in place, or into a new LUN: one of them")
            );
        }
        if let Some(name) = &new.new_lun {
            let disk = source.only_disk(new.disk.as_deref())?;
            let size = disk.length_bytes.next_multiple_of(4096);
            let (pool, _) = self.check_new_lun(name, size, new.pool.as_deref())?;
            let mut would = vec![format!(
                "make LUN {name} in pool {pool} and fill it with {} ({})",
                disk.name,
                show_size(size)
            )];
            if let Some(mapping) = self.new_mapping(new, disk)? {
                self.not_there(&mapping).await?;
                would.push(format!("map it as {}, {} mode", mapping.name, mapping.mode_name()));
            }
            return Ok(Plan { would, ..Plan::default() });
        }
        match &new.new_vm {
            Some(name) => {
                if new.disk.is_some() {
                    return Err(Problem::usage("a new VM gets all disks of the backup")
                        .hint("--to-lun NAME or --to FILE for one disk"));
                }
                self.not_occupied(name)?;
                self.check_new_vm(name, new, &source)?;
                let would = disks.iter().map(|d| {
                    let what = if is_rdm(d) { "a new LUN and mapping for" } else { "a new disk for" };
                    format!("make {what} {} ({}) and fill it", d.name, show_size(d.length_bytes))
                });
                let mut would: Vec<String> = would.collect();
                let beside = BESIDE.iter().filter(|(end, _)| source.file_beside(end).is_some());
                let files: Vec<String> = [".vmx"]
                    .iter()
                    .chain(beside.map(|(end, _)| end))
                    .map(|end| format!("{name}{end}"))
                    .collect();
                would.push(format!("write {} with new identities", files.join(", ")));
                if source.file_beside(".vmsd").is_some() {
                    would.push("leave out .vmsd: the new disks have no VM snapshots".into());
                }
                Ok(Plan { would, ..Plan::default() })
            }
            None => {
                let vm = self.vm_that_is_off(&source.manifest.name)?;
                for disk in &disks {
                    self.target_in_place(&vm, disk, new)?;
                }
                self.plan_in_place(&vm.name, new, &source)?;
                let loses =
                    disks.iter().map(|d| format!("what {}/{} holds now, where it differs", vm.name, d.name));
                let would = vec![
                    format!("write to the disks what differs from backup {}", source.manifest.id),
                    format!(
                        "leave the configuration of {} as it is (.vmx, .vmsd, .nvram, .vmxf): --as NAME restores that of the backup",
                        vm.name
                    ),
                ];
                Ok(Plan { would, loses: loses.collect(), frees_bytes: 0 })
            }
        }
    }

    fn check_new_vm(&self, name: &str, new: &NewRestore, source: &Source) -> Outcome<Rc<Datastore>> {
        check_name("vm", name)?;
        if self.vms.borrow().contains_key(name) {
            return Err(Problem::exists("vm", name));
        }
        let wanted = new.datastore.as_deref().unwrap_or_else(|| source.told("datastore"));
        self.open_datastore_now(wanted).map_err(|p| p.hint("--datastore NAME"))
    }

    /// A VM that nobody works with: no client of its disks, no job.
    pub(super) fn vm_that_is_off(&self, name: &str) -> Outcome<Rc<Vm>> {
        self.vm_is_quiet(name, "it is not restored over")?;
        self.open_vm(name)
    }

    /// The disk that a disk of the backup is written over.
    pub(super) fn target_in_place(
        &self,
        vm: &Vm,
        disk: &DiskRecord,
        new: &NewRestore,
    ) -> Outcome<Rc<VmDisk>> {
        let title = || format!("{}/{} is not restored", vm.name, disk.name);
        let slot: Slot = disk.name.parse().map_err(|_| Problem::usage(title()).why("its name is no slot"))?;
        let open = vm.disk(slot).ok_or_else(|| {
            Problem::new("KGM-BKP-0010", Kind::NotFound, title()).why("the VM has no disk in that slot")
        })?;
        let has = open.disk.shape().bytes();
        if has < disk.length_bytes {
            return Err(Problem::new("KGM-BKP-0011", Kind::Refused, title()).why(format!(
                "it has {}, the backup {}",
                show_size(has),
                show_size(disk.length_bytes)
            )));
        }
        if !new.force.iter().any(|check| check == "identity") {
            self.is_the_disk(vm, &open, disk)?;
        }
        Ok(open.disk)
    }

    /// Restores; the job's result.
    pub async fn restore(&self, new: NewRestore, progress: Arc<Progress>) -> Outcome<Value> {
        let begun = lane::now();
        let source =
            source(&new.repo, &new.backup).await.map_err(|problem| self.say_if_left(&new, problem))?;
        let mut sums = Sums::default();
        let vm = match (&new.new_vm, &new.new_lun) {
            (Some(name), _) => {
                let _busy = self.occupy(name, "restore")?;
                self.restore_as(name, &new, &source, &progress, &mut sums).await?;
                name.clone()
            }
            (None, Some(lun)) => {
                self.restore_to_lun(lun, &new, &source, &progress, &mut sums).await?;
                String::new()
            }
            (None, None) => {
                let done = self.restore_in_place(&new, &source, &progress, &mut sums).await;
                done.map_err(|problem| self.say_if_left(&new, problem))?
            }
        };
        tracing::info!(vm, lun = new.new_lun, backup = %source.manifest.id, "restored");
        Ok(json!({
            "id": source.manifest.id.to_string(),
            "vm": vm,
            "lun": new.new_lun,
            "mapping": new.map,
            "undo": sums.undo,
            "disks": sums.disks,
            "written_bytes": sums.written,
            "zeroed_bytes": sums.zeroed,
            "compared_bytes": sums.compared,
            "seconds": (lane::now() - begun).as_secs_f64(),
        }))
    }

    async fn restore_as(
        &self,
        name: &str,
        new: &NewRestore,
        source: &Source,
        progress: &Arc<Progress>,
        sums: &mut Sums,
    ) -> Outcome {
        let datastore = {
            let _turn = self.turn.take().await;
            if self.is_restored(name, source).await? {
                return Ok(()); // it had ended, and was cut off before that was noted
            }
            let datastore = self.check_new_vm(name, new, source)?;
            if datastore.volume.entry(&format!("/{name}")).await.is_ok() {
                self.clear_leftover(&datastore, name).await?;
            }
            datastore
        };
        let mut marker = Marker { format: 1, backup: source.manifest.id.to_string(), luns: Vec::new() };
        let done = self.fill_new_vm(name, new, source, &datastore, progress, sums, &mut marker).await;
        if done.is_err() {
            let _turn = self.turn.take().await;
            self.undo_restore(&datastore, name, &marker).await;
        }
        done
    }

    /// Takes away what a restore made that did not end: its directory, and the LUNs that its marker names.
    async fn undo_restore(&self, datastore: &Rc<Datastore>, name: &str, marker: &Marker) {
        let home = format!("/{name}");
        // The marker goes last: until then it says which LUNs are to go.
        self.remove_vm_files_but(datastore, &home, Some(MARKER)).await;
        if let Err(problem) = self.release_all(datastore, |at| at.starts_with(&format!("{home}/"))).await {
            tracing::warn!(vm = name, %problem, "a claim of a restore that did not end stays");
        }
        for lun in &marker.luns {
            let Ok(found) = self.lun(lun) else { continue };
            if let Err(error) = found.pool.pool.remove_lun(&found.lun.name(), true).await {
                tracing::warn!(lun, %error, "a LUN of a restore that did not end stays");
            }
        }
        self.remove_vm_files(datastore, &home).await;
    }

    /// The VM is there whole, from this backup, and only its marker was not taken away any more.
    async fn is_restored(&self, name: &str, source: &Source) -> Outcome<bool> {
        let record = self.vms.borrow().get(name).map(|entry| entry.record.clone());
        let Some(record) = record else { return Ok(false) };
        let datastore = self.open_datastore_now(&record.datastore)?;
        let is_its = match self.marker(&datastore, name).await {
            Some(marker) => marker.backup == source.manifest.id.to_string(),
            None => false,
        };
        if is_its {
            self.unmark(&datastore, name).await;
        }
        Ok(is_its)
    }

    async fn marker(&self, datastore: &Datastore, name: &str) -> Option<Marker> {
        let bytes = datastore.folder.read_text(&format!("/{name}/{MARKER}")).await.ok()?;
        serde_json::from_slice::<Marker>(&bytes).ok().filter(|marker| marker.format == 1)
    }

    async fn unmark(&self, datastore: &Datastore, name: &str) {
        if let Err(error) = datastore.folder.remove(&format!("/{name}/{MARKER}")).await {
            tracing::warn!(vm = name, %error, "the marker of its restore stays");
        }
    }

    /// Says, in the new VM's directory, that a restore works there and which LUNs it makes. Written before they are.
    async fn mark(&self, datastore: &Rc<Datastore>, name: &str, marker: &Marker) -> Outcome {
        let path = format!("/{name}/{MARKER}");
        self.make_parents(datastore, &path).await?;
        let bytes = serde_json::to_vec(marker).unwrap_or_default(); // plain data always serialises
        datastore
            .folder
            .replace(&path, &bytes)
            .await
            .map_err(|e| chain_problem(format!("VM \"{name}\" was not restored"), &e.into()))
    }

    /// A directory with a marker is what a restore left that did not end. Any other is somebody's.
    async fn clear_leftover(&self, datastore: &Rc<Datastore>, name: &str) -> Outcome {
        let marker = self.marker(datastore, name).await;
        let list = datastore.volume.list(&format!("/{name}")).await;
        if marker.is_none() && list.is_ok_and(|entries| entries.is_empty()) {
            return Ok(()); // an empty directory is nobody's: it was made, and its marker was not
        }
        let Some(marker) = marker else {
            let title = format!("VM \"{name}\" is not restored");
            return Err(Problem::new("KGM-VMS-0005", Kind::Conflict, title)
                .why(format!("[{}] {} is there already", datastore.name, name))
                .hint(format!("another name, or kagami vm register {}:{name}/{name}.vmx", datastore.name)));
        };
        tracing::info!(vm = name, "what an earlier restore left is taken away");
        self.undo_restore(datastore, name, &marker).await;
        Ok(())
    }

    #[allow(clippy::too_many_arguments)] // one restore, and what it is made of
    async fn fill_new_vm(
        &self,
        name: &str,
        new: &NewRestore,
        source: &Source,
        datastore: &Rc<Datastore>,
        progress: &Arc<Progress>,
        sums: &mut Sums,
        marker: &mut Marker,
    ) -> Outcome {
        let mut vmx = source.vmx().await?;
        identity::renew(&mut vmx, name, Uuid::new_v4());
        let home = format!("/{name}");
        self.mark(datastore, name, marker).await?;
        for record in &source.manifest.disks {
            progress.check()?;
            let slot: Slot = record.name.parse().map_err(|_| {
                Problem::failed(
                    "KGM-BKP-0012",
                    format!("disk {} of the backup", record.name),
                    "its name is no slot",
                )
            })?;
            let old = told(record, "descriptor");
            let path = format!("{home}/{}", new_disk_name(file_name(old), source.told("vm"), name, slot));
            {
                let _turn = self.turn.take().await;
                if is_rdm(record) {
                    let (pool, lun) = self.free_lun_name(name, new, record)?;
                    marker.luns.push(format!("{pool}/{lun}"));
                    self.mark(datastore, name, marker).await?;
                    let found = self.new_lun(&pool, &lun, record).await?;
                    self.make_rdm(datastore, &path, &found, parse_mode(told(record, "rdm_mode"))?).await?;
                } else {
                    self.make_disk(datastore, &path, record.length_bytes, Provision::Thin).await?;
                }
            }
            progress.phase(&format!("restore {slot}"));
            let disk = VmDisk::open(folder(datastore), &path, Open::WRITE, self)
                .await
                .map_err(|e| chain_problem(format!("[{}] {path} cannot be opened", datastore.name), &e))?;
            self.pour(source, record, disk, new, false, progress, sums).await?;
            vmx.set(&format!("{slot}.fileName"), &relative(&home, &path, &datastore.name));
        }
        let _turn = self.turn.take().await;
        let path = format!("{home}/{name}.vmx");
        self.make_parents(datastore, &path).await?;
        self.write_beside(name, source, datastore, &mut vmx).await?;
        datastore
            .folder
            .replace(&path, &vmx.to_bytes())
            .await
            .map_err(|e| vm_problem(format!("VM \"{name}\" was not restored"), &VmError::Folder(e)))?;
        let record =
            VmRecord { format: 1, name: name.to_owned(), datastore: datastore.name.clone(), vmx: path };
        self.adopt_vm(record).await?;
        // From here on it is a VM: a marker that stays does it no harm.
        self.unmark(datastore, name).await;
        Ok(())
    }

    /// What else the VM's directory holds: the firmware's settings and the rest of the configuration.
    async fn write_beside(
        &self,
        name: &str,
        source: &Source,
        datastore: &Rc<Datastore>,
        vmx: &mut Vmx,
    ) -> Outcome {
        for (end, key) in BESIDE {
            let Some(old) = source.file_beside(end) else { continue };
            let mut bytes = source.file(old).await?;
            if end == ".vmxf"
                && let Ok(text) = std::str::from_utf8(&bytes)
            {
                bytes = text.replace(&format!(">{}<", source.told("vmx")), &format!(">{name}.vmx<")).into();
            }
            let path = format!("/{name}/{name}{end}");
            let written = datastore.folder.replace(&path, &bytes).await;
            written
                .map_err(|e| vm_problem(format!("VM \"{name}\" was not restored"), &VmError::Folder(e)))?;
            vmx.set(key, &format!("{name}{end}"));
        }
        Ok(())
    }

    /// Where the LUN of a restored mapping goes, and a free name for it: in the pool named, else where the old one was,
    /// else the only one.
    fn free_lun_name(&self, vm: &str, new: &NewRestore, record: &DiskRecord) -> Outcome<(String, String)> {
        let old_pool = told(record, "pool");
        let wanted = match &new.pool {
            Some(pool) => Some(pool.as_str()),
            None => self.pool(old_pool).is_ok().then_some(old_pool),
        };
        let (pool_name, pool) = self.pool_for_new(wanted)?;
        let stem = format!("{vm}-{}", record.name.replace(':', "-"));
        let free = |n: u32| if n == 0 { stem.clone() } else { format!("{stem}-{n}") };
        let name = (0..1000).map(free).find(|n| pool.pool.lun(n).is_none()).unwrap_or_else(|| stem.clone());
        Ok((pool_name, name))
    }

    async fn new_lun(&self, pool: &str, name: &str, record: &DiskRecord) -> Outcome<FoundLun> {
        let size = record.length_bytes.next_multiple_of(4096);
        let (pool_name, pool) = self.check_new_lun(name, size, Some(pool))?;
        let lun = self.make_lun(&pool, name, size).await?;
        Ok(FoundLun { pool_name, pool, lun })
    }

    /// One disk into a new LUN with an identity of its own, and a mapping of that where one is wanted. It gets its name
    /// when all is done: what a crash leaves has another name, and goes when the restore is begun again, or gets its name
    /// then when only that was missing.
    async fn restore_to_lun(
        &self,
        name: &str,
        new: &NewRestore,
        source: &Source,
        progress: &Arc<Progress>,
        sums: &mut Sums,
    ) -> Outcome {
        let record = source.only_disk(new.disk.as_deref())?;
        let mapping = self.new_mapping(new, record)?;
        let unfinished = format!("{name}.restoring");
        let (found, full) = {
            let _turn = self.turn.take().await;
            let size = record.length_bytes.next_multiple_of(4096);
            let (pool_name, pool) = self.check_new_lun(name, size, new.pool.as_deref())?;
            match pool.pool.lun(&unfinished) {
                Some(lun) => {
                    let left = FoundLun { pool_name: pool_name.clone(), pool: pool.clone(), lun };
                    match self.clear_unfinished(left, mapping.as_ref()).await? {
                        // A LUN is mapped when it is full.
                        Some(full) => (full, true),
                        None => (self.new_lun(&pool_name, &unfinished, record).await?, false),
                    }
                }
                None => (self.new_lun(&pool_name, &unfinished, record).await?, false),
            }
        };
        let done = async {
            if !full {
                progress.phase(&format!("restore {}", record.name));
                let target = Rc::clone(&found.lun) as Rc<dyn Disk>;
                self.pour(source, record, target, new, false, progress, sums).await?;
            }
            let _turn = self.turn.take().await;
            if let (Some(mapping), false) = (&mapping, full) {
                self.not_there(mapping).await?;
                self.make_rdm(&mapping.datastore, &mapping.name.path, &found, mapping.mode).await?;
            }
            let failed = |e| pool_problem(format!("LUN \"{unfinished}\" did not get its name"), &e);
            found.lun.rename(name).await.map_err(failed)
        };
        let done: Outcome = done.await;
        if done.is_err() {
            let _turn = self.turn.take().await;
            if let Err(problem) = self.clear_unfinished(found, None).await {
                tracing::warn!(lun = unfinished, %problem, "a LUN of a restore that failed stays");
            }
        }
        done
    }

    /// Takes away the LUN of a restore that did not end, with its mapping; but not one that has the mapping that is
    /// wanted: it is given back.
    async fn clear_unfinished(
        &self,
        left: FoundLun,
        wanted: Option<&NewMapping>,
    ) -> Outcome<Option<FoundLun>> {
        if let Some(Claim::Mapping { datastore, path, .. }) = left.lun.claimed_by() {
            let on = self.open_datastore_now(&datastore)?;
            let is_wanted = wanted.is_some_and(|m| m.datastore.name == datastore && m.name.path == path);
            let mapped = on.volume.entry(&path).await.is_ok();
            if is_wanted && mapped {
                return Ok(Some(left));
            }
            if mapped {
                self.delete_disk(&on, &path).await?;
            } else {
                self.release(&left).await?;
            }
        }
        let name = left.lun.name();
        let failed = |e| pool_problem(format!("LUN \"{name}\" was not removed"), &e);
        left.pool.pool.remove_lun(&name, true).await.map_err(failed)?;
        Ok(None)
    }

    /// The mapping that is wanted of a new LUN: in the mode of the one that was backed up, virtual for a disk that was
    /// none.
    fn new_mapping(&self, new: &NewRestore, record: &DiskRecord) -> Outcome<Option<NewMapping>> {
        let Some(text) = &new.map else { return Ok(None) };
        let (datastore, name) = self.file(text)?;
        check_descriptor_name(&name)?;
        let mode = if is_rdm(record) { parse_mode(told(record, "rdm_mode"))? } else { Mode::Virtual };
        Ok(Some(NewMapping { datastore, name, mode }))
    }

    async fn not_there(&self, mapping: &NewMapping) -> Outcome {
        match mapping.datastore.volume.entry(&mapping.name.path).await {
            Ok(_) => Err(Problem::exists("disk", &mapping.name.to_string())),
            Err(_) => Ok(()),
        }
    }

    #[allow(clippy::too_many_arguments)] // one disk of a restore, and what it is made of
    pub(super) async fn pour(
        &self,
        source: &Source,
        record: &DiskRecord,
        target: Rc<dyn Disk>,
        new: &NewRestore,
        only_differences: bool,
        progress: &Arc<Progress>,
        sums: &mut Sums,
    ) -> Outcome {
        let inner = backup::Progress::new();
        let watching = watch(&inner, progress);
        let (repository, manifest) = (&source.repository, &source.manifest);
        let target: Rc<dyn Disk> = match new.limit_bytes_per_second {
            Some(limit) => block::decorate::Decorated::new(target, block::decorate::Pace::new(limit)),
            None => target,
        };
        let done = repository.restore_into(manifest, &record.name, target, only_differences, &inner).await;
        watching.stop();
        let done = done.map_err(|e| match e {
            backup::Error::Cancelled => crate::jobs::cancelled(),
            other => repository_problem(format!("disk {} was not restored", record.name), &other),
        })?;
        sums.written += done.written_bytes;
        sums.zeroed += done.zeroed_bytes;
        sums.compared += done.compared_bytes;
        sums.disks.push(record.name.clone());
        Ok(())
    }
}

/// A mapping to be made of a restored LUN.
struct NewMapping {
    datastore: Rc<Datastore>,
    name: FileName,
    mode: Mode,
}

impl NewMapping {
    fn mode_name(&self) -> &'static str {
        match self.mode {
            Mode::Virtual => "virtual",
            Mode::Physical => "physical",
        }
    }
}

/// Name of a restored descriptor: the old one's, with the new VM's name in place of the old VM's.
fn new_disk_name(old: &str, old_vm: &str, new_vm: &str, slot: Slot) -> String {
    match old.strip_prefix(old_vm) {
        Some(rest) if rest.ends_with(".vmdk") => {
            // A redo log was folded into the image: the disk is a base again.
            let rest = rest.trim_end_matches(".vmdk");
            let base = match rest.rsplit_once('-') {
                Some((base, number)) if number.len() == 6 && number.bytes().all(|b| b.is_ascii_digit()) => {
                    base
                }
                _ => rest,
            };
            format!("{new_vm}{base}.vmdk")
        }
        _ => format!("{new_vm}-{}.vmdk", slot.to_string().replace(':', "-")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restored_disks_are_named_after_their_vm() {
        let slot: Slot = "scsi0:1".parse().unwrap();
        assert_eq!(new_disk_name("sql01.vmdk", "sql01", "copy", slot), "copy.vmdk");
        assert_eq!(new_disk_name("sql01_1.vmdk", "sql01", "copy", slot), "copy_1.vmdk");
        assert_eq!(new_disk_name("sql01-000002.vmdk", "sql01", "copy", slot), "copy.vmdk");
        assert_eq!(new_disk_name("other.vmdk", "sql01", "copy", slot), "copy-scsi0-1.vmdk");
    }
}
