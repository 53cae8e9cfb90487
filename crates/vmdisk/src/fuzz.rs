//! Entries of the fuzz targets: any answer to hostile bytes is right, a panic is not.

use std::rc::Rc;

use block::{Disk, Extents, MemoryDisk, SECTOR_BYTES, Safe, Sector, Segments, SegmentsMut};
use zerocopy::FromBytes;

use crate::descriptor::{Cid, Descriptor};
use crate::file::GrowingFile;
use crate::redo::RedoDisk;
use crate::redo::format::{Header, MAX_CAPACITY, TABLE_ENTRIES};
use crate::sesparse::format::{ConstHeader, GRAIN_SECTORS};
use crate::sesparse::{SeSparseDisk, format};

/// Reads bytes as a descriptor; what is read is written alike, and stays a descriptor when it is changed (R9).
pub fn fuzz_descriptor(input: &[u8]) {
    let Ok(mut descriptor) = Descriptor::parse(input) else { return };
    assert_eq!(descriptor.to_bytes(), input, "an unchanged descriptor is written as it was read");
    let _ = (descriptor.parent_hint(), descriptor.sectors(), descriptor.create_type().extent_kind());
    let _ = crate::rdm::Identity::from_ddb(&descriptor);
    descriptor.set_cid(Cid(0x1234_5678));
    let extent = descriptor.extents().first().cloned();
    if descriptor.set_ddb("ddb.kagami.fuzz", "x").is_ok()
        && extent.is_none_or(|extent| descriptor.set_extent(0, extent).is_ok())
    {
        let again = Descriptor::parse(&descriptor.to_bytes());
        assert!(again.is_ok_and(|d| d.cid() == Cid(0x1234_5678)), "what was changed is read again");
    }
}

/// Bytes as a disk, filled up to a whole sector.
fn disk_of(bytes: &[u8]) -> MemoryDisk {
    let mut whole = bytes.to_vec();
    whole.resize(bytes.len().next_multiple_of(SECTOR_BYTES as usize).max(SECTOR_BYTES as usize), 0);
    MemoryDisk::from_bytes(&whole)
}

/// Reads (and with `write` writes) here and there, and asks for the status of the beginning.
async fn use_it(disk: &dyn Disk, table: u64, write: bool) {
    let sectors = disk.shape().sectors;
    for at in [0, 7, table - 1, sectors / 2, sectors.saturating_sub(1)] {
        let count = sectors.saturating_sub(at).min(64);
        let mut bytes = vec![0; (count * SECTOR_BYTES) as usize];
        let _ = disk.read(Sector(at), &SegmentsMut::new(&mut bytes)).await;
        if write {
            let _ = disk.write(Sector(at), &Segments::new(&bytes), Safe::AtNextFlush).await;
        }
    }
    let mut out = Extents::with_limit(256);
    let _ = disk.status(Sector(0), sectors.min(4 * table), None, &mut out).await;
    let _ = disk.flush().await;
}

/// Opens bytes as a COWD redo log, reads and writes through it.
pub fn fuzz_cowd(input: &[u8]) {
    lane::block_on(async {
        let capacity = Header::read_from_prefix(input).map_or(1, |(header, _)| header.capacity.get().into());
        let below: Rc<dyn Disk> = Rc::new(MemoryDisk::new(std::cmp::Ord::clamp(capacity, 1, MAX_CAPACITY)));
        for read_only in [true, false] {
            let file: Rc<dyn GrowingFile> = Rc::new(disk_of(input));
            let Ok(disk) = RedoDisk::open(file, Rc::clone(&below), read_only, false).await else { return };
            let _ = disk.next_held(Sector(0), Sector(capacity.min(1 << 20))).await;
            use_it(&*disk, TABLE_ENTRIES, !read_only).await;
            let _ = disk.close().await;
        }
    });
}

/// Opens bytes as an SEsparse redo log and reads through it.
pub fn fuzz_sesparse(input: &[u8]) {
    lane::block_on(async {
        let capacity = ConstHeader::read_from_prefix(input).map_or(1, |(header, _)| header.capacity.get());
        let below: Rc<dyn Disk> = Rc::new(MemoryDisk::new(capacity.clamp(1, format::MAX_CAPACITY)));
        let Ok(disk) = SeSparseDisk::open(Rc::new(disk_of(input)), below).await else { return };
        use_it(&*disk, GRAIN_SECTORS * format::TABLE_ENTRIES, false).await;
    });
}
