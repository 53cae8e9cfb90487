//! Cuts of LUNs at one instant, and frozen images of what lies on them: [`vm::cut`] over what this home has.

use std::rc::Rc;
use std::time::Duration;

use array::{Decider, Snapshot};
use block::Disk;
use uuid::Uuid;
use vm::Datastore;
use vm::cut::{CutError, Wanted};
use vmdisk::VmDisk;
use vmfs::{Mode, Volume};

use super::Store;
use super::luns::FoundLun;
use super::pools::pool_problem;
use super::redo::vmsnap_problem;
use crate::cli::images::vmfs_problem;
use crate::problem::{Kind, Outcome, Problem};

/// A cut that was made.
#[derive(Clone, Debug)]
pub struct Cut {
    /// Identity of the group.
    pub group: Uuid,
    /// From the first gate closed to the last gate opened.
    pub hold: Duration,
    /// When.
    pub at: jiff::Timestamp,
}

/// Why a cut was not made.
pub fn cut_problem(what: impl Into<String>, error: CutError) -> Problem {
    let what = what.into();
    match error {
        CutError::Empty => Problem::usage("a cut of no LUN"),
        CutError::Late { .. } => Problem::new("KGM-SNP-0002", Kind::Failed, what)
            .why(error)
            .hint("try again when the storage is less busy"),
        CutError::Settle { .. } => Problem::failed("KGM-SNP-0003", what, error),
        CutError::Pool { source, .. } => pool_problem(what, &source),
        CutError::Vm { source, vm } => vmsnap_problem(what, &vm, &source),
        CutError::InDoubt { .. } => {
            Problem::new("KGM-SNP-0004", Kind::Failed, what).why(error).hint("kagami pool ls")
        }
    }
}

/// A volume as it was at a cut.
pub struct FrozenImage {
    /// The datastore's LUN.
    found: FoundLun,
    /// Name of the snapshot that holds it.
    snap: String,
    /// The snapshot as a disk.
    pub disk: Rc<dyn Disk>,
}

impl Store {
    /// All VM disks that lie on one of these datastores or map one of these LUNs.
    fn disks_above(&self, luns: &[FoundLun]) -> Vec<Rc<VmDisk>> {
        let uuids: Vec<Uuid> = luns.iter().map(|f| f.lun.uuid()).collect();
        let mut disks = Vec::new();
        for vm in self.open_vms_now() {
            for disk in vm.disks() {
                let mapped = disk.disk.rdm().and_then(|(_, identity)| identity.lun.uuid);
                let below = mapped.unwrap_or_else(|| disk.datastore.lun.uuid());
                if uuids.contains(&below) {
                    disks.push(disk.disk);
                }
            }
        }
        disks.extend(self.exported_above(&uuids));
        disks
    }

    /// LUNs to be cut, with what stands on them.
    pub(super) fn wanted(&self, members: &[FoundLun], name: &str) -> Wanted {
        Wanted {
            group: Uuid::new_v4(),
            snapshot: name.to_owned(),
            luns: members.iter().map(|f| Rc::clone(&f.lun)).collect(),
            above: self.disks_above(members),
            datastores: members.iter().filter_map(|f| self.datastore_on(f.lun.uuid())).collect(),
            vms: Vec::new(),
        }
    }

    /// Cuts LUNs, of one pool or several, at one instant; each gets a snapshot of this name.
    pub(super) async fn cut(&self, members: &[FoundLun], name: &str) -> Outcome<Cut> {
        let cut = vm::cut::cut(&self.wanted(members, name)).await;
        let cut = cut.map_err(|e| cut_problem(format!("the cut \"{name}\" was not made"), e))?;
        self.metrics.cut_held(cut.hold);
        members.iter().for_each(|found| self.refresh_changed(found));
        Ok(Cut { group: cut.group, hold: cut.hold, at: cut.at })
    }

    /// After start: cuts over several pools that a crash left in doubt end as the deciding pool says.
    pub(super) async fn resolve_cuts(&self) {
        let pools = self.open_pools_now();
        for (name, open) in &pools {
            for doubt in open.pool.in_doubt() {
                let Decider::Pool(uuid) = doubt.decider else { continue };
                let Some((_, decider)) = pools.iter().find(|(_, p)| p.pool.uuid() == uuid) else {
                    tracing::warn!(pool = name, group = %doubt.group, "in doubt: the deciding pool is not here");
                    continue;
                };
                let happened = decider.pool.group_decided(doubt.group);
                match open.pool.resolve(doubt.group, happened).await {
                    Ok(()) => {
                        tracing::info!(pool = name, group = %doubt.group, happened, "a cut was resolved")
                    }
                    Err(error) => tracing::error!(pool = name, %error, "a cut stays in doubt"),
                }
            }
        }
    }

    /// A group cut as the user asks for one: its identity and how long writes were held.
    pub(super) async fn cut_luns(&self, members: &[FoundLun], name: &str) -> Outcome<(Uuid, Duration)> {
        self.cut(members, name).await.map(|cut| (cut.group, cut.hold))
    }

    /// A snapshot of a LUN under a datastore.
    pub(super) async fn cut_below(&self, datastore: &Datastore, name: &str) -> Outcome<Rc<Snapshot>> {
        let found = self.lun(&datastore.lun.uuid().to_string())?;
        self.cut(std::slice::from_ref(&found), name).await?;
        found.open_snapshot(name)
    }

    /// The volume as it is now, frozen; to be dropped by [`Store::drop_image`].
    pub(super) async fn frozen_image(&self, datastore: &Datastore) -> Outcome<FrozenImage> {
        let snap = format!("check-{}", Uuid::new_v4().simple());
        let disk = self.cut_below(datastore, &snap).await?;
        let found = self.lun(&datastore.lun.uuid().to_string())?;
        Ok(FrozenImage { found, snap, disk })
    }

    /// Gives a frozen image up.
    pub(super) async fn drop_image(&self, image: FrozenImage) {
        let FrozenImage { found, snap, disk } = image;
        drop(disk);
        if let Err(error) = found.lun.remove_snapshot(&snap).await {
            tracing::warn!(snap, %error, "a snapshot stays");
        }
    }
}

/// Opens the volume in a frozen LUN.
pub async fn frozen_volume(name: &str, disk: Rc<dyn Disk>) -> Outcome<Volume> {
    Volume::open(vec![disk], Mode::Read)
        .await
        .map_err(|e| vmfs_problem(format!("the frozen image of datastore \"{name}\" cannot be opened"), &e))
}
