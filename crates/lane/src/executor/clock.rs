//! The lane's clock: real, or virtual under the `sim` driver.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use super::Lane;

/// Timers in the order of their time, and the time itself where it is virtual.
pub(crate) struct Clock {
    virtual_now: Option<Instant>,
    timers: BTreeMap<(Instant, u64), Waker>,
    next_id: u64,
}

impl Clock {
    pub(super) fn new(is_virtual: bool) -> Self {
        Self { virtual_now: is_virtual.then(Instant::now), timers: BTreeMap::new(), next_id: 0 }
    }

    fn now(&self) -> Instant {
        self.virtual_now.unwrap_or_else(Instant::now)
    }

    pub(super) fn next_timer(&self) -> Option<Instant> {
        self.timers.first_key_value().map(|((at, _), _)| *at)
    }

    pub(super) fn take_due(&mut self, now: Instant) -> Vec<Waker> {
        let later = self.timers.split_off(&(now, u64::MAX));
        std::mem::replace(&mut self.timers, later).into_values().collect()
    }

    /// Virtual time goes on by a little.
    pub(super) fn pass(&mut self, time: Duration) {
        if let Some(now) = &mut self.virtual_now {
            *now += time;
        }
    }

    /// Virtual time goes on to `at`.
    pub(super) fn jump(&mut self, at: Instant) {
        if let Some(now) = &mut self.virtual_now {
            *now = at.max(*now);
        }
    }
}

/// The lane's clock. Virtual under the `sim` driver; the system's outside of a lane.
pub fn now() -> Instant {
    Lane::try_with(|lane| lane.clock.borrow().now()).unwrap_or_else(Instant::now)
}

/// Waits for a while on the lane's clock. May be dropped before.
pub fn sleep(time: Duration) -> impl Future<Output = ()> {
    Sleep { time, key: None }
}

struct Sleep {
    time: Duration,
    key: Option<(Instant, u64)>,
}

impl Future for Sleep {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        Lane::with(|lane| {
            let mut clock = lane.clock.borrow_mut();
            let now = clock.now();
            let key = match self.key {
                Some(key) => key,
                None => {
                    // Further than a century is for ever; it must not overflow the clock.
                    let time = self.time.min(Duration::from_secs(100 * 365 * 86400));
                    clock.next_id += 1;
                    (now + time, clock.next_id)
                }
            };
            if key.0 <= now {
                clock.timers.remove(&key);
                self.key = None;
                self.time = Duration::ZERO;
                return Poll::Ready(());
            }
            let before = clock.timers.insert(key, cx.waker().clone());
            self.key = Some(key);
            drop(clock);
            drop(before); // somebody's waker: outside of the borrow
            Poll::Pending
        })
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.key.take() {
            // The waker is dropped outside of the borrow.
            let waker = Lane::try_with(|lane| lane.clock.borrow_mut().timers.remove(&key));
            drop(waker);
        }
    }
}

/// Lets every other ready task run once.
pub async fn yield_now() {
    let mut first = true;
    std::future::poll_fn(move |cx| {
        if std::mem::take(&mut first) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(())
    })
    .await;
}
