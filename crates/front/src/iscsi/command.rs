//! SCSI commands: from the PDU to the response (RFC 7143 sections 11.3, 11.4 and 11.7).
//!
//! ```text
//!  SCSI Command -> Nexus::begin -> (Gather: immediate, unsolicited, R2T) -> Command::run -> Data-In / SCSI Response
//! ```

use std::rc::Rc;

use block::{Segments, SegmentsMut};
use scsi::sense::{Key, Sense};
use scsi::{Attribute, Command, Offered, Reply, Status};
use smallvec::SmallVec;

use super::codes::{Reason, attribute, flag, opcode};
use super::ending::{Ending, Fault};
use super::format::{DataIn, DataOut, Header, NO_TAG, ScsiCommand, ScsiResponse};
use super::gather::{Gather, Spoilt};
use super::outgoing::{Answer, Order, Outgoing, Payload, Stat};
use super::reader::{Pdu, Reader};
use super::session::{Kind, Place, Session, Turn, with_length};
use crate::credit::Held;
use crate::pool::{Pool, Pooled};
use crate::request::{Operation, Request};
use crate::wire::first_of;

/// Type of an additional header segment that holds the rest of a long CDB (11.2.2.3).
const AHS_EXTENDED_CDB: u8 = 1;

/// A command under way, as far as iSCSI is concerned.
struct Task {
    session: Rc<Session>,
    tag: u32,
    lun: [u8; 8],
    /// Expected data transfer length, in bytes.
    expected: u32,
    reads: bool,
    request: Request,
    /// Its place in the command window.
    place: Place,
    /// What its buffers take.
    held: Option<Held>,
    /// R2Ts sent.
    r2ts: u32,
}

/// Whether a request is to be carried out now: false for one that must be ignored (4.2.2.1).
pub(super) fn is_due(session: &Session, cmd_sn: u32, immediate: bool) -> Result<bool, Fault> {
    if immediate {
        return Ok(true);
    }
    let numbers = &session.outgoing.numbers;
    match numbers.judge(cmd_sn) {
        Order::Next => {
            numbers.advance();
            Ok(true)
        }
        Order::Outside => Ok(false),
        // One connection delivers in order: what is missing is lost, and only a new session brings it back (7.1.5).
        Order::Early => Err(Fault::new("a CmdSN is missing", "4.2.2.1")),
    }
}

/// The CDB with the part that is in additional header segments.
fn whole_cdb(head: &ScsiCommand, additional: &[u8]) -> Result<SmallVec<[u8; 32]>, Fault> {
    let mut cdb = SmallVec::from_slice(&head.cdb);
    let mut rest = additional;
    while !rest.is_empty() {
        let Some((start, after)) = rest.split_at_checked(3) else {
            return Err(Fault::new("an additional header segment that is cut off", "11.2.2"));
        };
        // The length counts what follows the type (11.2.2.2), and is padded.
        let length = usize::from(start[0]) << 8 | usize::from(start[1]);
        let Some(content) = after.get(..length) else {
            return Err(Fault::new("an additional header segment longer than all of them", "11.2.2"));
        };
        if start[2] & 0x3f == AHS_EXTENDED_CDB {
            cdb.extend(content.iter().skip(1).copied()); // one byte is reserved
        }
        rest = after.get((3 + length).next_multiple_of(4) - 3..).unwrap_or_default();
    }
    Ok(cdb)
}

fn attribute_of(flags: u8) -> Attribute {
    match flags & flag::ATTRIBUTE {
        attribute::ORDERED => Attribute::Ordered,
        attribute::HEAD_OF_QUEUE => Attribute::HeadOfQueue,
        attribute::ACA => Attribute::Aca,
        _ => Attribute::Simple,
    }
}

