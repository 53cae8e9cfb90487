//! The daemon is killed in each phase of a backup by redo logs, under a writer that waits for each of its writes to be
//! durable: afterwards the disks hold exactly what was answered, nothing of the backup is left, and the next one works.
#![allow(clippy::unwrap_used)] // a test says by it what must hold

mod common;

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use block::{Disk, DiskError, Safe, Sector, Segments, SegmentsMut};
use common::Place;
use front::nbd::Wire;
use front::nbd::client::{Client, Options};
use serde_json::Value;

const SLOTS: [&str; 2] = ["scsi0:0", "scsi0:1"];
/// Blocks of 4 KiB of each disk that the numbers go to, one after the other.
const RING: u64 = 512;
const BLOCK: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(60);

/// Pool, datastore, VM `sql01` with C: (32 MiB, VMFS) and D: (16 MiB, RDM), both served.
fn with_vm(name: &str) -> Place {
    let place = Place::new(name);
    place.ok(&["pool", "create", "p1", "--size", "2G"]);
    place.ok(&["datastore", "create", "ds1", "--size", "1G"]);
    place.ok(&["lun", "create", "sql01-d", "--size", "16M"]);
    place.ok(&["vm", "create", "sql01", "--datastore", "ds1", "--disk", "32M", "--rdm", "sql01-d:physical"]);
    for slot in SLOTS {
        place.ok(&["export", "start", &format!("sql01/{slot}")]);
    }
    // Something to copy, behind the ring.
    lane::block_on(async {
        let disk = connect(&place.home().join("nbd.sock"), SLOTS[0]).await.unwrap();
        for mebibyte in 4..32_u64 {
            let bytes = vec![mebibyte as u8; 1 << 20];
            disk.write(Sector(mebibyte * 2048), &Segments::new(&bytes), Safe::AtNextFlush).await.unwrap();
        }
        disk.flush().await.unwrap();
        disk.disconnect().await;
    });
    place
}

async fn connect(socket: &PathBuf, slot: &str) -> Result<Rc<Client>, String> {
    let stream = lane::net::Stream::connect_unix(socket).await.map_err(|e| e.to_string())?;
    let options = Options { export: format!("sql01/{slot}"), ..Options::default() };
    Client::connect(Wire::Socket(stream), &options).await.map_err(|e| e.to_string())
}

/// Write number `n` goes to disk `n % 2`, and is flushed before `n + 1` begins.
struct Writer {
    stop: Arc<AtomicBool>,
    durable: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Writer {
    /// Goes on after `last`; ends when told, or when the daemon is gone.
    fn start(place: &Place, last: u64) -> Self {
        let (stop, durable) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(last)));
        let (stopping, answered) = (Arc::clone(&stop), Arc::clone(&durable));
        let socket = place.home().join("nbd.sock");
        let thread = std::thread::spawn(move || {
            lane::block_on(async {
                let mut disks = Vec::new();
                for slot in SLOTS {
                    match connect(&socket, slot).await {
                        Ok(disk) => disks.push(disk),
                        Err(_) => return,
                    }
                }
                for number in last + 1.. {
                    if stopping.load(Ordering::Relaxed) || put(&disks, number).await.is_err() {
                        return;
                    }
                    answered.store(number, Ordering::Relaxed);
                }
            });
        });
        Self { stop, durable, thread }
    }

    /// The last number that was answered as durable.
    fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        self.durable.load(Ordering::Relaxed)
    }
}

async fn put(disks: &[Rc<Client>], number: u64) -> Result<(), DiskError> {
    let disk = &disks[(number % 2) as usize];
    let bytes: Vec<u8> = number.to_le_bytes().into_iter().cycle().take(BLOCK).collect();
    disk.write(Sector(number / 2 % RING * 8), &Segments::new(&bytes), Safe::AtNextFlush).await?;
    disk.flush().await
}

/// The disks hold all numbers up to `durable`, perhaps the one that was under way, and none else.
fn one_prefix(place: &Place, durable: u64) -> u64 {
    let socket = place.home().join("nbd.sock");
    let found = lane::block_on(async {
        let mut found = Vec::new();
        for slot in SLOTS {
            let disk = connect(&socket, slot).await.unwrap();
            let mut bytes = vec![0; RING as usize * BLOCK];
            disk.read(Sector(0), &SegmentsMut::new(&mut bytes)).await.unwrap();
            disk.disconnect().await;
            let number = |block: &[u8]| {
                let number = u64::from_le_bytes(block[..8].try_into().unwrap());
                assert!(block.as_chunks::<8>().0.iter().all(|w| *w == number.to_le_bytes()), "a torn block");
                number
            };
            found.push(bytes.chunks(BLOCK).map(number).collect::<Vec<u64>>());
        }
        found
    });
    let last = found.iter().flatten().copied().max().unwrap();
    assert!(last == durable || last == durable + 1, "answered up to {durable}, found up to {last}");
    for (disk, numbers) in found.iter().enumerate() {
        for (place, number) in numbers.iter().enumerate() {
            let fits = |n: &u64| n % 2 == disk as u64 && n / 2 % RING == place as u64;
            // The newest number that went here, up to the last; 0 when none did.
            let newest = (0..2 * RING).filter_map(|back| last.checked_sub(back)).find(|n| *n > 0 && fits(n));
            assert_eq!(*number, newest.unwrap_or(0), "disk {disk}, block {place}, last {last}");
        }
    }
    last
}

