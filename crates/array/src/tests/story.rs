//! A workload over several LUNs, with everything recorded that is needed to judge it after a power loss.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use block::crash::{CrashLog, Witness};
use block::{Disk, Gate, Image, Pages, Safe, Sector, Segments};

use super::judge::{Era, Frozen, HoldLife, Lives, LunLife, SnapshotLife, Span};
use super::{content, dynamic, new_pool, pattern};
use crate::{Claim, Lun, LunError, NewLun, Options, Pool};

/// Length of a medium, in sectors: 24 MiB.
pub(crate) const MEDIUM: u64 = 24 << 11;

/// What a workload does besides writing.
#[derive(Copy, Clone)]
pub(crate) struct Plot {
    pub(crate) media: usize,
    pub(crate) luns: usize,
    /// Steps of the operator: snapshots, clones, deletes.
    pub(crate) steps: usize,
    /// Writes of each writer; two writers a LUN.
    pub(crate) writes: usize,
    /// The operator may delete and revert.
    pub(crate) deletes: bool,
    /// The operator holds generations, resizes, claims, uses the trash.
    pub(crate) all: bool,
}

impl Plot {
    pub(crate) const fn usual() -> Self {
        Self { media: 1, luns: 2, steps: 7, writes: 14, deletes: true, all: false }
    }

    /// Everything an operator can do.
    pub(crate) const fn all() -> Self {
        Self { media: 1, luns: 2, steps: 14, writes: 16, deletes: true, all: true }
    }
}

/// A workload and its record.
pub(crate) struct Story {
    pub(crate) log: CrashLog,
    pub(crate) pool: Rc<Pool>,
    pub(crate) lives: Lives,
    /// From here on the pool exists.
    pub(crate) made: usize,
    random: RefCell<fastrand::Rng>,
    tag: Cell<u64>,
    gates: RefCell<BTreeMap<String, Rc<Gate>>>,
}

/// Media whose every sector holds garbage: reading what was never written is seen.
pub(crate) fn garbage(log: &CrashLog, count: usize) -> Vec<Rc<dyn Disk>> {
    let mut pages = Pages::default();
    // The part where data goes in a short story; the rest is zero, which is garbage as good as any.
    let junk = pattern(16 << 11, 0xfff);
    pages.write(0, &Segments::new(&junk));
    (0..count).map(|_| dynamic(&log.disk_from(Image { sectors: MEDIUM, pages: pages.clone() }))).collect()
}

impl Story {
    /// Runs a workload to its end.
    pub(crate) async fn run(seed: u64, plot: Plot) -> Rc<Self> {
        let log = CrashLog::new(seed);
        log.interleave(3);
        let media = garbage(&log, plot.media);
        let pool = Pool::create(media, new_pool(), Options::default()).await.unwrap();
        pool.noted.rest.set(2);
        pool.noted.patient.set(false);
        pool.merge_way.set(super::merge_way(seed));
        let story = Rc::new(Self {
            made: log.points(),
            log,
            pool,
            lives: Lives::default(),
            random: RefCell::new(fastrand::Rng::with_seed(seed)),
            tag: Cell::new(1),
            gates: RefCell::default(),
        });
        for number in 0..plot.luns {
            story.create(&format!("lun{number}"), [8192, 70_000][number % 2]).await;
        }
        if plot.all {
            story.begin_with_boundaries().await;
        }
        let writers: Vec<_> = (0..plot.luns * 2)
            .map(|writer| {
                let story = Rc::clone(&story);
                lane::spawn(async move { story.writer(writer, plot.writes).await })
            })
            .collect();
        let stop = Rc::new(Cell::new(false));
        let background = {
            let (story, stop) = (Rc::clone(&story), Rc::clone(&stop));
            lane::spawn(async move {
                while !stop.get() {
                    story.pause().await;
                    story.pool.tidy_step().await.unwrap();
                }
                story.pool.tidy().await.unwrap();
            })
        };
        let puncher = {
            // As early as ever possible: also in the middle of another step of the background.
            let (story, stop) = (Rc::clone(&story), Rc::clone(&stop));
            lane::spawn(async move {
                while plot.all && !stop.get() {
                    lane::yield_now().await;
                    story.pool.punch_step().await.unwrap();
                }
            })
        };
        for _ in 0..plot.steps {
            story.pause().await;
            match plot.all {
                true => story.any_step().await,
                false => story.step(plot.deletes).await,
            }
        }
        for writer in writers {
            writer.await;
        }
        stop.set(true);
        background.await;
        puncher.await;
        story
    }

