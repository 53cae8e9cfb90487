//! Task management: who is aborted, who is answered, who waits for whom.

use super::admission::{keys, prout};
use super::*;
use block::DiskError;
use block::decorate::{Decorated, Fail, Hold, Operation, Record};
use std::cell::Cell;

use crate::sense::asc;
use crate::{Command, Function, Response};

/// Writes wait until they are let through; what was written, in order. A flush finds the disk gone.
struct Slow {
    held: Rc<Decorated<Hold>>,
    written: Rc<Decorated<Record>>,
}

impl Slow {
    fn new() -> Self {
        let gone = Fail::nth(Operation::Flush, 0, true, DiskError::Gone);
        let disk = Decorated::new(Rc::new(MemoryDisk::new(BLOCKS)), gone);
        let written = Decorated::new(disk, Record::default());
        let held = Hold::new(|operation| operation == Operation::Write);
        Self { held: Decorated::new(Rc::clone(&written) as _, held), written }
    }

    fn disk(&self) -> Rc<dyn Disk> {
        Rc::clone(&self.held) as _
    }

    fn let_through(&self) {
        self.held.passing.let_through();
    }

    /// First sectors.
    fn done(&self) -> Vec<u64> {
        let list = self.written.passing.list.borrow();
        list.iter().filter(|(operation, ..)| *operation == Operation::Write).map(|(_, at, ..)| at.0).collect()
    }
}

fn write(nexus: &Rc<Nexus>, tag: u64, attribute: Attribute, lba: u32) -> Command {
    let offered = Offered { out: 512, into: 0 };
    nexus.begin(lun_bytes(0), tag, attribute, &cdb10(0x2a, 0, lba, 1), offered)
}

fn start(command: Command) -> lane::Task<Option<Reply>> {
    lane::spawn(async move { command.run(&Segments::new(&[7; 512]), &SegmentsMut::new(&mut [])).await })
}

/// Lets everything that can go on do so.
async fn settle() {
    for _ in 0..8 {
        lane::yield_now().await;
    }
}

#[test]
fn abort_waits_for_the_disk_and_answers_nothing() {
    lane::block_on(async {
        let disk = Slow::new();
        let bench = Bench::with(disk.disk(), Settings::default());
        let nexus = bench.nexus(1);
        let writing = start(write(&nexus, 5, Attribute::Simple, 0));
        let gathering = write(&nexus, 6, Attribute::Simple, 1);
        settle().await;
        let ask = |function| nexus.manage(lun_bytes(0), function);
        assert_eq!(ask(Function::QueryTask(5)).await, Response::Succeeded);
        assert_eq!(ask(Function::QueryTaskSet).await, Response::Succeeded);
        assert_eq!(ask(Function::AbortTask(9)).await, Response::NoSuchTask);
        let aborting = lane::spawn(ask(Function::AbortTask(5)));
        let other = lane::spawn(ask(Function::AbortTask(6)));
        settle().await;
        assert!(gathering.is_aborted(), "while its data are still to come");
        gathering.aborted().await;
        drop(gathering);
        let ended = Rc::new(Cell::new(false));
        let watching = {
            let ended = Rc::clone(&ended);
            lane::spawn(async move {
                assert_eq!(aborting.await, Response::Complete);
                ended.set(true);
            })
        };
        settle().await;
        assert!(!ended.get(), "the disk is still at it");
        disk.let_through();
        watching.await;
        assert_eq!((writing.await, other.await), (None, Response::Complete));
        assert_eq!(ask(Function::QueryTaskSet).await, Response::Complete);
        assert_eq!(nexus.manage(lun_bytes(9), Function::AbortTaskSet).await, Response::IncorrectLun);
        assert_eq!(ask(Function::ClearAca).await, Response::NotSupported);
        assert_eq!(ask(Function::QueryAsynchronousEvent).await, Response::Complete);
    });
}

#[test]
fn clear_task_set_and_tas_sam5_7_5() {
    for tas in [false, true] {
        lane::block_on(async {
            let disk = Slow::new();
            let bench = Bench::with(disk.disk(), Settings::default());
            let (one, two) = (bench.nexus(1), bench.nexus(2));
            let mut modes = bench.unit.modes.get();
            modes.task_aborted = tas;
            bench.unit.modes.set(modes);
            let (own, others) =
                (start(write(&one, 1, Attribute::Simple, 0)), start(write(&two, 1, Attribute::Simple, 1)));
            settle().await;
            let clearing = lane::spawn(one.manage(lun_bytes(0), Function::ClearTaskSet));
            settle().await;
            disk.let_through();
            assert_eq!(clearing.await, Response::Complete);
            assert_eq!(own.await, None);
            let answer = others.await.map(|r| r.status);
            assert_eq!(answer, tas.then_some(Status::TaskAborted));
            assert_eq!(attention(&one).await, None);
            assert_eq!(attention(&two).await, (!tas).then_some(asc::COMMANDS_CLEARED_BY_ANOTHER));
        });
    }
}

