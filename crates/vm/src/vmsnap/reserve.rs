//! Room for redo logs, on the datastores and in the thin pools below them (chapter 7, "Space rules").
//!
//! The reserve must be free before the switch. Half of it is what the redo logs may take: when less than half of it is
//! free, the copy is given up and the commit begins. The other half is for the commit, which takes at most as much as the
//! redo logs hold where the base is thin. A mapped LUN that is cut with the VM's disks takes from its pool what its
//! guest overwrites; it counts there as if it had a redo log.

use std::rc::Rc;

use array::{Lun, Pool};
use block::Disk;

use super::VmsnapError;
use crate::registry::{Datastore, OpenDisk};

/// How much of a datastore, and of the pool below it, must be free before disks on it go to redo logs.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Reserve {
    /// So many per cent of each disk's length, at least so many bytes; the least is never more than the disk's length, so
    /// that a small disk on a small datastore is not refused for nothing.
    Share {
        /// Per cent of the disk's length.
        per_cent: u64,
        /// At least, in bytes.
        least_bytes: u64,
    },
    /// So many bytes on each datastore and in each pool, whatever the disks are.
    Bytes(u64),
}

impl Default for Reserve {
    fn default() -> Self {
        Self::Share { per_cent: 20, least_bytes: 1 << 30 }
    }
}

/// What must stay free while a VM is on redo logs, in bytes.
#[derive(Default)]
pub(crate) struct Floors {
    datastores: Vec<(Rc<Datastore>, u64)>,
    pools: Vec<(Rc<Pool>, u64)>,
}

impl Floors {
    fn halved(mut self) -> Self {
        self.datastores.iter_mut().for_each(|(_, bytes)| *bytes /= 2);
        self.pools.iter_mut().for_each(|(_, bytes)| *bytes /= 2);
        self
    }

    /// One of the places has less.
    pub(crate) async fn is_short(&self) -> Result<bool, VmsnapError> {
        if self.pools.iter().any(|(pool, floor)| pool_free_bytes(pool) < *floor) {
            return Ok(true);
        }
        for (datastore, floor) in &self.datastores {
            if free_bytes(datastore).await? < *floor {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl Reserve {
    /// The reserve for disks of these lengths (bytes) in one place, in bytes.
    pub fn bytes(self, disks: impl IntoIterator<Item = u64>) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Share { per_cent, least_bytes } => disks
                .into_iter()
                .map(|length| (length / 100).saturating_mul(per_cent).max(least_bytes.min(length)))
                .fold(0, u64::saturating_add),
        }
    }

    /// Refuses when a datastore under these disks, or a pool under them and the mapped LUNs, has not its reserve free;
    /// answers what each must keep afterwards.
    pub(super) async fn check(self, disks: &[OpenDisk], mapped: &[Rc<Lun>]) -> Result<Floors, VmsnapError> {
        let wanted = self.wanted(disks, mapped);
        for (datastore, wanted_bytes) in &wanted.datastores {
            let free_bytes = free_bytes(datastore).await?;
            enough(|| format!("datastore {}", datastore.name), free_bytes, *wanted_bytes)?;
        }
        for (pool, wanted_bytes) in &wanted.pools {
            enough(|| format!("pool {}", pool.name()), pool_free_bytes(pool), *wanted_bytes)?;
        }
        Ok(wanted.halved())
    }

    /// What must stay free while these disks are on redo logs: half of the reserve.
    pub(super) fn floors(self, disks: &[OpenDisk], mapped: &[Rc<Lun>]) -> Floors {
        self.wanted(disks, mapped).halved()
    }

    /// The reserve of each place.
    fn wanted(self, disks: &[OpenDisk], mapped: &[Rc<Lun>]) -> Floors {
        let mut wanted = Floors::default();
        for open in disks {
            let datastore = &open.datastore;
            if wanted.datastores.iter().any(|(d, _)| d.lun.uuid() == datastore.lun.uuid()) {
                continue;
            }
            let here = disks.iter().filter(|d| d.datastore.lun.uuid() == datastore.lun.uuid());
            let bytes = self.bytes(here.map(|d| d.disk.shape().bytes()));
            wanted.datastores.push((Rc::clone(datastore), bytes));
        }
        let under_disks = disks.iter().map(|d| (&d.datastore.pool, d.disk.shape().bytes()));
        let under_luns = mapped.iter().map(|lun| (lun.pool(), lun.shape().bytes()));
        let all: Vec<(&Rc<Pool>, u64)> = under_disks.chain(under_luns).collect();
        for (pool, _) in &all {
            if wanted.pools.iter().any(|(p, _)| p.uuid() == pool.uuid()) {
                continue;
            }
            let here = all.iter().filter(|(p, _)| p.uuid() == pool.uuid());
            wanted.pools.push((Rc::clone(pool), self.bytes(here.map(|(_, length)| *length))));
        }
        wanted
    }
}

fn enough(place: impl Fn() -> String, free_bytes: u64, wanted_bytes: u64) -> Result<(), VmsnapError> {
    match free_bytes < wanted_bytes {
        true => Err(VmsnapError::Reserve { place: place(), free_bytes, wanted_bytes }),
        false => Ok(()),
    }
}

/// What a datastore has free, in bytes of whole file blocks.
async fn free_bytes(datastore: &Datastore) -> Result<u64, VmsnapError> {
    let failed = |source| VmsnapError::Volume { datastore: datastore.name.clone(), source };
    let free = datastore.volume.free().await.map_err(failed)?;
    Ok(free.blocks * datastore.volume.info().block_bytes)
}

fn pool_free_bytes(pool: &Pool) -> u64 {
    let info = pool.info();
    info.bytes.saturating_sub(info.used_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn the_reserve_is_a_share_and_the_least_of_it_never_more_than_the_disk() {
        let reserve = Reserve::default();
        assert_eq!(reserve.bytes([100 * GIB]), 100 * GIB / 100 * 20);
        assert_eq!(reserve.bytes([4 * GIB]), GIB);
        // A disk of 256 MiB may be overwritten once as a whole; it does not want a GiB.
        assert_eq!(reserve.bytes([256 * MIB]), 256 * MIB);
        assert_eq!(reserve.bytes([64 * MIB, 64 * MIB]), 128 * MIB);
        assert_eq!(Reserve::Bytes(5).bytes([GIB]), 5);
        assert_eq!(Reserve::Share { per_cent: 150, least_bytes: 0 }.bytes([GIB]), GIB / 100 * 150);
    }
}
