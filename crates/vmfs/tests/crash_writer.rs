//! Power lost at every write: the volume is as before or after each change, flushed data reads back, the checker finds
//! leaks at most, and none any more once the volume was opened for writing.

#![allow(clippy::unwrap_used)] // a test that cannot go on panics

mod common;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use block::crash::CrashLog;
use block::{Disk, Image, MemoryDisk, Sector};
use common::datastore::{GIB, MIB, fresh, read, write};
use vmfs::check::{Options, Report, Severity};
use vmfs::format::{InodeKind, RdmRecord};
use vmfs::{File, Layout, Mode, NewFile, Rdm, Volume, faults};

/// What a name is; the whole tree is a map of paths.
#[derive(Clone, PartialEq, Debug)]
enum Thing {
    Directory,
    Small(Vec<u8>),
    Length(u64),
    Mapping(Rdm),
}

type Tree = BTreeMap<String, Thing>;

/// A change of names, on the log's clock: the tree is `before` until it begins and `after` once it has ended.
struct Change {
    begin: usize,
    end: usize,
    before: Tree,
    after: Tree,
    /// Old and new name may be there together.
    both: bool,
}

/// One sector written to a file that stays: durable at the end of the next flush.
struct Wrote {
    path: String,
    sector: u64,
    fill: u8,
    begin: usize,
    returned: bool,
    durable: Option<usize>,
}

#[derive(Default)]
struct History {
    tree: Tree,
    changes: Vec<Change>,
    writes: Vec<Wrote>,
}

/// A volume under test and what it was asked to do.
struct Bench {
    log: CrashLog,
    volume: Volume,
    history: RefCell<History>,
}

impl Bench {
    async fn new(seed: u64, base: Image, interleave: u32) -> Rc<Self> {
        let log = CrashLog::new(seed);
        log.interleave(interleave);
        let disk = log.disk_from(base);
        let volume = Volume::open(vec![disk], Mode::Write).await.unwrap();
        Rc::new(Self { log, volume, history: RefCell::default() })
    }

    async fn change(&self, both: bool, edit: impl FnOnce(&mut Tree), work: impl AsyncFnOnce(&Volume)) {
        let begin = self.log.points();
        work(&self.volume).await;
        let end = self.log.points();
        let mut history = self.history.borrow_mut();
        let before = history.tree.clone();
        edit(&mut history.tree);
        let after = history.tree.clone();
        history.changes.push(Change { begin, end, before, after, both });
    }

    async fn put(&self, path: &str, content: Vec<u8>) {
        let thing = Thing::Small(content.clone());
        self.change(
            false,
            |tree| drop(tree.insert(path.into(), thing)),
            async |v| v.write_file(path, &content).await.unwrap(),
        )
        .await;
    }

    async fn directory(&self, path: &str) {
        let edit = |tree: &mut Tree| drop(tree.insert(path.into(), Thing::Directory));
        self.change(false, edit, async |v| v.make_directory(path).await.unwrap()).await;
    }

    async fn mapping(&self, path: &str, length: u64, replace: bool) {
        let rdm = Rdm { record: RdmRecord::naa([7; 16], b"KAGAMI"), length, tail: vec![length as u8; 64] };
        let edit = |tree: &mut Tree| drop(tree.insert(path.into(), Thing::Mapping(rdm.clone())));
        let work = async |v: &Volume| match replace {
            true => v.replace_rdm(path, &rdm).await.unwrap(),
            false => v.create_rdm(path, &rdm).await.unwrap(),
        };
        self.change(false, edit, work).await;
    }

    async fn remove(&self, path: &str) {
        let edit = |tree: &mut Tree| drop(tree.remove(path));
        self.change(false, edit, async |v| v.remove(path).await.unwrap()).await;
    }

    async fn rename(&self, from: &str, to: &str, both: bool) {
        let edit = |tree: &mut Tree| {
            let below = |path: &str| path == from || path.starts_with(&format!("{from}/"));
            let (moved, rest) = std::mem::take(tree).into_iter().partition(|(path, _)| below(path));
            *tree = rest;
            let moved: Tree = moved;
            tree.extend(moved.into_iter().map(|(path, thing)| (path.replacen(from, to, 1), thing)));
        };
        self.change(both, edit, async |v| v.rename(from, to).await.unwrap()).await;
    }

