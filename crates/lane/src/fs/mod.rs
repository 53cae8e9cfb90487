//! Files and block devices: read and written at offsets, direct where the file system takes it.
//!
//! A [`File`] moves bytes between an offset and [`Segments`]. Transfers are whole: a short one of the kernel is gone on
//! with. In direct mode, memory that is not aligned is bounced through an aligned [`Buffer`]; offsets that are not
//! aligned are read through a wider read and refused for writing, because that takes a lock that belongs to the owner
//! of the content (see `media::FileDisk`).

mod calls;
mod open;

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::executor::Lane;
use crate::op::{Op, Operation, Pieces};
use crate::pool::on_worker;
use crate::sim::{self, SimOpen};
use crate::{Buffer, Segments, SegmentsMut};

pub use open::{Alignment, Direct, Kind, Lock, Open};

/// Most bytes bounced at a time.
const BOUNCE_BYTES: usize = 1 << 20;

/// What a range of a file holds, as `SEEK_DATA` and `SEEK_HOLE` tell.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// First byte after the range.
    pub end: u64,
    /// Blocks are allocated here; else it reads as zero.
    pub data: bool,
}

enum Backing {
    /// Shared with workers that may outlive a dropped future.
    Real(Arc<OwnedFd>),
    Sim(SimOpen),
}

/// An open file or block device. Closing is dropping, when nothing is under way.
pub struct File {
    backing: Backing,
    path: PathBuf,
    kind: Kind,
    alignment: Alignment,
    read_only: bool,
}

