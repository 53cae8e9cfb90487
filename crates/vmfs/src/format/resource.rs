//! Resource files: header, cluster groups, cluster headers with bitmaps.

use super::{Corrupt, Expected, ensure};
use std::mem::{offset_of, size_of};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Offset of the first cluster group in every resource file.
pub const GROUP0_OFFSET: u64 = 0x1_0000;
/// VMFS-6: offset of the child header in `.fbb.sf`.
pub const CHILD_HEADER_OFFSET: u64 = 0x1000;
/// VMFS-6: value of [`ResourceHeader6::signature`].
pub const RESOURCE6_SIGNATURE: u32 = 0x7266_6D64;
/// VMFS-6: value of [`ClusterMeta6::signature`].
pub const CLUSTER6_SIGNATURE: u32 = 0x7263_6D64;

/// Header of a resource file (file offset 0), as VMFS-3 and 5 write it.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ResourceHeader {
    /// Resources in a cluster.
    pub per_cluster: U32,
    /// Clusters in a group.
    pub per_group: U32,
    /// Offset of group 0, [`GROUP0_OFFSET`].
    pub group0: U32,
    /// Bytes of a resource; 0 for file blocks.
    pub resource_bytes: U32,
    /// Bytes of a group.
    pub group_bytes: U32,
    /// Number of resources, low word.
    pub count_low: U32,
    /// Number of groups.
    pub groups: U32,
    /// Number of resources, high word.
    pub count_high: U32,
}
const _: () = assert!(size_of::<ResourceHeader>() == 0x20);

/// What VMFS-6 adds behind [`ResourceHeader`].
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ResourceHeader6 {
    /// The part that all versions share.
    pub base: ResourceHeader,
    /// [`RESOURCE6_SIGNATURE`].
    pub signature: U32,
    /// 1.
    pub version: U32,
    /// Flags.
    pub flags: U32,
    /// Owner entries in a cluster.
    pub owners_per_cluster: U16,
    /// Owner entries of a resource.
    pub owners_per_resource: U16,
    /// Bits of a resource in the bitmap.
    pub bits: U32,
    /// Offset of the child header, 0 none.
    pub child: U32,
    /// Resources in a cluster of the parent.
    pub parent_per_cluster: U32,
    /// Clusters in a group of the parent.
    pub parent_per_group: U32,
    /// Bytes of a group of the parent.
    pub parent_group_bytes: U32,
    /// Unknown.
    pub spare_44: [u8; 16],
    /// Clusters converted to small blocks.
    pub converted: U32,
}
const _: () = assert!(size_of::<ResourceHeader6>() == 0x58);
const _: () = assert!(offset_of!(ResourceHeader6, bits) == 0x30);

/// Shape of a resource file, checked: what is where, in offsets of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResourceGeometry {
    /// Resources in a cluster (0 only in an empty file).
    pub per_cluster: u32,
    /// Clusters in a group.
    pub per_group: u32,
    /// Bytes of a resource; 0 for file blocks.
    pub resource_bytes: u32,
    /// Number of resources.
    pub count: u64,
    /// Bytes of a metadata block (512 or 4096): a cluster header is two of them.
    pub metadata_bytes: u32,
}

impl ResourceGeometry {
    /// From the header at volume offset `at`. `metadata_bytes` is 512, VMFS-6: 4096.
    pub fn load(header: &ResourceHeader, metadata_bytes: u32, at: u64) -> Result<Self, Corrupt> {
        let geometry = Self {
            per_cluster: header.per_cluster.get(),
            per_group: header.per_group.get(),
            resource_bytes: header.resource_bytes.get(),
            count: u64::from(header.count_low.get()) | u64::from(header.count_high.get()) << 32,
            metadata_bytes,
        };
        // A bitmap has at most 512 bits in VMFS-3 and 5; clusters of VMFS-6 hold at most 512 resources.
        let limit = 512;
        let rpc = geometry.per_cluster;
        ensure(rpc <= limit, "resources in a cluster", at, rpc.into(), Expected::AtMost(limit.into()))?;
        let cpg = geometry.per_group;
        ensure(cpg <= 1024, "clusters in a group", at + 4, cpg.into(), Expected::AtMost(1024))?;
        let size = geometry.resource_bytes;
        ensure(
            size <= 16 << 20 && size.is_multiple_of(512),
            "bytes of a resource",
            at + 0xC,
            size.into(),
            Expected::Words("a multiple of 512, at most 16 MiB"),
        )?;
        let count = geometry.count;
        ensure(count < 1 << 40, "number of resources", at + 0x14, count, Expected::AtMost(1 << 40))?;
        if count == 0 {
            return Ok(geometry);
        }
        ensure(rpc > 0, "resources in a cluster", at, 0, Expected::AtLeast(1))?;
        ensure(cpg > 0, "clusters in a group", at + 4, 0, Expected::AtLeast(1))?;
        let group0 = header.group0.get();
        ensure(
            u64::from(group0) == GROUP0_OFFSET,
            "offset of group 0",
            at + 8,
            group0.into(),
            Expected::Value(GROUP0_OFFSET),
        )?;
        let found = header.group_bytes.get();
        let expected = geometry.group_bytes();
        ensure(
            u64::from(found) == expected,
            "bytes of a group",
            at + 0x10,
            found.into(),
            Expected::Value(expected),
        )?;
        let (found, expected) = (header.groups.get(), geometry.groups());
        ensure(
            u64::from(found) == expected,
            "number of groups",
            at + 0x18,
            found.into(),
            Expected::Value(expected),
        )?;
        Ok(geometry)
    }

