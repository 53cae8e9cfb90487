//! A disk in memory: sparse, for tests and for scratch copies.

use std::cell::{Cell, RefCell};

use crate::pages::Pages;
use crate::{
    BLOCK_BYTES, Disk, DiskError, Extent, Extents, Generation, Io, Kind, SECTOR_BYTES, Safe, Sector,
    Segments, SegmentsMut, Shape, check_range,
};

/// The content of a disk at one instant. A clone costs nothing.
#[derive(Clone)]
pub struct Image {
    /// Length in sectors.
    pub sectors: u64,
    /// What is on it.
    pub pages: Pages,
}

/// Holds only the 4 KiB blocks that were written; nothing survives the process.
pub struct MemoryDisk {
    sectors: Cell<u64>,
    read_only: bool,
    pages: RefCell<Pages>,
}

impl From<Image> for MemoryDisk {
    fn from(image: Image) -> Self {
        Self { sectors: Cell::new(image.sectors), read_only: false, pages: RefCell::new(image.pages) }
    }
}

impl MemoryDisk {
    /// A disk of `sectors` sectors that reads as zero.
    pub fn new(sectors: u64) -> Self {
        Image { sectors, pages: Pages::default() }.into()
    }

    /// A disk that holds `bytes` (a multiple of 512).
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let disk = Self::new(bytes.len() as u64 / SECTOR_BYTES);
        disk.pages.borrow_mut().write(0, &Segments::new(bytes));
        disk
    }

    /// The same disk, refusing writes.
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// The content now, in constant time.
    pub fn image(&self) -> Image {
        Image { sectors: self.sectors.get(), pages: self.pages.borrow().clone() }
    }

    /// Grows or shrinks the disk.
    pub fn resize(&self, sectors: u64) {
        self.sectors.set(sectors);
    }

    /// All content, zeroes included.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = vec![0; (self.sectors.get() * SECTOR_BYTES) as usize];
        self.pages.borrow().read(0, &SegmentsMut::new(&mut out));
        out
    }

    fn check(&self, at: Sector, bytes: usize, writes: bool) -> Result<(), DiskError> {
        assert!((bytes as u64).is_multiple_of(SECTOR_BYTES), "segments are whole sectors");
        check_range(self.sectors.get(), at, bytes as u64 / SECTOR_BYTES)?;
        if writes && self.read_only { Err(DiskError::ReadOnly) } else { Ok(()) }
    }
}

/// Pages that exist are data, the rest is holes.
pub(crate) fn describe(pages: &Pages, at: Sector, count: u64, out: &mut Extents) {
    let (mut byte, end) = (at.bytes(), at.plus(count).bytes());
    while byte < end {
        let page = byte / BLOCK_BYTES;
        let next = pages.next_page(page).map_or(end, |p| (p * BLOCK_BYTES).min(end));
        let (kind, stop) =
            if next > byte { (Kind::Hole, next) } else { (Kind::Data, ((page + 1) * BLOCK_BYTES).min(end)) };
        let (at, count) = (Sector::at_byte(byte), (stop - byte) / SECTOR_BYTES);
        if !out.push(Extent { at, count, kind, changed: true }) {
            return;
        }
        byte = stop;
    }
}

/// Done when asked for the first time, at once.
pub(crate) fn at_once<'a, T>(work: impl FnOnce() -> Result<T, DiskError> + 'a) -> Io<'a, T> {
    Box::pin(async move { work() })
}

impl Disk for MemoryDisk {
    fn shape(&self) -> Shape {
        Shape {
            sectors: self.sectors.get(),
            physical_block_bytes: SECTOR_BYTES as u32,
            read_only: self.read_only,
            unmap_reads_zero: true,
            memory_align: 1,
        }
    }

    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        at_once(move || {
            self.check(at, into.len(), false).map(|()| self.pages.borrow().read(at.bytes(), into))
        })
    }

    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, _safe: Safe) -> Io<'a> {
        at_once(move || {
            self.check(at, from.len(), true).map(|()| self.pages.borrow_mut().write(at.bytes(), from))
        })
    }

    fn zero(&self, at: Sector, count: u64, _may_free: bool) -> Io<'_> {
        self.unmap(at, count)
    }

    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        at_once(move || {
            check_range(self.sectors.get(), at, count).and_then(|()| {
                if self.read_only {
                    return Err(DiskError::ReadOnly);
                }
                self.pages.borrow_mut().zero(at.bytes(), count * SECTOR_BYTES);
                Ok(())
            })
        })
    }

    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        at_once(move || {
            check_range(self.sectors.get(), at, count).and_then(|()| {
                if since.is_some() {
                    return Err(DiskError::UnknownGeneration);
                }
                describe(&self.pages.borrow(), at, count, out);
                Ok(())
            })
        })
    }

    fn compare_and_write<'a>(
        &'a self,
        at: Sector,
        expected: &'a Segments<'a>,
        new: &'a Segments<'a>,
    ) -> Io<'a> {
        assert_eq!(expected.len(), new.len(), "both sides of a compare-and-write are equally long");
        at_once(move || {
            self.check(at, new.len(), true).and_then(|()| {
                let (wanted, mut found) = (expected.to_vec(), vec![0; expected.len()]);
                self.pages.borrow().read(at.bytes(), &SegmentsMut::new(&mut found));
                if let Some(byte) = wanted.iter().zip(&found).position(|(a, b)| a != b) {
                    return Err(DiskError::Miscompare { at_bytes: byte as u64 });
                }
                self.pages.borrow_mut().write(at.bytes(), new);
                Ok(())
            })
        })
    }

    fn flush(&self) -> Io<'_> {
        at_once(|| Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back_what_was_written_and_refuses_the_rest() {
        lane::block_on(async {
            let disk = MemoryDisk::new(24);
            let data = vec![7; 1024];
            disk.write(Sector(7), &Segments::new(&data), Safe::AtNextFlush).await.unwrap();
            let mut back = vec![1; 2048];
            disk.read(Sector(6), &SegmentsMut::new(&mut back)).await.unwrap();
            assert_eq!(back, [vec![0; 512], vec![7; 1024], vec![0; 512]].concat());
            disk.zero(Sector(8), 1, true).await.unwrap();
            assert_eq!(disk.to_bytes()[4096..4608], [0; 512]);
            let over = disk.read(Sector(u64::MAX), &SegmentsMut::new(&mut back)).await;
            assert!(matches!(over, Err(DiskError::OutOfRange)));
        });
    }
}
