//! Power lost at every write: the volume is as before or after each change, flushed data reads back, the checker finds
//! leaks at most, and none any more once the volume was opened for writing.

mod bench;
mod judge;

use std::rc::Rc;

use super::datastore::{GIB, MIB, check, fresh, open, read};
use crate::check::What;
use crate::{Layout, Mode, Volume, faults};
use bench::Bench;
use block::{Image, MemoryDisk};
use judge::{Cuts, cut_everywhere};

async fn open_read(disk: &Rc<MemoryDisk>) -> Volume {
    Volume::open(vec![disk.clone()], Mode::Read).await.unwrap()
}

fn soak() -> bool {
    std::env::var_os("KAGAMI_SOAK").is_some()
}

fn everywhere() -> Cuts {
    if soak() { Cuts::soak(38) } else { Cuts::everywhere() }
}

/// One seed alone, to replay a failure.
fn one_seed() -> Option<u64> {
    std::env::var("KAGAMI_SEED").ok()?.parse().ok()
}

/// Every kind of change, one after the other.
async fn changes(bench: &Bench) {
    bench.directory("vm").await;
    bench.put("vm/small", b"one".to_vec()).await;
    bench.put("vm/small-sub", vec![5; 3000]).await;
    bench.put("vm/small-block", vec![6; 9000]).await;
    bench.put("vm/small", b"two".to_vec()).await;
    bench.put("vm/small-new", vec![8; 2000]).await;
    bench.rename("vm/small-new", "vm/small-sub", false).await;
    bench.mapping("vm/d-rdm.vmdk", 500 * GIB, false).await;
    bench.mapping("vm/d-rdm.vmdk", 501 * GIB, true).await;
    bench.directory("other").await;
    bench.rename("vm/small", "other/small", true).await;
    bench.put("small-x", b"x".to_vec()).await;
    bench.rename("small-x", "other/small", true).await;
    bench.symlink("vm/link", "/vmfs/volumes/ours/other/small").await;
    bench.rename("vm/link", "other/link", true).await;
    bench.rename("other", "renamed", false).await;
    bench.remove("renamed/link").await;
    bench.directory("vm/inner").await;
    bench.rename("renamed", "vm/inner/deep", true).await;
    bench.rename("vm/inner/deep", "renamed", true).await;
    bench.remove("vm/inner").await;
    let thick = bench.file("vm/thick", 3 * MIB, Layout::LazyZeroed).await;
    bench.write("vm/thick", &thick, 2048, 2, 0x77).await;
    bench.flush("vm/thick", &thick).await;
    let file = bench.file("vm/grows", 200 * MIB, Layout::Thin).await;
    bench.write("vm/grows", &file, 5, 3, 0x11).await;
    bench.flush("vm/grows", &file).await;
    bench.length("vm/grows", &file, 250 * MIB).await;
    bench.write("vm/grows", &file, 249 * 2048, 3, 0x12).await;
    bench.flush("vm/grows", &file).await;
    bench.write("vm/grows", &file, 2 * 2048 + 9, 2, 0x13).await;
    bench.flush("vm/grows", &file).await;
    bench.release("vm/grows", &file, 2048, 248 * 2048).await;
    bench.write("vm/grows", &file, 2 * 2048 + 9, 1, 0x14).await;
    bench.put("vm/small-between", vec![9; 70_000]).await;
    bench.flush("vm/grows", &file).await;
    bench.length("vm/grows", &file, 10 * MIB).await;
    bench.remove("renamed/small").await;
    bench.remove("renamed").await;
    bench.volume.settle().await.unwrap();
}

#[test]
fn changes_of_names_are_whole_after_power_loss_at_every_write() {
    lane::block_on(async {
        let bench = Bench::new(1, fresh(768 * MIB).await.image(), 0).await;
        changes(&bench).await;
        let cuts = cut_everywhere(&bench, &everywhere()).await.unwrap();
        println!("{cuts} cuts");
    });
}

/// Entries that one sub-block holds, "." and ".." among them.
const IN_A_SUB_BLOCK: usize = 58;

