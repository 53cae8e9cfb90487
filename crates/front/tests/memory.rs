//! Server and client over a connection in memory, and a client made of single bytes for what ours never sends.

mod common;

use std::rc::Rc;
use std::time::Duration;

use block::conformance;
use block::decorate::{self, Decorated, Hold};
use block::{Disk, DiskError, Extents, Generation, Kind, MemoryDisk, Safe, Sector, Segments, SegmentsMut};
use common::changing::{Changing, FIVE};
use common::{Raw, serve};
use front::nbd::client::{self, Client};
use front::nbd::format::{can, chunk, command, flag, option, reply};
use front::nbd::{Ending, Exports, NewExport, Options, Refused, Removal, Server, State, Tls, Wire};
use front::request::Operation;

async fn client(server: &Rc<Server>, export: &str) -> Rc<Client> {
    let (near, far) = Wire::pair();
    drop(server.serve(far, "test".into(), &Tls::Off));
    let options = client::Options { export: export.into(), ..client::Options::default() };
    Client::connect(near, &options).await.expect("the handshake works")
}

#[test]
fn client_and_server_together_are_a_disk() {
    lane::block_on(async {
        let server = serve(NewExport::new("d", Rc::new(MemoryDisk::new(4096))));
        let client = client(&server, "d").await;
        conformance::check(Rc::clone(&client) as Rc<dyn Disk>, 7).await;
        client.disconnect().await;
        server.close().await;
    });
}

#[test]
fn a_read_only_export_is_a_read_only_disk() {
    lane::block_on(async {
        let disk = MemoryDisk::from_bytes(&[9; 64 * 512]);
        let server = serve(NewExport { read_only: true, ..NewExport::new("d", Rc::new(disk)) });
        let client = client(&server, "d").await;
        conformance::check_read_only(Rc::clone(&client) as Rc<dyn Disk>).await;
        // Our client refuses by itself; one that does not is refused with EPERM.
        let mut raw = Raw::go(&server, "d", true).await;
        for kind in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            raw.request(kind, 0, u64::from(kind), 0, 512).await;
            if kind == command::WRITE {
                raw.send(&[0; 512]).await;
            }
            assert_eq!(raw.error(u64::from(kind)).await, 1, "command {kind}");
        }
        client.disconnect().await;
        server.close().await;
    });
}

#[test]
fn bytes_that_are_no_sectors_are_served() {
    lane::block_on(async {
        let disk = Rc::new(MemoryDisk::new(64));
        let server = serve(NewExport::new("d", Rc::clone(&disk) as Rc<dyn Disk>));
        let mut raw = Raw::go(&server, "d", true).await;
        let mut model = vec![0u8; 64 * 512];
        for (n, (offset, length)) in
            [(1usize, 1usize), (511, 2), (700, 5000), (0, 513), (32_000, 768), (5, 0)].iter().enumerate()
        {
            let bytes: Vec<u8> = (0..*length).map(|i| (i + n) as u8 | 1).collect();
            raw.request(command::WRITE, flag::FUA, 5, *offset as u64, *length as u32).await;
            raw.send(&bytes).await;
            raw.success(5).await;
            model[*offset..offset + length].copy_from_slice(&bytes);
        }
        raw.request(command::WRITE_ZEROES, 0, 6, 1000, 3000).await;
        raw.success(6).await;
        model[1000..4000].fill(0);
        assert!(disk.to_bytes() == model);
        for (offset, length) in [(0, 64 * 512), (1, 1), (509, 7), (999, 3003), (32_767, 1)] {
            assert!(raw.read(offset, length).await == model[offset as usize..][..length as usize]);
        }
        // A trim never touches what was not named.
        raw.request(command::TRIM, 0, 7, 4100, 3000).await;
        raw.success(7).await;
        let after = disk.to_bytes();
        assert!(after[..4100] == model[..4100] && after[7100..] == model[7100..]);
        server.close().await;
    });
}

