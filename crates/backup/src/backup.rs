//! Taking a backup: reads through the lane, hashes and compresses beside it, seals last.

use std::collections::{HashSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{Disk, DiskError, Extents, Generation, SECTOR_BYTES, Sector, SegmentsMut};
use lane::Buffer;
use serde_json::{Map, Value};

use crate::chunk::ChunkId;
use crate::copy::{Batch, Copy, Step};
use crate::error::Error;
use crate::format::{AREA_BYTES, MAX_AREAS, MAX_DISKS, MAX_FILE_BYTES, MAX_FILES, PIECE_BYTES};
use crate::manifest::{BackupId, Cut, DiskRecord, FileRecord, Label, Manifest, Mode, Tracking};
use crate::progress::Progress;
use crate::repository::{Inner, Repository, file_chunks};
use crate::session::Session;
use crate::survey::{AREA_SECTORS, PIECE_SECTORS, PIECES, Runs, Sampler, Todo};
use crate::unfinished::{self, Partial, Unfinished};

/// Bytes read for one batch.
const BATCH_BYTES: usize = 512 << 10;
/// Steps of one batch, where they need no bytes.
const BATCH_STEPS: usize = 4096;
/// Extents asked for at a time.
const STATUS_EXTENTS: usize = 1024;
/// Reads of one batch under way together.
const READS_AT_ONCE: usize = 16;
/// How far a copy is gets noted at least this often, and whenever a pack is full.
const NOTE_EVERY: Duration = Duration::from_secs(15);

/// Whether to take a disk's word on what has changed.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub enum Trust {
    /// Yes, unless an audit has found it wrong earlier.
    #[default]
    Unless,
    /// Yes again, whatever an audit found earlier: the cause was found.
    Again,
    /// No: read everything.
    Never,
}

/// One frozen disk to be backed up.
pub struct SourceDisk {
    /// Its name in the backup, unique there; an incremental finds its base by it.
    pub name: String,
    /// The frozen disk.
    pub disk: Rc<dyn Disk>,
    /// The cut it shows, to be asked about by the next incremental; `None` when the disk has no change tracking.
    pub cut: Option<Generation>,
    /// Whether to believe change tracking.
    pub trust: Trust,
    /// What the caller wants to know again.
    pub metadata: Map<String, Value>,
}

/// How much of what is said to be unchanged is read all the same (R46).
#[derive(Copy, Clone, Debug)]
pub struct Audit {
    /// Share of the areas that hold data: 0.001 by default.
    pub share: f64,
    /// At most this many bytes of a disk: 1 GiB by default.
    pub limit_bytes: u64,
    /// Which areas; drawn by chance when not given.
    pub seed: Option<[u8; 32]>,
}

impl Default for Audit {
    fn default() -> Self {
        Self { share: 0.001, limit_bytes: 1 << 30, seed: None }
    }
}

/// What to back up.
pub struct Plan {
    /// The backup to be. An attempt with the id of one that was cut off goes on with what that has stored, and must
    /// bring the same disks as of the same cuts; a disk without a cut is read again.
    pub id: BackupId,
    /// What it is a backup of, usually a VM's name.
    pub name: String,
    /// Consistency as reached.
    pub label: Label,
    /// The backup to compare with; `None` for a full one.
    pub base: Option<BackupId>,
    /// The disks, frozen at one instant.
    pub disks: Vec<SourceDisk>,
    /// Small files: name and content.
    pub files: Vec<(String, Vec<u8>)>,
    /// What the caller wants to know again.
    pub metadata: Map<String, Value>,
    /// The audit of incrementals.
    pub audit: Audit,
}

impl Plan {
    fn check(&self) -> Result<(), Error> {
        let refuse = |text: String| Err(Error::Refused(text));
        if self.disks.len() > MAX_DISKS || self.files.len() > MAX_FILES {
            return refuse(format!("a backup holds at most {MAX_DISKS} disks and {MAX_FILES} files"));
        }
        let mut names = HashSet::new();
        for disk in &self.disks {
            if disk.disk.shape().bytes().div_ceil(AREA_BYTES) > MAX_AREAS {
                return refuse(format!("disk {} is larger than 2 PiB", disk.name));
            }
            if !names.insert(&disk.name) {
                return refuse(format!("two disks are named {}", disk.name));
            }
        }
        names.clear();
        for (name, content) in &self.files {
            if content.len() as u64 > MAX_FILE_BYTES {
                return refuse(format!("file {name} is larger than {MAX_FILE_BYTES} bytes"));
            }
            if !names.insert(name) {
                return refuse(format!("two files are named {name}"));
            }
        }
        Ok(())
    }
}

