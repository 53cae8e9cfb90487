//! Pools: their media, opened and closed.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use array::Pool;
use block::{Disk, SECTOR_BYTES};
use media::FileDisk;
use serde::{Deserialize, Serialize};

use super::doing::Doing;
use super::{Folder, Store};
use crate::api::Change;
use crate::cli::images::media_problem;
use crate::files::{Named, Versioned};
use crate::model::{CheckView, HiddenView, ImportPool, MediumView, NewPool, Plan, PoolView, Removal};
use crate::problem::{Kind, Outcome, Problem, check_name};
use crate::units::show_size;

/// Pause between two steps of background work.
const TIDY_EVERY: std::time::Duration = std::time::Duration::from_millis(20);
/// A pool file is at least this long, in bytes.
const SMALLEST: u64 = 64 << 20;

/// What the home remembers of a pool.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PoolRecord {
    /// Format of this record.
    pub format: u32,
    /// Name in this home.
    pub name: String,
    /// Files or block devices.
    pub media: Vec<PathBuf>,
}

impl Versioned for PoolRecord {
    const FORMAT: u32 = 1;
}

impl Named for PoolRecord {
    fn format(&self) -> u32 {
        self.format
    }

    fn unknown(name: String, format: u32) -> Self {
        Self { format, name, media: Vec::new() }
    }
}

/// An open pool.
#[derive(Clone)]
pub struct OpenPool {
    /// The pool.
    pub pool: Rc<Pool>,
    /// Its media, for `show`.
    pub media: Vec<Rc<FileDisk>>,
}

/// A pool of the home, open or not.
pub struct PoolEntry {
    /// What the home remembers.
    pub record: PoolRecord,
    /// Open, or why not.
    pub state: RefCell<Result<OpenPool, Problem>>,
}

/// What went wrong with a pool, a LUN or a snapshot.
pub fn pool_problem(what: impl Into<String>, error: &array::LunError) -> Problem {
    use array::LunError;
    let (code, kind, hint) = match error {
        LunError::NoLun(_) => ("KGM-LUN-0404", Kind::NotFound, "kagami lun ls"),
        LunError::NoSnapshot { .. } => ("KGM-SNP-0404", Kind::NotFound, "kagami snap ls"),
        LunError::Exists { .. } => ("KGM-LUN-0409", Kind::Conflict, "another name"),
        LunError::SameIdentity(_) => ("KGM-LUN-0006", Kind::Conflict, "kagami lun ls --trash"),
        LunError::Name(_) | LunError::Size { .. } => {
            ("KGM-LUN-0007", Kind::Usage, "kagami lun create --help")
        }
        LunError::Smaller { .. } => ("KGM-LUN-0004", Kind::Refused, "kagami lun show LUN"),
        LunError::Claimed { .. } => ("KGM-LUN-0002", Kind::Refused, "work on that datastore or VM instead"),
        LunError::UnknownGeneration { .. } => {
            ("KGM-LUN-0008", Kind::Failed, "kagami backup create VM --full")
        }
        LunError::NotReverted(_) => ("KGM-LUN-0005", Kind::Conflict, "kagami snap ls LUN"),
        LunError::Reverted(lun) => {
            return Problem::new("KGM-LUN-0009", Kind::Conflict, what).why(error).hint(format!(
                "kagami lun undo-revert {lun} to have it back, or kagami snap revert {lun}@SNAP --accept to give it up"
            ));
        }
        LunError::InDoubt(_) => {
            ("KGM-GRP-0001", Kind::Conflict, "kagami group ls, then kagami group resolve")
        }
        LunError::Disk(error) => return disk_problem("KGM-POL-0006", what, error),
    };
    Problem::new(code, kind, what).why(error).hint(hint)
}

/// A disk of the array said no.
pub fn disk_problem(code: &str, what: impl Into<String>, error: &block::DiskError) -> Problem {
    use block::DiskError;
    let (code, hint) = match error {
        DiskError::NoSpace => ("KGM-POL-0013", NO_SPACE),
        DiskError::Halted => ("KGM-POL-0014", "kagami pool ls, then kagami pool reopen POOL"),
        DiskError::Medium(_) => ("KGM-POL-0015", "kagami pool check POOL"),
        _ => (code, "kagami pool ls, and the daemon's log"),
    };
    Problem::new(code, Kind::Failed, what).why(error).hint(hint)
}

/// What to do when a pool is full.
const NO_SPACE: &str =
    "make room: kagami snap rm, kagami lun rm --now, kagami lun ls --trash; what waits goes on by itself";

