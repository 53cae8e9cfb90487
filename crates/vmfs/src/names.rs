//! Changes of names: create, replace, rename, remove.
//!
//! A name appears by one write: the directory's length, behind which its entry was written before. All other changes
//! write the changed blocks of the directory elsewhere, and one write of a sector of the block array takes them into
//! use; a power loss leaves the old directory or the new one. What the directory gives up, and its length, follow.

use crate::Error;
use crate::bitmap::Run;
use crate::descriptor::Node;
use crate::directory::{RawEntry, Rdm, components, entries5};
use crate::file::{Content, File};
use crate::format::{
    Address, DIR_ENTRY_BYTES, DirEntry5, EntryName, FD_RESIDENT_BYTES, FdMeta, InodeKind, Zla,
};
use crate::inode::Draft;
use crate::volume::{Inner, Volume};
use crate::write::{Resource, now_s};
use block::{SECTOR_BYTES, Sector, Segments};
use std::rc::Rc;
use zerocopy::IntoBytes;

/// How a new file gets its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// None now; each when it is first written.
    Thin,
    /// All now, to be zeroed at first use.
    LazyZeroed,
    /// All now, zeroed now.
    EagerZeroed,
}

/// A new file for data.
#[derive(Clone, Copy, Debug)]
pub struct NewFile {
    /// Length (bytes).
    pub length: u64,
    /// How it gets its blocks.
    pub layout: Layout,
    /// The longest it will become (bytes), so that its block array fits from the start; 0: `length`.
    pub grows_to: u64,
}

/// Slots of a block array that one sector holds: what one write can change together.
const SLOTS_AT_ONCE: u64 = 128;
/// Longest directory that is changed.
const DIRECTORY_LIMIT: u64 = 64 << 20;

impl Volume {
    /// Makes a file for data: located and allocated, never resident. The name must be free. Blocks are found and
    /// zeroed while other names may change; the name appears when all of them are there.
    pub async fn create_file(&self, path: &str, new: NewFile) -> Result<File, Error> {
        let inner = &self.inner;
        let node = {
            let _turn = inner.writer()?.names.take().await;
            inner.settle_pending().await?;
            let (directory, _) = inner.free_name(path).await?;
            let draft = Draft {
                kind: InodeKind::File,
                zla: inner.zla_for(new.length.max(new.grows_to))?,
                length: new.length,
                unit: inner.files.sizes.block,
                blocks: 0,
                links: 1,
                mode: 0o644,
                tail: Vec::new(),
            };
            inner.new_node(draft, Some(directory.address.get())).await?
        };
        let units = new.length.div_ceil(inner.files.sizes.block);
        let filled = match new.layout {
            Layout::Thin => Ok(()),
            Layout::LazyZeroed => inner.preallocate(&node, 0, units, true).await,
            Layout::EagerZeroed => inner.preallocate(&node, 0, units, false).await,
        };
        let _turn = inner.writer()?.names.take().await;
        inner.settle_pending().await?;
        let place = match filled {
            Ok(()) => inner.free_name(path).await,
            Err(error) => Err(error),
        };
        let (directory, name) = match place {
            Ok(place) => place,
            Err(error) => {
                inner.reap(&node).await?;
                return Err(error);
            }
        };
        inner.publish(&directory, &name, &node, None).await?;
        node.parent.set(Some(directory.address.get()));
        inner.remember(&node);
        inner.caught_up()?;
        Ok(File::new(Rc::clone(inner), node))
    }

    /// Writes a small file as a whole. A file of this name is replaced: a power loss leaves the old or the new one.
    pub async fn write_file(&self, path: &str, content: &[u8]) -> Result<(), Error> {
        let inner = &self.inner;
        let _turn = inner.writer()?.names.take().await;
        inner.settle_pending().await?;
        let (directory, name) = inner.parent_of(path).await?;
        let old = inner.replaceable(&directory, &name, path, InodeKind::File).await?;
        let node = inner.new_small(InodeKind::File, content, 0o644, &directory).await?;
        inner.publish(&directory, &name, &node, old).await?;
        inner.caught_up()
    }

