//! Where each grain is: the directory, cached pages of tables, and what waits to be written into them. All of it is
//! memory and nothing here waits: callers bring the pages they need.

use std::rc::Rc;

use block::{BLOCK_SECTORS, DiskError, MediumFault, Sector};
use smallvec::SmallVec;

use super::format::{Checked, Corrupt, MAX_FILE_SECTORS, TABLE_ENTRIES, TABLE_SECTORS};
use super::pages::{Cache, PAGE_ENTRIES, Page, TABLE_PAGES};
use super::runs::{Run, Runs};

/// Above so many separate runs, or grains, what waits is settled without being asked: memory stays bounded.
const MAX_WAITING_RUNS: u64 = 8192;
const MAX_WAITING_GRAINS: u64 = 1 << 22;
/// Below this capacity (1 TiB) allocations of 4 KiB and more begin on a 4 KiB boundary: at worst 7 of 16 sectors are
/// lost, which the 32-bit addresses still bear (R13).
const ALIGNED_CAPACITY: u64 = 1 << 31;

/// A part of a range and where it is, in sectors.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) enum Piece {
    /// In the file, from `sector` on.
    Here { sector: u64, count: u64 },
    /// Not in the file.
    Below { count: u64 },
}

impl Piece {
    pub(super) fn count(&self) -> u64 {
        match self {
            Self::Here { count, .. } | Self::Below { count } => *count,
        }
    }
}

/// The pages for a range of grains, from the page of the first grain on; `None` where there is no table.
pub(super) struct Pages {
    pub(super) first: u64,
    pub(super) list: SmallVec<[Option<Rc<Page>>; 4]>,
}

impl Pages {
    #[inline]
    fn entry(&self, grain: u64) -> u32 {
        match &self.list[(grain / PAGE_ENTRIES - self.first) as usize] {
            Some(page) => page.entry((grain % PAGE_ENTRIES) as usize),
            None => 0,
        }
    }
}

/// Why a place cannot be had at once.
pub(super) enum NotYet {
    /// One of the grains is being written for the first time: wait.
    Busy,
    /// The file must be at least this long first.
    Grow { sectors: u64 },
    /// The format has no more addresses.
    Full,
}

/// Where everything of a write goes.
pub(super) struct Placed {
    /// (first grain, grains, sector), covering the range.
    pub(super) pieces: SmallVec<[(u64, u64, u64); 4]>,
    /// Those of them that are noted as being written.
    pub(super) new: SmallVec<[(u64, Run); 4]>,
}

/// Where a page of a table can be had.
pub(super) enum Look {
    /// There is no table.
    Empty,
    /// Here.
    Cached(Rc<Page>),
    /// In the file, at this sector.
    At(u64),
}

/// Entries of one batch, by table: what a settling writes.
pub(super) struct Batch {
    /// (first grain, run) that lie in one page, in order.
    pub(super) parts: Vec<(u64, Run)>,
    /// Tables that do not exist yet, and the place each gets.
    pub(super) new_tables: Vec<(u64, u64)>,
}

pub(super) struct Map {
    grain: u64,
    directory: Vec<u32>,
    cache: Cache,
    /// In the file, waiting for the next flush.
    waiting: Runs,
    /// Of those, what the flush under way is writing into the tables.
    settling: Runs,
    /// Being written for the first time: not to be read yet.
    writing: Runs,
    next_free: u64,
    file_sectors: u64,
    first_usable: u64,
    aligned: bool,
    /// Counts the changes of tables: a page read before such a change may be stale.
    commits: u64,
}

