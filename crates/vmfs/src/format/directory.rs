//! Directory entries: linear in VMFS-3 and 5, hashed in VMFS-6.

use super::FdAddress;
use std::mem::{offset_of, size_of};
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of an entry of VMFS-3 and 5.
pub const DIR_ENTRY_BYTES: u64 = 140;
/// Longest name (bytes of UTF-8).
pub const DIR_NAME_MAX: usize = 127;

/// A name that may stand in a directory: 1 to 127 bytes, no `/`, no NUL, not `.` or `..`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EntryName(String);

impl EntryName {
    /// Checks `name`; `None` when it cannot be a name.
    pub fn new(name: &str) -> Option<Self> {
        let fine = !name.is_empty()
            && name.len() <= DIR_NAME_MAX
            && name != "."
            && name != ".."
            && !name.contains(['/', '\0']);
        fine.then(|| Self(name.to_string()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Entry of a directory of VMFS-3 and 5.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DirEntry5 {
    /// Type, as in the FD.
    pub kind: U32,
    /// FD address; 0 is a gap to skip.
    pub fd: U32,
    /// Generation of the FD.
    pub generation: U32,
    /// Name, NUL-padded.
    pub name: [u8; 128],
}
const _: () = assert!(size_of::<DirEntry5>() == DIR_ENTRY_BYTES as usize);
const _: () = assert!(offset_of!(DirEntry5, name) == 12);

impl DirEntry5 {
    /// An entry; names longer than 127 bytes are cut.
    pub fn new(kind: u32, fd: FdAddress, generation: u32, name: &str) -> Self {
        let mut field = [0; 128];
        let bytes = &name.as_bytes()[..name.len().min(DIR_NAME_MAX)];
        field[..bytes.len()].copy_from_slice(bytes);
        Self { kind: kind.into(), fd: fd.0.into(), generation: generation.into(), name: field }
    }

    /// The bytes of the name, up to the first NUL.
    pub fn name_bytes(&self) -> &[u8] {
        let end = self.name.iter().position(|b| *b == 0).unwrap_or(self.name.len());
        &self.name[..end]
    }
}

/// Directories of VMFS-6: a header of 64 KiB, then blocks of 4 KiB.
pub mod directory6 {
    use std::mem::{offset_of, size_of};
    use zerocopy::little_endian::{U16, U32, U64};
    use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

    /// Value of [`Header::version`].
    pub const VERSION: u32 = 0x00F5_0001;
    /// Bytes of the header with its hash table.
    pub const HEADER_BYTES: u64 = 0x1_0000;
    /// Bytes of a block.
    pub const BLOCK_BYTES: u64 = 0x1000;
    /// Bytes of the head of a block.
    pub const BLOCK_HEAD_BYTES: u64 = 64;
    /// Offset of the hash table in the header.
    pub const TABLE_OFFSET: u64 = 0x5F8;
    /// Slots of the hash table.
    pub const TABLE_SLOTS: usize = 16001;
    /// Hash modulus of the root directory; what lies above belongs to system files.
    pub const ROOT_MODULUS: u64 = 15973;
    /// Entries in a block.
    pub const ENTRIES_PER_BLOCK: u64 = 14;
    /// Link groups in a block.
    pub const GROUPS_PER_BLOCK: u64 = 48;

    /// Head of the directory; "." and ".." and the hash table follow.
    #[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
    #[repr(C)]
    pub struct Header {
        /// [`VERSION`].
        pub version: U32,
        /// Entries, "." and ".." included.
        pub entries: U32,
        /// Allocated entries.
        pub allocated: U32,
        /// Allocation map blocks.
        pub map_blocks: U32,
        /// Their numbers.
        pub maps: [U32; 128],
        /// Unknown.
        pub spare_210: [u8; 408],
        /// Checksum, 0.
        pub checksum: U64,
        /// Generation, 0.
        pub generation: U64,
        /// ".".
        pub dot: Entry,
        /// "..".
        pub dotdot: Entry,
    }
    const _: () = assert!(offset_of!(Header, checksum) == 0x3A8);
    const _: () = assert!(offset_of!(Header, dot) == 0x3B8);
    const _: () = assert!(offset_of!(Header, dotdot) == 0x4D8);
    const _: () = assert!(size_of::<Header>() == TABLE_OFFSET as usize);

    /// Entry.
    #[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
    #[repr(C)]
    pub struct Entry {
        /// Type, as in the FD.
        pub kind: U32,
        /// FD address.
        pub fd: U32,
        /// Generation of the FD.
        pub generation: U32,
        /// Bits 0 to 15 of the name's hash.
        pub hash_low: U16,
        /// Bits 16 to 31 of the name's hash.
        pub hash_high: U16,
        /// Own byte offset in the directory.
        pub offset: U64,
        /// Name, NUL-padded.
        pub name: [u8; 256],
        /// Zero.
        pub spare: U64,
    }
    const _: () = assert!(size_of::<Entry>() == 288);

    /// Head of a block.
    #[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
    #[repr(C)]
    pub struct BlockHead {
        /// 1.
        pub version: U16,
        /// 1 entries, 2 link groups, 3 allocation map.
        pub kind: U16,
        /// Slots.
        pub slots: U16,
        /// Free slots.
        pub free: U16,
        /// One bit each, 1 = free.
        pub bitmap: [u8; 56],
    }
    const _: () = assert!(size_of::<BlockHead>() == BLOCK_HEAD_BYTES as usize);

    /// Group of entries whose hashes meet in one slot of the table.
    #[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
    #[repr(C)]
    pub struct LinkGroup {
        /// Slot of the table.
        pub table_index: U16,
        /// Links.
        pub total: u8,
        /// Free ones.
        pub free: u8,
        /// Next free one.
        pub next_free: u8,
        /// Zero.
        pub spare: u8,
        /// The links.
        pub links: [Link; 12],
        /// Location of the next group, 0 none.
        pub next: U32,
        /// Zero.
        pub spare2: U16,
    }
    const _: () = assert!(size_of::<LinkGroup>() == 84);

    /// One link.
    #[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
    #[repr(C)]
    pub struct Link {
        /// See [`super::directory6::location`].
        pub location: U32,
        /// Bits 16 to 31 of the hash.
        pub tag: U16,
    }

    /// Type (1 entry, 2 link group, 0 empty), block and slot of a location.
    pub fn location(raw: u32) -> (u32, u64, u64) {
        (raw & 3, u64::from(raw >> 2 & 0x3F_FFFF), u64::from(raw >> 24))
    }

    /// Hash of a name (Bob Jenkins' 64-bit mix over a padded key of 256 bytes).
    pub fn hash(name: &[u8]) -> u64 {
        let name = &name[..name.len().min(255)];
        let mut key = [0u8; 256];
        key[..name.len()].copy_from_slice(name);
        let first = (name.len() + 8) & !7;
        if let Some(rest) = key.get_mut(first..128) {
            rest.chunks_exact_mut(8).for_each(|w| w.copy_from_slice(&0x739A_75C2_8E61_B017u64.to_le_bytes()));
        }
        let words: Vec<u64> = key.as_chunks::<8>().0.iter().map(|w| u64::from_le_bytes(*w)).collect();
        let (mut a, mut b, mut c) = (42u64, 42u64, 0x9E37_79B9_7F4A_7C13u64);
        for round in words[..30].chunks_exact(3) {
            a = a.wrapping_add(round[0]);
            b = b.wrapping_add(round[1]);
            c = c.wrapping_add(round[2]);
            mix(&mut a, &mut b, &mut c);
        }
        c = c.wrapping_add(32);
        a = a.wrapping_add(words[30]);
        b = b.wrapping_add(words[31]);
        mix(&mut a, &mut b, &mut c);
        c
    }

    fn mix(a: &mut u64, b: &mut u64, c: &mut u64) {
        let step = |x: &mut u64, y: u64, z: u64| *x = x.wrapping_sub(y).wrapping_sub(z);
        for (right, left, right2) in [(43, 9, 8), (38, 23, 5), (35, 49, 11), (12, 18, 22)] {
            step(a, *b, *c);
            *a ^= *c >> right;
            step(b, *c, *a);
            *b ^= *a << left;
            step(c, *a, *b);
            *c ^= *b >> right2;
        }
    }

    #[cfg(test)]
    mod tests {
        #[test]
        fn hashes_of_genuine_names() {
            for (name, hash) in [
                ("small", 0xB778_B175_A46B_776D),
                ("big", 0x2DC0_D4D6_D7E3_1B04),
                ("collision", 0xBB57_C341_C3B8_104B_u64),
            ] {
                assert_eq!(super::hash(name.as_bytes()), hash, "{name}");
            }
        }
    }
}
