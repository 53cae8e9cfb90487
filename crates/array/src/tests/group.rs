//! Cuts over several LUNs, in one pool and in two: all or none, and a prefix of what was written.

use std::cell::Cell;
use std::rc::Rc;

use block::crash::{CrashLog, Witness};
use block::{Disk, Image, Safe, Sector, Segments, SegmentsMut};
use uuid::Uuid;

use super::judge::{Era, Frozen, Lives, LunLife, SnapshotLife, Span, judge};
use super::story::garbage;
use super::{content, dynamic, seeds, soak};
use crate::{Decider, Lun, NewLun, NewPool, Options, Pool};

/// Sectors of each LUN that the numbered writes go to, one after the other.
const LANE: u64 = 64;

pub(crate) struct GroupStory {
    log: CrashLog,
    pools: Vec<Rc<Pool>>,
    luns: Vec<(usize, Rc<Lun>, Rc<Witness>)>,
    lives: Lives,
    made: usize,
}

/// Reads the numbers of one member: the highest written to it.
fn highest(image: &Image) -> u64 {
    let read = |sector: u64| {
        let mut bytes = [0; 512];
        image.pages.read(sector * 512, &SegmentsMut::new(&mut bytes));
        u64::from_le_bytes(bytes[..8].try_into().unwrap())
    };
    (0..LANE).map(read).max().unwrap_or(0)
}

/// The images of all members hold a prefix of 1, 2, 3, ...: number n went to member n % members.
fn prefix(images: &[&Image]) -> Result<(), String> {
    let tops: Vec<u64> = images.iter().map(|i| highest(i)).collect();
    let last = tops.iter().copied().max().unwrap_or(0);
    for (member, top) in tops.iter().enumerate() {
        // The highest number up to `last` that went to this member.
        let count = images.len() as u64;
        let due = (0..=last).rev().find(|n| n % count == member as u64).unwrap_or(0);
        if *top != due {
            return Err(format!("no prefix: member {member} ends at {top}, the group at {last}"));
        }
    }
    Ok(())
}

impl GroupStory {
    pub(crate) async fn run(seed: u64, pools: usize, cuts: usize) -> Rc<Self> {
        let log = CrashLog::new(seed);
        log.interleave(3);
        let mut made_pools = Vec::new();
        for _ in 0..pools {
            let new = NewPool { name: "p".into(), uuid: Uuid::from_u128(1 + made_pools.len() as u128) };
            made_pools.push(Pool::create(garbage(&log, 1), new, Options::default()).await.unwrap());
        }
        let (mut luns, lives) = (Vec::new(), Lives::default());
        for number in 0..3usize {
            let (pool, begin) = (number % pools, log.points());
            let name = format!("lun{number}");
            let lun = made_pools[pool].create_lun(NewLun::new(&name, 8192)).await.unwrap();
            let witness = Witness::new(&log, dynamic(&lun));
            let since = Span { begin, end: log.points() };
            let era = Era { since, witness: Rc::clone(&witness) };
            lives.luns.borrow_mut().push(LunLife::new(&name, era, 8192));
            luns.push((pool, lun, witness));
        }
        let made = log.points();
        let story = Rc::new(Self { log, pools: made_pools, luns, lives, made });
        story.play(seed, cuts).await;
        story
    }

    async fn play(self: &Rc<Self>, seed: u64, cuts: usize) {
        let stop = Rc::new(Cell::new(false));
        let numbers = {
            let (story, stop) = (Rc::clone(self), Rc::clone(&stop));
            lane::spawn(async move { story.numbers(seed, &stop).await })
        };
        let mut random = fastrand::Rng::with_seed(seed);
        for cut in 0..cuts {
            for _ in 0..random.u32(0..200) {
                lane::yield_now().await;
            }
            self.cut(cut as u64).await;
        }
        stop.set(true);
        numbers.await;
    }

