//! Backups and restores, whole.
#![allow(clippy::unwrap_used)] // a test says by it what must hold

mod common;

use std::rc::Rc;

use backup::{Audit, Depth, Error, Manifest, Mode, Options, Progress, Reads, Repository, Tracking, Trust};
use block::decorate::{Decorated, Fail, Operation};
use block::{Disk, MemoryDisk, Sector, SegmentsMut};
use common::{Noise, Scratch, TrackedDisk, directory_bytes, plan, source};

fn read_all(disk: &dyn Disk) -> Vec<u8> {
    lane::block_on(read_whole(disk))
}

async fn read_whole(disk: &dyn Disk) -> Vec<u8> {
    let mut bytes = vec![0; disk.shape().bytes() as usize];
    disk.read(Sector(0), &SegmentsMut::new(&mut bytes)).await.unwrap();
    bytes
}

/// 32 MiB with noise, text, copies and holes.
fn mixed(noise: &mut Noise) -> Rc<TrackedDisk> {
    let disk = TrackedDisk::new((32 << 20) / 512);
    let pool: Vec<_> = (0..4).map(|_| noise.text(256 << 10)).collect();
    for run in 0..128 {
        match noise.below(10) {
            0..4 => {}
            4..6 => disk.put(run * 64, &noise.bytes(256 << 10)),
            6..9 => disk.put(run * 64, &noise.text(256 << 10)),
            _ => disk.put(run * 64, &pool[noise.below(4) as usize]),
        }
    }
    disk
}

#[test]
fn full_then_incremental_then_every_way_back() {
    let scratch = Scratch::new("ways");
    let repository = Repository::create(&scratch.join("repo"), Options::default()).unwrap();
    let mut noise = Noise::new(1);
    let disk = mixed(&mut noise);
    let first_bytes = disk.to_bytes();
    let cut = disk.cut();
    let progress = Progress::new();
    let frozen = disk.freeze();
    let first =
        lane::block_on(repository.backup(plan(vec![source("c", frozen, Some(cut))], None), &progress))
            .unwrap();
    assert_eq!(first.disks[0].mode, Mode::Full);
    assert_eq!(progress.done_bytes(), 32 << 20);

    for _ in 0..50 {
        disk.put(noise.below(8192), &noise.bytes(4096));
    }
    disk.clear(64, 80);
    disk.put(3, &noise.text(100 << 10));
    let second_bytes = disk.to_bytes();
    let cut = disk.cut();
    let frozen = disk.freeze();
    let source = source("c", Rc::clone(&frozen) as _, Some(cut));
    let second =
        lane::block_on(repository.backup(plan(vec![source], Some(first.id)), &Progress::new())).unwrap();
    let record = &second.disks[0];
    assert_eq!(record.mode, Mode::Incremental);
    assert_eq!(record.read_bytes, frozen.read_bytes.get());
    assert!(record.read_bytes <= record.changed_bytes + record.audited_bytes);

    // Opened anew, as another process would.
    let again = Repository::open(&scratch.join("repo"), Options::default()).unwrap();
    for (manifest, expected) in [(&first, &first_bytes), (&second, &second_bytes)] {
        let manifest = &again.manifest(manifest.id).unwrap();
        let view = again.disk(manifest, "c").unwrap();
        assert!(read_all(&view) == *expected, "the view differs");
        let raw = scratch.join("out.raw");
        again.restore_to_raw(manifest, "c", &raw, &Progress::new()).unwrap();
        assert!(std::fs::read(&raw).unwrap() == *expected, "the raw file differs");
        std::fs::remove_file(&raw).unwrap();
        let target = Rc::new(MemoryDisk::from_bytes(&vec![0xee; expected.len()]));
        let into = again.restore_into(manifest, "c", Rc::clone(&target) as _, false, &progress);
        lane::block_on(into).unwrap();
        assert!(target.to_bytes() == *expected, "the restored disk differs");
        assert!(again.verify(manifest.id, Depth::Deep, &Progress::new()).unwrap().is_clean());
        assert!(again.verify(manifest.id, Depth::Shallow, &Progress::new()).unwrap().is_clean());
        assert_eq!(again.file(manifest, "vm.vmx").unwrap(), b"displayName = \"vm\"\n");
    }
    assert!(again.check(Depth::Deep, &Progress::new()).unwrap().is_clean());

    // In place, from the second state back to the first: only what differs is written.
    let target = Rc::new(MemoryDisk::from_bytes(&second_bytes));
    let back = again.restore_into(&first, "c", Rc::clone(&target) as _, true, &progress);
    let done = lane::block_on(back).unwrap();
    assert!(target.to_bytes() == first_bytes, "the disk restored in place differs");
    assert!(done.written_bytes + done.zeroed_bytes < 2 << 20, "{done:?}");
    let proof = again.compare(&first, "c", Rc::clone(&target) as _, &progress);
    assert_eq!(lane::block_on(proof).unwrap(), None);
    let other = again.compare(&second, "c", target, &progress);
    let expected = first_bytes.iter().zip(&second_bytes).position(|(a, b)| a != b).map(|n| n as u64);
    assert_eq!(lane::block_on(other).unwrap(), expected);
}