#[test]
fn wrong_requests_get_the_right_errors() {
    const EINVAL: u32 = 22;
    const ENOSPC: u32 = 28;
    const EOVERFLOW: u32 = 75;
    lane::block_on(async {
        let server = serve(NewExport::new("d", Rc::new(MemoryDisk::new(1 << 20))));
        let size = (1 << 20) * 512;
        for structured in [true, false] {
            let mut raw = Raw::go(&server, "d", structured).await;
            let table = [
                (command::READ, 0, size - 511, 512, EINVAL),
                (command::READ, 0, u64::MAX, 1, EINVAL),
                (command::READ, 0, 0, (32 << 20) + 1, EOVERFLOW),
                (command::WRITE, 0, size, 512, ENOSPC),
                (command::WRITE, 0x8000, 0, 512, EINVAL),
                (command::WRITE, flag::DF, 0, 512, EINVAL),
                (command::WRITE_ZEROES, 0, size - 1, 2, ENOSPC),
                (command::WRITE_ZEROES, flag::FAST_ZERO, 0, 512, EINVAL),
                (command::TRIM, 0, size, 1, EINVAL),
                (command::TRIM, flag::NO_HOLE, 0, 1, EINVAL),
                (command::BLOCK_STATUS, 0, 0, 512, EINVAL),
                (command::CACHE, 0, size, 1, EINVAL),
                (9, 0, 0, 0, EINVAL),
                (0xffff, 0xffff, u64::MAX, u32::MAX, EINVAL),
            ];
            for (n, (kind, flags, offset, length, expected)) in table.into_iter().enumerate() {
                raw.request(kind, flags, n as u64, offset, length).await;
                if kind == command::WRITE {
                    raw.send(&vec![1; length as usize]).await;
                }
                assert_eq!(raw.error(n as u64).await, expected, "row {n} structured {structured}");
            }
            assert_eq!(raw.read(0, 512).await, [0; 512], "the connection goes on");
        }
        assert_eq!(server.exports().list()[0].in_flight, 0);
        server.close().await;
    });
}

#[test]
fn zeroes_travel_as_holes() {
    lane::block_on(async {
        let disk = Rc::new(MemoryDisk::new(8192));
        disk.write(Sector(256), &Segments::new(&[7; 4096]), Safe::AtNextFlush).await.unwrap();
        disk.write(Sector(512), &Segments::new(&[0; 65536]), Safe::AtNextFlush).await.unwrap();
        disk.write(Sector(1024), &Segments::new(&[8; 100 * 512]), Safe::AtNextFlush).await.unwrap();
        let server = serve(NewExport::new("d", Rc::clone(&disk) as Rc<dyn Disk>));
        let mut raw = Raw::go(&server, "d", true).await;
        let model = disk.to_bytes();
        for (offset, length) in
            [(0, 1 << 20), (0, 4 << 20), (1, (2 << 20) - 7), (100_000, 65_536), (131_072 + 4096, 70_001)]
        {
            let before = raw.received;
            let found = raw.read(offset, length).await;
            assert!(found == model[offset as usize..][..length as usize], "{length} bytes at {offset}");
            assert!(raw.received - before < 64 << 10, "holes are not sent as zeroes");
        }
        // Unless the client wants one piece.
        raw.request(command::READ, flag::DF, 9, 0, 1 << 20).await;
        let (kind, flags, _, data) = raw.chunk().await;
        assert_eq!((kind, flags, data.len()), (chunk::OFFSET_DATA, chunk::DONE, (1 << 20) + 8));
        assert!(data[8..] == model[..1 << 20]);
        server.close().await;
    });
}

#[test]
fn reads_of_any_layout_come_back_whole() {
    lane::block_on(async {
        let mut dice = fastrand::Rng::with_seed(42);
        let disk = Rc::new(MemoryDisk::new(8192));
        for _ in 0..60 {
            let (at, count) = (dice.u64(..8000), dice.u64(1..190));
            let fill = if dice.u8(..3) == 0 { 0 } else { dice.u8(..) };
            let data = vec![fill; count as usize * 512];
            disk.write(Sector(at), &Segments::new(&data), Safe::AtNextFlush).await.unwrap();
            let (at, count) = (dice.u64(..8000), dice.u64(1..190));
            disk.unmap(Sector(at), count).await.unwrap();
        }
        let model = disk.to_bytes();
        let server = serve(NewExport::new("d", Rc::clone(&disk) as Rc<dyn Disk>));
        let mut raw = Raw::go(&server, "d", true).await;
        for _ in 0..300 {
            let longest = [1 << 12, 1 << 17, 3 << 20][dice.usize(..3)];
            let length = dice.u32(1..longest);
            let offset = dice.u64(..(4 << 20) - u64::from(length) + 1);
            let found = raw.read(offset, length).await;
            assert!(found == model[offset as usize..][..length as usize], "{length} bytes at {offset}");
        }
        server.close().await;
    });
}

