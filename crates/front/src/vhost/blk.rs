//! virtio-blk (virtio 1.2, section 5.2) over a [`Disk`].

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use block::{Disk, DiskError, SECTOR_BYTES, Safe, Sector, check_range};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::Device;
use super::chain::Chain;
use super::inflight::Inflight;
use crate::request::{Counts, Operation, Request};

/// Queues at most: one per processor of the guest.
const QUEUES: u16 = 256;
/// Pieces of data in a request: with header and status as many as QEMU's queues of 128 hold.
const SEGMENTS_MAX: u32 = 126;
/// A larger request is moved in parts of this many bytes, so that a disk that must copy holds no more.
const PART_BYTES: usize = 8 << 20;
/// Most bytes of one request: as much as the firmware of a guest, which knows of no limits, asks for at once.
const REQUEST_BYTES_MAX: usize = 1 << 30;
/// Most sectors of one range to be discarded or zeroed: 2 GiB.
const RANGE_SECTORS_MAX: u32 = 1 << 22;
/// Most ranges of one request.
const RANGES_MAX: u32 = 32;
/// Bytes of an answer to GET_ID.
const ID_BYTES: usize = 20;

/// `VIRTIO_BLK_F_*`.
pub(crate) mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// `VIRTIO_BLK_T_*`.
mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`.
const UNMAP: u32 = 1;

/// `VIRTIO_BLK_S_*`.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
#[repr(u8)]
enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// `struct virtio_blk_config`, as far as it concerns us.
#[derive(Copy, Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Config {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    geometry: [u8; 4],
    blk_size: U32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_blocks: U16,
    opt_io_blocks: U32,
    write_cache: u8,
    unused: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

const _: () = assert!(size_of::<Config>() == 60);
/// The one byte of the configuration that a guest may write.
const WRITE_CACHE: usize = 32;
const _: () = assert!(std::mem::offset_of!(Config, write_cache) == WRITE_CACHE);

/// What every request begins with.
#[derive(Copy, Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    kind: U32,
    reserved: U32,
    sector: U64,
}

const HEADER_BYTES: usize = 16;
const _: () = assert!(size_of::<Header>() == HEADER_BYTES);

/// A range to be discarded or zeroed.
#[derive(Copy, Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Range {
    sector: U64,
    sectors: U32,
    flags: U32,
}

const RANGE_BYTES: usize = 16;
const _: () = assert!(size_of::<Range>() == RANGE_BYTES);

/// Why a request is not done.
enum Failed {
    /// The request itself is wrong.
    Malformed,
    Unsupported,
    Disk(DiskError),
}

impl From<DiskError> for Failed {
    fn from(error: DiskError) -> Self {
        Self::Disk(error)
    }
}

/// What a guest is told; it knows no more than "does not work" and "is not there".
fn status(error: &DiskError) -> Status {
    match error {
        DiskError::OutOfRange
        | DiskError::ReadOnly
        | DiskError::Halted
        | DiskError::NoSpace
        | DiskError::Conflict
        | DiskError::Miscompare { .. }
        | DiskError::Medium(_)
        | DiskError::Io(_)
        | DiskError::Gone
        | DiskError::UnknownGeneration => Status::IoError,
    }
}

/// A disk as a virtio-blk device.
pub(crate) struct Blk {
    name: String,
    disk: Rc<dyn Disk>,
    read_only: bool,
    serial: String,
    counts: Rc<Counts>,
    features: Cell<u64>,
    /// The guest's wish: answered writes may wait for the next flush.
    write_cache: Cell<bool>,
    kept: RefCell<Option<Rc<Inflight>>>,
}

impl Blk {
    /// A device over `disk`; the first 20 bytes of `serial` are its identity.
    pub fn new(
        name: String,
        disk: Rc<dyn Disk>,
        read_only: bool,
        serial: String,
        counts: Rc<Counts>,
    ) -> Rc<Self> {
        Rc::new(Self {
            name,
            disk,
            read_only,
            serial,
            counts,
            features: Cell::new(0),
            write_cache: Cell::new(true),
            kept: RefCell::default(),
        })
    }

    pub fn disk(&self) -> &Rc<dyn Disk> {
        &self.disk
    }

    pub fn is_read_only(&self) -> bool {
        self.read_only || self.disk.shape().read_only
    }

    fn has(&self, feature: u64) -> bool {
        self.features.get() & feature != 0
    }

    /// When a write must be safe. A driver that cannot flush, and none that can switch the cache, gets none.
    fn safe(&self) -> Safe {
        let cached =
            if self.has(feature::CONFIG_WCE) { self.write_cache.get() } else { self.has(feature::FLUSH) };
        if cached { Safe::AtNextFlush } else { Safe::OnReturn }
    }

    async fn execute(&self, header: Header, chain: &Chain) -> (Operation, u64, Result<u32, Failed>) {
        let data = chain.into.bytes().saturating_sub(1);
        let sent = chain.out.bytes().saturating_sub(HEADER_BYTES);
        let sector = Sector(header.sector.get());
        let (operation, bytes) = match header.kind.get() {
            kind::IN => (Operation::Read, data as u64),
            kind::OUT => (Operation::Write, sent as u64),
            kind::FLUSH => (Operation::Flush, 0),
            kind::GET_ID => (Operation::Control, 0),
            kind::DISCARD => (Operation::Unmap, 0),
            kind::WRITE_ZEROES => (Operation::Zero, 0),
            _ => (Operation::Refused, 0),
        };
        let request = Request::begin(&self.counts, operation, bytes);
        let result = match operation {
            Operation::Read => self.read(sector, chain, data).await,
            Operation::Write => self.write(sector, chain, sent).await.map(|()| 0),
            Operation::Flush => self.disk.flush().await.map(|()| 0).map_err(Failed::Disk),
            Operation::Control => self.identify(chain, data),
            Operation::Unmap | Operation::Zero => self.ranges(operation, chain, sent).await.map(|()| 0),
            _ => Err(Failed::Unsupported),
        };
        match &result {
            Ok(_) => request.finish(Ok(())),
            Err(Failed::Disk(error)) => request.finish(Err(error)),
            Err(Failed::Malformed | Failed::Unsupported) => request.finish_well(false),
        }
        (operation, bytes, result)
    }

    fn check(&self, at: Sector, bytes: usize, writes: bool) -> Result<(), Failed> {
        if !(bytes as u64).is_multiple_of(SECTOR_BYTES) || bytes > REQUEST_BYTES_MAX {
            return Err(Failed::Malformed);
        }
        self.check_range(at, bytes as u64 / SECTOR_BYTES, writes)
    }

    fn check_range(&self, at: Sector, sectors: u64, writes: bool) -> Result<(), Failed> {
        if writes && self.is_read_only() {
            return Err(Failed::Disk(DiskError::ReadOnly));
        }
        Ok(check_range(self.disk.shape().sectors, at, sectors)?)
    }

    async fn read(&self, at: Sector, chain: &Chain, bytes: usize) -> Result<u32, Failed> {
        self.check(at, bytes, false)?;
        for from in (0..bytes).step_by(PART_BYTES) {
            let part = PART_BYTES.min(bytes - from);
            let into = chain.segments_mut(from, part).map_err(|_| Failed::Malformed)?;
            self.disk.read(at.plus(from as u64 / SECTOR_BYTES), &into).await?;
        }
        Ok(bytes as u32)
    }

    async fn write(&self, at: Sector, chain: &Chain, bytes: usize) -> Result<(), Failed> {
        self.check(at, bytes, true)?;
        for from in (0..bytes).step_by(PART_BYTES) {
            let part = PART_BYTES.min(bytes - from);
            let data = chain.segments(HEADER_BYTES + from, part).map_err(|_| Failed::Malformed)?;
            self.disk.write(at.plus(from as u64 / SECTOR_BYTES), &data, self.safe()).await?;
        }
        Ok(())
    }

    fn identify(&self, chain: &Chain, room: usize) -> Result<u32, Failed> {
        let mut id = [0; ID_BYTES];
        let length = self.serial.len().min(ID_BYTES);
        id[..length].copy_from_slice(&self.serial.as_bytes()[..length]);
        let given = room >= ID_BYTES && chain.give(0, &id);
        if given { Ok(ID_BYTES as u32) } else { Err(Failed::Malformed) }
    }

    async fn ranges(&self, operation: Operation, chain: &Chain, bytes: usize) -> Result<(), Failed> {
        let count = bytes / RANGE_BYTES;
        if !bytes.is_multiple_of(RANGE_BYTES) || count == 0 || count > RANGES_MAX as usize {
            return Err(Failed::Malformed);
        }
        // All of them are looked at before the first is done.
        let mut list = vec![Range::new_zeroed(); count];
        if !chain.take(HEADER_BYTES, list.as_mut_slice().as_mut_bytes()) {
            return Err(Failed::Malformed);
        }
        for range in &list {
            let flags = range.flags.get();
            if flags & !UNMAP != 0 || operation == Operation::Unmap && flags != 0 {
                return Err(Failed::Unsupported);
            }
            if range.sectors.get() > RANGE_SECTORS_MAX {
                return Err(Failed::Malformed);
            }
            self.check_range(Sector(range.sector.get()), range.sectors.get().into(), true)?;
        }
        for range in &list {
            let (at, sectors) = (Sector(range.sector.get()), u64::from(range.sectors.get()));
            match operation {
                Operation::Unmap => self.disk.unmap(at, sectors).await?,
                _ => self.disk.zero(at, sectors, range.flags.get() & UNMAP != 0).await?,
            }
        }
        if self.safe() == Safe::OnReturn { Ok(self.disk.flush().await?) } else { Ok(()) }
    }
}

impl Device for Blk {
    const PART_BYTES: usize = PART_BYTES;

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        use feature::{BLK_SIZE, CONFIG_WCE, DISCARD, FLUSH, MQ, RO, SEG_MAX, TOPOLOGY, WRITE_ZEROES};
        let always = SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY | CONFIG_WCE | MQ;
        always | if self.is_read_only() { RO } else { DISCARD | WRITE_ZEROES }
    }

    fn queues(&self) -> u16 {
        QUEUES
    }

    fn begin(&self) {
        self.features.set(0);
        self.write_cache.set(true);
        *self.kept.borrow_mut() = None;
    }

    fn negotiated(&self, features: u64) {
        self.features.set(features);
    }

    fn adopt(&self, kept: &Rc<Inflight>) {
        if let Some(on) = kept.write_cache() {
            self.write_cache.set(on);
        }
        *self.kept.borrow_mut() = Some(Rc::clone(kept));
    }

    fn config(&self) -> Vec<u8> {
        let shape = self.disk.shape();
        let physical = u64::from(shape.physical_block_bytes).max(SECTOR_BYTES);
        let per_block = physical / SECTOR_BYTES;
        let config = Config {
            capacity: shape.sectors.into(),
            seg_max: SEGMENTS_MAX.into(),
            blk_size: (SECTOR_BYTES as u32).into(),
            physical_block_exp: per_block.ilog2() as u8,
            min_io_blocks: u16::try_from(per_block).unwrap_or(1).into(),
            write_cache: self.write_cache.get().into(),
            num_queues: QUEUES.into(),
            max_discard_sectors: RANGE_SECTORS_MAX.into(),
            max_discard_seg: RANGES_MAX.into(),
            discard_sector_alignment: (per_block as u32).into(),
            max_write_zeroes_sectors: RANGE_SECTORS_MAX.into(),
            max_write_zeroes_seg: RANGES_MAX.into(),
            write_zeroes_may_unmap: 1,
            ..Config::new_zeroed()
        };
        config.as_bytes().to_vec()
    }

    fn set_config(&self, offset: usize, bytes: &[u8]) -> bool {
        let (WRITE_CACHE, [value @ 0..=1]) = (offset, bytes) else { return false };
        let on = *value == 1;
        self.write_cache.set(on);
        if let Some(kept) = &*self.kept.borrow() {
            kept.keep_write_cache(on);
        }
        true
    }

    async fn serve(&self, _queue: u16, chain: &Chain) -> u32 {
        let mut header = Header::new_zeroed();
        let room = chain.into.bytes();
        if room == 0 {
            return 0; // there is no place to say how it went
        }
        let (written, status) = if chain.take(0, header.as_mut_bytes()) {
            let (operation, bytes, result) = self.execute(header, chain).await;
            match result {
                Ok(written) => (written, Status::Ok),
                Err(Failed::Malformed) => (0, Status::IoError),
                Err(Failed::Unsupported) => (0, Status::Unsupported),
                Err(Failed::Disk(error)) => {
                    tracing::debug!(device = self.name, operation = operation.name(), bytes, %error, "failed");
                    (0, status(&error))
                }
            }
        } else {
            (0, Status::IoError)
        };
        // A driver may not count on bytes behind what was written, except for the status, which is always the last.
        let told = chain.give(room - 1, &[status as u8]);
        if !told {
            return 0;
        }
        if written as usize + 1 == room { written + 1 } else { written.max(1) }
    }
}
