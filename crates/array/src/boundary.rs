//! Boundaries: a cut whose generation somebody holds keeps its layer when its snapshot goes, for its marks alone. The
//! data in it that nobody can reach any more is given up.
//!
//! Under a LUN's top, or under a layer with a name, lies a **stack** of such layers: held, without a name, each with
//! one child. Nobody reads them but through the layer above. So
//!
//! * the first write to a grain that only the stack has takes that grain over, whole ([`Lun::move_up`]): no data
//!   moves, and the blocks that are not written now are *copied*;
//! * a grain of the stack whose blocks are all hidden is freed; where the layer above has a grain of its own for the
//!   same place, the blocks that are not hidden go there, as *copied*, and the grain is freed (in the background).
//!
//! The entry that stays behind has its marks and no grain: `changed` asks for marks only. Whatever it says to hold is
//! hidden by a layer above, always; the checker compares that.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use block::DiskError;

use crate::catalog::{Catalog, LayerRecord};
use crate::format::{Entry, GRAIN_BLOCKS, Mark, PAGE_ENTRIES};
use crate::lun::{Lun, Part};
use crate::map::MOST_LEAVES;
use crate::map::leaf_of;
use crate::pages::Page;
use crate::pool::Pool;
use crate::read::{block_mask, masks};
use crate::tidy::named;

/// Entries that one step of a pass looks at, at most.
const MOST_LOOKED_AT: usize = 4096;

/// Layers that are kept for their marks alone, and how far the background is with them.
#[derive(Default)]
pub(crate) struct Boundaries {
    /// The state of the catalog that `stacks` was made from.
    as_of: Cell<u64>,
    /// By the layer that stands on them; topmost first.
    stacks: RefCell<BTreeMap<u64, Rc<[u64]>>>,
    /// By the layer above.
    passes: RefCell<BTreeMap<u64, Pass>>,
}

/// How far a pass is: the stack it was begun for, and the next grain of the LUN to look at.
type Pass = (Rc<[u64]>, u64);

/// A pass that looked at everything.
const DONE: u64 = u64::MAX;

/// Marks blocks as copied.
pub(crate) fn copied(entry: Entry, blocks: u16) -> Entry {
    blocks_of(blocks).fold(entry, |entry, block| entry.with_mark(block, Mark::Copied))
}

/// The blocks of a mask.
pub(crate) fn blocks_of(mask: u16) -> impl Iterator<Item = usize> {
    (0..GRAIN_BLOCKS).filter(move |block| mask >> block & 1 == 1)
}

/// Blocks that an entry says nothing about.
pub(crate) fn open_blocks(entry: Entry) -> u16 {
    let (held, zeroed) = masks(entry);
    !(held | zeroed)
}

fn stacks(catalog: &Catalog) -> BTreeMap<u64, Rc<[u64]>> {
    let mut out = BTreeMap::new();
    let held: BTreeSet<u64> = catalog.holds.values().map(|h| h.layer).collect();
    if held.is_empty() {
        return out;
    }
    let named = named(catalog);
    let mut children = BTreeMap::<u64, u32>::new();
    for layer in catalog.layers.values().filter(|l| l.dying.is_none()) {
        *children.entry(layer.parent).or_default() += 1;
    }
    let boundary = |l: &LayerRecord| {
        l.dying.is_none() && held.contains(&l.id) && !named.contains(&l.id) && children.get(&l.id) == Some(&1)
    };
    for layer in catalog.layers.values().filter(|l| l.dying.is_none() && !boundary(l)) {
        let stack: Rc<[u64]> =
            catalog.chain(layer.parent).take_while(|l| boundary(l)).map(|l| l.id).collect();
        if !stack.is_empty() {
            out.insert(layer.id, stack);
        }
    }
    out
}

impl Pool {
    /// The boundaries right below a layer, topmost first, if there are any.
    pub(crate) fn stack_below(&self, layer: u64) -> Option<Rc<[u64]>> {
        self.know_stacks();
        self.boundaries.stacks.borrow().get(&layer).cloned()
    }

    fn know_stacks(&self) {
        let (boundaries, now) = (&self.boundaries, self.catalog_changes.get());
        if boundaries.as_of.replace(now) == now {
            return;
        }
        let new = stacks(&self.catalog.borrow());
        let same = |above: &u64, stack: &Rc<[u64]>| new.get(above).is_some_and(|s| s[..] == stack[..]);
        boundaries.passes.borrow_mut().retain(|above, (stack, _)| same(above, stack));
        *boundaries.stacks.borrow_mut() = new;
    }

    fn next_pass(&self) -> Option<(u64, Rc<[u64]>, u64)> {
        self.know_stacks();
        let (stacks, passes) = (self.boundaries.stacks.borrow(), self.boundaries.passes.borrow());
        stacks.iter().find_map(|(above, stack)| {
            let next = passes.get(above).map_or(0, |(_, next)| *next);
            (next != DONE).then(|| (*above, Rc::clone(stack), next))
        })
    }

    /// Somewhere in the pool there is one.
    pub(crate) fn has_boundaries(&self) -> bool {
        self.know_stacks();
        !self.boundaries.stacks.borrow().is_empty()
    }

