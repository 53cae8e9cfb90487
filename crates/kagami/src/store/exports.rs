//! What is served, over NBD (one server) and over iSCSI (`iscsi`). Exports come back after a restart.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};

use block::Disk;
use front::nbd::{Exports, NewExport as NbdExport, Options, Removal as NbdRemoval, Server, Tls};
use front::request::Operation;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vmdisk::VmDisk;

use super::iscsi::IscsiRecord;
use super::luns::FoundLun;
use super::targets::{self, Below, Served, Subject};
use super::{Folder, Store};
use crate::api::Change;
use crate::config::NbdTcp;
use crate::files::{Named, Versioned};
use crate::metrics::ExportCounts;
use crate::model::{ExportView, NewExport, Plan, Protocol, Removal};
use crate::problem::{Kind, Outcome, Problem};

/// What the home remembers of an export.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExportRecord {
    /// Format of this record.
    pub format: u32,
    /// Name on the wire.
    pub name: String,
    /// What is served.
    pub target: String,
    /// Takes no writes.
    pub read_only: bool,
    /// Others may serve the same disk.
    #[serde(default)]
    pub shared: bool,
    /// Over iSCSI, and how; absent: over NBD.
    #[serde(default)]
    pub iscsi: Option<IscsiRecord>,
}

impl ExportRecord {
    fn protocol(&self) -> Protocol {
        if self.iscsi.is_some() { Protocol::Iscsi } else { Protocol::Nbd }
    }
}

impl Versioned for ExportRecord {
    const FORMAT: u32 = 1;
}

impl Named for ExportRecord {
    fn format(&self) -> u32 {
        self.format
    }

    fn unknown(name: String, format: u32) -> Self {
        Self { format, name, target: String::new(), read_only: true, shared: false, iscsi: None }
    }
}

/// An export of the home.
pub struct ExportEntry {
    record: ExportRecord,
    /// What is served, or why nothing is.
    pub(super) state: Outcome<Serving>,
}

/// What is being served.
pub struct Serving {
    pub(super) subject: Subject,
    pub(super) below: Below,
    /// Whoever it belongs to keeps it open.
    disk: Weak<dyn Disk>,
    read_only: bool,
    /// A disk that was opened for this export.
    pub(super) own: Option<Rc<VmDisk>>,
    /// The VM's disk.
    chain: Option<Weak<VmDisk>>,
}

/// The server and what it serves.
pub struct ExportList {
    server: Rc<Server>,
    pub(super) entries: RefCell<BTreeMap<String, ExportEntry>>,
    addresses: RefCell<Vec<String>>,
}

impl ExportList {
    /// Nothing is served yet.
    pub fn new() -> Self {
        let server = Server::new(Exports::new(), Options::default());
        Self { server, entries: RefCell::default(), addresses: RefCell::default() }
    }

    /// Serves a disk of the daemon itself, not remembered in the home.
    pub fn add_own(&self, name: &str, disk: Rc<dyn Disk>, description: &str) -> Outcome {
        let mut new = NbdExport::new(name, disk);
        new.read_only = true;
        new.description = description.to_owned();
        self.server
            .exports()
            .add(new)
            .map(drop)
            .map_err(|e| Problem::failed("KGM-EXP-0001", format!("\"{name}\" cannot be served"), e))
    }

    /// Stops serving a disk of the daemon itself.
    pub async fn remove_own(&self, name: &str) {
        self.server.exports().remove(name, NbdRemoval::Drop).await;
    }
}

impl Store {
    /// Begins to listen: on the home's socket, and on TCP where that is wanted.
    pub(super) async fn serve_nbd(&self, tcp: Option<NbdTcp>) -> Outcome {
        let socket = self.home.nbd_socket();
        let failed = |e: std::io::Error| {
            Problem::failed("KGM-EXP-0002", format!("cannot serve NBD on {}", socket.display()), e)
        };
        let listener = lane::net::Listener::unix(&socket, 0o600).map_err(failed)?;
        self.exports.server.listen(listener, Tls::Off);
        self.exports.addresses.borrow_mut().push(format!("nbd+unix:///?socket={}", socket.display()));
        let Some(NbdTcp { address, tls }) = tcp else { return Ok(()) };
        let failed = |e: std::io::Error| {
            Problem::failed("KGM-EXP-0002", format!("cannot serve NBD on {address}"), e)
                .hint("--nbd-tcp with an address of this machine and a port that is free")
        };
        let listener = lane::net::Listener::tcp(address).map_err(failed)?;
        let (scheme, tls) = match tls {
            Some(identity) => ("nbds", Tls::Required(identity)),
            None => ("nbd", Tls::Off),
        };
        self.exports.addresses.borrow_mut().push(format!("{scheme}://{}/", listener.local_address()));
        self.exports.server.listen(listener, tls);
        Ok(())
    }