impl Map {
    /// Checks the directory: tables lie in the file, behind the directory, and do not overlap.
    pub(super) fn new(
        layout: &Checked,
        directory: Vec<u32>,
        file_sectors: u64,
        cache_pages: usize,
    ) -> Result<Self, Corrupt> {
        let first_usable = layout.directory + layout.directory_sectors();
        let mut tables: Vec<u32> = directory.iter().copied().filter(|t| *t != 0).collect();
        tables.sort_unstable();
        let mut free = first_usable;
        for table in &tables {
            let start = u64::from(*table);
            if start < free || start + TABLE_SECTORS > file_sectors {
                let index = directory.iter().position(|t| t == table).unwrap_or(0) as u64;
                return Err(Corrupt {
                    what: "grain table sector",
                    at: layout.directory * block::SECTOR_BYTES + index * 4,
                    found: start,
                    expected: format!("{free} to {file_sectors}, no overlap"),
                });
            }
            free = start + TABLE_SECTORS;
        }
        Ok(Self {
            grain: layout.grain,
            directory,
            cache: Cache::new(cache_pages),
            waiting: Runs::default(),
            settling: Runs::default(),
            writing: Runs::default(),
            next_free: file_sectors,
            file_sectors,
            first_usable,
            aligned: layout.capacity <= ALIGNED_CAPACITY,
            commits: 0,
        })
    }

    pub(super) fn commits(&self) -> u64 {
        self.commits
    }

    pub(super) fn next_free(&self) -> u64 {
        self.next_free
    }

    pub(super) fn set_next_free(&mut self, sector: u64) {
        self.next_free = sector.max(self.first_usable);
    }

    pub(super) fn file_sectors(&self) -> u64 {
        self.file_sectors
    }

    pub(super) fn set_file_sectors(&mut self, sectors: u64) {
        self.file_sectors = sectors;
    }

    /// One past the end of the last table, or of the directory.
    pub(super) fn tables_end(&self) -> u64 {
        let last = self.directory.iter().copied().max().unwrap_or(0);
        if last == 0 { self.first_usable } else { u64::from(last) + TABLE_SECTORS }
    }

    /// Keys of all pages that are in the file.
    pub(super) fn page_keys(&self) -> impl Iterator<Item = u64> + use<> {
        let tables: Vec<u64> =
            (0u64..).zip(&self.directory).filter(|(_, t)| **t != 0).map(|(i, _)| i).collect();
        tables.into_iter().flat_map(|table| (0..TABLE_PAGES).map(move |page| table * TABLE_PAGES + page))
    }

    #[cfg(test)]
    pub(super) fn waiting_runs(&self) -> usize {
        self.waiting.len()
    }

    #[cfg(test)]
    pub(super) fn cached_pages(&self) -> usize {
        self.cache.len()
    }

    pub(super) fn tables(&self) -> usize {
        self.directory.iter().filter(|t| **t != 0).count()
    }

    pub(super) fn look(&mut self, key: u64) -> Look {
        if let Some(page) = self.cache.get(key) {
            return Look::Cached(page);
        }
        self.page_place(key).map_or(Look::Empty, Look::At)
    }

    /// Sector of a page in the file.
    pub(super) fn page_place(&self, key: u64) -> Option<u64> {
        match self.directory.get((key / TABLE_PAGES) as usize) {
            None | Some(0) => None,
            Some(table) => Some(u64::from(*table) + key % TABLE_PAGES * BLOCK_SECTORS),
        }
    }

    /// Takes a page that was read from the file, if it makes sense.
    pub(super) fn loaded(&mut self, key: u64, page: Page) -> Result<Rc<Page>, DiskError> {
        for index in 0..PAGE_ENTRIES as usize {
            let sector = u64::from(page.entry(index));
            if sector != 0 && (sector < self.first_usable || sector + self.grain > self.file_sectors) {
                let what = "a COWD grain table entry points outside of the file";
                return Err(DiskError::Medium(MediumFault { at: Sector(sector), what }));
            }
        }
        let page = Rc::new(page);
        self.cache.put(key, Rc::clone(&page));
        Ok(page)
    }

    /// Walks over the grains from `first` to `end`: (grain, grains, sector or 0), neighbours joined.
    fn walk(&self, first: u64, end: u64, pages: &Pages, mut each: impl FnMut(u64, u64, u64)) {
        let mut grain = first;
        while grain < end {
            let runs = [self.waiting.at_or_after(grain), self.settling.at_or_after(grain)];
            let inside = runs.iter().flatten().find(|(start, _)| *start <= grain);
            if let Some((start, run)) = inside {
                let count = (start + run.grains).min(end) - grain;
                each(grain, count, run.sector + (grain - start) * self.grain);
                grain += count;
                continue;
            }
            let stop = runs.iter().flatten().map(|(start, _)| *start).min().unwrap_or(end).min(end);
            while grain < stop {
                let sector = u64::from(pages.entry(grain));
                let mut count = 1;
                let step = if sector == 0 { 0 } else { self.grain };
                while grain + count < stop && u64::from(pages.entry(grain + count)) == sector + count * step {
                    count += 1;
                }
                each(grain, count, sector);
                grain += count;
            }
        }
    }

