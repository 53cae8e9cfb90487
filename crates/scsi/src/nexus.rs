//! I_T nexuses: an initiator port, a target port, and the logical units the one reaches through the other.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::rc::{Rc, Weak};

use lane::sync::Waiters;

use crate::command::{Command, Offered, absent, report_luns};
use crate::lun::ScsiLun;
use crate::pr::{Access, ItNexus};
use crate::sense::asc;
use crate::task::{Aborted, Attribute, Hit};
use crate::transport_id::TransportId;

/// A target port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Port {
    /// Relative target port identifier: from 1, unique in the daemon.
    pub relative: u16,
    /// SCSI name of the port ("iqn...,t,0x0001"), at most 247 bytes; empty: none.
    pub name: String,
    /// SCSI name of the target device it belongs to; empty: none.
    pub device_name: String,
    /// Target port group (ALUA).
    pub group: u16,
}

/// The logical units that an initiator sees at a port, by number. LUN masking is choosing the map: sessions of
/// initiators with the same rights share one.
pub struct LunMap {
    port: Rc<Port>,
    units: RefCell<BTreeMap<u16, Rc<dyn ScsiLun>>>,
    nexuses: RefCell<Vec<Weak<Nexus>>>,
}

/// Largest LUN number: flat space addressing has 14 bits (SAM-5 4.7.7.3).
pub const LUN_MAX: u16 = 0x3fff;

impl LunMap {
    /// Nothing at a port.
    pub fn new(port: Rc<Port>) -> Rc<Self> {
        Rc::new(Self { port, units: RefCell::default(), nexuses: RefCell::default() })
    }

    /// The port.
    pub fn port(&self) -> &Rc<Port> {
        &self.port
    }

    /// Puts a logical unit at a number. False: the number is taken or too large.
    pub fn add(&self, number: u16, unit: Rc<dyn ScsiLun>) -> bool {
        let mut units = self.units.borrow_mut();
        if number > LUN_MAX || units.contains_key(&number) {
            return false;
        }
        unit.present(&self.port);
        units.insert(number, unit);
        drop(units);
        self.changed();
        true
    }

    /// Takes a logical unit away; its commands are aborted without answer. False: there is none.
    pub fn remove(&self, number: u16) -> bool {
        let Some(unit) = self.units.borrow_mut().remove(&number) else { return false };
        for nexus in self.living() {
            if let Some(seat) = nexus.seats.borrow_mut().remove(&number) {
                all_of(&seat, &unit);
                unit.leave(&seat);
            }
        }
        self.changed();
        true
    }

    /// The numbers that are taken, in order.
    pub fn numbers(&self) -> Vec<u16> {
        self.units.borrow().keys().copied().collect()
    }

    /// The logical unit at a number.
    pub fn unit(&self, number: u16) -> Option<Rc<dyn ScsiLun>> {
        self.units.borrow().get(&number).cloned()
    }

    fn living(&self) -> Vec<Rc<Nexus>> {
        let mut nexuses = self.nexuses.borrow_mut();
        nexuses.retain(|n| n.strong_count() > 0);
        nexuses.iter().filter_map(Weak::upgrade).collect()
    }

    /// SPC-4 6.33: every nexus is told on every logical unit it has.
    fn changed(&self) {
        for nexus in self.living() {
            for seat in nexus.all_seats() {
                seat.attend(asc::REPORTED_LUNS_CHANGED);
            }
        }
    }
}

/// Most unit attentions that wait on one seat; there are not as many kinds.
const ATTENTIONS_MAX: usize = 16;
/// Most events that wait for a front end.
const EVENTS_MAX: usize = 64;

/// A nexus at one logical unit.
pub struct Seat {
    /// Number at which this nexus sees the logical unit.
    pub(crate) lun: u16,
    /// Its name for persistent reservations.
    pub(crate) it: ItNexus,
    nexus: Weak<Nexus>,
    attentions: RefCell<VecDeque<u16>>,
    /// What reservations let it do, as of an epoch of the logical unit.
    pub(crate) access: Cell<(u64, Access)>,
    pub(crate) tasks: Cell<u32>,
    /// PREVENT ALLOW MEDIUM REMOVAL said so.
    pub(crate) prevents: Cell<bool>,
}

impl Seat {
    pub(crate) fn new(nexus: Weak<Nexus>, lun: u16, it: ItNexus) -> Rc<Self> {
        Rc::new(Self {
            lun,
            it,
            nexus,
            attentions: RefCell::default(),
            access: Cell::new((0, Access::All)),
            tasks: Cell::new(0),
            prevents: Cell::new(false),
        })
    }