#[test]
fn changes_are_told_per_snapshot() {
    lane::block_on(async {
        let disk = Changing(MemoryDisk::new(2048));
        disk.write(Sector(8), &Segments::new(&[1; 4096]), Safe::AtNextFlush).await.unwrap();
        let gone = Generation { counter: 1, id: 1 };
        let server = serve(NewExport {
            changed: vec![("mon".into(), FIVE), ("gone".into(), gone)],
            ..NewExport::new("d", Rc::new(disk))
        });
        let (near, far) = Wire::pair();
        drop(server.serve(far, "test".into(), &Tls::Off));
        let changed = vec![
            (FIVE, "kagami:changed:mon".to_string()),
            (gone, "kagami:changed:gone".to_string()),
            (Generation { counter: 9, id: 9 }, "kagami:changed:never".to_string()),
        ];
        let options = client::Options { export: "d".into(), changed, tls: None };
        let client = Client::connect(near, &options).await.unwrap();
        assert_eq!(client.contexts().count(), 3);
        let status = async |since| {
            let mut out = Extents::with_limit(100);
            client.status(Sector(0), 2048, since, &mut out).await.map(|()| out)
        };
        let kinds: Vec<_> = status(None).await.unwrap().iter().map(|e| (e.count, e.kind)).collect();
        assert_eq!(kinds, [(8, Kind::Hole), (8, Kind::Data), (2032, Kind::Hole)]);
        let halves: Vec<_> = status(Some(FIVE)).await.unwrap().iter().map(|e| (e.count, e.changed)).collect();
        assert_eq!(halves, [(8, false), (8, false), (1008, false), (1024, true)]);
        // R45: a generation that is gone reads as "everything", one that nobody offers is an error.
        assert!(status(Some(gone)).await.unwrap().iter().all(|e| e.changed));
        let never = status(Some(Generation { counter: 9, id: 9 })).await;
        assert!(matches!(never, Err(DiskError::UnknownGeneration)));
        client.disconnect().await;
        server.close().await;
    });
}

#[test]
fn contexts_are_listed_by_query() {
    lane::block_on(async {
        let server = serve(NewExport {
            changed: vec![("a".into(), FIVE), ("b".into(), FIVE)],
            ..NewExport::new("d", Rc::new(MemoryDisk::new(8)))
        });
        let mut raw = Raw::greet(&server, 3).await;
        let query = |queries: &[&str]| {
            let mut data = [&[0, 0, 0, 1][..], b"d", &(queries.len() as u32).to_be_bytes()].concat();
            for query in queries {
                data.extend((query.len() as u32).to_be_bytes());
                data.extend(query.as_bytes());
            }
            data
        };
        raw.option(option::LIST_META_CONTEXT, &query(&[])).await;
        assert_eq!(raw.reply().await.0, reply::ERR_INVALID, "structured replies come first");
        raw.option(option::STRUCTURED_REPLY, &[]).await;
        assert_eq!(raw.reply().await.0, reply::ACK);
        for (number, queries, expected) in [
            (option::LIST_META_CONTEXT, &[][..], 3),
            (option::LIST_META_CONTEXT, &["kagami:"], 2),
            (option::LIST_META_CONTEXT, &["kagami:changed:", "base:"], 3),
            (option::LIST_META_CONTEXT, &["kagami:changed:b"], 1),
            (option::LIST_META_CONTEXT, &["qemu:", "x-y:z"], 0),
            (option::SET_META_CONTEXT, &["kagami:", "base:"], 0),
            (option::SET_META_CONTEXT, &["kagami:changed:a", "base:allocation"], 2),
            (option::SET_META_CONTEXT, &[], 0),
        ] {
            raw.option(number, &query(queries)).await;
            let mut found = 0;
            loop {
                match raw.reply().await.0 {
                    reply::META_CONTEXT => found += 1,
                    reply::ACK => break,
                    other => panic!("{queries:?} answered {other:#x}"),
                }
            }
            assert_eq!(found, expected, "{queries:?}");
        }
        server.close().await;
    });
}

