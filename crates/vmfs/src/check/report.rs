//! What a check found: typed, with place, found and expected, in a list of bounded length.

use std::collections::BTreeMap;
use std::fmt;

use crate::format::FdAddress;

/// How bad a finding is.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Severity {
    /// Worth knowing; nothing is wrong.
    Note,
    /// Space that nobody uses is not free. [`super::Options::repair_leaks`] gives it back.
    Leak,
    /// The volume contradicts itself. Do not write to it.
    Corrupt,
}

/// The kinds of things that are handed out by bitmaps.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Unit {
    /// File block, `.fbb.sf`.
    FileBlock,
    /// Sub-block, `.sbc.sf`.
    SubBlock,
    /// Pointer block, `.pbc.sf`.
    PointerBlock,
    /// Second-level pointer block, `.pb2.sf`.
    SecondPointerBlock,
    /// File descriptor, `.fdc.sf`.
    Descriptor,
}

impl Unit {
    /// The system file whose clusters count it.
    pub const fn file(self) -> &'static str {
        match self {
            Self::FileBlock => ".fbb.sf",
            Self::SubBlock => ".sbc.sf",
            Self::PointerBlock => ".pbc.sf",
            Self::SecondPointerBlock => ".pb2.sf",
            Self::Descriptor => ".fdc.sf",
        }
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FileBlock => "file block",
            Self::SubBlock => "sub-block",
            Self::PointerBlock => "pointer block",
            Self::SecondPointerBlock => "second pointer block",
            Self::Descriptor => "file descriptor",
        })
    }
}

/// Where something was found.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Place {
    /// Byte offset on a device (its position in the list given).
    Device {
        /// Index of the device.
        device: usize,
        /// Byte offset.
        at: u64,
    },
    /// Byte offset in the logical volume.
    Volume(u64),
    /// A file descriptor.
    File(FdAddress),
    /// An index in a file's block list: the n-th block.
    BlockOf {
        /// The file.
        file: FdAddress,
        /// Index of the block in the file.
        index: u64,
    },
    /// One resource of a resource file, or a run of `count` of them.
    Resource {
        /// Which.
        unit: Unit,
        /// Number of the first, counted over all clusters.
        number: u64,
        /// How many in a row.
        count: u64,
    },
    /// A cluster of a resource file.
    Cluster {
        /// Which file.
        unit: Unit,
        /// Cluster number.
        cluster: u32,
    },
    /// The header of a resource file.
    Header(Unit),
    /// An entry of a directory.
    Entry {
        /// The directory.
        directory: FdAddress,
        /// Index of the entry.
        index: u64,
        /// Its name, as far as it can be shown.
        name: String,
    },
}

impl Place {
    /// The file it is about, if it is about one.
    pub fn file(&self) -> Option<FdAddress> {
        match self {
            Self::File(file) | Self::BlockOf { file, .. } => Some(*file),
            Self::Entry { directory, .. } => Some(*directory),
            Self::Device { .. }
            | Self::Volume(_)
            | Self::Resource { .. }
            | Self::Cluster { .. }
            | Self::Header(_) => None,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device { device, at } => write!(f, "device {device} byte {at:#x}"),
            Self::Volume(at) => write!(f, "volume byte {at:#x}"),
            Self::File(fd) => write!(f, "{fd}"),
            Self::BlockOf { file, index } => write!(f, "{file} block {index}"),
            Self::Resource { unit, number, count: 1 } => write!(f, "{unit} {number}"),
            Self::Resource { unit, number, count } => write!(f, "{unit}s {number}..{}", number + count),
            Self::Cluster { unit, cluster } => write!(f, "{} cluster {cluster}", unit.file()),
            Self::Header(unit) => write!(f, "{} header", unit.file()),
            Self::Entry { directory, index, name } => {
                write!(f, "directory {directory} entry {index} \"{name}\"")
            }
        }
    }
}

