//! UNMAP and GET LBA STATUS (SBC-3 clauses 5.28 and 5.8).

use block::{Extents, Kind, Sector, check_range};

use crate::bytes::{be16, be32, be64, put32, put64};
use crate::lun::Call;
use crate::opcode::Cdb;
use crate::reply::{Answer, Fail, from_disk};
use crate::sense::{Sense, asc};
use crate::unit::{LogicalUnit, limits};

/// Most descriptors of one GET LBA STATUS.
const STATUS_DESCRIPTORS_MAX: usize = 1024;

impl LogicalUnit {
    /// UNMAP: every descriptor is checked before the first is obeyed.
    pub(crate) async fn unmap(&self, call: &Call<'_>, cdb: &Cdb) -> Result<Answer, Fail> {
        let said = usize::from(cdb.be16(7));
        if said == 0 {
            return Ok(Answer::Good);
        }
        let list = call.from.to_vec();
        let ranges = self.unmap_ranges(said, &list)?;
        for (lba, count) in ranges {
            let _locked = self.lock_shared(call, cdb, lba, count).await?;
            self.disk.unmap(Sector(lba), count).await.map_err(|e| from_disk(&e, lba, true))?;
        }
        if !self.modes.get().write_cache {
            self.disk.flush().await.map_err(|e| from_disk(&e, 0, true))?;
        }
        Ok(Answer::Good)
    }

    fn unmap_ranges(&self, said: usize, list: &[u8]) -> Result<Vec<(u64, u64)>, Fail> {
        let wrong_length = Fail::Check(Sense::illegal(asc::PARAMETER_LIST_LENGTH_ERROR));
        let Some(list) = list.get(..said).filter(|l| l.len() >= 8) else { return Err(wrong_length) };
        let bytes = usize::from(be16(list, 2));
        let Some(descriptors) = list[8..].get(..bytes) else { return Err(wrong_length) };
        // A last descriptor that is not whole is ignored (5.28.2).
        let (descriptors, _) = descriptors.as_chunks::<16>();
        if descriptors.len() as u64 > limits::UNMAP_DESCRIPTORS {
            return Err(Sense::parameter(2, None).into());
        }
        let (mut ranges, mut total) = (Vec::with_capacity(descriptors.len()), 0);
        for (index, descriptor) in descriptors.iter().enumerate() {
            let (lba, count) = (be64(descriptor, 0), u64::from(be32(descriptor, 8)));
            if check_range(self.blocks(), Sector(lba), count).is_err() {
                return Err(Sense::illegal(asc::LBA_OUT_OF_RANGE).into());
            }
            total += count;
            if total > limits::UNMAP_BLOCKS {
                return Err(Sense::parameter(8 + 16 * index as u16 + 8, None).into());
            }
            if count > 0 {
                ranges.push((lba, count));
            }
        }
        Ok(ranges)
    }

    /// GET LBA STATUS: mapped, or deallocated; nothing is anchored here.
    pub(crate) async fn lba_status(&self, cdb: &Cdb) -> Result<Answer, Fail> {
        let (capacity, start) = (self.blocks(), cdb.lba());
        if start >= capacity {
            return Err(Sense::illegal(asc::LBA_OUT_OF_RANGE).into());
        }
        let room = usize::try_from(cdb.be32(10)).unwrap_or(usize::MAX).saturating_sub(8) / 16;
        // At least one is described, if only to be cut off.
        let most = room.clamp(1, STATUS_DESCRIPTORS_MAX);
        let mut found: Vec<(u64, u64, bool)> = Vec::new();
        let mut at = start;
        while at < capacity {
            let mut extents = Extents::with_limit((most + 1).min(64));
            let asked = self.disk.status(Sector(at), capacity - at, None, &mut extents).await;
            asked.map_err(|e| from_disk(&e, at, false))?;
            for extent in extents.iter() {
                let mapped = extent.kind == Kind::Data;
                match found.last_mut() {
                    Some(last) if last.2 == mapped => last.1 += extent.count,
                    _ => found.push((extent.at.0, extent.count, mapped)),
                }
            }
            let Some(end) = extents.end().filter(|e| e.0 > at) else { break };
            at = end.0;
            if found.len() > most {
                break;
            }
        }
        let mut out = vec![0; 8];
        'all: for (lba, count, mapped) in found {
            let mut done = 0;
            while done < count {
                if (out.len() - 8) / 16 == most {
                    break 'all;
                }
                let part = (count - done).min(u64::from(u32::MAX));
                let mut descriptor = [0; 16];
                put64(&mut descriptor, 0, lba + done);
                put32(&mut descriptor, 8, part as u32);
                descriptor[12] = u8::from(!mapped);
                out.extend(descriptor);
                done += part;
            }
        }
        let length = out.len() as u32 - 4;
        put32(&mut out, 0, length);
        Ok(Answer::Data(out))
    }
}
