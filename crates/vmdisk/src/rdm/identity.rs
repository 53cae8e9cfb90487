//! What is known of a LUN, and its two written forms: the record in the mapping's inode and `ddb.kagami.rdm.` lines.

use block::{Disk, DiskError, Generation, SECTOR_BYTES, Sector, SegmentsMut};
use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::format::{
    HAS_ARRAY, HAS_GENERATION, HAS_TAG, HAS_UUID, MAGIC, MODE_PHYSICAL, MODE_VIRTUAL, Record, VERSION,
};
use crate::descriptor::{CreateType, Descriptor, DescriptorError};

/// Beginning of the keys that carry an identity in a descriptor (R7).
pub const DDB_PREFIX: &str = "ddb.kagami.rdm.";

/// Compatibility mode of a mapping (chapter 1).
#[derive(Copy, Clone, PartialEq, Eq, Debug, Hash)]
pub enum Mode {
    /// READ and WRITE reach the LUN; the guest sees a virtual disk.
    Virtual,
    /// Everything but REPORT LUNS reaches the LUN.
    Physical,
}

impl Mode {
    /// The create type of its descriptor.
    pub fn create_type(self) -> CreateType {
        match self {
            Self::Virtual => CreateType::VmfsRawDeviceMap,
            Self::Physical => CreateType::VmfsPassthroughRawDeviceMap,
        }
    }

    /// What a descriptor's create type says.
    pub fn of(create_type: &CreateType) -> Option<Self> {
        match create_type {
            CreateType::VmfsRawDeviceMap => Some(Self::Virtual),
            CreateType::VmfsPassthroughRawDeviceMap => Some(Self::Physical),
            _ => None,
        }
    }

    /// The end of its mapping file's name: `-rdm` or `-rdmp`.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Virtual => "-rdm",
            Self::Physical => "-rdmp",
        }
    }
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Virtual => "virtual",
            Self::Physical => "physical",
        })
    }
}

/// A LUN of ours: the strongest key there is.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Ours {
    /// The array (pool) it lies in.
    pub array: Uuid,
    /// Its id there.
    pub lun: Uuid,
    /// Its generation at the time.
    pub generation: Option<Generation>,
}

/// Hash of fixed sample blocks and of the place of partition tables and superblocks. Evidence, never a key.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct ContentTag {
    /// BLAKE3.
    pub hash: [u8; 32],
    /// Seconds since 1970.
    pub taken_at: u64,
}

/// What is known of a LUN. Byte strings are as the device gives them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LunIdentity {
    /// NAA designator, 8 or 16 bytes; empty when there is none.
    pub naa: Vec<u8>,
    /// EUI-64 designator, 8, 12 or 16 bytes; empty when there is none.
    pub eui: Vec<u8>,
    /// UUID designator.
    pub uuid: Option<Uuid>,
    /// SCSI name designator; empty when there is none.
    pub name: Vec<u8>,
    /// T10 vendor designator; empty when there is none.
    pub t10: Vec<u8>,
    /// Unit serial number; empty when there is none.
    pub serial: Vec<u8>,
    /// From INQUIRY, padded with blanks.
    pub vendor: [u8; 8],
    /// From INQUIRY, padded with blanks.
    pub product: [u8; 16],
    /// From INQUIRY, padded with blanks.
    pub revision: [u8; 4],
    /// Length in 512-byte sectors.
    pub sectors: u64,
    /// Logical block size in bytes.
    pub logical_block: u32,
    /// Physical block size in bytes.
    pub physical_block: u32,
    /// It is one of ours.
    pub ours: Option<Ours>,
    /// What its content looked like.
    pub tag: Option<ContentTag>,
    /// Target, portal, LUN number, path: a hint for messages, never a key.
    pub seen: Vec<u8>,
}

/// What a mapping file stores.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    /// Compatibility mode.
    pub mode: Mode,
    /// The LUN.
    pub lun: LunIdentity,
}

/// Why a written identity cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum IdentityError {
    /// There is none of ours: the mapping was made by others.
    #[error("carries no identity record of ours")]
    None,
    /// A newer program wrote it.
    #[error("identity record of version {found}; this program knows up to {VERSION}: use the newer program")]
    Version {
        /// The version found.
        found: u16,
    },
    /// Torn, or somebody else's bytes.
    #[error("identity record is damaged: {what}")]
    Damaged {
        /// What was seen.
        what: &'static str,
    },
}

