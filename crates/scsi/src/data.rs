//! Commands that move data (SBC-3 clause 5). Data go straight between the front end's memory and the disk.

use block::{Buffer, Safe, Sector, Segments, SegmentsMut};

use crate::command::Offered;
use crate::lun::Call;
use crate::opcode::Cdb;
use crate::reply::{Answer, Fail, from_disk};
use crate::sense::{Key, Sense, asc};
use crate::unit::{LogicalUnit, limits};

/// Most bytes that are read to be compared, or written from a repeated pattern, at a time.
const CHUNK_BYTES: u64 = 1 << 20;
const MISCOMPARE: Sense = Sense::new(Key::Miscompare, asc::MISCOMPARE_DURING_VERIFY);

/// The command did not bring the data it is about.
pub(crate) fn too_little_data() -> Fail {
    Sense::illegal(asc::PARAMETER_LIST_LENGTH_ERROR).into()
}

/// First byte in which the two differ, counted from the start of `out`.
fn difference(out: &Segments<'_>, medium: &[u8]) -> Option<u64> {
    let (mut offset, mut found) = (0, None);
    out.each(|piece| {
        let other = &medium[offset..offset + piece.len()];
        if found.is_none() && piece != other {
            found = piece.iter().zip(other).position(|(a, b)| a != b).map(|p| (offset + p) as u64);
        }
        offset += piece.len();
    });
    found
}

impl LogicalUnit {
    /// FUA, or no write cache (SBC-3 4.15).
    fn safety(&self, fua: bool) -> Safe {
        if fua || !self.modes.get().write_cache { Safe::OnReturn } else { Safe::AtNextFlush }
    }

    /// READ. Where less room was offered than the command returns, as much as fits is moved.
    pub(crate) async fn read(&self, call: &Call<'_>, cdb: &Cdb) -> Result<Answer, Fail> {
        let (lba, wanted) = (cdb.lba(), cdb.blocks() * 512);
        let room = (call.into.len() as u64).min(wanted) as usize;
        let whole = room - room % 512;
        let _locked = self.lock_shared(call, cdb, lba, wanted / 512).await?;
        let result = if whole == call.into.len() {
            self.disk.read(Sector(lba), call.into).await
        } else {
            self.disk.read(Sector(lba), &call.into.slice_mut(0, whole)).await
        };
        result.map_err(|e| from_disk(&e, lba, false))?;
        if whole < room {
            // The room ends inside a block.
            let mut last = [0; 512];
            let at = Sector(lba + whole as u64 / 512);
            let read = self.disk.read(at, &SegmentsMut::new(&mut last)).await;
            read.map_err(|e| from_disk(&e, at.0, false))?;
            call.into.copy_from(whole, &last[..room - whole]);
        }
        Ok(Answer::Moved { wanted, moved: room })
    }

    /// Writes what came of the data, in whole blocks; an initiator that offers less than the command takes is told by
    /// the residual.
    async fn write_blocks(&self, call: &Call<'_>, cdb: &Cdb, safe: Safe) -> Result<u64, Fail> {
        let (lba, wanted) = (cdb.lba(), cdb.blocks() * 512);
        let came = (call.from.len() as u64).min(wanted);
        let whole = (came - came % 512) as usize;
        let result = if whole == call.from.len() {
            self.disk.write(Sector(lba), call.from, safe).await
        } else {
            self.disk.write(Sector(lba), &call.from.slice(0, whole), safe).await
        };
        result.map_err(|e| from_disk(&e, lba, true))?;
        Ok(whole as u64)
    }

    /// WRITE.
    pub(crate) async fn write(&self, call: &Call<'_>, cdb: &Cdb) -> Result<Answer, Fail> {
        let _locked = self.lock_shared(call, cdb, cdb.lba(), cdb.blocks()).await?;
        self.write_blocks(call, cdb, self.safety(cdb.fua())).await?;
        Ok(Answer::Good)
    }

    /// The atomic length and boundary of WRITE ATOMIC (SBC-4 5.48).
    pub(crate) fn check_atomic(&self, cdb: &Cdb, blocks: u64) -> Result<(), Fail> {
        // No boundary is supported: MAXIMUM ATOMIC TRANSFER LENGTH WITH BOUNDARY is zero.
        if cdb.be16(10) != 0 {
            return Err(Sense::cdb(10, None).into());
        }
        if blocks > u64::from(self.settings.atomic_blocks) {
            return Err(Sense::cdb(12, None).into());
        }
        Ok(())
    }