    /// Where NBD is served.
    pub fn nbd_addresses(&self) -> Vec<String> {
        self.exports.addresses.borrow().clone()
    }

    /// Addresses of one export.
    fn uris(&self, name: &str) -> Vec<String> {
        let path = name.split('/').map(crate::cli::segment).collect::<Vec<_>>().join("/");
        let put = |a: &String| match a.split_once("/?") {
            Some((scheme, query)) => format!("{scheme}/{path}?{query}"),
            None => format!("{a}{path}"),
        };
        self.exports.addresses.borrow().iter().map(put).collect()
    }

    pub(super) async fn open_exports(&self) -> Outcome {
        for record in self.load::<ExportRecord>(Folder::Exports).await? {
            let state = self.serve(&record).await;
            if let Err(problem) = &state {
                tracing::error!(export = record.name, %problem, "an export is down");
            }
            let name = record.name.clone();
            self.exports.entries.borrow_mut().insert(name, ExportEntry { record, state });
        }
        Ok(())
    }

    /// Serves what was down and can be served now: after a VM, a LUN or a datastore came back.
    pub(super) async fn retry_exports(&self) {
        let down: Vec<ExportRecord> = {
            let entries = self.exports.entries.borrow();
            entries.values().filter(|e| e.state.is_err()).map(|e| e.record.clone()).collect()
        };
        for record in down {
            let state = self.serve(&record).await;
            if let Some(entry) = self.exports.entries.borrow_mut().get_mut(&record.name) {
                entry.state = state;
            }
        }
    }

    /// Stops serving a VM's disks until [`Store::retry_exports`]: the VM is about to be closed.
    pub(super) async fn pause_exports(&self, vm: &str) {
        for name in self.exports_of(|s| s.is_of(vm)) {
            self.unserve(&name).await;
            if let Some(entry) = self.exports.entries.borrow_mut().get_mut(&name) {
                let title = format!("VM \"{vm}\" is being changed");
                entry.state = Err(Problem::new("KGM-VMS-0004", Kind::Conflict, title));
            }
        }
    }

    /// Stops serving everything the home remembers; the server goes on.
    pub(super) async fn close_exports(&self) {
        let names: Vec<String> = self.exports.entries.borrow().keys().cloned().collect();
        for name in names {
            self.unserve(&name).await;
            self.exports.entries.borrow_mut().remove(&name);
        }
        for export in self.exports.server.exports().all() {
            let name = export.name().to_owned();
            drop(export);
            self.exports.server.exports().remove(&name, NbdRemoval::Drop).await;
        }
    }

    /// The daemon's end: nobody gets in any more.
    pub(super) async fn stop_serving(&self) {
        self.exports.server.close().await;
        let _ = std::fs::remove_file(self.home.nbd_socket()); // it is stale without us anyway
    }

    /// What was counted of every export that serves, for metrics.
    pub fn export_counts(&self) -> Vec<ExportCounts> {
        let entries = self.exports.entries.borrow();
        let count = |entry: &ExportEntry| {
            let serving = entry.state.as_ref().ok()?;
            let counts = match &entry.record.iscsi {
                Some(iscsi) => self.target_counts(iscsi)?,
                None => Rc::clone(self.exports.server.exports().get(&entry.record.name)?.counts()),
            };
            let lun = self.lun(&serving.below.lun().to_string());
            Some(ExportCounts {
                export: entry.record.name.clone(),
                target: entry.record.target.clone(),
                lun: lun.map(|found| found.lun.name()).unwrap_or_default(),
                in_flight: counts.in_flight(),
                tallies: Operation::ALL.map(|o| (o, counts.tally(o))).to_vec(),
            })
        };
        entries.values().filter_map(count).collect()
    }

