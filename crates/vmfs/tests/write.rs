//! Writing VMFS-5: what is written is there, the checker finds nothing, and it is there when opened again.

#![allow(clippy::unwrap_used)] // a test that cannot go on panics

mod common;

use std::rc::Rc;

use block::{Disk, Sector};
use common::datastore::{GIB, MIB, assert_clean, check, fresh, open, read, write};
use vmfs::format::{InodeKind, RdmRecord, Zla};
use vmfs::{Content, Error, Layout, Mode, NewFile, Rdm, Volume};

fn thin(length: u64) -> NewFile {
    NewFile { length, layout: Layout::Thin, grows_to: 0 }
}

#[test]
fn files_of_every_kind_are_written_and_read_back() {
    lane::block_on(async {
        let disk = fresh(GIB).await;
        let volume = open(disk.clone()).await;
        volume.make_directory("vm").await.unwrap();
        let contents: Vec<(&str, Vec<u8>, Zla)> = vec![
            ("vm/empty", vec![], Zla::Resident),
            ("vm/resident", vec![1; 1024], Zla::Resident),
            ("vm/sub", vec![2; 1025], Zla::SubBlocks),
            ("vm/sub-full", vec![3; 8192], Zla::SubBlocks),
            ("vm/block", vec![4; 8193], Zla::FileBlocks),
            ("vm/blocks", (0..3 * MIB + 77).map(|i| (i / 4096) as u8).collect(), Zla::FileBlocks),
        ];
        for (path, content, _) in &contents {
            volume.write_file(path, content).await.unwrap();
        }
        volume.make_symlink("link", "/vmfs/volumes/ours/vm/resident").await.unwrap();
        let file = volume.create_file("vm/thin-flat.vmdk", thin(69 * GIB)).await.unwrap();
        write(&volume, &file, 42 * GIB / 512 + 3, &[0x42; 1024]).await;
        file.flush().await.unwrap();
        let large = volume.create_file("vm/large-flat.vmdk", thin(42 << 40)).await.unwrap();
        write(&volume, &large, 117 * GIB / 512, &[0x43; 512]).await;
        volume.settle().await.unwrap();
        drop((file, large));
        assert_clean(disk.clone()).await;

        let volume = Volume::open(vec![disk.clone()], Mode::Read).await.unwrap();
        for (path, content, zla) in &contents {
            assert_eq!(&volume.read_file(path, 8 * MIB).await.unwrap(), content, "{path}");
            assert_eq!(volume.entry(path).await.unwrap().zla, *zla, "{path}");
        }
        assert_eq!(volume.read_file("link", 4096).await.unwrap(), vec![1; 1024]);
        let file = volume.open_file("vm/thin-flat.vmdk").await.unwrap();
        let back = read(&volume, &file, 42 * GIB / 512 + 2, 4).await;
        assert_eq!(back, [vec![0; 512], vec![0x42; 1024], vec![0; 512]].concat());
        assert_eq!(
            (file.units_allocated(), volume.entry("vm/thin-flat.vmdk").await.unwrap().zla),
            (1, Zla::Single)
        );
        let large = volume.entry("vm/large-flat.vmdk").await.unwrap();
        assert_eq!((large.zla, large.blocks, large.length), (Zla::Double, 1, 42 << 40));
    });
}

