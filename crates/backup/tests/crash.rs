//! Power is lost between any two changes of the directory, and while recovering from that; the disk is full at any
//! of them. Sealed backups stay, unsealed ones do not exist, the next backup succeeds.
#![allow(clippy::unwrap_used)] // a test says by it what must hold

mod common;

use std::path::Path;
use std::rc::Rc;

use backup::{BackupId, Depth, Error, Options, Progress, Repository};
use block::{Disk, Sector, SegmentsMut};
use common::power::{Believe, Image, Recorded, Recorder, cut, failing, image_of, materialise};
use common::{Noise, Scratch, TrackedDisk, directory_bytes, plan, source};

const PACK_BYTES: u64 = 96 << 10;

fn soak() -> bool {
    std::env::var_os("KAGAMI_SOAK").is_some()
}

/// A seed given from outside runs alone.
fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("KAGAMI_SEED") {
        Ok(text) => vec![text.parse().unwrap()],
        Err(_) => (0..count).collect(),
    }
}

fn options(recorder: Option<&Recorder>) -> Options {
    Options { watch: recorder.map(Recorder::watch), pack_bytes: Some(PACK_BYTES), pending_entries: Some(6) }
}

/// A backup of the workload: from which change on it may be there, from which it must, until when.
struct Life {
    id: BackupId,
    bytes: Vec<u8>,
    begun: usize,
    sealed: usize,
    removing: usize,
    removed: usize,
}

struct Workload {
    changes: Vec<Recorded>,
    lives: Vec<Life>,
    /// Before this change there need not be a repository.
    created: usize,
    disk: Rc<TrackedDisk>,
}

fn back_up(repository: &Repository, disk: &TrackedDisk, base: Option<BackupId>) -> Result<BackupId, Error> {
    let cut = disk.cut();
    let source = source("d", disk.freeze() as _, Some(cut));
    lane::block_on(repository.backup(plan(vec![source], base), &Progress::new())).map(|m| m.id)
}

/// Create, three backups, remove, prune, one more.
fn workload(path: &Path) -> Workload {
    let recorder = Recorder::default();
    let mut noise = Noise::new(11);
    let disk = TrackedDisk::new((1 << 20) / 512);
    disk.put(0, &noise.text(400 << 10));
    disk.put(120, &noise.bytes(200 << 10));
    let repository = Repository::create(path, options(Some(&recorder))).unwrap();
    let created = recorder.len();
    let mut lives: Vec<Life> = Vec::new();
    let step = |lives: &mut Vec<Life>| {
        let (begun, base) = (recorder.len(), lives.last().map(|l| l.id));
        let id = back_up(&repository, &disk, base).unwrap();
        let (bytes, never) = (disk.to_bytes(), usize::MAX);
        lives.push(Life { id, bytes, begun, sealed: recorder.len(), removing: never, removed: never });
    };
    step(&mut lives);
    disk.put(30, &noise.bytes(120 << 10));
    step(&mut lives);
    disk.put(200, &noise.bytes(4096));
    disk.clear(10, 20);
    step(&mut lives);
    for gone in [0, 1] {
        lives[gone].removing = recorder.len();
        repository.remove(lives[gone].id).unwrap();
        lives[gone].removed = recorder.len();
    }
    assert!(repository.prune(false, &Progress::new()).unwrap().removed_packs > 0);
    disk.put(5, &noise.text(30 << 10));
    step(&mut lives);
    Workload { changes: recorder.take(), lives, created, disk }
}

fn content(repository: &Repository, id: BackupId) -> Result<Vec<u8>, String> {
    let manifest = repository.manifest(id).map_err(|e| e.to_string())?;
    let disk = repository.disk(&manifest, "d").map_err(|e| e.to_string())?;
    let mut bytes = vec![0; disk.shape().bytes() as usize];
    lane::block_on(async { disk.read(Sector(0), &SegmentsMut::new(&mut bytes)).await })
        .map_err(|e| e.to_string())?;
    Ok(bytes)
}

