use super::*;
use proptest::prelude::*;

/// The virtual RDM of the semantics page.
const MAILDB: &str = r#"# Disk DescriptorFile
version=1
encoding="UTF-8"
CID=5c0e7a31
parentCID=ffffffff
createType="vmfsRawDeviceMap"

# Extent description
RW 1048576000 VMFSRDM "maildb-d-rdm.vmdk"

# The Disk Data Base
#DDB
ddb.adapterType = "lsilogic"
ddb.geometry.cylinders = "65270"
ddb.geometry.heads = "255"
ddb.geometry.sectors = "63"
ddb.uuid = "60 00 C2 9a 11 22 33 44-55 66 77 88 99 aa bb cc"
ddb.virtualHWVersion = "4"
"#;

fn extent(sectors: u64) -> ExtentLine {
    ExtentLine {
        access: Access::ReadWrite,
        sectors,
        kind: ExtentKind::Vmfs,
        file: "d-flat.vmdk".into(),
        offset: 0,
    }
}

fn base(sectors: u64) -> NewDescriptor {
    NewDescriptor {
        cid: Cid(0x1234_5678),
        parent: None,
        create_type: CreateType::Vmfs,
        extents: vec![extent(sectors)],
        ddb: vec![("ddb.thinProvisioned".into(), "1".into())],
    }
}

#[test]
fn r8_the_esx_3_form_is_read_and_written() {
    let maildb = Descriptor::parse(MAILDB.as_bytes()).unwrap();
    assert_eq!(maildb.cid(), Cid(0x5c0e_7a31));
    assert!(!maildb.has_parent());
    assert_eq!(*maildb.create_type(), CreateType::VmfsRawDeviceMap);
    assert_eq!(maildb.sectors(), 1_048_576_000);
    assert_eq!(maildb.extents()[0].file, "maildb-d-rdm.vmdk");
    assert_eq!(maildb.get("DDB.geometry.HEADS"), Some("255"));

    let ours = Descriptor::new(&base(4 << 21)).unwrap();
    let again = Descriptor::parse(&ours.to_bytes()).unwrap();
    assert_eq!(again.get("ddb.geometry.cylinders"), Some("522"));
    assert_eq!(again.get("ddb.thinProvisioned"), Some("1"));
    assert_eq!(again.cid(), Cid(0x1234_5678));
}

#[test]
fn r9_what_we_do_not_know_is_kept_byte_for_byte() {
    let odd = "\n\n#note\r\nVERSION = 3\r\nCID=fffffffe\r\n  strange =  value with \"quotes\" \r\nparentCID=0000000a\n\
        createType=vmfsSparse\nparentFileNameHint=\"a b.vmdk\"\nchangeTrackPath=\"x-ctk.vmdk\"\n\
        RW  2048\tVMFSSPARSE   \"x-000001-delta.vmdk\"\nddb.toolsVersion=\"\u{e9}\"\nddb.vendor.x = \"1\"";
    let mut bytes = odd.as_bytes().to_vec();
    bytes.extend_from_slice(&[b'\n', b'd', b'd', b'b', b'.', b'l', b'=', 0xe9, b'\n', 0, 0, 0]);
    let mut descriptor = Descriptor::parse(&bytes).unwrap();
    assert_eq!(descriptor.to_bytes(), bytes);
    assert_eq!(descriptor.cid(), Cid(0xffff_fffe), "seen on a fresh physical RDM");
    assert_eq!(descriptor.parent_hint(), Some("a b.vmdk"));
    descriptor.set_cid(Cid(7));
    descriptor.set_ddb("ddb.vendor.x", "22").unwrap();
    descriptor.set_ddb("ddb.kagami.new", "y").unwrap();
    let text = descriptor.to_bytes();
    let text = String::from_utf8_lossy(&text);
    assert!(
        text.starts_with(
            "\n\n#note\r\nVERSION = 3\r\nCID=00000007\r\n  strange =  value with \"quotes\" \r\n"
        )
    );
    assert!(text.contains("ddb.vendor.x = \"22\"\n"));
    assert!(text.contains("ddb.kagami.new = \"y\"\n\0\0\0"), "{text}");
    let again = Descriptor::parse(&descriptor.to_bytes()).unwrap();
    assert_eq!((again.cid(), again.get("ddb.kagami.new")), (Cid(7), Some("y")));
}

#[test]
fn the_geometry_agrees_with_published_descriptors() {
    for (sectors, cylinders, heads, per_track) in [
        (1_048_576_000, 65270, 255, 63),
        (937_703_088, 58369, 255, 63),
        (2_097_151, 1023, 64, 32),
        (2_097_152, 512, 128, 32),
        (4_194_303, 1023, 128, 32),
        (4_194_304, 261, 255, 63),
        (0, 0, 64, 32),
    ] {
        assert_eq!(Geometry::of(sectors), Geometry { cylinders, heads, sectors: per_track });
    }
}