    /// Makes a symbolic link.
    pub async fn make_symlink(&self, path: &str, target: &str) -> Result<(), Error> {
        let inner = &self.inner;
        let _turn = inner.writer()?.names.take().await;
        inner.settle_pending().await?;
        let limit = inner.files.sizes.sub_block.min(4096);
        let bytes = target.len() as u64;
        if bytes > limit || bytes == 0 {
            return Err(Error::TooLarge { what: "target of a symbolic link", bytes, limit });
        }
        let (directory, name) = inner.free_name(path).await?;
        let node = inner.new_small(InodeKind::Symlink, target.as_bytes(), 0o777, &directory).await?;
        inner.publish(&directory, &name, &node, None).await?;
        inner.caught_up()
    }

    /// Makes a raw device mapping. The name must be free.
    pub async fn create_rdm(&self, path: &str, rdm: &Rdm) -> Result<(), Error> {
        self.put_rdm(path, rdm, false).await
    }

    /// Writes a raw device mapping anew, in one step: a power loss leaves the old or the new one.
    pub async fn replace_rdm(&self, path: &str, rdm: &Rdm) -> Result<(), Error> {
        self.put_rdm(path, rdm, true).await
    }

    async fn put_rdm(&self, path: &str, rdm: &Rdm, replace: bool) -> Result<(), Error> {
        let inner = &self.inner;
        let _turn = inner.writer()?.names.take().await;
        inner.settle_pending().await?;
        let (directory, name) = inner.parent_of(path).await?;
        let old = inner.replaceable(&directory, &name, path, InodeKind::Rdm).await?;
        match (&old, replace) {
            (Some(_), false) => return Err(Error::Exists { path: path.into() }),
            (None, true) => return Err(Error::NotFound { path: path.into() }),
            _ => {}
        }
        let draft = Draft {
            kind: InodeKind::Rdm,
            zla: Zla::None,
            length: rdm.length,
            unit: 512,
            blocks: 0,
            links: 1,
            mode: 0o600,
            tail: crate::rdm::tail_bytes(rdm)?,
        };
        let node = inner.new_node(draft, Some(directory.address.get())).await?;
        inner.publish(&directory, &name, &node, old).await?;
        inner.caught_up()
    }

    /// Makes a directory.
    pub async fn make_directory(&self, path: &str) -> Result<(), Error> {
        let inner = &self.inner;
        let _turn = inner.writer()?.names.take().await;
        inner.settle_pending().await?;
        let (directory, name) = inner.free_name(path).await?;
        let node = inner.new_directory(&directory).await?;
        inner.publish(&directory, &name, &node, None).await?;
        inner.caught_up()
    }

    /// Removes a file, a link, a mapping, or an empty directory.
    pub async fn remove(&self, path: &str) -> Result<(), Error> {
        let inner = &self.inner;
        let _turn = inner.writer()?.names.take().await;
        inner.settle_pending().await?;
        let (directory, name) = inner.parent_of(path).await?;
        let not_found = || Error::NotFound { path: path.into() };
        let raw = inner.lookup(&directory, name.as_str()).await?.ok_or_else(not_found)?;
        let node = inner.child(&directory, &raw).await?;
        inner.check_removable(&node, path).await?;
        let mut entries = inner.raw_entries(&directory).await?;
        entries.swap_remove(raw.index as usize);
        match inner.rewrite(&directory, entries).await {
            Ok(()) => {}
            // A full volume: the entry becomes a gap, which every reader skips.
            // (What looked for room in vain settled: the volume is marked as open.)
            Err(Error::NoSpace { .. }) => inner.blank_entry(&directory, raw.index).await?,
            Err(error) => return Err(error),
        }
        if node.kind() == InodeKind::Directory {
            inner.change_links(&directory, -1)?;
        }
        inner.reap(&node).await?;
        inner.caught_up()
    }