#[test]
fn a_scattered_change_costs_at_most_twice_itself() {
    let scratch = Scratch::new("scattered");
    let repository = Repository::create(&scratch.join("repo"), Options::default()).unwrap();
    let mut noise = Noise::new(2);
    let disk = mixed(&mut noise);
    let cut = disk.cut();
    let base = lane::block_on(
        repository.backup(plan(vec![source("d", disk.freeze(), Some(cut))], None), &Progress::new()),
    )
    .unwrap();
    let mut last = directory_bytes(&scratch.join("repo"));
    // With tracking, and without it: then everything is read, and what is stored is the same.
    for tracked in [true, false] {
        for _ in 0..82 {
            disk.put(noise.below(8192), &noise.bytes(4096));
        }
        let cut = disk.cut();
        let mut source = source("d", disk.freeze(), Some(cut));
        source.trust = if tracked { Trust::Unless } else { Trust::Never };
        let next = lane::block_on(repository.backup(plan(vec![source], Some(base.id)), &Progress::new()));
        let next = next.unwrap();
        assert_eq!(next.disks[0].mode == Mode::Incremental, tracked);
        let now = directory_bytes(&scratch.join("repo"));
        // The second round changes 82 more, compared with a base that lacks the first 82: these are there already.
        assert!(now - last <= 2 * 82 * 4096, "82 blocks of 4 KiB grew the repository by {}", now - last);
        last = now;
        let view = repository.disk(&next, "d").unwrap();
        assert!(read_all(&view) == disk.to_bytes());
    }
}

#[test]
fn r45_an_unknown_generation_reads_everything() {
    let scratch = Scratch::new("r45");
    let repository = Repository::create(&scratch.join("repo"), Options::default()).unwrap();
    let disk = mixed(&mut Noise::new(3));
    let cut = disk.cut();
    let sealed = |base, cut| {
        let source = source("d", disk.freeze() as _, cut);
        lane::block_on(repository.backup(plan(vec![source], base), &Progress::new())).unwrap()
    };
    let strange = block::Generation { counter: 1, id: 99 };
    let base = sealed(None, Some(strange));
    disk.put(77, &[1; 4096]);
    let next = sealed(Some(base.id), Some(cut));
    assert_eq!((next.disks[0].mode, &next.disks[0].tracking), (Mode::Full, &Tracking::Trusted));
    assert!(read_all(&repository.disk(&next, "d").unwrap()) == disk.to_bytes());
    // No cut at all: nothing to ask about.
    let untracked = sealed(Some(next.id), None);
    let after = sealed(Some(untracked.id), Some(cut));
    assert_eq!(after.disks[0].mode, Mode::Full);
}

