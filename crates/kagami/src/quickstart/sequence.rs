//! The writes of the quickstart's writer, and what they look like on the disks.
//!
//! Write number `n` (from 1) goes to disk `n % disks`, to one block of a ring at the disk's end, and is acknowledged
//! before `n + 1` begins. An image of all disks at one instant therefore holds every write up to some number and none
//! after it: a prefix. One missing write, or one that is too young, and the disks were not cut at one instant.

use block::BLOCK_BYTES;

/// Blocks in the ring on each disk.
pub const RING_BLOCKS: u64 = 4096;

const MAGIC: &[u8; 16] = b"kagami write no.";
const BLOCK: usize = BLOCK_BYTES as usize;

/// Disk of a write, and its block in the ring there.
pub fn place(number: u64, disks: u64) -> (u64, u64) {
    (number % disks, number / disks % RING_BLOCKS)
}

/// First byte of the ring on a disk of so many bytes.
pub fn ring_at(disk_bytes: u64) -> u64 {
    (disk_bytes / BLOCK_BYTES - RING_BLOCKS) * BLOCK_BYTES
}

/// The block of a write: its number, and bytes that follow from it, so that a torn block shows.
pub fn fill(number: u64, block: &mut [u8]) {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in block.as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = state.to_le_bytes();
    }
    block[..16].copy_from_slice(MAGIC);
    block[16..24].copy_from_slice(&number.to_le_bytes());
}

/// The number of the write that this block is, 0 for a block of zeroes.
fn number_of(block: &[u8]) -> Result<u64, &'static str> {
    if lane::memory::is_zero(block) {
        return Ok(0);
    }
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&block[16..24]);
    let (number, mut whole) = (u64::from_le_bytes(bytes), vec![0; BLOCK]);
    fill(number, &mut whole);
    if block == whole { Ok(number) } else { Err("a torn or foreign block") }
}

/// What the rings of one image say.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Prefix {
    /// The image holds all writes up to this one, and no other.
    pub last: u64,
}

/// Looks whether the rings (one per disk, in order) hold a prefix.
pub fn check_prefix(rings: &[Vec<u8>]) -> Result<Prefix, String> {
    let disks = rings.len() as u64;
    let mut found = Vec::new();
    for (disk, ring) in rings.iter().enumerate() {
        let mut numbers = Vec::new();
        for (index, block) in ring.chunks_exact(BLOCK).enumerate() {
            numbers.push(
                number_of(block).map_err(|what| format!("disk {disk}, block {index} of the ring: {what}"))?,
            );
        }
        found.push(numbers);
    }
    let last = found.iter().flatten().copied().max().unwrap_or(0);
    for (disk, numbers) in found.iter().enumerate() {
        for (index, number) in numbers.iter().enumerate() {
            let expected = newest(disk as u64, index as u64, last, disks);
            if *number != expected {
                return Err(format!(
                    "the newest write is no. {last}, so block {index} of disk {disk} must hold no. {expected}, \
                     but it holds no. {number}: the disks are not of one instant"
                ));
            }
        }
    }
    Ok(Prefix { last })
}

/// The newest write up to `last` that goes to this block of this disk; 0 when there is none.
fn newest(disk: u64, index: u64, last: u64, disks: u64) -> u64 {
    let round = disks * RING_BLOCKS;
    let first = index * disks + disk;
    if first > last {
        return 0;
    }
    first + (last - first) / round * round
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rings(last: u64) -> Vec<Vec<u8>> {
        let mut rings = vec![vec![0; RING_BLOCKS as usize * BLOCK]; 2];
        for number in 1..=last {
            let (disk, index) = place(number, 2);
            let at = index as usize * BLOCK;
            fill(number, &mut rings[disk as usize][at..at + BLOCK]);
        }
        rings
    }

    #[test]
    fn prefixes_are_told_from_anything_else() {
        for last in [0, 1, 2, 7, 8191, 8192, 8193, 20_000] {
            assert_eq!(check_prefix(&rings(last)), Ok(Prefix { last }));
        }
        // One disk is older than the other by one write.
        let (new, old) = (rings(1001), rings(998));
        let error = check_prefix(&[old[0].clone(), new[1].clone()]).unwrap_err();
        assert!(error.contains("not of one instant"), "{error}");
        let error = check_prefix(&[new[0].clone(), old[1].clone()]);
        assert!(error.is_err());
        let mut torn = rings(100);
        torn[1][700] ^= 1;
        assert!(check_prefix(&torn).unwrap_err().contains("torn"));
    }
}