    async fn file(&self, path: &str, length: u64, layout: Layout) -> File {
        let edit = |tree: &mut Tree| drop(tree.insert(path.into(), Thing::Length(length)));
        let new = NewFile { length, layout, grows_to: 0 };
        let mut file = None;
        self.change(false, edit, async |v| file = Some(v.create_file(path, new).await.unwrap())).await;
        file.unwrap()
    }

    async fn length(&self, path: &str, file: &File, length: u64) {
        let edit = |tree: &mut Tree| drop(tree.insert(path.into(), Thing::Length(length)));
        let work = async |_: &Volume| {
            file.set_length(length).await.unwrap();
            file.flush().await.unwrap();
        };
        self.change(false, edit, work).await;
    }

    async fn write(&self, path: &str, file: &File, sector: u64, count: u64, fill: u8) {
        let begin = self.log.points();
        {
            let mut history = self.history.borrow_mut();
            history.writes.extend((sector..sector + count).map(|sector| Wrote {
                path: path.into(),
                sector,
                fill,
                begin,
                returned: false,
                durable: None,
            }));
        }
        write(&self.volume, file, sector, &vec![fill; (count * 512) as usize]).await;
        let mut history = self.history.borrow_mut();
        let ours = |w: &&mut Wrote| w.begin == begin && w.path == path && w.fill == fill;
        history.writes.iter_mut().filter(ours).for_each(|w| w.returned = true);
    }

    /// Gives whole blocks back: what was written there reads as before or as zero.
    async fn release(&self, path: &str, file: &File, sector: u64, count: u64) {
        let begin = self.log.points();
        let zeroes =
            |sector| Wrote { path: path.into(), sector, fill: 0, begin, returned: true, durable: None };
        let mut written: Vec<u64> = self.history.borrow().writes.iter().map(|w| w.sector).collect();
        written.retain(|s| (sector..sector + count).contains(s));
        self.history.borrow_mut().writes.extend(written.into_iter().map(zeroes));
        let released = file.release(Sector(sector), count).await.unwrap();
        assert!(!released.is_empty());
        released.finish().unwrap();
    }

    /// Flushes; everything written to the file before is durable.
    async fn flush(&self, path: &str, file: &File) {
        let returned: Vec<bool> = self.history.borrow().writes.iter().map(|w| w.returned).collect();
        file.flush().await.unwrap();
        let now = self.log.points();
        for (wrote, returned) in self.history.borrow_mut().writes.iter_mut().zip(returned) {
            if returned && wrote.path == path && wrote.durable.is_none() {
                wrote.durable = Some(now);
            }
        }
    }
}

/// The whole tree as the volume has it.
async fn tree_of(volume: &Volume) -> Tree {
    let mut tree = Tree::new();
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        for entry in volume.list(&folder).await.unwrap() {
            let path =
                if folder.is_empty() { entry.name.clone() } else { format!("{folder}/{}", entry.name) };
            if path.ends_with(".sf") {
                continue;
            }
            let thing = match entry.kind {
                InodeKind::Directory => {
                    folders.push(path.clone());
                    Thing::Directory
                }
                InodeKind::Rdm => Thing::Mapping(volume.read_rdm(&path).await.unwrap()),
                _ if entry.name.starts_with("small") => {
                    Thing::Small(volume.read_file(&path, 4 * MIB).await.unwrap())
                }
                _ => Thing::Length(entry.length),
            };
            tree.insert(path, thing);
        }
    }
    tree
}

fn check_tree(history: &History, tree: &Tree, point: usize) -> Result<(), String> {
    let differ = |a: &Tree, b: &Tree| {
        let paths: Vec<&String> =
            a.keys().chain(b.keys()).filter(|path| a.get(*path) != b.get(*path)).collect();
        let show = |thing: Option<&Thing>| format!("{thing:?}").chars().take(60).collect::<String>();
        paths
            .iter()
            .map(|p| format!("{p}: {} but {}; ", show(a.get(*p)), show(b.get(*p))))
            .collect::<String>()
    };
    let done = history.changes.iter().rfind(|c| c.end <= point);
    let under_way = history.changes.iter().find(|c| c.begin < point && c.end > point);
    let empty = Tree::new();
    let settled = done.map_or(&empty, |c| &c.after);
    let Some(change) = under_way else {
        return if tree == settled { Ok(()) } else { Err(differ(tree, settled)) };
    };
    if *tree == change.before || *tree == change.after {
        return Ok(());
    }
    let both: Tree = change.before.clone().into_iter().chain(change.after.clone()).collect();
    if change.both && *tree == both {
        return Ok(());
    }
    Err(format!("neither {}nor {}", differ(tree, &change.before), differ(tree, &change.after)))
}

