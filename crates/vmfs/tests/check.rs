//! The checker: clean volumes are clean, planted faults are found, leaks are repaired, nothing makes it panic.

#![allow(clippy::unwrap_used)] // a test that cannot go on panics

mod common;

use std::rc::Rc;
use std::time::{Duration, UNIX_EPOCH};

use block::{Disk, MemoryDisk};
use vmfs::check::{CheckError, Options, Severity, What, exit_code};
use vmfs::{NewVolume, check, create};

fn fresh(bytes: u64) -> Rc<MemoryDisk> {
    let disk = Rc::new(MemoryDisk::new(bytes / 512));
    let new = NewVolume::new("test", 1, UNIX_EPOCH + Duration::from_secs(1_760_000_000));
    common::at_once(create(vec![disk.clone()], &new)).unwrap();
    disk
}

#[test]
fn fresh_volumes_of_every_size_are_clean() {
    const GIB: u64 = 1 << 30;
    for bytes in [768 << 20, GIB, 2 * GIB, 64 * GIB, (5 * GIB) << 9, (16 * GIB) << 10] {
        let report = common::at_once(check(vec![fresh(bytes)], Options::default())).unwrap();
        assert_eq!(report.findings(), []);
        assert!(!report.cut_short);
        assert_eq!((report.totals.files, report.exit_code()), (0, 0));
    }
}

/// Mounted volumes have a journal block and locks that only heartbeats know of: notes, not faults.
#[test]
fn genuine_volumes_are_clean() {
    let alone =
        ["vmfs5", "zero5", "vmfs5-no-dense-sbpc", "vmfs5-resource-optimized", "vmfs5d", "vmfs5l", "vmfs5ld"];
    let mut volumes: Vec<Vec<String>> = alone.iter().map(|name| vec![format!("vmfs/{name}")]).collect();
    volumes.push([1, 0].map(|half| format!("vmfs/span/vmfs5-span-{half}")).to_vec());
    for names in volumes {
        let mut devices: Vec<Rc<dyn Disk>> = Vec::new();
        for name in &names {
            let Some(disk) = common::genuine::disk(name) else { return };
            devices.push(disk);
        }
        let report = common::at_once(check(devices, Options::default())).unwrap();
        assert!(report.is_clean() && !report.cut_short, "{names:?}: {:?}", report.findings());
        let notes: Vec<What> = report.findings().iter().map(|finding| finding.what).collect();
        assert!(
            notes.iter().all(|what| matches!(what, What::Mounted | What::LockBlock)),
            "{names:?}: {notes:?}"
        );
        assert_eq!(notes.contains(&What::Mounted), names[0] != "vmfs/zero5", "{names:?}");
        if names[0] == "vmfs/vmfs5" {
            let totals = report.totals;
            assert_eq!((totals.files, totals.directories, totals.mappings, totals.blocks), (131, 2, 1, 2048));
        }
    }
}

#[test]
fn what_is_no_vmfs_is_refused() {
    let empty: Rc<dyn Disk> = Rc::new(MemoryDisk::new(1 << 16));
    let outcome = common::at_once(check(vec![empty], Options::default()));
    assert!(matches!(outcome, Err(CheckError::NotVmfs { device: 0 })));
    assert_eq!(exit_code(&outcome), 1);
    let Some(six) = common::genuine::disk("vmfs/vmfs6") else { return };
    let outcome = common::at_once(check(vec![six], Options::default()));
    assert!(matches!(outcome, Err(CheckError::Version { version: 6, .. })));
}

/// 64 TiB on one device: three further regions of tables lie behind the data of the first.
#[test]
fn tables_of_a_huge_genuine_device_are_clean() {
    let Some(disk) = common::genuine::huge("lvm/huge/lvm5") else { return };
    let report = common::at_once(check(vec![disk], Options::default())).unwrap();
    let corrupt = report.findings().iter().filter(|finding| finding.severity == Severity::Corrupt);
    let wrong: Vec<What> = corrupt.map(|finding| finding.what).collect();
    assert_eq!(wrong, [What::FileSystemDescriptor], "it has no file system: {:?}", report.findings());
    assert!(report.cut_short);
}

#[test]
fn a_volume_on_several_devices_is_clean_in_any_order() {
    // The first is so small that the metadata goes on on the second.
    let sizes = [300 << 20, 1 << 30, 3 << 30].map(|bytes: u64| Rc::new(MemoryDisk::new(bytes / 512)));
    let new = NewVolume::new("span", 3, UNIX_EPOCH + Duration::from_secs(1_760_000_000));
    let devices: Vec<Rc<dyn Disk>> = sizes.iter().map(|disk| disk.clone() as Rc<dyn Disk>).collect();
    let made = common::at_once(create(devices.clone(), &new)).unwrap();
    assert_eq!(made.bytes >> 28, 1 + 3 + 11);
    assert!(u64::from(made.geometry.used_blocks) * made.geometry.block_bytes > 256 << 20);
    for order in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
        let devices = order.map(|i| devices[i].clone()).to_vec();
        let report = common::at_once(check(devices, Options::default())).unwrap();
        assert_eq!(report.findings(), []);
    }
    let report = common::at_once(check(devices[..2].to_vec(), Options::default())).unwrap();
    assert!(report.findings().iter().any(|f| f.what == What::Extents || f.what == What::VolumeManager));
}
