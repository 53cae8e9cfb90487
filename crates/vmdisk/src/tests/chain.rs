use block::MemoryDisk;

use super::store::STORE_SECTORS;
use super::*;
use crate::chain::{ChainError, PARENT_CONTENT_KEY, survey};
use crate::descriptor::long_content_id;
use crate::repair::{evidence, repair};

async fn store() -> Rc<Store> {
    Store::open(Rc::new(MemoryDisk::new(STORE_SECTORS))).await
}

async fn edit(folder: &Store, path: &str, change: impl FnOnce(&mut Descriptor)) {
    let mut text = descriptor(folder, path).await;
    change(&mut text);
    folder.replace(path, &text.to_bytes()).await.unwrap();
}

async fn refused(folder: &Rc<Store>, path: &str) -> (ChainError, Option<String>) {
    let error = VmDisk::open(Rc::clone(folder) as _, path, Open::WRITE, &()).await.err().unwrap();
    let found = survey(&**folder, path).await;
    (error, found.readable().map(str::to_owned))
}

/// A chain of three, closed.
async fn chain(folder: &Rc<Store>) {
    new_base(folder, 4096).await;
    let disk = open(folder, BASE).await;
    write(&*disk, 0, &[1; UNIT]).await;
    for round in 0..2 {
        switch(&disk).await;
        write(&*disk, round + 1, &[round as u8 + 2; UNIT]).await;
    }
    disk.close().await.unwrap();
}

#[test]
fn a_disk_of_any_depth_is_a_disk() {
    lane::block_on(async {
        let folder = store().await;
        new_base(&folder, 3000).await;
        let disk = open(&folder, BASE).await;
        block::conformance::check(disk.clone(), 1).await;
        switch(&disk).await;
        block::conformance::check(disk.clone(), 2).await;
        block::conformance::check_read_only(disk.frozen(0).unwrap()).await;
        let commit = disk.start_commit(0).await.unwrap();
        block::conformance::check(disk.clone(), 3).await;
        drop(commit);
        drop(disk);
        let path = "/d-000001.vmdk";
        let again = VmDisk::open(folder as Rc<dyn Folder>, path, Open::READ, &()).await.unwrap();
        block::conformance::check_read_only(again).await;
    });
}

#[test]
fn a_link_of_a_chain_is_a_disk_frozen_or_not() {
    lane::block_on(async {
        let layer = crate::layer::Layer::new(Rc::new(MemoryDisk::new(3000)), false);
        block::conformance::check(Rc::clone(&layer) as Rc<dyn Disk>, 1).await;
        layer.freeze(true);
        block::conformance::check_read_only(layer).await;
    });
}

#[test]
fn r14_a_sound_chain_opens_and_reads_through() {
    lane::block_on(async {
        let folder = store().await;
        chain(&folder).await;
        let disk = open(&folder, "/d-000002.vmdk").await;
        let all = read(&*disk, 0, 4).await;
        assert_eq!([all[0], all[UNIT], all[2 * UNIT], all[3 * UNIT]], [1, 2, 3, 0]);
        let paths: Vec<_> = disk.links().into_iter().map(|l| l.path).collect();
        assert_eq!(paths, [BASE, CHILD, "/d-000002.vmdk"]);
        assert!(disk.frozen(0).unwrap().shape().read_only && disk.frozen(2).is_none());
        // R5, R16: held by one; links below may not be opened for writing by others either.
        for path in [BASE, CHILD, "/d-000002.vmdk"] {
            assert!(matches!(refused(&folder, path).await.0, ChainError::InUse(_)), "{path}");
        }
    });
}

