//! What the background does with room: boundaries give up what nobody can reach, grains are completed, and what was
//! freed goes back to the medium.

use std::rc::Rc;

use block::{Disk, Extents, Generation, MemoryDisk, Safe, Sector, Segments, SegmentsMut};

use super::{content, differences, new_pool, pattern};
use crate::format::{Entry, GRAIN_BYTES};
use crate::{Finding, Lun, NewLun, Options, Pool};

const MEDIUM: u64 = 64 << 11;
/// Sectors of a grain.
const GRAIN: u64 = 128;

async fn pool() -> (Rc<MemoryDisk>, Rc<Pool>) {
    let medium = Rc::new(MemoryDisk::new(MEDIUM));
    let pool = Pool::create(vec![medium.clone()], new_pool(), Options::default()).await.unwrap();
    (medium, pool)
}

async fn write(disk: &dyn Disk, at: u64, count: u64, tag: u64) {
    disk.write(Sector(at), &Segments::new(&pattern(count, tag)), Safe::AtNextFlush).await.unwrap();
}

/// Sectors said to be changed since a cut, as runs.
async fn changed(lun: &Lun, since: Generation) -> Vec<(u64, u64)> {
    let (mut out, mut runs, mut at) = (Extents::with_limit(16), Vec::<(u64, u64)>::new(), 0);
    while at < lun.shape().sectors {
        out.clear();
        lun.status(Sector(at), lun.shape().sectors - at, Some(since), &mut out).await.unwrap();
        for extent in out.iter().filter(|e| e.changed) {
            match runs.last_mut().filter(|(at, count)| at + count == extent.at.0) {
                Some((_, count)) => *count += extent.count,
                None => runs.push((extent.at.0, extent.count)),
            }
        }
        at = out.end().unwrap().0;
    }
    runs
}

async fn clean(pool: &Pool) {
    let report = pool.check().await.unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
}

/// A LUN of 40 grains, a cut that is held, and a snapshot of it that is gone.
async fn held(pool: &Rc<Pool>) -> (Rc<Lun>, Generation) {
    let lun = pool.create_lun(NewLun::new("a", 8192)).await.unwrap();
    write(&*lun, 0, 40 * GRAIN, 1).await;
    let generation = lun.snapshot("s").await.unwrap().generation();
    lun.hold(generation, "backup").await.unwrap();
    (lun, generation)
}

#[test]
fn r43_a_boundary_gives_its_data_up_and_no_change_is_missed() {
    lane::block_on(async {
        let (medium, pool) = pool().await;
        let (lun, generation) = held(&pool).await;
        // While the snapshot is there nothing moves.
        write(&*lun, 3 * GRAIN + 8, 8, 2).await;
        lun.unmap(Sector(5 * GRAIN), GRAIN).await.unwrap();
        pool.tidy().await.unwrap();
        assert_eq!(lun.snapshot_use("s").await.unwrap().data_grains, 40);
        lun.remove_snapshot("s").await.unwrap();
        pool.tidy().await.unwrap();
        // One was copied to where its neighbour had been written, one was all hidden.
        assert_eq!(pool.hidden_layers().await.unwrap()[0].1, (38 + 1) * GRAIN_BYTES);
        let before = pool.info().used_bytes;
        // First writes take grains over whole: none is added.
        for grain in 10..20 {
            write(&*lun, grain * GRAIN + 16, 8, grain).await;
            write(&*lun, grain * GRAIN + 43, 3, grain + 100).await;
        }
        assert_eq!(pool.info().used_bytes, before);
        assert_eq!(pool.hidden_layers().await.unwrap()[0].1, (28 + 1) * GRAIN_BYTES);
        // A grain that is written anew goes to a new place; the old one is freed in the background.
        write(&*lun, 30 * GRAIN, GRAIN, 77).await;
        lun.flush().await.unwrap();
        pool.tidy().await.unwrap();
        assert_eq!(pool.info().used_bytes, before);
        clean(&pool).await;
        let mut wanted = vec![(3 * GRAIN + 8, 8), (5 * GRAIN, GRAIN)];
        wanted.extend((10..20).flat_map(|g| [(g * GRAIN + 16, 8), (g * GRAIN + 40, 8)]));
        wanted.push((30 * GRAIN, GRAIN));
        assert_eq!(changed(&lun, generation).await, wanted);
        let image = content(&*lun).await.unwrap();
        pool.settle().await.unwrap();
        let pool = Pool::open(vec![medium], Options::default()).await.unwrap();
        let lun = pool.lun("a").unwrap();
        pool.tidy().await.unwrap();
        assert_eq!(changed(&lun, generation).await, wanted);
        lun.release(generation, "backup").await.unwrap();
        pool.tidy().await.unwrap();
        assert!(differences(&content(&*lun).await.unwrap().pages, &image.pages).is_empty());
        assert!(pool.hidden_layers().await.unwrap().is_empty());
        clean(&pool).await;
    });
}

