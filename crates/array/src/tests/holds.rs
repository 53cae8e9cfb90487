//! Generations that somebody holds, and how they are let go again.

use std::rc::Rc;

use block::crash::CrashLog;
use block::{Disk, Generation, Image, MemoryDisk, Pages, Safe, Sector, Segments};

use super::{dynamic, new_pool, pattern};
use crate::{Lun, LunError, NewLun, Options, Pool};

const MEDIUM: u64 = 24 << 11;

/// Writes, cuts and holds: as a backup does that is killed before it could let go of the one before.
async fn cut(lun: &Rc<Lun>, number: u64, holder: &str) -> Generation {
    let bytes = pattern(8, number);
    lun.write(Sector(number * 8), &Segments::new(&bytes), Safe::AtNextFlush).await.unwrap();
    let name = format!("cut{number}");
    let generation = lun.snapshot(&name).await.unwrap().generation();
    lun.hold(generation, holder).await.unwrap();
    lun.remove_snapshot(&name).await.unwrap();
    generation
}

fn held(lun: &Lun, holder: &str) -> Vec<Generation> {
    lun.holds().into_iter().filter(|(_, by)| by == holder).map(|(generation, _)| generation).collect()
}

/// Whatever a holder left behind goes with one call, and nothing else does.
#[test]
fn r42_all_but_one_generation_are_released() {
    lane::block_on(async {
        let medium = Rc::new(MemoryDisk::new(MEDIUM));
        let pool = Pool::create(vec![medium.clone()], new_pool(), Options::default()).await.unwrap();
        let lun = pool.create_lun(NewLun::new("a", 8192)).await.unwrap();
        let other = pool.create_lun(NewLun::new("b", 8192)).await.unwrap();
        let mut mine = Vec::new();
        for number in 0..4 {
            mine.push(cut(&lun, number, "backup").await);
        }
        // The disks of one VM have one holder; each is let go by itself.
        let others = [cut(&other, 0, "backup").await, cut(&other, 1, "backup").await];
        lun.hold(mine[0], "mirror").await.unwrap();
        // One more is in what a revert left, which is history too.
        lun.snapshot("base").await.unwrap();
        let abandoned = cut(&lun, 5, "backup").await;
        lun.revert("base").await.unwrap();
        let last = cut(&lun, 6, "backup").await;
        assert_eq!(held(&lun, "backup"), [&mine[..], &[abandoned, last]].concat());

        assert_eq!(lun.release_all_but(last, "backup").await.unwrap(), 5);
        assert_eq!(held(&lun, "backup"), [last]);
        assert_eq!(lun.holds(), [(mine[0], "mirror".to_owned()), (last, "backup".to_owned())]);
        assert_eq!(held(&other, "backup"), others);
        assert_eq!(lun.release_all_but(last, "backup").await.unwrap(), 0, "once is enough");
        assert_eq!(lun.release_all_but(last, "nobody").await.unwrap(), 0);

        // What kept nothing but a generation goes; who still holds is named.
        pool.tidy().await.unwrap();
        let hidden = pool.hidden_layers().await.unwrap();
        let holders: Vec<_> = hidden.iter().flat_map(|(.., holders)| holders.iter().cloned()).collect();
        assert_eq!(holders, ["mirror", "backup", "backup", "backup"]);
        assert!(matches!(lun.hold(mine[1], "late").await, Err(LunError::UnknownGeneration { .. })));
        let report = pool.check().await.unwrap();
        assert!(report.findings.is_empty(), "{:?}", report.findings);

        pool.settle().await.unwrap();
        let pool = Pool::open(vec![medium], Options::default()).await.unwrap();
        assert_eq!(held(&pool.lun("a").unwrap(), "backup"), [last]);
        assert_eq!(held(&pool.lun("b").unwrap(), "backup"), others);
    });
}

/// One record lets go of them all: after a power loss either every one of them is held still or none, and the one that
/// stays is never lost.
#[test]
fn r42_crash_while_all_but_one_generation_are_released() {
    lane::block_on(async {
        for seed in super::seeds(3, 100) {
            let log = CrashLog::new(seed);
            let image = Image { sectors: MEDIUM, pages: Pages::default() };
            let medium = dynamic(&log.disk_from(image));
            let pool = Pool::create(vec![medium], new_pool(), Options::default()).await.unwrap();
            let lun = pool.create_lun(NewLun::new("a", 8192)).await.unwrap();
            let mut all = Vec::new();
            for number in 0..4 {
                all.push(cut(&lun, number, "backup").await);
            }
            let begin = log.points();
            assert_eq!(lun.release_all_but(all[3], "backup").await.unwrap(), 3);
            let end = log.points();
            let mut seen = [0; 2];
            for point in begin..=end {
                for fate in 0..4 {
                    let media = log.cut(point, fate).into_iter().map(|i| Rc::new(MemoryDisk::from(i)));
                    let media = media.map(|d| d as Rc<dyn Disk>).collect();
                    let pool = Pool::open(media, Options::default()).await.unwrap();
                    let left = held(&pool.lun("a").unwrap(), "backup");
                    assert!(left == all || left == [all[3]], "KAGAMI_SEED={seed} point {point}: {left:?}");
                    assert!(point < end || left == [all[3]], "it was answered");
                    seen[usize::from(left == all)] += 1;
                }
            }
            assert!(!seen.contains(&0), "{seen:?}");
        }
    });
}
