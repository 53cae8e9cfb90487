//! EXTENDED COPY (LID1) and RECEIVE COPY RESULTS (SPC-4 clauses 6.4, 6.18): block to block, between logical units that
//! the nexus sees.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use block::{Buffer, Safe, Sector, Segments, SegmentsMut, check_range};

use crate::bytes::{be16, be24, be32, be64, put16, put32};
use crate::lun::{Call, ScsiLun};
use crate::nexus::Seat;
use crate::opcode::Cdb;
use crate::pr::Access;
use crate::reply::{Answer, Fail, Status};
use crate::sense::{Key, Sense, asc};
use crate::task::{Attribute, Place};
use crate::unit::{Barrier, LogicalUnit};

/// Most CSCD descriptors of one copy.
const TARGETS_MAX: usize = 16;
/// Most segment descriptors of one copy.
const SEGMENTS_MAX: usize = 64;
const TARGET_BYTES: usize = 32;
const SEGMENT_BYTES: usize = 28;
/// Most bytes of both lists of descriptors together.
const DESCRIPTORS_BYTES_MAX: usize = TARGETS_MAX * TARGET_BYTES + SEGMENTS_MAX * SEGMENT_BYTES;
/// Longest parameter list that is taken at all; longer than any good one, so that it can be refused by its content.
pub(crate) const LIST_BYTES_MAX: u64 = 64 << 10;
/// Bytes copied at a time.
const CHUNK_BYTES: u64 = 1 << 20;
/// Tag of a copy in the task set of a logical unit that it writes to without having been sent there: no initiator's.
const VISITOR_TAG: u64 = u64::MAX;
const CONFLICT: Fail = Fail::Plain(Status::ReservationConflict);
/// Copies whose end is remembered.
const REMEMBERED_MAX: usize = 64;

/// A copy that is under way or has ended.
struct Record {
    /// Of whom.
    seat: std::rc::Weak<Seat>,
    list: u8,
    /// 0 under way, 1 done, 2 failed (table 183).
    status: u8,
    segments: u16,
    bytes: u64,
    number: u64,
}

/// What RECEIVE COPY RESULTS tells.
#[derive(Default)]
pub(crate) struct Copies {
    records: RefCell<VecDeque<Record>>,
    next: Cell<u64>,
}

impl Copies {
    fn begin(&self, seat: &Rc<Seat>, list: u8) -> u64 {
        let number = self.next.replace(self.next.get() + 1);
        let mut records = self.records.borrow_mut();
        records.retain(|r| r.list != list || !std::ptr::eq(r.seat.as_ptr(), Rc::as_ptr(seat)));
        if records.len() == REMEMBERED_MAX {
            records.pop_front();
        }
        let record = Record { seat: Rc::downgrade(seat), list, status: 0, segments: 0, bytes: 0, number };
        records.push_back(record);
        number
    }

    fn note(&self, number: u64, change: impl FnOnce(&mut Record)) {
        if let Some(record) = self.records.borrow_mut().iter_mut().find(|r| r.number == number) {
            change(record);
        }
    }
}

/// A logical unit that is copied from or to, and the nexus' seat there.
#[derive(Copy, Clone)]
struct End<'a> {
    unit: &'a LogicalUnit,
    seat: &'a Rc<Seat>,
}

impl End<'_> {
    /// Reservations let the nexus read (or write) here (SPC-4 5.17.3).
    fn admit(self, writing: bool) -> Result<(), Fail> {
        match self.unit.barrier(self.seat) {
            Barrier::Persistent(Access::All) => Ok(()),
            Barrier::Persistent(Access::Reading) if !writing => Ok(()),
            Barrier::Persistent(_) | Barrier::Reserved => Err(CONFLICT),
        }
    }
}

/// One block to block segment, in blocks.
struct Segment {
    source: usize,
    destination: usize,
    count: u64,
    from: u64,
    to: u64,
}

struct Wanted {
    list: u8,
    targets: Vec<[u8; TARGET_BYTES]>,
    segments: Vec<Segment>,
}

fn aborted(code: u16) -> Sense {
    Sense::new(Key::CopyAborted, code)
}