#[test]
fn all_create_types_are_recognised() {
    for (word, kind) in [
        ("vmfs", ExtentKind::Vmfs),
        ("vmfsPreallocated", ExtentKind::Vmfs),
        ("vmfsEagerZeroedThick", ExtentKind::Vmfs),
        ("vmfsThin", ExtentKind::Vmfs),
        ("vmfsRawDeviceMap", ExtentKind::VmfsRdm),
        ("vmfsRDM", ExtentKind::VmfsRdm),
        ("vmfsPassthroughRawDeviceMap", ExtentKind::VmfsRdm),
        ("vmfsRDMP", ExtentKind::VmfsRdm),
        ("vmfsSparse", ExtentKind::VmfsSparse),
        ("seSparse", ExtentKind::SeSparse),
        ("vmfsRaw", ExtentKind::VmfsRaw),
        ("monolithicSparse", ExtentKind::Sparse),
        ("streamOptimized", ExtentKind::Sparse),
        ("twoGbMaxExtentSparse", ExtentKind::Sparse),
        ("twoGbMaxExtentFlat", ExtentKind::Flat),
        ("monolithicFlat", ExtentKind::Flat),
    ] {
        let text = MAILDB.replace("vmfsRawDeviceMap", word);
        let parsed = Descriptor::parse(text.as_bytes()).unwrap();
        assert_eq!(parsed.create_type().extent_kind(), Some(kind), "{word}");
        assert_eq!(parsed.to_bytes(), text.as_bytes());
    }
    let text = MAILDB.replace("vmfsRawDeviceMap", "vmfsNext");
    let parsed = Descriptor::parse(text.as_bytes()).unwrap();
    assert_eq!(*parsed.create_type(), CreateType::Other("vmfsNext".into()));
}

#[test]
fn hostile_text_is_refused_with_the_line() {
    let refuse = |text: &str| Descriptor::parse(text.as_bytes()).unwrap_err();
    assert_eq!(refuse(""), DescriptorError::NotADescriptor { line: 0 });
    assert_eq!(refuse("# x\nKDMV\n"), DescriptorError::NotADescriptor { line: 2 });
    assert_eq!(refuse("version=4\n"), DescriptorError::NotADescriptor { line: 1 });
    assert_eq!(refuse(&MAILDB.replace("CID=5c0e7a31\n", "")), DescriptorError::Missing { what: "CID" });
    let second = MAILDB.replace("parentCID=ffffffff", "CID=00000001");
    assert!(matches!(refuse(&second), DescriptorError::Twice { line: 5, .. }));
    for (old, new) in [
        ("1048576000 VMFSRDM", "x VMFSRDM"),
        ("1048576000 VMFSRDM", "18446744073709551615 VMFSRDM"),
        ("1048576000 VMFSRDM", "1"),
        ("\"maildb-d-rdm.vmdk\"", "\"open"),
        ("\"maildb-d-rdm.vmdk\"", ""),
        ("CID=5c0e7a31", "CID=5c0e7a31a"),
        ("CID=5c0e7a31", "CID=+c0e7a31"),
        ("#DDB", "garbage"),
    ] {
        let text = MAILDB.replacen(old, new, 1);
        assert!(matches!(refuse(&text), DescriptorError::Corrupt { .. }), "{new}");
    }
    // Torn anywhere: refused, or still a whole disk (only the disk database is cut).
    for cut in 0..MAILDB.len() {
        if let Ok(torn) = Descriptor::parse(&MAILDB.as_bytes()[..cut]) {
            assert_eq!(torn.sectors(), 1_048_576_000, "cut at {cut}");
        }
    }
    let large = vec![b'\n'; MAX_BYTES + 1];
    assert!(matches!(Descriptor::parse(&large), Err(DescriptorError::TooLarge { .. })));
}

#[test]
fn values_that_would_break_the_text_are_refused() {
    let mut descriptor = Descriptor::parse(MAILDB.as_bytes()).unwrap();
    for bad in ["a\"b", "a\nb", "a\rb", "a\0b"] {
        assert!(matches!(descriptor.set_ddb("ddb.x", bad), Err(DescriptorError::BadValue { .. })));
    }
    assert_eq!(descriptor.to_bytes(), MAILDB.as_bytes());
}

