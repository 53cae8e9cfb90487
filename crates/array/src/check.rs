//! `pool check`: everything that the structures of a pool say twice is compared.
//!
//! An open pool is checked as memory knows it (journal replayed). What changes while it is looked at may look wrong:
//! when there are findings and something was committed meanwhile, the check is done again, and what both saw counts.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use block::DiskError;

use crate::boundary::open_blocks;
use crate::catalog::Catalog;
use crate::format::{BITMAP_GRAINS, Entry, GRAIN_PAIRS, GRAIN_SECTORS, PAGE_ENTRIES};
use crate::pool::Pool;
use crate::space::bitmap_place;
use crate::tidy::MAP_FOLLOWS;
use crate::walk::{Node, Seen};

/// Findings listed one by one; more are only counted.
const MOST_FINDINGS: usize = 10_000;

/// One thing that is wrong.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, thiserror::Error)]
pub enum Finding {
    /// Grains are marked as used and nothing refers to them: a leak. Harmless, and given back by a repair.
    #[error("grains {first}+{count}: used, but nothing refers to them")]
    Leak {
        /// The first.
        first: u64,
        /// How many.
        count: u64,
    },
    /// Two maps refer to one grain.
    #[error("grain {grain}: belongs to {} and to {}", owners.0, owners.1)]
    OwnedTwice {
        /// The grain.
        grain: u64,
        /// Who.
        owners: (Owner, Owner),
    },
    /// A map refers to a grain that is marked as free.
    #[error("grain {grain}: belongs to {owner}, but is free")]
    NotUsed {
        /// The grain.
        grain: u64,
        /// Who refers to it.
        owner: Owner,
    },
    /// A reference to what is no grain for data: past the end of the pool, or the system's.
    #[error("{owner}: refers to grain {grain}, which holds no data of LUNs")]
    Outside {
        /// The grain.
        grain: u64,
        /// Who refers to it.
        owner: Owner,
    },
    /// No copy of a map page is whole.
    #[error("{owner}: no copy of its page is whole")]
    DamagedPage {
        /// Which page.
        owner: Owner,
    },
    /// A bitmap page of which no copy is whole.
    #[error("medium {medium}: no copy of bitmap page {index} is whole")]
    DamagedBitmap {
        /// The medium.
        medium: u64,
        /// The page.
        index: u64,
    },
    /// An entry beyond the end of the LUN.
    #[error("{owner}: lies beyond the end of its layer")]
    PastEnd {
        /// Which entry.
        owner: Owner,
    },
    /// Blocks are marked as held and there is no grain.
    #[error("{owner}: holds blocks, but has no grain")]
    NoGrain {
        /// Which entry.
        owner: Owner,
    },
    /// A boundary's data was given up and is still to be seen: it reads as zero.
    #[error("{owner}: its data was given up, but no layer above hides it")]
    NotHidden {
        /// Which entry.
        owner: Owner,
    },
    /// A grain of the system is marked as free.
    #[error("grain {grain}: the system's own, but free")]
    SystemFree {
        /// The grain.
        grain: u64,
    },
    /// The number of used grains is not what the bitmap says.
    #[error("{found} grains are said to be in use, the bitmap has {expected}")]
    UsedCount {
        /// Said.
        found: u64,
        /// Counted.
        expected: u64,
    },
    /// Objects of the catalog do not fit together.
    #[error("{object} {id}: {what} {other}")]
    Catalog {
        /// Its kind.
        object: &'static str,
        /// Its number.
        id: u64,
        /// What is wrong.
        what: &'static str,
        /// The number of the other object.
        other: u64,
    },
}

/// Who refers to a grain.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Owner {
    /// The entry for a grain of the LUN in a layer's map.
    Entry {
        /// The layer.
        layer: u64,
        /// The grain of the LUN.
        index: u64,
    },
    /// A page of a layer's map.
    Page {
        /// The layer.
        layer: u64,
        /// 0 for leaves.
        level: u32,
        /// First leaf below it.
        leaf: u64,
    },
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Entry { layer, index } => write!(f, "layer {layer} at grain {index}"),
            Self::Page { layer, level, leaf } => {
                write!(f, "the map of layer {layer} (level {level}, leaf {leaf})")
            }
        }
    }
}

