//! The work on what was read: hash, compare, store, and put the results into the tree in order. Runs off the lane.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use lane::Buffer;

use crate::Error;
use crate::chunk::ChunkId;
use crate::content::fill_area;
use crate::format::{AREA_BYTES, AREA_PIECES, PIECE_BYTES};
use crate::reader::Reader;
use crate::repository::Inner;
use crate::session::Session;
use crate::survey::PIECES;
use crate::tree::{Entry, Piece, TreeBuilder, entry_at};

/// Differing pieces up to which an area keeps the rest of its base: beyond, one chunk is better than many.
const MOST_PATCHED: usize = 8;

/// One thing to do to the tree. `at` is an offset in the batch's buffer.
pub(crate) enum Step {
    /// Whole areas are zero.
    ZeroAreas { from: u64, to: u64 },
    /// Some pieces of an area are zero.
    ZeroPieces { area: u64, first: u8, count: u8 },
    /// An area was read whole.
    Area { area: u64, at: usize, bytes: usize },
    /// Some pieces of an area were read.
    Pieces { area: u64, first: u8, at: usize, bytes: usize },
    /// An area said to be unchanged was read to be compared.
    Audit { area: u64, at: usize, bytes: usize },
}

/// Steps and the bytes they need.
pub(crate) struct Batch {
    pub number: u64,
    pub steps: Vec<Step>,
    pub buffer: Buffer,
}

/// A change of the tree.
enum TreeStep {
    Zero(u64, u64),
    Set(u64, Entry),
    Patch(u64, u8, Vec<Piece>),
}

struct Assembly {
    next: u64,
    /// Everything before this area is in the tree.
    reached: u64,
    waiting: BTreeMap<u64, Vec<TreeStep>>,
    builder: TreeBuilder,
}

/// How many areas are in a tree, and its root.
pub(crate) type Reached = (u64, Option<ChunkId>);

/// The tree of one disk in the making. Batches are worked on beside each other and put in in order.
pub(crate) struct Copy {
    inner: Arc<Inner>,
    session: Arc<Session>,
    /// Compared with: content of the base, in whatever mode.
    base: Option<ChunkId>,
    assembly: Mutex<Assembly>,
    /// First byte at which an audit found a difference.
    difference: Mutex<Option<u64>>,
}

impl Copy {
    /// The tree begins as `start`, in which everything before area `reached` is as it is to be.
    pub fn new(
        inner: Arc<Inner>,
        session: Arc<Session>,
        base: Option<ChunkId>,
        (reached, start): Reached,
    ) -> Self {
        let builder = TreeBuilder::new(start);
        let assembly = Assembly { next: 0, reached, waiting: BTreeMap::new(), builder };
        Self { inner, session, base, assembly: Mutex::new(assembly), difference: Mutex::default() }
    }

    fn reader(&self) -> &Reader {
        &self.inner.reader
    }

