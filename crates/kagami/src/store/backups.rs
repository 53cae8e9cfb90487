//! Backing a VM up: one cut of everything that it lies on, a copy of the frozen disks, generations held for the next
//! incremental.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use backup::{Audit, BackupId, Label, Manifest, Plan as CopyPlan, Repository, SourceDisk, Trust};
use block::{Disk, Generation};
use serde_json::{Map, Value, json};
use uuid::Uuid;
use vm::block_list::{BlockList, SeenThrough};
use vm::vmsnap::Vmsnap;
use vm::{Datastore, OpenDisk, Vm};
use vmdisk::folder::{directory, file_name};
use vmdisk::{Open, VmDisk, VmfsFolder};
use vmfs::format::InodeKind;

use super::Store;
use super::cut::{Cut, frozen_volume};
use super::luns::FoundLun;
use super::pools::pool_problem;
use super::standing::{Begun, CutRecord};
use crate::cli::backups::repository_problem;
use crate::cli::images::vmfs_problem;
use crate::jobs::Progress;
use crate::model::{NewBackup, Plan};
use crate::problem::{Kind, Outcome, Problem};
use crate::units::show_size;

/// Small files of a VM that go into the backup, by their ends.
const CONFIGURATION: [&str; 4] = [".vmx", ".vmsd", ".nvram", ".vmxf"];
/// Longest of them, in bytes.
const CONFIGURATION_MAX: u64 = 4 << 20;
/// A backup keeps the block list of a disk in a file of this name behind the slot.
const BLOCKS: &str = ".blocks";
/// Snapshots that a backup makes begin like this.
pub const SNAP: &str = "backup-";

/// One disk of a VM at a cut.
pub struct FrozenDisk {
    /// As it is now.
    pub open: OpenDisk,
    /// As it was then.
    pub disk: Rc<dyn Disk>,
    /// The cut of the LUN that it lies on.
    pub generation: Generation,
    /// That LUN.
    pub below: FoundLun,
    /// Where its file's blocks lie at the cut; absent for a mapping, and for what is more than one plain file.
    pub blocks: Option<BlockList>,
}

/// The snapshots of a cut: whoever thaws the last VM that was frozen by it removes them.
pub struct Images {
    /// Name of the snapshots.
    pub snap: String,
    /// LUNs that were cut.
    pub luns: RefCell<Vec<FoundLun>>,
}

impl Images {
    /// The snapshots of this name.
    pub fn new(snap: String, luns: Vec<FoundLun>) -> Rc<Self> {
        Rc::new(Self { snap, luns: RefCell::new(luns) })
    }
}

/// A VM at a cut. The snapshots stay until [`Store::thaw`].
pub struct Frozen {
    /// The VM's name.
    pub vm: String,
    /// The cut.
    pub cut: Cut,
    /// Its snapshots; VMs that were cut together share them.
    pub images: Rc<Images>,
    /// The disks.
    pub disks: Vec<FrozenDisk>,
    /// The VM's small files, as they were.
    pub files: Vec<(String, Vec<u8>)>,
}

impl Frozen {
    /// Nothing of it is opened yet.
    pub fn new(vm: &str, cut: Cut, images: Rc<Images>) -> Self {
        Self { vm: vm.to_owned(), cut, images, disks: Vec::new(), files: Vec::new() }
    }
}

/// Opens or makes a repository, off the lane.
async fn repository(path: &Path) -> Outcome<Repository> {
    let dir = path.to_owned();
    let shown = path.display().to_string();
    lane::offload(move || Repository::open_or_create(&dir, backup::Options::default()))
        .await
        .map_err(|e| repository_problem(format!("cannot use the repository {shown}"), &e))
}

/// Whether a disk is in a backup, and why (R22).
fn standing(disk: &OpenDisk, via: &str) -> (bool, &'static str) {
    match (disk.mode.left_out(), disk.disk.rdm(), via) {
        (Some(why), _, _) => (false, why),
        (None, Some(_), _) => (true, "a mapped LUN, cut by the array"),
        (None, None, "redo") => {
            (true, "a disk on a datastore, put on a redo log that is committed afterwards")
        }
        (None, None, _) => (true, "a disk on a datastore, cut below it by the array"),
    }
}

