//! Settling: what waits in memory becomes durable, in the order of R11. And finding the next free sector again.

use std::rc::Rc;

use block::{Disk, DiskError, Io, Safe, Sector, Segments, SegmentsMut};
use lane::Buffer;
use smallvec::SmallVec;
use zerocopy::IntoBytes;

use super::RedoDisk;
use super::format::{Checked, Header, TABLE_ENTRIES, TABLE_SECTORS};
use super::map::{Batch, Look, NotYet, Pages, set_entries};
use super::pages::{PAGE_BYTES, PAGE_ENTRIES, Page, TABLE_PAGES};
use super::runs::Run;
use crate::fault::{Fault, planted};
use crate::together;

/// So many table writes are under way at a time.
const WIDTH: usize = 32;
/// A redo log that was not closed is scanned for its highest grain when it has at most so many tables (16 MiB to
/// read); above that its new grains begin at the file's end, at most one growing step further on.
const SCAN_TABLES: usize = 1024;

impl RedoDisk {
    /// One page of a table; `None` when the table does not exist.
    async fn page(&self, key: u64) -> Result<Option<Rc<Page>>, DiskError> {
        loop {
            let (commits, sector) = {
                let mut map = self.map.borrow_mut();
                match map.look(key) {
                    Look::Empty => return Ok(None),
                    Look::Cached(page) => return Ok(Some(page)),
                    Look::At(sector) => (map.commits(), sector),
                }
            };
            let mut buffer = Buffer::zeroed(PAGE_BYTES);
            self.file.read(Sector(sector), &SegmentsMut::new(&mut buffer)).await?;
            let mut page = Page::empty();
            page.0.copy_from_slice(&buffer);
            let mut map = self.map.borrow_mut();
            if map.commits() == commits {
                return map.loaded(key, page).map(Some);
            }
        }
    }

    /// The pages for the grains from `first` to `end`, all of one state: nothing was settled while they were read.
    pub(super) async fn pages(&self, first: u64, end: u64) -> Result<Pages, DiskError> {
        loop {
            let commits = self.map.borrow().commits();
            let (from, to) = (first / PAGE_ENTRIES, (end - 1) / PAGE_ENTRIES);
            let mut list = SmallVec::new();
            for key in from..=to {
                list.push(self.page(key).await?);
            }
            if self.map.borrow().commits() == commits {
                return Ok(Pages { first: from, list });
            }
        }
    }

    /// One settling. Only one runs at a time.
    pub(super) async fn settle(&self) -> Result<(), DiskError> {
        let mut batch = self.map.borrow_mut().begin_settling();
        let result = self.settle_batch(&mut batch).await;
        let mut map = self.map.borrow_mut();
        match result {
            Ok(()) => map.settled(&batch),
            Err(error) => {
                map.not_settled();
                return Err(self.halt(error));
            }
        }
        Ok(())
    }

