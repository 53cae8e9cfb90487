//! A disk made of SCSI commands: it passes the suite that every disk passes, and what it says is durable is, through
//! FUA, SYNCHRONIZE CACHE, and a write cache that is off.

use super::*;
use block::crash::{CrashLog, Witness};
use block::{
    DiskError, Extent, Extents, Generation, Io, Kind, MediumFault, Safe, Sector, Shape, check_range,
    conformance,
};

use crate::sense::asc;
use crate::unit::limits;

/// What an initiator makes of a LUN.
struct Initiator {
    nexus: Rc<Nexus>,
    /// Say FUA where a write has to be durable; else the write cache is off.
    fua: bool,
}

fn error_of(reply: &Reply) -> DiskError {
    match reply.status {
        Status::ReservationConflict => return DiskError::Conflict,
        Status::CheckCondition => {}
        other => panic!("{other:?}"),
    }
    let sense = &reply.sense;
    let information = u32::from_be_bytes(sense[3..7].try_into().unwrap()).into();
    match u16::from_be_bytes([sense[12], sense[13]]) {
        asc::LBA_OUT_OF_RANGE => DiskError::OutOfRange,
        asc::WRITE_PROTECTED | asc::SOFTWARE_WRITE_PROTECTED => DiskError::ReadOnly,
        asc::SPACE_ALLOCATION_FAILED => DiskError::NoSpace,
        asc::MISCOMPARE_DURING_VERIFY => DiskError::Miscompare { at_bytes: information },
        asc::LOGICAL_UNIT_NOT_READY => DiskError::Gone,
        asc::UNRECOVERED_READ_ERROR | asc::WRITE_ERROR => {
            DiskError::Medium(MediumFault { at: Sector(information), what: "as the sense says" })
        }
        other => panic!("unexpected {other:04x}"),
    }
}

impl Initiator {
    async fn command(
        &self,
        cdb: &[u8],
        from: &Segments<'_>,
        into: &SegmentsMut<'_>,
    ) -> Result<(), DiskError> {
        let offered = Offered { out: from.len() as u64, into: into.len() as u64 };
        let command = self.nexus.begin(lun_bytes(0), 1, Attribute::Simple, cdb, offered);
        let from = from.slice(0, command.out_bytes());
        let into = into.slice_mut(0, command.in_bytes());
        let reply = command.run(&from, &into).await.expect("nobody aborts");
        if reply.status == Status::Good { Ok(()) } else { Err(error_of(&reply)) }
    }

    async fn plain(&self, cdb: &[u8]) -> Result<(), DiskError> {
        self.command(cdb, &Segments::new(&[]), &SegmentsMut::new(&mut [])).await
    }
}

impl Disk for Initiator {
    fn shape(&self) -> Shape {
        let disk = self.nexus.luns().unit(0).unwrap();
        disk.unit().unwrap().disk().shape()
    }

    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        Box::pin(async move {
            let blocks = (into.len() / 512) as u32;
            self.command(&cdb16(0x88, 0, at.0, blocks), &Segments::new(&[]), into).await
        })
    }

    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a> {
        Box::pin(async move {
            let flags = if self.fua && safe == Safe::OnReturn { 0x08 } else { 0 };
            let cdb = cdb16(0x8a, flags, at.0, (from.len() / 512) as u32);
            self.command(&cdb, from, &SegmentsMut::new(&mut [])).await
        })
    }

    fn zero(&self, at: Sector, count: u64, may_free: bool) -> Io<'_> {
        Box::pin(async move {
            check_range(self.shape().sectors, at, count)?;
            if count == 0 {
                return Ok(());
            }
            let flags = if may_free { 0x09 } else { 0x01 };
            self.plain(&cdb16(0x93, flags, at.0, count as u32)).await
        })
    }

    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        Box::pin(async move {
            let Ok(count) = u32::try_from(count) else { return Err(DiskError::OutOfRange) };
            let mut list = vec![0; 24];
            (list[1], list[3]) = (22, 16);
            list[8..16].copy_from_slice(&at.0.to_be_bytes());
            list[16..20].copy_from_slice(&count.to_be_bytes());
            let cdb = [0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0];
            self.command(&cdb, &Segments::new(&list), &SegmentsMut::new(&mut [])).await
        })
    }

    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        Box::pin(async move {
            check_range(self.shape().sectors, at, count)?;
            if since.is_some() {
                return Err(DiskError::UnknownGeneration);
            }
            if count == 0 {
                return Ok(());
            }
            let mut data = vec![0; 8 + 16 * 64];
            let cdb = cdb16(0x9e, 0x12, at.0, data.len() as u32);
            self.command(&cdb, &Segments::new(&[]), &SegmentsMut::new(&mut data)).await?;
            let length = u32::from_be_bytes(data[..4].try_into().unwrap()) as usize + 4;
            for one in data[8..length].chunks(16) {
                let lba = u64::from_be_bytes(one[..8].try_into().unwrap());
                let found = u64::from(u32::from_be_bytes(one[8..12].try_into().unwrap()));
                let end = (lba + found).min(at.0 + count);
                if end <= lba {
                    break;
                }
                let kind = if one[12] == 0 { Kind::Data } else { Kind::Zero };
                if !out.push(Extent { at: Sector(lba), count: end - lba, kind, changed: true }) {
                    break;
                }
            }
            Ok(())
        })
    }

    fn compare_and_write<'a>(
        &'a self,
        at: Sector,
        expected: &'a Segments<'a>,
        new: &'a Segments<'a>,
    ) -> Io<'a> {
        Box::pin(async move {
            let (blocks, both) = (new.len() / 512, [expected.to_vec(), new.to_vec()].concat());
            assert!(blocks as u64 <= limits::COMPARE_AND_WRITE_BLOCKS);
            let cdb = cdb16(0x89, 0, at.0, blocks as u32);
            self.command(&cdb, &Segments::new(&both), &SegmentsMut::new(&mut [])).await
        })
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(async move { self.plain(&cdb16(0x91, 0, 0, 0)).await })
    }
}

