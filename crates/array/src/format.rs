//! The bytes of a pool (docs/formats/pool.md). Raw structures in, checked values out.
//!
//! Numbers are little endian. A **grain** is 64 KiB, a **page** 4 KiB. Grain numbers run over all media of a pool;
//! grain 0 lies under the head of medium 0 and stands for "none".

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes in a grain.
pub const GRAIN_BYTES: u64 = 64 << 10;
/// Sectors in a grain.
pub const GRAIN_SECTORS: u64 = GRAIN_BYTES / block::SECTOR_BYTES;
/// 4 KiB blocks in a grain.
pub const GRAIN_BLOCKS: usize = (GRAIN_BYTES / block::BLOCK_BYTES) as usize;
/// Bytes in a page of a map or bitmap.
pub const PAGE_BYTES: usize = 4096;
/// A page and its twin: written in turn, the newer valid one counts.
pub const PAIR_BYTES: u64 = 2 * PAGE_BYTES as u64;
/// Page pairs in a grain.
pub const GRAIN_PAIRS: u64 = GRAIN_BYTES / PAIR_BYTES;
/// Entries in a page: fan-out of a layer's map.
pub const PAGE_ENTRIES: usize = (PAGE_BYTES - size_of::<PageHeader>()) / 8;
/// Grains that one bitmap page covers.
pub const BITMAP_GRAINS: u64 = PAGE_ENTRIES as u64 * 64;
/// Format written; the newest one this program opens.
pub const FORMAT_VERSION: u32 = 1;
/// Most media in one pool.
pub const MOST_MEDIA: usize = 60;
/// Largest LUN in sectors: 64 TiB.
pub const MOST_LUN_SECTORS: u64 = 64 << 40 >> 9;
/// Where the two head slots of a medium are, in bytes.
pub const HEAD_AT: [u64; 2] = [0, 32 << 10];

const HEAD_MAGIC: [u8; 8] = *b"KAGAMIPL";
const PAGE_MAGIC: u32 = 0x504d_474b;
const RECORD_MAGIC: u32 = 0x4a4d_474b;

/// What is wrong with bytes that should be ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} at byte {at} of medium {medium}: found {found}, expected {expected}")]
pub struct Corrupt {
    /// The structure or field.
    pub what: &'static str,
    /// Number of the medium in its pool.
    pub medium: usize,
    /// Byte offset on the medium.
    pub at: u64,
    /// What was read.
    pub found: u64,
    /// What would be right (a bound, when a range is).
    pub expected: u64,
}

/// One medium in the table of its pool.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub struct RawMedium {
    /// Identity of the medium.
    pub uuid: [u8; 16],
    /// Its first grain in the pool's numbering.
    pub first_grain: U64,
    /// Grains on it.
    pub grains: U64,
    /// Local grain where its bitmap pages begin.
    pub bitmap_grain: U64,
    /// Grains at its start that hold head, journal, catalog and bitmap.
    pub reserved_grains: U64,
    spare: [u8; 8],
}

/// The head of a medium: one 4 KiB slot. Medium 0's newest head is where opening begins.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone)]
#[repr(C)]
pub struct Head {
    magic: [u8; 8],
    version: U32,
    crc: U32,
    /// Feature bits that a program must know to open the pool.
    pub must_understand: U64,
    /// Feature bits that may be ignored.
    pub may_ignore: U64,
    /// Identity of the pool.
    pub pool: [u8; 16],
    /// Rises with every head written.
    pub sequence: U64,
    /// Number of this medium in the table.
    pub medium: U32,
    /// Number of media.
    pub media: U32,
    /// First byte of the journal on medium 0.
    pub journal_at: U64,
    /// Its length in bytes.
    pub journal_bytes: U64,
    /// Where in it replay begins, in bytes from its start.
    pub journal_start: U64,
    /// Sequence number of the first record to replay.
    pub journal_sequence: U64,
    /// First byte of the two catalog areas on medium 0.
    pub catalog_at: [U64; 2],
    /// Length of each area in bytes.
    pub catalog_bytes: U64,
    /// The area that counts.
    pub catalog_slot: U32,
    /// CRC32C of the catalog.
    pub catalog_crc: U32,
    /// Its length in bytes.
    pub catalog_length: U64,
    /// Next id of a LUN, layer or snapshot.
    pub next_id: U64,
    /// Grains in use as of the checkpoint.
    pub used_grains: U64,
    /// Where the search for free grains goes on: a hint, any value will do.
    pub search_from: U64,
    spare: [u8; 72],
    /// The media.
    pub table: [RawMedium; MOST_MEDIA],
    tail: [u8; HEAD_TAIL],
}

