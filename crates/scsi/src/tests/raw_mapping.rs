//! The two modes of raw device mapping (R1 to R3), over a device that answers what our emulation does not.

use super::*;
use block::{DiskError, Io};
use std::cell::RefCell;

use crate::pass_through::{Device, DeviceReply, PassThrough};
use crate::sense::asc;

/// Answers a vendor command, LOG SENSE of a page of its own, MODE SELECT of one; remembers what it saw.
#[derive(Default)]
struct Fake {
    seen: RefCell<Vec<(Vec<u8>, Vec<u8>)>>,
    resets: std::cell::Cell<u32>,
}

const VENDOR_SENSE: [u8; 20] = [0x70, 0, 9, 1, 2, 3, 4, 12, 5, 6, 7, 8, 0x80, 0x81, 9, 0, 0, 0, 0xca, 0xfe];

impl Device for Fake {
    fn transfer_bytes_max(&self) -> u64 {
        1 << 20
    }

    fn execute<'a>(
        &'a self,
        cdb: &'a [u8],
        from: &'a Segments<'a>,
        into: &'a SegmentsMut<'a>,
    ) -> Io<'a, DeviceReply> {
        Box::pin(async move {
            self.seen.borrow_mut().push((cdb.to_vec(), from.to_vec()));
            let data = |bytes: &[u8]| {
                let count = bytes.len().min(into.len());
                into.copy_from(0, &bytes[..count]);
                Ok(DeviceReply { in_moved: count, ..DeviceReply::default() })
            };
            match cdb[0] {
                0xc7 => data(b"what only the array's agent understands"),
                0x4d if cdb[2] & 0x3f == 0x30 => data(&[0x30, 0, 0, 2, 0xab, 0xcd]),
                0x12 => data(b"\0\0\x06\x12\x1f\0\0\0FOREIGN A real disk     0001"),
                0x28 => Ok(DeviceReply { status: 0x18, ..DeviceReply::default() }),
                0xc8 => Ok(DeviceReply { status: 0x02, sense: VENDOR_SENSE.to_vec(), in_moved: 0 }),
                0xc9 => Ok(DeviceReply { status: 0x77, ..DeviceReply::default() }),
                0xca => Err(DiskError::Gone),
                _ => data(&[]),
            }
        })
    }

    fn reset(&self) -> Io<'_> {
        self.resets.set(self.resets.get() + 1);
        Box::pin(async { Ok(()) })
    }
}

fn physical() -> (Rc<Fake>, Rc<PassThrough>, Rc<Nexus>) {
    let fake = Rc::new(Fake::default());
    let unit = PassThrough::new(Rc::clone(&fake) as _);
    let luns = LunMap::new(port(1));
    luns.add(0, Rc::clone(&unit) as _);
    (fake, unit, Nexus::new(initiator(1), luns))
}

fn vendor() -> Vec<u8> {
    (0..16).map(|n| 0xc7 + n).collect()
}

const LOG: [u8; 10] = [0x4d, 1, 0x70, 9, 0, 0, 7, 0, 64, 0];
const SELECT: [u8; 10] = [0x55, 0x11, 1, 2, 3, 4, 5, 0, 12, 0xc0];

#[test]
fn r2_physical_mode_passes_everything_byte_for_byte() {
    lane::block_on(async {
        let (fake, unit, nexus) = physical();
        let (reply, data) = run(&nexus, &vendor(), &[], 4096).await;
        assert_eq!(
            (reply.status, &data[..]),
            (Status::Good, &b"what only the array's agent understands"[..])
        );
        assert_eq!(get(&nexus, &LOG).await, [0x30, 0, 0, 2, 0xab, 0xcd]);
        let list: Vec<u8> = (0..12).collect();
        put(&nexus, &SELECT, &list).await;
        let (reply, _) = run(&nexus, &[0xc8; 16], &[], 0).await;
        assert_eq!((reply.status, &reply.sense[..]), (Status::CheckCondition, &VENDOR_SENSE[..]));
        conflict(&nexus, &cdb10(0x28, 0, 0, 1), &[]).await;
        let (reply, _) = run(&nexus, &[0xc9; 16], &[], 0).await;
        assert_eq!(reply.sense, Sense::new(Key::HardwareError, asc::INTERNAL_TARGET_FAILURE).encode(false));
        let (reply, _) = run(&nexus, &[0xca; 16], &[], 0).await;
        assert_eq!(reply.sense, Sense::new(Key::NotReady, asc::LOGICAL_UNIT_NOT_READY).encode(false));
        assert!(get(&nexus, &[0x12, 0, 0, 0, 36, 0]).await[8..].starts_with(b"FOREIGN A real disk"));
        let seen = fake.seen.borrow();
        assert_eq!(seen[0].0, vendor());
        assert_eq!(seen[1].0, LOG);
        assert_eq!(seen[2], (SELECT.to_vec(), list));
        assert_eq!(unit.passed(), seen.len() as u64 - 1, "all but the one that did not reach it");
    });
}

