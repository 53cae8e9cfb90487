//! INQUIRY and its vital product data pages (SPC-4 clauses 6.6 and 7.8, SBC-3 clause 6.6).

use std::rc::Rc;

use uuid::Uuid;

use crate::bytes::{padded, put16, put32, put64};
use crate::nexus::{Port, Seat};
use crate::opcode::{Cdb, Op};
use crate::sense::Sense;
use crate::unit::{Settings, limits};

/// Who a logical unit says it is. A virtual RDM has one of its own; a physical RDM shows the LUN's (R1, R2).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    /// T10 vendor identification, at most 8 characters.
    pub vendor: String,
    /// Product identification, at most 16 characters.
    pub product: String,
    /// Product revision level, at most 4 characters.
    pub revision: String,
    /// Unit serial number (VPD 80), printable ASCII, at most 64 characters.
    pub serial: String,
    /// Designator of type A (VPD 83).
    pub uuid: Uuid,
    /// Designator of type NAA 6 (VPD 83).
    pub naa: [u8; 16],
}

impl Identity {
    /// The identity of an array's LUN, as everybody sees it who reaches the LUN itself.
    pub fn lun(uuid: Uuid, naa: [u8; 16]) -> Self {
        Self::named("LUN", uuid, naa)
    }

    /// The identity of a disk that only a VM sees: a VMDK, a virtual RDM.
    pub fn virtual_disk(uuid: Uuid, naa: [u8; 16]) -> Self {
        Self::named("Virtual disk", uuid, naa)
    }

    fn named(product: &str, uuid: Uuid, naa: [u8; 16]) -> Self {
        Self {
            vendor: "KAGAMI".into(),
            product: product.into(),
            revision: env!("CARGO_PKG_VERSION").chars().take(4).collect(),
            serial: uuid.simple().to_string(),
            uuid,
            naa,
        }
    }
}

/// INQUIRY. `rotating` media do not exist here.
pub(crate) fn inquiry(
    cdb: &Cdb,
    identity: &Identity,
    settings: &Settings,
    seat: &Seat,
    port: Option<&Rc<Port>>,
    unmap_reads_zero: bool,
) -> Result<Vec<u8>, Sense> {
    let page = cdb.byte(2);
    if cdb.byte(1) & 1 == 0 {
        return if page == 0 { Ok(standard(identity)) } else { Err(Sense::cdb(2, None)) };
    }
    let body = match page {
        0x00 => PAGES.to_vec(),
        0x80 => identity.serial.bytes().take(64).collect(),
        0x83 => designators(identity, seat, port),
        0x86 => extended(),
        0x8f => third_party_copy(),
        0xb0 => block_limits(settings),
        0xb1 => characteristics(settings),
        0xb2 => provisioning(settings, unmap_reads_zero),
        _ => return Err(Sense::cdb(2, None)),
    };
    let mut out = vec![0, page, 0, 0];
    put16(&mut out, 2, body.len() as u16);
    out.extend(body);
    Ok(out)
}

const PAGES: [u8; 8] = [0x00, 0x80, 0x83, 0x86, 0x8f, 0xb0, 0xb1, 0xb2];

/// Standard INQUIRY data (SPC-4 6.6.2).
fn standard(identity: &Identity) -> Vec<u8> {
    let mut out = vec![0; 96];
    // SPC-4; HISUP, response data format 2.
    (out[2], out[3], out[4]) = (0x06, 0x12, 91);
    // TPGS: implicit asymmetric access; 3PC. MULTIP. CMDQUE.
    (out[5], out[6], out[7]) = (0x10 | 0x08, 0x10, 0x02);
    out[8..16].copy_from_slice(&padded::<8>(&identity.vendor));
    out[16..32].copy_from_slice(&padded::<16>(&identity.product));
    out[32..36].copy_from_slice(&padded::<4>(&identity.revision));
    // Version descriptors without claiming a revision: SAM-5, SPC-4, SBC-3.
    for (index, version) in [0x00a0u16, 0x0460, 0x04c0].into_iter().enumerate() {
        put16(&mut out, 58 + 2 * index, version);
    }
    out
}

fn designator(out: &mut Vec<u8>, code_set: u8, kind: u8, bytes: &[u8]) {
    out.extend([code_set, kind, 0, bytes.len() as u8]);
    out.extend(bytes);
}

