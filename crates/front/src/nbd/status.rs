//! Metadata contexts: their names, and the answer to BLOCK_STATUS.

use block::{Disk, DiskError, Extents, Generation, Kind, SECTOR_BYTES};
use zerocopy::IntoBytes;
use zerocopy::big_endian::{U32, U64};

use super::edges::around;
use super::export::Export;
use super::format::{ChunkHeader, Descriptor, STATE_CHANGED, STATE_HOLE, STATE_ZERO, chunk};

/// Name of the context that the protocol defines.
const ALLOCATION: &str = "base:allocation";
/// Beginning of the names of ours: followed by the name of a snapshot. Bit 0: written or zeroed since.
const CHANGED: &str = "kagami:changed:";
/// Extents in one answer, per context.
const EXTENTS_MAX: usize = 2048;
/// Contexts that one client may select.
pub(crate) const CONTEXTS_MAX: usize = 64;

/// What a context tells.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Meaning {
    Allocation,
    Changed(Generation),
}

/// A context that a client has selected.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Selected {
    /// Number by which answers name it.
    pub id: u32,
    /// Its name.
    pub name: String,
    meaning: Meaning,
}

/// Every context of an export, in order.
fn all(export: &Export) -> impl Iterator<Item = (String, Meaning)> {
    let changed = export
        .changed()
        .into_iter()
        .map(|(snapshot, generation)| (format!("{CHANGED}{snapshot}"), Meaning::Changed(generation)));
    std::iter::once((ALLOCATION.to_string(), Meaning::Allocation)).chain(changed)
}

/// Names that a LIST query selects: everything for no query at all; a namespace (`base:`, `kagami:`) or
/// `kagami:changed:` lists what begins so; anything else must be the whole name.
pub(crate) fn list(export: &Export, queries: &[&str]) -> Vec<String> {
    let selects = |query: &str, name: &str| match query {
        "base:" | "kagami:" | CHANGED => name.starts_with(query),
        _ => name == query,
    };
    all(export)
        .map(|(name, _)| name)
        .filter(|name| queries.is_empty() || queries.iter().any(|query| selects(query, name)))
        .collect()
}

/// Contexts that a SET selects: whole names only, at most [`CONTEXTS_MAX`].
pub(crate) fn select(export: &Export, queries: &[&str]) -> Vec<Selected> {
    all(export)
        .filter(|(name, _)| queries.contains(&name.as_str()))
        .take(CONTEXTS_MAX)
        .zip(1..)
        .map(|((name, meaning), id)| Selected { id, name, meaning })
        .collect()
}

/// The flags of extents as one context tells them, merged, clipped to `length` bytes at `offset`.
async fn describe(
    disk: &dyn Disk,
    meaning: Meaning,
    offset: u64,
    length: u32,
    extents_max: usize,
) -> Result<Vec<Descriptor>, DiskError> {
    let (first, count) = around(offset, u64::from(length));
    let since = match meaning {
        Meaning::Allocation => None,
        Meaning::Changed(generation) => Some(generation),
    };
    let mut extents = Extents::with_limit(extents_max);
    match disk.status(first, count, since, &mut extents).await {
        // R45: an unknown generation means "read everything", never "unchanged".
        Err(DiskError::UnknownGeneration) if since.is_some() => {
            tracing::warn!(
                "a client asked for changes since a generation that is gone: everything is reported"
            );
            return Ok(vec![Descriptor { bytes: length.into(), flags: STATE_CHANGED.into() }]);
        }
        other => other?,
    }
    let end = offset + u64::from(length);
    let mut list: Vec<(u64, u32)> = Vec::with_capacity(extents.len());
    for extent in extents.iter() {
        let from = extent.at.bytes().max(offset);
        let to = (extent.at.bytes() + extent.count * SECTOR_BYTES).min(end);
        let flags = match (meaning, extent.kind) {
            (Meaning::Allocation, Kind::Data) => 0,
            (Meaning::Allocation, Kind::Zero) => STATE_ZERO,
            (Meaning::Allocation, Kind::Hole) => STATE_HOLE | STATE_ZERO,
            (Meaning::Changed(_), _) => u32::from(extent.changed) * STATE_CHANGED,
        };
        let Some(bytes) = to.checked_sub(from).filter(|bytes| *bytes > 0) else { continue };
        match list.last_mut() {
            Some(last) if last.1 == flags => last.0 += bytes,
            _ => list.push((bytes, flags)),
        }
    }
    if list.is_empty() {
        // The protocol wants one descriptor at least; "allocated" and "changed" are the answers that are never wrong.
        list.push((u64::from(length), u32::from(since.is_some()) * STATE_CHANGED));
    }
    let descriptor = |(bytes, flags): (u64, u32)| Descriptor {
        // Clipped to `length`, so it fits.
        bytes: U32::new(u32::try_from(bytes).unwrap_or(length)),
        flags: flags.into(),
    };
    Ok(list.into_iter().map(descriptor).collect())
}

/// Bytes that an answer about so many contexts may take, at most.
pub(crate) fn footprint(contexts: usize, only_one: bool) -> usize {
    let extents_max = if only_one { 1 } else { EXTENTS_MAX };
    contexts * (size_of::<ChunkHeader>() + 4 + extents_max * size_of::<Descriptor>())
}

/// The whole answer to BLOCK_STATUS: one chunk per context. `length` is not 0 and the range is on the disk.
pub(crate) async fn answer(
    disk: &dyn Disk,
    contexts: &[Selected],
    cookie: U64,
    offset: u64,
    length: u32,
    only_one: bool,
) -> Result<Vec<u8>, DiskError> {
    let extents_max = if only_one { 1 } else { EXTENTS_MAX };
    let mut out = Vec::new();
    for (place, context) in contexts.iter().enumerate() {
        let list = describe(disk, context.meaning, offset, length, extents_max).await?;
        let flags = if place + 1 == contexts.len() { chunk::DONE } else { 0 };
        let payload = 4 + size_of_val(list.as_slice()) as u32;
        out.extend(ChunkHeader::new(chunk::BLOCK_STATUS, flags, cookie, payload).as_bytes());
        out.extend(context.id.to_be_bytes());
        out.extend(list.as_bytes());
    }
    Ok(out)
}