#[test]
fn r14_each_broken_link_is_named_and_what_is_below_stays_readable() {
    lane::block_on(async {
        let top = "/d-000002.vmdk";
        let folder = store().await;
        chain(&folder).await;
        let good = (folder.read_text(CHILD).await.unwrap(), folder.read_text(BASE).await.unwrap());

        edit(&folder, CHILD, |d| d.set_cid(Cid(0x77))).await;
        let (error, readable) = refused(&folder, top).await;
        assert!(
            matches!(&error, ChainError::CidMismatch { path, found: Cid(0x77), .. } if path == top),
            "{error}"
        );
        assert_eq!(readable.as_deref(), Some(CHILD));
        let prefix = VmDisk::open(Rc::clone(&folder) as _, CHILD, Open::READ, &()).await.unwrap();
        assert_eq!(read(&*prefix, 1, 1).await, [2; UNIT]);
        drop(prefix);

        folder.replace(CHILD, &good.0).await.unwrap();
        edit(&folder, BASE, |d| {
            let larger = ExtentLine { sectors: 5000, ..d.extents()[0].clone() };
            d.set_extent(0, larger).unwrap();
        })
        .await;
        let (error, readable) = refused(&folder, top).await;
        assert!(
            matches!(&error, ChainError::Capacity { path, parent_sectors: 5000, .. } if path == CHILD),
            "{error}"
        );
        assert_eq!(readable.as_deref(), Some(BASE));

        folder.replace(BASE, &good.1).await.unwrap();
        edit(&folder, CHILD, |d| d.set_ddb(PARENT_CONTENT_KEY, "00").unwrap()).await;
        edit(&folder, BASE, |d| d.set_ddb("ddb.longContentID", &long_content_id(d.cid())).unwrap()).await;
        assert!(matches!(refused(&folder, top).await.0, ChainError::ContentMismatch { .. }));

        folder.replace(CHILD, b"version=1\nCID=").await.unwrap();
        assert!(matches!(refused(&folder, top).await, (ChainError::Descriptor { .. }, None)));
        folder.remove(CHILD).await.unwrap();
        let (error, _) = refused(&folder, top).await;
        assert!(
            matches!(&error, ChainError::Missing { path, named_by: Some(n) } if path == CHILD && n == top)
        );

        folder.replace(CHILD, &good.0).await.unwrap();
        edit(&folder, CHILD, |d| d.set_cid(Cid(descriptor_cid(&good.0)))).await;
        folder.remove("/d-000001-delta.vmdk").await.unwrap();
        let (error, _) = refused(&folder, CHILD).await;
        assert!(
            matches!(&error, ChainError::Missing { path, .. } if path.ends_with("-delta.vmdk")),
            "{error}"
        );
    });
}

fn descriptor_cid(bytes: &[u8]) -> u32 {
    Descriptor::parse(bytes).unwrap().cid().0
}

#[test]
fn r14_loops_and_paths_that_leave_are_refused() {
    lane::block_on(async {
        let folder = store().await;
        new_base(&folder, 4096).await;
        let text = String::from_utf8(folder.read_text(BASE).await.unwrap()).unwrap();
        let child = |hint: &str| {
            let head = format!("parentCID=00000011\nparentFileNameHint=\"{hint}\"");
            text.replace("parentCID=ffffffff", &head)
        };
        folder.replace(BASE, child("d.vmdk").as_bytes()).await.unwrap();
        assert!(matches!(refused(&folder, BASE).await.0, ChainError::TooDeep { .. }));
        for hint in ["../x.vmdk", "/vmfs/volumes/other/x.vmdk", "a/../../x.vmdk", "."] {
            folder.replace(BASE, child(hint).as_bytes()).await.unwrap();
            assert!(matches!(refused(&folder, BASE).await.0, ChainError::Folder(_)), "{hint}");
        }
        for file in ["../d-flat.vmdk", "/d-flat.vmdk", "..", "a/d-flat.vmdk"] {
            folder.replace(BASE, text.replace("d-flat.vmdk", file).as_bytes()).await.unwrap();
            assert!(matches!(refused(&folder, BASE).await.0, ChainError::Folder(_)), "{file}");
        }
        for (old, new) in [("createType=\"vmfs\"", "createType=\"seSparse\""), (" VMFS ", " ZZ ")] {
            folder.replace(BASE, text.replace(old, new).as_bytes()).await.unwrap();
            assert!(matches!(refused(&folder, BASE).await.0, ChainError::Unsupported { .. }), "{new}");
        }
    });
}

