//! Task management (RFC 7143 sections 11.5 and 11.6, RFC 7144 section 6). The work is the SCSI layer's.

use std::rc::Rc;

use scsi::{Function, Response};

use super::codes::{Outcome, Reason, flag, function, opcode};
use super::command::is_due;
use super::ending::Ending;
use super::format::{Header, TaskManagement};
use super::outgoing::Stat;
use super::reader::{Pdu, Reader};
use super::server::Server;
use super::session::{Kind, Place, Session, Turn};

/// Takes a Task Management Function Request.
pub(super) async fn take(
    server: &Rc<Server>,
    session: &Rc<Session>,
    reader: &mut Reader,
    pdu: &Pdu,
) -> Result<(), Ending> {
    let head: TaskManagement = pdu.view();
    let header: Header = pdu.view();
    reader.skip(header.data_bytes()).await?;
    let Some(scsi) = &session.scsi else {
        session.reject(Reason::Protocol, &pdu.head);
        return Ok(());
    };
    let turn = Turn::of(Kind::Function, header.is_immediate());
    if !session.has_room(turn) {
        session.reject(Reason::TooManyImmediate, &pdu.head);
        return Ok(());
    }
    if !is_due(session, head.cmd_sn.get(), header.is_immediate())? {
        return Ok(());
    }
    let number = head.function & !flag::FINAL;
    let place = Place::take(session, turn);
    let referenced = u64::from(head.referenced_tag.get());
    let asked = match number {
        function::ABORT_TASK => Function::AbortTask(referenced),
        function::ABORT_TASK_SET => Function::AbortTaskSet,
        function::CLEAR_ACA => Function::ClearAca,
        function::CLEAR_TASK_SET => Function::ClearTaskSet,
        function::LOGICAL_UNIT_RESET => Function::LogicalUnitReset,
        function::TARGET_WARM_RESET => Function::TargetWarmReset,
        function::TARGET_COLD_RESET => Function::TargetColdReset,
        function::TASK_REASSIGN => {
            answer(session, place, &head, Outcome::ReassignNotSupported); // recovery level 0 has none (7.2.2)
            return Ok(());
        }
        // RFC 7144's functions are there when both sides have said so (its section 6.1).
        _ if session.parameters.protocol_level < 2 => {
            answer(session, place, &head, Outcome::NotSupported);
            return Ok(());
        }
        function::QUERY_TASK => Function::QueryTask(referenced),
        function::QUERY_TASK_SET => Function::QueryTaskSet,
        function::I_T_NEXUS_RESET => Function::ItNexusReset,
        function::QUERY_ASYNCHRONOUS_EVENT => Function::QueryAsynchronousEvent,
        _ => {
            answer(session, place, &head, Outcome::NotSupported);
            return Ok(());
        }
    };
    // Judged now: while the function waits, the window goes on.
    let awaited = session.outgoing.numbers.is_awaited(head.ref_cmd_sn.get(), head.cmd_sn.get());
    let done = scsi.nexus.manage(head.lun, asked);
    let (server, session) = (Rc::clone(server), Rc::clone(session));
    drop(lane::spawn(async move {
        let outcome = match done.await {
            // A task that never came, and now must not: it counts as aborted (11.6.1, case b).
            Response::NoSuchTask if number == function::ABORT_TASK && awaited => Outcome::Complete,
            Response::NoSuchTask => Outcome::NoSuchTask,
            Response::Complete => Outcome::Complete,
            Response::Succeeded => Outcome::Succeeded,
            Response::IncorrectLun => Outcome::NoSuchLun,
            Response::NotSupported => Outcome::NotSupported,
        };
        answer(&session, place, &head, outcome);
        if number == function::TARGET_COLD_RESET && outcome == Outcome::Complete {
            server.reset_target(&session); // 11.5.1: all its connections end
        }
    }));
    Ok(())
}

fn answer(session: &Session, place: Place, head: &TaskManagement, outcome: Outcome) {
    drop(place);
    let response = Header {
        opcode: opcode::TASK_MANAGEMENT_RESPONSE,
        flags: flag::FINAL,
        specific: [outcome as u8, 0],
        ahs_words: 0,
        data_length: [0; 3],
        lun: [0; 8],
        tag: head.tag,
        rest: [0; 28],
    };
    session.outgoing.push_one(&response, Vec::new(), Stat::Takes);
}
