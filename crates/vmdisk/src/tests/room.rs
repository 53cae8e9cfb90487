//! The pool below the datastore is full, again and again, while a disk on a redo log is written: writes are held, none
//! fails, none is lost, and all goes on by itself.

use std::cell::Cell;
use std::time::Duration;

use array::{Lun, NewLun, NewPool, Options, Pool};
use block::{DiskError, MemoryDisk};
use vmfs::{NewVolume, Volume};

use super::*;
use crate::VmfsFolder;
use crate::create::create_flat;

const MIB: u64 = (1 << 20) / SECTOR_BYTES;
const LENGTH: u64 = 64 * MIB;

fn simulated<F: Future>(seed: u64, work: F) -> F::Output {
    let driver = lane::DriverKind::Sim { seed };
    lane::block_on_with(lane::Options { driver, ..Default::default() }, work)
}

async fn mount(pool: &Rc<Pool>) -> Volume {
    let lun = pool.lun("ds").unwrap();
    Volume::open(vec![lun as Rc<dyn Disk>], vmfs::Mode::Write).await.unwrap()
}

/// Takes the room that is left in the pool; grains of 64 KiB.
async fn fill(pool: &Rc<Pool>) {
    let filler: Rc<Lun> = pool.create_lun(NewLun::new("filler", 2048 * MIB)).await.unwrap();
    for grain in 0.. {
        match filler.write(Sector(grain * 128), &Segments::new(&[1; 4096]), Safe::AtNextFlush).await {
            Ok(()) => {}
            Err(DiskError::NoSpace) => return,
            Err(other) => panic!("{other}"),
        }
    }
}

/// Writes its share of the disk, every `of`-th block of 4 KiB, until it is told to stop.
fn writer(
    disk: &Rc<VmDisk>,
    (share, of): (u64, u64),
    seed: u64,
    stop: &Rc<Cell<bool>>,
) -> lane::Task<Vec<(u64, u8)>> {
    let (disk, stop) = (Rc::clone(disk), Rc::clone(stop));
    let mut random = fastrand::Rng::with_seed(seed);
    lane::spawn(async move {
        let mut written = Vec::new();
        while !stop.get() {
            let block = random.u64(0..LENGTH / 8 / of) * of + share;
            let byte = random.u8(..);
            match random.u8(0..8) {
                0 => disk.zero(Sector(block * 8), 8, true).await.unwrap(),
                1 => {
                    let bytes = [byte; 4096];
                    disk.write(Sector(block * 8), &Segments::new(&bytes), Safe::OnReturn).await.unwrap();
                }
                _ => write(&*disk, block * 8, &[byte; 4096]).await,
            }
            let zeroed = read(&*disk, block * 8, 1).await[0] != byte;
            written.push((block, if zeroed { 0 } else { byte }));
            if random.u8(0..6) == 0 {
                disk.flush().await.unwrap();
            }
            lane::sleep(Duration::from_millis(random.u64(0..40))).await;
        }
        written
    })
}

async fn wait(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if holds() {
            return;
        }
        lane::sleep(Duration::from_millis(20)).await;
    }
    panic!("never: {what}");
}

