//! What a snapshot costs the writer, in the process.

use std::fs::File;
use std::future::Future;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use array::{Lun, Pool};
use block::Disk;

use super::load::{
    Load, Window, anywhere, better, figure, fill, median, p99_micros, per_second, ratio, row, window,
};
use super::parts::{as_disk, background};
use super::{Arguments, medium, new_lun};

/// Windows after the snapshot.
const AFTER: usize = 4;

/// The windows of a contender, one a round each.
#[derive(Default)]
struct Seen {
    before: Vec<Window>,
    after: [Vec<Window>; AFTER],
    took: Vec<f64>,
}

/// Writes per second before a snapshot and in the seconds after it.
pub(crate) async fn snapshot(a: &Arguments) {
    for size in a.mebibytes.map_or(vec![512, 2048], |size| vec![size]) {
        let room = size * 2 + size / 4 + 256;
        // The raw file, and what of it is written again beside its reflink.
        if a.has_room(&format!("snapshot at {size} MiB"), room + size * 2) {
            snapshot_at(a, size, room).await;
        }
    }
}

async fn snapshot_at(a: &Arguments, size: u64, room: u64) {
    let (pool, lun) = new_lun(a, size, room).await;
    let (mut ours, mut theirs, mut reflinks) = (Seen::default(), Seen::default(), true);
    for round in 0..a.rounds {
        of_lun(a, &pool, &lun, round, &mut ours).await;
        if reflinks && let Err(error) = of_reflink(a, size, &mut theirs).await {
            eprintln!("SKIPPED: the file system makes no reflinks: {error}");
            reflinks = false;
        }
    }
    show("LUN", size, &ours);
    let what = format!("4 KiB writes in the first second after a snapshot, {size} MiB");
    figure(&format!("{what}, against before"), ratio(&ours.after[0], &ours.before, per_second), ">= 0.90");
    figure(&format!("{what}, p99 in ms"), median(ours.after[0].iter().map(p99_micros)) / 1e3, "");
    if reflinks {
        show("XFS reflink", size, &theirs);
        let p99 = ratio(&ours.after[0], &theirs.after[0], p99_micros);
        figure(&format!("{what}, p99 against XFS reflink's in the process"), p99, "<= 1.00");
        let kept = ratio(&theirs.after[0], &theirs.before, per_second);
        figure(&format!("the same for XFS reflink in the process, {size} MiB, against before"), kept, "");
    }
}

fn show(name: &str, size: u64, seen: &Seen) {
    println!("{size} MiB: {name}: snapshot took {:.1} ms", median(seen.took.iter().copied()));
    row(&format!("{name}: write before"), &seen.before, &seen.before);
    for (after, which) in seen.after.iter().zip(["first", "second", "third", "fourth"]) {
        row(&format!("{name}: write, {which} second after"), after, &seen.before);
    }
}

/// The windows around one snapshot.
async fn around(
    disk: &Rc<dyn Disk>,
    seconds: f64,
    take: impl Future<Output = std::io::Result<()>>,
    seen: &mut Seen,
) -> std::io::Result<()> {
    let load = Load { writes: true, depth: 16, seconds };
    let pick = anywhere(disk.shape().sectors);
    let first = window(disk, load, Rc::clone(&pick)).await;
    let before = better(first, window(disk, load, Rc::clone(&pick)).await);
    let began = Instant::now();
    take.await?;
    seen.took.push(began.elapsed().as_secs_f64() * 1e3);
    seen.before.push(before);
    for after in &mut seen.after {
        after.push(window(disk, load, Rc::clone(&pick)).await);
    }
    Ok(())
}

async fn of_lun(a: &Arguments, pool: &Rc<Pool>, lun: &Rc<Lun>, round: usize, seen: &mut Seen) {
    let (name, stop) = (format!("s{round}"), background(pool, Duration::from_millis(20)));
    let take = async { lun.snapshot(&name).await.map(drop).map_err(std::io::Error::other) };
    around(&as_disk(lun), a.seconds, take, seen).await.expect("a snapshot is taken");
    stop.set(true);
    lun.remove_snapshot(&name).await.expect("a snapshot is removed");
    pool.tidy().await.expect("merging works");
}

/// The same on a raw file made anew: each reflink leaves it in more pieces.
async fn of_reflink(a: &Arguments, size: u64, seen: &mut Seen) -> std::io::Result<()> {
    let (path, clone) = (a.directory.join("bench.raw"), a.directory.join("bench.clone"));
    let _ = std::fs::remove_file(&clone);
    let disk = medium(&path, size).await;
    fill(&*disk).await;
    around(&disk, a.seconds, async { reflink(&path, &clone) }, seen).await
}

fn reflink(from: &Path, to: &Path) -> std::io::Result<()> {
    Ok(rustix::fs::ioctl_ficlone(File::create(to)?, File::open(from)?)?)
}
