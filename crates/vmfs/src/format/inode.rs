//! File descriptors (inodes): metadata, block array, RDM record.

use super::{Corrupt, Expected, FdAddress, ensure};
use std::mem::{offset_of, size_of};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of content that fit into an FD of VMFS-5.
pub const FD_RESIDENT_BYTES: usize = 1024;
/// Addresses (u32) in an FD of VMFS-3 and 5.
pub const FD_SLOTS: usize = 256;
/// Bytes of content that fit into an FD of VMFS-6.
pub const FD6_RESIDENT_BYTES: usize = 3584;
/// Addresses (u64) in an FD of VMFS-6.
pub const FD6_SLOTS: usize = 320;
/// Value of [`FdMeta::signature`] in VMFS-6.
pub const INODE6_SIGNATURE: u32 = 0x6664_6D64;

/// Where things are in an FD, in bytes from its start, by VMFS version.
pub mod fd_layout {
    /// Whole FD: (VMFS-3 and 5, VMFS-6).
    pub const BYTES: [u64; 2] = [2048, 8192];
    /// Metadata.
    pub const META: [u64; 2] = [0x200, 0x1000];
    /// Resident content or RDM record.
    pub const DATA: [u64; 2] = [0x400, 0x1200];
    /// Block array.
    pub const ARRAY: [u64; 2] = [0x400, 0x1600];
    /// FD 0 (root) in the volume: VMFS-3, 5, 6.
    pub const ROOT: [u64; 3] = [0x41_8000, 0x42_0000, 0x72_0000];
}

/// What an FD describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InodeKind {
    /// A directory.
    Directory = 2,
    /// A regular file.
    File = 3,
    /// A symbolic link.
    Symlink = 4,
    /// A file of the file system itself.
    System = 5,
    /// A raw device mapping.
    Rdm = 6,
}

impl InodeKind {
    /// From the raw type.
    pub fn decode(raw: u32) -> Option<Self> {
        [Self::Directory, Self::File, Self::Symlink, Self::System, Self::Rdm]
            .into_iter()
            .find(|kind| *kind as u32 == raw)
    }
}

/// How the block array is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Zla {
    /// No array (RDM).
    None = 0,
    /// File blocks.
    FileBlocks = 1,
    /// Sub-blocks.
    SubBlocks = 2,
    /// Pointer blocks.
    Single = 3,
    /// Pointer blocks of `.pb2.sf`.
    SinglePb2 = 5,
    /// Pointer blocks of pointer blocks.
    Double = 0x10D0,
    /// The content lies in the FD.
    Resident = 0x10D1,
}

impl Zla {
    /// From the raw field.
    pub fn decode(raw: u32) -> Option<Self> {
        [
            Self::None,
            Self::FileBlocks,
            Self::SubBlocks,
            Self::Single,
            Self::SinglePb2,
            Self::Double,
            Self::Resident,
        ]
        .into_iter()
        .find(|zla| *zla as u32 == raw)
    }
}

