//! Every kind of restore, what becomes of old backups, and jobs: progress, cancel, going on after a restart.

use std::process::Command;

use crate::common::wire::{
    content, contents, while_connected, with_vm, with_vm_unserved, write, write_noise,
};
use crate::common::{Place, has, until};
use serde_json::Value;

fn repo(place: &Place) -> String {
    place.dir().join("repo").display().to_string()
}

fn back_up(place: &Place) -> String {
    let done = place.json(&["backup", "create", "sql01", "--repo", &repo(place)]);
    done["id"].as_str().unwrap().to_owned()
}

#[test]
fn one_disk_goes_to_a_file_a_lun_or_back_over_itself() {
    let place = with_vm("kinds");
    let repo = repo(&place);
    write(&place, "sql01/scsi0:0", &[0, 5, 1000], 1);
    write(&place, "sql01/scsi0:1", &[0, 7, 8191], 2);
    let at_backup = contents(&place, "sql01");
    let id = back_up(&place);

    // To files: raw and VMDK. Nothing that is there is overwritten.
    place.refuses(2, "KGM-CLI-0001", &["restore", &id, "--repo", &repo, "--to", "c.raw"]);
    assert!(
        place
            .ok(&["restore", &id, "--repo", &repo, "--disk", "scsi0:0", "--to", "c.raw", "-n"])
            .contains("would write")
    );
    place.ok(&["restore", &id, "--repo", &repo, "--disk", "scsi0:0", "--to", "c.raw"]);
    assert!(std::fs::read(place.dir().join("c.raw")).unwrap() == at_backup[0]);
    place.refuses(
        4,
        "KGM-BKP-0409",
        &["restore", &id, "--repo", &repo, "--disk", "scsi0:0", "--to", "c.raw"],
    );
    place.ok(&["restore", &id, "--repo", &repo, "--disk", "scsi0:1", "--to", "d.vmdk"]);
    assert!(std::fs::read(place.dir().join("d-flat.vmdk")).unwrap() == at_backup[1], "content of the RDM");
    let show = place.json(&["vmdk", "show", "d.vmdk"]);
    assert!(show["create_type"] == "monolithicFlat" && show["size_bytes"] == 32 << 20, "{show}");
    if has("qemu-img") {
        std::fs::write(place.dir().join("d.raw"), &at_backup[1]).unwrap();
        let mut compare = Command::new("qemu-img");
        compare.args(["compare", "-f", "vmdk", "-F", "raw", "d.vmdk", "d.raw"]).current_dir(place.dir());
        assert!(compare.status().unwrap().success());
    }
    place.refuses(
        3,
        "KGM-BKP-0406",
        &["restore", &id, "--repo", &repo, "--disk", "scsi9:9", "--to", "x.raw"],
    );

    // The content of the RDM to a new LUN, with an identity and a mapping of its own.
    place.refuses(2, "KGM-CLI-0001", &["restore", &id, "--repo", &repo, "--to-lun", "d2"]);
    place.refuses(
        4,
        "KGM-LUN-0409",
        &["restore", &id, "--repo", &repo, "--disk", "scsi0:1", "--to-lun", "sql01-d"],
    );
    let plan = place.ok(&["restore", &id, "--repo", &repo, "--disk", "scsi0:1", "--to-lun", "d2", "-n"]);
    assert!(plan.contains("make LUN d2 in pool p1"), "{plan}");
    place.ok(&["restore", &id, "--repo", &repo, "--disk", "scsi0:1", "--to-lun", "d2"]);
    place.ok(&["rdm", "create", "ds1:x/d2.vmdk", "--lun", "d2"]);
    place.ok(&["vm", "attach", "sql01", "ds1:x/d2.vmdk"]);
    place.ok(&["export", "start", "sql01/scsi0:2"]);
    assert!(content(&place, "sql01/scsi0:2") == at_backup[1]);
    let naa = |lun: &str| place.json(&["lun", "show", lun])["naa"].clone();
    assert_ne!(naa("d2"), naa("sql01-d"));

    // In one command, mapped in the mode that it was backed up in.
    let mapped = ["restore", &id, "--repo", &repo, "--disk", "scsi0:1", "--to-lun", "d3", "--map"];
    place.fails(2, &["restore", &id, "--repo", &repo, "--as", "x", "--map", "ds1:x/d3.vmdk"]);
    place.refuses(4, "KGM-DSK-0409", &[&mapped[..], &["ds1:x/d2.vmdk"]].concat());
    place.refuses(2, "KGM-CLI-0001", &[&mapped[..], &["ds1:x/d3-flat.vmdk"]].concat());
    let plan = place.ok(&[&mapped[..], &["ds1:x/d3.vmdk", "-n"]].concat());
    assert!(plan.contains("map it as") && plan.contains("physical mode"), "{plan}");
    let done = place.json(&[&mapped[..], &["ds1:x/d3.vmdk"]].concat());
    assert_eq!(done["mapping"], "ds1:x/d3.vmdk");
    let mapping = place.json(&["rdm", "show", "ds1:x/d3.vmdk"]);
    assert!(mapping["lun"] == "d3" && mapping["mode"] == "physical", "{mapping}");
    assert!(mapping["state"] == "resolved" && mapping["naa"] == naa("d3"), "{mapping}");
    place.ok(&["vm", "attach", "sql01", "ds1:x/d3.vmdk"]);
    place.ok(&["export", "start", "sql01/scsi0:3"]);
    assert!(content(&place, "sql01/scsi0:3") == at_backup[1]);

    // Over itself: one disk, the same LUN, only what differs.
    write(&place, "sql01/scsi0:0", &[5], 9);
    write(&place, "sql01/scsi0:1", &[100, 7], 9);
    let c_now = content(&place, "sql01/scsi0:0");
    let over = ["restore", &id, "--repo", &repo, "--in-place", "--disk", "scsi0:1"];
    place.refuses(5, "KGM-CLI-0005", &over);
    while_connected(&place, "sql01/scsi0:0", || {
        place.refuses(5, "KGM-VMS-0008", &[&over[..], &["--yes"]].concat());
    });
    let done = place.json(&[&over[..], &["--yes"]].concat());
    let changed = done["written_bytes"].as_u64().unwrap() + done["zeroed_bytes"].as_u64().unwrap();
    assert!((8192..=8192 * 4).contains(&changed), "two blocks of 4 KiB differ: {done}");
    assert!(content(&place, "sql01/scsi0:1") == at_backup[1], "restored");
    assert!(content(&place, "sql01/scsi0:0") == c_now, "the other disk was left alone");
    // What it held is kept, and can be had back.
    let undo = done["undo"].as_str().unwrap();
    place.ok(&["export", "start", &format!("sql01-d@{undo}")]);
    assert_eq!(content(&place, &format!("sql01-d@{undo}"))[100 * 4096], 9 ^ 100);
    assert_eq!(place.json(&["datastore", "check", "ds1"])["verdict"], "clean");
    assert_eq!(place.json(&["pool", "check", "p1"])["verdict"], "clean");
}

