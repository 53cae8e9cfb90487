//! Redo logs that neither a job record nor a `.vmx` names: set aside by another name, shown, never deleted and never
//! attached by us (chapter 7, last row). To use one again: rename it and its extent back.

use std::collections::BTreeSet;

use vmdisk::chain::survey;
use vmdisk::descriptor::{Descriptor, NO_PARENT};
use vmdisk::folder::{Folder, directory, parent_path, sibling};

use super::file::has_catalogue;
use super::{Place, VmsnapError};
use crate::registry::{Datastore, Surroundings, locate};
use crate::vmx::Vmx;

/// What the names of files end with that were set aside; a number follows when the name is taken.
pub const SET_ASIDE: &str = ".set-aside";

/// Gives a file a name under which nobody opens it; the new one.
pub(super) async fn set_aside(datastore: &Datastore, path: &str) -> Result<String, VmsnapError> {
    let taken = datastore.folder.list(place_of(path)).await?;
    let name = vmdisk::folder::file_name(path);
    let mut new = format!("{name}{SET_ASIDE}");
    let mut number = 1;
    while taken.contains(&new) {
        number += 1;
        new = format!("{name}{SET_ASIDE}-{number}");
    }
    let new = format!("{}/{new}", directory(path));
    let failed = |source| VmsnapError::Volume { datastore: datastore.name.clone(), source };
    datastore.volume.rename(path, &new).await.map_err(failed)?;
    tracing::warn!(from = path, to = new, "set aside: nothing names it");
    Ok(new)
}

fn place_of(path: &str) -> &str {
    match directory(path) {
        "" => "/",
        place => place,
    }
}

/// A redo log of the VM's directory.
struct Found {
    path: String,
    descriptor: Descriptor,
}

/// Sets unreferenced redo logs over the VM's disks aside, and answers what is set aside in its directory. Does nothing
/// where anything is unclear: snapshots in the catalogue, a `.vmx` that cannot be read, a chain with a trouble.
pub(super) async fn sweep(place: &Place, around: &dyn Surroundings) -> Result<Vec<String>, VmsnapError> {
    let Place { datastore, vmx_path } = place;
    let home = directory(vmx_path);
    let mut names = datastore.folder.list(place_of(vmx_path)).await?;
    if !has_catalogue(datastore, vmx_path).await?
        && let Some(used) = used_files(place, &names, around).await
    {
        let redos = redo_logs(datastore, home, &names).await;
        for path in strays(datastore, home, &names, &redos, &used) {
            set_aside(datastore, &path).await?;
        }
        names = datastore.folder.list(place_of(vmx_path)).await?;
    }
    Ok(names.iter().filter(|n| n.contains(SET_ASIDE)).map(|n| format!("{home}/{n}")).collect())
}

/// Everything that the `.vmx` files of the directory name, down to the bases. `None` when that cannot be said.
async fn used_files(place: &Place, names: &[String], around: &dyn Surroundings) -> Option<BTreeSet<String>> {
    let (datastore, home) = (&place.datastore, directory(&place.vmx_path));
    let mut used = BTreeSet::new();
    for name in names.iter().filter(|n| n.ends_with(".vmx") || n.ends_with(".vmtx")) {
        let file = format!("{home}/{name}");
        let vmx = Vmx::parse(&datastore.folder.read_text(&file).await.ok()?).ok()?;
        for entry in vmx.disks() {
            let (at, top) = locate(datastore, &file, &entry.file_name, around).ok()?;
            let found = survey(&*at.folder, &top).await;
            if !found.complete || !found.troubles.is_empty() {
                return None;
            }
            if at.lun.uuid() == datastore.lun.uuid() {
                used.extend(found.links.into_iter().map(|l| l.path));
            }
        }
    }
    Some(used)
}

async fn redo_logs(datastore: &Datastore, home: &str, names: &[String]) -> Vec<Found> {
    let mut found = Vec::new();
    for name in names.iter().filter(|n| n.ends_with(".vmdk")) {
        let path = format!("{home}/{name}");
        // Extents end in .vmdk too, and are no descriptors.
        let Ok(bytes) = datastore.folder.read_text(&path).await else { continue };
        let Ok(descriptor) = Descriptor::parse(&bytes) else { continue };
        found.push(Found { path, descriptor });
    }
    found
}

/// Redo logs over used disks that are not used themselves, with their extents; and extents without a descriptor.
fn strays(
    datastore: &Datastore,
    home: &str,
    names: &[String],
    redos: &[Found],
    used: &BTreeSet<String>,
) -> Vec<String> {
    let mut out = Vec::new();
    let mut extents = BTreeSet::new();
    for found in redos {
        let own: Vec<String> =
            found.descriptor.extents().iter().filter_map(|e| sibling(&found.path, &e.file).ok()).collect();
        let parent = found.descriptor.parent_hint();
        let parent = parent.and_then(|hint| parent_path(&*datastore.folder, &found.path, hint).ok());
        let over_used =
            found.descriptor.parent_cid() != NO_PARENT && parent.is_some_and(|p| used.contains(&p));
        if over_used && !used.contains(&found.path) {
            let there = |path: &&String| names.iter().any(|n| **path == format!("{home}/{n}"));
            out.extend(own.iter().filter(there).cloned());
            out.push(found.path.clone());
        }
        extents.extend(own);
    }
    let orphan = |name: &&String| {
        let stem = name.strip_suffix("-delta.vmdk").and_then(|stem| stem.rsplit_once('-'));
        let numbered = stem.is_some_and(|(_, n)| n.len() == 6 && n.bytes().all(|b| b.is_ascii_digit()));
        numbered && !extents.contains(&format!("{home}/{name}"))
    };
    out.extend(names.iter().filter(orphan).map(|name| format!("{home}/{name}")));
    out
}