/// Metadata of an FD: the used head of its metadata block.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FdMeta {
    /// Own address.
    pub address: U32,
    /// Generation, handed out by the FD cluster; also in the directory entry.
    pub generation: U32,
    /// Links: 1 for files, 2 plus sub-directories for directories, 0 when freed.
    pub links: U32,
    /// See [`InodeKind`].
    pub kind: U32,
    /// VMFS-6: 1 uses file blocks, 8 cluster bitmap valid.
    pub flags: U32,
    /// Length.
    pub length: U64,
    /// Unit of the block array: file block, sub-block, or 512 for an RDM.
    pub block_bytes: U64,
    /// Data blocks allocated; holes and pointer blocks do not count.
    pub blocks: U64,
    /// Last change of content, seconds since 1970.
    pub modified_s: U32,
    /// Last change of metadata, seconds since 1970.
    pub changed_s: U32,
    /// Last access, seconds since 1970.
    pub accessed_s: U32,
    /// Owner.
    pub uid: U32,
    /// Group.
    pub gid: U32,
    /// Permission bits (VMFS-3: with type bits).
    pub mode: U32,
    /// See [`Zla`].
    pub zla: U32,
    /// To-be-zeroed blocks, low word.
    pub tbz_low: U32,
    /// Copy-on-write blocks, low word.
    pub cow_low: U32,
    /// Blocks new since the epoch, low word.
    pub new_low: U32,
    /// To-be-zeroed blocks, high word.
    pub tbz_high: U32,
    /// Copy-on-write blocks, high word.
    pub cow_high: U32,
    /// VMFS-6: pointer blocks.
    pub pointer_blocks: U32,
    /// Blocks new since the epoch, high word.
    pub new_high: U32,
    /// VMFS-6: [`INODE6_SIGNATURE`].
    pub signature: U32,
    /// Own address again (VMFS-3: 0).
    pub address2: U32,
    /// log2 of the to-be-zeroed granularity.
    pub tbz_shift: U32,
    /// VMFS-6: parent directory of user files.
    pub parent: U32,
    /// VMFS-6: last small block cluster used.
    pub last_cluster: U32,
    /// Unknown.
    pub spare_78: [u8; 4],
    /// VMFS-6, flag 8: 1.
    pub bitmap_valid: U32,
    /// VMFS-6, flag 8: bits set in the cluster bitmap.
    pub bitmap_bits: U32,
    /// Unknown.
    pub spare_84: [u8; 5],
    /// log2 of `block_bytes` (VMFS-3: 0).
    pub block_shift: u8,
    /// Rest of the sector.
    pub spare: [u8; 374],
}
const _: () = assert!(size_of::<FdMeta>() == 512);
const _: () = assert!(offset_of!(FdMeta, length) == 0x14);
const _: () = assert!(offset_of!(FdMeta, modified_s) == 0x2C);
const _: () = assert!(offset_of!(FdMeta, zla) == 0x44);
const _: () = assert!(offset_of!(FdMeta, tbz_high) == 0x54);
const _: () = assert!(offset_of!(FdMeta, signature) == 0x64);
const _: () = assert!(offset_of!(FdMeta, parent) == 0x70);
const _: () = assert!(offset_of!(FdMeta, block_shift) == 0x89);

impl FdMeta {
    /// All zero.
    pub fn empty() -> Self {
        zerocopy::FromZeros::new_zeroed()
    }

    /// It is the FD at `address`; its type, ZLA, length and unit are in their limits. `at` is its volume offset.
    pub fn check(&self, address: FdAddress, at: u64) -> Result<(InodeKind, Zla), Corrupt> {
        let own = self.address.get();
        ensure(own == address.0, "FD's own address", at, own.into(), Expected::Value(address.0.into()))?;
        let raw = self.kind.get();
        let kind = InodeKind::decode(raw).ok_or(Corrupt {
            what: "FD type",
            at: at + 0xC,
            found: raw.into(),
            expected: Expected::Words("2 to 6"),
        })?;
        let raw = self.zla.get();
        let zla = Zla::decode(raw).ok_or(Corrupt {
            what: "ZLA",
            at: at + 0x44,
            found: raw.into(),
            expected: Expected::Words("0, 1, 2, 3, 5, 0x10d0 or 0x10d1"),
        })?;
        let length = self.length.get();
        ensure(length < 1 << 56, "file length", at + 0x14, length, Expected::AtMost(1 << 56))?;
        let unit = self.block_bytes.get();
        ensure(
            unit.is_power_of_two() && (512..=16 << 20).contains(&unit),
            "block size of a file",
            at + 0x1C,
            unit,
            Expected::Words("a power of two from 512 to 16 MiB"),
        )?;
        // VMFS-3 leaves the shift zero.
        let shift = self.block_shift;
        ensure(
            shift == 0 || u32::from(shift) == unit.trailing_zeros(),
            "block shift of a file",
            at + 0x89,
            shift.into(),
            Expected::Value(unit.trailing_zeros().into()),
        )?;
        Ok((kind, zla))
    }

    /// To-be-zeroed blocks.
    pub fn tbz(&self) -> u64 {
        u64::from(self.tbz_low.get()) | u64::from(self.tbz_high.get()) << 32
    }

    /// Sets the number of to-be-zeroed blocks.
    pub fn set_tbz(&mut self, count: u64) {
        self.tbz_low = (count as u32).into();
        self.tbz_high = ((count >> 32) as u32).into();
    }

    /// Sets the number of blocks new since the epoch.
    pub fn set_new(&mut self, count: u64) {
        self.new_low = (count as u32).into();
        self.new_high = ((count >> 32) as u32).into();
    }
}

