//! Opening: direct or buffered, locked or not, and what alignment that asks for.

use std::fs::OpenOptions as StdOptions;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, OFlags};

use crate::Buffer;

/// Whether I/O goes past the page cache.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub enum Direct {
    /// Direct where the file system takes it, else buffered with fdatasync.
    #[default]
    Auto,
    /// Always through the page cache.
    Never,
    /// Direct, or opening fails.
    Must,
}

/// Who else may have the file open (advisory `flock` on the whole file).
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub enum Lock {
    /// Nobody who locks: one user at a time. A block device to be written must not be mounted either.
    #[default]
    Exclusive,
    /// Others that only read.
    Shared,
    /// Not locked.
    None,
}

/// How to open a file.
#[derive(Clone, Debug, Default)]
pub struct Open {
    /// Writing fails.
    pub read_only: bool,
    /// Past the page cache or through it.
    pub direct: Direct,
    /// Who else may have it open.
    pub lock: Lock,
    /// Makes a new file of so many bytes, which must not exist yet.
    pub create_bytes: Option<u64>,
    /// Permission bits of a new file; 0 means 0600, because disks hold secrets.
    pub mode: u32,
}

/// Multiples (powers of two) that transfers must keep, in bytes; 1 where anything goes.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Of memory addresses and of the length of each piece.
    pub memory: u32,
    /// Of the offset in the file and of the whole length.
    pub offset: u32,
}

impl Alignment {
    /// Buffered files take anything.
    pub const ANY: Self = Self { memory: 1, offset: 1 };
}

/// What the file is.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    Regular,
    /// A block device.
    Block,
}

/// An opened file before it becomes a [`super::File`].
pub(super) struct Opened {
    pub fd: OwnedFd,
    pub path: PathBuf,
    pub kind: Kind,
    pub alignment: Alignment,
    pub read_only: bool,
}

/// Opens `path`; blocks, so it runs on a worker.
pub(super) fn open(path: &Path, how: &Open) -> io::Result<Opened> {
    let mut options = StdOptions::new();
    options.read(true).write(!how.read_only).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    if how.create_bytes.is_some() {
        options.create_new(true).mode(if how.mode == 0 { 0o600 } else { how.mode });
    }
    let file = open_alone(path, how, &mut options)?;
    let meta = file.metadata()?;
    let kind = if meta.file_type().is_file() {
        Kind::Regular
    } else if meta.file_type().is_block_device() {
        Kind::Block
    } else {
        let text = format!("{} is neither a regular file nor a block device", path.display());
        return Err(io::Error::new(ErrorKind::InvalidInput, text));
    };
    lock(&file, path, how)?;
    if let Some(bytes) = how.create_bytes {
        file.set_len(bytes)?;
    }
    let fd = OwnedFd::from(file);
    set_flag(&fd, OFlags::NONBLOCK, false)?;
    let alignment = match how.direct {
        Direct::Never => Alignment::ANY,
        Direct::Auto => probe(&fd, kind, how)?.unwrap_or(Alignment::ANY),
        Direct::Must => probe(&fd, kind, how)?.ok_or_else(|| {
            let text = format!("{} does not take direct I/O", path.display());
            io::Error::new(ErrorKind::Unsupported, text)
        })?,
    };
    if let (Some(bytes), false) = (how.create_bytes, alignment == Alignment::ANY) {
        // The probe wrote a block: a new file starts without any.
        rustix::fs::ftruncate(&fd, 0)?;
        rustix::fs::ftruncate(&fd, bytes)?;
    }
    Ok(Opened { fd, path: path.to_owned(), kind, alignment, read_only: how.read_only })
}

/// A block device that we write is not to be mounted, nor part of another device: O_EXCL asks the kernel.
fn open_alone(path: &Path, how: &Open, options: &mut StdOptions) -> io::Result<std::fs::File> {
    let is_device = std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device());
    if !is_device || how.read_only || how.lock != Lock::Exclusive {
        return options.open(path);
    }
    let began = Instant::now();
    loop {
        let opened = options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_EXCL).open(path);
        match opened {
            Err(error) if error.kind() == ErrorKind::ResourceBusy => {
                // A process that was just killed takes a moment to die.
                if began.elapsed() < Duration::from_millis(100) {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                }
                let text = format!(
                    "{} is in use by the system (mounted, or part of another device) or by another process",
                    path.display()
                );
                return Err(io::Error::new(ErrorKind::ResourceBusy, text));
            }
            other => return other,
        }
    }
}

