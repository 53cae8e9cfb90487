//! The three copies of an identity, compared; and what each should be when one is lost (R7).

use super::identity::{Identity, IdentityError, LunIdentity, Mode};
use super::resolve::same_lun;

/// Where a copy is.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Place {
    /// The mapping file's inode.
    Inode,
    /// The descriptor's disk database.
    Descriptor,
    /// The array's claim on the LUN.
    Claim,
}

/// What is wrong with a copy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum What {
    /// It is not there.
    Missing,
    /// It is there and cannot be read.
    Damaged(IdentityError),
    /// A newer program wrote it: it is right, and nothing is written over it.
    Newer(IdentityError),
    /// It says something else than what counts: which field.
    Differs(&'static str),
}

/// One thing found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// The copy.
    pub place: Place,
    /// What is wrong with it.
    pub what: What,
}

/// The copies as they were found. The claim gives the identity of the LUN that carries it and the mode noted there.
#[derive(Clone, Debug)]
pub struct Copies {
    /// From the mapping file.
    pub inode: Result<Identity, IdentityError>,
    /// From the descriptor.
    pub descriptor: Result<Identity, IdentityError>,
    /// From the LUN that says it is mapped by this very file; `None` when no LUN says so.
    pub claim: Option<(LunIdentity, Mode)>,
}

/// What the comparison came to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Verdict {
    /// What every copy should say; `None` when it cannot be known without guessing, or when a newer program wrote one.
    pub identity: Option<Identity>,
    /// What is wrong with which copy.
    pub findings: Vec<Finding>,
}

impl Copies {
    /// Compares the three. Two that agree outvote the third; one alone counts when the others are lost; two that
    /// disagree with no third are not decided here. Nothing outvotes a copy that a newer program wrote: it may know better.
    pub fn compare(&self) -> Verdict {
        let claimed = self.claim.as_ref().map(|(lun, mode)| Identity { mode: *mode, lun: lun.clone() });
        let claim = claimed.as_ref().ok_or(&IdentityError::None);
        let places = [
            (Place::Inode, self.inode.as_ref()),
            (Place::Descriptor, self.descriptor.as_ref()),
            (Place::Claim, claim),
        ];
        let readable: Vec<&Identity> = places.iter().filter_map(|(_, copy)| copy.ok()).collect();
        let newer = places.iter().any(|(_, copy)| copy.is_err_and(IdentityError::is_newer));
        let counts = match readable[..] {
            _ if newer => None,
            [] => None,
            [only] => Some(only),
            // The inode's copy is the fullest: it is preferred among equals by its place in the list.
            _ => readable.iter().enumerate().find_map(|(index, a)| {
                let agrees = |b: &&&Identity| difference(a, b).is_none();
                readable[index + 1..].iter().find(agrees).map(|_| *a)
            }),
        };
        let finding = |(place, copy): &(Place, Result<&Identity, &IdentityError>)| {
            let what = match (copy, counts) {
                (Err(IdentityError::None), _) => What::Missing,
                (Err(error), _) if error.is_newer() => What::Newer((*error).clone()),
                (Err(error), _) => What::Damaged((*error).clone()),
                (Ok(copy), Some(counts)) => What::Differs(difference(counts, copy)?),
                (Ok(copy), None) => {
                    let other = readable.iter().find_map(|other| difference(other, copy))?;
                    What::Differs(other)
                }
            };
            Some(Finding { place: *place, what })
        };
        Verdict { identity: counts.cloned(), findings: places.iter().filter_map(finding).collect() }
    }
}

/// The first thing that differs of what all three copies know. Where it was last seen, its content tag and its
/// generation change by themselves.
fn difference(a: &Identity, b: &Identity) -> Option<&'static str> {
    if !same_lun(&a.lun, &b.lun) {
        return Some("LUN");
    }
    if a.mode != b.mode {
        return Some("mode");
    }
    (a.lun.sectors != b.lun.sectors).then_some("length")
}
