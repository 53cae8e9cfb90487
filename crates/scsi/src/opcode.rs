//! The one table of commands: what exists, which bits of its CDB are looked at, and what a reservation lets through.
//!
//! It decides whether a CDB is accepted, answers REPORT SUPPORTED OPERATION CODES (SPC-4 6.35), and holds the columns of
//! SPC-4 table 66 and SBC-3 table 13 ("commands allowed in the presence of various reservations").

use crate::bytes::{be16, be24, be32, be64};
use crate::sense::{Sense, asc};

/// What a persistent reservation of another nexus lets through (SPC-4 table 66, SBC-3 table 13).
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Allow {
    /// From everybody, always.
    Always,
    /// Under the write exclusive types, and from registrants under the registrants types.
    Reading,
    /// From registrants under the registrants types only.
    Writing,
}

/// What a command does; those of different lengths are one.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
#[allow(missing_docs)] // the names are the standard's
pub(crate) enum Op {
    TestUnitReady,
    RequestSense,
    Inquiry,
    ModeSelect,
    ModeSense,
    Reserve,
    Release,
    StartStopUnit,
    PreventAllow,
    ReadCapacity10,
    ReadCapacity16,
    Read,
    Write,
    WriteAndVerify,
    Verify,
    Prefetch,
    SynchronizeCache,
    ReadDefectData,
    WriteSame,
    Unmap,
    Sanitize,
    LogSense,
    PersistentReserveIn,
    PersistentReserveOut,
    ExtendedCopy,
    ReceiveCopyResults,
    CompareAndWrite,
    OrWrite,
    WriteAtomic,
    GetLbaStatus,
    ReportLuns,
    ReportTargetPortGroups,
    ReportSupportedOpcodes,
    ReportSupportedTaskManagement,
}

/// One line of the table.
pub(crate) struct Opcode {
    pub code: u8,
    pub action: Option<u8>,
    pub op: Op,
    pub allow: Allow,
    /// The bits that are looked at; the service action stands in its field. The control byte is not in here.
    usage: [u8; 16],
}

impl Opcode {
    /// Length of the CDB (SPC-4 table 23).
    pub const fn length(&self) -> usize {
        length_of(self.code)
    }

    /// CDB USAGE DATA (SPC-4 table 247).
    pub fn usage(&self) -> &[u8] {
        &self.usage[..self.length()]
    }
}

const fn length_of(code: u8) -> usize {
    match code >> 5 {
        0 => 6,
        1 | 2 => 10,
        5 => 12,
        _ => 16,
    }
}

/// A line without service action: `bits` are (byte, mask).
const fn line(code: u8, op: Op, allow: Allow, bits: &[(usize, u8)]) -> Opcode {
    let mut usage = [0; 16];
    usage[0] = code;
    let mut index = 0;
    while index < bits.len() {
        usage[bits[index].0] = bits[index].1;
        index += 1;
    }
    Opcode { code, action: None, op, allow, usage }
}

/// A line with a service action in the low five bits of byte 1.
const fn action(code: u8, action: u8, op: Op, allow: Allow, bits: &[(usize, u8)]) -> Opcode {
    let mut made = line(code, op, allow, bits);
    made.usage[1] |= action;
    made.action = Some(action);
    made
}

const F: u8 = 0xff;
const LBA6: &[(usize, u8)] = &[(1, 0x1f), (2, F), (3, F), (4, F)];

/// GROUP NUMBER: any is taken, none is told apart (GROUP_SUP is zero).
const GROUP: u8 = 0x1f;

/// Byte 1, then LBA of 4 bytes and length of 2.
const fn cdb10(code: u8, op: Op, allow: Allow, flags: u8) -> Opcode {
    line(code, op, allow, &[(1, flags), (2, F), (3, F), (4, F), (5, F), (6, GROUP), (7, F), (8, F)])
}

/// Byte 1, then LBA of 4 bytes and length of 4.
const fn cdb12(code: u8, op: Op, allow: Allow, flags: u8) -> Opcode {
    let mut made =
        line(code, op, allow, &[(1, flags), (2, F), (3, F), (4, F), (5, F), (6, F), (7, F), (8, F), (9, F)]);
    made.usage[10] = GROUP;
    made
}

