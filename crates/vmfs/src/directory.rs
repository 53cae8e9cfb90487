//! Names: directories read, paths walked, symbolic links followed.

use crate::Error;
use crate::descriptor::Node;
use crate::file::File;
use crate::format::{
    Corrupt, DIR_ENTRY_BYTES, DirEntry5, EntryName, Expected, FdAddress, InodeKind, RdmRecord, Zla,
    directory6, ensure, view,
};
use crate::volume::{Inner, Volume};
use std::rc::Rc;

/// Longest directory that is read: 479,000 entries of VMFS-5.
const DIRECTORY_LIMIT: u64 = 64 << 20;
/// Longest target of a symbolic link.
const LINK_LIMIT: u64 = 4096;
/// Links followed in one path.
const HOPS: u32 = 16;

/// What `stat` tells of a name.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Name in its directory; empty for the root.
    pub name: String,
    /// What it is.
    pub kind: InodeKind,
    /// Its descriptor.
    pub fd: FdAddress,
    /// Generation of the descriptor.
    pub generation: u32,
    /// Length (bytes); of a raw device mapping: of the LUN.
    pub length: u64,
    /// Unit of the block array (bytes).
    pub block_bytes: u64,
    /// Units allocated.
    pub blocks: u64,
    /// Of those, to be zeroed.
    pub to_be_zeroed: u64,
    /// How the array is read.
    pub zla: Zla,
    /// Links.
    pub links: u32,
    /// Permission bits.
    pub mode: u32,
    /// Owner and group.
    pub owner: (u32, u32),
    /// Last change of content, of metadata, last access: seconds since 1970.
    pub times_s: [u32; 3],
}

/// Content of a raw device mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rdm {
    /// SCSI identity of the LUN.
    pub record: RdmRecord,
    /// Length of the LUN (bytes).
    pub length: u64,
    /// Our own bytes behind the record ([`crate::RDM_TAIL_BYTES`] at most), zeroes at the end cut off; empty in
    /// mappings made by others.
    pub tail: Vec<u8>,
}

/// An entry as it stands in the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RawEntry {
    /// Position (VMFS-3 and 5): the entry is at 140 times this.
    pub index: u64,
    pub kind: u32,
    pub fd: FdAddress,
    pub generation: u32,
    pub name: String,
}

impl Volume {
    /// What is at `path`; a symbolic link is not followed.
    pub async fn entry(&self, path: &str) -> Result<Entry, Error> {
        let _turn = self.inner.names_stand_still().await;
        let node = self.inner.find(path, false).await?;
        let name = path.rsplit('/').find(|part| !part.is_empty()).unwrap_or("");
        Ok(describe(&node, name))
    }

    /// The entries of a directory, `.` and `..` left out, in the order of the directory.
    pub async fn list(&self, path: &str) -> Result<Vec<Entry>, Error> {
        let _turn = self.inner.names_stand_still().await;
        let node = self.inner.find(path, true).await?;
        self.inner.expect(&node, path, InodeKind::Directory)?;
        let mut list = Vec::new();
        for raw in self.inner.entries(&node).await? {
            if raw.name == "." || raw.name == ".." {
                continue;
            }
            let child = self.inner.child(&node, &raw).await?;
            list.push(describe(&child, &raw.name));
        }
        Ok(list)
    }

    /// The target of a symbolic link.
    pub async fn read_link(&self, path: &str) -> Result<String, Error> {
        let _turn = self.inner.names_stand_still().await;
        let node = self.inner.find(path, false).await?;
        self.inner.expect(&node, path, InodeKind::Symlink)?;
        self.inner.link_target(&node).await
    }

    /// Opens a file (symbolic links are followed).
    pub async fn open_file(&self, path: &str) -> Result<File, Error> {
        let _turn = self.inner.names_stand_still().await;
        let node = self.inner.find(path, true).await?;
        match node.kind() {
            InodeKind::File | InodeKind::System => Ok(File::new(Rc::clone(&self.inner), node)),
            _ => Err(Error::WrongKind { path: path.into(), wanted: "file" }),
        }
    }

    /// The whole content of a file of at most `limit` bytes.
    pub async fn read_file(&self, path: &str, limit: u64) -> Result<Vec<u8>, Error> {
        let file = self.open_file(path).await?;
        self.inner.read_all(&file.node, limit).await
    }

    /// A raw device mapping.
    pub async fn read_rdm(&self, path: &str) -> Result<Rdm, Error> {
        let _turn = self.inner.names_stand_still().await;
        let node = self.inner.find(path, false).await?;
        self.inner.expect(&node, path, InodeKind::Rdm)?;
        crate::rdm::load(&node)
    }
}

