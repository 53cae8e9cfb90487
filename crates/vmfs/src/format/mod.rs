//! The bytes of VMFS on a device, for versions 3, 5 and 6: raw structures in, checked values out.
//!
//! Sources: the published images and tools listed in `docs/formats/vmfs.md`; every structure below was compared with
//! volumes that ESXi made. All integers are little-endian, all structures packed. Offsets are named `vol+X` (in the
//! logical volume), `dev+X` (on the device) and `FD+X` (in a file descriptor).

mod address;
mod directory;
mod inode;
mod lock;
mod lvm;
mod resource;
mod superblock;

pub use address::{Address, FdAddress};
pub use directory::{DIR_ENTRY_BYTES, DIR_NAME_MAX, DirEntry5, EntryName, directory6};
pub use inode::{
    FD_RESIDENT_BYTES, FD_SLOTS, FD6_RESIDENT_BYTES, FD6_SLOTS, FdMeta, INODE6_SIGNATURE, InodeKind,
    RdmRecord, ScsiIdKind, Zla, fd_layout,
};
pub use lock::{HEARTBEAT_FREE, HEARTBEAT_IN_USE, Heartbeat, LockBlock, LockKind, LockMode, heartbeat_slots};
pub use lvm::{
    DATA_OFFSET, EXTENDED_HEADER_0, EXTENDED_STEP, ExtendedHeader, LVM_HEADER_OFFSET, LVM_MAGIC, LvmHeader,
    PE_BYTES_5, PE_ENTRY_BYTES, PE_PER_MAP, PeEntry, REGION_BYTES, VolumeDescriptor, lvm5, lvm6,
};
pub use resource::{
    CHILD_HEADER_OFFSET, CLUSTER6_SIGNATURE, ClusterMeta5, ClusterMeta6, GROUP0_OFFSET, RESOURCE6_SIGNATURE,
    ResourceGeometry, ResourceHeader, ResourceHeader6,
};
pub use superblock::{
    FS_DESCRIPTOR_OFFSET, FS_MAGIC, FS_MAGIC_LOCAL, FsDescriptor, HEARTBEAT_OFFSET, SystemFile, config_flags,
};

use std::fmt;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Metadata is not what the format says. Never a bug of ours, always content of the device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} at {at:#x} is corrupt: found {found:#x}, expected {expected}")]
pub struct Corrupt {
    /// The structure and field.
    pub what: &'static str,
    /// Byte offset in the logical volume (for LVM structures: on the device).
    pub at: u64,
    /// What is there.
    pub found: u64,
    /// What the format allows.
    pub expected: Expected,
}

/// What a field may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Exactly this value.
    Value(u64),
    /// Not more than this.
    AtMost(u64),
    /// Not less than this.
    AtLeast(u64),
    /// Something described in words.
    Words(&'static str),
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Value(v) => write!(f, "{v:#x}"),
            Self::AtMost(v) => write!(f, "at most {v:#x}"),
            Self::AtLeast(v) => write!(f, "at least {v:#x}"),
            Self::Words(w) => f.write_str(w),
        }
    }
}

/// Answers `Corrupt` unless `ok`.
pub(crate) fn ensure(
    ok: bool,
    what: &'static str,
    at: u64,
    found: u64,
    expected: Expected,
) -> Result<(), Corrupt> {
    if ok { Ok(()) } else { Err(Corrupt { what, at, found, expected }) }
}

/// Identity of a device, volume, file system or host: `u32 timeLo, u32 timeHi, u16 random, u8 mac[6]`.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct VmfsUuid(pub [u8; 16]);

impl VmfsUuid {
    /// All zero: nobody.
    pub const NONE: Self = Self([0; 16]);

    /// Composed of its parts.
    pub fn new(time_low: u32, time_high: u32, random: u16, mac: [u8; 6]) -> Self {
        let mut bytes = [0; 16];
        bytes[0..4].copy_from_slice(&time_low.to_le_bytes());
        bytes[4..8].copy_from_slice(&time_high.to_le_bytes());
        bytes[8..10].copy_from_slice(&random.to_le_bytes());
        bytes[10..16].copy_from_slice(&mac);
        Self(bytes)
    }

    /// Nobody.
    pub fn is_none(&self) -> bool {
        *self == Self::NONE
    }
}

impl fmt::Display for VmfsUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let b = &self.0;
        let (low, high) =
            (u32::from_le_bytes([b[0], b[1], b[2], b[3]]), u32::from_le_bytes([b[4], b[5], b[6], b[7]]));
        write!(f, "{low:08x}-{high:08x}-{:04x}-", u16::from_le_bytes([b[8], b[9]]))?;
        b[10..].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for VmfsUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Text in a fixed field, up to the first NUL.
pub(crate) fn text(field: &[u8]) -> String {
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

/// A structure at the start of `bytes`, borrowed. `None` when there are too few bytes.
pub fn view<T: FromBytes + Immutable + KnownLayout + Unaligned>(bytes: &[u8]) -> Option<&T> {
    T::ref_from_prefix(bytes).ok().map(|(head, _)| head)
}

/// A structure at the start of `bytes`, borrowed for change. `None` when there are too few bytes.
pub fn view_mut<T: FromBytes + IntoBytes + KnownLayout + Unaligned>(bytes: &mut [u8]) -> Option<&mut T> {
    T::mut_from_prefix(bytes).ok().map(|(head, _)| head)
}
