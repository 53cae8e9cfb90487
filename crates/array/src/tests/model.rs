//! Random operations over LUNs, snapshots, clones and reverts, compared with plain images after each step.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use block::{
    Disk, DiskError, Extents, Generation, Image, Kind, MemoryDisk, Pages, Safe, Sector, Segments, SegmentsMut,
};

use super::{content, differences, dynamic, new_pool, pattern, seeds};
use crate::{Lun, LunError, NewLun, Options, Pool};

/// A cut in the history of a LUN.
#[derive(Clone)]
struct Cut {
    generation: Generation,
    /// Blocks that were written, zeroed or unmapped since.
    touched: BTreeSet<u64>,
    /// What the LUN held.
    image: Image,
    /// How many snapshots and holds keep the generation.
    kept: Rc<Cell<u32>>,
}

impl Cut {
    fn keep(&self) {
        self.kept.set(self.kept.get() + 1);
    }
    fn let_go(&self) {
        self.kept.set(self.kept.get() - 1);
    }
}

/// What one LUN should be.
struct Expected {
    image: Image,
    cuts: Vec<Cut>,
    snapshots: BTreeMap<String, Vec<Cut>>,
    /// What a revert left.
    abandoned: Option<(Image, Vec<Cut>)>,
}

/// Pool and model, side by side.
struct Twin {
    media: Vec<Rc<MemoryDisk>>,
    pool: Rc<Pool>,
    luns: BTreeMap<String, Expected>,
    trash: BTreeMap<String, Expected>,
    /// LUN, holder, cut.
    holds: Vec<(String, String, Cut)>,
    random: fastrand::Rng,
    names: u64,
}

impl Expected {
    fn new(image: Image, cuts: Vec<Cut>) -> Self {
        Self { image, cuts, snapshots: BTreeMap::new(), abandoned: None }
    }

    fn touch(&mut self, at: u64, count: u64) {
        for cut in &mut self.cuts {
            cut.touched.extend(at / 8..(at + count).div_ceil(8));
        }
    }
}

impl Twin {
    async fn new(seed: u64) -> Self {
        let media: Vec<_> = (0..1 + seed % 2).map(|_| Rc::new(MemoryDisk::new(128 << 11))).collect();
        let pool =
            Pool::create(media.iter().map(dynamic).collect(), new_pool(), Options::default()).await.unwrap();
        let random = fastrand::Rng::with_seed(seed);
        Self {
            media,
            pool,
            luns: BTreeMap::new(),
            trash: BTreeMap::new(),
            holds: Vec::new(),
            random,
            names: 0,
        }
    }

    fn name(&mut self, kind: &str) -> String {
        self.names += 1;
        format!("{kind}{}", self.names)
    }

    fn any_lun(&mut self) -> Option<String> {
        let names: Vec<String> = self.luns.keys().cloned().collect();
        (!names.is_empty()).then(|| names[self.random.usize(0..names.len())].clone())
    }

    fn any_snapshot(&mut self, lun: &str) -> Option<String> {
        let names: Vec<String> = self.luns[lun].snapshots.keys().cloned().collect();
        (!names.is_empty()).then(|| names[self.random.usize(0..names.len())].clone())
    }

    fn lun(&self, name: &str) -> Rc<Lun> {
        self.pool.lun(name).expect("the model knows it, so must the pool")
    }

    async fn step(&mut self) {
        match self.random.u32(0..120) {
            0..4 => self.create().await,
            4..50 => self.write().await,
            50..58 => self.zero().await,
            58..72 => self.read().await,
            72..76 => self.flush().await,
            76..82 => self.snapshot().await,
            82..87 => self.remove_snapshot().await,
            87..90 => self.clone_lun().await,
            90..93 => self.revert().await,
            93..95 => self.resize().await,
            95..96 => self.remove().await,
            96..98 => self.pool.settle().await.unwrap(),
            98..106 => self.hold().await,
            106..110 => self.release().await,
            110..112 => self.undo_revert().await,
            112..114 => self.undelete().await,
            114..116 => drop(self.pool.tidy_step().await.unwrap()),
            116..118 => self.pool.tidy().await.unwrap(),
            _ => self.reopen().await,
        }
    }

