//! The parts that run on a real medium.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use array::{Decider, Lun, NewLun, NewPool, Options, Pool};
use block::{Buffer, Disk, Safe, Sector, Segments};

use super::bare::{self, Bare};
use super::load::{Load, Window, anywhere, cpu_micros, figure, fill, per_second, ratio, row, window};
use super::{Arguments, medium, new_lun};

/// Sectors of a grain.
const GRAIN: u64 = 128;

pub(crate) fn as_disk(lun: &Rc<Lun>) -> Rc<dyn Disk> {
    Rc::clone(lun) as Rc<dyn Disk>
}

pub(crate) async fn base(a: &Arguments) {
    let (size, room) = (a.mebibytes(), a.mebibytes() + a.mebibytes() / 8 + 256);
    if !a.has_room("base", size + room) {
        return;
    }
    let path = a.directory.join("bench.raw");
    let file = medium(&path, size).await;
    fill(&*file).await;
    let (_pool, lun) = new_lun(a, size, room).await;
    println!("in use: bare: io_uring, direct, registered buffers");
    let (lun, sectors) = (as_disk(&lun), size << 11);
    for (writes, kind) in [(false, "read"), (true, "write")] {
        let mut seen: [Vec<Window>; 3] = Default::default();
        let load = Load { writes, depth: 32, seconds: a.seconds };
        let loop_of_its_own = Bare {
            path: &path,
            bytes: size << 20,
            writes,
            fixed: true,
            depth: 32,
            time: Duration::from_secs_f64(a.seconds),
        };
        for round in 0..a.rounds {
            for turn in 0..3 {
                let contender = (round + turn) % 3;
                seen[contender].push(match contender {
                    0 => alone(&loop_of_its_own),
                    1 => window(&file, load, anywhere(sectors)).await,
                    _ => window(&lun, load, anywhere(sectors)).await,
                });
            }
        }
        let [bare, file, lun] = &seen;
        row(&format!("{kind} bare io_uring"), bare, bare);
        row(&format!("{kind} file by our lane"), file, bare);
        row(&format!("{kind} LUN"), lun, bare);
        let what = format!("LUN, 4 KiB {kind} depth 32");
        figure(
            &format!("{what}, IOPS against the bare file by io_uring"),
            ratio(lun, bare, per_second),
            ">= 0.90",
        );
        figure(&format!("{what}, CPU per I/O against the same"), ratio(lun, bare, cpu_micros), "<= 1.30");
        figure(&format!("{what}, IOPS against the file by our lane"), ratio(lun, file, per_second), "");
    }
}

/// The bare loop. It has the thread for itself: nothing else is at work on this lane.
fn alone(bare: &Bare) -> Window {
    let run = bare::run(bare);
    Window { per_second: run.iops(), cpu_micros: run.cpu_us(), p99_micros: f64::NAN }
}

/// Reads through 32 snapshots.
pub(crate) async fn depth(a: &Arguments) {
    let size = a.mebibytes();
    // One LUN without snapshots, one with; what is spread takes four grains for each.
    let room = size * 6 + size / 2 + 128;
    if !a.has_room("depth", room) {
        return;
    }
    let (pool, shallow) = new_lun(a, size, room).await;
    let sectors = size << 11;
    let deep = pool.create_lun(NewLun::new("deep", sectors)).await.expect("a LUN is made");
    fill(&*deep).await;
    let (flat, low) = (as_disk(&shallow), as_disk(&deep));
    for number in 0..32 {
        deep.snapshot(&format!("low{number}")).await.expect("a snapshot is taken");
    }
    compare(a, "only in the lowest of 33 layers", &flat, &low).await;
    // Every quarter of a grain in another layer: each layer has blocks everywhere, and no read ends in the lowest.
    let mut buffer = Buffer::zeroed(16 << 10);
    for number in 0..32u64 {
        buffer.fill(number as u8 + 1);
        for quarter in (0..sectors / 32).filter(|q| (q / 4 * 7 + q % 4 * 11) % 32 == number) {
            let data = Segments::new(&buffer);
            deep.write(Sector(quarter * 32), &data, Safe::AtNextFlush).await.expect("a write works");
        }
        deep.snapshot(&format!("spread{number}")).await.expect("a snapshot is taken");
    }
    compare(a, "spread over 32 layers of 65", &flat, &low).await;
}

