//! TransportIDs: how an initiator port is named in persistent reservations (SPC-4 clause 7.6.4).

use crate::bytes::{be16, put16};

/// Longest iSCSI name, in bytes (RFC 7143 section 4.2.7.2).
pub const NAME_MAX: usize = 223;

/// The name of an initiator port.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum TransportId {
    /// An iSCSI name; with the initiator session id it names one port, without it the whole node. VMs have one, too:
    /// the initiator name of the VM, and an id made from its adapter (R50).
    Iscsi {
        /// Lower case, as names are compared.
        name: String,
        /// Initiator session id.
        isid: Option<[u8; 6]>,
    },
    /// Another protocol's, as it came: 24 bytes.
    Other([u8; 24]),
}

/// A name that cannot be one.
#[derive(Copy, Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadName {
    /// Empty or longer than 223 bytes.
    #[error("an initiator name has 1 to 223 bytes")]
    Length,
    /// A character that no iSCSI name has (RFC 3722), or none of the known types iqn, eui, naa.
    #[error("not an iSCSI name")]
    Characters,
    /// A TransportID that is cut off, or in a format that is not known.
    #[error("not a TransportID")]
    Form,
}

impl TransportId {
    /// An iSCSI initiator port; the name is made lower case.
    pub fn iscsi(name: &str, isid: Option<[u8; 6]>) -> Result<Self, BadName> {
        if name.is_empty() || name.len() > NAME_MAX {
            return Err(BadName::Length);
        }
        let name = name.to_lowercase();
        let fits = |c: char| c.is_alphanumeric() || matches!(c, '-' | '.' | ':' | '_');
        let typed = ["iqn.", "eui.", "naa."].iter().any(|t| name.starts_with(t));
        // Lowering may lengthen a name; the limit is for what is kept.
        if !typed || !name.chars().all(fits) || name.len() > NAME_MAX {
            return Err(BadName::Characters);
        }
        Ok(Self::Iscsi { name, isid })
    }

    /// The bytes of clause 7.6.4.6 (iSCSI), a multiple of four, at least 24; null-terminated and filled with nulls.
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Other(bytes) => bytes.to_vec(),
            Self::Iscsi { name, isid } => {
                let mut out = vec![0x05 | u8::from(isid.is_some()) << 6, 0, 0, 0];
                out.extend(name.bytes());
                if let Some(isid) = isid {
                    out.extend(b",i,0x");
                    out.extend(isid.iter().flat_map(|b| format!("{b:02x}").into_bytes()));
                }
                out.push(0);
                out.resize(out.len().next_multiple_of(4).max(24), 0);
                let length = (out.len() - 4) as u16;
                put16(&mut out, 2, length);
                out
            }
        }
    }

    /// Reads one from the front of `bytes`; the second value is how many bytes it took.
    pub fn parse(bytes: &[u8]) -> Result<(Self, usize), BadName> {
        if bytes.len() < 24 {
            return Err(BadName::Form);
        }
        if bytes[0] & 0x0f != 0x05 {
            let mut raw = [0; 24];
            raw.copy_from_slice(&bytes[..24]);
            // The other protocols have one format, 00b.
            return if bytes[0] >> 6 == 0 { Ok((Self::Other(raw), 24)) } else { Err(BadName::Form) };
        }
        let length = usize::from(be16(bytes, 2));
        let text = bytes.get(4..4 + length).ok_or(BadName::Form)?;
        if length < 20 || !length.is_multiple_of(4) {
            return Err(BadName::Form);
        }
        let end = text.iter().position(|b| *b == 0).ok_or(BadName::Form)?;
        let text = std::str::from_utf8(&text[..end]).map_err(|_| BadName::Form)?;
        let id = match bytes[0] >> 6 {
            0 => Self::iscsi(text, None)?,
            1 => {
                let (name, isid) = text.split_once(",i,0x").ok_or(BadName::Form)?;
                Self::iscsi(name, Some(isid_of(isid).ok_or(BadName::Form)?))?
            }
            _ => return Err(BadName::Form),
        };
        Ok((id, 4 + length))
    }

    /// The same initiator, whatever the session id (R53).
    pub fn same_name(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Iscsi { name: one, .. }, Self::Iscsi { name: two, .. }) => one == two,
            _ => self == other,
        }
    }
}

fn isid_of(text: &str) -> Option<[u8; 6]> {
    if text.len() != 12 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let value = u64::from_str_radix(text, 16).ok()?;
    let mut isid = [0; 6];
    isid.copy_from_slice(&value.to_be_bytes()[2..]);
    Some(isid)
}

impl std::fmt::Display for TransportId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Iscsi { name, isid: None } => f.write_str(name),
            Self::Iscsi { name, isid: Some(isid) } => {
                write!(f, "{name},i,0x")?;
                isid.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
            Self::Other(bytes) => {
                write!(f, "protocol {}: ", bytes[0] & 0x0f)?;
                bytes[1..].iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back() {
        for isid in [None, Some([0x40, 0, 1, 0x37, 0xab, 0])] {
            let id = TransportId::iscsi("iqn.2026-01.test:A", isid).unwrap();
            let bytes = id.to_bytes();
            assert!(bytes.len().is_multiple_of(4) && bytes.len() >= 24);
            let mut longer = bytes.clone();
            longer.extend([1, 2, 3]);
            assert_eq!(TransportId::parse(&longer), Ok((id.clone(), bytes.len())));
            assert!(id.to_string().starts_with("iqn.2026-01.test:a"));
        }
        let sas = [&[0x06, 0, 0, 0, 0x50][..], &[7; 19]].concat();
        assert_eq!(TransportId::parse(&sas).unwrap().0.to_bytes(), sas);
    }

    #[test]
    fn what_is_none_is_refused() {
        assert_eq!(TransportId::iscsi("", None), Err(BadName::Length));
        assert_eq!(TransportId::iscsi(&"iqn.".repeat(60), None), Err(BadName::Length));
        assert_eq!(TransportId::iscsi("iqn.2026 x", None), Err(BadName::Characters));
        assert_eq!(TransportId::iscsi("disk", None), Err(BadName::Characters));
        let good = TransportId::iscsi("iqn.2026-01.test:a", Some([1; 6])).unwrap().to_bytes();
        for end in 0..good.len() {
            assert!(TransportId::parse(&good[..end]).is_err(), "cut at {end}");
        }
        let mut no_end = good.clone();
        no_end[4..].fill(b'i');
        assert_eq!(TransportId::parse(&no_end), Err(BadName::Form));
        let mut format = good;
        format[0] = 0x85;
        assert_eq!(TransportId::parse(&format), Err(BadName::Form));
    }
}
