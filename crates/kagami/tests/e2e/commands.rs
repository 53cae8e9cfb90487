//! Every noun's verbs through the daemon and the binary: each does what it says, and says what it refuses.

use std::rc::Rc;

use crate::common::Place;
use crate::common::wire::{content, contents, while_connected, with_vm, with_vm_unserved, write};
use serde_json::{Value, json};

fn with_luns(name: &str, luns: &[&str]) -> Place {
    let place = Place::new(name);
    place.ok(&["pool", "create", "p1", "--size", "1G"]);
    for lun in luns {
        place.ok(&["lun", "create", lun, "--size", "16M"]);
    }
    place
}

#[test]
fn a_revert_is_undone_or_accepted() {
    let place = with_luns("revert", &["a"]);
    let first = |place: &Place| {
        place.ok(&["export", "start", "a"]);
        let byte = content(place, "a")[0];
        place.ok(&["export", "stop", "a", "--yes"]);
        byte
    };
    let put = |place: &Place, fill: u8| {
        place.ok(&["export", "start", "a"]);
        write(place, "a", &[0], fill);
        place.ok(&["export", "stop", "a", "--yes"]);
    };
    put(&place, 1);
    place.ok(&["snap", "create", "a@one"]);
    place.refuses(4, "KGM-LUN-0005", &["lun", "undo-revert", "a", "--yes"]);
    place.refuses(4, "KGM-LUN-0005", &["snap", "revert", "a@one", "--accept", "--yes"]);
    put(&place, 2);
    let plan = place.json(&["snap", "revert", "a@one", "-n"]);
    assert!(plan["loses"][0].as_str().unwrap().contains("kept until --accept"), "{plan}");
    place.refuses(5, "KGM-CLI-0005", &["snap", "revert", "a@one"]);
    place.ok(&["snap", "revert", "a@one", "--yes"]);
    assert_eq!((first(&place), &place.json(&["lun", "show", "a"])["reverted"]), (1, &json!(true)));
    put(&place, 3);
    // Another revert would give up one of the two branches: which one, the operator says.
    for words in [&["snap", "revert", "a@one", "--yes"][..], &["snap", "revert", "a@one", "-n"]] {
        let text = place.refuses(4, "KGM-LUN-0009", words);
        let both = ["kagami lun undo-revert a", "kagami snap revert a@SNAP --accept"];
        assert!(both.iter().all(|next| text.contains(next)), "{text}");
    }
    assert_eq!((first(&place), &place.json(&["lun", "show", "a"])["reverted"]), (3, &json!(true)));
    place.refuses(5, "KGM-CLI-0005", &["lun", "undo-revert", "a"]);
    place.ok(&["lun", "undo-revert", "a", "--yes"]);
    assert_eq!((first(&place), &place.json(&["lun", "show", "a"])["reverted"]), (2, &json!(false)));
    place.ok(&["snap", "revert", "a@one", "--yes"]);
    place.ok(&["snap", "revert", "a@one", "--accept", "--yes"]);
    place.refuses(4, "KGM-LUN-0005", &["lun", "undo-revert", "a", "--yes"]);
    assert_eq!(first(&place), 1);
    // Accepted: the next revert is granted. Its snapshot may go before that is accepted.
    put(&place, 4);
    place.ok(&["snap", "revert", "a@one", "--yes"]);
    assert_eq!(first(&place), 1);
    place.ok(&["snap", "rm", "a@one", "--yes"]);
    place.ok(&["snap", "revert", "a@one", "--accept", "--yes"]);
    place.refuses(4, "KGM-LUN-0005", &["snap", "revert", "a@one", "--accept", "--yes"]);
    place.ok(&["snap", "create", "a@two"]);
    // Served: not by itself, and not what stands on it.
    place.ok(&["export", "start", "a"]);
    place.refuses(4, "KGM-LUN-0003", &["snap", "revert", "a@two", "--yes"]);
    place.ok(&["export", "stop", "a"]);
    assert_eq!(place.json(&["pool", "check", "p1"])["verdict"], "clean");
}

