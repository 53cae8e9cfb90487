//! The one table from [`DiskError`] to what an NBD client is told (section "Error values").

use block::DiskError;

use crate::request::Operation;

/// Error numbers that the protocol knows. They are the protocol's, not the operating system's.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Errno {
    /// Operation not permitted.
    Perm = 1,
    /// Input/output error.
    Io = 5,
    /// Invalid argument.
    Inval = 22,
    /// No space left on device.
    NoSpc = 28,
    /// Value too large.
    Overflow = 75,
    /// Operation not supported.
    NotSup = 95,
    /// The server is being shut down: the client must disconnect.
    Shutdown = 108,
}

/// What a client is told about a failed request.
pub fn errno(error: &DiskError, operation: Operation) -> Errno {
    match error {
        DiskError::OutOfRange => match operation {
            // Section "Error values": writing past the end is ENOSPC, everything else EINVAL.
            Operation::Write | Operation::Zero => Errno::NoSpc,
            Operation::Read
            | Operation::Flush
            | Operation::Unmap
            | Operation::Status
            | Operation::Cache
            | Operation::Refused
            | Operation::Control => Errno::Inval,
        },
        DiskError::ReadOnly | DiskError::Conflict => Errno::Perm,
        DiskError::NoSpace => Errno::NoSpc,
        DiskError::Halted | DiskError::Miscompare { .. } | DiskError::Medium(_) | DiskError::Io(_) => {
            Errno::Io
        }
        DiskError::Gone => Errno::Shutdown,
        DiskError::UnknownGeneration => Errno::Inval,
    }
}
