//! Which grains are free. A bit per grain (1: used) in pages at a fixed place of each medium.
//!
//! A grain is **busy** while it must not be given out although its bit is clear: it is reserved by somebody whose
//! data is on its way, or it was freed and the record that frees it is not durable yet, or somebody who began before
//! may still read or write it.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::hash::BuildHasherDefault;
use std::ops::Range;
use std::rc::Rc;

use block::DiskError;
use lane::sync::Waiters;

use crate::faults::{Fault, planted};
use crate::format::{BITMAP_GRAINS, BITMAP_TREE, GRAIN_PAIRS, PageKey};
use crate::media_set::MediaSet;
use crate::pages::{Mix, Page, PageCache};

/// What a grain is wanted for. A pool that fills up refuses in the order from the last to the first.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// Map pages: without them nothing can be written.
    Map,
    /// A guest's write.
    Guest,
    /// A new snapshot or clone.
    Cut,
    /// Squash, merge, mirror copies.
    Background,
}

impl Purpose {
    /// Grains that must stay free after this one, in a pool of `grains`.
    fn floor(self, grains: u64) -> u64 {
        match self {
            Self::Map => 0,
            Self::Guest => (grains / 1024).clamp(2, 256),
            Self::Cut => (grains / 256).clamp(4, 1024),
            Self::Background => (grains / 128).clamp(8, 4096),
        }
    }
}

/// A grain that belongs to nobody yet. Given up by [`Space::release`] or made somebody's by the pool.
pub struct Reserved {
    /// Its number.
    pub grain: u32,
    /// The bitmap page with its bit.
    pub page: Rc<Page>,
}

/// Runs of freed grains remembered for punching, at most; beyond that all free grains are punched, one time.
const MOST_STALE: usize = 1 << 14;
/// Grains punched at a time, at most.
const MOST_CLAIMED: u64 = 4096;

/// The free space of a pool.
pub struct Space {
    /// Grains in use, those of the system too. Kept exact through the journal.
    used: Cell<u64>,
    grains: u64,
    busy: RefCell<HashSet<u32, BuildHasherDefault<Mix>>>,
    /// Where the search for a free grain goes on.
    cursor: Cell<u64>,
    /// Bitmap pages (tree, index) without a free grain, as far as searches found out: they are not read again.
    full: RefCell<HashSet<(u64, u64), BuildHasherDefault<Mix>>>,
    epochs: RefCell<Epochs>,
    waiting: RefCell<VecDeque<(u64, Vec<u32>)>>,
    /// Runs (first, count) that were freed and may still hold something on the medium. What is in them may have been
    /// given out again.
    stale: RefCell<BTreeMap<u64, u64>>,
    /// More was freed than `stale` holds: all free grains from here on are to be punched.
    all_stale_from: Cell<Option<u64>>,
    /// Free grains that are being punched: not to be given out until that is done.
    claimed: Cell<(u64, u64)>,
    /// Rises with each claim that begins or ends.
    claims: Cell<u64>,
    unclaimed: Waiters,
}

/// Who is under way: counts by the epoch in which they began.
#[derive(Default)]
struct Epochs {
    first: u64,
    counts: VecDeque<u64>,
}

/// The key of the bitmap page that covers a grain, its pair, and the grain's bit: (page, pair, word, bit).
pub fn bitmap_place(media: &MediaSet, grain: u64) -> Option<(PageKey, u64, usize, u32)> {
    let number = media.medium_of(grain)?;
    let medium = &media.list[number];
    let local = grain - medium.first;
    let (index, inside) = (local / BITMAP_GRAINS, local % BITMAP_GRAINS);
    let key = PageKey { tree: BITMAP_TREE | number as u64, level: 0, index };
    let pair = (medium.first + medium.bitmap_grain) * GRAIN_PAIRS + index;
    Some((key, pair, (inside / 64) as usize, (inside % 64) as u32))
}

impl Space {
    /// Free space of a pool with so many grains, of which `used` are in use. The search for free ones begins at
    /// `cursor`: any grain will do, but where the last search ended there is the least to look through.
    pub fn new(grains: u64, used: u64, cursor: u64) -> Self {
        Self {
            used: Cell::new(used),
            grains,
            busy: RefCell::default(),
            cursor: Cell::new(if cursor < grains { cursor } else { 0 }),
            full: RefCell::default(),
            epochs: RefCell::default(),
            waiting: RefCell::default(),
            stale: RefCell::default(),
            all_stale_from: Cell::new(None),
            claimed: Cell::new((0, 0)),
            claims: Cell::new(0),
            unclaimed: Waiters::new(),
        }
    }

    /// Grains in use.
    pub fn used(&self) -> u64 {
        self.used.get()
    }

    /// All grains.
    pub fn grains(&self) -> u64 {
        self.grains
    }

    /// Where the search for free grains goes on.
    pub fn cursor(&self) -> u64 {
        self.cursor.get()
    }

