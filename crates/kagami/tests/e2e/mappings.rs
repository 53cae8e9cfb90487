//! Raw device mappings as a user has them: what the resolver answers, what is rebuilt, what is refused.

use std::rc::Rc;

use crate::common::Place;
use crate::common::wire::{content, while_connected, with_vm_unserved, write};
use array::Claim;
use serde_json::Value;
use vmdisk::VmfsFolder;
use vmdisk::folder::Folder;

/// Descriptor of D: as the daemon and as the volume name it.
const D: &str = "ds1:sql01/sql01_1.vmdk";
const D_PATH: &str = "/sql01/sql01_1.vmdk";
const D_MAPPING: &str = "/sql01/sql01_1-rdmp.vmdk";

/// VM `sql01` with C: in pool p1 and D: a mapping of LUN `d` in pool p2.
fn in_two_pools(name: &str) -> Place {
    let place = Place::new(name);
    place.ok(&["pool", "create", "p1", "--size", "2G"]);
    place.ok(&["pool", "create", "p2", "--size", "256M"]);
    place.ok(&["datastore", "create", "ds1", "--size", "1G", "--pool", "p1"]);
    place.ok(&["lun", "create", "d", "--size", "32M", "--pool", "p2"]);
    place.ok(&["vm", "create", "sql01", "--datastore", "ds1", "--disk", "16M", "--rdm", "d:physical"]);
    place.ok(&["export", "start", "sql01/scsi0:1"]);
    place
}

fn state(place: &Place) -> String {
    place.json(&["rdm", "show", D])["state"].as_str().unwrap().to_owned()
}

fn places(place: &Place) -> Vec<String> {
    let view = place.json(&["rdm", "show", D]);
    let list = view["places"].as_array().unwrap();
    list.iter().map(|p| p.as_str().unwrap().to_owned()).collect()
}

fn all_well(place: &Place) {
    assert!(places(place).iter().all(|p| p.ends_with(": ok")), "{:?}", places(place));
    assert_eq!(state(place), "resolved");
    assert_eq!(place.json(&["vm", "show", "sql01"])["state"], "ok");
}

fn export_state(place: &Place) -> Value {
    place.json(&["export", "ls"])[0].clone()
}

#[test]
fn a_grown_lun_keeps_its_old_size_until_rdm_grow() {
    let place = in_two_pools("grow");
    write(&place, "sql01/scsi0:1", &[0, 8191], 3);
    assert_eq!(place.json(&["rdm", "grow", D, "-n"])["would"][0], "change nothing: it is so already");
    place.ok(&["lun", "resize", "d", "64M"]);
    assert!(state(&place).starts_with("larger"), "{}", state(&place));
    assert_eq!(content(&place, "sql01/scsi0:1").len(), 32 << 20, "the old size");
    // A running VM keeps its disks.
    while_connected(&place, "sql01/scsi0:1", || {
        let text = place.refuses(5, "KGM-VMS-0008", &["rdm", "grow", D]);
        assert!(text.contains("kagami export stop sql01/scsi0:1"), "{text}");
    });
    assert!(place.ok(&["rdm", "grow", D, "-n"]).contains("from 32.0 MiB to 64.0 MiB"));
    place.ok(&["rdm", "grow", D]);
    all_well(&place);
    let grown = content(&place, "sql01/scsi0:1");
    assert_eq!(grown.len(), 64 << 20, "the next connection sees the new size");
    assert!(grown[0] == 3 && grown[8191 * 4096] == 3 ^ 0xff, "and the same content");
    place.refuses(2, "KGM-RDM-0001", &["rdm", "grow", "ds1:sql01/sql01.vmdk"]);
    place.refuses(3, "KGM-DSK-0404", &["rdm", "grow", "ds1:sql01/nothing.vmdk"]);
    assert_eq!(place.json(&["datastore", "check", "ds1"])["verdict"], "clean");
}

