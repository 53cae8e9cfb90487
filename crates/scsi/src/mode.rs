//! Mode parameters (SPC-4 clause 7.5, SBC-3 clause 6.5): pages 01h, 08h, 0Ah, 1Ch.

use crate::bytes::{be16, be24, be32, be64, put16, put32, put64};
use crate::opcode::Cdb;
use crate::pr::SavedModes;
use crate::sense::{Sense, asc};

/// What can be changed by MODE SELECT.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Modes {
    /// Caching page, WCE: a write may be answered before it is durable.
    pub write_cache: bool,
    /// Control page, D_SENSE: sense data in descriptor format.
    pub descriptor_sense: bool,
    /// Control page, SWP: writes are refused.
    pub write_protect: bool,
    /// Control page, TAS: tell TASK ABORTED.
    pub task_aborted: bool,
}

/// Bits of [`SavedModes`]; zero is what a new logical unit has.
const NO_WRITE_CACHE: u8 = 1;
const D_SENSE: u8 = 2;
const SWP: u8 = 4;
const TAS: u8 = 8;

impl From<SavedModes> for Modes {
    fn from(saved: SavedModes) -> Self {
        Self {
            write_cache: saved.0 & NO_WRITE_CACHE == 0,
            descriptor_sense: saved.0 & D_SENSE != 0,
            write_protect: saved.0 & SWP != 0,
            task_aborted: saved.0 & TAS != 0,
        }
    }
}

impl From<Modes> for SavedModes {
    fn from(modes: Modes) -> Self {
        let bit = |on, bit| if on { bit } else { 0 };
        Self(
            bit(!modes.write_cache, NO_WRITE_CACHE)
                | bit(modes.descriptor_sense, D_SENSE)
                | bit(modes.write_protect, SWP)
                | bit(modes.task_aborted, TAS),
        )
    }
}

/// Everything that is shown besides the modes themselves.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Facts {
    pub blocks: u64,
    pub read_only: bool,
    pub default: Modes,
    pub saved: Modes,
}

const PAGES: [u8; 4] = [0x01, 0x08, 0x0a, 0x1c];

/// A page with its values; `changeable` gives the mask of what MODE SELECT may change instead.
fn page(code: u8, modes: Modes, changeable: bool) -> Vec<u8> {
    let bit = |on: bool, bit: u8| if on || changeable { bit } else { 0 };
    let fixed = |value: u8| if changeable { 0 } else { value };
    let mut out = vec![0; if code == 0x08 { 20 } else { 12 }];
    // PS: every page can be saved.
    out[0] = 0x80 | code;
    out[1] = out.len() as u8 - 2;
    match code {
        // AWRE and ARRE: what goes bad is put elsewhere below us.
        0x01 => out[2] = fixed(0xc0),
        0x08 => out[2] = bit(modes.write_cache, 0x04),
        0x0a => {
            out[2] = bit(modes.descriptor_sense, 0x04);
            // Queue algorithm modifier: unrestricted reordering.
            out[3] = fixed(0x10);
            out[4] = bit(modes.write_protect, 0x08);
            out[5] = bit(modes.task_aborted, 0x40);
        }
        // DEXCPT: no informational exceptions are made.
        _ => out[2] = fixed(0x08),
    }
    out
}

/// MODE SENSE (SPC-4 6.11, 6.12).
pub(crate) fn sense(cdb: &Cdb, modes: Modes, facts: Facts) -> Result<Vec<u8>, Sense> {
    let (wanted, sub) = (cdb.byte(2) & 0x3f, cdb.byte(3));
    let (values, changeable) = match cdb.byte(2) >> 6 {
        0 => (modes, false),
        1 => (modes, true),
        2 => (facts.default, false),
        _ => (facts.saved, false),
    };
    // Subpages: none exist, but "all of them" may be asked for.
    if sub != 0 && sub != 0xff {
        return Err(Sense::cdb(3, None));
    }
    let pages: Vec<u8> = match wanted {
        0x3f => PAGES.iter().flat_map(|p| page(*p, values, changeable)).collect(),
        one if PAGES.contains(&one) => page(one, values, changeable),
        _ => return Err(Sense::cdb(2, Some(5))),
    };
    let long = cdb.length() == 10;
    let descriptor = if cdb.byte(1) & 0x08 != 0 { Vec::new() } else { block_descriptor(cdb, facts.blocks) };
    // WP, and DPOFUA: the bits are looked at in CDBs.
    let device = if facts.read_only || modes.write_protect { 0x80 } else { 0 } | 0x10;
    let mut out = vec![0; if long { 8 } else { 4 }];
    if long {
        (out[3], out[4]) = (device, u8::from(descriptor.len() == 16));
        put16(&mut out, 6, descriptor.len() as u16);
    } else {
        (out[2], out[3]) = (device, descriptor.len() as u8);
    }
    out.extend(descriptor);
    out.extend(pages);
    if long {
        let length = out.len() as u16 - 2;
        put16(&mut out, 0, length);
    } else {
        out[0] = out.len() as u8 - 1;
    }
    Ok(out)
}

