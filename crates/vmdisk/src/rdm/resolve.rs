//! Which of the visible LUNs a mapping means (semantics page 2.2). A LUN number is never looked at.

use std::rc::Rc;

use block::{Disk, DiskError, Generation};

use super::identity::{Identity, LunIdentity};
use crate::part::Part;

/// A LUN that can be seen, over one path or several.
#[derive(Clone)]
pub struct VisibleLun {
    /// Paths to one LUN have the same number here.
    pub unit: u64,
    /// For messages.
    pub name: String,
    /// What INQUIRY and VPD pages say, and the array.
    pub identity: LunIdentity,
    /// Its data.
    pub disk: Rc<dyn Disk>,
}

/// Where LUNs are seen: an array's pools, or devices of the host.
pub trait Luns {
    /// All LUNs that can be seen now. Only INQUIRY and VPD are used to see them (R55).
    fn visible(&self) -> Vec<VisibleLun>;
    /// Who is asked again when a LUN disappears under a running VM; `None`: its I/O is not held.
    fn watch(&self) -> Option<Rc<dyn Luns>> {
        None
    }
}

/// No LUNs at all.
impl Luns for () {
    fn visible(&self) -> Vec<VisibleLun> {
        Vec::new()
    }
}

/// A fixed list.
impl Luns for Vec<VisibleLun> {
    fn visible(&self) -> Vec<VisibleLun> {
        self.clone()
    }
}

/// The answer of the resolver.
pub enum Resolution<'a> {
    /// Found, as it was recorded.
    Resolved(&'a VisibleLun),
    /// Found, and longer than recorded: it opens with the old length until `rdm grow`.
    Larger(&'a VisibleLun),
    /// Found, and shorter: read-only, for rescue.
    Smaller(&'a VisibleLun),
    /// Found, with another logical block size: refused.
    BlockSize(&'a VisibleLun),
    /// Not there. The candidates have the same content tag and another identity: shown, never chosen.
    Missing(Vec<&'a VisibleLun>),
    /// Two different LUNs match.
    Ambiguous(Vec<&'a VisibleLun>),
}

/// Why a mapping cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// No LUN with this identity.
    #[error(
        "LUN {identity} ({sectors} sectors) is not visible{}: bring it back, or `kagami rdm remap` to another LUN",
        candidates_text(candidates)
    )]
    Missing {
        /// The identity looked for.
        identity: String,
        /// Its length.
        sectors: u64,
        /// LUNs with the same content tag.
        candidates: Vec<String>,
    },
    /// Several LUNs have the identity.
    #[error("several different LUNs say that they are {identity}: {}; take the copies away, or remap", luns.join(", "))]
    Ambiguous {
        /// The identity looked for.
        identity: String,
        /// Who says so.
        luns: Vec<String>,
    },
    /// The LUN became shorter.
    #[error(
        "LUN {identity} has {found} sectors, the mapping was made for {recorded}: only read-only opening is allowed"
    )]
    Smaller {
        /// The identity.
        identity: String,
        /// Length in the mapping.
        recorded: u64,
        /// Length now.
        found: u64,
    },
    /// The LUN has another logical block size.
    #[error("LUN {identity} has blocks of {found} bytes, the mapping was made for {recorded}")]
    BlockSize {
        /// The identity.
        identity: String,
        /// Bytes in the mapping.
        recorded: u32,
        /// Bytes now.
        found: u32,
    },
    /// The LUN came back rolled back or rebuilt.
    #[error(
        "LUN {identity} came back with another generation: its content changed behind our back, decide what counts"
    )]
    Generation {
        /// The identity.
        identity: String,
    },
    /// Its data cannot be reached.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

fn candidates_text(candidates: &[String]) -> String {
    match candidates {
        [] => String::new(),
        list => format!(" (the same content is on {})", list.join(", ")),
    }
}

