//! Punching: what freed grains still hold is given back to the file system or device below the pool.
//!
//! A grain comes here when it may be given out again: the record that frees it is durable, and nobody who looked it up
//! before is still at work. It is punched when the background comes to it, if it is still free then; while that is
//! under way nobody gets it. A power loss before leaves a free grain that takes room on the medium until it is used
//! again; replay brings those that the journal knows here.

use block::DiskError;

use crate::format::{BITMAP_GRAINS, GRAIN_BYTES};
use crate::pool::Pool;
use crate::space::bitmap_place;

/// Runs of grains punched in one step, at most.
const MOST_RUNS: usize = 64;

impl Pool {
    /// There is work for [`Pool::punch_step`].
    pub(crate) fn has_stale_grains(&self) -> bool {
        !self.punching_refused.get() && self.space.has_stale()
    }

    /// Punches some runs of freed grains. False: there are none.
    pub(crate) async fn punch_step(&self) -> Result<bool, DiskError> {
        if !self.has_stale_grains() {
            return Ok(false);
        }
        let _turn = self.punch_turn.take().await; // one claim at a time
        for _ in 0..MOST_RUNS {
            let Some((first, count)) = self.space.next_stale() else { break };
            self.punch(first, count).await?;
        }
        Ok(true)
    }

    /// Punches what is free of a run of grains.
    async fn punch(&self, first: u64, count: u64) -> Result<(), DiskError> {
        let (mut at, end) = (first, first + count);
        while at < end {
            let Some((key, pair, ..)) = bitmap_place(&self.media, at) else { return Ok(()) };
            let page = self.pages.load(&self.media, key, pair).await?;
            let Some(number) = self.media.medium_of(at) else { return Ok(()) };
            let medium = &self.media.list[number];
            let page_first = medium.first + key.index * BITMAP_GRAINS;
            let page_end = (page_first + BITMAP_GRAINS).min(medium.first + medium.grains).min(end);
            // Never the system's own, whatever a damaged journal says.
            at = at.max(medium.first + medium.reserved);
            while let Some(claimed) = self.space.claim(&page, page_first, at..page_end) {
                at = claimed.end();
                let answer = self.media.unmap(claimed.first() * GRAIN_BYTES, claimed.count() * GRAIN_BYTES);
                if let Err(error) = answer.await {
                    // It is a hint: the pool goes on, its file just does not shrink.
                    tracing::warn!(pool = %self.uuid(), %error, "freed space is not given back to the medium");
                    self.punching_refused.set(true);
                    return Ok(());
                }
            }
            at = page_end;
        }
        Ok(())
    }
}