impl IdentityError {
    /// A newer program wrote it: it must not be written over.
    pub fn is_newer(&self) -> bool {
        matches!(self, Self::Version { .. })
    }
}

const fn damaged(what: &'static str) -> IdentityError {
    IdentityError::Damaged { what }
}

impl LunIdentity {
    /// For messages: the first of NAA, EUI, UUID, serial number.
    pub fn display(&self) -> String {
        match self {
            Self { naa, .. } if !naa.is_empty() => format!("naa.{}", hex(naa)),
            Self { eui, .. } if !eui.is_empty() => format!("eui.{}", hex(eui)),
            Self { uuid: Some(uuid), .. } => format!("uuid.{uuid}"),
            Self { serial, .. } if !serial.is_empty() => {
                format!("serial {}", String::from_utf8_lossy(serial.trim_ascii()))
            }
            _ => "a LUN without identity".to_owned(),
        }
    }
}

impl Identity {
    /// The record for the inode's tail. Strings that are longer than their field are refused.
    pub fn to_record(&self) -> Result<Record, IdentityError> {
        let lun = &self.lun;
        let mut raw = Record::new_zeroed();
        raw.magic = MAGIC;
        raw.version = U16::new(VERSION);
        raw.mode = if self.mode == Mode::Virtual { MODE_VIRTUAL } else { MODE_PHYSICAL };
        raw.sectors = U64::new(lun.sectors);
        raw.logical_block = U32::new(lun.logical_block);
        raw.physical_block = U32::new(lun.physical_block);
        let mut present = 0;
        if let Some(uuid) = lun.uuid {
            raw.uuid = uuid.into_bytes();
            present |= HAS_UUID;
        }
        if let Some(ours) = lun.ours {
            (raw.array, raw.lun) = (ours.array.into_bytes(), ours.lun.into_bytes());
            present |= HAS_ARRAY;
            if let Some(generation) = ours.generation {
                raw.generation = U64::new(generation.counter);
                raw.generation_id = generation.id.to_le_bytes();
                present |= HAS_GENERATION;
            }
        }
        if let Some(tag) = lun.tag {
            (raw.tag, raw.tag_time) = (tag.hash, U64::new(tag.taken_at));
            present |= HAS_TAG;
        }
        raw.present = U32::new(present);
        (raw.vendor, raw.product, raw.revision) = (lun.vendor, lun.product, lun.revision);
        let fields: [(&[u8], &mut [u8]); 6] = [
            (&lun.naa, &mut raw.naa),
            (&lun.eui, &mut raw.eui),
            (&lun.t10, &mut raw.t10),
            (&lun.serial, &mut raw.serial),
            (&lun.name, &mut raw.name),
            (&lun.seen, &mut raw.seen),
        ];
        for (length, (from, to)) in raw.lengths.iter_mut().zip(fields) {
            let place = to.get_mut(..from.len()).ok_or(damaged("a designator is longer than its field"))?;
            place.copy_from_slice(from);
            *length = from.len() as u8;
        }
        raw.crc = U32::new(crc32c::crc32c(raw.as_bytes()));
        Ok(raw)
    }

    /// Reads a record; `bytes` may be longer.
    pub fn from_record(bytes: &[u8]) -> Result<Self, IdentityError> {
        if !bytes.starts_with(&MAGIC) {
            let blank = bytes.iter().take(MAGIC.len()).all(|b| *b == 0);
            return Err(if blank { IdentityError::None } else { damaged("wrong first bytes") });
        }
        let (raw, _) = Record::read_from_prefix(bytes).map_err(|_| damaged("too short"))?;
        let mut blank = raw;
        blank.crc = U32::new(0);
        if raw.crc.get() != crc32c::crc32c(blank.as_bytes()) {
            return Err(damaged("its checksum does not match"));
        }
        match raw.version.get() {
            0 => return Err(damaged("it has no version")),
            VERSION => {}
            found => return Err(IdentityError::Version { found }),
        }
        let mode = match raw.mode {
            MODE_VIRTUAL => Mode::Virtual,
            MODE_PHYSICAL => Mode::Physical,
            _ => return Err(damaged("unknown mode")),
        };
        let fields: [&[u8]; 6] = [&raw.naa, &raw.eui, &raw.t10, &raw.serial, &raw.name, &raw.seen];
        let mut used = fields.iter().zip(raw.lengths).map(|(field, length)| field.get(..length.into()));
        let mut next = || used.next().flatten().map(<[u8]>::to_vec).ok_or(damaged("a length is too large"));
        let (naa, eui, t10, serial, name, seen) = (next()?, next()?, next()?, next()?, next()?, next()?);
        let has = |bit| raw.present.get() & bit != 0;
        let generation = has(HAS_GENERATION).then(|| Generation {
            counter: raw.generation.get(),
            id: u128::from_le_bytes(raw.generation_id),
        });
        let ours = has(HAS_ARRAY).then(|| Ours {
            array: Uuid::from_bytes(raw.array),
            lun: Uuid::from_bytes(raw.lun),
            generation,
        });
        let lun = LunIdentity {
            naa,
            eui,
            uuid: has(HAS_UUID).then(|| Uuid::from_bytes(raw.uuid)),
            name,
            t10,
            serial,
            vendor: raw.vendor,
            product: raw.product,
            revision: raw.revision,
            sectors: raw.sectors.get(),
            logical_block: raw.logical_block.get(),
            physical_block: raw.physical_block.get(),
            ours,
            tag: has(HAS_TAG).then(|| ContentTag { hash: raw.tag, taken_at: raw.tag_time.get() }),
            seen,
        };
        Ok(Self { mode, lun })
    }

