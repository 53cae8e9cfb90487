//! The VMDK descriptor: plain text that names a disk's extents, its parent and its properties (semantics page,
//! chapter 3; the keys are those of the VMDK 1.x specification as documented by libvmdk and read by QEMU).
//!
//! The text is kept line by line, byte for byte (R9): a setter touches only the value it sets, so keys that we do
//! not know, comments, odd spacing and line ends survive a rewrite. How a descriptor reaches the datastore (new
//! file, flush, rename, flush: R10) is [`crate::folder`]'s part.

mod create_type;
mod geometry;
mod parse;
#[cfg(test)]
mod tests;

use std::ops::Range;

pub use create_type::{Access, CreateType, ExtentKind};
pub use geometry::Geometry;

/// A descriptor may be this long, in bytes. QEMU stops at 20 KiB; the longest genuine ones list 2 GB extents of a
/// 62 TB disk, at some 40 bytes a line.
pub const MAX_BYTES: usize = 4 << 20;
/// `parentCID` of a disk without a parent.
pub const NO_PARENT: Cid = Cid(0xffff_ffff);
/// The largest disk that a descriptor may describe, in sectors: 64 TiB, the most that any of our stages takes.
pub const MAX_SECTORS: u64 = (64 << 40) / block::SECTOR_BYTES;

/// Content id: 32 random bits that change with the first write after an open (chapter 5).
#[derive(Copy, Clone, PartialEq, Eq, Debug, Hash)]
pub struct Cid(pub u32);

impl Cid {
    /// A new one. Never the two values that mean "none" and "freshly made".
    pub fn random() -> Self {
        loop {
            let (_, low) = uuid::Uuid::new_v4().as_u64_pair();
            let value = low as u32;
            if value < 0xffff_fffe && value != 0 {
                return Self(value);
            }
        }
    }
}

impl std::fmt::Display for Cid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

/// What is wrong with a descriptor.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DescriptorError {
    /// Longer than [`MAX_BYTES`].
    #[error("the descriptor is {bytes} bytes long; at most {MAX_BYTES} are read")]
    TooLarge {
        /// Length found.
        bytes: u64,
    },
    /// The first line that is no comment is not `version=1`, `2` or `3`.
    #[error("not a VMDK descriptor: line {line} should be version=1, 2 or 3")]
    NotADescriptor {
        /// Line number, from 1; 0 when the text has no such line.
        line: usize,
    },
    /// A key that every descriptor has is not there: a torn or foreign file.
    #[error("the descriptor has no {what}: torn, or not a VMDK descriptor")]
    Missing {
        /// Which one.
        what: &'static str,
    },
    /// A key that decides something stands there twice with different values.
    #[error("line {line}: {what} stands there twice with different values")]
    Twice {
        /// Line number of the second one, from 1.
        line: usize,
        /// Which one.
        what: String,
    },
    /// A line that cannot be understood.
    #[error("line {line}: {what}: found {found:?}")]
    Corrupt {
        /// Line number, from 1.
        line: usize,
        /// What should be there.
        what: &'static str,
        /// What is there, shortened.
        found: String,
    },
    /// A value that cannot be written: it holds a quote, a line end or a NUL.
    #[error("{key} cannot have the value {value:?}: quotes, line ends and NUL have no place in a descriptor")]
    BadValue {
        /// Its key.
        key: String,
        /// The value.
        value: String,
    },
}

/// One extent line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExtentLine {
    /// What may be done with it.
    pub access: Access,
    /// Length in 512-byte sectors.
    pub sectors: u64,
    /// What the file is.
    pub kind: ExtentKind,
    /// File name relative to the descriptor; empty for `ZERO` extents.
    pub file: String,
    /// Where the data begins in the file, in sectors (`FLAT` only).
    pub offset: u64,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum What {
    /// Comment, blank line.
    Nothing,
    /// `key = value`; the ranges are into the line's bytes, quotes left out.
    Pair { key: Range<usize>, value: Range<usize> },
    /// Index into `extents`.
    Extent(usize),
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Line {
    /// Everything, line end included.
    bytes: Vec<u8>,
    what: What,
}

impl Line {
    fn key(&self) -> Option<&[u8]> {
        match &self.what {
            What::Pair { key, .. } => Some(&self.bytes[key.clone()]),
            _ => None,
        }
    }
    fn value(&self) -> Option<&[u8]> {
        match &self.what {
            What::Pair { value, .. } => Some(&self.bytes[value.clone()]),
            _ => None,
        }
    }
}

/// A parsed descriptor. What [`Descriptor::parse`] accepted has a version, a CID, a create type and an extent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Descriptor {
    lines: Vec<Line>,
    extents: Vec<ExtentLine>,
    /// What follows the first NUL: the padding of an embedded descriptor.
    tail: Vec<u8>,
    cid: Cid,
    parent_cid: Cid,
    create_type: CreateType,
}