async fn check_writes(history: &History, volume: &Volume, point: usize) -> Result<(), String> {
    let mut sectors: BTreeMap<(&str, u64), Vec<&Wrote>> = BTreeMap::new();
    for wrote in history.writes.iter().filter(|w| w.begin < point) {
        sectors.entry((&wrote.path, wrote.sector)).or_default().push(wrote);
    }
    let mut open: BTreeMap<&str, Option<File>> = BTreeMap::new();
    for ((path, sector), list) in sectors {
        if !open.contains_key(path) {
            open.insert(path, volume.open_file(path).await.ok());
        }
        let durable = list.iter().rposition(|w| w.durable.is_some_and(|d| d <= point));
        let Some(file) = &open[path] else {
            if durable.is_some() {
                return Err(format!("{path} is not there, but it was written and flushed"));
            }
            continue;
        };
        let mut allowed: Vec<u8> = list[durable.unwrap_or(0)..].iter().map(|w| w.fill).collect();
        if durable.is_none() {
            allowed.push(0);
        }
        if (sector + 1) * 512 > file.length() {
            continue;
        }
        let found = read(volume, file, sector, 1).await;
        let fine = allowed.iter().any(|fill| found.iter().all(|b| b == fill));
        if !fine {
            return Err(format!("{path} sector {sector} holds {:?}, allowed {allowed:?}", &found[..4]));
        }
    }
    Ok(())
}

async fn checked(disk: Rc<dyn Disk>, repair_leaks: bool) -> Report {
    vmfs::check(vec![disk], Options { repair_leaks, ..Options::default() }).await.unwrap()
}

/// Everything that has to hold for one image.
async fn judge(history: &History, image: &Image, point: usize) -> Result<(), String> {
    let disk = Rc::new(MemoryDisk::from(image.clone()));
    let report = checked(disk.clone(), false).await;
    if report.worst() == Some(Severity::Corrupt) {
        return Err(format!("{:#?}", report.findings()));
    }
    let leaks = report.count(Severity::Leak);
    let volume = Volume::open(vec![disk.clone()], Mode::Write).await.map_err(|e| e.to_string())?;
    if leaks > 0 && volume.leaks_repaired().is_none_or(|repaired| repaired == 0) {
        return Err(format!("{leaks} leaks that opening did not see: {:#?}", report.findings()));
    }
    let report = checked(disk.clone(), false).await;
    if !report.is_clean() {
        return Err(format!("not clean after it was opened: {:#?}", report.findings()));
    }
    check_tree(history, &tree_of(&volume).await, point)?;
    check_writes(history, &volume, point).await
}

/// Life goes on after the crash: the volume is written again, with power lost at every write of that too, and the
/// leaks can be repaired.
async fn judge_second_life(image: &Image, seed: u64) -> Result<(), String> {
    let log = CrashLog::new(seed);
    let disk = log.disk_from(image.clone());
    let volume = Volume::open(vec![disk.clone()], Mode::Write).await.map_err(|e| e.to_string())?;
    if (log.points() == 0) == volume.leaks_repaired().is_some() {
        return Err(format!("opening wrote {} times, repaired {:?}", log.points(), volume.leaks_repaired()));
    }
    let before = tree_of(&volume).await;
    volume.write_file("small-after", b"after").await.map_err(|e| e.to_string())?;
    let acknowledged = log.points();
    volume.remove("small-after").await.map_err(|e| e.to_string())?;
    volume.close().await.map_err(|e| e.to_string())?;
    for point in 1..=log.points() {
        let image = log.cut(point, seed).remove(0);
        let disk = Rc::new(MemoryDisk::from(image));
        let report = checked(disk.clone(), false).await;
        if report.worst() == Some(Severity::Corrupt) {
            return Err(format!("second life, point {point}: {:#?}", report.findings()));
        }
        let again = Volume::open(vec![disk.clone()], Mode::Write).await.map_err(|e| e.to_string())?;
        let report = checked(disk.clone(), false).await;
        if !report.is_clean() {
            return Err(format!("second life, point {point}, opened: {:#?}", report.findings()));
        }
        drop(again);
        let again = Volume::open(vec![disk], Mode::Read).await.map_err(|e| e.to_string())?;
        let mut tree = tree_of(&again).await;
        let after = tree.remove("small-after");
        if tree != before || (point == acknowledged && after != Some(Thing::Small(b"after".to_vec()))) {
            return Err(format!("second life, point {point}: {tree:?}"));
        }
    }
    let closed = checked(disk.clone(), false).await;
    if !closed.findings().is_empty() {
        return Err(format!("not clean when closed: {:#?}", closed.findings()));
    }
    let volume = Volume::open(vec![disk], Mode::Read).await.map_err(|e| e.to_string())?;
    if tree_of(&volume).await != before {
        return Err("the repair changed the tree".into());
    }
    Ok(())
}

