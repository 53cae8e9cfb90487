//! A pool: media, maps, catalog and journal together; how changes become durable.
//!
//! The order (docs/formats/pool.md): data, flush, journal record, flush, answer. A flush without changed metadata is
//! one flush of the media. Flushes that wait for each other share one commit.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::rc::{Rc, Weak};

use block::{Buffer, DiskError, Safe, Segments};
use lane::sync::{Turn, Waiters};
use uuid::Uuid;
use zerocopy::IntoBytes;

use crate::boundary::Boundaries;
use crate::catalog::{Catalog, Put};
use crate::format::{GRAIN_BYTES, HEAD_AT, Head};
use crate::journal::{Batch, Full, Op, Ring};
use crate::lun::Lun;
use crate::media_set::MediaSet;
use crate::merge::{Merging, Way};
use crate::pages::{FastMap, Page, PageCache};
use crate::read::Resolved;
use crate::show::Usage;
use crate::space::{Reserved, Space, bitmap_place};
use crate::squash::Noted;

/// Dirty pages that make a checkpoint worth while.
const DIRTY_MOST: usize = 4096;

/// A pool that is open. Belongs to one lane.
pub struct Pool {
    pub(crate) media: MediaSet,
    pub(crate) pages: PageCache,
    pub(crate) space: Space,
    /// What is known, changes that are not durable included.
    pub(crate) catalog: RefCell<Catalog>,
    /// The same without what is not durable: what a checkpoint writes.
    durable: RefCell<Catalog>,
    pub(crate) batch: RefCell<Batch>,
    /// Old values of the batch that is on its way to the journal.
    in_flight: RefCell<Vec<(Rc<Page>, usize, u64)>>,
    ring: Cell<Ring>,
    /// The ring, and the grains in use, as of the last durable record.
    durable_ring: Cell<Ring>,
    durable_used: Cell<u64>,
    head: RefCell<Head>,
    /// Slot of the newest head on medium 0.
    head_slot: Cell<usize>,
    uuid: Uuid,
    halted: Cell<bool>,
    read_only: bool,
    commits: Commits,
    checkpoint: Turn,
    checkpoint_wanted: Cell<bool>,
    pub(crate) tree_turn: Turn,
    /// One at a time works in the background.
    pub(crate) tidy_turn: Turn,
    /// The merge that began.
    pub(crate) merging: Cell<Option<Merging>>,
    /// The background changed something that it did not commit.
    pub(crate) unsaved: Cell<bool>,
    /// Which way layers are merged, whatever is shorter; tests choose.
    pub(crate) merge_way: Cell<Option<Way>>,
    /// The trash is being emptied because room is needed.
    pub(crate) making_room: Cell<bool>,
    /// What frozen chains say.
    pub(crate) resolved: Resolved,
    /// Rises whenever an entry moves from one layer to another.
    pub(crate) moves: Cell<u64>,
    /// Rises whenever the chain of some LUN changes: what was resolved before has to be looked up again.
    pub(crate) chains: Cell<u64>,
    /// Rises whenever the catalog changes.
    pub(crate) catalog_changes: Cell<u64>,
    /// Entries that took a grain over from a layer below, until that is durable: till then a power loss shows what is
    /// in the grain through the layer below, with its marks. How many batches speak of each.
    taken_over: RefCell<FastMap<(u64, u64), u32>>,
    /// What layers take.
    pub(crate) usage: Usage,
    /// Layers kept for their marks alone.
    pub(crate) boundaries: Boundaries,
    /// Grains to be looked at when guests have left them alone.
    pub(crate) noted: Noted,
    /// Grains that somebody took, gave up or moved while a repair looks for leaks: they are none.
    pub(crate) moving: RefCell<Option<HashSet<u32>>>,
    /// One at a time punches.
    pub(crate) punch_turn: Turn,
    /// Freed grains are not given back: not wanted, or a medium does not take them.
    pub(crate) punching_refused: Cell<bool>,
    /// Reads and writes of guests since it was opened: whether background work is in somebody's way.
    pub(crate) guest_operations: Cell<u64>,
    /// Of these, the ones that background work has seen.
    pub(crate) seen_guests: Cell<u64>,
    pub(crate) luns: RefCell<HashMap<u64, Weak<Lun>>>,
    /// The pool itself, for tasks it starts.
    pub(crate) me: Weak<Pool>,
}

/// Flushes that share commits: whoever comes while one runs is served by the next.
#[derive(Default)]
struct Commits {
    begun: Cell<u64>,
    ended: Cell<u64>,
    running: Cell<bool>,
    waiters: Waiters,
}