#[test]
fn r46_an_audit_finds_a_change_that_was_not_told_of() {
    let scratch = Scratch::new("r46");
    let repository = Repository::create(&scratch.join("repo"), Options::default()).unwrap();
    let mut noise = Noise::new(4);
    let disk = TrackedDisk::new((8 << 20) / 512);
    disk.put(0, &noise.bytes(8 << 20));
    let sealed = |base, trust| {
        let cut = disk.cut();
        let mut source = source("d", disk.freeze() as _, Some(cut));
        source.trust = trust;
        let mut plan = plan(vec![source], base);
        plan.audit = Audit { share: 1.0, limit_bytes: 1 << 30, seed: Some([1; 32]) };
        lane::block_on(repository.backup(plan, &Progress::new())).unwrap()
    };
    let base = sealed(None, Trust::Unless);
    disk.put(5, &noise.bytes(4096));
    let good = sealed(Some(base.id), Trust::Unless);
    assert_eq!((good.disks[0].mode, &good.disks[0].tracking), (Mode::Incremental, &Tracking::Trusted));
    assert_eq!(good.disks[0].audited_bytes, (8 << 20) - (64 << 10), "every area but the changed one");
    disk.put_secretly(1000, &noise.bytes(4096));
    let found = sealed(Some(good.id), Trust::Unless);
    let off = Tracking::Off { at_bytes: 1000 * 4096, since: found.id };
    assert_eq!((found.disks[0].mode, &found.disks[0].tracking), (Mode::Full, &off));
    assert!(read_all(&repository.disk(&found, "d").unwrap()) == disk.to_bytes());
    let still = sealed(Some(found.id), Trust::Unless);
    assert_eq!((still.disks[0].mode, &still.disks[0].tracking), (Mode::Full, &off));
    let again = sealed(Some(still.id), Trust::Again);
    assert_eq!((again.disks[0].mode, &again.disks[0].tracking), (Mode::Incremental, &Tracking::Trusted));
}

#[test]
fn r46_the_audit_has_a_limit_and_is_all_that_is_read_beside_what_changed() {
    let scratch = Scratch::new("r46-limit");
    let repository = Repository::create(&scratch.join("repo"), Options::default()).unwrap();
    let mut noise = Noise::new(14);
    let disk = TrackedDisk::new((32 << 20) / 512);
    disk.put(0, &noise.bytes(32 << 20));
    let sealed = |base| {
        let (cut, frozen) = (disk.cut(), disk.freeze());
        let mut plan = plan(vec![source("d", Rc::clone(&frozen) as _, Some(cut))], base);
        plan.audit = Audit { share: 1.0, limit_bytes: 8 << 20, seed: Some([1; 32]) };
        let sealed = lane::block_on(repository.backup(plan, &Progress::new())).unwrap();
        (sealed, frozen.read_bytes.get())
    };
    let (base, _) = sealed(None);
    for block in [3, 4, 5000] {
        disk.put(block, &noise.bytes(4096));
    }
    let (next, read) = sealed(Some(base.id));
    let d = &next.disks[0];
    assert_eq!((d.mode, d.changed_bytes), (Mode::Incremental, 3 * 4096));
    assert!((4 << 20) < d.audited_bytes && d.audited_bytes <= 8 << 20, "{} bytes", d.audited_bytes);
    assert_eq!((d.read_bytes, read), (d.changed_bytes + d.audited_bytes, d.read_bytes));
    // Unless somebody says otherwise: one in a thousand, a GiB of each disk at most.
    let usual = Audit::default();
    assert_eq!((usual.share, usual.limit_bytes), (0.001, 1 << 30));
}

