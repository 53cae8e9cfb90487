//! The proof of the proof: each planted fault turns a crash test red within the seeds that run by default.

use crate::faults::{Fault, plant};

use super::story::Plot;
use super::{crash, group};

/// Plants a fault and looks for the first violation in some stories.
fn found(fault: Fault, seeds: u64, pools: usize, plot: fn(u64) -> Plot) -> Option<String> {
    lane::block_on(async {
        plant(Some(fault));
        let mut found = None;
        let fates = if plot(0).all { 2 } else { 3 };
        for seed in 0..seeds {
            found = match pools {
                0 => crash::violation(seed, plot(seed), fates, 1).await,
                _ => group::violation(seed, pools, 4, 3).await,
            };
            if found.is_some() {
                break;
            }
        }
        plant(None);
        found
    })
}

fn must_find(fault: Fault, pools: usize) {
    must_find_in(fault, pools, |_| Plot::usual());
}

fn must_find_in(fault: Fault, pools: usize, plot: fn(u64) -> Plot) {
    // No more seeds and fates than the crash tests run by default.
    let violation = found(fault, 4, pools, plot);
    let violation = violation.unwrap_or_else(|| panic!("{fault:?} is planted and no crash test sees it"));
    eprintln!("{fault:?}: {violation}");
}

#[test]
fn crash_tests_see_a_missing_flush_before_the_journal() {
    must_find(Fault::NoFlushBeforeJournal, 0);
}

#[test]
fn crash_tests_see_a_map_record_before_its_data() {
    must_find(Fault::MapBeforeData, 0);
}

#[test]
fn crash_tests_see_a_leg_that_was_not_prepared() {
    must_find(Fault::LegNotPrepared, 2);
}

#[test]
fn crash_tests_see_a_freed_grain_reused_at_once() {
    must_find(Fault::ReuseAtOnce, 0);
}

#[test]
fn crash_tests_see_a_copied_block_overwritten_before_its_mark() {
    must_find_in(Fault::CopiedUnmarked, 0, crash::operator_plot);
}

#[test]
fn crash_tests_see_a_grain_punched_before_it_is_free() {
    must_find_in(Fault::PunchAtOnce, 0, crash::operator_plot);
}
