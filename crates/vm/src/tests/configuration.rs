//! What a `.vmx` says and what becomes of it: disks that several VMs share, modes that are not kept, and the job record
//! that it follows.

use std::rc::Rc;

use block::{Disk, MemoryDisk, Safe, Sector, Segments};
use vmdisk::folder::Folder;

use super::simulated;
use super::story::{Plot, wanted};
use super::world::{World, content, made};
use crate::cut::{self, CutError};
use crate::job_record::{JobRecord, State, Step};
use crate::registry::new_vmx;
use crate::vmsnap::{VmsnapError, job_path};
use crate::vmx::{Mode, Vmx};
use crate::{OpenDisk, Vm};

async fn media() -> Vec<Rc<dyn Disk>> {
    made().await.into_iter().map(|i| Rc::new(MemoryDisk::from(i)) as Rc<dyn Disk>).collect()
}

/// The mapping that two nodes of a cluster have in common.
const MAPPING: &str = "/vmfs/volumes/ds/a/a_2.vmdk";

/// Two VMs with one mapping; what each says beside its file name. Whether each has it open.
async fn cluster(says: [&[(&str, &str)]; 2]) -> (World, Vec<Rc<Vm>>) {
    let mut world = World::open(media().await).await.unwrap();
    // Its own VM has the mapping open.
    world.vms.clear();
    let datastore = &world.around.datastore;
    let mut nodes = Vec::new();
    for (name, says) in ["one", "two"].iter().zip(says) {
        datastore.volume.make_directory(&format!("/{name}")).await.unwrap();
        let mut vmx = new_vmx(name, 64, uuid::Uuid::nil());
        vmx.attach("scsi1:0".parse().unwrap(), MAPPING);
        says.iter().for_each(|(key, value)| vmx.set(key, value));
        let path = format!("/{name}/{name}.vmx");
        datastore.folder.replace(&path, &vmx.to_bytes()).await.unwrap();
        nodes.push(Vm::open(name, datastore, &path, &world.around).await.unwrap());
    }
    (world, nodes)
}

#[test]
fn r5_two_vms_share_a_mapping_only_if_both_say_so() {
    simulated(1, async {
        let yes: [&[(&str, &str)]; 3] = [
            &[("scsi1.sharedBus", "virtual")],
            &[("scsi1.sharedBus", "physical")],
            &[("scsi1:0.sharing", "multi-writer")],
        ];
        let no: [&[(&str, &str)]; 3] =
            [&[], &[("scsi1.sharedBus", "none")], &[("scsi0.sharedBus", "virtual")]];
        for one in yes {
            let (_world, nodes) = cluster([one, yes[0]]).await;
            assert!(nodes.iter().all(|vm| vm.troubles().is_empty()), "{one:?}: {:?}", nodes[1].troubles());
            let disks: Vec<OpenDisk> = nodes.iter().map(|vm| vm.disks()[0].clone()).collect();
            let bytes = Segments::new(&[0x42; 512]);
            disks[0].disk.write(Sector(3), &bytes, Safe::AtNextFlush).await.unwrap();
            assert_eq!(content(&*disks[1].disk).await.unwrap()[3 * 512..4 * 512], [0x42; 512]);
            // What several write has no redo log: no cut of one VM says what another wrote.
            let refused = disks[0].disk.prepare_redo().await.err().unwrap().to_string();
            assert!(refused.contains("shared by several VMs"), "{refused}");
        }
        for alone in no {
            for says in [[alone, yes[0]], [yes[0], alone], [alone, alone]] {
                let (_world, nodes) = cluster(says).await;
                assert!(nodes[0].troubles().is_empty(), "{:?}", nodes[0].troubles());
                let [trouble] = &nodes[1].troubles()[..] else { panic!("{says:?}: both have it open") };
                assert!(trouble.why.contains("in use"), "{}", trouble.why);
            }
        }
    });
}

