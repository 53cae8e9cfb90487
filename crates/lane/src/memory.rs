//! Memory that the kernel or a guest may touch: scattered pieces, passed down without copying.
//!
//! The only `unsafe` on the way of a buffer is here. A piece is a raw address and a length, because guest memory
//! may change under us: nothing hands out a `&[u8]` into a piece that it did not get as one.
#![allow(unsafe_code)] // raw pieces of memory are what the kernel and guests deal in; each use has its reason

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::{alloc, fmt, ptr, slice};

use smallvec::SmallVec;

use crate::arena::Arena;
use crate::executor::Lane;

/// Bytes to be written: pieces of memory that stay valid and readable for `'a`. Not `Send`.
#[derive(Clone)]
pub struct Segments<'a> {
    parts: SmallVec<[libc::iovec; 2]>,
    length: usize,
    life: PhantomData<&'a [u8]>,
}

/// A place to read into: pieces of memory that stay valid and writable for `'a`, and that nobody else holds.
pub struct SegmentsMut<'a> {
    inner: Segments<'a>,
}

impl<'a> Segments<'a> {
    /// One contiguous piece.
    #[inline]
    pub fn new(bytes: &'a [u8]) -> Self {
        // SAFETY: a shared borrow is readable for 'a; nothing writes through Segments.
        unsafe { Self::from_raw(bytes.as_ptr(), bytes.len()) }
    }

    /// Several pieces, in order.
    pub fn gather(list: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut whole = Self { parts: SmallVec::new(), length: 0, life: PhantomData };
        for piece in list {
            whole.push(piece.as_ptr() as *mut u8, piece.len());
        }
        whole
    }

    /// One piece by address, for guest memory.
    ///
    /// # Safety
    /// `length` bytes at `start` stay mapped and readable for `'a`.
    #[inline]
    pub unsafe fn from_raw(start: *const u8, length: usize) -> Self {
        let mut whole = Self { parts: SmallVec::new(), length: 0, life: PhantomData };
        whole.push(start as *mut u8, length);
        whole
    }

    /// Several pieces by address, for guest memory.
    ///
    /// # Safety
    /// As [`Segments::from_raw`], for each piece.
    pub unsafe fn gather_raw(list: impl IntoIterator<Item = (*mut u8, usize)>) -> Self {
        let mut whole = Self { parts: SmallVec::new(), length: 0, life: PhantomData };
        for (start, length) in list {
            whole.push(start, length);
        }
        whole
    }

    #[inline]
    fn push(&mut self, start: *mut u8, length: usize) {
        if length > 0 {
            self.parts.push(libc::iovec { iov_base: start.cast(), iov_len: length });
            self.length += length;
        }
    }

