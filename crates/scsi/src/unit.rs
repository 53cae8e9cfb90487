//! A logical unit over a disk: what it is, who sits at it, and which command does what.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use block::{Disk, Io, Locked, RangeLock, Sector};
use lane::sync::Turn;

use crate::command::{Offered, Planned, PlannedCdb, allocation};
use crate::copy::Copies;
use crate::inquiry::{Identity, supported};
use crate::lun::{Call, Executing, ScsiLun};
use crate::mode::Modes;
use crate::nexus::{Port, Seat};
use crate::opcode::{Allow, Cdb, Op};
use crate::pr::{Access, Corrupt, Kept, State};
use crate::reply::{Answer, Fail, Status};
use crate::sanitize::Sanitizing;
use crate::sense::{Key, Sense, asc};
use crate::task::TaskSet;

/// What one command may be at most. Reported in VPD B0.
pub mod limits {
    /// Most blocks a command moves: bounds the memory of one command to 32 MiB.
    pub const TRANSFER_BLOCKS: u64 = 65536;
    /// Beyond this a command gains nothing by being larger.
    pub const OPTIMAL_TRANSFER_BLOCKS: u64 = 2048;
    /// Blocks of 512 bytes in a physical block.
    pub const PHYSICAL_BLOCKS: u64 = 8;
    /// Most blocks of COMPARE AND WRITE.
    pub const COMPARE_AND_WRITE_BLOCKS: u64 = 128;
    /// Most blocks of one UNMAP.
    pub const UNMAP_BLOCKS: u64 = 1 << 20;
    /// Most descriptors of one UNMAP.
    pub const UNMAP_DESCRIPTORS: u64 = 256;
    /// Most blocks of WRITE SAME: 8 GiB.
    pub const WRITE_SAME_BLOCKS: u64 = 1 << 24;
    /// Most bytes of parameter data in one answer.
    pub const PARAMETER_BYTES: u64 = 256 << 10;
}

/// How a logical unit behaves.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settings {
    /// Thin provisioned (else fully provisioned by something that still unmaps).
    pub thin: bool,
    /// SANITIZE exists. It never reaches snapshots.
    pub sanitize: bool,
    /// Most blocks of WRITE ATOMIC; 0: there is none. Against other commands any size is atomic here; a power loss is
    /// the disk's matter, so only who knows the disk may set this.
    pub atomic_blocks: u16,
    /// Match registrations by the initiator's name alone (R53).
    pub by_name: bool,
    /// Which boot of the machine this is: a record of another boot was left by a power loss.
    pub boot: u128,
}

impl Default for Settings {
    fn default() -> Self {
        Self { thin: true, sanitize: false, atomic_blocks: 0, by_name: false, boot: 0 }
    }
}

/// Where the state that outlives the daemon is kept: registrations, reservation, saved mode parameters. The bytes are a
/// [`Kept`] record, at most [`crate::pr::RECORD_BYTES_MAX`].
pub trait Keep {
    /// Replaces what is kept. Durable when it returns (R52); after a failure either record may be there.
    fn save<'a>(&'a self, record: &'a [u8]) -> Io<'a>;
}

/// A SCSI disk over a [`Disk`]. One per LUN, shared by all front ends.
pub struct LogicalUnit {
    pub(crate) disk: Rc<dyn Disk>,
    pub(crate) identity: Identity,
    pub(crate) settings: Settings,
    keep: Rc<dyn Keep>,
    pub(crate) locks: Rc<RangeLock>,
    pub(crate) tasks: Rc<TaskSet>,
    seats: RefCell<Vec<Weak<Seat>>>,
    pub(crate) ports: RefCell<Vec<Rc<Port>>>,
    pub(crate) pr: RefCell<State>,
    /// One change of what is kept at a time.
    pub(crate) keeping: Turn,
    /// Who holds it by RESERVE (SPC-2).
    pub(crate) reserved: RefCell<Option<Weak<Seat>>>,
    /// Changes with every change of reservations: what seats remember about access is void then.
    pub(crate) epoch: Cell<u64>,
    pub(crate) modes: Cell<Modes>,
    pub(crate) saved: Cell<Modes>,
    pub(crate) copies: Copies,
    pub(crate) sanitizing: Sanitizing,
    interpreted: Cell<u64>,
    /// For work that outlives its command.
    pub(crate) me: Weak<Self>,
}

