//! PDUs on their way to the initiator: numbered as they are queued, sent by one task, many with one system call.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::Range;

use block::Segments;
use lane::sync::Waiters;
use smallvec::SmallVec;
use zerocopy::{Immutable, IntoBytes};

use super::ending::Ending;
use super::format::{DIGEST_BYTES, HEADER_BYTES, length_field, padding};
use crate::credit::Held;
use crate::pool::Pooled;
use crate::wire::Wire;

/// Answers sent with one system call.
const BATCH_ANSWERS_MAX: usize = 128;
/// A batch is closed when it has at least so many bytes.
const BATCH_BYTES: usize = 1 << 20;
/// With so many answers waiting nothing more is taken from the initiator.
const WAITING_MAX: usize = 512;
/// The same for bytes that belong to no credit (texts, pings, sense).
const WAITING_BYTES_MAX: usize = 1 << 20;

/// Command and status numbers of a connection (RFC 7143 section 4.2.2), which every PDU of ours carries.
pub(super) struct Numbers {
    stat_sn: Cell<u32>,
    exp_cmd_sn: Cell<u32>,
    /// Commands that took their place in the window and are not answered.
    outstanding: Cell<u32>,
    window: u32,
}

/// What a PDU has to do with StatSN.
#[derive(Copy, Clone, PartialEq, Eq)]
pub(super) enum Stat {
    /// Takes the next one.
    Takes,
    /// Shows the next one.
    Shows,
    /// The field is reserved.
    Reserved,
}

/// Where a CmdSN stands.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) enum Order {
    /// It is the one that is expected.
    Next,
    /// It is in the window, and others are missing before it.
    Early,
    /// It is outside of the window: a duplicate, or what was not allowed.
    Outside,
}

impl Numbers {
    /// `cmd_sn`: of the first command. `window`: commands at once.
    pub fn new(stat_sn: u32, cmd_sn: u32, window: u32) -> Self {
        Self { stat_sn: Cell::new(stat_sn), exp_cmd_sn: Cell::new(cmd_sn), outstanding: Cell::new(0), window }
    }

    /// The last CmdSN that is allowed. It never goes back: who takes a place moves ExpCmdSN on by as much.
    pub fn max_cmd_sn(&self) -> u32 {
        let free = self.window - self.outstanding.get();
        self.exp_cmd_sn.get().wrapping_add(free).wrapping_sub(1)
    }

    /// Judges a CmdSN by serial number arithmetic (RFC 1982).
    pub fn judge(&self, cmd_sn: u32) -> Order {
        let ahead = cmd_sn.wrapping_sub(self.exp_cmd_sn.get());
        let allowed = self.window - self.outstanding.get();
        match ahead {
            _ if ahead >= allowed => Order::Outside,
            0 => Order::Next,
            _ => Order::Early,
        }
    }

    /// The expected command has come.
    pub fn advance(&self) {
        self.exp_cmd_sn.set(self.exp_cmd_sn.get().wrapping_add(1));
    }

    /// A command takes a place in the window until [`Numbers::leave`].
    pub fn enter(&self) {
        self.outstanding.set(self.outstanding.get() + 1);
    }

    /// See [`Numbers::enter`].
    pub fn leave(&self) {
        self.outstanding.set(self.outstanding.get() - 1);
    }

    /// A CmdSN that is in the window, before `before` (11.6.1: for ABORT TASK of what never came).
    pub fn is_awaited(&self, cmd_sn: u32, before: u32) -> bool {
        self.judge(cmd_sn) != Order::Outside && (before.wrapping_sub(cmd_sn) as i32) > 0
    }

    /// Fills in the numbers of a header; all of ours have them at the same place.
    fn stamp(&self, head: &mut [u8; HEADER_BYTES], stat: Stat) {
        let number = self.stat_sn.get();
        if stat != Stat::Reserved {
            head[24..28].copy_from_slice(&number.to_be_bytes());
        }
        if stat == Stat::Takes {
            self.stat_sn.set(number.wrapping_add(1));
        }
        head[28..32].copy_from_slice(&self.exp_cmd_sn.get().to_be_bytes());
        head[32..36].copy_from_slice(&self.max_cmd_sn().to_be_bytes());
    }
}

/// The data that the PDUs of an answer share.
pub(super) enum Payload {
    /// None.
    Nothing,
    /// Few.
    Bytes(Vec<u8>),
    /// What a disk was read into.
    Pooled(Pooled),
}

impl Payload {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Nothing => &[],
            Self::Bytes(bytes) => bytes,
            Self::Pooled(pooled) => pooled,
        }
    }
}