#[test]
fn hostile_handshakes_are_refused_or_cut() {
    lane::block_on(async {
        let server = serve(NewExport::new("d", Rc::new(MemoryDisk::new(8))));
        let mut raw = Raw::greet(&server, 3).await;
        let long = vec![0xff; 70_000];
        for (number, data, expected) in [
            (option::STARTTLS, &b""[..], reply::ERR_UNSUP),
            (77, b"xyz", reply::ERR_UNSUP),
            (option::EXTENDED_HEADERS, b"", reply::ERR_UNSUP),
            (option::LIST, b"x", reply::ERR_INVALID),
            (option::STRUCTURED_REPLY, b"x", reply::ERR_INVALID),
            (option::GO, b"", reply::ERR_INVALID),
            (option::GO, b"\0\0\0\x01d\0\x09", reply::ERR_INVALID),
            (option::GO, b"\xff\xff\xff\xffd\0\0", reply::ERR_INVALID),
            (option::INFO, b"\0\0\0\x02no\0\0", reply::ERR_UNKNOWN),
            (option::INFO, &long, reply::ERR_TOO_BIG),
        ] {
            raw.option(number, data).await;
            assert_eq!(raw.reply().await.0, expected, "option {number}");
        }
        raw.option(option::ABORT, &[]).await;
        assert_eq!(raw.reply().await.0, reply::ACK);
        assert!(raw.ended().await);

        let ending = |bytes: Vec<u8>| {
            let server = Rc::clone(&server);
            async move {
                let (near, far) = Wire::pair();
                let task = server.serve(far, "test".into(), &Tls::Off);
                near.send(&Segments::new(&bytes)).await.unwrap();
                // Closing our side must end it whatever was left open.
                let mut sink = vec![0; 4096];
                for _ in 0..20 {
                    lane::yield_now().await;
                }
                near.shut();
                while near.receive(&SegmentsMut::new(&mut sink)).await.unwrap() > 0 {}
                task.await
            }
        };
        let option = |number: u32, length: u32| {
            [&[0, 0, 0, 3][..], b"IHAVEOPT", &number.to_be_bytes(), &length.to_be_bytes()].concat()
        };
        assert!(matches!(ending(vec![0, 0, 0, 0xff]).await, Ending::ClientFlags(0xff)));
        assert!(matches!(ending(vec![0, 0]).await, Ending::Hangup(_)));
        assert!(matches!(ending(vec![0, 0, 0, 3]).await, Ending::Clean));
        assert!(matches!(ending(vec![3; 20]).await, Ending::ClientFlags(_)));
        assert!(matches!(ending([&[0; 4][..], &[9; 16]].concat()).await, Ending::BadMagic { .. }));
        assert!(matches!(ending(option(option::GO, u32::MAX)).await, Ending::OptionTooLong(_)));
        assert!(matches!(ending(option(option::EXPORT_NAME, 1 << 17)).await, Ending::OptionTooLong(_)));
        assert!(matches!(ending(option(option::GO, 500)).await, Ending::Hangup(_)));
        let wrong_name = [&option(option::EXPORT_NAME, 1)[..], b"x"].concat();
        assert!(matches!(ending(wrong_name).await, Ending::NoSuchExport));
        assert!(server.connections().is_empty());
        server.close().await;
    });
}

#[test]
fn hostile_requests_end_the_connection() {
    lane::block_on(async {
        let server = serve(NewExport::new("d", Rc::new(MemoryDisk::new(1 << 20))));
        let mut raw = Raw::go(&server, "d", true).await;
        raw.request(command::WRITE, 0, 1, 0, (32 << 20) + 1).await;
        assert!(raw.ended().await, "a write longer than advertised");
        let mut raw = Raw::go(&server, "d", true).await;
        raw.send(&[0x55; 28]).await;
        assert!(raw.ended().await, "garbage");
        let raw = Raw::go(&server, "d", true).await;
        raw.request(command::WRITE, 0, 1, 0, 5000).await;
        raw.send(&[0; 100]).await;
        raw.wire.shut();
        while !server.connections().is_empty() {
            lane::yield_now().await;
        }
        assert_eq!(server.exports().get("d").unwrap().counts().in_flight(), 0);
        server.close().await;
    });
}