/// Takes a SCSI Command PDU and its data segment.
pub(super) async fn take(session: &Rc<Session>, reader: &mut Reader, pdu: &Pdu) -> Result<(), Ending> {
    let head: ScsiCommand = pdu.view();
    let header: Header = pdu.view();
    let (length, immediate) = (header.data_bytes(), header.is_immediate());
    let Some(scsi) = &session.scsi else {
        reader.skip(length).await?;
        session.reject(Reason::Protocol, &pdu.head); // a discovery session has no commands (4.3)
        return Ok(());
    };
    let turn = Turn::of(Kind::Command, immediate);
    if !session.has_room(turn) {
        reader.skip(length).await?;
        session.reject(Reason::TooManyImmediate, &pdu.head);
        return Ok(());
    }
    if !is_due(session, head.cmd_sn.get(), immediate)? {
        return reader.skip(length).await;
    }
    let tag = head.tag.get();
    if session.gathers.borrow().contains_key(&tag) {
        reader.skip(length).await?;
        // Data for two commands of one tag could not be told apart (11.2.1.8).
        session.reject(Reason::TaskInProgress, &pdu.head);
        return Ok(());
    }
    let (reads, writes) = (head.flags & flag::READ != 0, head.flags & flag::WRITE != 0);
    let expected = head.expected_length.get();
    let cdb = whole_cdb(&head, &pdu.additional)?;
    let offered = Offered {
        out: if writes { u64::from(expected) } else { 0 },
        into: if reads && !writes { u64::from(expected) } else { 0 },
    };
    let command = scsi.nexus.begin(head.lun, u64::from(tag), attribute_of(head.flags), &cdb, offered);
    let operation = Operation::of_cdb(&cdb);
    let task = Task {
        session: Rc::clone(session),
        tag,
        lun: head.lun,
        expected,
        reads,
        request: Request::begin(scsi.target.counts(), operation, u64::from(expected)),
        place: Place::take(session, turn),
        held: None,
        r2ts: 0,
    };
    if writes && (expected > 0 || length > 0 || !header.is_final()) {
        return take_write(task, command, reader, pdu, length).await;
    }
    if length > 0 {
        let skipped = reader.skip(length).await;
        task.fail(command, Spoilt::Unsolicited);
        return skipped;
    }
    drop(lane::spawn(task.run(command, None, 0)));
    Ok(())
}

/// Takes the immediate data of a write, then carries it out or waits for the rest of its data.
async fn take_write(
    mut task: Task,
    command: Command,
    reader: &mut Reader,
    pdu: &Pdu,
    length: usize,
) -> Result<(), Ending> {
    let session = Rc::clone(&task.session);
    let agreed = &session.parameters;
    let follows = pdu.head[1] & flag::FINAL == 0;
    let expected = task.expected as usize;
    let unsolicited = agreed.first_burst.min(expected);
    let wanted = command.out_bytes();
    let early = if follows { unsolicited.min(wanted) } else { length.min(wanted) };

    // What the initiator sends unasked must find its place now; for what is asked for there is time.
    let mut buffer = None;
    let mut crowded = false;
    if wanted > 0 {
        let whole = session.credit.try_hold(Pool::footprint(wanted));
        if let Some(held) = whole {
            (task.held, buffer) = (Some(held), Some(session.pool.take(wanted)));
        } else if early > 0 {
            match session.credit.try_hold(Pool::footprint(early)) {
                Some(held) => (task.held, buffer) = (Some(held), Some(session.pool.take(early))),
                None => crowded = true,
            }
        }
    }
    let place = buffer.as_mut().map(|buffer| &mut buffer[..]).unwrap_or_default();
    let well = match reader.data(place, length).await {
        Ok(well) => well,
        Err(ending) => {
            drop(command);
            task.request.abandon();
            return Err(ending);
        }
    };
    let gather =
        Gather::new(if crowded { 0 } else { wanted }, buffer, length, follows.then_some(unsolicited));
    if !well {
        session.reject(Reason::DataDigest, &pdu.head);
        gather.spoil(Spoilt::Digest);
    } else if length > 0 && !agreed.immediate_data || follows && agreed.initial_r2t {
        gather.spoil(Spoilt::Unsolicited);
    } else if length > unsolicited {
        gather.spoil(Spoilt::Amount);
    }
    if !follows && !crowded && gather.spoilt().is_none() && length >= wanted {
        let buffer = gather.take_buffer();
        drop(lane::spawn(task.run(command, buffer, wanted)));
        return Ok(());
    }
    let gather = Rc::new(gather);
    session.gathers.borrow_mut().insert(task.tag, Rc::clone(&gather));
    drop(lane::spawn(async move { gather_and_run(task, command, &gather, crowded).await }));
    Ok(())
}