/// What a layer takes, in grains of 64 KiB and blocks of 4 KiB.
#[derive(Copy, Clone, Default, PartialEq, Eq, Debug)]
pub struct LayerUse {
    /// Grains with data.
    pub data_grains: u64,
    /// Grains with its map.
    pub map_grains: u64,
    /// Blocks written in it.
    pub written_blocks: u64,
    /// Blocks zeroed in it.
    pub zeroed_blocks: u64,
    /// Blocks copied into it.
    pub copied_blocks: u64,
}

impl LayerUse {
    /// Bytes that come back when the layer goes.
    pub fn bytes(&self) -> u64 {
        (self.data_grains + self.map_grains) * crate::format::GRAIN_BYTES
    }
}

/// What a check found.
#[derive(Clone, Default, Debug)]
pub struct Report {
    /// In order of kind and place.
    pub findings: Vec<Finding>,
    /// Findings beyond those listed.
    pub more: u64,
    /// What each layer takes.
    pub layers: BTreeMap<u64, LayerUse>,
    /// Grains looked at.
    pub grains: u64,
    /// Pages could not be read: what they refer to is not known, so leaks cannot be told from it.
    pub incomplete: bool,
}

impl Report {
    /// Findings that are no leaks.
    pub fn faults(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(|f| !matches!(f, Finding::Leak { .. }))
    }

    /// Leaked grains.
    pub fn leaked_grains(&self) -> u64 {
        self.findings.iter().map(|f| if let Finding::Leak { count, .. } = f { *count } else { 0 }).sum()
    }

    fn add(&mut self, finding: Finding) {
        match self.findings.len() < MOST_FINDINGS {
            true => self.findings.push(finding),
            false => self.more += 1,
        }
    }
}

/// A bit per grain.
struct Bits(Vec<u64>);

impl Bits {
    fn set(&mut self, bit: u64) -> bool {
        let word = &mut self.0[(bit / 64) as usize];
        let old = *word >> (bit % 64) & 1 == 1;
        *word |= 1 << (bit % 64);
        old
    }
    fn get(&self, bit: u64) -> bool {
        self.0[(bit / 64) as usize] >> (bit % 64) & 1 == 1
    }
}

impl Pool {
    /// Compares everything that is said twice. Reads all maps; writes nothing.
    pub async fn check(&self) -> Result<Report, DiskError> {
        let _turn = self.tidy_turn.take().await;
        let mut report = self.check_once().await?;
        for _ in 0..3 {
            let before = self.commits_begun();
            if report.findings.is_empty() {
                break;
            }
            let again = self.check_once().await?;
            let seen: BTreeSet<Finding> = report.findings.iter().cloned().collect();
            report = again;
            if self.commits_begun() == before {
                break;
            }
            report.findings.retain(|f| seen.contains(f));
        }
        Ok(report)
    }

    /// Checks, and gives leaked grains back: what was found, and how many grains. Guests may go on meanwhile: a grain that
    /// got another owner while it was looked at is none of them. Where anything else is wrong nothing is given back: what
    /// nobody refers to may be what a damaged map lost.
    pub async fn repair_leaks(&self) -> Result<(Report, u64), DiskError> {
        let _turn = self.tidy_turn.take().await;
        self.writable()?;
        let mut report = Report::default();
        for _ in 0..3 {
            self.moving.replace(Some(HashSet::new()));
            let checked = self.check_once().await;
            let moved = self.moving.take().unwrap_or_default();
            report = checked?;
            // What guests did meanwhile may look wrong, and does not look so for long.
            if !report.incomplete && report.more == 0 && report.faults().next().is_none() {
                let count = self.free_leaks(&report, &moved).await?;
                return Ok((report, count));
            }
        }
        Ok((report, 0))
    }

    async fn free_leaks(&self, report: &Report, moved: &HashSet<u32>) -> Result<u64, DiskError> {
        let mut count = 0;
        for finding in &report.findings {
            let Finding::Leak { first, count: grains } = finding else { continue };
            for grain in (*first..first + grains).map(|g| g as u32).filter(|g| !moved.contains(g)) {
                // Its bit is set, and nothing refers to it: nobody else can get at it meanwhile.
                let page = self.bitmap_page(grain).await?;
                self.free_grain(grain, &page);
                count += 1;
                if self.batch_is_full() {
                    self.commit().await?;
                }
            }
        }
        self.commit().await?;
        Ok(count)
    }