const HEAD_FIXED: usize = 232 + MOST_MEDIA * size_of::<RawMedium>();
const HEAD_TAIL: usize = PAGE_BYTES - HEAD_FIXED;
const _: () = assert!(size_of::<RawMedium>() == 56);
const _: () = assert!(size_of::<Head>() == PAGE_BYTES);
const _: () = assert!(std::mem::offset_of!(Head, table) == 232);

impl RawMedium {
    /// A row of the table.
    pub fn new(
        uuid: [u8; 16],
        first_grain: u64,
        grains: u64,
        bitmap_grain: u64,
        reserved_grains: u64,
    ) -> Self {
        Self {
            uuid,
            first_grain: first_grain.into(),
            grains: grains.into(),
            bitmap_grain: bitmap_grain.into(),
            reserved_grains: reserved_grains.into(),
            spare: [0; 8],
        }
    }
}

impl Head {
    /// All zero, with magic and version.
    pub fn blank() -> Self {
        let mut head = Self::new_zeroed_here();
        head.magic = HEAD_MAGIC;
        head.version = U32::new(FORMAT_VERSION);
        head
    }

    fn new_zeroed_here() -> Self {
        <Self as zerocopy::FromZeros>::new_zeroed()
    }

    /// Puts the checksum in.
    pub fn seal(&mut self) {
        self.crc = U32::ZERO;
        self.crc = U32::new(crc32c::crc32c(self.as_bytes()));
    }

    /// The bytes are a head, whole and unchanged. `Ok(None)`: not one (torn, foreign, never written).
    /// A head of a newer format is an error that names its version.
    pub fn check(bytes: &[u8]) -> Result<Option<Self>, u32> {
        let Ok(head) = Self::read_from_bytes(bytes) else { return Ok(None) };
        let mut copy = head.clone();
        copy.crc = U32::ZERO;
        if head.magic != HEAD_MAGIC || crc32c::crc32c(copy.as_bytes()) != head.crc.get() {
            return Ok(None);
        }
        if head.version.get() > FORMAT_VERSION {
            return Err(head.version.get());
        }
        Ok((head.media.get() as usize <= MOST_MEDIA && head.media.get() > 0).then_some(head))
    }

    /// Sets the version, for tests of newer formats.
    #[doc(hidden)]
    pub fn set_version(&mut self, version: u32) {
        self.version = U32::new(version);
    }
}

/// First 64 bytes of a page.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub struct PageHeader {
    magic: U32,
    crc: U32,
    /// The layer whose map this is; for a bitmap [`BITMAP_TREE`] with the number of the medium.
    pub tree: U64,
    /// Position within the level.
    pub index: U64,
    /// 0 for leaves and bitmaps.
    pub level: U32,
    spare: U32,
    /// Own address: pair number.
    pub address: U64,
    /// Higher is newer.
    pub generation: U64,
    spare2: [u8; 16],
}

/// Marks the tree id of bitmap pages.
pub const BITMAP_TREE: u64 = 1 << 63;

const _: () = assert!(size_of::<PageHeader>() == 64);

/// Which page of which tree.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct PageKey {
    /// Layer id or [`BITMAP_TREE`] with the medium's number.
    pub tree: u64,
    /// 0 for leaves.
    pub level: u32,
    /// Position within the level.
    pub index: u64,
}

