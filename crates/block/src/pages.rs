//! Persistent pages: a sparse image whose copies share everything that is equal.
//!
//! A clone costs one reference; a write copies the path to its page. So a thousand images of one volume, each after
//! another power loss, cost what differs between them.

use std::rc::Rc;

use crate::{BLOCK_BYTES, Segments, SegmentsMut};

const PAGE: usize = BLOCK_BYTES as usize;
const BITS: u32 = 6;
const FANOUT: usize = 1 << BITS;
/// 6 levels of 6 bits and pages of 4 KiB: 256 TiB.
const LEVELS: u32 = 6;

#[derive(Clone)]
enum Node {
    Inner(Box<[Option<Rc<Node>>; FANOUT]>),
    Page(Box<[u8; PAGE]>),
}

/// A sparse byte space of up to 256 TiB; what was never written reads as zero.
#[derive(Clone, Default)]
pub struct Pages {
    root: Option<Rc<Node>>,
}

impl Pages {
    fn page(&self, number: u64) -> Option<&[u8; PAGE]> {
        let mut node = self.root.as_deref()?;
        for level in (0..LEVELS).rev() {
            let Node::Inner(children) = node else { return None };
            node = children[Self::slot(number, level)].as_deref()?;
        }
        match node {
            Node::Page(page) => Some(page),
            Node::Inner(_) => None,
        }
    }

    fn slot(number: u64, level: u32) -> usize {
        (number >> (level * BITS)) as usize & (FANOUT - 1)
    }

    fn page_mut(&mut self, number: u64) -> &mut [u8; PAGE] {
        assert!(number >> (LEVELS * BITS) == 0, "an image holds 256 TiB at most");
        let empty = || Rc::new(Node::Inner(Box::new([const { None }; FANOUT])));
        let mut node = Rc::make_mut(self.root.get_or_insert_with(empty));
        for level in (0..LEVELS).rev() {
            let Node::Inner(children) = node else { unreachable!("inner nodes are above level 0") };
            let child = children[Self::slot(number, level)].get_or_insert_with(|| match level {
                0 => Rc::new(Node::Page(Box::new([0; PAGE]))),
                _ => empty(),
            });
            node = Rc::make_mut(child);
        }
        match node {
            Node::Page(page) => page,
            Node::Inner(_) => unreachable!("level 0 holds pages"),
        }
    }

    /// Gives a whole page back: it reads as zero.
    fn forget(&mut self, number: u64) {
        let Some(root) = &mut self.root else { return };
        let mut node = Rc::make_mut(root);
        for level in (0..LEVELS).rev() {
            let Node::Inner(children) = node else { return };
            let child = &mut children[Self::slot(number, level)];
            if level == 0 {
                *child = None;
                return;
            }
            match child {
                Some(child) => node = Rc::make_mut(child),
                None => return,
            }
        }
    }

    fn pieces(at: u64, length: u64) -> impl Iterator<Item = (u64, usize, u64, usize)> {
        let mut done = 0;
        std::iter::from_fn(move || {
            (done < length).then(|| {
                let byte = at + done;
                let inside = (byte % BLOCK_BYTES) as usize;
                let count = (PAGE - inside).min((length - done) as usize);
                let piece = (byte / BLOCK_BYTES, inside, done, count);
                done += count as u64;
                piece
            })
        })
    }

    /// Writes at a byte offset.
    pub fn write(&mut self, at: u64, from: &Segments<'_>) {
        for (page, inside, done, count) in Self::pieces(at, from.len() as u64) {
            from.copy_to(done as usize, &mut self.page_mut(page)[inside..inside + count]);
        }
    }

    /// Reads from a byte offset.
    pub fn read(&self, at: u64, into: &SegmentsMut<'_>) {
        for (page, inside, done, count) in Self::pieces(at, into.len() as u64) {
            match self.page(page) {
                Some(content) => into.copy_from(done as usize, &content[inside..inside + count]),
                None => into.zero(done as usize, count),
            }
        }
    }

    /// Makes a byte range read as zero; whole pages are given back. Costs time in proportion to what was there.
    pub fn zero(&mut self, at: u64, length: u64) {
        let end = at + length;
        let (first_whole, end_whole) = (at.div_ceil(BLOCK_BYTES), end / BLOCK_BYTES);
        if first_whole >= end_whole {
            return self.zero_pieces(at, length);
        }
        self.zero_pieces(at, first_whole * BLOCK_BYTES - at);
        self.zero_pieces(end_whole * BLOCK_BYTES, end - end_whole * BLOCK_BYTES);
        let mut page = first_whole;
        while let Some(next) = self.next_page(page).filter(|p| *p < end_whole) {
            self.forget(next);
            page = next + 1;
        }
    }

    fn zero_pieces(&mut self, at: u64, length: u64) {
        for (page, inside, _, count) in Self::pieces(at, length) {
            if self.page(page).is_some() {
                self.page_mut(page)[inside..inside + count].fill(0);
            }
        }
    }

    /// The first page at or after `from` that was written and not given back.
    pub fn next_page(&self, from: u64) -> Option<u64> {
        fn search(node: &Node, level: u32, base: u64, from: u64) -> Option<u64> {
            match node {
                Node::Page(_) => (base >= from).then_some(base),
                Node::Inner(children) => {
                    let span = 1u64 << ((level - 1) * BITS);
                    children.iter().enumerate().find_map(|(slot, child)| {
                        let start = base + slot as u64 * span;
                        if start + span <= from {
                            return None;
                        }
                        search(child.as_deref()?, level - 1, start, from)
                    })
                }
            }
        }
        search(self.root.as_deref()?, LEVELS, 0, from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_independent_and_sparse() {
        let mut one = Pages::default();
        one.write(1 << 40, &Segments::new(&[1; 5000]));
        let mut two = one.clone();
        two.zero((1 << 40) + 10, 4990);
        let mut back = [9; 20];
        one.read((1 << 40) + 5, &SegmentsMut::new(&mut back));
        assert_eq!(back, [1; 20]);
        two.read((1 << 40) + 5, &SegmentsMut::new(&mut back));
        assert_eq!(back, [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(two.next_page(0), Some(1 << 28));
        two.zero((1 << 40) + 4096, 4096);
        assert_eq!(two.next_page((1 << 28) + 1), None, "a page zeroed as a whole is given back");
    }
}
