//! Making and opening pools.

use std::collections::HashSet;
use std::rc::Rc;

use block::{Buffer, Disk, DiskError, Safe, Sector, Segments, SegmentsMut};
use uuid::Uuid;
use zerocopy::IntoBytes;

use crate::catalog::{Catalog, Put};
use crate::format::{
    BITMAP_GRAINS, BITMAP_TREE, Corrupt, Entry, FORMAT_VERSION, GRAIN_BYTES, GRAIN_PAIRS, GRAIN_SECTORS,
    HEAD_AT, Head, MOST_MEDIA, PAGE_BYTES, PAGE_ENTRIES, PAIR_BYTES, PageKey, RawMedium, encode_page,
};
use crate::journal::{Op, Ring};
use crate::map::{HEIGHT, leaf_of};
use crate::media_set::MediaSet;
use crate::pool::Pool;
use crate::space::bitmap_place;
use crate::tidy::MAP_FOLLOWS;

/// Features of the format that must be understood; none so far.
const MUST_UNDERSTAND: u64 = 0;

/// How a pool is opened.
#[derive(Clone, Debug)]
pub struct Options {
    /// Write nothing, not even what replay would bring to its place.
    pub read_only: bool,
    /// Most clean map pages (4 KiB each) kept in memory.
    pub cache_pages: usize,
    /// Gives freed grains back to the file system or device below. Without it they stay allocated there, and writing
    /// to them again is cheaper.
    pub punch: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { read_only: false, cache_pages: 16384, punch: true }
    }
}

/// Why a pool could not be made or opened.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// The media hold no pool.
    #[error("medium {medium} holds no pool")]
    NotAPool {
        /// Number in the list given.
        medium: usize,
    },
    /// There is a pool already.
    #[error("medium {medium} holds a pool already ({pool}); use it, or wipe it first")]
    AlreadyAPool {
        /// Number in the list given.
        medium: usize,
        /// The pool's uuid.
        pool: Uuid,
    },
    /// Made by a newer program.
    #[error("the pool has format {found}; this program knows up to {known}: use the newer program")]
    Newer {
        /// Version found.
        found: u32,
        /// Newest version known.
        known: u32,
    },
    /// A feature that this program does not know must be understood.
    #[error("the pool needs features {0:#x} that this program does not know: use the newer program")]
    Features(u64),
    /// Media of another pool, or one too many, or some are missing.
    #[error(
        "the pool has {wanted} media; given were {given} of them: give all files and devices of the pool"
    )]
    Media {
        /// Media that belong to the pool.
        wanted: usize,
        /// Of these, given.
        given: usize,
    },
    /// A medium became shorter.
    #[error(
        "medium {medium} has {found} bytes, {wanted} belong to the pool: a truncated file or the wrong device"
    )]
    Truncated {
        /// Number in the pool.
        medium: usize,
        /// Bytes there.
        found: u64,
        /// Bytes needed.
        wanted: u64,
    },
    /// Too small, or too many.
    #[error("{0}")]
    Unfit(&'static str),
    /// The metadata is damaged.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// A medium failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// A new pool.
#[derive(Clone, Debug)]
pub struct NewPool {
    /// Its name.
    pub name: String,
    /// Its identity; tests give one.
    pub uuid: Uuid,
}

impl NewPool {
    /// With an identity of its own.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), uuid: Uuid::new_v4() }
    }
}

/// Smallest medium: 16 MiB.
pub const LEAST_MEDIUM_BYTES: u64 = 16 << 20;

struct Layout {
    journal_at: u64,
    journal_bytes: u64,
    catalog_at: [u64; 2],
    catalog_bytes: u64,
}

fn layout(bytes: u64) -> Layout {
    let journal_bytes = (bytes / 128).clamp(1 << 20, 64 << 20).next_multiple_of(GRAIN_BYTES);
    let catalog_bytes = (bytes / 512).clamp(256 << 10, 32 << 20).next_multiple_of(GRAIN_BYTES);
    let journal_at = GRAIN_BYTES;
    let first = journal_at + journal_bytes;
    Layout { journal_at, journal_bytes, catalog_at: [first, first + catalog_bytes], catalog_bytes }
}

/// Bitmap pages, reserved grains and bitmap place of a medium.
fn medium_layout(number: usize, grains: u64, layout: &Layout) -> (u64, u64, u64) {
    let pages = grains.div_ceil(BITMAP_GRAINS);
    let bitmap_grain = match number {
        0 => (layout.catalog_at[1] + layout.catalog_bytes) / GRAIN_BYTES,
        _ => 1,
    };
    let reserved = bitmap_grain + pages.div_ceil(GRAIN_PAIRS);
    (pages, bitmap_grain, reserved)
}

