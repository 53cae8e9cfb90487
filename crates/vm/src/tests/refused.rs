//! A medium refuses in the middle of a cut: a write, or a flush, and whatever comes after it. Whoever was told that
//! something is durable keeps it, nobody is left waiting, and the cut is there for all members or for none.

use std::cell::Cell;
use std::rc::Rc;

use block::crash::{CrashLog, Witness};
use block::decorate::{Decorated, Operation, Passing};
use block::{Disk, DiskError, Image, Io, MemoryDisk, Safe, Sector, Segments};

use super::story::{Plot, wanted};
use super::world::{World, content, made};
use super::{seeds, simulated, soak};
use crate::cut::{self, CutError};
use crate::vmsnap;

/// What of the medium refuses, and for how long.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Refusal {
    /// One operation, and all is well again.
    Once,
    /// Everything from there on, until it is mended.
    Lasting,
}

/// Stands before a medium.
#[derive(Default)]
struct Medium {
    /// Operations that change something and go through before the one that is refused.
    left: Cell<Option<u64>>,
    lasting: Cell<bool>,
    /// The cut is over.
    over: Cell<bool>,
}

impl Passing for Medium {
    fn before(&self, operation: Operation, _at: Sector, _count: u64) -> Io<'_> {
        let refused = operation != Operation::Read
            && match self.left.get() {
                None => false,
                Some(0) => {
                    if !self.lasting.get() {
                        self.left.set(None);
                    }
                    true
                }
                Some(more) => {
                    self.left.set(Some(more - 1));
                    false
                }
            };
        let answer = match refused {
            true => Err(DiskError::from(std::io::Error::other("the medium refuses"))),
            false => Ok(()),
        };
        Box::pin(std::future::ready(answer))
    }
}

/// One cut with one refusal.
#[derive(Copy, Clone, Debug)]
struct Case {
    seed: u64,
    plot: Plot,
    /// The pool without the datastore decides, so that the VMs' own records outlive what refuses.
    decider_elsewhere: bool,
    medium: usize,
    nth: u64,
    refusal: Refusal,
    /// Mended, the session goes on; else power fails at once.
    goes_on: bool,
}

#[derive(Default, Debug)]
struct Seen {
    cut: u32,
    given_up: u32,
    in_doubt: u32,
    /// A cut in doubt whose VMs stayed on their redo logs by their own word.
    stayed: u32,
    refused_flushes: u32,
}

/// Writes and flushes until it is stopped; what is refused is refused.
fn writer(witness: &Rc<Witness>, seed: u64, stop: &Rc<Cell<bool>>) -> lane::Task<()> {
    let (witness, stop) = (Rc::clone(witness), Rc::clone(stop));
    let mut random = fastrand::Rng::with_seed(seed);
    lane::spawn(async move {
        while !stop.get() {
            let (at, byte) = (Sector(random.u64(0..2000)), random.u8(1..));
            let safe = if random.u8(0..6) == 0 { Safe::OnReturn } else { Safe::AtNextFlush };
            let _ = witness.write(at, &Segments::new(&[byte; 1024]), safe).await;
            if random.u8(0..3) == 0 {
                let _ = witness.flush().await;
            }
            for _ in 0..random.usize(0..200) {
                lane::yield_now().await;
            }
        }
    })
}

fn in_memory(images: Vec<Image>) -> Vec<Rc<dyn Disk>> {
    images.into_iter().map(|i| Rc::new(MemoryDisk::from(i)) as Rc<dyn Disk>).collect()
}

/// Every LUN has the snapshot, or none has.
fn all_or_none(world: &World) -> Result<bool, String> {
    let has = |lun: &Rc<array::Lun>| lun.snapshots().iter().any(|s| s.name == "s");
    let there: Vec<bool> = world.luns().iter().map(has).collect();
    if there.iter().any(|t| *t != there[0]) {
        return Err(format!("R34: in some pools only: {there:?}"));
    }
    Ok(there[0])
}

async fn judge_disks(world: &World, witnesses: &[Rc<Witness>], point: usize) -> Result<(), String> {
    for (disk, witness) in world.disks().iter().zip(witnesses) {
        let judged = witness.judge(point, &*disk.disk).await;
        judged.map_err(|v| format!("I2, {}: {v:?}", disk.path))?;
    }
    Ok(())
}