#[test]
fn a_missing_lun_is_said_everywhere_and_comes_back_without_a_restart() {
    let place = in_two_pools("missing");
    write(&place, "sql01/scsi0:1", &[7], 9);
    place.ok(&["serve", "--stop"]);
    let (file, away) = (place.home().join("media/p2.pool"), place.dir().join("p2.away"));
    std::fs::rename(&file, &away).unwrap();
    assert_eq!(state(&place), "missing");
    let vm = place.json(&["vm", "show", "sql01"]);
    assert_eq!(vm["state"], "disk missing", "{vm}");
    let why = vm["disks"][1]["trouble"].as_str().unwrap();
    assert!(why.contains("naa.6") && why.contains("is not visible"), "the full identity: {why}");
    let export = export_state(&place);
    assert!(
        export["state"] == "down" && export["trouble"].as_str().unwrap().contains("not visible"),
        "{export}"
    );
    let repo = place.dir().join("repo").display().to_string();
    place.refuses(5, "KGM-BKP-0008", &["backup", "create", "sql01", "--repo", &repo]);
    place.refuses(5, "KGM-RDM-0004", &["rdm", "grow", D]);
    let text = place.refuses(3, "KGM-IMG-0404", &["pool", "reopen", "p2"]);
    assert!(text.contains("p2.pool"), "{text}");
    let scan = place.json(&["rdm", "scan"]);
    assert!(scan["findings"].to_string().contains("is not here"), "{scan}");
    // Bytes that name a LUN are found again by name only: the pool comes back, and all with it.
    std::fs::rename(&away, &file).unwrap();
    place.ok(&["pool", "reopen", "p2"]);
    all_well(&place);
    assert_eq!(export_state(&place)["state"], "serving");
    assert_eq!(content(&place, "sql01/scsi0:1")[7 * 4096], 9 ^ 7);
    assert_eq!(place.json(&["serve", "--status"])["troubles"], serde_json::json!([]));
}

#[test]
fn a_lun_that_became_smaller_is_not_opened() {
    let place = with_vm_unserved("smaller");
    let resize = |factor: fn(u64) -> u64| {
        place.on_volume(async |volume| {
            let folder: Rc<dyn Folder> = VmfsFolder::new(volume.clone());
            let copies = vmdisk::create::read_copies(&folder, D_PATH).await.unwrap();
            let mut identity = copies.inode.unwrap();
            identity.lun.sectors = factor(identity.lun.sectors);
            vmdisk::create::rebuild_rdm(&folder, D_PATH, &identity).await.unwrap();
        });
    };
    resize(|sectors| sectors * 2);
    assert!(state(&place).starts_with("smaller"), "{}", state(&place));
    let vm = place.json(&["vm", "show", "sql01"]);
    assert!(vm["disks"][1]["trouble"].as_str().unwrap().contains("only read-only"), "{vm}");
    let text = place.refuses(3, "KGM-EXP-0003", &["export", "start", "sql01/scsi0:1"]);
    assert!(text.contains("the mapping was made for"), "{text}");
    place.refuses(5, "KGM-RDM-0004", &["rdm", "grow", D]);
    resize(|sectors| sectors / 2);
    all_well(&place);
}

#[test]
fn a_lun_of_another_block_size_is_refused() {
    let place = with_vm_unserved("blocksize");
    let set = |bytes: u32| {
        place.on_volume(async |volume| {
            let folder: Rc<dyn Folder> = VmfsFolder::new(volume.clone());
            let copies = vmdisk::create::read_copies(&folder, D_PATH).await.unwrap();
            let mut identity = copies.inode.unwrap();
            identity.lun.logical_block = bytes;
            vmdisk::create::rebuild_rdm(&folder, D_PATH, &identity).await.unwrap();
        });
    };
    set(4096);
    assert!(state(&place).starts_with("another block size"), "{}", state(&place));
    let vm = place.json(&["vm", "show", "sql01"]);
    assert_eq!(vm["state"], "disk missing", "{vm}");
    assert!(vm["disks"][1]["trouble"].as_str().unwrap().contains("has blocks of 512 bytes"), "{vm}");
    let text = place.refuses(3, "KGM-EXP-0003", &["export", "start", "sql01/scsi0:1"]);
    assert!(text.contains("the mapping was made for 4096"), "{text}");
    assert!(place.json(&["rdm", "scan"])["findings"].to_string().contains("another block size"));
    set(512);
    all_well(&place);
}

