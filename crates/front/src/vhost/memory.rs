//! Guest memory: the front end's files, mapped. All `unsafe` of this crate is here, but for a few system calls ([`super::signal`]).
//!
//! The guest goes on writing while we read, so nothing here hands out a Rust borrow of it: small things are copied
//! (`vm-memory` does that), data go to the disk as raw pieces ([`lane::Segments`]).
//!
//! A front end must not cut the file behind its memory short: the next touch would end the process (SIGBUS), as it would end
//! the front end itself. At mapping time the file is as long as was said; QEMU seals its memfds against shrinking.
#![allow(unsafe_code)] // pieces of guest memory as raw addresses; each use has its reason

use std::fs::File;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use lane::{Segments, SegmentsMut};
use smallvec::SmallVec;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

/// Regions of one guest at most: what QEMU asks for (`VHOST_USER_MAX_RAM_SLOTS`).
pub(crate) const REGIONS_MAX: usize = 509;

/// Guest memory as `virtio-queue` takes it.
pub(crate) type Map = GuestMemoryMmap<()>;

/// Why memory was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadMemory {
    #[error("region {0:#x} lies beyond the end of its file")]
    BeyondFile(u64),
    #[error("region {0:#x} overlaps another, or is empty")]
    Overlap(u64),
    #[error("more than {REGIONS_MAX} regions")]
    TooMany,
    #[error("there is no such region")]
    Unknown,
    #[error("memory cannot be mapped: {0}")]
    Map(String),
}

/// An address that is not in guest memory.
#[derive(Copy, Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("guest address {0:#x} is outside of its memory")]
pub(crate) struct Outside(pub u64);

/// A piece of guest memory: guest address and length in bytes.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Piece {
    pub at: u64,
    pub length: u32,
}

#[derive(Clone)]
struct Region {
    map: Arc<GuestRegionMmap<()>>,
    /// What is mapped for it, and stays so as long as the region is here.
    _whole: Rc<MmapRegion<()>>,
    /// Where the front end has it.
    user: u64,
}

/// All memory of one guest, at one time. A change makes a new one; requests under way keep the one they began with.
pub(crate) struct Memory {
    regions: Vec<Region>,
    map: Map,
}

impl Memory {
    /// No memory.
    pub fn none() -> Rc<Self> {
        Rc::new(Self { regions: Vec::new(), map: Map::new() })
    }

    fn of(mut regions: Vec<Region>, newest: u64) -> Result<Rc<Self>, BadMemory> {
        if regions.is_empty() {
            return Ok(Self::none());
        }
        if regions.len() > REGIONS_MAX {
            return Err(BadMemory::TooMany);
        }
        regions.sort_by_key(|r| r.map.start_addr());
        let list = regions.iter().map(|r| Arc::clone(&r.map)).collect();
        let map = Map::from_arc_regions(list).map_err(|_| BadMemory::Overlap(newest))?;
        Ok(Rc::new(Self { regions, map }))
    }

    /// The whole table at once.
    pub fn table(list: Vec<(VhostUserMemoryRegion, OwnedFd)>) -> Result<Rc<Self>, BadMemory> {
        let first = list.first().map_or(0, |(region, _)| region.guest_phys_addr);
        let regions =
            list.into_iter().map(|(region, file)| Region::map(&region, file)).collect::<Result<_, _>>()?;
        Self::of(regions, first)
    }

    /// One region more.
    pub fn with(&self, region: &VhostUserMemoryRegion, file: OwnedFd) -> Result<Rc<Self>, BadMemory> {
        if self.regions.len() >= REGIONS_MAX {
            return Err(BadMemory::TooMany);
        }
        let mut regions = self.regions.clone();
        regions.push(Region::map(region, file)?);
        Self::of(regions, region.guest_phys_addr)
    }

    /// One region less.
    pub fn without(&self, region: &VhostUserMemoryRegion) -> Result<Rc<Self>, BadMemory> {
        let is_it = |r: &Region| {
            r.map.start_addr().0 == region.guest_phys_addr
                && r.map.len() == region.memory_size
                && r.user == region.user_addr
        };
        let mut regions = self.regions.clone();
        let place = regions.iter().position(is_it).ok_or(BadMemory::Unknown)?;
        regions.remove(place);
        Self::of(regions, 0)
    }

    /// For `virtio-queue`.
    pub fn map(&self) -> &Map {
        &self.map
    }

    /// The guest address of what the front end has at `user`.
    pub fn guest_address(&self, user: u64) -> Result<GuestAddress, Outside> {
        let inside = |r: &&Region| user.checked_sub(r.user).is_some_and(|offset| offset < r.map.len());
        let region = self.regions.iter().find(inside).ok_or(Outside(user))?;
        Ok(GuestAddress(region.map.start_addr().0 + (user - region.user)))
    }

