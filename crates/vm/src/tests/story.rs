//! VMs that are written all the while, cut and committed twice.

use std::cell::Cell;
use std::rc::Rc;

use block::crash::{CrashLog, Witness};
use block::{Disk, Image, Safe, Sector, Segments};
use uuid::Uuid;

use super::world::{SECTORS, World, content};
use crate::cut::{self, Wanted, WantedVm};
use crate::vmsnap::Reserve;

const UNIT: usize = 512;
/// The numbered writes go to so many sectors of each member, one after the other.
const RING: u64 = 64;

/// What is cut.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Plot {
    /// Disks on VMFS of both VMs and LUNs of both pools: the first pool decides.
    Mixed,
    /// Disks on VMFS alone: the job record of the first VM decides.
    NoLuns,
}

/// One cut with its commit, on the log's clock.
pub(crate) struct Round {
    pub(crate) snapshot: String,
    /// Nothing of it is there if power failed here or earlier.
    pub(crate) begin: usize,
    /// The whole cut is there if power failed here or later.
    pub(crate) end: usize,
    /// Until here the bases are frozen.
    pub(crate) committing: usize,
    /// From here on nothing is left of the redo logs.
    pub(crate) over: usize,
    /// The disks on VMFS as they were at the cut.
    pub(crate) bases: Vec<Vec<u8>>,
    /// The LUNs as they were at the cut.
    pub(crate) luns: Vec<Vec<u8>>,
}

pub(crate) struct Story {
    pub(crate) plot: Plot,
    pub(crate) log: CrashLog,
    /// One for each disk, in the world's order.
    pub(crate) witnesses: Vec<Rc<Witness>>,
    pub(crate) begun: usize,
    pub(crate) rounds: Vec<Round>,
}

/// Highest number in the ring of a member.
fn highest(image: &[u8]) -> u64 {
    let number = |n: u64| u64::from_le_bytes(image[n as usize * UNIT..][..8].try_into().unwrap());
    (0..RING).map(number).max().unwrap_or(0)
}

/// The images hold a prefix of 1, 2, 3, ...: number n went to member n % members.
pub(crate) fn prefix(images: &[&[u8]]) -> Result<(), String> {
    let tops: Vec<u64> = images.iter().map(|i| highest(i)).collect();
    let (last, count) = (tops.iter().copied().max().unwrap_or(0), images.len() as u64);
    for (member, top) in tops.iter().enumerate() {
        let due = (0..=last).rev().find(|n| n % count == member as u64).unwrap_or(0);
        if *top != due {
            return Err(format!("no prefix: member {member} ends at {top}, the cut at {last}"));
        }
    }
    Ok(())
}

/// What this plot cuts in a world.
pub(crate) fn wanted(world: &World, plot: Plot, snapshot: &str, number: u128) -> Wanted {
    let vms = world.vms.iter().map(|vm| WantedVm {
        vm: Rc::clone(vm),
        disks: vm.disks().into_iter().filter(|d| d.disk.rdm().is_none()).collect(),
        mapped: Vec::new(),
        repository: String::new(),
        reserve: Reserve::Bytes(1 << 20),
    });
    let mapped = world.disks().into_iter().filter(|d| d.disk.rdm().is_some()).map(|d| d.disk);
    Wanted {
        group: Uuid::from_u128(number),
        snapshot: snapshot.to_owned(),
        luns: if plot == Plot::Mixed { world.luns() } else { Vec::new() },
        above: if plot == Plot::Mixed { mapped.collect() } else { Vec::new() },
        datastores: Vec::new(),
        vms: vms.collect(),
    }
}

async fn some_time(random: &mut fastrand::Rng, most: usize) {
    for _ in 0..random.usize(0..most) {
        lane::yield_now().await;
    }
}

impl Story {
    pub(crate) async fn run(seed: u64, plot: Plot, base: &[Image], rounds: usize) -> Self {
        let log = CrashLog::new(seed);
        let media = base.iter().map(|i| log.disk_from(i.clone()) as Rc<dyn Disk>).collect();
        let world = Rc::new(World::open(media).await.unwrap());
        log.interleave(1);
        let witness = |d: crate::OpenDisk| Witness::new(&log, d.disk as Rc<dyn Disk>);
        let witnesses: Vec<_> = world.disks().into_iter().map(witness).collect();
        let begun = log.points();
        let mut story = Self { plot, log, witnesses, begun, rounds: Vec::new() };
        let stop = Rc::new(Cell::new(false));
        let tasks = [story.numbers(&world, seed, &stop), story.noise(seed, &stop)];
        let mut random = fastrand::Rng::with_seed(seed);
        for number in 0..rounds {
            some_time(&mut random, 60).await;
            let round = story.round(&world, number, &mut random).await;
            story.rounds.push(round);
        }
        stop.set(true);
        for task in tasks {
            task.await;
        }
        story
    }

