//! Checks a VMFS-3 or VMFS-5 volume: everything that its structures say twice must be said alike.
//!
//! The order: the volume manager's tables; the file system descriptor; heartbeats; the system files; all cluster
//! headers; all directories from the root on; link counts; all descriptors that something leads to, with their block
//! lists; and last, what the bitmaps say against what the files say. Memory is two bits for each resource and some 40 bytes for each descriptor.
//!
//! Three severities: [`Severity::Corrupt`] is a contradiction that no crash of ours leaves behind, [`Severity::Leak`]
//! is space lost by a crash, which [`Options::repair_leaks`] gives back, [`Severity::Note`] is worth knowing.

mod directories;
mod files;
mod lvm;
mod repair;
mod report;
mod resources;
mod span;

use std::collections::BTreeMap;
use std::rc::Rc;

use block::{Disk, DiskError};

use crate::format::{
    Address, Corrupt, FS_DESCRIPTOR_OFFSET, FS_MAGIC_LOCAL, FdAddress, FdMeta, FsDescriptor, GROUP0_OFFSET,
    HEARTBEAT_FREE, HEARTBEAT_IN_USE, HEARTBEAT_OFFSET, Heartbeat, RdmRecord, SystemFile, Zla,
    heartbeat_slots, view,
};
use directories::SecondName;
use files::{FD_BYTES, FileState, Twice, addresses};
pub use report::{Finding, Place, Report, Severity, Totals, Unit, What};
use resources::Resources;

/// Blocks of one system file that are followed.
const SYSTEM_FILE_BLOCKS_MAX: usize = 4096;

/// Bytes of directories that are read: 50 times what the most files that a volume can have need.
const DIRECTORY_BYTES_MAX: u64 = 1 << 30;

/// How to check.
#[derive(Copy, Clone, Default)]
pub struct Options<'a> {
    /// Give back what a crash leaked. Nothing is written while anything is corrupt, and nothing else is changed.
    pub repair_leaks: bool,
    /// Asked for each raw device mapping; what the caller knows better (the descriptor, the LUN) it can say here.
    pub mapping: Option<&'a JudgeMapping<'a>>,
}

/// Says what is wrong with a mapping, if anything is.
pub type JudgeMapping<'a> = dyn Fn(&Mapping) -> Option<MappingFault> + 'a;

/// A raw device mapping as it stands on the volume.
#[derive(Clone, Debug)]
pub struct Mapping {
    /// Its file descriptor.
    pub fd: FdAddress,
    /// The SCSI identity recorded in it.
    pub record: RdmRecord,
    /// The length recorded for the LUN, in bytes.
    pub length_bytes: u64,
}

/// Why a mapping's record is wrong.
#[derive(Clone, Debug)]
pub struct MappingFault {
    /// What the record says.
    pub found: String,
    /// What descriptor or LUN say.
    pub expected: String,
}

