//! Directories: their entries, who is reached by them, and link counts.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

use block::DiskError;

use super::files::{FD_BYTES, FileState, NO_PARENT, addresses};
use super::span::Span;
use super::{Checker, Place, Severity, Unit, What};
use crate::format::{Address, DIR_ENTRY_BYTES, DirEntry5, FdAddress, FdMeta, Zla, view};

/// Blocks of one directory that are looked at. With 1 MiB blocks that is room for 30 million entries.
const DIRECTORY_BLOCKS_MAX: usize = 4096;

/// Files of which the path is looked up.
const PATHS_MAX: usize = 256;
/// Directories within each other that a path shows.
const DEPTH_MAX: u32 = 100;

/// A directory as far as it was read.
struct Listing {
    number: u64,
    fd: FdAddress,
    /// Entries met so far.
    index: u64,
    /// Hashes of the names met so far.
    names: HashSet<u64>,
}

/// A further entry to a directory.
pub(super) struct SecondName {
    /// Number of the directory.
    directory: u64,
    /// Number of the directory with the entry, and its index there.
    parent: u64,
    index: u64,
    place: Place,
}

/// Reads a directory's entries in order.
struct DirectoryReader {
    /// Volume offsets of the blocks to come.
    blocks: std::vec::IntoIter<u64>,
    /// Bytes of a block.
    unit: u64,
    /// The block under way: its volume offset and how much of it was read.
    block: Option<(u64, u64)>,
    /// Bytes of the directory that were not read yet.
    left: u64,
    /// The first part of an entry whose rest is to come.
    carry: Vec<u8>,
}

impl DirectoryReader {
    /// Some whole entries, or `None` at the end.
    async fn next(&mut self, span: &Span) -> Result<Option<Vec<u8>>, DiskError> {
        while self.left > 0 {
            let (at, done) = match self.block.take() {
                Some(block) => block,
                None => match self.blocks.next() {
                    Some(at) => (at, 0),
                    None => return Ok(None),
                },
            };
            let count = (self.unit - done).min(64 << 10).min(self.left.next_multiple_of(512));
            let bytes = span.get(at + done, count as usize).await?;
            let useful = count.min(self.left);
            self.left -= useful;
            if done + count < self.unit {
                self.block = Some((at, done + count));
            }
            self.carry.extend_from_slice(&bytes[..useful as usize]);
            let rest = self.carry.split_off(self.carry.len() - self.carry.len() % DIR_ENTRY_BYTES as usize);
            let whole = std::mem::replace(&mut self.carry, rest);
            if !whole.is_empty() {
                return Ok(Some(whole));
            }
        }
        Ok(None)
    }
}

