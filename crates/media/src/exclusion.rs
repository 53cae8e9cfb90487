//! Keeps ordinary operations out of a range while one operation has it alone: compare-and-write, and writes smaller
//! than the medium's unit, which read, change and write back.
//!
//! Ordinary operations pay two counters. They count themselves in one of two epochs; whoever wants a range alone
//! announces it (later operations that overlap wait), turns the epoch, and waits for the old epoch to run empty.

use std::cell::{Cell, RefCell};

use lane::sync::{Turn, Waiters};

/// See the module.
#[derive(Default)]
pub(crate) struct Exclusion {
    epoch: Cell<usize>,
    inside: [Cell<u64>; 2],
    alone: RefCell<Vec<(u64, u64)>>,
    turn: Turn,
    /// Woken when a range is free again.
    freed: Waiters,
    /// Woken when an epoch has run empty.
    empty: Waiters,
}

/// An ordinary operation under way.
pub(crate) struct Inside<'a> {
    exclusion: &'a Exclusion,
    epoch: usize,
}

/// A range held alone.
pub(crate) struct Alone<'a> {
    exclusion: &'a Exclusion,
    range: (u64, u64),
}

impl Exclusion {
    fn overlaps(&self, from: u64, to: u64) -> bool {
        self.alone.borrow().iter().any(|&(a, b)| a < to && from < b)
    }

    fn try_enter(&self, from: u64, to: u64) -> Option<Inside<'_>> {
        if self.overlaps(from, to) {
            return None;
        }
        let epoch = self.epoch.get();
        self.inside[epoch].set(self.inside[epoch].get() + 1);
        Some(Inside { exclusion: self, epoch })
    }

    /// Begins an ordinary operation on the bytes `from..to`.
    #[inline]
    pub async fn enter(&self, from: u64, to: u64) -> Inside<'_> {
        match self.try_enter(from, to) {
            Some(inside) => inside,
            None => self.freed.until(|| self.try_enter(from, to)).await,
        }
    }

    /// Has the bytes `from..to` alone: nothing that overlaps is under way or begins until the guard is dropped.
    pub async fn alone(&self, from: u64, to: u64) -> Alone<'_> {
        self.freed
            .until(|| (!self.overlaps(from, to)).then(|| self.alone.borrow_mut().push((from, to))))
            .await;
        let guard = Alone { exclusion: self, range: (from, to) };
        // One turn of the epoch at a time; whoever began before is in the old one, which only runs down.
        let turn = self.turn.take().await;
        let old = self.epoch.get();
        self.epoch.set(1 - old);
        self.empty.until(|| (self.inside[old].get() == 0).then_some(())).await;
        drop(turn);
        guard
    }
}

impl Drop for Inside<'_> {
    #[inline]
    fn drop(&mut self) {
        let inside = &self.exclusion.inside[self.epoch];
        inside.set(inside.get() - 1);
        if inside.get() == 0 && self.epoch != self.exclusion.epoch.get() {
            self.exclusion.empty.wake_all();
        }
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.exclusion.alone.borrow_mut().retain(|range| *range != self.range);
        self.exclusion.freed.wake_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;

    #[test]
    fn alone_waits_for_the_others_and_keeps_them_out() {
        lane::block_on(async {
            let it = Rc::new(Exclusion::default());
            let log = Rc::new(RefCell::new(Vec::new()));
            let early = it.enter(0, 8).await;
            let task = {
                let (it, log) = (Rc::clone(&it), Rc::clone(&log));
                lane::spawn(async move {
                    let _alone = it.alone(4, 6).await;
                    log.borrow_mut().push("alone");
                    lane::yield_now().await;
                    log.borrow_mut().push("alone ends");
                })
            };
            lane::yield_now().await;
            let beside = it.enter(6, 8).await;
            let late = {
                let (it, log) = (Rc::clone(&it), Rc::clone(&log));
                lane::spawn(async move {
                    let _inside = it.enter(5, 7).await;
                    log.borrow_mut().push("late");
                })
            };
            lane::yield_now().await;
            assert!(log.borrow().is_empty());
            drop(early);
            task.await;
            late.await;
            drop(beside);
            assert_eq!(*log.borrow(), ["alone", "alone ends", "late"]);
        });
    }

    #[test]
    fn two_that_want_to_be_alone_take_turns() {
        lane::block_on(async {
            let it = Rc::new(Exclusion::default());
            let inside = Rc::new(Cell::new(0));
            let tasks: Vec<_> = (0..10u64)
                .map(|n| {
                    let (it, inside) = (Rc::clone(&it), Rc::clone(&inside));
                    lane::spawn(async move {
                        let _alone = it.alone(n % 2, 4).await;
                        assert_eq!(inside.replace(1), 0);
                        lane::yield_now().await;
                        inside.set(0);
                    })
                })
                .collect();
            for task in tasks {
                task.await;
            }
        });
    }
}
