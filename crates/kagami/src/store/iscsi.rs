//! What is served over iSCSI: one target per export, whose LUN 0 is the disk. The logical unit of a disk is one, however
//! many exports share it, and what it must remember (registrations, reservations, saved mode pages) is a file of the home.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::{Rc, Weak};

use block::Disk;
use front::iscsi::{Access, Chap, Credentials, Name, NewTarget, Options, Portal, Server, Targets, Who};
use scsi::pr::Corrupt;
use scsi::{Identity, Keep, LogicalUnit, LunMap, Port, Settings, TransportId};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Store;
use super::targets::Subject;
use crate::config::IscsiPortal;
use crate::model::{NewChap, NewExport};
use crate::problem::{Kind, Outcome, Problem};

/// All portals are of one portal group.
const GROUP: u16 = 1;
/// The disk of a target.
const LUN: u16 = 0;
/// Where names of targets begin that nobody chose.
const NAMES: &str = "iqn.2026-01.kagami:";
/// Name under which block front ends are known to a logical unit.
const BLOCK_CLIENTS: &str = "iqn.2026-01.kagami:block-clients";
/// Relative target port of block front ends; those of targets lie below.
const BLOCK_PORT: u16 = 0xffff;
/// In the list of initiators: everybody.
const ANYBODY: &str = "*";

/// What the home remembers of an export over iSCSI.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IscsiRecord {
    /// Name of the target.
    pub iqn: String,
    /// Relative target port identifier: registrations are kept by it, so it stays.
    pub port: u16,
    /// Who may use it.
    pub initiators: Vec<String>,
    /// How they show who they are.
    pub chap: Option<NewChap>,
}

/// The iSCSI server, and the logical units of all front ends.
pub struct IscsiPlane {
    server: Rc<Server>,
    addresses: RefCell<Vec<String>>,
    units: RefCell<BTreeMap<Uuid, Weak<LogicalUnit>>>,
}

impl IscsiPlane {
    /// Nothing is served yet.
    pub fn new() -> Self {
        let server = Server::new(Targets::new(), Options::default());
        Self { server, addresses: RefCell::default(), units: RefCell::default() }
    }
}

/// The file of one logical unit.
struct KeepFile(PathBuf);

impl Keep for KeepFile {
    fn save<'a>(&'a self, record: &'a [u8]) -> block::Io<'a> {
        let (path, record) = (self.0.clone(), record.to_vec());
        Box::pin(async move { Ok(lane::offload(move || crate::files::write(&path, &record)).await?) })
    }
}

/// This boot of the machine: a logical unit tells a restart of the daemon from a power loss by it.
fn boot() -> u128 {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    Uuid::parse_str(text.trim()).map_or(0, |id| id.as_u128())
}

fn refused(title: impl Into<String>) -> Problem {
    Problem::new("KGM-EXP-0005", Kind::Refused, title)
}

fn iscsi_name(text: &str) -> Outcome<Name> {
    Name::new(text).map_err(|e| {
        Problem::usage(format!("\"{}\" is no iSCSI name", text.escape_debug()))
            .why(e)
            .hint("for example iqn.1993-08.org.debian:01:0123456789ab")
    })
}

fn chap_of(new: &NewChap) -> Outcome<Chap> {
    let wrong = |e: front::iscsi::BadCredentials| Problem::usage("these CHAP secrets cannot be used").why(e);
    let target = match (&new.target_user, &new.target_secret) {
        (Some(user), Some(secret)) => Some(Credentials::new(user, secret.as_bytes()).map_err(wrong)?),
        (None, None) => None,
        _ => return Err(Problem::usage("mutual CHAP wants a name and a secret of the target")),
    };
    let initiator = Credentials::new(&new.user, new.secret.as_bytes()).map_err(wrong)?;
    Chap::new(initiator, target).map_err(wrong)
}

/// A name for a target made from that of its export.
fn default_name(export: &str) -> String {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':');
    let plain: String = export.chars().map(|c| if fits(c) { c.to_ascii_lowercase() } else { '-' }).collect();
    format!("{NAMES}{plain}")
}

/// A uuid that follows from what something is called.
fn named_uuid(parts: &[&[u8]]) -> Uuid {
    let mut hasher = blake3::Hasher::new_derive_key("kagami scsi identity of a virtual disk");
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
    }
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

