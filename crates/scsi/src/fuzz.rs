//! CDBs and parameter data under fuzz, against a model of the disk. Used by the tests and by fuzz targets.

use std::cell::RefCell;
use std::rc::Rc;

use block::{Io, MemoryDisk, Segments, SegmentsMut};
use uuid::Uuid;

use crate::pr::Kept;
use crate::{
    Attribute, Identity, Keep, LogicalUnit, LunMap, Nexus, Offered, Port, Reply, Settings, Status,
    TransportId, lun_bytes,
};

/// Keeps records in memory.
#[derive(Default)]
pub struct MemoryKeep {
    record: RefCell<Vec<u8>>,
}

impl MemoryKeep {
    /// What was saved last.
    pub fn record(&self) -> Vec<u8> {
        self.record.borrow().clone()
    }
}

impl Keep for MemoryKeep {
    fn save<'a>(&'a self, record: &'a [u8]) -> Io<'a> {
        Box::pin(async move {
            *self.record.borrow_mut() = record.to_vec();
            Ok(())
        })
    }
}

const BLOCKS: u64 = 64;
const NEXUSES: usize = 3;
/// Most data-in offered, in bytes.
const INTO_MAX: usize = 64 << 10;

/// Takes the input apart.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }
}

struct Bench {
    unit: Rc<LogicalUnit>,
    disk: Rc<MemoryDisk>,
    keep: Rc<MemoryKeep>,
    nexuses: Vec<Rc<Nexus>>,
    model: Vec<u8>,
}

impl Bench {
    fn new(choice: u8) -> Self {
        let disk = Rc::new(MemoryDisk::new(BLOCKS));
        let keep = Rc::new(MemoryKeep::default());
        let settings = Settings {
            sanitize: choice & 1 != 0,
            atomic_blocks: if choice & 2 != 0 { 16 } else { 0 },
            by_name: choice & 4 != 0,
            boot: 1,
            ..Settings::default()
        };
        let identity = Identity::lun(Uuid::from_u128(7), [0x60; 16]);
        let made = LogicalUnit::new(Rc::clone(&disk) as _, identity, settings, Rc::clone(&keep) as _, &[]);
        let Ok(unit) = made else { unreachable!("nothing is kept yet") };
        let luns = LunMap::new(Rc::new(Port {
            relative: 1,
            name: "iqn.2026-01.test:t,t,0x0001".into(),
            device_name: "iqn.2026-01.test:t".into(),
            group: 1,
        }));
        luns.add(0, Rc::clone(&unit) as _);
        let nexuses = (0..NEXUSES as u8).map(|n| {
            let name = format!("iqn.2026-01.test:{n}");
            let Ok(id) = TransportId::iscsi(&name, Some([n; 6])) else { unreachable!("a good name") };
            Nexus::new(id, Rc::clone(&luns))
        });
        let nexuses = nexuses.collect();
        Self { unit, disk, keep, nexuses, model: vec![0; (BLOCKS * 512) as usize] }
    }

    /// What a command that was answered GOOD has done to the disk, where the model knows; else the disk is believed.
    fn follow(&mut self, cdb: &[u8], data: &[u8]) {
        let field = |at: usize, length: usize| {
            cdb[at..at + length].iter().fold(0usize, |n, b| n << 8 | usize::from(*b))
        };
        let (lba, blocks) = match cdb[0] >> 5 {
            0 => (field(1, 3) & 0x1f_ffff, if cdb[4] == 0 { 256 } else { field(4, 1) }),
            1 | 2 => (field(2, 4), field(7, 2)),
            5 => (field(2, 4), field(6, 4)),
            _ => (field(2, 8), field(10, 4)),
        };
        // What has no address is not looked at below: nothing is wrong with any number there.
        let at = lba.wrapping_mul(512);
        match cdb[0] {
            // WRITE, WRITE AND VERIFY: the whole blocks that came.
            0x0a | 0x2a | 0xaa | 0x8a | 0x2e | 0xae | 0x8e => {
                let count = (blocks * 512).min(data.len() / 512 * 512);
                self.model[at..at + count].copy_from_slice(&data[..count]);
            }
            0x9c => {
                let count = field(12, 2) * 512;
                self.model[at..at + count].copy_from_slice(&data[..count]);
            }
            0x89 => {
                let half = field(13, 1) * 512;
                assert_eq!(self.model[at..at + half], data[..half], "compared equal");
                self.model[at..at + half].copy_from_slice(&data[half..2 * half]);
            }
            0x8b => {
                let place = self.model[at..at + blocks * 512].iter_mut();
                place.zip(data).for_each(|(old, new)| *old |= new);
            }
            0x41 | 0x93 => {
                let end = if blocks == 0 { BLOCKS as usize } else { lba + blocks };
                let zero = [0; 512];
                let block = if data.len() == 512 { data } else { &zero };
                self.model[at..end * 512].chunks_mut(512).for_each(|c| c.copy_from_slice(block));
            }
            // UNMAP, SANITIZE, EXTENDED COPY: not modelled.
            0x42 | 0x48 | 0x83 => self.model = self.disk.to_bytes(),
            _ => {}
        }
    }

