//! Reading through a chain of layers, and the question what is where and what changed.
//!
//! A lookup of one grain does not wait in the middle, or (when pages have to be loaded) begins again if an entry moved
//! meanwhile from one layer to the next. So a merge is never seen half done, and an old list of layers stays right. Whoever uses what a lookup found holds an epoch ([`Space::under_way`]),
//! so that no grain in it is given out meanwhile.
//!
//! What the frozen part of a chain says about a grain is kept ([`Resolved`]): reading through 32 layers costs two
//! lookups, as through one.
//!
//! [`Space::under_way`]: crate::space::Space::under_way

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use block::{BLOCK_BYTES, BLOCK_SECTORS, DiskError, Extent, Extents, Generation, Kind, Sector, SegmentsMut};

use crate::format::{Entry, GRAIN_BLOCKS, GRAIN_BYTES, GRAIN_SECTORS, Mark, PAGE_ENTRIES};
use crate::lun::{Part, parts};
use crate::map::leaf_of;
use crate::pages::{FastMap, Page};
use crate::pool::Pool;

/// The grain of the pool that holds each block; 0: it reads as zero.
pub(crate) type Sources = [u32; GRAIN_BLOCKS];

/// A lookup wants a page that memory does not have.
struct Missing;

/// What frozen chains say about grains, by leaf and by the highest of the frozen layers.
pub(crate) struct Resolved {
    leaves: RefCell<FastMap<u64, ByLayer>>,
    count: Cell<usize>,
    limit: usize,
}

/// One leaf, as seen from several layers.
type ByLayer = Vec<(u64, Rc<ResolvedLeaf>)>;

struct ResolvedLeaf {
    slots: Box<[Cell<u64>]>,
    /// Grains whose blocks come from several grains.
    mixed: RefCell<Vec<Sources>>,
    recently_used: Cell<bool>,
}

const KNOWN: u64 = 1 << 63;
const MIXED: u64 = 1 << 62;

impl Resolved {
    /// Keeps at most `limit` leaves, each 4 KiB, and 64 bytes for each grain of mixed origin.
    pub(crate) fn new(limit: usize) -> Self {
        Self { leaves: RefCell::default(), count: Cell::new(0), limit: limit.max(64) }
    }

    /// Entries of these leaves moved between layers.
    pub(crate) fn forget(&self, leaf: u64) {
        if let Some(list) = self.leaves.borrow_mut().remove(&leaf) {
            self.count.set(self.count.get() - list.len());
        }
    }

    /// A layer is going to be written to.
    pub(crate) fn forget_layer(&self, layer: u64) {
        self.leaves.borrow_mut().retain(|_, list| {
            let before = list.len();
            list.retain(|(known, _)| *known != layer);
            self.count.set(self.count.get() - (before - list.len()));
            !list.is_empty()
        });
    }

    #[inline]
    fn leaf(&self, layer: u64, leaf: u64) -> Rc<ResolvedLeaf> {
        if let Some(list) = self.leaves.borrow().get(&leaf)
            && let Some((_, found)) = list.iter().find(|(known, _)| *known == layer)
        {
            found.recently_used.set(true);
            return Rc::clone(found);
        }
        self.make_room();
        let new = Rc::new(ResolvedLeaf {
            slots: (0..PAGE_ENTRIES).map(|_| Cell::new(0)).collect(),
            mixed: RefCell::default(),
            recently_used: Cell::new(false),
        });
        self.leaves.borrow_mut().entry(leaf).or_default().push((layer, Rc::clone(&new)));
        self.count.set(self.count.get() + 1);
        new
    }

    fn make_room(&self) {
        if self.count.get() < self.limit {
            return;
        }
        let mut spare = self.limit / 4;
        self.leaves.borrow_mut().retain(|_, list| {
            list.retain(|(_, leaf)| {
                let keep = spare == 0 || leaf.recently_used.replace(false);
                spare -= usize::from(!keep);
                self.count.set(self.count.get() - usize::from(!keep));
                keep
            });
            !list.is_empty()
        });
    }
}

impl ResolvedLeaf {
    /// Fills in the blocks of `wanted`; false: not known yet.
    #[inline]
    fn get(&self, slot: usize, wanted: u16, sources: &mut Sources) -> bool {
        let word = self.slots[slot].get();
        if word & KNOWN == 0 {
            return false;
        }
        if word & MIXED != 0 {
            let mixed = self.mixed.borrow()[word as u32 as usize];
            each_bit(wanted, |block| sources[block] = mixed[block]);
        } else {
            let (grain, held) = (word as u32, (word >> 32) as u16);
            each_bit(wanted & held, |block| sources[block] = grain);
            each_bit(wanted & !held, |block| sources[block] = 0);
        }
        true
    }

