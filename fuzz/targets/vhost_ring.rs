#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| front::vhost::fuzz_vhost_ring(input));
