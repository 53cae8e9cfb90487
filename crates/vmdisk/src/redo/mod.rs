//! A redo log: a disk that is a base plus what was written since, in a COWD file (semantics page 4.1).
//!
//! Reads come from the file where it holds the grain, else from below. Writes of grains that the file does not hold
//! yet take new sectors at its end; where they are waits in memory, and reads are answered from there. A flush
//! settles it (R11), for all grains at once:
//!
//! 1. data is out; whole new tables, which nobody refers to yet, too;  2. flush;
//! 3. entries of old tables, directory entries;  4. flush; then the flush is answered.
//!
//! A crash leaks grains at most; no entry ever points to what was not there first. Overwriting a grain that the
//! file holds touches no metadata.

pub mod format;
mod map;
pub(crate) mod pages;
mod runs;
mod settle;
#[cfg(test)]
mod tests;

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use block::{
    BLOCK_SECTORS, Disk, DiskError, Extent, Extents, Gate, Generation, Io, Kind, SECTOR_BYTES, Safe, Sector,
    Segments, SegmentsMut, Shape, check_range,
};
use lane::Buffer;
use lane::sync::{Turn, Waiters};
use smallvec::SmallVec;
use zerocopy::{FromZeros, IntoBytes};

use crate::exclusive;
use crate::file::GrowingFile;
use crate::together;
use format::{Checked, Corrupt, Header, MAX_CAPACITY, MAX_GRAIN};
use map::{Map, NotYet, Piece, Placed};

/// The file grows by this many sectors (16 MiB, as ESX does).
pub const GROW_SECTORS: u64 = (16 << 20) / SECTOR_BYTES;
/// Pages of grain tables in memory, 4 KiB each: 16 MiB, which covers 2 GiB of disk at one-sector grains.
pub const CACHE_PAGES: usize = 4096;

/// Why a redo log cannot be made or opened.
#[derive(Debug, thiserror::Error)]
pub enum RedoError {
    /// R13: the disk is too large for the format.
    #[error(
        "a redo log covers at most 2032 GiB, this disk has {} GiB: cut it below VMFS (--via snapshot), or keep it on an array LUN",
        sectors >> 21
    )]
    TooLarge {
        /// Length of the disk in sectors.
        sectors: u64,
    },
    /// The grain size is no power of two from 1 to 2048 sectors.
    #[error("a grain has a power of two from 1 to 2048 sectors, not {0}")]
    Grain(u64),
    /// The file is no COWD file that makes sense.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// The redo log and what lies below differ in length: the chain is refused (chapter 5).
    #[error("the redo log is for {redo} sectors, the disk below has {below}")]
    Capacity {
        /// Length in the redo log's header.
        redo: u64,
        /// Length of the disk below.
        below: u64,
    },
    /// Reading or writing failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// A disk made of a base and a COWD redo log.
pub struct RedoDisk {
    file: Rc<dyn GrowingFile>,
    below: Rc<dyn Disk>,
    layout: Checked,
    read_only: bool,
    map: RefCell<Map>,
    /// A write of a new grain has ended; others may look again.
    written: Waiters,
    growing: Turn,
    settling: together::Shared,
    /// The header on disk says that the file is in use.
    marked_dirty: Cell<bool>,
    /// What lies below has writes that a flush has not reached yet: the first flush here goes there too.
    below_unflushed: Cell<bool>,
    halted: Cell<bool>,
    gate: Rc<Gate>,
    /// For the settling in the background.
    this: Weak<Self>,
    in_background: Cell<bool>,
}

