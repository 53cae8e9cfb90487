//! What the writer promises about flushes, failing devices, and tasks that come at the same time.

#![allow(clippy::unwrap_used)] // a test that cannot go on panics

mod common;

use std::rc::Rc;
use std::time::Duration;

use block::crash::CrashLog;
use block::decorate::{Decorated, Fail, Operation, Record};
use block::{Disk, DiskError, Safe, Sector, Segments, SegmentsMut};
use common::datastore::{GIB, MIB, assert_clean, check, fresh, open, read, write};
use vmfs::check::Severity;
use vmfs::format::{HEARTBEAT_IN_USE, Heartbeat, VmfsUuid};
use vmfs::{Error, Layout, Mode, NewFile, Options, Volume};
use zerocopy::IntoBytes;

fn thin(length: u64) -> NewFile {
    NewFile { length, layout: Layout::Thin, grows_to: 0 }
}

#[test]
fn growing_shares_rounds_and_a_flush_without_growth_is_one_flush() {
    lane::block_on(async {
        let disk = Decorated::new(fresh(GIB).await, Record::default());
        let volume = open(disk.clone()).await;
        let file = volume.create_file("t-flat.vmdk", thin(100 * GIB)).await.unwrap();
        volume.settle().await.unwrap();
        let flushes = || disk.passing.count(Operation::Flush);
        let before = flushes();
        for n in 0..200 {
            write(&volume, &file, n * 2048, &[n as u8; 512]).await;
        }
        assert_eq!(flushes(), before, "allocating flushes nothing");
        file.flush().await.unwrap();
        assert_eq!(flushes(), before + 2, "bits and data, then pointers");
        let writes = disk.passing.count(Operation::Write);
        for n in 0..200 {
            write(&volume, &file, n * 2048, &[n as u8 + 1; 512]).await;
        }
        file.flush().await.unwrap();
        assert_eq!(flushes(), before + 3, "nothing but data");
        assert_eq!(disk.passing.count(Operation::Write), writes + 200, "no metadata");
        volume.settle().await.unwrap();
        assert_clean(disk).await;
    });
}

/// A device fails at every write in turn, and stays broken: what it holds is sound, and opens again.
#[test]
fn a_device_that_fails_leaves_a_sound_volume() {
    lane::block_on(async {
        let base = fresh(768 * MIB).await.image();
        let mut completed = false;
        for (kind, last) in [(Operation::Write, 90), (Operation::Flush, 30)] {
            for nth in 0..last {
                let medium = Rc::new(block::MemoryDisk::from(base.clone()));
                let broken = Fail::nth(kind, nth, true, DiskError::Gone);
                let volume = open(Decorated::new(medium.clone(), broken)).await;
                let result = work(&volume).await;
                completed |= result.is_ok();
                if let Err(error) = result {
                    let expected = matches!(error, Error::Disk(DiskError::Gone | DiskError::Halted));
                    assert!(expected, "{kind:?} {nth}: {error}");
                    assert!(volume.write_file("more", &[1; 2000]).await.is_err());
                }
                let report = check(medium.clone()).await;
                assert_ne!(
                    report.worst(),
                    Some(Severity::Corrupt),
                    "{kind:?} {nth}: {:#?}",
                    report.findings()
                );
                let again = open(medium).await;
                again.write_file("again", b"again").await.unwrap();
            }
        }
        assert!(completed, "the work needs fewer operations than the test breaks");
    });
}

async fn work(volume: &Volume) -> Result<(), Error> {
    volume.make_directory("d").await?;
    volume.write_file("d/a", &[1; 3000]).await?;
    volume.write_file("d/a", &[2; 5]).await?;
    let file = volume.create_file("d/f", thin(GIB)).await?;
    let allocation = file.allocate(Sector(9), 8).await?;
    allocation.commit()?;
    file.flush().await?;
    drop(file);
    volume.rename("d/a", "b").await?;
    volume.remove("d/f").await?;
    volume.settle().await
}

/// A file that is opened while its last changes are on their way shows them.
#[test]
fn a_file_opened_during_a_round_is_as_memory_has_it() {
    lane::block_on(async {
        let base = fresh(768 * MIB).await.image();
        for seed in 0..20 {
            let log = CrashLog::new(seed);
            log.interleave(4);
            let disk = log.disk_from(base.clone());
            let volume = open(disk.clone()).await;
            let other = volume.create_file("other", thin(GIB)).await.unwrap();
            let file = volume.create_file("f", thin(300 * GIB)).await.unwrap();
            for n in 0..6u64 {
                write(&volume, &file, n * GIB / 512, &[n as u8 + 1; 512]).await;
            }
            drop(file);
            let flushing = lane::spawn(async move { other.flush().await.unwrap() });
            let opening = {
                let volume = volume.clone();
                lane::spawn(async move {
                    for round in 0..12u64 {
                        let file = volume.open_file("f").await.unwrap();
                        let n = round % 6;
                        let found = read(&volume, &file, n * GIB / 512, 1).await;
                        assert_eq!(found, [n as u8 + 1; 512], "seed {seed} round {round}");
                    }
                })
            };
            flushing.await;
            opening.await;
            volume.settle().await.unwrap();
            assert_clean(disk).await;
        }
    });
}

