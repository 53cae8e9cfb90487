//! Power fails at every operation of a story: I1 to I8 of chapter 7, all or none of chapter 10.

use std::rc::Rc;

use block::crash::CrashLog;
use block::{Disk, Image, MemoryDisk};

use super::story::{Plot, Round, Story, wanted};
use super::world::{World, content, made};
use super::{seeds, simulated, soak};
use crate::cut;
use crate::faults::{Fault, plant};

/// How hard a story is looked at.
struct Effort {
    /// Every point from before a cut to well after it, and three fates near its decision.
    whole_cut: bool,
    /// Elsewhere every so many points, and every point around a cut's last word. Each seed takes others, so that `stride`
    /// seeds look at all.
    stride: usize,
    /// The same in commits: each disk's flip, the `.vmx`, the base's new CID, what is removed afterwards.
    commits: usize,
    /// Every so many cuts, recovery is cut too.
    again: usize,
    /// Every so many cuts, another backup is made, and pools and datastore are checked.
    thorough: usize,
}

fn media(images: Vec<Image>) -> Vec<Rc<dyn Disk>> {
    images.into_iter().map(|i| Rc::new(MemoryDisk::from(i)) as Rc<dyn Disk>).collect()
}

fn is_on_redo(disk: &crate::OpenDisk) -> bool {
    disk.disk.links().len() > 1
}

/// The LUNs that have the cut of a round: all or none, and for sure before its begin or after its end.
fn lun_members(world: &World, round: &Round, point: usize) -> Result<bool, String> {
    let has = |lun: &Rc<array::Lun>| lun.snapshots().iter().any(|s| s.name == round.snapshot);
    let there: Vec<bool> = world.luns().iter().map(has).collect();
    if there.iter().any(|t| *t != there[0]) {
        return Err(format!("R34: {} is there in some pools only: {there:?}", round.snapshot));
    }
    match there[0] {
        true if point <= round.begin => Err(format!("{} is there before it began", round.snapshot)),
        false if point >= round.end && !round.luns.is_empty() => Err(format!("{} is lost", round.snapshot)),
        there => Ok(there),
    }
}

/// One round as it is found after a power loss at `point`, before anything is committed.
async fn judge_round(story: &Story, world: &World, round: &Round, point: usize) -> Result<(), String> {
    let cut = lun_members(world, round, point)?;
    if point > round.over {
        return Ok(());
    }
    let flat = world.flat();
    let on_redo: Vec<bool> = flat.iter().map(is_on_redo).collect();
    if point <= round.committing && on_redo.iter().any(|r| *r != on_redo[0]) {
        return Err(format!("R34: on redo logs in part: {on_redo:?}"));
    }
    if point < round.end && story.plot == Plot::Mixed && on_redo[0] != cut {
        return Err(format!("R34: VMs on redo logs: {}, LUNs cut: {cut}", on_redo[0]));
    }
    if (round.end..=round.committing).contains(&point) && !on_redo[0] {
        return Err("the switch was decided and is lost".into());
    }
    if point <= round.committing && on_redo[0] {
        for (disk, image) in flat.iter().zip(&round.bases) {
            let base = disk.disk.frozen(0).ok_or("no base")?;
            if content(&*base).await? != *image {
                return Err(format!("I3: the base of {} is not the image of the cut", disk.slot));
            }
        }
    }
    if cut && point >= round.begin && !round.luns.is_empty() {
        for (lun, image) in world.luns().iter().zip(&round.luns) {
            let snapshot = lun.open_snapshot(&round.snapshot).map_err(|e| e.to_string())?;
            if content(&*snapshot).await? != *image {
                return Err(format!("R34: the snapshot of {} is not the image of the cut", lun.name()));
            }
        }
    }
    Ok(())
}

async fn judge_disks(story: &Story, world: &World, point: usize) -> Result<(), String> {
    for (disk, witness) in world.disks().iter().zip(&story.witnesses) {
        let judged = witness.judge(point, &*disk.disk).await;
        judged.map_err(|v| format!("I2, {}: {v:?}", disk.path))?;
    }
    Ok(())
}