/// Why a volume could not be checked. (A report with findings is not an error.)
#[derive(Clone, Debug, thiserror::Error)]
pub enum CheckError {
    /// There is no volume manager's header and no file system on the device.
    #[error("device {device} is not part of a VMFS volume")]
    NotVmfs {
        /// Index of the device.
        device: usize,
    },
    /// A version that this checker does not know.
    #[error("{name} version {version} cannot be checked: only VMFS-3 and VMFS-5 on LVM 3 to 5")]
    Version {
        /// What has the version.
        name: &'static str,
        /// The version found.
        version: u32,
    },
    /// A device could not be read or written.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// Exit code of a program that checks: [`Report::exit_code`], and 1 when it could not check.
pub fn exit_code(outcome: &Result<Report, CheckError>) -> u8 {
    outcome.as_ref().map_or(1, Report::exit_code)
}

/// Checks the volume on `devices` (in any order), which nobody else may write to meanwhile.
///
/// # Errors
/// See [`CheckError`]. What is wrong with the volume is in the report.
pub async fn check(devices: Vec<Rc<dyn Disk>>, options: Options<'_>) -> Result<Report, CheckError> {
    let pass = one_pass(devices.clone(), options).await?;
    if !options.repair_leaks || pass.report.worst() != Some(Severity::Leak) || pass.report.cut_short {
        return Ok(pass.report);
    }
    let mut leaks = pass.report.findings().to_vec();
    leaks.retain(|finding| finding.severity == Severity::Leak);
    repair::repair(pass, devices.clone(), options).await?;
    let mut after = one_pass(devices, options).await?.report;
    after.repaired = leaks;
    Ok(after)
}

/// One look at everything, nothing changed.
async fn one_pass(devices: Vec<Rc<dyn Disk>>, options: Options<'_>) -> Result<Checker<'_>, CheckError> {
    let mut report = Report::default();
    let volume = lvm::assemble(devices, &mut report).await?;
    let mut checker = Checker {
        options,
        report,
        volume,
        version: 5,
        block_bytes: 1 << 20,
        sub_block_bytes: 8192,
        journals: Vec::new(),
        resources: [const { None }; 5],
        states: Vec::new(),
        fixes: BTreeMap::new(),
        second_names: Vec::new(),
        gaps: Vec::new(),
        twice: BTreeMap::new(),
        directory_bytes_left: DIRECTORY_BYTES_MAX,
        hunting: false,
    };
    checker.run().await?;
    Ok(checker)
}

/// What a crash left too high in a descriptor.
#[derive(Copy, Clone, Default)]
struct Fix {
    /// The right link count.
    links: Option<u32>,
    /// The right counts of blocks and of to-be-zeroed blocks.
    counts: Option<(u64, u64)>,
}

/// A check under way.
struct Checker<'a> {
    options: Options<'a>,
    report: Report,
    volume: lvm::Volume,
    version: u8,
    block_bytes: u64,
    sub_block_bytes: u64,
    /// File blocks that mounted hosts use as journals.
    journals: Vec<u64>,
    resources: [Option<Resources>; 5],
    states: Vec<FileState>,
    /// What a repair would write into descriptors, by their number.
    fixes: BTreeMap<u64, Fix>,
    /// Further entries to directories.
    second_names: Vec<SecondName>,
    /// Volume offsets of entries that a repair makes gaps.
    gaps: Vec<u64>,
    /// Resources that were met again, and later their first owners.
    twice: BTreeMap<(Unit, u64), Twice>,
    /// Bytes of directories that may still be read.
    directory_bytes_left: u64,
    /// The files are gone through a second time, for the first owners alone.
    hunting: bool,
}

impl Checker<'_> {
    fn resources(&self, unit: Unit) -> Option<&Resources> {
        self.resources[unit as usize].as_ref()
    }

    fn resources_mut(&mut self, unit: Unit) -> Option<&mut Resources> {
        self.resources[unit as usize].as_mut()
    }

    async fn run(&mut self) -> Result<(), CheckError> {
        if !self.file_system().await? {
            self.report.cut_short = true;
            return Ok(());
        }
        self.heartbeats().await?;
        self.system_files().await?;
        let Some(fdc) = self.resources(Unit::Descriptor) else {
            self.report.cut_short = true;
            return Ok(());
        };
        self.states = vec![FileState::default(); fdc.geometry.count as usize];
        for resources in self.resources.iter_mut().flatten() {
            resources.load_clusters(&self.volume.span, &mut self.report).await?;
        }
        self.survey().await?;
        self.directories().await?;
        self.links().await?;
        self.refer_to_journals();
        self.files().await?;
        self.first_owners().await?;
        self.paths().await?;
        let units = [Unit::FileBlock, Unit::SubBlock, Unit::PointerBlock, Unit::Descriptor];
        let second = (self.version >= 5).then_some(Unit::SecondPointerBlock);
        if units.into_iter().chain(second).any(|unit| self.resources(unit).is_none()) {
            // Without one of the files the others' bitmaps cannot be judged: what it holds may refer to them.
            self.report.cut_short = true;
            return Ok(());
        }
        for resources in self.resources.iter().flatten() {
            resources.compare(&mut self.report);
        }
        if let Some(fbb) = self.resources(Unit::FileBlock) {
            let (blocks, used) = (fbb.geometry.count, fbb.allocated.count());
            (self.report.totals.blocks, self.report.totals.blocks_used) = (blocks, used);
        }
        Ok(())
    }

