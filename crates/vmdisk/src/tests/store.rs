//! A file store for tests on any disk: its directory is one sector, so every change of it is atomic.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use block::{
    Disk, DiskError, Extents, Generation, Io, SECTOR_BYTES, Safe, Sector, Segments, SegmentsMut, Shape,
    check_range,
};
use lane::sync::Turn;

use crate::claims::Claims;
use crate::file::GrowingFile;
use crate::folder::{Folder, FolderError, Provision, Step};
use crate::part::ready;
use crate::rdm::Mapping;

const SLOT_SECTORS: u64 = 1 << 16;
const ENTRY_BYTES: usize = 64;
const NAME_BYTES: usize = 44;
const ENTRIES: usize = 7;
/// Length of the disk it needs.
pub const STORE_SECTORS: u64 = 64 * SLOT_SECTORS;

#[derive(Clone, Debug)]
struct Entry {
    path: String,
    slot: u32,
    bytes: u64,
}

struct Inner {
    disk: Rc<dyn Disk>,
    entries: RefCell<Vec<Entry>>,
    next_slot: Cell<u32>,
    turn: Turn,
}

pub struct Store {
    inner: Rc<Inner>,
    claims: Claims,
}

impl Store {
    pub async fn open(disk: Rc<dyn Disk>) -> Rc<Self> {
        let mut sector = vec![0; SECTOR_BYTES as usize];
        disk.read(Sector(0), &SegmentsMut::new(&mut sector)).await.unwrap();
        let word = |b: &[u8]| u32::from_le_bytes(b.try_into().unwrap());
        let mut entries = Vec::new();
        for raw in sector[ENTRY_BYTES..].chunks(ENTRY_BYTES).filter(|raw| raw[0] != 0) {
            let end = raw[..NAME_BYTES].iter().position(|b| *b == 0).unwrap_or(NAME_BYTES);
            entries.push(Entry {
                path: String::from_utf8(raw[..end].to_vec()).unwrap(),
                slot: word(&raw[NAME_BYTES..NAME_BYTES + 4]),
                bytes: u64::from(word(&raw[NAME_BYTES + 4..NAME_BYTES + 8])),
            });
        }
        let next_slot = Cell::new(word(&sector[..4]));
        let inner = Inner { disk, entries: RefCell::new(entries), next_slot, turn: Turn::new() };
        Rc::new(Self { inner: Rc::new(inner), claims: Claims::default() })
    }

    fn find(&self, path: &str) -> Result<Entry, FolderError> {
        let entries = self.inner.entries.borrow();
        let found = entries.iter().find(|e| e.path == path).cloned();
        found.ok_or_else(|| FolderError::NotFound { path: path.to_owned() })
    }

    pub fn paths(&self) -> Vec<String> {
        self.inner.entries.borrow().iter().map(|e| e.path.clone()).collect()
    }
}

impl Inner {
    fn slot(&self) -> u32 {
        let slot = self.next_slot.get();
        assert!(u64::from(slot) < 63, "the test store is full");
        self.next_slot.set(slot + 1);
        slot
    }

    /// Changes the directory, one sector, durable when this returns.
    async fn change(&self, change: impl FnOnce(&mut Vec<Entry>)) -> Result<(), DiskError> {
        let _turn = self.turn.take().await;
        change(&mut self.entries.borrow_mut());
        let mut sector = vec![0; SECTOR_BYTES as usize];
        sector[..4].copy_from_slice(&self.next_slot.get().to_le_bytes());
        for (raw, entry) in sector[ENTRY_BYTES..].chunks_mut(ENTRY_BYTES).zip(self.entries.borrow().iter()) {
            raw[..entry.path.len()].copy_from_slice(entry.path.as_bytes());
            raw[NAME_BYTES..NAME_BYTES + 4].copy_from_slice(&entry.slot.to_le_bytes());
            raw[NAME_BYTES + 4..NAME_BYTES + 8].copy_from_slice(&(entry.bytes as u32).to_le_bytes());
        }
        assert!(self.entries.borrow().len() <= ENTRIES, "the test store has {ENTRIES} files");
        self.disk.write(Sector(0), &Segments::new(&sector), Safe::OnReturn).await
    }
}

fn start(slot: u32) -> Sector {
    Sector((u64::from(slot) + 1) * SLOT_SECTORS)
}

struct StoreFile {
    inner: Rc<Inner>,
    path: String,
    slot: u32,
    sectors: Cell<u64>,
}

fn at_path<T>(path: &str, result: Result<T, DiskError>) -> Result<T, FolderError> {
    result.map_err(|source| FolderError::Disk { path: path.to_owned(), source })
}

