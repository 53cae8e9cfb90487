//! The same on a real VMFS volume.

use block::crash::{CrashLog, Witness};
use block::decorate::{Decorated, Operation, Record};
use block::{Extents, Kind, MemoryDisk};
use vmfs::{Mode as VolumeMode, NewVolume, Volume};

use super::*;
use crate::create::{
    convert_rdm, create_flat, create_rdm, delete, grow_rdm, read_copies, rebuild_rdm, remap_rdm,
};
use crate::rdm::{Identity, IdentityError, LunIdentity, Mode, Ours, VisibleLun};
use crate::{ChainError, FlatDisk, LinkKind, VmfsFolder};

const MIB: u64 = (1 << 20) / SECTOR_BYTES;

pub(super) async fn fresh() -> Rc<MemoryDisk> {
    let disk = Rc::new(MemoryDisk::new(1024 * MIB));
    let when = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_760_000_000);
    vmfs::create(vec![disk.clone()], &NewVolume::new("ds", 1, when)).await.unwrap();
    disk
}

pub(super) async fn folder_on(disk: Rc<dyn Disk>) -> Rc<VmfsFolder> {
    VmfsFolder::new(Volume::open(vec![disk], VolumeMode::Write).await.unwrap())
}

pub(super) async fn datastore() -> Rc<VmfsFolder> {
    let folder = folder_on(fresh().await).await;
    folder.volume().make_directory("/vm").await.unwrap();
    folder
}

pub(super) fn dynamic(folder: &Rc<VmfsFolder>) -> Rc<dyn Folder> {
    Rc::clone(folder) as Rc<dyn Folder>
}

async fn assert_clean(disk: Rc<dyn Disk>) {
    let report = vmfs::check(vec![disk], vmfs::check::Options::default()).await.unwrap();
    let worst = report.worst();
    assert!(worst.is_none_or(|w| w <= vmfs::check::Severity::Note), "{:#?}", report.findings());
}

#[test]
fn flat_files_of_every_kind_are_disks() {
    for (number, provision) in
        [Provision::Thin, Provision::LazyZeroed, Provision::EagerZeroed].into_iter().enumerate()
    {
        lane::block_on(async {
            let disk = fresh().await;
            // Free blocks hold garbage: what was never written must not show it.
            let junk = vec![0xee; 16 << 20];
            for at in (200 * MIB..1000 * MIB).step_by(32 * MIB as usize) {
                write(&*disk, at, &junk).await;
            }
            let folder = folder_on(disk.clone()).await;
            let path = "/d.vmdk";
            create_flat(&dynamic(&folder), path, 9 * MIB + 7, provision).await.unwrap();
            let vm = VmDisk::open(dynamic(&folder), path, Open::WRITE, &()).await.unwrap();
            assert!(read(&*vm, 0, 9 * MIB + 7).await.iter().all(|b| *b == 0), "{provision:?}");
            block::conformance::check(vm.clone(), number as u64).await;
            vm.close().await.unwrap();
            drop(vm);
            let again = VmDisk::open(dynamic(&folder), path, Open::READ, &()).await.unwrap();
            block::conformance::check_read_only(again).await;
            let flat = FlatDisk::open(folder.volume(), "/d-flat.vmdk", false).await.unwrap();
            block::conformance::check(flat, number as u64 + 7).await;
            let flat = FlatDisk::open(folder.volume(), "/d-flat.vmdk", true).await.unwrap();
            block::conformance::check_read_only(flat).await;
            folder.volume().settle().await.unwrap();
            delete(&dynamic(&folder), path).await.unwrap();
            assert!(folder.list("/").await.unwrap().iter().all(|n| !n.starts_with('d')));
            folder.volume().settle().await.unwrap();
            assert_clean(disk).await;
        });
    }
}

