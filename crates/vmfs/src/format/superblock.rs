//! The file system descriptor at vol+0x200000.

use super::{Corrupt, Expected, FdAddress, VmfsUuid, ensure, text};
use std::mem::{offset_of, size_of};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Offset of the file system descriptor in the volume.
pub const FS_DESCRIPTOR_OFFSET: u64 = 0x20_0000;
/// Offset of the heartbeat slots in the volume.
pub const HEARTBEAT_OFFSET: u64 = 0x30_0000;
/// Value of [`FsDescriptor::magic`].
pub const FS_MAGIC: u32 = 0x2FAB_F15E;
/// Value of [`FsDescriptor::magic`] of a local file system, VMFS-L.
pub const FS_MAGIC_LOCAL: u32 = 0x2FAB_F15F;

/// Bits of [`FsDescriptor::config`].
pub mod config_flags {
    /// Always set.
    pub const BASE: u32 = 0x2;
    /// Sub-blocks are dense: 64 in a cluster.
    pub const DENSE: u32 = 0x4;
    /// Formatted with few resources.
    pub const RESOURCE_OPTIMISED: u32 = 0x200;
    /// Local VMFS-6 with LVM.
    pub const LOCAL_LVM: u32 = 0x2000;
    /// VMFS-6.
    pub const VMFS6: u32 = 0x4000;
    /// All bits whose meaning is known; others forbid writing.
    pub const KNOWN: u32 = BASE | DENSE | RESOURCE_OPTIMISED | LOCAL_LVM | VMFS6;
}

/// Files that the file system itself is made of; their FDs have fixed addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SystemFile {
    /// The root directory.
    Root = 0,
    /// File block bitmaps, `.fbb.sf`.
    FileBlocks = 1,
    /// File descriptors, `.fdc.sf`.
    Descriptors = 2,
    /// Pointer blocks, `.pbc.sf`.
    PointerBlocks = 3,
    /// Sub-blocks, `.sbc.sf`.
    SubBlocks = 4,
    /// Volume header: everything before the first resource, `.vh.sf`.
    VolumeHeader = 5,
    /// Pointer blocks of system files, `.pb2.sf`.
    PointerBlocks2 = 6,
    /// System data directory, `.sdd.sf`.
    SystemData = 7,
    /// Journals, `.jbc.sf` (VMFS-6).
    Journals = 8,
    /// Unmap locks, `.unmap.sf` (VMFS-6).
    Unmap = 9,
}

impl SystemFile {
    /// All, in the order of their FDs.
    pub const ALL: [Self; 10] = [
        Self::Root,
        Self::FileBlocks,
        Self::Descriptors,
        Self::PointerBlocks,
        Self::SubBlocks,
        Self::VolumeHeader,
        Self::PointerBlocks2,
        Self::SystemData,
        Self::Journals,
        Self::Unmap,
    ];

    /// The file's descriptor.
    pub const fn fd(self) -> FdAddress {
        FdAddress::new(0, self as u32)
    }

    /// Its name in the root directory.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Root => ".",
            Self::FileBlocks => ".fbb.sf",
            Self::Descriptors => ".fdc.sf",
            Self::PointerBlocks => ".pbc.sf",
            Self::SubBlocks => ".sbc.sf",
            Self::VolumeHeader => ".vh.sf",
            Self::PointerBlocks2 => ".pb2.sf",
            Self::SystemData => ".sdd.sf",
            Self::Journals => ".jbc.sf",
            Self::Unmap => ".unmap.sf",
        }
    }
}

