//! Volumes that ESXi itself made: inspected by the program as a user calls it, without a daemon and with nothing written;
//! their disks exported over NBD, and held against what another reader reads.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;
#[path = "../../vmfs/tests/common/genuine.rs"]
#[allow(dead_code, missing_docs)] // the tests of vmfs use the rest
mod genuine;
#[path = "../../vmfs/tests/common/outside.rs"]
#[allow(dead_code, missing_docs)] // the tests of vmfs use the rest
mod outside;

use std::collections::BTreeSet;
use std::path::Path;
use std::rc::Rc;

use block::{Disk, DiskError, Extents, Kind, Safe, Sector, Segments, SegmentsMut};
use common::Place;
use front::nbd::client::{self, Client};
use front::nbd::{Exports, NewExport, Server, Tls, Wire};
use lane::net::{Listener, Stream};
use serde_json::Value;
use vmdisk::{Folder, Open, VmDisk, VmfsFolder};
use vmfs::Volume;

const MIB: u64 = 1 << 20;

/// What `genuine` runs its disks in memory with.
fn at_once<T>(work: impl std::future::Future<Output = T>) -> T {
    lane::block_on(work)
}

/// The same content was put on the VMFS-5 and the VMFS-6 volume.
fn inspect(name: &str, version: &str) {
    let Some(path) = genuine::path(name) else { return };
    let before = std::fs::metadata(&path).unwrap().modified().unwrap();
    let image = path.to_str().unwrap();
    let place = Place::new("genuine");

    let volume = place.json(&["vmfs", "stat", image]);
    assert!(volume["version"].as_str().unwrap().starts_with(version), "{volume}");
    let list = place.json(&["vmfs", "ls", image]);
    let entry = |list: &Value, name: &str| -> Value {
        let found = list.as_array().unwrap().iter().find(|e| e["name"] == name);
        found.unwrap_or_else(|| panic!("{name} is missing in {list}")).clone()
    };
    for name in ["small", "big", "bigger", "symlink", "directory", "collision", ".fbb.sf", "rdm-rdm.vmdk"] {
        entry(&list, name);
    }
    let files = place.json(&["vmfs", "ls", image, "/directory"]);
    assert_eq!(files.as_array().unwrap().len(), 100);
    let deep = place.json(&["vmfs", "ls", "-R", image]);
    assert!(deep.as_array().unwrap().len() > list.as_array().unwrap().len() + 100, "{deep}");

    let big = place.json(&["vmfs", "stat", image, "/big"]);
    assert_eq!(big["size_bytes"], (1 << 20) + 1, "{big}");
    let small = place.run(&["vmfs", "cat", image, "/small"]);
    assert!(small.status.success() && small.stdout.len() == 5, "{}", common::both(&small));
    let through = place.run(&["vmfs", "cat", image, "/symlink"]);
    assert_eq!(through.stdout, small.stdout, "through the link");
    let bigger = place.run(&["vmfs", "cat", image, "/bigger"]).stdout;
    assert_eq!(bigger.len(), 128 << 20);
    let mib_of = |(mib, bytes): (usize, &[u8])| bytes.iter().all(|b| usize::from(*b) == mib);
    assert!(bigger.chunks(1 << 20).enumerate().all(mib_of), "MiB n of bigger is full of n");
    let record = place.json(&["vmfs", "stat", image, "/rdm-rdm.vmdk"]);
    assert_eq!(record["lun_identity"], "QM00015", "{record}");
    assert_eq!(
        (&record["kind"], &record["size_bytes"]),
        (&"rdm".into(), &(6969_u64 << 30).into()),
        "{record}"
    );
    let mapping = place.ok(&["vmfs", "cat", image, "/rdm.vmdk"]);
    assert!(mapping.contains("vmfsRawDeviceMap"), "{mapping}");
    place.fails(3, &["vmfs", "cat", image, "/nothing"]);

    assert!(place.ok(&["inspect", image]).contains("VMFS volume"));
    assert!(!place.home().exists(), "no daemon was started");
    assert_eq!(std::fs::metadata(&path).unwrap().modified().unwrap(), before, "nothing was written");
}

#[test]
fn a_vmfs5_volume_of_esxi() {
    inspect("vmfs/vmfs5", "VMFS-5 ");
}