    /// WRITE ATOMIC: nobody sees it half done. All or nothing is written, so all the data must have come.
    pub(crate) async fn write_atomic(&self, call: &Call<'_>, cdb: &Cdb) -> Result<Answer, Fail> {
        if call.from.len() as u64 != cdb.blocks() * 512 {
            return Err(too_little_data());
        }
        let _locked = self.lock_alone(call, cdb).await?;
        self.write_blocks(call, cdb, self.safety(cdb.fua())).await?;
        Ok(Answer::Good)
    }

    /// WRITE AND VERIFY: to the medium, and read back; with BYTCHK compared.
    pub(crate) async fn write_and_verify(&self, call: &Call<'_>, cdb: &Cdb) -> Result<Answer, Fail> {
        let _locked = self.lock_shared(call, cdb, cdb.lba(), cdb.blocks()).await?;
        let written = self.write_blocks(call, cdb, Safe::OnReturn).await?;
        let data = (cdb.bytchk() == 1).then_some(call.from);
        self.check_medium(call, cdb.lba(), written, |at, found| {
            data.is_none_or(|d| difference(&d.slice(at as usize, found.len()), found).is_none())
        })
        .await?;
        Ok(Answer::Good)
    }

    /// VERIFY (SBC-3 5.33): readable; the same as the data-out; or every block the same as the one block of it.
    pub(crate) async fn verify(&self, call: &Call<'_>, cdb: &Cdb) -> Result<Answer, Fail> {
        let bytes = cdb.blocks() * 512;
        let needed = call.planned.out;
        if (call.from.len() as u64) < needed {
            return Err(too_little_data());
        }
        let _locked = self.lock_shared(call, cdb, cdb.lba(), cdb.blocks()).await?;
        match cdb.bytchk() {
            0 => self.check_medium(call, cdb.lba(), bytes, |_, _| true).await?,
            1 => {
                let same = |at: u64, found: &[u8]| {
                    difference(&call.from.slice(at as usize, found.len()), found).is_none()
                };
                self.check_medium(call, cdb.lba(), bytes, same).await?;
            }
            _ if bytes == 0 => {}
            _ => {
                let mut block = [0; 512];
                call.from.copy_to(0, &mut block);
                let same = |_, found: &[u8]| found.chunks(512).all(|c| c == block);
                self.check_medium(call, cdb.lba(), bytes, same).await?;
            }
        }
        Ok(Answer::Good)
    }

    /// Reads a range in pieces and shows them to `same`, with their offset in bytes.
    async fn check_medium(
        &self,
        call: &Call<'_>,
        lba: u64,
        bytes: u64,
        same: impl Fn(u64, &[u8]) -> bool,
    ) -> Result<(), Fail> {
        let mut buffer = Buffer::for_overwrite(bytes.min(CHUNK_BYTES) as usize);
        let mut done = 0;
        while done < bytes && !call.task.is_aborted() {
            let count = (bytes - done).min(CHUNK_BYTES) as usize;
            let at = lba + done / 512;
            let read = self.disk.read(Sector(at), &SegmentsMut::new(&mut buffer[..count])).await;
            read.map_err(|e| from_disk(&e, at, false))?;
            if !same(done, &buffer[..count]) {
                return Err(MISCOMPARE.into());
            }
            done += count as u64;
        }
        Ok(())
    }

    /// COMPARE AND WRITE (SBC-3 5.2): the first half of the data-out is compared, the second written.
    pub(crate) async fn compare_and_write(&self, call: &Call<'_>, cdb: &Cdb) -> Result<Answer, Fail> {
        let half = (cdb.blocks() * 512) as usize;
        if call.from.len() != 2 * half {
            return Err(too_little_data());
        }
        if half == 0 {
            return Ok(Answer::Good);
        }
        let at = Sector(cdb.lba());
        let _locked = self.lock_alone(call, cdb).await?;
        // A copy: a guest may still change what lies in its memory, and what is compared and written must be one thing.
        let data = call.from.to_vec();
        let (expected, new) = data.split_at(half);
        let done = self.disk.compare_and_write(at, &Segments::new(expected), &Segments::new(new)).await;
        done.map_err(|e| from_disk(&e, at.0, true))?;
        if self.safety(cdb.fua()) == Safe::OnReturn {
            self.disk.flush().await.map_err(|e| from_disk(&e, at.0, true))?;
        }
        Ok(Answer::Good)
    }

