//! The oracle: a decorator that sees what a disk promised, and judges what is there after a crash.
//!
//! DESIGN's rule for every disk: after power loss each sector reads as its last flushed content or as something
//! written to it since; never a third thing.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use super::CrashLog;
use crate::{
    Disk, DiskError, Extents, Generation, Image, Io, SECTOR_BYTES, Safe, Sector, Segments, SegmentsMut,
    Shape, check_range,
};

/// When something happened: on the log's clock (for cuts), and in the witness's own order (two things may happen
/// between the same two events of the log).
#[derive(Copy, Clone, PartialEq)]
struct Moment {
    point: usize,
    order: u64,
}

/// One content of one sector, and when it was written. `None` is zero.
#[derive(Clone)]
struct Version {
    content: Option<Rc<[u8]>>,
    begin: Moment,
    end: Option<Moment>,
    on_return: bool,
}

/// What was found that nobody wrote, or that should have been found.
#[derive(Debug)]
pub struct Violation {
    /// The sector.
    pub at: Sector,
    /// First bytes found there.
    pub found: [u8; 16],
    /// First bytes of each content that would have been right.
    pub allowed: Vec<[u8; 16]>,
    /// The answer of the disk, when it could not be read at all.
    pub error: Option<DiskError>,
}

/// Stands before a disk under test and remembers, on the clock of a [`CrashLog`], what was written and flushed.
pub struct Witness {
    log: CrashLog,
    disk: Rc<dyn Disk>,
    /// What was durable when the watch began; `None`: zeroes.
    base: Option<Image>,
    history: RefCell<BTreeMap<u64, Vec<Version>>>,
    /// Finished flushes: (begin, end).
    flushes: RefCell<Vec<(Moment, Moment)>>,
    order: Cell<u64>,
}

impl Witness {
    /// Begins to watch; the disk must read as zero, or as what was durable and is not written again.
    pub fn new(log: &CrashLog, disk: Rc<dyn Disk>) -> Rc<Self> {
        Self::watch(log, disk, None)
    }

    /// Begins to watch a disk that holds `base`, durably.
    pub fn over(log: &CrashLog, disk: Rc<dyn Disk>, base: Image) -> Rc<Self> {
        Self::watch(log, disk, Some(base))
    }

    fn watch(log: &CrashLog, disk: Rc<dyn Disk>, base: Option<Image>) -> Rc<Self> {
        Rc::new(Self {
            log: log.clone(),
            disk,
            base,
            history: RefCell::default(),
            flushes: RefCell::default(),
            order: Cell::new(0),
        })
    }

    fn now(&self) -> Moment {
        Moment { point: self.log.points(), order: self.order.replace(self.order.get() + 1) }
    }

    fn begin(
        &self,
        at: Sector,
        count: u64,
        content: impl Fn(u64) -> Option<Rc<[u8]>>,
        on_return: bool,
    ) -> Moment {
        let begin = self.now();
        let mut history = self.history.borrow_mut();
        for sector in 0..count {
            let version = Version { content: content(sector), begin, end: None, on_return };
            history.entry(at.0 + sector).or_default().push(version);
        }
        begin
    }

    /// The operation that began at `begin` on these sectors has returned.
    fn end(&self, at: Sector, count: u64, begin: Moment) {
        let end = self.now();
        let mut history = self.history.borrow_mut();
        for (_, versions) in history.range_mut(at.0..at.0 + count) {
            if let Some(version) = versions.iter_mut().rev().find(|v| v.begin == begin && v.end.is_none()) {
                version.end = Some(end);
            }
        }
    }

    /// Everything written so far is durable (for instance: it was there before power failed last time).
    pub fn settled(&self) {
        let now = self.now();
        self.flushes.borrow_mut().push((now, now));
    }

    /// What a sector held before anybody wrote.
    fn first(&self, sector: u64) -> Option<Rc<[u8]>> {
        let base = self.base.as_ref().filter(|base| sector < base.sectors)?;
        let mut bytes = [0; SECTOR_BYTES as usize];
        base.pages.read(Sector(sector).bytes(), &SegmentsMut::new(&mut bytes));
        Some(bytes.as_slice().into())
    }

    /// The contents that a sector may have after a cut at `point`.
    fn allowed(&self, sector: u64, versions: &[Version], point: usize) -> Vec<Option<Rc<[u8]>>> {
        let flushed = self
            .flushes
            .borrow()
            .iter()
            .filter(|(_, end)| end.point <= point)
            .map(|(begin, _)| begin.order)
            .max();
        let durable = |v: &Version| {
            let ended = v.end.filter(|e| e.point <= point);
            ended.is_some_and(|e| v.on_return || flushed.is_some_and(|f| e.order < f))
        };
        let seen: Vec<&Version> = versions.iter().filter(|v| v.begin.point <= point).collect();
        let mut out: Vec<Option<Rc<[u8]>>> = Vec::new();
        for version in &seen {
            // Superseded: a durable one began after this one had returned.
            let superseded =
                seen.iter().any(|d| durable(d) && version.end.is_some_and(|e| e.order < d.begin.order));
            if !superseded {
                out.push(version.content.clone());
            }
        }
        if !seen.iter().any(|v| durable(v)) {
            out.push(self.first(sector));
        }
        out
    }

