//! One link's disk inside a chain: frozen as soon as another lies above it (R16).

use std::cell::Cell;
use std::rc::Rc;

use block::{Disk, DiskError, Extents, Generation, Io, Safe, Sector, Segments, SegmentsMut, Shape};

use crate::part::ready;

/// A disk that can be frozen. What lies above reads through it; nobody writes it while it is frozen.
pub(crate) struct Layer {
    disk: Rc<dyn Disk>,
    frozen: Cell<bool>,
}

impl Layer {
    pub(crate) fn new(disk: Rc<dyn Disk>, frozen: bool) -> Rc<Self> {
        Rc::new(Self { disk, frozen: Cell::new(frozen) })
    }

    /// From now on refuses everything that changes it, or not any more.
    pub(crate) fn freeze(&self, frozen: bool) {
        self.frozen.set(frozen);
    }

    /// The disk itself, for the commit that folds into it.
    pub(crate) fn inner(&self) -> &Rc<dyn Disk> {
        &self.disk
    }

    fn changing<'a>(&'a self, change: impl FnOnce() -> Io<'a>) -> Io<'a> {
        if self.frozen.get() { ready(Err(DiskError::ReadOnly)) } else { change() }
    }
}

impl Disk for Layer {
    fn shape(&self) -> Shape {
        let shape = self.disk.shape();
        Shape { read_only: shape.read_only || self.frozen.get(), ..shape }
    }
    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        self.disk.read(at, into)
    }
    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a> {
        self.changing(|| self.disk.write(at, from, safe))
    }
    fn zero(&self, at: Sector, count: u64, may_free: bool) -> Io<'_> {
        self.changing(|| self.disk.zero(at, count, may_free))
    }
    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        self.changing(|| self.disk.unmap(at, count))
    }
    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        self.disk.status(at, count, since, out)
    }
    fn compare_and_write<'a>(
        &'a self,
        at: Sector,
        expected: &'a Segments<'a>,
        new: &'a Segments<'a>,
    ) -> Io<'a> {
        self.changing(|| self.disk.compare_and_write(at, expected, new))
    }
    fn flush(&self) -> Io<'_> {
        // A frozen disk may still have writes of its time as top that no flush has reached.
        self.disk.flush()
    }
}