/// Reads both head slots of a disk: the newest valid one and its slot.
pub(crate) async fn read_head(disk: &dyn Disk) -> Result<Option<(Head, usize)>, PoolError> {
    let mut best: Option<(Head, usize)> = None;
    for (slot, at) in HEAD_AT.iter().enumerate() {
        if at + PAGE_BYTES as u64 > disk.shape().bytes() {
            return Ok(best);
        }
        let mut bytes = Buffer::zeroed(PAGE_BYTES);
        disk.read(Sector::at_byte(*at), &SegmentsMut::new(&mut bytes)).await?;
        match Head::check(&bytes) {
            Ok(Some(head)) if best.as_ref().is_none_or(|(b, _)| b.sequence.get() < head.sequence.get()) => {
                best = Some((head, slot));
            }
            Ok(_) => {}
            Err(found) => return Err(PoolError::Newer { found, known: FORMAT_VERSION }),
        }
    }
    Ok(best)
}

impl Pool {
    /// Makes a pool on empty media (each at least 16 MiB) and opens it. Heads are written last: a crash before leaves
    /// no pool.
    pub async fn create(
        disks: Vec<Rc<dyn Disk>>,
        new: NewPool,
        options: Options,
    ) -> Result<Rc<Self>, PoolError> {
        if disks.is_empty() || disks.len() > MOST_MEDIA {
            return Err(PoolError::Unfit("a pool has between 1 and 60 media"));
        }
        for (medium, disk) in disks.iter().enumerate() {
            if disk.shape().bytes() < LEAST_MEDIUM_BYTES {
                return Err(PoolError::Unfit("a medium of a pool has 16 MiB at least"));
            }
            if let Some((head, _)) = read_head(&**disk).await? {
                return Err(PoolError::AlreadyAPool { medium, pool: Uuid::from_bytes(head.pool) });
            }
        }
        let places = layout(disks[0].shape().bytes());
        let mut head = Head::blank();
        head.pool = new.uuid.into_bytes();
        head.sequence = 1.into();
        head.media = (disks.len() as u32).into();
        head.journal_at = places.journal_at.into();
        head.journal_bytes = places.journal_bytes.into();
        head.journal_sequence = 1.into();
        head.catalog_at = places.catalog_at.map(Into::into);
        head.catalog_bytes = places.catalog_bytes.into();
        head.next_id = 1.into();
        let (mut first, mut used) = (0, 0);
        for (number, disk) in disks.iter().enumerate() {
            let grains = disk.shape().sectors / GRAIN_SECTORS;
            let (pages, bitmap_grain, reserved) = medium_layout(number, grains, &places);
            let uuid = Uuid::new_v4().into_bytes();
            head.table[number] = RawMedium::new(uuid, first, grains, bitmap_grain, reserved);
            write_bitmap(&**disk, number, first, bitmap_grain, pages, reserved).await?;
            first += grains;
            used += reserved;
        }
        if first > u64::from(u32::MAX) {
            return Err(PoolError::Unfit("a pool has 256 TiB at most"));
        }
        head.used_grains = used.into();
        let catalog = Catalog { name: new.name, next_id: 1, ..Catalog::default() };
        let bytes = catalog.encode();
        let mut padded = Buffer::zeroed(bytes.len().next_multiple_of(PAGE_BYTES));
        padded[..bytes.len()].copy_from_slice(&bytes);
        head.catalog_crc = crc32c::crc32c(&bytes).into();
        head.catalog_length = (bytes.len() as u64).into();
        let at = Sector::at_byte(places.catalog_at[0]);
        disks[0].write(at, &Segments::new(&padded), Safe::AtNextFlush).await?;
        // An old journal there must not be taken for ours: the pool's uuid in each record tells.
        for disk in &disks {
            disk.flush().await?;
        }
        for (number, disk) in disks.iter().enumerate().rev() {
            head.medium = (number as u32).into();
            head.seal();
            let mut bytes = Buffer::zeroed(PAGE_BYTES);
            bytes.copy_from_slice(head.as_bytes());
            disk.write(Sector::at_byte(HEAD_AT[0]), &Segments::new(&bytes), Safe::OnReturn).await?;
            disk.flush().await?;
        }
        Self::open(disks, options).await
    }

    /// Opens a pool: all its media, in any order. Reads in proportion to the journal, not to the pool.
    pub async fn open(disks: Vec<Rc<dyn Disk>>, options: Options) -> Result<Rc<Self>, PoolError> {
        let (disks, head, slot) = sort_media(disks).await?;
        let unknown = head.must_understand.get() & !MUST_UNDERSTAND;
        if unknown != 0 {
            return Err(PoolError::Features(unknown));
        }
        let media = MediaSet::new(disks, &head);
        let catalog = read_catalog(&media, &head).await?;
        let ring = Ring {
            at: head.journal_at.get(),
            bytes: head.journal_bytes.get(),
            end: head.journal_start.get(),
            written: 0,
            freed: 0,
            sequence: head.journal_sequence.get(),
        };
        let used = head.used_grains.get();
        let pool = Self::assemble(media, head, slot, catalog, ring, used, &options);
        pool.replay().await?;
        pool.finish_groups_at_open().await?;
        Ok(pool)
    }

