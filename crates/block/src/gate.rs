//! The write gate: closed for a cut, it lets nothing new in and tells when the last one is out.

use std::cell::Cell;
use std::rc::Rc;

use lane::sync::Waiters;

/// Stands before everything that changes a disk. Entering costs two counters; closing waits for what is inside.
/// Several may close it at once; it opens when all of them have opened it.
#[derive(Default)]
pub struct Gate {
    inside: Cell<u64>,
    closed: Cell<u32>,
    waiters: Waiters,
}

/// Being inside; dropping it leaves.
pub struct Pass {
    gate: Rc<Gate>,
}

/// Being inside alone: see [`Gate::alone`].
pub struct Alone {
    pass: Pass,
}

impl Gate {
    /// An open gate.
    pub fn new() -> Rc<Self> {
        Rc::new(Self::default())
    }

    /// Enters at once if the gate is open.
    #[inline]
    pub fn try_enter(self: &Rc<Self>) -> Option<Pass> {
        if self.closed.get() > 0 {
            return None;
        }
        self.inside.set(self.inside.get() + 1);
        Some(Pass { gate: Rc::clone(self) })
    }

    /// Waits until the gate is open, then enters.
    pub async fn enter(self: &Rc<Self>) -> Pass {
        match self.try_enter() {
            Some(pass) => pass,
            None => self.waiters.until(|| self.try_enter()).await,
        }
    }

    /// Lets nobody in from now on. Does not wait: see [`Gate::drained`].
    pub fn close(&self) {
        self.closed.set(self.closed.get() + 1);
    }

    /// Undoes one [`Gate::close`].
    pub fn open(&self) {
        assert!(self.closed.get() > 0, "the gate is open");
        self.closed.set(self.closed.get() - 1);
        if self.closed.get() == 0 {
            self.waiters.wake_all();
        }
    }

    /// Waits until nobody is inside.
    pub async fn drained(&self) {
        self.waiters.until(|| (self.inside.get() == 0).then_some(())).await
    }

    /// Enters, keeps others out and waits until they have left. Whoever waits in [`Gate::drained`] waits for this one
    /// too: a cut is never in the middle of it. Several take turns.
    pub async fn alone(self: &Rc<Self>) -> Alone {
        let alone = Alone { pass: self.enter().await };
        self.close();
        self.waiters.until(|| (self.inside.get() == 1).then_some(())).await;
        alone
    }

    /// How many are inside.
    pub fn inside(&self) -> u64 {
        self.inside.get()
    }

    /// Somebody has closed it.
    pub fn is_closed(&self) -> bool {
        self.closed.get() > 0
    }
}

impl Drop for Pass {
    #[inline]
    fn drop(&mut self) {
        let gate = &self.gate;
        gate.inside.set(gate.inside.get() - 1);
        // The last one lets a cut begin, the last but one whoever wants to be alone.
        if gate.inside.get() <= 1 && gate.closed.get() > 0 {
            gate.waiters.wake_all();
        }
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        self.pass.gate.open();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_gate_drains_and_holds() {
        lane::block_on(async {
            let gate = Gate::new();
            let pass = gate.enter().await;
            gate.close();
            let (late, drained) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(false)));
            let entering = {
                let (gate, late) = (Rc::clone(&gate), Rc::clone(&late));
                lane::spawn(async move {
                    let _pass = gate.enter().await;
                    late.set(true);
                })
            };
            let draining = {
                let (gate, drained) = (Rc::clone(&gate), Rc::clone(&drained));
                lane::spawn(async move {
                    gate.drained().await;
                    drained.set(true);
                })
            };
            lane::yield_now().await;
            assert!(!late.get() && !drained.get());
            drop(pass);
            draining.await;
            assert!(drained.get() && !late.get());
            gate.open();
            entering.await;
            assert!(late.get());
        });
    }

    #[test]
    fn a_cut_waits_for_who_is_alone() {
        lane::block_on(async {
            let gate = Gate::new();
            let pass = gate.enter().await;
            let inside = Rc::new(Cell::new(0));
            let tasks: Vec<_> = (0..3)
                .map(|_| {
                    let (gate, inside) = (Rc::clone(&gate), Rc::clone(&inside));
                    lane::spawn(async move {
                        let _alone = gate.alone().await;
                        assert_eq!((inside.replace(1), gate.inside()), (0, 1));
                        lane::yield_now().await;
                        lane::yield_now().await;
                        inside.set(0);
                    })
                })
                .collect();
            lane::yield_now().await;
            assert_eq!(inside.get(), 0, "somebody else is inside");
            drop(pass);
            lane::yield_now().await;
            gate.close();
            gate.drained().await;
            assert_eq!(inside.get(), 0);
            gate.open();
            for task in tasks {
                task.await;
            }
        });
    }
}