#[test]
fn the_trash_gives_back_and_is_emptied() {
    let place = with_luns("trash", &["a", "b"]);
    place.ok(&["export", "start", "a"]);
    write(&place, "a", &[0, 1, 2, 3], 7);
    place.refuses(4, "KGM-LUN-0003", &["lun", "rm", "a", "--yes"]);
    place.ok(&["snap", "create", "a@s"]);
    place.ok(&["export", "stop", "a", "--yes"]);
    place.ok(&["export", "start", "a@s"]);
    let text = place.refuses(4, "KGM-LUN-0003", &["lun", "rm", "a", "--yes"]);
    assert!(text.contains("kagami export stop a@s"), "{text}");
    place.ok(&["export", "stop", "a@s"]);
    let plan = place.json(&["lun", "rm", "a", "-n"]);
    assert!(plan["loses"].to_string().contains("its snapshots s"), "{plan}");
    place.refuses(5, "KGM-CLI-0005", &["lun", "rm", "a"]);
    place.ok(&["lun", "rm", "a", "--yes"]);
    place.refuses(3, "KGM-LUN-0404", &["lun", "show", "a"]);
    let trash = place.json(&["lun", "ls", "--trash"]);
    assert!(trash[0]["name"] == "a" && trash[0]["trash_until"].is_string(), "{trash}");
    // A new one of the name keeps the old one in the trash.
    place.ok(&["lun", "create", "a", "--size", "8M"]);
    place.refuses(4, "KGM-LUN-0409", &["lun", "undelete", "a"]);
    place.ok(&["lun", "rm", "a", "--now", "--yes"]);
    place.ok(&["lun", "undelete", "a"]);
    place.ok(&["export", "start", "a"]);
    assert_eq!(content(&place, "a")[4096], 7 ^ 1, "with its content");
    assert_eq!(place.json(&["snap", "ls", "a"])[0]["name"], "a@s", "and its snapshots");
    place.ok(&["export", "stop", "a", "--yes"]);
    place.ok(&["lun", "rm", "a", "--yes"]);
    place.ok(&["lun", "rm", "a", "--now", "--yes"]);
    assert_eq!(place.json(&["lun", "ls", "--trash"]), json!([]));
    place.refuses(3, "KGM-LUN-0404", &["lun", "undelete", "a"]);
    place.refuses(3, "KGM-LUN-0404", &["lun", "rm", "a", "--now", "--yes"]);
    place.ok(&["lun", "rm", "b", "--now", "--yes"]);
    assert_eq!(place.json(&["pool", "check", "p1"])["verdict"], "clean");
}

/// What the checker says, with the exit codes that checks have everywhere; and the one thing that it repairs.
#[test]
fn a_pool_is_checked_and_its_leaks_are_given_back() {
    let place = with_luns("leaks", &["a"]);
    place.ok(&["export", "start", "a"]);
    write(&place, "a", &[0, 1, 2], 7);
    let before = content(&place, "a");
    place.ok(&["export", "stop", "a", "--yes"]);
    let check = |code: i32, words: &[&str]| {
        let out = place.run(&[words, &["-o", "json"]].concat());
        assert_eq!(out.status.code(), Some(code), "{words:?}: {}", crate::common::both(&out));
        serde_json::from_slice::<Value>(&out.stdout).unwrap()
    };
    assert_eq!(check(0, &["pool", "check", "p1"])["verdict"], "clean");
    assert_eq!(check(0, &["pool", "check", "p1", "--repair"])["repaired"], json!([]));
    place.fails(1, &["pool", "check", "nowhere"]);
    // Grains that are marked as used and belong to nobody, on the medium itself.
    let used = place.json(&["pool", "show", "p1"])["used_bytes"].as_u64().unwrap();
    place.ok(&["serve", "--stop"]);
    leak(&place.home().join("media/p1.pool"), &[2000, 2001, 5000]);
    let found = check(3, &["pool", "check", "p1"]);
    assert_eq!(found["verdict"], "leaks");
    assert_eq!(found["findings"].as_array().unwrap().len(), 2, "{found}");
    assert!(found["findings"][0].as_str().unwrap().starts_with("grains 2000+2"), "{found}");
    // A dry run looks only.
    assert_eq!(check(3, &["pool", "check", "p1", "--repair", "-n"])["repaired"], json!([]));
    let repaired = check(0, &["pool", "check", "p1", "--repair"]);
    assert_eq!((&repaired["verdict"], &repaired["findings"]), (&json!("clean"), &json!([])));
    assert_eq!(repaired["repaired"], found["findings"]);
    assert_eq!(check(0, &["pool", "check", "p1"])["verdict"], "clean");
    assert_eq!(place.json(&["pool", "show", "p1"])["used_bytes"].as_u64().unwrap(), used);
    place.ok(&["export", "start", "a"]);
    assert!(content(&place, "a") == before);
    place.ok(&["export", "stop", "a", "--yes"]);
    // A page of which no copy is whole: corrupt, and nothing is given back.
    place.ok(&["serve", "--stop"]);
    leak(&place.home().join("media/p1.pool"), &[3000]);
    damage_map(&place, "a");
    let found = check(2, &["pool", "check", "p1", "--repair"]);
    assert_eq!((&found["verdict"], &found["repaired"]), (&json!("corrupt"), &json!([])), "{found}");
    let text = found["findings"].to_string();
    assert!(text.contains("no copy of its page is whole"), "{text}");
}

