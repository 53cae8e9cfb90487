//! A descriptor chain: what one request consists of in guest memory (virtio 1.2, section 2.7.5).
//!
//! `virtio-queue` walks chains, too, but only those it has just taken from the available ring, and it ends silently where a
//! chain is damaged. After a restart requests are taken up again by the number of their first descriptor.

use std::rc::Rc;

use block::{Segments, SegmentsMut};
use smallvec::SmallVec;
use virtio_queue::desc::split::Descriptor;
use vm_memory::ByteValued;

use super::budget::Cost;
use super::memory::{Memory, Outside, Piece};

/// Descriptors of one chain at most, those of an indirect table included: as many as QEMU takes.
pub(crate) const DESCRIPTORS_MAX: u16 = 1024;

/// `VIRTQ_DESC_F_*`.
mod flag {
    pub const NEXT: u16 = 1;
    pub const WRITE: u16 = 2;
    pub const INDIRECT: u16 = 4;
}

/// What is wrong with a chain. The guest's driver has lost its way: the queue is stopped.
#[derive(Copy, Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum BadChain {
    #[error("descriptor {0} is not in the table")]
    Index(u16),
    #[error("the chain goes in a circle, or is longer than {DESCRIPTORS_MAX}")]
    TooLong,
    #[error("an indirect table of {0} bytes, or one in another")]
    Indirect(u32),
    #[error("a descriptor to be read follows one to be written")]
    Order,
    #[error("more than 4 GiB")]
    Bytes,
    #[error(transparent)]
    Outside(#[from] Outside),
}

/// Pieces of one direction.
#[derive(Default, Debug)]
pub(crate) struct Pieces {
    list: SmallVec<[Piece; 4]>,
    bytes: u32,
}

impl Pieces {
    /// All of them together, in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes as usize
    }

    pub fn list(&self) -> &[Piece] {
        &self.list
    }

    fn push(&mut self, at: u64, length: u32) -> Result<(), BadChain> {
        self.bytes = self.bytes.checked_add(length).ok_or(BadChain::Bytes)?;
        if length > 0 {
            self.list.push(Piece { at, length });
        }
        Ok(())
    }

    /// The pieces of `length` bytes from `from` on; fewer when there are no more.
    fn part(&self, mut from: usize, mut length: usize) -> SmallVec<[Piece; 4]> {
        let mut out = SmallVec::new();
        for piece in &self.list {
            let own = piece.length as usize;
            if from >= own {
                from -= own;
                continue;
            }
            let count = (own - from).min(length);
            if count == 0 {
                break;
            }
            out.push(Piece { at: piece.at.wrapping_add(from as u64), length: count as u32 });
            (from, length) = (0, length - count);
        }
        out
    }
}

/// A request in guest memory.
pub(crate) struct Chain {
    /// Number of its first descriptor, by which the guest knows it.
    pub head: u16,
    memory: Rc<Memory>,
    /// From the guest.
    pub out: Pieces,
    /// To the guest.
    pub into: Pieces,
}

/// Where descriptors are.
#[derive(Copy, Clone)]
struct Table {
    at: u64,
    count: u16,
}

impl Table {
    fn get(self, memory: &Memory, index: u16) -> Result<Descriptor, BadChain> {
        if index >= self.count {
            return Err(BadChain::Index(index));
        }
        // Read once, as a whole: what the guest changes afterwards changes nothing here.
        let mut descriptor = Descriptor::default();
        let at = self.at.wrapping_add(u64::from(index) * size_of::<Descriptor>() as u64);
        memory.copy_from(at, descriptor.as_mut_slice())?;
        Ok(descriptor)
    }
}

impl Chain {
    /// Follows the chain that begins at `head` in a table of `size` descriptors.
    pub fn follow(memory: &Rc<Memory>, table: u64, size: u16, head: u16) -> Result<Self, BadChain> {
        let mut chain =
            Self { head, memory: Rc::clone(memory), out: Pieces::default(), into: Pieces::default() };
        let (mut table, mut next, mut indirect) = (Table { at: table, count: size }, head, false);
        for _ in 0..=DESCRIPTORS_MAX {
            let descriptor = table.get(memory, next)?;
            let (at, length, flags) = (descriptor.addr().0, descriptor.len(), descriptor.flags());
            if flags & flag::INDIRECT != 0 {
                let count = length / size_of::<Descriptor>() as u32;
                let whole = length.is_multiple_of(size_of::<Descriptor>() as u32);
                if indirect || !whole || count == 0 || flags & flag::NEXT != 0 {
                    return Err(BadChain::Indirect(length));
                }
                let count = u16::try_from(count).map_err(|_| BadChain::Indirect(length))?;
                (table, next, indirect) = (Table { at, count }, 0, true);
                continue;
            }
            if flags & flag::WRITE != 0 {
                chain.into.push(at, length)?;
            } else if chain.into.list.is_empty() {
                chain.out.push(at, length)?;
            } else {
                return Err(BadChain::Order);
            }
            if flags & flag::NEXT == 0 {
                return Ok(chain);
            }
            next = descriptor.next();
        }
        Err(BadChain::TooLong)
    }

    /// What it takes of the guest's budget. A device moves no more than `part` bytes of it at a time.
    pub fn cost(&self, part: usize) -> Cost {
        let pieces = self.out.list.len() + self.into.list.len();
        Cost { pieces, bytes: self.out.bytes().saturating_add(self.into.bytes()).min(part) }
    }

    /// Copies what the guest sent from byte `from` on; false when that is not there.
    pub fn take(&self, mut from: usize, mut into: &mut [u8]) -> bool {
        for piece in self.out.part(from, into.len()) {
            let (now, rest) = into.split_at_mut(piece.length as usize);
            if self.memory.copy_from(piece.at, now).is_err() {
                return false;
            }
            (into, from) = (rest, from + piece.length as usize);
        }
        into.is_empty()
    }

    /// Copies to the guest, from byte `at` of its place on; false when that is not there.
    pub fn give(&self, at: usize, mut bytes: &[u8]) -> bool {
        for piece in self.into.part(at, bytes.len()) {
            let (now, rest) = bytes.split_at(piece.length as usize);
            if self.memory.copy_to(piece.at, now).is_err() {
                return false;
            }
            bytes = rest;
        }
        bytes.is_empty()
    }

    /// What the guest sent, not copied.
    pub fn segments(&self, from: usize, length: usize) -> Result<Segments<'_>, Outside> {
        self.memory.readable(&self.out.part(from, length))
    }

    /// A part of the guest's place for data.
    pub fn segments_mut(&self, from: usize, length: usize) -> Result<SegmentsMut<'_>, Outside> {
        self.memory.writable(&self.into.part(from, length))
    }
}