/// A directory with room for two more entries in its first sub-block.
async fn nearly_full() -> Image {
    let disk = fresh(768 * MIB).await;
    let volume = open(disk.clone()).await;
    volume.make_directory("many").await.unwrap();
    for n in 0..IN_A_SUB_BLOCK - 4 {
        volume.write_file(&format!("many/small-{n}"), &[n as u8]).await.unwrap();
    }
    volume.close().await.unwrap();
    disk.image()
}

/// A directory gets a second block, loses entries of either, and fits one again.
#[test]
fn a_directory_outgrows_its_block_whole() {
    lane::block_on(async {
        let bench = Bench::new(1, nearly_full().await, 0).await;
        for n in 0..5 {
            bench.put(&format!("many/small-more-{n}"), vec![n; 40]).await;
        }
        let blocks = bench.volume.entry("many").await.unwrap().blocks;
        assert_eq!(blocks, 2, "it has outgrown its block");
        bench.put("many/small-more-4", vec![9; 1500]).await;
        bench.symlink("many/link", "small-0").await;
        bench.symlink("many/other", "small-1").await;
        bench.rename("many/link", "many/other", false).await;
        bench.rename("many/small-more-3", "small-away", true).await;
        bench.rename("small-away", "many/small-7", true).await;
        bench.mapping("many/d-rdm.vmdk", 500 * GIB, false).await;
        bench.directory("many/inner").await;
        bench.remove("many/inner").await;
        for name in ["many/small-1", "many/small-more-4", "many/small-more-2", "many/d-rdm.vmdk"] {
            bench.remove(name).await;
        }
        bench.volume.settle().await.unwrap();
        let cuts = cut_everywhere(&bench, &everywhere()).await.unwrap();
        println!("{cuts} cuts");
    });
}

/// A file gets a new descriptor because its block array is too small: the old one or the new one is the file's.
#[test]
fn a_file_outgrows_its_block_array_whole() {
    lane::block_on(async {
        let bench = Bench::new(1, fresh(768 * MIB).await.image(), 0).await;
        bench.put("small", vec![0x21; 512]).await;
        let file = bench.file("grows", 200 * MIB, Layout::Thin).await;
        bench.write("grows", &file, 5, 3, 0x11).await;
        bench.flush("grows", &file).await;
        for (length, sector) in [(300 * MIB, 299 * 2048), (300 * GIB, 299 * GIB / 512)] {
            bench.length("grows", &file, length).await;
            bench.write("grows", &file, sector, 3, 0x12).await;
            bench.flush("grows", &file).await;
        }
        drop(file);
        bench.remove("small").await;
        bench.volume.settle().await.unwrap();
        cut_everywhere(&bench, &everywhere()).await.unwrap();
    });
}

/// A power loss in the middle of a shortening: the file has its old content or ends earlier, and what it had behind that
/// end is not seen when it grows again.
#[test]
fn a_shortened_file_that_grows_again_reads_as_zero() {
    lane::block_on(async {
        let bench = Bench::new(1, fresh(768 * MIB).await.image(), 0).await;
        let file = bench.file("file", 300 * MIB, Layout::Thin).await;
        for mib in [0, 9, 299] {
            bench.write("file", &file, mib * 2048, 1, 0x31).await;
        }
        bench.flush("file", &file).await;
        let begin = bench.log.points();
        bench.length("file", &file, 10 * MIB).await;
        bench.volume.settle().await.unwrap();
        let mut cut_short = 0;
        for (point, fate) in (begin..=bench.log.points()).flat_map(|point| (0..6).map(move |f| (point, f))) {
            let disk = Rc::new(MemoryDisk::from(bench.log.cut(point, fate).remove(0)));
            let short = open_read(&disk).await.entry("file").await.unwrap().length == 10 * MIB;
            let report = check(disk.clone()).await;
            cut_short += usize::from(short && report.findings().iter().any(|f| f.what == What::WrongLength));
            let volume = open(disk.clone()).await;
            assert!(!check(disk.clone()).await.findings().iter().any(|f| f.what == What::WrongLength));
            let file = volume.open_file("file").await.unwrap();
            file.set_length(300 * MIB).await.unwrap();
            let found = read(&volume, &file, 299 * 2048, 1).await;
            assert_eq!(found, [if short { 0 } else { 0x31 }; 512], "point {point} fate {fate}");
            assert_eq!(read(&volume, &file, 9 * 2048, 1).await, [0x31; 512], "point {point} fate {fate}");
            volume.close().await.unwrap();
            assert!(check(disk).await.findings().is_empty(), "point {point} fate {fate}");
        }
        assert!(cut_short > 0, "no cut leaves blocks behind the end");
    });
}

