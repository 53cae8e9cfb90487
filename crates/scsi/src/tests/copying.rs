//! EXTENDED COPY and RECEIVE COPY RESULTS.

use super::admission::{keys, prout};
use super::*;
use crate::sense::asc;

pub(super) fn target_of(unit: &LogicalUnit) -> Vec<u8> {
    let mut out = vec![0; 32];
    (out[0], out[4], out[5], out[7]) = (0xe4, 1, 3, 16);
    out[8..24].copy_from_slice(&unit.identity().naa);
    out[30] = 2;
    out
}

pub(super) fn segment(from: u16, to: u16, blocks: u16, at: u64, into: u64) -> Vec<u8> {
    let mut out = vec![0x02, 0, 0, 24];
    out.extend(from.to_be_bytes());
    out.extend(to.to_be_bytes());
    out.extend([0, 0]);
    out.extend(blocks.to_be_bytes());
    out.extend(at.to_be_bytes());
    out.extend(into.to_be_bytes());
    out
}

pub(super) fn list(id: u8, targets: &[Vec<u8>], segments: &[Vec<u8>]) -> Vec<u8> {
    let (targets, segments) = (targets.concat(), segments.concat());
    let mut out = vec![0; 16];
    out[0] = id;
    out[2..4].copy_from_slice(&(targets.len() as u16).to_be_bytes());
    out[8..12].copy_from_slice(&(segments.len() as u32).to_be_bytes());
    [out, targets, segments].concat()
}

pub(super) fn copy(length: usize) -> Vec<u8> {
    let l = (length as u32).to_be_bytes();
    [vec![0x83, 0, 0, 0, 0, 0, 0, 0, 0, 0], l.to_vec(), vec![0, 0]].concat()
}

