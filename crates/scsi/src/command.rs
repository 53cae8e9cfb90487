//! One command from its arrival to its answer.

use std::rc::Rc;

use block::{Segments, SegmentsMut};

use crate::bytes::{be16, be32, put32};
use crate::lun::{Call, ScsiLun};
use crate::nexus::{Seat, lun_bytes};
use crate::opcode::Cdb;
use crate::reply::{Answer, Fail, Reply, Status};
use crate::sense::{Key, Sense, asc};
use crate::task::{Aborted, Attribute, Place};

/// What an initiator offers with a command, in bytes: data it will send, and room for data it expects.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Offered {
    /// Data-out. iSCSI: the expected data transfer length of a write.
    pub out: u64,
    /// Data-in. iSCSI: the expected data transfer length of a read.
    pub into: u64,
}

/// A CDB that may go on.
#[derive(Clone)]
pub enum PlannedCdb {
    /// A line of the table.
    Known(Cdb),
    /// For a device that looks at it itself.
    Raw(Vec<u8>),
}

/// What a logical unit made of a command.
#[derive(Clone)]
pub struct Planned {
    /// The CDB.
    pub cdb: PlannedCdb,
    /// Bytes of data-out it takes.
    pub out: u64,
    /// The most bytes of data-in it can return. For parameter data this is the allocation length.
    pub into: u64,
}

enum Stage {
    Done(Result<Answer, Fail>, u64),
    Ready(Planned),
    Nobody,
}

/// A command that was taken up. Gather [`Command::out_bytes`] of data, make room for [`Command::in_bytes`], and run
/// it. Dropping it ends its task without an answer.
pub struct Command {
    at: Option<(Rc<Seat>, Rc<dyn ScsiLun>, Place)>,
    stage: Stage,
    offered: Offered,
    descriptor: bool,
}

impl Command {
    pub(crate) fn begin(
        seat: Rc<Seat>,
        unit: Rc<dyn ScsiLun>,
        tag: u64,
        attribute: Attribute,
        cdb: &[u8],
        offered: Offered,
    ) -> Self {
        let descriptor = unit.descriptor_sense();
        let Some(place) = unit.tasks().enter(&seat, tag, attribute) else {
            let full = Err(Fail::Plain(Status::TaskSetFull));
            return Self { at: None, stage: Stage::Done(full, 0), offered, descriptor };
        };
        let planned = if attribute == Attribute::Aca {
            // SAM-5 8.6.5: ACA without an ACA.
            Err(Fail::Check(Sense::new(Key::IllegalRequest, asc::INVALID_FIELD_IN_CDB)))
        } else {
            unit.plan(&seat, cdb, offered)
        };
        let stage = match planned {
            Ok(planned) => Stage::Ready(planned),
            Err(fail) => Stage::Done(Err(fail), 0),
        };
        Self { at: Some((seat, unit, place)), stage, offered, descriptor }
    }

    /// A command that needs no logical unit.
    pub(crate) fn done(answer: Result<(Answer, u64), Fail>, offered: Offered) -> Self {
        let (answer, into) = match answer {
            Ok((answer, into)) => (Ok(answer), into),
            Err(fail) => (Err(fail), 0),
        };
        Self { at: None, stage: Stage::Done(answer, into), offered, descriptor: false }
    }

    /// A command of a nexus that is lost: never answered.
    pub(crate) fn nobody() -> Self {
        Self { at: None, stage: Stage::Nobody, offered: Offered::default(), descriptor: false }
    }

    /// Data-out to gather before [`Command::run`], in bytes. None when the command has failed already.
    pub fn out_bytes(&self) -> usize {
        match &self.stage {
            Stage::Ready(planned) => planned.out.min(self.offered.out) as usize,
            Stage::Done(..) | Stage::Nobody => 0,
        }
    }

    /// Room for data-in to give [`Command::run`], in bytes.
    pub fn in_bytes(&self) -> usize {
        match &self.stage {
            Stage::Ready(planned) => planned.into.min(self.offered.into) as usize,
            Stage::Done(Ok(Answer::Data(data)), into) => {
                (*into).min(self.offered.into).min(data.len() as u64) as usize
            }
            Stage::Done(..) | Stage::Nobody => 0,
        }
    }

    /// Somebody aborted it: drop it, it is not to be answered.
    pub fn is_aborted(&self) -> bool {
        match &self.at {
            Some((_, _, place)) => place.task().how_aborted() == Some(Aborted::Silently),
            None => matches!(self.stage, Stage::Nobody),
        }
    }

    /// Waits until somebody aborts it, for ever if nobody does.
    pub async fn aborted(&self) {
        match &self.at {
            Some((_, _, place)) => place.aborted().await,
            None => std::future::pending().await,
        }
    }