    /// Sets the number of used grains (replay).
    pub fn set_used(&self, used: u64) {
        self.used.set(used);
    }

    /// Grains reserved now, or freed and not yet to be given out.
    pub fn busy(&self) -> u64 {
        self.busy.borrow().len() as u64
    }

    /// A grain would be given out for this purpose.
    pub fn has_room(&self, purpose: Purpose) -> bool {
        self.used.get() + self.busy() + purpose.floor(self.grains) < self.grains
    }

    /// A free grain, reserved for the caller.
    pub async fn reserve(
        &self,
        media: &MediaSet,
        pages: &PageCache,
        purpose: Purpose,
    ) -> Result<Reserved, DiskError> {
        if !self.has_room(purpose) {
            return Err(DiskError::NoSpace);
        }
        loop {
            let before = self.claims.get();
            match self.search(media, pages).await {
                // What is being punched is free, and out of reach only for a moment.
                Err(DiskError::NoSpace) if self.claimed.get() != (0, 0) => {
                    let claimed = self.claimed.get();
                    self.unclaimed.until(|| (self.claimed.get() != claimed).then_some(())).await;
                }
                Err(DiskError::NoSpace) if self.claims.get() != before => {}
                other => return other,
            }
        }
    }

    async fn search(&self, media: &MediaSet, pages: &PageCache) -> Result<Reserved, DiskError> {
        let start = self.cursor.get();
        let mut at = start;
        loop {
            let Some((key, pair, word, bit)) = bitmap_place(media, at) else {
                at = 0; // past the last medium
                if start == 0 {
                    return Err(DiskError::NoSpace);
                }
                continue;
            };
            let medium = &media.list[(key.tree & !BITMAP_TREE) as usize];
            let page_first = medium.first + key.index * BITMAP_GRAINS;
            let page_end = (page_first + BITMAP_GRAINS).min(medium.first + medium.grains);
            let known_full = self.full.borrow().contains(&(key.tree, key.index));
            if !known_full {
                let page = pages.load(media, key, pair).await?;
                if let Some(grain) = self.find(&page, page_first, page_end, word, bit) {
                    self.busy.borrow_mut().insert(grain as u32);
                    self.cursor.set(grain + 1);
                    return Ok(Reserved { grain: grain as u32, page });
                }
                if is_full(&page, page_end - page_first) {
                    self.full.borrow_mut().insert((key.tree, key.index));
                }
            }
            let wrapped = at < start && page_end >= start;
            at = page_end;
            if wrapped || (start == 0 && page_end >= self.grains) {
                return Err(DiskError::NoSpace);
            }
        }
    }

    fn find(&self, page: &Page, first: u64, end: u64, word: usize, bit: u32) -> Option<u64> {
        let busy = self.busy.borrow();
        let (claimed, claimed_end) = self.claimed.get();
        let words = (end - first).div_ceil(64) as usize;
        for number in word..words {
            let mut free = !page.get(number);
            if number == word {
                free &= u64::MAX << bit;
            }
            while free != 0 {
                let grain = first + number as u64 * 64 + u64::from(free.trailing_zeros());
                let is_claimed = claimed <= grain && grain < claimed_end;
                if grain < end && grain != 0 && !is_claimed && !busy.contains(&(grain as u32)) {
                    return Some(grain);
                }
                free &= free - 1;
            }
        }
        None
    }

    /// Gives a reserved grain up.
    pub fn release(&self, reserved: Reserved) {
        self.busy.borrow_mut().remove(&reserved.grain);
    }

    /// The grain's bit was set: it is somebody's now.
    pub fn taken(&self, grain: u32) {
        self.busy.borrow_mut().remove(&grain);
        self.used.set(self.used.get() + 1);
    }

    /// A bit of this bitmap page is cleared.
    pub fn page_has_room(&self, key: PageKey) {
        self.full.borrow_mut().remove(&(key.tree, key.index));
    }

    /// The grain's bit was cleared; it stays busy until [`Space::free_later`] has run its course.
    pub fn freed(&self, grain: u32) {
        if planted(Fault::PunchAtOnce) {
            self.add_stale(u64::from(grain), 1);
        }
        if planted(Fault::ReuseAtOnce) {
            self.cursor.set(u64::from(grain));
        } else {
            self.busy.borrow_mut().insert(grain);
        }
        self.used.set(self.used.get().saturating_sub(1));
    }

    /// The record that frees these grains is durable: they may be given out as soon as everybody who is under way
    /// now has finished.
    pub fn free_later(&self, grains: Vec<u32>) {
        if grains.is_empty() {
            return;
        }
        let epoch = self.epochs.borrow_mut().next();
        self.waiting.borrow_mut().push_back((epoch, grains));
        self.free_now();
    }