/// The world after a power loss at `point`, recovered, committed, judged before and after.
async fn judge(
    story: &Story,
    images: Vec<Image>,
    point: usize,
    effort: &Effort,
    count: usize,
) -> Result<(), String> {
    let world = World::open(media(images)).await?;
    if let Some(path) = world.set_aside.first() {
        return Err(format!("{path} was not ours by any record"));
    }
    let now = story.rounds.iter().rev().find(|r| r.begin <= point);
    if let Some(round) = now {
        judge_round(story, &world, round, point).await?;
    }
    judge_disks(story, &world, point).await?;
    world.consolidate().await?;
    let left = world.differing_files().await;
    if !left.is_empty() || world.flat().iter().any(is_on_redo) {
        return Err(format!("I5: after the commit: {left:?}"));
    }
    judge_disks(story, &world, point).await.map_err(|e| format!("I4: after the commit: {e}"))?;
    if count.is_multiple_of(effort.thorough) {
        thorough(story, &world).await?;
    }
    Ok(())
}

/// Another backup can be made, and the checkers find leaks at most.
async fn thorough(story: &Story, world: &World) -> Result<(), String> {
    let again = cut::cut(&wanted(world, story.plot, "again", 99)).await;
    for vmsnap in again.map_err(|e| format!("no second backup: {e}"))?.vms {
        vmsnap.commit(&mut |_| ()).await.map_err(|e| format!("no second commit: {e}"))?;
    }
    world.around.datastore.volume.settle().await.map_err(|e| e.to_string())?;
    let lun = Rc::clone(&world.around.datastore.lun) as Rc<dyn Disk>;
    let report = vmfs::check(vec![lun], vmfs::check::Options::default()).await.map_err(|e| e.to_string())?;
    if report.worst().is_some_and(|w| w > vmfs::check::Severity::Leak) {
        return Err(format!("datastore: {:?}", report.findings().first()));
    }
    for pool in &world.around.pools {
        let report = pool.check().await.map_err(|e| e.to_string())?;
        if let Some(finding) = report.faults().next() {
            return Err(format!("pool: {finding}"));
        }
    }
    Ok(())
}

/// Power fails a second time, during recovery: what the first recovery decided stays decided.
async fn judge_recovery(story: &Story, images: Vec<Image>, point: usize, seed: u64) -> Result<(), String> {
    let log = CrashLog::new(seed);
    let recorded = images.into_iter().map(|i| log.disk_from(i) as Rc<dyn Disk>).collect();
    let world = World::open(recorded).await?;
    let now = story.rounds.iter().rev().find(|r| r.begin <= point);
    let opened = log.points();
    world.consolidate().await?;
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..3 {
        let again = random.usize(0..=log.points());
        let found = World::open(media(log.cut(again, random.u64(0..6)))).await;
        let found = found.map_err(|e| format!("recovery cut at {again}: {e}"))?;
        let judged = async {
            if let Some(round) = now {
                let cut = lun_members(&found, round, point)?;
                if cut != lun_members(&world, round, point)? {
                    return Err("R34: two recoveries decide differently".to_owned());
                }
                if again <= opened {
                    judge_round(story, &found, round, point).await?;
                }
            }
            judge_disks(story, &found, point).await?;
            found.consolidate().await?;
            match found.differing_files().await.first() {
                Some(left) => Err(left.clone()),
                None => judge_disks(story, &found, point).await,
            }
        };
        judged.await.map_err(|e| format!("recovery cut at {again} of {opened}: {e}"))?;
    }
    Ok(())
}

/// Points that are looked at after a cut has returned, and before its decision.
const AROUND: usize = 40;

