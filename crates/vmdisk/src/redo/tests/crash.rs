//! Power fails at every operation: DESIGN's correctness rule, and again during what comes after.

use block::crash::{CrashLog, Witness};
use block::{Image, MemoryDisk, Pages};

use super::*;
use crate::fault::{Fault, plant};
use crate::tests::{points, seeds};

const SECTORS: u64 = 9000;
const FILE: u64 = 8 * GROW_SECTORS / 8;

/// A file whose every free sector holds garbage: a pointer to what was never written is seen.
fn garbage() -> Image {
    let mut pages = Pages::default();
    let junk = vec![0xee; 1 << 20];
    pages.write(0, &Segments::new(&junk));
    Image { sectors: FILE, pages }
}

/// Several writers at once, flushing now and then.
async fn workload(log: &CrashLog, seed: u64, grain: u64) -> Rc<Witness> {
    let file = log.disk_from(garbage());
    RedoDisk::create(&*file, SECTORS, grain).await.unwrap();
    log.mark("made");
    let below: Rc<dyn Disk> = Rc::new(MemoryDisk::new(SECTORS));
    let disk = RedoDisk::open(file, below, false, false).await.unwrap();
    let witness = Witness::new(log, disk);
    let tasks: Vec<_> = (0..3u64)
        .map(|task| {
            let (witness, mut random) = (Rc::clone(&witness), fastrand::Rng::with_seed(seed * 5 + task));
            lane::spawn(async move {
                for _ in 0..8 {
                    // Two tables' worth of disk, some sectors again and again.
                    let at = [random.u64(0..SECTORS - 8), random.u64(0..12)][random.usize(0..2)];
                    let bytes = vec![random.u8(1..0xee); random.usize(1..5) * UNIT];
                    let safe = if random.u8(0..8) == 0 { Safe::OnReturn } else { Safe::AtNextFlush };
                    witness.write(Sector(at), &Segments::new(&bytes), safe).await.unwrap();
                    if random.u8(0..3) == 0 {
                        witness.flush().await.unwrap();
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await;
    }
    witness
}

async fn reopen(file: Rc<dyn GrowingFile>) -> Result<Rc<RedoDisk>, RedoError> {
    let below: Rc<dyn Disk> = Rc::new(MemoryDisk::new(SECTORS));
    RedoDisk::open(file, below, false, false).await
}

/// Violations found over all points of a workload.
async fn violations(seed: u64, grain: u64, cuts: u64) -> usize {
    let log = CrashLog::new(seed);
    log.interleave(3);
    let witness = workload(&log, seed, grain).await;
    let made = log.marks()[0].0;
    let mut found = 0;
    for point in made + 1..=log.points() {
        for cut in 0..cuts {
            let image = log.cut(point, cut).remove(0);
            let Ok(disk) = reopen(Rc::new(MemoryDisk::from(image))).await else {
                found += 1;
                continue;
            };
            if witness.judge(point, &*disk).await.is_err() {
                found += 1;
                continue;
            }
            // Going on writes into free grains only: nothing that was there changes.
            let last = [0x77; UNIT];
            disk.write(Sector(SECTORS - 1), &Segments::new(&last), Safe::OnReturn).await.unwrap();
            found += usize::from(witness.judge(point, &*disk).await.is_err());
        }
    }
    found
}

#[test]
fn r11_power_may_fail_at_every_operation() {
    lane::block_on(async {
        for seed in seeds(6, 200) {
            let grain = [1, 1, 8][seed as usize % 3];
            assert_eq!(violations(seed, grain, 4).await, 0, "KAGAMI_SEED={seed}");
        }
    });
}

#[test]
fn r11_a_table_written_before_its_data_is_found_out() {
    lane::block_on(async {
        plant(Some(Fault::TableBeforeData));
        let mut found = 0;
        for seed in 0..3 {
            found += violations(seed, 1, 4).await;
        }
        plant(None);
        assert!(found > 0, "the crash test is blind");
    });
}

/// Power fails, the redo log is opened and written, and power fails again.
async fn again_after_recovery(seed: u64, step: usize) {
    let log = CrashLog::new(seed);
    log.interleave(3);
    let witness = workload(&log, seed, [1, 1, 8][seed as usize % 3]).await;
    let made = log.marks()[0].0;
    for point in points(made + 1, log.points(), step, seed) {
        let image = log.cut(point, (seed + point as u64) % 4).remove(0);
        let second = CrashLog::new(seed ^ point as u64);
        let disk = reopen(second.disk_from(image)).await.unwrap();
        // Free at the first crash, written now: what survived must stay as it is at every later point.
        for at in 0..4 {
            let bytes = [0x77; UNIT];
            disk.write(Sector(SECTORS - 4 + at), &Segments::new(&bytes), Safe::AtNextFlush).await.unwrap();
        }
        disk.flush().await.unwrap();
        for again in 0..=second.points() {
            let image = second.cut(again, (seed + again as u64) % 5).remove(0);
            let disk = reopen(Rc::new(MemoryDisk::from(image))).await.unwrap();
            let judged = witness.judge(point, &*disk).await;
            judged.unwrap_or_else(|v| panic!("KAGAMI_SEED={seed} point {point}, again {again}: {v:?}"));
        }
    }
}

#[test]
fn r11_power_may_fail_again_after_the_recovery() {
    lane::block_on(async {
        for seed in seeds(7, 40) {
            again_after_recovery(seed, 7).await;
        }
    });
}
