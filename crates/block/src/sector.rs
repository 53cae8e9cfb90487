//! Sectors (512 bytes: what guests, VMFS and crash tests count in) and blocks (4 KiB: what LUN maps count in).

use crate::DiskError;

/// Bytes in a sector.
pub const SECTOR_BYTES: u64 = 512;
/// Bytes in a block.
pub const BLOCK_BYTES: u64 = 4096;
/// Sectors in a block.
pub const BLOCK_SECTORS: u64 = BLOCK_BYTES / SECTOR_BYTES;

/// A place on a disk, in sectors of 512 bytes from its start.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Sector(pub u64);

impl Sector {
    /// The sector at a byte offset; the offset must be a multiple of 512.
    pub const fn at_byte(offset: u64) -> Self {
        assert!(offset.is_multiple_of(SECTOR_BYTES), "not on a sector boundary");
        Self(offset / SECTOR_BYTES)
    }

    /// Offset from the start of the disk, in bytes.
    pub const fn bytes(self) -> u64 {
        self.0 * SECTOR_BYTES
    }

    /// `count` sectors further on.
    pub const fn plus(self, count: u64) -> Self {
        Self(self.0 + count)
    }
}

impl std::fmt::Display for Sector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sector {}", self.0)
    }
}

/// Refuses a range that is not wholly on a disk of `sectors` sectors, without overflow on hostile numbers.
pub fn check_range(sectors: u64, at: Sector, count: u64) -> Result<(), DiskError> {
    match at.0.checked_add(count) {
        Some(end) if end <= sectors => Ok(()),
        _ => Err(DiskError::OutOfRange),
    }
}