impl Effort {
    /// How power fails at a point of a story: none, one shape, or several.
    fn fates(&self, story: &Story, point: usize, seed: u64) -> Vec<u64> {
        let any = |is: fn(&Round, usize) -> bool| story.rounds.iter().any(|r| is(r, point));
        let decisive = any(|r, point| r.end.saturating_sub(AROUND) <= point && point <= r.end);
        let cut = any(|r, point| r.begin <= point && point <= r.end + AROUND);
        let commits = any(|r, point| r.committing <= point && point <= r.over);
        let drawn = (point as u64 * 7 + seed) % 6;
        let stride = if commits { self.commits } else { self.stride };
        let in_turn = (point + seed as usize).is_multiple_of(stride);
        match (decisive, cut && self.whole_cut) {
            // Nothing that was not flushed is there; all of it is; some.
            (true, true) => vec![0, 1, 2 + drawn % 4],
            (true, false) | (false, true) => vec![drawn],
            (false, false) if in_turn => vec![drawn],
            (false, false) => Vec::new(),
        }
    }
}

/// The first violation in a story; how many cuts were judged.
async fn violation(seed: u64, plot: Plot, rounds: usize, effort: &Effort) -> (Option<String>, usize) {
    let base = made().await;
    let story = Story::run(seed, plot, &base, rounds).await;
    let mut count = 0;
    let said = |point: usize, fate: u64, what: String| {
        Some(format!(
            "KAGAMI_SEED={seed} {plot:?} point {point} of {}, fate {fate}: {what}",
            story.log.points()
        ))
    };
    for point in story.begun..=story.log.points() {
        for fate in effort.fates(&story, point, seed) {
            count += 1;
            if let Err(what) = judge(&story, story.log.cut(point, fate), point, effort, count).await {
                return (said(point, fate, what), count);
            }
            if count.is_multiple_of(effort.again)
                && let Err(what) = judge_recovery(&story, story.log.cut(point, fate), point, seed).await
            {
                return (said(point, fate, what), count);
            }
        }
    }
    (None, count)
}

/// As many seeds look at a story as its stride is long: together they look at every point.
const SEEDS: u64 = 2;

fn effort() -> Effort {
    match soak() {
        true => Effort { whole_cut: true, stride: 1, commits: 1, again: 7, thorough: 31 },
        false => Effort {
            whole_cut: true,
            stride: SEEDS as usize,
            commits: SEEDS as usize,
            again: 13,
            thorough: 67,
        },
    }
}

fn none_found(plot: Plot, many: u64) {
    let mut cuts = 0;
    for seed in seeds(SEEDS, many) {
        let (found, count) = simulated(seed, violation(seed, plot, 2, &effort()));
        assert!(found.is_none(), "{}", found.unwrap_or_default());
        cuts += count;
    }
    eprintln!("{plot:?}: {cuts} power cuts judged");
}

#[test]
fn r32_r34_crash_leaves_redo_logs_and_luns_of_two_pools_cut_together_or_not_at_all() {
    none_found(Plot::Mixed, 6);
}

#[test]
fn r34_crash_leaves_two_vms_on_redo_logs_together_or_not_at_all() {
    none_found(Plot::NoLuns, 4);
}

/// The proof of the proof: a planted fault turns the crash test red within the seeds that run by default.
fn must_find(fault: Fault, plot: Plot) {
    plant(Some(fault));
    let quick = Effort { whole_cut: false, stride: 5, commits: 2, again: 29, thorough: 67 };
    let looked = || (0..SEEDS).find_map(|seed| simulated(seed, violation(seed, plot, 1, &quick)).0);
    let found = looked();
    plant(None);
    let found = found.unwrap_or_else(|| panic!("{fault:?} is planted and no crash test sees it"));
    eprintln!("{fault:?}: {found}");
}

#[test]
fn crash_tests_see_a_vmx_that_is_rewritten_before_the_group_record() {
    must_find(Fault::VmxBeforeRecord, Plot::Mixed);
}

#[test]
fn crash_tests_see_a_redo_log_that_is_deleted_before_the_flip() {
    must_find(Fault::RedoDeletedBeforeFlip, Plot::Mixed);
}

#[test]
fn crash_tests_see_a_job_record_that_is_not_prepared() {
    must_find(Fault::JobNotPrepared, Plot::Mixed);
}

#[test]
fn crash_tests_see_a_pool_whose_leg_is_not_settled() {
    must_find(Fault::LegNotSettled, Plot::Mixed);
}

#[test]
fn crash_tests_see_redo_logs_that_no_job_record_names() {
    must_find(Fault::RedoBeforeJob, Plot::Mixed);
}
