//! Room for writes: decide in memory, let the caller write, then commit in memory. The device learns of it in the
//! next round.

use crate::Error;
use crate::bitmap::Run;
use crate::descriptor::Node;
use crate::file::{Content, File, Place, Places};
use crate::format::{Address, Corrupt, Expected, Zla};
use crate::pointer::{Lookup, PointerBlock, Tree, levels};
use crate::volume::Inner;
use crate::write::{Resource, now_s};
use block::{SECTOR_BYTES, Sector};
use std::rc::Rc;

/// Units that one allocation may touch.
const UNITS_MAX: u64 = 1 << 16;

/// Room for a write to a range of a file. The caller writes to [`Allocation::places`], then commits; an allocation
/// that is dropped is abandoned, and its new blocks are free again.
#[must_use = "an allocation is committed once the data is written, or dropped to abandon it"]
pub struct Allocation {
    file: File,
    /// All units of the range were marked in `node.allocating`.
    first_unit: u64,
    units: u64,
    new: Vec<NewUnit>,
    /// Pointer blocks that the commit changes stay in memory.
    held: Vec<Rc<PointerBlock>>,
    places: Places,
}

/// A unit that gets a block, or whose block gets its first data.
struct NewUnit {
    unit: u64,
    block: u64,
    was_tbz: bool,
}

impl Allocation {
    /// Where the data of the whole range goes, in order; all of them are [`Content::Data`].
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// The data is written (not necessarily flushed): from now on it is the file's content. It is durable after
    /// [`File::flush`].
    pub fn commit(mut self) -> Result<(), Error> {
        let (inner, node) = (Rc::clone(&self.file.inner), Rc::clone(&self.file.node));
        let new = std::mem::take(&mut self.new);
        for unit in &new {
            let address = Address::file_block(unit.block);
            inner.set_unit(&node, unit.unit, address)?;
            let mut state = node.state.borrow_mut();
            if unit.was_tbz {
                let left = state.fd.meta.tbz().saturating_sub(1);
                state.fd.meta.set_tbz(left);
                state.tbz_unsettled += 1;
            } else {
                let blocks = state.fd.meta.blocks.get() + 1;
                state.fd.meta.blocks = blocks.into();
            }
        }
        if !new.is_empty() {
            node.state.borrow_mut().fd.meta.modified_s = now_s().into();
            inner.mark_meta(&node, true)?;
        }
        Ok(())
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let new: Vec<Run> = self
            .new
            .iter()
            .filter(|unit| !unit.was_tbz)
            .map(|unit| Run { first: unit.block, count: 1 })
            .collect();
        if let Some(writer) = &self.file.inner.writer {
            for run in new {
                // Cannot fail: these bits were taken by this allocation and by nobody else.
                let _ = writer.bitmap(Resource::FileBlock).borrow_mut().give_back(run);
            }
        }
        unmark(&self.file.node, self.first_unit, self.units);
    }
}

fn unmark(node: &Node, first: u64, units: u64) {
    let mut marks = node.allocating.borrow_mut();
    (first..first + units).for_each(|unit| {
        marks.remove(&unit);
    });
    drop(marks);
    node.allocated.wake_all();
}

impl File {
    /// Finds or makes room for `count` sectors from `at` on: every part of the range is [`Content::Data`] in the
    /// answer. What the new blocks hold beside the range reads as zero when this returns.
    ///
    /// Two allocations that meet in one unit wait for each other. At most 65536 units at a time.
    pub async fn allocate(&self, at: Sector, count: u64) -> Result<Allocation, Error> {
        let (inner, node) = (&self.inner, &self.node);
        inner.writer()?;
        block::check_range(self.length().div_ceil(SECTOR_BYTES), at, count)?;
        inner.make_mappable(node).await?;
        let unit_bytes = self.unit();
        let first_unit = at.bytes() / unit_bytes;
        let units = if count == 0 { 0 } else { at.plus(count).bytes().div_ceil(unit_bytes) - first_unit };
        if units > UNITS_MAX {
            return Err(Error::TooLarge { what: "allocation (units)", bytes: units, limit: UNITS_MAX });
        }
        node.allocated
            .until(|| {
                let mut marks = node.allocating.borrow_mut();
                let end = first_unit + units.max(1);
                let busy = marks.range(first_unit..end).next().is_some() || node.preallocating.get() < end;
                if busy || marks.contains(&FROZEN) {
                    return None;
                }
                marks.extend(first_unit..first_unit + units);
                Some(())
            })
            .await;
        // From here on dropping the allocation undoes everything.
        let mut allocation = Allocation {
            file: self.clone(),
            first_unit,
            units,
            new: Vec::new(),
            held: Vec::new(),
            places: Places::new(),
        };
        inner.plan(node, &mut allocation).await?;
        inner.clear_around(&allocation, at, count, unit_bytes).await?;
        inner.places_of(node, &mut allocation, at, count).await?;
        Ok(allocation)
    }
}

