//! CrashDisk: a disk that remembers the order of everything, and can show itself after a power loss at any point.
//!
//! A [`CrashLog`] records several disks on one clock. A **point** is a number of events; an event is the beginning or
//! the end of an operation, or a mark. [`CrashLog::cut`] gives what each disk may hold when power fails there:
//!
//! * every write that had returned when a finished flush began is there,
//! * every returned [`Safe::OnReturn`] write is there,
//! * each other 512-byte sector is kept or lost on its own, so writes tear and change order freely.
//!
//! Where the environment variable `KAGAMI_DMLOG` names a directory, a test that panics leaves its logs there, in the
//! layout of the kernel's dm-log-writes, each with the image that it begins with: `replay-log` of xfstests replays them.
//!
//! Typical use: run a workload once on `log.disk(..)`, then for every point and some seeds cut, open what is under
//! test on the images (recorded by a new log, to cut the recovery too), and let a [`Witness`] judge.

mod dm_log;
mod witness;

pub use dm_log::write_dm_log;
pub use witness::{Violation, Witness};

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::memory_disk::{at_once, describe};
use crate::{
    Disk, DiskError, Extents, Generation, Image, Io, Pages, SECTOR_BYTES, Safe, Sector, Segments,
    SegmentsMut, Shape, check_range,
};

/// Records everything that several disks are asked to do, on one clock.
#[derive(Clone)]
pub struct CrashLog {
    inner: Rc<Inner>,
}

struct Inner {
    /// Number of events so far: the clock.
    clock: Cell<usize>,
    disks: RefCell<Vec<Rc<Recorded>>>,
    marks: RefCell<Vec<(usize, String)>>,
    /// Each operation yields to other tasks up to this many times between its beginning and its end.
    yields: Cell<u32>,
    random: RefCell<fastrand::Rng>,
    /// Power is off: nothing is recorded or answered any more.
    off: Cell<bool>,
}

struct Recorded {
    sectors: Cell<u64>,
    first: Image,
    live: RefCell<Pages>,
    operations: RefCell<Vec<Operation>>,
    cursor: RefCell<Cursor>,
}

enum What {
    Write { at: Sector, data: Rc<[u8]>, safe: Safe },
    Zero { at: Sector, count: u64, unmap: bool },
    Flush,
}

struct Operation {
    what: What,
    begin: usize,
    end: Cell<Option<usize>>,
    /// It took effect for readers when it began, else when it ended.
    early: bool,
}

impl Operation {
    /// When it took effect for readers, once it has ended. What is read and what becomes durable agree on the order
    /// of writes that overlapped.
    fn effect(&self) -> Option<usize> {
        if self.early { self.end.get().map(|_| self.begin) } else { self.end.get() }
    }
}

/// The durable image up to some operation, kept so that cuts in rising order cost only what changed.
struct Cursor {
    /// Operations below this index are in `durable` or were flushes, except those in `open`.
    next: usize,
    /// Writes that no flush has covered yet, by index.
    open: Vec<usize>,
    point: usize,
    /// When the last finished flush began: what had returned before is there.
    flushed: usize,
    durable: Pages,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.keep_if_panicking();
    }
}

impl CrashLog {
    /// A log without disks. `seed` draws how operations interleave once [`CrashLog::interleave`] is set.
    pub fn new(seed: u64) -> Self {
        let inner = Inner {
            clock: Cell::new(0),
            disks: RefCell::default(),
            marks: RefCell::default(),
            yields: Cell::new(0),
            random: RefCell::new(fastrand::Rng::with_seed(seed)),
            off: Cell::new(false),
        };
        Self { inner: Rc::new(inner) }
    }

    /// Lets operations overlap: each yields up to `most` times between its beginning and its end.
    pub fn interleave(&self, most: u32) {
        self.inner.yields.set(most);
    }

    /// A new disk of zeroes.
    pub fn disk(&self, sectors: u64) -> Rc<CrashDisk> {
        self.disk_from(Image { sectors, pages: Pages::default() })
    }

    /// A new disk that begins with an image, all of it durable.
    pub fn disk_from(&self, image: Image) -> Rc<CrashDisk> {
        let recorded = Rc::new(Recorded {
            sectors: Cell::new(image.sectors),
            live: RefCell::new(image.pages.clone()),
            operations: RefCell::default(),
            cursor: RefCell::new(Cursor::start(&image)),
            first: image,
        });
        self.inner.disks.borrow_mut().push(Rc::clone(&recorded));
        Rc::new(CrashDisk { log: self.clone(), recorded })
    }

