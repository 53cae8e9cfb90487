//! Commands that only say something: capacity, sense, modes, logs, ports, opcodes (SPC-4 clause 6, SBC-3 clause 5).

use crate::bytes::{put16, put32, put64};
use crate::inquiry::{inquiry, supported};
use crate::lun::Call;
use crate::mode::{self, Facts, Modes};
use crate::nexus::Seat;
use crate::opcode::{Cdb, Opcode, TABLE, lines};
use crate::pr::{Kept, SavedModes};
use crate::reply::{Answer, Fail, from_disk};
use crate::sense::{Key, Sense, asc};
use crate::unit::LogicalUnit;

impl LogicalUnit {
    pub(crate) fn inquiry(&self, seat: &Seat, cdb: &Cdb) -> Result<Answer, Fail> {
        let ports = self.ports.borrow();
        let port = ports.iter().find(|p| p.relative == seat.it.port);
        let zero = self.disk.shape().unmap_reads_zero;
        Ok(Answer::Data(inquiry(cdb, &self.identity, &self.settings, seat, port, zero)?))
    }

    /// REQUEST SENSE (SPC-4 6.39): a unit attention that waits, or a sanitize under way, or nothing.
    pub(crate) fn request_sense(&self, seat: &Seat, cdb: &Cdb) -> Result<Answer, Fail> {
        let sense = match (seat.take_attention(), self.sanitizing.sense()) {
            (Some(code), _) => Sense::new(Key::UnitAttention, code),
            (None, Some(sense)) => sense,
            (None, None) => Sense::new(Key::NoSense, asc::NONE),
        };
        Ok(Answer::Data(sense.encode(cdb.byte(1) & 1 != 0)))
    }

    pub(crate) fn read_capacity_10(&self) -> Result<Answer, Fail> {
        let mut out = vec![0; 8];
        let last = self.blocks().saturating_sub(1);
        put32(&mut out, 0, u32::try_from(last).unwrap_or(u32::MAX));
        put32(&mut out, 4, 512);
        Ok(Answer::Data(out))
    }

    /// READ CAPACITY(16) (SBC-3 5.16): 512 logical, 4096 physical; LBPME, LBPRZ.
    pub(crate) fn read_capacity_16(&self) -> Result<Answer, Fail> {
        let mut out = vec![0; 32];
        put64(&mut out, 0, self.blocks().saturating_sub(1));
        put32(&mut out, 8, 512);
        out[13] = 3;
        out[14] = 0x80 | if self.disk.shape().unmap_reads_zero { 0x40 } else { 0 };
        Ok(Answer::Data(out))
    }

    /// READ DEFECT DATA (SBC-3 5.20): no defects are known, in whichever of the formats that list blocks.
    pub(crate) fn read_defect_data(&self, cdb: &Cdb) -> Result<Answer, Fail> {
        let (request, long) = if cdb.length() == 12 { (cdb.byte(1), true) } else { (cdb.byte(2), false) };
        let mut out = vec![0; if long { 8 } else { 4 }];
        out[1] = request & 0x1f;
        Ok(Answer::Data(out))
    }

    /// LOG SENSE (SPC-4 6.7): the list of pages, and informational exceptions (7.3.8), which says that there are none.
    pub(crate) fn log_sense(&self, cdb: &Cdb) -> Result<Answer, Fail> {
        let (page, sub) = (cdb.byte(2) & 0x3f, cdb.byte(3));
        let body = match (page, sub) {
            (0x00, 0x00) => vec![0x00, 0x2f],
            (0x00, 0xff) => vec![0x00, 0x00, 0x00, 0xff, 0x2f, 0x00],
            // Parameter 0, format and linking 011b, ASC, ASCQ, most recent temperature unknown.
            (0x2f, 0x00) => vec![0, 0, 0x03, 4, 0, 0, 0xff, 0],
            (0x00 | 0x2f, _) => return Err(Sense::cdb(3, None).into()),
            _ => return Err(Sense::cdb(2, Some(5)).into()),
        };
        let parameter = cdb.be16(5);
        if parameter != 0 {
            return Err(Sense::cdb(5, None).into());
        }
        let mut out = vec![page | if sub != 0 { 0x40 } else { 0 }, sub, 0, 0];
        put16(&mut out, 2, body.len() as u16);
        out.extend(body);
        Ok(Answer::Data(out))
    }

    /// REPORT TARGET PORT GROUPS (SPC-4 6.36): every group is active/optimized; no port is nearer to the disk.
    pub(crate) fn report_target_port_groups(&self, cdb: &Cdb) -> Result<Answer, Fail> {
        let extended = match cdb.byte(1) >> 5 {
            0 => false,
            1 => true,
            _ => return Err(Sense::cdb(1, Some(7)).into()),
        };
        // Extended header: format 001b, no implicit transition time.
        let mut out = if extended { vec![0, 0, 0, 0, 0x10, 0, 0, 0] } else { vec![0; 4] };
        let ports = self.ports.borrow();
        let mut groups: Vec<u16> = ports.iter().map(|p| p.group).collect();
        groups.sort_unstable();
        groups.dedup();
        for group in groups {
            let members: Vec<u16> = ports.iter().filter(|p| p.group == group).map(|p| p.relative).collect();
            let [high, low] = group.to_be_bytes();
            // Active/optimized is what it is, and all that is supported; set by nobody.
            out.extend([0x00, 0x01, high, low, 0, 0, 0, members.len().min(255) as u8]);
            for relative in members.iter().take(255) {
                out.extend([0, 0]);
                out.extend(relative.to_be_bytes());
            }
        }
        let length = out.len() as u32 - 4;
        put32(&mut out, 0, length);
        Ok(Answer::Data(out))
    }

