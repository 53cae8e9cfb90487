//! The main job as a user does it: pool, datastore, VM with C: on VMFS and D: as an RDM, backup online, restore, proof;
//! and what must hold when the daemon is killed or the repository is damaged.
#![allow(clippy::unwrap_used)] // a test says by it what must hold

mod common;

use std::path::Path;

use common::Place;
use common::wire::{content, contents, with_vm, write, write_noise};
use serde_json::Value;

#[test]
fn a_vm_is_backed_up_and_restored_both_ways() {
    let place = with_vm("job");
    write(&place, "sql01/scsi0:0", &[0, 5, 1000, 16383], 1);
    write(&place, "sql01/scsi0:1", &[0, 7, 8191], 2);
    let repo = place.dir().join("repo");
    let repo = repo.to_str().unwrap();
    let first = place.json(&["backup", "create", "sql01", "--repo", repo, "--via", "redo"]);
    assert_eq!((&first["kind"], &first["label"]), (&"full".into(), &"crash".into()), "{first}");
    let vm = place.json(&["vm", "show", "sql01"]);
    assert_eq!(vm["state"], "ok", "the redo logs are gone: {vm}");
    let at_first = contents(&place, "sql01");

    // Only what changed is read: four blocks of 4 KiB, and the audit's sample.
    write(&place, "sql01/scsi0:0", &[5, 6], 3);
    write(&place, "sql01/scsi0:1", &[7, 4000], 4);
    let second = place.json(&["backup", "create", "sql01", "--repo", repo]);
    assert_eq!(second["kind"], "incremental", "{second}");
    let at_second = contents(&place, "sql01");
    write(&place, "sql01/scsi0:0", &[5], 5);
    let third = place.json(&["backup", "create", "sql01", "--repo", repo]);
    assert_eq!(third["kind"], "incremental", "{third}");
    for (disk, changed) in third["disks"].as_array().unwrap().iter().zip([4096, 0]) {
        let [read, audited, said] =
            ["read_bytes", "audited_bytes", "changed_bytes"].map(|name| disk[name].as_u64().unwrap());
        assert_eq!((said, read), (changed, changed + audited), "{disk}");
    }
    // By a snapshot unless redo logs were asked for.
    for (done, via) in [(&first, "redo"), (&second, "snapshot"), (&third, "snapshot")] {
        let shown = place.json(&["backup", "show", done["id"].as_str().unwrap(), "--repo", repo]);
        assert_eq!(shown["metadata"]["via"], via, "{shown}");
    }

    // As a new VM, from the second one; the first one to a file.
    let id = second["id"].as_str().unwrap();
    place.ok(&["restore", id, "--repo", repo, "--as", "copy"]);
    for slot in ["scsi0:0", "scsi0:1"] {
        place.ok(&["export", "start", &format!("copy/{slot}"), "--read-only"]);
    }
    assert!(contents(&place, "copy") == at_second, "the restored VM is what was frozen");
    let (old, new) = (place.json(&["vm", "show", "sql01"]), place.json(&["vm", "show", "copy"]));
    assert_ne!(old["id"], new["id"], "a restored VM is another VM");
    assert_ne!(old["disks"][1]["lun"], new["disks"][1]["lun"], "with a LUN of its own");
    let first_id = first["id"].as_str().unwrap();
    for (slot, wanted) in ["scsi0:0", "scsi0:1"].into_iter().zip(&at_first) {
        let file = place.dir().join(format!("{}.raw", slot.replace(':', "-")));
        place.ok(&["restore", first_id, "--repo", repo, "--disk", slot, "--to", file.to_str().unwrap()]);
        assert!(std::fs::read(&file).unwrap() == *wanted, "{slot} of the first backup");
    }

    // In place: refused while somebody is connected, and asks first.
    place.fails(5, &["restore", id, "--repo", repo, "--in-place"]);
    place.ok(&["restore", id, "--repo", repo, "--in-place", "--yes"]);
    assert!(contents(&place, "sql01") == at_second, "restored in place");
    assert_eq!(place.json(&["datastore", "check", "ds1"])["verdict"], "clean");
    assert_eq!(place.json(&["pool", "check", "p1"])["verdict"], "clean");
    the_repository_alone(repo, [&first, &second, &third], &at_second);
}

