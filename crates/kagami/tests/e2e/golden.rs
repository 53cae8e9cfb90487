//! The volume of the first format that lies in the tree: VMFS-5 as this program made it once, with one of everything, and
//! mappings with our identity behind the genuine record. Every later program opens it, finds it clean, and changes nothing
//! by opening it.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, UNIX_EPOCH};

use block::{Disk, MemoryDisk, Pages, Safe, Sector, Segments, SegmentsMut};
use serde_json::Value;
use uuid::Uuid;
use vmdisk::rdm::{ContentTag, Identity, LunIdentity, Ours};
use vmdisk::{Folder, Open, Provision, VmDisk, VmfsFolder, create, rdm};
use vmfs::{Layout, Mode, NewFile, NewVolume, Volume};

use crate::common::Place;

/// Bytes of the device.
const BYTES: u64 = 768 << 20;
/// So many zeroes between two runs are not written down.
const GAP: usize = 16;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/vmfs5-format-1.runs")
}

/// The LUN that both mappings lead to.
fn lun() -> LunIdentity {
    let uuid = Uuid::from_u128(0x1234_5678_9abc_def0_0fed_cba9_8765_4321);
    LunIdentity {
        naa: b"\x60\x24\xb4\x70123456789abc".to_vec(),
        eui: b"\x02\x4b\x47\x00\x00\x00\x00\x01".to_vec(),
        uuid: Some(uuid),
        name: b"iqn.2006-01.host:golden".to_vec(),
        t10: b"KAGAMI  golden".to_vec(),
        serial: uuid.simple().to_string().into_bytes(),
        vendor: *b"KAGAMI  ",
        product: *b"LUN             ",
        revision: *b"0001",
        sectors: (501 << 30) / 512,
        logical_block: 512,
        physical_block: 4096,
        ours: Some(Ours { array: Uuid::from_u128(7), lun: uuid, generation: None }),
        tag: Some(ContentTag { hash: [9; 32], taken_at: 1_760_000_000 }),
        seen: b"pool:lun".to_vec(),
    }
}

const MAPPINGS: [(&str, rdm::Mode); 2] =
    [("/vm/d.vmdk", rdm::Mode::Virtual), ("/vm/e.vmdk", rdm::Mode::Physical)];

async fn write(disk: &dyn Disk, at: u64, fill: u8) {
    disk.write(Sector(at), &Segments::new(&[fill; 512]), Safe::AtNextFlush).await.unwrap();
    disk.flush().await.unwrap();
}

/// One of everything; once per format, by hand.
async fn make() -> Rc<MemoryDisk> {
    let device = Rc::new(MemoryDisk::new(BYTES / 512));
    let new = NewVolume::new("golden", 1, UNIX_EPOCH + Duration::from_secs(1_760_000_000));
    vmfs::create(vec![device.clone()], &new).await.unwrap();
    let volume = Volume::open(vec![device.clone()], Mode::Write).await.unwrap();
    let folder: Rc<dyn Folder> = VmfsFolder::new(volume.clone());
    volume.make_directory("/vm").await.unwrap();
    volume.make_directory("/many").await.unwrap();
    for n in 0..60 {
        volume.write_file(&format!("/many/{n}"), n.to_string().as_bytes()).await.unwrap();
    }
    volume.write_file("/vm/vm.vmx", b"displayName = \"golden\"\n").await.unwrap();
    volume.write_file("/vm/log", &b"a line of a log\n".repeat(200)).await.unwrap();
    volume.make_symlink("/link", "/vmfs/volumes/golden/vm/vm.vmx").await.unwrap();
    for (path, sectors, provision) in [
        ("/vm/c.vmdk", (100 << 30) / 512, Provision::Thin),
        ("/vm/large.vmdk", (42 << 40) / 512, Provision::Thin),
        ("/vm/thick.vmdk", (3 << 20) / 512, Provision::LazyZeroed),
    ] {
        create::create_flat(&folder, path, sectors, provision).await.unwrap();
        let disk = VmDisk::open(Rc::clone(&folder), path, Open::WRITE, &()).await.unwrap();
        write(&*disk, sectors - 1, 0x42).await;
    }
    let grown = NewFile { length: 10 << 20, layout: Layout::Thin, grows_to: 0 };
    let grown = volume.create_file("/vm/grown", grown).await.unwrap();
    grown.set_length(2 << 30).await.unwrap();
    grown.flush().await.unwrap();
    for (path, mode) in MAPPINGS {
        create::create_rdm(&folder, path, &lun(), mode).await.unwrap();
    }
    volume.close().await.unwrap();
    device
}

/// What is not zero: device offset, length, bytes.
fn pack(device: &MemoryDisk) -> Vec<u8> {
    let (mut out, mut page) = (Vec::new(), 0);
    let image = device.image();
    while let Some(next) = image.pages.next_page(page) {
        let mut bytes = [0; 4096];
        image.pages.read(next * 4096, &SegmentsMut::new(&mut bytes));
        let mut at = 0;
        while let Some(skipped) = bytes[at..].iter().position(|b| *b != 0) {
            let start = at + skipped;
            let zeroes = bytes[start..].windows(GAP).position(|w| w.iter().all(|b| *b == 0));
            at = zeroes.map_or(4096, |length| start + length);
            out.extend((next * 4096 + start as u64).to_le_bytes());
            out.extend((at as u32 - start as u32).to_le_bytes());
            out.extend(&bytes[start..at]);
        }
        page = next + 1;
    }
    out
}

