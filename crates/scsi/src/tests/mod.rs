//! Commands against the standards, table by table.

mod admission;
mod atomic;
mod basics;
mod copying;
mod crash;
mod data;
mod fencing;
mod fuzzing;
mod raw_mapping;
mod reservations;
mod tasks;

use std::rc::Rc;

use block::{Disk, MemoryDisk, Segments, SegmentsMut};
use uuid::Uuid;

use crate::fuzz::MemoryKeep;
use crate::sense::{Key, Sense};
use crate::{
    Attribute, Identity, LogicalUnit, LunMap, Nexus, Offered, Port, Reply, Settings, Status, TransportId,
    lun_bytes,
};

pub(crate) const BLOCKS: u64 = 4096;

/// A logical unit at LUN 0 of a port, and what stands around it.
pub(crate) struct Bench {
    pub unit: Rc<LogicalUnit>,
    pub luns: Rc<LunMap>,
    pub keep: Rc<MemoryKeep>,
}

pub(crate) fn port(relative: u16) -> Rc<Port> {
    Rc::new(Port {
        relative,
        name: format!("iqn.2026-01.test:t,t,0x{relative:04x}"),
        device_name: "iqn.2026-01.test:t".into(),
        group: 1,
    })
}

pub(crate) fn initiator(n: u8) -> TransportId {
    TransportId::iscsi(&format!("iqn.2026-01.test:{n}"), Some([n; 6])).unwrap()
}

pub(crate) fn identity() -> Identity {
    Identity::lun(Uuid::from_u128(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef), [0x60; 16])
}

impl Bench {
    pub fn new() -> Self {
        Self::with(Rc::new(MemoryDisk::new(BLOCKS)), Settings::default())
    }

    pub fn with(disk: Rc<dyn Disk>, settings: Settings) -> Self {
        let keep = Rc::new(MemoryKeep::default());
        let unit = LogicalUnit::new(disk, identity(), settings, Rc::clone(&keep) as _, &[]).unwrap();
        let luns = LunMap::new(port(1));
        assert!(luns.add(0, Rc::clone(&unit) as _));
        Self { unit, luns, keep }
    }

    /// A nexus that has seen its power on already.
    pub fn nexus(&self, n: u8) -> Rc<Nexus> {
        let nexus = Nexus::new(initiator(n), Rc::clone(&self.luns));
        drop(nexus.begin(lun_bytes(0), 0, Attribute::Simple, &[0; 6], Offered::default()));
        nexus
    }
}

/// Runs a command with this data-out and this much room, at LUN 0.
pub(crate) async fn run(nexus: &Rc<Nexus>, cdb: &[u8], data: &[u8], room: usize) -> (Reply, Vec<u8>) {
    run_at(nexus, 0, cdb, data, room).await
}

pub(crate) async fn run_at(
    nexus: &Rc<Nexus>,
    lun: u16,
    cdb: &[u8],
    data: &[u8],
    room: usize,
) -> (Reply, Vec<u8>) {
    let offered = Offered { out: data.len() as u64, into: room as u64 };
    let command = nexus.begin(lun_bytes(lun), 7, Attribute::Simple, cdb, offered);
    let mut into = vec![0xee; command.in_bytes()];
    let data = &data[..command.out_bytes()];
    let reply = command.run(&Segments::new(data), &SegmentsMut::new(&mut into)).await.unwrap();
    into.truncate(reply.in_moved);
    (reply, into)
}

/// The data of a command that must go well.
pub(crate) async fn get(nexus: &Rc<Nexus>, cdb: &[u8]) -> Vec<u8> {
    let (reply, data) = run(nexus, cdb, &[], 1 << 20).await;
    assert_eq!(reply.status, Status::Good, "{cdb:02x?}: {:02x?}", reply.sense);
    data
}

/// A command that must go well.
pub(crate) async fn put(nexus: &Rc<Nexus>, cdb: &[u8], data: &[u8]) {
    let (reply, _) = run(nexus, cdb, data, 0).await;
    assert_eq!(reply.status, Status::Good, "{cdb:02x?}: {:02x?}", reply.sense);
}

/// A command that must be refused with this sense.
pub(crate) async fn refused(nexus: &Rc<Nexus>, cdb: &[u8], data: &[u8], sense: Sense) {
    let (reply, _) = run(nexus, cdb, data, 1 << 20).await;
    assert_eq!(reply.status, Status::CheckCondition, "{cdb:02x?}");
    assert_eq!(reply.sense, sense.encode(false), "{cdb:02x?}");
}

pub(crate) async fn conflict(nexus: &Rc<Nexus>, cdb: &[u8], data: &[u8]) {
    let (reply, _) = run(nexus, cdb, data, 1 << 20).await;
    assert_eq!(reply.status, Status::ReservationConflict, "{cdb:02x?}: {:02x?}", reply.sense);
    assert!(reply.sense.is_empty());
}

/// The unit attention that the next TEST UNIT READY reports.
pub(crate) async fn attention(nexus: &Rc<Nexus>) -> Option<u16> {
    let (reply, _) = run(nexus, &[0; 6], &[], 0).await;
    if reply.status == Status::Good {
        return None;
    }
    assert_eq!(reply.status, Status::CheckCondition);
    assert_eq!(reply.sense[2] & 0x0f, Key::UnitAttention as u8);
    Some(u16::from_be_bytes([reply.sense[12], reply.sense[13]]))
}

/// A 10-byte CDB with LBA and length.
pub(crate) fn cdb10(code: u8, flags: u8, lba: u32, blocks: u16) -> Vec<u8> {
    let (l, b) = (lba.to_be_bytes(), blocks.to_be_bytes());
    vec![code, flags, l[0], l[1], l[2], l[3], 0, b[0], b[1], 0]
}

/// A 16-byte CDB with LBA and length.
pub(crate) fn cdb16(code: u8, flags: u8, lba: u64, blocks: u32) -> Vec<u8> {
    [vec![code, flags], lba.to_be_bytes().to_vec(), blocks.to_be_bytes().to_vec(), vec![0, 0]].concat()
}

/// A 12-byte CDB with LBA and length.
pub(crate) fn cdb12(code: u8, flags: u8, lba: u32, blocks: u32) -> Vec<u8> {
    [vec![code, flags], lba.to_be_bytes().to_vec(), blocks.to_be_bytes().to_vec(), vec![0, 0]].concat()
}