    pub(super) fn export_troubles(&self) -> Vec<String> {
        let entries = self.exports.entries.borrow();
        entries
            .values()
            .filter_map(|e| Some(format!("export {}: {}", e.record.name, e.state.as_ref().err()?)))
            .collect()
    }

    /// Names of the exports that serve something of this kind.
    pub(super) fn exports_of(&self, test: impl Fn(&Subject) -> bool) -> Vec<String> {
        self.exports_that(|serving| test(&serving.subject))
    }

    /// Names of the exports that serve, and of which this is so.
    pub(super) fn exports_that(&self, test: impl Fn(&Serving) -> bool) -> Vec<String> {
        let entries = self.exports.entries.borrow();
        let fits = |e: &&ExportEntry| e.state.as_ref().is_ok_and(&test);
        entries.values().filter(fits).map(|e| e.record.name.clone()).collect()
    }

    /// The export that serves this LUN by itself, or one of its snapshots.
    pub(super) fn export_on_lun(&self, uuid: Uuid) -> Option<String> {
        let fits = |s: &Subject| matches!(s, Subject::Lun(u) | Subject::Snapshot(u, _) if *u == uuid);
        self.exports_of(fits).into_iter().next()
    }

    /// The export that serves this LUN by itself.
    pub(super) fn export_of_lun(&self, uuid: Uuid) -> Option<String> {
        self.exports_of(|s| *s == Subject::Lun(uuid)).into_iter().next()
    }

    /// The export that serves this snapshot.
    pub(super) fn export_of_snapshot(&self, uuid: Uuid, snap: &str) -> Option<String> {
        self.exports_of(|s| *s == Subject::Snapshot(uuid, snap.to_owned())).into_iter().next()
    }

    /// An export that serves a disk of this VM.
    pub(super) fn export_of_vm(&self, vm: &str) -> Option<String> {
        self.exports_of(|s| s.is_of(vm)).into_iter().next()
    }

    /// The export that serves this disk of this VM.
    pub(super) fn export_of_disk(&self, vm: &str, slot: vm::Slot) -> Option<String> {
        self.exports_of(|s| *s == Subject::Disk(vm.to_owned(), slot)).into_iter().next()
    }

    /// Clients connected to the disks of a VM.
    pub(super) fn clients_of_vm(&self, vm: &str) -> usize {
        self.exports_of(|s| s.is_of(vm)).iter().map(|name| self.clients_of(name)).sum()
    }

    /// Clients connected to an export.
    fn clients_of(&self, name: &str) -> usize {
        match self.iscsi_record(name) {
            Some(record) => self.sessions_of(&record),
            None => self.exports.server.exports().get(name).map_or(0, |e| e.connections()),
        }
    }

    /// Clients connected to anything.
    pub(super) fn clients(&self) -> usize {
        let names: Vec<String> = self.exports.entries.borrow().keys().cloned().collect();
        let iscsi: usize =
            names.iter().filter_map(|name| self.iscsi_record(name)).map(|r| self.sessions_of(&r)).sum();
        self.exports.server.exports().all().iter().map(|e| e.connections()).sum::<usize>() + iscsi
    }

    fn iscsi_record(&self, name: &str) -> Option<IscsiRecord> {
        self.exports.entries.borrow().get(name).and_then(|e| e.record.iscsi.clone())
    }

    /// Stops serving an export; it stays on the list.
    async fn unserve(&self, name: &str) {
        match self.iscsi_record(name) {
            Some(record) => self.remove_target(&record).await,
            None => drop(self.exports.server.exports().remove(name, NbdRemoval::Drop).await),
        }
        let own = {
            let mut entries = self.exports.entries.borrow_mut();
            let serving = entries.get_mut(name).and_then(|e| e.state.as_mut().ok());
            serving.and_then(|s| Some((s.subject.clone(), s.own.take()?)))
        };
        if let Some((subject, disk)) = own {
            targets::close(&subject, &disk).await;
        }
    }

