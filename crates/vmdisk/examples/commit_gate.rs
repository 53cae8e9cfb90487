//! How long a commit holds the guest: redo logs put on and folded back, again and again, under a writer, on a VMFS
//! volume in a file. Prints how long the gate was closed, and the writer's longest silence.
//!
//! `cargo run --release -p vmdisk --example commit_gate -- FILE [COMMITS] [REDO_MIB] [WRITERS] [PAUSE_US]`
//!
//! FILE is made anew, 1 GiB. Each of WRITERS writes 4 KiB at random places and waits PAUSE_US in between; every 64th
//! write is followed by a flush.

use std::cell::{Cell, RefCell};
use std::error::Error;
use std::rc::Rc;
use std::time::{Duration, Instant};

use block::{Disk, Safe, Sector, Segments};
use vmdisk::{Folder, Open, Provision, VmDisk, VmfsFolder, create};

const DISK_SECTORS: u64 = (512 << 20) / 512;

/// What the writers saw.
#[derive(Default)]
struct Seen {
    stop: Cell<bool>,
    last: Cell<Option<Instant>>,
    longest: Cell<Duration>,
    writes: Cell<u64>,
    times: RefCell<Vec<Duration>>,
}

impl Seen {
    fn write_done(&self, begun: Instant) {
        let now = lane::now();
        if let Some(last) = self.last.replace(Some(now)) {
            self.longest.set(self.longest.get().max(now - last));
        }
        self.writes.set(self.writes.get() + 1);
        self.times.borrow_mut().push(now - begun);
    }
}

async fn writer(
    disk: Rc<VmDisk>,
    seen: Rc<Seen>,
    seed: u64,
    pause: Duration,
) -> Result<(), block::DiskError> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let bytes = lane::Buffer::zeroed(4096);
    let mut count = 0u64;
    while !seen.stop.get() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let begun = lane::now();
        let at = Sector(state % (DISK_SECTORS / 8) * 8);
        disk.write(at, &Segments::new(&bytes), Safe::AtNextFlush).await?;
        seen.write_done(begun);
        count += 1;
        if count.is_multiple_of(64) {
            disk.flush().await?;
        }
        if !pause.is_zero() {
            lane::sleep(pause).await;
        }
    }
    Ok(())
}

/// How long the machine itself let a thread wait that sleeps a millisecond at a time.
fn watch_machine() -> (std::sync::Arc<std::sync::atomic::AtomicBool>, std::thread::JoinHandle<Duration>) {
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let told = std::sync::Arc::clone(&stop);
    let watch = std::thread::spawn(move || {
        let mut longest = Duration::ZERO;
        while !told.load(std::sync::atomic::Ordering::Relaxed) {
            let begun = Instant::now();
            std::thread::sleep(Duration::from_millis(1));
            longest = longest.max(begun.elapsed());
        }
        longest
    });
    (stop, watch)
}

fn quantiles(what: &str, list: &mut [Duration]) {
    list.sort_unstable();
    let at = |q: f64| list.get(((list.len() as f64 * q) as usize).min(list.len().saturating_sub(1)));
    let text = |q: f64| at(q).map_or("-".to_owned(), |d| format!("{:.3} ms", d.as_secs_f64() * 1e3));
    println!(
        "{what:28} n {:6}  p50 {:>10}  p99 {:>10}  p99.9 {:>10}  max {:>10}",
        list.len(),
        text(0.5),
        text(0.99),
        text(0.999),
        text(1.0)
    );
}

/// Fills a redo log with `bytes` of scattered 64 KiB pieces.
async fn fill(disk: &VmDisk, bytes: u64, round: u64) -> Result<(), block::DiskError> {
    let piece = lane::Buffer::zeroed(64 << 10);
    let pieces = DISK_SECTORS / 128;
    for index in 0..bytes / (64 << 10) {
        let at = (index * 37 + round * 11) % pieces * 128;
        disk.write(Sector(at), &Segments::new(&piece), Safe::AtNextFlush).await?;
    }
    disk.flush().await
}

async fn run(
    path: String,
    commits: u64,
    redo: u64,
    writers: u64,
    pause: Duration,
) -> Result<(), Box<dyn Error>> {
    let _ = std::fs::remove_file(&path);
    let medium = media::create(&path, (1 << 30) / 512, media::Options::default()).await?;
    println!("{path}: {}, {commits} commits, redo {} MiB, {writers} writers", medium.in_use(), redo >> 20);
    let new = vmfs::NewVolume::new("bench", 1, std::time::SystemTime::now());
    vmfs::create(vec![medium.clone()], &new).await?;
    let volume = vmfs::Volume::open(vec![medium], vmfs::Mode::Write).await?;
    let folder: Rc<dyn Folder> = VmfsFolder::new(volume);
    create::create_flat(&folder, "/d.vmdk", DISK_SECTORS, Provision::EagerZeroed).await?;
    let disk = VmDisk::open(Rc::clone(&folder), "/d.vmdk", Open::WRITE, &()).await?;

    let (stop, watch) = watch_machine();
    let seen = Rc::new(Seen::default());
    let tasks: Vec<_> =
        (0..writers).map(|n| lane::spawn(writer(Rc::clone(&disk), Rc::clone(&seen), n + 1, pause))).collect();
    let (mut switches, mut begins, mut flips, mut passes) = (vec![], vec![], vec![], vec![]);
    let mut during = 0;
    for round in 0..commits {
        let prepared = disk.prepare_redo().await?;
        let begun = lane::now();
        disk.gate().close();
        disk.gate().drained().await;
        let switched = prepared.switch();
        disk.gate().open();
        switches.push(lane::now() - begun);
        switched.settle().await?;
        switched.keep();
        fill(&disk, redo, round).await?;
        let (begun, before) = (lane::now(), seen.writes.get());
        let commit = disk.start_commit(0).await?;
        begins.push(commit.begin_held());
        commit.copy(&mut |_| true).await?;
        let left = commit.flip(async || Ok(())).await?;
        flips.push(left.held);
        passes.push(lane::now() - begun);
        during += seen.writes.get() - before;
        drop(commit);
        left.remove().await?;
    }
    seen.stop.set(true);
    for task in tasks {
        task.await?;
    }
    quantiles("gate closed, redo on", &mut switches);
    quantiles("gate closed, commit begins", &mut begins);
    quantiles("gate closed, flip", &mut flips);
    quantiles("whole commit", &mut passes);
    quantiles("writer: one write", &mut seen.times.borrow_mut());
    println!(
        "writer: {} writes in all, {} KiB a commit on average, longest silence {:.1} ms",
        seen.writes.get(),
        during * 4 / commits.max(1),
        seen.longest.get().as_secs_f64() * 1e3
    );
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let machine = watch.join().map_err(|_| "the watching thread died")?;
    println!("the machine: a sleep of 1 ms took up to {:.1} ms", machine.as_secs_f64() * 1e3);
    disk.close().await?;
    drop(disk);
    std::fs::remove_file(&path)?;
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("a file to make is missing")?;
    let mut number = |default: u64| arguments.next().map_or(Ok(default), |a| a.parse::<u64>());
    let (commits, redo, writers, pause) = (number(200)?, number(4)?, number(4)?, number(200)?);
    lane::block_on(run(path, commits, redo << 20, writers, Duration::from_micros(pause)))
}
