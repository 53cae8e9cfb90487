//! Eventfds of the front end: the guest's kicks, our calls. They are the front end's, which may do with them what it
//! likes: nothing here ever waits for one.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::io::{Errno, ReadWriteFlags};
use zerocopy::IntoBytes;

/// An eventfd to ring.
pub(crate) struct Bell {
    fd: OwnedFd,
    may_block: bool,
}

impl Bell {
    /// `InvalidInput` when it is something else than an eventfd.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let name = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if name.as_os_str() != "anon_inode:[eventfd]" {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let may_block = !rustix::fs::fcntl_getfl(&fd)?.contains(OFlags::NONBLOCK);
        Ok(Self { fd, may_block })
    }

    /// Rings. A bell that cannot take more has rung for who listens.
    pub fn ring(&self) {
        if self.may_block {
            let mut list = [PollFd::new(&self.fd, PollFlags::OUT)];
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            if !matches!(rustix::event::poll(&mut list, Some(&now)), Ok(1)) {
                return;
            }
        }
        let _ = rustix::io::write(&self.fd, 1u64.as_bytes()); // see above
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

    #[test]
    fn nothing_waits_for_a_bell() {
        for flags in [EventfdFlags::CLOEXEC, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK] {
            let fd = eventfd(0, flags).unwrap();
            hear(&fd).unwrap();
            let bell = Bell::new(fd.try_clone().unwrap()).unwrap();
            bell.ring();
            bell.ring();
            let mut count = 0u64;
            rustix::io::read(&fd, count.as_mut_bytes()).unwrap();
            assert_eq!(count, 2);
            rustix::io::write(&fd, (u64::MAX - 1).as_bytes()).unwrap();
            bell.ring();
            hear(&fd).unwrap();
            hear(&fd).unwrap();
        }
        let (reader, _writer) = io::pipe().unwrap();
        assert!(hear(&reader).is_err() || Bell::new(reader.into()).is_err());
    }
}