    async fn create(&mut self) {
        if self.luns.len() >= 5 {
            return;
        }
        let (name, sectors) = (self.name("lun"), [8192, 65_537, 80_000, 1 << 21][self.random.usize(0..4)]);
        self.pool.create_lun(NewLun::new(&name, sectors)).await.unwrap();
        let image = Image { sectors, pages: Pages::default() };
        self.luns.insert(name, Expected::new(image, Vec::new()));
    }

    /// A place that is hit again and again: the beginning, a leaf's edge, the end, anywhere.
    fn place(&mut self, sectors: u64, most: u64) -> (u64, u64) {
        let base = [0, 503 * 128, sectors.saturating_sub(300), self.random.u64(0..sectors)];
        let at = (base[self.random.usize(0..4)] + self.random.u64(0..300)).min(sectors - 1);
        (at, self.random.u64(1..=(sectors - at).min(most)))
    }

    async fn write(&mut self) {
        let Some(name) = self.any_lun() else { return };
        let sectors = self.luns[&name].image.sectors;
        let (mut at, mut count) = self.place(sectors, 300);
        if self.random.bool() {
            (at, count) = (at & !7, count.next_multiple_of(8).min(sectors - (at & !7)));
        }
        self.names += 1;
        let bytes = pattern(count, self.names);
        let safe = if self.random.u8(..) < 20 { Safe::OnReturn } else { Safe::AtNextFlush };
        self.lun(&name).write(Sector(at), &Segments::new(&bytes), safe).await.unwrap();
        let expected = self.luns.get_mut(&name).unwrap();
        expected.image.pages.write(at * 512, &Segments::new(&bytes));
        expected.touch(at, count);
    }

    async fn zero(&mut self) {
        let Some(name) = self.any_lun() else { return };
        let sectors = self.luns[&name].image.sectors;
        let (at, count) = self.place(sectors, 3000);
        match self.random.bool() {
            true => self.lun(&name).zero(Sector(at), count, true).await.unwrap(),
            false => self.lun(&name).unmap(Sector(at), count).await.unwrap(),
        }
        let expected = self.luns.get_mut(&name).unwrap();
        expected.image.pages.zero(at * 512, count * 512);
        expected.touch(at, count);
    }

    async fn read(&mut self) {
        let Some(name) = self.any_lun() else { return };
        let (at, count) = self.place(self.luns[&name].image.sectors, 600);
        let (mut found, mut wanted) = (vec![0xee; count as usize * 512], vec![0; count as usize * 512]);
        self.lun(&name).read(Sector(at), &SegmentsMut::new(&mut found)).await.unwrap();
        self.luns[&name].image.pages.read(at * 512, &SegmentsMut::new(&mut wanted));
        if let Some(byte) = found.iter().zip(&wanted).position(|(a, b)| a != b) {
            panic!("{name}: content differs in sector {}", at + byte as u64 / 512);
        }
        let lun = self.lun(&name);
        let (same, other) = (Segments::new(&wanted), pattern(count, 1));
        let answer = lun.compare_and_write(Sector(at), &Segments::new(&other), &same).await;
        assert!(matches!(answer, Err(DiskError::Miscompare { .. })), "{answer:?}");
    }

    async fn flush(&mut self) {
        if let Some(name) = self.any_lun() {
            self.lun(&name).flush().await.unwrap();
        }
    }

    async fn snapshot(&mut self) {
        let Some(name) = self.any_lun() else { return };
        let snapshot = self.name("snap");
        let generation = self.lun(&name).snapshot(&snapshot).await.unwrap().generation();
        let expected = self.luns.get_mut(&name).unwrap();
        expected.cuts.push(Cut {
            generation,
            touched: BTreeSet::new(),
            image: expected.image.clone(),
            kept: Rc::new(Cell::new(1)),
        });
        expected.snapshots.insert(snapshot, expected.cuts.clone());
    }

