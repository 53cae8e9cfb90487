//! New descriptors, and the end of old ones.

use crate::Error;
use crate::bitmap::Run;
use crate::descriptor::{Fd, Node};
use crate::format::{
    Address, Corrupt, Expected, FdAddress, FdMeta, InodeKind, LockBlock, LockKind, Zla, ensure, fd_layout,
};
use crate::pointer::{PointerBlock, levels};
use crate::volume::Inner;
use crate::write::{Resource, now_s};
use std::pin::Pin;
use std::rc::Rc;
use zerocopy::IntoBytes;

/// What a new descriptor says.
pub(crate) struct Draft {
    pub kind: InodeKind,
    pub zla: Zla,
    pub length: u64,
    pub unit: u64,
    pub blocks: u64,
    pub links: u32,
    pub mode: u32,
    /// What stands behind the metadata.
    pub tail: Vec<u8>,
}

/// Everything that a file (or a part of it) gives back.
#[derive(Default)]
pub(crate) struct Dropped {
    pub list: Vec<(Resource, Run)>,
    pub units: u64,
    pub to_be_zeroed: u64,
    /// Sub-blocks that the volume has.
    most_sub_blocks: u64,
}

impl Dropped {
    fn push(&mut self, resource: Resource, first: u64) {
        match self.list.last_mut() {
            Some((last, run)) if *last == resource && run.first + run.count == first => run.count += 1,
            _ => self.list.push((resource, Run { first, count: 1 })),
        }
    }
}

/// Part of a tree of pointer blocks.
#[derive(Clone)]
struct Branch {
    /// The pointer block whose slots these are; `None`: the array of the descriptor.
    holder: Option<Rc<PointerBlock>>,
    slots: u64,
    /// Units below one slot.
    below: u64,
    /// First unit to drop, counted from the first slot.
    from: u64,
    /// Set dropped slots to zero (else the whole tree goes and nobody reads it again).
    clear: bool,
}

impl Inner {
    /// Writes a new descriptor that nothing refers to. It becomes reachable with a directory entry.
    pub async fn new_node(&self, draft: Draft, parent: Option<FdAddress>) -> Result<Rc<Node>, Error> {
        let run = self.take(Resource::Descriptor, 1, None).await?;
        let result = self.write_new_fd(run, draft, parent).await;
        if result.is_err() {
            self.writer()?.bitmap(Resource::Descriptor).borrow_mut().give_back(run)?;
        }
        result
    }

    async fn write_new_fd(
        &self,
        run: Run,
        draft: Draft,
        parent: Option<FdAddress>,
    ) -> Result<Rc<Node>, Error> {
        let writer = self.writer()?;
        let per = self.files.descriptors.as_ref().map_or(1, |f| u64::from(f.geometry.per_cluster));
        let address = FdAddress::new((run.first / per) as u32, (run.first % per) as u32);
        let at = self.files.descriptor(address, 0)?;
        let generation = writer.bitmap(Resource::Descriptor).borrow_mut().next_generation(run.first);
        let layout = self.files.sizes.layout();
        let meta = self.new_meta(&draft, address, generation);
        let lock = LockBlock::free(LockKind::Descriptor, at, generation.into(), writer.tick());
        let mut raw = block::Buffer::zeroed(fd_layout::BYTES[layout] as usize);
        raw[..512].copy_from_slice(lock.as_bytes());
        let meta_at = fd_layout::META[layout] as usize;
        raw[meta_at..meta_at + 512].copy_from_slice(meta.as_bytes());
        let data_at = fd_layout::DATA[layout] as usize;
        raw[data_at..data_at + draft.tail.len()].copy_from_slice(&draft.tail);
        let fd = Fd::parse(&self.files.sizes, address, at, &raw)?;
        self.space.write(at, &raw).await?;
        Ok(Node::new(address, at, parent, fd))
    }

    fn new_meta(&self, draft: &Draft, address: FdAddress, generation: u32) -> FdMeta {
        let now = now_s();
        let mut meta = FdMeta::empty();
        meta.address = address.0.into();
        meta.generation = generation.into();
        meta.links = draft.links.into();
        meta.kind = (draft.kind as u32).into();
        meta.length = draft.length.into();
        meta.block_bytes = draft.unit.into();
        meta.blocks = draft.blocks.into();
        meta.modified_s = now.into();
        meta.changed_s = now.into();
        meta.accessed_s = now.into();
        meta.mode = draft.mode.into();
        meta.zla = (draft.zla as u32).into();
        if self.files.sizes.version == 3 {
            let kind_bits = match draft.kind {
                InodeKind::Directory => 0o040_000,
                InodeKind::Symlink => 0o120_000,
                _ => 0o100_000,
            };
            meta.mode = (draft.mode | kind_bits).into();
            return meta;
        }
        meta.set_new(draft.blocks);
        meta.address2 = address.0.into();
        meta.block_shift = draft.unit.trailing_zeros() as u8;
        // ESXi: 20, but for directories and descriptors of disks in sub-blocks (and not for links).
        let own = draft.zla == Zla::SubBlocks && draft.kind != InodeKind::Symlink;
        let shift = if own { u32::from(meta.block_shift) } else { 20 };
        meta.tbz_shift = shift.into();
        meta
    }