/// One PDU: its header with digest, where its data are, padding and their digest.
struct Ready {
    head: [u8; HEADER_BYTES + DIGEST_BYTES],
    head_length: u8,
    data: Range<usize>,
    tail: [u8; 2 * DIGEST_BYTES],
    tail_length: u8,
}

/// PDUs that leave together, and what they hold.
pub(super) struct Answer {
    pdus: SmallVec<[Ready; 1]>,
    payload: Payload,
    held: Option<Held>,
}

/// The queue of one connection.
pub(super) struct Outgoing {
    pub numbers: Numbers,
    header_digest: bool,
    data_digest: bool,
    queue: RefCell<VecDeque<Answer>>,
    /// Bytes in the queue that no credit bounds.
    loose_bytes: Cell<usize>,
    /// Nothing more will come.
    complete: Cell<bool>,
    /// The initiator takes nothing any more.
    broken: Cell<bool>,
    filled: Waiters,
    emptied: Waiters,
}

impl Outgoing {
    /// Nothing waits.
    pub fn new(numbers: Numbers, header_digest: bool, data_digest: bool) -> Self {
        Self {
            numbers,
            header_digest,
            data_digest,
            queue: RefCell::default(),
            loose_bytes: Cell::new(0),
            complete: Cell::new(false),
            broken: Cell::new(false),
            filled: Waiters::new(),
            emptied: Waiters::new(),
        }
    }

    /// An answer to be filled.
    pub fn answer(payload: Payload, held: Option<Held>) -> Answer {
        Answer { pdus: SmallVec::new(), payload, held }
    }

    /// Adds a PDU with a part of the payload. Numbers are given now: the answer must be queued next.
    pub fn add(
        &self,
        answer: &mut Answer,
        head: &(impl IntoBytes + Immutable),
        data: Range<usize>,
        stat: Stat,
    ) {
        let mut ready = Ready {
            head: [0; HEADER_BYTES + DIGEST_BYTES],
            head_length: HEADER_BYTES as u8,
            data,
            tail: [0; 2 * DIGEST_BYTES],
            tail_length: 0,
        };
        let mut bytes = [0; HEADER_BYTES];
        bytes.copy_from_slice(head.as_bytes());
        bytes[5..8].copy_from_slice(&length_field(ready.data.len()));
        self.numbers.stamp(&mut bytes, stat);
        ready.head[..HEADER_BYTES].copy_from_slice(&bytes);
        if self.header_digest {
            ready.head[HEADER_BYTES..].copy_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
            ready.head_length += DIGEST_BYTES as u8;
        }
        let pad = padding(ready.data.len());
        ready.tail_length = pad as u8;
        if self.data_digest && !ready.data.is_empty() {
            let sum = crc32c::crc32c(&answer.payload.bytes()[ready.data.clone()]);
            let sum = crc32c::crc32c_append(sum, &ready.tail[..pad]);
            ready.tail[pad..pad + DIGEST_BYTES].copy_from_slice(&sum.to_le_bytes());
            ready.tail_length += DIGEST_BYTES as u8;
        }
        answer.pdus.push(ready);
    }

    /// Queues an answer.
    pub fn push(&self, answer: Answer) {
        if self.broken.get() {
            return;
        }
        self.loose_bytes.set(self.loose_bytes.get() + answer.loose_bytes());
        let mut queue = self.queue.borrow_mut();
        queue.push_back(answer);
        if queue.len() == 1 {
            drop(queue);
            self.filled.wake_all();
        }
    }

    /// Queues an answer of one PDU.
    pub fn push_one(&self, head: &(impl IntoBytes + Immutable), data: Vec<u8>, stat: Stat) {
        let whole = 0..data.len();
        let payload = if data.is_empty() { Payload::Nothing } else { Payload::Bytes(data) };
        let mut answer = Self::answer(payload, None);
        self.add(&mut answer, head, whole, stat);
        self.push(answer);
    }

    /// Waits until the initiator has taken enough of its answers.
    pub async fn room(&self) {
        let has_room = || {
            let few = self.queue.borrow().len() < WAITING_MAX && self.loose_bytes.get() < WAITING_BYTES_MAX;
            (few || self.broken.get()).then_some(())
        };
        self.emptied.until(has_room).await
    }

    /// Nothing more will come: the sender ends when the queue is empty.
    pub fn complete(&self) {
        self.complete.set(true);
        self.filled.wake_all();
    }