    pub(crate) fn draw(&self, below: usize) -> usize {
        self.random.borrow_mut().usize(0..below)
    }

    fn tag(&self) -> u64 {
        self.tag.replace(self.tag.get() + 1)
    }

    async fn pause(&self) {
        for _ in 0..self.draw(60) {
            lane::yield_now().await;
        }
    }

    /// Runs something and says from when to when.
    pub(crate) async fn span<T>(&self, work: impl Future<Output = T>) -> (T, Span) {
        let begin = self.log.points();
        let out = work.await;
        (out, Span { begin, end: self.log.points() })
    }

    fn adopt(&self, lun: &Rc<Lun>, since: Span, base: Option<Image>) {
        let disk = dynamic(lun);
        let witness = match base {
            Some(base) => Witness::over(&self.log, disk, base),
            None => Witness::new(&self.log, disk),
        };
        let (name, sectors, era) = (lun.name(), lun.shape().sectors, Era { since, witness });
        let mut luns = self.lives.luns.borrow_mut();
        match luns.iter_mut().find(|l| l.name == name) {
            Some(life) => {
                life.eras.push(era);
                life.sizes.push((since, sectors));
            }
            None => luns.push(LunLife::new(&name, era, sectors)),
        }
    }

    /// Does something with the record of a LUN.
    fn life<T>(&self, lun: &str, change: impl FnOnce(&mut LunLife) -> T) -> T {
        let mut luns = self.lives.luns.borrow_mut();
        change(luns.iter_mut().find(|l| l.name == lun).expect("every LUN has a record"))
    }

    pub(crate) async fn create(&self, name: &str, sectors: u64) -> Rc<Lun> {
        let (lun, span) = self.span(self.pool.create_lun(NewLun::new(name, sectors))).await;
        let lun = lun.unwrap();
        self.adopt(&lun, span, None);
        lun
    }

    fn witness(&self, lun: &str) -> Option<Rc<Witness>> {
        let luns = self.lives.luns.borrow();
        let life = luns.iter().find(|l| l.name == lun && l.lives())?;
        life.eras.last().map(|e| Rc::clone(&e.witness))
    }

    /// Writers stand before this gate while a LUN's history jumps.
    fn gate(&self, lun: &str) -> Rc<Gate> {
        Rc::clone(self.gates.borrow_mut().entry(lun.to_owned()).or_default())
    }

    fn living(&self) -> Vec<String> {
        let luns = self.lives.luns.borrow();
        luns.iter().filter(|l| l.lives()).map(|l| l.name.clone()).collect()
    }

    async fn writer(&self, number: usize, writes: usize) {
        for _ in 0..writes {
            // Writers of the same LUN overlap; later ones wander to clones.
            let names = self.living();
            let name = match self.draw(4) {
                0 => &names[self.draw(names.len())],
                _ => &names[(number / 2).min(names.len() - 1)],
            };
            let _pass = self.gate(name).enter().await;
            let Some(witness) = self.witness(name) else { continue };
            self.change(&witness).await;
            if self.draw(4) == 0 {
                witness.flush().await.unwrap();
            }
            self.pause().await;
        }
    }

    /// Where writes begin: a grain's edge, a leaf's edge, the end.
    fn bases(&self, sectors: u64) -> [u64; 4] {
        [0, 128 - 4, (503 * 128 + 120).min(sectors - 1), sectors - 300]
    }

    /// One write, zero or unmap at a place that others hit too.
    async fn change(&self, disk: &Witness) {
        let sectors = disk.shape().sectors;
        let base = self.bases(sectors)[self.draw(4)];
        let at = (base + self.draw(260) as u64).min(sectors - 1);
        let mut at = Sector(at);
        let mut count = (1 + self.draw(30) as u64).min(sectors - at.0);
        if self.draw(3) == 0 {
            at = Sector(at.0 & !7);
            count = count.next_multiple_of(8).min(sectors - at.0);
        }
        match self.draw(10) {
            0 => disk.zero(at, count, true).await.unwrap(),
            1 => disk.unmap(at, (count * 20).min(sectors - at.0)).await.unwrap(),
            // Whole grains: they are given back.
            2 | 3 => {
                let first = at.0 & !127;
                disk.unmap(Sector(first), 256.min(sectors - first)).await.unwrap();
            }
            kind => {
                let bytes = pattern(count, self.tag());
                let safe = if kind == 4 { Safe::OnReturn } else { Safe::AtNextFlush };
                disk.write(at, &Segments::new(&bytes), safe).await.unwrap();
            }
        }
    }

