//! Commands on files and devices, without the daemon: what they find, what they mend, what they leave sparse, and which
//! files belong together.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::SystemTime;

use block::{Disk, MemoryDisk, Safe, Sector, Segments, SegmentsMut};
use serde_json::Value;
use vmfs::format::{InodeKind, SystemFile, Zla};
use vmfs::{Content, Layout, Mode, NewFile, NewVolume, Volume};

use crate::common::wire::{content, write_noise};
use crate::common::{Place, both, skip};
use editor::Editor;

#[allow(dead_code, missing_docs)] // the tests of vmfs use the rest
#[path = "../../../vmfs/tests/common/editor.rs"]
mod editor;
#[allow(dead_code, missing_docs)] // the tests of vmfs use the rest
#[path = "../../../vmfs/tests/common/genuine.rs"]
mod genuine;

const MIB: u64 = 1 << 20;

/// What those run their disks in memory with: these never wait.
fn at_once<F: Future>(work: F) -> F::Output {
    match pin!(work).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("a disk in memory never waits"),
    }
}

/// Changes structures on a volume in a file, behind everybody's back.
fn behind(image: &Path, change: impl FnOnce(&Editor)) {
    let editor = Editor::new(genuine::load(image));
    change(&editor);
    genuine::store(&editor.disk, image);
}

/// Runs a check that must end with this code; what it found.
fn checked(place: &Place, code: i32, words: &[&str]) -> Value {
    let out = place.run(&[words, &["-o", "json"]].concat());
    assert_eq!(out.status.code(), Some(code), "{words:?}\n{}", both(&out));
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{words:?}: {e}\n{}", both(&out)))
}

/// All bytes of a file, and when it was written last.
fn state(path: &Path) -> (blake3::Hash, SystemTime) {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path).unwrap()).unwrap();
    (hasher.finalize(), std::fs::metadata(path).unwrap().modified().unwrap())
}

/// Bytes that differ everywhere.
fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    std::iter::repeat_with(|| random.u8(1..)).take(bytes).collect()
}

#[test]
fn check_ends_with_a_code_of_its_own_and_repair_mends_leaks_only() {
    let place = Place::new("verdicts");
    let image = place.dir().join("v.img");
    place.ok(&["vmfs", "create", "v.img", "--size", "1G"]);
    std::fs::write(place.dir().join("data"), noise(300_000, 1)).unwrap();
    place.ok(&["vmfs", "cp", "data", "v.img:/data"]);
    let clean = checked(&place, 0, &["vmfs", "check", "v.img"]);
    assert!(clean["verdict"] == "clean" && clean["findings"].as_array().unwrap().is_empty(), "{clean}");

    // A leak: found, left alone, given back when that is asked for.
    behind(&image, |e| e.mark(e.free_one(SystemFile::FileBlocks), false));
    let before = state(&image);
    for words in [&["vmfs", "check", "v.img"][..], &["vmfs", "check", "v.img", "--repair", "-n"]] {
        let leaks = checked(&place, 3, words);
        assert!(leaks["verdict"] == "leaks" && leaks["findings"].as_array().unwrap().len() == 1, "{leaks}");
        assert!(state(&image) == before, "{words:?} wrote");
    }
    let repaired = checked(&place, 0, &["vmfs", "check", "v.img", "--repair"]);
    assert_eq!(repaired["repaired"].as_array().unwrap().len(), 1, "{repaired}");
    assert!(state(&image).0 != before.0);
    checked(&place, 0, &["vmfs", "check", "v.img"]);

    // Damage: never written to, whatever is asked for; a leak beside it does not change that.
    behind(&image, |e| {
        let file = e.find(InodeKind::File, Zla::FileBlocks, |_| true);
        e.mark(e.numbered(e.used_slot(file).1), true);
        e.mark(e.free_one(SystemFile::SubBlocks), false);
    });
    let before = state(&image);
    for words in [&["vmfs", "check", "v.img"][..], &["vmfs", "check", "v.img", "--repair"]] {
        let corrupt = checked(&place, 2, words);
        assert_eq!(corrupt["verdict"], "corrupt", "{corrupt}");
        assert!(corrupt["repaired"].as_array().unwrap().is_empty(), "{corrupt}");
        assert!(state(&image) == before, "{words:?} wrote");
    }
    // Could not be checked: no volume, no file, no such option.
    std::fs::write(place.dir().join("other"), noise(2 << 20, 2)).unwrap();
    for words in [&["vmfs", "check", "nothing"][..], &["vmfs", "check", "v.img", "--nonsense"]] {
        place.fails(1, words);
    }
    assert_ne!(place.run(&["vmfs", "check", "other"]).status.code(), Some(0));
}

