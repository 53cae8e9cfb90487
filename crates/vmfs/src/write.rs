//! What the device does not have yet, and the order in which it gets it.
//!
//! # The rule
//!
//! A change goes out in **rounds**. A round first takes a copy of everything that is pending, then
//!
//! 1. writes what nothing on the device points to: bitmap bits, new pointer blocks, raised counts (new FDs, new
//!    content of directories and file data are written before, by those who change them);
//! 2. flushes; when descriptors were taken or freed, writes their bits now, and flushes (a descriptor in use, even
//!    one that no name leads to, never refers to a free block);
//! 3. writes what makes it reachable: pointers, block arrays, lengths;
//! 4. flushes;
//! 5. only now unmaps freed blocks and, in memory, lowers counts and gives blocks back; the next round writes that, in
//!    its first step.
//!
//! So a power loss leaves resources marked used that nobody uses, counts and links that are too high, and nothing
//! else. Growing files share rounds: an allocation is pending from its commit until the next flush of any file.
//! Changes of names run one after the other and end with a round of their own.

use crate::bitmap::{Bitmap, Found, Run, load_group};
use crate::descriptor::Node;
use crate::file::File;
use crate::format::{ClusterMeta5, Corrupt, Expected, FdAddress, fd_layout};
use crate::mount::Mark;
use crate::pointer::PointerBlock;
use crate::resource::{Files, ResourceFile};
use crate::volume::{Inner, Volume, read_only};
use crate::{Error, faults};
use block::{Buffer, DiskError};
use lane::sync::{Turn, TurnGuard};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use zerocopy::IntoBytes;

/// What is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Resource {
    FileBlock = 0,
    SubBlock = 1,
    PointerBlock = 2,
    Descriptor = 3,
}

impl Resource {
    const ALL: [Self; 4] = [Self::FileBlock, Self::SubBlock, Self::PointerBlock, Self::Descriptor];

    fn file(self, files: &Files) -> Option<&ResourceFile> {
        match self {
            Self::FileBlock => files.file_blocks.as_ref(),
            Self::SubBlock => files.sub_blocks.as_ref(),
            Self::PointerBlock => files.pointer_blocks.as_ref(),
            Self::Descriptor => files.descriptors.as_ref(),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::FileBlock => "file blocks",
            Self::SubBlock => "sub-blocks",
            Self::PointerBlock => "pointer blocks",
            Self::Descriptor => "file descriptors",
        }
    }
}

/// State of a volume open for writing.
pub(crate) struct Writer {
    /// Set before anything is written that a crash could leave half done.
    pub mark: Mark,
    bitmaps: [RefCell<Bitmap>; 4],
    pending: RefCell<Pending>,
    /// A round that a thin device without room refused: it goes first, as a whole, before anything later.
    refused: RefCell<Option<Batch>>,
    /// One round at a time.
    round: Turn,
    /// One change of names at a time.
    pub names: Turn,
    running: Cell<bool>,
    requested: Cell<u64>,
    finished: Cell<u64>,
    /// A write or flush of metadata failed: the device is behind for ever.
    halted: Cell<bool>,
    clock: Cell<u64>,
}

#[derive(Default)]
struct Pending {
    nodes: BTreeMap<FdAddress, Rc<Node>>,
    pointer_blocks: BTreeMap<u64, Rc<PointerBlock>>,
    frees: Vec<(Resource, Run)>,
    /// A flush has to wait for it (else it may wait for the next round).
    urgent: bool,
}

/// A round's copy of what was pending.
#[derive(Default)]
struct Batch {
    bits: Vec<(u64, Vec<u8>)>,
    before: Vec<(u64, Vec<u8>)>,
    descriptors: Vec<(u64, Vec<u8>)>,
    after: Vec<(u64, Vec<u8>)>,
    frees: Vec<(Resource, Run)>,
    lowered: Vec<Rc<Node>>,
    /// What is being written stays in memory: who opens it meanwhile must not see what the device has.
    _nodes: Vec<Rc<Node>>,
    _pointer_blocks: Vec<Rc<PointerBlock>>,
}

impl Batch {
    fn is_empty(&self) -> bool {
        let steps = [&self.bits, &self.before, &self.descriptors, &self.after];
        steps.iter().all(|step| step.is_empty()) && self.frees.is_empty()
    }
}