#[test]
fn a_new_vm_never_takes_a_directory_that_is_somebodys() {
    let place = with_vm_unserved("somebody");
    let (repo, id) = (repo(&place), back_up(&place));
    place.ok(&["disk", "create", "ds1:copy/mine.vmdk", "--size", "8M"]);
    let copy = ["restore", &id, "--repo", &repo, "--as", "copy"];
    let text = place.refuses(4, "KGM-VMS-0005", &copy);
    assert!(text.contains("[ds1] copy is there already"), "{text}");
    assert_eq!(place.json(&["disk", "show", "ds1:copy/mine.vmdk"])["size_bytes"], 8 << 20);
    place.refuses(4, "KGM-VMS-0409", &["restore", &id, "--repo", &repo, "--as", "sql01"]);
    place.refuses(
        3,
        "KGM-DST-0404",
        &["restore", &id, "--repo", &repo, "--as", "b", "--datastore", "nowhere"],
    );
    place.refuses(2, "KGM-CLI-0001", &["restore", &id, "--repo", &repo, "--as", "b", "--disk", "scsi0:0"]);
    place.refuses(2, "KGM-CLI-0001", &["restore", &id, "--repo", &repo]);
    place.refuses(3, "KGM-BKP-0404", &["restore", "0000", "--repo", &repo, "--as", "b"]);
    place.refuses(3, "KGM-BKP-0405", &["restore", &id, "--repo", "/nowhere", "--as", "b"]);
    assert!(
        place
            .ok(&["restore", &id, "--repo", &repo, "--as", "b", "-n"])
            .contains("a new LUN and mapping for scsi0:1")
    );
    place.ok(&["restore", &id, "--repo", &repo, "--as", "b"]);
    let (a, b) = (place.json(&["vm", "show", "sql01"]), place.json(&["vm", "show", "b"]));
    assert!(b["state"] == "ok" && a["id"] != b["id"], "{b}");
    let files = place.json(&["disk", "ls", "ds1"]);
    assert!(
        files.to_string().contains("[ds1] b/b.vmdk") && files.to_string().contains("[ds1] b/b_1.vmdk"),
        "{files}"
    );
}