/// The volume as it lies in the tree.
fn unpack() -> Rc<MemoryDisk> {
    let packed = std::fs::read(golden()).unwrap();
    let (mut pages, mut rest) = (Pages::default(), packed.as_slice());
    let mut whole = std::collections::BTreeMap::new();
    while let Some((head, after)) = rest.split_first_chunk::<12>() {
        let at = u64::from_le_bytes(head[..8].try_into().unwrap());
        let length = u32::from_le_bytes(head[8..].try_into().unwrap()) as usize;
        let page: &mut [u8; 4096] = whole.entry(at / 4096).or_insert([0; 4096]);
        page[(at % 4096) as usize..][..length].copy_from_slice(&after[..length]);
        rest = &after[length..];
    }
    for (number, bytes) in whole {
        pages.write(number * 4096, &Segments::new(&bytes));
    }
    Rc::new(MemoryDisk::from(block::Image { sectors: BYTES / 512, pages }))
}

async fn last_sector(folder: &Rc<dyn Folder>, path: &str) -> (u64, [u8; 512]) {
    let disk = VmDisk::open(Rc::clone(folder), path, Open::READ, &()).await.unwrap();
    let (sectors, mut bytes) = (disk.shape().sectors, [0; 512]);
    disk.read(Sector(sectors - 1), &SegmentsMut::new(&mut bytes)).await.unwrap();
    (sectors * 512, bytes)
}

#[test]
fn a_volume_of_format_1_opens_and_is_clean() {
    if std::env::var_os("KAGAMI_MAKE_GOLDEN").is_some() {
        let packed = pack(&lane::block_on(make()));
        std::fs::create_dir_all(golden().parent().unwrap()).unwrap();
        std::fs::write(golden(), packed).unwrap();
    }
    let device = unpack();
    let before = pack(&device);
    lane::block_on(async {
        // For writing, as a daemon does: nothing is upgraded.
        let volume = Volume::open(vec![device.clone()], Mode::Write).await.unwrap();
        assert_eq!((volume.info().version, volume.leaks_repaired()), (5, None));
        let folder: Rc<dyn Folder> = VmfsFolder::new(volume.clone());
        for (path, bytes) in
            [("/vm/c.vmdk", 100 << 30), ("/vm/large.vmdk", 42 << 40), ("/vm/thick.vmdk", 3 << 20)]
        {
            assert_eq!(last_sector(&folder, path).await, (bytes, [0x42; 512]), "{path}");
        }
        for (path, mode) in MAPPINGS {
            let copies = create::read_copies(&folder, path).await.unwrap();
            let wanted = Identity { mode, lun: lun() };
            assert_eq!(copies.inode, Ok(wanted.clone()), "{path}: behind the genuine record");
            assert_eq!(copies.descriptor, Ok(wanted), "{path}: in the descriptor");
            let mapping =
                folder.read_mapping(&path.replace(".vmdk", &format!("{}.vmdk", mode.suffix()))).await;
            let record = mapping.unwrap().record;
            assert_eq!(record.id_text(), "naa.6024b470313233343536373839616263");
        }
    });
    assert!(pack(&device) == before, "opening changed something");
    by_the_program(&before);
}

/// The same as a user sees it.
fn by_the_program(packed: &[u8]) {
    let place = Place::new("golden");
    let file = std::fs::File::create(place.dir().join("golden.img")).unwrap();
    file.set_len(BYTES).unwrap();
    let mut rest = packed;
    while let Some((head, after)) = rest.split_first_chunk::<12>() {
        let length = u32::from_le_bytes(head[8..].try_into().unwrap()) as usize;
        file.write_all_at(&after[..length], u64::from_le_bytes(head[..8].try_into().unwrap())).unwrap();
        rest = &after[length..];
    }
    let check = place.json(&["vmfs", "check", "golden.img"]);
    assert!(check["verdict"] == "clean" && check["findings"] == Value::Array(Vec::new()), "{check}");
    assert_eq!(check["mappings"], 2, "{check}");
    assert_eq!(place.ok(&["vmfs", "cat", "golden.img", "/link"]), "displayName = \"golden\"\n");
    assert_eq!(place.ok(&["vmfs", "cat", "golden.img", "/vm/log"]).lines().count(), 200);
    let all = place.json(&["vmfs", "ls", "-R", "golden.img"]);
    let names = |kind: &str| all.as_array().unwrap().iter().filter(|e| e["kind"] == kind).count();
    assert_eq!((names("rdm"), names("symlink"), names("directory")), (2, 1, 2), "{all}");
    let mapping = place.json(&["vmfs", "stat", "golden.img", "/vm/e-rdmp.vmdk"]);
    assert_eq!(mapping["size_bytes"], 501_u64 << 30, "{mapping}");
}