/// Reads the parameter list (SPC-4 6.4.2 to 6.4.4).
fn parse(list: &[u8]) -> Result<Wanted, Sense> {
    let wrong_length = Sense::illegal(asc::PARAMETER_LIST_LENGTH_ERROR);
    if list.len() < 16 {
        return Err(wrong_length);
    }
    let (targets, segments) = (usize::from(be16(list, 2)), be32(list, 8) as usize);
    let inline = be32(list, 12) as usize;
    if targets.saturating_add(segments) > DESCRIPTORS_BYTES_MAX
        && targets > TARGETS_MAX * TARGET_BYTES
        && segments > SEGMENTS_MAX * SEGMENT_BYTES
    {
        return Err(wrong_length);
    }
    let target_bytes = list[16..].get(..targets).ok_or(wrong_length)?;
    let segment_bytes = list[16 + targets..].get(..segments).ok_or(wrong_length)?;
    if inline != 0 {
        return Err(Sense::parameter(12, None));
    }
    if targets > TARGETS_MAX * TARGET_BYTES {
        return Err(Sense::illegal(asc::TOO_MANY_TARGET_DESCRIPTORS));
    }
    let (target_list, rest) = target_bytes.as_chunks::<TARGET_BYTES>();
    if !rest.is_empty() {
        return Err(wrong_length);
    }
    if target_list.iter().any(|t| t[0] != 0xe4) {
        return Err(Sense::illegal(asc::UNSUPPORTED_TARGET_DESCRIPTOR));
    }
    let mut found = Vec::new();
    let mut rest = segment_bytes;
    while !rest.is_empty() {
        if found.len() == SEGMENTS_MAX {
            return Err(Sense::illegal(asc::TOO_MANY_SEGMENT_DESCRIPTORS));
        }
        if rest[0] != 0x02 {
            return Err(Sense::illegal(asc::UNSUPPORTED_SEGMENT_DESCRIPTOR));
        }
        let (one, after) = rest.split_at_checked(SEGMENT_BYTES).ok_or(wrong_length)?;
        if usize::from(be16(one, 2)) != SEGMENT_BYTES - 4 {
            let at = (list.len() - rest.len() + 2) as u16;
            return Err(Sense::parameter(at, None));
        }
        found.push(Segment {
            source: usize::from(be16(one, 4)),
            destination: usize::from(be16(one, 6)),
            count: u64::from(be16(one, 10)),
            from: be64(one, 12),
            to: be64(one, 20),
        });
        rest = after;
    }
    Ok(Wanted { list: list[0], targets: target_list.to_vec(), segments: found })
}

impl LogicalUnit {
    /// The CSCD descriptor (SPC-4 6.4.3.6: identification descriptor) names this logical unit.
    fn is_named(&self, target: &[u8; TARGET_BYTES]) -> bool {
        let length = usize::from(target[7]);
        let Some(designator) = target[8..28].get(..length) else { return false };
        match target[5] & 0x3f {
            0x03 => target[4] & 0x0f == 1 && designator == self.identity.naa,
            0x0a => {
                let (head, uuid) = designator.split_at(designator.len().min(2));
                head == [0x10, 0] && uuid == self.identity.uuid.as_bytes()
            }
            0x01 => {
                let t10 = format!("{:<8}{}", self.identity.vendor, self.identity.serial);
                // The descriptor has room for twenty bytes: only a whole designator is one.
                designator == t10.as_bytes()
            }
            _ => false,
        }
    }

    /// EXTENDED COPY: checked as a whole, then segment by segment.
    pub(crate) async fn extended_copy(&self, call: &Call<'_>, cdb: &Cdb) -> Result<Answer, Fail> {
        let said = cdb.be32(10) as usize;
        if said == 0 {
            return Ok(Answer::Good);
        }
        let list = call.from.to_vec();
        let list = list.get(..said).ok_or(Sense::illegal(asc::PARAMETER_LIST_LENGTH_ERROR))?;
        let wanted = parse(list)?;
        let number = self.copies.begin(call.seat, wanted.list);
        let result = self.copy_segments(call, &wanted, number).await;
        self.copies.note(number, |r| r.status = if result.is_ok() { 1 } else { 2 });
        result.map(|()| Answer::Good)
    }

    async fn copy_segments(&self, call: &Call<'_>, wanted: &Wanted, number: u64) -> Result<(), Fail> {
        let unreachable = aborted(asc::COPY_TARGET_NOT_REACHABLE);
        let nexus = call.seat.nexus().ok_or(unreachable)?;
        let mut units: Vec<(Rc<dyn ScsiLun>, Rc<Seat>)> = Vec::new();
        for target in &wanted.targets {
            // Disks of 512 bytes are all there are; zero leaves it open.
            let block = be24(target, 29);
            let found =
                nexus.reached().into_iter().find(|(_, u)| u.unit().is_some_and(|u| u.is_named(target)));
            let (seat, unit) = found.filter(|_| block == 512 || block == 0).ok_or(unreachable)?;
            units.push((unit, seat));
        }
        for (index, segment) in wanted.segments.iter().enumerate() {
            let pick = |index: usize, byte: u16| {
                let (unit, seat) = units.get(index).ok_or(unreachable.with_segment_byte(byte))?;
                Ok::<_, Sense>(End { unit: unit.unit().ok_or(unreachable)?, seat })
            };
            let (source, destination) = (pick(segment.source, 4)?, pick(segment.destination, 6)?);
            let outside =
                |unit: &LogicalUnit, at: u64| check_range(unit.blocks(), Sector(at), segment.count).is_err();
            // Nothing fits better; which segment it is says the rest (SPC-4 6.4.6.3).
            let failed = aborted(asc::NONE).with_command_specific(index as u64);
            if outside(source.unit, segment.from) || outside(destination.unit, segment.to) {
                return Err(failed.into());
            }
            // Who fences the nexus off at the destination waits for what is being written there, and ends the rest.
            let visit = if std::ptr::eq(self, destination.unit) {
                None
            } else {
                let tasks = &destination.unit.tasks;
                let place = tasks.enter(destination.seat, VISITOR_TAG, Attribute::Simple);
                Some(place.ok_or(Fail::Plain(Status::TaskSetFull))?)
            };
            self.copy_segment(call, source, destination, segment, number, visit.as_ref()).await?;
            if visit.is_some_and(|place| place.is_aborted()) {
                return Err(failed.into());
            }
            self.copies.note(number, |r| r.segments += 1);
        }
        Ok(())
    }

