//! Bad input and faults: each a typed error with the next command, nothing lost, and all well again when the fault is gone.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::rc::Rc;

use block::Disk;
use vmdisk::folder::Folder;
use vmdisk::{Open, VmDisk, VmfsFolder};

use crate::common::wire::{
    connect, content, contents, try_write, with_vm, with_vm_unserved, write, write_noise,
};
use crate::common::{Place, both, skip, until};

#[test]
fn bad_sizes_names_and_paths_are_usage_errors_and_change_nothing() {
    let place = with_vm_unserved("bad");
    let before = (place.json(&["lun", "ls"]), place.json(&["disk", "ls"]));
    let long = "x".repeat(65);
    let deep = format!("ds1:{}", "a/".repeat(3000));
    for words in [
        &["lun", "create", "x", "--size", "100"][..],
        &["lun", "create", "x", "--size", "1.0000001G"],
        &["lun", "create", "x", "--size", "0"],
        &["lun", "create", "x", "--size", "65T"],
        &["lun", "create", "x", "--size", "99999999999999999999P"],
        &["lun", "create", "x", "--size", "ten"],
        &["lun", "resize", "sql01-d", "33000001"],
        &["pool", "create", "p9", "--size", "1M"],
        &["pool", "create", "p9"],
        &["datastore", "create", "d2", "--size", "1M"],
        &["datastore", "create", "d2"],
        &["vm", "create", "v", "--datastore", "ds1", "--disk", "1000"],
        &["vm", "create", "v", "--datastore", "ds1", "--rdm", "sql01-d:sideways"],
        &["vm", "register", "ds1:../../x.vmx"],
        &["disk", "create", "ds1:../x.vmdk", "--size", "1M"],
        &["disk", "create", "ds1:a/../../x.vmdk", "--size", "1M"],
        &["disk", "create", "ds1:x/y-flat.vmdk", "--size", "1M"],
        &["disk", "create", "ds1:x/y.img", "--size", "1M"],
        &["disk", "create", "x.vmdk", "--size", "1M"],
        &["disk", "create", &deep, "--size", "1M"],
        &["rdm", "create", "ds1:../../m.vmdk", "--lun", "sql01-d"],
        &["snap", "create", "sql01-d"],
        &["clone", "create", "sql01-d", "c"],
        &["export", "start", "ds1:../x.vmdk"],
        &["serve", "--nbd-tcp", "everywhere"],
    ] {
        place.refuses(2, "KGM-CLI-0001", words);
    }
    for words in [
        &["lun", "create", "../x", "--size", "1M"][..],
        &["lun", "create", "a/b", "--size", "1M"],
        &["lun", "create", "a@b", "--size", "1M"],
        &["lun", "create", "", "--size", "1M"],
        &["lun", "create", &long, "--size", "1M"],
        &["pool", "create", "..", "--size", "1G"],
        &["vm", "create", "../evil", "--datastore", "ds1", "--disk", "1M"],
        &["snap", "create", "sql01-d@a/b"],
        &["group", "create", "a b", "sql01-d"],
    ] {
        place.refuses(2, "KGM-GEN-0002", words);
    }
    // What is no command line at all is told by the reader of command lines, with where to read on.
    let text = place.fails(2, &["lun", "create", "x", "--size", "-1G"]);
    assert!(text.contains("unexpected argument '-1'") && text.contains("try '--help'"), "{text}");
    let image = place.dir().join("v.img").display().to_string();
    place.ok(&["vmfs", "create", &image, "--size", "768M"]);
    for path in ["/../etc/passwd", "/a/../../b"] {
        place.refuses(2, "KGM-CLI-0001", &["vmfs", "cat", &image, path]);
        place.refuses(2, "KGM-CLI-0001", &["vmfs", "mkdir", &image, path]);
    }
    // REST says the same, whatever the CLI checks first.
    for (path, body) in [
        ("/api/v1/luns", r#"{"name": "../x", "size_bytes": 1048576}"#),
        ("/api/v1/luns", r#"{"name": "x", "size_bytes": 1000}"#),
        ("/api/v1/luns", r#"{"name": "x", "size_bytes": 18446744073709551615}"#),
        ("/api/v1/disks", r#"{"disk": "ds1:../x.vmdk", "size_bytes": 1048576, "provisioning": "thin"}"#),
        ("/api/v1/disks", r#"{"disk": "ds1:x/x.vmdk", "size_bytes": 1048576, "provisioning": "fat"}"#),
        ("/api/v1/vms", r#"{"name": "a\u0000b", "datastore": "ds1", "memory_mib": 1}"#),
        ("/api/v1/pools", r#"{"name": "p9", "media": ["relative"], "size_bytes": 1073741824}"#),
        ("/api/v1/backups", r#"{"vm": "sql01", "repo": "relative", "via": "snapshot"}"#),
    ] {
        let (status, kind, text) = place.rest("POST", path, body);
        assert!(status == 400 && kind == "application/problem+json", "{path} {body}: {status} {text}");
    }
    assert_eq!((place.json(&["lun", "ls"]), place.json(&["disk", "ls"])), before);
    assert_eq!(place.json(&["datastore", "check", "ds1"])["verdict"], "clean");
}

#[test]
fn torn_and_foreign_descriptors_are_named_and_the_rest_works() {
    let place = with_vm("torn");
    write(&place, "sql01/scsi0:1", &[2], 0x40);
    const C: &str = "/sql01/sql01.vmdk";
    let good = place.on_volume(async |volume| {
        let good = volume.read_file(C, 1 << 20).await.unwrap();
        volume.write_file(C, &good[..60]).await.unwrap();
        good
    });
    let check = |why: &str| {
        let vm = place.json(&["vm", "show", "sql01"]);
        assert_eq!(vm["state"], "disk missing", "{vm}");
        let trouble = vm["disks"].to_string();
        assert!(trouble.contains(why), "{why}: {trouble}");
        let export = &place.json(&["export", "ls"])[0];
        assert!(export["state"] == "down" && export["trouble"].is_string(), "{export}");
        // The other disk of the VM is served.
        assert_eq!(content(&place, "sql01/scsi0:1")[2 * 4096], 0x42);
        let repo = place.dir().join("repo").display().to_string();
        place.refuses(5, "KGM-BKP-0008", &["backup", "create", "sql01", "--repo", &repo]);
    };
    check("sql01.vmdk");
    place.refuses(1, "KGM-DSK-0005", &["disk", "show", "ds1:sql01/sql01.vmdk"]);
    for (foreign, why) in [
        (&b"\x7fELF\x02\x01\x01 no descriptor at all"[..], "sql01.vmdk"),
        (b"", "sql01.vmdk"),
        // Somebody else's kind of disk.
        (
            b"# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"streamOptimized\"\n\n\
              # Extent description\nRDONLY 131072 SPARSE \"sql01-s.vmdk\"\n",
            "SPARSE is not opened",
        ),
        // An extent out of the directory.
        (
            b"# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"vmfs\"\n\n\
              # Extent description\nRW 131072 VMFS \"../../other/x-flat.vmdk\"\n",
            "sql01.vmdk",
        ),
    ] {
        place.on_volume(async |volume| volume.write_file(C, foreign).await.unwrap());
        check(why);
    }
    // As it was: all is served again, nothing else was needed.
    place.on_volume(async |volume| volume.write_file(C, &good).await.unwrap());
    assert_eq!(place.json(&["vm", "show", "sql01"])["state"], "ok");
    assert!(place.json(&["export", "ls"]).as_array().unwrap().iter().all(|e| e["state"] == "serving"));
}

#[test]
fn r14_a_base_that_was_changed_below_its_redo_log_is_not_opened() {
    let place = with_vm_unserved("cid");
    const CHILD: &str = "/sql01/sql01-000001.vmdk";
    let text = |cid: &str| {
        format!(
            "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID={cid}\ncreateType=\"vmfsSparse\"\n\
             parentFileNameHint=\"sql01.vmdk\"\n\n# Extent description\nRW 131072 VMFSSPARSE \"sql01-000001-delta.vmdk\"\n"
        )
    };
    // With snapshots in the catalogue a redo log that the VM does not name may be the user's: it is not set aside.
    let mut catalogue = vm::vmsd::Vmsd::default();
    catalogue.add("mine", "sql01-Snapshot1.vmsn", 1, &[]);
    place.on_volume(async |volume| {
        volume.write_file("/sql01/sql01.vmsd", &catalogue.to_bytes()).await.unwrap();
        volume.write_file(CHILD, text("0badc1d0").as_bytes()).await.unwrap();
    });
    let show = place.json(&["disk", "show", "ds1:sql01/sql01-000001.vmdk"]);
    assert!(show["trouble"].as_str().unwrap().contains("modified since"), "{show}");
    let text = place.refuses(1, "KGM-VMS-0010", &["vm", "attach", "sql01", "ds1:sql01/sql01-000001.vmdk"]);
    assert!(text.contains("0badc1d0") && text.contains("modified since"), "{text}");
    assert_eq!(place.json(&["vm", "show", "sql01"])["disks"].as_array().unwrap().len(), 2, "not attached");
    // The base has a child now: it is not deleted under it.
    place.ok(&["vm", "rm", "sql01"]);
    place.refuses(5, "KGM-DSK-0001", &["disk", "rm", "ds1:sql01/sql01.vmdk", "--yes"]);
}

/// Puts the first disk of the VM on a redo log, as a snapshot does, and writes to it; a catalogue says that it is the
/// user's. Then the base gets another CID, as a tool would leave it that wrote to it.
fn with_broken_chain(place: &Place) {
    let mut catalogue = vm::vmsd::Vmsd::default();
    catalogue.add("mine", "sql01-Snapshot1.vmsn", 1, &[]);
    place.on_volume(async |volume| {
        let folder: Rc<dyn Folder> = VmfsFolder::new(volume.clone());
        let disk = VmDisk::open(Rc::clone(&folder), "/sql01/sql01.vmdk", Open::WRITE, &()).await.unwrap();
        let prepared = disk.prepare_redo().await.unwrap();
        disk.gate().close();
        let switched = prepared.switch();
        disk.gate().open();
        switched.settle().await.unwrap();
        switched.keep();
        let bytes = [0x5a; 4096];
        disk.write(block::Sector(80), &block::Segments::new(&bytes), block::Safe::AtNextFlush).await.unwrap();
        disk.close().await.unwrap();
        drop(disk);
        volume.write_file("/sql01/sql01.vmsd", &catalogue.to_bytes()).await.unwrap();
        for (file, from, to) in [
            ("/sql01/sql01.vmx", "sql01.vmdk", "sql01-000001.vmdk"),
            ("/sql01/sql01.vmdk", "\nCID=", "\nCID=0badc1d0\n#"),
        ] {
            let text = String::from_utf8(volume.read_file(file, 1 << 20).await.unwrap()).unwrap();
            assert!(text.contains(from), "{text}");
            volume.write_file(file, text.replacen(from, to, 1).as_bytes()).await.unwrap();
        }
    });
}

#[test]
fn r18_a_chain_is_repaired_by_whoever_saw_the_evidence_and_says_why() {
    let place = with_vm("repair");
    write(&place, "sql01/scsi0:0", &[3], 0x40);
    let repo = place.dir().join("repo").display().to_string();
    place.ok(&["backup", "create", "sql01", "--repo", &repo]);
    with_broken_chain(&place);
    const TOP: &str = "ds1:sql01/sql01-000001.vmdk";
    assert_eq!(place.json(&["vm", "show", "sql01"])["state"], "disk missing");
    let compare = ["--backup", "latest", "--repo", &repo, "--backup-disk", "scsi0:0"];
    let look = place.ok(&[&["disk", "repair", TOP, "-n"], &compare[..]].concat());
    assert!(
        look.contains("0badc1d0") && look.contains("512 of 512 sampled blocks are as in the backup"),
        "{look}"
    );
    // Nothing happened: by a look, without the name, without a reason.
    place.refuses(5, "KGM-CLI-0005", &["disk", "repair", TOP, "--reason", "me"]);
    place.refuses(5, "KGM-DSK-0006", &["disk", "repair", TOP, "--yes"]);
    place.refuses(2, "KGM-CLI-0001", &["disk", "repair", "nowhere", "--yes"]);
    assert_eq!(place.json(&["vm", "show", "sql01"])["state"], "disk missing");
    let why = "bob: only the CID was touched, ticket 7";
    let done = place.json(&["disk", "repair", TOP, "--yes", "--reason", why]);
    let repaired = &done["repaired"][0];
    assert_eq!(
        (&repaired["child"], done["mismatches"][0]["found_cid"].as_str()),
        (&serde_json::json!("/sql01/sql01-000001.vmdk"), Some("0badc1d0")),
        "{done}"
    );
    // The VM is open again, on its chain.
    let vm = place.json(&["vm", "show", "sql01"]);
    assert!(vm["disks"].as_array().unwrap().iter().all(|d| d["trouble"].is_null()), "{vm}");
    let now = content(&place, "sql01/scsi0:0");
    assert!(now[3 * 4096] == 0x43 && now[80 * 512] == 0x5a, "base and redo log");
    let audit = std::fs::read_to_string(place.home().join("audit.log")).unwrap();
    assert!(audit.lines().last().unwrap().contains("disk repair") && audit.contains("ticket 7"), "{audit}");
    let (kept, record) = (repaired["kept"].as_str().unwrap(), repaired["record"].as_str().unwrap());
    place.on_volume(async |volume| {
        let record = String::from_utf8(volume.read_file(record, 1 << 20).await.unwrap()).unwrap();
        assert!(record.contains("ticket 7") && record.contains("found CID = 0badc1d0"), "{record}");
        assert!(volume.read_file(kept, 1 << 20).await.unwrap().starts_with(b"# Disk DescriptorFile"));
    });
    // Again there is nothing to do.
    assert!(place.ok(&["disk", "repair", TOP, "-n"]).contains("change nothing"));
}

#[test]
fn a_full_pool_refuses_writes_loses_nothing_and_goes_on_when_there_is_room() {
    let place = Place::new("fullpool");
    place.ok(&["pool", "create", "p1", "--size", "64M"]);
    place.ok(&["lun", "create", "a", "--size", "256M"]);
    place.ok(&["lun", "create", "b", "--size", "256M"]);
    for lun in ["a", "b"] {
        place.ok(&["export", "start", lun]);
        write(&place, lun, &[0, 1, 2], 0x60);
    }
    // One block in each grain of 64 KiB: as much room as it goes.
    let all: Vec<u64> = (0..256 << 4).map(|n| n * 16).collect();
    let error = try_write(&place, "b", &all, 1).unwrap_err();
    assert!(error.to_string().to_lowercase().contains("space"), "{error}");
    let pool = place.json(&["pool", "show", "p1"]);
    assert!(pool["state"] == "ok" && pool["free_bytes"].as_u64().unwrap() < 8 << 20, "{pool}");
    // Snapshots are the first to be refused, then guests; reads go on.
    let text = place.refuses(1, "KGM-POL-0013", &["snap", "create", "a@s"]);
    assert!(text.contains("kagami lun rm --now"), "{text}");
    let a = content(&place, "a");
    assert!(a[0] == 0x60 && a[4096] == 0x61 && a[8192] == 0x62);
    // What a LUN has already it can write again.
    write(&place, "a", &[0], 0x70);
    place.ok(&["export", "stop", "b", "--yes"]);
    place.ok(&["lun", "rm", "b", "--now", "--yes"]);
    until("there is room", || place.json(&["pool", "show", "p1"])["free_bytes"].as_u64().unwrap() > 30 << 20);
    write(&place, "a", &all[..200], 0x71);
    place.ok(&["snap", "create", "a@s"]);
    assert_eq!(content(&place, "a")[0], 0x71);
    assert_eq!(place.json(&["pool", "check", "p1"])["verdict"], "clean");
}

#[test]
fn a_full_datastore_refuses_disks_and_leaves_no_half_ones() {
    let place = with_vm("fullstore");
    write_noise(&place, "sql01/scsi0:0", 16, 2);
    let files = place.json(&["disk", "ls", "ds1"]);
    for provisioning in ["thick", "eager"] {
        let words = ["disk", "create", "ds1:x/big.vmdk", "--size", "2G", "--provisioning", provisioning];
        let text = place.refuses(1, "KGM-DST-0008", &words);
        assert!(text.contains("make room"), "{text}");
    }
    assert_eq!(place.json(&["disk", "ls", "ds1"]), files);
    // Thin disks promise more than there is: their writer is told.
    place.ok(&["disk", "create", "ds1:sql01/thin.vmdk", "--size", "4G"]);
    place.ok(&["vm", "attach", "sql01", "ds1:sql01/thin.vmdk"]);
    place.ok(&["export", "start", "sql01/scsi0:2"]);
    let blocks: Vec<u64> = (0..1100).map(|n| n * 256).collect();
    let error = try_write(&place, "sql01/scsi0:2", &blocks, 3).unwrap_err();
    assert!(error.to_string().to_lowercase().contains("space"), "{error}");
    assert_eq!(place.json(&["datastore", "show", "ds1"])["free_bytes"], 0);
    // Other disks go on in what they have; a restore says that there is no room, and takes away what it began.
    write(&place, "sql01/scsi0:1", &[1], 0x20);
    let repo = place.dir().join("repo").display().to_string();
    place.ok(&["export", "stop", "sql01/scsi0:2", "--yes"]);
    place.ok(&["vm", "detach", "sql01", "scsi0:2"]);
    write_noise(&place, "sql01/scsi0:1", 2, 9);
    place.ok(&["backup", "create", "sql01", "--repo", &repo]);
    let out = place.run(&["restore", "latest", "--repo", &repo, "--as", "copy"]);
    assert_eq!(out.status.code(), Some(1), "{}", both(&out));
    assert!(both(&out).contains("next: "), "{}", both(&out));
    assert_eq!(place.json(&["lun", "ls"]).as_array().unwrap().len(), 2, "no LUN of it stays");
    assert_eq!(place.json(&["datastore", "check", "ds1"])["verdict"], "clean");
    place.ok(&["disk", "rm", "ds1:sql01/thin.vmdk", "--yes"]);
    place.ok(&["restore", "latest", "--repo", &repo, "--as", "copy"]);
    assert_eq!(place.json(&["vm", "show", "copy"])["state"], "ok");
    assert_eq!(place.json(&["datastore", "check", "ds1"])["verdict"], "clean");
}

#[test]
fn a_full_repository_fails_the_backup_alone() {
    let place = with_vm_unserved("fullrepo");
    let small = place.dir().join("small");
    std::fs::create_dir(&small).unwrap();
    place.ok(&["serve", "--stop"]);
    // A daemon that sees a small file system there, in a mount namespace of its own.
    let script = "mount -t tmpfs -o size=12m none \"$1\" && exec \"$2\" serve";
    let program = place.command(&[]).get_program().to_owned();
    let mut daemon = Command::new("unshare");
    let flags = if rustix::process::geteuid().is_root() { "-m" } else { "-Urm" };
    daemon.args([flags, "sh", "-c", script, "sh"]).arg(&small).arg(&program);
    daemon.env("KAGAMI_HOME", place.home()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut daemon = match daemon.spawn() {
        Ok(daemon) => daemon,
        Err(error) => return skip(&format!("unshare cannot be run: {error}")),
    };
    until("it serves or has ended", || {
        daemon.try_wait().unwrap().is_some() || place.run(&["serve", "--status"]).status.success()
    });
    if daemon.try_wait().unwrap().is_some() {
        let mut why = String::new();
        daemon.stderr.take().unwrap().read_to_string(&mut why).unwrap();
        return skip(&format!("no file system of its own: {why}"));
    }
    for slot in ["sql01/scsi0:0", "sql01/scsi0:1"] {
        place.ok(&["export", "start", slot]);
    }
    write_noise(&place, "sql01/scsi0:1", 24, 1);
    let before = contents(&place, "sql01");
    let repo = small.join("repo").display().to_string();
    for via in ["snapshot", "redo"] {
        let text =
            place.refuses(1, "KGM-BKP-0013", &["backup", "create", "sql01", "--repo", &repo, "--via", via]);
        assert!(text.contains("kagami backup prune") && text.contains("no space"), "{text}");
        assert_eq!(place.json(&["vm", "show", "sql01"])["state"], "ok", "no redo log stays");
        assert_eq!(place.json(&["snap", "ls"]), serde_json::json!([]), "no snapshot stays");
    }
    assert!(contents(&place, "sql01") == before);
    // Elsewhere there is room.
    let other = place.dir().join("repo").display().to_string();
    place.ok(&["backup", "create", "sql01", "--repo", &other]);
    assert_eq!(place.json(&["backup", "verify", "--repo", &other])["verdict"], "clean");
    place.ok(&["serve", "--stop"]);
    assert!(daemon.wait().unwrap().success());
}

#[test]
fn clients_that_drop_are_forgotten_and_others_served() {
    let place = with_vm("drop");
    let socket = place.home().join("nbd.sock");
    // In the middle of the handshake, and with nonsense.
    for half in [&b""[..], b"\0\0\0\x03", b"\0\0\0\x03IHAVEOPT\0\0\0\x07", &[0xff; 4096]] {
        let mut stream = UnixStream::connect(&socket).unwrap();
        let _ = stream.write_all(half); // it may have been cut off already
        drop(stream);
    }
    // In the middle of writes that nobody waits for.
    lane::block_on(async {
        for _ in 0..8 {
            let disk = connect(&place, "sql01/scsi0:1").await;
            let bytes = vec![1; 1 << 20];
            let data = block::Segments::new(&bytes);
            let mut io = block::Disk::write(&*disk, block::Sector(0), &data, block::Safe::AtNextFlush);
            // Begun and left: the connection goes while it is under way.
            let _ = std::future::poll_fn(move |cx| {
                std::task::Poll::Ready(std::future::Future::poll(io.as_mut(), cx).is_ready())
            })
            .await;
            drop(disk);
        }
    });
    write(&place, "sql01/scsi0:1", &[1], 0x33);
    assert_eq!(content(&place, "sql01/scsi0:1")[4096], 0x32);
    // A REST client too.
    let mut stream = UnixStream::connect(place.home().join("api.sock")).unwrap();
    stream.write_all(b"POST /api/v1/luns HTTP/1.1\r\nhost: k\r\ncontent-length: 100\r\n\r\n{\"na").unwrap();
    drop(stream);
    place.ok(&["export", "stop", "sql01/scsi0:1"]);
    assert_eq!(place.json(&["serve", "--status"])["troubles"], serde_json::json!([]));
}

#[test]
fn a_truncated_pool_file_is_refused_and_comes_back_whole() {
    let place = with_vm("short");
    write(&place, "sql01/scsi0:1", &[1, 2], 0x11);
    let before = contents(&place, "sql01");
    place.ok(&["serve", "--stop"]);
    let pool = place.home().join("media/p1.pool");
    let whole = std::fs::metadata(&pool).unwrap().len();
    let file = std::fs::OpenOptions::new().write(true).open(&pool).unwrap();
    // The end of the file is a hole: nothing is lost with it, but nobody can know that.
    file.set_len(whole - (64 << 20)).unwrap();
    let view = place.json(&["pool", "show", "p1"]);
    let trouble = view["trouble"].as_str().unwrap();
    assert!(view["state"] == "missing" && trouble.contains("bytes"), "{view}");
    assert_eq!(place.json(&["datastore", "show", "ds1"])["state"], "missing");
    assert_eq!(place.json(&["vm", "show", "sql01"])["state"], "missing");
    let troubles = place.json(&["serve", "--status"])["troubles"].to_string();
    assert!(troubles.contains("pool p1") && troubles.contains("export sql01/scsi0:1"), "{troubles}");
    place.refuses(1, "KGM-POL-0009", &["lun", "create", "x", "--size", "1M"]);
    place.refuses(1, "KGM-POL-0009", &["pool", "reopen", "p1"]);
    let out = place.run(&["pool", "check", "p1"]);
    assert_eq!(out.status.code(), Some(2), "{}", both(&out));
    place.refuses(3, "KGM-DST-0001", &["disk", "create", "ds1:x/x.vmdk", "--size", "1M"]);
    let name = pool.display().to_string();
    let out = place.run(&["inspect", &name]);
    assert!(both(&out).contains("pool medium") || both(&out).contains("KGM-"), "{}", both(&out));
    file.set_len(whole).unwrap();
    place.ok(&["pool", "reopen", "p1"]);
    assert!(contents(&place, "sql01") == before);
    assert_eq!(place.json(&["pool", "check", "p1"])["verdict"], "clean");
    // Nothing at all, and nothing that is a pool.
    place.ok(&["serve", "--stop"]);
    let away = place.dir().join("away");
    std::fs::rename(&pool, &away).unwrap();
    for content in [&b""[..], &[0; 1 << 20]] {
        std::fs::write(&pool, content).unwrap();
        assert_eq!(place.json(&["pool", "show", "p1"])["state"], "missing");
        place.ok(&["serve", "--stop"]);
    }
    std::fs::rename(&away, &pool).unwrap();
    assert_eq!(place.json(&["vm", "show", "sql01"])["state"], "ok");
}

#[test]
fn after_a_failed_flush_nothing_is_written_until_the_pool_is_reopened() {
    let place = with_vm_unserved("halted");
    place.ok(&["serve", "--stop"]);
    // A daemon whose writes past a limit fail, as those to a broken device do.
    let program = place.command(&[]).get_program().to_owned();
    let mut daemon = Command::new("sh");
    daemon.args(["-c", "trap '' XFSZ; exec \"$0\" serve"]).arg(program).env("KAGAMI_HOME", place.home());
    let mut daemon = daemon.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    until("it serves", || place.run(&["serve", "--status"]).status.success());
    place.ok(&["export", "start", "sql01/scsi0:1"]);
    write(&place, "sql01/scsi0:1", &[1], 0x21);
    let limit = |bytes: Option<u64>| {
        let pid = rustix::process::Pid::from_raw(place.pid() as i32);
        let limit = rustix::process::Rlimit { current: bytes, maximum: None };
        rustix::process::prlimit(pid, rustix::process::Resource::Fsize, limit).unwrap();
    };
    // The data gets to the medium; what fails is the flush, at the journal that says where the data is.
    lane::block_on(async {
        let disk = connect(&place, "sql01/scsi0:1").await;
        for block in [3, 300, 3000] {
            let bytes = [0x22; 4096];
            let data = block::Segments::new(&bytes);
            disk.write(block::Sector(block * 8), &data, block::Safe::AtNextFlush).await.unwrap();
        }
        limit(Some(0));
        assert!(disk.flush().await.is_err(), "the flush is not answered as if it were done");
        // No later one hides it, and nothing more is taken.
        assert!(disk.flush().await.is_err());
        let bytes = [0x23; 4096];
        let data = block::Segments::new(&bytes);
        assert!(disk.write(block::Sector(0), &data, block::Safe::AtNextFlush).await.is_err());
        disk.disconnect().await;
    });
    let refused = || {
        let pool = place.json(&["pool", "show", "p1"]);
        assert!(
            pool["state"] == "read-only" && pool["trouble"].as_str().unwrap().contains("reopen"),
            "{pool}"
        );
        place.refuses(1, "KGM-POL-0014", &["lun", "create", "x", "--size", "1M"]);
        assert!(try_write(&place, "sql01/scsi0:1", &[2], 0x24).is_err());
        assert_eq!(content(&place, "sql01/scsi0:1")[4096], 0x20, "reads go on");
    };
    refused();
    // The medium is well again: that alone changes nothing.
    limit(None);
    refused();
    place.ok(&["pool", "reopen", "p1"]);
    assert_eq!(place.json(&["pool", "show", "p1"])["state"], "ok");
    let now = content(&place, "sql01/scsi0:1");
    assert_eq!(now[4096], 0x20, "what was flushed is there");
    for block in [3, 300, 3000] {
        let bytes = &now[block * 4096..][..4096];
        assert!(*bytes == [0; 4096] || *bytes == [0x22; 4096], "before or after, never a third thing");
    }
    assert!(now[2 * 4096] == 0 && now[0] == 0, "what was refused is not there");
    place.ok(&["lun", "create", "x", "--size", "1M"]);
    write(&place, "sql01/scsi0:1", &[1, 2], 0x23);
    assert_eq!(content(&place, "sql01/scsi0:1")[2 * 4096], 0x21);
    assert_eq!(place.json(&["pool", "check", "p1"])["verdict"], "clean");
    place.ok(&["serve", "--stop"]);
    daemon.wait().unwrap();
}