    /// Puts the identity into a descriptor's disk database, in place of what was there (R7). The last line is the
    /// record's checksum, so a hand that changes one line is seen.
    pub fn to_ddb(&self, descriptor: &mut Descriptor) -> Result<(), IdentityError> {
        let lun = &self.lun;
        let record = self.to_record()?;
        descriptor.remove_ddb(DDB_PREFIX);
        let generation = lun.ours.and_then(|o| o.generation);
        let lines = [
            ("mode", self.mode.to_string()),
            ("naa", hex(&lun.naa)),
            ("eui", hex(&lun.eui)),
            ("uuid", lun.uuid.map_or(String::new(), |u| u.to_string())),
            ("name", escape(&lun.name)),
            ("t10", escape(&lun.t10)),
            ("serial", escape(&lun.serial)),
            ("vendor", escape(&lun.vendor)),
            ("product", escape(&lun.product)),
            ("revision", escape(&lun.revision)),
            ("sectors", lun.sectors.to_string()),
            ("logicalBlock", lun.logical_block.to_string()),
            ("physicalBlock", lun.physical_block.to_string()),
            ("array", lun.ours.map_or(String::new(), |o| o.array.to_string())),
            ("lun", lun.ours.map_or(String::new(), |o| o.lun.to_string())),
            ("generation", generation.map_or(String::new(), |g| format!("{}:{:032x}", g.counter, g.id))),
            ("tag", lun.tag.map_or(String::new(), |t| format!("{}:{}", t.taken_at, hex(&t.hash)))),
            ("seen", escape(&lun.seen)),
            ("crc32c", format!("{:08x}", record.crc.get())),
        ];
        for (key, value) in lines {
            if !value.is_empty() {
                let set = descriptor.set_ddb(&format!("{DDB_PREFIX}{key}"), &value);
                set.map_err(|_: DescriptorError| damaged("a value has no place in a descriptor"))?;
            }
        }
        Ok(())
    }

