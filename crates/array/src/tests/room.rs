//! What a pool that fills up refuses, in which order, and what goes when its time has come.

use std::rc::Rc;

use block::{Disk, DiskError, MemoryDisk, Safe, Sector, Segments, SegmentsMut};

use super::{new_pool, pattern};
use crate::catalog::Put;
use crate::space::Purpose;
use crate::{Lun, LunError, NewLun, Options, Pool, TRASH_SECONDS};

/// Sectors of a grain.
const GRAIN: u64 = 128;

async fn small_pool() -> Rc<Pool> {
    let medium = Rc::new(MemoryDisk::new(16 << 11));
    Pool::create(vec![medium], new_pool(), Options::default()).await.unwrap()
}

async fn write(lun: &Lun, at: u64, count: u64, tag: u64) -> Result<(), DiskError> {
    lun.write(Sector(at), &Segments::new(&pattern(count, tag)), Safe::AtNextFlush).await
}

/// Background work is done: a half-written grain above a snapshot was completed.
async fn completes(pool: &Pool, half: &Lun, grain: u64) -> bool {
    write(half, grain * GRAIN, GRAIN / 2, 40 + grain).await.unwrap();
    let before = half.usage().await.unwrap().own.copied_blocks;
    pool.tidy().await.unwrap();
    half.usage().await.unwrap().own.copied_blocks > before
}

fn no_space<T>(answer: Result<T, LunError>) -> bool {
    matches!(answer, Err(LunError::Disk(DiskError::NoSpace)))
}

/// First the background, then cuts, then guests; and each goes on when room comes back.
#[test]
fn a_full_pool_refuses_background_then_cuts_then_guests() {
    lane::block_on(async {
        let pool = small_pool().await;
        let lun = pool.create_lun(NewLun::new("a", 64 << 11)).await.unwrap();
        let half = pool.create_lun(NewLun::new("half", 64 << 11)).await.unwrap();
        write(&half, 0, 8 * GRAIN, 1).await.unwrap();
        half.snapshot("base").await.unwrap();
        assert!(completes(&pool, &half, 0).await, "there is room");
        let mut written = 0;
        let mut fill_to = async |purpose: Purpose| {
            while pool.space.has_room(purpose) {
                write(&lun, written * GRAIN, GRAIN, 100 + written).await.unwrap();
                written += 1;
            }
            written
        };
        // Nearly full: the background stops, a snapshot, a clone and a guest's write are granted.
        let first = fill_to(Purpose::Background).await;
        assert!(!completes(&pool, &half, 1).await, "no background work any more");
        half.snapshot("granted").await.unwrap();
        pool.clone_lun("half", "base", NewLun::new("granted", 0)).await.unwrap();
        // Fuller: cuts of every kind are refused, guests write.
        let second = fill_to(Purpose::Cut).await;
        assert!(no_space(half.snapshot("refused").await));
        assert!(no_space(pool.clone_lun("half", "base", NewLun::new("refused", 0)).await));
        assert!(no_space(half.revert("base").await));
        let members = [(Rc::clone(&half), "refused".to_owned())];
        let group = uuid::Uuid::from_u128(4);
        assert!(no_space(pool.prepare_cut(group, crate::Decider::Outside, &members).await));
        assert!(!completes_without_writing(&pool, &half).await);
        // Full: guests are refused what takes room, and nothing else.
        let third = fill_to(Purpose::Guest).await;
        assert!(first < second && second < third, "{first} {second} {third}");
        let refused = write(&lun, third * GRAIN, GRAIN, 7).await;
        assert!(matches!(refused, Err(DiskError::NoSpace)), "{refused:?}");
        write(&lun, 0, GRAIN, 100).await.unwrap();
        lun.flush().await.unwrap();
        for grain in 0..third {
            let mut bytes = vec![0; GRAIN as usize * 512];
            lun.read(Sector(grain * GRAIN), &SegmentsMut::new(&mut bytes)).await.unwrap();
            assert!(bytes == pattern(GRAIN, 100 + grain), "grain {grain}");
        }
        assert!(pool.check().await.unwrap().findings.is_empty());
        // Room comes back: everybody goes on by himself.
        lun.unmap(Sector(0), 20 * GRAIN).await.unwrap();
        lun.flush().await.unwrap();
        write(&lun, third * GRAIN, GRAIN, 7).await.unwrap();
        half.snapshot("again").await.unwrap();
        assert!(completes(&pool, &half, 2).await);
        assert!(pool.check().await.unwrap().findings.is_empty());
    });
}