/// What lies between a command and the right to be executed.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Barrier {
    Persistent(Access),
    /// Another nexus has it by RESERVE.
    Reserved,
}

impl LogicalUnit {
    /// A logical unit over `disk`. `kept` is what `keep` saved last, nothing for a new LUN.
    pub fn new(
        disk: Rc<dyn Disk>,
        identity: Identity,
        settings: Settings,
        keep: Rc<dyn Keep>,
        kept: &[u8],
    ) -> Result<Rc<Self>, Corrupt> {
        let kept = Kept::decode(kept, settings.boot, settings.by_name)?;
        let saved = Modes::from(kept.modes);
        Ok(Rc::new_cyclic(|me| Self {
            disk,
            identity,
            settings,
            keep,
            locks: RangeLock::new(),
            tasks: Rc::default(),
            seats: RefCell::default(),
            ports: RefCell::default(),
            pr: RefCell::new(kept.state),
            keeping: Turn::new(),
            reserved: RefCell::new(None),
            epoch: Cell::new(1),
            modes: Cell::new(saved),
            saved: Cell::new(saved),
            copies: Copies::default(),
            sanitizing: Sanitizing::default(),
            interpreted: Cell::new(0),
            me: Weak::clone(me),
        }))
    }

    /// The disk itself, without reservations in between.
    pub fn disk(&self) -> &Rc<dyn Disk> {
        &self.disk
    }

    /// Commands that were interpreted here; what a device behind a physical mapping answers is not among them.
    pub fn interpreted(&self) -> u64 {
        self.interpreted.get()
    }

    /// Who it says it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Registrations and reservation, to be shown.
    pub fn reservations(&self) -> State {
        self.pr.borrow().clone()
    }

    /// The disk was resized: every nexus is told.
    pub fn capacity_changed(&self) {
        self.attend(asc::CAPACITY_CHANGED, |_| true);
    }

    /// Capacity in blocks.
    pub(crate) fn blocks(&self) -> u64 {
        self.disk.shape().sectors
    }

    /// Raises a unit attention on the seats that `which` names.
    pub(crate) fn attend(&self, code: u16, which: impl Fn(&Rc<Seat>) -> bool) {
        for seat in self.living() {
            if which(&seat) {
                seat.attend(code);
            }
        }
    }

    pub(crate) fn living(&self) -> Vec<Rc<Seat>> {
        let mut seats = self.seats.borrow_mut();
        seats.retain(|s| s.strong_count() > 0);
        seats.iter().filter_map(Weak::upgrade).collect()
    }

    /// Makes a record durable (decide, save, commit: the caller commits).
    pub(crate) async fn save(&self, kept: &Kept) -> Result<(), Fail> {
        let record = kept.encode(self.settings.boot);
        self.keep.save(&record).await.map_err(|error| {
            tracing::error!(%error, lun = self.identity.serial, "reservations could not be kept");
            Fail::Check(Sense::new(Key::HardwareError, asc::INTERNAL_TARGET_FAILURE))
        })
    }

    /// Reservations are other ones now.
    pub(crate) fn reservations_changed(&self) {
        self.epoch.set(self.epoch.get() + 1);
    }

    /// Who holds it by RESERVE.
    pub(crate) fn reserved_by(&self) -> Option<Rc<Seat>> {
        self.reserved.borrow().as_ref().and_then(Weak::upgrade)
    }

    /// What keeps this nexus from commands. A look at two numbers unless reservations have changed.
    #[inline]
    pub(crate) fn barrier(&self, seat: &Rc<Seat>) -> Barrier {
        if self.reserved.borrow().is_some()
            && let Some(holder) = self.reserved_by()
            && !Rc::ptr_eq(&holder, seat)
        {
            return Barrier::Reserved;
        }
        let (epoch, access) = seat.access.get();
        if epoch == self.epoch.get() {
            return Barrier::Persistent(access);
        }
        let access = self.pr.borrow().access(&seat.it);
        seat.access.set((self.epoch.get(), access));
        Barrier::Persistent(access)
    }

