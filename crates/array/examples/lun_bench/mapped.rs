//! Snapshot and clone of a LUN that has much mapped: a map that is computed when it is read.

use std::time::{Duration, Instant};

use array::NewLun;
use block::{Disk, Safe, Sector, Segments, SegmentsMut};

use super::load::{figure, middle_and_worst};
use super::{Arguments, simulated};

/// What this thread has worked so far.
fn worked() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Snapshot and clone, with little and with much mapped. The medium is memory: nothing waits, so the longest one is
/// judged by the time that the thread worked; by the clock it is as long as the turn of whoever else had the processor.
pub(crate) async fn mapped(a: &Arguments) {
    let (gibibyte, tebibyte) = (1u64 << 30, 1u64 << 40);
    println!("in use: simulated map: memory");
    let (mut first, mut worst) = (None, Duration::ZERO);
    for (name, bytes, scattered) in [
        ("1 GiB, in order", gibibyte, false),
        ("1 GiB, scattered", gibibyte, true),
        ("10 TiB, in order", 10 * tebibyte, false),
        ("10 TiB, scattered", 10 * tebibyte, true),
    ] {
        let (_, pool, lun) =
            simulated::pool(bytes, scattered).await.unwrap_or_else(|e| panic!("{name}: {e}"));
        let mapped = pool.info().used_bytes;
        let (mut snapshots, mut clones, mut longest) = (Vec::new(), Vec::new(), Duration::ZERO);
        let mut random = fastrand::Rng::with_seed(1);
        for number in 0..a.rounds * 40 {
            let mut block = [number as u8; 4096];
            let at = Sector(random.u64(0..bytes / 4096) * 8);
            lun.read(at, &SegmentsMut::new(&mut block)).await.expect("a read works");
            lun.write(at, &Segments::new(&block), Safe::AtNextFlush).await.expect("a write works");
            let (began, before) = (Instant::now(), worked());
            lun.snapshot(&format!("s{number}")).await.expect("a snapshot is taken");
            snapshots.push(began.elapsed());
            longest = longest.max(worked() - before);
            let (began, before) = (Instant::now(), worked());
            let new = NewLun::new(&format!("clone{number}"), 0);
            pool.clone_lun("lun", &format!("s{number}"), new).await.expect("a clone is made");
            clones.push(began.elapsed());
            longest = longest.max(worked() - before);
        }
        let ((snapshot, snapshot_worst), (clone, clone_worst)) =
            (middle_and_worst(snapshots), middle_and_worst(clones));
        if bytes > tebibyte {
            worst = worst.max(longest);
        }
        let base = *first.get_or_insert((snapshot, clone));
        let ratios = [snapshot, clone]
            .iter()
            .zip([base.0, base.1])
            .map(|(this, base)| this.as_secs_f64() / base.as_secs_f64())
            .collect::<Vec<_>>();
        println!(
            "{name:<18} ({:>5} GiB used): snapshot {snapshot:>9.1?} ({:.2}), longest {snapshot_worst:.1?}; \
             clone {clone:>9.1?} ({:.2}), longest {clone_worst:.1?}; longest at work {longest:.1?}",
            mapped >> 30,
            ratios[0],
            ratios[1]
        );
        if bytes > tebibyte {
            figure(&format!("snapshot with {name}, time against 1 GiB"), ratios[0], "");
            figure(&format!("clone with {name}, time against 1 GiB"), ratios[1], "");
        }
    }
    let what = "longest snapshot or clone with 10 TiB mapped, ms of work, without the flush";
    figure(what, worst.as_secs_f64() * 1e3, "<= 5");
}
