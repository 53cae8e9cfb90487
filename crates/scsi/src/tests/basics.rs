//! INQUIRY, capacity, modes, reports.

use super::*;
use crate::sense::asc;

#[test]
fn standard_inquiry_spc4_6_6_2() {
    lane::block_on(async {
        let nexus = Bench::new().nexus(1);
        let data = get(&nexus, &[0x12, 0, 0, 0, 255, 0]).await;
        assert_eq!(data.len(), 96);
        assert_eq!(data[..8], [0, 0, 6, 0x12, 91, 0x18, 0x10, 2]);
        assert_eq!(&data[8..32], b"KAGAMI  LUN             ");
        assert_eq!(data[58..64], [0x00, 0xa0, 0x04, 0x60, 0x04, 0xc0]);
        let (reply, data) = run(&nexus, &[0x12, 0, 0, 0, 36, 0], &[], 255).await;
        assert_eq!((data.len(), reply.in_wanted), (36, 36), "cut at the allocation length");
        let (reply, data) = run(&nexus, &[0x12, 0, 0, 0, 96, 0], &[], 10).await;
        assert_eq!((data.len(), reply.in_wanted), (10, 96), "cut at what was offered: an overflow");
        refused(&nexus, &[0x12, 0, 0x83, 0, 255, 0], &[], Sense::cdb(2, None)).await;
        refused(&nexus, &[0x12, 1, 0x84, 0, 255, 0], &[], Sense::cdb(2, None)).await;
        refused(&nexus, &[0x12, 2, 0, 0, 255, 0], &[], Sense::cdb(1, Some(1))).await;
    });
}

#[test]
fn vital_product_data() {
    lane::block_on(async {
        let settings = Settings { atomic_blocks: 256, ..Settings::default() };
        let nexus = Bench::with(Rc::new(MemoryDisk::new(BLOCKS)), settings).nexus(1);
        let mut pages = Vec::new();
        for page in get(&nexus, &[0x12, 1, 0, 0, 255, 0]).await[4..].iter().copied() {
            let data = get(&nexus, &[0x12, 1, page, 2, 0, 0]).await;
            assert_eq!((data[0], data[1]), (0, page));
            assert_eq!(usize::from(u16::from_be_bytes([data[2], data[3]])), data.len() - 4);
            pages.push((page, data));
        }
        let page = |code: u8| &pages.iter().find(|p| p.0 == code).unwrap().1;
        assert_eq!(
            pages.iter().map(|p| p.0).collect::<Vec<_>>(),
            [0, 0x80, 0x83, 0x86, 0x8f, 0xb0, 0xb1, 0xb2]
        );
        assert_eq!(&page(0x80)[4..], b"0123456789abcdef0123456789abcdef");
        assert_eq!((page(0xb0).len(), page(0xb1).len(), page(0xb2).len(), page(0x86).len()), (64, 64, 8, 64));
        assert_eq!(page(0xb0)[44..48], [0, 0, 1, 0]);
        assert_eq!(page(0xb2)[5], 0xe4, "LBPU LBPWS LBPWS10 LBPRZ");
        // VPD 83: the LUN's NAA and UUID, the port's identifiers and names (DESIGN section 3).
        let mut rest = &page(0x83)[4..];
        let mut kinds = Vec::new();
        while !rest.is_empty() {
            let length = usize::from(rest[3]);
            kinds.push((rest[0], rest[1], rest[4..4 + length].to_vec()));
            rest = &rest[4 + length..];
        }
        let heads: Vec<_> = kinds.iter().map(|k| (k.0, k.1)).collect();
        assert_eq!(heads, [(1, 3), (1, 0x0a), (2, 1), (1, 0x14), (1, 0x15), (0x53, 0x98), (0x53, 0xa8)]);
        assert_eq!(kinds[0].2, [0x60; 16]);
        assert_eq!(kinds[1].2[..4], [0x10, 0, 0x01, 0x23]);
        assert_eq!(kinds[3].2, [0, 0, 0, 1]);
        assert!(
            kinds[5].2.starts_with(b"iqn.2026-01.test:t,t,0x0001\0") && kinds[5].2.len().is_multiple_of(4)
        );
    });
}