/// Restores through a handle of its own: what that reads.
fn cost_of_restore(path: &std::path::Path, manifest: &Manifest, expected: &[u8]) -> Reads {
    let repository = Repository::open(path, Options::default()).unwrap();
    let target = Rc::new(MemoryDisk::new(expected.len() as u64 / 512));
    let progress = Progress::new();
    lane::block_on(repository.restore_into(manifest, "d", Rc::clone(&target) as _, false, &progress))
        .unwrap();
    assert!(target.to_bytes() == *expected);
    repository.reads()
}

/// A backup is a tree of its own, not the end of a chain: forty backups later the same is read.
#[test]
fn a_restore_costs_the_same_at_any_length_of_the_chain() {
    let scratch = Scratch::new("chain");
    let path = scratch.join("repo");
    let repository = Repository::create(&path, Options::default()).unwrap();
    let mut noise = Noise::new(15);
    let disk = TrackedDisk::new((16 << 20) / 512);
    disk.put(0, &noise.bytes(16 << 20));
    let mut kept: Vec<(Manifest, Vec<u8>)> = Vec::new();
    let seal = |kept: &mut Vec<(Manifest, Vec<u8>)>| {
        let cut = disk.cut();
        let plan = plan(vec![source("d", disk.freeze() as _, Some(cut))], kept.last().map(|(m, _)| m.id));
        let sealed = lane::block_on(repository.backup(plan, &Progress::new())).unwrap();
        assert_eq!(sealed.base.is_some(), sealed.disks[0].mode == Mode::Incremental);
        kept.push((sealed, disk.to_bytes()));
    };
    seal(&mut kept);
    // The same places each time: the last one differs from the first in its content and in nothing else.
    for _ in 0..40 {
        for place in 0..20 {
            disk.put(place * 200 + 7, &noise.bytes(4096));
        }
        seal(&mut kept);
    }
    let cost = |(manifest, bytes): &(Manifest, Vec<u8>)| cost_of_restore(&path, manifest, bytes);
    let (first, last) = (cost(&kept[1]), cost(&kept[40]));
    assert_eq!((first.chunks, first.packs), (last.chunks, last.packs), "{first:?} {last:?}");
    assert!(first.bytes.abs_diff(last.bytes) <= 4096, "{first:?} {last:?}");
    assert!(last.packs <= 2, "the full one's pack and its own: {last:?}");
    // Other places each time: a piece for each that was changed since, read with the frame that it lies in, here of some 60 KB.
    for round in 0..40 {
        disk.put(round * 90 + 50, &noise.bytes(4096));
        seal(&mut kept);
    }
    let scattered = cost(&kept[80]);
    assert!(scattered.bytes <= last.bytes + 40 * (64 << 10), "{last:?} {scattered:?}");
    assert!(scattered.chunks <= last.chunks + 2 * 40 && scattered.packs <= 2 + 40, "{last:?} {scattered:?}");
}

#[test]
fn two_writers_are_refused_and_readers_are_not() {
    let scratch = Scratch::new("writers");
    let path = scratch.join("repo");
    let repository = Repository::create(&path, Options::default()).unwrap();
    let disk = mixed(&mut Noise::new(5));
    let source = source("d", disk as _, None);
    let sealed = lane::block_on(repository.backup(plan(vec![source], None), &Progress::new())).unwrap();
    let other = Repository::open(&path, Options::default()).unwrap();
    let holding = std::fs::OpenOptions::new().write(true).open(path.join("lock")).unwrap();
    holding.lock().unwrap();
    std::fs::write(path.join("lock"), "kagami backup create web, process 1 on host\n").unwrap();
    let refused = other.remove(sealed.id).unwrap_err();
    assert!(matches!(&refused, Error::Locked { holder } if holder.contains("create web")), "{refused}");
    assert!(other.prune(false, &Progress::new()).is_err());
    assert_eq!(other.list().unwrap().len(), 1);
    assert!(other.verify(sealed.id, Depth::Deep, &Progress::new()).unwrap().is_clean());
    drop(holding);
    other.remove(sealed.id).unwrap();
    assert!(repository.list().unwrap().is_empty());
}

