//! The whole way of a write below a VM: disk, VMFS, LUN, pool.

use array::{Claim, Lun, NewLun, NewPool, Options, Pool};
use block::crash::{CrashLog, Witness};
use block::{Image, MemoryDisk};
use vmfs::{NewVolume, Volume};

use super::*;
use crate::create::{create_flat, create_rdm, grow_rdm, read_copies, rebuild_rdm};
use crate::rdm::{Copies, Mode, claimed_by, find_lun, lun_identity, mapping_claim};
use crate::{ChainError, VmfsFolder};

const MIB: u64 = (1 << 20) / SECTOR_BYTES;

async fn new_pool(disk: Rc<dyn Disk>) -> Rc<Pool> {
    let new = NewPool { name: "p".into(), uuid: uuid::Uuid::from_u128(1) };
    Pool::create(vec![disk], new, Options::default()).await.unwrap()
}

async fn new_lun(pool: &Rc<Pool>, name: &str, sectors: u64) -> Rc<Lun> {
    pool.create_lun(NewLun::new(name, sectors)).await.unwrap()
}

async fn mount(lun: &Rc<Lun>) -> Rc<dyn Folder> {
    let volume = Volume::open(vec![Rc::clone(lun) as Rc<dyn Disk>], vmfs::Mode::Write).await.unwrap();
    VmfsFolder::new(volume)
}

async fn new_datastore(lun: &Rc<Lun>) -> Rc<dyn Folder> {
    let when = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_760_000_000);
    vmfs::create(vec![Rc::clone(lun) as Rc<dyn Disk>], &NewVolume::new("ds", 1, when)).await.unwrap();
    mount(lun).await
}

#[test]
fn r7_a_mapping_of_our_lun_has_three_copies_and_each_comes_back() {
    lane::block_on(async {
        let pool = new_pool(Rc::new(MemoryDisk::new(4096 * MIB))).await;
        let folder = new_datastore(&new_lun(&pool, "ds", 1024 * MIB).await).await;
        let data = new_lun(&pool, "data", 64 * MIB).await;
        let (pools, path) = (vec![Rc::clone(&pool)], "/d.vmdk");
        data.claim(Some(mapping_claim("ds", path, Mode::Virtual))).await.unwrap();
        create_rdm(&folder, path, &lun_identity(&data), Mode::Virtual).await.unwrap();
        let verdict = async || {
            let copies = read_copies(&folder, path).await.unwrap();
            Copies { claim: claimed_by(&pools, "ds", path), ..copies }.compare()
        };
        assert!(verdict().await.findings.is_empty());
        let disk = VmDisk::open(Rc::clone(&folder), path, Open::WRITE, &pools).await.unwrap();
        write(&*disk, 100, &[5; UNIT]).await;
        assert_eq!(read(&*data, 100, 1).await, [5; UNIT]);
        let (_, identity) = disk.rdm().unwrap();
        assert_eq!(find_lun(&pools, identity.lun.ours.unwrap().lun).unwrap().name(), "data");
        drop(disk);
        // The claim is lost.
        data.claim(None).await.unwrap();
        let lost = verdict().await;
        assert_eq!(lost.findings.len(), 1);
        let lun = find_lun(&pools, lost.identity.unwrap().lun.ours.unwrap().lun).unwrap();
        lun.claim(Some(mapping_claim("ds", path, Mode::Virtual))).await.unwrap();
        assert!(matches!(lun.claimed_by(), Some(Claim::Mapping { .. })));
        // The mapping file is lost.
        folder.remove("/d-rdm.vmdk").await.unwrap();
        let refused = VmDisk::open(Rc::clone(&folder), path, Open::WRITE, &pools).await.err().unwrap();
        assert!(matches!(refused, ChainError::Missing { .. }), "{refused}");
        rebuild_rdm(&folder, path, &verdict().await.identity.unwrap()).await.unwrap();
        // The descriptor is lost: the claim says all there is to know.
        folder.remove(path).await.unwrap();
        let (lun, mode) = claimed_by(&pools, "ds", path).unwrap();
        rebuild_rdm(&folder, path, &crate::rdm::Identity { mode, lun }).await.unwrap();
        assert!(verdict().await.findings.is_empty());
        // The LUN grows: the old length until the mapping takes note.
        data.resize(128 * MIB).await.unwrap();
        let disk = VmDisk::open(Rc::clone(&folder), path, Open::WRITE, &pools).await.unwrap();
        assert_eq!(disk.shape().sectors, 64 * MIB);
        drop(disk);
        grow_rdm(&folder, path, &lun_identity(&data)).await.unwrap();
        let disk = VmDisk::open(Rc::clone(&folder), path, Open::WRITE, &pools).await.unwrap();
        assert_eq!(disk.shape().sectors, 128 * MIB);
        assert_eq!(read(&*disk, 100, 1).await, [5; UNIT]);
    });
}

/// A thin disk with a redo log, on VMFS, on a thin LUN: flushes and durable writes hold on the whole way.
#[test]
fn crash_under_all_of_it_loses_nothing_that_was_flushed() {
    lane::block_on(async {
        for seed in seeds(5, 20) {
            whole_way(seed, 5).await;
        }
    });
}

async fn made() -> Image {
    let medium = Rc::new(MemoryDisk::new(4096 * MIB));
    let pool = new_pool(medium.clone()).await;
    let folder = new_datastore(&new_lun(&pool, "ds", 1024 * MIB).await).await;
    create_flat(&folder, "/c.vmdk", 16 * MIB, Provision::Thin).await.unwrap();
    let disk = VmDisk::open(Rc::clone(&folder), "/c.vmdk", Open::WRITE, &()).await.unwrap();
    switch(&disk).await;
    disk.close().await.unwrap();
    medium.image()
}

async fn open_all(medium: Rc<dyn Disk>) -> Rc<VmDisk> {
    let pool = Pool::open(vec![medium], Options::default()).await.unwrap();
    let folder = mount(&pool.lun("ds").unwrap()).await;
    VmDisk::open(folder, "/c-000001.vmdk", Open::WRITE, &()).await.unwrap()
}

async fn whole_way(seed: u64, step: usize) {
    let log = CrashLog::new(seed);
    let disk = open_all(log.disk_from(made().await)).await;
    let begun = log.points();
    log.interleave(2);
    let witness = Witness::new(&log, disk);
    let tasks: Vec<_> = (0..2u64)
        .map(|task| {
            let (witness, mut random) = (Rc::clone(&witness), fastrand::Rng::with_seed(seed * 3 + task));
            lane::spawn(async move {
                for _ in 0..12 {
                    let at = random.u64(0..16 * MIB / 16 - 1) * 16 + task * 8;
                    let bytes = vec![random.u8(1..); random.usize(1..8) * UNIT];
                    let safe = if random.u8(0..4) == 0 { Safe::OnReturn } else { Safe::AtNextFlush };
                    witness.write(Sector(at), &Segments::new(&bytes), safe).await.unwrap();
                    if random.u8(0..3) == 0 {
                        witness.flush().await.unwrap();
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await;
    }
    for point in points(begun, log.points(), step, seed) {
        let image = log.cut(point, (seed + point as u64) % 4).remove(0);
        let disk = open_all(Rc::new(MemoryDisk::from(image))).await;
        let judged = witness.judge(point, &*disk).await;
        judged.unwrap_or_else(|v| panic!("KAGAMI_SEED={seed} point {point}: {v:?}"));
    }
}
