//! Pointer blocks in memory: a bounded cache. Changed blocks stay until they are on the device.

use crate::format::{Address, Corrupt};
use crate::resource::Sizes;
use crate::space::Space;
use crate::{Error, format};
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

/// One pointer block.
pub(crate) struct PointerBlock {
    /// Offset in the volume.
    pub at: u64,
    bytes: RefCell<Box<[u8]>>,
    /// One bit for each changed sector (VMFS-3 and 5: 8 sectors).
    pub dirty: Cell<u32>,
    /// Nothing on the device points here yet.
    pub fresh: Cell<bool>,
    used: Cell<bool>,
}

impl PointerBlock {
    /// Address `index`.
    pub fn slot(&self, sizes: &Sizes, index: u64) -> Result<Address, Corrupt> {
        let start = index as usize * sizes.slot();
        sizes.decode(&self.bytes.borrow()[start..start + sizes.slot()], self.at + start as u64)
    }

    /// Sets address `index` (VMFS-3 and 5).
    pub fn set_slot(&self, index: u64, raw: u32) {
        let start = index as usize * 4;
        self.bytes.borrow_mut()[start..start + 4].copy_from_slice(&raw.to_le_bytes());
        self.dirty.set(self.dirty.get() | 1 << (start / 512));
    }

    /// Runs of addresses that are holes from `index` on, at most `limit`.
    pub fn holes(&self, sizes: &Sizes, index: u64, limit: u64) -> u64 {
        let bytes = self.bytes.borrow();
        let start = index as usize * sizes.slot();
        let zero =
            bytes[start..].chunks_exact(sizes.slot()).take_while(|s| s.iter().all(|b| *b == 0)).count();
        (zero as u64).min(limit)
    }

    /// A copy of sector `index`.
    pub fn sector(&self, index: u32) -> Vec<u8> {
        let start = index as usize * 512;
        self.bytes.borrow()[start..start + 512].to_vec()
    }

    /// A copy of everything.
    pub fn to_vec(&self) -> Vec<u8> {
        self.bytes.borrow().to_vec()
    }
}

/// The blocks in memory, at most `limit` unless more are changed.
pub(crate) struct PointerCache {
    blocks: RefCell<HashMap<u64, Rc<PointerBlock>>>,
    order: RefCell<VecDeque<u64>>,
    limit: usize,
}

impl PointerCache {
    /// A cache of about `bytes` bytes.
    pub fn new(bytes: usize, sizes: &Sizes) -> Self {
        let limit = (bytes / sizes.pointer_block as usize).max(8);
        Self { blocks: RefCell::default(), order: RefCell::default(), limit }
    }

    /// The block at volume offset `at`, if it is in memory.
    pub fn get(&self, at: u64) -> Option<Rc<PointerBlock>> {
        let found = self.blocks.borrow().get(&at).map(Rc::clone)?;
        found.used.set(true);
        Some(found)
    }

    /// The block at volume offset `at`, read when it is not in memory.
    pub async fn load(&self, space: &Space, sizes: &Sizes, at: u64) -> Result<Rc<PointerBlock>, Error> {
        if let Some(block) = self.get(at) {
            return Ok(block);
        }
        let mut bytes = block::Buffer::zeroed(sizes.pointer_block as usize);
        space.read(at, &mut bytes).await?;
        // Somebody else may have read or even changed it meanwhile: theirs is the truth.
        Ok(self.get(at).unwrap_or_else(|| self.insert(at, bytes.to_vec(), false)))
    }

    /// A new, empty block that nothing on the device points to.
    pub fn create(&self, sizes: &Sizes, at: u64) -> Rc<PointerBlock> {
        let block = self.insert(at, vec![0; sizes.pointer_block as usize], true);
        block.dirty.set(1);
        block
    }

    /// Forgets a block that is not used any more.
    pub fn remove(&self, at: u64) {
        if self.blocks.borrow_mut().remove(&at).is_some() {
            self.order.borrow_mut().retain(|other| *other != at);
        }
    }

    fn insert(&self, at: u64, bytes: Vec<u8>, fresh: bool) -> Rc<PointerBlock> {
        self.shrink();
        let block = Rc::new(PointerBlock {
            at,
            bytes: RefCell::new(bytes.into_boxed_slice()),
            dirty: Cell::new(0),
            fresh: Cell::new(fresh),
            used: Cell::new(true),
        });
        self.blocks.borrow_mut().insert(at, Rc::clone(&block));
        self.order.borrow_mut().push_back(at);
        block
    }

    /// Second chance: what was used since it was last looked at goes to the back, what is changed or held stays.
    fn shrink(&self) {
        let (mut blocks, mut order) = (self.blocks.borrow_mut(), self.order.borrow_mut());
        let mut looks = 2 * order.len();
        while blocks.len() >= self.limit && looks > 0 {
            looks -= 1;
            let Some(at) = order.pop_front() else { return };
            let Some(block) = blocks.get(&at) else { continue };
            let busy = block.dirty.get() != 0 || block.fresh.get() || Rc::strong_count(block) > 1;
            if busy || block.used.replace(false) {
                order.push_back(at);
            } else {
                blocks.remove(&at);
            }
        }
    }
}

/// What a unit of a file is, or which pointer block has to be in memory before that is known.
pub(crate) enum Lookup {
    /// The unit's address, found at volume offset `found_at`.
    Unit { address: Address, found_at: u64 },
    /// This and the following units (`count` in all, at least 1) are holes.
    Holes { count: u64 },
    /// The pointer block at this volume offset is not in memory.
    Need { at: u64 },
}

/// Everything that lookups need besides the FD.
pub(crate) struct Tree<'a> {
    pub files: &'a crate::resource::Files,
    pub cache: &'a PointerCache,
}

impl Tree<'_> {
    /// Looks up unit `n` of the file whose FD lies at `at`.
    pub fn lookup(&self, fd: &crate::descriptor::Fd, at: u64, n: u64) -> Result<Lookup, Error> {
        let sizes = &self.files.sizes;
        let per = sizes.slots_per_pointer_block();
        let levels = levels(fd.zla);
        let Some(levels) = levels else { return Err(Error::Resident) };
        let mut below = per.pow(levels);
        let index = n / below;
        let capacity = fd.slots(sizes);
        if index >= capacity {
            return Ok(Lookup::Holes { count: u64::MAX - n });
        }
        let mut address = fd.slot(sizes, index, at)?;
        let mut found_at = at;
        for _ in 0..levels {
            if address == Address::Hole {
                return Ok(Lookup::Holes { count: below - n % below });
            }
            let block_at = self.files.pointer_block(address, found_at)?;
            let Some(block) = self.cache.get(block_at) else { return Ok(Lookup::Need { at: block_at }) };
            let inside = n % below;
            below /= per;
            let slot = inside / below;
            address = block.slot(sizes, slot)?;
            found_at = block_at + slot * sizes.slot() as u64;
            if address == Address::Hole && below == 1 {
                return Ok(Lookup::Holes { count: block.holes(sizes, slot, u64::MAX) });
            }
        }
        Ok(match address {
            Address::Hole => Lookup::Holes { count: 1 },
            _ => Lookup::Unit { address, found_at },
        })
    }
}

/// Levels of pointer blocks; `None` when there is no array.
pub(crate) fn levels(zla: format::Zla) -> Option<u32> {
    use format::Zla;
    match zla {
        Zla::None | Zla::Resident => None,
        Zla::FileBlocks | Zla::SubBlocks => Some(0),
        Zla::Single | Zla::SinglePb2 => Some(1),
        Zla::Double => Some(2),
    }
}