    async fn remove_snapshot(&mut self) {
        let Some(name) = self.any_lun() else { return };
        let Some(snapshot) = self.any_snapshot(&name) else { return };
        self.lun(&name).remove_snapshot(&snapshot).await.unwrap();
        let cuts = self.luns.get_mut(&name).unwrap().snapshots.remove(&snapshot).unwrap();
        cuts.last().unwrap().let_go();
    }

    async fn clone_lun(&mut self) {
        let Some(name) = self.any_lun().filter(|_| self.luns.len() < 7) else { return };
        let Some(snapshot) = self.any_snapshot(&name) else { return };
        let new = self.name("clone");
        self.pool.clone_lun(&name, &snapshot, NewLun::new(&new, 0)).await.unwrap();
        let cuts = self.luns[&name].snapshots[&snapshot].clone();
        let image = cuts.last().unwrap().image.clone();
        self.luns.insert(new, Expected::new(image, cuts));
    }

    async fn revert(&mut self) {
        let Some(name) = self.any_lun() else { return };
        let Some(snapshot) = self.any_snapshot(&name) else { return };
        let reverted = self.lun(&name).revert(&snapshot).await;
        let expected = self.luns.get_mut(&name).unwrap();
        if expected.abandoned.is_some() {
            // What was there before is kept until somebody says that it may go: nothing has changed.
            assert!(matches!(&reverted, Err(LunError::Reverted(lun)) if *lun == name));
            return;
        }
        reverted.unwrap();
        expected.abandoned = Some((expected.image.clone(), std::mem::take(&mut expected.cuts)));
        expected.cuts = expected.snapshots[&snapshot].clone();
        expected.image = expected.cuts.last().unwrap().image.clone();
        if self.random.bool() {
            self.lun(&name).accept().await.unwrap();
            self.luns.get_mut(&name).unwrap().abandoned = None;
        }
    }

    async fn undo_revert(&mut self) {
        let Some(name) = self.any_lun() else { return };
        let undone = self.lun(&name).undo_revert().await;
        let expected = self.luns.get_mut(&name).unwrap();
        match expected.abandoned.take() {
            Some(old) => {
                undone.unwrap();
                (expected.image, expected.cuts) = old;
            }
            None => assert!(matches!(undone, Err(LunError::NotReverted(_)))),
        }
    }

    async fn hold(&mut self) {
        let Some(name) = self.any_lun() else { return };
        let cuts = self.luns[&name].cuts.clone();
        if cuts.is_empty() {
            return;
        }
        let (cut, holder) = (cuts[self.random.usize(0..cuts.len())].clone(), self.name("holder"));
        match self.lun(&name).hold(cut.generation, &holder).await {
            Err(LunError::UnknownGeneration { .. }) if cut.kept.get() == 0 => {}
            other => {
                other.unwrap();
                cut.keep();
                self.holds.push((name, holder, cut));
            }
        }
    }

    async fn release(&mut self) {
        if self.holds.is_empty() {
            return;
        }
        let (name, holder, cut) = self.holds.swap_remove(self.random.usize(0..self.holds.len()));
        if let Some(lun) = self.pool.lun(&name) {
            lun.release(cut.generation, &holder).await.unwrap();
        }
        cut.let_go();
    }

    async fn resize(&mut self) {
        let Some(name) = self.any_lun() else { return };
        let expected = self.luns.get_mut(&name).unwrap();
        let sectors = expected.image.sectors + [8, 1, 20_000, 1 << 16][self.random.usize(0..4)];
        let old = std::mem::replace(&mut expected.image.sectors, sectors);
        // The grown part counts as changed (R44).
        expected.touch(old, sectors - old);
        self.lun(&name).resize(sectors).await.unwrap();
    }

    async fn remove(&mut self) {
        let Some(name) = self.any_lun() else { return };
        let now = self.random.bool();
        self.pool.remove_lun(&name, now).await.unwrap();
        let gone = self.luns.remove(&name).unwrap();
        match now {
            true => self.purged(&name, &gone),
            false => drop(self.trash.insert(name, gone)),
        }
    }

    fn purged(&mut self, name: &str, gone: &Expected) {
        gone.snapshots.values().for_each(|cuts| cuts.last().unwrap().let_go());
        self.holds.iter().filter(|(lun, ..)| lun == name).for_each(|(_, _, cut)| cut.let_go());
        self.holds.retain(|(lun, ..)| lun != name);
    }