/// Names are made, replaced, opened and removed by several tasks at a time.
#[test]
fn tasks_that_change_and_read_the_same_names_do_not_meet_half_way() {
    lane::block_on(async {
        let base = fresh(768 * MIB).await.image();
        let log = CrashLog::new(7);
        log.interleave(3);
        let disk = log.disk_from(base);
        let volume = open(disk.clone()).await;
        let mut tasks = Vec::new();
        for task in 0..6u64 {
            let volume = volume.clone();
            tasks.push(lane::spawn(async move {
                for step in 0..12u64 {
                    let path = format!("n{}", (task * 5 + step) % 4);
                    let result = match (task + step) % 4 {
                        0 => volume.write_file(&path, &vec![task as u8; 700 * (step as usize + 1)]).await,
                        1 => volume.remove(&path).await,
                        2 => volume.rename(&path, &format!("n{}", step % 4)).await,
                        _ => volume.read_file(&path, MIB).await.map(|content| {
                            assert!(content.iter().all(|b| *b == content[0]), "half a file");
                        }),
                    };
                    if let Err(error) = result {
                        let fine = matches!(error, Error::NotFound { .. } | Error::InUse { .. });
                        assert!(fine, "{error}");
                    }
                    volume.list("/").await.unwrap();
                }
            }));
        }
        for task in tasks {
            task.await;
        }
        volume.settle().await.unwrap();
        assert_clean(disk).await;
    });
}

#[test]
fn allocations_wait_for_blocks_found_in_advance() {
    lane::block_on(async {
        let base = fresh(768 * MIB).await.image();
        let log = CrashLog::new(3);
        log.interleave(3);
        let disk = log.disk_from(base);
        let volume = open(disk.clone()).await;
        let new = NewFile { length: 4 * MIB, layout: Layout::LazyZeroed, grows_to: 400 * MIB };
        let file = volume.create_file("thick", new).await.unwrap();
        file.set_length(300 * MIB).await.unwrap();
        let growing = {
            let file = file.clone();
            lane::spawn(async move { file.preallocate(4 * MIB, Layout::LazyZeroed).await.unwrap() })
        };
        lane::yield_now().await;
        for mib in [2, 7, 299] {
            write(&volume, &file, mib * 2048 + 1, &[mib as u8; 512]).await;
        }
        growing.await;
        assert_eq!((file.units_allocated(), file.units_to_be_zeroed()), (300, 297));
        volume.settle().await.unwrap();
        assert_clean(disk).await;
    });
}

/// Puts a host's heartbeat into slot 7, and a word into the first sector of its journal.
async fn beat(disk: &Rc<dyn Disk>, stamp_us: u64, journal_word: u8) {
    let volume_start = 0x110_0000;
    let (slot, journal) = (0x30_0000 + 7 * 512, 700 * MIB);
    let mut heartbeat = Heartbeat::free(slot);
    heartbeat.state = HEARTBEAT_IN_USE.into();
    heartbeat.host = VmfsUuid([9; 16]);
    heartbeat.stamp_us = stamp_us.into();
    heartbeat.journal_offset = journal.into();
    let put = async |at: u64, bytes: &[u8]| {
        let at = Sector::at_byte(volume_start + at);
        disk.write(at, &Segments::new(bytes), Safe::AtNextFlush).await.unwrap();
    };
    put(slot, heartbeat.as_bytes()).await;
    put(journal, &[journal_word; 512]).await;
}

#[test]
fn other_hosts_and_unknown_features_forbid_writing_not_reading() {
    lane::block_on(async {
        let disk: Rc<dyn Disk> = fresh(GIB).await;
        let open = async |stale_after: Option<Duration>| {
            let options = Options { stale_after, ..Options::new(Mode::Write) };
            Volume::open_with(vec![Rc::clone(&disk)], options).await
        };
        let patience = Some(Duration::from_millis(40));
        beat(&disk, 1, 0).await;
        let refused = open(None).await.err().unwrap();
        assert!(matches!(refused, Error::ForeignHost { slot: 7, .. }), "{refused}");
        assert!(open(patience).await.is_ok(), "dead, with an idle journal");
        let alive = {
            let disk = Rc::clone(&disk);
            lane::spawn(async move {
                for stamp in 2..12 {
                    lane::sleep(Duration::from_millis(5)).await;
                    beat(&disk, stamp, 0).await;
                }
            })
        };
        let refused = open(patience).await.err().unwrap();
        assert!(matches!(refused, Error::ForeignHost { slot: 7, .. }), "alive: {refused}");
        alive.await;
        beat(&disk, 1, 1).await;
        let refused = open(patience).await.err().unwrap();
        assert!(matches!(refused, Error::ReadOnly { .. }), "a journal to replay: {refused}");
        assert!(Volume::open(vec![Rc::clone(&disk)], Mode::Read).await.is_ok());

        let disk: Rc<dyn Disk> = fresh(GIB).await;
        let at = Sector::at_byte(0x110_0000 + 0x20_0000);
        let mut sector = [0; 512];
        disk.read(at, &SegmentsMut::new(&mut sector)).await.unwrap();
        sector[0x1B] |= 0x10;
        disk.write(at, &Segments::new(&sector), Safe::AtNextFlush).await.unwrap();
        let refused = Volume::open(vec![Rc::clone(&disk)], Mode::Write).await.err().unwrap();
        assert!(matches!(refused, Error::ReadOnly { .. }), "an unknown flag: {refused}");
        assert!(Volume::open(vec![disk], Mode::Read).await.is_ok());
    });
}

/// The host that had the genuine volume open is long dead: its stamp stands still.
#[test]
fn a_dead_host_is_waited_for_and_its_journal_decides() {
    let Some(disk) = common::genuine::disk("vmfs/vmfs5") else { return };
    lane::block_on(async {
        let patience = Some(Duration::from_millis(20));
        let options = Options { stale_after: patience, ..Options::new(Mode::Write) };
        let volume = Volume::open_with(vec![disk.clone()], options).await.unwrap();
        volume.write_file("ours", b"ours").await.unwrap();
        volume.settle().await.unwrap();
        assert_eq!(volume.read_file("small", 9).await.unwrap().len(), 5);
        assert_ne!(check(disk).await.worst(), Some(Severity::Corrupt));
    });
}