impl Repository {
    /// Backs up disks and files; gives the sealed manifest. Runs on a lane: reads go through the disks, hashing and
    /// compression to other threads. Until it returns the backup does not exist; after a failure or a crash what
    /// was stored is used by the next attempt, and one with the same id goes on where the packs end. An attempt at a
    /// backup that is there already gives its manifest.
    pub async fn backup(&self, plan: Plan, progress: &Progress) -> Result<Manifest, Error> {
        plan.check()?;
        let (this, doing) = (self.clone(), format!("kagami backup create {}", plan.name));
        let (id, base) = (plan.id, plan.base);
        let begun = match lane::offload(move || this.begin_backup(&doing, id, base)).await? {
            Begun::Sealed(manifest) => return Ok(*manifest),
            Begun::Open(begun) => begun,
        };
        let OpenAttempt { session, base, found } = *begun;
        plan.disks.iter().for_each(|d| progress.expect(d.disk.shape().bytes()));
        let mut disks = Vec::with_capacity(plan.disks.len());
        for source in &plan.disks {
            if let Some(done) = found
                .as_ref()
                .and_then(|f| f.done.iter().find(|d| is_same(source, &d.name, d.length_bytes, d.cut)))
            {
                progress.done(done.length_bytes);
                disks.push(done.clone());
                continue;
            }
            let old = base.as_ref().and_then(|b| b.disks.iter().find(|d| d.name == source.name));
            let partial = found
                .as_ref()
                .and_then(|f| f.partial.as_ref())
                .filter(|p| is_same(source, &p.name, p.length_bytes, p.cut));
            let attempt = Unfinished { id, base: plan.base, done: disks.clone(), partial: None };
            let copying =
                Copying { repository: self, session: &session, source, old, attempt, partial, progress };
            match copying.run(&plan.audit).await {
                Ok(disk) => disks.push(disk),
                Err(error) => {
                    keep_stored(session).await;
                    return Err(error);
                }
            }
        }
        let (repository, files) = (self.clone(), plan.files);
        let mut manifest = Manifest {
            id,
            name: plan.name,
            created_at: jiff::Timestamp::now(),
            base: plan.base,
            label: plan.label,
            disks,
            files: Vec::new(),
            new_bytes: 0,
            stored_bytes: 0,
            metadata: plan.metadata,
        };
        lane::offload(move || {
            manifest.files = store_files(&session, &files)?;
            repository.seal(&session, manifest)
        })
        .await
    }

    /// Becomes the writer and looks what there is of a backup and of its base.
    fn begin_backup(&self, doing: &str, id: BackupId, base: Option<BackupId>) -> Result<Begun, Error> {
        let session = self.begin(doing)?;
        match self.manifest(id) {
            Err(Error::NoBackup { .. }) => {}
            sealed => {
                let sealed = sealed?;
                unfinished::forget(&self.inner.store, id)?;
                return Ok(Begun::Sealed(Box::new(sealed)));
            }
        }
        let base = match base.map(|id| self.manifest(id)).transpose() {
            Err(e) if e.is_damage() => {
                tracing::warn!(error = %e, "the base cannot be read: everything is read");
                None
            }
            other => other?,
        };
        let found = Unfinished::find(&self.inner, id, base.as_ref())?;
        Ok(Begun::Open(Box::new(OpenAttempt { session: Arc::new(session), base, found })))
    }

    /// Makes everything durable, the manifest last.
    fn seal(&self, session: &Session, mut manifest: Manifest) -> Result<Manifest, Error> {
        use std::sync::atomic::Ordering::Relaxed;
        session.finish()?;
        manifest.new_bytes = session.written.new_bytes.load(Relaxed);
        manifest.stored_bytes = session.written.stored_bytes.load(Relaxed);
        manifest.created_at = jiff::Timestamp::now();
        self.inner.store.put(&manifest.id.file(), &manifest.encode(self.inner.id)?)?;
        if let Err(error) = unfinished::forget(&self.inner.store, manifest.id) {
            tracing::debug!(%error, "the record of an attempt that became a backup stays until the next prune");
        }
        Ok(manifest)
    }
}

