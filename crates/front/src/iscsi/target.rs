//! The targets of a server: what they are called, who may use them, and which LUNs that one sees.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use scsi::LunMap;

use super::chap::Chap;
use super::name::Name;
use crate::request::Counts;

/// Which initiators a rule is for.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Who {
    /// One by its name.
    Named(Name),
    /// All that have no rule of their own.
    Anyone,
}

/// What an initiator may do with a target. One that has no rule sees nothing of it.
#[derive(Clone)]
pub struct Access {
    /// The LUNs it sees, by the tag of the portal group through which it comes: a target port each.
    pub luns: BTreeMap<u16, Rc<LunMap>>,
    /// It must show who it is; `None`: its name is believed.
    pub chap: Option<Chap>,
}

/// What is to be offered.
pub struct NewTarget {
    /// Name, unique on the server.
    pub name: Name,
    /// For people; may be empty.
    pub alias: String,
    /// Tags of the portal groups in which it can be reached.
    pub groups: Vec<u16>,
    /// Who may use it.
    pub access: Vec<(Who, Access)>,
}

/// A target.
pub struct Target {
    name: Name,
    alias: String,
    groups: Vec<u16>,
    access: RefCell<BTreeMap<Who, Access>>,
    counts: Rc<Counts>,
    removed: Cell<bool>,
}

impl Target {
    /// Its name.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// For people; may be empty.
    pub fn alias(&self) -> &str {
        &self.alias
    }

    /// What was done, for metrics.
    pub fn counts(&self) -> &Rc<Counts> {
        &self.counts
    }

    /// Tags of the portal groups in which it can be reached.
    pub fn groups(&self) -> &[u16] {
        &self.groups
    }

    /// It is not offered any more.
    pub(super) fn is_removed(&self) -> bool {
        self.removed.get()
    }

    /// What an initiator may do; `None`: nothing, not even know of it.
    pub fn access(&self, initiator: &Name) -> Option<Access> {
        let rules = self.access.borrow();
        let own = rules.get(&Who::Named(initiator.clone()));
        own.or_else(|| rules.get(&Who::Anyone)).cloned()
    }

    /// Adds or replaces a rule. Sessions that are there stay as they are.
    pub fn allow(&self, who: Who, access: Access) {
        self.access.borrow_mut().insert(who, access);
    }

    /// Takes a rule away. Sessions that are there stay; see [`super::Server::drop_sessions`].
    pub fn forbid(&self, who: &Who) {
        self.access.borrow_mut().remove(who);
    }
}

/// Why a target was not added.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NotAdded {
    /// The name is in use.
    #[error("there is a target named {0} already; remove it first or choose another name")]
    Exists(Name),
    /// No portal group.
    #[error("target {0} is in no portal group")]
    NoGroup(Name),
}

/// All targets of a server.
#[derive(Default)]
pub struct Targets {
    list: RefCell<BTreeMap<Name, Rc<Target>>>,
    discovery: RefCell<Option<Chap>>,
}

impl Targets {
    /// None yet.
    pub fn new() -> Rc<Self> {
        Rc::new(Self::default())
    }

    /// Offers one more.
    pub fn add(&self, new: NewTarget) -> Result<Rc<Target>, NotAdded> {
        let mut list = self.list.borrow_mut();
        if list.contains_key(&new.name) {
            return Err(NotAdded::Exists(new.name));
        }
        if new.groups.is_empty() {
            return Err(NotAdded::NoGroup(new.name));
        }
        let target = Rc::new(Target {
            name: new.name.clone(),
            alias: new.alias,
            groups: new.groups,
            access: RefCell::new(new.access.into_iter().collect()),
            counts: Counts::new(),
            removed: Cell::new(false),
        });
        list.insert(new.name, Rc::clone(&target));
        Ok(target)
    }

    /// The target of a name.
    pub fn get(&self, name: &Name) -> Option<Rc<Target>> {
        self.list.borrow().get(name).cloned()
    }

    /// All of them, by name.
    pub fn all(&self) -> Vec<Rc<Target>> {
        self.list.borrow().values().cloned().collect()
    }

    /// Those that an initiator may know of.
    pub fn visible_to(&self, initiator: &Name) -> Vec<Rc<Target>> {
        self.list.borrow().values().filter(|target| target.access(initiator).is_some()).cloned().collect()
    }

    /// Takes one off the list; its sessions are for the server to end.
    pub(super) fn take(&self, name: &Name) -> Option<Rc<Target>> {
        let target = self.list.borrow_mut().remove(name)?;
        target.removed.set(true);
        Some(target)
    }

    /// What a discovery session must show; `None`: its name is believed, and it learns only what that name may see.
    pub fn set_discovery_chap(&self, chap: Option<Chap>) {
        *self.discovery.borrow_mut() = chap;
    }

    pub(super) fn discovery_chap(&self) -> Option<Chap> {
        self.discovery.borrow().clone()
    }
}