    /// There is work for [`Pool::give_up_step`].
    pub(crate) fn has_boundary_to_pass(&self) -> bool {
        self.next_pass().is_some()
    }

    /// Looks at a layer's entries again: some that were changed have been forgotten.
    pub(crate) fn pass_again(&self, above: u64) {
        self.boundaries.passes.borrow_mut().remove(&above);
    }

    /// Goes on giving up what a boundary's grains hide. Touches at most `most` grains. False: there is nothing to do.
    pub(crate) async fn give_up_step(&self, most: usize) -> Result<bool, DiskError> {
        let Some((above, stack, from)) = self.next_pass() else { return Ok(false) };
        let (mut next, mut touched) = (from, 0);
        for _ in 0..MOST_LOOKED_AT {
            if touched >= most {
                break;
            }
            let (wanted, slot) = leaf_of(next);
            let Some(number) = self.next_leaf(above, wanted, MOST_LEAVES).await? else {
                next = DONE;
                break;
            };
            let first = if number == wanted { slot } else { 0 };
            let found = self.leaf(above, number).await?.and_then(|page| page.next_set(first));
            let Some(slot) = found else {
                next = (number + 1) * PAGE_ENTRIES as u64;
                continue;
            };
            let grain = number * PAGE_ENTRIES as u64 + slot as u64;
            while self.batch_is_full() {
                self.commit().await?;
            }
            touched += usize::from(self.give_up_grain(above, &stack, grain).await?);
            next = grain + 1;
        }
        self.commit().await?;
        self.boundaries.passes.borrow_mut().insert(above, (stack, next));
        Ok(true)
    }

    /// Frees the grains of a stack for one place, as far as the layer above has hidden them or has a grain of its own
    /// to take the rest. True when something was freed.
    pub(crate) async fn give_up_grain(
        &self,
        above: u64,
        stack: &[u64],
        grain: u64,
    ) -> Result<bool, DiskError> {
        let lun = self.lun_over(above);
        let _locked = match &lun {
            Some(lun) => Some(lun.lock_blocks(grain, 0..GRAIN_BLOCKS).await),
            None => None,
        };
        let (number, slot) = leaf_of(grain);
        let Some(into) = self.leaf(above, number).await? else { return Ok(false) };
        let pages = self.leaves_of(stack, number).await?;
        let high = Entry(into.get(slot));
        if high == Entry::default() {
            return Ok(false); // nothing is hidden
        }
        let _under_way = self.space.under_way();
        let (mut up, mut open, mut emptied) = (high, open_blocks(high), Vec::new());
        for page in pages.into_iter().flatten() {
            let low = Entry(page.get(slot));
            let (held, zeroed) = masks(low);
            let rest = held & open;
            if low.grain() != 0 && (rest == 0 || high.grain() != 0) {
                let blocks: Vec<usize> = blocks_of(rest).collect();
                self.copy_blocks(low.grain(), high.grain(), &blocks).await?;
                up = copied(up, rest);
                let bits = self.bitmap_page(low.grain()).await?;
                emptied.push((page, low, bits));
            }
            open &= !(held | zeroed);
        }
        // From here on nothing waits: one batch.
        let as_read = |(page, low, _): &(Rc<Page>, Entry, Rc<Page>)| page.get(slot) == low.0;
        if emptied.is_empty() || into.get(slot) != high.0 || !emptied.iter().all(as_read) {
            return Ok(false);
        }
        self.change_entry(&into, grain, up);
        for (page, low, bits) in emptied {
            self.change_entry(&page, grain, low.with_grain(0));
            self.free_grain(low.grain(), &bits);
        }
        self.moved(number);
        Ok(true)
    }
}

impl Lun {
    /// Before the first write to a grain of the top layer (whose leaf this is; the caller has locked the part's
    /// blocks): takes over the grain that a boundary holds for this place. True when the entry changed; the change is
    /// durable with the next commit, and what was taken over is *copied*.
    pub(crate) async fn move_up(&self, leaf: &Rc<Page>, part: &Part) -> Result<bool, DiskError> {
        let (pool, top) = (&self.pool, leaf.key.tree);
        let Some(stack) = pool.stack_below(top) else { return Ok(false) };
        let (number, slot) = leaf_of(part.grain);
        let pages = pool.leaves_of(&stack, number).await?;
        // From here on nothing waits.
        let same = pool.stack_below(top).is_some_and(|now| now[..] == stack[..]);
        let high = Entry(leaf.get(slot));
        if !same || high.grain() != 0 || self.is_filling(part.grain) {
            return Ok(false);
        }
        let mut open = open_blocks(high);
        for page in pages.iter().flatten() {
            let low = Entry(page.get(slot));
            let (held, zeroed) = masks(low);
            let seen = held & open;
            if low.grain() != 0 && seen != 0 {
                if seen & !block_mask(part.whole_blocks()) == 0 {
                    return Ok(false); // all of it is written anew: that goes to a new place, without waiting
                }
                pool.change_entry(page, part.grain, low.with_grain(0));
                pool.change_entry(leaf, part.grain, copied(high.with_grain(low.grain()), seen));
                pool.take_over(top, part.grain);
                pool.moved(number);
                return Ok(true);
            }
            open &= !(held | zeroed);
        }
        Ok(false)
    }
}