/// What a new descriptor says.
#[derive(Clone, Debug)]
pub struct NewDescriptor {
    /// Content id.
    pub cid: Cid,
    /// The parent's content id at birth, and its descriptor's name; `None` for a base.
    pub parent: Option<(Cid, String)>,
    /// Kind of disk.
    pub create_type: CreateType,
    /// Its extents, at least one.
    pub extents: Vec<ExtentLine>,
    /// Lines of the disk database in order, keys with `ddb.`; adapter type, geometry and hardware version are added
    /// by [`Descriptor::new`] to a base that does not name them.
    pub ddb: Vec<(String, String)>,
}

impl Descriptor {
    /// A new descriptor text in the form ESX 3 writes (R8).
    pub fn new(new: &NewDescriptor) -> Result<Self, DescriptorError> {
        let mut text = format!(
            "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID={}\nparentCID={}\nisNativeSnapshot=\"no\"\n\
             createType=\"{}\"\n",
            new.cid,
            new.parent.as_ref().map_or(NO_PARENT, |p| p.0),
            new.create_type,
        );
        if let Some((_, name)) = &new.parent {
            check_value("parentFileNameHint", name)?;
            text += &format!("parentFileNameHint=\"{name}\"\n");
        }
        text += "\n# Extent description\n";
        let mut sectors = 0;
        for extent in &new.extents {
            check_value("extent", &extent.file)?;
            text += &parse::extent_text(extent);
            text.push('\n');
            sectors += extent.sectors;
        }
        text += "\n# The Disk Data Base\n#DDB\n\n";
        let mut ddb = new.ddb.clone();
        if new.parent.is_none() {
            let geometry = Geometry::of(sectors);
            for (key, value) in [
                ("ddb.adapterType", "lsilogic".to_owned()),
                ("ddb.geometry.cylinders", geometry.cylinders.to_string()),
                ("ddb.geometry.heads", geometry.heads.to_string()),
                ("ddb.geometry.sectors", geometry.sectors.to_string()),
                ("ddb.virtualHWVersion", "4".to_owned()),
            ] {
                if !ddb.iter().any(|(k, _)| k == key) {
                    ddb.push((key.to_owned(), value));
                }
            }
        }
        for (key, value) in &ddb {
            check_value(key, value)?;
            text += &format!("{key} = \"{value}\"\n");
        }
        Self::parse(text.as_bytes())
    }