    /// Reads every sector ever written on `disk` (the disk under test, opened again after a cut at `point`) and
    /// compares. `point` may be given a little later than the cut when the workload's own steps count. What lies behind
    /// the end of the disk (it grew after the cut, or that was lost) must be what nobody was promised.
    pub async fn judge(&self, point: usize, disk: &dyn Disk) -> Result<(), Violation> {
        let end = disk.shape().sectors;
        let sectors: Vec<u64> = self.history.borrow().range(..end).map(|(sector, _)| *sector).collect();
        for (sector, versions) in self.history.borrow().range(end..) {
            let allowed = self.allowed(*sector, versions, point);
            if !allowed.iter().any(Option::is_none) {
                return Err(Violation {
                    at: Sector(*sector),
                    found: [0; 16],
                    allowed: allowed.iter().map(head_of).collect(),
                    error: Some(DiskError::OutOfRange),
                });
            }
        }
        for run in sectors.chunk_by(|a, b| a + 1 == *b).flat_map(|run| run.chunks(256)) {
            let mut bytes = vec![0; run.len() * SECTOR_BYTES as usize];
            let read = disk.read(Sector(run[0]), &SegmentsMut::new(&mut bytes)).await;
            for (sector, found) in run.iter().zip(bytes.chunks(SECTOR_BYTES as usize)) {
                let allowed = match self.history.borrow().get(sector) {
                    Some(versions) => self.allowed(*sector, versions, point),
                    None => continue,
                };
                let same = |want: &Option<Rc<[u8]>>| match want {
                    Some(content) => content[..] == *found,
                    None => lane::memory::is_zero(found),
                };
                if read.is_err() || !allowed.iter().any(same) {
                    return Err(Violation {
                        at: Sector(*sector),
                        found: head(found),
                        allowed: allowed.iter().map(head_of).collect(),
                        error: read.err(),
                    });
                }
            }
        }
        Ok(())
    }
}

fn head(bytes: &[u8]) -> [u8; 16] {
    <[u8; 16]>::try_from(&bytes[..16]).unwrap_or_default()
}

fn head_of(content: &Option<Rc<[u8]>>) -> [u8; 16] {
    content.as_ref().map_or([0; 16], |c| head(c))
}

impl Disk for Witness {
    fn shape(&self) -> Shape {
        self.disk.shape()
    }

    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        self.disk.read(at, into)
    }

    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a> {
        Box::pin(async move {
            let count = from.len() as u64 / SECTOR_BYTES;
            check_range(self.shape().sectors, at, count)?;
            let piece = |sector: u64| {
                Some(from.slice((sector * SECTOR_BYTES) as usize, SECTOR_BYTES as usize).to_vec().into())
            };
            let begin = self.begin(at, count, piece, safe == Safe::OnReturn);
            self.disk.write(at, from, safe).await?;
            self.end(at, count, begin);
            Ok(())
        })
    }

    fn zero(&self, at: Sector, count: u64, may_free: bool) -> Io<'_> {
        Box::pin(async move {
            check_range(self.shape().sectors, at, count)?;
            let begin = self.begin(at, count, |_| None, false);
            self.disk.zero(at, count, may_free).await?;
            self.end(at, count, begin);
            Ok(())
        })
    }

    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        Box::pin(async move {
            assert!(
                self.disk.shape().unmap_reads_zero,
                "what an unmapped sector reads as must be known to be judged"
            );
            check_range(self.shape().sectors, at, count)?;
            let begin = self.begin(at, count, |_| None, false);
            self.disk.unmap(at, count).await?;
            self.end(at, count, begin);
            Ok(())
        })
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
        Box::pin(async move {
            let count = new.len() as u64 / SECTOR_BYTES;
            let begin = self.now();
            self.disk.compare_and_write(at, expected, new).await?;
            let end = Some(self.now());
            let mut history = self.history.borrow_mut();
            for sector in 0..count {
                let content =
                    Some(new.slice((sector * SECTOR_BYTES) as usize, SECTOR_BYTES as usize).to_vec().into());
                history.entry(at.0 + sector).or_default().push(Version {
                    content,
                    begin,
                    end,
                    on_return: false,
                });
            }
            Ok(())
        })
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(async move {
            let begin = self.now();
            self.disk.flush().await?;
            let end = self.now();
            self.flushes.borrow_mut().push((begin, end));
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn workload(log: &CrashLog) -> Rc<Witness> {
        let witness = Witness::new(log, log.disk(64));
        for round in 1..=20u8 {
            let at = Sector(u64::from(round) % 5);
            witness.write(at, &Segments::new(&[round; 1024]), Safe::AtNextFlush).await.unwrap();
            if round % 3 == 0 {
                witness.zero(Sector(2), 2, true).await.unwrap();
            }
            if round % 4 == 0 {
                witness.flush().await.unwrap();
            }
        }
        witness
    }

    #[test]
    fn an_honest_disk_passes_at_every_cut() {
        lane::block_on(async {
            let log = CrashLog::new(3);
            let witness = workload(&log).await;
            for point in 0..=log.points() {
                for seed in 0..6 {
                    let disk = crate::MemoryDisk::from(log.cut(point, seed).remove(0));
                    witness.judge(point, &disk).await.unwrap();
                }
            }
        });
    }

    #[test]
    fn a_disk_that_forgets_a_flush_is_found_out() {
        lane::block_on(async {
            let log = CrashLog::new(3);
            let witness = workload(&log).await;
            let empty = crate::MemoryDisk::new(64);
            assert!(witness.judge(0, &empty).await.is_ok());
            assert!(witness.judge(log.points(), &empty).await.is_err());
        });
    }
}
