//! A chain whose links do not fit together any more: the evidence, and the repair that somebody decided on (R18).
//!
//! Nothing is repaired by itself and nothing silently. A CID that differs says that the parent was written after the
//! child was made; whether the child's data still belongs over it is known to nobody but the person who looks at the
//! evidence. The repair then makes the *child* say what its parent is now, keeps the child's old descriptor, and
//! leaves a record of who decided what upon which evidence. No data is touched.

use std::fmt;
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use block::{BLOCK_BYTES, BLOCK_SECTORS, Disk, Sector, SegmentsMut};
use lane::Buffer;

use crate::chain::{ChainError, FoundLink, MAX_LINKS, PARENT_CONTENT_KEY, load_descriptor, mixed, survey};
use crate::claims::Hold;
use crate::descriptor::Cid;
use crate::disk::{Open, VmDisk};
use crate::folder::{Folder, FolderError, parent_path, sibling};
use crate::rdm::Luns;

/// Blocks of the parent that are compared with a backup.
const SAMPLES: u64 = 512;

/// A parent held against a backup of it.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Samples {
    /// Blocks of 4 KiB that were compared.
    pub compared: u64,
    /// Blocks that were equal.
    pub equal: u64,
    /// First sector of the first block that was not.
    pub first_different: Option<Sector>,
}

/// Two links that do not fit together, and what is known of them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mismatch {
    /// The child's descriptor.
    pub child: String,
    /// The parent's descriptor.
    pub parent: String,
    /// The CID that the child noted of its parent.
    pub noted: Cid,
    /// The CID that the parent has.
    pub found: Cid,
    /// The long content ids of the same: noted, found.
    pub content: (Option<String>, Option<String>),
    /// Last change of the child's data.
    pub child_changed: Option<SystemTime>,
    /// Last change of the parent's data. Later than the child's birth: it was written behind the child's back.
    pub parent_changed: Option<SystemTime>,
    /// A commit was overwriting the parent, from the chain with this top: the parent alone is no point in time.
    pub mixed: Option<String>,
    /// The parent against a backup that was taken when the child was made, when one was given.
    pub samples: Option<Samples>,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = |time: Option<SystemTime>| {
            let since = time.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
            since.map_or_else(|| "unknown".to_owned(), |since| format!("{} s after 1970", since.as_secs()))
        };
        let text = |id: &Option<String>| id.clone().unwrap_or_else(|| "none".to_owned());
        writeln!(f, "child = {}", self.child)?;
        writeln!(f, "parent = {}", self.parent)?;
        writeln!(f, "noted CID = {}", self.noted)?;
        writeln!(f, "found CID = {}", self.found)?;
        writeln!(f, "noted longContentID = {}", text(&self.content.0))?;
        writeln!(f, "found longContentID = {}", text(&self.content.1))?;
        writeln!(f, "child's data changed = {}", time(self.child_changed))?;
        writeln!(f, "parent's data changed = {}", time(self.parent_changed))?;
        writeln!(f, "commit into the parent from = {}", text(&self.mixed))?;
        match &self.samples {
            None => writeln!(f, "compared with a backup = no"),
            Some(Samples { compared, equal, first_different }) => {
                let first = first_different.map_or_else(String::new, |at| format!(", first at {at}"));
                writeln!(f, "compared with a backup = {equal} of {compared} blocks equal{first}")
            }
        }
    }
}

/// What a look at a chain found.
#[derive(Debug)]
pub struct Evidence {
    /// Descriptors from the top down.
    pub links: Vec<String>,
    /// Pairs that a repair could join again.
    pub mismatches: Vec<Mismatch>,
    /// What no change of a CID mends: a missing link, other lengths, a commit under way.
    pub others: Vec<ChainError>,
}

/// Looks at the chain below `top`. With `backup` (the parent as it was when the child was made) blocks of the lowest
/// parent that does not fit are compared with it; `luns` are where mappings find theirs.
pub async fn evidence(
    folder: &Rc<dyn Folder>,
    top: &str,
    backup: Option<&dyn Disk>,
    luns: &dyn Luns,
) -> Evidence {
    let found = survey(&**folder, top).await;
    let links = found.links.iter().map(|link| link.path.clone()).collect();
    let mut out = Evidence { links, mismatches: Vec::new(), others: Vec::new() };
    for (index, trouble) in found.troubles {
        let fits = matches!(trouble, ChainError::CidMismatch { .. } | ChainError::ContentMismatch { .. });
        let pair = found.links.get(index).zip(found.links.get(index + 1)).filter(|_| fits);
        match pair {
            Some((child, parent)) => out.mismatches.push(look(folder, child, parent).await),
            None => out.others.push(trouble),
        }
    }
    if let (Some(lowest), Some(backup)) = (out.mismatches.last_mut(), backup)
        && let Ok(parent) = VmDisk::open(Rc::clone(folder), &lowest.parent, Open::READ, luns).await
    {
        lowest.samples = compare(&*parent, backup).await.ok();
    }
    out
}

async fn look(folder: &Rc<dyn Folder>, child: &FoundLink, parent: &FoundLink) -> Mismatch {
    let changed = async |link: &FoundLink| {
        let file = sibling(&link.path, &link.descriptor.extents().first()?.file).ok()?;
        folder.changed(&file).await.ok().flatten()
    };
    Mismatch {
        child: child.path.clone(),
        parent: parent.path.clone(),
        noted: child.descriptor.parent_cid(),
        found: parent.descriptor.cid(),
        content: contents(child, parent),
        child_changed: changed(child).await,
        parent_changed: changed(parent).await,
        mixed: mixed(&parent.descriptor).map(str::to_owned),
        samples: None,
    }
}

