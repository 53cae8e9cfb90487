//! A LUN: a thin disk made of layers. Reading and writing what the top layer holds already is one look at its map
//! and one operation on a medium.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::rc::Rc;

use block::{
    BLOCK_SECTORS, Disk, DiskError, Extents, Gate, Generation, Io, Safe, Sector, Segments, SegmentsMut,
    Shape, check_range,
};
use lane::sync::Waiters;
use uuid::Uuid;

use crate::faults::{Fault, planted};
use crate::format::{Entry, GRAIN_BLOCKS, GRAIN_BYTES, GRAIN_SECTORS, Mark};
use crate::pages::{FastMap, Page};
use crate::pool::Pool;
use crate::space::{Purpose, Reserved};

pub(crate) const BLOCK: usize = block::BLOCK_BYTES as usize;

/// A LUN that is open.
pub struct Lun {
    pub(crate) pool: Rc<Pool>,
    /// Number within the pool.
    pub id: u64,
    uuid: Uuid,
    pub(crate) sectors: Cell<u64>,
    gate: Rc<Gate>,
    /// The layers from the top down, as of the pool's chain counter.
    pub(crate) chain: RefCell<(u64, Rc<[u64]>)>,
    /// Blocks that somebody fills or maps right now: whoever wants one of them waits.
    busy_blocks: RefCell<HashSet<u64>>,
    busy: Waiters,
    /// Writers whose blocks memory shows as written while the record that says so is not durable.
    marking: Cell<u32>,
    /// Grains that writers fill right now, by grain of the LUN: they are not given back meanwhile.
    filling: RefCell<FastMap<u64, Filling>>,
    /// A cut that happened and is not decided: flushes are not answered.
    pub(crate) undecided: Cell<u32>,
    pub(crate) decided: Waiters,
}

struct Filling {
    grain: u32,
    /// Not in the map yet.
    reserved: Option<Reserved>,
    writers: u32,
}

/// Part of a request that lies in one grain of the LUN.
#[derive(Copy, Clone)]
pub(crate) struct Part {
    /// Grain of the LUN.
    pub grain: u64,
    /// First sector in it.
    pub first: u64,
    /// Sectors.
    pub count: u64,
    /// Where the request's bytes for it begin.
    pub from: usize,
}

/// Where a LUN's writes go.
#[derive(Copy, Clone)]
pub(crate) struct Target {
    /// The layer.
    pub layer: u64,
    /// The top, if it is being folded into that layer: what it says of a grain goes there before a write does.
    pub over: Option<u64>,
}

pub(crate) fn parts(at: Sector, count: u64) -> impl Iterator<Item = Part> {
    let (mut next, end) = (at.0, at.0 + count);
    std::iter::from_fn(move || {
        (next < end).then(|| {
            let first = next % GRAIN_SECTORS;
            let part = Part {
                grain: next / GRAIN_SECTORS,
                first,
                count: (GRAIN_SECTORS - first).min(end - next),
                from: ((next - at.0) * 512) as usize,
            };
            next += part.count;
            part
        })
    })
}

impl Part {
    /// The blocks it touches, wholly or partly.
    pub fn blocks(&self) -> std::ops::Range<usize> {
        (self.first / BLOCK_SECTORS) as usize..((self.first + self.count).div_ceil(BLOCK_SECTORS)) as usize
    }

    /// The blocks it covers wholly.
    pub fn whole_blocks(&self) -> std::ops::Range<usize> {
        let first = self.first.div_ceil(BLOCK_SECTORS) as usize;
        first..(((self.first + self.count) / BLOCK_SECTORS) as usize).max(first)
    }

    fn bytes(&self) -> usize {
        (self.count * 512) as usize
    }
}

/// Every touched block is written in this entry: its data may be overwritten in place without touching the map.
#[inline]
fn all_written(entry: Entry, blocks: std::ops::Range<usize>) -> bool {
    let width = 2 * (blocks.end - blocks.start);
    let mask = (u64::MAX >> (64 - width)) << (32 + 2 * blocks.start);
    entry.0 & mask == 0x5555_5555_0000_0000 & mask
}