    /// Copies out of guest memory.
    pub fn copy_from(&self, at: u64, out: &mut [u8]) -> Result<(), Outside> {
        self.map.read_slice(out, GuestAddress(at)).map_err(|_| Outside(at))
    }

    /// Copies into guest memory.
    pub fn copy_to(&self, at: u64, bytes: &[u8]) -> Result<(), Outside> {
        self.map.write_slice(bytes, GuestAddress(at)).map_err(|_| Outside(at))
    }

    /// Raw addresses of some pieces, all of them inside.
    fn raw(&self, pieces: &[Piece]) -> Result<SmallVec<[(*mut u8, usize); 4]>, Outside> {
        let mut list = SmallVec::new();
        for piece in pieces {
            for slice in self.map.get_slices(GuestAddress(piece.at), piece.length as usize) {
                let slice = slice.map_err(|_| Outside(piece.at))?;
                list.push((slice.ptr_guard_mut().as_ptr(), slice.len()));
            }
        }
        Ok(list)
    }

    /// Pieces to be written to a disk.
    pub fn readable(&self, pieces: &[Piece]) -> Result<Segments<'_>, Outside> {
        let list = self.raw(pieces)?;
        // SAFETY: the pieces lie in regions that stay mapped as long as `self` is borrowed. The guest may write to them
        // meanwhile, which `Segments` allows for.
        Ok(unsafe { Segments::gather_raw(list) })
    }

    /// Pieces to be read into.
    pub fn writable(&self, pieces: &[Piece]) -> Result<SegmentsMut<'_>, Outside> {
        let list = self.raw(pieces)?;
        // SAFETY: as above; regions are mapped for writing, and no Rust borrow of guest memory exists anywhere.
        Ok(unsafe { SegmentsMut::scatter_raw(list) })
    }
}

impl Region {
    fn map(region: &VhostUserMemoryRegion, file: OwnedFd) -> Result<Self, BadMemory> {
        let (guest, user, bytes) = (region.guest_phys_addr, region.user_addr, region.memory_size);
        let Mapped { part, whole } = map_file(file, region.mmap_offset, bytes).map_err(|e| match e {
            BadMemory::BeyondFile(_) => BadMemory::BeyondFile(guest),
            other => other,
        })?;
        let map = GuestRegionMmap::new(part, GuestAddress(guest)).ok_or(BadMemory::Overlap(guest))?;
        Ok(Self { map: Arc::new(map), _whole: Rc::new(whole), user })
    }
}

/// A part of a file that is mapped.
pub(crate) struct Mapped {
    /// What was asked for.
    part: MmapRegion<()>,
    /// What had to be mapped for it; gives the memory back when dropped, so it goes last.
    whole: MmapRegion<()>,
}

impl Deref for Mapped {
    type Target = MmapRegion<()>;
    fn deref(&self) -> &MmapRegion<()> {
        &self.part
    }
}

/// Smallest unit that anything is mapped in, in bytes.
const PAGE_BYTES: u64 = 4096;

/// What to map so that `bytes` bytes from `offset` on are there, in whole pages of a file: where it begins and how long it
/// is. Of huge pages a part can neither be mapped nor unmapped, and front ends share memory from any place on.
fn span(offset: u64, bytes: u64, page: u64) -> Option<(u64, u64)> {
    let start = offset - offset % page;
    let end = offset.checked_add(bytes)?.checked_next_multiple_of(page)?;
    Some((start, end - start))
}