impl RedoDisk {
    /// Makes an empty redo log for a disk of `capacity` sectors in `file`, durable when this returns.
    pub async fn create(file: &dyn GrowingFile, capacity: u64, grain: u64) -> Result<(), RedoError> {
        if capacity > MAX_CAPACITY {
            return Err(RedoError::TooLarge { sectors: capacity });
        }
        if !grain.is_power_of_two() || grain > MAX_GRAIN {
            return Err(RedoError::Grain(grain));
        }
        let layout = Checked::new(capacity, grain);
        let start = layout.data_start();
        file.grow(start.next_multiple_of(GROW_SECTORS)).await?;
        file.zero(Sector(layout.directory), start - layout.directory, false).await?;
        let mut buffer = Buffer::zeroed(size_of::<Header>());
        buffer.copy_from_slice(layout.raw().as_bytes());
        file.write(Sector(0), &Segments::new(&buffer), Safe::AtNextFlush).await?;
        file.flush().await?;
        Ok(())
    }

    /// Opens a redo log over `below`. Reads its header and directory, and its tables only when it was not closed and
    /// is small. `below_unflushed` says that `below` took writes which were not flushed: the first flush of this
    /// disk then reaches them too.
    pub async fn open(
        file: Rc<dyn GrowingFile>,
        below: Rc<dyn Disk>,
        read_only: bool,
        below_unflushed: bool,
    ) -> Result<Rc<Self>, RedoError> {
        let layout = load_header(&*file).await?;
        let below_sectors = below.shape().sectors;
        if layout.capacity != below_sectors {
            return Err(RedoError::Capacity { redo: layout.capacity, below: below_sectors });
        }
        let directory = load_directory(&*file, &layout).await?;
        let map = Map::new(&layout, directory, file.shape().sectors, CACHE_PAGES)?;
        let disk = Rc::new_cyclic(|this| Self {
            file,
            below,
            layout,
            read_only,
            map: RefCell::new(map),
            written: Waiters::new(),
            growing: Turn::new(),
            settling: together::Shared::default(),
            marked_dirty: Cell::new(layout.dirty),
            below_unflushed: Cell::new(below_unflushed),
            halted: Cell::new(false),
            gate: Gate::new(),
            this: Weak::clone(this),
            in_background: Cell::new(false),
        });
        let free = disk.next_free_at_open().await?;
        disk.map.borrow_mut().set_next_free(free);
        Ok(disk)
    }