/// Length in bytes of a file or block device.
pub(super) fn length(fd: impl AsFd, kind: Kind) -> io::Result<u64> {
    Ok(match kind {
        Kind::Regular => rustix::fs::fstat(fd)?.st_size as u64,
        // The end of a block device is its size (what BLKGETSIZE64 answers); the offset itself is not used.
        Kind::Block => rustix::fs::seek(fd, rustix::fs::SeekFrom::End(0))?,
    })
}

fn set_flag(fd: &OwnedFd, flag: OFlags, on: bool) -> io::Result<()> {
    let mut flags = rustix::fs::fcntl_getfl(fd)?;
    flags.set(flag, on);
    Ok(rustix::fs::fcntl_setfl(fd, flags)?)
}

fn lock(file: &std::fs::File, path: &Path, how: &Open) -> io::Result<()> {
    let wanted = match how.lock {
        Lock::Exclusive => FlockOperation::NonBlockingLockExclusive,
        Lock::Shared => FlockOperation::NonBlockingLockShared,
        Lock::None => return Ok(()),
    };
    let began = Instant::now();
    loop {
        match rustix::fs::flock(file, wanted) {
            Err(rustix::io::Errno::WOULDBLOCK) if began.elapsed() < patience(file) => {
                std::thread::sleep(Duration::from_millis(5));
            }
            result => return judge(result, file, path),
        }
    }
}

fn judge(result: rustix::io::Result<()>, file: &std::fs::File, path: &Path) -> io::Result<()> {
    match result {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let who = holder(file).unwrap_or_else(|| "another process".into());
            let text = format!("{} is in use by {who}", path.display());
            Err(io::Error::new(ErrorKind::ResourceBusy, text))
        }
        Err(error) => Err(error.into()),
    }
}

/// How long to wait for the lock, by who holds it: a process that was just killed takes a moment to die, and the kernel
/// ends the I/O of a dead one after it.
fn patience(file: &std::fs::File) -> Duration {
    let Some(pid) = holder_pid(file) else { return Duration::from_millis(100) };
    if pid == std::process::id() {
        return Duration::ZERO;
    }
    let dead = match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        // The state follows the name in parentheses; Z and X are dead.
        Ok(stat) => stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with(['Z', 'X'])),
        Err(_) => true,
    };
    Duration::from_millis(if dead { 2000 } else { 100 })
}

/// Who holds the lock, as far as `/proc` tells: "process 4711 (kagami)".
fn holder(file: &std::fs::File) -> Option<String> {
    let pid = holder_pid(file)?;
    if pid == std::process::id() {
        return Some("this process already".into());
    }
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some(format!("process {pid} ({})", name.trim()))
}

fn holder_pid(file: &std::fs::File) -> Option<u32> {
    let meta = file.metadata().ok()?;
    let (major, minor) = (libc::major(meta.dev()), libc::minor(meta.dev()));
    let place = format!("{major:02x}:{minor:02x}:{}", meta.ino());
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    let line =
        locks.lines().find(|l| l.contains(" FLOCK ") && l.split_ascii_whitespace().any(|w| w == place))?;
    line.split_ascii_whitespace().nth(4)?.parse().ok()
}

fn begins_with_data(fd: &OwnedFd) -> bool {
    !matches!(rustix::fs::seek(fd, rustix::fs::SeekFrom::Data(0)), Ok(1..) | Err(rustix::io::Errno::NXIO))
}

/// Turns direct I/O on if the file really takes it: an aligned read, and (where we may write, alone) writing the same
/// bytes back. Else leaves the file buffered and answers `None`.
fn probe(fd: &OwnedFd, kind: Kind, how: &Open) -> io::Result<Option<Alignment>> {
    if set_flag(fd, OFlags::DIRECT, true).is_err() {
        return Ok(None);
    }
    let length = length(fd, kind)?;
    for offset in [512u32, 4096] {
        if !length.is_multiple_of(u64::from(offset)) {
            break;
        }
        let mut block = Buffer::zeroed(offset as usize);
        let got = match rustix::io::pread(fd, &mut block[..], 0) {
            Ok(got) => got,
            Err(rustix::io::Errno::INVAL) => continue,
            Err(_) => break,
        };
        // Writing back must not fill a hole of somebody's sparse file; a new file is emptied again.
        let may_write = how.lock == Lock::Exclusive && !how.read_only && got == block.len();
        if may_write && (how.create_bytes.is_some() || begins_with_data(fd)) {
            match rustix::io::pwrite(fd, &block, 0) {
                Ok(_) => {}
                Err(rustix::io::Errno::INVAL) => continue,
                Err(_) => break,
            }
        }
        return Ok(Some(Alignment { memory: offset, offset }));
    }
    set_flag(fd, OFlags::DIRECT, false)?;
    Ok(None)
}