    fn put(&self, slot: usize, sources: &Sources) {
        let grain = sources.iter().copied().find(|g| *g != 0).unwrap_or(0);
        if sources.iter().any(|g| *g != 0 && *g != grain) {
            let mut mixed = self.mixed.borrow_mut();
            mixed.push(*sources);
            self.slots[slot].set(KNOWN | MIXED | (mixed.len() as u64 - 1));
            return;
        }
        let held = (0..GRAIN_BLOCKS).filter(|b| sources[*b] != 0).fold(0u64, |mask, b| mask | 1 << b);
        self.slots[slot].set(KNOWN | held << 32 | u64::from(grain));
    }
}

#[inline]
fn each_bit(mut bits: u16, mut each: impl FnMut(usize)) {
    while bits != 0 {
        each(bits.trailing_zeros() as usize);
        bits &= bits - 1;
    }
}

/// Every second bit, from bit 0, pushed together.
#[inline]
fn even_bits(word: u32) -> u16 {
    let mut x = word & 0x5555_5555;
    x = (x | x >> 1) & 0x3333_3333;
    x = (x | x >> 2) & 0x0f0f_0f0f;
    x = (x | x >> 4) & 0x00ff_00ff;
    (x | x >> 8) as u16
}

/// Blocks held in the entry's grain, and blocks zeroed in it.
#[inline]
pub(crate) fn masks(entry: Entry) -> (u16, u16) {
    let marks = (entry.0 >> 32) as u32;
    let (low, high) = (even_bits(marks), even_bits(marks >> 1));
    (low, high & !low)
}

pub(crate) fn block_mask(blocks: std::ops::Range<usize>) -> u16 {
    let width = blocks.end - blocks.start;
    if width == 0 { 0 } else { (u16::MAX >> (GRAIN_BLOCKS - width)) << blocks.start }
}

/// One operation on a medium, or zeroes: a run of the request.
struct Run {
    /// Byte of the row of media; `None`: zeroes.
    byte: Option<u64>,
    /// Where in the request.
    from: usize,
    /// Bytes.
    length: usize,
}

impl Pool {
    /// Two bytes lie on the same medium: operations on both may be one.
    #[inline]
    pub(crate) fn on_one_medium(&self, a: u64, b: u64) -> bool {
        self.media.list.len() == 1
            || self.media.medium_of(a / GRAIN_BYTES) == self.media.medium_of(b / GRAIN_BYTES)
    }

    /// Entries of a leaf moved from one layer to another.
    pub(crate) fn moved(&self, leaf: u64) {
        self.moves.set(self.moves.get() + 1);
        self.resolved.forget(leaf);
    }

    /// Where the blocks of `wanted` lie, of one grain of the LUN with these layers.
    #[inline]
    fn sources_now(&self, layers: &[u64], grain: u64, wanted: u16, out: &mut Sources) -> Result<(), Missing> {
        let (leaf, slot) = leaf_of(grain);
        let Some((top, frozen)) = layers.split_first() else {
            each_bit(wanted, |block| out[block] = 0);
            return Ok(());
        };
        let entry = self.entry_now(*top, grain).ok_or(Missing)?;
        let (held, zeroed) = masks(entry);
        each_bit(wanted & held, |block| out[block] = entry.grain());
        each_bit(wanted & zeroed, |block| out[block] = 0);
        let rest = wanted & !(held | zeroed);
        if rest == 0 {
            return Ok(());
        }
        if frozen.len() < 2 {
            return self.sources_now(frozen, grain, rest, out);
        }
        let resolved = self.resolved.leaf(frozen[0], leaf);
        if resolved.get(slot, rest, out) {
            return Ok(());
        }
        let mut all = [0; GRAIN_BLOCKS];
        self.walk_down(frozen, grain, &mut all)?;
        if self.is_frozen(frozen[0]) {
            resolved.put(slot, &all);
        }
        each_bit(rest, |block| out[block] = all[block]);
        Ok(())
    }

    /// Asks every layer from the top down.
    fn walk_down(&self, layers: &[u64], grain: u64, out: &mut Sources) -> Result<(), Missing> {
        let mut rest = u16::MAX;
        for layer in layers {
            let entry = self.entry_now(*layer, grain).ok_or(Missing)?;
            let (held, zeroed) = masks(entry);
            each_bit(rest & held, |block| out[block] = entry.grain());
            rest &= !(held | zeroed);
            if rest == 0 {
                break;
            }
        }
        Ok(())
    }

