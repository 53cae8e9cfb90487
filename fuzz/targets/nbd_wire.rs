#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| front::nbd::fuzz_nbd_wire(input));
