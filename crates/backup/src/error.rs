//! What can go wrong with a repository, as kinds that a caller can act on.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::DiskError;

use crate::BackupId;

/// Failure of an operation on a repository.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The directory holds no repository.
    #[error("{} is not a backup repository", .path.display())]
    NotARepository {
        /// The directory asked for.
        path: PathBuf,
    },
    /// Something is already where a repository (or an exported file) was to be made.
    #[error("{} exists already", .path.display())]
    Exists {
        /// What is in the way.
        path: PathBuf,
    },
    /// Written by a newer program. Nothing was touched.
    #[error("{what} has format {found}; this program knows formats up to {known}: use a newer kagami")]
    NewerFormat {
        /// Which structure.
        what: &'static str,
        /// The version it has.
        found: u32,
        /// The newest that this program reads.
        known: u32,
    },
    /// Uses a feature that this program does not have and that it must not ignore.
    #[error("{what} needs features {unknown:#x} that this program does not know: use a newer kagami")]
    UnknownFeatures {
        /// Which structure.
        what: &'static str,
        /// The bits that are not understood.
        unknown: u32,
    },
    /// Another program writes to the repository.
    #[error("the repository is being written by {holder}; wait for it to end, readers may go on")]
    Locked {
        /// Who holds the lock: host, process, since when, what it does.
        holder: String,
    },
    /// Bytes are not what was written there.
    #[error("{}: {what} is damaged at byte {at}: found {found}, expected {expected}", .file.display())]
    Corrupt {
        /// The structure.
        what: &'static str,
        /// The file, relative to the repository where it lies in one.
        file: PathBuf,
        /// Offset in the file, in bytes.
        at: u64,
        /// What was there.
        found: String,
        /// What should have been.
        expected: String,
    },
    /// A chunk that a backup refers to is in no pack.
    #[error("chunk {chunk} is missing from the repository")]
    MissingChunk {
        /// The chunk's hash.
        chunk: String,
    },
    /// A part of a backed-up disk cannot be read back.
    #[error("backup {backup}, disk {disk}, byte {at_bytes}: {source}")]
    Damaged {
        /// The backup.
        backup: BackupId,
        /// The disk's name in it.
        disk: String,
        /// First byte of the disk that is lost.
        at_bytes: u64,
        /// Why.
        source: Arc<Error>,
    },
    /// No such backup.
    #[error("no backup {id} in this repository")]
    NoBackup {
        /// As it was asked for.
        id: String,
    },
    /// The name fits several backups.
    #[error("{id} fits {count} backups; give more digits")]
    Ambiguous {
        /// As it was asked for.
        id: String,
        /// How many it fits.
        count: usize,
    },
    /// No such disk or file in the backup.
    #[error("backup {backup} has no {what} named {name}")]
    NoMember {
        /// The backup.
        backup: BackupId,
        /// "disk" or "file".
        what: &'static str,
        /// As it was asked for.
        name: String,
    },
    /// Something given by the caller cannot be stored or restored.
    #[error("{0}")]
    Refused(String),
    /// The file system of the repository is full. Nothing that was sealed is lost; what was written so far is used
    /// by the next attempt.
    #[error("no space left for {}: free some, or remove backups and prune, then run it again", .path.display())]
    NoSpace {
        /// The file being written.
        path: PathBuf,
    },
    /// The operating system said no.
    #[error("{doing} {}: {source}", .path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// The answer.
        source: Arc<io::Error>,
    },
    /// A disk that is read from or restored to failed.
    #[error("disk {disk}, byte {at_bytes}: {source}")]
    Disk {
        /// The disk's name.
        disk: String,
        /// Where the failed request began.
        at_bytes: u64,
        /// The answer.
        source: DiskError,
    },
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
}

impl Error {
    pub(crate) fn io(doing: &'static str, path: &Path, source: io::Error) -> Self {
        // ENOSPC and EDQUOT: a full quota is as full as a full disk.
        if matches!(source.raw_os_error(), Some(28 | 122)) || source.kind() == io::ErrorKind::StorageFull {
            return Self::NoSpace { path: path.to_owned() };
        }
        Self::Io { doing, path: path.to_owned(), source: Arc::new(source) }
    }

    pub(crate) fn disk(name: &str, at_bytes: u64, source: DiskError) -> Self {
        Self::Disk { disk: name.to_owned(), at_bytes, source }
    }

    /// The data is provably not what was written (as opposed to: could not be read just now).
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Corrupt { .. } | Self::MissingChunk { .. } | Self::Damaged { .. } => true,
            Self::Io { source, .. } => source.kind() == io::ErrorKind::NotFound,
            _ => false,
        }
    }
}

/// Builds [`Error::Corrupt`] for one file.
pub(crate) fn corrupt(
    file: &Path,
    what: &'static str,
    at: u64,
    found: impl ToString,
    expected: impl ToString,
) -> Error {
    Error::Corrupt {
        what,
        file: file.to_owned(),
        at,
        found: found.to_string(),
        expected: expected.to_string(),
    }
}