    /// Takes something out of the trash, or empties it.
    async fn undelete(&mut self) {
        let Some((name, expected)) = self.trash.pop_first() else { return };
        if self.random.u8(..) < 80 {
            self.pool.empty_trash(&name).await.unwrap();
            self.purged(&name, &expected);
            return;
        }
        self.pool.undelete_lun(&name).await.unwrap();
        self.luns.insert(name, expected);
    }

    async fn reopen(&mut self) {
        for name in self.luns.keys().cloned().collect::<Vec<_>>() {
            self.lun(&name).flush().await.unwrap();
        }
        self.pool.settle().await.unwrap();
        self.pool = Pool::open(self.media.iter().map(dynamic).collect(), Options::default()).await.unwrap();
    }

    /// Everything there is, against everything there should be.
    async fn compare(&self) {
        let report = self.pool.check().await.unwrap();
        assert!(report.findings.is_empty(), "{:?}", report.findings);
        let mut listed: Vec<String> = self.pool.luns().iter().map(|l| l.name()).collect();
        listed.sort();
        assert_eq!(listed, self.luns.keys().cloned().collect::<Vec<_>>());
        for (name, expected) in &self.luns {
            let lun = self.lun(name);
            let found = content(&*lun).await.unwrap();
            assert_eq!(found.sectors, expected.image.sectors, "{name}: length");
            let different = differences(&found.pages, &expected.image.pages);
            assert!(different.is_empty(), "{name}: blocks {different:?} differ");
            for cut in &expected.cuts {
                changes(name, &*lun, cut, &expected.image.pages).await;
            }
            for (snapshot, cuts) in &expected.snapshots {
                let cut = cuts.last().unwrap();
                let disk = lun.open_snapshot(snapshot).unwrap();
                assert_eq!(disk.generation(), cut.generation);
                let found = content(&*disk).await.unwrap();
                let different = differences(&found.pages, &cut.image.pages);
                assert!(different.is_empty(), "{name}@{snapshot}: blocks {different:?} differ");
                for older in &cuts[..cuts.len() - 1] {
                    changes(&format!("{name}@{snapshot}"), &*disk, older, &cut.image.pages).await;
                }
            }
        }
    }
}

/// `changed` names every block that differs, and none that nobody touched.
async fn changes(name: &str, disk: &dyn Disk, since: &Cut, now: &Pages) {
    let sectors = disk.shape().sectors;
    let mut changed = BTreeSet::new();
    let mut at = 0;
    while at < sectors {
        let mut out = Extents::with_limit(50);
        match disk.status(Sector(at), sectors - at, Some(since.generation), &mut out).await {
            Err(DiskError::UnknownGeneration) if since.kept.get() == 0 => return,
            other => other.unwrap_or_else(|e| panic!("{name}: changes since {:?}: {e}", since.generation)),
        }
        for extent in out.iter().filter(|e| e.changed) {
            changed.extend(extent.at.0 / 8..extent.at.plus(extent.count).0.div_ceil(8));
        }
        assert!(out.iter().all(|e| e.kind != Kind::Hole || e.count > 0));
        at = out.end().unwrap().0;
    }
    let missed: Vec<u64> =
        differences(&since.image.pages, now).into_iter().filter(|b| !changed.contains(b)).collect();
    assert!(missed.is_empty(), "{name}: blocks {missed:?} differ and are not said to be changed");
    let invented: Vec<_> = changed.difference(&since.touched).collect();
    assert!(invented.is_empty(), "{name}: blocks {invented:?} were never touched");
}

#[test]
fn r41_random_operations_match_the_model_soak() {
    for seed in seeds(12, 400) {
        eprintln!("KAGAMI_SEED={seed}");
        lane::block_on(async {
            let mut twin = Twin::new(seed).await;
            twin.create().await;
            for step in 0..400 {
                twin.step().await;
                if step % 40 == 39 {
                    twin.compare().await;
                }
            }
            twin.reopen().await;
            twin.compare().await;
        });
    }
}
