//! Backups of several VMs at one instant, and backups that want room: what must be free, and VMs whose writes wait for it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use block::{Disk, Safe, Sector, Segments};
use serde_json::Value;

use crate::common::wire::{connect, content, contents, try_write, write_noise};
use crate::common::{Place, until};

fn repo(place: &Place) -> String {
    place.dir().join("repo").display().to_string()
}

/// Blocks of 4 KiB of each disk that the numbers go to, one after the other.
const RING: u64 = 256;
const DISKS: [&str; 3] = ["a/scsi0:0", "a/scsi0:1", "b/scsi0:0"];

/// Writes 1, 2, 3, ..., each to the next disk, each after the answer to the one before.
fn numbers(place: &Place, from: u64, stop: &AtomicBool) -> u64 {
    lane::block_on(async {
        let mut disks = Vec::new();
        for name in DISKS {
            disks.push(connect(place, name).await);
        }
        let mut last = from;
        while !stop.load(Ordering::Relaxed) {
            last += 1;
            let disk = &disks[(last % 3) as usize];
            let bytes: Vec<u8> = last.to_le_bytes().into_iter().cycle().take(4096).collect();
            disk.write(Sector(last / 3 % RING * 8), &Segments::new(&bytes), Safe::AtNextFlush).await.unwrap();
            if last.is_multiple_of(7) {
                disk.flush().await.unwrap();
            }
        }
        for disk in disks {
            disk.disconnect().await;
        }
        last
    })
}

/// The disks hold all numbers up to one, and none after it; that one.
fn one_prefix(images: &[Vec<u8>; 3]) -> u64 {
    let number = |image: &[u8], slot: u64| {
        let block = &image[slot as usize * 4096..][..4096];
        let number = u64::from_le_bytes(block[..8].try_into().unwrap());
        assert!(block.as_chunks::<8>().0.iter().all(|w| *w == number.to_le_bytes()), "a torn block");
        number
    };
    let all = images.iter().flat_map(|image| (0..RING).map(|slot| number(image, slot)));
    let last = all.max().unwrap();
    for (disk, image) in images.iter().enumerate() {
        for slot in 0..RING {
            // The newest number that went here, up to the last; 0 when none did.
            let fits = |n: &u64| n % 3 == disk as u64 && n / 3 % RING == slot;
            let newest = (0..3 * RING).filter_map(|back| last.checked_sub(back)).find(|n| *n > 0 && fits(n));
            assert_eq!(number(image, slot), newest.unwrap_or(0), "disk {disk}, block {slot}, last {last}");
        }
    }
    last
}

