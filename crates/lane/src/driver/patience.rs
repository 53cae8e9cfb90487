//! How a lane waits, learnt from its last waits.
//!
//! A lane that is woken by next to nothing, again and again, is *calm*: requests come one at a time, and it waits for its
//! sockets itself ([`super::held`]). With much under way completions come in batches, which the ring is better at.
//! (Looking for the medium's answer before sleeping was measured too, and is worse: the kernel's own worker
//! is put on the processor that looks.)

/// Wakes by next to nothing in a row until a lane is calm.
const LEARN: u32 = 16;
/// Completions at once that are no batch.
const FEW: usize = 2;

/// What the last waits were like.
#[derive(Debug, Default)]
pub(super) struct Patience {
    /// Wakes by next to nothing in a row.
    few: u32,
}

impl Patience {
    /// Requests come one at a time.
    #[inline]
    pub(super) fn is_calm(&self) -> bool {
        self.few >= LEARN
    }

    /// A wait ended with so many completions.
    #[inline]
    pub(super) fn woke_for(&mut self, completions: usize) {
        self.few = if completions > FEW { 0 } else { self.few.saturating_add(1) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_request_at_a_time_is_calm_and_a_batch_is_not() {
        let mut lane = Patience::default();
        for _ in 0..LEARN {
            assert!(!lane.is_calm());
            lane.woke_for(1);
        }
        assert!(lane.is_calm());
        lane.woke_for(FEW + 1);
        assert!(!lane.is_calm());
    }
}