/// A pool could not be made or opened.
pub fn open_problem(what: impl Into<String>, error: &array::PoolError) -> Problem {
    use array::PoolError;
    let (code, kind, hint) = match error {
        PoolError::AlreadyAPool { .. } => ("KGM-POL-0410", Kind::Conflict, "kagami pool import FILE..."),
        PoolError::NotAPool { .. } => ("KGM-POL-0405", Kind::NotFound, "kagami pool create"),
        PoolError::Newer { .. } | PoolError::Features(_) => {
            ("KGM-POL-0007", Kind::Refused, "use the newer kagami")
        }
        PoolError::Media { .. } => ("KGM-POL-0008", Kind::Usage, "name all files and devices of the pool"),
        PoolError::Truncated { .. } | PoolError::Corrupt(_) => (
            "KGM-POL-0009",
            Kind::Corrupt,
            "bring the file back as it was (a copy, or the missing end), then kagami pool reopen POOL",
        ),
        PoolError::Unfit(_) => ("KGM-POL-0010", Kind::Usage, "kagami pool create --help"),
        PoolError::Disk(_) => ("KGM-POL-0011", Kind::Failed, "kagami pool reopen POOL when it is mended"),
    };
    Problem::new(code, kind, what).why(error).hint(hint)
}

/// Two pools with one identity.
fn copy_problem(name: &str, other: &str) -> Problem {
    Problem::new("KGM-POL-0004", Kind::Conflict, format!("pools \"{name}\" and \"{other}\" are copies of each other"))
        .why("both have the same identity, and so have their LUNs: which one counts nobody can know")
        .hint(format!("kagami pool rm NAME for the one that does not count (its files stay), then kagami pool reopen {other}"))
}

async fn open_media(paths: &[PathBuf], read_only: bool) -> Outcome<Vec<Rc<FileDisk>>> {
    let mut media = Vec::with_capacity(paths.len());
    for path in paths {
        let options = media::Options { read_only, ..media::Options::default() };
        media.push(media::open(path, options).await.map_err(|e| media_problem(path, &e))?);
    }
    Ok(media)
}

fn as_disks(media: &[Rc<FileDisk>]) -> Vec<Rc<dyn Disk>> {
    media.iter().map(|m| Rc::clone(m) as Rc<dyn Disk>).collect()
}

async fn open_pool(record: &PoolRecord) -> Outcome<OpenPool> {
    let media = open_media(&record.media, false).await?;
    let pool = Pool::open(as_disks(&media), array::Options::default())
        .await
        .map_err(|e| open_problem(format!("pool \"{}\" cannot be opened", record.name), &e))?;
    Ok(OpenPool { pool, media })
}

impl Store {
    pub(super) async fn open_pools(&self) -> Outcome {
        for record in self.load::<PoolRecord>(Folder::Pools).await? {
            let state = self.open_known_pool(&record).await;
            if let Err(problem) = &state {
                tracing::error!(pool = record.name, %problem, "a pool is missing");
            }
            let entry = PoolEntry { record, state: RefCell::new(state) };
            self.pools.borrow_mut().insert(entry.record.name.clone(), entry);
        }
        self.refuse_copies();
        Ok(())
    }

    async fn open_known_pool(&self, record: &PoolRecord) -> Outcome<OpenPool> {
        self.known(Folder::Pools, &record.name, record)?;
        open_pool(record).await
    }

    /// Two files that say they are one pool: which of them has the truth nobody can know, and a mapping would find its
    /// LUN twice. Neither is opened.
    fn refuse_copies(&self) {
        let open = self.open_pools_now();
        for (name, pool) in &open {
            let same = |(other, p): &&(String, OpenPool)| other != name && p.pool.uuid() == pool.pool.uuid();
            let Some((other, _)) = open.iter().find(same) else { continue };
            let problem = copy_problem(name, other);
            tracing::error!(pool = name, %problem, "not opened");
            if let Some(entry) = self.pools.borrow().get(name) {
                *entry.state.borrow_mut() = Err(problem);
            }
        }
    }

    pub(super) async fn close_pools(&self) {
        let entries = std::mem::take(&mut *self.pools.borrow_mut());
        for (name, entry) in entries {
            if let Ok(open) = entry.state.into_inner()
                && let Err(error) = open.pool.settle().await
            {
                tracing::error!(pool = name, %error, "a pool was not closed well; it recovers at the next start");
            }
        }
    }