/// SCSI name strings are null-terminated and a multiple of four long (SPC-4 7.8.6.11).
fn name_string(name: &str) -> Vec<u8> {
    let mut out: Vec<u8> = name.bytes().take(247).collect();
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

/// Device identification (SPC-4 7.8.6).
fn designators(identity: &Identity, seat: &Seat, port: Option<&Rc<Port>>) -> Vec<u8> {
    let mut out = Vec::new();
    // The logical unit: NAA first, the strongest that everybody reads; then UUID, then T10 vendor.
    designator(&mut out, 1, 0x03, &identity.naa);
    designator(&mut out, 1, 0x0a, &[&[0x10, 0][..], identity.uuid.as_bytes()].concat());
    let t10 = [&padded::<8>(&identity.vendor)[..], identity.serial.as_bytes()].concat();
    designator(&mut out, 2, 0x01, &t10[..t10.len().min(72)]);
    // The target port: relative identifier, group, name. PIV and iSCSI's protocol identifier where there is a name.
    let [high, low] = seat.it.port.to_be_bytes();
    designator(&mut out, 1, 0x14, &[0, 0, high, low]);
    if let Some(port) = port {
        let [high, low] = port.group.to_be_bytes();
        designator(&mut out, 1, 0x15, &[0, 0, high, low]);
        if !port.name.is_empty() {
            designator(&mut out, 0x53, 0x98, &name_string(&port.name));
        }
        if !port.device_name.is_empty() {
            designator(&mut out, 0x53, 0xa8, &name_string(&port.device_name));
        }
    }
    out
}

/// Extended INQUIRY data (SPC-4 7.8.7).
fn extended() -> Vec<u8> {
    let mut out = vec![0; 60];
    // Offsets below are of the page less its header of four. HEADSUP, ORDSUP, SIMPSUP; V_SUP; LUICLR.
    (out[1], out[2], out[3]) = (0x07, 0x01, 0x01);
    // MAXIMUM SUPPORTED SENSE DATA LENGTH.
    out[9] = 64;
    out
}

/// Third party copy (SPC-4 7.8.17): the one mandatory descriptor, supported commands.
fn third_party_copy() -> Vec<u8> {
    let commands = [0x83, 1, 0x00, 0x84, 4, 0x00, 0x01, 0x03, 0x04];
    let length = (commands.len() + 1).next_multiple_of(4);
    let mut out = vec![0; 4 + length];
    put16(&mut out, 0, 0x0001);
    put16(&mut out, 2, length as u16);
    out[4] = commands.len() as u8;
    out[5..5 + commands.len()].copy_from_slice(&commands);
    out
}

/// Block limits (SBC-3 6.6.4).
fn block_limits(settings: &Settings) -> Vec<u8> {
    let mut page = vec![0; 64];
    page[5] = limits::COMPARE_AND_WRITE_BLOCKS as u8;
    put16(&mut page, 6, limits::PHYSICAL_BLOCKS as u16);
    put32(&mut page, 8, limits::TRANSFER_BLOCKS as u32);
    put32(&mut page, 12, limits::OPTIMAL_TRANSFER_BLOCKS as u32);
    put32(&mut page, 20, limits::UNMAP_BLOCKS as u32);
    put32(&mut page, 24, limits::UNMAP_DESCRIPTORS as u32);
    put32(&mut page, 28, limits::PHYSICAL_BLOCKS as u32);
    // UGAVALID, alignment 0.
    put32(&mut page, 32, 0x8000_0000);
    put64(&mut page, 36, limits::WRITE_SAME_BLOCKS);
    put32(&mut page, 44, u32::from(settings.atomic_blocks));
    page.split_off(4)
}

/// Block device characteristics (SBC-3 6.6.2): does not rotate. After a sanitize without a pattern reads return data
/// (WABEREQ and WACEREQ 01b).
fn characteristics(settings: &Settings) -> Vec<u8> {
    let mut page = vec![0; 64];
    put16(&mut page, 4, 1);
    page[7] = if settings.sanitize { 0x50 } else { 0 };
    page.split_off(4)
}

/// Logical block provisioning (SBC-3 6.6.5): LBPU, LBPWS, LBPWS10, LBPRZ; thin or resource.
fn provisioning(settings: &Settings, reads_zero: bool) -> Vec<u8> {
    vec![0, 0xe0 | if reads_zero { 0x04 } else { 0 }, if settings.thin { 2 } else { 1 }, 0]
}

/// Whether a command exists on a logical unit with these settings.
pub(crate) fn supported(op: Op, settings: &Settings) -> bool {
    match op {
        Op::Sanitize => settings.sanitize,
        Op::WriteAtomic => settings.atomic_blocks > 0,
        _ => true,
    }
}
