//! The daemon is killed in each phase of a backup by redo logs, under a writer that waits for each of its writes to be
//! durable: afterwards the disks hold exactly what was answered, nothing of the backup is left, and the next one works.
#![allow(clippy::unwrap_used)] // a test says by it what must hold

mod common;

use std::time::{Duration, Instant};

use block::{Disk, Safe, Sector, Segments};
use common::Place;
use common::writer::{SLOTS, Writer, connect, one_prefix};
use serde_json::Value;

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
        let disk = connect(&place.home().join("nbd.sock"), "sql01/scsi0:0").await.unwrap();
        for mebibyte in 4..32_u64 {
            let bytes = vec![mebibyte as u8; 1 << 20];
            disk.write(Sector(mebibyte * 2048), &Segments::new(&bytes), Safe::AtNextFlush).await.unwrap();
        }
        disk.flush().await.unwrap();
        disk.disconnect().await;
    });
    place
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
    let last = one_prefix(place, "sql01", durable);
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
    assert_eq!(one_prefix(place, "sql01", last), last, "what was there before the commit is there after it");
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
        let writer = Writer::start(&place, "sql01", last);
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
        let writer = Writer::start(&place, "sql01", last);
        back_up(&place, "128M");
        std::thread::sleep(Duration::from_millis(random.u64(0..600)));
        place.kill_daemon();
        last = at_rest(&place, writer.end());
    }
    works_again(&place);
}
