//! Opening what older and newer programs wrote, what is damaged, and what is full.

use std::rc::Rc;

use block::{Disk, DiskError, MemoryDisk, Safe, Sector, Segments, SegmentsMut, conformance};
use zerocopy::{FromBytes, IntoBytes};

use super::{new_pool, pattern};
use crate::format::{Head, PAIR_BYTES};
use crate::{Finding, LunError, NewLun, Options, Pool, PoolError};

const MEDIUM: u64 = 16 << 11;

async fn pool() -> (Rc<MemoryDisk>, Rc<Pool>) {
    let medium = Rc::new(MemoryDisk::new(MEDIUM));
    let pool = Pool::create(vec![medium.clone()], new_pool(), Options::default()).await.unwrap();
    (medium, pool)
}

async fn reopen(medium: &Rc<MemoryDisk>) -> Result<Rc<Pool>, PoolError> {
    Pool::open(vec![Rc::clone(medium) as Rc<dyn Disk>], Options::default()).await
}

async fn write(disk: &dyn Disk, at: u64, count: u64, tag: u64) -> Result<(), DiskError> {
    disk.write(Sector(at), &Segments::new(&pattern(count, tag)), Safe::AtNextFlush).await
}

#[test]
fn luns_and_snapshots_pass_the_conformance_suite() {
    lane::block_on(async {
        let (_medium, pool) = pool().await;
        let lun = pool.create_lun(NewLun::new("a", 5003)).await.unwrap();
        conformance::check(lun.clone(), 1).await;
        let snapshot = lun.snapshot("s").await.unwrap();
        conformance::check_read_only(snapshot).await;
        conformance::check(lun.clone(), 2).await;
        let clone = pool.clone_lun("a", "s", NewLun::new("b", 0)).await.unwrap();
        conformance::check(clone, 3).await;
        assert!(pool.check().await.unwrap().findings.is_empty());
    });
}

#[test]
fn a_newer_format_is_refused_naming_both() {
    lane::block_on(async {
        let (medium, _pool) = pool().await;
        let mut bytes = [0; 4096];
        medium.read(Sector(0), &SegmentsMut::new(&mut bytes)).await.unwrap();
        let mut head = Head::read_from_bytes(&bytes[..]).unwrap();
        head.set_version(2);
        head.seal();
        medium.write(Sector(0), &Segments::new(head.as_bytes()), Safe::OnReturn).await.unwrap();
        let error = reopen(&medium).await.err().unwrap();
        assert!(matches!(error, PoolError::Newer { found: 2, known: 1 }), "{error}");
        assert!(error.to_string().contains('2') && error.to_string().contains('1'));
    });
}

#[test]
fn a_truncated_or_foreign_medium_is_a_clear_error() {
    lane::block_on(async {
        let (medium, _pool) = pool().await;
        medium.resize(MEDIUM - 4096);
        assert!(matches!(reopen(&medium).await, Err(PoolError::Truncated { .. })));
        let empty = Rc::new(MemoryDisk::new(MEDIUM));
        assert!(matches!(reopen(&empty).await, Err(PoolError::NotAPool { .. })));
        medium.resize(MEDIUM);
        let again = Pool::create(vec![medium.clone()], new_pool(), Options::default()).await;
        assert!(matches!(again, Err(PoolError::AlreadyAPool { .. })));
        let both: Vec<Rc<dyn Disk>> = vec![medium.clone(), medium];
        assert!(matches!(Pool::open(both, Options::default()).await, Err(PoolError::Media { .. })));
    });
}

/// A full pool refuses snapshots before it refuses guests, loses nothing, and goes on when space returns.
#[test]
fn a_full_pool_refuses_in_order_and_goes_on() {
    lane::block_on(async {
        let (_medium, pool) = pool().await;
        let (a, b) = ("a", "b");
        let lun = pool.create_lun(NewLun::new(a, 64 << 11)).await.unwrap();
        let other = pool.create_lun(NewLun::new(b, 64 << 11)).await.unwrap();
        write(&*other, 0, 256, 77).await.unwrap();
        let (mut written, mut refused_cut) = (0, None);
        loop {
            if refused_cut.is_none()
                && let Err(LunError::Disk(DiskError::NoSpace)) = lun.snapshot(&format!("s{written}")).await
            {
                refused_cut = Some(written);
            }
            match write(&*lun, written * 128, 128, written + 1).await {
                Ok(()) => written += 1,
                Err(error) => {
                    assert!(matches!(error, DiskError::NoSpace), "{error}");
                    break;
                }
            }
        }
        assert!(refused_cut.is_some_and(|cut| cut < written), "{refused_cut:?} {written}");
        lun.flush().await.unwrap();
        // What is mapped is overwritten in place as ever.
        write(&*other, 0, 256, 78).await.unwrap();
        for grain in 0..written {
            let mut bytes = vec![0; 128 * 512];
            lun.read(Sector(grain * 128), &SegmentsMut::new(&mut bytes)).await.unwrap();
            assert!(bytes == pattern(128, grain + 1), "grain {grain}");
        }
        pool.remove_lun(b, false).await.unwrap();
        // Removed, and its room is needed: the trash is emptied by the write that needs it.
        write(&*lun, written * 128, 128, 5).await.unwrap();
        assert!(pool.trash().is_empty());
        assert!(pool.check().await.unwrap().faults().next().is_none());
    });
}