/// An attempt that was begun.
struct OpenAttempt {
    session: Arc<Session>,
    base: Option<Manifest>,
    /// What an earlier attempt at the same backup has reached.
    found: Option<Unfinished>,
}

enum Begun {
    /// The backup is there: an earlier attempt sealed it and could not tell any more.
    Sealed(Box<Manifest>),
    Open(Box<OpenAttempt>),
}

/// A record with this name, length and cut is of the same disk, frozen at the same instant.
fn is_same(source: &SourceDisk, name: &str, length_bytes: u64, cut: Option<Cut>) -> bool {
    let now = source.cut.map(Cut::from);
    name == source.name && length_bytes == source.disk.shape().bytes() && now.is_some() && cut == now
}

/// Completes the last pack of a backup that ends early, so that the next attempt finds what it holds.
async fn keep_stored(session: Arc<Session>) {
    if let Err(error) = lane::offload(move || session.finish()).await {
        tracing::debug!(%error, "what was stored last will be stored again");
    }
}

fn store_files(session: &Session, files: &[(String, Vec<u8>)]) -> Result<Vec<FileRecord>, Error> {
    let mut records = Vec::with_capacity(files.len());
    for (name, content) in files {
        let chunks = file_chunks(content).map(|c| session.store(c)).collect::<Result<_, _>>()?;
        records.push(FileRecord { name: name.clone(), length_bytes: content.len() as u64, chunks });
    }
    Ok(records)
}

/// One disk being copied.
struct Copying<'a> {
    repository: &'a Repository,
    session: &'a Arc<Session>,
    source: &'a SourceDisk,
    old: Option<&'a DiskRecord>,
    /// The attempt so far, without this disk.
    attempt: Unfinished,
    /// What an earlier attempt has reached of this disk.
    partial: Option<&'a Partial>,
    progress: &'a Progress,
}

/// What one pass over a disk found.
struct Pass {
    root: Option<ChunkId>,
    resumed_at_bytes: u64,
    read_bytes: u64,
    changed_bytes: u64,
    audited_bytes: u64,
    allocated_bytes: u64,
}

/// Why a pass ended early.
enum Stop {
    /// The disk does not know the base's cut (R45).
    Unknown,
    /// The audit found a change that was not told of (R46).
    Difference(u64),
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl Copying<'_> {
    async fn run(&self, audit: &Audit) -> Result<DiskRecord, Error> {
        let mut tracking = self.old.map_or(Tracking::Trusted, |old| old.tracking.clone());
        if self.source.trust == Trust::Again {
            tracking = Tracking::Trusted;
        }
        let ask = self.source.trust != Trust::Never && tracking == Tracking::Trusted;
        let since = self.old.filter(|_| ask).and_then(|old| old.cut);
        let full = self.partial.filter(|p| p.mode == Mode::Full);
        let mut wasted = (0, 0);
        if let (Some(since), None) = (since, full) {
            let went_on = self.partial.filter(|p| p.since == Some(since));
            let mut pass = Survey::new(self, self.pass(Some(since), &tracking, went_on), audit);
            match pass.run().await {
                Ok(done) => return Ok(self.record(done, Mode::Incremental, tracking)),
                // A damaged tree is nothing to build on; what is on the disk is.
                Err(Stop::Failed(e)) if e.is_damage() => {
                    tracing::warn!(disk = self.source.name, error = %e, "the base is damaged: everything is read");
                }
                Err(Stop::Failed(e)) => return Err(e),
                Err(Stop::Unknown) => {}
                Err(Stop::Difference(at_bytes)) => {
                    let disk = &self.source.name;
                    tracing::error!(disk, at_bytes, "changed without being told: change tracking is off");
                    tracking = Tracking::Off { at_bytes, since: self.attempt.id };
                }
            }
            wasted = (pass.read_bytes, pass.audited_bytes);
            self.progress.again(pass.done_bytes);
        }
        if let Some(full) = full {
            tracking = full.tracking.clone();
        }
        match Survey::new(self, self.pass(None, &tracking, full), audit).run().await {
            Ok(mut done) => {
                done.read_bytes += wasted.0;
                done.audited_bytes += wasted.1;
                Ok(self.record(done, Mode::Full, tracking))
            }
            Err(Stop::Failed(e)) => Err(e),
            Err(Stop::Unknown | Stop::Difference(_)) => {
                Err(Error::disk(&self.source.name, 0, DiskError::UnknownGeneration))
            }
        }
    }

