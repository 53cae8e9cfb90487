//! Folding redo logs into a disk below them while the VM writes (semantics page, chapter 8, R23 to R29).
//!
//! One pass over what the redo logs hold. A region of 256 KiB is *to do* or *done*; writes to a region that is done,
//! or that no redo log held when the pass began, go to both sides; to one that is to do they go to the redo log only;
//! to one that is being copied they wait for that region. What is to do only becomes less, so the pass ends.
//!
//! The redo log stays complete all the while (I4). When nothing is left to do, the disk below is flushed and the
//! guest's flushes reach both sides; then the caller writes its one record; then, inside the gate, which is closed no
//! longer than writes under way take, the disk below becomes the top. Until the record is durable the redo log
//! counts; from then on both are right. A durable mark says "mixed" on the disk below from before the first copy.
//!
//! A pass that a crash ended begins again from zero, not from a saved cursor (chapter 7 allows both): a cursor would
//! be a durable write every so often, and would be wrong anyway for whatever the guest wrote to both sides behind it
//! that no flush had reached.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::time::Duration;

use block::{Disk, DiskError, Io, SECTOR_BYTES, Safe, Sector, Segments, SegmentsMut};
use lane::Buffer;
use lane::sync::Waiters;
use smallvec::SmallVec;

use crate::chain::{ChainError, MIXED_KEY, children, load_descriptor, mixed, survey};
use crate::claims::Hold;
use crate::descriptor::Cid;
use crate::disk::{LinkKind, VmDisk, rewrite, set_mixed};
use crate::fault::{Fault, planted};
use crate::folder::Folder;
use crate::layer::Layer;
use crate::pace::{Pace, WIDTH};
use crate::redo::RedoDisk;
use crate::switch::{ChainLock, remove_link};
use crate::together;

/// A region, in sectors (R23).
pub const REGION_SECTORS: u64 = (256 << 10) / SECTOR_BYTES;

/// Whether the disk below is marked as mixed.
#[derive(Copy, Clone, PartialEq, Eq)]
pub(crate) enum Mark {
    /// Durably, before anything is copied.
    Mixed,
    /// Not: what is folded back was never promised to anybody.
    None,
}

/// How far a pass is, in bytes of regions.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Progress {
    /// Done.
    pub done_bytes: u64,
    /// Of so many.
    pub total_bytes: u64,
}

/// Which regions are to do.
struct Regions {
    bits: Vec<u64>,
    left: u64,
}

impl Regions {
    fn none(sectors: u64) -> Self {
        Self { bits: vec![0; sectors.div_ceil(REGION_SECTORS).div_ceil(64) as usize], left: 0 }
    }
    fn all(sectors: u64) -> Self {
        let mut all = Self::none(sectors);
        all.mark(0, sectors);
        all
    }
    fn has(&self, region: u64) -> bool {
        self.bits[(region / 64) as usize] >> (region % 64) & 1 != 0
    }
    /// Marks the regions that a range of sectors touches.
    fn mark(&mut self, from: u64, to: u64) {
        for region in from / REGION_SECTORS..to.div_ceil(REGION_SECTORS) {
            self.left += u64::from(!self.has(region));
            self.bits[(region / 64) as usize] |= 1 << (region % 64);
        }
    }
    fn clear(&mut self, region: u64) {
        self.left -= u64::from(self.has(region));
        self.bits[(region / 64) as usize] &= !(1 << (region % 64));
    }
    fn next(&self, from: u64) -> Option<u64> {
        let mut word = (from / 64) as usize;
        let mut bits = self.bits.get(word)? & (u64::MAX << (from % 64));
        while bits == 0 {
            word += 1;
            bits = *self.bits.get(word)?;
        }
        Some(word as u64 * 64 + u64::from(bits.trailing_zeros()))
    }
}

