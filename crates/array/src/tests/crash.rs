//! DESIGN's correctness rule: power fails at every operation, and again during the recovery.

use std::rc::Rc;

use block::Disk;
use block::crash::CrashLog;

use super::judge::{everything, judge};
use super::story::{Plot, Story};
use super::{dynamic, seeds, soak};
use crate::{NewLun, Options, Pool};

/// Opens what is left after a cut, on disks of a new log.
async fn reopen(story: &Story, point: usize, fate: u64) -> (CrashLog, Result<Rc<Pool>, String>) {
    let second = CrashLog::new(fate);
    let media: Vec<Rc<dyn Disk>> =
        story.log.cut(point, fate).into_iter().map(|image| dynamic(&second.disk_from(image))).collect();
    let pool = Pool::open(media, Options::default()).await.map_err(|e| format!("does not open: {e}"));
    (second, pool)
}

/// Opens, judges and checks after a cut.
async fn survives(story: &Story, point: usize, fate: u64) -> Result<(), String> {
    let (_, pool) = reopen(story, point, fate).await;
    let pool = pool?;
    judge(&[Rc::clone(&pool)], &story.lives, point).await?;
    let report = pool.check().await.map_err(|e| e.to_string())?;
    match report.faults().next() {
        Some(finding) => Err(format!("check: {finding}")),
        None => Ok(()),
    }
}

/// The first violation of a story, over all its points. The soak draws other fates at each point instead of more.
pub(crate) async fn violation(seed: u64, plot: Plot, fates: u64, every: usize) -> Option<String> {
    let story = Story::run(seed, plot).await;
    for point in (story.made..=story.log.points()).step_by(every) {
        for fate in 0..fates {
            let fate = if soak() { (seed + point as u64 + fate) % 6 } else { fate };
            if let Err(what) = survives(&story, point, fate).await {
                let last = story.log.points();
                keep(&story.log, &format!("array-crash-seed{seed}"), point);
                return Some(format!("KAGAMI_SEED={seed} point {point} of {last} fate {fate}: {what}"));
            }
        }
    }
    None
}

/// Leaves the log of a story that ended badly, where `KAGAMI_DMLOG` says; not when that was the plan.
pub(crate) fn keep(log: &CrashLog, name: &str, point: usize) {
    if !crate::faults::any_planted() {
        log.keep(name, Some(point));
    }
}

#[test]
fn crash_at_every_operation() {
    lane::block_on(async {
        let mut points = 0;
        for seed in seeds(6, 300) {
            let plot = Plot { media: 1 + seed as usize % 2, ..Plot::usual() };
            if let Some(violation) = violation(seed, plot, if soak() { 2 } else { 3 }, 1).await {
                panic!("{violation}");
            }
            points += 1;
        }
        eprintln!("{points} stories, no violation");
    });
}

/// The story of an operator who does everything there is, on one medium or two.
pub(crate) fn operator_plot(seed: u64) -> Plot {
    Plot { media: 1 + seed as usize % 2, ..Plot::all() }
}

/// The same with everything that an operator can do: holds, resize, claims, revert and back, the trash; with the
/// background completing, giving up and punching grains.
#[test]
fn crash_at_every_operation_of_an_operator() {
    lane::block_on(async {
        for seed in seeds(4, 300) {
            if let Some(violation) = violation(seed, operator_plot(seed), if soak() { 1 } else { 2 }, 1).await
            {
                panic!("{violation}");
            }
        }
    });
}

/// A story that once ended badly: a layer was merged, and overwritten where it had moved to, while the record that took
/// its last name was on its way.
#[test]
fn crash_while_the_name_of_a_merged_layer_is_going() {
    lane::block_on(async {
        let story = Story::run(184, operator_plot(184)).await;
        for point in story.made..=story.log.points() {
            if let Err(what) = survives(&story, point, 5).await {
                panic!("point {point}: {what}");
            }
        }
    });
}

/// Power fails during the recovery, or shortly after it while others write; what was there before stays.
#[test]
fn crash_again_during_recovery() {
    lane::block_on(async {
        for seed in seeds(4, 40) {
            let plot = if seed % 2 == 0 { Plot::all() } else { Plot::usual() };
            let story = Story::run(seed, plot).await;
            let stride = if soak() { 1 } else { 41 };
            for point in (story.made..=story.log.points()).step_by(stride) {
                if let Err(what) = again(&story, point, 2 + seed).await {
                    keep(&story.log, &format!("array-again-seed{seed}"), point);
                    panic!("KAGAMI_SEED={seed} point {point}: {what}");
                }
            }
        }
    });
}

async fn again(story: &Story, point: usize, fate: u64) -> Result<(), String> {
    let (second, pool) = reopen(story, point, fate).await;
    let pool = pool?;
    pool.noted.rest.set(2);
    pool.noted.patient.set(false);
    // The other way than before the power loss, mostly: a merge may go on either way.
    pool.merge_way.set(super::merge_way(fate));
    // Free at the first crash, written now: nothing that survived may move.
    let late = pool.create_lun(NewLun::new("late", 4096)).await.map_err(|e| e.to_string())?;
    for block in 0..40u64 {
        let bytes = super::pattern(8, 0xabc000 + block);
        let at = block::Sector(block * 40);
        late.write(at, &block::Segments::new(&bytes), block::Safe::AtNextFlush)
            .await
            .map_err(|e| format!("write after recovery: {e}"))?;
    }
    late.flush().await.map_err(|e| format!("flush after recovery: {e}"))?;
    pool.tidy().await.map_err(|e| format!("tidy after recovery: {e}"))?;
    pool.settle().await.map_err(|e| e.to_string())?;
    for cut in 0..=second.points() {
        let media = second.cut(cut, fate + 1).into_iter().map(|i| Rc::new(block::MemoryDisk::from(i)));
        let pool = Pool::open(media.map(|d| d as Rc<dyn Disk>).collect(), Options::default()).await;
        let pool = pool.map_err(|e| format!("second cut {cut}: does not open: {e}"))?;
        judge(&[Rc::clone(&pool)], &story.lives, point)
            .await
            .map_err(|e| format!("second cut {cut}: {e}"))?;
        let report = pool.check().await.map_err(|e| format!("second cut {cut}: {e}"))?;
        if let Some(finding) = report.faults().next() {
            return Err(format!("second cut {cut}: check: {finding}"));
        }
    }
    Ok(())
}

/// Opening twice changes nothing.
#[test]
fn crash_then_open_twice() {
    lane::block_on(async {
        for seed in seeds(2, 40) {
            let story = Story::run(seed, Plot::usual()).await;
            for point in (story.made..=story.log.points()).step_by(if soak() { 1 } else { 23 }) {
                let (second, pool) = reopen(&story, point, 3).await;
                let first = everything(&pool.unwrap()).await.unwrap();
                let media = second.images().into_iter().map(|i| Rc::new(block::MemoryDisk::from(i)));
                let pool =
                    Pool::open(media.map(|d| d as Rc<dyn Disk>).collect(), Options::default()).await.unwrap();
                let again = everything(&pool).await.unwrap();
                assert_eq!(first, again, "KAGAMI_SEED={seed} point {point}");
            }
        }
    });
}
