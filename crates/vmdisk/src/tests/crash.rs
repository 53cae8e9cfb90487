//! A disk lives through a cut, a copy and a commit while it is written, and power fails at every operation. The
//! record J of the VM is one sector, as chapter 10 wants it.

use std::cell::Cell;

use block::MemoryDisk;
use block::crash::{CrashLog, Witness};

use super::store::STORE_SECTORS;
use super::*;
use crate::chain::mixed;
use crate::fault::{Fault, plant};
use crate::{recover_flip, recover_switch, remove_link};

const SECTORS: u64 = 1200;
const PREPARED: u8 = 1;
const FROZEN: u8 = 2;
const FLIPPED: u8 = 3;

async fn note(record: &dyn Disk, state: u8) {
    record.write(Sector(0), &Segments::new(&[state; UNIT]), Safe::OnReturn).await.unwrap();
}

struct Life {
    log: CrashLog,
    witness: Rc<Witness>,
    begun: usize,
    /// What the base held when it was frozen.
    image: Vec<u8>,
}

fn writer(witness: &Rc<Witness>, seed: u64, stop: &Rc<Cell<bool>>) -> lane::Task<()> {
    let (witness, stop) = (Rc::clone(witness), Rc::clone(stop));
    lane::spawn(async move {
        let mut random = fastrand::Rng::with_seed(seed);
        while !stop.get() {
            let at = random.u64(0..150) * 8;
            let bytes = vec![random.u8(1..); random.usize(1..4) * UNIT];
            let safe = if random.u8(0..8) == 0 { Safe::OnReturn } else { Safe::AtNextFlush };
            witness.write(Sector(at), &Segments::new(&bytes), safe).await.unwrap();
            if random.u8(0..4) == 0 {
                witness.flush().await.unwrap();
            }
        }
    })
}

async fn some_time(random: &mut fastrand::Rng, most: usize) {
    for _ in 0..random.usize(0..most) {
        lane::yield_now().await;
    }
}

async fn life(seed: u64) -> Life {
    let mut random = fastrand::Rng::with_seed(seed);
    let log = CrashLog::new(seed);
    let folder = Store::open(log.disk(STORE_SECTORS)).await;
    let record = log.disk(8);
    new_base(&folder, SECTORS).await;
    let disk = open(&folder, BASE).await;
    let witness = Witness::new(&log, Rc::clone(&disk) as Rc<dyn Disk>);
    witness.write(Sector(0), &Segments::new(&[0x99; 40 * UNIT]), Safe::AtNextFlush).await.unwrap();
    witness.flush().await.unwrap();
    let begun = log.points();
    log.interleave(2);
    let stop = Rc::new(Cell::new(false));
    let writers: Vec<_> = (0..2).map(|n| writer(&witness, seed * 9 + n, &stop)).collect();
    some_time(&mut random, 60).await;

    note(&*record, PREPARED).await;
    let prepared = disk.prepare_redo().await.unwrap();
    disk.gate().close();
    disk.gate().drained().await;
    let switched = prepared.switch();
    disk.gate().open();
    some_time(&mut random, 20).await;
    switched.settle().await.unwrap();
    note(&*record, FROZEN).await;
    let image = read(&*switched.frozen(), 0, SECTORS).await;
    switched.keep();
    some_time(&mut random, 80).await;

    let commit = disk.start_commit(0).await.unwrap();
    commit.copy(&mut |_| true).await.unwrap();
    some_time(&mut random, 10).await;
    let left = commit
        .flip(async || {
            note(&*record, FLIPPED).await;
            Ok(())
        })
        .await;
    // With the planted fault the files are gone before their time; the guest does not notice yet.
    left.unwrap().remove().await.unwrap();
    drop(commit);
    note(&*record, 0).await;
    some_time(&mut random, 40).await;
    stop.set(true);
    for task in writers {
        task.await;
    }
    Life { log, witness, begun, image }
}

/// What a start found and opened.
struct Found {
    folder: Rc<Store>,
    disk: Rc<VmDisk>,
    record: Rc<dyn Disk>,
}

impl Found {
    /// The commit begins again, to the end, with its record.
    async fn commit(&self) -> Result<(), crate::ChainError> {
        let commit = self.disk.start_commit(0).await?;
        commit.copy(&mut |_| true).await?;
        let decide = async || {
            note(&*self.record, FLIPPED).await;
            Ok(())
        };
        let left = commit.flip(decide).await?;
        drop(commit);
        left.remove().await?;
        note(&*self.record, 0).await;
        Ok(())
    }
}

fn in_memory(images: Vec<block::Image>) -> Vec<Rc<dyn Disk>> {
    images.into_iter().map(|i| Rc::new(MemoryDisk::from(i)) as Rc<dyn Disk>).collect()
}

