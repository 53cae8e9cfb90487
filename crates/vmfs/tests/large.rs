//! The largest volume is written to its last block, and read there by others.

#![allow(clippy::unwrap_used)] // a test that cannot go on panics

mod common;

use std::rc::Rc;

use block::{MemoryDisk, Sector};
use common::datastore::{MIB, assert_clean, fresh, open, read, write};
use common::outside::{Image, debugvmfs, dissect};
use vmfs::{Content, Error, File, Layout, NewFile, Volume};

const LARGEST: u64 = 16 << 40;
/// What a file on ext4 can be; as many extents as the largest, but for one.
const IN_A_FILE: u64 = (16 << 40) - (16 << 20);
/// Blocks that the first file leaves.
const LEFT: u64 = 40;

fn of(mib: u64) -> Vec<u8> {
    vec![1 + mib as u8; 4096]
}

/// The sector of a file behind which the piece ends that lies at the end of the volume.
async fn before_end(volume: &Volume, file: &File) -> u64 {
    let end = 0x110_0000 + volume.info().blocks * MIB;
    let mut at = 0;
    while at < file.length() / 512 {
        for place in file.locate(Sector(at), file.length() / 512 - at, 4096).await.unwrap() {
            at = place.at.0 + place.count;
            if let Content::ToBeZeroed { at: on, .. } = place.content
                && on.plus(place.count).bytes() == end
            {
                return at;
            }
        }
    }
    panic!("the last block of the volume is in use")
}

/// Every block gets an owner: all but a few go to one thick disk. The last block of the volume gets data; answers the
/// sector of the thick disk behind it.
async fn fill(volume: &Volume) -> u64 {
    let free = volume.free().await.unwrap().blocks;
    let length = (free - LEFT) * MIB;
    let thick = NewFile { length, layout: Layout::LazyZeroed, grows_to: 0 };
    let thick = volume.create_file("thick", thick).await.unwrap();
    assert_eq!((thick.units_allocated(), thick.units_to_be_zeroed()), (free - LEFT, free - LEFT));
    let thin = NewFile { length: 2 * LEFT * MIB, layout: Layout::Thin, grows_to: 0 };
    let last = volume.create_file("last", thin).await.unwrap();
    for mib in 0..LEFT {
        write(volume, &last, mib * 2 * 2048 + 8, &of(mib)).await;
    }
    let more = last.allocate(Sector(2048), 8).await.err().unwrap();
    assert!(matches!(more, Error::NoSpace { .. }), "{more}");
    let end = before_end(volume, &thick).await;
    write(volume, &thick, end - 8, &of(77)).await;
    volume.settle().await.unwrap();
    assert_eq!(volume.free().await.unwrap().blocks, 0);
    end
}

async fn holds_what_was_written(disk: Rc<MemoryDisk>, end: u64) {
    let volume = open(disk).await;
    let last = volume.open_file("last").await.unwrap();
    for mib in 0..LEFT {
        assert_eq!(read(&volume, &last, mib * 2 * 2048 + 8, 8).await, of(mib), "MiB {mib}");
        assert_eq!(read(&volume, &last, mib * 2 * 2048, 8).await, [0; 4096], "before MiB {mib}");
    }
    let thick = volume.open_file("thick").await.unwrap();
    assert_eq!(read(&volume, &thick, end - 16, 16).await, [vec![0; 4096], of(77)].concat());
}

#[test]
fn a_volume_of_16_tib_is_written_to_its_last_block() {
    lane::block_on(async {
        let disk = fresh(LARGEST).await;
        let volume = open(disk.clone()).await;
        let before = volume.free().await.unwrap();
        let end = fill(&volume).await;
        volume.close().await.unwrap();
        drop(volume);
        assert_clean(disk.clone()).await;
        holds_what_was_written(disk.clone(), end).await;
        // And all of it comes back.
        let volume = open(disk.clone()).await;
        volume.remove("thick").await.unwrap();
        volume.remove("last").await.unwrap();
        volume.settle().await.unwrap();
        assert_eq!(volume.free().await.unwrap(), before);
        assert_clean(disk).await;
    });
}

#[test]
fn others_read_the_last_blocks_of_a_large_volume() {
    let (disk, thick, end) = lane::block_on(async {
        let disk = fresh(IN_A_FILE).await;
        let volume = open(disk.clone()).await;
        let end = fill(&volume).await;
        let thick = volume.entry("thick").await.unwrap().length;
        volume.close().await.unwrap();
        (disk, thick, end * 512)
    });
    let image = Image::of(&disk, "large");
    let script = format!(
        "last, thick = vmfs.get('/last'), vmfs.get('/thick')\n\
         print(last.size, thick.size, last.metadata.numBlocks)\n\
         f = last.open()\n\
         for mib in range(0, {LEFT}):\n\
         \x20   f.seek(mib * 2 * 2**20 + 4096)\n\
         \x20   assert f.read(4096) == bytes([1 + mib]) * 4096, mib\n\
         f = thick.open()\n\
         f.seek({end} - 8192)\n\
         assert f.read(8192) == bytes(4096) + bytes([78]) * 4096\n"
    );
    if let Some(out) = dissect(&image, &script) {
        assert_eq!(out.trim(), format!("{} {thick} {LEFT}", 2 * LEFT * MIB));
    }
    let Some(bitmaps) = debugvmfs(&image, &["check_vol_bitmaps"]) else { return };
    assert!(bitmaps.contains("Total errors: 0"), "{bitmaps}");
    let cat = std::process::Command::new("/usr/sbin/debugvmfs").arg(&image.0).args(["cat", "/last"]).output();
    let content = cat.unwrap().stdout;
    assert_eq!(content.len() as u64, 2 * LEFT * MIB);
    for mib in 0..LEFT {
        let at = (mib * 2 * MIB + 4096) as usize;
        assert!(content[at..at + 4096] == of(mib), "MiB {mib}");
    }
}