    /// Resource number of what an address names; `None` for file descriptors and holes.
    pub fn resource_of(&self, address: Address) -> Option<(Resource, u64)> {
        let index = |resource, cluster: u64, inside: u32, file: &Option<crate::resource::ResourceFile>| {
            let per = u64::from(file.as_ref()?.geometry.per_cluster);
            Some((resource, cluster * per + u64::from(inside)))
        };
        match address {
            Address::FileBlock { block, .. } => Some((Resource::FileBlock, block)),
            Address::SubBlock { cluster, resource, .. } => {
                index(Resource::SubBlock, cluster, resource, &self.files.sub_blocks)
            }
            Address::PointerBlock { cluster, resource, second: false, .. } => {
                index(Resource::PointerBlock, cluster, resource, &self.files.pointer_blocks)
            }
            _ => None,
        }
    }

    /// Address and volume offset of a data block: a file block, or a sub-block.
    pub fn block_at(&self, resource: Resource, index: u64) -> Result<(Address, u64), Error> {
        let per = self.files.sub_blocks.as_ref().map_or(1, |f| u64::from(f.geometry.per_cluster));
        let address = match resource {
            Resource::SubBlock => Address::sub_block(index / per, (index % per) as u32),
            _ => Address::file_block(index),
        };
        Ok((address, self.files.resolve(address, 0, 0)?))
    }

    /// Everything from unit `from` on: what it occupies; with `clear` the pointers are cleared too (in memory).
    pub async fn drop_units(&self, node: &Rc<Node>, from: u64, clear: bool) -> Result<Dropped, Error> {
        let most_sub_blocks = self.files.sub_blocks.as_ref().map_or(0, |f| f.geometry.count);
        let mut dropped = Dropped { most_sub_blocks, ..Dropped::default() };
        let branch = {
            let state = node.state.borrow();
            let Some(levels) = levels(state.fd.zla) else { return Ok(dropped) };
            let below = self.files.sizes.slots_per_pointer_block().pow(levels);
            Branch { holder: None, slots: state.fd.slots(&self.files.sizes), below, from, clear }
        };
        self.drop_branch(node, branch, &mut dropped).await?;
        for (resource, run) in &dropped.list {
            self.load_bits(*resource, *run).await?;
        }
        Ok(dropped)
    }

    fn drop_branch<'a>(
        &'a self,
        node: &'a Rc<Node>,
        branch: Branch,
        dropped: &'a mut Dropped,
    ) -> Pin<Box<dyn Future<Output = Result<(), Error>> + 'a>> {
        Box::pin(async move {
            let first = branch.from / branch.below;
            for index in first..branch.slots {
                let address = self.slot(node, branch.holder.as_ref(), index)?;
                if address == Address::Hole {
                    continue;
                }
                let expected = Expected::Words("an address that files may have");
                let at = node.at.get();
                let wrong = Corrupt { what: "block address", at, found: index, expected };
                let (resource, number) = self.resource_of(address).ok_or(wrong)?;
                let inside = if index == first { branch.from % branch.below } else { 0 };
                if branch.below > 1 {
                    let at = self.files.pointer_block(address, at)?;
                    let child = Branch {
                        holder: Some(self.cache.load(&self.space, &self.files.sizes, at).await?),
                        slots: self.files.sizes.slots_per_pointer_block(),
                        below: branch.below / self.files.sizes.slots_per_pointer_block(),
                        from: inside,
                        clear: branch.clear && inside > 0,
                    };
                    self.drop_branch(node, child, dropped).await?;
                    if inside > 0 {
                        continue;
                    }
                    self.cache.remove(at);
                } else {
                    self.files.resolve(address, 0, at)?;
                    dropped.units += 1;
                    // A tree that names its blocks again and again is nothing to walk to its end.
                    let limit = self.info.blocks + dropped.most_sub_blocks;
                    ensure(
                        dropped.units <= limit,
                        "blocks of a file",
                        at,
                        dropped.units,
                        Expected::AtMost(limit),
                    )?;
                    dropped.to_be_zeroed +=
                        u64::from(matches!(address, Address::FileBlock { tbz: true, .. }));
                }
                dropped.push(resource, number);
                if branch.clear {
                    self.set_slot(node, branch.holder.as_ref(), index, Address::Hole)?;
                }
            }
            Ok(())
        })
    }

    /// The end of a file to which, durably, no directory entry leads: its descriptor is free in the next round, its
    /// blocks after that.
    pub async fn reap(&self, node: &Rc<Node>) -> Result<(), Error> {
        let dropped = self.drop_units(node, 0, false).await?;
        let fd = self.descriptor_run(node.address.get());
        self.load_bits(Resource::Descriptor, fd).await?;
        let writer = self.writer()?;
        node.state.borrow_mut().fd.meta.links = 0.into();
        self.mark_meta(node, false)?;
        writer.bitmap(Resource::Descriptor).borrow_mut().give_back(fd)?;
        writer.free_after_round(dropped.list);
        self.nodes.borrow_mut().remove(&node.address.get());
        Ok(())
    }

    pub fn descriptor_run(&self, address: FdAddress) -> Run {
        let per = self.files.descriptors.as_ref().map_or(1, |f| u64::from(f.geometry.per_cluster));
        Run { first: u64::from(address.cluster()) * per + u64::from(address.resource()), count: 1 }
    }
}