    /// A pass over the disk that begins where an earlier one was, or at the start.
    fn pass(&self, since: Option<Cut>, tracking: &Tracking, earlier: Option<&Partial>) -> Partial {
        let base = since.and(self.old).and_then(|old| old.root);
        let (reached, root) = earlier.map_or((0, base), |p| (p.reached, p.root));
        Partial {
            name: self.source.name.clone(),
            length_bytes: self.source.disk.shape().bytes(),
            cut: self.source.cut.map(Cut::from),
            mode: if since.is_some() { Mode::Incremental } else { Mode::Full },
            since,
            tracking: tracking.clone(),
            reached,
            root,
        }
    }

    fn record(&self, pass: Pass, mode: Mode, tracking: Tracking) -> DiskRecord {
        let shape = self.source.disk.shape();
        DiskRecord {
            name: self.source.name.clone(),
            length_bytes: shape.bytes(),
            physical_block_bytes: shape.physical_block_bytes,
            root: pass.root,
            cut: self.source.cut.map(Into::into),
            mode,
            tracking,
            read_bytes: pass.read_bytes,
            resumed_at_bytes: pass.resumed_at_bytes,
            changed_bytes: pass.changed_bytes,
            audited_bytes: pass.audited_bytes,
            allocated_bytes: pass.allocated_bytes,
            metadata: self.source.metadata.clone(),
        }
    }
}

type InFlight = VecDeque<lane::Task<Result<Buffer, Error>>>;

/// One pass over a disk: asks what is where, reads what must be read, hands it on in batches.
struct Survey<'a> {
    copying: &'a Copying<'a>,
    /// The pass, as it began.
    pass: Partial,
    since: Option<Generation>,
    /// When the pass was last noted.
    noted_at: Instant,
    copy: Option<Arc<Copy>>,
    sampler: Sampler,
    length_bytes: u64,
    steps: Vec<Step>,
    reads: Vec<(u64, usize, usize)>,
    buffer: Option<Buffer>,
    used: usize,
    number: u64,
    in_flight: InFlight,
    free: Vec<Buffer>,
    at_once: usize,
    done_bytes: u64,
    read_bytes: u64,
    changed_bytes: u64,
    audited_bytes: u64,
    allocated_bytes: u64,
}

impl<'a> Survey<'a> {
    fn new(copying: &'a Copying<'a>, pass: Partial, audit: &Audit) -> Self {
        let base = copying.old.and_then(|old| old.root);
        let (inner, session) = (Arc::clone(&copying.repository.inner), Arc::clone(copying.session));
        let seed = audit.seed.unwrap_or_else(|| {
            *blake3::hash(&[*uuid::Uuid::new_v4().as_bytes(), *uuid::Uuid::new_v4().as_bytes()].concat())
                .as_bytes()
        });
        // The chance is set so that the cap is spread over the whole disk, not used up at its beginning.
        let allocated = copying.old.map_or(0, |old| old.allocated_bytes).max(1);
        let share = audit.share.min(audit.limit_bytes as f64 / allocated as f64);
        let threads = std::thread::available_parallelism().map_or(2, |n| n.get().min(8));
        Self {
            copying,
            since: pass.since.map(Generation::from),
            noted_at: lane::now(),
            copy: Some(Arc::new(Copy::new(inner, session, base, (pass.reached, pass.root)))),
            pass,
            sampler: Sampler::new(seed, share, audit.limit_bytes / AREA_BYTES),
            length_bytes: copying.source.disk.shape().bytes(),
            steps: Vec::new(),
            reads: Vec::new(),
            buffer: None,
            used: 0,
            number: 0,
            in_flight: VecDeque::new(),
            free: Vec::new(),
            at_once: threads + 2,
            done_bytes: 0,
            read_bytes: 0,
            changed_bytes: 0,
            audited_bytes: 0,
            allocated_bytes: 0,
        }
    }

