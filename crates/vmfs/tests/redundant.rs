//! Every field that says something a second time: change a bit of it and the checker notices.

#![allow(clippy::unwrap_used)] // a test that cannot go on panics

mod common;

use std::rc::Rc;
use std::time::{Duration, UNIX_EPOCH};

use block::{Disk, MemoryDisk};
use common::editor::Editor;
use vmfs::check::{Options, Severity};
use vmfs::format::{FdAddress, SystemFile};
use vmfs::{NewVolume, check, create};

/// Where the volume begins on the device.
const DATA_AT: u64 = 0x110_0000;

/// Offsets and lengths of the fields of a structure.
type Fields = &'static [(u64, u64)];

/// Magic, block size, volumes, extents, last extent, data offset, maps, next region.
const LVM_HEADER: Fields =
    &[(0, 4), (0x5A, 4), (0x66, 4), (0x6A, 4), (0x6E, 4), (0x7A, 8), (0xBE, 4), (0xC2, 8)];
/// Size, generation, state, uuid, index, units, first and last unit, devices.
const VOLUME: Fields =
    &[(0, 8), (8, 8), (0x10, 4), (0x54, 16), (0x70, 4), (0x74, 4), (0x78, 8), (0x80, 8), (0x90, 4)];
/// Used, number, volume, places, length.
const EXTENT: Fields = &[(0, 1), (1, 4), (5, 4), (9, 8), (17, 8), (25, 8)];
/// Magic, version, disk block size, block size, uuid and snapshot id of the volume, group offset, clusters, sub-block
/// size, places and addresses of .pb2.sf and .sdd.sf.
const FILE_SYSTEM: Fields = &[
    (0, 4),
    (4, 4),
    (0x9D, 4),
    (0xA1, 8),
    (0xB1, 16),
    (0xC1, 4),
    (0xD1, 4),
    (0xD5, 4),
    (0xD9, 4),
    (0xE1, 8),
    (0xE9, 4),
    (0x105, 8),
    (0x10D, 4),
];
/// State and own offset.
const HEARTBEAT: Fields = &[(0, 4), (4, 8)];
/// All but the hint of a reader.
const RESOURCE_HEADER: Fields =
    &[(0, 4), (4, 4), (8, 4), (0xC, 4), (0x10, 4), (0x14, 4), (0x18, 4), (0x1C, 4)];
/// Kind, own offset, mode, holder.
const LOCK: Fields = &[(0, 4), (4, 8), (0x24, 4), (0x28, 16)];
/// Number, total, free count, bitmap with what is behind its end.
const CLUSTER: Fields = &[(0, 4), (4, 4), (8, 4), (0x10, 64)];
/// Own address, generation, links, type, length, block size, blocks, ZLA, to-be-zeroed and copy-on-write counts, own
/// address again, shift.
const DESCRIPTOR: Fields = &[
    (0, 4),
    (4, 4),
    (8, 4),
    (0xC, 4),
    (0x14, 8),
    (0x1C, 8),
    (0x24, 8),
    (0x44, 4),
    (0x48, 4),
    (0x4C, 4),
    (0x54, 4),
    (0x58, 4),
    (0x68, 4),
    (0x89, 1),
];
/// Type, address, generation. (A name stands alone.)
const ENTRY: Fields = &[(0, 4), (4, 4), (8, 4)];

#[test]
fn a_bit_changed_in_a_redundant_field_is_noticed() {
    let disk = Rc::new(MemoryDisk::new((768 << 20) / 512));
    let new = NewVolume::new("test", 1, UNIX_EPOCH + Duration::from_secs(1_760_000_000));
    common::at_once(create(vec![disk.clone()], &new)).unwrap();
    let base = Editor::new(disk);
    let at = |volume_offset: u64| DATA_AT + volume_offset;
    let fbb = at(base.cluster_at(SystemFile::FileBlocks, 1));
    let places: &[(&str, u64, Fields)] = &[
        ("LVM header", 0x10_0000, LVM_HEADER),
        ("volume descriptor", 0x10_0200, VOLUME),
        ("extent bitmap", 0x18_0200, &[(0, 2)]),
        ("extent", 0x18_0680, EXTENT),
        ("unused extent", 0x18_0700, &[(0, 1)]),
        ("file system descriptor", at(0x20_0000), FILE_SYSTEM),
        ("heartbeat", at(0x30_0200), HEARTBEAT),
        (".fbb.sf header", at(base.header_at(SystemFile::FileBlocks)), RESOURCE_HEADER),
        (".fdc.sf header", at(base.header_at(SystemFile::Descriptors)), RESOURCE_HEADER),
        (".pbc.sf header", at(base.header_at(SystemFile::PointerBlocks)), RESOURCE_HEADER),
        (".sbc.sf header", at(base.header_at(SystemFile::SubBlocks)), RESOURCE_HEADER),
        (".pb2.sf header", at(base.header_at(SystemFile::PointerBlocks2)), RESOURCE_HEADER),
        ("cluster lock", fbb, LOCK),
        ("cluster", fbb + 512, CLUSTER),
        ("descriptor lock", at(base.fd_at(SystemFile::SubBlocks.fd())), LOCK),
        ("descriptor of .sbc.sf", at(base.fd_at(SystemFile::SubBlocks.fd())) + 512, DESCRIPTOR),
        ("block list of .sbc.sf", at(base.fd_at(SystemFile::SubBlocks.fd())) + 1024, &[(0, 8)]),
        ("descriptor of the root", at(base.fd_at(FdAddress::ROOT)) + 512, DESCRIPTOR),
        ("entry", at(base.entry_at(FdAddress::ROOT, 4)), ENTRY),
        ("entry of itself", at(base.entry_at(FdAddress::ROOT, 0)), ENTRY),
        ("entry of the directory above", at(base.entry_at(FdAddress::ROOT, 1)), ENTRY),
    ];
    let mut missed = Vec::new();
    for (name, start, fields) in places {
        for (offset, length) in *fields {
            // The lowest and the highest bit and some between; all would take minutes.
            for bit in [0, 1, 5, 6, length * 4 - 1, length * 4, length * 8 - 2, length * 8 - 1] {
                let volume = base.fork();
                let byte = start + offset + bit / 8;
                let old = volume.device_bytes(byte, 1)[0];
                volume.put_device_bytes(byte, &[old ^ 1 << (bit % 8)]);
                let disk: Rc<dyn Disk> = volume.disk.clone();
                let noticed = match common::at_once(check(vec![disk], Options::default())) {
                    Ok(report) => report.worst() >= Some(Severity::Leak),
                    Err(_) => true,
                };
                if !noticed {
                    missed.push(format!("{name}: bit {bit} of the field at {offset:#x}"));
                }
            }
        }
    }
    assert_eq!(missed, Vec::<String>::new());
}