impl Folder for Store {
    fn claims(&self) -> &Claims {
        &self.claims
    }
    fn is_named(&self, name: &str) -> bool {
        name == "store"
    }
    fn read_text<'a>(&'a self, path: &'a str) -> Step<'a, Vec<u8>> {
        Box::pin(async move {
            let entry = self.find(path)?;
            let mut bytes = vec![0; (entry.bytes.next_multiple_of(SECTOR_BYTES)).min(1 << 16) as usize];
            at_path(path, self.inner.disk.read(start(entry.slot), &SegmentsMut::new(&mut bytes)).await)?;
            bytes.truncate(entry.bytes as usize);
            Ok(bytes)
        })
    }
    fn replace<'a>(&'a self, path: &'a str, bytes: &'a [u8]) -> Step<'a> {
        Box::pin(async move {
            let slot = self.inner.slot();
            let mut padded = bytes.to_vec();
            padded.resize(bytes.len().next_multiple_of(SECTOR_BYTES as usize), 0);
            let disk = &self.inner.disk;
            at_path(path, disk.write(start(slot), &Segments::new(&padded), Safe::AtNextFlush).await)?;
            at_path(path, disk.flush().await)?;
            let new = Entry { path: path.to_owned(), slot, bytes: bytes.len() as u64 };
            let change = |entries: &mut Vec<Entry>| {
                entries.retain(|e| e.path != path);
                entries.push(new);
            };
            at_path(path, self.inner.change(change).await)
        })
    }
    fn open<'a>(&'a self, path: &'a str, _read_only: bool) -> Step<'a, Rc<dyn GrowingFile>> {
        Box::pin(async move {
            let entry = self.find(path)?;
            let inner = Rc::clone(&self.inner);
            let sectors = Cell::new(entry.bytes / SECTOR_BYTES);
            let file = StoreFile { inner, path: path.to_owned(), slot: entry.slot, sectors };
            Ok(Rc::new(file) as Rc<dyn GrowingFile>)
        })
    }
    fn create<'a>(
        &'a self,
        path: &'a str,
        sectors: u64,
        _grows_to: u64,
        _provision: Provision,
    ) -> Step<'a, Rc<dyn GrowingFile>> {
        Box::pin(async move {
            if self.find(path).is_ok() {
                return Err(FolderError::Exists { path: path.to_owned() });
            }
            let new = Entry { path: path.to_owned(), slot: self.inner.slot(), bytes: sectors * SECTOR_BYTES };
            at_path(path, self.inner.change(|entries| entries.push(new)).await)?;
            self.open(path, false).await
        })
    }
    fn remove<'a>(&'a self, path: &'a str) -> Step<'a> {
        Box::pin(async move {
            self.find(path)?;
            at_path(path, self.inner.change(|entries| entries.retain(|e| e.path != path)).await)
        })
    }
    fn list<'a>(&'a self, _directory: &'a str) -> Step<'a, Vec<String>> {
        Box::pin(async move { Ok(self.paths().iter().map(|p| p[1..].to_owned()).collect()) })
    }
    fn read_mapping<'a>(&'a self, path: &'a str) -> Step<'a, Mapping> {
        Box::pin(async move { Err(FolderError::NotFound { path: path.to_owned() }) })
    }
    fn write_mapping<'a>(&'a self, path: &'a str, _mapping: &'a Mapping) -> Step<'a> {
        Box::pin(async move { Err(FolderError::Unsupported { path: path.to_owned(), what: "a mapping" }) })
    }
}

impl StoreFile {
    fn at(&self, at: Sector, count: u64) -> Result<Sector, DiskError> {
        check_range(self.sectors.get(), at, count)?;
        Ok(at.plus(start(self.slot).0))
    }
}

impl GrowingFile for StoreFile {
    fn grow(&self, sectors: u64) -> Io<'_> {
        Box::pin(async move {
            if sectors > SLOT_SECTORS {
                return Err(DiskError::NoSpace);
            }
            self.sectors.set(sectors.max(self.sectors.get()));
            let bytes = self.sectors.get() * SECTOR_BYTES;
            let change = |entries: &mut Vec<Entry>| {
                entries.iter_mut().filter(|e| e.path == self.path).for_each(|e| e.bytes = bytes);
            };
            self.inner.change(change).await
        })
    }
}

impl Disk for StoreFile {
    fn shape(&self) -> Shape {
        Shape { sectors: self.sectors.get(), ..self.inner.disk.shape() }
    }
    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        match self.at(at, into.len() as u64 / SECTOR_BYTES) {
            Ok(at) => self.inner.disk.read(at, into),
            Err(error) => ready(Err(error)),
        }
    }
    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a> {
        match self.at(at, from.len() as u64 / SECTOR_BYTES) {
            Ok(at) => self.inner.disk.write(at, from, safe),
            Err(error) => ready(Err(error)),
        }
    }
    fn zero(&self, at: Sector, count: u64, may_free: bool) -> Io<'_> {
        match self.at(at, count) {
            Ok(at) => self.inner.disk.zero(at, count, may_free),
            Err(error) => ready(Err(error)),
        }
    }
    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        self.zero(at, count, true)
    }
    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        _since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        // Whatever was ever in the slot: data.
        let kind = block::Kind::Data;
        ready(self.at(at, count).map(|_| {
            out.push(block::Extent { at, count, kind, changed: true });
        }))
    }
    fn compare_and_write<'a>(
        &'a self,
        at: Sector,
        expected: &'a Segments<'a>,
        new: &'a Segments<'a>,
    ) -> Io<'a> {
        match self.at(at, new.len() as u64 / SECTOR_BYTES) {
            Ok(at) => self.inner.disk.compare_and_write(at, expected, new),
            Err(error) => ready(Err(error)),
        }
    }
    fn flush(&self) -> Io<'_> {
        self.inner.disk.flush()
    }
}