    fn free_now(&self) {
        let oldest = self.epochs.borrow_mut().oldest();
        let (mut waiting, mut busy) = (self.waiting.borrow_mut(), self.busy.borrow_mut());
        while waiting.front().is_some_and(|(epoch, _)| *epoch <= oldest) {
            let grains = waiting.pop_front().map(|w| w.1).unwrap_or_default();
            for run in grains.chunk_by(|a, b| a + 1 == *b) {
                self.add_stale(u64::from(run[0]), run.len() as u64);
                for grain in run {
                    busy.remove(grain);
                }
            }
        }
    }

    /// Free grains whose place on the medium may still hold what was in them.
    pub fn add_stale(&self, first: u64, count: u64) {
        let mut stale = self.stale.borrow_mut();
        let (mut first, mut end) = (first, first + count);
        if let Some((before, length)) = stale.range(..=first).next_back().map(|(b, l)| (*b, *l))
            && before + length >= first
        {
            stale.remove(&before);
            (first, end) = (before, end.max(before + length));
        }
        if let Some(length) = stale.get(&end).copied() {
            stale.remove(&end);
            end += length;
        }
        if stale.len() < MOST_STALE {
            stale.insert(first, end - first);
        } else {
            self.all_stale_from.set(Some(0));
        }
    }

    /// There is something that [`Space::next_stale`] gives.
    pub fn has_stale(&self) -> bool {
        self.all_stale_from.get().is_some() || !self.stale.borrow().is_empty()
    }

    /// A run of grains to be punched as far as they are free.
    pub fn next_stale(&self) -> Option<(u64, u64)> {
        if let Some(run) = self.stale.borrow_mut().pop_first() {
            return Some(run);
        }
        let from = self.all_stale_from.get()?;
        let count = BITMAP_GRAINS.min(self.grains - from.min(self.grains));
        self.all_stale_from.set((count > 0).then_some(from + count));
        (count > 0).then_some((from, count))
    }

    /// Takes the first run of free grains in `within` out of reach for everybody else. `page` is the bitmap page that
    /// covers them, `first` its first grain.
    pub fn claim(&self, page: &Page, first: u64, within: Range<u64>) -> Option<Claimed<'_>> {
        let busy = self.busy.borrow();
        let free = |grain: &u64| {
            let local = grain - first;
            let bit = page.get((local / 64) as usize) >> (local % 64) & 1;
            bit == 0 && (!busy.contains(&(*grain as u32)) || planted(Fault::PunchAtOnce))
        };
        let begin = within.clone().find(free)?;
        let end = (begin..within.end.min(begin + MOST_CLAIMED)).find(|g| !free(g));
        let run = (begin, end.unwrap_or(within.end.min(begin + MOST_CLAIMED)));
        self.claimed.set(run);
        self.claims.set(self.claims.get() + 1);
        Some(Claimed { space: self, run })
    }

    /// Announces somebody who looks places up and then uses them; to be held until done.
    #[inline]
    pub fn under_way(&self) -> UnderWay<'_> {
        UnderWay { space: self, epoch: self.epochs.borrow_mut().enter() }
    }
}

/// Every bit of a bitmap page is set, for as many grains as there are.
fn is_full(page: &Page, grains: u64) -> bool {
    (0..grains.div_ceil(64)).all(|word| {
        let bits = (grains - word * 64).min(64);
        page.get(word as usize) | u64::MAX.checked_shl(bits as u32).unwrap_or(0) == u64::MAX
    })
}

impl Epochs {
    fn enter(&mut self) -> u64 {
        if self.counts.is_empty() {
            self.counts.push_back(0);
        }
        if let Some(last) = self.counts.back_mut() {
            *last += 1;
        }
        self.first + self.counts.len() as u64 - 1
    }

    fn leave(&mut self, epoch: u64) {
        let index = (epoch - self.first) as usize;
        self.counts[index] -= 1;
    }

    /// Begins a new epoch; its number.
    fn next(&mut self) -> u64 {
        self.counts.push_back(0);
        self.first + self.counts.len() as u64 - 1
    }

    /// Everybody under way began in this epoch or later.
    fn oldest(&mut self) -> u64 {
        while self.counts.len() > 1 && self.counts.front() == Some(&0) {
            self.counts.pop_front();
            self.first += 1;
        }
        self.first
    }
}

/// See [`Space::claim`].
pub struct Claimed<'a> {
    space: &'a Space,
    run: (u64, u64),
}

impl Claimed<'_> {
    /// The first grain.
    pub fn first(&self) -> u64 {
        self.run.0
    }

    /// The grain behind the last.
    pub fn end(&self) -> u64 {
        self.run.1
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.run.1 - self.run.0
    }
}

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        self.space.claimed.set((0, 0));
        self.space.claims.set(self.space.claims.get() + 1);
        self.space.unclaimed.wake_all();
    }
}

/// See [`Space::under_way`].
pub struct UnderWay<'a> {
    space: &'a Space,
    epoch: u64,
}

impl Drop for UnderWay<'_> {
    #[inline]
    fn drop(&mut self) {
        self.space.epochs.borrow_mut().leave(self.epoch);
        if !self.space.waiting.borrow().is_empty() {
            self.space.free_now();
        }
    }
}
