//! Opening a volume, and finding files on it.

use crate::descriptor::{Fd, Node};
use crate::format::{
    Address, Corrupt, Expected, FS_DESCRIPTOR_OFFSET, FS_MAGIC_LOCAL, FdAddress, FsDescriptor, InodeKind,
    LockKind, ResourceGeometry, ResourceHeader, SystemFile, Zla, config_flags, ensure, fd_layout, view,
};
use crate::mount::Mark;
use crate::pointer::{Lookup, PointerCache, Tree};
use crate::resource::{BlockMap, Files, ResourceFile, Sizes, VolumeInfo};
use crate::space::Space;
use crate::write::Writer;
use crate::{Error, format};
use block::{Buffer, Disk};
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::{Rc, Weak};
use std::time::Duration;

/// What the volume is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Reading.
    Read,
    /// Reading and writing. The caller holds the devices exclusively (one writer at a time).
    Write,
}

/// How a volume is opened.
#[derive(Clone, Debug)]
pub struct Options {
    /// Reading or writing.
    pub mode: Mode,
    /// Memory for pointer blocks (bytes); one of 4 KiB maps 1 GiB of a file.
    pub pointer_cache_bytes: usize,
    /// Opening for writing when a host's heartbeat slot is in use: watch its stamp this long, and go on if it stands
    /// still (the host is dead). `None`: refuse at once.
    pub stale_after: Option<Duration>,
}

impl Options {
    /// The usual: 32 MiB of pointer blocks (32 TiB of files at random), no patience with other hosts.
    pub fn new(mode: Mode) -> Self {
        Self { mode, pointer_cache_bytes: 32 << 20, stale_after: None }
    }
}

/// An open volume. Clones are the same volume.
#[derive(Clone)]
pub struct Volume {
    pub(crate) inner: Rc<Inner>,
}

pub(crate) struct Inner {
    pub space: Space,
    pub files: Files,
    pub info: VolumeInfo,
    pub cache: PointerCache,
    pub nodes: RefCell<HashMap<FdAddress, Weak<Node>>>,
    pub writer: Option<Writer>,
}

impl Volume {
    /// Opens the volume that lies on these devices, in whatever order they come.
    pub async fn open(devices: Vec<Rc<dyn Disk>>, mode: Mode) -> Result<Self, Error> {
        Self::open_with(devices, Options::new(mode)).await
    }

    /// As [`Volume::open`], with options.
    pub async fn open_with(devices: Vec<Rc<dyn Disk>>, options: Options) -> Result<Self, Error> {
        let space = Space::open(devices).await?;
        let fs = load_superblock(&space).await?;
        let mark = match options.mode {
            Mode::Read => None,
            Mode::Write => {
                check_writable(&space, &fs)?;
                Some(Mark::enter(&space, &fs, options.stale_after).await?)
            }
        };
        let mut files = Files {
            sizes: sizes(&fs, &space),
            file_blocks: None,
            descriptors: None,
            pointer_blocks: None,
            sub_blocks: None,
            pointer_blocks2: None,
        };
        let cache = PointerCache::new(options.pointer_cache_bytes, &files.sizes);
        bootstrap(&space, &cache, &mut files).await?;
        let info = info(&fs, &files, &space);
        let writer = mark.map(|mark| Writer::new(&files, mark)).transpose()?;
        let inner = Inner { space, files, info, cache, nodes: RefCell::default(), writer };
        inner.end_shortening().await?;
        Ok(Self { inner: Rc::new(inner) })
    }

    /// What the volume is.
    pub fn info(&self) -> &VolumeInfo {
        &self.inner.info
    }

    /// The devices under it, and how they are put together.
    pub fn space(&self) -> &Space {
        &self.inner.space
    }
}

pub(crate) fn read_only(why: impl Into<String>) -> Error {
    Error::ReadOnly { why: why.into() }
}

fn check_writable(space: &Space, fs: &FsDescriptor) -> Result<(), Error> {
    let flags = fs.config.get() & !config_flags::KNOWN;
    if fs.version() == 6 {
        return Err(Error::Unsupported("writing VMFS-6"));
    }
    if flags != 0 {
        return Err(read_only(format!("config flags {flags:#x} are unknown")));
    }
    if space.devices().iter().any(|d| d.shape().read_only) {
        return Err(read_only("a device is read-only"));
    }
    Ok(())
}

