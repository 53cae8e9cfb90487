//! Commands that go to a device as they are: a physical RDM of a LUN that is not ours (R2).
//!
//! A physical RDM of one of our own LUNs needs nothing of this: its [`crate::LogicalUnit`] stands in the VM's
//! [`crate::LunMap`] itself, with the LUN's identity and reservations. REPORT LUNS never comes here (R3).

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::time::Duration;

use block::{Io, Segments, SegmentsMut};
use lane::sg::SgDisk;

use crate::command::{Offered, Planned, PlannedCdb};
use crate::lun::{Call, Executing, ScsiLun};
use crate::nexus::{Port, Seat};
use crate::reply::{Answer, Fail, Status};
use crate::sense::{Key, Sense, asc};
use crate::task::TaskSet;

/// Longest CDB of a fixed length; what vendors define is taken to be as long.
const CDB_BYTES: usize = 16;
/// Longest CDB there is (SPC-4 4.2.3).
const CDB_BYTES_MAX: usize = 260;

/// What a device answered, byte for byte.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DeviceReply {
    /// SCSI status byte.
    pub status: u8,
    /// Sense data; empty without.
    pub sense: Vec<u8>,
    /// Bytes of data-in that are in place.
    pub in_moved: usize,
}

/// A SCSI device of somebody else: Linux' SG_IO, another target.
pub trait Device {
    /// Most bytes that one command can move.
    fn transfer_bytes_max(&self) -> u64;

    /// Executes a command. At most one of `from` and `into` has a length. An error is one of the way to the device, not of
    /// the device.
    fn execute<'a>(
        &'a self,
        cdb: &'a [u8],
        from: &'a Segments<'a>,
        into: &'a SegmentsMut<'a>,
    ) -> Io<'a, DeviceReply>;

    /// Resets the logical unit.
    fn reset(&self) -> Io<'_>;
}

/// A logical unit that hands every command to a device.
pub struct PassThrough {
    device: Rc<dyn Device>,
    tasks: Rc<TaskSet>,
    seats: RefCell<Vec<Weak<Seat>>>,
    passed: Cell<u64>,
}

impl PassThrough {
    /// A logical unit that is this device.
    pub fn new(device: Rc<dyn Device>) -> Rc<Self> {
        Rc::new(Self { device, tasks: Rc::default(), seats: RefCell::default(), passed: Cell::new(0) })
    }

    /// Commands that the device has answered.
    pub fn passed(&self) -> u64 {
        self.passed.get()
    }
}

/// How many of the bytes that the transport delivered are the CDB (SPC-4 4.2.5.1); the rest is padding.
fn cdb_of(raw: &[u8]) -> Option<&[u8]> {
    let length = match raw.first()? >> 5 {
        0 => 6,
        1 | 2 => 10,
        3 => 8 + usize::from(*raw.get(7)?),
        4 => 16,
        5 => 12,
        // Vendor specific: only the device knows.
        _ => raw.len().min(CDB_BYTES),
    };
    raw.get(..length).filter(|cdb| cdb.len() <= CDB_BYTES_MAX)
}

impl ScsiLun for PassThrough {
    fn present(&self, _port: &Rc<Port>) {}

    fn arrive(&self, seat: &Rc<Seat>) {
        let mut seats = self.seats.borrow_mut();
        seats.retain(|s| s.strong_count() > 0 && !std::ptr::eq(s.as_ptr(), Rc::as_ptr(seat)));
        seats.push(Rc::downgrade(seat));
        // Power on and nexus loss are the device's to tell.
    }

    fn leave(&self, _seat: &Rc<Seat>) {}

    fn plan(&self, seat: &Rc<Seat>, raw: &[u8], offered: Offered) -> Result<Planned, Fail> {
        let exempt = matches!(raw.first(), Some(0x12 | 0x03));
        if !exempt && let Some(code) = seat.take_attention() {
            return Err(Sense::new(Key::UnitAttention, code).into());
        }
        let cdb = cdb_of(raw).ok_or(Sense::illegal(asc::INVALID_OPCODE))?;
        let both = offered.out > 0 && offered.into > 0;
        if both || offered.out.max(offered.into) > self.device.transfer_bytes_max() {
            return Err(Sense::illegal(asc::INVALID_FIELD_IN_CDB).into());
        }
        Ok(Planned { cdb: PlannedCdb::Raw(cdb.to_vec()), out: offered.out, into: offered.into })
    }

    fn execute<'a>(&'a self, call: Call<'a>) -> Executing<'a> {
        Box::pin(async move {
            let PlannedCdb::Raw(cdb) = &call.planned.cdb else {
                // `plan` makes none of these.
                return Err(Sense::illegal(asc::INVALID_OPCODE).into());
            };
            let reply = self.device.execute(cdb, call.from, call.into).await.map_err(|error| {
                tracing::warn!(%error, "a device could not be reached");
                Fail::Check(Sense::new(Key::NotReady, asc::LOGICAL_UNIT_NOT_READY))
            })?;
            self.passed.set(self.passed.get() + 1);
            let moved = reply.in_moved.min(call.into.len());
            match Status::from_code(reply.status) {
                Some(Status::Good) => Ok(Answer::Moved { wanted: moved as u64, moved }),
                Some(Status::CheckCondition) => Err(Fail::Raw(reply.sense)),
                Some(other) => Err(Fail::Plain(other)),
                None => Err(Sense::new(Key::HardwareError, asc::INTERNAL_TARGET_FAILURE).into()),
            }
        })
    }

    fn tasks(&self) -> &Rc<TaskSet> {
        &self.tasks
    }

    fn reset(&self) {
        for seat in self.seats.borrow().iter().filter_map(Weak::upgrade) {
            seat.attend(asc::BUS_DEVICE_RESET);
        }
        let device = Rc::clone(&self.device);
        drop(lane::spawn(async move {
            if let Err(error) = device.reset().await {
                tracing::warn!(%error, "a device could not be reset");
            }
        }));
    }

    fn tells_aborted(&self) -> bool {
        false
    }

    fn descriptor_sense(&self) -> bool {
        false
    }
}

/// How long a command may take before the kernel gives it up. Longer than an initiator waits (Linux: 30 s), so that it is
/// the initiator who decides.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A disk of the host, by SG_IO. To its array every VM of the host is one initiator, the host: reservations of VMs on one
/// host do not keep them from each other, as they do on our own LUNs (R50).
impl Device for SgDisk {
    fn transfer_bytes_max(&self) -> u64 {
        SgDisk::transfer_bytes_max(self)
    }

    fn execute<'a>(
        &'a self,
        cdb: &'a [u8],
        from: &'a Segments<'a>,
        into: &'a SegmentsMut<'a>,
    ) -> Io<'a, DeviceReply> {
        Box::pin(async move {
            let reply = SgDisk::execute(self, cdb, from, into, TIMEOUT).await?;
            let in_moved = if into.is_empty() { 0 } else { reply.moved };
            Ok(DeviceReply { status: reply.status, sense: reply.sense, in_moved })
        })
    }

    fn reset(&self) -> Io<'_> {
        Box::pin(async move { Ok(SgDisk::reset(self).await?) })
    }
}
