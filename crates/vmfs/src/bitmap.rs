//! Free resources: the bitmaps of one resource file, read group by group when they are needed and kept from then on
//! (512 bytes for every 200 file blocks: 2.6 MiB for each TiB that was ever searched).

use crate::Error;
use crate::format::{ClusterMeta5, Corrupt, Expected, GROUP0_OFFSET, LockBlock, LockMode, ensure, view};
use crate::resource::ResourceFile;
use crate::space::Space;
use block::Buffer;
use std::collections::BTreeSet;
use zerocopy::IntoBytes;

/// Consecutive resources, by index in the file (cluster x resources per cluster + resource).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub first: u64,
    pub count: u64,
}

/// What a search found.
pub(crate) enum Found {
    Run(Run),
    /// This group has to be read first.
    Need(u64),
    /// Everything is in use.
    Full,
}

/// Bitmaps in memory: the truth. The device lags behind by the dirty clusters.
pub(crate) struct Bitmap {
    groups: Vec<Option<Box<[ClusterMeta5]>>>,
    per_cluster: u64,
    per_group: u64,
    /// Where the next search begins when the caller has no wish: a cluster.
    cursor: u64,
    dirty: BTreeSet<u64>,
}

impl Bitmap {
    /// Nothing read yet. Searches begin at cluster `first`.
    pub fn new(file: &ResourceFile, first: u64) -> Self {
        let mut groups = Vec::new();
        groups.resize_with(file.geometry.groups() as usize, || None);
        Self {
            groups,
            per_cluster: file.geometry.per_cluster.max(1).into(),
            per_group: file.geometry.per_group.max(1).into(),
            cursor: if first < file.geometry.clusters() { first } else { 0 },
            dirty: BTreeSet::new(),
        }
    }

    /// The group that holds resource `index`, if it has to be read first.
    pub fn missing(&self, index: u64) -> Option<u64> {
        let group = index / self.per_cluster / self.per_group;
        matches!(self.groups.get(group as usize), Some(None)).then_some(group)
    }

    /// The first group that was not read yet.
    pub fn first_missing(&self) -> Option<u64> {
        self.groups.iter().position(Option::is_none).map(|g| g as u64)
    }

    /// Takes a group as read; what is in memory already stays.
    pub fn insert(&mut self, group: u64, clusters: Box<[ClusterMeta5]>) {
        if let Some(slot @ None) = self.groups.get_mut(group as usize) {
            *slot = Some(clusters);
        }
    }

    fn cluster(&mut self, number: u64) -> Option<&mut ClusterMeta5> {
        let (group, slot) = ((number / self.per_group) as usize, (number % self.per_group) as usize);
        self.groups.get_mut(group)?.as_mut()?.get_mut(slot)
    }

    fn is_free(&self, index: u64) -> bool {
        let number = index / self.per_cluster;
        let (group, slot) = ((number / self.per_group) as usize, (number % self.per_group) as usize);
        self.groups
            .get(group)
            .and_then(|g| g.as_ref()?.get(slot))
            .is_some_and(|c| c.is_free((index % self.per_cluster) as u32))
    }

    /// Free resources in what was read.
    pub fn count_free(&self) -> u64 {
        self.groups.iter().flatten().flat_map(|g| g.iter()).map(|c| u64::from(c.free.get())).sum()
    }

    /// Takes up to `want` consecutive resources: at `goal` if that is free, else the first run that is long enough
    /// in the first group with room, or the longest there.
    pub fn take(&mut self, want: u64, goal: Option<u64>) -> Found {
        if let Some(goal) = goal {
            if let Some(group) = self.missing(goal) {
                return Found::Need(group);
            }
            if self.is_free(goal) {
                return Found::Run(self.take_at(goal, want));
            }
        }
        let groups = self.groups.len() as u64;
        let first = self.cursor / self.per_group;
        for step in 0..=groups {
            let group = (first + step) % groups.max(1);
            // The last step looks again at what lies before the cursor in its own group.
            let from = if step == 0 { self.cursor % self.per_group } else { 0 };
            match self.groups.get(group as usize) {
                Some(None) => return Found::Need(group),
                Some(Some(clusters)) => {
                    if let Some(best) = best_run(clusters, from, want) {
                        let number = group * self.per_group + best.0;
                        self.cursor = number;
                        return Found::Run(self.take_at(number * self.per_cluster + best.1, want));
                    }
                }
                None => return Found::Full,
            }
        }
        Found::Full
    }

    fn take_at(&mut self, first: u64, want: u64) -> Run {
        let mut count = 0;
        while count < want && self.is_free(first + count) {
            self.mark(first + count, false);
            count += 1;
        }
        Run { first, count }
    }

    fn mark(&mut self, index: u64, free: bool) {
        let (number, inside) = (index / self.per_cluster, (index % self.per_cluster) as u32);
        let Some(cluster) = self.cluster(number) else { return };
        cluster.set_free(inside, free);
        let left = cluster.free_bits();
        cluster.free = left.into();
        if !free {
            let next = (inside + 1) % cluster.total.get().max(1);
            cluster.next_hint = if left == 0 { 0 } else { next }.into();
        }
        self.dirty.insert(number);
    }

