//! What can be exported, by whom it is held meanwhile, what its clients can ask, and what is counted of it.

use std::process::{Command, Stdio};

use block::{Disk, Sector};
use serde_json::Value;

use crate::common::wire::{connect, content, try_write, with_vm, with_vm_unserved, write};
use crate::common::{Place, both, has};

const D: &str = "sql01/scsi0:1";

fn export(place: &Place, name: &str) -> Value {
    let all = place.json(&["export", "ls"]);
    let found = all.as_array().unwrap().iter().find(|e| e["name"] == name);
    found.unwrap_or_else(|| panic!("no export {name}: {all}")).clone()
}

fn nbdinfo(place: &Place, name: &str, words: &[&str]) -> Result<Value, String> {
    let uri = export(place, name)["uris"][0].as_str().unwrap().to_owned();
    let mut command = Command::new("timeout");
    command.args(["60", "nbdinfo", "--json"]).args(words).arg(&uri).stdin(Stdio::null());
    let out = command.output().unwrap();
    match out.status.success() {
        true => Ok(serde_json::from_slice(&out.stdout).unwrap()),
        false => Err(both(&out)),
    }
}

/// Bytes that changed since a snapshot, as nbdinfo reads the answer: where each run begins, and how long it is.
fn changed(place: &Place, name: &str, snap: &str) -> Vec<(u64, u64)> {
    let map = nbdinfo(place, name, &[&format!("--map=kagami:changed:{snap}")]).unwrap();
    let (mut runs, mut end): (Vec<(u64, u64)>, u64) = (Vec::new(), 0);
    for extent in map.as_array().unwrap() {
        let (at, length) = (extent["offset"].as_u64().unwrap(), extent["length"].as_u64().unwrap());
        assert_eq!(at, end, "{map}");
        end += length;
        match (extent["type"].as_u64().unwrap(), runs.last_mut()) {
            (0, _) => {}
            (1, Some(last)) if last.0 + last.1 == at => last.1 += length,
            (1, _) => runs.push((at, length)),
            (other, _) => panic!("type {other}: {map}"),
        }
    }
    assert_eq!(end, 32 << 20, "the whole disk is told of");
    runs
}

/// These blocks of 4 KiB, each by itself.
fn blocks(list: &[u64]) -> Vec<(u64, u64)> {
    list.iter().map(|block| (block * 4096, 4096)).collect()
}

/// The snapshots that can be asked for.
fn contexts(place: &Place, name: &str) -> Vec<String> {
    let info = nbdinfo(place, name, &[]).unwrap();
    let all = info["exports"][0]["contexts"].as_array().unwrap().clone();
    let all = all.iter().map(|context| context.as_str().unwrap().to_owned());
    all.filter(|context| context.starts_with("kagami:")).collect()
}

#[test]
fn r41_changed_blocks_of_a_mapped_lun_and_of_its_snapshots_are_told_exactly() {
    if !has("nbdinfo") {
        return;
    }
    let place = with_vm("changed");
    write(&place, D, &[1, 2], 0x10);
    assert_eq!(contexts(&place, D), [""; 0]);
    place.ok(&["snap", "create", "sql01-d@s1"]);
    assert_eq!(contexts(&place, D), ["kagami:changed:s1"]);
    assert_eq!(changed(&place, D, "s1"), []);
    write(&place, D, &[3, 100], 0x20);
    assert_eq!(changed(&place, D, "s1"), blocks(&[3, 100]));
    place.ok(&["group", "create", "s2", "sql01-d", "ds1"]);
    write(&place, D, &[5], 0x30);
    // What is zeroed or unmapped has changed, too.
    lane::block_on(async {
        let disk = connect(&place, D).await;
        disk.zero(Sector(1 << 3), 8, true).await.unwrap();
        disk.unmap(Sector(100 << 3), 8).await.unwrap();
        disk.flush().await.unwrap();
        disk.disconnect().await;
    });
    assert_eq!(changed(&place, D, "s2"), blocks(&[1, 5, 100]));
    assert_eq!(changed(&place, D, "s1"), blocks(&[1, 3, 5, 100]));
    // A snapshot is asked for what changed until it was taken; it knows of none that came later.
    place.ok(&["export", "start", "sql01-d@s2"]);
    place.ok(&["snap", "create", "sql01-d@s3"]);
    assert_eq!(contexts(&place, "sql01-d@s2"), ["kagami:changed:s1"]);
    assert_eq!(changed(&place, "sql01-d@s2", "s1"), blocks(&[3, 100]));
    // The same after a restart, and by every name of the disk.
    place.kill_daemon();
    assert_eq!(changed(&place, D, "s2"), blocks(&[1, 5, 100]));
    assert_eq!(changed(&place, "sql01-d@s2", "s1"), blocks(&[3, 100]));
    place.ok(&["export", "start", "ds1:sql01/sql01_1.vmdk", "--name", "again", "--read-only"]);
    assert_eq!(changed(&place, "again", "s2"), blocks(&[1, 5, 100]));
    // A disk on VMFS has no map of its own: nothing is offered, and nothing wrong said.
    assert_eq!(contexts(&place, "sql01/scsi0:0"), [""; 0]);
    place.ok(&["snap", "rm", "sql01-d@s1", "--yes"]);
    assert_eq!(contexts(&place, D), ["kagami:changed:s2", "kagami:changed:s3"]);
    assert!(nbdinfo(&place, D, &["--map=kagami:changed:s1"]).is_err(), "what is gone is not offered");
    assert_eq!(contexts(&place, "sql01-d@s2"), [""; 0]);
}

