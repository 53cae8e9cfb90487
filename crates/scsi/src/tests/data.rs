//! Commands that move data, in every length, at the ends, with too little and too much.

use super::*;
use block::{Extents, Sector};

use crate::sense::asc;
use crate::unit::limits;

fn pattern(seed: u8, blocks: usize) -> Vec<u8> {
    (0..blocks * 512).map(|n| (n / 512 * 7 + n) as u8 ^ seed).collect()
}

const OUT_OF_RANGE: Sense = Sense::illegal(asc::LBA_OUT_OF_RANGE);
const MISCOMPARE: Sense = Sense::new(Key::Miscompare, asc::MISCOMPARE_DURING_VERIFY);

/// READ and WRITE of each length, by their codes.
fn forms(read: bool, lba: u32, blocks: u16) -> Vec<Vec<u8>> {
    let l = lba.to_be_bytes();
    let code = |r: u8, w: u8| if read { r } else { w };
    vec![
        vec![code(0x08, 0x0a), l[1], l[2], l[3], blocks as u8, 0],
        cdb10(code(0x28, 0x2a), 0, lba, blocks),
        cdb12(code(0xa8, 0xaa), 0, lba, u32::from(blocks)),
        cdb16(code(0x88, 0x8a), 0, u64::from(lba), u32::from(blocks)),
    ]
}

#[test]
fn what_one_form_writes_every_form_reads() {
    lane::block_on(async {
        let nexus = Bench::new().nexus(1);
        for (index, write) in forms(false, 77, 5).into_iter().enumerate() {
            let data = pattern(index as u8, 5);
            put(&nexus, &write, &data).await;
            for read in forms(true, 77, 5) {
                assert_eq!(get(&nexus, &read).await, data);
            }
        }
        // The last block; one too far; LBA plus length that overflows; nothing at the end.
        let end = BLOCKS as u32;
        for read in forms(true, end - 1, 1) {
            assert_eq!(get(&nexus, &read).await.len(), 512);
        }
        let beyond = OUT_OF_RANGE.with_information(BLOCKS);
        for read in forms(true, end - 1, 2) {
            refused(&nexus, &read, &[], beyond).await;
        }
        for write in forms(false, end, 1) {
            refused(&nexus, &write, &[1; 512], beyond).await;
        }
        refused(&nexus, &cdb16(0x88, 0, u64::MAX, 1), &[], OUT_OF_RANGE.with_information(u64::MAX)).await;
        refused(&nexus, &cdb16(0x88, 0, u64::MAX, 0), &[], OUT_OF_RANGE.with_information(u64::MAX)).await;
        assert!(get(&nexus, &cdb10(0x28, 0, 0, 0)).await.is_empty());
        let (reply, data) = run(&nexus, &[0x08, 0, 0, 0, 0, 0], &[], 1 << 20).await;
        assert_eq!((reply.status, data.len()), (Status::Good, 256 * 512), "zero means 256 in six bytes");
    });
}

