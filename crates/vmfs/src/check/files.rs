//! File descriptors and what they refer to.

use block::DiskError;
use lane::sync::together;

use super::resources::{Bits, check_lock};
use super::{Checker, Mapping, Place, Severity, Unit, What};
use crate::format::{
    Address, Corrupt, FD_RESIDENT_BYTES, FdAddress, FdMeta, InodeKind, LockBlock, LockKind, RdmRecord,
    SystemFile, Zla, view,
};

/// Bytes of a descriptor.
pub(super) const FD_BYTES: u64 = 2048;
/// Bytes of a pointer block, and addresses in it.
const PB_BYTES: usize = 4096;
const PB_SLOTS: u64 = 1024;
/// Addresses in a descriptor.
const FD_SLOTS: u64 = 256;
/// Pointer blocks read at once.
const READS_AT_ONCE: usize = 32;
/// A mapping's length is that of a LUN; more than this cannot be.
const MAPPING_BYTES_MAX: u64 = 1 << 56;

/// Resources with two owners whose first is told.
const OWNERS_MAX: usize = 1000;

/// What has more than one owner.
#[derive(Default)]
pub(super) struct Twice {
    owner: Option<Place>,
    /// Index of the findings that say so.
    findings: Vec<usize>,
}

/// What is remembered of a descriptor after it was read.
#[derive(Copy, Clone, Default)]
pub(super) struct FileState {
    /// 0: not in use.
    pub kind: u32,
    pub generation: u32,
    pub links: u32,
    /// Entries that lead here, "." and ".." not counted.
    pub entries: u32,
    /// Sub-directories, by their entries.
    pub directories: u32,
    /// Number of the directory whose entry was met first.
    pub parent: u32,
    /// Raw address in this directory's "..".
    pub above: u32,
    /// It has "." and "..": a directory, or `.sdd.sf`.
    pub is_directory: bool,
    /// Its descriptor can be believed.
    pub sound: bool,
}

/// Nobody.
pub(super) const NO_PARENT: u32 = u32::MAX;

/// What a block list holds.
#[derive(Copy, Clone, Default, Debug)]
pub(super) struct Tally {
    pub blocks: u64,
    pub tbz: u64,
    pub cow: u64,
    /// One more than the largest index met.
    pub end: u64,
    /// Blocks at or behind the end of the file's length.
    pub beyond: u64,
}

/// One descriptor under the check.
pub(super) struct Subject<'a> {
    pub fd: FdAddress,
    pub meta: &'a FdMeta,
    pub kind: InodeKind,
    pub zla: Zla,
    /// The 1024 bytes behind the metadata.
    pub data: &'a [u8],
}