    /// Number of events so far. A cut at a point `p` happens just before event `p`.
    pub fn points(&self) -> usize {
        self.inner.clock.get()
    }

    /// Leaves a named event in the log.
    pub fn mark(&self, text: impl Into<String>) {
        self.inner.marks.borrow_mut().push((self.tick(), text.into()));
    }

    /// The marks: when and what.
    pub fn marks(&self) -> Vec<(usize, String)> {
        self.inner.marks.borrow().clone()
    }

    /// From now on every operation fails with [`DiskError::Gone`] and nothing is recorded.
    pub fn power_off(&self) {
        self.inner.off.set(true);
    }

    fn tick(&self) -> usize {
        self.inner.clock.replace(self.inner.clock.get() + 1)
    }

    /// What each disk (in the order of its making) may hold after a power loss at `point`. Equal arguments give equal
    /// images. Seed 0 loses, seed 1 keeps everything that is not promised; others draw each sector's fate.
    pub fn cut(&self, point: usize, seed: u64) -> Vec<Image> {
        let disks = self.inner.disks.borrow();
        let cut = |(index, disk): (usize, &Rc<Recorded>)| disk.cut(point, seed, index as u64);
        disks.iter().enumerate().map(cut).collect()
    }

    /// What each disk holds now, nothing lost.
    pub fn images(&self) -> Vec<Image> {
        let image = |d: &Rc<Recorded>| Image { sectors: d.sectors.get(), pages: d.live.borrow().clone() };
        self.inner.disks.borrow().iter().map(image).collect()
    }
}

impl Cursor {
    fn start(image: &Image) -> Self {
        Self { next: 0, open: Vec::new(), point: 0, flushed: 0, durable: image.pages.clone() }
    }
}

impl Recorded {
    fn cut(&self, point: usize, seed: u64, disk: u64) -> Image {
        let operations = self.operations.borrow();
        let mut cursor = self.cursor.borrow_mut();
        if point < cursor.point {
            *cursor = Cursor::start(&self.first);
        }
        self.advance(&operations, &mut cursor, point);
        let mut random = fastrand::Rng::with_seed(seed ^ (point as u64) << 20 ^ disk << 50);
        let mut pages = cursor.durable.clone();
        let ended = |o: &Operation| o.end.get().filter(|e| *e < point);
        // Operations under way may take effect at any time from their beginning on; others did as readers saw them.
        let mut order: Vec<(usize, usize)> = cursor
            .open
            .iter()
            .map(|index| {
                let operation = &operations[*index];
                let effect = ended(operation).and(operation.effect());
                (effect.unwrap_or_else(|| random.usize(operation.begin..=point)), *index)
            })
            .collect();
        order.sort_unstable();
        let keep_per_thousand = match seed {
            0 => 0,
            1 => 1000,
            _ => *random.choice([20, 500, 500, 980].iter()).unwrap_or(&500),
        };
        for (_, index) in order {
            let operation = &operations[index];
            let on_return = matches!(operation.what, What::Write { safe: Safe::OnReturn, .. });
            let promised = ended(operation).is_some_and(|end| on_return || end < cursor.flushed);
            operation.what.apply(&mut pages, || promised || random.u32(0..1000) < keep_per_thousand);
        }
        Image { sectors: self.sectors.get(), pages }
    }

    /// Moves everything into the durable image that flushes finished before `point` promise.
    fn advance(&self, operations: &[Operation], cursor: &mut Cursor, point: usize) {
        cursor.point = point;
        while let Some(operation) = operations.get(cursor.next).filter(|o| o.begin < point) {
            if !matches!(operation.what, What::Flush) {
                cursor.open.push(cursor.next);
            }
            cursor.next += 1;
        }
        let flushed = operations[..cursor.next]
            .iter()
            .rev()
            .filter(|o| matches!(o.what, What::Flush) && o.end.get().is_some_and(|e| e < point))
            .map(|o| o.begin)
            .next();
        let Some(flushed) = flushed else { return };
        cursor.flushed = flushed;
        // A promised write is moved down only when nothing that stays open can have taken effect before it.
        let settled = |index: usize| operations[index].end.get().is_some_and(|e| e < flushed);
        let oldest = cursor.open.iter().filter(|i| !settled(**i)).map(|i| operations[*i].begin).min();
        let movable = |index: usize| {
            settled(index) && oldest.is_none_or(|o| operations[index].effect().is_some_and(|e| e < o))
        };
        let (down, open): (Vec<usize>, Vec<usize>) = cursor.open.iter().partition(|i| movable(**i));
        let mut down: Vec<usize> = down;
        down.sort_by_key(|i| operations[*i].effect());
        for index in down {
            operations[index].what.apply(&mut cursor.durable, || true);
        }
        cursor.open = open;
    }
}

