//! Chunks: pieces of content named by their hash.

use std::fmt;

/// The name of a chunk: BLAKE3 of its content.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId(pub [u8; 32]);

impl ChunkId {
    /// Names `content`.
    pub fn of(content: &[u8]) -> Self {
        Self(*blake3::hash(content).as_bytes())
    }

    /// The first eight bytes as a number: uniform, so a sorted table is searched by interpolation.
    pub(crate) fn prefix(&self) -> u64 {
        let mut first = [0; 8];
        first.copy_from_slice(&self.0[..8]);
        u64::from_be_bytes(first)
    }

    /// Reads 64 hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<Self> {
        let digits = text.as_bytes();
        if digits.len() != 64 {
            return None;
        }
        let mut id = [0; 32];
        for (byte, pair) in id.iter_mut().zip(digits.chunks(2)) {
            let (high, low) = ((pair[0] as char).to_digit(16)?, (pair[1] as char).to_digit(16)?);
            *byte = (high * 16 + low) as u8;
        }
        Some(Self(id))
    }
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl serde::Serialize for ChunkId {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for ChunkId {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(from)?;
        Self::from_hex(&text).ok_or_else(|| serde::de::Error::custom("not 64 hexadecimal digits"))
    }
}

/// Where a chunk lies: a frame in a pack, and a range of what the frame unpacks to.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Location {
    /// The pack's id.
    pub pack: u64,
    /// Offset of the frame in the pack, in bytes.
    pub frame_at: u32,
    /// Length of the frame in the pack. Equal to `frame_raw` when it is stored as it is.
    pub frame_stored: u32,
    /// Length of the frame unpacked.
    pub frame_raw: u32,
    /// Offset of the chunk in the unpacked frame.
    pub inside_at: u32,
    /// Length of the chunk.
    pub length: u32,
}