/// The checker finds what is planted, and gives leaks back.
#[test]
fn the_checker_finds_what_is_planted() {
    lane::block_on(async {
        let (medium, pool) = pool().await;
        let lun = pool.create_lun(NewLun::new("a", 8192)).await.unwrap();
        write(&*lun, 0, 512, 1).await.unwrap();
        pool.commit().await.unwrap();
        assert!(pool.check().await.unwrap().findings.is_empty());
        let top = lun.record().unwrap().top;
        let leaf = pool.leaf(top, 0).await.unwrap().unwrap();
        let (zero, one) = (crate::format::Entry(leaf.get(0)), crate::format::Entry(leaf.get(1)));
        let found = |report: crate::Report| report.findings;

        // Twice: and what it had is a leak.
        pool.change_entry(&leaf, 1, one.with_grain(zero.grain()));
        let list = found(pool.check().await.unwrap());
        assert!(list.iter().any(|f| matches!(f, Finding::OwnedTwice { .. })), "{list:?}");
        assert!(list.iter().any(|f| matches!(f, Finding::Leak { count: 1, .. })), "{list:?}");
        // Past the pool.
        pool.change_entry(&leaf, 1, one.with_grain(u32::MAX));
        let list = found(pool.check().await.unwrap());
        assert!(list.iter().any(|f| matches!(f, Finding::Outside { .. })), "{list:?}");
        // Past the end of the LUN.
        pool.change_entry(&leaf, 1, one);
        pool.change_entry(&leaf, 300, one);
        let list = found(pool.check().await.unwrap());
        assert!(list.iter().any(|f| matches!(f, Finding::PastEnd { .. })), "{list:?}");
        pool.change_entry(&leaf, 300, crate::format::Entry::default());
        // Free, but referred to.
        let page = pool.bitmap_page(one.grain()).await.unwrap();
        pool.free_grain(one.grain(), &page);
        let list = found(pool.check().await.unwrap());
        assert!(list.iter().any(|f| matches!(f, Finding::NotUsed { .. })), "{list:?}");
        pool.change_entry(&leaf, 1, crate::format::Entry::default());
        pool.commit().await.unwrap();
        // A leak, and its repair.
        pool.change_entry(&leaf, 0, crate::format::Entry::default());
        let report = pool.check().await.unwrap();
        assert_eq!(report.leaked_grains(), 1, "{:?}", report.findings);
        assert_eq!(pool.repair_leaks().await.unwrap().1, 1);
        assert!(pool.check().await.unwrap().findings.is_empty());
        // A page of which no copy is whole.
        pool.settle().await.unwrap();
        let junk = [0x5a; PAIR_BYTES as usize];
        let at = Sector::at_byte(leaf.address * PAIR_BYTES);
        medium.write(at, &Segments::new(&junk), Safe::OnReturn).await.unwrap();
        let list = found(reopen(&medium).await.unwrap().check().await.unwrap());
        assert!(list.iter().any(|f| matches!(f, Finding::DamagedPage { .. })), "{list:?}");
    });
}

/// A generation that is held stays known when its snapshot goes (R42), and is forgotten when it is released.
#[test]
fn r42_a_held_generation_outlives_its_snapshot() {
    lane::block_on(async {
        let (_medium, pool) = pool().await;
        let lun = pool.create_lun(NewLun::new("a", 8192)).await.unwrap();
        write(&*lun, 0, 512, 1).await.unwrap();
        let generation = lun.snapshot("s").await.unwrap().generation();
        lun.hold(generation, "backup").await.unwrap();
        write(&*lun, 64, 8, 2).await.unwrap();
        lun.remove_snapshot("s").await.unwrap();
        pool.tidy().await.unwrap();
        // What the held layer keeps is shown, with who holds it: its map, and the three grains nobody wrote to since.
        let hidden = pool.hidden_layers().await.unwrap();
        assert_eq!(hidden.len(), 1);
        assert_eq!((hidden[0].1, &hidden[0].2[..]), (4 * 65_536, &["backup".to_owned()][..]));
        let own = lun.usage().await.unwrap().own;
        assert_eq!((own.written_blocks, own.copied_blocks), (1, 15));
        assert!(pool.dump().contains("backup"));
        let mut out = block::Extents::with_limit(16);
        lun.status(Sector(0), 8192, Some(generation), &mut out).await.unwrap();
        let changed: Vec<_> = out.iter().filter(|e| e.changed).map(|e| (e.at.0, e.count)).collect();
        assert_eq!(changed, [(64, 8)]);
        lun.release(generation, "backup").await.unwrap();
        pool.tidy().await.unwrap();
        out.clear();
        let answer = lun.status(Sector(0), 8192, Some(generation), &mut out).await;
        assert!(matches!(answer, Err(DiskError::UnknownGeneration)), "R45: {answer:?}");
        assert!(matches!(lun.hold(generation, "backup").await, Err(LunError::UnknownGeneration { .. })));
        assert!(pool.check().await.unwrap().findings.is_empty());
    });
}