/// Marks free grains of the only medium as used, and counts them.
fn leak(file: &std::path::Path, grains: &[u64]) {
    use array::format::{
        BITMAP_TREE, GRAIN_BYTES, PAGE_BYTES, PAIR_BYTES, PageKey, decode_page, encode_page,
    };
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options().read(true).write(true).open(file).unwrap();
    let (mut head, at) = newest_head(&file);
    let first = head.table[0].bitmap_grain.get();
    let (key, pair) = (PageKey { tree: BITMAP_TREE, level: 0, index: 0 }, first * GRAIN_BYTES / PAIR_BYTES);
    let mut bytes = vec![0; PAIR_BYTES as usize];
    file.read_exact_at(&mut bytes, first * GRAIN_BYTES).unwrap();
    let copies = bytes.chunks(PAGE_BYTES).enumerate();
    let whole = copies.filter_map(|(slot, bytes)| Some((decode_page(key, pair, bytes)?, slot)));
    let ((generation, mut entries), slot) = whole.max_by_key(|((generation, _), _)| *generation).unwrap();
    for grain in grains {
        let (word, bit) = ((grain / 64) as usize, 1 << (grain % 64));
        assert_eq!(entries[word] & bit, 0, "grain {grain} is free");
        entries[word] |= bit;
    }
    let mut page = [0; PAGE_BYTES];
    encode_page(key, pair, generation, &entries, &mut page);
    file.write_all_at(&page, first * GRAIN_BYTES + slot as u64 * PAGE_BYTES as u64).unwrap();
    head.used_grains = (head.used_grains.get() + grains.len() as u64).into();
    head.seal();
    file.write_all_at(zerocopy::IntoBytes::as_bytes(&head), at).unwrap();
}

/// The head of a medium that counts, and where it lies.
fn newest_head(file: &std::fs::File) -> (array::format::Head, u64) {
    use std::os::unix::fs::FileExt;
    let read = |at: u64| {
        let mut bytes = [0; array::format::PAGE_BYTES];
        file.read_exact_at(&mut bytes, at).unwrap();
        array::format::Head::check(&bytes).unwrap().map(|head| (head, at))
    };
    let heads = array::format::HEAD_AT.into_iter().filter_map(read);
    heads.max_by_key(|(head, _)| head.sequence.get()).unwrap()
}

/// Makes both copies of the root of a LUN's map unreadable.
fn damage_map(place: &Place, lun: &str) {
    use std::os::unix::fs::FileExt;
    let dump = place.offline("p1", async |pool| {
        let top = pool.lun(lun).unwrap().record().unwrap().top;
        (top, pool.dump())
    });
    let layer =
        dump.1.split("LayerRecord {").find(|text| text.contains(&format!(" id: {},", dump.0))).unwrap();
    let root = layer.split("root: ").nth(1).unwrap().split(',').next().unwrap();
    let at = root.parse::<u64>().unwrap() * array::format::PAIR_BYTES;
    let file = std::fs::File::options().write(true).open(place.home().join("media/p1.pool")).unwrap();
    file.write_all_at(&[0x5a; array::format::PAIR_BYTES as usize], at).unwrap();
}