    /// A disk that somebody else serves is served again only where both sides have said so (R5): over SCSI always, else
    /// when both take writes.
    fn may_serve(&self, record: &ExportRecord, served: &Served) -> Outcome {
        let entries = self.exports.entries.borrow();
        let frozen = served.read_only;
        let same = |e: &&ExportEntry| e.state.as_ref().is_ok_and(|s| s.below == served.below);
        let others = entries.values().filter(same).map(|e| &e.record);
        for other in others.filter(|other| other.name != record.name) {
            let scsi = record.iscsi.is_some() || other.iscsi.is_some() || record.shared || other.shared;
            let both_write = !frozen && !record.read_only && !other.read_only;
            if (scsi || both_write) && !(record.shared && other.shared) {
                return Err(Problem::new(
                    "KGM-EXP-0008",
                    Kind::Refused,
                    format!("{} is served already", record.target),
                )
                .why(format!(
                    "by export \"{}\" of {}, and sharing was not declared on both",
                    other.name, other.target
                ))
                .hint(format!("kagami export stop {}, or --shared on both", other.name)));
            }
        }
        Ok(())
    }

    /// After snapshots of a LUN came or went: what `kagami:changed:SNAP` can be asked for, whatever stands on it.
    pub(super) fn refresh_changed(&self, found: &FoundLun) {
        let uuid = found.lun.uuid();
        let entries = self.exports.entries.borrow();
        for entry in entries.values() {
            let Ok(serving) = &entry.state else { continue };
            if serving.below.lun() == uuid
                && let Some(export) = self.exports.server.exports().get(&entry.record.name)
            {
                let chain = serving.chain.as_ref().map(Weak::upgrade);
                if let Some(None) = chain {
                    continue; // closed meanwhile
                }
                export.set_changed(self.changed_since(&serving.below, chain.flatten().as_deref()));
            }
        }
    }

    /// Forgets an export and stops serving it.
    pub(super) async fn drop_export(&self, name: &str) -> Outcome {
        self.forget(Folder::Exports, name).await?;
        self.unserve(name).await;
        self.exports.entries.borrow_mut().remove(name);
        Ok(())
    }

    /// Forgets all exports of a VM.
    pub(super) async fn drop_exports_of_vm(&self, vm: &str) -> Outcome {
        for name in self.exports_of(|s| s.is_of(vm)) {
            self.drop_export(&name).await?;
        }
        Ok(())
    }

    /// Forgets all exports of a LUN and its snapshots.
    pub(super) async fn drop_exports_of_lun(&self, uuid: Uuid) -> Outcome {
        while let Some(name) = self.export_on_lun(uuid) {
            self.drop_export(&name).await?;
        }
        Ok(())
    }

    async fn serve(&self, record: &ExportRecord) -> Outcome<Serving> {
        self.known(Folder::Exports, &record.name, record)?;
        let served = self.target(&record.target, record.read_only).await?;
        self.put_on(record, served).await
    }

    /// Serves what was found; a disk that was opened for it is closed again when that cannot be.
    async fn put_on(&self, record: &ExportRecord, served: Served) -> Outcome<Serving> {
        let put = self.may_serve(record, &served).and_then(|()| self.put_on_server(record, &served));
        match put {
            Ok(()) => Ok(Serving {
                own: served.own().cloned(),
                disk: Rc::downgrade(&served.disk),
                chain: served.chain.as_ref().map(Rc::downgrade),
                read_only: served.read_only,
                subject: served.subject,
                below: served.below,
            }),
            Err(problem) => {
                served.close().await;
                Err(problem)
            }
        }
    }

    fn put_on_server(&self, record: &ExportRecord, served: &Served) -> Outcome {
        let mut disk = Rc::clone(&served.disk);
        if let Some(iscsi) = &record.iscsi {
            return self.add_target(iscsi, &record.name, &served.subject, disk);
        }
        if record.shared {
            disk = self.shared_disk(&served.subject, disk)?;
        }
        let new = NbdExport {
            read_only: record.read_only || served.read_only,
            description: served.description.clone(),
            changed: self.changed_since(&served.below, served.chain.as_deref()),
            fast_zero: served.fast_zero,
            ..NbdExport::new(record.name.clone(), disk)
        };
        self.exports
            .server
            .exports()
            .add(new)
            .map(drop)
            .map_err(|e| Problem::failed("KGM-EXP-0001", format!("\"{}\" cannot be served", record.name), e))
    }

