//! The proofs of the array: against a model, and with power failing at every operation.
//!
//! A failure names its seed; `KAGAMI_SEED=n` runs that one alone, `KAGAMI_SOAK=1` runs the large counts.

mod background;
mod crash;
mod failing;
mod faults;
mod golden;
mod group;
mod holds;
mod hostile;
mod identity;
mod judge;
mod model;
mod opening;
mod planted;
mod room;
mod story;

use std::rc::Rc;

use crate::NewPool;
use crate::merge::Way;

use block::{Disk, Extents, Image, Kind, Pages, Sector, Segments, SegmentsMut};

/// The seeds of a test: `few` by default, `many` for the soak, one when `KAGAMI_SEED` names it.
pub(crate) fn seeds(few: u64, many: u64) -> Vec<u64> {
    if let Some(seed) = std::env::var("KAGAMI_SEED").ok().and_then(|s| s.parse().ok()) {
        return vec![seed];
    }
    (0..if soak() { many } else { few }).collect()
}

/// The large counts are wanted.
pub(crate) fn soak() -> bool {
    std::env::var_os("KAGAMI_SOAK").is_some()
}

/// Layers are merged down, up, or as the pool chooses.
pub(crate) fn merge_way(seed: u64) -> Option<Way> {
    [Some(Way::Down), Some(Way::Up), None][seed as usize % 3]
}

/// All content of a disk; holes stay holes, so that a large thin disk costs what is in it.
pub(crate) async fn content(disk: &dyn Disk) -> Result<Image, String> {
    let sectors = disk.shape().sectors;
    let mut pages = Pages::default();
    let mut at = 0;
    while at < sectors {
        let mut out = Extents::with_limit(64);
        let status = disk.status(Sector(at), sectors - at, None, &mut out).await;
        status.map_err(|e| format!("status at {at}: {e}"))?;
        for extent in out.iter().filter(|e| e.kind != Kind::Hole) {
            let mut done = 0;
            while done < extent.count {
                let count = (extent.count - done).min(2048);
                let mut bytes = vec![0xee; (count * 512) as usize];
                let from = extent.at.plus(done);
                let read = disk.read(from, &SegmentsMut::new(&mut bytes)).await;
                read.map_err(|e| format!("read at {from}: {e}"))?;
                if extent.kind == Kind::Zero && !lane::memory::is_zero(&bytes) {
                    return Err(format!("{from}: said to be zero, is not"));
                }
                for (i, block) in bytes.chunks(512).enumerate().filter(|(_, b)| !lane::memory::is_zero(b)) {
                    pages.write(from.plus(i as u64).bytes(), &Segments::new(block));
                }
                done += count;
            }
        }
        let Some(end) = out.end() else { return Err(format!("status at {at} answers nothing")) };
        at = end.0;
    }
    Ok(Image { sectors, pages })
}

/// The 4 KiB blocks in which two images differ (a page that is there and zero equals none).
pub(crate) fn differences(a: &Pages, b: &Pages) -> Vec<u64> {
    let mut out = Vec::new();
    let mut page = 0;
    loop {
        let next = [a.next_page(page), b.next_page(page)].into_iter().flatten().min();
        let Some(next) = next else { return out };
        let (mut x, mut y) = ([0; 4096], [0; 4096]);
        a.read(next * 4096, &SegmentsMut::new(&mut x));
        b.read(next * 4096, &SegmentsMut::new(&mut y));
        if x != y {
            out.push(next);
        }
        page = next + 1;
    }
}

/// A sector-sized pattern that says who wrote it: nobody can take one write's content for another's.
pub(crate) fn pattern(count: u64, tag: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity((count * 512) as usize);
    for sector in 0..count {
        let word = (tag << 12 | sector | 1 << 63).to_le_bytes();
        bytes.extend(word.iter().cycle().take(512));
    }
    bytes
}

/// Shares a disk as the trait object that media are.
pub(crate) fn dynamic<D: Disk + 'static>(disk: &Rc<D>) -> Rc<dyn Disk> {
    Rc::clone(disk) as Rc<dyn Disk>
}

/// A pool whose identity is always the same, so that a seed gives the same story.
pub(crate) fn new_pool() -> NewPool {
    NewPool { name: "test".into(), uuid: uuid::Uuid::from_u128(1) }
}
