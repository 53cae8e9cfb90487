//! Pages of maps and bitmaps in memory: a bounded cache over ping-pong pairs on the media.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::rc::Rc;

use block::{Buffer, DiskError, MediumFault, Safe, Sector, Segments, SegmentsMut};
use lane::sync::Waiters;

use crate::format::{PAGE_BYTES, PAGE_ENTRIES, PAIR_BYTES, PageKey, decode_page, encode_page};
use crate::media_set::MediaSet;

/// Mixes the words of a key; keys are ours, nobody can choose them to collide.
#[derive(Default)]
pub struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|b| self.write_u64(u64::from(*b)));
    }
    #[inline]
    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(26) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    #[inline]
    fn write_u32(&mut self, word: u32) {
        self.write_u64(u64::from(word));
    }
}

/// A map keyed by numbers of ours.
pub type FastMap<K, V> = HashMap<K, V, BuildHasherDefault<Mix>>;

/// A page in memory.
pub struct Page {
    /// Which page.
    pub key: PageKey,
    /// Its pair.
    pub address: u64,
    entries: Box<[Cell<u64>]>,
    /// Of the newest slot on the medium; 0: never written.
    generation: Cell<u64>,
    newest_slot: Cell<u64>,
    dirty: Cell<bool>,
    /// Changes whose journal record is not durable yet.
    unjournaled: Cell<u32>,
    recently_used: Cell<bool>,
    /// Its layer is gone and its place may be somebody else's: it is never written again.
    gone: Cell<bool>,
}

impl Page {
    /// An entry.
    #[inline]
    pub fn get(&self, slot: usize) -> u64 {
        self.entries[slot].get()
    }

    fn fresh(key: PageKey, address: u64) -> Self {
        Self::of(key, address, (0..PAGE_ENTRIES).map(|_| Cell::new(0)).collect())
    }

    fn of(key: PageKey, address: u64, entries: Box<[Cell<u64>]>) -> Self {
        Self {
            key,
            address,
            entries,
            generation: Cell::new(0),
            newest_slot: Cell::new(1),
            dirty: Cell::new(false),
            unjournaled: Cell::new(0),
            recently_used: Cell::new(true),
            gone: Cell::new(false),
        }
    }

    /// The first entry at or after `from` that is not zero.
    pub fn next_set(&self, from: usize) -> Option<usize> {
        (from..PAGE_ENTRIES).find(|slot| self.entries[*slot].get() != 0)
    }

    /// Changes an entry in memory; `journaled` when a durable record says so already (replay).
    pub(crate) fn set(&self, slot: usize, value: u64, journaled: bool) {
        self.entries[slot].set(value);
        self.dirty.set(true);
        if !journaled {
            self.unjournaled.set(self.unjournaled.get() + 1);
        }
    }

    /// One change became durable.
    pub(crate) fn journaled(&self) {
        self.unjournaled.set(self.unjournaled.get() - 1);
    }
}

/// Pages looked at for each that comes in, at most, to find one that may go.
const MOST_LOOKS: usize = 64;

/// The cache.
pub struct PageCache {
    pages: RefCell<FastMap<PageKey, Rc<Page>>>,
    /// The same in the order in which they are looked at when room is needed (a clock with a second chance).
    clock: RefCell<VecDeque<Rc<Page>>>,
    /// Pages that somebody reads right now. One read serves all who want a page; and a page never comes from a read that
    /// is older than what was written to it since.
    loading: RefCell<FastMap<PageKey, Rc<Waiters>>>,
    /// Most clean pages kept.
    pub limit: usize,
    dirty: RefCell<Vec<Rc<Page>>>,
}

impl PageCache {
    /// An empty cache that keeps about `limit` pages of 4 KiB.
    pub fn new(limit: usize) -> Self {
        Self {
            pages: RefCell::default(),
            clock: RefCell::default(),
            loading: RefCell::default(),
            limit: limit.max(64),
            dirty: RefCell::default(),
        }
    }

    /// A page, if it is in memory.
    #[inline]
    pub fn cached(&self, key: PageKey) -> Option<Rc<Page>> {
        let pages = self.pages.borrow();
        let page = pages.get(&key)?;
        page.recently_used.set(true);
        Some(Rc::clone(page))
    }

    /// Pages in memory and dirty ones among them.
    pub fn counts(&self) -> (usize, usize) {
        (self.pages.borrow().len(), self.dirty.borrow().len())
    }

    /// A new, empty page: first written to its pair, so that it is there before the record that refers to it.
    pub async fn create(&self, media: &MediaSet, key: PageKey, address: u64) -> Result<Rc<Page>, DiskError> {
        let page = Rc::new(Page::fresh(key, address));
        self.write(media, &page, std::iter::empty()).await?;
        self.insert(&page);
        Ok(page)
    }

    fn insert(&self, page: &Rc<Page>) {
        self.make_room();
        self.pages.borrow_mut().insert(page.key, Rc::clone(page));
        self.clock.borrow_mut().push_back(Rc::clone(page));
    }

    /// Remembers that a page has to be written at the next checkpoint. Called with every change.
    pub fn mark_dirty(&self, page: &Rc<Page>, slot: usize, value: u64, journaled: bool) {
        if !page.dirty.get() && !page.gone.get() {
            self.dirty.borrow_mut().push(Rc::clone(page));
        }
        page.set(slot, value, journaled);
    }

