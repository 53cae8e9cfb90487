//! Merging: a layer P that nobody needs any more, and its one child C, become one layer.
//!
//! Entry by entry, each step one batch of the journal: blocks that C does not know come from P, with their marks as they
//! are; data is copied only where both hold parts of the same grain. A block that C holds as *copied* takes over P's
//! *written*: it did change since what lies below P.
//!
//! What is the same in any layer need not move, so the layer with the smaller map is the one that is emptied:
//!
//! * **up**: P's entries go to C, and C then stands on what P stood on;
//! * **down**: C's entries go to P, and P then takes C's place: its generation, its names, its LUN, what stands on it.
//!
//! In between both are there, and a chain through both reads the same at every moment. Where C is the top of a LUN,
//! a merge down has to end although guests write: from its beginning they write to P (a **fold**), and what C says of a
//! grain goes there before the first of these writes. So C only ever loses entries.
//!
//! How far a merge is, nobody writes down. After a power loss it begins anew, either way: it finds less to do.

use std::rc::Rc;

use block::{BLOCK_BYTES, Buffer, DiskError, Safe, Segments, SegmentsMut};

use crate::catalog::{Catalog, HoldRecord, LayerRecord, LunRecord, Put, SnapshotRecord};
use crate::format::{Entry, GRAIN_BLOCKS, GRAIN_BYTES, Mark, PAGE_ENTRIES};
use crate::lun::Lun;
use crate::map::{MOST_LEAVES, leaf_of};
use crate::pool::Pool;

/// Entries that one step looks at, at most.
const MOST_LOOKED_AT: usize = 4096;
/// Entries moved at the same time: where data is copied, the copies overlap.
const ABREAST: usize = 16;
/// Pages looked at for which way is shorter, between two chances for others.
const LOOKS_IN_A_ROW: usize = 256;

/// The layer that is emptied into the other.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Way {
    /// The lower one.
    Up,
    /// The upper one.
    Down,
}

/// A merge under way.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Merging {
    pub(crate) below: u64,
    pub(crate) above: u64,
    way: Way,
    /// Grain of the LUN at which it goes on.
    next: u64,
    /// Guests write to the lower layer.
    folding: bool,
}

/// What came of a step.
pub(crate) enum Merged {
    /// Some of it is done.
    Part,
    /// Writers of this LUN have to be sent to the lower layer first: [`Pool::fold`].
    Fold(Rc<Lun>),
}

impl Merging {
    /// Both layers are there as they were when it began. (That a layer which nobody needs gets a name, or another child,
    /// cannot be.)
    pub(crate) fn goes_on(&self, catalog: &Catalog) -> bool {
        let lives = |id: u64| catalog.layers.get(&id).filter(|l| l.dying.is_none());
        lives(self.below).is_some() && lives(self.above).is_some_and(|l| l.parent == self.below)
    }

    fn ends(&self) -> (u64, u64) {
        match self.way {
            Way::Up => (self.below, self.above),
            Way::Down => (self.above, self.below),
        }
    }
}

/// A cut that is not over speaks of this layer.
pub(crate) fn is_being_cut(catalog: &Catalog, layer: u64) -> bool {
    let mut members = catalog.groups.values().flat_map(|g| &g.members);
    members.any(|m| [m.old_top, m.new_top, m.snapshot.layer].contains(&layer))
}

/// What C's entry becomes when P's is merged into it, and the blocks whose data has to come from P.
fn merged(below: Entry, above: Entry) -> (Entry, Vec<usize>) {
    let (mut out, mut wanted) = (above, Vec::new());
    for block in 0..GRAIN_BLOCKS {
        let (low, high) = (below.mark(block), above.mark(block));
        match high {
            // Its grain was given up, so it was hidden; whatever this is, it reads as zero.
            Mark::Below if low.in_grain() && below.grain() == 0 => out = out.with_mark(block, Mark::Zeroed),
            Mark::Below => {
                out = out.with_mark(block, low);
                if low.in_grain() {
                    wanted.push(block);
                }
            }
            Mark::Copied if low.changed() => out = out.with_mark(block, Mark::Written),
            Mark::Copied | Mark::Written | Mark::Zeroed => {}
        }
    }
    (out, wanted)
}

