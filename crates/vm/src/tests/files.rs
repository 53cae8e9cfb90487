//! What recovery does with files: job records of every kind, redo logs that nobody names, room on the datastore.

use std::rc::Rc;

use block::{Disk, MemoryDisk, Safe, Sector, Segments};
use uuid::Uuid;
use vmdisk::folder::Folder;

use super::simulated;
use super::story::{Plot, wanted};
use super::world::{World, made};
use crate::cut::{self, CutError};
use crate::vmsnap::{self, Reserve, VmsnapError, job_path};

async fn media() -> Vec<Rc<dyn Disk>> {
    made().await.into_iter().map(|i| Rc::new(MemoryDisk::from(i)) as Rc<dyn Disk>).collect()
}

/// Ends a world as a killed daemon would, and opens it again.
async fn restarted(world: World, media: &[Rc<dyn Disk>]) -> World {
    drop(world);
    World::open(media.to_vec()).await.unwrap()
}

#[test]
fn a_redo_log_that_nobody_names_is_set_aside_and_the_next_backup_works() {
    simulated(1, async {
        let media = media().await;
        let world = World::open(media.clone()).await.unwrap();
        let disk = world.flat()[0].clone();
        // Made without a record, as a lost one would leave it; and an extent whose descriptor was never written.
        drop(disk.disk.prepare_redo().await.unwrap());
        let folder = Rc::clone(&world.around.datastore.folder);
        folder.create("/b/b-000007-delta.vmdk", 8, 0, vmdisk::Provision::Thin).await.unwrap();
        let refused = cut::cut(&wanted(&world, Plot::Mixed, "s", 1)).await.err().unwrap();
        assert!(refused.to_string().contains("a-000001.vmdk"), "{refused}");
        drop((disk, folder));
        let mut world = restarted(world, &media).await;
        world.set_aside.sort();
        let expected = [
            "/a/a-000001-delta.vmdk.set-aside",
            "/a/a-000001.vmdk.set-aside",
            "/b/b-000007-delta.vmdk.set-aside",
        ];
        assert_eq!(world.set_aside, expected);
        // Shown again at every start; the number is not given out again.
        let world = restarted(world, &media).await;
        assert_eq!(world.set_aside.len(), 3);
        let cut = cut::cut(&wanted(&world, Plot::Mixed, "s", 1)).await.unwrap();
        assert_eq!(world.flat()[0].path, "/a/a-000002.vmdk");
        for vmsnap in cut.vms {
            vmsnap.commit(&mut |_| ()).await.unwrap();
        }
        assert_eq!(world.flat()[0].path, "/a/a.vmdk");
    });
}

#[test]
fn nothing_is_set_aside_when_the_user_has_snapshots() {
    simulated(1, async {
        let media = media().await;
        let world = World::open(media.clone()).await.unwrap();
        drop(world.flat()[0].disk.prepare_redo().await.unwrap());
        let mut catalogue = crate::vmsd::Vmsd::default();
        catalogue.add("mine", "a-Snapshot1.vmsn", 1, &[]);
        world.around.datastore.folder.replace("/a/a.vmsd", &catalogue.to_bytes()).await.unwrap();
        let world = restarted(world, &media).await;
        assert!(world.set_aside.is_empty(), "{:?}", world.set_aside);
        let refused = cut::cut(&wanted(&world, Plot::Mixed, "s", 1)).await.err().unwrap();
        assert!(refused.to_string().contains("snapshots"), "{refused}");
    });
}

#[test]
fn a_damaged_job_record_is_set_aside_and_the_vmx_counts() {
    simulated(2, async {
        let media = media().await;
        let world = World::open(media.clone()).await.unwrap();
        let cut = cut::cut(&wanted(&world, Plot::Mixed, "s", 1)).await.unwrap();
        let disk = world.flat()[0].clone();
        disk.disk.write(Sector(9), &Segments::new(&[7; 512]), Safe::OnReturn).await.unwrap();
        drop(cut);
        let path = job_path("/a/a.vmx");
        let file = world.around.datastore.folder.open(&path, false).await.unwrap();
        file.write(Sector(8), &Segments::new(&[b'x'; 512]), Safe::OnReturn).await.unwrap();
        drop((file, disk));
        let world = restarted(world, &media).await;
        assert_eq!(world.set_aside, [format!("{path}.set-aside")]);
        assert_eq!(world.flat()[0].path, "/a/a-000001.vmdk", "the .vmx names the redo log");
        world.consolidate().await.unwrap();
        let disk = &world.flat()[0];
        assert_eq!((disk.path.as_str(), disk.disk.links().len()), ("/a/a.vmdk", 1));
        let read = super::world::content(&*disk.disk).await.unwrap();
        assert_eq!(read[9 * 512..10 * 512], [7; 512]);
    });
}

