mod crash;
mod golden;
mod qemu;

use std::rc::Rc;

use block::decorate::{Decorated, Operation, Record};
use block::{Disk, MemoryDisk, SECTOR_BYTES, Safe, Sector, Segments, SegmentsMut};

use super::*;

const UNIT: usize = SECTOR_BYTES as usize;

async fn fresh(capacity: u64, grain: u64, below: Rc<dyn Disk>) -> (Rc<MemoryDisk>, Rc<RedoDisk>) {
    let file = Rc::new(MemoryDisk::new(0));
    RedoDisk::create(&*file, capacity, grain).await.unwrap();
    let disk = RedoDisk::open(Rc::clone(&file) as Rc<dyn GrowingFile>, below, false, false).await.unwrap();
    (file, disk)
}

fn random_disk(sectors: u64, seed: u64) -> (Vec<u8>, Rc<MemoryDisk>) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; sectors as usize * UNIT];
    bytes.iter_mut().for_each(|b| *b = random.u8(..));
    let disk = Rc::new(MemoryDisk::from_bytes(&bytes).read_only());
    (bytes, disk)
}

async fn read(disk: &dyn Disk, at: u64, count: u64) -> Vec<u8> {
    let mut bytes = vec![0xdd; count as usize * UNIT];
    disk.read(Sector(at), &SegmentsMut::new(&mut bytes)).await.unwrap();
    bytes
}

async fn write(disk: &dyn Disk, at: u64, bytes: &[u8]) {
    disk.write(Sector(at), &Segments::new(bytes), Safe::AtNextFlush).await.unwrap();
}

#[test]
fn it_is_a_disk() {
    for grain in [1, 8, 128] {
        lane::block_on(async {
            let below = Rc::new(MemoryDisk::new(3001));
            let (file, disk) = fresh(3001, grain, below).await;
            block::conformance::check(Rc::clone(&disk) as Rc<dyn Disk>, grain).await;
            disk.close().await.unwrap();
            let below = Rc::new(MemoryDisk::new(3001));
            let again = RedoDisk::open(file, below, true, false).await.unwrap();
            block::conformance::check_read_only(again).await;
        });
    }
}

/// Random writes, zeroes and flushes by several tasks at once, closed or dropped and opened again in between.
#[test]
fn many_writers_and_reopening_agree_with_a_model() {
    for seed in 0..12 {
        lane::block_on(model(seed, [1, 1, 2, 8][seed as usize % 4]));
    }
}

async fn model(seed: u64, grain: u64) {
    const SECTORS: u64 = 20_000;
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut expected, below) = random_disk(SECTORS, seed + 100);
    let file = Rc::new(MemoryDisk::new(0));
    RedoDisk::create(&*file, SECTORS, grain).await.unwrap();
    for _round in 0..4 {
        // Delayed, so that operations overlap.
        let times: Vec<u64> = (0..64).map(|_| random.u64(0..40)).collect();
        let turn = std::cell::Cell::new(0);
        let delay = block::decorate::Delay(Box::new(move |_| {
            turn.set((turn.get() + 1) % times.len());
            std::time::Duration::from_micros(times[turn.get()])
        }));
        file.grow(1 << 18).await.unwrap();
        let slow = Decorated::new(Rc::clone(&file) as Rc<dyn Disk>, delay);
        let disk = RedoDisk::open(slow, Rc::clone(&below) as Rc<dyn Disk>, false, false).await.unwrap();
        // Each task has its own stripe of 4 KiB pieces, so the model needs no order between tasks.
        let tasks: Vec<_> = (0..6u64)
            .map(|task| {
                let (disk, mut random) = (Rc::clone(&disk), fastrand::Rng::with_seed(seed * 77 + task));
                lane::spawn(async move {
                    let mut done = Vec::new();
                    for _ in 0..60 {
                        let at = random.u64(0..SECTORS / 48) * 48 + task * 8 + random.u64(0..8);
                        let count = random.u64(1..=8 - at % 8).min(SECTORS.saturating_sub(at));
                        if count == 0 {
                            continue;
                        }
                        let bytes = match random.u8(0..8) {
                            0 => {
                                disk.zero(Sector(at), count, true).await.unwrap();
                                vec![0; count as usize * UNIT]
                            }
                            kind => {
                                let bytes = vec![random.u8(1..); count as usize * UNIT];
                                let safe = if kind == 1 { Safe::OnReturn } else { Safe::AtNextFlush };
                                disk.write(Sector(at), &Segments::new(&bytes), safe).await.unwrap();
                                bytes
                            }
                        };
                        if random.u8(0..10) == 0 {
                            disk.flush().await.unwrap();
                        }
                        done.push((at, bytes));
                    }
                    done
                })
            })
            .collect();
        for task in tasks {
            for (at, bytes) in task.await {
                expected[at as usize * UNIT..][..bytes.len()].copy_from_slice(&bytes);
            }
        }
        assert_eq!(read(&*disk, 0, SECTORS).await, expected, "seed {seed}");
        if random.bool() {
            disk.close().await.unwrap();
        } else {
            disk.flush().await.unwrap();
        }
    }
}

