//! PERSISTENT RESERVE OUT: from CDB and parameter list to an [`Order`] (SPC-4 clause 6.16).

use super::Kind;
use crate::bytes::{be16, be32, be64};
use crate::sense::{Sense, asc};
use crate::transport_id::TransportId;

/// Longest parameter list taken, in bytes: 24, and TransportIDs of as many initiators as may register.
pub(crate) const LIST_BYTES_MAX: usize = 128 << 10;

/// What to register.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Registering {
    /// RESERVATION KEY: what the sender says it is registered with.
    pub key: u64,
    /// SERVICE ACTION RESERVATION KEY: zero unregisters.
    pub new_key: u64,
    /// REGISTER AND IGNORE EXISTING KEY: `key` is not looked at.
    pub ignore: bool,
    /// ALL_TG_PT.
    pub all_ports: bool,
    /// APTPL.
    pub aptpl: bool,
    /// SPEC_I_PT: further initiators to register.
    pub initiators: Option<Vec<TransportId>>,
}

/// What to move.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Move {
    /// RESERVATION KEY.
    pub key: u64,
    /// The key the other nexus is registered with.
    pub new_key: u64,
    /// UNREG: the sender's registration goes.
    pub unregister: bool,
    /// APTPL.
    pub aptpl: bool,
    /// RELATIVE TARGET PORT IDENTIFIER.
    pub port: u16,
    /// To whom.
    pub initiator: TransportId,
}

/// One PERSISTENT RESERVE OUT.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Order {
    /// REGISTER, REGISTER AND IGNORE EXISTING KEY.
    Register(Registering),
    /// RESERVE.
    Reserve {
        /// RESERVATION KEY.
        key: u64,
        /// TYPE.
        kind: Kind,
    },
    /// RELEASE.
    Release {
        /// RESERVATION KEY.
        key: u64,
        /// TYPE; `None`: none that exists.
        kind: Option<Kind>,
    },
    /// CLEAR.
    Clear {
        /// RESERVATION KEY.
        key: u64,
    },
    /// PREEMPT, PREEMPT AND ABORT.
    Preempt {
        /// RESERVATION KEY.
        key: u64,
        /// SERVICE ACTION RESERVATION KEY.
        victim: u64,
        /// TYPE; `None`: none that exists, which is wrong only if a reservation is to be made.
        kind: Option<Kind>,
        /// PREEMPT AND ABORT.
        abort: bool,
    },
    /// REGISTER AND MOVE.
    RegisterAndMove(Move),
}

impl Order {
    /// Reads an order. `action` and `scope_type` are of the CDB (`scope_type` is byte 2); `list` is the parameter list
    /// as far as it came, `length` what the CDB says.
    pub fn parse(action: u8, scope_type: u8, length: u32, list: &[u8]) -> Result<Self, Sense> {
        let wrong_length = Sense::illegal(asc::PARAMETER_LIST_LENGTH_ERROR);
        if length < 24 || list.len() < 24 || u64::from(length) > list.len() as u64 {
            return Err(wrong_length);
        }
        let (key, second, flags) = (be64(list, 0), be64(list, 8), list[20]);
        let spec_i_pt = flags & 0x08 != 0;
        if action != 7 && !(action == 0 && spec_i_pt) && length != 24 {
            return Err(wrong_length);
        }
        // SPEC_I_PT is of REGISTER alone; ALL_TG_PT and APTPL are looked at in the registering actions alone.
        if spec_i_pt && action != 0 && action != 7 {
            return Err(Sense::parameter(20, Some(3)));
        }
        let kind = Kind::from_code(scope_type & 0x0f);
        if scope_type >> 4 != 0 && matches!(action, 1 | 2 | 4 | 5) {
            return Err(Sense::cdb(2, Some(7)));
        }
        Ok(match action {
            0 | 6 => Self::Register(Registering {
                key,
                new_key: second,
                ignore: action == 6,
                all_ports: flags & 0x04 != 0,
                aptpl: flags & 0x01 != 0,
                initiators: if spec_i_pt { Some(initiators(list)?) } else { None },
            }),
            1 => Self::Reserve { key, kind: kind.ok_or(Sense::cdb(2, Some(3)))? },
            2 => Self::Release { key, kind },
            3 => Self::Clear { key },
            4 | 5 => Self::Preempt { key, victim: second, kind, abort: action == 5 },
            7 => Self::RegisterAndMove(moving(list, key, second)?),
            _ => return Err(Sense::cdb(1, Some(4))),
        })
    }
}