#[test]
fn what_nobody_took_up_is_committed_at_the_next_start() {
    simulated(3, async {
        let media = media().await;
        let world = World::open(media.clone()).await.unwrap();
        let cut = cut::cut(&wanted(&world, Plot::NoLuns, "s", 1)).await.unwrap();
        drop(cut);
        let world = restarted(world, &media).await;
        world.consolidate().await.unwrap();
        assert!(world.differing_files().await.is_empty());
    });
}

#[test]
fn one_backup_by_redo_logs_at_a_time() {
    simulated(4, async {
        let world = World::open(media().await).await.unwrap();
        let cut = cut::cut(&wanted(&world, Plot::Mixed, "s", 1)).await.unwrap();
        let again = vmsnap::consolidate(&world.vms[0], &mut |_| ()).await;
        assert!(matches!(again, Err(VmsnapError::Busy { .. })), "the base is being copied");
        let second = cut::cut(&wanted(&world, Plot::NoLuns, "t", 2)).await.err().unwrap();
        assert!(matches!(second, CutError::Vm { source: VmsnapError::Refused { .. }, .. }), "{second}");
        for vmsnap in cut.vms {
            vmsnap.commit(&mut |_| ()).await.unwrap();
        }
        assert!(world.differing_files().await.is_empty());
    });
}

#[test]
fn without_its_reserve_nothing_is_begun() {
    simulated(5, async {
        let world = World::open(media().await).await.unwrap();
        let mut greedy = wanted(&world, Plot::Mixed, "s", 1);
        greedy.vms[1].reserve = Reserve::Bytes(1 << 40);
        let refused = cut::cut(&greedy).await.err().unwrap();
        assert!(matches!(refused, CutError::Vm { source: VmsnapError::Reserve { .. }, .. }), "{refused}");
        assert!(world.differing_files().await.is_empty(), "the other VM's redo logs are gone too");
        assert!(world.luns().iter().all(|l| l.snapshots().is_empty()));
        // Half of the reserve is the floor: of the datastore, and of the pool below it.
        let mut modest = wanted(&world, Plot::NoLuns, "s", 2);
        modest.vms.truncate(1);
        let free = world.around.datastore.volume.free().await.unwrap().blocks << 20;
        let pool = Rc::clone(&world.around.datastore.pool);
        // Takes room of the pool: a block in each grain of 64 KiB.
        let take = async |name: &str, bytes: u64| {
            let filler = pool.create_lun(array::NewLun::new(name, 1 << 21)).await.unwrap();
            for grain in 0..bytes >> 16 {
                filler
                    .write(Sector(grain << 7), &Segments::new(&[1; 4096]), Safe::AtNextFlush)
                    .await
                    .unwrap();
            }
        };
        take("filler", 512 << 20).await;
        let pool_free = pool.info().bytes - pool.info().used_bytes;
        assert!(pool_free < free, "the pool is thinner than the datastore");
        modest.vms[0].reserve = Reserve::Bytes(pool_free + (1 << 20));
        let refused = cut::cut(&modest).await.err().unwrap();
        assert!(refused.to_string().contains("pool p0"), "{refused}");
        modest.vms[0].reserve = Reserve::Bytes(pool_free - (16 << 20));
        let floor = (pool_free - (16 << 20)) / 2;
        let cut = cut::cut(&modest).await.unwrap();
        let vmsnap = cut.vms.into_iter().next().unwrap();
        assert!(!vmsnap.is_short().await.unwrap());
        let folder = &world.around.datastore.folder;
        let most = (free - floor + (32 << 20)) / 512;
        folder.create("/fill", most, 0, vmdisk::Provision::LazyZeroed).await.unwrap();
        assert!(vmsnap.is_short().await.unwrap(), "the datastore");
        folder.remove("/fill").await.unwrap();
        world.around.datastore.volume.settle().await.unwrap();
        assert!(!vmsnap.is_short().await.unwrap());
        take("more", pool_free - floor).await;
        assert!(vmsnap.is_short().await.unwrap(), "the pool");
        vmsnap.commit(&mut |_| ()).await.unwrap();
    });
}

/// R33: a cut takes no SCSI command on a LUN, only its gate; whoever holds a reservation neither stops it nor notices.
#[test]
fn r33_a_cut_sends_nothing_to_a_lun_but_what_its_pool_writes() {
    simulated(6, async {
        let world = World::open(media().await).await.unwrap();
        let luns = world.luns();
        let before: Vec<_> = luns.iter().map(|l| l.record().unwrap()).collect();
        let cut = cut::cut(&wanted(&world, Plot::Mixed, "s", 1)).await.unwrap();
        for (lun, before) in luns.iter().zip(before) {
            let after = lun.record().unwrap();
            assert_eq!((after.uuid, &after.name, after.claim), (before.uuid, &before.name, before.claim));
            assert_eq!(lun.snapshots()[0].group, Some(Uuid::from_u128(1)));
        }
        for vmsnap in cut.vms {
            vmsnap.commit(&mut |_| ()).await.unwrap();
        }
    });
}