    /// Length of all pieces together, in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.length
    }

    /// No bytes at all.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The pieces as the kernel takes them. Valid for `'a`, not longer.
    #[inline]
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.parts
    }

    /// Every piece starts and ends on a multiple of `align` (a power of two), as direct I/O wants.
    #[inline]
    pub fn is_aligned(&self, align: usize) -> bool {
        self.parts.iter().all(|p| (p.iov_base as usize | p.iov_len) & (align - 1) == 0)
    }

    /// `length` bytes beginning at byte `from`; no data moves.
    ///
    /// Panics when the range is not inside.
    pub fn slice(&self, from: usize, length: usize) -> Segments<'a> {
        assert!(
            from.checked_add(length).is_some_and(|end| end <= self.length),
            "slice outside of the segments"
        );
        let mut out = Self { parts: SmallVec::new(), length: 0, life: PhantomData };
        self.walk(from, length, |start, count| out.push(start, count));
        out
    }

    /// Calls `each` with the pieces that make up `length` bytes from `from`.
    #[inline]
    fn walk(&self, mut from: usize, mut length: usize, mut each: impl FnMut(*mut u8, usize)) {
        for part in &self.parts {
            if length == 0 {
                return;
            }
            if from >= part.iov_len {
                from -= part.iov_len;
                continue;
            }
            let count = (part.iov_len - from).min(length);
            // SAFETY: `from` is inside this piece.
            each(unsafe { part.iov_base.cast::<u8>().add(from) }, count);
            from = 0;
            length -= count;
        }
        assert_eq!(length, 0, "range outside of the segments");
    }

    /// Copies `out.len()` bytes from byte `from` on into `out`.
    pub fn copy_to(&self, from: usize, out: &mut [u8]) {
        let mut done = 0;
        self.walk(from, out.len(), |start, count| {
            // SAFETY: the piece is readable for 'a; `out` is a Rust borrow, so it cannot overlap writable pieces.
            unsafe { ptr::copy(start, out.as_mut_ptr().add(done), count) };
            done += count;
        });
    }

    /// The bytes, copied into a vector.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = vec![0; self.length];
        self.copy_to(0, &mut out);
        out
    }

    /// Calls `each` with copies-free views of the bytes, piece by piece, for hashing and comparing.
    ///
    /// A view is only handed out for the time of the call. For guest memory the content may change meanwhile:
    /// callers must not decide twice on the same byte.
    pub fn each(&self, mut each: impl FnMut(&[u8])) {
        self.walk(0, self.length, |start, count| {
            // SAFETY: readable for 'a, and `each` keeps it no longer than the call.
            each(unsafe { slice::from_raw_parts(start, count) });
        });
    }

    /// All bytes are zero.
    pub fn is_zero(&self) -> bool {
        let mut zero = true;
        self.each(|piece| zero = zero && is_zero(piece));
        zero
    }
}

/// All bytes of `bytes` are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<32>();
    words.iter().all(|w| *w == [0; 32]) && rest.iter().all(|b| *b == 0)
}

impl<'a> SegmentsMut<'a> {
    /// One contiguous piece.
    #[inline]
    pub fn new(bytes: &'a mut [u8]) -> Self {
        // SAFETY: an exclusive borrow is writable for 'a.
        unsafe { Self::from_raw(bytes.as_mut_ptr(), bytes.len()) }
    }

    /// Several pieces, in order.
    pub fn scatter(list: impl IntoIterator<Item = &'a mut [u8]>) -> Self {
        let mut inner = Segments { parts: SmallVec::new(), length: 0, life: PhantomData };
        for piece in list {
            inner.push(piece.as_mut_ptr(), piece.len());
        }
        Self { inner }
    }

    /// One piece by address, for guest memory.
    ///
    /// # Safety
    /// `length` bytes at `start` stay mapped and writable for `'a`, and no Rust borrow of them exists.
    #[inline]
    pub unsafe fn from_raw(start: *mut u8, length: usize) -> Self {
        // SAFETY: the caller's promise is stronger than what reading asks for.
        Self { inner: unsafe { Segments::from_raw(start, length) } }
    }

    /// Several pieces by address, for guest memory.
    ///
    /// # Safety
    /// As [`SegmentsMut::from_raw`], for each piece.
    pub unsafe fn scatter_raw(list: impl IntoIterator<Item = (*mut u8, usize)>) -> Self {
        // SAFETY: the caller's promise is stronger than what reading asks for.
        Self { inner: unsafe { Segments::gather_raw(list) } }
    }

    /// `length` bytes beginning at byte `from`; no data moves.
    ///
    /// Panics when the range is not inside.
    pub fn slice_mut(&self, from: usize, length: usize) -> SegmentsMut<'a> {
        SegmentsMut { inner: self.inner.slice(from, length) }
    }

    /// Copies all of `bytes` to byte `at` on.
    pub fn copy_from(&self, at: usize, bytes: &[u8]) {
        let mut done = 0;
        self.inner.walk(at, bytes.len(), |start, count| {
            // SAFETY: the piece is writable for 'a; `copy` allows overlap.
            unsafe { ptr::copy(bytes.as_ptr().add(done), start, count) };
            done += count;
        });
    }

    /// Sets `length` bytes from byte `at` on to zero.
    pub fn zero(&self, at: usize, length: usize) {
        self.inner.walk(at, length, |start, count| {
            // SAFETY: the piece is writable for 'a.
            unsafe { ptr::write_bytes(start, 0, count) };
        });
    }
}

