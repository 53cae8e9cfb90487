//! Our identity record, as it lies behind the genuine 78-byte SCSI id in a mapping's inode (semantics page 2.1).

use std::mem::size_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First bytes.
pub const MAGIC: [u8; 8] = *b"KGMRDMID";
/// The version we write; a newer one is refused, never guessed at.
pub const VERSION: u16 = 1;
/// `mode`: virtual.
pub const MODE_VIRTUAL: u8 = 1;
/// `mode`: physical.
pub const MODE_PHYSICAL: u8 = 2;
/// `present`: `uuid` is a designator of the LUN.
pub const HAS_UUID: u32 = 1;
/// `present`: array and LUN id are filled in.
pub const HAS_ARRAY: u32 = 2;
/// `present`: the LUN's generation is filled in.
pub const HAS_GENERATION: u32 = 4;
/// `present`: the content tag is filled in.
pub const HAS_TAG: u32 = 8;

/// 640 bytes. Lengths say how much of a field is used; the rest is zero.
#[repr(C)]
#[derive(Copy, Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub struct Record {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// CRC32C of the record with this field zero.
    pub crc: U32,
    /// [`VERSION`].
    pub version: U16,
    /// Compatibility mode.
    pub mode: u8,
    /// Nothing.
    pub spare: u8,
    /// Length of the LUN in 512-byte sectors.
    pub sectors: U64,
    /// Logical block size in bytes.
    pub logical_block: U32,
    /// Physical block size in bytes.
    pub physical_block: U32,
    /// `HAS_` bits.
    pub present: U32,
    /// Bytes used in `naa`, `eui`, `t10`, `serial`, `name`, `seen`.
    pub lengths: [u8; 6],
    /// Nothing.
    pub spare_2: [u8; 6],
    /// NAA designator (type 3).
    pub naa: [u8; 16],
    /// EUI-64 designator (type 2).
    pub eui: [u8; 16],
    /// UUID designator (type A).
    pub uuid: [u8; 16],
    /// From INQUIRY, padded with blanks.
    pub vendor: [u8; 8],
    /// From INQUIRY, padded with blanks.
    pub product: [u8; 16],
    /// From INQUIRY, padded with blanks.
    pub revision: [u8; 4],
    /// Nothing.
    pub spare_3: [u8; 4],
    /// Array (pool) the LUN lies in.
    pub array: [u8; 16],
    /// The LUN's id there.
    pub lun: [u8; 16],
    /// Generation of the LUN when the mapping was made: position.
    pub generation: U64,
    /// Generation of the LUN when the mapping was made: id.
    pub generation_id: [u8; 16],
    /// When the content tag was taken: seconds since 1970.
    pub tag_time: U64,
    /// The content tag.
    pub tag: [u8; 32],
    /// T10 vendor designator (type 1).
    pub t10: [u8; 64],
    /// Unit serial number (page 80).
    pub serial: [u8; 64],
    /// SCSI name designator (type 8).
    pub name: [u8; 128],
    /// Where it was last seen. Never a key.
    pub seen: [u8; 160],
}

const _: () = assert!(size_of::<Record>() == 640);
const _: () = assert!(std::mem::offset_of!(Record, naa) == 48);