    pub(super) fn pool_troubles(&self) -> Vec<String> {
        let pools = self.pools.borrow();
        let broken =
            |e: &PoolEntry| e.state.borrow().as_ref().err().map(|p| format!("pool {}: {p}", e.record.name));
        pools.values().filter_map(broken).collect()
    }

    /// All pools that are open, by name.
    pub(super) fn open_pools_now(&self) -> Vec<(String, OpenPool)> {
        let pools = self.pools.borrow();
        pools
            .iter()
            .filter_map(|(name, e)| Some((name.clone(), e.state.borrow().as_ref().ok()?.clone())))
            .collect()
    }

    /// An open pool by name.
    pub(super) fn pool(&self, name: &str) -> Outcome<OpenPool> {
        let pools = self.pools.borrow();
        let entry = pools.get(name).ok_or_else(|| Problem::not_found("pool", name))?;
        entry.state.borrow().as_ref().map_err(Clone::clone).cloned()
    }

    /// The pool that something new goes to: the one named, else the only one.
    pub(super) fn pool_for_new(&self, named: Option<&str>) -> Outcome<(String, OpenPool)> {
        if let Some(name) = named {
            return self.pool(name).map(|p| (name.to_owned(), p));
        }
        let names: Vec<String> = self.pools.borrow().keys().cloned().collect();
        match names.as_slice() {
            [only] => self.pool(only).map(|p| (only.clone(), p)),
            [] => Err(Problem::new("KGM-POL-0001", Kind::NotFound, "there is no pool yet")
                .hint("kagami pool create pool1 --size 20G")),
            _ => Err(Problem::new("KGM-POL-0002", Kind::Usage, "which pool?")
                .why(format!("there are several: {}", names.join(", ")))
                .hint("--pool NAME")),
        }
    }

    fn pool_view(&self, entry: &PoolEntry) -> PoolView {
        let record = &entry.record;
        match &*entry.state.borrow() {
            Ok(open) => {
                let info = open.pool.info();
                let media = open.media.iter().map(|m| MediumView {
                    path: m.path().to_owned(),
                    size_bytes: m.shape().bytes(),
                    access: m.in_use().to_string(),
                });
                PoolView {
                    id: info.uuid.to_string(),
                    name: record.name.clone(),
                    state: if info.halted { "read-only" } else { "ok" }.into(),
                    size_bytes: info.bytes,
                    used_bytes: info.used_bytes,
                    free_bytes: info.bytes.saturating_sub(info.used_bytes),
                    luns: info.luns as u64,
                    hidden_bytes: None,
                    hidden: Vec::new(),
                    media: media.collect(),
                    trouble: info.halted.then(|| "a flush failed: kagami pool reopen".to_owned()),
                }
            }
            Err(problem) => PoolView {
                id: String::new(),
                name: record.name.clone(),
                state: "missing".into(),
                size_bytes: 0,
                used_bytes: 0,
                free_bytes: 0,
                luns: 0,
                hidden_bytes: None,
                hidden: Vec::new(),
                media: record
                    .media
                    .iter()
                    .map(|p| MediumView { path: p.clone(), size_bytes: 0, access: "not open".into() })
                    .collect(),
                trouble: Some(problem.to_string()),
            },
        }
    }

    /// All pools.
    pub async fn pools(&self) -> Outcome<Vec<PoolView>> {
        Ok(self.pools.borrow().values().map(|e| self.pool_view(e)).collect())
    }

    /// One pool.
    pub async fn show_pool(&self, name: &str) -> Outcome<PoolView> {
        let (mut view, open) = {
            let pools = self.pools.borrow();
            let entry = pools.get(name).ok_or_else(|| Problem::not_found("pool", name))?;
            (self.pool_view(entry), entry.state.borrow().as_ref().ok().cloned())
        };
        let Some(open) = open else { return Ok(view) };
        match open.pool.hidden_layers().await {
            Ok(hidden) => {
                view.hidden_bytes = Some(hidden.iter().map(|(_, bytes, _)| bytes).sum());
                let view_of = |(layer, used_bytes, held_by)| HiddenView { layer, used_bytes, held_by };
                view.hidden = hidden.into_iter().map(view_of).collect();
            }
            Err(error) => tracing::warn!(pool = name, %error, "what hidden layers keep is not known"),
        }
        Ok(view)
    }