/// The TransportIDs behind the header (6.16.3).
fn initiators(list: &[u8]) -> Result<Vec<TransportId>, Sense> {
    let wrong_length = Sense::illegal(asc::PARAMETER_LIST_LENGTH_ERROR);
    if list.len() < 28 {
        return Err(wrong_length);
    }
    let length = be32(list, 24) as usize;
    let mut rest = list[28..].get(..length).ok_or(wrong_length)?;
    let mut out = Vec::new();
    while !rest.is_empty() {
        let at = (list.len() - rest.len()).min(usize::from(u16::MAX)) as u16;
        let (id, used) = TransportId::parse(rest).map_err(|_| Sense::parameter(at, None))?;
        if out.len() == super::REGISTRANTS_MAX {
            return Err(Sense::illegal(asc::INSUFFICIENT_REGISTRATION_RESOURCES));
        }
        out.push(id);
        rest = &rest[used..];
    }
    Ok(out)
}

/// The parameter list of REGISTER AND MOVE (table 245).
fn moving(list: &[u8], key: u64, new_key: u64) -> Result<Move, Sense> {
    let wrong_length = Sense::illegal(asc::PARAMETER_LIST_LENGTH_ERROR);
    let length = be32(list, 20) as usize;
    let id = list[24..].get(..length).ok_or(wrong_length)?;
    let (initiator, used) = TransportId::parse(id).map_err(|_| Sense::parameter(24, None))?;
    if used != length {
        return Err(wrong_length);
    }
    Ok(Move {
        key,
        new_key,
        unregister: list[17] & 0x02 != 0,
        aptpl: list[17] & 0x01 != 0,
        port: be16(list, 18),
        initiator,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(flags: u8) -> Vec<u8> {
        let mut out = vec![0; 24];
        (out[7], out[15], out[20]) = (1, 2, flags);
        out
    }

    #[test]
    fn lengths_spc4_6_16_2() {
        let wrong = Err(Sense::illegal(asc::PARAMETER_LIST_LENGTH_ERROR));
        assert_eq!(Order::parse(1, 5, 23, &list(0)), wrong);
        assert_eq!(Order::parse(1, 5, 24, &list(0)[..23]), wrong, "less came than said");
        assert_eq!(Order::parse(1, 5, 28, &[list(0), vec![0; 4]].concat()), wrong);
        assert_eq!(Order::parse(0, 0, 24, &list(8)), wrong, "SPEC_I_PT without its length");
        assert_eq!(Order::parse(0, 0, 28, &[list(8), vec![0, 0, 0, 24]].concat()), wrong);
        let reserve = Order::parse(1, 5, 24, &list(0));
        assert_eq!(reserve, Ok(Order::Reserve { key: 1, kind: Kind::WriteExclusiveRegistrantsOnly }));
    }

    #[test]
    fn scopes_and_types() {
        for code in 0..16 {
            assert_eq!(Order::parse(1, code, 24, &list(0)).is_ok(), [1, 3, 5, 6, 7, 8].contains(&code));
        }
        assert_eq!(Order::parse(1, 0x15, 24, &list(0)), Err(Sense::cdb(2, Some(7))));
        assert_eq!(Order::parse(6, 0, 24, &list(8)), Err(Sense::parameter(20, Some(3))));
    }

    #[test]
    fn further_initiators() {
        let one = TransportId::iscsi("iqn.2026-01.test:one", Some([1; 6])).unwrap();
        let two = TransportId::iscsi("iqn.2026-01.test:two", None).unwrap();
        let ids = [one.to_bytes(), two.to_bytes()].concat();
        let bytes = [list(8), (ids.len() as u32).to_be_bytes().to_vec(), ids].concat();
        let Ok(Order::Register(found)) = Order::parse(0, 0, bytes.len() as u32, &bytes) else { panic!() };
        assert_eq!(found.initiators, Some(vec![one, two]));
    }
}
