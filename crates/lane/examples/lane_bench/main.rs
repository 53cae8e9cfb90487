//! Compares `media::FileDisk` on a lane with a bare io_uring loop, in one process, on the same file, taking turns.
//!
//! `cargo run --release -p lane --example lane_bench -- FILE [--rounds 7] [--secs 1] [--depth 32] [--mib 512]`
//!
//! `cargo run --release -p lane --example lane_bench -- executor` measures tasks, wake-ups and hops instead.
//!
//! FILE is made and filled when it does not exist. Each round runs every contender once; the table shows medians over
//! rounds, ratios are medians of the ratios within a round. CPU is user and system time of the whole process. At the
//! end one line for each figure: what, value, goal (none), tabs between.
#![allow(clippy::unwrap_used)] // a benchmark stops at the first error

mod bare;

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bare::{BLOCK, Bare, Random, Run, cpu_now};
use block::{Buffer, Disk, Safe, Sector, Segments, SegmentsMut};
use lane::{DriverKind, Options};

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

fn on_ring(plan: &Plan, writes: bool, fixed: bool) -> (Run, String) {
    let bare =
        Bare { path: &plan.path, bytes: plan.bytes, writes, fixed, depth: plan.depth, time: plan.time };
    let buffers = if fixed { "registered" } else { "plain" };
    (bare::run(&bare), format!("bare io_uring, direct, {buffers} buffers"))
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
        // What all ratios are to.
        Box::new(move |p| on_ring(p, write, true)),
        Box::new(move |p| on_ring(p, write, false)),
        // What a medium uses where it is allowed to: the one with figures.
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
    let kind = if write { "write" } else { "read" };
    println!("4 KiB random {kind}, depth {}:", plan.depth);
    println!("{:<44} {:>9} {:>9} {:>11} {:>12}", "", "IOPS", "us CPU/IO", "x bare IOPS", "x bare CPU");
    let ratio = |list: &[Run], f: fn(&Run) -> f64| {
        median(list.iter().zip(&runs[0]).map(|(a, b)| f(a) / f(b)).collect())
    };
    for (name, list) in names.iter().zip(&runs) {
        println!(
            "{name:<44} {:>9.0} {:>9.2} {:>11.3} {:>12.3}",
            median(list.iter().map(Run::iops).collect()),
            median(list.iter().map(Run::cpu_us).collect()),
            ratio(list, Run::iops),
            ratio(list, Run::cpu_us),
        );
    }
    println!("in use: bare: {}", names[0].trim_start_matches("bare "));
    println!("in use: file by our lane: {}", names[2]);
    println!(
        "file by our lane, 4 KiB {kind}, IOPS against bare io_uring\t{:.3}\t",
        ratio(&runs[2], Run::iops)
    );
    println!(
        "file by our lane, 4 KiB {kind}, CPU per I/O against the same\t{:.3}\t",
        ratio(&runs[2], Run::cpu_us)
    );
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
