//! A real guest on our disks. Run by `./test guest`, which brings QEMU and the kernel.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;
#[path = "guest/machine.rs"]
mod machine;

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::Place;
use machine::{Boot, Guest};
use serde_json::Value;

fn wanted() -> bool {
    if std::env::var_os("KAGAMI_GUEST").is_some() {
        return true;
    }
    eprintln!("SKIPPED: guest tests run by ./test guest");
    false
}

/// What a guest boots from; held by one test at a time, as one guest fills two cores.
fn boot() -> (MutexGuard<'static, ()>, Boot) {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let boot = Boot::prepare(&Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest-cache"));
    (alone, boot)
}

/// A home with VM `sql01`: C: a thin VMDK on VMFS, D: an RDM, a LUN of its own.
fn with_vm(name: &str) -> Place {
    let place = Place::new(name);
    place.ok(&["pool", "create", "p1", "--size", "4G"]);
    place.ok(&["datastore", "create", "ds1", "--size", "4G"]);
    place.ok(&["lun", "create", "sql01-d", "--size", "256M"]);
    place.ok(&["vm", "create", "sql01", "--datastore", "ds1", "--disk", "256M", "--rdm", "sql01-d:physical"]);
    place
}

/// The guest and its judge are sound: on plain files, a plug pulled in the middle leaves good files.
#[test]
fn the_guest_itself_survives_a_pulled_plug() {
    if !wanted() {
        return;
    }
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest-plain");
    std::fs::create_dir_all(&dir).unwrap();
    let (_alone, boot) = boot();
    let disk = |name: &str| {
        let path = dir.join(name);
        let _ = std::fs::remove_file(&path);
        std::fs::File::create(&path).unwrap().set_len(128 << 20).unwrap();
        path.to_string_lossy().into_owned()
    };
    let (c, d) = (disk("c"), disk("d"));
    let mut guest = boot.start("write", &c, &d);
    guest.wait(Duration::from_secs(120), |line| line.starts_with("WROTE d 8 "));
    guest.kill();
    judge(&boot, &c, &d, &Known::of(&guest), None);
}

/// One drive as QEMU names it: an export on the home's NBD socket.
fn drive(place: &Place, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", place.home().join("nbd.sock").display())
}

fn export(place: &Place, vm: &str) -> [String; 2] {
    ["scsi0:0", "scsi0:1"].map(|slot| {
        let name = format!("{vm}/{slot}");
        place.ok(&["export", "start", &name]);
        drive(place, &name)
    })
}

/// Backs the VM up while the guest writes: the backup, what was acknowledged before, the highest number begun after.
fn back_up(place: &Place, guest: &mut Guest, repo: &str, via: &str) -> (Value, Known, u64) {
    guest.drain();
    let before = Known::of(guest);
    let done = place.json(&["backup", "create", "sql01", "--repo", repo, "--via", via]);
    guest.drain();
    let begun = guest.wrote("c") + 1;
    let id = done["id"].as_str().unwrap();
    (place.json(&["backup", "show", id, "--repo", repo]), before, begun)
}

/// Waits until `more` further files are on D:.
fn write_on(guest: &mut Guest, more: u64) {
    let last = guest.wrote("d") + more;
    guest.wait(Duration::from_secs(120), |line| line.starts_with(&format!("WROTE d {last} ")));
}

/// The real input: a Linux writes to C: and D: while backups are made both ways, then its plug is pulled;
/// each backup restored as a new VM is one instant of both disks.
#[test]
fn a_guest_backed_up_while_it_writes_comes_back_whole() {
    if !wanted() {
        return;
    }
    let (_alone, boot) = boot();
    let place = with_vm("guest");
    let repo = place.dir().join("repo");
    let repo = repo.to_str().unwrap();

    let [c, d] = export(&place, "sql01");
    let mut guest = boot.start("write", &c, &d);
    guest.wait(Duration::from_secs(120), |line| line == "READY");
    write_on(&mut guest, 8);
    let first = back_up(&place, &mut guest, repo, "snapshot");
    write_on(&mut guest, 6);
    let second = back_up(&place, &mut guest, repo, "snapshot");
    write_on(&mut guest, 3);
    let third = back_up(&place, &mut guest, repo, "redo");
    write_on(&mut guest, 2);
    guest.kill();
    assert_eq!(place.json(&["vm", "show", "sql01"])["state"], "ok", "the redo log is gone");

    assert_eq!((&first.0["kind"], &second.0["kind"]), (&"full".into(), &"incremental".into()));
    let bytes = |backup: &Value, what: &str| -> u64 {
        backup["disks"].as_array().unwrap().iter().map(|disk| disk[what].as_u64().unwrap()).sum()
    };
    let (whole, changed) = (bytes(&first.0, "read_bytes"), bytes(&second.0, "read_bytes"));
    let audited = bytes(&second.0, "audited_bytes");
    eprintln!(
        "read: first {whole}, second {changed} ({audited} of it audit); files {} and {}",
        first.2, second.2
    );
    assert!(changed * 3 < whole, "the second reads what changed: {} after {}", second.0, first.0);

    for (name, (backup, before, begun)) in [("third", third), ("second", second), ("first", first)] {
        place.ok(&["restore", backup["id"].as_str().unwrap(), "--repo", repo, "--as", name]);
        let [c, d] = export(&place, name);
        judge(&boot, &c, &d, &before, Some(begun));
    }
    // What the pulled plug left on the VM itself.
    let (c, d) = (drive(&place, "sql01/scsi0:0"), drive(&place, "sql01/scsi0:1"));
    judge(&boot, &c, &d, &Known::of(&guest), None);
    place.ok(&["backup", "verify", "--repo", repo]);
    assert_eq!(place.json(&["datastore", "check", "ds1"])["verdict"], "clean");
    assert_eq!(place.json(&["pool", "check", "p1"])["verdict"], "clean");
}

