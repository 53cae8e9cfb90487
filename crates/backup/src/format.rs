//! The bytes of a repository: constants and structures, nothing else. `docs/formats/backup.md` is the text.
//!
//! All numbers are little-endian. Every structure is covered by a checksum: a head by its own CRC32C, a body by the
//! BLAKE3 in its head, a frame by the CRC32C in the pack's table, an index page by its own CRC32C.

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The newest format that this program reads, and the one it writes.
pub const FORMAT: u32 = 1;
/// Feature bits that this program understands (none yet).
pub const KNOWN_FEATURES: u32 = 0;

/// Bytes of a disk that one leaf entry describes; also the largest chunk.
pub const AREA_BYTES: u64 = 64 << 10;
/// The finest piece of an area that has a chunk of its own.
pub const PIECE_BYTES: u64 = 4 << 10;
/// Pieces in an area.
pub const AREA_PIECES: u8 = (AREA_BYTES / PIECE_BYTES) as u8;
/// Entries of a tree node.
pub const FANOUT: usize = 32;
/// Levels of a disk's tree: always the same, so that a disk may grow without moving anything.
pub const LEVELS: u8 = 7;
/// Largest disk a tree can describe, in areas: 32^7, 2 PiB.
pub const MAX_AREAS: u64 = (FANOUT as u64).pow(LEVELS as u32);

/// Raw bytes gathered before a frame is compressed.
pub const FRAME_BYTES: usize = 512 << 10;
/// Largest frame accepted when reading, unpacked or packed.
pub const MAX_FRAME_BYTES: u32 = 1 << 20;
/// A pack is sealed when it has reached this length.
pub const PACK_BYTES: u64 = 64 << 20;
/// Largest pack accepted when reading.
pub const MAX_PACK_BYTES: u64 = 256 << 20;
/// Largest manifest body accepted.
pub const MAX_MANIFEST_BYTES: u64 = 64 << 20;
/// Largest small file (configuration, descriptor) in a backup.
pub const MAX_FILE_BYTES: u64 = 64 << 20;
/// Most disks in a backup.
pub const MAX_DISKS: usize = 1024;
/// Most small files in a backup.
pub const MAX_FILES: usize = 65_536;

/// First bytes of the repository's own file.
pub const REPOSITORY_MAGIC: [u8; 8] = *b"KGMREPO\0";
/// First bytes of a manifest.
pub const MANIFEST_MAGIC: [u8; 8] = *b"KGMMANI\0";
/// First bytes of the record of an attempt that has not ended.
pub const UNFINISHED_MAGIC: [u8; 8] = *b"KGMUNFI\0";
/// First bytes of a pack.
pub const PACK_MAGIC: [u8; 8] = *b"KGMPACK\0";
/// First bytes of an index segment.
pub const INDEX_MAGIC: [u8; 8] = *b"KGMINDX\0";
/// Last structure of a pack.
pub const TRAILER_MAGIC: [u8; 8] = *b"KGMTAIL\0";

/// Begins every file of a repository. 96 bytes.
#[derive(Copy, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Head {
    /// What the file is.
    pub magic: [u8; 8],
    /// [`FORMAT`].
    pub format: U32,
    /// Features that a reader must understand, else refuse.
    pub must_understand: U32,
    /// Features that a reader may ignore.
    pub may_ignore: U32,
    /// CRC32C of this head with this field zero.
    pub crc: U32,
    /// The repository.
    pub repository: [u8; 16],
    /// The file itself: a backup's id, a pack's or segment's number (little-endian, then zeroes), zero else.
    pub own: [u8; 16],
    /// Length of the body that follows, in bytes; zero where other structures describe it (pack, index).
    pub body_bytes: U64,
    /// BLAKE3 of the body (of nothing, where its length is zero).
    pub body_hash: [u8; 32],
}

/// One frame of a pack. 24 bytes.
#[derive(Copy, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FrameEntry {
    /// Offset in the pack.
    pub at: U32,
    /// Length in the pack; equal to `raw` when stored as it is, else smaller and one zstd frame.
    pub stored: U32,
    /// Length unpacked.
    pub raw: U32,
    /// CRC32C of the stored bytes.
    pub crc: U32,
    /// Chunks in it; they follow each other without gaps, in the order of the chunk table.
    pub chunks: U32,
    /// Zero.
    pub spare: U32,
}

