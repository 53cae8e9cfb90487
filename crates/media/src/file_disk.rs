//! [`FileDisk`]: a disk on a regular file or a block device.

use std::cell::Cell;
use std::fmt;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use block::{
    Buffer, Disk, DiskError, Extent, Extents, Generation, Io, Kind, MediumFault, SECTOR_BYTES, Safe, Sector,
    Segments, SegmentsMut, Shape, check_range,
};
use lane::fs::{Direct, File, Kind as FileKind, Lock, Open};

use crate::exclusion::Exclusion;

/// Most bytes of zeroes written at a time where the medium cannot zero by itself.
const ZERO_BYTES: u64 = 1 << 20;

/// How to open a medium.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Refuses everything that changes it.
    pub read_only: bool,
    /// Past the page cache or through it.
    pub direct: Direct,
    /// Who else may have it open. With [`Lock::None`] on a read-only medium it may change under the reader.
    pub lock: Lock,
}

/// Why a medium could not be opened, created or grown.
#[derive(Debug, thiserror::Error)]
pub enum MediaError {
    /// Another process (named) has it.
    #[error("{0}")]
    InUse(io::Error),
    /// The operating system said no.
    #[error("{}: {source}", path.display())]
    Io {
        /// The medium.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// A disk never shrinks.
    #[error("{}: has {has} sectors, cannot be made smaller ({wanted})", path.display())]
    Smaller {
        /// The medium.
        path: PathBuf,
        /// Sectors it has.
        has: u64,
        /// Sectors asked for.
        wanted: u64,
    },
}

/// What carries the I/O of a medium: for `pool show`, the log and benchmarks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InUse {
    /// Driver of the lane: `io_uring`, `threads` or `sim`.
    pub engine: &'static str,
    /// Past the page cache.
    pub direct: bool,
    /// The lane has registered buffers.
    pub registered: bool,
}

impl fmt::Display for InUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cache = if self.direct { "direct" } else { "buffered" };
        let memory = if self.registered { "registered buffers" } else { "plain buffers" };
        write!(f, "{}, {cache}, {memory}", self.engine)
    }
}

/// What a medium has done since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Reads that succeeded.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes that succeeded, compare-and-writes among them.
    pub writes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Ranges zeroed or unmapped.
    pub zeroes: u64,
    /// Flushes that succeeded.
    pub flushes: u64,
    /// Operations that failed, refused ones (range, rights, miscompare) among them.
    pub failed: u64,
}

impl Counters {
    fn wrote(&mut self, bytes: usize) {
        self.writes += 1;
        self.written_bytes += bytes as u64;
    }
}

/// A regular file or block device as a disk. After a failed flush it is halted until it is opened again.
pub struct FileDisk {
    file: File,
    sectors: Cell<u64>,
    halted: Cell<bool>,
    /// The file system has not refused to punch holes.
    punches: Cell<bool>,
    exclusion: Exclusion,
    counters: Cell<Counters>,
}

/// Opens an existing file or block device.
pub async fn open(path: impl AsRef<Path>, options: Options) -> Result<Rc<FileDisk>, MediaError> {
    open_with(path.as_ref(), options, None).await
}

/// Makes a new sparse file of `sectors` sectors and opens it. The file must not exist; its directory entry is durable
/// when this returns.
pub async fn create(
    path: impl AsRef<Path>,
    sectors: u64,
    options: Options,
) -> Result<Rc<FileDisk>, MediaError> {
    open_with(path.as_ref(), options, Some(sectors)).await
}

async fn open_with(path: &Path, options: Options, new: Option<u64>) -> Result<Rc<FileDisk>, MediaError> {
    let create_bytes = match new {
        Some(sectors) => Some(bytes_of(sectors).map_err(|source| failed(path, source))?),
        None => None,
    };
    let Options { read_only, direct, lock } = options;
    let how = Open { read_only, direct, lock, create_bytes, mode: 0 };
    let opened = async {
        let file = File::open(path, &how).await?;
        if new.is_some() {
            file.sync_entry().await?;
        }
        let sectors = file.length().await? / SECTOR_BYTES;
        Ok(FileDisk {
            file,
            sectors: Cell::new(sectors),
            halted: Cell::new(false),
            punches: Cell::new(true),
            exclusion: Exclusion::default(),
            counters: Cell::default(),
        })
    };
    let disk = opened.await.map_err(|source: io::Error| match source.kind() {
        ErrorKind::ResourceBusy => MediaError::InUse(source),
        _ => failed(path, source),
    })?;
    tracing::info!(path = %path.display(), sectors = disk.sectors.get(), engine = %disk.in_use(), "medium opened");
    Ok(Rc::new(disk))
}

