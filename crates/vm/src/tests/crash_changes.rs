//! What an incremental backup of a disk on VMFS would read after a power loss: everything that differs from the backup
//! before. Blocks are written, zeroed, given back and mapped again meanwhile; the mark of a change is durable before the
//! data it stands for can be found (R30), so none is missed (R43).

use std::rc::Rc;

use block::crash::CrashLog;
use block::{Disk, Extents, Generation, MemoryDisk, Safe, Sector, Segments};

use super::world::{SECTORS, World, content, made};
use super::{seeds, simulated, soak};
use crate::OpenDisk;
use crate::block_list::{BlockList, SeenThrough};

const UNIT: usize = 512;
const SNAP: &str = "backup";

/// What a backup remembers of a disk.
struct Before {
    image: Vec<u8>,
    list: BlockList,
}

async fn list_of(world: &World, open: &OpenDisk) -> BlockList {
    let extent = open.disk.links()[0].extent.clone();
    let file = world.around.datastore.volume.open_file(&extent).await.unwrap();
    BlockList::of(&file).await.unwrap().unwrap()
}

/// Writes, zeroes and gives back, one disk after the other.
async fn guest(disks: Vec<Rc<dyn Disk>>, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..40 {
        let disk = &disks[random.usize(0..disks.len())];
        let (at, count) = (random.u64(0..SECTORS - 40), random.u64(1..40));
        match random.u8(0..10) {
            0 => disk.zero(Sector(at), count, true).await.unwrap(),
            1 | 2 => disk.unmap(Sector(0), SECTORS).await.unwrap(),
            3 | 4 => disk.flush().await.unwrap(),
            _ => {
                let bytes = vec![random.u8(1..); count as usize * UNIT];
                let safe = if random.bool() { Safe::OnReturn } else { Safe::AtNextFlush };
                disk.write(Sector(at), &Segments::new(&bytes), safe).await.unwrap();
            }
        }
    }
}

/// Which sectors are told as changed since the backup.
async fn told(seen: &SeenThrough, since: Generation) -> Result<Vec<bool>, String> {
    let (mut changed, mut at) = (vec![false; SECTORS as usize], 0);
    while at < SECTORS {
        let mut out = Extents::with_limit(64);
        let asked = seen.status(Sector(at), SECTORS - at, Some(since), &mut out).await;
        asked.map_err(|e| format!("changes are not told: {e}"))?;
        for extent in out.iter() {
            changed[extent.at.0 as usize..][..extent.count as usize].fill(extent.changed);
        }
        at = out.end().ok_or("an empty answer")?.0;
    }
    Ok(changed)
}

async fn judge(world: &World, before: &[Before]) -> Result<(usize, usize), String> {
    let lun = &world.around.datastore.lun;
    let since = lun.open_snapshot(SNAP).map_err(|e| e.to_string())?.generation();
    let (mut differing, mut changed) = (0, 0);
    for (open, before) in world.flat().iter().zip(before) {
        let now = list_of(world, open).await;
        let (disk, device) = (Rc::clone(&open.disk) as Rc<dyn Disk>, Rc::clone(lun) as Rc<dyn Disk>);
        let seen = SeenThrough::new(disk, device, now, Some(before.list.clone()));
        let (told, image) = (told(&seen, since).await?, content(&*open.disk).await?);
        for (sector, told) in told.iter().enumerate() {
            let range = sector * UNIT..(sector + 1) * UNIT;
            let differs = image[range.clone()] != before.image[range];
            if differs && !told {
                return Err(format!("R43: sector {sector} of {} differs and is not told", open.path));
            }
            differing += usize::from(differs);
            changed += usize::from(*told);
        }
    }
    Ok((differing, changed))
}

async fn story(seed: u64, step: usize) -> (usize, usize) {
    let log = CrashLog::new(seed);
    let base = made().await;
    let media = base.into_iter().map(|i| log.disk_from(i) as Rc<dyn Disk>).collect();
    let world = World::open(media).await.unwrap();
    let disks: Vec<Rc<dyn Disk>> = world.flat().into_iter().map(|d| d.disk as Rc<dyn Disk>).collect();
    // One disk is full at the backup, one in part, one not at all.
    for (disk, count) in disks.iter().zip([SECTORS, 100]) {
        let bytes = vec![0x11; count as usize * UNIT];
        disk.write(Sector(0), &Segments::new(&bytes), Safe::AtNextFlush).await.unwrap();
    }
    world.around.datastore.volume.settle().await.unwrap();
    world.around.datastore.lun.snapshot(SNAP).await.unwrap();
    let mut before = Vec::new();
    for open in world.flat() {
        let (image, list) = (content(&*open.disk).await.unwrap(), list_of(&world, &open).await);
        before.push(Before { image, list });
    }
    assert_eq!(judge(&world, &before).await.unwrap(), (0, 0), "nothing has changed");
    let begun = log.points();
    log.interleave(2);
    let guests: Vec<_> = (0..2).map(|n| lane::spawn(guest(disks.clone(), seed * 2 + n))).collect();
    for guest in guests {
        guest.await;
    }
    let mut sum = (0, 0);
    for point in (begun + seed as usize % step..=log.points()).step_by(step) {
        let fate = (seed + point as u64) % 6;
        let images = log.cut(point, fate).into_iter();
        let media = images.map(|i| Rc::new(MemoryDisk::from(i)) as Rc<dyn Disk>).collect();
        let judged = async { judge(&World::open(media).await?, &before).await };
        let at = || format!("KAGAMI_SEED={seed} point {point} of {}, fate {fate}", log.points());
        let (differing, changed) = judged.await.unwrap_or_else(|what| panic!("{}: {what}", at()));
        sum = (sum.0 + differing, sum.1 + changed);
    }
    sum
}

#[test]
fn r30_r43_crash_hides_no_change_from_the_next_incremental() {
    let (mut differing, mut changed) = (0, 0);
    for seed in seeds(6, 60) {
        let sum = simulated(seed, story(seed, if soak() { 1 } else { 6 }));
        (differing, changed) = (differing + sum.0, changed + sum.1);
    }
    eprintln!("{differing} sectors differed, {changed} were told as changed");
    assert!(differing > 0 && changed >= differing);
}