    /// Reads what [`Identity::to_ddb`] wrote.
    pub fn from_ddb(descriptor: &Descriptor) -> Result<Self, IdentityError> {
        let get = |key: &str| descriptor.get(&format!("{DDB_PREFIX}{key}")).unwrap_or("");
        match get("version") {
            // The first version writes no such line.
            "" => {}
            text => match text.parse::<u16>() {
                Ok(VERSION) => {}
                Ok(found) if found > VERSION => return Err(IdentityError::Version { found }),
                _ => return Err(damaged("an unknown version")),
            },
        }
        let crc = match get("crc32c") {
            "" if descriptor.with_prefix(DDB_PREFIX).next().is_none() => return Err(IdentityError::None),
            text => u32::from_str_radix(text, 16).map_err(|_| damaged("no checksum"))?,
        };
        let number = |key: &str| get(key).parse::<u64>().map_err(|_| damaged("a number is none"));
        let small = |key: &str| get(key).parse::<u32>().map_err(|_| damaged("a number is none"));
        let uuid = |key: &str| match get(key) {
            "" => Ok(None),
            text => Uuid::parse_str(text).map(Some).map_err(|_| damaged("a UUID is none")),
        };
        let pair = |key: &str| match get(key).split_once(':') {
            None => Ok(None),
            Some((number, rest)) => {
                let number = number.parse::<u64>().map_err(|_| damaged("a number is none"))?;
                Ok(Some((number, unhex(rest)?)))
            }
        };
        let generation = match pair("generation")? {
            Some((counter, id)) => {
                let id = <[u8; 16]>::try_from(id).map_err(|_| damaged("a generation has 32 digits"))?;
                Some(Generation { counter, id: u128::from_be_bytes(id) })
            }
            None => None,
        };
        let tag = match pair("tag")? {
            Some((taken_at, hash)) => {
                let hash = <[u8; 32]>::try_from(hash).map_err(|_| damaged("a content tag has 64 digits"))?;
                Some(ContentTag { hash, taken_at })
            }
            None => None,
        };
        let mode = match get("mode") {
            "virtual" => Mode::Virtual,
            "physical" => Mode::Physical,
            _ => return Err(damaged("unknown mode")),
        };
        let ours = match (uuid("array")?, uuid("lun")?) {
            (Some(array), Some(lun)) => Some(Ours { array, lun, generation }),
            _ => None,
        };
        let lun = LunIdentity {
            naa: unhex(get("naa"))?,
            eui: unhex(get("eui"))?,
            uuid: uuid("uuid")?,
            name: unescape(get("name"))?,
            t10: unescape(get("t10"))?,
            serial: unescape(get("serial"))?,
            vendor: padded(get("vendor"))?,
            product: padded(get("product"))?,
            revision: padded(get("revision"))?,
            sectors: number("sectors")?,
            logical_block: small("logicalBlock")?,
            physical_block: small("physicalBlock")?,
            ours,
            tag,
            seen: unescape(get("seen"))?,
        };
        let identity = Self { mode, lun };
        if identity.to_record()?.crc.get() != crc {
            return Err(damaged("its checksum does not match"));
        }
        Ok(identity)
    }
}

/// Takes the content tag of a disk: its first 128 KiB (partition table, superblocks of the usual file systems) and 16
/// blocks spread evenly. `now` is in seconds since 1970.
pub async fn content_tag(disk: &dyn Disk, now: u64) -> Result<ContentTag, DiskError> {
    const HEAD: u64 = (128 << 10) / SECTOR_BYTES;
    let sectors = disk.shape().sectors;
    let mut hasher = blake3::Hasher::new();
    let mut sample = async |at: u64, count: u64| {
        let mut buffer = lane::Buffer::zeroed((count * SECTOR_BYTES) as usize);
        disk.read(Sector(at), &SegmentsMut::new(&mut buffer)).await?;
        hasher.update(&buffer);
        Ok::<(), DiskError>(())
    };
    sample(0, HEAD.min(sectors)).await?;
    for index in 1..=16u64 {
        let at = sectors / 17 * index / 8 * 8;
        if at + 8 <= sectors {
            sample(at, 8).await?;
        }
    }
    Ok(ContentTag { hash: *hasher.finalize().as_bytes(), taken_at: now })
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex(text: &str) -> Result<Vec<u8>, IdentityError> {
    let digit = |b: &u8| char::from(*b).to_digit(16).map(|d| d as u8);
    let bytes = text.as_bytes();
    if !bytes.len().is_multiple_of(2) {
        return Err(damaged("an odd number of hex digits"));
    }
    let pair = |p: &[u8]| Some(digit(&p[0])? << 4 | digit(&p[1])?);
    bytes.chunks(2).map(pair).collect::<Option<_>>().ok_or(damaged("no hex digits"))
}

/// Text as it is; everything else, quotes and `%` as `%xx`.
fn escape(bytes: &[u8]) -> String {
    let each = |b: &u8| match b {
        b'"' | b'%' => format!("%{b:02x}"),
        0x20..0x7f => char::from(*b).to_string(),
        _ => format!("%{b:02x}"),
    };
    bytes.iter().map(each).collect()
}

fn unescape(text: &str) -> Result<Vec<u8>, IdentityError> {
    let mut out = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        if *first != b'%' {
            out.push(*first);
            rest = tail;
            continue;
        }
        let digits =
            tail.get(..2).and_then(|d| std::str::from_utf8(d).ok()).ok_or(damaged("a torn escape"))?;
        out.extend(unhex(digits)?);
        rest = &tail[2..];
    }
    Ok(out)
}

fn padded<const N: usize>(text: &str) -> Result<[u8; N], IdentityError> {
    let bytes = unescape(text)?;
    <[u8; N]>::try_from(bytes).map_err(|_| damaged("a field has another length"))
}