/// Cuts at every point; the first fault ends it.
async fn cut_everywhere(bench: &Bench, seeds: &[u64], step: usize) -> Result<usize, String> {
    let mut cuts = 0;
    let history = bench.history.take();
    for point in (0..=bench.log.points()).step_by(step) {
        for seed in seeds {
            let image = bench.log.cut(point, *seed).remove(0);
            judge(&history, &image, point).await.map_err(|e| format!("point {point} seed {seed}: {e}"))?;
            if (point + *seed as usize).is_multiple_of(23) {
                let second = judge_second_life(&image, *seed).await;
                second.map_err(|e| format!("point {point} seed {seed}: {e}"))?;
            }
            cuts += 1;
        }
    }
    Ok(cuts)
}

/// Every kind of change, one after the other.
async fn changes(bench: &Bench) {
    bench.directory("vm").await;
    bench.put("vm/small", b"one".to_vec()).await;
    bench.put("vm/small-sub", vec![5; 3000]).await;
    bench.put("vm/small-block", vec![6; 9000]).await;
    bench.put("vm/small", b"two".to_vec()).await;
    bench.put("vm/small-new", vec![8; 2000]).await;
    bench.rename("vm/small-new", "vm/small-sub", false).await;
    bench.mapping("vm/d-rdm.vmdk", 500 * GIB, false).await;
    bench.mapping("vm/d-rdm.vmdk", 501 * GIB, true).await;
    bench.directory("other").await;
    bench.rename("vm/small", "other/small", true).await;
    bench.put("small-x", b"x".to_vec()).await;
    bench.rename("small-x", "other/small", true).await;
    bench.rename("other", "renamed", false).await;
    bench.directory("vm/inner").await;
    bench.rename("renamed", "vm/inner/deep", true).await;
    bench.rename("vm/inner/deep", "renamed", true).await;
    bench.remove("vm/inner").await;
    let thick = bench.file("vm/thick", 3 * MIB, Layout::LazyZeroed).await;
    bench.write("vm/thick", &thick, 2048, 2, 0x77).await;
    bench.flush("vm/thick", &thick).await;
    let file = bench.file("vm/grows", 200 * MIB, Layout::Thin).await;
    bench.write("vm/grows", &file, 5, 3, 0x11).await;
    bench.flush("vm/grows", &file).await;
    bench.length("vm/grows", &file, 250 * MIB).await;
    bench.write("vm/grows", &file, 249 * 2048, 3, 0x12).await;
    bench.flush("vm/grows", &file).await;
    bench.write("vm/grows", &file, 2 * 2048 + 9, 2, 0x13).await;
    bench.flush("vm/grows", &file).await;
    bench.release("vm/grows", &file, 2048, 248 * 2048).await;
    bench.write("vm/grows", &file, 2 * 2048 + 9, 1, 0x14).await;
    bench.put("vm/small-between", vec![9; 70_000]).await;
    bench.flush("vm/grows", &file).await;
    bench.length("vm/grows", &file, 10 * MIB).await;
    bench.remove("renamed/small").await;
    bench.remove("renamed").await;
    bench.volume.settle().await.unwrap();
}