    /// ORWRITE (SBC-3 5.14): reads, ors, writes, as one.
    pub(crate) async fn or_write(&self, call: &Call<'_>, cdb: &Cdb) -> Result<Answer, Fail> {
        let bytes = (cdb.blocks() * 512) as usize;
        if call.from.len() != bytes {
            return Err(too_little_data());
        }
        if bytes == 0 {
            return Ok(Answer::Good);
        }
        let at = Sector(cdb.lba());
        let _locked = self.lock_alone(call, cdb).await?;
        let mut buffer = Buffer::for_overwrite(bytes);
        let read = self.disk.read(at, &SegmentsMut::new(&mut buffer)).await;
        read.map_err(|e| from_disk(&e, at.0, false))?;
        let mut offset = 0;
        // Every byte is read once; a guest that changes it meanwhile changes what is written, and no more.
        call.from.each(|piece| {
            let place = &mut buffer[offset..offset + piece.len()];
            place.iter_mut().zip(piece).for_each(|(old, new)| *old |= new);
            offset += piece.len();
        });
        let safe = self.safety(cdb.fua());
        let written = self.disk.write(at, &Segments::new(&buffer), safe).await;
        written.map_err(|e| from_disk(&e, at.0, true))?;
        Ok(Answer::Good)
    }

    /// SYNCHRONIZE CACHE (SBC-3 5.18). The whole disk is flushed, whatever the range; IMMED waits as well.
    pub(crate) async fn synchronize(&self, cdb: &Cdb) -> Result<Answer, Fail> {
        self.disk.flush().await.map_err(|e| from_disk(&e, cdb.lba(), true))?;
        Ok(Answer::Good)
    }

    /// How many blocks WRITE SAME is about: zero means up to the end (WSNZ is zero).
    fn write_same_blocks(&self, cdb: &Cdb) -> u64 {
        if cdb.blocks() == 0 { self.blocks().saturating_sub(cdb.lba()) } else { cdb.blocks() }
    }

    /// Checks of WRITE SAME (SBC-3 5.43): ANCHOR is refused by the table, as no anchoring exists (ANC_SUP is zero).
    pub(crate) fn measure_write_same(&self, cdb: &Cdb, offered: Offered) -> Result<(), Fail> {
        let no_data = cdb.length() == 16 && cdb.byte(1) & 1 != 0;
        self.in_capacity(cdb, cdb.blocks())?;
        if self.write_same_blocks(cdb) > limits::WRITE_SAME_BLOCKS {
            return Err(Sense::cdb(cdb.blocks_field(), None).into());
        }
        self.must_be_writable()?;
        // One block of data-out, or none with NDOB: anything else cannot be meant.
        if offered.out != if no_data { 0 } else { 512 } {
            return Err(Sense::cdb(1, Some(0)).into());
        }
        Ok(())
    }

    /// WRITE SAME (SBC-3 5.43, 5.44). Zeroes become zeroing, and with UNMAP the space is given back; other content is
    /// written, unmapping would not read back as it.
    pub(crate) async fn write_same(&self, call: &Call<'_>, cdb: &Cdb) -> Result<Answer, Fail> {
        let mut block = [0; 512];
        if call.planned.out != 0 {
            if call.from.len() != 512 {
                return Err(too_little_data());
            }
            call.from.copy_to(0, &mut block);
        }
        let (lba, blocks) = (cdb.lba(), self.write_same_blocks(cdb));
        let _locked = self.lock_shared(call, cdb, lba, blocks).await?;
        if block == [0; 512] {
            let may_free = cdb.byte(1) & 0x08 != 0;
            let zeroed = self.disk.zero(Sector(lba), blocks, may_free).await;
            zeroed.map_err(|e| from_disk(&e, lba, true))?;
        } else {
            self.fill(&block, lba, blocks, || call.task.is_aborted()).await?;
        }
        if !self.modes.get().write_cache {
            self.disk.flush().await.map_err(|e| from_disk(&e, lba, true))?;
        }
        Ok(Answer::Good)
    }

    /// Writes a pattern (a divisor of 512 bytes long, or 512) over a range, unless `stop` says so.
    pub(crate) async fn fill(
        &self,
        block: &[u8; 512],
        lba: u64,
        blocks: u64,
        stop: impl Fn() -> bool,
    ) -> Result<(), Fail> {
        let chunk = blocks.min(CHUNK_BYTES / 512);
        let mut buffer = Buffer::for_overwrite((chunk * 512) as usize);
        buffer.chunks_mut(512).for_each(|place| place.copy_from_slice(block));
        let mut done = 0;
        while done < blocks && !stop() {
            let count = (blocks - done).min(chunk);
            let from = Segments::new(&buffer[..(count * 512) as usize]);
            let written = self.disk.write(Sector(lba + done), &from, Safe::AtNextFlush).await;
            written.map_err(|e| from_disk(&e, lba + done, true))?;
            done += count;
        }
        Ok(())
    }
}
