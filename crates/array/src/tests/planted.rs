//! Each kind of finding is planted, and found: what `pool check` is worth.

use std::rc::Rc;

use block::{Disk, MemoryDisk, Safe, Sector, Segments};
use uuid::Uuid;

use super::{new_pool, pattern};
use crate::catalog::{Catalog, GroupMember, GroupRecord, SnapshotRecord};
use crate::check::Owner;
use crate::format::{Entry, GRAIN_BYTES, PAIR_BYTES};
use crate::{Decider, Finding, Lun, NewLun, Options, Pool, Report};

const MEDIUM: u64 = 16 << 11;

async fn found(pool: &Pool) -> Report {
    pool.check().await.unwrap()
}

/// A LUN with four grains, a snapshot that is held, and a second LUN.
async fn pool() -> (Rc<MemoryDisk>, Rc<Pool>, Rc<Lun>) {
    let medium = Rc::new(MemoryDisk::new(MEDIUM));
    let pool = Pool::create(vec![medium.clone()], new_pool(), Options::default()).await.unwrap();
    let lun = pool.create_lun(NewLun::new("a", 8192)).await.unwrap();
    pool.create_lun(NewLun::new("b", 8192)).await.unwrap();
    lun.write(Sector(0), &Segments::new(&pattern(512, 1)), Safe::AtNextFlush).await.unwrap();
    let snapshot = lun.snapshot("s").await.unwrap();
    lun.hold(snapshot.generation(), "backup").await.unwrap();
    lun.write(Sector(0), &Segments::new(&pattern(512, 2)), Safe::AtNextFlush).await.unwrap();
    pool.settle().await.unwrap();
    assert!(found(&pool).await.findings.is_empty());
    (medium, pool, lun)
}

#[test]
fn a_damaged_bitmap_page_is_found_and_nothing_is_repaired_by_it() {
    lane::block_on(async {
        let (medium, pool, _) = pool().await;
        let at = Sector::at_byte(pool.media.list[0].bitmap_grain * GRAIN_BYTES);
        let junk = [0x5a; PAIR_BYTES as usize];
        medium.write(at, &Segments::new(&junk), Safe::OnReturn).await.unwrap();
        let pool = Pool::open(vec![medium], Options::default()).await.unwrap();
        let report = found(&pool).await;
        assert!(report.findings.contains(&Finding::DamagedBitmap { medium: 0, index: 0 }), "{report:?}");
        assert!(report.incomplete && report.leaked_grains() == 0);
        let (report, count) = pool.repair_leaks().await.unwrap();
        assert!(report.incomplete && count == 0);
    });
}

#[test]
fn blocks_without_a_grain_are_found() {
    lane::block_on(async {
        let (_medium, pool, lun) = pool().await;
        let top = lun.record().unwrap().top;
        let leaf = pool.leaf(top, 0).await.unwrap().unwrap();
        let entry = Entry(leaf.get(2));
        pool.change_entry(&leaf, 2, entry.with_grain(0));
        let report = found(&pool).await;
        let owner = Owner::Entry { layer: top, index: 2 };
        let lost = Finding::Leak { first: entry.grain().into(), count: 1 };
        assert_eq!(report.findings, [lost, Finding::NoGrain { owner }]);
        // The grain may be what the entry lost: it is not given back.
        assert_eq!(pool.repair_leaks().await.unwrap().1, 0);
        pool.change_entry(&leaf, 2, entry);
        assert!(found(&pool).await.findings.is_empty());
    });
}

#[test]
fn what_the_bitmap_and_the_numbers_say_wrong_is_found() {
    lane::block_on(async {
        let (_medium, pool, _) = pool().await;
        // A grain of the journal.
        let page = pool.bitmap_page(1).await.unwrap();
        let word = page.get(0);
        pool.change_page(&page, 0, word & !2);
        let report = found(&pool).await;
        let used = pool.space.used();
        let counted = Finding::UsedCount { found: used, expected: used - 1 };
        assert_eq!(report.findings, [Finding::SystemFree { grain: 1 }, counted]);
        pool.change_page(&page, 0, word);
        pool.space.set_used(used + 3);
        let counted = Finding::UsedCount { found: used + 3, expected: used };
        assert_eq!(found(&pool).await.findings, [counted]);
        pool.space.set_used(used);
        assert!(found(&pool).await.findings.is_empty());
    });
}