/// Byte 1, then LBA of 8 bytes and length of 4.
const fn cdb16(code: u8, op: Op, allow: Allow, flags: u8) -> Opcode {
    let mut made =
        line(code, op, allow, &[(1, flags), (2, F), (3, F), (4, F), (5, F), (6, F), (7, F), (8, F), (9, F)]);
    let mut at = 10;
    while at < 14 {
        made.usage[at] = F;
        at += 1;
    }
    made.usage[14] = GROUP;
    made
}

/// COMPARE AND WRITE: one byte of length.
const fn compare_and_write() -> Opcode {
    let mut made = cdb16(0x89, Op::CompareAndWrite, Allow::Writing, DPO_FUA);
    (made.usage[10], made.usage[11], made.usage[12]) = (0, 0, 0);
    made
}

const DPO_FUA: u8 = 0x18;
/// DPO and BYTCHK.
const DPO_BYTCHK: u8 = 0x16;
const ALLOCATION_7: &[(usize, u8)] = &[(7, F), (8, F)];
const LENGTH_5: &[(usize, u8)] = &[(2, F), (5, F), (6, F), (7, F), (8, F)];
const COPY_RESULTS: &[(usize, u8)] = &[(2, F), (10, F), (11, F), (12, F), (13, F)];
/// IMMED; neither zoned devices nor leaving the failure mode unrestricted (ZNR, AUSE).
const SANITIZE: &[(usize, u8)] = &[(1, 0x80), (7, F), (8, F)];

use Allow::{Always, Reading, Writing};