/// Stands in `allocating` while a descriptor is rewritten elsewhere: no unit has this number.
pub(crate) const FROZEN: u64 = u64::MAX;
/// Stands in `allocating` while blocks are found in advance: the file is neither shortened nor rewritten.
pub(crate) const PREALLOCATING: u64 = u64::MAX - 1;

impl Inner {
    /// Decides for each unit: a new block for a hole, first use for a block to be zeroed.
    async fn plan(&self, node: &Rc<Node>, allocation: &mut Allocation) -> Result<(), Error> {
        let end = allocation.first_unit + allocation.units;
        let mut unit = allocation.first_unit;
        while unit < end {
            match self.lookup_unit(node, unit).await? {
                None => {
                    let mut holes = 1;
                    while unit + holes < end && self.lookup_unit(node, unit + holes).await?.is_none() {
                        holes += 1;
                    }
                    let stop = unit + holes;
                    for n in unit..stop {
                        self.grow_tree(node, n, &mut allocation.held).await?;
                    }
                    while unit < stop {
                        let goal = self.goal(node, unit).await?;
                        let run = self.take(Resource::FileBlock, stop - unit, goal).await?;
                        allocation.new.extend((0..run.count).map(|i| NewUnit {
                            unit: unit + i,
                            block: run.first + i,
                            was_tbz: false,
                        }));
                        unit += run.count;
                        node.goal.set(Some((unit, run.first + run.count)));
                    }
                }
                Some(Address::FileBlock { block, tbz: true, .. }) => {
                    self.grow_tree(node, unit, &mut allocation.held).await?;
                    allocation.new.push(NewUnit { unit, block, was_tbz: true });
                    unit += 1;
                }
                Some(_) => unit += 1,
            }
        }
        Ok(())
    }

    /// The block behind the one of the unit before, where a contiguous file goes on.
    async fn goal(&self, node: &Rc<Node>, unit: u64) -> Result<Option<u64>, Error> {
        if let Some((next, block)) = node.goal.get()
            && next == unit
        {
            return Ok(Some(block));
        }
        let Some(before) = unit.checked_sub(1) else { return Ok(None) };
        Ok(match self.lookup_unit(node, before).await? {
            Some(Address::FileBlock { block, .. }) => Some(block + 1),
            _ => None,
        })
    }

    /// Address of a unit; `None` for a hole.
    pub async fn lookup_unit(&self, node: &Node, unit: u64) -> Result<Option<Address>, Error> {
        loop {
            let found = {
                let state = node.state.borrow();
                (Tree { files: &self.files, cache: &self.cache }).lookup(&state.fd, node.at.get(), unit)?
            };
            match found {
                Lookup::Unit { address, .. } => return Ok(Some(address)),
                Lookup::Holes { .. } => return Ok(None),
                Lookup::Need { at } => {
                    self.cache.load(&self.space, &self.files.sizes, at).await?;
                }
            }
        }
    }

    /// Makes sure that pointer blocks lead to `unit`, and puts them in `held`. New ones are empty, so they may stay
    /// whatever follows.
    pub async fn grow_tree(
        &self,
        node: &Rc<Node>,
        unit: u64,
        held: &mut Vec<Rc<PointerBlock>>,
    ) -> Result<(), Error> {
        let per = self.files.sizes.slots_per_pointer_block();
        let levels = levels(node.state.borrow().fd.zla).ok_or(Error::Resident)?;
        let mut below = per.pow(levels);
        let mut holder: Option<Rc<PointerBlock>> = None;
        let mut index = unit / below;
        for _ in 0..levels {
            let address = self.slot(node, holder.as_ref(), index)?;
            let block = match address {
                Address::Hole => self.new_pointer_block(node, holder.as_ref(), index).await?,
                _ => {
                    let at = self.files.pointer_block(address, node.at.get())?;
                    self.cache.load(&self.space, &self.files.sizes, at).await?
                }
            };
            let inside = unit % below;
            below /= per;
            index = inside / below;
            // Neighbouring units have their pointer blocks in common.
            if !held.iter().rev().take(2).any(|other| Rc::ptr_eq(other, &block)) {
                held.push(Rc::clone(&block));
            }
            holder = Some(block);
        }
        Ok(())
    }

