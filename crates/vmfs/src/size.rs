//! Growing and shrinking, and descriptors written anew when a file outgrows its block array.
//!
//! The kind of a block array and the array itself lie in different sectors, so they cannot change together. A file
//! that needs another kind gets a new descriptor, and its directory entry is switched to it in one write.

use crate::Error;
use crate::allocate::{FROZEN, PREALLOCATING};
use crate::bitmap::Run;
use crate::descriptor::Node;
use crate::directory::RawEntry;
use crate::file::File;
use crate::format::{Address, Corrupt, DirEntry5, Expected, FdMeta, InodeKind, Zla, fd_layout, view_mut};
use crate::inode::Draft;
use crate::names::Layout;
use crate::volume::Inner;
use crate::write::{Resource, now_s};
use block::{Buffer, SECTOR_BYTES};
use std::rc::Rc;
use zerocopy::IntoBytes;

impl File {
    /// Makes the file longer (what is added reads as zero and has no room yet) or shorter (what lies behind is
    /// freed). Longer is durable after the next [`File::flush`]; shorter when this returns. Shortening is refused
    /// while allocations are under way.
    pub async fn set_length(&self, bytes: u64) -> Result<(), Error> {
        let _turn = self.inner.writer()?.names.take().await;
        let old = self.length();
        if bytes < old {
            self.inner.shrink(&self.node, bytes).await
        } else if bytes > old {
            self.inner.grow(&self.node, bytes).await
        } else {
            Ok(())
        }
    }

    /// Gives the part of the file from byte `from` to its end blocks of its own, where it has none. Allocations there
    /// wait until it is done.
    pub async fn preallocate(&self, from: u64, layout: Layout) -> Result<(), Error> {
        let inner = &self.inner;
        inner.writer()?;
        let tbz = match layout {
            Layout::Thin => return Ok(()),
            Layout::LazyZeroed => true,
            Layout::EagerZeroed => false,
        };
        if self.is_resident() || self.unit() != inner.files.sizes.block {
            return Err(Error::Resident);
        }
        let (first, end) = (from.div_ceil(self.unit()), self.length().div_ceil(self.unit()));
        let marks = &self.node.allocating;
        self.node
            .allocated
            .until(|| {
                let mut marks = marks.borrow_mut();
                let free = !marks.contains(&FROZEN) && marks.range(first..end.max(first)).next().is_none();
                (free && marks.insert(PREALLOCATING)).then_some(())
            })
            .await;
        self.node.preallocating.set(first);
        let result = inner.preallocate(&self.node, first, end, tbz).await;
        marks.borrow_mut().remove(&PREALLOCATING);
        self.node.preallocating.set(u64::MAX);
        self.node.allocated.wake_all();
        result?;
        inner.settle_once().await
    }
}

impl Inner {
    async fn grow(&self, node: &Rc<Node>, bytes: u64) -> Result<(), Error> {
        let wanted = self.zla_for(bytes)?;
        self.drop_behind_end(node).await?;
        self.clear_behind_end(node).await?;
        loop {
            let (zla, capacity) = {
                let state = node.state.borrow();
                let unit = state.fd.meta.block_bytes.get();
                let resident = state.fd.tail.len() as u64;
                let reach = state.fd.capacity(&self.files.sizes).saturating_mul(unit);
                (state.fd.zla, if state.fd.zla == Zla::Resident { resident } else { reach })
            };
            if bytes <= capacity {
                break;
            }
            let next = match zla {
                Zla::Resident | Zla::SubBlocks => Zla::FileBlocks,
                Zla::FileBlocks => Zla::Single,
                Zla::Single if wanted == Zla::Double => Zla::Double,
                _ => return Err(Error::TooLarge { what: "file", bytes, limit: capacity }),
            };
            self.rebuild_locked(node, next).await?;
        }
        node.state.borrow_mut().fd.meta.length = bytes.into();
        self.mark_meta(node, true)
    }

    /// What the last unit holds behind the end of the file becomes zero before anybody can read it.
    async fn clear_behind_end(&self, node: &Rc<Node>) -> Result<(), Error> {
        let (length, unit, zla) = {
            let mut state = node.state.borrow_mut();
            let length = state.fd.length();
            if state.fd.zla == Zla::Resident {
                state.fd.tail[length as usize..].fill(0);
            }
            (length, state.fd.meta.block_bytes.get(), state.fd.zla)
        };
        if matches!(zla, Zla::Resident | Zla::None) || length.is_multiple_of(unit) {
            return Ok(());
        }
        let address = match self.lookup_unit(node, length / unit).await? {
            None | Some(Address::FileBlock { tbz: true, .. }) => return Ok(()),
            Some(address) => address,
        };
        let start = self.files.resolve(address, length, node.at.get())?;
        let inside = length % unit;
        let sector = inside / SECTOR_BYTES * SECTOR_BYTES;
        if inside > sector {
            let mut bytes = Buffer::zeroed(SECTOR_BYTES as usize);
            self.space.read(start + sector, &mut bytes).await?;
            bytes[(inside - sector) as usize..].fill(0);
            self.space.write(start + sector, &bytes).await?;
        }
        let rest = inside.next_multiple_of(SECTOR_BYTES);
        self.space.zero(start + rest, unit - rest).await?;
        self.space.flush().await
    }

