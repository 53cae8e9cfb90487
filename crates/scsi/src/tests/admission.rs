//! SPC-4 table 66 and SBC-3 table 13, written out once more: what each command may under each reservation.

use super::*;
use crate::opcode::TABLE;
use crate::pr::Kind;

/// A column answers: `A` allowed, `C` conflict. Columns: Write Exclusive and Exclusive Access, to others; then, of the
/// registrants types, to registrants, to others under Write Exclusive, to others under Exclusive Access.
const ALWAYS: &str = "AAAAA";
const READING: &str = "ACAAC";
const WRITING: &str = "CCACC";

/// Code, service action, byte that matters (index, value), columns.
type Line = (u8, u8, (usize, u8), &'static str);

const LINES: &[Line] = &[
    (0x00, 0, (0, 0x00), ALWAYS),
    (0x03, 0, (0, 0x03), ALWAYS),
    (0x08, 0, (0, 0x08), READING),
    (0x0a, 0, (0, 0x0a), WRITING),
    (0x12, 0, (0, 0x12), ALWAYS),
    (0x15, 0, (0, 0x15), WRITING),
    (0x1a, 0, (0, 0x1a), WRITING),
    (0x1b, 0, (4, 0), WRITING),
    (0x1b, 0, (4, 1), ALWAYS),
    (0x1e, 0, (4, 0), ALWAYS),
    (0x1e, 0, (4, 1), WRITING),
    (0x25, 0, (0, 0x25), ALWAYS),
    (0x28, 0, (0, 0x28), READING),
    (0x2a, 0, (0, 0x2a), WRITING),
    (0x2e, 0, (0, 0x2e), WRITING),
    (0x2f, 0, (0, 0x2f), READING),
    (0x34, 0, (0, 0x34), READING),
    (0x35, 0, (0, 0x35), WRITING),
    (0x37, 0, (0, 0x37), READING),
    (0x41, 0, (0, 0x41), WRITING),
    (0x42, 0, (0, 0x42), WRITING),
    (0x48, 2, (0, 0x48), WRITING),
    (0x4d, 0, (0, 0x4d), ALWAYS),
    (0x55, 0, (0, 0x55), WRITING),
    (0x5a, 0, (0, 0x5a), WRITING),
    (0x5e, 0, (0, 0x5e), ALWAYS),
    (0x5e, 1, (0, 0x5e), ALWAYS),
    (0x5e, 2, (0, 0x5e), ALWAYS),
    (0x5e, 3, (0, 0x5e), ALWAYS),
    (0x83, 0, (0, 0x83), WRITING),
    (0x84, 3, (0, 0x84), WRITING),
    (0x88, 0, (0, 0x88), READING),
    (0x89, 0, (0, 0x89), WRITING),
    (0x8a, 0, (0, 0x8a), WRITING),
    (0x8b, 0, (0, 0x8b), WRITING),
    (0x8e, 0, (0, 0x8e), WRITING),
    (0x8f, 0, (0, 0x8f), READING),
    (0x90, 0, (0, 0x90), READING),
    (0x91, 0, (0, 0x91), WRITING),
    (0x93, 0, (0, 0x93), WRITING),
    (0x9c, 0, (0, 0x9c), WRITING),
    (0x9e, 0x10, (0, 0x9e), ALWAYS),
    (0x9e, 0x12, (0, 0x9e), READING),
    (0xa0, 0, (0, 0xa0), ALWAYS),
    (0xa3, 0x0a, (0, 0xa3), ALWAYS),
    (0xa3, 0x0c, (0, 0xa3), WRITING),
    (0xa3, 0x0d, (0, 0xa3), WRITING),
    (0xa8, 0, (0, 0xa8), READING),
    (0xaa, 0, (0, 0xaa), WRITING),
    (0xae, 0, (0, 0xae), WRITING),
    (0xaf, 0, (0, 0xaf), READING),
    (0xb7, 0, (0, 0xb7), READING),
];

fn cdb_of(line: &Line) -> Vec<u8> {
    let mut cdb = vec![0; TABLE.iter().find(|o| o.code == line.0).unwrap().length()];
    (cdb[0], cdb[1]) = (line.0, line.1);
    cdb[line.2.0] = line.2.1;
    // No data: WRITE SAME and the like fail later than a conflict would, which is enough.
    cdb
}

fn bench() -> Bench {
    let settings = Settings { sanitize: true, atomic_blocks: 8, ..Settings::default() };
    Bench::with(Rc::new(MemoryDisk::new(BLOCKS)), settings)
}

pub(super) fn prout(action: u8, kind: u8) -> Vec<u8> {
    vec![0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0]
}

pub(super) fn keys(key: u64, second: u64, flags: u8) -> Vec<u8> {
    [&key.to_be_bytes()[..], &second.to_be_bytes(), &[0, 0, 0, 0, flags, 0, 0, 0]].concat()
}

#[test]
fn r54_every_command_under_every_type_for_everybody() {
    let told: usize = TABLE.iter().filter(|o| !matches!(o.code, 0x16 | 0x17 | 0x56 | 0x57 | 0x5f)).count();
    // Two lines twice, SANITIZE and RECEIVE COPY RESULTS once for all their actions.
    assert_eq!(LINES.len(), told + 2 - 3 - 3, "every line of the table is here");
    lane::block_on(async {
        for kind in Kind::ALL {
            let bench = bench();
            let (holder, member, stranger) = (bench.nexus(1), bench.nexus(2), bench.nexus(3));
            put(&holder, &prout(0, 0), &keys(0, 11, 0)).await;
            put(&member, &prout(0, 0), &keys(0, 22, 0)).await;
            put(&holder, &prout(1, kind as u8), &keys(11, 0, 0)).await;
            let exclusive = kind.exclusive_access();
            let column_of = |registered: bool| match (kind.for_registrants(), registered) {
                (false, _) => usize::from(exclusive),
                (true, true) => 2,
                (true, false) => 3 + usize::from(exclusive),
            };
            for line in LINES {
                for (who, nexus, column) in [
                    ("holder", &holder, None),
                    ("member", &member, Some(column_of(true))),
                    ("stranger", &stranger, Some(column_of(false))),
                ] {
                    let allowed = column.is_none_or(|c| line.3.as_bytes()[c] == b'A');
                    let (reply, _) = run(nexus, &cdb_of(line), &[], 4096).await;
                    let conflicted = reply.status == Status::ReservationConflict;
                    assert_eq!(conflicted, !allowed, "{kind:?} {who} {:02x}/{:02x}", line.0, line.1);
                }
            }
        }
    });
}

#[test]
fn reserve_keeps_everybody_else_out_spc2_table_9() {
    lane::block_on(async {
        for (reserve, release) in [(vec![0x16, 0, 0, 0, 0, 0], vec![0x17, 0, 0, 0, 0, 0]), {
            let ten = |code| vec![code, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            (ten(0x56), ten(0x57))
        }] {
            let bench = bench();
            let (one, two) = (bench.nexus(1), bench.nexus(2));
            put(&one, &reserve, &[]).await;
            put(&one, &reserve, &[]).await;
            for line in LINES {
                let free = [0x03, 0x12, 0xa0].contains(&line.0) || (line.0 == 0x1e && line.2.1 == 0);
                let (reply, _) = run(&two, &cdb_of(line), &[], 4096).await;
                assert_eq!(reply.status == Status::ReservationConflict, !free, "{:02x}", line.0);
                let (reply, _) = run(&one, &cdb_of(line), &[], 4096).await;
                assert_ne!(reply.status, Status::ReservationConflict, "{:02x} of the holder", line.0);
            }
            conflict(&two, &reserve, &[]).await;
            conflict(&two, &prout(0, 0), &keys(0, 5, 0)).await;
            put(&two, &release, &[]).await;
            conflict(&two, &[0; 6], &[]).await;
            put(&one, &release, &[]).await;
            put(&two, &reserve, &[]).await;
            conflict(&one, &[0; 6], &[]).await;
            // It ends with the nexus, and with a reset.
            two.lost().await;
            put(&one, &[0; 6], &[]).await;
            put(&one, &reserve, &[]).await;
            let three = bench.nexus(3);
            three.manage(lun_bytes(0), crate::Function::LogicalUnitReset).await;
            assert_eq!(attention(&three).await, Some(crate::sense::asc::BUS_DEVICE_RESET));
            put(&three, &reserve, &[]).await;
        }
    });
}

#[test]
fn reserve_beside_persistent_reservations_spc4_5_12_3() {
    lane::block_on(async {
        let bench = bench();
        let (holder, member, stranger) = (bench.nexus(1), bench.nexus(2), bench.nexus(3));
        let (reserve, release) = ([0x16, 0, 0, 0, 0, 0], [0x17, 0, 0, 0, 0, 0]);
        put(&holder, &prout(0, 0), &keys(0, 11, 0)).await;
        put(&member, &prout(0, 0), &keys(0, 22, 0)).await;
        for nexus in [&holder, &stranger] {
            conflict(nexus, &reserve, &[]).await;
            conflict(nexus, &release, &[]).await;
        }
        put(&holder, &prout(1, Kind::WriteExclusiveRegistrantsOnly as u8), &keys(11, 0, 0)).await;
        for nexus in [&holder, &member] {
            put(nexus, &reserve, &[]).await;
            put(nexus, &release, &[]).await;
        }
        conflict(&stranger, &reserve, &[]).await;
        conflict(&stranger, &release, &[]).await;
        put(&holder, &cdb10(0x2a, 0, 0, 1), &[0; 512]).await;
        put(&member, &cdb10(0x2a, 0, 0, 1), &[0; 512]).await;
    });
}