/// Two boundaries on each other; a younger snapshot above them; a question that spans both.
#[test]
fn r43_boundaries_lie_on_each_other() {
    lane::block_on(async {
        let (_medium, pool) = pool().await;
        let (lun, first) = held(&pool).await;
        write(&*lun, 2 * GRAIN, 8, 2).await;
        write(&*lun, 4 * GRAIN, GRAIN / 2, 3).await;
        let second = lun.snapshot("t").await.unwrap().generation();
        lun.hold(second, "mirror").await.unwrap();
        lun.remove_snapshot("s").await.unwrap();
        pool.tidy().await.unwrap();
        lun.remove_snapshot("t").await.unwrap();
        for grain in [1, 2, 4, 6] {
            write(&*lun, grain * GRAIN + 8, 16, 10 + grain).await;
        }
        pool.tidy().await.unwrap();
        clean(&pool).await;
        let since_second: Vec<_> = [1, 2, 4, 6].map(|g| (g * GRAIN + 8, 16)).to_vec();
        assert_eq!(changed(&lun, second).await, since_second);
        let since_first =
            [(GRAIN + 8, 16), (2 * GRAIN, 24), (4 * GRAIN, GRAIN / 2), (6 * GRAIN + 8, 16)].to_vec();
        assert_eq!(changed(&lun, first).await, since_first);
        // 40 grains hold all there is: nothing is kept twice.
        let layers = pool.check().await.unwrap().layers;
        assert_eq!(layers.values().map(|l| l.data_grains).sum::<u64>(), 40);
        let image = content(&*lun).await.unwrap();
        let third = lun.snapshot("u").await.unwrap();
        lun.release(second, "mirror").await.unwrap();
        pool.tidy().await.unwrap();
        assert_eq!(changed(&lun, first).await, since_first);
        assert!(differences(&content(&*third).await.unwrap().pages, &image.pages).is_empty());
        lun.release(first, "backup").await.unwrap();
        pool.tidy().await.unwrap();
        assert!(differences(&content(&*lun).await.unwrap().pages, &image.pages).is_empty());
        clean(&pool).await;
    });
}

/// A hold that no history has any more goes by itself.
#[test]
fn r45_a_hold_of_an_abandoned_branch_is_forgotten() {
    lane::block_on(async {
        let (_medium, pool) = pool().await;
        let (lun, first) = held(&pool).await;
        write(&*lun, 0, 8, 5).await;
        let second = lun.snapshot("t").await.unwrap().generation();
        lun.hold(second, "mirror").await.unwrap();
        lun.remove_snapshot("t").await.unwrap();
        lun.revert("s").await.unwrap();
        pool.tidy().await.unwrap();
        lun.undo_revert().await.unwrap();
        assert_eq!(changed(&lun, second).await, []);
        lun.revert("s").await.unwrap();
        lun.accept().await.unwrap();
        pool.tidy().await.unwrap();
        assert_eq!(changed(&lun, first).await, []);
        let mut out = Extents::with_limit(1);
        assert!(lun.status(Sector(0), 8, Some(second), &mut out).await.is_err());
        assert!(pool.hidden_layers().await.unwrap().is_empty());
        clean(&pool).await;
    });
}