impl<'a> Deref for SegmentsMut<'a> {
    type Target = Segments<'a>;
    #[inline]
    fn deref(&self) -> &Segments<'a> {
        &self.inner
    }
}

impl fmt::Debug for Segments<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Segments({} bytes in {} pieces)", self.length, self.parts.len())
    }
}

impl fmt::Debug for SegmentsMut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

/// Memory aligned for direct I/O ([`Buffer::ALIGN`]).
pub struct Buffer {
    start: ptr::NonNull<u8>,
    length: usize,
    /// Where it was taken from; `None`: the heap.
    arena: Option<Arc<Arena>>,
}

impl Buffer {
    /// Alignment of every buffer, in bytes: what every block device we know accepts.
    pub const ALIGN: usize = 4096;

    /// `length` zero bytes.
    pub fn zeroed(length: usize) -> Self {
        if length == 0 {
            return Self { start: ptr::NonNull::dangling(), length, arena: None };
        }
        let layout = Self::layout(length);
        // SAFETY: the layout has a size above zero.
        let start = unsafe { alloc::alloc_zeroed(layout) };
        let Some(start) = ptr::NonNull::new(start) else { alloc::handle_alloc_error(layout) };
        Self { start, length, arena: None }
    }

    /// `length` bytes of any content: a place to read into, or to be filled wholly before it is used.
    ///
    /// Up to 1 MiB come from the registered memory of the lane, where it has some left: transfers from and to them are
    /// the cheapest there are. Take them for one request and give them back; for what stays, use [`Buffer::zeroed`].
    pub fn for_overwrite(length: usize) -> Self {
        if length > 0
            && let Some(arena) = Lane::try_with(|lane| lane.driver.borrow().arena().cloned()).flatten()
            && let Some(start) = arena.take(length)
        {
            return Self { start, length, arena: Some(arena) };
        }
        Self::zeroed(length)
    }

    fn layout(length: usize) -> alloc::Layout {
        match alloc::Layout::from_size_align(length, Self::ALIGN) {
            Ok(layout) => layout,
            Err(_) => panic!("a buffer of {length} bytes is larger than memory can be"),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(arena) = &self.arena {
            arena.give_back(self.start, self.length);
        } else if self.length > 0 {
            // SAFETY: allocated in `zeroed` with this very layout.
            unsafe { alloc::dealloc(self.start.as_ptr(), Self::layout(self.length)) };
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];
    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: allocated and initialised; borrowed through self.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl DerefMut for Buffer {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: allocated and initialised; borrowed exclusively through self.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

// SAFETY: a Buffer owns its memory alone, as a Vec does.
unsafe impl Send for Buffer {}
// SAFETY: shared access only reads.
unsafe impl Sync for Buffer {}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_cross_pieces() {
        let (a, b, c) = ([1u8; 3], [2u8; 5], [3u8; 2]);
        let whole = Segments::gather([&a[..], &b[..], &c[..]]);
        assert_eq!(whole.len(), 10);
        assert_eq!(whole.slice(2, 7).to_vec(), [1, 2, 2, 2, 2, 2, 3]);
        assert_eq!(whole.slice(10, 0).len(), 0);
        assert!(!whole.is_zero());
        assert!(Segments::new(&[0; 100]).is_zero());
    }

    #[test]
    fn writes_cross_pieces() {
        let (mut a, mut b) = ([9u8; 3], [9u8; 3]);
        let whole = SegmentsMut::scatter([&mut a[..], &mut b[..]]);
        whole.copy_from(1, &[1, 2, 3]);
        whole.slice_mut(4, 2).zero(0, 1);
        assert_eq!((a, b), ([9, 1, 2], [3, 0, 9]));
    }

    #[test]
    #[should_panic(expected = "outside")]
    fn a_slice_outside_is_a_bug() {
        Segments::new(&[0; 4]).slice(3, 2);
    }
}
