//! Backups after the first: they read what changed and nothing else, whatever happened to the disks in between, and keep
//! no more of the past than the next one needs.

use serde_json::{Value, json};

use crate::common::Place;
use crate::common::wire::{content, with_vm, write, write_noise};

fn repo(place: &Place) -> String {
    place.dir().join("repo").display().to_string()
}

fn number(disk: &Value, name: &str) -> u64 {
    disk[name].as_u64().unwrap()
}

fn restored(place: &Place, id: &Value, slot: &str) -> Vec<u8> {
    let file = place.dir().join("restored.raw");
    let words =
        ["restore", id.as_str().unwrap(), "--repo", &repo(place), "--disk", slot, "--to", "restored.raw"];
    place.ok(&words);
    let bytes = std::fs::read(&file).unwrap();
    std::fs::remove_file(file).unwrap();
    bytes
}

#[test]
fn r41_an_incremental_reads_what_changed_and_the_audit_and_nothing_else() {
    let place = with_vm("exact");
    write_noise(&place, "sql01/scsi0:0", 16, 1);
    write_noise(&place, "sql01/scsi0:1", 16, 2);
    let back_up =
        |via: &str| place.json(&["backup", "create", "sql01", "--repo", &repo(&place), "--via", via]);
    for via in ["snapshot", "redo"] {
        back_up(via);
        back_up(via);
        write(&place, "sql01/scsi0:0", &[2222], 7);
        let third = back_up(via);
        let disks = third["disks"].as_array().unwrap();
        assert_eq!(number(&disks[0], "changed_bytes"), 4096, "{via}: {third}");
        assert_eq!(number(&disks[1], "changed_bytes"), 0, "{via}: {third}");
        for disk in disks {
            let read = number(disk, "changed_bytes") + number(disk, "audited_bytes");
            assert_eq!(number(disk, "read_bytes"), read, "{via}: {disk}");
            assert_eq!(disk["kind"], "incremental", "{via}: {disk}");
        }
        assert!(restored(&place, &third["id"], "scsi0:0") == content(&place, "sql01/scsi0:0"));
    }
}

#[test]
fn r44_what_changed_is_known_after_a_revert_and_after_growth() {
    const D: &str = "ds1:sql01/sql01_1.vmdk";
    let place = with_vm("r44-revert");
    let back_up = || place.json(&["backup", "create", "sql01", "--repo", &repo(&place)]);
    let is_right = |what: &str, done: &Value| {
        assert!(
            restored(&place, &done["id"], "scsi0:1") == content(&place, "sql01/scsi0:1"),
            "{what}: {done}"
        );
        assert!(
            restored(&place, &done["id"], "scsi0:0") == content(&place, "sql01/scsi0:0"),
            "{what}: {done}"
        );
    };
    write_noise(&place, "sql01/scsi0:1", 8, 1);
    place.ok(&["snap", "create", "sql01-d@old"]);
    write(&place, "sql01/scsi0:1", &[100], 2);
    back_up();
    // A mapped LUN is not reverted by itself: the VM lets go of it first.
    let revert = |snap: &str| {
        place.refuses(5, "KGM-LUN-0002", &["snap", "revert", snap, "--yes"]);
        place.ok(&["export", "stop", "sql01/scsi0:1"]);
        place.ok(&["vm", "detach", "sql01", "scsi0:1"]);
        place.ok(&["disk", "rm", D, "--yes"]);
        place.ok(&["snap", "revert", snap, "--yes"]);
        place.ok(&["snap", "revert", snap, "--accept", "--yes"]);
        place.ok(&["rdm", "create", D, "--lun", "sql01-d", "--mode", "physical"]);
        place.ok(&["vm", "attach", "sql01", D, "--slot", "scsi0:1"]);
        place.ok(&["export", "start", "sql01/scsi0:1"]);
    };

    // To a snapshot that is younger than the last backup: its cut is below, and what the branch held is known.
    write(&place, "sql01/scsi0:1", &[200], 3);
    place.ok(&["snap", "create", "sql01-d@young"]);
    write(&place, "sql01/scsi0:1", &[100, 300], 4);
    let abandoned = content(&place, "sql01/scsi0:1");
    revert("sql01-d@young");
    write(&place, "sql01/scsi0:1", &[400], 5);
    assert!(content(&place, "sql01/scsi0:1") != abandoned);
    let done = back_up();
    let d = &done["disks"][1];
    assert!(d["kind"] == "incremental" && number(d, "changed_bytes") <= 1 << 20, "{done}");
    is_right("young", &done);

    // To one that is older: the last backup's cut is not below it any more. Unknown is unknown: everything is read (R45).
    revert("sql01-d@old");
    write(&place, "sql01/scsi0:1", &[500], 6);
    let done = back_up();
    assert_eq!(done["disks"][1]["kind"], "full", "{done}");
    is_right("old", &done);

    // It grows: the new part counts as changed, and the old part does not.
    place.ok(&["lun", "resize", "sql01-d", "48M"]);
    place.ok(&["rdm", "grow", D]);
    write(&place, "sql01/scsi0:1", &[600, 8192, 12_287], 7);
    let done = back_up();
    let d = &done["disks"][1];
    assert!(d["kind"] == "incremental" && number(d, "size_bytes") == 48 << 20, "{done}");
    let read = number(d, "read_bytes") - number(d, "audited_bytes");
    assert!((3 * 4096..=17 << 20).contains(&read), "{done}");
    is_right("grown", &done);
    assert_eq!(content(&place, "sql01/scsi0:1").len(), 48 << 20);
    let next = back_up();
    assert!(number(&next["disks"][1], "changed_bytes") == 0, "{next}");
    assert_eq!(place.json(&["pool", "check", "p1"])["verdict"], "clean");
}

