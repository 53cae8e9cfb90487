//! The logical volume manager's tables at the head of every device (versions 3 to 6).

use super::{Corrupt, Expected, RdmRecord, VmfsUuid, ensure};
use std::mem::{offset_of, size_of};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Offset of the LVM header on a device (bytes).
pub const LVM_HEADER_OFFSET: u64 = 0x10_0000;
/// Value of [`LvmHeader::magic`].
pub const LVM_MAGIC: u32 = 0xC001_D00D;
/// Offset of extent data on a device: byte 0 of this device's part of the volume.
pub const DATA_OFFSET: u64 = 0x110_0000;
/// Length of a physical extent of LVM 3, 4 and 5, and the unit in which all versions count (bytes).
pub const PE_BYTES_5: u64 = 256 << 20;
/// Stride of the extent table (bytes).
pub const PE_ENTRY_BYTES: u64 = 128;
/// Extents that one map describes.
pub const PE_PER_MAP: u64 = 8192;
/// Data that the tables of one region describe: 8 maps (bytes).
pub const REGION_BYTES: u64 = 8 * PE_PER_MAP * PE_BYTES_5;
/// Offset on a device of the first extended header, behind the data of the first region.
pub const EXTENDED_HEADER_0: u64 = 0x1000_0110_0000;
/// Distance from one extended header to the next: its own 16 MiB and a region of data.
pub const EXTENDED_STEP: u64 = REGION_BYTES + 0x100_0000;

/// Where LVM 3, 4 and 5 keep their tables (offsets on the device).
pub mod lvm5 {
    /// Volume descriptor.
    pub const VOLUME: u64 = 0x10_0200;
    /// Names of the devices, 32 of 256 bytes.
    pub const NAMES: u64 = 0x17_E200;
    /// Bitmap of used extents of map 0, 1024 bytes.
    pub const PE_BITMAP: u64 = 0x18_0200;
    /// Table of extents of map 0.
    pub const PE_TABLE: u64 = 0x18_0600;
    /// Distance between maps: bitmap and table.
    pub const MAP_STEP: u64 = 1024 + (1 << 20);
    /// Maps in one region at most.
    pub const MAPS_MAX: u32 = 8;
}

/// Where LVM 6 keeps its tables (offsets on the device).
pub mod lvm6 {
    /// Volume descriptor.
    pub const VOLUME: u64 = 0x10_1000;
    /// Names of the devices, 32 of 256 bytes.
    pub const NAMES: u64 = 0x17_F000;
    /// Bitmap of used extents, 4096 bytes.
    pub const PE_BITMAP: u64 = 0x18_1000;
    /// Table of extents.
    pub const PE_TABLE: u64 = 0x18_2000;
}

/// Device metadata at dev+0x100000.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct LvmHeader {
    /// [`LVM_MAGIC`].
    pub magic: U32,
    /// Version: 3, 4, 5 or 6.
    pub major: U32,
    /// Minor version: 16 (LVM 3) or 21.
    pub minor: U32,
    /// SCSI identity of this device.
    pub disk_id: RdmRecord,
    /// 512.
    pub disk_block_bytes: U32,
    /// Length of the device or partition.
    pub device_bytes: U64,
    /// Volumes on this device, 1.
    pub volumes: U32,
    /// Extents on this device.
    pub extents: U32,
    /// Index of the last extent.
    pub last_extent: U32,
    /// Generation of these tables.
    pub generation: U64,
    /// [`DATA_OFFSET`].
    pub data_offset: U64,
    /// Identity of the device.
    pub device_uuid: VmfsUuid,
    /// Creation, microseconds since 1970.
    pub created_us: U64,
    /// Last change, microseconds since 1970.
    pub modified_us: U64,
    /// Host that holds the LVM lock.
    pub locked_by: VmfsUuid,
    /// When it took the lock, microseconds.
    pub locked_us: U64,
    /// Unknown, 0.
    pub spare_ba: U32,
    /// Extent maps in this region (LVM 3: 0 means 1).
    pub pe_maps: U32,
    /// Offset on the device of the next extended header, 0 none.
    pub next_extended: U64,
    /// Metadata alignment: 0, LVM 6: 4096.
    pub alignment: U32,
    /// LVM 6: units of 256 MiB on this device.
    pub units: U32,
    /// 1: VMFS-L, local.
    pub flags: U32,
    /// Rest of the sector.
    pub spare: [u8; 298],
}
const _: () = assert!(size_of::<LvmHeader>() == 512);
const _: () = assert!(offset_of!(LvmHeader, device_bytes) == 0x5E);
const _: () = assert!(offset_of!(LvmHeader, device_uuid) == 0x82);
const _: () = assert!(offset_of!(LvmHeader, flags) == 0xD2);

