//! Restoring over the VM that a backup was made from, all or none (R35).
//!
//! Before the first write there is a cut of everything that the VM lies on, and a record in the home that names it. From
//! then until the last disk is whole the disks hold a mixture: nobody gets at them, a restart of the daemon changes
//! nothing of that, and the restore either goes on or is undone from the cut. The record stays afterwards: what was there
//! before can be had back until it is accepted.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use backup::DiskRecord;
use block::{Disk, DiskError, Extent, Extents, Generation, Kind as Holds, SECTOR_BYTES, Safe, Sector};
use block::{Segments, SegmentsMut};
use lane::Buffer;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vm::{OpenDisk, Slot, Vm};
use vmdisk::{Open, VmDisk};

use super::luns::FoundLun;
use super::pools::disk_problem;
use super::restores::{Source, Sums, told};
use super::{Folder, Occupied, Store};
use crate::files::Versioned;
use crate::jobs::Progress;
use crate::model::{NewRestore, Plan};
use crate::problem::{Kind, Outcome, Problem};
use crate::units::show_size;

/// Format of the record.
const FORMAT: u32 = 1;
/// What a job is called that works on a VM in place: nobody else gets at its disks meanwhile.
const IN_PLACE: &str = "restore in place";
/// What differs is written in runs of this many bytes.
const PIECE: usize = 4096;
/// Bytes compared at a time.
const PORTION: u64 = 1 << 20;

/// How far a restore in place is.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Stage {
    /// Nothing is written yet; the cut may be missing.
    Begun,
    /// The disks hold a mixture.
    Mixed,
    /// The disks are whole.
    Whole,
}

/// What the home remembers of a restore in place: the latest one of a VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct InPlace {
    format: u32,
    vm: String,
    /// The backup, by its whole id.
    backup: String,
    repo: PathBuf,
    /// The one disk that was asked for.
    disk: Option<String>,
    /// Slots that are written.
    slots: Vec<String>,
    /// Name of the snapshots that hold what was there before.
    undo: String,
    stage: Stage,
    at: jiff::Timestamp,
}

/// Restores in place, by VM.
#[derive(Default)]
pub struct InPlaces {
    known: std::cell::RefCell<std::collections::BTreeMap<String, InPlace>>,
    /// VMs whose record cannot be read, and why: it may say that they hold a mixture.
    unread: std::cell::RefCell<std::collections::BTreeMap<String, String>>,
}

impl Versioned for InPlace {
    const FORMAT: u32 = FORMAT;
}

impl InPlace {
    fn go_on(&self) -> String {
        let disk = self.disk.as_ref().map_or_else(String::new, |slot| format!(" --disk {slot}"));
        format!("kagami restore {} --repo {} --in-place{disk}", self.backup, self.repo.display())
    }

    fn bring_back(&self) -> String {
        format!("kagami restore {} --undo", self.vm)
    }

    /// What becomes of the VM when the restore ends early: named in every error.
    fn left_mixed(&self, mut problem: Problem) -> Problem {
        if problem.detail.contains(&self.undo) {
            return problem; // said already
        }
        problem.detail = format!(
            "{}{}VM {} holds a mixture and is not served; what it held before is in the snapshots \"{}\" of its LUNs",
            problem.detail,
            if problem.detail.is_empty() { "" } else { "; " },
            self.vm,
            self.undo
        );
        problem.what_to_do =
            format!("{} goes on, {} brings back what was there", self.go_on(), self.bring_back());
        problem
    }
}

impl Store {
    /// Reads the records, before anything is served.
    pub(super) async fn load_in_place(&self) -> Outcome {
        let (records, unread) = self.load_kept::<InPlace>(Folder::Restores).await?;
        *self.in_places.known.borrow_mut() = records.into_iter().map(|r| (r.vm.clone(), r)).collect();
        *self.in_places.unread.borrow_mut() = unread.into_iter().collect();
        Ok(())
    }