async fn compare(a: &Arguments, name: &str, flat: &Rc<dyn Disk>, deep: &Rc<dyn Disk>) {
    let mut seen: [Vec<Window>; 2] = Default::default();
    let load = Load { writes: false, depth: 32, seconds: a.seconds };
    for round in 0..a.rounds {
        for turn in 0..2 {
            let contender = (round + turn) % 2;
            let disk = [flat, deep][contender];
            seen[contender].push(window(disk, load, anywhere(disk.shape().sectors)).await);
        }
    }
    let [flat, deep] = &seen;
    row("read depth 0", flat, flat);
    row(&format!("read {name}"), deep, flat);
    let what = format!("read 32 snapshots deep, {name}");
    figure(&format!("{what}, IOPS against depth 0"), ratio(deep, flat, per_second), ">= 0.90");
    figure(&format!("{what}, CPU per I/O against depth 0"), ratio(deep, flat, cpu_micros), "<= 1.10");
}

/// A map ten times larger than the cache: a thin LUN with a grain under every page of its map.
pub(crate) async fn cache(a: &Arguments) {
    const LEAVES: u64 = 2560;
    // A page of the map covers 504 grains.
    const COVERS: u64 = 504 * GRAIN;
    let room = LEAVES / 16 * 2 + 256;
    if !a.has_room("cache", room) {
        return;
    }
    let disk = medium(&a.directory.join("bench.pool"), room).await;
    fill(&*disk).await;
    let mut seen: [[Vec<Window>; 2]; 2] = Default::default();
    let new = NewPool::new("bench");
    let made = Pool::create(vec![Rc::clone(&disk)], new, Options::default()).await.expect("a pool is made");
    let lun = made.create_lun(NewLun::new("lun", LEAVES * COVERS)).await.expect("a LUN is made");
    let mut buffer = Buffer::zeroed(64 << 10);
    buffer.fill(7);
    for leaf in 0..LEAVES {
        let written = lun.write(Sector(leaf * COVERS), &Segments::new(&buffer), Safe::AtNextFlush).await;
        written.expect("a write works");
    }
    made.settle().await.expect("the pool is brought to rest");
    drop((lun, made));
    for _ in 0..a.rounds {
        for (contender, pages) in [1 << 14, LEAVES as usize / 10].into_iter().enumerate() {
            let options = Options { cache_pages: pages, ..Options::default() };
            let pool = Pool::open(vec![Rc::clone(&disk)], options).await.expect("the pool opens");
            let lun = as_disk(&pool.lun("lun").expect("it is there"));
            let pick = Rc::new(|random: &mut fastrand::Rng| {
                Sector(random.u64(0..LEAVES) * COVERS + random.u64(0..16) * 8)
            });
            for writes in [false, true] {
                let load = Load { writes, depth: 32, seconds: a.seconds };
                window(&lun, Load { seconds: a.seconds / 4.0, ..load }, pick.clone()).await; // warms the cache up
                seen[usize::from(writes)][contender].push(window(&lun, load, pick.clone()).await);
            }
            println!("cache of {} pages, {} in memory, map of {LEAVES}", pages, pool.info().cached_pages);
        }
    }
    for (name, [fits, large]) in ["read", "write"].iter().zip(&seen) {
        row(&format!("{name}, the map fits its cache"), fits, fits);
        row(&format!("{name}, the map is 10 caches"), large, fits);
        let what = format!("4 KiB {name}, a map ten times its cache");
        figure(&format!("{what}, IOPS against one that fits"), ratio(large, fits, per_second), "");
        figure(&format!("{what}, CPU per I/O against one that fits"), ratio(large, fits, cpu_micros), "");
    }
}