    /// First the length, durably; then the pointers; then, lazily, counts and bits.
    async fn shrink(&self, node: &Rc<Node>, bytes: u64) -> Result<(), Error> {
        if !node.allocating.borrow().is_empty() {
            return Err(Error::InUse { path: node.address.get().to_string() });
        }
        {
            let mut state = node.state.borrow_mut();
            state.fd.meta.length = bytes.into();
            state.fd.meta.modified_s = now_s().into();
            state.device_length = bytes;
        }
        self.mark_meta(node, true)?;
        self.settle_step().await?;
        self.drop_behind_end(node).await?;
        self.caught_up()
    }

    /// Gives up the blocks behind the end of a file. A shortening that was cut short leaves some, and a file that grows
    /// again must not show what they hold.
    pub async fn drop_behind_end(&self, node: &Rc<Node>) -> Result<(), Error> {
        let (length, unit) = {
            let state = node.state.borrow();
            (state.fd.length(), state.fd.meta.block_bytes.get())
        };
        let dropped = self.drop_units(node, length.div_ceil(unit), true).await?;
        if dropped.list.is_empty() {
            return Ok(());
        }
        node.goal.set(None);
        self.writer()?.free_after_round(dropped.list);
        self.settle_step().await?;
        {
            let mut state = node.state.borrow_mut();
            let meta = &mut state.fd.meta;
            meta.blocks = meta.blocks.get().saturating_sub(dropped.units).into();
            let left = meta.tbz().saturating_sub(dropped.to_be_zeroed);
            meta.set_tbz(left);
        }
        self.mark_meta(node, false)
    }

    /// Opening: ends every shortening that was cut short, then the volume is as if it had been closed.
    pub async fn end_shortening(&self) -> Result<(), Error> {
        let Some(writer) = &self.writer else { return Ok(()) };
        if writer.mark.shortened.is_empty() {
            return Ok(());
        }
        for file in &writer.mark.shortened {
            let node = self.node(*file, None, 0).await?;
            self.drop_behind_end(&node).await?;
        }
        match self.settle().await {
            // It waits in memory; the next opening looks again.
            Err(error) if error.is_device_full() => Ok(()),
            Err(error) => Err(error),
            Ok(()) => writer.mark.clear(&self.space).await,
        }
    }

    /// Gives a file another kind of block array.
    pub async fn rebuild(&self, node: &Rc<Node>, zla: Zla) -> Result<(), Error> {
        let _turn = self.writer()?.names.take().await;
        if node.state.borrow().fd.zla == zla {
            return Ok(());
        }
        self.rebuild_locked(node, zla).await
    }

    async fn rebuild_locked(&self, node: &Rc<Node>, zla: Zla) -> Result<(), Error> {
        // Nobody allocates while the array is copied; those who wait see the new one.
        node.allocated
            .until(|| {
                let mut marks = node.allocating.borrow_mut();
                marks.is_empty().then(|| {
                    marks.insert(FROZEN);
                })
            })
            .await;
        let result = self.rebuild_frozen(node, zla).await;
        node.allocating.borrow_mut().remove(&FROZEN);
        node.allocated.wake_all();
        result
    }