    /// Gives it another name; a file, link or mapping of that name is replaced by one of its kind. Within a directory a
    /// power loss leaves the state before or after; between two, also both names (of a directory that moves: until the
    /// volume is opened for writing the next time).
    pub async fn rename(&self, from: &str, to: &str) -> Result<(), Error> {
        let inner = &self.inner;
        let _turn = inner.writer()?.names.take().await;
        inner.settle_pending().await?;
        let (source, old_name) = inner.parent_of(from).await?;
        let (target, new_name) = inner.parent_of(to).await?;
        let not_found = || Error::NotFound { path: from.into() };
        let raw = inner.lookup(&source, old_name.as_str()).await?.ok_or_else(not_found)?;
        let node = inner.child(&source, &raw).await?;
        inner.check_own(&node)?;
        let replaced = inner.replaceable(&target, &new_name, to, node.kind()).await?;
        if replaced.as_ref().is_some_and(|(_, other)| Rc::ptr_eq(other, &node)) {
            return Ok(());
        }
        if Rc::ptr_eq(&source, &target) {
            inner.rename_inside(&source, &raw, &new_name, replaced.as_ref().map(|r| r.0.index)).await?;
        } else {
            if node.kind() == InodeKind::Directory {
                inner.move_directory(&source, &raw, &target, &new_name, &node, to).await?;
            } else {
                inner.move_between(&source, &raw, &target, &new_name, &node, replaced.as_ref()).await?;
            }
        }
        node.parent.set(Some(target.address.get()));
        if let Some((_, old)) = replaced {
            inner.reap(&old).await?;
        }
        inner.caught_up()
    }
}

impl Inner {
    /// The directory of a path and its last name.
    pub async fn parent_of(&self, path: &str) -> Result<(Rc<Node>, EntryName), Error> {
        let mut parts = components(path)?;
        let why = "it names no entry";
        let name = parts.pop().ok_or(Error::BadPath { path: path.into(), why })?;
        let parent: Vec<&str> = parts.iter().map(EntryName::as_str).collect();
        let directory = self.find(&parent.join("/"), true).await?;
        self.expect(&directory, path, InodeKind::Directory)?;
        Ok((directory, name))
    }

    async fn free_name(&self, path: &str) -> Result<(Rc<Node>, EntryName), Error> {
        let (directory, name) = self.parent_of(path).await?;
        match self.lookup(&directory, name.as_str()).await? {
            None => Ok((directory, name)),
            Some(_) => Err(Error::Exists { path: path.into() }),
        }
    }

    /// What has this name, if it may be replaced by something of `kind`.
    async fn replaceable(
        &self,
        directory: &Rc<Node>,
        name: &EntryName,
        path: &str,
        kind: InodeKind,
    ) -> Result<Option<(RawEntry, Rc<Node>)>, Error> {
        let Some(raw) = self.lookup(directory, name.as_str()).await? else { return Ok(None) };
        let node = self.child(directory, &raw).await?;
        self.check_own(&node)?;
        if kind == InodeKind::Directory || node.kind() == InodeKind::Directory {
            return Err(Error::Exists { path: path.into() });
        }
        self.expect(&node, path, kind)?;
        if node.handles.get() > 0 {
            return Err(Error::InUse { path: path.into() });
        }
        Ok(Some((raw, node)))
    }

    fn check_own(&self, node: &Node) -> Result<(), Error> {
        let first_user_fd = self.files.sizes.version != 3 && node.address.get().cluster() == 0;
        let system = node.address.get().resource() < 8 && first_user_fd;
        if node.kind() == InodeKind::System || system || node.address.get().0 == 4 {
            return Err(Error::Unsupported("changing a file that the file system is made of"));
        }
        Ok(())
    }

