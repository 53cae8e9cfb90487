//! A disk with a past.

use block::{
    Disk, DiskError, Extent, Extents, Generation, Io, Kind, MemoryDisk, Safe, Sector, Segments, SegmentsMut,
    Shape,
};

/// A memory disk on which the second half has changed since generation 5.
pub struct Changing(pub MemoryDisk);

/// Before the changes.
pub const FIVE: Generation = Generation { counter: 5, id: 0xabc };

impl Disk for Changing {
    fn shape(&self) -> Shape {
        self.0.shape()
    }
    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        self.0.read(at, into)
    }
    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a> {
        self.0.write(at, from, safe)
    }
    fn zero(&self, at: Sector, count: u64, may_free: bool) -> Io<'_> {
        self.0.zero(at, count, may_free)
    }
    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        self.0.unmap(at, count)
    }
    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        match since {
            None => self.0.status(at, count, None, out),
            Some(FIVE) => Box::pin(async move {
                let (end, half) = (at.0 + count, self.0.shape().sectors / 2);
                for (from, to, changed) in [(at.0, end.min(half), false), (at.0.max(half), end, true)] {
                    let extent = Extent {
                        at: Sector(from),
                        count: to.saturating_sub(from),
                        kind: Kind::Data,
                        changed,
                    };
                    if !out.push(extent) {
                        break;
                    }
                }
                Ok(())
            }),
            Some(_) => Box::pin(std::future::ready(Err(DiskError::UnknownGeneration))),
        }
    }
    fn compare_and_write<'a>(
        &'a self,
        at: Sector,
        expected: &'a Segments<'a>,
        new: &'a Segments<'a>,
    ) -> Io<'a> {
        self.0.compare_and_write(at, expected, new)
    }
    fn flush(&self) -> Io<'_> {
        self.0.flush()
    }
}