#[test]
fn r11_a_flush_covers_all_grains_and_no_grain_has_its_own() {
    lane::block_on(async {
        let file = Rc::new(MemoryDisk::new(1 << 16));
        RedoDisk::create(&*file, 1 << 15, 1).await.unwrap();
        let record = Decorated::new(file, Record::default());
        let below = Rc::new(MemoryDisk::new(1 << 15));
        let watched: Rc<dyn GrowingFile> = Rc::clone(&record) as _;
        let disk = RedoDisk::open(watched, below, false, false).await.unwrap();
        for at in 0..500 {
            write(&*disk, at * 50, &[7; UNIT]).await;
        }
        assert_eq!(record.passing.count(Operation::Flush), 0, "entries wait in memory");
        assert_eq!(read(&*disk, 50, 1).await, [7; UNIT], "and are answered from there");
        disk.flush().await.unwrap();
        assert_eq!(record.passing.count(Operation::Flush), 2);
        write(&*disk, 50, &[8; UNIT]).await;
        disk.flush().await.unwrap();
        assert_eq!(record.passing.count(Operation::Flush), 3, "overwriting needs no metadata");
        let order: Vec<_> = record.passing.list.borrow().iter().map(|o| o.0).collect();
        assert_eq!(order.last(), Some(&Operation::Flush));
    });
}

/// Found by a soak run: the data of a grain whose entry still waits may be on the medium and is not found there.
#[test]
fn r11_a_durable_write_to_a_waiting_grain_settles_it() {
    lane::block_on(async {
        let (file, disk) = fresh(4096, 1, Rc::new(MemoryDisk::new(4096))).await;
        write(&*disk, 100, &[1; UNIT]).await;
        disk.write(Sector(100), &Segments::new(&[2; UNIT]), Safe::OnReturn).await.unwrap();
        let below: Rc<dyn Disk> = Rc::new(MemoryDisk::new(4096));
        let again = RedoDisk::open(file, below, true, false).await.unwrap();
        assert_eq!(read(&*again, 100, 1).await, [2; UNIT]);
    });
}

#[test]
fn r12_opening_the_largest_redo_reads_its_directory_only() {
    lane::block_on(async {
        let file = Rc::new(MemoryDisk::new(0));
        RedoDisk::create(&*file, MAX_CAPACITY, 1).await.unwrap();
        file.grow(1 << 22).await.unwrap();
        let below: Rc<dyn Disk> = Rc::new(MemoryDisk::new(MAX_CAPACITY));
        for round in 0..3u64 {
            let record = Decorated::new(Rc::clone(&file) as Rc<dyn Disk>, Record::default());
            let watched: Rc<dyn GrowingFile> = Rc::clone(&record) as _;
            let disk = RedoDisk::open(watched, Rc::clone(&below), false, false).await.unwrap();
            let directory = (MAX_CAPACITY / 4096) * 4 / SECTOR_BYTES;
            assert_eq!(record.passing.sectors(Operation::Read), 4 + directory);
            for piece in 0..6000u64 {
                // Every table once: far more than the cache holds at a time.
                let at = (piece * 709_337 + round) * 1000 % (MAX_CAPACITY - 8);
                write(&*disk, at, &[round as u8 + 1; UNIT]).await;
            }
            disk.close().await.unwrap();
            assert!(disk.map.borrow().cached_pages() <= CACHE_PAGES);
            let at = (17 * 709_337 + round) * 1000 % (MAX_CAPACITY - 8);
            assert_eq!(read(&*disk, at, 1).await, [round as u8 + 1; UNIT]);
        }
    });
}

