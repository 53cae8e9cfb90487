//! Virtqueues under fuzz: any rings, chains and requests whatever in the memory of a guest. Used by the tests and by a fuzz
//! target.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use block::MemoryDisk;
use block::fuzz::{Edit, edits};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use zerocopy::IntoBytes;

use super::Device;
use super::bell::Bell;
use super::blk::Blk;
use super::inflight::Inflight;
use super::memory::Memory;
use super::ring::{Addresses, Ring, Shared};
use crate::request::Counts;

/// Guest memory: little enough for a fuzzer to find its places.
const MEMORY_BYTES: u64 = 1 << 20;
/// Where the front end would have it.
const USER: u64 = 0x7f00_0000_0000;
const SECTORS: u64 = 2048;
/// What an edit may be of, in the order of its places. The last one is the in-flight memory.
const PLACES: [u64; 6] = [TABLE, AVAILABLE, USED, INDIRECT, HEADERS, DATA];
const PIECE_BYTES: usize = 4096;
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const INDIRECT: u64 = 0x4000;
const HEADERS: u64 = 0x5000;
const DATA: u64 = 0x8000;

/// Bits of an input's first byte.
mod option {
    pub const EVENT_IDX: u8 = 1;
    pub const READ_ONLY: u8 = 2;
    pub const TRACKED: u8 = 4;
    pub const MEMORY_GOES: u8 = 8;
    pub const SWITCHED_CACHE: u8 = 16;
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT_FLAG: u16 = 4;
/// `VIRTIO_BLK_F_FLUSH` and `VIRTIO_BLK_F_CONFIG_WCE`.
const CACHE_FEATURES: u64 = 1 << 9 | 1 << 11;

/// A guest and its device.
struct Guest {
    memory: Rc<Memory>,
    shared: Rc<Shared<Blk>>,
    counts: Rc<Counts>,
    /// What is tracked, and the file that it lies in.
    kept: Option<(Rc<Inflight>, OwnedFd)>,
}

impl Guest {
    fn new(options: u8) -> Option<Self> {
        let file = rustix::fs::memfd_create("fuzz", MemfdFlags::CLOEXEC).ok()?;
        rustix::fs::ftruncate(&file, MEMORY_BYTES).ok()?;
        let region = VhostUserMemoryRegion::new(0, MEMORY_BYTES, USER, 0);
        let memory = Memory::table(vec![(region, file)]).ok()?;
        let counts = Counts::new();
        let disk = Rc::new(MemoryDisk::new(SECTORS));
        let read_only = options & option::READ_ONLY != 0;
        let device = Blk::new("fuzz".into(), disk, read_only, "serial".into(), Rc::clone(&counts));
        device.begin();
        device.negotiated(if options & option::SWITCHED_CACHE != 0 { CACHE_FEATURES } else { 0 });
        let shared = Shared::new(device);
        shared.event_idx.set(options & option::EVENT_IDX != 0);
        shared.set_memory(Rc::clone(&memory));
        let mut kept = None;
        if options & option::TRACKED != 0 {
            let (about, file) = Inflight::create(1, 128).ok()?;
            let whole = Inflight::open(&about, file.try_clone().ok()?).ok()?;
            *shared.inflight.borrow_mut() = Some(Rc::clone(&whole));
            kept = Some((whole, file));
        }
        let guest = Self { memory, shared, counts, kept };
        guest.ask();
        Some(guest)
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        let put = self.memory.copy_to(at, bytes);
        assert!(put.is_ok(), "it lies in memory");
    }

    fn descriptor(&self, table: u64, index: u16, (at, length): (u64, u32), flags: u16) {
        let next = if flags & NEXT != 0 { index + 1 } else { 0 };
        let bytes = [at.as_bytes(), length.as_bytes(), flags.as_bytes(), next.as_bytes()].concat();
        self.put(table + 16 * u64::from(index), &bytes);
    }

    /// A header and its place for the status, 32 bytes apart.
    fn header(&self, index: u64, kind: u32, sector: u64) -> u64 {
        let at = HEADERS + 32 * index;
        self.put(at, &[kind.as_bytes(), 0u32.as_bytes(), sector.as_bytes(), &[0xff]].concat());
        at
    }