    async fn run(&mut self) -> Result<Pass, Stop> {
        let mut result = self.survey().await;
        // Whatever happened: what is under way holds the session, and with it the lock.
        while let Some(task) = self.in_flight.pop_front() {
            let ended = task.await;
            result = result.and_then(|()| Ok(ended.map(drop)?));
        }
        if let Err(Stop::Failed(_)) = &result
            && let Some(note) = self.note()
            && let Err(error) = lane::offload(move || note.take()).await
        {
            tracing::debug!(%error, "the next attempt goes on from what was noted before");
        }
        result?;
        let areas = self.length_bytes.div_ceil(AREA_BYTES);
        let copy = self.copy.take().and_then(Arc::into_inner);
        let Some(copy) = copy else {
            return Err(Error::Refused("a batch outlived its disk".into()).into());
        };
        if let Some(at) = copy.difference() {
            return Err(Stop::Difference(at));
        }
        let root = lane::offload(move || copy.finish(areas)).await?;
        Ok(Pass {
            root,
            resumed_at_bytes: (self.pass.reached * AREA_BYTES).min(self.length_bytes),
            read_bytes: self.read_bytes,
            changed_bytes: self.changed_bytes,
            audited_bytes: self.audited_bytes,
            allocated_bytes: self.allocated_bytes,
        })
    }

    async fn survey(&mut self) -> Result<(), Stop> {
        let sectors = self.length_bytes / SECTOR_BYTES;
        let known_sectors = self.copying.old.map_or(0, |old| old.length_bytes / SECTOR_BYTES);
        let mut at = 0;
        let (mut pieces, mut areas) = (Runs::new(PIECE_SECTORS), Runs::new(AREA_SECTORS));
        let mut extents = Extents::with_limit(STATUS_EXTENTS);
        while at < sectors {
            extents.clear();
            let disk = &self.copying.source.disk;
            match disk.status(Sector(at), sectors - at, self.since, &mut extents).await {
                Ok(()) => {}
                Err(DiskError::UnknownGeneration) if self.since.is_some() => return Err(Stop::Unknown),
                Err(e) => return Err(self.disk_error(at, e).into()),
            }
            let from = at;
            let (mut todo, mut same) = (Vec::new(), Vec::new());
            let mut emit = |first, end, what| todo.push((first, end, what));
            let mut unchanged = |first, end, what| {
                if what == Todo::Same {
                    same.push((first, end));
                }
            };
            for extent in extents.iter() {
                // What the base did not have has changed, whatever the disk says (R44: the grown part).
                let mut parts = [*extent; 2];
                let end = extent.at.0 + extent.count;
                let old_end = known_sectors.clamp(extent.at.0, end);
                parts[0].count = old_end - extent.at.0;
                (parts[1].at, parts[1].count, parts[1].changed) = (Sector(old_end), end - old_end, true);
                for part in parts.iter().filter(|p| p.count > 0) {
                    self.count(part);
                    let what = Todo::of(part, self.since.is_some());
                    pieces.push(part.at.0, part.count, what, &mut emit);
                    areas.push(part.at.0, part.count, what, &mut unchanged);
                }
                at = end;
            }
            if at == from {
                let stuck =
                    DiskError::Io(Arc::new(std::io::Error::other("the disk says nothing of a range")));
                return Err(self.disk_error(at, stuck).into());
            }
            if at >= sectors {
                pieces.finish(&mut emit);
                areas.finish(&mut unchanged);
            }
            for (first, end) in same {
                self.audit(first, end).await?;
            }
            for (first, end, what) in todo {
                self.take(first, end, what).await?;
            }
            self.reached(at * SECTOR_BYTES);
        }
        self.dispatch().await?;
        Ok(())
    }

    fn disk_error(&self, sector: u64, error: DiskError) -> Error {
        Error::disk(&self.copying.source.name, sector * SECTOR_BYTES, error)
    }

    /// Everything before this byte was gone over: told as it is read, as one answer about extents may be the whole disk.
    fn reached(&mut self, bytes: u64) {
        let more = bytes.min(self.length_bytes).saturating_sub(self.done_bytes);
        self.done_bytes += more;
        self.copying.progress.done(more);
    }

    fn count(&mut self, extent: &block::Extent) {
        if extent.kind == block::Kind::Data {
            self.allocated_bytes += extent.count * SECTOR_BYTES;
        }
        if extent.changed || self.since.is_none() {
            self.changed_bytes += extent.count * SECTOR_BYTES;
        }
    }

