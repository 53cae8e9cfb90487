//! The map of a layer: a tree of pages, four levels of 504 entries, from a LUN's grain to its [`Entry`].

use std::rc::Rc;

use block::DiskError;

use crate::format::{Entry, GRAIN_PAIRS, PAGE_ENTRIES, PageKey};
use crate::journal::Op;
use crate::pages::Page;
use crate::pool::Pool;
use crate::space::Purpose;

/// Levels of every map: 504^4 grains are more than 64 TiB.
pub const HEIGHT: u32 = 4;
const FANOUT: u64 = PAGE_ENTRIES as u64;
/// Leaves of a map, at most: 64 TiB of grains.
pub(crate) const MOST_LEAVES: u64 = 1 << 22;

/// A leaf, as far as memory knows it.
pub enum Leaf {
    /// Here it is.
    Page(Rc<Page>),
    /// The layer has no entry there.
    Absent,
    /// It has to be loaded.
    Unknown,
}

/// The leaf that holds the entry of a grain, and the slot in it.
#[inline]
pub fn leaf_of(grain: u64) -> (u64, usize) {
    (grain / FANOUT, (grain % FANOUT) as usize)
}

fn key(layer: u64, level: u32, leaf: u64) -> PageKey {
    PageKey { tree: layer, level, index: leaf / FANOUT.pow(level) }
}

/// Slot in the page of `level` that leads towards `leaf`.
fn slot_towards(leaf: u64, level: u32) -> usize {
    (leaf / FANOUT.pow(level - 1) % FANOUT) as usize
}

impl Pool {
    /// The leaf if memory has it, without waiting.
    #[inline]
    pub(crate) fn leaf_now(&self, layer: u64, leaf: u64) -> Leaf {
        match self.pages.cached(key(layer, 0, leaf)) {
            Some(page) => Leaf::Page(page),
            None => self.leaf_is_absent(layer, leaf),
        }
    }

    fn leaf_is_absent(&self, layer: u64, leaf: u64) -> Leaf {
        let root = self.catalog.borrow().layers.get(&layer).map_or(0, |l| l.root);
        if root == 0 {
            return Leaf::Absent;
        }
        for level in (1..HEIGHT).rev() {
            match self.pages.cached(key(layer, level, leaf)) {
                Some(page) if page.get(slot_towards(leaf, level)) == 0 => return Leaf::Absent,
                Some(_) => {}
                None => return Leaf::Unknown,
            }
        }
        Leaf::Unknown
    }

    /// The leaf, loaded if need be; `None`: the layer has no entry there.
    pub(crate) async fn leaf(&self, layer: u64, leaf: u64) -> Result<Option<Rc<Page>>, DiskError> {
        match self.leaf_now(layer, leaf) {
            Leaf::Page(page) => return Ok(Some(page)),
            Leaf::Absent => return Ok(None),
            Leaf::Unknown => {}
        }
        self.node_at(layer, 0, leaf).await
    }

    /// The page of a level on the way to a leaf; `None`: the layer has none there.
    pub(crate) async fn node_at(
        &self,
        layer: u64,
        level: u32,
        leaf: u64,
    ) -> Result<Option<Rc<Page>>, DiskError> {
        let mut pair = self.catalog.borrow().layers.get(&layer).map_or(0, |l| l.root);
        for at in (level..HEIGHT).rev() {
            if pair == 0 {
                return Ok(None);
            }
            let page = self.pages.load(&self.media, key(layer, at, leaf), pair).await?;
            if at == level {
                return Ok(Some(page));
            }
            pair = page.get(slot_towards(leaf, at));
        }
        Ok(None)
    }

    /// The leaf, made if it is not there.
    pub(crate) async fn leaf_for_write(&self, layer: u64, leaf: u64) -> Result<Rc<Page>, DiskError> {
        if let Some(page) = self.leaf(layer, leaf).await? {
            return Ok(page);
        }
        let _turn = self.tree_turn.take().await; // one at a time makes nodes
        let mut parent: Option<Rc<Page>> = None;
        for level in (0..HEIGHT).rev() {
            let pair = match &parent {
                None => self.catalog.borrow().layers.get(&layer).ok_or(DiskError::Gone)?.root,
                Some(page) => page.get(slot_towards(leaf, level + 1)),
            };
            let page = match pair {
                0 => self.make_node(layer, level, leaf, parent.as_ref()).await?,
                _ => self.pages.load(&self.media, key(layer, level, leaf), pair).await?,
            };
            parent = Some(page);
        }
        parent.ok_or(DiskError::Gone)
    }

