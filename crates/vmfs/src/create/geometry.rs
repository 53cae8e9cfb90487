//! How many of everything a fresh VMFS-5 gets, and where it lies.
//!
//! The counts fit all eight genuine VMFS-5 volumes (docs/formats/vmfs.md, "Geometry"); the caps for large volumes are
//! inferred from "every system file has at most 256 blocks when it is made".

use smallvec::SmallVec;

use crate::format::{PE_BYTES_5, ResourceGeometry, SystemFile};

/// Every system file's block list fits its descriptor when it is made.
const SYSTEM_FILE_BLOCKS: u64 = 256;
/// Length of `.vh.sf`: boot area, file system descriptor, heartbeats.
const HEAD_BYTES: u64 = 0x40_0000;
/// File descriptor bytes.
const FD_BYTES: u64 = 2048;
/// Pointer block bytes.
const PB_BYTES: u64 = 4096;

/// As many resources as make the file fit in `room` bytes, at most what `file` has.
fn fit(file: ResourceGeometry, room: u64) -> ResourceGeometry {
    // The length grows with the count, so the largest count that fits is found by halving.
    let (mut low, mut high) = (0, file.count);
    while low < high {
        let count = high - (high - low) / 2;
        if (ResourceGeometry { count, ..file }).file_bytes() <= room { low = count } else { high = count - 1 }
    }
    ResourceGeometry { count: low, ..file }
}

/// How sub-blocks and pointer blocks are measured out.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Tuning {
    /// 16 sub-blocks of 32 KiB in a cluster, as older hosts can read them, instead of 64 of 8 KiB.
    pub large_sub_blocks: bool,
    /// An eighth of the pointer blocks: 32 MiB of metadata instead of 256 MiB. `None`: on volumes below 1.75 GiB,
    /// which the full number would eat up.
    pub resource_optimized: Option<bool>,
}

/// First block and number of blocks of a system file. Only `.fdc.sf` is in two pieces.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Run {
    /// First block.
    pub first: u32,
    /// Number of blocks.
    pub count: u32,
}

/// Everything about a fresh volume that follows from its size.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Bytes of a file block.
    pub block_bytes: u64,
    /// Bytes of a sub-block.
    pub sub_block_bytes: u64,
    /// The reduced number of pointer blocks is used.
    pub resource_optimized: bool,
    /// File blocks.
    pub fbb: ResourceGeometry,
    /// File descriptors.
    pub fdc: ResourceGeometry,
    /// Pointer blocks.
    pub pbc: ResourceGeometry,
    /// Sub-blocks.
    pub sbc: ResourceGeometry,
    /// Second-level pointer blocks.
    pub pb2: ResourceGeometry,
    /// Where the system files lie, by [`SystemFile`] number; `.fdc.sf` is the only one in two pieces.
    pub runs: [SmallVec<[Run; 2]>; 8],
    /// Blocks in use on the fresh volume: 0 up to here.
    pub used_blocks: u32,
}

impl Geometry {
    /// Lays out a volume of `extents` physical extents with blocks of `block_bytes`. `None` when the system files
    /// do not fit or a block number would not fit an address.
    pub fn new(extents: u64, block_bytes: u64, tuning: Tuning) -> Option<Self> {
        let blocks = u32::try_from(extents * (PE_BYTES_5 / block_bytes)).ok().filter(|b| *b < 1 << 26)?;
        let resource_optimized = tuning.resource_optimized.unwrap_or(extents < 7);
        let file = |per_cluster, resource_bytes: u64, count| {
            let resource_bytes = resource_bytes as u32;
            ResourceGeometry { per_cluster, per_group: 64, resource_bytes, count, metadata_bytes: 512 }
        };
        let room = SYSTEM_FILE_BLOCKS * block_bytes;
        let fit = |file| fit(file, room);

        let (sub_block_bytes, sub_blocks_per_cluster) =
            if tuning.large_sub_blocks { (0x8000, 16) } else { (0x2000, 64) };
        let sub_blocks = 4u64.checked_mul(u64::from(blocks))?.min(32000);
        let descriptors = 2 * (u64::from(blocks) + sub_blocks - sub_blocks * sub_block_bytes / block_bytes);
        let fbb = file(200, 0, blocks.into());
        let fdc = fit(file(200, FD_BYTES, descriptors));
        let sbc = fit(file(sub_blocks_per_cluster, sub_block_bytes, sub_blocks));
        let pbc =
            if resource_optimized { file(16, PB_BYTES, 8064) } else { fit(file(16, PB_BYTES, 1 << 20)) };
        let pb2 = file(16, PB_BYTES, 256);

        let mut next = 0;
        let mut take = |bytes: u64| {
            let run = Run { first: next, count: bytes.div_ceil(block_bytes) as u32 };
            next += run.count;
            run
        };
        let vh = take(HEAD_BYTES);
        let fdc_first = take(block_bytes);
        let root = take(block_bytes);
        let fbb_run = take(fbb.file_bytes());
        let fdc_rest = take(fdc.file_bytes().saturating_sub(block_bytes));
        let pbc_run = take(pbc.file_bytes());
        let sbc_run = take(sbc.file_bytes());
        let pb2_run = take(pb2.file_bytes());
        let sdd = take(block_bytes);
        let used_blocks = next;
        if used_blocks >= blocks || u64::from(fbb_run.count) > SYSTEM_FILE_BLOCKS {
            return None;
        }
        let one = |run| SmallVec::from_slice(&[run]);
        let fdc_runs = SmallVec::from_slice(&[fdc_first, fdc_rest]);
        let runs =
            [one(root), one(fbb_run), fdc_runs, one(pbc_run), one(sbc_run), one(vh), one(pb2_run), one(sdd)];
        Some(Self {
            block_bytes,
            sub_block_bytes,
            resource_optimized,
            fbb,
            fdc,
            pbc,
            sbc,
            pb2,
            runs,
            used_blocks,
        })
    }

