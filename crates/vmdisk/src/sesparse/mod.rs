//! SEsparse redo logs, as vSphere writes them: read, never written (R13).

pub mod format;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::rc::Rc;

use block::{
    Disk, DiskError, Extent, Extents, Generation, Io, Kind, MediumFault, SECTOR_BYTES, Safe, Sector,
    Segments, SegmentsMut, Shape, check_range,
};
use lane::Buffer;
use smallvec::SmallVec;
use zerocopy::FromBytes;

use crate::part::ready;
use crate::redo::pages::{Cache, PAGE_BYTES, Page};
use crate::together;
use format::{
    Checked, ConstHeader, Corrupt, GRAIN_SECTORS, Grain, TABLE_ENTRIES, VOLATILE_MAGIC, VolatileHeader,
};

/// Pages of directory and tables in memory, 4 KiB each: 16 MiB, which covers 8 GiB of disk.
const CACHE_PAGES: usize = 4096;
/// 64-bit entries in a page.
const PAGE_ENTRIES: u64 = PAGE_BYTES as u64 / 8;
/// Sectors of a page.
const PAGE_SECTORS: u64 = PAGE_BYTES as u64 / SECTOR_BYTES;
/// Pieces that are looked up before their data is read.
const PIECES: usize = 64;

/// Why an SEsparse redo log cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum SeSparseError {
    /// The file is none that makes sense.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// Its host died: what the tables say is not what the disk holds.
    #[error(
        "its journal was not replayed (the host that wrote it stopped in the middle): open it once with ESXi, or restore it from a backup"
    )]
    Journal,
    /// The redo log and what lies below differ in length: the chain is refused (chapter 5).
    #[error("the redo log is for {redo} sectors, the disk below has {below}")]
    Capacity {
        /// Length in the redo log's header.
        redo: u64,
        /// Length of the disk below.
        below: u64,
    },
    /// Reading failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// A disk made of a base and an SEsparse redo log. Read-only.
pub struct SeSparseDisk {
    file: Rc<dyn Disk>,
    below: Rc<dyn Disk>,
    layout: Checked,
    pages: RefCell<Cache>,
}

/// A range that comes from one place.
#[derive(Copy, Clone)]
struct Piece {
    at: u64,
    count: u64,
    /// Where in the file, or from where else.
    from: Grain,
}

/// A piece of a read that goes down: to which disk, where, into what.
type Part<'a> = (&'a Rc<dyn Disk>, Sector, SegmentsMut<'a>);

impl SeSparseDisk {
    /// Opens a redo log over `below`. Reads two sectors.
    pub async fn open(file: Rc<dyn Disk>, below: Rc<dyn Disk>) -> Result<Rc<Self>, SeSparseError> {
        let length = file.shape().sectors;
        let raw = read_sector(&*file, 0).await?;
        let header = ConstHeader::read_from_bytes(&raw[..]).map_err(|_| DiskError::OutOfRange)?;
        let layout = header.check(length)?;
        let raw = read_sector(&*file, layout.volatile).await?;
        let volatile = VolatileHeader::read_from_bytes(&raw[..]).map_err(|_| DiskError::OutOfRange)?;
        if volatile.magic.get() != VOLATILE_MAGIC {
            let (at, found) = (layout.volatile * SECTOR_BYTES, volatile.magic.get());
            let expected = format!("{VOLATILE_MAGIC:#x}");
            return Err(Corrupt { what: "magic of the volatile header", at, found, expected }.into());
        }
        if volatile.replay_journal.get() != 0 {
            return Err(SeSparseError::Journal);
        }
        let below_sectors = below.shape().sectors;
        if layout.capacity != below_sectors {
            return Err(SeSparseError::Capacity { redo: layout.capacity, below: below_sectors });
        }
        Ok(Rc::new(Self { file, below, layout, pages: RefCell::new(Cache::new(CACHE_PAGES)) }))
    }

    /// Entry `index` of the 64-bit list that begins at sector `start`; and its byte in the file.
    async fn entry(&self, start: u64, index: u64) -> Result<(u64, u64), DiskError> {
        let page_at = start + index / PAGE_ENTRIES * PAGE_SECTORS;
        let known = self.pages.borrow_mut().get(page_at);
        let page = match known {
            Some(page) => page,
            None => {
                // A list may end inside of a page, and the file with it.
                let room = self.file.shape().sectors.saturating_sub(page_at).min(PAGE_SECTORS);
                let mut bytes = Buffer::zeroed(PAGE_BYTES);
                let part = &mut bytes[..(room * SECTOR_BYTES) as usize];
                self.file.read(Sector(page_at), &SegmentsMut::new(part)).await?;
                let mut page = Page::empty();
                page.0.copy_from_slice(&bytes);
                let page = Rc::new(page);
                self.pages.borrow_mut().put(page_at, Rc::clone(&page));
                page
            }
        };
        let inside = (index % PAGE_ENTRIES) as usize;
        let raw = page.0.as_chunks::<8>().0[inside];
        Ok((u64::from_le_bytes(raw), page_at * SECTOR_BYTES + inside as u64 * 8))
    }