/// Waits for the data of a write, asking for what does not come by itself; then carries it out.
async fn gather_and_run(mut task: Task, command: Command, gather: &Rc<Gather>, crowded: bool) {
    let session = Rc::clone(&task.session);
    let wanted = if crowded { 0 } else { command.out_bytes() };
    let gathering = async {
        gather.unsolicited().await;
        if gather.asked() < wanted && gather.spoilt().is_none() {
            if task.held.is_none() || gather.room() < wanted {
                let held = session.credit.hold(Pool::footprint(wanted)).await?;
                gather.move_into(session.pool.take(wanted));
                task.held = Some(held);
            }
            gather.solicit(&session, task.tag, task.lun).await;
        }
        Some(())
    };
    let ending = first_of(command.aborted(), session.ended());
    let is_whole = first_of(gathering, ending).await;
    forget(&session, task.tag, gather);
    task.r2ts = gather.r2ts();
    match is_whole {
        // Aborted: the SCSI layer knows whether that is to be answered.
        None if !session.is_over() => task.run(command, None, 0).await,
        None | Some(None) => {
            drop(command);
            task.request.abandon();
        }
        Some(Some(())) if crowded => {
            drop(command);
            task.answer(Reply::plain(Status::TaskSetFull), None);
        }
        Some(Some(())) => match gather.spoilt() {
            Some(how) => task.fail(command, how),
            None => {
                let buffer = gather.take_buffer();
                let there = wanted.min(gather.asked());
                task.run(command, buffer, there).await;
            }
        },
    }
}

/// No more data are taken for this command.
fn forget(session: &Session, tag: u32, gather: &Rc<Gather>) {
    let mut gathers = session.gathers.borrow_mut();
    if gathers.get(&tag).is_some_and(|there| Rc::ptr_eq(there, gather)) {
        gathers.remove(&tag);
    }
}

/// Takes a SCSI Data-Out PDU and its data.
pub(super) async fn data_out(session: &Rc<Session>, reader: &mut Reader, pdu: &Pdu) -> Result<(), Ending> {
    let head: DataOut = pdu.view();
    let header: Header = pdu.view();
    let length = header.data_bytes();
    let gather = session.gathers.borrow().get(&head.tag.get()).cloned();
    let Some(gather) = gather else {
        return reader.skip(length).await; // of a command that was aborted or answered already
    };
    let landing = gather.begin(&head, length);
    let mut buffer = gather.take_buffer();
    let place = buffer.as_mut().and_then(|buffer| buffer.get_mut(landing.at..landing.at + landing.length));
    let well = reader.data(place.unwrap_or_default(), length).await;
    gather.put_buffer(buffer);
    if !well? {
        session.reject(Reason::DataDigest, &pdu.head);
        gather.spoil(Spoilt::Digest);
    }
    gather.end(&head);
    Ok(())
}

impl Task {
    /// Carries the command out and answers.
    async fn run(mut self, command: Command, from: Option<Pooled>, length: usize) {
        let room = command.in_bytes();
        let mut into = None;
        if room > 0 {
            let Some(held) = self.session.credit.hold(Pool::footprint(room)).await else {
                drop(command);
                return self.request.abandon();
            };
            self.held = Some(held);
            into = Some(self.session.pool.take(room));
        }
        let reply = {
            let from = from.as_ref().map(|buffer| &buffer[..length]).unwrap_or_default();
            let into = into.as_mut().map(|buffer| &mut buffer[..]).unwrap_or_default();
            command.run(&Segments::new(from), &SegmentsMut::new(into)).await
        };
        drop(from);
        match reply {
            Some(reply) => self.answer(reply, into),
            None => self.request.abandon(),
        }
    }

    /// Fails the command because of its data.
    fn fail(self, command: Command, how: Spoilt) {
        drop(command);
        let code = match how {
            Spoilt::Digest => 0x4705,      // protocol service CRC error
            Spoilt::Unsolicited => 0x0c0c, // write error - unexpected unsolicited data
            Spoilt::Amount => 0x0c0d,      // write error - not enough unsolicited data
        };
        self.answer(Reply::check(Sense::new(Key::AbortedCommand, code), false), None);
    }