impl Store {
    /// LUNs under the disks of a VM, each once.
    pub(super) fn luns_of(&self, vm: &Vm) -> Outcome<Vec<FoundLun>> {
        let mut luns: Vec<FoundLun> = Vec::new();
        for disk in vm.disks() {
            let found = self.lun_below(&disk)?;
            if !luns.iter().any(|l| l.lun.uuid() == found.lun.uuid()) {
                luns.push(found);
            }
        }
        // The configuration lies on the VM's own datastore, whatever its disks lie on.
        let home = self.lun(&vm.datastore.lun.uuid().to_string())?;
        if !luns.iter().any(|l| l.lun.uuid() == home.lun.uuid()) {
            luns.push(home);
        }
        Ok(luns)
    }

    pub(super) fn lun_below(&self, disk: &OpenDisk) -> Outcome<FoundLun> {
        let mapped = disk.disk.rdm().and_then(|(_, identity)| identity.lun.uuid);
        self.lun(&mapped.unwrap_or_else(|| disk.datastore.lun.uuid()).to_string())
    }

    /// What a backup would do; refuses what cannot be backed up (R22: says why for each disk).
    pub async fn plan_backup(&self, new: &NewBackup) -> Outcome<Plan> {
        if !matches!(new.via.as_str(), "redo" | "snapshot") {
            return Err(
                Problem::usage(format!("\"{}\" is no way to back up", new.via)).hint("redo or snapshot")
            );
        }
        if !new.repo.is_absolute() {
            return Err(Problem::usage(format!("{} is not an absolute path", new.repo.display())));
        }
        let names = new.vms();
        for (number, name) in names.iter().enumerate() {
            if names[..number].contains(name) {
                return Err(Problem::usage(format!("VM \"{name}\" is named twice")).hint("each VM once"));
            }
        }
        if names.len() > 1 && new.keep_frozen {
            return Err(Problem::usage("frozen images are kept of one VM").hint("without keep_frozen"));
        }
        let mut would = Vec::new();
        for name in &names {
            self.plan_vm(name, new, names.len() > 1, &mut would)?;
        }
        Ok(Plan { would, ..Plan::default() })
    }

    fn plan_vm(&self, name: &str, new: &NewBackup, several: bool, would: &mut Vec<String>) -> Outcome {
        let vm = self.open_vm(name)?;
        self.not_occupied(name)?;
        self.not_mixed(name)?;
        self.cut_is_known(name)?;
        if let Some(trouble) = vm.troubles().first() {
            let title = format!("VM \"{name}\" is not backed up");
            return Err(Problem::new("KGM-BKP-0008", Kind::Refused, title)
                .why(format!("its disk {} cannot be opened: {}", trouble.slot, trouble.why))
                .hint(format!("kagami vm show {name}")));
        }
        let disks = vm.disks();
        if disks.is_empty() {
            return Err(Problem::new("KGM-BKP-0009", Kind::Refused, format!("VM \"{name}\" has no disks")));
        }
        would.extend(disks.iter().map(|disk| {
            let slot = if several { format!("{name}/{}", disk.slot) } else { disk.slot.to_string() };
            let size = show_size(disk.disk.shape().bytes());
            match standing(disk, &new.via) {
                (true, how) => format!("copy {slot} ({size}): {how}"),
                (false, why) => format!("leave out {slot} ({size}): {why}"),
            }
        }));
        Ok(())
    }

    /// Backs VMs up, all as they are at one instant; the job's result.
    pub async fn backup(&self, new: NewBackup, progress: Arc<Progress>) -> Outcome<Value> {
        let begun = lane::now();
        self.plan_backup(&new).await?;
        let (mut vms, mut busy) = (Vec::new(), Vec::new());
        for name in &new.vms() {
            busy.push(self.occupy(name, "backup")?);
            vms.push(self.open_vm(name)?);
        }
        let repository = repository(&new.repo).await?;
        for vm in &vms {
            self.drop_frozen(&vm.name).await;
        }
        // From the cut to the end of the last commit it is the backup that takes room, not the guest.
        let _room: Vec<_> = vms.iter().map(|vm| self.watch_room(vm)).collect();
        let cuts = self.begin_or_go_on(&vms, &new, &repository, &progress).await?;
        let cut = cuts.first().map(|begun| begun.frozen.cut.clone());
        let rows = self.copy_all(&new, cuts, &repository, &progress).await?;
        let mut done = match <[Value; 1]>::try_from(rows) {
            Ok([row]) => row,
            Err(rows) => json!({"backups": rows}),
        };
        if let (Some(done), Some(cut)) = (done.as_object_mut(), cut) {
            done.insert("cut".into(), json!(cut.group.to_string()));
            done.insert("hold_us".into(), json!(u64::try_from(cut.hold.as_micros()).unwrap_or(u64::MAX)));
            done.insert("cut_at_us".into(), json!(cut.at.as_microsecond()));
            done.insert("seconds".into(), json!((lane::now() - begun).as_secs_f64()));
        }
        Ok(done)
    }

