//! The answer to "what is where": extents of data, zeroes and holes, and whether they changed.

use crate::Sector;

/// Names one cut of a disk (R42). A generation may outlive its snapshot.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Generation {
    /// Position in the disk's history; a later cut has a larger number.
    pub counter: u64,
    /// 128-bit identity: two generations are the same cut only if this is equal.
    pub id: u128,
}

/// What a range of a disk holds.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Somebody wrote here.
    Data,
    /// Reads as zero because it was zeroed or unmapped.
    Zero,
    /// Was never written; reads as zero.
    Hole,
}

/// One range with one answer.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Extent {
    /// First sector.
    pub at: Sector,
    /// Length in sectors.
    pub count: u64,
    /// What it holds.
    pub kind: Kind,
    /// Written or zeroed since the generation asked for; true when none was asked for.
    pub changed: bool,
}

/// A bounded list of adjacent extents, in order. A disk fills it until the range asked for is covered or the list is
/// full; it covers at least one extent of a non-empty range.
#[derive(Clone, Debug)]
pub struct Extents {
    list: Vec<Extent>,
    limit: usize,
}

impl Extents {
    /// Room for `limit` extents (at least 1).
    pub fn with_limit(limit: usize) -> Self {
        Self { list: Vec::new(), limit: limit.max(1) }
    }

    /// Adds what follows, merging with the last extent when the answer is the same. False when the list is full and
    /// the extent was not taken.
    pub fn push(&mut self, extent: Extent) -> bool {
        if extent.count == 0 {
            return true;
        }
        if let Some(last) = self.list.last_mut() {
            debug_assert_eq!(last.at.plus(last.count), extent.at, "extents are adjacent and in order");
            if last.kind == extent.kind && last.changed == extent.changed {
                last.count += extent.count;
                return true;
            }
        }
        if self.list.len() == self.limit {
            return false;
        }
        self.list.push(extent);
        true
    }

    /// No further extent can be taken (but the last may still grow).
    pub fn is_full(&self) -> bool {
        self.list.len() == self.limit
    }

    /// First sector after what is covered; `None` when nothing is.
    pub fn end(&self) -> Option<Sector> {
        self.list.last().map(|e| e.at.plus(e.count))
    }

    /// Empties the list; the limit stays.
    pub fn clear(&mut self) {
        self.list.clear();
    }
}

impl std::ops::Deref for Extents {
    type Target = [Extent];
    fn deref(&self) -> &[Extent] {
        &self.list
    }
}
