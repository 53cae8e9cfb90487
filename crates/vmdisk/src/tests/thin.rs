//! Thin disks give whole blocks back when the guest unmaps them, and nobody ever sees what comes into them next.

use std::cell::Cell;
use std::time::Duration;

use block::decorate::{Decorated, Delay, Operation};
use block::{DiskError, MemoryDisk};
use vmfs::{NewVolume, Volume};

use super::*;
use crate::VmfsFolder;
use crate::create::create_flat;

const MIB: u64 = (1 << 20) / SECTOR_BYTES;

async fn fresh() -> Rc<MemoryDisk> {
    let disk = Rc::new(MemoryDisk::new(1024 * MIB));
    let when = std::time::UNIX_EPOCH + Duration::from_secs(1_760_000_000);
    vmfs::create(vec![disk.clone()], &NewVolume::new("thin", 1, when)).await.unwrap();
    disk
}

async fn disk_on(folder: &Rc<VmfsFolder>, path: &str, sectors: u64, provision: Provision) -> Rc<VmDisk> {
    let dynamic = Rc::clone(folder) as Rc<dyn Folder>;
    create_flat(&dynamic, path, sectors, provision).await.unwrap();
    VmDisk::open(dynamic, path, Open::WRITE, &()).await.unwrap()
}

#[test]
fn whole_blocks_that_are_unmapped_go_back_to_the_volume() {
    lane::block_on(async {
        let medium = fresh().await;
        let volume = Volume::open(vec![medium.clone()], vmfs::Mode::Write).await.unwrap();
        let folder = VmfsFolder::new(volume.clone());
        let free = async || {
            volume.settle().await.unwrap();
            volume.free().await.unwrap().blocks
        };
        for (provision, given_back) in [(Provision::Thin, true), (Provision::LazyZeroed, false)] {
            let path = format!("/{given_back}.vmdk");
            let disk = disk_on(&folder, &path, 64 * MIB, provision).await;
            write(&*disk, 0, &vec![7; 40 << 20]).await;
            let full = free().await;
            // From the middle of block 9 to the middle of block 30: 20 whole blocks.
            disk.unmap(Sector(9 * MIB + 1000), 21 * MIB).await.unwrap();
            disk.flush().await.unwrap();
            assert_eq!(free().await, full + if given_back { 20 } else { 0 }, "{provision:?}");
            let all = read(&*disk, 0, 64 * MIB).await;
            let (from, to) = (10 << 20, 30 << 20);
            assert!(
                all[..9 << 20].iter().all(|b| *b == 7) && all[31 << 20..40 << 20].iter().all(|b| *b == 7)
            );
            assert!(!given_back || all[from..to].iter().all(|b| *b == 0));
            // Written again it takes room again; zeroing that may free gives it back as unmapping does.
            write(&*disk, 12 * MIB + 3, &[8; UNIT]).await;
            let again = read(&*disk, 12 * MIB, 8).await;
            assert_eq!((again[3 * UNIT], given_back && again[2 * UNIT] != 0), (8, false));
            disk.zero(Sector(12 * MIB), MIB, true).await.unwrap();
            disk.zero(Sector(35 * MIB), MIB, false).await.unwrap();
            disk.flush().await.unwrap();
            assert_eq!(free().await, full + if given_back { 20 } else { 0 });
            assert!(read(&*disk, 12 * MIB, MIB).await.iter().all(|b| *b == 0));
            disk.close().await.unwrap();
        }
        volume.close().await.unwrap();
        let report = vmfs::check(vec![medium], vmfs::check::Options::default()).await.unwrap();
        assert!(report.findings().is_empty(), "{:#?}", report.findings());
    });
}

/// What a sector of a disk holds: nothing, or its disk, its number, and a count.
fn stamp(disk: u64, sector: u64, count: u64) -> [u8; UNIT] {
    let mut out = [0; UNIT];
    for (piece, number) in out.chunks_exact_mut(8).zip([disk + 1, sector, count].into_iter().cycle()) {
        piece.copy_from_slice(&number.to_le_bytes());
    }
    out
}

fn check_sector(found: &[u8], disk: u64, sector: u64) {
    let count = u64::from_le_bytes(found[16..24].try_into().unwrap());
    let fine = found.iter().all(|b| *b == 0) || found == stamp(disk, sector, count);
    assert!(fine, "disk {disk} sector {sector} reads as {:?}", &found[..24]);
}