    /// The file system descriptor; false when nothing can be built on it.
    async fn file_system(&mut self) -> Result<bool, CheckError> {
        let bytes = self.volume.span.bytes();
        let place = |offset: u64| Place::Volume(FS_DESCRIPTOR_OFFSET + offset);
        if bytes < 0x100_0000 {
            self.report.corrupt(What::Extents, Place::Volume(0), format!("{bytes} bytes"), "at least 16 MiB");
            return Ok(false);
        }
        let raw = self.volume.span.get(FS_DESCRIPTOR_OFFSET, 512).await?;
        let Some(fs) = view::<FsDescriptor>(&raw) else { return Ok(false) };
        if let Err(Corrupt { what, at, found, expected }) = fs.check() {
            let found = format!("{what} {found:#x}");
            self.report.corrupt(What::FileSystemDescriptor, Place::Volume(at), found, expected);
            return Ok(false);
        }
        self.version = fs.version();
        if self.version == 6 {
            return Err(CheckError::Version { name: "VMFS", version: 6 });
        }
        self.block_bytes = fs.block_bytes.get();
        self.sub_block_bytes = fs.sub_block_bytes.get().into();
        if let Some((uuid, snapshot)) = self.volume.identity
            && (fs.lvm_uuid != uuid || fs.lvm_snapshot_id.get() != snapshot)
        {
            let (found, expected) = (format!("on volume {}", fs.lvm_uuid), format!("volume {uuid}"));
            self.report.corrupt(What::FileSystemDescriptor, place(0xB1), found, expected);
        }
        let group = u64::from(fs.fdc_group_offset.get());
        let mut fields =
            vec![(0x9D, u64::from(fs.disk_block_bytes.get()), 512), (0xD1, group, GROUP0_OFFSET)];
        if self.version == 5 {
            let local = fs.magic.get() == FS_MAGIC_LOCAL;
            fields.push((8, fs.minor.into(), if local { 60 } else { 81 }));
            let fd = |file: SystemFile| self.first_descriptor(fs) + file as u64 * FD_BYTES;
            let [pb2, sdd] = [SystemFile::PointerBlocks2, SystemFile::SystemData];
            fields.extend([
                (0xE1, fs.pb2_offset.get(), fd(pb2)),
                (0xE9, fs.pb2_fd.get().into(), pb2.fd().0.into()),
                (0x105, fs.sdd_offset.get(), fd(sdd)),
                (0x10D, fs.sdd_fd.get().into(), sdd.fd().0.into()),
            ]);
        }
        for (offset, found, expected) in fields {
            if found != expected {
                let (found, expected) = (format!("{found:#x}"), format!("{expected:#x}"));
                self.report.corrupt(What::FileSystemDescriptor, place(offset), found, expected);
            }
        }
        Ok(true)
    }

    /// Volume offset of descriptor 0: behind header and cluster headers in the first block of `.fdc.sf`.
    fn first_descriptor(&self, fs: &FsDescriptor) -> u64 {
        let first_block = 0x40_0000_u64.next_multiple_of(fs.block_bytes.get());
        first_block + GROUP0_OFFSET + u64::from(fs.fdc_clusters_per_group.get()) * 1024
    }

    async fn heartbeats(&mut self) -> Result<(), DiskError> {
        let slots = self.volume.span.get(HEARTBEAT_OFFSET, 2048 * 512).await?;
        for (at, raw) in heartbeat_slots(self.version).zip(slots.chunks_exact(512)) {
            let Some(slot) = view::<Heartbeat>(raw) else { continue };
            let place = Place::Volume(at);
            let state = slot.state.get();
            if state != HEARTBEAT_FREE && state != HEARTBEAT_IN_USE {
                let expected = "free or in use";
                self.report.corrupt(What::Heartbeat, place, format!("state {state:#x}"), expected);
                continue;
            }
            if slot.offset.get() != at {
                let found = format!("own offset {:#x}", slot.offset);
                self.report.corrupt(What::Heartbeat, place, found, format!("{at:#x}"));
                continue;
            }
            if !slot.in_use() {
                continue;
            }
            let found = format!("in use by host {} {}", slot.host, slot.ip_text());
            self.report.note(What::Mounted, place.clone(), found, "free");
            match Address::decode32(slot.journal.get()) {
                None | Some(Address::Hole) => {}
                Some(Address::FileBlock { block, .. }) => self.journals.push(block),
                Some(other) => {
                    self.report.corrupt(What::Heartbeat, place, format!("journal {other:?}"), "a file block");
                }
            }
        }
        Ok(())
    }