fn jobs(place: &Place) -> Vec<Value> {
    match std::panic::catch_unwind(|| place.rest("GET", "/api/v1/jobs", "")) {
        Ok((200, _, body)) => serde_json::from_str(&body).unwrap_or_default(),
        _ => Vec::new(),
    }
}

fn running(place: &Place) -> Option<Value> {
    jobs(place).into_iter().find(|j| j["state"] == "running")
}

/// Starts a backup by redo logs unless one runs already, as a restarted daemon begins an interrupted one again.
fn back_up(place: &Place, limit: &str) {
    if running(place).is_none() {
        let repo = place.dir().join("repo");
        let words =
            ["--repo", repo.to_str().unwrap(), "--via", "redo", "--limit", limit, "--full", "--detach"];
        place.ok(&[&["backup", "create", "sql01"], &words[..]].concat());
    }
}

/// After a kill: everything comes to rest by itself, and is as it must be.
fn at_rest(place: &Place, durable: u64) -> u64 {
    // Any command starts the daemon.
    place.ok(&["vm", "show", "sql01"]);
    let last = one_prefix(place, durable);
    let begun = Instant::now();
    loop {
        let vm = place.json(&["vm", "show", "sql01"]);
        assert_eq!(vm["set_aside"], serde_json::json!([]), "{vm}");
        if running(place).is_none() && vm["state"] == "ok" {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "no rest: {vm}, {:?}", running(place));
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(one_prefix(place, last), last, "what was there before the commit is there after it");
    let disks = place.json(&["disk", "ls", "ds1"]);
    assert_eq!(disks.as_array().unwrap().len(), 2, "no redo log is left: {disks}");
    assert_eq!(place.json(&["serve", "--status"])["troubles"], serde_json::json!([]));
    last
}

/// Another backup by redo logs goes through, and the checkers find leaks at most.
fn works_again(place: &Place) {
    let repo = place.dir().join("repo");
    place.ok(&["backup", "create", "sql01", "--repo", repo.to_str().unwrap(), "--via", "redo"]);
    assert_eq!(place.json(&["vm", "show", "sql01"])["state"], "ok");
    let out = place.run(&["datastore", "check", "ds1", "-o", "json"]);
    let checked: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(checked["verdict"] == "clean" || checked["verdict"] == "leaks", "{checked}");
    assert_eq!(place.json(&["pool", "check", "p1"])["verdict"], "clean");
}

/// Kills the daemon when the backup is in `phase`, a little later each time, until it was met there so often.
fn killed_in(name: &str, phase: &str, limit: &str, times: u32, later: Duration) {
    let place = with_vm(name);
    let (mut last, mut met) = (0, 0_u32);
    for _ in 0..20 * times {
        let writer = Writer::start(&place, last);
        back_up(&place, limit);
        let begun = Instant::now();
        while let Some(job) = running(&place) {
            if job["phase"] == phase {
                std::thread::sleep(later * met);
                met += 1;
                break;
            }
            assert!(begun.elapsed() < PATIENCE, "{job}");
        }
        place.kill_daemon();
        last = at_rest(&place, writer.end());
        if met == times {
            return works_again(&place);
        }
    }
    panic!("met in phase {phase} {met} times only");
}

#[test]
fn killed_while_it_prepares_nothing_is_left() {
    killed_in("killprepare", "cut", "1G", 4, Duration::from_millis(3));
}

#[test]
fn killed_while_it_copies_the_redo_logs_are_committed() {
    killed_in("killcopy", "copy", "64M", 2, Duration::from_millis(3));
}

#[test]
fn killed_while_it_commits_the_commit_ends_at_the_next_start() {
    killed_in("killcommit", "commit", "1G", 3, Duration::from_millis(3));
}

#[test]
fn killed_in_the_flip_the_disk_is_on_its_base_or_on_its_redo_log() {
    killed_in("killflip", "flip", "1G", 4, Duration::from_micros(700));
}

#[test]
fn soak_kill_at_any_moment_of_backups_by_redo_logs() {
    let kills = if std::env::var_os("KAGAMI_SOAK").is_some() { 500 } else { 3 };
    let seed = std::env::var("KAGAMI_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let mut random = fastrand::Rng::with_seed(seed);
    let place = with_vm("killany");
    let mut last = 0;
    for _ in 0..kills {
        let writer = Writer::start(&place, last);
        back_up(&place, "128M");
        std::thread::sleep(Duration::from_millis(random.u64(0..600)));
        place.kill_daemon();
        last = at_rest(&place, writer.end());
    }
    works_again(&place);
}
