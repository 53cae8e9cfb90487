//! The driver without io_uring: files by `preadv2` and relatives on worker threads, sockets by `poll`.
//!
//! Everything is first tried here without waiting where that makes sense: a read of what the page cache holds, a
//! message that is there already. Workers mail their results; the bell of the mailbox is one of the descriptors polled.
#![allow(unsafe_code)] // system calls on raw pieces of memory; each use has its reason

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use super::Wait;
use crate::executor::Mailbox;
use crate::op::{Op, Pieces};
use crate::pool;

/// An operation on its way to another thread.
struct Mailed(Op);
// SAFETY: the pieces it names are borrowed by the waiting operation, which aborts the process rather than go away
// before the worker is done, and only the worker uses them meanwhile.
unsafe impl Send for Mailed {}

/// A socket operation that waits for its descriptor. Taken away (`cancel`) before the memory it names goes.
#[derive(Copy, Clone)]
struct Waiting {
    key: u32,
    op: Op,
}

/// See the module.
pub(crate) struct Threads {
    waiting: Vec<Waiting>,
    polled: Vec<libc::pollfd>,
    /// Results found outside of a turn.
    early: Vec<(u32, i32)>,
    /// Operations answered at once since the last turn.
    at_once: u32,
}

/// Operations answered at once between two turns; then the others have their turn first.
const AT_ONCE_MAX: u32 = 64;

impl Threads {
    pub(crate) fn new() -> Self {
        Self { waiting: Vec::new(), polled: Vec::new(), early: Vec::new(), at_once: 0 }
    }

    pub(crate) fn submit(&mut self, key: u32, op: &Op, mailbox: &Arc<Mailbox>) -> Option<i32> {
        if op.is_socket() {
            let result = socket_call(op);
            if result != -libc::EAGAIN {
                return self.answer_now(key, result);
            }
            self.waiting.push(Waiting { key, op: *op });
            return None;
        }
        if let Op::Read { fd, at, into, cached: true } = *op {
            let result = read(fd, at, into, libc::RWF_NOWAIT);
            if result > 0 {
                return self.answer_now(key, result);
            }
        }
        let (mailed, mailbox) = (Mailed(*op), Arc::clone(mailbox));
        pool::blocking().submit(Box::new(move || {
            let Mailed(op) = { mailed };
            mailbox.send_done(key, file_call(&op));
        }));
        None
    }

    /// A task that always finds something must not keep the lane for itself.
    fn answer_now(&mut self, key: u32, result: i32) -> Option<i32> {
        self.at_once += 1;
        if self.at_once <= AT_ONCE_MAX {
            return Some(result);
        }
        self.early.push((key, result));
        None
    }

    pub(crate) fn turn(&mut self, wait: Wait, mailbox: &Arc<Mailbox>, done: &mut Vec<(u32, i32)>) {
        self.at_once = 0;
        let wait = if self.early.is_empty() { wait } else { Wait::No };
        done.append(&mut self.early);
        if self.waiting.is_empty() && matches!(wait, Wait::No) {
            return;
        }
        let bell = mailbox.bell().as_raw_fd();
        self.polled.clear();
        self.polled.push(libc::pollfd { fd: bell, events: libc::POLLIN, revents: 0 });
        self.polled.extend(self.waiting.iter().map(|w| {
            let (fd, events) = interest(&w.op);
            libc::pollfd { fd, events, revents: 0 }
        }));
        if poll(&mut self.polled, wait) <= 0 {
            return;
        }
        if self.polled[0].revents != 0 {
            let mut count = [0; 8];
            let _ = rustix::io::read(mailbox.bell(), &mut count); // readable: does not wait
        }
        // From behind, so that taking one out does not move those to come.
        for place in (0..self.waiting.len()).rev() {
            if self.polled[place + 1].revents == 0 {
                continue;
            }
            let Waiting { key, op } = self.waiting[place];
            let mut result = socket_call(&op);
            let hung_up = self.polled[place + 1].revents & libc::POLLHUP != 0;
            if result == -libc::EAGAIN && hung_up && matches!(op, Op::Accept { .. }) {
                // A Unix listener that was shut down says "nothing there" for ever.
                result = -libc::ECONNABORTED;
            }
            if result != -libc::EAGAIN {
                self.waiting.swap_remove(place);
                done.push((key, result));
            }
        }
    }

