//! Cylinders, heads and sectors for guests that still ask.

/// A disk's geometry as it stands in the descriptor.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Whole cylinders.
    pub cylinders: u64,
    /// Heads.
    pub heads: u32,
    /// Sectors per track.
    pub sectors: u32,
}

impl Geometry {
    /// VMware's rule: 64 x 32 below 1 GiB, 128 x 32 below 2 GiB, else 255 x 63; cylinders rounded down.
    pub fn of(sectors: u64) -> Self {
        const GIB: u64 = (1 << 30) / block::SECTOR_BYTES;
        let (heads, per_track) = match sectors {
            s if s < GIB => (64, 32),
            s if s < 2 * GIB => (128, 32),
            _ => (255, 63),
        };
        Self { cylinders: sectors / u64::from(heads * per_track), heads, sectors: per_track }
    }
}
