//! What must not cost more because a LUN is large: a simulated map of 10 TiB, and the pages that are read of it.

#[path = "../examples/lun_bench/simulated.rs"]
mod simulated;

use std::rc::Rc;

use array::{Lun, LunError, NewLun, NewPool, Options, Pool};
use block::{Disk, Extents, Generation, MemoryDisk, Safe, Sector, Segments, SegmentsMut, conformance};
use simulated::{Medium, Operations};

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

/// What the medium of the other tests here does without a pretended map is what every disk does.
#[test]
fn the_medium_of_these_tests_passes_the_conformance_suite() {
    lane::block_on(conformance::check(Medium::new(5003), 1));
}

/// What a piece of work asks of the medium.
async fn asks<T>(medium: &Medium, work: impl Future<Output = T>) -> (T, Operations) {
    let before = medium.operations();
    let out = work.await;
    let after = medium.operations();
    let asked = Operations {
        reads: after.reads - before.reads,
        writes: after.writes - before.writes,
        flushes: after.flushes - before.flushes,
    };
    (out, asked)
}

/// One record of the journal and its flush: nothing else is written, and nothing is read.
const ONE_RECORD: Operations = Operations { reads: 0, writes: 1, flushes: 1 };

/// Snapshot, clone and revert ask the same of the medium whatever the size of the LUN and wherever its grains lie.
#[test]
fn a_cut_costs_the_same_at_one_gibibyte_and_at_ten_tebibytes() {
    lane::block_on(async {
        for bytes in [1 << 30, 10 * TEBIBYTE] {
            for scattered in [false, true] {
                let (medium, pool, lun) = simulated::pool(bytes, scattered).await.expect("a pool is made");
                let what = format!("{bytes} bytes, scattered: {scattered}");
                // The first flush after opening is due in any case: what was there may be in a cache of the device.
                lun.flush().await.expect("a flush works");
                let (snapshot, asked) = asks(&medium, lun.snapshot("first")).await;
                snapshot.expect("a snapshot is taken");
                assert_eq!(asked, ONE_RECORD, "snapshot, {what}");
                let clone = pool.clone_lun("lun", "first", NewLun::new("clone", 0));
                let (clone, asked) = asks(&medium, clone).await;
                let clone = clone.expect("a clone is made");
                assert_eq!(asked, ONE_RECORD, "clone, {what}");
                let (reverted, asked) = asks(&medium, lun.revert("first")).await;
                reverted.expect("it is reverted");
                assert_eq!(asked, ONE_RECORD, "revert, {what}");
                let (accepted, asked) = asks(&medium, lun.accept()).await;
                accepted.expect("it is accepted");
                assert_eq!(asked, ONE_RECORD, "accept, {what}");
                // What was written since the last flush is flushed first: it is in the snapshot.
                write(&lun, &mut fastrand::Rng::with_seed(3), 1).await;
                let (snapshot, asked) = asks(&medium, lun.snapshot("second")).await;
                snapshot.expect("a snapshot is taken");
                assert_eq!(asked, Operations { flushes: 2, ..ONE_RECORD }, "snapshot of a busy LUN, {what}");
                let (_, asked) = asks(&medium, clone.flush()).await;
                assert_eq!(asked, Operations::default(), "nothing is left to be flushed, {what}");
            }
        }
    });
}

/// The blocks that changed since a cut.
async fn changed(disk: &dyn Disk, since: Generation) -> Vec<u64> {
    let (mut blocks, mut at, sectors) = (Vec::new(), 0, disk.shape().sectors);
    while at < sectors {
        let mut out = Extents::with_limit(1000);
        disk.status(Sector(at), sectors - at, Some(since), &mut out).await.expect("the cut is known");
        for extent in out.iter().filter(|e| e.changed) {
            blocks.extend(extent.at.0 / 8..extent.at.plus(extent.count).0.div_ceil(8));
        }
        at = out.end().expect("it gets on").0;
    }
    blocks
}

/// The block that a round writes: some lie together in a grain, and every seventh round writes where the first did.
fn block_of(round: u64) -> u64 {
    if round.is_multiple_of(7) { 5 } else { round * 37 % 4096 }
}

async fn byte_at(disk: &dyn Disk, block: u64) -> u8 {
    let mut bytes = [0xee; 4096];
    disk.read(Sector(block * 8), &SegmentsMut::new(&mut bytes)).await.expect("a read works");
    assert!(bytes.iter().all(|b| *b == bytes[0]), "block {block} is whole");
    bytes[0]
}