    /// Reservations let this command through (SPC-4 table 66, SBC-3 table 13; SPC-2 table 9 for RESERVE).
    fn admit(&self, seat: &Rc<Seat>, cdb: &Cdb) -> Result<(), Fail> {
        let conflict = Err(Fail::Plain(Status::ReservationConflict));
        let allow = match cdb.line.op {
            // Starting, and allowing removal, are no harm.
            Op::StartStopUnit if cdb.byte(4) & 0x01 != 0 => Allow::Always,
            Op::PreventAllow if cdb.byte(4) & 0x01 == 0 => Allow::Always,
            _ => cdb.line.allow,
        };
        match self.barrier(seat) {
            Barrier::Persistent(Access::All) => Ok(()),
            Barrier::Persistent(Access::Reading) if allow != Allow::Writing => Ok(()),
            Barrier::Persistent(_) if allow == Allow::Always => Ok(()),
            Barrier::Persistent(_) => conflict,
            Barrier::Reserved => match cdb.line.op {
                Op::Inquiry | Op::RequestSense | Op::ReportLuns | Op::Release => Ok(()),
                Op::PreventAllow if allow == Allow::Always => Ok(()),
                _ => conflict,
            },
        }
    }

    /// Locks a range for a command, together with others. Then reservations are looked at once more: what queued up behind
    /// another command must not reach the disk of who has fenced its sender meanwhile.
    pub(crate) async fn lock_shared(
        &self,
        call: &Call<'_>,
        cdb: &Cdb,
        lba: u64,
        blocks: u64,
    ) -> Result<Locked, Fail> {
        let locked = self.locks.shared(Sector(lba), blocks).await;
        self.admit(call.seat, cdb).map(|()| locked)
    }

    /// The same, for a command that must be alone in its range.
    pub(crate) async fn lock_alone(&self, call: &Call<'_>, cdb: &Cdb) -> Result<Locked, Fail> {
        let locked = self.locks.alone(Sector(cdb.lba()), cdb.blocks()).await;
        self.admit(call.seat, cdb).map(|()| locked)
    }

    /// What the command moves, and every check of its fields that needs no data.
    fn measure(&self, cdb: Cdb, offered: Offered) -> Result<Planned, Fail> {
        let planned = |cdb: Cdb, out: u64, into: u64| Planned { cdb: PlannedCdb::Known(cdb), out, into };
        let bytes = |blocks: u64| blocks * 512;
        Ok(match cdb.line.op {
            Op::Read => {
                let blocks = self.range(&cdb)?;
                planned(cdb, 0, bytes(blocks))
            }
            Op::Write | Op::OrWrite | Op::WriteAtomic => {
                let blocks = self.range(&cdb)?;
                self.must_be_writable()?;
                if cdb.line.op == Op::WriteAtomic {
                    self.check_atomic(&cdb, blocks)?;
                }
                planned(cdb, bytes(blocks), 0)
            }
            Op::WriteAndVerify => {
                let blocks = self.range(&cdb)?;
                self.must_be_writable()?;
                // BYTCHK 1xb is of VERIFY only (SBC-3 5.50).
                if cdb.bytchk() > 1 {
                    return Err(Sense::cdb(1, Some(2)).into());
                }
                planned(cdb, bytes(blocks), 0)
            }
            Op::Verify => {
                let blocks = self.range(&cdb)?;
                let out = match cdb.bytchk() {
                    0 => 0,
                    1 => bytes(blocks),
                    3 => bytes(blocks.min(1)),
                    _ => return Err(Sense::cdb(1, Some(2)).into()),
                };
                planned(cdb, out, 0)
            }
            Op::CompareAndWrite => {
                let blocks = self.range(&cdb)?;
                self.must_be_writable()?;
                // The data-out is two halves of this length: another length cannot be meant.
                if blocks > limits::COMPARE_AND_WRITE_BLOCKS || offered.out != 2 * bytes(blocks) {
                    return Err(Sense::cdb(13, None).into());
                }
                planned(cdb, 2 * bytes(blocks), 0)
            }
            Op::WriteSame => {
                self.measure_write_same(&cdb, offered)?;
                let out = if cdb.length() == 16 && cdb.byte(1) & 1 != 0 { 0 } else { 512 };
                planned(cdb, out, 0)
            }
            Op::Prefetch | Op::SynchronizeCache => {
                self.in_capacity(&cdb, cdb.blocks())?;
                planned(cdb, 0, 0)
            }
            Op::Unmap | Op::Sanitize => {
                self.must_be_writable()?;
                let out = u64::from(cdb.be16(7));
                planned(cdb, out, 0)
            }
            Op::ModeSelect => {
                let out = if cdb.length() == 6 { u64::from(cdb.byte(4)) } else { u64::from(cdb.be16(7)) };
                planned(cdb, out, 0)
            }
            Op::PersistentReserveOut => {
                let out = u64::from(cdb.be32(5));
                if out > crate::pr::LIST_BYTES_MAX as u64 {
                    return Err(Sense::illegal(asc::PARAMETER_LIST_LENGTH_ERROR).into());
                }
                planned(cdb, out, 0)
            }
            Op::ExtendedCopy => {
                let out = u64::from(cdb.be32(10));
                if out > crate::copy::LIST_BYTES_MAX {
                    return Err(Sense::illegal(asc::PARAMETER_LIST_LENGTH_ERROR).into());
                }
                planned(cdb, out, 0)
            }
            Op::Reserve | Op::Release if cdb.length() == 10 && cdb.be16(7) != 0 => {
                return Err(Sense::cdb(7, None).into());
            }
            Op::TestUnitReady | Op::Reserve | Op::Release | Op::StartStopUnit | Op::PreventAllow => {
                planned(cdb, 0, 0)
            }
            Op::ReadCapacity10 => planned(cdb, 0, 8),
            Op::RequestSense
            | Op::Inquiry
            | Op::ModeSense
            | Op::ReadCapacity16
            | Op::ReadDefectData
            | Op::LogSense
            | Op::PersistentReserveIn
            | Op::ReceiveCopyResults
            | Op::GetLbaStatus
            | Op::ReportLuns
            | Op::ReportTargetPortGroups
            | Op::ReportSupportedOpcodes
            | Op::ReportSupportedTaskManagement => {
                let into = allocation(&cdb).min(limits::PARAMETER_BYTES);
                planned(cdb, 0, into)
            }
        })
    }

