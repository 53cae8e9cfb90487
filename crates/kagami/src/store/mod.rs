//! The store: pools, datastores, VMs and exports of one home. It lives on the lane; the control plane reaches it by
//! [`RemoteStore::ask`] only.
//!
//! What a home has is in one small JSON file per object, written by rename: which media make up a pool, which LUN is a
//! datastore, which `.vmx` is a VM, what is exported. All else is read from the media.

mod attach;
mod backups;
mod cut;
mod datastores;
mod disks;
mod doing;
mod exports;
mod holds;
mod in_place;
mod iscsi;
mod luns;
mod pools;
mod rdms;
mod redo;
mod repairs;
mod restores;
mod room;
mod scan;
mod snaps;
mod standing;
mod targets;
mod vms;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::path::PathBuf;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use lane::Handle;
use lane::sync::Turn;
use serde::Serialize;
use vm::vmsnap::Reserve;

use crate::api::Events;
use crate::config::Serving;
use crate::files::{self, Loaded, Named, RecordError, Versioned};
use crate::home::Home;
use crate::jobs::Progress;
use crate::metrics::Metrics;
use crate::model::{NewBackup, NewRestore};
use crate::problem::{Kind, Outcome, Problem};

pub use pools::open_problem;
pub use redo::parse_reserve;

thread_local! {
    /// The store of the lane on this thread: a closure mailed to the lane finds it here, because what is `!Send` cannot
    /// travel with the closure.
    static STORE: RefCell<Option<Rc<Store>>> = const { RefCell::new(None) };
}

/// The store as other threads see it.
#[derive(Clone)]
pub struct RemoteStore {
    lane: Handle,
}

impl RemoteStore {
    /// Opens everything that the home has. What cannot be opened is kept as a trouble and shown; the rest works.
    pub async fn open(
        lane: Handle,
        home: Home,
        serving: Serving,
        events: Events,
        metrics: Arc<Metrics>,
    ) -> Outcome<Self> {
        lane.run(move || async move {
            let store = Store::open(home, serving, events, metrics).await?;
            STORE.with(|s| *s.borrow_mut() = Some(store));
            Ok::<(), Problem>(())
        })
        .await?;
        Ok(Self { lane })
    }

    /// Does something on the lane with the store.
    pub async fn ask<M, F, T>(&self, make: M) -> T
    where
        M: FnOnce(Rc<Store>) -> F + Send + 'static,
        F: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        self.lane
            .run(move || {
                let store = STORE.with(|s| s.borrow().clone());
                // `open` put it there, and only `close`, the daemon's last act, takes it away.
                make(store.expect("the store is open as long as the daemon answers"))
            })
            .await
    }

    /// Backs a VM up; the job's result.
    pub async fn backup(&self, new: NewBackup, progress: Arc<Progress>) -> Outcome<serde_json::Value> {
        self.ask(move |store| async move { store.backup(new, progress).await }).await
    }

    /// Restores a backup; the job's result.
    pub async fn restore(&self, new: NewRestore, progress: Arc<Progress>) -> Outcome<serde_json::Value> {
        self.ask(move |store| async move { store.restore(new, progress).await }).await
    }

    /// Brings back what a VM held before the latest restore over it; the job's result.
    pub async fn undo_restore(&self, vm: String, progress: Arc<Progress>) -> Outcome<serde_json::Value> {
        self.ask(move |store| async move { store.undo_in_place(&vm, progress).await }).await
    }

    /// Before interrupted jobs go on: cuts of backups that none of them wants are dropped.
    pub async fn keep_cuts(&self, wanted: Vec<NewBackup>) {
        self.ask(move |store| async move { store.keep_cuts(&wanted).await }).await;
    }

    /// Stops serving and makes everything durable.
    pub async fn close(&self) {
        self.ask(|store| async move { store.close().await }).await;
        self.lane.run(|| async { STORE.with(|s| s.borrow_mut().take()).is_some() }).await;
    }
}

/// A kind of object with its directory in the home.
#[derive(Copy, Clone, Debug)]
enum Folder {
    Pools,
    Datastores,
    Vms,
    Exports,
    Cuts,
    Restores,
    Doing,
}

