//! How fast a commit copies (R29): the guest's p99 write time stays within 1.5 times what it was before.
//!
//! p99 within a limit means that one write in a hundred may be above it. That is kept as a budget, with a factor of two
//! for what is only seen afterwards: each write of the guest earns one point, each one above the limit spends
//! [`SLOW`]. Overspent, the copy first takes fewer regions at a time, then pauses between them; never longer than
//! [`LONGEST_PAUSE`], so that the pass ends.

use std::time::Duration;

use crate::latency::Latency;

/// So many regions are copied at a time, at most.
pub(crate) const WIDTH: usize = 4;
/// The longest pause between two rounds.
const LONGEST_PAUSE: Duration = Duration::from_millis(50);
/// Pauses begin here, and below it there is none.
const SHORTEST_PAUSE: Duration = Duration::from_micros(500);
/// A judgement wants so many writes.
const SAMPLE: u64 = 32;
/// What a write above the limit costs, in points: what two hundred writes earn.
const SLOW: i64 = 200;
/// The most points that are saved up: a guest that was left alone long is not hit hard later.
const SAVED: i64 = 4 * SLOW;
/// What a step up costs: it is an attempt.
const STEP_UP: i64 = 2 * SLOW;

/// The pace of one pass.
pub(crate) struct Pace {
    /// 1.5 times the p99 before; `None`: there were too few writes to know.
    limit: Option<Duration>,
    seen: u64,
    credit: i64,
    width: usize,
    pause: Duration,
}

impl Pace {
    /// For a guest whose writes so far took what `latency` remembers.
    pub(crate) fn new(latency: &Latency) -> Self {
        let limit = latency.p99().map(|before| before * 3 / 2);
        // The first rounds are an attempt too.
        let width = if limit.is_some() { 1 } else { WIDTH };
        Self { limit, seen: latency.count(), credit: 0, width, pause: Duration::ZERO }
    }

    /// How many regions the next round takes.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Between two rounds: judges what the guest felt, and waits.
    pub(crate) async fn rest(&mut self, latency: &Latency) {
        self.judge(latency);
        if self.pause > Duration::ZERO {
            lane::sleep(self.pause).await;
        } else {
            lane::yield_now().await;
        }
    }

    fn judge(&mut self, latency: &Latency) {
        let Some(limit) = self.limit else { return };
        let writes = latency.count() - self.seen;
        if writes == 0 {
            // Nobody is there to be hurt.
            self.pause /= 2;
            return;
        }
        if writes < SAMPLE && self.pause < LONGEST_PAUSE {
            return;
        }
        let over = latency.above(limit, writes);
        self.seen = latency.count();
        self.credit = (self.credit + writes as i64 - SLOW * over as i64).clamp(-4 * SAVED, SAVED);
        if self.credit < 0 && over > 0 {
            match self.width {
                1 => self.pause = (self.pause * 2).clamp(SHORTEST_PAUSE, LONGEST_PAUSE),
                _ => self.width /= 2,
            }
        } else if self.credit >= 0 && over == 0 {
            if self.pause > Duration::ZERO {
                self.pause = Some(self.pause / 2).filter(|p| *p >= SHORTEST_PAUSE).unwrap_or_default();
            } else if self.credit >= STEP_UP && self.width < WIDTH {
                self.credit -= STEP_UP;
                self.width += 1;
            }
        }
    }
}
