//! A repository: a directory that holds backups.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use crate::envelope;
use crate::error::{Error, corrupt};
use crate::format::{AREA_BYTES, MAX_FILE_BYTES, MAX_MANIFEST_BYTES, REPOSITORY_MAGIC};
use crate::index::Index;
use crate::manifest::{BackupId, MANIFESTS, Manifest};
use crate::pack::PACKS;
use crate::reader::{Reader, Reads};
use crate::segment::INDEX;
use crate::session::{Session, WriterLock};
use crate::store::{Store, Watch, temporary};

const REPOSITORY: &str = "repository";

/// How a repository is opened.
#[derive(Clone, Default)]
pub struct Options {
    /// Sees each change before it is made (crash tests, fault injection).
    pub watch: Option<Watch>,
    /// Length at which a pack is sealed, in bytes; 64 MiB when not given. For tests of many packs.
    pub pack_bytes: Option<u64>,
    /// Index entries held in memory until a segment is written; 512 Ki when not given. For tests of many segments.
    pub pending_entries: Option<usize>,
}

pub(crate) struct Inner {
    pub store: Store,
    pub id: Uuid,
    pub index: Arc<Index>,
    pub reader: Reader,
    pub options: Options,
}

/// A directory that holds backups. Cheap to clone; any thread may use it. Reading takes no lock and goes on beside a
/// writer; of writers (backup, remove, prune) there is one at a time, whatever the process.
#[derive(Clone)]
pub struct Repository {
    pub(crate) inner: Arc<Inner>,
}

/// A line of the list of backups.
#[derive(Debug)]
pub struct Listed {
    /// The backup.
    pub id: BackupId,
    /// Its manifest, or why it cannot be read.
    pub manifest: Result<Manifest, Error>,
}

impl Repository {
    /// Makes a repository in `directory`, which is made too, or must be empty.
    pub fn create(directory: &Path, options: Options) -> Result<Self, Error> {
        let fail = |e| Error::io("making", directory, e);
        fs::create_dir_all(directory).map_err(fail)?;
        let store = Store::new(directory, options.watch.clone());
        for entry in fs::read_dir(directory).map_err(fail)? {
            // What an interrupted create has left is finished, anything else is somebody's.
            let name = entry.map_err(fail)?.file_name();
            let ours = [PACKS, INDEX, MANIFESTS].iter().any(|n| name == *n);
            if !ours && name != *temporary(Path::new(REPOSITORY)) {
                return Err(Error::Exists { path: directory.join(name) });
            }
        }
        for name in [PACKS, INDEX, MANIFESTS] {
            store.make_directory(Path::new(name))?;
        }
        store.sync_directory(Path::new(""))?;
        // Last: a directory without it is no repository.
        store.put(Path::new(REPOSITORY), &envelope::seal(REPOSITORY_MAGIC, Uuid::new_v4(), [0; 16], &[]))?;
        Self::open(directory, options)
    }

    /// Opens a repository. Nothing is written, nothing upgraded.
    pub fn open(directory: &Path, options: Options) -> Result<Self, Error> {
        let store = Store::new(directory, options.watch.clone());
        let name = Path::new(REPOSITORY);
        if !store.path(name).is_file() {
            return Err(Error::NotARepository { path: directory.to_owned() });
        }
        let bytes = store.read(name, 64 << 10)?;
        let (head, _) = envelope::open(&bytes, name, "repository", REPOSITORY_MAGIC, None)?;
        let id = Uuid::from_bytes(head.repository);
        let index = Arc::new(Index::load(store.clone(), id, options.pending_entries)?);
        let reader = Reader::new(store.clone(), Arc::clone(&index));
        Ok(Self { inner: Arc::new(Inner { store, id, index, reader, options }) })
    }

    /// Opens the repository in `directory`, or makes one when there is none.
    pub fn open_or_create(directory: &Path, options: Options) -> Result<Self, Error> {
        match Self::open(directory, options.clone()) {
            Err(Error::NotARepository { .. }) => Self::create(directory, options),
            other => other,
        }
    }