#[test]
fn r32_vms_are_backed_up_together_as_they_are_at_one_instant() {
    let place = Place::new("together");
    place.ok(&["pool", "create", "p1", "--size", "2G"]);
    place.ok(&["pool", "create", "p2", "--size", "256M"]);
    place.ok(&["datastore", "create", "ds1", "--size", "1G", "--pool", "p1"]);
    place.ok(&["lun", "create", "a-d", "--size", "16M", "--pool", "p2"]);
    place.ok(&["vm", "create", "a", "--datastore", "ds1", "--disk", "32M", "--rdm", "a-d:physical"]);
    place.ok(&["vm", "create", "b", "--datastore", "ds1", "--disk", "32M"]);
    for disk in DISKS {
        place.ok(&["export", "start", disk]);
    }
    let repo = repo(&place);
    place.refuses(2, "KGM-CLI-0001", &["backup", "create", "a", "b", "a", "--repo", &repo]);
    place.refuses(3, "KGM-VMS-0404", &["backup", "create", "a", "c", "--repo", &repo]);
    let plan = place.ok(&["backup", "create", "a", "b", "--repo", &repo, "-n"]);
    assert!(plan.contains("a/scsi0:1") && plan.contains("b/scsi0:0"), "{plan}");
    let mut last = 0;
    for (round, via) in ["redo", "snapshot", "redo"].into_iter().enumerate() {
        let stop = Arc::new(AtomicBool::new(false));
        let written = std::thread::scope(|threads| {
            let writer = threads.spawn(|| numbers(&place, last, &stop));
            let first = std::time::Instant::now();
            while first.elapsed() < Duration::from_millis(200) {
                std::thread::yield_now();
            }
            let done = place.json(&["backup", "create", "a", "b", "--repo", &repo, "--via", via]);
            stop.store(true, Ordering::Relaxed);
            (writer.join().unwrap(), done)
        });
        let done: Value = written.1;
        last = written.0;
        let rows = done["backups"].as_array().unwrap();
        assert_eq!(rows.iter().map(|r| r["vm"].as_str().unwrap()).collect::<Vec<_>>(), ["a", "b"], "{done}");
        for row in rows {
            assert_eq!(row["metadata"]["cut"], done["cut"], "one cut");
            assert_eq!(
                (&row["label"], &row["metadata"]["cut_vms"]),
                (&rows[0]["label"], &serde_json::json!(["a", "b"]))
            );
            assert_eq!(row["metadata"]["cut_at"], rows[0]["metadata"]["cut_at"]);
            assert_eq!(row["kind"] == "full", round == 0, "{row}");
        }
        let image = |row: &Value, disk: &str| {
            let file = format!("{round}-{}-{}.raw", row["vm"].as_str().unwrap(), &disk[6..]);
            let id = row["id"].as_str().unwrap();
            place.ok(&["restore", id, "--repo", &repo, "--disk", disk, "--to", &file]);
            std::fs::read(place.dir().join(file)).unwrap()
        };
        let images = [image(&rows[0], "scsi0:0"), image(&rows[0], "scsi0:1"), image(&rows[1], "scsi0:0")];
        let cut = one_prefix(&images);
        assert!(cut > 0 && cut <= last, "{via}: {cut} of {last}");
        // Nothing of it is left, and the running disks have everything.
        for vm in ["a", "b"] {
            assert_eq!(place.json(&["vm", "show", vm])["state"], "ok");
        }
        assert_eq!(place.json(&["snap", "ls"]), serde_json::json!([]));
        let now = DISKS.map(|disk| content(&place, disk));
        assert_eq!(one_prefix(&now), last);
    }
    assert_eq!(place.json(&["backup", "ls", "--repo", &repo]).as_array().unwrap().len(), 6);
    assert_eq!(place.json(&["backup", "verify", "--repo", &repo])["verdict"], "clean");
    assert_eq!(place.json(&["datastore", "check", "ds1"])["verdict"], "clean");
}

#[test]
fn the_reserve_is_of_the_datastore_and_of_its_pool_and_the_configuration_sets_it() {
    let place = Place::new("reserve");
    place.ok(&["pool", "create", "p1", "--size", "512M"]);
    place.ok(&["datastore", "create", "ds1", "--size", "1G"]);
    place.ok(&["vm", "create", "sql01", "--datastore", "ds1", "--disk", "256M"]);
    let repo = repo(&place);
    let redo = ["backup", "create", "sql01", "--repo", &repo, "--via", "redo"];
    // A disk of 256 MiB wants as much as it has, not a GiB.
    place.ok(&redo);
    let said = place.refuses(5, "KGM-BKP-0018", &[&redo[..], &["--reserve", "2G"]].concat());
    assert!(said.contains("datastore ds1 has"), "{said}");
    let said = place.refuses(5, "KGM-BKP-0018", &[&redo[..], &["--reserve", "600M"]].concat());
    assert!(said.contains("pool p1 has"), "{said}");
    place.ok(&["serve", "--stop"]);
    std::fs::write(place.home().join("kagami.toml"), "[backup]\nreserve = \"600M\"\n").unwrap();
    place.refuses(5, "KGM-BKP-0018", &redo);
    place.ok(&[&redo[..], &["--reserve", "0"]].concat());
    assert_eq!(place.json(&["vm", "show", "sql01"])["state"], "ok");
}

/// The events so far, as somebody hears them who comes back after the first.
fn events(place: &Place) -> String {
    let mut stream = UnixStream::connect(place.home().join("api.sock")).unwrap();
    stream.write_all(b"GET /api/v1/events HTTP/1.1\r\nhost: kagami\r\nlast-event-id: 0\r\n\r\n").unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    let (mut text, mut piece) = (Vec::new(), [0; 4096]);
    while let Ok(count) = stream.read(&mut piece) {
        text.extend_from_slice(&piece[..count]);
        if count == 0 || String::from_utf8_lossy(&text).contains("vm.resumed") {
            break;
        }
    }
    String::from_utf8_lossy(&text).into_owned()
}

