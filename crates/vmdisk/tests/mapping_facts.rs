//! A mapping that ESXi made, held against its descriptor: sound as it is, and found when it is changed.
#![allow(clippy::unwrap_used)] // a test fails by panicking

#[path = "../../vmfs/tests/common/genuine.rs"]
#[allow(dead_code, missing_docs)] // the tests of vmfs use the rest
mod genuine;

use std::rc::Rc;
use std::time::Duration;

use block::{Disk, MemoryDisk};
use vmdisk::rdm::{Around, Facts, LunIdentity, VisibleLun};
use vmfs::check::{Options, What};
use vmfs::{Mode, Volume, check};

const DESCRIPTOR: &str = "/rdm.vmdk";
const MAPPING: &str = "/rdm-rdm.vmdk";

/// What `genuine` runs its disks in memory with.
fn at_once<T>(work: impl Future<Output = T>) -> T {
    lane::block_on(work)
}

async fn faults(disk: &Rc<MemoryDisk>, visible: &[VisibleLun]) -> Vec<String> {
    let volume = Volume::open(vec![disk.clone()], Mode::Read).await.unwrap();
    let facts = Facts::collect(&volume).await;
    let around = Around { visible, ..Around::NOTHING };
    let judge = |mapping: &vmfs::check::Mapping| facts.judge(mapping, around);
    let report =
        check(vec![disk.clone()], Options { repair_leaks: false, mapping: Some(&judge) }).await.unwrap();
    assert!(report.totals.mappings >= 1);
    let faults = report.findings().iter().filter(|finding| finding.what == What::MappingRecord);
    faults.map(ToString::to_string).collect()
}

async fn to_write(disk: &Rc<MemoryDisk>) -> Volume {
    // The host that had it open is long dead.
    let stale_after = Some(Duration::from_millis(5));
    let options = vmfs::Options { stale_after, ..vmfs::Options::new(Mode::Write) };
    Volume::open_with(vec![disk.clone()], options).await.unwrap()
}

#[test]
fn a_mapping_of_esxi_is_held_against_its_descriptor_and_its_lun() {
    let Some(genuine) = genuine::disk("vmfs/vmfs5") else { return };
    let fresh = || Rc::new(MemoryDisk::from(genuine.image()));
    lane::block_on(async {
        let disk = fresh();
        assert_eq!(faults(&disk, &[]).await, [""; 0]);
        let rdm =
            Volume::open(vec![disk.clone()], Mode::Read).await.unwrap().read_rdm(MAPPING).await.unwrap();
        // The LUN as a device with that serial number, and one that became shorter.
        let lun = |sectors: u64| {
            let record = &rdm.record;
            let serial = record.id[..20].trim_ascii().to_vec();
            let (vendor, product, revision) = (record.vendor, record.product, record.revision);
            let (logical_block, physical_block) = (512, 512);
            let shape = LunIdentity { sectors, logical_block, physical_block, ..LunIdentity::default() };
            let identity = LunIdentity { serial, vendor, product, revision, ..shape };
            let disk: Rc<dyn Disk> = Rc::new(MemoryDisk::new(sectors));
            VisibleLun { unit: 1, name: "sdb".into(), identity, disk }
        };
        assert_eq!(faults(&disk, &[lun(rdm.length / 512)]).await, [""; 0]);
        let shorter = faults(&disk, &[lun(rdm.length / 512 - 1)]).await;
        assert!(shorter.len() == 1 && shorter[0].contains("LUN sdb has"), "{shorter:?}");

        let volume = to_write(&disk).await;
        let longer = vmfs::Rdm { length: rdm.length + 512, ..rdm.clone() };
        volume.replace_rdm(MAPPING, &longer).await.unwrap();
        volume.close().await.unwrap();
        let found = faults(&disk, &[]).await;
        assert!(found.len() == 1 && found[0].contains("as /rdm.vmdk says"), "{found:?}");

        let disk = fresh();
        let volume = to_write(&disk).await;
        let text = String::from_utf8(volume.read_file(DESCRIPTOR, 1 << 16).await.unwrap()).unwrap();
        let sectors = (rdm.length / 512).to_string();
        assert!(text.contains(&sectors), "{text}");
        let other = text.replace(&sectors, &(rdm.length / 512 - 8).to_string());
        volume.write_file(DESCRIPTOR, other.as_bytes()).await.unwrap();
        volume.close().await.unwrap();
        let found = faults(&disk, &[]).await;
        assert!(found.len() == 1 && found[0].contains("as /rdm.vmdk says"), "{found:?}");
    });
}
