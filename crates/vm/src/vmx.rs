//! The `.vmx` of a VM: `key = "value"` lines (semantics page, chapter 6).
//!
//! Keys compare without case. Order, comments and lines that we do not understand are kept byte for byte; only a
//! value that changes is written anew. `.encoding` names the character set; a `|xx` in a value is the byte `xx`.

use std::fmt::Write as _;

use crate::{Slot, SlotError};

/// Largest file that is read, in bytes: real ones have a few KiB.
pub const MAX_BYTES: usize = 1 << 20;

/// Why a file is no `.vmx` (or `.vmsd`, which has the same syntax).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VmxError {
    /// Far larger than any configuration.
    #[error("{found} bytes is too long for a configuration (at most {MAX_BYTES})")]
    TooLong {
        /// Its length in bytes.
        found: usize,
    },
    /// `.encoding` names a character set that is not implemented, and there are bytes beyond ASCII.
    #[error("the encoding \"{name}\" is not known, and line {line} has bytes beyond ASCII")]
    Encoding {
        /// The value of `.encoding`.
        name: String,
        /// First such line, counted from 1.
        line: usize,
    },
    /// Bytes that are not text in the encoding named.
    #[error("line {line} is not text in {encoding}")]
    NotText {
        /// Line, counted from 1.
        line: usize,
        /// The encoding in force.
        encoding: &'static str,
    },
    /// A zero byte: this is some binary file.
    #[error("line {line} has a zero byte: this is no text file")]
    Binary {
        /// Line, counted from 1.
        line: usize,
    },
}

/// Character sets in which we read and write.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Encoding {
    Utf8,
    /// Windows-1252; ISO-8859-1 is read as its subset.
    Windows1252,
}

/// What Windows-1252 has at 0x80 to 0x9f (unused places map to the C1 control of the same number).
const WINDOWS_1252: [char; 32] = [
    '\u{20ac}', '\u{81}', '\u{201a}', '\u{192}', '\u{201e}', '\u{2026}', '\u{2020}', '\u{2021}', '\u{2c6}',
    '\u{2030}', '\u{160}', '\u{2039}', '\u{152}', '\u{8d}', '\u{17d}', '\u{8f}', '\u{90}', '\u{2018}',
    '\u{2019}', '\u{201c}', '\u{201d}', '\u{2022}', '\u{2013}', '\u{2014}', '\u{2dc}', '\u{2122}', '\u{161}',
    '\u{203a}', '\u{153}', '\u{9d}', '\u{17e}', '\u{178}',
];

impl Encoding {
    fn by_name(name: &str) -> Option<Self> {
        match name.to_ascii_lowercase().as_str() {
            "utf-8" | "utf8" => Some(Self::Utf8),
            "windows-1252" | "cp1252" | "iso-8859-1" | "latin1" => Some(Self::Windows1252),
            _ => None,
        }
    }

    fn decode(self, bytes: &[u8]) -> Option<String> {
        match self {
            Self::Utf8 => std::str::from_utf8(bytes).ok().map(str::to_owned),
            Self::Windows1252 => Some(
                bytes
                    .iter()
                    .map(|b| match b {
                        0x80..=0x9f => WINDOWS_1252[usize::from(*b - 0x80)],
                        _ => char::from(*b),
                    })
                    .collect(),
            ),
        }
    }

    /// The bytes of one character, `None` when the set lacks it.
    fn encode(self, c: char, out: &mut Vec<u8>) -> Option<()> {
        match self {
            Self::Utf8 => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
            Self::Windows1252 => out.push(match u32::from(c) {
                code @ (0..0x80 | 0xa0..=0xff) => code as u8,
                _ => 0x80 + WINDOWS_1252.iter().position(|w| *w == c)? as u8,
            }),
        }
        Some(())
    }
}

#[derive(Clone, Debug)]
enum Line {
    /// `raw` is the line as it was read; empty once the value was changed.
    Entry {
        key: String,
        value: String,
        raw: Option<Vec<u8>>,
    },
    Other(Vec<u8>),
}

/// A configuration in memory.
#[derive(Clone, Debug)]
pub struct Vmx {
    lines: Vec<Line>,
    encoding: Encoding,
    crlf: bool,
}

impl Default for Vmx {
    fn default() -> Self {
        Self::new()
    }
}