/// What must hold after power was lost before change `at`.
fn check(work: &Workload, path: &Path, at: usize, recorder: Option<&Recorder>) -> Result<(), String> {
    let repository = match Repository::open(path, options(recorder)) {
        Ok(repository) => repository,
        Err(_) if at < work.created => {
            Repository::create(path, options(recorder)).map_err(|e| e.to_string())?
        }
        Err(e) => return Err(format!("does not open: {e}")),
    };
    let listed = repository.list().map_err(|e| e.to_string())?;
    for life in &work.lives {
        let there = listed.iter().any(|l| l.id == life.id);
        let (must, may) = (life.sealed <= at && at < life.removing, life.begun < at && at < life.removed);
        if (must && !there) || (there && !may && !must) {
            return Err(format!("backup {} there: {there}, must: {must}", life.id));
        }
    }
    for line in &listed {
        let life = work.lives.iter().find(|l| l.id == line.id).ok_or("a backup nobody made")?;
        line.manifest.as_ref().map_err(|e| e.to_string())?;
        if content(&repository, life.id)? != life.bytes {
            return Err(format!("backup {} has other content", life.id));
        }
    }
    let base = listed.last().map(|l| l.id);
    let next =
        back_up(&repository, &work.disk.freeze(), base).map_err(|e| format!("the next backup: {e}"))?;
    if content(&repository, next)? != work.disk.to_bytes() {
        return Err("the next backup has other content".into());
    }
    repository.prune(false, &Progress::new()).map_err(|e| format!("prune: {e}"))?;
    let report = repository.check(Depth::Deep, &Progress::new()).map_err(|e| e.to_string())?;
    match report.findings.first() {
        Some(finding) => Err(format!("{}: {}", finding.damage, finding.error)),
        None => Ok(()),
    }
}

/// No manifest, no backup: until it is there nothing is listed and nothing can be restored, and what was stored goes.
#[test]
fn i6_crash_before_the_manifest_leaves_no_backup_and_prune_collects_what_was_stored() {
    let scratch = Scratch::new("power-i6");
    let work = workload(&scratch.join("repo"));
    let place = scratch.join("cut");
    let first = &work.lives[0];
    let (mut without, mut most_bytes) = (0, 0);
    for at in work.created..=first.sealed {
        for seed in seeds(2) {
            let image = cut(&Image::new(), &work.changes[..at], seed * 100_000 + at as u64, Believe::All);
            materialise(&image, &place);
            let repository = Repository::open(&place, options(None)).unwrap();
            if !repository.list().unwrap().is_empty() {
                assert!(at > first.begun);
                assert!(content(&repository, first.id).unwrap() == first.bytes, "KAGAMI_SEED={seed}");
                continue;
            }
            assert!(at < first.sealed, "sealed, and not there; KAGAMI_SEED={seed}");
            without += 1;
            most_bytes = most_bytes.max(directory_bytes(&place));
            assert!(matches!(repository.manifest(first.id), Err(Error::NoBackup { .. })));
            for word in [first.id.to_string(), "latest".into(), "vm@latest".into()] {
                assert!(matches!(repository.resolve(&word), Err(Error::NoBackup { .. })), "{word}");
            }
            repository.prune(false, &Progress::new()).unwrap();
            let left = directory_bytes(&place);
            assert!(left < 16 << 10, "cut before change {at}: {left} bytes stay; KAGAMI_SEED={seed}");
        }
    }
    assert!(without > 20 && most_bytes > 200 << 10, "{without} cuts, at most {most_bytes} bytes stored");
}

