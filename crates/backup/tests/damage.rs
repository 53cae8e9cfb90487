//! What others did to the bytes: flipped, cut, made up, newer.
#![allow(clippy::unwrap_used)] // a test says by it what must hold

mod common;

use std::path::{Path, PathBuf};
use std::rc::Rc;

use backup::{BackupId, Damage, Depth, Error, Manifest, Options, Progress, Repository};
use block::{Disk, DiskError, Sector, SegmentsMut};
use common::power::{image_of, materialise};
use common::{Noise, Scratch, TrackedDisk, plan, source};

fn two_backups(path: &Path) -> (Vec<Manifest>, Rc<TrackedDisk>) {
    let options = Options { pack_bytes: Some(128 << 10), ..Options::default() };
    let repository = Repository::create(path, options).unwrap();
    let mut noise = Noise::new(21);
    let disk = TrackedDisk::new((1 << 20) / 512);
    disk.put(0, &noise.text(300 << 10));
    disk.put(100, &noise.bytes(100 << 10));
    let mut sealed: Vec<Manifest> = Vec::new();
    for _ in 0..2 {
        let cut = disk.cut();
        let source = source("data", disk.freeze() as _, Some(cut));
        let plan = plan(vec![source], sealed.last().map(|m| m.id));
        sealed.push(lane::block_on(repository.backup(plan, &Progress::new())).unwrap());
        disk.put(3, &noise.bytes(4096));
        disk.put(120, &noise.text(4096));
    }
    (sealed, disk)
}

/// Everything there is to find, or why it could not even be opened.
fn examine(path: &Path) -> Result<Vec<Damage>, Error> {
    let repository = Repository::open(path, Options::default())?;
    let report = repository.check(Depth::Deep, &Progress::new())?;
    Ok(report.findings.into_iter().map(|f| f.damage).collect())
}

#[test]
fn every_flipped_byte_is_found_and_named() {
    let scratch = Scratch::new("flip");
    let path = scratch.join("repo");
    two_backups(&path);
    assert_eq!(examine(&path).unwrap(), []);
    let image = image_of(&path);
    let place = scratch.join("flipped");
    materialise(&image, &place);
    let mut noise = Noise::new(22);
    for (name, content) in &image {
        // Heads and tails are dense with meaning; the middle is sampled.
        let dense = (0..content.len()).filter(|n| *n < 256 || *n + 200 > content.len());
        let sparse = (0..60).map(|_| noise.below(content.len() as u64) as usize).collect::<Vec<_>>();
        for at in dense.step_by(3).chain(sparse) {
            let mut bytes = content.clone();
            bytes[at] ^= 1 << (at % 8);
            std::fs::write(place.join(name), &bytes).unwrap();
            match examine(&place) {
                Err(e) => assert!(name.ends_with("repository"), "{} byte {at}: {e}", name.display()),
                Ok(found) => {
                    let named = found.iter().any(|d| match d {
                        Damage::Repository { file } => file == name,
                        Damage::Manifest { backup } => {
                            *name == Path::new("manifests").join(format!("{backup}.manifest"))
                        }
                        _ => false,
                    });
                    assert!(named, "{} byte {at}: {found:?}", name.display());
                }
            }
        }
        std::fs::write(place.join(name), content).unwrap();
        // Cut short, and empty.
        for length in [0, content.len() / 2, content.len() - 1] {
            std::fs::write(place.join(name), &content[..length]).unwrap();
            assert!(examine(&place).map_or(true, |found| !found.is_empty()), "{} cut", name.display());
        }
        std::fs::write(place.join(name), content).unwrap();
    }
}