#[test]
fn a_missing_lun_names_those_that_look_like_it_and_takes_none() {
    let place = in_two_pools("candidates");
    write(&place, "sql01/scsi0:1", &[0, 5, 4000], 0x21);
    for lun in ["twin", "empty", "other"] {
        place.ok(&["lun", "create", lun, "--size", "32M", "--pool", "p1"]);
        place.ok(&["export", "start", lun]);
    }
    write(&place, "twin", &[0, 5, 4000], 0x21);
    write(&place, "other", &[0, 5], 0x22);
    // The tag is that of the content when the daemon ended.
    place.ok(&["serve", "--stop"]);
    let (file, away) = (place.home().join("media/p2.pool"), place.dir().join("p2.away"));
    std::fs::rename(&file, &away).unwrap();
    let view = place.json(&["rdm", "show", D]);
    assert_eq!(
        (&view["state"], &view["candidates"]),
        (&"missing".into(), &serde_json::json!(["twin"])),
        "{view}"
    );
    let scan = place.json(&["rdm", "scan"])["findings"].to_string();
    assert!(scan.contains("is on twin: kagami rdm remap"), "{scan}");
    assert_eq!(place.json(&["vm", "show", "sql01"])["state"], "disk missing", "shown, never chosen");
    place.ok(&["export", "stop", "twin", "--yes"]);
    place.ok(&["rdm", "remap", D, "--to", "twin", "--yes"]);
    assert_eq!(content(&place, "sql01/scsi0:1")[5 * 4096], 0x21 ^ 5);
    assert_eq!(place.json(&["rdm", "show", D])["candidates"], serde_json::json!([]));
}

#[test]
fn two_pools_of_one_identity_are_both_refused() {
    let place = in_two_pools("ambiguous");
    write(&place, "sql01/scsi0:1", &[1], 0x50);
    place.ok(&["serve", "--stop"]);
    let media = place.home().join("media");
    let copied = std::process::Command::new("cp")
        .args(["--sparse=always"])
        .args([media.join("p2.pool"), media.join("p3.pool")])
        .status();
    assert!(copied.unwrap().success());
    let record = std::fs::read_to_string(place.home().join("pools/p2.json")).unwrap();
    std::fs::write(place.home().join("pools/p3.json"), record.replace("p2", "p3")).unwrap();
    assert_eq!(state(&place), "missing", "which of the two has the truth nobody knows");
    let pools = place.json(&["pool", "ls"]);
    for pool in &pools.as_array().unwrap()[1..] {
        assert!(
            pool["state"] == "missing" && pool["trouble"].to_string().contains("same identity"),
            "{pools}"
        );
    }
    place.ok(&["pool", "rm", "p3"]);
    assert!(media.join("p3.pool").exists(), "its files stay");
    place.ok(&["pool", "reopen", "p2"]);
    all_well(&place);
    let copy = media.join("p3.pool").display().to_string();
    place.refuses(4, "KGM-POL-0004", &["pool", "import", &copy, "--name", "p3"]);
    assert_eq!(content(&place, "sql01/scsi0:1")[4096], 0x51);
}

