//! Operations that a driver carries out, and the slab of those under way.
//!
//! An [`Operation`] is a future. The driver gets it at its first poll together with a key; the result comes back
//! under that key. Until then the kernel may use the memory that the operation names. So it must not be dropped: a
//! file operation that is dropped under way aborts the process, a socket operation is cancelled and waited for.
#![allow(unsafe_code)] // raw pieces of memory handed to the kernel; each use has its reason

use std::future::Future;
use std::io;
use std::marker::PhantomPinned;
use std::os::fd::RawFd;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use slab::Slab;

use crate::executor::Lane;

/// Most pieces that the kernel takes at once (`UIO_MAXIOV`).
const PIECES_MAX: usize = 1024;

/// A list of pieces of memory, valid as long as the operation is under way.
#[derive(Copy, Clone)]
pub(crate) struct Pieces {
    pub list: *const libc::iovec,
    pub count: u32,
}

impl Pieces {
    pub(crate) fn of(iovecs: &[libc::iovec]) -> Self {
        Self { list: iovecs.as_ptr(), count: iovecs.len().min(PIECES_MAX) as u32 }
    }
}

/// What is asked of the kernel.
#[derive(Copy, Clone)]
pub(crate) enum Op {
    /// `preadv2`; `cached` says that the page cache may have it, so that an attempt without waiting makes sense.
    Read { fd: RawFd, at: u64, into: Pieces, cached: bool },
    /// `pwritev2`, with RWF_DSYNC when `durable`.
    Write { fd: RawFd, at: u64, from: Pieces, durable: bool },
    /// `fdatasync`.
    SyncData { fd: RawFd },
    /// `fallocate`.
    Allocate { fd: RawFd, mode: i32, at: u64, length: u64 },
    /// `accept4` with CLOEXEC.
    Accept { fd: RawFd },
    /// `recvmsg`; the message names the pieces again and lives as long.
    Receive { fd: RawFd, into: Pieces, message: *mut libc::msghdr },
    /// `sendmsg` with NOSIGNAL.
    Send { fd: RawFd, from: Pieces, message: *mut libc::msghdr },
    /// `poll`: answers the events that are there.
    Poll { fd: RawFd, events: i16 },
}

/// A message of these pieces, for [`Op::Receive`] and [`Op::Send`].
pub(crate) fn message(pieces: Pieces) -> libc::msghdr {
    // SAFETY: a msghdr of zeroes is a valid, empty one.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.list.cast_mut();
    message.msg_iovlen = pieces.count as usize;
    message
}

impl Op {
    /// May wait for a peer for ever, and can be taken back.
    pub(crate) fn is_socket(&self) -> bool {
        match self {
            Op::Accept { .. } | Op::Receive { .. } | Op::Send { .. } | Op::Poll { .. } => true,
            Op::Read { .. } | Op::Write { .. } | Op::SyncData { .. } | Op::Allocate { .. } => false,
        }
    }
}

struct Entry {
    socket: bool,
    result: Option<i32>,
    waker: Option<Waker>,
}

/// The operations under way on a lane.
#[derive(Default)]
pub(crate) struct Ops {
    entries: Slab<Entry>,
    under_way: usize,
    done_list: Vec<(u32, i32)>,
}

impl Ops {
    /// How many the driver still has.
    pub(crate) fn under_way(&self) -> usize {
        self.under_way
    }

    pub(crate) fn is_done(&self, key: u32) -> bool {
        self.entries.get(key as usize).is_none_or(|e| e.result.is_some())
    }

    /// Keys of the socket operations under way.
    pub(crate) fn cancellable(&self) -> Vec<u32> {
        let open = self.entries.iter().filter(|(_, e)| e.socket && e.result.is_none());
        open.map(|(key, _)| key as u32).collect()
    }