    /// Makes a pool.
    pub async fn create_pool(&self, new: NewPool, dry: bool) -> Outcome<Change<PoolView>> {
        let _turn = self.turn.take().await;
        check_name("pool", &new.name)?;
        if self.pools.borrow().contains_key(&new.name) {
            if new.if_not_exists {
                return self.show_pool(&new.name).await.map(Change::Done);
            }
            return Err(Problem::exists("pool", &new.name));
        }
        let in_home = self.home.join("media").join(format!("{}.pool", new.name));
        let paths = if new.media.is_empty() { vec![in_home] } else { new.media.clone() };
        let size = self.check_new_media(&paths, new.size_bytes, false)?;
        if dry {
            let would = paths.iter().map(|p| match size {
                Some(size) if !p.exists() => format!("make {} with {}", p.display(), show_size(size)),
                _ => format!("take {} for the pool", p.display()),
            });
            return Ok(Change::Would(Plan { would: would.collect(), ..Plan::default() }));
        }
        let media: Vec<PathBuf> = paths.iter().filter(|p| !p.exists()).cloned().collect();
        let doing = Doing::MakePool { name: new.name.clone(), media };
        self.noted(doing, async || self.make_and_keep_pool(new, paths, size).await).await
    }

    async fn make_and_keep_pool(
        &self,
        new: NewPool,
        paths: Vec<PathBuf>,
        size: Option<u64>,
    ) -> Outcome<Change<PoolView>> {
        let mut made = Vec::new();
        let created = self.make_pool(&new.name, &paths, size, &mut made).await;
        match created {
            Ok(open) => {
                let record = PoolRecord { format: PoolRecord::FORMAT, name: new.name.clone(), media: paths };
                self.save(Folder::Pools, &new.name, record.clone()).await?;
                let entry = PoolEntry { record, state: RefCell::new(Ok(open)) };
                tracing::info!(pool = new.name, "pool made");
                let view = self.pool_view(&entry);
                self.pools.borrow_mut().insert(new.name, entry);
                Ok(Change::Done(view))
            }
            Err(problem) => {
                for path in made {
                    let _ = std::fs::remove_file(path); // ours, and empty
                }
                Err(problem)
            }
        }
    }

    /// The size of files to be made, checked; `None` when all media are there already.
    fn check_new_media(&self, paths: &[PathBuf], size: Option<u64>, import: bool) -> Outcome<Option<u64>> {
        for path in paths {
            let absolute = path
                .is_absolute()
                .then_some(())
                .ok_or_else(|| Problem::usage(format!("{} is not an absolute path", path.display())));
            absolute?;
            if let Some(owner) = self.pool_with(path) {
                let title = format!("{} belongs to pool \"{owner}\"", path.display());
                return Err(Problem::new("KGM-POL-0003", Kind::Conflict, title)
                    .hint(format!("kagami pool show {owner}")));
            }
        }
        if paths.iter().all(|p| p.exists()) {
            return Ok(None);
        }
        if size.is_none() && import {
            let missing: Vec<String> =
                paths.iter().filter(|p| !p.exists()).map(|p| p.display().to_string()).collect();
            return Err(Problem::new(
                "KGM-POL-0016",
                Kind::NotFound,
                format!("there is no {}", missing.join(", ")),
            )
            .hint("kagami pool import FILE... with all files and devices of the pool"));
        }
        match size {
            Some(size) if size >= SMALLEST && size.is_multiple_of(SECTOR_BYTES) => Ok(Some(size)),
            Some(size) => Err(Problem::usage(format!("{size} bytes is no size for a pool"))
                .why(format!("at least {}, whole sectors", show_size(SMALLEST)))),
            None => Err(Problem::usage("how large?").hint("--size 20G, for the file that is made")),
        }
    }

    fn pool_with(&self, path: &Path) -> Option<String> {
        let pools = self.pools.borrow();
        pools.values().find(|e| e.record.media.iter().any(|m| m == path)).map(|e| e.record.name.clone())
    }

    async fn make_pool(
        &self,
        name: &str,
        paths: &[PathBuf],
        size: Option<u64>,
        made: &mut Vec<PathBuf>,
    ) -> Outcome<OpenPool> {
        let mut media = Vec::with_capacity(paths.len());
        for path in paths {
            let disk = match size {
                Some(size) if !path.exists() => {
                    let disk = media::create(path, size / SECTOR_BYTES, media::Options::default()).await;
                    made.push(path.clone());
                    disk
                }
                _ => media::open(path, media::Options::default()).await,
            };
            media.push(disk.map_err(|e| media_problem(path, &e))?);
        }
        let new = array::NewPool { name: name.to_owned(), uuid: uuid::Uuid::new_v4() };
        let pool = Pool::create(as_disks(&media), new, array::Options::default())
            .await
            .map_err(|e| open_problem(format!("pool \"{name}\" was not made"), &e))?;
        Ok(OpenPool { pool, media })
    }