    /// How a restore in place leaves the VM, if not whole.
    pub(super) fn mixed_state(&self, vm: &str) -> Option<&'static str> {
        if self.occupied.borrow().get(vm) == Some(&IN_PLACE) {
            return Some("being restored");
        }
        let mixed = self.in_places.known.borrow().get(vm).is_some_and(|r| r.stage != Stage::Whole);
        (mixed || self.in_places.unread.borrow().contains_key(vm)).then_some("restore interrupted")
    }

    /// Refuses to let anybody at the disks of a VM that holds a mixture, or is about to.
    pub(super) fn not_mixed(&self, vm: &str) -> Outcome {
        let Some(state) = self.mixed_state(vm) else { return Ok(()) };
        let problem = Problem::new("KGM-VMS-0015", Kind::Conflict, format!("VM \"{vm}\" holds a mixture"));
        if let Some(why) = self.in_places.unread.borrow().get(vm) {
            return Err(problem.why(format!("or may hold one: {why}")).hint("use the kagami that wrote it"));
        }
        Err(match self.in_places.known.borrow().get(vm) {
            Some(record) if state != "being restored" => {
                problem.why("a restore over it was interrupted").hint(format!(
                    "{} goes on, {} brings back what was there",
                    record.go_on(),
                    record.bring_back()
                ))
            }
            _ => problem.why("a restore over it is under way").hint("kagami job ls, then kagami job wait"),
        })
    }

    pub(super) fn in_place_troubles(&self) -> Vec<String> {
        let known = self.in_places.known.borrow();
        let mixed = known.values().filter(|r| r.stage != Stage::Whole);
        let said =
            |r: &InPlace| format!("VM {}: a restore over it is not at its end; {}", r.vm, r.bring_back());
        let mut all: Vec<String> = mixed.map(said).collect();
        all.extend(self.in_places.unread.borrow().iter().map(|(vm, why)| format!("VM {vm}: {why}")));
        all
    }

    async fn keep_in_place(&self, record: &InPlace) -> Outcome {
        self.save(Folder::Restores, &record.vm, record.clone()).await?;
        self.in_places.known.borrow_mut().insert(record.vm.clone(), record.clone());
        Ok(())
    }

    /// The VM is gone, or what it held before is wanted no more.
    pub(super) async fn forget_in_place(&self, vm: &str) -> Outcome {
        if self.in_places.known.borrow().contains_key(vm) {
            self.forget(Folder::Restores, vm).await?;
            self.in_places.known.borrow_mut().remove(vm);
        }
        Ok(())
    }

    /// Ends what is served of a VM that is occupied. Whoever began to serve it before that is waited for.
    async fn shut_out(&self, vm: &str) {
        let _turn = self.turn.take().await;
        self.pause_exports(vm).await;
    }

    /// Serves it again, unless it holds a mixture.
    async fn let_in(&self, busy: Occupied) {
        let _turn = self.turn.take().await;
        drop(busy);
        self.retry_exports().await;
    }

    /// What is asked for can begin, or go on: the record to begin with.
    pub(super) fn plan_in_place(&self, vm: &str, new: &NewRestore, source: &Source) -> Outcome<InPlace> {
        let slots: Vec<String> =
            source.disks(new.disk.as_deref())?.iter().map(|disk| disk.name.clone()).collect();
        if self.in_places.unread.borrow().contains_key(vm) {
            self.not_mixed(vm)?;
        }
        let now = jiff::Timestamp::now();
        let mut record = InPlace {
            format: FORMAT,
            vm: vm.to_owned(),
            backup: source.manifest.id.to_string(),
            repo: new.repo.clone(),
            disk: new.disk.clone(),
            slots,
            undo: format!("before-restore-{}", now.strftime("%Y%m%dT%H%M%SZ")),
            stage: Stage::Begun,
            at: now,
        };
        if let Some(old) = self.in_places.known.borrow().get(vm).filter(|r| r.stage != Stage::Whole) {
            // The cut was made before the first write: another one now would be of the mixture.
            (record.undo, record.stage) = (old.undo.clone(), old.stage);
            if old.stage == Stage::Mixed && old.slots.iter().any(|slot| !record.slots.contains(slot)) {
                return Err(old.left_mixed(
                    Problem::new("KGM-VMS-0015", Kind::Conflict, format!("VM \"{vm}\" is not restored so"))
                        .why("an interrupted restore wrote to other disks too"),
                ));
            }
        }
        Ok(record)
    }

    /// Over the VM, writing only what differs. What it held is kept in a snapshot of its LUNs until that is accepted.
    pub(super) async fn restore_in_place(
        &self,
        new: &NewRestore,
        source: &Source,
        progress: &Arc<Progress>,
        sums: &mut Sums,
    ) -> Outcome<String> {
        let name = source.manifest.name.clone();
        let vm = self.vm_that_is_off(&name)?;
        let busy = self.occupy(&name, IN_PLACE)?;
        self.shut_out(&name).await;
        let done = self.overwrite(&vm, new, source, progress, sums).await;
        self.let_in(busy).await;
        done.map(|()| name)
    }

    /// An error after which a VM holds a mixture says so, and how it gets out of that.
    pub(super) fn say_if_mixed(&self, fits: impl Fn(&InPlace) -> bool, problem: Problem) -> Problem {
        let known = self.in_places.known.borrow();
        let left =
            |r: &&InPlace| fits(r) && self.mixed_state(&r.vm).is_some_and(|state| state != "being restored");
        known.values().find(left).map_or_else(|| problem.clone(), |record| record.left_mixed(problem.clone()))
    }

    /// A restore that was asked for like this.
    pub(super) fn say_if_left(&self, new: &NewRestore, problem: Problem) -> Problem {
        let is_it = |r: &InPlace| new.in_place && r.repo == new.repo && r.disk == new.disk;
        self.say_if_mixed(is_it, problem)
    }

    async fn overwrite(
        &self,
        vm: &Rc<Vm>,
        new: &NewRestore,
        source: &Source,
        progress: &Arc<Progress>,
        sums: &mut Sums,
    ) -> Outcome {
        let mut targets = Vec::new();
        for record in source.disks(new.disk.as_deref())? {
            targets.push((record, self.target_in_place(vm, record, new)?));
        }
        let mut record = self.plan_in_place(&vm.name, new, source)?;
        if record.stage == Stage::Begun {
            self.begin_in_place(vm, &mut record, progress).await?;
        } else {
            self.keep_in_place(&record).await?;
            progress.note(&format!(
                "goes on with a restore that was interrupted; what was there is in \"{}\"",
                record.undo
            ));
        }
        sums.undo = Some(record.undo.clone());
        self.fill_in_place(&targets, new, source, progress, sums).await?;
        record.stage = Stage::Whole;
        self.keep_in_place(&record).await?;
        tracing::info!(
            vm = vm.name,
            undo = record.undo,
            "what the VM held before the restore is kept in this snapshot"
        );
        Ok(())
    }

    /// Makes the cut and says durably that the disks are mixed from now on. After an error nothing was begun.
    async fn begin_in_place(&self, vm: &Rc<Vm>, record: &mut InPlace, progress: &Progress) -> Outcome {
        let before = self.in_places.known.borrow().get(&vm.name).cloned().filter(|r| r.stage == Stage::Whole);
        let begun = async {
            self.keep_in_place(record).await?;
            let luns = self.luns_of(vm)?;
            if !luns.iter().all(|lun| lun.has_snapshot(&record.undo)) {
                let _turn = self.turn.take().await;
                self.cut(&luns, &record.undo).await?;
            }
            progress.check()?;
            self.keep_in_place(&InPlace { stage: Stage::Mixed, ..record.clone() }).await
        };
        match begun.await {
            Ok(()) => {
                record.stage = Stage::Mixed;
                Ok(())
            }
            // It goes on at the next start.
            Err(problem) if progress.is_suspended() => Err(problem),
            Err(problem) => {
                self.drop_undo(vm, &record.undo).await;
                let kept = match before {
                    Some(before) => self.keep_in_place(&before).await,
                    None => self.forget_in_place(&vm.name).await,
                };
                if let Err(kept) = kept {
                    tracing::error!(vm = vm.name, %kept, "the record of a restore that did not begin stays");
                }
                Err(problem)
            }
        }
    }

    async fn fill_in_place(
        &self,
        targets: &[(&DiskRecord, Rc<VmDisk>)],
        new: &NewRestore,
        source: &Source,
        progress: &Arc<Progress>,
        sums: &mut Sums,
    ) -> Outcome {
        for (record, disk) in targets {
            progress.check()?;
            progress.phase(&format!("restore {}", record.name));
            let target = Rc::clone(disk) as Rc<dyn Disk>;
            self.pour(source, record, target, new, true, progress, sums).await?;
        }
        Ok(())
    }

    /// The restore whose outcome can be undone or accepted.
    fn latest_in_place(&self, vm: &str) -> Outcome<InPlace> {
        self.open_vm(vm)?;
        if self.in_places.unread.borrow().contains_key(vm) {
            self.not_mixed(vm)?;
        }
        self.in_places.known.borrow().get(vm).cloned().ok_or_else(|| {
            let title = format!("there is nothing to undo of VM \"{vm}\"");
            Problem::new("KGM-BKP-0024", Kind::NotFound, title)
                .why("no backup was restored over it, or that was undone or accepted")
                .hint("kagami backup ls --repo DIR")
        })
    }

    /// What was there before a restore in place: the disks that it wrote, as they were.
    async fn disks_before(&self, vm: &Rc<Vm>, record: &InPlace) -> Outcome<Vec<Before>> {
        let title = || format!("the restore over VM \"{}\" is not undone", vm.name);
        let refused =
            |why: String| Problem::new("KGM-BKP-0025", Kind::Refused, title()).why(why).hint(record.go_on());
        let mut all = Vec::new();
        if record.stage == Stage::Begun {
            return Ok(all); // nothing was written
        }
        for text in &record.slots {
            let slot: Slot = text.parse().map_err(|_| refused(format!("{text} is no slot")))?;
            let now = vm.disk(slot).ok_or_else(|| refused(format!("the VM has no disk {slot} any more")))?;
            let below = self.lun_below(&now)?;
            if !below.has_snapshot(&record.undo) {
                return Err(refused(format!("LUN {} has no snapshot {}", below.lun.name(), record.undo)));
            }
            let snapshot = below.open_snapshot(&record.undo)?;
            let mapped = now.disk.rdm().is_some();
            let since = mapped.then(|| (below.clone(), snapshot.generation()));
            let was: Rc<dyn Disk> = if mapped {
                snapshot
            } else {
                let folder = self.folder_at(&now.datastore, &record.undo).await?;
                VmDisk::open(folder, &now.path, Open::READ, &())
                    .await
                    .map_err(|e| super::disks::chain_problem(format!("{}: disk {slot}", title()), &e))?
            };
            all.push(Before { now, was, since });
        }
        Ok(all)
    }

    /// What undoing a restore in place would do.
    pub async fn plan_undo(&self, name: &str) -> Outcome<Plan> {
        let record = self.latest_in_place(name)?;
        let vm = self.vm_that_is_off(name)?;
        let disks = self.disks_before(&vm, &record).await?;
        let would = vec![format!(
            "bring {} of {name} back to what was there before backup {} was restored over it, {}",
            record.slots.join(", "),
            record.backup,
            record.at
        )];
        let size = |disk: &Before| show_size(disk.now.disk.shape().bytes());
        let loses = disks
            .iter()
            .map(|d| format!("what {name}/{} ({}) holds now, where it differs", d.now.slot, size(d)));
        Ok(Plan { would, loses: loses.collect(), frees_bytes: 0 })
    }

    /// Brings back what a VM held before the latest restore over it; the job's result. Interrupted, the disks are mixed
    /// as before.
    pub async fn undo_in_place(&self, name: &str, progress: Arc<Progress>) -> Outcome<Value> {
        let begun = lane::now();
        let mut record = self.latest_in_place(name)?;
        let vm = self.vm_that_is_off(name)?;
        let busy = self.occupy(name, IN_PLACE)?;
        self.shut_out(name).await;
        let mut sums = Sums::default();
        let done = async {
            let disks = self.disks_before(&vm, &record).await?;
            if record.stage == Stage::Whole {
                record.stage = Stage::Mixed;
                self.keep_in_place(&record).await?;
            }
            for disk in &disks {
                progress.phase(&format!("undo {}", disk.now.slot));
                let end = disk.now.disk.shape().sectors.min(disk.was.shape().sectors);
                let mut way = Way { disk, end, progress: &progress, sums: &mut sums };
                way.bring_back().await?;
                sums.disks.push(disk.now.slot.to_string());
            }
            drop(disks);
            self.forget_in_place(name).await?;
            // They hold what the VM holds.
            self.drop_undo(&vm, &record.undo).await;
            Ok(())
        };
        let done: Outcome = done.await;
        self.let_in(busy).await;
        done.map_err(|problem| self.say_if_mixed(|r| r.vm == name, problem))?;
        tracing::info!(vm = name, backup = record.backup, "a restore was undone");
        Ok(json!({
            "id": record.backup,
            "vm": name,
            "disks": sums.disks,
            "written_bytes": sums.written,
            "zeroed_bytes": sums.zeroed,
            "compared_bytes": sums.compared,
            "seconds": (lane::now() - begun).as_secs_f64(),
        }))
    }

    /// Gives up what a VM held before the latest restore over it.
    pub async fn accept_in_place(&self, name: &str, dry: bool) -> Outcome<Plan> {
        let _turn = self.turn.take().await;
        let record = self.latest_in_place(name)?;
        self.not_occupied(name)?;
        self.not_mixed(name)?;
        let vm = self.open_vm(name)?;
        let plan = Plan {
            would: vec![format!("accept the restore of backup {} over {name}", record.backup)],
            loses: vec![format!("what {name} held before: the snapshots {} of its LUNs", record.undo)],
            frees_bytes: 0,
        };
        if !dry {
            self.forget_in_place(name).await?;
            self.drop_undo(&vm, &record.undo).await;
        }
        Ok(plan)
    }

    /// Removes the snapshots of this name from the LUNs that a VM lies on.
    async fn drop_undo(&self, vm: &Vm, snap: &str) {
        for found in self.luns_of(vm).unwrap_or_default() {
            if found.has_snapshot(snap)
                && let Err(error) = found.lun.remove_snapshot(snap).await
            {
                tracing::warn!(lun = found.lun.name(), snap, %error, "a snapshot stays");
            }
        }
    }

    /// The disk in the slot is the one that was backed up: a mapping must lead to the same LUN (chapter 2: by UUID where
    /// it is ours, else by NAA), and a disk on a datastore is not a mapping.
    pub(super) fn is_the_disk(&self, vm: &Vm, open: &OpenDisk, disk: &DiskRecord) -> Outcome {
        let was = told(disk, "rdm_mode");
        let old = format!("LUN {} ({})", told(disk, "lun"), told(disk, "naa"));
        let why = match (open.disk.rdm(), was.is_empty()) {
            (None, true) => return Ok(()),
            (None, false) => format!("it is a disk on a datastore, the backup is of {old}"),
            (Some(_), true) => "it maps a LUN, the backup is of a disk on a datastore".to_owned(),
            (Some((_, now)), false) => {
                let uuid = now.lun.uuid.map(|uuid| uuid.to_string()).unwrap_or_default();
                let is_same = match (uuid.as_str(), told(disk, "lun_uuid")) {
                    ("", _) | (_, "") => now.lun.display() == told(disk, "naa"),
                    (now, old) => now == old,
                };
                if is_same {
                    return Ok(());
                }
                let name = self.lun(&uuid).map(|found| found.lun.name()).unwrap_or_default();
                format!("it maps LUN {name} ({}), the backup is of {old}", now.lun.display())
            }
        };
        let title = format!("{}/{} is not restored over", vm.name, open.slot);
        Err(Problem::new("KGM-BKP-0023", Kind::Refused, title)
            .why(why)
            .hint("--force=identity writes over it all the same; --to-lun NAME restores to a LUN of its own"))
    }
}

