//! Gives back what a crash leaked, in an order that another crash can only leave as a leak again.
//!
//! 1. Orphans get a link count of zero, counts that are too high are lowered, the second name of a directory that was
//!    on its way becomes a gap: single sectors, each atomic. Flush.
//! 2. A second look, in which orphans own nothing any more: what they held shows as leaked; and the directory with the
//!    gap has a link too many, which is lowered now.
//! 3. Bitmap and free count of each cluster with leaks: they share a sector. Flush.

use std::mem::offset_of;
use std::rc::Rc;

use block::{Disk, DiskError};

use super::{CheckError, Checker, Options, Severity, Unit, one_pass};
use crate::format::{ClusterMeta5, DirEntry5, FdMeta, view_mut};

/// The pass found leaks and nothing worse.
pub(super) async fn repair(
    pass: Checker<'_>,
    devices: Vec<Rc<dyn Disk>>,
    options: Options<'_>,
) -> Result<(), CheckError> {
    pass.lower_counts().await?;
    pass.blank_entries().await?;
    pass.volume.span.flush().await?;
    drop(pass);
    let pass = one_pass(devices, options).await?;
    if pass.report.count(Severity::Corrupt) > 0 || pass.report.cut_short {
        return Ok(()); // the devices changed under us: touch nothing
    }
    pass.lower_counts().await?;
    for unit in
        [Unit::Descriptor, Unit::FileBlock, Unit::SubBlock, Unit::PointerBlock, Unit::SecondPointerBlock]
    {
        pass.free_leaks(unit).await?;
    }
    Ok(pass.volume.span.flush().await?)
}

impl Checker<'_> {
    /// Changes one sector.
    async fn edit(&self, at: u64, change: impl FnOnce(&mut [u8])) -> Result<(), DiskError> {
        let mut sector = [0; 512];
        self.volume.span.read(at, &mut sector).await?;
        change(&mut sector);
        self.volume.span.write_sector(at, &sector).await
    }

    async fn lower_counts(&self) -> Result<(), DiskError> {
        let Some(fdc) = self.resources(Unit::Descriptor) else { return Ok(()) };
        for (number, fix) in &self.fixes {
            let Some(at) = fdc.resource_at(*number) else { continue };
            self.edit(at + 512, |sector| {
                let Some(meta) = view_mut::<FdMeta>(sector) else { return };
                if let Some(links) = fix.links {
                    meta.links = links.into();
                }
                if let Some((blocks, tbz)) = fix.counts {
                    meta.blocks = blocks.into();
                    meta.set_tbz(tbz);
                }
            })
            .await?;
        }
        Ok(())
    }

    /// An entry without a descriptor's address is a gap, which every reader skips: four bytes within a sector.
    async fn blank_entries(&self) -> Result<(), DiskError> {
        for entry in &self.gaps {
            let field = entry + offset_of!(DirEntry5, fd) as u64;
            let inside = (field % 512) as usize;
            self.edit(field - field % 512, |sector| sector[inside..inside + 4].fill(0)).await?;
        }
        Ok(())
    }

    async fn free_leaks(&self, unit: Unit) -> Result<(), DiskError> {
        let Some(resources) = self.resources(unit) else { return Ok(()) };
        let mut leaks = resources.leaks().flat_map(|(first, count)| first..first + count).peekable();
        while let Some(number) = leaks.peek().copied() {
            let (cluster, _) = resources.split(number);
            let Some(at) = resources.cluster_at(cluster) else { break };
            let mut here = Vec::new();
            while let Some(number) = leaks.next_if(|number| resources.split(*number).0 == cluster) {
                here.push(resources.split(number).1);
            }
            self.edit(at + 512, |sector| {
                let Some(meta) = view_mut::<ClusterMeta5>(sector) else { return };
                here.iter().for_each(|resource| meta.set_free(*resource, true));
                meta.free = meta.free_bits().into();
            })
            .await?;
        }
        Ok(())
    }
}
