//! The SCSI identity: a LUN keeps its own for ever, and nobody else gets it.

use std::collections::BTreeSet;
use std::rc::Rc;

use block::{Disk, MemoryDisk, Safe, Sector, Segments};
use uuid::Uuid;

use super::{new_pool, pattern};
use crate::{Decider, Lun, LunError, NewLun, Options, Pool};

fn identity(lun: &Lun) -> (Uuid, String, String) {
    (lun.uuid(), lun.naa(), lun.serial())
}

async fn pool(medium: &Rc<MemoryDisk>) -> Rc<Pool> {
    Pool::create(vec![medium.clone()], new_pool(), Options::default()).await.unwrap()
}

#[test]
fn copies_get_an_identity_of_their_own() {
    lane::block_on(async {
        let pool = pool(&Rc::new(MemoryDisk::new(16 << 11))).await;
        let lun = pool.create_lun(NewLun::new("a", 8192)).await.unwrap();
        lun.write(Sector(0), &Segments::new(&pattern(8, 1)), Safe::OnReturn).await.unwrap();
        lun.snapshot("s").await.unwrap();
        let clone = pool.clone_lun("a", "s", NewLun::new("b", 0)).await.unwrap();
        clone.snapshot("s").await.unwrap();
        let second = pool.clone_lun("b", "s", NewLun::new("c", 0)).await.unwrap();
        let other = pool.create_lun(NewLun::new("d", 8192)).await.unwrap();
        let all = [&lun, &clone, &second, &other];
        assert_eq!(all.map(|l| l.uuid()).into_iter().collect::<BTreeSet<_>>().len(), 4);
        assert_eq!(all.map(|l| l.naa()).into_iter().collect::<BTreeSet<_>>().len(), 4);
        assert_eq!(all.map(|l| l.serial()).into_iter().collect::<BTreeSet<_>>().len(), 4);
        for lun in all {
            assert_eq!(pool.lun(&lun.naa()).unwrap().id, lun.id);
            assert_eq!(pool.lun(&lun.serial()).unwrap().id, lun.id);
            assert_eq!(pool.lun(&lun.uuid().to_string()).unwrap().id, lun.id);
        }
        let uuids: BTreeSet<Uuid> =
            all.iter().flat_map(|l| l.snapshots()).map(|s| s.uuid).chain(all.map(|l| l.uuid())).collect();
        assert_eq!(uuids.len(), 6, "snapshots have their own too");
    });
}

#[test]
fn an_identity_stays_whatever_is_done_to_the_lun() {
    lane::block_on(async {
        let medium = Rc::new(MemoryDisk::new(16 << 11));
        let pool = pool(&medium).await;
        let lun = pool.create_lun(NewLun::new("a", 8192)).await.unwrap();
        let first = identity(&lun);
        let same = |what: &str, lun: &Lun| assert_eq!(identity(lun), first, "{what}");
        lun.write(Sector(0), &Segments::new(&pattern(8, 1)), Safe::OnReturn).await.unwrap();
        lun.rename("z").await.unwrap();
        same("renamed", &lun);
        lun.resize(16384).await.unwrap();
        same("grown", &lun);
        lun.snapshot("s").await.unwrap();
        lun.write(Sector(0), &Segments::new(&pattern(8, 2)), Safe::OnReturn).await.unwrap();
        lun.revert("s").await.unwrap();
        same("reverted", &lun);
        lun.undo_revert().await.unwrap();
        same("set back", &lun);
        lun.revert("s").await.unwrap();
        lun.accept().await.unwrap();
        same("accepted", &lun);
        let members = [(Rc::clone(&lun), "g".to_owned())];
        let leg = pool.prepare_cut(Uuid::from_u128(3), Decider::Outside, &members).await.unwrap();
        leg.cut();
        leg.settle().await.unwrap();
        leg.commit().await.unwrap();
        same("cut", &lun);
        lun.remove_snapshot("s").await.unwrap();
        pool.tidy().await.unwrap();
        same("merged", &lun);
        pool.remove_lun("z", false).await.unwrap();
        same("back from the trash", &pool.undelete_lun("z").await.unwrap());
        // By another program, at another place.
        drop((lun, members));
        let image = medium.image();
        pool.settle().await.unwrap();
        for image in [image, medium.image()] {
            let elsewhere = Rc::new(MemoryDisk::from(image));
            let pool = Pool::open(vec![elsewhere], Options::default()).await.unwrap();
            same("opened elsewhere", &pool.lun("z").unwrap());
        }
    });
}

#[test]
fn a_second_lun_of_one_identity_is_refused() {
    lane::block_on(async {
        let pool = pool(&Rc::new(MemoryDisk::new(16 << 11))).await;
        let uuid = Uuid::from_u128(7);
        let new = |name: &str| NewLun { name: name.into(), sectors: 8192, uuid: Some(uuid) };
        let lun = pool.create_lun(new("a")).await.unwrap();
        lun.snapshot("s").await.unwrap();
        let refused = |answer: Result<Rc<Lun>, LunError>| {
            assert!(matches!(&answer, Err(LunError::SameIdentity(other)) if other == "a"), "not refused");
        };
        refused(pool.create_lun(new("b")).await);
        refused(pool.clone_lun("a", "s", new("b")).await);
        // In the trash it may come back.
        pool.remove_lun("a", false).await.unwrap();
        refused(pool.create_lun(new("b")).await);
        refused(pool.create_lun(new("a")).await);
        assert_eq!(pool.luns().len(), 0);
        pool.empty_trash("a").await.unwrap();
        assert_eq!(pool.create_lun(new("b")).await.unwrap().uuid(), uuid, "it is free again");
        assert!(pool.check().await.unwrap().faults().next().is_none());
    });
}