impl What {
    /// Puts the operation on an image; `keep` is asked for each sector.
    fn apply(&self, pages: &mut Pages, mut keep: impl FnMut() -> bool) {
        match self {
            What::Write { at, data, .. } => {
                let (mut from, sectors) = (0, data.len() as u64 / SECTOR_BYTES);
                while from < sectors {
                    let kept = (from..sectors).take_while(|_| keep()).count() as u64;
                    if kept > 0 {
                        let bytes = (from * SECTOR_BYTES) as usize..((from + kept) * SECTOR_BYTES) as usize;
                        pages.write(at.plus(from).bytes(), &Segments::new(&data[bytes]));
                    }
                    from += kept + 1;
                }
            }
            What::Zero { at, count, .. } => {
                // A long unmap is not drawn sector by sector: a prefix and a suffix may be missing.
                if *count > 256 {
                    let skip = |kept: bool| if kept { 0 } else { count / 3 };
                    let (head, tail) = (skip(keep()), skip(keep()));
                    pages.zero(at.plus(head).bytes(), (count - head - tail) * SECTOR_BYTES);
                    return;
                }
                for sector in 0..*count {
                    if keep() {
                        pages.zero(at.plus(sector).bytes(), SECTOR_BYTES);
                    }
                }
            }
            What::Flush => {}
        }
    }
}

/// One disk of a [`CrashLog`]. Holds its content in memory.
pub struct CrashDisk {
    log: CrashLog,
    recorded: Rc<Recorded>,
}

impl CrashDisk {
    /// The content now, nothing lost.
    pub fn image(&self) -> Image {
        Image { sectors: self.recorded.sectors.get(), pages: self.recorded.live.borrow().clone() }
    }

    /// Grows the disk; the new part reads as zero and is durable at once.
    pub fn grow(&self, sectors: u64) {
        self.recorded.sectors.set(sectors.max(self.recorded.sectors.get()));
    }

    async fn pause(&self) {
        let most = self.log.inner.yields.get();
        let times = if most == 0 { 0 } else { self.log.inner.random.borrow_mut().u32(0..=most) };
        for _ in 0..times {
            lane::yield_now().await;
        }
    }

    async fn perform(&self, what: What) -> Result<(), DiskError> {
        if self.log.inner.off.get() {
            return Err(DiskError::Gone);
        }
        let begin = self.log.tick();
        let early = self.log.inner.random.borrow_mut().bool();
        if early {
            what.apply(&mut self.recorded.live.borrow_mut(), || true);
        }
        let index = {
            let mut operations = self.recorded.operations.borrow_mut();
            operations.push(Operation { what, begin, end: Cell::new(None), early });
            operations.len() - 1
        };
        self.pause().await;
        if self.log.inner.off.get() {
            return Err(DiskError::Gone);
        }
        let operations = self.recorded.operations.borrow();
        if !early {
            operations[index].what.apply(&mut self.recorded.live.borrow_mut(), || true);
        }
        operations[index].end.set(Some(self.log.tick()));
        Ok(())
    }

    fn check(&self, at: Sector, bytes: usize) -> Result<(), DiskError> {
        assert!((bytes as u64).is_multiple_of(SECTOR_BYTES), "segments are whole sectors");
        check_range(self.recorded.sectors.get(), at, bytes as u64 / SECTOR_BYTES)
    }
}