impl Writer {
    pub fn new(files: &Files, mark: Mark) -> Result<Self, Error> {
        let missing =
            Corrupt { what: "resource file", at: 0, found: 0, expected: Expected::Words("all of them") };
        let open = |resource: Resource, first| match resource.file(files) {
            Some(file) => Ok(RefCell::new(Bitmap::new(file, first))),
            None => Err(missing.clone()),
        };
        // User FDs begin in cluster 1: cluster 0 is the file system's own.
        let [blocks, subs, pointers, fds] = Resource::ALL;
        let bitmaps = [open(blocks, 0)?, open(subs, 0)?, open(pointers, 0)?, open(fds, 1)?];
        Ok(Self {
            mark,
            bitmaps,
            pending: RefCell::default(),
            refused: RefCell::default(),
            round: Turn::new(),
            names: Turn::new(),
            running: Cell::new(false),
            requested: Cell::new(0),
            finished: Cell::new(0),
            halted: Cell::new(false),
            clock: Cell::new(now_us()),
        })
    }

    /// A value of the host's logical clock, each one higher than the last.
    pub fn tick(&self) -> u64 {
        self.clock.set(self.clock.get() + 1);
        self.clock.get()
    }

    pub fn bitmap(&self, resource: Resource) -> &RefCell<Bitmap> {
        &self.bitmaps[resource as usize]
    }

    /// The node's changes go out with the next round.
    pub fn node_changed(&self, node: &Rc<Node>, urgent: bool) {
        let mut pending = self.pending.borrow_mut();
        pending.nodes.insert(node.address.get(), Rc::clone(node));
        pending.urgent |= urgent;
    }

    /// The pointer block's changes go out with the next round.
    pub fn pointer_block_changed(&self, block: &Rc<PointerBlock>) {
        let mut pending = self.pending.borrow_mut();
        pending.pointer_blocks.insert(block.at, Rc::clone(block));
        pending.urgent = true;
    }

    /// These are given back when the next round has made it durable that nothing points to them.
    pub fn free_after_round(&self, list: impl IntoIterator<Item = (Resource, Run)>) {
        self.pending.borrow_mut().frees.extend(list);
    }

    fn is_pending(&self) -> bool {
        let pending = self.pending.borrow();
        !pending.nodes.is_empty()
            || !pending.pointer_blocks.is_empty()
            || !pending.frees.is_empty()
            || self.refused.borrow().is_some()
            || self.bitmaps.iter().any(|b| b.borrow().is_dirty())
    }

    fn check(&self) -> Result<(), Error> {
        if self.halted.get() { Err(DiskError::Halted.into()) } else { Ok(()) }
    }

    /// Copies what is pending, which counts as being on the device from now on.
    fn snapshot(&self, files: &Files) -> Result<Batch, Error> {
        let mut batch = Batch::default();
        let pending = std::mem::take(&mut *self.pending.borrow_mut());
        for resource in Resource::ALL {
            let Some(file) = resource.file(files) else { continue };
            for (cluster, bytes) in self.bitmap(resource).borrow_mut().take_dirty() {
                let at = file.header(cluster)? + u64::from(file.geometry.metadata_bytes);
                let step = match resource {
                    Resource::Descriptor => &mut batch.descriptors,
                    _ => &mut batch.bits,
                };
                step.push((at, bytes));
            }
        }
        for block in pending.pointer_blocks.values() {
            let dirty = block.dirty.replace(0);
            if block.fresh.replace(false) {
                batch.before.push((block.at, block.to_vec()));
                continue;
            }
            let changed = (0..32).filter(|i| dirty >> i & 1 == 1);
            batch.after.extend(changed.map(|i| (block.at + u64::from(i) * 512, block.sector(i))));
        }
        for node in pending.nodes.values() {
            copy_node(node, &mut batch, files.sizes.layout());
        }
        batch.frees = pending.frees;
        batch._nodes = pending.nodes.into_values().collect();
        batch._pointer_blocks = pending.pointer_blocks.into_values().collect();
        Ok(batch)
    }

    /// What only memory may know until a round is over.
    fn finish(&self, batch: Batch) -> Result<(), Error> {
        for (resource, run) in batch.frees {
            self.bitmap(resource).borrow_mut().give_back(run)?;
        }
        for node in batch.lowered {
            node.state.borrow_mut().dirty_meta = true;
            self.node_changed(&node, false);
        }
        Ok(())
    }
}