/// What one finding of the catalog says.
fn said(finding: &Finding) -> Option<(&'static str, &'static str)> {
    match finding {
        Finding::Catalog { object, what, .. } => Some((object, what)),
        _ => None,
    }
}

/// Changes the catalog, and looks: exactly these findings of the catalog.
async fn plant(pool: &Pool, wanted: &[(&str, &str)], change: impl FnOnce(&mut Catalog)) {
    let whole = pool.catalog.borrow().clone();
    change(&mut pool.catalog.borrow_mut());
    let report = found(pool).await;
    *pool.catalog.borrow_mut() = whole;
    let said: Vec<_> = report.findings.iter().filter_map(said).collect();
    assert_eq!(said, wanted, "{:?}", report.findings);
    let shown: Vec<String> = report.findings.iter().map(ToString::to_string).collect();
    assert!(wanted.iter().all(|(_, what)| shown.iter().any(|line| line.contains(what))), "{shown:?}");
}

#[test]
fn every_number_in_the_catalog_is_compared() {
    lane::block_on(async {
        let (_medium, pool, lun) = pool().await;
        let a = lun.record().unwrap();
        let b = pool.lun("b").unwrap().record().unwrap();
        let snapshot = lun.find_snapshot("s").unwrap();
        let (frozen, nowhere) = (snapshot.layer, 9_999);

        plant(&pool, &[("LUN", "has no top layer")], |c| {
            c.luns.get_mut(&b.id).unwrap().top = nowhere;
        })
        .await;
        plant(&pool, &[("LUN", "writes to a frozen layer")], |c| {
            c.luns.get_mut(&b.id).unwrap().top = frozen;
        })
        .await;
        plant(&pool, &[("LUN", "lies on a dying layer")], |c| {
            c.layers.get_mut(&b.top).unwrap().dying = Some(0);
        })
        .await;
        plant(&pool, &[("LUN", "has the same top layer as LUN")], |c| {
            c.luns.get_mut(&b.id).unwrap().top = a.top;
        })
        .await;
        plant(&pool, &[("LUN", "abandoned a layer that is not there:")], |c| {
            c.luns.get_mut(&b.id).unwrap().abandoned = Some(nowhere);
        })
        .await;
        plant(&pool, &[("LUN", "has the same name as LUN")], |c| {
            c.luns.get_mut(&b.id).unwrap().name = "a".into();
        })
        .await;
        // In the trash a name may be there twice.
        plant(&pool, &[], |c| {
            let lun = c.luns.get_mut(&b.id).unwrap();
            (lun.name, lun.trashed) = ("a".into(), Some(1));
        })
        .await;
        plant(&pool, &[("LUN", "has the same SCSI identity as LUN")], |c| {
            c.luns.get_mut(&b.id).unwrap().uuid = a.uuid;
        })
        .await;
        plant(&pool, &[("layer", "stands on a layer that is not there:")], |c| {
            c.layers.get_mut(&b.top).unwrap().parent = b.top - 1;
        })
        .await;
        plant(&pool, &[("layer", "stands on a younger layer:")], |c| {
            c.layers.get_mut(&b.top).unwrap().parent = a.top;
        })
        .await;
        plant(&pool, &[("layer", "stands on a dying layer:")], |c| {
            c.layers.get_mut(&frozen).unwrap().dying = Some(0);
        })
        .await;
        plant(&pool, &[("snapshot", "has no layer")], |c| {
            c.snapshots.get_mut(&snapshot.id).unwrap().layer = nowhere;
        })
        .await;
        plant(&pool, &[("snapshot", "of a layer not frozen:")], |c| {
            c.layers.get_mut(&frozen).unwrap().generation = None;
        })
        .await;
        plant(&pool, &[("snapshot", "of a LUN that is not there:")], |c| {
            c.snapshots.get_mut(&snapshot.id).unwrap().lun = nowhere;
        })
        .await;
        plant(&pool, &[("hold", "of a layer that is not there:")], |c| {
            c.holds.values_mut().next().unwrap().layer = nowhere;
        })
        .await;
        plant(&pool, &[("group member", "is a LUN that is not there:")], |c| {
            let group = group_of(nowhere, &a, snapshot.clone());
            c.groups.insert(group.group, group);
        })
        .await;
        assert!(found(&pool).await.findings.is_empty());
    });
}