impl Store {
    /// Begins to listen.
    pub(super) fn serve_iscsi(&self, portals: Vec<IscsiPortal>) -> Outcome {
        for portal in portals {
            let listener = lane::net::Listener::tcp(portal.address).map_err(|e| {
                Problem::failed("KGM-EXP-0004", format!("cannot serve iSCSI on {}", portal.address), e)
                    .hint("--iscsi with an address of this machine and a port that is free")
            })?;
            let address = portal.announce.clone().unwrap_or_else(|| listener.local_address().to_owned());
            self.iscsi.addresses.borrow_mut().push(address);
            self.iscsi.server.listen(Portal { listener, group: GROUP, announce: portal.announce });
        }
        Ok(())
    }

    /// The daemon's end.
    pub(super) async fn stop_iscsi(&self) {
        self.iscsi.server.close().await;
    }

    /// Checks what was asked for, and fills in what was not said. `taken` are the ports of the other exports.
    pub(super) fn plan_iscsi(&self, export: &str, new: &NewExport, taken: &[u16]) -> Outcome<IscsiRecord> {
        if self.iscsi.addresses.borrow().is_empty() {
            return Err(refused("this daemon serves no iSCSI")
                .hint("kagami serve --iscsi 0.0.0.0:3260, or portals under [iscsi] in kagami.toml"));
        }
        if new.initiators.is_empty() {
            return Err(refused("nobody could use this target")
                .why("an initiator that is not named sees nothing")
                .hint("--initiator NAME, as /etc/iscsi/initiatorname.iscsi has it (or '*', knowing what that means)"));
        }
        for initiator in new.initiators.iter().filter(|name| *name != ANYBODY) {
            iscsi_name(initiator)?;
        }
        let iqn = iscsi_name(new.iqn.as_deref().unwrap_or(&default_name(export)))?;
        if self.iscsi.server.targets().get(&iqn).is_some() {
            return Err(Problem::exists("target", iqn.as_str()).hint("--iqn NAME"));
        }
        new.chap.as_ref().map(chap_of).transpose()?;
        let port = (1..BLOCK_PORT).find(|port| !taken.contains(port));
        let port = port.ok_or_else(|| refused("there are too many targets"))?;
        let initiators = new.initiators.clone();
        Ok(IscsiRecord { iqn: iqn.as_str().to_owned(), port, initiators, chap: new.chap.clone() })
    }

    /// Serves a disk.
    pub(super) fn add_target(
        &self,
        record: &IscsiRecord,
        alias: &str,
        subject: &Subject,
        disk: Rc<dyn Disk>,
    ) -> Outcome {
        let luns = LunMap::new(Rc::new(Port {
            relative: record.port,
            name: format!("{},t,0x{GROUP:04x}", record.iqn),
            device_name: record.iqn.clone(),
            group: GROUP,
        }));
        luns.add(LUN, self.logical_unit(subject, disk)?);
        let chap = record.chap.as_ref().map(chap_of).transpose()?;
        let access = Access { luns: BTreeMap::from([(GROUP, luns)]), chap };
        let who = |name: &String| match name.as_str() {
            ANYBODY => Ok(Who::Anyone),
            name => iscsi_name(name).map(Who::Named),
        };
        let access =
            record.initiators.iter().map(|name| Ok((who(name)?, access.clone()))).collect::<Outcome<_>>()?;
        let name = iscsi_name(&record.iqn)?;
        let new = NewTarget { name, alias: alias.to_owned(), groups: vec![GROUP], access };
        self.iscsi
            .server
            .targets()
            .add(new)
            .map(drop)
            .map_err(|e| Problem::failed("KGM-EXP-0001", format!("\"{}\" cannot be served", record.iqn), e))
    }

    /// Stops serving it: its sessions are asked to log out, then ended.
    pub(super) async fn remove_target(&self, record: &IscsiRecord) {
        if let Ok(name) = iscsi_name(&record.iqn) {
            self.iscsi.server.remove(&name).await;
        }
    }

    /// It is served now.
    pub(super) fn has_target(&self, record: &IscsiRecord) -> bool {
        iscsi_name(&record.iqn).is_ok_and(|name| self.iscsi.server.targets().get(&name).is_some())
    }

    /// Sessions of a target.
    pub(super) fn sessions_of(&self, record: &IscsiRecord) -> usize {
        let sessions = self.iscsi.server.sessions();
        sessions.iter().filter(|s| s.target.as_ref().is_some_and(|t| t.as_str() == record.iqn)).count()
    }

    /// What was counted of a target.
    pub(super) fn target_counts(&self, record: &IscsiRecord) -> Option<Rc<front::request::Counts>> {
        let target = self.iscsi.server.targets().get(&iscsi_name(&record.iqn).ok()?)?;
        Some(Rc::clone(target.counts()))
    }

