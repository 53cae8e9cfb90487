//! The one trait from guest to medium.

use std::future::Future;
use std::pin::Pin;

use crate::{DiskError, Extents, Generation, Sector, Segments, SegmentsMut};

/// An operation under way. It is finished, never cancelled: dropping it while the kernel has it aborts the process.
pub type Io<'a, T = ()> = Pin<Box<dyn Future<Output = Result<T, DiskError>> + 'a>>;

/// When a write has to survive a power loss.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Safe {
    /// After the next finished [`Disk::flush`] that began after this write returned.
    AtNextFlush,
    /// When the write returns (FUA).
    OnReturn,
}

/// What a disk looks like. Cheap to ask, never waits; a resize shows at the next ask.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Length in 512-byte sectors.
    pub sectors: u64,
    /// The unit in which it writes without reading first, in bytes: a power of two, at least 512.
    pub physical_block_bytes: u32,
    /// Writes, zeroing and unmapping are refused with [`DiskError::ReadOnly`].
    pub read_only: bool,
    /// After [`Disk::unmap`] the range reads as zero; else unmap is only a hint and content is undefined.
    pub unmap_reads_zero: bool,
    /// Segments aligned to this many bytes (a power of two; 1: anything) travel without a copy.
    pub memory_align: u32,
}

impl Shape {
    /// Length in bytes.
    pub const fn bytes(&self) -> u64 {
        self.sectors * crate::SECTOR_BYTES
    }
}

/// A disk: sectors that can be read, written and made durable. An array's LUN is one, so is a VM's disk, a snapshot,
/// and a file.
///
/// Every operation checks its range and answers [`DiskError::OutOfRange`] for hostile numbers; a length of zero is
/// allowed and does nothing. Segments must be a multiple of 512 bytes long. Operations under way at the same time
/// have no order between them; [`Disk::flush`] is the only order there is: everything that *returned* before a flush
/// began is durable when it has finished. Overlapping writes under way together leave, per sector, the content of
/// one of them.
pub trait Disk {
    /// Size and abilities.
    fn shape(&self) -> Shape;

    /// Reads `into.len()` bytes.
    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a>;

    /// Writes `from.len()` bytes.
    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a>;

    /// Makes `count` sectors read as zero, always. `may_free` allows giving the space back.
    fn zero(&self, at: Sector, count: u64, may_free: bool) -> Io<'_>;

    /// A hint that the content is not needed any more; what it reads as afterwards is in [`Shape`].
    fn unmap(&self, at: Sector, count: u64) -> Io<'_>;

    /// Describes the range from `at` on: appends to `out` (which must be empty) until `count` sectors are covered or
    /// `out` is full. With `since`, extents say whether they changed after that cut.
    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a>;

    /// Writes `new` if the content equals `expected` (same length), atomic against every other user of this disk;
    /// else [`DiskError::Miscompare`].
    fn compare_and_write<'a>(
        &'a self,
        at: Sector,
        expected: &'a Segments<'a>,
        new: &'a Segments<'a>,
    ) -> Io<'a>;

    /// Makes everything durable that returned before this began. After a failure the disk answers
    /// [`DiskError::Halted`] to writes and flushes until it is opened again.
    fn flush(&self) -> Io<'_>;
}

/// A shared disk is a disk.
impl<D: Disk + ?Sized> Disk for std::rc::Rc<D> {
    fn shape(&self) -> Shape {
        (**self).shape()
    }
    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        (**self).read(at, into)
    }
    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a> {
        (**self).write(at, from, safe)
    }
    fn zero(&self, at: Sector, count: u64, may_free: bool) -> Io<'_> {
        (**self).zero(at, count, may_free)
    }
    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        (**self).unmap(at, count)
    }
    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        (**self).status(at, count, since, out)
    }
    fn compare_and_write<'a>(
        &'a self,
        at: Sector,
        expected: &'a Segments<'a>,
        new: &'a Segments<'a>,
    ) -> Io<'a> {
        (**self).compare_and_write(at, expected, new)
    }
    fn flush(&self) -> Io<'_> {
        (**self).flush()
    }
}
