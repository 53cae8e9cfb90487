//! What can go wrong with a disk, small enough to match without a wildcard: front ends map it to sense data, to NBD
//! error numbers and to virtio status by one table each.

use std::io;
use std::sync::Arc;

use crate::Sector;

/// Failure of an operation on a [`crate::Disk`].
#[derive(Clone, Debug, thiserror::Error)]
pub enum DiskError {
    /// The range is not wholly on the disk.
    #[error("the range is not on the disk")]
    OutOfRange,
    /// The disk does not take writes (a snapshot, a base below a redo log, opened read-only).
    #[error("the disk is read-only")]
    ReadOnly,
    /// An earlier flush or metadata write failed: nothing more is written until it is reopened.
    #[error("halted: an earlier flush failed; nothing is written until it is reopened")]
    Halted,
    /// No room to allocate (pool, datastore or redo log is full). Nothing was lost; goes on when space returns.
    #[error("no space left to allocate")]
    NoSpace,
    /// Somebody else's reservation or claim forbids it.
    #[error("in conflict with a reservation or claim")]
    Conflict,
    /// Compare-and-write met other content; nothing was written.
    #[error("content differs at byte {at_bytes}")]
    Miscompare {
        /// First differing byte, counted from the start of the comparison.
        at_bytes: u64,
    },
    /// The medium could not be read, or what it holds is provably not what was written.
    #[error("medium fault at {}: {}", .0.at, .0.what)]
    Medium(MediumFault),
    /// The operating system said no.
    #[error("I/O error: {0}")]
    Io(Arc<io::Error>),
    /// The disk is no longer there (deleted, unmounted, all paths lost).
    #[error("the disk is gone")]
    Gone,
    /// `since` names a generation this disk does not know: read everything, never assume "unchanged" (R45).
    #[error("the generation is unknown here")]
    UnknownGeneration,
}

/// Where and how a medium failed.
#[derive(Clone, Debug)]
pub struct MediumFault {
    /// First bad sector, counted on the disk that reports it.
    pub at: Sector,
    /// What was seen.
    pub what: &'static str,
}

impl From<io::Error> for DiskError {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(28) => Self::NoSpace, // ENOSPC
            _ => Self::Io(Arc::new(error)),
        }
    }
}

impl From<DiskError> for io::Error {
    fn from(error: DiskError) -> Self {
        let kind = match &error {
            DiskError::OutOfRange => io::ErrorKind::InvalidInput,
            DiskError::ReadOnly | DiskError::Halted => io::ErrorKind::ReadOnlyFilesystem,
            DiskError::NoSpace => io::ErrorKind::StorageFull,
            DiskError::Conflict => io::ErrorKind::ResourceBusy,
            DiskError::Miscompare { .. } | DiskError::Medium(_) => io::ErrorKind::InvalidData,
            DiskError::Io(inner) => inner.kind(),
            DiskError::Gone | DiskError::UnknownGeneration => io::ErrorKind::NotFound,
        };
        io::Error::new(kind, error)
    }
}
