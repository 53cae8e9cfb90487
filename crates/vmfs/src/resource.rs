//! Resource files as the volume uses them: geometry, and where each byte of the file lies in the volume.

use crate::format::{Address, Corrupt, Expected, FdAddress, LockKind, ResourceGeometry, VmfsUuid, ensure};

/// Sizes that everything else is computed from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    /// VMFS version: 3, 5 or 6.
    pub version: u8,
    /// File block.
    pub block: u64,
    /// Sub-block.
    pub sub_block: u64,
    /// Pointer block.
    pub pointer_block: u64,
    /// Metadata block: 512, VMFS-6: 4096.
    pub metadata: u64,
    /// Whole volume.
    pub volume: u64,
}

impl Sizes {
    /// Index into the pairs of `format::fd_layout`.
    pub fn layout(&self) -> usize {
        usize::from(self.version == 6)
    }

    /// Bytes of an address in a block array or pointer block.
    pub fn slot(&self) -> usize {
        if self.version == 6 { 8 } else { 4 }
    }

    /// Addresses in a pointer block.
    pub fn slots_per_pointer_block(&self) -> u64 {
        self.pointer_block / self.slot() as u64
    }

    /// Decodes the address at the start of `bytes`, which lies at volume offset `at`.
    pub fn decode(&self, bytes: &[u8], at: u64) -> Result<Address, Corrupt> {
        let (found, address) = if self.version == 6 {
            let raw = bytes.first_chunk().map(|b| u64::from_le_bytes(*b)).unwrap_or(0);
            (raw, Address::decode64(raw))
        } else {
            let raw = bytes.first_chunk().map(|b| u32::from_le_bytes(*b)).unwrap_or(0);
            (raw.into(), Address::decode32(raw))
        };
        let expected = Expected::Words("an address of a known type");
        address.ok_or(Corrupt { what: "block address", at, found, expected })
    }
}

/// A piece of a file that is contiguous in the volume.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// Offset in the file.
    file: u64,
    /// Length.
    bytes: u64,
    /// Offset in the volume.
    volume: u64,
}

/// Where the bytes of a system file lie. System files have no holes in what is used of them.
#[derive(Debug, Default)]
pub(crate) struct BlockMap {
    runs: Vec<Run>,
}

impl BlockMap {
    /// Appends what follows in the file order.
    pub fn push(&mut self, file: u64, bytes: u64, volume: u64) {
        match self.runs.last_mut() {
            Some(last) if last.file + last.bytes == file && last.volume + last.bytes == volume => {
                last.bytes += bytes;
            }
            _ => self.runs.push(Run { file, bytes, volume }),
        }
    }

    /// Volume offset of file offset `at`, and how many bytes follow contiguously.
    pub fn find(&self, at: u64) -> Option<(u64, u64)> {
        let found = self.runs.partition_point(|r| r.file <= at);
        let run = self.runs.get(found.checked_sub(1)?)?;
        let inside = at - run.file;
        (inside < run.bytes).then(|| (run.volume + inside, run.bytes - inside))
    }

    /// Volume offset of `bytes` bytes at file offset `at`, when they are contiguous.
    pub fn span(&self, at: u64, bytes: u64) -> Option<u64> {
        self.find(at).filter(|(_, room)| *room >= bytes).map(|(volume, _)| volume)
    }
}

/// One of `.fbb.sf`, `.fdc.sf`, `.pbc.sf`, `.sbc.sf`, `.pb2.sf`.
#[derive(Debug)]
pub(crate) struct ResourceFile {
    /// What its cluster locks protect.
    pub kind: LockKind,
    /// Its shape.
    pub geometry: ResourceGeometry,
    /// Where it lies.
    pub map: BlockMap,
}

impl ResourceFile {
    /// Volume offset of a resource.
    pub fn resource(&self, cluster: u64, resource: u32, at: u64) -> Result<u64, Corrupt> {
        let bytes = self.geometry.resource_bytes.into();
        let found = cluster << 16 | u64::from(resource);
        let expected = Expected::Words("a resource that exists");
        self.geometry
            .resource_offset(cluster, resource)
            .and_then(|file| self.map.span(file, bytes))
            .ok_or(Corrupt { what: "cluster and resource of an address", at, found, expected })
    }