    /// Copies one segment in pieces; ranges that overlap are copied from the end that keeps the content.
    async fn copy_segment(
        &self,
        call: &Call<'_>,
        source: End<'_>,
        destination: End<'_>,
        segment: &Segment,
        number: u64,
        visit: Option<&Place>,
    ) -> Result<(), Fail> {
        source.admit(false)?;
        destination.admit(true)?;
        destination.unit.must_be_writable()?;
        let chunk = CHUNK_BYTES / 512;
        let backwards = std::ptr::eq(source.unit, destination.unit) && segment.from < segment.to;
        let mut buffer = Buffer::for_overwrite((segment.count.min(chunk) * 512) as usize);
        let mut done = 0;
        while done < segment.count && !call.task.is_aborted() {
            let count = (segment.count - done).min(chunk);
            let offset = if backwards { segment.count - done - count } else { done };
            let (from, to) = (Sector(segment.from + offset), Sector(segment.to + offset));
            let bytes = &mut buffer[..(count * 512) as usize];
            {
                let _locked = source.unit.locks.shared(from, count).await;
                source.admit(false)?;
                let read = source.unit.disk.read(from, &SegmentsMut::new(bytes)).await;
                read.map_err(|_| aborted(asc::UNRECOVERED_READ_ERROR).with_information(from.0))?;
            }
            let unit = destination.unit;
            let safe = if unit.modes.get().write_cache { Safe::AtNextFlush } else { Safe::OnReturn };
            let _locked = unit.locks.shared(to, count).await;
            // Reservations may have changed since the last piece: who was fenced off meanwhile copies no further.
            destination.admit(true)?;
            unit.must_be_writable()?;
            if visit.is_some_and(Place::is_aborted) {
                break;
            }
            // What is zero takes no space at the other end either.
            let from = Segments::new(bytes);
            let written = match (from.is_zero(), safe) {
                (true, Safe::AtNextFlush) => unit.disk.zero(to, count, true).await,
                _ => unit.disk.write(to, &from, safe).await,
            };
            written.map_err(|_| aborted(asc::WRITE_ERROR).with_information(to.0))?;
            done += count;
            self.copies.note(number, |r| r.bytes += count * 512);
        }
        Ok(())
    }

    /// RECEIVE COPY RESULTS.
    pub(crate) fn receive_copy_results(&self, call: &Call<'_>, cdb: &Cdb) -> Result<Answer, Fail> {
        let list = cdb.byte(2);
        let unknown = Fail::Check(Sense::cdb(2, None));
        let of = |r: &Record| r.list == list && std::ptr::eq(r.seat.as_ptr(), Rc::as_ptr(call.seat));
        match cdb.byte(1) & 0x1f {
            // COPY STATUS (table 182).
            0x00 => {
                let records = self.copies.records.borrow();
                let record = records.iter().find(|r| of(r)).ok_or(unknown)?;
                let mut out = vec![0; 12];
                put32(&mut out, 0, 8);
                out[4] = record.status;
                put16(&mut out, 5, record.segments);
                // TRANSFER COUNT in bytes (units 0) while it fits, else in KiB.
                let (units, count) =
                    if record.bytes >> 32 == 0 { (0, record.bytes) } else { (1, record.bytes >> 10) };
                out[7] = units;
                put32(&mut out, 8, u32::try_from(count).unwrap_or(u32::MAX));
                Ok(Answer::Data(out))
            }
            0x03 => Ok(Answer::Data(operating_parameters())),
            // RECEIVE DATA, FAILED SEGMENT DETAILS: no copy leaves any (its sense data say everything).
            _ => Err(unknown),
        }
    }
}

/// OPERATING PARAMETERS (SPC-4 table 186).
fn operating_parameters() -> Vec<u8> {
    let implemented = [0x02, 0xe4];
    let mut out = vec![0; 44];
    // SNLID: zero length is no error.
    out[4] = 0x01;
    put16(&mut out, 8, TARGETS_MAX as u16);
    put16(&mut out, 10, SEGMENTS_MAX as u16);
    put32(&mut out, 12, DESCRIPTORS_BYTES_MAX as u32);
    // MAXIMUM SEGMENT LENGTH: 65535 blocks.
    put32(&mut out, 16, 65535 * 512);
    put16(&mut out, 34, 1);
    out[36] = 1;
    // Granularity of data segments: 512 bytes.
    out[37] = 9;
    out[43] = implemented.len() as u8;
    out.extend(implemented);
    let length = out.len() as u32 - 4;
    put32(&mut out, 0, length);
    out
}
