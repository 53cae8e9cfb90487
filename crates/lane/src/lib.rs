//! A lane is one thread that runs data tasks: `!Send` futures, a queue of ready ones, timers, and a driver that
//! talks to the kernel. Pools, volumes and chains belong to exactly one lane; others ask by [`Handle::run`].
//!
//! Two rules make borrowed buffers sound: a task is never cancelled, only finished, and an operation that is
//! dropped while the kernel has it aborts the process.

mod arena;
mod driver;
mod executor;
pub mod fs;
pub mod memory;
pub mod net;
mod op;
mod pool;
pub mod ready;
mod rng;
pub mod sg;
pub mod sim;
pub mod sync;

pub use driver::{DriverKind, InUse};
pub use executor::{
    Counters, Handle, Options, Task, block_on, block_on_with, counters, in_use, now, sleep, spawn, start,
    yield_now,
};
pub use memory::{Buffer, Segments, SegmentsMut};
pub use pool::offload;

/// An operation was dropped while the kernel (or a worker thread) may still write to its memory. Going on would let
/// it scribble over whatever lives there next, so the process ends here and now.
#[cold]
fn dropped_in_flight() -> ! {
    eprintln!(
        "lane: an I/O operation was dropped while it was under way: aborting, memory would not be safe"
    );
    std::process::abort()
}