    /// The nexus, while it lives.
    pub(crate) fn nexus(&self) -> Option<Rc<Nexus>> {
        self.nexus.upgrade()
    }

    /// Raises a unit attention; one that waits already is not doubled (SAM-5 5.14).
    pub(crate) fn attend(&self, code: u16) {
        let mut attentions = self.attentions.borrow_mut();
        if attentions.contains(&code) || attentions.len() == ATTENTIONS_MAX {
            return;
        }
        // Everything older is covered by a reset or a power on.
        if code >> 8 == 0x29 {
            attentions.clear();
        }
        attentions.push_back(code);
        drop(attentions);
        if let Some(nexus) = self.nexus() {
            nexus.tell(Event { lun: lun_bytes(self.lun), code });
        }
    }

    /// The oldest unit attention, which is over by that.
    pub(crate) fn take_attention(&self) -> Option<u16> {
        // The usual case is to have none.
        if self.attentions.borrow().is_empty() { None } else { self.attentions.borrow_mut().pop_front() }
    }

    /// Some unit attention waits.
    pub(crate) fn has_attention(&self) -> bool {
        !self.attentions.borrow().is_empty()
    }

    fn forget(&self, code: u16) {
        self.attentions.borrow_mut().retain(|c| *c != code);
    }
}

/// Something an initiator may want to look at: virtio-scsi's event queue and iSCSI's asynchronous messages say it.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Event {
    /// The LUN, as in commands.
    pub lun: [u8; 8],
    /// Code of the unit attention that was raised: see [`asc`].
    pub code: u16,
}

/// Task management function (SAM-5 clause 7).
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Function {
    /// One task of this nexus, by tag.
    AbortTask(u64),
    /// All tasks of this nexus.
    AbortTaskSet,
    /// All tasks of every nexus.
    ClearTaskSet,
    /// No ACA exists here.
    ClearAca,
    /// Back to the state after power on, reservations of the persistent kind excepted.
    LogicalUnitReset,
    /// Is this task there?
    QueryTask(u64),
    /// Is any task there?
    QueryTaskSet,
    /// Does a unit attention wait?
    QueryAsynchronousEvent,
    /// As if the nexus were lost, on every logical unit.
    ItNexusReset,
    /// LUN reset on every logical unit of this nexus.
    TargetWarmReset,
    /// The same; what the transport adds (closing connections) is the front end's.
    TargetColdReset,
}

/// Service response of a task management function.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Response {
    /// FUNCTION COMPLETE.
    Complete,
    /// FUNCTION SUCCEEDED: the answer of a query is yes.
    Succeeded,
    /// FUNCTION COMPLETE for SAM; iSCSI tells "task does not exist" apart.
    NoSuchTask,
    /// INCORRECT LOGICAL UNIT NUMBER.
    IncorrectLun,
    /// FUNCTION REJECTED, because it is not there.
    NotSupported,
}

/// An initiator port at a target port: one per iSCSI session, one per VM adapter (R50).
pub struct Nexus {
    initiator: TransportId,
    luns: Rc<LunMap>,
    seats: RefCell<BTreeMap<u16, Rc<Seat>>>,
    lost: Cell<bool>,
    events: RefCell<VecDeque<Event>>,
    bell: Waiters,
    me: Weak<Self>,
}

impl Nexus {
    /// A nexus that begins now. Where one of the same initiator at the same port lives, end that first
    /// ([`Nexus::lost`]).
    pub fn new(initiator: TransportId, luns: Rc<LunMap>) -> Rc<Self> {
        let nexus = Rc::new_cyclic(|me| Self {
            initiator,
            luns: Rc::clone(&luns),
            seats: RefCell::default(),
            lost: Cell::new(false),
            events: RefCell::default(),
            bell: Waiters::new(),
            me: Weak::clone(me),
        });
        luns.nexuses.borrow_mut().push(Rc::downgrade(&nexus));
        for number in luns.numbers() {
            nexus.seat(number);
        }
        nexus
    }

    /// Name of the initiator port.
    pub fn initiator(&self) -> &TransportId {
        &self.initiator
    }

    /// What it sees.
    pub fn luns(&self) -> &Rc<LunMap> {
        &self.luns
    }

    fn all_seats(&self) -> Vec<Rc<Seat>> {
        self.seats.borrow().values().cloned().collect()
    }

