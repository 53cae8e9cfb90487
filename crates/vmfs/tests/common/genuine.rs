//! Genuine volumes, made by ESXi: the images that the sdist of `dissect.vmfs` carries as its own test data.
//!
//! They are fetched at test time and never enter this tree (their licence is not ours). The archive is pinned by
//! hash; images are unpacked once, sparsely, under the target directory. Offline the tests that want them say so
//! loudly and pass; with `CI` set that is a failure.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::rc::Rc;

use block::{Disk, MemoryDisk, Safe, Sector, Segments};

const ARCHIVE: &str = "dissect_vmfs-3.13.tar.gz";
const PIN: &str =
    "dissect.vmfs==3.13 --hash=sha256:904a4116b944acfc6a7a9de013ae1db14c760cb76138fd77c6a5b510b98c828d\n";
/// Unpacking granularity: pieces of zeroes of this length stay holes.
const PIECE: usize = 64 * 1024;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("genuine")
}

/// The unpacked image, e.g. `vmfs/vmfs5` or `lvm/span/lvm5-span-0`. `None` (and a loud line) when it cannot be had.
pub fn path(name: &str) -> Option<PathBuf> {
    match fetch(name) {
        Ok(path) => Some(path),
        Err(why) => {
            assert!(std::env::var_os("CI").is_none(), "genuine image {name} is needed in CI: {why}");
            eprintln!("SKIPPED: no genuine image {name}: {why}");
            None
        }
    }
}

/// The image as a disk in memory of its own: tests may change it.
pub fn disk(name: &str) -> Option<Rc<MemoryDisk>> {
    Some(load(&path(name)?))
}

/// Loads a sparse file into memory, data only.
pub fn load(path: &Path) -> Rc<MemoryDisk> {
    let file = File::open(path).unwrap();
    let length = file.metadata().unwrap().len();
    let disk = MemoryDisk::new(length / 512);
    each_data(&file, length, |at, bytes| {
        if bytes.iter().any(|b| *b != 0) {
            let from = Segments::new(bytes);
            super::at_once(async { disk.write(Sector(at / 512), &from, Safe::AtNextFlush).await.unwrap() });
        }
    });
    Rc::new(disk)
}

/// Writes a disk's data into a sparse file, for programs that read files.
pub fn store(disk: &MemoryDisk, path: &Path) {
    let shape = disk.shape();
    let file = File::create(path).unwrap();
    file.set_len(shape.bytes()).unwrap();
    let mut at = 0;
    let mut extents = block::Extents::with_limit(1024);
    let mut bytes = Vec::new();
    while at < shape.sectors {
        extents.clear();
        super::at_once(async {
            disk.status(Sector(at), (shape.sectors - at).min(1 << 24), None, &mut extents).await.unwrap()
        });
        for extent in extents.iter().filter(|e| e.kind == block::Kind::Data) {
            bytes.resize((extent.count * 512) as usize, 0);
            let into = block::SegmentsMut::new(&mut bytes);
            super::at_once(async { disk.read(extent.at, &into).await.unwrap() });
            file.write_all_at(&bytes, extent.at.bytes()).unwrap();
        }
        at = extents.end().unwrap().0;
    }
}

/// A device of 64 TiB with the tables of a genuine volume of LVM 5 or 6 (`lvm/huge/lvm5`), which the archive carries
/// as pieces of text: offset, hexadecimal bytes.
pub fn huge(name: &str) -> Option<Rc<MemoryDisk>> {
    let member = format!("dissect_vmfs-3.13/tests/_data/{name}.csv.gz");
    let lines = match download(&folder()).and_then(|()| unpack_text(&member)) {
        Ok(text) => text,
        Err(why) => {
            assert!(std::env::var_os("CI").is_none(), "genuine tables {name} are needed in CI: {why}");
            eprintln!("SKIPPED: no genuine tables {name}: {why}");
            return None;
        }
    };
    let mut pieces: Vec<(u64, Vec<u8>)> = Vec::new();
    for line in lines.lines() {
        let (at, hex) = line.split_once(',').unwrap();
        let digits = hex.trim().as_bytes().chunks_exact(2);
        let bytes = digits.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap());
        pieces.push((at.parse().unwrap(), bytes.collect()));
    }
    let header = pieces.iter().find(|(at, _)| *at == 0x10_0000).unwrap();
    let device_bytes = u64::from_le_bytes(header.1[0x5E..0x66].try_into().unwrap());
    let disk = MemoryDisk::new(device_bytes / 512);
    for (at, bytes) in pieces {
        let whole = &bytes[..bytes.len() & !511];
        let from = Segments::new(whole);
        super::at_once(async { disk.write(Sector::at_byte(at), &from, Safe::AtNextFlush).await.unwrap() });
    }
    Some(Rc::new(disk))
}

