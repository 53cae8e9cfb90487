use std::rc::Rc;

use block::{Disk, Generation, MemoryDisk, Safe, Sector, Segments};
use proptest::prelude::*;
use uuid::Uuid;
use zerocopy::IntoBytes;

use super::*;
use crate::descriptor::{Access, Cid, Descriptor, ExtentKind, ExtentLine, NewDescriptor};

fn lun(number: u8) -> LunIdentity {
    LunIdentity {
        naa: vec![0x60, 0x24, 0xb4, 0x70, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, number],
        uuid: Some(Uuid::from_bytes([number; 16])),
        serial: Uuid::from_bytes([number; 16]).simple().to_string().into_bytes(),
        vendor: *b"KAGAMI  ",
        product: *b"LUN             ",
        revision: *b"0001",
        sectors: 2048,
        logical_block: 512,
        physical_block: 4096,
        ours: Some(Ours {
            array: Uuid::from_bytes([0xaa; 16]),
            lun: Uuid::from_bytes([number; 16]),
            generation: Some(Generation { counter: 7, id: 9 }),
        }),
        tag: Some(ContentTag { hash: [number; 32], taken_at: 1_700_000_000 }),
        seen: b"pool a \"x\" 100%".to_vec(),
        ..LunIdentity::default()
    }
}

fn visible(unit: u64, identity: LunIdentity) -> VisibleLun {
    let disk = Rc::new(MemoryDisk::new(identity.sectors));
    VisibleLun { unit, name: format!("lun{unit}"), identity, disk }
}

fn descriptor() -> Descriptor {
    let extent = ExtentLine {
        access: Access::ReadWrite,
        sectors: 2048,
        kind: ExtentKind::VmfsRdm,
        file: "d-rdm.vmdk".into(),
        offset: 0,
    };
    let create_type = Mode::Virtual.create_type();
    let new = NewDescriptor { cid: Cid(1), parent: None, create_type, extents: vec![extent], ddb: vec![] };
    Descriptor::new(&new).unwrap()
}

#[test]
fn r7_the_identity_is_written_three_times_and_reads_back() {
    let identity = Identity { mode: Mode::Physical, lun: lun(3) };
    let record = identity.to_record().unwrap();
    assert_eq!(Identity::from_record(record.as_bytes()).unwrap(), identity);
    let mut text = descriptor();
    identity.to_ddb(&mut text).unwrap();
    let text = Descriptor::parse(&text.to_bytes()).unwrap();
    assert_eq!(Identity::from_ddb(&text).unwrap(), identity);
    assert_eq!(text.get("ddb.kagami.rdm.naa"), Some("6024b4700102030405060708090a0b03"));
    let mapping = Mapping::new(&identity).unwrap();
    assert_eq!(mapping.identity(Mode::Virtual).unwrap(), identity);
    assert_eq!((mapping.record.id_kind, mapping.record.id_length), (2, 22));
    assert_eq!(mapping.record.id[..16], identity.lun.naa[..]);
    assert_eq!(mapping.length_bytes, 2048 * 512);
}

#[test]
fn r7_each_copy_is_rebuilt_from_the_other_two() {
    let good = Identity { mode: Mode::Virtual, lun: lun(3) };
    let other = Identity { mode: Mode::Virtual, lun: lun(4) };
    let whole = Copies {
        inode: Ok(good.clone()),
        descriptor: Ok(good.clone()),
        claim: Some((lun(3), Mode::Virtual)),
    };
    assert_eq!(whole.compare(), Verdict { identity: Some(good.clone()), findings: vec![] });
    let lost = IdentityError::Damaged { what: "its checksum does not match" };
    for (copies, place, what) in [
        (Copies { inode: Err(lost.clone()), ..whole.clone() }, Place::Inode, What::Damaged(lost.clone())),
        (Copies { inode: Err(IdentityError::None), ..whole.clone() }, Place::Inode, What::Missing),
        (Copies { inode: Ok(other.clone()), ..whole.clone() }, Place::Inode, What::Differs("LUN")),
        (Copies { descriptor: Err(lost.clone()), ..whole.clone() }, Place::Descriptor, What::Damaged(lost)),
        (Copies { descriptor: Ok(other.clone()), ..whole.clone() }, Place::Descriptor, What::Differs("LUN")),
        (Copies { claim: None, ..whole.clone() }, Place::Claim, What::Missing),
        (
            Copies { claim: Some((lun(4), Mode::Virtual)), ..whole.clone() },
            Place::Claim,
            What::Differs("LUN"),
        ),
        (
            Copies { claim: Some((lun(3), Mode::Physical)), ..whole.clone() },
            Place::Claim,
            What::Differs("mode"),
        ),
    ] {
        let verdict = copies.compare();
        let rebuilt = verdict.identity.unwrap();
        assert_eq!((rebuilt.mode, rebuilt.lun.naa), (good.mode, good.lun.naa.clone()));
        assert_eq!(verdict.findings, [Finding { place, what }]);
    }
    // Two alone that disagree: nobody guesses.
    let split = Copies { inode: Ok(good), descriptor: Ok(other), claim: None };
    assert_eq!(split.compare().identity, None);
    assert_eq!(split.compare().findings.len(), 3);
}

