//! Persistent reservations (SPC-4 clauses 5.12, 6.15, 6.16) as a pure state machine.
//!
//! [`State::apply`] decides, without waiting and without touching anything, what a PERSISTENT RESERVE OUT makes of a
//! state; the caller makes the new state durable (R52) and only then puts it in place.
//!
//! Invariants: no two registrations of one I_T nexus; no registration with key zero; a reservation has a registered
//! holder, or, of the all registrants types, at least one registrant.

mod format;
mod order;
mod report;

pub use format::{Corrupt, Kept, RECORD_BYTES_MAX, SavedModes};
pub(crate) use order::LIST_BYTES_MAX;
pub use order::{Move, Order, Registering};
pub use report::{capabilities, full_status, keys, reservation};

use crate::sense::{Sense, asc};
use crate::transport_id::TransportId;

/// Most registrations of one LUN; more are refused with INSUFFICIENT REGISTRATION RESOURCES.
pub const REGISTRANTS_MAX: usize = 512;

/// Type of a persistent reservation (SPC-4 table 228).
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Kind {
    /// Only the holder writes.
    WriteExclusive = 1,
    /// Only the holder reads and writes.
    ExclusiveAccess = 3,
    /// Only registrants write; one holds it.
    WriteExclusiveRegistrantsOnly = 5,
    /// Only registrants read and write; one holds it.
    ExclusiveAccessRegistrantsOnly = 6,
    /// Only registrants write; all hold it.
    WriteExclusiveAllRegistrants = 7,
    /// Only registrants read and write; all hold it.
    ExclusiveAccessAllRegistrants = 8,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::WriteExclusive,
        Self::ExclusiveAccess,
        Self::WriteExclusiveRegistrantsOnly,
        Self::ExclusiveAccessRegistrantsOnly,
        Self::WriteExclusiveAllRegistrants,
        Self::ExclusiveAccessAllRegistrants,
    ];

    /// The type with this code.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|k| *k as u8 == code)
    }

    /// Every registrant holds it.
    pub const fn all_registrants(self) -> bool {
        matches!(self, Self::WriteExclusiveAllRegistrants | Self::ExclusiveAccessAllRegistrants)
    }

    /// Registrants that do not hold it may do what the holder may.
    pub const fn for_registrants(self) -> bool {
        !matches!(self, Self::WriteExclusive | Self::ExclusiveAccess)
    }

    /// Others may not even read.
    pub const fn exclusive_access(self) -> bool {
        matches!(
            self,
            Self::ExclusiveAccess
                | Self::ExclusiveAccessRegistrantsOnly
                | Self::ExclusiveAccessAllRegistrants
        )
    }
}

/// An I_T nexus by name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ItNexus {
    /// The initiator port.
    pub initiator: TransportId,
    /// Relative target port identifier.
    pub port: u16,
}

/// One registration.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Registrant {
    /// Who.
    pub nexus: ItNexus,
    /// Reservation key, never zero.
    pub key: u64,
    /// Registered through all target ports at once (reported in READ FULL STATUS).
    pub all_ports: bool,
}

/// The reservation there is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Held {
    /// Its type. The scope is always the logical unit.
    pub kind: Kind,
    /// Who holds it; `None` when all registrants do.
    pub holder: Option<ItNexus>,
}

/// What a nexus may do.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Access {
    /// Everything.
    All,
    /// What a write exclusive reservation lets everybody do.
    Reading,
    /// Only what is always allowed.
    Nothing,
}

/// Why an order is refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// RESERVATION CONFLICT.
    Conflict,
    /// CHECK CONDITION.
    Check(Sense),
}

impl From<Sense> for Refusal {
    fn from(sense: Sense) -> Self {
        Self::Check(sense)
    }
}

/// What an order makes of a state.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Effect {
    /// The state to put in place once it is durable.
    pub state: State,
    /// Unit attentions to raise then: who, and which code.
    pub attentions: Vec<(ItNexus, u16)>,
    /// Whose tasks to abort then (PREEMPT AND ABORT).
    pub abort: Vec<ItNexus>,
}