#[test]
fn the_old_way_to_choose_an_export_works() {
    lane::block_on(async {
        let server = serve(NewExport::new("d", Rc::new(MemoryDisk::new(8))));
        for flags in [0, 1, 2, 3] {
            let mut raw = Raw::greet(&server, flags).await;
            raw.option(option::EXPORT_NAME, b"d").await;
            let answer = raw.take(if flags & 2 == 0 { 134 } else { 10 }).await;
            assert_eq!(answer[..8], 4096u64.to_be_bytes());
            raw.structured = false;
            assert_eq!(raw.read(100, 1000).await, [0; 1000]);
            raw.request(command::DISC, 0, 0, 0, 0).await;
            assert!(raw.ended().await);
        }
        server.close().await;
    });
}

#[test]
fn a_grown_disk_shows_its_size_to_the_next_client() {
    lane::block_on(async {
        let disk = Rc::new(MemoryDisk::new(8));
        let server = serve(NewExport::new("d", Rc::clone(&disk) as Rc<dyn Disk>));
        let before = client(&server, "d").await;
        disk.resize(16);
        let after = client(&server, "d").await;
        assert_eq!((before.shape().sectors, after.shape().sectors), (8, 16));
        after.write(Sector(15), &Segments::new(&[1; 512]), Safe::OnReturn).await.unwrap();
        let mut names: Vec<_> = {
            let (near, far) = Wire::pair();
            drop(server.serve(far, "list".into(), &Tls::Off));
            client::list(near, None).await.unwrap()
        };
        assert_eq!(names.pop(), Some(("d".to_string(), String::new())));
        server.close().await;
        assert!(matches!(before.flush().await, Err(DiskError::Gone)));
    });
}

/// A disk whose flushes and reads wait for a permission.
fn slow() -> Rc<Decorated<Hold>> {
    let held = |operation| matches!(operation, decorate::Operation::Read | decorate::Operation::Flush);
    Decorated::new(Rc::new(MemoryDisk::new(64)), Hold::new(held))
}

#[test]
fn answers_come_in_the_order_of_completion() {
    lane::block_on(async {
        let disk = slow();
        let server = serve(NewExport::new("d", Rc::clone(&disk) as Rc<dyn Disk>));
        let mut raw = Raw::go(&server, "d", false).await;
        raw.request(command::FLUSH, 0, 1, 0, 0).await;
        raw.request(command::WRITE, 0, 2, 0, 512).await;
        raw.send(&[1; 512]).await;
        assert_eq!(raw.simple().await, (2, 0), "the write overtakes the flush");
        assert_eq!(server.exports().list()[0].in_flight, 1);
        disk.passing.let_through();
        assert_eq!(raw.simple().await, (1, 0));
        server.close().await;
    });
}

#[test]
fn removing_an_export_cuts_or_waits() {
    lane::block_on(async {
        let disk = slow();
        let server = serve(NewExport::new("d", Rc::clone(&disk) as Rc<dyn Disk>));
        let exports = Rc::clone(server.exports());
        let again = exports.add(NewExport::new("d", Rc::new(MemoryDisk::new(1))));
        assert_eq!(again.err(), Some(Refused::Exists("d".into())));
        let mut raw = Raw::go(&server, "d", false).await;
        raw.request(command::FLUSH, 0, 1, 0, 0).await;
        while exports.list()[0].in_flight == 0 {
            lane::yield_now().await;
        }
        let removal = {
            let exports = Rc::clone(&exports);
            lane::spawn(async move { exports.remove("d", Removal::Drop).await })
        };
        assert!(raw.ended().await);
        let mut late = Raw::greet(&server, 3).await;
        late.option(option::GO, b"\0\0\0\x01d\0\0").await;
        assert_eq!(late.reply().await.0, reply::ERR_UNKNOWN, "nobody new gets in");
        disk.passing.let_through();
        assert!(removal.await);
        assert!(!exports.remove("d", Removal::Drop).await);
        assert_eq!(Rc::strong_count(&disk), 1, "nothing refers to the disk any more");

        exports.add(NewExport::new("d", Rc::clone(&disk) as Rc<dyn Disk>)).unwrap();
        let stays = client(&server, "d").await;
        let removal = {
            let exports = Rc::clone(&exports);
            lane::spawn(async move { exports.remove("d", Removal::Wait).await })
        };
        lane::yield_now().await;
        stays.write(Sector(0), &Segments::new(&[1; 512]), Safe::OnReturn).await.expect("it may stay");
        stays.disconnect().await;
        assert!(removal.await);
        server.close().await;
    });
}

