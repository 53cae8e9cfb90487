//! One suite that every [`Disk`] passes. It panics with what is wrong: for tests.

use std::rc::Rc;

use crate::{Disk, DiskError, Extents, Kind, MemoryDisk, SECTOR_BYTES, Safe, Sector, Segments, SegmentsMut};

const UNIT: usize = SECTOR_BYTES as usize;

/// Runs the whole suite on a disk whose content may be destroyed: at least 256 KiB, writable.
/// `seed` draws the random part.
pub async fn check(disk: Rc<dyn Disk>, seed: u64) {
    let shape = disk.shape();
    assert!(shape.sectors >= 512, "the suite wants 256 KiB");
    assert!(!shape.read_only, "the suite wants a writable disk");
    assert!(shape.physical_block_bytes.is_power_of_two() && shape.physical_block_bytes >= 512);
    assert!(shape.memory_align.is_power_of_two());
    hostile_ranges(&*disk).await;
    nothing_at_all(&*disk).await;
    edges(&*disk).await;
    scattered(&*disk).await;
    zeroes(&*disk).await;
    compare_and_write(&*disk).await;
    status(&*disk).await;
    overlapping(&disk).await;
    against_a_model(&*disk, seed).await;
}

/// The part that a read-only disk has to pass: it refuses changes, and ranges outside.
pub async fn check_read_only(disk: Rc<dyn Disk>) {
    let shape = disk.shape();
    assert!(shape.read_only, "its shape says read-only");
    hostile_reads(&*disk, shape.sectors).await;
    let data = vec![1; UNIT];
    let write = disk.write(Sector(0), &Segments::new(&data), Safe::AtNextFlush).await;
    assert!(matches!(write, Err(DiskError::ReadOnly)), "write answered {write:?}");
    let zero = disk.zero(Sector(0), 1, true).await;
    assert!(matches!(zero, Err(DiskError::ReadOnly)), "zero answered {zero:?}");
    let unmap = disk.unmap(Sector(0), 1).await;
    assert!(matches!(unmap, Err(DiskError::ReadOnly)), "unmap answered {unmap:?}");
    status(&*disk).await;
}

async fn read(disk: &dyn Disk, at: u64, sectors: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; sectors * UNIT];
    disk.read(Sector(at), &SegmentsMut::new(&mut bytes)).await.expect("reads inside the disk work");
    bytes
}

async fn write(disk: &dyn Disk, at: u64, bytes: &[u8]) {
    disk.write(Sector(at), &Segments::new(bytes), Safe::AtNextFlush)
        .await
        .expect("writes inside the disk work");
}

async fn hostile_reads(disk: &dyn Disk, sectors: u64) {
    for (at, count) in hostile(sectors) {
        let mut bytes = vec![0xee; count.min(4) as usize * UNIT];
        if count <= 4 {
            let answer = disk.read(Sector(at), &SegmentsMut::new(&mut bytes)).await;
            assert!(matches!(answer, Err(DiskError::OutOfRange)), "read at {at} answered {answer:?}");
            assert!(bytes.iter().all(|b| *b == 0xee), "a refused read leaves the memory alone");
        }
        let mut out = Extents::with_limit(4);
        let answer = disk.status(Sector(at), count, None, &mut out).await;
        assert!(matches!(answer, Err(DiskError::OutOfRange)), "status of {at}+{count} answered {answer:?}");
    }
}

fn hostile(sectors: u64) -> [(u64, u64); 8] {
    [
        (sectors, 1),
        (sectors - 1, 2),
        (u64::MAX, 1),
        (u64::MAX - 1, 4),
        (u64::MAX / 512, 1),
        (1 << 55, 1),
        (0, sectors + 1),
        (1, u64::MAX),
    ]
}

async fn hostile_ranges(disk: &dyn Disk) {
    let sectors = disk.shape().sectors;
    let before = read(disk, sectors - 2, 2).await;
    hostile_reads(disk, sectors).await;
    let data = vec![0xaa; 4 * UNIT];
    for (at, count) in hostile(sectors) {
        if count <= 4 {
            let data = Segments::new(&data[..count as usize * UNIT]);
            let answer = disk.write(Sector(at), &data, Safe::OnReturn).await;
            assert!(matches!(answer, Err(DiskError::OutOfRange)), "write at {at} answered {answer:?}");
            let answer = disk.compare_and_write(Sector(at), &data, &data).await;
            assert!(matches!(answer, Err(DiskError::OutOfRange)), "compare at {at} answered {answer:?}");
        }
        let answer = disk.zero(Sector(at), count, true).await;
        assert!(matches!(answer, Err(DiskError::OutOfRange)), "zero of {at}+{count} answered {answer:?}");
        let answer = disk.unmap(Sector(at), count).await;
        assert!(matches!(answer, Err(DiskError::OutOfRange)), "unmap of {at}+{count} answered {answer:?}");
    }
    assert_eq!(read(disk, sectors - 2, 2).await, before, "a refused operation changes nothing");
}

