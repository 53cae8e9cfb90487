//! Waiting for each other on one lane: no threads, no locks.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

/// Tasks that wait until something changes. Spurious wake-ups are allowed: callers look again.
#[derive(Default)]
pub struct Waiters {
    list: RefCell<Vec<Waker>>,
}

impl Waiters {
    /// Nobody waits yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Wakes everybody, in the order in which they came.
    pub fn wake_all(&self) {
        let list = std::mem::take(&mut *self.list.borrow_mut());
        for waker in list {
            waker.wake();
        }
    }

    /// Waits until `ready` answers something. It is asked at once, and again after each [`Waiters::wake_all`].
    pub fn until<T, F: FnMut() -> Option<T>>(&self, ready: F) -> Until<'_, F> {
        Until { waiters: self, ready }
    }
}

/// See [`Waiters::until`].
pub struct Until<'a, F> {
    waiters: &'a Waiters,
    ready: F,
}

impl<T, F: FnMut() -> Option<T> + Unpin> Future for Until<'_, F> {
    type Output = T;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        match (self.ready)() {
            Some(value) => Poll::Ready(value),
            None => {
                let mut list = self.waiters.list.borrow_mut();
                if !list.iter().any(|w| w.will_wake(cx.waker())) {
                    list.push(cx.waker().clone());
                }
                Poll::Pending
            }
        }
    }
}

/// One at a time may be inside. Fair in the order of wake-ups; for control paths, not for the way of a write.
#[derive(Default)]
pub struct Turn {
    taken: Cell<bool>,
    waiters: Waiters,
}

impl Turn {
    /// Nobody is inside.
    pub fn new() -> Self {
        Self::default()
    }

    /// Waits for the turn; it ends when the guard is dropped.
    pub async fn take(&self) -> TurnGuard<'_> {
        self.waiters.until(|| (!self.taken.replace(true)).then_some(())).await;
        TurnGuard { turn: self }
    }
}

/// Holds a [`Turn`].
pub struct TurnGuard<'a> {
    turn: &'a Turn,
}

impl Drop for TurnGuard<'_> {
    fn drop(&mut self) {
        self.turn.taken.set(false);
        self.turn.waiters.wake_all();
    }
}

/// Runs futures side by side and waits for all of them, whatever they answer: an operation that the kernel has is never
/// dropped. The answers are in the order of the futures. Each wake-up polls all that are open, so this is for a few
/// (members of a group, legs of a mirror), not for thousands: spawn those.
pub async fn together<F: Future>(work: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    let mut open: Vec<Result<F::Output, Pin<Box<F>>>> = work.into_iter().map(|f| Err(Box::pin(f))).collect();
    std::future::poll_fn(|cx| {
        let mut waits = false;
        for place in &mut open {
            if let Err(future) = place {
                match future.as_mut().poll(cx) {
                    Poll::Ready(answer) => *place = Ok(answer),
                    Poll::Pending => waits = true,
                }
            }
        }
        if waits { Poll::Pending } else { Poll::Ready(()) }
    })
    .await;
    open.into_iter().filter_map(Result::ok).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;
    use std::time::Duration;

    #[test]
    fn all_are_waited_for_and_answer_in_order() {
        crate::block_on(async {
            let answers = together([3u64, 1, 2].map(|ms| async move {
                crate::sleep(Duration::from_millis(ms)).await;
                if ms == 1 { Err(ms) } else { Ok(ms) }
            }))
            .await;
            assert_eq!(answers, [Ok(3), Err(1), Ok(2)]);
            assert!(together(Vec::<std::future::Ready<()>>::new()).await.is_empty());
        });
    }

    #[test]
    fn one_at_a_time_has_the_turn() {
        for seed in 0..20 {
            let driver = crate::DriverKind::Sim { seed };
            crate::block_on_with(crate::Options { driver, ..Default::default() }, async {
                let (turn, inside) = (Rc::new(Turn::new()), Rc::new(Cell::new(0u32)));
                let work = (0..10).map(|_| {
                    let (turn, inside) = (Rc::clone(&turn), Rc::clone(&inside));
                    async move {
                        let _guard = turn.take().await;
                        assert_eq!(inside.replace(1), 0);
                        crate::sleep(Duration::from_millis(1)).await;
                        inside.set(0);
                    }
                });
                assert_eq!(together(work).await.len(), 10);
            });
        }
    }
}
