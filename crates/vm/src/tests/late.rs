//! A member that is not still in time: the gates open at the deadline, the cut is given up with its name, and nothing of
//! it is left.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use array::Lun;
use block::decorate::{Decorated, Operation, Passing};
use block::{Disk, Gate, Io, MemoryDisk, Safe, Sector, Segments};
use lane::sync::Waiters;
use uuid::Uuid;

use super::simulated;
use super::story::{Plot, wanted};
use super::world::{SECTORS, World, made};
use crate::cut::{self, BUDGET, CutError, Wanted};

/// A medium that is slow when it is told to be.
#[derive(Default)]
struct Slow {
    /// The next write is kept.
    keep: Cell<bool>,
    kept: Cell<bool>,
    let_through: Cell<bool>,
    changed: Waiters,
    /// While this gate is closed a flush takes a second.
    gate: RefCell<Option<Rc<Gate>>>,
}

impl Slow {
    /// Keeps the next write.
    fn keep_next(&self) {
        self.let_through.set(false);
        self.keep.set(true);
    }

    async fn keeps_one(&self) {
        while !self.kept.get() {
            lane::yield_now().await;
        }
    }

    fn let_through(&self) {
        self.let_through.set(true);
        self.changed.wake_all();
    }
}

impl Passing for Slow {
    fn before(&self, operation: Operation, _at: Sector, _count: u64) -> Io<'_> {
        Box::pin(async move {
            // Others get their turn in the middle of everything.
            lane::yield_now().await;
            if operation == Operation::Write && self.keep.take() {
                self.kept.set(true);
                self.changed.until(|| self.let_through.get().then_some(())).await;
                self.kept.set(false);
            }
            if operation == Operation::Flush && self.gate.borrow().as_ref().is_some_and(|g| g.is_closed()) {
                lane::sleep(Duration::from_secs(1)).await;
            }
            Ok(())
        })
    }
}

async fn slow_world() -> (World, Vec<Rc<Decorated<Slow>>>) {
    let media: Vec<_> = made()
        .await
        .into_iter()
        .map(|image| Decorated::new(Rc::new(MemoryDisk::from(image)), Slow::default()))
        .collect();
    let world = World::open(media.iter().map(|m| Rc::clone(m) as Rc<dyn Disk>).collect()).await.unwrap();
    (world, media)
}

async fn write(disk: &dyn Disk, at: u64, byte: u8) {
    disk.write(Sector(at), &Segments::new(&[byte; 4096]), Safe::AtNextFlush).await.unwrap();
}

/// A guest that writes one block after the other, without a pause until it was held; the longest that one of its writes
/// took.
fn guest(disk: Rc<dyn Disk>, stop: &Rc<Cell<bool>>) -> lane::Task<Duration> {
    let stop = Rc::clone(stop);
    lane::spawn(async move {
        let (mut longest, mut number) = (Duration::ZERO, 0);
        while !stop.get() {
            let begun = lane::now();
            write(&*disk, number % (SECTORS / 8) * 8, number as u8 | 1).await;
            longest = longest.max(lane::now() - begun);
            number += 1;
            match longest > BUDGET / 2 {
                true => lane::sleep(Duration::from_millis(1)).await,
                false => lane::yield_now().await,
            }
        }
        longest
    })
}

fn gates(world: &World) -> Vec<Rc<Gate>> {
    let disks = world.disks().into_iter().map(|d| Rc::clone(d.disk.gate()));
    let store = world.around.datastore.lun.gate();
    disks.chain(world.luns().iter().map(|lun| lun.gate())).chain([store]).collect()
}

async fn assert_nothing_is_left(world: &World) {
    assert!(gates(world).iter().all(|gate| !gate.is_closed()), "I8: a gate is closed");
    assert!(world.differing_files().await.is_empty(), "{:?}", world.differing_files().await);
    let luns = world.luns().into_iter().chain([Rc::clone(&world.around.datastore.lun)]);
    for lun in luns {
        assert!(lun.snapshots().is_empty(), "{}", lun.name());
    }
    for pool in &world.around.pools {
        assert!(pool.in_doubt().is_empty());
        let report = pool.check().await.unwrap();
        assert!(report.faults().next().is_none(), "{:?}", report.faults().next().map(|f| f.to_string()));
    }
    assert!(world.flat().iter().all(|d| d.disk.links().len() == 1 && !d.disk.is_undecided()));
}

/// Which member has a write under way that does not end.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Late {
    Vmfs,
    Mapping,
    Lun,
}