/// Two files hold the same bytes.
fn same(a: &Path, b: &Path) -> bool {
    let (a, b) = (File::open(a).unwrap(), File::open(b).unwrap());
    let bytes = a.metadata().unwrap().len();
    let piece = |file: &File, at: u64| {
        let mut piece = vec![0; MIB.min(bytes - at) as usize];
        file.read_exact_at(&mut piece, at).unwrap();
        piece
    };
    bytes == b.metadata().unwrap().len()
        && (0..bytes).step_by(MIB as usize).all(|at| piece(&a, at) == piece(&b, at))
}

/// Bytes that a file takes on the host.
fn taken(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn cp_keeps_holes_in_both_directions() {
    let place = Place::new("sparse");
    let at = |name: &str| place.dir().join(name);
    place.ok(&["vmfs", "create", "v.img", "--size", "1G"]);
    let source = File::create(at("source")).unwrap();
    source.set_len(300 * MIB + 5).unwrap();
    // Blocks 0, 100, 299 and 300 have data; 10 and 11 are zeroes that were written.
    for (from, bytes) in [(0, 4096), (100 * MIB + 12_345, 70_000), (300 * MIB - 3, 8)] {
        source.write_all_at(&noise(bytes, from), from).unwrap();
    }
    source.write_all_at(&vec![0; 2 << 20], 10 * MIB).unwrap();
    let before = taken(&at("v.img"));
    place.ok(&["vmfs", "cp", "source", "v.img:/thin"]);
    let entry = place.json(&["vmfs", "stat", "v.img", "/thin"]);
    assert_eq!(
        (&entry["size_bytes"], &entry["allocated_bytes"]),
        (&(300 * MIB + 5).into(), &(4 * MIB).into())
    );
    let grown = taken(&at("v.img")) - before;
    assert!((3 * MIB..5 * MIB).contains(&grown), "the image has grown by {grown}");

    // Over a file that is there, longer and without holes.
    std::fs::write(at("back"), vec![0xFF; 310 << 20]).unwrap();
    place.ok(&["vmfs", "cp", "v.img:/thin", "back"]);
    assert!(same(&at("source"), &at("back")));
    let back = taken(&at("back"));
    assert!(back <= 4 * MIB + 65_536, "{back} bytes for 4 blocks");
    let file = File::open(at("back")).unwrap();
    let data = |from| rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(from)).unwrap();
    assert_eq!((data(MIB), data(101 * MIB)), (100 * MIB, 299 * MIB), "holes between the blocks");

    // Nothing but a hole; and a file that fits a descriptor.
    File::create(at("hole")).unwrap().set_len(5 << 30).unwrap();
    place.ok(&["vmfs", "cp", "hole", "v.img:/hole"]);
    assert_eq!(place.json(&["vmfs", "stat", "v.img", "/hole"])["allocated_bytes"], 0);
    std::fs::write(at("few"), b"few").unwrap();
    place.ok(&["vmfs", "cp", "few", "v.img:/few"]);
    place.ok(&["vmfs", "cp", "v.img:/few", "few-back"]);
    assert!(same(&at("few"), &at("few-back")));
    checked(&place, 0, &["vmfs", "check", "v.img"]);
}

/// A volume of ours on two devices in files, and the content of `/across`, which lies behind the first device's end.
fn span(place: &Place) -> ([PathBuf; 2], Vec<u8>) {
    let disks = [(); 2].map(|()| Rc::new(MemoryDisk::new((1 << 30) / 512)));
    let devices = || disks.iter().map(|d| Rc::clone(d) as Rc<dyn Disk>).collect::<Vec<_>>();
    let across = noise(24 << 20, 3);
    lane::block_on(async {
        vmfs::create(devices(), &NewVolume::new("span", 2, SystemTime::now())).await.unwrap();
        let volume = Volume::open(devices(), Mode::Write).await.unwrap();
        // The first device is full but for a few blocks.
        let free = volume.free().await.unwrap().blocks;
        let second = disks[1].shape().bytes() / (256 * MIB) * 256 - 256;
        let thick = NewFile { length: (free - second - 8) * MIB, layout: Layout::LazyZeroed, grows_to: 0 };
        volume.create_file("filler", thick).await.unwrap();
        let new = NewFile { length: across.len() as u64, layout: Layout::Thin, grows_to: 0 };
        let file = volume.create_file("across", new).await.unwrap();
        let allocation = file.allocate(Sector(0), across.len() as u64 / 512).await.unwrap();
        let mut on = [0; 2];
        for part in allocation.places() {
            let Content::Data { device, at } = part.content else { panic!("{part:?}") };
            let bytes = &across[(part.at.0 * 512) as usize..][..(part.count * 512) as usize];
            disks[device].write(at, &Segments::new(bytes), Safe::AtNextFlush).await.unwrap();
            on[device] += part.count;
        }
        assert!(on[1] > 0, "on the second device: {on:?}");
        allocation.commit().unwrap();
        volume.close().await.unwrap();
    });
    let files = ["first.img", "second.img"].map(|name| place.dir().join(name));
    for (disk, file) in disks.iter().zip(&files) {
        genuine::store(disk, file);
    }
    (files, across)
}

