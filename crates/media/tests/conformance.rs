//! Every combination of driver, cache and memory passes the suite that every disk passes.
#![allow(clippy::unwrap_used)] // a test

use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::rc::Rc;

use block::{Buffer, Disk, DiskError, Safe, Sector, Segments, SegmentsMut, conformance};
use lane::sim::{Fault, plan_fault};
use lane::{DriverKind, Options as LaneOptions};
use media::{Direct, InUse, Options};

fn scratch(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("media-{}-{name}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    path
}

/// Says loudly that something could not be tested here; in CI that is a failure.
fn skipped(what: &str) {
    assert!(std::env::var_os("CI").is_none_or(|v| v != "true"), "SKIPPED in CI: {what}");
    eprintln!("SKIPPED: {what}");
}

fn seed() -> u64 {
    std::env::var("KAGAMI_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(11)
}

/// Several pieces of the lane's own memory at once.
async fn gathered(disk: &dyn Disk) {
    let mut pieces: Vec<Buffer> = (0..5).map(|_| Buffer::for_overwrite(8192)).collect();
    for (n, piece) in pieces.iter_mut().enumerate() {
        piece.fill(n as u8 + 1);
    }
    let whole = Segments::gather(pieces.iter().map(|p| &p[..4096]));
    disk.write(Sector(64), &whole, Safe::OnReturn).await.unwrap();
    let mut back: Vec<Buffer> = (0..5).map(|_| Buffer::for_overwrite(4096)).collect();
    disk.read(Sector(64), &SegmentsMut::scatter(back.iter_mut().map(|p| &mut p[..]))).await.unwrap();
    for (n, piece) in back.iter().enumerate() {
        assert!(piece.iter().all(|b| *b == n as u8 + 1));
    }
}

/// Runs the suite in one combination and answers what was really in use.
fn combination(driver: DriverKind, direct: Direct, registered_bytes: usize) -> Option<InUse> {
    let path = scratch(&format!("{driver:?}-{direct:?}-{registered_bytes}").replace(' ', ""));
    let lane = LaneOptions { driver, registered_bytes, ..Default::default() };
    let in_use = lane::block_on_with(lane, async {
        let options = Options { direct, ..Default::default() };
        let disk = match media::create(&path, 2048, options).await {
            Ok(disk) => disk,
            Err(error) if direct == Direct::Must => {
                skipped(&format!("direct I/O in {}: {error}", path.display()));
                return None;
            }
            Err(error) => panic!("{error}"),
        };
        gathered(&*disk).await;
        conformance::check(disk.clone(), seed()).await;
        Some(disk.in_use())
    });
    let _ = std::fs::remove_file(path);
    in_use
}

#[test]
fn every_combination_passes() {
    let mut seen = Vec::new();
    for driver in [DriverKind::Ring, DriverKind::Threads, DriverKind::Sim { seed: seed() }] {
        for direct in [Direct::Must, Direct::Never] {
            for registered_bytes in [0, 4 << 20] {
                let Some(in_use) = combination(driver, direct, registered_bytes) else { continue };
                assert_eq!(in_use.direct, direct == Direct::Must);
                assert!(!in_use.registered || registered_bytes > 0);
                seen.push(in_use.to_string());
            }
        }
    }
    for wanted in [
        "io_uring, direct, registered buffers",
        "io_uring, direct, plain buffers",
        "io_uring, buffered, plain buffers",
        "threads, direct, plain buffers",
        "threads, buffered, plain buffers",
        "sim, direct, plain buffers",
        "sim, buffered, plain buffers",
    ] {
        if !seen.iter().any(|s| s == wanted) {
            skipped(wanted);
        }
    }
}

#[test]
fn a_read_only_medium_passes() {
    let path = scratch("read-only");
    std::fs::write(&path, vec![7; 300 * 512]).unwrap();
    lane::block_on(async {
        let options = Options { read_only: true, ..Default::default() };
        conformance::check_read_only(media::open(&path, options).await.unwrap()).await;
    });
    std::fs::remove_file(path).unwrap();
}

#[test]
fn simulated_completion_orders_pass_soak() {
    let seeds = if std::env::var_os("KAGAMI_SOAK").is_some() { 500 } else { 10 };
    for seed in seed()..seed() + seeds {
        eprintln!("KAGAMI_SEED={seed}");
        lane::block_on_with(LaneOptions { driver: DriverKind::Sim { seed }, ..Default::default() }, async {
            let disk = media::create("/medium", 1024, Options::default()).await.unwrap();
            conformance::check(disk, seed).await;
        });
    }
}

fn simulated(test: impl AsyncFn()) {
    lane::block_on_with(LaneOptions { driver: DriverKind::Sim { seed: 1 }, ..Default::default() }, test());
}

#[test]
fn a_failed_flush_halts_until_reopened() {
    simulated(async || {
        let disk = media::create("/medium", 64, Options::default()).await.unwrap();
        let data = vec![3; 512];
        disk.write(Sector(1), &Segments::new(&data), Safe::AtNextFlush).await.unwrap();
        plan_fault("/medium", Fault::Sync, 0, 5);
        assert!(matches!(disk.flush().await, Err(DiskError::Medium(_))));
        let write = disk.write(Sector(1), &Segments::new(&data), Safe::AtNextFlush).await;
        assert!(matches!(write, Err(DiskError::Halted)));
        assert!(matches!(disk.flush().await, Err(DiskError::Halted)));
        assert!(matches!(disk.unmap(Sector(0), 1).await, Err(DiskError::Halted)));
        let mut back = vec![0; 512];
        disk.read(Sector(1), &SegmentsMut::new(&mut back)).await.unwrap();
        drop(disk);
        let disk = media::open("/medium", Options::default()).await.unwrap();
        disk.write(Sector(1), &Segments::new(&data), Safe::OnReturn).await.unwrap();
        disk.flush().await.unwrap();
    });
}

#[test]
fn a_failed_durable_write_halts_and_a_full_medium_does_not() {
    simulated(async || {
        let disk = media::create("/medium", 64, Options::default()).await.unwrap();
        let data = vec![3; 512];
        plan_fault("/medium", Fault::Write, 0, 28);
        let full = disk.write(Sector(1), &Segments::new(&data), Safe::OnReturn).await;
        assert!(matches!(full, Err(DiskError::NoSpace)));
        disk.write(Sector(1), &Segments::new(&data), Safe::OnReturn).await.unwrap();
        plan_fault("/medium", Fault::Write, 0, 5);
        let failed = disk.write(Sector(2), &Segments::new(&data), Safe::AtNextFlush).await;
        assert!(matches!(failed, Err(DiskError::Medium(fault)) if fault.at == Sector(2)));
        disk.flush().await.unwrap();
        plan_fault("/medium", Fault::Sync, 0, 5);
        assert!(disk.write(Sector(2), &Segments::new(&data), Safe::OnReturn).await.is_err());
        assert!(matches!(disk.flush().await, Err(DiskError::Halted)));
    });
}

#[test]
fn a_simulated_medium_rots() {
    simulated(async || {
        let disk = media::create("/medium", 64, Options::default()).await.unwrap();
        disk.write(Sector(1), &Segments::new(&[3; 512]), Safe::OnReturn).await.unwrap();
        lane::sim::rot("/medium", 512 + 7, 0x81);
        let mut back = vec![0; 512];
        disk.read(Sector(1), &SegmentsMut::new(&mut back)).await.unwrap();
        assert_eq!(back.iter().filter(|b| **b != 3).collect::<Vec<_>>(), [&0x82]);
        assert_eq!(back[7], 0x82);
    });
}

#[test]
fn zeroing_falls_back_to_writing() {
    simulated(async || {
        let disk = media::create("/medium", 8192, Options::default()).await.unwrap();
        let data = vec![3; 8192 * 512];
        disk.write(Sector(0), &Segments::new(&data), Safe::AtNextFlush).await.unwrap();
        plan_fault("/medium", Fault::Allocate, 0, 95);
        plan_fault("/medium", Fault::Allocate, 0, 95);
        disk.zero(Sector(3), 8000, true).await.unwrap();
        let mut back = vec![1; 8192 * 512];
        disk.read(Sector(0), &SegmentsMut::new(&mut back)).await.unwrap();
        let mut want = data.clone();
        want[3 * 512..8003 * 512].fill(0);
        assert!(back == want);
    });
}

/// A loop device as block device, where we may make one.
struct Loop {
    file: PathBuf,
    device: String,
}

impl Loop {
    fn new(sectors: u64, sector_bytes: u32) -> Option<Self> {
        let file = scratch(&format!("loop-{sector_bytes}"));
        std::fs::File::create(&file).ok()?.set_len(sectors * 512).ok()?;
        let made = std::process::Command::new("losetup")
            .args(["--show", "-f", "-b", &sector_bytes.to_string()])
            .arg(&file)
            .output()
            .ok()?;
        let device = String::from_utf8(made.stdout).ok()?.trim().to_owned();
        made.status.success().then_some(Loop { file, device })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["-d", &self.device]).status();
        let _ = std::fs::remove_file(&self.file);
    }
}

#[test]
fn block_devices_pass_with_both_sizes_of_sector() {
    for sector_bytes in [512, 4096] {
        let Some(device) = Loop::new(4096, sector_bytes) else {
            skipped(&format!(
                "a loop device with sectors of {sector_bytes} bytes: needs root and the loop driver"
            ));
            continue;
        };
        let excl = std::fs::OpenOptions::new().read(true).custom_flags(0o200).open(&device.device).unwrap();
        lane::block_on(async {
            let refused = media::open(&device.device, Options::default()).await.err().unwrap();
            assert!(refused.to_string().contains("in use by the system"), "{refused}");
        });
        drop(excl);
        for driver in [DriverKind::Ring, DriverKind::Threads] {
            lane::block_on_with(LaneOptions { driver, ..Default::default() }, async {
                let disk = media::open(&device.device, Options::default()).await.unwrap();
                assert!(disk.is_device());
                assert_eq!(disk.shape().sectors, 4096);
                assert_eq!(disk.shape().physical_block_bytes, sector_bytes);
                conformance::check(disk.clone() as Rc<dyn Disk>, seed()).await;
                assert!(disk.grow(8192).await.is_err(), "a device does not grow by itself");
            });
        }
    }
}
