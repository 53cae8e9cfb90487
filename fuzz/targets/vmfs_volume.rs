#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmfs::fuzz::fuzz_volume(input));