impl LvmHeader {
    /// A header of a version we know; `at` is its offset on the device.
    pub fn check(&self, at: u64) -> Result<(), Corrupt> {
        let (magic, major) = (self.magic.get(), self.major.get());
        ensure(magic == LVM_MAGIC, "LVM magic", at, magic.into(), Expected::Value(LVM_MAGIC.into()))?;
        ensure(
            (3..=6).contains(&major),
            "LVM version",
            at + 4,
            major.into(),
            Expected::Words("3, 4, 5 or 6"),
        )?;
        let data = self.data_offset.get();
        ensure(data == DATA_OFFSET, "LVM data offset", at + 0x7A, data, Expected::Value(DATA_OFFSET))?;
        let extents = self.extents.get();
        ensure(
            u64::from(extents) <= 1 << 20,
            "number of physical extents",
            at + 0x6A,
            extents.into(),
            Expected::AtMost(1 << 20),
        )
    }

    /// Offset of the volume descriptor on the device.
    pub fn volume_descriptor_offset(&self) -> u64 {
        if self.major.get() >= 6 { lvm6::VOLUME } else { lvm5::VOLUME }
    }
}

/// Volume descriptor.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct VolumeDescriptor {
    /// Length of the whole volume, n x 256 MiB.
    pub volume_bytes: U64,
    /// Number of extents over all devices plus number of devices.
    pub generation: U64,
    /// 1: normal.
    pub state: U32,
    /// Name: the volume's uuid as text.
    pub name: [u8; 64],
    /// Identity of the logical volume.
    pub uuid: VmfsUuid,
    /// 1; a resignatured copy has another.
    pub snapshot_id: U32,
    /// Creation, microseconds since 1970.
    pub created_us: U64,
    /// Index of the volume on the device, 0.
    pub index: U32,
    /// Units of 256 MiB on this device.
    pub units: U32,
    /// First unit of this device in the volume.
    pub first_unit: U64,
    /// Last unit of this device in the volume.
    pub last_unit: U64,
    /// Last change, microseconds since 1970.
    pub modified_us: U64,
    /// Devices that make up the volume.
    pub devices: U32,
    /// Unknown, 0.
    pub spare_94: [u8; 124],
    /// LVM 6: extent entries consumed (1); LVM 5: 0.
    pub entries_used: U32,
    /// Rest of the sector.
    pub spare: [u8; 236],
}
const _: () = assert!(size_of::<VolumeDescriptor>() == 512);
const _: () = assert!(offset_of!(VolumeDescriptor, uuid) == 0x54);
const _: () = assert!(offset_of!(VolumeDescriptor, devices) == 0x90);
const _: () = assert!(offset_of!(VolumeDescriptor, entries_used) == 0x110);

/// Entry of the extent table.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PeEntry {
    /// 1: in use.
    pub used: u8,
    /// Number of the extent on its device.
    pub id: U32,
    /// Index of the volume, 0.
    pub volume_index: U32,
    /// Offset of the extent on the device.
    pub device_offset: U64,
    /// Offset of the extent in the volume.
    pub volume_offset: U64,
    /// Length.
    pub bytes: U64,
    /// 1.
    pub version: U32,
    /// Rest of the entry.
    pub spare: [u8; 91],
}
const _: () = assert!(size_of::<PeEntry>() == PE_ENTRY_BYTES as usize);

/// Head of an extended metadata region of LVM 5, behind every 16 TiB of data.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtendedHeader {
    /// [`LVM_MAGIC`].
    pub magic: U32,
    /// Extent maps in this region.
    pub pe_maps: U32,
    /// Offset on the device where the region's data begins.
    pub data_offset: U64,
    /// Offset of the next extended header, 0 none.
    pub next: U64,
}
const _: () = assert!(size_of::<ExtendedHeader>() == 24);