/// Somebody who has the repository and nothing else: no home, no daemon.
fn the_repository_alone(repo: &str, made: [&Value; 3], at_second: &[Vec<u8>; 2]) {
    let place = Place::new("norepohome");
    let ids = made.map(|done| done["id"].as_str().unwrap());
    let listed = place.json(&["backup", "ls", "--repo", repo]);
    let listed: Vec<&str> = listed.as_array().unwrap().iter().map(|b| b["id"].as_str().unwrap()).collect();
    assert!(listed.len() == 3 && ids.iter().all(|id| listed.contains(id)), "{listed:?}");
    assert_eq!(place.json(&["backup", "show", ids[1], "--repo", repo])["id"], ids[1]);
    assert_eq!(place.json(&["backup", "verify", "--repo", repo])["verdict"], "clean");
    place.ok(&["backup", "rm", ids[0], "--repo", repo, "--yes"]);
    place.fails(3, &["backup", "show", ids[0], "--repo", repo]);
    assert!(restored(&place, repo, ids[1]) == *at_second, "the others are whole");
    place.ok(&["backup", "verify", "--repo", repo]);
    assert!(!place.home().exists(), "no home came to exist, and no daemon");
}

#[test]
fn a_flipped_byte_in_the_repository_is_found_and_named() {
    let place = with_vm("flip");
    // Noise is stored as it is: the byte of a known place on C: is found in the pack.
    write_noise(&place, "sql01/scsi0:0", 2, 9);
    let at = (1 << 20) + 3 * 4096;
    let noise = content(&place, "sql01/scsi0:0")[at..at + 64].to_vec();
    let repo = place.dir().join("repo");
    let text = repo.to_str().unwrap();
    let done = place.json(&["backup", "create", "sql01", "--repo", text]);
    let id = done["id"].as_str().unwrap();
    place.ok(&["backup", "verify", "--repo", text]);
    let pack = biggest(&repo.join("packs"));
    let mut bytes = std::fs::read(&pack).unwrap();
    let found = bytes.windows(noise.len()).position(|window| window == noise);
    bytes[found.expect("the noise is in the pack")] ^= 0x10;
    std::fs::write(&pack, bytes).unwrap();
    for words in [&["backup", "verify", id, "--repo", text][..], &["backup", "verify", "--repo", text]] {
        let out = place.run(words);
        let said = common::both(&out);
        assert_eq!(out.status.code(), Some(2), "{said}");
        let (_, named) = said.split_once("disk scsi0:0, byte ").unwrap_or_else(|| panic!("{said}"));
        let mut numbers = named.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse::<usize>().ok());
        let (first, length) = (numbers.next().unwrap(), numbers.next().unwrap());
        assert!((first..first + length).contains(&at), "byte {at} is not in {first} + {length}: {said}");
        assert!(said.contains("corrupt") && !said.contains("disk scsi0:1"), "{said}");
    }
}

fn biggest(dir: &Path) -> std::path::PathBuf {
    let mut files = Vec::new();
    let mut left = vec![dir.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { left.push(path) } else { files.push(path) }
        }
    }
    files.into_iter().max_by_key(|p| std::fs::metadata(p).unwrap().len()).unwrap()
}

#[test]
fn everything_is_there_again_after_kill_9() {
    let place = with_vm("kill9");
    write(&place, "sql01/scsi0:0", &[1, 2, 3], 7);
    write(&place, "sql01/scsi0:1", &[1, 2, 3], 8);
    place.ok(&["snap", "create", "sql01-d@s1"]);
    let before = contents(&place, "sql01");
    place.kill_daemon();
    let exports = place.json(&["export", "ls"]);
    assert_eq!(exports.as_array().unwrap().len(), 2);
    assert!(exports.as_array().unwrap().iter().all(|e| e["state"] == "serving"), "{exports}");
    assert!(contents(&place, "sql01") == before, "what was flushed is there");
    assert_eq!(place.json(&["snap", "ls"])[0]["name"], "sql01-d@s1");
    assert_eq!(place.json(&["serve", "--status"])["troubles"], serde_json::json!([]));
}