#[test]
fn a_disk_that_no_vm_has_is_served_by_itself() {
    let place = with_vm_unserved("alone");
    const X: &str = "ds1:data/x.vmdk";
    place.ok(&["disk", "create", X, "--size", "8M"]);
    place.refuses(3, "KGM-DSK-0404", &["export", "start", "ds1:data/y.vmdk"]);
    // Looking holds nothing.
    assert!(place.ok(&["export", "start", X, "-n"]).contains("would serve"));
    place.ok(&["export", "start", X, "--name", "x"]);
    write(&place, "x", &[7], 0x40);
    let by_x = |exit: i32, code: &str, words: &[&str]| {
        let text = place.refuses(exit, code, words);
        assert!(text.contains("\"x\""), "{words:?} names who has it: {text}");
    };
    by_x(4, "KGM-DSK-0007", &["vm", "attach", "sql01", X]);
    by_x(4, "KGM-DSK-0004", &["disk", "rm", X, "--yes"]);
    by_x(4, "KGM-DSK-0409", &["export", "start", X, "--name", "y"]);
    by_x(4, "KGM-DSK-0409", &["export", "start", X, "--name", "y", "--read-only"]);
    // What was acknowledged is in a cut below the datastore; after a crash it is served again.
    place.ok(&["snap", "create", "ds1@now"]);
    place.kill_daemon();
    assert_eq!(export(&place, "x")["size_bytes"], 8 << 20);
    assert_eq!(content(&place, "x")[7 * 4096], 0x47);
    place.ok(&["export", "stop", "x"]);
    // Now it is the VM's, and by its file's name the VM's disk is served.
    place.ok(&["vm", "attach", "sql01", X]);
    place.ok(&["export", "start", X, "--name", "x"]);
    assert_eq!(content(&place, "x")[7 * 4096], 0x47);
    by_x(4, "KGM-VMS-0007", &["vm", "detach", "sql01", "scsi0:2"]);
    place.ok(&["export", "stop", "x"]);

    // A mapping that no VM has.
    place.ok(&["lun", "create", "raw", "--size", "16M"]);
    place.ok(&["rdm", "create", "ds1:data/r.vmdk", "--lun", "raw"]);
    place.ok(&["export", "start", "ds1:data/r.vmdk", "--name", "x"]);
    write(&place, "x", &[1], 0x50);
    by_x(4, "KGM-DSK-0007", &["rdm", "convert", "ds1:data/r.vmdk", "--mode", "physical"]);
    place.refuses(5, "KGM-LUN-0002", &["export", "start", "raw"]);
    place.ok(&["export", "stop", "x"]);

    // The disks of a VM that is not registered; registering it would open them twice.
    place.ok(&["disk", "create", "ds1:sql01/extra.vmdk", "--size", "8M"]);
    place.ok(&["export", "start", "ds1:sql01/extra.vmdk", "--name", "x"]);
    by_x(4, "KGM-VMS-0007", &["vm", "rm", "sql01", "--files", "--yes"]);
    place.ok(&["vm", "rm", "sql01"]);
    by_x(4, "KGM-DST-0004", &["datastore", "rm", "ds1", "--yes"]);
    place.ok(&["export", "stop", "x"]);
    place.ok(&["export", "start", "ds1:sql01/sql01.vmdk", "--name", "x"]);
    write(&place, "x", &[9], 0x60);
    by_x(4, "KGM-DSK-0007", &["vm", "register", "ds1:sql01/sql01.vmx"]);
    place.ok(&["export", "stop", "x"]);
    place.ok(&["vm", "register", "ds1:sql01/sql01.vmx"]);
    assert_eq!(place.json(&["vm", "show", "sql01"])["state"], "ok");
    place.ok(&["export", "start", "sql01/scsi0:0"]);
    assert_eq!(content(&place, "sql01/scsi0:0")[9 * 4096], 0x69);
    assert_eq!(place.json(&["datastore", "check", "ds1"])["verdict"], "clean");
}