/// A sealed backup is the disk at its cut, whatever was written meanwhile and wherever power was lost later: compared
/// byte by byte with what was frozen, and by the hashes in its tree.
#[test]
fn i7_crash_after_the_seal_leaves_the_disk_as_it_was_at_the_cut() {
    let scratch = Scratch::new("power-i7");
    let work = workload(&scratch.join("repo"));
    let place = scratch.join("cut");
    let mut proved = 0;
    for (number, life) in work.lives.iter().enumerate() {
        // The change that seals it, and those behind it.
        for at in (life.sealed..work.changes.len().min(life.sealed + 12)).filter(|at| *at < life.removing) {
            for seed in seeds(2) {
                let image = cut(&Image::new(), &work.changes[..at], seed * 100_000 + at as u64, Believe::All);
                materialise(&image, &place);
                let repository = Repository::open(&place, options(None)).unwrap();
                let manifest = repository.manifest(life.id).unwrap();
                let report = repository.verify(life.id, Depth::Deep, &Progress::new()).unwrap();
                assert!(report.is_clean(), "backup {number}, cut {at}; KAGAMI_SEED={seed}");
                let compare = |bytes: &[u8]| {
                    let frozen = Rc::new(block::MemoryDisk::from_bytes(bytes));
                    let progress = Progress::new();
                    lane::block_on(repository.compare(&manifest, "d", frozen, &progress)).unwrap()
                };
                assert_eq!(compare(&life.bytes), None, "backup {number}, cut {at}; KAGAMI_SEED={seed}");
                let mut other = life.bytes.clone();
                other[777_777] ^= 1;
                assert_eq!(compare(&other), Some(777_777));
                proved += 1;
            }
        }
    }
    assert!(proved >= 3 * work.lives.len(), "{proved}");
}

#[test]
fn i6_i7_crash_between_any_two_changes_of_the_directory() {
    let scratch = Scratch::new("power");
    let work = workload(&scratch.join("repo"));
    println!("{} changes", work.changes.len());
    let place = scratch.join("cut");
    for at in 0..=work.changes.len() {
        for seed in seeds(if soak() { 16 } else { 1 }) {
            let image = cut(&Image::new(), &work.changes[..at], seed * 100_000 + at as u64, Believe::All);
            materialise(&image, &place);
            let result = check(&work, &place, at, None);
            assert_eq!(
                result,
                Ok(()),
                "cut before change {at} of {}; KAGAMI_SEED={seed}",
                work.changes.len()
            );
        }
    }
}

#[test]
fn i6_i7_crash_again_while_recovering() {
    let scratch = Scratch::new("power-again");
    let work = workload(&scratch.join("repo"));
    let place = scratch.join("cut");
    let step = if soak() { 1 } else { 9 };
    for at in (work.created..=work.changes.len()).step_by(step) {
        for seed in seeds(1) {
            let first = cut(&Image::new(), &work.changes[..at], seed * 100_000 + at as u64, Believe::All);
            materialise(&first, &place);
            // What the first recovery and the backup after it do, recorded; then cut somewhere in there.
            let recorder = Recorder::default();
            let repository = Repository::open(&place, options(Some(&recorder))).unwrap();
            let base = repository.list().unwrap().last().map(|l| l.id);
            let again = back_up(&repository, &work.disk.freeze(), base).unwrap();
            let sealed = recorder.len();
            repository.prune(false, &Progress::new()).unwrap();
            let changes = recorder.take();
            let mut noise = Noise::new(seed + at as u64);
            for _ in 0..3 {
                let second = noise.below(changes.len() as u64 + 1) as usize;
                materialise(&cut(&first, &changes[..second], noise.next(), Believe::All), &place);
                let repository = Repository::open(&place, options(None)).unwrap();
                let listed: Vec<_> = repository.list().unwrap().iter().map(|l| l.id).collect();
                assert!(
                    second < sealed || listed.contains(&again),
                    "cut {at}, then {second}; KAGAMI_SEED={seed}"
                );
                if listed.contains(&again) {
                    assert!(content(&repository, again).unwrap() == work.disk.to_bytes());
                    repository.remove(again).unwrap();
                }
                drop(repository);
                assert_eq!(
                    check(&work, &place, at, None),
                    Ok(()),
                    "cut {at}, then {second}; KAGAMI_SEED={seed}"
                );
            }
        }
    }
}

