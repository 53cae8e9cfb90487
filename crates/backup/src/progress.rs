//! Long work as its caller sees it: how far it is, and a way to stop it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::Error;

#[derive(Default)]
struct Counters {
    total_bytes: AtomicU64,
    done_bytes: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    stopped: AtomicBool,
}

/// Shared between the work and whoever watches it; any thread may ask.
#[derive(Clone, Default)]
pub struct Progress(Arc<Counters>);

impl Progress {
    /// Nothing done yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the work to end soon with [`Error::Cancelled`].
    pub fn stop(&self) {
        self.0.stopped.store(true, Ordering::Relaxed);
    }

    /// Bytes of address space to go over; 0 until known.
    pub fn total_bytes(&self) -> u64 {
        self.0.total_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of address space gone over, whether or not they had to be read.
    pub fn done_bytes(&self) -> u64 {
        self.0.done_bytes.load(Ordering::Relaxed)
    }

    /// Bytes really read.
    pub fn read_bytes(&self) -> u64 {
        self.0.read_bytes.load(Ordering::Relaxed)
    }

    /// Bytes really written, where the work writes to a disk or file.
    pub fn written_bytes(&self) -> u64 {
        self.0.written_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn expect(&self, bytes: u64) {
        self.0.total_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn done(&self, bytes: u64) {
        self.0.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Part of the way has to be gone again.
    pub(crate) fn again(&self, bytes: u64) {
        self.0.done_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(crate) fn read(&self, bytes: u64) {
        self.0.read_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn written(&self, bytes: u64) {
        self.0.written_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.0.stopped.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
    }
}
