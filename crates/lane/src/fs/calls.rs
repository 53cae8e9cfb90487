//! The system calls below [`super::File`] that are no operations of the driver.
#![allow(unsafe_code)] // ioctl; each use has its reason

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, BorrowedFd};

use super::{Kind, Stretch};

/// `BLKDISCARD` of linux/fs.h: `_IO(0x12, 119)`.
const BLKDISCARD: libc::c_ulong = 0x1277;

pub(super) fn discard(fd: BorrowedFd<'_>, at: u64, length: u64) -> io::Result<()> {
    let range = [at, length];
    // SAFETY: BLKDISCARD reads two 64-bit numbers at the address given.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), BLKDISCARD as _, range.as_ptr()) };
    if result == 0 { Ok(()) } else { Err(unsupported(io::Error::last_os_error())) }
}

/// The several ways of the kernel to say "cannot do that here" become one kind.
pub(super) fn unsupported(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::EINVAL) => ErrorKind::Unsupported.into(),
        _ => error,
    }
}

pub(super) fn stretch(fd: BorrowedFd<'_>, kind: Kind, at: u64) -> io::Result<Stretch> {
    use rustix::fs::{SeekFrom, seek};
    use rustix::io::Errno;
    let length = super::open::length(fd, kind)?;
    if at >= length {
        return Err(ErrorKind::InvalidInput.into());
    }
    if kind == Kind::Block {
        return Ok(Stretch { end: length, data: true });
    }
    match seek(fd, SeekFrom::Data(at)) {
        Ok(found) if found > at => Ok(Stretch { end: found.min(length), data: false }),
        Ok(_) => match seek(fd, SeekFrom::Hole(at)) {
            Ok(end) if end > at => Ok(Stretch { end: end.min(length), data: true }),
            // Nothing under way changes it, so this is a file system that does not know: all is data.
            _ => Ok(Stretch { end: length, data: true }),
        },
        Err(Errno::NXIO) => Ok(Stretch { end: length, data: false }),
        Err(Errno::INVAL) => Ok(Stretch { end: length, data: true }),
        Err(error) => Err(error.into()),
    }
}
