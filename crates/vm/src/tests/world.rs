//! Two pools, a datastore on a LUN of the first, two VMs: `a` with two disks on VMFS and two mapped LUNs, one in each
//! pool, and `b` with one disk on VMFS.

use std::rc::Rc;

use array::{NewLun, NewPool, Options, Pool};
use block::{Disk, Image, MemoryDisk, Sector, SegmentsMut};
use uuid::Uuid;
use vmdisk::folder::{Folder, Provision};
use vmdisk::rdm::{Luns, Mode, VisibleLun, lun_identity, mapping_claim};
use vmdisk::{VmfsFolder, create};

use crate::registry::new_vmx;
use crate::vmsnap::{self, Place};
use crate::{Datastore, OpenDisk, Surroundings, Vm};

/// Length of each disk, in sectors.
pub(crate) const SECTORS: u64 = 2048;
const MIB: u64 = 2048;

/// What is in the directory of each VM while no vmsnap is at work.
pub(crate) const FILES: [&[&str]; 2] = [
    &[
        "a.vmdk",
        "a-flat.vmdk",
        "a_1.vmdk",
        "a_1-flat.vmdk",
        "a_2.vmdk",
        "a_2-rdm.vmdk",
        "a_3.vmdk",
        "a_3-rdmp.vmdk",
        "a.vmx",
    ],
    &["b.vmdk", "b-flat.vmdk", "b.vmx"],
];

pub(crate) struct Around {
    pub(crate) pools: Vec<Rc<Pool>>,
    pub(crate) datastore: Rc<Datastore>,
}

impl Luns for Around {
    fn visible(&self) -> Vec<VisibleLun> {
        self.pools.visible()
    }
}

impl Surroundings for Around {
    fn datastore(&self, name: &str) -> Option<Rc<Datastore>> {
        self.datastore.folder.is_named(name).then(|| Rc::clone(&self.datastore))
    }
}

pub(crate) struct World {
    pub(crate) around: Around,
    pub(crate) vms: Vec<Rc<Vm>>,
    /// Files that recovery set aside.
    pub(crate) set_aside: Vec<String>,
}

async fn datastore(pool: &Rc<Pool>) -> Result<Rc<Datastore>, String> {
    let lun = pool.lun("ds").ok_or("the datastore's LUN is gone")?;
    let device = Rc::clone(&lun) as Rc<dyn Disk>;
    let volume =
        vmfs::Volume::open(vec![device], vmfs::Mode::Write).await.map_err(|e| format!("volume: {e}"))?;
    let folder = VmfsFolder::new(volume.clone());
    Ok(Rc::new(Datastore { name: "ds".into(), volume, folder, lun, pool: Rc::clone(pool) }))
}

/// The media of a world that is at rest.
pub(crate) async fn made() -> Vec<Image> {
    let media: Vec<Rc<MemoryDisk>> = (0..2).map(|_| Rc::new(MemoryDisk::new(1024 * MIB))).collect();
    let mut pools = Vec::new();
    for (number, medium) in media.iter().enumerate() {
        let new = NewPool { name: format!("p{number}"), uuid: Uuid::from_u128(number as u128 + 1) };
        pools.push(Pool::create(vec![Rc::clone(medium) as _], new, Options::default()).await.unwrap());
    }
    let lun = pools[0].create_lun(NewLun::new("ds", 900 * MIB)).await.unwrap();
    let when = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_760_000_000);
    vmfs::create(vec![lun as Rc<dyn Disk>], &vmfs::NewVolume::new("ds", 1, when)).await.unwrap();
    let store = datastore(&pools[0]).await.unwrap();
    let folder: Rc<dyn Folder> = Rc::clone(&store.folder) as _;
    for (name, flat) in [("a", 2), ("b", 1)] {
        store.volume.make_directory(&format!("/{name}")).await.unwrap();
        let mut vmx = new_vmx(name, 64, Uuid::from_u128(9));
        let mut slots = crate::Slot::all_scsi();
        for number in 0..flat {
            let file = if number == 0 { format!("{name}.vmdk") } else { format!("{name}_{number}.vmdk") };
            let path = format!("/{name}/{file}");
            create::create_flat(&folder, &path, SECTORS, Provision::Thin).await.unwrap();
            vmx.attach(slots.next().unwrap(), &file);
        }
        if name == "a" {
            for (number, mode) in [(0, Mode::Virtual), (1, Mode::Physical)] {
                let lun =
                    pools[number].create_lun(NewLun::new(&format!("d{number}"), SECTORS)).await.unwrap();
                let file = format!("a_{}.vmdk", number + 2);
                let path = format!("/a/{file}");
                lun.claim(Some(mapping_claim("ds", &path, mode))).await.unwrap();
                create::create_rdm(&folder, &path, &lun_identity(&lun), mode).await.unwrap();
                vmx.attach(slots.next().unwrap(), &file);
            }
        }
        folder.replace(&format!("/{name}/{name}.vmx"), &vmx.to_bytes()).await.unwrap();
    }
    store.volume.settle().await.unwrap();
    for pool in &pools {
        pool.settle().await.unwrap();
    }
    media.iter().map(|m| m.image()).collect()
}