    async fn step(&self, deletes: bool) {
        let draw = self.draw(if deletes { 12 } else { 7 });
        match draw {
            0..=4 => self.take_snapshot().await,
            5..=6 => self.take_clone().await,
            7..=9 => self.remove_snapshot().await,
            10 => self.revert().await,
            _ => self.remove_clone().await,
        }
    }

    fn any_lun(&self) -> String {
        let luns = self.lives.luns.borrow();
        let living: Vec<_> = luns.iter().filter(|l| l.lives()).collect();
        living[self.draw(living.len())].name.clone()
    }

    fn any_snapshot(&self) -> Option<usize> {
        let snapshots = self.lives.snapshots.borrow();
        let luns = self.lives.luns.borrow();
        let lives = |lun: &str| luns.iter().any(|l| l.name == lun && l.lives());
        let all = snapshots.iter().enumerate();
        let living: Vec<_> = all.filter(|(_, s)| s.gone.is_none() && lives(&s.lun)).map(|(i, _)| i).collect();
        (!living.is_empty()).then(|| living[self.draw(living.len())])
    }

    pub(crate) async fn take_snapshot(&self) {
        self.snapshot_of(&self.pool.lun(&self.any_lun()).unwrap()).await;
    }

    async fn snapshot_of(&self, lun: &Rc<Lun>) {
        let name = format!("snap{}", self.tag());
        let (snapshot, born) = self.span(lun.snapshot(&name)).await;
        let snapshot = snapshot.unwrap();
        // What it holds is read while the writers go on: it must never change again.
        let image = content(&*snapshot).await.unwrap();
        let life = SnapshotLife {
            lun: lun.name(),
            name,
            born,
            gone: None,
            frozen: Frozen { generation: snapshot.generation(), image },
            group: None,
        };
        self.lives.snapshots.borrow_mut().push(life);
    }

    async fn take_clone(&self) {
        let Some(index) = self.any_snapshot().filter(|_| self.lives.luns.borrow().len() < 5) else { return };
        let (lun, snapshot, image) = {
            let life = &self.lives.snapshots.borrow()[index];
            (life.lun.clone(), life.name.clone(), life.frozen.image.clone())
        };
        let name = format!("clone{}", self.tag());
        let (clone, span) = self.span(self.pool.clone_lun(&lun, &snapshot, NewLun::new(&name, 0))).await;
        self.adopt(&clone.unwrap(), span, Some(image));
    }

    async fn remove_snapshot(&self) {
        let Some(index) = self.any_snapshot() else { return };
        let (lun, snapshot) = {
            let life = &self.lives.snapshots.borrow()[index];
            (life.lun.clone(), life.name.clone())
        };
        self.remove_snapshot_of(&self.pool.lun(&lun).unwrap(), &snapshot).await;
    }

    async fn remove_snapshot_of(&self, lun: &Rc<Lun>, snapshot: &str) {
        let name = lun.name();
        let gone = |span: Span| {
            let mut snapshots = self.lives.snapshots.borrow_mut();
            let mut found = snapshots.iter_mut().filter(|s| s.lun == name && s.name == snapshot);
            found.next().expect("every snapshot has a record").gone = Some(span);
        };
        gone(Span { begin: self.log.points(), end: usize::MAX });
        let (removed, span) = self.span(lun.remove_snapshot(snapshot)).await;
        removed.unwrap();
        gone(span);
    }