fn unpack_text(member: &str) -> io::Result<String> {
    let archive = folder().join(ARCHIVE);
    let mut tar = Command::new("tar").arg("-xzOf").arg(archive).arg(member).stdout(Stdio::piped()).spawn()?;
    let packed = tar.stdout.take().ok_or_else(|| io::Error::other("tar without output"))?;
    let out = Command::new("gzip").arg("-dc").stdin(packed).output()?;
    if !tar.wait()?.success() || !out.status.success() {
        return Err(io::Error::other(format!("cannot unpack {member}")));
    }
    String::from_utf8(out.stdout).map_err(io::Error::other)
}

fn each_data(file: &File, length: u64, mut each: impl FnMut(u64, &[u8])) {
    let mut bytes = vec![0; PIECE];
    let mut at = 0;
    while let Ok(data) = rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
        let hole = rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(data)).unwrap();
        at = data & !511;
        let end = hole.next_multiple_of(512).min(length);
        while at < end {
            let count = PIECE.min((end - at) as usize);
            file.read_exact_at(&mut bytes[..count], at).unwrap();
            each(at, &bytes[..count]);
            at += count as u64;
        }
    }
}

fn fetch(name: &str) -> io::Result<PathBuf> {
    let folder = folder();
    let image = folder.join(format!("{}.bin", name.replace('/', "-")));
    if image.exists() {
        return Ok(image);
    }
    fs::create_dir_all(&folder)?;
    // Several test processes may come here together.
    let lock = File::create(folder.join("lock"))?;
    lock.lock()?;
    if !image.exists() {
        download(&folder)?;
        unpack(&folder, name, &image)?;
    }
    Ok(image)
}

fn download(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    if folder.join(ARCHIVE).exists() {
        return Ok(());
    }
    let pins = folder.join("requirements.txt");
    fs::write(&pins, PIN)?;
    let out = Command::new("python3")
        .args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"])
        .args(["--no-binary", ":all:", "--require-hashes", "-r"])
        .arg(&pins)
        .arg("-d")
        .arg(folder)
        .output()?;
    if !out.status.success() {
        return Err(io::Error::other(format!("pip: {}", String::from_utf8_lossy(&out.stderr).trim())));
    }
    Ok(())
}

fn unpack(folder: &Path, name: &str, image: &Path) -> io::Result<()> {
    let mut tar = Command::new("tar")
        .arg("-xzOf")
        .arg(folder.join(ARCHIVE))
        .arg(format!("dissect_vmfs-3.13/tests/_data/{name}.bin.gz"))
        .stdout(Stdio::piped())
        .spawn()?;
    let packed = tar.stdout.take().ok_or_else(|| io::Error::other("tar without output"))?;
    let mut gzip = Command::new("gzip").arg("-dc").stdin(packed).stdout(Stdio::piped()).spawn()?;
    let mut plain = gzip.stdout.take().ok_or_else(|| io::Error::other("gzip without output"))?;

    let half = image.with_extension("part");
    let mut file = File::create(&half)?;
    let (mut piece, mut length) = (vec![0; PIECE], 0u64);
    loop {
        let mut filled = 0;
        while filled < PIECE {
            match plain.read(&mut piece[filled..])? {
                0 => break,
                count => filled += count,
            }
        }
        if filled == 0 {
            break;
        }
        if piece[..filled].iter().any(|b| *b != 0) {
            file.seek(SeekFrom::Start(length))?;
            file.write_all(&piece[..filled])?;
        }
        length += filled as u64;
    }
    file.set_len(length)?;
    if !tar.wait()?.success() || !gzip.wait()?.success() || length == 0 {
        return Err(io::Error::other(format!("cannot unpack {name}")));
    }
    fs::rename(half, image)
}