/// A disk, and what it was.
struct Before {
    now: OpenDisk,
    was: Rc<dyn Disk>,
    /// The LUN that it is, and the cut since which its changes are known.
    since: Option<(FoundLun, Generation)>,
}

/// What a stretch of a disk holds, from `at` on, and where to ask next.
async fn stretch(
    disk: &dyn Disk,
    at: u64,
    end: u64,
    since: Option<Generation>,
) -> Result<(Vec<Extent>, u64), DiskError> {
    let mut extents = Extents::with_limit(256);
    disk.status(Sector(at), end - at, since, &mut extents).await?;
    match extents.end().filter(|next| next.0 > at) {
        Some(next) => Ok((extents.iter().copied().collect(), next.0)),
        None => Err(DiskError::Io(Arc::new(std::io::Error::other("the disk says nothing of a range")))),
    }
}

/// A disk on its way back.
struct Way<'a> {
    disk: &'a Before,
    end: u64,
    progress: &'a Progress,
    sums: &'a mut Sums,
}

impl Way<'_> {
    fn failed(&self, error: &DiskError) -> Problem {
        disk_problem("KGM-BKP-0026", format!("disk {} was not brought back", self.disk.now.slot), error)
    }

    /// Writes what differs from what was there. What was not written since the cut is not read.
    async fn bring_back(&mut self) -> Outcome {
        let mut since = self.disk.since.as_ref();
        let mut at = 0;
        while at < self.end {
            self.progress.check()?;
            self.progress.set(at * SECTOR_BYTES, self.end * SECTOR_BYTES);
            let asked = match since {
                Some((found, generation)) => stretch(&*found.lun, at, self.end, Some(*generation)).await,
                None => stretch(&*self.disk.now.disk, at, self.end, None).await,
            };
            let (extents, next) = match asked {
                Err(DiskError::UnknownGeneration) if since.is_some() => {
                    since = None;
                    continue;
                }
                other => other.map_err(|e| self.failed(&e))?,
            };
            for extent in extents.iter().filter(|extent| extent.changed) {
                let (from, to) = (extent.at.0, extent.at.0 + extent.count);
                match extent.kind {
                    Holds::Data => self.compare(from, to).await?,
                    Holds::Zero | Holds::Hole => self.fill(from, to).await?,
                }
            }
            at = next;
        }
        self.disk.now.disk.flush().await.map_err(|e| self.failed(&e))
    }

    /// Nothing is here now: only what was there is of interest.
    async fn fill(&mut self, mut at: u64, end: u64) -> Outcome {
        while at < end {
            self.progress.check()?;
            let (extents, next) =
                stretch(&*self.disk.was, at, end, None).await.map_err(|e| self.failed(&e))?;
            for extent in extents.iter().filter(|extent| extent.kind == Holds::Data) {
                self.compare(extent.at.0, extent.at.0 + extent.count).await?;
            }
            at = next;
        }
        Ok(())
    }

    async fn compare(&mut self, mut at: u64, end: u64) -> Outcome {
        while at < end {
            self.progress.check()?;
            let sectors = (PORTION / SECTOR_BYTES).min(end - at);
            let bytes = (sectors * SECTOR_BYTES) as usize;
            let (mut now, mut was) = (Buffer::zeroed(bytes), Buffer::zeroed(bytes));
            let disk = self.disk;
            let read = async {
                disk.now.disk.read(Sector(at), &SegmentsMut::new(&mut now)).await?;
                disk.was.read(Sector(at), &SegmentsMut::new(&mut was)).await
            };
            read.await.map_err(|e| self.failed(&e))?;
            self.sums.compared += bytes as u64;
            self.write(at, &now, &was).await?;
            at += sectors;
        }
        Ok(())
    }

    /// Writes runs of pieces that differ; those that were zero become so again without taking room.
    async fn write(&mut self, at: u64, now: &[u8], was: &[u8]) -> Outcome {
        let is_to_be = |from: usize| {
            let to = (from + PIECE).min(was.len());
            (now[from..to] != was[from..to]).then(|| lane::memory::is_zero(&was[from..to]))
        };
        let mut from = 0;
        while from < was.len() {
            let zero = is_to_be(from);
            let mut to = from + PIECE;
            while to < was.len() && is_to_be(to) == zero {
                to += PIECE;
            }
            let to = to.min(was.len());
            let (sector, bytes) = (Sector(at + from as u64 / SECTOR_BYTES), (to - from) as u64);
            let target = &self.disk.now.disk;
            let done = match zero {
                None => Ok(()),
                Some(true) => {
                    self.sums.zeroed += bytes;
                    target.zero(sector, bytes / SECTOR_BYTES, true).await
                }
                Some(false) => {
                    self.sums.written += bytes;
                    target.write(sector, &Segments::new(&was[from..to]), Safe::AtNextFlush).await
                }
            };
            done.map_err(|e| self.failed(&e))?;
            from = to;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_restores_of_format_1_are_read() {
        let record = crate::files::golden::<InPlace>("restores/sql01.json");
        assert!(record.stage == Stage::Mixed && record.slots.len() == 2);
    }
}