#[test]
fn half_written_grains_are_completed_as_copied() {
    lane::block_on(async {
        let (_medium, pool) = pool().await;
        let lun = pool.create_lun(NewLun::new("a", 8192)).await.unwrap();
        write(&*lun, 0, 40 * GRAIN, 1).await;
        let snapshot = lun.snapshot("s").await.unwrap();
        write(&*lun, 0, 64, 2).await; // half of a grain
        write(&*lun, GRAIN, 8, 3).await; // too little: copying would cost more than was written
        write(&*lun, 50 * GRAIN, 72, 4).await; // nothing lies below
        let (image, used) = (content(&*lun).await.unwrap(), pool.info().used_bytes);
        let wanted = [(0, 64), (GRAIN, 8), (50 * GRAIN, 72)];
        assert_eq!(changed(&lun, snapshot.generation()).await, wanted);
        // Not before it was left alone for a while.
        assert!(pool.tidy_step().await.unwrap() && pool.is_untidy());
        assert_eq!(lun.usage().await.unwrap().own.copied_blocks, 0);
        // Nor while guests are at work.
        for _ in 0..200 {
            let mut bytes = [0; 4096];
            lun.read(Sector(0), &SegmentsMut::new(&mut bytes)).await.unwrap();
            pool.tidy_step().await.unwrap();
        }
        assert_eq!(lun.usage().await.unwrap().own.copied_blocks, 0);
        for _ in 0..100 {
            pool.tidy_step().await.unwrap();
        }
        assert!(!pool.is_untidy());
        let own = lun.usage().await.unwrap().own;
        assert_eq!((own.written_blocks, own.copied_blocks, own.data_grains), (18, 8, 3));
        assert_eq!(pool.info().used_bytes, used);
        assert_eq!(changed(&lun, snapshot.generation()).await, wanted);
        assert!(differences(&content(&*lun).await.unwrap().pages, &image.pages).is_empty());
        // A copied block that is overwritten is a change.
        write(&*lun, 100, 2, 9).await;
        assert_eq!(
            changed(&lun, snapshot.generation()).await,
            [(0, 64), (96, 8), (GRAIN, 8), (50 * GRAIN, 72)]
        );
        clean(&pool).await;
    });
}

/// Background copies are the first to stop in a pool that fills up.
#[test]
fn a_full_pool_completes_no_grains() {
    lane::block_on(async {
        let medium = Rc::new(MemoryDisk::new(16 << 11));
        let pool = Pool::create(vec![medium], new_pool(), Options::default()).await.unwrap();
        let lun = pool.create_lun(NewLun::new("a", 64 << 11)).await.unwrap();
        write(&*lun, 0, GRAIN, 1).await;
        lun.snapshot("s").await.unwrap();
        write(&*lun, 0, 64, 2).await;
        let mut grain = 1;
        while pool.space.has_room(crate::space::Purpose::Background) {
            write(&*lun, grain * GRAIN, GRAIN, 3).await;
            grain += 1;
        }
        pool.tidy().await.unwrap();
        assert_eq!(lun.usage().await.unwrap().own.copied_blocks, 0);
        write(&*lun, grain * GRAIN, GRAIN, 4).await;
        clean(&pool).await;
    });
}

#[test]
fn freed_grains_are_punched_out_of_the_medium() {
    lane::block_on(async {
        let (medium, pool) = pool().await;
        let pages = |medium: &MemoryDisk| {
            let (image, mut count, mut next) = (medium.image(), 0, 0);
            while let Some(page) = image.pages.next_page(next) {
                (count, next) = (count + 1, page + 1);
            }
            count
        };
        let lun = pool.create_lun(NewLun::new("a", 64 << 11)).await.unwrap();
        pool.settle().await.unwrap();
        let empty = pages(&medium);
        write(&*lun, 0, 200 * GRAIN, 1).await;
        let snapshot = lun.snapshot("s").await.unwrap();
        write(&*lun, 0, 100 * GRAIN, 2).await;
        lun.flush().await.unwrap();
        let full = pages(&medium);
        assert!(full >= empty + 300 * 16);
        lun.remove_snapshot("s").await.unwrap();
        drop(snapshot);
        pool.tidy().await.unwrap();
        assert!(pages(&medium) <= full - 100 * 16 + 40, "{} of {full}", pages(&medium));
        let image = content(&*lun).await.unwrap();
        lun.unmap(Sector(0), 50 * GRAIN).await.unwrap();
        // Not before the record that frees them is durable.
        while pool.tidy_step().await.unwrap() && pool.is_untidy() {}
        assert!(pages(&medium) >= full - 100 * 16 - 40);
        lun.flush().await.unwrap();
        pool.tidy().await.unwrap();
        assert!(pages(&medium) <= full - 150 * 16 + 40);
        assert_eq!(differences(&content(&*lun).await.unwrap().pages, &image.pages).len(), 50 * 16);
        pool.remove_lun("a", true).await.unwrap();
        pool.tidy().await.unwrap();
        pool.settle().await.unwrap();
        assert!(pages(&medium) <= empty + 40, "{} of {empty}", pages(&medium));
        clean(&pool).await;
    });
}

