//! What is served, over NBD (one server) and over iSCSI (`iscsi`). Exports come back after a restart.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use array::catalog::SnapshotRecord;
use block::Disk;
use front::nbd::{Exports, NewExport as NbdExport, Options, Removal as NbdRemoval, Server, Tls};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::iscsi::IscsiRecord;
use super::luns::FoundLun;
use super::{Folder, Store};
use crate::api::Change;
use crate::config::NbdTcp;
use crate::model::{ExportView, NewExport, Plan, Protocol, Removal};
use crate::names::{FileName, SnapName};
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

/// What an export stands for, however its target was written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Subject {
    /// A LUN by itself.
    Lun(Uuid),
    /// A snapshot of a LUN.
    Snapshot(Uuid, String),
    /// A disk of a VM.
    Disk(String, vm::Slot),
}

impl Subject {
    /// It is a disk of this VM.
    fn is_of(&self, vm: &str) -> bool {
        matches!(self, Self::Disk(name, _) if name == vm)
    }
}

/// An export of the home.
pub struct ExportEntry {
    record: ExportRecord,
    /// What is served, or why nothing is.
    state: Outcome<Subject>,
}

/// The server and what it serves.
pub struct ExportList {
    server: Rc<Server>,
    entries: RefCell<BTreeMap<String, ExportEntry>>,
    addresses: RefCell<Vec<String>>,
}