    async fn check_removable(&self, node: &Rc<Node>, path: &str) -> Result<(), Error> {
        self.check_own(node)?;
        if node.handles.get() > 0 {
            return Err(Error::InUse { path: path.into() });
        }
        let directory = node.kind() == InodeKind::Directory;
        if directory && self.entries(node).await?.iter().any(|e| e.name != "." && e.name != "..") {
            return Err(Error::NotEmpty { path: path.into() });
        }
        Ok(())
    }

    /// The block array for a file that becomes this long.
    pub fn zla_for(&self, length: u64) -> Result<Zla, Error> {
        let sizes = &self.files.sizes;
        let per = sizes.slots_per_pointer_block();
        let direct = 256 * sizes.block;
        let (single, double) = (direct * per, direct * per * per);
        let limit = if sizes.version == 3 { single } else { double };
        match length {
            _ if length > limit => Err(Error::TooLarge { what: "file", bytes: length, limit }),
            _ if length <= direct => Ok(Zla::FileBlocks),
            _ if length <= single => Ok(Zla::Single),
            _ => Ok(Zla::Double),
        }
    }

    /// A descriptor with this content that nothing refers to yet.
    async fn new_small(
        &self,
        kind: InodeKind,
        content: &[u8],
        mode: u32,
        directory: &Rc<Node>,
    ) -> Result<Rc<Node>, Error> {
        let sizes = self.files.sizes;
        let length = content.len() as u64;
        let resident = kind == InodeKind::File && sizes.version == 5 && content.len() <= FD_RESIDENT_BYTES;
        let (zla, unit) = match length {
            _ if resident => (Zla::Resident, sizes.sub_block),
            _ if length <= sizes.sub_block => (Zla::SubBlocks, sizes.sub_block),
            _ => (Zla::FileBlocks, sizes.block),
        };
        let limit = 256 * unit;
        if length > limit {
            return Err(Error::TooLarge { what: "file written as a whole", bytes: length, limit });
        }
        let mut taken = Vec::new();
        let result = async {
            let mut tail = if resident { content.to_vec() } else { Vec::new() };
            let mut blocks = 0;
            if !resident {
                (tail, blocks) = self.place_content(content, unit, &mut taken).await?;
            }
            let draft = Draft { kind, zla, length, unit, blocks, links: 1, mode, tail };
            self.new_node(draft, Some(directory.address.get())).await
        };
        let result = result.await;
        if result.is_err() {
            self.give_back_now(taken)?;
        }
        result
    }

    /// Writes content into new blocks; answers the block array. What was taken is put in `taken`.
    pub async fn place_content(
        &self,
        content: &[u8],
        unit: u64,
        taken: &mut Vec<(Resource, Run)>,
    ) -> Result<(Vec<u8>, u64), Error> {
        let resource =
            if unit == self.files.sizes.sub_block { Resource::SubBlock } else { Resource::FileBlock };
        let (mut tail, mut goal) = (Vec::new(), None);
        for chunk in content.chunks(unit as usize) {
            let run = self.take(resource, 1, goal.filter(|_| resource == Resource::FileBlock)).await?;
            taken.push((resource, run));
            goal = Some(run.first + 1);
            let (address, at) = self.block_at(resource, run.first)?;
            self.write_block(at, chunk, unit).await?;
            tail.extend_from_slice(&address.encode32().unwrap_or(0).to_le_bytes());
        }
        let blocks = tail.len() as u64 / 4;
        Ok((tail, blocks))
    }

    /// Fills a new block: content, then zeroes.
    async fn write_block(&self, at: u64, content: &[u8], unit: u64) -> Result<(), Error> {
        let used = (content.len() as u64).next_multiple_of(SECTOR_BYTES);
        let mut buffer = block::Buffer::zeroed(used as usize);
        buffer[..content.len()].copy_from_slice(content);
        self.space.write(at, &buffer).await?;
        if used < unit {
            self.space.zero(at + used, unit - used).await?;
        }
        Ok(())
    }

