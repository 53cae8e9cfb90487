//! Finds chunks: sorted segments on the medium plus, while a writer is at work, what it has added.
//!
//! The index says nothing that the packs do not say. A segment names the packs it covers; what a writer finds
//! uncovered it reads from the packs' own tables. Memory is bounded at any size of repository: large segments are
//! searched on the medium, and what is pending is written out when it grows.

use std::cmp::Reverse;
use std::collections::hash_map::Entry;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};

use uuid::Uuid;

use crate::Error;
use crate::chunk::{ChunkId, Location};
use crate::pack::{self, PACKS};
use crate::segment::{INDEX, Segment, SegmentWriter, segment_name, segment_number};
use crate::store::Store;

/// Pending entries are written to a segment at this count: some 70 MiB of memory.
const PENDING_ENTRIES: usize = 512 << 10;

type Segments = Arc<Vec<Arc<Segment>>>;

#[derive(Default)]
struct Pending {
    /// `None`: claimed by a writer that has not placed it yet.
    chunks: HashMap<ChunkId, Option<Location>>,
    /// Packs that are durable and not covered by a segment yet.
    sealed: Vec<u64>,
}

/// The index.
pub(crate) struct Index {
    store: Store,
    repository: Uuid,
    segments: RwLock<Segments>,
    pending: Mutex<Pending>,
    spill_at: usize,
    /// Held while segments are written and merged: packs are sealed by several threads.
    writing: Mutex<()>,
}

impl Index {
    /// Loads what segments there are. Damaged ones are left out and told by [`Index::damage`].
    /// `spill_at`: pending entries at which a segment is written.
    pub fn load(store: Store, repository: Uuid, spill_at: Option<usize>) -> Result<Self, Error> {
        let (segments, pending, writing) = (RwLock::default(), Mutex::default(), Mutex::default());
        let spill_at = spill_at.unwrap_or(PENDING_ENTRIES);
        let this = Self { store, repository, segments, pending, spill_at, writing };
        this.refresh()?;
        Ok(this)
    }

    /// Looks again which segments there are; those known stay open. Gives the damaged ones.
    pub fn refresh(&self) -> Result<Vec<(u64, Error)>, Error> {
        let known = self.segments();
        let mut list = Vec::new();
        let mut damaged = Vec::new();
        for number in self.store.list(Path::new(INDEX))?.iter().filter_map(|n| segment_number(n)) {
            if let Some(segment) = known.iter().find(|s| s.number == number) {
                list.push(Arc::clone(segment));
                continue;
            }
            match Segment::open(&self.store, self.repository, number) {
                Ok(segment) => list.push(Arc::new(segment)),
                // Merged away between listing and opening: its successor was there before it went.
                Err(_) if !self.store.path(&segment_name(number)).exists() => {}
                Err(e) if e.is_damage() => damaged.push((number, e)),
                Err(e) => return Err(e),
            }
        }
        // The large first: most chunks are there.
        list.sort_by_key(|s| Reverse(s.entries));
        *self.segments.write().unwrap_or_else(|e| e.into_inner()) = Arc::new(list);
        Ok(damaged)
    }