#[test]
fn growing_an_extent_moves_the_geometry() {
    let mut descriptor = Descriptor::parse(MAILDB.as_bytes()).unwrap();
    let mut larger = descriptor.extents()[0].clone();
    larger.sectors = 937_703_088;
    descriptor.set_extent(0, larger).unwrap();
    assert_eq!(descriptor.get("ddb.geometry.cylinders"), Some("58369"));
    let again = Descriptor::parse(&descriptor.to_bytes()).unwrap();
    assert_eq!(again.sectors(), 937_703_088);
    assert_eq!(again, descriptor);
}

#[test]
fn the_long_content_id_follows_the_cid() {
    let mut new = base(2048);
    new.ddb.push(("ddb.longContentID".into(), long_content_id(new.cid)));
    let mut descriptor = Descriptor::new(&new).unwrap();
    let before = descriptor.get("ddb.longContentID").unwrap().to_owned();
    assert!(before.len() == 32 && before.ends_with("12345678"));
    descriptor.set_cid(Cid(0xabcdef));
    let after = descriptor.get("ddb.longContentID").unwrap();
    assert!(after.ends_with("00abcdef") && after[..24] != before[..24]);
    assert_eq!(new_disk_uuid().len(), "60 00 C2 9a 11 22 33 44-55 66 77 88 99 aa bb cc".len());
}

proptest! {
    #[test]
    fn fuzz_any_bytes_are_refused_or_kept(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        if let Ok(parsed) = Descriptor::parse(&bytes) {
            prop_assert_eq!(parsed.to_bytes(), bytes);
        }
    }

    #[test]
    fn a_mutated_descriptor_is_refused_or_kept(
        changes in prop::collection::vec((0..MAILDB.len(), any::<u8>()), 0..12),
    ) {
        let mut bytes = MAILDB.as_bytes().to_vec();
        for (at, value) in changes {
            bytes[at] = value;
        }
        if let Ok(mut parsed) = Descriptor::parse(&bytes) {
            prop_assert_eq!(parsed.to_bytes(), bytes);
            parsed.set_cid(Cid(1));
            parsed.set_parent_cid(Cid(2));
            parsed.set_ddb("ddb.kagami.x", "1").unwrap();
            let again = Descriptor::parse(&parsed.to_bytes()).unwrap();
            prop_assert_eq!((again.cid(), again.parent_cid()), (Cid(1), Cid(2)));
            prop_assert_eq!(again.get("ddb.kagami.x"), Some("1"));
        }
    }

    #[test]
    fn what_is_written_reads_back(
        cid in any::<u32>(),
        parent in prop::option::of((any::<u32>(), "[a-zA-Z0-9 ._-]{1,40}")),
        extents in prop::collection::vec((0u64..1 << 30, "[a-zA-Z0-9 ._()-]{1,40}", 0u64..1 << 20), 1..8),
        ddb in prop::collection::vec(("ddb\\.[a-z.]{1,20}", "[ -!#-~]{0,40}"), 0..8),
    ) {
        let new = NewDescriptor {
            cid: Cid(cid),
            parent: parent.map(|(cid, name)| (Cid(cid), name)),
            create_type: CreateType::TwoGbMaxExtentFlat,
            extents: extents.into_iter().map(|(sectors, file, offset)| ExtentLine {
                access: Access::ReadWrite, sectors, kind: ExtentKind::Flat, file, offset,
            }).collect(),
            ddb,
        };
        let made = Descriptor::new(&new).unwrap();
        let read = Descriptor::parse(&made.to_bytes()).unwrap();
        prop_assert_eq!(&read, &made);
        prop_assert_eq!(read.cid(), new.cid);
        prop_assert_eq!(read.parent_cid(), new.parent.as_ref().map_or(NO_PARENT, |p| p.0));
        prop_assert_eq!(read.parent_hint().map(str::to_owned), new.parent.map(|p| p.1).filter(|n| !n.is_empty()));
        prop_assert_eq!(read.extents(), &new.extents[..]);
        for (index, (key, value)) in new.ddb.iter().enumerate() {
            if !new.ddb[..index].iter().any(|(k, _)| k == key) {
                prop_assert_eq!(read.get(key), Some(value.as_str()));
            }
        }
    }
}

/// A key may stand there twice as long as both say the same; what is changed says the same in both still.
#[test]
fn a_content_id_that_is_said_twice_is_changed_twice() {
    let twice = MAILDB.replace("CID=5c0e7a31\n", "CID=5c0e7a31\nCID=5c0e7a31\n");
    let mut descriptor = Descriptor::parse(twice.as_bytes()).unwrap();
    descriptor.set_cid(Cid(0x1234_5678));
    let again = Descriptor::parse(&descriptor.to_bytes()).unwrap();
    assert_eq!(again.cid(), Cid(0x1234_5678));
}
