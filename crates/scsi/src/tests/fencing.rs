//! Fencing against what is under way: nothing of the fenced nexus lands afterwards, and nobody waits for ever.

use std::cell::{Cell, RefCell};

use block::decorate::{Decorated, Hold, Operation, Record};
use block::{DiskError, Extents, Generation, Io, Safe, Sector, Shape};

use super::admission::{keys, prout};
use super::copying::{copy, list, second_over, segment, target_of};
use super::*;
use crate::{Command, Function, Response};

/// A disk whose writes wait until they are let through, and what was written to it, in order.
struct Slow {
    held: Rc<Decorated<Hold>>,
    written: Rc<Decorated<Record>>,
}

impl Slow {
    fn new() -> Self {
        let written = Decorated::new(Rc::new(MemoryDisk::new(BLOCKS)), Record::default());
        let held = Hold::new(|operation| operation == Operation::Write);
        Self { held: Decorated::new(Rc::clone(&written) as _, held), written }
    }

    fn disk(&self) -> Rc<dyn Disk> {
        Rc::clone(&self.held) as _
    }

    /// First sectors of all writes.
    fn done(&self) -> Vec<u64> {
        let list = self.written.passing.list.borrow();
        list.iter().filter(|(operation, ..)| *operation == Operation::Write).map(|(_, at, ..)| at.0).collect()
    }
}

/// A command under way, with its data, and the answer when there is one.
struct UnderWay(Rc<RefCell<Option<Option<Reply>>>>);

impl UnderWay {
    fn start(nexus: &Rc<Nexus>, tag: u64, cdb: &[u8], data: Vec<u8>) -> Self {
        let offered = Offered { out: data.len() as u64, into: 0 };
        let command: Command = nexus.begin(lun_bytes(0), tag, Attribute::Simple, cdb, offered);
        let place = Rc::new(RefCell::new(None));
        let ended = Rc::clone(&place);
        drop(lane::spawn(async move {
            let reply = command.run(&Segments::new(&data), &SegmentsMut::new(&mut [])).await;
            *ended.borrow_mut() = Some(reply);
        }));
        Self(place)
    }

    fn write(nexus: &Rc<Nexus>, lba: u32) -> Self {
        Self::start(nexus, 100 + u64::from(lba), &cdb10(0x2a, 0, lba, 1), vec![7; 512])
    }

    /// PREEMPT AND ABORT of all that registered with `victim`.
    fn preempt_and_abort(nexus: &Rc<Nexus>, own: u64, victim: u64) -> Self {
        Self::start(nexus, 9, &prout(5, 5), keys(own, victim, 0))
    }

    fn has_ended(&self) -> bool {
        self.0.borrow().is_some()
    }

    /// The status it was answered with; `None` when it was aborted and nothing was answered.
    fn status(&self) -> Option<Status> {
        self.0.borrow().as_ref().expect("it has ended").as_ref().map(|reply| reply.status)
    }
}

/// Lets everything that can go on do so.
async fn settle() {
    for _ in 0..32 {
        lane::yield_now().await;
    }
}

/// Waits for something beside everything else; whether it came to an end.
fn watch(work: impl Future<Output = ()> + 'static) -> Rc<Cell<bool>> {
    let ended = Rc::new(Cell::new(false));
    let seen = Rc::clone(&ended);
    drop(lane::spawn(async move {
        work.await;
        seen.set(true);
    }));
    ended
}

async fn register(nexus: &Rc<Nexus>, key: u64) {
    put(nexus, &prout(0, 0), &keys(0, key, 0)).await;
}

#[test]
fn two_fences_that_are_aborted_do_not_wait_for_each_other() {
    lane::block_on(async {
        let disk = Slow::new();
        let bench = Bench::with(disk.disk(), Settings::default());
        let (one, two, three, four) = (bench.nexus(1), bench.nexus(2), bench.nexus(3), bench.nexus(4));
        for (nexus, key) in [(&one, 1), (&two, 2), (&three, 3), (&four, 4)] {
            register(nexus, key).await;
        }
        let writes = [UnderWay::write(&three, 0), UnderWay::write(&four, 1)];
        settle().await;
        let fences = [UnderWay::preempt_and_abort(&one, 1, 3), UnderWay::preempt_and_abort(&two, 2, 4)];
        settle().await;
        assert!(fences.iter().all(|fence| !fence.has_ended()), "the writes are still at the disk");
        let five = bench.nexus(5);
        let reset = watch(async move {
            assert_eq!(five.manage(lun_bytes(0), Function::LogicalUnitReset).await, Response::Complete);
        });
        let (first, second) = (watch(one.lost()), watch(two.lost()));
        settle().await;
        assert!(!reset.get(), "a reset waits for the writes");
        disk.held.passing.let_through();
        settle().await;
        assert!(writes.iter().chain(&fences).all(UnderWay::has_ended));
        assert!(reset.get() && first.get() && second.get(), "nobody waits any more");
    });
}