/// Turns entries into the bytes of a page.
pub fn encode_page(
    key: PageKey,
    address: u64,
    generation: u64,
    entries: &[u64; PAGE_ENTRIES],
    out: &mut [u8],
) {
    let (head, body) = out.split_at_mut(size_of::<PageHeader>());
    for (bytes, entry) in body.as_chunks_mut::<8>().0.iter_mut().zip(entries) {
        *bytes = entry.to_le_bytes();
    }
    let mut header = PageHeader {
        magic: U32::new(PAGE_MAGIC),
        crc: U32::ZERO,
        tree: U64::new(key.tree),
        index: U64::new(key.index),
        level: U32::new(key.level),
        spare: U32::ZERO,
        address: U64::new(address),
        generation: U64::new(generation),
        spare2: [0; 16],
    };
    let crc = crc32c::crc32c_append(crc32c::crc32c(header.as_bytes()), body);
    header.crc = U32::new(crc);
    head.copy_from_slice(header.as_bytes());
}

/// Reads one slot of a pair; `None` when it does not hold this page.
pub fn decode_page(key: PageKey, address: u64, bytes: &[u8]) -> Option<(u64, Box<[u64; PAGE_ENTRIES]>)> {
    let (head, body) = bytes.split_at_checked(size_of::<PageHeader>())?;
    let header = PageHeader::read_from_bytes(head).ok()?;
    let mut copy = header;
    copy.crc = U32::ZERO;
    let crc = crc32c::crc32c_append(crc32c::crc32c(copy.as_bytes()), body);
    let same = header.magic.get() == PAGE_MAGIC
        && header.tree.get() == key.tree
        && header.index.get() == key.index
        && header.level.get() == key.level
        && header.address.get() == address
        && header.generation.get() < 1 << 62;
    if !same || crc != header.crc.get() || body.len() != PAGE_ENTRIES * 8 {
        return None;
    }
    let mut entries = Box::new([0; PAGE_ENTRIES]);
    for (entry, bytes) in entries.iter_mut().zip(body.as_chunks::<8>().0) {
        *entry = u64::from_le_bytes(*bytes);
    }
    Some((header.generation.get(), entries))
}

/// First 64 bytes of a journal record; the operations follow, padded to whole pages.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub struct RecordHeader {
    magic: U32,
    crc: U32,
    pool: [u8; 16],
    sequence: U64,
    length: U32,
    spare: [u8; 28],
}

/// Length of [`RecordHeader`].
pub const RECORD_HEADER: usize = size_of::<RecordHeader>();
const _: () = assert!(RECORD_HEADER == 64);

/// Fills in the header of a record whose operations already stand behind the header's place; the rest is padding.
pub fn seal_record(pool: [u8; 16], sequence: u64, length: usize, record: &mut [u8]) {
    let mut header = RecordHeader {
        magic: U32::new(RECORD_MAGIC),
        crc: U32::ZERO,
        pool,
        sequence: U64::new(sequence),
        length: U32::new(length as u32),
        spare: [0; 28],
    };
    let crc = crc32c::crc32c_append(
        crc32c::crc32c(header.as_bytes()),
        &record[RECORD_HEADER..RECORD_HEADER + length],
    );
    header.crc = U32::new(crc);
    record[..RECORD_HEADER].copy_from_slice(header.as_bytes());
}

/// The length of the operations if these 64 bytes may begin the record with this number. The checksum is checked
/// by [`record_is_whole`] once all of it is there.
pub fn record_length(pool: [u8; 16], sequence: u64, head: &[u8], most: u64) -> Option<usize> {
    let header = RecordHeader::read_from_bytes(head.get(..RECORD_HEADER)?).ok()?;
    let length = header.length.get() as usize;
    (header.magic.get() == RECORD_MAGIC
        && header.pool == pool
        && header.sequence.get() == sequence
        && (length + RECORD_HEADER) as u64 <= most)
        .then_some(length)
}

/// The record's checksum is right.
pub fn record_is_whole(record: &[u8]) -> bool {
    let Some((head, rest)) = record.split_at_checked(RECORD_HEADER) else { return false };
    let Ok(mut header) = RecordHeader::read_from_bytes(head) else { return false };
    let (crc, length) = (header.crc.get(), header.length.get() as usize);
    header.crc = U32::ZERO;
    rest.get(..length).is_some_and(|ops| crc32c::crc32c_append(crc32c::crc32c(header.as_bytes()), ops) == crc)
}