#[test]
fn one_command_is_bounded() {
    lane::block_on(async {
        let bench = Bench::with(Rc::new(MemoryDisk::new(1 << 30)), Settings::default());
        let nexus = bench.nexus(1);
        let most = limits::TRANSFER_BLOCKS as u32;
        refused(&nexus, &cdb16(0x88, 0, 0, most + 1), &[], Sense::cdb(10, None)).await;
        refused(&nexus, &cdb12(0xa8, 0, 0, most + 1), &[], Sense::cdb(6, None)).await;
        let offered = Offered { out: u64::MAX, into: u64::MAX };
        let command = nexus.begin(lun_bytes(0), 1, Attribute::Simple, &cdb16(0x88, 0, 0, most), offered);
        assert_eq!((command.in_bytes(), command.out_bytes()), (32 << 20, 0));
        for cdb in [
            vec![0x12, 0, 0, 0xff, 0xff, 0],
            vec![0xa0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
            vec![0xa3, 0x0c, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
        ] {
            let command = nexus.begin(lun_bytes(0), 1, Attribute::Simple, &cdb, offered);
            assert!(command.in_bytes() as u64 <= limits::PARAMETER_BYTES);
        }
        let list = nexus.begin(
            lun_bytes(0),
            1,
            Attribute::Simple,
            &[0x5f, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0],
            offered,
        );
        assert_eq!(list.out_bytes(), 0);
    });
}

#[test]
fn residuals() {
    lane::block_on(async {
        let nexus = Bench::new().nexus(1);
        let data = pattern(3, 4);
        put(&nexus, &cdb10(0x2a, 0, 0, 4), &data).await;
        for room in [0, 1, 511, 512, 700, 1024, 2047] {
            let (reply, got) = run(&nexus, &cdb10(0x28, 0, 0, 4), &[], room).await;
            assert_eq!((reply.status, reply.in_wanted, reply.in_moved), (Status::Good, 2048, room));
            assert_eq!(got, data[..room]);
        }
        let (reply, _) = run(&nexus, &cdb10(0x28, 0, 0, 1), &[], 10_000).await;
        assert_eq!((reply.in_wanted, reply.in_moved), (512, 512), "underflow is the front end's to say");
        // Of a write the whole blocks that came are written.
        let (reply, _) = run(&nexus, &cdb10(0x2a, 0, 0, 2), &[9; 700], 0).await;
        assert_eq!((reply.status, reply.out_wanted), (Status::Good, 1024));
        let after = get(&nexus, &cdb10(0x28, 0, 0, 4)).await;
        assert_eq!((&after[..512], &after[512..]), (&[9; 512][..], &data[512..]));
        let (reply, _) = run(&nexus, &cdb10(0x2a, 0, 0, 1), &[8; 2000], 0).await;
        assert_eq!((reply.status, reply.out_wanted), (Status::Good, 512));
        assert_eq!(get(&nexus, &cdb10(0x28, 0, 1, 1)).await, data[512..1024]);
    });
}

#[test]
fn protection_and_reserved_bits_are_refused() {
    lane::block_on(async {
        let nexus = Bench::new().nexus(1);
        for protect in 1..8u8 {
            let bit = 7 - (protect << 5).leading_zeros() as u8;
            refused(&nexus, &cdb10(0x28, protect << 5, 0, 1), &[], Sense::cdb(1, Some(bit))).await;
            refused(&nexus, &cdb16(0x8a, protect << 5, 0, 1), &[0; 512], Sense::cdb(1, Some(bit))).await;
        }
        for flags in [0, 0x08, 0x10, 0x18] {
            put(&nexus, &cdb10(0x2a, flags, 0, 1), &[0; 512]).await;
            get(&nexus, &cdb12(0xa8, flags, 0, 1)).await;
        }
    });
}

#[test]
fn verify_sbc3_5_33() {
    lane::block_on(async {
        let nexus = Bench::new().nexus(1);
        let data = pattern(1, 3);
        put(&nexus, &cdb10(0x2a, 0, 5, 3), &data).await;
        for make in [
            |flags, blocks: u16| cdb10(0x2f, flags, 5, blocks),
            |flags, blocks: u16| cdb12(0xaf, flags, 5, blocks.into()),
            |flags, blocks: u16| cdb16(0x8f, flags, 5, blocks.into()),
        ] {
            put(&nexus, &make(0, 3), &[]).await;
            put(&nexus, &make(2, 3), &data).await;
            let mut other = data.clone();
            other[1535] ^= 1;
            refused(&nexus, &make(2, 3), &other, MISCOMPARE).await;
            put(&nexus, &make(0, 3), &other).await;
            put(&nexus, &make(6, 1), &data[..512]).await;
            refused(&nexus, &make(6, 2), &data[..512], MISCOMPARE).await;
            refused(&nexus, &make(4, 1), &data[..512], Sense::cdb(1, Some(2))).await;
            refused(&nexus, &make(2, 3), &data[..1000], Sense::illegal(asc::PARAMETER_LIST_LENGTH_ERROR))
                .await;
            put(&nexus, &make(2, 0), &[]).await;
        }
        refused(&nexus, &cdb10(0x2f, 0, BLOCKS as u32, 1), &[], OUT_OF_RANGE.with_information(BLOCKS)).await;
    });
}

#[test]
fn write_and_verify_and_orwrite() {
    lane::block_on(async {
        let nexus = Bench::new().nexus(1);
        let data = pattern(2, 2);
        for flags in [0, 2] {
            put(&nexus, &cdb10(0x2e, flags, 9, 2), &data).await;
            put(&nexus, &cdb12(0xae, flags, 9, 2), &data).await;
            put(&nexus, &cdb16(0x8e, flags, 9, 2), &data).await;
        }
        refused(&nexus, &cdb10(0x2e, 4, 9, 2), &data, Sense::cdb(1, Some(2))).await;
        let other = pattern(0x80, 2);
        put(&nexus, &cdb16(0x8b, 0, 9, 2), &other).await;
        let or: Vec<u8> = data.iter().zip(&other).map(|(a, b)| a | b).collect();
        assert_eq!(get(&nexus, &cdb10(0x28, 0, 9, 2)).await, or);
        put(&nexus, &cdb16(0x8b, 0, 9, 0), &[]).await;
    });
}

#[test]
fn compare_and_write_sbc3_5_2() {
    lane::block_on(async {
        let nexus = Bench::new().nexus(1);
        let (old, new) = (pattern(1, 2), pattern(2, 2));
        let cdb = |blocks: u32| cdb16(0x89, 0, 20, blocks);
        put(&nexus, &cdb10(0x2a, 0, 20, 2), &old).await;
        put(&nexus, &cdb(2), &[old.clone(), new.clone()].concat()).await;
        assert_eq!(get(&nexus, &cdb10(0x28, 0, 20, 2)).await, new);
        let mut wrong = new.clone();
        wrong[600] ^= 4;
        let miscompare = MISCOMPARE.with_information(600);
        refused(&nexus, &cdb(2), &[wrong, old.clone()].concat(), miscompare).await;
        assert_eq!(get(&nexus, &cdb10(0x28, 0, 20, 2)).await, new, "nothing was written");
        refused(&nexus, &cdb(1), &[old.clone(), new.clone()].concat(), Sense::cdb(13, None)).await;
        refused(&nexus, &cdb(3), &[old, new].concat(), Sense::cdb(13, None)).await;
        put(&nexus, &cdb(0), &[]).await;
        let most = limits::COMPARE_AND_WRITE_BLOCKS as u32;
        let data = vec![0; 1024 * (most as usize + 1)];
        refused(&nexus, &cdb16(0x89, 0, 100, most + 1), &data, Sense::cdb(13, None)).await;
        put(&nexus, &cdb16(0x89, 0, 100, most), &data[..1024 * most as usize]).await;
    });
}

#[test]
fn write_atomic_only_where_the_disk_is_known_to_be() {
    lane::block_on(async {
        let cdb = |blocks: u16, boundary: u16| {
            let mut cdb = cdb16(0x9c, 0, 8, 0);
            cdb[10..12].copy_from_slice(&boundary.to_be_bytes());
            cdb[12..14].copy_from_slice(&blocks.to_be_bytes());
            cdb
        };
        let nexus = Bench::new().nexus(1);
        refused(&nexus, &cdb(1, 0), &[1; 512], Sense::illegal(asc::INVALID_OPCODE)).await;
        let settings = Settings { atomic_blocks: 16, ..Settings::default() };
        let nexus = Bench::with(Rc::new(MemoryDisk::new(BLOCKS)), settings).nexus(1);
        put(&nexus, &cdb(16, 0), &[1; 8192]).await;
        refused(&nexus, &cdb(17, 0), &[1; 8704], Sense::cdb(12, None)).await;
        refused(&nexus, &cdb(8, 8), &[1; 4096], Sense::cdb(10, None)).await;
        refused(&nexus, &cdb(2, 0), &[2; 600], Sense::illegal(asc::PARAMETER_LIST_LENGTH_ERROR)).await;
        assert_eq!(get(&nexus, &cdb10(0x28, 0, 8, 1)).await, [1; 512], "not even half");
    });
}

#[test]
fn write_same_sbc3_5_43() {
    lane::block_on(async {
        let disk = Rc::new(MemoryDisk::new(BLOCKS));
        let nexus = Bench::with(Rc::clone(&disk) as _, Settings::default()).nexus(1);
        put(&nexus, &cdb10(0x2a, 0, 0, 32), &pattern(9, 32)).await;
        put(&nexus, &cdb10(0x41, 0, 8, 8), &[7; 512]).await;
        assert_eq!(get(&nexus, &cdb10(0x28, 0, 8, 8)).await, [7; 4096]);
        put(&nexus, &cdb16(0x93, 0x08, 8, 8), &[0; 512]).await;
        put(&nexus, &cdb16(0x93, 0x09, 16, 8), &[]).await;
        let all = get(&nexus, &cdb10(0x28, 0, 0, 32)).await;
        assert_eq!(all[4096..12288], [0; 8192]);
        assert_eq!((&all[..4096], &all[12288..]), (&pattern(9, 32)[..4096], &pattern(9, 32)[12288..]));
        // Other content cannot be unmapped: it is written.
        put(&nexus, &cdb10(0x41, 0x08, 8, 1), &[5; 512]).await;
        assert_eq!(get(&nexus, &cdb10(0x28, 0, 8, 1)).await, [5; 512]);
        // No blocks: to the end.
        put(&nexus, &cdb10(0x41, 0, BLOCKS as u32 - 3, 0), &[6; 512]).await;
        assert_eq!(get(&nexus, &cdb10(0x28, 0, BLOCKS as u32 - 3, 3)).await, [6; 1536]);
        refused(&nexus, &cdb16(0x93, 0x10, 0, 1), &[0; 512], Sense::cdb(1, Some(4))).await;
        refused(&nexus, &cdb10(0x41, 0x01, 0, 1), &[0; 512], Sense::cdb(1, Some(0))).await;
        refused(&nexus, &cdb16(0x93, 0x01, 0, 1), &[0; 512], Sense::cdb(1, Some(0))).await;
        for wrong in [256, 1024] {
            refused(&nexus, &cdb16(0x93, 0x08, 0, 1), &vec![0; wrong], Sense::cdb(1, Some(0))).await;
        }
        refused(&nexus, &cdb16(0x93, 0, BLOCKS, 1), &[0; 512], OUT_OF_RANGE.with_information(BLOCKS)).await;
        let large = Bench::with(Rc::new(MemoryDisk::new(1 << 40)), Settings::default()).nexus(1);
        refused(&large, &cdb16(0x93, 0, 0, 0), &[0; 512], Sense::cdb(10, None)).await;
        refused(&large, &cdb16(0x93, 0, 0, 1 << 24 | 1), &[0; 512], Sense::cdb(10, None)).await;
        put(&large, &cdb16(0x93, 0, 0, 1 << 24), &[0; 512]).await;
    });
}

fn unmap_list(ranges: &[(u64, u32)]) -> Vec<u8> {
    let body: Vec<u8> = ranges
        .iter()
        .flat_map(|(lba, count)| [&lba.to_be_bytes()[..], &count.to_be_bytes(), &[0; 4]].concat())
        .collect();
    let (all, some) = ((body.len() + 6) as u16, body.len() as u16);
    [&all.to_be_bytes()[..], &some.to_be_bytes(), &[0; 4], &body].concat()
}

fn unmap(list: &[u8]) -> Vec<u8> {
    let length = (list.len() as u16).to_be_bytes();
    vec![0x42, 0, 0, 0, 0, 0, 0, length[0], length[1], 0]
}

#[test]
fn unmap_sbc3_5_28() {
    lane::block_on(async {
        let nexus = Bench::new().nexus(1);
        put(&nexus, &cdb10(0x2a, 0, 0, 32), &pattern(9, 32)).await;
        let list = unmap_list(&[(8, 8), (24, 8), (BLOCKS, 0)]);
        put(&nexus, &unmap(&list), &list).await;
        let all = get(&nexus, &cdb10(0x28, 0, 0, 32)).await;
        assert!(all[4096..8192].iter().chain(&all[12288..]).all(|b| *b == 0));
        assert_eq!(all[8192..12288], pattern(9, 32)[8192..12288]);
        put(&nexus, &unmap(&[]), &[]).await;
        put(&nexus, &unmap(&unmap_list(&[])), &unmap_list(&[])).await;
        let short = Sense::illegal(asc::PARAMETER_LIST_LENGTH_ERROR);
        refused(&nexus, &unmap(&list[..7]), &list[..7], short).await;
        refused(&nexus, &unmap(&list[..30]), &list[..30], short).await;
        refused(&nexus, &unmap(&list), &list[..30], short).await;
        // All or nothing: a bad descriptor behind a good one.
        let bad = unmap_list(&[(16, 8), (BLOCKS - 1, 2)]);
        refused(&nexus, &unmap(&bad), &bad, OUT_OF_RANGE).await;
        assert_eq!(get(&nexus, &cdb10(0x28, 0, 16, 8)).await, pattern(9, 32)[8192..12288]);
        let many = unmap_list(&vec![(0, 1); 257]);
        refused(&nexus, &unmap(&many), &many, Sense::parameter(2, None)).await;
        let large = Bench::with(Rc::new(MemoryDisk::new(1 << 40)), Settings::default()).nexus(1);
        let list = unmap_list(&[(0, 1 << 19), (1 << 20, 1 << 19 | 1)]);
        refused(&large, &unmap(&list), &list, Sense::parameter(32, None)).await;
    });
}

#[test]
fn lba_status_sbc3_5_8() {
    lane::block_on(async {
        let disk = Rc::new(MemoryDisk::new(BLOCKS));
        let nexus = Bench::with(Rc::clone(&disk) as _, Settings::default()).nexus(1);
        put(&nexus, &cdb10(0x2a, 0, 8, 16), &pattern(9, 16)).await;
        let mut cdb = cdb16(0x9e, 0x12, 0, 1024);
        let data = get(&nexus, &cdb).await;
        let found: Vec<_> = data[8..]
            .chunks(16)
            .map(|d| {
                (
                    u64::from_be_bytes(d[..8].try_into().unwrap()),
                    u32::from_be_bytes(d[8..12].try_into().unwrap()),
                    d[12],
                )
            })
            .collect();
        assert_eq!(found, [(0, 8, 1), (8, 16, 0), (24, BLOCKS as u32 - 24, 1)]);
        assert_eq!(data[..8], [0, 0, 0, 52, 0, 0, 0, 0]);
        cdb[9] = 10;
        cdb[13] = 24;
        cdb[12] = 0;
        let data = get(&nexus, &cdb).await;
        assert_eq!(
            (data.len(), data[15], data[19], data[20]),
            (24, 10, 14, 0),
            "from the middle, one descriptor"
        );
        refused(&nexus, &cdb16(0x9e, 0x12, BLOCKS, 24), &[], OUT_OF_RANGE).await;
        // What the disk says is what is told.
        let mut extents = Extents::with_limit(8);
        disk.status(Sector(0), BLOCKS, None, &mut extents).await.unwrap();
        assert_eq!(extents.len(), 3);
    });
}

#[test]
fn prefetch_and_synchronize() {
    lane::block_on(async {
        let nexus = Bench::new().nexus(1);
        for code in [0x34, 0x35] {
            put(&nexus, &cdb10(code, 2, 0, 10), &[]).await;
            put(&nexus, &cdb10(code, 0, BLOCKS as u32, 0), &[]).await;
            refused(&nexus, &cdb10(code, 0, BLOCKS as u32, 1), &[], OUT_OF_RANGE.with_information(BLOCKS))
                .await;
        }
        for code in [0x90, 0x91] {
            put(&nexus, &cdb16(code, 0, 0, 0), &[]).await;
            refused(&nexus, &cdb16(code, 0, u64::MAX, 2), &[], OUT_OF_RANGE.with_information(u64::MAX)).await;
        }
    });
}

#[test]
fn sanitize_only_where_it_is_switched_on() {
    lane::block_on(async {
        let cdb = |action: u8, length: u16| {
            let l = length.to_be_bytes();
            [0x48, action, 0, 0, 0, 0, 0, l[0], l[1], 0]
        };
        let nexus = Bench::new().nexus(1);
        refused(&nexus, &cdb(2, 0), &[], Sense::illegal(asc::INVALID_OPCODE)).await;
        let disk = Rc::new(MemoryDisk::new(BLOCKS));
        let settings = Settings { sanitize: true, ..Settings::default() };
        let nexus = Bench::with(Rc::clone(&disk) as _, settings).nexus(1);
        put(&nexus, &cdb10(0x2a, 0, 8, 16), &pattern(9, 16)).await;
        put(&nexus, &cdb(2, 0), &[]).await;
        assert!(disk.to_bytes().iter().all(|b| *b == 0));
        let list = [&[0x82, 0, 0, 3][..], &[1, 2, 3]].concat();
        put(&nexus, &cdb(1, 7), &list).await;
        let wiped = disk.to_bytes();
        assert_eq!(wiped[..4], [!1, !2, !3, !1], "twice, the second time inverted");
        assert_eq!(wiped[512..516], [!1, !2, !3, !1], "every block begins anew");
        for (length, list) in [(0, vec![]), (4, vec![1, 0, 0, 0]), (517, vec![1; 517])] {
            refused(&nexus, &cdb(1, length), &list, Sense::cdb(7, None)).await;
        }
        refused(&nexus, &cdb(1, 5), &[0, 0, 0, 1, 1], Sense::parameter(0, Some(4))).await;
        refused(&nexus, &cdb(1, 5), &[1, 0, 0, 2, 1], Sense::parameter(2, None)).await;
        refused(&nexus, &cdb(2, 8), &[0; 8], Sense::cdb(7, None)).await;
        refused(&nexus, &cdb(4, 0), &[], Sense::cdb(1, Some(4))).await;
        put(&nexus, &cdb(0x1f, 0), &[]).await;
    });
}

#[test]
fn a_read_only_disk_says_so() {
    lane::block_on(async {
        let disk = Rc::new(MemoryDisk::new(BLOCKS).read_only());
        let nexus = Bench::with(disk, Settings::default()).nexus(1);
        let protected = Sense::new(Key::DataProtect, asc::WRITE_PROTECTED);
        for write in forms(false, 0, 1) {
            refused(&nexus, &write, &[0; 512], protected).await;
        }
        refused(&nexus, &cdb16(0x93, 0, 0, 1), &[0; 512], protected).await;
        refused(&nexus, &cdb16(0x89, 0, 0, 1), &[0; 1024], protected).await;
        refused(&nexus, &unmap(&unmap_list(&[])), &unmap_list(&[]), protected).await;
        assert_eq!(get(&nexus, &[0x1a, 8, 8, 0, 255, 0]).await[2], 0x90);
        get(&nexus, &cdb10(0x28, 0, 0, 1)).await;
    });
}
