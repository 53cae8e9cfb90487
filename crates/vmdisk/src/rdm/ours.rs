//! LUNs of our own array as the resolver sees them, and the claim that is the third copy of an identity (R7).

use std::rc::Rc;

use ::array::{Claim, Lun, Pool};
use block::{BLOCK_BYTES, Disk, SECTOR_BYTES};
use uuid::Uuid;

use super::identity::{LunIdentity, Mode, Ours};
use super::resolve::{Luns, VisibleLun};

/// What INQUIRY says of our LUNs.
pub const VENDOR: [u8; 8] = *b"KAGAMI  ";
/// What INQUIRY says of our LUNs.
pub const PRODUCT: [u8; 16] = *b"LUN             ";
/// What INQUIRY says of our LUNs.
pub const REVISION: [u8; 4] = *b"0001";

/// The identity of a LUN of ours: what its VPD pages say, and where it lies.
pub fn lun_identity(lun: &Rc<Lun>) -> LunIdentity {
    let uuid = lun.uuid();
    LunIdentity {
        naa: ::array::identity::naa(uuid).to_vec(),
        uuid: Some(uuid),
        serial: lun.serial().into_bytes(),
        vendor: VENDOR,
        product: PRODUCT,
        revision: REVISION,
        sectors: lun.shape().sectors,
        logical_block: SECTOR_BYTES as u32,
        physical_block: BLOCK_BYTES as u32,
        ours: Some(Ours { array: lun.pool().uuid(), lun: uuid, generation: None }),
        seen: format!("{}:{}", lun.pool().name(), lun.name()).into_bytes().into_iter().take(160).collect(),
        ..LunIdentity::default()
    }
}

/// A LUN of ours as the resolver sees it.
pub fn visible_lun(lun: &Rc<Lun>) -> VisibleLun {
    // A UUID is one LUN: its two halves folded together are as good a number of it as any.
    let (high, low) = lun.uuid().as_u64_pair();
    VisibleLun {
        unit: high ^ low,
        name: format!("{}:{}", lun.pool().name(), lun.name()),
        identity: lun_identity(lun),
        disk: Rc::clone(lun) as Rc<dyn Disk>,
    }
}

/// All LUNs of some pools.
impl Luns for Vec<Rc<Pool>> {
    fn visible(&self) -> Vec<VisibleLun> {
        self.iter().flat_map(|pool| pool.luns()).map(|lun| visible_lun(&lun)).collect()
    }
}

/// The claim that a mapping at `path` of `datastore` puts on its LUN.
pub fn mapping_claim(datastore: &str, path: &str, mode: Mode) -> Claim {
    Claim::Mapping {
        datastore: datastore.to_owned(),
        path: path.to_owned(),
        physical: mode == Mode::Physical,
    }
}

/// The third copy: the LUN of `pools` that says it is mapped by this file, and the mode it noted.
pub fn claimed_by(pools: &[Rc<Pool>], datastore: &str, path: &str) -> Option<(LunIdentity, Mode)> {
    pools.iter().flat_map(|pool| pool.luns()).find_map(|lun| match lun.claimed_by() {
        Some(Claim::Mapping { datastore: d, path: p, physical }) if d == datastore && p == path => {
            Some((lun_identity(&lun), if physical { Mode::Physical } else { Mode::Virtual }))
        }
        _ => None,
    })
}

/// The LUN of ours that an identity names.
pub fn find_lun(pools: &[Rc<Pool>], lun: Uuid) -> Option<Rc<Lun>> {
    pools.iter().flat_map(|pool| pool.luns()).find(|l| l.uuid() == lun)
}