/// What a checkpoint writes, taken at one instant.
struct Checkpoint {
    catalog: Vec<u8>,
    ring: Ring,
    next_id: u64,
    used: u64,
}

impl Pool {
    pub(crate) fn assemble(
        media: MediaSet,
        head: Head,
        head_slot: usize,
        catalog: Catalog,
        ring: Ring,
        used: u64,
        options: &crate::open::Options,
    ) -> Rc<Self> {
        let space = Space::new(media.grains(), used, head.search_from.get());
        Rc::new_cyclic(|me| Self {
            uuid: Uuid::from_bytes(head.pool),
            media,
            pages: PageCache::new(options.cache_pages),
            space,
            durable: RefCell::new(catalog.clone()),
            catalog: RefCell::new(catalog),
            batch: RefCell::default(),
            in_flight: RefCell::default(),
            ring: Cell::new(ring),
            durable_ring: Cell::new(ring),
            durable_used: Cell::new(used),
            head: RefCell::new(head),
            head_slot: Cell::new(head_slot),
            halted: Cell::new(false),
            read_only: options.read_only,
            commits: Commits::default(),
            checkpoint: Turn::new(),
            checkpoint_wanted: Cell::new(false),
            tree_turn: Turn::new(),
            tidy_turn: Turn::new(),
            merging: Cell::new(None),
            unsaved: Cell::new(false),
            merge_way: Cell::new(None),
            making_room: Cell::new(false),
            resolved: Resolved::new(options.cache_pages / 8),
            moves: Cell::new(0),
            chains: Cell::new(1),
            catalog_changes: Cell::new(1),
            taken_over: RefCell::default(),
            usage: Usage::default(),
            boundaries: Boundaries::default(),
            noted: Noted::new(),
            moving: RefCell::default(),
            punch_turn: Turn::new(),
            punching_refused: Cell::new(!options.punch),
            guest_operations: Cell::new(0),
            seen_guests: Cell::new(0),
            luns: RefCell::default(),
            me: Weak::clone(me),
        })
    }

    /// Identity of the pool.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// Its name.
    pub fn name(&self) -> String {
        self.catalog.borrow().name.clone()
    }

    /// A flush or metadata write failed: nothing more is written until it is opened again.
    pub fn is_halted(&self) -> bool {
        self.halted.get()
    }

    /// Opened for reading only.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Refuses what changes something where nothing may be changed.
    #[inline]
    pub(crate) fn writable(&self) -> Result<(), DiskError> {
        if self.halted.get() {
            return Err(DiskError::Halted);
        }
        if self.read_only { Err(DiskError::ReadOnly) } else { Ok(()) }
    }

    /// Changes an entry of a page, in memory at once and durably with the next commit. The caller pushes the
    /// operation that says it to the journal.
    pub(crate) fn change_page(&self, page: &Rc<Page>, slot: usize, value: u64) {
        let old = page.get(slot);
        self.pages.mark_dirty(page, slot, value, false);
        self.batch.borrow_mut().undo.push((Rc::clone(page), slot, old));
    }

    /// A reserved grain becomes somebody's, with the next commit.
    pub(crate) fn take_grain(&self, reserved: Reserved) {
        if let Some((_, _, word, bit)) = bitmap_place(&self.media, u64::from(reserved.grain)) {
            let value = reserved.page.get(word) | 1 << bit;
            self.change_page(&reserved.page, word, value);
            self.space.taken(reserved.grain);
            self.is_moving(reserved.grain);
            self.batch.borrow_mut().push(Op::Used { first: reserved.grain, count: 1 });
        }
    }

    /// A grain gets another owner: whoever looks for leaks now may have missed it.
    #[inline]
    pub(crate) fn is_moving(&self, grain: u32) {
        if let Some(moving) = &mut *self.moving.borrow_mut() {
            moving.insert(grain);
        }
    }

    /// The bitmap page of a grain; to be had before [`Pool::free_grain`].
    pub(crate) async fn bitmap_page(&self, grain: u32) -> Result<Rc<Page>, DiskError> {
        let (key, pair, ..) = bitmap_place(&self.media, u64::from(grain)).ok_or(DiskError::OutOfRange)?;
        self.pages.load(&self.media, key, pair).await
    }