#[test]
fn a_cut_over_two_pools_is_resolved_by_the_pool_that_decides() {
    let place = with_luns("doubt", &["a"]);
    place.ok(&["pool", "create", "p2", "--size", "256M"]);
    place.ok(&["lun", "create", "b", "--size", "16M", "--pool", "p2"]);
    let cut = place.json(&["group", "create", "g1", "a", "b"]);
    assert_eq!((&cut["state"], &cut["members"]), (&json!("cut"), &json!(["a@g1", "b@g1"])));
    place.refuses(4, "KGM-SNP-0409", &["group", "create", "g1", "a"]);
    assert!(place.ok(&["group", "create", "g2", "a", "b", "-n"]).contains("cut 2 LUNs at one instant"));
    assert_eq!(place.json(&["group", "ls"]).as_array().unwrap().len(), 1);
    // p2 is prepared, and waits for what p1 decides: that is never written.
    let decider = place.offline("p1", async |pool| pool.uuid());
    let group = uuid::Uuid::new_v4();
    place.offline("p2", async |pool| {
        let lun = pool.lun("b").unwrap();
        let leg =
            pool.prepare_cut(group, array::Decider::Pool(decider), &[(lun, "lost".into())]).await.unwrap();
        std::mem::drop(leg);
    });
    let (file, away) = (place.home().join("media/p1.pool"), place.dir().join("p1.away"));
    std::fs::rename(&file, &away).unwrap();
    let doubts = place.json(&["group", "ls"]);
    let doubt = doubts.as_array().unwrap().iter().find(|g| g["id"] == group.to_string()).unwrap();
    assert!(
        doubt["state"].as_str().unwrap().contains("is not here") && doubt["members"][0] == "b@lost",
        "{doubt}"
    );
    let text = place.refuses(4, "KGM-GRP-0001", &["snap", "create", "b@other"]);
    assert!(text.contains("kagami group resolve"), "{text}");
    place.refuses(5, "KGM-GRP-0003", &["group", "resolve"]);
    place.refuses(5, "KGM-CLI-0005", &["group", "resolve", &group.to_string(), "--happened", "no"]);
    // The pool comes back: what it says counts, and nothing else.
    std::fs::rename(&away, &file).unwrap();
    place.ok(&["pool", "reopen", "p1"]);
    assert_eq!(place.json(&["group", "ls"]).as_array().unwrap().len(), 1, "it did not happen");
    place.ok(&["snap", "create", "b@other"]);
    place.refuses(3, "KGM-GRP-0404", &["group", "resolve", &group.to_string()]);
    // And where it never comes back the operator decides.
    place.offline("p2", async |pool| {
        let lun = pool.lun("b").unwrap();
        let decider = array::Decider::Pool(uuid::Uuid::new_v4());
        let leg = pool.prepare_cut(group, decider, &[(lun, "by-hand".into())]).await.unwrap();
        leg.cut();
        leg.settle().await.unwrap();
    });
    place.ok(&["group", "resolve", &group.to_string(), "--happened", "yes", "--yes"]);
    let snaps = place.json(&["snap", "ls", "b"]).to_string();
    assert!(snaps.contains("b@by-hand") && !snaps.contains("b@lost"), "{snaps}");
    assert_eq!(place.json(&["pool", "check", "p2"])["verdict"], "clean");
}