    /// The header of this geometry.
    pub fn header(&self) -> ResourceHeader {
        ResourceHeader {
            per_cluster: self.per_cluster.into(),
            per_group: self.per_group.into(),
            group0: (GROUP0_OFFSET as u32).into(),
            resource_bytes: self.resource_bytes.into(),
            group_bytes: (self.group_bytes() as u32).into(),
            count_low: (self.count as u32).into(),
            groups: (self.groups() as u32).into(),
            count_high: ((self.count >> 32) as u32).into(),
        }
    }

    /// Number of clusters; the last one may be partly filled.
    pub fn clusters(&self) -> u64 {
        if self.per_cluster == 0 { 0 } else { self.count.div_ceil(self.per_cluster.into()) }
    }

    /// Number of groups; the last one has all header slots but only the data of resources that exist.
    pub fn groups(&self) -> u64 {
        if self.per_group == 0 { 0 } else { self.clusters().div_ceil(self.per_group.into()) }
    }

    /// Bytes of a full group.
    pub fn group_bytes(&self) -> u64 {
        let (rpc, cpg) = (u64::from(self.per_cluster), u64::from(self.per_group));
        cpg * 2 * u64::from(self.metadata_bytes) + rpc * cpg * u64::from(self.resource_bytes)
    }

    /// Bytes of the whole file.
    pub fn file_bytes(&self) -> u64 {
        let headers = self.groups() * u64::from(self.per_group) * 2 * u64::from(self.metadata_bytes);
        let data = self.count * u64::from(self.resource_bytes);
        GROUP0_OFFSET + headers + data
    }

    /// Resources in cluster `cluster`: all but the last are full.
    pub fn in_cluster(&self, cluster: u64) -> u32 {
        let before = cluster.saturating_mul(self.per_cluster.into());
        self.count.saturating_sub(before).min(self.per_cluster.into()) as u32
    }

    /// File offset of the header (lock block, then metadata block) of a cluster; `None` when there is no such.
    pub fn header_offset(&self, cluster: u64) -> Option<u64> {
        (cluster < self.clusters()).then(|| {
            let (group, slot) = (cluster / u64::from(self.per_group), cluster % u64::from(self.per_group));
            GROUP0_OFFSET + group * self.group_bytes() + slot * 2 * u64::from(self.metadata_bytes)
        })
    }

    /// File offset of a resource's bytes; `None` when there is no such resource.
    pub fn resource_offset(&self, cluster: u64, resource: u32) -> Option<u64> {
        (cluster < self.clusters() && resource < self.in_cluster(cluster)).then(|| {
            let cpg = u64::from(self.per_group);
            let (group, slot) = (cluster / cpg, cluster % cpg);
            let index = slot * u64::from(self.per_cluster) + u64::from(resource);
            GROUP0_OFFSET
                + group * self.group_bytes()
                + cpg * 2 * u64::from(self.metadata_bytes)
                + index * u64::from(self.resource_bytes)
        })
    }
}

/// Cluster metadata block of VMFS-3 and 5, behind the lock block.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ClusterMeta5 {
    /// Own number.
    pub cluster: U32,
    /// Resources in this cluster.
    pub total: U32,
    /// Free ones.
    pub free: U32,
    /// Where the search for a free one goes on; 0 when full.
    pub next_hint: U32,
    /// One bit each, least significant first, 1 = free; bits from `total` on are 0.
    pub bitmap: [u8; 64],
    /// Type data; in `.fdc.sf` a u32: the last generation handed out in this cluster.
    pub last_generation: U32,
    /// Rest of the type data.
    pub type_data: [u8; 12],
    /// 80000 on the next-to-last cluster of `.fbb.sf` and `.pbc.sf` after mkfs; advisory.
    pub priority: U32,
    /// Rest of the sector.
    pub spare: [u8; 412],
}
const _: () = assert!(size_of::<ClusterMeta5>() == 512);
const _: () = assert!(offset_of!(ClusterMeta5, last_generation) == 0x50);
const _: () = assert!(offset_of!(ClusterMeta5, priority) == 0x60);