#[test]
fn old_backups_go_by_id_or_by_age_and_give_back_their_space() {
    let place = with_vm("prune");
    let repo = repo(&place);
    let stored = || -> u64 {
        let files = walk(std::path::Path::new(&repo));
        files.iter().map(|f| std::fs::metadata(f).unwrap().len()).sum()
    };
    let mut ids = Vec::new();
    for seed in 1..=4 {
        write_noise(&place, "sql01/scsi0:1", 4, seed);
        ids.push(back_up(&place));
    }
    let count = || place.json(&["backup", "ls", "--repo", &repo]).as_array().unwrap().len();
    let full = stored();
    assert!(place.ok(&["backup", "rm", &ids[0], "--repo", &repo, "-n"]).contains("would remove"));
    place.refuses(5, "KGM-CLI-0005", &["backup", "rm", &ids[0], "--repo", &repo]);
    place.ok(&["backup", "rm", &ids[0], "--repo", &repo, "--yes"]);
    assert!(count() == 3 && stored() + (3 << 20) < full, "{} of {full}", stored());
    place.refuses(3, "KGM-BKP-0404", &["backup", "show", &ids[0], "--repo", &repo]);
    place.refuses(2, "KGM-CLI-0001", &["backup", "prune", "--repo", &repo, "--keep", "0"]);
    let plan = place.ok(&["backup", "prune", "--repo", &repo, "--keep", "1", "-n"]);
    assert!(plan.contains(&ids[1]) && plan.contains(&ids[2]) && !plan.contains(&ids[3]), "{plan}");
    place.refuses(5, "KGM-CLI-0005", &["backup", "prune", "--repo", &repo, "--keep", "1"]);
    place.ok(&["backup", "prune", "--repo", &repo, "--keep", "1", "--vm", "other", "--yes"]);
    assert_eq!(count(), 3);
    let done = place.json(&["backup", "prune", "--repo", &repo, "--keep", "1", "--yes"]);
    assert!(done["given_back_bytes"].as_u64().unwrap() > 6 << 20, "{done}");
    assert_eq!(count(), 1);
    assert_eq!(place.json(&["backup", "verify", "latest", "--repo", &repo])["verdict"], "clean");
    // The one that is left is whole, and the next one builds on it.
    place.ok(&["restore", &ids[3], "--repo", &repo, "--disk", "scsi0:1", "--to", "d.raw"]);
    assert!(std::fs::read(place.dir().join("d.raw")).unwrap() == content(&place, "sql01/scsi0:1"));
    let next = place.json(&["backup", "create", "sql01", "--repo", &repo]);
    assert_eq!(next["kind"], "incremental", "{next}");
}

fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(walk(&path)) } else { files.push(path) }
    }
    files
}

/// A slow backup of D:, 32 MiB that do not pack, begun and left to itself: its job's id.
fn slow_backup(place: &Place, rate: &str) -> String {
    let words = ["backup", "create", "sql01", "--repo", &repo(place), "--limit", rate, "--detach"];
    place.ok(&words).trim().to_owned()
}

fn job(place: &Place, id: &str) -> Value {
    place.json(&["job", "show", id])
}