#[test]
fn r50_preempt_and_abort_is_over_when_the_writes_are() {
    lane::block_on(async {
        let disk = Slow::new();
        let bench = Bench::with(disk.disk(), Settings::default());
        let (one, two) = (bench.nexus(1), bench.nexus(2));
        put(&one, &prout(0, 0), &keys(0, 1, 0)).await;
        put(&two, &prout(0, 0), &keys(0, 2, 0)).await;
        put(&one, &prout(1, 5), &keys(1, 0, 0)).await;
        let stale = start(write(&two, 1, Attribute::Simple, 0));
        // Taken up before the fence, its data come after: it must not be written.
        let late = write(&two, 2, Attribute::Simple, 1);
        settle().await;
        let offered = Offered { out: 24, into: 0 };
        let command = one.begin(lun_bytes(0), 9, Attribute::Simple, &prout(5, 5), offered);
        let list = keys(1, 2, 0);
        let fencing =
            lane::spawn(async move { command.run(&Segments::new(&list), &SegmentsMut::new(&mut [])).await });
        settle().await;
        assert!(late.is_aborted());
        disk.let_through();
        drop(late);
        assert_eq!(fencing.await.map(|r| r.status), Some(Status::Good));
        assert_eq!(stale.await, None);
        assert_eq!(disk.done(), [0]);
        assert_eq!(attention(&two).await, Some(asc::REGISTRATIONS_PREEMPTED));
        conflict(&two, &cdb10(0x2a, 0, 0, 1), &[0; 512]).await;
    });
}

#[test]
fn a_preempt_stops_writes_whose_data_come_later() {
    lane::block_on(async {
        let disk = Slow::new();
        disk.let_through();
        let bench = Bench::with(disk.disk(), Settings::default());
        let (one, two) = (bench.nexus(1), bench.nexus(2));
        put(&one, &prout(0, 0), &keys(0, 1, 0)).await;
        put(&two, &prout(0, 0), &keys(0, 2, 0)).await;
        put(&one, &prout(1, 5), &keys(1, 0, 0)).await;
        let late = write(&two, 2, Attribute::Simple, 1);
        put(&one, &prout(4, 5), &keys(1, 2, 0)).await;
        assert_eq!(start(late).await.map(|r| r.status), Some(Status::ReservationConflict));
        assert!(disk.done().is_empty());
    });
}

#[test]
fn ordered_tasks_sam5_8_6() {
    lane::block_on(async {
        let disk = Slow::new();
        let bench = Bench::with(disk.disk(), Settings::default());
        let nexus = bench.nexus(1);
        // Begun in this order, run in the other.
        let first = write(&nexus, 1, Attribute::Simple, 1);
        let barrier = write(&nexus, 2, Attribute::Ordered, 2);
        let last = write(&nexus, 3, Attribute::Simple, 3);
        let head = write(&nexus, 4, Attribute::HeadOfQueue, 4);
        let tasks = [start(last), start(barrier), start(head), start(first)];
        disk.let_through();
        for task in tasks {
            assert_eq!(task.await.map(|r| r.status), Some(Status::Good));
        }
        let done = disk.done();
        let place = |lba| done.iter().position(|l| *l == lba).unwrap();
        assert!(place(1) < place(2) && place(2) < place(3) && place(4) < place(3), "{done:?}");
        let refused = write(&nexus, 5, Attribute::Aca, 0);
        assert_eq!(start(refused).await.map(|r| r.status), Some(Status::CheckCondition));
    });
}

#[test]
fn a_nexus_that_is_lost_has_its_writes_over_before_the_next_begins() {
    lane::block_on(async {
        let disk = Slow::new();
        let bench = Bench::with(disk.disk(), Settings::default());
        let nexus = bench.nexus(1);
        let writing = start(write(&nexus, 1, Attribute::Simple, 0));
        settle().await;
        let gone = Rc::new(Cell::new(false));
        let losing = {
            let (lost, gone) = (nexus.lost(), Rc::clone(&gone));
            lane::spawn(async move {
                lost.await;
                gone.set(true);
            })
        };
        settle().await;
        assert!(!gone.get());
        assert_eq!(start(write(&nexus, 2, Attribute::Simple, 0)).await, None, "nothing more is done for it");
        disk.let_through();
        losing.await;
        assert_eq!(writing.await, None);
    });
}

#[test]
fn resets() {
    lane::block_on(async {
        let bench = Bench::new();
        let (one, two) = (bench.nexus(1), bench.nexus(2));
        assert_eq!(one.manage(lun_bytes(0), Function::ItNexusReset).await, Response::Complete);
        assert_eq!((attention(&one).await, attention(&two).await), (Some(asc::I_T_NEXUS_LOSS), None));
        for function in [Function::LogicalUnitReset, Function::TargetWarmReset, Function::TargetColdReset] {
            assert_eq!(one.manage(lun_bytes(0), function).await, Response::Complete);
            for nexus in [&one, &two] {
                assert_eq!(attention(nexus).await, Some(asc::BUS_DEVICE_RESET));
            }
        }
    });
}

#[test]
fn a_task_set_is_bounded() {
    lane::block_on(async {
        let bench = Bench::new();
        let (one, two) = (bench.nexus(1), bench.nexus(2));
        let held: Vec<_> = (0..u64::from(crate::TASKS_PER_NEXUS_MAX))
            .map(|t| write(&one, t, Attribute::Simple, 0))
            .collect();
        let full = start(write(&one, 1 << 20, Attribute::Simple, 0)).await;
        assert_eq!(full.map(|r| r.status), Some(Status::TaskSetFull));
        assert_eq!(start(write(&two, 1, Attribute::Simple, 0)).await.map(|r| r.status), Some(Status::Good));
        drop(held);
        assert!(bench.unit.tasks.is_empty());
        assert_eq!(attention(&one).await, None);
    });
}