    /// Undoes what was taken in memory and never became reachable.
    pub fn give_back_now(&self, taken: Vec<(Resource, Run)>) -> Result<(), Error> {
        let writer = self.writer()?;
        for (resource, run) in taken {
            writer.bitmap(resource).borrow_mut().give_back(run)?;
        }
        Ok(())
    }

    async fn new_directory(&self, parent: &Rc<Node>) -> Result<Rc<Node>, Error> {
        let unit = self.files.sizes.sub_block;
        let run = self.take(Resource::SubBlock, 1, None).await?;
        let taken = vec![(Resource::SubBlock, run)];
        let (address, at) = self.block_at(Resource::SubBlock, run.first)?;
        let draft = Draft {
            kind: InodeKind::Directory,
            zla: Zla::SubBlocks,
            length: 2 * DIR_ENTRY_BYTES,
            unit,
            blocks: 1,
            links: 2,
            mode: 0o755,
            tail: address.encode32().unwrap_or(0).to_le_bytes().to_vec(),
        };
        let node = match self.new_node(draft, Some(parent.address.get())).await {
            Ok(node) => node,
            Err(error) => {
                self.give_back_now(taken)?;
                return Err(error);
            }
        };
        let content = [entry_of(&node, "."), entry_of(parent, "..")];
        self.write_block(at, content.as_bytes(), unit).await?;
        Ok(node)
    }

    /// Gives `node` its name, in place of `old` if there is one, and makes that durable. On failure the node is no
    /// more.
    async fn publish(
        &self,
        directory: &Rc<Node>,
        name: &EntryName,
        node: &Rc<Node>,
        old: Option<(RawEntry, Rc<Node>)>,
    ) -> Result<(), Error> {
        let entry = entry_of(node, name.as_str());
        let result = match &old {
            None => {
                let subdirectory = node.kind() == InodeKind::Directory;
                self.append(directory, entry, subdirectory).await
            }
            Some((raw, _)) => self.replace_entry(directory, raw.index, entry).await,
        };
        if let Err(error) = result {
            self.reap(node).await?;
            return Err(error);
        }
        match old {
            Some((_, old)) => self.reap(&old).await,
            None => Ok(()),
        }
    }

    /// Puts another entry in the place of one.
    pub async fn replace_entry(
        &self,
        directory: &Rc<Node>,
        index: u64,
        entry: DirEntry5,
    ) -> Result<(), Error> {
        let mut entries = self.raw_entries(directory).await?;
        entries[index as usize] = entry;
        self.rewrite(directory, entries).await
    }

    /// All entries as they stand, gaps included.
    pub async fn raw_entries(&self, directory: &Rc<Node>) -> Result<Vec<DirEntry5>, Error> {
        let content = self.read_all(directory, DIRECTORY_LIMIT).await?;
        entries5(&content, directory.at.get())?;
        let entries = content.chunks_exact(DIR_ENTRY_BYTES as usize);
        Ok(entries.filter_map(crate::format::view::<DirEntry5>).cloned().collect())
    }

    /// Adds an entry behind the last one.
    pub async fn append(
        &self,
        directory: &Rc<Node>,
        entry: DirEntry5,
        subdirectory: bool,
    ) -> Result<(), Error> {
        let length = directory.length();
        let (unit, end) = (directory.state.borrow().fd.meta.block_bytes.get(), length + DIR_ENTRY_BYTES);
        self.reach(directory, (end - 1) / unit, unit).await?;
        // The last sector of the entries there, and what follows: nobody reads behind the length.
        let first = length / SECTOR_BYTES * SECTOR_BYTES;
        let mut bytes = vec![0; (end.next_multiple_of(SECTOR_BYTES) - first) as usize];
        let before = (length - first) as usize;
        self.read_bytes(directory, first, &mut bytes[..before]).await?;
        bytes[before..before + DIR_ENTRY_BYTES as usize].copy_from_slice(entry.as_bytes());
        let mut done = 0;
        while done < bytes.len() {
            let at = first + done as u64;
            let address = self.lookup_unit(directory, at / unit).await?;
            let Some(address) = address else { return Err(Error::Unsupported("a directory with holes")) };
            let count = ((unit - at % unit) as usize).min(bytes.len() - done);
            let volume = self.files.resolve(address, at, directory.at.get())? + at % unit;
            self.space.write(volume, &bytes[done..done + count]).await?;
            done += count;
        }
        {
            let mut state = directory.state.borrow_mut();
            state.fd.meta.length = end.into();
            touch(&mut state.fd.meta);
            if subdirectory {
                state.fd.meta.links = (state.fd.meta.links.get() + 1).into();
            }
        }
        self.mark_meta(directory, true)?;
        self.settle_step().await
    }