#[test]
fn redo_logs_of_a_backup_that_was_killed_are_committed_at_the_next_start() {
    let place = with_vm("redokill");
    write_noise(&place, "sql01/scsi0:0", 4, 7);
    let mut wanted = contents(&place, "sql01");
    let repo = place.dir().join("repo");
    let repo = repo.to_str().unwrap();
    // Slow enough to be met while it copies.
    let slow = ["backup", "create", "sql01", "--repo", repo, "--via", "redo", "--limit", "1M"];
    let mut backup = place.command(&slow).spawn().unwrap();
    let state = || place.json(&["vm", "show", "sql01"])["state"].clone();
    common::until("it is on redo logs", || state() == "needs consolidation");
    let blocks = [64, 65, 9000];
    write(&place, "sql01/scsi0:0", &blocks, 3);
    for block in blocks {
        let at = block as usize * 4096;
        wanted[0][at..at + 4096].fill(3 ^ block as u8);
    }
    assert!(backup.try_wait().unwrap().is_none(), "the backup is still under way");
    place.kill_daemon();
    assert!(!backup.wait().unwrap().success());
    // The daemon folds the redo logs back, and begins the backup again by itself.
    let jobs = |wanted: &str| {
        let all = place.json(&["job", "ls"]);
        all.as_array().unwrap().iter().filter(|j| j["state"] == wanted).count()
    };
    common::until("the backup that was interrupted ends", || jobs("running") == 0);
    common::until("the redo logs are folded back", || state() == "ok");
    assert!(contents(&place, "sql01") == wanted, "what was flushed to the redo log is in the base");
    // Nothing is left that the next one would stumble over.
    place.ok(&["backup", "create", "sql01", "--repo", repo, "--via", "redo"]);
    assert_eq!(state(), "ok");
    assert_eq!(jobs("done"), 2, "{}", place.json(&["job", "ls"]));
    assert_eq!(place.json(&["backup", "ls", "--repo", repo]).as_array().unwrap().len(), 2);
}

#[test]
fn what_is_in_use_is_not_taken_away() {
    let place = with_vm("claims");
    for words in [
        &["lun", "rm", "ds1", "--yes"][..],
        &["lun", "rm", "sql01-d", "--yes"],
        &["export", "start", "sql01-d"],
        &["export", "start", "ds1"],
        &["rdm", "create", "ds1:x/x.vmdk", "--lun", "sql01-d"],
        &["datastore", "create", "ds2", "--lun", "sql01-d"],
    ] {
        let text = place.fails(5, words);
        assert!(text.contains("KGM-LUN-0002") && text.contains("it is in use"), "{words:?}: {text}");
    }
    place.fails(4, &["disk", "rm", "ds1:sql01/sql01.vmdk", "--yes"]);
    place.fails(4, &["vm", "rm", "sql01", "--yes"]);
    place.fails(4, &["pool", "create", "p1", "--size", "1G"]);
    place.fails(3, &["lun", "show", "nobody"]);
    place.fails(2, &["disk", "create", "ds1:../x.vmdk", "--size", "1M"]);
    let text = place.ok(&["lun", "create", "x", "--size", "1M", "-n"]);
    assert!(text.contains("would make LUN x"), "{text}");
    place.fails(3, &["lun", "show", "x"]);
}