    /// Writes 1, 2, 3, ..., each to the next LUN, each after the answer to the one before; flushes now and then.
    async fn numbers(&self, seed: u64, stop: &Cell<bool>) {
        let mut random = fastrand::Rng::with_seed(seed + 77);
        let mut number = 0u64;
        while !stop.get() {
            number += 1;
            let (_, _, witness) = &self.luns[number as usize % self.luns.len()];
            let mut bytes = [0x5a; 512];
            bytes[..8].copy_from_slice(&number.to_le_bytes());
            let at = Sector(number / self.luns.len() as u64 % LANE);
            witness.write(at, &Segments::new(&bytes), Safe::AtNextFlush).await.unwrap();
            if random.u8(..) < 40 {
                witness.flush().await.unwrap();
            }
        }
    }

    /// Chapter 10's procedure.
    async fn cut(&self, number: u64) {
        let group = Uuid::from_u128(u128::from(number) + 1);
        let begin = self.log.points();
        let decider = self.pools[0].uuid();
        let mut prepared = Vec::new();
        for (index, pool) in self.pools.iter().enumerate() {
            let members: Vec<(Rc<Lun>, String)> = self
                .luns
                .iter()
                .filter(|(p, ..)| *p == index)
                .map(|(_, lun, _)| (Rc::clone(lun), format!("group{number}")))
                .collect();
            prepared.push(pool.prepare_cut(group, Decider::Pool(decider), &members).await.unwrap());
        }
        self.luns.iter().for_each(|(_, lun, _)| lun.gate().close());
        for (_, lun, _) in &self.luns {
            lun.gate().drained().await;
        }
        prepared.iter().for_each(|p| p.cut());
        self.luns.iter().for_each(|(_, lun, _)| lun.gate().open());
        for leg in &prepared {
            leg.settle().await.unwrap();
        }
        self.pools[0].write_group_record(group).await.unwrap();
        let end = self.log.points();
        for leg in prepared {
            leg.commit().await.unwrap();
        }
        let mut images = Vec::new();
        for (_, lun, _) in &self.luns {
            let snapshot = lun.open_snapshot(&format!("group{number}")).unwrap();
            let image = content(&*snapshot).await.unwrap();
            images.push(image.clone());
            self.lives.snapshots.borrow_mut().push(SnapshotLife {
                lun: lun.name(),
                name: format!("group{number}"),
                born: Span { begin, end },
                gone: None,
                frozen: Frozen { generation: snapshot.generation(), image },
                group: Some(number),
            });
        }
        prefix(&images.iter().collect::<Vec<_>>()).unwrap();
    }

    /// Power fails at `point`: opens all pools, lets the decider's record decide, judges.
    async fn survives(&self, point: usize, fate: u64) -> Result<(), String> {
        let media = self.log.cut(point, fate).into_iter().map(|i| Rc::new(block::MemoryDisk::from(i)));
        let pools = recover(media.map(|d| d as Rc<dyn Disk>)).await?;
        self.holds(&pools, point).await
    }

    /// Power fails at `point`, and again at every point of the recovery from that. True: the second loss met a cut that
    /// was in doubt.
    async fn survives_again(&self, point: usize, fate: u64) -> Result<bool, String> {
        let second = CrashLog::new(fate);
        second.interleave(2);
        let media: Vec<Rc<dyn Disk>> =
            self.log.cut(point, fate).into_iter().map(|i| dynamic(&second.disk_from(i))).collect();
        let pools = recover(media.into_iter()).await?;
        for pool in &pools {
            pool.tidy().await.map_err(|e| format!("tidy after recovery: {e}"))?;
            pool.settle().await.map_err(|e| e.to_string())?;
        }
        let mut doubts = false;
        for cut in 0..=second.points() {
            let media = second.cut(cut, fate + 1).into_iter().map(|i| Rc::new(block::MemoryDisk::from(i)));
            let media: Vec<Rc<dyn Disk>> = media.map(|d| d as Rc<dyn Disk>).collect();
            let failed = |e: String| format!("second cut {cut}: {e}");
            let (pools, doubt) = recover_and_tell(media.into_iter()).await.map_err(failed)?;
            doubts |= doubt;
            self.holds(&pools, point).await.map_err(failed)?;
        }
        Ok(doubts)
    }