impl Lun {
    pub(crate) fn new(pool: Rc<Pool>, record: &crate::catalog::LunRecord) -> Rc<Self> {
        Rc::new(Self {
            pool,
            id: record.id,
            uuid: record.uuid,
            sectors: Cell::new(record.sectors),
            gate: Gate::new(),
            chain: RefCell::new((0, Rc::from([]))),
            busy_blocks: RefCell::default(),
            busy: Waiters::new(),
            marking: Cell::new(0),
            filling: RefCell::default(),
            undecided: Cell::new(0),
            decided: Waiters::new(),
        })
    }

    /// The pool it lies in.
    pub fn pool(&self) -> &Rc<Pool> {
        &self.pool
    }

    /// Its identity.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// Stands before every change of this LUN.
    pub fn gate(&self) -> Rc<Gate> {
        Rc::clone(&self.gate)
    }

    /// The layers from the top down.
    #[inline]
    pub(crate) fn layers(&self) -> Rc<[u64]> {
        let chains = self.pool.chains.get();
        {
            let chain = self.chain.borrow();
            if chain.0 == chains {
                return Rc::clone(&chain.1);
            }
        }
        let catalog = self.pool.catalog.borrow();
        let living = catalog.luns.get(&self.id).filter(|l| l.trashed.is_none());
        let top = living.map_or(0, |l| l.top);
        let layers: Rc<[u64]> = catalog.chain(top).map(|l| l.id).collect();
        *self.chain.borrow_mut() = (chains, Rc::clone(&layers));
        layers
    }

    fn check(&self, at: Sector, bytes: usize) -> Result<u64, DiskError> {
        let count = bytes as u64 / 512;
        check_range(self.sectors.get(), at, count)?;
        if !(bytes as u64).is_multiple_of(512) {
            return Err(DiskError::OutOfRange);
        }
        Ok(count)
    }

    /// Where writes go now. It stays so while the caller is inside the gate, but for a fold that ends.
    #[inline]
    pub(crate) fn target(&self) -> Result<Target, DiskError> {
        let top = self.layers().first().copied().ok_or(DiskError::Gone)?;
        Ok(match self.pool.folds_into(top) {
            None => Target { layer: top, over: None },
            Some(layer) => Target { layer, over: Some(top) },
        })
    }

    /// Writes in place if the layer holds every block already: the answer of the map, without waiting.
    #[inline]
    fn in_place(&self, target: Target, part: &Part) -> Option<u64> {
        if let Some(over) = target.over
            && self.pool.entry_now(over, part.grain)? != Entry::default()
        {
            return None;
        }
        let entry = self.pool.entry_now(target.layer, part.grain)?;
        if self.marking.get() > 0 && self.is_locked(part) {
            return None; // a copied block, perhaps, whose mark is on its way: wait for it
        }
        all_written(entry, part.blocks()).then(|| u64::from(entry.grain()) * GRAIN_BYTES + part.first * 512)
    }

    async fn write_now(&self, at: Sector, from: &Segments<'_>, safe: Safe) -> Result<(), DiskError> {
        let count = self.check(at, from.len())?;
        self.pool.writable()?;
        self.pool.guest_is_here();
        if count == 0 {
            return if safe == Safe::OnReturn { self.flush_now().await } else { Ok(()) };
        }
        let changed = {
            let _pass = match self.gate.try_enter() {
                Some(pass) => pass,
                None => self.gate.enter().await,
            };
            let target = self.target()?;
            if at.0 % GRAIN_SECTORS + count <= GRAIN_SECTORS {
                let part = Part { grain: at.0 / GRAIN_SECTORS, first: at.0 % GRAIN_SECTORS, count, from: 0 };
                self.write_part(target, part, from, safe).await?
            } else {
                self.write_parts(target, at, count, from, safe).await?
            }
        };
        // Written in place is not enough while the map that leads there is not durable.
        let pending = changed || self.undecided.get() > 0 || self.pool.has_pending();
        if safe == Safe::OnReturn && pending { self.flush_now().await } else { Ok(()) }
    }

