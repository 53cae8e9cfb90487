//! A disk of 64 TiB: what an incremental reads, writes and holds in memory follows from what changed. Alone in its
//! program, so that the peak of memory is its own.
#![allow(clippy::unwrap_used)] // a test says by it what must hold

mod common;

use std::cell::Cell;
use std::rc::Rc;

use backup::{Audit, Depth, Mode, Options, Progress, Repository};
use block::{
    Disk, DiskError, Extent, Extents, Generation, Io, Kind, Safe, Sector, Segments, SegmentsMut, Shape,
    check_range,
};
use common::{Noise, Scratch, directory_bytes, plan, source};

const SECTORS: u64 = (64 << 40) / 512;
/// Every so many blocks one holds data: 16,384 on the disk.
const STRIDE: u64 = (64 << 40) / 4096 / 16_384;

/// Memory of a backup that does not depend on the disk.
const FIXED_BYTES: u64 = 48 << 20;

/// Content by formula. Blocks at multiples of a stride hold data; those in `changed` have other content and count as
/// changed since the first cut.
struct Formula {
    changed: Vec<u64>,
    read_bytes: Cell<u64>,
}

impl Formula {
    fn word(&self, block: u64) -> u64 {
        if self.changed.binary_search(&block).is_ok() {
            return block.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        }
        if block.is_multiple_of(STRIDE) { block.wrapping_mul(0xc2b2_ae3d_27d4_eb4f) | 1 } else { 0 }
    }

    fn fill(&self, at: u64, out: &mut [u8]) {
        for (n, part) in out.chunks_mut(512).enumerate() {
            let sector = at + n as u64;
            let mut x = self.word(sector / 8);
            if x != 0 {
                x ^= sector;
            }
            for word in part.chunks_mut(8) {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                word.copy_from_slice(&x.to_le_bytes());
            }
        }
    }
}

fn generation() -> Generation {
    Generation { counter: 1, id: 64 }
}

fn ready<'a>(result: Result<(), DiskError>) -> Io<'a> {
    Box::pin(std::future::ready(result))
}

impl Disk for Formula {
    fn shape(&self) -> Shape {
        Shape {
            sectors: SECTORS,
            physical_block_bytes: 4096,
            read_only: true,
            unmap_reads_zero: true,
            memory_align: 1,
        }
    }
    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        ready(check_range(SECTORS, at, into.len() as u64 / 512).map(|()| {
            let mut bytes = vec![0; into.len()];
            self.fill(at.0, &mut bytes);
            into.copy_from(0, &bytes);
            self.read_bytes.set(self.read_bytes.get() + into.len() as u64);
        }))
    }
    fn write<'a>(&'a self, _: Sector, _: &'a Segments<'a>, _: Safe) -> Io<'a> {
        ready(Err(DiskError::ReadOnly))
    }
    fn zero(&self, _: Sector, _: u64, _: bool) -> Io<'_> {
        ready(Err(DiskError::ReadOnly))
    }
    fn unmap(&self, _: Sector, _: u64) -> Io<'_> {
        ready(Err(DiskError::ReadOnly))
    }
    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        let end = at.0 + count;
        let mut sector = at.0;
        while sector < end {
            let block = sector / 8;
            let next = self.changed.partition_point(|b| *b < block);
            let next = self.changed.get(next).copied().unwrap_or(u64::MAX / 8);
            let next = next.min(block.next_multiple_of(STRIDE));
            let data = next == block;
            let stop = if data { (block + 1) * 8 } else { next * 8 }.min(end);
            let changed = since.is_none() || (data && self.changed.binary_search(&block).is_ok());
            let kind = if data { Kind::Data } else { Kind::Hole };
            if !out.push(Extent { at: Sector(sector), count: stop - sector, kind, changed }) {
                break;
            }
            sector = stop;
        }
        ready(Ok(()))
    }
    fn compare_and_write<'a>(&'a self, _: Sector, _: &'a Segments<'a>, _: &'a Segments<'a>) -> Io<'a> {
        ready(Err(DiskError::ReadOnly))
    }
    fn flush(&self) -> Io<'_> {
        ready(Ok(()))
    }
}

