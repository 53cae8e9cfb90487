//! A backup that the daemon's end interrupts goes on with the cut that it had made, and reads only what was not stored.

use std::path::PathBuf;

use serde_json::Value;

use crate::common::wire::{content, with_vm, write_noise};
use crate::common::{Place, until};

/// More than a pack: how far a copy is gets noted when one is full.
const NOISE_MIB: u64 = 160;
/// What has been read when the daemon ends.
const READ_BYTES: u64 = 120 << 20;

struct Interrupted {
    place: Place,
    repo: String,
    job: Value,
    /// D: at the cut.
    before: Vec<u8>,
}

/// A VM with much on D:, and a backup of it that was interrupted by `end` in the middle of D:, as it ended then. On a
/// machine that is slow to look it may have ended before: then another one is begun, in a repository of its own.
fn interrupted(name: &str, via: &str, end: impl Fn(&Place)) -> Interrupted {
    let place = Place::new(name);
    place.ok(&["pool", "create", "p1", "--size", "2G"]);
    place.ok(&["datastore", "create", "ds1", "--size", "1G"]);
    place.ok(&["lun", "create", "sql01-d", "--size", "192M"]);
    place.ok(&["vm", "create", "sql01", "--datastore", "ds1", "--disk", "32M", "--rdm", "sql01-d"]);
    for slot in ["sql01/scsi0:0", "sql01/scsi0:1"] {
        place.ok(&["export", "start", slot]);
    }
    write_noise(&place, "sql01/scsi0:0", 2, 1);
    write_noise(&place, "sql01/scsi0:1", NOISE_MIB, 2);
    for attempt in 0..10 {
        let before = content(&place, "sql01/scsi0:1");
        let repo = place.dir().join(format!("repo{attempt}")).display().to_string();
        let words =
            ["backup", "create", "sql01", "--repo", &repo, "--via", via, "--limit", "48M", "--detach"];
        place.ok(&words);
        let jobs = place.json(&["job", "ls"]);
        let id = jobs.as_array().unwrap().last().unwrap()["id"].as_str().unwrap().to_owned();
        let job = || place.json(&["job", "show", &id]);
        until("it is in the middle", || {
            let job = job();
            job["state"] != "running" || job["done_bytes"].as_u64().unwrap() >= READ_BYTES
        });
        // What is written from now on is not in the backup.
        write_noise(&place, "sql01/scsi0:1", 4, 3 + attempt);
        write_noise(&place, "sql01/scsi0:0", 1, 30 + attempt);
        end(&place);
        until("it has ended", || job()["state"] != "running");
        let job = job();
        assert_eq!(job["state"], "done", "{job}");
        if job["attempts"] == 2 {
            return Interrupted { place, repo, job, before };
        }
    }
    panic!("it was never met in the middle");
}

impl Interrupted {
    /// It went on with the cut: D: is as it was then, not all of it was read again, and nothing is left of it.
    fn went_on(&self) {
        let job = &self.job;
        let note = job["note"].as_str().unwrap_or_default();
        assert!(note.starts_with("goes on with the cut of"), "{job}");
        let d = &job["result"]["disks"][1];
        let (read, from) = (d["read_bytes"].as_u64().unwrap(), d["resumed_at_bytes"].as_u64().unwrap());
        assert!(read < (NOISE_MIB << 20) - (48 << 20), "{d}");
        assert!(from >= 48 << 20 && read + from <= 192 << 20, "{d}");
        assert!(self.restored("scsi0:1") == self.before, "D: is as at the cut");
        assert_eq!(self.place.json(&["snap", "ls"]), serde_json::json!([]), "no snapshot is left");
        assert_eq!(records(&self.place), [] as [PathBuf; 0]);
        self.place.ok(&["backup", "verify", "--repo", &self.repo]);
        // The next one is an incremental.
        let next = ["backup", "create", "sql01", "--repo", &self.repo];
        let next = self.place.json(&next);
        let d = &next["disks"][1];
        assert!(d["kind"] == "incremental" && d["changed_bytes"].as_u64().unwrap() < 8 << 20, "{next}");
    }

    fn restored(&self, slot: &str) -> Vec<u8> {
        let file = self.place.dir().join("restored.img");
        let to = file.to_str().unwrap();
        self.place.ok(&["restore", "sql01", "--repo", &self.repo, "--disk", slot, "--to", to]);
        let bytes = std::fs::read(&file).unwrap();
        std::fs::remove_file(file).unwrap();
        bytes
    }
}

