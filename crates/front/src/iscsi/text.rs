//! Text segments: `key=value` pairs, each ended by a zero byte (RFC 7143 section 6.1).

use base64::Engine;

use super::ending::Fault;

/// Longest key, in bytes (6.1).
const KEY_BYTES_MAX: usize = 63;
/// Longest value, in bytes: a binary value of 1024 bytes in hexadecimal, the longest that any key allows (6.1).
const VALUE_BYTES_MAX: usize = 2 + 2 * 1024;
/// Pairs in one text. All keys there are, several times over.
const PAIRS_MAX: usize = 128;

/// The pairs of a complete text.
pub fn parse(text: &[u8]) -> Result<Vec<(&str, &str)>, Fault> {
    let mut pairs = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let Some(end) = rest.iter().position(|byte| *byte == 0) else {
            return Err(Fault::new("a pair without its zero byte", "6.1"));
        };
        let (pair, after) = (&rest[..end], &rest[end + 1..]);
        rest = after;
        if pair.is_empty() {
            continue; // zero bytes between pairs: some initiators pad with them
        }
        if pairs.len() == PAIRS_MAX {
            return Err(Fault::new("more pairs than there are keys", "6.1"));
        }
        let pair = std::str::from_utf8(pair).map_err(|_| Fault::new("text that is not UTF-8", "6.1"))?;
        let Some((key, value)) = pair.split_once('=') else {
            return Err(Fault::new("a pair without '='", "6.1"));
        };
        if key.is_empty() || key.len() > KEY_BYTES_MAX || !key.bytes().all(is_key_byte) {
            return Err(Fault::new("a key that is none", "6.1"));
        }
        if value.len() > VALUE_BYTES_MAX {
            return Err(Fault::new("a value that is too long", "6.1"));
        }
        pairs.push((key, value));
    }
    Ok(pairs)
}

fn is_key_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'+' | b'@' | b'_' | b'#')
}

/// Appends a pair.
pub fn push(text: &mut Vec<u8>, key: &str, value: &str) {
    text.extend(key.bytes());
    text.push(b'=');
    text.extend(value.bytes());
    text.push(0);
}

/// A number: decimal, or hexadecimal behind 0x (6.1). At most 64 bits.
pub fn number(value: &str) -> Option<u64> {
    let hex = value.strip_prefix("0x").or_else(|| value.strip_prefix("0X"));
    let (digits, radix) = hex.map_or((value, 10), |digits| (digits, 16));
    // `from_str_radix` would take a sign.
    if digits.is_empty() || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    u64::from_str_radix(digits, radix).ok()
}

/// A binary value: hexadecimal behind 0x, or base64 behind 0b (6.1).
pub fn binary(value: &str) -> Option<Vec<u8>> {
    if let Some(digits) = value.strip_prefix("0x").or_else(|| value.strip_prefix("0X")) {
        return hexadecimal(digits.as_bytes());
    }
    let text = value.strip_prefix("0b").or_else(|| value.strip_prefix("0B"))?;
    base64::engine::general_purpose::STANDARD.decode(text).ok()
}

fn hexadecimal(digits: &[u8]) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    // An odd number of digits means that the first byte has one.
    let (first, rest) = digits.split_at(digits.len() % 2);
    let mut bytes = Vec::with_capacity(digits.len() / 2 + 1);
    for byte in first {
        bytes.push(digit(*byte)?);
    }
    for pair in rest.chunks_exact(2) {
        bytes.push(digit(pair[0])? << 4 | digit(pair[1])?);
    }
    Some(bytes)
}

/// A binary value as we write it.
pub fn to_hexadecimal(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::from("0x"), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // a String takes everything
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_split_at_zero_bytes() {
        let text = b"InitiatorName=iqn.x\0SessionType=Normal\0\0A=b=c\0";
        assert_eq!(
            parse(text).unwrap(),
            [("InitiatorName", "iqn.x"), ("SessionType", "Normal"), ("A", "b=c")]
        );
        assert_eq!(parse(b"").unwrap(), []);
        let long_key = [vec![b'k'; 64], b"=v\0".to_vec()].concat();
        let long_value = [b"k=".to_vec(), vec![b'v'; 3000], b"\0".to_vec()].concat();
        for bad in [
            &b"A=b"[..],
            b"A\0",
            b"=b\0",
            b"A=\xff\0",
            b"A b=c\0",
            &long_key,
            &long_value,
            &b"a=b\0".repeat(200),
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn numbers_and_binary_values() {
        for (text, value) in
            [("0", Some(0)), ("262144", Some(262_144)), ("0x1f", Some(31)), ("0X10", Some(16)), ("", None)]
        {
            assert_eq!(number(text), value, "{text}");
        }
        for bad in ["-1", "+1", "1f", "0x", "99999999999999999999", " 1"] {
            assert_eq!(number(bad), None, "{bad}");
        }
        assert_eq!(binary("0x0aFf"), Some(vec![10, 255]));
        assert_eq!(binary("0xaff"), Some(vec![10, 255]));
        assert_eq!(binary("0bAQID"), Some(vec![1, 2, 3]));
        assert_eq!(binary("0bAQI="), Some(vec![1, 2]));
        assert_eq!(binary("0bAQ=="), Some(vec![1]));
        for bad in ["0102", "0xzz", "0bA", "0bA===", "0bA=ID", ""] {
            assert_eq!(binary(bad), None, "{bad}");
        }
        assert_eq!(binary(&to_hexadecimal(&[0, 1, 254])), Some(vec![0, 1, 254]));
    }
}
