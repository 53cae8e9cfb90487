//! What a front end may do to a back end that runs: kill it, take memory away, exchange bells, ask for too much.

use std::os::fd::{FromRawFd, IntoRawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use block::decorate::{Decorated, Hold, Operation, Passing};
use block::{Io, MemoryDisk, Sector};
use vhost::VhostBackend;
use vhost::vhost_user::{VhostUserFrontend, message::VhostUserConfigFlags};
use vmm_sys_util::eventfd::EventFd;

use crate::blk::{Place, SECTORS, serve};
use crate::guest::{DATA, Guest, Queue, READ, Server, Setup, WRITE, wait_for};

/// Longest time that anything may take; reached by nothing that works.
const PATIENCE: Duration = Duration::from_secs(30);

fn bell() -> EventFd {
    EventFd::new(rustix::event::EventfdFlags::NONBLOCK.bits() as i32).unwrap()
}

/// A disk whose writes wait until it is asked to let them through.
fn holding() -> Rc<Decorated<Hold>> {
    let held = Hold::new(|operation| operation == Operation::Write);
    Decorated::new(Rc::new(MemoryDisk::new(SECTORS)), held)
}

fn held_server(place: &Place) -> Server {
    Server::start(&place.socket(), holding, |disk| disk.passing.let_through())
}

#[test]
fn who_was_killed_before_it_could_call_is_called_for_by_the_next() {
    for inflight in [true, false] {
        let place = Place::new("killed");
        let first = serve(&place);
        let setup = Setup { inflight, ..Setup::default() };
        let mut guest = Guest::connect(&place.socket(), setup.clone());
        // Its calls go nowhere: as good as killed between the answer and the call.
        let nowhere = bell();
        guest.front.set_vring_call(0, &nowhere).unwrap();
        let _ = nowhere.read();
        let head = guest.request(0, 0, READ, 0, &[(DATA, 512, true)]);
        assert!(wait_for(&nowhere, PATIENCE));
        let _ = guest.queues[0].call.read(); // of the set-up
        let Guest { memory, mut queues, inflight, front, .. } = guest;
        drop(front);
        first.stop();
        if inflight.is_none() {
            // The front end knows where its device has stopped.
            queues[0].seen = 1;
        }
        let second = serve(&place);
        let mut guest = Guest::resume(&place.socket(), setup, memory, queues, inflight);
        assert!(wait_for(&guest.queues[0].call, PATIENCE), "the guest waits for its answer for ever");
        guest.queues[0].seen = 0;
        assert_eq!(guest.queues[0].poll(&guest.memory).map(|(answered, _)| answered), Some(head));
        assert_eq!(guest.read(0, 512), [0; 512]);
        second.stop();
    }
}

#[test]
fn a_bell_that_comes_instead_of_another_is_rung_at_once() {
    let place = Place::new("bells");
    let server = serve(&place);
    let mut guest = Guest::connect(&place.socket(), Setup::default());
    assert_eq!(guest.read(0, 512), [0; 512]);
    let other = bell();
    guest.front.set_vring_call(0, &other).unwrap();
    assert!(wait_for(&other, PATIENCE));
    server.stop();
}

#[test]
fn rings_whose_memory_is_taken_away_rest_until_it_is_back() {
    let place = Place::new("away");
    let mut server = held_server(&place);
    let mut guest = Guest::connect(&place.socket(), Setup { slots: true, queues: 2, ..Setup::default() });
    let region = guest.memory.region();
    let under_way = guest.request(0, 0, WRITE, 0, &[(DATA, 4096, false)]);
    // The disk has it when the other queue, asked later, has answered.
    guest.request(1, 1, READ, 0, &[(DATA + 8192, 512, true)]);
    guest.queues[1].wait(&guest.memory);
    guest.front.remove_mem_region(&region).unwrap();
    server.ask(); // the write ends, and its answer has no place
    let next = guest.request(0, 2, READ, 0, &[(DATA + 8192, 512, true)]);
    for _ in 0..20 {
        guest.capacity();
    }
    assert_eq!(guest.queues[0].poll(&guest.memory), None);
    guest.front.add_mem_region(&region).unwrap();
    let mut answered = [guest.queues[0].wait(&guest.memory).0, guest.queues[0].wait(&guest.memory).0];
    answered.sort_unstable();
    let mut expected = [under_way, next];
    expected.sort_unstable();
    assert_eq!((answered, guest.status(0), guest.status(2)), (expected, 0, 0));
    // As a whole, and at another place.
    let mut elsewhere = region;
    elsewhere.guest_phys_addr = 1 << 40;
    guest.front.set_mem_table(&[elsewhere]).unwrap();
    guest.front.set_mem_table(&[region]).unwrap();
    assert_eq!(guest.read(8, 512), [0; 512]);
    // Nobody waits for memory that does not come back.
    guest.front.remove_mem_region(&region).unwrap();
    assert_eq!(guest.front.get_vring_base(0).unwrap(), 3);
    server.stop();
}

#[test]
fn a_ring_may_be_stopped_while_its_memory_is_away() {
    let place = Place::new("stopped");
    let mut server = held_server(&place);
    let setup = Setup { slots: true, inflight: true, ..Setup::default() };
    let mut guest = Guest::connect(&place.socket(), setup);
    guest.memory.write(DATA, &[7; 4096]);
    let head = guest.request(0, 0, WRITE, 8, &[(DATA, 4096, false)]);
    // Messages and kicks are looked at in turns.
    for _ in 0..20 {
        guest.capacity();
    }
    guest.front.remove_mem_region(&guest.memory.region()).unwrap();
    server.ask();
    guest.front.get_vring_base(0).unwrap();
    // Its answer was lost, and it is tracked: it is done again.
    guest.share_memory();
    guest.start();
    assert_eq!(guest.queues[0].wait(&guest.memory).0, head);
    assert_eq!(guest.status(0), 0);
    assert_eq!(guest.read(8, 4096), [7; 4096]);
    server.stop();
}

/// Counts the writes that the disk was asked for, and keeps them until it is asked to let them through.
struct Counting(Hold, Arc<AtomicU64>);

impl Passing for Counting {
    fn before(&self, operation: Operation, at: Sector, count: u64) -> Io<'_> {
        if operation == Operation::Write {
            self.1.fetch_add(1, Ordering::SeqCst);
        }
        self.0.before(operation, at, count)
    }
}