#[test]
fn a_job_tells_how_far_it_is_and_ends_early_when_asked() {
    let place = with_vm("cancel");
    write_noise(&place, "sql01/scsi0:1", 32, 3);
    let id = slow_backup(&place, "4M/s");
    until("it copies", || job(&place, &id)["done_bytes"].as_u64().unwrap() > 0);
    let seen = job(&place, &id);
    assert!(seen["state"] == "running" && seen["phase"] == "copy" && seen["attempts"] == 1, "{seen}");
    assert!(seen["total_bytes"].as_u64().unwrap() >= 96 << 20, "{seen}");
    // One job at a time works on a VM.
    let text = place.refuses(4, "KGM-VMS-0009", &["backup", "create", "sql01", "--repo", &repo(&place)]);
    assert!(text.contains("a backup of it is under way"), "{text}");
    for words in [
        &["vm", "rm", "sql01", "--yes"][..],
        &["restore", "latest", "--repo", &repo(&place), "--in-place", "--yes"],
        &["pool", "reopen", "p1"],
        &["pool", "rm", "p1", "--yes"],
    ] {
        let out = place.run(words);
        assert!(!out.status.success(), "{words:?}: {}", crate::common::both(&out));
    }
    place.refuses(1, "KGM-JOB-0005", &["job", "wait", &id, "--timeout", "200ms"]);
    place.ok(&["job", "cancel", &id]);
    until("it ends", || job(&place, &id)["state"] != "running");
    let seen = job(&place, &id);
    assert!(seen["state"] == "cancelled" && seen["problem"]["code"] == "KGM-JOB-0001", "{seen}");
    let text = place.fails(1, &["job", "wait", &id]);
    assert!(text.contains("KGM-JOB-0001"), "{text}");
    place.refuses(4, "KGM-JOB-0006", &["job", "cancel", &id]);
    place.refuses(3, "KGM-JOB-0404", &["job", "show", "nonsense"]);
    // Nothing stays of it but what the next one uses.
    assert_eq!(place.json(&["snap", "ls"]), serde_json::json!([]));
    let done = place.json(&["backup", "create", "sql01", "--repo", &repo(&place)]);
    assert_eq!(done["kind"], "full");
    assert_eq!(place.json(&["backup", "verify", "--repo", &repo(&place)])["verdict"], "clean");
    let jobs = place.json(&["job", "ls"]);
    let states: Vec<&str> = jobs.as_array().unwrap().iter().map(|j| j["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["cancelled", "done"], "{jobs}");
}

#[test]
fn a_backup_goes_on_after_the_daemon_was_killed_or_stopped() {
    let place = with_vm("resume");
    write_noise(&place, "sql01/scsi0:1", 16, 5);
    // C: has nothing in it: what comes after its 64 MiB is of D:.
    let id = slow_backup(&place, "2M/s");
    let copied = |mebibytes: u64| job(&place, &id)["done_bytes"].as_u64().unwrap() >= mebibytes << 20;
    until("it copies", || copied(66));
    place.kill_daemon();
    assert_eq!(job(&place, &id)["state"], "running", "begun again by itself");
    until("half is copied", || copied(72));
    place.ok(&["serve", "--stop"]);
    // The last attempt need not be slow.
    let file = place.home().join(format!("jobs/{id}.json"));
    let record = std::fs::read_to_string(&file).unwrap();
    let limit = "\"limit_bytes_per_second\": 2097152";
    assert!(record.contains(limit), "{record}");
    std::fs::write(&file, record.replace(limit, "\"limit_bytes_per_second\": null")).unwrap();
    until("it is done", || job(&place, &id)["state"] == "done");
    let seen = job(&place, &id);
    assert_eq!(seen["attempts"], 3, "{seen}");
    let result = &seen["result"];
    // All is read again: what the disks hold may have changed. What was stored is not stored again.
    assert!(result["read_bytes"].as_u64().unwrap() >= 16 << 20, "{result}");
    assert!(result["stored_bytes"].as_u64().unwrap() < 12 << 20, "{result}");
    assert_eq!(place.json(&["backup", "ls", "--repo", &repo(&place)]).as_array().unwrap().len(), 1);
    place.ok(&["restore", "latest", "--repo", &repo(&place), "--disk", "scsi0:1", "--to", "d.raw"]);
    assert!(std::fs::read(place.dir().join("d.raw")).unwrap() == content(&place, "sql01/scsi0:1"));
    assert_eq!(place.json(&["snap", "ls"]), serde_json::json!([]), "no snapshot of the first attempts stays");
    // The history is there after another restart.
    place.ok(&["serve", "--stop"]);
    assert_eq!(place.json(&["job", "ls"])[0]["state"], "done");
}

#[test]
fn a_restore_goes_on_after_the_daemon_was_killed_and_leaves_nothing_behind() {
    let place = with_vm("again");
    write_noise(&place, "sql01/scsi0:0", 48, 7);
    write_noise(&place, "sql01/scsi0:1", 32, 8);
    let wanted = contents(&place, "sql01");
    let backup = back_up(&place);
    let words = ["restore", &backup, "--repo", &repo(&place), "--as", "copy", "--detach"];
    let id = place.ok(&words).trim().to_owned();
    // Killed wherever it is: the end must be the same.
    until("it has begun", || job(&place, &id)["phase"] != "" || job(&place, &id)["state"] != "running");
    place.kill_daemon();
    until("it is done", || job(&place, &id)["state"] != "running");
    let seen = job(&place, &id);
    assert_eq!(seen["state"], "done", "{seen}");
    for slot in ["copy/scsi0:0", "copy/scsi0:1"] {
        place.ok(&["export", "start", slot]);
    }
    assert!(contents(&place, "copy") == wanted);
    let luns = place.json(&["lun", "ls"]);
    assert_eq!(luns.as_array().unwrap().len(), 3, "one LUN more, not two: {luns}");
    // A daemon that is killed may leave a leak on VMFS, never damage.
    let check = place.run(&["datastore", "check", "ds1"]);
    assert!(matches!(check.status.code(), Some(0 | 3)), "{}", crate::common::both(&check));
}

#[test]
fn a_restore_to_a_lun_with_a_mapping_goes_on_after_the_daemon_was_killed() {
    let place = with_vm("map-again");
    write_noise(&place, "sql01/scsi0:1", 24, 8);
    let wanted = content(&place, "sql01/scsi0:1");
    let (repo, backup) = (repo(&place), back_up(&place));
    let to =
        ["--disk", "scsi0:1", "--to-lun", "d2", "--map", "ds1:x/d2.vmdk", "--limit", "12M/s", "--detach"];
    let id = place.ok(&[&["restore", &backup, "--repo", &repo], &to[..]].concat()).trim().to_owned();
    until("it is in the middle", || job(&place, &id)["done_bytes"].as_u64().unwrap() >= 4 << 20);
    place.kill_daemon();
    until("it is done", || job(&place, &id)["state"] != "running");
    let seen = job(&place, &id);
    assert!(seen["state"] == "done" && seen["attempts"] == 2, "{seen}");
    let luns = place.json(&["lun", "ls"]);
    assert_eq!(luns.as_array().unwrap().len(), 3, "nothing of the first attempt: {luns}");
    assert_eq!(place.json(&["rdm", "show", "ds1:x/d2.vmdk"])["state"], "resolved");
    place.ok(&["vm", "attach", "sql01", "ds1:x/d2.vmdk"]);
    place.ok(&["export", "start", "sql01/scsi0:2"]);
    assert!(content(&place, "sql01/scsi0:2") == wanted);
}

#[test]
fn a_new_vm_gets_the_firmware_settings_and_the_rest_of_the_configuration() {
    const MORE: &str =
        "nvram = \"sql01.nvram\"\nextendedConfigFile = \"sql01.vmxf\"\nuefi.secureBoot = \"TRUE\"\n";
    const VMXF: &str = "<Foundry><vmxPathName type=\"string\">sql01.vmx</vmxPathName></Foundry>\n";
    let place = with_vm_unserved("nvram");
    let firmware: Vec<u8> = (0..9000_u32).map(|n| (n % 251) as u8).collect();
    place.on_volume(async |volume| {
        let mut vmx = volume.read_file("/sql01/sql01.vmx", 1 << 20).await.unwrap();
        vmx.extend_from_slice(MORE.as_bytes());
        volume.write_file("/sql01/sql01.vmx", &vmx).await.unwrap();
        volume.write_file("/sql01/sql01.nvram", &firmware).await.unwrap();
        volume.write_file("/sql01/sql01.vmxf", VMXF.as_bytes()).await.unwrap();
        volume.write_file("/sql01/sql01.vmsd", b"snapshot.numSnapshots = \"0\"\n").await.unwrap();
    });
    let (repo, id) = (repo(&place), back_up(&place));
    let plan = place.ok(&["restore", &id, "--repo", &repo, "--as", "copy", "-n"]);
    assert!(plan.contains("write copy.vmx, copy.nvram, copy.vmxf with new identities"), "{plan}");
    assert!(plan.contains("leave out .vmsd"), "{plan}");
    // What a restore in place does not touch, it says.
    let plan = place.ok(&["restore", &id, "--repo", &repo, "--in-place", "-n"]);
    assert!(
        plan.contains("leave the configuration of sql01 as it is (.vmx, .vmsd, .nvram, .vmxf)"),
        "{plan}"
    );
    place.ok(&["restore", &id, "--repo", &repo, "--as", "copy"]);
    assert_eq!(place.json(&["vm", "show", "copy"])["state"], "ok");
    place.on_volume(async |volume| {
        let read = async |name: &str| volume.read_file(&format!("/copy/{name}"), 1 << 20).await.unwrap();
        assert!(read("copy.nvram").await == firmware);
        let vmxf = String::from_utf8(read("copy.vmxf").await).unwrap();
        assert_eq!(vmxf, VMXF.replace("sql01", "copy"));
        let vmx = String::from_utf8(read("copy.vmx").await).unwrap();
        for line in
            ["nvram = \"copy.nvram\"", "extendedConfigFile = \"copy.vmxf\"", "uefi.secureBoot = \"TRUE\""]
        {
            assert!(vmx.lines().any(|l| l == line), "{line}: {vmx}");
        }
        assert!(volume.entry("/copy/copy.vmsd").await.is_err());
    });
}