    /// Makes sure that the directory has a block for `unit`.
    async fn reach(&self, directory: &Rc<Node>, unit: u64, unit_bytes: u64) -> Result<(), Error> {
        if self.lookup_unit(directory, unit).await?.is_some() {
            return Ok(());
        }
        let full = Error::NoSpace { what: "room in the directory" };
        let zla = directory.state.borrow().fd.zla;
        let resource = match zla {
            Zla::SubBlocks => Resource::SubBlock,
            Zla::FileBlocks => Resource::FileBlock,
            _ => return Err(Error::Unsupported("changing a directory with pointer blocks")),
        };
        if unit >= SLOTS_AT_ONCE {
            return Err(full);
        }
        let run = self.take(resource, 1, None).await?;
        let (address, at) = self.block_at(resource, run.first)?;
        self.space.zero(at, unit_bytes).await?;
        {
            let mut state = directory.state.borrow_mut();
            state.fd.meta.blocks = (state.fd.meta.blocks.get() + 1).into();
        }
        self.set_slot(directory, None, unit, address)?;
        self.mark_meta(directory, true)?;
        self.settle_step().await
    }

    /// Replaces the entries by others, not more of them: changed blocks are written elsewhere and taken into use by
    /// one write. Durable when this returns.
    pub async fn rewrite(&self, directory: &Rc<Node>, entries: Vec<DirEntry5>) -> Result<(), Error> {
        let old = self.read_all(directory, DIRECTORY_LIMIT).await?;
        let length = entries.len() as u64 * DIR_ENTRY_BYTES;
        let mut new = entries.as_bytes().to_vec();
        new.resize(old.len(), 0);
        let unit = directory.state.borrow().fd.meta.block_bytes.get();
        let zla = directory.state.borrow().fd.zla;
        let resource = match zla {
            Zla::SubBlocks => Resource::SubBlock,
            Zla::FileBlocks => Resource::FileBlock,
            _ => return Err(Error::Unsupported("changing a directory with pointer blocks")),
        };
        let changed: Vec<u64> = old
            .chunks(unit as usize)
            .zip(new.chunks(unit as usize))
            .zip(0u64..)
            .filter(|((a, b), _)| a != b)
            .map(|(_, index)| index)
            .collect();
        if changed.iter().any(|index| *index >= SLOTS_AT_ONCE) {
            return Err(Error::Unsupported("a directory of more than 128 blocks"));
        }
        let mut taken = Vec::new();
        let switches = self.shadow(directory, &new, &changed, length, (resource, unit), &mut taken).await;
        let switches = match switches {
            Ok(switches) => switches,
            Err(error) => {
                self.give_back_now(taken)?;
                return Err(error);
            }
        };
        self.switch(directory, switches, length).await
    }

