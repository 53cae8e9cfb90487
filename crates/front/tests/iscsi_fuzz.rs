//! Hostile initiators in great number, from a seed: `KAGAMI_SEED=N` replays one, `KAGAMI_SOAK=1` runs many.
#![allow(clippy::unwrap_used)] // a test may

use front::iscsi::{fuzz_iscsi_login, fuzz_iscsi_wire};

struct Dice(fastrand::Rng);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0.u64(..end)
    }

    fn one_of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.0.usize(..list.len())]
    }

    fn bytes(&mut self, count: u64) -> Vec<u8> {
        (0..count).map(|_| self.0.u8(..)).collect()
    }

    /// A few bits flipped, perhaps cut off.
    fn spoil(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..self.below(4) {
            if !bytes.is_empty() {
                let at = self.0.usize(..bytes.len());
                bytes[at] ^= 1 << self.below(8);
            }
        }
        if self.below(4) == 0 {
            bytes.truncate(self.0.usize(..=bytes.len()));
        }
    }
}

fn seeds(few: u64) -> impl Iterator<Item = u64> {
    let one = std::env::var("KAGAMI_SEED").ok().and_then(|seed| seed.parse().ok());
    let count = if std::env::var_os("KAGAMI_SOAK").is_some() { 50_000 } else { few };
    match one {
        Some(seed) => seed..seed + 1,
        None => 1..count + 1,
    }
}

fn replayed(seed: u64, run: impl Fn() + std::panic::UnwindSafe) {
    assert!(std::panic::catch_unwind(run).is_ok(), "replay with KAGAMI_SEED={seed}");
}

const KEYS: [&str; 22] = [
    "InitiatorName=iqn.2024-01.kagami:fuzz",
    "InitiatorName=none",
    "TargetName=iqn.2024-01.kagami:open",
    "TargetName=iqn.2024-01.kagami:locked",
    "TargetName=iqn.2024-01.kagami:closed",
    "SessionType=Discovery",
    "SessionType=Normal",
    "AuthMethod=CHAP,None",
    "AuthMethod=None",
    "CHAP_A=5",
    "CHAP_A=6,7",
    "CHAP_N=user",
    "CHAP_R=0x00112233445566778899aabbccddeeff",
    "CHAP_I=1",
    "CHAP_C=0bAAAA",
    "HeaderDigest=CRC32C,None",
    "MaxRecvDataSegmentLength=262144",
    "MaxRecvDataSegmentLength=1",
    "MaxBurstLength=99999999999",
    "InitialR2T=No",
    "ErrorRecoveryLevel=2",
    "X-nonsense=Yes",
];

#[test]
fn hostile_login_fuzz() {
    for seed in seeds(400) {
        let mut dice = Dice(fastrand::Rng::with_seed(seed));
        let mut bytes = Vec::new();
        for _ in 0..1 + dice.below(6) {
            let mut text: Vec<u8> = Vec::new();
            // Mostly an order that gets far.
            if dice.below(4) > 0 {
                let target = dice.one_of(&KEYS[2..6]);
                text.extend(format!("{}\0{target}\0", KEYS[0]).bytes());
            }
            for _ in 0..dice.below(5) {
                text.extend(dice.one_of(&KEYS).bytes());
                text.push(0);
            }
            text.resize(text.len().next_multiple_of(4), 0);
            text.truncate(255 * 4);
            bytes.push(dice.one_of(&[0x00, 0x04, 0x81, 0x83, 0x87, 0x40, 0x44, 0xff]));
            bytes.push((text.len() / 4) as u8);
            bytes.extend(text);
        }
        dice.spoil(&mut bytes);
        bytes.insert(0, 1);
        replayed(seed, || fuzz_iscsi_login(&bytes));
    }
}

/// A header as [`fuzz_iscsi_wire`] takes it: code, flags, right CmdSN, words of data, then bytes 8 to 47.
fn header(dice: &mut Dice) -> Vec<u8> {
    let code = dice
        .one_of(&[0x01, 0x01, 0x01, 0x41, 0x05, 0x05, 0x00, 0x40, 0x42, 0x02, 0x04, 0x06, 0x10, 0x03, 0x3f]);
    let flags = match code & 0x3f {
        0x01 => dice.one_of(&[0x80, 0xc0, 0xa0, 0x20, 0xe0, 0xc1, 0xa2, 0x00]),
        0x02 => 0x80 | dice.below(14) as u8,
        _ => dice.one_of(&[0x80, 0x00, 0x40, 0xc0]),
    };
    let words = dice.one_of(&[0u8, 0, 1, 128, 128, 255]);
    let mut out = vec![code, flags, dice.one_of(&[0, 0, 0, 0, 0, 0, 0, 255]), words];
    let mut rest = [0u8; 40];
    rest[1] = dice.one_of(&[0, 0, 0, 0, 1, 255]); // LUN
    let tag = dice.one_of(&[1u32, 2, 3, u32::MAX]);
    rest[8..12].copy_from_slice(&tag.to_be_bytes());
    let number = dice.one_of(&[0u32, 512, 1024, 4096, 65536, 1 << 20, u32::MAX]);
    let third = if code & 0x3f == 0x05 { dice.one_of(&[u32::MAX, 1, 2]) } else { number };
    rest[12..16].copy_from_slice(&third.to_be_bytes());
    let opcode =
        dice.one_of(&[0x28u8, 0x2a, 0x88, 0x8a, 0x00, 0x12, 0x5f, 0x5e, 0x89, 0x42, 0x83, 0xa0, 0x1a, 0x41]);
    rest[24] = opcode;
    let cdb = dice.bytes(15);
    rest[25..40].copy_from_slice(&cdb);
    if matches!(opcode, 0x28 | 0x2a) && dice.below(4) > 0 {
        rest[25..40].fill(0);
        rest[32] = dice.one_of(&[1, 2, 8, 200]); // blocks
    }
    if code & 0x3f == 0x05 {
        rest[24..40].fill(0);
        rest[31] = dice.below(3) as u8; // DataSN
        let offset = dice.one_of(&[0u32, 512, 1024, u32::MAX]);
        rest[32..36].copy_from_slice(&offset.to_be_bytes());
    }
    out.extend(rest);
    let data = dice.bytes(u64::from(words) * 4);
    out.extend(data);
    out
}

#[test]
fn hostile_full_feature_fuzz() {
    for seed in seeds(400) {
        let mut dice = Dice(fastrand::Rng::with_seed(seed));
        let mut bytes = Vec::new();
        for _ in 0..1 + dice.below(20) {
            bytes.extend(header(&mut dice));
        }
        dice.spoil(&mut bytes);
        bytes.insert(0, dice.one_of(&[1, 1, 1, 3]));
        replayed(seed, || fuzz_iscsi_wire(&bytes));
    }
}

#[test]
fn hostile_noise_fuzz() {
    for seed in seeds(200) {
        let mut dice = Dice(fastrand::Rng::with_seed(seed | 1 << 40));
        let count = dice.below(2000);
        let mut bytes = dice.bytes(count);
        bytes.insert(0, 0);
        replayed(seed, || fuzz_iscsi_login(&bytes));
        bytes[0] = dice.one_of(&[0, 2]);
        replayed(seed, || fuzz_iscsi_wire(&bytes));
    }
}

/// Inputs that were once worth a thought: kept, and given to every version.
#[test]
fn fuzz_corpora_replay() {
    let corpora = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz");
    block::fuzz::replay(corpora, "iscsi_login", 19, fuzz_iscsi_login);
    block::fuzz::replay(corpora, "iscsi_wire", 22, fuzz_iscsi_wire);
}
