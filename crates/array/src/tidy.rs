//! Work in the background: layers that nobody needs any more are merged into their one child (`merge.rs`) or taken
//! apart, and the trash is emptied. Every step is one batch of the journal or harmless by itself, so power may fail
//! between any two; and each is short, whatever the size of the layers.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use block::{DiskError, MediumFault, Sector};

use crate::catalog::{Catalog, LayerRecord, Put};
use crate::format::{Entry, GRAIN_PAIRS, PAGE_ENTRIES, PAIR_BYTES};
use crate::lun::Lun;
use crate::map::MOST_LEAVES;
use crate::merge::{Merged, Merging, is_being_cut};
use crate::pool::Pool;
use crate::space::Purpose;
use crate::walk::{Node, Seen};

/// Seconds that a removed LUN lies in the trash.
pub const TRASH_SECONDS: u64 = 7 * 24 * 3600;
/// Set in [`LayerRecord::dying`] when the data is given back and the map's own grains follow.
pub(crate) const MAP_FOLLOWS: u64 = 1 << 63;
/// Leaves of a dying layer whose grains are given back in one step.
const LEAVES_IN_A_STEP: usize = 256;
/// Grains of a map given back in one batch.
const MAP_GRAINS: usize = 256;
/// Grains that a step of the background gives up or completes, at most, while guests are at work.
const COPIES_BESIDE_GUESTS: usize = 4;
/// The same when nobody reads or writes.
const COPIES_ALONE: usize = 64;
/// Grains that a step of a merge copies, about, while guests are at work.
const MERGED_BESIDE_GUESTS: usize = 32;
/// The same when nobody reads or writes.
const MERGED_ALONE: usize = 512;

/// What there is to do.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Work {
    /// Nobody needs the layer: mark it as dying.
    Condemn(u64),
    /// A dying layer gives back what it holds.
    TakeApart(u64),
    /// Into its child.
    Merge { below: u64, above: u64 },
    /// A LUN was in the trash long enough.
    Purge(u64),
    /// No history has the generation any more that somebody holds.
    Forget(u64),
}

/// Layers that somebody reads or may read again, by a name of their own.
pub(crate) fn named(catalog: &Catalog) -> BTreeSet<u64> {
    let luns = catalog.luns.values().flat_map(|l| [Some(l.top), l.abandoned].into_iter().flatten());
    let snapshots = catalog.snapshots.values().map(|s| s.layer);
    let members = catalog.groups.values().flat_map(|g| &g.members);
    let groups = members.flat_map(|m| [m.old_top, m.new_top, m.snapshot.layer]);
    luns.chain(snapshots).chain(groups).collect()
}

/// A hold of a generation that is in no history of a LUN or snapshot.
fn forgotten_hold(catalog: &Catalog, named: &BTreeSet<u64>) -> Option<u64> {
    if catalog.holds.is_empty() {
        return None;
    }
    let known: BTreeSet<u64> = named.iter().flat_map(|top| catalog.chain(*top).map(|l| l.id)).collect();
    catalog.holds.values().find(|h| !known.contains(&h.layer)).map(|h| h.id)
}

/// What came of a step.
enum Did {
    /// There was nothing to do.
    Nothing,
    /// Some of what there was.
    Work,
    /// [`Pool::fold`] is wanted, by a step that may wait for writers.
    Fold(Rc<Lun>),
}

/// The next thing to do, if any. `now`: seconds since 1970. `current`: a merge that began, which goes before others.
/// `folds`: merges may send writers elsewhere.
fn next_work(catalog: &Catalog, now: u64, current: Option<Merging>, folds: bool) -> Option<Work> {
    let mut anchored = named(catalog);
    if let Some(hold) = forgotten_hold(catalog, &anchored) {
        return Some(Work::Forget(hold));
    }
    // A cut that is prepared speaks of its layers by their numbers.
    let may_merge = |above: u64| {
        !is_being_cut(catalog, above) && (folds || !catalog.luns.values().any(|l| l.top == above))
    };
    if let Some(Merging { below, above, .. }) = current.filter(|m| may_merge(m.above)) {
        return Some(Work::Merge { below, above });
    }
    anchored.extend(catalog.holds.values().map(|h| h.layer));
    let mut children = BTreeMap::<u64, (u64, u64)>::new();
    for layer in catalog.layers.values().filter(|l| l.dying.is_none()) {
        let entry = children.entry(layer.parent).or_default();
        *entry = (entry.0 + 1, layer.id);
    }
    for layer in catalog.layers.values() {
        if layer.dying.is_some() {
            return Some(Work::TakeApart(layer.id));
        }
        if anchored.contains(&layer.id) {
            continue;
        }
        match children.get(&layer.id) {
            None => return Some(Work::Condemn(layer.id)),
            Some((1, above)) if current.is_none() && may_merge(*above) => {
                return Some(Work::Merge { below: layer.id, above: *above });
            }
            Some(_) => {} // hidden: several need it, or a merge that waits comes first
        }
    }
    let old = |trashed: u64| now.saturating_sub(trashed) >= TRASH_SECONDS;
    let trash = catalog.luns.values().filter_map(|l| l.trashed.map(|t| (t, l.id)));
    trash.min().filter(|(trashed, _)| old(*trashed)).map(|(_, lun)| Work::Purge(lun))
}