/// Opens what a power loss left, as the VM's start would. Any error is a violation.
async fn recover(disks: Vec<Rc<dyn Disk>>, image: &[u8]) -> Result<Found, String> {
    let [disk, record] = <[Rc<dyn Disk>; 2]>::try_from(disks).map_err(|_| "not two disks")?;
    let folder = Store::open(disk).await;
    let state = read(&*record, 0, 1).await[0];
    let text = |e: crate::ChainError| e.to_string();
    let top = match state {
        PREPARED => {
            recover_switch(&*folder, CHILD, false).await.map_err(text)?;
            BASE
        }
        FROZEN => {
            recover_switch(&*folder, CHILD, true).await.map_err(text)?;
            recover_flip(&*folder, BASE, false).await.map_err(text)?;
            if mixed(&descriptor(&folder, BASE).await).is_none() {
                let base = folder.open("/d-flat.vmdk", true).await.map_err(|e| e.to_string())?;
                if read(&*base, 0, SECTORS).await != image {
                    return Err("I3: the base is not the image of the cut".into());
                }
            }
            CHILD
        }
        FLIPPED => {
            recover_flip(&*folder, BASE, true).await.map_err(text)?;
            remove_link(&*folder, CHILD).await.map_err(text)?;
            BASE
        }
        _ => BASE,
    };
    let disk = VmDisk::open(Rc::clone(&folder) as _, top, Open::WRITE, &()).await.map_err(text)?;
    Ok(Found { folder, disk, record })
}

/// What is found at a point is right, and stays right when the commit begins again.
async fn judge_found(life: &Life, found: &Found, point: usize) -> Result<(), String> {
    life.witness.judge(point, &*found.disk).await.map_err(|v| format!("{v:?}"))?;
    if found.disk.links().len() > 1 {
        found.commit().await.map_err(|e| e.to_string())?;
        let judged = life.witness.judge(point, &*found.disk).await;
        judged.map_err(|v| format!("after the second commit: {v:?}"))?;
    }
    match found.folder.paths().len() {
        2 => Ok(()),
        _ => Err(format!("left over: {:?}", found.folder.paths())),
    }
}

async fn judge(life: &Life, point: usize, fate: u64) -> Result<(), String> {
    let found = recover(in_memory(life.log.cut(point, fate)), &life.image).await?;
    judge_found(life, &found, point).await
}

/// Power fails again: while the VM is opened, or while the commit that began again goes on.
async fn judge_recovery(life: &Life, point: usize, fate: u64, step: usize) -> Result<(), String> {
    let log = CrashLog::new(fate);
    let images = life.log.cut(point, fate).into_iter();
    let found = recover(images.map(|i| log.disk_from(i) as Rc<dyn Disk>).collect(), &life.image).await?;
    if found.disk.links().len() > 1 {
        found.commit().await.map_err(|e| e.to_string())?;
    }
    drop(found);
    for again in points(0, log.points(), step, fate + point as u64) {
        let judged = async {
            let found = recover(in_memory(log.cut(again, fate + again as u64)), &life.image).await?;
            judge_found(life, &found, point).await
        };
        judged.await.map_err(|e| format!("recovery cut at {again} of {}: {e}", log.points()))?;
    }
    Ok(())
}

/// How hard a life is looked at.
struct Effort {
    /// Shapes of each power loss.
    fates: u64,
    /// Every so many points recovery is cut too, with each seed at others.
    again: usize,
    /// And there at every so many points.
    step: usize,
}

async fn violations(seed: u64, effort: &Effort) -> Vec<String> {
    let life = life(seed).await;
    let mut out = Vec::new();
    for point in life.begun..=life.log.points() {
        for fate in seed % 3..seed % 3 + effort.fates {
            if let Err(what) = judge(&life, point, fate).await {
                out.push(format!("KAGAMI_SEED={seed} point {point} fate {fate}: {what}"));
            }
        }
    }
    for point in points(life.begun, life.log.points(), effort.again, seed) {
        let fate = (seed + point as u64) % 5;
        if let Err(what) = judge_recovery(&life, point, fate, effort.step).await {
            out.push(format!("KAGAMI_SEED={seed} point {point} fate {fate}: {what}"));
        }
    }
    out
}

#[test]
fn i1_to_i5_power_may_fail_at_every_operation_of_cut_and_commit_and_again_during_recovery() {
    lane::block_on(async {
        let effort = Effort { fates: if soak() { 5 } else { 2 }, again: 3, step: 17 };
        for seed in seeds(3, 100) {
            let found = violations(seed, &effort).await;
            assert!(found.is_empty(), "{} violations, first: {}", found.len(), found[0]);
        }
    });
}

#[test]
fn i5_a_redo_log_deleted_before_the_flip_is_found_out() {
    lane::block_on(async {
        plant(Some(Fault::RedoDeletedBeforeFlip));
        let found = violations(0, &Effort { fates: 1, again: usize::MAX, step: 1 }).await;
        plant(None);
        assert!(!found.is_empty(), "the crash test is blind");
    });
}
