//! [`Disk::status`](block::Disk::status) by BLOCK_STATUS.

use block::{DiskError, Extent, Extents, Generation, Kind, SECTOR_BYTES, Sector};

use super::super::format::{STATE_CHANGED, STATE_HOLE, STATE_ZERO, command};
use super::{Client, DATALESS_BYTES_MAX};

/// Walks along the descriptors of one context.
struct Walk {
    list: std::vec::IntoIter<(u32, u32)>,
    /// Bytes left of the current one, and its flags.
    now: (u64, u32),
}

impl Walk {
    /// `None` when a length is zero or no multiple of a sector: then nothing is believed.
    fn new(list: Vec<(u32, u32)>) -> Option<Self> {
        let good = |length: &u32| *length > 0 && u64::from(*length).is_multiple_of(SECTOR_BYTES);
        list.iter().all(|(length, _)| good(length)).then(|| Self { list: list.into_iter(), now: (0, 0) })
    }

    fn next(&mut self) -> Option<(u64, u32)> {
        if self.now.0 == 0 {
            let (bytes, flags) = self.list.next()?;
            self.now = (bytes.into(), flags);
        }
        Some(self.now)
    }
}

impl Client {
    pub(super) async fn ask_status(
        &self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &mut Extents,
    ) -> Result<(), DiskError> {
        let number = |name: &str| self.agreed.contexts.iter().find(|(_, n)| n == name).map(|(id, _)| *id);
        let changed = match since {
            None => None,
            Some(since) => {
                let name = self.changed.iter().find(|(generation, _)| *generation == since);
                let id = name.and_then(|(_, name)| number(name));
                Some(id.ok_or(DiskError::UnknownGeneration)?)
            }
        };
        let allocation = number("base:allocation");
        let (mut at, mut left) = (at, count);
        while left > 0 && !out.is_full() {
            let bytes = (left * SECTOR_BYTES).min(DATALESS_BYTES_MAX);
            let covered = self.describe(at, bytes, allocation, changed, out).await? / SECTOR_BYTES;
            (at, left) = (at.plus(covered), left - covered.min(left));
        }
        Ok(())
    }

    /// Asks once; answers how many bytes were described (at least a sector).
    async fn describe(
        &self,
        at: Sector,
        bytes: u64,
        allocation: Option<u32>,
        changed: Option<u32>,
        out: &mut Extents,
    ) -> Result<u64, DiskError> {
        let whole = Extent { at, count: bytes / SECTOR_BYTES, kind: Kind::Data, changed: true };
        if allocation.is_none() && changed.is_none() {
            out.push(whole); // the server cannot tell
            return Ok(bytes);
        }
        let mut answer = self.ask(command::BLOCK_STATUS, 0, at.bytes(), bytes as u32, None).await?;
        // A context that was not agreed tells nothing: data, and changed.
        let unknown = |flags: u32| vec![(bytes as u32, flags)];
        let mut list_of = |id: Option<u32>, flags: u32| match id {
            None => Walk::new(unknown(flags)),
            Some(id) => {
                let place = answer.status.iter().position(|(found, _)| *found == id)?;
                Walk::new(answer.status.swap_remove(place).1)
            }
        };
        let walks = (list_of(allocation, 0), list_of(changed, STATE_CHANGED));
        let (Some(mut kinds), Some(mut changes)) = walks else {
            out.push(whole);
            return Ok(bytes);
        };
        let mut done = 0;
        while let (Some(kind), Some(change)) = (kinds.next(), changes.next()) {
            let length = kind.0.min(change.0).min(bytes - done);
            if length == 0 {
                break;
            }
            let extent = Extent {
                at: at.plus(done / SECTOR_BYTES),
                count: length / SECTOR_BYTES,
                kind: match (kind.1 & STATE_ZERO != 0, kind.1 & STATE_HOLE != 0) {
                    (true, true) => Kind::Hole,
                    (true, false) => Kind::Zero,
                    (false, _) => Kind::Data,
                },
                changed: change.1 & STATE_CHANGED != 0,
            };
            if !out.push(extent) {
                return Ok(bytes); // full: the caller stops
            }
            kinds.now.0 -= length;
            changes.now.0 -= length;
            done += length;
        }
        if done == 0 {
            out.push(whole);
            done = bytes;
        }
        Ok(done)
    }
}