#[test]
fn a_pool_goes_to_another_home_with_all_that_lies_in_it() {
    let (old, new) = (Place::new("from"), Place::new("to"));
    let files: Vec<String> =
        ["x.pool", "y.pool"].iter().map(|f| old.dir().join(f).display().to_string()).collect();
    old.ok(&["pool", "create", "p1", &files[0], &files[1], "--size", "1G"]);
    old.ok(&["datastore", "create", "ds1", "--size", "1G"]);
    old.ok(&["lun", "create", "d", "--size", "32M"]);
    old.ok(&["vm", "create", "sql01", "--datastore", "ds1", "--disk", "64M", "--rdm", "d:physical"]);
    for slot in ["sql01/scsi0:0", "sql01/scsi0:1"] {
        old.ok(&["export", "start", slot]);
        write(&old, slot, &[1, 100], 4);
    }
    old.ok(&["snap", "create", "d@monday"]);
    let identity = |place: &Place| {
        let lun = place.json(&["lun", "show", "d"]);
        ["id", "naa", "serial"].map(|field| lun[field].as_str().unwrap().to_owned())
    };
    let born = identity(&old);
    old.ok(&["clone", "create", "d@monday", "d-copy"]);
    let copy = old.json(&["lun", "show", "d-copy"]);
    assert!(["id", "naa", "serial"].iter().zip(&born).all(|(field, born)| copy[field] != **born), "{copy}");
    old.ok(&["lun", "rm", "d-copy", "--now", "--yes"]);
    old.ok(&["group", "create", "g1", "d", "ds1"]);
    let before = contents(&old, "sql01");
    // Somebody else's as long as its daemon runs.
    new.refuses(4, "KGM-IMG-0409", &["pool", "import", &files[0], &files[1]]);
    let plan = old.json(&["pool", "rm", "p1", "-n"]);
    assert!(
        plan["would"].to_string().contains("unregister VM sql01") && plan["loses"] == json!([]),
        "{plan}"
    );
    while_connected(&old, "sql01/scsi0:1", || {
        old.refuses(5, "KGM-CLI-0005", &["pool", "rm", "p1"]);
    });
    old.ok(&["pool", "rm", "p1"]);
    for noun in ["pool", "lun", "datastore", "vm", "export"] {
        assert_eq!(old.json(&[noun, "ls"]), json!([]), "{noun}");
    }
    let text = new.refuses(2, "KGM-POL-0008", &["pool", "import", &files[0]]);
    assert!(text.contains("name all files"), "{text}");
    new.refuses(3, "KGM-POL-0016", &["pool", "import", &files[0], "/nowhere/z.pool"]);
    new.refuses(3, "KGM-POL-0405", &["pool", "import", "/etc/passwd"]);
    assert!(new.ok(&["pool", "import", &files[1], &files[0], "-n"]).contains("with 2 LUNs"));
    // In whatever order.
    new.ok(&["pool", "import", &files[1], &files[0]]);
    new.refuses(4, "KGM-POL-0003", &["pool", "import", &files[0], &files[1], "--name", "other"]);
    assert_eq!(new.json(&["vm", "show", "sql01"])["state"], "ok");
    assert!(new.json(&["snap", "ls", "d"]).to_string().contains("d@monday"));
    assert_eq!(identity(&new), born, "a LUN is the same one wherever its pool is");
    assert_eq!(new.json(&["group", "ls"])[0]["name"], "g1");
    let mapping = &new.json(&["rdm", "ls"])[0];
    assert!(mapping["state"] == "resolved" && mapping["lun"] == "d", "{mapping}");
    new.ok(&["export", "start", "sql01/scsi0:0"]);
    new.ok(&["export", "start", "sql01/scsi0:1"]);
    assert!(contents(&new, "sql01") == before);
    assert_eq!(new.json(&["pool", "check", "p1"])["verdict"], "clean");
    assert_eq!(new.json(&["datastore", "check", "ds1"])["verdict"], "clean");
}