impl Vmx {
    /// Empty, in UTF-8.
    pub fn new() -> Self {
        let mut vmx = Self { lines: Vec::new(), encoding: Encoding::Utf8, crlf: false };
        vmx.set(".encoding", "UTF-8");
        vmx
    }

    /// Reads a file. Lines that are no `key = "value"` are kept and otherwise ignored.
    pub fn parse(bytes: &[u8]) -> Result<Self, VmxError> {
        if bytes.len() > MAX_BYTES {
            return Err(VmxError::TooLong { found: bytes.len() });
        }
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        let mut raw: Vec<&[u8]> = bytes.split(|b| *b == b'\n').collect();
        if raw.last().is_some_and(|l| l.is_empty()) {
            raw.pop();
        }
        let crlf = raw.first().is_some_and(|l| l.ends_with(b"\r"));
        let (encoding, name) = Self::find_encoding(&raw);
        let mut lines = Vec::with_capacity(raw.len());
        for (index, line) in raw.iter().enumerate() {
            let number = index + 1;
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            if line.contains(&0) {
                return Err(VmxError::Binary { line: number });
            }
            if encoding.is_none() && !line.is_ascii() {
                return Err(VmxError::Encoding { name, line: number });
            }
            lines.push(Self::parse_line(line, encoding.unwrap_or(Encoding::Utf8), number)?);
        }
        Ok(Self { lines, encoding: encoding.unwrap_or(Encoding::Utf8), crlf })
    }

    /// The encoding named (`None`: named and unknown), and its name.
    fn find_encoding(lines: &[&[u8]]) -> (Option<Encoding>, String) {
        for line in lines {
            if let Some((key, value)) = split(line)
                && key.eq_ignore_ascii_case(b".encoding")
            {
                let name = String::from_utf8_lossy(value).into_owned();
                return (Encoding::by_name(&name), name);
            }
        }
        (Some(Encoding::Utf8), "UTF-8".into())
    }

    fn parse_line(line: &[u8], encoding: Encoding, number: usize) -> Result<Line, VmxError> {
        let Some((key, value)) = split(line) else { return Ok(Line::Other(line.to_vec())) };
        let wrong = || VmxError::NotText {
            line: number,
            encoding: match encoding {
                Encoding::Utf8 => "UTF-8",
                Encoding::Windows1252 => "windows-1252",
            },
        };
        let key = encoding.decode(key).ok_or_else(wrong)?;
        let value = encoding.decode(&unescape(value)).ok_or_else(wrong)?;
        Ok(Line::Entry { key, value, raw: Some(line.to_vec()) })
    }

