//! Grains that are in the file but not yet in its tables.

use std::collections::BTreeMap;

/// Neighbouring grains at neighbouring places.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) struct Run {
    /// How many grains.
    pub(super) grains: u64,
    /// Sector of the first one.
    pub(super) sector: u64,
}

/// Runs by their first grain; no two overlap.
#[derive(Default)]
pub(super) struct Runs {
    map: BTreeMap<u64, Run>,
    grains: u64,
}

impl Runs {
    pub(super) fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.map.len()
    }

    /// Grains in all runs together.
    pub(super) fn grains(&self) -> u64 {
        self.grains
    }

    /// Adds a run, joining it with the one before when both the grains and their places are adjacent.
    pub(super) fn insert(&mut self, grain: u64, run: Run, grain_sectors: u64) {
        self.grains += run.grains;
        if let Some((first, before)) = self.map.range_mut(..grain).next_back() {
            debug_assert!(first + before.grains <= grain, "a grain has one place");
            if first + before.grains == grain && before.sector + before.grains * grain_sectors == run.sector {
                before.grains += run.grains;
                return;
            }
        }
        self.map.insert(grain, run);
    }

    /// Adds a run as it is; to be taken out by [`Runs::remove`].
    pub(super) fn insert_alone(&mut self, grain: u64, run: Run) {
        self.grains += run.grains;
        self.map.insert(grain, run);
    }

    pub(super) fn remove(&mut self, grain: u64) -> Option<Run> {
        let run = self.map.remove(&grain)?;
        self.grains -= run.grains;
        Some(run)
    }

    /// The run that holds `grain`, or the next one after it: (first grain, run).
    #[inline]
    pub(super) fn at_or_after(&self, grain: u64) -> Option<(u64, Run)> {
        if self.map.is_empty() {
            return None;
        }
        if let Some((first, run)) = self.map.range(..=grain).next_back()
            && first + run.grains > grain
        {
            return Some((*first, *run));
        }
        self.map.range(grain..).next().map(|(first, run)| (*first, *run))
    }

    /// Takes everything out.
    pub(super) fn take(&mut self) -> BTreeMap<u64, Run> {
        self.grains = 0;
        std::mem::take(&mut self.map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_join_and_are_found() {
        let mut runs = Runs::default();
        runs.insert(10, Run { grains: 4, sector: 100 }, 1);
        runs.insert(14, Run { grains: 2, sector: 104 }, 1);
        runs.insert(16, Run { grains: 1, sector: 200 }, 1);
        assert_eq!((runs.len(), runs.grains()), (2, 7));
        assert_eq!(runs.at_or_after(15), Some((10, Run { grains: 6, sector: 100 })));
        assert_eq!(runs.at_or_after(0).unwrap().0, 10);
        assert_eq!(runs.at_or_after(16).unwrap().1.sector, 200);
        assert_eq!(runs.at_or_after(17), None);
    }
}