#[test]
fn datastores_leave_and_come_back_and_copies_do_not() {
    let place = with_vm_unserved("attach");
    // Whoever stands on a LUN is named, whatever is tried with the LUN by itself.
    for (lun, holder) in [("ds1", "ds1"), ("sql01-d", "sql01/sql01_1.vmdk")] {
        let snap = format!("{lun}@s");
        place.ok(&["snap", "create", &snap]);
        for words in [
            &["export", "start", lun][..],
            &["lun", "rm", lun, "--yes"],
            &["lun", "rm", lun, "--now", "--yes"],
            &["lun", "undo-revert", lun, "--yes"],
            &["snap", "revert", &snap, "--yes"],
            &["datastore", "create", "ds2", "--lun", lun, "--yes"],
            &["datastore", "attach", lun],
            &["rdm", "create", "ds1:x/x.vmdk", "--lun", lun],
        ] {
            let text = place.refuses(5, "KGM-LUN-0002", words);
            assert!(text.contains(holder), "{words:?} names {holder}: {text}");
        }
        // A frozen image may be had.
        place.ok(&["export", "start", &snap]);
        place.refuses(4, "KGM-SNP-0001", &["snap", "rm", &snap, "--yes"]);
        place.ok(&["export", "stop", &snap]);
        place.ok(&["snap", "rm", &snap, "--yes"]);
    }
    let text = place.refuses(4, "KGM-DST-0004", &["datastore", "rm", "ds1", "--yes"]);
    assert!(text.contains("kagami vm rm sql01"), "{text}");
    place.ok(&["snap", "create", "ds1@copy"]);
    place.ok(&["clone", "create", "ds1@copy", "ds1-copy"]);
    let text = place.refuses(5, "KGM-DST-0007", &["datastore", "attach", "ds1-copy"]);
    assert!(text.contains("is a copy") && text.contains("naa.6"), "{text}");
    place.refuses(5, "KGM-LUN-0002", &["datastore", "attach", "ds1"]);
    place.ok(&["lun", "create", "plain", "--size", "16M"]);
    place.refuses(3, "KGM-DST-0006", &["datastore", "attach", "plain"]);
    place.ok(&["vm", "rm", "sql01"]);
    place.refuses(4, "KGM-DST-0004", &["datastore", "rm", "ds1", "--lun", "--yes"]);
    place.ok(&["datastore", "rm", "ds1"]);
    assert!(place.json(&["lun", "show", "ds1"])["claim"].is_null());
    assert!(place.ok(&["rdm", "scan"]).contains("datastore ds1 is not here"));
    place.ok(&["datastore", "attach", "ds1"]);
    assert_eq!(place.json(&["vm", "show", "sql01"])["state"], "ok", "the VMs on it are registered");
    place.ok(&["vm", "rm", "sql01", "--files", "--yes"]);
    place.ok(&["datastore", "rm", "ds1"]);
    // What is recognised is not overwritten, confirmed or not; what is not recognised is asked about.
    place.refuses(5, "KGM-CLI-0005", &["datastore", "create", "ds2", "--lun", "ds1"]);
    place.refuses(5, "KGM-VFS-0011", &["datastore", "create", "ds2", "--lun", "ds1", "--yes"]);
    place.ok(&["datastore", "attach", "ds1", "--name", "again"]);
    place.ok(&["datastore", "rm", "again", "--lun", "--yes"]);
    assert_eq!(place.json(&["lun", "ls", "--trash"])[0]["name"], "ds1");
    assert_eq!(place.json(&["pool", "check", "p1"])["verdict"], "clean");
}

