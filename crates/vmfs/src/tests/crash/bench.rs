//! A volume under test, and the record of what it was asked to do.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use super::super::datastore::write;
use super::judge::tree_of;
use crate::format::RdmRecord;
use crate::{File, Layout, Mode, NewFile, Rdm, Volume};
use block::crash::CrashLog;
use block::{Image, Sector};

/// What a name is; the whole tree is a map of paths.
#[derive(Clone, PartialEq, Debug)]
pub enum Thing {
    Directory,
    Small(Vec<u8>),
    Length(u64),
    Mapping(Rdm),
    Link(String),
}

pub type Tree = BTreeMap<String, Thing>;

/// A change of names, on the log's clock: the tree is `before` until it begins and `after` once it has ended.
pub struct Change {
    pub begin: usize,
    pub end: usize,
    pub before: Tree,
    pub after: Tree,
    /// Old and new name may be there together.
    pub both: bool,
}

/// One sector written to a file that stays: durable at the end of the next flush.
pub struct Wrote {
    pub path: String,
    pub sector: u64,
    pub fill: u8,
    pub begin: usize,
    pub returned: bool,
    pub durable: Option<usize>,
}

#[derive(Default)]
pub struct History {
    /// Before the first change.
    pub first: Tree,
    pub tree: Tree,
    pub changes: Vec<Change>,
    pub writes: Vec<Wrote>,
}

/// A volume under test and what it was asked to do.
pub struct Bench {
    pub log: CrashLog,
    pub volume: Volume,
    pub history: RefCell<History>,
}

impl Bench {
    pub async fn new(seed: u64, base: Image, interleave: u32) -> Rc<Self> {
        let log = CrashLog::new(seed);
        log.interleave(interleave);
        let disk = log.disk_from(base);
        let volume = Volume::open(vec![disk], Mode::Write).await.unwrap();
        let tree = tree_of(&volume).await;
        let history = History { first: tree.clone(), tree, ..History::default() };
        Rc::new(Self { log, volume, history: RefCell::new(history) })
    }

    pub async fn change(&self, both: bool, edit: impl FnOnce(&mut Tree), work: impl AsyncFnOnce(&Volume)) {
        let begin = self.log.points();
        work(&self.volume).await;
        let end = self.log.points();
        let mut history = self.history.borrow_mut();
        let before = history.tree.clone();
        edit(&mut history.tree);
        let after = history.tree.clone();
        history.changes.push(Change { begin, end, before, after, both });
    }

    pub async fn put(&self, path: &str, content: Vec<u8>) {
        let thing = Thing::Small(content.clone());
        self.change(
            false,
            |tree| drop(tree.insert(path.into(), thing)),
            async |v| v.write_file(path, &content).await.unwrap(),
        )
        .await;
    }

    pub async fn directory(&self, path: &str) {
        let edit = |tree: &mut Tree| drop(tree.insert(path.into(), Thing::Directory));
        self.change(false, edit, async |v| v.make_directory(path).await.unwrap()).await;
    }

    pub async fn symlink(&self, path: &str, target: &str) {
        let edit = |tree: &mut Tree| drop(tree.insert(path.into(), Thing::Link(target.into())));
        self.change(false, edit, async |v| v.make_symlink(path, target).await.unwrap()).await;
    }

    pub async fn mapping(&self, path: &str, length: u64, replace: bool) {
        let rdm = Rdm { record: RdmRecord::naa([7; 16], b"KAGAMI"), length, tail: vec![length as u8; 64] };
        let edit = |tree: &mut Tree| drop(tree.insert(path.into(), Thing::Mapping(rdm.clone())));
        let work = async |v: &Volume| match replace {
            true => v.replace_rdm(path, &rdm).await.unwrap(),
            false => v.create_rdm(path, &rdm).await.unwrap(),
        };
        self.change(false, edit, work).await;
    }

    pub async fn remove(&self, path: &str) {
        let edit = |tree: &mut Tree| drop(tree.remove(path));
        self.change(false, edit, async |v| v.remove(path).await.unwrap()).await;
    }

    pub async fn rename(&self, from: &str, to: &str, both: bool) {
        let edit = |tree: &mut Tree| {
            let below = |path: &str| path == from || path.starts_with(&format!("{from}/"));
            let (moved, rest) = std::mem::take(tree).into_iter().partition(|(path, _)| below(path));
            *tree = rest;
            let moved: Tree = moved;
            tree.extend(moved.into_iter().map(|(path, thing)| (path.replacen(from, to, 1), thing)));
        };
        self.change(both, edit, async |v| v.rename(from, to).await.unwrap()).await;
    }

    pub async fn file(&self, path: &str, length: u64, layout: Layout) -> File {
        let edit = |tree: &mut Tree| drop(tree.insert(path.into(), Thing::Length(length)));
        let new = NewFile { length, layout, grows_to: 0 };
        let mut file = None;
        self.change(false, edit, async |v| file = Some(v.create_file(path, new).await.unwrap())).await;
        file.unwrap()
    }

    pub async fn length(&self, path: &str, file: &File, length: u64) {
        let edit = |tree: &mut Tree| drop(tree.insert(path.into(), Thing::Length(length)));
        let work = async |_: &Volume| {
            file.set_length(length).await.unwrap();
            file.flush().await.unwrap();
        };
        self.change(false, edit, work).await;
    }

    pub async fn write(&self, path: &str, file: &File, sector: u64, count: u64, fill: u8) {
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
    pub async fn release(&self, path: &str, file: &File, sector: u64, count: u64) {
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
    pub async fn flush(&self, path: &str, file: &File) {
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