#[test]
fn names_change_and_space_comes_back() {
    lane::block_on(async {
        let disk = fresh(GIB).await;
        let volume = open(disk.clone()).await;
        volume.settle().await.unwrap();
        let before = volume.free().await.unwrap();
        volume.make_directory("a").await.unwrap();
        volume.make_directory("b").await.unwrap();
        for n in 0..150 {
            volume.write_file(&format!("a/file{n}"), format!("content {n}").as_bytes()).await.unwrap();
        }
        assert_eq!(volume.list("a").await.unwrap().len(), 150);
        volume.write_file("a/file7", b"new content").await.unwrap();
        volume.rename("a/file8", "a/file9").await.unwrap();
        volume.rename("a/file10", "b/moved").await.unwrap();
        volume.rename("a/file11", "b/moved").await.unwrap();
        volume.rename("b", "c").await.unwrap();
        assert_eq!(volume.read_file("a/file7", 99).await.unwrap(), b"new content");
        assert_eq!(volume.read_file("a/file9", 99).await.unwrap(), b"content 8");
        assert_eq!(volume.read_file("c/moved", 99).await.unwrap(), b"content 11");
        assert!(matches!(volume.entry("a/file8").await, Err(Error::NotFound { .. })));
        assert_eq!(volume.entry("c/moved").await.unwrap().links, 1);
        assert!(matches!(volume.remove("c").await, Err(Error::NotEmpty { .. })));
        assert!(matches!(volume.remove(".fbb.sf").await, Err(Error::Unsupported(_))));
        assert!(matches!(volume.make_directory("a/file7/x").await, Err(Error::WrongKind { .. })));
        volume.settle().await.unwrap();
        assert_clean(disk.clone()).await;

        let names: Vec<String> = volume.list("a").await.unwrap().into_iter().map(|e| e.name).collect();
        for name in names {
            volume.remove(&format!("a/{name}")).await.unwrap();
        }
        for path in ["a", "c/moved", "c"] {
            volume.remove(path).await.unwrap();
        }
        volume.settle().await.unwrap();
        assert_clean(disk.clone()).await;
        assert_eq!(volume.free().await.unwrap(), before);
        assert!(
            volume
                .list("/")
                .await
                .unwrap()
                .iter()
                .all(|e| e.kind == InodeKind::System || e.name == ".sdd.sf")
        );
    });
}

#[test]
fn thick_files_hold_their_space_and_read_as_zero() {
    lane::block_on(async {
        let disk = fresh(GIB).await;
        let volume = open(disk.clone()).await;
        let before = volume.free().await.unwrap();
        for (layout, tbz) in [(Layout::LazyZeroed, 300), (Layout::EagerZeroed, 0)] {
            // What lies in the blocks from earlier must not show.
            let junk = volume.create_file("junk", thin(320 * MIB)).await.unwrap();
            for mib in 0..320 {
                write(&volume, &junk, mib * 2048, &vec![0xAA; MIB as usize]).await;
            }
            drop(junk);
            volume.remove("junk").await.unwrap();
            let new = NewFile { length: 300 * MIB, layout, grows_to: 0 };
            let file = volume.create_file("thick-flat.vmdk", new).await.unwrap();
            assert_eq!((file.units_allocated(), file.units_to_be_zeroed()), (300, tbz));
            assert_eq!(read(&volume, &file, 100, 5000).await, vec![0; 5000 * 512]);
            write(&volume, &file, 5 * 2048 + 9, &[7; 512 * 2048]).await;
            assert_eq!(file.units_to_be_zeroed(), tbz.saturating_sub(2));
            let back = read(&volume, &file, 5 * 2048, 3 * 2048).await;
            let zero = |n: usize| vec![0; n * 512];
            assert_eq!(back, [zero(9), vec![7; 512 * 2048], zero(2 * 2048 - 9)].concat());
            volume.settle().await.unwrap();
            assert_clean(disk.clone()).await;
            drop(file);
            volume.remove("thick-flat.vmdk").await.unwrap();
            volume.settle().await.unwrap();
            assert_eq!(volume.free().await.unwrap(), before);
        }
        let too_much = NewFile { length: 2 * GIB, layout: Layout::LazyZeroed, grows_to: 0 };
        assert!(matches!(volume.create_file("x", too_much).await, Err(Error::NoSpace { .. })));
        volume.settle().await.unwrap();
        assert_eq!(volume.free().await.unwrap(), before);
        assert_clean(disk.clone()).await;
    });
}

