//! iSCSI names (RFC 7143 section 4.2.7): what an initiator or a target is called, for ever and everywhere.

use std::fmt;

/// Longest name, in bytes (4.2.7.1).
const NAME_BYTES_MAX: usize = 223;

/// A name that can be one: `iqn.`, `eui.` or `naa.`, in lower case. Names that differ in case only are equal, as
/// stringprep (RFC 3722) wants it; of Unicode only ASCII is taken.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Name(String);

/// Why something is no iSCSI name.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadName {
    /// Too long or empty.
    #[error("an iSCSI name has 1 to 223 bytes, this one has {0}")]
    Length(usize),
    /// A character that no name has.
    #[error("{0:?} cannot be in an iSCSI name: letters, digits, '.', '-' and ':' can")]
    Character(char),
    /// None of the three types, or not as its type wants it.
    #[error("{0:?} is none of iqn.YYYY-MM.DOMAIN[:ANY], eui.16-HEX-DIGITS, naa.16-OR-32-HEX-DIGITS")]
    Form(String),
}

impl Name {
    /// Checks a name and makes it lower case.
    pub fn new(name: &str) -> Result<Self, BadName> {
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Err(BadName::Length(name.len()));
        }
        let allowed = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':');
        if let Some(bad) = name.chars().find(|c| !allowed(c)) {
            return Err(BadName::Character(bad));
        }
        let name = name.to_ascii_lowercase();
        let is_hex = |digits: &str| digits.bytes().all(|b| b.is_ascii_hexdigit());
        let well = match name.split_at_checked(4) {
            Some(("iqn.", rest)) => is_qualified(rest),
            Some(("eui.", digits)) => digits.len() == 16 && is_hex(digits),
            Some(("naa.", digits)) => matches!(digits.len(), 16 | 32) && is_hex(digits),
            _ => false,
        };
        if well { Ok(Self(name)) } else { Err(BadName::Form(name)) }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What comes after `iqn.`: a date and a domain.
fn is_qualified(rest: &str) -> bool {
    let bytes = rest.as_bytes();
    bytes.len() > 8
        && bytes[..4].iter().all(u8::is_ascii_digit)
        && bytes[4] == b'-'
        && bytes[5..7].iter().all(u8::is_ascii_digit)
        && bytes[7] == b'.'
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_and_made_lower_case() {
        for good in ["iqn.2024-01.example:x", "iqn.1993-08.org.debian:01:abc", "eui.02004567A425678D"] {
            assert_eq!(Name::new(good).unwrap().as_str(), good.to_ascii_lowercase());
        }
        assert!(Name::new("naa.52004567BA64678D").is_ok());
        let long = format!("iqn.2024-01.{}", "x".repeat(220));
        for bad in
            ["", "iqn", "iqn.2024", "iqn.2024-01.", "disk", "eui.123", "naa.zz", "iqn.2024-01.a b", &long]
        {
            assert!(Name::new(bad).is_err(), "{bad}");
        }
    }
}