    /// The seat at a LUN, taken when it is first asked for.
    fn seat(&self, number: u16) -> Option<(Rc<Seat>, Rc<dyn ScsiLun>)> {
        let unit = self.luns.unit(number)?;
        if let Some(seat) = self.seats.borrow().get(&number) {
            return Some((Rc::clone(seat), unit));
        }
        let it = ItNexus { initiator: self.initiator.clone(), port: self.luns.port.relative };
        let seat = Seat::new(Weak::clone(&self.me), number, it);
        self.seats.borrow_mut().insert(number, Rc::clone(&seat));
        unit.arrive(&seat);
        Some((seat, unit))
    }

    /// Every logical unit it has, with its seat there.
    pub(crate) fn reached(&self) -> Vec<(Rc<Seat>, Rc<dyn ScsiLun>)> {
        self.luns.numbers().into_iter().filter_map(|n| self.seat(n)).collect()
    }

    fn tell(&self, event: Event) {
        let mut events = self.events.borrow_mut();
        // What does not fit is dropped: the unit attention itself waits on its seat.
        if events.len() < EVENTS_MAX && !events.contains(&event) {
            events.push_back(event);
            drop(events);
            self.bell.wake_all();
        }
    }

    /// Waits for the next event. One waiter at a time.
    pub async fn event(&self) -> Event {
        self.bell.until(|| self.events.borrow_mut().pop_front()).await
    }

    /// Takes a command up: finds its logical unit, unit attentions, reservations, checks the CDB. Commands are taken
    /// up in the order of the calls; see [`Command`].
    pub fn begin(
        &self,
        lun: [u8; 8],
        tag: u64,
        attribute: Attribute,
        cdb: &[u8],
        offered: Offered,
    ) -> Command {
        if self.lost.get() {
            return Command::nobody();
        }
        let found = lun_number(lun).and_then(|number| self.seat(number));
        // REPORT LUNS is the target's, also where the logical unit is a real device's (R3).
        if cdb.first() == Some(&0xa0) {
            for seat in self.all_seats() {
                seat.forget(asc::REPORTED_LUNS_CHANGED);
            }
            return Command::done(report_luns(cdb, &self.luns.numbers()), offered);
        }
        match found {
            Some((seat, unit)) => Command::begin(seat, unit, tag, attribute, cdb, offered),
            None => Command::done(absent(cdb), offered),
        }
    }

    /// Task management. What it marks is marked when this returns; the future waits until the tasks have ended.
    pub fn manage(&self, lun: [u8; 8], function: Function) -> impl Future<Output = Response> + 'static {
        let (response, hits) = self.manage_now(lun, function);
        async move {
            have_ended(hits).await;
            response
        }
    }

    fn manage_now(&self, lun: [u8; 8], function: Function) -> (Response, Hits) {
        match function {
            Function::ItNexusReset => {
                let hits = self.reached().into_iter().map(|(seat, unit)| {
                    let hit = all_of(&seat, &unit);
                    unit.leave(&seat);
                    unit.arrive(&seat);
                    (unit, hit)
                });
                return (Response::Complete, hits.collect());
            }
            Function::TargetWarmReset | Function::TargetColdReset => {
                let hits = self.reached().into_iter().map(|(seat, unit)| {
                    let hit = reset(&seat, &unit);
                    (unit, hit)
                });
                return (Response::Complete, hits.collect());
            }
            _ => {}
        }
        let Some((seat, unit)) = lun_number(lun).and_then(|n| self.seat(n)) else {
            return (Response::IncorrectLun, Vec::new());
        };
        let tasks = unit.tasks();
        let own = |tag: Option<u64>| {
            tasks.abort(|s, t| {
                (Rc::ptr_eq(s, &seat) && tag.is_none_or(|tag| tag == t)).then_some(Aborted::Silently)
            })
        };
        let yes_no = |yes| if yes { Response::Succeeded } else { Response::Complete };
        let (response, hit) = match function {
            Function::AbortTask(tag) => {
                let hit = own(Some(tag));
                let none = hit.seats.is_empty();
                (if none { Response::NoSuchTask } else { Response::Complete }, hit)
            }
            Function::AbortTaskSet => (Response::Complete, own(None)),
            Function::ClearTaskSet => (Response::Complete, clear(&seat, &unit)),
            Function::LogicalUnitReset => (Response::Complete, reset(&seat, &unit)),
            Function::QueryTask(tag) => (yes_no(tasks.has(&seat, Some(tag))), Hit::default()),
            Function::QueryTaskSet => (yes_no(tasks.has(&seat, None)), Hit::default()),
            Function::QueryAsynchronousEvent => (yes_no(seat.has_attention()), Hit::default()),
            Function::ClearAca
            | Function::ItNexusReset
            | Function::TargetWarmReset
            | Function::TargetColdReset => (Response::NotSupported, Hit::default()),
        };
        (response, vec![(unit, hit)])
    }

    /// The nexus is lost: logged out, connection gone, guest reset. Its tasks are aborted without answer and its
    /// SCSI-2 reservations end. The future waits until the disk is done with its commands; a session that takes its place must
    /// not begin before, or old writes may land on new ones.
    pub fn lost(&self) -> impl Future<Output = ()> + 'static {
        self.lost.set(true);
        let seats = std::mem::take(&mut *self.seats.borrow_mut());
        let mut hits = Hits::new();
        for (number, seat) in seats {
            if let Some(unit) = self.luns.unit(number) {
                let hit = all_of(&seat, &unit);
                unit.leave(&seat);
                hits.push((unit, hit));
            }
        }
        have_ended(hits)
    }
}

