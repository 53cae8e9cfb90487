//! Resource files: headers, cluster headers, bitmaps, and who refers to what.

use block::DiskError;
use lane::sync::together;

use super::files::FD_BYTES;
use super::span::Span;
use super::{Place, Report, Severity, Unit, What};
use crate::format::{
    ClusterMeta5, Corrupt, GROUP0_OFFSET, LockBlock, LockKind, LockMode, ResourceGeometry, ResourceHeader,
    view,
};

/// Descriptors a volume may have; ESXi stops at about 130,690, and each costs memory.
const DESCRIPTORS_MAX: u64 = 1 << 20;
/// Groups whose headers are read at once.
const READS_AT_ONCE: usize = 8;

/// One bit each.
#[derive(Default)]
pub(super) struct Bits {
    words: Vec<u64>,
    length: u64,
}

impl Bits {
    pub fn new(length: u64) -> Self {
        Self { words: vec![0; length.div_ceil(64) as usize], length }
    }

    /// False outside.
    pub fn get(&self, index: u64) -> bool {
        index < self.length && self.words[(index / 64) as usize] >> (index % 64) & 1 == 1
    }

    /// Sets a bit and tells what it was. Outside nothing happens.
    pub fn set(&mut self, index: u64) -> bool {
        let before = self.get(index);
        if index < self.length {
            self.words[(index / 64) as usize] |= 1 << (index % 64);
        }
        before
    }

    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

/// One resource file, its bitmap, and which resources were met in the walk.
pub(super) struct Resources {
    pub unit: Unit,
    pub geometry: ResourceGeometry,
    /// Volume offset of each block of the file.
    blocks: Vec<u64>,
    block_bytes: u64,
    /// As the cluster headers say.
    pub allocated: Bits,
    /// As the files say.
    pub referred: Bits,
    /// Clusters that could not be believed: their resources are not compared.
    pub broken: Bits,
}

impl Resources {
    /// Reads and checks the header. `None` when it cannot be used.
    pub async fn load(
        unit: Unit,
        span: &Span,
        blocks: Vec<u64>,
        block_bytes: u64,
        report: &mut Report,
    ) -> Result<Option<Self>, DiskError> {
        let Some(at) = blocks.first().copied() else {
            report.corrupt(What::ResourceHeader, Place::Header(unit), "a file without blocks", "a header");
            return Ok(None);
        };
        let raw = span.get(at, 512).await?;
        let Some(header) = view::<ResourceHeader>(&raw) else { return Ok(None) };
        let geometry = match ResourceGeometry::load(header, 512, at) {
            Ok(geometry) => geometry,
            Err(Corrupt { found, expected, what, .. }) => {
                let found = format!("{what} {found:#x}");
                report.corrupt(What::ResourceHeader, Place::Header(unit), found, expected);
                return Ok(None);
            }
        };
        let room = blocks.len() as u64 * block_bytes;
        if geometry.count == 0 || geometry.file_bytes() > room {
            let found = format!("{} resources, {} bytes", geometry.count, geometry.file_bytes());
            report.corrupt(
                What::ResourceHeader,
                Place::Header(unit),
                found,
                format!("what fits {room} bytes"),
            );
            return Ok(None);
        }
        if unit == Unit::Descriptor && u64::from(geometry.resource_bytes) != FD_BYTES {
            // Descriptors would be looked for at the wrong places.
            let found = format!("resource size {}", geometry.resource_bytes);
            report.corrupt(What::ResourceHeader, Place::Header(unit), found, FD_BYTES);
            return Ok(None);
        }
        if unit == Unit::Descriptor && geometry.count > DESCRIPTORS_MAX {
            let expected = format!("at most {DESCRIPTORS_MAX}");
            report.corrupt(What::ResourceHeader, Place::Header(unit), geometry.count, expected);
            return Ok(None);
        }
        let (allocated, referred) = (Bits::new(geometry.count), Bits::new(geometry.count));
        let broken = Bits::new(geometry.clusters());
        Ok(Some(Self { unit, geometry, blocks, block_bytes, allocated, referred, broken }))
    }