#[test]
fn connections_are_limited_and_listed() {
    lane::block_on(async {
        let exports = Exports::new();
        exports.add(NewExport::new("d", Rc::new(MemoryDisk::new(8)))).unwrap();
        let options = Options {
            connections_max: 3,
            handshakes_max: 1,
            handshake_time: Duration::from_millis(300),
            ..Options::default()
        };
        let server = Server::new(exports, options);
        let (half_open, far) = Wire::pair();
        let late = server.serve(far, "late".into(), &Tls::Off);
        lane::yield_now().await;
        let (_near, far) = Wire::pair();
        assert!(matches!(server.serve(far, "second".into(), &Tls::Off).await, Ending::Crowded));
        assert_eq!(server.connections()[0].state, State::Handshake);
        assert!(matches!(late.await, Ending::TimedOut));
        drop(half_open);
        let mut clients = Vec::new();
        for _ in 0..3 {
            clients.push(client(&server, "d").await);
        }
        let (_near, far) = Wire::pair();
        assert!(matches!(server.serve(far, "fourth".into(), &Tls::Off).await, Ending::Crowded));
        let list = server.connections();
        assert!(list.len() == 3 && list.iter().all(|c| c.export.as_deref() == Some("d")));
        assert!(list.iter().all(|c| c.state == State::Transmission && c.peer == "test"));
        server.close().await;
        assert!(server.connections().is_empty());
    });
}

#[test]
fn a_client_that_takes_no_answers_holds_bounded_memory() {
    lane::block_on(async {
        let exports = Exports::new();
        let export = exports.add(NewExport::new("d", Rc::new(MemoryDisk::new(1 << 16)))).unwrap();
        let options = Options { linger: Duration::from_millis(300), ..Options::default() };
        let server = Server::new(exports, options);
        let mut raw = Raw::go(&server, "d", true).await;
        let wire = Rc::clone(&raw.wire);
        let sender = lane::spawn(async move {
            // Unread answers of 1 GiB, were there no bound.
            for n in 0..1024u64 {
                if wire
                    .send(&Segments::new(&Raw::header(command::READ, flag::DF, n, 0, 1 << 20)))
                    .await
                    .is_err()
                {
                    return n;
                }
            }
            1024
        });
        let mut taken_up = 0;
        for _ in 0..2000 {
            lane::yield_now().await;
            taken_up = export.counts().tally(Operation::Read).done;
        }
        assert!((16..=33).contains(&taken_up), "{taken_up} reads were taken up");
        raw.wire.shut();
        assert!(sender.await <= 1024);
        while !server.connections().is_empty() {
            lane::yield_now().await;
        }
        raw.received = 0;
        server.close().await;
    });
}

