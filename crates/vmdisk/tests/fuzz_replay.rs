//! The corpora of the fuzz targets, on the stable toolchain.

const CORPORA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz");

#[test]
fn fuzz_corpora_replay() {
    block::fuzz::replay(CORPORA, "vmdk_descriptor", 8, vmdisk::fuzz::fuzz_descriptor);
    block::fuzz::replay(CORPORA, "cowd", 4, vmdisk::fuzz::fuzz_cowd);
    block::fuzz::replay(CORPORA, "sesparse", 4, vmdisk::fuzz::fuzz_sesparse);
}