#[test]
fn a_full_pool_holds_the_writes_of_a_vm_under_backup_until_there_is_room() {
    let place = Place::new("held");
    place.ok(&["pool", "create", "p1", "--size", "256M"]);
    place.ok(&["datastore", "create", "ds1", "--size", "1G"]);
    place.ok(&["lun", "create", "sql01-d", "--size", "32M"]);
    place.ok(&["vm", "create", "sql01", "--datastore", "ds1", "--disk", "64M", "--rdm", "sql01-d:physical"]);
    for disk in ["sql01/scsi0:0", "sql01/scsi0:1"] {
        place.ok(&["export", "start", disk]);
        write_noise(&place, disk, 8, 5);
    }
    let mut expected = contents(&place, "sql01");
    let at_cut = expected.clone();
    let repo = repo(&place);
    let words = ["--repo", &repo, "--via", "redo", "--reserve", "0", "--limit", "4M", "--detach"];
    place.ok(&[&["backup", "create", "sql01"], &words[..]].concat());
    let state = || place.json(&["vm", "show", "sql01"])["state"].clone();
    until("it is on redo logs", || state() == "needs consolidation");
    // Somebody else takes all the room there is: one block in each grain of 64 KiB.
    place.ok(&["lun", "create", "filler", "--size", "512M"]);
    place.ok(&["export", "start", "filler"]);
    let grains: Vec<u64> = (0..512 << 4).map(|n| n * 16).collect();
    let full = try_write(&place, "filler", &grains, 1).unwrap_err();
    assert!(full.to_string().to_lowercase().contains("space"), "{full}");
    // Far apart, so that they do not fit into what is there already.
    let blocks: Vec<u64> = (0..48).map(|n| 2100 + n * 100).collect();
    let blocks_d: Vec<u64> = (0..48).map(|n| 2100 + n * 100).collect();
    std::thread::scope(|threads| {
        let writers = [
            threads.spawn(|| try_write(&place, "sql01/scsi0:0", &blocks, 3)),
            threads.spawn(|| try_write(&place, "sql01/scsi0:1", &blocks_d, 4)),
        ];
        until("the VM is held", || state() == "held: no room");
        let disks = place.json(&["vm", "show", "sql01"])["disks"].clone();
        let held = disks.as_array().unwrap().iter().find(|d| !d["held"].is_null()).unwrap();
        assert!(held["held"]["operations"].as_u64().unwrap() > 0, "{held}");
        assert!(place.ok(&["vm", "ls"]).contains("held: no room"));
        let (_, _, metrics) = place.rest("GET", "/metrics", "");
        assert!(metrics.contains("kagami_vm_held_operations{vm=\"sql01\"}"), "{metrics}");
        // Reads go on, and nobody gives up.
        assert!(content(&place, "sql01/scsi0:0")[..4096] == expected[0][..4096]);
        assert!(writers.iter().any(|w| !w.is_finished()));
        place.ok(&["export", "stop", "filler", "--yes"]);
        place.ok(&["lun", "rm", "filler", "--now", "--yes"]);
        for writer in writers {
            writer.join().unwrap().unwrap();
        }
    });
    for (disk, (blocks, fill)) in [(&blocks, 3_u8), (&blocks_d, 4)].into_iter().enumerate() {
        for block in blocks {
            expected[disk][*block as usize * 4096..][..4096].fill(fill ^ *block as u8);
        }
    }
    let jobs = || place.json(&["job", "ls"]);
    until("the backup ends", || jobs()[0]["state"] != "running");
    assert_eq!(jobs()[0]["state"], "done", "{}", jobs());
    until("it is on its bases again", || state() == "ok");
    assert!(contents(&place, "sql01") == expected, "nothing that was held is lost");
    let heard = events(&place);
    assert!(heard.contains("event: vm.held") && heard.contains("event: vm.resumed"), "{heard}");
    for (number, disk) in ["scsi0:0", "scsi0:1"].into_iter().enumerate() {
        let file = format!("{number}.raw");
        place.ok(&["restore", "latest", "--repo", &repo, "--disk", disk, "--to", &file]);
        assert!(std::fs::read(place.dir().join(file)).unwrap() == at_cut[number], "the backup is of the cut");
    }
    let out = place.run(&["datastore", "check", "ds1", "-o", "json"]);
    let checked: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(checked["verdict"] == "clean" || checked["verdict"] == "leaks", "{checked}");
    assert_eq!(place.json(&["pool", "check", "p1"])["verdict"], "clean");
}