#[test]
fn a_guest_keeps_no_more_busy_than_it_has_credit_for() {
    let place = Place::new("credit");
    let begun = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&begun);
    let make = move || {
        let held = Hold::new(|operation| operation == Operation::Write);
        Decorated::new(Rc::new(MemoryDisk::new(SECTORS)), Counting(held, seen))
    };
    let mut server = Server::start(&place.socket(), make, |disk| disk.passing.0.let_through());
    let mut guest = Guest::connect(&place.socket(), Setup { queues: 3, ..Setup::default() });
    const LARGE: u32 = 8 << 20;
    // 64 MiB are eight of them; and every queue may have one.
    for slot in 0..24 {
        guest.request(0, slot, WRITE, 0, &[(DATA, LARGE, false)]);
    }
    let settle = |guest: &mut Guest, wanted: u64| {
        let since = Instant::now();
        while begun.load(Ordering::SeqCst) < wanted {
            assert!(since.elapsed() < PATIENCE, "{} have begun", begun.load(Ordering::SeqCst));
            guest.capacity();
        }
        for _ in 0..50 {
            guest.capacity();
        }
        assert_eq!(begun.load(Ordering::SeqCst), wanted);
    };
    settle(&mut guest, 8);
    for (q, slot) in [(1, 24), (1, 25), (2, 26), (2, 27)] {
        guest.request(q, slot, WRITE, 0, &[(DATA, LARGE, false)]);
    }
    settle(&mut guest, 10);
    server.ask();
    for (q, count) in [(0, 24), (1, 2), (2, 2)] {
        for _ in 0..count {
            guest.queues[q].wait(&guest.memory);
        }
    }
    assert!((0..28).all(|slot| guest.status(slot) == 0));
    server.stop();
}

#[test]
fn a_request_of_more_than_a_gibibyte_is_refused() {
    let place = Place::new("giant");
    let server = Server::start(&place.socket(), || Rc::new(MemoryDisk::new(4 << 21)), |_: &MemoryDisk| {});
    let mut guest = Guest::connect(&place.socket(), Setup::default());
    // The same memory again and again: only its sum is large.
    let parts: Vec<_> = (0..65).map(|_| (DATA, 16 << 20, true)).collect();
    assert_eq!(guest.once(READ, 0, &parts[..64]), 0);
    assert_eq!(guest.once(READ, 0, &parts), 1);
    server.stop();
}

#[test]
fn a_reset_forgets_what_was_kept_of_the_guest_before() {
    let place = Place::new("reset");
    let server = serve(&place);
    let setup = Setup { inflight: true, ..Setup::default() };
    let mut guest = Guest::connect(&place.socket(), setup.clone());
    guest.front.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    assert_eq!(guest.read(0, 512), [0; 512]);
    guest.front.reset_owner().unwrap();
    // The next guest is another one, in the same memory.
    let Guest { memory, inflight, front, .. } = guest;
    drop(front);
    memory.write(0, &vec![0; DATA as usize]);
    let queues = vec![Queue::new(0, setup.size)];
    let mut guest = Guest::resume(&place.socket(), setup, memory, queues, inflight);
    assert_eq!(guest.config(60)[32], 1, "the write cache is on, as it is for every new guest");
    assert_eq!(guest.read(0, 512), [0; 512]);
    server.stop();
}

#[test]
fn what_is_no_eventfd_is_no_bell() {
    let place = Place::new("kick");
    let server = serve(&place);
    let mut guest = Guest::connect(&place.socket(), Setup::default());
    let bell = false_bell();
    assert!(guest.front.set_vring_kick(0, &bell).is_err());
    assert!(guest.front.set_vring_call(0, &bell).is_err());
    assert_eq!(guest.read(0, 512), [0; 512]);
    server.stop();
}

/// A descriptor of something else in the place of an eventfd.
#[allow(unsafe_code)] // there is no other way to make one
fn false_bell() -> EventFd {
    // Always readable: who listened to it would do nothing else.
    let zero = std::fs::File::options().read(true).write(true).open("/dev/zero").unwrap();
    // SAFETY: the descriptor is given away.
    unsafe { EventFd::from_raw_fd(zero.into_raw_fd()) }
}