impl File {
    /// Opens or creates. Errors: what `open(2)` says; `ResourceBusy` when somebody else holds the lock, naming who.
    pub async fn open(path: impl AsRef<Path>, how: &Open) -> io::Result<File> {
        let (path, how) = (path.as_ref().to_owned(), how.clone());
        if sim::is_on() {
            let opened = sim::open(&path, &how).await?;
            let alignment = match how.direct {
                Direct::Never => Alignment::ANY,
                Direct::Auto | Direct::Must => Alignment { memory: 512, offset: 512 },
            };
            let backing = Backing::Sim(opened);
            return Ok(File { backing, path, kind: Kind::Regular, alignment, read_only: how.read_only });
        }
        let opened = on_worker(move || open::open(&path, &how)).await?;
        let (fd, direct) = (opened.fd.as_raw_fd(), opened.alignment != Alignment::ANY);
        Lane::with(|lane| lane.driver.borrow_mut().adopt_file(fd, direct, &lane.mailbox));
        Ok(File {
            backing: Backing::Real(Arc::new(opened.fd)),
            path: opened.path,
            kind: opened.kind,
            alignment: opened.alignment,
            read_only: opened.read_only,
        })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Regular file or block device.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Opened without the right to write.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Transfers go past the page cache.
    pub fn is_direct(&self) -> bool {
        self.alignment != Alignment::ANY
    }

    /// What transfers without a copy.
    pub fn alignment(&self) -> Alignment {
        self.alignment
    }

    /// Fills `into` from byte `at` on. `UnexpectedEof` when the file ends before.
    pub async fn read_at(&self, at: u64, into: &SegmentsMut<'_>) -> io::Result<()> {
        let Alignment { memory, offset } = self.alignment;
        let whole = at.is_multiple_of(u64::from(offset)) && into.len().is_multiple_of(offset as usize);
        if whole && into.is_aligned(memory as usize) {
            return self.fill(at, into).await;
        }
        // Boxed, as all that is rare: the future of the common way stays small.
        Box::pin(self.read_bounced(at, into)).await
    }

    async fn read_bounced(&self, at: u64, into: &SegmentsMut<'_>) -> io::Result<()> {
        let offset = u64::from(self.alignment.offset);
        let mut done = 0;
        while done < into.len() {
            let byte = at + done as u64;
            let first = byte - byte % offset;
            let head = (byte - first) as usize;
            let count = (into.len() - done).min(BOUNCE_BYTES - head);
            let wide = (head + count).next_multiple_of(offset as usize);
            let mut bounce = Buffer::for_overwrite(wide);
            self.fill(first, &SegmentsMut::new(&mut bounce)).await?;
            into.copy_from(done, &bounce[head..head + count]);
            done += count;
        }
        Ok(())
    }

    /// Writes all of `from` to byte `at` on; `durable` means that it survives a power loss when this returns.
    ///
    /// In direct mode `at` and the length must be multiples of [`Alignment::offset`], else `InvalidInput`.
    pub async fn write_at(&self, at: u64, from: &Segments<'_>, durable: bool) -> io::Result<()> {
        let Alignment { memory, offset } = self.alignment;
        if !at.is_multiple_of(u64::from(offset)) || !from.len().is_multiple_of(offset as usize) {
            return Err(ErrorKind::InvalidInput.into());
        }
        if from.is_aligned(memory as usize) {
            return self.put(at, from, durable).await;
        }
        Box::pin(self.write_bounced(at, from, durable)).await
    }

    async fn write_bounced(&self, at: u64, from: &Segments<'_>, durable: bool) -> io::Result<()> {
        let mut done = 0;
        while done < from.len() {
            let count = (from.len() - done).min(BOUNCE_BYTES);
            let mut bounce = Buffer::for_overwrite(count);
            from.copy_to(done, &mut bounce);
            self.put(at + done as u64, &Segments::new(&bounce), durable).await?;
            done += count;
        }
        Ok(())
    }

    /// Reads everything, going on after short reads.
    #[allow(unsafe_code)]
    async fn fill(&self, at: u64, into: &SegmentsMut<'_>) -> io::Result<()> {
        let fd = match &self.backing {
            Backing::Sim(open) => return open.file.read(at, into).await,
            Backing::Real(fd) => fd.as_raw_fd(),
        };
        let cached = !self.is_direct();
        let mut done = 0;
        while done < into.len() {
            let rest = Rest::of(into, done);
            let op = Op::Read { fd, at: at + done as u64, into: Pieces::of(rest.iovecs()), cached };
            // SAFETY: the pieces are borrowed, writable, by this future, and the descriptor by `self`.
            match unsafe { Operation::new(op) }.await {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(moved) => done += moved as usize,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes everything, going on after short writes.
    #[allow(unsafe_code)]
    async fn put(&self, at: u64, from: &Segments<'_>, durable: bool) -> io::Result<()> {
        let fd = match &self.backing {
            Backing::Sim(open) => {
                open.file.write(at, from).await?;
                return if durable { open.file.sync().await } else { Ok(()) };
            }
            Backing::Real(fd) => fd.as_raw_fd(),
        };
        let mut done = 0;
        while done < from.len() {
            let rest = Rest::of(from, done);
            let op = Op::Write { fd, at: at + done as u64, from: Pieces::of(rest.iovecs()), durable };
            // SAFETY: the pieces are borrowed by this future, and the descriptor by `self`.
            match unsafe { Operation::new(op) }.await {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(moved) => done += moved as usize,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    #[allow(unsafe_code)]
    async fn sync_real(&self, fd: &OwnedFd) -> io::Result<()> {
        loop {
            // SAFETY: no memory is named; `self` keeps the descriptor.
            match unsafe { Operation::new(Op::SyncData { fd: fd.as_raw_fd() }) }.await {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => return result.map(|_| ()),
            }
        }
    }

    /// Makes the content durable, and as much of the metadata as reading it back needs (`fdatasync`).
    ///
    /// After a failure the kernel may have dropped the pages: what was written since the last success is unknown.
    pub async fn sync_data(&self) -> io::Result<()> {
        match &self.backing {
            Backing::Real(fd) => self.sync_real(fd).await,
            Backing::Sim(open) => open.file.sync().await,
        }
    }

    /// Makes the name of the file durable: syncs it and the directory it is in.
    pub async fn sync_entry(&self) -> io::Result<()> {
        let (fd, path) = match &self.backing {
            Backing::Real(fd) => (Arc::clone(fd), self.path.clone()),
            Backing::Sim(open) => return open.file.sync().await,
        };
        on_worker(move || {
            rustix::fs::fsync(fd)?;
            let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            std::fs::File::open(parent)?.sync_all()
        })
        .await
    }

    /// Gives the blocks of a range back; it reads as zero. `Unsupported` where the file system or device cannot.
    pub async fn punch_hole(&self, at: u64, length: u64) -> io::Result<()> {
        self.allocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, at, length).await
    }

    /// Makes a range read as zero and keeps its blocks. `Unsupported` where the file system or device cannot.
    pub async fn zero_range(&self, at: u64, length: u64) -> io::Result<()> {
        self.allocate(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, at, length).await
    }

    /// Gives every byte of a range a place on the medium (`fallocate`), growing the file where needed.
    pub async fn reserve(&self, at: u64, length: u64) -> io::Result<()> {
        self.allocate(0, at, length).await
    }

    #[allow(unsafe_code)]
    async fn allocate(&self, mode: i32, at: u64, length: u64) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        let fd = match &self.backing {
            Backing::Sim(open) => return open.file.allocate(mode == 0, at, length).await,
            Backing::Real(fd) => fd.as_raw_fd(),
        };
        if at.checked_add(length).is_none_or(|end| i64::try_from(end).is_err()) {
            return Err(ErrorKind::InvalidInput.into());
        }
        loop {
            // SAFETY: no memory is named; `self` keeps the descriptor.
            match unsafe { Operation::new(Op::Allocate { fd, mode, at, length }) }.await {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(calls::unsupported(error)),
                Ok(_) => return Ok(()),
            }
        }
    }

    /// Tells a block device that the content of a range is not needed (`BLKDISCARD`); what it reads as is undefined.
    /// `Unsupported` where it cannot, `InvalidInput` on a regular file.
    pub async fn discard(&self, at: u64, length: u64) -> io::Result<()> {
        if self.kind != Kind::Block {
            return Err(ErrorKind::InvalidInput.into());
        }
        match &self.backing {
            Backing::Sim(open) => open.file.allocate(false, at, length).await,
            Backing::Real(fd) => {
                let fd = Arc::clone(fd);
                on_worker(move || calls::discard(fd.as_fd(), at, length)).await
            }
        }
    }

    /// Length in bytes.
    pub async fn length(&self) -> io::Result<u64> {
        match &self.backing {
            Backing::Sim(open) => Ok(open.file.length()),
            Backing::Real(fd) => {
                let (fd, kind) = (Arc::clone(fd), self.kind);
                on_worker(move || open::length(&fd, kind)).await
            }
        }
    }

    /// Cuts or grows a regular file; new bytes read as zero. `InvalidInput` on a block device.
    pub async fn set_length(&self, bytes: u64) -> io::Result<()> {
        match &self.backing {
            Backing::Sim(open) => {
                open.file.set_length(bytes).await;
                Ok(())
            }
            Backing::Real(fd) => {
                let fd = Arc::clone(fd);
                on_worker(move || Ok(rustix::fs::ftruncate(fd, bytes)?)).await
            }
        }
    }

    /// What is at byte `at`, and how far. A block device, and a file system that keeps no record, are all data.
    /// `at` must be below the length, else `InvalidInput`.
    pub async fn stretch(&self, at: u64) -> io::Result<Stretch> {
        match &self.backing {
            Backing::Sim(open) => open.file.stretch(at),
            Backing::Real(fd) => {
                let (fd, kind) = (Arc::clone(fd), self.kind);
                on_worker(move || calls::stretch(fd.as_fd(), kind, at)).await
            }
        }
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let Backing::Real(fd) = &self.backing else { return };
        // The kernel may keep the file for a moment longer: the lock is given back now.
        let _ = rustix::fs::flock(fd, rustix::fs::FlockOperation::Unlock);
        Lane::try_with(|lane| lane.driver.borrow_mut().release_file(fd.as_raw_fd()));
    }
}

impl std::fmt::Debug for File {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("File").field("path", &self.path).field("alignment", &self.alignment).finish()
    }
}

/// What is left of a transfer: all of it, without a copy of the list, when nothing is done yet.
enum Rest<'a, 'b> {
    All(&'b Segments<'a>),
    Part(Segments<'a>),
}

impl<'a, 'b> Rest<'a, 'b> {
    #[inline]
    fn of(whole: &'b Segments<'a>, done: usize) -> Self {
        match done {
            0 => Rest::All(whole),
            _ => Rest::Part(whole.slice(done, whole.len() - done)),
        }
    }

    #[inline]
    fn iovecs(&self) -> &[libc::iovec] {
        match self {
            Rest::All(whole) => whole.iovecs(),
            Rest::Part(part) => part.iovecs(),
        }
    }
}

#[cfg(test)]
mod tests;