#[test]
fn luns_snapshots_and_clones() {
    let place = Place::new("luns");
    place.ok(&["pool", "create", "p1", "--size", "1G"]);
    place.ok(&["lun", "create", "a", "--size", "64M"]);
    place.ok(&["lun", "create", "a", "--size", "64M", "--if-not-exists"]);
    place.fails(4, &["lun", "create", "a", "--size", "32M", "--if-not-exists"]);
    place.ok(&["export", "start", "a"]);
    write(&place, "a", &[1], 1);
    place.ok(&["snap", "create", "a@one"]);
    write(&place, "a", &[1, 2], 2);
    place.ok(&["clone", "create", "a@one", "b"]);
    place.ok(&["export", "start", "b"]);
    place.ok(&["export", "start", "a@one"]);
    assert!(content(&place, "b") == content(&place, "a@one"), "a clone begins as its snapshot");
    place.ok(&["group", "create", "g1", "a", "b"]);
    assert_eq!(place.json(&["snap", "ls"]).as_array().unwrap().len(), 3);
    place.ok(&["lun", "resize", "a", "128M"]);
    assert_eq!(place.json(&["lun", "show", "a"])["size_bytes"], 128 << 20);
    assert_eq!(content(&place, "a").len(), 128 << 20, "the next connection sees the new size");
    place.fails(5, &["lun", "resize", "a", "64M"]);
    place.ok(&["export", "stop", "a", "--yes"]);
    place.ok(&["export", "stop", "a@one", "--yes"]);
    place.ok(&["snap", "revert", "a@one", "--yes"]);
    place.ok(&["export", "start", "a"]);
    assert!(content(&place, "a")[..64 << 20] == content(&place, "b")[..], "reverted");
    place.ok(&["snap", "rm", "b@g1", "--yes"]);
    place.ok(&["export", "stop", "b", "--yes"]);
    place.ok(&["lun", "rm", "b", "--yes"]);
    assert_eq!(place.json(&["lun", "ls", "--trash"])[0]["name"], "b");
    place.ok(&["lun", "undelete", "b"]);
    assert_eq!(place.json(&["pool", "check", "p1"])["verdict"], "clean");
    // The pool's file, by itself.
    place.ok(&["serve", "--stop"]);
    let pool = place.home().join("media/p1.pool");
    assert!(place.ok(&["inspect", pool.to_str().unwrap()]).contains("LUN a"));
}

#[test]
fn a_volume_in_a_file_needs_no_daemon() {
    let place = Place::new("volume");
    let image = place.dir().join("v.img");
    let image = image.to_str().unwrap();
    place.ok(&["vmfs", "create", image, "--size", "1G", "--label", "store"]);
    place.ok(&["vmfs", "mkdir", image, "/vm"]);
    let mut big = vec![0_u8; 5 << 20];
    for (index, byte) in big.iter_mut().enumerate().skip(2 << 20) {
        *byte = (index / 4096) as u8;
    }
    std::fs::write(place.dir().join("big"), &big).unwrap();
    std::fs::write(place.dir().join("small"), "displayName = \"x\"\n").unwrap();
    place.ok(&["vmfs", "cp", "big", &format!("{image}:/vm/big")]);
    place.ok(&["vmfs", "cp", "small", &format!("{image}:/vm")]);
    let list = place.json(&["vmfs", "ls", image, "/vm"]);
    assert_eq!(list.as_array().unwrap().len(), 2, "{list}");
    assert_eq!(place.run(&["vmfs", "cat", image, "/vm/small"]).stdout, b"displayName = \"x\"\n");
    assert!(place.run(&["vmfs", "cat", image, "/vm/big"]).stdout == big);
    place.ok(&["vmfs", "cp", &format!("{image}:/vm/big"), "back"]);
    assert!(std::fs::read(place.dir().join("back")).unwrap() == big);
    place.fails(4, &["vmfs", "rm", image, "/vm"]);
    place.ok(&["vmfs", "rm", image, "/vm/small"]);
    place.fails(3, &["vmfs", "cat", image, "/vm/small"]);
    assert_eq!(place.json(&["vmfs", "stat", image])["name"], "store");
    assert_eq!(place.json(&["vmfs", "check", image])["verdict"], "clean");
    assert!(place.ok(&["inspect", image]).contains("VMFS volume"));
    place.fails(1, &["vmfs", "check", "/nowhere"]);
    place.fails(5, &["vmfs", "create", image]);
    assert!(!place.home().exists(), "no daemon was started");
}

/// Copies a backup's disks to files: their bytes.
fn restored(place: &Place, repo: &str, id: &str) -> Vec<Vec<u8>> {
    let disk = |slot: &str| {
        let file = place.dir().join(format!("{}.raw", slot.replace(':', "-")));
        let _ = std::fs::remove_file(&file);
        place.ok(&["restore", id, "--repo", repo, "--disk", slot, "--to", file.to_str().unwrap()]);
        std::fs::read(&file).unwrap()
    };
    ["scsi0:0", "scsi0:1"].map(disk).to_vec()
}

