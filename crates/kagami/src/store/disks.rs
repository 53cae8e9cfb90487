//! Disks on datastores: VMDK descriptors with their extents.

use std::rc::Rc;

use block::SECTOR_BYTES;
use vm::Datastore;
use vmdisk::descriptor::{CreateType, Descriptor};
use vmdisk::folder::{Folder, FolderError, Provision};
use vmdisk::rdm::{Mode, ResolveError};
use vmdisk::{ChainError, chain};
use vmfs::format::InodeKind;

use super::Store;
use super::doing::Doing;
use crate::api::Change;
use crate::cli::images::vmfs_problem;
use crate::model::{DiskView, NewDisk, Plan, Removal};
use crate::names::FileName;
use crate::problem::{Kind, Outcome, Problem};
use crate::units::show_size;

/// Directories below each other in which descriptors are looked for.
const DEPTH_MAX: usize = 8;

/// What went wrong with a disk.
pub fn chain_problem(what: impl Into<String>, error: &ChainError) -> Problem {
    let hint = chain_hint(error);
    let (code, kind) = match error {
        ChainError::Missing { .. } => ("KGM-DSK-0404", Kind::NotFound),
        ChainError::InUse(_) => ("KGM-DSK-0409", Kind::Conflict),
        ChainError::Refused(_) | ChainError::Unsupported { .. } => ("KGM-DSK-0001", Kind::Refused),
        ChainError::CidMismatch { .. }
        | ChainError::ContentMismatch { .. }
        | ChainError::Capacity { .. }
        | ChainError::Mixed { .. } => ("KGM-DSK-0002", Kind::Corrupt),
        ChainError::Descriptor { .. } | ChainError::NoHint { .. } | ChainError::TooDeep { .. } => {
            ("KGM-DSK-0005", Kind::Corrupt)
        }
        ChainError::Identity { .. } => ("KGM-RDM-0002", Kind::Corrupt),
        ChainError::Lun { source, .. } => lun_code(source),
        ChainError::Folder(error) if is_full(error) => ("KGM-DST-0008", Kind::Failed),
        ChainError::Folder(FolderError::Exists { .. }) => ("KGM-DSK-0410", Kind::Conflict),
        ChainError::Folder(FolderError::NotFound { .. }) => ("KGM-DSK-0404", Kind::NotFound),
        _ => ("KGM-DSK-0003", Kind::Failed),
    };
    Problem::new(code, kind, what).why(error).hint(hint)
}

/// The datastore, or the pool below it, has no room.
fn is_full(error: &FolderError) -> bool {
    match error {
        FolderError::Disk { source, .. } => matches!(source, block::DiskError::NoSpace),
        FolderError::Datastore { source, .. } => {
            matches!(source.downcast_ref::<vmfs::Error>(), Some(vmfs::Error::NoSpace { .. }))
        }
        _ => false,
    }
}

/// The resolver's answers, each with a code of its own (semantics page 2.2).
fn lun_code(error: &ResolveError) -> (&'static str, Kind) {
    match error {
        ResolveError::Missing { .. } => ("KGM-RDM-0010", Kind::NotFound),
        ResolveError::Smaller { .. } => ("KGM-RDM-0011", Kind::Refused),
        ResolveError::BlockSize { .. } => ("KGM-RDM-0012", Kind::Refused),
        ResolveError::Ambiguous { .. } => ("KGM-RDM-0013", Kind::Refused),
        ResolveError::Generation { .. } => ("KGM-RDM-0014", Kind::Refused),
        ResolveError::Disk(_) => ("KGM-RDM-0015", Kind::Failed),
    }
}