    async fn settle_batch(&self, batch: &mut Batch) -> Result<(), DiskError> {
        if batch.parts.is_empty() {
            return self.flush_all().await;
        }
        if !self.marked_dirty.get() {
            self.write_header(true).await?;
        }
        for (_, place) in &mut batch.new_tables {
            *place = self.place_table().await?;
        }
        let new = batch.new_tables.iter().map(|(table, sector)| -> Io<'_> {
            Box::pin(self.write_new_table(*table, *sector, &batch.parts))
        });
        together::in_turns(WIDTH, new).await?;
        if !planted(Fault::TableBeforeData) {
            self.flush_all().await?;
        }
        self.marked_dirty.set(true);
        let is_new =
            |grain: u64| batch.new_tables.binary_search_by_key(&(grain / TABLE_ENTRIES), |t| t.0).is_ok();
        let pages = batch.parts.chunk_by(|a, b| a.0 / PAGE_ENTRIES == b.0 / PAGE_ENTRIES);
        let old = pages
            .filter(|parts| !is_new(parts[0].0))
            .map(|parts| -> Io<'_> { Box::pin(self.write_old_page(parts)) });
        together::in_turns(WIDTH, old).await?;
        let sectors =
            batch.new_tables.chunk_by(|a, b| a.0 / 128 == b.0 / 128).map(|tables| tables[0].0 / 128);
        let directory =
            sectors.map(|sector| -> Io<'_> { Box::pin(self.write_directory(sector, &batch.new_tables)) });
        together::in_turns(WIDTH, directory).await?;
        self.file.flush().await
    }

    /// The first flush of a settling: data, new tables, and once what lies below.
    async fn flush_all(&self) -> Result<(), DiskError> {
        let mut list: SmallVec<[Io<'_>; 4]> = SmallVec::new();
        list.push(self.file.flush());
        let below = self.below_unflushed.get();
        if below {
            list.push(self.below.flush());
        }
        together::all(list).await?;
        if below {
            self.below_unflushed.set(false);
        }
        Ok(())
    }

    async fn place_table(&self) -> Result<u64, DiskError> {
        loop {
            let answer = self.map.borrow_mut().allocate_table();
            match answer {
                Ok(sector) => return Ok(sector),
                Err(NotYet::Grow { sectors }) => self.grow(sectors).await?,
                Err(_) => return Err(DiskError::NoSpace),
            }
        }
    }

    /// A whole new table with the batch's entries. Nobody refers to it yet, so no order is needed between it and
    /// the data it points to.
    async fn write_new_table(&self, table: u64, sector: u64, parts: &[(u64, Run)]) -> Result<(), DiskError> {
        let mut buffer = Buffer::zeroed((TABLE_SECTORS * block::SECTOR_BYTES) as usize);
        let from = parts.partition_point(|(grain, _)| grain / TABLE_ENTRIES < table);
        for part in parts[from..].iter().take_while(|(grain, _)| grain / TABLE_ENTRIES == table) {
            let page = part.0 / PAGE_ENTRIES % TABLE_PAGES;
            let bytes = &mut buffer[page as usize * PAGE_BYTES..][..PAGE_BYTES];
            let mut content = Page::empty();
            content.0.copy_from_slice(bytes);
            set_entries(&mut content, part.0, &part.1, self.layout.grain);
            bytes.copy_from_slice(&content.0[..]);
        }
        self.file.write(Sector(sector), &Segments::new(&buffer), Safe::AtNextFlush).await
    }

    /// Entries of a table that exists: the page as it is with the new entries; whole, because a block of the medium
    /// is written without being read then. Each of its sectors is right whether or not the others get there.
    async fn write_old_page(&self, parts: &[(u64, Run)]) -> Result<(), DiskError> {
        let key = parts[0].0 / PAGE_ENTRIES;
        let mut page = match self.page(key).await? {
            Some(page) => (*page).clone(),
            None => Page::empty(),
        };
        for (grain, run) in parts {
            set_entries(&mut page, *grain, run, self.layout.grain);
        }
        let mut buffer = Buffer::zeroed(PAGE_BYTES);
        buffer.copy_from_slice(&page.0[..]);
        let Some(sector) = self.page_sector(key) else { return Ok(()) };
        self.file.write(Sector(sector), &Segments::new(&buffer), Safe::AtNextFlush).await
    }

    fn page_sector(&self, key: u64) -> Option<u64> {
        self.map.borrow().page_place(key)
    }

    async fn write_directory(&self, sector: u64, new: &[(u64, u64)]) -> Result<(), DiskError> {
        let mut buffer = Buffer::zeroed(block::SECTOR_BYTES as usize);
        buffer.copy_from_slice(&self.map.borrow().directory_sector(sector, new));
        let at = Sector(self.layout.directory + sector);
        self.file.write(at, &Segments::new(&buffer), Safe::AtNextFlush).await
    }

    /// Writes the header with the next free sector and the mark "in use". A file made by others keeps its other
    /// fields.
    pub(super) async fn write_header(&self, dirty: bool) -> Result<(), DiskError> {
        let mut buffer = Buffer::zeroed(size_of::<Header>());
        self.file.read(Sector(0), &SegmentsMut::new(&mut buffer)).await?;
        let (next_free, file_sectors) = {
            let map = self.map.borrow();
            (map.next_free(), map.file_sectors())
        };
        let closed_at = if dirty { 0 } else { file_sectors };
        let now = Checked { next_free, dirty, closed_at, ..self.layout }.raw();
        let mut raw: Header = zerocopy::transmute!(to_array(&buffer));
        raw.next_free = now.next_free;
        raw.dirty = now.dirty;
        raw.description = now.description;
        buffer.copy_from_slice(raw.as_bytes());
        self.file.write(Sector(0), &Segments::new(&buffer), Safe::AtNextFlush).await
    }

    /// Where new grains may begin. The header's number counts when one of ours closed the file and nobody made it
    /// longer since; else it is found again.
    pub(super) async fn next_free_at_open(&self) -> Result<u64, DiskError> {
        let (tables_end, file_sectors, tables) = {
            let map = self.map.borrow();
            (map.tables_end(), map.file_sectors(), map.tables())
        };
        let hint = self.layout.next_free;
        let closed = !self.layout.dirty && self.layout.closed_at == file_sectors;
        if closed && hint >= tables_end && hint <= file_sectors {
            return Ok(hint);
        }
        if self.read_only || tables > SCAN_TABLES {
            return Ok(file_sectors);
        }
        let mut end = tables_end;
        let keys: Vec<u64> = self.map.borrow().page_keys().collect();
        for key in keys {
            let Some(page) = self.page(key).await? else { continue };
            let highest = (0..PAGE_ENTRIES as usize).map(|index| page.entry(index)).max().unwrap_or(0);
            if highest != 0 {
                end = end.max(u64::from(highest) + self.layout.grain);
            }
        }
        Ok(end)
    }
}

fn to_array(bytes: &[u8]) -> [u8; size_of::<Header>()] {
    let mut out = [0; size_of::<Header>()];
    out.copy_from_slice(bytes);
    out
}