#[test]
fn commands_make_a_disk_that_passes_the_suite() {
    lane::block_on(async {
        for seed in 0..4 {
            let bench = Bench::new();
            let disk = Rc::new(Initiator { nexus: bench.nexus(1), fua: true });
            conformance::check(disk, seed).await;
        }
        let bench = Bench::new();
        let guarded = bench.unit.as_disk(initiator(2), &port(1));
        conformance::check(guarded, 9).await;
        let read_only = Bench::with(Rc::new(MemoryDisk::new(BLOCKS).read_only()), Settings::default());
        conformance::check_read_only(Rc::new(Initiator { nexus: read_only.nexus(1), fua: true })).await;
        conformance::check_read_only(read_only.unit.as_disk(initiator(2), &port(1))).await;
    });
}

/// Cuts the power at every point of a workload and looks.
async fn cut_everywhere(seed: u64, fua: bool) {
    let log = CrashLog::new(seed);
    log.interleave(2);
    let bench = Bench::with(log.disk(64), Settings::default());
    let nexus = bench.nexus(1);
    if !fua {
        let mut list = get(&nexus, &[0x1a, 8, 8, 0, 255, 0]).await;
        (list[0], list[6]) = (0, 0);
        put(&nexus, &[0x15, 0x10, 0, 0, 24, 0], &list).await;
    }
    let witness = Witness::new(&log, Rc::new(Initiator { nexus, fua }));
    let mut rng = fastrand::Rng::with_seed(seed);
    let work: Vec<_> = (0..12)
        .map(|n| {
            let (witness, choice) = (Rc::clone(&witness), rng.u8(..10));
            let (at, count) = (Sector(rng.u64(..40)), rng.u64(1..20));
            async move {
                lane::sleep(std::time::Duration::from_micros(n % 5)).await;
                let data = vec![n as u8 + 1; count as usize * 512];
                let from = Segments::new(&data);
                match choice {
                    0..4 => witness.write(at, &from, Safe::OnReturn).await,
                    4..6 => {
                        witness.write(at, &from, if fua { Safe::AtNextFlush } else { Safe::OnReturn }).await
                    }
                    6 => witness.zero(at, count, true).await,
                    7 => witness.unmap(at, count).await,
                    _ => witness.flush().await,
                }
            }
        })
        .collect();
    for answer in lane::sync::together(work).await {
        answer.unwrap();
    }
    for point in 0..=log.points() {
        for image in log.cut(point, seed ^ point as u64) {
            let after = MemoryDisk::from(image);
            let judged = witness.judge(point, &after).await;
            assert!(judged.is_ok(), "KAGAMI_SEED={seed} fua {fua} point {point}: {judged:?}");
        }
    }
}

#[test]
fn what_is_said_to_be_durable_is() {
    let soak = std::env::var_os("KAGAMI_SOAK").is_some();
    let one = std::env::var("KAGAMI_SEED").ok().and_then(|s| s.parse().ok());
    let seeds: Vec<u64> = one.map_or_else(|| (0..if soak { 2000 } else { 30 }).collect(), |s| vec![s]);
    for seed in seeds {
        for fua in [true, false] {
            let driver = lane::DriverKind::Sim { seed };
            lane::block_on_with(lane::Options { driver, ..Default::default() }, cut_everywhere(seed, fua));
        }
    }
}