#[test]
fn what_no_backup_needs_is_pruned_and_the_rest_stays() {
    let scratch = Scratch::new("prune");
    let options = || Options { pack_bytes: Some(1 << 20), ..Options::default() };
    let repository = Repository::create(&scratch.join("repo"), options()).unwrap();
    let reader = Repository::open(&scratch.join("repo"), options()).unwrap();
    let mut noise = Noise::new(6);
    let disk = mixed(&mut noise);
    let mut kept: Vec<(backup::Manifest, Vec<u8>)> = Vec::new();
    for round in 0..5 {
        let cut = disk.cut();
        let source = source("d", disk.freeze() as _, Some(cut));
        let base = kept.last().map(|(m, _)| m.id);
        let sealed = lane::block_on(repository.backup(plan(vec![source], base), &Progress::new())).unwrap();
        kept.push((sealed, disk.to_bytes()));
        // Always the same place: what one round writes the next makes unneeded, however chunks lie in packs.
        disk.put(2000, &noise.bytes(4 << 20));
        disk.put(noise.below(2000), &noise.bytes(64 << 10));
        disk.put(round * 100, &noise.text(300 << 10));
    }
    // A reader that has seen the repository before anything goes.
    assert!(read_all(&reader.disk(&kept[4].0, "d").unwrap()) == kept[4].1);
    // But a few nodes of trees that were in the making when it was noted how far they were.
    let nothing = repository.prune(false, &Progress::new()).unwrap();
    assert!(nothing.removed_bytes < 64 << 10 && nothing.moved_bytes < 64 << 10, "all is needed: {nothing:?}");
    let before = directory_bytes(&scratch.join("repo"));
    for gone in [0, 1, 3] {
        repository.remove(kept[gone].0.id).unwrap();
    }
    let planned = repository.prune(true, &Progress::new()).unwrap();
    let pruned = repository.prune(false, &Progress::new()).unwrap();
    assert_eq!(planned.removed_packs, pruned.removed_packs);
    assert!(pruned.removed_packs > 0 && directory_bytes(&scratch.join("repo")) < before, "{pruned:?}");
    for (manifest, bytes) in [&kept[2], &kept[4]] {
        for repository in [&repository, &reader, &Repository::open(&scratch.join("repo"), options()).unwrap()]
        {
            assert!(repository.verify(manifest.id, Depth::Deep, &Progress::new()).unwrap().is_clean());
            assert!(read_all(&repository.disk(manifest, "d").unwrap()) == *bytes);
        }
    }
    for kept in [2, 4].map(|n: usize| &kept[n]) {
        repository.remove(kept.0.id).unwrap();
    }
    repository.prune(false, &Progress::new()).unwrap();
    assert!(directory_bytes(&scratch.join("repo")) < 64 << 10, "an empty repository is small");
}

#[test]
fn disks_may_grow_shrink_and_end_anywhere() {
    let scratch = Scratch::new("sizes");
    let repository = Repository::create(&scratch.join("repo"), Options::default()).unwrap();
    let mut noise = Noise::new(7);
    let disk = TrackedDisk::new(1);
    let mut base = None;
    for sectors in [1, 7, 8, 129, 131, 127, 5000, 129, 4096, 4099, 100_000, 3] {
        disk.resize(sectors);
        for _ in 0..3 {
            let block = noise.below(sectors.div_ceil(8));
            disk.put(block, &noise.bytes(4096));
        }
        let cut = disk.cut();
        let source = source("d", disk.freeze() as _, Some(cut));
        let sealed = lane::block_on(repository.backup(plan(vec![source], base), &Progress::new())).unwrap();
        assert!(read_all(&repository.disk(&sealed, "d").unwrap()) == disk.to_bytes(), "{sectors} sectors");
        base = Some(sealed.id);
    }
}