/// Every command, in the order of the codes.
pub(crate) static TABLE: &[Opcode] = &[
    line(0x00, Op::TestUnitReady, Always, &[]),
    line(0x03, Op::RequestSense, Always, &[(1, 0x01), (4, F)]),
    line(0x08, Op::Read, Reading, LBA6),
    line(0x0a, Op::Write, Writing, LBA6),
    line(0x12, Op::Inquiry, Always, &[(1, 0x01), (2, F), (3, F), (4, F)]),
    line(0x15, Op::ModeSelect, Writing, &[(1, 0x11), (4, F)]),
    line(0x16, Op::Reserve, Always, &[]),
    line(0x17, Op::Release, Always, &[]),
    line(0x1a, Op::ModeSense, Writing, &[(1, 0x08), (2, F), (3, F), (4, F)]),
    line(0x1b, Op::StartStopUnit, Writing, &[(1, 0x01), (4, 0x07)]),
    line(0x1e, Op::PreventAllow, Writing, &[(4, 0x03)]),
    line(0x25, Op::ReadCapacity10, Always, &[]),
    cdb10(0x28, Op::Read, Reading, DPO_FUA),
    cdb10(0x2a, Op::Write, Writing, DPO_FUA),
    cdb10(0x2e, Op::WriteAndVerify, Writing, DPO_BYTCHK),
    cdb10(0x2f, Op::Verify, Reading, DPO_BYTCHK),
    cdb10(0x34, Op::Prefetch, Reading, 0x02),
    cdb10(0x35, Op::SynchronizeCache, Writing, 0x02),
    line(0x37, Op::ReadDefectData, Reading, &[(2, 0x1f), (7, F), (8, F)]),
    cdb10(0x41, Op::WriteSame, Writing, 0x08),
    line(0x42, Op::Unmap, Writing, &[(6, GROUP), (7, F), (8, F)]),
    action(0x48, 0x01, Op::Sanitize, Writing, SANITIZE),
    action(0x48, 0x02, Op::Sanitize, Writing, SANITIZE),
    action(0x48, 0x03, Op::Sanitize, Writing, SANITIZE),
    action(0x48, 0x1f, Op::Sanitize, Writing, SANITIZE),
    line(0x4d, Op::LogSense, Always, &[(2, F), (3, F), (5, F), (6, F), (7, F), (8, F)]),
    line(0x55, Op::ModeSelect, Writing, &[(1, 0x11), (7, F), (8, F)]),
    line(0x56, Op::Reserve, Always, &[]),
    line(0x57, Op::Release, Always, &[]),
    line(0x5a, Op::ModeSense, Writing, &[(1, 0x18), (2, F), (3, F), (7, F), (8, F)]),
    action(0x5e, 0x00, Op::PersistentReserveIn, Always, ALLOCATION_7),
    action(0x5e, 0x01, Op::PersistentReserveIn, Always, ALLOCATION_7),
    action(0x5e, 0x02, Op::PersistentReserveIn, Always, ALLOCATION_7),
    action(0x5e, 0x03, Op::PersistentReserveIn, Always, ALLOCATION_7),
    action(0x5f, 0x00, Op::PersistentReserveOut, Always, LENGTH_5),
    action(0x5f, 0x01, Op::PersistentReserveOut, Always, LENGTH_5),
    action(0x5f, 0x02, Op::PersistentReserveOut, Always, LENGTH_5),
    action(0x5f, 0x03, Op::PersistentReserveOut, Always, LENGTH_5),
    action(0x5f, 0x04, Op::PersistentReserveOut, Always, LENGTH_5),
    action(0x5f, 0x05, Op::PersistentReserveOut, Always, LENGTH_5),
    action(0x5f, 0x06, Op::PersistentReserveOut, Always, LENGTH_5),
    action(0x5f, 0x07, Op::PersistentReserveOut, Always, LENGTH_5),
    action(0x83, 0x00, Op::ExtendedCopy, Writing, &[(10, F), (11, F), (12, F), (13, F)]),
    action(0x84, 0x00, Op::ReceiveCopyResults, Writing, COPY_RESULTS),
    action(0x84, 0x01, Op::ReceiveCopyResults, Writing, COPY_RESULTS),
    action(0x84, 0x03, Op::ReceiveCopyResults, Writing, COPY_RESULTS),
    action(0x84, 0x04, Op::ReceiveCopyResults, Writing, COPY_RESULTS),
    cdb16(0x88, Op::Read, Reading, DPO_FUA),
    compare_and_write(),
    cdb16(0x8a, Op::Write, Writing, DPO_FUA),
    cdb16(0x8b, Op::OrWrite, Writing, DPO_FUA),
    cdb16(0x8e, Op::WriteAndVerify, Writing, DPO_BYTCHK),
    cdb16(0x8f, Op::Verify, Reading, DPO_BYTCHK),
    cdb16(0x90, Op::Prefetch, Reading, 0x02),
    cdb16(0x91, Op::SynchronizeCache, Writing, 0x02),
    cdb16(0x93, Op::WriteSame, Writing, 0x09),
    cdb16(0x9c, Op::WriteAtomic, Writing, DPO_FUA),
    action(0x9e, 0x10, Op::ReadCapacity16, Always, &[(10, F), (11, F), (12, F), (13, F)]),
    get_lba_status(),
    line(0xa0, Op::ReportLuns, Always, &[(2, F), (6, F), (7, F), (8, F), (9, F)]),
    action(0xa3, 0x0a, Op::ReportTargetPortGroups, Always, &[(1, 0xe0), (6, F), (7, F), (8, F), (9, F)]),
    action(
        0xa3,
        0x0c,
        Op::ReportSupportedOpcodes,
        Writing,
        &[(2, 0x87), (3, F), (4, F), (5, F), (6, F), (7, F), (8, F), (9, F)],
    ),
    action(
        0xa3,
        0x0d,
        Op::ReportSupportedTaskManagement,
        Writing,
        &[(2, 0x80), (6, F), (7, F), (8, F), (9, F)],
    ),
    cdb12(0xa8, Op::Read, Reading, DPO_FUA),
    cdb12(0xaa, Op::Write, Writing, DPO_FUA),
    cdb12(0xae, Op::WriteAndVerify, Writing, DPO_BYTCHK),
    cdb12(0xaf, Op::Verify, Reading, DPO_BYTCHK),
    line(
        0xb7,
        Op::ReadDefectData,
        Reading,
        &[(1, 0x1f), (2, F), (3, F), (4, F), (5, F), (6, F), (7, F), (8, F), (9, F)],
    ),
];

