//! Queues of a hostile guest in great number, from a seed: `KAGAMI_SEED=N` replays one, `KAGAMI_SOAK=1` runs many.

use block::fuzz::{Edit, encode};
use front::vhost::fuzz_vhost_ring;

fn seeds() -> std::ops::Range<u64> {
    let one = std::env::var("KAGAMI_SEED").ok().and_then(|seed| seed.parse().ok());
    let count = if std::env::var_os("KAGAMI_SOAK").is_some() { 50_000 } else { 600 };
    match one {
        Some(seed) => seed..seed + 1,
        None => 1..count + 1,
    }
}

/// Numbers that hurt: indices, addresses, lengths and flags near their limits.
fn bytes(dice: &mut fastrand::Rng) -> Vec<u8> {
    match dice.u8(..6) {
        0 => dice.u16(..16).to_le_bytes().to_vec(),
        1 => dice.u16(..).to_le_bytes().to_vec(),
        2 => dice.choice([u32::MAX, 0, 511, 513, 1 << 20, 1 << 31]).unwrap_or(0).to_le_bytes().to_vec(),
        3 => (dice.u64(..1 << 20)).to_le_bytes().to_vec(),
        4 => (u64::MAX - dice.u64(..1 << 12)).to_le_bytes().to_vec(),
        _ => (0..dice.usize(1..40)).map(|_| dice.u8(..)).collect(),
    }
}

#[test]
fn hostile_queues_fuzz() {
    for seed in seeds() {
        let mut dice = fastrand::Rng::with_seed(seed);
        let mut input = vec![dice.u8(..32), if dice.bool() { 7 } else { dice.u8(..) }];
        for _ in 0..dice.u8(..6) {
            let bytes = bytes(&mut dice);
            // Mostly where something is: the first twelve descriptors, the first words of the rings.
            let offset = if dice.u8(..4) > 0 { dice.u16(..256) } else { dice.u16(..4096) };
            input.extend(encode(&Edit { place: dice.u16(..7), offset: offset & !1, bytes: &bytes }));
        }
        let caught = std::panic::catch_unwind(|| fuzz_vhost_ring(&input));
        assert!(caught.is_ok(), "replay with KAGAMI_SEED={seed}");
    }
}

/// Inputs that were once worth a thought: kept, and given to every version.
#[test]
fn fuzz_corpora_replay() {
    let corpora = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz");
    block::fuzz::replay(corpora, "vhost_ring", 22, fuzz_vhost_ring);
}