/// Answers how many operations had changed the medium when the redo logs took over, and when the cut was over.
async fn run(case: Case, base: &[Image], seen: &mut Seen) -> Result<(u64, u64), String> {
    let log = CrashLog::new(case.seed);
    let media: Vec<Rc<Decorated<Medium>>> =
        base.iter().map(|i| Decorated::new(log.disk_from(i.clone()), Medium::default())).collect();
    let world = World::open(media.iter().map(|m| Rc::clone(m) as Rc<dyn Disk>).collect()).await?;
    log.interleave(1);
    let witnesses: Vec<_> =
        world.disks().into_iter().map(|d| Witness::new(&log, d.disk as Rc<dyn Disk>)).collect();
    for (number, witness) in witnesses.iter().enumerate() {
        let bytes = [number as u8 + 1; 4096];
        witness
            .write(Sector(2010), &Segments::new(&bytes), Safe::AtNextFlush)
            .await
            .map_err(|e| e.to_string())?;
        witness.flush().await.map_err(|e| e.to_string())?;
    }
    let stop = Rc::new(Cell::new(false));
    let writers: Vec<_> = (0..).zip(&witnesses).map(|(n, w)| writer(w, case.seed * 9 + n, &stop)).collect();
    let mut wanted = wanted(&world, case.plot, "s", 1);
    if case.decider_elsewhere {
        wanted.luns.reverse();
    }
    media[case.medium].passing.lasting.set(case.refusal == Refusal::Lasting);
    media[case.medium].passing.left.set(Some(case.nth));
    let (top, below) = (Rc::clone(&world.flat()[0].disk), Rc::clone(&media[case.medium]));
    let switching = lane::spawn(async move {
        while top.links().len() == 1 && Rc::strong_count(&top) > 1 && !below.passing.over.get() {
            lane::yield_now().await;
        }
        below.passing.left.get()
    });
    let answer = cut::cut(&wanted).await;
    let all = case.nth - media[case.medium].passing.left.get().unwrap_or(0);
    media[case.medium].passing.over.set(true);
    let switched = case.nth - switching.await.unwrap_or(0);
    drop(wanted);
    match &answer {
        Ok(_) => seen.cut += 1,
        Err(CutError::InDoubt { .. }) => seen.in_doubt += 1,
        Err(_) => seen.given_up += 1,
    }
    let is_in_doubt = matches!(answer, Err(CutError::InDoubt { .. }));
    drop(answer);
    // Nobody is left waiting (I8), whatever the answer is.
    for witness in &witnesses {
        let _ = witness.write(Sector(2020), &Segments::new(&[0x77; 512]), Safe::AtNextFlush).await;
        if witness.flush().await.is_err() {
            seen.refused_flushes += 1;
        }
    }
    stop.set(true);
    for writer in writers {
        writer.await;
    }
    if is_in_doubt {
        let on_redo = world.flat().iter().all(|d| d.disk.links().len() > 1);
        let promises = world.flat().iter().all(|d| !d.disk.is_undecided());
        seen.stayed += u32::from(on_redo && promises);
        if !on_redo {
            return Err("in doubt, and not on the redo logs".into());
        }
    }
    media[case.medium].passing.left.set(None);
    if case.goes_on {
        for vm in &world.vms {
            // A halted pool refuses until it is opened again; what can be brought to an end is.
            let _ = vmsnap::consolidate(vm, &mut |_| ()).await;
        }
        for witness in &witnesses {
            let _ = witness.write(Sector(2021), &Segments::new(&[0x78; 512]), Safe::AtNextFlush).await;
            let _ = witness.flush().await;
        }
    }
    let point = log.points();
    drop(world);
    let found = World::open(in_memory(log.cut(point, case.seed % 6))).await?;
    if let Some(path) = found.set_aside.first() {
        return Err(format!("{path} was not ours by any record"));
    }
    all_or_none(&found)?;
    judge_disks(&found, &witnesses, point).await?;
    found.consolidate().await?;
    judge_disks(&found, &witnesses, point).await.map_err(|e| format!("I4: after the commit: {e}"))?;
    for disk in found.flat() {
        content(&*disk.disk).await?;
    }
    match found.differing_files().await.first() {
        Some(left) => Err(format!("I5: {left}")),
        None => Ok((switched, all)),
    }
}

/// More operations than any run has.
const NEVER: u64 = 1 << 32;

/// Operations of a cut are refused, one in each run, on each medium: here and there before the redo logs take over, each
/// afterwards, as the record that decides is among those.
fn every_operation(plot: Plot, decider_elsewhere: bool) -> Seen {
    let mut seen = Seen::default();
    for seed in seeds(1, 4) {
        let base = simulated(seed, made());
        for medium in 0..2 {
            let refusal = Refusal::Once;
            let case = Case { seed, plot, decider_elsewhere, medium, nth: NEVER, refusal, goes_on: false };
            // A run is the same until something is refused.
            let undisturbed = simulated(seed, run(case, &base, &mut Seen::default()));
            let (switched, all) =
                undisturbed.unwrap_or_else(|what| panic!("KAGAMI_SEED={seed} {case:?}: {what}"));
            eprintln!("{plot:?}, medium {medium}: {switched} operations before the switch, {all} in all");
            // The look at the switch comes a little late.
            let near = switched.saturating_sub(24);
            for refusal in [Refusal::Once, Refusal::Lasting] {
                for nth in 0..all {
                    if !soak() && nth < near && !(nth + seed).is_multiple_of(23) {
                        continue;
                    }
                    let case = Case { nth, refusal, goes_on: (nth + seed).is_multiple_of(2), ..case };
                    if let Err(what) = simulated(seed, run(case, &base, &mut seen)) {
                        panic!("KAGAMI_SEED={seed} {case:?}: {what}");
                    }
                }
            }
        }
    }
    eprintln!("{plot:?}, decider elsewhere {decider_elsewhere}: {seen:?}");
    seen
}

#[test]
fn r34_crash_after_a_medium_refused_in_a_cut_leaves_it_to_all_members_or_to_none() {
    let seen = every_operation(Plot::Mixed, false);
    assert!(seen.cut > 0 && seen.given_up > 0 && seen.in_doubt > 0, "{seen:?}");
}

#[test]
fn crash_after_the_deciding_pool_refused_its_record_finds_vms_on_their_redo_logs() {
    let seen = every_operation(Plot::Mixed, true);
    assert!(seen.stayed > 0, "{seen:?}");
}

#[test]
fn r34_i8_crash_after_a_job_record_could_not_be_written_breaks_no_promise() {
    let seen = every_operation(Plot::NoLuns, false);
    assert!(seen.in_doubt > 0 && seen.refused_flushes > 0, "{seen:?}");
}