fn describe(node: &Node, name: &str) -> Entry {
    let state = node.state.borrow();
    let meta = &state.fd.meta;
    Entry {
        name: name.into(),
        kind: state.fd.kind,
        fd: node.address.get(),
        generation: meta.generation.get(),
        length: meta.length.get(),
        block_bytes: meta.block_bytes.get(),
        blocks: meta.blocks.get(),
        to_be_zeroed: meta.tbz(),
        zla: state.fd.zla,
        links: meta.links.get(),
        mode: meta.mode.get(),
        owner: (meta.uid.get(), meta.gid.get()),
        times_s: [meta.modified_s.get(), meta.changed_s.get(), meta.accessed_s.get()],
    }
}

/// The components of a path; `.` is skipped, `..` refused: paths come from descriptors that others wrote.
pub(crate) fn components(path: &str) -> Result<Vec<EntryName>, Error> {
    let bad = |why| Error::BadPath { path: path.into(), why };
    let mut parts = Vec::new();
    for part in path.split('/').filter(|part| !part.is_empty() && *part != ".") {
        if part == ".." {
            return Err(bad("it contains '..'"));
        }
        parts.push(EntryName::new(part).ok_or(bad("a name has 1 to 127 bytes and no NUL"))?);
    }
    Ok(parts)
}

impl Inner {
    /// A path is walked while no name changes, so that what it leads to is not removed before it is held.
    async fn names_stand_still(&self) -> Option<lane::sync::TurnGuard<'_>> {
        match &self.writer {
            Some(writer) => Some(writer.names.take().await),
            None => None,
        }
    }

    pub fn expect(&self, node: &Node, path: &str, kind: InodeKind) -> Result<(), Error> {
        let wanted = match kind {
            InodeKind::Directory => "directory",
            InodeKind::File => "file",
            InodeKind::Symlink => "symbolic link",
            InodeKind::System => "system file",
            InodeKind::Rdm => "raw device mapping",
        };
        if node.kind() == kind { Ok(()) } else { Err(Error::WrongKind { path: path.into(), wanted }) }
    }

    pub async fn root(&self) -> Result<Rc<Node>, Error> {
        self.node(FdAddress::ROOT, None, crate::format::FS_DESCRIPTOR_OFFSET).await
    }

    /// The node of an entry; its type and generation must be those of the entry.
    pub async fn child(&self, directory: &Node, raw: &RawEntry) -> Result<Rc<Node>, Error> {
        let node = self.node(raw.fd, Some(directory.address.get()), directory.at.get()).await?;
        let (generation, kind, at) = {
            let state = node.state.borrow();
            (state.fd.meta.generation.get(), state.fd.kind as u32, node.at.get())
        };
        let expected = Expected::Value(generation.into());
        ensure(
            raw.generation == generation,
            "generation in a directory entry",
            at,
            raw.generation.into(),
            expected,
        )?;
        ensure(
            raw.kind == kind,
            "type in a directory entry",
            at,
            raw.kind.into(),
            Expected::Value(kind.into()),
        )?;
        node.parent.set(Some(directory.address.get()));
        Ok(node)
    }

    /// Walks `path` from the root. Links on the way are followed, the last one when `follow`.
    pub async fn find(&self, path: &str, follow: bool) -> Result<Rc<Node>, Error> {
        let mut rest: Vec<EntryName> = components(path)?;
        rest.reverse();
        let mut way = vec![self.root().await?];
        let mut hops = 0;
        while let Some(name) = rest.pop() {
            let Some(directory) = way.last() else { break };
            self.expect(directory, path, InodeKind::Directory)?;
            let not_found = || Error::NotFound { path: path.into() };
            let raw = self.lookup(directory, name.as_str()).await?.ok_or_else(not_found)?;
            let child = self.child(directory, &raw).await?;
            if child.kind() != InodeKind::Symlink || (rest.is_empty() && !follow) {
                way.push(child);
                continue;
            }
            hops += 1;
            if hops > HOPS {
                return Err(Error::BadPath { path: path.into(), why: "too many symbolic links" });
            }
            let target = self.link_target(&child).await?;
            let (absolute, parts) = self.link_parts(&target, path)?;
            if absolute {
                way.truncate(1);
            }
            rest.extend(parts.into_iter().rev());
        }
        way.pop().ok_or_else(|| Error::NotFound { path: path.into() })
    }

    pub async fn link_target(&self, node: &Node) -> Result<String, Error> {
        let bytes = self.read_all(node, LINK_LIMIT).await?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// A link's target on this volume: relative, or `/vmfs/volumes/LABEL-OR-UUID/...`.
    fn link_parts(&self, target: &str, path: &str) -> Result<(bool, Vec<EntryName>), Error> {
        let Some(rest) = target.strip_prefix("/vmfs/volumes/") else {
            if target.starts_with('/') {
                return Err(Error::BadPath { path: path.into(), why: "a link leads off the volume" });
            }
            return Ok((false, components(target)?));
        };
        let (volume, rest) = rest.split_once('/').unwrap_or((rest, ""));
        if volume != self.info.label && volume != self.info.uuid.to_string() {
            return Err(Error::BadPath { path: path.into(), why: "a link leads to another volume" });
        }
        Ok((true, components(rest)?))
    }

    /// All entries, `.` and `..` included.
    pub async fn entries(&self, directory: &Node) -> Result<Vec<RawEntry>, Error> {
        let content = self.read_all(directory, DIRECTORY_LIMIT).await?;
        if self.files.sizes.version == 6 {
            return Ok(entries6(&content, directory.at.get())?);
        }
        Ok(entries5(&content, directory.at.get())?)
    }

    pub async fn lookup(&self, directory: &Node, name: &str) -> Result<Option<RawEntry>, Error> {
        Ok(self.entries(directory).await?.into_iter().find(|entry| entry.name == name))
    }
}

