//! Addresses of blocks and resources: 32 bits in VMFS-3 and 5, 64 bits in VMFS-6. The low three bits are the type.

/// An address, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// 0: nothing here, reads as zero.
    Hole,
    /// A file block (VMFS-6: small file block), counted from the start of the volume.
    FileBlock {
        /// Number of the block.
        block: u64,
        /// To be zeroed: allocated, reads as zero as a whole (VMFS-6: any of 8 bits).
        tbz: bool,
        /// Copy on write; never seen set.
        cow: bool,
    },
    /// VMFS-6: a large file block of 512 small ones.
    LargeBlock {
        /// Number of the large block.
        block: u64,
        /// To be zeroed.
        tbz: bool,
        /// Copy on write.
        cow: bool,
    },
    /// A sub-block of `.sbc.sf`.
    SubBlock {
        /// Cluster in `.sbc.sf`.
        cluster: u64,
        /// Resource in the cluster.
        resource: u32,
        /// Copy on write.
        cow: bool,
    },
    /// A pointer block of `.pbc.sf`, or of `.pb2.sf` when `second`.
    PointerBlock {
        /// Cluster.
        cluster: u64,
        /// Resource in the cluster.
        resource: u32,
        /// In `.pb2.sf`.
        second: bool,
        /// Copy on write.
        cow: bool,
    },
    /// A file descriptor.
    Descriptor(FdAddress),
}

const FB: u64 = 1;
const SB: u64 = 2;
const PB: u64 = 3;
const FD: u64 = 4;
const PB2: u64 = 5;
const LFB: u64 = 7;
const COW: u64 = 1 << 5;

impl Address {
    /// A file block in use.
    pub const fn file_block(block: u64) -> Self {
        Self::FileBlock { block, tbz: false, cow: false }
    }

    /// A sub-block.
    pub const fn sub_block(cluster: u64, resource: u32) -> Self {
        Self::SubBlock { cluster, resource, cow: false }
    }

    /// A pointer block of `.pbc.sf`.
    pub const fn pointer_block(cluster: u64, resource: u32) -> Self {
        Self::PointerBlock { cluster, resource, second: false, cow: false }
    }

    /// Decodes an address of VMFS-3 or 5. `None`: no such type, or bits set that must be clear.
    pub fn decode32(raw: u32) -> Option<Self> {
        if raw == 0 {
            return Some(Self::Hole);
        }
        let cow = raw & 0x20 != 0;
        let cluster = u64::from(raw >> 6 & 0x3F_FFFF);
        match u64::from(raw & 7) {
            FB => Some(Self::FileBlock {
                block: u64::from(raw >> 6),
                tbz: raw & 0x20 != 0,
                cow: raw & 0x10 != 0,
            }),
            SB => Some(Self::SubBlock { cluster, resource: raw >> 28 | (raw >> 3 & 3) << 4, cow }),
            kind @ (PB | PB2) => {
                Some(Self::PointerBlock { cluster, resource: raw >> 28, second: kind == PB2, cow })
            }
            FD if raw & 0x38 == 0 => Some(Self::Descriptor(FdAddress(raw))),
            _ => None,
        }
    }

    /// The address as VMFS-3 and 5 write it. `None` when it does not fit.
    pub fn encode32(self) -> Option<u32> {
        let fits = |value: u64, bits: u32| (value < 1 << bits).then_some(value as u32);
        match self {
            Self::Hole => Some(0),
            Self::FileBlock { block, tbz, cow } => {
                Some(FB as u32 | u32::from(tbz) << 5 | u32::from(cow) << 4 | fits(block, 26)? << 6)
            }
            Self::SubBlock { cluster, resource, cow } => {
                let resource = fits(resource.into(), 6)?;
                Some(
                    SB as u32
                        | u32::from(cow) << 5
                        | (resource & 15) << 28
                        | (resource >> 4) << 3
                        | fits(cluster, 22)? << 6,
                )
            }
            Self::PointerBlock { cluster, resource, second, cow } => {
                let kind = if second { PB2 } else { PB };
                Some(
                    kind as u32
                        | u32::from(cow) << 5
                        | fits(resource.into(), 4)? << 28
                        | fits(cluster, 22)? << 6,
                )
            }
            Self::Descriptor(fd) => Some(fd.0),
            Self::LargeBlock { .. } => None,
        }
    }