/// What is wrong. The names are what a script matches on: see [`What::name`].
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum What {
    /// A field of the LVM header, volume descriptor or tables is not what the rest says.
    VolumeManager,
    /// Physical extents overlap, are missing, or do not lie where their number says.
    Extents,
    /// A field of the file system descriptor is wrong.
    FileSystemDescriptor,
    /// A heartbeat slot is malformed.
    Heartbeat,
    /// A resource file's header contradicts the volume's size or its own geometry.
    ResourceHeader,
    /// A cluster's number, total, free count or bits beyond its end are wrong.
    ClusterCount,
    /// A lock block has the wrong type, address, mode or holder.
    LockBlock,
    /// Referenced, but its bitmap says free: the next allocation would hand it out again.
    UsedButFree,
    /// Allocated, but nobody refers to it.
    FreeButUsed,
    /// Two references to one resource.
    OwnedTwice,
    /// An address that is malformed, of the wrong kind, or past the end of the volume.
    BadAddress,
    /// A descriptor names another address as its own.
    OwnAddress,
    /// The generation in a directory entry is not that of the file, or a file's is impossible.
    WrongGeneration,
    /// A file's type, mode, flags or block size is unknown or contradicts itself.
    BadDescriptor,
    /// A link count differs from the number of entries.
    LinkCount,
    /// An entry leads to a descriptor that is free, malformed or of another type.
    EntryTarget,
    /// An entry's own form is wrong: name, dot entries, duplicate.
    BadEntry,
    /// An allocated descriptor that no directory leads to.
    OrphanDescriptor,
    /// A length that the block list, the ZLA or the type forbids.
    WrongLength,
    /// An unknown ZLA, or one that the type or the addresses contradict.
    WrongZla,
    /// The block count is not the number of blocks.
    BlockCount,
    /// The to-be-zeroed count is not the number of such blocks.
    ToBeZeroedCount,
    /// The copy-on-write count is not the number of such blocks.
    CopyOnWriteCount,
    /// A mapping's record is malformed or not what its descriptor and LUN say.
    MappingRecord,
    /// A host has the volume mounted, or had it without leaving cleanly.
    Mounted,
}

impl What {
    /// A short fixed name for scripts and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::VolumeManager => "lvm",
            Self::Extents => "extents",
            Self::FileSystemDescriptor => "fs-descriptor",
            Self::Heartbeat => "heartbeat",
            Self::ResourceHeader => "resource-header",
            Self::ClusterCount => "cluster-count",
            Self::LockBlock => "lock-block",
            Self::UsedButFree => "used-but-free",
            Self::FreeButUsed => "free-but-used",
            Self::OwnedTwice => "owned-twice",
            Self::BadAddress => "bad-address",
            Self::OwnAddress => "own-address",
            Self::WrongGeneration => "generation",
            Self::BadDescriptor => "descriptor",
            Self::LinkCount => "link-count",
            Self::EntryTarget => "entry-target",
            Self::BadEntry => "entry",
            Self::OrphanDescriptor => "orphan",
            Self::WrongLength => "length",
            Self::WrongZla => "zla",
            Self::BlockCount => "block-count",
            Self::ToBeZeroedCount => "tbz-count",
            Self::CopyOnWriteCount => "cow-count",
            Self::MappingRecord => "mapping-record",
            Self::Mounted => "mounted",
        }
    }
}

/// One thing a check found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// What is wrong.
    pub what: What,
    /// How bad it is.
    pub severity: Severity,
    /// Where.
    pub place: Place,
    /// What is there.
    pub found: String,
    /// What should be there.
    pub expected: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Note => "note",
            Severity::Leak => "leak",
            Severity::Corrupt => "corrupt",
        };
        let Self { what, place, found, expected, .. } = self;
        write!(f, "{severity}: {}: {place}: found {found}, expected {expected}", what.name())
    }
}

/// How much the volume holds, as counted from the files.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    /// Files, directories, links and mappings reachable or not, without the system files.
    pub files: u64,
    /// Directories among them.
    pub directories: u64,
    /// RDM mappings among them.
    pub mappings: u64,
    /// File blocks on the volume.
    pub blocks: u64,
    /// File blocks in use.
    pub blocks_used: u64,
}