    pub(crate) async fn sources(
        &self,
        layers: &[u64],
        grain: u64,
        wanted: u16,
        out: &mut Sources,
    ) -> Result<(), DiskError> {
        if self.sources_now(layers, grain, wanted, out).is_ok() {
            return Ok(());
        }
        // Pages have to be loaded. What moved meanwhile may have been missed: then once more.
        loop {
            let moves = self.moves.get();
            let mut rest = wanted;
            for layer in layers {
                let entry = self.entry(*layer, grain).await?;
                let (held, zeroed) = masks(entry);
                each_bit(rest & held, |block| out[block] = entry.grain());
                each_bit(rest & zeroed, |block| out[block] = 0);
                rest &= !(held | zeroed);
                if rest == 0 {
                    break;
                }
            }
            each_bit(rest, |block| out[block] = 0);
            if self.moves.get() == moves {
                return Ok(());
            }
        }
    }

    /// Reads through a chain of layers, the first of which is the top.
    pub(crate) async fn read_chain(
        &self,
        layers: &[u64],
        at: Sector,
        into: &SegmentsMut<'_>,
    ) -> Result<(), DiskError> {
        let count = into.len() as u64 / 512;
        if count == 0 {
            return Ok(());
        }
        let _under_way = self.space.under_way();
        if count <= BLOCK_SECTORS && at.0 % BLOCK_SECTORS + count <= BLOCK_SECTORS {
            // Within one block: the common case, without lists.
            let (grain, first) = (at.0 / GRAIN_SECTORS, at.0 % GRAIN_SECTORS);
            let block = (first / BLOCK_SECTORS) as usize;
            let mut sources = [0; GRAIN_BLOCKS];
            self.sources(layers, grain, 1 << block, &mut sources).await?;
            return match sources[block] {
                0 => {
                    into.zero(0, into.len());
                    Ok(())
                }
                source => self.media.read(u64::from(source) * GRAIN_BYTES + first * 512, into).await,
            };
        }
        let runs = self.runs(layers, at, count).await?;
        let mut reads = Vec::new();
        for run in &runs {
            match run.byte {
                None => into.zero(run.from, run.length),
                Some(byte) => reads.push((byte, into.slice_mut(run.from, run.length))),
            }
        }
        if let [(byte, piece)] = &reads[..] {
            return self.media.read(*byte, piece).await;
        }
        let under_way: Vec<block::Io<'_>> = reads
            .iter()
            .map(|(byte, piece)| Box::pin(self.media.read(*byte, piece)) as block::Io<'_>)
            .collect();
        crate::media_set::together(under_way).await.into_iter().collect()
    }

    /// A request as runs that lie together on a medium.
    async fn runs(&self, layers: &[u64], at: Sector, count: u64) -> Result<Vec<Run>, DiskError> {
        let mut runs: Vec<Run> = Vec::new();
        for part in parts(at, count) {
            let mut sources = [0; GRAIN_BLOCKS];
            self.sources(layers, part.grain, block_mask(part.blocks()), &mut sources).await?;
            for block in part.blocks() {
                let (first, end) = part_of_block(&part, block);
                let byte = match sources[block] {
                    0 => None,
                    grain => Some(u64::from(grain) * GRAIN_BYTES + first * 512),
                };
                let (from, length) =
                    (part.from + ((first - part.first) * 512) as usize, ((end - first) * 512) as usize);
                match (runs.last_mut(), byte) {
                    (Some(run), None) if run.byte.is_none() => run.length += length,
                    (Some(Run { byte: Some(start), length: done, .. }), Some(byte))
                        if *start + *done as u64 == byte && self.on_one_medium(*start, byte) =>
                    {
                        *done += length;
                    }
                    _ => runs.push(Run { byte, from, length }),
                }
            }
        }
        Ok(runs)
    }

    /// The first leaf at or after `from`, below `end`, that any of these layers has.
    pub(crate) async fn next_leaf_of(
        &self,
        layers: &[u64],
        from: u64,
        end: u64,
    ) -> Result<Option<u64>, DiskError> {
        let mut first = None;
        for layer in layers {
            let limit = first.unwrap_or(end);
            first = self.next_leaf(*layer, from, limit).await?.or(first);
            if first == Some(from) {
                break;
            }
        }
        Ok(first)
    }

    /// Some layer knows something of this grain.
    pub(crate) async fn any_entry(&self, layers: &[u64], grain: u64) -> Result<bool, DiskError> {
        for layer in layers {
            if self.entry(*layer, grain).await? != Entry::default() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Describes a chain: what is where, and what changed since a generation. That generation must be the cut of a
    /// layer of this chain (for a snapshot: its own or an older one).
    pub(crate) async fn chain_status(
        &self,
        layers: &[u64],
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &mut Extents,
    ) -> Result<(), DiskError> {
        let _under_way = self.space.under_way();
        let (newer, old_end) = match since {
            None => (None, 0),
            Some(generation) => {
                let catalog = self.catalog.borrow();
                // A layer that nobody names or holds may be about to merge: its marks say too little already.
                let of = |layer: &u64| {
                    let record = catalog.layers.get(layer).filter(|l| l.generation == Some(generation));
                    record.filter(|l| catalog.keeps_generation(l.id))
                };
                let position = layers.iter().position(|l| of(l).is_some());
                let position = position.ok_or(DiskError::UnknownGeneration)?;
                (Some(position), of(&layers[position]).map_or(0, |l| l.sectors))
            }
        };
        let leaf_sectors = PAGE_ENTRIES as u64 * GRAIN_SECTORS;
        let (mut next, end) = (at.0, at.0 + count);
        while next < end {
            let number = next / leaf_sectors;
            let found = self.next_leaf_of(layers, number, end.div_ceil(leaf_sectors)).await?;
            let hole_end = found.map_or(end, |leaf| (leaf * leaf_sectors).clamp(next, end));
            if hole_end > next {
                if !push_split(out, next, hole_end, Kind::Hole, newer.is_none(), old_end, since.is_some()) {
                    return Ok(());
                }
                next = hole_end;
                continue;
            }
            let pages = self.leaves_of(layers, number).await?;
            let stop = ((number + 1) * leaf_sectors).min(end);
            for part in parts(Sector(next), stop - next) {
                if !describe_grain(&pages, &part, newer, old_end, out) {
                    return Ok(());
                }
            }
            next = stop;
        }
        Ok(())
    }

    /// The same leaf of every layer, as of one instant.
    pub(crate) async fn leaves_of(
        &self,
        layers: &[u64],
        number: u64,
    ) -> Result<Vec<Option<Rc<Page>>>, DiskError> {
        loop {
            let moves = self.moves.get();
            let mut pages = Vec::with_capacity(layers.len());
            for layer in layers {
                pages.push(self.leaf(*layer, number).await?);
            }
            if self.moves.get() == moves {
                return Ok(pages);
            }
        }
    }
}

/// First and end sector (within the grain) that a part has in a block.
fn part_of_block(part: &Part, block: usize) -> (u64, u64) {
    let first = block as u64 * BLOCK_SECTORS;
    (first.max(part.first), (first + BLOCK_SECTORS).min(part.first + part.count))
}

/// Adds an extent; what lies behind the old end of the disk counts as changed (R44).
fn push_split(
    out: &mut Extents,
    first: u64,
    end: u64,
    kind: Kind,
    changed: bool,
    old_end: u64,
    asked: bool,
) -> bool {
    let middle = if asked { old_end.clamp(first, end) } else { end };
    out.push(Extent { at: Sector(first), count: middle - first, kind, changed })
        && out.push(Extent { at: Sector(middle), count: end - middle, kind, changed: true })
}

/// Describes one part of a grain; false when the list is full. `newer`: how many layers came after the cut asked for.
fn describe_grain(
    pages: &[Option<Rc<Page>>],
    part: &Part,
    newer: Option<usize>,
    old_end: u64,
    out: &mut Extents,
) -> bool {
    let slot = leaf_of(part.grain).1;
    let entry = |page: &Option<Rc<Page>>| page.as_ref().map_or(Entry::default(), |p| Entry(p.get(slot)));
    let (mut data, mut zero, mut changed) = (0u16, 0u16, 0u16);
    for (index, page) in pages.iter().enumerate() {
        let (held, zeroed) = masks(entry(page));
        let open = !(data | zero);
        data |= held & open;
        zero |= zeroed & open;
        if newer.is_none_or(|n| index < n) {
            changed |= changed_blocks(entry(page));
        }
    }
    let base = part.grain * GRAIN_SECTORS;
    for block in part.blocks() {
        let (first, end) = part_of_block(part, block);
        let bit = 1u16 << block;
        let kind = match (data & bit != 0, zero & bit != 0) {
            (true, _) => Kind::Data,
            (_, true) => Kind::Zero,
            _ => Kind::Hole,
        };
        let changed = newer.is_none() || changed & bit != 0;
        if !push_split(out, base + first, base + end, kind, changed, old_end, newer.is_some()) {
            return false;
        }
    }
    true
}

/// Blocks that this layer's entry counts as changes.
#[inline]
pub(crate) fn changed_blocks(entry: Entry) -> u16 {
    let marks = (entry.0 >> 32) as u32;
    // Written is 01, zeroed is 10, copied is 11: a change has exactly one of its two bits.
    even_bits(marks) ^ even_bits(marks >> 1)
}

const _: () = assert!(BLOCK_BYTES * GRAIN_BLOCKS as u64 == GRAIN_BYTES);
const _: () = assert!(Mark::Written as u8 == 1 && Mark::Zeroed as u8 == 2 && Mark::Copied as u8 == 3);