    /// The pieces that cover `count` sectors from `at`.
    pub(super) fn locate(&self, at: u64, count: u64, pages: &Pages) -> SmallVec<[Piece; 4]> {
        let (end, unit) = (at + count, self.grain);
        let mut out: SmallVec<[Piece; 4]> = SmallVec::new();
        self.walk(at / unit, end.div_ceil(unit), pages, |grain, grains, sector| {
            let (start, stop) = ((grain * unit).max(at), ((grain + grains) * unit).min(end));
            let piece = match sector {
                0 => Piece::Below { count: stop - start },
                _ => Piece::Here { sector: sector + (start - grain * unit), count: stop - start },
            };
            match (out.last_mut(), piece) {
                (Some(Piece::Below { count }), Piece::Below { count: more }) => *count += more,
                (Some(Piece::Here { sector, count }), Piece::Here { sector: next, count: more })
                    if *sector + *count == next =>
                {
                    *count += more;
                }
                _ => out.push(piece),
            }
        });
        out
    }

    /// The first grain at or after `grain` that may be held; the directory alone is asked.
    pub(super) fn skip_empty(&self, grain: u64) -> u64 {
        let waiting = [self.waiting.at_or_after(grain), self.settling.at_or_after(grain)];
        let waiting = waiting.iter().flatten().map(|(start, _)| (*start).max(grain)).min();
        let mut table = grain / TABLE_ENTRIES;
        while self.directory.get(table as usize) == Some(&0) {
            table += 1;
        }
        let in_table = grain.max(table * TABLE_ENTRIES);
        waiting.map_or(in_table, |w| w.min(in_table))
    }

    /// Ranges of grains outside of which nothing is held.
    pub(super) fn possible(&self, mut each: impl FnMut(u64, u64)) {
        for (table, sector) in (0u64..).zip(&self.directory) {
            if *sector != 0 {
                each(table * TABLE_ENTRIES, (table + 1) * TABLE_ENTRIES);
            }
        }
        for runs in [&self.waiting, &self.settling, &self.writing] {
            let mut from = 0;
            while let Some((first, run)) = runs.at_or_after(from) {
                each(first, first + run.grains);
                from = first + run.grains;
            }
        }
    }

    pub(super) fn is_being_written(&self, first: u64, end: u64) -> bool {
        self.writing.at_or_after(first).is_some_and(|(start, _)| start < end)
    }

    /// Some of these grains are not in the tables yet.
    pub(super) fn is_waiting(&self, first: u64, end: u64) -> bool {
        let runs = [self.waiting.at_or_after(first), self.settling.at_or_after(first)];
        runs.iter().flatten().any(|(start, _)| *start < end)
    }

    /// Decides where the grains from `first` to `end` go, and notes the new ones as being written.
    pub(super) fn decide(&mut self, first: u64, end: u64, pages: &Pages) -> Result<Placed, NotYet> {
        if self.is_being_written(first, end) {
            return Err(NotYet::Busy);
        }
        let mut pieces: SmallVec<[(u64, u64, u64); 4]> = SmallVec::new();
        let mut missing = 0;
        self.walk(first, end, pages, |grain, grains, sector| {
            match pieces.last_mut() {
                Some((before, count, 0)) if sector == 0 && *before + *count == grain => *count += grains,
                _ => pieces.push((grain, grains, sector)),
            }
            missing += if sector == 0 { grains } else { 0 };
        });
        let mut new: SmallVec<[(u64, Run); 4]> = SmallVec::new();
        if missing == 0 {
            return Ok(Placed { pieces, new });
        }
        let mut sector = self.allocate(missing * self.grain)?;
        for (grain, grains, place) in pieces.iter_mut().filter(|p| p.2 == 0) {
            *place = sector;
            let run = Run { grains: *grains, sector };
            self.writing.insert_alone(*grain, run);
            new.push((*grain, run));
            sector += *grains * self.grain;
        }
        Ok(Placed { pieces, new })
    }