/// What to type next.
fn chain_hint(error: &ChainError) -> &'static str {
    match error {
        ChainError::Missing { .. } | ChainError::Folder(FolderError::NotFound { .. }) => "kagami disk ls",
        ChainError::InUse(_) => "kagami vm ls, kagami export ls, kagami job ls: who has it",
        ChainError::CidMismatch { .. } | ChainError::ContentMismatch { .. } | ChainError::Capacity { .. } => {
            "kagami disk repair DISK -n shows the evidence; else kagami restore BACKUP --in-place"
        }
        ChainError::Descriptor { .. } | ChainError::NoHint { .. } | ChainError::TooDeep { .. } => {
            "kagami rdm scan --rebuild for a mapping, else kagami restore BACKUP --in-place"
        }
        ChainError::Mixed { .. } => "kagami vm show VM: the commit goes on when the VM is opened",
        ChainError::Identity { .. } => "kagami rdm scan --rebuild",
        ChainError::Lun { source, .. } => match source {
            ResolveError::Missing { .. } => {
                "kagami pool ls: bring its pool back, or kagami rdm remap DISK --to LUN"
            }
            ResolveError::Smaller { .. } => {
                "kagami restore BACKUP --to-lun NAME, then kagami rdm remap DISK --to NAME"
            }
            ResolveError::Disk(_) => "kagami pool ls",
            _ => "kagami rdm show DISK, then kagami rdm remap DISK --to LUN",
        },
        ChainError::Folder(error) if is_full(error) => FULL_DATASTORE,
        ChainError::Folder(FolderError::Exists { .. }) => "another name, or kagami disk show DISK",
        _ => "kagami disk show DISK, kagami datastore check DATASTORE",
    }
}

/// What to do when a datastore is full.
const FULL_DATASTORE: &str =
    "make room: kagami disk ls, kagami disk rm, kagami vm rm --files; or another --datastore";

/// The folder of a datastore as descriptors know it.
pub fn folder(datastore: &Datastore) -> Rc<dyn Folder> {
    Rc::clone(&datastore.folder) as Rc<dyn Folder>
}

/// The kind of a disk in one word, as vSphere's API calls it where it has one.
pub fn kind_of(descriptor: &Descriptor) -> &'static str {
    let thin = descriptor.get("ddb.thinProvisioned") == Some("1");
    match descriptor.create_type() {
        CreateType::VmfsRawDeviceMap => "rdm",
        CreateType::VmfsPassthroughRawDeviceMap => "rdmp",
        CreateType::VmfsSparse | CreateType::SeSparse => "delta",
        CreateType::VmfsThin => "thin",
        _ if thin => "thin",
        _ => "thick",
    }
}

impl Store {
    /// All descriptors on a datastore.
    pub(super) async fn descriptors_on(&self, datastore: &Datastore) -> Outcome<Vec<String>> {
        let files = self.files_on(datastore).await?;
        let descriptor =
            |(path, kind): &(String, InodeKind)| *kind == InodeKind::File && is_descriptor_name(path);
        Ok(files.into_iter().filter(descriptor).map(|(path, _)| path).collect())
    }