    async fn step(&mut self, input: &mut Input<'_>) -> Option<()> {
        let (choice, lengths) = (input.byte()?, input.byte()?);
        let nexus = Rc::clone(&self.nexuses[usize::from(choice) % NEXUSES]);
        let cdb = input.bytes(usize::from(lengths & 0x1f));
        let data = match lengths >> 5 {
            0 => &[][..],
            1 => input.bytes(24),
            2 => input.bytes(512),
            3 => input.bytes(1024),
            n => input.bytes(usize::from(n) * 13),
        };
        let room = if choice & 0x40 != 0 { INTO_MAX } else { usize::from(choice) };
        let lun = lun_bytes(u16::from(choice & 0x80 != 0));
        let offered = Offered { out: data.len() as u64, into: room as u64 };
        let command = nexus.begin(lun, 1, Attribute::Simple, cdb, offered);
        let data = &data[..command.out_bytes()];
        let mut into = vec![0xa5; command.in_bytes()];
        let length = into.len();
        let reply = command.run(&Segments::new(data), &SegmentsMut::new(&mut into)).await;
        let Some(reply) = reply else { panic!("nobody aborted it") };
        check_reply(&reply, length);
        if reply.status == Status::Good && choice & 0x80 == 0 && !cdb.is_empty() {
            self.follow(cdb, data);
            if matches!(cdb[0], 0x28 | 0x88) {
                self.check_read(cdb, &into, &reply);
            }
        } else if reply.status != Status::Good {
            // WRITE AND VERIFY may have written before it failed; nothing else may have touched the disk.
            assert!(self.disk.to_bytes() == self.model || matches!(cdb.first(), Some(0x83)));
            self.model = self.disk.to_bytes();
        }
        assert!(self.disk.to_bytes() == self.model, "the disk holds what the commands said");
        Some(())
    }

    fn check_read(&self, cdb: &[u8], into: &[u8], reply: &Reply) {
        let at = match cdb[0] {
            0x28 => cdb[2..6].iter(),
            _ => cdb[2..10].iter(),
        };
        let at = at.fold(0usize, |n, b| n << 8 | usize::from(*b)) * 512;
        assert_eq!(into[..reply.in_moved], self.model[at..at + reply.in_moved]);
    }
}

fn check_reply(reply: &Reply, room: usize) {
    assert!(reply.in_moved <= room && reply.in_moved as u64 <= reply.in_wanted);
    assert_eq!(reply.status == Status::CheckCondition, !reply.sense.is_empty());
    assert!(reply.sense.len() <= 64);
    if reply.status != Status::Good {
        assert_eq!(reply.in_moved, 0);
    }
}

/// Runs the commands in `input` on a disk of 64 blocks, from three nexuses, and compares the disk with a model after
/// each. The first byte chooses settings; a command is: a byte of choices (nexus, room for data-in, an absent LUN), a byte
/// of lengths (CDB, data-out), the CDB, the data.
pub fn fuzz_cdb(input: &[u8]) {
    let mut input = Input(input);
    let Some(choice) = input.byte() else { return };
    lane::block_on(async {
        let mut bench = Bench::new(choice);
        while bench.step(&mut input).await.is_some() {}
        assert!(bench.unit.tasks.is_empty(), "every task has ended");
        let kept = Kept::decode(&bench.keep.record(), 1, choice & 4 != 0);
        assert_eq!(kept.map(|k| k.state), Ok(bench.unit.reservations()), "what is kept is what is");
    });
}

/// Any bytes as a kept record: what is taken can be written and read again, and means the same.
pub fn fuzz_kept(input: &[u8]) {
    if let Ok(kept) = Kept::decode(input, 1, false) {
        assert_eq!(Kept::decode(&kept.encode(1), 1, false), Ok(kept));
    }
}