struct State {
    to_do: Regions,
    busy: Vec<u64>,
    /// Writes under way: (first sector, end, number).
    inside: Vec<(u64, u64, u64)>,
    numbers: u64,
    /// The guest's flushes reach both sides.
    flush_both: bool,
    /// The record may be durable: an error of the disk below is the guest's from here on.
    deciding: bool,
    failed: Option<DiskError>,
}

/// What a running commit puts between the guest's writes and the chain.
pub(crate) struct Mirror {
    top: Rc<Layer>,
    target: Rc<dyn Disk>,
    state: RefCell<State>,
    changed: Waiters,
}

impl Mirror {
    fn new(top: Rc<Layer>, target: Rc<dyn Disk>, sectors: u64) -> Rc<Self> {
        let state = State {
            to_do: Regions::all(sectors),
            busy: Vec::new(),
            inside: Vec::new(),
            numbers: 0,
            flush_both: false,
            deciding: false,
            failed: None,
        };
        Rc::new(Self { top, target, state: RefCell::new(state), changed: Waiters::new() })
    }

    /// Waits until a write may begin, and notes it: no region of it is being copied, and no other write under way
    /// overlaps it (both sides must end with the same one).
    async fn enter(&self, at: Sector, count: u64) -> Inside<'_> {
        let (from, to) = (at.0, at.0 + count);
        let regions = from / REGION_SECTORS..to.div_ceil(REGION_SECTORS);
        let number = self
            .changed
            .until(|| {
                let mut state = self.state.borrow_mut();
                let copied = state.busy.iter().any(|b| regions.contains(b));
                if copied || state.inside.iter().any(|(a, b, _)| *a < to && from < *b) {
                    return None;
                }
                state.numbers += 1;
                let number = state.numbers;
                state.inside.push((from, to, number));
                Some(number)
            })
            .await;
        Inside { mirror: self, number }
    }

    /// The parts of a range that go to both sides: (first sector, sectors).
    fn doubled(&self, at: Sector, count: u64) -> SmallVec<[(u64, u64); 2]> {
        let state = self.state.borrow();
        let mut out: SmallVec<[(u64, u64); 2]> = SmallVec::new();
        if state.failed.is_some() {
            return out;
        }
        let (mut here, end) = (at.0, at.0 + count);
        while here < end {
            let stop = ((here / REGION_SECTORS + 1) * REGION_SECTORS).min(end);
            if !state.to_do.has(here / REGION_SECTORS) {
                match out.last_mut() {
                    Some((from, length)) if *from + *length == here => *length += stop - here,
                    _ => out.push((here, stop - here)),
                }
            }
            here = stop;
        }
        out
    }

    /// R27: an error of the disk below ends the commit, not the guest's write. Once the record may be durable it is
    /// the guest's error.
    fn below_failed(&self, error: DiskError) -> Result<(), DiskError> {
        let mut state = self.state.borrow_mut();
        if state.deciding {
            return Err(error);
        }
        tracing::warn!(%error, "the commit stops: the disk below cannot be written");
        state.failed = Some(error);
        Ok(())
    }

    async fn below<'a>(&'a self, change: Io<'a>) -> Result<(), DiskError> {
        match change.await {
            Ok(()) => Ok(()),
            Err(error) => self.below_failed(error),
        }
    }

    pub(crate) async fn write(&self, at: Sector, from: &Segments<'_>, safe: Safe) -> Result<(), DiskError> {
        let count = from.len() as u64 / SECTOR_BYTES;
        let _inside = self.enter(at, count).await;
        let parts = self.doubled(at, count);
        let slices: SmallVec<[(u64, Segments<'_>); 2]> = parts
            .iter()
            .map(|(first, length)| {
                let start = ((first - at.0) * SECTOR_BYTES) as usize;
                (*first, from.slice(start, (length * SECTOR_BYTES) as usize))
            })
            .collect();
        let mut list: SmallVec<[Io<'_>; 4]> = SmallVec::new();
        list.push(self.top.write(at, from, safe));
        for (first, slice) in &slices {
            list.push(Box::pin(self.below(self.target.write(Sector(*first), slice, safe))));
        }
        together::all(list).await
    }

    pub(crate) async fn zero(&self, at: Sector, count: u64, may_free: bool) -> Result<(), DiskError> {
        let _inside = self.enter(at, count).await;
        let parts = self.doubled(at, count);
        // One after the other: the redo log looks at what is below to see what it may leave out.
        self.top.zero(at, count, may_free).await?;
        for (first, length) in parts {
            self.below(self.target.zero(Sector(first), length, may_free)).await?;
        }
        Ok(())
    }

    pub(crate) async fn flush(&self) -> Result<(), DiskError> {
        let both = {
            let state = self.state.borrow();
            state.flush_both && state.failed.is_none()
        };
        let mut list: SmallVec<[Io<'_>; 4]> = SmallVec::new();
        list.push(self.top.flush());
        if both {
            list.push(Box::pin(self.below(self.target.flush())));
        }
        together::all(list).await
    }

    /// Takes regions out of the pass that no redo log can hold.
    fn leave_out(&self, sectors: u64, redos: &[Rc<RedoDisk>]) {
        let mut held = Regions::none(sectors);
        redos.iter().for_each(|redo| redo.possible(|from, to| held.mark(from, to)));
        let mut state = self.state.borrow_mut();
        // Writes under way went to the redo log alone: what they touch is copied.
        state.inside.iter().for_each(|(from, to, _)| held.mark(*from, *to));
        state.to_do = held;
    }

    /// Takes up to `width` regions to be copied next.
    fn take(&self, from: u64, width: usize) -> SmallVec<[u64; WIDTH]> {
        let mut state = self.state.borrow_mut();
        let mut taken = SmallVec::new();
        let mut next = from;
        while let Some(region) = state.to_do.next(next)
            && taken.len() < width
        {
            state.busy.push(region);
            taken.push(region);
            next = region + 1;
        }
        taken
    }

    fn done(&self, region: u64, copied: bool) {
        let mut state = self.state.borrow_mut();
        if copied {
            state.to_do.clear(region);
        }
        state.busy.retain(|b| *b != region);
        drop(state);
        self.changed.wake_all();
    }

    async fn copy_region(&self, region: u64, redos: &[Rc<RedoDisk>], sectors: u64) -> Result<(), DiskError> {
        let result = self.copy_range(region, redos, sectors).await;
        self.done(region, result.is_ok());
        result
    }

    async fn copy_range(&self, region: u64, redos: &[Rc<RedoDisk>], sectors: u64) -> Result<(), DiskError> {
        let from = region * REGION_SECTORS;
        let to = (from + REGION_SECTORS).min(sectors);
        let free = || {
            let state = self.state.borrow();
            (!state.inside.iter().any(|(a, b, _)| *a < to && from < *b)).then_some(())
        };
        self.changed.until(free).await;
        let runs = held_runs(redos, from, to).await?;
        let (Some(first), Some(last)) = (runs.first(), runs.last()) else { return Ok(()) };
        let (start, stop) = (first.0, last.0 + last.1);
        let mut buffer = Buffer::zeroed(((stop - start) * SECTOR_BYTES) as usize);
        self.top.read(Sector(start), &SegmentsMut::new(&mut buffer)).await?;
        let slices: Vec<(u64, Segments<'_>)> = runs
            .iter()
            .map(|(at, count)| {
                let begin = ((at - start) * SECTOR_BYTES) as usize;
                (*at, Segments::new(&buffer[begin..begin + (count * SECTOR_BYTES) as usize]))
            })
            .collect();
        let writes =
            slices.iter().map(|(at, slice)| self.target.write(Sector(*at), slice, Safe::AtNextFlush));
        together::in_turns(32, writes).await
    }
}

/// What any of the redo logs holds between two sectors: (first, sectors), in order.
async fn held_runs(redos: &[Rc<RedoDisk>], from: u64, to: u64) -> Result<Vec<(u64, u64)>, DiskError> {
    let mut held = [false; REGION_SECTORS as usize];
    for redo in redos {
        let mut at = from;
        while let Some((first, count)) = redo.next_held(Sector(at), Sector(to)).await? {
            let end = (first.0 + count).min(to);
            held[(first.0 - from) as usize..(end - from) as usize].fill(true);
            at = end;
        }
    }
    let mut runs = Vec::new();
    let mut offset = 0;
    for run in held.chunk_by(|a, b| a == b) {
        if run[0] {
            runs.push((from + offset, run.len() as u64));
        }
        offset += run.len() as u64;
    }
    Ok(runs)
}

/// A write under way through the mirror.
struct Inside<'a> {
    mirror: &'a Mirror,
    number: u64,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.mirror.state.borrow_mut().inside.retain(|i| i.2 != self.number);
        self.mirror.changed.wake_all();
    }
}

/// A commit under way. Dropping it stops it: the disk runs on over its redo logs, and a later commit begins again.
pub struct Commit {
    disk: Rc<VmDisk>,
    into: usize,
    /// Both are let go by the flip, so that the redo logs' files are closed.
    mirror: RefCell<Option<Rc<Mirror>>>,
    redos: RefCell<Vec<Rc<RedoDisk>>>,
    redo_paths: Vec<String>,
    target_path: String,
    total: u64,
    /// How long the gate was closed to begin.
    begin_held: Duration,
    flipped: Cell<bool>,
    lock: ChainLock,
}

/// Redo logs that are not needed any more.
pub struct LeftOver {
    folder: Rc<dyn Folder>,
    /// Reads and flushes under way may still have them.
    open: Vec<Weak<RedoDisk>>,
    /// Their descriptors, lowest first.
    pub paths: Vec<String>,
    /// The descriptor that is the top now.
    pub top: String,
    /// How long the gate was closed for the flip.
    pub held: Duration,
}

impl VmDisk {
    /// Begins to fold everything above link `into` (0 is the base) into that link. The mark "mixed" is durable when
    /// this returns, and nothing is copied yet.
    pub async fn start_commit(self: &Rc<Self>, into: usize) -> Result<Commit, ChainError> {
        Commit::start(self, into, ChainLock::take(self)?, Mark::Mixed).await
    }
}

impl Commit {
    pub(crate) async fn start(
        disk: &Rc<VmDisk>,
        into: usize,
        lock: ChainLock,
        mark: Mark,
    ) -> Result<Self, ChainError> {
        let links: Vec<_> = disk.links.borrow().clone();
        let refuse = |what: String| Err(ChainError::Refused(what));
        if into + 1 >= links.len() {
            return refuse(format!("{}: there is no redo log above link {into}", disk.top_path()));
        }
        if let Some(foreign) = links[into..].iter().find(|link| link.kind == LinkKind::SeSparse) {
            return refuse(format!(
                "{}: an SEsparse redo log is only read; nothing is committed into or out of it",
                foreign.path
            ));
        }
        let target = Rc::clone(&links[into]);
        // R17: another child would lose the parent it was made over.
        let next = &links[into + 1].path;
        if let Some(other) = children(&disk.folder, &target.path).await?.iter().find(|c| *c != next) {
            return refuse(format!(
                "{}: has another child, {other}; commit or remove that first",
                target.path
            ));
        }
        for claim in &target.claims {
            claim.change(Hold::Write)?;
        }
        if mark == Mark::Mixed {
            let top = disk.top_path();
            rewrite(&*disk.folder, &target, |d| set_mixed(d, Some(&top))).await?;
        }
        let sectors = disk.shape().sectors;
        let mirror = Mirror::new(disk.top_layer(), Rc::clone(target.layer.inner()), sectors);
        let redos: Vec<_> = links[into + 1..].iter().filter_map(|l| l.redo.clone()).collect();
        let redo_paths = links[into + 1..].iter().map(|l| l.path.clone()).collect();
        let target_path = target.path.clone();
        // Writes that began before the mirror was there are over before it counts.
        let begun = lane::now();
        disk.gate.close();
        disk.gate.drained().await;
        *disk.mirror.borrow_mut() = Some(Rc::clone(&mirror));
        disk.gate.open();
        let begin_held = lane::now().saturating_duration_since(begun);
        mirror.leave_out(sectors, &redos);
        let total = mirror.state.borrow().to_do.left;
        Ok(Self {
            disk: Rc::clone(disk),
            into,
            mirror: RefCell::new(Some(mirror)),
            redos: RefCell::new(redos),
            redo_paths,
            target_path,
            total,
            begin_held,
            flipped: Cell::new(false),
            lock,
        })
    }

    /// How long the gate was closed for the commit to begin: as long as the writes under way took.
    pub fn begin_held(&self) -> Duration {
        self.begin_held
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        let bytes = REGION_SECTORS * SECTOR_BYTES;
        let left = self.mirror.borrow().as_ref().map_or(0, |m| m.state.borrow().to_do.left);
        Progress { done_bytes: (self.total - left.min(self.total)) * bytes, total_bytes: self.total * bytes }
    }

    fn mirror(&self) -> Result<Rc<Mirror>, ChainError> {
        let mirror = self.mirror.borrow().clone();
        mirror.ok_or_else(|| ChainError::Refused(format!("{}: the commit is over", self.target_path)))
    }

    /// The pass (R23): copies until nothing is to do. `go_on` is asked after every round; false stops, and copying
    /// may be taken up again by another call.
    pub async fn copy(&self, go_on: &mut dyn FnMut(Progress) -> bool) -> Result<(), ChainError> {
        let (mirror, redos) = (self.mirror()?, self.redos.borrow().clone());
        let sectors = self.disk.shape().sectors;
        let mut pace = Pace::new(&self.disk.latency);
        let mut cursor = 0;
        loop {
            if let Some(error) = &mirror.state.borrow().failed {
                return Err(error.clone().into());
            }
            let taken = mirror.take(cursor, pace.width());
            let Some(last) = taken.last() else {
                match cursor {
                    0 => return Ok(()),
                    // Regions are taken in rising order; one that failed before is behind the cursor.
                    _ => cursor = 0,
                }
                continue;
            };
            cursor = last + 1;
            let copies = taken
                .iter()
                .map(|region| -> Io<'_> { Box::pin(mirror.copy_region(*region, &redos, sectors)) });
            together::all(copies.collect()).await?;
            if !go_on(self.progress()) {
                return Ok(());
            }
            pace.rest(&self.disk.latency).await;
        }
    }

    /// The flip (R28). `decide` writes the caller's record durably: "the top is link `into`". When it fails nobody
    /// knows whether the record is there: both sides are kept right, and the flip may be tried again.
    pub async fn flip(
        &self,
        decide: impl AsyncFnOnce() -> Result<(), DiskError>,
    ) -> Result<LeftOver, ChainError> {
        let mirror = self.mirror()?;
        let left = mirror.state.borrow().to_do.left;
        if left > 0 {
            return Err(ChainError::Refused(format!("{left} regions are not copied yet")));
        }
        settle_both(&mirror).await?;
        if planted(Fault::RedoDeletedBeforeFlip) {
            for path in &self.redo_paths {
                remove_link(&*self.disk.folder, path).await?;
            }
        }
        decide().await?;
        drop(mirror);
        let held = self.switch().await;
        let target = self.disk.top_link();
        // R17: the parent's new CID comes with the flip, not before.
        rewrite(&*self.disk.folder, &target, |descriptor| {
            descriptor.set_cid(Cid::random());
            set_mixed(descriptor, None)
        })
        .await?;
        self.disk.set_touched(true);
        Ok(self.left_over(held))
    }

    /// In the gate, in memory: the target is the top. Waits only for writes under way.
    async fn switch(&self) -> Duration {
        let disk = &self.disk;
        let begun = lane::now();
        disk.gate.close();
        disk.gate.drained().await;
        disk.links.borrow_mut().truncate(self.into + 1);
        let target = Rc::clone(&disk.top_link().layer);
        target.freeze(false);
        *disk.top.borrow_mut() = target;
        *disk.mirror.borrow_mut() = None;
        disk.set_touched(true);
        self.flipped.set(true);
        disk.gate.open();
        *self.mirror.borrow_mut() = None;
        lane::now().saturating_duration_since(begun)
    }

    fn left_over(&self, held: Duration) -> LeftOver {
        LeftOver {
            folder: Rc::clone(&self.disk.folder),
            open: self.redos.take().iter().map(Rc::downgrade).collect(),
            paths: self.redo_paths.clone(),
            top: self.target_path.clone(),
            held,
        }
    }
}

/// Everything acknowledged is durable below, and stays so: from here on a flush of the guest reaches both sides.
async fn settle_both(mirror: &Mirror) -> Result<(), ChainError> {
    mirror.state.borrow_mut().flush_both = true;
    if let Err(error) = mirror.target.flush().await {
        mirror.state.borrow_mut().failed = Some(error.clone());
        return Err(error.into());
    }
    let mut state = mirror.state.borrow_mut();
    if let Some(error) = &state.failed {
        return Err(error.clone().into());
    }
    state.deciding = true;
    Ok(())
}

impl Drop for Commit {
    fn drop(&mut self) {
        if self.flipped.get() {
            return;
        }
        let deciding = self.mirror.borrow().as_ref().is_some_and(|m| m.state.borrow().deciding);
        if deciding {
            // The record may be durable or not: both sides are kept right until the disk is opened again.
            tracing::error!("a commit ended with its record in doubt: the disk goes on writing both sides");
            self.lock.stick();
            return;
        }
        // The redo logs are complete: reads and writes go on over them.
        *self.disk.mirror.borrow_mut() = None;
        let links = self.disk.links.borrow();
        if let Some(target) = links.get(self.into) {
            for claim in &target.claims {
                if let Err(error) = claim.change(Hold::Read) {
                    tracing::error!(%error, "the claim of a stopped commit could not be lowered");
                }
            }
        }
    }
}

impl LeftOver {
    /// Deletes the files (I5: only now). Lowest first, so that what is left can still be found from the top.
    ///
    /// Waits for reads that began before the flip, and for whoever holds a frozen disk of this chain, up to 10 s.
    pub async fn remove(&self) -> Result<(), ChainError> {
        for _ in 0..10_000 {
            if self.open.iter().all(|redo| redo.strong_count() == 0) {
                break;
            }
            lane::sleep(Duration::from_millis(1)).await;
        }
        for path in &self.paths {
            remove_link(&*self.folder, path).await?;
        }
        Ok(())
    }
}

/// After a crash during a commit into the disk at `path`: the record is there (`decided`: that disk is the top) or not.
/// Decided, the redo logs are removed and the disk gets its new CID and loses its mark; else nothing is done, the
/// chain opens at its old top and the commit begins again. Runs before the disk opens; running it twice is harmless.
pub async fn recover_flip(folder: &dyn Folder, path: &str, decided: bool) -> Result<(), ChainError> {
    let mut descriptor = load_descriptor(folder, path, None).await?;
    let Some(from) = mixed(&descriptor).map(str::to_owned) else { return Ok(()) };
    if !decided {
        return Ok(());
    }
    let found = survey(folder, &from).await;
    let above: Vec<_> = found.links.iter().map(|l| l.path.clone()).take_while(|p| p != path).collect();
    for redo in above.iter().rev() {
        remove_link(folder, redo).await?;
    }
    remove_link(folder, &from).await?;
    descriptor.set_cid(Cid::random());
    descriptor.remove_ddb(MIXED_KEY);
    folder.replace(path, &descriptor.to_bytes()).await?;
    Ok(())
}
