//! The COWD format on disk (semantics page 4.1; the fields are those that libvmdk documents and QEMU reads).
//!
//! Sector 0 to 3 header, from sector 4 the grain directory: 32-bit sector numbers of grain tables, 0 = none. A grain
//! table is always 4096 entries of 32 bit, 0 = the grain is not in this file. All little endian.

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First bytes of the file.
pub const MAGIC: [u8; 4] = *b"COWD";
/// The only version there is.
pub const VERSION: u32 = 1;
/// What every known writer puts into `flags`.
pub const FLAGS: u32 = 3;
/// Where the grain directory begins, in sectors.
pub const DIRECTORY_SECTOR: u32 = 4;
/// Entries of a grain table, whatever the disk's size.
pub const TABLE_ENTRIES: u64 = 4096;
/// Length of a grain table in sectors.
pub const TABLE_SECTORS: u64 = TABLE_ENTRIES * 4 / block::SECTOR_BYTES;
/// Sector numbers have 32 bits: a file ends here, in sectors.
pub const MAX_FILE_SECTORS: u64 = u32::MAX as u64;
/// The largest disk we put a redo log on (R13): all its grains and their tables still have 32-bit addresses.
pub const MAX_CAPACITY: u64 = (2032 << 30) / block::SECTOR_BYTES;
/// The largest grain we take, in sectors (QEMU's limit is 64 MiB; ours keeps a copy of one in memory).
pub const MAX_GRAIN: u64 = 2048;

/// Where things stand in a header of 2048 bytes.
#[repr(C)]
#[derive(Copy, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: [u8; 4],
    /// [`VERSION`].
    pub version: U32,
    /// [`FLAGS`].
    pub flags: U32,
    /// Length of the disk in sectors.
    pub capacity: U32,
    /// Sectors in a grain.
    pub grain: U32,
    /// Sector of the grain directory.
    pub directory: U32,
    /// Entries in the grain directory.
    pub directory_entries: U32,
    /// One past the last used sector: a hint, not to be trusted when `dirty` is set.
    pub next_free: U32,
    /// Name of the parent; empty in newer files, the descriptor's `parentFileNameHint` counts.
    pub parent_name: [u8; 1024],
    /// Generation of the parent.
    pub parent_generation: U32,
    /// Generation of this file.
    pub generation: U32,
    /// A name for people.
    pub name: [u8; 60],
    /// A text for people.
    pub description: [u8; 512],
    /// Saved generation.
    pub saved_generation: U32,
    /// Nothing.
    pub reserved: [u8; 8],
    /// 1 while open for writing.
    pub dirty: U32,
    /// Nothing.
    pub padding: [u8; 396],
}

const _: () = assert!(size_of::<Header>() == 2048);
const _: () = assert!(offset_of!(Header, capacity) == 12);
const _: () = assert!(offset_of!(Header, next_free) == 28);
const _: () = assert!(offset_of!(Header, parent_name) == 32);
const _: () = assert!(offset_of!(Header, parent_generation) == 1056);
const _: () = assert!(offset_of!(Header, name) == 1064);
const _: () = assert!(offset_of!(Header, description) == 1124);
const _: () = assert!(offset_of!(Header, saved_generation) == 1636);
const _: () = assert!(offset_of!(Header, dirty) == 1648);

/// Why a file is no COWD redo log that we can use.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not a usable COWD redo log: {what} at byte {at}: found {found}, expected {expected}")]
pub struct Corrupt {
    /// Which field.
    pub what: &'static str,
    /// Byte offset in the file.
    pub at: u64,
    /// What is there.
    pub found: u64,
    /// What should be there.
    pub expected: String,
}

/// A header that made sense.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Checked {
    /// Length of the disk in sectors.
    pub capacity: u64,
    /// Sectors in a grain.
    pub grain: u64,
    /// Sector of the grain directory.
    pub directory: u64,
    /// Entries in the grain directory.
    pub directory_entries: u64,
    /// The next free sector as the file says.
    pub next_free: u64,
    /// The file was not closed.
    pub dirty: bool,
    /// Length of the file, in sectors, when one of ours closed it with this very `next_free`; 0 when it was not.
    /// Other writers append at the file's end and leave the hint as it was (QEMU does).
    pub closed_at: u64,
}