impl Checker<'_> {
    /// Remembers all descriptors in use, without judging: what matters depends on whether anything leads there.
    pub async fn survey(&mut self) -> Result<(), DiskError> {
        let clusters = self.resources(Unit::Descriptor).map_or(0, |fdc| fdc.geometry.clusters());
        for cluster in 0..clusters {
            for (number, raw) in self.descriptors(cluster).await? {
                let Some(meta) = view::<FdMeta>(&raw[512..]) else { continue };
                let fd = self.fd_of(number);
                let kind = meta.check(fd, 0).map(|(kind, _)| kind);
                let is_directory =
                    matches!(kind, Ok(InodeKind::Directory)) || fd == SystemFile::SystemData.fd();
                self.states[number as usize] = FileState {
                    kind: meta.kind.get(),
                    generation: meta.generation.get(),
                    links: meta.links.get(),
                    parent: NO_PARENT,
                    is_directory,
                    sound: kind.is_ok() && meta.links.get() > 0,
                    ..FileState::default()
                };
            }
        }
        Ok(())
    }

    /// The descriptors in use of one cluster: number and content.
    async fn descriptors(&self, cluster: u64) -> Result<Vec<(u64, Vec<u8>)>, DiskError> {
        let Some(fdc) = self.resources(Unit::Descriptor) else { return Ok(Vec::new()) };
        let first = cluster * u64::from(fdc.geometry.per_cluster);
        let exist = 0..fdc.geometry.in_cluster(cluster);
        let used: Vec<u32> = exist.filter(|r| fdc.allocated.get(first + u64::from(*r))).collect();
        let (Some(low), Some(high)) = (used.first().copied(), used.last().copied()) else {
            return Ok(Vec::new());
        };
        let Some(offset) = fdc.geometry.resource_offset(cluster, low) else { return Ok(Vec::new()) };
        let length = u64::from(high - low + 1) * FD_BYTES;
        let bytes = fdc.read(&self.volume.span, offset, length as usize).await?;
        let one = |resource: u32| {
            let at = u64::from(resource - low) * FD_BYTES;
            (first + u64::from(resource), bytes[at as usize..][..FD_BYTES as usize].to_vec())
        };
        Ok(used.into_iter().map(one).collect())
    }

    /// Judges every descriptor that something leads to, and follows its block list. What nothing leads to may be
    /// torn, and may share blocks with what took its place: it is an orphan, whatever it holds.
    pub async fn files(&mut self) -> Result<(), DiskError> {
        let clusters = self.resources(Unit::Descriptor).map_or(0, |fdc| fdc.geometry.clusters());
        for cluster in 0..clusters {
            for (number, raw) in self.descriptors(cluster).await? {
                if self.is_reached(number) {
                    self.file(number, &raw).await?;
                } else if self.states[number as usize].links > 0 {
                    self.orphan(number);
                }
                // Else it was given up, but not yet given back: nobody refers to it, so it shows as a leak.
            }
        }
        Ok(())
    }

    /// An entry leads there, or it is one of the system's.
    pub fn is_reached(&self, number: u64) -> bool {
        let system = if self.version >= 5 { 8 } else { 6 };
        number < system || self.states.get(number as usize).is_some_and(|state| state.entries > 0)
    }

    async fn file(&mut self, number: u64, raw: &[u8]) -> Result<(), DiskError> {
        let fd = self.fd_of(number);
        let at = self.resources(Unit::Descriptor).and_then(|fdc| fdc.resource_at(number)).unwrap_or(0);
        let (Some(lock), Some(meta)) = (view::<LockBlock>(raw), view::<FdMeta>(&raw[512..])) else {
            return Ok(());
        };
        let place = Place::File(fd);
        check_lock(lock, LockKind::Descriptor, at, place.clone(), &mut self.report);
        self.refer(Unit::Descriptor, number, place.clone());
        let (kind, zla) = match meta.check(fd, at + 512) {
            Ok(checked) => checked,
            Err(Corrupt { what, found, expected, .. }) => {
                let which = match what {
                    "FD's own address" => What::OwnAddress,
                    "ZLA" => What::WrongZla,
                    "file length" => What::WrongLength,
                    _ => What::BadDescriptor,
                };
                self.report.corrupt(which, place, format!("{what} {found:#x}"), expected);
                return Ok(());
            }
        };
        if kind != InodeKind::System && number > 0 {
            self.count(kind);
        }
        let subject = Subject { fd, meta, kind, zla, data: &raw[1024..] };
        self.fields(&subject);
        if kind == InodeKind::Rdm {
            self.mapping(&subject);
            return Ok(());
        }
        let tally = self.walk(&subject).await?;
        self.tallies(&subject, tally);
        Ok(())
    }

    fn count(&mut self, kind: InodeKind) {
        let totals = &mut self.report.totals;
        totals.files += 1;
        totals.directories += u64::from(kind == InodeKind::Directory);
        totals.mappings += u64::from(kind == InodeKind::Rdm);
    }

    /// Fields that must agree with each other.
    fn fields(&mut self, subject: &Subject<'_>) {
        let Subject { fd, meta, kind, zla, .. } = *subject;
        let place = || Place::File(fd);
        if self.version >= 5 && meta.address2.get() != fd.0 {
            self.report.corrupt(
                What::OwnAddress,
                place(),
                format!("{:#x} in its second place", meta.address2),
                fd,
            );
        }
        if meta.generation.get() == 0 {
            self.report.corrupt(What::WrongGeneration, place(), 0, "at least 1");
        }
        let unit = match zla {
            Zla::None => 512,
            Zla::SubBlocks => self.sub_block_bytes,
            Zla::Resident => meta.block_bytes.get(),
            _ => self.block_bytes,
        };
        if meta.block_bytes.get() != unit {
            self.report.corrupt(
                What::BadDescriptor,
                place(),
                format!("block size {}", meta.block_bytes),
                unit,
            );
        }
        let expected_shift = unit.trailing_zeros();
        if self.version >= 5 && u32::from(meta.block_shift) != expected_shift && zla != Zla::Resident {
            self.report.corrupt(
                What::BadDescriptor,
                place(),
                format!("block shift {}", meta.block_shift),
                expected_shift,
            );
        }
        let fits = match kind {
            InodeKind::Rdm => zla == Zla::None,
            InodeKind::Directory | InodeKind::System => !matches!(zla, Zla::None | Zla::Resident),
            InodeKind::File | InodeKind::Symlink => zla != Zla::None,
        };
        if !fits {
            self.report.corrupt(
                What::WrongZla,
                place(),
                format!("{zla:?} in a {kind:?}"),
                "one that goes with the type",
            );
        }
        let capacity = match zla {
            Zla::None => MAPPING_BYTES_MAX,
            Zla::Resident => FD_RESIDENT_BYTES as u64,
            Zla::FileBlocks | Zla::SubBlocks => FD_SLOTS * unit,
            Zla::Single | Zla::SinglePb2 => FD_SLOTS * PB_SLOTS * unit,
            Zla::Double => FD_SLOTS * PB_SLOTS * PB_SLOTS * unit,
        };
        if meta.length.get() > capacity {
            let expected = format!("at most {capacity}, what {zla:?} can hold");
            self.report.corrupt(What::WrongLength, place(), meta.length, expected);
        }
    }

    fn mapping(&mut self, subject: &Subject<'_>) {
        let Subject { fd, meta, data, .. } = *subject;
        let place = Place::File(fd);
        let length = meta.length.get();
        if length == 0 || !length.is_multiple_of(512) {
            self.report.corrupt(
                What::WrongLength,
                place.clone(),
                length,
                "a LUN's length: a multiple of 512",
            );
        }
        for (what, found) in [(What::BlockCount, meta.blocks.get()), (What::ToBeZeroedCount, meta.tbz())] {
            if found != 0 {
                self.report.corrupt(what, place.clone(), found, 0);
            }
        }
        let Some(record) = view::<RdmRecord>(data) else { return };
        let id = match record.check(0) {
            Ok((_, id)) => id,
            Err(Corrupt { what, found, expected, .. }) => {
                self.report.corrupt(What::MappingRecord, place, format!("{what} {found:#x}"), expected);
                return;
            }
        };
        if id.is_empty() || id.iter().all(|b| *b == 0) || record.id[id.len()..].iter().any(|b| *b != 0) {
            let found = format!("id of {} bytes", id.len());
            self.report.corrupt(What::MappingRecord, place, found, "an id that ends where its length says");
            return;
        }
        let mapping = Mapping { fd, record: *record, length_bytes: length };
        if let Some(fault) = self.options.mapping.and_then(|judge| judge(&mapping)) {
            self.report.corrupt(What::MappingRecord, place, fault.found, fault.expected);
        }
    }

    fn tallies(&mut self, subject: &Subject<'_>, tally: Tally) {
        let Subject { fd, meta, kind, zla, .. } = *subject;
        let place = || Place::File(fd);
        let cow = u64::from(meta.cow_low.get()) | u64::from(meta.cow_high.get()) << 32;
        let counts = [
            (What::BlockCount, meta.blocks.get(), tally.blocks),
            (What::ToBeZeroedCount, meta.tbz(), tally.tbz),
        ];
        for (what, found, actual) in counts {
            // Counts are raised before and lowered after the pointers change: too high is what a crash leaves.
            if found != actual {
                let severity = if found > actual { Severity::Leak } else { Severity::Corrupt };
                self.report.add(severity, what, place(), found, actual);
                if let Some(number) = self.number_of(fd) {
                    self.fixes.entry(number).or_default().counts = Some((tally.blocks, tally.tbz));
                }
            }
        }
        if cow != tally.cow {
            self.report.corrupt(What::CopyOnWriteCount, place(), cow, tally.cow);
        }
        let (length, unit) = (meta.length.get(), meta.block_bytes.get());
        if tally.beyond > 0 {
            let expected = format!("none behind the length, {length} bytes");
            let found = format!("{} blocks up to index {}", tally.beyond, tally.end.saturating_sub(1));
            self.report.note(What::WrongLength, place(), found, expected);
        }
        // Holes are for data; these have to be there.
        let dense = matches!(kind, InodeKind::Directory | InodeKind::System | InodeKind::Symlink);
        let needed = length.div_ceil(unit);
        if dense && zla != Zla::Resident && tally.blocks < needed {
            let found = format!("{length} bytes in {} blocks", tally.blocks);
            self.report.corrupt(What::WrongLength, place(), found, format!("{needed} blocks"));
        }
    }

    /// Follows the block list to its end, marking everything met.
    async fn walk(&mut self, subject: &Subject<'_>) -> Result<Tally, DiskError> {
        let mut tally = Tally::default();
        let list = addresses(subject.data);
        match subject.zla {
            Zla::None | Zla::Resident => {}
            Zla::FileBlocks | Zla::SubBlocks => self.leaves(subject, 0, list, &mut tally),
            Zla::Single | Zla::SinglePb2 => self.pointers(subject, 0, list, PB_SLOTS, 1, &mut tally).await?,
            Zla::Double => self.pointers(subject, 0, list, PB_SLOTS * PB_SLOTS, 2, &mut tally).await?,
        }
        Ok(tally)
    }

    /// Data blocks in a list that begins at index `first` of the file.
    fn leaves(
        &mut self,
        subject: &Subject<'_>,
        first: u64,
        list: impl Iterator<Item = u32>,
        tally: &mut Tally,
    ) {
        let end = subject.meta.length.get().div_ceil(subject.meta.block_bytes.get());
        for (index, raw) in (first..).zip(list) {
            if raw == 0 {
                continue;
            }
            let place = Place::BlockOf { file: subject.fd, index };
            let (unit, number, tbz, cow) = match (Address::decode32(raw), subject.zla) {
                (Some(Address::SubBlock { cluster, resource, cow }), Zla::SubBlocks) => {
                    let number = self.resources(Unit::SubBlock).map(|sbc| sbc.number(cluster, resource));
                    (Unit::SubBlock, number, false, cow)
                }
                (Some(Address::FileBlock { block, tbz, cow }), zla) if zla != Zla::SubBlocks => {
                    let number = self
                        .resources(Unit::FileBlock)
                        .map(|fbb| (block < fbb.geometry.count).then_some(block));
                    (Unit::FileBlock, number, tbz, cow)
                }
                _ => {
                    let expected = format!("an address that goes with {:?}", subject.zla);
                    self.report.corrupt(What::BadAddress, place, format!("{raw:#x}"), expected);
                    continue;
                }
            };
            let Some(number) = number else { continue }; // that resource file is ruined and reported
            let Some(number) = number else {
                self.report.corrupt(
                    What::BadAddress,
                    place,
                    format!("{raw:#x}"),
                    format!("a {unit} of this volume"),
                );
                continue;
            };
            tally.blocks += 1;
            tally.tbz += u64::from(tbz);
            tally.cow += u64::from(cow);
            tally.end = tally.end.max(index + 1);
            tally.beyond += u64::from(index >= end);
            self.refer(unit, number, place);
        }
    }

    /// Pointer blocks in a list; each covers `covers` blocks of the file and stands `levels` above them.
    async fn pointers(
        &mut self,
        subject: &Subject<'_>,
        first: u64,
        list: impl Iterator<Item = u32>,
        covers: u64,
        levels: u32,
        tally: &mut Tally,
    ) -> Result<(), DiskError> {
        let mut found: Vec<(u64, u64)> = Vec::new();
        for (slot, raw) in (0u64..).zip(list) {
            let index = first + slot * covers;
            if raw == 0 {
                continue;
            }
            found.extend(self.pointer_block(subject, index, raw).map(|at| (index, at)));
        }
        for batch in found.chunks(READS_AT_ONCE) {
            let span = &self.volume.span;
            let contents = together(batch.iter().map(|(_, at)| span.get(*at, PB_BYTES))).await;
            for ((index, _), content) in batch.iter().zip(contents) {
                let content = content?;
                let list = addresses(&content);
                if levels == 1 {
                    self.leaves(subject, *index, list, tally);
                } else {
                    Box::pin(self.pointers(subject, *index, list, covers / PB_SLOTS, levels - 1, tally))
                        .await?;
                }
            }
        }
        Ok(())
    }

    /// Marks a pointer block and tells where it lies, unless it was met before: its content has one owner.
    fn pointer_block(&mut self, subject: &Subject<'_>, index: u64, raw: u32) -> Option<u64> {
        let place = Place::BlockOf { file: subject.fd, index };
        let Some(Address::PointerBlock { cluster, resource, second, .. }) = Address::decode32(raw) else {
            let expected = format!("a pointer block, by {:?}", subject.zla);
            self.report.corrupt(What::BadAddress, place, format!("{raw:#x}"), expected);
            return None;
        };
        if second != (subject.zla == Zla::SinglePb2) {
            let expected = format!("an address that goes with {:?}", subject.zla);
            self.report.corrupt(What::WrongZla, place.clone(), format!("{raw:#x}"), expected);
        }
        let unit = if second { Unit::SecondPointerBlock } else { Unit::PointerBlock };
        let resources = self.resources(unit)?;
        let Some(number) = resources.number(cluster, resource) else {
            self.report.corrupt(
                What::BadAddress,
                place,
                format!("{raw:#x}"),
                format!("a {unit} of this volume"),
            );
            return None;
        };
        let at = resources.resource_at(number);
        if self.refer(unit, number, place) { None } else { at }
    }

    /// Number of a descriptor, if there is such a one.
    pub fn number_of(&self, fd: FdAddress) -> Option<u64> {
        self.resources(Unit::Descriptor)?.number(fd.cluster().into(), fd.resource())
    }

    /// Marks a resource as referred to; true (and a finding) when it was already.
    pub fn refer(&mut self, unit: Unit, number: u64, place: Place) -> bool {
        let Some(resources) = self.resources_mut(unit) else { return false };
        let again = resources.referred.set(number);
        if self.hunting {
            if let Some(twice) = self.twice.get_mut(&(unit, number)).filter(|_| !again) {
                twice.owner = Some(place);
            }
        } else if again {
            let index = self.report.findings().len();
            self.report.corrupt(What::OwnedTwice, place, format!("{unit} {number}"), "one owner");
            if self.twice.len() < OWNERS_MAX {
                self.twice.entry((unit, number)).or_default().findings.push(index);
            }
        }
        again
    }

    /// Goes through all files once more to tell who was the first owner of what has two.
    pub async fn first_owners(&mut self) -> Result<(), DiskError> {
        if self.twice.is_empty() {
            return Ok(());
        }
        let report = std::mem::take(&mut self.report);
        for resources in self.resources.iter_mut().flatten() {
            resources.referred = Bits::new(resources.geometry.count);
        }
        self.hunting = true;
        self.refer_to_journals();
        self.files().await?;
        self.hunting = false;
        self.report = report;
        for twice in std::mem::take(&mut self.twice).into_values() {
            let Some(owner) = twice.owner else { continue };
            for index in twice.findings {
                self.report.amend(index, format_args!(", which belongs to {owner}"));
            }
        }
        Ok(())
    }

    /// A mounted host's journal is a file block that only its heartbeat names.
    pub fn refer_to_journals(&mut self) {
        for block in self.journals.clone() {
            let place = Place::Resource { unit: Unit::FileBlock, number: block, count: 1 };
            self.refer(Unit::FileBlock, block, place);
        }
    }
}

/// The u32 in a list.
pub(super) fn addresses(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes.as_chunks::<4>().0.iter().map(|raw| u32::from_le_bytes(*raw))
}
