//! The same files through QEMU's eyes: chains of ours are read, checked, converted and written by its tools.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;
use crate::descriptor::{Access, Cid, CreateType, Descriptor, ExtentKind, ExtentLine, NewDescriptor};

/// A directory of its own, gone at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kagami-redo-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn installed() -> bool {
    if Command::new("qemu-img").arg("--version").output().is_ok() {
        return true;
    }
    assert!(std::env::var("CI").is_err(), "qemu-img is missing");
    eprintln!("SKIPPED: qemu-img is not installed");
    false
}

fn run(program: &str, arguments: &[&str], file: &[&Path]) -> String {
    let output = Command::new(program).args(arguments).args(file).output().unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}

fn descriptor(name: &str, sectors: u64, parent: Option<(Cid, String)>) -> Vec<u8> {
    let (create_type, kind) = match parent {
        Some(_) => (CreateType::VmfsSparse, ExtentKind::VmfsSparse),
        None => (CreateType::Vmfs, ExtentKind::Vmfs),
    };
    let extent = ExtentLine { access: Access::ReadWrite, sectors, kind, file: name.to_owned(), offset: 0 };
    let new =
        NewDescriptor { cid: Cid(0x1111_2222), parent, create_type, extents: vec![extent], ddb: vec![] };
    Descriptor::new(&new).unwrap().to_bytes()
}

async fn host_file(path: &Path, sectors: u64) -> Rc<media::FileDisk> {
    match path.exists() {
        true => media::open(path, media::Options::default()).await.unwrap(),
        false => media::create(path, sectors, media::Options::default()).await.unwrap(),
    }
}

/// A base and a redo log over it, written through ours; answers what the disk holds.
async fn chain(folder: &Folder, sectors: u64, grain: u64, seed: u64) -> Vec<u8> {
    let (mut expected, _) = random_disk(sectors, seed);
    std::fs::write(folder.path("d-flat.vmdk"), &expected).unwrap();
    std::fs::write(folder.path("d.vmdk"), descriptor("d-flat.vmdk", sectors, None)).unwrap();
    let parent = Some((Cid(0x1111_2222), "d.vmdk".to_owned()));
    let child = descriptor("d-000001-delta.vmdk", sectors, parent);
    std::fs::write(folder.path("d-000001.vmdk"), child).unwrap();
    let below = host_file(&folder.path("d-flat.vmdk"), sectors).await;
    let file = host_file(&folder.path("d-000001-delta.vmdk"), 0).await;
    RedoDisk::create(&*file, sectors, grain).await.unwrap();
    let disk = RedoDisk::open(file, below, false, false).await.unwrap();
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..200 {
        let count = random.u64(1..=16);
        let at = random.u64(0..=sectors - count);
        let bytes = vec![random.u8(..); count as usize * UNIT];
        write(&*disk, at, &bytes).await;
        expected[at as usize * UNIT..][..bytes.len()].copy_from_slice(&bytes);
    }
    disk.close().await.unwrap();
    expected
}

#[test]
fn qemu_img_reads_checks_and_converts_our_chain() {
    if !installed() {
        return;
    }
    for (grain, sectors) in [(1u64, 20_000u64), (8, 20_000), (128, 20_001)] {
        let folder = Folder::new(&format!("read{grain}"));
        let expected = lane::block_on(chain(&folder, sectors, grain, grain));
        std::fs::write(folder.path("raw"), &expected).unwrap();
        let child = folder.path("d-000001.vmdk");
        let text = run("qemu-img", &["check", "-f", "vmdk"], &[&child]);
        assert!(text.contains("No errors"), "{text}");
        let compare = ["compare", "-f", "vmdk", "-F", "raw"];
        assert!(run("qemu-img", &compare, &[&child, &folder.path("raw")]).contains("identical"));
        run("qemu-img", &["convert", "-f", "vmdk", "-O", "raw"], &[&child, &folder.path("out")]);
        assert!(std::fs::read(folder.path("out")).unwrap() == expected, "grain {grain}");
        let info = run("qemu-img", &["info", "--backing-chain"], &[&child]);
        assert!(info.contains("vmfsSparse") && info.contains("d.vmdk"), "{info}");
    }
}

/// QEMU cannot make a COWD file, but it writes into one.
#[test]
fn what_qemu_io_writes_into_our_redo_reads_back_here() {
    if !installed() {
        return;
    }
    let folder = Folder::new("write");
    let sectors = 20_000;
    let mut expected = lane::block_on(chain(&folder, sectors, 1, 77));
    for (byte, at, count) in [(0x5au8, 3u64, 9u64), (0x5b, 12_000, 300), (0x5c, 19_990, 10)] {
        let command = format!("write -P {byte} {} {}", at * 512, count * 512);
        run("qemu-io", &["-f", "vmdk", "-c", &command], &[&folder.path("d-000001.vmdk")]);
        expected[at as usize * UNIT..][..count as usize * UNIT].fill(byte);
    }
    lane::block_on(async {
        let below = host_file(&folder.path("d-flat.vmdk"), 0).await;
        let file = host_file(&folder.path("d-000001-delta.vmdk"), 0).await;
        let disk = RedoDisk::open(Rc::clone(&file) as _, below.clone(), false, false).await.unwrap();
        assert!(read(&*disk, 0, sectors).await == expected);
        // QEMU does not keep the hint: ours looks where the tables end, and never writes over QEMU's grains.
        write(&*disk, 5, &vec![0x11; 700 * UNIT]).await;
        expected[5 * UNIT..705 * UNIT].fill(0x11);
        disk.close().await.unwrap();
        assert!(read(&*disk, 0, sectors).await == expected);
    });
    let text = run("qemu-img", &["check", "-f", "vmdk"], &[&folder.path("d-000001.vmdk")]);
    assert!(text.contains("No errors"), "{text}");
}