impl Pool {
    /// Goes on with a merge; touches at most `most` grains that need a copy.
    pub(crate) async fn merge_step(&self, below: u64, above: u64, most: usize) -> Result<Merged, DiskError> {
        let known = self.merging.get().filter(|m| (m.below, m.above) == (below, above));
        let mut merging = match known {
            Some(merging) => merging,
            None => self.begin_merge(below, above).await?,
        };
        if merging.way == Way::Down
            && !merging.folding
            && let Some(lun) = self.lun_with_top(above)
        {
            return Ok(Merged::Fold(lun));
        }
        let ended = self.merge_part(&mut merging, most).await?;
        // A fold may have begun meanwhile: then from the start.
        let same =
            self.merging.get().is_some_and(|m| m.ends() == merging.ends() && m.folding == merging.folding);
        if same {
            self.merging.set(Some(merging));
        }
        if ended && same {
            self.end_merge(merging);
        }
        Ok(Merged::Part)
    }

    async fn begin_merge(&self, below: u64, above: u64) -> Result<Merging, DiskError> {
        // That nobody else needs the lower layer is durable before a guest may overwrite what moved out of it, or what is
        // written to instead of the upper one.
        if self.is_needed_durably(below, above) {
            self.commit().await?;
        }
        let way = self.shorter_way(below, above).await?;
        let merging = Merging { below, above, way, next: 0, folding: false };
        if way == Way::Down {
            // What is moved may lie where the disk was shorter.
            let sectors = self.catalog.borrow().layers.get(&above).map_or(0, |l| l.sectors);
            self.grow_layer(below, sectors);
        }
        self.merging.set(Some(merging));
        tracing::debug!(pool = %self.uuid(), ?merging, "merge");
        Ok(merging)
    }

    /// Which map is smaller: both are walked in turn, so that finding out costs no more than the smaller one.
    async fn shorter_way(&self, below: u64, above: u64) -> Result<Way, DiskError> {
        if let Some(way) = self.merge_way.get() {
            return Ok(way);
        }
        let (mut low, mut high) = (0, 0);
        for looks in 1.. {
            match self.next_leaf(below, low, MOST_LEAVES).await? {
                None => break,
                Some(leaf) => low = leaf + 1,
            }
            match self.next_leaf(above, high, MOST_LEAVES).await? {
                None => return Ok(Way::Down),
                Some(leaf) => high = leaf + 1,
            }
            if looks % LOOKS_IN_A_ROW == 0 {
                lane::yield_now().await;
            }
        }
        Ok(Way::Up)
    }

    /// Writers of a LUN write to the layer below their top from now on. Waits for those that are inside, which may wait
    /// for room that the background makes: nobody who keeps the background from its work calls this.
    pub(crate) async fn fold(&self, lun: &Rc<Lun>) -> Result<(), DiskError> {
        let gate = lun.close_gate().await;
        // Others were at work meanwhile.
        let top = self.catalog.borrow().luns.get(&lun.id).map(|l| l.top);
        if let Some(merging) = self.merging.get()
            && merging.way == Way::Down
            && top == Some(merging.above)
            && merging.goes_on(&self.catalog.borrow())
        {
            let sectors = lun.record().map_or(0, |l| l.sectors);
            self.grow_layer(merging.below, sectors);
            self.resolved.forget_layer(merging.below);
            self.merging.set(Some(Merging { next: 0, folding: true, ..merging }));
        }
        drop(gate);
        Ok(())
    }

    fn grow_layer(&self, layer: u64, sectors: u64) {
        if self.catalog.borrow().layers.get(&layer).is_some_and(|l| l.sectors < sectors) {
            self.change_layer(layer, |l| l.sectors = sectors);
        }
    }

    /// Nobody writes to this layer: it is no top, and no top is folded into it.
    pub(crate) fn is_frozen(&self, layer: u64) -> bool {
        !self.merging.get().is_some_and(|m| m.folding && m.below == layer)
            && self.catalog.borrow().layers.get(&layer).is_some_and(|l| l.generation.is_some())
    }

    /// The layer that takes the writes instead of this top.
    #[inline]
    pub(crate) fn folds_into(&self, top: u64) -> Option<u64> {
        self.merging.get().filter(|m| m.folding && m.above == top).map(|m| m.below)
    }