    /// The value of a key; of the last such line when there are several, as ESX does it.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.lines.iter().rev().find_map(|line| match line {
            Line::Entry { key: k, value, .. } if k.eq_ignore_ascii_case(key) => Some(value.as_str()),
            _ => None,
        })
    }

    /// The value is `TRUE` (any case) or `1`; `default` when there is no such key.
    pub fn flag(&self, key: &str, default: bool) -> bool {
        self.get(key).map_or(default, |v| v.eq_ignore_ascii_case("true") || v == "1")
    }

    /// Gives a key a value: in its place if it is there (further lines with it go), else at the end.
    pub fn set(&mut self, key: &str, value: &str) {
        if self.get(key) == Some(value) {
            return;
        }
        let mut placed = false;
        self.lines.retain_mut(|line| match line {
            Line::Entry { key: k, value: v, raw } if k.eq_ignore_ascii_case(key) => {
                if placed {
                    return false;
                }
                placed = true;
                value.clone_into(v);
                *raw = None;
                true
            }
            _ => true,
        });
        if !placed {
            self.lines.push(Line::Entry { key: key.into(), value: value.into(), raw: None });
        }
    }

    /// Takes a key out. True if it was there.
    pub fn remove(&mut self, key: &str) -> bool {
        let before = self.lines.len();
        self.lines.retain(|l| !matches!(l, Line::Entry { key: k, .. } if k.eq_ignore_ascii_case(key)));
        before != self.lines.len()
    }

    /// Takes out all keys that begin with `prefix`. How many.
    pub fn remove_prefix(&mut self, prefix: &str) -> usize {
        let before = self.lines.len();
        self.lines.retain(|l| {
            !matches!(l, Line::Entry { key, .. }
                if key.get(..prefix.len()).is_some_and(|k| k.eq_ignore_ascii_case(prefix)))
        });
        before - self.lines.len()
    }

    /// Keys and values in file order.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &str)> {
        self.lines.iter().filter_map(|line| match line {
            Line::Entry { key, value, .. } => Some((key.as_str(), value.as_str())),
            Line::Other(_) => None,
        })
    }

    /// The file. A character that the encoding lacks becomes `?`, as ESX writes it.
    pub fn to_bytes(&self) -> Vec<u8> {
        let end: &[u8] = if self.crlf { b"\r\n" } else { b"\n" };
        let mut out = Vec::new();
        for line in &self.lines {
            match line {
                Line::Other(raw) | Line::Entry { raw: Some(raw), .. } => out.extend_from_slice(raw),
                Line::Entry { key, value, raw: None } => {
                    out.extend_from_slice(key.as_bytes());
                    out.extend_from_slice(b" = \"");
                    for c in value.chars() {
                        self.write_char(c, &mut out);
                    }
                    out.push(b'"');
                }
            }
            out.extend_from_slice(end);
        }
        out
    }

    fn write_char(&self, c: char, out: &mut Vec<u8>) {
        match c {
            '"' | '|' | '#' | '\0'..='\x1f' | '\x7f' => {
                let mut hex = String::new();
                let _ = write!(hex, "|{:02X}", u32::from(c)); // writing to a String cannot fail
                out.extend_from_slice(hex.as_bytes());
            }
            _ if self.encoding.encode(c, out).is_some() => {}
            _ => out.push(b'?'),
        }
    }

    /// The VM's disks, in slot order: everything that is present, has a file and is no CD-ROM or floppy.
    pub fn disks(&self) -> Vec<DiskEntry> {
        let names = |key: &str| key.eq_ignore_ascii_case("fileName") || key.eq_ignore_ascii_case("name");
        let mut slots: Vec<Slot> = self
            .entries()
            .filter_map(|(key, _)| {
                let (slot, key) = key.rsplit_once('.')?;
                names(key).then(|| slot.parse().ok())?
            })
            .collect();
        slots.sort();
        slots.dedup();
        slots.into_iter().filter_map(|slot| self.disk(slot)).collect()
    }

    /// The disk in one slot.
    pub fn disk(&self, slot: Slot) -> Option<DiskEntry> {
        let get = |name: &str| self.get(&format!("{slot}.{name}")).filter(|value| !value.is_empty());
        let (file_name, unknown) = match get("fileName") {
            Some(file_name) => (file_name.to_owned(), None),
            None => esx2_name(slot, get("name")?),
        };
        let kind = get("deviceType").unwrap_or("scsi-hardDisk");
        let is_disk = kind.to_ascii_lowercase().ends_with("harddisk") || kind.eq_ignore_ascii_case("disk");
        if !self.flag(&format!("{slot}.present"), true) || !is_disk {
            return None;
        }
        let is = |value: Option<&str>, one: &str| value.is_some_and(|v| v.eq_ignore_ascii_case(one));
        let bus = self.get(&format!("{}.sharedBus", slot.adapter_name()));
        let mode = Mode::parse(get("mode").unwrap_or(""));
        Some(DiskEntry {
            slot,
            file_name,
            mode,
            shared: is(get("sharing"), "multi-writer") || is(bus, "virtual") || is(bus, "physical"),
            refused: unknown.or_else(|| mode.refused().map(str::to_owned)),
        })
    }

    /// Plugs a disk into a slot; its adapter is made present (LSI Logic unless the file says otherwise).
    pub fn attach(&mut self, slot: Slot, file_name: &str) {
        let adapter = slot.adapter_name();
        self.set(&format!("{adapter}.present"), "TRUE");
        if slot.bus() == crate::Bus::Scsi && self.get(&format!("{adapter}.virtualDev")).is_none() {
            self.set(&format!("{adapter}.virtualDev"), "lsilogic");
        }
        self.set(&format!("{slot}.present"), "TRUE");
        self.set(&format!("{slot}.fileName"), file_name);
        self.set(&format!("{slot}.deviceType"), "scsi-hardDisk");
        self.set(&format!("{slot}.redo"), "");
    }

    /// Takes everything of a slot out. True if there was something.
    pub fn detach(&mut self, slot: Slot) -> bool {
        self.remove_prefix(&format!("{slot}.")) > 0
    }

    /// Reads a slot from text.
    pub fn slot(text: &str) -> Result<Slot, SlotError> {
        text.parse()
    }
}