/// SBC-3 6.5.2: the short one, or with LLBAA the long one.
fn block_descriptor(cdb: &Cdb, blocks: u64) -> Vec<u8> {
    if cdb.length() == 10 && cdb.byte(1) & 0x10 != 0 {
        let mut out = vec![0; 16];
        put64(&mut out, 0, blocks);
        put32(&mut out, 12, 512);
        return out;
    }
    let mut out = vec![0; 8];
    put32(&mut out, 0, u32::try_from(blocks).unwrap_or(u32::MAX));
    put32(&mut out, 4, 512);
    out
}

/// MODE SELECT (SPC-4 6.9, 6.10): what the modes become. `list` is the parameter list as far as it came.
pub(crate) fn select(cdb: &Cdb, list: &[u8], modes: Modes, blocks: u64) -> Result<Modes, Sense> {
    let long = cdb.length() == 10;
    let said = if long { usize::from(cdb.be16(7)) } else { usize::from(cdb.byte(4)) };
    if said == 0 {
        return Ok(modes);
    }
    let wrong_length = Sense::illegal(asc::PARAMETER_LIST_LENGTH_ERROR);
    let header = if long { 8 } else { 4 };
    let list = list.get(..said).filter(|l| l.len() >= header).ok_or(wrong_length)?;
    let descriptors = if long { usize::from(be16(list, 6)) } else { usize::from(list[3]) };
    let after = list[header..].get(..descriptors).ok_or(wrong_length)?;
    check_descriptor(after, header, long && list[4] & 1 != 0, blocks)?;
    let mut at = header + descriptors;
    let mut modes = modes;
    while at < list.len() {
        let rest = &list[at..];
        if rest.len() < 2 {
            return Err(wrong_length);
        }
        let code = rest[0] & 0x7f;
        if !PAGES.contains(&code) {
            return Err(Sense::parameter(at as u16, Some(5)));
        }
        let length = usize::from(rest[1]) + 2;
        let (now, mask) = (page(code, modes, false), page(code, modes, true));
        if length != now.len() {
            return Err(Sense::parameter(at as u16 + 1, None));
        }
        let new = rest.get(..length).ok_or(wrong_length)?;
        for byte in 2..length {
            let wrong = (new[byte] ^ now[byte]) & !mask[byte];
            if wrong != 0 {
                let bit = 7 - wrong.leading_zeros() as u8;
                return Err(Sense::parameter((at + byte) as u16, Some(bit)));
            }
        }
        match code {
            0x08 => modes.write_cache = new[2] & 0x04 != 0,
            0x0a => {
                modes.descriptor_sense = new[2] & 0x04 != 0;
                modes.write_protect = new[4] & 0x08 != 0;
                modes.task_aborted = new[5] & 0x40 != 0;
            }
            _ => {}
        }
        at += length;
    }
    Ok(modes)
}

/// The size cannot be changed: a descriptor says what is, or nothing (zero, all ones).
fn check_descriptor(bytes: &[u8], at: usize, long: bool, blocks: u64) -> Result<(), Sense> {
    let (count, most, size) = match (bytes.len(), long) {
        (0, _) => return Ok(()),
        (8, false) => (u64::from(be32(bytes, 0)), u64::from(u32::MAX), be24(bytes, 5)),
        (16, true) => (be64(bytes, 0), u64::MAX, be32(bytes, 12)),
        _ => return Err(Sense::parameter(if at == 4 { 3 } else { 6 }, None)),
    };
    if count != 0 && count != most && count != blocks {
        return Err(Sense::parameter(at as u16, None));
    }
    if size != 512 {
        return Err(Sense::parameter((at + bytes.len() - 4) as u16, None));
    }
    Ok(())
}