    pub fn slot(&self, node: &Node, holder: Option<&Rc<PointerBlock>>, index: u64) -> Result<Address, Error> {
        Ok(match holder {
            Some(block) => block.slot(&self.files.sizes, index)?,
            None => node.state.borrow().fd.slot(&self.files.sizes, index, node.at.get())?,
        })
    }

    async fn new_pointer_block(
        &self,
        node: &Rc<Node>,
        holder: Option<&Rc<PointerBlock>>,
        index: u64,
    ) -> Result<Rc<PointerBlock>, Error> {
        let run = self.take(Resource::PointerBlock, 1, None).await?;
        let already = self.slot(node, holder, index)?;
        if already != Address::Hole {
            // Another unit's writer was faster while bitmaps were read.
            self.writer()?.bitmap(Resource::PointerBlock).borrow_mut().give_back(run)?;
            let at = self.files.pointer_block(already, node.at.get())?;
            return self.cache.load(&self.space, &self.files.sizes, at).await;
        }
        let block = self.create_pointer_block(run)?;
        self.set_slot(node, holder, index, self.pointer_address(run))?;
        Ok(block)
    }

    pub fn pointer_address(&self, run: Run) -> Address {
        let per = self.files.pointer_blocks.as_ref().map_or(1, |f| u64::from(f.geometry.per_cluster));
        Address::pointer_block(run.first / per, (run.first % per) as u32)
    }

    /// An empty pointer block in memory; the round that writes it writes it before what points to it.
    pub fn create_pointer_block(&self, run: Run) -> Result<Rc<PointerBlock>, Error> {
        let at = self.files.pointer_block(self.pointer_address(run), 0)?;
        let block = self.cache.create(&self.files.sizes, at);
        self.writer()?.pointer_block_changed(&block);
        Ok(block)
    }

    /// Sets a slot of a pointer block or of the array.
    pub fn set_slot(
        &self,
        node: &Rc<Node>,
        holder: Option<&Rc<PointerBlock>>,
        index: u64,
        address: Address,
    ) -> Result<(), Error> {
        let raw = address.encode32().ok_or(Error::Corrupt(Corrupt {
            what: "address to be written",
            at: node.at.get(),
            found: index,
            expected: Expected::Words("one that fits 32 bits"),
        }))?;
        let writer = self.writer()?;
        match holder {
            Some(block) => {
                block.set_slot(index, raw);
                writer.pointer_block_changed(block);
            }
            None => {
                let mut state = node.state.borrow_mut();
                let sector = state.fd.set_slot(index, raw);
                state.dirty_tail |= 1 << sector;
                drop(state);
                writer.node_changed(node, true);
            }
        }
        Ok(())
    }

    /// Sets the address of a unit whose pointer blocks are in memory (held by being changed, or just loaded).
    pub fn set_unit(&self, node: &Rc<Node>, unit: u64, address: Address) -> Result<(), Error> {
        let per = self.files.sizes.slots_per_pointer_block();
        let levels = levels(node.state.borrow().fd.zla).ok_or(Error::Resident)?;
        let mut below = per.pow(levels);
        let mut holder: Option<Rc<PointerBlock>> = None;
        let mut index = unit / below;
        for _ in 0..levels {
            let found = self.slot(node, holder.as_ref(), index)?;
            let at = self.files.pointer_block(found, node.at.get())?;
            let block = self.cache.get(at).ok_or(Error::Corrupt(Corrupt {
                what: "pointer block in memory",
                at,
                found: unit,
                expected: Expected::Words("one that the allocation holds"),
            }))?;
            let inside = unit % below;
            below /= per;
            index = inside / below;
            holder = Some(block);
        }
        self.set_slot(node, holder.as_ref(), index, address)
    }

    /// The metadata of the node changed.
    pub fn mark_meta(&self, node: &Rc<Node>, urgent: bool) -> Result<(), Error> {
        node.state.borrow_mut().dirty_meta = true;
        self.writer()?.node_changed(node, urgent);
        Ok(())
    }