    /// Notes the result: at least 0, or a negated errno. The waker is for the caller to wake.
    #[inline]
    pub(crate) fn complete(&mut self, key: u32, result: i32) -> Option<Waker> {
        let entry = self.entries.get_mut(key as usize)?;
        debug_assert!(entry.result.is_none(), "an operation ends once");
        entry.result = Some(result);
        self.under_way -= 1;
        entry.waker.take()
    }

    /// The list in which a driver collects results, so that its memory is used again.
    pub(crate) fn take_done_list(&mut self) -> Vec<(u32, i32)> {
        std::mem::take(&mut self.done_list)
    }

    pub(crate) fn give_done_list(&mut self, list: Vec<(u32, i32)>) {
        self.done_list = list;
    }
}

enum State {
    New,
    UnderWay { lane: u64, key: u32 },
    Over,
}

/// An operation as a future; answers what the system call would.
pub(crate) struct Operation {
    op: Op,
    state: State,
    _pinned: PhantomPinned,
}

impl Operation {
    /// # Safety
    /// The memory that `op` names stays valid (and writable where it is read into) until the operation is over or
    /// dropped.
    #[inline]
    pub(crate) unsafe fn new(op: Op) -> Self {
        Self { op, state: State::New, _pinned: PhantomPinned }
    }

    fn begin(&mut self, lane: &Lane, waker: &Waker) -> Poll<io::Result<u32>> {
        lane.count(|c| c.operations += 1);
        let key = {
            let mut ops = lane.ops.borrow_mut();
            ops.under_way += 1;
            let entry = Entry { socket: self.op.is_socket(), result: None, waker: Some(waker.clone()) };
            ops.entries.insert(entry) as u32
        };
        let now = lane.driver.borrow_mut().submit(key, &self.op, &lane.mailbox);
        match now {
            Some(result) => {
                let mut ops = lane.ops.borrow_mut();
                ops.entries.remove(key as usize);
                ops.under_way -= 1;
                self.state = State::Over;
                Poll::Ready(outcome(result))
            }
            None => {
                self.state = State::UnderWay { lane: lane.serial, key };
                Poll::Pending
            }
        }
    }
}

fn outcome(result: i32) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(result.wrapping_neg()))
}

impl Future for Operation {
    type Output = io::Result<u32>;
    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // SAFETY: nothing is moved out of the pinned value.
        let this = unsafe { self.get_unchecked_mut() };
        Lane::with(|lane| match this.state {
            State::New => this.begin(lane, cx.waker()),
            State::UnderWay { lane: serial, key } if serial == lane.serial => {
                let mut ops = lane.ops.borrow_mut();
                let entry = &mut ops.entries[key as usize];
                match entry.result {
                    Some(result) => {
                        let waker = ops.entries.remove(key as usize).waker;
                        drop(ops);
                        drop(waker);
                        this.state = State::Over;
                        Poll::Ready(outcome(result))
                    }
                    None => {
                        let before = entry.waker.replace(cx.waker().clone());
                        drop(ops);
                        drop(before);
                        Poll::Pending
                    }
                }
            }
            // Its lane has ended, and with it the operation.
            State::UnderWay { .. } => {
                this.state = State::Over;
                Poll::Ready(Err(io::ErrorKind::Interrupted.into()))
            }
            State::Over => panic!("an operation is over once it has answered"),
        })
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        let State::UnderWay { lane: serial, key } = self.state else { return };
        Lane::try_with(|lane| {
            if lane.serial != serial {
                return; // its lane has ended, and with it the operation
            }
            if !lane.ops.borrow().is_done(key) {
                if !self.op.is_socket() {
                    crate::dropped_in_flight();
                }
                lane.cancel_and_wait(key);
            }
            let entry = lane.ops.borrow_mut().entries.try_remove(key as usize);
            if let (Op::Accept { .. }, Some(fd @ 0..)) = (self.op, entry.and_then(|e| e.result)) {
                // SAFETY: a connection that nobody will hear of: the kernel made this descriptor for us alone.
                unsafe { libc::close(fd) };
            }
        });
    }
}