#[test]
fn r16_a_base_below_a_redo_log_is_served_for_reading_alone() {
    let place = with_vm_unserved("below");
    place.ok(&["disk", "create", "ds1:data/base.vmdk", "--size", "8M"]);
    let child = "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=00000001\ncreateType=\"vmfsSparse\"\n\
                 parentFileNameHint=\"base.vmdk\"\n\n# Extent description\nRW 16384 VMFSSPARSE \"base-000001-delta.vmdk\"\n";
    place.on_volume(async |volume| {
        volume.write_file("/data/base-000001.vmdk", child.as_bytes()).await.unwrap();
    });
    let start = ["export", "start", "ds1:data/base.vmdk"];
    let text = place.refuses(5, "KGM-EXP-0010", &start);
    assert!(text.contains("base-000001.vmdk"), "{text}");
    place.ok(&[&start[..], &["--read-only"]].concat());
    assert!(try_write(&place, "ds1:data/base.vmdk", &[0], 1).is_err());
    assert!(content(&place, "ds1:data/base.vmdk").iter().all(|byte| *byte == 0));
}

#[test]
fn r5_one_disk_is_written_under_one_name_unless_all_agree() {
    let place = with_vm("share");
    place.ok(&["lun", "create", "plain", "--size", "8M"]);
    place.ok(&["export", "start", "plain"]);
    for (target, first) in [("plain", "plain"), (D, D), ("ds1:sql01/sql01_1.vmdk", D)] {
        for more in [&[][..], &["--shared"]] {
            let words = [&["export", "start", target, "--name", "other"][..], more].concat();
            let text = place.refuses(5, "KGM-EXP-0008", &words);
            assert!(text.contains(&format!("export \"{first}\"")) && text.contains("--shared"), "{text}");
        }
        // Who only reads is in nobody's way.
        place.ok(&["export", "start", target, "--name", "other", "--read-only"]);
        place.ok(&["export", "stop", "other"]);
    }
    // A mapping is one disk, whichever VM it is plugged into.
    place.ok(&["vm", "create", "sql02", "--datastore", "ds1", "--disk", "8M"]);
    let text = place.refuses(1, "KGM-VMS-0010", &["vm", "attach", "sql02", "ds1:sql01/sql01_1.vmdk"]);
    assert!(text.contains("sql01/scsi0:1 has it"), "{text}");
    place.on_volume(async |volume| {
        let disk = "/vmfs/volumes/ds1/sql01/sql01_1.vmdk";
        let plugged = format!("scsi0:1.present = \"TRUE\"\nscsi0:1.fileName = \"{disk}\"\n");
        for (vmx, lines) in [("/sql01/sql01.vmx", ""), ("/sql02/sql02.vmx", plugged.as_str())] {
            let mut text = String::from_utf8(volume.read_file(vmx, 1 << 20).await.unwrap()).unwrap();
            text += &format!("{lines}scsi0:1.sharing = \"multi-writer\"\n");
            volume.write_file(vmx, text.as_bytes()).await.unwrap();
        }
    });
    for vm in ["sql01", "sql02"] {
        assert_eq!(place.json(&["vm", "show", vm])["state"], "ok", "{vm}");
    }
    let second = ["export", "start", "sql02/scsi0:1"];
    let text = place.refuses(5, "KGM-EXP-0008", &second);
    assert!(text.contains(&format!("export \"{D}\"")), "{text}");
    place.ok(&["export", "stop", D]);
    place.ok(&["export", "start", D, "--shared"]);
    place.refuses(5, "KGM-EXP-0008", &second);
    place.ok(&[&second[..], &["--shared"]].concat());
    write(&place, D, &[1], 0x10);
    write(&place, "sql02/scsi0:1", &[2], 0x10);
    assert!(content(&place, D) == content(&place, "sql02/scsi0:1"));
    assert_eq!(content(&place, D)[4096..3 * 4096], [[0x11; 4096], [0x12; 4096]].concat());
}

