//! Guests and front ends that break every rule: a status, a stopped queue or a closed connection, and the next one is served.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vhost::VhostBackend;

use crate::blk::{Place, SECTORS, serve};
use crate::guest::{DATA, Guest, READ, Setup, WRITE, wait_for};

/// Puts a chain by hand into the queue; the queue must stop and say so.
fn stops(what: &str, break_it: impl FnOnce(&mut Guest)) {
    let place = Place::new("broken");
    let server = serve(&place);
    let mut guest = Guest::connect(&place.socket(), Setup { queues: 2, ..Setup::default() });
    break_it(&mut guest);
    assert!(wait_for(&guest.queues[0].error, Duration::from_secs(30)), "{what}: the queue was not stopped");
    // The other queue goes on.
    let head = guest.request(1, 1, READ, 0, &[(DATA, 512, true)]);
    assert_eq!(guest.queues[1].wait(&guest.memory).0, head, "{what}");
    assert_eq!(guest.status(1), 0);
    // And so does the broken one when it is set up anew.
    guest.front.get_vring_base(0).unwrap();
    let Guest { memory, front, .. } = guest;
    drop(front);
    drop(memory);
    let mut guest = Guest::connect(&place.socket(), Setup::default());
    assert_eq!(guest.capacity(), SECTORS);
    assert_eq!(guest.read(0, 512), [0; 512]);
    server.stop();
}

#[test]
fn hostile_chains_stop_their_queue() {
    type Break = fn(&mut Guest);
    let list: [(&str, Break); 9] = [
        ("a loop", |g| {
            g.queues[0].descriptor(&g.memory, 0, (DATA, 16, false), 1, 1);
            g.queues[0].descriptor(&g.memory, 1, (DATA, 16, false), 1, 0);
            g.queues[0].publish(&g.memory, 0);
        }),
        ("next outside of the table", |g| {
            g.queues[0].descriptor(&g.memory, 0, (DATA, 16, false), 1, 128);
            g.queues[0].publish(&g.memory, 0);
        }),
        ("a head outside of the table", |g| g.queues[0].publish(&g.memory, 128)),
        ("the same head twice", |g| {
            // Slow enough to be there still: 4 GiB to read is more than the disk, but nothing is answered before the
            // second is looked at, because both are taken at once.
            g.queues[0].descriptor(&g.memory, 0, (DATA, 16, false), 0, 0);
            let (at, next) = (g.queues[0].available(), g.queues[0].next);
            g.memory.write(at + 4, &[0, 0, 0, 0]);
            g.queues[0].next = next + 1;
            g.queues[0].publish(&g.memory, 0);
        }),
        ("indirect in indirect", |g| {
            g.queues[0].descriptor(&g.memory, 0, (DATA, 32, false), 4, 0);
            g.memory.write(DATA, &[0; 32]);
            g.memory.write(DATA + 12, &[4, 0]);
            g.queues[0].publish(&g.memory, 0);
        }),
        ("an indirect table of odd length", |g| {
            g.queues[0].descriptor(&g.memory, 0, (DATA, 17, false), 4, 0);
            g.queues[0].publish(&g.memory, 0);
        }),
        ("an indirect table outside of memory", |g| {
            g.queues[0].descriptor(&g.memory, 0, (1 << 40, 32, false), 4, 0);
            g.queues[0].publish(&g.memory, 0);
        }),
        ("more than 4 GiB", |g| {
            g.queues[0].descriptor(&g.memory, 0, (DATA, u32::MAX, true), 1, 1);
            g.queues[0].descriptor(&g.memory, 1, (DATA, u32::MAX, true), 0, 0);
            g.queues[0].publish(&g.memory, 0);
        }),
        ("more available than there are descriptors", |g| {
            let at = g.queues[0].available();
            g.memory.write(at + 2, &500u16.to_le_bytes());
            g.queues[0].kick.write(1).unwrap();
        }),
    ];
    for (what, break_it) in list {
        stops(what, break_it);
    }
}

#[test]
fn hostile_requests_get_a_status() {
    let place = Place::new("requests");
    let server = serve(&place);
    let mut guest = Guest::connect(&place.socket(), Setup::default());
    // Data outside of memory, both ways, and a length that is no length.
    assert_eq!(guest.once(WRITE, 0, &[(1 << 50, 512, false)]), 1);
    assert_eq!(guest.once(READ, 0, &[(u64::MAX - 100, 512, true)]), 1);
    assert_eq!(guest.once(READ, 0, &[(DATA, 0x7fff_fe00, true)]), 1);
    // No header, no status, a header in single bytes, a status alone.
    let at = guest.header(0, READ, 0);
    let queue = &mut guest.queues[0];
    for parts in [
        vec![(at, 15, false), (at + 16, 1, true)],
        vec![(at, 16, false)],
        vec![(at + 16, 1, true)],
        vec![(1 << 50, 16, false), (at + 16, 1, true)],
        vec![(at, 16, false), (1 << 50, 1, true)],
        vec![(at, 0, false), (at + 16, 0, true)],
    ] {
        let head = queue.submit(&guest.memory, &parts);
        assert_eq!(queue.wait(&guest.memory).0, head, "{parts:?}");
    }
    let mut parts: Vec<_> = (0..16).map(|n| (at + n, 1, false)).collect();
    parts.extend([(DATA, 512, true), (at + 16, 1, true)]);
    let head = queue.submit(&guest.memory, &parts);
    assert_eq!(queue.wait(&guest.memory), (head, 513));
    assert_eq!(guest.status(0), 0);
    server.stop();
}

#[test]
fn hostile_front_ends_are_cut_off_and_the_next_one_is_served() {
    let place = Place::new("front");
    let server = serve(&place);
    let message = |request: u32, flags: u32, body: &[u8]| {
        let size = (body.len() as u32).to_le_bytes();
        [&request.to_le_bytes()[..], &flags.to_le_bytes(), &size, body].concat()
    };
    for bytes in [
        vec![0xff; 64],
        message(1, 2, &[]),                       // another version
        message(1, 5, &[]),                       // a reply
        message(9999, 1, &[]),                    // unknown
        message(5, 1, &[0; 8]),                   // SET_MEM_TABLE without regions
        message(5, 1, &[1, 0, 0, 0, 0, 0, 0, 0]), // one, and none
        message(8, 1, &[0; 7]),                   // SET_VRING_NUM, too short
        message(8, 1, &[0xff; 8]),                // of a queue that is not there
        message(12, 1, &[0; 8]),                  // SET_VRING_KICK without a kick
        message(24, 1, &[0xff; 12]),              // GET_CONFIG of everything
        message(6, 1, &[0xff; 16]),               // SET_LOG_BASE without a log
        message(31, 1, &[0xff; 24]),              // GET_INFLIGHT_FD of 65535 queues
        message(1, 1, &[])[..7].to_vec(),         // half a message
        [message(1, 1, &[]), message(11, 1, &[0; 8])].concat(),
    ] {
        let mut stream = UnixStream::connect(place.socket()).unwrap();
        stream.write_all(&bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        // Ends by itself, answered or not.
        let _ = stream.read_to_end(&mut answer); // a reset is an end, too
        assert!(answer.len() <= 64, "{bytes:?}");
    }
    let mut guest = Guest::connect(&place.socket(), Setup::default());
    assert_eq!(guest.read(0, 512), [0; 512]);
    server.stop();
}