    /// Where a target is to be found.
    pub(super) fn target_uris(&self, record: &IscsiRecord) -> Vec<String> {
        let uri = |address: &String| format!("iscsi://{address}/{}/{LUN}", record.iqn);
        self.iscsi.addresses.borrow().iter().map(uri).collect()
    }

    /// A disk that several share, for front ends that speak no SCSI: who is fenced off is fenced off there, too.
    pub(super) fn shared_disk(&self, subject: &Subject, disk: Rc<dyn Disk>) -> Outcome<Rc<dyn Disk>> {
        let failed = |e| Problem::failed("KGM-EXP-0006", "the disk cannot be shared", e);
        let name = TransportId::iscsi(BLOCK_CLIENTS, None).map_err(failed)?;
        let (device_name, group) = (String::new(), GROUP);
        let port = Rc::new(Port { relative: BLOCK_PORT, name: String::new(), device_name, group });
        Ok(self.logical_unit(subject, disk)?.as_disk(name, &port))
    }

    /// The one logical unit of a disk.
    fn logical_unit(&self, subject: &Subject, disk: Rc<dyn Disk>) -> Outcome<Rc<LogicalUnit>> {
        let identity = self.identity(subject)?;
        let uuid = identity.uuid;
        if let Some(unit) = self.iscsi.units.borrow().get(&uuid).and_then(Weak::upgrade) {
            return Ok(unit);
        }
        let path = self.home.join("scsi").join(format!("{}.pr", uuid.simple()));
        let failed = |what, e: String| {
            Problem::new("KGM-EXP-0007", Kind::Failed, format!("{what} {}", path.display())).why(e)
        };
        // Small, and read once before the first command: the lane may wait for it.
        let kept = match std::fs::read(&path) {
            Ok(kept) => kept,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(failed("cannot read the reservations in", e.to_string())),
        };
        let settings = Settings { boot: boot(), ..Settings::default() };
        let keep = Rc::new(KeepFile(path.clone()));
        let unit = LogicalUnit::new(disk, identity, settings, keep, &kept).map_err(|e| match e {
            Corrupt::Newer { .. } => failed("a newer kagami wrote the reservations in", e.to_string())
                .hint("use that kagami with this home; the file is left as it is"),
            Corrupt::Damaged(_) => failed("the reservations are damaged in", e.to_string()),
        })?;
        let mut units = self.iscsi.units.borrow_mut();
        units.retain(|_, unit| unit.strong_count() > 0);
        units.insert(uuid, Rc::downgrade(&unit));
        Ok(unit)
    }

    /// Who a disk says it is: a LUN for ever itself, also behind an RDM in physical mode; what only a VM sees is named
    /// by where it lies.
    fn identity(&self, subject: &Subject) -> Outcome<Identity> {
        let naa = array::identity::naa;
        let of_file = |datastore: &str, path: &str| {
            let uuid = named_uuid(&[b"disk", datastore.as_bytes(), path.as_bytes()]);
            Identity::virtual_disk(uuid, naa(uuid))
        };
        Ok(match subject {
            Subject::Lun(uuid) => Identity::lun(*uuid, naa(*uuid)),
            Subject::Snapshot(uuid, name) => {
                let uuid = named_uuid(&[b"snapshot", uuid.as_bytes(), name.as_bytes()]);
                Identity::lun(uuid, naa(uuid))
            }
            Subject::Disk(vm, slot) => {
                let vm = self.open_vm(vm)?;
                let disk = vm.disk(*slot).ok_or_else(|| Problem::not_found("disk", &slot.to_string()))?;
                of_file(&disk.datastore.name, &disk.path)
            }
            Subject::File(file) => of_file(&file.datastore, &file.path),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_called_after_their_exports() {
        assert_eq!(default_name("db01/scsi0:1"), "iqn.2026-01.kagami:db01-scsi0:1");
        assert_eq!(default_name("Data@Monday"), "iqn.2026-01.kagami:data-monday");
        assert!(iscsi_name(&default_name("x")).is_ok());
    }

    #[test]
    fn identities_follow_from_names() {
        let one = named_uuid(&[b"disk", b"ds1", b"/a/b.vmdk"]);
        assert_eq!(one, named_uuid(&[b"disk", b"ds1", b"/a/b.vmdk"]));
        assert_ne!(one, named_uuid(&[b"disk", b"ds1/a", b"/b.vmdk"]));
    }
}
