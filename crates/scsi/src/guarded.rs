//! A logical unit's disk for front ends that speak no SCSI (NBD, vhost-user-blk): the same reservations and the same
//! range lock, as a nexus that never registers. So a node that was fenced off is fenced off here, too.

use std::rc::{Rc, Weak};

use block::{Disk, DiskError, Extents, Generation, Io, Safe, Sector, Segments, SegmentsMut, Shape};

use crate::lun::ScsiLun;
use crate::nexus::{Port, Seat};
use crate::pr::{Access, ItNexus};
use crate::transport_id::TransportId;
use crate::unit::{Barrier, LogicalUnit};

struct Guarded {
    unit: Rc<LogicalUnit>,
    seat: Rc<Seat>,
}

impl LogicalUnit {
    /// The disk, guarded by this logical unit's reservations. The name is how the client would be known if it could
    /// register.
    pub fn as_disk(self: &Rc<Self>, name: TransportId, port: &Rc<Port>) -> Rc<dyn Disk> {
        self.present(port);
        let seat = Seat::new(Weak::new(), 0, ItNexus { initiator: name, port: port.relative });
        Rc::new(Guarded { unit: Rc::clone(self), seat })
    }
}

impl Guarded {
    fn admit(&self, writing: bool) -> Result<(), DiskError> {
        match self.unit.barrier(&self.seat) {
            Barrier::Persistent(Access::All) => {}
            Barrier::Persistent(Access::Reading) if !writing => {}
            Barrier::Persistent(_) | Barrier::Reserved => return Err(DiskError::Conflict),
        }
        if writing && self.unit.modes.get().write_protect {
            return Err(DiskError::ReadOnly);
        }
        Ok(())
    }

    /// WCE is the disk's, whoever writes.
    fn safety(&self, safe: Safe) -> Safe {
        if self.unit.modes.get().write_cache { safe } else { Safe::OnReturn }
    }

    async fn durable(&self) -> Result<(), DiskError> {
        if self.unit.modes.get().write_cache { Ok(()) } else { self.unit.disk.flush().await }
    }
}

impl Disk for Guarded {
    fn shape(&self) -> Shape {
        let shape = self.unit.disk.shape();
        Shape { read_only: shape.read_only || self.unit.modes.get().write_protect, ..shape }
    }

    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        Box::pin(async move {
            let _locked = self.unit.locks.shared(at, into.len() as u64 / 512).await;
            self.admit(false)?;
            self.unit.disk.read(at, into).await
        })
    }

    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a> {
        Box::pin(async move {
            let _locked = self.unit.locks.shared(at, from.len() as u64 / 512).await;
            self.admit(true)?;
            self.unit.disk.write(at, from, self.safety(safe)).await
        })
    }

    fn zero(&self, at: Sector, count: u64, may_free: bool) -> Io<'_> {
        Box::pin(async move {
            let _locked = self.unit.locks.shared(at, count).await;
            self.admit(true)?;
            self.unit.disk.zero(at, count, may_free).await?;
            self.durable().await
        })
    }

    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        Box::pin(async move {
            let _locked = self.unit.locks.shared(at, count).await;
            self.admit(true)?;
            self.unit.disk.unmap(at, count).await?;
            self.durable().await
        })
    }

    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        Box::pin(async move {
            self.admit(false)?;
            self.unit.disk.status(at, count, since, out).await
        })
    }

    fn compare_and_write<'a>(
        &'a self,
        at: Sector,
        expected: &'a Segments<'a>,
        new: &'a Segments<'a>,
    ) -> Io<'a> {
        Box::pin(async move {
            let _locked = self.unit.locks.alone(at, new.len() as u64 / 512).await;
            self.admit(true)?;
            self.unit.disk.compare_and_write(at, expected, new).await?;
            self.durable().await
        })
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(async move {
            self.admit(false)?;
            self.unit.disk.flush().await
        })
    }
}