    /// Applies every whole record after the checkpoint. Layers that are dropped further on are left out: their pages
    /// may belong to somebody else by now.
    async fn replay(self: &Rc<Self>) -> Result<(), DiskError> {
        let (mut ring, mut dropped, mut without_leaves) = (self.ring(), HashSet::new(), HashSet::new());
        while let Some(ops) = ring.read(&self.media, self.uuid().into_bytes()).await? {
            for op in ops {
                match op {
                    Op::Put(Put::DropLayer(layer)) => drop(dropped.insert(layer)),
                    Op::Put(Put::Layer(layer)) if layer.dying.is_some_and(|d| d & MAP_FOLLOWS != 0) => {
                        without_leaves.insert(layer.id);
                    }
                    _ => {}
                }
            }
        }
        let mut ring = self.ring();
        let mut some = false;
        while let Some(ops) = ring.read(&self.media, self.uuid().into_bytes()).await? {
            for op in ops {
                match op {
                    Op::Map { layer, .. } | Op::Node { layer, .. } if dropped.contains(&layer) => {}
                    Op::Map { layer, .. } if without_leaves.contains(&layer) => {}
                    op => self.replay_op(op).await?,
                }
            }
            some = true;
        }
        self.replayed(ring);
        if some && !self.is_read_only() {
            // What was found may lie in a cache of the device: nothing builds on it before it is durable.
            self.media.flush().await?;
        }
        Ok(())
    }

    async fn replay_op(&self, op: Op) -> Result<(), DiskError> {
        match op {
            Op::Map { layer, index, entry } => {
                let (leaf, slot) = leaf_of(index);
                if let Some(page) = self.leaf(layer, leaf).await? {
                    self.pages.mark_dirty(&page, slot, Entry(entry).0, true);
                }
            }
            Op::Node { layer, level, index, pair } => {
                if level + 1 < HEIGHT {
                    let leaf = index.saturating_mul((PAGE_ENTRIES as u64).pow(level));
                    if let Some(parent) = self.node_at(layer, level + 1, leaf).await? {
                        let slot = (index % PAGE_ENTRIES as u64) as usize;
                        self.pages.mark_dirty(&parent, slot, pair, true);
                    }
                }
                self.catalog.borrow_mut().node(layer, level, pair);
            }
            Op::Used { first, count } => self.replay_bits(first, count, true).await?,
            Op::Free { first, count } => {
                self.replay_bits(first, count, false).await?;
                self.space.add_stale(u64::from(first), u64::from(count));
            }
            Op::Usage(used) => self.space.set_used(used),
            Op::Put(put) => self.catalog.borrow_mut().put(put),
        }
        Ok(())
    }

    async fn replay_bits(&self, first: u32, count: u32, used: bool) -> Result<(), DiskError> {
        for grain in u64::from(first)..u64::from(first) + u64::from(count) {
            let Some((key, pair, word, bit)) = bitmap_place(&self.media, grain) else { break };
            let page = self.pages.load(&self.media, key, pair).await?;
            let value = if used { page.get(word) | 1 << bit } else { page.get(word) & !(1 << bit) };
            self.pages.mark_dirty(&page, word, value, true);
        }
        Ok(())
    }
}

/// Writes the bitmap pages of a fresh medium: reserved grains and those past the end are used.
async fn write_bitmap(
    disk: &dyn Disk,
    number: usize,
    first: u64,
    bitmap_grain: u64,
    pages: u64,
    reserved: u64,
) -> Result<(), PoolError> {
    for index in 0..pages {
        let mut entries = [0u64; PAGE_ENTRIES];
        for grain in 0..reserved.saturating_sub(index * BITMAP_GRAINS).min(BITMAP_GRAINS) {
            entries[(grain / 64) as usize] |= 1 << (grain % 64);
        }
        let key = PageKey { tree: BITMAP_TREE | number as u64, level: 0, index };
        let pair = (first + bitmap_grain) * GRAIN_PAIRS + index;
        let mut bytes = Buffer::zeroed(PAGE_BYTES);
        encode_page(key, pair, 1, &entries, &mut bytes);
        let at = Sector::at_byte(bitmap_grain * GRAIN_BYTES + index * PAIR_BYTES);
        disk.write(at, &Segments::new(&bytes), Safe::AtNextFlush).await?;
    }
    Ok(())
}

