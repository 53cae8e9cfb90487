//! For fuzz targets: inputs that change a good disk here and there, where a whole disk would be too large an input; and
//! the replay of corpora on the stable toolchain.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Edits of one input at most.
const EDITS_MAX: usize = 64;
/// Place, offset, length.
const HEAD_BYTES: usize = 5;

/// One change of a disk. What a place is, the target says: the n-th piece of metadata, counted round and round.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Edit<'a> {
    /// Which piece.
    pub place: u16,
    /// Byte in the piece.
    pub offset: u16,
    /// What is put there.
    pub bytes: &'a [u8],
}

impl Edit<'_> {
    /// Writes the bytes into the piece, as far as they lie in it.
    pub fn apply(&self, piece: &mut [u8]) {
        let at = usize::from(self.offset) % piece.len().max(1);
        let count = self.bytes.len().min(piece.len() - at);
        piece[at..at + count].copy_from_slice(&self.bytes[..count]);
    }
}

/// The edits of an input: place (u16), offset (u16), length (u8), bytes; little-endian, one behind the other.
pub fn edits(input: &[u8]) -> impl Iterator<Item = Edit<'_>> {
    let mut rest = input;
    std::iter::from_fn(move || {
        let (head, behind) = rest.split_first_chunk::<HEAD_BYTES>()?;
        let [a, b, c, d, length] = *head;
        let (bytes, behind) = behind.split_at_checked(length.into()).unwrap_or((behind, &[]));
        rest = behind;
        Some(Edit { place: u16::from_le_bytes([a, b]), offset: u16::from_le_bytes([c, d]), bytes })
    })
    .take(EDITS_MAX)
}

/// An edit in the form that [`edits`] reads, for seeds.
pub fn encode(edit: &Edit<'_>) -> Vec<u8> {
    let length = edit.bytes.len().min(255);
    let [a, b] = edit.place.to_le_bytes();
    let [c, d] = edit.offset.to_le_bytes();
    [&[a, b, c, d, length as u8], &edit.bytes[..length]].concat()
}

/// Gives every file of a target's corpus to the target. Panics with the file's name when the target does, and when
/// there are fewer than `at_least`. `fuzz` is the folder of that name in the tree.
pub fn replay(fuzz: &str, target: &str, at_least: usize, run: impl Fn(&[u8])) {
    let directory = Path::new(fuzz).join("corpus").join(target);
    let list = std::fs::read_dir(&directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
    let mut files: Vec<_> = list.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.sort();
    for file in &files {
        let bytes = std::fs::read(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let caught = catch_unwind(AssertUnwindSafe(|| run(&bytes)));
        assert!(caught.is_ok(), "{} makes target {target} panic", file.display());
    }
    assert!(
        files.len() >= at_least,
        "{} inputs in {}: the corpus is there",
        files.len(),
        directory.display()
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_are_read_as_written_and_stay_inside() {
        let (one, two) =
            (Edit { place: 700, offset: 3, bytes: b"abc" }, Edit { place: 1, offset: 510, bytes: &[9; 200] });
        let mut input = encode(&one);
        input.extend(encode(&two));
        input.extend([1, 2, 3, 4, 50, 7]); // cut off: what is there counts
        let list: Vec<_> = edits(&input).collect();
        assert_eq!(list[..2], [one, two]);
        assert_eq!(list[2], Edit { place: 0x201, offset: 0x403, bytes: &[7] });
        let mut piece = [0; 512];
        list.iter().for_each(|edit| edit.apply(&mut piece));
        assert_eq!((&piece[..6], &piece[510..]), (&b"\0\0\0\x07bc"[..], &[9, 9][..]));
        assert_eq!(edits(&vec![0; 4096]).count(), EDITS_MAX);
        assert_eq!(edits(&[1, 2, 3]).count(), 0);
    }
}