/// The largest stored-as-is frame begins at a chunk: flipping a byte there hits known bytes of the disk.
#[test]
fn verify_names_backup_disk_and_offset() {
    let scratch = Scratch::new("offset");
    let path = scratch.join("repo");
    let (sealed, _) = two_backups(&path);
    let wanted = Noise::new(21);
    // The noise of the disk, as it was put at block 100 after the text.
    let mut again = wanted;
    again.text(300 << 10);
    let noise_bytes = again.bytes(100 << 10);
    let needle = &noise_bytes[50_000..50_064];
    let (name, at) = image_of(&path)
        .into_iter()
        .filter(|(name, _)| name.starts_with("packs"))
        .find_map(|(name, content)| {
            content.windows(needle.len()).position(|w| w == needle).map(|at| (name, at))
        })
        .expect("noise is stored as it is");
    let mut bytes = std::fs::read(path.join(&name)).unwrap();
    bytes[at] ^= 0x10;
    std::fs::write(path.join(&name), bytes).unwrap();
    let repository = Repository::open(&path, Options::default()).unwrap();
    let bad = (100 << 12) + 50_000;
    let report = repository.verify(sealed[0].id, Depth::Deep, &Progress::new()).unwrap();
    let [finding] = &report.findings[..] else { panic!("{report:?}") };
    let Damage::Disk { backup, disk, at_bytes, length_bytes } = &finding.damage else {
        panic!("{finding:?}")
    };
    assert_eq!((*backup, disk.as_str()), (sealed[0].id, "data"));
    assert!((*at_bytes..at_bytes + length_bytes).contains(&bad) && *length_bytes <= 64 << 10, "{finding:?}");
    assert!(repository.verify(sealed[0].id, Depth::Shallow, &Progress::new()).unwrap().is_clean());
    // Reading there fails, beside it works, and a restore says where.
    let view = repository.disk(&sealed[0], "data").unwrap();
    lane::block_on(async {
        let mut sector = [0; 512];
        let there = view.read(Sector(bad / 512), &SegmentsMut::new(&mut sector)).await;
        assert!(matches!(there, Err(DiskError::Medium(_))), "{there:?}");
        view.read(Sector(0), &SegmentsMut::new(&mut sector)).await.unwrap();
    });
    let out = scratch.join("out.raw");
    let failed = repository.restore_to_raw(&sealed[0], "data", &out, &Progress::new()).unwrap_err();
    assert!(matches!(&failed, Error::Damaged { disk, .. } if disk == "data"), "{failed}");
    assert!(!out.exists(), "no half disk is left");
}

#[test]
fn a_lost_pack_is_named_by_place_and_stored_again() {
    let scratch = Scratch::new("lost");
    let path = scratch.join("repo");
    let (sealed, disk) = two_backups(&path);
    let packs: Vec<PathBuf> = image_of(&path).into_keys().filter(|n| n.starts_with("packs")).collect();
    std::fs::remove_file(path.join(&packs[0])).unwrap();
    let repository = Repository::open(&path, Options::default()).unwrap();
    for depth in [Depth::Shallow, Depth::Deep] {
        let report = repository.check(depth, &Progress::new()).unwrap();
        assert!(!report.is_clean(), "{depth:?}");
    }
    assert!(repository.prune(false, &Progress::new()).is_err(), "what is needed is not known");
    // A full read heals what is still on the disk.
    let healed = lane::block_on(
        repository.backup(plan(vec![source("data", disk.freeze() as _, None)], None), &Progress::new()),
    );
    let healed = healed.unwrap();
    assert!(repository.verify(healed.id, Depth::Deep, &Progress::new()).unwrap().is_clean());
    for manifest in &sealed {
        let _ = repository.verify(manifest.id, Depth::Deep, &Progress::new()).unwrap();
    }
}

#[test]
fn what_rotted_is_repaired_by_what_is_still_on_the_disk() {
    let scratch = Scratch::new("repair");
    let path = scratch.join("repo");
    let (sealed, disk) = two_backups(&path);
    let repository = Repository::open(&path, Options::default()).unwrap();
    assert_eq!(repository.repair(&Progress::new()).unwrap(), Default::default(), "nothing to do");
    let mut noise = Noise::new(24);
    let full = |base: Option<BackupId>| {
        let mut source = source("data", disk.freeze() as _, None);
        source.trust = backup::Trust::Never;
        lane::block_on(repository.backup(plan(vec![source], base), &Progress::new())).unwrap()
    };
    let newest = full(Some(sealed[1].id));
    // Each pack in turn, at a place of its own.
    for name in image_of(&path).into_keys().filter(|n| n.starts_with("packs")) {
        let mut bytes = std::fs::read(path.join(&name)).unwrap();
        let at = noise.below(bytes.len() as u64) as usize;
        bytes[at] ^= 4;
        std::fs::write(path.join(&name), bytes).unwrap();
        let repository = Repository::open(&path, Options::default()).unwrap();
        let repaired = repository.repair(&Progress::new()).unwrap();
        assert_eq!(repaired.set_aside, [name.with_extension("damaged")]);
        let made = full(Some(newest.id));
        let again = Repository::open(&path, Options::default()).unwrap();
        let report = again.verify(made.id, Depth::Deep, &Progress::new()).unwrap();
        assert!(report.is_clean(), "{} byte {at}: {:?}", name.display(), report.findings);
        let report = again.verify(newest.id, Depth::Deep, &Progress::new()).unwrap();
        // The same disk: its data is back, unless nodes of its tree were lost, which say which data that is.
        let lost = report.findings.iter().map(|f| match &f.damage {
            Damage::Disk { length_bytes, .. } => *length_bytes,
            other => panic!("{other}"),
        });
        assert!(
            lost.sum::<u64>() == 0
                || !again.verify(newest.id, Depth::Shallow, &Progress::new()).unwrap().is_clean()
        );
    }
    for manifest in &sealed {
        // Older states lost what the disk no longer holds, and say so; nothing is made up.
        let report = repository.verify(manifest.id, Depth::Deep, &Progress::new()).unwrap();
        assert!(
            report.findings.iter().all(|f| matches!(&f.damage, Damage::Disk { .. } | Damage::File { .. }))
        );
    }
}