/// Resident memory in bytes: `VmRSS` now, `VmHWM` at most since the peak was forgotten.
fn memory_bytes(which: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with(which)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// The peak begins anew from what is resident now: that.
fn forget_peak() -> u64 {
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    memory_bytes("VmRSS")
}

#[test]
fn soak_an_incremental_of_64_tib_costs_what_changed() {
    let changed_bytes: u64 = if std::env::var_os("KAGAMI_SOAK").is_some() { 1 << 30 } else { 48 << 20 };
    let scratch = Scratch::new("large");
    let path = scratch.join("repo");
    let repository = Repository::create(&path, Options::default()).unwrap();
    let disk = Formula { changed: Vec::new(), read_bytes: Cell::new(0) };
    let source_of = |disk: Formula| {
        let disk = Rc::new(disk);
        (Rc::clone(&disk), source("big", disk as _, Some(generation())))
    };
    let (disk, source) = source_of(disk);
    let base = lane::block_on(repository.backup(plan(vec![source], None), &Progress::new())).unwrap();
    assert_eq!(base.disks[0].allocated_bytes, 16_384 * 4096);
    assert!(disk.read_bytes.get() <= 16_384 * 4096, "only data is read");
    let before = directory_bytes(&path);

    // The worst: each changed block alone in its part of the tree.
    let mut noise = Noise::new(31);
    let mut changed: Vec<u64> = (0..changed_bytes / 4096)
        .map(|_| noise.below(SECTORS / 8) / STRIDE * STRIDE + noise.below(STRIDE))
        .collect();
    changed.sort_unstable();
    changed.dedup();
    let changed_bytes = changed.len() as u64 * 4096;
    let (disk, source) = source_of(Formula { changed, read_bytes: Cell::new(0) });
    let mut plan = plan(vec![source], Some(base.id));
    plan.audit = Audit { share: 0.01, ..plan.audit };
    let resident = forget_peak();
    let sealed = lane::block_on(repository.backup(plan, &Progress::new())).unwrap();
    let record = &sealed.disks[0];
    assert_eq!((record.mode, record.changed_bytes), (Mode::Incremental, changed_bytes));
    assert_eq!(record.read_bytes, changed_bytes + record.audited_bytes);
    assert_eq!(record.read_bytes, disk.read_bytes.get());
    let grown = directory_bytes(&path) - before;
    let memory = memory_bytes("VmHWM") - resident;
    println!(
        "changed {} MiB: read {} MiB (audit {} MiB), grew by {} MiB, {} MiB of memory over {} MiB",
        changed_bytes >> 20,
        record.read_bytes >> 20,
        record.audited_bytes >> 20,
        grown >> 20,
        memory >> 20,
        resident >> 20
    );
    assert!(grown <= 2 * changed_bytes, "{grown} bytes for {changed_bytes}");
    // What is read ahead, caches of frames and nodes, and the open pack: the same for any disk. The rest follows what
    // changed, not the 64 TiB.
    assert!(memory <= FIXED_BYTES + changed_bytes / 4, "{memory} bytes of memory for {changed_bytes}");

    // And it is right: what changed, what did not, and what was never there.
    let again = Repository::open(&path, Options::default()).unwrap();
    assert!(again.verify(sealed.id, Depth::Shallow, &Progress::new()).unwrap().is_clean());
    let view = again.disk(&sealed, "big").unwrap();
    let blocks: Vec<u64> =
        (0..400).map(|_| disk.changed[noise.below(disk.changed.len() as u64) as usize]).collect();
    let held: Vec<u64> = (0..200).map(|_| noise.below(16_384) * STRIDE).collect();
    let any: Vec<u64> = (0..200).map(|_| noise.below(SECTORS / 8)).collect();
    lane::block_on(async {
        for block in blocks.into_iter().chain(held).chain(any) {
            let (mut found, mut expected) = (vec![1; 4096], vec![2; 4096]);
            view.read(Sector(block * 8), &SegmentsMut::new(&mut found)).await.unwrap();
            disk.fill(block * 8, &mut expected);
            assert!(found == expected, "block {block}");
        }
    });
}
