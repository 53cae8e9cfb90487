#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| backup::fuzz_manifest(input));
