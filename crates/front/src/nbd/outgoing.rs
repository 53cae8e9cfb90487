//! Answers on their way to a client: requests put them in a queue as they finish, one task sends whatever is there.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::Range;

use block::{DiskError, Segments};
use lane::sync::Waiters;
use zerocopy::{Immutable, IntoBytes};

use super::ending::Ending;
use crate::credit::Held;
use crate::pool::Pooled;
use crate::request::Request;
use crate::wire::Wire;

/// Answers sent with one system call.
const BATCH_ANSWERS_MAX: usize = 128;
/// A batch is closed when it has at least so many bytes.
const BATCH_BYTES: usize = 1 << 20;
/// The longest fixed part of an answer.
const HEAD_BYTES_MAX: usize = 32;

/// One answer.
pub(crate) struct Answer {
    head: [u8; HEAD_BYTES_MAX],
    head_length: usize,
    tail: Tail,
}

/// What follows the fixed part.
enum Tail {
    Nothing,
    Bytes(Vec<u8>),
    Data(Pooled, Range<usize>),
    Chunks { heads: Vec<u8>, pieces: Vec<Piece>, data: Pooled },
}

/// A part of an answer of several chunks.
pub(crate) enum Piece {
    /// Of the heads.
    Head(Range<usize>),
    /// Of the data.
    Data(Range<usize>),
}

impl Answer {
    /// Only a fixed part.
    pub fn head(head: &(impl IntoBytes + Immutable)) -> Self {
        let bytes = head.as_bytes();
        let mut answer = Self { head: [0; HEAD_BYTES_MAX], head_length: bytes.len(), tail: Tail::Nothing };
        answer.head[..bytes.len()].copy_from_slice(bytes);
        answer
    }

    /// A fixed part and some bytes.
    pub fn bytes(head: &(impl IntoBytes + Immutable), bytes: Vec<u8>) -> Self {
        Self { tail: Tail::Bytes(bytes), ..Self::head(head) }
    }

    /// A fixed part and a part of a buffer.
    pub fn data(head: &(impl IntoBytes + Immutable), data: Pooled, range: Range<usize>) -> Self {
        Self { tail: Tail::Data(data, range), ..Self::head(head) }
    }

    /// Several chunks, in order.
    pub fn chunks(heads: Vec<u8>, pieces: Vec<Piece>, data: Pooled) -> Self {
        Self { head: [0; HEAD_BYTES_MAX], head_length: 0, tail: Tail::Chunks { heads, pieces, data } }
    }

    fn len(&self) -> usize {
        self.head_length
            + match &self.tail {
                Tail::Nothing => 0,
                Tail::Bytes(bytes) => bytes.len(),
                Tail::Data(_, range) => range.len(),
                Tail::Chunks { pieces, .. } => pieces
                    .iter()
                    .map(|piece| match piece {
                        Piece::Head(range) | Piece::Data(range) => range.len(),
                    })
                    .sum(),
            }
    }

    fn gather<'a>(&'a self, into: &mut Vec<&'a [u8]>) {
        into.push(&self.head[..self.head_length]);
        match &self.tail {
            Tail::Nothing => {}
            Tail::Bytes(bytes) => into.push(bytes),
            Tail::Data(data, range) => into.push(&data[range.clone()]),
            Tail::Chunks { heads, pieces, data } => into.extend(pieces.iter().map(|piece| match piece {
                Piece::Head(range) => &heads[range.clone()],
                Piece::Data(range) => &data[range.clone()],
            })),
        }
    }
}

/// The queue of one connection.
#[derive(Default)]
pub(crate) struct Outgoing {
    queue: RefCell<VecDeque<(Answer, Held)>>,
    /// Nothing more will come.
    complete: Cell<bool>,
    /// The client takes nothing any more.
    broken: Cell<bool>,
    filled: Waiters,
}

impl Outgoing {
    /// Answers a request.
    pub fn answer(&self, request: Request, result: Result<(), &DiskError>, answer: Answer, held: Held) {
        if self.broken.get() {
            return request.abandon();
        }
        request.finish(result);
        let mut queue = self.queue.borrow_mut();
        queue.push_back((answer, held));
        if queue.len() == 1 {
            drop(queue);
            self.filled.wake_all();
        }
    }

    /// Nothing more will come: the sender ends when the queue is empty.
    pub fn complete(&self) {
        self.complete.set(true);
        self.filled.wake_all();
    }

    /// Takes what is there, within the bounds of a batch; false at the end.
    async fn next(&self, batch: &mut Vec<(Answer, Held)>) -> bool {
        self.filled.until(|| (!self.queue.borrow().is_empty() || self.complete.get()).then_some(())).await;
        let mut queue = self.queue.borrow_mut();
        let mut bytes = 0;
        while bytes < BATCH_BYTES && batch.len() < BATCH_ANSWERS_MAX {
            let Some(next) = queue.pop_front() else { break };
            bytes += next.0.len();
            batch.push(next);
        }
        !batch.is_empty()
    }

    /// Sends answers until [`Outgoing::complete`] or until the client takes no more.
    pub async fn send_all(&self, wire: &Wire) -> Result<(), Ending> {
        let mut batch = Vec::new();
        while self.next(&mut batch).await {
            let sent = {
                let mut pieces = Vec::with_capacity(2 * batch.len());
                batch.iter().for_each(|(answer, _)| answer.gather(&mut pieces));
                wire.send(&Segments::gather(pieces)).await
            };
            batch.clear();
            if let Err(error) = sent {
                self.broken.set(true);
                self.queue.borrow_mut().clear();
                wire.shut(); // the receiving side must learn it too
                return Err(error.into());
            }
        }
        Ok(())
    }
}
