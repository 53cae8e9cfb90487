//! A datastore as a folder of VM disks.

use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use block::SECTOR_BYTES;
use vmfs::format::InodeKind;
use vmfs::{Error, Layout, NewFile, Rdm, Volume};

use crate::claims::Claims;
use crate::file::GrowingFile;
use crate::flat::FlatDisk;
use crate::folder::{Folder, FolderError, MAX_TEXT_BYTES, Provision, Step};
use crate::rdm::Mapping;

/// An open VMFS volume. One per volume: it knows which files are open.
pub struct VmfsFolder {
    volume: Volume,
    claims: Claims,
}

impl VmfsFolder {
    /// The volume as a folder.
    pub fn new(volume: Volume) -> Rc<Self> {
        Rc::new(Self { volume, claims: Claims::default() })
    }

    /// The volume.
    pub fn volume(&self) -> &Volume {
        &self.volume
    }
}

fn said(path: &str, error: Error) -> FolderError {
    let path = path.to_owned();
    match error {
        Error::NotFound { path } => FolderError::NotFound { path },
        Error::Exists { path } => FolderError::Exists { path },
        Error::Disk(source) => FolderError::Disk { path, source },
        Error::NoSpace { .. } => FolderError::Disk { path, source: block::DiskError::NoSpace },
        other => FolderError::Datastore { path, source: Box::new(other) },
    }
}

fn on<T>(path: &str, result: Result<T, Error>) -> Result<T, FolderError> {
    result.map_err(|error| said(path, error))
}

impl Folder for VmfsFolder {
    fn claims(&self) -> &Claims {
        &self.claims
    }

    fn is_named(&self, name: &str) -> bool {
        let info = self.volume.info();
        info.label == name || info.uuid.to_string() == name
    }

    fn read_text<'a>(&'a self, path: &'a str) -> Step<'a, Vec<u8>> {
        Box::pin(async move { on(path, self.volume.read_file(path, MAX_TEXT_BYTES).await) })
    }

    fn replace<'a>(&'a self, path: &'a str, bytes: &'a [u8]) -> Step<'a> {
        // VMFS writes a new file and switches the name in one atomic write: R10 without a temporary name.
        Box::pin(async move { on(path, self.volume.write_file(path, bytes).await) })
    }

    fn open<'a>(&'a self, path: &'a str, read_only: bool) -> Step<'a, Rc<dyn GrowingFile>> {
        Box::pin(async move {
            let disk = on(path, FlatDisk::open(&self.volume, path, read_only).await)?;
            Ok(disk as Rc<dyn GrowingFile>)
        })
    }

    fn create<'a>(
        &'a self,
        path: &'a str,
        sectors: u64,
        grows_to: u64,
        provision: Provision,
    ) -> Step<'a, Rc<dyn GrowingFile>> {
        Box::pin(async move {
            let layout = match provision {
                Provision::Thin => Layout::Thin,
                Provision::LazyZeroed => Layout::LazyZeroed,
                Provision::EagerZeroed => Layout::EagerZeroed,
            };
            let new = NewFile { length: sectors * SECTOR_BYTES, layout, grows_to: grows_to * SECTOR_BYTES };
            let file = on(path, self.volume.create_file(path, new).await)?;
            on(path, file.flush().await)?;
            Ok(on(path, FlatDisk::new(&self.volume, file, false))? as Rc<dyn GrowingFile>)
        })
    }

    fn changed<'a>(&'a self, path: &'a str) -> Step<'a, Option<SystemTime>> {
        Box::pin(async move {
            let [changed_s, ..] = on(path, self.volume.entry(path).await)?.times_s;
            Ok(Some(UNIX_EPOCH + Duration::from_secs(changed_s.into())))
        })
    }

    fn remove<'a>(&'a self, path: &'a str) -> Step<'a> {
        Box::pin(async move { on(path, self.volume.remove(path).await) })
    }

    fn list<'a>(&'a self, directory: &'a str) -> Step<'a, Vec<String>> {
        Box::pin(async move {
            let entries = on(directory, self.volume.list(directory).await)?;
            let files = entries.into_iter().filter(|e| e.kind != InodeKind::Directory);
            Ok(files.map(|e| e.name).collect())
        })
    }

    fn read_mapping<'a>(&'a self, path: &'a str) -> Step<'a, Mapping> {
        Box::pin(async move {
            let Rdm { record, length, tail } = on(path, self.volume.read_rdm(path).await)?;
            Ok(Mapping { record, length_bytes: length, tail })
        })
    }

    fn write_mapping<'a>(&'a self, path: &'a str, mapping: &'a Mapping) -> Step<'a> {
        Box::pin(async move {
            let rdm =
                Rdm { record: mapping.record, length: mapping.length_bytes, tail: mapping.tail.clone() };
            match self.volume.replace_rdm(path, &rdm).await {
                Err(Error::NotFound { .. }) => on(path, self.volume.create_rdm(path, &rdm).await),
                other => on(path, other),
            }
        })
    }
}
