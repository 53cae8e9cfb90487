//! A medium that fails: after a failed flush or metadata write nothing more is written until the pool is opened again,
//! and then everything is there that was answered.

use std::rc::Rc;

use block::crash::{CrashLog, Witness};
use block::decorate::{Decorated, Fail, Operation};
use block::{Disk, DiskError, Image, MediumFault, MemoryDisk, Pages, Safe, Sector, Segments, SegmentsMut};

use super::{dynamic, new_pool, pattern};
use crate::{Decider, Lun, LunError, NewLun, Options, Pool};

const MEDIUM: u64 = 16 << 11;
/// What the medium says.
const BROKEN: DiskError = DiskError::Medium(MediumFault { at: Sector(0), what: "planned" });

fn is_planned(error: &DiskError) -> bool {
    matches!(error, DiskError::Medium(fault) if fault.what == "planned")
}

fn halted<T>(answer: Result<T, LunError>) -> bool {
    matches!(answer, Err(LunError::Disk(DiskError::Halted)))
}

/// Nothing changes any more, whatever is asked for; what there is can be read.
async fn refuses_everything(pool: &Rc<Pool>, lun: &Rc<Lun>) {
    assert!(pool.is_halted() && pool.info().halted);
    let bytes = pattern(8, 99);
    // In place, to a new grain, and in parts of blocks.
    for (at, count) in [(0, 8), (4096, 8), (3, 2)] {
        let piece = Segments::new(&bytes[..count * 512]);
        for safe in [Safe::AtNextFlush, Safe::OnReturn] {
            let answer = lun.write(Sector(at), &piece, safe).await;
            assert!(matches!(answer, Err(DiskError::Halted)), "{answer:?}");
        }
    }
    let piece = Segments::new(&bytes);
    for answer in [
        lun.flush().await,
        lun.zero(Sector(0), 8, true).await,
        lun.unmap(Sector(0), 8).await,
        lun.compare_and_write(Sector(0), &piece, &piece).await,
        pool.commit().await,
        pool.settle().await,
        pool.tidy().await,
        pool.tidy_step().await.map(drop),
    ] {
        assert!(matches!(answer, Err(DiskError::Halted)), "{answer:?}");
    }
    let (base, generation) = {
        let base = lun.open_snapshot("base").unwrap();
        (base.clone(), base.generation())
    };
    assert!(halted(lun.snapshot("late").await) && halted(lun.revert("base").await));
    assert!(halted(lun.remove_snapshot("base").await) && halted(lun.hold(generation, "late").await));
    assert!(halted(lun.release(generation, "late").await));
    assert!(halted(lun.release_all_but(generation, "late").await));
    assert!(halted(lun.resize(1 << 20).await) && halted(lun.rename("z").await));
    assert!(halted(lun.claim(None).await) && halted(lun.accept().await));
    assert!(halted(pool.create_lun(NewLun::new("new", 8192)).await));
    assert!(halted(pool.clone_lun("a", "base", NewLun::new("new", 0)).await));
    assert!(halted(pool.remove_lun("a", false).await) && halted(pool.undelete_lun("a").await));
    let group = uuid::Uuid::from_u128(3);
    let members = [(Rc::clone(lun), "late".to_owned())];
    assert!(halted(pool.prepare_cut(group, Decider::Outside, &members).await));
    let mut found = vec![0; 8 * 512];
    base.read(Sector(0), &SegmentsMut::new(&mut found)).await.unwrap();
    assert_eq!(found, pattern(8, 1));
    lun.read(Sector(0), &SegmentsMut::new(&mut found)).await.unwrap();
}

/// A pool on a medium that begins to fail when it is told to, and a LUN with a snapshot.
struct Failing {
    log: CrashLog,
    pool: Rc<Pool>,
    lun: Rc<Lun>,
    witness: Rc<Witness>,
}

impl Failing {
    /// From now on `fails` is asked about each operation.
    async fn new(seed: u64, fails: Fail) -> Self {
        let log = CrashLog::new(seed);
        log.interleave(2);
        let disk = log.disk_from(Image { sectors: MEDIUM, pages: Pages::default() });
        let pool = Pool::create(vec![dynamic(&disk)], new_pool(), Options::default()).await.unwrap();
        let lun = pool.create_lun(NewLun::new("a", 8192)).await.unwrap();
        lun.write(Sector(0), &Segments::new(&pattern(8, 1)), Safe::AtNextFlush).await.unwrap();
        lun.snapshot("base").await.unwrap();
        pool.settle().await.unwrap();
        drop((lun, pool));
        let medium = Decorated::new(disk, fails);
        let pool = Pool::open(vec![medium], Options::default()).await.unwrap();
        let lun = pool.lun("a").unwrap();
        let base = super::content(&*lun).await.unwrap();
        let witness = Witness::over(&log, dynamic(&lun), base);
        Self { log, pool, lun, witness }
    }

    /// Writes and flushes until something fails. How many flushes were answered, and the error.
    async fn work(&self) -> (u64, DiskError) {
        for round in 0..40u64 {
            // New grains, and in every other round only blocks that are there: with metadata to write and without.
            let places = [round / 2 * 128, 16];
            for (number, at) in places.into_iter().enumerate() {
                let bytes = pattern(8, 10 + round * 2 + number as u64);
                let written = self.witness.write(Sector(at), &Segments::new(&bytes), Safe::AtNextFlush).await;
                if let Err(error) = written {
                    return (round, error);
                }
            }
            if let Err(error) = self.witness.flush().await {
                return (round, error);
            }
        }
        panic!("nothing failed");
    }