    async fn rebuild_frozen(&self, node: &Rc<Node>, zla: Zla) -> Result<(), Error> {
        self.settle_pending().await?;
        let (directory, entry) = self.entry_of_node(node).await?;
        let mut taken = Vec::new();
        let built = self.build(node, zla, &mut taken).await;
        let new = match built {
            Ok(new) => new,
            Err(error) => {
                self.give_back_now(taken)?;
                return Err(error);
            }
        };
        let (old_address, old_at) = (node.address.get(), node.at.get());
        let keeps_blocks = node.state.borrow().fd.shift == new.state.borrow().fd.shift
            && node.state.borrow().fd.zla != Zla::Resident;
        let old_blocks = if keeps_blocks { Vec::new() } else { self.drop_units(node, 0, false).await?.list };
        let old_fd = self.descriptor_run(old_address);
        self.load_bits(Resource::Descriptor, old_fd).await?;
        let generation = new.state.borrow().fd.meta.generation.get();
        let switched = DirEntry5::new(entry.kind, new.address.get(), generation, &entry.name);
        self.replace_entry(&directory, entry.index, switched).await?;
        // What follows is written at once, and must not come before what a device without room refused.
        self.caught_up().inspect_err(|_| self.halt())?;
        // The new descriptor is the file's: durable. The old one is no more.
        self.erase_descriptor(old_at).await?;
        let writer = self.writer()?;
        writer.bitmap(Resource::Descriptor).borrow_mut().give_back(old_fd)?;
        writer.free_after_round(old_blocks);
        self.nodes.borrow_mut().remove(&old_address);
        node.address.set(new.address.get());
        node.at.set(new.at.get());
        std::mem::swap(&mut *node.state.borrow_mut(), &mut *new.state.borrow_mut());
        self.remember(node);
        Ok(())
    }

    /// A new descriptor with the same content and the kind of array wanted; nothing refers to it.
    async fn build(
        &self,
        node: &Rc<Node>,
        zla: Zla,
        taken: &mut Vec<(Resource, Run)>,
    ) -> Result<Rc<Node>, Error> {
        let block = self.files.sizes.block;
        let (old_zla, old, array) = {
            let state = node.state.borrow();
            (state.fd.zla, state.fd.meta.clone(), state.fd.tail.clone())
        };
        let (tail, blocks) = match (old_zla, zla) {
            (Zla::Resident | Zla::SubBlocks, Zla::FileBlocks) => {
                let content = self.read_all(node, 256 * self.files.sizes.sub_block).await?;
                self.place_content(&content, block, taken).await?
            }
            (Zla::FileBlocks, Zla::Single) | (Zla::Single, Zla::Double) => {
                let run = self.take(Resource::PointerBlock, 1, None).await?;
                taken.push((Resource::PointerBlock, run));
                let pointers = self.create_pointer_block(run)?;
                for (index, raw) in array.as_chunks::<4>().0.iter().enumerate() {
                    pointers.set_slot(index as u64, u32::from_le_bytes(*raw));
                }
                let address = self.pointer_address(run).encode32().unwrap_or(0);
                (address.to_le_bytes().to_vec(), old.blocks.get())
            }
            _ => return Err(Error::Unsupported("this change of a block array")),
        };
        let draft = Draft {
            kind: InodeKind::File,
            zla,
            length: old.length.get(),
            unit: block,
            blocks,
            links: old.links.get(),
            mode: old.mode.get(),
            tail,
        };
        let new = self.new_node(draft, node.parent.get()).await?;
        self.keep_fields(&new, &old).await?;
        Ok(new)
    }

    /// What a new descriptor takes over from the old one.
    async fn keep_fields(&self, new: &Rc<Node>, old: &FdMeta) -> Result<(), Error> {
        let bytes = {
            let mut state = new.state.borrow_mut();
            let meta = &mut state.fd.meta;
            (meta.uid, meta.gid, meta.mode) = (old.uid, old.gid, old.mode);
            (meta.modified_s, meta.accessed_s) = (old.modified_s, old.accessed_s);
            meta.set_tbz(old.tbz());
            meta.as_bytes().to_vec()
        };
        self.space.write(new.at.get() + fd_layout::META[self.files.sizes.layout()], &bytes).await
    }

    /// The directory and entry of a node that was found by its name.
    async fn entry_of_node(&self, node: &Node) -> Result<(Rc<Node>, RawEntry), Error> {
        let parent = node.parent.get().ok_or(Error::Unsupported("a file opened without its name"))?;
        let directory = self.node(parent, None, node.at.get()).await?;
        let entries = self.entries(&directory).await?;
        let found =
            entries.into_iter().find(|e| e.fd == node.address.get() && e.name != "." && e.name != "..");
        let entry = found.ok_or(Corrupt {
            what: "directory entry of an open file",
            at: directory.at.get(),
            found: node.address.get().0.into(),
            expected: Expected::Words("one that refers to it"),
        })?;
        Ok((directory, entry))
    }

    async fn erase_descriptor(&self, at: u64) -> Result<(), Error> {
        let at = at + fd_layout::META[self.files.sizes.layout()];
        let mut bytes = Buffer::zeroed(SECTOR_BYTES as usize);
        self.space.read(at, &mut bytes).await?;
        if let Some(meta) = view_mut::<FdMeta>(&mut bytes) {
            meta.links = 0.into();
        }
        self.space.write(at, &bytes).await
    }
}
