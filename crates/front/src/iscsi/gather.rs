//! Data on their way to us: unsolicited data as the initiator likes, the rest as it is asked for by R2T (RFC 7143
//! sections 4.2.5.2, 11.7 and 11.8). Everything lands in the buffer from which the disk is written.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::time::Instant;

use lane::sync::Waiters;

use super::codes::{flag, opcode};
use super::format::{DataOut, NO_TAG, ReadyToTransfer};
use super::outgoing::Stat;
use super::session::Session;
use crate::pool::Pooled;

/// What went wrong with the data of a command. It is told as sense data once all data have come (7.8, 7.10).
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) enum Spoilt {
    /// A digest did not match, or a PDU is missing: "protocol service CRC error" (47h/05h).
    Digest,
    /// Data that were not asked for: "unexpected unsolicited data" (0Ch/0Ch).
    Unsolicited,
    /// More or less data than the PDUs said: "incorrect amount of data" (0Ch/0Dh).
    Amount,
}

/// A stretch of data that comes in one sequence of Data-Out PDUs.
struct Sequence {
    /// [`NO_TAG`] for unsolicited data.
    transfer_tag: u32,
    /// Offset of the next PDU, in bytes.
    at: usize,
    /// Offset behind the last byte.
    end: usize,
    data_sn: u32,
}

/// A write whose data are not all there.
pub(super) struct Gather {
    /// Bytes that the command wants; what comes beyond is passed over.
    wanted: usize,
    /// Where the data go; taken out while a PDU is received.
    buffer: RefCell<Option<Pooled>>,
    open: RefCell<VecDeque<Sequence>>,
    /// Up to here data were received or asked for.
    asked: Cell<usize>,
    r2t_sn: Cell<u32>,
    spoilt: Cell<Option<Spoilt>>,
    /// When something came or was asked for.
    heard: Cell<Instant>,
    /// Something came.
    changed: Waiters,
}

/// Where the data of a Data-Out PDU go.
pub(super) struct Landing {
    /// Offset in the buffer.
    pub at: usize,
    /// Bytes that fit there.
    pub length: usize,
}

impl Gather {
    /// `immediate` bytes are in `buffer` already. `unsolicited`: offset behind the last byte that may come without
    /// being asked for; `None` when no unsolicited Data-Out PDUs follow.
    pub fn new(wanted: usize, buffer: Option<Pooled>, immediate: usize, unsolicited: Option<usize>) -> Self {
        let mut open = VecDeque::new();
        if let Some(end) = unsolicited {
            open.push_back(Sequence { transfer_tag: NO_TAG, at: immediate, end, data_sn: 0 });
        }
        Self {
            wanted,
            buffer: RefCell::new(buffer),
            open: RefCell::new(open),
            asked: Cell::new(immediate),
            r2t_sn: Cell::new(0),
            spoilt: Cell::new(None),
            heard: Cell::new(lane::now()),
            changed: Waiters::new(),
        }
    }

    /// Something is wrong with the data; the first fault counts.
    pub fn spoil(&self, how: Spoilt) {
        if self.spoilt.get().is_none() {
            self.spoilt.set(Some(how));
        }
    }

    /// When something came or was asked for.
    pub fn heard(&self) -> Instant {
        self.heard.get()
    }

    /// What is wrong with the data.
    pub fn spoilt(&self) -> Option<Spoilt> {
        self.spoilt.get()
    }

    /// Number of R2Ts sent.
    pub fn r2ts(&self) -> u32 {
        self.r2t_sn.get()
    }

    /// Bytes that came or were asked for.
    pub fn asked(&self) -> usize {
        self.asked.get()
    }

    /// Bytes that the buffer has room for.
    pub fn room(&self) -> usize {
        self.buffer.borrow().as_ref().map_or(0, |buffer| buffer.len())
    }

    /// Goes on in another buffer, which holds what the old one held.
    pub fn move_into(&self, mut larger: Pooled) {
        let mut buffer = self.buffer.borrow_mut();
        if let Some(old) = &*buffer {
            let there = old.len().min(self.asked.get());
            larger[..there].copy_from_slice(&old[..there]);
        }
        *buffer = Some(larger);
    }

