//! Eventfds of the front end: the guest's kicks, our calls. They are the front end's, which may do with them what it
//! likes: nothing here ever waits for one.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::io::{Errno, ReadWriteFlags};
use zerocopy::IntoBytes;

use super::signal;

/// An eventfd, and nothing that can be read for ever or written to at length: else `InvalidInput`.
pub(crate) fn must_be_eventfd(fd: &OwnedFd) -> io::Result<()> {
    let name = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    if name.as_os_str() == "anon_inode:[eventfd]" { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

/// An eventfd to ring.
pub(crate) struct Bell(OwnedFd);

impl Bell {
    /// `InvalidInput` when it is something else than an eventfd.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        must_be_eventfd(&fd).map(|()| Self(fd))
    }

    /// Rings. A bell that cannot take more has rung for who listens.
    pub fn ring(&self) {
        if !signal::ring(&self.0) {
            self.write();
        }
    }

    /// The same where there is only a plain write: it looks first whether that would wait, which is as good as can be.
    fn write(&self) {
        let waits = !rustix::fs::fcntl_getfl(&self.0).is_ok_and(|flags| flags.contains(OFlags::NONBLOCK));
        if waits {
            let mut list = [PollFd::new(&self.0, PollFlags::OUT)];
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            if !matches!(rustix::event::poll(&mut list, Some(&now)), Ok(1)) {
                return;
            }
        }
        let _ = rustix::io::write(&self.0, 1u64.as_bytes()); // see above
    }
}

/// Takes what a bell that was heard has counted.
pub(crate) fn hear(bell: &impl AsFd) -> io::Result<()> {
    let mut count = [0; 8];
    let mut into = [io::IoSliceMut::new(&mut count)];
    // At "no position" and without waiting, whatever mode the front end has put it in; an eventfd can do that.
    match rustix::io::preadv2(bell, &mut into, u64::MAX, ReadWriteFlags::NOWAIT) {
        Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    /// The front end fills its bell and switches it to waiting at the worst moment.
    #[test]
    fn a_front_end_that_changes_its_mind_stops_nobody() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let bell = Bell::new(fd.try_clone().unwrap()).unwrap();
        rustix::io::write(&fd, (u64::MAX - 1).as_bytes()).unwrap();
        rustix::fs::fcntl_setfl(&fd, OFlags::empty()).unwrap();
        let (done, is_done) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            bell.ring();
            bell.ring();
            done.send(()).unwrap();
        });
        let ended = is_done.recv_timeout(std::time::Duration::from_secs(20));
        hear(&fd).unwrap(); // lets it go where it does wait
        assert!(ended.is_ok(), "it waits for the front end");
    }

    #[test]
    fn nothing_waits_for_a_bell() {
        for flags in [EventfdFlags::CLOEXEC, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK] {
            let fd = eventfd(0, flags).unwrap();
            hear(&fd).unwrap();
            let bell = Bell::new(fd.try_clone().unwrap()).unwrap();
            for ring in [Bell::ring, Bell::write] {
                ring(&bell);
                ring(&bell);
                let mut count = 0u64;
                rustix::io::read(&fd, count.as_mut_bytes()).unwrap();
                assert_eq!(count, 2);
                rustix::io::write(&fd, (u64::MAX - 1).as_bytes()).unwrap();
                ring(&bell);
                hear(&fd).unwrap();
                hear(&fd).unwrap();
            }
        }
        // As often as anybody likes.
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let bell = Bell::new(fd.try_clone().unwrap()).unwrap();
        for _ in 0..1000 {
            bell.ring();
        }
        let mut count = 0u64;
        rustix::io::read(&fd, count.as_mut_bytes()).unwrap();
        assert_eq!(count, 1000);
        let (reader, _writer) = io::pipe().unwrap();
        assert!(hear(&reader).is_err() || Bell::new(reader.into()).is_err());
    }
}
