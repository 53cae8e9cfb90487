//! What a command is answered with.

use block::DiskError;

use crate::sense::{Key, Sense, asc};

/// SCSI status (SAM-5 table 32).
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Good = 0x00,
    /// Sense data say what is wrong.
    CheckCondition = 0x02,
    /// Done, and what was asked for is so (PRE-FETCH).
    ConditionMet = 0x04,
    /// Try again later.
    Busy = 0x08,
    /// Another nexus' reservation forbids it.
    ReservationConflict = 0x18,
    /// Too many commands at a time.
    TaskSetFull = 0x28,
    /// An auto contingent allegiance is in the way.
    AcaActive = 0x30,
    /// Another nexus ended this command (only where the control mode page says TAS).
    TaskAborted = 0x40,
}

impl Status {
    /// The status with this code.
    pub fn from_code(code: u8) -> Option<Self> {
        const ALL: [Status; 8] = [
            Status::Good,
            Status::CheckCondition,
            Status::ConditionMet,
            Status::Busy,
            Status::ReservationConflict,
            Status::TaskSetFull,
            Status::AcaActive,
            Status::TaskAborted,
        ];
        ALL.into_iter().find(|s| *s as u8 == code)
    }
}

/// The answer to one command.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reply {
    /// Status byte.
    pub status: Status,
    /// Autosense; empty without.
    pub sense: Vec<u8>,
    /// Bytes put into the place for data-in, from its start.
    pub in_moved: usize,
    /// Bytes the command had to return. More than was offered: overflow; less: underflow.
    pub in_wanted: u64,
    /// Bytes the command takes. More than was offered: overflow; less: underflow.
    pub out_wanted: u64,
}

impl Reply {
    /// CHECK CONDITION. For front ends that have to fail a command themselves, too.
    pub fn check(sense: Sense, descriptor: bool) -> Self {
        Self { sense: sense.encode(descriptor), ..Self::plain(Status::CheckCondition) }
    }

    /// A status without data or sense.
    pub fn plain(status: Status) -> Self {
        Self { status, sense: Vec::new(), in_moved: 0, in_wanted: 0, out_wanted: 0 }
    }
}

/// Why a command did not do what it should.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fail {
    /// CHECK CONDITION with this sense.
    Check(Sense),
    /// A status that has no sense.
    Plain(Status),
    /// CHECK CONDITION with sense data that a real device made.
    Raw(Vec<u8>),
}

impl From<Sense> for Fail {
    fn from(sense: Sense) -> Self {
        Self::Check(sense)
    }
}

/// What the failure of a disk is in sense data: the one table. `writing` tells a failed write from a failed read.
pub(crate) fn from_disk(error: &DiskError, lba: u64, writing: bool) -> Fail {
    let sense = match error {
        DiskError::OutOfRange => Sense::illegal(asc::LBA_OUT_OF_RANGE),
        DiskError::ReadOnly => Sense::new(Key::DataProtect, asc::WRITE_PROTECTED),
        DiskError::Halted => Sense::new(Key::HardwareError, asc::INTERNAL_TARGET_FAILURE),
        DiskError::NoSpace => Sense::new(Key::DataProtect, asc::SPACE_ALLOCATION_FAILED),
        DiskError::Conflict => return Fail::Plain(Status::ReservationConflict),
        DiskError::Miscompare { at_bytes } => {
            Sense::new(Key::Miscompare, asc::MISCOMPARE_DURING_VERIFY).with_information(*at_bytes)
        }
        DiskError::Medium(fault) => {
            let code = if writing { asc::WRITE_ERROR } else { asc::UNRECOVERED_READ_ERROR };
            Sense::new(Key::MediumError, code).with_information(fault.at.0)
        }
        DiskError::Io(_) => {
            let code = if writing { asc::WRITE_ERROR } else { asc::UNRECOVERED_READ_ERROR };
            Sense::new(Key::MediumError, code).with_information(lba)
        }
        DiskError::Gone => Sense::new(Key::NotReady, asc::LOGICAL_UNIT_NOT_READY),
        DiskError::UnknownGeneration => Sense::new(Key::HardwareError, asc::INTERNAL_TARGET_FAILURE),
    };
    Fail::Check(sense)
}

/// What a command that went well has to say.
#[derive(Debug)]
pub enum Answer {
    /// Nothing but GOOD.
    Good,
    /// Parameter data, not cut yet.
    Data(Vec<u8>),
    /// Data went straight into the place for it: what the command had to return, and what of it is there.
    Moved {
        /// Bytes the command had to return.
        wanted: u64,
        /// Bytes that are in place.
        moved: usize,
    },
}
