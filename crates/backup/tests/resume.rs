//! A backup that is cut off goes on where its packs end, as long as the disk shows the same cut; else it begins anew.
#![allow(clippy::unwrap_used)] // a test says by it what must hold

mod common;

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use backup::{BackupId, Depth, Error, Manifest, Mode, Options, Plan, Progress, Repository};
use block::decorate::{Decorated, Fail, Operation};
use block::{Disk, DiskError, Generation, Sector, SegmentsMut};
use common::power::{Believe, Image, Recorder, cut, materialise};
use common::{Noise, Scratch, TrackedDisk, plan, source};

const MIB: u64 = 1 << 20;

/// A disk that fails when so many bytes were read.
fn failing_after(below: &TrackedDisk, bytes: u64) -> Rc<Decorated<Fail>> {
    let left = Cell::new(bytes);
    let rule = move |operation, _, sectors: u64| {
        if operation != Operation::Read {
            return None;
        }
        let after = left.get().checked_sub(sectors * 512);
        left.set(after.unwrap_or(0));
        let gone = || DiskError::Io(std::sync::Arc::new(std::io::Error::other("gone")));
        after.is_none().then(gone)
    };
    Decorated::new(below.freeze(), Fail(Box::new(rule)))
}

/// 10 MiB: text, noise, holes, and an end within an area.
fn mixed(noise: &mut Noise) -> Rc<TrackedDisk> {
    let disk = TrackedDisk::new((10 * MIB + 5 * 4096) / 512);
    disk.put(3, &noise.text(2 << 20));
    disk.put(700, &noise.bytes(3 << 20));
    disk.put(1600, &noise.text(1 << 20));
    disk.put(2000, &noise.bytes(2 << 20));
    disk
}

fn options() -> Options {
    Options { pack_bytes: Some(1 << 20), ..Options::default() }
}

fn attempt(repository: &Repository, plan: Plan) -> Result<Manifest, Error> {
    lane::block_on(repository.backup(plan, &Progress::new()))
}

fn of(id: BackupId, disks: Vec<(&str, Rc<dyn Disk>, Generation)>, base: Option<BackupId>) -> Plan {
    let disks = disks.into_iter().map(|(name, disk, cut)| source(name, disk, Some(cut))).collect();
    Plan { id, ..plan(disks, base) }
}

fn content(repository: &Repository, manifest: &Manifest, name: &str) -> Vec<u8> {
    let disk = repository.disk(manifest, name).unwrap();
    let mut bytes = vec![0; disk.shape().bytes() as usize];
    lane::block_on(async { disk.read(Sector(0), &SegmentsMut::new(&mut bytes)).await }).unwrap();
    bytes
}

fn is_noted(path: &Path) -> bool {
    let names = std::fs::read_dir(path.join("manifests")).unwrap();
    names.into_iter().any(|n| n.unwrap().file_name().to_str().unwrap().ends_with(".unfinished"))
}

#[test]
fn a_full_copy_goes_on_where_the_disk_failed() {
    let scratch = Scratch::new("resume-full");
    let path = scratch.join("repo");
    let disk = mixed(&mut Noise::new(1));
    let now = disk.cut();
    let (id, frozen) = (BackupId::new(), disk.freeze());
    let repository = Repository::create(&path, options()).unwrap();
    let failing = failing_after(&disk, 5 * MIB);
    let other = TrackedDisk::new(MIB / 512);
    other.put(0, &Noise::new(2).bytes(600 << 10));
    let first = other.cut();
    let both = |d: Rc<dyn Disk>, o: Rc<dyn Disk>| of(id, vec![("c", o, first), ("d", d, now)], None);
    let error = attempt(&repository, both(failing as _, other.freeze() as _)).unwrap_err();
    assert!(matches!(error, Error::Disk { .. }), "{error}");
    assert!(is_noted(&path) && repository.list().unwrap().is_empty());
    drop(repository);

    let repository = Repository::open(&path, options()).unwrap();
    let unread = other.freeze();
    let manifest = attempt(&repository, both(Rc::clone(&frozen) as _, Rc::clone(&unread) as _)).unwrap();
    let record = manifest.disk("d").unwrap();
    assert_eq!(unread.read_bytes.get(), 0, "the disk that was done is not read again");
    assert_eq!((record.mode, frozen.read_bytes.get()), (Mode::Full, record.read_bytes));
    assert!(record.resumed_at_bytes >= 4 * MIB, "{record:?}");
    assert!(record.read_bytes <= record.allocated_bytes - 4 * MIB, "{record:?}");
    assert_eq!(record.allocated_bytes, 8 * MIB);
    assert!(content(&repository, &manifest, "d") == disk.to_bytes());
    assert!(content(&repository, &manifest, "c") == other.to_bytes());
    assert!(!is_noted(&path) && repository.check(Depth::Deep, &Progress::new()).unwrap().is_clean());
    // The same tree as without the failure.
    let whole =
        attempt(&repository, of(BackupId::new(), vec![("d", disk.freeze() as _, now)], None)).unwrap();
    assert_eq!(whole.disk("d").unwrap().root, record.root);
    // Asked again for what is sealed already, as by a job that was killed before it could note so.
    let unread = disk.freeze();
    let again = attempt(&repository, both(Rc::clone(&unread) as _, other.freeze() as _)).unwrap();
    assert_eq!((again, unread.read_bytes.get()), (manifest, 0));
}