    async fn check_once(&self) -> Result<Report, DiskError> {
        let catalog = self.catalog.borrow().clone();
        let mut report = Report::default();
        cross_references(&catalog, &mut report);
        let mut owned = Bits(vec![0; self.space.grains().div_ceil(64) as usize]);
        let (mut twice, mut owners) = (BTreeSet::new(), Vec::new());
        for layer in catalog.layers.values() {
            self.check_layer(&catalog, layer.id, &mut report, &mut |grain, owner, first_of_layer| {
                if first_of_layer && owned.set(grain) {
                    twice.insert(grain);
                    owners.push((grain, owner));
                }
            })
            .await?;
        }
        self.check_boundaries(&catalog, &mut report).await?;
        let unused = self.check_bitmap(&owned, &mut report).await?;
        let first = self.owners(&catalog, twice.union(&unused).copied().collect()).await?;
        for (grain, owner) in owners {
            if let Some(other) = first.get(&grain) {
                report.add(Finding::OwnedTwice { grain, owners: (*other, owner) });
            }
        }
        for grain in unused {
            if let Some(owner) = first.get(&grain) {
                report.add(Finding::NotUsed { grain, owner: *owner });
            }
        }
        report.findings.sort();
        Ok(report)
    }

    /// Looks at one layer's map. `own` is told each grain referred to, and whether this layer's map refers to it for
    /// the first time (several pages of one map share a grain).
    pub(crate) async fn check_layer(
        &self,
        catalog: &Catalog,
        layer: u64,
        report: &mut Report,
        own: &mut dyn FnMut(u64, Owner, bool),
    ) -> Result<(), DiskError> {
        let Some(record) = catalog.layers.get(&layer) else { return Ok(()) };
        let end = record.sectors.div_ceil(GRAIN_SECTORS);
        let gone = record.dying.unwrap_or(0);
        // A layer that is held and whose data moved up keeps marks only.
        let marks_only = !crate::tidy::named(catalog).contains(&layer);
        let mut usage = LayerUse::default();
        let mut map_grains = BTreeSet::new();
        let mut findings = Vec::new();
        let mut incomplete = false;
        if gone & MAP_FOLLOWS != 0 {
            // The map itself is being given back: leaves may be somebody else's already, inner pages go last.
            let (leaves, inner) = self.map_grains(layer).await?;
            let rest =
                leaves.into_iter().filter(|(leaf, _)| *leaf >= gone & !MAP_FOLLOWS).map(|(_, grain)| grain);
            let owner = Owner::Page { layer, level: 1, leaf: 0 };
            rest.chain(inner).for_each(|grain| own(u64::from(grain), owner, true));
            return Ok(());
        }
        self.walk(layer, true, &mut |seen| match seen {
            Seen::Node(node) => {
                let grain = node.pair / GRAIN_PAIRS;
                own(grain, page_owner(layer, node), map_grains.insert(grain));
            }
            Seen::Leaf(node, page) => {
                for slot in 0..PAGE_ENTRIES {
                    let (entry, index) =
                        (Entry(page.get(slot)), node.leaf * PAGE_ENTRIES as u64 + slot as u64);
                    let owner = Owner::Entry { layer, index };
                    if entry.0 == 0 || node.leaf < gone {
                        continue;
                    }
                    if index >= end {
                        findings.push(Finding::PastEnd { owner });
                    }
                    usage.add(entry);
                    match u64::from(entry.grain()) {
                        0 if entry.holds_nothing() || marks_only => {}
                        0 => findings.push(Finding::NoGrain { owner }),
                        grain if !self.holds_data(grain) => findings.push(Finding::Outside { grain, owner }),
                        grain => own(grain, owner, true),
                    }
                }
            }
            Seen::Outside(node) => {
                let grain = node.pair / GRAIN_PAIRS;
                findings.push(Finding::Outside { grain, owner: page_owner(layer, node) });
                incomplete = true;
            }
            Seen::Damaged(node) => {
                findings.push(Finding::DamagedPage { owner: page_owner(layer, node) });
                incomplete = true;
            }
        })
        .await?;
        usage.map_grains = map_grains.len() as u64;
        report.layers.insert(layer, usage);
        report.incomplete |= incomplete;
        findings.into_iter().for_each(|f| report.add(f));
        Ok(())
    }

