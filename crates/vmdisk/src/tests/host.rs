//! Chains in a directory of the host, made by us and read by QEMU, and the other way round.

use std::path::PathBuf;
use std::process::Command;

use super::*;
use crate::{HostFolder, create};

struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kagami-host-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
    fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn qemu_img(arguments: &[&str]) -> Option<String> {
    let output = match Command::new("qemu-img").args(arguments).output() {
        Ok(output) => output,
        Err(_) => {
            assert!(std::env::var("CI").is_err(), "qemu-img is missing");
            eprintln!("SKIPPED: qemu-img is not installed");
            return None;
        }
    };
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {text}");
    Some(text)
}

#[test]
fn a_chain_of_three_in_a_directory_is_read_by_qemu() {
    let place = Place::new("chain");
    const SECTORS: u64 = 70_000;
    let mut expected = vec![0u8; SECTORS as usize * UNIT];
    lane::block_on(async {
        let folder: Rc<dyn Folder> = HostFolder::new(place.0.clone());
        create::create_flat(&folder, "/d.vmdk", SECTORS, Provision::Thin).await.unwrap();
        let disk = VmDisk::open(Rc::clone(&folder), "/d.vmdk", Open::WRITE, &()).await.unwrap();
        let mut random = fastrand::Rng::with_seed(8);
        for round in 0..3 {
            for _ in 0..100 {
                let bytes = vec![random.u8(..); random.usize(1..30) * UNIT];
                let at = random.u64(0..SECTORS - 30);
                write(&*disk, at, &bytes).await;
                expected[at as usize * UNIT..][..bytes.len()].copy_from_slice(&bytes);
            }
            if round < 2 {
                switch(&disk).await;
            }
        }
        disk.close().await.unwrap();
    });
    std::fs::write(place.file("raw"), &expected).unwrap();
    let top = place.file("d-000002.vmdk");
    let Some(info) = qemu_img(&["info", "--backing-chain", &top]) else { return };
    assert!(info.contains("d-000001.vmdk") && info.contains("d.vmdk"), "{info}");
    assert!(qemu_img(&["check", "-f", "vmdk", &top]).unwrap().contains("No errors"));
    let same = qemu_img(&["compare", "-f", "vmdk", "-F", "raw", &top, &place.file("raw")]).unwrap();
    assert!(same.contains("identical"), "{same}");
    // Folded back, the base alone is the disk.
    lane::block_on(async {
        let folder: Rc<dyn Folder> = HostFolder::new(place.0.clone());
        let disk = VmDisk::open(folder, "/d-000002.vmdk", Open::WRITE, &()).await.unwrap();
        let commit = disk.start_commit(0).await.unwrap();
        commit.copy(&mut |_| true).await.unwrap();
        let left = commit.flip(async || Ok(())).await.unwrap();
        left.remove().await.unwrap();
        disk.close().await.unwrap();
    });
    assert!(!std::path::Path::new(&top).exists());
    let base = place.file("d.vmdk");
    let same = qemu_img(&["compare", "-f", "vmdk", "-F", "raw", &base, &place.file("raw")]).unwrap();
    assert!(same.contains("identical"), "{same}");
}

#[test]
fn flat_disks_that_qemu_makes_open_here_and_other_kinds_are_named() {
    let place = Place::new("foreign");
    let (flat, sparse) = (place.file("flat.vmdk"), place.file("sparse.vmdk"));
    let how = "subformat=monolithicFlat";
    if qemu_img(&["create", "-f", "vmdk", "-o", how, &flat, "10M"]).is_none() {
        return;
    }
    std::fs::write(place.file("raw"), vec![0x3c; 10 << 20]).unwrap();
    qemu_img(&["convert", "-n", "-f", "raw", "-O", "vmdk", &place.file("raw"), &flat]);
    qemu_img(&["create", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", &sparse, "5G"]);
    lane::block_on(async {
        let (folder, path) = HostFolder::of(std::path::Path::new(&flat)).unwrap();
        let disk = VmDisk::open(folder.clone(), &path, Open::READ, &()).await.unwrap();
        assert_eq!(disk.shape().bytes(), 10 << 20);
        assert!(read(&*disk, 0, 20480).await.iter().all(|b| *b == 0x3c));
        let refused = VmDisk::open(folder.clone(), "/sparse.vmdk", Open::READ, &()).await.err().unwrap();
        assert!(matches!(&refused, crate::ChainError::Unsupported { .. }), "{refused}");
        let missing = VmDisk::open(folder, "/no.vmdk", Open::READ, &()).await.err().unwrap();
        assert!(matches!(&missing, crate::ChainError::Missing { .. }), "{missing}");
    });
}
