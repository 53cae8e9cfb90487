//! How an NBD connection ends.

use std::io;

use crate::wire::Broken;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum Ending {
    /// The client said good-bye (ABORT, DISC) or closed between two requests.
    #[error("the client ended it")]
    Clean,
    /// The client closed in the middle of something.
    #[error("the client went away in the middle of {0}")]
    Hangup(&'static str),
    /// The socket failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// Where a magic number belongs there is something else.
    #[error("bad magic {found:#x} at the start of {what}")]
    BadMagic {
        /// What should have begun here.
        what: &'static str,
        /// What was there.
        found: u64,
    },
    /// The client set handshake flags that were not offered.
    #[error("unknown client flags {0:#x}")]
    ClientFlags(u32),
    /// An option with more data than is worth skipping.
    #[error("an option with {0} bytes of data")]
    OptionTooLong(u32),
    /// More options than a handshake can need.
    #[error("too many options")]
    TooManyOptions,
    /// EXPORT_NAME for something that is not there or not to be had without TLS: the protocol has no error reply.
    #[error("no such export, or not without TLS")]
    NoSuchExport,
    /// A write with more payload than was advertised.
    #[error("a write of {0} bytes")]
    WriteTooLong(u32),
    /// The handshake took too long, or the client did not take its answers.
    #[error("timed out")]
    TimedOut,
    /// Too many connections or handshakes.
    #[error("too many connections")]
    Crowded,
    /// Bytes came after STARTTLS and before TLS: somebody may have slipped them in.
    #[error("unencrypted bytes after STARTTLS")]
    Injected,
}

impl From<Broken> for Ending {
    fn from(broken: Broken) -> Self {
        match broken {
            Broken::Hangup(what) => Self::Hangup(what),
            Broken::Io(error) => Self::Io(error),
        }
    }
}
