//! What has to look like one action does, also against other front ends of the LUN, whatever the order of events.

use super::*;
use block::{DiskError, Extents, Generation, Io, Safe, Sector, Shape};

/// Moves one sector at a time and lets others go between, for as long as the seed says: the worst that a disk may do.
struct Piecewise(MemoryDisk, std::cell::RefCell<fastrand::Rng>);

impl Piecewise {
    async fn wait(&self) {
        let turns = self.1.borrow_mut().u8(..4);
        for _ in 0..turns {
            lane::yield_now().await;
        }
    }
}

impl Disk for Piecewise {
    fn shape(&self) -> Shape {
        self.0.shape()
    }
    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        Box::pin(async move {
            for sector in 0..into.len() as u64 / 512 {
                self.wait().await;
                self.0.read(at.plus(sector), &into.slice_mut(sector as usize * 512, 512)).await?;
            }
            Ok(())
        })
    }
    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a> {
        Box::pin(async move {
            for sector in 0..from.len() as u64 / 512 {
                self.wait().await;
                self.0.write(at.plus(sector), &from.slice(sector as usize * 512, 512), safe).await?;
            }
            Ok(())
        })
    }
    fn zero(&self, at: Sector, count: u64, may_free: bool) -> Io<'_> {
        self.0.zero(at, count, may_free)
    }
    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        self.0.unmap(at, count)
    }
    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        self.0.status(at, count, since, out)
    }
    fn compare_and_write<'a>(
        &'a self,
        at: Sector,
        expected: &'a Segments<'a>,
        new: &'a Segments<'a>,
    ) -> Io<'a> {
        self.0.compare_and_write(at, expected, new)
    }
    fn flush(&self) -> Io<'_> {
        self.0.flush()
    }
}

/// Runs `work` on a disk whose operations take many turns, with a seeded order of everything.
fn seeded<F: Future<Output = ()>>(work: impl Fn(Bench) -> F) {
    for seed in 0..40 {
        let driver = lane::DriverKind::Sim { seed };
        lane::block_on_with(lane::Options { driver, ..Default::default() }, async {
            let settings = Settings { atomic_blocks: 16, ..Settings::default() };
            work(Bench::with(
                Rc::new(Piecewise(MemoryDisk::new(64), fastrand::Rng::with_seed(seed).into())),
                settings,
            ))
            .await;
        });
    }
}

fn number(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

fn block_of(number: u64) -> [u8; 512] {
    let mut block = [0; 512];
    block[..8].copy_from_slice(&number.to_le_bytes());
    block
}

/// Adds one to a counter by compare and write, until it succeeds.
async fn count_up(disk: &Rc<dyn Disk>, nexus: &Rc<Nexus>, by_commands: bool) {
    loop {
        let old = if by_commands {
            number(&get(nexus, &cdb10(0x28, 0, 0, 1)).await)
        } else {
            let mut back = [0; 512];
            disk.read(Sector(0), &SegmentsMut::new(&mut back)).await.unwrap();
            number(&back)
        };
        let (expected, new) = (block_of(old), block_of(old + 1));
        let done = if by_commands {
            let (reply, _) = run(nexus, &cdb16(0x89, 0, 0, 1), &[expected, new].concat(), 0).await;
            reply.status == Status::Good
        } else {
            let tried: Result<(), DiskError> =
                disk.compare_and_write(Sector(0), &Segments::new(&expected), &Segments::new(&new)).await;
            tried.is_ok()
        };
        if done {
            return;
        }
    }
}

#[test]
fn compare_and_write_counts_right_over_all_front_ends() {
    seeded(|bench| async move {
        let nbd = bench.unit.as_disk(initiator(9), &port(2));
        let work = (0..12u8).map(|n| {
            let (nbd, nexus) = (Rc::clone(&nbd), bench.nexus(n % 3));
            async move { count_up(&nbd, &nexus, n % 4 != 0).await }
        });
        assert_eq!(lane::sync::together(work).await.len(), 12);
        let nexus = bench.nexus(1);
        assert_eq!(number(&get(&nexus, &cdb10(0x28, 0, 0, 1)).await), 12);
    });
}

#[test]
fn orwrite_loses_no_bit() {
    seeded(|bench| async move {
        let work = (0..16usize).map(|n| {
            let nexus = bench.nexus(n as u8 % 3);
            async move {
                let mut data = [0; 1024];
                data[n / 8] = 1 << (n % 8);
                data[512 + n / 8] = 1 << (n % 8);
                // Overlapping, not the same ranges.
                put(&nexus, &cdb16(0x8b, 0, (n % 2) as u64, 2), &data).await;
            }
        });
        lane::sync::together(work).await;
        let nexus = bench.nexus(1);
        let data = get(&nexus, &cdb10(0x28, 0, 0, 3)).await;
        assert_eq!(
            (&data[..2], &data[512..514], &data[1024..1026]),
            (&[0x55; 2][..], &[0xff; 2][..], &[0xaa; 2][..])
        );
    });
}

#[test]
fn an_atomic_write_is_never_seen_half_done() {
    seeded(|bench| async move {
        let nbd = bench.unit.as_disk(initiator(9), &port(2));
        let work = (0..24u8).map(|n| -> Io<'_> {
            let (nexus, nbd) = (bench.nexus(n % 3), Rc::clone(&nbd));
            Box::pin(async move {
                let data = match n % 3 {
                    0 => {
                        let mut cdb = cdb16(0x9c, 0, 4, 0);
                        cdb[13] = 8;
                        put(&nexus, &cdb, &[n + 1; 4096]).await;
                        return Ok(());
                    }
                    1 => get(&nexus, &cdb10(0x28, 0, 4, 8)).await,
                    _ => {
                        let mut data = vec![0; 4096];
                        nbd.read(Sector(4), &SegmentsMut::new(&mut data)).await?;
                        data
                    }
                };
                assert!(data.iter().all(|b| *b == data[0]), "torn");
                Ok(())
            })
        });
        for answer in lane::sync::together(work).await {
            answer.unwrap();
        }
    });
}
