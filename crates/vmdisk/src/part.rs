//! A part of a disk as a disk: a flat extent at an offset, a LUN that grew behind a mapping's back.

use std::rc::Rc;

use block::{
    Disk, DiskError, Extent, Extents, Generation, Io, Safe, Sector, Segments, SegmentsMut, Shape, check_range,
};

/// `count` sectors of a disk, from `first` on.
pub struct Part {
    disk: Rc<dyn Disk>,
    first: u64,
    count: u64,
    read_only: bool,
}

impl Part {
    /// The part; refused when it is not inside the disk.
    pub fn new(
        disk: Rc<dyn Disk>,
        first: Sector,
        count: u64,
        read_only: bool,
    ) -> Result<Rc<Self>, DiskError> {
        check_range(disk.shape().sectors, first, count)?;
        Ok(Rc::new(Self { disk, first: first.0, count, read_only }))
    }

    fn at(&self, at: Sector, bytes: usize, changes: bool) -> Result<Sector, DiskError> {
        self.at_sectors(at, bytes as u64 / block::SECTOR_BYTES, changes)
    }

    fn at_sectors(&self, at: Sector, count: u64, changes: bool) -> Result<Sector, DiskError> {
        check_range(self.count, at, count)?;
        if changes && self.read_only { Err(DiskError::ReadOnly) } else { Ok(at.plus(self.first)) }
    }
}

/// An answer that needs no waiting.
pub(crate) fn ready<'a, T: 'a>(result: Result<T, DiskError>) -> Io<'a, T> {
    Box::pin(std::future::ready(result))
}

impl Disk for Part {
    fn shape(&self) -> Shape {
        let shape = self.disk.shape();
        Shape { sectors: self.count, read_only: shape.read_only || self.read_only, ..shape }
    }

    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        match self.at(at, into.len(), false) {
            Ok(at) => self.disk.read(at, into),
            Err(error) => ready(Err(error)),
        }
    }

    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a> {
        match self.at(at, from.len(), true) {
            Ok(at) => self.disk.write(at, from, safe),
            Err(error) => ready(Err(error)),
        }
    }

    fn zero(&self, at: Sector, count: u64, may_free: bool) -> Io<'_> {
        match self.at_sectors(at, count, true) {
            Ok(at) => self.disk.zero(at, count, may_free),
            Err(error) => ready(Err(error)),
        }
    }

    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        match self.at_sectors(at, count, true) {
            Ok(at) => self.disk.unmap(at, count),
            Err(error) => ready(Err(error)),
        }
    }

    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        Box::pin(async move {
            let place = self.at_sectors(at, count, false)?;
            if self.first == 0 {
                return self.disk.status(place, count, since, out).await;
            }
            let mut here = place;
            while here < place.plus(count) && !out.is_full() {
                let mut part = Extents::with_limit(64);
                self.disk.status(here, place.0 + count - here.0, since, &mut part).await?;
                for extent in part.iter() {
                    if !out.push(Extent { at: Sector(extent.at.0 - self.first), ..*extent }) {
                        return Ok(());
                    }
                }
                here = part.end().unwrap_or(place.plus(count));
            }
            Ok(())
        })
    }

    fn compare_and_write<'a>(
        &'a self,
        at: Sector,
        expected: &'a Segments<'a>,
        new: &'a Segments<'a>,
    ) -> Io<'a> {
        match self.at(at, new.len(), true) {
            Ok(at) => self.disk.compare_and_write(at, expected, new),
            Err(error) => ready(Err(error)),
        }
    }

    fn flush(&self) -> Io<'_> {
        self.disk.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::MemoryDisk;

    #[test]
    fn it_is_a_disk() {
        lane::block_on(async {
            for first in [0, 77] {
                let whole = Rc::new(MemoryDisk::new(4000));
                let part = Part::new(whole.clone(), Sector(first), 3000, false).unwrap();
                block::conformance::check(part, first).await;
                let part = Part::new(whole.clone(), Sector(first), 3000, true).unwrap();
                block::conformance::check_read_only(part).await;
                assert!(Part::new(whole, Sector(3000), 1001, false).is_err());
            }
        });
    }
}
