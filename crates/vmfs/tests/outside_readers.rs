//! What we format is read by programs that are not ours.

#![allow(clippy::unwrap_used)] // a test that cannot go on panics

mod common;

use std::rc::Rc;
use std::time::{Duration, UNIX_EPOCH};

use block::MemoryDisk;
use common::outside::{Image, debugvmfs, dissect, run};
use vmfs::{NewVolume, create};

const GIB: u64 = 1 << 30;
/// The largest is what a file on ext4 can be; it has as many extents as 16 TiB.
const SIZES: [u64; 6] = [768 << 20, GIB, 2 * GIB, 64 * GIB, (5 * GIB) << 9, (16 << 40) - (16 << 20)];
const ROOT: [&str; 9] =
    [".", "..", ".fbb.sf", ".fdc.sf", ".pbc.sf", ".sbc.sf", ".vh.sf", ".pb2.sf", ".sdd.sf"];

/// A volume and its number of blocks.
fn fresh(bytes: u64) -> (Rc<MemoryDisk>, u64) {
    let disk = Rc::new(MemoryDisk::new(bytes / 512));
    let new = NewVolume::new("outside", 1, UNIX_EPOCH + Duration::from_secs(1_760_000_000));
    let made = common::at_once(create(vec![disk.clone()], &new)).unwrap();
    (disk, made.bytes >> 20)
}

/// What `fsck.vmfs` counts: all of it has to be zero.
fn fsck(image: &Image) -> Option<String> {
    let (fine, text) = run("fsck.vmfs", &[image.0.to_str().unwrap()])?;
    assert!(fine, "fsck.vmfs: {text}");
    Some(text)
}

#[test]
fn vmfs_tools_read_fresh_volumes() {
    for bytes in SIZES {
        let (disk, blocks) = fresh(bytes);
        let image = Image::of(&disk, &format!("tools-{bytes}"));
        let Some(space) = debugvmfs(&image, &["df"]) else { return };
        assert!(space.contains(&format!("Total blocks     : {blocks}\n")), "{space}");
        let list = debugvmfs(&image, &["ls", "/"]).unwrap();
        assert_eq!(list.split_whitespace().collect::<Vec<_>>(), ROOT);
        let bitmaps = debugvmfs(&image, &["check_vol_bitmaps"]).unwrap();
        assert!(bitmaps.contains("Total errors: 0"), "{bitmaps}");
        let counters = fsck(&image).unwrap();
        for line in ["Unallocated blocks : 0", "Lost blocks        : 0", "Undefined inodes   : 0"] {
            assert!(counters.contains(line), "{bytes}: {counters}");
        }
        for line in ["Inodes         : 8", "Orphaned inodes    : 0", "Directory errors   : 0"] {
            assert!(counters.contains(line), "{bytes}: {counters}");
        }
    }
}

#[test]
fn dissect_reads_fresh_volumes() {
    let script = "root = vmfs.get('/')\nprint(vmfs.label, vmfs.is_vmfs5, vmfs.file_block_size, *[e.name for e in root.iterdir()])";
    for bytes in SIZES {
        let (disk, _) = fresh(bytes);
        let image = Image::of(&disk, &format!("dissect-{bytes}"));
        let Some(out) = dissect(&image, script) else { return };
        assert_eq!(out.trim(), format!("outside True 1048576 {}", ROOT.join(" ")));
    }
}
