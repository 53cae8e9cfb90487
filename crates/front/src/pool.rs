//! Buffers that are used again: aligned for direct I/O, in sizes of a power of two.

use std::cell::{Cell, RefCell};
use std::ops::{Deref, DerefMut};
use std::rc::Rc;

use block::Buffer;

/// Smallest buffer, in bytes, as a power of two.
const SMALLEST_LOG2: u32 = 12;
/// Number of sizes: 4 KiB to 32 MiB.
const SIZES: usize = 14;
/// The largest buffer that is kept for use again, in bytes.
pub(crate) const LARGEST_BYTES: usize = 1 << (SMALLEST_LOG2 as usize + SIZES - 1);

/// Free buffers of one server. What is in them is left over from earlier requests: a buffer goes to a client only
/// as far as a disk has filled it.
pub(crate) struct Pool {
    free: RefCell<[Vec<Buffer>; SIZES]>,
    free_bytes: Cell<usize>,
    free_bytes_max: usize,
}

impl Pool {
    /// Keeps at most `free_bytes_max` bytes of buffers that nobody uses.
    pub fn new(free_bytes_max: usize) -> Rc<Self> {
        Rc::new(Self { free: RefCell::default(), free_bytes: Cell::new(0), free_bytes_max })
    }

    /// Bytes of memory that a buffer for `length` bytes takes.
    pub fn footprint(length: usize) -> usize {
        match Self::size(length) {
            Some(size) => 1 << (size + SMALLEST_LOG2 as usize),
            None => length,
        }
    }

    fn size(length: usize) -> Option<usize> {
        let log2 = length.max(1).next_power_of_two().trailing_zeros();
        let size = log2.saturating_sub(SMALLEST_LOG2) as usize;
        (size < SIZES).then_some(size)
    }

    /// A buffer of `length` bytes of no particular content, aligned to [`Buffer::ALIGN`].
    pub fn take(self: &Rc<Self>, length: usize) -> Pooled {
        let size = Self::size(length);
        let used = size.and_then(|size| self.free.borrow_mut()[size].pop());
        let buffer = match used {
            Some(buffer) => {
                self.free_bytes.set(self.free_bytes.get() - buffer.len());
                buffer
            }
            None => Buffer::for_overwrite(Self::footprint(length)),
        };
        Pooled { buffer: Some(buffer), length, pool: Rc::clone(self) }
    }

    fn give_back(&self, buffer: Buffer) {
        let total = self.free_bytes.get() + buffer.len();
        if total <= self.free_bytes_max
            && let Some(size) = Self::size(buffer.len())
        {
            self.free_bytes.set(total);
            self.free.borrow_mut()[size].push(buffer);
        }
    }
}

/// A buffer of a [`Pool`]; goes back when dropped.
pub(crate) struct Pooled {
    buffer: Option<Buffer>,
    length: usize,
    pool: Rc<Pool>,
}

impl Drop for Pooled {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.pool.give_back(buffer);
        }
    }
}

impl Deref for Pooled {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.buffer {
            Some(buffer) => &buffer[..self.length],
            None => &[],
        }
    }
}

impl DerefMut for Pooled {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.buffer {
            Some(buffer) => &mut buffer[..self.length],
            None => &mut [],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_within_the_bound() {
        let pool = Pool::new(3 * 4096);
        let (a, b) = (pool.take(1), pool.take(8192));
        assert_eq!((a.len(), b.len()), (1, 8192));
        assert_eq!(b.as_ptr() as usize % Buffer::ALIGN, 0);
        let place = b.as_ptr();
        drop((a, b));
        assert_eq!(pool.free_bytes.get(), 3 * 4096);
        drop(Pooled { buffer: Some(Buffer::zeroed(4096)), length: 4096, pool: Rc::clone(&pool) });
        assert_eq!(pool.free_bytes.get(), 3 * 4096, "no more than the bound");
        assert_eq!(pool.take(5000).as_ptr(), place, "the same memory again");
        assert_eq!(Pool::footprint((32 << 20) + 1), (32 << 20) + 1, "an odd giant is not kept");
        drop(pool.take((32 << 20) + 1));
    }
}
