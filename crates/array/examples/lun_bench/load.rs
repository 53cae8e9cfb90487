//! The load, and what is measured of it.

use std::rc::Rc;
use std::time::{Duration, Instant};

use block::{Buffer, Disk, Safe, Sector, Segments, SegmentsMut};

const BLOCK: usize = 4096;

/// One measured window.
#[derive(Copy, Clone, Default)]
pub struct Window {
    pub per_second: f64,
    pub cpu_micros: f64,
    pub p99_micros: f64,
}

/// What is done: by how many at a time, and for how long.
#[derive(Copy, Clone)]
pub struct Load {
    pub writes: bool,
    pub depth: u64,
    pub seconds: f64,
}

fn cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Operations of 4 KiB at places that `pick` draws.
pub async fn window(
    disk: &Rc<dyn Disk>,
    load: Load,
    pick: Rc<dyn Fn(&mut fastrand::Rng) -> Sector>,
) -> Window {
    let (began, cpu_before) = (Instant::now(), cpu());
    let end = began + Duration::from_secs_f64(load.seconds);
    let workers: Vec<_> = (0..load.depth)
        .map(|worker| {
            let (disk, pick) = (Rc::clone(disk), Rc::clone(&pick));
            lane::spawn(async move {
                let mut random = fastrand::Rng::with_seed(worker + began.elapsed().as_nanos() as u64);
                let mut buffer = Buffer::zeroed(BLOCK);
                buffer.fill(worker as u8 + 1);
                let mut times = Vec::new();
                loop {
                    let start = Instant::now();
                    if start >= end {
                        return times;
                    }
                    let at = pick(&mut random);
                    let done = match load.writes {
                        true => disk.write(at, &Segments::new(&buffer), Safe::AtNextFlush).await,
                        false => disk.read(at, &SegmentsMut::new(&mut buffer)).await,
                    };
                    done.expect("the medium of a benchmark works");
                    times.push(start.elapsed().as_nanos() as u32);
                }
            })
        })
        .collect();
    let mut times = Vec::new();
    for worker in workers {
        times.extend(worker.await);
    }
    times.sort_unstable();
    let count = times.len().max(1);
    Window {
        per_second: count as f64 / began.elapsed().as_secs_f64(),
        cpu_micros: (cpu() - cpu_before).as_secs_f64() * 1e6 / count as f64,
        p99_micros: f64::from(times.get(count * 99 / 100).copied().unwrap_or(0)) / 1e3,
    }
}

/// Random blocks of the first `sectors`.
pub fn anywhere(sectors: u64) -> Rc<dyn Fn(&mut fastrand::Rng) -> Sector> {
    Rc::new(move |random| Sector(random.u64(0..sectors / 8) * 8))
}

/// The faster of two windows.
pub fn better(a: Window, b: Window) -> Window {
    if a.per_second < b.per_second { b } else { a }
}

pub fn median(list: impl Iterator<Item = f64>) -> f64 {
    let mut list: Vec<f64> = list.collect();
    list.sort_by(f64::total_cmp);
    list[list.len() / 2]
}

/// Median over rounds of the ratio within a round.
pub fn ratio(this: &[Window], to: &[Window], of: fn(&Window) -> f64) -> f64 {
    median(this.iter().zip(to).map(|(this, to)| of(this) / of(to)))
}

/// Writes everything once, in pieces of 1 MiB.
pub async fn fill(disk: &dyn Disk) {
    let mut buffer = Buffer::zeroed(1 << 20);
    buffer.fill(0x5a);
    let sectors = disk.shape().sectors;
    for at in (0..sectors).step_by(2048) {
        let data = Segments::new(&buffer[..((sectors - at).min(2048) * 512) as usize]);
        disk.write(Sector(at), &data, Safe::AtNextFlush).await.expect("filling works");
    }
    disk.flush().await.expect("a flush works");
}

pub fn per_second(window: &Window) -> f64 {
    window.per_second
}

pub fn cpu_micros(window: &Window) -> f64 {
    window.cpu_micros
}

pub fn p99_micros(window: &Window) -> f64 {
    window.p99_micros
}

/// Prints the windows of a contender, one a round, with the ratios to those of another one.
pub fn row(name: &str, this: &[Window], to: &[Window]) {
    print!(
        "{name:<34} {:>9.0}/s ({:.3})  cpu {:>6.2} us ({:.3})",
        median(this.iter().map(per_second)),
        ratio(this, to, per_second),
        median(this.iter().map(cpu_micros)),
        ratio(this, to, cpu_micros),
    );
    // The bare loop does not look at the clock so often.
    let p99 = median(this.iter().map(p99_micros));
    if p99.is_nan() { println!() } else { println!("  p99 {p99:>7.0} us") }
}

/// One figure for `bench/run`: what, value, goal such as ">= 0.90" or none, tabs between.
pub fn figure(what: &str, value: f64, goal: &str) {
    println!("{what}\t{value:.3}\t{goal}");
}

/// Median and largest of some times.
pub fn middle_and_worst(mut times: Vec<Duration>) -> (Duration, Duration) {
    times.sort_unstable();
    (times[times.len() / 2], times[times.len() - 1])
}