    /// Answers: data and status in one PDU where that is possible.
    fn answer(self, reply: Reply, data: Option<Pooled>) {
        let Self { session, tag, lun, expected, reads, request, place, held, r2ts } = self;
        drop(place); // the answer shows the window as it is from now on
        request.finish_well(reply.status == Status::Good);
        let wanted = if reads { reply.in_wanted } else { reply.out_wanted };
        let (residual_flag, residual) = residual(u64::from(expected), wanted);
        let outgoing = &session.outgoing;
        let moved = data.as_ref().map_or(0, |data| reply.in_moved.min(data.len()));
        let status_with_data = moved > 0 && reply.status == Status::Good;
        let mut pdus = 0;
        if let Some(data) = data.filter(|_| moved > 0) {
            let mut answer = Outgoing::answer(Payload::Pooled(data), held);
            let last = DataIn {
                flags: residual_flag | flag::STATUS,
                status: reply.status as u8,
                residual: residual.into(),
                ..DataIn::zeroed()
            };
            pdus = data_in(&session, &mut answer, tag, lun, moved, status_with_data.then_some(last));
            outgoing.push(answer);
        }
        if !status_with_data {
            let sense = if reply.sense.is_empty() { Vec::new() } else { with_length(&reply.sense) };
            let response = ScsiResponse {
                opcode: opcode::SCSI_RESPONSE,
                flags: flag::FINAL | residual_flag,
                status: reply.status as u8,
                tag: tag.into(),
                exp_data_sn: (pdus + r2ts).into(),
                residual: residual.into(),
                ..ScsiResponse::zeroed()
            };
            outgoing.push_one(&response, sense, Stat::Takes);
        }
    }
}

/// Adds the Data-In PDUs for `moved` bytes; the last one is as `last` says, if that is given. Answers how many.
fn data_in(
    session: &Session,
    answer: &mut Answer,
    tag: u32,
    lun: [u8; 8],
    moved: usize,
    last: Option<DataIn>,
) -> u32 {
    let (mut at, mut in_burst, mut data_sn) = (0, 0, 0u32);
    let segment = session.segment_bytes_max.get();
    let burst = session.parameters.max_burst;
    while at < moved {
        let length = segment.min(moved - at).min(burst - in_burst);
        in_burst += length;
        let (is_last, burst_ends) = (at + length == moved, in_burst == burst);
        let status = last.filter(|_| is_last);
        let base = status.unwrap_or_else(DataIn::zeroed);
        let head = DataIn {
            opcode: opcode::DATA_IN,
            flags: base.flags | if is_last || burst_ends { flag::FINAL } else { 0 },
            lun,
            tag: tag.into(),
            transfer_tag: NO_TAG.into(),
            data_sn: data_sn.into(),
            offset: (at as u32).into(), // below the expected length, which has 32 bits
            ..base
        };
        let stat = if status.is_some() { Stat::Takes } else { Stat::Reserved };
        session.outgoing.add(answer, &head, at..at + length, stat);
        at += length;
        data_sn += 1;
        if burst_ends {
            in_burst = 0;
        }
    }
    data_sn
}

/// Residual flag and count (11.4.5).
fn residual(expected: u64, wanted: u64) -> (u8, u32) {
    let (flag, count) = match wanted.checked_sub(expected) {
        Some(0) => return (0, 0),
        Some(over) => (flag::OVERFLOW, over),
        None => (flag::UNDERFLOW, expected - wanted),
    };
    (flag, u32::try_from(count).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn residuals() {
        assert_eq!(residual(512, 512), (0, 0));
        assert_eq!(residual(512, 2048), (flag::OVERFLOW, 1536));
        assert_eq!(residual(2048, 512), (flag::UNDERFLOW, 1536));
        assert_eq!(residual(0, u64::MAX), (flag::OVERFLOW, u32::MAX));
    }

    #[test]
    fn long_cdbs_come_in_two_parts() {
        let head = ScsiCommand { cdb: [7; 16], ..ScsiCommand::zeroed() };
        assert_eq!(whole_cdb(&head, &[]).unwrap()[..], [7; 16]);
        // Length 5: the reserved byte and four of the CDB. Padded to 8.
        let cdb = whole_cdb(&head, &[0, 5, 1, 0, 1, 2, 3, 4]).unwrap();
        assert_eq!((cdb.len(), &cdb[16..]), (20, &[1, 2, 3, 4][..]));
        assert_eq!(whole_cdb(&head, &[0, 5, 2, 0, 1, 2, 3, 4]).unwrap().len(), 16, "another type");
        for bad in [&[0, 5][..], &[0, 50, 1, 0], &[0xff; 4]] {
            assert!(whole_cdb(&head, bad).is_err());
        }
    }
}