/// What was freed shortly before a power loss is punched after it.
#[test]
fn freed_grains_that_replay_knows_are_punched() {
    lane::block_on(async {
        let (medium, pool) = pool().await;
        let lun = pool.create_lun(NewLun::new("a", 8192)).await.unwrap();
        write(&*lun, 0, 40 * GRAIN, 1).await;
        lun.flush().await.unwrap();
        lun.unmap(Sector(0), 40 * GRAIN).await.unwrap();
        lun.flush().await.unwrap();
        let image = medium.image();
        let again = Rc::new(MemoryDisk::from(image));
        let pool = Pool::open(vec![again.clone()], Options::default()).await.unwrap();
        assert!(pool.is_untidy());
        pool.tidy().await.unwrap();
        let (image, old) = (again.image(), medium.image());
        let gone = differences(&image.pages, &old.pages).len();
        assert!(gone >= 40 * 16, "{gone}");
        clean(&pool).await;
    });
}

#[test]
fn the_checker_finds_a_boundary_that_shows_what_was_given_up() {
    lane::block_on(async {
        let (_medium, pool) = pool().await;
        let (lun, _) = held(&pool).await;
        lun.remove_snapshot("s").await.unwrap();
        write(&*lun, 8, 8, 2).await;
        pool.tidy().await.unwrap();
        clean(&pool).await;
        let top = lun.record().unwrap().top;
        let leaf = pool.leaf(top, 0).await.unwrap().unwrap();
        let entry = Entry(leaf.get(0));
        pool.change_entry(&leaf, 0, entry.with_mark(7, crate::format::Mark::Below));
        let list = pool.check().await.unwrap().findings;
        assert!(matches!(list[..], [Finding::NotHidden { .. }]), "{list:?}");
    });
}

/// A boundary that a layer is merged into loses its grains to the top meanwhile, as guests write.
#[test]
fn a_merge_into_a_boundary_lets_writers_take_grains_over_soak() {
    lane::block_on(async {
        for seed in super::seeds(40, 2000) {
            let log = block::crash::CrashLog::new(seed);
            log.interleave(3);
            let medium = super::dynamic(
                &log.disk_from(block::Image { sectors: MEDIUM, pages: block::Pages::default() }),
            );
            let pool = Pool::create(vec![medium], new_pool(), Options::default()).await.unwrap();
            let lun = pool.create_lun(NewLun::new("a", 8192)).await.unwrap();
            // The lowest two layers hold parts of the same grains: merging them copies.
            write(&*lun, 0, 40 * GRAIN, 1).await;
            let first = lun.snapshot("s").await.unwrap().generation();
            lun.hold(first, "backup").await.unwrap();
            for grain in 0..40 {
                write(&*lun, grain * GRAIN + 64, 16, 100 + grain).await;
            }
            let second = lun.snapshot("t").await.unwrap().generation();
            lun.hold(second, "backup").await.unwrap();
            lun.remove_snapshot("t").await.unwrap();
            lun.release(first, "backup").await.unwrap();
            lun.remove_snapshot("s").await.unwrap();
            let mut image = content(&*lun).await.unwrap();
            let background = {
                let pool = Rc::clone(&pool);
                lane::spawn(async move { pool.tidy().await.unwrap() })
            };
            let mut random = fastrand::Rng::with_seed(seed);
            let mut grains: Vec<u64> = (0..40).collect();
            random.shuffle(&mut grains);
            for grain in grains {
                let at = grain * GRAIN + random.u64(0..16) * 8;
                let bytes = pattern(8, 200 + grain);
                image.pages.write(at * 512, &Segments::new(&bytes));
                lun.write(Sector(at), &Segments::new(&bytes), Safe::AtNextFlush).await.unwrap();
            }
            background.await;
            lun.flush().await.unwrap();
            let now = content(&*lun).await.unwrap();
            assert!(differences(&now.pages, &image.pages).is_empty(), "KAGAMI_SEED={seed}");
            clean(&pool).await;
        }
    });
}

