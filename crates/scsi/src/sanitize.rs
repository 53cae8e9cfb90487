//! SANITIZE (SBC-3 clause 5.24), where the switch of the logical unit allows it. It overwrites or gives back what the
//! LUN itself holds; snapshots and clones keep what they have, which is why it is off by default.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

use block::Sector;
use lane::sync::Waiters;

use crate::bytes::be16;
use crate::lun::Call;
use crate::opcode::{Cdb, Op};
use crate::reply::{Answer, Fail, from_disk};
use crate::sense::{Key, Sense, asc};
use crate::unit::LogicalUnit;

/// Whether a sanitize is under way, or failed.
#[derive(Default)]
pub(crate) struct Sanitizing {
    /// In 65536ths.
    progress: Cell<Option<u16>>,
    /// The last one failed: until one succeeds nobody knows what the medium holds.
    failed: Cell<bool>,
    ended: Waiters,
}

impl Sanitizing {
    /// While it is under way, or after it failed, only these are let through (SBC-3 table 67).
    pub fn admit(&self, op: Op) -> Result<(), Fail> {
        let through = matches!(
            op,
            Op::Inquiry
                | Op::LogSense
                | Op::ReadCapacity10
                | Op::ReadCapacity16
                | Op::ReportLuns
                | Op::RequestSense
                | Op::ReportSupportedOpcodes
                | Op::ReportSupportedTaskManagement
                | Op::ReportTargetPortGroups
                | Op::PersistentReserveIn
        );
        match self.sense() {
            Some(_) if op == Op::Sanitize && self.progress.get().is_none() => Ok(()),
            Some(sense) if !through => Err(sense.into()),
            _ => Ok(()),
        }
    }

    /// NOT READY with how far along it is, or MEDIUM ERROR after a failure.
    pub fn sense(&self) -> Option<Sense> {
        match (self.progress.get(), self.failed.get()) {
            (Some(progress), _) => {
                Some(Sense::new(Key::NotReady, asc::SANITIZE_IN_PROGRESS).with_progress(progress))
            }
            (None, true) => Some(Sense::new(Key::MediumError, asc::SANITIZE_FAILED)),
            (None, false) => None,
        }
    }

    fn end(&self, result: &Result<(), Fail>) {
        self.failed.set(result.is_err());
        self.progress.set(None);
        self.ended.wake_all();
    }

    async fn ended(&self) {
        self.ended.until(|| self.progress.get().is_none().then_some(())).await
    }
}

/// Blocks worked on at a time, between two steps of progress: 64 MiB.
const STEP_BLOCKS: u64 = 64 << 11;

enum Work {
    Zero,
    Pattern { block: Box<[u8; 512]>, inverse: bool, times: u8 },
}

impl LogicalUnit {
    /// SANITIZE. Once begun it goes on whatever becomes of the command and of its nexus (SBC-3 4.11); IMMED answers at
    /// once.
    pub(crate) async fn sanitize(&self, call: &Call<'_>, cdb: &Cdb) -> Result<Answer, Fail> {
        let work = match cdb.byte(1) & 0x1f {
            0x01 => overwrite(call, cdb)?,
            // BLOCK ERASE, CRYPTOGRAPHIC ERASE: afterwards nothing of it can be read.
            0x02 | 0x03 => {
                no_list(cdb)?;
                Work::Zero
            }
            // EXIT FAILURE MODE: only a sanitize that succeeds ends it here (AUSE is refused).
            _ => {
                no_list(cdb)?;
                let failed = self.sanitizing.failed.get();
                return if failed { Err(Sense::cdb(1, Some(4)).into()) } else { Ok(Answer::Good) };
            }
        };
        // Somebody else was faster since the command was taken up.
        self.sanitizing.admit(Op::Sanitize)?;
        let me = self.me.upgrade().ok_or(Sense::new(Key::NotReady, asc::LOGICAL_UNIT_NOT_READY))?;
        self.sanitizing.progress.set(Some(0));
        drop(lane::spawn(async move {
            let result = me.sanitize_now(work).await;
            if let Err(fail) = &result {
                tracing::error!(?fail, lun = me.identity.serial, "a sanitize failed");
            }
            me.sanitizing.end(&result);
        }));
        if cdb.byte(1) & 0x80 == 0 {
            let (mut ended, mut aborted) = (pin!(self.sanitizing.ended()), pin!(call.task.aborted()));
            poll_fn(|cx| {
                let over = ended.as_mut().poll(cx).is_ready() || aborted.as_mut().poll(cx).is_ready();
                if over { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
            if self.sanitizing.failed.get() {
                return Err(Sense::new(Key::MediumError, asc::SANITIZE_FAILED).into());
            }
        }
        Ok(Answer::Good)
    }

    async fn sanitize_now(&self, work: Work) -> Result<(), Fail> {
        let _alone = self.locks.alone(Sector(0), u64::MAX).await;
        match work {
            Work::Zero => self.sanitize_pass(None, 0, 1).await?,
            Work::Pattern { mut block, inverse, times } => {
                for turn in 0..times {
                    self.sanitize_pass(Some(&block), turn, times).await?;
                    if inverse {
                        block.iter_mut().for_each(|b| *b = !*b);
                    }
                }
            }
        }
        self.disk.flush().await.map_err(|e| from_disk(&e, 0, true))
    }

    async fn sanitize_pass(&self, block: Option<&[u8; 512]>, turn: u8, turns: u8) -> Result<(), Fail> {
        let blocks = self.blocks();
        let mut at = 0;
        while at < blocks {
            let count = (blocks - at).min(STEP_BLOCKS);
            match block {
                Some(block) => self.fill(block, at, count, || false).await?,
                None => {
                    let zeroed = self.disk.zero(Sector(at), count, true).await;
                    zeroed.map_err(|e| from_disk(&e, at, true))?;
                }
            }
            at += count;
            let done = u128::from(turn) * u128::from(blocks) + u128::from(at);
            let progress = done * 65535 / (u128::from(turns) * u128::from(blocks));
            self.sanitizing.progress.set(Some(progress as u16));
        }
        Ok(())
    }
}

fn no_list(cdb: &Cdb) -> Result<(), Fail> {
    if cdb.be16(7) == 0 { Ok(()) } else { Err(Sense::cdb(7, None).into()) }
}

/// The parameter list of OVERWRITE (SBC-3 table 69): INVERT, TEST, OVERWRITE COUNT; a pattern of 1 to 512 bytes.
fn overwrite(call: &Call<'_>, cdb: &Cdb) -> Result<Work, Fail> {
    let said = usize::from(cdb.be16(7));
    if !(5..=516).contains(&said) {
        return Err(Sense::cdb(7, None).into());
    }
    let list = call.from.to_vec();
    let list = list.get(..said).ok_or(Sense::illegal(asc::PARAMETER_LIST_LENGTH_ERROR))?;
    let (times, length) = (list[0] & 0x1f, usize::from(be16(list, 2)));
    if times == 0 {
        return Err(Sense::parameter(0, Some(4)).into());
    }
    if list[0] & 0x60 != 0 || list[1] != 0 {
        return Err(Sense::parameter(0, Some(6)).into());
    }
    if length == 0 || length > 512 || length != said - 4 {
        return Err(Sense::parameter(2, None).into());
    }
    let mut block = Box::new([0; 512]);
    block.iter_mut().zip(list[4..].iter().cycle()).for_each(|(place, byte)| *place = *byte);
    Ok(Work::Pattern { block, inverse: list[0] & 0x80 != 0, times })
}