#[test]
fn r7_each_of_the_three_places_is_rebuilt_from_the_others() {
    let place = with_vm_unserved("places");
    place.ok(&["export", "start", "sql01/scsi0:1"]);
    write(&place, "sql01/scsi0:1", &[5], 0x50);
    let rebuilt = |what: &str| {
        let seen = place.json(&["rdm", "scan"]);
        assert!(
            seen["findings"].to_string().contains(what) && seen["rebuilt"] == serde_json::json!([]),
            "{seen}"
        );
        let scan = place.json(&["rdm", "scan", "--rebuild"]);
        assert_eq!(scan["rebuilt"].as_array().unwrap().len(), 1, "{what}: {scan}");
        let again = place.json(&["rdm", "scan", "--rebuild"]);
        assert_eq!((&again["rebuilt"], &again["findings"]), (&serde_json::json!([]), &serde_json::json!([])));
        place.ok(&["serve", "--stop"]);
        all_well(&place);
        assert_eq!(content(&place, "sql01/scsi0:1")[5 * 4096], 0x55, "the data of the LUN");
    };
    place.on_volume(async |volume| volume.remove(D_PATH).await.unwrap());
    rebuilt("its descriptor is gone");
    place.on_volume(async |volume| {
        volume.write_file(D_PATH, b"# Disk DescriptorFile\nversion=9\n\0\0").await.unwrap()
    });
    rebuilt("the descriptor is damaged");
    place.on_volume(async |volume| volume.remove(D_MAPPING).await.unwrap());
    rebuilt("the mapping file is missing");
    place.on_volume(async |volume| {
        let mut rdm = volume.read_rdm(D_MAPPING).await.unwrap();
        rdm.tail[40] ^= 1;
        volume.replace_rdm(D_MAPPING, &rdm).await.unwrap();
    });
    rebuilt("the mapping file is damaged");
    place.offline("p1", async |pool| pool.lun("sql01-d").unwrap().claim(None).await.unwrap());
    rebuilt("the claim on the LUN is missing");
    // Two of the three.
    place.on_volume(async |volume| volume.remove(D_PATH).await.unwrap());
    place.offline("p1", async |pool| pool.lun("sql01-d").unwrap().claim(None).await.unwrap());
    rebuilt("its descriptor is gone");
    place.on_volume(async |volume| {
        volume.remove(D_PATH).await.unwrap();
        volume.remove(D_MAPPING).await.unwrap();
    });
    rebuilt("its descriptor is gone");
    assert_eq!(place.json(&["datastore", "check", "ds1"])["verdict"], "clean");
}

#[test]
fn a_mapping_is_remapped_by_the_operator_alone() {
    let place = with_vm_unserved("remap");
    for (name, size) in [("e", "32M"), ("small", "16M")] {
        place.ok(&["lun", "create", name, "--size", size]);
    }
    place.ok(&["export", "start", "sql01/scsi0:1"]);
    write(&place, "sql01/scsi0:1", &[1], 0x50);
    let plan = place.json(&["rdm", "remap", D, "--to", "e", "-n"]);
    assert!(plan["would"][1].as_str().unwrap().contains("content differs"), "{plan}");
    place.refuses(5, "KGM-CLI-0005", &["rdm", "remap", D, "--to", "e"]);
    place.refuses(5, "KGM-RDM-0005", &["rdm", "remap", D, "--to", "small", "--yes"]);
    place.refuses(5, "KGM-LUN-0002", &["rdm", "remap", D, "--to", "ds1", "--yes"]);
    while_connected(&place, "sql01/scsi0:1", || {
        place.refuses(5, "KGM-VMS-0008", &["rdm", "remap", D, "--to", "e", "--yes"]);
    });
    let claim = |lun: &str| place.json(&["lun", "show", lun])["claim"].clone();
    assert_eq!(claim("e"), Value::Null, "what was refused left no claim");
    place.ok(&["rdm", "remap", D, "--to", "e", "--yes"]);
    all_well(&place);
    assert!(claim("sql01-d").is_null() && claim("e").as_str().unwrap().contains("sql01_1"));
    assert_eq!(content(&place, "sql01/scsi0:1")[4096], 0, "the other LUN");
    let audit = std::fs::read_to_string(place.home().join("audit.log")).unwrap();
    let line: Value = serde_json::from_str(audit.lines().last().unwrap()).unwrap();
    assert!(line["from"]["naa"].as_str().unwrap().starts_with("naa.6"), "{line}");
    // The audit record says how to undo it.
    let undo = line["undo"].as_str().unwrap().to_owned();
    assert_eq!(undo, "kagami rdm remap '[ds1] sql01/sql01_1.vmdk' --to sql01-d");
    place.ok(&["rdm", "remap", "[ds1] sql01/sql01_1.vmdk", "--to", "sql01-d", "--yes"]);
    all_well(&place);
    assert!(claim("e").is_null());
    // A remap that was cut short left two LUNs that say they are mapped: the two other places decide.
    place.offline("p1", async |pool| {
        let claim = Claim::Mapping { datastore: "ds1".into(), path: D_PATH.into(), physical: true };
        pool.lun("e").unwrap().claim(Some(claim)).await.unwrap();
    });
    place.ok(&["rdm", "scan", "--rebuild"]);
    assert!(claim("e").is_null());
    all_well(&place);
}