impl Checked {
    /// The layout of a new file for a disk of `capacity` sectors.
    pub fn new(capacity: u64, grain: u64) -> Self {
        let directory_entries = capacity.div_ceil(grain * TABLE_ENTRIES).max(1);
        let mut new = Self {
            capacity,
            grain,
            directory: u64::from(DIRECTORY_SECTOR),
            directory_entries,
            next_free: 0,
            dirty: false,
            closed_at: 0,
        };
        new.next_free = new.data_start();
        new
    }

    /// Length of the grain directory in sectors.
    pub fn directory_sectors(&self) -> u64 {
        (self.directory_entries * 4).div_ceil(block::SECTOR_BYTES)
    }

    /// First sector that a table or grain may have. Ours begin on a 4 KiB boundary.
    pub fn data_start(&self) -> u64 {
        (self.directory + self.directory_sectors()).next_multiple_of(block::BLOCK_SECTORS)
    }

    /// What a closed file says for people and for our next open.
    fn description(&self) -> [u8; 512] {
        let mut out = [0; 512];
        if self.closed_at > 0 {
            let text = format!("kagami: closed, next free {} of {}", self.next_free, self.closed_at);
            out[..text.len()].copy_from_slice(text.as_bytes());
        }
        out
    }

    /// The header's bytes. Everything fits: the limits were checked when this was made.
    pub fn raw(&self) -> Header {
        let word = |value: u64| U32::new(u32::try_from(value).unwrap_or(u32::MAX));
        Header {
            magic: MAGIC,
            version: U32::new(VERSION),
            flags: U32::new(FLAGS),
            capacity: word(self.capacity),
            grain: word(self.grain),
            directory: word(self.directory),
            directory_entries: word(self.directory_entries),
            next_free: word(self.next_free),
            parent_name: [0; 1024],
            parent_generation: U32::new(0),
            generation: U32::new(0),
            name: [0; 60],
            description: self.description(),
            saved_generation: U32::new(0),
            reserved: [0; 8],
            dirty: U32::new(u32::from(self.dirty)),
            padding: [0; 396],
        }
    }
}

impl Header {
    /// Raw in, checked out. `file_sectors` is the file's length.
    pub fn check(&self, file_sectors: u64) -> Result<Checked, Corrupt> {
        let corrupt = |what, at: usize, found: u32, expected: &str| {
            Err(Corrupt { what, at: at as u64, found: u64::from(found), expected: expected.to_owned() })
        };
        if self.magic != MAGIC {
            return corrupt("magic", 0, U32::from_bytes(self.magic).get(), "\"COWD\"");
        }
        if self.version.get() != VERSION {
            return corrupt("version", 4, self.version.get(), "1");
        }
        let capacity = u64::from(self.capacity.get());
        let grain = u64::from(self.grain.get());
        if grain == 0 || !grain.is_power_of_two() || grain > MAX_GRAIN {
            return corrupt("grain size", 16, self.grain.get(), "a power of two up to 2048 sectors");
        }
        let entries = u64::from(self.directory_entries.get());
        let wanted = capacity.div_ceil(grain * TABLE_ENTRIES);
        // Some writers round the directory up; a shorter one cannot reach the disk's end.
        if entries < wanted || entries > wanted + 4096 {
            let expected = format!("{wanted} for {capacity} sectors");
            return corrupt("directory entries", 24, self.directory_entries.get(), &expected);
        }
        let mut checked = Checked {
            capacity,
            grain,
            directory: u64::from(self.directory.get()),
            directory_entries: entries,
            next_free: u64::from(self.next_free.get()),
            dirty: self.dirty.get() != 0,
            closed_at: file_sectors,
        };
        if self.description != checked.description() {
            checked.closed_at = 0;
        }
        if checked.directory < u64::from(DIRECTORY_SECTOR)
            || checked.directory + checked.directory_sectors() > file_sectors
        {
            return corrupt("directory sector", 20, self.directory.get(), "4 or more, inside the file");
        }
        Ok(checked)
    }
}
