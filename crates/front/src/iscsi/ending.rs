//! How an iSCSI connection ends, and what can be wrong with what an initiator sends.

use std::io;

use super::codes::LoginStatus;
use crate::wire::Broken;

/// Something that the protocol forbids.
#[derive(Copy, Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{what} (RFC 7143 section {clause})")]
pub struct Fault {
    /// What was seen.
    pub what: &'static str,
    /// Where it is forbidden.
    pub clause: &'static str,
}

impl Fault {
    pub(crate) const fn new(what: &'static str, clause: &'static str) -> Self {
        Self { what, clause }
    }
}

/// Why a login was refused.
#[derive(Copy, Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{what} (login status {:#06x})", *.status as u16)]
pub struct Refusal {
    /// What the initiator is told.
    pub status: LoginStatus,
    /// What the log says.
    pub what: &'static str,
}

impl From<Fault> for Refusal {
    fn from(fault: Fault) -> Self {
        Self { status: LoginStatus::InitiatorError, what: fault.what }
    }
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum Ending {
    /// The initiator logged out.
    #[error("the initiator logged out")]
    Logout,
    /// The initiator closed between two PDUs.
    #[error("the initiator closed the connection")]
    Closed,
    /// The initiator closed in the middle of something.
    #[error("the initiator went away in the middle of {0}")]
    Hangup(&'static str),
    /// The socket failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The login was refused.
    #[error("login refused: {0}")]
    Refused(#[from] Refusal),
    /// The protocol was broken in a way that recovery level 0 answers by closing.
    #[error("protocol error: {0}")]
    Fault(#[from] Fault),
    /// A digest did not match; at recovery level 0 the session is over (section 7.8).
    #[error("the digest of {0} does not match")]
    Digest(&'static str),
    /// The login took too long.
    #[error("no login in time")]
    LateLogin,
    /// The initiator answers nothing any more: no ping, or no data that it was asked for.
    #[error("the initiator is silent")]
    Silent,
    /// The same initiator has logged in again with the same ISID (section 6.3.5).
    #[error("replaced by a new session of the same initiator port")]
    Reinstated,
    /// The target was removed or the server closed.
    #[error("the target was taken away")]
    Removed,
    /// Too many connections or logins.
    #[error("too many connections")]
    Crowded,
}

impl From<Broken> for Ending {
    fn from(broken: Broken) -> Self {
        match broken {
            Broken::Hangup(what) => Self::Hangup(what),
            Broken::Io(error) => Self::Io(error),
        }
    }
}