/// Registrations and reservation of a logical unit.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct State {
    /// PRGENERATION.
    pub generation: u32,
    /// Keep all this through a power loss.
    pub aptpl: bool,
    /// Match I_T nexuses by the initiator's name alone, not by its session id (R53).
    pub by_name: bool,
    pub(crate) registrants: Vec<Registrant>,
    pub(crate) held: Option<Held>,
}

impl State {
    /// The registrations.
    pub fn registrants(&self) -> &[Registrant] {
        &self.registrants
    }

    /// The reservation.
    pub fn held(&self) -> Option<&Held> {
        self.held.as_ref()
    }

    fn same(&self, one: &ItNexus, two: &ItNexus) -> bool {
        one.port == two.port
            && if self.by_name {
                one.initiator.same_name(&two.initiator)
            } else {
                one.initiator == two.initiator
            }
    }

    fn find(&self, nexus: &ItNexus) -> Option<&Registrant> {
        self.registrants.iter().find(|r| self.same(&r.nexus, nexus))
    }

    /// This nexus is registered.
    pub fn is_registered(&self, nexus: &ItNexus) -> bool {
        self.find(nexus).is_some()
    }

    /// This nexus holds the reservation, alone or as one of all registrants.
    pub fn holds(&self, nexus: &ItNexus) -> bool {
        self.held.as_ref().is_some_and(|held| match &held.holder {
            Some(holder) => self.same(holder, nexus),
            None => self.is_registered(nexus),
        })
    }

    /// What this nexus may do: SPC-4 table 66 by columns.
    pub fn access(&self, nexus: &ItNexus) -> Access {
        let Some(held) = &self.held else { return Access::All };
        let free = self.holds(nexus) || (held.kind.for_registrants() && self.is_registered(nexus));
        match (free, held.kind.exclusive_access()) {
            (true, _) => Access::All,
            (false, false) => Access::Reading,
            (false, true) => Access::Nothing,
        }
    }

    /// What the order of this nexus makes of the state. `ports` are all target ports the logical unit is reached by.
    pub fn apply(&self, from: &ItNexus, order: &Order, ports: &[u16]) -> Result<Effect, Refusal> {
        let mut work = Working {
            effect: Effect { state: self.clone(), attentions: Vec::new(), abort: Vec::new() },
            from,
        };
        match order {
            Order::Register(registering) => work.register(registering, ports)?,
            Order::Reserve { key, kind } => work.reserve(*key, *kind)?,
            Order::Release { key, kind } => work.release(*key, *kind)?,
            Order::Clear { key } => work.clear(*key)?,
            Order::Preempt { key, victim, kind, abort } => work.preempt(*key, *victim, *kind, *abort)?,
            Order::RegisterAndMove(wanted) => work.register_and_move(wanted, ports)?,
        }
        work.effect.state.check_invariants();
        Ok(work.effect)
    }

    fn check_invariants(&self) {
        debug_assert!(self.registrants.iter().all(|r| r.key != 0));
        debug_assert!(self.registrants.len() <= REGISTRANTS_MAX);
        if let Some(held) = &self.held {
            match &held.holder {
                Some(holder) => debug_assert!(self.is_registered(holder), "the holder is registered"),
                None => debug_assert!(held.kind.all_registrants() && !self.registrants.is_empty()),
            }
        }
    }
}

/// A state that is being changed by an order.
struct Working<'a> {
    effect: Effect,
    from: &'a ItNexus,
}