/// The test above would not be worth much if it stayed green with a sync left out.
#[test]
fn crash_test_notices_a_sync_left_out() {
    let scratch = Scratch::new("power-fault");
    let work = workload(&scratch.join("repo"));
    let place = scratch.join("cut");
    for believe in [Believe::NoPackSync, Believe::NoManifestSync, Believe::NoDirectorySync] {
        let noticed = (0..=work.changes.len()).any(|at| {
            materialise(&cut(&Image::new(), &work.changes[..at], at as u64, believe), &place);
            check(&work, &place, at, None).is_err()
        });
        assert!(noticed, "a fault of the medium went unnoticed");
    }
}

/// An index segment that was not synced is damaged, which costs reading the packs' tables and nothing else.
#[test]
fn crash_that_loses_the_index_costs_nothing() {
    let scratch = Scratch::new("power-index");
    let work = workload(&scratch.join("repo"));
    let place = scratch.join("cut");
    let all = work.changes.len();
    for seed in seeds(8) {
        let mut image = cut(&Image::new(), &work.changes, seed, Believe::NoIndexSync);
        if seed == 0 {
            image.retain(|name, _| !name.starts_with("index"));
        }
        materialise(&image, &place);
        let repository = Repository::open(&place, options(None)).unwrap();
        let base = repository.list().unwrap().last().map(|l| l.id);
        back_up(&repository, &work.disk.freeze(), base).unwrap();
        for life in work.lives.iter().filter(|l| l.removed > all) {
            assert!(content(&repository, life.id).unwrap() == life.bytes, "KAGAMI_SEED={seed}");
        }
        assert!(repository.check(Depth::Deep, &Progress::new()).unwrap().is_clean());
    }
}

#[test]
fn a_full_disk_at_any_change_loses_nothing() {
    let scratch = Scratch::new("full");
    let path = scratch.join("repo");
    let repository = Repository::create(&path, options(None)).unwrap();
    let mut noise = Noise::new(12);
    let disk = TrackedDisk::new((1 << 20) / 512);
    disk.put(0, &noise.text(300 << 10));
    let first = back_up(&repository, &disk, None).unwrap();
    let first_bytes = disk.to_bytes();
    disk.put(100, &noise.bytes(300 << 10));
    let before = image_of(&path);
    let place = scratch.join("full");
    for n in 0.. {
        materialise(&before, &place);
        let tight = Repository::open(
            &place,
            Options { watch: Some(failing(n, 28)), pack_bytes: Some(PACK_BYTES), ..Options::default() },
        )
        .unwrap();
        let result = back_up(&tight, &disk.freeze(), Some(first));
        drop(tight);
        let done = match result {
            Ok(_) => true,
            Err(Error::NoSpace { .. }) => false,
            Err(e) => panic!("change {n} failed for want of space: {e}"),
        };
        let repository = Repository::open(&place, options(None)).unwrap();
        let listed: Vec<_> = repository.list().unwrap().iter().map(|l| l.id).collect();
        // The last sync may fail after the rename: then it is there and whole, though nobody was told so.
        assert!(listed.len() == 2 || (listed.len() == 1 && !done), "change {n}");
        for id in listed.iter().filter(|id| **id != first) {
            assert!(content(&repository, *id).unwrap() == disk.to_bytes());
        }
        assert!(content(&repository, first).unwrap() == first_bytes);
        if done {
            assert!(n > 10, "the loop went through a whole backup");
            break;
        }
        let next = back_up(&repository, &disk.freeze(), Some(first)).unwrap();
        assert!(content(&repository, next).unwrap() == disk.to_bytes());
        assert!(repository.check(Depth::Deep, &Progress::new()).unwrap().is_clean());
    }
}