async fn nothing_at_all(disk: &dyn Disk) {
    for at in [0, disk.shape().sectors] {
        let at = Sector(at);
        disk.read(at, &SegmentsMut::new(&mut [])).await.expect("a read of nothing works");
        disk.write(at, &Segments::new(&[]), Safe::OnReturn).await.expect("a write of nothing works");
        disk.zero(at, 0, true).await.expect("zeroing nothing works");
        disk.unmap(at, 0).await.expect("unmapping nothing works");
        let mut out = Extents::with_limit(1);
        disk.status(at, 0, None, &mut out).await.expect("the status of nothing works");
        assert!(out.is_empty());
    }
    disk.flush().await.expect("a flush works");
}

async fn edges(disk: &dyn Disk) {
    let last = disk.shape().sectors - 1;
    for (at, fill) in [(0, 1), (last, 2), (7, 3), (8, 4), (last - 8, 5)] {
        write(disk, at, &[fill; UNIT]).await;
    }
    for (at, fill) in [(0, 1), (last, 2), (7, 3), (8, 4), (last - 8, 5)] {
        assert_eq!(read(disk, at, 1).await, [fill; UNIT], "sector {at}");
    }
    disk.write(Sector(9), &Segments::new(&[6; UNIT]), Safe::OnReturn).await.expect("FUA works");
    assert_eq!(read(disk, 9, 1).await, [6; UNIT]);
    disk.flush().await.expect("a flush works");
}

/// Pieces of odd lengths at odd addresses, only the whole being sectors.
async fn scattered(disk: &dyn Disk) {
    let bytes: Vec<u8> = (0..40 * UNIT).map(|i| (i * 7 % 251) as u8).collect();
    let (head, rest) = bytes.split_at(13);
    let (middle, tail) = rest.split_at(5000);
    let pieces = Segments::gather([head, middle, tail]);
    disk.write(Sector(3), &pieces, Safe::AtNextFlush).await.expect("scattered writes work");
    let mut back = vec![0; bytes.len()];
    {
        let (first, rest) = back.split_at_mut(4097);
        let (second, third) = rest.split_at_mut(1);
        let pieces = SegmentsMut::scatter([first, second, third]);
        disk.read(Sector(3), &pieces).await.expect("scattered reads work");
    }
    assert!(back == bytes, "scattered content comes back");
}

async fn zeroes(disk: &dyn Disk) {
    write(disk, 0, &[0xcc; 64 * UNIT]).await;
    for (at, count, may_free) in [(1, 1, true), (4, 9, false), (15, 18, true), (63, 1, false)] {
        disk.zero(Sector(at), count, may_free).await.expect("zeroing works");
        assert!(lane::memory::is_zero(&read(disk, at, count as usize).await), "zeroed sectors read as zero");
    }
    assert_eq!(read(disk, 0, 1).await, [0xcc; UNIT], "the neighbour is untouched");
    assert_eq!(read(disk, 13, 2).await, [0xcc; 2 * UNIT], "the neighbours are untouched");
    assert_eq!(read(disk, 33, 30).await, [0xcc; 30 * UNIT], "the neighbours are untouched");
    disk.unmap(Sector(34), 20).await.expect("unmapping works");
    let content = read(disk, 34, 20).await;
    assert!(!disk.shape().unmap_reads_zero || lane::memory::is_zero(&content), "the shape promises zeroes");
    assert_eq!(read(disk, 33, 1).await, [0xcc; UNIT]);
    assert_eq!(read(disk, 54, 1).await, [0xcc; UNIT]);
}

async fn compare_and_write(disk: &dyn Disk) {
    let old = [0x11; 2 * UNIT];
    let new: Vec<u8> = (0..2 * UNIT).map(|i| i as u8).collect();
    write(disk, 21, &old).await;
    disk.compare_and_write(Sector(21), &Segments::new(&old), &Segments::new(&new))
        .await
        .expect("equal content");
    assert_eq!(read(disk, 21, 2).await, new);
    let mut wrong = new.clone();
    wrong[700] ^= 1;
    let answer = disk.compare_and_write(Sector(21), &Segments::new(&wrong), &Segments::new(&old)).await;
    assert!(matches!(answer, Err(DiskError::Miscompare { at_bytes: 700 })), "miscompare answered {answer:?}");
    assert_eq!(read(disk, 21, 2).await, new, "after a miscompare nothing was written");
}

/// Extents are adjacent, in order, cover the range, respect the limit, and zeroes and holes read as zero.
async fn status(disk: &dyn Disk) {
    let sectors = disk.shape().sectors;
    for limit in [1, 3, 1000] {
        let (mut at, mut calls) = (0, 0);
        let end = sectors.min(4096);
        while at < end {
            let mut out = Extents::with_limit(limit);
            disk.status(Sector(at), end - at, None, &mut out).await.expect("status works");
            assert!(!out.is_empty() && out.len() <= limit, "between one extent and the limit");
            assert_eq!(out[0].at.0, at, "the first extent begins where asked");
            for extent in out.iter().filter(|e| e.kind != Kind::Data) {
                let content = read(disk, extent.at.0, extent.count.min(64) as usize).await;
                assert!(lane::memory::is_zero(&content), "{:?} reads as zero", extent.kind);
            }
            at = out.end().map_or(end, |e| e.0);
            assert!(at <= end, "no extent past what was asked for");
            calls += 1;
            assert!(calls <= end, "status gets on");
        }
    }
}