/// How a disk takes part in snapshots (chapter 6, "Disk modes").
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Writes go to the disk, snapshots include it. The default.
    Persistent,
    /// Redo kept; asked about at power off (ESX 2).
    Undoable,
    /// Redo kept and appended (ESX 2).
    Append,
    /// Writes are thrown away at power off.
    Nonpersistent,
    /// Snapshots leave it out.
    IndependentPersistent,
    /// Snapshots leave it out and writes are thrown away.
    IndependentNonpersistent,
}

impl Mode {
    /// By its name in the file; unknown ones are persistent, as ESX treats them.
    pub fn parse(text: &str) -> Self {
        match text.to_ascii_lowercase().as_str() {
            "undoable" => Self::Undoable,
            "append" => Self::Append,
            "nonpersistent" => Self::Nonpersistent,
            "independent-persistent" => Self::IndependentPersistent,
            "independent-nonpersistent" => Self::IndependentNonpersistent,
            _ => Self::Persistent,
        }
    }

    /// Its name in the file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Persistent => "persistent",
            Self::Undoable => "undoable",
            Self::Append => "append",
            Self::Nonpersistent => "nonpersistent",
            Self::IndependentPersistent => "independent-persistent",
            Self::IndependentNonpersistent => "independent-nonpersistent",
        }
    }

    /// Why a backup leaves such a disk out (R22), `None` when it is in.
    pub fn left_out(self) -> Option<&'static str> {
        match self {
            Self::Persistent | Self::Undoable | Self::Append => None,
            Self::IndependentPersistent => Some("independent: VM snapshots leave it out"),
            Self::Nonpersistent | Self::IndependentNonpersistent => Some("nonpersistent: it is not opened"),
        }
    }

    /// Why such a disk is not opened. Written like any other it would keep what its owner wants thrown away, and a backup
    /// that left it out would lose what was kept.
    fn refused(self) -> Option<&'static str> {
        match self {
            Self::Nonpersistent | Self::IndependentNonpersistent => Some(
                "is nonpersistent: its writes would have to be thrown away at power off, which is not done here; \
                 detach it and attach it again, persistent or independent-persistent",
            ),
            Self::Persistent | Self::Undoable | Self::Append | Self::IndependentPersistent => None,
        }
    }
}

/// A disk as the configuration names it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskEntry {
    /// Where it is plugged in.
    pub slot: Slot,
    /// Descriptor, relative to the VM's directory or absolute (`/vmfs/volumes/DATASTORE/...`).
    pub file_name: String,
    /// How snapshots see it.
    pub mode: Mode,
    /// Several VMs may write to it (R5): the bus of its adapter is shared, or it is multi-writer.
    pub shared: bool,
    /// Why it is not opened, whatever its file is.
    pub refused: Option<String>,
}

/// What ESX 2 calls a disk, in the words of today: a file at the top of a volume, which goes by its label. A volume that
/// goes by controller, target and partition is told by what no other machine has.
fn esx2_name(slot: Slot, name: &str) -> (String, Option<String>) {
    let Some((volume, file)) = name.rsplit_once(':') else { return (name.to_owned(), None) };
    match volume.contains(':') {
        false => (format!("/vmfs/volumes/{volume}/{file}"), None),
        true => {
            let why = format!(
                "names its volume as {volume}, which says nothing here; set {slot}.fileName to \
                 /vmfs/volumes/DATASTORE/{file}"
            );
            (name.to_owned(), Some(why))
        }
    }
}

/// `key = "value"` or `key = value`, spaces around both ignored; `None` for comments and anything else.
fn split(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let line = line.trim_ascii();
    if line.first().is_none_or(|b| *b == b'#') {
        return None;
    }
    let equals = line.iter().position(|b| *b == b'=')?;
    let (key, value) = (line[..equals].trim_ascii(), line[equals + 1..].trim_ascii());
    if key.is_empty() || key.iter().any(|b| b.is_ascii_whitespace() || *b == b'"') {
        return None;
    }
    let value = match value.strip_prefix(b"\"") {
        Some(rest) => &rest[..rest.iter().position(|b| *b == b'"')?],
        None => value,
    };
    Some((key, value))
}