    /// A request over several grains: runs that lie together are one operation, all at the same time.
    async fn write_parts(
        &self,
        target: Target,
        at: Sector,
        count: u64,
        from: &Segments<'_>,
        safe: Safe,
    ) -> Result<bool, DiskError> {
        let mut operations: Vec<Io<'_, bool>> = Vec::new();
        let mut run: Option<(u64, usize, usize)> = None;
        let in_place = |(byte, start, length): (u64, usize, usize)| -> Io<'_, bool> {
            Box::pin(async move {
                let _under_way = self.pool.space.under_way();
                self.pool.media.write(byte, &from.slice(start, length), safe).await.map(|()| false)
            })
        };
        for part in parts(at, count) {
            match (self.in_place(target, &part), &mut run) {
                (Some(byte), Some((first, _, length)))
                    if byte == *first + *length as u64 && self.pool.on_one_medium(*first, byte) =>
                {
                    *length += part.bytes();
                }
                (Some(byte), _) => {
                    operations.extend(run.replace((byte, part.from, part.bytes())).map(in_place));
                }
                (None, _) => {
                    operations.extend(run.take().map(in_place));
                    operations.push(Box::pin(async move {
                        let piece = from.slice(part.from, part.bytes());
                        self.write_part(target, Part { from: 0, ..part }, &piece, safe).await
                    }));
                }
            }
        }
        operations.extend(run.map(in_place));
        let mut changed = false;
        for answer in crate::media_set::together(operations).await {
            changed |= answer?;
        }
        Ok(changed)
    }

    /// Writes within one grain. True when the map changed.
    async fn write_part(
        &self,
        target: Target,
        part: Part,
        from: &Segments<'_>,
        safe: Safe,
    ) -> Result<bool, DiskError> {
        if let Some(byte) = self.in_place(target, &part) {
            let _under_way = self.pool.space.under_way();
            self.pool.media.write(byte, from, safe).await?;
            return Ok(false);
        }
        while self.pool.batch_is_full() {
            self.pool.commit().await?;
        }
        if !self.pool.space.has_room(Purpose::Guest) {
            self.pool.make_room().await?;
        }
        let leaf_number = crate::map::leaf_of(part.grain);
        let layer = match target.over {
            None => target.layer,
            Some(_) => self.pool.fold_grain(self, part.grain).await?,
        };
        let leaf = self.pool.leaf_for_write(layer, leaf_number.0).await?;
        let locked = self.lock_blocks(part.grain, part.blocks()).await;
        let entry = Entry(leaf.get(leaf_number.1));
        if all_written(entry, part.blocks()) {
            drop(locked);
            let _under_way = self.pool.space.under_way();
            let byte = u64::from(entry.grain()) * GRAIN_BYTES + part.first * 512;
            self.pool.media.write(byte, from, safe).await?;
            return Ok(false);
        }
        let (grain, entry) = self.grain_for_write(&leaf, &part).await?;
        if planted(Fault::MapBeforeData) {
            self.map_part(&leaf, &part, grain);
        }
        let answer = self.fill(&part, grain, entry, from).await;
        if answer.is_ok() {
            // Written: now the map may know.
            self.map_part(&leaf, &part, grain);
        }
        self.filled(part.grain);
        answer.map(|()| true)
    }

    /// The pool's grain that takes a part, as in [`Lun::grain_to_fill`], and the entry. None of the part's blocks is
    /// *copied* any more, durably: the first overwrite of one is a change, marked before its data can reach the medium.
    async fn grain_for_write(&self, leaf: &Rc<Page>, part: &Part) -> Result<(u32, Entry), DiskError> {
        let entry_now = || Entry(leaf.get(crate::map::leaf_of(part.grain).1));
        let copied = |entry: Entry| part.blocks().any(|b| entry.mark(b) == Mark::Copied);
        loop {
            if entry_now().grain() == 0 {
                self.move_up(leaf, part).await?;
            }
            let before = entry_now();
            // A grain that was taken over may still be read through the layer below, also where this one has zeroes.
            if copied(before) || self.pool.is_taking_over(leaf.key.tree, part.grain) {
                let mut entry = before;
                for block in part.blocks().filter(|b| before.mark(*b) == Mark::Copied) {
                    entry = entry.with_mark(block, Mark::Written);
                }
                self.pool.change_entry(leaf, part.grain, entry);
                if !planted(Fault::CopiedUnmarked) {
                    self.marking.set(self.marking.get() + 1);
                    let answer = self.pool.commit().await;
                    self.marking.set(self.marking.get() - 1);
                    answer?;
                }
            }
            let grain = self.grain_to_fill(part.grain, leaf).await?;
            let waits = copied(entry_now()) || self.pool.is_taking_over(leaf.key.tree, part.grain);
            if !waits || planted(Fault::CopiedUnmarked) {
                return Ok((grain, entry_now()));
            }
            // A neighbour in the same grain moved it up meanwhile.
            self.filled(part.grain);
        }
    }

    /// The map learns that the blocks of a part are written. Others may have changed the entry since it was read.
    fn map_part(&self, leaf: &Rc<Page>, part: &Part, grain: u32) {
        let mut entry = Entry(leaf.get(crate::map::leaf_of(part.grain).1));
        if entry.grain() == 0 {
            let reserved = self.filling.borrow_mut().get_mut(&part.grain).and_then(|f| f.reserved.take());
            if let Some(reserved) = reserved {
                self.pool.take_grain(reserved);
            }
            entry = entry.with_grain(grain);
        }
        for block in part.blocks() {
            entry = entry.with_mark(block, Mark::Written);
        }
        self.change_entry(leaf, part.grain, entry);
    }

    /// Changes an entry of the layer that takes the writes.
    fn change_entry(&self, leaf: &Rc<Page>, grain: u64, entry: Entry) {
        self.pool.change_entry(leaf, grain, entry);
        if self.layers().last() != Some(&leaf.key.tree) {
            self.pool.note(leaf.key.tree, grain, entry);
        }
    }

    /// Writers fill the pool's grain for this grain of the LUN right now.
    pub(crate) fn is_filling(&self, grain: u64) -> bool {
        self.filling.borrow().contains_key(&grain)
    }

    /// The grain of the pool that takes the data: the entry's, or one that writers share until the map knows it.
    /// Until [`Lun::filled`] nobody gives it back.
    async fn grain_to_fill(&self, grain: u64, leaf: &Page) -> Result<u32, DiskError> {
        let known = || {
            let mut filling = self.filling.borrow_mut();
            if let Some(found) = filling.get_mut(&grain) {
                found.writers += 1;
                return Some(found.grain);
            }
            let number = Entry(leaf.get(crate::map::leaf_of(grain).1)).grain();
            if number != 0 {
                filling.insert(grain, Filling { grain: number, reserved: None, writers: 1 });
            }
            Some(number).filter(|n| *n != 0)
        };
        if let Some(number) = known() {
            return Ok(number);
        }
        let pool = &self.pool;
        let reserved = pool.space.reserve(&pool.media, &pool.pages, Purpose::Guest).await?;
        // Somebody else may have been faster.
        if let Some(number) = known() {
            pool.space.release(reserved);
            return Ok(number);
        }
        let number = reserved.grain;
        let new = Filling { grain: number, reserved: Some(reserved), writers: 1 };
        self.filling.borrow_mut().insert(grain, new);
        Ok(number)
    }

    /// A writer is done with a grain; the last one gives it up if the map never took it.
    fn filled(&self, grain: u64) {
        let mut filling = self.filling.borrow_mut();
        let Some(found) = filling.get_mut(&grain) else { return };
        found.writers -= 1;
        if found.writers == 0
            && let Some(Filling { reserved: Some(reserved), .. }) = filling.remove(&grain)
        {
            self.pool.space.release(reserved);
        }
    }

    /// Puts the data of one part into its grain; blocks covered only partly, and not held yet, are filled from below.
    async fn fill(
        &self,
        part: &Part,
        grain: u32,
        entry: Entry,
        from: &Segments<'_>,
    ) -> Result<(), DiskError> {
        let _under_way = self.pool.space.under_way();
        let base = u64::from(grain) * GRAIN_BYTES;
        let whole = part.whole_blocks();
        let partial = |block: &usize| !whole.contains(block) && !entry.mark(*block).in_grain();
        let edges: Vec<usize> = part.blocks().filter(partial).collect();
        if edges.is_empty() {
            return self.pool.media.write(base + part.first * 512, from, Safe::AtNextFlush).await;
        }
        // At most two edges: read what is below, lay the new sectors over it, write whole blocks.
        let blocks = part.blocks();
        let start = blocks.start as u64 * BLOCK_SECTORS;
        let mut bytes = block::Buffer::zeroed((blocks.end - blocks.start) * BLOCK);
        for block in edges {
            let at = Sector(part.grain * GRAIN_SECTORS + block as u64 * BLOCK_SECTORS);
            let count = BLOCK_SECTORS.min(self.sectors.get().saturating_sub(at.0));
            let inside = (block - blocks.start) * BLOCK;
            let piece = SegmentsMut::new(&mut bytes[inside..inside + (count * 512) as usize]);
            self.pool.read_chain(&self.layers(), at, &piece).await?;
        }
        // Blocks that the grain holds already keep what the request does not cover: they are written by themselves.
        let skip = ((part.first - start) * 512) as usize;
        from.copy_to(0, &mut bytes[skip..skip + from.len()]);
        for block in blocks.clone() {
            let inside = (block - blocks.start) * BLOCK;
            let byte = base + block as u64 * BLOCK as u64;
            if entry.mark(block).in_grain() {
                let first = skip.max(inside);
                let last = (skip + from.len()).min(inside + BLOCK);
                let offset = byte + (first - inside) as u64;
                self.pool.media.write(offset, &Segments::new(&bytes[first..last]), Safe::AtNextFlush).await?;
            } else {
                let piece = Segments::new(&bytes[inside..inside + BLOCK]);
                self.pool.media.write(byte, &piece, Safe::AtNextFlush).await?;
            }
        }
        Ok(())
    }

    /// Somebody has locked a block of this part.
    fn is_locked(&self, part: &Part) -> bool {
        let (busy, first) = (self.busy_blocks.borrow(), part.grain * GRAIN_BLOCKS as u64);
        part.blocks().any(|block| busy.contains(&(first + block as u64)))
    }

    /// Waits until nobody else fills or maps any of these blocks, and keeps others out until dropped.
    pub(crate) async fn lock_blocks(&self, grain: u64, blocks: std::ops::Range<usize>) -> Locked<'_> {
        let first = grain * GRAIN_BLOCKS as u64;
        let range = first + blocks.start as u64..first + blocks.end as u64;
        self.busy
            .until(|| {
                let mut busy = self.busy_blocks.borrow_mut();
                if range.clone().any(|block| busy.contains(&block)) {
                    return None;
                }
                busy.extend(range.clone());
                Some(())
            })
            .await;
        Locked { lun: self, range }
    }

    async fn zero_now(&self, at: Sector, count: u64, may_free: bool) -> Result<(), DiskError> {
        check_range(self.sectors.get(), at, count)?;
        self.pool.writable()?;
        let _pass = self.gate.enter().await;
        let (mut next, end) = (at.0, at.0 + count);
        while next < end {
            let target = self.target()?;
            // Where no layer has anything there is nothing to hide.
            let leaf_sectors = crate::format::PAGE_ENTRIES as u64 * GRAIN_SECTORS;
            let last_leaf = end.div_ceil(leaf_sectors);
            let found = {
                let _under_way = self.pool.space.under_way();
                self.pool.next_leaf_of(&self.layers(), next / leaf_sectors, last_leaf).await?
            };
            let Some(leaf) = found else { break };
            next = next.max(leaf * leaf_sectors);
            let stop = ((leaf + 1) * leaf_sectors).min(end);
            for part in parts(Sector(next), stop.saturating_sub(next)) {
                self.zero_part(target, part, may_free).await?;
            }
            next = stop;
        }
        Ok(())
    }

    async fn zero_part(&self, target: Target, part: Part, may_free: bool) -> Result<(), DiskError> {
        // Zeroes for the sectors of blocks that are covered only partly.
        let whole = part.whole_blocks();
        let (first, end) = (part.first, part.first + part.count);
        let (head, tail) = match whole.is_empty() {
            true => (first..end, end..end),
            false => (first..whole.start as u64 * BLOCK_SECTORS, whole.end as u64 * BLOCK_SECTORS..end),
        };
        for edge in [head, tail] {
            if !edge.is_empty() {
                // The edge may touch two blocks when no block is covered wholly.
                let zeroes = block::Buffer::zeroed(((edge.end - edge.start) * 512) as usize);
                let edge =
                    Part { grain: part.grain, first: edge.start, count: edge.end - edge.start, from: 0 };
                self.write_part(target, edge, &Segments::new(&zeroes), Safe::AtNextFlush).await?;
            }
        }
        if whole.is_empty() {
            return Ok(());
        }
        while self.pool.batch_is_full() {
            self.pool.commit().await?;
        }
        let (leaf_number, slot) = crate::map::leaf_of(part.grain);
        let something = {
            let _under_way = self.pool.space.under_way();
            self.pool.any_entry(&self.layers(), part.grain).await?
        };
        if !something {
            return Ok(());
        }
        let layer = match target.over {
            None => target.layer,
            Some(_) => self.pool.fold_grain(self, part.grain).await?,
        };
        let leaf = self.pool.leaf_for_write(layer, leaf_number).await?;
        let _locked = self.lock_blocks(part.grain, whole.clone()).await;
        let old = Entry(leaf.get(slot));
        let page = match old.grain() {
            0 => None,
            grain => Some(self.pool.bitmap_page(grain).await?),
        };
        let old = Entry(leaf.get(slot));
        let mut entry = whole.clone().fold(old, |entry, block| entry.with_mark(block, Mark::Zeroed));
        let filling = self.is_filling(part.grain);
        if entry.grain() != 0
            && entry.holds_nothing()
            && may_free
            && !filling
            && let Some(page) = page
        {
            self.pool.free_grain(entry.grain(), &page);
            entry = entry.with_grain(0);
        }
        if self.layers().last() == Some(&layer) && entry.all(Mark::Zeroed) && entry.grain() == 0 {
            entry = Entry::default(); // nothing lies below that had to be hidden
        }
        self.change_entry(&leaf, part.grain, entry);
        if entry.grain() != 0 && whole.into_iter().any(|block| old.mark(block) == Mark::Copied) {
            // The next write to such a block goes to the same place, and must not find it *copied* after a power loss.
            self.pool.commit().await?;
        }
        Ok(())
    }

    pub(crate) async fn flush_now(&self) -> Result<(), DiskError> {
        self.pool.writable()?;
        self.pool.commit().await?;
        if self.undecided.get() > 0 {
            self.decided.until(|| (self.undecided.get() == 0 || self.pool.is_halted()).then_some(())).await;
            self.pool.commit().await?;
        }
        Ok(())
    }

    async fn compare_and_write_now(
        &self,
        at: Sector,
        expected: &Segments<'_>,
        new: &Segments<'_>,
    ) -> Result<(), DiskError> {
        assert_eq!(expected.len(), new.len(), "both sides of a compare-and-write are equally long");
        let count = self.check(at, new.len())?;
        self.pool.writable()?;
        // Alone with the LUN: nothing is under way, nothing comes in.
        let alone = self.gate.alone().await;
        let mut found = block::Buffer::zeroed(expected.len());
        self.pool.read_chain(&self.layers(), at, &SegmentsMut::new(&mut found)).await?;
        let (mut offset, mut differs) = (0usize, None);
        expected.each(|piece| {
            let other = &found[offset..offset + piece.len()];
            if differs.is_none() {
                differs = piece.iter().zip(other).position(|(a, b)| a != b).map(|p| offset + p);
            }
            offset += piece.len();
        });
        if let Some(byte) = differs {
            return Err(DiskError::Miscompare { at_bytes: byte as u64 });
        }
        self.write_parts(self.target()?, at, count, new, Safe::AtNextFlush).await?;
        drop(alone);
        Ok(())
    }
}