    /// Gives resources back; their group must have been read. One that is free already is corrupt metadata.
    pub fn give_back(&mut self, run: Run) -> Result<(), Corrupt> {
        for index in run.first..run.first + run.count {
            ensure(!self.is_free(index), "resource freed twice", 0, index, Expected::Words("one in use"))?;
            self.mark(index, true);
        }
        Ok(())
    }

    /// The next generation of the FD cluster that holds `index`.
    pub fn next_generation(&mut self, index: u64) -> u32 {
        let number = index / self.per_cluster;
        let Some(cluster) = self.cluster(number) else { return 1 };
        let generation = cluster.last_generation.get().wrapping_add(1).max(1);
        cluster.last_generation = generation.into();
        self.dirty.insert(number);
        generation
    }

    /// Something is not on the device.
    pub fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Copies of what is not on the device, by cluster; it counts as written from now on.
    pub fn take_dirty(&mut self) -> Vec<(u64, Vec<u8>)> {
        let dirty = std::mem::take(&mut self.dirty);
        dirty
            .into_iter()
            .filter_map(|number| self.cluster(number).map(|c| (number, c.as_bytes().to_vec())))
            .collect()
    }
}

/// Cluster (in its group) and resource where the best run for `want` begins, looking from cluster `from` on.
fn best_run(clusters: &[ClusterMeta5], from: u64, want: u64) -> Option<(u64, u64)> {
    let mut best: Option<(u64, u64, u64)> = None;
    for (number, cluster) in clusters.iter().enumerate().skip(from as usize) {
        if cluster.free.get() == 0 {
            continue;
        }
        let total = cluster.total.get();
        let mut start = None;
        for index in 0..=total {
            let free = index < total && cluster.is_free(index);
            match (free, start) {
                (true, None) => start = Some(index),
                (false, Some(first)) => {
                    let length = u64::from(index - first);
                    if best.is_none_or(|b| length > b.2) {
                        best = Some((number as u64, first.into(), length));
                    }
                    start = None;
                }
                _ => {}
            }
        }
        if best.is_some_and(|b| b.2 >= want.min(total.into())) {
            break;
        }
    }
    best.map(|(number, first, _)| (number, first))
}

/// Reads and checks the cluster headers of one group; `to_write`: nobody else may hold their locks.
pub(crate) async fn load_group(
    space: &Space,
    file: &ResourceFile,
    group: u64,
    to_write: bool,
) -> Result<Box<[ClusterMeta5]>, Error> {
    let geometry = &file.geometry;
    let first = group * u64::from(geometry.per_group);
    let count = geometry.clusters().saturating_sub(first).min(geometry.per_group.into());
    let header_bytes = 2 * u64::from(geometry.metadata_bytes);
    let mut raw = Buffer::zeroed((count * header_bytes) as usize);
    let start = GROUP0_OFFSET + group * geometry.group_bytes();
    match file.map.span(start, count * header_bytes) {
        Some(volume) => space.read(volume, &mut raw).await?,
        None => {
            for index in 0..count {
                let at = (index * header_bytes) as usize;
                let part = &mut raw[at..at + header_bytes as usize];
                space.read(file.header(first + index)?, part).await?;
            }
        }
    }
    let mut clusters = Vec::with_capacity(count as usize);
    for (index, bytes) in raw.chunks_exact(header_bytes as usize).enumerate() {
        let number = first + index as u64;
        clusters.push(check_header(file, number, bytes, to_write)?);
    }
    Ok(clusters.into_boxed_slice())
}

/// A cluster header with nothing wrong.
fn check_header(
    file: &ResourceFile,
    number: u64,
    bytes: &[u8],
    to_write: bool,
) -> Result<ClusterMeta5, Error> {
    let at = file.header(number)?;
    let short = Corrupt { what: "cluster header", at, found: 0, expected: Expected::Words("two sectors") };
    let lock = view::<LockBlock>(bytes).ok_or(short.clone())?;
    if lock.check(file.kind, at)? != LockMode::Free && to_write {
        return Err(crate::volume::read_only(format!("host {} holds the lock of a cluster", lock.holder)));
    }
    let meta = bytes.get(512..).and_then(view::<ClusterMeta5>).ok_or(short)?;
    let at = at + 512;
    let own = meta.cluster.get();
    ensure(u64::from(own) == number, "number of a cluster", at, own.into(), Expected::Value(number))?;
    let (total, wanted) = (meta.total.get(), file.geometry.in_cluster(number));
    ensure(total == wanted, "resources in a cluster", at + 4, total.into(), Expected::Value(wanted.into()))?;
    let (free, bits) = (meta.free.get(), meta.free_bits());
    ensure(free == bits, "free resources in a cluster", at + 8, free.into(), Expected::Value(bits.into()))?;
    let beyond = (total..512).any(|index| meta.is_free(index));
    ensure(!beyond, "bitmap behind the last resource", at + 0x10, 1, Expected::Value(0))?;
    Ok(meta.clone())
}
