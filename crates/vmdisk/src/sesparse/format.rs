//! The SEsparse format on disk (semantics page 4.2; the fields are those that QEMU reads).
//!
//! All numbers are little endian, places and lengths are in sectors from the start of the file. A directory entry
//! leads to a table of 4096 entries of 64 bit, a table entry to a grain of 4 KiB.

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First word of the file.
pub const MAGIC: u64 = 0xCAFE_BABE;
/// First word of the volatile header.
pub const VOLATILE_MAGIC: u64 = 0xCAFE_CAFE;
/// The only version there is.
pub const VERSION: u64 = 0x2_0000_0001;
/// Sectors in a grain.
pub const GRAIN_SECTORS: u64 = 8;
/// Length of a grain table in sectors.
pub const TABLE_SECTORS: u64 = 64;
/// Entries of a grain table.
pub const TABLE_ENTRIES: u64 = TABLE_SECTORS * block::SECTOR_BYTES / 8;
/// The largest disk that is opened, in sectors: 64 TiB, the format's limit.
pub const MAX_CAPACITY: u64 = (64 << 40) / block::SECTOR_BYTES;

/// A part of the file: where it begins and how long it is, in sectors.
#[repr(C)]
#[derive(Copy, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub struct Area {
    /// First sector.
    pub at: U64,
    /// Sectors.
    pub count: U64,
}

/// The header that never changes: sector 0.
#[repr(C)]
#[derive(Copy, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub struct ConstHeader {
    /// [`MAGIC`].
    pub magic: U64,
    /// [`VERSION`].
    pub version: U64,
    /// Length of the disk in sectors.
    pub capacity: U64,
    /// [`GRAIN_SECTORS`].
    pub grain: U64,
    /// [`TABLE_SECTORS`].
    pub table: U64,
    /// 0.
    pub flags: U64,
    /// Nothing.
    pub reserved: [U64; 4],
    /// The header that changes.
    pub volatile: Area,
    /// The journal's header.
    pub journal_header: Area,
    /// The journal.
    pub journal: Area,
    /// Grain directory.
    pub directory: Area,
    /// Grain tables, one behind the other.
    pub tables: Area,
    /// Which grains are free.
    pub free_bitmap: Area,
    /// Which table entry a grain belongs to.
    pub back_map: Area,
    /// Grains, one behind the other.
    pub grains: Area,
    /// Nothing.
    pub padding: [u8; 304],
}

const _: () = assert!(size_of::<ConstHeader>() == 512);
const _: () = assert!(offset_of!(ConstHeader, volatile) == 80);
const _: () = assert!(offset_of!(ConstHeader, directory) == 128);
const _: () = assert!(offset_of!(ConstHeader, grains) == 192);

/// The header that changes.
#[repr(C)]
#[derive(Copy, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub struct VolatileHeader {
    /// [`VOLATILE_MAGIC`].
    pub magic: U64,
    /// Free grain tables.
    pub free_tables: U64,
    /// Number of the next transaction.
    pub next_transaction: U64,
    /// Not 0: the journal has to be replayed before the tables can be believed.
    pub replay_journal: U64,
    /// Nothing.
    pub padding: [u8; 480],
}

const _: () = assert!(size_of::<VolatileHeader>() == 512);

/// Why a file is no SEsparse redo log that can be read.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not a usable SEsparse file: {what} at byte {at:#x}: found {found:#x}, expected {expected}")]
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

fn refuse(what: &'static str, at: usize, found: u64, expected: impl ToString) -> Corrupt {
    Corrupt { what, at: at as u64, found, expected: expected.to_string() }
}

/// A header that made sense.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Checked {
    /// Length of the disk in sectors.
    pub capacity: u64,
    /// First sector of the volatile header.
    pub volatile: u64,
    /// First sector of the directory.
    pub directory: u64,
    /// First sector of the tables.
    pub tables: u64,
    /// How many tables there is room for.
    pub table_count: u64,
    /// First sector of the grains.
    pub grains: u64,
    /// How many grains there is room for.
    pub grain_count: u64,
}