    pub(crate) fn cancel(&mut self, key: u32) {
        if let Some(place) = self.waiting.iter().position(|w| w.key == key) {
            self.waiting.swap_remove(place);
            self.early.push((key, -libc::ECANCELED));
        }
    }
}

fn interest(op: &Op) -> (RawFd, i16) {
    match *op {
        Op::Send { fd, .. } => (fd, libc::POLLOUT),
        Op::Accept { fd } | Op::Receive { fd, .. } => (fd, libc::POLLIN),
        Op::Poll { fd, events } => (fd, events),
        Op::Read { fd, .. } | Op::Write { fd, .. } | Op::SyncData { fd } | Op::Allocate { fd, .. } => (fd, 0),
    }
}

fn poll(list: &mut [libc::pollfd], wait: Wait) -> i32 {
    let time = match wait {
        Wait::No => Some(libc::timespec { tv_sec: 0, tv_nsec: 0 }),
        Wait::For(time) => Some(libc::timespec {
            tv_sec: time.as_secs().min(1 << 40) as libc::time_t,
            tv_nsec: time.subsec_nanos().into(),
        }),
        Wait::Forever => None,
    };
    let time = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the list and the time are alive for the call; no signal mask is given.
    unsafe { libc::ppoll(list.as_mut_ptr(), list.len() as libc::nfds_t, time, std::ptr::null()) }
}

/// A count, or the negated errno.
fn answer(result: isize) -> i32 {
    if result >= 0 {
        return i32::try_from(result).unwrap_or(i32::MAX);
    }
    -std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

fn read(fd: RawFd, at: u64, into: Pieces, flags: i32) -> i32 {
    let Ok(at) = libc::off_t::try_from(at) else { return -libc::EINVAL };
    // SAFETY: the promise of `Operation::new`: the pieces are valid and writable until the operation is over.
    answer(unsafe { libc::preadv2(fd, into.list, into.count as i32, at, flags) })
}

/// A file operation, to its end.
fn file_call(op: &Op) -> i32 {
    match *op {
        Op::Read { fd, at, into, .. } => read(fd, at, into, 0),
        Op::Write { fd, at, from, durable } => {
            let Ok(at) = libc::off_t::try_from(at) else { return -libc::EINVAL };
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            // SAFETY: the promise of `Operation::new`: the pieces are valid until the operation is over.
            answer(unsafe { libc::pwritev2(fd, from.list, from.count as i32, at, flags) })
        }
        // SAFETY: an open descriptor, nothing else.
        Op::SyncData { fd } => answer(unsafe { libc::fdatasync(fd) } as isize),
        Op::Allocate { fd, mode, at, length } => {
            let (Ok(at), Ok(length)) = (libc::off_t::try_from(at), libc::off_t::try_from(length)) else {
                return -libc::EINVAL;
            };
            // SAFETY: plain numbers and an open descriptor.
            answer(unsafe { libc::fallocate(fd, mode, at, length) } as isize)
        }
        Op::Accept { .. } | Op::Receive { .. } | Op::Send { .. } | Op::Poll { .. } => -libc::EINVAL,
    }
}

/// Which of the events are there; EAGAIN when none is.
pub(super) fn ready_now(fd: RawFd, events: i16) -> i32 {
    let mut one = [libc::pollfd { fd, events, revents: 0 }];
    match poll(&mut one, Wait::No) {
        0 => -libc::EAGAIN,
        1.. => i32::from(one[0].revents),
        error => answer(error as isize),
    }
}

/// A socket operation, without waiting.
fn socket_call(op: &Op) -> i32 {
    let result = match *op {
        // Listeners are in non-blocking mode under this driver.
        Op::Accept { fd } => {
            // SAFETY: no address is asked for.
            let accepted =
                unsafe { libc::accept4(fd, std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC) };
            answer(accepted as isize)
        }
        // SAFETY: the message names pieces that are valid and writable, the promise of `Operation::new`.
        Op::Receive { fd, message, .. } => answer(unsafe { libc::recvmsg(fd, message, libc::MSG_DONTWAIT) }),
        Op::Send { fd, message, .. } => {
            // SAFETY: the message names pieces that are valid, the promise of `Operation::new`.
            answer(unsafe { libc::sendmsg(fd, message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) })
        }
        Op::Poll { fd, events } => ready_now(fd, events),
        Op::Read { .. } | Op::Write { .. } | Op::SyncData { .. } | Op::Allocate { .. } => -libc::EINVAL,
    };
    if result == -libc::EINTR { -libc::EAGAIN } else { result }
}