impl Folder {
    fn name(self) -> &'static str {
        match self {
            Self::Pools => "pools",
            Self::Datastores => "datastores",
            Self::Vms => "vms",
            Self::Exports => "exports",
            Self::Cuts => "cuts",
            Self::Restores => "restores",
            Self::Doing => "doing",
        }
    }

    /// The newest format of its records that this program knows.
    fn known(self) -> u32 {
        match self {
            Self::Pools => pools::PoolRecord::FORMAT,
            Self::Datastores => datastores::DatastoreRecord::FORMAT,
            Self::Vms => vms::VmRecord::FORMAT,
            Self::Exports => exports::ExportRecord::FORMAT,
            Self::Cuts => standing::CutRecord::FORMAT,
            Self::Restores => in_place::InPlace::FORMAT,
            Self::Doing => doing::DoingRecord::FORMAT,
        }
    }
}

/// Everything one home has, on its lane.
pub struct Store {
    /// Itself, for disks that ask for their LUNs again.
    this: Weak<Self>,
    home: Home,
    /// Whoever listens to what happens.
    events: Events,
    /// What is measured.
    metrics: Arc<Metrics>,
    /// Room that a backup by redo logs wants to be free, unless it says otherwise.
    reserve: Reserve,
    /// Changes to the set of objects go one at a time; data and long copies do not wait here.
    turn: Turn,
    pools: RefCell<BTreeMap<String, pools::PoolEntry>>,
    datastores: RefCell<BTreeMap<String, datastores::DatastoreEntry>>,
    vms: RefCell<BTreeMap<String, vms::VmEntry>>,
    exports: exports::ExportList,
    iscsi: iscsi::IscsiPlane,
    /// What the last backups froze and still serve, by VM.
    frozen: RefCell<BTreeMap<String, backups::Frozen>>,
    /// Cuts of backups that are under way, by VM.
    cuts: RefCell<BTreeMap<String, standing::CutRecord>>,
    /// VMs with the record of a cut that cannot be read, and why.
    unread_cuts: RefCell<BTreeMap<String, String>>,
    /// Restores over VMs.
    in_places: in_place::InPlaces,
    /// VMs that a job works on, and what it does.
    occupied: Rc<RefCell<BTreeMap<String, &'static str>>>,
    /// Since the start: a cut is in doubt, or something that could say so is not here.
    in_doubt: Cell<bool>,
    /// Object files that could not be read.
    unreadable: RefCell<Vec<String>>,
}

/// A job works on a VM: until this is dropped nobody else changes the VM, removes it or works on it.
pub struct Occupied {
    all: Rc<RefCell<BTreeMap<String, &'static str>>>,
    vm: String,
}

impl Drop for Occupied {
    fn drop(&mut self) {
        self.all.borrow_mut().remove(&self.vm);
    }
}

impl Store {
    async fn open(home: Home, serving: Serving, events: Events, metrics: Arc<Metrics>) -> Outcome<Rc<Self>> {
        let store = Rc::new_cyclic(|this| Self {
            this: Weak::clone(this),
            exports: exports::ExportList::new(),
            iscsi: iscsi::IscsiPlane::new(),
            home,
            events,
            metrics,
            reserve: serving.reserve,
            turn: Turn::new(),
            pools: RefCell::default(),
            datastores: RefCell::default(),
            vms: RefCell::default(),
            frozen: RefCell::default(),
            cuts: RefCell::default(),
            unread_cuts: RefCell::default(),
            in_places: in_place::InPlaces::default(),
            occupied: Rc::default(),
            in_doubt: Cell::new(false),
            unreadable: RefCell::default(),
        });
        store.open_pools().await?;
        store.resolve_cuts().await;
        store.open_datastores().await?;
        let records = store.vm_records().await?;
        // Snapshots go only when no record asks any more whether their cut happened.
        store.in_doubt.set(!store.resolve_vmsnaps(&records).await);
        store.load_cuts().await?;
        store.load_in_place().await?;
        store.drop_all_frozen().await;
        store.open_vms(records).await?;
        store.end_what_was_cut_off().await?;
        store.serve_nbd(serving.nbd_tcp).await?;
        store.open_exports().await?;
        store.serve_iscsi(serving.iscsi)?;
        store.consolidate_all();
        store.tidy_in_background();
        Ok(store)
    }

    async fn close(&self) {
        self.hold_no_more(&self.open_vms_now());
        let _turn = self.turn.take().await;
        self.drop_all_frozen().await;
        // Sessions are lost, not logged out: initiators come back by themselves.
        self.stop_iscsi().await;
        self.close_exports().await;
        self.stop_serving().await;
        self.close_vms().await;
        self.refresh_tags().await;
        self.close_datastores().await;
        self.close_pools().await;
    }

    /// Refuses when a job works on the VM.
    pub(crate) fn not_occupied(&self, vm: &str) -> Outcome {
        match self.occupied.borrow().get(vm) {
            None => Ok(()),
            Some(what) => Err(Problem::new("KGM-VMS-0009", Kind::Conflict, format!("VM \"{vm}\" is busy"))
                .why(format!("a {what} of it is under way"))
                .hint("kagami job ls, then kagami job wait or kagami job cancel")),
        }
    }