#[test]
fn damaged_records_are_refused() {
    let identity = Identity { mode: Mode::Virtual, lun: lun(1) };
    let good = identity.to_record().unwrap().as_bytes().to_vec();
    for byte in 0..good.len() {
        let mut bad = good.clone();
        bad[byte] ^= 0x10;
        assert!(Identity::from_record(&bad).is_err(), "byte {byte}");
    }
    assert_eq!(Identity::from_record(&[0; 640]), Err(IdentityError::None));
    assert!(Identity::from_record(&good[..100]).is_err());
    let mut text = descriptor();
    assert_eq!(Identity::from_ddb(&text), Err(IdentityError::None));
    identity.to_ddb(&mut text).unwrap();
    text.set_ddb("ddb.kagami.rdm.lun", &Uuid::from_bytes([9; 16]).to_string()).unwrap();
    assert!(matches!(Identity::from_ddb(&text), Err(IdentityError::Damaged { .. })));
    let long = LunIdentity { serial: vec![b'x'; 65], ..lun(1) };
    assert!(Identity { mode: Mode::Virtual, lun: long }.to_record().is_err());
}

/// The record as version 1 wrote it: it is read for ever, and the same identity still gives the same bytes.
#[test]
fn the_golden_identity_record_is_read_and_still_made() {
    let identity = Identity { mode: Mode::Physical, lun: lun(3) };
    let made = identity.to_record().unwrap();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/rdm-identity-1.bin");
    if std::env::var_os("KAGAMI_WRITE_GOLDEN").is_some() {
        std::fs::write(path, made.as_bytes()).unwrap();
    }
    let golden = std::fs::read(path).unwrap();
    assert_eq!(made.as_bytes(), golden, "the format changed");
    assert_eq!(Identity::from_record(&golden).unwrap(), identity);
    let mut text = descriptor();
    identity.to_ddb(&mut text).unwrap();
    assert_eq!(text.get("ddb.kagami.rdm.version"), None, "the first version has no such line");
}

/// A record of a version that is yet to come, sound by its checksum.
fn newer_record() -> Vec<u8> {
    let mut raw = Identity { mode: Mode::Virtual, lun: lun(3) }.to_record().unwrap();
    (raw.version, raw.crc) = (2.into(), 0.into());
    raw.crc = crc32c::crc32c(raw.as_bytes()).into();
    raw.as_bytes().to_vec()
}

#[test]
fn what_a_newer_program_wrote_is_refused_by_both_versions_and_outvoted_by_nobody() {
    let newer = Identity::from_record(&newer_record());
    assert_eq!(newer, Err(IdentityError::Version { found: 2 }));
    let said = newer.clone().unwrap_err().to_string();
    assert!(said.contains("version 2") && said.contains("up to 1"), "{said}");
    let good = Identity { mode: Mode::Virtual, lun: lun(3) };
    let mut text = descriptor();
    good.to_ddb(&mut text).unwrap();
    text.set_ddb("ddb.kagami.rdm.version", "2").unwrap();
    text.set_ddb("ddb.kagami.rdm.something", "else").unwrap();
    let in_text = Identity::from_ddb(&text);
    assert_eq!(in_text, newer, "whatever else is there");
    let claim = Some((lun(3), Mode::Virtual));
    for (copies, place) in [
        (Copies { inode: newer.clone(), descriptor: Ok(good.clone()), claim: claim.clone() }, Place::Inode),
        (Copies { inode: Ok(good), descriptor: in_text, claim }, Place::Descriptor),
    ] {
        let verdict = copies.compare();
        assert_eq!(verdict.identity, None, "two older copies do not outvote it");
        let what = What::Newer(IdentityError::Version { found: 2 });
        assert_eq!(verdict.findings, [Finding { place, what }]);
    }
}