#[test]
fn an_incremental_on_a_damaged_base_reads_everything() {
    let scratch = Scratch::new("bad-base");
    let path = scratch.join("repo");
    let (sealed, disk) = two_backups(&path);
    let image = image_of(&path);
    let repository = || Repository::open(&path, Options::default()).unwrap();
    let next = |base: &Manifest| {
        let cut = TrackedDisk::generation(9);
        let source = source("data", disk.freeze() as _, Some(cut));
        lane::block_on(repository().backup(plan(vec![source], Some(base.id)), &Progress::new())).unwrap()
    };
    // The manifest itself, then every pack (and with one of them, nodes of the tree).
    let manifest = Path::new("manifests").join(format!("{}.manifest", sealed[1].id));
    let packs = image.keys().filter(|n| n.starts_with("packs")).cloned();
    for name in packs.chain([manifest]) {
        materialise(&image, &path);
        let mut bytes = image[&name].clone();
        if name.starts_with("packs") {
            std::fs::remove_file(path.join(&name)).unwrap();
        } else {
            bytes[120] ^= 1;
            std::fs::write(path.join(&name), &bytes).unwrap();
        }
        let made = next(&sealed[1]);
        let view = repository().disk(&made, "data").unwrap();
        let mut found = vec![0; view.shape().bytes() as usize];
        let read = lane::block_on(async { view.read(Sector(0), &SegmentsMut::new(&mut found)).await });
        // Data that only the base had, in areas that did not change, is not read again: that is told, not hidden.
        if read.is_ok() {
            assert!(found == disk.to_bytes());
        } else {
            assert!(!repository().verify(made.id, Depth::Shallow, &Progress::new()).unwrap().is_clean());
        }
    }
}

/// Writes a head's fields again with a valid checksum.
fn patch_head(path: &Path, at: usize, bytes: &[u8]) {
    let mut content = std::fs::read(path).unwrap();
    content[at..at + bytes.len()].copy_from_slice(bytes);
    content[20..24].fill(0);
    let crc = crc32c::crc32c(&content[..96]);
    content[20..24].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(path, content).unwrap();
}

#[test]
fn what_is_newer_is_refused_naming_both_versions() {
    let scratch = Scratch::new("newer");
    let path = scratch.join("repo");
    let (sealed, disk) = two_backups(&path);
    let before = image_of(&path);
    let manifest = path.join(format!("manifests/{}.manifest", sealed[0].id));
    patch_head(&manifest, 8, &7u32.to_le_bytes());
    let repository = Repository::open(&path, Options::default()).unwrap();
    let newer = repository.manifest(sealed[0].id).unwrap_err();
    assert!(matches!(newer, Error::NewerFormat { found: 7, known: 1, .. }));
    assert!(newer.to_string().contains('7') && newer.to_string().contains('1'), "{newer}");
    assert!(
        repository.prune(false, &Progress::new()).is_err(),
        "a manifest that is not understood needs its chunks"
    );
    let source = source("data", disk.freeze() as _, None);
    lane::block_on(repository.backup(plan(vec![source], Some(sealed[1].id)), &Progress::new())).unwrap();
    drop(repository);
    patch_head(&manifest, 8, &1u32.to_le_bytes());
    assert_eq!(std::fs::read(&manifest).unwrap(), before[manifest.strip_prefix(&path).unwrap()]);

    patch_head(&path.join("repository"), 12, &4u32.to_le_bytes());
    let unknown = Repository::open(&path, Options::default()).map(drop).unwrap_err();
    assert!(matches!(unknown, Error::UnknownFeatures { unknown: 4, .. }));
    patch_head(&path.join("repository"), 12, &0u32.to_le_bytes());
    patch_head(&path.join("repository"), 16, &4u32.to_le_bytes());
    Repository::open(&path, Options::default()).unwrap();
    patch_head(&path.join("repository"), 8, &2u32.to_le_bytes());
    let newer = Repository::open(&path, Options::default()).map(drop).unwrap_err();
    assert!(matches!(newer, Error::NewerFormat { found: 2, known: 1, .. }), "{newer}");
}