/// Metadata with counts not below, and a length not above, what the device's pointers will say at any moment of the
/// round; then the changed parts of the array, then the length.
fn copy_node(node: &Rc<Node>, batch: &mut Batch, layout: usize) {
    let mut state = node.state.borrow_mut();
    let at = node.at.get();
    if std::mem::take(&mut state.dirty_meta) {
        let (length, cleared) = (state.fd.length(), std::mem::take(&mut state.tbz_unsettled));
        let given_up = std::mem::take(&mut state.blocks_unsettled);
        let mut meta = state.fd.meta.clone();
        meta.set_tbz(meta.tbz() + cleared);
        meta.blocks += given_up;
        meta.length = state.device_length.min(length).into();
        let meta_at = at + fd_layout::META[layout];
        batch.before.push((meta_at, meta.as_bytes().to_vec()));
        if state.device_length < length {
            meta.length = length.into();
            batch.after.push((meta_at, meta.as_bytes().to_vec()));
        }
        state.device_length = length;
        if cleared + given_up > 0 {
            batch.lowered.push(Rc::clone(node));
        }
    }
    let dirty = std::mem::take(&mut state.dirty_tail);
    for index in (0..32).filter(|i| dirty >> i & 1 == 1) {
        let start = index as usize * 512;
        let sector = state.fd.tail[start..start + 512].to_vec();
        batch.after.push((at + fd_layout::DATA[layout] + start as u64, sector));
    }
}

fn now_us() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map(|d| d.as_micros() as u64).unwrap_or(0)
}

/// Seconds since 1970, as the format counts them.
pub(crate) fn now_s() -> u32 {
    (now_us() / 1_000_000) as u32
}

impl Inner {
    /// The writer, when writing is possible.
    pub fn writer(&self) -> Result<&Writer, Error> {
        let writer = self.writer.as_ref().ok_or_else(|| read_only("it was opened for reading"))?;
        writer.check()?;
        Ok(writer)
    }

    /// Takes a run of resources, reading bitmaps as needed. When none is free, what waits to be given back is.
    pub async fn take(&self, resource: Resource, want: u64, goal: Option<u64>) -> Result<Run, Error> {
        let writer = self.writer()?;
        let mut settled = false;
        loop {
            let found = writer.bitmap(resource).borrow_mut().take(want, goal);
            match found {
                Found::Run(run) => return Ok(run),
                Found::Need(group) => self.load_group(resource, group).await?,
                Found::Full if settled => return Err(Error::NoSpace { what: resource.name() }),
                Found::Full => {
                    settled = true;
                    self.settle().await?;
                }
            }
        }
    }

    async fn load_group(&self, resource: Resource, group: u64) -> Result<(), Error> {
        let missing = Corrupt { what: "resource file", at: 0, found: 0, expected: Expected::Words("a file") };
        let file = resource.file(&self.files).ok_or(missing)?;
        let clusters = load_group(&self.space, file, group, true).await?;
        self.writer()?.bitmap(resource).borrow_mut().insert(group, clusters);
        Ok(())
    }

    /// Reads the bitmaps that hold `run`.
    pub async fn load_bits(&self, resource: Resource, run: Run) -> Result<(), Error> {
        let writer = self.writer()?;
        for index in [run.first, run.first + run.count.saturating_sub(1)] {
            let missing = writer.bitmap(resource).borrow().missing(index);
            if let Some(group) = missing {
                self.load_group(resource, group).await?;
            }
        }
        Ok(())
    }

    /// One round. A failure halts the volume: what the device holds is then known to nobody. Only a thin device that has
    /// no room says for sure that it took nothing, and may have some later: the same round is written again then.
    async fn round(&self, writer: &Writer, _turn: &TurnGuard<'_>) -> Result<(), Error> {
        writer.check()?;
        writer.running.set(true);
        let target = writer.requested.get();
        let result = self.round_steps(writer).await;
        writer.running.set(false);
        match &result {
            Ok(()) => writer.finished.set(target),
            Err(error) if error.is_device_full() => {}
            Err(_) => writer.halted.set(true),
        }
        result
    }

