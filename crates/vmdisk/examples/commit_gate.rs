//! How long a commit holds the guest: redo logs put on and folded back, again and again, under a writer, on a VMFS
//! volume in a file. Prints how long the gate was closed, and the longest time without a write done while a commit ran.
//!
//! `cargo run --release -p vmdisk --example commit_gate -- FILE [COMMITS] [REDO_KIB] [WRITERS] [PAUSE_US]`
//!
//! FILE is made anew, 2 GiB. Each of WRITERS writes 4 KiB at random places and waits PAUSE_US in between; every 64th
//! write is followed by a flush. With the 8 MiB and the pace that are the default the redo log is more than 20 times
//! what the writers write during the pass; 64 KiB and a pause of 200 us are the other case. At the end one line for each
//! figure: what, value, goal, tabs between.

use std::cell::{Cell, RefCell};
use std::error::Error;
use std::rc::Rc;
use std::time::{Duration, Instant};

use block::{Disk, Safe, Sector, Segments};
use vmdisk::{Folder, Open, Provision, VmDisk, VmfsFolder, create};

const DISK_SECTORS: u64 = (512 << 20) / 512;

/// A silence so short is not looked at more closely.
const SHORT: Duration = Duration::from_millis(2);

/// What the writers saw.
#[derive(Default)]
struct Seen {
    stop: Cell<bool>,
    last: Cell<Option<Instant>>,
    /// Silences since the commit began, from one write done to the next.
    silences: RefCell<Vec<(Instant, Instant)>>,
    writes: Cell<u64>,
    times: RefCell<Vec<Duration>>,
}

impl Seen {
    fn write_done(&self, begun: Instant) {
        let now = lane::now();
        self.silence_until(now);
        self.writes.set(self.writes.get() + 1);
        self.times.borrow_mut().push(now - begun);
    }

    fn silence_until(&self, now: Instant) {
        if let Some(last) = self.last.replace(Some(now))
            && now - last > SHORT
        {
            self.silences.borrow_mut().push((last, now));
        }
    }

    /// The longest silence since then, the closed gates in it not counted: (when the call began and ended, how long the
    /// gate was closed in it).
    fn longest_silence(&self, gates: &[(Instant, Instant, Duration)]) -> Duration {
        self.silence_until(lane::now());
        let list = self.silences.take();
        let open = list.iter().map(|(from, to)| {
            let inside = gates.iter().filter(|(begun, ended, _)| begun < to && from < ended);
            (*to - *from).saturating_sub(inside.map(|(.., held)| *held).sum())
        });
        open.max().unwrap_or_default()
    }
}

/// Of all commits.
#[derive(Default)]
struct Passes {
    switches: Vec<Duration>,
    begins: Vec<Duration>,
    flips: Vec<Duration>,
    whole: Vec<Duration>,
    silences: Vec<Duration>,
    /// Bytes the writers wrote during each.
    written: Vec<u64>,
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

fn quantile(sorted: &[Duration], q: f64) -> Option<f64> {
    let at = ((sorted.len() as f64 * q) as usize).min(sorted.len().saturating_sub(1));
    sorted.get(at).map(|d| d.as_secs_f64() * 1e3)
}

fn quantiles(what: &str, list: &mut [Duration]) {
    list.sort_unstable();
    let text = |q: f64| quantile(list, q).map_or("-".to_owned(), |ms| format!("{ms:.3} ms"));
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

/// Puts a redo log on, fills it, and commits it.
async fn pass(
    disk: &Rc<VmDisk>,
    seen: &Seen,
    redo: u64,
    round: u64,
    all: &mut Passes,
) -> Result<(), Box<dyn Error>> {
    let prepared = disk.prepare_redo().await?;
    let begun = lane::now();
    disk.gate().close();
    disk.gate().drained().await;
    let switched = prepared.switch();
    disk.gate().open();
    all.switches.push(lane::now() - begun);
    switched.settle().await?;
    switched.keep();
    fill(disk, redo, round).await?;
    let (begun, before) = (lane::now(), seen.writes.get());
    seen.silences.take();
    seen.last.set(Some(begun));
    let commit = disk.start_commit(0).await?;
    let started = lane::now();
    commit.copy(&mut |_| true).await?;
    let flipping = lane::now();
    let left = commit.flip(async || Ok(())).await?;
    let ended = lane::now();
    let gates = [(begun, started, commit.begin_held()), (flipping, ended, left.held)];
    all.silences.push(seen.longest_silence(&gates));
    all.written.push((seen.writes.get() - before) * 4096);
    all.begins.push(commit.begin_held());
    all.flips.push(left.held);
    all.whole.push(ended - begun);
    drop(commit);
    left.remove().await?;
    Ok(())
}

fn figure(what: &str, value: f64, goal: &str) {
    println!("{what}\t{value:.3}\t{goal}");
}

fn show(mut all: Passes, seen: &Seen, redo: u64) {
    quantiles("gate closed, redo on", &mut all.switches);
    quantiles("gate closed, commit begins", &mut all.begins);
    quantiles("gate closed, flip", &mut all.flips);
    quantiles("whole commit", &mut all.whole);
    quantiles("writer: silence in a commit", &mut all.silences);
    quantiles("writer: one write", &mut seen.times.borrow_mut());
    all.written.sort_unstable();
    let commits = all.written.len();
    let times = |bytes: u64| redo as f64 / bytes.max(1) as f64;
    let (total, middle) = (all.written.iter().sum::<u64>(), all.written.get(commits / 2).copied());
    let enough = all.written.iter().filter(|bytes| times(**bytes) >= 20.0).count();
    println!(
        "writer: {} writes in all, {} KiB a commit on average",
        seen.writes.get(),
        total / 1024 / commits as u64
    );
    println!("redo at least 20 times that in {enough} of {commits} commits");
    let of = format!("redo of {} KiB", redo >> 10);
    for (what, list) in [("redo on", &all.switches), ("commit begins", &all.begins), ("flip", &all.flips)] {
        let ms = quantile(list, 0.999).unwrap_or(f64::NAN);
        figure(&format!("write gate closed, {of}, {what}, p99.9 in ms over {commits}"), ms, "<= 10");
    }
    let longest = quantile(&all.silences, 1.0).unwrap_or(f64::NAN);
    figure(
        &format!("longest silence of the writers in a commit but for the gate, {of}, ms"),
        longest,
        "<= 100",
    );
    // The other case is there to have less.
    let goal = if redo >= 1 << 20 { ">= 20" } else { "" };
    let what = format!("redo against what the writers write in the pass, {of}, median");
    figure(&what, times(middle.unwrap_or(0)), goal);
}

async fn run(
    path: String,
    commits: u64,
    redo: u64,
    writers: u64,
    pause: Duration,
) -> Result<(), Box<dyn Error>> {
    let _ = std::fs::remove_file(&path);
    let medium = media::create(&path, (2 << 30) / 512, media::Options::default()).await?;
    println!("{path}: {commits} commits, redo {} KiB, {writers} writers, pause {pause:?}", redo >> 10);
    println!("in use: VMFS volume: {}", medium.in_use());
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
    let mut all = Passes::default();
    for round in 0..commits {
        pass(&disk, &seen, redo, round, &mut all).await?;
    }
    seen.stop.set(true);
    for task in tasks {
        task.await?;
    }
    show(all, &seen, redo);
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
    let (commits, redo, writers, pause) = (number(200)?, number(8192)?, number(4)?, number(3000)?);
    lane::block_on(run(path, commits.max(1), redo << 10, writers, Duration::from_micros(pause)))
}
