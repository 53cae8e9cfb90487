//! A session in full-feature phase: who it is, its numbers, and what is under way on it. With MaxConnections=1 a
//! session is its one connection.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Instant;

use lane::sync::Waiters;
use scsi::Nexus;
use zerocopy::IntoBytes;

use super::codes::{Reason, event, flag, opcode};
use super::ending::Ending;
use super::format::{AsyncMessage, HEADER_BYTES, NO_TAG, Nop, Reject};
use super::gather::Gather;
use super::name::Name;
use super::negotiate::Parameters;
use super::outgoing::{Outgoing, Stat};
use super::target::Target;
use super::text_exchange::TextExchange;
use crate::credit::Credit;
use crate::pool::Pool;
use crate::wire::Tether;

/// The identity of an initiator port towards a target port: equal ones reinstate each other (RFC 7143 section 6.3.5).
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Identity {
    pub initiator: Name,
    pub isid: [u8; 6],
    /// `None`: a discovery session.
    pub target: Option<Name>,
    pub group: u16,
}

/// Why a session is cut off from outside.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) enum Cut {
    Reinstated,
    Removed,
    Silent,
}

impl From<Cut> for Ending {
    fn from(cut: Cut) -> Self {
        match cut {
            Cut::Reinstated => Self::Reinstated,
            Cut::Removed => Self::Removed,
            Cut::Silent => Self::Silent,
        }
    }
}

/// Immediate requests of one kind and session at once; further ones are rejected. Each kind has its own: commands must not
/// keep out the function that aborts them (RFC 7143 section 4.2.2.1).
const IMMEDIATE_MAX: u32 = 32;

/// What an immediate request is.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Command,
    Function,
}

/// How a request finds its turn.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) enum Turn {
    /// By its CmdSN, in the window.
    Numbered,
    Immediate(Kind),
}

impl Turn {
    /// Of a request whose header says so or not.
    pub fn of(kind: Kind, immediate: bool) -> Self {
        if immediate { Self::Immediate(kind) } else { Self::Numbered }
    }
}

/// The SCSI side of a normal session.
pub(super) struct Scsi {
    pub target: Rc<Target>,
    pub nexus: Rc<Nexus>,
}

/// See the module.
pub(super) struct Session {
    pub identity: Identity,
    pub tsih: u16,
    pub cid: u16,
    pub scsi: Option<Scsi>,
    pub parameters: Parameters,
    /// Longest data segment that the initiator takes now: it may declare another one at any time.
    pub segment_bytes_max: Cell<usize>,
    pub outgoing: Outgoing,
    pub pool: Rc<Pool>,
    pub credit: Rc<Credit>,
    pub tether: Rc<Tether>,
    /// Writes that wait for data, by initiator task tag.
    pub gathers: RefCell<HashMap<u32, Rc<Gather>>>,
    pub text: RefCell<TextExchange>,
    next_transfer_tag: Cell<u32>,
    /// Requests under way, and those of them that are immediate.
    under_way: Cell<u32>,
    immediate: [Cell<u32>; 2],
    idle: Waiters,
    /// Nothing more is taken from the initiator.
    over: Cell<bool>,
    noticed: Waiters,
    /// When the last PDU came.
    pub heard: Cell<Instant>,
    /// A ping of ours that is not answered: since when.
    pub pinged: Cell<Option<Instant>>,
    pub cut: Cell<Option<Cut>>,
}

impl Session {
    /// A number that no transfer uses now.
    pub fn transfer_tag(&self) -> u32 {
        let tag = self.next_transfer_tag.get();
        let next = tag.wrapping_add(1);
        self.next_transfer_tag.set(if next == NO_TAG { 0 } else { next });
        tag
    }

    /// One more request may be under way.
    pub fn has_room(&self, turn: Turn) -> bool {
        match turn {
            Turn::Numbered => true, // the window has bounded them
            Turn::Immediate(kind) => self.immediate[kind as usize].get() < IMMEDIATE_MAX,
        }
    }

    /// Nothing more is taken from the initiator: who waits for its data need not any more.
    pub fn end(&self) {
        self.over.set(true);
        self.noticed.wake_all();
    }

    /// [`Session::end`] was called.
    pub fn is_over(&self) -> bool {
        self.over.get()
    }

    /// Waits for [`Session::end`].
    pub async fn ended(&self) {
        self.noticed.until(|| self.over.get().then_some(())).await
    }

    /// Waits until nothing is under way.
    pub async fn idle(&self) {
        self.idle.until(|| (self.under_way.get() == 0).then_some(())).await
    }