/// Entries of a directory of VMFS-3 or 5 whose FD lies at `at`.
pub(crate) fn entries5(content: &[u8], at: u64) -> Result<Vec<RawEntry>, Corrupt> {
    let length = content.len() as u64;
    let whole = Expected::Words("a multiple of 140");
    ensure(length.is_multiple_of(DIR_ENTRY_BYTES), "length of a directory", at, length, whole)?;
    let mut list = Vec::new();
    for (index, bytes) in content.chunks_exact(DIR_ENTRY_BYTES as usize).enumerate() {
        let Some(entry) = view::<DirEntry5>(bytes) else { break };
        let raw = entry.fd.get();
        if raw == 0 {
            continue;
        }
        let expected = Expected::Words("the address of an FD");
        let fd = FdAddress::decode(raw).ok_or(Corrupt {
            what: "directory entry",
            at,
            found: raw.into(),
            expected,
        })?;
        let index = index as u64;
        let name = entry_name(entry.name_bytes(), at, index)?;
        list.push(RawEntry { index, kind: entry.kind.get(), fd, generation: entry.generation.get(), name });
    }
    Ok(list)
}

fn entry_name(bytes: &[u8], at: u64, found: u64) -> Result<String, Corrupt> {
    let expected = Expected::Words("a name of 1 to 127 bytes without '/'");
    let fine = !bytes.is_empty() && bytes.len() <= 255 && !bytes.contains(&b'/');
    ensure(fine, "name in a directory entry", at, found, expected)?;
    Ok(String::from_utf8_lossy(bytes).into_owned())
}

/// Entries of a directory of VMFS-6: the two in the header, then all entry blocks.
pub(crate) fn entries6(content: &[u8], at: u64) -> Result<Vec<RawEntry>, Corrupt> {
    use directory6::{
        BLOCK_BYTES, BLOCK_HEAD_BYTES, BlockHead, ENTRIES_PER_BLOCK, HEADER_BYTES, Header, VERSION,
    };
    let short = Corrupt {
        what: "length of a directory",
        at,
        found: content.len() as u64,
        expected: Expected::AtLeast(HEADER_BYTES),
    };
    let header = view::<Header>(content).ok_or(short.clone())?;
    let version = header.version.get();
    ensure(
        version == VERSION,
        "version of a directory",
        at,
        version.into(),
        Expected::Value(VERSION.into()),
    )?;
    let mut list = Vec::new();
    push6(&header.dot, &mut list, at)?;
    push6(&header.dotdot, &mut list, at)?;
    let blocks = content.get(HEADER_BYTES as usize..).ok_or(short)?;
    for bytes in blocks.chunks_exact(BLOCK_BYTES as usize) {
        let Some(head) = view::<BlockHead>(bytes) else { break };
        if head.version.get() != 1 || head.kind.get() != 1 {
            continue;
        }
        for slot in 0..ENTRIES_PER_BLOCK {
            let free = head.bitmap[slot as usize / 8] >> (slot % 8) & 1 == 1;
            let start = (BLOCK_HEAD_BYTES + slot * size_of::<directory6::Entry>() as u64) as usize;
            if let Some(entry) = bytes.get(start..).and_then(view::<directory6::Entry>)
                && !free
            {
                push6(entry, &mut list, at)?;
            }
        }
    }
    Ok(list)
}

fn push6(entry: &directory6::Entry, list: &mut Vec<RawEntry>, at: u64) -> Result<(), Corrupt> {
    let raw = entry.fd.get();
    if raw == 0 {
        return Ok(());
    }
    let expected = Expected::Words("the address of an FD");
    let fd =
        FdAddress::decode(raw).ok_or(Corrupt { what: "directory entry", at, found: raw.into(), expected })?;
    let end = entry.name.iter().position(|b| *b == 0).unwrap_or(entry.name.len());
    let index = list.len() as u64;
    let name = entry_name(&entry.name[..end], at, index)?;
    list.push(RawEntry { index, kind: entry.kind.get(), fd, generation: entry.generation.get(), name });
    Ok(())
}