    async fn round_steps(&self, writer: &Writer) -> Result<(), Error> {
        let refused = writer.refused.borrow_mut().take();
        if let Some(batch) = refused {
            self.put_batch(writer, batch).await?;
        }
        let batch = writer.snapshot(&self.files)?;
        self.put_batch(writer, batch).await
    }

    async fn put_batch(&self, writer: &Writer, mut batch: Batch) -> Result<(), Error> {
        match self.batch_steps(writer, &mut batch).await {
            Ok(()) => writer.finish(batch),
            Err(error) => {
                if error.is_device_full() {
                    *writer.refused.borrow_mut() = Some(batch);
                }
                Err(error)
            }
        }
    }

    async fn batch_steps(&self, writer: &Writer, batch: &mut Batch) -> Result<(), Error> {
        if !batch.is_empty() {
            writer.mark.set(&self.space).await?;
        }
        let too_late =
            if faults::pointer_before_bit() { std::mem::take(&mut batch.bits) } else { Vec::new() };
        batch.before.append(&mut batch.bits);
        self.write_sorted(&mut batch.before).await?;
        self.space.flush().await?;
        if !batch.descriptors.is_empty() {
            self.write_sorted(&mut batch.descriptors).await?;
            self.space.flush().await?;
        }
        if !batch.after.is_empty() {
            self.write_sorted(&mut batch.after).await?;
            self.space.flush().await?;
        }
        batch.bits = too_late;
        self.write_sorted(&mut batch.bits).await?;
        // What the blocks held is nobody's: a thin LUN below gets the room back. Before their bits, so that nobody
        // has them yet.
        for (_, run) in batch.frees.iter().filter(|(resource, _)| *resource == Resource::FileBlock) {
            let block = self.files.sizes.block;
            self.space.unmap(run.first * block, run.count * block).await?;
        }
        Ok(())
    }

    /// Writes pieces in the order of the volume, neighbours together.
    async fn write_sorted(&self, list: &mut [(u64, Vec<u8>)]) -> Result<(), Error> {
        list.sort_by_key(|(at, _)| *at);
        let mut rest = &*list;
        while let Some((at, first)) = rest.first() {
            let mut length = first.len() as u64;
            let mut count = 1;
            while let Some((next, bytes)) = rest.get(count)
                && *next == at + length
                && length < 1 << 20
            {
                length += bytes.len() as u64;
                count += 1;
            }
            let mut buffer = Buffer::zeroed(length as usize);
            let mut done = 0;
            for (_, bytes) in &rest[..count] {
                buffer[done..done + bytes.len()].copy_from_slice(bytes);
                done += bytes.len();
            }
            self.space.write(*at, &buffer).await?;
            rest = &rest[count..];
        }
        Ok(())
    }

    /// One round with everything that is pending now.
    pub async fn settle_once(&self) -> Result<(), Error> {
        let writer = self.writer()?;
        let turn = writer.round.take().await;
        self.round(writer, &turn).await
    }

    /// As [`Inner::settle_once`], in the middle of a change that has more steps. A thin device without room does not stop
    /// it: rounds go out in their order whenever there is room, so the steps that follow come after this one on the
    /// device too. Whoever ends the change asks [`Inner::caught_up`].
    pub async fn settle_step(&self) -> Result<(), Error> {
        match self.settle_once().await {
            Err(error) if error.is_device_full() => Ok(()),
            other => other,
        }
    }

    /// Nothing waits for room: else the change is there, and is durable only when there is some.
    pub fn caught_up(&self) -> Result<(), Error> {
        match self.writer()?.refused.borrow().is_some() {
            true => Err(DiskError::NoSpace.into()),
            false => Ok(()),
        }
    }

    /// Nothing is written any more until the volume is opened again.
    pub fn halt(&self) {
        if let Some(writer) = &self.writer {
            writer.halted.set(true);
        }
    }

    /// Rounds until nothing is pending: then lowered counts and free bits are on the device too.
    pub async fn settle(&self) -> Result<(), Error> {
        let writer = self.writer()?;
        let turn = writer.round.take().await;
        self.round(writer, &turn).await?;
        // Each round leaves at most what the one before it gave back; commits that come meanwhile may go on for
        // ever, hence the limit: what was acknowledged before this call is long there.
        for _ in 0..4 {
            if !writer.is_pending() {
                break;
            }
            self.round(writer, &turn).await?;
        }
        Ok(())
    }