    /// Back to a snapshot: another history of the LUN begins.
    async fn revert(&self) {
        let Some(index) = self.any_snapshot() else { return };
        let (name, snapshot, image) = {
            let life = &self.lives.snapshots.borrow()[index];
            (life.lun.clone(), life.name.clone(), life.frozen.image.clone())
        };
        let lun = self.pool.lun(&name).unwrap();
        if lun.claimed_by().is_some() {
            return;
        }
        let _writers = self.keep_out(&name).await;
        if self.life(&name, |life| life.abandoned.is_some()) {
            // A second one would give up what the first one left: that has to be said.
            assert!(matches!(lun.revert(&snapshot).await, Err(LunError::Reverted(_))));
            lun.accept().await.unwrap();
            self.life(&name, |life| life.abandoned = None);
        }
        self.lose_history(&name);
        let old = (self.witness(&name).unwrap(), lun.shape().sectors);
        let (reverted, span) = self.span(lun.revert(&snapshot)).await;
        reverted.unwrap();
        self.adopt(&lun, span, Some(image));
        self.life(&name, |life| life.abandoned = Some(old));
        if self.draw(2) == 0 {
            lun.accept().await.unwrap();
            self.life(&name, |life| life.abandoned = None);
        }
    }

    /// What a revert left is the LUN's history again.
    async fn undo_revert(&self) {
        let found = {
            let luns = self.lives.luns.borrow();
            let life = luns.iter().find(|l| l.lives() && l.abandoned.is_some());
            life.and_then(|l| l.abandoned.clone().map(|old| (l.name.clone(), old)))
        };
        let Some((name, (witness, sectors))) = found else { return self.revert().await };
        if self.pool.lun(&name).unwrap().claimed_by().is_some() {
            return;
        }
        let _writers = self.keep_out(&name).await;
        self.lose_history(&name);
        let (undone, since) = self.span(self.pool.lun(&name).unwrap().undo_revert()).await;
        undone.unwrap();
        self.life(&name, |life| {
            life.abandoned = None;
            life.eras.push(Era { since, witness });
            life.sizes.push((since, sectors));
        });
    }

    /// Closes the gate that writers stand before, until dropped.
    async fn keep_out(&self, lun: &str) -> KeptOut {
        let gate = self.gate(lun);
        gate.close();
        gate.drained().await;
        KeptOut(gate)
    }

    /// Holds of this LUN may be out of its history from now on.
    fn lose_history(&self, lun: &str) {
        for hold in self.lives.holds.borrow_mut().iter_mut().filter(|h| h.lun == lun) {
            hold.lost.get_or_insert(self.log.points());
        }
    }

    /// A clone that writers may be kept from: the one made first.
    fn any_clone(&self) -> Option<String> {
        let luns = self.lives.luns.borrow();
        let claimed = |l: &LunLife| l.claims.last().is_some_and(|c| c.1);
        luns.iter().skip(2).find(|l| l.lives() && !claimed(l)).map(|l| l.name.clone())
    }

    /// Removes a clone for good. Its snapshots go with it; writers that are inside finish first.
    async fn remove_clone(&self) {
        let Some(name) = self.any_clone() else { return };
        let _writers = self.keep_out(&name).await;
        self.leave(&name, self.pool.remove_lun(&name, true)).await;
    }

    /// A LUN goes away while `work` runs.
    async fn leave(&self, lun: &str, work: impl Future<Output = Result<(), LunError>>) {
        let begin = self.log.points();
        self.life(lun, |life| life.absences.push((Span { begin, end: usize::MAX }, None)));
        work.await.unwrap();
        let end = self.log.points();
        self.life(lun, |life| life.absences.last_mut().unwrap().0.end = end);
    }

    /// Puts a clone into the trash; takes it out again, or empties the trash, or leaves it there.
    async fn use_trash(&self) {
        let Some(name) = self.any_clone() else { return self.take_clone().await };
        let _writers = self.keep_out(&name).await;
        self.leave(&name, self.pool.remove_lun(&name, false)).await;
        self.pause().await;
        match self.draw(3) {
            0 => self.pool.empty_trash(&name).await.unwrap(),
            1 => {}
            _ => {
                let (back, span) = self.span(self.pool.undelete_lun(&name)).await;
                back.unwrap();
                self.life(&name, |life| life.absences.last_mut().unwrap().1 = Some(span));
            }
        }
    }

    /// Everything an operator can do.
    async fn any_step(&self) {
        match self.draw(24) {
            0..=4 => self.take_snapshot().await,
            5..=6 => self.take_clone().await,
            7..=8 => self.remove_snapshot().await,
            9 => self.revert().await,
            10 => self.undo_revert().await,
            11..=16 => self.hold().await,
            17..=18 => self.release().await,
            19..=20 => self.resize().await,
            21 => self.claim().await,
            22 => self.use_trash().await,
            _ => self.remove_clone().await,
        }
    }

