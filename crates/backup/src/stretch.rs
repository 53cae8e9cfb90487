//! Going over a backed-up disk in order, in portions that several threads can load beside each other.

use lane::Buffer;

use crate::Error;
use crate::chunk::ChunkId;
use crate::content::fill_area;
use crate::format::AREA_BYTES;
use crate::manifest::{DiskRecord, Manifest};
use crate::reader::Reader;
use crate::tree::{Entry, walk};

/// Areas with data in one portion.
const PORTION_AREAS: usize = 16;
/// Bytes of the largest portion.
pub(crate) const PORTION_BYTES: usize = PORTION_AREAS * AREA_BYTES as usize;
/// Portions planned at a time: bounds what a plan holds in memory.
const PORTIONS: usize = 256;

/// A part of a disk to be done in one go.
pub(crate) enum Portion {
    /// Reads as zero: first byte, length.
    Zero(u64, u64),
    /// Adjacent areas with data: the first area, and their entries.
    Data(u64, Vec<Entry>),
}

/// Which disk of which backup: what errors name.
#[derive(Clone)]
pub(crate) struct Place {
    pub manifest_id: crate::BackupId,
    pub disk: String,
    pub root: Option<ChunkId>,
    pub length_bytes: u64,
}

impl Place {
    pub fn of(manifest: &Manifest, disk: &DiskRecord) -> Self {
        Self {
            manifest_id: manifest.id,
            disk: disk.name.clone(),
            root: disk.root,
            length_bytes: disk.length_bytes,
        }
    }

    pub fn areas(&self) -> u64 {
        self.length_bytes.div_ceil(AREA_BYTES)
    }

    /// Length of area `area` in bytes: the last may be cut off.
    pub fn area_bytes(&self, area: u64) -> usize {
        (self.length_bytes - area * AREA_BYTES).min(AREA_BYTES) as usize
    }

    /// Names the place of a damage.
    pub fn damaged(&self, area: u64, source: Error) -> Error {
        if !source.is_damage() || matches!(source, Error::Damaged { .. }) {
            return source;
        }
        let (backup, disk, at_bytes) = (self.manifest_id, self.disk.clone(), area * AREA_BYTES);
        Error::Damaged { backup, disk, at_bytes, source: std::sync::Arc::new(source) }
    }

    /// Plans what comes from area `from` on: portions, and the area after them.
    pub fn plan(&self, reader: &Reader, from: u64) -> Result<(Vec<Portion>, u64), Error> {
        let mut list: Vec<Portion> = Vec::new();
        let mut next = from;
        walk(reader, self.root, from, self.areas(), &mut |at, count, entry| {
            let entry = entry.map_err(|e| self.damaged(at, e))?;
            match (list.last_mut(), entry) {
                (Some(Portion::Zero(_, length)), Entry::Zero) => *length += count * AREA_BYTES,
                (_, Entry::Zero) => list.push(Portion::Zero(at * AREA_BYTES, count * AREA_BYTES)),
                (Some(Portion::Data(_, entries)), entry) if entries.len() < PORTION_AREAS => {
                    entries.push(entry.clone());
                }
                (_, entry) => {
                    if list.len() >= PORTIONS {
                        return Ok(false);
                    }
                    list.push(Portion::Data(at, vec![entry.clone()]));
                }
            }
            next = at + count;
            Ok(true)
        })?;
        if let Some(Portion::Zero(at, length)) = list.last_mut() {
            *length = (*length).min(self.length_bytes - *at);
        }
        Ok((list, next))
    }

    /// Loads a portion of data; the buffer is as long as the portion.
    pub fn load(&self, reader: &Reader, first: u64, entries: &[Entry]) -> Result<Buffer, Error> {
        let last = first + entries.len() as u64 - 1;
        let mut buffer = Buffer::zeroed((entries.len() - 1) * AREA_BYTES as usize + self.area_bytes(last));
        for (n, (entry, out)) in entries.iter().zip(buffer.chunks_mut(AREA_BYTES as usize)).enumerate() {
            fill_area(reader, entry, out).map_err(|e| self.damaged(first + n as u64, e))?;
        }
        Ok(buffer)
    }
}
