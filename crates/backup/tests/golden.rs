//! The repository of format 1 that lies in the tree: made once, opened for ever.
#![allow(clippy::unwrap_used)] // a test says by it what must hold

mod common;

use std::path::{Path, PathBuf};

use backup::{Depth, Label, Mode, Options, Progress, Repository};
use block::{Disk, Sector, SegmentsMut};
use common::power::{image_of, materialise};
use common::{Noise, Scratch, TrackedDisk, plan, source};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/format-1")
}

/// The two states of the disk that the golden repository holds.
fn states() -> [std::rc::Rc<TrackedDisk>; 2] {
    let mut noise = Noise::new(41);
    let disk = TrackedDisk::new((3 << 20) / 512 + 5);
    disk.put(0, &noise.text(40 << 10));
    disk.put(300, &noise.bytes(8 << 10));
    let first = disk.freeze();
    disk.cut();
    disk.put(3, &noise.bytes(4096));
    disk.put(768, &noise.text(2048));
    disk.clear(301, 1);
    [first, disk]
}

/// Makes the golden repository: once per format, by hand, with KAGAMI_GOLDEN=1.
fn make() {
    let path = golden();
    let _ = std::fs::remove_dir_all(&path);
    let repository = Repository::create(&path, Options::default()).unwrap();
    let mut base = None;
    for (n, disk) in states().into_iter().enumerate() {
        let cut = TrackedDisk::generation(1 + n as u64);
        let mut plan = plan(vec![source("data", disk as _, Some(cut))], base);
        plan.label = Label::Filesystem;
        plan.audit.share = 0.0;
        base = Some(lane::block_on(repository.backup(plan, &Progress::new())).unwrap().id);
    }
    std::fs::remove_file(path.join("lock")).unwrap();
}

#[test]
fn format_1_opens() {
    if std::env::var_os("KAGAMI_GOLDEN").is_some() {
        make();
    }
    // A copy: opening writes nothing, but the next backup does.
    let scratch = Scratch::new("golden");
    let path = scratch.join("repo");
    let image = image_of(&golden());
    materialise(&image, &path);
    let repository = Repository::open(&path, Options::default()).unwrap();
    let listed = repository.list().unwrap();
    assert_eq!(listed.len(), 2);
    let manifests: Vec<_> = listed.into_iter().map(|l| l.manifest.unwrap()).collect();
    assert_eq!((manifests[1].base, manifests[1].label), (Some(manifests[0].id), Label::Filesystem));
    assert_eq!((manifests[0].disks[0].mode, manifests[1].disks[0].mode), (Mode::Full, Mode::Incremental));
    for (manifest, disk) in manifests.iter().zip(states()) {
        let view = repository.disk(manifest, "data").unwrap();
        let mut bytes = vec![1; view.shape().bytes() as usize];
        lane::block_on(async { view.read(Sector(0), &SegmentsMut::new(&mut bytes)).await }).unwrap();
        assert!(bytes == disk.to_bytes());
        assert_eq!(repository.file(manifest, "vm.vmx").unwrap(), b"displayName = \"vm\"\n");
    }
    assert!(repository.check(Depth::Deep, &Progress::new()).unwrap().is_clean());
    assert_eq!(image_of(&path), image, "opening and reading changed nothing");
    let [_, disk] = states();
    let plan = plan(vec![source("data", disk as _, Some(TrackedDisk::generation(2)))], Some(manifests[1].id));
    lane::block_on(repository.backup(plan, &Progress::new())).unwrap();
    repository.remove(manifests[0].id).unwrap();
    repository.prune(false, &Progress::new()).unwrap();
    assert!(repository.check(Depth::Deep, &Progress::new()).unwrap().is_clean());
}
