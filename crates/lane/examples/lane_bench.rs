//! Compares `media::FileDisk` on a lane with a bare io_uring loop, in one process, on the same file, taking turns.
//!
//! `cargo run --release -p lane --example lane_bench -- FILE [--rounds 7] [--secs 1] [--depth 32] [--size 512M-like bytes]`
//!
//! `cargo run --release -p lane --example lane_bench -- executor` measures tasks, wake-ups and hops instead.
//!
//! FILE is made and filled when it does not exist. Each round runs every contender once; the table shows medians over
//! rounds, ratios are medians of the ratios within a round. CPU is user and system time of the whole process.
#![allow(unsafe_code)] // the bare loop hands raw memory to the kernel: it owns it until the end
#![allow(clippy::unwrap_used)] // a benchmark stops at the first error

use std::cell::Cell;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use block::{Buffer, Disk, Safe, Sector, Segments, SegmentsMut};
use io_uring::{IoUring, opcode, types};
use lane::{DriverKind, Options};

const BLOCK: usize = 4096;

#[derive(Clone)]
struct Plan {
    path: PathBuf,
    rounds: usize,
    time: Duration,
    depth: usize,
    bytes: u64,
    /// Number of the one contender to run, for profiles.
    only: Option<usize>,
}

struct Run {
    operations: u64,
    seconds: f64,
    cpu_seconds: f64,
}

impl Run {
    fn iops(&self) -> f64 {
        self.operations as f64 / self.seconds
    }
    fn cpu_us(&self) -> f64 {
        self.cpu_seconds * 1e6 / self.operations as f64
    }
}

fn cpu_now() -> f64 {
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: fills in the structure.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut usage) };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

fn measured(run: impl FnOnce() -> u64) -> Run {
    let (began, cpu) = (Instant::now(), cpu_now());
    let operations = run();
    Run { operations, seconds: began.elapsed().as_secs_f64(), cpu_seconds: cpu_now() - cpu }
}

/// The least that a program can do with io_uring: `depth` slots, each resubmitted when it completes.
fn bare(plan: &Plan, write: bool, fixed: bool) -> Run {
    let file =
        std::fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&plan.path);
    let file = file.unwrap();
    let mut ring: IoUring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_coop_taskrun()
        .build(256)
        .unwrap();
    let mut memory = Buffer::zeroed(plan.depth * BLOCK);
    if fixed {
        let whole = libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: memory.len() };
        // SAFETY: `memory` outlives the ring.
        unsafe { ring.submitter().register_buffers(&[whole]) }.unwrap();
    }
    let (fd, start, blocks) = (types::Fd(file.as_raw_fd()), memory.as_mut_ptr(), plan.bytes / BLOCK as u64);
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut entry = |slot: usize| {
        let at = random.below(blocks) * BLOCK as u64;
        // SAFETY: each slot has a block of its own.
        let place = unsafe { start.add(slot * BLOCK) };
        let length = BLOCK as u32;
        let entry = match (write, fixed) {
            (false, false) => opcode::Read::new(fd, place, length).offset(at).build(),
            (false, true) => opcode::ReadFixed::new(fd, place, length, 0).offset(at).build(),
            (true, false) => opcode::Write::new(fd, place, length).offset(at).build(),
            (true, true) => opcode::WriteFixed::new(fd, place, length, 0).offset(at).build(),
        };
        entry.user_data(slot as u64)
    };
    measured(|| {
        let began = Instant::now();
        let (mut operations, mut flying) = (0, plan.depth);
        for slot in 0..plan.depth {
            // SAFETY: the memory lives until nothing is in flight.
            unsafe { ring.submission().push(&entry(slot)) }.unwrap();
        }
        let mut done = Vec::with_capacity(plan.depth);
        while flying > 0 {
            ring.submit_and_wait(1).unwrap();
            done.extend(ring.completion().map(|c| (c.user_data(), c.result())));
            let more = began.elapsed() < plan.time;
            for (slot, result) in done.drain(..) {
                assert_eq!(result, BLOCK as i32);
                operations += 1;
                if more {
                    // SAFETY: as above.
                    unsafe { ring.submission().push(&entry(slot as usize)) }.unwrap();
                } else {
                    flying -= 1;
                }
            }
        }
        operations
    })
}

/// One of the requests that are always under way. The first one also looks at the clock.
async fn worker(
    disk: Rc<dyn Disk>,
    write: bool,
    blocks: u64,
    number: u64,
    over: Rc<Cell<Option<Instant>>>,
) -> u64 {
    let mut random = Random(0x9e37_79b9 + number * 7919);
    let mut memory = Buffer::for_overwrite(BLOCK);
    let mut operations = 0;
    while let Some(until) = over.get() {
        if number == 0 && Instant::now() >= until {
            over.set(None);
        }
        let at = Sector(random.below(blocks) * 8);
        if write {
            disk.write(at, &Segments::new(&memory), Safe::AtNextFlush).await.unwrap();
        } else {
            disk.read(at, &SegmentsMut::new(&mut memory)).await.unwrap();
        }
        operations += 1;
    }
    operations
}

fn on_lane(plan: &Plan, write: bool, driver: DriverKind, registered_bytes: usize) -> (Run, String) {
    let options = Options { driver, registered_bytes, ..Default::default() };
    lane::block_on_with(options, async {
        let disk = media::open(&plan.path, media::Options::default()).await.unwrap();
        let (began, cpu) = (Instant::now(), cpu_now());
        let over = Rc::new(Cell::new(Some(began + plan.time)));
        let tasks: Vec<_> = (0..plan.depth as u64)
            .map(|n| {
                let disk = Rc::clone(&disk) as Rc<dyn Disk>;
                let blocks = plan.bytes / BLOCK as u64;
                lane::spawn(worker(disk, write, blocks, n, Rc::clone(&over)))
            })
            .collect();
        let mut operations = 0;
        for task in tasks {
            operations += task.await;
        }
        let run = Run { operations, seconds: began.elapsed().as_secs_f64(), cpu_seconds: cpu_now() - cpu };
        (run, disk.in_use().to_string())
    })
}