#[test]
fn a_span_is_named_by_all_its_devices() {
    let place = Place::new("span");
    let (files, across) = span(&place);
    let [first, second] = files.each_ref().map(|f| f.to_str().unwrap());
    for [a, b] in [[first, second], [second, first]] {
        let volume = place.json(&["vmfs", "stat", a, b]);
        assert!(volume["devices"] == 2 && volume["name"] == "span", "{volume}");
        let cat = place.run(&["vmfs", "cat", a, b, "/across"]);
        assert!(cat.status.success() && cat.stdout == across, "{a} {b}");
        assert_eq!(place.json(&["vmfs", "ls", a, b, "/across"])[0]["size_bytes"], across.len());
        checked(&place, 0, &["vmfs", "check", a, b]);
    }
    for one in [first, second] {
        let text = place.refuses(2, "KGM-VFS-0003", &["vmfs", "ls", one]);
        assert!(text.contains("all devices"), "{text}");
        assert_ne!(place.run(&["vmfs", "check", one]).status.code(), Some(0));
    }

    // And the one that ESXi made.
    for version in ["5", "6"] {
        let [Some(a), Some(b)] = [0, 1].map(|n| genuine::path(&format!("vmfs/span/vmfs{version}-span-{n}")))
        else {
            return;
        };
        let [a, b] = [a.to_str().unwrap(), b.to_str().unwrap()];
        for [a, b] in [[a, b], [b, a]] {
            let volume = place.json(&["vmfs", "stat", a, b]);
            assert!(volume["devices"] == 2 && volume["size_bytes"] == 4_u64 << 30, "{volume}");
            let list = place.json(&["vmfs", "ls", a, b]);
            assert!(list.as_array().unwrap().iter().any(|e| e["name"] == ".fbb.sf"), "{list}");
        }
        place.refuses(2, "KGM-VFS-0003", &["vmfs", "ls", b]);
        if version == "5" {
            checked(&place, 0, &["vmfs", "check", a, b]);
        }
    }
}

#[test]
fn a_pools_other_files_are_found_next_to_the_one_named() {
    let place = Place::new("neighbours");
    let at = |name: &str| place.dir().join(name).display().to_string();
    place.ok(&["pool", "create", "p1", &at("x.pool"), &at("y.pool"), "--size", "640M"]);
    // Others lie there too: another pool, and something that is none.
    place.ok(&["pool", "create", "p2", &at("a.pool"), "--size", "256M"]);
    std::fs::write(at("b.pool"), noise(1 << 20, 4)).unwrap();
    place.ok(&["datastore", "create", "ds1", "--size", "1G", "--pool", "p1"]);
    place.ok(&["vm", "create", "sql01", "--datastore", "ds1", "--disk", "64M"]);
    place.ok(&["export", "start", "sql01/scsi0:0"]);
    write_noise(&place, "sql01/scsi0:0", 64, 5);
    let before = content(&place, "sql01/scsi0:0");
    place.ok(&["serve", "--stop"]);
    let flat = "/sql01/sql01-flat.vmdk";
    let reads = |file: &str| {
        let image = format!("{}:ds1", at(file));
        assert!(place.run(&["vmfs", "cat", &image, flat]).stdout == before, "{file}");
        let holds = place.json(&["inspect", &at(file)])["holds"].to_string();
        assert!(holds.contains("LUN ds1"), "{file}: {holds}");
    };
    for file in ["x.pool", "y.pool"] {
        reads(file);
    }
    // The name says nothing, the place does.
    std::fs::create_dir(at("away")).unwrap();
    std::fs::rename(at("y.pool"), at("away/y.pool")).unwrap();
    for file in ["x.pool", "away/y.pool"] {
        let text = place.refuses(2, "KGM-POL-0008", &["vmfs", "ls", &format!("{}:ds1", at(file))]);
        assert!(text.contains("the pool has 2 media"), "{text}");
    }
    std::fs::rename(at("away/y.pool"), at("zz")).unwrap();
    reads("x.pool");
    reads("zz");
}

