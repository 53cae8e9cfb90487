//! Reading volumes that ESXi made: every kind of file, spans, local volumes, volumes without LVM.

#![allow(clippy::unwrap_used)] // a test that cannot go on panics

mod common;

use block::{Disk, MemoryDisk, Sector, SegmentsMut};
use common::genuine;
use std::path::PathBuf;
use std::rc::Rc;
use vmfs::format::{InodeKind, ScsiIdKind, Zla};
use vmfs::{Content, Error, File, Mode, Space, Volume};

fn open(disks: &[Rc<MemoryDisk>]) -> Result<Volume, Error> {
    let devices = disks.iter().map(|d| Rc::clone(d) as Rc<dyn Disk>).collect();
    lane::block_on(Volume::open(devices, Mode::Read))
}

fn volume(name: &str) -> Option<Volume> {
    Some(open(&[genuine::disk(name)?]).unwrap())
}

/// Reads sectors of a file the way callers do: locate, then read the device.
async fn read_sectors(volume: &Volume, file: &File, at: u64, count: u64) -> Vec<u8> {
    let mut out = vec![0xEE; (count * 512) as usize];
    let mut done = 0;
    while done < count {
        for place in file.locate(Sector(at + done), count - done, 4).await.unwrap() {
            assert_eq!(place.at.0, at + done);
            let part = &mut out[(done * 512) as usize..((done + place.count) * 512) as usize];
            match place.content {
                Content::Hole | Content::ToBeZeroed { .. } => part.fill(0),
                Content::Data { device, at } => {
                    volume.space().devices()[device].read(at, &SegmentsMut::new(part)).await.unwrap()
                }
            }
            done += place.count;
        }
    }
    out
}

/// The same content was put on the VMFS-5 and the VMFS-6 volume.
fn check_rich_volume(name: &str, version: u8) {
    let Some(volume) = volume(name) else { return };
    assert_eq!(volume.info().version, version);
    lane::block_on(async {
        let names: Vec<String> = volume.list("/").await.unwrap().into_iter().map(|e| e.name).collect();
        for wanted in ["small", "big", "bigger", "symlink", "directory", "collision", ".fbb.sf"] {
            assert!(names.iter().any(|n| n == wanted), "{wanted} is missing in {names:?}");
        }
        let small = volume.entry("small").await.unwrap();
        assert_eq!((small.kind, small.zla, small.length), (InodeKind::File, Zla::Resident, 5));
        let text = volume.read_file("small", 100).await.unwrap();
        assert_eq!(volume.read_file("/symlink", 100).await.unwrap(), text, "through the link");
        assert_eq!(
            volume.read_link("symlink").await.unwrap(),
            format!("/vmfs/volumes/{}/small", volume.info().label)
        );

        let big = volume.open_file("big").await.unwrap();
        assert_eq!(big.length(), (1 << 20) + 1);
        let bigger = volume.open_file("bigger").await.unwrap();
        assert_eq!(bigger.length(), 128 << 20);
        for mib in 0..128u64 {
            let bytes = read_sectors(&volume, &bigger, mib * 2048 + 3, 2).await;
            assert!(bytes.iter().all(|b| *b == mib as u8), "MiB {mib} of bigger");
        }
        let files = volume.list("directory").await.unwrap();
        assert_eq!(files.len(), 100);
        assert!((1..=100).all(|n| files.iter().any(|f| f.name == format!("file{n}"))));
        assert_eq!(volume.list("collision").await.unwrap().len(), 19);
        check_disks(&volume).await;
        check_mapping(&volume).await;
        check_refusals(&volume).await;
    });
}

async fn check_disks(volume: &Volume) {
    let all = volume.list("/").await.unwrap();
    let find = |part: &str| all.iter().find(|e| e.name.contains(part) && e.name.contains("flat")).unwrap();
    let normal = volume.open_file(&find("normal").name).await.unwrap();
    assert_eq!(normal.length(), 69 << 30);
    let at = (42 << 30) / 512;
    let bytes = read_sectors(volume, &normal, at - 1, 3).await;
    assert_eq!(bytes, [[0; 512], [0x42; 512], [0; 512]].concat());
    let large = find("large");
    assert_eq!((large.zla, large.length, large.blocks), (Zla::Double, 42 << 40, 1));
    let file = volume.open_file(&large.name).await.unwrap();
    let bytes = read_sectors(volume, &file, (117 << 30) / 512, 2).await;
    assert_eq!(bytes[..512], [0x42; 512]);
    let places = file.locate(Sector(0), (42 << 40) / 512, 100).await.unwrap();
    let contents: Vec<bool> = places.iter().map(|p| p.content == Content::Hole).collect();
    assert_eq!(contents, [true, false, true], "hole, one block, hole");
    assert!(file.locate_now(Sector((117 << 30) / 512), 8, 8).unwrap().is_some(), "pointer blocks are kept");
    assert!(file.locate(Sector((42 << 40) / 512), 1, 1).await.is_err(), "behind the end");
}

async fn check_mapping(volume: &Volume) {
    let entry = volume.entry("rdm-rdm.vmdk").await.unwrap();
    assert_eq!((entry.kind, entry.mode & 0o777), (InodeKind::Rdm, 0o600));
    let rdm = volume.read_rdm("rdm-rdm.vmdk").await.unwrap();
    assert_eq!(rdm.length >> 30, 6969);
    assert_eq!(rdm.record.id_text(), "QM00015");
    assert_eq!(rdm.record.check(0).unwrap(), (ScsiIdKind::Serial, &b"QM00015             QEMU H"[..]));
    assert_eq!(rdm.tail, b"");
    let text = volume.read_file("rdm.vmdk", 4096).await.unwrap();
    assert!(String::from_utf8(text).unwrap().contains("vmfsRawDeviceMap"));
}