    fn allocate(&mut self, sectors: u64) -> Result<u64, NotYet> {
        let mut start = self.next_free;
        if self.aligned && sectors >= BLOCK_SECTORS {
            start = start.next_multiple_of(BLOCK_SECTORS);
        }
        let end = start + sectors;
        if end > MAX_FILE_SECTORS {
            return Err(NotYet::Full);
        }
        if end > self.file_sectors {
            return Err(NotYet::Grow { sectors: end });
        }
        self.next_free = end;
        Ok(start)
    }

    /// A place for a new table.
    pub(super) fn allocate_table(&mut self) -> Result<u64, NotYet> {
        self.allocate(TABLE_SECTORS)
    }

    pub(super) fn end_of_write(&mut self, new: &[(u64, Run)], written: bool) {
        for (grain, run) in new {
            self.writing.remove(*grain);
            if written {
                self.waiting.insert(*grain, *run, self.grain);
            }
        }
    }

    /// More waits than `times` the usual bound.
    pub(super) fn wants_settling(&self, times: u64) -> bool {
        self.waiting.len() as u64 >= MAX_WAITING_RUNS * times
            || self.waiting.grains() >= MAX_WAITING_GRAINS * times
    }

    /// Takes what waits into a batch for one settling; it is still answered from here. The tables that the batch
    /// needs and that do not exist are named without a place.
    pub(super) fn begin_settling(&mut self) -> Batch {
        debug_assert!(self.settling.is_empty(), "one settling at a time");
        let mut parts = Vec::new();
        let mut new_tables: Vec<(u64, u64)> = Vec::new();
        for (grain, run) in self.waiting.take() {
            self.settling.insert_alone(grain, run);
            let (mut at, end) = (grain, grain + run.grains);
            while at < end {
                let stop = ((at / PAGE_ENTRIES + 1) * PAGE_ENTRIES).min(end);
                let sector = run.sector + (at - grain) * self.grain;
                parts.push((at, Run { grains: stop - at, sector }));
                let table = at / TABLE_ENTRIES;
                if self.directory[table as usize] == 0 && new_tables.last().map(|t| t.0) != Some(table) {
                    new_tables.push((table, 0));
                }
                at = stop;
            }
        }
        Batch { parts, new_tables }
    }

    /// The batch is in the tables, durably.
    pub(super) fn settled(&mut self, batch: &Batch) {
        self.settling.take();
        for (table, sector) in &batch.new_tables {
            self.directory[*table as usize] = *sector as u32;
        }
        for (grain, run) in &batch.parts {
            let key = grain / PAGE_ENTRIES;
            if let Some(mut page) = self.cache.get(key) {
                set_entries(Rc::make_mut(&mut page), *grain, run, self.grain);
                self.cache.put(key, page);
            }
        }
        self.commits += 1;
    }

    /// The batch did not get through: it waits again.
    pub(super) fn not_settled(&mut self) {
        for (grain, run) in self.settling.take() {
            // It may touch runs that came meanwhile; it never overlaps them.
            self.waiting.insert_alone(grain, run);
        }
    }

    /// The directory sector that holds the entry of `table`, with the batch's new tables in it.
    pub(super) fn directory_sector(&self, sector: u64, new: &[(u64, u64)]) -> [u8; 512] {
        let mut out = [0; 512];
        for (index, bytes) in out.chunks_exact_mut(4).enumerate() {
            let table = sector * 128 + index as u64;
            let old = self.directory.get(table as usize).copied().unwrap_or(0);
            let entry = match new.binary_search_by_key(&table, |t| t.0) {
                Ok(found) => new[found].1 as u32,
                Err(_) => old,
            };
            bytes.copy_from_slice(&entry.to_le_bytes());
        }
        out
    }
}

/// Writes a run's entries into its page. All of the run lies in one page.
pub(super) fn set_entries(page: &mut Page, grain: u64, run: &Run, grain_sectors: u64) {
    for index in 0..run.grains {
        let sector = run.sector + index * grain_sectors;
        page.set(((grain + index) % PAGE_ENTRIES) as usize, sector as u32);
    }
}