#[test]
fn a_vmfs6_volume_of_esxi() {
    inspect("vmfs/vmfs6", "VMFS-6 ");
}

/// Opens a genuine volume where it lies, read-only.
async fn open(image: &Path) -> Rc<VmfsFolder> {
    let options = media::Options { read_only: true, lock: media::Lock::Shared, ..media::Options::default() };
    let device = media::open(image, options).await.unwrap();
    VmfsFolder::new(Volume::open(vec![device], vmfs::Mode::Read).await.unwrap())
}

/// Ranges of a disk: first byte and length.
type Ranges = Vec<(u64, u64)>;

/// Bytes read from one offset.
const PIECE: u64 = 4096;
/// Offsets drawn.
const DRAWN: usize = 1000;

/// What is read of a disk with these extents of data: all of them with 1 MiB around, both ends, places where block lists
/// go on, and drawn ones.
fn ranges(bytes: u64, data: &[(u64, u64)], random: &mut fastrand::Rng) -> Ranges {
    let around = |from: u64, to: u64| {
        let (from, to) = (from.saturating_sub(MIB), (to + MIB).min(bytes));
        (from, to - from)
    };
    let mut ranges: Ranges = data.iter().map(|(at, length)| around(*at, at + length)).collect();
    ranges.extend([around(0, 0), around(bytes, bytes)]);
    let mut edge = 256 * MIB;
    while edge < bytes {
        ranges.push((edge - PIECE / 2, PIECE.min(bytes - edge)));
        edge *= 2;
    }
    let drawn = std::iter::repeat_with(|| random.u64(0..(bytes - PIECE) / 512) * 512);
    ranges.extend(drawn.take(DRAWN).map(|at| (at, PIECE)));
    ranges
}

/// What a client of NBD sees of a disk: its length, where data is, and the ranges read.
struct Seen {
    bytes: u64,
    data: Ranges,
    ranges: Ranges,
    content: Vec<Vec<u8>>,
}