impl ConstHeader {
    /// Checks every field that reading depends on. `file` is the file's length in sectors.
    pub fn check(&self, file: u64) -> Result<Checked, Corrupt> {
        let fields = [
            ("magic", 0, self.magic, MAGIC),
            ("version", 8, self.version, VERSION),
            ("grain size", 24, self.grain, GRAIN_SECTORS),
            ("grain table size", 32, self.table, TABLE_SECTORS),
            ("flags", 40, self.flags, 0),
        ];
        for (what, at, found, expected) in fields {
            if found.get() != expected {
                return Err(refuse(what, at, found.get(), format!("{expected:#x}")));
            }
        }
        let capacity = self.capacity.get();
        if capacity == 0 || capacity > MAX_CAPACITY {
            return Err(refuse("capacity", 16, capacity, format!("1 to {MAX_CAPACITY} sectors")));
        }
        let areas = [
            ("volatile header", offset_of!(ConstHeader, volatile), &self.volatile, 1),
            ("grain directory", offset_of!(ConstHeader, directory), &self.directory, 1),
            ("grain tables", offset_of!(ConstHeader, tables), &self.tables, 0),
            ("grains", offset_of!(ConstHeader, grains), &self.grains, 0),
        ];
        for (what, at, area, least) in areas {
            let end = area.at.get().checked_add(area.count.get()).filter(|_| area.at.get() > 0);
            if area.count.get() < least || end.is_none() {
                return Err(refuse(what, at, area.at.get(), "a place in the file"));
            }
        }
        // What is behind the end of the file was never written: tables and grains that exist lie before it.
        let inside = |area: &Area| area.count.get().min(file.saturating_sub(area.at.get()));
        let wanted = capacity.div_ceil(GRAIN_SECTORS * TABLE_ENTRIES);
        let entries = inside(&self.directory).saturating_mul(block::SECTOR_BYTES / 8);
        if entries < wanted {
            let at = offset_of!(ConstHeader, directory) + 8;
            return Err(refuse("grain directory entries", at, entries, format!("at least {wanted}")));
        }
        Ok(Checked {
            capacity,
            volatile: self.volatile.at.get(),
            directory: self.directory.at.get(),
            tables: self.tables.at.get(),
            table_count: inside(&self.tables) / TABLE_SECTORS,
            grains: self.grains.at.get(),
            grain_count: inside(&self.grains) / GRAIN_SECTORS,
        })
    }
}

/// What a table says of a grain.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Grain {
    /// Not in this file: the parent has it.
    Parent,
    /// Reads as zero: written as zeroes, or unmapped by the guest. (Readers disagree on the second; what the guest
    /// gave up must not come back as the parent's old data.)
    Zero,
    /// In this file, at this sector.
    At(u64),
}

impl Checked {
    /// First sector of the table that a directory entry leads to; `None`: there is none. `at` is the entry's byte.
    pub fn table(&self, entry: u64, at: u64) -> Result<Option<u64>, Corrupt> {
        if entry == 0 {
            return Ok(None);
        }
        let index = entry & 0xFFFF_FFFF;
        if entry >> 32 != 0x1000_0000 || index >= self.table_count {
            let expected =
                format!("0, or {:#x} and a table below {}", 0x1000_0000_u64 << 32, self.table_count);
            return Err(refuse("grain directory entry", at as usize, entry, expected));
        }
        Ok(Some(self.tables + index * TABLE_SECTORS))
    }

    /// What a table entry says. `at` is the entry's byte.
    pub fn grain(&self, entry: u64, at: u64) -> Result<Grain, Corrupt> {
        match entry >> 60 {
            0 if entry == 0 => Ok(Grain::Parent),
            1 | 2 => Ok(Grain::Zero),
            3 => {
                let index = (entry >> 48 & 0xFFF) | (entry & 0xFFFF_FFFF_FFFF) << 12;
                if index >= self.grain_count {
                    let expected = format!("a grain below {}", self.grain_count);
                    return Err(refuse("grain table entry", at as usize, entry, expected));
                }
                Ok(Grain::At(self.grains + index * GRAIN_SECTORS))
            }
            _ => Err(refuse("grain table entry", at as usize, entry, "0, or type 1, 2 or 3")),
        }
    }
}