    /// The range is on the disk. An LBA right behind the end is allowed for no blocks at all.
    pub(crate) fn in_capacity(&self, cdb: &Cdb, blocks: u64) -> Result<(), Fail> {
        let capacity = self.blocks();
        match cdb.lba().checked_add(blocks) {
            Some(end) if end <= capacity => Ok(()),
            _ => {
                // INFORMATION: the first block that is not there.
                let first = cdb.lba().max(capacity);
                Err(Sense::illegal(asc::LBA_OUT_OF_RANGE).with_information(first).into())
            }
        }
    }

    /// The range is on the disk and not longer than one command may be; its length.
    fn range(&self, cdb: &Cdb) -> Result<u64, Fail> {
        let blocks = cdb.blocks();
        self.in_capacity(cdb, blocks)?;
        if blocks > limits::TRANSFER_BLOCKS {
            return Err(Sense::cdb(cdb.blocks_field(), None).into());
        }
        Ok(blocks)
    }

    pub(crate) fn must_be_writable(&self) -> Result<(), Fail> {
        if self.disk.shape().read_only {
            return Err(Sense::new(Key::DataProtect, asc::WRITE_PROTECTED).into());
        }
        if self.modes.get().write_protect {
            return Err(Sense::new(Key::DataProtect, asc::SOFTWARE_WRITE_PROTECTED).into());
        }
        Ok(())
    }

