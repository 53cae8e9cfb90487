#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vmdisk::fuzz::fuzz_sesparse(input));
