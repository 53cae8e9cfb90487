//! The bytes of NBD: constants and fixed structures of the protocol document (NetworkBlockDevice/nbd,
//! `doc/proto.md`), all numbers big-endian. Options of the handshake are parsed in [`options`].

pub mod options;

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// "NBDMAGIC": the first eight bytes of a server.
pub const SERVER_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT": newstyle, and the start of every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Start of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Start of every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Start of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Start of a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Largest request that moves data, in bytes: what is advertised, and what every client may assume.
pub const REQUEST_BYTES_MAX: u32 = 32 << 20;
/// A longer export name or context name is refused, in bytes (section "Handshake phase": strings up to 4096).
pub const NAME_BYTES_MAX: usize = 4096;
/// An option with more data is refused, in bytes. Sixteen queries of the longest name fit.
pub const OPTION_BYTES_MAX: u32 = 64 << 10;
/// An option with more data than this is not even skipped: the connection is closed.
pub const OPTION_BYTES_SKIPPED_MAX: u32 = 1 << 20;

/// Handshake flags of server and client: fixed newstyle.
pub const HANDSHAKE_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flags of server and client: no 124 zeroes after EXPORT_NAME.
pub const HANDSHAKE_NO_ZEROES: u16 = 1 << 1;

/// Numbers of options.
pub mod option {
    #![allow(missing_docs)] // the names of the protocol document
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of replies to options.
pub mod reply {
    #![allow(missing_docs)] // the names of the protocol document
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    /// This bit marks an error.
    pub const ERROR: u32 = 1 << 31;
    pub const ERR_UNSUP: u32 = ERROR + 1;
    pub const ERR_POLICY: u32 = ERROR + 2;
    pub const ERR_INVALID: u32 = ERROR + 3;
    pub const ERR_TLS_REQD: u32 = ERROR + 5;
    pub const ERR_UNKNOWN: u32 = ERROR + 6;
    pub const ERR_SHUTDOWN: u32 = ERROR + 7;
    pub const ERR_TOO_BIG: u32 = ERROR + 9;
}

/// Types of information in replies to INFO and GO.
pub mod info {
    #![allow(missing_docs)] // the names of the protocol document
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags: what an export can do.
pub mod can {
    #![allow(missing_docs)] // the names of the protocol document
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Types of requests.
pub mod command {
    #![allow(missing_docs)] // the names of the protocol document
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of requests.
pub mod flag {
    #![allow(missing_docs)] // the names of the protocol document
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Types and flags of chunks of structured replies.
pub mod chunk {
    #![allow(missing_docs)] // the names of the protocol document
    /// Flag: the last chunk of its reply.
    pub const DONE: u16 = 1 << 0;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    /// This bit marks an error.
    pub const ERROR_BIT: u16 = 1 << 15;
    pub const ERROR: u16 = ERROR_BIT + 1;
    pub const ERROR_OFFSET: u16 = ERROR_BIT + 2;
}

/// `base:allocation`: nothing is allocated here.
pub const STATE_HOLE: u32 = 1 << 0;
/// `base:allocation`: reads as zero.
pub const STATE_ZERO: u32 = 1 << 1;
/// `kagami:changed:SNAP`: written or zeroed since the snapshot.
pub const STATE_CHANGED: u32 = 1 << 0;

/// What the server says first.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Copy, Clone, Debug)]
#[repr(C)]
pub struct Greeting {
    /// [`SERVER_MAGIC`].
    pub magic: U64,
    /// [`OPTION_MAGIC`].
    pub newstyle: U64,
    /// `HANDSHAKE_*`.
    pub flags: U16,
}

/// Before the data of an option.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Copy, Clone, Debug)]
#[repr(C)]
pub struct OptionHeader {
    /// [`OPTION_MAGIC`].
    pub magic: U64,
    /// [`option`].
    pub option: U32,
    /// Bytes of data that follow.
    pub length: U32,
}

/// Before the data of a reply to an option.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Copy, Clone, Debug)]
#[repr(C)]
pub struct OptionReplyHeader {
    /// [`OPTION_REPLY_MAGIC`].
    pub magic: U64,
    /// The option that is answered.
    pub option: U32,
    /// [`reply`].
    pub kind: U32,
    /// Bytes of data that follow.
    pub length: U32,
}

/// Data of an [`info::EXPORT`] reply; without the first field, the answer to EXPORT_NAME.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Copy, Clone, Debug)]
#[repr(C)]
pub struct InfoExport {
    /// [`info::EXPORT`].
    pub kind: U16,
    /// Length of the export in bytes.
    pub bytes: U64,
    /// [`can`].
    pub flags: U16,
}

/// Data of an [`info::BLOCK_SIZE`] reply.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Copy, Clone, Debug)]
#[repr(C)]
pub struct InfoBlockSize {
    /// [`info::BLOCK_SIZE`].
    pub kind: U16,
    /// Every offset and length is a multiple of this, in bytes.
    pub minimum: U32,
    /// Better to use multiples of this, in bytes.
    pub preferred: U32,
    /// No request moves more, in bytes.
    pub maximum: U32,
}

/// A request, before its payload.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Copy, Clone, Debug)]
#[repr(C)]
pub struct RequestHeader {
    /// [`REQUEST_MAGIC`].
    pub magic: U32,
    /// [`flag`].
    pub flags: U16,
    /// [`command`].
    pub kind: U16,
    /// The client's name for the request; it comes back in the reply.
    pub cookie: U64,
    /// First byte.
    pub offset: U64,
    /// Bytes.
    pub length: U32,
}

/// A simple reply, before its payload.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Copy, Clone, Debug)]
#[repr(C)]
pub struct SimpleReply {
    /// [`SIMPLE_REPLY_MAGIC`].
    pub magic: U32,
    /// 0, or one of the protocol's error numbers.
    pub error: U32,
    /// Of the request.
    pub cookie: U64,
}

/// A chunk of a structured reply, before its payload.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Copy, Clone, Debug)]
#[repr(C)]
pub struct ChunkHeader {
    /// [`CHUNK_MAGIC`].
    pub magic: U32,
    /// [`chunk::DONE`].
    pub flags: U16,
    /// [`chunk`].
    pub kind: U16,
    /// Of the request.
    pub cookie: U64,
    /// Bytes of payload.
    pub length: U32,
}

/// A chunk of data, before its bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Copy, Clone, Debug)]
#[repr(C)]
pub struct DataChunk {
    /// Header of kind [`chunk::OFFSET_DATA`].
    pub header: ChunkHeader,
    /// Offset of the first byte on the disk.
    pub offset: U64,
}

/// A chunk that stands for zeroes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Copy, Clone, Debug)]
#[repr(C)]
pub struct HoleChunk {
    /// Header of kind [`chunk::OFFSET_HOLE`].
    pub header: ChunkHeader,
    /// Offset of the first zero on the disk.
    pub offset: U64,
    /// Number of zeroes.
    pub bytes: U32,
}

/// A chunk that tells an error, before its message.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Copy, Clone, Debug)]
#[repr(C)]
pub struct ErrorChunk {
    /// Header of kind [`chunk::ERROR`].
    pub header: ChunkHeader,
    /// Error number, not 0.
    pub error: U32,
    /// Bytes of message.
    pub message_length: U16,
}

/// One extent in a [`chunk::BLOCK_STATUS`] chunk.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Copy, Clone, Debug)]
#[repr(C)]
pub struct Descriptor {
    /// Length in bytes, not 0.
    pub bytes: U32,
    /// Meaning depends on the context.
    pub flags: U32,
}

const _: () = {
    assert!(size_of::<Greeting>() == 18);
    assert!(size_of::<OptionHeader>() == 16);
    assert!(size_of::<OptionReplyHeader>() == 20);
    assert!(size_of::<InfoExport>() == 12);
    assert!(size_of::<InfoBlockSize>() == 14);
    assert!(size_of::<RequestHeader>() == 28);
    assert!(size_of::<SimpleReply>() == 16);
    assert!(size_of::<ChunkHeader>() == 20);
    assert!(size_of::<DataChunk>() == 28);
    assert!(size_of::<HoleChunk>() == 32);
    assert!(size_of::<ErrorChunk>() == 26);
    assert!(size_of::<Descriptor>() == 8);
};

impl ChunkHeader {
    /// A chunk of `length` bytes of payload.
    pub fn new(kind: u16, flags: u16, cookie: U64, length: u32) -> Self {
        Self {
            magic: CHUNK_MAGIC.into(),
            flags: flags.into(),
            kind: kind.into(),
            cookie,
            length: length.into(),
        }
    }
}