/// `|xx` to the byte xx; a `|` that is followed by anything else stays as it is.
fn unescape(value: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(value.len());
    let mut rest = value;
    while let Some((first, tail)) = rest.split_first() {
        let hex = |b: u8| char::from(b).to_digit(16).map(|d| d as u8);
        match (first, tail) {
            (b'|', [a, b, ..]) if hex(*a).is_some() && hex(*b).is_some() => {
                out.push(hex(*a).unwrap_or(0) << 4 | hex(*b).unwrap_or(0));
                rest = &tail[2..];
            }
            _ => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SAMPLE: &str = "#!/usr/bin/vmware\n.encoding = \"UTF-8\"\nconfig.version = \"8\"\n\
        displayName = \"Mail |22A|22 |7C x\"\nscsi0.present = \"TRUE\"\nscsi0:0.present = \"true\"\n\
        scsi0:0.fileName = \"mail.vmdk\"\nSCSI0:1.FILENAME = \"mail-d.vmdk\"\nscsi0:1.mode = \"Independent-Persistent\"\n\
        odd line without equals\nide1:0.present = \"TRUE\"\nide1:0.fileName = \"x.iso\"\n\
        ide1:0.deviceType = \"cdrom-image\"\nscsi0:2.fileName = \"gone.vmdk\"\nscsi0:2.present = \"FALSE\"\n";

    #[test]
    fn reads_values_without_case_and_keeps_every_byte() {
        let mut vmx = Vmx::parse(SAMPLE.as_bytes()).unwrap();
        assert_eq!(vmx.to_bytes(), SAMPLE.as_bytes());
        assert_eq!(vmx.get("DISPLAYNAME"), Some("Mail \"A\" | x"));
        let disks = vmx.disks();
        assert_eq!(
            disks.iter().map(|d| (d.slot.to_string(), d.file_name.as_str())).collect::<Vec<_>>(),
            [("scsi0:0".to_string(), "mail.vmdk"), ("scsi0:1".to_string(), "mail-d.vmdk")]
        );
        assert_eq!(disks[1].mode, Mode::IndependentPersistent);
        vmx.set("scsi0:0.filename", "mail-000001.vmdk");
        vmx.set("new.key", "a\"b|c\u{e9}\n");
        let text = String::from_utf8(vmx.to_bytes()).unwrap();
        assert!(text.contains("scsi0:0.fileName = \"mail-000001.vmdk\"\nSCSI0:1"));
        assert!(text.ends_with("new.key = \"a|22b|7Cc\u{e9}|0A\"\n"));
        assert!(text.contains("odd line without equals\n"));
        let again = Vmx::parse(text.as_bytes()).unwrap();
        assert_eq!(again.get("new.key"), Some("a\"b|c\u{e9}\n"));
    }

    #[test]
    fn encodings() {
        let vmx = Vmx::parse(b".encoding = \"windows-1252\"\r\ndisplayName = \"\x80 caf\xe9\"\r\n").unwrap();
        assert_eq!(vmx.get("displayname"), Some("\u{20ac} caf\u{e9}"));
        let mut changed = vmx.clone();
        changed.set("annotation", "\u{20ac}\u{e9}\u{3042}");
        let bytes = changed.to_bytes();
        assert!(bytes.ends_with(b"annotation = \"\x80\xe9?\"\r\n"), "line ends stay as they were");
        let escaped = Vmx::parse(b".encoding = \"UTF-8\"\nn = \"caf|C3|A9 |zz\"\n").unwrap();
        assert_eq!(escaped.get("n"), Some("caf\u{e9} |zz"));
        assert!(Vmx::parse(b".encoding = \"Shift_JIS\"\nmemsize = \"512\"\n").is_ok());
        assert_eq!(
            Vmx::parse(b".encoding = \"Shift_JIS\"\nn = \"\x82\xa0\"\n").unwrap_err(),
            VmxError::Encoding { name: "Shift_JIS".into(), line: 2 }
        );
        assert!(matches!(Vmx::parse(b"a = \"\xff\"\n"), Err(VmxError::NotText { line: 1, .. })));
        assert_eq!(Vmx::parse(b"KDM\0\x01").unwrap_err(), VmxError::Binary { line: 1 });
        assert!(matches!(Vmx::parse(&vec![b'a'; MAX_BYTES + 1]), Err(VmxError::TooLong { .. })));
    }

    #[test]
    fn the_last_of_several_counts_and_one_is_left() {
        let mut vmx = Vmx::parse(b"a = \"1\"\nb = 2\nA = \"3\"\n").unwrap();
        assert_eq!((vmx.get("a"), vmx.get("b")), (Some("3"), Some("2")));
        vmx.set("a", "4");
        assert_eq!(vmx.to_bytes(), b"a = \"4\"\nb = 2\n");
        assert!(vmx.remove("B") && !vmx.remove("B"));
    }

    #[test]
    fn r5_a_disk_is_shared_by_its_bus_or_by_its_own_word() {
        let shared = |text: &str| {
            let vmx = Vmx::parse(format!("scsi1:2.fileName = \"d.vmdk\"\n{text}\n").as_bytes()).unwrap();
            vmx.disk(Vmx::slot("scsi1:2").unwrap()).unwrap().shared
        };
        for yes in [
            "scsi1.sharedBus = \"virtual\"",
            "SCSI1.sharedbus = \"Physical\"",
            "scsi1:2.sharing = \"multi-writer\"",
        ] {
            assert!(shared(yes), "{yes}");
        }
        for no in [
            "",
            "scsi1.sharedBus = \"none\"",
            "scsi0.sharedBus = \"virtual\"",
            "scsi1:2.sharing = \"none\"",
            "scsi1:3.sharing = \"multi-writer\"",
        ] {
            assert!(!shared(no), "{no}");
        }
    }

    #[test]
    fn r8_disks_are_found_by_the_names_of_esx_2() {
        let text = "scsi0:0.name = \"vmhba1:0:0:5:sql.vmdk\"\nscsi0:1.name = \"local:sql-d.vmdk\"\n\
            scsi0:2.name = \"e.vmdk\"\nscsi0:3.name = \"local:old.vmdk\"\nscsi0:3.fileName = \"new.vmdk\"\n\
            scsi0:4.name = \"\"\nscsi0:5.fileName = \"f.vmdk\"\nscsi0:5.mode = \"nonpersistent\"\n";
        let vmx = Vmx::parse(text.as_bytes()).unwrap();
        let found = vmx.disks();
        let names: Vec<_> = found.iter().map(|d| d.file_name.as_str()).collect();
        let expected =
            ["vmhba1:0:0:5:sql.vmdk", "/vmfs/volumes/local/sql-d.vmdk", "e.vmdk", "new.vmdk", "f.vmdk"];
        assert_eq!(names, expected);
        let why = |n: usize| found[n].refused.as_deref().unwrap_or("");
        assert!(why(0).contains("scsi0:0.fileName") && why(0).ends_with("/sql.vmdk"), "{}", why(0));
        assert!((1..4).all(|n| found[n].refused.is_none()));
        assert!(why(4).contains("nonpersistent"), "{}", why(4));
    }

    #[test]
    fn attach_and_detach() {
        let mut vmx = Vmx::new();
        let slot = Vmx::slot("scsi1:3").unwrap();
        vmx.attach(slot, "d.vmdk");
        assert!(vmx.flag("scsi1.present", false));
        assert_eq!(vmx.disk(slot).unwrap().file_name, "d.vmdk");
        assert!(vmx.detach(slot) && vmx.disks().is_empty());
    }

    proptest! {
        #[test]
        fn fuzz_any_bytes_parse_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(vmx) = Vmx::parse(&bytes) {
                let again = Vmx::parse(&vmx.to_bytes()).unwrap();
                prop_assert_eq!(
                    vmx.entries().collect::<Vec<_>>(), again.entries().collect::<Vec<_>>());
                let _ = vmx.disks();
            }
        }

        #[test]
        fn any_value_comes_back(value in "\\PC*") {
            let mut vmx = Vmx::new();
            vmx.set("k", &value);
            let again = Vmx::parse(&vmx.to_bytes()).unwrap();
            prop_assert_eq!(again.get("k"), Some(value.as_str()));
        }
    }
}