    /// The cut of an interrupted attempt where it still stands, else a new one. The cut of several VMs is not gone on
    /// with: after a restart they get a new one, as one of them may have ended.
    async fn begin_or_go_on(
        &self,
        vms: &[Rc<Vm>],
        new: &NewBackup,
        repository: &Repository,
        progress: &Arc<Progress>,
    ) -> Outcome<Vec<Begun>> {
        for vm in vms {
            if let Some(begun) = self.go_on(vm, new, repository, progress).await? {
                return Ok(vec![begun]);
            }
        }
        let mut bases = Vec::new();
        for vm in vms {
            if new.via == "redo" {
                // Waits for the commit of what a crash left, or does it.
                progress.phase("consolidate");
                self.consolidate(vm, Some(progress)).await?;
                progress.check()?;
            }
            bases.push(if new.full { None } else { self.base_for(&vm.name, repository).await? });
        }
        progress.phase("cut");
        let cut = {
            let _turn = self.turn.take().await;
            let cut = match new.via.as_str() {
                "redo" => self.freeze_by_redo(vms, new).await,
                _ => self.freeze(vms).await.map(|all| all.into_iter().map(|frozen| (frozen, None)).collect()),
            };
            match cut {
                Ok(cut) => {
                    let begun =
                        |((frozen, vmsnap), base)| Begun { frozen, vmsnap, backup: BackupId::new(), base };
                    let cuts: Vec<Begun> = cut.into_iter().zip(bases).map(begun).collect();
                    if let [begun] = &cuts[..] {
                        self.remember_cut(CutRecord::new(new, begun)).await;
                    }
                    Ok(cuts)
                }
                Err(problem) => Err(problem),
            }
        };
        match cut {
            Ok(cuts) => Ok(cuts),
            // Without the turn: whoever makes room needs it.
            Err(problem) => Err(self.after_failed_cut(vms, new, problem).await),
        }
    }

    /// A cut that failed at or after its decision leaves VMs on redo logs; both failures are told when their commit fails
    /// too, as it does when the medium of their datastore is what failed.
    async fn after_failed_cut(&self, vms: &[Rc<Vm>], new: &NewBackup, mut problem: Problem) -> Problem {
        for vm in vms.iter().filter(|_| new.via == "redo") {
            if let Err(stays) = self.consolidate(vm, None).await {
                tracing::error!(vm = vm.name, %stays, "needs consolidation");
                problem.detail = format!("{}; and {stays}", problem.detail);
                problem.what_to_do =
                    "kagami pool ls, and kagami pool reopen POOL when its medium is mended".into();
            }
        }
        problem
    }

    /// Copies what is frozen, one VM after the other, and ends each one's freeze after its copy. A VM whose backup fails
    /// does not stop the others.
    async fn copy_all(
        &self,
        new: &NewBackup,
        cuts: Vec<Begun>,
        repository: &Repository,
        progress: &Arc<Progress>,
    ) -> Outcome<Vec<Value>> {
        let several = cuts.len();
        let (mut rows, mut failed): (Vec<Value>, Vec<Problem>) = (Vec::new(), Vec::new());
        for begun in cuts {
            let vm = begun.frozen.vm.clone();
            match self.copy_one(new, begun, repository, progress).await {
                Ok(row) => rows.push(row),
                Err(problem) => {
                    tracing::error!(vm, %problem, "a backup failed");
                    failed.push(problem);
                }
            }
        }
        match (failed.len(), failed.into_iter().next()) {
            (_, None) => Ok(rows),
            (_, Some(problem)) if several == 1 || progress.is_cancelled() => Err(problem),
            (count, Some(problem)) => {
                let title = format!("{count} of {several} VMs were not backed up");
                Err(Problem::new("KGM-BKP-0007", Kind::Partial, title).why(&problem).hint(problem.what_to_do))
            }
        }
    }

