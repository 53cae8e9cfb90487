//! The one cut and the life of redo logs on everything they really stand on: two pools, a datastore, VMs with their
//! configuration and job records; power fails at every operation, and again during recovery.
//!
//! A failure names its seed; `KAGAMI_SEED=n` runs that one alone, `KAGAMI_SOAK=1` runs the large counts.

mod configuration;
mod conformance;
mod crash;
mod crash_changes;
mod files;
mod late;
mod refused;
mod story;
mod world;

/// The large counts are wanted.
fn soak() -> bool {
    std::env::var_os("KAGAMI_SOAK").is_some()
}

/// The seeds of a test: `few` by default, `many` for the soak, one when `KAGAMI_SEED` names it.
fn seeds(few: u64, many: u64) -> Vec<u64> {
    if let Some(seed) = std::env::var("KAGAMI_SEED").ok().and_then(|s| s.parse().ok()) {
        return vec![seed];
    }
    (0..if soak() { many } else { few }).collect()
}

/// A file as this format's first version wrote it: it stays in the tree and opens for ever. `made` is what the same steps
/// give today; `KAGAMI_WRITE_GOLDEN` puts that there, for a format that is new.
pub(crate) fn golden(name: &str, made: &[u8]) -> Vec<u8> {
    let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("KAGAMI_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, made).unwrap();
    }
    std::fs::read(&path).unwrap()
}

/// Runs on a simulated lane: its ready queue is drawn from the seed, its time is virtual.
fn simulated<F: Future>(seed: u64, work: F) -> F::Output {
    let driver = lane::DriverKind::Sim { seed };
    lane::block_on_with(lane::Options { driver, ..Default::default() }, work)
}