    /// Zeroes what the new units hold before and behind the range.
    async fn clear_around(
        &self,
        allocation: &Allocation,
        at: Sector,
        count: u64,
        unit_bytes: u64,
    ) -> Result<(), Error> {
        let (start, end) = (at.bytes(), at.plus(count).bytes());
        for new in &allocation.new {
            let (first, stop) = (new.unit * unit_bytes, (new.unit + 1) * unit_bytes);
            let volume = new.block * self.files.sizes.block;
            if start > first {
                self.space.zero(volume, start - first).await?;
            }
            if end < stop {
                self.space.zero(volume + (end - first), stop - end).await?;
            }
        }
        Ok(())
    }

    async fn places_of(
        &self,
        node: &Rc<Node>,
        allocation: &mut Allocation,
        at: Sector,
        count: u64,
    ) -> Result<(), Error> {
        let unit_bytes = self.files.sizes.block;
        let (mut byte, end) = (at.bytes(), at.plus(count).bytes());
        let mut new = allocation.new.iter().peekable();
        let mut places = Places::new();
        while byte < end {
            let unit = byte / unit_bytes;
            let stop = ((unit + 1) * unit_bytes).min(end);
            let volume = match new.next_if(|n| n.unit == unit) {
                Some(new) => new.block * unit_bytes,
                None => {
                    let expected = Expected::Words("a block that was there a moment ago");
                    let lost = Corrupt { what: "unit of a file", at: node.at.get(), found: unit, expected };
                    let address = self.lookup_unit(node, unit).await?.ok_or(lost)?;
                    self.files.resolve(address, byte, node.at.get())?
                }
            };
            self.push_places(
                &mut places,
                byte,
                stop - byte,
                Some(volume + byte % unit_bytes),
                false,
                usize::MAX,
            )?;
            byte = stop;
        }
        debug_assert!(places.iter().all(|p| matches!(p.content, Content::Data { .. })));
        allocation.places = places;
        Ok(())
    }

    /// Gives units `first..end` of a file that nobody else uses blocks of their own, in long runs: to be zeroed, or
    /// zeroed now. Pending changes stay bounded: a round for every 4096 units.
    pub async fn preallocate(
        &self,
        node: &Rc<Node>,
        first: u64,
        end: u64,
        to_be_zeroed: bool,
    ) -> Result<(), Error> {
        let mut unit = first;
        let mut since_round = 0;
        while unit < end {
            if self.lookup_unit(node, unit).await?.is_some() {
                unit += 1;
                continue;
            }
            let goal = self.goal(node, unit).await?;
            // Bits are taken for holes only: stop before the next unit that has a block.
            let mut want = 1;
            while want < 1024 && unit + want < end && self.lookup_unit(node, unit + want).await?.is_none() {
                want += 1;
            }
            let mut held = Vec::new();
            for n in unit..unit + want {
                self.grow_tree(node, n, &mut held).await?;
            }
            let run = self.take(Resource::FileBlock, want, goal).await?;
            let block_bytes = self.files.sizes.block;
            if !to_be_zeroed {
                self.space.zero(run.first * block_bytes, run.count * block_bytes).await?;
            }
            for i in 0..run.count {
                let address = Address::FileBlock { block: run.first + i, tbz: to_be_zeroed, cow: false };
                self.set_unit(node, unit + i, address)?;
            }
            unit += run.count;
            node.goal.set(Some((unit, run.first + run.count)));
            {
                let mut state = node.state.borrow_mut();
                let meta = &mut state.fd.meta;
                meta.blocks = (meta.blocks.get() + run.count).into();
                if to_be_zeroed {
                    let tbz = meta.tbz() + run.count;
                    meta.set_tbz(tbz);
                }
            }
            self.mark_meta(node, true)?;
            since_round += run.count;
            if since_round >= 4096 {
                since_round = 0;
                self.settle_once().await?;
            }
        }
        Ok(())
    }

    /// The file's array has to be able to point to file blocks: content in the descriptor or in sub-blocks moves.
    async fn make_mappable(&self, node: &Rc<Node>) -> Result<(), Error> {
        let zla = node.state.borrow().fd.zla;
        match zla {
            Zla::FileBlocks | Zla::Single | Zla::Double => Ok(()),
            Zla::Resident | Zla::SubBlocks => self.rebuild(node, Zla::FileBlocks).await,
            Zla::None | Zla::SinglePb2 => Err(Error::Unsupported("room in a file of this kind")),
        }
    }
}