    /// A grain is nobody's from the next commit on. The page comes from [`Pool::bitmap_page`].
    pub(crate) fn free_grain(&self, grain: u32, page: &Rc<Page>) {
        let Some((_, _, word, bit)) = bitmap_place(&self.media, u64::from(grain)) else { return };
        if page.get(word) >> bit & 1 == 0 {
            return; // free already: the checker tells
        }
        self.change_page(page, word, page.get(word) & !(1 << bit));
        self.space.page_has_room(page.key);
        self.space.freed(grain);
        let mut batch = self.batch.borrow_mut();
        batch.push(Op::Free { first: grain, count: 1 });
        batch.freed.push(grain);
    }

    /// An entry takes a grain over from a layer below, with the next commit.
    pub(crate) fn take_over(&self, layer: u64, grain: u64) {
        *self.taken_over.borrow_mut().entry((layer, grain)).or_default() += 1;
        self.batch.borrow_mut().taken_over.push((layer, grain));
    }

    fn have_taken_over(&self, places: &[(u64, u64)]) {
        let mut waiting = self.taken_over.borrow_mut();
        for place in places {
            if let Some(count) = waiting.get_mut(place) {
                *count -= 1;
                if *count == 0 {
                    waiting.remove(place);
                }
            }
        }
    }

    /// The entry has a grain that it took over, and that is not durable.
    pub(crate) fn is_taking_over(&self, layer: u64, grain: u64) -> bool {
        self.taken_over.borrow().contains_key(&(layer, grain))
    }

    /// Changes the catalog, in memory at once and durably with the next commit.
    pub(crate) fn put(&self, put: Put) {
        self.catalog_changes.set(self.catalog_changes.get() + 1);
        match &put {
            Put::Layer(new) if new.root == 0 && !self.catalog.borrow().layers.contains_key(&new.id) => {
                self.usage.begin(new.id);
            }
            Put::DropLayer(layer) => self.usage.end(*layer),
            _ => {}
        }
        self.catalog.borrow_mut().put(put.clone());
        self.batch.borrow_mut().push(Op::Put(put));
    }

    /// After a power loss now, others than `above` would see what this layer holds: by a name, a hold, or through
    /// another layer.
    pub(crate) fn is_needed_durably(&self, layer: u64, above: u64) -> bool {
        let durable = self.durable.borrow();
        crate::tidy::named(&durable).contains(&layer)
            || durable.holds.values().any(|h| h.layer == layer)
            || durable.children(layer).any(|l| l.id != above)
    }

    /// The next number for a LUN, layer or snapshot.
    pub(crate) fn next_id(&self) -> u64 {
        let mut catalog = self.catalog.borrow_mut();
        catalog.next_id += 1;
        catalog.next_id - 1
    }

    /// So many changes wait that whoever adds more should commit first.
    pub(crate) fn batch_is_full(&self) -> bool {
        self.batch.borrow().ops.len() as u64 >= (self.ring.get().most() / 64).min(16384)
    }

    /// Changes are not durable yet.
    pub(crate) fn has_pending(&self) -> bool {
        self.commits.running.get() || !self.batch.borrow().is_empty()
    }

    /// Makes everything durable that returned before: data, then what says where it is.
    pub async fn commit(&self) -> Result<(), DiskError> {
        if self.halted.get() {
            return Err(DiskError::Halted);
        }
        let mine = self.commits.begun.get() + 1;
        loop {
            if self.commits.ended.get() >= mine {
                return if self.halted.get() { Err(DiskError::Halted) } else { Ok(()) };
            }
            if self.commits.running.get() {
                let (commits, seen) = (&self.commits, self.commits.ended.get());
                commits
                    .waiters
                    .until(|| (commits.ended.get() != seen || !commits.running.get()).then_some(()))
                    .await;
                continue;
            }
            self.commits.running.set(true);
            self.commits.begun.set(self.commits.begun.get() + 1);
            let answer = self.commit_once().await;
            self.commits.ended.set(self.commits.begun.get());
            self.commits.running.set(false);
            if answer.is_err() {
                self.halted.set(true);
            }
            self.commits.waiters.wake_all();
            answer?;
        }
    }

    async fn commit_once(&self) -> Result<(), DiskError> {
        if self.halted.get() {
            return Err(DiskError::Halted);
        }
        let batch = std::mem::take(&mut *self.batch.borrow_mut());
        let used = self.space.used();
        let Batch { mut ops, undo, freed, taken_over } = batch;
        *self.in_flight.borrow_mut() = undo;
        if !crate::faults::planted(crate::faults::Fault::NoFlushBeforeJournal) || ops.is_empty() {
            self.media.flush().await?;
        }
        if ops.is_empty() {
            return Ok(());
        }
        ops.push(Op::Usage(used));
        self.write_record(&ops).await?;
        // Durable. What follows is memory only.
        for (page, ..) in self.in_flight.borrow_mut().drain(..) {
            page.journaled();
        }
        {
            let mut durable = self.durable.borrow_mut();
            for op in ops {
                match op {
                    Op::Put(put) => durable.put(put),
                    Op::Node { layer, level, pair, .. } => durable.node(layer, level, pair),
                    _ => {}
                }
            }
        }
        self.durable_used.set(used);
        self.durable_ring.set(self.ring.get());
        self.space.free_later(freed);
        self.have_taken_over(&taken_over);
        self.make_room_early();
        let ring = self.ring.get();
        if ring.used() > ring.bytes / 4 || self.pages.counts().1 > DIRTY_MOST {
            self.begin_checkpoint();
        }
        Ok(())
    }