/// The strongest kind of key that both sides have decides: equal or not (2.2, steps 2 and 3).
pub(crate) fn same_lun(recorded: &LunIdentity, seen: &LunIdentity) -> bool {
    if let (Some(a), Some(b)) = (recorded.ours, seen.ours) {
        return (a.array, a.lun) == (b.array, b.lun);
    }
    let both = |a: &[u8], b: &[u8]| (!a.is_empty() && !b.is_empty()).then(|| a == b);
    let uuids = recorded.uuid.zip(seen.uuid).map(|(a, b)| a == b);
    let strong = both(&recorded.naa, &seen.naa)
        .or_else(|| both(&recorded.eui, &seen.eui))
        .or(uuids)
        .or_else(|| both(&recorded.name, &seen.name));
    if let Some(equal) = strong {
        return equal;
    }
    // T10 ids and serial numbers are only as unique as their vendor made them.
    let product = (recorded.vendor, recorded.product) == (seen.vendor, seen.product);
    let weak = both(&recorded.t10, &seen.t10).or_else(|| both(&recorded.serial, &seen.serial));
    product && weak == Some(true)
}

/// Finds the LUN of a mapping.
pub fn resolve<'a>(identity: &Identity, visible: &'a [VisibleLun]) -> Resolution<'a> {
    let recorded = &identity.lun;
    let mut found: Vec<&VisibleLun> = Vec::new();
    for lun in visible.iter().filter(|l| same_lun(recorded, &l.identity)) {
        if !found.iter().any(|f| f.unit == lun.unit) {
            found.push(lun);
        }
    }
    match found[..] {
        [] => {
            let tag =
                |l: &&VisibleLun| recorded.tag.zip(l.identity.tag).is_some_and(|(a, b)| a.hash == b.hash);
            Resolution::Missing(visible.iter().filter(tag).collect())
        }
        [lun] if lun.identity.logical_block != recorded.logical_block => Resolution::BlockSize(lun),
        [lun] => match lun.identity.sectors.cmp(&recorded.sectors) {
            std::cmp::Ordering::Equal => Resolution::Resolved(lun),
            std::cmp::Ordering::Greater => Resolution::Larger(lun),
            std::cmp::Ordering::Less => Resolution::Smaller(lun),
        },
        _ => Resolution::Ambiguous(found),
    }
}

/// Opens the LUN of a mapping as a disk of the recorded length, or says why not.
pub fn open(
    identity: &Identity,
    visible: &[VisibleLun],
    read_only: bool,
) -> Result<Rc<dyn Disk>, ResolveError> {
    let recorded = &identity.lun;
    let name = || recorded.display();
    let names = |list: &[&VisibleLun]| list.iter().map(|l| l.name.clone()).collect();
    match resolve(identity, visible) {
        Resolution::Resolved(lun) | Resolution::Larger(lun) => {
            Ok(Part::new(Rc::clone(&lun.disk), block::Sector(0), recorded.sectors, read_only)?)
        }
        Resolution::Smaller(lun) if read_only => {
            Ok(Part::new(Rc::clone(&lun.disk), block::Sector(0), lun.identity.sectors, true)?)
        }
        Resolution::Smaller(lun) => Err(ResolveError::Smaller {
            identity: name(),
            recorded: recorded.sectors,
            found: lun.identity.sectors,
        }),
        Resolution::BlockSize(lun) => Err(ResolveError::BlockSize {
            identity: name(),
            recorded: recorded.logical_block,
            found: lun.identity.logical_block,
        }),
        Resolution::Missing(candidates) => Err(ResolveError::Missing {
            identity: name(),
            sectors: recorded.sectors,
            candidates: names(&candidates),
        }),
        Resolution::Ambiguous(luns) => Err(ResolveError::Ambiguous { identity: name(), luns: names(&luns) }),
    }
}

/// A LUN that a running VM lost is back: I/O may go on only if it is the same LUN with the same generation as when
/// it went (2.2).
pub fn may_resume<'a>(
    identity: &Identity,
    generation: Option<Generation>,
    visible: &'a [VisibleLun],
) -> Result<&'a VisibleLun, ResolveError> {
    match resolve(identity, visible) {
        Resolution::Resolved(lun) | Resolution::Larger(lun) => {
            let now = lun.identity.ours.and_then(|o| o.generation);
            if now == generation {
                Ok(lun)
            } else {
                Err(ResolveError::Generation { identity: identity.lun.display() })
            }
        }
        _ => match open(identity, visible, false) {
            Err(error) => Err(error),
            Ok(_) => Err(ResolveError::Generation { identity: identity.lun.display() }),
        },
    }
}

/// LUNs that no mapping points to.
pub fn unmapped<'a>(visible: &'a [VisibleLun], mappings: &[Identity]) -> Vec<&'a VisibleLun> {
    visible.iter().filter(|lun| !mappings.iter().any(|m| same_lun(&m.lun, &lun.identity))).collect()
}
