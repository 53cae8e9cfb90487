//! Raw device mappings: which LUN, in which mode, and never by its number (semantics page, chapters 1 and 2).
//!
//! The identity of the LUN is kept in three places: the mapping file's inode (the genuine 78-byte record, and ours
//! behind it), `ddb.kagami.rdm.` lines of the descriptor, and the array's claim on the LUN, which names datastore and
//! path. Any one can be rebuilt from the other two (R7).

mod copies;
mod facts;
pub mod format;
mod hold;
mod identity;
mod ours;
mod resolve;
#[cfg(test)]
mod tests;

use vmfs::format::RdmRecord;
use zerocopy::IntoBytes;

pub use copies::{Copies, Finding, Place, Verdict, What};
pub use facts::{Around, Facts};
pub use hold::{HOLD, open_held};
pub use identity::{ContentTag, DDB_PREFIX, Identity, IdentityError, LunIdentity, Mode, Ours, content_tag};
pub use ours::{PRODUCT, REVISION, VENDOR, claimed_by, find_lun, lun_identity, mapping_claim, visible_lun};
pub(crate) use resolve::same_lun;
pub use resolve::{Luns, Resolution, ResolveError, VisibleLun, may_resume, open, resolve, unmapped};

/// What a mapping file holds: a type-6 inode.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mapping {
    /// The genuine SCSI id.
    pub record: RdmRecord,
    /// Length of the LUN in bytes.
    pub length_bytes: u64,
    /// Our identity record, or empty.
    pub tail: Vec<u8>,
}

impl Mapping {
    /// The mapping of an identity. The genuine record carries the NAA, else the serial number.
    pub fn new(identity: &Identity) -> Result<Self, IdentityError> {
        let lun = &identity.lun;
        let product = &lun.product;
        let record = match <[u8; 16]>::try_from(&lun.naa[..]) {
            Ok(naa) => RdmRecord::naa(naa, product),
            Err(_) if !lun.serial.is_empty() => RdmRecord::serial(&lun.serial, product),
            Err(_) => {
                return Err(IdentityError::Damaged {
                    what: "a LUN without NAA and serial number cannot be mapped",
                });
            }
        };
        let tail = identity.to_record()?.as_bytes().to_vec();
        Ok(Self { record, length_bytes: lun.sectors * block::SECTOR_BYTES, tail })
    }

    /// The identity: ours, else what the genuine record tells (a mapping made by others). `mode` is the
    /// descriptor's.
    pub fn identity(&self, mode: Mode) -> Result<Identity, IdentityError> {
        match Identity::from_record(&self.tail) {
            Err(IdentityError::None) => self.foreign_identity(mode),
            other => other,
        }
    }

    fn foreign_identity(&self, mode: Mode) -> Result<Identity, IdentityError> {
        let id = self.record.id.get(..self.record.id_length.into());
        let id = id.ok_or(IdentityError::Damaged { what: "the SCSI id is longer than its field" })?;
        let mut lun = LunIdentity {
            sectors: self.length_bytes / block::SECTOR_BYTES,
            logical_block: block::SECTOR_BYTES as u32,
            physical_block: block::SECTOR_BYTES as u32,
            vendor: self.record.vendor,
            product: self.record.product,
            revision: self.record.revision,
            ..LunIdentity::default()
        };
        match (self.record.id_kind, id) {
            (2, id) if id.len() >= 16 => lun.naa = id[..16].to_vec(),
            (1, id) if id.len() >= 20 => lun.serial = id[..20].trim_ascii().to_vec(),
            _ => return Err(IdentityError::Damaged { what: "the SCSI id is neither NAA nor serial number" }),
        }
        Ok(Identity { mode, lun })
    }
}