impl Working<'_> {
    fn state(&self) -> &State {
        &self.effect.state
    }

    /// The nexus must be registered with this key.
    fn must_match(&self, key: u64) -> Result<(), Refusal> {
        match self.state().find(self.from) {
            Some(own) if own.key == key => Ok(()),
            _ => Err(Refusal::Conflict),
        }
    }

    fn next_generation(&mut self) {
        self.effect.state.generation = self.effect.state.generation.wrapping_add(1);
    }

    /// Tells the registrants that `which` names, never the sender.
    fn tell(&mut self, code: u16, which: impl Fn(&Registrant) -> bool) {
        let state = &self.effect.state;
        let told = state.registrants.iter().filter(|r| !state.same(&r.nexus, self.from) && which(r));
        let told: Vec<_> = told.map(|r| (r.nexus.clone(), code)).collect();
        self.effect.attentions.extend(told);
    }

    /// Sets a registration, new or not.
    fn put(&mut self, nexus: &ItNexus, key: u64, all_ports: bool) -> Result<(), Refusal> {
        let state = &mut self.effect.state;
        let by_name = state.by_name;
        let same = |r: &&mut Registrant| {
            r.nexus.port == nexus.port
                && (r.nexus.initiator == nexus.initiator
                    || by_name && r.nexus.initiator.same_name(&nexus.initiator))
        };
        if let Some(found) = state.registrants.iter_mut().find(same) {
            (found.key, found.all_ports) = (key, all_ports);
            return Ok(());
        }
        if state.registrants.len() >= REGISTRANTS_MAX {
            return Err(Sense::illegal(asc::INSUFFICIENT_REGISTRATION_RESOURCES).into());
        }
        state.registrants.push(Registrant { nexus: nexus.clone(), key, all_ports });
        Ok(())
    }

    /// REGISTER and REGISTER AND IGNORE EXISTING KEY (SPC-4 tables 46 and 47).
    fn register(&mut self, wanted: &Registering, ports: &[u16]) -> Result<(), Refusal> {
        let registered = self.state().find(self.from).map(|r| r.key);
        if !wanted.ignore && wanted.key != registered.unwrap_or(0) {
            return Err(Refusal::Conflict);
        }
        if registered.is_some() && wanted.initiators.is_some() {
            return Err(Sense::parameter(20, Some(3)).into());
        }
        match (registered, wanted.new_key) {
            (None, 0) => return Ok(()),
            (Some(_), 0) => self.unregister(),
            (_, key) => {
                let from = self.from.clone();
                let others = wanted.initiators.iter().flatten().cloned();
                for initiator in std::iter::once(from.initiator.clone()).chain(others) {
                    if wanted.all_ports {
                        for port in ports {
                            self.put(&ItNexus { initiator: initiator.clone(), port: *port }, key, true)?;
                        }
                    }
                    let nexus = ItNexus { initiator, port: from.port };
                    self.put(&nexus, key, wanted.all_ports)?;
                }
            }
        }
        self.effect.state.aptpl = wanted.aptpl;
        self.next_generation();
        Ok(())
    }

    /// The sender's registration goes, and the reservation with it where it was the holder's or the last one (5.12.11.2.1).
    fn unregister(&mut self) {
        let from = self.from;
        let held = self.state().held.clone();
        let held_alone = held.as_ref().is_some_and(|h| h.holder.is_some()) && self.state().holds(from);
        let by_name = self.state().by_name;
        self.effect.state.registrants.retain(|r| {
            !(r.nexus.port == from.port
                && (r.nexus.initiator == from.initiator
                    || by_name && r.nexus.initiator.same_name(&from.initiator)))
        });
        let Some(held) = held else { return };
        if held_alone {
            self.effect.state.held = None;
            if held.kind.for_registrants() {
                self.tell(asc::RESERVATIONS_RELEASED, |_| true);
            }
        } else if held.holder.is_none() && self.state().registrants.is_empty() {
            self.effect.state.held = None;
        }
    }

    fn take(&mut self, kind: Kind) {
        let holder = (!kind.all_registrants()).then(|| self.from.clone());
        self.effect.state.held = Some(Held { kind, holder });
    }

    /// RESERVE (5.12.9).
    fn reserve(&mut self, key: u64, kind: Kind) -> Result<(), Refusal> {
        self.must_match(key)?;
        match &self.state().held {
            None => self.take(kind),
            Some(held) if held.kind == kind && self.state().holds(self.from) => {}
            Some(_) => return Err(Refusal::Conflict),
        }
        Ok(())
    }

    /// RELEASE (5.12.11.2.2).
    fn release(&mut self, key: u64, kind: Option<Kind>) -> Result<(), Refusal> {
        self.must_match(key)?;
        let Some(held) = self.state().held.clone() else { return Ok(()) };
        if !self.state().holds(self.from) {
            return Ok(());
        }
        if Some(held.kind) != kind {
            return Err(Sense::illegal(asc::INVALID_RELEASE_OF_PERSISTENT_RESERVATION).into());
        }
        self.effect.state.held = None;
        if held.kind.for_registrants() {
            self.tell(asc::RESERVATIONS_RELEASED, |_| true);
        }
        Ok(())
    }

    /// CLEAR (5.12.11.2.6).
    fn clear(&mut self, key: u64) -> Result<(), Refusal> {
        self.must_match(key)?;
        self.tell(asc::RESERVATIONS_PREEMPTED, |_| true);
        self.effect.state.registrants.clear();
        self.effect.state.held = None;
        self.next_generation();
        Ok(())
    }

    /// PREEMPT and PREEMPT AND ABORT (5.12.11.2.3 to 5.12.11.2.5).
    fn preempt(&mut self, key: u64, victim: u64, kind: Option<Kind>, abort: bool) -> Result<(), Refusal> {
        self.must_match(key)?;
        let held = self.state().held.clone();
        let takes_over = match &held {
            None => false,
            Some(Held { holder: None, .. }) => victim == 0,
            Some(Held { holder: Some(holder), .. }) => {
                self.state().find(holder).is_some_and(|r| r.key == victim)
            }
        };
        if victim == 0 && !takes_over {
            return Err(Sense::parameter(8, None).into());
        }
        // Taking over, the sender keeps its registration whatever its key; else its own key removes it, too.
        let state = self.state();
        let keeps = |r: &Registrant| {
            let own = state.same(&r.nexus, self.from);
            if takes_over { own || (victim != 0 && r.key != victim) } else { r.key != victim }
        };
        let (kept, gone): (Vec<_>, Vec<_>) = state.registrants.iter().cloned().partition(keeps);
        if gone.is_empty() && !takes_over {
            return Err(Refusal::Conflict);
        }
        let new_kind = if takes_over { Some(kind.ok_or(Sense::cdb(2, Some(3)))?) } else { None };
        let others = gone.into_iter().map(|r| r.nexus).filter(|n| !state.same(n, self.from));
        let others: Vec<ItNexus> = others.collect();
        let told = others.iter().map(|n| (n.clone(), asc::REGISTRATIONS_PREEMPTED));
        self.effect.attentions.extend(told);
        if abort {
            self.effect.abort.extend(others);
        }
        self.effect.state.registrants = kept;
        if let Some(kind) = new_kind {
            self.take(kind);
            if held.is_some_and(|h| h.kind != kind) {
                self.tell(asc::RESERVATIONS_RELEASED, |_| true);
            }
        } else if self.state().registrants.is_empty() {
            self.effect.state.held = None;
        }
        self.next_generation();
        Ok(())
    }

    /// REGISTER AND MOVE (5.12.8).
    fn register_and_move(&mut self, wanted: &Move, ports: &[u16]) -> Result<(), Refusal> {
        self.must_match(wanted.key)?;
        let Some(held) = self.state().held.clone() else { return Err(Refusal::Conflict) };
        if held.kind.all_registrants() || !self.state().holds(self.from) {
            return Err(Refusal::Conflict);
        }
        let to = ItNexus { initiator: wanted.initiator.clone(), port: wanted.port };
        if wanted.new_key == 0 {
            return Err(Sense::parameter(8, None).into());
        }
        if !ports.contains(&wanted.port) {
            return Err(Sense::parameter(18, None).into());
        }
        if self.state().same(&to, self.from) {
            return Err(Sense::parameter(24, None).into());
        }
        self.put(&to, wanted.new_key, false)?;
        self.effect.state.held = Some(Held { kind: held.kind, holder: Some(to) });
        if wanted.unregister {
            self.unregister();
        }
        self.effect.state.aptpl = wanted.aptpl;
        self.next_generation();
        Ok(())
    }
}