    fn export_view(&self, entry: &ExportEntry) -> ExportView {
        let record = &entry.record;
        let running = self.exports.server.exports().get(&record.name);
        let (serving, uris) = match &record.iscsi {
            Some(iscsi) => (self.has_target(iscsi), self.target_uris(iscsi)),
            None => (running.is_some(), self.uris(&record.name)),
        };
        // What is served knows itself best: the target's name may mean nothing any more.
        let disk = match &running {
            Some(export) => Some((export.disk().shape(), export.read_only())),
            None => entry.state.as_ref().ok().and_then(|s| Some((s.disk.upgrade()?.shape(), s.read_only))),
        };
        ExportView {
            name: record.name.clone(),
            target: record.target.clone(),
            state: if serving { "serving" } else { "down" }.into(),
            read_only: record.read_only || disk.is_some_and(|(shape, ro)| ro || shape.read_only),
            size_bytes: disk.filter(|_| serving).map_or(0, |(shape, _)| shape.bytes()),
            protocol: record.protocol(),
            uris,
            trouble: entry.state.as_ref().err().map(ToString::to_string),
        }
    }

    /// All exports.
    pub async fn exports(&self) -> Outcome<Vec<ExportView>> {
        Ok(self.exports.entries.borrow().values().map(|e| self.export_view(e)).collect())
    }

    /// Serves something.
    pub async fn start_export(&self, new: NewExport, dry: bool) -> Outcome<Change<ExportView>> {
        let _turn = self.turn.take().await;
        let name = new.name.clone().unwrap_or_else(|| new.target.clone());
        if name.is_empty() || name.len() > 200 || name.chars().any(char::is_control) {
            return Err(Problem::usage(format!("\"{}\" is no name for an export", name.escape_debug())));
        }
        if self.exports.entries.borrow().contains_key(&name) {
            return Err(Problem::exists("export", &name).hint("kagami export ls"));
        }
        let served = self.target(&new.target, new.read_only).await?;
        let record = match self.plan_export(&name, &new, &served) {
            Ok(record) => record,
            Err(problem) => {
                served.close().await;
                return Err(problem);
            }
        };
        if dry {
            let may = self.may_serve(&record, &served);
            served.close().await;
            return may.map(|()| Change::would(format!("serve {} as {name}", record.target)));
        }
        let serving = self.put_on(&record, served).await?;
        let entry = ExportEntry { record: record.clone(), state: Ok(serving) };
        let view = self.export_view(&entry);
        self.exports.entries.borrow_mut().insert(name.clone(), entry);
        if let Err(problem) = self.save(Folder::Exports, &name, record).await {
            self.unserve(&name).await;
            self.exports.entries.borrow_mut().remove(&name);
            return Err(problem);
        }
        Ok(Change::Done(view))
    }

    /// What will be remembered of a new export.
    fn plan_export(&self, name: &str, new: &NewExport, served: &Served) -> Outcome<ExportRecord> {
        let is_iscsi = new.protocol == Protocol::Iscsi;
        if !is_iscsi && (!new.initiators.is_empty() || new.iqn.is_some() || new.chap.is_some()) {
            return Err(Problem::usage("initiators, target names and CHAP are for --as iscsi"));
        }
        if is_iscsi && new.read_only && !served.read_only {
            return Err(Problem::usage("over iSCSI only what is read-only by itself is served read-only")
                .hint("serve a snapshot, LUN@SNAP"));
        }
        let taken: Vec<u16> = {
            let entries = self.exports.entries.borrow();
            entries.values().filter_map(|e| Some(e.record.iscsi.as_ref()?.port)).collect()
        };
        Ok(ExportRecord {
            format: ExportRecord::FORMAT,
            name: name.to_owned(),
            target: new.target.clone(),
            read_only: new.read_only,
            shared: new.shared,
            iscsi: is_iscsi.then(|| self.plan_iscsi(name, new, &taken)).transpose()?,
        })
    }

    /// Stops serving it.
    pub async fn stop_export(&self, name: &str, how: Removal) -> Outcome<Change<ExportView>> {
        let _turn = self.turn.take().await;
        let view = {
            let entries = self.exports.entries.borrow();
            entries
                .get(name)
                .map(|e| self.export_view(e))
                .ok_or_else(|| Problem::not_found("export", name))?
        };
        let clients = self.clients_of(name);
        if how.dry_run {
            let loses = if clients > 0 { vec![format!("{clients} connections")] } else { Vec::new() };
            return Ok(Change::Would(Plan {
                would: vec![format!("stop serving {name}")],
                loses,
                frees_bytes: 0,
            }));
        }
        self.drop_export(name).await?;
        Ok(Change::Done(view))
    }
}
