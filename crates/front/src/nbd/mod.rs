//! NBD, the network block device protocol (NetworkBlockDevice/nbd, `doc/proto.md`): server and client.
//!
//! ```text
//!  socket -> Wire -> Input -> RequestHeader -> Request + task -> Disk -> Outgoing -> Wire
//!              |                                  (many at once)            |
//!              +-- one task reads what there is          one task sends all answers there are
//! ```
//!
//! Decisions:
//! * Sizes advertised: minimum 1, preferred 4096, maximum 32 MiB. A disk counts in sectors of 512 bytes, so the odd
//!   ends of a request go through [`block::Disk::compare_and_write`]: right against every other user of the disk, on
//!   any connection (module `edges`).
//! * Multi-conn is promised: every connection of an export works on the same [`block::Disk`], whose flush covers
//!   whatever returned before it, whoever wrote it.
//! * A read of a run of zeroes is answered by a hole chunk when it is long enough to pay (module `transmission`).
//! * What a connection may hold in memory is bounded by its credit: at most [`format::REQUEST_BYTES_MAX`] bytes of
//!   buffers and a fixed number of requests; beyond that the server stops reading from the socket.

pub mod format;

pub mod client;
mod connection;
mod edges;
mod ending;
mod errno;
mod export;
mod fuzz;
mod handshake;
mod outgoing;
mod server;
mod status;
mod transmission;

pub use crate::tls::{CertificateError, Identity, Tls, Trust};
pub use crate::wire::Wire;
pub use ending::Ending;
pub use errno::{Errno, errno};
pub use export::{Export, ExportInfo, Exports, NewExport, Refused, Removal};
pub use fuzz::fuzz_nbd_wire;
pub use server::{ConnectionInfo, Options, Server, State};
