//! VMFS-3, read and written: the test image of vmfs-tools (its own packed form; sha256 0253011903f2...), which is in that
//! project's source tree and in no package. `KAGAMI_VMFS3_IMAGE=FILE` names it.

#![allow(clippy::unwrap_used)] // a test that cannot go on panics

mod common;

use std::mem::offset_of;
use std::rc::Rc;

use block::{Disk, MemoryDisk, Safe, Sector, Segments, SegmentsMut};
use common::datastore::{MIB, open, read, write};
use common::outside::{Image, run};
use vmfs::check::{Options, Severity, What};
use vmfs::format::{FdMeta, Zla};
use vmfs::{Content, Layout, Mode, NewFile, Volume, check};

/// Unpacks `VMFSIMG` version 2: sectors of words, runs of zero sectors, a checksum at the end.
fn unpack(packed: &[u8]) -> Rc<MemoryDisk> {
    let mut rest = packed.strip_prefix(b"VMFSIMG\x02").expect("the packed form of vmfs-tools");
    let mut sectors: Vec<(u64, Vec<u8>)> = Vec::new();
    let mut at = 0;
    fn take<'a>(rest: &mut &'a [u8], count: usize) -> &'a [u8] {
        let (head, tail) = rest.split_at(count);
        *rest = tail;
        head
    }
    fn number(rest: &mut &[u8]) -> u64 {
        let (mut value, mut shift) = (0, 0);
        loop {
            let byte = take(rest, 1)[0];
            value |= u64::from(byte & 0x7F) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                return value;
            }
        }
    }
    loop {
        match take(&mut rest, 1)[0] {
            0 => {
                let words = number(&mut rest) as usize;
                let mut sector = take(&mut rest, words * 4).to_vec();
                sector.resize(512, 0);
                sectors.push((at, sector));
                at += 1;
            }
            1 => at += number(&mut rest) + 1,
            0x7F => break,
            other => panic!("record {other:#x}"),
        }
    }
    let disk = Rc::new(MemoryDisk::new(at));
    lane::block_on(async {
        for (at, sector) in sectors {
            disk.write(Sector(at), &Segments::new(&sector), Safe::AtNextFlush).await.unwrap();
        }
    });
    disk
}

#[test]
fn vmfs3_reads_as_esx_wrote_it() {
    let Some(path) = std::env::var_os("KAGAMI_VMFS3_IMAGE") else {
        eprintln!("SKIPPED: KAGAMI_VMFS3_IMAGE does not name the test image of vmfs-tools");
        return;
    };
    let disk = unpack(&std::fs::read(path).unwrap());
    assert_eq!(disk.shape().bytes(), 1_258_435_584);
    lane::block_on(async {
        let volume = Volume::open(vec![disk.clone()], Mode::Read).await.unwrap();
        assert_eq!(volume.info().version, 3);
        let mut disks = 0;
        let mut folders = vec![String::new()];
        while let Some(folder) = folders.pop() {
            for entry in volume.list(&folder).await.unwrap() {
                let path = format!("{folder}/{}", entry.name);
                if entry.kind == vmfs::format::InodeKind::Directory {
                    folders.push(path);
                    continue;
                }
                if !entry.name.ends_with("-flat.vmdk") {
                    continue;
                }
                disks += 1;
                let file = volume.open_file(&path).await.unwrap();
                assert_eq!(file.length(), 200 * MIB, "{path}");
                let sectors = 200 * MIB / 512;
                let places = file.locate(Sector(0), sectors, usize::MAX).await.unwrap();
                let sum = |wanted: fn(&Content) -> bool| {
                    places.iter().filter(|p| wanted(&p.content)).map(|p| p.count / 2048).sum::<u64>()
                };
                let tbz = sum(|c| matches!(c, Content::ToBeZeroed { .. }));
                let data = sum(|c| matches!(c, Content::Data { .. }));
                assert_eq!(tbz, entry.to_be_zeroed, "{path}");
                assert_eq!(data + tbz, entry.blocks, "{path}");
                if entry.name.starts_with("zeroedthick") {
                    assert_eq!((data, tbz), (1, 199));
                }
                read(&volume, &file, 0, 64).await;
            }
        }
        assert_eq!(disks, 4);
        assert_eq!(volume.free().await.unwrap().blocks, 350);
    });
}