/// Maps a part of a file that another process has, too.
pub(crate) fn map_file(file: OwnedFd, offset: u64, bytes: u64) -> Result<Mapped, BadMemory> {
    let cannot = |e: &dyn std::fmt::Display| BadMemory::Map(e.to_string());
    let about = rustix::fs::fstat(&file).map_err(|e| cannot(&e))?;
    let end = offset.checked_add(bytes).and_then(|end| i64::try_from(end).ok());
    if end.is_none_or(|end| end > about.st_size) {
        return Err(BadMemory::BeyondFile(offset));
    }
    // Of hugetlbfs this is the size of its pages.
    let page = u64::try_from(about.st_blksize).unwrap_or(0).max(PAGE_BYTES);
    let page = if page.is_power_of_two() { page } else { PAGE_BYTES };
    let (start, length) = span(offset, bytes, page).ok_or(BadMemory::BeyondFile(offset))?;
    let size = |bytes: u64| usize::try_from(bytes).map_err(|e| cannot(&e));
    let (ahead, bytes, length) = (size(offset - start)?, size(bytes)?, size(length)?);
    let whole =
        MmapRegion::from_file(FileOffset::new(File::from(file), start), length).map_err(|e| cannot(&e))?;
    // SAFETY: `ahead + bytes` is at most `length` (see `span`), so all of it lies in `whole`, which `Mapped` and `Region` keep
    // as long as the part.
    let part =
        unsafe { MmapRegion::build_raw(whole.as_ptr().add(ahead), bytes, whole.prot(), whole.flags()) };
    Ok(Mapped { part: part.map_err(|e| cannot(&e))?, whole })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A memfd of so many bytes.
    pub(crate) fn memfd(bytes: u64) -> OwnedFd {
        let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, bytes).unwrap();
        file
    }

    #[test]
    fn memory_is_what_was_said_and_not_more() {
        let two = vec![
            (VhostUserMemoryRegion::new(0, 0x10000, 0x7000_0000, 0), memfd(0x10000)),
            (VhostUserMemoryRegion::new(0x10000, 0x10000, 0x9000_0000, 0x1000), memfd(0x11000)),
        ];
        let memory = Memory::table(two).unwrap();
        assert_eq!(memory.guest_address(0x7000_0123), Ok(GuestAddress(0x123)));
        assert_eq!(memory.guest_address(0x9000_0001), Ok(GuestAddress(0x10001)));
        assert_eq!(memory.guest_address(0x7001_0000), Err(Outside(0x7001_0000)));
        // A piece across both regions becomes two.
        let across = [Piece { at: 0xfe00, length: 1024 }];
        assert_eq!(memory.readable(&across).unwrap().iovecs().len(), 2);
        assert!(memory.writable(&[Piece { at: 0x1fe00, length: 1024 }]).is_err());
        assert!(memory.writable(&[Piece { at: u64::MAX, length: 8 }]).is_err());

        let short = VhostUserMemoryRegion::new(0x40000, 0x2000, 0, 0);
        assert!(matches!(memory.with(&short, memfd(0x1fff)), Err(BadMemory::BeyondFile(0x40000))));
        let over = VhostUserMemoryRegion::new(0x8000, 0x1000, 0, 0);
        assert!(matches!(memory.with(&over, memfd(0x1000)), Err(BadMemory::Overlap(0x8000))));
        let third = VhostUserMemoryRegion::new(0x40000, 0x1000, 0x5000_0000, 0);
        let more = memory.with(&third, memfd(0x1000)).unwrap();
        more.copy_to(0x40ffe, &[1, 2]).unwrap();
        assert!(more.copy_to(0x40fff, &[1, 2]).is_err());
        let less = more.without(&third).unwrap();
        assert!(less.copy_from(0x40ffe, &mut [0; 2]).is_err());
        assert!(matches!(less.without(&third), Err(BadMemory::Unknown)));
        for offset in [1 << 63, i64::MAX as u64, u64::MAX - 0x1000] {
            let far = VhostUserMemoryRegion::new(0x40000, 0x1000, 0, offset);
            assert!(matches!(memory.with(&far, memfd(0x1000)), Err(BadMemory::BeyondFile(0x40000))));
        }
    }

    #[test]
    fn whole_pages_are_mapped_whatever_their_size() {
        assert_eq!(span(0, 4096, 4096), Some((0, 4096)));
        assert_eq!(span(0x3000, 0x1001, 4096), Some((0x3000, 0x2000)));
        const HUGE: u64 = 2 << 20;
        assert_eq!(span(0, 0xa0000, HUGE), Some((0, HUGE)), "the memory below the VGA hole");
        assert_eq!(span(0xc0000, 2 * HUGE, HUGE), Some((0, 3 * HUGE)));
        assert_eq!(span(3 * HUGE, HUGE, HUGE), Some((3 * HUGE, HUGE)));
        assert_eq!(span(u64::MAX - 8, 8, HUGE), None);
    }

    #[test]
    fn guest_memory_of_huge_pages_is_taken_from_any_place_on_and_given_back() {
        const NAME: &str = "kagami-test-huge-guest";
        const HUGE: u64 = 2 << 20;
        let mapped = || std::fs::read_to_string("/proc/self/maps").unwrap().matches(NAME).count();
        let flags = rustix::fs::MemfdFlags::HUGETLB | rustix::fs::MemfdFlags::HUGE_2MB;
        let Ok(file) = rustix::fs::memfd_create(NAME, flags | rustix::fs::MemfdFlags::CLOEXEC) else {
            return eprintln!("SKIPPED: this kernel has no huge pages of 2 MiB");
        };
        rustix::fs::ftruncate(&file, 4 * HUGE).unwrap();
        // As QEMU shares the memory around the VGA hole.
        let low = VhostUserMemoryRegion::new(0, 0xa0000, 0x7000_0000, 0);
        let high = VhostUserMemoryRegion::new(0xc0000, 3 * HUGE, 0x700c_0000, 0xc0000);
        let list = vec![(low, file.try_clone().unwrap()), (high, file.try_clone().unwrap())];
        let memory = Memory::table(list).unwrap();
        assert_eq!(memory.guest_address(0x700c_0010), Ok(GuestAddress(0xc0010)));
        assert_eq!(mapped(), 2);
        let less = memory.without(&low).unwrap();
        drop(memory);
        assert_eq!(mapped(), 1);
        drop(less);
        assert_eq!(mapped(), 0, "all of it is unmapped");
    }
}
