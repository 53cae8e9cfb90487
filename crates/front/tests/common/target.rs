//! A target for tests: one disk in memory, open to whom the test says.

use std::collections::BTreeMap;
use std::rc::Rc;

use block::{Disk, MemoryDisk};
use front::iscsi::{Access, Chap, Name, NewTarget, Options, Server, Targets, Who};
use scsi::{Identity, Keep, LogicalUnit, LunMap, Port, Settings};

pub const GROUP: u16 = 1;

struct Forgetful;

impl Keep for Forgetful {
    fn save<'a>(&'a self, _record: &'a [u8]) -> block::Io<'a> {
        Box::pin(async { Ok(()) })
    }
}

/// A logical unit over a disk.
pub fn unit(disk: Rc<dyn Disk>, number: u128) -> Rc<LogicalUnit> {
    let identity = Identity::lun(uuid::Uuid::from_u128(number), number.to_be_bytes());
    let settings = Settings { sanitize: true, atomic_blocks: 256, ..Settings::default() };
    LogicalUnit::new(disk, identity, settings, Rc::new(Forgetful), &[]).unwrap()
}

/// The logical units that initiators see through a target port.
pub fn luns(target: &str, port: u16, units: &[(u16, &Rc<LogicalUnit>)]) -> BTreeMap<u16, Rc<LunMap>> {
    let map = LunMap::new(Rc::new(Port {
        relative: port,
        name: format!("{target},t,0x{GROUP:04x}"),
        device_name: target.into(),
        group: 1,
    }));
    for (number, unit) in units {
        assert!(map.add(*number, Rc::clone(unit) as Rc<dyn scsi::ScsiLun>));
    }
    BTreeMap::from([(GROUP, map)])
}

pub fn name(name: &str) -> Name {
    Name::new(name).unwrap()
}

/// A server with one target that everybody may use, whose LUN 1 is `disk`.
pub fn open_to_all(target: &str, disk: Rc<MemoryDisk>, chap: Option<Chap>, options: Options) -> Rc<Server> {
    let targets = Targets::new();
    let access = Access { luns: luns(target, 1, &[(1, &unit(disk, 1))]), chap };
    let groups = vec![GROUP];
    let access = vec![(Who::Anyone, access)];
    targets.add(NewTarget { name: name(target), alias: "test".into(), groups, access }).unwrap();
    Server::new(targets, options)
}