async fn see(client: &Client) -> Seen {
    let sectors = client.shape().sectors;
    let (mut at, mut data) = (0, Ranges::new());
    while at < sectors {
        let mut extents = Extents::with_limit(1024);
        client.status(Sector(at), sectors - at, None, &mut extents).await.unwrap();
        for extent in extents.iter().filter(|e| e.kind == Kind::Data) {
            match data.last_mut() {
                Some((from, length)) if *from + *length == extent.at.bytes() => *length += extent.count * 512,
                _ => data.push((extent.at.bytes(), extent.count * 512)),
            }
        }
        at = extents.end().unwrap().0;
    }
    assert_eq!(at, sectors, "the answers end with the disk");
    let seed = std::env::var("KAGAMI_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(7);
    let ranges = ranges(sectors * 512, &data, &mut fastrand::Rng::with_seed(seed));
    let mut content = Vec::new();
    for (from, length) in &ranges {
        let mut bytes = vec![0xEE; *length as usize];
        client.read(Sector(from / 512), &SegmentsMut::new(&mut bytes)).await.unwrap();
        content.push(bytes);
    }
    Seen { bytes: sectors * 512, data, ranges, content }
}

/// Serves a disk of a genuine volume on a Unix socket, as the daemon serves disks, and looks at it as a client.
async fn served(image: &Path, descriptor: &str, socket: &Path) -> Seen {
    let folder: Rc<dyn Folder> = open(image).await;
    let disk = VmDisk::open(folder, descriptor, Open::READ, &()).await.unwrap();
    let exports = Exports::new();
    exports.add(NewExport { read_only: true, ..NewExport::new("disk", disk) }).unwrap();
    let server = Server::new(exports, front::nbd::Options::default());
    server.listen(Listener::unix(socket, 0o600).unwrap(), Tls::Off);
    let wire = Wire::Socket(Stream::connect_unix(socket).await.unwrap());
    let options = client::Options { export: "disk".to_owned(), ..client::Options::default() };
    let client = Client::connect(wire, &options).await.unwrap();
    let bytes = vec![1; 512];
    let write = client.write(Sector(0), &Segments::new(&bytes), Safe::AtNextFlush).await;
    assert!(matches!(write, Err(DiskError::ReadOnly)), "{write:?}");
    let seen = see(&client).await;
    client.disconnect().await;
    server.close().await;
    seen
}

/// The same ranges as `dissect.vmfs` reads them, one after the other; and what it says of the file: length, and blocks
/// in use.
fn dissected(image: &Path, file: &str, ranges: &Ranges, place: &Place) -> Option<(u64, u64, Vec<u8>)> {
    let [list, out] = ["ranges", "content"].map(|name| place.dir().join(name));
    let lines: String = ranges.iter().map(|(at, length)| format!("{at} {length}\n")).collect();
    std::fs::write(&list, lines).unwrap();
    let script = format!(
        "found = vmfs.get('{file}')\n\
         f = found.open()\n\
         with open('{}', 'wb') as out:\n\
         \x20   for line in open('{}'):\n\
         \x20       at, length = map(int, line.split())\n\
         \x20       f.seek(at)\n\
         \x20       out.write(f.read(length))\n\
         print(found.size, found.metadata.numBlocks)\n",
        out.display(),
        list.display()
    );
    let text = outside::dissect_file(image, &script)?;
    let numbers: Vec<u64> = text.split_whitespace().map(|word| word.parse().unwrap()).collect();
    Some((numbers[0], numbers[1], std::fs::read(out).unwrap()))
}

/// A disk of a genuine volume, exported over NBD, is what `dissect.vmfs` reads: everywhere that data is, around it, at
/// both ends and at a thousand other places.
fn export(volume: &str, name: &str, bytes: u64, data_at: u64) {
    let Some(image) = genuine::path(volume) else { return };
    let place = Place::new("genuine-nbd");
    let descriptor = format!("/{name}.vmdk");
    let seen = lane::block_on(served(&image, &descriptor, &place.dir().join("sock")));
    assert_eq!(seen.bytes, bytes);
    // The image is sparse, so of a block of the file only what was written there may be told as data.
    let in_blocks = |(at, length): &(u64, u64)| at / MIB..(at + length).div_ceil(MIB);
    let with_data: BTreeSet<u64> = seen.data.iter().flat_map(in_blocks).collect();
    assert_eq!(with_data, BTreeSet::from([data_at / MIB]), "one block of data");
    assert_eq!(seen.data[0].0, data_at);
    let start = seen.ranges.iter().zip(&seen.content).find(|((at, _), _)| *at == data_at - MIB).unwrap().1;
    assert!(start[MIB as usize..][..512].iter().all(|b| *b == 0x42), "what was written there");

    let file = format!("/{name}-flat.vmdk");
    let Some((length, blocks, theirs)) = dissected(&image, &file, &seen.ranges, &place) else { return };
    assert_eq!((length, blocks), (bytes, with_data.len() as u64));
    let mut rest = theirs.as_slice();
    for ((at, length), ours) in seen.ranges.iter().zip(&seen.content) {
        let (piece, after) = rest.split_at(*length as usize);
        assert!(piece == ours.as_slice(), "{volume} {name}: {length} bytes at {at} differ");
        rest = after;
    }
    assert!(rest.is_empty());
}

#[test]
fn the_69_gib_disk_of_vmfs5_over_nbd_is_what_dissect_reads() {
    export("vmfs/vmfs5", "normal", 69 << 30, 42 << 30);
}

#[test]
fn the_42_tib_disk_of_vmfs5_over_nbd_is_what_dissect_reads() {
    export("vmfs/vmfs5", "large", 42 << 40, 117 << 30);
}

#[test]
fn the_69_gib_disk_of_vmfs6_over_nbd_is_what_dissect_reads() {
    export("vmfs/vmfs6", "normal", 69 << 30, 42 << 30);
}

#[test]
fn the_42_tib_disk_of_vmfs6_over_nbd_is_what_dissect_reads() {
    export("vmfs/vmfs6", "large", 42 << 40, 117 << 30);
}

/// The mapping is read as ESXi wrote it; its LUN is not here, and is named.
#[test]
fn the_mapping_of_esxi_names_its_lun() {
    for volume in ["vmfs/vmfs5", "vmfs/vmfs6"] {
        let Some(image) = genuine::path(volume) else { return };
        lane::block_on(async {
            let folder: Rc<dyn Folder> = open(&image).await;
            let error = VmDisk::open(folder, "/rdm.vmdk", Open::READ, &()).await.err().unwrap();
            assert!(error.to_string().contains("QM00015"), "{error}");
        });
    }
}