/// Overlapping writes under way together leave one of them in every sector.
async fn overlapping(disk: &Rc<dyn Disk>) {
    for round in 0..8u64 {
        let mut tasks = Vec::new();
        for fill in 1..=6u8 {
            let disk = Rc::clone(disk);
            let at = 40 + (u64::from(fill) * 5 + round) % 9;
            tasks.push(lane::spawn(async move { write(&*disk, at, &[fill; 11 * UNIT]).await }));
        }
        for task in tasks {
            task.await;
        }
        for (number, sector) in read(&**disk, 48, 3).await.chunks(UNIT).enumerate() {
            assert!((1..=6).contains(&sector[0]), "sector {} has one of the contents", 48 + number);
            assert!(sector.iter().all(|b| *b == sector[0]), "a sector never mixes two writes");
        }
    }
}

async fn against_a_model(disk: &dyn Disk, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let sectors = disk.shape().sectors.min(4096);
    let model = MemoryDisk::new(sectors);
    disk.zero(Sector(0), sectors, false).await.expect("zeroing works");
    for step in 0..400u32 {
        let at = random.u64(0..sectors);
        let most = if random.u8(..) < 30 { 300 } else { 24 };
        let count = random.u64(1..=(sectors - at).min(most));
        match random.u32(0..10) {
            0..=4 => {
                let bytes: Vec<u8> =
                    (0..count as usize * UNIT).map(|i| (i / UNIT) as u8 ^ step as u8).collect();
                write(disk, at, &bytes).await;
                write(&model, at, &bytes).await;
            }
            5 => {
                disk.zero(Sector(at), count, random.bool()).await.expect("zeroing works");
                model.zero(Sector(at), count, true).await.expect("the model works");
            }
            6 if disk.shape().unmap_reads_zero => {
                disk.unmap(Sector(at), count).await.expect("unmapping works");
                model.unmap(Sector(at), count).await.expect("the model works");
            }
            7 => disk.flush().await.expect("a flush works"),
            _ => {
                let same = read(disk, at, count as usize).await == read(&model, at, count as usize).await;
                assert!(
                    same,
                    "seed {seed} step {step}: content at sector {at}+{count} differs from the model"
                );
            }
        }
    }
    let mut at = 0;
    while at < sectors {
        let count = (sectors - at).min(128) as usize;
        let same = read(disk, at, count).await == read(&model, at, count).await;
        assert!(same, "seed {seed}: content at sector {at}+{count} differs from the model");
        at += count as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crash::{CrashLog, Witness};
    use crate::decorate::{Decorated, Delay, Fail, Hold, Operation, Pace, Record};

    #[test]
    fn memory_crash_and_decorated_disks_pass() {
        lane::block_on(async {
            check(Rc::new(MemoryDisk::new(1000)), 1).await;
            check_read_only(Rc::new(MemoryDisk::new(1000).read_only())).await;
            let log = CrashLog::new(5);
            log.interleave(3);
            let disk = Witness::new(&log, log.disk(777));
            check(disk.clone(), 2).await;
            for point in (0..log.points()).step_by(97).chain([log.points()]) {
                let image = log.cut(point, point as u64).remove(0);
                disk.judge(point, &MemoryDisk::from(image)).await.unwrap();
            }
            let recorded = Decorated::new(Rc::new(MemoryDisk::new(600)), Record::default());
            let short = Delay(Box::new(|_| std::time::Duration::from_micros(1)));
            check(Decorated::new(recorded.clone(), short), 3).await;
            assert!(recorded.passing.count(Operation::Write) > 100);
        });
    }

    /// Every decorator that lets things through is a disk like the one behind it.
    #[test]
    fn decorators_that_let_everything_through_pass() {
        lane::block_on(async {
            let memory = || Rc::new(MemoryDisk::new(700));
            check(Decorated::new(memory(), Fail(Box::new(|_, _, _| None))), 4).await;
            check(Decorated::new(memory(), Pace::new(u64::MAX)), 5).await;
            let open = Hold::new(|_| true);
            open.let_through();
            check(Decorated::new(memory(), open), 6).await;
            check(Rc::new(memory()), 7).await;
        });
    }

    #[test]
    fn a_failing_disk_does_not_do_what_it_refused() {
        lane::block_on(async {
            let memory = Rc::new(MemoryDisk::new(8));
            let disk =
                Decorated::new(memory.clone(), Fail::nth(Operation::Write, 1, true, DiskError::Halted));
            write(&*disk, 0, &[1; UNIT]).await;
            let answer = disk.write(Sector(1), &Segments::new(&[1; UNIT]), Safe::AtNextFlush).await;
            assert!(matches!(answer, Err(DiskError::Halted)));
            assert_eq!(memory.to_bytes()[..2 * UNIT], [[1; UNIT], [0; UNIT]].concat());
        });
    }
}
