//! Hostile volumes: bytes of the metadata are changed at random; everything is walked, then written. No panic, no
//! endless work, no more memory than a volume deserves. `KAGAMI_SEED=N` replays one, `KAGAMI_SOAK=1` runs many.

#![allow(clippy::unwrap_used)] // a test that cannot go on panics

use std::rc::Rc;
use std::time::{Duration, Instant};

use block::{Disk, MemoryDisk, Safe, Sector, Segments, SegmentsMut};
use vmfs::fuzz::{Template, fuzz_structures, fuzz_volume, use_volume};

const CORPORA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz");

async fn mutate(disk: &MemoryDisk, sectors: &[Vec<u64>; 2], random: &mut fastrand::Rng) {
    for _ in 0..random.usize(1..5) {
        let sectors = &sectors[usize::from(random.u8(..8) != 0)];
        let sector = Sector(sectors[random.usize(..sectors.len())]);
        let mut bytes = [0; 512];
        disk.read(sector, &SegmentsMut::new(&mut bytes)).await.unwrap();
        for _ in 0..random.usize(1..7) {
            // The heads of structures hold the interesting fields.
            let at = if random.bool() { random.usize(..0x90) } else { random.usize(..512) };
            bytes[at] = match random.u8(..4) {
                0 => 0,
                1 => 0xFF,
                2 => bytes[at] ^ 1 << random.u8(..8),
                _ => random.u8(..),
            };
        }
        disk.write(sector, &Segments::new(&bytes), Safe::AtNextFlush).await.unwrap();
    }
}

#[test]
fn fuzz_volumes_are_walked_and_written_without_panic() {
    lane::block_on(async {
        let template = Template::new().await.unwrap();
        let one = std::env::var("KAGAMI_SEED").ok().and_then(|s| s.parse::<u64>().ok());
        let soak = std::env::var_os("KAGAMI_SOAK").is_some();
        let seeds = match one {
            Some(seed) => seed..seed + 1,
            None if soak => 1..20_000,
            None => 1..600,
        };
        let (mut opened, mut written) = (0, 0);
        for seed in seeds {
            let disk = Rc::new(MemoryDisk::from(template.image.clone()));
            mutate(&disk, &template.sectors, &mut fastrand::Rng::with_seed(seed)).await;
            let begun = Instant::now();
            let (read, changed) = use_volume(&disk).await;
            opened += u32::from(read);
            written += u32::from(changed);
            assert!(begun.elapsed() < Duration::from_secs(10), "KAGAMI_SEED={seed} takes too long");
        }
        assert!(one.is_some() || (opened > 100 && written > 100), "{opened} opened, {written} written");
    });
}

#[test]
fn fuzz_corpora_replay() {
    block::fuzz::replay(CORPORA, "vmfs_volume", 8, fuzz_volume);
    block::fuzz::replay(CORPORA, "vmfs_structures", 8, fuzz_structures);
}