    /// The first difference that the audit has found so far.
    pub fn difference(&self) -> Option<u64> {
        *self.difference.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Works on a batch and gives its buffer back.
    pub fn process(&self, batch: Batch) -> Result<Buffer, Error> {
        let mut out = Vec::with_capacity(batch.steps.len());
        for step in &batch.steps {
            match *step {
                Step::ZeroAreas { from, to } => out.push(TreeStep::Zero(from, to)),
                Step::ZeroPieces { area, first, count } => {
                    out.push(TreeStep::Patch(area, first, vec![None; usize::from(count)]));
                }
                Step::Area { area, at, bytes } => {
                    let entry = self.area(area, &batch.buffer[at..at + bytes])?;
                    out.push(TreeStep::Set(area, entry));
                }
                Step::Pieces { area, first, at, bytes } => {
                    let content = self.pieces(&batch.buffer[at..at + bytes])?;
                    out.push(TreeStep::Patch(area, first, content));
                }
                Step::Audit { area, at, bytes } => self.audit(area, &batch.buffer[at..at + bytes])?,
            }
        }
        self.assemble(batch.number, out)?;
        Ok(batch.buffer)
    }

    /// Puts in what is next in order; what came early waits. Batches under way are few, so few wait.
    fn assemble(&self, number: u64, steps: Vec<TreeStep>) -> Result<(), Error> {
        let mut assembly = self.assembly.lock().unwrap_or_else(|e| e.into_inner());
        assembly.waiting.insert(number, steps);
        let Assembly { next, reached, waiting, builder } = &mut *assembly;
        let store = &mut |node: &[u8]| self.session.store_node(node);
        while let Some(steps) = waiting.remove(next) {
            for step in steps {
                match step {
                    TreeStep::Zero(from, to) => {
                        builder.zero(self.reader(), store, from, to)?;
                        *reached = to;
                    }
                    TreeStep::Set(area, entry) => {
                        builder.set(self.reader(), store, area, entry)?;
                        *reached = area + 1;
                    }
                    TreeStep::Patch(area, first, content) => {
                        builder.patch(self.reader(), store, area, first, &content)?;
                        // More pieces of it may come.
                        *reached = area;
                    }
                }
            }
            *next += 1;
        }
        Ok(())
    }

    /// How far the tree is, and the tree so far, the rest as it was at the beginning. Its chunks are stored or about to
    /// be; they are not durable yet.
    pub fn reached(&self) -> Result<Reached, Error> {
        let assembly = self.assembly.lock().unwrap_or_else(|e| e.into_inner());
        let store = &mut |node: &[u8]| self.session.store_node(node);
        Ok((assembly.reached, assembly.builder.clone().finish(store)?))
    }

    /// The entry for an area that was read whole.
    fn area(&self, area: u64, bytes: &[u8]) -> Result<Entry, Error> {
        if lane::memory::is_zero(bytes) {
            return Ok(Entry::Zero);
        }
        let id = ChunkId::of(bytes);
        if let Some(base) = self.base
            && let Some(entry) = self.like_base(base, area, id, bytes)?
        {
            return Ok(entry);
        }
        self.session.store_as(id, bytes)?;
        Ok(Entry::Whole(id))
    }

    /// What the base has, where that is the same or nearly so: a disk without change tracking, too, costs only the
    /// pieces that differ.
    fn like_base(&self, base: ChunkId, area: u64, id: ChunkId, bytes: &[u8]) -> Result<Option<Entry>, Error> {
        let old = match entry_at(self.reader(), Some(base), area) {
            Ok(Entry::Zero) => return Ok(None),
            Ok(Entry::Whole(same)) if same == id => {
                // It was just read: where the repository has lost it, it is stored again, for the base too.
                self.session.store_as(id, bytes)?;
                return Ok(Some(Entry::Whole(id)));
            }
            Ok(old) => old,
            // A damaged base is nothing to build on; a whole chunk is.
            Err(e) if e.is_damage() => return Ok(None),
            Err(e) => return Err(e),
        };
        if self.session.has(&id)? {
            return Ok(Some(Entry::Whole(id)));
        }
        let mut before = vec![0; bytes.len()];
        match fill_area(self.reader(), &old, &mut before) {
            Ok(()) => {}
            Err(e) if e.is_damage() => return Ok(self.heal(&old, bytes)?.then_some(old)),
            Err(e) => return Err(e),
        }
        let piece = PIECE_BYTES as usize;
        let differs: Vec<bool> = bytes.chunks(piece).zip(before.chunks(piece)).map(|(a, b)| a != b).collect();
        if differs.iter().filter(|d| **d).count() > MOST_PATCHED {
            return Ok(None);
        }
        let mut pieces = old.pieces();
        let mut n = 0;
        while n < differs.len() {
            let run = differs[n..].iter().take_while(|d| **d).count();
            if run > 0 {
                let changed = &bytes[n * piece..((n + run) * piece).min(bytes.len())];
                pieces[n..n + run].copy_from_slice(&self.pieces(changed)?);
            }
            n += run.max(1);
        }
        Ok(Some(Entry::of_pieces(pieces)))
    }

    /// Stores again what the base's entry needs and what was just read, as far as whole chunks are recognised by
    /// their names. True when the entry is whole again and says what was read.
    fn heal(&self, old: &Entry, bytes: &[u8]) -> Result<bool, Error> {
        let mut whole = true;
        for (first, count, piece) in old.runs() {
            let from = (usize::from(first) * PIECE_BYTES as usize).min(bytes.len());
            let to = (usize::from(first + count) * PIECE_BYTES as usize).min(bytes.len());
            let now = &bytes[from..to];
            match piece {
                None => whole = whole && lane::memory::is_zero(now),
                Some((id, 0)) if ChunkId::of(now) == id => self.session.store_as(id, now)?,
                Some(_) => whole = false,
            }
        }
        Ok(whole)
    }

    /// Stores pieces: each run that is not zero is one chunk.
    fn pieces(&self, bytes: &[u8]) -> Result<Vec<Piece>, Error> {
        let piece = PIECE_BYTES as usize;
        let zero: Vec<bool> = bytes.chunks(piece).map(lane::memory::is_zero).collect();
        let mut out = Vec::with_capacity(zero.len());
        while out.len() < zero.len() {
            let n = out.len();
            if zero[n] {
                out.push(None);
                continue;
            }
            let run = zero[n..].iter().take_while(|z| !**z).count();
            let id = self.session.store(&bytes[n * piece..((n + run) * piece).min(bytes.len())])?;
            out.extend((0..run).map(|k| Some((id, k as u8))));
        }
        Ok(out)
    }

    /// Compares an area with the base (R46).
    fn audit(&self, area: u64, bytes: &[u8]) -> Result<(), Error> {
        let old = entry_at(self.reader(), self.base, area)?;
        if let Entry::Whole(id) = &old
            && ChunkId::of(bytes) == *id
        {
            return Ok(());
        }
        let mut before = vec![0; bytes.len()];
        let inside = match fill_area(self.reader(), &old, &mut before) {
            Ok(()) => bytes.iter().zip(&before).position(|(a, b)| a != b),
            Err(e) if e.is_damage() => Some(0),
            Err(e) => return Err(e),
        };
        if let Some(inside) = inside {
            let at = area * AREA_BYTES + inside as u64;
            let mut first = self.difference.lock().unwrap_or_else(|e| e.into_inner());
            *first = Some(first.map_or(at, |f| f.min(at)));
        }
        Ok(())
    }

    /// Ends the tree of a disk of `areas` areas: what lies beyond was cut off.
    pub fn finish(self, areas: u64) -> Result<Option<ChunkId>, Error> {
        let mut assembly = self.assembly.into_inner().unwrap_or_else(|e| e.into_inner());
        assert!(assembly.waiting.is_empty(), "every batch has been put in");
        let store = &mut |node: &[u8]| self.session.store_node(node);
        assembly.builder.zero(&self.inner.reader, store, areas, crate::format::MAX_AREAS)?;
        assembly.builder.finish(store)
    }
}

const _: () = assert!(AREA_PIECES as u64 == PIECES);