    /// Takes up a stretch of pieces.
    async fn take(&mut self, first: u64, end: u64, what: Todo) -> Result<(), Stop> {
        // What an earlier attempt has reached is in the tree.
        let first = first.max(self.pass.reached * PIECES);
        match what {
            _ if first >= end => {}
            Todo::Same | Todo::SameZero => {}
            Todo::Zero if self.since.is_none() => {}
            Todo::Zero => self.zero(first, end).await?,
            Todo::Read => {
                let mut at = first;
                while at < end {
                    let stop = (at / PIECES * PIECES + PIECES).min(end);
                    self.read(at, stop).await?;
                    self.reached(stop * PIECE_BYTES);
                    at = stop;
                }
            }
        }
        Ok(())
    }

    /// Pieces became zero: whole areas at once, the rest by the piece.
    async fn zero(&mut self, first: u64, end: u64) -> Result<(), Stop> {
        let (whole, whole_end) = (first.div_ceil(PIECES), end / PIECES);
        let piece = |area: u64, from: u64, to: u64| Step::ZeroPieces {
            area,
            first: (from - area * PIECES) as u8,
            count: (to - from) as u8,
        };
        if whole > whole_end {
            // Inside one area.
            return self.step(piece(first / PIECES, first, end)).await;
        }
        if first < whole * PIECES {
            self.step(piece(whole - 1, first, whole * PIECES)).await?;
        }
        if whole < whole_end {
            self.step(Step::ZeroAreas { from: whole, to: whole_end }).await?;
        }
        if whole_end * PIECES < end {
            self.step(piece(whole_end, whole_end * PIECES, end)).await?;
        }
        Ok(())
    }

    /// Reads some of the areas `first..end`, in which nothing is said to have changed.
    async fn audit(&mut self, first: u64, end: u64) -> Result<(), Stop> {
        let first = first.max(self.pass.reached);
        while let Some(area) = self.sampler.next(first, end) {
            let bytes = self.area_bytes(area);
            let at = self.room(AREA_BYTES as usize).await?;
            self.add_read(area * AREA_BYTES, at, bytes);
            self.audited_bytes += bytes as u64;
            self.step(Step::Audit { area, at, bytes }).await?;
        }
        Ok(())
    }

    fn area_bytes(&self, area: u64) -> usize {
        (self.length_bytes - area * AREA_BYTES).min(AREA_BYTES) as usize
    }

    /// Reads pieces of one area.
    async fn read(&mut self, first: u64, end: u64) -> Result<(), Stop> {
        let area = first / PIECES;
        let start = first * PIECE_BYTES;
        let bytes = ((end * PIECE_BYTES).min(self.length_bytes) - start) as usize;
        let inside = (start - area * AREA_BYTES) as usize;
        let whole = self.area_bytes(area);
        if bytes < whole && self.since.is_some() {
            let at = self.room(bytes.next_multiple_of(PIECE_BYTES as usize)).await?;
            self.add_read(start, at, bytes);
            return self.step(Step::Pieces { area, first: (first - area * PIECES) as u8, at, bytes }).await;
        }
        // A full copy stores areas whole, whatever holes they have: other copies of the same area are the same.
        if let Some(Step::Area { area: last, at, .. }) = self.steps.last()
            && *last == area
        {
            let at = *at;
            self.add_read(start, at + inside, bytes);
            return Ok(());
        }
        let at = self.room(AREA_BYTES as usize).await?;
        if bytes < whole
            && let Some(buffer) = &mut self.buffer
        {
            buffer[at..at + whole].fill(0);
        }
        self.add_read(start, at + inside, bytes);
        self.step(Step::Area { area, at, bytes: whole }).await
    }

    fn add_read(&mut self, start: u64, at: usize, bytes: usize) {
        self.read_bytes += bytes as u64;
        self.copying.progress.read(bytes as u64);
        if let Some((from, into, count)) = self.reads.last_mut()
            && *from + *count as u64 == start
            && *into + *count == at
        {
            *count += bytes;
            return;
        }
        self.reads.push((start, at, bytes));
    }

    /// Makes room in the batch and gives the offset in its buffer.
    async fn room(&mut self, bytes: usize) -> Result<usize, Stop> {
        if self.used + bytes > BATCH_BYTES {
            self.dispatch().await?;
        }
        if self.buffer.is_none() {
            self.buffer = Some(self.free.pop().unwrap_or_else(|| Buffer::zeroed(BATCH_BYTES)));
        }
        let at = self.used;
        self.used += bytes;
        Ok(at)
    }