    /// Rounds only when something is pending.
    pub async fn settle_pending(&self) -> Result<(), Error> {
        if self.writer()?.is_pending() { self.settle().await } else { Ok(()) }
    }

    /// Everything written before is durable: data, and the allocations it needs. Callers that come together share.
    async fn flush(&self) -> Result<(), Error> {
        let Some(writer) = &self.writer else { return self.space.flush().await };
        writer.check()?;
        let idle = !writer.running.get() && writer.refused.borrow().is_none();
        if idle && !writer.pending.borrow().urgent {
            return self.space.flush().await;
        }
        let mine = writer.requested.get() + 1;
        writer.requested.set(mine);
        let turn = writer.round.take().await;
        if writer.finished.get() >= mine {
            return Ok(());
        }
        self.round(writer, &turn).await
    }
}

impl Volume {
    /// Puts everything acknowledged on the devices: data, pending allocations, counts, freed blocks. Before a cut
    /// below the volume, and before closing it.
    pub async fn settle(&self) -> Result<(), Error> {
        if self.inner.writer.is_none() {
            return Ok(());
        }
        self.inner.settle().await
    }

    /// Ends the writing: everything is put on the devices as by [`Volume::settle`], and the volume says that it was
    /// closed. Nobody changes anything meanwhile; a later change opens it again. Without this the next opening for
    /// writing takes a look at all metadata.
    pub async fn close(&self) -> Result<(), Error> {
        let inner = &self.inner;
        let Some(writer) = &inner.writer else { return Ok(()) };
        let _names = writer.names.take().await;
        inner.settle_pending().await?;
        let _turn = writer.round.take().await;
        if writer.is_pending() { Ok(()) } else { writer.mark.clear(&inner.space).await }
    }

    /// How many leaks this opening gave back, because the one before was not closed; `None` when it was.
    pub fn leaks_repaired(&self) -> Option<u64> {
        self.inner.writer.as_ref().and_then(|writer| writer.mark.repaired)
    }

    /// Free file blocks, file descriptors, sub-blocks and pointer blocks (VMFS-3 and 5). Reads all bitmaps that were
    /// not read yet.
    pub async fn free(&self) -> Result<FreeSpace, Error> {
        let inner = &self.inner;
        if inner.files.sizes.version == 6 {
            return Err(Error::Unsupported("counting free space on VMFS-6"));
        }
        let mut counts = [0; 4];
        for resource in Resource::ALL {
            counts[resource as usize] = match &inner.writer {
                Some(writer) => inner.count_free(writer, resource).await?,
                None => inner.count_free_on_device(resource).await?,
            };
        }
        let [blocks, sub_blocks, pointer_blocks, descriptors] = counts;
        Ok(FreeSpace { blocks, sub_blocks, pointer_blocks, descriptors })
    }
}

impl Inner {
    async fn count_free(&self, writer: &Writer, resource: Resource) -> Result<u64, Error> {
        loop {
            let missing = writer.bitmap(resource).borrow().first_missing();
            match missing {
                Some(group) => self.load_group(resource, group).await?,
                None => return Ok(writer.bitmap(resource).borrow().count_free()),
            }
        }
    }

    async fn count_free_on_device(&self, resource: Resource) -> Result<u64, Error> {
        let Some(file) = resource.file(&self.files) else { return Ok(0) };
        let mut free = 0;
        for group in 0..file.geometry.groups() {
            let clusters = load_group(&self.space, file, group, false).await?;
            free += clusters.iter().map(|c| u64::from(c.free.get())).sum::<u64>();
        }
        Ok(free)
    }
}

/// What is free on a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreeSpace {
    /// File blocks.
    pub blocks: u64,
    /// Sub-blocks.
    pub sub_blocks: u64,
    /// Pointer blocks.
    pub pointer_blocks: u64,
    /// File descriptors.
    pub descriptors: u64,
}

impl File {
    /// Everything written to the file before is durable, with the allocations it needs. One flush of the devices
    /// when nothing was allocated since the last, two else.
    pub async fn flush(&self) -> Result<(), Error> {
        self.inner.flush().await
    }
}

/// The size of a cluster's metadata is what is written: a sector, alone.
const _: () = assert!(size_of::<ClusterMeta5>() == 512);
