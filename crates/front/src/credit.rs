//! What clients may hold in memory: bytes of buffers and requests, each by itself and all of a server together.

use std::cell::Cell;
use std::rc::Rc;

use lane::sync::Waiters;

use crate::pool::LARGEST_BYTES;
use crate::wire::Tether;

/// Requests of one client that may be under way at once. The bound is on memory, not on speed: no client in use
/// keeps as many.
const REQUESTS_MAX: usize = 256;
/// Bytes of buffers that the requests of one client may hold together: the largest request is let in alone.
pub(crate) const HELD_BYTES_MAX: usize = LARGEST_BYTES;
/// A client that holds no more than this gets its buffers whatever the others hold.
const ALWAYS_BYTES: usize = 256 << 10;

/// Bytes of buffers that all clients of a server may hold together.
pub(crate) struct Budget {
    bytes: Cell<usize>,
    bytes_max: usize,
    freed: Waiters,
}

impl Budget {
    /// Nothing is held yet.
    pub fn new(bytes_max: usize) -> Rc<Self> {
        Rc::new(Self { bytes: Cell::new(0), bytes_max, freed: Waiters::new() })
    }
}

/// What the requests of one client hold, and may hold.
pub(crate) struct Credit {
    bytes: Cell<usize>,
    requests: Cell<usize>,
    freed: Waiters,
    budget: Rc<Budget>,
    tether: Rc<Tether>,
}

impl Credit {
    /// A client that holds nothing yet.
    pub fn new(budget: &Rc<Budget>, tether: &Rc<Tether>) -> Rc<Self> {
        Rc::new(Self {
            bytes: Cell::new(0),
            requests: Cell::new(0),
            freed: Waiters::new(),
            budget: Rc::clone(budget),
            tether: Rc::clone(tether),
        })
    }

    /// Waits until one more request with `bytes` bytes of buffers may be under way; `None` when the client was cut off
    /// meanwhile.
    pub async fn hold(self: &Rc<Self>, bytes: usize) -> Option<Held> {
        self.freed
            .until(|| {
                let fits = self.bytes.get() == 0 || self.bytes.get() + bytes <= HELD_BYTES_MAX;
                (fits && self.requests.get() < REQUESTS_MAX).then_some(())
            })
            .await;
        let budget = &self.budget;
        if bytes > 0 {
            // Whoever takes no answers can fill the budget, but never keep others from small requests.
            let small = self.bytes.get() + bytes <= ALWAYS_BYTES;
            let fits = || (small || budget.bytes.get() + bytes <= budget.bytes_max).then_some(());
            self.tether.unless_cut(&budget.freed, fits).await?;
        }
        Some(self.take(bytes))
    }

    /// As [`Credit::hold`] for who must not wait: `None` when it would have to.
    pub fn try_hold(self: &Rc<Self>, bytes: usize) -> Option<Held> {
        let (own, all) = (self.bytes.get() + bytes, self.budget.bytes.get() + bytes);
        let fits = own <= ALWAYS_BYTES || own <= HELD_BYTES_MAX && all <= self.budget.bytes_max;
        (fits && self.requests.get() < REQUESTS_MAX).then(|| self.take(bytes))
    }

    fn take(self: &Rc<Self>, bytes: usize) -> Held {
        let budget = &self.budget;
        budget.bytes.set(budget.bytes.get() + bytes);
        self.bytes.set(self.bytes.get() + bytes);
        self.requests.set(self.requests.get() + 1);
        Held { credit: Rc::clone(self), bytes }
    }

    /// Waits until nothing is under way.
    pub async fn idle(&self) {
        self.freed.until(|| (self.requests.get() == 0).then_some(())).await
    }
}

/// What one request holds; let go when dropped.
pub(crate) struct Held {
    credit: Rc<Credit>,
    bytes: usize,
}

impl Held {
    /// The buffers are back; the request itself goes on.
    pub fn release_bytes(&mut self) {
        let (credit, bytes) = (&self.credit, std::mem::take(&mut self.bytes));
        if bytes > 0 {
            credit.bytes.set(credit.bytes.get() - bytes);
            credit.freed.wake_all();
            credit.budget.bytes.set(credit.budget.bytes.get() - bytes);
            credit.budget.freed.wake_all();
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.release_bytes();
        self.credit.requests.set(self.credit.requests.get() - 1);
        self.credit.freed.wake_all();
    }
}