impl Pool {
    /// There is work for [`Pool::tidy_step`].
    pub fn is_untidy(&self) -> bool {
        self.next_work(true).is_some()
            || self.unsaved.get()
            || self.has_stale_grains()
            || self.has_boundary_to_pass()
            || !self.noted.is_empty()
    }

    /// A guest reads or writes: the background yields.
    #[inline]
    pub(crate) fn guest_is_here(&self) {
        self.guest_operations.set(self.guest_operations.get() + 1);
    }

    fn next_work(&self, folds: bool) -> Option<Work> {
        let catalog = self.catalog.borrow();
        let current = self.merging.get().filter(|m| m.goes_on(&catalog));
        next_work(&catalog, crate::seconds_now(), current, folds)
    }

    /// Does everything that there is to do in the background, also what would wait for guests to be idle.
    pub async fn tidy(&self) -> Result<(), DiskError> {
        let mut aged = false;
        loop {
            let turn = self.tidy_turn.take().await;
            let did = match self.work_step(MERGED_ALONE, true).await? {
                Did::Work => true,
                Did::Nothing => {
                    self.punch_step().await?
                        || self.give_up_step(COPIES_ALONE).await?
                        || self.noted.is_due() && self.squash_step(COPIES_ALONE, false).await?
                }
                Did::Fold(lun) => {
                    drop(turn);
                    self.fold(&lun).await?;
                    true
                }
            };
            if !did && aged {
                return Ok(());
            }
            if !did {
                self.noted.all_due();
                aged = true;
            }
        }
    }

    /// Does one piece of background work; false: there is none.
    pub async fn tidy_step(&self) -> Result<bool, DiskError> {
        let turn = self.tidy_turn.take().await;
        let seen = self.guest_operations.get();
        let guests = self.seen_guests.replace(seen) != seen;
        let (most, merged) = match guests {
            true => (COPIES_BESIDE_GUESTS, MERGED_BESIDE_GUESTS),
            false => (COPIES_ALONE, MERGED_ALONE),
        };
        match self.work_step(merged, true).await? {
            Did::Work => Ok(true),
            Did::Nothing => Ok(self.punch_step().await?
                || self.give_up_step(most).await?
                || self.squash_step(most, guests).await?),
            Did::Fold(lun) => {
                drop(turn);
                self.fold(&lun).await?;
                Ok(true)
            }
        }
    }

    /// One piece of work that the catalog asks for; a merge copies about `merged` grains.
    async fn work_step(&self, merged: usize, folds: bool) -> Result<Did, DiskError> {
        self.writable()?;
        let Some(work) = self.next_work(folds) else {
            // Many small pieces share one commit.
            if self.unsaved.replace(false) {
                self.commit().await?;
            }
            return Ok(Did::Nothing);
        };
        tracing::trace!(pool = %self.uuid(), ?work, "background work");
        match work {
            Work::Condemn(layer) => self.condemn(layer),
            Work::TakeApart(layer) => self.take_apart(layer).await?,
            Work::Merge { below, above } => {
                if let Merged::Fold(lun) = self.merge_step(below, above, merged).await? {
                    return Ok(Did::Fold(lun));
                }
            }
            Work::Purge(lun) => self.purge(lun).await?,
            Work::Forget(hold) => self.put(Put::DropHold(hold)),
        }
        self.unsaved.set(true);
        Ok(Did::Work)
    }

    /// All of it, for a writer that waits for room: nothing that waits for writers.
    async fn work(&self) -> Result<(), DiskError> {
        loop {
            let _turn = self.tidy_turn.take().await;
            if !matches!(self.work_step(MERGED_ALONE, false).await?, Did::Work) {
                return Ok(());
            }
        }
    }

