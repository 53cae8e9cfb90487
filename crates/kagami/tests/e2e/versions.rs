//! Records of the home that a newer kagami wrote: shown, refused naming both versions, and left as they are.

use serde_json::{Value, json};

use crate::common::Place;
use crate::common::wire::{content, with_vm, write};

/// Says that a newer program wrote it, in a way that this one does not know.
fn make_newer(file: &std::path::Path) -> Vec<u8> {
    let mut value: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    value["format"] = json!(2);
    value["colour"] = json!("red");
    std::fs::write(file, value.to_string()).unwrap();
    std::fs::read(file).unwrap()
}

/// What a user types after the program's name.
type Words<'a> = &'a [&'a str];

fn named<'a>(list: &'a Value, name: &str) -> &'a Value {
    let found = list.as_array().unwrap().iter().find(|object| object["name"] == name);
    found.unwrap_or_else(|| panic!("{name} is not in {list}"))
}

#[test]
fn records_of_a_newer_kagami_are_shown_refused_and_left_as_they_are() {
    let place = with_vm("newer");
    write(&place, "sql01/scsi0:1", &[1], 0x10);
    let refused: [(&str, Words, &str, &[Words]); 4] = [
        (
            "pools/p1.json",
            &["pool", "ls"],
            "p1",
            &[&["pool", "rm", "p1", "--yes"], &["pool", "reopen", "p1"]],
        ),
        (
            "datastores/ds1.json",
            &["datastore", "ls"],
            "ds1",
            &[&["disk", "create", "ds1:x/x.vmdk", "--size", "1M"]],
        ),
        ("vms/sql01.json", &["vm", "ls"], "sql01", &[&["vm", "rm", "sql01"]]),
        (
            "exports/sql01%2Fscsi0%3A1.json",
            &["export", "ls"],
            "sql01/scsi0:1",
            &[&["export", "stop", "sql01/scsi0:1"]],
        ),
    ];
    let taken: [(&str, &[&str]); 4] = [
        ("KGM-POL-0409", &["pool", "create", "p1", "--size", "1G"]),
        ("KGM-DST-0409", &["datastore", "create", "ds1", "--size", "1G"]),
        ("KGM-VMS-0409", &["vm", "create", "sql01", "--datastore", "ds1", "--disk", "1M"]),
        ("KGM-EXP-0409", &["export", "start", "sql01/scsi0:1"]),
    ];
    for ((file, list, name, commands), (code, create)) in refused.into_iter().zip(taken) {
        place.ok(&["serve", "--stop"]);
        let path = place.home().join(file);
        let old = std::fs::read(&path).unwrap();
        let newer = make_newer(&path);
        let all = place.json(list);
        let view = named(&all, name);
        assert!(view["state"] == "missing" || view["state"] == "down", "{view}");
        let said = |text: &str| {
            let shown = path.display().to_string();
            assert!(
                text.contains(&shown) && text.contains("its format is 2") && text.contains("up to 1"),
                "{text}"
            );
        };
        said(view["trouble"].as_str().unwrap());
        said(&place.json(&["serve", "--status"])["troubles"].to_string());
        for words in commands {
            let text = place.refuses(5, "KGM-SRV-0013", words);
            assert!(text.contains("its format is 2") && text.contains("up to 1"), "{words:?}: {text}");
        }
        place.refuses(4, code, create);
        place.ok(&["serve", "--stop"]);
        place.json(list);
        assert!(std::fs::read(&path).unwrap() == newer, "{file} is left as it is");
        place.ok(&["serve", "--stop"]);
        std::fs::write(&path, old).unwrap();
        assert_eq!(content(started(&place), "sql01/scsi0:1")[4096], 0x11);
    }
}

fn started(place: &Place) -> &Place {
    place.json(&["export", "ls"]);
    place
}

#[test]
fn jobs_of_a_newer_kagami_are_shown_and_left_alone() {
    let place = with_vm("newer-job");
    let repo = place.dir().join("repo").display().to_string();
    place.ok(&["backup", "create", "sql01", "--repo", &repo]);
    place.ok(&["serve", "--stop"]);
    let files: Vec<_> =
        std::fs::read_dir(place.home().join("jobs")).unwrap().map(|e| e.unwrap().path()).collect();
    let [file] = &files[..] else { panic!("one job: {files:?}") };
    let newer = make_newer(file);
    let jobs = place.json(&["job", "ls"]);
    assert!(jobs[0]["state"] == "unreadable", "{jobs}");
    let why = jobs[0]["problem"].to_string();
    assert!(why.contains("its format is 2") && why.contains("KGM-SRV-0013"), "{jobs}");
    // Others go on, and do not push it out.
    place.ok(&["backup", "create", "sql01", "--repo", &repo]);
    assert_eq!(place.json(&["job", "ls"]).as_array().unwrap().len(), 2);
    assert!(std::fs::read(file).unwrap() == newer);
}
