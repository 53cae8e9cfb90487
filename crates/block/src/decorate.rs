//! Decorators: disks before disks, one of a kind per type. Any of them fits between any two stages.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use crate::{
    Disk, DiskError, Extents, Generation, Io, SECTOR_BYTES, Safe, Sector, Segments, SegmentsMut, Shape,
};

/// What an operation on a disk is, without its data.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Hash)]
pub enum Operation {
    /// [`Disk::read`].
    Read,
    /// [`Disk::write`].
    Write,
    /// [`Disk::zero`].
    Zero,
    /// [`Disk::unmap`].
    Unmap,
    /// [`Disk::compare_and_write`].
    CompareAndWrite,
    /// [`Disk::flush`].
    Flush,
}

/// Looks at operations on their way: the part of a decorator that differs.
pub trait Passing {
    /// Called before the operation goes down; an error answers it here.
    fn before(&self, operation: Operation, at: Sector, count: u64) -> Io<'_>;
    /// Called with the answer.
    fn after(&self, _operation: Operation, _at: Sector, _count: u64, _answer: &Result<(), DiskError>) {}
}

/// A disk with something that looks at every operation before it.
pub struct Decorated<P> {
    disk: Rc<dyn Disk>,
    /// The part that differs.
    pub passing: P,
}

impl<P: Passing> Decorated<P> {
    /// Puts `passing` before `disk`.
    pub fn new(disk: Rc<dyn Disk>, passing: P) -> Rc<Self> {
        Rc::new(Self { disk, passing })
    }

    async fn pass<'a>(
        &self,
        operation: Operation,
        at: Sector,
        count: u64,
        down: impl FnOnce() -> Io<'a>,
    ) -> Result<(), DiskError> {
        self.passing.before(operation, at, count).await?;
        let answer = down().await;
        self.passing.after(operation, at, count, &answer);
        answer
    }
}

impl<P: Passing> Disk for Decorated<P> {
    fn shape(&self) -> Shape {
        self.disk.shape()
    }
    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        Box::pin(
            self.pass(Operation::Read, at, into.len() as u64 / SECTOR_BYTES, move || {
                self.disk.read(at, into)
            }),
        )
    }
    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a> {
        Box::pin(self.pass(Operation::Write, at, from.len() as u64 / SECTOR_BYTES, move || {
            self.disk.write(at, from, safe)
        }))
    }
    fn zero(&self, at: Sector, count: u64, may_free: bool) -> Io<'_> {
        Box::pin(self.pass(Operation::Zero, at, count, move || self.disk.zero(at, count, may_free)))
    }
    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        Box::pin(self.pass(Operation::Unmap, at, count, move || self.disk.unmap(at, count)))
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
        let count = new.len() as u64 / SECTOR_BYTES;
        Box::pin(self.pass(Operation::CompareAndWrite, at, count, move || {
            self.disk.compare_and_write(at, expected, new)
        }))
    }
    fn flush(&self) -> Io<'_> {
        Box::pin(self.pass(Operation::Flush, Sector(0), 0, move || self.disk.flush()))
    }
}

/// Makes every operation wait.
pub struct Delay(
    /// How long, for each kind.
    pub Box<dyn Fn(Operation) -> Duration>,
);

impl Passing for Delay {
    fn before(&self, operation: Operation, _at: Sector, _count: u64) -> Io<'_> {
        Box::pin(async move {
            lane::sleep((self.0)(operation)).await;
            Ok(())
        })
    }
}

/// Holds reads and writes to a rate, so that a long copy leaves the medium to others. Any number may be under way: each
/// waits for its turn on one clock.
pub struct Pace {
    bytes_per_second: u64,
    next: Cell<std::time::Instant>,
}

impl Pace {
    /// At most so many bytes a second are read and written (at least one).
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), next: Cell::new(lane::now()) }
    }
}

impl Passing for Pace {
    fn before(&self, operation: Operation, _at: Sector, count: u64) -> Io<'_> {
        Box::pin(async move {
            if matches!(operation, Operation::Read | Operation::Write) {
                let bytes = count.saturating_mul(SECTOR_BYTES) as f64;
                let turn = self.next.get().max(lane::now());
                self.next.set(turn + Duration::from_secs_f64(bytes / self.bytes_per_second as f64));
                lane::sleep(turn.saturating_duration_since(lane::now())).await;
            }
            Ok(())
        })
    }
}

/// Asks a rule whether an operation fails. `None` lets it pass.
pub struct Fail(
    /// The rule.
    #[allow(clippy::type_complexity)]
    pub Box<dyn Fn(Operation, Sector, u64) -> Option<DiskError>>,
);

impl Fail {
    /// Fails operation number `nth` (from 0) of one kind, and every later one of that kind if `forever`.
    pub fn nth(kind: Operation, nth: u64, forever: bool, error: DiskError) -> Self {
        let seen = Cell::new(0);
        Self(Box::new(move |operation, _, _| {
            if operation != kind {
                return None;
            }
            let number = seen.replace(seen.get() + 1);
            (number == nth || (forever && number > nth)).then(|| error.clone())
        }))
    }
}

impl Passing for Fail {
    fn before(&self, operation: Operation, at: Sector, count: u64) -> Io<'_> {
        Box::pin(std::future::ready((self.0)(operation, at, count).map_or(Ok(()), Err)))
    }
}

/// Keeps operations waiting until it is told to let them through.
pub struct Hold {
    held: fn(Operation) -> bool,
    open: Cell<bool>,
    waiters: lane::sync::Waiters,
}

impl Hold {
    /// Keeps the kinds that `held` picks.
    pub fn new(held: fn(Operation) -> bool) -> Self {
        Self { held, open: Cell::new(false), waiters: lane::sync::Waiters::new() }
    }

    /// Lets through what waits and whatever comes.
    pub fn let_through(&self) {
        self.open.set(true);
        self.waiters.wake_all();
    }
}

impl Passing for Hold {
    fn before(&self, operation: Operation, _at: Sector, _count: u64) -> Io<'_> {
        Box::pin(async move {
            if (self.held)(operation) {
                self.waiters.until(|| self.open.get().then_some(())).await;
            }
            Ok(())
        })
    }
}

/// Remembers what was asked for and whether it was done; data is not kept (see [`crate::crash`] for that).
#[derive(Default)]
pub struct Record {
    /// Operation, first sector, sectors, done without error; in the order of their ends.
    pub list: RefCell<Vec<(Operation, Sector, u64, bool)>>,
}

impl Record {
    /// Sectors moved by operations of one kind.
    pub fn sectors(&self, kind: Operation) -> u64 {
        self.list.borrow().iter().filter(|(o, ..)| *o == kind).map(|(_, _, count, _)| count).sum()
    }

    /// Number of operations of one kind.
    pub fn count(&self, kind: Operation) -> usize {
        self.list.borrow().iter().filter(|(o, ..)| *o == kind).count()
    }
}

impl Passing for Record {
    fn before(&self, _operation: Operation, _at: Sector, _count: u64) -> Io<'_> {
        Box::pin(std::future::ready(Ok(())))
    }
    fn after(&self, operation: Operation, at: Sector, count: u64, answer: &Result<(), DiskError>) {
        self.list.borrow_mut().push((operation, at, count, answer.is_ok()));
    }
}