#[test]
fn an_incremental_goes_on_where_the_disk_failed() {
    let scratch = Scratch::new("resume-incremental");
    let path = scratch.join("repo");
    let mut noise = Noise::new(3);
    let disk = mixed(&mut noise);
    let repository = Repository::create(&path, options()).unwrap();
    let cut = disk.cut();
    let base = attempt(&repository, of(BackupId::new(), vec![("d", disk.freeze() as _, cut)], None)).unwrap();
    for n in 0..400 {
        disk.put(n * 6 + 1, &noise.bytes(4096));
    }
    disk.clear(900, 300);
    let (now, id) = (disk.cut(), BackupId::new());
    let changed = 400 * 4096;
    let failing = failing_after(&disk, changed * 3 / 4);
    attempt(&repository, of(id, vec![("d", failing as _, now)], Some(base.id))).unwrap_err();
    assert!(is_noted(&path));
    let frozen = disk.freeze();
    let manifest =
        attempt(&repository, of(id, vec![("d", Rc::clone(&frozen) as _, now)], Some(base.id))).unwrap();
    let record = manifest.disk("d").unwrap();
    assert!(record.mode == Mode::Incremental && record.resumed_at_bytes > 2 * MIB, "{record:?}");
    assert!(frozen.read_bytes.get() < changed * 2 / 3, "{record:?}");
    assert!(content(&repository, &manifest, "d") == disk.to_bytes());
}

#[test]
fn another_cut_and_lost_packs_are_read_anew() {
    let scratch = Scratch::new("resume-anew");
    let path = scratch.join("repo");
    let mut noise = Noise::new(4);
    let disk = mixed(&mut noise);
    let repository = Repository::create(&path, options()).unwrap();
    let id = BackupId::new();
    let old = disk.cut();
    attempt(&repository, of(id, vec![("d", failing_after(&disk, 6 * MIB) as _, old)], None)).unwrap_err();
    disk.put(4, &noise.bytes(4096));
    let frozen = disk.freeze();
    let manifest =
        attempt(&repository, of(id, vec![("d", Rc::clone(&frozen) as _, disk.cut())], None)).unwrap();
    assert_eq!(manifest.disk("d").unwrap().resumed_at_bytes, 0, "another cut");
    assert!(content(&repository, &manifest, "d") == disk.to_bytes());

    let (id, now) = (BackupId::new(), disk.cut());
    disk.put(0, &noise.bytes(9 << 20));
    let packs = || std::fs::read_dir(path.join("packs")).unwrap().map(|p| p.unwrap().path());
    let before: Vec<_> = packs().collect();
    attempt(&repository, of(id, vec![("d", failing_after(&disk, 6 * MIB) as _, now)], None)).unwrap_err();
    // The first that holds data: what the last ones hold may lie behind what was reached.
    let age = |p: &PathBuf| std::fs::metadata(p).unwrap().modified().unwrap();
    let holds_data = |p: &PathBuf| !before.contains(p) && std::fs::metadata(p).unwrap().len() > 512 << 10;
    std::fs::remove_file(packs().filter(holds_data).min_by_key(age).unwrap()).unwrap();
    let repository = Repository::open(&path, options()).unwrap();
    let manifest = attempt(&repository, of(id, vec![("d", disk.freeze() as _, now)], None)).unwrap();
    assert_eq!(manifest.disk("d").unwrap().resumed_at_bytes, 0, "a pack is gone");
    assert!(content(&repository, &manifest, "d") == disk.to_bytes());

    let id = BackupId::new();
    disk.put(0, &noise.bytes(9 << 20));
    let now = disk.cut();
    attempt(&repository, of(id, vec![("d", failing_after(&disk, 6 * MIB) as _, now)], None)).unwrap_err();
    // What no backup names is pruned, the note with it.
    repository.prune(false, &Progress::new()).unwrap();
    assert!(!is_noted(&path));
    let manifest = attempt(&repository, of(id, vec![("d", disk.freeze() as _, now)], None)).unwrap();
    assert_eq!(manifest.disk("d").unwrap().resumed_at_bytes, 0);
    assert!(content(&repository, &manifest, "d") == disk.to_bytes());
    repository.forget(id).unwrap();
}

/// Power is lost between any two changes of the directory; the next attempt goes on from what is there.
#[test]
fn crash_anywhere_then_go_on() {
    let scratch = Scratch::new("resume-crash");
    let options = |recorder: Option<&Recorder>| Options { watch: recorder.map(Recorder::watch), ..options() };
    let disk = mixed(&mut Noise::new(5));
    let (id, now) = (BackupId::new(), disk.cut());
    let recorder = Recorder::default();
    let repository = Repository::create(&scratch.join("repo"), options(Some(&recorder))).unwrap();
    let created = recorder.len();
    attempt(&repository, of(id, vec![("d", disk.freeze() as _, now)], None)).unwrap();
    let changes = recorder.take();
    let (place, bytes, mut furthest, mut resumed) = (scratch.join("cut"), disk.to_bytes(), 0, 0);
    let step = if std::env::var_os("KAGAMI_SOAK").is_some() { 1 } else { 3 };
    for at in (created..=changes.len()).step_by(step) {
        let image = cut(&Image::new(), &changes[..at], at as u64, Believe::All);
        materialise(&image, &place);
        let repository = Repository::open(&place, options(None)).unwrap();
        let frozen = disk.freeze();
        let manifest = attempt(&repository, of(id, vec![("d", Rc::clone(&frozen) as _, now)], None)).unwrap();
        assert!(content(&repository, &manifest, "d") == bytes, "cut before change {at}");
        let report = repository.check(Depth::Deep, &Progress::new()).unwrap();
        assert!(report.is_clean(), "cut before change {at}: {:?}", report.findings);
        let record = manifest.disk("d").unwrap();
        furthest = furthest.max(record.resumed_at_bytes);
        resumed += usize::from(record.resumed_at_bytes > 0);
    }
    assert!(furthest >= 3 * MIB && resumed > 3, "{resumed} went on, one from {furthest}");
}