    pub fn segments(&self) -> Segments {
        Arc::clone(&self.segments.read().unwrap_or_else(|e| e.into_inner()))
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Finds a chunk in the segments.
    pub fn find(&self, id: &ChunkId) -> Result<Option<Location>, Error> {
        for segment in self.segments().iter() {
            if let Some((_, at)) = segment.find(id)? {
                return Ok(Some(at));
            }
        }
        Ok(None)
    }

    /// Finds a chunk in the segments, but not in pack `not`: another copy.
    pub fn find_elsewhere(&self, id: &ChunkId, not: u64) -> Result<Option<Location>, Error> {
        for segment in self.segments().iter() {
            if let Some((_, at)) = segment.find(id)?
                && at.pack != not
            {
                return Ok(Some(at));
            }
        }
        Ok(None)
    }

    /// True when the chunk is new: the caller, and nobody else, has to store it and tell its place.
    pub fn claim(&self, id: ChunkId) -> Result<bool, Error> {
        if self.pending().chunks.contains_key(&id) || self.find(&id)?.is_some() {
            return Ok(false);
        }
        // Two claims may have come this far; and a spill may have moved it into a segment meanwhile, which costs a
        // second copy and nothing else.
        Ok(match self.pending().chunks.entry(id) {
            Entry::Occupied(_) => false,
            Entry::Vacant(free) => {
                free.insert(None);
                true
            }
        })
    }

    /// The chunk is stored, or claimed by somebody who stores it.
    pub fn known(&self, id: &ChunkId) -> Result<bool, Error> {
        Ok(self.pending().chunks.contains_key(id) || self.find(id)?.is_some())
    }

    /// Tells where a claimed chunk was put.
    pub fn place(&self, id: ChunkId, at: Location) {
        self.pending().chunks.insert(id, Some(at));
    }

    /// A pack is durable: its chunks may go to a segment.
    pub fn sealed(&self, pack: u64) -> Result<(), Error> {
        let mut pending = self.pending();
        pending.sealed.push(pack);
        let full = pending.chunks.len() >= self.spill_at;
        drop(pending);
        if full { self.spill() } else { Ok(()) }
    }

    /// Writes what is pending and durable to a segment, then merges segments that have become many.
    pub fn spill(&self) -> Result<(), Error> {
        let _writing = self.writing.lock().unwrap_or_else(|e| e.into_inner());
        let (mut entries, packs) = {
            let mut pending = self.pending();
            let packs = std::mem::take(&mut pending.sealed);
            let durable: HashSet<u64> = packs.iter().copied().collect();
            let mut entries = Vec::new();
            for (id, at) in &pending.chunks {
                if let Some(at) = at
                    && durable.contains(&at.pack)
                {
                    entries.push((*id, *at));
                }
            }
            (entries, packs)
        };
        if packs.is_empty() {
            return Ok(());
        }
        entries.sort_unstable_by_key(|(id, _)| *id);
        let mut writer = SegmentWriter::create(&self.store, self.repository, packs)?;
        entries.iter().try_for_each(|(id, at)| writer.add(*id, at))?;
        writer.finish()?;
        self.refresh()?;
        // Only now: between here and the refresh both know them, never none.
        let mut pending = self.pending();
        for (id, _) in &entries {
            pending.chunks.remove(id);
        }
        if pending.chunks.is_empty() {
            pending.chunks.shrink_to_fit();
        }
        drop(pending);
        self.merge_small()
    }

    /// Forgets what a writer has added and not written: its packs are read again by the next.
    pub fn forget_pending(&self) {
        *self.pending() = Pending::default();
    }

    /// Merges the smallest segments while each next one is at most twice what is gathered: few segments, and each
    /// entry is rewritten a logarithmic number of times.
    fn merge_small(&self) -> Result<(), Error> {
        let segments = self.segments();
        let (mut gathered, mut take) = (0, 0);
        for segment in segments.iter().rev() {
            if take > 0 && segment.entries > 2 * gathered {
                break;
            }
            gathered += segment.entries;
            take += 1;
        }
        if take < 2 || segments.len() <= 4 {
            return Ok(());
        }
        self.replace(&segments[segments.len() - take..], &HashSet::new())
    }

    /// Writes one segment from several, entry by entry in order; it covers their packs without `without`. Then removes them: a crash between leaves both, which say the same.
    pub fn replace(&self, old: &[Arc<Segment>], without: &HashSet<u64>) -> Result<(), Error> {
        let packs =
            old.iter().flat_map(|s| s.packs.iter().copied()).filter(|p| !without.contains(p)).collect();
        let mut writer = SegmentWriter::create(&self.store, self.repository, packs)?;
        let mut last = None;
        each_sorted(old, |id, at| {
            if last != Some(id) && !without.contains(&at.pack) {
                last = Some(id);
                writer.add(id, &at)?;
            }
            Ok(())
        })?;
        writer.finish()?;
        self.refresh()?;
        for segment in old {
            self.store.remove_if_there(&segment_name(segment.number))?;
        }
        self.store.sync_directory(Path::new(INDEX))?;
        self.refresh().map(drop)
    }

    /// Makes the index say what the packs say, for a writer: damaged segments are dropped, entries of packs that
    /// are gone left out, packs that no segment covers read. Gives the packs there are.
    pub fn recover(&self) -> Result<Vec<u64>, Error> {
        self.forget_pending();
        for (number, _) in self.refresh()? {
            self.store.remove(&segment_name(number))?;
        }
        let packs: Vec<u64> =
            self.store.list(Path::new(PACKS))?.iter().filter_map(|n| pack::pack_number(n)).collect();
        let present: HashSet<u64> = packs.iter().copied().collect();
        let segments = self.segments();
        let covered: HashSet<u64> = segments.iter().flat_map(|s| s.packs.iter().copied()).collect();
        let gone: HashSet<u64> = covered.difference(&present).copied().collect();
        if !gone.is_empty() {
            let stale: Vec<_> =
                segments.iter().filter(|s| s.packs.iter().any(|p| gone.contains(p))).cloned().collect();
            self.replace(&stale, &gone)?;
        }
        for pack in packs.iter().filter(|p| !covered.contains(p)) {
            let tables = match pack::read_tables(&self.store, self.repository, *pack) {
                Ok(tables) => tables,
                // Its chunks are lost for now; verify names what needs them. New backups store them again.
                Err(e) if e.is_damage() => {
                    tracing::warn!(pack = format!("{pack:016x}"), error = %e, "pack left out of the index");
                    continue;
                }
                Err(e) => return Err(e),
            };
            for (id, at) in tables.locations(*pack) {
                self.pending().chunks.insert(id, Some(at));
            }
            self.sealed(*pack)?;
        }
        self.spill()?;
        Ok(packs)
    }
}

/// Calls `each` with all entries of several segments in order of hashes; equal hashes follow each other. Holds one
/// page of each segment.
pub(crate) fn each_sorted(
    segments: &[Arc<Segment>],
    mut each: impl FnMut(ChunkId, Location) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut pages = vec![(0, Vec::new().into_iter()); segments.len()];
    let mut heap = BinaryHeap::new();
    let mut places = vec![None; segments.len()];
    let mut fill = |n: usize, heap: &mut BinaryHeap<_>, places: &mut Vec<Option<Location>>| {
        loop {
            if let Some((id, at)) = pages[n].1.next() {
                places[n] = Some(at);
                heap.push(Reverse((id, n)));
                return Ok::<(), Error>(());
            }
            let Some(list) = segments[n].page_entries(pages[n].0)? else { return Ok(()) };
            pages[n] = (pages[n].0 + 1, list.into_iter());
        }
    };
    for n in 0..segments.len() {
        fill(n, &mut heap, &mut places)?;
    }
    while let Some(Reverse((id, n))) = heap.pop() {
        if let Some(at) = places[n].take() {
            each(id, at)?;
        }
        fill(n, &mut heap, &mut places)?;
    }
    Ok(())
}
