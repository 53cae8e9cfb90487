//! Restores over the VM that a backup was made from: all or none, whatever ends them early; what was there before comes
//! back; and never over another LUN than the one that was backed up.

use serde_json::{Value, json};

use crate::common::wire::{content, contents, while_connected, with_vm, write, write_noise};
use crate::common::{Place, until};

const SLOTS: [&str; 2] = ["sql01/scsi0:0", "sql01/scsi0:1"];

fn job(place: &Place, id: &str) -> Value {
    place.json(&["job", "show", id])
}

fn state(place: &Place) -> String {
    place.json(&["vm", "show", "sql01"])["state"].as_str().unwrap().to_owned()
}

/// Snapshots that are there, each name once.
fn snapshots(place: &Place) -> Vec<String> {
    let listed = place.json(&["snap", "ls"]);
    let name = |snap: &Value| snap["name"].as_str().unwrap().split_once('@').unwrap().1.to_owned();
    let mut names: Vec<String> = listed.as_array().unwrap().iter().map(name).collect();
    names.sort();
    names.dedup();
    names
}

fn exports(place: &Place) -> Vec<Value> {
    let listed = place.json(&["export", "ls"]);
    listed.as_array().unwrap().iter().map(|export| export["state"].clone()).collect()
}

/// A VM that was backed up and then written over.
struct Restoring {
    place: Place,
    repo: String,
    backup: String,
    /// As it was backed up.
    wanted: [Vec<u8>; 2],
    /// As it was when the restore began.
    before: [Vec<u8>; 2],
}

impl Restoring {
    fn new(name: &str) -> Self {
        let place = with_vm(name);
        let fill = |seed| {
            write_noise(&place, SLOTS[0], 40, seed);
            write_noise(&place, SLOTS[1], 32, seed + 1);
        };
        fill(1);
        let wanted = contents(&place, "sql01");
        let repo = place.dir().join("repo").display().to_string();
        let done = place.json(&["backup", "create", "sql01", "--repo", &repo]);
        let backup = done["id"].as_str().unwrap().to_owned();
        fill(5);
        write(&place, SLOTS[0], &[12_000, 16_000], 9); // the backup has nothing there
        let before = contents(&place, "sql01");
        Self { place, repo, backup, wanted, before }
    }

    fn words<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        [&["restore", &self.backup, "--repo", &self.repo, "--in-place", "--yes"], more].concat()
    }

    /// Begins it, slowly, and waits until it is in the middle of C:; its job.
    fn in_the_middle(&self) -> String {
        let id = self.place.ok(&self.words(&["--limit", "24M/s", "--detach"])).trim().to_owned();
        until("it is in the middle", || job(&self.place, &id)["done_bytes"].as_u64().unwrap() >= 12 << 20);
        let seen = job(&self.place, &id);
        assert!(seen["state"] == "running" && seen["phase"] == "restore scsi0:0", "{seen}");
        id
    }

    fn nobody_gets_in(&self) {
        assert_eq!(exports(&self.place), ["down", "down"]);
        for slot in SLOTS {
            self.place.refuses(4, "KGM-VMS-0015", &["export", "start", slot, "--name", "in"]);
        }
        let backup = ["backup", "create", "sql01", "--repo", &self.repo];
        assert!(!self.place.run(&backup).status.success(), "a mixture is not backed up");
    }

    fn is_sound(&self) {
        assert_eq!(state(&self.place), "ok");
        assert_eq!(exports(&self.place), ["serving", "serving"], "by themselves");
        // A daemon that is killed may leave a leak on VMFS, never damage.
        let check = self.place.run(&["datastore", "check", "ds1"]);
        assert!(matches!(check.status.code(), Some(0 | 3)), "{}", crate::common::both(&check));
        assert_eq!(self.place.json(&["pool", "check", "p1"])["verdict"], "clean");
        assert_eq!(self.place.json(&["serve", "--status"])["troubles"], json!([]));
    }
}