    /// Volume offset of a cluster header (lock block, then metadata block).
    pub fn header(&self, cluster: u64) -> Result<u64, Corrupt> {
        let bytes = 2 * u64::from(self.geometry.metadata_bytes);
        let expected = Expected::Words("a cluster that exists");
        self.geometry.header_offset(cluster).and_then(|file| self.map.span(file, bytes)).ok_or(Corrupt {
            what: "cluster of a resource file",
            at: 0,
            found: cluster,
            expected,
        })
    }
}

/// All resource files. While the volume opens some are not there yet.
#[derive(Debug)]
pub(crate) struct Files {
    pub sizes: Sizes,
    pub file_blocks: Option<ResourceFile>,
    pub descriptors: Option<ResourceFile>,
    pub pointer_blocks: Option<ResourceFile>,
    pub sub_blocks: Option<ResourceFile>,
    pub pointer_blocks2: Option<ResourceFile>,
}

/// Log2 of the bytes of a large file block: 512 small ones of 1 MiB.
const LARGE_BLOCK_SHIFT: u32 = 29;

impl Files {
    /// Volume offset of what `address` names; `at` is where the address was found. `inside` is the offset in the
    /// file, which decides the place in a large block.
    pub fn resolve(&self, address: Address, inside: u64, at: u64) -> Result<u64, Corrupt> {
        let missing = |what| Corrupt { what, at, found: 0, expected: Expected::Words("a file that exists") };
        match address {
            Address::Hole => Err(missing("address of nothing")),
            Address::FileBlock { block, .. } => {
                let end = block.checked_add(1).and_then(|b| b.checked_mul(self.sizes.block));
                ensure(
                    end.is_some_and(|end| end <= self.sizes.volume),
                    "file block on the volume",
                    at,
                    block,
                    Expected::AtMost(self.sizes.volume / self.sizes.block),
                )?;
                Ok(block * self.sizes.block)
            }
            Address::LargeBlock { block, .. } => {
                let inside = inside & ((1 << LARGE_BLOCK_SHIFT) - 1);
                let start = (block << LARGE_BLOCK_SHIFT) + inside;
                let limit = self.sizes.volume.saturating_sub(self.sizes.block);
                ensure(start <= limit, "large block on the volume", at, block, Expected::AtMost(limit))?;
                Ok(start)
            }
            Address::SubBlock { cluster, resource, .. } => {
                let file = self.sub_blocks.as_ref().ok_or(missing(".sbc.sf"))?;
                file.resource(cluster, resource, at)
            }
            Address::PointerBlock { cluster, resource, second, .. } => {
                let file = if second { &self.pointer_blocks2 } else { &self.pointer_blocks };
                file.as_ref().ok_or(missing("file of pointer blocks"))?.resource(cluster, resource, at)
            }
            Address::Descriptor(fd) => self.descriptor(fd, at),
        }
    }

    /// Volume offset of an FD; `at` is where its address was found.
    pub fn descriptor(&self, fd: FdAddress, at: u64) -> Result<u64, Corrupt> {
        let expected = Expected::Words("a file that exists");
        let missing = Corrupt { what: ".fdc.sf", at, found: 0, expected };
        let file = self.descriptors.as_ref().ok_or(missing)?;
        file.resource(fd.cluster().into(), fd.resource(), at)
    }

    /// Volume offset of a pointer block, which may also be a sub-block (VMFS-6).
    pub fn pointer_block(&self, address: Address, at: u64) -> Result<u64, Corrupt> {
        let fits = match address {
            Address::PointerBlock { .. } => true,
            Address::SubBlock { .. } => self.sizes.sub_block == self.sizes.pointer_block,
            _ => false,
        };
        ensure(fits, "address of a pointer block", at, 0, Expected::Words("a pointer block"))?;
        self.resolve(address, 0, at)
    }
}

/// What a volume is.
#[derive(Clone, Debug)]
pub struct VolumeInfo {
    /// VMFS version: 3, 5 or 6.
    pub version: u8,
    /// Version as the descriptor has it, e.g. (14, 81).
    pub fs_version: (u32, u8),
    /// Identity of the file system.
    pub uuid: VmfsUuid,
    /// Label.
    pub label: String,
    /// For one host (VMFS-L).
    pub local: bool,
    /// Length of the volume (bytes).
    pub volume_bytes: u64,
    /// File block (bytes).
    pub block_bytes: u64,
    /// Number of file blocks.
    pub blocks: u64,
    /// Sub-block (bytes).
    pub sub_block_bytes: u64,
    /// Pointer block (bytes).
    pub pointer_block_bytes: u64,
    /// Creation, seconds since 1970.
    pub created_s: u32,
    /// Config flags of the descriptor.
    pub config: u32,
}
