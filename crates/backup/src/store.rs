//! The directory of a repository: every change to it goes through here, so that tests can see the exact sequence of
//! writes and syncs, play a power loss between any two of them, and make any of them fail.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::Error;

/// One change of the directory. Paths are relative to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change<'a> {
    /// A directory is made.
    MakeDirectory(&'a Path),
    /// A new, empty file is made; it must not exist.
    Create(&'a Path),
    /// Bytes are written at an offset.
    Write(&'a Path, u64, &'a [u8]),
    /// The content of a file is made durable.
    Sync(&'a Path),
    /// A file gets a new name, replacing what has it.
    Rename(&'a Path, &'a Path),
    /// A file is removed.
    Remove(&'a Path),
    /// The names in a directory are made durable.
    SyncDirectory(&'a Path),
}

/// Sees each [`Change`] before it is made and may refuse it: for crash tests and fault injection.
pub type Watch = Arc<dyn Fn(&Change<'_>) -> io::Result<()> + Send + Sync>;

/// The directory.
#[derive(Clone)]
pub(crate) struct Store {
    root: PathBuf,
    watch: Option<Watch>,
}

impl Store {
    pub fn new(root: &Path, watch: Option<Watch>) -> Self {
        Self { root: root.to_owned(), watch }
    }

    /// Somebody looks at the order of changes: work beside each other would blur it.
    pub fn is_watched(&self) -> bool {
        self.watch.is_some()
    }

    pub fn path(&self, name: &Path) -> PathBuf {
        self.root.join(name)
    }

    fn tell(&self, doing: &'static str, path: &Path, change: Change<'_>) -> Result<(), Error> {
        match &self.watch {
            Some(watch) => watch(&change).map_err(|e| Error::io(doing, &self.path(path), e)),
            None => Ok(()),
        }
    }

    /// Makes a directory in the repository and its name durable.
    pub fn make_directory(&self, name: &Path) -> Result<(), Error> {
        self.tell("making", name, Change::MakeDirectory(name))?;
        match fs::create_dir(self.path(name)) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                Err(Error::io("making", &self.path(name), e))
            }
            _ => Ok(()),
        }
    }

    /// Makes a new file to be written front to back.
    pub fn create(&self, name: &Path) -> Result<Writing, Error> {
        self.tell("creating", name, Change::Create(name))?;
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(self.path(name))
            .map_err(|e| Error::io("creating", &self.path(name), e))?;
        Ok(Writing { store: self.clone(), name: name.to_owned(), file, length: 0 })
    }

    /// Writes a whole file so that it is there wholly or not at all: temporary name, sync, rename, sync directory.
    pub fn put(&self, name: &Path, bytes: &[u8]) -> Result<(), Error> {
        let temporary = temporary(name);
        self.remove_if_there(&temporary)?;
        let mut writing = self.create(&temporary)?;
        writing.append(bytes)?;
        writing.publish(name)
    }

    /// Opens a file for reading.
    pub fn open(&self, name: &Path) -> Result<File, Error> {
        File::open(self.path(name)).map_err(|e| Error::io("opening", &self.path(name), e))
    }

    /// Reads a file of at most `limit` bytes; a larger one is refused unread.
    pub fn read(&self, name: &Path, limit: u64) -> Result<Vec<u8>, Error> {
        let path = self.path(name);
        let mut bytes = Vec::new();
        let file = self.open(name)?;
        file.take(limit + 1).read_to_end(&mut bytes).map_err(|e| Error::io("reading", &path, e))?;
        if bytes.len() as u64 > limit {
            return Err(crate::error::corrupt(
                name,
                "file length",
                0,
                "more",
                format!("at most {limit} bytes"),
            ));
        }
        Ok(bytes)
    }

    pub fn remove(&self, name: &Path) -> Result<(), Error> {
        self.tell("removing", name, Change::Remove(name))?;
        fs::remove_file(self.path(name)).map_err(|e| Error::io("removing", &self.path(name), e))
    }

    /// Gives a file another name in the same directory, which is not synced.
    pub fn rename(&self, from: &Path, to: &Path) -> Result<(), Error> {
        self.tell("renaming", to, Change::Rename(from, to))?;
        fs::rename(self.path(from), self.path(to)).map_err(|e| Error::io("renaming", &self.path(to), e))
    }

    pub fn remove_if_there(&self, name: &Path) -> Result<(), Error> {
        if self.path(name).exists() { self.remove(name) } else { Ok(()) }
    }

    /// Makes the names in a directory durable ("" is the repository itself).
    pub fn sync_directory(&self, name: &Path) -> Result<(), Error> {
        self.tell("syncing", name, Change::SyncDirectory(name))?;
        let path = self.path(name);
        File::open(&path).and_then(|d| d.sync_all()).map_err(|e| Error::io("syncing", &path, e))
    }

    /// Names of the files in a directory, sorted; sub-directories are left out.
    pub fn list(&self, name: &Path) -> Result<Vec<String>, Error> {
        let path = self.path(name);
        let fail = |e| Error::io("listing", &path, e);
        let mut names = Vec::new();
        for entry in fs::read_dir(&path).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            if let (Ok(name), true) =
                (entry.file_name().into_string(), entry.file_type().map_err(fail)?.is_file())
            {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }
}

/// The name under which a file is written before it counts.
pub(crate) fn temporary(name: &Path) -> PathBuf {
    let mut with = name.as_os_str().to_owned();
    with.push(".tmp");
    PathBuf::from(with)
}

/// A file being written front to back under a temporary name.
pub(crate) struct Writing {
    store: Store,
    name: PathBuf,
    file: File,
    length: u64,
}

impl Writing {
    /// Bytes written so far.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Adds to the end.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.store.tell("writing", &self.name, Change::Write(&self.name, self.length, bytes))?;
        self.file
            .write_all_at(bytes, self.length)
            .map_err(|e| Error::io("writing", &self.store.path(&self.name), e))?;
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Writes the first bytes again, whose content depends on what came after them.
    pub fn rewrite_start(&mut self, bytes: &[u8]) -> Result<(), Error> {
        assert!(bytes.len() as u64 <= self.length, "only what is there is written again");
        self.store.tell("writing", &self.name, Change::Write(&self.name, 0, bytes))?;
        self.file.write_all_at(bytes, 0).map_err(|e| Error::io("writing", &self.store.path(&self.name), e))
    }

    /// Makes the content durable, gives the file its name, and makes the name durable.
    pub fn publish(self, name: &Path) -> Result<(), Error> {
        let (store, path) = (&self.store, self.store.path(name));
        store.tell("syncing", &self.name, Change::Sync(&self.name))?;
        self.file.sync_all().map_err(|e| Error::io("syncing", &path, e))?;
        store.tell("renaming", name, Change::Rename(&self.name, name))?;
        fs::rename(store.path(&self.name), &path).map_err(|e| Error::io("renaming", &path, e))?;
        store.sync_directory(name.parent().unwrap_or(Path::new("")))
    }

    /// Gives up: the temporary file goes away. Best effort: the next writer removes what is left.
    pub fn abandon(self) {
        let _ = self.store.remove(&self.name);
    }
}