#[test]
fn foreign_directories_are_left_alone() {
    let scratch = Scratch::new("foreign");
    let missing = Repository::open(&scratch.join("none"), Options::default()).map(drop).unwrap_err();
    assert!(matches!(missing, Error::NotARepository { .. }));
    std::fs::write(scratch.join("letter.txt"), "dear").unwrap();
    let there = Repository::create(scratch.path(), Options::default()).map(drop).unwrap_err();
    assert!(matches!(there, Error::Exists { .. }));
    let path = scratch.join("repo");
    Repository::create(&path, Options::default()).unwrap();
    assert!(matches!(Repository::create(&path, Options::default()), Err(Error::Exists { .. })));
    let repository = Repository::open(&path, Options::default()).unwrap();
    assert!(matches!(repository.resolve("latest"), Err(Error::NoBackup { .. })));
    assert!(matches!(repository.resolve("0192"), Err(Error::NoBackup { .. })));
}

/// Replays the fuzzer's entry over seeded mutations of real manifests and nodes.
#[test]
fn fuzz_hostile_manifests_are_refused() {
    let scratch = Scratch::new("hostile");
    let path = scratch.join("repo");
    two_backups(&path);
    let manifests: Vec<Vec<u8>> =
        image_of(&path).into_iter().filter(|(n, _)| n.starts_with("manifests")).map(|(_, c)| c).collect();
    let rounds = if std::env::var_os("KAGAMI_SOAK").is_some() { 200_000 } else { 4_000 };
    let mut noise = Noise::new(23);
    for round in 0..rounds {
        let mut bytes = manifests[round % manifests.len()].clone();
        if round % 3 > 0 {
            bytes.drain(..96); // the body alone, which no hash protects
        }
        for _ in 0..=noise.below(4) {
            let at = noise.below(bytes.len() as u64) as usize;
            match noise.below(4) {
                0 => bytes[at] = noise.next() as u8,
                1 => drop(bytes.splice(at..at, b"99999999999999999999".iter().copied())),
                2 => drop(bytes.drain(at..(at + noise.below(40) as usize).min(bytes.len()))),
                _ => bytes[at] = b"0123456789{}[]\",:-"[noise.below(18) as usize],
            }
            if bytes.is_empty() {
                break;
            }
        }
        backup::fuzz_manifest(&bytes);
        // As a node: level, entries of each kind, runs that lie.
        let mut node = vec![noise.below(8) as u8];
        for _ in 0..32 {
            match noise.below(3) {
                0 => node.push(0),
                1 => {
                    node.push(1);
                    node.extend(noise.bytes(32));
                }
                _ => {
                    let runs = 1 + noise.below(4) as u8;
                    node.extend([2, runs]);
                    for run in 0..runs {
                        let pieces = if noise.below(3) == 0 {
                            noise.below(20) as u8
                        } else {
                            16 / runs + u8::from(run == 0) * (16 % runs)
                        };
                        node.extend([pieces, noise.below(2) as u8, noise.below(3) as u8, 0]);
                        node.extend(noise.bytes(32));
                    }
                }
            }
        }
        backup::fuzz_manifest(&node);
    }
}

#[test]
fn a_backup_is_found_by_what_names_it() {
    let scratch = Scratch::new("names");
    let path = scratch.join("repo");
    let (sealed, _) = two_backups(&path);
    let repository = Repository::open(&path, Options::default()).unwrap();
    let id = |text: &str| repository.resolve(text).map_err(|e| e.to_string());
    assert_eq!(id("latest"), Ok(sealed[1].id));
    assert_eq!(id("vm@latest"), Ok(sealed[1].id));
    assert!(id("other@latest").is_err());
    assert_eq!(id(&sealed[0].id.to_string()), Ok(sealed[0].id));
    assert!(matches!(
        repository.resolve(&sealed[0].id.to_string()[..4]),
        Err(Error::Ambiguous { count: 2, .. })
    ));
    let nobody = BackupId(uuid::Uuid::nil());
    assert!(matches!(repository.manifest(nobody), Err(Error::NoBackup { .. })));
    assert!(matches!(sealed[0].disk("c"), Err(Error::NoMember { what: "disk", .. })));
}