    /// Copies one VM as it was at the cut, gives up what was frozen of it, and commits its redo logs.
    async fn copy_one(
        &self,
        new: &NewBackup,
        begun: Begun,
        repository: &Repository,
        progress: &Arc<Progress>,
    ) -> Outcome<Value> {
        let vm = begun.frozen.vm.clone();
        let mut copied = self.copy(new, &begun, repository, progress).await;
        let copied_at = jiff::Timestamp::now();
        if copied.is_err() && progress.is_suspended() && new.also.is_empty() {
            // The daemon ends, the backup does not: the cut stands, and the record says whose it is.
            return copied.map(|_| Value::Null);
        }
        let Begun { mut frozen, vmsnap, .. } = begun;
        if copied.is_ok() {
            progress.phase("hold generations");
            let held = self.hold_generations(&vm, repository, &frozen).await;
            copied = held.and(copied);
        }
        self.forget_cut(&vm).await;
        let disks = frozen.disks.len();
        let (keep, by_redo) = (new.keep_frozen && copied.is_ok(), vmsnap.is_some());
        let mut kept = None;
        if keep {
            if by_redo {
                frozen.disks.clear(); // the bases are the VM's again: the snapshots below keep what they held
            }
            kept = Some(frozen);
        } else {
            self.thaw(frozen).await;
        }
        // The redo logs are never left for a person to find, whatever became of the copy.
        if let Some(vmsnap) = vmsnap {
            progress.phase("commit");
            if copied.is_ok()
                && let Err(error) = vmsnap.sealed().await
            {
                tracing::warn!(vm, %error, "the job record does not say sealed");
            }
            let committed = self.commit(vmsnap, Some(progress)).await;
            if committed.is_err()
                && let Some(frozen) = kept.take()
            {
                self.thaw(frozen).await;
            }
            committed?;
        }
        if let Some(frozen) = kept {
            self.keep_frozen(&vm, frozen, by_redo).await?;
        }
        let manifest = copied?;
        let mut done = crate::cli::backups::manifest_row(&manifest);
        if let Some(done) = done.as_object_mut() {
            done.insert("copied_at_us".into(), json!(copied_at.as_microsecond()));
        }
        tracing::info!(vm, backup = %manifest.id, disks, "backup sealed");
        Ok(done)
    }

    /// Cuts everything that VMs lie on, and opens their disks as they were.
    async fn freeze(&self, vms: &[Rc<Vm>]) -> Outcome<Vec<Frozen>> {
        let mut luns: Vec<FoundLun> = Vec::new();
        for vm in vms {
            for found in self.luns_of(vm)? {
                if !luns.iter().any(|l| l.lun.uuid() == found.lun.uuid()) {
                    luns.push(found);
                }
            }
        }
        let snap = format!("{SNAP}{}", Uuid::now_v7().simple());
        let cut = self.cut(&luns, &snap).await?;
        let images = Images::new(snap, luns);
        let mut all = Vec::new();
        for vm in vms {
            let mut frozen = Frozen::new(&vm.name, cut.clone(), Rc::clone(&images));
            let opened = self.open_frozen(vm, &mut frozen).await;
            all.push(frozen);
            if let Err(problem) = opened {
                drop(images);
                for frozen in all {
                    self.thaw(frozen).await;
                }
                return Err(problem);
            }
        }
        Ok(all)
    }

    pub(super) async fn open_frozen(&self, vm: &Rc<Vm>, frozen: &mut Frozen) -> Outcome {
        let home = self.folder_at(&vm.datastore, &frozen.images.snap).await?;
        frozen.files = self.small_files(vm, home.volume()).await?;
        let mut folders = vec![(vm.datastore.name.clone(), home)];
        for open in vm.disks() {
            if open.mode.left_out().is_some() {
                continue;
            }
            let below = self.lun_below(&open)?;
            let snapshot = below.open_snapshot(&frozen.images.snap)?;
            let generation = snapshot.generation();
            let mut blocks = None;
            let disk: Rc<dyn Disk> = if open.disk.rdm().is_some() {
                snapshot
            } else {
                let known =
                    folders.iter().find(|(name, _)| *name == open.datastore.name).map(|(_, f)| Rc::clone(f));
                let folder = match known {
                    Some(folder) => folder,
                    None => {
                        let folder = self.folder_at(&open.datastore, &frozen.images.snap).await?;
                        folders.push((open.datastore.name.clone(), Rc::clone(&folder)));
                        folder
                    }
                };
                if open.disk.links().len() == 1 {
                    blocks = self.blocks_of(folder.volume(), &open).await;
                }
                VmDisk::open(folder, &open.path, Open::READ, &()).await.map_err(|e| {
                    super::disks::chain_problem(format!("frozen disk {} cannot be opened", open.slot), &e)
                })?
            };
            frozen.disks.push(FrozenDisk { open, disk, generation, below, blocks });
        }
        Ok(())
    }

