//! Foreign bytes: a pool whose metadata somebody else wrote, checksums right or wrong. Opening, checking and reading
//! answer with an error or with content; nothing panics, nothing takes more memory than the image explains.

use std::rc::Rc;

use block::{Disk, Extents, Image, MemoryDisk, Pages, Safe, Sector, Segments, SegmentsMut};

use super::golden::golden;
use super::{pattern, seeds};
use crate::{NewLun, Options, Pool};

/// Changes some bytes of one page, often at a field, and makes its checksum right again if it has one.
fn mutate(page: &mut [u8; 4096], random: &mut fastrand::Rng) {
    for _ in 0..random.usize(1..6) {
        let at = if random.bool() { random.usize(0..200) } else { random.usize(0..4096) };
        match random.u8(0..4) {
            0 => page[at] ^= 1 << random.u8(0..8),
            1 => page[at] = random.u8(..),
            _ => {
                let at = at & !7;
                let values = [0, 1, u64::MAX, 1 << 63, random.u64(..), random.u64(0..4096), 1 << 32];
                page[at..at + 8].copy_from_slice(&values[random.usize(0..values.len())].to_le_bytes());
            }
        }
    }
    let (at, length) = match &page[..4] {
        b"KAGA" => (12, 4096),
        b"KGMP" => (4, 4096),
        b"KGMJ" => (4, 64 + u32::from_le_bytes(page[32..36].try_into().unwrap()) as usize),
        _ => return,
    };
    if length <= 4096 && random.u8(0..8) > 0 {
        page[at..at + 4].fill(0);
        let crc = crc32c::crc32c(&page[..length]);
        page[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Does with a pool what a user would.
async fn use_it(pool: &Rc<Pool>) {
    let _ = pool.check().await;
    for lun in pool.luns() {
        let sectors = lun.shape().sectors;
        for at in [0, 8, 69_000, sectors.saturating_sub(8)] {
            let mut bytes = [0; 8 * 512];
            let _ = lun.read(Sector(at), &SegmentsMut::new(&mut bytes)).await;
            let _ = lun.write(Sector(at), &Segments::new(&pattern(8, 1)), Safe::OnReturn).await;
        }
        let mut out = Extents::with_limit(16);
        let _ = lun.status(Sector(0), sectors, None, &mut out).await;
        for snapshot in lun.snapshots().iter().take(4) {
            if let Ok(disk) = lun.open_snapshot(&snapshot.name) {
                let mut bytes = [0; 8 * 512];
                let _ = disk.read(Sector(0), &SegmentsMut::new(&mut bytes)).await;
            }
        }
    }
    let _ = pool.create_lun(NewLun::new("new", 8192)).await;
    for _ in 0..50 {
        if !matches!(pool.tidy_step().await, Ok(true)) {
            break;
        }
    }
    let _ = pool.settle().await;
}

/// Changes some pages of an image.
fn mutated(image: &Image, random: &mut fastrand::Rng) -> Image {
    let (mut numbers, mut next) = (Vec::new(), 0);
    while let Some(number) = image.pages.next_page(next) {
        numbers.push(number);
        next = number + 1;
    }
    let mut pages: Pages = image.pages.clone();
    for _ in 0..random.usize(1..4) {
        let number = numbers[random.usize(0..numbers.len())];
        let mut page = [0; 4096];
        pages.read(number * 4096, &SegmentsMut::new(&mut page));
        mutate(&mut page, random);
        pages.write(number * 4096, &Segments::new(&page));
    }
    Image { sectors: image.sectors, pages }
}

#[test]
fn hostile_metadata_is_refused_or_read_but_never_a_panic() {
    // One medium and few objects, two media and every kind of object.
    let all = [golden("pool-format-1"), golden("pool-format-1-full")];
    for seed in seeds(2000, 60_000) {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut media = all[seed as usize % 2].clone();
        // Most of what counts lies on the first.
        let medium = if random.u8(0..8) == 0 { media.len() - 1 } else { 0 };
        media[medium] = mutated(&media[medium], &mut random);
        let run = std::panic::catch_unwind(|| {
            lane::block_on(async {
                let disks = media.iter().cloned().map(|i| Rc::new(MemoryDisk::from(i)) as Rc<dyn Disk>);
                if let Ok(pool) = Pool::open(disks.collect(), Options::default()).await {
                    use_it(&pool).await;
                }
            });
        });
        assert!(run.is_ok(), "KAGAMI_SEED={seed}");
    }
}
