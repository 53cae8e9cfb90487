//! What we write is read by programs that are not ours: contents, names, mappings, bitmaps.

#![allow(clippy::unwrap_used)] // a test that cannot go on panics

mod common;

use std::rc::Rc;

use block::MemoryDisk;
use common::datastore::{GIB, MIB, fresh, open, write};
use common::outside::{Image, debugvmfs, dissect, run};
use vmfs::format::RdmRecord;
use vmfs::{File, Layout, NewFile, Rdm, Volume};

/// Content that differs from sector to sector.
fn pattern(bytes: usize, seed: u8) -> Vec<u8> {
    (0..bytes).map(|i| ((i / 512) as u8).wrapping_mul(7).wrapping_add(i as u8 ^ seed)).collect()
}

async fn thin(volume: &Volume, path: &str, length: u64) -> File {
    let new = NewFile { length, layout: Layout::Thin, grows_to: 0 };
    volume.create_file(path, new).await.unwrap()
}

/// Files without those kinds that `fsck.vmfs` cannot count (resident, to be zeroed, two levels of pointer blocks).
async fn populate(volume: &Volume) {
    volume.make_directory("vm").await.unwrap();
    volume.make_directory("vm/deep").await.unwrap();
    volume.write_file("vm/sub", &pattern(5000, 1)).await.unwrap();
    volume.write_file("vm/deep/block", &pattern(3 << 20, 2)).await.unwrap();
    for n in 0..100 {
        volume.write_file(&format!("vm/deep/n{n}"), &pattern(1100 + n, n as u8)).await.unwrap();
    }
    for n in (0..100).step_by(3) {
        volume.remove(&format!("vm/deep/n{n}")).await.unwrap();
    }
    volume.rename("vm/deep/n1", "vm/moved").await.unwrap();
    volume.rename("vm/deep/n2", "vm/deep/n4").await.unwrap();
    volume.make_symlink("link", "/vmfs/volumes/ours/vm/sub").await.unwrap();
    let file = thin(volume, "vm/thin-flat.vmdk", 69 * GIB).await;
    write(volume, &file, 42 * GIB / 512 + 8, &pattern(1 << 20, 3)).await;
    write(volume, &file, 7, &pattern(512, 4)).await;
    let grown = thin(volume, "vm/grown", 100 * MIB).await;
    write(volume, &grown, 0, &pattern(4096, 5)).await;
    grown.set_length(2 * GIB).await.unwrap();
    write(volume, &grown, 1900 * MIB / 512, &pattern(4096, 6)).await;
    let record = RdmRecord::naa(*b"\x60\x24\xb4\x70123456789abc", b"KAGAMI");
    let rdm = Rdm { record, length: 500 * GIB, tail: vec![7; 200] };
    volume.create_rdm("vm/d-rdm.vmdk", &rdm).await.unwrap();
    volume.settle().await.unwrap();
}