impl Checker<'_> {
    /// Reads all directories that a way leads to from the root.
    pub async fn directories(&mut self) -> Result<(), DiskError> {
        let mut ahead = VecDeque::from([0]);
        while let Some(number) = ahead.pop_front() {
            let state = self.states.get(number as usize).copied().unwrap_or_default();
            if state.sound && state.is_directory {
                self.directory(number, &mut ahead).await?;
            }
        }
        Ok(())
    }

    /// Checks the entries of one directory; those of further directories go to `ahead`.
    async fn directory(&mut self, number: u64, ahead: &mut VecDeque<u64>) -> Result<(), DiskError> {
        let Some((fd, mut reader)) = self.open_directory(number).await? else { return Ok(()) };
        if reader.left < 2 * DIR_ENTRY_BYTES || !reader.left.is_multiple_of(DIR_ENTRY_BYTES) {
            let expected = "at least two entries of 140 bytes, and whole ones";
            self.report.corrupt(What::WrongLength, Place::File(fd), reader.left, expected);
        }
        let mut listing = Listing { number, fd, index: 0, names: HashSet::new() };
        while let Some(bytes) = self.more(&mut reader).await? {
            for raw in bytes.chunks_exact(DIR_ENTRY_BYTES as usize) {
                if let Some(entry) = view::<DirEntry5>(raw) {
                    ahead.extend(self.entry(&mut listing, entry));
                }
            }
        }
        Ok(())
    }

    /// Some further entries of a directory. On a hostile volume many directories may claim the same blocks: what is
    /// read of all together is bounded.
    async fn more(&mut self, reader: &mut DirectoryReader) -> Result<Option<Vec<u8>>, DiskError> {
        if self.directory_bytes_left == 0 {
            self.report.cut_short = true;
            return Ok(None);
        }
        let bytes = reader.next(&self.volume.span).await?;
        let count = bytes.as_ref().map_or(0, |bytes| bytes.len() as u64);
        self.directory_bytes_left = self.directory_bytes_left.saturating_sub(count);
        Ok(bytes)
    }

    async fn open_directory(&self, number: u64) -> Result<Option<(FdAddress, DirectoryReader)>, DiskError> {
        let Some(at) = self.resources(Unit::Descriptor).and_then(|fdc| fdc.resource_at(number)) else {
            return Ok(None);
        };
        let raw = self.volume.span.get(at, FD_BYTES as usize).await?;
        let Some(meta) = view::<FdMeta>(&raw[512..]).filter(|meta| meta.block_bytes.get() >= 512) else {
            return Ok(None);
        };
        let blocks = self.directory_blocks(meta, &raw[1024..]).await?;
        let (unit, left) = (meta.block_bytes.get(), meta.length.get());
        let reader =
            DirectoryReader { blocks: blocks.into_iter(), unit, block: None, left, carry: Vec::new() };
        Ok(Some((FdAddress(meta.address.get()), reader)))
    }

    /// Paths of the files that findings speak of, as far as they can be had.
    pub async fn paths(&mut self) -> Result<(), DiskError> {
        let mut wanted = BTreeSet::new();
        for fd in self.report.findings().iter().filter_map(|finding| finding.place.file()) {
            if wanted.len() < PATHS_MAX {
                wanted.extend(self.number_of(fd));
            }
        }
        // What leads to them, each only once.
        let mut upwards: Vec<u64> = wanted.iter().copied().collect();
        while let Some(number) = upwards.pop() {
            let parent = self.states.get(number as usize).map_or(NO_PARENT, |state| state.parent);
            if parent != NO_PARENT && wanted.insert(parent.into()) {
                upwards.push(parent.into());
            }
        }
        let mut names: BTreeMap<u64, String> = BTreeMap::new();
        let parents: BTreeSet<u32> = wanted.iter().map(|n| self.states[*n as usize].parent).collect();
        for parent in parents.into_iter().filter(|parent| *parent != NO_PARENT) {
            let Some((_, mut reader)) = self.open_directory(parent.into()).await? else { continue };
            while let Some(bytes) = self.more(&mut reader).await? {
                for entry in bytes.chunks_exact(DIR_ENTRY_BYTES as usize).filter_map(view::<DirEntry5>) {
                    let name = String::from_utf8_lossy(entry.name_bytes());
                    let target = FdAddress::decode(entry.fd.get()).and_then(|fd| self.number_of(fd));
                    let Some(target) = target.filter(|n| wanted.contains(n)) else { continue };
                    if name != "." && name != ".." && self.states[target as usize].parent == parent {
                        names.entry(target).or_insert(name.into_owned());
                    }
                }
            }
        }
        for number in wanted {
            let mut path = String::new();
            let (mut at, mut steps) = (number, 0);
            while let Some(name) = names.get(&at).filter(|_| at != 0 && steps < DEPTH_MAX) {
                path = format!("/{name}{path}");
                at = self.states[at as usize].parent.into();
                steps += 1;
            }
            if at == 0 {
                self.report.paths.insert(self.fd_of(number), if path.is_empty() { "/".into() } else { path });
            }
        }
        Ok(())
    }

    /// Volume offsets of a directory's blocks, up to the first hole or the end of its length.
    async fn directory_blocks(&self, meta: &FdMeta, data: &[u8]) -> Result<Vec<u64>, DiskError> {
        let unit = meta.block_bytes.get();
        let needed = (meta.length.get().div_ceil(unit) as usize).min(DIRECTORY_BLOCKS_MAX);
        let mut list: Vec<u32> = Vec::new();
        match Zla::decode(meta.zla.get()) {
            Some(Zla::FileBlocks | Zla::SubBlocks) => list.extend(addresses(data).take(needed)),
            Some(Zla::Single) => {
                for raw in addresses(data) {
                    if list.len() >= needed {
                        break;
                    }
                    let Some(Address::PointerBlock { cluster, resource, second: false, .. }) =
                        Address::decode32(raw)
                    else {
                        break;
                    };
                    let pbc = self.resources(Unit::PointerBlock);
                    let at = pbc.and_then(|pbc| pbc.resource_at(pbc.number(cluster, resource)?));
                    let Some(at) = at else { break };
                    list.extend(addresses(&self.volume.span.get(at, 4096).await?));
                }
            }
            _ => {}
        }
        list.truncate(needed);
        let places = list.into_iter().map_while(|raw| match Address::decode32(raw)? {
            Address::FileBlock { block, tbz: false, .. } => {
                let fbb = self.resources(Unit::FileBlock)?;
                (block < fbb.geometry.count).then_some(block * self.block_bytes)
            }
            Address::SubBlock { cluster, resource, .. } => {
                let sbc = self.resources(Unit::SubBlock)?;
                sbc.resource_at(sbc.number(cluster, resource)?)
            }
            _ => None,
        });
        Ok(places.collect())
    }

    /// Checks one entry; the number of the directory it leads to, if it is one that nothing led to before.
    fn entry(&mut self, listing: &mut Listing, entry: &DirEntry5) -> Option<u64> {
        let index = listing.index;
        listing.index += 1;
        if entry.fd.get() == 0 && index > 1 {
            return None; // a gap, which every reader skips
        }
        let name = String::from_utf8_lossy(entry.name_bytes()).into_owned();
        let place = Place::Entry { directory: listing.fd, index, name: name.clone() };
        if index < 2 {
            self.dots(listing, index, entry, &name, place);
            return None;
        }
        let mut hasher = DefaultHasher::new();
        entry.name_bytes().hash(&mut hasher);
        let unterminated = entry.name.iter().all(|b| *b != 0);
        if name.is_empty() || name.contains('/') || name == "." || name == ".." || unterminated {
            self.report.corrupt(
                What::BadEntry,
                place.clone(),
                "an impossible name",
                "1 to 127 bytes without slash",
            );
        } else if !listing.names.insert(hasher.finish()) {
            self.report.corrupt(What::BadEntry, place.clone(), "a name a second time", "each name once");
        }
        let (target, state) = self.target(entry, &place)?;
        let reached = &mut self.states[target as usize];
        reached.entries += 1;
        let first = reached.parent == NO_PARENT && target != 0;
        if first {
            reached.parent = listing.number as u32;
        }
        if !state.is_directory {
            return None;
        }
        self.states[listing.number as usize].directories += 1;
        if !first {
            let (parent, index) = (listing.number, index);
            self.second_names.push(SecondName { directory: target, parent, index, place });
        }
        first.then_some(target)
    }

    /// The descriptor an entry leads to, if it is one.
    fn target(&mut self, entry: &DirEntry5, place: &Place) -> Option<(u64, FileState)> {
        let raw = entry.fd.get();
        let fdc = self.resources(Unit::Descriptor)?;
        let number = FdAddress::decode(raw).and_then(|fd| fdc.number(fd.cluster().into(), fd.resource()));
        let Some(number) = number else {
            let expected = "the address of a descriptor of this volume";
            self.report.corrupt(What::EntryTarget, place.clone(), format!("{raw:#x}"), expected);
            return None;
        };
        if !fdc.allocated.get(number) {
            let found = format!("a free descriptor, {}", FdAddress(raw));
            self.report.corrupt(What::EntryTarget, place.clone(), found, "one in use");
            return None;
        }
        let state = self.states[number as usize];
        if !state.sound {
            let found = format!("no usable descriptor at {}", FdAddress(raw));
            self.report.corrupt(What::EntryTarget, place.clone(), found, "a file");
            return Some((number, state));
        }
        if state.kind != entry.kind.get() {
            let found = format!("type {}", entry.kind);
            self.report.corrupt(What::EntryTarget, place.clone(), found, format!("type {}", state.kind));
        }
        if state.generation != entry.generation.get() {
            let found = format!("generation {}", entry.generation);
            let expected = format!("generation {}", state.generation);
            self.report.corrupt(What::WrongGeneration, place.clone(), found, expected);
        }
        Some((number, state))
    }

    /// The first two entries.
    fn dots(&mut self, listing: &Listing, index: u64, entry: &DirEntry5, name: &str, place: Place) {
        let expected = if index == 0 { "." } else { ".." };
        if name != expected {
            self.report.corrupt(What::BadEntry, place.clone(), format!("{name:?}"), format!("{expected:?}"));
        }
        if index == 0 && entry.fd.get() != listing.fd.0 {
            self.report.corrupt(What::EntryTarget, place, format!("{:#x}", entry.fd), listing.fd);
            return;
        }
        self.target(entry, &place);
        if index == 1 {
            self.states[listing.number as usize].above = entry.fd.get();
        }
    }

    /// Directories with two names: on their way from one directory to another when the power was lost. Which of the
    /// two counts, their ".." says; the other one is a leak, and a repair makes it a gap.
    async fn second_names(&mut self) -> Result<(), DiskError> {
        for SecondName { directory, parent, index, place } in std::mem::take(&mut self.second_names) {
            let state = self.states[directory as usize];
            let (first, second) = (self.fd_of(state.parent.into()), self.fd_of(parent));
            // The links of both were raised before.
            let counted = |number: u64| {
                self.states.get(number as usize).is_some_and(|state| state.links >= 2 + state.directories)
            };
            let between = state.entries == 2
                && first != second
                && counted(parent)
                && state.parent != NO_PARENT
                && counted(state.parent.into());
            let expected = "one entry";
            if !between || ![first.0, second.0].contains(&state.above) {
                self.report.corrupt(What::BadEntry, place, "a second entry to a directory", expected);
                continue;
            }
            let unconfirmed = if state.above == first.0 {
                self.entry_at(parent, index).await?
            } else {
                let first = u64::from(state.parent);
                self.states[directory as usize].parent = parent as u32;
                let index = self.index_of(first, directory).await?;
                self.entry_at(first, index).await?
            };
            let found = "a directory on its way from one to another";
            self.report.add(Severity::Leak, What::BadEntry, place, found, expected);
            self.gaps.extend(unconfirmed);
        }
        Ok(())
    }

    /// Index of the entry of a directory that leads to another; behind the end when there is none.
    async fn index_of(&mut self, parent: u64, directory: u64) -> Result<u64, DiskError> {
        let Some((_, mut reader)) = self.open_directory(parent).await? else { return Ok(u64::MAX) };
        let wanted = self.fd_of(directory).0;
        let mut index = 0;
        while let Some(bytes) = self.more(&mut reader).await? {
            for entry in bytes.chunks_exact(DIR_ENTRY_BYTES as usize).filter_map(view::<DirEntry5>) {
                if entry.fd.get() == wanted && index > 1 {
                    return Ok(index);
                }
                index += 1;
            }
        }
        Ok(u64::MAX)
    }

    /// Volume offset of an entry.
    async fn entry_at(&mut self, parent: u64, index: u64) -> Result<Option<u64>, DiskError> {
        let Some((_, reader)) = self.open_directory(parent).await? else { return Ok(None) };
        let Some(byte) = index.checked_mul(DIR_ENTRY_BYTES) else { return Ok(None) };
        let block = reader.blocks.as_slice().get((byte / reader.unit) as usize);
        Ok(block.map(|block| block + byte % reader.unit))
    }

    /// Link counts and parents of what is reached, and directories that were lost.
    pub async fn links(&mut self) -> Result<(), DiskError> {
        self.second_names().await?;
        for number in 0..self.states.len() as u64 {
            let state = self.states[number as usize];
            if !state.sound {
                continue;
            }
            let place = Place::File(self.fd_of(number));
            if !self.is_reached(number) {
                if state.is_directory {
                    self.lost(number, place).await?;
                }
                continue;
            }
            if number != 0 && state.entries == 0 {
                let found = "a system file without entry";
                self.report.corrupt(What::OrphanDescriptor, place, found, "an entry in the root");
                continue;
            }
            let links = if state.is_directory { 2 + state.directories } else { state.entries };
            if state.links != links {
                // Raised before the entry is written, lowered after it is gone: too high is what a crash leaves.
                let severity = if state.links > links { Severity::Leak } else { Severity::Corrupt };
                self.report.add(severity, What::LinkCount, place.clone(), state.links, links);
                self.fixes.entry(number).or_default().links = Some(links);
            }
            if state.is_directory {
                let parent = self.fd_of(if number == 0 { 0 } else { state.parent.into() });
                if state.above != parent.0 {
                    let found = format!("\"..\" leads to {:#x}", state.above);
                    self.report.corrupt(What::EntryTarget, place, found, parent);
                }
            }
        }
        Ok(())
    }

    /// A descriptor that nothing leads to: a crash while making or deleting it, or when something took its place.
    pub fn orphan(&mut self, number: u64) {
        let place = Place::File(self.fd_of(number));
        self.refer(Unit::Descriptor, number, place.clone());
        let expected = "an entry in some directory";
        self.report.add(Severity::Leak, What::OrphanDescriptor, place, "no entry leads to it", expected);
        self.fixes.entry(number).or_default().links = Some(0);
    }

    /// A directory that nothing leads to. Only empty ones are deleted, so if it alone leads to files, no crash made
    /// this: an entry was lost, and with it those files.
    async fn lost(&mut self, number: u64, place: Place) -> Result<(), DiskError> {
        let Some((_, mut reader)) = self.open_directory(number).await? else { return Ok(()) };
        let (mut files, mut index) = (0, 0);
        while let Some(bytes) = self.more(&mut reader).await? {
            for entry in bytes.chunks_exact(DIR_ENTRY_BYTES as usize).filter_map(view::<DirEntry5>) {
                index += 1;
                let target = FdAddress::decode(entry.fd.get()).and_then(|fd| self.number_of(fd));
                let Some(state) = target.and_then(|target| self.states.get(target as usize)) else {
                    continue;
                };
                let own = state.sound && state.entries == 0 && state.generation == entry.generation.get();
                files += u64::from(own && index > 2 && target != Some(0));
            }
        }
        if files > 0 {
            let found = format!("a directory that alone leads to {files} files");
            self.report.corrupt(What::OrphanDescriptor, place, found, "an entry in some directory");
        }
        Ok(())
    }

    /// Address of the n-th descriptor.
    pub fn fd_of(&self, number: u64) -> FdAddress {
        let per_cluster =
            self.resources(Unit::Descriptor).map_or(200, |fdc| u64::from(fdc.geometry.per_cluster));
        FdAddress::new((number / per_cluster) as u32, (number % per_cluster) as u32)
    }
}
