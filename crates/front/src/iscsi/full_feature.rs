//! Full-feature phase: PDUs are taken as they come, each command becomes a task, answers leave in the order in which
//! they are ready.

use std::rc::Rc;

use super::codes::{Reason, flag, opcode};
use super::command::{self, is_due};
use super::ending::{Ending, Fault};
use super::format::{Header, LogoutRequest, LogoutResponse, NO_TAG, Nop, TextRequest};
use super::manage;
use super::outgoing::Stat;
use super::reader::{Pdu, Reader};
use super::server::Server;
use super::session::Session;

/// Takes PDUs until the initiator logs out; answers what it is to be told when everything under way has ended.
pub(super) async fn receive(
    server: &Rc<Server>,
    session: &Rc<Session>,
    reader: &mut Reader,
    near: &str,
) -> Result<LogoutResponse, Ending> {
    loop {
        session.outgoing.room().await;
        let Some(pdu) = reader.next().await? else { return Err(Ending::Closed) };
        session.heard.set(lane::now());
        session.pinged.set(None); // whatever it says, it is there
        match take(server, session, reader, &pdu, near).await {
            Ok(None) => {}
            Ok(Some(goodbye)) => return Ok(goodbye),
            Err(Ending::Fault(fault)) => {
                session.reject(Reason::Protocol, &pdu.head);
                return Err(fault.into());
            }
            Err(ending) => return Err(ending),
        }
    }
}

async fn take(
    server: &Rc<Server>,
    session: &Rc<Session>,
    reader: &mut Reader,
    pdu: &Pdu,
    near: &str,
) -> Result<Option<LogoutResponse>, Ending> {
    let header: Header = pdu.view();
    match header.code() {
        opcode::SCSI_COMMAND => command::take(session, reader, pdu).await?,
        opcode::DATA_OUT => command::data_out(session, reader, pdu).await?,
        opcode::NOP_OUT => nop_out(session, reader, pdu).await?,
        opcode::TASK_MANAGEMENT => manage::take(server, session, reader, pdu).await?,
        opcode::TEXT => text(server, session, reader, pdu, near).await?,
        opcode::LOGOUT => return logout(session, reader, pdu).await,
        opcode::LOGIN => return Err(Fault::new("a login after the login", "11.12").into()),
        other => {
            reader.skip(header.data_bytes()).await?;
            let reason = if other == opcode::SNACK { Reason::Snack } else { Reason::NotSupported };
            session.reject(reason, &pdu.head);
        }
    }
    Ok(None)
}

/// Takes a data segment into memory; `None`, and a Reject, when its digest does not match.
async fn segment(session: &Session, reader: &mut Reader, pdu: &Pdu) -> Result<Option<Vec<u8>>, Ending> {
    // Not longer than the longest segment that was agreed: the reader has checked it.
    let mut data = vec![0; pdu.view::<Header>().data_bytes()];
    let length = data.len();
    if reader.data(&mut data, length).await? {
        return Ok(Some(data));
    }
    session.reject(Reason::DataDigest, &pdu.head);
    Ok(None)
}

/// A ping, or the answer to ours (11.18).
async fn nop_out(session: &Rc<Session>, reader: &mut Reader, pdu: &Pdu) -> Result<(), Ending> {
    let Some(mut data) = segment(session, reader, pdu).await? else { return Ok(()) };
    let head: Nop = pdu.view();
    let header: Header = pdu.view();
    if !is_due(session, head.number1.get(), header.is_immediate())? || head.tag.get() == NO_TAG {
        return Ok(());
    }
    data.truncate(session.segment_bytes_max.get());
    let answer = Nop {
        opcode: opcode::NOP_IN,
        flags: flag::FINAL,
        lun: head.lun,
        tag: head.tag,
        transfer_tag: NO_TAG.into(),
        ..Nop::zeroed()
    };
    session.outgoing.push_one(&answer, data, Stat::Takes);
    Ok(())
}

async fn text(
    server: &Rc<Server>,
    session: &Rc<Session>,
    reader: &mut Reader,
    pdu: &Pdu,
    near: &str,
) -> Result<(), Ending> {
    let Some(data) = segment(session, reader, pdu).await? else { return Ok(()) };
    let head: TextRequest = pdu.view();
    if !is_due(session, head.cmd_sn.get(), pdu.view::<Header>().is_immediate())? {
        return Ok(());
    }
    let room = session.segment_bytes_max.get();
    let tag = session.transfer_tag();
    let targets = |value: &str| server.send_targets(&session.identity, value, near);
    let piece = session.text.borrow_mut().take(&head, &data, room, tag, targets);
    match piece {
        Ok(piece) => {
            if let Some(bytes) = piece.segment_bytes_max {
                session.segment_bytes_max.set(bytes);
            }
            session.outgoing.push_one(&piece.head, piece.data, Stat::Takes);
        }
        Err(reason) => session.reject(reason, &pdu.head),
    }
    Ok(())
}

/// Logout (11.14). A session has one connection: closing that one closes the session.
async fn logout(
    session: &Rc<Session>,
    reader: &mut Reader,
    pdu: &Pdu,
) -> Result<Option<LogoutResponse>, Ending> {
    const CLOSE_SESSION: u8 = 0;
    const CLOSE_CONNECTION: u8 = 1;
    const NO_SUCH_CONNECTION: u8 = 1;
    const NO_RECOVERY: u8 = 2;
    let head: LogoutRequest = pdu.view();
    let header: Header = pdu.view();
    reader.skip(header.data_bytes()).await?;
    if !is_due(session, head.cmd_sn.get(), header.is_immediate())? {
        return Ok(None);
    }
    let mut answer = LogoutResponse {
        opcode: opcode::LOGOUT_RESPONSE,
        flags: flag::FINAL,
        tag: head.tag,
        ..LogoutResponse::zeroed()
    };
    match head.reason & !flag::FINAL {
        CLOSE_SESSION => return Ok(Some(answer)),
        CLOSE_CONNECTION if head.cid.get() == session.cid => return Ok(Some(answer)),
        CLOSE_CONNECTION => answer.response = NO_SUCH_CONNECTION,
        _ => answer.response = NO_RECOVERY, // recovery level 0 has none
    }
    session.outgoing.push_one(&answer, Vec::new(), Stat::Takes);
    Ok(None)
}