    /// Volume offset of a byte of the file, and how many follow in the same block.
    fn place(&self, offset: u64) -> Option<(u64, u64)> {
        let block = self.blocks.get((offset / self.block_bytes) as usize)?;
        let inside = offset % self.block_bytes;
        Some((block + inside, self.block_bytes - inside))
    }

    /// Reads bytes of the file.
    pub async fn read(&self, span: &Span, offset: u64, length: usize) -> Result<Vec<u8>, DiskError> {
        let mut bytes = vec![0; length];
        let (mut offset, mut rest) = (offset, &mut bytes[..]);
        while !rest.is_empty() {
            let (at, room) = self.place(offset).ok_or(DiskError::OutOfRange)?;
            let (head, tail) = rest.split_at_mut((rest.len() as u64).min(room) as usize);
            span.read(at, head).await?;
            offset += head.len() as u64;
            rest = tail;
        }
        Ok(bytes)
    }

    /// Number of a resource, counted over all clusters. `None` when there is no such.
    pub fn number(&self, cluster: u64, resource: u32) -> Option<u64> {
        let exists = cluster < self.geometry.clusters() && resource < self.geometry.in_cluster(cluster);
        exists.then(|| cluster * u64::from(self.geometry.per_cluster) + u64::from(resource))
    }

    /// Cluster and resource of a number.
    pub fn split(&self, number: u64) -> (u64, u32) {
        let per_cluster = u64::from(self.geometry.per_cluster);
        (number / per_cluster, (number % per_cluster) as u32)
    }

    /// Volume offset of a resource's bytes.
    pub fn resource_at(&self, number: u64) -> Option<u64> {
        let (cluster, resource) = self.split(number);
        Some(self.place(self.geometry.resource_offset(cluster, resource)?)?.0)
    }

    /// Volume offset of a cluster's lock block; its metadata follows.
    pub fn cluster_at(&self, cluster: u64) -> Option<u64> {
        Some(self.place(self.geometry.header_offset(cluster)?)?.0)
    }

    /// A host's mark that one of its locks is held.
    fn lock_kind(&self) -> LockKind {
        match self.unit {
            Unit::FileBlock => LockKind::FileBlocks,
            Unit::SubBlock => LockKind::SubBlocks,
            Unit::PointerBlock => LockKind::PointerBlocks,
            Unit::SecondPointerBlock => LockKind::PointerBlocks2,
            Unit::Descriptor => LockKind::Descriptors,
        }
    }

    /// Reads all cluster headers: fills `allocated`, reports what is wrong.
    pub async fn load_clusters(&mut self, span: &Span, report: &mut Report) -> Result<(), DiskError> {
        let (groups, per_group) = (self.geometry.groups(), u64::from(self.geometry.per_group));
        let mut group = 0;
        while group < groups {
            let end = (group + READS_AT_ONCE as u64).min(groups);
            let this = &*self;
            let reads = (group..end).map(|group| async move {
                let offset = GROUP0_OFFSET + group * this.geometry.group_bytes();
                this.read(span, offset, per_group as usize * 1024).await
            });
            let headers: Vec<_> = together(reads).await;
            for (group, headers) in (group..end).zip(headers) {
                let clusters = group * per_group..((group + 1) * per_group).min(self.geometry.clusters());
                for (cluster, header) in clusters.zip(headers?.chunks_exact(1024)) {
                    self.cluster(cluster, header, report);
                }
            }
            group = end;
        }
        Ok(())
    }

