//! Numbers for `show`, and the pool's structures as text for `inspect`. Reads the maps of the layers asked for.

use std::cell::{Cell, RefCell};
use std::fmt::Write;

use block::DiskError;

use crate::check::{LayerUse, Report};
use crate::format::{Entry, GRAIN_BYTES};
use crate::lun::Lun;
use crate::pages::FastMap;
use crate::pool::Pool;
use crate::read::masks;
use crate::snapshot::LunError;

/// What a LUN takes.
#[derive(Copy, Clone, Default, PartialEq, Eq, Debug)]
pub struct LunUse {
    /// Its top layer: what was written since the newest cut.
    pub own: LayerUse,
    /// Bytes of all layers below it, shared with its snapshots and perhaps with other LUNs.
    pub below_bytes: u64,
}

/// What layers take: those that began since the pool was opened, and those that somebody asked for. Kept right with
/// every change of an entry, so that asking again costs nothing.
#[derive(Default)]
pub(crate) struct Usage {
    known: RefCell<FastMap<u64, LayerUse>>,
    changes: Cell<u64>,
}

impl LayerUse {
    /// Counts an entry in.
    pub(crate) fn add(&mut self, entry: Entry) {
        let (written, zeroed, copied) = marks(entry);
        self.data_grains += u64::from(entry.grain() != 0);
        self.written_blocks += written;
        self.zeroed_blocks += zeroed;
        self.copied_blocks += copied;
    }

    /// Counts an entry out.
    fn take_off(&mut self, entry: Entry) {
        let (written, zeroed, copied) = marks(entry);
        self.data_grains = self.data_grains.saturating_sub(u64::from(entry.grain() != 0));
        self.written_blocks = self.written_blocks.saturating_sub(written);
        self.zeroed_blocks = self.zeroed_blocks.saturating_sub(zeroed);
        self.copied_blocks = self.copied_blocks.saturating_sub(copied);
    }
}

/// Blocks written, zeroed and copied in an entry.
fn marks(entry: Entry) -> (u64, u64, u64) {
    let (held, zeroed) = masks(entry);
    let changed = crate::read::changed_blocks(entry);
    let count = |blocks: u16| u64::from(blocks.count_ones());
    (count(held & changed), count(zeroed), count(held & !changed))
}

impl Usage {
    /// A new, empty layer.
    pub(crate) fn begin(&self, layer: u64) {
        self.known.borrow_mut().insert(layer, LayerUse::default());
    }

    /// A layer is gone.
    pub(crate) fn end(&self, layer: u64) {
        self.known.borrow_mut().remove(&layer);
    }

    /// An entry of a layer changed.
    pub(crate) fn changed(&self, layer: u64, old: Entry, new: Entry) {
        self.changes.set(self.changes.get() + 1);
        if let Some(usage) = self.known.borrow_mut().get_mut(&layer) {
            usage.take_off(old);
            usage.add(new);
        }
    }

    /// The map of a layer took another grain.
    pub(crate) fn map_grew(&self, layer: u64) {
        self.changes.set(self.changes.get() + 1);
        if let Some(usage) = self.known.borrow_mut().get_mut(&layer) {
            usage.map_grains += 1;
        }
    }
}

impl Pool {
    /// What one layer takes: for a snapshot's layer, what it keeps. Reads its map when it is asked for the first time
    /// since the pool was opened; while others change it meanwhile, the answer is about right.
    pub async fn layer_use(&self, layer: u64) -> Result<LayerUse, DiskError> {
        let mut last = LayerUse::default();
        for _ in 0..3 {
            if let Some(known) = self.usage.known.borrow().get(&layer) {
                return Ok(*known);
            }
            let before = self.usage.changes.get();
            let catalog = self.catalog.borrow().clone();
            let mut report = Report::default();
            self.check_layer(&catalog, layer, &mut report, &mut |_, _, _| {}).await?;
            last = report.layers.get(&layer).copied().unwrap_or_default();
            if self.usage.changes.get() == before && catalog.layers.contains_key(&layer) {
                self.usage.known.borrow_mut().insert(layer, last);
            }
        }
        Ok(last)
    }

    /// Frozen layers that have no name any more and stay because several LUNs or snapshots stand on them, or because
    /// somebody holds their generation: layer, bytes, and who holds it.
    pub async fn hidden_layers(&self) -> Result<Vec<(u64, u64, Vec<String>)>, DiskError> {
        let hidden: Vec<(u64, Vec<String>)> = {
            let catalog = self.catalog.borrow();
            let named = |layer: u64| {
                catalog.snapshots.values().any(|s| s.layer == layer)
                    || catalog.luns.values().any(|l| l.top == layer || l.abandoned == Some(layer))
            };
            let holders = |layer: u64| {
                catalog.holds.values().filter(|h| h.layer == layer).map(|h| h.holder.clone()).collect()
            };
            let unnamed = catalog.layers.values().filter(|l| l.dying.is_none() && !named(l.id));
            unnamed.map(|layer| (layer.id, holders(layer.id))).collect()
        };
        let mut out = Vec::with_capacity(hidden.len());
        for (layer, holders) in hidden {
            out.push((layer, self.layer_use(layer).await?.bytes(), holders));
        }
        Ok(out)
    }

    /// Everything the pool knows besides the maps, as text for `inspect`.
    pub fn dump(&self) -> String {
        let (info, catalog) = (self.info(), self.catalog.borrow());
        let mut out = format!("{info:#?}\n");
        for (number, medium) in self.media.list.iter().enumerate() {
            // Writing to a String cannot fail.
            let _ = writeln!(
                out,
                "medium {number}: grains {}+{} of {GRAIN_BYTES} bytes, {} of them the system's, bitmap at {}",
                medium.first, medium.grains, medium.reserved, medium.bitmap_grain
            );
        }
        let _ = writeln!(out, "{catalog:#?}");
        out
    }
}

impl Lun {
    /// What it takes.
    pub async fn usage(&self) -> Result<LunUse, DiskError> {
        let layers = self.layers();
        let Some((top, below)) = layers.split_first() else { return Err(DiskError::Gone) };
        let own = self.pool.layer_use(*top).await?;
        let mut below_bytes = 0;
        for layer in below {
            below_bytes += self.pool.layer_use(*layer).await?.bytes();
        }
        Ok(LunUse { own, below_bytes })
    }

    /// What a snapshot keeps: its layer. What lies below belongs to older ones.
    pub async fn snapshot_use(&self, name: &str) -> Result<LayerUse, LunError> {
        let layer = self.find_snapshot(name)?.layer;
        Ok(self.pool.layer_use(layer).await?)
    }
}
