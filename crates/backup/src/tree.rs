//! The tree of a disk: nodes are chunks, so what did not change is shared by its hash.
//!
//! ```text
//!  level 6   root: 32 entries of 64 TiB          a manifest names the root, or nothing for a disk of zeroes
//!  ...
//!  level 1   32 entries of 2 MiB
//!  level 0   leaf: 32 areas of 64 KiB            an area: zero, one chunk, or pieces of 4 KiB of several
//! ```
//!
//! A chunk of 4 KiB changed costs that chunk and one node per level, shared with whatever else changed nearby.

use std::ops::Range;

use zerocopy::{FromBytes, IntoBytes};

use crate::Error;
use crate::chunk::ChunkId;
use crate::format::{AREA_PIECES, ENTRY_MIXED, ENTRY_WHOLE, ENTRY_ZERO, FANOUT, LEVELS, MAX_AREAS, RunEntry};
use crate::reader::Reader;
use crate::repository::Inner;

/// One piece of an area: `None` reads as zero, else a chunk and which of its pieces.
pub(crate) type Piece = Option<(ChunkId, u8)>;

/// What an entry of a node says.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) enum Entry {
    /// Reads as zero.
    #[default]
    Zero,
    /// Level 0: the area's content. Above: a node.
    Whole(ChunkId),
    /// Level 0 only: each piece by itself.
    Mixed(Box<[Piece; AREA_PIECES as usize]>),
}

impl Entry {
    /// The entry piece by piece.
    pub fn pieces(&self) -> [Piece; AREA_PIECES as usize] {
        match self {
            Self::Zero => [None; AREA_PIECES as usize],
            Self::Whole(id) => std::array::from_fn(|n| Some((*id, n as u8))),
            Self::Mixed(pieces) => **pieces,
        }
    }

    /// The shortest way to say `pieces`.
    pub fn of_pieces(pieces: [Piece; AREA_PIECES as usize]) -> Self {
        if pieces.iter().all(Option::is_none) {
            return Self::Zero;
        }
        match pieces[0] {
            Some((id, 0)) if pieces.iter().enumerate().all(|(n, p)| *p == Some((id, n as u8))) => {
                Self::Whole(id)
            }
            _ => Self::Mixed(Box::new(pieces)),
        }
    }

    /// Runs of pieces that lie one after the other in one chunk (or are zero): first piece, count, content.
    pub fn runs(&self) -> Vec<(u8, u8, Piece)> {
        let mut runs: Vec<(u8, u8, Piece)> = Vec::new();
        for (n, piece) in self.pieces().into_iter().enumerate() {
            if let Some((_, count, content)) = runs.last_mut() {
                let goes_on = match (*content, piece) {
                    (None, None) => true,
                    (Some((a, first)), Some((b, this))) => a == b && first + *count == this,
                    _ => false,
                };
                if goes_on {
                    *count += 1;
                    continue;
                }
            }
            runs.push((n as u8, 1, piece));
        }
        runs
    }
}

/// A node: its level and 32 entries.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Node {
    pub level: u8,
    pub entries: Vec<Entry>,
}

impl Node {
    pub fn zero(level: u8) -> Self {
        Self { level, entries: vec![Entry::Zero; FANOUT] }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![self.level];
        for entry in &self.entries {
            match entry {
                Entry::Zero => out.push(ENTRY_ZERO),
                Entry::Whole(id) => {
                    out.push(ENTRY_WHOLE);
                    out.extend_from_slice(&id.0);
                }
                Entry::Mixed(_) => {
                    let runs = entry.runs();
                    out.extend_from_slice(&[ENTRY_MIXED, runs.len() as u8]);
                    for (_, pieces, content) in runs {
                        let (kind, first, id) = match content {
                            None => (ENTRY_ZERO, 0, [0; 32]),
                            Some((id, first)) => (ENTRY_WHOLE, first, id.0),
                        };
                        out.extend_from_slice(RunEntry { pieces, kind, first, spare: 0, id }.as_bytes());
                    }
                }
            }
        }
        out
    }

