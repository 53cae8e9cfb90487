//! What can go wrong with a datastore.

use crate::format::{Corrupt, VmfsUuid};
use block::{DiskError, MediumFault, Sector};
use std::sync::Arc;

/// Failure of an operation on a volume.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// Metadata is not what the format says.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// A device failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Neither an LVM header nor a file system descriptor is where it has to be.
    #[error("this is no VMFS volume")]
    NotVmfs,
    /// The devices given do not make up one volume.
    #[error("the devices do not make up one volume: {what}")]
    WrongDevices {
        /// What does not fit.
        what: String,
    },
    /// Nothing has this name.
    #[error("{path}: not found")]
    NotFound {
        /// The path asked for.
        path: String,
    },
    /// The name is taken.
    #[error("{path}: exists already")]
    Exists {
        /// The path asked for.
        path: String,
    },
    /// The path is not one: empty component, `..`, a name over 127 bytes, a NUL.
    #[error("{path:?} is not a path on a datastore: {why}")]
    BadPath {
        /// The path asked for.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// It is of another kind than the operation needs.
    #[error("{path}: is no {wanted}")]
    WrongKind {
        /// The path asked for.
        path: String,
        /// The kind needed: "directory", "file", "symbolic link", "raw device mapping".
        wanted: &'static str,
    },
    /// A directory with something in it.
    #[error("{path}: directory is not empty")]
    NotEmpty {
        /// The path asked for.
        path: String,
    },
    /// Open elsewhere in this process; it is not removed, replaced or shortened under somebody's feet.
    #[error("{path}: in use")]
    InUse {
        /// The path asked for.
        path: String,
    },
    /// The volume is open for reading only, or its state allows no more.
    #[error("the volume is not writable: {why}")]
    ReadOnly {
        /// Why.
        why: String,
    },
    /// It was not closed, and the look that this asks for found damage that no crash of ours leaves. Reading is possible.
    #[error(
        "the volume was not closed and contradicts itself, {findings} findings; it can be read, and `vmfs check` lists them. The first: {first}"
    )]
    Damaged {
        /// How many.
        findings: u64,
        /// The first of them.
        first: String,
    },
    /// Another host has the volume open.
    #[error(
        "host {host} has the volume open (heartbeat slot {slot}): unmount it there, or wait until its lease of 16 s is over"
    )]
    ForeignHost {
        /// The host.
        host: VmfsUuid,
        /// Number of its heartbeat slot.
        slot: u64,
    },
    /// Something of this kind is used up.
    #[error("no free {what} left on the volume")]
    NoSpace {
        /// "file blocks", "sub-blocks", "pointer blocks", "file descriptors", "room in the directory".
        what: &'static str,
    },
    /// Longer than the format or the operation allows.
    #[error("{what}: {bytes} bytes are more than {limit}")]
    TooLarge {
        /// What is too long.
        what: &'static str,
        /// Length asked for.
        bytes: u64,
        /// Longest possible.
        limit: u64,
    },
    /// The content lies in the file descriptor and has no place of its own: read it as bytes.
    #[error("the file's content lies in its descriptor")]
    Resident,
    /// The format allows it, this program does not do it.
    #[error("not supported: {0}")]
    Unsupported(&'static str),
}

impl Error {
    /// The device below is thin and has no room now: it took nothing of what it refused.
    pub(crate) fn is_device_full(&self) -> bool {
        matches!(self, Self::Disk(DiskError::NoSpace))
    }
}

impl From<Error> for DiskError {
    fn from(error: Error) -> Self {
        match error {
            Error::Disk(inner) => inner,
            Error::NoSpace { .. } => Self::NoSpace,
            Error::ReadOnly { .. } | Error::ForeignHost { .. } | Error::Damaged { .. } => Self::ReadOnly,
            Error::InUse { .. } => Self::Conflict,
            Error::Corrupt(corrupt) => {
                Self::Medium(MediumFault { at: Sector(corrupt.at / block::SECTOR_BYTES), what: corrupt.what })
            }
            Error::NotVmfs
            | Error::WrongDevices { .. }
            | Error::NotFound { .. }
            | Error::Exists { .. }
            | Error::BadPath { .. }
            | Error::WrongKind { .. }
            | Error::NotEmpty { .. }
            | Error::TooLarge { .. }
            | Error::Resident
            | Error::Unsupported(_) => Self::Io(Arc::new(std::io::Error::other(error.to_string()))),
        }
    }
}