    /// Something is written where writers will write, and every LUN has a cut that is held and has no name any more.
    async fn begin_with_boundaries(&self) {
        for name in self.living() {
            let (lun, witness) = (self.pool.lun(&name).unwrap(), self.witness(&name).unwrap());
            for base in self.bases(lun.shape().sectors) {
                let bytes = pattern(200.min(lun.shape().sectors - base), self.tag());
                witness.write(Sector(base), &Segments::new(&bytes), Safe::AtNextFlush).await.unwrap();
            }
            self.snapshot_of(&lun).await;
            let (snapshot, since) = {
                let life = &self.lives.snapshots.borrow()[0];
                (life.name.clone(), life.frozen.clone())
            };
            self.hold_of(&lun, since).await;
            self.remove_snapshot_of(&lun, &snapshot).await;
            self.lives.snapshots.borrow_mut().clear();
        }
    }

    /// Holds a snapshot's generation, and mostly removes the snapshot.
    async fn hold(&self) {
        let Some(index) = self.any_snapshot() else { return self.take_snapshot().await };
        let (name, snapshot, since) = {
            let life = &self.lives.snapshots.borrow()[index];
            (life.lun.clone(), life.name.clone(), life.frozen.clone())
        };
        let lun = self.pool.lun(&name).unwrap();
        if self.hold_of(&lun, since).await && self.draw(4) != 0 {
            self.remove_snapshot_of(&lun, &snapshot).await;
        }
    }

    /// False: the LUN was reverted to something older.
    async fn hold_of(&self, lun: &Rc<Lun>, since: Frozen) -> bool {
        let holder = format!("holder{}", self.tag());
        let (held, born) = self.span(lun.hold(since.generation, &holder)).await;
        if matches!(held, Err(LunError::UnknownGeneration { .. })) {
            return false;
        }
        held.unwrap();
        let life = HoldLife { lun: lun.name(), holder, since, born, gone: None, lost: None };
        self.lives.holds.borrow_mut().push(life);
        true
    }

    async fn release(&self) {
        let found = {
            let mut holds = self.lives.holds.borrow_mut();
            let mut living: Vec<_> = holds.iter_mut().filter(|h| h.gone.is_none()).collect();
            let count = living.len();
            if count == 0 {
                return;
            }
            let hold = &mut living[self.draw(count)];
            hold.gone = Some(Span { begin: self.log.points(), end: usize::MAX });
            (hold.lun.clone(), hold.since.generation, hold.holder.clone())
        };
        let (lun, generation, holder) = found;
        if let Some(lun) = self.pool.lun(&lun) {
            lun.release(generation, &holder).await.unwrap();
        }
    }

    async fn resize(&self) {
        let name = self.any_lun();
        let lun = self.pool.lun(&name).unwrap();
        let sectors = lun.shape().sectors + [1, 8, 200, 5000][self.draw(4)];
        // Written to as soon as it can be seen.
        let begin = self.log.points();
        self.life(&name, |life| life.sizes.push((Span { begin, end: usize::MAX }, sectors)));
        lun.resize(sectors).await.unwrap();
        let end = self.log.points();
        self.life(&name, |life| life.sizes.last_mut().unwrap().0.end = end);
    }

    /// Stands on a LUN for a while: what would pull it away is refused meanwhile.
    async fn claim(&self) {
        let name = self.any_lun();
        let lun = self.pool.lun(&name).unwrap();
        let by = Claim::Datastore { uuid: uuid::Uuid::from_u128(9), label: "ds".into() };
        let (claimed, span) = self.span(lun.claim(Some(by))).await;
        claimed.unwrap();
        self.life(&name, |life| life.claims.push((span, true)));
        self.pause().await;
        assert!(matches!(self.pool.remove_lun(&name, false).await, Err(LunError::Claimed { .. })));
        assert!(matches!(lun.revert("any").await, Err(LunError::Claimed { .. })));
        if self.draw(3) != 0 {
            let (left, span) = self.span(lun.claim(None)).await;
            left.unwrap();
            self.life(&name, |life| life.claims.push((span, false)));
        }
    }
}

/// See [`Story::keep_out`].
struct KeptOut(Rc<Gate>);

impl Drop for KeptOut {
    fn drop(&mut self) {
        self.0.open();
    }
}