#[test]
fn r15_a_child_is_born_with_its_parents_cid_and_only_it_changes() {
    lane::block_on(async {
        let folder = store().await;
        new_base(&folder, 4096).await;
        let disk = open(&folder, BASE).await;
        write(&*disk, 0, &[1; UNIT]).await;
        let parent = descriptor(&folder, BASE).await.cid();
        switch(&disk).await;
        let child = descriptor(&folder, CHILD).await;
        assert_eq!(child.parent_cid(), parent);
        write(&*disk, 0, &[2; UNIT]).await;
        disk.close().await.unwrap();
        drop(disk);
        let before = descriptor(&folder, CHILD).await.cid();
        let disk = open(&folder, CHILD).await;
        assert_eq!(descriptor(&folder, CHILD).await.cid(), before, "opening alone changes nothing");
        write(&*disk, 0, &[3; UNIT]).await;
        assert_ne!(descriptor(&folder, CHILD).await.cid(), before);
        assert_eq!(descriptor(&folder, BASE).await.cid(), parent, "the parent's stays");
        assert!(folder.read_text(CHILD).await.unwrap().windows(13).any(|w| w == b"parentFileNam"));
    });
}

#[test]
fn r16_a_frozen_link_refuses_writes() {
    lane::block_on(async {
        let folder = store().await;
        new_base(&folder, 4096).await;
        let disk = open(&folder, BASE).await;
        switch(&disk).await;
        let frozen = disk.frozen(0).unwrap();
        let write = frozen.write(Sector(0), &Segments::new(&[1; UNIT]), Safe::AtNextFlush).await;
        assert!(matches!(write, Err(block::DiskError::ReadOnly)));
    });
}

#[test]
fn r19_the_sessions_cid_is_durable_before_its_first_data() {
    lane::block_on(async {
        let log = block::crash::CrashLog::new(1);
        let folder = Store::open(log.disk(STORE_SECTORS)).await;
        new_base(&folder, 4096).await;
        folder.create("/x", 0, 0, Provision::Thin).await.unwrap();
        let old = descriptor(&folder, BASE).await.cid();
        let start = log.points();
        let disk = open(&folder, BASE).await;
        write(&*disk, 5, &[9; UNIT]).await;
        let mut seen = 0;
        for point in start..=log.points() {
            for seed in [1, 7] {
                let image = MemoryDisk::from(log.cut(point, seed).remove(0));
                let after = Store::open(Rc::new(image)).await;
                let data = read(&*after.open("/d-flat.vmdk", true).await.unwrap(), 5, 1).await;
                if data == [9; UNIT] {
                    seen += 1;
                    assert_ne!(descriptor(&after, BASE).await.cid(), old, "data without its CID");
                }
            }
        }
        assert!(seen > 0);
    });
}

/// R8: the form of ESX 2, data without a descriptor, is read and not written.
async fn esx2(folder: Rc<dyn Folder>) {
    const SECTORS: u64 = 9000;
    let data = folder.create("/old.vmdk", SECTORS, 0, Provision::Thin).await.unwrap();
    for at in [0, 77, SECTORS - 1] {
        write(&*data, at, &[at as u8 | 1; UNIT]).await;
    }
    data.flush().await.unwrap();
    drop(data);
    let open = async |path: &str, how| VmDisk::open(Rc::clone(&folder), path, how, &()).await;
    for how in [Open::WRITE, Open { shared: true, ..Open::WRITE }] {
        let refused = open("/old.vmdk", how).await.err().unwrap();
        assert!(matches!(&refused, ChainError::Unsupported { .. }), "{refused}");
        assert!(
            refused.to_string().contains("ESX 2") && refused.to_string().contains("copy it"),
            "{refused}"
        );
    }
    let disk = open("/old.vmdk", Open::READ).await.unwrap();
    assert_eq!(disk.shape().sectors, SECTORS);
    for at in [0, 77, SECTORS - 1] {
        assert_eq!(read(&*disk, at, 1).await, [at as u8 | 1; UNIT]);
    }
    block::conformance::check_read_only(disk).await;
    // What begins like another format is none, however long it is; nor is a text that is torn.
    for magic in [&b"COWD"[..], b"KDMV", &[0xbe, 0xba, 0xfe, 0xca], b"# Disk DescriptorFile"] {
        let data = folder.open("/old.vmdk", false).await.unwrap();
        let mut first = [0; UNIT];
        first[..magic.len()].copy_from_slice(magic);
        write(&*data, 0, &first).await;
        data.flush().await.unwrap();
        drop(data);
        assert!(open("/old.vmdk", Open::READ).await.is_err(), "{magic:?}");
    }
    folder.replace("/torn.vmdk", b"version=1\nCID=").await.unwrap();
    let torn = open("/torn.vmdk", Open::READ).await.err().unwrap();
    assert!(matches!(torn, ChainError::Descriptor { .. }), "{torn}");
}