const fn get_lba_status() -> Opcode {
    let mut made = cdb16(0x9e, Op::GetLbaStatus, Reading, 0);
    (made.usage[1], made.usage[14]) = (0x12, 0);
    made.action = Some(0x12);
    made
}

/// Line of the first entry of a code, plus one.
static FIRST: [u8; 256] = {
    let mut first = [0; 256];
    let mut index = TABLE.len();
    while index > 0 {
        index -= 1;
        first[TABLE[index].code as usize] = index as u8 + 1;
    }
    first
};

/// All lines of one operation code.
pub(crate) fn lines(code: u8) -> &'static [Opcode] {
    let first = usize::from(FIRST[usize::from(code)]);
    if first == 0 {
        return &[];
    }
    let rest = &TABLE[first - 1..];
    let count = rest.iter().take_while(|o| o.code == code).count();
    &rest[..count]
}

/// A command descriptor block that has its length and a line in the table.
#[derive(Clone)]
pub struct Cdb {
    bytes: [u8; 16],
    pub(crate) line: &'static Opcode,
}

impl Cdb {
    /// Finds the line and checks every bit that must be zero (SPC-4 4.2.5.1 lets a device server do that). What
    /// follows the CDB's own length is padding of the transport.
    pub(crate) fn parse(raw: &[u8], supported: impl Fn(Op) -> bool) -> Result<Self, Sense> {
        let Some(&code) = raw.first() else { return Err(Sense::illegal(asc::INVALID_OPCODE)) };
        let candidates = lines(code);
        let Some(first) = candidates.first().filter(|o| supported(o.op)) else {
            return Err(Sense::illegal(asc::INVALID_OPCODE));
        };
        let length = first.length();
        let mut bytes = [0; 16];
        let Some(own) = raw.get(..length) else { return Err(Sense::cdb(raw.len() as u16, None)) };
        bytes[..length].copy_from_slice(own);
        let line = match first.action {
            None => first,
            Some(_) => {
                let wanted = bytes[1] & 0x1f;
                let found = candidates.iter().find(|o| o.action == Some(wanted) && supported(o.op));
                found.ok_or(Sense::cdb(1, Some(4)))?
            }
        };
        for (at, (byte, usage)) in bytes[..length - 1].iter().zip(&line.usage).enumerate().skip(1) {
            let looked_at = if at == 1 && line.action.is_some() { usage | 0x1f } else { *usage };
            let wrong = byte & !looked_at;
            if wrong != 0 {
                return Err(Sense::cdb(at as u16, Some(7 - wrong.leading_zeros() as u8)));
            }
        }
        // NACA: no auto contingent allegiance here (NORMACA is zero).
        if bytes[length - 1] & 0x04 != 0 {
            return Err(Sense::cdb(length as u16 - 1, Some(2)));
        }
        Ok(Self { bytes, line })
    }

    /// Byte `at`.
    pub(crate) fn byte(&self, at: usize) -> u8 {
        self.bytes[at]
    }

    /// 16 bits at `at`.
    pub(crate) fn be16(&self, at: usize) -> u16 {
        be16(&self.bytes, at)
    }

    /// 32 bits at `at`.
    pub(crate) fn be32(&self, at: usize) -> u32 {
        be32(&self.bytes, at)
    }

    /// Length in bytes.
    pub(crate) fn length(&self) -> usize {
        self.line.length()
    }

    /// LOGICAL BLOCK ADDRESS of a command that has one.
    pub(crate) fn lba(&self) -> u64 {
        match self.length() {
            6 => u64::from(be24(&self.bytes, 1) & 0x1f_ffff),
            10 | 12 => u64::from(be32(&self.bytes, 2)),
            _ => be64(&self.bytes, 2),
        }
    }

    /// TRANSFER LENGTH (or what it is called there) in blocks. Zero in a 6-byte CDB means 256.
    pub(crate) fn blocks(&self) -> u64 {
        match (self.line.op, self.length()) {
            (Op::CompareAndWrite, _) => u64::from(self.bytes[13]),
            (Op::WriteAtomic, _) => u64::from(self.be16(12)),
            (_, 6) if self.bytes[4] == 0 => 256,
            (_, 6) => u64::from(self.bytes[4]),
            (_, 10) => u64::from(self.be16(7)),
            (_, 12) => u64::from(self.be32(6)),
            _ => u64::from(self.be32(10)),
        }
    }

