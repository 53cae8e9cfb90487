//! The dm-log-writes layout (Linux `Documentation/admin-guide/device-mapper/log-writes.rst`), so that a failing run
//! can be replayed by others' tools.

use std::io::{self, Write};

use super::{CrashLog, What};
use crate::{SECTOR_BYTES, Safe};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

fn sector(parts: &[&[u8]]) -> Vec<u8> {
    let mut out = parts.concat();
    out.resize(out.len().div_ceil(SECTOR_BYTES as usize) * SECTOR_BYTES as usize, 0);
    out
}

fn entry(at: u64, count: u64, flags: u64, data: &[u8]) -> Vec<u8> {
    let fields = [at, count, flags, data.len() as u64].map(u64::to_le_bytes);
    let mut out = sector(&[&fields.concat()[..], if flags & MARK != 0 { data } else { &[] }]);
    if flags & MARK == 0 {
        out.extend_from_slice(data);
    }
    out
}

/// Writes the log of disk number `disk` as dm-log-writes does: a superblock, then one entry per operation in the
/// order of their ends, with marks between them. Unfinished operations are left out.
pub fn write_dm_log(log: &CrashLog, disk: usize, out: &mut impl Write) -> io::Result<()> {
    let disks = log.inner.disks.borrow();
    let operations = disks[disk].operations.borrow();
    let mut entries: Vec<(usize, Vec<u8>)> = Vec::new();
    for operation in operations.iter() {
        let Some(end) = operation.end.get() else { continue };
        let bytes = match &operation.what {
            What::Write { at, data, safe } => {
                let flags = if *safe == Safe::OnReturn { FUA } else { 0 };
                entry(at.0, data.len() as u64 / SECTOR_BYTES, flags, data)
            }
            What::Zero { at, count, unmap: true } => entry(at.0, *count, DISCARD, &[]),
            What::Zero { at, count, unmap: false } => {
                entry(at.0, *count, 0, &vec![0; (*count * SECTOR_BYTES) as usize])
            }
            What::Flush => entry(0, 0, FLUSH, &[]),
        };
        entries.push((end, bytes));
    }
    entries.extend(log.marks().iter().map(|(when, text)| (*when, entry(0, 0, MARK, text.as_bytes()))));
    entries.sort_by_key(|(when, _)| *when);
    let head = [MAGIC, 1, entries.len() as u64].map(u64::to_le_bytes).concat();
    out.write_all(&sector(&[&head, &(SECTOR_BYTES as u32).to_le_bytes()]))?;
    entries.iter().try_for_each(|(_, bytes)| out.write_all(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Disk, Sector, Segments};

    #[test]
    fn the_log_has_the_kernel_layout() {
        let log = CrashLog::new(0);
        let disk = log.disk(64);
        lane::block_on(async {
            disk.write(Sector(5), &Segments::new(&[9; 1024]), Safe::OnReturn).await.unwrap();
            log.mark("here");
            disk.unmap(Sector(8), 2).await.unwrap();
            disk.flush().await.unwrap();
        });
        let mut out = Vec::new();
        write_dm_log(&log, 0, &mut out).unwrap();
        let word = |at: usize| u64::from_le_bytes(out[at..at + 8].try_into().unwrap());
        assert_eq!((word(0), word(8), word(16), word(24)), (MAGIC, 1, 4, 512));
        assert_eq!([word(512), word(520), word(528), word(536)], [5, 2, FUA, 1024]);
        assert_eq!(out[1024..2048], [9; 1024]);
        assert_eq!((word(2064), &out[2080..2084]), (MARK, &b"here"[..]));
        assert_eq!([word(2560), word(2568), word(2576)], [8, 2, DISCARD]);
        assert_eq!(word(3088), FLUSH);
        assert_eq!(out.len(), 3584);
    }
}