    /// Does it and answers. `from` is the data-out, as much as came; `into` has [`Command::in_bytes`] bytes. `None`:
    /// aborted, nothing is to be answered.
    pub async fn run(self, from: &Segments<'_>, into: &SegmentsMut<'_>) -> Option<Reply> {
        let offered = self.offered;
        let (result, out_wanted, most) = match self.stage {
            Stage::Nobody => return None,
            Stage::Done(result, into) => (result, 0, into),
            Stage::Ready(ref planned) => {
                let (seat, unit, place) = self.at.as_ref()?;
                place.turn().await;
                let result = if place.task().is_aborted() {
                    Ok(Answer::Good)
                } else {
                    unit.execute(Call { seat, planned, offered, task: place, from, into }).await
                };
                (result, planned.out, planned.into)
            }
        };
        if let Some((_, _, place)) = &self.at {
            match place.task().how_aborted() {
                Some(Aborted::Silently) => return None,
                Some(Aborted::WithStatus) => return Some(Reply::plain(Status::TaskAborted)),
                None => {}
            }
        }
        Some(answer(result, out_wanted, most, into, self.descriptor))
    }
}

fn answer(
    result: Result<Answer, Fail>,
    out_wanted: u64,
    most: u64,
    into: &SegmentsMut<'_>,
    descriptor: bool,
) -> Reply {
    let good = Reply { out_wanted, ..Reply::plain(Status::Good) };
    match result {
        Ok(Answer::Good) => good,
        Ok(Answer::Data(data)) => {
            let wanted = most.min(data.len() as u64);
            let moved = (wanted as usize).min(into.len());
            into.copy_from(0, &data[..moved]);
            Reply { in_moved: moved, in_wanted: wanted, ..good }
        }
        Ok(Answer::Moved { wanted, moved }) => Reply { in_moved: moved, in_wanted: wanted, ..good },
        Err(Fail::Check(sense)) => Reply { out_wanted, ..Reply::check(sense, descriptor) },
        Err(Fail::Plain(status)) => Reply { out_wanted, ..Reply::plain(status) },
        Err(Fail::Raw(sense)) => Reply { status: Status::CheckCondition, sense, out_wanted, ..good },
    }
}

/// REPORT LUNS (SPC-4 6.33). The answer and the allocation length.
pub(crate) fn report_luns(cdb: &[u8], numbers: &[u16]) -> Result<(Answer, u64), Fail> {
    let cdb = Cdb::parse(cdb, |_| true)?;
    let listed: &[u16] = match cdb.byte(2) {
        0x00 | 0x02 => numbers,
        // Well known logical units only: there are none.
        0x01 => &[],
        _ => return Err(Sense::cdb(2, Some(7)).into()),
    };
    let mut out = vec![0; 8];
    put32(&mut out, 0, listed.len() as u32 * 8);
    out.extend(listed.iter().flat_map(|n| lun_bytes(*n)));
    Ok((Answer::Data(out), u64::from(cdb.be32(6))))
}

/// The answer where no logical unit is (SPC-4 table 4, "incorrect logical unit selection"; SAM-5 5.11).
pub(crate) fn absent(raw: &[u8]) -> Result<(Answer, u64), Fail> {
    let missing = Sense::illegal(asc::LOGICAL_UNIT_NOT_SUPPORTED);
    match raw.first() {
        Some(0x12) if raw.len() >= 6 => {
            if raw[1] & 1 != 0 {
                return Err(Sense::cdb(1, Some(0)).into());
            }
            // Peripheral qualifier 011b, no device type: nothing can be there.
            let mut out = vec![0; 36];
            (out[0], out[2], out[3], out[4]) = (0x7f, 0x06, 0x02, 31);
            Ok((Answer::Data(out), u64::from(be16(raw, 3))))
        }
        Some(0x03) if raw.len() >= 6 => {
            Ok((Answer::Data(missing.encode(raw[1] & 1 != 0)), u64::from(raw[4])))
        }
        _ => Err(missing.into()),
    }
}

/// The allocation length of a CDB that has one.
pub(crate) fn allocation(cdb: &Cdb) -> u64 {
    use crate::opcode::Op;
    match (cdb.line.op, cdb.length()) {
        (Op::RequestSense, _) => u64::from(cdb.byte(4)),
        (Op::Inquiry, _) => u64::from(cdb.be16(3)),
        (_, 6) => u64::from(cdb.byte(4)),
        (_, 10) => u64::from(cdb.be16(7)),
        (_, 12) => u64::from(be32(&[cdb.byte(6), cdb.byte(7), cdb.byte(8), cdb.byte(9)], 0)),
        _ => u64::from(cdb.be32(10)),
    }
}