async fn load_superblock(space: &Space) -> Result<FsDescriptor, Error> {
    if space.bytes() < FS_DESCRIPTOR_OFFSET + 0x200_000 {
        return Err(Error::NotVmfs);
    }
    let mut raw = Buffer::zeroed(512);
    space.read(FS_DESCRIPTOR_OFFSET, &mut raw).await?;
    let Some(fs) = view::<FsDescriptor>(&raw) else { return Err(Error::NotVmfs) };
    if fs.magic.get() != format::FS_MAGIC && fs.magic.get() != FS_MAGIC_LOCAL {
        return Err(Error::NotVmfs);
    }
    fs.check()?;
    if let Some(lvm) = space.lvm()
        && fs.lvm_uuid != lvm.uuid
    {
        let what = format!("the file system belongs to volume {}, this is {}", fs.lvm_uuid, lvm.uuid);
        return Err(Error::WrongDevices { what });
    }
    Ok(fs.clone())
}

fn sizes(fs: &FsDescriptor, space: &Space) -> Sizes {
    let version = fs.version();
    Sizes {
        version,
        block: fs.block_bytes.get(),
        sub_block: fs.sub_block_bytes.get().into(),
        pointer_block: if version == 6 { 0x1_0000 } else { 0x1000 },
        metadata: fs.metadata_bytes(),
        volume: space.bytes(),
    }
}

fn info(fs: &FsDescriptor, files: &Files, space: &Space) -> VolumeInfo {
    VolumeInfo {
        version: fs.version(),
        fs_version: (fs.major.get(), fs.minor),
        uuid: fs.uuid,
        label: fs.label_text(),
        local: fs.magic.get() == FS_MAGIC_LOCAL,
        volume_bytes: space.bytes(),
        block_bytes: files.sizes.block,
        blocks: files.sizes.volume / files.sizes.block,
        sub_block_bytes: files.sizes.sub_block,
        pointer_block_bytes: files.sizes.pointer_block,
        created_s: fs.created_s.get(),
        config: fs.config.get(),
    }
}

/// Volume offset of FD `index` of the first cluster: the FDs of system files lie one behind the other, from a place
/// that the descriptor alone tells.
async fn first_fd(space: &Space, sizes: &Sizes) -> Result<u64, Error> {
    let mut raw = Buffer::zeroed(512);
    space.read(FS_DESCRIPTOR_OFFSET, &mut raw).await?;
    let Some(fs) = view::<FsDescriptor>(&raw) else { return Err(Error::NotVmfs) };
    let first_block = if sizes.version == 6 { 0x70_0000 } else { sizes.block.max(0x40_0000) };
    let clusters = u64::from(fs.fdc_clusters_per_group.get());
    Ok(first_block + u64::from(fs.fdc_group_offset.get()) + clusters * 2 * sizes.metadata)
}

async fn bootstrap(space: &Space, cache: &PointerCache, files: &mut Files) -> Result<(), Error> {
    let sizes = files.sizes;
    let first = first_fd(space, &sizes).await?;
    let step = fd_layout::BYTES[sizes.layout()];
    // Each file needs only those before it: pointer blocks of system files first.
    let order = [
        SystemFile::PointerBlocks2,
        SystemFile::PointerBlocks,
        SystemFile::SubBlocks,
        SystemFile::Descriptors,
        SystemFile::FileBlocks,
    ];
    for file in order {
        if sizes.version == 3 && file == SystemFile::PointerBlocks2 {
            continue;
        }
        let at = first + file as u64 * step;
        let fd = Fd::load(space, &sizes, file.fd(), at).await?;
        let kind = fd.meta.kind.get();
        let system = InodeKind::System as u32;
        ensure(
            fd.kind == InodeKind::System,
            "type of a system file",
            at,
            kind.into(),
            Expected::Value(system.into()),
        )?;
        let loaded = load_resource_file(space, cache, files, file, &fd, at).await?;
        let slot = match file {
            SystemFile::PointerBlocks2 => &mut files.pointer_blocks2,
            SystemFile::PointerBlocks => &mut files.pointer_blocks,
            SystemFile::SubBlocks => &mut files.sub_blocks,
            SystemFile::Descriptors => &mut files.descriptors,
            _ => &mut files.file_blocks,
        };
        *slot = Some(loaded);
    }
    let root = files.descriptor(FdAddress::ROOT, first)?;
    ensure(root == first, "place of the root directory's FD", first, root, Expected::Value(first))?;
    Ok(())
}

