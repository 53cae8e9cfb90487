//! A client's request as an obligation, and what is counted about it. Every front end uses it.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use block::DiskError;
use lane::sync::Waiters;

/// What a client may ask of a disk. The label of metrics.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Operation {
    /// Bytes from the disk to the client.
    Read,
    /// Bytes from the client to the disk.
    Write,
    /// Make what was answered durable.
    Flush,
    /// The client does not need a range any more.
    Unmap,
    /// Make a range read as zero.
    Zero,
    /// Which parts are data, zero, hole, changed.
    Status,
    /// A hint that a range will be read.
    Cache,
    /// The request itself was wrong and reaches no disk.
    Refused,
    /// Any other SCSI command: about the unit, its reservations, its parameters.
    Control,
}

impl Operation {
    /// All of them, in the order of [`Counts`].
    pub const ALL: [Self; 9] = [
        Self::Read,
        Self::Write,
        Self::Flush,
        Self::Unmap,
        Self::Zero,
        Self::Status,
        Self::Cache,
        Self::Refused,
        Self::Control,
    ];

    /// What a SCSI command is counted as.
    pub fn of_cdb(cdb: &[u8]) -> Self {
        match cdb.first() {
            Some(0x08 | 0x28 | 0x88 | 0xa8) => Self::Read,
            // WRITE, WRITE AND VERIFY, COMPARE AND WRITE, WRITE ATOMIC, ORWRITE.
            Some(0x0a | 0x2a | 0x8a | 0xaa | 0x2e | 0x8e | 0xae | 0x89 | 0x9c | 0x8b) => Self::Write,
            Some(0x35 | 0x91) => Self::Flush,
            Some(0x42) => Self::Unmap,
            Some(0x41 | 0x93) => Self::Zero,
            Some(0x34 | 0x90) => Self::Cache,
            _ => Self::Control,
        }
    }

    /// Lower-case name for metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Unmap => "unmap",
            Self::Zero => "zero",
            Self::Status => "status",
            Self::Cache => "cache",
            Self::Refused => "refused",
            Self::Control => "control",
        }
    }
}

/// Buckets of the latency histogram: bucket `n` counts requests that took less than `2^n` microseconds (and at least
/// half of it); the last one counts everything longer.
pub const LATENCY_BUCKETS: usize = 25;

/// What one export has done for one kind of operation since it was added.
#[derive(Copy, Clone, Default, PartialEq, Eq, Debug)]
pub struct Tally {
    /// Requests answered, well or not.
    pub done: u64,
    /// Requests answered with an error.
    pub failed: u64,
    /// Bytes moved or described by the requests that went well.
    pub bytes: u64,
    /// Time from receipt to answer, all requests together, in nanoseconds.
    pub nanoseconds: u64,
    /// See [`LATENCY_BUCKETS`].
    pub latency: [u64; LATENCY_BUCKETS],
}

/// Counters of one export. Cheap to change, read by copy.
#[derive(Default)]
pub struct Counts {
    tallies: [Cell<Tally>; Operation::ALL.len()],
    in_flight: Cell<u64>,
    in_flight_bytes: Cell<u64>,
    next_id: Cell<u64>,
    idle: Waiters,
}

impl Counts {
    /// All zero.
    pub fn new() -> Rc<Self> {
        Rc::new(Self::default())
    }

    /// What was counted for one operation.
    pub fn tally(&self, operation: Operation) -> Tally {
        self.tallies[operation as usize].get()
    }

    /// Requests begun and not answered yet.
    pub fn in_flight(&self) -> u64 {
        self.in_flight.get()
    }

    /// Bytes of the requests begun and not answered yet.
    pub fn in_flight_bytes(&self) -> u64 {
        self.in_flight_bytes.get()
    }

    /// Waits until every request has been answered.
    pub async fn idle(&self) {
        self.idle.until(|| (self.in_flight.get() == 0).then_some(())).await
    }

    fn end(&self, operation: Operation, bytes: u64, took: Duration, well: bool) {
        let mut tally = self.tallies[operation as usize].take();
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = (u64::BITS - micros.leading_zeros()) as usize;
        tally.done += 1;
        tally.failed += u64::from(!well);
        tally.bytes += if well { bytes } else { 0 };
        tally.nanoseconds =
            tally.nanoseconds.saturating_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        tally.latency[bucket.min(LATENCY_BUCKETS - 1)] += 1;
        self.tallies[operation as usize].set(tally);
        self.in_flight.set(self.in_flight.get() - 1);
        self.in_flight_bytes.set(self.in_flight_bytes.get() - bytes);
        if self.in_flight.get() == 0 {
            self.idle.wake_all();
        }
    }
}

/// One request of a client, from receipt to answer. It is an obligation: it must end in [`Request::finish`] or, when
/// the client can no longer be answered, in [`Request::abandon`]. Dropping it otherwise is a bug and panics.
#[must_use = "a request must be answered"]
pub struct Request {
    counts: Rc<Counts>,
    operation: Operation,
    bytes: u64,
    id: u64,
    begun: Instant,
    ended: bool,
}

impl Request {
    /// Takes up a request that moves or describes `bytes` bytes.
    pub fn begin(counts: &Rc<Counts>, operation: Operation, bytes: u64) -> Self {
        let id = counts.next_id.get();
        counts.next_id.set(id + 1);
        counts.in_flight.set(counts.in_flight.get() + 1);
        counts.in_flight_bytes.set(counts.in_flight_bytes.get() + bytes);
        Self { counts: Rc::clone(counts), operation, bytes, id, begun: lane::now(), ended: false }
    }

    /// Number of the request on its export, for tracing.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// What was asked.
    pub fn operation(&self) -> Operation {
        self.operation
    }

    /// The answer is on its way to the client.
    pub fn finish(self, result: Result<(), &DiskError>) {
        if let Err(error) = result {
            tracing::debug!(id = self.id, operation = self.operation.name(), %error, "request failed");
        }
        self.end(result.is_ok());
    }

    /// As [`Request::finish`], for front ends whose answers are no disk errors.
    pub fn finish_well(self, well: bool) {
        self.end(well);
    }

    /// The client is gone; nobody can be answered. Counted as failed.
    pub fn abandon(self) {
        self.end(false);
    }

    fn end(mut self, well: bool) {
        self.ended = true;
        let took = lane::now().saturating_duration_since(self.begun);
        self.counts.end(self.operation, self.bytes, took, well);
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if !self.ended && !std::thread::panicking() {
            panic!("request {} ({}) was dropped unanswered", self.id, self.operation.name());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finished_request_is_counted() {
        let counts = Counts::new();
        let request = Request::begin(&counts, Operation::Write, 4096);
        assert_eq!((counts.in_flight(), counts.in_flight_bytes()), (1, 4096));
        request.finish(Ok(()));
        Request::begin(&counts, Operation::Write, 512).finish(Err(&DiskError::Gone));
        let tally = counts.tally(Operation::Write);
        assert_eq!((tally.done, tally.failed, tally.bytes), (2, 1, 4096));
        assert_eq!(tally.latency.iter().sum::<u64>(), 2);
        assert_eq!(counts.in_flight(), 0);
    }

    #[test]
    #[should_panic(expected = "dropped unanswered")]
    fn a_dropped_request_is_a_bug() {
        drop(Request::begin(&Counts::new(), Operation::Flush, 0));
    }
}