fn fill(path: &Path, bytes: u64) {
    if std::fs::metadata(path).is_ok_and(|m| m.len() >= bytes) {
        return;
    }
    let mut file = std::fs::File::create(path).unwrap();
    let block = vec![0xa5; 1 << 20];
    for _ in 0..bytes >> 20 {
        std::io::Write::write_all(&mut file, &block).unwrap();
    }
    file.sync_all().unwrap();
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn compare(plan: &Plan, write: bool) {
    type Contender = Box<dyn Fn(&Plan) -> (Run, String)>;
    let arena = 4 << 20;
    let contenders: Vec<Contender> = vec![
        Box::new(move |p| (bare(p, write, false), "bare io_uring".into())),
        Box::new(move |p| (bare(p, write, true), "bare io_uring, registered buffers".into())),
        Box::new(move |p| on_lane(p, write, DriverKind::Ring, arena)),
        Box::new(move |p| on_lane(p, write, DriverKind::Ring, 0)),
        Box::new(move |p| on_lane(p, write, DriverKind::Threads, 0)),
    ];
    if let Some(only) = plan.only {
        let (run, name) = contenders[only](plan);
        return println!("{name}: {:.0} IOPS, {:.2} us CPU per I/O", run.iops(), run.cpu_us());
    }
    let mut runs: Vec<Vec<Run>> = contenders.iter().map(|_| Vec::new()).collect();
    let mut names = vec![String::new(); contenders.len()];
    for round in 0..plan.rounds {
        for n in 0..contenders.len() {
            let n = (n + round) % contenders.len();
            let (run, name) = contenders[n](plan);
            runs[n].push(run);
            names[n] = name;
        }
    }
    println!("4 KiB random {}, depth {}:", if write { "write" } else { "read" }, plan.depth);
    println!("{:<44} {:>9} {:>9} {:>11} {:>12}", "", "IOPS", "us CPU/IO", "x bare IOPS", "x bare CPU");
    for (name, list) in names.iter().zip(&runs) {
        let ratios =
            |f: fn(&Run) -> f64| median(list.iter().zip(&runs[0]).map(|(a, b)| f(a) / f(b)).collect());
        println!(
            "{name:<44} {:>9.0} {:>9.2} {:>11.3} {:>12.3}",
            median(list.iter().map(Run::iops).collect()),
            median(list.iter().map(Run::cpu_us).collect()),
            ratios(Run::iops),
            ratios(Run::cpu_us),
        );
    }
}

fn per(what: &str, count: u32, began: Instant) {
    println!("{what:<52} {:>8.0} ns", began.elapsed().as_nanos() as f64 / f64::from(count));
}

/// What the executor itself costs.
fn executor() {
    const N: u32 = 1_000_000;
    lane::block_on(async {
        let began = Instant::now();
        for _ in 0..N {
            lane::yield_now().await;
        }
        per("wake and poll of the main future", N, began);

        let tasks: Vec<_> = (0..32)
            .map(|_| {
                lane::spawn(async {
                    for _ in 0..N / 32 {
                        lane::yield_now().await;
                    }
                })
            })
            .collect();
        let began = Instant::now();
        for task in tasks {
            task.await;
        }
        per("wake and poll of one of 32 tasks", N, began);

        let began = Instant::now();
        for _ in 0..N {
            lane::spawn(async {}).await;
        }
        per("spawn, run and join a task", N, began);

        let began = Instant::now();
        for _ in 0..N {
            drop(Buffer::for_overwrite(BLOCK));
        }
        per("take and give back a plain 4 KiB buffer", N, began);

        let other = lane::start(Options::default()).unwrap();
        let began = Instant::now();
        for _ in 0..20_000 {
            other.run(|| async {}).await;
        }
        per("ask another lane and wait, one at a time", 20_000, began);

        let began = Instant::now();
        for _ in 0..1_000 {
            let asked: Vec<_> = (0..100).map(|_| lane::spawn(other.run(|| async {}))).collect();
            for answer in asked {
                answer.await;
            }
        }
        per("ask another lane, 100 at a time", 100_000, began);
        other.stop();
    });
    let began = Instant::now();
    for _ in 0..200 {
        lane::block_on(async {});
    }
    per("start and end a lane", 200, began);
    let began = Instant::now();
    for _ in 0..200 {
        lane::block_on(async { lane::in_use() });
    }
    per("start and end a lane with its ring", 200, began);
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let path =
        arguments.next().expect("usage: lane_bench FILE [--rounds N] [--secs S] [--depth N] [--mib N]");
    if path == "executor" {
        return executor();
    }
    let mut plan = Plan {
        path: path.into(),
        rounds: 7,
        time: Duration::from_secs(1),
        depth: 32,
        bytes: 512 << 20,
        only: None,
    };
    while let (Some(name), Some(value)) = (arguments.next(), arguments.next()) {
        match name.as_str() {
            "--rounds" => plan.rounds = value.parse().unwrap(),
            "--secs" => plan.time = Duration::from_secs_f64(value.parse().unwrap()),
            "--depth" => plan.depth = value.parse().unwrap(),
            "--only" => plan.only = Some(value.parse().unwrap()),
            "--mib" => plan.bytes = value.parse::<u64>().unwrap() << 20,
            other => panic!("unknown option {other}"),
        }
    }
    fill(&plan.path, plan.bytes);
    compare(&plan, false);
    compare(&plan, true);
}