fn records(place: &Place) -> Vec<PathBuf> {
    std::fs::read_dir(place.home().join("cuts")).unwrap().map(|e| e.unwrap().path()).collect()
}

#[test]
fn a_backup_that_was_killed_goes_on_with_its_cut() {
    interrupted("resume-kill", "snapshot", Place::kill_daemon).went_on();
}

#[test]
fn a_backup_by_redo_logs_that_was_killed_goes_on_with_them() {
    let interrupted = interrupted("resume-redo", "redo", Place::kill_daemon);
    assert_eq!(
        interrupted.place.json(&["vm", "show", "sql01"])["state"],
        "ok",
        "the redo log is folded back"
    );
    interrupted.went_on();
}

#[test]
fn a_backup_that_the_end_of_the_daemon_suspends_goes_on_with_its_redo_logs() {
    let interrupted = interrupted("resume-stop", "redo", |place| {
        place.ok(&["serve", "--stop"]);
    });
    assert_eq!(
        interrupted.place.json(&["vm", "show", "sql01"])["state"],
        "ok",
        "the redo log is folded back"
    );
    assert!(content(&interrupted.place, "sql01/scsi0:0") != interrupted.restored("scsi0:0"));
    interrupted.went_on();
}

#[test]
fn a_backup_whose_cut_is_gone_makes_a_new_one_and_says_so() {
    // As if somebody had removed the snapshots while the daemon was away.
    let interrupted = interrupted("resume-gone", "snapshot", |place| {
        place.kill_daemon();
        for record in records(place) {
            let text = std::fs::read_to_string(&record).unwrap();
            std::fs::write(&record, text.replace("\"backup-", "\"backup-gone-")).unwrap();
        }
    });
    let note = interrupted.job["note"].as_str().unwrap_or_default();
    assert!(note.starts_with("a new cut: that of ") && note.contains("has no snapshot"), "{note}");
    let d = &interrupted.job["result"]["disks"][1];
    assert!(d["read_bytes"] == NOISE_MIB << 20 && d["resumed_at_bytes"] == 0, "{d}");
    assert!(interrupted.restored("scsi0:1") == content(&interrupted.place, "sql01/scsi0:1"));
    assert_eq!(interrupted.place.json(&["snap", "ls"]), serde_json::json!([]));
}

#[test]
fn a_cut_that_a_newer_program_remembers_is_left_alone() {
    for via in ["snapshot", "redo"] {
        let place = with_vm(&format!("resume-newer-{via}"));
        write_noise(&place, "sql01/scsi0:1", 24, 1);
        let repo = place.dir().join("repo").display().to_string();
        let words = ["backup", "create", "sql01", "--repo", &repo, "--via", via];
        let id = place.ok(&[&words[..], &["--limit", "4M", "--detach"]].concat()).trim().to_owned();
        let job = || place.json(&["job", "show", &id]);
        until("it copies", || job()["phase"] == "copy");
        place.kill_daemon();
        let record = records(&place).remove(0);
        let text = std::fs::read_to_string(&record).unwrap();
        let newer = text.replace("\"format\": 1,", "\"format\": 2,").replace("\"hold_us\"", "\"held\"");
        assert_ne!(newer, text);
        std::fs::write(&record, &newer).unwrap();
        // The job that goes on is refused, and so is any other backup; nothing is taken away, whatever starts and ends.
        until("it has ended", || job()["state"] != "running");
        let problem = &job()["problem"];
        assert_eq!(problem["code"], "KGM-BKP-0022", "{problem}");
        for _ in 0..2 {
            let text = place.refuses(5, "KGM-BKP-0022", &words);
            assert!(text.contains("its format is 2") && text.contains("up to 1"), "both versions: {text}");
            let cut = place.json(&["snap", "ls"]);
            assert!(
                !cut.as_array().unwrap().is_empty() && cut[0]["name"].as_str().unwrap().contains("@backup-"),
                "{cut}"
            );
            let state = place.json(&["vm", "show", "sql01"])["state"].clone();
            assert_eq!(state == "needs consolidation", via == "redo", "{state}");
            let troubles = place.json(&["serve", "--status"])["troubles"].to_string();
            assert!(troubles.contains("cuts/sql01.json"), "{troubles}");
            assert_eq!(std::fs::read_to_string(&record).unwrap(), newer);
            place.ok(&["serve", "--stop"]);
        }
        // The operator gives it up.
        std::fs::remove_file(&record).unwrap();
        assert_eq!(place.json(&["snap", "ls"]), serde_json::json!([]));
        until("it is on its base again", || place.json(&["vm", "show", "sql01"])["state"] == "ok");
        place.ok(&words);
    }
}