#[test]
fn disks_are_unplugged_plugged_in_and_removed() {
    let place = with_vm("plug");
    write(&place, "sql01/scsi0:1", &[3], 0x50);
    place.refuses(4, "KGM-VMS-0007", &["vm", "detach", "sql01", "scsi0:1"]);
    place.refuses(3, "KGM-VMS-0011", &["vm", "detach", "sql01", "scsi0:5"]);
    place.fails(2, &["vm", "detach", "sql01", "nonsense"]);
    place.ok(&["export", "stop", "sql01/scsi0:1"]);
    assert!(place.ok(&["vm", "detach", "sql01", "scsi0:1", "-n"]).contains("its files stay"));
    place.ok(&["vm", "detach", "sql01", "scsi0:1"]);
    assert_eq!(place.json(&["vm", "show", "sql01"])["disks"].as_array().unwrap().len(), 1);
    place.refuses(
        4,
        "KGM-VMS-0001",
        &["vm", "attach", "sql01", "ds1:sql01/sql01_1.vmdk", "--slot", "scsi0:0"],
    );
    place.ok(&["vm", "attach", "sql01", "ds1:sql01/sql01_1.vmdk", "--slot", "scsi1:3"]);
    place.refuses(4, "KGM-VMS-0001", &["vm", "attach", "sql01", "ds1:sql01/sql01_1.vmdk"]);
    place.ok(&["export", "start", "sql01/scsi1:3", "--name", "d"]);
    assert_eq!(content(&place, "d")[3 * 4096], 0x53);
    place.ok(&["export", "stop", "d"]);
    place.ok(&["disk", "create", "ds1:sql01/more.vmdk", "--size", "8M", "--provisioning", "thick"]);
    place.ok(&["vm", "attach", "sql01", "ds1:sql01/more.vmdk"]);
    place.refuses(4, "KGM-DSK-0004", &["disk", "rm", "ds1:sql01/more.vmdk", "--yes"]);
    place.ok(&["vm", "detach", "sql01", "scsi0:1"]);
    place.refuses(5, "KGM-CLI-0005", &["disk", "rm", "ds1:sql01/more.vmdk"]);
    place.ok(&["disk", "rm", "ds1:sql01/more.vmdk", "--yes"]);
    place.refuses(3, "KGM-DSK-0404", &["disk", "show", "ds1:sql01/more.vmdk"]);
    // The VM goes; the mapped LUN stays, with its data and without a claim.
    place.refuses(4, "KGM-VMS-0007", &["vm", "rm", "sql01", "--files", "--yes"]);
    place.ok(&["export", "stop", "sql01/scsi0:0"]);
    place.refuses(5, "KGM-CLI-0005", &["vm", "rm", "sql01", "--files"]);
    place.ok(&["vm", "rm", "sql01", "--files", "--yes"]);
    assert_eq!(place.json(&["disk", "ls"]), json!([]));
    let lun = place.json(&["lun", "show", "sql01-d"]);
    assert!(lun["claim"].is_null(), "{lun}");
    place.ok(&["export", "start", "sql01-d"]);
    assert_eq!(content(&place, "sql01-d")[3 * 4096], 0x53);
    assert_eq!(place.json(&["datastore", "check", "ds1"])["verdict"], "clean");
}

#[test]
fn a_vm_is_in_use_by_whatever_name_its_disk_is_served() {
    let place = with_vm_unserved("alias");
    place.ok(&["export", "start", "ds1:sql01/sql01_1.vmdk", "--name", "d"]);
    place.refuses(4, "KGM-VMS-0007", &["vm", "rm", "sql01", "--yes"]);
    let repo = place.dir().join("repo").display().to_string();
    place.ok(&["backup", "create", "sql01", "--repo", &repo]);
    while_connected(&place, "d", || {
        let over = ["restore", "latest", "--repo", &repo, "--in-place", "--yes"];
        place.refuses(5, "KGM-VMS-0008", &over);
        // Stopping what somebody uses loses connections: that is asked.
        place.refuses(5, "KGM-CLI-0005", &["export", "stop", "d"]);
    });
    place.refuses(4, "KGM-EXP-0409", &["export", "start", "sql01/scsi0:0", "--name", "d"]);
    assert!(place.ok(&["export", "stop", "d", "-n"]).contains("would stop serving d"));
    place.ok(&["export", "stop", "d"]);
    place.refuses(3, "KGM-EXP-0404", &["export", "stop", "d"]);
    // A name that begins like another is another.
    place.ok(&["vm", "create", "sql", "--datastore", "ds1", "--disk", "8M"]);
    place.ok(&["export", "start", "sql/scsi0:0"]);
    place.ok(&["vm", "rm", "sql01"]);
    place.ok(&["vm", "register", "ds1:sql01/sql01.vmx"]);
    let vm = place.json(&["vm", "show", "sql01"]);
    assert_eq!(vm["state"], "ok", "{vm}");
}