#[test]
fn files_grow_through_every_block_array_and_shrink() {
    lane::block_on(async {
        let disk = fresh(GIB).await;
        let volume = open(disk.clone()).await;
        let before = volume.free().await.unwrap();
        volume.make_directory("d").await.unwrap();
        volume.write_file("d/f", b"start").await.unwrap();
        let file = volume.open_file("d/f").await.unwrap();
        let steps = [
            (1000, Zla::Resident),
            (5000, Zla::FileBlocks),
            (200 * MIB, Zla::FileBlocks),
            (300 * MIB, Zla::Single),
            (300 * GIB, Zla::Double),
        ];
        for (length, zla) in steps {
            file.set_length(length).await.unwrap();
            assert_eq!(volume.entry("d/f").await.unwrap().zla, zla, "{length}");
            if length > 5000 {
                write(&volume, &file, length / 512 - 1, &[length as u8 | 1; 512]).await;
            }
            file.flush().await.unwrap();
            let mut head = [0; 8];
            assert_eq!(file.read_bytes(0, &mut head).await.unwrap(), 8);
            assert_eq!(&head, b"start\0\0\0");
        }
        volume.settle().await.unwrap();
        assert_clean(disk.clone()).await;
        assert_eq!(file.units_allocated(), 4);
        file.set_length(300 * MIB - 700).await.unwrap();
        file.set_length(400 * MIB).await.unwrap();
        let tail = read(&volume, &file, (300 * MIB - 1024) / 512, 4).await;
        assert_eq!(tail, vec![0; 2048], "what was cut off does not come back");
        file.set_length(3).await.unwrap();
        volume.settle().await.unwrap();
        assert_eq!(file.units_allocated(), 1);
        assert_clean(disk.clone()).await;
        assert_eq!(volume.read_file("d/f", 99).await.unwrap(), b"sta");
        assert!(matches!(volume.remove("d/f").await, Err(Error::InUse { .. })));
        drop(file);
        volume.remove("d/f").await.unwrap();
        volume.remove("d").await.unwrap();
        volume.settle().await.unwrap();
        assert_eq!(volume.free().await.unwrap(), before);
    });
}

#[test]
fn mappings_keep_record_length_and_identity() {
    lane::block_on(async {
        let disk = fresh(GIB).await;
        let volume = open(disk.clone()).await;
        let naa = *b"\x60\x24\xb4\x70123456789abc";
        let mut rdm =
            Rdm { record: RdmRecord::naa(naa, b"KAGAMI LUN"), length: 500 * GIB, tail: vec![9; 300] };
        volume.create_rdm("d-rdm.vmdk", &rdm).await.unwrap();
        assert!(matches!(volume.create_rdm("d-rdm.vmdk", &rdm).await, Err(Error::Exists { .. })));
        assert_eq!(volume.read_rdm("d-rdm.vmdk").await.unwrap(), rdm);
        rdm.length = 600 * GIB;
        rdm.tail = b"longer".to_vec();
        volume.replace_rdm("d-rdm.vmdk", &rdm).await.unwrap();
        volume.settle().await.unwrap();
        assert_clean(disk.clone()).await;
        let volume = Volume::open(vec![disk], Mode::Read).await.unwrap();
        assert_eq!(volume.read_rdm("/d-rdm.vmdk").await.unwrap(), rdm);
        let entry = volume.entry("d-rdm.vmdk").await.unwrap();
        assert_eq!((entry.kind, entry.zla, entry.length), (InodeKind::Rdm, Zla::None, 600 * GIB));
        let refused = volume.create_rdm("x", &rdm).await;
        assert!(matches!(refused, Err(Error::ReadOnly { .. })));
    });
}

#[test]
fn writers_of_one_block_share_it_and_dropped_allocations_leave_nothing() {
    lane::block_on(async {
        let disk = fresh(GIB).await;
        let volume = open(disk.clone()).await;
        let file = volume.create_file("t-flat.vmdk", thin(GIB)).await.unwrap();
        let before = volume.free().await.unwrap();
        drop(file.allocate(Sector(100), 8000).await.unwrap());
        // An empty pointer block may stay.
        assert_eq!(volume.free().await.unwrap().blocks, before.blocks);
        let tasks: Vec<_> = (0..64u64)
            .map(|n| {
                let (volume, file) = (volume.clone(), file.clone());
                lane::spawn(async move { write(&volume, &file, n * 64, &vec![n as u8; 64 * 512]).await })
            })
            .collect();
        for task in tasks {
            task.await;
        }
        assert_eq!(file.units_allocated(), 2);
        let back = read(&volume, &file, 0, 64 * 64).await;
        assert!(back.chunks(64 * 512).zip(0u8..).all(|(c, n)| c.iter().all(|b| *b == n)));
        let places = file.locate_now(Sector(0), 4096, 9).unwrap().unwrap();
        assert_eq!(places.len(), 1, "contiguous");
        assert!(matches!(places[0].content, Content::Data { .. }));
        volume.settle().await.unwrap();
        assert_clean(disk.clone()).await;
    });
}

