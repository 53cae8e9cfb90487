//! Ranges that somebody works on: what has to look like one action locks them.
//!
//! Ordinary reads and writes hold their range shared; a command that reads, decides and writes (ORWRITE, COMPARE AND
//! WRITE) or that must not be seen half done (WRITE ATOMIC) holds it alone. Every front end of a disk takes the same lock.

use std::cell::RefCell;
use std::rc::Rc;

use lane::sync::Waiters;

use crate::Sector;

/// A claim; `held` is false while it still waits, so that later ones queue up behind it and nobody starves.
struct Claim {
    number: u64,
    at: u64,
    end: u64,
    alone: bool,
    held: bool,
}

#[derive(Default)]
struct Claims {
    list: Vec<Claim>,
    next: u64,
}

/// Locks of sector ranges of one disk. Costs a look at what is under way, no more.
#[derive(Default)]
pub struct RangeLock {
    claims: RefCell<Claims>,
    waiters: Waiters,
}

/// A range that is locked; dropping it unlocks.
pub struct Locked {
    lock: Rc<RangeLock>,
    number: u64,
}

impl RangeLock {
    /// Nothing is locked.
    pub fn new() -> Rc<Self> {
        Rc::new(Self::default())
    }

    /// Together with other shared users.
    pub async fn shared(self: &Rc<Self>, at: Sector, count: u64) -> Locked {
        self.claim(at, count, false).await
    }

    /// Alone: nobody else is in the range.
    pub async fn alone(self: &Rc<Self>, at: Sector, count: u64) -> Locked {
        self.claim(at, count, true).await
    }

    async fn claim(self: &Rc<Self>, at: Sector, count: u64, alone: bool) -> Locked {
        let number = {
            let mut claims = self.claims.borrow_mut();
            let number = claims.next;
            claims.next += 1;
            let end = at.0.saturating_add(count);
            claims.list.push(Claim { number, at: at.0, end, alone, held: false });
            number
        };
        // From here on dropping takes the claim back, held or not.
        let locked = Locked { lock: Rc::clone(self), number };
        if !self.try_hold(number) {
            self.waiters.until(|| self.try_hold(number).then_some(())).await;
        }
        locked
    }

    /// Holds the claim if nothing older that it may not share with is in the way.
    fn try_hold(&self, number: u64) -> bool {
        let mut claims = self.claims.borrow_mut();
        let Some(own) = claims.list.iter().position(|c| c.number == number) else { return true };
        let (at, end, alone) = {
            let c = &claims.list[own];
            (c.at, c.end, c.alone)
        };
        let blocked = claims.list.iter().any(|c| {
            c.number != number
                && (c.held || c.number < number)
                && (alone || c.alone)
                && c.at < end
                && at < c.end
        });
        if !blocked {
            claims.list[own].held = true;
        }
        !blocked
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        let waiting = {
            let mut claims = self.lock.claims.borrow_mut();
            if let Some(own) = claims.list.iter().position(|c| c.number == self.number) {
                claims.list.swap_remove(own);
            }
            claims.list.iter().any(|c| !c.held)
        };
        if waiting {
            self.lock.waiters.wake_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::time::Duration;

    #[test]
    fn who_is_alone_is_alone_and_everybody_gets_there() {
        for seed in 0..30 {
            let driver = lane::DriverKind::Sim { seed };
            lane::block_on_with(lane::Options { driver, ..Default::default() }, async {
                let lock = RangeLock::new();
                let users: Rc<Vec<Cell<i32>>> = Rc::new((0..16).map(|_| Cell::new(0)).collect());
                let work = (0..60u64).map(|n| {
                    let (lock, users) = (Rc::clone(&lock), Rc::clone(&users));
                    async move {
                        let (at, count, alone) = (n * 7 % 12, 1 + n % 4, n % 5 == 0);
                        let _held = if alone {
                            lock.alone(Sector(at), count).await
                        } else {
                            lock.shared(Sector(at), count).await
                        };
                        let range = at as usize..(at + count) as usize;
                        for user in &users[range.clone()] {
                            assert!(user.get() >= 0 && (!alone || user.get() == 0));
                            user.set(if alone { -1 } else { user.get() + 1 });
                        }
                        lane::sleep(Duration::from_micros(n % 3)).await;
                        for user in &users[range] {
                            user.set(if alone { 0 } else { user.get() - 1 });
                        }
                    }
                });
                assert_eq!(lane::sync::together(work).await.len(), 60);
                assert!(lock.claims.borrow().list.is_empty());
            });
        }
    }
}