    /// What nameless layers say to hold without a grain is hidden by the layers above.
    async fn check_boundaries(&self, catalog: &Catalog, report: &mut Report) -> Result<(), DiskError> {
        let named = crate::tidy::named(catalog);
        let only_child = |layer: u64| {
            let mut children = catalog.children(layer).filter(|l| l.dying.is_none());
            children.next().filter(|_| children.next().is_none()).map(|l| l.id)
        };
        for layer in catalog.layers.values().filter(|l| l.dying.is_none() && !named.contains(&l.id)) {
            let Some(mut top) = only_child(layer.id) else { continue };
            let mut above = vec![top];
            while !named.contains(&top)
                && let Some(next) = only_child(top)
            {
                above.push(next);
                top = next;
            }
            match self.check_hidden_in(layer.id, &above, report).await {
                // Damaged pages, and pages outside of the pool: found already, where the maps were walked.
                Err(DiskError::Medium(_) | DiskError::OutOfRange) => {}
                other => other?,
            }
        }
        Ok(())
    }

    async fn check_hidden_in(&self, layer: u64, above: &[u64], report: &mut Report) -> Result<(), DiskError> {
        let mut from = 0;
        while let Some(number) = self.next_leaf(layer, from, crate::map::MOST_LEAVES).await? {
            self.check_hidden(layer, above, number, report).await?;
            from = number + 1;
        }
        Ok(())
    }

    async fn check_hidden(
        &self,
        layer: u64,
        above: &[u64],
        number: u64,
        report: &mut Report,
    ) -> Result<(), DiskError> {
        let Some(leaf) = self.leaf(layer, number).await? else { return Ok(()) };
        let pages = self.leaves_of(above, number).await?;
        for slot in 0..PAGE_ENTRIES {
            let entry = Entry(leaf.get(slot));
            let (held, _) = crate::read::masks(entry);
            let open = |page: &std::rc::Rc<crate::pages::Page>| open_blocks(Entry(page.get(slot)));
            if entry.grain() == 0 && pages.iter().flatten().fold(held, |rest, page| rest & open(page)) != 0 {
                let index = number * PAGE_ENTRIES as u64 + slot as u64;
                report.add(Finding::NotHidden { owner: Owner::Entry { layer, index } });
            }
        }
        Ok(())
    }

    /// Who refers to these grains: the first of each.
    async fn owners(
        &self,
        catalog: &Catalog,
        wanted: BTreeSet<u64>,
    ) -> Result<BTreeMap<u64, Owner>, DiskError> {
        let mut first = BTreeMap::new();
        if wanted.is_empty() {
            return Ok(first);
        }
        for layer in catalog.layers.keys() {
            let mut scratch = Report::default();
            self.check_layer(catalog, *layer, &mut scratch, &mut |grain, owner, _| {
                if wanted.contains(&grain) {
                    first.entry(grain).or_insert(owner);
                }
            })
            .await?;
        }
        Ok(first)
    }