#[test]
fn answers_about_many_contexts_count_as_memory() {
    lane::block_on(async {
        let disk = MemoryDisk::new(8192 * 8);
        for block in 0..4096 {
            disk.write(Sector(block * 16), &Segments::new(&[1; 512]), Safe::AtNextFlush).await.unwrap();
        }
        let changed: Vec<_> = (0..60).map(|n| (format!("s{n}"), FIVE)).collect();
        let queries: Vec<_> = changed
            .iter()
            .map(|(name, generation)| (*generation, format!("kagami:changed:{name}")))
            .collect();
        let new = NewExport { changed, ..NewExport::new("d", Rc::new(Changing(disk))) };
        let server = serve(new);
        let (near, far) = Wire::pair();
        drop(server.serve(far, "test".into(), &Tls::Off));
        let options = client::Options { export: "d".into(), changed: queries, tls: None };
        let client = Client::connect(near, &options).await.unwrap();
        let mut extents = Extents::with_limit(5000);
        client.status(Sector(0), 8192 * 8, Some(FIVE), &mut extents).await.unwrap();
        assert!(extents.len() > 4000, "asked again for what did not fit: {}", extents.len());
        client.disconnect().await;
        let mut raw = Raw::greet(&server, 3).await;
        raw.option(option::STRUCTURED_REPLY, &[]).await;
        raw.reply().await;
        let mut data = b"\0\0\0\x01d\0\0\0\x3d\0\0\0\x0fbase:allocation".to_vec();
        for n in 0..60 {
            let name = format!("kagami:changed:s{n}");
            data.extend((name.len() as u32).to_be_bytes());
            data.extend(name.as_bytes());
        }
        raw.option(option::SET_META_CONTEXT, &data).await;
        while raw.reply().await.0 == reply::META_CONTEXT {}
        raw.option(option::GO, b"\0\0\0\x01d\0\0").await;
        while raw.reply().await.0 == reply::INFO {}
        for n in 0..256 {
            raw.request(command::BLOCK_STATUS, 0, n, 0, 8192 * 4096).await;
        }
        for _ in 0..1000 {
            lane::yield_now().await;
        }
        let export = server.exports().get("d").unwrap();
        let before = export.counts().tally(Operation::Status).done;
        assert!(before < 60, "{before} answers of up to 1 MiB are held");
        server.close().await;
    });
}

#[test]
fn clients_that_take_no_answers_do_not_starve_others() {
    lane::block_on(async {
        let exports = Exports::new();
        let export = exports.add(NewExport::new("d", Rc::new(MemoryDisk::new(1 << 17)))).unwrap();
        let options = Options { held_bytes_max: 64 << 20, ..Options::default() };
        let server = Server::new(exports, options);
        let mut greedy = Vec::new();
        for _ in 0..4 {
            let raw = Raw::go(&server, "d", true).await;
            for n in 0..2 {
                raw.request(command::READ, flag::DF, n, 0, 32 << 20).await;
            }
            greedy.push(raw);
        }
        for _ in 0..200 {
            lane::yield_now().await;
        }
        let taken_up = export.counts().tally(Operation::Read).done;
        assert_eq!(taken_up, 2, "64 MiB are held by two of them, the others wait");
        let mut modest = Raw::go(&server, "d", true).await;
        assert_eq!(modest.read(0, 100_000).await, vec![0; 100_000]);
        // A client that waits for memory that others hold can be cut off.
        let other = NewExport::new("e", Rc::new(MemoryDisk::new(1 << 17)));
        server.exports().add(other).unwrap();
        let waiting = Raw::go(&server, "e", true).await;
        waiting.request(command::READ, flag::DF, 1, 0, 32 << 20).await;
        lane::yield_now().await;
        assert!(server.exports().remove("e", Removal::Drop).await);
        for raw in greedy {
            raw.wire.shut();
        }
        while server.connections().len() > 1 {
            lane::yield_now().await;
        }
        modest.request(command::READ, flag::DF, 5, 0, 32 << 20).await;
        assert_eq!(modest.chunk().await.3.len(), (32 << 20) + 8, "what was held is free again");
        server.close().await;
    });
}

#[test]
fn flags_tell_what_is_so() {
    let of = |new: NewExport| {
        lane::block_on(async move {
            let server = serve(new);
            let raw = Raw::go(&server, "d", true).await;
            server.close().await;
            raw.flags
        })
    };
    let plain = || NewExport::new("d", Rc::new(MemoryDisk::new(8)));
    let writable = can::SEND_TRIM | can::SEND_WRITE_ZEROES;
    let flags = of(plain());
    assert_eq!(
        flags & (writable | can::MULTI_CONN | can::SEND_FUA),
        writable | can::MULTI_CONN | can::SEND_FUA
    );
    assert_eq!(flags & (can::READ_ONLY | can::SEND_FAST_ZERO), 0);
    assert_ne!(of(NewExport { fast_zero: true, ..plain() }) & can::SEND_FAST_ZERO, 0);
    let snapshot = of(NewExport::new("d", Rc::new(MemoryDisk::new(8).read_only())));
    assert_eq!(snapshot & (writable | can::READ_ONLY), can::READ_ONLY);
}
