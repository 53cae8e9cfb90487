//! What the ways to a medium cost: the medium itself, a flat disk on VMFS on it, a redo log over that, in one run,
//! alternating. Prints operations per second and CPU time per operation, and at the end one line for each figure: what,
//! value, no goal, tabs between.
//!
//! `cargo run --release -p vmdisk --example ways -- FILE [SECONDS_PER_CELL] [DEPTH] [ROUNDS]`
//!
//! FILE and FILE.bare are made anew, 2 GiB and 512 MiB. 4 KiB at random places of 512 MiB that were written before (the redo log's "first"
//! rows: that were not).

use std::cell::Cell;
use std::error::Error;
use std::rc::Rc;
use std::time::Duration;

use block::{Disk, DiskError, Safe, Sector, Segments, SegmentsMut};
use vmdisk::redo::RedoDisk;
use vmdisk::{Folder, GrowingFile, Open, Provision, VmDisk, VmfsFolder, create};

const AREA: u64 = (512 << 20) / 512;

#[derive(Copy, Clone, PartialEq)]
enum What {
    Read,
    Write,
}

fn cpu() -> Duration {
    // utime and stime, in ticks of 10 ms.
    let text = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after = text.rsplit_once(')').map_or("", |t| t.1);
    let ticks: u64 = after.split_whitespace().skip(11).take(2).filter_map(|t| t.parse::<u64>().ok()).sum();
    Duration::from_millis(ticks * 10)
}

async fn worker(
    disk: Rc<dyn Disk>,
    what: What,
    seed: u64,
    sequential: bool,
    next: Rc<Cell<u64>>,
    until: std::time::Instant,
) -> Result<u64, DiskError> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut buffer = lane::Buffer::zeroed(4096);
    let mut done = 0;
    while lane::now() < until {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // "First" rows: each block once, in an order that is not the disk's.
        let block = if sequential { next.replace(next.get() + 1) * 40503 } else { state };
        let at = Sector(block % (AREA / 8) * 8);
        match what {
            What::Read => disk.read(at, &SegmentsMut::new(&mut buffer)).await?,
            What::Write => disk.write(at, &Segments::new(&buffer), Safe::AtNextFlush).await?,
        }
        done += 1;
    }
    Ok(done)
}

/// Operations per second and microseconds of CPU per operation.
async fn cell(
    disk: &Rc<dyn Disk>,
    what: What,
    once: bool,
    depth: u64,
    time: Duration,
) -> Result<(f64, f64), DiskError> {
    let (begun, used) = (lane::now(), cpu());
    let next = Rc::new(Cell::new(0));
    let tasks: Vec<_> = (0..depth)
        .map(|n| lane::spawn(worker(Rc::clone(disk), what, n + 1, once, Rc::clone(&next), begun + time)))
        .collect();
    let mut done = 0;
    for task in tasks {
        done += task.await?;
    }
    disk.flush().await?;
    let (wall, used) = (lane::now() - begun, cpu().saturating_sub(used));
    Ok((done as f64 / wall.as_secs_f64(), used.as_secs_f64() * 1e6 / done.max(1) as f64))
}

async fn fill(disk: &dyn Disk) -> Result<(), DiskError> {
    let piece = lane::Buffer::zeroed(1 << 20);
    for at in (0..AREA).step_by(2048) {
        disk.write(Sector(at), &Segments::new(&piece), Safe::AtNextFlush).await?;
    }
    disk.flush().await
}

async fn redo(
    folder: &Rc<dyn Folder>,
    base: &Rc<dyn Disk>,
    grain: u64,
) -> Result<Rc<dyn Disk>, Box<dyn Error>> {
    let path = format!("/redo-{grain}");
    let file: Rc<dyn GrowingFile> =
        folder.create(&path, 0, RedoDisk::longest_file(AREA), Provision::Thin).await?;
    RedoDisk::create(&*file, AREA, grain).await?;
    Ok(RedoDisk::open(file, Rc::clone(base), false, false).await?)
}

async fn run(path: String, seconds: u64, depth: u64, rounds: u64) -> Result<(), Box<dyn Error>> {
    let _ = std::fs::remove_file(&path);
    let medium = media::create(&path, (2 << 30) / 512, media::Options::default()).await?;
    println!("{path}: depth {depth}, {seconds} s a cell");
    println!("in use: medium and VMFS volume: {}", medium.in_use());
    let new = vmfs::NewVolume::new("bench", 1, std::time::SystemTime::now());
    vmfs::create(vec![medium.clone()], &new).await?;
    let volume = vmfs::Volume::open(vec![medium.clone()], vmfs::Mode::Write).await?;
    let folder: Rc<dyn Folder> = VmfsFolder::new(volume);
    create::create_flat(&folder, "/d.vmdk", AREA, Provision::EagerZeroed).await?;
    let flat = VmDisk::open(Rc::clone(&folder), "/d.vmdk", Open::WRITE, &()).await?;
    fill(&*flat).await?;
    let other = format!("{path}.bare");
    let _ = std::fs::remove_file(&other);
    let bare: Rc<dyn Disk> = media::create(&other, AREA, media::Options::default()).await?;
    fill(&*bare).await?;
    let flat: Rc<dyn Disk> = flat;
    let time = Duration::from_secs(seconds);
    let mut ratios = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        for what in [What::Read, What::Write] {
            let word = if what == What::Read { "read" } else { "write" };
            let (bare_rate, bare_cpu) = cell(&bare, what, false, depth, time).await?;
            let (rate, used) = cell(&flat, what, false, depth, time).await?;
            println!(
                "{word:5} medium {bare_rate:8.0}/s {bare_cpu:5.2} us   VMDK on VMFS {rate:8.0}/s {used:5.2} us   ratio {:.3}",
                rate / bare_rate
            );
            ratios[usize::from(what == What::Write)].push(rate / bare_rate);
        }
        for grain in [1, 8, 128] {
            let disk = redo(&folder, &flat, grain).await?;
            let (first, first_cpu) = cell(&disk, What::Write, true, depth, time).await?;
            let (again, again_cpu) = cell(&disk, What::Write, false, depth, time).await?;
            let (read, read_cpu) = cell(&disk, What::Read, false, depth, time).await?;
            println!(
                "redo, grain {grain:3}: first write {first:8.0}/s {first_cpu:5.2} us   write {again:8.0}/s {again_cpu:5.2} us   read {read:8.0}/s {read_cpu:5.2} us   (round {round})"
            );
            drop(disk);
            folder.remove(&format!("/redo-{grain}")).await?;
        }
    }
    for (mut list, word) in ratios.into_iter().zip(["read", "write"]) {
        list.sort_by(f64::total_cmp);
        if let Some(median) = list.get(list.len() / 2) {
            println!("VMDK on VMFS, 4 KiB {word}, IOPS against the medium, in the process\t{median:.3}\t");
        }
    }
    std::fs::remove_file(&path)?;
    std::fs::remove_file(&other)?;
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("a file to make is missing")?;
    let mut number = |default: u64| arguments.next().map_or(Ok(default), |a| a.parse::<u64>());
    let (seconds, depth, rounds) = (number(2)?, number(32)?, number(2)?);
    lane::block_on(run(path, seconds, depth, rounds))
}