    /// Finds the block lists of the five resource files and loads their headers.
    async fn system_files(&mut self) -> Result<(), DiskError> {
        let raw = self.volume.span.get(FS_DESCRIPTOR_OFFSET, 512).await?;
        let Some(fs) = view::<FsDescriptor>(&raw) else { return Ok(()) };
        let first = self.first_descriptor(fs);
        // Pointer blocks first: the lists of the others may go through them.
        let order = [
            (SystemFile::PointerBlocks, Unit::PointerBlock),
            (SystemFile::PointerBlocks2, Unit::SecondPointerBlock),
            (SystemFile::FileBlocks, Unit::FileBlock),
            (SystemFile::Descriptors, Unit::Descriptor),
            (SystemFile::SubBlocks, Unit::SubBlock),
        ];
        for (file, unit) in order {
            if self.version < 5 && unit == Unit::SecondPointerBlock {
                continue;
            }
            let fd = self.volume.span.get(first + file as u64 * FD_BYTES, FD_BYTES as usize).await?;
            let blocks = self.system_blocks(file, &fd).await?;
            let loaded =
                Resources::load(unit, &self.volume.span, blocks, self.block_bytes, &mut self.report).await?;
            if let Some(resources) = &loaded {
                self.against_volume(file, resources, &fd);
            }
            self.resources[unit as usize] = loaded;
        }
        Ok(())
    }

    /// Volume offsets of a system file's blocks, up to the first that is not one.
    async fn system_blocks(&mut self, file: SystemFile, fd: &[u8]) -> Result<Vec<u64>, DiskError> {
        let Some(meta) = view::<FdMeta>(&fd[512..]) else { return Ok(Vec::new()) };
        let mut list = Vec::new();
        let zla = Zla::decode(meta.zla.get());
        match zla {
            Some(Zla::FileBlocks) => list.extend(addresses(&fd[1024..])),
            Some(Zla::Single | Zla::SinglePb2) => {
                for raw in addresses(&fd[1024..]) {
                    let Some(Address::PointerBlock { cluster, resource, second, .. }) =
                        Address::decode32(raw)
                    else {
                        break;
                    };
                    let unit = if second { Unit::SecondPointerBlock } else { Unit::PointerBlock };
                    let at =
                        self.resources(unit).and_then(|pbc| pbc.resource_at(pbc.number(cluster, resource)?));
                    let Some(at) = at.filter(|_| list.len() < SYSTEM_FILE_BLOCKS_MAX) else { break };
                    list.extend(addresses(&self.volume.span.get(at, 4096).await?));
                }
            }
            _ => {
                let found = format!("{:#x} on {}", meta.zla, file.name());
                self.report.corrupt(What::WrongZla, Place::File(file.fd()), found, "file or pointer blocks");
            }
        }
        let blocks = self.volume.span.bytes() / self.block_bytes;
        let places = list.into_iter().map_while(|raw| match Address::decode32(raw)? {
            Address::FileBlock { block, .. } if block < blocks => Some(block * self.block_bytes),
            _ => None,
        });
        Ok(places.collect())
    }

    /// A header against what the volume's size and the file's length say.
    fn against_volume(&mut self, file: SystemFile, resources: &Resources, fd: &[u8]) {
        let place = Place::Header(resources.unit);
        let geometry = &resources.geometry;
        let expect = |report: &mut Report, what: &str, found: u64, expected: u64| {
            if found != expected {
                report.corrupt(What::ResourceHeader, place.clone(), format!("{what} {found}"), expected);
            }
        };
        let unit_bytes = match resources.unit {
            Unit::FileBlock => 0,
            Unit::SubBlock => self.sub_block_bytes,
            Unit::PointerBlock | Unit::SecondPointerBlock => 4096,
            Unit::Descriptor => FD_BYTES,
        };
        expect(&mut self.report, "resource size", geometry.resource_bytes.into(), unit_bytes);
        if resources.unit == Unit::FileBlock && self.volume.identity.is_some() {
            expect(&mut self.report, "blocks", geometry.count, self.volume.span.bytes() / self.block_bytes);
        }
        let length = view::<FdMeta>(&fd[512..]).map_or(0, |meta| meta.length.get());
        // VMFS-3 counts whole blocks of its descriptor file.
        let whole = geometry.file_bytes().next_multiple_of(self.block_bytes);
        let rounded = self.version < 5 && resources.unit == Unit::Descriptor && length == whole;
        if length != geometry.file_bytes() && !rounded {
            let expected = format!("{}, by its header", geometry.file_bytes());
            self.report.corrupt(What::WrongLength, Place::File(file.fd()), length, expected);
        }
    }
}