impl ClusterMeta5 {
    /// A cluster whose `total` resources are all free.
    pub fn all_free(cluster: u32, total: u32) -> Self {
        let mut meta = Self {
            cluster: cluster.into(),
            total: total.into(),
            free: total.into(),
            next_hint: 0.into(),
            bitmap: [0; 64],
            last_generation: 0.into(),
            type_data: [0; 12],
            priority: 0.into(),
            spare: [0; 412],
        };
        (0..total).for_each(|i| meta.set_free(i, true));
        meta
    }

    /// Whether resource `index` is free.
    pub fn is_free(&self, index: u32) -> bool {
        self.bitmap.get(index as usize / 8).is_some_and(|b| b >> (index % 8) & 1 == 1)
    }

    /// Sets or clears the bit alone; the counters are the caller's.
    pub fn set_free(&mut self, index: u32, free: bool) {
        if let Some(byte) = self.bitmap.get_mut(index as usize / 8) {
            *byte = *byte & !(1 << (index % 8)) | u8::from(free) << (index % 8);
        }
    }

    /// Number of free bits.
    pub fn free_bits(&self) -> u32 {
        self.bitmap.iter().map(|b| b.count_ones()).sum()
    }
}

/// Cluster metadata block of VMFS-6, behind the lock block: the head of its 4096 bytes.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ClusterMeta6 {
    /// Zero.
    pub spare_00: [u8; 16],
    /// [`CLUSTER6_SIGNATURE`].
    pub signature: U32,
    /// Priority.
    pub priority: U32,
    /// Own number.
    pub cluster: U64,
    /// Resources in this cluster.
    pub total: U16,
    /// Free ones.
    pub free: U16,
    /// Zero.
    pub spare_24: [u8; 2],
    /// Small block clusters: owner entries in use, counting the empty entry 0.
    pub owners: U16,
    /// Zero.
    pub spare_28: [u8; 2],
    /// 7 in large block clusters; unknown.
    pub unknown_2a: u8,
    /// 1 in small block clusters; unknown.
    pub unknown_2b: u8,
    /// Zero.
    pub spare_2c: [u8; 4],
    /// 1.
    pub version: U32,
    /// Zero.
    pub spare_34: [u8; 36],
    /// Counter, mac and time of the last host that allocated.
    pub last_host: [u8; 16],
    /// `.fdc.sf`: the last generation handed out in this cluster.
    pub last_generation: U32,
    /// Zero.
    pub spare_6c: [u8; 16],
    /// Where the search for a free one goes on.
    pub next_hint: U32,
    /// Bitmap of one bit each (small block clusters: two bits, resources 0 to 255).
    pub bitmap: [u8; 64],
    /// Large block clusters: u64 for each; small block clusters: zero.
    pub spare_c0: [u8; 64],
    /// Small block clusters: hint of resources 256 to 511.
    pub next_hint_high: U32,
    /// Zero.
    pub spare_104: [u8; 124],
    /// Small block clusters: two bits each, resources 256 to 511.
    pub bitmap_high: [u8; 64],
}
const _: () = assert!(offset_of!(ClusterMeta6, free) == 0x22);
const _: () = assert!(offset_of!(ClusterMeta6, last_host) == 0x58);
const _: () = assert!(offset_of!(ClusterMeta6, last_generation) == 0x68);
const _: () = assert!(offset_of!(ClusterMeta6, bitmap) == 0x80);
const _: () = assert!(offset_of!(ClusterMeta6, next_hint_high) == 0x100);
const _: () = assert!(offset_of!(ClusterMeta6, bitmap_high) == 0x180);

#[cfg(test)]
mod tests {
    use super::*;

    /// The five files of a genuine 2 GiB VMFS-5 volume.
    #[test]
    fn genuine_geometry() {
        let make = |per_cluster, resource_bytes, count| ResourceGeometry {
            per_cluster,
            per_group: 64,
            resource_bytes,
            count,
            metadata_bytes: 512,
        };
        let table = [
            (make(200, 0, 2048), 1, 0x1_0000, 0x2_0000),
            (make(64, 0x2000, 8192), 2, 0x201_0000, 0x403_0000),
            (make(16, 0x1000, 64512), 63, 0x41_0000, 0x1000_0000),
            (make(200, 0x800, 20352), 2, 0x191_0000, 0x27F_0000),
            (make(16, 0x1000, 256), 1, 0x41_0000, 0x12_0000),
        ];
        for (geometry, groups, group_bytes, file_bytes) in table {
            assert_eq!(geometry.groups(), groups);
            assert_eq!(geometry.group_bytes(), group_bytes);
            assert_eq!(geometry.file_bytes(), file_bytes);
            assert_eq!(ResourceGeometry::load(&geometry.header(), 512, 0), Ok(geometry));
        }
        // normal-flat's pointer block of the same volume: cluster 3346, resource 0.
        let pbc = table[2].0;
        assert_eq!(pbc.resource_offset(3346, 0), Some(0x1_0000 + 52 * 0x41_0000 + 0x1_0000 + 18 * 0x1_0000));
        assert_eq!(pbc.resource_offset(4032, 0), None);
    }
}