async fn check_refusals(volume: &Volume) {
    assert!(matches!(volume.open_file("nothing").await, Err(Error::NotFound { .. })));
    assert!(matches!(volume.open_file("directory").await, Err(Error::WrongKind { .. })));
    assert!(matches!(volume.list("small").await, Err(Error::WrongKind { .. })));
    assert!(matches!(volume.entry("directory/../small").await, Err(Error::BadPath { .. })));
    assert!(matches!(volume.read_file("bigger", 4096).await, Err(Error::TooLarge { .. })));
}

#[test]
fn vmfs5_reads_as_esxi_wrote_it() {
    check_rich_volume("vmfs/vmfs5", 5);
}

#[test]
fn vmfs6_reads_as_esxi_wrote_it() {
    check_rich_volume("vmfs/vmfs6", 6);
}

#[test]
fn other_forms_of_volumes_open() {
    let forms = [
        ("vmfs/vmfs5l", 5, true, true),
        ("vmfs/vmfs5d", 5, false, false),
        ("vmfs/vmfs5ld", 5, true, false),
        ("vmfs/vmfs5-resource-optimized", 5, false, true),
        ("vmfs/vmfs5-no-dense-sbpc", 5, false, true),
        ("vmfs/vmfs6l", 6, true, true),
        ("vmfs/vmfs6d", 6, false, false),
        ("vmfs/vmfs6ld", 6, true, false),
        ("vmfs/vmfs6-resource-optimized", 6, false, true),
    ];
    for (name, version, local, lvm) in forms {
        let Some(volume) = volume(name) else { return };
        let info = volume.info();
        assert_eq!(
            (info.version, info.local, volume.space().lvm().is_some()),
            (version, local, lvm),
            "{name}"
        );
        let names = lane::block_on(volume.list("/")).unwrap();
        assert!(names.iter().all(|e| e.name.ends_with(".sf")), "{name}");
        assert_eq!(names.len(), if version == 6 { 9 } else { 7 }, "{name}");
    }
}

#[test]
fn an_empty_thin_disk_is_all_hole() {
    for name in ["vmfs/zero5", "vmfs/zero6"] {
        let Some(volume) = volume(name) else { return };
        lane::block_on(async {
            let all = volume.list("/").await.unwrap();
            let flat = all.iter().find(|e| e.name.ends_with("-flat.vmdk")).unwrap();
            assert_eq!((flat.length, flat.blocks), (100 << 30, 0));
            let file = volume.open_file(&flat.name).await.unwrap();
            let places = file.locate(Sector(0), (100 << 30) / 512, 9).await.unwrap();
            assert_eq!(places.len(), 1);
            assert_eq!(places[0].content, Content::Hole);
        });
    }
}

#[test]
fn a_span_opens_in_any_order_and_only_whole() {
    for version in [5, 6] {
        let Some(first) = genuine::disk(&format!("vmfs/span/vmfs{version}-span-0")) else { return };
        let Some(second) = genuine::disk(&format!("vmfs/span/vmfs{version}-span-1")) else { return };
        let volume = open(&[Rc::clone(&second), Rc::clone(&first)]).unwrap();
        assert_eq!(volume.info().volume_bytes, 4 << 30);
        assert!(lane::block_on(volume.list("/")).unwrap().len() >= 7);
        assert!(matches!(open(&[first]), Err(Error::WrongDevices { .. })));
    }
}

/// LVM alone, 3 to 6, one device and two: MiB i of the volume is filled with byte i. These are full of data, so they
/// are read where they lie.
#[test]
fn lvm_of_every_version_maps_the_volume() {
    for version in 3..=6 {
        let Some(one) = genuine::path(&format!("lvm/lvm{version}")) else { return };
        check_lvm(vec![one], 512);
        let Some(a) = genuine::path(&format!("lvm/span/lvm{version}-span-0")) else { return };
        let Some(b) = genuine::path(&format!("lvm/span/lvm{version}-span-1")) else { return };
        check_lvm(vec![b, a], 1024);
    }
}

fn check_lvm(paths: Vec<PathBuf>, mib: u64) {
    lane::block_on(async {
        let options = media::Options { read_only: true, ..media::Options::default() };
        let mut devices: Vec<Rc<dyn Disk>> = Vec::new();
        for path in paths {
            devices.push(media::open(path, options.clone()).await.unwrap());
        }
        let space = Space::open(devices).await.unwrap();
        assert_eq!(space.bytes(), mib << 20);
        for i in 0..mib {
            let mut bytes = [0; 1024];
            space.read((i << 20) + 512, &mut bytes).await.unwrap();
            assert!(bytes.iter().all(|b| *b == i as u8), "MiB {i} of {mib}");
        }
    });
}

/// 64 TiB on one device: the tables go on behind every 16 TiB of data.
#[test]
fn huge_devices_map_to_their_end() {
    for name in ["lvm/huge/lvm5", "lvm/huge/lvm6"] {
        let Some(disk) = genuine::huge(name) else { return };
        lane::block_on(async {
            let device = disk.shape().bytes();
            let space = Space::open(vec![disk]).await.unwrap();
            assert!(space.bytes() > 63 << 40 && space.bytes() < device, "{name}: {}", space.bytes());
            for region in 0..3u64 {
                let piece = space.piece(region << 44, 512).unwrap();
                // Each region has 16 MiB of tables in front of its 16 TiB.
                assert_eq!(
                    piece.at,
                    (region << 44) + 0x110_0000 + region * 0x100_0000,
                    "{name} region {region}"
                );
            }
            let last = space.piece(space.bytes() - 512, 4096).unwrap();
            assert_eq!(last.bytes, 512);
            assert!(space.piece(space.bytes(), 512).is_err());
        });
    }
}