impl Disk for CrashDisk {
    fn shape(&self) -> Shape {
        Shape {
            sectors: self.recorded.sectors.get(),
            physical_block_bytes: SECTOR_BYTES as u32,
            read_only: false,
            unmap_reads_zero: true,
            memory_align: 1,
        }
    }

    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        Box::pin(async move {
            self.check(at, into.len())?;
            if self.log.inner.off.get() {
                return Err(DiskError::Gone);
            }
            self.pause().await;
            self.recorded.live.borrow().read(at.bytes(), into);
            Ok(())
        })
    }

    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a> {
        Box::pin(async move {
            self.check(at, from.len())?;
            if from.is_empty() {
                return Ok(());
            }
            self.perform(What::Write { at, data: from.to_vec().into(), safe }).await
        })
    }

    fn zero(&self, at: Sector, count: u64, _may_free: bool) -> Io<'_> {
        Box::pin(async move {
            check_range(self.recorded.sectors.get(), at, count)?;
            self.perform(What::Zero { at, count, unmap: false }).await
        })
    }

    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        Box::pin(async move {
            check_range(self.recorded.sectors.get(), at, count)?;
            self.perform(What::Zero { at, count, unmap: true }).await
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
            check_range(self.recorded.sectors.get(), at, count).and_then(|()| match since {
                Some(_) => Err(DiskError::UnknownGeneration),
                None => {
                    describe(&self.recorded.live.borrow(), at, count, out);
                    Ok(())
                }
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
        Box::pin(async move {
            self.check(at, new.len())?;
            let (wanted, mut found) = (expected.to_vec(), vec![0; expected.len()]);
            self.recorded.live.borrow().read(at.bytes(), &SegmentsMut::new(&mut found));
            if let Some(byte) = wanted.iter().zip(&found).position(|(a, b)| a != b) {
                return Err(DiskError::Miscompare { at_bytes: byte as u64 });
            }
            // Nothing may come between the comparison and the write: it takes effect before anybody else runs.
            let data: Rc<[u8]> = new.to_vec().into();
            self.recorded.live.borrow_mut().write(at.bytes(), new);
            let begin = self.log.tick();
            let end = Cell::new(Some(self.log.tick()));
            let what = What::Write { at, data, safe: Safe::AtNextFlush };
            self.recorded.operations.borrow_mut().push(Operation { what, begin, end, early: true });
            Ok(())
        })
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(self.perform(What::Flush))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn byte(image: &Image, sector: u64) -> u8 {
        let mut one = [0; 512];
        image.pages.read(sector * 512, &SegmentsMut::new(&mut one));
        assert!(one.iter().all(|b| *b == one[0]), "a sector never tears");
        one[0]
    }

    #[test]
    fn flushed_writes_stay_and_others_tear() {
        lane::block_on(async {
            let log = CrashLog::new(1);
            let disk = log.disk(16);
            disk.write(Sector(0), &Segments::new(&[1; 1024]), Safe::AtNextFlush).await.unwrap();
            disk.flush().await.unwrap();
            disk.write(Sector(1), &Segments::new(&[2; 1024]), Safe::AtNextFlush).await.unwrap();
            disk.write(Sector(4), &Segments::new(&[3; 512]), Safe::OnReturn).await.unwrap();
            let end = log.points();
            let mut seen = std::collections::BTreeSet::new();
            for seed in 0..200 {
                let image = &log.cut(end, seed)[0];
                assert_eq!((byte(image, 0), byte(image, 4)), (1, 3));
                seen.insert((byte(image, 1), byte(image, 2)));
            }
            assert_eq!(seen, [(1, 0), (1, 2), (2, 0), (2, 2)].into());
            assert_eq!(byte(&log.cut(0, 1)[0], 0), 0, "going back works");
            let early = log.cut(2, 0);
            assert_eq!(byte(&early[0], 0), 0, "before the flush nothing is promised");
        });
    }

    /// A flush promises what had returned before it, also while an older write is still under way.
    #[test]
    fn a_slow_neighbour_takes_no_promise_away() {
        lane::block_on(async {
            let log = CrashLog::new(1);
            log.interleave(9);
            let disk = log.disk(8);
            let slow = {
                let disk = Rc::clone(&disk);
                lane::spawn(async move {
                    for _ in 0..40 {
                        disk.write(Sector(7), &Segments::new(&[9; 512]), Safe::AtNextFlush).await.unwrap();
                    }
                })
            };
            let mut promised = Vec::new();
            for round in 1..=10u8 {
                let data = [round; 512];
                disk.write(Sector(0), &Segments::new(&data), Safe::AtNextFlush).await.unwrap();
                disk.flush().await.unwrap();
                promised.push((log.points(), round));
            }
            slow.await;
            for (point, round) in promised {
                for seed in 0..20 {
                    assert!(byte(&log.cut(point, seed)[0], 0) >= round, "round {round}, seed {seed}");
                }
            }
        });
    }

    #[test]
    fn two_disks_share_one_clock() {
        lane::block_on(async {
            let log = CrashLog::new(7);
            let (a, b) = (log.disk(8), log.disk(8));
            for round in 1..=5u8 {
                a.write(Sector(0), &Segments::new(&[round; 512]), Safe::OnReturn).await.unwrap();
                b.write(Sector(0), &Segments::new(&[round; 512]), Safe::OnReturn).await.unwrap();
            }
            for point in 0..=log.points() {
                for seed in 0..4 {
                    let images = log.cut(point, seed);
                    let (a, b) = (byte(&images[0], 0), byte(&images[1], 0));
                    assert!(a == b || a == b + 1, "b was written after a: {a} {b}");
                }
            }
        });
    }
}
