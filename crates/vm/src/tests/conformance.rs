//! What a backup reads, by the suite that every disk passes.

use std::rc::Rc;

use block::{Disk, DiskError, Extents, Generation, MemoryDisk, Safe, Sector, Segments};
use vmdisk::{Open, VmDisk, VmfsFolder};

use super::simulated;
use super::story::{Plot, wanted};
use super::world::{SECTORS, World, made};
use crate::block_list::{BlockList, SeenThrough};
use crate::cut;

async fn world() -> World {
    let media = made().await.into_iter().map(|i| Rc::new(MemoryDisk::from(i)) as Rc<dyn Disk>).collect();
    let world = World::open(media).await.unwrap();
    for (number, open) in world.disks().iter().enumerate() {
        let bytes = vec![number as u8 + 1; 300 * 512];
        open.disk.write(Sector(100), &Segments::new(&bytes), Safe::AtNextFlush).await.unwrap();
    }
    world
}

#[test]
fn a_disk_seen_through_its_block_list_is_a_disk() {
    simulated(1, async {
        let world = world().await;
        let datastore = &world.around.datastore;
        datastore.volume.settle().await.unwrap();
        datastore.lun.snapshot("s").await.unwrap();
        let snapshot = datastore.lun.open_snapshot("s").unwrap();
        let since = snapshot.generation();
        let device = snapshot as Rc<dyn Disk>;
        let volume = vmfs::Volume::open(vec![Rc::clone(&device)], vmfs::Mode::Read).await.unwrap();
        let file = volume.open_file("/a/a-flat.vmdk").await.unwrap();
        let now = BlockList::of(&file).await.unwrap().unwrap();
        let folder = VmfsFolder::new(volume);
        let disk = VmDisk::open(folder, "/a/a.vmdk", Open::READ, &()).await.unwrap();
        for before in [Some(now.clone()), Some(BlockList::default()), None] {
            let seen = Rc::new(SeenThrough::new(
                Rc::clone(&disk) as Rc<dyn Disk>,
                Rc::clone(&device),
                now.clone(),
                before.clone(),
            ));
            block::conformance::check_read_only(Rc::clone(&seen) as Rc<dyn Disk>).await;
            // The suite asks what is there; this is about what changed.
            let mut out = Extents::with_limit(1);
            for (at, count) in
                [(SECTORS, 1), (SECTORS - 1, 2), (u64::MAX, 1), (1, u64::MAX), (0, SECTORS + 1)]
            {
                let asked = seen.status(Sector(at), count, Some(since), &mut out).await;
                assert!(matches!(asked, Err(DiskError::OutOfRange)), "{at}+{count}: {asked:?}");
            }
            let asked = seen.status(Sector(0), SECTORS, Some(since), &mut out).await;
            match before {
                None => assert!(matches!(asked, Err(DiskError::UnknownGeneration)), "R45: {asked:?}"),
                Some(_) => {
                    assert!(asked.is_ok() && out.iter().count() == 1, "no more than there is room for")
                }
            }
            out.clear();
            let unknown = Generation { counter: since.counter + 77, id: 1 };
            let asked = seen.status(Sector(100), 8, Some(unknown), &mut out).await;
            let told = out.iter().all(|extent| extent.changed);
            assert!(asked.is_err() || (told && !out.is_empty()), "R45: never an empty set: {asked:?}");
        }
    });
}

#[test]
fn frozen_bases_and_snapshots_of_a_cut_are_disks() {
    simulated(2, async {
        let world = world().await;
        let cut = cut::cut(&wanted(&world, Plot::Mixed, "s", 1)).await.unwrap();
        for frozen in cut.vms.iter().flat_map(|v| v.frozen()) {
            block::conformance::check_read_only(Rc::clone(&frozen.disk)).await;
        }
        for lun in world.luns() {
            block::conformance::check_read_only(lun.open_snapshot("s").unwrap()).await;
        }
        // The redo logs that took over are written like any other disk.
        for open in world.flat() {
            block::conformance::check(open.disk, 3).await;
        }
        for vmsnap in cut.vms {
            vmsnap.commit(&mut |_| ()).await.unwrap();
        }
    });
}
