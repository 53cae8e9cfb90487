//! Compare-and-write on layers that cannot hand it down in one piece: done while nobody else is inside the gate.

use block::{DiskError, Segments};

/// The first byte that differs, as the error of a compare-and-write.
pub(crate) fn compare(expected: &Segments<'_>, found: &[u8]) -> Result<(), DiskError> {
    let (mut at, mut differs) = (0, None);
    expected.each(|piece| {
        let other = &found[at..at + piece.len()];
        if differs.is_none() && piece != other {
            differs = piece.iter().zip(other).position(|(a, b)| a != b).map(|byte| at + byte);
        }
        at += piece.len();
    });
    match differs {
        Some(byte) => Err(DiskError::Miscompare { at_bytes: byte as u64 }),
        None => Ok(()),
    }
}