    async fn step(&mut self, step: Step) -> Result<(), Stop> {
        // An area of a full copy may get more reads, so a batch is not closed here but when room is asked for.
        self.steps.push(step);
        if self.steps.len() >= BATCH_STEPS && self.since.is_some() { self.dispatch().await } else { Ok(()) }
    }

    /// A note of how far the pass is; none for a disk without a cut, which nobody would know again.
    fn note(&self) -> Option<Note> {
        let copying = self.copying;
        copying.source.cut?;
        Some(Note {
            inner: Arc::clone(&copying.repository.inner),
            session: Arc::clone(copying.session),
            copy: Arc::clone(self.copy.as_ref()?),
            attempt: copying.attempt.clone(),
            pass: self.pass.clone(),
        })
    }

    /// Sends the batch on its way; waits for the oldest when many are under way.
    async fn dispatch(&mut self) -> Result<(), Stop> {
        self.copying.progress.check()?;
        if self.steps.is_empty() {
            return Ok(());
        }
        let Some(copy) = &self.copy else { return Ok(()) };
        if let Some(at) = copy.difference() {
            return Err(Stop::Difference(at));
        }
        let buffer = self.buffer.take().unwrap_or_else(|| Buffer::zeroed(0));
        let batch = Batch { number: self.number, steps: std::mem::take(&mut self.steps), buffer };
        let reads = std::mem::take(&mut self.reads);
        (self.number, self.used) = (self.number + 1, 0);
        let (copy, source) = (Arc::clone(copy), self.copying.source);
        let (disk, name) = (Rc::clone(&source.disk), source.name.clone());
        self.in_flight.push_back(lane::spawn(async move {
            let batch = read_batch(&*disk, &name, batch, &reads).await?;
            lane::offload(move || copy.process(batch)).await
        }));
        let late = lane::now() >= self.noted_at + NOTE_EVERY;
        if late || self.copying.session.fills_a_pack() {
            self.noted_at = lane::now();
            if let Some(note) = self.note() {
                let session = Arc::clone(self.copying.session);
                let noted = lane::offload(move || match late || session.fills_a_pack() {
                    true => note.take(),
                    // Others have sealed the pack meanwhile: at the next one.
                    false => Ok(()),
                });
                self.in_flight.push_back(lane::spawn(async { noted.await.map(|()| Buffer::zeroed(0)) }));
            }
        }
        while self.in_flight.len() >= self.at_once {
            if let Some(task) = self.in_flight.pop_front() {
                let buffer = task.await?;
                if buffer.len() == BATCH_BYTES {
                    self.free.push(buffer);
                }
            }
        }
        Ok(())
    }
}

/// Notes how far a pass is.
struct Note {
    inner: Arc<Inner>,
    session: Arc<Session>,
    copy: Arc<Copy>,
    attempt: Unfinished,
    pass: Partial,
}

impl Note {
    /// The record is written when all that it says is durable: later, on another thread.
    fn take(mut self) -> Result<(), Error> {
        (self.pass.reached, self.pass.root) = self.copy.reached()?;
        self.attempt.partial = Some(self.pass);
        let (attempt, inner) = (self.attempt, self.inner);
        self.session.settle(Box::new(move || attempt.write(&inner.store, inner.id)))
    }
}

/// Does the reads of a batch, some of them together.
async fn read_batch(
    disk: &dyn Disk,
    name: &str,
    mut batch: Batch,
    reads: &[(u64, usize, usize)],
) -> Result<Batch, Error> {
    let mut sorted: Vec<(u64, usize, usize)> = reads.to_vec();
    sorted.sort_unstable_by_key(|(_, at, _)| *at);
    let mut rest: &mut [u8] = &mut batch.buffer;
    let (mut taken, mut parts) = (0, Vec::with_capacity(sorted.len()));
    for (start, at, bytes) in sorted {
        let (part, after) = rest.split_at_mut(at - taken).1.split_at_mut(bytes);
        (rest, taken) = (after, at + bytes);
        parts.push((start, SegmentsMut::new(part)));
    }
    for group in parts.chunks(READS_AT_ONCE) {
        let reads = group.iter().map(|(start, into)| disk.read(Sector::at_byte(*start), into));
        for (result, (start, _)) in crate::together::together(reads.collect()).await.into_iter().zip(group) {
            result.map_err(|e| Error::disk(name, *start, e))?;
        }
    }
    drop(parts);
    Ok(batch)
}
