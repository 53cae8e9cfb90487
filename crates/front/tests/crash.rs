//! The promises of flush, FUA and multi-conn, by power cuts: several clients of one export on a simulated lane, the
//! disk behind it recorded, cut at every event.
#![allow(clippy::unwrap_used)] // a test may

use std::cell::Cell;
use std::rc::Rc;

use block::crash::{CrashLog, Witness};
use block::{
    Disk, DiskError, Extents, Generation, Io, MemoryDisk, Safe, Sector, Segments, SegmentsMut, Shape,
};
use front::nbd::client::{self, Client};
use front::nbd::{Exports, NewExport, Options, Server, Tls, Wire};
use lane::net::Stream;

const SECTORS: u64 = 512;

/// Sends each operation through another connection, flushes too: one flush must cover all of them.
struct Spread {
    clients: Vec<Rc<Client>>,
    next: Cell<usize>,
}

impl Spread {
    fn next(&self) -> &Rc<Client> {
        let next = self.next.replace(self.next.get() + 1);
        &self.clients[next % self.clients.len()]
    }
}

impl Disk for Spread {
    fn shape(&self) -> Shape {
        self.clients[0].shape()
    }
    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        self.next().read(at, into)
    }
    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a> {
        self.next().write(at, from, safe)
    }
    fn zero(&self, at: Sector, count: u64, may_free: bool) -> Io<'_> {
        self.next().zero(at, count, may_free)
    }
    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        self.next().unmap(at, count)
    }
    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        self.next().status(at, count, since, out)
    }
    fn compare_and_write<'a>(
        &'a self,
        at: Sector,
        expected: &'a Segments<'a>,
        new: &'a Segments<'a>,
    ) -> Io<'a> {
        self.next().compare_and_write(at, expected, new)
    }
    fn flush(&self) -> Io<'_> {
        self.next().flush()
    }
}

/// Answers flushes without doing them, and takes FUA for nothing: the fault that this file must find.
struct Lying(Rc<dyn Disk>);

impl Disk for Lying {
    fn shape(&self) -> Shape {
        self.0.shape()
    }
    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        self.0.read(at, into)
    }
    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, _safe: Safe) -> Io<'a> {
        self.0.write(at, from, Safe::AtNextFlush)
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
        self.0.compare_and_write(at, expected, new)
    }
    fn flush(&self) -> Io<'_> {
        Box::pin(std::future::ready(Ok(())))
    }
}

fn seeds() -> std::ops::Range<u64> {
    let one = std::env::var("KAGAMI_SEED").ok().and_then(|seed| seed.parse().ok());
    match one {
        Some(seed) => seed..seed + 1,
        None if std::env::var_os("KAGAMI_SOAK").is_some() => 1..400,
        None => 1..7,
    }
}

/// Writes, FUA writes, zeroes and flushes, drawn from a seed. Errors end it: the connection may be cut.
async fn work(disk: Rc<dyn Disk>, seed: u64, operations: u32) -> Result<(), DiskError> {
    let mut dice = fastrand::Rng::with_seed(seed);
    for _ in 0..operations {
        let (at, count) = (dice.u64(..SECTORS - 16), dice.u64(1..16));
        let data: Vec<u8> = (0..count * 512).map(|_| dice.u8(1..)).collect();
        match dice.u8(..10) {
            0 => disk.flush().await?,
            1 => disk.zero(Sector(at), count, dice.bool()).await?,
            2 => disk.write(Sector(at), &Segments::new(&data), Safe::OnReturn).await?,
            _ => disk.write(Sector(at), &Segments::new(&data), Safe::AtNextFlush).await?,
        }
    }
    Ok(())
}

/// Three clients, four writers over them; `cut_after` cuts one connection after so many yields.
async fn run(seed: u64, cut_after: Option<u32>, lying: bool) -> Result<(), String> {
    let log = CrashLog::new(seed);
    log.interleave(3);
    let disk: Rc<dyn Disk> = log.disk(SECTORS);
    let disk = if lying { Rc::new(Lying(disk)) } else { disk };
    let exports = Exports::new();
    let export = exports.add(NewExport::new("d", disk)).unwrap();
    let server = Server::new(exports, Options::default());
    let options = client::Options { export: "d".into(), ..client::Options::default() };
    let mut clients = Vec::new();
    for _ in 0..3 {
        let (near, far) = Stream::pair().unwrap();
        drop(server.serve(Wire::Socket(far), "crash".into(), &Tls::Off));
        clients.push(Client::connect(Wire::Socket(near), &options).await.unwrap());
    }
    let spread = Rc::new(Spread { clients: clients.clone(), next: Cell::new(0) });
    let witness = Witness::new(&log, spread);
    let writers: Vec<_> =
        (0..4).map(|n| lane::spawn(work(Rc::clone(&witness) as Rc<dyn Disk>, seed * 31 + n, 12))).collect();
    if let Some(after) = cut_after {
        for _ in 0..after {
            lane::sleep(std::time::Duration::from_micros(20)).await;
        }
        clients[1].cut();
    }
    for writer in writers {
        let result = writer.await;
        assert!(cut_after.is_some() || result.is_ok(), "seed {seed}: {result:?}");
    }
    server.close().await;
    assert_eq!(export.counts().in_flight(), 0, "seed {seed}: a request is left");
    for point in 0..=log.points() {
        for fate in 0..3 {
            let found = MemoryDisk::from(log.cut(point, seed.wrapping_mul(fate) + fate).remove(0));
            if let Err(violation) = witness.judge(point, &found).await {
                return Err(format!("KAGAMI_SEED={seed} point {point} fate {fate}: {violation:?}"));
            }
        }
    }
    Ok(())
}

fn on_a_simulated_lane(seed: u64, cut_after: Option<u32>, lying: bool) -> Result<(), String> {
    let driver = lane::DriverKind::Sim { seed };
    lane::block_on_with(lane::Options { driver, ..lane::Options::default() }, run(seed, cut_after, lying))
}

#[test]
fn what_a_flush_covered_survives_a_crash_whoever_wrote_it() {
    for seed in seeds() {
        on_a_simulated_lane(seed, None, false).unwrap();
    }
}

#[test]
fn a_client_cut_off_leaves_nothing_half_promised_after_a_crash() {
    for seed in seeds() {
        on_a_simulated_lane(seed, Some((seed % 40) as u32), false).unwrap();
    }
}

#[test]
fn a_flush_left_out_is_found_by_a_crash() {
    for seed in seeds() {
        assert!(on_a_simulated_lane(seed, None, true).is_err(), "seed {seed} does not notice");
    }
}