/// Two disks write and unmap the same few blocks of a nearly full volume while both are read: a reader sees its own
/// disk's content or zeroes, whatever the other disk puts into blocks that were given back meanwhile.
fn two_disks(seed: u64) {
    const BLOCKS: u64 = 6;
    let driver = lane::DriverKind::Sim { seed };
    lane::block_on_with(lane::Options { driver, ..lane::Options::default() }, async move {
        // Now and then an operation takes so long that a block could have gone from one disk to the other meanwhile.
        let slow = Delay(Box::new(|operation| {
            let slowly = matches!(operation, Operation::Read | Operation::Write) && lane::sim::draw(16) == 0;
            Duration::from_micros(20 + lane::sim::draw(if slowly { 60_000 } else { 400 }))
        }));
        let medium = fresh().await;
        let volume =
            Volume::open(vec![Decorated::new(medium.clone(), slow)], vmfs::Mode::Write).await.unwrap();
        let folder = VmfsFolder::new(volume.clone());
        // Few blocks are left, so that what one disk gives back the other one takes.
        let left = volume.free().await.unwrap().blocks;
        let filler = disk_on(&folder, "/filler.vmdk", (left - 9) * MIB, Provision::LazyZeroed).await;
        let stop = Rc::new(Cell::new(false));
        let mut tasks = Vec::new();
        let mut disks = Vec::new();
        for number in 0..2u64 {
            let disk = disk_on(&folder, &format!("/d{number}.vmdk"), BLOCKS * MIB, Provision::Thin).await;
            disks.push(Rc::clone(&disk));
            for reader in 0..3 {
                let (disk, stop) = (Rc::clone(&disk), Rc::clone(&stop));
                tasks.push(lane::spawn(async move {
                    let mut random = fastrand::Rng::with_seed(seed * 8 + number * 4 + reader);
                    while !stop.get() {
                        let at = random.u64(0..BLOCKS) * MIB + random.u64(0..8);
                        let found = read(&*disk, at, 4).await;
                        for (index, sector) in found.chunks_exact(UNIT).enumerate() {
                            check_sector(sector, number, at + index as u64);
                        }
                        // Holes are read without waiting for anything.
                        lane::sleep(Duration::from_micros(random.u64(0..100))).await;
                    }
                }));
            }
            let stop = Rc::clone(&stop);
            tasks.push(lane::spawn(async move {
                let mut random = fastrand::Rng::with_seed(seed * 8 + number * 4 + 3);
                let mut model = vec![[0; UNIT]; (BLOCKS * 8) as usize];
                for count in 1..300 {
                    let (block, sector) = (random.u64(0..BLOCKS), random.u64(0..8));
                    let at = block * MIB + sector;
                    if random.u8(0..3) == 0 {
                        disk.unmap(Sector(block * MIB), MIB).await.unwrap();
                        model[block as usize * 8..][..8].fill([0; UNIT]);
                    } else {
                        let bytes = stamp(number, at, count);
                        match disk.write(Sector(at), &Segments::new(&bytes), Safe::AtNextFlush).await {
                            Ok(()) => model[(block * 8 + sector) as usize] = bytes,
                            Err(DiskError::NoSpace) => {}
                            Err(error) => panic!("{error}"),
                        }
                    }
                    if random.u8(0..20) == 0 {
                        disk.flush().await.unwrap();
                    }
                }
                disk.flush().await.unwrap();
                for block in 0..BLOCKS {
                    let found = read(&*disk, block * MIB, 8).await;
                    let expected = model[block as usize * 8..][..8].as_flattened();
                    assert!(found == expected, "KAGAMI_SEED={seed}: disk {number} block {block}");
                }
                stop.set(true);
            }));
        }
        for task in tasks {
            task.await;
        }
        for disk in disks.iter().chain([&filler]) {
            disk.close().await.unwrap();
        }
        volume.close().await.unwrap();
        let report = vmfs::check(vec![medium], vmfs::check::Options::default()).await.unwrap();
        assert!(report.findings().is_empty(), "KAGAMI_SEED={seed}: {:#?}", report.findings());
    });
}

#[test]
fn soak_a_block_given_back_is_never_seen_through_its_old_disk() {
    seeds(4, 200).into_iter().for_each(two_disks);
}