#[test]
fn a_full_volume_refuses_and_goes_on_after_deletes() {
    lane::block_on(async {
        let disk = fresh(768 * MIB).await;
        let volume = open(disk.clone()).await;
        let file = volume.create_file("fill", thin(4 * GIB)).await.unwrap();
        let mut mib = 0;
        let error = loop {
            match file.allocate(Sector(mib * 2048), 2048).await {
                Ok(allocation) => allocation.commit().unwrap(),
                Err(error) => break error,
            }
            mib += 1;
        };
        assert!(matches!(error, Error::NoSpace { what: "file blocks" }), "{error}");
        assert_eq!(volume.free().await.unwrap().blocks, 0);
        volume.write_file("small", b"still fits").await.unwrap();
        volume.remove("small").await.unwrap();
        drop(file);
        volume.remove("fill").await.unwrap();
        volume
            .create_file("again", NewFile { length: mib << 20, layout: Layout::LazyZeroed, grows_to: 0 })
            .await
            .unwrap();
        volume.settle().await.unwrap();
        assert_clean(disk.clone()).await;
    });
}

#[test]
fn a_volume_that_another_host_has_open_is_not_written() {
    let Some(disk) = common::genuine::disk("vmfs/vmfs5") else { return };
    lane::block_on(async {
        let devices: Vec<Rc<dyn Disk>> = vec![disk];
        let refused = Volume::open(devices, Mode::Write).await;
        assert!(matches!(refused, Err(Error::ForeignHost { .. })), "{:?}", refused.err());
    });
}

#[test]
fn a_genuine_volume_cleanly_unmounted_is_written() {
    let Some(disk) = common::genuine::disk("vmfs/zero5") else { return };
    lane::block_on(async {
        let volume = open(disk.clone()).await;
        volume.make_directory("ours").await.unwrap();
        volume.write_file("ours/small", b"small").await.unwrap();
        let file = volume.create_file("ours/x-flat.vmdk", thin(400 * GIB)).await.unwrap();
        write(&volume, &file, 300 * GIB / 512, &[1; 4096]).await;
        volume.settle().await.unwrap();
        assert_clean(disk.clone()).await;
        let again = Volume::open(vec![disk], Mode::Read).await.unwrap();
        assert_eq!(again.read_file("ours/small", 9).await.unwrap(), b"small");
    });
}

#[test]
fn a_directory_moves_into_another_but_never_into_itself() {
    lane::block_on(async {
        let disk = fresh(GIB).await;
        let volume = open(disk.clone()).await;
        for path in ["a", "a/b", "a/b/c", "d"] {
            volume.make_directory(path).await.unwrap();
        }
        volume.write_file("a/b/c/file", b"deep").await.unwrap();
        for into in ["a/b/a", "a/b/c/a", "a/a"] {
            let refused = volume.rename("a", into).await;
            assert!(matches!(refused, Err(Error::BadPath { .. })), "{into}: {refused:?}");
        }
        volume.rename("a/b", "d/moved").await.unwrap();
        assert_eq!(volume.read_file("d/moved/c/file", 9).await.unwrap(), b"deep");
        assert!(volume.entry("a/b").await.is_err());
        assert!(matches!(volume.rename("d/moved", "a").await, Err(Error::Exists { .. })));
        volume.rename("d/moved", "up").await.unwrap();
        volume.rename("d", "up/c/d").await.unwrap();
        volume.remove("a").await.unwrap();
        volume.make_directory("up/c/d/new").await.unwrap();
        let links = async |path: &str| volume.entry(path).await.unwrap().links;
        assert_eq!((links("up").await, links("up/c").await, links("up/c/d").await), (3, 3, 3));
        volume.close().await.unwrap();
        assert!(check(disk).await.findings().is_empty());
    });
}
