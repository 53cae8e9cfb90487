//! Hostile volumes: whatever the bytes are, the checker ends, in bounded time and memory, without a panic, and its
//! repair makes nothing worse. `KAGAMI_SEED=N` replays one seed, `KAGAMI_SOAK=1` runs many.

#![allow(clippy::unwrap_used)] // a test that cannot go on panics

mod common;

use std::rc::Rc;
use std::time::{Duration, Instant};

use block::Disk;
use common::editor::Editor;
use vmfs::check;
use vmfs::check::{Options, Report, Severity};
use vmfs::format::{FdAddress, InodeKind, SystemFile, Zla};

/// Where the volume begins on the device.
const DATA_AT: u64 = 0x110_0000;

fn seeds(default: u64) -> std::ops::Range<u64> {
    if let Some(seed) = std::env::var("KAGAMI_SEED").ok().and_then(|seed| seed.parse().ok()) {
        return seed..seed + 1;
    }
    0..if std::env::var_os("KAGAMI_SOAK").is_some() { default * 100 } else { default }
}

/// Device offsets of sectors that say something about others.
fn metadata(editor: &Editor) -> Vec<u64> {
    let mut sectors = vec![0x10_0000, 0x10_0200, 0x18_0200, 0x18_0600, 0x18_0800, DATA_AT + 0x20_0000];
    sectors.push(DATA_AT + 0x30_0000 + 0x4_2000); // the slot that ESXi takes
    let files = [
        SystemFile::FileBlocks,
        SystemFile::Descriptors,
        SystemFile::PointerBlocks,
        SystemFile::SubBlocks,
        SystemFile::PointerBlocks2,
    ];
    for file in files {
        sectors.push(DATA_AT + editor.header_at(file));
        for cluster in 0..editor.geometry(file).clusters().min(20) {
            let at = DATA_AT + editor.cluster_at(file, cluster);
            sectors.extend([at, at + 512]);
        }
    }
    let system = (0..8).map(|n| FdAddress::new(0, n));
    for fd in system.chain(editor.files().into_iter().map(|(fd, _)| fd).take(40)) {
        let at = DATA_AT + editor.fd_at(fd);
        sectors.extend([at, at + 512, at + 1024, at + 1536]);
        let meta = editor.meta(fd);
        if meta.kind.get() == InodeKind::Directory as u32 {
            sectors.extend([0, 512, 1024].map(|more| (DATA_AT + editor.entry_at(fd, 0) + more) & !511));
        }
        if [Zla::Single as u32, Zla::Double as u32].contains(&meta.zla.get()) && meta.blocks.get() > 0 {
            sectors.push(DATA_AT + editor.address_at(editor.used_slot(fd).1));
        }
    }
    sectors
}

fn mutate(editor: &Editor, sectors: &[u64], random: &mut fastrand::Rng) {
    for _ in 0..random.usize(1..6) {
        let at = sectors[random.usize(..sectors.len())];
        let mut sector = editor.device_bytes(at, 512);
        match random.u8(..6) {
            0 => sector[random.usize(..512)] ^= 1 << random.u8(..8),
            1 => sector[random.usize(..512)] = random.u8(..),
            2 => {
                let values = [
                    0,
                    1,
                    0x7FFF_FFFF,
                    u32::MAX,
                    0x8000_0000,
                    0xC8,
                    512,
                    140,
                    0x10D0,
                    0x10D1,
                    random.u32(..),
                ];
                let field = random.usize(..128) * 4 + random.usize(..2) * random.usize(..3);
                let field = field.min(508);
                sector[field..field + 4].copy_from_slice(&values[random.usize(..values.len())].to_le_bytes());
            }
            3 => sector = editor.device_bytes(sectors[random.usize(..sectors.len())], 512),
            4 => {
                // An address where one may be wanted, of any kind.
                let raw = random.u32(..) << 6 | random.u32(1..6);
                let field = random.usize(..128) * 4;
                sector[field..field + 4].copy_from_slice(&raw.to_le_bytes());
            }
            _ => sector[random.usize(..512)..].fill(0),
        }
        editor.put_device_bytes(at, &sector);
    }
}

