//! Descriptors of others to wait for: an eventfd that a guest rings, a socket that carries descriptors.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::op::{Op, Operation};

/// A descriptor that is waited for by the lane and used by its owner, who must be ready to find nothing there. Waiting may
/// be given up by dropping the future.
pub struct Watched(OwnedFd);

impl Watched {
    /// Takes a descriptor that can be polled.
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Waits until something can be read (or the other end is gone).
    pub async fn readable(&self) -> io::Result<()> {
        self.ready(libc::POLLIN).await
    }

    /// Waits until something can be written (or the other end is gone).
    pub async fn writable(&self) -> io::Result<()> {
        self.ready(libc::POLLOUT).await
    }

    #[allow(unsafe_code)]
    async fn ready(&self, events: i16) -> io::Result<()> {
        loop {
            let op = Op::Poll { fd: self.0.as_raw_fd(), events };
            // SAFETY: no memory is named; `self` keeps the descriptor.
            match unsafe { Operation::new(op) }.await {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => return result.map(drop),
            }
        }
    }
}

impl AsFd for Watched {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::Future;
    use std::pin::pin;
    use std::rc::Rc;

    use super::*;
    use crate::{DriverKind, Options};

    #[test]
    fn a_bell_is_heard_again_and_again_and_waiting_can_be_given_up() {
        for driver in [DriverKind::Ring, DriverKind::Threads] {
            crate::block_on_with(Options { driver, ..Options::default() }, async {
                let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
                let bell = Rc::new(Watched::new(rustix::event::eventfd(0, flags).unwrap()));
                let heard = Rc::new(Cell::new(0));
                let (far, count) = (Rc::clone(&bell), Rc::clone(&heard));
                let listening = crate::spawn(async move {
                    while count.get() < 40 {
                        far.readable().await.unwrap();
                        rustix::io::read(&*far, &mut [0; 8]).unwrap();
                        count.set(count.get() + 1);
                    }
                });
                // More rounds than it takes a lane to be calm: both ways of waiting are used.
                for round in 1..=40 {
                    rustix::io::write(&*bell, &1u64.to_le_bytes()).unwrap();
                    while heard.get() < round {
                        crate::sleep(std::time::Duration::from_micros(50)).await;
                    }
                }
                listening.await;
                bell.writable().await.unwrap();
                let mut waiting = pin!(bell.readable());
                let pending =
                    std::future::poll_fn(|cx| std::task::Poll::Ready(waiting.as_mut().poll(cx).is_pending()));
                assert!(pending.await, "nothing is there");
            });
        }
    }

    /// More bells than a calm lane waits for itself, so that some are the ring's business, rung from another thread: the
    /// kernel calls no eventfd from within another, and the ring must not miss them.
    #[test]
    fn no_bell_is_missed_however_many_there_are() {
        const BELLS: usize = 20;
        for driver in [DriverKind::Ring, DriverKind::Threads] {
            let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
            let bells: Vec<OwnedFd> = (0..BELLS).map(|_| rustix::event::eventfd(0, flags).unwrap()).collect();
            let theirs: Vec<OwnedFd> = bells.iter().map(|bell| bell.try_clone().unwrap()).collect();
            let (heard, was_heard) = std::sync::mpsc::channel();
            std::thread::spawn(move || {
                crate::block_on_with(Options { driver, ..Options::default() }, async {
                    let listening = theirs.into_iter().enumerate().map(|(number, bell)| {
                        let (bell, heard) = (Watched::new(bell), heard.clone());
                        async move {
                            for _ in 0..40 {
                                bell.readable().await.unwrap();
                                rustix::io::read(&bell, &mut [0; 8]).unwrap();
                                heard.send(number).unwrap();
                            }
                        }
                    });
                    crate::sync::together(listening).await;
                });
            });
            for round in 0..40 {
                for (number, bell) in bells.iter().enumerate() {
                    rustix::io::write(bell, &1u64.to_le_bytes()).unwrap();
                    let answer = was_heard.recv_timeout(std::time::Duration::from_secs(30));
                    assert_eq!(answer, Ok(number), "round {round}");
                }
            }
        }
    }
}