/// The outcome of a check.
#[derive(Clone, Debug, Default)]
pub struct Report {
    findings: Vec<Finding>,
    counts: [u64; 3],
    /// The check could not go on behind a finding: what was not looked at may hold more.
    pub cut_short: bool,
    /// Leaks that were found first and repaired; the findings are those of a look afterwards.
    pub repaired: Vec<Finding>,
    /// Paths of the first 256 files that findings speak of.
    pub paths: BTreeMap<FdAddress, String>,
    /// What there is.
    pub totals: Totals,
}

/// More findings than this are counted, not listed: a ruined volume must not fill the memory.
const FINDINGS_LISTED_MAX: usize = 10_000;

impl Report {
    /// Everything found, in the order in which it was met; at most 10,000.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// How many findings of a severity there are, listed or not.
    pub fn count(&self, severity: Severity) -> u64 {
        self.counts[severity as usize]
    }

    /// The worst severity found, if anything was.
    pub fn worst(&self) -> Option<Severity> {
        [Severity::Corrupt, Severity::Leak, Severity::Note].into_iter().find(|s| self.count(*s) > 0)
    }

    /// Neither leaks nor corruption; notes are allowed.
    pub fn is_clean(&self) -> bool {
        self.worst().is_none_or(|worst| worst == Severity::Note)
    }

    /// Exit code of a program that checked: 0 clean, 2 corrupt, 3 leaks only; 1 when not all could be looked at and
    /// what was seen is not corrupt.
    pub fn exit_code(&self) -> u8 {
        match self.worst() {
            Some(Severity::Corrupt) => 2,
            _ if self.cut_short => 1,
            Some(Severity::Leak) => 3,
            None | Some(Severity::Note) => 0,
        }
    }

    /// Adds to what the n-th finding says was found.
    pub(super) fn amend(&mut self, index: usize, more: impl fmt::Display) {
        if let Some(finding) = self.findings.get_mut(index) {
            finding.found = format!("{}{more}", finding.found);
        }
    }

    pub(super) fn add(
        &mut self,
        severity: Severity,
        what: What,
        place: Place,
        found: impl fmt::Display,
        expected: impl fmt::Display,
    ) {
        self.counts[severity as usize] += 1;
        if self.findings.len() < FINDINGS_LISTED_MAX {
            let (found, expected) = (found.to_string(), expected.to_string());
            self.findings.push(Finding { what, severity, place, found, expected });
        }
    }

    pub(super) fn corrupt(
        &mut self,
        what: What,
        place: Place,
        found: impl fmt::Display,
        expected: impl fmt::Display,
    ) {
        self.add(Severity::Corrupt, what, place, found, expected);
    }

    pub(super) fn note(
        &mut self,
        what: What,
        place: Place,
        found: impl fmt::Display,
        expected: impl fmt::Display,
    ) {
        self.add(Severity::Note, what, place, found, expected);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_is_that_of_the_worst_finding() {
        let mut report = Report::default();
        assert_eq!((report.exit_code(), report.worst()), (0, None));
        let place = Place::File(FdAddress(0x1B40_0104));
        report.note(What::Mounted, place.clone(), "a host", "none");
        assert_eq!((report.exit_code(), report.is_clean()), (0, true));
        report.add(Severity::Leak, What::OrphanDescriptor, place.clone(), "no entry", "an entry");
        assert_eq!((report.exit_code(), report.is_clean()), (3, false));
        report.corrupt(What::LinkCount, place, 2, 1);
        assert_eq!(report.exit_code(), 2);
        assert_eq!(
            report.findings()[2].to_string(),
            "corrupt: link-count: FD 0x1b400104: found 2, expected 1"
        );
    }

    #[test]
    fn the_list_is_bounded() {
        let mut report = Report::default();
        for n in 0..20_000 {
            report.corrupt(What::BadAddress, Place::Volume(n), n, 0);
        }
        assert_eq!(report.findings().len(), FINDINGS_LISTED_MAX);
        assert_eq!(report.count(Severity::Corrupt), 20_000);
    }
}