    /// Settles everything and marks the file as closed, with the right next free sector. Writing goes on afterwards
    /// if somebody wants to: the mark is then set again.
    pub async fn close(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Ok(());
        }
        self.flush_now().await?;
        if self.marked_dirty.get() {
            self.write_header(false).await?;
            self.file.flush().await.map_err(|e| self.halt(e))?;
            self.marked_dirty.set(false);
        }
        Ok(())
    }

    /// The disk below.
    pub fn below(&self) -> &Rc<dyn Disk> {
        &self.below
    }

    /// Sectors of the file that are in use: header, directory, tables and grains, leaked ones included.
    pub fn used_sectors(&self) -> u64 {
        self.map.borrow().next_free()
    }

    /// Calls `each` with ranges (first sector, end) outside of which this redo log certainly holds nothing. Only the
    /// directory and what waits in memory are asked, so this does not wait.
    pub(crate) fn possible(&self, mut each: impl FnMut(u64, u64)) {
        let grain = self.layout.grain;
        let capacity = self.layout.capacity;
        let ranges = |first: u64, end: u64| each((first * grain).min(capacity), (end * grain).min(capacity));
        self.map.borrow().possible(ranges);
    }

    /// The longest that the file of a redo log for `capacity` sectors can get, in sectors.
    pub fn longest_file(capacity: u64) -> u64 {
        let layout = Checked::new(capacity.min(MAX_CAPACITY), 1);
        let tables = layout.directory_entries * format::TABLE_SECTORS;
        // Up to 7 of 16 sectors are lost where small and large writes alternate.
        let grains = capacity.min(MAX_CAPACITY) * 16 / 9;
        (layout.data_start() + tables + grains).next_multiple_of(GROW_SECTORS).min(format::MAX_FILE_SECTORS)
    }

    /// The first range at or after `at`, before `end`, that this redo log holds itself.
    pub async fn next_held(&self, at: Sector, end: Sector) -> Result<Option<(Sector, u64)>, DiskError> {
        let mut at = at.0;
        while at < end.0 {
            // A directory entry of zero with nothing waiting skips a whole table without reading.
            let skip = self.map.borrow().skip_empty(at / self.layout.grain) * self.layout.grain;
            at = at.max(skip);
            let count = (end.0.saturating_sub(at)).min(self.layout.grain * pages::PAGE_ENTRIES);
            if count == 0 {
                return Ok(None);
            }
            let mut here = at;
            for piece in self.locate(Sector(at), count).await? {
                match piece {
                    Piece::Here { count, .. } => return Ok(Some((Sector(here), count))),
                    Piece::Below { count } => here += count,
                }
            }
            at += count;
        }
        Ok(None)
    }

    fn check(&self, at: Sector, bytes: usize, changes: bool) -> Result<u64, DiskError> {
        assert!((bytes as u64).is_multiple_of(SECTOR_BYTES), "segments are whole sectors");
        let count = bytes as u64 / SECTOR_BYTES;
        check_range(self.layout.capacity, at, count)?;
        self.may(changes)?;
        Ok(count)
    }

    fn may(&self, changes: bool) -> Result<(), DiskError> {
        match changes {
            true if self.read_only => Err(DiskError::ReadOnly),
            true if self.halted.get() => Err(DiskError::Halted),
            _ => Ok(()),
        }
    }

    /// Where a range is: pieces that cover it, in order.
    async fn locate(&self, at: Sector, count: u64) -> Result<SmallVec<[Piece; 4]>, DiskError> {
        let grain = self.layout.grain;
        let (first, end) = (at.0 / grain, (at.0 + count).div_ceil(grain));
        let pages = self.pages(first, end).await?;
        Ok(self.map.borrow().locate(at.0, count, &pages))
    }

    async fn read_range(&self, at: Sector, into: &SegmentsMut<'_>) -> Result<(), DiskError> {
        let count = self.check(at, into.len(), false)?;
        if count == 0 {
            return Ok(());
        }
        let pieces = self.locate(at, count).await?;
        if let [only] = pieces[..] {
            return match only {
                Piece::Here { sector, .. } => self.file.read(Sector(sector), into).await,
                Piece::Below { .. } => self.below.read(at, into).await,
            };
        }
        let mut done = 0u64;
        let slices: SmallVec<[(Piece, u64, SegmentsMut<'_>); 4]> = pieces
            .into_iter()
            .map(|piece| {
                let (from, count) = (done, piece.count());
                done += count;
                let slice = into.slice_mut((from * SECTOR_BYTES) as usize, (count * SECTOR_BYTES) as usize);
                (piece, from, slice)
            })
            .collect();
        let operations = slices.iter().map(|(piece, from, slice)| match piece {
            Piece::Here { sector, .. } => self.file.read(Sector(*sector), slice),
            Piece::Below { .. } => self.below.read(at.plus(*from), slice),
        });
        together::all(operations.collect()).await
    }

    /// Finds or makes a place for every grain of a range. New places are noted as being written; the caller ends
    /// that by [`RedoDisk::written`].
    async fn place(&self, at: Sector, count: u64) -> Result<Placed, DiskError> {
        let grain = self.layout.grain;
        let (first, end) = (at.0 / grain, (at.0 + count).div_ceil(grain));
        loop {
            let pages = self.pages(first, end).await?;
            let answer = self.map.borrow_mut().decide(first, end, &pages);
            match answer {
                Ok(placed) => return Ok(placed),
                Err(NotYet::Busy) => {
                    // Somebody writes one of these grains for the first time: its place is known when that is done.
                    let ready = || (!self.map.borrow().is_being_written(first, end)).then_some(());
                    self.written.until(ready).await;
                }
                Err(NotYet::Grow { sectors }) => self.grow(sectors).await?,
                Err(NotYet::Full) => return Err(DiskError::NoSpace),
            }
        }
    }

    async fn grow(&self, sectors: u64) -> Result<(), DiskError> {
        let _turn = self.growing.take().await;
        if self.map.borrow().file_sectors() >= sectors {
            return Ok(());
        }
        let target = sectors.next_multiple_of(GROW_SECTORS).min(format::MAX_FILE_SECTORS);
        self.file.grow(target).await?;
        self.map.borrow_mut().set_file_sectors(self.file.shape().sectors.max(target));
        Ok(())
    }

    /// New grains have been written, or not: their places wait for the next flush, or are given up.
    fn end_of_write(&self, new: &[(u64, runs::Run)], written: bool) {
        self.map.borrow_mut().end_of_write(new, written);
        self.written.wake_all();
    }

    async fn write_range(&self, at: Sector, from: &Segments<'_>, safe: Safe) -> Result<(), DiskError> {
        let count = self.check(at, from.len(), true)?;
        if count == 0 {
            return Ok(());
        }
        let Placed { pieces, new } = self.place(at, count).await?;
        let grain = self.layout.grain;
        // A grain that waits for its table entry is not found after a power loss, however safe its data is.
        let settled =
            new.is_empty() && !self.map.borrow().is_waiting(at.0 / grain, (at.0 + count).div_ceil(grain));
        let result = if grain == 1 || new.is_empty() {
            self.write_pieces(at, from, &pieces, if settled { safe } else { Safe::AtNextFlush }).await
        } else {
            self.write_with_fill(at, from, &pieces, &new).await
        };
        if !new.is_empty() {
            self.end_of_write(&new, result.is_ok());
        }
        result?;
        if safe == Safe::OnReturn && !settled {
            return self.flush_now().await;
        }
        self.bound_what_waits().await
    }

    /// What waits in memory stays bounded though nobody flushes: it is settled in the background, so that no writer
    /// (and no cut that waits for writers) has to wait for flushes; only when that does not keep up, by the writer.
    async fn bound_what_waits(&self) -> Result<(), DiskError> {
        let (wanted, urgent) = {
            let map = self.map.borrow();
            (map.wants_settling(1), map.wants_settling(4))
        };
        if urgent {
            return self.flush_now().await;
        }
        if wanted && !self.in_background.replace(true) {
            let this = Weak::clone(&self.this);
            drop(lane::spawn(async move {
                let Some(disk) = this.upgrade() else { return };
                if let Err(error) = disk.flush_now().await {
                    tracing::warn!(%error, "a redo log could not be settled; the next flush says so");
                }
                disk.in_background.set(false);
            }));
        }
        Ok(())
    }

    async fn flush_now(&self) -> Result<(), DiskError> {
        self.may(true)?;
        self.settling.run(|| self.settle()).await
    }

    /// Writes a range whose every grain has a place that holds it wholly (or gets it wholly now).
    async fn write_pieces(
        &self,
        at: Sector,
        from: &Segments<'_>,
        pieces: &[(u64, u64, u64)],
        safe: Safe,
    ) -> Result<(), DiskError> {
        let grain = self.layout.grain;
        let end = at.0 + from.len() as u64 / SECTOR_BYTES;
        let slices: SmallVec<[(u64, Segments<'_>); 4]> = pieces
            .iter()
            .map(|(first, grains, sector)| {
                let (start, stop) = ((first * grain).max(at.0), ((first + grains) * grain).min(end));
                let slice = from.slice(
                    ((start - at.0) * SECTOR_BYTES) as usize,
                    ((stop - start) * SECTOR_BYTES) as usize,
                );
                (sector + (start - first * grain), slice)
            })
            .collect();
        let operations = slices.iter().map(|(sector, slice)| self.file.write(Sector(*sector), slice, safe));
        together::all(operations.collect()).await
    }

    /// As above with grains of several sectors, some of them new: what the write leaves of a new grain is filled
    /// from below. The grains travel through one buffer, filled at both ends first.
    async fn write_with_fill(
        &self,
        at: Sector,
        from: &Segments<'_>,
        pieces: &[(u64, u64, u64)],
        new: &[(u64, runs::Run)],
    ) -> Result<(), DiskError> {
        let grain = self.layout.grain;
        let end = at.0 + from.len() as u64 / SECTOR_BYTES;
        for (first, grains, sector) in pieces {
            let (start, stop) = ((first * grain).max(at.0), ((first + grains) * grain).min(end));
            let from = from
                .slice(((start - at.0) * SECTOR_BYTES) as usize, ((stop - start) * SECTOR_BYTES) as usize);
            let is_new = new.iter().any(|(g, run)| (*g..g + run.grains).contains(first));
            if !is_new || (start == first * grain && stop == (first + grains) * grain) {
                self.file.write(Sector(sector + (start - first * grain)), &from, Safe::AtNextFlush).await?;
                continue;
            }
            self.fill_and_write(*first, *grains, *sector, start, &from).await?;
        }
        Ok(())
    }

    async fn fill_and_write(
        &self,
        first: u64,
        grains: u64,
        sector: u64,
        start: u64,
        from: &Segments<'_>,
    ) -> Result<(), DiskError> {
        let grain = self.layout.grain;
        let mut whole = Buffer::zeroed((grains * grain * SECTOR_BYTES) as usize);
        // The last grain of a disk may be longer than the disk.
        let below = (grains * grain).min(self.layout.capacity - first * grain);
        let into = SegmentsMut::new(&mut whole[..(below * SECTOR_BYTES) as usize]);
        self.below.read(Sector(first * grain), &into).await?;
        let offset = ((start - first * grain) * SECTOR_BYTES) as usize;
        from.copy_to(0, &mut whole[offset..offset + from.len()]);
        self.file.write(Sector(sector), &Segments::new(&whole), Safe::AtNextFlush).await
    }

    /// Zeroes: nothing to do where neither this file nor what is below holds data, else written out, for the format
    /// has no mark for zeroes.
    async fn zero_range(&self, at: Sector, count: u64) -> Result<(), DiskError> {
        const STEP: u64 = (1 << 20) / SECTOR_BYTES;
        let (mut at, end) = (at.0, at.0 + count);
        while at < end {
            let step = STEP.min(end - at);
            let mut extents = Extents::with_limit(64);
            self.status_of(Sector(at), step, &mut extents).await?;
            for extent in extents.iter().filter(|e| e.kind == Kind::Data) {
                self.write_zeroes(extent.at, extent.count).await?;
            }
            at = extents.end().map_or(end, |e| e.0);
        }
        Ok(())
    }

    async fn write_zeroes(&self, at: Sector, count: u64) -> Result<(), DiskError> {
        let grain = self.layout.grain;
        if grain > 1 {
            let zeroes = Buffer::zeroed((count * SECTOR_BYTES) as usize);
            return self.write_range(at, &Segments::new(&zeroes), Safe::AtNextFlush).await;
        }
        let Placed { pieces, new } = self.place(at, count).await?;
        let operations =
            pieces.iter().map(|(_, grains, sector)| self.file.zero(Sector(*sector), *grains, false));
        let result = together::all(operations.collect()).await;
        self.end_of_write(&new, result.is_ok());
        result?;
        self.bound_what_waits().await
    }

    async fn status_of(&self, at: Sector, count: u64, out: &mut Extents) -> Result<(), DiskError> {
        let (mut here, end) = (at.0, at.0 + count);
        while here < end && !out.is_full() {
            let step = (end - here).min(self.layout.grain * pages::PAGE_ENTRIES);
            for piece in self.locate(Sector(here), step).await? {
                let more = match piece {
                    Piece::Here { count, .. } => {
                        out.push(Extent { at: Sector(here), count, kind: Kind::Data, changed: true })
                    }
                    Piece::Below { count } => self.status_below(Sector(here), count, out).await?,
                };
                if !more {
                    return Ok(());
                }
                here += piece.count();
            }
        }
        Ok(())
    }

    /// False when `out` is full.
    async fn status_below(&self, at: Sector, count: u64, out: &mut Extents) -> Result<bool, DiskError> {
        let (mut at, end) = (at, at.plus(count));
        while at < end {
            let mut part = Extents::with_limit(64);
            self.below.status(at, end.0 - at.0, None, &mut part).await?;
            for extent in part.iter() {
                if !out.push(*extent) {
                    return Ok(false);
                }
            }
            at = part.end().unwrap_or(end);
        }
        Ok(true)
    }

    fn halt(&self, error: DiskError) -> DiskError {
        if !matches!(error, DiskError::NoSpace) {
            self.halted.set(true);
        }
        error
    }
}

/// Reads and checks the header of a redo log: for whoever wants to know what a file is.
pub async fn load_header(file: &dyn GrowingFile) -> Result<Checked, RedoError> {
    let sectors = file.shape().sectors;
    if sectors < size_of::<Header>() as u64 / SECTOR_BYTES {
        return Err(
            Corrupt { what: "length", at: 0, found: sectors, expected: "4 sectors or more".into() }.into()
        );
    }
    let mut buffer = Buffer::zeroed(size_of::<Header>());
    file.read(Sector(0), &SegmentsMut::new(&mut buffer)).await?;
    let mut header = Header::new_zeroed();
    header.as_mut_bytes().copy_from_slice(&buffer);
    let checked = header.check(sectors)?;
    Ok(checked)
}

/// Reads the directory: at most 4 MiB for a disk of 2 TiB with grains of one sector.
async fn load_directory(file: &dyn GrowingFile, layout: &Checked) -> Result<Vec<u32>, RedoError> {
    let mut buffer = Buffer::zeroed((layout.directory_sectors() * SECTOR_BYTES) as usize);
    file.read(Sector(layout.directory), &SegmentsMut::new(&mut buffer)).await?;
    let words = buffer.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    Ok(words.take(layout.directory_entries as usize).collect())
}

impl Disk for RedoDisk {
    fn shape(&self) -> Shape {
        let file = self.file.shape();
        Shape {
            sectors: self.layout.capacity,
            physical_block_bytes: (BLOCK_SECTORS * SECTOR_BYTES) as u32,
            read_only: self.read_only,
            unmap_reads_zero: false,
            memory_align: file.memory_align.max(self.below.shape().memory_align),
        }
    }

    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        Box::pin(self.read_range(at, into))
    }

    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a> {
        Box::pin(async move {
            let _pass = self.gate.enter().await;
            self.write_range(at, from, safe).await
        })
    }

    fn zero(&self, at: Sector, count: u64, _may_free: bool) -> Io<'_> {
        Box::pin(async move {
            check_range(self.layout.capacity, at, count)?;
            self.may(true)?;
            let _pass = self.gate.enter().await;
            self.zero_range(at, count).await
        })
    }

    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        // Only a hint: the format cannot say "not needed", and giving nothing up is always right.
        let answer = check_range(self.layout.capacity, at, count).and_then(|()| self.may(true));
        Box::pin(std::future::ready(answer))
    }

    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        Box::pin(async move {
            check_range(self.layout.capacity, at, count)?;
            match since {
                Some(_) => Err(DiskError::UnknownGeneration),
                None => self.status_of(at, count, out).await,
            }
        })
    }

    fn compare_and_write<'a>(
        &'a self,
        at: Sector,
        expected: &'a Segments<'a>,
        new: &'a Segments<'a>,
    ) -> Io<'a> {
        Box::pin(async move {
            self.check(at, new.len(), true)?;
            let _alone = self.gate.alone().await;
            let mut found = Buffer::zeroed(expected.len());
            self.read_range(at, &SegmentsMut::new(&mut found)).await?;
            exclusive::compare(expected, &found)?;
            self.write_range(at, new, Safe::AtNextFlush).await
        })
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(async move {
            match self.read_only {
                true => Ok(()),
                false => self.flush_now().await,
            }
        })
    }
}