    /// Where the blocks of a disk that is one plain file lie; `None` when it is not, or cannot be said.
    pub(super) async fn blocks_of(&self, volume: &vmfs::Volume, disk: &OpenDisk) -> Option<BlockList> {
        let links = disk.disk.links();
        let base = links.first().filter(|_| disk.disk.rdm().is_none())?;
        let listed = async {
            let file = volume.open_file(&base.extent).await?;
            BlockList::of(&file).await
        };
        listed.await.unwrap_or_else(|error| {
            tracing::warn!(disk = disk.path, %error, "no block list: the next backup reads everything");
            None
        })
    }

    /// The disks with their changes since `base`, and the lists that the next backup will want.
    async fn sources(
        &self,
        frozen: &Frozen,
        repository: &Repository,
        base: Option<&Manifest>,
        trust: Trust,
    ) -> Outcome<(Vec<SourceDisk>, Vec<(String, Vec<u8>)>)> {
        let (mut disks, mut lists) = (Vec::new(), Vec::new());
        for f in &frozen.disks {
            let name = f.open.slot.to_string();
            let mut disk = Rc::clone(&f.disk);
            if let Some(now) = &f.blocks {
                let file = format!("{name}{BLOCKS}");
                let before = match base {
                    Some(base) if base.file(&file).is_ok() => {
                        let (repository, base, file) = (repository.clone(), base.clone(), file.clone());
                        let read = lane::offload(move || repository.file(&base, &file)).await;
                        read.ok().and_then(|bytes| BlockList::decode(&bytes).ok())
                    }
                    _ => None,
                };
                lists.push((file, now.encode()));
                let device: Rc<dyn Disk> = f.below.open_snapshot(&frozen.images.snap)?;
                disk = Rc::new(SeenThrough::new(disk, device, now.clone(), before));
            }
            let cut = Some(f.generation).filter(|_| f.blocks.is_some() || f.open.disk.rdm().is_some());
            disks.push(SourceDisk { name, disk, cut, trust, metadata: disk_metadata(f) });
        }
        Ok((disks, lists))
    }

    /// The files of a datastore as they were at the cut that made these snapshots.
    pub(super) async fn folder_at(&self, datastore: &Datastore, snap: &str) -> Outcome<Rc<VmfsFolder>> {
        let snapshot = datastore
            .lun
            .open_snapshot(snap)
            .map_err(|e| pool_problem(format!("the frozen datastore \"{}\"", datastore.name), &e))?;
        Ok(VmfsFolder::new(frozen_volume(&datastore.name, snapshot).await?))
    }

    /// Configuration and descriptors of a VM: names relative to its directory.
    pub(super) async fn small_files(
        &self,
        vm: &Vm,
        volume: &vmfs::Volume,
    ) -> Outcome<Vec<(String, Vec<u8>)>> {
        let failed =
            |e: vmfs::Error| vmfs_problem(format!("the files of VM \"{}\" cannot be read", vm.name), &e);
        let mut files = Vec::new();
        for entry in volume.list(vm.directory()).await.map_err(failed)? {
            let wanted = CONFIGURATION.iter().any(|end| entry.name.ends_with(end))
                || vm
                    .disks()
                    .iter()
                    .any(|d| file_name(&d.path) == entry.name && directory(&d.path) == vm.directory());
            if entry.kind == InodeKind::File && wanted && entry.length <= CONFIGURATION_MAX {
                let path = format!("{}/{}", vm.directory(), entry.name);
                let content = volume.read_file(&path, CONFIGURATION_MAX).await.map_err(failed)?;
                files.push((entry.name, content));
            }
        }
        Ok(files)
    }