#[test]
fn r12_an_unclosed_redo_finds_its_next_free_sector_again() {
    lane::block_on(async {
        let (bytes, below) = random_disk(4096, 5);
        let (file, disk) = fresh(4096, 1, Rc::clone(&below) as Rc<dyn Disk>).await;
        write(&*disk, 100, &[1; 5 * UNIT]).await;
        disk.flush().await.unwrap();
        let settled = disk.used_sectors();
        write(&*disk, 300, &[2; 9 * UNIT]).await;
        drop(disk);
        let again = RedoDisk::open(Rc::clone(&file) as _, below.clone(), false, false).await.unwrap();
        // Table behind the grains: the end is the table's.
        assert_eq!(again.used_sectors(), settled, "what was not flushed is given out again");
        assert_eq!(read(&*again, 300, 9).await, bytes[300 * UNIT..309 * UNIT]);
        again.close().await.unwrap();
        write(&*again, 300, &[3; UNIT]).await;
        again.close().await.unwrap();
        let header = read(&*file, 0, 4).await;
        assert_eq!(header[1648..1652], [0; 4], "closed");
        let last = RedoDisk::open(file, below, false, false).await.unwrap();
        assert_eq!(read(&*last, 300, 1).await, [3; UNIT]);
        assert_eq!(read(&*last, 104, 2).await[..UNIT], [1; UNIT]);
    });
}

#[test]
fn r13_a_redo_covers_at_most_2032_gib() {
    lane::block_on(async {
        let file = MemoryDisk::new(0);
        assert_eq!(MAX_CAPACITY * SECTOR_BYTES, 2032 << 30);
        let error = RedoDisk::create(&file, MAX_CAPACITY + 1, 1).await.unwrap_err();
        assert!(matches!(error, RedoError::TooLarge { .. }));
        assert!(error.to_string().contains("2032 GiB") && error.to_string().contains("--via snapshot"));
        // All grains and tables of the largest one fit below 2^32.
        let layout = Checked::new(MAX_CAPACITY, 1);
        let tables = layout.directory_entries * format::TABLE_SECTORS;
        assert!(layout.data_start() + MAX_CAPACITY + tables <= format::MAX_FILE_SECTORS);
        assert!(matches!(RedoDisk::create(&file, 8, 3).await, Err(RedoError::Grain(3))));
    });
}

#[test]
fn zeroes_hide_what_lies_below_and_cost_nothing_over_holes() {
    lane::block_on(async {
        let (bytes, random) = random_disk(64, 9);
        let below = Rc::new(MemoryDisk::new(1 << 24));
        write(&*below, 1000, &bytes).await;
        drop(random);
        let (_, disk) = fresh(1 << 24, 1, below).await;
        let before = disk.used_sectors();
        disk.zero(Sector(0), 1 << 24, true).await.unwrap();
        assert!(disk.used_sectors() - before <= 64 + 16, "8 GiB of holes need no grains");
        assert_eq!(read(&*disk, 1000, 64).await, vec![0; 64 * UNIT]);
    });
}

#[test]
fn next_held_names_what_is_in_this_file() {
    lane::block_on(async {
        let below = Rc::new(MemoryDisk::new(1 << 24));
        let (_, disk) = fresh(1 << 24, 1, below).await;
        let all = Sector(1 << 24);
        assert_eq!(disk.next_held(Sector(0), all).await.unwrap(), None);
        write(&*disk, 9_000_000, &[1; 3 * UNIT]).await;
        assert_eq!(disk.next_held(Sector(5), all).await.unwrap(), Some((Sector(9_000_000), 3)));
        disk.flush().await.unwrap();
        assert_eq!(disk.next_held(Sector(5), all).await.unwrap(), Some((Sector(9_000_000), 3)));
        assert_eq!(disk.next_held(Sector(9_000_001), all).await.unwrap(), Some((Sector(9_000_001), 2)));
        assert_eq!(disk.next_held(Sector(9_000_003), all).await.unwrap(), None);
        assert_eq!(disk.next_held(Sector(0), Sector(9_000_000)).await.unwrap(), None);
    });
}

#[test]
fn a_full_file_refuses_and_goes_on_when_there_is_room() {
    lane::block_on(async {
        use std::cell::Cell;
        let file = Rc::new(MemoryDisk::new(1 << 16));
        RedoDisk::create(&*file, 1 << 15, 1).await.unwrap();
        let full = Rc::new(Cell::new(true));
        let said = Rc::clone(&full);
        let fail = block::decorate::Fail(Box::new(move |operation, at, _| {
            let refused = said.get() && operation == Operation::Write && at.0 >= 300;
            refused.then_some(block::DiskError::NoSpace)
        }));
        let narrow = Decorated::new(file, fail);
        let below = Rc::new(MemoryDisk::new(1 << 15));
        let disk = RedoDisk::open(narrow, below, false, false).await.unwrap();
        let mut refused = 0;
        for at in 0..400 {
            let bytes = [at as u8 | 1; UNIT];
            match disk.write(Sector(at), &Segments::new(&bytes), Safe::AtNextFlush).await {
                Ok(()) => {}
                Err(block::DiskError::NoSpace) => refused += 1,
                Err(other) => panic!("{other}"),
            }
        }
        assert!(refused > 50);
        assert!(matches!(disk.flush().await, Err(block::DiskError::NoSpace)), "no room for the table");
        full.set(false);
        for at in 0..400 {
            write(&*disk, at, &[at as u8 | 1; UNIT]).await;
        }
        disk.flush().await.unwrap();
        for at in 0..400 {
            assert_eq!(read(&*disk, at, 1).await, [at as u8 | 1; UNIT]);
        }
    });
}