fn receive(action: u8, id: u8) -> Vec<u8> {
    vec![0x84, action, id, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
}

/// A second logical unit at LUN 1.
fn second(bench: &Bench) -> Rc<LogicalUnit> {
    second_over(bench, Rc::new(MemoryDisk::new(BLOCKS)))
}

/// The same over a disk of the caller's.
pub(super) fn second_over(bench: &Bench, disk: Rc<dyn Disk>) -> Rc<LogicalUnit> {
    let identity = Identity::lun(Uuid::from_u128(2), [0x61; 16]);
    let keep = Rc::new(MemoryKeep::default());
    let unit = LogicalUnit::new(disk, identity, Settings::default(), keep, &[]).unwrap();
    bench.luns.add(1, Rc::clone(&unit) as _);
    unit
}

#[test]
fn copies_between_and_within() {
    lane::block_on(async {
        let bench = Bench::new();
        let other = second(&bench);
        let nexus = bench.nexus(1);
        let (reply, _) = run_at(&nexus, 1, &[0; 6], &[], 0).await;
        assert_eq!(reply.status, Status::CheckCondition, "the power on of the other");
        let data: Vec<u8> = (0..3000 * 512).map(|n| (n / 512 * 31 + n) as u8).collect();
        put(&nexus, &cdb16(0x8a, 0, 0, 3000), &data).await;
        let targets = [target_of(&bench.unit), target_of(&other)];
        // Across, larger than a piece; then overlapping, forwards and backwards.
        let one = list(7, &targets, &[segment(0, 1, 2900, 100, 5)]);
        put(&nexus, &copy(one.len()), &one).await;
        let (_, got) = run_at(&nexus, 1, &cdb16(0x88, 0, 5, 2900), &[], 1 << 22).await;
        assert!(got == data[51200..]);
        for (from, to) in [(10, 700), (700, 10)] {
            put(&nexus, &cdb16(0x8a, 0, 0, 3000), &data).await;
            let within = list(8, &targets[..1], &[segment(0, 0, 2200, from, to)]);
            put(&nexus, &copy(within.len()), &within).await;
            let got = get_large(&nexus, to, 2200).await;
            assert!(got == data[from as usize * 512..][..2200 * 512], "{from} to {to}");
        }
        let status = get(&nexus, &receive(0, 7)).await;
        assert_eq!(status, [&[0, 0, 0, 8, 1, 0, 1, 0][..], &(2900u32 * 512).to_be_bytes()].concat());
        refused(&nexus, &receive(0, 99), &[], Sense::cdb(2, None)).await;
        refused(&nexus, &receive(4, 7), &[], Sense::cdb(2, None)).await;
        let parameters = get(&nexus, &receive(3, 0)).await;
        assert_eq!((parameters.len(), parameters[3], &parameters[44..]), (46, 42, &[0x02, 0xe4][..]));
    });
}

async fn get_large(nexus: &Rc<Nexus>, lba: u64, blocks: u32) -> Vec<u8> {
    run(nexus, &cdb16(0x88, 0, lba, blocks), &[], 1 << 23).await.1
}

#[test]
fn a_copy_of_nothing_takes_no_space() {
    lane::block_on(async {
        let bench = Bench::new();
        let other = second(&bench);
        let nexus = bench.nexus(1);
        run_at(&nexus, 1, &[0; 6], &[], 0).await;
        run_at(&nexus, 1, &cdb16(0x8a, 0, 0, 8), &[1; 4096], 0).await;
        let targets = [target_of(&bench.unit), target_of(&other)];
        let list = list(7, &targets, &[segment(0, 1, 4096, 0, 0)]);
        put(&nexus, &copy(list.len()), &list).await;
        let mut extents = block::Extents::with_limit(4);
        other.disk().status(block::Sector(0), BLOCKS, None, &mut extents).await.unwrap();
        assert!(extents.iter().all(|e| e.kind != block::Kind::Data), "{extents:?}");
    });
}

#[test]
fn what_is_wrong_with_a_copy_is_said() {
    lane::block_on(async {
        let bench = Bench::new();
        let nexus = bench.nexus(1);
        let target = target_of(&bench.unit);
        let good = segment(0, 0, 8, 0, 100);
        let whole = list(1, std::slice::from_ref(&target), std::slice::from_ref(&good));
        put(&nexus, &copy(0), &[]).await;
        put(&nexus, &copy(whole.len()), &whole).await;
        let wrong_length = Sense::illegal(asc::PARAMETER_LIST_LENGTH_ERROR);
        for cut in [1, 15, 16, 47, 48, whole.len() - 1] {
            refused(&nexus, &copy(cut), &whole[..cut], wrong_length).await;
        }
        refused(&nexus, &copy(whole.len()), &whole[..60], wrong_length).await;
        let mut unknown = target.clone();
        unknown[0] = 0xe0;
        let mut stream = good.clone();
        stream[0] = 0x01;
        let mut stranger = target.clone();
        stranger[9] = 1;
        let unreachable = Sense::new(Key::CopyAborted, asc::COPY_TARGET_NOT_REACHABLE);
        let cases = [
            (vec![unknown], vec![good.clone()], Sense::illegal(asc::UNSUPPORTED_TARGET_DESCRIPTOR)),
            (vec![target.clone()], vec![stream], Sense::illegal(asc::UNSUPPORTED_SEGMENT_DESCRIPTOR)),
            (vec![target.clone(); 17], vec![good.clone()], Sense::illegal(asc::TOO_MANY_TARGET_DESCRIPTORS)),
            (vec![target.clone()], vec![good.clone(); 65], Sense::illegal(asc::TOO_MANY_SEGMENT_DESCRIPTORS)),
            (vec![target.clone(); 17], vec![good.clone(); 66], wrong_length),
            (vec![stranger], vec![good.clone()], unreachable),
            (vec![target.clone()], vec![segment(0, 1, 8, 0, 100)], unreachable.with_segment_byte(6)),
            (
                vec![target.clone()],
                vec![segment(0, 0, 8, 0, BLOCKS - 7)],
                Sense::new(Key::CopyAborted, asc::NONE).with_command_specific(0),
            ),
        ];
        for (targets, segments, sense) in cases {
            let list = list(1, &targets, &segments);
            refused(&nexus, &copy(list.len()), &list, sense).await;
        }
        assert_eq!(get(&nexus, &receive(0, 1)).await[4], 2, "the last one failed");
    });
}

#[test]
fn a_copy_obeys_the_reservations_of_both_ends_spc4_5_17() {
    lane::block_on(async {
        let bench = Bench::new();
        let other = second(&bench);
        let (one, two) = (bench.nexus(1), bench.nexus(2));
        for nexus in [&one, &two] {
            run_at(nexus, 1, &[0; 6], &[], 0).await;
        }
        run_at(&two, 1, &prout(0, 0), &keys(0, 2, 0), 0).await;
        run_at(&two, 1, &prout(1, 1), &keys(2, 0, 0), 0).await;
        let targets = [target_of(&bench.unit), target_of(&other)];
        let into = list(1, &targets, &[segment(0, 1, 8, 0, 0)]);
        conflict(&one, &copy(into.len()), &into).await;
        let out = list(1, &targets, &[segment(1, 0, 8, 0, 0)]);
        put(&one, &copy(out.len()), &out).await;
        put(&two, &copy(into.len()), &into).await;
    });
}
