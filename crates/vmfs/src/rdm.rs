//! Raw device mappings: an FD of type 6 with the SCSI identity of a LUN, and behind it our own identity tail.
//!
//! FD+0x400 holds the 78-byte record that every reader knows. ESX leaves the bytes behind it zero; from FD+0x480 on
//! we keep `"kagamiID"`, a length (u16), that many bytes of the caller's, and a CRC is the caller's business.

use crate::Error;
use crate::descriptor::Node;
use crate::directory::Rdm;
use crate::format::{RdmRecord, view};
use zerocopy::IntoBytes;

/// Bytes of the caller's identity tail at most.
pub const RDM_TAIL_BYTES: usize = 1024 - TAIL_AT - MARK.len() - 2;
const TAIL_AT: usize = 0x80;
const MARK: &[u8; 8] = b"kagamiID";

/// The mapping of a node of type 6.
pub(crate) fn load(node: &Node) -> Result<Rdm, Error> {
    let state = node.state.borrow();
    let record = *view::<RdmRecord>(&state.fd.tail).ok_or(Error::Resident)?;
    record.check(node.at.get() + 0x400)?;
    let tail = own_tail(&state.fd.tail).to_vec();
    Ok(Rdm { record, length: state.fd.length(), tail })
}

fn own_tail(bytes: &[u8]) -> &[u8] {
    let marked = bytes.get(TAIL_AT..).and_then(|b| b.strip_prefix(MARK));
    let Some((length, rest)) = marked.and_then(|b| b.split_first_chunk::<2>()) else { return &[] };
    rest.get(..u16::from_le_bytes(*length).into()).unwrap_or(&[])
}

/// The bytes behind the metadata of a new mapping.
pub(crate) fn tail_bytes(rdm: &Rdm) -> Result<Vec<u8>, Error> {
    let (bytes, limit) = (rdm.tail.len(), RDM_TAIL_BYTES);
    if bytes > limit {
        return Err(Error::TooLarge {
            what: "identity of a mapping",
            bytes: bytes as u64,
            limit: limit as u64,
        });
    }
    rdm.record.check(0)?;
    let mut out = vec![0; 1024];
    out[..size_of::<RdmRecord>()].copy_from_slice(rdm.record.as_bytes());
    if bytes > 0 {
        let own = &mut out[TAIL_AT..];
        own[..8].copy_from_slice(MARK);
        own[8..10].copy_from_slice(&(bytes as u16).to_le_bytes());
        own[10..10 + bytes].copy_from_slice(&rdm.tail);
    }
    Ok(out)
}