    /// Reads a node that must be of `level`; the error says what was found instead.
    pub fn decode(bytes: &[u8], level: u8) -> Result<Self, String> {
        let Some((found, mut rest)) = bytes.split_first() else { return Err("nothing".into()) };
        if *found != level {
            return Err(format!("a node of level {found}"));
        }
        let mut entries = Vec::with_capacity(FANOUT);
        for _ in 0..FANOUT {
            let (kind, after) = rest.split_first().ok_or("too few entries")?;
            rest = after;
            entries.push(match *kind {
                ENTRY_ZERO => Entry::Zero,
                ENTRY_WHOLE => {
                    let (id, after) = rest.split_first_chunk::<32>().ok_or("a cut hash")?;
                    rest = after;
                    Entry::Whole(ChunkId(*id))
                }
                ENTRY_MIXED if level == 0 => decode_mixed(&mut rest)?,
                other => return Err(format!("an entry of kind {other}")),
            });
        }
        if !rest.is_empty() {
            return Err(format!("{} bytes too many", rest.len()));
        }
        Ok(Self { level, entries })
    }
}

fn decode_mixed(rest: &mut &[u8]) -> Result<Entry, String> {
    let (count, after) = rest.split_first().ok_or("a cut entry")?;
    *rest = after;
    let mut pieces = [None; AREA_PIECES as usize];
    let mut at = 0u8;
    for _ in 0..*count {
        let (run, after) = RunEntry::read_from_prefix(rest).map_err(|_| "a cut run")?;
        *rest = after;
        let fits = (1..=AREA_PIECES - at).contains(&run.pieces) && run.first <= AREA_PIECES - run.pieces;
        if !fits || run.kind > ENTRY_WHOLE {
            return Err("a run outside of its area or chunk".into());
        }
        if run.kind == ENTRY_WHOLE {
            for n in 0..run.pieces {
                pieces[usize::from(at + n)] = Some((ChunkId(run.id), run.first + n));
            }
        }
        at += run.pieces;
    }
    if at != AREA_PIECES {
        return Err("runs that do not cover the area".into());
    }
    Ok(Entry::Mixed(Box::new(pieces)))
}

/// Areas below one entry of a node of `level`.
pub(crate) const fn entry_areas(level: u8) -> u64 {
    (FANOUT as u64).pow(level as u32)
}

/// Stores a node and gives its name.
pub(crate) type StoreNode<'a> = &'a mut dyn FnMut(&[u8]) -> Result<ChunkId, Error>;

#[derive(Clone)]
struct OpenNode {
    /// Which node of its level.
    index: u64,
    node: Node,
    changed: bool,
}

/// Makes a tree from another by changes that come in order of areas. Holds one node per level.
#[derive(Clone)]
pub(crate) struct TreeBuilder {
    base: Option<ChunkId>,
    open: Vec<OpenNode>,
    next_area: u64,
}

impl TreeBuilder {
    /// Begins with the tree `base`; `None` is a disk of zeroes.
    pub fn new(base: Option<ChunkId>) -> Self {
        Self { base, open: Vec::new(), next_area: 0 }
    }

    /// Replaces the content of an area. Areas come in rising order.
    pub fn set(
        &mut self,
        reader: &Reader,
        store: StoreNode<'_>,
        area: u64,
        entry: Entry,
    ) -> Result<(), Error> {
        self.change(reader, store, 0, area, |_| entry)
    }

    /// Changes some pieces of an area; several changes of one area may follow each other.
    pub fn patch(
        &mut self,
        reader: &Reader,
        store: StoreNode<'_>,
        area: u64,
        first: u8,
        content: &[Piece],
    ) -> Result<(), Error> {
        self.change(reader, store, 0, area, |old| {
            let mut pieces = old.pieces();
            pieces[usize::from(first)..usize::from(first) + content.len()].copy_from_slice(content);
            Entry::of_pieces(pieces)
        })
    }