/// Data in parts of areas is audited too: the area is, and what lies between.
#[test]
fn r46_sparse_data_is_audited() {
    let scratch = Scratch::new("r46-sparse");
    let repository = Repository::create(&scratch.join("repo"), Options::default()).unwrap();
    let mut noise = Noise::new(8);
    let disk = TrackedDisk::new((4 << 20) / 512);
    for area in 0..64 {
        disk.put(area * 16 + 5, &noise.bytes(4096));
    }
    let sealed = |base| {
        let cut = disk.cut();
        let mut plan = plan(vec![source("d", disk.freeze() as _, Some(cut))], base);
        plan.audit = Audit { share: 1.0, limit_bytes: 1 << 30, seed: Some([1; 32]) };
        lane::block_on(repository.backup(plan, &Progress::new())).unwrap()
    };
    let base = sealed(None);
    disk.put(40 * 16, &noise.bytes(4096));
    let next = sealed(Some(base.id));
    assert_eq!(next.disks[0].audited_bytes, 63 << 16);
    // A hole that filled itself beside data in the same area.
    disk.put_secretly(10 * 16 + 9, &noise.bytes(4096));
    let found = sealed(Some(next.id));
    assert!(
        matches!(found.disks[0].tracking, Tracking::Off { at_bytes, .. } if at_bytes == (10 * 16 + 9) * 4096)
    );
}

#[test]
fn a_backed_up_disk_is_a_disk() {
    let scratch = Scratch::new("conformance");
    let repository = Repository::create(&scratch.join("repo"), Options::default()).unwrap();
    let disk = mixed(&mut Noise::new(9));
    let source = source("d", disk as _, None);
    let sealed = lane::block_on(repository.backup(plan(vec![source], None), &Progress::new())).unwrap();
    let view = Rc::new(repository.disk(&sealed, "d").unwrap());
    lane::block_on(block::conformance::check_read_only(view));
}

#[test]
fn work_ends_when_asked_to() {
    let scratch = Scratch::new("stop");
    let repository = Repository::create(&scratch.join("repo"), Options::default()).unwrap();
    let disk = mixed(&mut Noise::new(10));
    let progress = Progress::new();
    progress.stop();
    let plan_of = || plan(vec![source("d", Rc::clone(&disk) as _, None)], None);
    let stopped = lane::block_on(repository.backup(plan_of(), &progress));
    assert!(matches!(stopped, Err(Error::Cancelled)));
    assert!(repository.list().unwrap().is_empty());
    let sealed = lane::block_on(repository.backup(plan_of(), &Progress::new())).unwrap();
    let raw = scratch.join("out.raw");
    assert!(matches!(repository.restore_to_raw(&sealed, "d", &raw, &progress), Err(Error::Cancelled)));
    assert!(!raw.exists());
    let target = Rc::new(MemoryDisk::new(100));
    let small = lane::block_on(repository.restore_into(&sealed, "d", target, false, &Progress::new()));
    assert!(matches!(&small, Err(Error::Refused(text)) if text.contains("larger")), "{small:?}");
}

#[test]
fn a_vmdk_is_a_descriptor_and_its_content() {
    let scratch = Scratch::new("vmdk");
    let repository = Repository::create(&scratch.join("repo"), Options::default()).unwrap();
    let disk = mixed(&mut Noise::new(11));
    let source = source("d", Rc::clone(&disk) as _, None);
    let sealed = lane::block_on(repository.backup(plan(vec![source], None), &Progress::new())).unwrap();
    let path = scratch.join("web.vmdk");
    let flat = repository.restore_to_vmdk(&sealed, "d", &path, &Progress::new()).unwrap();
    assert_eq!(flat, scratch.join("web-flat.vmdk"));
    assert!(std::fs::read(&flat).unwrap() == disk.to_bytes());
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains("RW 65536 FLAT \"web-flat.vmdk\" 0\n"), "{text}");
    let again = repository.restore_to_vmdk(&sealed, "d", &path, &Progress::new());
    assert!(matches!(again, Err(Error::Exists { .. })));
    let Ok(qemu) = std::process::Command::new("qemu-img")
        .args(["convert", "-O", "raw"])
        .arg(&path)
        .arg(scratch.join("q.raw"))
        .status()
    else {
        assert!(std::env::var_os("CI").is_none(), "qemu-img is missing");
        eprintln!("SKIPPED: qemu-img is not installed");
        return;
    };
    assert!(qemu.success());
    assert!(std::fs::read(scratch.join("q.raw")).unwrap() == disk.to_bytes());
}

