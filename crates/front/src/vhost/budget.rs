//! What the requests of one guest may hold while they are under way. A guest has as many queues as it likes, and chains of a
//! thousand pieces in each of their descriptors: what it may keep busy must not follow from that.

use std::cell::Cell;

use lane::sync::Waiters;

/// Requests under way.
const REQUESTS_MAX: usize = 4096;
/// Pieces of guest memory of all of them: 16 bytes of ours each.
const PIECES_MAX: usize = 1 << 16;
/// Bytes that are being moved: a disk that must copy holds as many.
pub(crate) const BYTES_MAX: usize = 64 << 20;

/// What one request takes.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Cost {
    pub pieces: usize,
    pub bytes: usize,
}

/// What is taken, of all queues together.
#[derive(Default)]
pub(crate) struct Budget {
    requests: Cell<usize>,
    pieces: Cell<usize>,
    bytes: Cell<usize>,
    /// Something was given back.
    pub freed: Waiters,
}

impl Budget {
    /// There is room for one more such request.
    pub fn fits(&self, cost: Cost) -> bool {
        self.requests.get() < REQUESTS_MAX
            && self.pieces.get() + cost.pieces <= PIECES_MAX
            && self.bytes.get() + cost.bytes <= BYTES_MAX
    }

    /// Takes it, whether there is room or not: a queue with nothing under way is always served.
    pub fn take(&self, cost: Cost) {
        self.requests.set(self.requests.get() + 1);
        self.pieces.set(self.pieces.get() + cost.pieces);
        self.bytes.set(self.bytes.get() + cost.bytes);
    }

    /// Nothing is taken.
    pub fn is_whole(&self) -> bool {
        self.requests.get() == 0 && self.pieces.get() == 0 && self.bytes.get() == 0
    }

    /// The request has ended.
    pub fn give_back(&self, cost: Cost) {
        self.requests.set(self.requests.get() - 1);
        self.pieces.set(self.pieces.get() - cost.pieces);
        self.bytes.set(self.bytes.get() - cost.bytes);
        self.freed.wake_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_cost_is_bounded() {
        let small = Cost { pieces: 1, bytes: 0 };
        for (cost, most) in [
            (small, REQUESTS_MAX),
            (Cost { pieces: 1024, bytes: 512 }, PIECES_MAX / 1024),
            (Cost { pieces: 1, bytes: 1 << 20 }, BYTES_MAX >> 20),
        ] {
            let budget = Budget::default();
            for _ in 0..most {
                assert!(budget.fits(cost));
                budget.take(cost);
            }
            assert!(!budget.fits(cost));
            budget.take(cost); // the only one of its queue
            budget.give_back(cost);
            assert!(!budget.fits(cost));
            budget.give_back(cost);
            assert!(budget.fits(cost));
        }
    }
}