/// Marks a free block of the datastore's volume as used, as a program with a bug would.
async fn leak(lun: &dyn Disk) {
    let copy = Rc::new(MemoryDisk::new(lun.shape().sectors));
    for at in (0..lun.shape().sectors).step_by(2048) {
        let mut bytes = vec![0; (2048 * 512).min(((lun.shape().sectors - at) * 512) as usize)];
        lun.read(Sector(at), &SegmentsMut::new(&mut bytes)).await.unwrap();
        if !lane::memory::is_zero(&bytes) {
            copy.write(Sector(at), &Segments::new(&bytes), Safe::AtNextFlush).await.unwrap();
        }
    }
    let editor = Editor::new(copy);
    let block = editor.free_one(SystemFile::FileBlocks);
    editor.mark(block, false);
    let at = editor.cluster_at(SystemFile::FileBlocks, block.1) + 512;
    let (at, bytes) = (Sector::at_byte(0x110_0000 + at), editor.bytes(at, 512));
    lun.write(at, &Segments::new(&bytes), Safe::AtNextFlush).await.unwrap();
    lun.flush().await.unwrap();
}

#[test]
fn a_check_of_a_datastore_tells_leaks_by_its_code() {
    let place = Place::new("leaked");
    place.ok(&["pool", "create", "p1", "--size", "2G"]);
    place.ok(&["datastore", "create", "ds1", "--size", "1G"]);
    let check = ["datastore", "check", "ds1"];
    checked(&place, 0, &check);
    place.offline("p1", async |pool| leak(&*pool.lun("ds1").unwrap()).await);
    for _ in 0..2 {
        let found = checked(&place, 3, &check);
        assert_eq!(found["verdict"], "leaks", "it was closed well, so opening does not look: {found}");
    }
    // What a daemon leaves that was killed, its next opening looks for, and gives back everything it finds.
    place.ok(&["disk", "create", "ds1:d/d.vmdk", "--size", "8M"]);
    place.kill_daemon();
    checked(&place, 0, &check);
}

/// A file as a block device; gone when dropped.
struct Loop {
    device: String,
}

impl Loop {
    fn new(place: &Place, name: &str, bytes: u64) -> Option<Self> {
        let file = place.dir().join(name);
        File::create(&file).unwrap().set_len(bytes).unwrap();
        let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
        let mut command = std::process::Command::new("losetup");
        let made = command.args(["--show", "-f"]).arg(&file).env("PATH", path).output().ok()?;
        let device = String::from_utf8(made.stdout).ok()?.trim().to_owned();
        made.status.success().then_some(Self { device })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["-d", &self.device]).status();
    }
}

#[test]
fn block_devices_hold_volumes_and_pools() {
    let place = Place::new("devices");
    let (Some(volume), Some(pool)) = (Loop::new(&place, "v", 1 << 30), Loop::new(&place, "p", 2 << 30))
    else {
        return skip("a loop device: needs root and the loop driver");
    };
    let (volume, pool) = (volume.device.as_str(), pool.device.as_str());
    let made = place.json(&["vmfs", "create", volume, "--label", "on-a-device"]);
    assert!(made["size_bytes"].as_u64().unwrap() >= 768 * MIB, "{made}");
    place.refuses(5, "KGM-VFS-0011", &["vmfs", "create", volume]);
    std::fs::write(place.dir().join("data"), noise(3 << 20, 6)).unwrap();
    place.ok(&["vmfs", "cp", "data", &format!("{volume}:/data")]);
    place.ok(&["vmfs", "cp", &format!("{volume}:/data"), "back"]);
    assert!(same(&place.dir().join("data"), &place.dir().join("back")));
    assert_eq!(place.json(&["vmfs", "stat", volume])["name"], "on-a-device");
    checked(&place, 0, &["vmfs", "check", volume]);

    place.ok(&["pool", "create", "p1", pool]);
    place.ok(&["datastore", "create", "ds1", "--size", "1G"]);
    place.ok(&["lun", "create", "d", "--size", "32M"]);
    place.ok(&["vm", "create", "sql01", "--datastore", "ds1", "--disk", "64M", "--rdm", "d:physical"]);
    let disks = ["sql01/scsi0:0", "sql01/scsi0:1"];
    for (disk, seed) in disks.iter().zip(7..) {
        place.ok(&["export", "start", disk]);
        write_noise(&place, disk, 16, seed);
    }
    let before = disks.map(|disk| content(&place, disk));
    place.refuses(4, "KGM-IMG-0409", &["vmfs", "ls", &format!("{pool}:ds1")]);
    place.kill_daemon();
    let cat = place.run(&["vmfs", "cat", &format!("{pool}:ds1"), "/sql01/sql01-flat.vmdk"]);
    assert!(cat.stdout == before[0], "{}", String::from_utf8_lossy(&cat.stderr));
    assert_eq!(place.json(&["pool", "check", "p1"])["verdict"], "clean");
    assert_eq!(place.json(&["datastore", "check", "ds1"])["verdict"], "clean");
    assert!(disks.map(|disk| content(&place, disk)) == before);
    place.ok(&["serve", "--stop"]);
}
