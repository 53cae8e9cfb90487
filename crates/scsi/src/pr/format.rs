//! What is kept of a logical unit's state: one record, versioned, with a checksum; no file of its own. The array keeps
//! it with the LUN.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Held, ItNexus, Kind, REGISTRANTS_MAX, Registrant, State};
use crate::transport_id::{NAME_MAX, TransportId};

const MAGIC: [u8; 8] = *b"KGMSCSI\0";
const VERSION: u32 = 1;
/// Longest TransportID, in bytes: header, name, separator, session id, padding.
const ID_BYTES_MAX: usize = (4 + NAME_MAX + 5 + 12 + 1usize).next_multiple_of(4);
/// Longest record, in bytes.
pub const RECORD_BYTES_MAX: usize =
    size_of::<RawHeader>() + REGISTRANTS_MAX * (size_of::<RawRegistrant>() + ID_BYTES_MAX);

const FLAG_APTPL: u8 = 1;
const REGISTRANT_ALL_PORTS: u8 = 1;
const REGISTRANT_HOLDS: u8 = 2;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    /// CRC32C of the whole record with this field zero.
    crc: U32,
    /// Bytes of the whole record.
    length: U32,
    generation: U32,
    /// Which boot of the machine wrote this.
    boot: [u8; 16],
    flags: u8,
    /// Type of the reservation; 0: none.
    kind: u8,
    /// Registrations that follow.
    count: U16,
    /// Saved mode parameters: see [`SavedModes`].
    modes: u8,
    spare: [u8; 3],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRegistrant {
    key: U64,
    port: U16,
    flags: u8,
    spare: u8,
    /// Bytes of the TransportID that follows.
    id_length: U16,
    spare2: U16,
}

const _: () = assert!(size_of::<RawHeader>() == 48);
const _: () = assert!(size_of::<RawRegistrant>() == 16);

/// Saved mode parameters as bits: what a power loss leaves of MODE SELECT with SP.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct SavedModes(pub u8);

/// A record that cannot be used.
#[derive(Copy, Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Corrupt {
    /// It is none of ours, or not whole.
    #[error("the record of reservations is damaged: {0}")]
    Damaged(&'static str),
    /// A newer program wrote it.
    #[error("the record of reservations has version {found}, this program knows versions up to {known}")]
    Newer {
        /// Its version.
        found: u32,
        /// The newest that is known here.
        known: u32,
    },
}

/// Everything that is kept.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Kept {
    /// Registrations and reservation.
    pub state: State,
    /// Saved mode parameters.
    pub modes: SavedModes,
}

impl Kept {
    /// The record. `boot` names the running of the machine that writes it.
    pub fn encode(&self, boot: u128) -> Vec<u8> {
        let state = &self.state;
        let header = RawHeader {
            magic: MAGIC,
            version: U32::new(VERSION),
            crc: U32::new(0),
            length: U32::new(0),
            generation: U32::new(state.generation),
            boot: boot.to_be_bytes(),
            flags: if state.aptpl { FLAG_APTPL } else { 0 },
            kind: state.held.as_ref().map_or(0, |h| h.kind as u8),
            count: U16::new(state.registrants.len() as u16),
            modes: self.modes.0,
            spare: [0; 3],
        };
        let mut out = header.as_bytes().to_vec();
        for registrant in &state.registrants {
            let id = registrant.nexus.initiator.to_bytes();
            let alone = state.held.as_ref().is_some_and(|h| h.holder.is_some());
            let holds = alone && state.holds(&registrant.nexus);
            let flags = if registrant.all_ports { REGISTRANT_ALL_PORTS } else { 0 }
                | if holds { REGISTRANT_HOLDS } else { 0 };
            let raw = RawRegistrant {
                key: U64::new(registrant.key),
                port: U16::new(registrant.nexus.port),
                flags,
                spare: 0,
                id_length: U16::new(id.len() as u16),
                spare2: U16::new(0),
            };
            out.extend_from_slice(raw.as_bytes());
            out.extend(id);
        }
        let length = (out.len() as u32).to_le_bytes();
        out[16..20].copy_from_slice(&length);
        let crc = crc32c::crc32c(&out).to_le_bytes();
        out[12..16].copy_from_slice(&crc);
        out
    }