    async fn make_node(
        &self,
        layer: u64,
        level: u32,
        leaf: u64,
        parent: Option<&Rc<Page>>,
    ) -> Result<Rc<Page>, DiskError> {
        let (grain, used) = {
            let catalog = self.catalog.borrow();
            let record = catalog.layers.get(&layer).ok_or(DiskError::Gone)?;
            (record.meta_grain, record.meta_used)
        };
        let fresh = grain == 0 || u64::from(used) == GRAIN_PAIRS;
        let reserved = match fresh {
            true => Some(self.space.reserve(&self.media, &self.pages, Purpose::Map).await?),
            false => None,
        };
        let pair = match &reserved {
            Some(reserved) => u64::from(reserved.grain) * GRAIN_PAIRS,
            None => u64::from(grain) * GRAIN_PAIRS + u64::from(used),
        };
        let key = key(layer, level, leaf);
        let page = match self.pages.create(&self.media, key, pair).await {
            Ok(page) => page,
            Err(error) => {
                reserved.into_iter().for_each(|r| self.space.release(r));
                return Err(error);
            }
        };
        // From here on nothing waits: the page is on the medium, and the batch brings everything that refers to it.
        if let Some(reserved) = reserved {
            self.take_grain(reserved);
            self.usage.map_grew(layer);
        }
        if let Some(parent) = parent {
            self.change_page(parent, slot_towards(leaf, level + 1), pair);
        }
        let op = Op::Node { layer, level, index: key.index, pair };
        self.catalog.borrow_mut().node(layer, level, pair);
        self.batch.borrow_mut().push(op);
        Ok(page)
    }

    /// The first leaf at or after `from` that the layer has, below `end`. Loads inner pages as needed.
    pub(crate) async fn next_leaf(&self, layer: u64, from: u64, end: u64) -> Result<Option<u64>, DiskError> {
        let root = self.catalog.borrow().layers.get(&layer).map_or(0, |l| l.root);
        if root == 0 {
            return Ok(None);
        }
        let mut at = from;
        'search: while at < end {
            let mut pair = root;
            for level in (1..HEIGHT).rev() {
                let page = self.pages.load(&self.media, key(layer, level, at), pair).await?;
                let slot = slot_towards(at, level);
                let Some(next) = page.next_set(slot) else {
                    // Nothing further below this page: on to what its parent covers next.
                    at = (at / FANOUT.pow(level) + 1) * FANOUT.pow(level);
                    continue 'search;
                };
                if next != slot {
                    let span = FANOUT.pow(level - 1);
                    at = (at / (span * FANOUT)) * span * FANOUT + next as u64 * span;
                }
                pair = page.get(next);
            }
            return Ok((at < end).then_some(at));
        }
        Ok(None)
    }

    /// An entry of a layer, if memory has it.
    #[inline]
    pub(crate) fn entry_now(&self, layer: u64, grain: u64) -> Option<Entry> {
        let (leaf, slot) = leaf_of(grain);
        match self.leaf_now(layer, leaf) {
            Leaf::Page(page) => Some(Entry(page.get(slot))),
            Leaf::Absent => Some(Entry::default()),
            Leaf::Unknown => None,
        }
    }

    /// An entry of a layer.
    pub(crate) async fn entry(&self, layer: u64, grain: u64) -> Result<Entry, DiskError> {
        let (leaf, slot) = leaf_of(grain);
        Ok(self.leaf(layer, leaf).await?.map_or(Entry::default(), |page| Entry(page.get(slot))))
    }

    /// Changes an entry, in memory at once and durably with the next commit.
    pub(crate) fn change_entry(&self, leaf: &Rc<Page>, grain: u64, entry: Entry) {
        let (_, slot) = leaf_of(grain);
        if leaf.get(slot) == entry.0 {
            return;
        }
        let old = Entry(leaf.get(slot));
        self.usage.changed(leaf.key.tree, old, entry);
        if old.grain() != entry.grain() {
            self.is_moving(old.grain());
            self.is_moving(entry.grain());
        }
        self.change_page(leaf, slot, entry.0);
        self.batch.borrow_mut().push(Op::Map { layer: leaf.key.tree, index: grain, entry: entry.0 });
    }
}