    /// The bitmap against what maps refer to. Returns grains that are referred to and free.
    async fn check_bitmap(&self, owned: &Bits, report: &mut Report) -> Result<BTreeSet<u64>, DiskError> {
        let (mut used, mut unused) = (0, BTreeSet::new());
        for (number, medium) in self.media.list.iter().enumerate() {
            for index in 0..medium.grains.div_ceil(BITMAP_GRAINS) {
                let first = medium.first + index * BITMAP_GRAINS;
                let Some((key, pair, ..)) = bitmap_place(&self.media, first) else { break };
                let page = match self.pages.load(&self.media, key, pair).await {
                    Ok(page) => page,
                    Err(DiskError::Medium(_)) => {
                        report.add(Finding::DamagedBitmap { medium: number as u64, index });
                        report.incomplete = true;
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                let end = (first + BITMAP_GRAINS).min(medium.first + medium.grains);
                let mut leak: Option<(u64, u64)> = None;
                for grain in first..end {
                    let local = grain - first;
                    let bit = page.get((local / 64) as usize) >> (local % 64) & 1 == 1;
                    used += u64::from(bit);
                    let system = grain - medium.first < medium.reserved;
                    match (bit, system || owned.get(grain)) {
                        (true, false) => match &mut leak {
                            Some((_, count)) => *count += 1,
                            None => leak = Some((grain, 1)),
                        },
                        (false, true) if system => report.add(Finding::SystemFree { grain }),
                        (false, true) if unused.len() < MOST_FINDINGS => drop(unused.insert(grain)),
                        (false, true) => report.more += 1,
                        _ => {}
                    }
                    if (!bit || owned.get(grain) || grain + 1 == end)
                        && let Some((first, count)) = leak.take()
                    {
                        report.add(Finding::Leak { first, count });
                    }
                }
                report.grains += end - first;
            }
        }
        if used != self.space.used() {
            report.add(Finding::UsedCount { found: self.space.used(), expected: used });
        }
        if report.incomplete {
            report.findings.retain(|f| !matches!(f, Finding::Leak { .. }));
        }
        Ok(unused)
    }
}

fn page_owner(layer: u64, node: Node) -> Owner {
    Owner::Page { layer, level: node.level, leaf: node.leaf }
}

/// Every number in the catalog names something that is there and of the right kind.
fn cross_references(catalog: &Catalog, report: &mut Report) {
    let mut wrong = |object, id, what, other| report.add(Finding::Catalog { object, id, what, other });
    let (mut tops, mut names) = (BTreeMap::new(), BTreeMap::new());
    for lun in catalog.luns.values() {
        match catalog.layers.get(&lun.top) {
            None => wrong("LUN", lun.id, "has no top layer", lun.top),
            Some(top) if top.generation.is_some() => wrong("LUN", lun.id, "writes to a frozen layer", top.id),
            Some(top) if top.dying.is_some() => wrong("LUN", lun.id, "lies on a dying layer", top.id),
            Some(_) => {}
        }
        if let Some(other) = tops.insert(lun.top, lun.id) {
            wrong("LUN", lun.id, "has the same top layer as LUN", other);
        }
        if let Some(layer) = lun.abandoned.filter(|l| !catalog.layers.contains_key(l)) {
            wrong("LUN", lun.id, "abandoned a layer that is not there:", layer);
        }
        if lun.trashed.is_none()
            && let Some(other) = names.insert(lun.name.clone(), lun.id)
        {
            wrong("LUN", lun.id, "has the same name as LUN", other);
        }
    }
    let mut identities = BTreeMap::new();
    for lun in catalog.luns.values() {
        if let Some(other) = identities.insert(crate::identity::naa(lun.uuid), lun.id) {
            wrong("LUN", lun.id, "has the same SCSI identity as LUN", other);
        }
    }
    for layer in catalog.layers.values() {
        if layer.parent != 0 && !catalog.layers.contains_key(&layer.parent) {
            wrong("layer", layer.id, "stands on a layer that is not there:", layer.parent);
        }
        if layer.parent >= layer.id {
            wrong("layer", layer.id, "stands on a younger layer:", layer.parent);
        }
        let parent_dies = catalog.layers.get(&layer.parent).is_some_and(|p| p.dying.is_some());
        if parent_dies && layer.dying.is_none() {
            wrong("layer", layer.id, "stands on a dying layer:", layer.parent);
        }
    }
    for snapshot in catalog.snapshots.values() {
        match catalog.layers.get(&snapshot.layer) {
            None => wrong("snapshot", snapshot.id, "has no layer", snapshot.layer),
            Some(l) if l.generation.is_none() => {
                wrong("snapshot", snapshot.id, "of a layer not frozen:", l.id)
            }
            Some(_) => {}
        }
        if !catalog.luns.contains_key(&snapshot.lun) {
            wrong("snapshot", snapshot.id, "of a LUN that is not there:", snapshot.lun);
        }
    }
    for hold in catalog.holds.values().filter(|h| !catalog.layers.contains_key(&h.layer)) {
        wrong("hold", hold.id, "of a layer that is not there:", hold.layer);
    }
    for member in catalog.groups.values().flat_map(|g| &g.members) {
        if !catalog.luns.contains_key(&member.lun) {
            wrong("group member", member.new_top, "is a LUN that is not there:", member.lun);
        }
    }
}
