//! The corpus of the fuzz target, on the stable toolchain.

const CORPORA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz");

#[test]
fn fuzz_corpora_replay() {
    block::fuzz::replay(CORPORA, "manifest", 4, backup::fuzz_manifest);
}