#[test]
fn images_in_a_dead_hosts_pool_are_read_without_a_daemon() {
    let place = with_vm("dead");
    write(&place, "sql01/scsi0:0", &[0, 9], 6);
    place.ok(&["snap", "create", "ds1@before"]);
    let before = content(&place, "sql01/scsi0:0");
    write(&place, "sql01/scsi0:0", &[9], 7);
    let pool = place.home().join("media/p1.pool").display().to_string();
    let (now, then) = (format!("{pool}:ds1"), format!("{pool}:ds1@before"));
    let text = place.refuses(4, "KGM-IMG-0409", &["vmfs", "ls", &now]);
    assert!(text.contains("its daemon"), "{text}");
    let after = content(&place, "sql01/scsi0:0");
    place.kill_daemon();
    let list = place.json(&["vmfs", "ls", &now, "/sql01"]);
    assert_eq!(list.as_array().unwrap().len(), 5, "{list}");
    let vmx = place.run(&["vmfs", "cat", &now, "/sql01/sql01.vmx"]).stdout;
    assert!(String::from_utf8(vmx).unwrap().contains("displayName = \"sql01\""));
    for (image, wanted) in [(&now, &after), (&then, &before)] {
        assert!(place.run(&["vmfs", "cat", image, "/sql01/sql01-flat.vmdk"]).stdout == *wanted, "{image}");
    }
    assert_eq!(place.json(&["vmfs", "stat", &then])["name"], "ds1");
    let rdm = place.json(&["vmfs", "stat", &now, "/sql01/sql01_1-rdmp.vmdk"]);
    assert!(rdm["kind"] == "rdm" && rdm["lun_identity"].is_string(), "{rdm}");
    place.ok(&["vmfs", "cp", &format!("{now}:/sql01/sql01.vmx"), "out.vmx"]);
    assert!(place.ok(&["inspect", "out.vmx"]).contains("VM configuration"));
    assert!(place.ok(&["inspect", &then]).contains("VMFS volume"));
    assert_eq!(place.json(&["vmfs", "check", &then])["verdict"], "clean");
    // By identity too; and what is not there is named.
    let naa = place.json(&["inspect", &pool])["holds"].to_string();
    assert!(naa.contains("LUN ds1") && naa.contains("@before"), "{naa}");
    let text = place.fails(3, &["vmfs", "ls", &format!("{pool}:nobody")]);
    assert!(text.contains("the pool has"), "{text}");
    place.fails(3, &["vmfs", "ls", &format!("{pool}:ds1@never")]);
    for words in [
        &["vmfs", "mkdir", &now, "/x"][..],
        &["vmfs", "rm", &now, "/sql01/sql01.vmx"],
        &["vmfs", "create", &now, "--size", "1G"],
        &["vmfs", "check", &now, "--repair"],
    ] {
        let out = place.run(words);
        assert!(
            crate::common::both(&out).contains("KGM-IMG-0002"),
            "{words:?}: {}",
            crate::common::both(&out)
        );
    }
    let copy = ["vmfs", "cp", "out.vmx", &format!("{now}:/x")];
    place.refuses(5, "KGM-IMG-0002", &copy);
    // Nothing was written: the daemon comes up as after any crash.
    assert!(content_again(&place) == after);
}

fn content_again(place: &Place) -> Vec<u8> {
    place.ok(&["pool", "ls"]);
    content(place, "sql01/scsi0:0")
}

#[test]
fn every_list_speaks_json() {
    let place = with_vm("json");
    place.ok(&["snap", "create", "sql01-d@s"]);
    for noun in ["pool", "lun", "snap", "group", "datastore", "disk", "rdm", "vm", "export", "job"] {
        let list: Value = place.json(&[noun, "ls"]);
        let list = list.as_array().unwrap();
        assert!(list.is_empty() == ["group", "job"].contains(&noun), "{noun}: {list:?}");
        let names = place.ok(&[noun, "ls", "-o", "name"]);
        assert_eq!(names.lines().count(), list.len(), "{noun}");
        assert_eq!(place.ok(&[noun, "ls", "-o", "jsonl"]).lines().count(), list.len());
        place.ok(&[noun, "ls", "-o", "wide"]);
        place.ok(&[noun, "list", "-q"]);
    }
    let pools = Rc::new(place.json(&["pool", "ls"]));
    assert!(pools[0]["used_bytes"].as_u64().unwrap() > 0, "{pools}");
}