    async fn work_without_failure(&self, rounds: u64) {
        for round in 0..rounds {
            let bytes = pattern(8, 10 + round);
            let at = Sector(round * 128);
            self.witness.write(at, &Segments::new(&bytes), Safe::AtNextFlush).await.unwrap();
            self.witness.flush().await.unwrap();
        }
    }

    /// Opens what is there, with power lost in every way or not at all.
    async fn reopens(&self, what: &str) {
        let point = self.log.points();
        for fate in 0..6 {
            let media = self.log.cut(point, fate).into_iter().map(|i| Rc::new(MemoryDisk::from(i)));
            let media = media.map(|d| d as Rc<dyn Disk>).collect();
            let pool = Pool::open(media, Options::default()).await.unwrap();
            let lun = pool.lun("a").unwrap();
            self.witness.judge(point, &*lun).await.unwrap_or_else(|v| panic!("{what}, fate {fate}: {v:?}"));
            let report = pool.check().await.unwrap();
            assert!(report.faults().next().is_none(), "{what}, fate {fate}: {:?}", report.findings);
            // It takes writes again.
            lun.write(Sector(0), &Segments::new(&pattern(8, 7)), Safe::OnReturn).await.unwrap();
            lun.snapshot("after").await.unwrap();
            pool.tidy().await.unwrap();
        }
    }
}

/// Each flush in turn: of data, of a record of the journal, of what makes room in it.
#[test]
fn a_failed_flush_halts_the_pool_until_it_is_reopened() {
    lane::block_on(async {
        let mut answered = Vec::new();
        for nth in 0..30 {
            let place = Failing::new(nth, Fail::nth(Operation::Flush, nth, false, BROKEN)).await;
            let (rounds, error) = place.work().await;
            assert!(is_planned(&error), "flush {nth}: {error}");
            answered.push(rounds);
            // The medium works again: the pool must not trust it.
            refuses_everything(&place.pool, &place.lun).await;
            place.reopens(&format!("flush {nth}")).await;
        }
        assert!(answered[0] == 0 && answered[29] > 10, "{answered:?}");
    });
}

/// A checkpoint runs beside commits, for nobody: the next who asks hears of it.
#[test]
fn a_failed_flush_of_a_checkpoint_halts_the_pool() {
    lane::block_on(async {
        let failed = Rc::new(std::cell::Cell::new(false));
        let seen = Rc::clone(&failed);
        // The catalog is written by checkpoints alone; the flush after it fails.
        let wrote = std::cell::Cell::new(false);
        let fails = Fail(Box::new(move |operation, at, _| match operation {
            Operation::Write => {
                wrote.set(wrote.get() || (128 + 2048..128 + 2048 + 1024).contains(&at.0));
                None
            }
            Operation::Flush => (wrote.get() && !seen.replace(true)).then_some(BROKEN),
            _ => None,
        }));
        let place = Failing::new(1, fails).await;
        place.work_without_failure(5).await;
        assert!(!failed.get());
        let settled = place.pool.settle().await;
        assert!(matches!(&settled, Err(error) if is_planned(error)), "{settled:?}");
        assert!(failed.get());
        refuses_everything(&place.pool, &place.lun).await;
        place.reopens("checkpoint").await;
    });
}

/// A record of the journal that cannot be written is as bad as one that cannot be flushed.
#[test]
fn a_failed_write_of_metadata_halts_the_pool_and_one_of_data_does_not() {
    lane::block_on(async {
        for nth in 0..6 {
            let seen = std::cell::Cell::new(0);
            let fails = Fail(Box::new(move |operation, at, _| {
                let of_journal = operation == Operation::Write && (128..128 + 2048).contains(&at.0);
                (of_journal && seen.replace(seen.get() + 1) == nth).then_some(BROKEN)
            }));
            let place = Failing::new(nth, fails).await;
            let (rounds, error) = place.work().await;
            assert!(is_planned(&error) && rounds == 2 * nth, "record {nth}: {error} after {rounds}");
            refuses_everything(&place.pool, &place.lun).await;
            place.reopens(&format!("record {nth}")).await;
        }
        // A guest's own data: he is told, and the pool goes on.
        let failed = std::cell::Cell::new(false);
        let fails = Fail(Box::new(move |operation, _, count| {
            (operation == Operation::Write && count == 24 && !failed.replace(true)).then_some(BROKEN)
        }));
        let place = Failing::new(9, fails).await;
        let bytes = pattern(24, 5);
        let answer = place.witness.write(Sector(4096), &Segments::new(&bytes), Safe::AtNextFlush).await;
        assert!(matches!(&answer, Err(error) if is_planned(error)), "{answer:?}");
        assert!(!place.pool.is_halted());
        place.witness.write(Sector(4096), &Segments::new(&bytes), Safe::AtNextFlush).await.unwrap();
        place.witness.flush().await.unwrap();
        place.reopens("data").await;
    });
}