/// Puts the media in the order of the pool's table; checks that all are there and long enough. The head is that of
/// medium 0.
async fn sort_media(disks: Vec<Rc<dyn Disk>>) -> Result<(Vec<Rc<dyn Disk>>, Head, usize), PoolError> {
    let mut heads = Vec::new();
    for (medium, disk) in disks.into_iter().enumerate() {
        let Some((head, slot)) = read_head(&*disk).await? else { return Err(PoolError::NotAPool { medium }) };
        heads.push((head, slot, disk));
    }
    heads.sort_by_key(|(head, ..)| head.medium.get());
    let Some((first, slot)) = heads.first().map(|(head, slot, _)| (head.clone(), *slot)) else {
        return Err(PoolError::Unfit("a pool has one medium at least"));
    };
    let wanted = first.media.get() as usize;
    let ours = |(number, (head, ..)): (usize, &(Head, usize, Rc<dyn Disk>))| {
        head.pool == first.pool && head.medium.get() as usize == number
    };
    let given = heads.iter().enumerate().filter(|h| ours(*h)).count();
    if given != wanted || heads.len() != wanted {
        return Err(PoolError::Media { wanted, given });
    }
    for (medium, (_, _, disk)) in heads.iter().enumerate() {
        let (found, wanted) =
            (disk.shape().bytes(), first.table[medium].grains.get().saturating_mul(GRAIN_BYTES));
        if found < wanted {
            return Err(PoolError::Truncated { medium, found, wanted });
        }
    }
    if let Some((what, found)) = implausible(&first) {
        return Err(Corrupt { what, medium: 0, at: HEAD_AT[slot], found, expected: 0 }.into());
    }
    Ok((heads.into_iter().map(|(.., disk)| disk).collect(), first, slot))
}

/// A field of a head that cannot be, though its checksum is right: name and value. Everything that is computed from
/// the head later relies on this.
fn implausible(head: &Head) -> Option<(&'static str, u64)> {
    let mut first = 0;
    for row in &head.table[..head.media.get() as usize] {
        let (grains, bitmap, reserved) =
            (row.grains.get(), row.bitmap_grain.get(), row.reserved_grains.get());
        let pairs = grains.div_ceil(BITMAP_GRAINS).div_ceil(GRAIN_PAIRS);
        if row.first_grain.get() != first || grains > u64::from(u32::MAX) {
            return Some(("place of a medium", row.first_grain.get()));
        }
        if reserved > grains || bitmap == 0 || bitmap.checked_add(pairs).is_none_or(|end| end > reserved) {
            return Some(("place of a bitmap", bitmap));
        }
        first += grains;
        if first > u64::from(u32::MAX) {
            return Some(("number of grains", first));
        }
    }
    let limit = head.table[0].bitmap_grain.get() * GRAIN_BYTES;
    let page = PAGE_BYTES as u64;
    let inside = |at: u64, bytes: u64| {
        at >= GRAIN_BYTES && at.is_multiple_of(page) && at.checked_add(bytes).is_some_and(|end| end <= limit)
    };
    let (at, bytes, start) = (head.journal_at.get(), head.journal_bytes.get(), head.journal_start.get());
    if !inside(at, bytes) || bytes < 16 * page || start > bytes || !start.is_multiple_of(page) {
        return Some(("place of the journal", at));
    }
    let area = head.catalog_bytes.get();
    if !area.is_multiple_of(page) || !head.catalog_at.iter().all(|at| inside(at.get(), area)) {
        return Some(("place of the catalog", head.catalog_at[0].get()));
    }
    if head.catalog_length.get() > area {
        return Some(("length of the catalog", head.catalog_length.get()));
    }
    if head.used_grains.get() > first {
        return Some(("number of used grains", head.used_grains.get()));
    }
    // Numbers that only rise by one at a time never come near these.
    let numbers = [head.next_id.get(), head.sequence.get(), head.journal_sequence.get()];
    numbers.into_iter().find(|n| *n >= 1 << 62).map(|n| ("running number", n))
}

async fn read_catalog(media: &MediaSet, head: &Head) -> Result<Catalog, PoolError> {
    let at = head.catalog_at[head.catalog_slot.get().min(1) as usize].get();
    let length = head.catalog_length.get() as usize;
    let mut bytes = Buffer::zeroed(length.next_multiple_of(PAGE_BYTES));
    media.read(at, &SegmentsMut::new(&mut bytes)).await?;
    let (found, expected) = (crc32c::crc32c(&bytes[..length]), head.catalog_crc.get());
    if found != expected {
        let (found, expected) = (u64::from(found), u64::from(expected));
        return Err(Corrupt { what: "catalog", medium: 0, at, found, expected }.into());
    }
    let mut catalog = Catalog::decode(&bytes[..length]).map_err(|_| Corrupt {
        what: "catalog entry",
        medium: 0,
        at,
        found: 0,
        expected: 0,
    })?;
    catalog.next_id = catalog.next_id.max(head.next_id.get());
    Ok(catalog)
}