#[test]
fn five_hundred_snapshots_deep_nothing_is_slower_or_wrong() {
    const DEPTH: u64 = 500;
    lane::block_on(async {
        let medium = Medium::new(256 << 11);
        let pool = Pool::create(vec![medium.clone()], NewPool::new("p"), Options::default()).await;
        let pool = pool.expect("a pool is made");
        let lun = pool.create_lun(NewLun::new("lun", 4096 * 8)).await.expect("a LUN is made");
        let mut cuts = Vec::new();
        for round in 0..DEPTH {
            let bytes = [round as u8 | 1; 4096];
            let at = Sector(block_of(round) * 8);
            lun.write(at, &Segments::new(&bytes), Safe::AtNextFlush).await.expect("a write works");
            lun.flush().await.expect("a flush works");
            // The journal is empty: no checkpoint comes between.
            pool.settle().await.expect("it settles");
            let (snapshot, asked) = asks(&medium, lun.snapshot(&format!("s{round}"))).await;
            assert_eq!(asked, ONE_RECORD, "at depth {round}");
            cuts.push(snapshot.expect("a snapshot is taken"));
        }
        let content = |rounds: u64| {
            let mut model = vec![0u8; 4096];
            (0..rounds).for_each(|round| model[block_of(round) as usize] = round as u8 | 1);
            model
        };
        for depth in [0, 1, 6, 7, 249, 250, 498, 499] {
            let (cut, model) = (&cuts[depth as usize], content(depth + 1));
            for block in 0..4096 {
                let found = byte_at(&**cut, block).await;
                assert_eq!(found, model[block as usize], "snapshot {depth}, block {block}");
            }
            let mut since: Vec<u64> = (depth + 1..DEPTH).map(block_of).collect();
            since.sort_unstable();
            since.dedup();
            assert_eq!(changed(&*lun, cut.generation()).await, since, "since snapshot {depth}");
            // Between two cuts, both of them old.
            let upper = &cuts[(depth as usize + 100).min(499)];
            let mut between: Vec<u64> = (depth + 1..(depth + 101).min(DEPTH)).map(block_of).collect();
            between.sort_unstable();
            between.dedup();
            assert_eq!(changed(&**upper, cut.generation()).await, between, "after snapshot {depth}");
        }
        let model = content(DEPTH);
        for block in 0..4096 {
            assert_eq!(byte_at(&*lun, block).await, model[block as usize], "the LUN, block {block}");
        }
        let clone = pool.clone_lun("lun", "s250", NewLun::new("clone", 0)).await.expect("a clone is made");
        assert_eq!(changed(&*clone, cuts[250].generation()).await, []);
        lun.revert("s1").await.expect("it is reverted");
        assert_eq!(byte_at(&*lun, block_of(1)).await, 1);
        assert_eq!(byte_at(&*lun, block_of(300)).await, content(2)[block_of(300) as usize]);
        assert!(pool.check().await.expect("it is checked").findings.is_empty());
    });
}

/// The largest LUN there is, in a small pool: to its very end, and not a sector further.
#[test]
fn a_lun_of_64_tebibytes_works_to_its_last_block() {
    const SECTORS: u64 = 64 * TEBIBYTE / 512;
    lane::block_on(async {
        let medium = Rc::new(MemoryDisk::new(64 << 11));
        let pool = Pool::create(vec![medium.clone()], NewPool::new("p"), Options::default()).await;
        let pool = pool.expect("a pool is made");
        let refused = pool.create_lun(NewLun::new("more", SECTORS + 1)).await;
        assert!(matches!(refused, Err(LunError::Size { sectors }) if sectors == SECTORS + 1), "one more");
        let lun = pool.create_lun(NewLun::new("lun", SECTORS)).await.expect("a LUN is made");
        assert_eq!(lun.shape().bytes(), 64 * TEBIBYTE);
        assert!(matches!(lun.resize(SECTORS + 1).await, Err(LunError::Size { .. })));
        let last = SECTORS / 8 - 1;
        let put = async |block: u64, byte: u8| {
            let bytes = [byte; 4096];
            let at = Sector(block * 8);
            lun.write(at, &Segments::new(&bytes), Safe::AtNextFlush).await.expect("a write works");
        };
        put(last, 1).await;
        let over = lun.write(Sector(SECTORS - 7), &Segments::new(&[1; 4096]), Safe::AtNextFlush).await;
        assert!(matches!(over, Err(block::DiskError::OutOfRange)), "{over:?}");
        let cut = lun.snapshot("s").await.expect("a snapshot is taken");
        assert_eq!(changed(&*lun, cut.generation()).await, []);
        put(last, 2).await;
        put(0, 3).await;
        put(last / 2, 4).await;
        assert_eq!(changed(&*lun, cut.generation()).await, [0, last / 2, last]);
        lun.unmap(Sector(8), SECTORS - 16).await.expect("unmapping works");
        assert_eq!((byte_at(&*lun, last).await, byte_at(&*lun, last / 2).await), (2, 0));
        assert_eq!((byte_at(&*cut, last).await, byte_at(&*cut, 0).await), (1, 0));
        lun.flush().await.expect("a flush works");
        let pool = Pool::open(vec![medium], Options::default()).await.expect("it opens");
        let lun = pool.lun("lun").expect("the LUN is there");
        assert_eq!((byte_at(&*lun, last).await, byte_at(&*lun, 0).await), (2, 3));
        assert!(pool.check().await.expect("it is checked").findings.is_empty());
    });
}