    /// Brings a pool to this home.
    pub async fn import_pool(&self, new: ImportPool, dry: bool) -> Outcome<Change<PoolView>> {
        let _turn = self.turn.take().await;
        self.check_new_media(&new.media, None, true)?;
        let record = PoolRecord {
            format: PoolRecord::FORMAT,
            name: new.name.clone().unwrap_or_default(),
            media: new.media.clone(),
        };
        let open = open_pool(&record).await?;
        let name = new.name.unwrap_or_else(|| open.pool.name());
        check_name("pool", &name)?;
        if self.pools.borrow().contains_key(&name) {
            return Err(Problem::exists("pool", &name).hint("--name OTHER"));
        }
        let id = open.pool.uuid();
        if let Some((other, _)) = self.open_pools_now().into_iter().find(|(_, p)| p.pool.uuid() == id) {
            return Err(copy_problem(&name, &other));
        }
        if dry {
            return Ok(Change::would(format!("import pool \"{name}\" with {} LUNs", open.pool.luns().len())));
        }
        let record = PoolRecord { name: name.clone(), ..record };
        let entry = PoolEntry { record, state: RefCell::new(Ok(open)) };
        let view = self.pool_view(&entry);
        self.noted(Doing::ImportPool { name: name.clone() }, async || {
            self.save(Folder::Pools, &name, entry.record.clone()).await?;
            self.pools.borrow_mut().insert(name.clone(), entry);
            self.resolve_cuts().await;
            self.import_what_lies_in(&name).await
        })
        .await?;
        self.retry_exports().await;
        tracing::info!(pool = name, "pool imported");
        Ok(Change::Done(view))
    }

    /// Checks a pool's metadata. With `repair` leaks are given back, where nothing worse is found.
    pub async fn check_pool(&self, name: &str, repair: bool) -> Outcome<CheckView> {
        let open = self.pool(name)?;
        let cannot = |e: block::DiskError| {
            Problem::failed("KGM-POL-0012", format!("pool \"{name}\" cannot be checked"), e)
        };
        let mut report = open.pool.check().await.map_err(cannot)?;
        let mut repaired = Vec::new();
        if repair && report.leaked_grains() > 0 {
            let _turn = self.turn.take().await;
            let (before, grains) = open.pool.repair_leaks().await.map_err(cannot)?;
            report = open.pool.check().await.map_err(cannot)?;
            if grains > 0 {
                tracing::warn!(pool = name, grains, "leaked grains were given back");
                let gone = before.findings.iter().filter(|f| !report.findings.contains(f));
                repaired = gone.map(ToString::to_string).collect();
            }
        }
        Ok(CheckView {
            name: name.to_owned(),
            verdict: match (report.faults().next().is_some() || report.incomplete, report.leaked_grains()) {
                (true, _) => "corrupt",
                (false, 0) => "clean",
                (false, _) => "leaks",
            }
            .into(),
            findings: report.findings.iter().map(ToString::to_string).collect(),
            repaired,
        })
    }

    /// Opens a pool again after a failed flush. Everything that is served is closed and opened again with it.
    pub async fn reopen_pool(&self, name: &str, dry: bool) -> Outcome<Change<PoolView>> {
        let _turn = self.turn.take().await;
        let record = {
            let pools = self.pools.borrow();
            pools.get(name).ok_or_else(|| Problem::not_found("pool", name))?.record.clone()
        };
        self.nobody_works("reopened")?;
        if dry {
            return Ok(Change::would(format!("reopen pool \"{name}\"; clients of all exports reconnect")));
        }
        self.hold_no_more(&self.open_vms_now());
        self.drop_all_frozen().await;
        self.close_exports().await;
        self.close_vms().await;
        self.close_datastores().await;
        self.shut_pool(name).await;
        let state = self.open_known_pool(&record).await;
        let failed = state.as_ref().err().cloned();
        if let Some(entry) = self.pools.borrow().get(name) {
            *entry.state.borrow_mut() = state;
        }
        self.refuse_copies();
        self.resolve_cuts().await;
        self.open_datastores().await?;
        let records = self.vm_records().await?;
        // A cut whose record could not be written may be decided now.
        let in_doubt = !self.resolve_vmsnaps(&records).await;
        self.in_doubt.set(in_doubt);
        self.open_vms(records).await?;
        self.open_exports().await?;
        // VMs that stayed on redo logs when a pool could not write which cut was made.
        if let Some(store) = self.this.upgrade() {
            store.consolidate_all();
        }
        match failed {
            Some(problem) => Err(problem),
            None => self.show_pool(name).await.map(Change::Done),
        }
    }