    /// Decodes an address of VMFS-6. Block numbers count small blocks of 1 MiB, 512 in a cluster.
    pub fn decode64(raw: u64) -> Option<Self> {
        if raw == 0 {
            return Some(Self::Hole);
        }
        let cow = raw & COW != 0;
        let tbz = raw >> 7 & 0xFF != 0;
        let block = raw >> 15 & 0x7FFF_FFFF;
        let (cluster, resource) = (raw >> 6 & 0xF_FFFF_FFFF, (raw >> 56) as u32);
        match raw & 7 {
            FB if raw >> 51 < 512 => Some(Self::FileBlock { block: block * 512 + (raw >> 51), tbz, cow }),
            LFB => Some(Self::LargeBlock { block, tbz, cow }),
            SB => Some(Self::SubBlock { cluster, resource, cow }),
            kind @ (PB | PB2) => Some(Self::PointerBlock { cluster, resource, second: kind == PB2, cow }),
            FD if raw >> 32 == 0 && raw & 0x38 == 0 => Some(Self::Descriptor(FdAddress(raw as u32))),
            _ => None,
        }
    }

    /// The address as VMFS-6 writes it. `None` when it does not fit.
    pub fn encode64(self) -> Option<u64> {
        let fits = |value: u64, bits: u32| (value < 1 << bits).then_some(value);
        let tbz_bits = |tbz: bool| if tbz { 0xFF << 7 } else { 0 };
        let cow_bit = |cow: bool| u64::from(cow) << 5;
        match self {
            Self::Hole => Some(0),
            Self::FileBlock { block, tbz, cow } => {
                Some(FB | cow_bit(cow) | tbz_bits(tbz) | fits(block / 512, 31)? << 15 | (block % 512) << 51)
            }
            Self::LargeBlock { block, tbz, cow } => {
                Some(LFB | cow_bit(cow) | tbz_bits(tbz) | fits(block, 31)? << 15)
            }
            Self::SubBlock { cluster, resource, cow } => {
                Some(SB | cow_bit(cow) | fits(cluster, 36)? << 6 | fits(resource.into(), 8)? << 56)
            }
            Self::PointerBlock { cluster, resource, second, cow } => {
                let kind = if second { PB2 } else { PB };
                Some(kind | cow_bit(cow) | fits(cluster, 36)? << 6 | fits(resource.into(), 8)? << 56)
            }
            Self::Descriptor(fd) => Some(fd.0.into()),
        }
    }
}

/// Address of a file descriptor: 32 bits in every version.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct FdAddress(pub u32);

impl FdAddress {
    /// The root directory.
    pub const ROOT: Self = Self::new(0, 0);

    /// Resource `resource` (below 1024) of cluster `cluster` (below 65536) of `.fdc.sf`.
    pub const fn new(cluster: u32, resource: u32) -> Self {
        Self(FD as u32 | (cluster & 0xFFFF) << 6 | (resource & 0x3FF) << 22)
    }

    /// A raw field, if it is the address of a descriptor.
    pub fn decode(raw: u32) -> Option<Self> {
        (raw & 0x3F == FD as u32).then_some(Self(raw))
    }

    /// Cluster in `.fdc.sf`.
    pub const fn cluster(self) -> u32 {
        self.0 >> 6 & 0xFFFF
    }

    /// Resource in the cluster.
    pub const fn resource(self) -> u32 {
        self.0 >> 22
    }
}

impl std::fmt::Display for FdAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FD {:#010x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of genuine volumes.
    #[test]
    fn genuine_addresses_decode_and_encode() {
        let five = [
            (0x141, Address::file_block(5)),
            (0x96E1, Address::FileBlock { block: 603, tbz: true, cow: false }),
            (0x482, Address::sub_block(18, 0)),
            (0x1000_0482, Address::sub_block(18, 1)),
            (0x3_4483, Address::pointer_block(3346, 0)),
            (0x1B40_0104, Address::Descriptor(FdAddress::new(4, 109))),
            (0, Address::Hole),
        ];
        for (raw, address) in five {
            assert_eq!(Address::decode32(raw), Some(address));
            assert_eq!(address.encode32(), Some(raw));
        }
        let six = [
            (0x0040_0000_0000_0001, Address::file_block(8)),
            (0x0608_0000_0001_8001, Address::file_block(3 * 512 + 193)),
            (0x0100_0000_0000_0482, Address::sub_block(18, 1)),
            (0x0140_03C4, Address::Descriptor(FdAddress::new(15, 5))),
        ];
        for (raw, address) in six {
            assert_eq!(Address::decode64(raw), Some(address));
            assert_eq!(address.encode64(), Some(raw));
        }
        assert_eq!(Address::decode32(0x0000_0006), None);
        assert_eq!(FdAddress::decode(0x0040_0005), None);
    }

    #[test]
    fn dense_sub_blocks_round_trip() {
        for resource in 0..64 {
            let address = Address::sub_block(1234, resource);
            assert_eq!(Address::decode32(address.encode32().unwrap()), Some(address));
        }
        assert_eq!(Address::sub_block(0, 64).encode32(), None);
        assert_eq!(Address::file_block(1 << 26).encode32(), None);
    }
}