    /// The text.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out: Vec<u8> = self.lines.iter().flat_map(|l| l.bytes.iter().copied()).collect();
        out.extend_from_slice(&self.tail);
        out
    }

    /// Content id.
    pub fn cid(&self) -> Cid {
        self.cid
    }

    /// The parent's content id when this disk was made, or [`NO_PARENT`].
    pub fn parent_cid(&self) -> Cid {
        self.parent_cid
    }

    /// There is a disk below this one.
    pub fn has_parent(&self) -> bool {
        self.parent_cid != NO_PARENT
    }

    /// Where the parent's descriptor was.
    pub fn parent_hint(&self) -> Option<&str> {
        self.get("parentFileNameHint").filter(|name| !name.is_empty())
    }

    /// Kind of disk.
    pub fn create_type(&self) -> &CreateType {
        &self.create_type
    }

    /// Extents in order.
    pub fn extents(&self) -> &[ExtentLine] {
        &self.extents
    }

    /// Length of the disk in sectors: its extents together.
    pub fn sectors(&self) -> u64 {
        self.extents.iter().map(|e| e.sectors).sum()
    }

    /// Value of a header or `ddb.` key. `None` when it is not there, or not UTF-8.
    pub fn get(&self, key: &str) -> Option<&str> {
        let line = self.find(key)?;
        self.lines[line].value().and_then(|v| std::str::from_utf8(v).ok())
    }

    /// All `ddb.` keys that begin with `prefix`, with their values, in order.
    pub fn with_prefix<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.lines.iter().filter_map(move |line| {
            let key = std::str::from_utf8(line.key()?).ok()?;
            let value = std::str::from_utf8(line.value()?).ok()?;
            key.starts_with(prefix).then_some((key, value))
        })
    }

    fn find(&self, key: &str) -> Option<usize> {
        self.lines.iter().position(|l| l.key().is_some_and(|k| k.eq_ignore_ascii_case(key.as_bytes())))
    }

    /// A new content id, and with it a new long content id where the disk has one (its last 32 bits are the CID).
    pub fn set_cid(&mut self, cid: Cid) {
        self.replace_value("CID", &cid.to_string());
        self.cid = cid;
        if self.get("ddb.longContentID").is_some() {
            let long = long_content_id(cid);
            self.replace_value("ddb.longContentID", &long);
        }
    }

    /// The parent's content id.
    pub fn set_parent_cid(&mut self, cid: Cid) {
        if self.find("parentCID").is_none() {
            let at = self.find("CID").map_or(0, |l| l + 1);
            self.insert(at, "parentCID", &cid.to_string(), false);
        } else {
            self.replace_value("parentCID", &cid.to_string());
        }
        self.parent_cid = cid;
    }

    /// Sets a `ddb.` key; one that is not there yet goes to the end.
    pub fn set_ddb(&mut self, key: &str, value: &str) -> Result<(), DescriptorError> {
        assert!(key.starts_with("ddb."), "a key of the disk database begins with ddb.");
        check_value(key, value)?;
        if self.find(key).is_some() {
            self.replace_value(key, value);
        } else {
            let end = self.lines.len();
            self.insert(end, key, value, true);
        }
        Ok(())
    }

    /// Takes all `ddb.` keys out that begin with `prefix`.
    pub fn remove_ddb(&mut self, prefix: &str) {
        assert!(prefix.starts_with("ddb."), "a key of the disk database begins with ddb.");
        self.lines.retain(|l| !l.key().is_some_and(|k| k.starts_with(prefix.as_bytes())));
    }

    /// Another kind of disk (convert between the RDM modes, R6).
    pub fn set_create_type(&mut self, create_type: CreateType) {
        self.replace_value("createType", &create_type.to_string());
        self.create_type = create_type;
    }

    /// Another length or file for extent `index`, which must exist; the geometry follows the new length.
    pub fn set_extent(&mut self, index: usize, extent: ExtentLine) -> Result<(), DescriptorError> {
        check_value("extent", &extent.file)?;
        let resized = self.extents[index].sectors != extent.sectors;
        let line = self.lines.iter_mut().find(|l| l.what == What::Extent(index));
        if let Some(line) = line {
            let end = parse::line_end(&line.bytes).to_vec();
            line.bytes = parse::extent_text(&extent).into_bytes();
            line.bytes.extend_from_slice(&end);
        }
        self.extents[index] = extent;
        if resized && self.get("ddb.geometry.cylinders").is_some() {
            let geometry = Geometry::of(self.sectors());
            self.set_ddb("ddb.geometry.cylinders", &geometry.cylinders.to_string())?;
            self.set_ddb("ddb.geometry.heads", &geometry.heads.to_string())?;
            self.set_ddb("ddb.geometry.sectors", &geometry.sectors.to_string())?;
        }
        Ok(())
    }

    /// Replaces the value of a key that is there, keeping spacing and quotes; in each of its lines, as two that said the
    /// same would contradict each other else.
    fn replace_value(&mut self, key: &str, new: &str) {
        let is_it = |l: &&mut Line| l.key().is_some_and(|k| k.eq_ignore_ascii_case(key.as_bytes()));
        for line in self.lines.iter_mut().filter(is_it) {
            if let What::Pair { value, .. } = &mut line.what {
                line.bytes.splice(value.clone(), new.bytes());
                value.end = value.start + new.len();
            }
        }
    }

    fn insert(&mut self, at: usize, key: &str, value: &str, spaced: bool) {
        // The line before may be the last of a text that does not end in a line end.
        let end = self.lines.first().map_or(b"\n".to_vec(), |l| parse::line_end(&l.bytes).to_vec());
        let end = if end.is_empty() { b"\n".to_vec() } else { end };
        if let Some(before) = at.checked_sub(1).and_then(|i| self.lines.get_mut(i))
            && parse::line_end(&before.bytes).is_empty()
        {
            before.bytes.extend_from_slice(&end);
        }
        let equals = if spaced { " = \"" } else { "=" };
        let mut bytes = format!("{key}{equals}{value}").into_bytes();
        let start = key.len() + equals.len();
        let what = What::Pair { key: 0..key.len(), value: start..start + value.len() };
        if spaced {
            bytes.push(b'"');
        }
        bytes.extend_from_slice(&end);
        self.lines.insert(at, Line { bytes, what });
    }
}

/// 128 random bits in hex whose last 32 are the CID, as ESX 4 and later write it.
pub fn long_content_id(cid: Cid) -> String {
    let random = uuid::Uuid::new_v4().simple().to_string();
    format!("{}{cid}", &random[..24])
}

/// A new `ddb.uuid`, in VMware's way of writing: `60 00 C2 9a 11 22 33 44-55 66 77 88 99 aa bb cc`.
pub fn new_disk_uuid() -> String {
    let mut bytes = uuid::Uuid::new_v4().into_bytes();
    bytes[..3].copy_from_slice(&[0x60, 0x00, 0xc2]);
    bytes[3] = 0x90 | bytes[3] & 0x0f;
    let half = |part: &[u8]| part.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ");
    format!("{}-{}", half(&bytes[..8]), half(&bytes[8..]))
}

fn check_value(key: &str, value: &str) -> Result<(), DescriptorError> {
    if value.bytes().any(|b| matches!(b, b'"' | b'\n' | b'\r' | 0)) {
        return Err(DescriptorError::BadValue { key: key.to_owned(), value: value.to_owned() });
    }
    Ok(())
}
