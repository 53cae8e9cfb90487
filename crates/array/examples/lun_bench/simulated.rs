//! A medium that pretends: a pool whose LUN has 10 TiB mapped, with a map that is computed when it is read.
//!
//! Made from a real, empty pool through the format's own structures; whatever is written stays in memory. Benchmarks
//! and tests use it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use array::catalog::Catalog;
use array::format::{
    BITMAP_GRAINS, BITMAP_TREE, Entry, GRAIN_BLOCKS, GRAIN_BYTES, GRAIN_PAIRS, HEAD_AT, Head, Mark,
    PAGE_BYTES, PAGE_ENTRIES, PAIR_BYTES, PageKey, encode_page,
};
use array::{Lun, NewLun, NewPool, Options, Pool};
use block::{
    Disk, DiskError, Extents, Generation, Io, MemoryDisk, Pages, Safe, Sector, Segments, SegmentsMut, Shape,
};
use zerocopy::IntoBytes;

/// Where the pages of the pretended map lie.
#[derive(Copy, Clone)]
struct Map {
    tree: u64,
    /// By level, leaves first: number of the first pair, and how many.
    levels: [(u64, u64); 4],
    /// First grain with data, and how many.
    data: (u64, u64),
    /// The data of grain n of the LUN lies at n times this, in turn. 1: in order.
    stride: u64,
}

pub(crate) struct Medium {
    written: MemoryDisk,
    map: Cell<Option<Map>>,
    pages: RefCell<Pages>,
    /// Pages of maps and bitmaps that were read, pretended ones or not.
    pub(crate) page_reads: Cell<u64>,
    operations: Cell<Operations>,
}

/// What a medium was asked for.
#[derive(Copy, Clone, Default, PartialEq, Eq, Debug)]
pub(crate) struct Operations {
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    pub(crate) flushes: u64,
}

impl Medium {
    /// A medium that pretends nothing yet.
    pub(crate) fn new(sectors: u64) -> Rc<Self> {
        Rc::new(Self {
            written: MemoryDisk::new(sectors),
            map: Cell::new(None),
            pages: RefCell::default(),
            page_reads: Cell::new(0),
            operations: Cell::default(),
        })
    }

    /// What it was asked for since it was made; punched holes and the like are not counted.
    #[allow(dead_code)] // the benchmark does not ask
    pub(crate) fn operations(&self) -> Operations {
        self.operations.get()
    }

    fn count(&self, change: impl FnOnce(&mut Operations)) {
        let mut operations = self.operations.get();
        change(&mut operations);
        self.operations.set(operations);
    }
}

impl Map {
    fn new(tree: u64, grains: u64, first: u64, stride: u64) -> Self {
        let (mut levels, mut count) = ([(0, 0); 4], grains);
        for level in &mut levels {
            count = count.div_ceil(PAGE_ENTRIES as u64);
            level.1 = count;
        }
        let mut pair = first * GRAIN_PAIRS;
        for level in levels.iter_mut().rev() {
            level.0 = pair;
            pair += level.1;
        }
        let data = pair.div_ceil(GRAIN_PAIRS);
        Self { tree, levels, data: (data, grains), stride }
    }

    fn end(&self) -> u64 {
        self.data.0 + self.data.1
    }

    /// The page of a pair, if it is one of the map's.
    fn page(&self, pair: u64) -> Option<[u8; PAGE_BYTES]> {
        let level = self.levels.iter().position(|(first, count)| pair.wrapping_sub(*first) < *count)?;
        let index = pair - self.levels[level].0;
        let mut entries = [0; PAGE_ENTRIES];
        let all = (0..GRAIN_BLOCKS).fold(Entry::default(), |e, b| e.with_mark(b, Mark::Written));
        for (slot, entry) in entries.iter_mut().enumerate() {
            let below = index * PAGE_ENTRIES as u64 + slot as u64;
            let limit = if level == 0 { self.data.1 } else { self.levels[level - 1].1 };
            if below < limit {
                *entry = match level {
                    0 => all.with_grain((self.data.0 + below * self.stride % self.data.1) as u32).0,
                    _ => self.levels[level - 1].0 + below,
                };
            }
        }
        let key = PageKey { tree: self.tree, level: level as u32, index };
        let mut bytes = [0; PAGE_BYTES];
        encode_page(key, pair, 1, &entries, &mut bytes);
        Some(bytes)
    }
}

impl Disk for Medium {
    fn shape(&self) -> Shape {
        self.written.shape()
    }
    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        self.count(|o| o.reads += 1);
        Box::pin(async move {
            let Some(map) = self.map.get().filter(|_| into.len() == PAIR_BYTES as usize) else {
                return self.written.read(at, into).await;
            };
            // A map page is always read with its twin.
            self.page_reads.set(self.page_reads.get() + 1);
            let pair = at.bytes() / PAIR_BYTES;
            let known = self.pages.borrow().next_page(pair) == Some(pair);
            match map.page(pair).filter(|_| !known) {
                None => self.written.read(at, into).await,
                Some(page) => {
                    into.zero(0, into.len());
                    into.copy_from(0, &page);
                    Ok(())
                }
            }
        })
    }
    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a> {
        self.count(|o| o.writes += 1);
        Box::pin(async move {
            self.written.write(at, from, safe).await?;
            // A page of the map that was written once is no longer computed: remembered by its pair.
            let end = (at.bytes() + from.len() as u64).div_ceil(PAIR_BYTES);
            for pair in at.bytes() / PAIR_BYTES..end {
                self.pages.borrow_mut().write(pair * 4096, &Segments::new(&[1; 4096]));
            }
            Ok(())
        })
    }
    fn zero(&self, at: Sector, count: u64, may_free: bool) -> Io<'_> {
        self.written.zero(at, count, may_free)
    }
    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        self.written.unmap(at, count)
    }
    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        self.written.status(at, count, since, out)
    }
    fn compare_and_write<'a>(
        &'a self,
        at: Sector,
        expected: &'a Segments<'a>,
        new: &'a Segments<'a>,
    ) -> Io<'a> {
        self.written.compare_and_write(at, expected, new)
    }
    fn flush(&self) -> Io<'_> {
        self.count(|o| o.flushes += 1);
        self.written.flush()
    }
}

