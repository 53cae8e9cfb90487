//! What must not cost more because a LUN is large: a simulated map of 10 TiB, and the pages that are read of it.

#[path = "../examples/lun_bench/simulated.rs"]
mod simulated;

use array::{Lun, Pool};
use block::{Disk, Safe, Sector, Segments};

const TEBIBYTE: u64 = 1 << 40;
/// Pages of the map of 10 TiB.
const ALL_PAGES: u64 = 10 * TEBIBYTE / (504 << 16);

async fn write(lun: &Lun, random: &mut fastrand::Rng, count: u64) {
    for _ in 0..count {
        let at = Sector(random.u64(0..lun.shape().sectors / 8) * 8);
        lun.write(at, &Segments::new(&[7; 4096]), Safe::AtNextFlush).await.expect("a write works");
    }
}

/// Background work to its end; steps, and the most pages that one of them read.
async fn tidy(pool: &Pool, medium: &simulated::Medium) -> (u64, u64) {
    let (mut steps, mut most) = (0, 0);
    loop {
        let before = medium.page_reads.get();
        if !pool.tidy_step().await.expect("background work works") || !pool.is_untidy() {
            return (steps, most);
        }
        most = most.max(medium.page_reads.get() - before);
        steps += 1;
    }
}

#[test]
fn what_a_hold_kept_goes_at_the_cost_of_what_was_written_since() {
    lane::block_on(async {
        let (medium, pool, lun) = simulated::pool(10 * TEBIBYTE, true).await.expect("a pool is made");
        let mut random = fastrand::Rng::with_seed(1);
        let first = lun.snapshot("base").await.expect("a snapshot is taken").generation();
        lun.hold(first, "backup").await.expect("it is held");
        lun.remove_snapshot("base").await.expect("a snapshot is removed");
        write(&lun, &mut random, 1500).await;
        let second = lun.snapshot("next").await.expect("a snapshot is taken").generation();
        lun.hold(second, "backup").await.expect("it is held");
        lun.remove_snapshot("next").await.expect("a snapshot is removed");
        write(&lun, &mut random, 500).await;
        tidy(&pool, &medium).await;
        for generation in [first, second] {
            let before = medium.page_reads.get();
            lun.release(generation, "backup").await.expect("it is released");
            let (steps, most) = tidy(&pool, &medium).await;
            let read = medium.page_reads.get() - before;
            eprintln!("{steps} steps read {read} pages of {ALL_PAGES}, at most {most} in one");
            assert!(read < ALL_PAGES / 20, "{read} pages were read");
            assert!(most < 10_000 && pool.info().cached_pages <= pool.info().cache_limit_pages + 5000);
        }
        assert!(pool.hidden_layers().await.expect("a map is read").is_empty());
    });
}

#[test]
fn a_grain_is_found_without_a_search_from_the_beginning() {
    lane::block_on(async {
        let (medium, pool, lun) = simulated::pool(10 * TEBIBYTE, false).await.expect("a pool is made");
        lun.snapshot("s").await.expect("a snapshot is taken");
        let before = medium.page_reads.get();
        write(&lun, &mut fastrand::Rng::with_seed(1), 1).await;
        lun.flush().await.expect("a flush works");
        let read = medium.page_reads.get() - before;
        assert!(read < 20, "{read} pages were read");
        drop(pool);
    });
}