#[test]
fn r1_virtual_mode_refuses_what_it_does_not_emulate() {
    lane::block_on(async {
        let naa = [0x62; 16];
        let identity = Identity::virtual_disk(Uuid::from_u128(3), naa);
        let keep = Rc::new(MemoryKeep::default());
        let disk = Rc::new(MemoryDisk::new(BLOCKS));
        let unit = LogicalUnit::new(disk, identity, Settings::default(), keep, &[]).unwrap();
        let luns = LunMap::new(port(1));
        luns.add(0, Rc::clone(&unit) as _);
        let nexus = Nexus::new(initiator(1), luns);
        attention(&nexus).await;
        refused(&nexus, &vendor(), &[], Sense::illegal(asc::INVALID_OPCODE)).await;
        let mut log = LOG;
        (log[1], log[3], log[6]) = (0, 0, 0);
        refused(&nexus, &log, &[], Sense::cdb(2, Some(5))).await;
        refused(&nexus, &SELECT, &[0; 12], Sense::cdb(2, Some(0))).await;
        let select = [0x55, 0x11, 0, 0, 0, 0, 0, 0, 12, 0];
        let list = [0, 0, 0, 0, 0, 0, 0, 0, 0x30, 2, 0, 0];
        refused(&nexus, &select, &list, Sense::parameter(8, Some(5))).await;
        assert!(get(&nexus, &[0x12, 0, 0, 0, 36, 0]).await[8..].starts_with(b"KAGAMI  Virtual disk"));
        assert!(unit.interpreted() > 0);
    });
}

#[test]
fn r2_a_physical_mapping_of_our_own_lun_is_the_lun() {
    lane::block_on(async {
        let bench = Bench::new();
        let node = bench.nexus(1);
        // The VM's adapter, with a LUN number of its own (R3).
        let adapter = LunMap::new(port(2));
        adapter.add(5, Rc::clone(&bench.unit) as _);
        let vm = Nexus::new(initiator(2), adapter);
        run_at(&vm, 5, &[0; 6], &[], 0).await;
        let pages = |page: u8| [0x12, 1, page, 0, 255, 0];
        let (_, serial) = run_at(&vm, 5, &pages(0x80), &[], 255).await;
        assert_eq!(serial, get(&node, &pages(0x80)).await);
        let (_, luns) = run_at(&vm, 5, &[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0], &[], 64).await;
        assert_eq!(luns[..16], [0, 0, 0, 8, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0]);
        let before = bench.unit.interpreted();
        run_at(&vm, 5, &cdb10(0x2a, 0, 0, 1), &[3; 512], 0).await;
        assert_eq!(get(&node, &cdb10(0x28, 0, 0, 1)).await, [3; 512]);
        assert_eq!(bench.unit.interpreted(), before + 2, "one layer of SCSI, not two");
    });
}

#[test]
fn bounds_and_resets_of_a_passed_device() {
    lane::block_on(async {
        let (fake, unit, nexus) = physical();
        let invalid = Sense::illegal(asc::INVALID_FIELD_IN_CDB);
        let offered = Offered { out: (1 << 20) + 1, into: 0 };
        let command = nexus.begin(lun_bytes(0), 1, Attribute::Simple, &SELECT, offered);
        assert_eq!(command.out_bytes(), 0);
        let reply = command.run(&Segments::new(&[]), &SegmentsMut::new(&mut [])).await.unwrap();
        assert_eq!(reply.sense, invalid.encode(false));
        refused(&nexus, &SELECT, &[0; 12], invalid).await;
        for short in [&[][..], &[0x28, 0], &[0x7f; 7]] {
            let (reply, _) = run(&nexus, short, &[], 0).await;
            assert_eq!(reply.sense, Sense::illegal(asc::INVALID_OPCODE).encode(false));
        }
        nexus.manage(lun_bytes(0), crate::Function::LogicalUnitReset).await;
        lane::yield_now().await;
        assert_eq!((fake.resets.get(), unit.passed()), (1, 0));
        assert_eq!(attention(&nexus).await, Some(asc::BUS_DEVICE_RESET));
        assert_eq!(attention(&nexus).await, None);
    });
}