    /// Writes the changed blocks elsewhere: (index, new address or hole, old address).
    async fn shadow(
        &self,
        directory: &Rc<Node>,
        content: &[u8],
        changed: &[u64],
        length: u64,
        (resource, unit): (Resource, u64),
        taken: &mut Vec<(Resource, Run)>,
    ) -> Result<Vec<(u64, Address, Option<Address>)>, Error> {
        let mut switches = Vec::new();
        for index in changed {
            let old = self.lookup_unit(directory, *index).await?;
            if let Some((resource, number)) = old.and_then(|a| self.resource_of(a)) {
                self.load_bits(resource, Run { first: number, count: 1 }).await?;
            }
            // A block behind the new end is given up; the first always stays.
            if *index > 0 && index * unit >= length {
                switches.push((*index, Address::Hole, old));
                continue;
            }
            let run = self.take(resource, 1, None).await?;
            taken.push((resource, run));
            let (address, at) = self.block_at(resource, run.first)?;
            let start = (index * unit) as usize;
            let stop = (start + unit as usize).min(content.len());
            self.write_block(at, &content[start..stop], unit).await?;
            switches.push((*index, address, old));
        }
        Ok(switches)
    }

    async fn switch(
        &self,
        directory: &Rc<Node>,
        switches: Vec<(u64, Address, Option<Address>)>,
        length: u64,
    ) -> Result<(), Error> {
        let mut given_up = 0;
        let mut frees = Vec::new();
        for (index, address, old) in switches {
            self.set_slot(directory, None, index, address)?;
            given_up += u64::from(address == Address::Hole && old.is_some());
            if let Some((resource, number)) = old.and_then(|a| self.resource_of(a)) {
                frees.push((resource, Run { first: number, count: 1 }));
            }
        }
        self.writer()?.free_after_round(frees);
        self.settle_step().await?;
        {
            let mut state = directory.state.borrow_mut();
            state.device_length = length;
            let meta = &mut state.fd.meta;
            meta.length = length.into();
            meta.blocks = meta.blocks.get().saturating_sub(given_up).into();
            touch(meta);
        }
        self.mark_meta(directory, false)
    }

    /// Makes an entry a gap, in place: four bytes within a sector.
    pub async fn blank_entry(&self, directory: &Rc<Node>, index: u64) -> Result<(), Error> {
        let byte = index * DIR_ENTRY_BYTES + 4;
        let sector = Sector(byte / SECTOR_BYTES);
        let mut bytes = vec![0; SECTOR_BYTES as usize];
        self.read_bytes(directory, sector.bytes(), &mut bytes).await?;
        let inside = (byte % SECTOR_BYTES) as usize;
        bytes[inside..inside + 4].fill(0);
        for place in self.locate(directory, sector, 1, 1).await? {
            if let Content::Data { device, at } = place.content {
                let device = &self.space.devices()[device];
                device.write(at, &Segments::new(&bytes), block::Safe::AtNextFlush).await?;
            }
        }
        self.space.flush().await
    }

    pub fn change_links(&self, node: &Rc<Node>, by: i32) -> Result<(), Error> {
        {
            let mut state = node.state.borrow_mut();
            let links = state.fd.meta.links.get();
            state.fd.meta.links = links.saturating_add_signed(by).into();
        }
        self.mark_meta(node, false)
    }

    async fn rename_inside(
        &self,
        directory: &Rc<Node>,
        raw: &RawEntry,
        name: &EntryName,
        replaced: Option<u64>,
    ) -> Result<(), Error> {
        let mut entries = self.raw_entries(directory).await?;
        let entry = &mut entries[raw.index as usize];
        *entry = DirEntry5::new(raw.kind, raw.fd, raw.generation, name.as_str());
        if let Some(index) = replaced {
            entries.swap_remove(index as usize);
        }
        self.rewrite(directory, entries).await
    }
}

pub(crate) fn entry_of(node: &Node, name: &str) -> DirEntry5 {
    let state = node.state.borrow();
    DirEntry5::new(state.fd.kind as u32, node.address.get(), state.fd.meta.generation.get(), name)
}

fn touch(meta: &mut FdMeta) {
    let now = now_s();
    meta.modified_s = now.into();
    meta.changed_s = now.into();
}