    /// Takes what is there, within the bounds of a batch; false at the end.
    async fn next(&self, batch: &mut Vec<Answer>) -> bool {
        self.filled.until(|| (!self.queue.borrow().is_empty() || self.complete.get()).then_some(())).await;
        let mut queue = self.queue.borrow_mut();
        let mut bytes = 0;
        while bytes < BATCH_BYTES && batch.len() < BATCH_ANSWERS_MAX {
            let Some(next) = queue.pop_front() else { break };
            bytes += next.len();
            self.loose_bytes.set(self.loose_bytes.get() - next.loose_bytes());
            batch.push(next);
        }
        !batch.is_empty()
    }

    /// Sends answers until [`Outgoing::complete`] or until the initiator takes no more.
    pub async fn send_all(&self, wire: &Wire) -> Result<(), Ending> {
        let mut batch = Vec::new();
        while self.next(&mut batch).await {
            let sent = {
                let mut pieces = Vec::with_capacity(3 * batch.len());
                batch.iter().for_each(|answer| answer.gather(&mut pieces));
                wire.send(&Segments::gather(pieces)).await
            };
            batch.clear();
            if let Err(error) = sent {
                self.broken.set(true);
                self.queue.borrow_mut().clear();
                self.emptied.wake_all();
                wire.shut(); // the receiving side must learn it too
                return Err(error.into());
            }
            self.emptied.wake_all();
        }
        Ok(())
    }
}

impl Answer {
    fn len(&self) -> usize {
        self.pdus.iter().map(|pdu| HEADER_BYTES + pdu.data.len()).sum()
    }

    fn loose_bytes(&self) -> usize {
        match (&self.held, &self.payload) {
            (None, Payload::Bytes(bytes)) => bytes.len(),
            _ => 0,
        }
    }

    fn gather<'a>(&'a self, into: &mut Vec<&'a [u8]>) {
        for pdu in &self.pdus {
            into.push(&pdu.head[..usize::from(pdu.head_length)]);
            if !pdu.data.is_empty() {
                into.push(&self.payload.bytes()[pdu.data.clone()]);
            }
            if pdu.tail_length > 0 {
                into.push(&pdu.tail[..usize::from(pdu.tail_length)]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_moves_with_the_commands() {
        let numbers = Numbers::new(1, u32::MAX - 1, 4);
        assert_eq!(numbers.max_cmd_sn(), 1); // over the wrap
        assert_eq!(numbers.judge(u32::MAX - 1), Order::Next);
        assert_eq!(numbers.judge(u32::MAX), Order::Early);
        assert_eq!(numbers.judge(1), Order::Early);
        assert_eq!(numbers.judge(2), Order::Outside);
        assert_eq!(numbers.judge(u32::MAX - 2), Order::Outside);
        for _ in 0..4 {
            numbers.enter();
            numbers.advance();
            assert_eq!(numbers.max_cmd_sn(), 1, "no place is given twice");
        }
        assert_eq!(numbers.judge(2), Order::Outside, "the window is closed");
        numbers.leave();
        assert_eq!(numbers.max_cmd_sn(), 2);
        assert_eq!(numbers.judge(2), Order::Next);
        assert!(numbers.is_awaited(2, 3) && !numbers.is_awaited(1, 3) && !numbers.is_awaited(2, 2));
    }

    #[test]
    fn numbers_digests_and_padding() {
        let outgoing = Outgoing::new(Numbers::new(7, 3, 4), true, true);
        let mut answer = Outgoing::answer(Payload::Bytes(vec![1, 2, 3, 4, 5]), None);
        outgoing.add(&mut answer, &[0u8; HEADER_BYTES], 0..5, Stat::Takes);
        outgoing.add(&mut answer, &[0u8; HEADER_BYTES], 0..0, Stat::Shows);
        let mut pieces = Vec::new();
        answer.gather(&mut pieces);
        let lengths: Vec<_> = pieces.iter().map(|piece| piece.len()).collect();
        assert_eq!(lengths, [52, 5, 7, 52]);
        assert_eq!(pieces[0][5..8], [0, 0, 5]);
        assert_eq!((&pieces[0][24..28], &pieces[3][24..28]), (&[0, 0, 0, 7][..], &[0, 0, 0, 8][..]));
        assert_eq!(pieces[0][28..36], [0, 0, 0, 3, 0, 0, 0, 6]);
        assert_eq!(pieces[0][48..], crc32c::crc32c(&pieces[0][..48]).to_le_bytes());
        assert_eq!(pieces[2][3..], crc32c::crc32c(&[1, 2, 3, 4, 5, 0, 0, 0]).to_le_bytes());
    }
}
