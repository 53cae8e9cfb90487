//! Volumes of our own for tests: made small, written, checked.

use std::rc::Rc;
use std::time::{Duration, UNIX_EPOCH};

use block::{Disk, MemoryDisk, SECTOR_BYTES, Safe, Sector, Segments, SegmentsMut};
use vmfs::check::{Options, Report, Severity};
use vmfs::{Content, File, Mode, NewVolume, Volume, create};

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// A fresh VMFS-5 volume of `bytes` bytes in memory.
pub async fn fresh(bytes: u64) -> Rc<MemoryDisk> {
    let disk = Rc::new(MemoryDisk::new(bytes / SECTOR_BYTES));
    let new = NewVolume::new("ours", 1, UNIX_EPOCH + Duration::from_secs(1_760_000_000));
    create(vec![disk.clone()], &new).await.unwrap();
    disk
}

pub async fn open(disk: Rc<dyn Disk>) -> Volume {
    Volume::open(vec![disk], Mode::Write).await.unwrap()
}

pub async fn check(disk: Rc<dyn Disk>) -> Report {
    vmfs::check(vec![disk], Options::default()).await.unwrap()
}

/// Nothing to find but notes.
pub async fn assert_clean(disk: Rc<dyn Disk>) {
    let report = check(disk).await;
    assert!(report.worst().is_none_or(|w| w <= Severity::Note), "{:#?}", report.findings());
}

/// Writes as callers do: allocate, write the places, commit.
pub async fn write(volume: &Volume, file: &File, at: u64, bytes: &[u8]) {
    let count = bytes.len() as u64 / SECTOR_BYTES;
    let allocation = file.allocate(Sector(at), count).await.unwrap();
    for place in allocation.places() {
        let Content::Data { device, at: to } = place.content else { panic!("no place for data: {place:?}") };
        let start = ((place.at.0 - at) * SECTOR_BYTES) as usize;
        let part = &bytes[start..start + (place.count * SECTOR_BYTES) as usize];
        let device = &volume.space().devices()[device];
        device.write(to, &Segments::new(part), Safe::AtNextFlush).await.unwrap();
    }
    allocation.commit().unwrap();
}

/// Reads as callers do: locate, read the places.
pub async fn read(volume: &Volume, file: &File, at: u64, count: u64) -> Vec<u8> {
    let mut out = vec![0xEE; (count * SECTOR_BYTES) as usize];
    let mut done = 0;
    while done < count {
        for place in file.locate(Sector(at + done), count - done, 16).await.unwrap() {
            let start = (done * SECTOR_BYTES) as usize;
            let part = &mut out[start..start + (place.count * SECTOR_BYTES) as usize];
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