    /// Takes the buffer out: to receive into it, or for good.
    pub fn take_buffer(&self) -> Option<Pooled> {
        self.buffer.borrow_mut().take()
    }

    /// Puts the buffer back.
    pub fn put_buffer(&self, buffer: Option<Pooled>) {
        *self.buffer.borrow_mut() = buffer;
    }

    /// Begins with a Data-Out PDU of `length` bytes: where its data go. Its numbers are checked; data of a PDU that
    /// is wrong go nowhere.
    pub fn begin(&self, head: &DataOut, length: usize) -> Landing {
        const NOWHERE: Landing = Landing { at: 0, length: 0 };
        let mut open = self.open.borrow_mut();
        let tag = head.transfer_tag.get();
        let Some(sequence) = open.iter_mut().find(|sequence| sequence.transfer_tag == tag) else {
            self.spoil(Spoilt::Unsolicited);
            return NOWHERE;
        };
        let offset = head.offset.get() as usize;
        if head.data_sn.get() != sequence.data_sn || offset != sequence.at {
            self.spoil(Spoilt::Digest); // a PDU is missing, or comes twice
            return NOWHERE;
        }
        if length > sequence.end - sequence.at {
            self.spoil(Spoilt::Amount);
            return NOWHERE;
        }
        sequence.data_sn = sequence.data_sn.wrapping_add(1);
        sequence.at += length;
        if tag == NO_TAG {
            self.asked.set(sequence.at);
        }
        Landing { at: offset, length: self.wanted.saturating_sub(offset).min(length) }
    }

    /// Ends with the PDU that [`Gather::begin`] was asked about; its data are in the buffer.
    pub fn end(&self, head: &DataOut) {
        if head.flags & flag::FINAL != 0 {
            let mut open = self.open.borrow_mut();
            let tag = head.transfer_tag.get();
            if let Some(place) = open.iter().position(|sequence| sequence.transfer_tag == tag)
                && let Some(sequence) = open.remove(place)
                && tag != NO_TAG
                && sequence.at != sequence.end
            {
                self.spoil(Spoilt::Amount); // an R2T is answered in full (11.8.4)
            }
        }
        self.heard.set(lane::now());
        self.changed.wake_all();
    }

    /// Waits until everything that the initiator may send unasked has come.
    pub async fn unsolicited(&self) {
        let is_open = || self.open.borrow().iter().any(|sequence| sequence.transfer_tag == NO_TAG);
        self.changed.until(|| (!is_open()).then_some(())).await
    }

    /// Asks for the rest, as many R2Ts at once as were agreed, and waits until it is there. With spoilt data only
    /// what was asked for already is waited for.
    pub async fn solicit(&self, session: &Session, tag: u32, lun: [u8; 8]) {
        loop {
            let limit = session.parameters.outstanding_r2t;
            while self.spoilt.get().is_none()
                && self.asked.get() < self.wanted
                && self.open.borrow().len() < limit
            {
                self.ask(session, tag, lun);
            }
            let open = self.open.borrow().len();
            if open == 0 {
                return;
            }
            self.changed.until(|| (self.open.borrow().len() < open).then_some(())).await;
        }
    }

    fn ask(&self, session: &Session, tag: u32, lun: [u8; 8]) {
        let at = self.asked.get();
        let length = (self.wanted - at).min(session.parameters.max_burst);
        let transfer_tag = session.transfer_tag();
        let r2t = ReadyToTransfer {
            opcode: opcode::R2T,
            flags: flag::FINAL,
            lun,
            tag: tag.into(),
            transfer_tag: transfer_tag.into(),
            r2t_sn: self.r2t_sn.get().into(),
            // `wanted` is at most the expected length, which has 32 bits.
            offset: (at as u32).into(),
            length: (length as u32).into(),
            ..ReadyToTransfer::zeroed()
        };
        session.outgoing.push_one(&r2t, Vec::new(), Stat::Shows);
        self.heard.set(lane::now());
        self.r2t_sn.set(self.r2t_sn.get() + 1);
        self.asked.set(at + length);
        self.open.borrow_mut().push_back(Sequence { transfer_tag, at, end: at + length, data_sn: 0 });
    }
}