    /// While a LUN's top is folded: brings what it says of a grain to the layer below. The layer that takes the writes.
    pub(crate) async fn fold_grain(&self, lun: &Lun, grain: u64) -> Result<u64, DiskError> {
        // The top's map stays what it is, even if the merge ends meanwhile.
        let _under_way = self.space.under_way();
        let target = lun.target()?;
        if target.over.is_some()
            && let Some(merging) = self.merging.get()
        {
            self.merge_grain(&merging, Some(lun), grain).await?;
        }
        Ok(target.layer)
    }

    /// Moves entries. True: there are no more.
    async fn merge_part(&self, merging: &mut Merging, most: usize) -> Result<bool, DiskError> {
        let (source, _) = merging.ends();
        let lun = self.lun_over(merging.above);
        let (mut looked_at, mut touched) = (0, 0);
        while looked_at < MOST_LOOKED_AT && touched < most {
            let (wanted, slot) = leaf_of(merging.next);
            let Some(number) = self.next_leaf(source, wanted, MOST_LEAVES).await? else { return Ok(true) };
            let first = if number == wanted { slot } else { 0 };
            let page = self.leaf(source, number).await?;
            let mut slots = Vec::with_capacity(ABREAST);
            let mut next = first;
            while let Some(slot) =
                page.as_ref().and_then(|p| p.next_set(next)).filter(|_| slots.len() < ABREAST)
            {
                slots.push(number * PAGE_ENTRIES as u64 + slot as u64);
                next = slot + 1;
            }
            looked_at += 1 + slots.len();
            while self.batch_is_full() {
                self.commit().await?;
            }
            merging.next = slots.last().map_or((number + 1) * PAGE_ENTRIES as u64, |last| last + 1);
            let work = slots.iter().map(|grain| self.merge_grain(merging, lun.as_deref(), *grain));
            for copied in lane::sync::together(work).await {
                touched += usize::from(copied?);
            }
        }
        Ok(false)
    }

    /// Merges the two entries for a grain. `lun`: whose writers may change them. True when data was copied.
    async fn merge_grain(&self, merging: &Merging, lun: Option<&Lun>, grain: u64) -> Result<bool, DiskError> {
        let (number, slot) = leaf_of(grain);
        // Guests that write to this grain wait, also those that would take it over from a boundary.
        let _locked = match lun {
            Some(lun) => Some(lun.lock_blocks(grain, 0..GRAIN_BLOCKS).await),
            None => None,
        };
        let (source, target) = merging.ends();
        let from = match self.leaf(source, number).await? {
            Some(page) if page.get(slot) != 0 => page,
            _ => return Ok(false), // somebody else was faster
        };
        let into = self.leaf_for_write(target, number).await?;
        let (low, high) = match merging.way {
            Way::Up => (Entry(from.get(slot)), Entry(into.get(slot))),
            Way::Down => (Entry(into.get(slot)), Entry(from.get(slot))),
        };
        let (mut entry, wanted) = merged(low, high);
        let (mut spare, mut taken_over) = (low.grain(), false);
        if spare == high.grain() {
            spare = 0; // the first half of this step survived a power loss, the second did not
        } else if high.grain() == 0 {
            if entry.holds_nothing() {
                entry = entry.with_grain(0);
            } else {
                entry = entry.with_grain(spare);
                taken_over = merging.way == Way::Up;
                spare = 0;
            }
        } else if !wanted.is_empty() {
            let _under_way = self.space.under_way();
            self.copy_blocks(low.grain(), high.grain(), &wanted).await?;
        }
        let page = match spare {
            0 => None,
            _ => Some(self.bitmap_page(spare).await?),
        };
        self.change_entry(&into, grain, entry);
        if taken_over {
            self.take_over(target, grain);
        }
        self.change_entry(&from, grain, Entry::default());
        if let Some(page) = page {
            self.free_grain(spare, &page);
        }
        self.moved(number);
        Ok(!wanted.is_empty())
    }