#[test]
fn capacity() {
    lane::block_on(async {
        let disk = Rc::new(MemoryDisk::new(BLOCKS));
        let bench = Bench::with(Rc::clone(&disk) as _, Settings::default());
        let nexus = bench.nexus(1);
        assert_eq!(get(&nexus, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]).await, [0, 0, 0x0f, 0xff, 0, 0, 2, 0]);
        let long = [0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0];
        let data = get(&nexus, &long).await;
        assert_eq!(
            (data.len(), &data[..16]),
            (32, &[0, 0, 0, 0, 0, 0, 0x0f, 0xff, 0, 0, 2, 0, 0, 3, 0xc0, 0][..])
        );
        disk.resize(BLOCKS << 30);
        bench.unit.capacity_changed();
        let event = nexus.event().await;
        assert_eq!(event.code, asc::POWER_ON, "the first event is the first attention");
        assert_eq!(nexus.event().await.code, asc::CAPACITY_CHANGED);
        assert_eq!(attention(&nexus).await, Some(asc::CAPACITY_CHANGED));
        assert_eq!(attention(&nexus).await, None);
        assert_eq!(get(&nexus, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]).await[..4], [0xff; 4]);
        assert_eq!(get(&nexus, &long).await[..8], [0, 0, 3, 0xff, 0xff, 0xff, 0xff, 0xff]);
    });
}

#[test]
fn attentions_are_per_nexus_and_inquiry_does_not_tell_sam5_5_14() {
    lane::block_on(async {
        let bench = Bench::new();
        let one = Nexus::new(initiator(1), Rc::clone(&bench.luns));
        get(&one, &[0x12, 0, 0, 0, 36, 0]).await;
        assert_eq!(attention(&one).await, Some(asc::POWER_ON));
        assert_eq!(attention(&one).await, None);
        let two = bench.nexus(2);
        bench.unit.capacity_changed();
        // REQUEST SENSE takes it, as data.
        let sense = get(&two, &[3, 0, 0, 0, 252, 0]).await;
        assert_eq!((sense[2], sense[12], sense[13]), (6, 0x2a, 0x09));
        assert_eq!(attention(&two).await, None);
        assert_eq!(attention(&one).await, Some(asc::CAPACITY_CHANGED));
    });
}

#[test]
fn r3_report_luns_and_what_is_not_there() {
    lane::block_on(async {
        let bench = Bench::new();
        let nexus = bench.nexus(1);
        bench.luns.add(300, Rc::clone(&bench.unit) as _);
        assert!(!bench.luns.add(300, Rc::clone(&bench.unit) as _));
        let report = |select: u8| [0xa0, 0, select, 0, 0, 0, 0, 0, 1, 0, 0, 0];
        let data = get(&nexus, &report(2)).await;
        assert_eq!(data[..8], [0, 0, 0, 16, 0, 0, 0, 0]);
        assert_eq!(data[8..], [[0, 0, 0, 0, 0, 0, 0, 0], [0x41, 0x2c, 0, 0, 0, 0, 0, 0]].concat());
        assert_eq!(get(&nexus, &report(1)).await, [0; 8]);
        refused(&nexus, &report(3), &[], Sense::cdb(2, Some(7))).await;
        assert_eq!(attention(&nexus).await, None, "REPORT LUNS has taken the attention away");
        bench.luns.remove(300);
        assert_eq!(attention(&nexus).await, Some(asc::REPORTED_LUNS_CHANGED));
        let (reply, data) = run_at(&nexus, 5, &[0x12, 0, 0, 0, 36, 0], &[], 255).await;
        assert_eq!((reply.status, data[0]), (Status::Good, 0x7f));
        let (reply, data) = run_at(&nexus, 5, &[0x03, 0, 0, 0, 36, 0], &[], 255).await;
        assert_eq!((reply.status, data[2], data[12]), (Status::Good, 5, 0x25));
        let (reply, _) = run_at(&nexus, 5, &[0; 6], &[], 0).await;
        assert_eq!(reply.sense, Sense::illegal(asc::LOGICAL_UNIT_NOT_SUPPORTED).encode(false));
    });
}