    /// Writes 1, 2, 3, ..., each to the next member of the cut, each after the answer to the one before.
    fn numbers(&self, world: &World, seed: u64, stop: &Rc<Cell<bool>>) -> lane::Task<()> {
        let in_cut = |d: &crate::OpenDisk| self.plot == Plot::Mixed || d.disk.rdm().is_none();
        let pairs = world.disks().into_iter().zip(&self.witnesses);
        let members: Vec<_> = pairs.filter(|(d, _)| in_cut(d)).map(|(_, w)| Rc::clone(w)).collect();
        let (stop, mut random) = (Rc::clone(stop), fastrand::Rng::with_seed(seed + 77));
        lane::spawn(async move {
            let (mut number, count) = (0_u64, members.len() as u64);
            while !stop.get() {
                number += 1;
                let witness = &members[(number % count) as usize];
                let mut bytes = [0x5a; UNIT];
                bytes[..8].copy_from_slice(&number.to_le_bytes());
                let at = Sector(number / count % RING);
                witness.write(at, &Segments::new(&bytes), Safe::AtNextFlush).await.unwrap();
                if random.u8(..) < 30 {
                    witness.flush().await.unwrap();
                }
                some_time(&mut random, 40).await;
            }
        })
    }

    /// Writes anywhere behind the ring.
    fn noise(&self, seed: u64, stop: &Rc<Cell<bool>>) -> lane::Task<()> {
        let (all, stop) = (self.witnesses.clone(), Rc::clone(stop));
        let mut random = fastrand::Rng::with_seed(seed + 78);
        lane::spawn(async move {
            while !stop.get() {
                let witness = &all[random.usize(0..all.len())];
                let at = Sector(RING + random.u64(0..(SECTORS - RING) / 8) * 8 - RING % 8);
                let bytes = vec![random.u8(1..); random.usize(1..4) * UNIT];
                let safe = if random.u8(0..8) == 0 { Safe::OnReturn } else { Safe::AtNextFlush };
                witness.write(at, &Segments::new(&bytes), safe).await.unwrap();
                if random.u8(0..3) == 0 {
                    witness.flush().await.unwrap();
                }
                some_time(&mut random, 60).await;
            }
        })
    }

    async fn round(&self, world: &World, number: usize, random: &mut fastrand::Rng) -> Round {
        let snapshot = format!("cut{number}");
        let begin = self.log.points();
        let wanted = wanted(world, self.plot, &snapshot, number as u128 + 1);
        let cut = cut::cut(&wanted).await.unwrap();
        let end = self.log.points();
        let (mut bases, mut luns) = (Vec::new(), Vec::new());
        for frozen in cut.vms.iter().flat_map(|v| v.frozen()) {
            bases.push(content(&*frozen.disk).await.unwrap());
        }
        for lun in &wanted.luns {
            luns.push(content(&*lun.open_snapshot(&snapshot).unwrap()).await.unwrap());
        }
        // Disks of `a` on VMFS, its LUNs, the disk of `b`: the order of the numbers.
        let (of_a, of_b) = bases.split_at(2);
        let images: Vec<&[u8]> = of_a.iter().chain(&luns).chain(of_b).map(Vec::as_slice).collect();
        prefix(&images).unwrap();
        for vmsnap in &cut.vms {
            let below = format!("below{number}-{}", vmsnap.vm().name);
            vmsnap.cut_below(&below).await.unwrap();
            world.around.datastore.lun.remove_snapshot(&below).await.unwrap();
        }
        some_time(random, 100).await;
        let committing = self.log.points();
        for vmsnap in cut.vms {
            vmsnap.sealed().await.unwrap();
            vmsnap.commit(&mut |_| ()).await.unwrap();
        }
        let over = self.log.points();
        Round { snapshot, begin, end, committing, over, bases, luns }
    }
}
