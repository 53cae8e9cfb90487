//! What has to hold for each image that a power loss may leave.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::super::datastore::{MIB, read};
use super::bench::{Bench, History, Thing, Tree, Wrote};
use crate::check::{Options, Report, Severity};
use crate::format::InodeKind;
use crate::{File, Mode, Volume, check};
use block::crash::CrashLog;
use block::{Disk, Image, MemoryDisk};

/// The whole tree as the volume has it.
pub async fn tree_of(volume: &Volume) -> Tree {
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
                InodeKind::Symlink => Thing::Link(volume.read_link(&path).await.unwrap()),
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
    let settled = done.map_or(&history.first, |c| &c.after);
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
    check(vec![disk], Options { repair_leaks, ..Options::default() }).await.unwrap()
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

/// Where power is lost, and what of the unflushed is kept.
pub struct Cuts {
    first: usize,
    step: usize,
    /// Fates drawn at each point, beside "all lost" and "all kept".
    drawn: u64,
    /// The volume lives on after every so many cuts, of so many fates of each point.
    second: (usize, usize),
}

impl Cuts {
    /// At every point.
    pub fn everywhere() -> Self {
        Self::share(0, 1)
    }

    /// One of `shares` parts of all points.
    pub fn share(number: u64, shares: u64) -> Self {
        Self { first: number as usize, step: shares as usize, drawn: 1, second: (23, usize::MAX) }
    }

    /// Every point, with many fates; the recovery of the first three is cut again at every point.
    pub fn soak(drawn: u64) -> Self {
        Self { first: 0, step: 1, drawn, second: (1, 3) }
    }

    /// Other fates at neighbouring points: no kind of loss is left out for long.
    fn fates(&self, point: usize) -> impl Iterator<Item = u64> {
        let drawn = (0..self.drawn).map(move |n| 2 + (point as u64 + n) % self.drawn.max(4));
        [0, 1].into_iter().chain(drawn)
    }
}

/// Cuts; the first fault ends it.
pub async fn cut_everywhere(bench: &Bench, cuts: &Cuts) -> Result<usize, String> {
    let mut done = 0;
    let history = bench.history.take();
    for point in (cuts.first..=bench.log.points()).step_by(cuts.step) {
        let (every, of) = cuts.second;
        for (nth, fate) in cuts.fates(point).enumerate() {
            let image = bench.log.cut(point, fate).remove(0);
            judge(&history, &image, point).await.map_err(|e| format!("point {point} fate {fate}: {e}"))?;
            if nth < of && done % every == 0 {
                let second = judge_second_life(&image, fate).await;
                second.map_err(|e| format!("point {point} fate {fate}: {e}"))?;
            }
            done += 1;
        }
    }
    Ok(done)
}