#[test]
fn a_failed_flush_halts_until_reopened() {
    lane::block_on(async {
        let file = Rc::new(MemoryDisk::new(1 << 16));
        RedoDisk::create(&*file, 1 << 12, 1).await.unwrap();
        let error = block::DiskError::Gone;
        let fail = block::decorate::Fail::nth(Operation::Flush, 1, false, error);
        let bad = Decorated::new(Rc::clone(&file) as Rc<dyn Disk>, fail);
        let below: Rc<dyn Disk> = Rc::new(MemoryDisk::new(1 << 12));
        let disk = RedoDisk::open(bad, Rc::clone(&below), false, false).await.unwrap();
        write(&*disk, 0, &[5; UNIT]).await;
        assert!(disk.flush().await.is_err());
        let late = disk.write(Sector(1), &Segments::new(&[5; UNIT]), Safe::AtNextFlush).await;
        assert!(matches!(late, Err(block::DiskError::Halted)));
        assert!(matches!(disk.flush().await, Err(block::DiskError::Halted)));
        assert_eq!(read(&*disk, 0, 1).await, [5; UNIT], "reading goes on");
        let again = RedoDisk::open(file, below, false, false).await.unwrap();
        write(&*again, 1, &[6; UNIT]).await;
        again.flush().await.unwrap();
    });
}

/// Flips bytes all over a real file: opening and reading answer an error or data, never a panic.
#[test]
fn fuzz_foreign_bytes_never_panic() {
    lane::block_on(async {
        let (_, below) = random_disk(9000, 3);
        let (file, disk) = fresh(9000, 1, Rc::clone(&below) as Rc<dyn Disk>).await;
        for at in 0..300 {
            write(&*disk, at * 29, &[1; UNIT]).await;
        }
        disk.close().await.unwrap();
        let good = read(&*file, 0, 2000).await;
        let mut random = fastrand::Rng::with_seed(11);
        let (mut refused, mut faults) = (0, 0);
        for _ in 0..600 {
            let mut bad = good.clone();
            // Header, directory and the tables at the end are where it hurts.
            let places = [0..64, 1640..1660, 2048..2060, 170_000..230_000];
            for _ in 0..random.usize(1..4) {
                let place = places[random.usize(0..4)].clone();
                let at = random.usize(place);
                bad[at] = random.u8(..);
            }
            let length = file.shape().sectors;
            let length = if random.u8(0..10) == 0 { random.u64(0..400) } else { length };
            bad.truncate(length as usize * UNIT);
            let file = Rc::new(MemoryDisk::from_bytes(&bad));
            file.resize(length);
            match RedoDisk::open(file, Rc::clone(&below) as Rc<dyn Disk>, false, false).await {
                Err(_) => refused += 1,
                Ok(disk) => {
                    let mut bytes = vec![0; 9000 * UNIT];
                    faults += usize::from(disk.read(Sector(0), &SegmentsMut::new(&mut bytes)).await.is_err());
                    let _ = disk.write(Sector(8), &Segments::new(&bytes[..UNIT]), Safe::OnReturn).await;
                }
            }
        }
        assert!(refused > 50 && faults > 20, "{refused} refused, {faults} faults");
    });
}

/// Nobody flushes: what waits stays bounded all the same, and no writer waits for it.
#[test]
fn r12_what_waits_for_a_flush_is_bounded() {
    lane::block_on(async {
        let (_, disk) = fresh(1 << 22, 1, Rc::new(MemoryDisk::new(1 << 22))).await;
        let mut most = 0;
        for at in 0..40_000u64 {
            write(&*disk, at * 104_729 % (1 << 22), &[1; UNIT]).await;
            most = most.max(disk.map.borrow().waiting_runs());
            if at % 64 == 0 {
                lane::yield_now().await;
            }
        }
        assert!((8192..4 * 8192).contains(&most), "{most} runs waited");
        for at in (0..40_000u64).step_by(997) {
            assert_eq!(read(&*disk, at * 104_729 % (1 << 22), 1).await, [1; UNIT]);
        }
    });
}