async fn completes_without_writing(pool: &Pool, half: &Lun) -> bool {
    let before = half.usage().await.unwrap().own.copied_blocks;
    pool.tidy().await.unwrap();
    half.usage().await.unwrap().own.copied_blocks > before
}

/// The background empties the trash by itself, the oldest first, when their time has come and not before.
#[test]
fn removed_luns_go_after_seven_days() {
    lane::block_on(async {
        let pool = small_pool().await;
        for name in ["a", "b", "c"] {
            let lun = pool.create_lun(NewLun::new(name, 8192)).await.unwrap();
            write(&lun, 0, GRAIN, 1).await.unwrap();
            lun.flush().await.unwrap();
            pool.remove_lun(name, false).await.unwrap();
        }
        let used = pool.info().used_bytes;
        let now = crate::seconds_now();
        // As if that had been long ago; a test may take a while.
        for (lun, age) in
            pool.trash().into_iter().zip([TRASH_SECONDS - 3600, TRASH_SECONDS, TRASH_SECONDS + 60])
        {
            pool.put(Put::Lun(crate::catalog::LunRecord { trashed: Some(now - age), ..lun }));
        }
        pool.tidy().await.unwrap();
        let left: Vec<String> = pool.trash().into_iter().map(|l| l.name).collect();
        assert_eq!(left, ["a"], "an hour is left");
        assert!(pool.info().used_bytes < used);
        pool.undelete_lun("a").await.unwrap();
        assert!(matches!(pool.undelete_lun("b").await, Err(LunError::NoLun(_))));
        assert!(pool.check().await.unwrap().findings.is_empty());
    });
}

/// Room that is needed comes from what lies longest in the trash; the rest stays.
#[test]
fn the_trash_makes_room_from_its_oldest_end() {
    lane::block_on(async {
        let pool = small_pool().await;
        // The youngest has the lowest number.
        for (name, age) in [("young", 10), ("old", 1000), ("middle", 500)] {
            let lun = pool.create_lun(NewLun::new(name, 8192)).await.unwrap();
            write(&lun, 0, 16 * GRAIN, 1).await.unwrap();
            lun.flush().await.unwrap();
            pool.remove_lun(name, false).await.unwrap();
            let record = pool.trash().into_iter().find(|l| l.name == name).unwrap();
            let trashed = Some(crate::seconds_now() - age);
            pool.put(Put::Lun(crate::catalog::LunRecord { trashed, ..record }));
        }
        let lun = pool.create_lun(NewLun::new("a", 64 << 11)).await.unwrap();
        let (mut grain, mut gone) = (0, Vec::new());
        let mut left: Vec<String> = pool.trash().into_iter().map(|l| l.name).collect();
        while gone.len() < 2 {
            write(&lun, grain * GRAIN, GRAIN, 3).await.unwrap();
            lun.flush().await.unwrap();
            grain += 1;
            // What is wanted early is done beside the guest.
            for _ in 0..200 {
                lane::yield_now().await;
            }
            let now: Vec<String> = pool.trash().into_iter().map(|l| l.name).collect();
            gone.extend(left.iter().filter(|name| !now.contains(name)).cloned());
            left = now;
        }
        assert_eq!((gone, left), (vec!["old".to_owned(), "middle".to_owned()], vec!["young".to_owned()]));
    });
}