fn failed(path: &Path, source: io::Error) -> MediaError {
    MediaError::Io { path: path.to_owned(), source }
}

fn bytes_of(sectors: u64) -> io::Result<u64> {
    sectors
        .checked_mul(SECTOR_BYTES)
        .filter(|b| i64::try_from(*b).is_ok())
        .ok_or_else(|| ErrorKind::FileTooLarge.into())
}

/// What the kernel says, in the words of a disk.
fn disk_error(error: io::Error, at: Sector) -> DiskError {
    match error.raw_os_error() {
        Some(5 | 61 | 74 | 84 | 117) => {
            // EIO, ENODATA, EBADMSG, EILSEQ, EUCLEAN: the medium itself.
            DiskError::Medium(MediumFault { at, what: "the device reports an I/O error" })
        }
        Some(6 | 19 | 123) => DiskError::Gone, // ENXIO, ENODEV, ENOMEDIUM
        Some(30) => DiskError::ReadOnly,       // EROFS
        Some(122) => DiskError::NoSpace,       // EDQUOT
        _ if error.kind() == ErrorKind::UnexpectedEof => {
            DiskError::Medium(MediumFault { at, what: "the file is shorter than it was" })
        }
        _ => DiskError::from(error),
    }
}

impl FileDisk {
    /// What carries its I/O.
    pub fn in_use(&self) -> InUse {
        let lane = lane::in_use();
        InUse { engine: lane.engine, direct: self.file.is_direct(), registered: lane.registered }
    }

    /// What it has done since it was opened.
    pub fn counters(&self) -> Counters {
        self.counters.get()
    }