/// One chunk of a pack. 36 bytes.
#[derive(Copy, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkEntry {
    /// BLAKE3 of the content.
    pub id: [u8; 32],
    /// Length in bytes.
    pub length: U32,
}

/// Ends a pack, after the frame table and the chunk table. 72 bytes.
#[derive(Copy, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Trailer {
    /// [`TRAILER_MAGIC`].
    pub magic: [u8; 8],
    /// The pack's number, as in its head.
    pub pack: U64,
    /// Offset of the frame table: where the frames end.
    pub tables_at: U64,
    /// Entries of the frame table.
    pub frames: U32,
    /// Entries of the chunk table, which follows it.
    pub chunks: U32,
    /// BLAKE3 of head, frame table and chunk table.
    pub tables_hash: [u8; 32],
    /// CRC32C of this trailer with this field zero.
    pub crc: U32,
    /// Zero.
    pub spare: U32,
}

/// Bytes of an index page.
pub const PAGE_BYTES: usize = 4096;
/// Entries of an index page.
pub const PAGE_ENTRIES: usize = 63;

/// First page of an index segment, after its [`Head`]. The page is filled with zeroes. 40 bytes.
#[derive(Copy, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SegmentHead {
    /// Packs that the segment covers; their numbers follow in pages of [`PACKS_PER_PAGE`], sorted.
    pub packs: U64,
    /// Entries; they follow in pages of [`PAGE_ENTRIES`], sorted by hash.
    pub entries: U64,
    /// CRC32C of this structure with this field zero, begun with the head's CRC.
    pub crc: U32,
    /// Zero.
    pub spare: [u8; 20],
}

/// Pack numbers in a page of a segment's pack list.
pub const PACKS_PER_PAGE: usize = 504;

/// Ends each further page of a segment. 64 bytes.
#[derive(Copy, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PageTail {
    /// The segment's number.
    pub segment: U64,
    /// Number of the page in the file, from 0: finds a misdirected write.
    pub page: U64,
    /// Entries used in this page.
    pub used: U32,
    /// CRC32C of the page with this field zero.
    pub crc: U32,
    /// Zero.
    pub spare: [u8; 40],
}

/// One entry of an index page. 64 bytes.
#[derive(Copy, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IndexEntry {
    /// The chunk.
    pub id: [u8; 32],
    /// The pack's number.
    pub pack: U64,
    /// Offset of the frame in the pack.
    pub frame_at: U32,
    /// Its length there.
    pub frame_stored: U32,
    /// Its length unpacked.
    pub frame_raw: U32,
    /// Offset of the chunk in the unpacked frame.
    pub inside_at: U32,
    /// Length of the chunk.
    pub length: U32,
    /// Zero.
    pub spare: U32,
}

/// Tree entry: reads as zero.
pub const ENTRY_ZERO: u8 = 0;
/// Tree entry: one hash follows. On level 0 the area's content (what the chunk does not reach reads as zero), above
/// it a node.
pub const ENTRY_WHOLE: u8 = 1;
/// Tree entry on level 0: a count and as many [`RunEntry`] follow; together they cover the area.
pub const ENTRY_MIXED: u8 = 2;

/// Some pieces of an area. 36 bytes.
#[derive(Copy, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RunEntry {
    /// How many pieces: 1 to 16.
    pub pieces: u8,
    /// [`ENTRY_ZERO`] or [`ENTRY_WHOLE`].
    pub kind: u8,
    /// First piece within the chunk: 0 to 15. What the chunk does not reach reads as zero.
    pub first: u8,
    /// Zero.
    pub spare: u8,
    /// The chunk; zeroes for zero.
    pub id: [u8; 32],
}

const _: () = assert!(size_of::<Head>() == 96);
const _: () = assert!(offset_of!(Head, body_hash) == 64);
const _: () = assert!(size_of::<FrameEntry>() == 24);
const _: () = assert!(size_of::<ChunkEntry>() == 36);
const _: () = assert!(size_of::<Trailer>() == 72);
const _: () = assert!(size_of::<SegmentHead>() == 40);
const _: () = assert!(size_of::<PageTail>() == 64);
const _: () = assert!(size_of::<IndexEntry>() == 64);
const _: () = assert!(size_of::<RunEntry>() == 36);
const _: () = assert!(PAGE_ENTRIES * size_of::<IndexEntry>() + size_of::<PageTail>() == PAGE_BYTES);
const _: () = assert!(PACKS_PER_PAGE * 8 + size_of::<PageTail>() == PAGE_BYTES);