    /// Since when the write waits for data that waits the longest.
    pub fn oldest_gather(&self) -> Option<Instant> {
        self.gathers.borrow().values().map(|gather| gather.heard()).min()
    }

    /// Ends it from outside.
    pub fn cut_off(&self, why: Cut) {
        if self.cut.get().is_none() {
            self.cut.set(Some(why));
        }
        self.tether.cut();
    }

    /// Tells the initiator that a PDU of its was refused, and why (11.17).
    pub fn reject(&self, reason: Reason, head: &[u8; HEADER_BYTES]) {
        let reject = Reject {
            opcode: opcode::REJECT,
            flags: flag::FINAL,
            reason: reason as u8,
            tag: NO_TAG.into(),
            ..Reject::zeroed()
        };
        self.outgoing.push_one(&reject, head.to_vec(), Stat::Takes);
    }

    /// Asks whether somebody is there (11.19).
    pub fn ping(&self) {
        let ping = Nop {
            opcode: opcode::NOP_IN,
            flags: flag::FINAL,
            tag: NO_TAG.into(),
            transfer_tag: self.transfer_tag().into(),
            ..Nop::zeroed()
        };
        self.outgoing.push_one(&ping, Vec::new(), Stat::Shows);
        self.pinged.set(Some(lane::now()));
    }

    /// Asks the initiator to log out within so many seconds (11.9.1).
    pub fn ask_for_logout(&self, seconds: u16) {
        let message =
            AsyncMessage { event: event::LOGOUT_REQUEST, parameter3: seconds.into(), ..Self::message() };
        self.outgoing.push_one(&message, Vec::new(), Stat::Takes);
    }

    /// Tells of a SCSI event: sense data with its length before it (11.9.1).
    pub fn tell_event(&self, lun: [u8; 8], sense: &[u8]) {
        let message = AsyncMessage { event: event::SCSI, lun, ..Self::message() };
        self.outgoing.push_one(&message, with_length(sense), Stat::Takes);
    }

    fn message() -> AsyncMessage {
        AsyncMessage {
            opcode: opcode::ASYNC_MESSAGE,
            flags: flag::FINAL,
            tag: NO_TAG.into(),
            ..AsyncMessage::zeroed()
        }
    }

    /// The start of a session's life.
    #[allow(clippy::too_many_arguments)] // it has that many parts
    pub fn new(
        identity: Identity,
        (tsih, cid): (u16, u16),
        scsi: Option<Scsi>,
        parameters: Parameters,
        outgoing: Outgoing,
        pool: Rc<Pool>,
        credit: Rc<Credit>,
        tether: Rc<Tether>,
    ) -> Rc<Self> {
        Rc::new(Self {
            identity,
            tsih,
            cid,
            scsi,
            segment_bytes_max: Cell::new(parameters.segment_bytes_max),
            parameters,
            outgoing,
            pool,
            credit,
            tether,
            gathers: RefCell::default(),
            text: RefCell::default(),
            next_transfer_tag: Cell::new(1),
            under_way: Cell::new(0),
            immediate: Default::default(),
            idle: Waiters::new(),
            over: Cell::new(false),
            noticed: Waiters::new(),
            heard: Cell::new(lane::now()),
            pinged: Cell::new(None),
            cut: Cell::new(None),
        })
    }
}

/// Sense data as iSCSI carries them: behind their length (11.4.7.2).
pub(super) fn with_length(sense: &[u8]) -> Vec<u8> {
    let length = sense.len().min(usize::from(u16::MAX)) as u16;
    [zerocopy::big_endian::U16::new(length).as_bytes(), &sense[..usize::from(length)]].concat()
}

/// A place in the window of a session, or among its immediate requests, given back when dropped.
pub(super) struct Place {
    session: Rc<Session>,
    turn: Turn,
}

impl Place {
    /// Takes one.
    pub fn take(session: &Rc<Session>, turn: Turn) -> Self {
        session.under_way.set(session.under_way.get() + 1);
        match turn {
            Turn::Immediate(kind) => {
                let count = &session.immediate[kind as usize];
                count.set(count.get() + 1);
            }
            Turn::Numbered => session.outgoing.numbers.enter(),
        }
        Self { session: Rc::clone(session), turn }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let session = &self.session;
        session.under_way.set(session.under_way.get() - 1);
        match self.turn {
            Turn::Immediate(kind) => {
                let count = &session.immediate[kind as usize];
                count.set(count.get() - 1);
            }
            Turn::Numbered => session.outgoing.numbers.leave(),
        }
        if session.under_way.get() == 0 {
            session.idle.wake_all();
        }
    }
}