/// Readers of their own handle go on, whatever a writer beside them does to the packs.
#[test]
fn readers_go_on_beside_backups_and_prunes() {
    let scratch = Scratch::new("beside");
    let path = scratch.join("repo");
    let options = || Options { pack_bytes: Some(256 << 10), ..Options::default() };
    let repository = Repository::create(&path, options()).unwrap();
    let mut noise = Noise::new(12);
    let disk = TrackedDisk::new((4 << 20) / 512);
    disk.put(0, &noise.bytes(1 << 20));
    disk.put(512, &noise.text(1 << 20));
    let seal = |base: Option<backup::BackupId>| {
        let cut = disk.cut();
        let plan = plan(vec![source("d", disk.freeze() as _, Some(cut))], base);
        lane::block_on(repository.backup(plan, &Progress::new())).unwrap()
    };
    let first = seal(None);
    // Most of every pack of the first is of no use to the second.
    (0..768).step_by(64).for_each(|at| disk.clear(at, 48));
    let kept = seal(Some(first.id));
    let expected = disk.to_bytes();
    let opened = std::sync::Barrier::new(3);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut rounds = 0;
                    let reader = Repository::open(&path, options()).unwrap();
                    opened.wait();
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) || rounds < 3 {
                        let report = reader.verify(kept.id, Depth::Deep, &Progress::new()).unwrap();
                        assert!(report.is_clean(), "{:?}", report.findings);
                        assert!(read_all(&reader.disk(&kept, "d").unwrap()) == expected);
                        rounds += 1;
                    }
                })
            })
            .collect();
        opened.wait();
        repository.remove(first.id).unwrap();
        let pruned = repository.prune(false, &Progress::new()).unwrap();
        assert!(pruned.moved_packs > 0, "{pruned:?}");
        for _ in 0..12 {
            disk.put(noise.below(900), &noise.bytes(300 << 10));
            let gone = seal(Some(kept.id));
            repository.remove(gone.id).unwrap();
            assert!(repository.prune(false, &Progress::new()).unwrap().removed_packs > 0);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        readers.into_iter().for_each(|r| r.join().unwrap());
    });
}

#[test]
fn a_disk_that_cannot_be_read_is_no_backup() {
    let scratch = Scratch::new("unreadable");
    let repository = Repository::create(&scratch.join("repo"), Options::default()).unwrap();
    let disk = TrackedDisk::new((8 << 20) / 512);
    disk.put(0, &Noise::new(13).bytes(8 << 20));
    let fault = block::MediumFault { at: Sector(9000), what: "planted" };
    let fail = Fail::nth(Operation::Read, 9, false, block::DiskError::Medium(fault));
    let bad = Decorated::new(Rc::clone(&disk) as _, fail);
    let failed =
        lane::block_on(repository.backup(plan(vec![source("d", bad as _, None)], None), &Progress::new()));
    let failed = failed.unwrap_err();
    assert!(
        matches!(&failed, Error::Disk { disk, at_bytes, .. } if disk == "d" && *at_bytes > 0),
        "{failed}"
    );
    assert!(repository.list().unwrap().is_empty());
    // What was stored before is used by the next.
    let good =
        lane::block_on(repository.backup(plan(vec![source("d", disk as _, None)], None), &Progress::new()));
    assert!(repository.verify(good.unwrap().id, Depth::Deep, &Progress::new()).unwrap().is_clean());
}