/// A layer with much under a top with little: the top is emptied into it while guests write, and cuts come between.
#[test]
fn a_top_is_folded_into_the_layer_below_while_guests_write_soak() {
    lane::block_on(async {
        let mut folded = 0;
        for seed in super::seeds(30, 1000) {
            let log = block::crash::CrashLog::new(seed);
            log.interleave(3);
            let image = block::Image { sectors: MEDIUM, pages: block::Pages::default() };
            let medium = super::dynamic(&log.disk_from(image));
            let pool = Pool::create(vec![medium], new_pool(), Options::default()).await.unwrap();
            pool.merge_way.set(Some(crate::merge::Way::Down));
            let lun = pool.create_lun(NewLun::new("a", 8192)).await.unwrap();
            let mut random = fastrand::Rng::with_seed(seed);
            let mut image = content(&*lun).await.unwrap();
            if random.bool() {
                write(&*lun, 10 * GRAIN, 20 * GRAIN, 7).await;
                lun.snapshot("base").await.unwrap();
            }
            write(&*lun, 0, 40 * GRAIN, 1).await;
            let first = lun.snapshot("s").await.unwrap().generation();
            for grain in 0..40 {
                write(&*lun, grain * GRAIN + random.u64(0..120), 8, 100 + grain).await;
            }
            image.pages = content(&*lun).await.unwrap().pages;
            lun.remove_snapshot("s").await.unwrap();
            let background = {
                let pool = Rc::clone(&pool);
                lane::spawn(async move {
                    let mut folds = 0;
                    while pool.tidy_step().await.unwrap() && pool.is_untidy() {
                        folds += u32::from(pool.folds_into(pool.luns()[0].record().unwrap().top).is_some());
                    }
                    folds
                })
            };
            let mut frozen = Vec::new();
            for step in 0..60u64 {
                let at = random.u64(0..60 * GRAIN);
                match random.u32(0..8) {
                    0 => {
                        let (at, count) = (at / GRAIN * GRAIN, GRAIN);
                        image.pages.write(at * 512, &Segments::new(&vec![0; 512 * count as usize]));
                        lun.unmap(Sector(at), count).await.unwrap();
                    }
                    1 if step % 5 == 0 => {
                        let snapshot = lun.snapshot(&format!("cut{step}")).await.unwrap();
                        frozen.push((snapshot, image.clone()));
                    }
                    _ => {
                        let bytes = pattern(random.u64(1..24), 200 + step);
                        image.pages.write(at * 512, &Segments::new(&bytes));
                        lun.write(Sector(at), &Segments::new(&bytes), Safe::AtNextFlush).await.unwrap();
                    }
                }
            }
            lun.flush().await.unwrap();
            folded += background.await;
            pool.tidy().await.unwrap();
            let now = content(&*lun).await.unwrap();
            assert!(differences(&now.pages, &image.pages).is_empty(), "KAGAMI_SEED={seed}");
            for (snapshot, image) in frozen {
                let now = content(&*snapshot).await.unwrap();
                assert!(differences(&now.pages, &image.pages).is_empty(), "KAGAMI_SEED={seed}: a snapshot");
            }
            assert!(lun.hold(first, "late").await.is_err(), "its cut is known no more");
            clean(&pool).await;
        }
        assert!(folded > 0 || std::env::var_os("KAGAMI_SEED").is_some(), "no seed came to it");
    });
}

