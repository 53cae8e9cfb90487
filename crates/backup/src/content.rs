//! Content of areas: from entries of a tree to bytes.

use crate::Error;
use crate::format::PIECE_BYTES;
use crate::reader::Reader;
use crate::tree::Entry;

/// Fills `out` with the first `out.len()` bytes of an area. What chunks do not reach is zero.
pub(crate) fn fill_area(reader: &Reader, entry: &Entry, out: &mut [u8]) -> Result<(), Error> {
    if let Entry::Whole(id) = entry {
        let content = reader.chunk(id)?;
        copy_reaching(&content, out);
        return Ok(());
    }
    for (first, count, piece) in entry.runs() {
        let from = (usize::from(first) * PIECE_BYTES as usize).min(out.len());
        let to = (usize::from(first + count) * PIECE_BYTES as usize).min(out.len());
        let out = &mut out[from..to];
        match piece {
            None => out.fill(0),
            Some((id, skip)) => {
                let content = reader.chunk(&id)?;
                let skip = (usize::from(skip) * PIECE_BYTES as usize).min(content.len());
                copy_reaching(&content[skip..], out);
            }
        }
    }
    Ok(())
}

/// Copies what there is and makes the rest zero.
fn copy_reaching(content: &[u8], out: &mut [u8]) {
    let count = content.len().min(out.len());
    out[..count].copy_from_slice(&content[..count]);
    out[count..].fill(0);
}
