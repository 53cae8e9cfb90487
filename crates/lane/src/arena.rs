//! Memory that a lane registers with the kernel, and that buffers are taken from.
//!
//! One mapping, cut into chunks of 1 MiB; a chunk is given to a class of equal pieces (4 KiB, 8 KiB, ... 1 MiB) when
//! one of that class is first needed, and stays with it. A buffer may be dropped on any thread and after its lane, so
//! the lists of free pieces stand behind a lock; buffers are taken by lanes, which nobody else disturbs, so it is
//! almost never contended.
#![allow(unsafe_code)] // owns a mapping; each use has its reason

use std::io;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex};

/// Smallest piece, in bytes.
const PIECE_BYTES: usize = 4096;
/// Classes of pieces: 4 KiB shifted by 0 to 8.
const CLASSES: usize = 9;

struct Free {
    classes: [Vec<u32>; CLASSES],
    /// Chunks not given to a class yet.
    chunks: Vec<u32>,
}

/// See the module.
pub(crate) struct Arena {
    start: NonNull<u8>,
    length: usize,
    free: Mutex<Free>,
}

// SAFETY: the mapping is owned by the arena; pieces of it are handed out to one owner each, under the lock.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

fn class_of(bytes: usize) -> Option<usize> {
    let class = bytes.max(1).div_ceil(PIECE_BYTES).next_power_of_two().trailing_zeros() as usize;
    (class < CLASSES).then_some(class)
}

impl Arena {
    /// Unit of growth of a class, in bytes.
    pub(crate) const CHUNK_BYTES: usize = PIECE_BYTES << (CLASSES - 1);

    /// Maps whole chunks, at most `bytes`.
    pub(crate) fn new(bytes: usize) -> io::Result<Arc<Self>> {
        let chunks = (bytes / Self::CHUNK_BYTES).clamp(1, 1 << 10);
        let length = chunks * Self::CHUNK_BYTES;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh anonymous mapping touches nothing that exists.
        let start = unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, -1, 0) };
        let Some(start) = NonNull::new(start.cast::<u8>()).filter(|_| start != libc::MAP_FAILED) else {
            return Err(io::Error::last_os_error());
        };
        // SAFETY: our own mapping. A child of fork must not share pinned pages copy-on-write with the kernel's writes;
        // huge pages are a wish.
        unsafe {
            libc::madvise(start.as_ptr().cast(), length, libc::MADV_DONTFORK);
            libc::madvise(start.as_ptr().cast(), length, libc::MADV_HUGEPAGE);
        }
        let free = Free { classes: Default::default(), chunks: (0..chunks as u32).rev().collect() };
        Ok(Arc::new(Self { start, length, free: Mutex::new(free) }))
    }

    pub(crate) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// The bytes lie wholly inside.
    #[inline]
    pub(crate) fn contains(&self, start: *const u8, length: usize) -> bool {
        let from = start.addr().wrapping_sub(self.start.addr().get());
        from < self.length && length <= self.length - from
    }

    /// A piece of at least `bytes` bytes of any content; `None` when there is none left (or so large).
    pub(crate) fn take(&self, bytes: usize) -> Option<NonNull<u8>> {
        let class = class_of(bytes)?;
        let mut free = self.free.lock().unwrap_or_else(|e| e.into_inner());
        let place = match free.classes[class].pop() {
            Some(place) => place as usize * PIECE_BYTES,
            None => {
                let chunk = free.chunks.pop()? as usize * Self::CHUNK_BYTES;
                let size = PIECE_BYTES << class;
                let rest = (1..Self::CHUNK_BYTES / size).rev();
                free.classes[class].extend(rest.map(|n| ((chunk + n * size) / PIECE_BYTES) as u32));
                chunk
            }
        };
        // SAFETY: a place is below the length.
        Some(unsafe { self.start.add(place) })
    }

    /// Takes back a piece that [`Arena::take`] gave for `bytes`.
    pub(crate) fn give_back(&self, piece: NonNull<u8>, bytes: usize) {
        assert!(self.contains(piece.as_ptr(), bytes), "a piece of another arena");
        let Some(class) = class_of(bytes) else { return };
        let place = (piece.addr().get() - self.start.addr().get()) / PIECE_BYTES;
        let mut free = self.free.lock().unwrap_or_else(|e| e.into_inner());
        free.classes[class].push(place as u32);
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: every buffer holds the arena, so nobody uses the mapping any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_do_not_overlap_and_come_back() {
        let arena = Arena::new(8 << 20).unwrap();
        for _ in 0..3 {
            let mut taken: Vec<(usize, usize)> = Vec::new();
            for bytes in [1, 4096, 4097, 65536, 1 << 20, 9000].into_iter().cycle() {
                let Some(piece) = arena.take(bytes) else { break };
                taken.push((piece.addr().get(), bytes));
            }
            assert!(taken.len() > 6);
            taken.sort();
            assert!(taken.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
            for (address, bytes) in taken {
                let piece = NonNull::new(arena.start().with_addr(address)).unwrap();
                arena.give_back(piece, bytes);
            }
        }
        assert!(arena.take(Arena::CHUNK_BYTES + 1).is_none());
        let outside = [0u8; 8];
        assert!(!arena.contains(outside.as_ptr(), 8));
        assert!(!arena.contains(arena.start(), arena.len() + 1));
    }
}
