//! How long the guest's writes took lately: what a commit is measured by (R29).

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

/// So many of the last writes are remembered.
const REMEMBERED: usize = 512;

/// The last writes' times.
#[derive(Default)]
pub(crate) struct Latency {
    micros: RefCell<Vec<u32>>,
    next: Cell<usize>,
    count: Cell<u64>,
}

impl Latency {
    /// A write that began then has returned.
    #[inline]
    pub(crate) fn note(&self, begun: Instant) {
        let micros =
            u32::try_from(lane::now().saturating_duration_since(begun).as_micros()).unwrap_or(u32::MAX);
        let mut list = self.micros.borrow_mut();
        if list.len() < REMEMBERED {
            list.push(micros);
        } else {
            list[self.next.get()] = micros;
            self.next.set((self.next.get() + 1) % REMEMBERED);
        }
        self.count.set(self.count.get() + 1);
    }

    /// Writes ever noted.
    pub(crate) fn count(&self) -> u64 {
        self.count.get()
    }

    /// How many of the last `count` writes took longer than `limit`; of those that are remembered.
    pub(crate) fn above(&self, limit: Duration, count: u64) -> u64 {
        let list = self.micros.borrow();
        let limit = u32::try_from(limit.as_micros()).unwrap_or(u32::MAX);
        let older = list[..self.next.get()].iter().rev();
        let last = older.chain(list[self.next.get()..].iter().rev());
        last.take(usize::try_from(count).unwrap_or(usize::MAX)).filter(|took| **took > limit).count() as u64
    }

    /// 99 of 100 of the last writes were faster; `None` while there are too few to say.
    pub(crate) fn p99(&self) -> Option<Duration> {
        let mut list = self.micros.borrow().clone();
        if list.len() < 100 {
            return None;
        }
        let index = list.len() * 99 / 100;
        Some(Duration::from_micros(u64::from(*list.select_nth_unstable(index).1)))
    }
}