    /// REPORT SUPPORTED OPERATION CODES (SPC-4 6.35), out of the one table.
    pub(crate) fn report_supported_opcodes(&self, cdb: &Cdb) -> Result<Answer, Fail> {
        let timeouts = cdb.byte(2) & 0x80 != 0;
        let (code, action) = (cdb.byte(3), cdb.be16(4));
        let known = |o: &&Opcode| supported(o.op, &self.settings);
        let option = cdb.byte(2) & 7;
        if option == 0 {
            let mut out = vec![0; 4];
            for line in TABLE.iter().filter(known) {
                let [high, low] = u16::from(line.action.unwrap_or(0)).to_be_bytes();
                let flags = u8::from(timeouts) << 1 | u8::from(line.action.is_some());
                out.extend([line.code, 0, high, low, 0, flags, 0, line.length() as u8]);
                if timeouts {
                    out.extend(NO_TIMEOUTS);
                }
            }
            let length = out.len() as u32 - 4;
            put32(&mut out, 0, length);
            return Ok(Answer::Data(out));
        }
        let mut candidates = lines(code).iter().filter(known).peekable();
        let with_actions = candidates.peek().is_some_and(|o| o.action.is_some());
        let any = candidates.peek().is_some();
        match option {
            1 if with_actions => return Err(Sense::cdb(2, Some(2)).into()),
            2 if any && !with_actions => return Err(Sense::cdb(2, Some(2)).into()),
            1..=3 => {}
            _ => return Err(Sense::cdb(2, Some(2)).into()),
        }
        let found = candidates.find(|o| match o.action {
            Some(own) => u16::from(own) == action,
            None => option != 3 || action == 0,
        });
        let Some(line) = found else { return Ok(Answer::Data(vec![0, 0x01, 0, 0])) };
        // SUPPORT 011b: as a standard has it.
        let mut out = vec![0, u8::from(timeouts) << 7 | 0x03, 0, line.length() as u8];
        out.extend(line.usage());
        if timeouts {
            out.extend(NO_TIMEOUTS);
        }
        Ok(Answer::Data(out))
    }

    /// REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS (SPC-4 6.36).
    pub(crate) fn report_supported_task_management(&self, cdb: &Cdb) -> Result<Answer, Fail> {
        let mut out = vec![0; if cdb.byte(2) & 0x80 != 0 { 16 } else { 4 }];
        // ATS, ATSS, CTSS, LURS, QTS, TRS; QAES, QTSS, ITNRS.
        (out[0], out[1]) = (0xda | 0x04, 0x07);
        out[3] = if out.len() == 16 { 12 } else { 0 };
        Ok(Answer::Data(out))
    }

    fn facts(&self) -> Facts {
        Facts {
            blocks: self.blocks(),
            read_only: self.disk.shape().read_only,
            default: Modes::from(SavedModes::default()),
            saved: self.saved.get(),
        }
    }

    pub(crate) fn mode_sense(&self, cdb: &Cdb) -> Result<Answer, Fail> {
        Ok(Answer::Data(mode::sense(cdb, self.modes.get(), self.facts())?))
    }

    /// MODE SELECT: what was answered before the write cache went off is made durable first; SP keeps the values.
    pub(crate) async fn mode_select(&self, call: &Call<'_>, cdb: &Cdb) -> Result<Answer, Fail> {
        let list = call.from.to_vec();
        let turn = self.keeping.take().await;
        let before = self.modes.get();
        let after = mode::select(cdb, &list, before, self.blocks())?;
        if cdb.byte(1) & 1 != 0 && after != self.saved.get() {
            let kept = Kept { state: self.pr.borrow().clone(), modes: after.into() };
            self.save(&kept).await?;
            self.saved.set(after);
        }
        self.modes.set(after);
        drop(turn);
        if before.write_cache && !after.write_cache {
            self.disk.flush().await.map_err(|e| from_disk(&e, 0, true))?;
        }
        if before != after {
            self.attend(asc::MODE_PARAMETERS_CHANGED, |s| !std::rc::Rc::ptr_eq(s, call.seat));
        }
        Ok(Answer::Good)
    }

    /// START STOP UNIT: there is nothing to spin. Stopping makes durable what was answered (SBC-3 5.25), unless NO_FLUSH;
    /// the medium of a LUN that others use stays accessible. Loading and ejecting is for removable media.
    pub(crate) async fn start_stop(&self, cdb: &Cdb) -> Result<Answer, Fail> {
        let flags = cdb.byte(4);
        if flags & 0x02 != 0 {
            return Err(Sense::cdb(4, Some(1)).into());
        }
        if flags & 0x05 == 0 {
            self.disk.flush().await.map_err(|e| from_disk(&e, 0, true))?;
        }
        Ok(Answer::Good)
    }
}

/// A command timeouts descriptor that tells none (SPC-4 6.35.4).
const NO_TIMEOUTS: [u8; 12] = [0, 0x0a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