    /// One of the two layers is empty: it dies. Changes of one batch; what is not durable yet of the entries that moved
    /// lies before them in the journal.
    fn end_merge(&self, merging: Merging) {
        let Merging { below, above, way, folding, .. } = merging;
        if way == Way::Up {
            // Everything that may stand on P again (a hold, a clone) asks for a snapshot, which it has not.
            let parent = self.catalog.borrow().layers.get(&below).map_or(0, |l| l.parent);
            self.change_layer(above, |l| l.parent = parent);
            self.condemn(below);
        } else {
            let (cut, written_to) = {
                let catalog = self.catalog.borrow();
                (is_being_cut(&catalog, above), catalog.luns.values().any(|l| l.top == above) && !folding)
            };
            if cut || written_to {
                return; // prepared, or the top again, while the last step ran: later
            }
            self.take_place(below, above);
            self.condemn(above);
        }
        self.merging.set(None);
        self.chains_changed();
    }

    /// The lower layer becomes what the upper one was, for everybody who names that. Should the journal need several
    /// records for it: the upper one is empty and still there, so each of these changes is right by itself.
    fn take_place(&self, below: u64, above: u64) {
        let puts: Vec<Put> = {
            let catalog = self.catalog.borrow();
            let (Some(low), Some(high)) = (catalog.layers.get(&below), catalog.layers.get(&above)) else {
                return;
            };
            let new = LayerRecord { generation: high.generation, sectors: high.sectors, ..low.clone() };
            let other = |layer: u64| if layer == above { below } else { layer };
            let luns = catalog.luns.values().filter(|l| l.top == above || l.abandoned == Some(above));
            let luns = luns.map(|l| {
                Put::Lun(LunRecord { top: other(l.top), abandoned: l.abandoned.map(other), ..l.clone() })
            });
            let snapshots = catalog.snapshots.values().filter(|s| s.layer == above);
            let snapshots = snapshots.map(|s| Put::Snapshot(SnapshotRecord { layer: below, ..s.clone() }));
            let holds = catalog.holds.values().filter(|h| h.layer == above);
            let holds = holds.map(|h| Put::Hold(HoldRecord { layer: below, ..h.clone() }));
            let children = catalog.children(above);
            let children = children.map(|l| Put::Layer(LayerRecord { parent: below, ..l.clone() }));
            std::iter::once(Put::Layer(new))
                .chain(holds)
                .chain(snapshots)
                .chain(children)
                .chain(luns)
                .collect()
        };
        puts.into_iter().for_each(|put| self.put(put));
    }

    /// Copies blocks from one grain to another: one read from the first to the last of them, then each run of them is
    /// written, all at the same time.
    pub(crate) async fn copy_blocks(&self, from: u32, to: u32, blocks: &[usize]) -> Result<(), DiskError> {
        let (Some(first), Some(last)) = (blocks.first(), blocks.last()) else { return Ok(()) };
        let place = |grain: u32, block: usize| u64::from(grain) * GRAIN_BYTES + block as u64 * BLOCK_BYTES;
        let mut bytes = Buffer::for_overwrite((last + 1 - first) * BLOCK_BYTES as usize);
        self.media.read(place(from, *first), &SegmentsMut::new(&mut bytes)).await?;
        let runs = blocks.chunk_by(|a, b| a + 1 == *b).map(|run| {
            let inside = (run[0] - first) * BLOCK_BYTES as usize;
            let data = Segments::new(&bytes[inside..inside + run.len() * BLOCK_BYTES as usize]);
            async move { self.media.write(place(to, run[0]), &data, Safe::AtNextFlush).await }
        });
        lane::sync::together(runs).await.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r43_merged_marks_never_lose_a_change() {
        let marks = [Mark::Below, Mark::Written, Mark::Zeroed, Mark::Copied];
        for (low, high) in marks.iter().flat_map(|l| marks.iter().map(move |h| (*l, *h))) {
            let below = Entry::default().with_grain(7).with_mark(3, low);
            let above = Entry::default().with_grain(9).with_mark(3, high);
            // Given up, and hidden: only marks are left.
            if high != Mark::Below {
                let (entry, wanted) = merged(below.with_grain(0), above);
                assert_eq!((entry.0, &wanted[..]), (merged(below, above).0.0, &[][..]));
            }
            let (entry, wanted) = merged(below, above);
            let mark = entry.mark(3);
            assert_eq!(mark.changed(), low.changed() || high.changed(), "{low:?} under {high:?}");
            assert_eq!(wanted == [3], high == Mark::Below && low.in_grain());
            assert_eq!(mark.in_grain(), high.in_grain() || (high == Mark::Below && low.in_grain()));
        }
    }
}