    /// The pool is nearly full: what lies in the trash makes room before guests are refused.
    pub(crate) fn make_room_early(&self) {
        let trash = || self.catalog.borrow().luns.values().any(|l| l.trashed.is_some());
        if self.space.has_room(Purpose::Background) || self.making_room.get() || !trash() {
            return;
        }
        let Some(pool) = self.me.upgrade() else { return };
        self.making_room.set(true);
        drop(lane::spawn(async move {
            if let Err(error) = pool.make_room().await {
                tracing::warn!(pool = %pool.uuid(), %error, "no room could be made");
            }
            pool.making_room.set(false);
        }));
    }

    /// Empties the trash as far as room is needed. The caller holds no block of a LUN: a merge may wait for it.
    pub(crate) async fn make_room(&self) -> Result<(), DiskError> {
        while !self.space.has_room(Purpose::Background) && self.purge_oldest().await? {
            self.work().await?;
        }
        Ok(())
    }

    /// Gives the oldest LUN in the trash up, whose room is needed. False: there is none.
    pub(crate) async fn purge_oldest(&self) -> Result<bool, DiskError> {
        let oldest = {
            let catalog = self.catalog.borrow();
            let trash = catalog.luns.values().filter_map(|l| l.trashed.map(|t| (t, l.id)));
            trash.min()
        };
        match oldest {
            None => Ok(false),
            Some((_, lun)) => {
                tracing::info!(pool = %self.uuid(), lun, "the pool needs the room of a removed LUN");
                self.purge(lun).await.map(|()| true)
            }
        }
    }

    /// A LUN is gone for good, with its snapshots and what held their generations.
    pub(crate) async fn purge(&self, lun: u64) -> Result<(), DiskError> {
        let puts: Vec<Put> = {
            let catalog = self.catalog.borrow();
            let snapshots: Vec<_> = catalog.snapshots.values().filter(|s| s.lun == lun).collect();
            snapshots.iter().map(|s| Put::DropSnapshot(s.id)).chain([Put::DropLun(lun)]).collect()
        };
        puts.into_iter().for_each(|put| self.put(put));
        self.chains_changed();
        self.commit().await
    }

    pub(crate) fn change_layer(&self, layer: u64, change: impl FnOnce(&mut LayerRecord)) {
        let record = self.catalog.borrow().layers.get(&layer).cloned();
        if let Some(mut record) = record {
            change(&mut record);
            self.put(Put::Layer(record));
        }
    }

    /// Nobody needs the layer: what it stands on may go before it.
    pub(crate) fn condemn(&self, layer: u64) {
        self.change_layer(layer, |l| (l.dying, l.parent) = (Some(0), 0));
    }

    /// Gives back what a dying layer holds: data grains leaf by leaf, some in each step, then the grains of its map,
    /// then its record.
    async fn take_apart(&self, layer: u64) -> Result<(), DiskError> {
        let dying = |pool: &Self| pool.catalog.borrow().layers.get(&layer).and_then(|l| l.dying).unwrap_or(0);
        if dying(self) & MAP_FOLLOWS == 0 {
            for _ in 0..LEAVES_IN_A_STEP {
                let Some(leaf) = self.next_leaf(layer, dying(self), MOST_LEAVES).await? else {
                    self.change_layer(layer, |l| l.dying = Some(MAP_FOLLOWS));
                    break;
                };
                self.free_leaf(layer, leaf).await?;
                if self.batch_is_full() {
                    self.commit().await?;
                }
            }
            // Durable before its pages are forgotten: what they say is not looked at again.
            self.commit().await?;
            if dying(self) & MAP_FOLLOWS == 0 {
                return Ok(());
            }
        }
        let (leaves, inner) = self.map_grains(layer).await?;
        // From here on no page of the map may be written any more: its place will be somebody else's.
        self.pages.forget_tree(layer);
        let done = dying(self) & !MAP_FOLLOWS;
        let list: Vec<(u64, u32)> = leaves.into_iter().filter(|(leaf, _)| *leaf >= done).collect();
        for part in list.chunks(MAP_GRAINS) {
            self.free_grains(part.iter().map(|(_, grain)| *grain)).await?;
            let upto = part.last().map_or(0, |(leaf, _)| leaf + 1);
            self.change_layer(layer, |l| l.dying = Some(MAP_FOLLOWS | upto));
            if self.batch_is_full() {
                self.commit().await?;
            }
        }
        self.free_grains(inner.into_iter()).await?;
        self.put(Put::DropLayer(layer));
        Ok(())
    }