    /// Takes the VM for a job.
    fn occupy(&self, vm: &str, what: &'static str) -> Outcome<Occupied> {
        self.not_occupied(vm)?;
        self.occupied.borrow_mut().insert(vm.to_owned(), what);
        Ok(Occupied { all: Rc::clone(&self.occupied), vm: vm.to_owned() })
    }

    fn object_path(&self, folder: Folder, name: &str) -> PathBuf {
        // Names were checked: they hold no slash. An export's name may, so it is encoded.
        self.home.join(folder.name()).join(format!("{}.json", crate::cli::segment(name)))
    }

    /// Writes an object's file, off the lane.
    async fn save<T>(&self, folder: Folder, name: &str, object: T) -> Outcome
    where
        T: Versioned + Serialize + Send + 'static,
    {
        let path = self.object_path(folder, name);
        let (shown, name) = (path.display().to_string(), name.to_owned());
        lane::offload(move || files::save(&path, &object))
            .await
            .map_err(|e| e.problem("KGM-SRV-0010", format!("cannot remember {name}: {shown}")))
    }

    /// Removes an object's file, off the lane.
    async fn forget(&self, folder: Folder, name: &str) -> Outcome {
        let path = self.object_path(folder, name);
        let shown = path.display().to_string();
        lane::offload(move || files::forget(&path, folder.known()))
            .await
            .map_err(|e| e.problem("KGM-SRV-0011", format!("cannot remove {shown}")))
    }

    /// Refuses a record that a newer program wrote: of what stands for it nothing is opened.
    fn known<T: Named>(&self, folder: Folder, name: &str, record: &T) -> Outcome {
        match record.format() {
            found if found > T::FORMAT => {
                Err(files::newer(&self.object_path(folder, name), found, T::FORMAT))
            }
            _ => Ok(()),
        }
    }

    /// Reads all objects of a folder. What is of a newer format is there by its name, to be shown; what cannot be read
    /// becomes a trouble.
    async fn load<T: Named + Send + 'static>(&self, folder: Folder) -> Outcome<Vec<T>> {
        let (mut objects, bad) = self.load_files::<T>(folder).await?;
        for (name, error) in bad {
            match error {
                RecordError::Newer { found, .. } => {
                    let path = self.home.join(folder.name()).join(name);
                    objects.push(lane::offload(move || files::stand_in::<T>(&path, found)).await);
                }
                error => self.is_unreadable(folder, &name, &error),
            }
        }
        Ok(objects)
    }

    async fn load_files<T: Versioned + Send + 'static>(&self, folder: Folder) -> Outcome<Loaded<T>> {
        let dir = self.home.join(folder.name());
        let shown = dir.display().to_string();
        lane::offload(move || files::load_all::<T>(&dir))
            .await
            .map_err(|e| Problem::failed("KGM-SRV-0012", format!("cannot read {shown}"), e))
    }

    fn is_unreadable(&self, folder: Folder, name: &str, error: &RecordError) {
        tracing::warn!(folder = folder.name(), name, %error, "an object's file cannot be read");
        self.unreadable.borrow_mut().push(format!("{}/{name}: {error}", folder.name()));
    }

    /// What could not be opened, and why.
    pub fn troubles(&self) -> Vec<String> {
        let mut all = self.unreadable.borrow().clone();
        all.extend(self.pool_troubles());
        all.extend(self.datastore_troubles());
        all.extend(self.vm_troubles());
        all.extend(self.in_place_troubles());
        all.extend(self.export_troubles());
        all
    }
}

/// Seconds since 1970 as RFC 3339.
fn rfc3339(seconds: u64) -> Option<String> {
    let seconds = i64::try_from(seconds).ok().filter(|s| *s > 0)?;
    jiff::Timestamp::from_second(seconds).ok().map(|t| t.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_records_of_format_1_are_read() {
        assert_eq!(files::golden::<pools::PoolRecord>("pools/p1.json").media.len(), 2);
        assert_eq!(files::golden::<datastores::DatastoreRecord>("datastores/ds1.json").name, "ds1");
        assert_eq!(files::golden::<vms::VmRecord>("vms/sql01.json").vmx, "/sql01/sql01.vmx");
        for name in ["exports/sql01%2Fscsi0%3A1.json", "exports/cluster.json"] {
            files::golden::<exports::ExportRecord>(name);
        }
    }
}