impl Drop for Nexus {
    fn drop(&mut self) {
        if !self.lost.get() {
            drop(self.lost());
        }
    }
}

/// What was aborted, and where.
type Hits = Vec<(Rc<dyn ScsiLun>, Hit)>;

async fn have_ended(hits: Hits) {
    for (unit, hit) in hits {
        unit.tasks().have_ended(&hit, None).await;
    }
}

/// Every task of one nexus.
fn all_of(seat: &Rc<Seat>, unit: &Rc<dyn ScsiLun>) -> Hit {
    unit.tasks().abort(|s, _| Rc::ptr_eq(s, seat).then_some(Aborted::Silently))
}

/// CLEAR TASK SET: everybody's tasks; others learn of it (SAM-5 7.5).
fn clear(seat: &Rc<Seat>, unit: &Rc<dyn ScsiLun>) -> Hit {
    let tells = unit.tells_aborted();
    let hit = unit.tasks().abort(|s, _| {
        let others = !Rc::ptr_eq(s, seat);
        Some(if others && tells { Aborted::WithStatus } else { Aborted::Silently })
    });
    if !tells {
        for other in hit.seats.iter().filter(|s| !Rc::ptr_eq(s, seat)) {
            other.attend(asc::COMMANDS_CLEARED_BY_ANOTHER);
        }
    }
    hit
}

/// LOGICAL UNIT RESET (SAM-5 6.3.3): everybody's tasks, and everybody learns of it.
fn reset(seat: &Rc<Seat>, unit: &Rc<dyn ScsiLun>) -> Hit {
    let tells = unit.tells_aborted();
    let hit = unit.tasks().abort(|s, _| {
        Some(if tells && !Rc::ptr_eq(s, seat) { Aborted::WithStatus } else { Aborted::Silently })
    });
    unit.reset();
    hit
}

/// The number in an eight-byte LUN: peripheral device addressing of bus 0, or flat space addressing, on the first level
/// (SAM-5 4.7).
pub fn lun_number(lun: [u8; 8]) -> Option<u16> {
    if lun[2..] != [0; 6] {
        return None;
    }
    match lun[0] >> 6 {
        0 if lun[0] == 0 => Some(u16::from(lun[1])),
        1 => Some(u16::from_be_bytes([lun[0] & 0x3f, lun[1]])),
        _ => None,
    }
}

/// A number as an eight-byte LUN: peripheral device addressing below 256, flat space addressing from there on.
pub fn lun_bytes(number: u16) -> [u8; 8] {
    let [high, low] = number.to_be_bytes();
    [if number < 256 { 0 } else { 0x40 | high }, low, 0, 0, 0, 0, 0, 0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn luns_sam5_4_7() {
        for number in [0, 1, 255, 256, LUN_MAX] {
            assert_eq!(lun_number(lun_bytes(number)), Some(number));
        }
        assert_eq!(
            lun_number([0x40, 5, 0, 0, 0, 0, 0, 0]),
            Some(5),
            "flat space addressing of a small number"
        );
        assert_eq!(lun_number([1, 0, 0, 0, 0, 0, 0, 0]), None, "another bus");
        assert_eq!(lun_number([0xc1, 1, 0, 0, 0, 0, 0, 0]), None, "well known");
        assert_eq!(lun_number([0, 0, 0, 1, 0, 0, 0, 0]), None, "a second level");
    }
}
