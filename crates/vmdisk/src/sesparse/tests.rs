//! Files made by hand, after the format; QEMU reads them too.

use std::process::Command;

use block::MemoryDisk;
use zerocopy::{FromZeros, IntoBytes};

use super::format::{Area, MAGIC, TABLE_SECTORS, VERSION};
use super::*;
use crate::descriptor::{Access, CreateType, Descriptor, ExtentKind, ExtentLine, NewDescriptor};
use crate::{ChainError, Folder, HostFolder, Open, Provision, VmDisk, create};

const UNIT: usize = SECTOR_BYTES as usize;
/// Two tables and a half, the last grain cut short.
const CAPACITY: u64 = 5 * TABLE_ENTRIES * GRAIN_SECTORS / 2 - 3;

fn area(at: u64, count: u64) -> Area {
    Area { at: at.into(), count: count.into() }
}

/// A file that holds some grains of every kind, and what the disk reads as over `below`.
struct Image {
    header: ConstHeader,
    volatile: VolatileHeader,
    /// Everything from the directory on, by sector.
    file: Vec<u8>,
    expected: Vec<u8>,
}

const DIRECTORY: u64 = 8;
const TABLES: u64 = 16;
const GRAINS: u64 = TABLES + 3 * TABLE_SECTORS;
const GRAIN_COUNT: u64 = 40;

impl Image {
    fn new(below: &[u8]) -> Self {
        let mut header = ConstHeader::new_zeroed();
        header.magic = MAGIC.into();
        header.version = VERSION.into();
        header.capacity = CAPACITY.into();
        header.grain = GRAIN_SECTORS.into();
        header.table = TABLE_SECTORS.into();
        header.volatile = area(1, 1);
        header.journal_header = area(2, 2);
        header.journal = area(4, 4);
        header.directory = area(DIRECTORY, 8);
        header.tables = area(TABLES, 3 * TABLE_SECTORS);
        header.free_bitmap = area(GRAINS - 2, 1);
        header.back_map = area(GRAINS - 1, 1);
        header.grains = area(GRAINS, GRAIN_COUNT * GRAIN_SECTORS);
        let mut volatile = VolatileHeader::new_zeroed();
        volatile.magic = VOLATILE_MAGIC.into();
        let bytes = (GRAINS + GRAIN_COUNT * GRAIN_SECTORS) as usize * UNIT;
        let mut image = Self { header, volatile, file: vec![0; bytes], expected: below.to_vec() };
        // Table 1 of the area belongs to directory entry 0, table 0 to entry 2; entry 1 has none.
        image.put(DIRECTORY, 0, 0x1000_0000_0000_0001);
        image.put(DIRECTORY, 2, 0x1000_0000_0000_0000);
        let last = CAPACITY.div_ceil(GRAIN_SECTORS) - 1;
        for (n, grain) in [0, 1, 2, 5, 4000, 4095, 8192, 8200, 8201, last].into_iter().enumerate() {
            image.grain(grain, n as u64);
        }
        image
    }

