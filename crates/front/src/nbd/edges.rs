//! Requests that do not begin and end on a sector. The odd ends are read, changed and written back by
//! compare-and-write, again until nobody came between: right against every other user of the disk, and without a
//! lock that a slow client could hold.

use std::rc::Rc;

use block::{Disk, DiskError, SECTOR_BYTES, Safe, Sector, Segments, SegmentsMut};

use crate::pool::Pool;

const SECTOR: usize = SECTOR_BYTES as usize;

/// How often an end is tried again before the request fails. Every failed try means that another write succeeded.
const TRIES_MAX: u32 = 10_000;

/// A range of bytes cut at sector boundaries.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Cut {
    /// Bytes before the first boundary.
    pub head: usize,
    /// Whole sectors: first, and bytes.
    pub middle: (Sector, usize),
    /// Bytes after the last boundary.
    pub tail: usize,
}

/// Cuts `length` bytes at `offset`. The range lies on a disk, so nothing overflows.
pub(crate) fn cut(offset: u64, length: usize) -> Cut {
    let inside = (offset % SECTOR_BYTES) as usize;
    let head = if inside == 0 { 0 } else { (SECTOR - inside).min(length) };
    let tail = (length - head) % SECTOR;
    let middle = Sector((offset + head as u64).div_ceil(SECTOR_BYTES));
    Cut { head, middle: (middle, length - head - tail), tail }
}

/// The smallest range of whole sectors around `length` bytes at `offset`: first sector, and count.
pub(crate) fn around(offset: u64, length: u64) -> (Sector, u64) {
    let first = offset / SECTOR_BYTES;
    (Sector(first), (offset + length).div_ceil(SECTOR_BYTES) - first)
}

/// Writes bytes anywhere. With `safe` [`Safe::OnReturn`] they are durable on return.
pub(crate) async fn write(
    disk: &dyn Disk,
    pool: &Rc<Pool>,
    offset: u64,
    bytes: &[u8],
    safe: Safe,
) -> Result<(), DiskError> {
    let cut = cut(offset, bytes.len());
    let (head, rest) = bytes.split_at(cut.head);
    let (middle, tail) = rest.split_at(cut.middle.1);
    change(disk, pool, offset, Patch::Bytes(head)).await?;
    if !middle.is_empty() {
        disk.write(cut.middle.0, &Segments::new(middle), Safe::AtNextFlush).await?;
    }
    change(disk, pool, offset + (bytes.len() - tail.len()) as u64, Patch::Bytes(tail)).await?;
    match safe {
        Safe::AtNextFlush => Ok(()),
        Safe::OnReturn => disk.flush().await,
    }
}

/// Zeroes bytes anywhere.
pub(crate) async fn zero(
    disk: &dyn Disk,
    pool: &Rc<Pool>,
    offset: u64,
    length: u32,
    may_free: bool,
) -> Result<(), DiskError> {
    let cut = cut(offset, length as usize);
    change(disk, pool, offset, Patch::Zeroes(cut.head)).await?;
    if cut.middle.1 > 0 {
        disk.zero(cut.middle.0, cut.middle.1 as u64 / SECTOR_BYTES, may_free).await?;
    }
    change(disk, pool, offset + u64::from(length) - cut.tail as u64, Patch::Zeroes(cut.tail)).await
}

/// What goes into a part of a sector.
enum Patch<'a> {
    Bytes(&'a [u8]),
    Zeroes(usize),
}

impl Patch<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Zeroes(count) => *count,
        }
    }
}

/// Changes a part of one sector.
async fn change(disk: &dyn Disk, pool: &Rc<Pool>, offset: u64, patch: Patch<'_>) -> Result<(), DiskError> {
    if patch.len() == 0 {
        return Ok(());
    }
    let at = Sector(offset / SECTOR_BYTES);
    let inside = (offset % SECTOR_BYTES) as usize;
    let range = inside..inside + patch.len();
    // Two places, each aligned as direct I/O wants it.
    let (mut old, mut new) = (pool.take(SECTOR), pool.take(SECTOR));
    for _ in 0..TRIES_MAX {
        disk.read(at, &SegmentsMut::new(&mut old)).await?;
        new.copy_from_slice(&old);
        match patch {
            Patch::Bytes(bytes) => new[range.clone()].copy_from_slice(bytes),
            Patch::Zeroes(_) => new[range.clone()].fill(0),
        }
        match disk.compare_and_write(at, &Segments::new(&old), &Segments::new(&new)).await {
            Err(DiskError::Miscompare { .. }) => lane::yield_now().await,
            other => return other,
        }
    }
    Err(DiskError::Conflict)
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::MemoryDisk;

    #[test]
    fn ranges_are_cut_at_sectors() {
        let whole = |head, at, bytes, tail| Cut { head, middle: (Sector(at), bytes), tail };
        assert_eq!(cut(512, 1024), whole(0, 1, 1024, 0));
        assert_eq!(cut(100, 50), whole(50, 1, 0, 0));
        assert_eq!(cut(500, 1000), whole(12, 1, 512, 476));
        assert_eq!(cut(512, 7), whole(0, 1, 0, 7));
        assert_eq!(around(511, 2), (Sector(0), 2));
        assert_eq!(around(512, 512), (Sector(1), 1));
    }

    #[test]
    fn neighbours_inside_one_sector_keep_their_bytes() {
        lane::block_on(async {
            let disk = Rc::new(MemoryDisk::new(8));
            let pool = Pool::new(1 << 20);
            let writers: Vec<_> = (0..64u64)
                .map(|n| {
                    let (disk, pool) = (Rc::clone(&disk), Rc::clone(&pool));
                    lane::spawn(async move {
                        let bytes = [n as u8 + 1; 17];
                        write(&*disk, &pool, n * 17, &bytes, Safe::AtNextFlush).await
                    })
                })
                .collect();
            for writer in writers {
                writer.await.unwrap();
            }
            let found = disk.to_bytes();
            for n in 0..64 {
                assert_eq!(found[n * 17..][..17], [n as u8 + 1; 17]);
            }
            zero(&*disk, &pool, 5, 1000, true).await.unwrap();
            let after = disk.to_bytes();
            assert!(after[5..1005].iter().all(|b| *b == 0) && after[4] == 1 && after[1005] == found[1005]);
        });
    }
}