fn look(editor: &Editor, repair_leaks: bool) -> Option<Report> {
    let disk: Rc<dyn Disk> = editor.disk.clone();
    common::at_once(check(vec![disk], Options { repair_leaks, mapping: None })).ok()
}

fn fuzz(base: &Editor, seeds: std::ops::Range<u64>) {
    let sectors = metadata(base);
    let (mut corrupt, mut leaks) = (0, 0);
    for seed in seeds {
        let volume = base.fork();
        mutate(&volume, &sectors, &mut fastrand::Rng::with_seed(seed));
        let start = Instant::now();
        let Some(report) = look(&volume, false) else { continue };
        assert!(start.elapsed() < Duration::from_secs(10), "KAGAMI_SEED={seed} took {:?}", start.elapsed());
        assert!(report.findings().len() <= 10_000);
        match report.worst() {
            Some(Severity::Corrupt) => corrupt += 1,
            Some(Severity::Leak) => {
                leaks += 1;
                let after = look(&volume, true).unwrap();
                assert!(after.is_clean() || report.cut_short, "KAGAMI_SEED={seed}: {:#?}", after.findings());
            }
            _ => {}
        }
    }
    eprintln!("{corrupt} corrupt, {leaks} with leaks only");
}

#[test]
fn fuzz_a_genuine_volume() {
    let Some(disk) = common::genuine::disk("vmfs/vmfs5") else { return };
    fuzz(&Editor::new(disk), seeds(400));
}

#[test]
fn fuzz_a_volume_of_ours() {
    fuzz(&Editor::new(common::populated::populated()), seeds(400));
}

/// A volume that claims far more than it can hold costs no more than it holds.
#[test]
fn hostile_sizes_cost_nothing() {
    let Some(disk) = common::genuine::disk("vmfs/vmfs5") else { return };
    let base = Editor::new(disk);
    for field in [0u64, 4, 12, 16, 20, 24, 28] {
        for file in [
            SystemFile::FileBlocks,
            SystemFile::Descriptors,
            SystemFile::PointerBlocks,
            SystemFile::SubBlocks,
        ] {
            for value in [0u32, 1, 0xFFFF, 0x7FFF_FFFF, u32::MAX] {
                let volume = base.fork();
                let at = volume.header_at(file) + field;
                volume.put(at, &value.to_le_bytes());
                let report = look(&volume, true).unwrap();
                let same = base.bytes(at, 4) == value.to_le_bytes();
                assert!(same || report.worst() == Some(Severity::Corrupt), "{file:?} {field} {value:#x}");
            }
        }
    }
}

/// Every descriptor a directory, all of them on the same blocks: what is read stays bounded.
#[test]
fn hostile_directories_cannot_make_it_read_for_ever() {
    let volume = Editor::new(common::populated::populated());
    let many = volume.find(InodeKind::Directory, Zla::SubBlocks, |meta| meta.length.get() > 40 * 140);
    let raw = volume.bytes(volume.fd_at(many), 2048);
    for (fd, meta) in volume.files() {
        if meta.kind.get() == InodeKind::File as u32 {
            volume.put(volume.fd_at(fd) + 1024, &raw[1024..]);
            volume.edit_meta(fd, |meta| {
                meta.kind = (InodeKind::Directory as u32).into();
                meta.zla = (Zla::SubBlocks as u32).into();
                meta.block_bytes = 8192.into();
                meta.block_shift = 13;
                meta.length = (256 * 8192 / 140 * 140).into();
            });
        }
    }
    let report = look(&volume, true).unwrap();
    assert_eq!(report.worst(), Some(Severity::Corrupt));
}
