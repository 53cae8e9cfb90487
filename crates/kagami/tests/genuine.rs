//! Volumes that ESXi itself made, inspected by the program as a user calls it: no daemon, nothing written.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;
#[path = "../../vmfs/tests/common/genuine.rs"]
#[allow(dead_code, missing_docs)] // the tests of vmfs use the rest
mod genuine;

use common::Place;
use serde_json::Value;

/// What `genuine` runs its disks in memory with.
fn at_once<T>(work: impl std::future::Future<Output = T>) -> T {
    lane::block_on(work)
}

/// The same content was put on the VMFS-5 and the VMFS-6 volume.
fn inspect(name: &str, version: &str) {
    let Some(path) = genuine::path(name) else { return };
    let before = std::fs::metadata(&path).unwrap().modified().unwrap();
    let image = path.to_str().unwrap();
    let place = Place::new("genuine");

    let volume = place.json(&["vmfs", "stat", image]);
    assert!(volume["version"].as_str().unwrap().starts_with(version), "{volume}");
    let list = place.json(&["vmfs", "ls", image]);
    let entry = |list: &Value, name: &str| -> Value {
        let found = list.as_array().unwrap().iter().find(|e| e["name"] == name);
        found.unwrap_or_else(|| panic!("{name} is missing in {list}")).clone()
    };
    for name in ["small", "big", "bigger", "symlink", "directory", "collision", ".fbb.sf", "rdm-rdm.vmdk"] {
        entry(&list, name);
    }
    let files = place.json(&["vmfs", "ls", image, "/directory"]);
    assert_eq!(files.as_array().unwrap().len(), 100);
    let deep = place.json(&["vmfs", "ls", "-R", image]);
    assert!(deep.as_array().unwrap().len() > list.as_array().unwrap().len() + 100, "{deep}");

    let big = place.json(&["vmfs", "stat", image, "/big"]);
    assert_eq!(big["size_bytes"], (1 << 20) + 1, "{big}");
    let small = place.run(&["vmfs", "cat", image, "/small"]);
    assert!(small.status.success() && small.stdout.len() == 5, "{}", common::both(&small));
    let through = place.run(&["vmfs", "cat", image, "/symlink"]);
    assert_eq!(through.stdout, small.stdout, "through the link");
    let bigger = place.run(&["vmfs", "cat", image, "/bigger"]).stdout;
    assert_eq!(bigger.len(), 128 << 20);
    let mib_of = |(mib, bytes): (usize, &[u8])| bytes.iter().all(|b| usize::from(*b) == mib);
    assert!(bigger.chunks(1 << 20).enumerate().all(mib_of), "MiB n of bigger is full of n");
    let record = place.json(&["vmfs", "stat", image, "/rdm-rdm.vmdk"]);
    assert_eq!(record["lun_identity"], "QM00015", "{record}");
    let mapping = place.ok(&["vmfs", "cat", image, "/rdm.vmdk"]);
    assert!(mapping.contains("vmfsRawDeviceMap"), "{mapping}");
    place.fails(3, &["vmfs", "cat", image, "/nothing"]);

    assert!(place.ok(&["inspect", image]).contains("VMFS volume"));
    assert!(!place.home().exists(), "no daemon was started");
    assert_eq!(std::fs::metadata(&path).unwrap().modified().unwrap(), before, "nothing was written");
}

#[test]
fn a_vmfs5_volume_of_esxi() {
    inspect("vmfs/vmfs5", "VMFS-5 ");
}

#[test]
fn a_vmfs6_volume_of_esxi() {
    inspect("vmfs/vmfs6", "VMFS-6 ");
}