    fn put(&mut self, list: u64, index: u64, entry: u64) {
        let at = list as usize * UNIT + index as usize * 8;
        self.file[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    }

    /// One grain, of a kind that its number tells: unmapped, zero, or data (in falling order in the file).
    fn grain(&mut self, grain: u64, n: u64) {
        let table = TABLES + if grain < TABLE_ENTRIES { TABLE_SECTORS } else { 0 };
        let start = grain as usize * GRAIN_SECTORS as usize * UNIT;
        let stop = (start + GRAIN_SECTORS as usize * UNIT).min(self.expected.len());
        let entry = match n % 5 {
            1 => 1 << 60,
            3 => 2 << 60,
            _ => {
                let index = GRAIN_COUNT - 1 - n;
                let at = (GRAINS + index * GRAIN_SECTORS) as usize * UNIT;
                self.file[at..at + GRAIN_SECTORS as usize * UNIT].fill(0xA0 + n as u8);
                3 << 60 | (index & 0xFFF) << 48 | index >> 12
            }
        };
        self.put(table, grain % TABLE_ENTRIES, entry);
        let byte = if entry >> 60 == 3 { 0xA0 + n as u8 } else { 0 };
        self.expected[start..stop].fill(byte);
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.file.clone();
        bytes[..UNIT].copy_from_slice(self.header.as_bytes());
        bytes[UNIT..2 * UNIT].copy_from_slice(self.volatile.as_bytes());
        bytes
    }
}

fn below() -> Vec<u8> {
    (0..CAPACITY).flat_map(|n| [(n % 251) as u8; UNIT]).collect()
}

async fn open(bytes: &[u8]) -> Result<Rc<SeSparseDisk>, SeSparseError> {
    let base: Rc<dyn Disk> = Rc::new(MemoryDisk::from_bytes(&below()));
    SeSparseDisk::open(Rc::new(MemoryDisk::from_bytes(bytes)), base).await
}

#[test]
fn r13_sesparse_is_read_grain_by_grain() {
    lane::block_on(async {
        let image = Image::new(&below());
        let disk = open(&image.bytes()).await.unwrap();
        let mut found = vec![0xEE; CAPACITY as usize * UNIT];
        disk.read(Sector(0), &SegmentsMut::new(&mut found)).await.unwrap();
        assert!(found == image.expected);
        let mut random = fastrand::Rng::with_seed(3);
        for _ in 0..300 {
            let at = [0, 8190 * 8, CAPACITY - 90][random.usize(0..3)] + random.u64(0..60);
            let mut part = vec![0xEE; random.usize(1..30) * UNIT];
            disk.read(Sector(at), &SegmentsMut::new(&mut part)).await.unwrap();
            assert!(part == image.expected[at as usize * UNIT..][..part.len()], "at {at}");
        }
        block::conformance::check_read_only(disk.clone()).await;
        let mut out = Extents::with_limit(1000);
        disk.status(Sector(0), CAPACITY, None, &mut out).await.unwrap();
        assert_eq!(out.end(), Some(Sector(CAPACITY)));
        for extent in out.iter().filter(|e| e.kind != Kind::Data) {
            let range = extent.at.0 as usize * UNIT..(extent.at.0 + extent.count) as usize * UNIT;
            assert!(image.expected[range].iter().all(|b| *b == 0), "{extent:?}");
        }
        assert!(out.iter().any(|e| e.kind == Kind::Zero));
    });
}

#[test]
fn r13_what_makes_no_sense_is_refused_by_name() {
    lane::block_on(async {
        let refused = async |change: &dyn Fn(&mut Image)| {
            let mut image = Image::new(&below());
            change(&mut image);
            open(&image.bytes()).await.err().map(|e| e.to_string()).unwrap_or_default()
        };
        type Edit<'a> = (&'a str, &'a dyn Fn(&mut Image));
        let edits: [Edit<'_>; 9] = [
            ("magic", &|i| i.header.magic = 7.into()),
            ("version", &|i| i.header.version = 0x3_0000_0001.into()),
            ("grain size", &|i| i.header.grain = 16.into()),
            ("flags", &|i| i.header.flags = 1.into()),
            ("capacity", &|i| i.header.capacity = u64::MAX.into()),
            ("grain directory entries", &|i| i.header.capacity = (1 << 30).into()),
            ("grains", &|i| i.header.grains = area(u64::MAX, 2)),
            ("magic of the volatile header", &|i| i.volatile.magic = MAGIC.into()),
            ("journal was not replayed", &|i| i.volatile.replay_journal = 1.into()),
        ];
        for (what, edit) in edits {
            let said = refused(edit).await;
            assert!(said.contains(what), "{what}: {said:?}");
        }
        let longer = refused(&|i| i.header.capacity = (CAPACITY + 1).into()).await;
        assert!(longer.contains("the disk below has"), "{longer}");
        // A table entry that leads outside is a fault of the medium for whoever reads there, and for nobody else.
        let mut image = Image::new(&below());
        image.put(TABLES + TABLE_SECTORS, 9, 3 << 60 | 4000 << 48);
        image.put(TABLES + TABLE_SECTORS, 10, 7 << 60);
        image.put(DIRECTORY, 1, 5);
        let disk = open(&image.bytes()).await.unwrap();
        for (grain, fails) in [(9, true), (10, true), (11, false), (TABLE_ENTRIES, true)] {
            let mut part = vec![0; UNIT];
            let answer = disk.read(Sector(grain * GRAIN_SECTORS), &SegmentsMut::new(&mut part)).await;
            assert_eq!(matches!(answer, Err(DiskError::Medium(_))), fails, "{grain}: {answer:?}");
        }
    });
}

/// A chain in a directory whose top is such a file: we read it, QEMU reads it, and both read the same.
#[test]
fn r13_a_chain_with_sesparse_is_opened_to_read_and_qemu_agrees() {
    let place = std::env::temp_dir().join(format!("kagami-sesparse-{}", std::process::id()));
    std::fs::create_dir_all(&place).unwrap();
    let image = Image::new(&below());
    lane::block_on(async {
        let folder: Rc<dyn Folder> = HostFolder::new(place.clone());
        create::create_flat(&folder, "/d.vmdk", CAPACITY, Provision::Thin).await.unwrap();
        std::fs::write(place.join("d-flat.vmdk"), below()).unwrap();
        std::fs::write(place.join("d-000001-sesparse.vmdk"), image.bytes()).unwrap();
        let base = Descriptor::parse(&folder.read_text("/d.vmdk").await.unwrap()).unwrap();
        let extent = ExtentLine {
            access: Access::ReadWrite,
            sectors: CAPACITY,
            kind: ExtentKind::SeSparse,
            file: "d-000001-sesparse.vmdk".into(),
            offset: 0,
        };
        let new = NewDescriptor {
            cid: base.cid(),
            parent: Some((base.cid(), "d.vmdk".into())),
            create_type: CreateType::SeSparse,
            extents: vec![extent],
            ddb: vec![],
        };
        let child = "/d-000001.vmdk";
        folder.replace(child, &Descriptor::new(&new).unwrap().to_bytes()).await.unwrap();
        let refused = VmDisk::open(Rc::clone(&folder), child, Open::WRITE, &()).await.err().unwrap();
        assert!(
            matches!(&refused, ChainError::Unsupported { what, .. } if what.contains("SEsparse")),
            "{refused}"
        );
        let disk = VmDisk::open(folder, child, Open::READ, &()).await.unwrap();
        assert_eq!(disk.links()[1].kind, crate::LinkKind::SeSparse);
        let mut found = vec![0xEE; CAPACITY as usize * UNIT];
        disk.read(Sector(0), &SegmentsMut::new(&mut found)).await.unwrap();
        assert!(found == image.expected);
    });
    std::fs::write(place.join("raw"), &image.expected).unwrap();
    match Command::new("qemu-img")
        .args(["compare", "-f", "vmdk", "-F", "raw"])
        .args([place.join("d-000001.vmdk"), place.join("raw")])
        .output()
    {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned()
                + &String::from_utf8_lossy(&output.stderr);
            assert!(text.contains("identical"), "{text}");
        }
        Err(_) => {
            assert!(std::env::var("CI").is_err(), "qemu-img is missing");
            eprintln!("SKIPPED: qemu-img is not installed");
        }
    }
    std::fs::remove_dir_all(&place).unwrap();
}

#[test]
fn fuzz_hostile_sesparse_files_are_read_or_refused() {
    let good = Image::new(&below()).bytes();
    let mut random = fastrand::Rng::with_seed(11);
    for _ in 0..300 {
        let mut bytes = good.clone();
        for _ in 0..random.usize(1..6) {
            let at = [random.usize(0..1024), random.usize(4096..8192 + 65536)][random.usize(0..2)];
            bytes[at] = random.u8(..);
        }
        bytes.truncate(random.usize(0..good.len() * 2).min(good.len()));
        crate::fuzz::fuzz_sesparse(&bytes);
    }
}
