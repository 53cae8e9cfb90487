//! The fuzz entries, fed with what a generator of this file makes.

use crate::fuzz::{fuzz_cdb, fuzz_kept};
use crate::opcode::TABLE;

/// Inputs of the default run; KAGAMI_SOAK=1 makes it a hundred times as many.
const INPUTS: u64 = 3000;

fn seeds(count: u64) -> std::ops::Range<u64> {
    let number = |name| std::env::var(name).ok().and_then(|n: String| n.parse().ok());
    match number("KAGAMI_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..count * if number("KAGAMI_SOAK") == Some(1) { 100 } else { 1 },
    }
}

/// Mostly commands of the table with few wrong bits, small addresses and lengths; sometimes anything.
fn commands(rng: &mut fastrand::Rng) -> Vec<u8> {
    let mut input = vec![rng.u8(..)];
    for _ in 0..rng.usize(1..40) {
        let line = &TABLE[rng.usize(..TABLE.len())];
        let mut cdb = vec![0; line.length()];
        for (byte, usage) in cdb.iter_mut().zip(line.usage()).skip(1) {
            // Addresses and lengths that are mostly small, flags of every kind.
            let value = if rng.u8(..4) == 0 { rng.u8(..) } else { rng.u8(..3) * u8::from(rng.u8(..3) == 0) };
            *byte = value & usage;
        }
        cdb[0] = line.code;
        if let Some(action) = line.action {
            cdb[1] = cdb[1] & 0xe0 | action;
        }
        if rng.u8(..6) == 0 {
            let at = rng.usize(..cdb.len());
            cdb[at] = rng.u8(..);
        }
        let length = if rng.u8(..20) == 0 { rng.usize(..17) } else { cdb.len() };
        cdb.resize(length, 0);
        let data = rng.u8(..8);
        input.extend([rng.u8(..) & if rng.u8(..10) == 0 { 0xff } else { 0x7f }, data << 5 | length as u8]);
        input.extend(&cdb);
        let bytes = match data {
            0 => 0,
            1 => 24,
            2 => 512,
            3 => 1024,
            n => usize::from(n) * 13,
        };
        // Keys of few values, so that registrations meet.
        let sparse = rng.bool();
        input.extend((0..bytes).map(|_| if sparse && rng.u8(..8) != 0 { rng.u8(..2) } else { rng.u8(..) }));
    }
    input
}

#[test]
fn any_commands_leave_the_disk_as_the_model_says() {
    for seed in seeds(INPUTS) {
        let input = commands(&mut fastrand::Rng::with_seed(seed));
        let result = std::panic::catch_unwind(|| fuzz_cdb(&input));
        assert!(result.is_ok(), "KAGAMI_SEED={seed}");
    }
}

#[test]
fn any_record_is_refused_or_means_something() {
    for seed in seeds(INPUTS) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let input: Vec<u8> = (0..rng.usize(..200)).map(|_| rng.u8(..)).collect();
        fuzz_kept(&input);
    }
}