/// What stood on the upper layer stands on the lower one when that took its place: names, holds, clones.
#[test]
fn r43_a_layer_that_takes_anothers_place_takes_its_names() {
    lane::block_on(async {
        let (medium, pool) = pool().await;
        pool.merge_way.set(Some(crate::merge::Way::Down));
        let lun = pool.create_lun(NewLun::new("a", 8192)).await.unwrap();
        write(&*lun, 0, 40 * GRAIN, 1).await;
        lun.snapshot("s").await.unwrap();
        write(&*lun, GRAIN + 8, 8, 2).await;
        lun.resize(16384).await.unwrap();
        write(&*lun, 16000, 8, 3).await;
        let base = lun.record().unwrap().top - 2;
        let open = lun.snapshot("t").await.unwrap();
        let generation = open.generation();
        lun.hold(generation, "backup").await.unwrap();
        let clone = pool.clone_lun("a", "t", NewLun::new("b", 0)).await.unwrap();
        write(&*lun, 2 * GRAIN, 8, 4).await;
        let wanted = [content(&*lun).await.unwrap(), content(&*open).await.unwrap()];
        lun.remove_snapshot("s").await.unwrap();
        pool.tidy().await.unwrap();
        let record = lun.find_snapshot("t").unwrap();
        assert!(record.layer < base + 2 && pool.check().await.unwrap().layers.len() == 3, "{record:?}");
        clean(&pool).await;
        pool.settle().await.unwrap();
        for pool in [pool, Pool::open(vec![medium], Options::default()).await.unwrap()] {
            let (lun, clone) = (pool.lun("a").unwrap(), pool.lun("b").unwrap());
            assert_eq!(changed(&lun, generation).await, [(2 * GRAIN, 8)]);
            let opened = lun.open_snapshot("t").unwrap();
            assert_eq!((opened.generation(), opened.shape().sectors), (generation, 16384));
            let now = [content(&*lun).await.unwrap(), content(&*opened).await.unwrap()];
            for (now, wanted) in now.iter().zip(&wanted) {
                assert!(differences(&now.pages, &wanted.pages).is_empty());
            }
            assert!(differences(&content(&*clone).await.unwrap().pages, &wanted[1].pages).is_empty());
            clean(&pool).await;
        }
        assert!(differences(&content(&*open).await.unwrap().pages, &wanted[1].pages).is_empty());
        drop((lun, clone));
    });
}

/// A cut has all of a compare-and-write or nothing of it, although it goes to several grains.
#[test]
fn a_cut_waits_for_compare_and_write_soak() {
    lane::block_on(async {
        let mut both = [0; 2];
        for seed in super::seeds(30, 300) {
            let log = block::crash::CrashLog::new(seed);
            log.interleave(3);
            let image = block::Image { sectors: MEDIUM, pages: block::Pages::default() };
            let medium = super::dynamic(&log.disk_from(image));
            let pool = Pool::create(vec![medium], new_pool(), Options::default()).await.unwrap();
            let lun = pool.create_lun(NewLun::new("a", 8192)).await.unwrap();
            let (old, new) = (pattern(200, 1), pattern(200, 2));
            write(&*lun, 100, 200, 1).await;
            lun.snapshot("s").await.unwrap();
            let writer = {
                let (lun, old, new) = (Rc::clone(&lun), old.clone(), new.clone());
                lane::spawn(async move {
                    lun.compare_and_write(Sector(100), &Segments::new(&old), &Segments::new(&new))
                        .await
                        .unwrap();
                })
            };
            for _ in 0..seed % 12 {
                lane::yield_now().await;
            }
            let snapshot = lun.snapshot("t").await.unwrap();
            writer.await;
            let mut found = vec![0; 200 * 512];
            snapshot.read(Sector(100), &SegmentsMut::new(&mut found)).await.unwrap();
            assert!(found == old || found == new, "KAGAMI_SEED={seed}");
            both[usize::from(found == new)] += 1;
            lun.read(Sector(100), &SegmentsMut::new(&mut found)).await.unwrap();
            assert!(found == new, "KAGAMI_SEED={seed}");
        }
        assert!(!both.contains(&0) || std::env::var_os("KAGAMI_SEED").is_some(), "{both:?}");
    });
}
