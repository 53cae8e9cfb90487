//! Hostile bytes in great number, from a seed: `KAGAMI_SEED=N` replays one, `KAGAMI_SOAK=1` runs many.

#![allow(clippy::unwrap_used)] // a test may

mod common;

use common::Raw;
use front::nbd::fuzz_nbd_wire;

struct Dice(fastrand::Rng);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(fastrand::Rng::with_seed(seed))
    }

    fn roll(&mut self) -> u64 {
        self.0.u64(..)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.0.u64(..end)
    }

    fn bytes(&mut self, count: u64) -> Vec<u8> {
        (0..count).map(|_| self.0.u8(..)).collect()
    }
}

fn seeds() -> impl Iterator<Item = u64> {
    let one = std::env::var("KAGAMI_SEED").ok().and_then(|seed| seed.parse().ok());
    let count = if std::env::var_os("KAGAMI_SOAK").is_some() { 50_000 } else { 400 };
    match one {
        Some(seed) => seed..seed + 1,
        None => 1..count + 1,
    }
}

/// Numbers that hurt.
fn number(dice: &mut Dice) -> u64 {
    match dice.below(8) {
        0 => 0,
        1 => u64::MAX,
        2 => u64::MAX - dice.below(1 << 20),
        3 => (64 << 20) - dice.below(3 * 512),
        4 => u64::from(u32::MAX) + dice.below(3),
        5 => dice.below(1 << 30),
        6 => dice.below(64 << 20) & !511,
        _ => dice.below(1 << 16),
    }
}

/// Requests that are nearly right.
fn requests(dice: &mut Dice) -> Vec<u8> {
    let mut out = Vec::new();
    for cookie in 0..dice.below(30) {
        let kind = match dice.below(12) {
            10 => dice.roll() as u16,
            other => other as u16 % 8,
        };
        let flags = if dice.below(3) == 0 { dice.below(40) as u16 } else { 0 };
        let length = match dice.below(4) {
            0 => number(dice) as u32,
            _ => dice.below(20_000) as u32,
        };
        let length = if kind == 1 && length > 100_000 && dice.below(8) > 0 { 777 } else { length };
        let offset = if dice.below(3) == 0 { number(dice) } else { dice.below(1 << 20) };
        out.extend(Raw::header(kind, flags, cookie, offset, length));
        if kind == 1 && length <= 100_000 {
            let count = if dice.below(16) == 0 { dice.below(200) } else { length.into() };
            out.extend(dice.bytes(count));
        }
    }
    out
}

/// Options that are nearly right.
fn options(dice: &mut Dice) -> Vec<u8> {
    let mut out = vec![0, 0, 0, dice.below(4) as u8];
    for _ in 0..dice.below(12) {
        let number = if dice.below(9) == 0 { dice.roll() as u32 } else { dice.below(13) as u32 };
        let data = match dice.below(5) {
            0 => Vec::new(),
            1 => b"\0\0\0\x01d\0\x03\0\x00\0\x01\0\x03".to_vec(),
            2 => b"\0\0\0\x01d\0\0\0\x02\0\0\0\x05base:\0\0\0\x07kagami:".to_vec(),
            3 => {
                let count = dice.below(300);
                dice.bytes(count)
            }
            _ => b"d".to_vec(),
        };
        let length = if dice.below(9) == 0 { dice.below(3000) as u32 } else { data.len() as u32 };
        out.extend([b"IHAVEOPT", &number.to_be_bytes()[..], &length.to_be_bytes(), &data].concat());
    }
    out.extend(requests(dice));
    out
}

/// Answers that are nearly right, for the client.
fn answers(dice: &mut Dice) -> Vec<u8> {
    let mut out = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    let reply = |option: u32, kind: u32, data: &[u8]| {
        let magic = 0x0003_e889_0455_65a9u64.to_be_bytes();
        let length = (data.len() as u32).to_be_bytes();
        [&magic[..], &option.to_be_bytes(), &kind.to_be_bytes(), &length, data].concat()
    };
    out.extend(reply(8, 1, b""));
    out.extend(reply(10, 4, b"\0\0\0\x01base:allocation"));
    out.extend(reply(10, 1, b""));
    out.extend(reply(7, 3, &[&[0, 0][..], &(1u64 << 20).to_be_bytes(), &[0x05, 0x6d]].concat()));
    out.extend(reply(7, 1, b""));
    for _ in 0..dice.below(8) {
        let kind = [0u16, 1, 2, 5, 0x8001, 0x8002, 9][dice.below(7) as usize];
        let length = match dice.below(3) {
            0 => number(dice) as u32,
            1 => 12,
            _ => dice.below(40_000) as u32,
        };
        let (flags, cookie) = (dice.below(2) as u16, dice.below(2));
        out.extend(0x668e_33efu32.to_be_bytes());
        out.extend([flags.to_be_bytes(), kind.to_be_bytes()].concat());
        out.extend([&cookie.to_be_bytes()[..], &length.to_be_bytes()].concat());
        out.extend(dice.below(40_000).to_be_bytes());
        let count = u64::from(length.min(50_000)).saturating_sub(8);
        out.extend(dice.bytes(count));
    }
    out
}

#[test]
fn hostile_wire_fuzz() {
    for seed in seeds() {
        let mut dice = Dice::new(seed);
        let (choice, mut bytes) = match dice.below(4) {
            0 => (dice.below(4) as u8 & 2, options(&mut dice)),
            1 => (4, answers(&mut dice)),
            _ => (dice.below(4) as u8 | 1, requests(&mut dice)),
        };
        // Truncated, and with bits flipped.
        for _ in 0..dice.below(4) {
            if !bytes.is_empty() {
                let at = dice.below(bytes.len() as u64) as usize;
                bytes[at] ^= 1 << dice.below(8);
            }
        }
        if dice.below(4) == 0 {
            bytes.truncate(dice.below(bytes.len() as u64 + 1) as usize);
        }
        bytes.insert(0, choice);
        let caught = std::panic::catch_unwind(|| fuzz_nbd_wire(&bytes));
        assert!(caught.is_ok(), "replay with KAGAMI_SEED={seed}");
    }
}

/// Inputs that were once worth a thought: kept, and given to every version.
#[test]
fn fuzz_corpora_replay() {
    let corpora = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz");
    block::fuzz::replay(corpora, "nbd_wire", 17, fuzz_nbd_wire);
}

#[test]
fn hostile_pure_noise_fuzz() {
    for seed in seeds() {
        let mut dice = Dice::new(seed | 1 << 40);
        let count = dice.below(2000);
        fuzz_nbd_wire(&dice.bytes(count));
    }
}
