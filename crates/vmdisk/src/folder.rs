//! Where descriptors and extents lie: a datastore, or a directory of the host.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::time::SystemTime;

use block::DiskError;

use crate::claims::Claims;
use crate::file::GrowingFile;
use crate::rdm::Mapping;

/// The longest small file (descriptor) that is read whole, in bytes.
pub const MAX_TEXT_BYTES: u64 = crate::descriptor::MAX_BYTES as u64;

/// What can go wrong with a file of a folder.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// There is no such file.
    #[error("{path}: no such file")]
    NotFound {
        /// The path asked for.
        path: String,
    },
    /// There is such a file already.
    #[error("{path}: exists already")]
    Exists {
        /// The path asked for.
        path: String,
    },
    /// The path leaves the folder, or is no path.
    #[error("{path:?}: {what}")]
    Path {
        /// The path asked for.
        path: String,
        /// Why it is refused.
        what: &'static str,
    },
    /// The folder has no files of this kind.
    #[error("{path}: {what}")]
    Unsupported {
        /// The path asked for.
        path: String,
        /// What it cannot be.
        what: &'static str,
    },
    /// Data could not be moved.
    #[error("{path}: {source}")]
    Disk {
        /// The path asked for.
        path: String,
        /// What happened.
        source: DiskError,
    },
    /// The datastore says no.
    #[error("{path}: {source}")]
    Datastore {
        /// The path asked for.
        path: String,
        /// What it said.
        source: Box<dyn std::error::Error>,
    },
}

/// A step in a folder, under way.
pub type Step<'a, T = ()> = Pin<Box<dyn Future<Output = Result<T, FolderError>> + 'a>>;

/// How a new file gets its space.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Provision {
    /// At the first write of each block.
    Thin,
    /// At once; each block is zeroed at its first write.
    LazyZeroed,
    /// At once, zeroed at once.
    EagerZeroed,
}

/// A place with files. Paths are absolute in the folder and begin with `/`.
pub trait Folder {
    /// Who has what open.
    fn claims(&self) -> &Claims;
    /// `name` is this volume's label or UUID, as in `/vmfs/volumes/NAME/...`.
    fn is_named(&self, name: &str) -> bool;
    /// Reads a small file whole.
    fn read_text<'a>(&'a self, path: &'a str) -> Step<'a, Vec<u8>>;
    /// Puts a small file there, in place of an old one if there is one: a new file, flush, rename, flush (R10). After
    /// a power loss the old or the new content is there.
    fn replace<'a>(&'a self, path: &'a str, bytes: &'a [u8]) -> Step<'a>;
    /// Opens a data file.
    fn open<'a>(&'a self, path: &'a str, read_only: bool) -> Step<'a, Rc<dyn GrowingFile>>;
    /// Makes a data file of `sectors` sectors that reads as zero; it must not exist. It may grow to `grows_to` sectors
    /// later (0: it stays as it is). Durable when this returns.
    fn create<'a>(
        &'a self,
        path: &'a str,
        sectors: u64,
        grows_to: u64,
        provision: Provision,
    ) -> Step<'a, Rc<dyn GrowingFile>>;
    /// When a file's content changed last, where that is known.
    fn changed<'a>(&'a self, _path: &'a str) -> Step<'a, Option<SystemTime>> {
        Box::pin(std::future::ready(Ok(None)))
    }
    /// Takes a file away. Durable when this returns.
    fn remove<'a>(&'a self, path: &'a str) -> Step<'a>;
    /// Names in a directory.
    fn list<'a>(&'a self, directory: &'a str) -> Step<'a, Vec<String>>;
    /// Reads a mapping file.
    fn read_mapping<'a>(&'a self, path: &'a str) -> Step<'a, Mapping>;
    /// Makes a mapping file, or puts another identity and length into one, in one atomic step.
    fn write_mapping<'a>(&'a self, path: &'a str, mapping: &'a Mapping) -> Step<'a>;
}

/// The directory of a path, without the last `/`; the root is empty.
pub fn directory(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(directory, _)| directory)
}

/// The last part of a path.
pub fn file_name(path: &str) -> &str {
    path.rsplit_once('/').map_or(path, |(_, name)| name)
}

/// An extent's file: a plain name next to its descriptor, nothing else. A descriptor may come from anywhere; it must
/// not reach out of its directory.
pub fn sibling(path: &str, name: &str) -> Result<String, FolderError> {
    let refuse = |what| Err(FolderError::Path { path: name.to_owned(), what });
    if name.is_empty() || name == "." || name == ".." {
        return refuse("is no file name");
    }
    if name.contains(['/', '\0']) {
        return refuse("an extent lies next to its descriptor; other directories are refused");
    }
    Ok(format!("{}/{name}", directory(path)))
}

/// A parent's descriptor as a child names it: relative to the child, or absolute through `/vmfs/volumes/`. It stays
/// inside the folder.
pub fn parent_path(folder: &dyn Folder, child: &str, hint: &str) -> Result<String, FolderError> {
    let refuse = |what| Err(FolderError::Path { path: hint.to_owned(), what });
    let (start, rest) = match hint.strip_prefix("/vmfs/volumes/") {
        Some(absolute) => {
            let (volume, rest) = absolute.split_once('/').unwrap_or((absolute, ""));
            if !folder.is_named(volume) {
                return refuse("the parent lies on another datastore");
            }
            ("", rest)
        }
        None if hint.starts_with('/') => ("", hint),
        None => (directory(child), hint),
    };
    let mut parts: Vec<&str> = start.split('/').filter(|p| !p.is_empty()).collect();
    for part in rest.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.pop().is_none() => return refuse("leaves the datastore"),
            ".." => {}
            part => parts.push(part),
        }
    }
    if parts.is_empty() {
        return refuse("is no file name");
    }
    Ok(format!("/{}", parts.join("/")))
}