#[test]
fn the_way_to_a_block_with_data_is_one_operation_of_the_device() {
    lane::block_on(async {
        let record = Decorated::new(fresh().await as Rc<dyn Disk>, Record::default());
        let folder = folder_on(record.clone()).await;
        let path = "/d-flat.vmdk";
        folder.create(path, 64 * MIB, 0, Provision::EagerZeroed).await.unwrap();
        let flat = FlatDisk::open(folder.volume(), path, false).await.unwrap();
        read(&*flat, 0, 1).await;
        for at in [0, 5 * MIB - 4, 63 * MIB] {
            record.passing.list.borrow_mut().clear();
            write(&*flat, at, &[1; 8 * UNIT]).await;
            read(&*flat, at, 8).await;
            let seen: Vec<_> = record.passing.list.borrow().iter().map(|o| (o.0, o.2)).collect();
            assert_eq!(seen, [(Operation::Write, 8), (Operation::Read, 8)], "at {at}");
        }
        record.passing.list.borrow_mut().clear();
        flat.flush().await.unwrap();
        assert_eq!(record.passing.count(Operation::Flush), 1, "nothing was allocated: one flush");
    });
}

#[test]
fn thin_disks_take_room_as_they_are_written() {
    lane::block_on(async {
        let folder = datastore().await;
        create_flat(&dynamic(&folder), "/vm/d.vmdk", 100 * MIB, Provision::Thin).await.unwrap();
        let free = folder.volume().free().await.unwrap().blocks;
        let disk = VmDisk::open(dynamic(&folder), "/vm/d.vmdk", Open::WRITE, &()).await.unwrap();
        write(&*disk, 50 * MIB + 100, &[7; UNIT]).await;
        disk.zero(Sector(0), 40 * MIB, true).await.unwrap();
        disk.flush().await.unwrap();
        let after = folder.volume().free().await.unwrap().blocks;
        assert!(free - after <= 4, "one block and the descriptor's: {}", free - after);
        let mut extents = Extents::with_limit(16);
        disk.status(Sector(0), 100 * MIB, None, &mut extents).await.unwrap();
        let kinds: Vec<_> =
            extents.iter().filter(|e| e.kind != Kind::Hole).map(|e| (e.at.0, e.count)).collect();
        assert!(
            kinds.iter().any(|(at, count)| *at <= 50 * MIB + 100 && at + count > 50 * MIB + 100),
            "{kinds:?}"
        );
        assert!(kinds.iter().map(|k| k.1).sum::<u64>() <= MIB);
        let text = descriptor_of(&folder, "/vm/d.vmdk").await;
        assert_eq!(text.get("ddb.thinProvisioned"), Some("1"));
    });
}

pub(super) async fn descriptor_of(folder: &VmfsFolder, path: &str) -> Descriptor {
    Descriptor::parse(&folder.read_text(path).await.unwrap()).unwrap()
}

#[test]
fn a_chain_on_a_datastore_lives_through_cut_and_commit() {
    lane::block_on(async {
        let disk = fresh().await;
        let folder = folder_on(disk.clone()).await;
        folder.volume().make_directory("/vm").await.unwrap();
        let path = "/vm/d.vmdk";
        create_flat(&dynamic(&folder), path, 32 * MIB, Provision::Thin).await.unwrap();
        let vm = VmDisk::open(dynamic(&folder), path, Open::WRITE, &()).await.unwrap();
        let mut expected = vec![0u8; (32 * MIB) as usize * UNIT];
        let mut random = fastrand::Rng::with_seed(4);
        for round in 0..3 {
            for _ in 0..200 {
                let (at, byte) = (random.u64(0..32 * MIB - 64), random.u8(1..));
                let bytes = vec![byte; random.usize(1..64) * UNIT];
                write(&*vm, at, &bytes).await;
                expected[at as usize * UNIT..][..bytes.len()].copy_from_slice(&bytes);
            }
            if round < 2 {
                switch(&vm).await;
            }
        }
        assert!(read(&*vm, 0, 32 * MIB).await == expected);
        vm.close().await.unwrap();
        drop(vm);
        let top = "/vm/d-000002.vmdk";
        let vm = VmDisk::open(dynamic(&folder), top, Open::WRITE, &()).await.unwrap();
        assert!(read(&*vm, 0, 32 * MIB).await == expected);
        let commit = vm.start_commit(0).await.unwrap();
        write(&*vm, 3, &[9; UNIT]).await;
        expected[3 * UNIT..4 * UNIT].fill(9);
        commit.copy(&mut |_| true).await.unwrap();
        let left = commit.flip(async || Ok(())).await.unwrap();
        drop(commit);
        left.remove().await.unwrap();
        assert!(read(&*vm, 0, 32 * MIB).await == expected);
        vm.close().await.unwrap();
        drop(vm);
        let names = folder.list("/vm").await.unwrap();
        assert_eq!(names.len(), 2, "{names:?}");
        folder.volume().settle().await.unwrap();
        drop(folder);
        assert_clean(disk.clone()).await;
        let folder = folder_on(disk).await;
        let vm = VmDisk::open(dynamic(&folder), path, Open::READ, &()).await.unwrap();
        assert!(read(&*vm, 0, 32 * MIB).await == expected);
    });
}