#[test]
fn changes_of_names_are_whole_after_power_loss_at_every_write() {
    lane::block_on(async {
        let base = fresh(768 * MIB).await.image();
        let bench = Bench::new(1, base, 0).await;
        changes(&bench).await;
        let soak = std::env::var_os("KAGAMI_SOAK").is_some();
        let seeds: Vec<u64> = if soak { (0..40).collect() } else { vec![0, 1] };
        let cuts = cut_everywhere(&bench, &seeds, 1).await.unwrap();
        println!("{cuts} cuts");
    });
}

/// A file gets a new descriptor because its block array is too small: the old one or the new one is the file's.
#[test]
fn a_file_outgrows_its_block_array_whole() {
    lane::block_on(async {
        let base = fresh(768 * MIB).await.image();
        let bench = Bench::new(1, base, 0).await;
        bench.put("small", vec![0x21; 512]).await;
        let file = bench.file("grows", 200 * MIB, Layout::Thin).await;
        bench.write("grows", &file, 5, 3, 0x11).await;
        bench.flush("grows", &file).await;
        for (length, sector) in [(300 * MIB, 299 * 2048), (300 * GIB, 299 * GIB / 512)] {
            bench.length("grows", &file, length).await;
            bench.write("grows", &file, sector, 3, 0x12).await;
            bench.flush("grows", &file).await;
        }
        drop(file);
        bench.remove("small").await;
        bench.volume.settle().await.unwrap();
        cut_everywhere(&bench, &[0, 1, 2, 3], 1).await.unwrap();
    });
}

/// Two growing disks with a writer each, flushing now and then, while names change: rounds are shared.
async fn busy(bench: &Rc<Bench>, seed: u64) {
    let mut tasks = Vec::new();
    for (n, layout) in [(0u64, Layout::Thin), (1, Layout::LazyZeroed)] {
        let length = if n == 0 { 300 * GIB } else { 12 * MIB };
        let path = format!("disk{n}");
        let file = bench.file(&path, length, layout).await;
        for writer in 0..2u64 {
            let (bench, file, path) = (Rc::clone(bench), file.clone(), path.clone());
            tasks.push(lane::spawn(async move {
                for step in 0..8u64 {
                    // Some share a block, some share a pointer block, some need new ones.
                    let spread = if n == 0 { (step % 3) * 3 * GIB / 512 } else { 0 };
                    let sector = spread + (step * 1500 + writer * 40 + seed) % (11 * 2048);
                    let fill = (1 + n * 100 + writer * 50 + step) as u8;
                    bench.write(&path, &file, sector, 5, fill).await;
                    if (step + writer) % 3 == 2 {
                        bench.flush(&path, &file).await;
                    }
                }
                bench.flush(&path, &file).await;
            }));
        }
    }
    for n in 0..3u8 {
        bench.put("small-vmx", vec![n; 1500]).await;
    }
    bench.remove("small-vmx").await;
    for task in tasks {
        task.await;
    }
    bench.volume.settle().await.unwrap();
}

#[test]
fn allocations_survive_power_loss_at_every_write_once_flushed() {
    lane::block_on(async {
        let base = fresh(768 * MIB).await.image();
        let soak = std::env::var_os("KAGAMI_SOAK").is_some();
        let one = std::env::var("KAGAMI_SEED").ok().and_then(|s| s.parse::<u64>().ok());
        let seeds = one.map_or(0..if soak { 30 } else { 2 }, |seed| seed..seed + 1);
        for seed in seeds {
            let bench = Bench::new(seed, base.clone(), 3).await;
            busy(&bench, seed * 7).await;
            let cuts =
                cut_everywhere(&bench, &[0, 1, 2 + seed], if soak || one.is_some() { 1 } else { 5 }).await;
            match cuts {
                Ok(cuts) => println!("seed {seed}: {cuts} cuts"),
                Err(why) => panic!("KAGAMI_SEED={seed}: {why}"),
            }
        }
    });
}

#[test]
fn a_pointer_written_before_its_bitmap_bit_is_found() {
    lane::block_on(async {
        let base = fresh(768 * MIB).await.image();
        faults::plant_pointer_before_bit(true);
        let bench = Bench::new(1, base, 3).await;
        busy(&bench, 0).await;
        let found = cut_everywhere(&bench, &[0, 1, 2], 1).await;
        faults::plant_pointer_before_bit(false);
        let why = found.expect_err("the planted fault is not found");
        assert!(why.contains("free") || why.contains("Free"), "{why}");
    });
}