#[test]
fn r44_what_changed_is_known_whatever_happened_in_between() {
    let place = with_vm("r44");
    let repo = place.dir().join("repo");
    let repo = repo.to_str().unwrap();
    write(&place, "sql01/scsi0:0", &[0, 100], 1);
    write(&place, "sql01/scsi0:1", &[0, 100], 1);
    let first = place.json(&["backup", "create", "sql01", "--repo", repo]);
    let lun = place.json(&["vm", "show", "sql01"])["disks"][1]["lun"].as_str().unwrap().to_owned();
    let happens: [(&str, &dyn Fn()); 5] = [
        ("the daemon is killed", &|| {
            place.kill_daemon();
            place.ok(&["vm", "ls"]);
        }),
        ("a redo log is committed", &|| drop(place.ok(&["vmsnap", "sql01", "--repo", repo]))),
        ("a snapshot comes and goes", &|| {
            place.ok(&["snap", "create", &format!("{lun}@s")]);
            write(&place, "sql01/scsi0:1", &[200], 8);
            place.ok(&["snap", "rm", &format!("{lun}@s"), "--yes"]);
        }),
        ("the exports stop and start", &|| {
            for slot in ["scsi0:0", "scsi0:1"] {
                place.ok(&["export", "stop", &format!("sql01/{slot}")]);
                place.ok(&["export", "start", &format!("sql01/{slot}")]);
            }
        }),
        ("it is restored in place", &|| {
            let id = first["id"].as_str().unwrap();
            place.ok(&["restore", id, "--repo", repo, "--in-place", "--yes"]);
        }),
    ];
    for (round, (what, happen)) in happens.iter().enumerate() {
        let block = 1000 + round as u64;
        write(&place, "sql01/scsi0:0", &[block], 2);
        write(&place, "sql01/scsi0:1", &[block], 3);
        happen();
        write(&place, "sql01/scsi0:0", &[block + 100], 4);
        write(&place, "sql01/scsi0:1", &[block + 100], 5);
        let done = place.json(&["backup", "create", "sql01", "--repo", repo]);
        assert_eq!(done["kind"], "incremental", "{what}: {done}");
        for disk in done["disks"].as_array().unwrap() {
            let read = disk["read_bytes"].as_u64().unwrap() - disk["audited_bytes"].as_u64().unwrap();
            assert!(read <= 2 << 20, "{what}: much was read: {disk}");
        }
        assert!(restored(&place, repo, done["id"].as_str().unwrap()) == contents(&place, "sql01"), "{what}");
    }
}

#[test]
fn r22_a_backup_says_of_each_disk_why_it_is_in_or_out() {
    let place = with_vm("r22");
    let repo = place.dir().join("repo");
    let repo = repo.to_str().unwrap();
    place.ok(&["disk", "create", "ds1:sql01/scratch.vmdk", "--size", "8M"]);
    place.ok(&["vm", "attach", "sql01", "ds1:sql01/scratch.vmdk", "--mode", "independent-persistent"]);
    let planned = place.ok(&["backup", "create", "sql01", "--repo", repo, "-n"]);
    assert!(planned.contains("leave out scsi0:2") && planned.contains("independent"), "{planned}");
    for via in ["redo", "snapshot"] {
        let done = place.json(&["backup", "create", "sql01", "--repo", repo, "--via", via]);
        let shown = place.json(&["backup", "show", done["id"].as_str().unwrap(), "--repo", repo]);
        let disks = shown["metadata"]["disks"].as_array().unwrap();
        let is_in: Vec<bool> = disks.iter().map(|d| d["in"].as_bool().unwrap()).collect();
        assert_eq!(is_in, [true, true, false], "{shown}");
        assert!(disks.iter().all(|d| !d["why"].as_str().unwrap().is_empty()), "{shown}");
        assert_eq!(shown["disks"].as_array().unwrap().len(), 2, "{shown}");
    }
}