#[test]
fn a_fence_waits_for_its_own_victims_only_and_for_those_that_were_aborted_before() {
    lane::block_on(async {
        let disk = Slow::new();
        let bench = Bench::with(disk.disk(), Settings::default());
        let (one, two, three) = (bench.nexus(1), bench.nexus(2), bench.nexus(3));
        for (nexus, key) in [(&one, 1), (&two, 2), (&three, 3)] {
            register(nexus, key).await;
        }
        let write = UnderWay::write(&two, 0);
        settle().await;
        // Its own initiator gave it up, but the disk has not.
        let aborting = two.manage(lun_bytes(0), Function::AbortTask(100));
        let aborted = watch(async move { assert_eq!(aborting.await, Response::Complete) });
        let other = UnderWay::preempt_and_abort(&one, 1, 3);
        settle().await;
        assert!(!aborted.get());
        assert_eq!(other.status(), Some(Status::Good), "the third nexus has nothing under way");
        let fence = UnderWay::preempt_and_abort(&one, 1, 2);
        settle().await;
        assert!(!fence.has_ended(), "the write may still land");
        disk.held.passing.let_through();
        settle().await;
        assert_eq!((fence.status(), write.status()), (Some(Status::Good), None));
        assert!(aborted.get());
    });
}

#[test]
fn what_queued_up_behind_another_command_does_not_land_after_a_plain_preempt() {
    lane::block_on(async {
        let disk = Slow::new();
        let bench = Bench::with(disk.disk(), Settings { atomic_blocks: 8, ..Settings::default() });
        let (one, two) = (bench.nexus(1), bench.nexus(2));
        let nbd = bench.unit.as_disk(initiator(9), &port(2));
        register(&one, 1).await;
        register(&two, 2).await;
        // Alone in its range, and slow.
        let first = UnderWay::start(&one, 1, &cdb16(0x8b, 0, 0, 8), vec![1; 4096]);
        settle().await;
        let mut atomic = cdb16(0x9c, 0, 4, 0);
        atomic[13] = 1;
        let queued = [
            UnderWay::write(&two, 0),
            UnderWay::start(&two, 2, &cdb16(0x89, 0, 1, 1), [[0; 512], [2; 512]].concat()),
            UnderWay::start(&two, 3, &cdb16(0x8b, 0, 2, 1), vec![2; 512]),
            UnderWay::start(&two, 4, &cdb10(0x41, 0, 3, 1), vec![2; 512]),
            UnderWay::start(&two, 5, &atomic, vec![2; 512]),
            UnderWay::start(&two, 6, &cdb10(0x2e, 0, 5, 1), vec![2; 512]),
        ];
        let read = Rc::new(RefCell::new(None));
        let answer = Rc::clone(&read);
        drop(lane::spawn(async move {
            let mut back = [0; 512];
            let result = nbd.read(Sector(6), &SegmentsMut::new(&mut back)).await;
            *answer.borrow_mut() = Some(result);
        }));
        settle().await;
        // Exclusive access for registrants, of whom there is one left.
        put(&one, &prout(1, 6), &keys(1, 0, 0)).await;
        put(&one, &prout(4, 6), &keys(1, 2, 0)).await;
        assert!(!first.has_ended() && queued.iter().all(|command| !command.has_ended()));
        disk.held.passing.let_through();
        settle().await;
        assert_eq!(first.status(), Some(Status::Good));
        for command in &queued {
            assert_eq!(command.status(), Some(Status::ReservationConflict));
        }
        assert!(matches!(read.take(), Some(Err(DiskError::Conflict))), "nor is anything read");
        assert_eq!(disk.done(), [0], "the first one's write, and no other");
    });
}

/// A copy of two pieces into a second logical unit, stopped in its first one.
struct Copying {
    disk: Slow,
    one: Rc<Nexus>,
    two: Rc<Nexus>,
    copy: UnderWay,
}