fn contents(child: &FoundLink, parent: &FoundLink) -> (Option<String>, Option<String>) {
    let noted = child.descriptor.get(PARENT_CONTENT_KEY).map(str::to_owned);
    (noted, parent.descriptor.get("ddb.longContentID").map(str::to_owned))
}

/// Compares blocks at even distances over the whole disk.
async fn compare(parent: &dyn Disk, backup: &dyn Disk) -> Result<Samples, block::DiskError> {
    let sectors = parent.shape().sectors.min(backup.shape().sectors);
    let blocks = sectors / BLOCK_SECTORS;
    let mut samples = Samples { compared: 0, equal: 0, first_different: None };
    let mut buffers = [Buffer::zeroed(BLOCK_BYTES as usize), Buffer::zeroed(BLOCK_BYTES as usize)];
    for n in 0..SAMPLES.min(blocks) {
        let at = Sector(blocks * n / SAMPLES.min(blocks) * BLOCK_SECTORS);
        let [a, b] = &mut buffers;
        parent.read(at, &SegmentsMut::new(a)).await?;
        backup.read(at, &SegmentsMut::new(b)).await?;
        samples.compared += 1;
        if a[..] == b[..] {
            samples.equal += 1;
        } else if samples.first_different.is_none() {
            samples.first_different = Some(at);
        }
    }
    Ok(samples)
}

/// What a repair left behind.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Repaired {
    /// The child's descriptor as it was.
    pub kept: String,
    /// The record: the evidence, who decided, why.
    pub record: String,
}

/// Makes the child of `mismatch` say what its parent is now. `reason` is who decided and why, as it shall stand in
/// the record. Refused when anything is no longer as in the evidence, or when somebody has the child open.
///
/// The old descriptor and the record are durable before the child is changed, in one atomic step (R10).
pub async fn repair(
    folder: &Rc<dyn Folder>,
    mismatch: &Mismatch,
    reason: &str,
    now: SystemTime,
) -> Result<Repaired, ChainError> {
    let refuse = |what: String| Err(ChainError::Refused(what));
    if reason.trim().is_empty() {
        return refuse("a repair wants a reason, for the record".into());
    }
    if let Some(from) = &mismatch.mixed {
        return Err(ChainError::Mixed { path: mismatch.parent.clone(), from: from.clone() });
    }
    let _claim = folder.claims().take(&mismatch.child, Hold::Write)?;
    let (path, named_by) = (&mismatch.child, Some(mismatch.child.as_str()));
    let child = FoundLink { path: path.clone(), descriptor: load_descriptor(&**folder, path, None).await? };
    let parent = match child.descriptor.parent_hint() {
        Some(hint) => parent_path(&**folder, path, hint)?,
        None => return Err(ChainError::NoHint { path: path.clone() }),
    };
    let descriptor = load_descriptor(&**folder, &parent, named_by).await?;
    let parent = FoundLink { path: parent, descriptor };
    let same = (&parent.path, child.descriptor.parent_cid(), parent.descriptor.cid())
        == (&mismatch.parent, mismatch.noted, mismatch.found)
        && contents(&child, &parent) == mismatch.content
        && mixed(&parent.descriptor).is_none();
    if !same {
        return refuse(format!("{path} or {} changed since the evidence was taken: look again", parent.path));
    }
    let (sectors, parent_sectors) = (child.descriptor.sectors(), parent.descriptor.sectors());
    if sectors != parent_sectors {
        let (path, parent) = (path.clone(), parent.path);
        return Err(ChainError::Capacity { path, sectors, parent, parent_sectors });
    }
    let repaired = free_names(&**folder, path).await?;
    folder.replace(&repaired.kept, &child.descriptor.to_bytes()).await?;
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let reason = reason.replace(['\n', '\r'], " ");
    let record = format!("repaired = {seconds} s after 1970\nreason = {reason}\n{mismatch}");
    folder.replace(&repaired.record, record.as_bytes()).await?;
    let mut new = child.descriptor;
    new.set_parent_cid(parent.descriptor.cid());
    match parent.descriptor.get("ddb.longContentID") {
        Some(content) => new
            .set_ddb(PARENT_CONTENT_KEY, content)
            .map_err(|source| ChainError::Descriptor { path: path.clone(), source })?,
        None => new.remove_ddb(PARENT_CONTENT_KEY),
    }
    folder.replace(path, &new.to_bytes()).await?;
    tracing::warn!(child = path, record = repaired.record, "a chain was repaired");
    Ok(repaired)
}

/// Names that no earlier repair took. They do not end in `.vmdk`: what is kept is no link of any chain.
async fn free_names(folder: &dyn Folder, path: &str) -> Result<Repaired, ChainError> {
    for n in 1..=MAX_LINKS * 8 {
        let names = Repaired { kept: format!("{path}.kept-{n}"), record: format!("{path}.repair-{n}") };
        match folder.read_text(&names.record).await {
            Err(FolderError::NotFound { .. }) => return Ok(names),
            Err(other) => return Err(other.into()),
            Ok(_) => {}
        }
    }
    Err(ChainError::Refused(format!("{path} was repaired too often: remove old {path}.repair-N and .kept-N")))
}