async fn load_resource_file(
    space: &Space,
    cache: &PointerCache,
    files: &Files,
    file: SystemFile,
    fd: &Fd,
    at: u64,
) -> Result<ResourceFile, Error> {
    let map = load_map(space, cache, files, fd, at).await?;
    let child = files.sizes.version == 6 && file == SystemFile::FileBlocks;
    let header_at = if child { format::CHILD_HEADER_OFFSET } else { 0 };
    let missing = Corrupt {
        what: "header of a resource file",
        at,
        found: 0,
        expected: Expected::Words("a block in the file's array"),
    };
    let volume = map.span(header_at, 512).ok_or(missing)?;
    let mut raw = Buffer::zeroed(512);
    space.read(volume, &mut raw).await?;
    let Some(header) = view::<ResourceHeader>(&raw) else { return Err(Error::NotVmfs) };
    let geometry = ResourceGeometry::load(header, files.sizes.metadata as u32, volume)?;
    let (kind, wanted) = match file {
        SystemFile::FileBlocks => (LockKind::FileBlocks, 0),
        SystemFile::Descriptors => (LockKind::Descriptors, fd_layout::BYTES[files.sizes.layout()]),
        SystemFile::SubBlocks => (LockKind::SubBlocks, files.sizes.sub_block),
        SystemFile::PointerBlocks => (LockKind::PointerBlocks, files.sizes.pointer_block),
        _ => (LockKind::PointerBlocks2, files.sizes.pointer_block),
    };
    let found = u64::from(geometry.resource_bytes);
    ensure(found == wanted, "bytes of a resource", volume + 0xC, found, Expected::Value(wanted))?;
    if file == SystemFile::FileBlocks {
        let limit = files.sizes.volume / files.sizes.block;
        ensure(
            geometry.count <= limit,
            "number of file blocks",
            volume + 0x14,
            geometry.count,
            Expected::AtMost(limit),
        )?;
    }
    Ok(ResourceFile { kind, geometry, map })
}

/// The whole block list of a system file.
async fn load_map(
    space: &Space,
    cache: &PointerCache,
    files: &Files,
    fd: &Fd,
    at: u64,
) -> Result<BlockMap, Error> {
    let mut map = BlockMap::default();
    let (length, limit) = (fd.length(), files.sizes.volume);
    ensure(length <= limit, "length of a system file", at, length, Expected::AtMost(limit))?;
    ensure(
        fd.zla != Zla::Resident && fd.zla != Zla::None,
        "ZLA of a system file",
        at,
        fd.zla as u64,
        Expected::Words("blocks"),
    )?;
    let unit = 1u64 << fd.shift;
    let units = length.div_ceil(unit);
    let mut n = 0;
    while n < units {
        match (Tree { files, cache }).lookup(fd, at, n)? {
            Lookup::Unit { address: Address::FileBlock { tbz: true, .. }, found_at } => {
                let expected = Expected::Words("no to-be-zeroed block");
                return Err(
                    Corrupt { what: "block of a system file", at: found_at, found: n, expected }.into()
                );
            }
            Lookup::Unit { address, found_at } => {
                map.push(n * unit, unit, files.resolve(address, n * unit, found_at)?);
                n += 1;
            }
            Lookup::Holes { count } => n = n.saturating_add(count),
            Lookup::Need { at } => {
                cache.load(space, &files.sizes, at).await?;
            }
        }
    }
    Ok(map)
}

impl Inner {
    /// The node of FD `address`, shared with whoever has it. `at_entry` is where the address was found.
    pub async fn node(
        &self,
        address: FdAddress,
        parent: Option<FdAddress>,
        at_entry: u64,
    ) -> Result<Rc<Node>, Error> {
        if let Some(node) = self.known_node(address) {
            return Ok(node);
        }
        let at = self.files.descriptor(address, at_entry)?;
        let fd = Fd::load(&self.space, &self.files.sizes, address, at).await?;
        if fd.meta.links.get() == 0 {
            let expected = Expected::AtLeast(1);
            return Err(Corrupt { what: "links of an FD in use", at, found: 0, expected }.into());
        }
        // Another task may have loaded it meanwhile.
        if let Some(node) = self.known_node(address) {
            return Ok(node);
        }
        let node = Node::new(address, at, parent, fd);
        self.remember(&node);
        Ok(node)
    }

    pub fn known_node(&self, address: FdAddress) -> Option<Rc<Node>> {
        self.nodes.borrow().get(&address).and_then(Weak::upgrade)
    }

    pub fn remember(&self, node: &Rc<Node>) {
        let mut nodes = self.nodes.borrow_mut();
        if nodes.len() >= 1024 && nodes.len().is_power_of_two() {
            nodes.retain(|_, n| n.strong_count() > 0);
        }
        nodes.insert(node.address.get(), Rc::downgrade(node));
    }
}
