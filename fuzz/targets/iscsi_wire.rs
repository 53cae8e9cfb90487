#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| front::iscsi::fuzz_iscsi_wire(input));
