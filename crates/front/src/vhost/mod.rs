//! vhost-user: a guest's virtqueues, served straight from its memory (QEMU, `docs/interop/vhost-user.rst`).
//!
//! ```text
//!  Export --socket--> Session: features, memory, rings (one message after the other)
//!                        |
//!   kick ------------> Ring --chain--> Device::serve --> Disk, with the guest's own memory as buffer
//!   call <-------------  | used ring
//! ```
//!
//! Everything runs on the lane of the disk: no thread, no lock. Chains are `virtio-queue`'s and `vm-memory`'s business as far as
//! they go ([`chain`], [`message`] say where not). `vhost-user-backend` has threads of its own and no in-flight tracking.

mod bell;
mod blk;
mod budget;
mod chain;
mod dirty;
mod fuzz;
mod inflight;
mod memory;
mod message;
mod ring;
mod server;
mod session;
mod signal;

use std::rc::Rc;

use chain::Chain;
use inflight::Inflight;

pub use fuzz::fuzz_vhost_ring;
pub use server::{Export, NewExport};

/// What lies behind the rings.
pub(crate) trait Device: 'static {
    /// Bytes of a request that are moved at a time.
    const PART_BYTES: usize;

    /// For logs.
    fn name(&self) -> &str;
    /// Its own feature bits.
    fn features(&self) -> u64;
    /// Queues at most.
    fn queues(&self) -> u16;
    /// A new front end: nothing was agreed yet.
    fn begin(&self);
    /// What was agreed.
    fn negotiated(&self, features: u64);
    /// Memory that outlives us, for what must.
    fn adopt(&self, _kept: &Rc<Inflight>) {}
    /// The configuration space.
    fn config(&self) -> Vec<u8>;
    /// The guest writes to it; false where it may not.
    fn set_config(&self, offset: usize, bytes: &[u8]) -> bool;
    /// Chains of this queue are taken only when the device has something to say.
    fn is_lazy(&self, _queue: u16) -> bool {
        false
    }
    /// Does what a chain asks; answers the number of bytes written to the guest, from the first on.
    fn serve(&self, queue: u16, chain: &Chain) -> impl Future<Output = u32>;
}