    /// The resource file of that number, if it is one.
    pub fn resources(&self, file: SystemFile) -> Option<ResourceGeometry> {
        match file {
            SystemFile::FileBlocks => Some(self.fbb),
            SystemFile::Descriptors => Some(self.fdc),
            SystemFile::PointerBlocks => Some(self.pbc),
            SystemFile::SubBlocks => Some(self.sbc),
            SystemFile::PointerBlocks2 => Some(self.pb2),
            _ => None,
        }
    }

    /// Block numbers of a system file, in order.
    pub fn blocks(&self, file: SystemFile) -> impl Iterator<Item = u32> + '_ {
        self.runs[file as usize].iter().flat_map(|run| run.first..run.first + run.count)
    }

    /// Volume offset of a system file's byte; the byte must be inside of its blocks.
    pub fn place(&self, file: SystemFile, offset: u64) -> u64 {
        let mut left = offset;
        for run in &self.runs[file as usize] {
            let bytes = u64::from(run.count) * self.block_bytes;
            if left < bytes {
                return u64::from(run.first) * self.block_bytes + left;
            }
            left -= bytes;
        }
        unreachable!("byte {offset} is behind the end of {}", file.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn counts_are_those_of_genuine_volumes() {
        let counts = |extents, block_bytes, tuning| {
            let g = Geometry::new(extents, block_bytes, tuning).unwrap();
            (g.fbb.count, g.sbc.count, g.fdc.count, g.pbc.count)
        };
        let full = Tuning::default();
        assert_eq!(counts(8, MIB, full), (2048, 8192, 20352, 64512)); // vmfs5
        assert_eq!(counts(7, MIB, full), (1792, 7168, 17808, 64512)); // zero5
        let large = Tuning { large_sub_blocks: true, ..full };
        assert_eq!(counts(8, MIB / 2, large), (4096, 4086, 38912, 32240)); // vmfs5-no-dense-sbpc
        let optimized = Tuning { resource_optimized: Some(true), ..full };
        let (fbb, _, fdc, pbc) = counts(8, MIB / 2, optimized);
        assert_eq!((fbb, fdc, pbc), (4096, 40448, 8064)); // vmfs5-resource-optimized
    }

    #[test]
    fn the_layout_is_that_of_a_genuine_volume() {
        let g = Geometry::new(8, MIB, Tuning::default()).unwrap();
        let run = |first, count| Run { first, count };
        let runs = |file: SystemFile| g.runs[file as usize].to_vec();
        assert_eq!(runs(SystemFile::VolumeHeader), [run(0, 4)]);
        assert_eq!(runs(SystemFile::Descriptors), [run(4, 1), run(7, 39)]);
        assert_eq!(
            (runs(SystemFile::Root), runs(SystemFile::FileBlocks)),
            (vec![run(5, 1)], vec![run(6, 1)])
        );
        assert_eq!(runs(SystemFile::PointerBlocks), [run(46, 256)]);
        assert_eq!(runs(SystemFile::SubBlocks), [run(302, 65)]);
        assert_eq!(runs(SystemFile::PointerBlocks2), [run(367, 2)]);
        assert_eq!((runs(SystemFile::SystemData), g.used_blocks), (vec![run(369, 1)], 370));
        assert_eq!(g.pbc.file_bytes(), 0x1000_0000);
        assert_eq!(g.sbc.group_bytes(), 0x201_0000);
    }

    #[test]
    fn every_size_from_768_mib_to_16_tib_fits() {
        for extents in [2, 3, 4, 6, 7, 8, 255, 10_000, 65_535] {
            for block_bytes in [MIB / 2, MIB] {
                let Some(g) = Geometry::new(extents, block_bytes, Tuning::default()) else {
                    assert!(block_bytes < MIB && extents > 60_000, "{extents} extents of {block_bytes}");
                    continue;
                };
                for file in [g.fbb, g.fdc, g.pbc, g.sbc, g.pb2] {
                    assert!(file.file_bytes() <= 256 * block_bytes && file.count > 0);
                }
            }
        }
        let g = Geometry::new(65_535, MIB, Tuning::default()).unwrap();
        assert_eq!(g.fdc.count, 130_688); // the published limit is about 130,690 files
        assert_eq!(Geometry::new(0, MIB, Tuning::default()), None);
        assert_eq!(Geometry::new(1 << 40, MIB, Tuning::default()), None);
    }
}