#[test]
fn r35_an_in_place_restore_that_was_killed_goes_on_or_is_undone() {
    let it = Restoring::new("inplace-kill");
    let place = &it.place;
    let id = it.in_the_middle();
    assert_eq!(state(place), "being restored");
    it.nobody_gets_in();
    let undo = snapshots(place);
    assert!(undo.len() == 1 && undo[0].starts_with("before-restore-"), "{undo:?}");
    place.kill_daemon();
    it.nobody_gets_in();
    assert_eq!(state(place), "being restored", "it goes on by itself");
    until("it has ended", || job(place, &id)["state"] != "running");
    let seen = job(place, &id);
    assert!(seen["state"] == "done" && seen["attempts"] == 2, "{seen}");
    assert!(seen["note"].as_str().unwrap().starts_with("goes on with a restore"), "{seen}");
    assert_eq!(seen["result"]["undo"], undo[0], "the cut from before the first write");
    assert_eq!(snapshots(place), undo);
    it.is_sound();
    assert!(contents(place, "sql01") == it.wanted, "as it was backed up");

    // It was not what was wanted: back. That too may be interrupted, and is not done while the VM is on.
    let back = ["restore", "sql01", "--undo", "--yes"];
    while_connected(place, SLOTS[1], || drop(place.refuses(5, "KGM-VMS-0008", &back)));
    place.refuses(5, "KGM-CLI-0005", &back[..3]);
    let plan = place.ok(&["restore", "sql01", "--undo", "-n"]);
    assert!(plan.contains("bring scsi0:0, scsi0:1 of sql01 back") && plan.contains(&it.backup), "{plan}");
    let id = place.ok(&[&back[..], &["--detach"]].concat()).trim().to_owned();
    until("it has begun", || job(place, &id)["phase"] != "" || job(place, &id)["state"] != "running");
    place.kill_daemon();
    until("it has ended", || job(place, &id)["state"] != "running");
    let seen = job(place, &id);
    assert!(seen["state"] == "done" && seen["kind"] == "undo-restore", "{seen}");
    assert!(contents(place, "sql01") == it.before, "as it was before the restore");
    assert_eq!(snapshots(place), [""; 0], "nothing is left of it");
    it.is_sound();
    place.refuses(3, "KGM-BKP-0024", &back);
}

#[test]
fn r35_an_in_place_restore_that_was_cancelled_says_how_to_go_on_and_how_to_undo_it() {
    let it = Restoring::new("inplace-cancel");
    let place = &it.place;
    let id = it.in_the_middle();
    let undo = snapshots(place);
    place.ok(&["job", "cancel", &id]);
    until("it has ended", || job(place, &id)["state"] != "running");
    let seen = job(place, &id);
    assert_eq!(seen["state"], "cancelled", "{seen}");
    let text = place.fails(1, &["job", "wait", &id]);
    for said in [&undo[0], "kagami restore sql01 --undo", &format!("kagami restore {} --repo", it.backup)] {
        assert!(text.contains(said), "{said}: {text}");
    }
    // So it stays, over a restart too.
    for _ in 0..2 {
        assert_eq!(state(place), "restore interrupted");
        it.nobody_gets_in();
        let troubles = place.json(&["serve", "--status"])["troubles"].to_string();
        assert!(troubles.contains("kagami restore sql01 --undo"), "{troubles}");
        place.refuses(4, "KGM-VMS-0015", &["restore", "sql01", "--accept", "--yes"]);
        // C: is mixed: D: alone would leave it so.
        place.refuses(4, "KGM-VMS-0015", &it.words(&["--disk", "scsi0:1"]));
        place.ok(&["serve", "--stop"]);
    }
    // Undone in the middle.
    let done = place.json(&["restore", "sql01", "--undo", "--yes"]);
    let written = done["written_bytes"].as_u64().unwrap();
    assert!((8 << 20..41 << 20).contains(&written), "what had been restored: {done}");
    assert!(contents(place, "sql01") == it.before, "as it was before the restore");
    assert_eq!(snapshots(place), [""; 0]);
    it.is_sound();

    // Begun and cancelled again; now it goes on, and keeps the cut from before the first write.
    let id = it.in_the_middle();
    let undo = snapshots(place);
    place.ok(&["job", "cancel", &id]);
    until("it has ended", || job(place, &id)["state"] != "running");
    let done = place.json(&it.words(&[]));
    assert_eq!(done["undo"], undo[0]);
    assert!(contents(place, "sql01") == it.wanted, "as it was backed up");
    it.is_sound();
    place.refuses(5, "KGM-CLI-0005", &["restore", "sql01", "--accept"]);
    place.ok(&["restore", "sql01", "--accept", "--yes"]);
    assert_eq!(snapshots(place), [""; 0], "nobody can go back any more");
    place.refuses(3, "KGM-BKP-0024", &["restore", "sql01", "--undo", "--yes"]);
    assert!(contents(place, "sql01") == it.wanted);
}