    /// Drops an open pool, and waits until nobody has it: its media are locked as long as somebody does.
    async fn shut_pool(&self, name: &str) {
        let problem =
            Problem::new("KGM-POL-0005", Kind::Conflict, format!("pool \"{name}\" is being reopened"));
        let open = self.pools.borrow().get(name).and_then(|e| e.state.replace(Err(problem)).ok());
        let Some(open) = open else { return };
        let left: Vec<_> = open.media.iter().map(Rc::downgrade).collect();
        drop(open);
        // A step of background work that is under way ends within moments.
        for _ in 0..500 {
            if left.iter().all(|m| m.strong_count() == 0) {
                return;
            }
            lane::sleep(TIDY_EVERY / 2).await;
        }
        tracing::warn!(pool = name, "somebody still has it open");
    }

    /// Refuses when a job runs: it has disks open.
    fn nobody_works(&self, what: &str) -> Outcome {
        let busy = self.occupied.borrow().keys().next().cloned();
        match busy {
            Some(vm) => self
                .not_occupied(&vm)
                .map_err(|p| Problem { title: format!("nothing is {what}: {}", p.title), ..p }),
            None => Ok(()),
        }
    }

    /// Takes a pool out of the home, with what lies on it. Its files stay: `pool import` brings it back.
    pub async fn remove_pool(&self, name: &str, how: Removal) -> Outcome<Change<PoolView>> {
        let _turn = self.turn.take().await;
        let view = self.show_pool(name).await?;
        self.nobody_works("taken out")?;
        let luns: Vec<_> = match self.pool(name) {
            Ok(open) => open.pool.luns().iter().map(|l| l.uuid()).collect(),
            Err(_) => Vec::new(),
        };
        let datastores: Vec<String> = self.datastores_on(&luns);
        let vms = self.vms_on(&datastores);
        if how.dry_run {
            let mut would = vec![format!("take pool {name} out of this home; its files stay")];
            would.extend(datastores.iter().map(|d| format!("take datastore {d} out of this home")));
            would.extend(vms.iter().map(|v| format!("unregister VM {v}")));
            let clients = self.clients();
            let loses =
                if clients > 0 { vec![format!("{clients} connections to exports")] } else { Vec::new() };
            return Ok(Change::Would(Plan { would, loses, frees_bytes: 0 }));
        }
        self.drop_all_frozen().await;
        let doing = Doing::TakePoolOut { name: name.to_owned() };
        self.noted(doing, async || self.take_pool_out(name, &vms, &luns, &datastores).await).await?;
        tracing::info!(pool = name, "pool taken out");
        Ok(Change::Done(view))
    }

    async fn take_pool_out(
        &self,
        name: &str,
        vms: &[String],
        luns: &[uuid::Uuid],
        datastores: &[String],
    ) -> Outcome {
        for vm in vms {
            self.drop_exports_of_vm(vm).await?;
            self.forget(Folder::Vms, vm).await?;
            drop(self.vms.borrow_mut().remove(vm));
        }
        for lun in luns {
            self.drop_exports_of_lun(*lun).await?;
        }
        for datastore in datastores {
            self.forget_datastore(datastore).await?;
        }
        self.forget(Folder::Pools, name).await?;
        let open = self.pools.borrow().get(name).and_then(|e| e.state.borrow().as_ref().ok().cloned());
        if let Some(open) = open
            && let Err(error) = open.pool.settle().await
        {
            tracing::warn!(pool = name, %error, "not closed well; it recovers when it is opened");
        }
        self.shut_pool(name).await;
        self.pools.borrow_mut().remove(name);
        Ok(())
    }

    /// Gives back in the background what deleted snapshots held, as long as the store lives.
    pub(super) fn tidy_in_background(self: &Rc<Self>) {
        let store = Rc::downgrade(self);
        drop(lane::spawn(async move {
            loop {
                lane::sleep(TIDY_EVERY).await;
                let Some(store) = store.upgrade() else { return };
                for (name, open) in store.open_pools_now() {
                    if open.pool.is_untidy()
                        && let Err(error) = open.pool.tidy_step().await
                    {
                        tracing::warn!(pool = name, %error, "background work failed");
                    }
                }
            }
        }));
    }
}