/// Who holds generations in the pool: each hold once.
fn held(place: &Place) -> Vec<String> {
    let pool = place.json(&["pool", "show", "p1"]);
    let hidden = pool["hidden"].as_array().unwrap();
    let holders = hidden.iter().flat_map(|layer| layer["held_by"].as_array().unwrap());
    let mut all: Vec<String> = holders.map(|holder| holder.as_str().unwrap().to_owned()).collect();
    all.sort();
    all
}

#[test]
fn what_backups_hold_of_the_past_is_what_the_next_one_needs() {
    let place = with_vm("holds");
    let repo = repo(&place);
    let back_up = |more: &[&str]| {
        write(&place, "sql01/scsi0:0", &[1], 3);
        write(&place, "sql01/scsi0:1", &[1], 3);
        place.json(&[&["backup", "create", "sql01", "--repo", &repo], more].concat())
    };
    back_up(&[]);
    let first = held(&place);
    assert!(first.len() == 2 && first[0].starts_with("backup of sql01 to "), "one for each LUN: {first:?}");
    back_up(&["--full"]);
    assert_eq!(held(&place), first, "a full one compares with nothing, and keeps nothing more");
    let last = back_up(&["--full"]);
    assert_eq!(held(&place), first);
    // The last backup is removed: the next one still lets go what that held.
    place.ok(&["backup", "rm", last["id"].as_str().unwrap(), "--repo", &repo, "--yes"]);
    back_up(&[]);
    assert_eq!(held(&place), first);
    // A disk leaves the VM: its LUN is not held any more after the next backup.
    place.ok(&["export", "stop", "sql01/scsi0:1"]);
    place.ok(&["vm", "detach", "sql01", "scsi0:1"]);
    place.json(&["backup", "create", "sql01", "--repo", &repo]);
    assert_eq!(held(&place), first[..1]);
    // The repository is gone: the operator lets go.
    std::fs::remove_dir_all(&repo).unwrap();
    place.refuses(3, "KGM-LUN-0010", &["lun", "release", "ds1", "nobody"]);
    place.refuses(5, "KGM-CLI-0005", &["lun", "release", "ds1", &first[0]]);
    place.ok(&["lun", "release", "ds1", &first[0], "--yes"]);
    assert_eq!(held(&place), [""; 0]);
    assert_eq!(place.json(&["pool", "check", "p1"])["verdict"], "clean");
    let done = place.json(&["backup", "create", "sql01", "--repo", &repo]);
    assert_eq!(done["kind"], "full");
    assert_eq!(place.json(&["snap", "ls"]), json!([]));
    assert!(content(&place, "sql01/scsi0:0") == restored(&place, &done["id"], "scsi0:0"));
}