async fn populated(full: bool) -> Rc<MemoryDisk> {
    let disk = fresh(GIB).await;
    let volume = open(disk.clone()).await;
    populate(&volume).await;
    if full {
        volume.write_file("vm/resident", &pattern(700, 8)).await.unwrap();
        let large = thin(&volume, "vm/large-flat.vmdk", 42 << 40).await;
        write(&volume, &large, 117 * GIB / 512, &pattern(2048, 9)).await;
        let new = NewFile { length: 20 * MIB, layout: Layout::LazyZeroed, grows_to: 0 };
        let lazy = volume.create_file("vm/lazy-flat.vmdk", new).await.unwrap();
        write(&volume, &lazy, 9 * 2048 + 1, &pattern(512, 10)).await;
        volume.settle().await.unwrap();
    }
    disk
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn dissect_reads_what_we_wrote() {
    let disk = lane::block_on(populated(true));
    let image = Image::of(&disk, "dissect-written");
    let script = r#"
def show(path, at, count):
    f = vmfs.get(path).open()
    f.seek(at)
    print(path, at, f.read(count).hex())
show('/vm/sub', 0, 5000)
show('/vm/deep/block', 1000000, 3000)
show('/vm/moved', 0, 2000)
show('/vm/deep/n4', 0, 2000)
show('/vm/resident', 0, 2000)
show('/vm/thin-flat.vmdk', 42 * 2**30 + 4096 - 512, 2048)
show('/vm/thin-flat.vmdk', 7 * 512 - 10, 600)
show('/vm/grown', 1900 * 2**20, 4100)
show('/vm/grown', 0, 4100)
show('/vm/large-flat.vmdk', 117 * 2**30 - 5, 2100)
show('/vm/lazy-flat.vmdk', (9 * 2048 + 1) * 512 - 20, 600)
print(sorted(e.name for e in vmfs.get('/vm/deep').iterdir()))
print(vmfs.get('/link').link)
print(vmfs.get('/vm/d-rdm.vmdk').size, vmfs.get('/vm/large-flat.vmdk').size)
"#;
    let Some(out) = dissect(&image, script) else { return };
    let lines: Vec<&str> = out.lines().collect();
    let expect = |line: usize, path: &str, at: u64, content: &[u8]| {
        assert_eq!(lines[line], format!("{path} {at} {}", hex(content)), "line {line}");
    };
    let zero = |n: usize| vec![0; n];
    expect(0, "/vm/sub", 0, &pattern(5000, 1));
    expect(1, "/vm/deep/block", 1_000_000, &pattern(3 << 20, 2)[1_000_000..1_003_000]);
    expect(2, "/vm/moved", 0, &pattern(1101, 1));
    expect(3, "/vm/deep/n4", 0, &pattern(1102, 2));
    expect(4, "/vm/resident", 0, &pattern(700, 8));
    let there = pattern(1 << 20, 3);
    expect(5, "/vm/thin-flat.vmdk", 42 * GIB + 4096 - 512, &[zero(512), there[..1536].to_vec()].concat());
    expect(6, "/vm/thin-flat.vmdk", 3574, &[zero(10), pattern(512, 4), zero(78)].concat());
    expect(7, "/vm/grown", 1900 * MIB, &[pattern(4096, 6), zero(4)].concat());
    expect(8, "/vm/grown", 0, &[pattern(4096, 5), zero(4)].concat());
    expect(9, "/vm/large-flat.vmdk", 117 * GIB - 5, &[zero(5), pattern(2048, 9), zero(47)].concat());
    expect(
        10,
        "/vm/lazy-flat.vmdk",
        (9 * 2048 + 1) * 512 - 20,
        &[zero(20), pattern(512, 10), zero(68)].concat(),
    );
    let mut names: Vec<String> =
        (0..100).filter(|n| n % 3 != 0 && *n != 1 && *n != 2).map(|n| format!("'n{n}'")).collect();
    names.extend(["'.'", "'..'", "'block'"].map(String::from));
    names.sort();
    assert_eq!(lines[11], format!("[{}]", names.join(", ")));
    assert_eq!(lines[12], "/vmfs/volumes/ours/vm/sub");
    assert_eq!(lines[13], format!("{} {}", 500 * GIB, 42u64 << 40));
}

#[test]
fn vmfs_tools_read_and_check_what_we_wrote() {
    let disk = lane::block_on(populated(false));
    let image = Image::of(&disk, "tools-written");
    let Some(bitmaps) = debugvmfs(&image, &["check_vol_bitmaps"]) else { return };
    assert!(bitmaps.contains("Total errors: 0"), "{bitmaps}");
    let list = debugvmfs(&image, &["ls", "/vm"]).unwrap();
    for name in ["deep", "sub", "moved", "thin-flat.vmdk", "grown", "d-rdm.vmdk"] {
        assert!(list.split_whitespace().any(|n| n == name), "{name}: {list}");
    }
    let Some((fine, text)) = run("fsck.vmfs", &[image.0.to_str().unwrap()]) else { return };
    assert!(fine, "{text}");
    for counter in
        ["Unallocated blocks", "Lost blocks", "Undefined inodes", "Orphaned inodes", "Directory errors"]
    {
        let line = text.lines().find(|l| l.contains(counter)).unwrap_or_else(|| panic!("{counter}: {text}"));
        assert!(line.ends_with(": 0"), "{text}");
    }
    let path = image.0.to_str().unwrap();
    let cat = |file: &str| {
        let out =
            std::process::Command::new("/usr/sbin/debugvmfs").args([path, "cat", file]).output().unwrap();
        assert!(out.status.success(), "{file}");
        out.stdout
    };
    assert!(cat("/vm/sub") == pattern(5000, 1));
    assert!(cat("/vm/deep/block") == pattern(3 << 20, 2));
    assert!(cat("/vm/deep/n4") == pattern(1102, 2));
    let grown = cat("/vm/grown");
    assert_eq!(grown.len() as u64, 2 * GIB);
    assert!(
        grown[..4096] == pattern(4096, 5) && grown[(1900 << 20)..(1900 << 20) + 4096] == pattern(4096, 6)
    );
    assert!(grown[4096..1900 << 20].iter().all(|b| *b == 0));
}

/// A mount of `vmfs-fuse`, taken down when dropped.
struct Mount(std::path::PathBuf);

impl Mount {
    /// None (and a loud line) where `vmfs-fuse` or FUSE itself is missing.
    fn of(image: &Image) -> Option<Self> {
        let at = image.0.with_extension("mount");
        std::fs::create_dir_all(&at).unwrap();
        let mount = Self(at);
        let (fine, text) = run("vmfs-fuse", &[image.0.to_str().unwrap(), mount.0.to_str().unwrap()])?;
        if !fine && !std::path::Path::new("/dev/fuse").exists() {
            common::outside::skip("vmfs-fuse", "there is no /dev/fuse");
            return None;
        }
        assert!(fine, "vmfs-fuse: {text}");
        Some(mount)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Root may unmount it; others need FUSE's own program.
        let gone = |program: &str, lazy: &[&str]| {
            let command = std::process::Command::new(program).args(lazy).arg(&self.0).status();
            command.is_ok_and(|status| status.success())
        };
        let _ = gone("umount", &["-l"]) || gone("fusermount", &["-u", "-z"]);
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// As a mounted file system: names, sizes, links and contents by the system's own calls.
#[test]
fn vmfs_fuse_mounts_what_we_wrote() {
    use std::os::unix::fs::FileExt;
    let disk = lane::block_on(populated(false));
    let image = Image::of(&disk, "fuse-written");
    let Some(mount) = Mount::of(&image) else { return };
    let at = |path: &str| mount.0.join(path);
    assert!(std::fs::read(at("vm/sub")).unwrap() == pattern(5000, 1));
    assert!(std::fs::read(at("vm/deep/block")).unwrap() == pattern(3 << 20, 2));
    assert!(std::fs::read(at("vm/moved")).unwrap() == pattern(1101, 1));
    assert!(std::fs::read(at("vm/deep/n4")).unwrap() == pattern(1102, 2));
    let thin = std::fs::File::open(at("vm/thin-flat.vmdk")).unwrap();
    assert_eq!(thin.metadata().unwrap().len(), 69 * GIB);
    let mut found = vec![0; 1 << 20];
    thin.read_exact_at(&mut found, 42 * GIB + 4096).unwrap();
    assert!(found == pattern(1 << 20, 3));
    thin.read_exact_at(&mut found, 41 * GIB).unwrap();
    assert!(found.iter().all(|b| *b == 0));
    let mut names: Vec<String> = (std::fs::read_dir(at("vm/deep")).unwrap())
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let mut expected: Vec<String> =
        (0..100).filter(|n| n % 3 != 0 && *n != 1 && *n != 2).map(|n| format!("n{n}")).collect();
    expected.push("block".into());
    expected.sort();
    assert_eq!(names, expected);
    assert_eq!(std::fs::read_link(at("link")).unwrap().to_str(), Some("/vmfs/volumes/ours/vm/sub"));
}