    /// Writes the operations as one record and flushes. More than a record holds goes into several, which are not
    /// one unit: [`Pool::batch_is_full`] keeps batches far below that.
    async fn write_record(&self, ops: &[Op]) -> Result<(), DiskError> {
        let record = self.ring.get().record(self.uuid.into_bytes(), ops);
        if record.len() as u64 > self.ring.get().most() && ops.len() > 1 {
            let (first, second) = ops.split_at(ops.len() / 2);
            Box::pin(self.write_record(first)).await?;
            return Box::pin(self.write_record(second)).await;
        }
        let place = loop {
            let mut ring = self.ring.get();
            if let Ok(place) = ring.take(record.len() as u64) {
                self.ring.set(ring);
                break place;
            }
            self.make_journal_room(record.len() as u64).await?;
        };
        self.media.write(place, &Segments::new(&record), Safe::AtNextFlush).await?;
        self.media.flush().await
    }

    /// Waits for the checkpoint under way, or makes one; none of them needs a commit.
    async fn make_journal_room(&self, length: u64) -> Result<(), DiskError> {
        let _turn = self.checkpoint.take().await;
        if self.halted.get() {
            return Err(DiskError::Halted);
        }
        if self.ring.get().take(length).is_ok() {
            return Ok(());
        }
        self.write_checkpoint(self.take_checkpoint()).await?;
        self.ring.get().take(length).map(drop).map_err(|Full| DiskError::NoSpace)
    }

    fn take_checkpoint(&self) -> Checkpoint {
        let durable = self.durable.borrow();
        Checkpoint {
            catalog: durable.encode(),
            ring: self.durable_ring.get(),
            next_id: durable.next_id,
            used: self.durable_used.get(),
        }
    }

    /// Starts a checkpoint in the background, from the state as it is durable now.
    fn begin_checkpoint(&self) {
        if self.checkpoint_wanted.replace(true) {
            return;
        }
        let (Some(pool), taken) = (self.me.upgrade(), self.take_checkpoint()) else { return };
        drop(lane::spawn(async move {
            let turn = pool.checkpoint.take().await;
            pool.checkpoint_wanted.set(false);
            if pool.halted.get() {
                return;
            }
            if let Err(error) = pool.write_checkpoint(taken).await {
                tracing::error!(pool = %pool.uuid, %error, "a checkpoint failed: the pool takes no more writes");
                pool.halted.set(true);
            }
            drop(turn);
        }));
    }

    /// Writes all dirty pages in their journaled state and the catalog, flushes, and lets the head say that replay
    /// begins after them.
    async fn write_checkpoint(&self, taken: Checkpoint) -> Result<(), DiskError> {
        let head_sequence = self.head.borrow().journal_sequence.get();
        if taken.ring.sequence <= head_sequence {
            return Ok(()); // a later one was written already
        }
        // No place of a page that is on its way is given to somebody else.
        let _under_way = self.space.under_way();
        let dirty = self.pages.take_dirty();
        for page in &dirty {
            let undo: Vec<(usize, u64)> = match PageCache::has_unjournaled(page) {
                false => Vec::new(),
                true => {
                    let (batch, in_flight) = (self.batch.borrow(), self.in_flight.borrow());
                    let all = batch.undo.iter().rev().chain(in_flight.iter().rev());
                    all.filter(|(p, ..)| Rc::ptr_eq(p, page)).map(|(_, slot, old)| (*slot, *old)).collect()
                }
            };
            if !undo.is_empty() {
                // What was undone is not on the medium: the page stays dirty.
                self.pages.give_back(vec![Rc::clone(page)]);
            }
            self.pages.write(&self.media, page, undo.into_iter()).await?;
        }
        let mut head = self.head.borrow().clone();
        let slot = 1 - head.catalog_slot.get().min(1);
        let mut bytes = Buffer::zeroed(taken.catalog.len().next_multiple_of(4096));
        bytes[..taken.catalog.len()].copy_from_slice(&taken.catalog);
        if bytes.len() as u64 > head.catalog_bytes.get() {
            return Err(DiskError::NoSpace);
        }
        let at = head.catalog_at[slot as usize].get();
        self.media.write(at, &Segments::new(&bytes), Safe::AtNextFlush).await?;
        self.media.flush().await?;
        head.catalog_slot = slot.into();
        head.catalog_crc = crc32c::crc32c(&taken.catalog).into();
        head.catalog_length = (taken.catalog.len() as u64).into();
        head.journal_start = taken.ring.end.into();
        head.journal_sequence = taken.ring.sequence.into();
        head.next_id = taken.next_id.into();
        head.used_grains = taken.used.into();
        head.search_from = self.space.cursor().into();
        self.write_head(head).await?;
        let ring = self.ring.get();
        self.ring.set(Ring { freed: taken.ring.written, ..ring });
        Ok(())
    }