#[test]
fn mode_sense_and_select() {
    lane::block_on(async {
        let bench = Bench::new();
        let (one, two) = (bench.nexus(1), bench.nexus(2));
        let all = get(&one, &[0x1a, 0, 0x3f, 0, 255, 0]).await;
        assert_eq!(usize::from(all[0]) + 1, all.len());
        assert_eq!((all[2], all[3]), (0x10, 8), "DPOFUA; one block descriptor");
        assert_eq!(all.len(), 4 + 8 + 12 + 20 + 12 + 12);
        let long = get(&one, &[0x5a, 0x10, 0x3f, 0xff, 0, 0, 0, 2, 0, 0]).await;
        assert_eq!((long.len(), long[4], long[7]), (8 + 16 + 56, 1, 16), "the long descriptor");
        let caching = get(&one, &[0x1a, 8, 8, 0, 255, 0]).await;
        assert_eq!((caching.len(), caching[4], caching[5], caching[6]), (24, 0x88, 18, 4), "WCE");
        let mask = get(&one, &[0x1a, 8, 0x48, 0, 255, 0]).await;
        assert_eq!((mask[6], mask[7..].iter().all(|b| *b == 0)), (4, true), "only WCE can be changed");
        refused(&one, &[0x1a, 8, 0x05, 0, 255, 0], &[], Sense::cdb(2, Some(5))).await;
        refused(&one, &[0x1a, 8, 0x08, 1, 255, 0], &[], Sense::cdb(3, None)).await;

        // WCE off, from a list with what MODE SENSE said, for everybody.
        let mut list = get(&one, &[0x1a, 8, 8, 0, 255, 0]).await;
        (list[0], list[6]) = (0, 0);
        put(&one, &[0x15, 0x10, 0, 0, 24, 0], &list).await;
        assert_eq!(attention(&two).await, Some(asc::MODE_PARAMETERS_CHANGED));
        assert_eq!(attention(&one).await, None);
        assert_eq!(get(&two, &[0x1a, 8, 8, 0, 255, 0]).await[6], 0);
        assert_eq!(get(&two, &[0x1a, 8, 0xc8, 0, 255, 0]).await[6], 4, "not saved");
        put(&one, &[0x15, 0x11, 0, 0, 24, 0], &list).await;
        assert_eq!(get(&two, &[0x1a, 8, 0xc8, 0, 255, 0]).await[6], 0, "saved with SP");
        let again = LogicalUnit::new(
            Rc::new(MemoryDisk::new(8)),
            identity(),
            Settings::default(),
            Rc::clone(&bench.keep) as _,
            &bench.keep.record(),
        );
        assert!(!again.unwrap().modes.get().write_cache, "through a restart");

        let wrong = |at: usize, value: u8| {
            let mut list = list.clone();
            list[at] = value;
            list
        };
        let select = [0x15, 0x10, 0, 0, 24, 0];
        refused(&one, &select, &wrong(7, 1), Sense::parameter(7, Some(0))).await;
        refused(&one, &select, &wrong(5, 17), Sense::parameter(5, None)).await;
        refused(&one, &select, &wrong(4, 9), Sense::parameter(4, Some(5))).await;
        refused(&one, &select, &wrong(3, 7), Sense::parameter(3, None)).await;
        let short = Sense::illegal(asc::PARAMETER_LIST_LENGTH_ERROR);
        refused(&one, &[0x15, 0x10, 0, 0, 23, 0], &list[..23], short).await;
        refused(&one, &select, &list[..10], short).await;
        put(&one, &[0x15, 0x10, 0, 0, 0, 0], &[]).await;
    });
}

#[test]
fn write_protect_and_descriptor_sense_of_the_control_page() {
    lane::block_on(async {
        let bench = Bench::new();
        let nexus = bench.nexus(1);
        let mut list = get(&nexus, &[0x5a, 8, 0x0a, 0, 0, 0, 0, 1, 0, 0]).await;
        (list[1], list[8 + 4], list[8 + 2]) = (0, 0x08, 0x04);
        put(&nexus, &[0x55, 0x10, 0, 0, 0, 0, 0, 0, 20, 0], &list).await;
        let (reply, _) = run(&nexus, &cdb10(0x2a, 0, 0, 1), &[1; 512], 0).await;
        let sense = Sense::new(Key::DataProtect, asc::SOFTWARE_WRITE_PROTECTED);
        assert_eq!(reply.sense, sense.encode(true));
        assert_eq!(get(&nexus, &[0x1a, 8, 8, 0, 255, 0]).await[2], 0x90, "WP");
        drop(nexus.manage(lun_bytes(0), crate::Function::LogicalUnitReset));
        let (reply, _) = run(&nexus, &[0; 6], &[], 0).await;
        assert_eq!((reply.sense[0], reply.sense[12]), (0x70, 0x29), "fixed format after the reset");
        put(&nexus, &cdb10(0x2a, 0, 0, 1), &[1; 512]).await;
    });
}