    async fn dispatch(&self, call: Call<'_>, cdb: &Cdb) -> Result<Answer, Fail> {
        self.interpreted.set(self.interpreted.get() + 1);
        // Reservations may have changed while the data came: who was fenced meanwhile does not write any more.
        self.admit(call.seat, cdb)?;
        match cdb.line.op {
            Op::Read => self.read(&call, cdb).await,
            Op::Write => self.write(&call, cdb).await,
            Op::WriteAndVerify => self.write_and_verify(&call, cdb).await,
            Op::Verify => self.verify(&call, cdb).await,
            Op::CompareAndWrite => self.compare_and_write(&call, cdb).await,
            Op::OrWrite => self.or_write(&call, cdb).await,
            Op::WriteAtomic => self.write_atomic(&call, cdb).await,
            Op::WriteSame => self.write_same(&call, cdb).await,
            Op::SynchronizeCache => self.synchronize(cdb).await,
            Op::Unmap => self.unmap(&call, cdb).await,
            Op::GetLbaStatus => self.lba_status(cdb).await,
            Op::Sanitize => self.sanitize(&call, cdb).await,
            Op::ModeSense => self.mode_sense(cdb),
            Op::ModeSelect => self.mode_select(&call, cdb).await,
            Op::PersistentReserveIn => self.persistent_reserve_in(cdb),
            Op::PersistentReserveOut => self.persistent_reserve_out(&call, cdb).await,
            Op::Reserve => self.reserve(call.seat),
            Op::Release => self.release(call.seat),
            Op::ExtendedCopy => self.extended_copy(&call, cdb).await,
            Op::ReceiveCopyResults => self.receive_copy_results(&call, cdb),
            Op::StartStopUnit => self.start_stop(cdb).await,
            Op::PreventAllow => {
                call.seat.prevents.set(cdb.byte(4) & 1 != 0);
                Ok(Answer::Good)
            }
            // Nothing is kept in front of the disk, so there is no place to fetch to: GOOD, not CONDITION MET.
            Op::TestUnitReady | Op::Prefetch => Ok(Answer::Good),
            Op::RequestSense => self.request_sense(call.seat, cdb),
            Op::Inquiry => self.inquiry(call.seat, cdb),
            Op::ReadCapacity10 => self.read_capacity_10(),
            Op::ReadCapacity16 => self.read_capacity_16(),
            Op::ReadDefectData => self.read_defect_data(cdb),
            Op::LogSense => self.log_sense(cdb),
            Op::ReportTargetPortGroups => self.report_target_port_groups(cdb),
            Op::ReportSupportedOpcodes => self.report_supported_opcodes(cdb),
            Op::ReportSupportedTaskManagement => self.report_supported_task_management(cdb),
            // Answered by the nexus: see `command::report_luns`.
            Op::ReportLuns => Err(Sense::illegal(asc::INVALID_OPCODE).into()),
        }
    }
}

impl ScsiLun for LogicalUnit {
    fn present(&self, port: &Rc<Port>) {
        let mut ports = self.ports.borrow_mut();
        if !ports.iter().any(|p| p.relative == port.relative) {
            ports.push(Rc::clone(port));
        }
    }

    fn arrive(&self, seat: &Rc<Seat>) {
        let mut seats = self.seats.borrow_mut();
        seats.retain(|s| s.strong_count() > 0);
        let returns = seats.iter().any(|s| std::ptr::eq(s.as_ptr(), Rc::as_ptr(seat)));
        if !returns {
            seats.push(Rc::downgrade(seat));
        }
        drop(seats);
        seat.attend(if returns { asc::I_T_NEXUS_LOSS } else { asc::POWER_ON });
    }

    fn leave(&self, seat: &Rc<Seat>) {
        seat.prevents.set(false);
        let holds = self.reserved_by().is_some_and(|holder| Rc::ptr_eq(&holder, seat));
        if holds {
            *self.reserved.borrow_mut() = None;
            self.reservations_changed();
        }
    }

    fn plan(&self, seat: &Rc<Seat>, raw: &[u8], offered: Offered) -> Result<Planned, Fail> {
        // INQUIRY and REQUEST SENSE do not report unit attentions (SAM-5 5.14).
        let exempt = matches!(raw.first(), Some(0x12 | 0x03));
        if !exempt && let Some(code) = seat.take_attention() {
            return Err(Sense::new(Key::UnitAttention, code).into());
        }
        let cdb = Cdb::parse(raw, |op| supported(op, &self.settings))?;
        self.sanitizing.admit(cdb.line.op)?;
        self.admit(seat, &cdb)?;
        self.measure(cdb, offered)
    }

    fn execute<'a>(&'a self, call: Call<'a>) -> Executing<'a> {
        Box::pin(async move {
            match &call.planned.cdb {
                PlannedCdb::Known(cdb) => self.dispatch(call, cdb).await,
                // `plan` makes none of these.
                PlannedCdb::Raw(_) => Err(Sense::illegal(asc::INVALID_OPCODE).into()),
            }
        })
    }

    fn tasks(&self) -> &Rc<TaskSet> {
        &self.tasks
    }

    fn reset(&self) {
        *self.reserved.borrow_mut() = None;
        self.reservations_changed();
        self.modes.set(self.saved.get());
        for seat in self.living() {
            seat.prevents.set(false);
            seat.attend(asc::BUS_DEVICE_RESET);
        }
    }

    fn tells_aborted(&self) -> bool {
        self.modes.get().task_aborted
    }

    fn descriptor_sense(&self) -> bool {
        self.modes.get().descriptor_sense
    }

    fn unit(&self) -> Option<&LogicalUnit> {
        Some(self)
    }
}
