#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| scsi::fuzz::fuzz_cdb(input));
