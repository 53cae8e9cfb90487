//! iSCSI target (RFC 7143, and of RFC 7144 what a target needs).
//!
//! ```text
//!  socket -> Wire -> Reader -> Pdu -+- SCSI Command -> Nexus::begin -> task: Gather, Command::run --+
//!                                   +- Data-Out -----> Gather of its command                        |
//!                                   +- NOP, Text, Task Management, Logout                           v
//!            one task reads what there is                one task sends all answers: Outgoing -> Wire
//! ```
//!
//! Decisions:
//! * A session is one connection (MaxConnections=1) and one I_T nexus: TransportID of InitiatorName and ISID, towards
//!   the target port of the portal group.
//! * ErrorRecoveryLevel 0: a header that does not match its digest, a CmdSN that is missing or a protocol error ends
//!   the session; data that do not match their digest end the command, by Reject and CHECK CONDITION (section 7.8).
//! * An initiator without a rule sees nothing: no target in SendTargets, no login. A rule names the LUNs it sees.
//! * Data are received into the buffer from which the disk is written, and sent from the one it was read into. What
//!   initiators may hold is bounded, each and all together; a write that finds no room for the data that it sends
//!   unasked is answered TASK SET FULL, everything else waits until there is room.
//! * The command window is the number of commands that may be under way; a command gives its place back with its
//!   answer. An initiator that takes no answers is not listened to.

mod chap;
mod codes;
mod command;
mod ending;
pub mod format;
mod full_feature;
mod fuzz;
mod gather;
mod login;
mod manage;
mod name;
mod negotiate;
mod outgoing;
mod reader;
mod server;
mod session;
mod target;
mod text;
mod text_exchange;

pub use chap::{BadCredentials, Chap, Credentials};
pub use codes::{LoginStatus, Outcome, Reason, attribute, event, flag, function, opcode, stage};
pub use ending::{Ending, Fault, Refusal};
pub use fuzz::{fuzz_iscsi_login, fuzz_iscsi_wire};
pub use name::{BadName, Name};
pub use negotiate::Limits;
pub use server::{Options, Portal, Server, SessionInfo};
pub use target::{Access, NewTarget, NotAdded, Target, Targets, Who};