/// Thin allocation, growth of the redo log's file, and the redo log itself, on VMFS that loses power.
#[test]
fn r11_crash_under_a_thin_disk_and_a_redo_log_on_vmfs() {
    lane::block_on(async {
        // Even seeds have a thin disk alone, odd ones a redo log over it.
        for seed in seeds(6, 30) {
            thin_crash(seed).await;
        }
    });
}

async fn thin_crash(seed: u64) {
    let made = fresh().await;
    {
        let folder = folder_on(made.clone()).await;
        create_flat(&dynamic(&folder), "/d.vmdk", 8 * MIB, Provision::Thin).await.unwrap();
        folder.volume().settle().await.unwrap();
    }
    let log = CrashLog::new(seed);
    let folder = folder_on(log.disk_from(made.image())).await;
    let mut top = "/d.vmdk".to_owned();
    let disk = VmDisk::open(dynamic(&folder), &top, Open::WRITE, &()).await.unwrap();
    if seed % 2 == 1 {
        switch(&disk).await;
        top = disk.top_path();
    }
    let begun = log.points();
    log.interleave(2);
    let witness = Witness::new(&log, Rc::clone(&disk) as Rc<dyn Disk>);
    let tasks: Vec<_> = (0..2u64)
        .map(|task| {
            let (witness, mut random) = (Rc::clone(&witness), fastrand::Rng::with_seed(seed * 3 + task));
            lane::spawn(async move {
                for _ in 0..10 {
                    let at = random.u64(0..8 * MIB / 16 - 1) * 16 + task * 8;
                    let bytes = vec![random.u8(1..); random.usize(1..8) * UNIT];
                    let safe = if random.u8(0..4) == 0 { Safe::OnReturn } else { Safe::AtNextFlush };
                    witness.write(Sector(at), &Segments::new(&bytes), safe).await.unwrap();
                    if random.u8(0..3) == 0 {
                        witness.flush().await.unwrap();
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await;
    }
    for point in points(begun, log.points(), 3, seed / 2) {
        let image = Rc::new(MemoryDisk::from(log.cut(point, (seed + point as u64) % 4).remove(0)));
        let folder = folder_on(image).await;
        let disk = VmDisk::open(dynamic(&folder), &top, Open::WRITE, &()).await.unwrap();
        let judged = witness.judge(point, &*disk).await;
        judged.unwrap_or_else(|v| panic!("KAGAMI_SEED={seed} point {point}: {v:?}"));
    }
}

/// A descriptor is replaced whole: whatever the power does, one text or the other is there, and the new one once
/// the call has returned.
#[test]
fn r10_crash_while_a_descriptor_is_replaced_leaves_one_or_the_other() {
    lane::block_on(async {
        let made = fresh().await;
        let texts: Vec<Vec<u8>> =
            [300usize, 9_000, 40, 20_000, 700].iter().map(|n| vec![b'a' + (*n % 7) as u8; *n]).collect();
        folder_on(made.clone()).await.replace("/d.vmdk", &texts[0]).await.unwrap();
        let log = CrashLog::new(7);
        let folder = folder_on(log.disk_from(made.image())).await;
        let mut returned = vec![log.points()];
        for text in &texts[1..] {
            folder.replace("/d.vmdk", text).await.unwrap();
            returned.push(log.points());
        }
        for point in returned[0]..=log.points() {
            for shape in 0..3 {
                let image = Rc::new(MemoryDisk::from(log.cut(point, shape).remove(0)));
                let found = folder_on(image).await.read_text("/d.vmdk").await.unwrap();
                let newest = returned.iter().rposition(|at| *at <= point).unwrap();
                let allowed = &texts[newest..texts.len().min(newest + 2)];
                assert!(allowed.contains(&found), "point {point}: {} bytes", found.len());
            }
        }
    });
}

pub(super) fn lun(number: u8, sectors: u64) -> (LunIdentity, VisibleLun) {
    let uuid = uuid::Uuid::from_bytes([number; 16]);
    let identity = LunIdentity {
        naa: vec![0x60, 0x24, 0xb4, 0x70, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, number],
        uuid: Some(uuid),
        serial: uuid.simple().to_string().into_bytes(),
        vendor: *b"KAGAMI  ",
        product: *b"LUN             ",
        revision: *b"0001",
        sectors,
        logical_block: 512,
        physical_block: 4096,
        ours: Some(Ours { array: uuid::Uuid::nil(), lun: uuid, generation: None }),
        ..LunIdentity::default()
    };
    let disk = Rc::new(MemoryDisk::new(sectors));
    let seen = VisibleLun { unit: u64::from(number), name: format!("lun{number}"), identity, disk };
    (seen.identity.clone(), seen)
}

/// A mapping in virtual mode of the first of two LUNs.
async fn mapped() -> (Rc<VmfsFolder>, Vec<VisibleLun>) {
    let folder = datastore().await;
    let (identity, seen) = lun(1, 4096);
    create_rdm(&dynamic(&folder), MAPPING, &identity, Mode::Virtual).await.unwrap();
    (folder, vec![seen, lun(2, 4096).1])
}

const MAPPING: &str = "/vm/d.vmdk";

#[test]
fn r5_a_mapping_is_held_by_one_or_shared_on_purpose() {
    lane::block_on(async {
        let (folder, luns) = mapped().await;
        let open = async |how| VmDisk::open(dynamic(&folder), MAPPING, how, &luns).await;
        let disk = open(Open::WRITE).await.unwrap();
        assert!(matches!(open(Open::WRITE).await, Err(ChainError::InUse(_))));
        assert!(matches!(
            convert_rdm(&dynamic(&folder), MAPPING, Mode::Physical).await,
            Err(ChainError::InUse(_))
        ));
        let shared = Open { shared: true, ..Open::WRITE };
        assert!(matches!(open(shared).await, Err(ChainError::InUse(_))), "the other did not say so");
        drop(disk);
        // Shared on purpose: several.
        let one = open(shared).await.unwrap();
        let two = open(shared).await.unwrap();
        assert!(matches!(open(Open::WRITE).await, Err(ChainError::InUse(_))));
        assert!(matches!(one.prepare_redo().await.err(), Some(ChainError::Refused(_))));
        drop((one, two));
        open(Open::WRITE).await.unwrap();
    });
}

#[test]
fn a_virtual_mapping_is_a_disk_and_takes_a_redo_log() {
    lane::block_on(async {
        let (folder, luns) = mapped().await;
        let taken = create_rdm(&dynamic(&folder), MAPPING, &lun(1, 4096).0, Mode::Virtual).await;
        assert!(matches!(taken, Err(ChainError::Folder(crate::FolderError::Exists { .. }))));
        let disk = VmDisk::open(dynamic(&folder), MAPPING, Open::WRITE, &luns).await.unwrap();
        block::conformance::check(disk.clone(), 1).await;
        assert!(matches!(&disk.links()[0].kind, LinkKind::Rdm { mode: Mode::Virtual, .. }));
        write(&*disk, 9, &[0x99; UNIT]).await;
        assert_eq!(read(&*luns[0].disk, 9, 1).await, [0x99; UNIT], "straight to the LUN");
        switch(&disk).await;
        write(&*disk, 9, &[0x77; UNIT]).await;
        assert_eq!(read(&*luns[0].disk, 9, 1).await, [0x99; UNIT], "to the redo log");
        let commit = disk.start_commit(0).await.unwrap();
        commit.copy(&mut |_| true).await.unwrap();
        let left = commit.flip(async || Ok(())).await.unwrap();
        drop(commit);
        left.remove().await.unwrap();
        assert_eq!(read(&*luns[0].disk, 9, 1).await, [0x77; UNIT]);
    });
}

#[test]
fn r4_a_physical_mapping_takes_no_redo_log_and_is_offered_an_array_cut() {
    lane::block_on(async {
        let (folder, luns) = mapped().await;
        convert_rdm(&dynamic(&folder), MAPPING, Mode::Physical).await.unwrap();
        let disk = VmDisk::open(dynamic(&folder), MAPPING, Open::WRITE, &luns).await.unwrap();
        let refused = disk.prepare_redo().await.err().unwrap().to_string();
        assert!(refused.contains("R4") && refused.contains("array snapshot"), "{refused}");
        assert!(refused.contains("naa.6024b470"), "of which LUN: {refused}");
        assert_eq!(folder.list("/vm").await.unwrap().len(), 2, "nothing was made");
    });
}

#[test]
fn r6_the_mode_changes_in_place_and_the_data_stays() {
    lane::block_on(async {
        let (folder, luns) = mapped().await;
        let open = async || VmDisk::open(dynamic(&folder), MAPPING, Open::WRITE, &luns).await.unwrap();
        let before = folder.list("/vm").await.unwrap();
        write(&*open().await, 9, &[0x77; UNIT]).await;
        for (mode, said) in
            [(Mode::Physical, "vmfsPassthroughRawDeviceMap"), (Mode::Virtual, "vmfsRawDeviceMap")]
        {
            convert_rdm(&dynamic(&folder), MAPPING, mode).await.unwrap();
            let disk = open().await;
            assert_eq!(disk.rdm().unwrap().0, mode);
            assert_eq!(descriptor_of(&folder, MAPPING).await.create_type().to_string(), said);
            assert_eq!(read(&*disk, 9, 1).await, [0x77; UNIT], "the data is untouched");
            assert_eq!(folder.list("/vm").await.unwrap(), before, "in place");
        }
    });
}

/// A record of a newer version is not written over, by nobody: neither where it lies nor beside it.
#[test]
fn r7_what_a_newer_program_wrote_stays_whatever_is_asked() {
    lane::block_on(async {
        let (folder, luns) = mapped().await;
        let (shared, identity) = (dynamic(&folder), Identity { mode: Mode::Virtual, lun: lun(1, 4096).0 });
        let file = "/vm/d-rdm.vmdk";
        let (good, text) =
            (folder.read_mapping(file).await.unwrap(), folder.read_text(MAPPING).await.unwrap());
        let refuses = async || {
            let before = (folder.read_mapping(file).await.unwrap(), folder.read_text(MAPPING).await.unwrap());
            for answer in [
                rebuild_rdm(&shared, MAPPING, &identity).await,
                convert_rdm(&shared, MAPPING, Mode::Physical).await,
                grow_rdm(&shared, MAPPING, &lun(1, 8192).0).await,
                remap_rdm(&shared, MAPPING, &lun(2, 4096).0).await.map(drop),
            ] {
                let said = answer.err().unwrap().to_string();
                assert!(said.contains("version 2") && said.contains("up to 1"), "{said}");
            }
            assert_eq!(before.0, folder.read_mapping(file).await.unwrap());
            assert_eq!(before.1, folder.read_text(MAPPING).await.unwrap());
        };
        let mut newer = good.clone();
        newer.tail[12..14].copy_from_slice(&[2, 0]);
        newer.tail[8..12].fill(0);
        let crc = crc32c::crc32c(&newer.tail[..640]);
        newer.tail[8..12].copy_from_slice(&crc.to_le_bytes());
        folder.write_mapping(file, &newer).await.unwrap();
        refuses().await;
        let refused = VmDisk::open(Rc::clone(&shared), MAPPING, Open::WRITE, &luns).await.err().unwrap();
        assert!(refused.to_string().contains("version 2"), "{refused}");
        folder.write_mapping(file, &good).await.unwrap();
        let mut descriptor = Descriptor::parse(&text).unwrap();
        descriptor.set_ddb("ddb.kagami.rdm.version", "2").unwrap();
        folder.replace(MAPPING, &descriptor.to_bytes()).await.unwrap();
        refuses().await;
    });
}

#[test]
fn r7_a_lost_copy_is_rebuilt_on_the_datastore() {
    lane::block_on(async {
        let folder = datastore().await;
        let (identity, seen) = lun(1, 4096);
        let path = "/vm/d.vmdk";
        create_rdm(&dynamic(&folder), path, &identity, Mode::Virtual).await.unwrap();
        let whole = Identity { mode: Mode::Virtual, lun: identity.clone() };
        let claimed = async || {
            let copies = read_copies(&dynamic(&folder), path).await.unwrap();
            crate::rdm::Copies { claim: Some((identity.clone(), Mode::Virtual)), ..copies }.compare()
        };
        assert!(claimed().await.findings.is_empty());
        // The inode loses our record.
        let mut mapping = folder.read_mapping("/vm/d-rdm.vmdk").await.unwrap();
        mapping.tail[100] ^= 1;
        folder.write_mapping("/vm/d-rdm.vmdk", &mapping).await.unwrap();
        let refused = VmDisk::open(dynamic(&folder), path, Open::WRITE, &vec![seen.clone()]).await.err();
        assert!(matches!(refused, Some(ChainError::Identity { source: IdentityError::Damaged { .. }, .. })));
        let verdict = claimed().await;
        assert_eq!(verdict.findings.len(), 1);
        rebuild_rdm(&dynamic(&folder), path, &verdict.identity.unwrap()).await.unwrap();
        assert!(claimed().await.findings.is_empty());
        // The descriptor is gone: the claim and the inode's record bring it back.
        folder.remove(path).await.unwrap();
        rebuild_rdm(&dynamic(&folder), path, &whole).await.unwrap();
        assert!(claimed().await.findings.is_empty());
        VmDisk::open(dynamic(&folder), path, Open::WRITE, &vec![seen]).await.unwrap();
    });
}

#[test]
fn a_mapping_grows_with_its_lun_and_is_remapped_on_demand() {
    lane::block_on(async {
        let folder = datastore().await;
        let path = "/vm/d.vmdk";
        let (small, _) = lun(1, 4096);
        create_rdm(&dynamic(&folder), path, &small, Mode::Virtual).await.unwrap();
        let (large, seen) = lun(1, 1 << 22);
        let luns = vec![seen];
        let disk = VmDisk::open(dynamic(&folder), path, Open::WRITE, &luns).await.unwrap();
        assert_eq!(disk.shape().sectors, 4096, "the old length until it is grown");
        drop(disk);
        grow_rdm(&dynamic(&folder), path, &large).await.unwrap();
        let disk = VmDisk::open(dynamic(&folder), path, Open::WRITE, &luns).await.unwrap();
        assert_eq!(disk.shape().sectors, 1 << 22);
        assert_eq!(descriptor_of(&folder, path).await.get("ddb.geometry.cylinders"), Some("261"));
        drop(disk);
        assert!(grow_rdm(&dynamic(&folder), path, &small).await.is_err());
        let (other, seen) = lun(7, 1 << 20);
        let old = remap_rdm(&dynamic(&folder), path, &other).await.unwrap();
        assert_eq!(old.lun.naa, large.naa);
        let gone = VmDisk::open(dynamic(&folder), path, Open::WRITE, &luns).await.err().unwrap();
        assert!(gone.to_string().contains("naa.6024b470"), "{gone}");
        let disk = VmDisk::open(dynamic(&folder), path, Open::WRITE, &vec![seen]).await.unwrap();
        assert_eq!(disk.shape().sectors, 1 << 20);
    });
}
