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

/// Opens what a power loss left, as the VM's start would. Any error is a violation.
async fn recover(images: Vec<block::Image>, image: &[u8]) -> Result<(Rc<Store>, Rc<VmDisk>), String> {
    let mut images = images.into_iter().map(|i| Rc::new(MemoryDisk::from(i)));
    let (Some(disk), Some(record)) = (images.next(), images.next()) else { return Err("no images".into()) };
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
    Ok((folder, disk))
}

/// The first violation at a point, if there is one.
async fn judge(life: &Life, point: usize, seed: u64) -> Option<String> {
    let (folder, disk) = match recover(life.log.cut(point, seed), &life.image).await {
        Ok(opened) => opened,
        Err(error) => return Some(error),
    };
    if let Err(violation) = life.witness.judge(point, &*disk).await {
        return Some(format!("{violation:?}"));
    }
    if disk.links().len() == 1 {
        return (folder.paths().len() != 2).then(|| format!("left over: {:?}", folder.paths()));
    }
    // The commit begins again, to the end.
    let again = async {
        let commit = disk.start_commit(0).await?;
        commit.copy(&mut |_| true).await?;
        commit.flip(async || Ok(())).await?.remove().await
    };
    if let Err(error) = again.await {
        return Some(error.to_string());
    }
    life.witness.judge(point, &*disk).await.err().map(|v| format!("after the second commit: {v:?}"))
}

async fn violations(seed: u64, cuts: u64) -> Vec<String> {
    let life = life(seed).await;
    let mut out = Vec::new();
    for point in life.begun..=life.log.points() {
        for cut in 0..cuts {
            if let Some(what) = judge(&life, point, cut + seed % 3).await {
                out.push(format!("KAGAMI_SEED={seed} point {point} cut {}: {what}", cut + seed % 3));
            }
        }
    }
    out
}

#[test]
fn i1_to_i5_power_may_fail_at_every_operation_of_cut_and_commit() {
    lane::block_on(async {
        let soak = std::env::var_os("KAGAMI_SOAK").is_some();
        let seeds = match std::env::var("KAGAMI_SEED").ok().and_then(|s| s.parse().ok()) {
            Some(one) => one..one + 1,
            None => 0..if soak { 100 } else { 3 },
        };
        for seed in seeds {
            let found = violations(seed, if soak { 5 } else { 2 }).await;
            assert!(found.is_empty(), "{} violations, first: {}", found.len(), found[0]);
        }
    });
}

#[test]
fn i5_a_redo_log_deleted_before_the_flip_is_found_out() {
    lane::block_on(async {
        plant(Some(Fault::RedoDeletedBeforeFlip));
        let found = violations(0, 1).await;
        plant(None);
        assert!(!found.is_empty(), "the crash test is blind");
    });
}
