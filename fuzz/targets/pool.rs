#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| array::fuzz::fuzz_pool(input));