/// The checker knows VMFS-3: a volume of ESX has nothing but notes, each planted fault is named, and an opening that
/// was not closed is repaired as on VMFS-5.
#[test]
fn vmfs3_is_checked() {
    let Some(path) = std::env::var_os("KAGAMI_VMFS3_IMAGE") else {
        eprintln!("SKIPPED: KAGAMI_VMFS3_IMAGE does not name the test image of vmfs-tools");
        return;
    };
    let genuine = unpack(&std::fs::read(path).unwrap());
    let look = async |disk: &Rc<MemoryDisk>| check(vec![disk.clone()], Options::default()).await.unwrap();
    lane::block_on(async {
        let report = look(&genuine).await;
        assert!(report.is_clean() && !report.cut_short, "{:#?}", report.findings());
        assert_eq!((report.totals.blocks - report.totals.blocks_used, report.totals.files >= 8), (350, true));

        // Faults are planted where the volume says its structures are.
        let volume = Volume::open(vec![genuine.clone()], Mode::Read).await.unwrap();
        // An FD is a lock block that tells its own offset, and metadata with its address.
        let wanted = volume.entry("/thick-flat.vmdk").await.unwrap().fd.0.to_le_bytes();
        let mut found = None;
        let mut bytes = [0; 1024];
        for at in (0..64 * MIB).step_by(512) {
            genuine.read(Sector::at_byte(at), &SegmentsMut::new(&mut bytes)).await.unwrap();
            if bytes[..4] == 0x10C0_0001_u32.to_le_bytes() && bytes[512..516] == wanted {
                found = Some(at);
                break;
            }
        }
        let thick = found.unwrap();
        let faults: [(u64, u32, What); 4] = [
            (thick + 512 + offset_of!(FdMeta, links) as u64, 7, What::LinkCount),
            (thick + 512 + offset_of!(FdMeta, blocks) as u64, 3, What::BlockCount),
            (thick + 1024, 0xFFFF_FFC1, What::BadAddress),
            (thick + 4, 0x1234, What::LockBlock),
        ];
        for (at, value, what) in faults {
            let disk = Rc::new(MemoryDisk::from(genuine.image()));
            let sector = Sector(at / 512);
            let mut bytes = [0; 512];
            disk.read(sector, &SegmentsMut::new(&mut bytes)).await.unwrap();
            bytes[(at % 512) as usize..][..4].copy_from_slice(&value.to_le_bytes());
            disk.write(sector, &Segments::new(&bytes), Safe::AtNextFlush).await.unwrap();
            let report = look(&disk).await;
            let found: Vec<What> = report.findings().iter().map(|finding| finding.what).collect();
            assert!(found.contains(&what), "{what:?} at {at:#x}: {:#?}", report.findings());
        }

        // Not closed: a file replaced, whose old blocks nobody freed any more.
        let disk = Rc::new(MemoryDisk::from(genuine.image()));
        let volume = open(disk.clone()).await;
        volume.write_file("ours", &[1; 9000]).await.unwrap();
        volume.write_file("ours", &[2; 9000]).await.unwrap();
        drop(volume);
        assert_eq!(look(&disk).await.worst(), Some(Severity::Leak));
        let volume = open(disk.clone()).await;
        assert!(volume.leaks_repaired() > Some(0));
        volume.close().await.unwrap();
        assert!(look(&disk).await.is_clean());
    });
}

/// The version that has a second independent reader with a checker: what we write on it is sound to that.
#[test]
fn vmfs3_is_written_too() {
    let Some(path) = std::env::var_os("KAGAMI_VMFS3_IMAGE") else {
        eprintln!("SKIPPED: KAGAMI_VMFS3_IMAGE does not name the test image of vmfs-tools");
        return;
    };
    let disk = unpack(&std::fs::read(path).unwrap());
    let content: Vec<u8> = (0..100_000u32).map(|i| (i / 100) as u8).collect();
    lane::block_on(async {
        let volume = open(disk.clone()).await;
        volume.make_directory("ours").await.unwrap();
        volume.write_file("ours/small", b"small").await.unwrap();
        volume.write_file("ours/large", &content).await.unwrap();
        volume.remove("thick.vmdk").await.unwrap();
        let new = NewFile { length: 300 * MIB, layout: Layout::Thin, grows_to: 0 };
        let file = volume.create_file("ours/thin-flat.vmdk", new).await.unwrap();
        write(&volume, &file, 250 * 2048, &[7; 4096]).await;
        volume.close().await.unwrap();
        assert_eq!(volume.entry("ours/small").await.unwrap().zla, Zla::SubBlocks);
        let again = Volume::open(vec![disk.clone()], Mode::Read).await.unwrap();
        assert_eq!(again.read_file("ours/large", MIB).await.unwrap(), content);
    });
    let image = Image::of(&disk, "vmfs3-written");
    let Some((fine, text)) = run("fsck.vmfs", &[image.0.to_str().unwrap()]) else { return };
    assert!(fine, "{text}");
    // Blocks to be zeroed are "lost" to fsck.vmfs: 199 before we came.
    for counter in [
        "Unallocated blocks : 0",
        "Lost blocks        : 199",
        "Undefined inodes   : 0",
        "Orphaned inodes    : 0",
    ] {
        assert!(text.contains(counter), "{text}");
    }
}