#[test]
fn a_restore_in_place_never_writes_over_another_lun() {
    const D: &str = "ds1:sql01/sql01_1.vmdk";
    let place = with_vm("inplace-identity");
    let repo = place.dir().join("repo").display().to_string();
    write_noise(&place, SLOTS[1], 4, 1);
    let wanted = content(&place, SLOTS[1]);
    let id = place.json(&["backup", "create", "sql01", "--repo", &repo])["id"].as_str().unwrap().to_owned();
    // The mapping leads to another LUN of the same size now.
    place.ok(&["lun", "create", "other", "--size", "32M"]);
    place.ok(&["rdm", "remap", D, "--to", "other", "--yes"]);
    write_noise(&place, SLOTS[1], 4, 2);
    let other = content(&place, SLOTS[1]);
    let over = ["restore", &id, "--repo", &repo, "--in-place", "--yes"];
    let text = place.refuses(5, "KGM-BKP-0023", &over);
    for said in ["LUN other (naa.", "the backup is of LUN sql01-d (naa.", "--force=identity"] {
        assert!(text.contains(said), "{said}: {text}");
    }
    place.refuses(5, "KGM-BKP-0023", &[&over[..5], &["-n"]].concat());
    assert!(content(&place, SLOTS[1]) == other, "it was left alone");
    assert_eq!(snapshots(&place), [""; 0]);
    place.ok(&[&over[..], &["--disk", "scsi0:0"]].concat());
    place.fails(2, &[&over[..], &["--force=attached"]].concat());
    place.fails(2, &["restore", &id, "--repo", &repo, "--as", "x", "--force=identity"]);
    place.ok(&[&over[..], &["--force=identity"]].concat());
    assert!(content(&place, SLOTS[1]) == wanted, "the operator said so");
    // A disk on the datastore is not a LUN.
    for slot in SLOTS {
        place.ok(&["export", "stop", slot]);
    }
    place.ok(&["vm", "detach", "sql01", "scsi0:1"]);
    place.ok(&["disk", "create", "ds1:sql01/flat.vmdk", "--size", "32M"]);
    place.ok(&["vm", "attach", "sql01", "ds1:sql01/flat.vmdk", "--slot", "scsi0:1"]);
    let text = place.refuses(5, "KGM-BKP-0023", &over);
    assert!(text.contains("it is a disk on a datastore"), "{text}");
}

#[test]
fn a_record_of_a_restore_in_place_shuts_the_vm_whatever_it_says() {
    let place = with_vm("inplace-record");
    write_noise(&place, SLOTS[1], 2, 1);
    let before = contents(&place, "sql01");
    let file = place.home().join("restores/sql01.json");
    let record = |format: u32, stage: &str| {
        let record = json!({
            "format": format, "vm": "sql01", "backup": "0192f0c8-7d1e-7c3a-9b5f-2a6e8d4c1b07", "repo": "/nowhere",
            "disk": null, "slots": ["scsi0:0", "scsi0:1"], "undo": "before-restore-20261129T123456Z",
            "stage": stage, "at": "2026-11-29T12:34:56Z",
        });
        place.ok(&["serve", "--stop"]);
        std::fs::write(&file, record.to_string()).unwrap();
    };
    let undo = ["restore", "sql01", "--undo", "--yes"];
    // Cut off before the cut: nothing was written, and there is nothing to bring back.
    record(1, "begun");
    assert_eq!((state(&place).as_str(), exports(&place)), ("restore interrupted", vec!["down".into(); 2]));
    place.ok(&undo);
    assert_eq!((state(&place).as_str(), exports(&place)), ("ok", vec!["serving".into(); 2]));
    assert!(!file.exists() && contents(&place, "sql01") == before);
    // The cut is gone: what it would bring back cannot be had any more, and that is said.
    record(1, "mixed");
    let text = place.refuses(5, "KGM-BKP-0025", &undo);
    assert!(text.contains("has no snapshot before-restore-20261129T123456Z"), "{text}");
    // A newer program's: it may be a mixture.
    record(2, "mixed");
    assert_eq!((state(&place).as_str(), exports(&place)), ("restore interrupted", vec!["down".into(); 2]));
    for words in [&undo[..], &["export", "start", SLOTS[0], "--name", "in"]] {
        let text = place.refuses(4, "KGM-VMS-0015", words);
        assert!(text.contains("its format is 2") && text.contains("up to 1"), "both versions: {text}");
    }
    place.ok(&["serve", "--stop"]);
    assert!(std::fs::read_to_string(&file).unwrap().contains("\"format\":2"), "it is left alone");
    std::fs::remove_file(&file).unwrap();
    assert_eq!((state(&place).as_str(), exports(&place)), ("ok", vec!["serving".into(); 2]));
    assert!(contents(&place, "sql01") == before);
}
