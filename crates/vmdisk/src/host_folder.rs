//! A directory of the host as a folder of VM disks: exported VMDK files, and looking at foreign ones.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::SystemTime;

use crate::claims::Claims;
use crate::file::GrowingFile;
use crate::folder::{Folder, FolderError, MAX_TEXT_BYTES, Provision, Step};
use crate::rdm::Mapping;

/// A directory of the host; paths begin there.
pub struct HostFolder {
    root: PathBuf,
    claims: Claims,
}

impl HostFolder {
    /// The directory as a folder.
    pub fn new(root: impl Into<PathBuf>) -> Rc<Self> {
        Rc::new(Self { root: root.into(), claims: Claims::default() })
    }

    /// The folder that a file lies in, and the file's path in it: for commands that name a file.
    pub fn of(file: &Path) -> Option<(Rc<Self>, String)> {
        let name = file.file_name()?.to_str()?;
        let parent = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Some((Self::new(parent), format!("/{name}")))
    }

    fn place(&self, path: &str) -> Result<PathBuf, FolderError> {
        let relative = path.trim_start_matches('/');
        if relative.split('/').any(|part| part == "..") || relative.contains('\0') {
            return Err(FolderError::Path { path: path.to_owned(), what: "leaves the directory" });
        }
        Ok(self.root.join(relative))
    }

    /// Runs blocking work on small files on another thread.
    async fn work<T: Send + 'static>(
        &self,
        path: &str,
        work: impl FnOnce(&Path) -> io::Result<T> + Send + 'static,
    ) -> Result<T, FolderError> {
        let place = self.place(path)?;
        lane::offload(move || work(&place)).await.map_err(|error| said(path, error))
    }
}

fn said(path: &str, error: io::Error) -> FolderError {
    let path = path.to_owned();
    match error.kind() {
        io::ErrorKind::NotFound => FolderError::NotFound { path },
        io::ErrorKind::AlreadyExists => FolderError::Exists { path },
        _ => FolderError::Disk { path, source: error.into() },
    }
}

fn medium(path: &str, error: media::MediaError) -> FolderError {
    match error {
        media::MediaError::Io { source, .. } | media::MediaError::InUse(source) => said(path, source),
        other => FolderError::Datastore { path: path.to_owned(), source: Box::new(other) },
    }
}

fn sync_directory(file: &Path) -> io::Result<()> {
    let directory = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::File::open(directory)?.sync_all()
}

fn replace(place: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = place.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".new-{}", uuid::Uuid::new_v4().simple()));
    let new = place.with_file_name(name);
    let written = (|| {
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&new, place)
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(&new);
    }
    written?;
    sync_directory(place)
}

impl Folder for HostFolder {
    fn claims(&self) -> &Claims {
        &self.claims
    }

    fn is_named(&self, _name: &str) -> bool {
        false
    }

    fn read_text<'a>(&'a self, path: &'a str) -> Step<'a, Vec<u8>> {
        Box::pin(self.work(path, |place| {
            let mut bytes = Vec::new();
            // One byte more than allowed, so that a longer file is seen to be one.
            std::fs::File::open(place)?.take(MAX_TEXT_BYTES + 1).read_to_end(&mut bytes)?;
            Ok(bytes)
        }))
    }

    fn replace<'a>(&'a self, path: &'a str, bytes: &'a [u8]) -> Step<'a> {
        let bytes = bytes.to_vec();
        Box::pin(self.work(path, move |place| replace(place, &bytes)))
    }

    fn open<'a>(&'a self, path: &'a str, read_only: bool) -> Step<'a, Rc<dyn GrowingFile>> {
        Box::pin(async move {
            let options = media::Options { read_only, ..media::Options::default() };
            let file = media::open(self.place(path)?, options).await.map_err(|e| medium(path, e))?;
            Ok(file as Rc<dyn GrowingFile>)
        })
    }

    fn create<'a>(
        &'a self,
        path: &'a str,
        sectors: u64,
        _grows_to: u64,
        provision: Provision,
    ) -> Step<'a, Rc<dyn GrowingFile>> {
        Box::pin(async move {
            if provision != Provision::Thin {
                let what = "files of the host are sparse: blocks cannot be taken beforehand";
                return Err(FolderError::Unsupported { path: path.to_owned(), what });
            }
            let options = media::Options::default();
            let file =
                media::create(self.place(path)?, sectors, options).await.map_err(|e| medium(path, e))?;
            Ok(file as Rc<dyn GrowingFile>)
        })
    }

    fn changed<'a>(&'a self, path: &'a str) -> Step<'a, Option<SystemTime>> {
        Box::pin(self.work(path, |place| Ok(std::fs::metadata(place)?.modified().ok())))
    }

    fn remove<'a>(&'a self, path: &'a str) -> Step<'a> {
        Box::pin(self.work(path, |place| {
            std::fs::remove_file(place)?;
            sync_directory(place)
        }))
    }

    fn list<'a>(&'a self, directory: &'a str) -> Step<'a, Vec<String>> {
        Box::pin(self.work(directory, |place| {
            let names = std::fs::read_dir(place)?.map(|entry| Ok(entry?.file_name().into_string().ok()));
            Ok(names.collect::<io::Result<Vec<_>>>()?.into_iter().flatten().collect())
        }))
    }

    fn read_mapping<'a>(&'a self, path: &'a str) -> Step<'a, Mapping> {
        Box::pin(std::future::ready(Err(no_mapping(path))))
    }

    fn write_mapping<'a>(&'a self, path: &'a str, _mapping: &'a Mapping) -> Step<'a> {
        Box::pin(std::future::ready(Err(no_mapping(path))))
    }
}

fn no_mapping(path: &str) -> FolderError {
    FolderError::Unsupported { path: path.to_owned(), what: "a mapping file exists on VMFS only" }
}