#[test]
fn r6_the_mode_changes_and_the_data_does_not() {
    let place = with_vm_unserved("convert");
    place.ok(&["export", "start", "sql01/scsi0:1"]);
    write(&place, "sql01/scsi0:1", &[1, 2], 1);
    let before = content(&place, "sql01/scsi0:1");
    while_connected(&place, "sql01/scsi0:1", || {
        place.refuses(5, "KGM-VMS-0008", &["rdm", "convert", D, "--mode", "virtual"]);
    });
    for (mode, kind) in [("virtual", "rdm"), ("physical", "rdmp"), ("virtual", "rdm")] {
        place.ok(&["rdm", "convert", D, "--mode", mode]);
        all_well(&place);
        assert_eq!(place.json(&["rdm", "show", D])["mode"], mode);
        assert_eq!(place.json(&["vm", "show", "sql01"])["disks"][1]["kind"], kind);
        assert!(content(&place, "sql01/scsi0:1") == before);
    }
    place.refuses(2, "KGM-RDM-0001", &["rdm", "convert", "ds1:sql01/sql01.vmdk", "--mode", "virtual"]);
    // The descriptor lost after a conversion: the mapping file still has the old mode's name.
    place.on_volume(async |volume| volume.remove(D_PATH).await.unwrap());
    assert_eq!(place.json(&["rdm", "scan", "--rebuild"])["rebuilt"].as_array().unwrap().len(), 1);
    place.ok(&["serve", "--stop"]);
    all_well(&place);
    assert_eq!(place.json(&["rdm", "show", D])["mode"], "virtual");
    assert_eq!(place.json(&["datastore", "check", "ds1"])["verdict"], "clean");
}

#[test]
fn one_lun_has_one_mapping() {
    let place = Place::new("twice");
    place.ok(&["pool", "create", "p1", "--size", "2G"]);
    place.ok(&["datastore", "create", "ds1", "--size", "1G"]);
    place.ok(&["lun", "create", "d", "--size", "16M"]);
    let twice = ["vm", "create", "a", "--datastore", "ds1", "--rdm", "d", "--rdm", "d"];
    place.refuses(5, "KGM-LUN-0002", &twice);
    place.refuses(3, "KGM-VMS-0404", &["vm", "show", "a"]);
    assert!(place.json(&["lun", "show", "d"])["claim"].is_null(), "what failed left no claim");
    place.ok(&["rdm", "create", "ds1:x/d.vmdk", "--lun", "d"]);
    place.refuses(5, "KGM-LUN-0002", &["rdm", "create", "ds1:x/e.vmdk", "--lun", "d"]);
    place.ok(&["disk", "rm", "ds1:x/d.vmdk", "--yes"]);
    assert!(place.json(&["lun", "show", "d"])["claim"].is_null());
    place.ok(&["rdm", "create", "ds1:x/e.vmdk", "--lun", "d"]);
    assert_eq!(place.json(&["rdm", "ls"]).as_array().unwrap().len(), 1);
}
