//! What `create` writes is what ESXi writes; every size works; nothing is overwritten by accident.

#![allow(clippy::unwrap_used)] // a test that cannot go on panics

mod common;

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, UNIX_EPOCH};

use block::crash::CrashLog;
use block::{Disk, Extents, Kind, MemoryDisk, Sector, SegmentsMut};
use vmfs::create::{CreateError, DeviceIdentity, Existing, Stamps, Tuning};
use vmfs::format::{
    DATA_OFFSET, FS_DESCRIPTOR_OFFSET, FsDescriptor, LVM_HEADER_OFFSET, LockBlock, LvmHeader, PeEntry,
    VolumeDescriptor, lvm5, view,
};
use vmfs::{NewVolume, create};

fn read(disk: &MemoryDisk, at: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let into = SegmentsMut::new(&mut bytes);
    common::at_once(async { disk.read(Sector::at_byte(at), &into).await.unwrap() });
    bytes
}

/// All sectors of a disk that are not zero.
fn sectors(disk: &MemoryDisk) -> BTreeMap<u64, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut extents = Extents::with_limit(4096);
    let mut at = 0;
    while at < disk.shape().sectors {
        extents.clear();
        let count = disk.shape().sectors - at;
        common::at_once(async { disk.status(Sector(at), count, None, &mut extents).await.unwrap() });
        for extent in extents.iter().filter(|e| e.kind == Kind::Data) {
            let bytes = read(disk, extent.at.bytes(), extent.count as usize * 512);
            for (sector, content) in (extent.at.0..).zip(bytes.chunks_exact(512)) {
                if content.iter().any(|b| *b != 0) {
                    all.insert(sector, content.to_vec());
                }
            }
        }
        at = extents.end().unwrap().0;
    }
    all
}

fn now() -> std::time::SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_760_000_000)
}

/// What a genuine volume was made of, read from the volume.
fn recipe_of(genuine: &MemoryDisk, root_fd: u64) -> NewVolume {
    let header = read(genuine, 0x10_0000, 512);
    let header: &LvmHeader = view(&header).unwrap();
    let volume = read(genuine, lvm5::VOLUME, 512);
    let volume: &VolumeDescriptor = view(&volume).unwrap();
    let fs = read(genuine, DATA_OFFSET + 0x20_0000, 512);
    let fs: &FsDescriptor = view(&fs).unwrap();
    let names = read(genuine, lvm5::NAMES, 512);
    // The root's own lock may have been taken since; its neighbour's is as it was made.
    let second_lock = read(genuine, DATA_OFFSET + root_fd + 0x800, 512);
    let second_lock: &LockBlock = view(&second_lock).unwrap();
    let name = names[..names.iter().position(|b| *b == 0).unwrap()].to_vec();
    NewVolume {
        version: 5,
        label: fs.label_text(),
        block_bytes: fs.block_bytes.get(),
        tuning: Tuning {
            large_sub_blocks: fs.sub_block_bytes.get() == 0x8000,
            resource_optimized: Some(false),
        },
        host: fs.format_host,
        volume_uuid: volume.uuid,
        file_system_uuid: fs.uuid,
        devices: vec![DeviceIdentity {
            uuid: header.device_uuid,
            scsi: header.disk_id,
            name: String::from_utf8(name).unwrap(),
        }],
        stamps: Stamps {
            device_created_us: header.created_us.get(),
            device_modified_us: header.modified_us.get(),
            volume_created_us: volume.created_us.get(),
            volume_modified_us: volume.modified_us.get(),
            created_s: fs.created_s.get(),
        },
        first_clock: second_lock.clock.get() - 1,
        force: false,
    }
}

#[test]
fn a_fresh_volume_is_the_genuine_one_byte_for_byte() {
    let Some(genuine) = common::genuine::disk("vmfs/vmfs5-no-dense-sbpc") else { return };
    let new = recipe_of(&genuine, 0x42_0000);
    let ours = Rc::new(MemoryDisk::new(genuine.shape().sectors));
    let made = common::at_once(create(vec![ours.clone()], &new)).unwrap();
    assert_eq!(made.bytes, 2 << 30);

    let (theirs, ours) = (sectors(&genuine), sectors(&ours));
    let mut same = 0;
    let mut different = Vec::new();
    for sector in theirs.keys().chain(ours.keys().filter(|s| !theirs.contains_key(s))) {
        if theirs.get(sector) == ours.get(sector) {
            same += 1;
        } else {
            different.push(*sector * 512);
        }
    }
    let behind_the_volume = DATA_OFFSET + made.bytes;
    different.retain(|at| *at < behind_the_volume); // what an earlier use of the device left there
    assert_eq!(same, 7093);
    let expected = [
        0x34_2000, // the heartbeat slot of the host that has it mounted
        0x51_1c00, // the cluster in which that host took a block for its journal: its lock
        0x51_1e00, // and its bitmap
        0x51_4e00, // the advisory mark of the next-to-last cluster of .fbb.sf, which this volume lacks
    ];
    assert_eq!(different, expected.map(|at| at + DATA_OFFSET));
}

