//! The SCSI identity of a LUN, fixed for ever (DESIGN section 3): everything follows from its uuid.

use uuid::Uuid;

/// NAA type 6: 6, then the locally administered company id 02:4B:47, then the first 100 bits of BLAKE3 of the uuid.
pub fn naa(uuid: Uuid) -> [u8; 16] {
    let digest = blake3::hash(uuid.as_bytes());
    let digest = digest.as_bytes();
    let mut out = [0; 16];
    // 4 bits of type, 24 bits of company, 100 bits of digest: the digest begins in the middle of byte 3.
    out[..3].copy_from_slice(&[0x60, 0x24, 0xb4]);
    out[3] = 0x70 | digest[0] >> 4;
    for index in 4..16 {
        out[index] = digest[index - 4] << 4 | digest[index - 3] >> 4;
    }
    out
}

/// `naa.` and 32 hex digits.
pub fn naa_text(uuid: Uuid) -> String {
    let mut out = String::from("naa.");
    for byte in naa(uuid) {
        out.push_str(&format!("{byte:02x}"));
    }
    out
}

/// VPD page 80: the uuid as 32 hex digits.
pub fn serial(uuid: Uuid) -> String {
    uuid.simple().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_identity_is_what_it_was_at_birth() {
        let uuid = Uuid::from_u128(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef);
        let digest = blake3::hash(uuid.as_bytes()).to_hex();
        assert_eq!(naa_text(uuid), format!("naa.6024b47{}", &digest[..25]));
        assert_eq!(serial(uuid), "0123456789abcdef0123456789abcdef");
        assert_ne!(naa(Uuid::from_u128(1)), naa(Uuid::from_u128(2)));
    }
}