/// The daemon dies while a guest writes: what it acknowledged is there when it is back.
#[test]
fn a_guest_finds_everything_after_the_daemon_was_killed() {
    if !wanted() {
        return;
    }
    let (_alone, boot) = boot();
    let place = with_vm("guest-kill9");
    let [c, d] = export(&place, "sql01");
    let mut guest = boot.start("write", &c, &d);
    guest.wait(Duration::from_secs(120), |line| line == "READY");
    write_on(&mut guest, 8);
    // Taken before: when its disks are gone, the guest's sync does not tell.
    guest.drain();
    let before = Known::of(&guest);
    place.kill_daemon();
    guest.kill();
    place.ok(&["export", "ls"]); // starts it anew, with its exports
    judge(&boot, &c, &d, &before, None);
    // Space is marked used before it is referred to and freed after; what a kill left so is given back at the start.
    assert_eq!(place.json(&["datastore", "check", "ds1"])["verdict"], "clean");
    assert_eq!(place.json(&["pool", "check", "p1"])["verdict"], "clean");
}

/// What a guest said is on stable storage: `LETTER NUMBER SHA256` of each file.
struct Known(Vec<String>);

impl Known {
    fn of(guest: &Guest) -> Known {
        let file = |line: &String| line.strip_prefix("WROTE ").map(str::to_owned);
        Known(guest.seen.iter().filter_map(file).collect())
    }
}

/// Boots the two disks in check mode: file systems clean, every file as its name says, nothing missing that was
/// acknowledged before (`at_least`), and C: and D: at one instant: D: follows C: file by file.
fn judge(boot: &Boot, c: &str, d: &str, at_least: &Known, at_most: Option<u64>) {
    let mut guest = boot.start("check", c, d);
    guest.wait(Duration::from_secs(180), |line| line == "END");
    let log = guest.seen.join("\n");
    assert!(!log.contains("BAD "), "a file differs from its name:\n{log}");
    for letter in ["c", "d"] {
        assert!(log.contains(&format!("FSCK {letter} 0")), "e2fsck -fn on {letter} is clean:\n{log}");
    }
    let newest = |letter: &str| {
        let number = |line: &String| {
            line.strip_prefix(&format!("GOOD {letter} "))?.split(' ').next()?.parse::<u64>().ok()
        };
        guest.seen.iter().filter_map(number).max().unwrap_or(0)
    };
    let (newest_c, newest_d) = (newest("c"), newest("d"));
    assert!(
        newest_c == newest_d || newest_c == newest_d + 1,
        "one instant: C {newest_c}, D {newest_d}\n{log}"
    );
    for file in &at_least.0 {
        let number: u64 = file.split(' ').nth(1).unwrap().parse().unwrap();
        // The guest removes file n when n + 3, a multiple of 5, is on D:.
        let removed = (number + 3).is_multiple_of(5) && newest_d >= number + 3;
        let there = guest.seen.iter().any(|line| line.strip_prefix("GOOD ") == Some(file));
        assert!(there || removed, "{file} was acknowledged and is not there:\n{log}");
    }
    if let Some(most) = at_most {
        assert!(newest_c <= most, "nothing from after the cut: {newest_c} > {most}\n{log}");
    }
    eprintln!("judged: C: to {newest_c}, D: to {newest_d}, {} acknowledged", at_least.0.len());
}