/// Two growing disks with a writer each, flushing now and then, while names change: rounds are shared.
async fn busy(bench: &Rc<Bench>, seed: u64) {
    let mut tasks = Vec::new();
    for (n, layout) in [(0u64, Layout::Thin), (1, Layout::LazyZeroed)] {
        let length = if n == 0 { 300 * GIB } else { 12 * MIB };
        let path = format!("disk{n}");
        let file = bench.file(&path, length, layout).await;
        for writer in 0..2u64 {
            let (bench, file, path) = (Rc::clone(bench), file.clone(), path.clone());
            tasks.push(lane::spawn(async move {
                for step in 0..8u64 {
                    // Some share a block, some share a pointer block, some need new ones.
                    let spread = if n == 0 { (step % 3) * 3 * GIB / 512 } else { 0 };
                    let sector = spread + (step * 1500 + writer * 40 + seed) % (11 * 2048);
                    let fill = (1 + n * 100 + writer * 50 + step) as u8;
                    bench.write(&path, &file, sector, 5, fill).await;
                    if (step + writer) % 3 == 2 {
                        bench.flush(&path, &file).await;
                    }
                }
                bench.flush(&path, &file).await;
            }));
        }
    }
    for n in 0..3u8 {
        bench.put("small-vmx", vec![n; 1500]).await;
    }
    bench.remove("small-vmx").await;
    for task in tasks {
        task.await;
    }
    bench.volume.settle().await.unwrap();
}

/// Seeds that CI runs; each cuts where the others do not, and together they cut everywhere.
const BUSY_SEEDS: u64 = 3;

/// The busy story of one seed, cut as CI cuts it, or as a soak does.
async fn busy_story(base: &Image, seed: u64, soak: bool) -> Result<usize, String> {
    let bench = Bench::new(seed, base.clone(), 3).await;
    busy(&bench, seed * 7).await;
    let cuts = match (soak, seed < BUSY_SEEDS) {
        (false, _) => Cuts::share(seed, BUSY_SEEDS),
        (true, true) => Cuts::soak(4),
        (true, false) => Cuts::everywhere(),
    };
    cut_everywhere(&bench, &cuts).await.map_err(|why| format!("KAGAMI_SEED={seed}: {why}"))
}

#[test]
fn allocations_survive_power_loss_at_every_write_once_flushed() {
    lane::block_on(async {
        let base = fresh(768 * MIB).await.image();
        let last = if soak() { 30 } else { BUSY_SEEDS };
        for seed in one_seed().map_or(0..last, |seed| seed..seed + 1) {
            let cuts = busy_story(&base, seed, soak() || one_seed().is_some()).await;
            println!("seed {seed}: {} cuts", cuts.unwrap_or_else(|why| panic!("{why}")));
        }
    });
}

/// The proof of the proof: each seed that CI runs turns red, by what it runs there.
#[test]
fn a_pointer_written_before_its_bitmap_bit_is_found() {
    lane::block_on(async {
        let base = fresh(768 * MIB).await.image();
        for seed in 0..BUSY_SEEDS {
            faults::plant(true);
            let found = busy_story(&base, seed, false).await;
            faults::plant(false);
            let why = found.expect_err("the planted fault is not found");
            assert!(why.contains("free") || why.contains("Free"), "{why}");
        }
    });
}