    /// Good requests of every kind, all of them available.
    fn ask(&self) {
        let read = self.header(0, 0, 0);
        self.descriptor(TABLE, 0, (read, 16), NEXT);
        self.descriptor(TABLE, 1, (DATA, 4096), NEXT | WRITE);
        self.descriptor(TABLE, 2, (read + 16, 1), WRITE);
        let write = self.header(1, 1, 8);
        self.descriptor(TABLE, 3, (INDIRECT, 48), INDIRECT_FLAG);
        self.descriptor(INDIRECT, 0, (write, 16), NEXT);
        self.descriptor(INDIRECT, 1, (DATA + 4096, 1024), NEXT);
        self.descriptor(INDIRECT, 2, (write + 16, 1), WRITE);
        let zero = self.header(2, 13, 0);
        self.put(DATA, &[24u64.as_bytes(), 8u32.as_bytes(), 1u32.as_bytes()].concat());
        self.descriptor(TABLE, 4, (zero, 16), NEXT);
        self.descriptor(TABLE, 5, (DATA, 16), NEXT);
        self.descriptor(TABLE, 6, (zero + 16, 1), WRITE);
        let flush = self.header(3, 4, 0);
        self.descriptor(TABLE, 7, (flush, 16), NEXT);
        self.descriptor(TABLE, 8, (flush + 16, 1), WRITE);
        let identify = self.header(4, 8, 0);
        self.descriptor(TABLE, 9, (identify, 16), NEXT);
        self.descriptor(TABLE, 10, (DATA + 512, 20), NEXT | WRITE);
        self.descriptor(TABLE, 11, (identify + 16, 1), WRITE);
        self.put(AVAILABLE, [0u16, 5, 0, 3, 4, 7, 9].as_bytes());
    }

    fn edit(&self, edit: &Edit<'_>) {
        let mut piece = [0; PIECE_BYTES];
        let place = usize::from(edit.place) % (PLACES.len() + 1);
        match (PLACES.get(place), &self.kept) {
            (Some(at), _) => {
                let got = self.memory.copy_from(*at, &mut piece);
                assert!(got.is_ok(), "it lies in memory");
                edit.apply(&mut piece);
                self.put(*at, &piece);
            }
            (None, Some((_, file))) => {
                let count = rustix::io::pread(file, &mut piece, 0).unwrap_or(0);
                edit.apply(&mut piece[..count]);
                let put = rustix::io::pwrite(file, &piece[..count], 0);
                assert_eq!(put, Ok(count));
            }
            (None, None) => {}
        }
    }

    /// Serves the queue until all that was taken is answered.
    async fn serve(&self, size: u32, memory_goes: bool) {
        let bell = || eventfd(1, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let (Ok(kick), Ok(call)) = (bell(), bell()) else { return };
        let (Ok(again), Ok(call)) = (kick.try_clone(), Bell::new(call)) else { return };
        let ring = Ring::new(0, &self.shared);
        ring.set_size(size);
        let (table, available, used) = (USER + TABLE, USER + AVAILABLE, USER + USED);
        let set = ring.set_addresses(Addresses { table, available, used, log: None });
        assert!(set.is_ok(), "it has not begun");
        ring.set_call(Some(call));
        ring.enable(true);
        if ring.start(kick).is_ok() {
            turns().await;
            if memory_goes {
                self.shared.set_memory(Memory::none());
                assert!(ring.place().is_err());
                let _ = rustix::io::write(&again, 1u64.as_bytes()); // full: rung
                turns().await;
                self.shared.set_memory(Rc::clone(&self.memory));
                assert!(ring.place().is_ok(), "memory is back");
                turns().await;
            }
        }
        ring.close();
        ring.idle().await;
        assert_eq!(self.counts.in_flight(), 0, "every request was answered");
        assert!(self.shared.is_idle(), "and gave back what it held");
    }

    fn status(&self, index: u64) -> u8 {
        let mut status = [0xff];
        let got = self.memory.copy_from(HEADERS + 32 * index + 16, &mut status);
        assert!(got.is_ok(), "it lies in memory");
        status[0]
    }
}

async fn turns() {
    for _ in 0..24 {
        lane::yield_now().await;
    }
}

/// Gives a queue to a device, and insists that all that was taken from it comes to an end, and that a well-behaved guest is
/// served afterwards.
///
/// The first byte has options (event index, read-only, tracked in flight, memory that goes and comes back, a cache that
/// can be switched), the second the size of the queue as a power of two. The rest are [`edits`] of good rings: of table, available
/// ring, used ring, indirect table, headers, data, in-flight memory.
pub fn fuzz_vhost_ring(input: &[u8]) {
    let Some(([options, size], rest)) = input.split_first_chunk::<2>() else { return };
    lane::block_on(async {
        let Some(guest) = Guest::new(*options) else { return };
        edits(rest).for_each(|edit| guest.edit(&edit));
        guest.serve(1 << (size % 8), options & option::MEMORY_GOES != 0).await;
        let Some(next) = Guest::new(0) else { return };
        next.serve(128, false).await;
        assert!((0..5).all(|index| next.status(index) == 0), "the next guest is served");
    });
}