    /// Small files and mappings on a datastore, in order of their paths.
    pub(super) async fn files_on(&self, datastore: &Datastore) -> Outcome<Vec<(String, InodeKind)>> {
        let failed =
            |e: vmfs::Error| vmfs_problem(format!("cannot list datastore \"{}\"", datastore.name), &e);
        let mut found = Vec::new();
        let mut left = vec![(String::new(), 0)];
        while let Some((directory, depth)) = left.pop() {
            let path = if directory.is_empty() { "/" } else { directory.as_str() };
            for entry in datastore.volume.list(path).await.map_err(failed)? {
                let path = format!("{directory}/{}", entry.name);
                match entry.kind {
                    InodeKind::Directory if depth < DEPTH_MAX => left.push((path, depth + 1)),
                    InodeKind::File if entry.length < 1 << 20 => found.push((path, entry.kind)),
                    InodeKind::Rdm => found.push((path, entry.kind)),
                    _ => {}
                }
            }
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(found)
    }

    async fn disk_view(&self, datastore: &Rc<Datastore>, path: &str) -> Outcome<DiskView> {
        let name = FileName { datastore: datastore.name.clone(), path: path.to_owned() };
        let survey = chain::survey(&*datastore.folder, path).await;
        let trouble = survey.troubles.first().map(|(_, e)| e.to_string());
        let Some(top) = survey.links.first() else {
            return Err(match survey.troubles.into_iter().next() {
                Some((_, error)) => chain_problem(format!("cannot read {name}"), &error),
                None => Problem::not_found("disk", &name.to_string()),
            });
        };
        let used_by = self.holder_of(datastore, path);
        let base = survey.links.last().unwrap_or(top);
        let lun = match Mode::of(base.descriptor.create_type()) {
            Some(_) => self.rdm_view(datastore, &base.path).await.ok().and_then(|r| r.lun),
            None => None,
        };
        Ok(DiskView {
            name: name.to_string(),
            size_bytes: top.descriptor.sectors() * SECTOR_BYTES,
            kind: kind_of(&top.descriptor).to_owned(),
            create_type: top.descriptor.create_type().to_string(),
            cid: top.descriptor.cid().to_string(),
            lun,
            chain: survey.links.iter().map(|l| l.path.clone()).collect(),
            used_by,
            trouble,
        })
    }

    /// VM and slot that have this descriptor, or a descriptor above it, open.
    pub(super) fn vm_user_of(&self, datastore: &Rc<Datastore>, path: &str) -> Option<String> {
        self.open_vms_now().into_iter().find_map(|vm| {
            vm.disks().into_iter().find_map(|disk| {
                let here = disk.datastore.name == datastore.name
                    && (disk.path == path || disk.disk.links().iter().any(|l| l.path == path));
                here.then(|| format!("{}/{}", vm.name, disk.slot))
            })
        })
    }

    /// Disks on one datastore, or on all.
    pub async fn disks(&self, datastore: Option<String>) -> Outcome<Vec<DiskView>> {
        let datastores = match datastore {
            Some(name) => vec![self.open_datastore_now(&name)?],
            None => self.open_datastores_now(),
        };
        let mut views = Vec::new();
        for datastore in datastores {
            for path in self.descriptors_on(&datastore).await? {
                match self.disk_view(&datastore, &path).await {
                    Ok(view) => views.push(view),
                    Err(problem) => tracing::debug!(path, %problem, "looks like a descriptor, is none"),
                }
            }
        }
        Ok(views)
    }

    /// One disk.
    pub async fn show_disk(&self, text: &str) -> Outcome<DiskView> {
        let (datastore, name) = self.file(text)?;
        self.disk_view(&datastore, &name.path).await
    }

    /// Makes a disk.
    pub async fn create_disk(&self, new: NewDisk, dry: bool) -> Outcome<Change<DiskView>> {
        let _turn = self.turn.take().await;
        let (datastore, name) = self.file(&new.disk)?;
        check_descriptor_name(&name)?;
        if new.size_bytes == 0 || !new.size_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(Problem::usage(format!("{} bytes is no size for a disk", new.size_bytes))
                .why("whole sectors of 512 bytes"));
        }
        let provision = match new.provisioning.as_str() {
            "thin" => Provision::Thin,
            "thick" => Provision::LazyZeroed,
            "eager" => Provision::EagerZeroed,
            other => {
                return Err(
                    Problem::usage(format!("\"{other}\" is no provisioning")).hint("thin, thick, eager")
                );
            }
        };
        if dry {
            return Ok(Change::would(format!(
                "make {name} with {}, {}",
                show_size(new.size_bytes),
                new.provisioning
            )));
        }
        let doing = Doing::MakeDisk { datastore: datastore.name.clone(), path: name.path.clone() };
        let make = async || self.make_disk(&datastore, &name.path, new.size_bytes, provision).await;
        self.noted(doing, make).await?;
        self.disk_view(&datastore, &name.path).await.map(Change::Done)
    }