/// How a SCSI device is named in an [`RdmRecord`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScsiIdKind {
    /// A path such as `vmhba0:C0:T0:L0`.
    Path = 0,
    /// A serial number (20 bytes, blank-padded) and the first 6 bytes of the product.
    Serial = 1,
    /// A binary NAA designator (16 bytes) and the first 6 bytes of the product.
    Naa = 2,
    /// A Symmetrix id.
    Symm = 3,
}

/// SCSI identity of a device, 78 bytes: in the LVM header and, for a raw device mapping, in the FD.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RdmRecord {
    /// See [`ScsiIdKind`].
    pub id_kind: u8,
    /// Bytes used in `id`.
    pub id_length: u8,
    /// LUN number; never used to find the device.
    pub lun: U16,
    /// SCSI device type.
    pub device_type: u8,
    /// SCSI level.
    pub scsi_level: u8,
    /// Vendor (VMFS-3 only).
    pub vendor: [u8; 8],
    /// Product (VMFS-3 only).
    pub product: [u8; 16],
    /// Revision (VMFS-3 only).
    pub revision: [u8; 4],
    /// The id.
    pub id: [u8; 44],
}
const _: () = assert!(size_of::<RdmRecord>() == 78);

impl RdmRecord {
    /// The record of a LUN known by NAA: 16 bytes of designator and the first 6 of the product.
    pub fn naa(naa: [u8; 16], product: &[u8]) -> Self {
        let mut id = [0; 44];
        id[..16].copy_from_slice(&naa);
        id[16..22].fill(b' ');
        product.iter().take(6).enumerate().for_each(|(i, byte)| id[16 + i] = *byte);
        Self::of_kind(ScsiIdKind::Naa, 22, id)
    }

    /// The record of a LUN known by serial number: padded to 20 bytes, and the first 6 of the product.
    pub fn serial(serial: &[u8], product: &[u8]) -> Self {
        let mut id = [0; 44];
        id[..26].fill(b' ');
        serial.iter().take(20).enumerate().for_each(|(i, byte)| id[i] = *byte);
        product.iter().take(6).enumerate().for_each(|(i, byte)| id[20 + i] = *byte);
        Self::of_kind(ScsiIdKind::Serial, 26, id)
    }

    fn of_kind(kind: ScsiIdKind, id_length: u8, id: [u8; 44]) -> Self {
        Self {
            id_kind: kind as u8,
            id_length,
            lun: 0.into(),
            device_type: 0,
            scsi_level: 0,
            vendor: [0; 8],
            product: [0; 16],
            revision: [0; 4],
            id,
        }
    }

    /// The kind and the id proper (with product), checked; `at` is the volume offset.
    pub fn check(&self, at: u64) -> Result<(ScsiIdKind, &[u8]), Corrupt> {
        let kinds = [ScsiIdKind::Path, ScsiIdKind::Serial, ScsiIdKind::Naa, ScsiIdKind::Symm];
        let kind = kinds.into_iter().find(|k| *k as u8 == self.id_kind).ok_or(Corrupt {
            what: "kind of SCSI id",
            at,
            found: self.id_kind.into(),
            expected: Expected::AtMost(3),
        })?;
        let id = self.id.get(..self.id_length.into()).ok_or(Corrupt {
            what: "length of SCSI id",
            at: at + 1,
            found: self.id_length.into(),
            expected: Expected::AtMost(44),
        })?;
        Ok((kind, id))
    }

    /// The id as people write it: serial number without padding, `naa.` and hex digits, or the path.
    pub fn id_text(&self) -> String {
        match self.check(0) {
            Ok((ScsiIdKind::Serial, id)) => {
                String::from_utf8_lossy(id.get(..20).unwrap_or(id)).trim().to_string()
            }
            Ok((ScsiIdKind::Naa, id)) => {
                let naa = id.get(..16).unwrap_or(id);
                naa.iter().fold(String::from("naa."), |text, byte| format!("{text}{byte:02x}"))
            }
            Ok((_, id)) => String::from_utf8_lossy(id).trim_end_matches(['\0', ' ']).to_string(),
            Err(_) => String::from("?"),
        }
    }
}

impl std::fmt::Debug for RdmRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RdmRecord({}, lun {})", self.id_text(), self.lun)
    }
}