/// A pool that pretends, its LUN and its medium.
pub(crate) type Simulated = (Rc<Medium>, Rc<Pool>, Rc<Lun>);

/// A pool with one LUN that has so many bytes mapped, and nothing in memory of it.
pub(crate) async fn pool(bytes: u64, scattered: bool) -> Result<Simulated, Box<dyn std::error::Error>> {
    let sectors = (bytes + bytes / 8 + (1 << 30)) / 512;
    let medium = Medium::new(sectors);
    let made = Pool::create(vec![medium.clone()], NewPool::new("bench"), Options::default()).await?;
    let lun = made.create_lun(NewLun::new("lun", bytes / 512)).await?;
    let (tree, pool) = (lun.record().ok_or(DiskError::Gone)?.top, made.uuid());
    made.settle().await?;
    drop((lun, made));
    let (mut head, at) = newest_head(&medium.written).await?;
    let first = head.table[0].reserved_grains.get();
    // Prime, so that every grain has its own place.
    let map = Map::new(tree, bytes / GRAIN_BYTES, first, if scattered { 48_271 } else { 1 });
    let place = Sector::at_byte(head.catalog_at[head.catalog_slot.get() as usize].get());
    let mut area = vec![0; head.catalog_bytes.get() as usize];
    medium.written.read(place, &SegmentsMut::new(&mut area)).await?;
    let mut catalog =
        Catalog::decode(&area[..head.catalog_length.get() as usize]).map_err(|_| "a catalog")?;
    let layer = catalog.layers.get_mut(&tree).ok_or("the LUN's layer")?;
    (layer.root, layer.meta_grain) = (map.levels[3].0, (map.data.0 - 1) as u32);
    layer.meta_used = GRAIN_PAIRS as u32;
    let mut bytes = catalog.encode();
    head.catalog_length = (bytes.len() as u64).into();
    head.catalog_crc = crc32c::crc32c(&bytes).into();
    bytes.resize(bytes.len().next_multiple_of(PAGE_BYTES), 0);
    medium.written.write(place, &Segments::new(&bytes), Safe::OnReturn).await?;
    mark_used(&medium.written, &head, map.end()).await?;
    head.used_grains = map.end().into();
    head.search_from = map.end().into();
    head.sequence = (head.sequence.get() + 1).into();
    head.seal();
    medium.written.write(at, &Segments::new(head.as_bytes()), Safe::OnReturn).await?;
    medium.pages.replace(Pages::default());
    medium.map.set(Some(map));
    let opened = Pool::open(vec![medium.clone()], Options { punch: false, ..Options::default() }).await?;
    assert_eq!(opened.uuid(), pool);
    let lun = opened.lun("lun").ok_or("the LUN")?;
    Ok((medium, opened, lun))
}

async fn newest_head(disk: &MemoryDisk) -> Result<(Head, Sector), Box<dyn std::error::Error>> {
    let mut best: Option<(Head, Sector)> = None;
    for at in HEAD_AT.map(Sector::at_byte) {
        let mut bytes = [0; PAGE_BYTES];
        disk.read(at, &SegmentsMut::new(&mut bytes)).await?;
        let head = Head::check(&bytes).map_err(|v| format!("version {v}"))?;
        if let Some(head) = head
            && best.as_ref().is_none_or(|(b, _)| b.sequence.get() < head.sequence.get())
        {
            best = Some((head, at));
        }
    }
    best.ok_or_else(|| "no head".into())
}

/// Marks the first grains of the pool as used.
async fn mark_used(disk: &MemoryDisk, head: &Head, end: u64) -> Result<(), DiskError> {
    for index in 0..end.div_ceil(BITMAP_GRAINS) {
        let mut entries = [0u64; PAGE_ENTRIES];
        let used = (end - index * BITMAP_GRAINS).min(BITMAP_GRAINS);
        entries[..(used / 64) as usize].fill(u64::MAX);
        if !used.is_multiple_of(64) {
            entries[(used / 64) as usize] = (1 << (used % 64)) - 1;
        }
        let pair = head.table[0].bitmap_grain.get() * GRAIN_PAIRS + index;
        let mut bytes = [0; PAGE_BYTES];
        encode_page(PageKey { tree: BITMAP_TREE, level: 0, index }, pair, 1 << 20, &entries, &mut bytes);
        let at = Sector::at_byte(pair * PAIR_BYTES);
        disk.write(at, &Segments::new(&bytes), Safe::OnReturn).await?;
    }
    Ok(())
}
