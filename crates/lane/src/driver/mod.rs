//! What a lane needs from the kernel, by io_uring ([`ring`]) or by system calls on threads ([`threads`]).

mod held;
mod patience;
mod ring;
mod threads;

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use crate::arena::Arena;
use crate::executor::{Mailbox, Options};
use crate::op::Op;

/// Which driver a lane uses.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub enum DriverKind {
    /// What the environment variable `KAGAMI_LANE` names (`ring` or `threads`), else io_uring where the kernel lets us,
    /// else threads.
    #[default]
    Auto,
    /// io_uring; threads where the kernel refuses it (logged).
    Ring,
    /// `preadv2` and relatives on worker threads.
    Threads,
    /// Everything simulated in memory, in an order drawn from the seed. Time is virtual.
    Sim {
        /// Draws everything.
        seed: u64,
    },
}

/// What carries the I/O of a lane.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct InUse {
    /// `io_uring`, `threads` or `sim`.
    pub engine: &'static str,
    /// Buffers of this lane are registered with the kernel.
    pub registered: bool,
}

/// How long a turn may wait for something to happen.
#[derive(Copy, Clone, Debug)]
pub(crate) enum Wait {
    No,
    For(Duration),
    Forever,
}

pub(crate) enum Driver {
    /// Nothing was asked of the kernel yet: many a lane never does, and a ring is dear to make and to end.
    Idle(Idle),
    Ring(Box<ring::Ring>),
    Threads(threads::Threads),
    /// Simulated operations never come here; the bell alone is real.
    Sim(threads::Threads),
}

/// See [`Driver::Idle`].
pub(crate) struct Idle {
    /// Waits for the bell.
    bell: threads::Threads,
    registered_bytes: usize,
    lane: String,
}

impl Driver {
    pub(crate) fn new(options: &Options) -> Self {
        let bell = threads::Threads::new();
        let kind = match options.driver {
            DriverKind::Auto => from_environment(),
            kind => kind,
        };
        match kind {
            DriverKind::Sim { .. } => Driver::Sim(bell),
            DriverKind::Threads => Driver::Threads(bell),
            DriverKind::Auto | DriverKind::Ring => {
                let (registered_bytes, lane) = (options.registered_bytes, options.name.clone());
                Driver::Idle(Idle { bell, registered_bytes, lane })
            }
        }
    }

    /// Something is asked of the kernel for the first time: makes the ring, or finds that there can be none.
    #[cold]
    fn begin(&mut self, mailbox: &Arc<Mailbox>) {
        let Driver::Idle(Idle { registered_bytes, lane, .. }) = self else { return };
        *self = match ring::Ring::new(*registered_bytes, mailbox) {
            Ok(ring) => Driver::Ring(Box::new(ring)),
            Err(error) => {
                tracing::warn!(%error, %lane, "io_uring is refused: using threads");
                Driver::Threads(threads::Threads::new())
            }
        };
    }

    pub(crate) fn in_use(&mut self, mailbox: &Arc<Mailbox>) -> InUse {
        self.begin(mailbox);
        match self {
            Driver::Idle(_) => InUse { engine: "none", registered: false },
            Driver::Ring(ring) => InUse { engine: "io_uring", registered: ring.arena().is_some() },
            Driver::Threads(_) => InUse { engine: "threads", registered: false },
            Driver::Sim(_) => InUse { engine: "sim", registered: false },
        }
    }

    /// Takes an operation; answers at once where it could be done without waiting.
    #[inline]
    pub(crate) fn submit(&mut self, key: u32, op: &Op, mailbox: &Arc<Mailbox>) -> Option<i32> {
        match self {
            Driver::Ring(ring) => {
                ring.submit(key, op);
                None
            }
            Driver::Idle(_) => {
                self.begin(mailbox);
                self.submit(key, op, mailbox)
            }
            Driver::Threads(threads) | Driver::Sim(threads) => threads.submit(key, op, mailbox),
        }
    }

    /// Hands over what is new, collects results into `done`, and waits as told when there is none.
    #[inline]
    pub(crate) fn turn(&mut self, wait: Wait, mailbox: &Arc<Mailbox>, done: &mut Vec<(u32, i32)>) {
        match self {
            Driver::Ring(ring) => ring.turn(wait, done),
            Driver::Idle(Idle { bell: threads, .. }) | Driver::Threads(threads) | Driver::Sim(threads) => {
                threads.turn(wait, mailbox, done);
            }
        }
    }

    /// Asks to end a socket operation early; its result still comes.
    pub(crate) fn cancel(&mut self, key: u32) {
        match self {
            Driver::Ring(ring) => ring.cancel(key),
            Driver::Threads(threads) | Driver::Sim(threads) => threads.cancel(key),
            Driver::Idle(_) => {}
        }
    }

    /// A file was opened: the kernel is told to keep it at hand. The first direct one is the time to pin memory.
    pub(crate) fn adopt_file(&mut self, fd: RawFd, direct: bool, mailbox: &Arc<Mailbox>) {
        self.begin(mailbox);
        if let Driver::Ring(ring) = self {
            ring.adopt_file(fd);
            if direct {
                ring.register_memory();
            }
        }
    }

    /// An adopted file is about to be closed.
    pub(crate) fn release_file(&mut self, fd: RawFd) {
        if let Driver::Ring(ring) = self {
            ring.release_file(fd);
        }
    }

    /// Registered memory that buffers are taken from.
    pub(crate) fn arena(&self) -> Option<&Arc<Arena>> {
        match self {
            Driver::Ring(ring) => ring.arena(),
            Driver::Idle(_) | Driver::Threads(_) | Driver::Sim(_) => None,
        }
    }

    /// Nothing is under way any more: gives everything back to the kernel.
    pub(crate) fn close(&mut self) {
        if let Driver::Ring(ring) = self {
            ring.close();
        }
    }
}

fn from_environment() -> DriverKind {
    match std::env::var("KAGAMI_LANE").as_deref() {
        Ok("threads") => DriverKind::Threads,
        Ok("ring") | Err(_) => DriverKind::Ring,
        Ok(other) => {
            tracing::warn!(value = other, "KAGAMI_LANE is neither `ring` nor `threads`: ignored");
            DriverKind::Ring
        }
    }
}