    async fn copy(
        &self,
        new: &NewBackup,
        begun: &Begun,
        repository: &Repository,
        progress: &Arc<Progress>,
    ) -> Outcome<Manifest> {
        progress.check()?;
        let (frozen, vmsnap, base) = (&begun.frozen, begun.vmsnap.as_ref(), begun.base.as_ref());
        let trust = if new.full { Trust::Never } else { Trust::Unless };
        let (mut disks, lists) = self.sources(frozen, repository, base, trust).await?;
        if let Some(limit) = new.limit_bytes_per_second {
            for source in &mut disks {
                let whole = Rc::clone(&source.disk);
                source.disk = block::decorate::Decorated::new(whole, block::decorate::Pace::new(limit));
            }
        }
        let vm = self.open_vm(&frozen.vm)?;
        let metadata = json!({
            "vm": frozen.vm,
            "datastore": vm.datastore.name,
            "vmx": file_name(&vm.vmx_path),
            "via": new.via,
            "cut": frozen.cut.group.to_string(),
            "cut_vms": new.vms(),
            "cut_at": frozen.cut.at.to_string(),
            "hold_us": u64::try_from(frozen.cut.hold.as_micros()).unwrap_or(u64::MAX),
            "disks": vm.disks().iter().map(|disk| {
                let (is_in, why) = standing(disk, &new.via);
                json!({"slot": disk.slot.to_string(), "in": is_in, "why": why})
            }).collect::<Vec<_>>(),
        });
        let plan = CopyPlan {
            id: begun.backup,
            name: frozen.vm.clone(),
            label: Label::Crash,
            base: base.map(|b| b.id),
            disks,
            files: frozen.files.iter().cloned().chain(lists).collect(),
            metadata: object(metadata),
            audit: Audit::default(),
        };
        progress.phase("copy");
        let inner = backup::Progress::new();
        let watch = watch(&inner, progress);
        let (sealed, is_short) = while_there_is_room(vmsnap, &inner, repository.backup(plan, &inner)).await;
        watch.stop();
        sealed.map_err(|e| match e {
            backup::Error::Cancelled if is_short => {
                let title = format!("the backup of VM \"{}\" was given up", frozen.vm);
                Problem::new("KGM-BKP-0019", Kind::Failed, title)
                    .why("a datastore or a pool fell under half of the reserve for redo logs; they are committed first")
                    .hint("make room, or take --via snapshot")
            }
            backup::Error::Cancelled => crate::jobs::cancelled(),
            other => repository_problem(format!("VM \"{}\" was not backed up", frozen.vm), &other),
        })
    }

    /// The latest backup of this VM in the repository.
    async fn base_for(&self, vm: &str, repository: &Repository) -> Outcome<Option<Manifest>> {
        let (repository, name) = (repository.clone(), format!("{vm}@latest"));
        lane::offload(move || match repository.resolve(&name).and_then(|id| repository.manifest(id)) {
            Ok(manifest) => Ok(Some(manifest)),
            Err(backup::Error::NoBackup { .. }) => Ok(None),
            Err(e) => Err(repository_problem("the repository cannot be read", &e)),
        })
        .await
    }

    /// Removes the snapshots of a cut.
    pub(super) async fn thaw(&self, frozen: Frozen) {
        let Frozen { images, disks, .. } = frozen;
        drop(disks);
        let Some(Images { snap, luns }) = Rc::into_inner(images) else { return };
        for found in luns.into_inner() {
            if found.has_snapshot(&snap)
                && let Err(error) = found.lun.remove_snapshot(&snap).await
            {
                tracing::warn!(lun = found.lun.name(), snap, %error, "a snapshot stays");
            }
        }
    }

    /// Serves the frozen disks as `VM@backup/SLOT` until the next backup; after redo logs they are opened anew.
    async fn keep_frozen(&self, vm: &str, mut frozen: Frozen, by_redo: bool) -> Outcome {
        if by_redo && let Err(problem) = self.open_frozen(&self.open_vm(vm)?, &mut frozen).await {
            self.thaw(frozen).await;
            return Err(problem);
        }
        for disk in &frozen.disks {
            let name = format!("{vm}@backup/{}", disk.open.slot);
            self.exports.add_own(&name, Rc::clone(&disk.disk), "as it was at the last backup")?;
        }
        self.frozen.borrow_mut().insert(vm.to_owned(), frozen);
        Ok(())
    }

    /// Gives up what [`Store::keep_frozen`] kept.
    pub(super) async fn drop_frozen(&self, vm: &str) {
        let frozen = self.frozen.borrow_mut().remove(vm);
        if let Some(frozen) = frozen {
            for disk in &frozen.disks {
                self.exports.remove_own(&format!("{vm}@backup/{}", disk.open.slot)).await;
            }
            self.thaw(frozen).await;
        }
    }