    async fn free_leaf(&self, layer: u64, number: u64) -> Result<(), DiskError> {
        if let Some(leaf) = self.leaf(layer, number).await? {
            let grains: Vec<u32> =
                (0..PAGE_ENTRIES).map(|slot| Entry(leaf.get(slot)).grain()).filter(|g| *g != 0).collect();
            self.free_grains(grains.into_iter()).await?;
        }
        self.change_layer(layer, |l| l.dying = Some(number + 1));
        Ok(())
    }

    /// Frees grains in one batch: their pages first, then everything at once.
    async fn free_grains(&self, grains: impl Iterator<Item = u32>) -> Result<(), DiskError> {
        let mut pages = Vec::new();
        for grain in grains {
            pages.push((grain, self.bitmap_page(grain).await?));
        }
        pages.iter().for_each(|(grain, page)| self.free_grain(*grain, page));
        Ok(())
    }

    /// The grains that hold a layer's map: those with leaves only, by their lowest leaf, and those with inner pages.
    pub(crate) async fn map_grains(&self, layer: u64) -> Result<(Vec<(u64, u32)>, BTreeSet<u32>), DiskError> {
        let mut leaves = BTreeMap::<u32, u64>::new();
        let mut inner = BTreeSet::new();
        let mut damage = None;
        self.walk(layer, false, &mut |seen| match seen {
            Seen::Node(Node { level, leaf, pair }) => {
                let grain = (pair / GRAIN_PAIRS) as u32;
                match level {
                    0 => drop(leaves.entry(grain).and_modify(|l| *l = leaf.min(*l)).or_insert(leaf)),
                    _ => drop(inner.insert(grain)),
                }
            }
            Seen::Leaf(..) => {}
            Seen::Outside(node) | Seen::Damaged(node) => damage = Some(node),
        })
        .await?;
        if let Some(node) = damage {
            let at = Sector::at_byte(node.pair.wrapping_mul(PAIR_BYTES));
            return Err(DiskError::Medium(MediumFault { at, what: "a map that is taken apart is damaged" }));
        }
        let mut list: Vec<(u64, u32)> =
            leaves.into_iter().filter(|(g, _)| !inner.contains(g)).map(|(g, l)| (l, g)).collect();
        list.sort_unstable();
        Ok((list, inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::LunRecord;

    const BORN: u64 = 1_000_000;

    /// LUNs that went into the trash so many seconds after another, by number; 0: still there.
    fn catalog(trashed: &[u64]) -> Catalog {
        let mut catalog = Catalog::default();
        for (number, after) in trashed.iter().enumerate() {
            let id = 1 + number as u64;
            catalog.put(Put::Layer(LayerRecord::empty(100 + id, 8)));
            catalog.put(Put::Lun(LunRecord {
                id,
                uuid: uuid::Uuid::from_u128(u128::from(id)),
                name: format!("lun{id}"),
                sectors: 8,
                top: 100 + id,
                created: BORN,
                trashed: (*after > 0).then_some(BORN + after),
                claim: None,
                abandoned: None,
            }));
        }
        catalog
    }

    #[test]
    fn the_trash_is_emptied_after_seven_days_and_not_a_second_before() {
        let catalog = catalog(&[0, 10]);
        let at = |seconds: u64| next_work(&catalog, BORN + 10 + seconds, None, true);
        assert_eq!(TRASH_SECONDS, 604_800, "seven days");
        assert_eq!(at(0), None);
        assert_eq!(at(TRASH_SECONDS - 1), None);
        assert_eq!(at(TRASH_SECONDS), Some(Work::Purge(2)));
        assert_eq!(at(10 * TRASH_SECONDS), Some(Work::Purge(2)), "a LUN that lives stays for ever");
        // A clock that goes back takes nothing away.
        assert_eq!(next_work(&catalog, 0, None, true), None);
    }

    #[test]
    fn what_lies_longest_in_the_trash_goes_first() {
        let mut catalog = catalog(&[50, 30, 0, 40]);
        let mut order = Vec::new();
        while let Some(Work::Purge(lun)) = next_work(&catalog, BORN + 45 + TRASH_SECONDS, None, true) {
            order.push(lun);
            let top = catalog.luns[&lun].top;
            catalog.put(Put::DropLun(lun));
            catalog.put(Put::DropLayer(top));
        }
        assert_eq!(order, [2, 4], "and the youngest waits for its own time");
    }
}
