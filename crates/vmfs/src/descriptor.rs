//! A file descriptor in memory: metadata and the bytes behind them.

use crate::format::{
    Address, Corrupt, Expected, FdAddress, FdMeta, InodeKind, LockBlock, LockKind, Zla, ensure, fd_layout,
    view,
};
use crate::resource::Sizes;
use crate::{Error, space::Space};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// FD, checked.
#[derive(Clone)]
pub(crate) struct Fd {
    pub meta: FdMeta,
    pub kind: InodeKind,
    pub zla: Zla,
    /// log2 of the unit of the block array.
    pub shift: u32,
    /// Everything behind the metadata: resident content, RDM record, or block array.
    pub tail: Vec<u8>,
    /// Offset of the block array in `tail`.
    array: usize,
}

impl Fd {
    /// Reads and checks the FD `address` at volume offset `at`.
    pub async fn load(space: &Space, sizes: &Sizes, address: FdAddress, at: u64) -> Result<Self, Error> {
        let mut raw = block::Buffer::zeroed(fd_layout::BYTES[sizes.layout()] as usize);
        space.read(at, &mut raw).await?;
        if let Some(lock) = view::<LockBlock>(&raw) {
            lock.check(LockKind::Descriptor, at)?;
        }
        Ok(Self::parse(sizes, address, at, &raw)?)
    }

    /// Checks the bytes of a whole FD.
    pub fn parse(sizes: &Sizes, address: FdAddress, at: u64, raw: &[u8]) -> Result<Self, Corrupt> {
        let layout = sizes.layout();
        let short =
            Corrupt { what: "FD", at, found: raw.len() as u64, expected: Expected::Words("a whole FD") };
        let meta_at = fd_layout::META[layout];
        let meta = raw.get(meta_at as usize..).and_then(view::<FdMeta>).ok_or(short.clone())?.clone();
        let (kind, zla) = meta.check(address, at + meta_at)?;
        let tail = raw.get(fd_layout::DATA[layout] as usize..).ok_or(short)?.to_vec();
        let array = (fd_layout::ARRAY[layout] - fd_layout::DATA[layout]) as usize;
        let shift = meta.block_bytes.get().trailing_zeros();
        let fd = Self { meta, kind, zla, shift, tail, array };
        fd.check_unit(sizes, at + meta_at)?;
        Ok(fd)
    }

    /// The unit fits what the array holds, and the length fits the content.
    fn check_unit(&self, sizes: &Sizes, at: u64) -> Result<(), Corrupt> {
        let unit = self.meta.block_bytes.get();
        let wanted = match self.zla {
            Zla::SubBlocks => sizes.sub_block,
            Zla::FileBlocks => sizes.block,
            // System files of sub-blocks never have pointer blocks; user files neither.
            Zla::Single | Zla::SinglePb2 | Zla::Double => sizes.block,
            Zla::None | Zla::Resident => unit,
        };
        ensure(unit == wanted, "block size of a file", at + 0x1C, unit, Expected::Value(wanted))?;
        if self.zla == Zla::Resident {
            let (length, limit) = (self.meta.length.get(), self.tail.len() as u64);
            ensure(length <= limit, "length of a resident file", at + 0x14, length, Expected::AtMost(limit))?;
        }
        Ok(())
    }

    /// Length (bytes).
    pub fn length(&self) -> u64 {
        self.meta.length.get()
    }

    /// Number of addresses in the array.
    pub fn slots(&self, sizes: &Sizes) -> u64 {
        ((self.tail.len() - self.array) / sizes.slot()) as u64
    }

    /// Units that the array can reach.
    pub fn capacity(&self, sizes: &Sizes) -> u64 {
        let (slots, per) = (self.slots(sizes), sizes.slots_per_pointer_block());
        match self.zla {
            Zla::None | Zla::Resident => 0,
            Zla::FileBlocks | Zla::SubBlocks => slots,
            Zla::Single | Zla::SinglePb2 => slots * per,
            Zla::Double => slots * per * per,
        }
    }

    /// Address `index` of the array; beyond its end: a hole.
    pub fn slot(&self, sizes: &Sizes, index: u64, at: u64) -> Result<Address, Corrupt> {
        let start = self.array as u64 + index * sizes.slot() as u64;
        match self.tail.get(start as usize..start as usize + sizes.slot()) {
            Some(bytes) => sizes.decode(bytes, at + fd_layout::DATA[sizes.layout()] + start),
            None => Ok(Address::Hole),
        }
    }

    /// Sets address `index` of the array (VMFS-3 and 5). Answers the 512-byte sector of `tail` that changed.
    pub fn set_slot(&mut self, index: u64, raw: u32) -> u32 {
        let start = self.array + index as usize * 4;
        self.tail[start..start + 4].copy_from_slice(&raw.to_le_bytes());
        (start / 512) as u32
    }
}

/// An inode of the volume, shared by all who have it open. Its FD's address changes when its descriptor is rewritten
/// in another place.
pub(crate) struct Node {
    pub address: Cell<FdAddress>,
    /// Volume offset of the FD.
    pub at: Cell<u64>,
    /// The directory it was found in.
    pub parent: Cell<Option<FdAddress>>,
    pub state: RefCell<NodeState>,
    /// Open handles; an open file is not removed.
    pub handles: Cell<u32>,
    /// Units for which blocks are being allocated, and who waits for them.
    pub allocating: RefCell<std::collections::BTreeSet<u64>>,
    pub allocated: lane::sync::Waiters,
    /// Blocks are being found in advance from this unit on; `u64::MAX`: nowhere.
    pub preallocating: Cell<u64>,
    /// Where a file that is written from front to back goes on: unit and block.
    pub goal: Cell<Option<(u64, u64)>>,
}

/// The truth in memory, and how far the device lags behind.
pub(crate) struct NodeState {
    pub fd: Fd,
    /// Length that the device has, when it is shorter than the truth.
    pub device_length: u64,
    /// To-be-zeroed blocks already cleared in pointers that are not on the device yet: its count is higher by this.
    pub tbz_unsettled: u64,
    /// Blocks given up in pointers that are not on the device yet: its count is higher by this.
    pub blocks_unsettled: u64,
    pub dirty_meta: bool,
    /// One bit for each changed sector of `fd.tail`.
    pub dirty_tail: u32,
}

impl Node {
    pub fn new(address: FdAddress, at: u64, parent: Option<FdAddress>, fd: Fd) -> Rc<Self> {
        let device_length = fd.length();
        Rc::new(Self {
            address: Cell::new(address),
            at: Cell::new(at),
            parent: Cell::new(parent),
            state: RefCell::new(NodeState {
                fd,
                device_length,
                tbz_unsettled: 0,
                blocks_unsettled: 0,
                dirty_meta: false,
                dirty_tail: 0,
            }),
            handles: Cell::new(0),
            allocating: RefCell::default(),
            allocated: lane::sync::Waiters::new(),
            preallocating: Cell::new(u64::MAX),
            goal: Cell::new(None),
        })
    }

    pub fn kind(&self) -> InodeKind {
        self.state.borrow().fd.kind
    }

    pub fn length(&self) -> u64 {
        self.state.borrow().fd.length()
    }
}