    /// Makes whole areas zero, by the largest subtrees that fit.
    pub fn zero(
        &mut self,
        reader: &Reader,
        store: StoreNode<'_>,
        mut from: u64,
        to: u64,
    ) -> Result<(), Error> {
        if self.base.is_none() && self.open.is_empty() {
            return Ok(());
        }
        while from < to {
            let mut level = 0;
            while level + 1 < LEVELS
                && from.is_multiple_of(entry_areas(level + 1))
                && to - from >= entry_areas(level + 1)
            {
                level += 1;
            }
            self.change(reader, &mut *store, level, from, |_| Entry::Zero)?;
            from += entry_areas(level);
            self.next_area = from;
        }
        Ok(())
    }

    /// Replaces the entry of `level` that begins with `area`.
    fn change(
        &mut self,
        reader: &Reader,
        store: StoreNode<'_>,
        level: u8,
        area: u64,
        new: impl FnOnce(&Entry) -> Entry,
    ) -> Result<(), Error> {
        assert!(area >= self.next_area && area < MAX_AREAS, "changes of a tree come in order");
        self.next_area = area;
        self.descend(reader, store, level, area)?;
        let slot = (area / entry_areas(level)) as usize % FANOUT;
        if let Some(open) = self.open.last_mut() {
            let entry = new(&open.node.entries[slot]);
            if entry != open.node.entries[slot] {
                open.node.entries[slot] = entry;
                open.changed = true;
            }
        }
        Ok(())
    }

    /// Opens the node of `level` that holds `area`, closing what is not on the way to it.
    fn descend(&mut self, reader: &Reader, store: StoreNode<'_>, level: u8, area: u64) -> Result<(), Error> {
        while let Some(last) = self.open.last() {
            let on_the_way =
                last.node.level >= level && last.index == area / entry_areas(last.node.level + 1);
            if on_the_way {
                break;
            }
            self.close(store)?;
        }
        if self.open.is_empty() {
            let node = self.load(reader, self.base.map_or(Entry::Zero, Entry::Whole), LEVELS - 1)?;
            self.open.push(OpenNode { index: 0, node, changed: false });
        }
        while let Some(last) = self.open.last()
            && last.node.level > level
        {
            let child = last.node.level - 1;
            let index = area / entry_areas(child + 1);
            let entry = last.node.entries[index as usize % FANOUT].clone();
            let node = self.load(reader, entry, child)?;
            self.open.push(OpenNode { index, node, changed: false });
        }
        Ok(())
    }

    fn load(&self, reader: &Reader, entry: Entry, level: u8) -> Result<Node, Error> {
        match entry {
            Entry::Whole(id) => reader.node(&id, level).map(|n| (*n).clone()),
            _ => Ok(Node::zero(level)),
        }
    }

    /// Closes the lowest open node: stores it and tells its parent, when it has changed. The root's name, when it
    /// was the root and is not all zero.
    fn close(&mut self, store: StoreNode<'_>) -> Result<Option<ChunkId>, Error> {
        let Some(done) = self.open.pop() else { return Ok(self.base) };
        let entry = if !done.changed {
            None
        } else if done.node.entries.iter().all(|e| *e == Entry::Zero) {
            Some(Entry::Zero)
        } else {
            Some(Entry::Whole(store(&done.node.encode())?))
        };
        let Some(parent) = self.open.last_mut() else {
            return Ok(match entry {
                None => self.base,
                Some(Entry::Whole(id)) => Some(id),
                Some(_) => None,
            });
        };
        let slot = done.index as usize % FANOUT;
        if let Some(entry) = entry
            && entry != parent.node.entries[slot]
        {
            parent.node.entries[slot] = entry;
            parent.changed = true;
        }
        Ok(None)
    }

    /// Ends the tree and gives its root; `None` is a disk of zeroes.
    pub fn finish(mut self, store: StoreNode<'_>) -> Result<Option<ChunkId>, Error> {
        let mut root = self.base;
        while !self.open.is_empty() {
            root = self.close(store)?;
        }
        Ok(root)
    }
}