#[test]
fn the_genuine_record_alone_is_enough_for_a_mapping_made_by_others() {
    let record = RdmRecord::serial(b"QM00015", b"QEMU HARDDISK");
    let mapping = Mapping { record, length_bytes: 1 << 20, tail: vec![] };
    let identity = mapping.identity(Mode::Virtual).unwrap();
    assert_eq!((&identity.lun.serial[..], identity.lun.sectors), (&b"QM00015"[..], 2048));
    let torn = Mapping { tail: b"KGMRDMID but torn".to_vec(), ..mapping };
    assert!(torn.identity(Mode::Virtual).is_err(), "a damaged record of ours is not passed over");
}

#[test]
fn the_resolver_finds_by_identity_and_says_what_it_found() {
    let identity = Identity { mode: Mode::Virtual, lun: lun(3) };
    let others: Vec<VisibleLun> = [1, 2, 4].iter().map(|n| visible(u64::from(*n), lun(*n))).collect();
    let with = |more: &[VisibleLun]| [&others[..], more].concat();
    let is = |list: &[VisibleLun], want: fn(&Resolution<'_>) -> bool| want(&resolve(&identity, list));
    assert!(is(&with(&[visible(9, lun(3))]), |r| matches!(r, Resolution::Resolved(l) if l.unit == 9)));
    // Two paths to one LUN are one candidate; two LUNs are not.
    let twice = with(&[visible(9, lun(3)), visible(9, lun(3))]);
    assert!(is(&twice, |r| matches!(r, Resolution::Resolved(_))));
    let copied = with(&[visible(9, lun(3)), visible(10, lun(3))]);
    assert!(is(&copied, |r| matches!(r, Resolution::Ambiguous(l) if l.len() == 2)));
    let sized = |sectors| [visible(9, LunIdentity { sectors, ..lun(3) })];
    assert!(is(&with(&sized(4096)), |r| matches!(r, Resolution::Larger(_))));
    assert!(is(&with(&sized(1024)), |r| matches!(r, Resolution::Smaller(_))));
    let blocks = [visible(9, LunIdentity { logical_block: 4096, ..lun(3) })];
    assert!(is(&with(&blocks), |r| matches!(r, Resolution::BlockSize(_))));
    let tag = lun(3).tag;
    let candidate = [visible(11, LunIdentity { tag, ..lun(5) })];
    assert!(is(
        &with(&candidate),
        |r| matches!(r, Resolution::Missing(l) if l.len() == 1 && l[0].unit == 11)
    ));
    assert!(is(&others, |r| matches!(r, Resolution::Missing(l) if l.is_empty())));
}

#[test]
fn weaker_keys_count_only_when_no_stronger_is_on_both_sides() {
    let strip = |l: LunIdentity| LunIdentity { ours: None, ..l };
    let recorded = Identity { mode: Mode::Physical, lun: strip(lun(3)) };
    let found =
        |seen: LunIdentity| matches!(resolve(&recorded, &[visible(1, seen)]), Resolution::Resolved(_));
    assert!(found(lun(3)));
    assert!(found(LunIdentity { uuid: None, serial: vec![], ..strip(lun(3)) }), "NAA alone");
    let moved = LunIdentity { naa: lun(9).naa, ..strip(lun(3)) };
    assert!(!found(moved), "another NAA is another LUN, whatever its serial number says");
    let serial = LunIdentity { naa: vec![], uuid: None, ..strip(lun(3)) };
    assert!(found(serial.clone()));
    assert!(!found(LunIdentity { vendor: *b"OTHER   ", ..serial.clone() }), "serial needs its vendor");
    assert!(!found(LunIdentity { serial: vec![], ..serial }), "nothing in common is no match");
}

#[test]
fn a_larger_lun_opens_with_the_old_length_and_a_smaller_one_only_for_rescue() {
    let identity = Identity { mode: Mode::Virtual, lun: lun(3) };
    let larger = [visible(1, LunIdentity { sectors: 9000, ..lun(3) })];
    assert_eq!(open(&identity, &larger, false).unwrap().shape().sectors, 2048);
    let smaller = [visible(1, LunIdentity { sectors: 100, ..lun(3) })];
    assert!(matches!(open(&identity, &smaller, false), Err(ResolveError::Smaller { .. })));
    let rescue = open(&identity, &smaller, true).unwrap();
    assert!(rescue.shape().read_only && rescue.shape().sectors == 100);
    let error = open(&identity, &[], false).err().unwrap().to_string();
    assert!(error.contains("naa.6024b47001") && error.contains("kagami rdm remap"), "{error}");
}

#[test]
fn a_lun_that_was_rolled_back_does_not_resume() {
    let identity = Identity { mode: Mode::Virtual, lun: lun(3) };
    let before = Some(Generation { counter: 7, id: 9 });
    assert!(may_resume(&identity, before, &[visible(1, lun(3))]).is_ok());
    let mut rolled = lun(3);
    rolled.ours = rolled.ours.map(|o| Ours { generation: Some(Generation { counter: 8, id: 10 }), ..o });
    let rolled = [visible(1, rolled)];
    let answer = may_resume(&identity, before, &rolled);
    assert!(matches!(answer, Err(ResolveError::Generation { .. })));
    assert!(matches!(may_resume(&identity, before, &[]), Err(ResolveError::Missing { .. })));
}

#[test]
fn scan_lists_what_no_mapping_points_to() {
    let list: Vec<VisibleLun> = (1..5).map(|n| visible(u64::from(n), lun(n))).collect();
    let mapped =
        [Identity { mode: Mode::Virtual, lun: lun(2) }, Identity { mode: Mode::Physical, lun: lun(4) }];
    let free: Vec<u64> = unmapped(&list, &mapped).iter().map(|l| l.unit).collect();
    assert_eq!(free, [1, 3]);
}

#[test]
fn the_content_tag_sees_content_and_not_identity() {
    lane::block_on(async {
        let (a, b) = (MemoryDisk::new(1 << 16), MemoryDisk::new(1 << 16));
        let tag = async |d: &dyn Disk| content_tag(d, 5).await.unwrap().hash;
        assert_eq!(tag(&a).await, tag(&b).await);
        b.write(Sector(2), &Segments::new(&[1; 512]), Safe::AtNextFlush).await.unwrap();
        assert_ne!(tag(&a).await, tag(&b).await);
        content_tag(&MemoryDisk::new(3), 5).await.unwrap();
    });
}

proptest! {
    #[test]
    fn any_identity_survives_both_forms(
        naa in prop_oneof![Just(vec![]), prop::collection::vec(any::<u8>(), 16)],
        strings in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 4),
        vendor in any::<[u8; 8]>(), product in any::<[u8; 16]>(), revision in any::<[u8; 4]>(),
        sectors in any::<u64>(), uuid in prop::option::of(any::<u128>()), tag in prop::option::of(any::<[u8; 32]>()),
        ours in prop::option::of((any::<u128>(), any::<u128>(), prop::option::of((any::<u64>(), any::<u128>())))),
        physical in any::<bool>(),
    ) {
        let [name, t10, serial, seen] = <[Vec<u8>; 4]>::try_from(strings).unwrap();
        let ours = ours.map(|(array, lun, generation)| Ours {
            array: Uuid::from_u128(array), lun: Uuid::from_u128(lun),
            generation: generation.map(|(counter, id)| Generation { counter, id }),
        });
        let lun = LunIdentity {
            naa, eui: vec![], uuid: uuid.map(Uuid::from_u128), name, t10, serial, vendor, product, revision, sectors,
            logical_block: 512, physical_block: 4096, ours, seen,
            tag: tag.map(|hash| ContentTag { hash, taken_at: 3 }),
        };
        let identity = Identity { mode: if physical { Mode::Physical } else { Mode::Virtual }, lun };
        let record = identity.to_record().unwrap();
        prop_assert_eq!(&Identity::from_record(record.as_bytes()).unwrap(), &identity);
        let mut text = descriptor();
        identity.to_ddb(&mut text).unwrap();
        let text = Descriptor::parse(&text.to_bytes()).unwrap();
        prop_assert_eq!(&Identity::from_ddb(&text).unwrap(), &identity);
    }
}