async fn story(seed: u64) {
    let medium = Rc::new(MemoryDisk::new(224 * MIB));
    let new = NewPool { name: "p".into(), uuid: uuid::Uuid::from_u128(1) };
    let pool = Pool::create(vec![medium.clone() as Rc<dyn Disk>], new, Options::default()).await.unwrap();
    let lun = pool.create_lun(NewLun::new("ds", 1024 * MIB)).await.unwrap();
    let when = std::time::UNIX_EPOCH + Duration::from_secs(1_760_000_000);
    vmfs::create(vec![Rc::clone(&lun) as Rc<dyn Disk>], &NewVolume::new("ds", 1, when)).await.unwrap();
    let volume = mount(&pool).await;
    let folder: Rc<dyn Folder> = VmfsFolder::new(volume.clone());
    create_flat(&folder, "/c.vmdk", LENGTH, Provision::Thin).await.unwrap();
    let disk = VmDisk::open(Rc::clone(&folder), "/c.vmdk", Open::WRITE, &()).await.unwrap();
    write(&*disk, 0, &[9; 4096]).await;
    switch(&disk).await;
    let stop = Rc::new(Cell::new(false));
    let writers: Vec<_> = (0..3).map(|n| writer(&disk, (n, 3), seed * 5 + n, &stop)).collect();
    for round in 0..3 {
        // With a snapshot below, metadata of the volume wants new room too.
        lun.snapshot(&format!("s{round}")).await.unwrap();
        fill(&pool).await;
        wait("writes are held", || disk.held().is_some_and(|h| h.operations == 3)).await;
        lane::sleep(Duration::from_secs(5)).await;
        assert!(disk.held().unwrap().for_now >= Duration::from_secs(5), "nobody gives up");
        assert_eq!(read(&*disk, 0, 1).await.len(), UNIT, "reads go on");
        pool.remove_lun("filler", true).await.unwrap();
        while pool.is_untidy() {
            pool.tidy_step().await.unwrap();
        }
        wait("writes go on", || disk.held().is_none()).await;
        lun.remove_snapshot(&format!("s{round}")).await.unwrap();
    }
    assert!(disk.held_in_all() >= Duration::from_secs(15));
    stop.set(true);
    let mut expected = vec![0; LENGTH as usize / 8];
    expected[0] = 9;
    for writer in writers {
        for (block, byte) in writer.await {
            expected[block as usize] = byte;
        }
    }
    let judge = async |disk: &VmDisk, when: &str| {
        for (block, byte) in expected.iter().enumerate() {
            let found = read(disk, block as u64 * 8, 8).await;
            assert!(found.iter().all(|b| b == byte), "seed {seed}, {when}: block {block}");
        }
    };
    judge(&disk, "before the commit").await;
    let commit = disk.start_commit(0).await.unwrap();
    commit.copy(&mut |_| true).await.unwrap();
    let left = commit.flip(async || Ok(())).await.unwrap();
    drop(commit);
    left.remove().await.unwrap();
    judge(&disk, "after the commit").await;
    disk.close().await.unwrap();
    drop((disk, folder));
    volume.close().await.unwrap();
    drop((volume, lun));
    pool.settle().await.unwrap();
    drop(pool);
    let pool = Pool::open(vec![medium as Rc<dyn Disk>], Options::default()).await.unwrap();
    let found = vmfs::check(vec![pool.lun("ds").unwrap() as Rc<dyn Disk>], Default::default()).await.unwrap();
    assert!(found.worst().is_none_or(|w| w <= vmfs::check::Severity::Leak), "{:?}", found.findings());
    let folder: Rc<dyn Folder> = VmfsFolder::new(mount(&pool).await);
    let disk = VmDisk::open(folder, "/c.vmdk", Open::WRITE, &()).await.unwrap();
    judge(&disk, "opened again").await;
}

#[test]
fn soak_a_full_pool_holds_the_writes_to_a_redo_log_until_there_is_room() {
    for seed in seeds(2, 20) {
        simulated(seed, story(seed));
    }
}

/// A disk that no backup works on is told at once; one that is about to be closed waits no longer.
#[test]
fn only_a_backup_holds_and_closing_ends_it() {
    simulated(7, async {
        let store = Store::open(Rc::new(MemoryDisk::new(store::STORE_SECTORS))).await;
        new_base(&store, 64).await;
        let disk = open(&store, BASE).await;
        let full = async || disk.when_there_is_room(async || Err(DiskError::NoSpace)).await;
        assert!(matches!(full().await, Err(DiskError::NoSpace)));
        let backup = disk.hold_when_full();
        let tries = Rc::new(Cell::new(0));
        let waiting = lane::spawn({
            let (disk, tries) = (Rc::clone(&disk), Rc::clone(&tries));
            async move {
                let operation = async || {
                    tries.set(tries.get() + 1);
                    if tries.get() > 4 { Ok(()) } else { Err(DiskError::NoSpace) }
                };
                disk.when_there_is_room(operation).await
            }
        });
        lane::sleep(Duration::from_millis(300)).await;
        assert_eq!(disk.held().unwrap().operations, 1);
        waiting.await.unwrap();
        assert!(disk.held().is_none() && disk.held_in_all() >= Duration::from_millis(600));
        let waiting = lane::spawn({
            let disk = Rc::clone(&disk);
            async move { disk.when_there_is_room(async || Err(DiskError::NoSpace)).await }
        });
        lane::sleep(Duration::from_secs(60)).await;
        assert!(disk.held().is_some());
        disk.hold_no_more();
        assert!(matches!(waiting.await, Err(DiskError::NoSpace)));
        drop(backup);
    });
}
