//! The corpora of the fuzz targets, on the stable toolchain.

const CORPORA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz");

#[test]
fn fuzz_corpora_replay() {
    block::fuzz::replay(CORPORA, "scsi_cdb", 14, scsi::fuzz::fuzz_cdb);
    block::fuzz::replay(CORPORA, "scsi_kept", 4, scsi::fuzz::fuzz_kept);
}