impl World {
    /// Opens everything in the order of a start, recovery included.
    pub(crate) async fn open(media: Vec<Rc<dyn Disk>>) -> Result<Self, String> {
        let mut pools = Vec::new();
        for medium in media {
            let pool = Pool::open(vec![medium], Options::default()).await;
            pools.push(pool.map_err(|e| format!("pool: {e}"))?);
        }
        for pool in &pools {
            for doubt in pool.in_doubt() {
                let array::Decider::Pool(uuid) = doubt.decider else { return Err("decided outside".into()) };
                let decider = pools.iter().find(|p| p.uuid() == uuid).ok_or("no deciding pool")?;
                let happened = decider.group_decided(doubt.group);
                pool.resolve(doubt.group, happened).await.map_err(|e| e.to_string())?;
            }
        }
        let datastore = datastore(&pools[0]).await?;
        let around = Around { pools, datastore };
        let place = |name: &str| Place {
            datastore: Rc::clone(&around.datastore),
            vmx_path: format!("/{name}/{name}.vmx"),
        };
        let places = [place("a"), place("b")];
        if let Some((_, error)) = vmsnap::resolve(&places, &around.pools, true).await.first() {
            return Err(format!("resolve: {error}"));
        }
        let (mut vms, mut set_aside) = (Vec::new(), Vec::new());
        for (place, name) in places.iter().zip(["a", "b"]) {
            set_aside.extend(vmsnap::finish(place, &around).await.map_err(|e| format!("finish: {e}"))?);
            let vm = Vm::open(name, &place.datastore, &place.vmx_path, &around).await;
            let vm = vm.map_err(|e| format!("I1: {name}: {e}"))?;
            if let Some(trouble) = vm.troubles().first() {
                return Err(format!("I1: {name}/{}: {}", trouble.slot, trouble.why));
            }
            vms.push(vm);
        }
        Ok(Self { around, vms, set_aside })
    }

    /// All disks: those of `a` (two on VMFS, two mapped), then that of `b`.
    pub(crate) fn disks(&self) -> Vec<OpenDisk> {
        self.vms.iter().flat_map(|vm| vm.disks()).collect()
    }

    /// The disks on VMFS.
    pub(crate) fn flat(&self) -> Vec<OpenDisk> {
        self.disks().into_iter().filter(|d| d.disk.rdm().is_none()).collect()
    }

    /// The mapped LUNs.
    pub(crate) fn luns(&self) -> Vec<Rc<array::Lun>> {
        (0..2).filter_map(|n| self.around.pools[n].lun(&format!("d{n}"))).collect()
    }

    /// Folds back whatever is on redo logs.
    pub(crate) async fn consolidate(&self) -> Result<(), String> {
        for vm in &self.vms {
            vmsnap::consolidate(vm, &mut |_| ()).await.map_err(|e| format!("commit of {}: {e}", vm.name))?;
        }
        Ok(())
    }

    /// Names in the directory of a VM that should not be there, or are missing.
    pub(crate) async fn differing_files(&self) -> Vec<String> {
        let mut out = Vec::new();
        for (vm, expected) in self.vms.iter().zip(FILES) {
            let found = self.around.datastore.folder.list(vm.directory()).await.unwrap_or_default();
            out.extend(
                found.iter().filter(|n| !expected.contains(&n.as_str())).map(|n| format!("left: {n}")),
            );
            let missing = expected.iter().filter(|n| !found.iter().any(|f| f == **n));
            out.extend(missing.map(|n| format!("missing: {n}")));
        }
        out
    }
}

/// The whole content of a disk.
pub(crate) async fn content(disk: &dyn Disk) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0xee; disk.shape().bytes() as usize];
    disk.read(Sector(0), &SegmentsMut::new(&mut bytes)).await.map_err(|e| format!("not to be read: {e}"))?;
    Ok(bytes)
}