#[test]
fn supported_opcodes_say_what_is_accepted_spc4_6_35() {
    lane::block_on(async {
        let bench = Bench::new();
        let nexus = bench.nexus(1);
        let ask = |option: u8, code: u8, action: u16| {
            let a = action.to_be_bytes();
            [0xa3, 0x0c, option, code, a[0], a[1], 0, 1, 0, 0, 0, 0]
        };
        let all = get(&nexus, &ask(0, 0, 0)).await;
        assert_eq!(u32::from_be_bytes([all[0], all[1], all[2], all[3]]) as usize, all.len() - 4);
        let lines: Vec<&[u8]> = all[4..].chunks(8).collect();
        assert!(!lines.iter().any(|l| l[0] == 0x48 || l[0] == 0x9c), "what is switched off is not reported");
        for line in &lines {
            let (option, action) = if line[5] & 1 != 0 { (2, line[3]) } else { (1, 0) };
            let one = get(&nexus, &ask(option, line[0], u16::from(action))).await;
            assert_eq!((one[1], one[3]), (3, line[7]));
            assert_eq!(one.len(), 4 + usize::from(line[7]));
            assert_eq!(one[4], line[0]);
        }
        assert_eq!(get(&nexus, &ask(1, 0x48, 0)).await[1], 1, "not supported");
        assert_eq!(get(&nexus, &ask(3, 0x5f, 0x1e)).await[1], 1);
        assert_eq!(get(&nexus, &ask(0x83, 0x28, 0)).await.len(), 4 + 10 + 12, "with a timeouts descriptor");
        refused(&nexus, &ask(1, 0x5f, 0), &[], Sense::cdb(2, Some(2))).await;
        refused(&nexus, &ask(2, 0x28, 0), &[], Sense::cdb(2, Some(2))).await;
        refused(&nexus, &ask(4, 0x28, 0), &[], Sense::cdb(2, Some(2))).await;
        assert_eq!(get(&nexus, &[0xa3, 0x0d, 0x80, 0, 0, 0, 0, 0, 0, 16, 0, 0]).await.len(), 16);
        assert_eq!(get(&nexus, &[0xa3, 0x0d, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0]).await, [0xde, 7, 0, 0]);
    });
}

#[test]
fn ports_logs_defects_start_stop() {
    lane::block_on(async {
        let bench = Bench::new();
        let nexus = bench.nexus(1);
        let second = LunMap::new(port(2));
        second.add(0, Rc::clone(&bench.unit) as _);
        let groups = get(&nexus, &[0xa3, 0x0a, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]).await;
        assert_eq!(
            groups,
            [[0, 0, 0, 16, 0, 1, 0, 1, 0, 0, 0, 2].to_vec(), vec![0, 0, 0, 1, 0, 0, 0, 2]].concat()
        );
        let extended = get(&nexus, &[0xa3, 0x2a, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]).await;
        assert_eq!(extended[..8], [0, 0, 0, 20, 0x10, 0, 0, 0]);
        assert_eq!(get(&nexus, &[0x4d, 0, 0x40, 0, 0, 0, 0, 0, 255, 0]).await, [0, 0, 0, 2, 0, 0x2f]);
        assert_eq!(get(&nexus, &[0x4d, 0, 0x6f, 0, 0, 0, 0, 0, 255, 0]).await.len(), 12);
        refused(&nexus, &[0x4d, 0, 0x41, 0, 0, 0, 0, 0, 255, 0], &[], Sense::cdb(2, Some(5))).await;
        assert_eq!(get(&nexus, &[0x37, 0, 0x18, 0, 0, 0, 0, 0, 8, 0]).await, [0, 0x18, 0, 0]);
        assert_eq!(
            get(&nexus, &[0xb7, 0x1d, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0]).await,
            [0, 0x1d, 0, 0, 0, 0, 0, 0]
        );
        put(&nexus, &[0x1b, 0, 0, 0, 0, 0], &[]).await;
        put(&nexus, &[0x1b, 0, 0, 0, 1, 0], &[]).await;
        refused(&nexus, &[0x1b, 0, 0, 0, 2, 0], &[], Sense::cdb(4, Some(1))).await;
        refused(&nexus, &[0x1b, 0, 0, 0, 0x10, 0], &[], Sense::cdb(4, Some(4))).await;
        put(&nexus, &[0x1e, 0, 0, 0, 1, 0], &[]).await;
    });
}