/// What the daemon does beside its guests, every 20 ms; or without a pause while there is something to do.
pub(crate) fn background(pool: &Rc<Pool>, every: Duration) -> Rc<Cell<bool>> {
    let (pool, stop) = (Rc::clone(pool), Rc::new(Cell::new(false)));
    let stopped = Rc::clone(&stop);
    drop(lane::spawn(async move {
        while !stopped.get() {
            let untidy = pool.is_untidy();
            lane::sleep(if untidy { every } else { Duration::from_millis(5).max(every) }).await;
            if untidy {
                pool.tidy_step().await.expect("background work works");
            }
        }
    }));
    stop
}

/// A cut over 64 LUNs while all of them are written to.
pub(crate) async fn group(a: &Arguments) {
    const LUNS: u64 = 64;
    const SECTORS: u64 = 4 << 11;
    let room = LUNS * 4 * 3 + 256;
    if !a.has_room("group", room) {
        return;
    }
    let (pool, _) = new_lun(a, 8, room).await;
    let mut luns = Vec::new();
    for number in 0..LUNS {
        let lun =
            pool.create_lun(NewLun::new(&format!("lun{number}"), SECTORS)).await.expect("a LUN is made");
        fill(&*lun).await;
        luns.push(lun);
    }
    let (stop, written) = (background(&pool, Duration::ZERO), Rc::new(Cell::new(0u64)));
    let writers: Vec<_> = luns
        .iter()
        .map(|lun| {
            let (lun, stop, written) = (Rc::clone(lun), Rc::clone(&stop), Rc::clone(&written));
            lane::spawn(async move {
                let (mut random, mut buffer) = (fastrand::Rng::with_seed(lun.id), Buffer::zeroed(4096));
                buffer.fill(lun.id as u8);
                while !stop.get() {
                    let at = Sector(random.u64(0..SECTORS / 8) * 8);
                    let data = Segments::new(&buffer);
                    lun.write(at, &data, Safe::AtNextFlush).await.expect("the medium of a benchmark works");
                    written.set(written.get() + 1);
                }
            })
        })
        .collect();
    let (mut holds, began) = (Vec::new(), Instant::now());
    for number in 0..a.rounds * 20 {
        holds.push(cut(&pool, &luns, number).await);
        lane::sleep(Duration::from_millis(20)).await;
        for lun in &luns {
            lun.remove_snapshot(&format!("cut{number}")).await.expect("a snapshot is removed");
        }
        if number % 20 == 19 {
            eprintln!("{} cuts, {:?}", number + 1, began.elapsed());
        }
        // 64 layers have to be merged after each cut, each grain of them with a copy: not more than there is room for.
        while pool.info().used_bytes * 3 > pool.info().bytes * 2 {
            lane::sleep(Duration::from_millis(5)).await;
        }
    }
    let per_second = written.get() as f64 / began.elapsed().as_secs_f64();
    stop.set(true);
    for writer in writers {
        writer.await;
    }
    holds.sort_unstable();
    let at = |part: usize| holds[(holds.len() - 1) * part / 1000];
    println!(
        "{} cuts over {LUNS} LUNs at {per_second:.0} writes/s: held p50 {:?}, p99 {:?}, longest {:?}",
        holds.len(),
        at(500),
        at(990),
        at(1000)
    );
    figure("a cut over 64 LUNs under load, hold p99 in ms", at(990).as_secs_f64() * 1e3, "<= 10");
}

/// One cut; how long the writers were held.
async fn cut(pool: &Rc<Pool>, luns: &[Rc<Lun>], number: usize) -> Duration {
    let members: Vec<_> = luns.iter().map(|lun| (Rc::clone(lun), format!("cut{number}"))).collect();
    let group = uuid::Uuid::new_v4();
    let prepared =
        pool.prepare_cut(group, Decider::Pool(pool.uuid()), &members).await.expect("it is prepared");
    let began = Instant::now();
    luns.iter().for_each(|lun| lun.gate().close());
    for lun in luns {
        lun.gate().drained().await;
    }
    prepared.cut();
    luns.iter().for_each(|lun| lun.gate().open());
    let held = began.elapsed();
    prepared.settle().await.expect("the cut becomes durable");
    pool.write_group_record(group).await.expect("the cut is decided");
    prepared.commit().await.expect("the cut is done");
    held
}