    /// Makes a flat disk and the directory that it lies in.
    pub(super) async fn make_disk(
        &self,
        datastore: &Rc<Datastore>,
        path: &str,
        size_bytes: u64,
        provision: Provision,
    ) -> Outcome {
        self.make_parents(datastore, path).await?;
        vmdisk::create::create_flat(&folder(datastore), path, size_bytes / SECTOR_BYTES, provision)
            .await
            .map_err(|e| chain_problem(format!("disk [{}] {path} was not made", datastore.name), &e))
    }

    /// Makes the directories above a file.
    pub(super) async fn make_parents(&self, datastore: &Datastore, path: &str) -> Outcome {
        let directory = vmdisk::folder::directory(path);
        crate::cli::images::make_directories(&datastore.volume, directory)
            .await
            .map_err(|e| vmfs_problem(format!("cannot make [{}] {directory}", datastore.name), &e))
    }

    /// Removes a disk with its extents.
    pub async fn remove_disk(&self, text: &str, how: Removal) -> Outcome<Change<DiskView>> {
        let _turn = self.turn.take().await;
        let (datastore, name) = self.file(text)?;
        let view = self.disk_view(&datastore, &name.path).await?;
        if let Some(user) = &view.used_by {
            return Err(Problem::new("KGM-DSK-0004", Kind::Conflict, format!("disk {name} is not removed"))
                .why(format!("{user} uses it"))
                .hint("kagami vm show VM, kagami export ls"));
        }
        if how.dry_run {
            let loses = match &view.lun {
                Some(lun) => vec![format!("the mapping of LUN {lun}; its data stays")],
                None => vec![format!("disk {name}, {}", show_size(view.size_bytes))],
            };
            return Ok(Change::Would(Plan {
                would: vec![format!("remove disk {name}")],
                loses,
                frees_bytes: 0,
            }));
        }
        let doing = Doing::RemoveDisk { datastore: datastore.name.clone(), path: name.path.clone() };
        self.noted(doing, async || self.delete_disk(&datastore, &name.path).await).await?;
        Ok(Change::Done(view))
    }

    /// Takes a disk's files away; a mapped LUN gives up its claim and stays.
    pub(super) async fn delete_disk(&self, datastore: &Rc<Datastore>, path: &str) -> Outcome {
        let mapped = self.claimed_by(datastore, path);
        vmdisk::create::delete(&folder(datastore), path)
            .await
            .map_err(|e| chain_problem(format!("disk [{}] {path} was not removed", datastore.name), &e))?;
        if let Some(found) = mapped {
            self.release(&found).await?;
        }
        Ok(())
    }
}

/// A descriptor by its name: not an extent.
pub(super) fn is_descriptor_name(name: &str) -> bool {
    let extents = ["-flat.vmdk", "-delta.vmdk", "-rdm.vmdk", "-rdmp.vmdk", "-sesparse.vmdk", "-ctk.vmdk"];
    name.ends_with(".vmdk") && !extents.iter().any(|e| name.ends_with(e))
}

/// Refuses a name that is no descriptor's.
pub fn check_descriptor_name(name: &FileName) -> Outcome {
    if is_descriptor_name(name.file()) {
        return Ok(());
    }
    Err(Problem::usage(format!("{name} is no name for a disk"))
        .why("a descriptor ends in .vmdk, and not in -flat.vmdk, -delta.vmdk, -rdm.vmdk, -rdmp.vmdk"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_are_no_descriptors() {
        assert!(is_descriptor_name("sql01.vmdk") && is_descriptor_name("sql01-000001.vmdk"));
        for name in ["sql01-flat.vmdk", "sql01-rdmp.vmdk", "sql01-000001-delta.vmdk", "sql01.vmx"] {
            assert!(!is_descriptor_name(name), "{name}");
        }
    }
}