/// What an area holds.
pub(crate) fn entry_at(reader: &Reader, root: Option<ChunkId>, area: u64) -> Result<Entry, Error> {
    let Some(mut id) = root else { return Ok(Entry::Zero) };
    for level in (0..LEVELS).rev() {
        let node = reader.node(&id, level)?;
        match &node.entries[(area / entry_areas(level)) as usize % FANOUT] {
            Entry::Zero => return Ok(Entry::Zero),
            Entry::Whole(next) if level > 0 => id = *next,
            entry => return Ok(entry.clone()),
        }
    }
    Ok(Entry::Zero)
}

/// The first area below `root` of which the repository does not have everything; subtrees that are the same in `base`
/// are taken to be there, as its own backup says so.
pub(crate) fn first_missing(
    inner: &Inner,
    root: Option<ChunkId>,
    base: Option<ChunkId>,
) -> Result<Option<u64>, Error> {
    let entry = |id: Option<ChunkId>| id.map_or(Entry::Zero, Entry::Whole);
    missing_below(inner, &entry(root), &entry(base), LEVELS, 0)
}

/// As [`first_missing`], for an entry of a node of `level` that begins with area `at`.
fn missing_below(
    inner: &Inner,
    entry: &Entry,
    base: &Entry,
    level: u8,
    at: u64,
) -> Result<Option<u64>, Error> {
    if entry == base {
        return Ok(None);
    }
    let node = match entry {
        Entry::Whole(id) if level > 0 => match inner.reader.node(id, level - 1) {
            Ok(node) => node,
            Err(e) if e.is_damage() => return Ok(Some(at)),
            Err(e) => return Err(e),
        },
        entry => {
            for (_, _, piece) in entry.runs() {
                if let Some((id, _)) = piece
                    && !inner.index.known(&id)?
                {
                    return Ok(Some(at));
                }
            }
            return Ok(None);
        }
    };
    let before = match base {
        Entry::Whole(id) => inner.reader.node(id, level - 1).ok(),
        _ => None,
    };
    for (slot, entry) in node.entries.iter().enumerate() {
        let base = before.as_ref().map_or(&Entry::Zero, |node| &node.entries[slot]);
        let first = at + slot as u64 * entry_areas(level - 1);
        if let Some(area) = missing_below(inner, entry, base, level - 1, first)? {
            return Ok(Some(area));
        }
    }
    Ok(None)
}

/// What [`walk`] tells of a stretch of areas: first area, count, entry. False ends the walk.
pub(crate) type Each<'a> = &'a mut dyn FnMut(u64, u64, Result<&Entry, Error>) -> Result<bool, Error>;

/// Goes over the areas `from..to` in order. Stretches of zero are as long as subtrees allow; a node that cannot be
/// read is told as `Err` with the stretch it covers. False when `each` ended it.
pub(crate) fn walk(
    reader: &Reader,
    root: Option<ChunkId>,
    from: u64,
    to: u64,
    each: Each<'_>,
) -> Result<bool, Error> {
    let root = root.map_or(Entry::Zero, Entry::Whole);
    walk_entry(reader, &root, LEVELS, 0, from..to.min(MAX_AREAS), each)
}

/// One entry of a node of `level`, which begins at area `at`.
fn walk_entry(
    reader: &Reader,
    entry: &Entry,
    level: u8,
    at: u64,
    range: Range<u64>,
    each: Each<'_>,
) -> Result<bool, Error> {
    let (first, end) = (at.max(range.start), (at + entry_areas(level)).min(range.end));
    if first >= end {
        return Ok(true);
    }
    let id = match entry {
        Entry::Whole(id) if level > 0 => id,
        other => return each(first, end - first, Ok(other)),
    };
    let node = match reader.node(id, level - 1) {
        Ok(node) => node,
        Err(e) if e.is_damage() => return each(first, end - first, Err(e)),
        Err(e) => return Err(e),
    };
    for (slot, entry) in node.entries.iter().enumerate() {
        let child = at + slot as u64 * entry_areas(level - 1);
        if !walk_entry(reader, entry, level - 1, child, range.clone(), each)? {
            return Ok(false);
        }
    }
    Ok(true)
}