#[test]
fn r8_a_disk_of_esx_2_is_read_and_never_written() {
    lane::block_on(async {
        esx2(store().await).await;
        esx2(super::datastore::dynamic(&super::datastore::datastore().await)).await;
    });
}

/// What others make and we do not open is refused by its name, read-only as well: never taken for something else.
#[test]
fn kinds_of_disks_that_are_not_opened_say_so() {
    lane::block_on(async {
        let folder = store().await;
        new_base(&folder, 4096).await;
        let extent = |kind: &ExtentKind, file: &str| ExtentLine {
            access: Access::ReadWrite,
            sectors: 4096,
            kind: kind.clone(),
            file: file.into(),
            offset: 0,
        };
        let cases = [
            (CreateType::TwoGbMaxExtentFlat, ExtentKind::Flat, 2, "has 2 extents, one is opened"),
            (CreateType::TwoGbMaxExtentSparse, ExtentKind::Sparse, 3, "has 3 extents, one is opened"),
            (CreateType::TwoGbMaxExtentSparse, ExtentKind::Sparse, 1, "type SPARSE is not opened as a base"),
            (CreateType::MonolithicSparse, ExtentKind::Sparse, 1, "type SPARSE is not opened as a base"),
            (CreateType::StreamOptimized, ExtentKind::Sparse, 1, "type SPARSE is not opened as a base"),
            (CreateType::VmfsRaw, ExtentKind::VmfsRaw, 1, "type VMFSRAW is not opened as a base"),
            (CreateType::SeSparse, ExtentKind::SeSparse, 1, "type SESPARSE is not opened as a base"),
            (CreateType::VmfsSparse, ExtentKind::VmfsSparse, 1, "type VMFSSPARSE is not opened as a base"),
            (CreateType::Vmfs, ExtentKind::Sparse, 1, "does not belong to create type vmfs"),
            (
                CreateType::MonolithicFlat,
                ExtentKind::Zero,
                1,
                "does not belong to create type monolithicFlat",
            ),
            (CreateType::Other("partitionedDevice".into()), ExtentKind::Flat, 1, "does not belong to"),
        ];
        for (create_type, kind, count, said) in cases {
            let extents = (0..count).map(|n| extent(&kind, &format!("d-s00{n}.vmdk"))).collect();
            let new = NewDescriptor { cid: Cid(5), parent: None, create_type, extents, ddb: vec![] };
            folder.replace("/x.vmdk", &Descriptor::new(&new).unwrap().to_bytes()).await.unwrap();
            for how in [Open::READ, Open::WRITE] {
                let opened = VmDisk::open(Rc::clone(&folder) as _, "/x.vmdk", how, &()).await;
                let error = opened.err().unwrap();
                assert!(matches!(error, ChainError::Unsupported { .. }), "{kind}: {error}");
                assert!(error.to_string().contains(said), "{kind}: {error}");
            }
        }
    });
}

