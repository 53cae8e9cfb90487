//! The log of dirty pages: while a guest migrates, every page that we write to is marked for the front end to send again.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, Ordering};

use vhost::vhost_user::message::VhostUserLog;
use vm_memory::VolatileMemory;

use super::memory::{BadMemory, Mapped, map_file};

/// Guest memory per bit.
const PAGE_BYTES: u64 = 4096;

/// A bit per page of guest memory, shared with the front end.
pub(crate) struct Log(Mapped);

impl Log {
    /// Maps what the front end shares.
    pub fn map(about: &VhostUserLog, file: OwnedFd) -> Result<Self, BadMemory> {
        map_file(file, about.mmap_offset, about.mmap_size).map(Self)
    }

    /// Marks the pages of some bytes. What lies beyond the log is no memory that migrates.
    pub fn mark(&self, at: u64, bytes: u64) {
        let Some(last) = bytes.checked_sub(1).and_then(|rest| at.checked_add(rest)) else { return };
        for page in at / PAGE_BYTES..=last / PAGE_BYTES {
            let place = usize::try_from(page / 8).unwrap_or(usize::MAX);
            let Ok(byte) = self.0.get_atomic_ref::<AtomicU8>(place) else { return };
            byte.fetch_or(1 << (page % 8), Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost::memory::tests::memfd;

    #[test]
    fn pages_are_marked_and_nothing_beyond_the_log() {
        let file = memfd(4096);
        let own = file.try_clone().unwrap();
        let log = Log::map(&VhostUserLog::new(2, 0), file).unwrap();
        log.mark(4095, 2);
        log.mark(9 * 4096, 1);
        log.mark(0, 0);
        log.mark(15 * 4096, 1 << 40);
        log.mark(u64::MAX, 2);
        let mut bytes = [0; 3];
        rustix::io::pread(&own, &mut bytes, 0).unwrap();
        assert_eq!(bytes, [0b11, 0b1000_0010, 0]);
        assert!(Log::map(&VhostUserLog::new(8192, 0), own).is_err());
    }
}