async fn given_up(late: Late) {
    let (world, media) = slow_world().await;
    let (disk, medium, name): (Rc<dyn Disk>, usize, &str) = match late {
        Late::Vmfs => (Rc::clone(&world.flat()[0].disk) as _, 0, "/a/a.vmdk"),
        Late::Mapping => (Rc::clone(&world.disks()[3].disk) as _, 1, "/a/a_3.vmdk"),
        // Whoever writes to a LUN past its VM: a host that has it by itself.
        Late::Lun => (Rc::clone(&world.luns()[1]) as Rc<Lun> as _, 1, "d1"),
    };
    // The second write of a block is one operation of the medium.
    write(&*disk, 0, 1).await;
    disk.flush().await.unwrap();
    media[medium].passing.keep_next();
    let writing = lane::spawn(async move { write(&*disk, 0, 2).await });
    media[medium].passing.keeps_one().await;
    let stop = Rc::new(Cell::new(false));
    let other = guest(Rc::clone(&world.vms[1].disks()[0].disk) as _, &stop);
    let answer = cut::cut(&wanted(&world, Plot::Mixed, "s", 1)).await;
    match answer.err() {
        Some(CutError::Late { member }) => assert_eq!(member, name),
        other => panic!("{late:?}: {other:?}"),
    }
    stop.set(true);
    let longest = other.await;
    assert!(longest >= BUDGET && longest < BUDGET + BUDGET / 10, "{late:?}: held for {longest:?}");
    assert_nothing_is_left(&world).await;
    media[medium].passing.let_through();
    writing.await;
    let cut = cut::cut(&wanted(&world, Plot::Mixed, "s", 2)).await.unwrap();
    assert!(cut.hold < BUDGET);
    for vmsnap in cut.vms {
        vmsnap.commit(&mut |_| ()).await.unwrap();
    }
    assert!(world.differing_files().await.is_empty());
}

#[test]
fn r32_i8_a_member_that_is_not_still_in_time_is_named_and_nothing_is_left() {
    for late in [Late::Vmfs, Late::Mapping, Late::Lun] {
        simulated(1, given_up(late));
    }
}

/// A cut below the datastore, which must settle while the gates above it are closed.
fn below(world: &World) -> Wanted {
    Wanted {
        group: Uuid::from_u128(7),
        snapshot: "below".to_owned(),
        luns: vec![Rc::clone(&world.around.datastore.lun)],
        above: world.flat().into_iter().map(|d| d.disk).collect(),
        datastores: vec![Rc::clone(&world.around.datastore)],
        vms: Vec::new(),
    }
}

#[test]
fn r32_i8_a_datastore_that_settles_too_long_is_named_and_the_gates_are_open_meanwhile() {
    simulated(2, async {
        let (world, media) = slow_world().await;
        *media[0].passing.gate.borrow_mut() = Some(Rc::clone(world.flat()[0].disk.gate()));
        let stop = Rc::new(Cell::new(false));
        // They write all the while, so there is something to settle when the gates have closed.
        let guests: Vec<_> = world.flat().into_iter().map(|d| guest(d.disk as _, &stop)).collect();
        lane::sleep(Duration::from_millis(2)).await;
        let begun = lane::now();
        match cut::cut(&below(&world)).await.err() {
            Some(CutError::Late { member }) => assert_eq!(member, "datastore ds"),
            other => panic!("{other:?}"),
        }
        assert!(lane::now() - begun >= Duration::from_secs(1), "what settles goes on to its end");
        stop.set(true);
        for guest in guests {
            let longest = guest.await;
            assert!(longest >= BUDGET && longest < BUDGET + BUDGET / 10, "held for {longest:?}");
        }
        assert_nothing_is_left(&world).await;
        media[0].passing.gate.take();
        assert!(cut::cut(&below(&world)).await.unwrap().hold < BUDGET);
        assert_eq!(world.around.datastore.lun.snapshots().len(), 1);
    });
}

#[test]
fn r32_i8_a_redo_log_that_settles_too_long_is_named() {
    simulated(3, async {
        let (world, media) = slow_world().await;
        let cut = cut::cut(&wanted(&world, Plot::NoLuns, "s", 1)).await.unwrap();
        write(&*world.flat()[0].disk, 0, 5).await;
        *media[0].passing.gate.borrow_mut() = Some(Rc::clone(world.flat()[0].disk.gate()));
        match cut::cut(&below(&world)).await.err() {
            Some(CutError::Late { member }) => assert_eq!(member, "/a/a-000001.vmdk"),
            other => panic!("{other:?}"),
        }
        assert!(gates(&world).iter().all(|gate| !gate.is_closed()));
        assert!(world.around.datastore.lun.snapshots().is_empty());
        media[0].passing.gate.take();
        for vmsnap in cut.vms {
            vmsnap.commit(&mut |_| ()).await.unwrap();
        }
        assert_nothing_is_left(&world).await;
    });
}