    async fn write_head(&self, mut head: Head) -> Result<(), DiskError> {
        let slot = 1 - self.head_slot.get();
        head.sequence = (head.sequence.get() + 1).into();
        head.seal();
        let mut bytes = Buffer::zeroed(head.as_bytes().len());
        bytes.copy_from_slice(head.as_bytes());
        self.media.write(HEAD_AT[slot], &Segments::new(&bytes), Safe::OnReturn).await?;
        self.media.flush().await?;
        *self.head.borrow_mut() = head;
        self.head_slot.set(slot);
        Ok(())
    }

    /// Commits, and brings everything to its place, so that the next open has nothing to replay.
    pub async fn settle(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Ok(());
        }
        self.commit().await?;
        let _turn = self.checkpoint.take().await;
        let taken = self.take_checkpoint();
        let answer = self.write_checkpoint(taken).await;
        if answer.is_err() {
            self.halted.set(true);
        }
        answer
    }

    /// What every medium takes without a copy.
    pub(crate) fn memory_align(&self) -> u32 {
        self.media.list.iter().map(|m| m.disk.shape().memory_align).max().unwrap_or(1)
    }

    /// Commits begun since it was opened: whether something may have changed.
    pub(crate) fn commits_begun(&self) -> u64 {
        self.commits.begun.get()
    }

    /// The chain of some LUN changed.
    pub(crate) fn chains_changed(&self) {
        self.chains.set(self.chains.get() + 1);
    }

    pub(crate) fn ring(&self) -> Ring {
        self.ring.get()
    }

    /// Replay has come to the end of the journal: what is in memory is what is durable.
    pub(crate) fn replayed(&self, ring: Ring) {
        self.ring.set(ring);
        self.durable_ring.set(ring);
        self.durable_used.set(self.space.used());
        self.durable.borrow_mut().clone_from(&self.catalog.borrow());
    }

    /// Numbers for `pool show` and metrics.
    pub fn info(&self) -> PoolInfo {
        let (cached_pages, dirty_pages) = self.pages.counts();
        let catalog = self.catalog.borrow();
        PoolInfo {
            uuid: self.uuid,
            name: catalog.name.clone(),
            bytes: self.space.grains() * GRAIN_BYTES,
            used_bytes: (self.space.used() + self.space.busy()) * GRAIN_BYTES,
            media: self.media.list.len(),
            luns: catalog.luns.values().filter(|l| l.trashed.is_none()).count(),
            snapshots: catalog.snapshots.len(),
            cached_pages,
            dirty_pages,
            cache_limit_pages: self.pages.limit,
            journal_bytes: self.ring.get().bytes,
            journal_used_bytes: self.ring.get().used(),
            halted: self.halted.get(),
        }
    }
}

/// See [`Pool::info`].
#[derive(Clone, Debug)]
pub struct PoolInfo {
    /// Identity.
    pub uuid: Uuid,
    /// Name.
    pub name: String,
    /// Length of all media.
    pub bytes: u64,
    /// Of these, in use (metadata too).
    pub used_bytes: u64,
    /// Number of media.
    pub media: usize,
    /// Living LUNs.
    pub luns: usize,
    /// Snapshots.
    pub snapshots: usize,
    /// Map pages of 4 KiB in memory.
    pub cached_pages: usize,
    /// Of these, not yet at their place.
    pub dirty_pages: usize,
    /// Most clean pages kept.
    pub cache_limit_pages: usize,
    /// Length of the journal.
    pub journal_bytes: u64,
    /// Of this, needed by the next open.
    pub journal_used_bytes: u64,
    /// Takes no more writes.
    pub halted: bool,
}
