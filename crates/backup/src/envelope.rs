//! Heads: writing them, and believing them only after every field has been looked at.

use std::path::Path;

use uuid::Uuid;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::error::{Error, corrupt};
use crate::format::{FORMAT, Head, KNOWN_FEATURES};

/// Bytes of a head.
pub(crate) const HEAD_BYTES: usize = size_of::<Head>();

/// Makes a head for `body`, which may be empty where other checksums cover what follows.
pub(crate) fn head(magic: [u8; 8], repository: Uuid, own: [u8; 16], body: &[u8]) -> Head {
    let mut head = Head::new_zeroed();
    head.magic = magic;
    head.format = FORMAT.into();
    head.repository = *repository.as_bytes();
    head.own = own;
    head.body_bytes = (body.len() as u64).into();
    head.body_hash = *blake3::hash(body).as_bytes();
    head.crc = crc32c::crc32c(head.as_bytes()).into();
    head
}

/// The bytes of a head.
pub(crate) type HeadBytes = [u8; HEAD_BYTES];

/// A head without a body, as bytes.
pub(crate) fn head_bytes(magic: [u8; 8], repository: Uuid, own: [u8; 16]) -> HeadBytes {
    zerocopy::transmute!(head(magic, repository, own, &[]))
}

/// Makes a whole file: head, then body.
pub(crate) fn seal(magic: [u8; 8], repository: Uuid, own: [u8; 16], body: &[u8]) -> Vec<u8> {
    [head(magic, repository, own, body).as_bytes(), body].concat()
}

/// A pack's or segment's number as it stands in [`Head::own`].
pub(crate) fn numbered(number: u64) -> [u8; 16] {
    (number as u128).to_le_bytes()
}

/// Checks a head: magic, checksum, format, features. `repository` is compared when given.
pub(crate) fn check_head(
    bytes: &[u8],
    file: &Path,
    what: &'static str,
    magic: [u8; 8],
    repository: Option<Uuid>,
) -> Result<Head, Error> {
    let Ok((head, _)) = Head::read_from_prefix(bytes) else {
        return Err(corrupt(
            file,
            what,
            0,
            format!("{} bytes", bytes.len()),
            format!("at least {HEAD_BYTES}"),
        ));
    };
    if head.magic != magic {
        let (found, expected) = (head.magic.escape_ascii(), magic.escape_ascii());
        return Err(corrupt(file, what, 0, found, expected));
    }
    let mut plain = head;
    plain.crc = 0.into();
    let crc = crc32c::crc32c(plain.as_bytes());
    if crc != head.crc.get() {
        return Err(corrupt(
            file,
            what,
            20,
            format!("checksum {crc:08x}"),
            format!("{:08x}", head.crc.get()),
        ));
    }
    if head.format.get() > FORMAT || head.format.get() == 0 {
        return Err(Error::NewerFormat { what, found: head.format.get(), known: FORMAT });
    }
    let unknown = head.must_understand.get() & !KNOWN_FEATURES;
    if unknown != 0 {
        return Err(Error::UnknownFeatures { what, unknown });
    }
    if let Some(repository) = repository
        && *repository.as_bytes() != head.repository
    {
        let found = Uuid::from_bytes(head.repository);
        return Err(corrupt(file, what, 24, format!("repository {found}"), repository));
    }
    Ok(head)
}

/// Checks a whole file and gives its head and its body.
pub(crate) fn open<'a>(
    bytes: &'a [u8],
    file: &Path,
    what: &'static str,
    magic: [u8; 8],
    repository: Option<Uuid>,
) -> Result<(Head, &'a [u8]), Error> {
    let head = check_head(bytes, file, what, magic, repository)?;
    let body = &bytes[HEAD_BYTES..];
    if body.len() as u64 != head.body_bytes.get() {
        let found = format!("{} bytes", body.len());
        return Err(corrupt(file, what, HEAD_BYTES as u64, found, format!("{} bytes", head.body_bytes)));
    }
    if *blake3::hash(body).as_bytes() != head.body_hash {
        return Err(corrupt(file, what, HEAD_BYTES as u64, "another hash", "the hash in the head"));
    }
    Ok((head, body))
}