    /// The byte where the transfer length begins, for sense data.
    pub(crate) fn blocks_field(&self) -> u16 {
        match (self.line.op, self.length()) {
            (Op::CompareAndWrite, _) => 13,
            (Op::WriteAtomic, _) => 12,
            (_, 6) => 4,
            (_, 10) => 7,
            (_, 12) => 6,
            _ => 10,
        }
    }

    /// FUA is set. In a 6-byte CDB there is none.
    pub(crate) fn fua(&self) -> bool {
        self.length() > 6 && self.bytes[1] & 0x08 != 0
    }

    /// BYTCHK of VERIFY and WRITE AND VERIFY.
    pub(crate) fn bytchk(&self) -> u8 {
        self.bytes[1] >> 1 & 3
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_order_and_whole() {
        for pair in TABLE.windows(2) {
            assert!((pair[0].code, pair[0].action) < (pair[1].code, pair[1].action));
            if pair[0].code == pair[1].code {
                assert!(pair[0].action.is_some() && pair[1].action.is_some());
            }
        }
        for line in TABLE {
            assert_eq!(line.usage()[0], line.code);
            assert_eq!(line.usage()[line.length() - 1], 0, "{:02x}: the control byte", line.code);
            assert!(line.usage[line.length()..].iter().all(|b| *b == 0));
        }
        assert!(lines(0x04).is_empty());
        assert_eq!(lines(0x5f).len(), 8);
    }

    #[test]
    fn fields_by_length() {
        let parse = |raw: &[u8]| Cdb::parse(raw, |_| true).unwrap();
        let six = parse(&[0x08, 0x1f, 0xff, 0xfe, 0, 0]);
        assert_eq!((six.lba(), six.blocks()), (0x1f_fffe, 256));
        let ten = parse(&[0x28, 0x08, 1, 2, 3, 4, 0, 5, 6, 0]);
        assert_eq!((ten.lba(), ten.blocks(), ten.fua()), (0x0102_0304, 0x0506, true));
        let twelve = parse(&[0xa8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0]);
        assert_eq!((twelve.lba(), twelve.blocks()), (0x0102_0304, 0x0506_0708));
        let sixteen = parse(&[0x88, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 1, 0, 0, 0]);
        assert_eq!((sixteen.lba(), sixteen.blocks()), (0x0102_0304_0506_0708, 256));
    }

    #[test]
    fn bits_that_must_be_zero_are_pointed_at() {
        let refused = |raw: &[u8]| Cdb::parse(raw, |_| true).err();
        assert_eq!(refused(&[]), Some(Sense::illegal(asc::INVALID_OPCODE)));
        assert_eq!(refused(&[0x04; 16]), Some(Sense::illegal(asc::INVALID_OPCODE)));
        assert_eq!(refused(&[0x28, 0x20, 0, 0, 0, 0, 0, 0, 0, 0]), Some(Sense::cdb(1, Some(5))), "RDPROTECT");
        assert_eq!(refused(&[0x41, 0x10, 0, 0, 0, 0, 0, 0, 0, 0]), Some(Sense::cdb(1, Some(4))), "ANCHOR");
        assert_eq!(
            refused(&[0x5e, 0x1f, 0, 0, 0, 0, 0, 0, 0, 0]),
            Some(Sense::cdb(1, Some(4))),
            "no such action"
        );
        assert_eq!(refused(&[0x00, 0, 0, 0, 0, 0x04]), Some(Sense::cdb(5, Some(2))), "NACA");
        assert_eq!(refused(&[0x28, 0, 0]), Some(Sense::cdb(3, None)), "cut off");
        assert_eq!(
            Cdb::parse(&[0x28; 10], |op| op != Op::Read).err(),
            Some(Sense::illegal(asc::INVALID_OPCODE))
        );
    }
}