    /// The repository's identity.
    pub fn id(&self) -> Uuid {
        self.inner.id
    }

    /// What reading through this handle has cost so far.
    pub fn reads(&self) -> Reads {
        self.inner.reader.reads()
    }

    /// Becomes the writer, or says who is. `doing` is shown to others.
    pub(crate) fn begin(&self, doing: &str) -> Result<Session, Error> {
        let inner = &self.inner;
        let lock = WriterLock::take(&inner.store, doing)?;
        Session::begin(&inner.store, inner.id, Arc::clone(&inner.index), lock, inner.options.pack_bytes)
    }

    /// All backups, oldest first. One that cannot be read is listed with the reason.
    pub fn list(&self) -> Result<Vec<Listed>, Error> {
        let mut list = Vec::new();
        for name in self.inner.store.list(Path::new(MANIFESTS))? {
            let Some(id) = BackupId::from_file_name(&name) else { continue };
            match self.manifest(id) {
                // Removed between listing and reading.
                Err(Error::NoBackup { .. }) => {}
                manifest => list.push(Listed { id, manifest }),
            }
        }
        list.sort_by_key(|l| l.id);
        Ok(list)
    }

    /// The manifest of a backup.
    pub fn manifest(&self, id: BackupId) -> Result<Manifest, Error> {
        let file = id.file();
        if !self.inner.store.path(&file).exists() {
            return Err(Error::NoBackup { id: id.to_string() });
        }
        let bytes = self.inner.store.read(&file, MAX_MANIFEST_BYTES + envelope::HEAD_BYTES as u64)?;
        Manifest::decode(&bytes, Some(self.inner.id), Some(id))
    }

    /// Finds a backup by its id, by the first digits of it, or by `latest` (the newest) or `NAME@latest`.
    pub fn resolve(&self, text: &str) -> Result<BackupId, Error> {
        let missing = || Error::NoBackup { id: text.to_owned() };
        if text == "latest" || text.ends_with("@latest") {
            let name = text.strip_suffix("@latest");
            let sealed = self.list()?.into_iter().rev().filter_map(|l| l.manifest.ok());
            let mut fitting = sealed.filter(|m| name.is_none_or(|n| n == m.name));
            return fitting.next().map(|m| m.id).ok_or_else(missing);
        }
        let names = self.inner.store.list(Path::new(MANIFESTS))?;
        let all = names.iter().filter_map(|n| BackupId::from_file_name(n));
        let found: Vec<BackupId> = all.filter(|id| id.to_string().starts_with(text)).collect();
        match found[..] {
            [id] if !text.is_empty() => Ok(id),
            [] => Err(missing()),
            _ => Err(Error::Ambiguous { id: text.to_owned(), count: found.len() }),
        }
    }

    /// The content of a small file of a backup.
    pub fn file(&self, manifest: &Manifest, name: &str) -> Result<Vec<u8>, Error> {
        let record = manifest.file(name)?;
        let mut content = Vec::with_capacity(record.length_bytes.min(MAX_FILE_BYTES) as usize);
        for id in &record.chunks {
            content.extend_from_slice(&self.inner.reader.chunk(id)?);
        }
        if content.len() as u64 != record.length_bytes {
            let (file, found) = (manifest.id.file(), format!("{} bytes in {name}", content.len()));
            return Err(corrupt(&file, "file length", 0, found, record.length_bytes));
        }
        Ok(content)
    }

    /// Removes a backup. Its space returns with the next [`Repository::prune`].
    pub fn remove(&self, id: BackupId) -> Result<(), Error> {
        let store = &self.inner.store;
        let _lock = WriterLock::take(store, &format!("kagami backup rm {id}"))?;
        if !store.path(&id.file()).exists() {
            return Err(Error::NoBackup { id: id.to_string() });
        }
        store.remove(&id.file())?;
        store.sync_directory(Path::new(MANIFESTS))
    }
}

/// Cuts a small file into chunks.
pub(crate) fn file_chunks(content: &[u8]) -> impl Iterator<Item = &[u8]> {
    content.chunks(AREA_BYTES as usize)
}