    /// Gives up everything that was kept, and snapshots that a crash left behind and no backup goes on with.
    pub(super) async fn drop_all_frozen(&self) {
        let names: Vec<String> = self.frozen.borrow().keys().cloned().collect();
        for name in names {
            self.drop_frozen(&name).await;
        }
        if self.in_doubt.get() {
            tracing::warn!("snapshots of earlier backups stay: a cut that they belong to is in doubt");
            return;
        }
        for found in self.all_luns() {
            for name in found.lun.snapshots().into_iter().map(|s| s.name) {
                let ours = name.strip_prefix(SNAP).is_some_and(|rest| Uuid::parse_str(rest).is_ok());
                if ours
                    && !self.is_standing(&name)
                    && let Err(error) = found.lun.remove_snapshot(&name).await
                {
                    tracing::warn!(snap = name, %error, "a leftover of a backup stays");
                }
            }
        }
    }
}

/// The room on the datastores is looked at every so often during a copy.
const LOOK: Duration = Duration::from_millis(500);
/// The end of the copy is noticed within this time.
const NOTICE: Duration = Duration::from_millis(10);

/// Runs a copy, and stops it when a datastore under the redo logs runs out of room; whether that was so.
async fn while_there_is_room<T>(
    vmsnap: Option<&Vmsnap>,
    inner: &backup::Progress,
    copy: impl Future<Output = T>,
) -> (T, bool) {
    let Some(vmsnap) = vmsnap else { return (copy.await, false) };
    let ended = Cell::new(false);
    let copy: Pin<Box<dyn Future<Output = Option<T>> + '_>> = Box::pin(async {
        let answer = copy.await;
        ended.set(true);
        Some(answer)
    });
    let is_short = Cell::new(false);
    let look: Pin<Box<dyn Future<Output = Option<T>> + '_>> = Box::pin(async {
        let mut next = lane::now();
        while !ended.get() {
            if lane::now() >= next {
                next = lane::now() + LOOK;
                match vmsnap.is_short().await {
                    Ok(false) => {}
                    Ok(true) => {
                        is_short.set(true);
                        inner.stop();
                        break;
                    }
                    Err(error) => tracing::warn!(%error, "the room for redo logs is not known"),
                }
            }
            lane::sleep(NOTICE).await;
        }
        None
    });
    let answers = lane::sync::together([copy, look]).await;
    let answer = answers.into_iter().flatten().next();
    (answer.unwrap_or_else(|| unreachable!("the copy answers")), is_short.get())
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// What a restore wants to know of a disk.
fn disk_metadata(frozen: &FrozenDisk) -> Map<String, Value> {
    let open = &frozen.open;
    let mut data = json!({
        "slot": open.slot.to_string(),
        "descriptor": open.path,
        "datastore": open.datastore.name,
        "mode": open.mode.name(),
        "kind": "flat",
    });
    if let Some((mode, identity)) = open.disk.rdm() {
        data["kind"] = json!(mode.create_type().to_string());
        data["rdm_mode"] = json!(if mode == vmdisk::rdm::Mode::Physical { "physical" } else { "virtual" });
        data["lun"] = json!(frozen.below.lun.name());
        data["pool"] = json!(frozen.below.pool_name);
        data["lun_uuid"] = json!(identity.lun.uuid.map(|u| u.to_string()));
        data["naa"] = json!(identity.lun.display());
    }
    object(data)
}

/// Carries how far the copy is to the job, and the job's wish to stop to the copy.
pub struct Watch {
    ended: Rc<Cell<bool>>,
}

/// Begins to carry.
pub fn watch(inner: &backup::Progress, job: &Arc<Progress>) -> Watch {
    let ended = Rc::new(Cell::new(false));
    let (inner, job, over) = (inner.clone(), Arc::clone(job), Rc::clone(&ended));
    drop(lane::spawn(async move {
        while !over.get() {
            job.set(inner.done_bytes(), inner.total_bytes());
            if job.is_cancelled() {
                inner.stop();
            }
            lane::sleep(Duration::from_millis(50)).await;
        }
    }));
    Watch { ended }
}

impl Watch {
    /// The work has ended.
    pub fn stop(self) {
        self.ended.set(true);
    }
}
