//! Random histories: several disks that change, grow and shrink, tracked or not, backups that come and go, prunes.
//! Every backup that is there restores to what the disk was.
#![allow(clippy::unwrap_used)] // a test says by it what must hold

mod common;

use std::collections::BTreeMap;
use std::rc::Rc;

use backup::{BackupId, Depth, Options, Progress, Repository, Trust};
use block::{Disk, MemoryDisk, Safe, Sector, Segments, SegmentsMut};
use common::{Noise, Scratch, TrackedDisk, plan, source};
use lane::DriverKind;

fn change(noise: &mut Noise, disk: &TrackedDisk) {
    let blocks = disk.shape().sectors.div_ceil(8);
    let at = noise.below(blocks);
    let room = (blocks - at).min(1 + noise.below(200));
    match noise.below(8) {
        0 => disk.clear(at, room),
        1 => disk.put(at, &vec![0; room as usize * 4096]),
        2 => disk.put(at, &noise.text(room as usize * 4096)),
        3 => disk.put(at, &[noise.next() as u8; 4096]),
        4 => disk.resize((blocks * 8 + noise.below(4000)).saturating_sub(noise.below(4000)).max(1)),
        _ => {
            for _ in 0..noise.below(12) {
                disk.put(noise.below(blocks), &noise.bytes(4096));
            }
        }
    }
}

async fn read_parts(disk: &dyn Disk, noise: &mut Noise, expected: &[u8]) {
    for _ in 0..6 {
        let from = noise.below(disk.shape().sectors);
        let count = (disk.shape().sectors - from).min(1 + noise.below(700));
        let mut bytes = vec![1; count as usize * 512];
        disk.read(Sector(from), &SegmentsMut::new(&mut bytes)).await.unwrap();
        assert!(
            bytes == expected[from as usize * 512..(from + count) as usize * 512],
            "sectors {from}+{count}"
        );
    }
}

/// A seed given from outside runs alone.
fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("KAGAMI_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (0..count).collect(),
    }
}

fn history(seed: u64, driver: DriverKind) {
    let scratch = Scratch::new(&format!("model-{driver:?}-{seed}"));
    let run = lane::Options { driver, ..lane::Options::default() };
    let mut noise = Noise::new(seed);
    let options = || Options { pack_bytes: Some(64 << 10), pending_entries: Some(40), ..Options::default() };
    let mut repository = Repository::create(&scratch.join("repo"), options()).unwrap();
    let disks: Vec<_> = (0..1 + noise.below(3)).map(|n| TrackedDisk::new(1000 + 3000 * n)).collect();
    let mut kept: BTreeMap<BackupId, Vec<Vec<u8>>> = BTreeMap::new();
    for _ in 0..30 {
        match noise.below(10) {
            0..4 => disks.iter().for_each(|d| change(&mut noise, d)),
            4..7 => {
                let base = kept.keys().last().copied().filter(|_| noise.below(4) > 0);
                let sources = disks.iter().enumerate().map(|(n, disk)| {
                    let cut = disk.cut();
                    let mut source = source(&format!("d{n}"), disk.freeze() as _, Some(cut));
                    source.trust = if noise.below(5) == 0 { Trust::Never } else { Trust::Unless };
                    source
                });
                let plan = plan(sources.collect(), base);
                let sealed =
                    lane::block_on_with(run.clone(), repository.backup(plan, &Progress::new())).unwrap();
                kept.insert(sealed.id, disks.iter().map(|d| d.to_bytes()).collect());
            }
            7 => {
                let gone = kept.keys().nth(noise.below(kept.len() as u64 + 1) as usize).copied();
                if let Some(id) = gone {
                    repository.remove(id).unwrap();
                    kept.remove(&id);
                }
            }
            8 => drop(repository.prune(false, &Progress::new()).unwrap()),
            _ => repository = Repository::open(&scratch.join("repo"), options()).unwrap(),
        }
        let listed: Vec<_> = repository.list().unwrap().iter().map(|l| l.id).collect();
        assert!(listed.iter().eq(kept.keys()));
    }
    assert!(repository.check(Depth::Deep, &Progress::new()).unwrap().is_clean());
    for (id, states) in &kept {
        let manifest = repository.manifest(*id).unwrap();
        for (n, expected) in states.iter().enumerate() {
            let name = format!("d{n}");
            let view = repository.disk(&manifest, &name).unwrap();
            lane::block_on_with(run.clone(), read_parts(&view, &mut noise, expected));
            // Onto a target with strange content, wholly or by differences; then compared.
            let target = Rc::new(MemoryDisk::new(expected.len() as u64 / 512 + noise.below(9)));
            let dirt = vec![0xd1; expected.len().min(70_000) / 512 * 512];
            let only_differences = noise.below(2) == 0;
            lane::block_on_with(run.clone(), async {
                target.write(Sector(0), &Segments::new(&dirt), Safe::AtNextFlush).await.unwrap();
                let into = Rc::clone(&target) as _;
                let progress = Progress::new();
                repository.restore_into(&manifest, &name, into, only_differences, &progress).await.unwrap();
                let into = Rc::clone(&target) as _;
                assert_eq!(repository.compare(&manifest, &name, into, &progress).await.unwrap(), None);
            });
            assert!(target.to_bytes()[..expected.len()] == expected[..], "{name} of {id}");
        }
    }
}

#[test]
fn soak_every_history_restores() {
    let count = if std::env::var_os("KAGAMI_SOAK").is_some() { 400 } else { 16 };
    for seed in seeds(count) {
        eprintln!("KAGAMI_SEED={seed}");
        history(seed, DriverKind::Auto);
    }
}

/// Interleavings of reads, hashing and writing drawn by the simulated lane.
#[test]
fn soak_every_history_restores_on_a_simulated_lane() {
    let count = if std::env::var_os("KAGAMI_SOAK").is_some() { 200 } else { 6 };
    for seed in seeds(count) {
        eprintln!("KAGAMI_SEED={seed}");
        history(seed, DriverKind::Sim { seed });
    }
}