async fn copying() -> Copying {
    let bench = Bench::new();
    let disk = Slow::new();
    let other = second_over(&bench, disk.disk());
    let (one, two) = (bench.nexus(1), bench.nexus(2));
    for (nexus, key) in [(&one, 1), (&two, 2)] {
        run_at(nexus, 1, &[0; 6], &[], 0).await;
        let (reply, _) = run_at(nexus, 1, &prout(0, 0), &keys(0, key, 0), 0).await;
        assert_eq!(reply.status, Status::Good);
    }
    put(&one, &cdb10(0x41, 0, 0, BLOCKS as u16), &[9; 512]).await;
    let list = list(1, &[target_of(&bench.unit), target_of(&other)], &[segment(0, 1, 4096, 0, 0)]);
    let copy = UnderWay::start(&one, 1, &copy(list.len()), list);
    settle().await;
    assert!(!copy.has_ended());
    Copying { disk, one, two, copy }
}

#[test]
fn a_copy_ends_with_its_rights_at_the_destination() {
    lane::block_on(async {
        let Copying { disk, one, two, copy } = copying().await;
        // The second one takes the destination for itself while a piece is on its way.
        for (action, list) in [(1, keys(2, 0, 0)), (4, keys(2, 1, 0))] {
            let (reply, _) = run_at(&two, 1, &prout(action, 5), &list, 0).await;
            assert_eq!(reply.status, Status::Good);
        }
        disk.held.passing.let_through();
        settle().await;
        assert_eq!(copy.status(), Some(Status::ReservationConflict));
        assert_eq!(disk.done(), [0], "the piece that was on its way, and no other");
        let results = get(&one, &[0x84, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]).await;
        assert_eq!(results[4], 2, "it failed");
    });
}

#[test]
fn a_fence_at_the_destination_waits_for_what_a_copy_is_writing_there() {
    lane::block_on(async {
        let Copying { disk, one: _one, two, copy } = copying().await;
        let fenced = Rc::new(Cell::new(false));
        let seen = Rc::clone(&fenced);
        drop(lane::spawn(async move {
            let (reply, _) = run_at(&two, 1, &prout(5, 5), &keys(2, 1, 0), 0).await;
            assert_eq!(reply.status, Status::Good);
            seen.set(true);
        }));
        settle().await;
        assert!(!fenced.get(), "a piece may still land");
        disk.held.passing.let_through();
        settle().await;
        assert!(fenced.get());
        assert_eq!(copy.status(), Some(Status::CheckCondition), "nobody aborted it where it was sent to");
        assert_eq!(disk.done(), [0]);
    });
}

/// Notes where the data of a COMPARE AND WRITE lie.
struct Peeking(MemoryDisk, RefCell<Vec<usize>>);

impl Disk for Peeking {
    fn shape(&self) -> Shape {
        self.0.shape()
    }
    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        self.0.read(at, into)
    }
    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a> {
        self.0.write(at, from, safe)
    }
    fn zero(&self, at: Sector, count: u64, may_free: bool) -> Io<'_> {
        self.0.zero(at, count, may_free)
    }
    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        self.0.unmap(at, count)
    }
    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        self.0.status(at, count, since, out)
    }
    fn compare_and_write<'a>(
        &'a self,
        at: Sector,
        expected: &'a Segments<'a>,
        new: &'a Segments<'a>,
    ) -> Io<'a> {
        for data in [expected, new] {
            data.each(|piece| self.1.borrow_mut().push(piece.as_ptr() as usize));
        }
        self.0.compare_and_write(at, expected, new)
    }
    fn flush(&self) -> Io<'_> {
        self.0.flush()
    }
}

#[test]
fn compare_and_write_works_on_a_copy_that_no_guest_can_change() {
    lane::block_on(async {
        let disk = Rc::new(Peeking(MemoryDisk::new(BLOCKS), RefCell::default()));
        let bench = Bench::with(Rc::clone(&disk) as _, Settings::default());
        let nexus = bench.nexus(1);
        let data = [[0; 512], [4; 512]].concat();
        put(&nexus, &cdb16(0x89, 0, 3, 1), &data).await;
        let theirs = data.as_ptr() as usize..data.as_ptr() as usize + data.len();
        let seen = disk.1.take();
        assert_eq!(seen.len(), 2);
        assert!(seen.iter().all(|at| !theirs.contains(at)));
    });
}