    /// Everything that was promised before `point` is there.
    async fn holds(&self, pools: &[Rc<Pool>], point: usize) -> Result<(), String> {
        judge(pools, &self.lives, point).await?;
        for pool in pools {
            let report = pool.check().await.map_err(|e| e.to_string())?;
            if let Some(finding) = report.faults().next() {
                return Err(format!("check: {finding}"));
            }
        }
        Ok(())
    }
}

/// Opens all pools, and ends what is in doubt as the decider's record says.
async fn recover(media: impl Iterator<Item = Rc<dyn Disk>>) -> Result<Vec<Rc<Pool>>, String> {
    recover_and_tell(media).await.map(|(pools, _)| pools)
}

/// The same, and whether something was in doubt.
async fn recover_and_tell(
    media: impl Iterator<Item = Rc<dyn Disk>>,
) -> Result<(Vec<Rc<Pool>>, bool), String> {
    let (mut pools, mut doubts) = (Vec::new(), false);
    for medium in media {
        let pool = Pool::open(vec![medium], Options::default()).await;
        pools.push(pool.map_err(|e| format!("does not open: {e}"))?);
    }
    for pool in &pools {
        for doubt in pool.in_doubt() {
            doubts = true;
            let happened = pools[0].group_decided(doubt.group);
            pool.resolve(doubt.group, happened).await.map_err(|e| format!("resolve: {e}"))?;
        }
    }
    Ok((pools, doubts))
}

/// The first violation over all points.
pub(crate) async fn violation(seed: u64, pools: usize, cuts: usize, fates: u64) -> Option<String> {
    let story = GroupStory::run(seed, pools, cuts).await;
    for point in story.made..=story.log.points() {
        for fate in 0..fates {
            if let Err(what) = story.survives(point, fate).await {
                super::crash::keep(&story.log, &format!("array-group{pools}-seed{seed}"), point);
                return Some(format!("KAGAMI_SEED={seed} pools {pools} point {point} fate {fate}: {what}"));
            }
        }
    }
    None
}

#[test]
fn r34_crash_leaves_a_group_whole_or_absent_in_one_pool() {
    lane::block_on(async {
        for seed in seeds(4, 200) {
            let found = violation(seed, 1, 4, if soak() { 2 } else { 3 }).await;
            assert!(found.is_none(), "{}", found.unwrap_or_default());
        }
    });
}

#[test]
fn r34_crash_leaves_a_group_whole_or_absent_over_two_pools() {
    lane::block_on(async {
        for seed in seeds(4, 200) {
            let found = violation(seed, 2, 4, if soak() { 2 } else { 3 }).await;
            assert!(found.is_none(), "{}", found.unwrap_or_default());
        }
    });
}

/// Power fails, and again at every point of the recovery: while pools open, while what is in doubt is resolved, while
/// the layers of a cut that did not happen merge away.
#[test]
fn r34_crash_again_during_the_recovery_of_a_group() {
    lane::block_on(async {
        let mut doubts = 0;
        for seed in seeds(4, 40) {
            let pools = 1 + seed as usize % 2;
            let story = GroupStory::run(seed, pools, 2).await;
            // By default some points, others with each seed.
            let (first, stride) = if soak() { (0, 1) } else { (seed as usize * 3, 17) };
            for point in (story.made + first..=story.log.points()).step_by(stride) {
                match story.survives_again(point, 2 + (seed + point as u64) % 5).await {
                    Ok(doubt) => doubts += u64::from(doubt),
                    Err(what) => {
                        super::crash::keep(&story.log, &format!("array-group-again-seed{seed}"), point);
                        panic!("KAGAMI_SEED={seed} pools {pools} point {point}: {what}");
                    }
                }
            }
        }
        assert!(doubts > 0 || std::env::var_os("KAGAMI_SEED").is_some(), "no cut was in doubt");
    });
}