    fn cluster(&mut self, cluster: u64, header: &[u8], report: &mut Report) {
        let place = || Place::Cluster { unit: self.unit, cluster: cluster as u32 };
        let at = self.cluster_at(cluster).unwrap_or(0);
        let (Some(lock), Some(meta)) = (view::<LockBlock>(header), view::<ClusterMeta5>(&header[512..]))
        else {
            return;
        };
        check_lock(lock, self.lock_kind(), at, place(), report);
        let total = self.geometry.in_cluster(cluster);
        let mut wrong = |found: u64, expected: u64, what: &str| {
            if found != expected {
                report.corrupt(What::ClusterCount, place(), format!("{what} {found}"), expected);
            }
            found != expected
        };
        let foreign = wrong(meta.cluster.get().into(), cluster, "number");
        let short = wrong(meta.total.get().into(), total.into(), "total");
        let beyond = (total..512).filter(|i| meta.is_free(*i)).count() as u64;
        wrong(beyond, 0, "free bits behind the end");
        let free = (0..total).filter(|i| meta.is_free(*i)).count() as u64;
        wrong(meta.free.get().into(), free, "free count");
        if meta.next_hint.get() > total {
            let expected = format!("at most {total}");
            report.corrupt(
                What::ClusterCount,
                place(),
                format!("next free {}", meta.next_hint.get()),
                expected,
            );
        }
        if foreign || short {
            self.broken.set(cluster);
            return;
        }
        let first = cluster * u64::from(self.geometry.per_cluster);
        for i in (0..total).filter(|i| !meta.is_free(*i)) {
            self.allocated.set(first + u64::from(i));
        }
    }

    /// Compares what is allocated with what is referred to.
    pub fn compare(&self, report: &mut Report) {
        for (number, count) in self.runs(&self.referred, &self.allocated) {
            let place = Place::Resource { unit: self.unit, number, count };
            report.corrupt(What::UsedButFree, place, "marked free", "marked used: a file refers to it");
        }
        for (number, count) in self.leaks() {
            let place = Place::Resource { unit: self.unit, number, count };
            let expected = "marked free: nobody refers to it";
            report.add(Severity::Leak, What::FreeButUsed, place, "marked used", expected);
        }
    }

    /// Runs of resources that are allocated but not referred to: first and count.
    pub fn leaks(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.runs(&self.allocated, &self.referred)
    }

    /// Runs of what is in `these` but not in `those`, outside of broken clusters.
    fn runs<'a>(&'a self, these: &'a Bits, those: &'a Bits) -> impl Iterator<Item = (u64, u64)> + 'a {
        let words = (0u64..).zip(these.words.iter().zip(&those.words)).filter(|(_, (a, b))| **a & !**b != 0);
        let numbers = words.flat_map(|(word, (a, b))| {
            (0..64).filter(move |bit| (a & !b) >> bit & 1 == 1).map(move |bit| word * 64 + bit)
        });
        let mut numbers = numbers.filter(|number| !self.broken.get(self.split(*number).0)).peekable();
        std::iter::from_fn(move || {
            let first = numbers.next()?;
            let mut end = first + 1;
            while numbers.next_if_eq(&end).is_some() {
                end += 1;
            }
            Some((first, end - first))
        })
    }
}

/// Type, own offset, mode, and that a free lock has no holder.
pub(super) fn check_lock(lock: &LockBlock, kind: LockKind, at: u64, place: Place, report: &mut Report) {
    match lock.check(kind, at) {
        Err(Corrupt { what, found, expected, .. }) => {
            report.corrupt(What::LockBlock, place, format!("{what} {found:#x}"), expected);
        }
        Ok(LockMode::Free) if !lock.holder.is_none() => {
            report.corrupt(What::LockBlock, place, format!("free, holder {}", lock.holder), "no holder");
        }
        Ok(LockMode::Free) => {}
        Ok(mode) => {
            let found = format!("{mode:?} by {}", lock.holder);
            let nobody = lock.holder.is_none() && mode == LockMode::Exclusive;
            if nobody || lock.heartbeat.get() == 0 {
                report.corrupt(What::LockBlock, place, found, "a holder and its heartbeat");
            } else {
                report.note(What::LockBlock, place, found, "free");
            }
        }
    }
}
