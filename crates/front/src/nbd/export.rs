//! The exports of a server: which disk goes by which name, who is connected to it, and what was done.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use block::{Disk, Generation};
use lane::sync::Waiters;

use super::format::{NAME_BYTES_MAX, can};
use crate::request::{Counts, Operation, Tally};
use crate::wire::Tether;

/// What is to be exported.
pub struct NewExport {
    /// What clients ask for: at most 4096 bytes, unique on the server. The empty name is the default export.
    pub name: String,
    /// The disk. Its flush must cover all its users, which every [`Disk`] promises.
    pub disk: Rc<dyn Disk>,
    /// Refuse writes though the disk takes them.
    pub read_only: bool,
    /// One line for people, shown by clients that ask.
    pub description: String,
    /// Snapshots by which `kagami:changed:NAME` can be asked for.
    pub changed: Vec<(String, Generation)>,
    /// [`Disk::zero`] of whole blocks takes no longer than a small write, at any length (true for LUNs, whose map
    /// says "zero"). Only then FAST_ZERO is offered.
    pub fast_zero: bool,
}

impl NewExport {
    /// An export with a name and a disk; the rest can be changed afterwards.
    pub fn new(name: impl Into<String>, disk: Rc<dyn Disk>) -> Self {
        Self {
            name: name.into(),
            disk,
            read_only: false,
            description: String::new(),
            changed: Vec::new(),
            fast_zero: false,
        }
    }
}

/// Why an export was not added.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refused {
    /// The name is in use.
    #[error("there is an export named {0:?} already; remove it first or choose another name")]
    Exists(String),
    /// The name is longer than the protocol allows.
    #[error("the name has {0} bytes, and the protocol allows 4096")]
    NameTooLong(usize),
}

/// What happens to the clients of an export that is removed.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Removal {
    /// They are cut off; what they have under way is finished first, unanswered.
    Drop,
    /// They may stay as long as they like; nobody new gets in.
    Wait,
}

/// A disk under a name.
pub struct Export {
    name: String,
    description: String,
    pub(crate) disk: Rc<dyn Disk>,
    read_only: bool,
    pub(crate) fast_zero: bool,
    changed: RefCell<Vec<(String, Generation)>>,
    pub(crate) counts: Rc<Counts>,
    clients: RefCell<slab::Slab<Rc<Tether>>>,
    removed: Cell<bool>,
    left: Waiters,
}

impl Export {
    /// What clients ask for.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// One line for people.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// The disk behind it.
    pub fn disk(&self) -> &Rc<dyn Disk> {
        &self.disk
    }

    /// Writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only || self.disk.shape().read_only
    }

    /// What was done, for metrics.
    pub fn counts(&self) -> &Rc<Counts> {
        &self.counts
    }

    /// Changes the list of snapshots that can be asked for. Clients see it when they connect.
    pub fn set_changed(&self, changed: Vec<(String, Generation)>) {
        *self.changed.borrow_mut() = changed;
    }

    /// Snapshots that can be asked for.
    pub fn changed(&self) -> Vec<(String, Generation)> {
        self.changed.borrow().clone()
    }

    /// Clients connected now.
    pub fn connections(&self) -> usize {
        self.clients.borrow().len()
    }

    /// Transmission flags.
    pub(crate) fn flags(&self, structured: bool) -> u16 {
        let mut flags = can::HAS_FLAGS | can::SEND_FLUSH | can::SEND_FUA | can::MULTI_CONN | can::SEND_CACHE;
        if self.read_only() {
            flags |= can::READ_ONLY;
        } else {
            flags |= can::SEND_TRIM | can::SEND_WRITE_ZEROES;
            flags |= if self.fast_zero { can::SEND_FAST_ZERO } else { 0 };
        }
        flags | if structured { can::SEND_DF } else { 0 }
    }

    /// A client comes in; `None` when the export is being removed.
    pub(crate) fn enter(self: &Rc<Self>, client: &Rc<Tether>) -> Option<Stay> {
        if self.removed.get() {
            return None;
        }
        let key = self.clients.borrow_mut().insert(Rc::clone(client));
        Some(Stay { export: Rc::clone(self), key })
    }
}

/// A client's stay on an export.
pub(crate) struct Stay {
    export: Rc<Export>,
    key: usize,
}

impl Stay {
    pub fn export(&self) -> &Rc<Export> {
        &self.export
    }
}

impl Drop for Stay {
    fn drop(&mut self) {
        self.export.clients.borrow_mut().remove(self.key);
        if self.export.clients.borrow().is_empty() {
            self.export.left.wake_all();
        }
    }
}

/// An export as `show` and metrics print it.
#[derive(Clone, Debug)]
pub struct ExportInfo {
    /// Name.
    pub name: String,
    /// One line for people.
    pub description: String,
    /// Length in bytes.
    pub bytes: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Clients connected now.
    pub connections: usize,
    /// Requests not answered yet.
    pub in_flight: u64,
    /// What was done, per operation.
    pub tallies: Vec<(Operation, Tally)>,
}

/// All exports of a server. Several servers (a Unix socket, a TCP port) may share one list.
#[derive(Default)]
pub struct Exports {
    list: RefCell<BTreeMap<String, Rc<Export>>>,
}

impl Exports {
    /// None yet.
    pub fn new() -> Rc<Self> {
        Rc::new(Self::default())
    }

    /// Adds one; clients can connect from now on.
    pub fn add(&self, new: NewExport) -> Result<Rc<Export>, Refused> {
        if new.name.len() > NAME_BYTES_MAX {
            return Err(Refused::NameTooLong(new.name.len()));
        }
        let mut list = self.list.borrow_mut();
        if list.contains_key(&new.name) {
            return Err(Refused::Exists(new.name));
        }
        let export = Rc::new(Export {
            name: new.name.clone(),
            description: new.description,
            disk: new.disk,
            read_only: new.read_only,
            fast_zero: new.fast_zero,
            changed: RefCell::new(new.changed),
            counts: Counts::new(),
            clients: RefCell::default(),
            removed: Cell::new(false),
            left: Waiters::new(),
        });
        list.insert(new.name, Rc::clone(&export));
        Ok(export)
    }

    /// The export of a name.
    pub fn get(&self, name: &str) -> Option<Rc<Export>> {
        self.list.borrow().get(name).cloned()
    }

    /// Takes an export off the list and waits until no client uses it any more; then nothing here refers to its disk.
    /// False when there is none of that name.
    pub async fn remove(&self, name: &str, removal: Removal) -> bool {
        let Some(export) = self.list.borrow_mut().remove(name) else { return false };
        export.removed.set(true);
        if removal == Removal::Drop {
            let clients: Vec<_> =
                export.clients.borrow().iter().map(|(_, client)| Rc::clone(client)).collect();
            clients.iter().for_each(|client| client.cut());
        }
        export.left.until(|| export.clients.borrow().is_empty().then_some(())).await;
        true
    }

    /// All exports, by name.
    pub fn all(&self) -> Vec<Rc<Export>> {
        self.list.borrow().values().cloned().collect()
    }

    /// All exports as `show` and metrics print them.
    pub fn list(&self) -> Vec<ExportInfo> {
        self.all()
            .iter()
            .map(|export| ExportInfo {
                name: export.name.clone(),
                description: export.description.clone(),
                bytes: export.disk.shape().bytes(),
                read_only: export.read_only(),
                connections: export.connections(),
                in_flight: export.counts.in_flight(),
                tallies: Operation::ALL.map(|o| (o, export.counts.tally(o))).to_vec(),
            })
            .collect()
    }
}
