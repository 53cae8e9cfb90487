//! From what a disk says about itself to what has to be read, in whole pieces of 4 KiB.

use block::{Extent, Kind, SECTOR_BYTES};

use crate::format::{AREA_BYTES, PIECE_BYTES};

/// Sectors in a piece.
pub(crate) const PIECE_SECTORS: u64 = PIECE_BYTES / SECTOR_BYTES;
/// Sectors in an area.
pub(crate) const AREA_SECTORS: u64 = AREA_BYTES / SECTOR_BYTES;
/// Pieces in an area, as a number to count places with.
pub(crate) const PIECES: u64 = AREA_BYTES / PIECE_BYTES;

/// What to do with a stretch of pieces.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Todo {
    /// Read it.
    Read,
    /// It is zero now.
    Zero,
    /// As in the base; may be audited.
    Same,
    /// As in the base, and the disk holds nothing there: reading would ask the same map that said so.
    SameZero,
}

impl Todo {
    /// What an extent asks for. In a full copy everything counts as changed.
    pub fn of(extent: &Extent, incremental: bool) -> Self {
        match (extent.kind, extent.changed || !incremental) {
            (Kind::Data, true) => Self::Read,
            (Kind::Zero | Kind::Hole, true) => Self::Zero,
            (Kind::Data, false) => Self::Same,
            (Kind::Zero | Kind::Hole, false) => Self::SameZero,
        }
    }

    fn with(self, other: Self) -> Self {
        match (self, other) {
            (a, b) if a == b => a,
            (Self::Same | Self::SameZero, Self::Same | Self::SameZero) => Self::Same,
            _ => Self::Read,
        }
    }
}

/// Turns stretches of sectors into stretches of whole units (pieces or areas). A unit about which several things were
/// said is to be read.
pub(crate) struct Runs {
    unit_sectors: u64,
    open: Option<(u64, Todo)>,
}

impl Runs {
    /// Units of so many sectors.
    pub fn new(unit_sectors: u64) -> Self {
        Self { unit_sectors, open: None }
    }

    /// Adds `count` sectors from `at` on; calls come in order and without gaps. `emit` gets whole units: first,
    /// end, what to do.
    pub fn push(&mut self, mut at: u64, count: u64, todo: Todo, emit: &mut impl FnMut(u64, u64, Todo)) {
        let end = at + count;
        if let Some((unit, so_far)) = self.open {
            let both = so_far.with(todo);
            let unit_end = (unit + 1) * self.unit_sectors;
            if end < unit_end {
                self.open = Some((unit, both));
                return;
            }
            self.open = None;
            emit(unit, unit + 1, both);
            at = unit_end;
        }
        let (first, whole_end) = (at / self.unit_sectors, end / self.unit_sectors);
        if first < whole_end {
            emit(first, whole_end, todo);
        }
        if !end.is_multiple_of(self.unit_sectors) {
            self.open = Some((whole_end, todo));
        }
    }

    /// Ends the disk: a last unit may be cut off by it.
    pub fn finish(&mut self, emit: &mut impl FnMut(u64, u64, Todo)) {
        if let Some((unit, todo)) = self.open.take() {
            emit(unit, unit + 1, todo);
        }
    }
}

/// Draws areas to be audited: each with the same small chance, without looking at each.
pub(crate) struct Sampler {
    noise: blake3::OutputReader,
    chance: f64,
    next_area: u64,
    left: u64,
}

impl Sampler {
    /// `share` of all areas, at most `limit` of them, drawn from `seed`.
    pub fn new(seed: [u8; 32], share: f64, limit: u64) -> Self {
        let noise = blake3::Hasher::new_keyed(&seed).finalize_xof();
        Self { noise, chance: share.clamp(0.0, 1.0), next_area: 0, left: limit }
    }

    /// The next area of `from..to` to be audited.
    pub fn next(&mut self, from: u64, to: u64) -> Option<u64> {
        if self.left == 0 || self.chance <= 0.0 {
            return None;
        }
        if self.next_area < from {
            // Drawing has no memory: skipping what was not asked for and drawing anew is the same chance.
            self.next_area = from.saturating_add(self.gap());
        }
        let area = self.next_area;
        if area >= to {
            return None;
        }
        self.next_area = area.saturating_add(1).saturating_add(self.gap());
        self.left -= 1;
        Some(area)
    }

    /// How many areas are passed over before one is taken: geometrically distributed.
    fn gap(&mut self) -> u64 {
        if self.chance >= 1.0 {
            return 0;
        }
        let mut bytes = [0; 8];
        self.noise.fill(&mut bytes);
        // 53 random bits: uniform in (0, 1].
        let uniform = ((u64::from_le_bytes(bytes) >> 11) + 1) as f64 / (1u64 << 53) as f64;
        (uniform.ln() / (-self.chance).ln_1p()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_about_which_two_things_are_said_are_read() {
        let mut out = Vec::new();
        let mut runs = Runs::new(PIECE_SECTORS);
        let mut emit = |a, b, t| out.push((a, b, t));
        runs.push(0, 20, Todo::Same, &mut emit);
        runs.push(20, 1, Todo::Zero, &mut emit);
        runs.push(21, 20, Todo::SameZero, &mut emit);
        runs.push(41, 2, Todo::Same, &mut emit);
        runs.finish(&mut emit);
        assert_eq!(out, [(0, 2, Todo::Same), (2, 3, Todo::Read), (3, 5, Todo::SameZero), (5, 6, Todo::Same)]);
    }

    #[test]
    fn samples_are_as_many_as_asked_and_not_more() {
        let mut drawn = 0;
        let mut sampler = Sampler::new([7; 32], 0.001, u64::MAX);
        let mut from = 0;
        while from < 1_000_000 {
            let mut last = None;
            while let Some(area) = sampler.next(from, from + 1000) {
                assert!((from..from + 1000).contains(&area) && last.is_none_or(|l| l < area));
                last = Some(area);
                drawn += 1;
            }
            from += 1000;
        }
        assert!((800..1200).contains(&drawn), "{drawn} of a million at one in a thousand");
        let mut few = Sampler::new([7; 32], 1.0, 3);
        assert_eq!(std::iter::from_fn(|| few.next(5, 100)).collect::<Vec<_>>(), [5, 6, 7]);
    }
}
