//! Receives, and waits for a descriptor to be ready, outside of the ring.
//!
//! A thread that sleeps on a socket itself is woken on the processor of the sender, which is about to sleep: the kernel
//! calls that a synchronous wake-up. A receive that waits in the ring wakes the lane as a stranger, on a processor that
//! sleeps and must be woken first, and that is dearer than the request. It matters as long as requests come one at
//! a time; when they come in numbers the ring's batches are worth more, and nothing is held.
#![allow(unsafe_code)] // memory of operations goes to the kernel; each use has its reason

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use smallvec::SmallVec;

use super::threads::ready_now;
use crate::op::{Op, Pieces};

/// Most receives held; others wait in the ring.
const HELD_MAX: usize = 8;

/// A receive whose socket had nothing yet, or a wait for a descriptor that was not ready.
#[derive(Copy, Clone)]
pub(super) struct Held {
    pub(super) key: u32,
    fd: RawFd,
    what: What,
}

#[derive(Copy, Clone)]
enum What {
    Receive { into: Pieces, message: *mut libc::msghdr },
    Ready { events: i16 },
}

impl Held {
    pub(super) fn op(&self) -> Op {
        match self.what {
            What::Receive { into, message } => Op::Receive { fd: self.fd, into, message },
            What::Ready { events } => Op::Poll { fd: self.fd, events },
        }
    }

    fn events(&self) -> i16 {
        match self.what {
            What::Receive { .. } => libc::POLLIN,
            What::Ready { events } => events,
        }
    }

    /// Receives what is there: bytes (or events) or a negative error number; None while there is nothing.
    fn receive(&self) -> Option<i32> {
        let message = match self.what {
            What::Receive { message, .. } => message,
            What::Ready { events } => {
                let there = ready_now(self.fd, events);
                return (there != -libc::EAGAIN && there != -libc::EINTR).then_some(there);
            }
        };
        // SAFETY: the promise of `Operation::new`: the message and the memory that it names are valid and ours alone until
        // the operation has ended, and it ends by what we answer here.
        let got = unsafe { libc::recvmsg(self.fd, message, libc::MSG_DONTWAIT) };
        if got >= 0 {
            return Some(i32::try_from(got).unwrap_or(i32::MAX));
        }
        match std::io::Error::last_os_error().raw_os_error() {
            Some(libc::EAGAIN | libc::EINTR) => None,
            error => Some(-error.unwrap_or(libc::EIO)),
        }
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct HeldReceives {
    list: Vec<Held>,
}

impl HeldReceives {
    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Holds the operation; false when it waits for nothing of the kind or there is no room.
    #[inline]
    pub(super) fn hold(&mut self, key: u32, op: &Op) -> bool {
        let (fd, what) = match *op {
            Op::Receive { fd, into, message } => (fd, What::Receive { into, message }),
            Op::Poll { fd, events } => (fd, What::Ready { events }),
            _ => return false,
        };
        if self.list.len() >= HELD_MAX {
            return false;
        }
        self.list.push(Held { key, fd, what });
        true
    }

    /// Lets go of one; true when it was here.
    pub(super) fn cancel(&mut self, key: u32) -> bool {
        let before = self.list.len();
        self.list.retain(|held| held.key != key);
        self.list.len() < before
    }

    /// Any of them, to wait in the ring instead.
    pub(super) fn take(&mut self) -> Option<Held> {
        self.list.pop()
    }

    /// Receives what has come.
    pub(super) fn receive(&mut self, done: &mut Vec<(u32, i32)>) {
        self.list.retain(|held| match held.receive() {
            Some(result) => {
                done.push((held.key, result));
                false
            }
            None => true,
        });
    }

    /// Sleeps until a socket has something, the ring or the lane's bell has rung, or the time is over; receives what has
    /// come. The bell, and what the ring waits for to be ready, are looked at themselves: the kernel calls from within the
    /// ringing of one eventfd no other, so the ring may have something without telling anybody.
    pub(super) fn sleep(
        &mut self,
        ring: &OwnedFd,
        bell: RawFd,
        polled: impl Iterator<Item = (RawFd, i16)>,
        time: Option<Duration>,
        done: &mut Vec<(u32, i32)>,
    ) {
        let wanted = |fd, events| libc::pollfd { fd, events, revents: 0 };
        let mut list: SmallVec<[libc::pollfd; 2 + 2 * HELD_MAX]> = SmallVec::new();
        list.push(wanted(ring.as_raw_fd(), libc::POLLIN));
        list.push(wanted(bell, libc::POLLIN));
        list.extend(self.list.iter().map(|held| wanted(held.fd, held.events())));
        let own = 2..list.len();
        list.extend(polled.map(|(fd, events)| wanted(fd, events)));
        let time = time.map(|t| libc::timespec {
            tv_sec: i64::try_from(t.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(t.subsec_nanos()),
        });
        let time = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: list and time are valid for the call.
        let ready =
            unsafe { libc::ppoll(list.as_mut_ptr(), list.len() as libc::nfds_t, time, std::ptr::null()) };
        if ready > 0 && list[0].revents != 0 {
            // Only the fact counts; nothing to read is as good.
            let _ = rustix::io::read(ring, &mut [0; 8]);
        }
        if ready > 0 && list[own].iter().any(|l| l.revents != 0) {
            self.receive(done);
        }
    }
}