/// One entry of a leaf: where a grain of a LUN lies, and what this layer knows of each of its blocks.
#[derive(Copy, Clone, PartialEq, Eq, Default)]
pub struct Entry(pub u64);

/// What a layer knows of one 4 KiB block.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Mark {
    /// Nothing: what lies below counts.
    Below = 0,
    /// Written in this layer: a change.
    Written = 1,
    /// Zeroed or unmapped in this layer: a change; hides what lies below.
    Zeroed = 2,
    /// Brought here by a merge or squash: no change.
    Copied = 3,
}

impl Entry {
    /// The grain that holds written and copied blocks; 0: none.
    #[inline]
    pub fn grain(self) -> u32 {
        self.0 as u32
    }

    /// What is known of a block (0..16).
    #[inline]
    pub fn mark(self, block: usize) -> Mark {
        match (self.0 >> (32 + 2 * block)) & 3 {
            0 => Mark::Below,
            1 => Mark::Written,
            2 => Mark::Zeroed,
            _ => Mark::Copied,
        }
    }

    /// The same with another grain.
    #[inline]
    pub fn with_grain(self, grain: u32) -> Self {
        Self(self.0 & !0xffff_ffff | u64::from(grain))
    }

    /// The same with another mark.
    #[inline]
    pub fn with_mark(self, block: usize, mark: Mark) -> Self {
        let shift = 32 + 2 * block;
        Self(self.0 & !(3 << shift) | (mark as u64) << shift)
    }

    /// No block is held in the grain (all below or zeroed).
    pub fn holds_nothing(self) -> bool {
        (0..GRAIN_BLOCKS).all(|b| !self.mark(b).in_grain())
    }

    /// All sixteen blocks carry this mark.
    #[inline]
    pub fn all(self, mark: Mark) -> bool {
        (self.0 >> 32) as u32 == (mark as u32) * 0x5555_5555
    }
}

impl Mark {
    /// The layer's grain holds the content.
    #[inline]
    pub fn in_grain(self) -> bool {
        matches!(self, Self::Written | Self::Copied)
    }

    /// Counts as a change since the layer began.
    #[inline]
    pub fn changed(self) -> bool {
        matches!(self, Self::Written | Self::Zeroed)
    }
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let marks: String = (0..GRAIN_BLOCKS).map(|b| [".", "w", "0", "c"][self.mark(b) as usize]).collect();
        write!(f, "grain {} {marks}", self.grain())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_and_pages_survive_the_way_out_and_back() {
        let entry =
            Entry::default().with_grain(0xdead_beef).with_mark(0, Mark::Written).with_mark(15, Mark::Copied);
        assert_eq!(
            (entry.grain(), entry.mark(0), entry.mark(1), entry.mark(15)),
            (0xdead_beef, Mark::Written, Mark::Below, Mark::Copied)
        );
        assert!(entry.with_mark(0, Mark::Zeroed).with_mark(15, Mark::Below).holds_nothing());
        let key = PageKey { tree: 7, level: 1, index: 9 };
        let mut entries = [0; PAGE_ENTRIES];
        entries[503] = entry.0;
        let mut bytes = vec![0; PAGE_BYTES];
        encode_page(key, 88, 5, &entries, &mut bytes);
        let (generation, back) = decode_page(key, 88, &bytes).unwrap();
        assert_eq!((generation, *back), (5, entries));
        assert!(decode_page(key, 89, &bytes).is_none(), "a page at another address is not this page");
        assert!(decode_page(PageKey { tree: 8, ..key }, 88, &bytes).is_none());
        bytes[100] ^= 1;
        assert!(decode_page(key, 88, &bytes).is_none());
    }

    #[test]
    fn a_torn_or_newer_head_is_not_opened() {
        let mut head = Head::blank();
        head.media = U32::new(1);
        head.seal();
        assert!(Head::check(head.as_bytes()).unwrap().is_some());
        let mut torn = head.as_bytes().to_vec();
        torn[4000] ^= 1;
        assert!(Head::check(&torn).unwrap().is_none());
        head.set_version(9);
        head.seal();
        assert_eq!(Head::check(head.as_bytes()).err(), Some(9));
    }
}