    /// What a range is made of, up to [`PIECES`] pieces.
    async fn pieces(&self, at: Sector, count: u64) -> Result<SmallVec<[Piece; 4]>, DiskError> {
        let mut out: SmallVec<[Piece; 4]> = SmallVec::new();
        let (mut here, end) = (at.0, at.0 + count);
        while here < end {
            let grain = here / GRAIN_SECTORS;
            let (entry, entry_at) = self.entry(self.layout.directory, grain / TABLE_ENTRIES).await?;
            let (stop, from) = match self.layout.table(entry, entry_at).map_err(|e| fault(&e))? {
                None => ((grain / TABLE_ENTRIES + 1) * TABLE_ENTRIES * GRAIN_SECTORS, Grain::Parent),
                Some(table) => {
                    let (entry, entry_at) = self.entry(table, grain % TABLE_ENTRIES).await?;
                    let from = match self.layout.grain(entry, entry_at).map_err(|e| fault(&e))? {
                        Grain::At(sector) => Grain::At(sector + here % GRAIN_SECTORS),
                        other => other,
                    };
                    ((grain + 1) * GRAIN_SECTORS, from)
                }
            };
            let piece = Piece { at: here, count: stop.min(end) - here, from };
            let full = out.len() == PIECES;
            match out.last_mut() {
                Some(last) if follows(last, &piece) => last.count += piece.count,
                _ if full => break,
                _ => out.push(piece),
            }
            here += piece.count;
        }
        Ok(out)
    }

    async fn read_range(&self, at: Sector, into: &SegmentsMut<'_>) -> Result<(), DiskError> {
        let end = at.0 + into.len() as u64 / SECTOR_BYTES;
        let mut here = at.0;
        while here < end {
            let pieces = self.pieces(Sector(here), end - here).await?;
            let mut parts: SmallVec<[Part<'_>; 4]> = SmallVec::new();
            for piece in &pieces {
                let start = ((piece.at - at.0) * SECTOR_BYTES) as usize;
                let length = (piece.count * SECTOR_BYTES) as usize;
                match piece.from {
                    Grain::Zero => into.zero(start, length),
                    Grain::Parent => {
                        parts.push((&self.below, Sector(piece.at), into.slice_mut(start, length)))
                    }
                    Grain::At(sector) => {
                        parts.push((&self.file, Sector(sector), into.slice_mut(start, length)))
                    }
                }
                here = piece.at + piece.count;
            }
            together::all(parts.iter().map(|(disk, at, part)| disk.read(*at, part)).collect()).await?;
        }
        Ok(())
    }

    async fn status_of(&self, at: Sector, count: u64, out: &mut Extents) -> Result<(), DiskError> {
        let (mut here, end) = (at.0, at.0 + count);
        while here < end && !out.is_full() {
            for piece in self.pieces(Sector(here), end - here).await? {
                let kind = match piece.from {
                    Grain::Parent => {
                        if !self.status_below(&piece, out).await? {
                            return Ok(());
                        }
                        here = piece.at + piece.count;
                        continue;
                    }
                    Grain::Zero => Kind::Zero,
                    Grain::At(_) => Kind::Data,
                };
                if !out.push(Extent { at: Sector(piece.at), count: piece.count, kind, changed: true }) {
                    return Ok(());
                }
                here = piece.at + piece.count;
            }
        }
        Ok(())
    }

    /// False when `out` is full.
    async fn status_below(&self, piece: &Piece, out: &mut Extents) -> Result<bool, DiskError> {
        let mut done = 0;
        while done < piece.count {
            let mut part = Extents::with_limit(64);
            let here = Sector(piece.at + done);
            self.below.status(here, piece.count - done, None, &mut part).await?;
            for extent in part.iter() {
                if !out.push(*extent) {
                    return Ok(false);
                }
            }
            done = part.end().map_or(piece.count, |end| end.0 - piece.at);
        }
        Ok(true)
    }
}

fn follows(last: &Piece, next: &Piece) -> bool {
    match (last.from, next.from) {
        (Grain::At(a), Grain::At(b)) => a + last.count == b,
        (a, b) => a == b,
    }
}

/// What a guest is told when a table makes no sense.
fn fault(corrupt: &Corrupt) -> DiskError {
    tracing::error!(%corrupt, "an SEsparse redo log is damaged");
    DiskError::Medium(MediumFault { at: Sector(corrupt.at / SECTOR_BYTES), what: corrupt.what })
}

async fn read_sector(file: &dyn Disk, at: u64) -> Result<Buffer, DiskError> {
    let mut raw = Buffer::zeroed(SECTOR_BYTES as usize);
    file.read(Sector(at), &SegmentsMut::new(&mut raw)).await?;
    Ok(raw)
}

impl Disk for SeSparseDisk {
    fn shape(&self) -> Shape {
        let shape = self.below.shape();
        Shape { sectors: self.layout.capacity, read_only: true, ..shape }
    }

    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        Box::pin(async move {
            check_range(self.layout.capacity, at, into.len() as u64 / SECTOR_BYTES)?;
            self.read_range(at, into).await
        })
    }

    fn write<'a>(&'a self, _at: Sector, _from: &'a Segments<'a>, _safe: Safe) -> Io<'a> {
        ready(Err(DiskError::ReadOnly))
    }

    fn zero(&self, _at: Sector, _count: u64, _may_free: bool) -> Io<'_> {
        ready(Err(DiskError::ReadOnly))
    }

    fn unmap(&self, _at: Sector, _count: u64) -> Io<'_> {
        ready(Err(DiskError::ReadOnly))
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
        _at: Sector,
        _expected: &'a Segments<'a>,
        _new: &'a Segments<'a>,
    ) -> Io<'a> {
        ready(Err(DiskError::ReadOnly))
    }

    fn flush(&self) -> Io<'_> {
        ready(Ok(()))
    }
}