    /// Reads a record; nothing at all is the state of a new LUN. A record of another boot was left by a power loss: what
    /// was not to survive one (APTPL zero) is gone, and PRGENERATION begins anew (SPC-4 5.12.5).
    pub fn decode(bytes: &[u8], boot: u128, by_name: bool) -> Result<Self, Corrupt> {
        if bytes.is_empty() {
            return Ok(Self { state: State { by_name, ..State::default() }, ..Self::default() });
        }
        if bytes.len() > RECORD_BYTES_MAX {
            return Err(Corrupt::Damaged("too long"));
        }
        let (header, mut rest) =
            RawHeader::read_from_prefix(bytes).map_err(|_| Corrupt::Damaged("too short"))?;
        if header.magic != MAGIC {
            return Err(Corrupt::Damaged("wrong magic"));
        }
        match header.version.get() {
            VERSION => {}
            found if found > VERSION => return Err(Corrupt::Newer { found, known: VERSION }),
            _ => return Err(Corrupt::Damaged("unknown version")),
        }
        if header.length.get() as usize != bytes.len() {
            return Err(Corrupt::Damaged("wrong length"));
        }
        let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..12]), &[0; 4]);
        if crc32c::crc32c_append(crc, &bytes[16..]) != header.crc.get() {
            return Err(Corrupt::Damaged("wrong checksum"));
        }
        let mut state = State {
            generation: header.generation.get(),
            aptpl: header.flags & FLAG_APTPL != 0,
            by_name,
            ..State::default()
        };
        let mut holder = None;
        for _ in 0..header.count.get() {
            let (registrant, holds, after) = registrant(rest)?;
            if state.registrants.iter().any(|r| r.nexus == registrant.nexus) {
                return Err(Corrupt::Damaged("a registration stands in it twice"));
            }
            if holds && holder.replace(registrant.nexus.clone()).is_some() {
                return Err(Corrupt::Damaged("two holders"));
            }
            state.registrants.push(registrant);
            rest = after;
        }
        if !rest.is_empty() || state.registrants.len() > REGISTRANTS_MAX {
            return Err(Corrupt::Damaged("wrong count"));
        }
        state.held = held(header.kind, holder, &state)?;
        if header.boot != boot.to_be_bytes() {
            state.generation = 0;
            if !state.aptpl {
                state.registrants.clear();
                state.held = None;
            }
        }
        Ok(Self { state, modes: SavedModes(header.modes) })
    }
}

fn held(kind: u8, holder: Option<ItNexus>, state: &State) -> Result<Option<Held>, Corrupt> {
    if kind == 0 {
        return if holder.is_none() { Ok(None) } else { Err(Corrupt::Damaged("a holder of nothing")) };
    }
    let kind = Kind::from_code(kind).ok_or(Corrupt::Damaged("unknown type"))?;
    if kind.all_registrants() != holder.is_none() || state.registrants.is_empty() {
        return Err(Corrupt::Damaged("a reservation without holder"));
    }
    Ok(Some(Held { kind, holder }))
}

fn registrant(bytes: &[u8]) -> Result<(Registrant, bool, &[u8]), Corrupt> {
    let (raw, rest) = RawRegistrant::read_from_prefix(bytes).map_err(|_| Corrupt::Damaged("cut off"))?;
    let length = usize::from(raw.id_length.get());
    let id = rest.get(..length).ok_or(Corrupt::Damaged("cut off"))?;
    let (initiator, used) = TransportId::parse(id).map_err(|_| Corrupt::Damaged("not a TransportID"))?;
    if used != length || raw.key.get() == 0 {
        return Err(Corrupt::Damaged("not a registration"));
    }
    let registrant = Registrant {
        nexus: ItNexus { initiator, port: raw.port.get() },
        key: raw.key.get(),
        all_ports: raw.flags & REGISTRANT_ALL_PORTS != 0,
    };
    Ok((registrant, raw.flags & REGISTRANT_HOLDS != 0, &rest[length..]))
}