/// A disk to be served.
struct Served {
    disk: Rc<dyn Disk>,
    read_only: bool,
    description: String,
    changed: Vec<(String, block::Generation)>,
    fast_zero: bool,
    subject: Subject,
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

/// Snapshots of a LUN, with the generations that changes can be asked for since.
fn changed_of(lun: &array::Lun) -> Vec<(String, block::Generation)> {
    let open = |s: SnapshotRecord| lun.open_snapshot(&s.name).ok().map(|open| (s.name, open.generation()));
    lun.snapshots().into_iter().filter_map(open).collect()
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
            let state = self.serve(&record);
            if let Err(problem) = &state {
                tracing::error!(export = record.name, %problem, "an export is down");
            }
            let name = record.name.clone();
            self.exports.entries.borrow_mut().insert(name, ExportEntry { record, state });
        }
        Ok(())
    }

    /// Serves what was down and can be served now: after a VM, a LUN or a datastore came back.
    pub(super) fn retry_exports(&self) {
        let down: Vec<ExportRecord> = {
            let entries = self.exports.entries.borrow();
            entries.values().filter(|e| e.state.is_err()).map(|e| e.record.clone()).collect()
        };
        for record in down {
            let state = self.serve(&record);
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

    pub(super) fn export_troubles(&self) -> Vec<String> {
        let entries = self.exports.entries.borrow();
        entries
            .values()
            .filter_map(|e| Some(format!("export {}: {}", e.record.name, e.state.as_ref().err()?)))
            .collect()
    }

    /// Names of the exports that serve something of this kind.
    fn exports_of(&self, test: impl Fn(&Subject) -> bool) -> Vec<String> {
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
    }

    /// A disk that somebody else serves is served again only where both sides have said so (R5).
    fn may_serve(&self, record: &ExportRecord, subject: &Subject) -> Outcome {
        let entries = self.exports.entries.borrow();
        let others = entries.values().filter(|e| e.state.as_ref().is_ok_and(|s| s == subject));
        for other in others.map(|e| &e.record).filter(|other| other.name != record.name) {
            let scsi = record.iscsi.is_some() || other.iscsi.is_some() || record.shared || other.shared;
            if scsi && !(record.shared && other.shared) {
                return Err(Problem::new(
                    "KGM-EXP-0008",
                    Kind::Refused,
                    format!("{} is served already", record.target),
                )
                .why(format!("by export \"{}\", and sharing was not declared on both", other.name))
                .hint(format!("kagami export stop {}, or --shared on both", other.name)));
            }
        }
        Ok(())
    }

    /// After snapshots of a LUN came or went: what `kagami:changed:SNAP` can be asked for.
    pub(super) fn refresh_changed(&self, found: &FoundLun) {
        if let Some(name) = self.export_of_lun(found.lun.uuid())
            && let Some(export) = self.exports.server.exports().get(&name)
        {
            export.set_changed(changed_of(&found.lun));
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

    /// What a target is: `VM/SLOT`, `LUN@SNAP`, `datastore:dir/disk.vmdk` of a VM, or a LUN.
    fn target(&self, text: &str) -> Outcome<Served> {
        if text.starts_with('[') || text.contains(':') && !text.contains('/') || text.contains(":/") {
            return self.target_file(text);
        }
        if let Some((vm, slot)) = text.split_once('/')
            && let Ok(slot) = slot.parse::<vm::Slot>()
        {
            let vm = self.open_vm(vm)?;
            return self.target_disk(&vm, slot);
        }
        if text.contains(':') {
            return self.target_file(text);
        }
        if text.contains('@') {
            let name = SnapName::parse(text)?;
            let (found, snapshot) = self.snapshot(&name)?;
            return Ok(Served {
                subject: Subject::Snapshot(found.lun.uuid(), name.snap.clone()),
                disk: snapshot,
                read_only: true,
                description: format!("snapshot {name}"),
                changed: Vec::new(),
                fast_zero: false,
            });
        }
        let found = self.lun(text)?;
        if let Some(claim) = &found.lun.claimed_by() {
            return Err(Problem::new(
                "KGM-LUN-0002",
                Kind::Refused,
                format!("LUN \"{text}\" is not served by itself"),
            )
            .why(format!("it is in use: {claim}"))
            .hint("serve the VM's disk, or a snapshot of the LUN"));
        }
        Ok(Served {
            changed: changed_of(&found.lun),
            disk: Rc::clone(&found.lun) as Rc<dyn Disk>,
            read_only: false,
            description: format!("LUN {text}"),
            fast_zero: true,
            subject: Subject::Lun(found.lun.uuid()),
        })
    }

    fn target_file(&self, text: &str) -> Outcome<Served> {
        let file = FileName::parse(text)?;
        for vm in self.open_vms_now() {
            for disk in vm.disks() {
                if disk.datastore.name == file.datastore && disk.path == file.path {
                    return self.target_disk(&vm, disk.slot);
                }
            }
        }
        Err(Problem::not_found("disk", text)
            .why("no registered VM has it")
            .hint("kagami vm attach VM ... first: a disk is served through its VM"))
    }

    fn target_disk(&self, vm: &vm::Vm, slot: vm::Slot) -> Outcome<Served> {
        let Some(disk) = vm.disk(slot) else {
            let why = vm.troubles().into_iter().find(|t| t.slot == slot).map(|t| t.why);
            return Err(Problem::new(
                "KGM-EXP-0003",
                Kind::NotFound,
                format!("{}/{slot} cannot be served", vm.name),
            )
            .why(why.unwrap_or_else(|| "the VM has no disk there".into()))
            .hint(format!("kagami vm show {}", vm.name)));
        };
        Ok(Served {
            description: format!("{} of VM {}: {}", slot, vm.name, disk.path),
            disk: Rc::clone(&disk.disk) as Rc<dyn Disk>,
            read_only: false,
            changed: Vec::new(),
            fast_zero: disk.disk.rdm().is_some(),
            subject: Subject::Disk(vm.name.clone(), slot),
        })
    }

    fn serve(&self, record: &ExportRecord) -> Outcome<Subject> {
        let mut served = self.target(&record.target)?;
        self.may_serve(record, &served.subject)?;
        if let Some(iscsi) = &record.iscsi {
            self.add_target(iscsi, &record.name, &served.subject, served.disk)?;
            return Ok(served.subject);
        }
        if record.shared {
            served.disk = self.shared_disk(&served.subject, served.disk)?;
        }
        let new = NbdExport {
            read_only: record.read_only || served.read_only,
            description: served.description,
            changed: served.changed,
            fast_zero: served.fast_zero,
            ..NbdExport::new(record.name.clone(), served.disk)
        };
        self.exports.server.exports().add(new).map_err(|e| {
            Problem::failed("KGM-EXP-0001", format!("\"{}\" cannot be served", record.name), e)
        })?;
        Ok(served.subject)
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
            None => self.target(&record.target).ok().map(|served| (served.disk.shape(), served.read_only)),
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
        let record = self.plan_export(&name, &new)?;
        if dry {
            let served = self.target(&record.target)?;
            self.may_serve(&record, &served.subject)?;
            return Ok(Change::would(format!("serve {} as {name}", record.target)));
        }
        let subject = self.serve(&record)?;
        let entry = ExportEntry { record: record.clone(), state: Ok(subject) };
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
    fn plan_export(&self, name: &str, new: &NewExport) -> Outcome<ExportRecord> {
        let is_iscsi = new.protocol == Protocol::Iscsi;
        if !is_iscsi && (!new.initiators.is_empty() || new.iqn.is_some() || new.chap.is_some()) {
            return Err(Problem::usage("initiators, target names and CHAP are for --as iscsi"));
        }
        let served = self.target(&new.target)?;
        if is_iscsi && new.read_only && !served.read_only {
            return Err(Problem::usage("over iSCSI only what is read-only by itself is served read-only")
                .hint("serve a snapshot, LUN@SNAP"));
        }
        let taken: Vec<u16> = {
            let entries = self.exports.entries.borrow();
            entries.values().filter_map(|e| Some(e.record.iscsi.as_ref()?.port)).collect()
        };
        Ok(ExportRecord {
            format: 1,
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
