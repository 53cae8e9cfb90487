//! Holes: blocks in the middle of a file that are given back.
//!
//! Two things have to be over before another file may get such a block: the pointer to it is gone from the device,
//! which rounds see to ([`crate::write`]), and nobody moves data in the place any more that [`File::locate`] told
//! before, which only the caller knows. So it goes in two steps.

use crate::Error;
use crate::allocate::FROZEN;
use crate::bitmap::Run;
use crate::file::File;
use crate::format::{Address, Zla};
use crate::write::{Resource, now_s};
use block::Sector;

/// Units that one release may touch.
const UNITS_MAX: u64 = 1 << 16;

/// Blocks that a file gave up and nobody has yet.
#[must_use = "blocks that are not given back are lost until the volume is checked"]
pub struct Released {
    file: File,
    blocks: Vec<(Resource, Run)>,
    /// First sector of the first unit looked at, and sectors of all of them.
    range: (Sector, u64),
}

impl File {
    /// Makes holes of the units that lie wholly in `count` sectors from `at` on: they read as zero from now on, and
    /// durably after the next [`File::flush`]. Blocks that were never written (to be zeroed) stay: they were asked
    /// for. At most 65536 units at a time.
    pub async fn release(&self, at: Sector, count: u64) -> Result<Released, Error> {
        let (inner, node) = (&self.inner, &self.node);
        inner.writer()?;
        let unit = self.unit();
        let first = at.bytes().div_ceil(unit);
        let end = (at.plus(count).bytes() / unit).min(self.length() / unit).max(first);
        let mut released = Released {
            file: self.clone(),
            blocks: Vec::new(),
            range: (Sector::at_byte(first * unit), (end - first) * unit / block::SECTOR_BYTES),
        };
        let mappable = matches!(node.state.borrow().fd.zla, Zla::FileBlocks | Zla::Single | Zla::Double);
        if !mappable || first == end {
            return Ok(released);
        }
        if end - first > UNITS_MAX {
            let what = "release (units)";
            return Err(Error::TooLarge { what, bytes: end - first, limit: UNITS_MAX });
        }
        node.allocated
            .until(|| {
                let mut marks = node.allocating.borrow_mut();
                let busy = marks.range(first..end).next().is_some() || node.preallocating.get() < end;
                if busy || marks.contains(&FROZEN) {
                    return None;
                }
                marks.extend(first..end);
                Some(())
            })
            .await;
        let result = released.clear(first, end).await;
        let mut marks = node.allocating.borrow_mut();
        (first..end).for_each(|unit| {
            marks.remove(&unit);
        });
        drop(marks);
        node.allocated.wake_all();
        result.map(|()| released)
    }
}

impl Released {
    /// The sectors that became holes, or were holes before: first and how many.
    pub fn range(&self) -> (Sector, u64) {
        self.range
    }

    /// Nothing was given up.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Nobody reads or writes in the old places any more: the blocks are given back once nothing on the device points
    /// to them.
    pub fn finish(self) -> Result<(), Error> {
        self.file.inner.writer()?.free_after_round(self.blocks);
        Ok(())
    }

    async fn clear(&mut self, first: u64, end: u64) -> Result<(), Error> {
        let (inner, node) = (&self.file.inner, &self.file.node);
        for unit in first..end {
            let Some(Address::FileBlock { block, tbz: false, .. }) = inner.lookup_unit(node, unit).await?
            else {
                continue;
            };
            let run = Run { first: block, count: 1 };
            inner.load_bits(Resource::FileBlock, run).await?;
            let mut held = Vec::new();
            inner.grow_tree(node, unit, &mut held).await?;
            inner.set_unit(node, unit, Address::Hole)?;
            {
                let mut state = node.state.borrow_mut();
                let left = state.fd.meta.blocks.get().saturating_sub(1);
                state.fd.meta.blocks = left.into();
                state.fd.meta.modified_s = now_s().into();
                state.blocks_unsettled += 1;
            }
            inner.mark_meta(node, true)?;
            match self.blocks.last_mut() {
                Some((_, last)) if last.first + last.count == block => last.count += 1,
                _ => self.blocks.push((Resource::FileBlock, run)),
            }
        }
        node.goal.set(None);
        Ok(())
    }
}