#[cfg(test)]
mod tests {
    use super::super::Order;
    use super::*;

    fn some() -> Kept {
        let nexus = |n: u8| ItNexus {
            initiator: TransportId::iscsi(&format!("iqn.2026-01.test:{n}"), Some([n; 6])).unwrap(),
            port: 1,
        };
        let mut state = State::default();
        for n in 1..4 {
            let mut list = vec![0; 24];
            (list[15], list[20]) = (n, 1);
            state = state.apply(&nexus(n), &Order::parse(0, 0, 24, &list).unwrap(), &[1]).unwrap().state;
        }
        let reserve = Order::Reserve { key: 2, kind: Kind::WriteExclusiveRegistrantsOnly };
        state = state.apply(&nexus(2), &reserve, &[1]).unwrap().state;
        Kept { state, modes: SavedModes(3) }
    }

    #[test]
    fn r52_a_record_comes_back_through_a_restart_and_through_a_power_loss() {
        let kept = some();
        let bytes = kept.encode(7);
        assert_eq!(Kept::decode(&bytes, 7, false), Ok(kept.clone()));
        let after = Kept::decode(&bytes, 8, false).unwrap();
        assert_eq!((after.state.generation, after.state.registrants.len()), (0, 3));
        let mut volatile = kept;
        volatile.state.aptpl = false;
        let bytes = volatile.encode(7);
        assert_eq!(Kept::decode(&bytes, 7, false), Ok(volatile), "a restart of the daemon is no power loss");
        let after = Kept::decode(&bytes, 8, false).unwrap();
        assert_eq!((after.state, after.modes), (State::default(), SavedModes(3)));
        assert_eq!(Kept::decode(&[], 1, false), Ok(Kept::default()));
    }

    /// Written by another program, after docs/formats/reservations.md.
    #[test]
    fn golden_records() {
        let one = include_bytes!("../../../../fuzz/corpus/scsi_kept/two-registrants-one-holds");
        let kept = Kept::decode(one, 1, false).unwrap();
        assert_eq!((kept.state.generation, kept.state.aptpl, kept.state.registrants.len()), (3, true, 2));
        let held = kept.state.held().unwrap();
        assert_eq!(held.kind, Kind::WriteExclusiveRegistrantsOnly);
        assert_eq!(
            held.holder.as_ref().unwrap().initiator.to_string(),
            "iqn.2026-01.test:a,i,0x010203040506"
        );
        assert_eq!(kept.encode(1), one);
        let all = include_bytes!("../../../../fuzz/corpus/scsi_kept/all-registrants");
        let kept = Kept::decode(all, 1, false).unwrap();
        assert!(kept.state.held().is_some_and(|h| h.holder.is_none()) && kept.state.registrants[1].all_ports);
    }

    #[test]
    fn a_newer_record_is_refused_naming_both_versions() {
        let mut bytes = some().encode(7);
        bytes[8..12].copy_from_slice(&2_u32.to_le_bytes());
        let error = Kept::decode(&bytes, 7, false).unwrap_err();
        assert_eq!(error, Corrupt::Newer { found: 2, known: 1 });
        assert!(error.to_string().contains("version 2") && error.to_string().contains("up to 1"), "{error}");
        bytes[8..12].copy_from_slice(&0_u32.to_le_bytes());
        assert!(matches!(Kept::decode(&bytes, 7, false), Err(Corrupt::Damaged(_))));
    }

    #[test]
    fn damage_is_noticed_wherever_it_is() {
        let bytes = some().encode(7);
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut bad = bytes.clone();
                bad[at] ^= 1 << bit;
                assert!(Kept::decode(&bad, 7, false).is_err(), "byte {at} bit {bit}");
            }
            if at > 0 {
                assert!(Kept::decode(&bytes[..at], 7, false).is_err());
            }
        }
    }
}