fn fresh(sectors: u64) -> (Rc<MemoryDisk>, NewVolume) {
    (Rc::new(MemoryDisk::new(sectors)), NewVolume::new("test", 1, now()))
}

#[test]
fn every_size_is_made_and_describes_itself() {
    const GIB: u64 = 1 << 30;
    for bytes in [768 << 20, GIB, 2 * GIB, 64 * GIB, (5 * GIB) << 9, (16 * GIB) << 10] {
        let (disk, new) = fresh(bytes / 512);
        let made = common::at_once(create(vec![disk.clone()], &new)).unwrap();
        assert_eq!(made.bytes, (bytes - DATA_OFFSET) >> 28 << 28);
        let fs = read(&disk, DATA_OFFSET + FS_DESCRIPTOR_OFFSET, 512);
        view::<FsDescriptor>(&fs).unwrap().check().unwrap();
        let header = read(&disk, LVM_HEADER_OFFSET, 512);
        let header: &LvmHeader = view(&header).unwrap();
        header.check(LVM_HEADER_OFFSET).unwrap();
        assert_eq!(u64::from(header.extents.get()), made.bytes >> 28);
        assert_eq!(u64::from(header.pe_maps.get()), (made.bytes >> 28).div_ceil(8192));
        let last = made.bytes / (256 << 20) - 1;
        let at = lvm5::PE_TABLE + last / 8192 * lvm5::MAP_STEP + last % 8192 * 128;
        let entry = read(&disk, at & !511, 512);
        let entry: &PeEntry = view(&entry[(at % 512) as usize..]).unwrap();
        assert_eq!((u64::from(entry.id.get()), entry.volume_offset.get()), (last, last << 28));
    }
}

#[test]
fn content_is_not_overwritten_by_accident() {
    let (disk, mut new) = fresh((1 << 30) / 512);
    common::at_once(create(vec![disk.clone()], &new)).unwrap();
    let before = sectors(&disk);
    new.label = "second".into();
    let refused = common::at_once(create(vec![disk.clone()], &new)).unwrap_err();
    assert!(matches!(refused, CreateError::Occupied { device: 0, found: Existing::VmfsDevice }), "{refused}");
    assert!(refused.to_string().contains("force"));
    assert!(sectors(&disk) == before);
    new.force = true;
    common::at_once(create(vec![disk.clone()], &new)).unwrap();
    let fs = read(&disk, DATA_OFFSET + FS_DESCRIPTOR_OFFSET, 512);
    assert_eq!(view::<FsDescriptor>(&fs).unwrap().label_text(), "second");
}

#[test]
fn what_cannot_be_made_is_refused_and_nothing_is_written() {
    let refuse = |sectors: u64, change: &dyn Fn(&mut NewVolume)| {
        let (disk, mut new) = fresh(sectors);
        change(&mut new);
        let error = common::at_once(create(vec![disk.clone()], &new)).unwrap_err();
        assert!(self::sectors(&disk).is_empty());
        error
    };
    let gib = 1 << 21;
    assert!(matches!(refuse(0, &|_| ()), CreateError::TooSmall { .. }));
    assert!(matches!(refuse(gib / 4, &|_| ()), CreateError::TooSmall { .. }));
    assert!(matches!(refuse(20 << 31, &|_| ()), CreateError::TooLarge { .. }));
    assert!(matches!(refuse(gib, &|new| new.label = "a/b".into()), CreateError::Label(_)));
    assert!(matches!(refuse(gib, &|new| new.label = "x".repeat(128)), CreateError::Label(_)));
    assert!(matches!(refuse(gib, &|new| new.version = 6), CreateError::Version(6)));
    assert!(matches!(refuse(gib, &|new| new.block_bytes = 4096), CreateError::BlockSize(4096)));
    assert!(matches!(refuse(gib, &|new| new.devices.clear()), CreateError::Devices { .. }));
}

/// Power fails at every event of making a volume over an old one: it is the old one (before the first flush ended),
/// nothing at all, or the new one, and the new one only after its last write.
#[test]
fn crash_at_every_write_leaves_no_half_volume() {
    let (old, recipe) = fresh((768 << 20) / 512);
    common::at_once(create(vec![old.clone()], &recipe)).unwrap();
    let log = CrashLog::new(1);
    let disk = log.disk_from(old.image());
    let mut new = NewVolume::new("new", 1, now());
    new.force = true;
    common::at_once(create(vec![disk.clone()], &new)).unwrap();
    let finished = sectors(&MemoryDisk::from(disk.image()));
    let (mut empty, mut whole) = (0, 0);
    for point in 0..=log.points() {
        for seed in 0..3 {
            let image = MemoryDisk::from(log.cut(point, seed).remove(0));
            let header = read(&image, LVM_HEADER_OFFSET, 512);
            let header: &LvmHeader = view(&header).unwrap();
            if header.check(LVM_HEADER_OFFSET).is_err() {
                empty += 1;
            } else if header.device_uuid == new.devices[0].uuid {
                assert!(sectors(&image) == finished, "half a volume at {point} seed {seed}");
                whole += 1;
            } else {
                assert_eq!(header.device_uuid, recipe.devices[0].uuid);
            }
        }
    }
    assert!(empty > 10 && whole > 2, "{empty} {whole}");
}