#[test]
fn old_hands_find_their_names() {
    let place = with_vm_unserved("old");
    place.ok(&["lun", "create", "d", "--size", "16M"]);
    place.ok(&["lun", "create", "e", "--size", "16M"]);
    place.ok(&["vmkfstools", "-r", "d", "/vmfs/volumes/ds1/old/r.vmdk"]);
    let naa = place.json(&["lun", "show", "e"])["naa"].as_str().unwrap().to_owned();
    place.ok(&["vmkfstools", "-z", &format!("/vmfs/devices/disks/{naa}"), "ds1:old/p.vmdk"]);
    assert_eq!(place.json(&["rdm", "show", "ds1:old/r.vmdk"])["mode"], "virtual");
    assert_eq!(place.json(&["rdm", "show", "ds1:old/p.vmdk"])["mode"], "physical");
    place.ok(&["vmkfstools", "-c", "8m", "-d", "thin", "/vmfs/volumes/ds1/old/t.vmdk"]);
    place.ok(&["vmkfstools", "-c", "8M", "/vmfs/volumes/ds1/old/z.vmdk"]);
    for (disk, kind) in [("ds1:old/t.vmdk", "thin"), ("ds1:old/z.vmdk", "thick")] {
        let view = place.json(&["disk", "show", disk]);
        assert_eq!((&view["kind"], &view["size_bytes"]), (&kind.into(), &(8 << 20).into()), "{view}");
    }
    place.refuses(2, "KGM-CLI-0001", &["vmkfstools", "ds1:old/t.vmdk"]);
    place.fails(2, &["vmkfstools", "-r", "d", "-z", "e", "ds1:old/q.vmdk"]);
    let repo = place.dir().join("repo").display().to_string();
    place.ok(&["vmsnap", "sql01", "--repo", &repo]);
    place.ok(&["vmres", "latest", "--repo", &repo, "--as", "copy"]);
    assert_eq!(place.json(&["vm", "show", "copy"])["state"], "ok");
}

/// The value of a line of `/metrics`.
fn metric(text: &str, name: &str) -> f64 {
    let line = text.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')));
    let line = line.unwrap_or_else(|| panic!("{name} is not in\n{text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn metrics_count_what_exports_do_and_how_long_writes_were_held() {
    let place = with_vm("metrics");
    let scrape = || place.rest("GET", "/metrics", "").2;
    assert_eq!(metric(&scrape(), "kagami_cut_hold_seconds_count"), 0.0);
    write(&place, D, &[1, 2, 3], 0x10);
    content(&place, D);
    assert!(lane::block_on(async {
        let disk = connect(&place, D).await;
        let error = disk.zero(Sector(1 << 40), 8, true).await;
        disk.disconnect().await;
        error.is_err()
    }));
    let text = scrape();
    let of_d = |name: &str| metric(&text, &format!("kagami_export_{name}{{export=\"{D}\"}}"));
    assert_eq!((of_d("writes_total"), of_d("write_bytes_total"), of_d("flushes_total")), (3.0, 12288.0, 1.0));
    assert_eq!((of_d("reads_total"), of_d("read_bytes_total")), (32.0, f64::from(32 << 20)));
    for (kind, count) in [("read", 32.0), ("write", 3.0), ("flush", 1.0)] {
        assert_eq!(of_d(&format!("{kind}_seconds_count")), count, "each request is in the histogram");
        let last = format!("kagami_export_{kind}_seconds_bucket{{le=\"+Inf\",export=\"{D}\"}}");
        assert_eq!(metric(&text, &last), count);
        assert!(of_d(&format!("{kind}_seconds_sum")) > 0.0);
    }
    assert_eq!(of_d("in_flight"), 0.0);
    let c = "kagami_export_writes_total{export=\"sql01/scsi0:0\"}";
    assert_eq!(metric(&text, c), 0.0, "each export for itself");
    let info = format!("kagami_export_info{{export=\"{D}\",target=\"{D}\",lun=\"sql01-d\"}}");
    assert_eq!(metric(&text, &info), 1.0);

    // Every cut: of a group, below a datastore, of a backup; and the commit's two moments.
    place.ok(&["group", "create", "g", "sql01-d", "ds1"]);
    assert_eq!(metric(&scrape(), "kagami_cut_hold_seconds_count"), 1.0);
    place.ok(&["snap", "create", "ds1@s"]);
    assert_eq!(metric(&scrape(), "kagami_cut_hold_seconds_count"), 2.0);
    assert_eq!(metric(&scrape(), "kagami_commit_hold_seconds_count"), 0.0);
    let repo = place.dir().join("repo").display().to_string();
    place.ok(&["backup", "create", "sql01", "--repo", &repo, "--via", "redo"]);
    let text = scrape();
    assert_eq!(metric(&text, "kagami_cut_hold_seconds_count"), 3.0);
    assert_eq!(metric(&text, "kagami_commit_hold_seconds_count"), 2.0);
    assert!(metric(&text, "kagami_cut_hold_seconds_sum") > 0.0);
}