/// File system descriptor, 512 bytes.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FsDescriptor {
    /// [`FS_MAGIC`] or [`FS_MAGIC_LOCAL`].
    pub magic: U32,
    /// Major version: 4 (VMFS-3), 14 (VMFS-5), 24 (VMFS-6).
    pub major: U32,
    /// Minor version: 31, 81 (local 60), 82.
    pub minor: u8,
    /// Identity of the file system.
    pub uuid: VmfsUuid,
    /// See [`config_flags`].
    pub config: U32,
    /// Label, UTF-8, NUL-padded.
    pub label: [u8; 128],
    /// 512.
    pub disk_block_bytes: U32,
    /// File block size.
    pub block_bytes: U64,
    /// Creation, seconds since 1970.
    pub created_s: U32,
    /// 1.
    pub snapshot_id: U32,
    /// Identity of the logical volume below; zero when there is none.
    pub lvm_uuid: VmfsUuid,
    /// Snapshot id of the logical volume.
    pub lvm_snapshot_id: U32,
    /// Zero.
    pub spare_c5: [u8; 12],
    /// Offset of group 0 in `.fdc.sf`.
    pub fdc_group_offset: U32,
    /// Clusters in a group of `.fdc.sf`.
    pub fdc_clusters_per_group: U32,
    /// Sub-block size.
    pub sub_block_bytes: U32,
    /// Journal slots in a transaction.
    pub journal_slots: U32,
    /// Volume offset of the FD of `.pb2.sf`.
    pub pb2_offset: U64,
    /// FD address of `.pb2.sf`.
    pub pb2_fd: U32,
    /// Host that formatted.
    pub format_host: VmfsUuid,
    /// 1.
    pub generation: U64,
    /// Volume offset of the FD of `.sdd.sf`.
    pub sdd_offset: U64,
    /// FD address of `.sdd.sf`.
    pub sdd_fd: U32,
    /// Checksum type, 0.
    pub checksum_type: u8,
    /// Unmap priority.
    pub unmap_priority: U16,
    /// Zero.
    pub spare_114: [u8; 4],
    /// Checksum generation, 0.
    pub checksum_generation: U64,
    /// Checksum, 0.
    pub checksum: U64,
    /// Checksum generation again, 0.
    pub checksum_generation2: U64,
    /// Physical block size: 0, VMFS-6: 512.
    pub physical_block_bytes: U32,
    /// Metadata alignment A: 0 means 512, VMFS-6: 4096.
    pub alignment: U32,
    /// VMFS-6: shift from small to large blocks, 9.
    pub large_block_shift: U16,
    /// Zero.
    pub spare_13a: [u8; 4],
    /// VMFS-6: log2 of the pointer block size, 16.
    pub pointer_block_shift: U16,
    /// VMFS-6: bits of a small block address, 44.
    pub small_block_bits: U16,
    /// Zero.
    pub spare_142: [u8; 2],
    /// VMFS-6: granularity of to-be-zeroed bits.
    pub tbz_bytes: U32,
    /// VMFS-6: journal block size.
    pub journal_block_bytes: U32,
    /// VMFS-6: lease, milliseconds.
    pub lease_ms: U32,
    /// VMFS-6: reclaim window, milliseconds.
    pub reclaim_ms: U32,
    /// Local stamp.
    pub local_stamp: U64,
    /// Local owner.
    pub local_mac: [u8; 6],
    /// Unmap method, bandwidth and limits.
    pub unmap_method: [u8; 13],
    /// Zero.
    pub spare_16f: [u8; 16],
    /// VMFS-6: volume offset of the FD of `.unmap.sf`.
    pub unmap_offset: U64,
    /// VMFS-6: FD address of `.unmap.sf`.
    pub unmap_fd: U32,
    /// 0x80 on shared VMFS-6 volumes; meaning unknown.
    pub unknown_18b: U32,
    /// Rest of the sector.
    pub spare: [u8; 113],
}
const _: () = assert!(size_of::<FsDescriptor>() == 512);
const _: () = assert!(offset_of!(FsDescriptor, label) == 0x1D);
const _: () = assert!(offset_of!(FsDescriptor, lvm_uuid) == 0xB1);
const _: () = assert!(offset_of!(FsDescriptor, fdc_group_offset) == 0xD1);
const _: () = assert!(offset_of!(FsDescriptor, pb2_offset) == 0xE1);
const _: () = assert!(offset_of!(FsDescriptor, format_host) == 0xED);
const _: () = assert!(offset_of!(FsDescriptor, generation) == 0xFD);
const _: () = assert!(offset_of!(FsDescriptor, checksum_generation) == 0x118);
const _: () = assert!(offset_of!(FsDescriptor, large_block_shift) == 0x138);
const _: () = assert!(offset_of!(FsDescriptor, pointer_block_shift) == 0x13E);
const _: () = assert!(offset_of!(FsDescriptor, tbz_bytes) == 0x144);
const _: () = assert!(offset_of!(FsDescriptor, unmap_offset) == 0x17F);
const _: () = assert!(offset_of!(FsDescriptor, unknown_18b) == 0x18B);

impl FsDescriptor {
    /// A descriptor of a version we know, with sizes in their limits.
    pub fn check(&self) -> Result<(), Corrupt> {
        let at = FS_DESCRIPTOR_OFFSET;
        let (magic, major) = (self.magic.get(), self.major.get());
        ensure(
            magic == FS_MAGIC || magic == FS_MAGIC_LOCAL,
            "file system magic",
            at,
            magic.into(),
            Expected::Value(FS_MAGIC.into()),
        )?;
        ensure(
            matches!(major, 4 | 14 | 24),
            "file system version",
            at + 4,
            major.into(),
            Expected::Words("4 (VMFS-3), 14 (VMFS-5) or 24 (VMFS-6)"),
        )?;
        let block = self.block_bytes.get();
        ensure(
            block.is_power_of_two() && (0x8_0000..=0x80_0000).contains(&block),
            "file block size",
            at + 0xA1,
            block,
            Expected::Words("512 KiB, 1, 2, 4 or 8 MiB"),
        )?;
        let sub = self.sub_block_bytes.get();
        ensure(
            sub.is_power_of_two() && (0x1000..=0x1_0000).contains(&sub),
            "sub-block size",
            at + 0xD9,
            sub.into(),
            Expected::Words("a power of two from 4 to 64 KiB"),
        )?;
        let clusters = self.fdc_clusters_per_group.get();
        ensure(
            (1..=1024).contains(&clusters),
            "clusters in a group of .fdc.sf",
            at + 0xD5,
            clusters.into(),
            Expected::AtMost(1024),
        )?;
        let align = self.alignment.get();
        let wanted = if major == 24 { 4096 } else { 512 };
        ensure(
            align == wanted || (align == 0 && wanted == 512),
            "metadata alignment",
            at + 0x134,
            align.into(),
            Expected::Value(wanted.into()),
        )
    }

    /// VMFS version: 3, 5 or 6.
    pub fn version(&self) -> u8 {
        match self.major.get() {
            0..=13 => 3,
            14..=23 => 5,
            _ => 6,
        }
    }

    /// Bytes of a metadata block (S): 512, VMFS-6: 4096.
    pub fn metadata_bytes(&self) -> u64 {
        if self.version() == 6 { 4096 } else { 512 }
    }

    /// The label as text.
    pub fn label_text(&self) -> String {
        text(&self.label)
    }
}