    #[inline]
    fn counted(
        &self,
        result: Result<(), DiskError>,
        success: impl FnOnce(&mut Counters),
    ) -> Result<(), DiskError> {
        let mut counters = self.counters.get();
        match &result {
            Ok(()) => success(&mut counters),
            Err(_) => counters.failed += 1,
        }
        self.counters.set(counters);
        result
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// It is a block device.
    pub fn is_device(&self) -> bool {
        self.file.kind() == FileKind::Block
    }

    /// Makes a file `sectors` sectors long, or takes note that a device has grown so far. Durable when this returns.
    pub async fn grow(&self, sectors: u64) -> Result<(), MediaError> {
        let path = self.file.path();
        let has = self.sectors.get();
        if sectors < has {
            return Err(MediaError::Smaller { path: path.to_owned(), has, wanted: sectors });
        }
        let grown = async {
            // Whole units, so that the last sectors can be reached past the page cache too.
            let bytes = bytes_of(sectors)?.next_multiple_of(self.unit());
            if self.is_device() {
                if self.file.length().await? < bytes {
                    return Err(io::Error::new(ErrorKind::StorageFull, "the device is smaller"));
                }
                return Ok(());
            }
            if self.file.length().await? < bytes {
                self.file.set_length(bytes).await?;
            }
            self.file.sync_data().await
        };
        grown.await.map_err(|source| failed(path, source))?;
        self.sectors.set(self.sectors.get().max(sectors));
        Ok(())
    }

    fn check(&self, at: Sector, bytes: usize) -> Result<(u64, u64), DiskError> {
        assert!((bytes as u64).is_multiple_of(SECTOR_BYTES), "segments are whole sectors");
        self.check_count(at, bytes as u64 / SECTOR_BYTES)
    }

    fn check_count(&self, at: Sector, count: u64) -> Result<(u64, u64), DiskError> {
        check_range(self.sectors.get(), at, count)?;
        Ok((at.bytes(), at.plus(count).bytes()))
    }

    fn check_writable(&self) -> Result<(), DiskError> {
        match (self.file.read_only(), self.halted.get()) {
            (true, _) => Err(DiskError::ReadOnly),
            (_, true) => Err(DiskError::Halted),
            _ => Ok(()),
        }
    }

    /// The unit of transfers, in bytes.
    fn unit(&self) -> u64 {
        u64::from(self.file.alignment().offset)
    }

    /// The bytes `from..to`, widened to whole units.
    fn widened(&self, from: u64, to: u64) -> (u64, u64) {
        (from - from % self.unit(), to.next_multiple_of(self.unit()))
    }

    async fn read_now(&self, at: Sector, into: &SegmentsMut<'_>) -> Result<(), DiskError> {
        let (from, to) = self.check(at, into.len())?;
        let _inside = self.exclusion.enter(from, to).await;
        self.file.read_at(from, into).await.map_err(|e| disk_error(e, at))
    }

    async fn write_now(&self, at: Sector, data: &Segments<'_>, safe: Safe) -> Result<(), DiskError> {
        let (from, to) = self.check(at, data.len())?;
        self.check_writable()?;
        let durable = safe == Safe::OnReturn;
        let wide = self.widened(from, to);
        if wide == (from, to) {
            let _inside = self.exclusion.enter(from, to).await;
            return self
                .file
                .write_at(from, data, durable)
                .await
                .map_err(|e| self.write_failed(e, from, durable));
        }
        // Boxed, as all that is rare: the future of the common way stays small.
        Box::pin(async {
            let _alone = self.exclusion.alone(wide.0, wide.1).await;
            self.write_inside(from, wide, data, durable).await
        })
        .await
    }

    /// Writes part of whole units; the caller has them alone.
    async fn write_inside(
        &self,
        from: u64,
        wide: (u64, u64),
        data: &Segments<'_>,
        durable: bool,
    ) -> Result<(), DiskError> {
        let at = Sector::at_byte(from);
        let mut whole = Buffer::for_overwrite((wide.1 - wide.0) as usize);
        self.file.read_at(wide.0, &SegmentsMut::new(&mut whole)).await.map_err(|e| disk_error(e, at))?;
        let head = (from - wide.0) as usize;
        data.copy_to(0, &mut whole[head..head + data.len()]);
        let written = self.file.write_at(wide.0, &Segments::new(&whole), durable).await;
        written.map_err(|e| self.write_failed(e, from, durable))
    }

    /// A durable write that failed is a failed flush: what else the kernel dropped with it is unknown.
    fn write_failed(&self, error: io::Error, from: u64, durable: bool) -> DiskError {
        let error = disk_error(error, Sector::at_byte(from));
        if durable && !matches!(error, DiskError::NoSpace) {
            self.halt(&error);
        }
        error
    }

    fn halt(&self, error: &DiskError) {
        if !self.halted.replace(true) {
            tracing::error!(path = %self.path().display(), %error, "flush failed: the medium is halted until reopened");
        }
    }

    async fn flush_now(&self) -> Result<(), DiskError> {
        if self.file.read_only() {
            return Ok(());
        }
        self.check_writable()?;
        self.file.sync_data().await.map_err(|error| {
            let error = disk_error(error, Sector(0));
            self.halt(&error);
            error
        })
    }

    async fn unmap_now(&self, at: Sector, count: u64) -> Result<(), DiskError> {
        if !self.is_device() && self.punches.get() {
            return self.zero_now(at, count, true).await;
        }
        let (from, to) = self.check_count(at, count)?;
        self.check_writable()?;
        if !self.is_device() {
            return Ok(()); // a hint; writing zeroes would take more room, not less
        }
        let _inside = self.exclusion.enter(from, to).await;
        match self.file.discard(from, to - from).await {
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()), // a hint
            other => other.map_err(|e| disk_error(e, at)),
        }
    }

    async fn zero_now(&self, at: Sector, count: u64, may_free: bool) -> Result<(), DiskError> {
        let (from, to) = self.check_count(at, count)?;
        self.check_writable()?;
        if count == 0 {
            return Ok(());
        }
        let inside = self.exclusion.enter(from, to).await;
        if may_free && self.punches.get() {
            match self.file.punch_hole(from, to - from).await {
                Err(error) if error.kind() == ErrorKind::Unsupported => self.punches.set(false),
                other => return other.map_err(|e| disk_error(e, at)),
            }
        }
        match self.file.zero_range(from, to - from).await {
            Err(error) if error.kind() == ErrorKind::Unsupported => {}
            other => return other.map_err(|e| disk_error(e, at)),
        }
        drop(inside);
        let zeroes = Buffer::zeroed((to - from).min(ZERO_BYTES) as usize);
        let mut byte = from;
        while byte < to {
            // Ends on a multiple of the piece, so that only the first and the last can be partial units.
            let end = (byte + 1).next_multiple_of(ZERO_BYTES).min(to);
            let piece = Segments::new(&zeroes[..(end - byte).min(zeroes.len() as u64) as usize]);
            self.write_now(Sector::at_byte(byte), &piece, Safe::AtNextFlush).await?;
            byte += piece.len() as u64;
        }
        Ok(())
    }

