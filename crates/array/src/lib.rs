//! The LUN array: pools on one or more media, thin LUNs made of layers, snapshots, clones and groups.
//!
//! docs/formats/pool.md has the bytes, the order of writes and why a power loss does no harm.

mod boundary;
mod bytes;
pub mod catalog;
mod check;
mod faults;
pub mod format;
pub mod fuzz;
mod group;
pub mod identity;
mod journal;
mod lun;
mod map;
mod media_set;
mod merge;
mod open;
mod pages;
mod pool;
mod punch;
mod read;
mod show;
mod snapshot;
mod space;
mod squash;
#[cfg(test)]
mod tests;
mod tidy;
mod walk;

pub use catalog::{Claim, Decider};
pub use check::{Finding, LayerUse, Owner, Report};
pub use group::{InDoubt, Prepared};
pub use lun::Lun;
pub use open::{LEAST_MEDIUM_BYTES, NewPool, Options, PoolError};
pub use pool::{Pool, PoolInfo};
pub use show::LunUse;
pub use snapshot::{LunError, NewLun, Snapshot};
pub use tidy::TRASH_SECONDS;

/// Seconds since 1970.
pub(crate) fn seconds_now() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |d| d.as_secs())
}