/// See [`Lun::lock_blocks`].
pub(crate) struct Locked<'a> {
    lun: &'a Lun,
    range: std::ops::Range<u64>,
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        let mut busy = self.lun.busy_blocks.borrow_mut();
        for block in self.range.clone() {
            busy.remove(&block);
        }
        drop(busy);
        self.lun.busy.wake_all();
    }
}

impl Disk for Lun {
    fn shape(&self) -> Shape {
        Shape {
            sectors: self.sectors.get(),
            physical_block_bytes: block::BLOCK_BYTES as u32,
            read_only: self.pool.is_read_only(),
            unmap_reads_zero: true,
            memory_align: self.pool.memory_align(),
        }
    }

    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        Box::pin(async move {
            self.check(at, into.len())?;
            self.pool.guest_is_here();
            let layers = self.layers();
            if layers.is_empty() {
                return Err(DiskError::Gone);
            }
            self.pool.read_chain(&layers, at, into).await
        })
    }

    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a> {
        Box::pin(self.write_now(at, from, safe))
    }

    fn zero(&self, at: Sector, count: u64, may_free: bool) -> Io<'_> {
        Box::pin(self.zero_now(at, count, may_free))
    }

    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        Box::pin(self.zero_now(at, count, true))
    }

    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        Box::pin(async move {
            check_range(self.sectors.get(), at, count)?;
            self.pool.chain_status(&self.layers(), at, count, since, out).await
        })
    }

    fn compare_and_write<'a>(
        &'a self,
        at: Sector,
        expected: &'a Segments<'a>,
        new: &'a Segments<'a>,
    ) -> Io<'a> {
        Box::pin(self.compare_and_write_now(at, expected, new))
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(self.flush_now())
    }
}