#[test]
fn r18_a_chain_is_repaired_on_evidence_with_a_record_and_the_old_descriptor() {
    lane::block_on(async {
        let top = CHILD;
        let folder = store().await;
        new_base(&folder, 4096).await;
        let disk = open(&folder, BASE).await;
        write(&*disk, 0, &[1; UNIT]).await;
        switch(&disk).await;
        write(&*disk, 1, &[2; UNIT]).await;
        disk.close().await.unwrap();
        drop(disk);
        let shared = Rc::clone(&folder) as Rc<dyn Folder>;
        assert!(evidence(&shared, top, None, &()).await.mismatches.is_empty());
        edit(&folder, BASE, |d| d.set_cid(Cid(0x77))).await;
        let before = folder.read_text(top).await.unwrap();

        // The parent as a backup has it, but for one block.
        let parent = VmDisk::open(Rc::clone(&shared), BASE, Open::READ, &()).await.unwrap();
        let mut bytes = read(&*parent, 0, 4096).await;
        drop(parent);
        bytes[80 * UNIT] ^= 1;
        let backup = MemoryDisk::from_bytes(&bytes);
        let found = evidence(&shared, top, Some(&backup), &()).await;
        assert!(found.others.is_empty() && found.links.len() == 2);
        let [mismatch] = &found.mismatches[..] else { panic!("{found:?}") };
        assert_eq!((&mismatch.child[..], &mismatch.parent[..], mismatch.found), (top, BASE, Cid(0x77)));
        let samples = mismatch.samples.unwrap();
        assert_eq!((samples.compared, samples.equal), (512, 511));
        assert_eq!(samples.first_different, Some(Sector(80)));

        let now = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_760_000_000);
        assert!(repair(&shared, mismatch, "  ", now).await.is_err(), "no reason");
        assert_eq!(folder.read_text(top).await.unwrap(), before, "looking changes nothing");
        let repaired = repair(&shared, mismatch, "backup software\ndied; op", now).await.unwrap();
        assert_eq!(folder.read_text(&repaired.kept).await.unwrap(), before);
        let record = String::from_utf8(folder.read_text(&repaired.record).await.unwrap()).unwrap();
        for part in ["reason = backup software died; op", "found CID = 00000077", "511 of 512"] {
            assert!(record.contains(part), "{part}: {record}");
        }
        let disk = open(&folder, top).await;
        let all = read(&*disk, 0, 3).await;
        assert_eq!([all[0], all[UNIT], all[2 * UNIT]], [1, 2, 0]);
        assert!(repair(&shared, mismatch, "again", now).await.is_err(), "in use");
        drop(disk);
        let again = repair(&shared, mismatch, "again", now).await.err().unwrap();
        assert!(again.to_string().contains("look again"), "{again}");
    });
}

#[test]
fn r18_what_no_cid_mends_is_not_repaired() {
    lane::block_on(async {
        let folder = store().await;
        chain(&folder).await;
        let shared = Rc::clone(&folder) as Rc<dyn Folder>;
        let now = std::time::UNIX_EPOCH;
        edit(&folder, BASE, |d| {
            d.set_cid(Cid(0x99));
            d.set_ddb(crate::chain::MIXED_KEY, "/d-000002.vmdk").unwrap();
        })
        .await;
        let found = evidence(&shared, "/d-000002.vmdk", None, &()).await;
        let [mismatch] = &found.mismatches[..] else { panic!("{found:?}") };
        assert_eq!(mismatch.mixed.as_deref(), Some("/d-000002.vmdk"));
        let refused = repair(&shared, mismatch, "why not", now).await.err().unwrap();
        assert!(matches!(refused, ChainError::Mixed { .. }), "{refused}");
        folder.remove(BASE).await.unwrap();
        let found = evidence(&shared, "/d-000002.vmdk", None, &()).await;
        assert!(found.mismatches.is_empty());
        assert!(matches!(&found.others[..], [ChainError::Missing { .. }]), "{found:?}");
        let gone = repair(&shared, mismatch, "why not", now).await.err().unwrap();
        assert!(matches!(gone, ChainError::Mixed { .. } | ChainError::Missing { .. }), "{gone}");
    });
}