    /// Forgets all pages of a tree (its layer is gone).
    pub fn forget_tree(&self, tree: u64) {
        self.pages.borrow_mut().retain(|key, page| {
            page.gone.set(page.gone.get() || key.tree == tree);
            key.tree != tree
        });
        self.clock.borrow_mut().retain(|page| !page.gone.get());
        self.dirty.borrow_mut().retain(|page| page.key.tree != tree);
    }

    /// A page from memory or from the medium. Every page was written once before anything referred to it, so finding
    /// no valid slot is damage.
    pub async fn load(&self, media: &MediaSet, key: PageKey, address: u64) -> Result<Rc<Page>, DiskError> {
        let _loading = loop {
            if let Some(page) = self.cached(key) {
                return Ok(page);
            }
            let others = self.loading.borrow().get(&key).cloned();
            match others {
                None => break Loading::begin(self, key),
                Some(done) => done.until(|| (!self.loading.borrow().contains_key(&key)).then_some(())).await,
            }
        };
        let page = Rc::new(read_page(media, key, address).await?);
        self.insert(&page);
        Ok(page)
    }

    /// Lets go of clean pages that nobody used lately.
    fn make_room(&self) {
        let (mut pages, mut clock) = (self.pages.borrow_mut(), self.clock.borrow_mut());
        for _ in 0..MOST_LOOKS {
            if pages.len() < self.limit {
                return;
            }
            let Some(page) = clock.pop_front() else { return };
            // Held by the map and by the clock; whoever else holds it uses it.
            let used = Rc::strong_count(&page) > 2 || page.recently_used.replace(false);
            if page.dirty.get() || used {
                clock.push_back(page);
            } else {
                pages.remove(&page.key);
            }
        }
    }

    /// The pages that a checkpoint has to write.
    pub fn take_dirty(&self) -> Vec<Rc<Page>> {
        let list = std::mem::take(&mut *self.dirty.borrow_mut());
        list.iter().for_each(|p| p.dirty.set(false));
        list
    }

    /// Gives pages back that could not be written.
    pub fn give_back(&self, list: Vec<Rc<Page>>) {
        let mut dirty = self.dirty.borrow_mut();
        for page in list {
            if !page.gone.get() && !page.dirty.replace(true) {
                dirty.push(page);
            }
        }
    }

    /// Writes a page to its older slot. `undo` lists (slot, old value) of changes that are not durable in the
    /// journal, newest first: they must not be on the medium before their record.
    pub async fn write(
        &self,
        media: &MediaSet,
        page: &Page,
        undo: impl Iterator<Item = (usize, u64)>,
    ) -> Result<(), DiskError> {
        if page.gone.get() {
            return Ok(());
        }
        let mut entries = [0; PAGE_ENTRIES];
        entries.iter_mut().zip(page.entries.iter()).for_each(|(value, cell)| *value = cell.get());
        if page.unjournaled.get() > 0 {
            undo.for_each(|(slot, old)| entries[slot] = old);
        }
        let (generation, slot) = (page.generation.get() + 1, 1 - page.newest_slot.get());
        let mut bytes = Buffer::zeroed(PAGE_BYTES);
        encode_page(page.key, page.address, generation, &entries, &mut bytes);
        let at = page.address * PAIR_BYTES + slot * PAGE_BYTES as u64;
        media.write(at, &Segments::new(&bytes), Safe::AtNextFlush).await?;
        page.generation.set(generation);
        page.newest_slot.set(slot);
        Ok(())
    }

    /// A page has changes whose record is not durable.
    pub fn has_unjournaled(page: &Page) -> bool {
        page.unjournaled.get() > 0
    }
}

/// Somebody reads a page; when that is over, those who wait for it look again.
struct Loading<'a> {
    cache: &'a PageCache,
    key: PageKey,
}

impl<'a> Loading<'a> {
    fn begin(cache: &'a PageCache, key: PageKey) -> Self {
        cache.loading.borrow_mut().insert(key, Rc::default());
        Self { cache, key }
    }
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        if let Some(waiters) = self.cache.loading.borrow_mut().remove(&self.key) {
            waiters.wake_all();
        }
    }
}

/// Reads both copies of a page; the newer whole one counts.
async fn read_page(media: &MediaSet, key: PageKey, address: u64) -> Result<Page, DiskError> {
    if address >= 1 << 35 {
        let what = "a map refers to a page outside of the pool";
        return Err(DiskError::Medium(MediumFault { at: Sector(0), what }));
    }
    let mut bytes = Buffer::for_overwrite(PAIR_BYTES as usize);
    media.read(address * PAIR_BYTES, &SegmentsMut::new(&mut bytes)).await?;
    let mut best: Option<(u64, u64, Box<[u64; PAGE_ENTRIES]>)> = None;
    for (slot, bytes) in bytes.chunks(PAGE_BYTES).enumerate() {
        if let Some((generation, entries)) = decode_page(key, address, bytes)
            && best.as_ref().is_none_or(|b| b.0 < generation)
        {
            best = Some((generation, slot as u64, entries));
        }
    }
    let Some((generation, slot, entries)) = best else {
        let at = Sector(address * PAIR_BYTES / 512);
        return Err(DiskError::Medium(MediumFault { at, what: "both copies of a map page are damaged" }));
    };
    let entries = (entries as Box<[u64]>).into_vec().into_iter().map(Cell::new).collect();
    let page = Page::of(key, address, entries);
    page.generation.set(generation);
    page.newest_slot.set(slot);
    Ok(page)
}