fn group_of(lun: u64, of: &crate::catalog::LunRecord, snapshot: SnapshotRecord) -> GroupRecord {
    let generation = block::Generation { counter: of.top + 1, id: 1 };
    let member = GroupMember { lun, old_top: of.top, new_top: of.top, generation, snapshot };
    GroupRecord {
        group: Uuid::from_u128(5),
        decider: Decider::Outside,
        decided: false,
        members: vec![member],
    }
}

/// Sectors that one leaf of a map covers.
const LEAF: u64 = 504 * 128;

/// Guests write and unmap while leaks are given back: what they hold is none.
#[test]
fn leaks_are_given_back_beside_guests_soak() {
    lane::block_on(async {
        let mut repaired = 0;
        for seed in super::seeds(12, 300) {
            let log = block::crash::CrashLog::new(seed);
            log.interleave(3);
            let image = block::Image { sectors: 2 * MEDIUM, pages: block::Pages::default() };
            let medium = super::dynamic(&log.disk_from(image));
            // Few pages in memory: whoever looks waits for the medium at every step.
            let options = Options { cache_pages: 4, ..Options::default() };
            let pool = Pool::create(vec![medium], new_pool(), options).await.unwrap();
            let lun = pool.create_lun(NewLun::new("a", 80 * LEAF)).await.unwrap();
            lun.write(Sector(0), &Segments::new(&pattern(128 * 20, 1)), Safe::AtNextFlush).await.unwrap();
            for leaf in 1..80 {
                let block = pattern(8, 2);
                lun.write(Sector(leaf * LEAF), &Segments::new(&block), Safe::AtNextFlush).await.unwrap();
            }
            lun.snapshot("s").await.unwrap();
            // Looked at after the layer that guests write to: what they take meanwhile was not seen.
            let late = pool.create_lun(NewLun::new("b", 60 * LEAF)).await.unwrap();
            for leaf in 0..60 {
                let block = pattern(8, 3);
                late.write(Sector(leaf * LEAF), &Segments::new(&block), Safe::AtNextFlush).await.unwrap();
            }
            // Three leaks: entries that lose their grains.
            let below = lun.find_snapshot("s").unwrap().layer;
            let leaf = pool.leaf(below, 0).await.unwrap().unwrap();
            for slot in [3, 4, 9] {
                pool.change_entry(&leaf, slot, Entry::default());
            }
            pool.settle().await.unwrap();
            let guest = {
                let lun = Rc::clone(&lun);
                lane::spawn(async move {
                    let mut random = fastrand::Rng::with_seed(seed);
                    for step in 0..120 {
                        let at = random.u64(0..80) * LEAF + random.u64(0..3) * 128 + random.u64(0..80);
                        match random.u32(0..8) {
                            // What is freed meanwhile looks wrong, and the search begins anew: not in every story.
                            0 if seed % 4 == 0 => lun.unmap(Sector(at), 1000).await.unwrap(),
                            1 => lun.flush().await.unwrap(),
                            _ => {
                                let bytes = pattern(random.u64(1..40), 100 + step);
                                let piece = Segments::new(&bytes);
                                lun.write(Sector(at), &piece, Safe::AtNextFlush).await.unwrap();
                            }
                        }
                    }
                    lun.flush().await.unwrap();
                })
            };
            for _ in 0..seed % 30 {
                lane::yield_now().await;
            }
            repaired += pool.repair_leaks().await.unwrap().1;
            guest.await;
            let report = found(&pool).await;
            assert!(report.faults().next().is_none(), "KAGAMI_SEED={seed}: {:?}", report.findings);
            // At rest the rest is found.
            let left = report.leaked_grains();
            assert_eq!(pool.repair_leaks().await.unwrap().1, left);
            assert!(found(&pool).await.findings.is_empty(), "KAGAMI_SEED={seed}");
        }
        assert!(repaired > 0 || std::env::var_os("KAGAMI_SEED").is_some(), "nothing was given back");
    });
}
