//! vhost-user-blk: what a good guest sees.

use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use block::MemoryDisk;
use block::decorate::{Decorated, Delay, Operation};
use vhost::vhost_user::{VhostUserFrontend, message::VhostUserConfigFlags};
use vhost::{VhostBackend, VhostUserDirtyLogRegion};

use crate::guest::{
    DATA, DISCARD, EVENT_IDX, FLUSH, GET_ID, Guest, INDIRECT, READ, Server, Setup, VERSION_1, WRITE,
    WRITE_ZEROES, addresses, wait_for,
};

pub const SECTORS: u64 = 32768;

/// A place for a socket.
pub struct Place(PathBuf);

impl Place {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kagami-vhost-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path); // of a test that failed
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub fn socket(&self) -> PathBuf {
        self.0.join("disk.sock")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0); // temporary anyway
    }
}

pub fn serve(place: &Place) -> Server {
    Server::start(&place.socket(), || Rc::new(MemoryDisk::new(SECTORS)), |disk| disk.resize(2 * SECTORS))
}

fn pattern(seed: u8, length: usize) -> Vec<u8> {
    (0..length).map(|n| (n as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn a_guest_reads_what_it_wrote_with_every_kind_of_ring() {
    for features in [u64::MAX, !EVENT_IDX, !INDIRECT, VERSION_1] {
        let place = Place::new("kinds");
        let server = serve(&place);
        let mut guest = Guest::connect(&place.socket(), Setup { features, slots: true, ..Setup::default() });
        assert_eq!(guest.capacity(), SECTORS);
        let data = pattern(1, 64 << 10);
        assert_eq!(guest.write(8, &data), 0);
        assert_eq!(guest.read(8, 64 << 10), data);
        assert_eq!(guest.read(0, 4096), vec![0; 4096]);
        // In pieces that are no sectors, and not aligned.
        let pieces = [(DATA + 1, 100, true), (DATA + 1000, 412, true), (DATA + 4096, 512, true)];
        assert_eq!(guest.once(READ, 8, &pieces), 0);
        assert_eq!(guest.memory.read(DATA + 1, 100), data[..100]);
        assert_eq!(guest.memory.read(DATA + 1000, 412), data[100..512]);
        assert_eq!(guest.once(FLUSH, 0, &[]), 0);
        assert_eq!(guest.once(GET_ID, 0, &[(DATA, 20, true)]), 0);
        assert_eq!(guest.memory.read(DATA, 20), b"serial-of-the-disk-a");
        assert_eq!(guest.once(99, 0, &[]), 2, "unsupported");
        server.stop();
    }
}

#[test]
fn what_is_discarded_or_zeroed_reads_as_zeroes_and_bad_ranges_touch_nothing() {
    let place = Place::new("ranges");
    let server = serve(&place);
    let mut guest = Guest::connect(&place.socket(), Setup::default());
    let data = pattern(7, 32 << 10);
    assert_eq!(guest.write(0, &data), 0);
    for (kind, list, expected) in [
        (DISCARD, range(8, 8, 0), 0),
        (WRITE_ZEROES, [range(24, 8, 1), range(40, 8, 0)].concat(), 0),
        (DISCARD, range(0, 8, 1), 2),
        (WRITE_ZEROES, range(0, 8, 2), 2),
        (WRITE_ZEROES, [range(0, 8, 0), range(SECTORS, 1, 0)].concat(), 1),
        (WRITE_ZEROES, range(u64::MAX, u32::MAX, 0), 1),
        (DISCARD, vec![0; 15], 1),
        (DISCARD, vec![], 1),
    ] {
        guest.memory.write(DATA, &list);
        assert_eq!(guest.once(kind, 0, &[(DATA, list.len() as u32, false)]), expected, "{kind} {list:?}");
    }
    let now = guest.read(0, 32 << 10);
    for (block, bytes) in now.chunks(4096).enumerate() {
        let expected =
            if [1, 3, 5].contains(&block) { &[0; 4096][..] } else { &data[block * 4096..][..4096] };
        assert_eq!(bytes, expected, "block {block}");
    }
    assert_eq!(guest.once(READ, SECTORS - 1, &[(DATA, 1024, true)]), 1, "beyond the end");
    assert_eq!(guest.once(WRITE, u64::MAX, &[(DATA, 512, false)]), 1);
    assert_eq!(guest.once(READ, 0, &[(DATA, 100, true)]), 1, "no whole sectors");
    server.stop();
}

#[test]
fn four_queues_with_indirect_chains_are_served_at_once() {
    let place = Place::new("queues");
    let server = serve(&place);
    let mut guest = Guest::connect(&place.socket(), Setup { queues: 4, ..Setup::default() });
    for round in 0..50u64 {
        for q in 0..4usize {
            for n in 0..8u64 {
                let slot = q as u64 * 8 + n;
                let data = DATA + slot * 4096;
                guest.memory.write(data, &pattern((round + slot) as u8, 4096));
                let at = guest.header(slot, WRITE, slot * 8);
                let parts = [(at, 16, false), (data, 4096, false), (at + 16, 1, true)];
                guest.queues[q].submit_indirect(&guest.memory, 0xa_0000 + slot * 256, &parts);
            }
        }
        for queue in &mut guest.queues {
            for _ in 0..8 {
                queue.wait(&guest.memory);
            }
        }
        assert!((0..32).all(|slot| guest.status(slot) == 0));
    }
    for slot in 0..32u64 {
        assert_eq!(guest.read(slot * 8, 4096), pattern((49 + slot) as u8, 4096), "slot {slot}");
    }
    server.stop();
}

#[test]
fn memory_may_change_while_rings_run() {
    let place = Place::new("memory");
    let server = serve(&place);
    let mut guest = Guest::connect(&place.socket(), Setup::default());
    let data = pattern(3, 4096);
    for round in 0..20 {
        let slot = 1 + round % 8;
        guest.memory.write(DATA, &data);
        let head = guest.request(0, slot, WRITE, slot * 8, &[(DATA, 4096, false)]);
        guest.share_memory();
        assert_eq!(guest.queues[0].wait(&guest.memory).0, head);
        assert_eq!(guest.status(slot), 0);
    }
    // Slots on top of the table, and away again.
    let mut extra = guest.memory.region();
    extra.guest_phys_addr = 1 << 32;
    extra.userspace_addr = 1 << 40;
    guest.front.add_mem_region(&extra).unwrap();
    let upper = (1 << 32) + DATA;
    assert_eq!(guest.once(READ, 8, &[(upper, 4096, true)]), 0);
    assert_eq!(guest.memory.read(DATA, 4096), data);
    guest.front.remove_mem_region(&extra).unwrap();
    assert!(guest.front.remove_mem_region(&extra).is_err(), "it is gone");
    assert_eq!(guest.once(READ, 8, &[(upper, 4096, true)]), 1, "outside of memory");
    assert_eq!(guest.read(8, 4096), data);
    server.stop();
}

#[test]
fn a_resize_reaches_the_guest() {
    let place = Place::new("resize");
    let mut server = serve(&place);
    let mut guest = Guest::connect(&place.socket(), Setup::default());
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    guest.front.set_backend_request_fd(&theirs).unwrap();
    server.ask();
    let mut message = [0; 12];
    std::io::Read::read_exact(&mut &ours, &mut message).unwrap();
    assert_eq!(message[..8], [2, 0, 0, 0, 1, 0, 0, 0], "CONFIG_CHANGE_MSG, version 1, nothing to answer");
    assert_eq!(guest.capacity(), 2 * SECTORS);
    assert_eq!(guest.once(WRITE, 2 * SECTORS - 8, &[(DATA, 4096, false)]), 0);
    server.stop();
}

#[test]
fn the_write_cache_can_be_switched_and_the_switch_outlives_the_back_end() {
    let place = Place::new("cache");
    let server = serve(&place);
    let setup = Setup { inflight: true, ..Setup::default() };
    let mut guest = Guest::connect(&place.socket(), setup.clone());
    assert_eq!(guest.config(60)[32], 1);
    let flags = VhostUserConfigFlags::WRITABLE;
    guest.front.set_config(32, flags, &[0]).unwrap();
    assert_eq!(guest.config(60)[32], 0);
    assert!(guest.front.set_config(0, flags, &[0]).is_err(), "the size is not the guest's");
    assert!(guest.front.set_config(32, flags, &[7]).is_err());
    let Guest { memory, queues, inflight, front, .. } = guest;
    drop(front);
    server.stop();
    let server = serve(&place);
    let mut guest = Guest::resume(&place.socket(), setup, memory, queues, inflight);
    assert_eq!(guest.config(60)[32], 0);
    server.stop();
}

/// A disk whose writes never end: the daemon that has it is as good as killed.
fn stuck() -> Rc<Decorated<Delay>> {
    let delay = |operation| match operation {
        Operation::Write => Duration::from_secs(1 << 30),
        _ => Duration::ZERO,
    };
    Decorated::new(Rc::new(MemoryDisk::new(SECTORS)), Delay(Box::new(delay)))
}

#[test]
fn requests_in_flight_survive_the_daemon() {
    let place = Place::new("inflight");
    let first = Server::start(&place.socket(), stuck, |_| {});
    let setup = Setup { queues: 2, inflight: true, ..Setup::default() };
    let mut guest = Guest::connect(&place.socket(), setup.clone());
    let data: Vec<_> = (0..12).map(|n| pattern(n as u8, 4096)).collect();
    let mut under_way = [Vec::new(), Vec::new()];
    for (n, bytes) in data.iter().enumerate() {
        let at = DATA + n as u64 * 4096;
        guest.memory.write(at, bytes);
        let head = guest.request(n % 2, n as u64, WRITE, n as u64 * 8, &[(at, 4096, false)]);
        under_way[n % 2].push(head);
        if n % 3 == 0 {
            // Requests between them come and go, so that what stays behind is no run of the ring.
            let head = guest.request(n % 2, 40, READ, 0, &[(DATA + (1 << 20), 512, true)]);
            assert_eq!(guest.queues[n % 2].wait(&guest.memory).0, head);
        }
    }
    let Guest { memory, queues, inflight, front, .. } = guest;
    // It hangs in its writes for ever: nobody waits for it, it has the old socket and answers nothing.
    std::mem::drop(front);
    std::fs::remove_file(place.socket()).unwrap();
    first.leave();

    let second = serve(&place);
    let mut guest = Guest::resume(&place.socket(), setup, memory, queues, inflight);
    for (queue, expected) in guest.queues.iter_mut().zip(&mut under_way) {
        let mut answered: Vec<u16> = expected.iter().map(|_| queue.wait(&guest.memory).0).collect();
        answered.sort_unstable();
        expected.sort_unstable();
        assert_eq!(&answered, expected);
    }
    assert!((0..12).all(|slot| guest.status(slot) == 0));
    for (n, bytes) in data.iter().enumerate() {
        assert_eq!(&guest.read(n as u64 * 8, 4096), bytes);
    }
    second.stop();
}

#[test]
fn a_ring_that_is_stopped_has_answered_everything_and_goes_on_where_it_was() {
    let place = Place::new("stop");
    let slow = || {
        let delay = Delay(Box::new(|_| Duration::from_millis(5)));
        Decorated::new(Rc::new(MemoryDisk::new(SECTORS)), delay)
    };
    let server = Server::start(&place.socket(), slow, |_| {});
    let mut guest = Guest::connect(&place.socket(), Setup::default());
    for slot in 0..16 {
        guest.request(0, slot, WRITE, slot * 8, &[(DATA, 4096, false)]);
    }
    let base = guest.front.get_vring_base(0).unwrap();
    let queue = &mut guest.queues[0];
    let mut answered = 0;
    while queue.poll(&guest.memory).is_some() {
        answered += 1;
    }
    assert_eq!(base, answered, "everything taken is answered");
    guest.start();
    for _ in answered..16 {
        guest.queues[0].wait(&guest.memory);
    }
    assert_eq!(guest.read(0, 512), [0; 512]);

    // The daemon's own stop does the same.
    for slot in 0..16 {
        guest.request(0, slot, WRITE, slot * 8, &[(DATA, 4096, false)]);
    }
    guest.queues[0].wait(&guest.memory);
    server.stop();
    let queue = &mut guest.queues[0];
    let mut answered = 1;
    while queue.poll(&guest.memory).is_some() {
        answered += 1;
    }
    assert_eq!(answered, 16);
}

#[test]
fn pages_written_while_the_guest_migrates_are_logged() {
    use std::os::fd::AsRawFd;
    let place = Place::new("log");
    let server = serve(&place);
    let mut guest = Guest::connect(&place.socket(), Setup::default());
    let log = crate::guest::Memory::new();
    let region =
        VhostUserDirtyLogRegion { mmap_size: 4096, mmap_offset: 0, mmap_handle: log.file.as_raw_fd() };
    let is_dirty = |address: u64| {
        let page = address / 4096;
        log.read(page / 8, 1)[0] & (1 << (page % 8)) != 0
    };
    assert_eq!(guest.once(READ, 0, &[(DATA, 4096, true)]), 0);
    assert_eq!(log.read(0, 4096), vec![0; 4096]);
    guest.front.set_log_base(0, Some(region)).unwrap();
    let all = 1 << 26;
    guest.front.set_features(guest.features | all).unwrap();
    guest.front.set_vring_addr(0, &addresses(&guest.queues[0], true)).unwrap();
    assert_eq!(guest.once(READ, 0, &[(DATA + 8192, 4096, true), (DATA + 16384, 4096, true)]), 0);
    let used = guest.queues[0].used();
    for at in [DATA + 8192, DATA + 16384, used, 0x8_0000] {
        assert!(is_dirty(at), "{at:#x}");
    }
    for at in [DATA, DATA + 4096, DATA + 12288, guest.queues[0].table()] {
        assert!(!is_dirty(at), "{at:#x}");
    }
    guest.front.set_features(guest.features).unwrap();
    assert_eq!(guest.once(READ, 0, &[(DATA, 4096, true)]), 0);
    assert!(!is_dirty(DATA), "no longer");
    server.stop();
}

#[test]
fn a_batch_wakes_the_guest_once_or_not_at_all_when_it_does_not_want_to_be() {
    let place = Place::new("calls");
    let server = serve(&place);
    let mut guest = Guest::connect(&place.socket(), Setup { features: !EVENT_IDX, ..Setup::default() });
    let _ = guest.queues[0].call.read(); // the set-up rings
    let available = guest.queues[0].available();
    guest.memory.write(available, &1u16.to_le_bytes()); // VIRTQ_AVAIL_F_NO_INTERRUPT
    let head = guest.request(0, 0, READ, 0, &[(DATA, 512, true)]);
    let begun = std::time::Instant::now();
    let answer = loop {
        if let Some(answer) = guest.queues[0].poll(&guest.memory) {
            break answer;
        }
        assert!(begun.elapsed() < Duration::from_secs(30));
        std::thread::yield_now();
    };
    assert_eq!(answer.0, head);
    // Its end orders it: nothing is called after the ring has stopped.
    guest.front.get_vring_base(0).unwrap();
    assert!(!wait_for(&guest.queues[0].call, Duration::ZERO));
    server.stop();
}