#[test]
fn nonpersistent_disks_are_not_opened_and_say_what_to_do() {
    simulated(2, async {
        let world = World::open(media().await).await.unwrap();
        let (vm, around) = (Rc::clone(&world.vms[1]), &world.around);
        for mode in [Mode::Nonpersistent, Mode::IndependentNonpersistent] {
            vm.edit_vmx(|vmx| vmx.set("scsi0:0.mode", mode.name()), &[]).await.unwrap();
            vm.open_disks(around).await;
            assert!(vm.disks().is_empty(), "{mode:?}: its writes would stay");
            let [trouble] = &vm.troubles()[..] else { panic!("{mode:?} is open") };
            assert!(
                trouble.why.contains("nonpersistent") && trouble.why.contains("attach it again"),
                "{trouble:?}"
            );
        }
        for mode in [Mode::Persistent, Mode::IndependentPersistent, Mode::Undoable, Mode::Append] {
            vm.edit_vmx(|vmx| vmx.set("scsi0:0.mode", mode.name()), &[]).await.unwrap();
            vm.open_disks(around).await;
            assert!(vm.troubles().is_empty() && vm.disks().len() == 1, "{mode:?}: {:?}", vm.troubles());
            vm.edit_vmx(|vmx| vmx.set("scsi0:0.mode", "nonpersistent"), &[]).await.unwrap();
            vm.open_disks(around).await;
        }
    });
}

async fn restarted(world: World, media: &[Rc<dyn Disk>]) -> World {
    drop(world);
    World::open(media.to_vec()).await.unwrap()
}

/// R21: what changes together is written in one record, J; a `.vmx` that power failed before is written anew from it.
#[test]
fn r21_recovery_rewrites_the_vmx_from_the_job_record() {
    simulated(3, async {
        let media = media().await;
        let world = World::open(media.clone()).await.unwrap();
        let folder = Rc::clone(&world.around.datastore.folder);
        let before = folder.read_text("/a/a.vmx").await.unwrap();
        let cut = cut::cut(&wanted(&world, Plot::Mixed, "s", 1)).await.unwrap();
        let after = folder.read_text("/a/a.vmx").await.unwrap();
        assert_ne!(before, after);
        drop(cut);
        // The cut is decided and J says FROZEN; the .vmx is as it was, but for a key that somebody else set.
        let mut old = Vmx::parse(&before).unwrap();
        old.set("annotation", "kept");
        folder.replace("/a/a.vmx", &old.to_bytes()).await.unwrap();
        drop(folder);
        let world = restarted(world, &media).await;
        let tops = |world: &World| world.vms[0].disks().iter().map(|d| d.path.clone()).collect::<Vec<_>>();
        let on_redo = ["/a/a-000001.vmdk", "/a/a_1-000001.vmdk", "/a/a_2.vmdk", "/a/a_3.vmdk"];
        assert_eq!(tops(&world), on_redo);
        let names = |world: &World, key: &str| world.vms[0].vmx().get(key).unwrap_or("").to_owned();
        assert_eq!(names(&world, "scsi0:0.redo"), "a-000001.vmdk");
        assert_eq!(names(&world, "annotation"), "kept");
        // One disk is back on its base by the word of J, and the .vmx does not know.
        let folder = Rc::clone(&world.around.datastore.folder);
        let file = folder.open(&job_path("/a/a.vmx"), false).await.unwrap();
        let record = JobRecord::open(file as Rc<dyn Disk>).await.unwrap();
        let state = State { step: Step::Committing, flipped: 1, ..record.state() };
        record.set(state).await.unwrap();
        drop((record, folder));
        let world = restarted(world, &media).await;
        assert_eq!(tops(&world), ["/a/a.vmdk", on_redo[1], on_redo[2], on_redo[3]]);
        assert_eq!(
            (names(&world, "scsi0:0.fileName"), names(&world, "scsi0:0.redo")),
            ("a.vmdk".into(), String::new())
        );
        let world = restarted(world, &media).await;
        world.consolidate().await.unwrap();
        assert!(world.differing_files().await.is_empty(), "{:?}", world.differing_files().await);
    });
}

/// R4 as the VM sees it: no redo log over a physical mapping, and the same cut takes its LUN.
#[test]
fn r4_a_physical_mapping_gets_no_redo_log_in_a_cut() {
    simulated(4, async {
        let world = World::open(media().await).await.unwrap();
        let mut all = wanted(&world, Plot::Mixed, "s", 1);
        all.vms[0].disks = world.vms[0].disks();
        let refused = cut::cut(&all).await.err().unwrap();
        assert!(matches!(refused, CutError::Vm { source: VmsnapError::Chain { .. }, .. }), "{refused}");
        assert!(
            refused.to_string().contains("R4") && refused.to_string().contains("array snapshot"),
            "{refused}"
        );
        assert!(world.differing_files().await.is_empty(), "{:?}", world.differing_files().await);
        let cut = cut::cut(&wanted(&world, Plot::Mixed, "s", 2)).await.unwrap();
        assert!(world.luns().iter().all(|lun| lun.snapshots().len() == 1));
        for vmsnap in cut.vms {
            vmsnap.commit(&mut |_| ()).await.unwrap();
        }
    });
}