    async fn compare_and_write_now(
        &self,
        at: Sector,
        expected: &Segments<'_>,
        new: &Segments<'_>,
    ) -> Result<(), DiskError> {
        let (from, to) = self.check(at, new.len())?;
        self.check_writable()?;
        let wide = self.widened(from, to);
        let _alone = self.exclusion.alone(wide.0, wide.1).await;
        let mut found = Buffer::for_overwrite(expected.len());
        self.file.read_at(from, &SegmentsMut::new(&mut found)).await.map_err(|e| disk_error(e, at))?;
        if let Some(byte) = first_difference(expected, &found) {
            return Err(DiskError::Miscompare { at_bytes: byte });
        }
        if wide == (from, to) {
            return self.file.write_at(from, new, false).await.map_err(|e| disk_error(e, at));
        }
        self.write_inside(from, wide, new, false).await
    }
}

fn first_difference(expected: &Segments<'_>, found: &[u8]) -> Option<u64> {
    let (mut place, mut differs) = (0, None);
    expected.each(|piece| {
        let other = &found[place..place + piece.len()];
        if differs.is_none() && piece != other {
            differs = piece.iter().zip(other).position(|(a, b)| a != b).map(|n| (place + n) as u64);
        }
        place += piece.len();
    });
    differs
}

impl Disk for FileDisk {
    fn shape(&self) -> Shape {
        let alignment = self.file.alignment();
        Shape {
            sectors: self.sectors.get(),
            physical_block_bytes: alignment.offset.max(SECTOR_BYTES as u32),
            read_only: self.file.read_only(),
            // A punched file reads as zero; what a discarded device reads as, nobody promises.
            unmap_reads_zero: !self.is_device() && self.punches.get(),
            memory_align: alignment.memory,
        }
    }

    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        Box::pin(async move {
            let result = self.read_now(at, into).await;
            self.counted(result, |c| {
                (c.reads, c.read_bytes) = (c.reads + 1, c.read_bytes + into.len() as u64)
            })
        })
    }

    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a> {
        Box::pin(async move {
            let result = self.write_now(at, from, safe).await;
            self.counted(result, |c| c.wrote(from.len()))
        })
    }

    fn zero(&self, at: Sector, count: u64, may_free: bool) -> Io<'_> {
        Box::pin(async move {
            let result = self.zero_now(at, count, may_free).await;
            self.counted(result, |c| c.zeroes += 1)
        })
    }

    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        Box::pin(async move {
            let result = self.unmap_now(at, count).await;
            self.counted(result, |c| c.zeroes += 1)
        })
    }

    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        Box::pin(async move {
            let (from, to) = self.check_count(at, count)?;
            if since.is_some() {
                return Err(DiskError::UnknownGeneration);
            }
            let mut byte = from;
            while byte < to {
                let stretch = self.file.stretch(byte).await.map_err(|e| disk_error(e, at))?;
                // A sector that is partly data is data.
                let end = match stretch.data {
                    true => stretch.end.next_multiple_of(SECTOR_BYTES),
                    false => stretch.end - stretch.end % SECTOR_BYTES,
                };
                let (end, kind) = match (end > byte, stretch.data) {
                    (true, true) => (end, Kind::Data),
                    (true, false) => (end, Kind::Hole),
                    (false, _) => (byte + SECTOR_BYTES, Kind::Data),
                };
                let end = end.min(to);
                let count = (end - byte) / SECTOR_BYTES;
                if !out.push(Extent { at: Sector::at_byte(byte), count, kind, changed: true }) {
                    break;
                }
                byte = end;
            }
            Ok(())
        })
    }

    fn compare_and_write<'a>(
        &'a self,
        at: Sector,
        expected: &'a Segments<'a>,
        new: &'a Segments<'a>,
    ) -> Io<'a> {
        assert_eq!(expected.len(), new.len(), "both sides of a compare-and-write are equally long");
        Box::pin(async move {
            let result = self.compare_and_write_now(at, expected, new).await;
            self.counted(result, |c| c.wrote(new.len()))
        })
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(async move {
            let result = self.flush_now().await;
            self.counted(result, |c| c.flushes += 1)
        })
    }
}
