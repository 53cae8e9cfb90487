//! The chain of descriptors below a disk, and whether it holds together (semantics page, chapter 5).

use std::rc::Rc;

use block::{Disk, DiskError, SECTOR_BYTES, Sector, SegmentsMut};

use crate::claims::InUse;
use crate::descriptor::{
    Access, Cid, CreateType, Descriptor, DescriptorError, ExtentKind, ExtentLine, NO_PARENT, NewDescriptor,
};
use crate::folder::{Folder, FolderError, MAX_TEXT_BYTES, file_name, parent_path};
use crate::rdm::{IdentityError, ResolveError};
use crate::redo::RedoError;
use crate::sesparse::SeSparseError;

/// The deepest chain that is opened: what ESX allows (chapter 17).
pub const MAX_LINKS: usize = 32;
/// A descriptor with this key says that a commit is overwriting its disk: it is no point in time (I4).
pub const MIXED_KEY: &str = "ddb.kagami.commit";
/// What a child notes of its parent's `ddb.longContentID`.
pub const PARENT_CONTENT_KEY: &str = "ddb.kagami.parentLongContentID";

/// Why a chain is refused. Where [`ChainError::readable`] names a descriptor, that one can be opened read-only.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// A link's file is missing.
    #[error("{path}: missing{}", named_by.as_ref().map_or(String::new(), |n| format!(", named by {n}")))]
    Missing {
        /// The file.
        path: String,
        /// The link that needs it.
        named_by: Option<String>,
    },
    /// A link's descriptor makes no sense.
    #[error("{path}: {source}")]
    Descriptor {
        /// The file.
        path: String,
        /// What is wrong.
        source: DescriptorError,
    },
    /// A child that does not say where its parent is.
    #[error("{path}: has a parent but does not name it (no parentFileNameHint)")]
    NoHint {
        /// The child.
        path: String,
    },
    /// The links differ in length.
    #[error("{path} has {sectors} sectors, its parent {parent} has {parent_sectors}: a chain has one length")]
    Capacity {
        /// The child.
        path: String,
        /// Its length.
        sectors: u64,
        /// The parent.
        parent: String,
        /// The parent's length.
        parent_sectors: u64,
    },
    /// The parent was changed since the child was made.
    #[error(
        "{path} was made over {parent} when its CID was {expected}, now it is {found}: the parent has been modified since"
    )]
    CidMismatch {
        /// The child.
        path: String,
        /// The parent.
        parent: String,
        /// What the child noted.
        expected: Cid,
        /// What the parent says.
        found: Cid,
    },
    /// As [`ChainError::CidMismatch`], by the long content id.
    #[error("{path} was made over another content of {parent} (longContentID differs)")]
    ContentMismatch {
        /// The child.
        path: String,
        /// The parent.
        parent: String,
    },
    /// More links than [`MAX_LINKS`], or a loop.
    #[error("{path}: the chain has more than {MAX_LINKS} links, or leads back to itself")]
    TooDeep {
        /// Where walking stopped.
        path: String,
    },
    /// The disk is half overwritten by a commit: alone it is no point in time.
    #[error(
        "{path} is being overwritten by a commit from {from}: open {from}, the commit starts again from there"
    )]
    Mixed {
        /// The disk.
        path: String,
        /// The top of the chain that is being folded into it.
        from: String,
    },
    /// A kind of disk that is not opened here.
    #[error("{path}: {what}")]
    Unsupported {
        /// The link.
        path: String,
        /// What it is.
        what: String,
    },
    /// A redo log makes no sense.
    #[error("{path}: {source}")]
    Redo {
        /// The link.
        path: String,
        /// What is wrong.
        source: RedoError,
    },
    /// An SEsparse redo log makes no sense.
    #[error("{path}: {source}")]
    SeSparse {
        /// The link.
        path: String,
        /// What is wrong.
        source: SeSparseError,
    },
    /// The LUN of a mapping cannot be had.
    #[error("{path}: {source}")]
    Lun {
        /// The mapping's descriptor.
        path: String,
        /// Why.
        source: ResolveError,
    },
    /// A mapping's identity cannot be read.
    #[error("{path}: {source}{}", if source.is_newer() { "" } else { "; `kagami rdm scan` can rebuild it" })]
    Identity {
        /// The mapping's descriptor.
        path: String,
        /// Why.
        source: IdentityError,
    },
    /// Somebody has it open.
    #[error(transparent)]
    InUse(#[from] InUse),
    /// What was asked for is not possible now.
    #[error("{0}")]
    Refused(String),
    /// The folder says no.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// Data could not be moved.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// One link as it was found.
#[derive(Clone, Debug)]
pub struct FoundLink {
    /// Its descriptor's path.
    pub path: String,
    /// Its descriptor.
    pub descriptor: Descriptor,
}

/// What a walk down a chain found.
#[derive(Debug)]
pub struct Survey {
    /// Links from the top down, as far as they could be read.
    pub links: Vec<FoundLink>,
    /// What is wrong, from the top down: (the child's index in `links`, what). Empty for a sound chain.
    pub troubles: Vec<(usize, ChainError)>,
    /// The walk ended at a base.
    pub complete: bool,
}

impl Survey {
    /// The highest link below which everything holds together: it may be opened read-only (R14). `None` when even
    /// the base is not there.
    pub fn readable(&self) -> Option<&str> {
        if !self.complete {
            return None;
        }
        let broken = self.troubles.iter().map(|t| t.0 + 1).max().unwrap_or(0);
        self.links.get(broken).map(|l| l.path.as_str())
    }
}

/// Reads and parses a descriptor. A disk of ESX 2 gets the one that it never had.
pub async fn load_descriptor(
    folder: &dyn Folder,
    path: &str,
    named_by: Option<&str>,
) -> Result<Descriptor, ChainError> {
    let error = match folder.read_text(path).await {
        Ok(bytes) => match Descriptor::parse(&bytes) {
            Ok(descriptor) => return Ok(descriptor),
            Err(source) => ChainError::Descriptor { path: path.to_owned(), source },
        },
        Err(FolderError::NotFound { path }) => {
            return Err(ChainError::Missing { path, named_by: named_by.map(str::to_owned) });
        }
        Err(error) => error.into(),
    };
    esx2_disk(folder, path).await.ok_or(error)
}

/// What formats begin with whose files are as long as disks.
const FIRST_BYTES: [&[u8]; 4] = [b"COWD", b"KDMV", &[0xbe, 0xba, 0xfe, 0xca], b"# Disk"];

/// A file that is too long for a descriptor and is nothing else that we know: the disk of ESX 2, which was its data alone
/// (R8). It is read, never written: it has no place for a CID.
async fn esx2_disk(folder: &dyn Folder, path: &str) -> Option<Descriptor> {
    let data = folder.open(path, true).await.ok()?;
    let sectors = data.shape().sectors;
    if sectors <= MAX_TEXT_BYTES / SECTOR_BYTES {
        return None;
    }
    let mut first = lane::Buffer::zeroed(SECTOR_BYTES as usize);
    data.read(Sector(0), &SegmentsMut::new(&mut first)).await.ok()?;
    if FIRST_BYTES.iter().any(|magic| first.starts_with(magic)) {
        return None;
    }
    let extent = ExtentLine {
        access: Access::ReadOnly,
        sectors,
        kind: ExtentKind::Vmfs,
        file: file_name(path).to_owned(),
        offset: 0,
    };
    let (cid, create_type) = (Cid(0xffff_fffe), CreateType::Vmfs);
    Descriptor::new(&NewDescriptor { cid, parent: None, create_type, extents: vec![extent], ddb: vec![] })
        .ok()
}

/// Walks down from `path` and checks every link against its parent (R14).
pub async fn survey(folder: &dyn Folder, path: &str) -> Survey {
    let mut out = Survey { links: Vec::new(), troubles: Vec::new(), complete: false };
    let (mut path, mut named_by) = (path.to_owned(), None::<String>);
    loop {
        let above = out.links.len().saturating_sub(1);
        if out.links.len() == MAX_LINKS || out.links.iter().any(|l| l.path == path) {
            out.troubles.push((above, ChainError::TooDeep { path }));
            return out;
        }
        let descriptor = match load_descriptor(folder, &path, named_by.as_deref()).await {
            Ok(descriptor) => descriptor,
            Err(error) => {
                out.troubles.push((above, error));
                return out;
            }
        };
        let found = FoundLink { path: path.clone(), descriptor };
        if let Some(child) = out.links.last()
            && let Some(trouble) = check_pair(child, &found)
        {
            out.troubles.push((above, trouble));
        }
        let next = match (found.descriptor.has_parent(), found.descriptor.parent_hint()) {
            (false, _) => None,
            (true, None) => Some(Err(ChainError::NoHint { path: path.clone() })),
            (true, Some(hint)) => Some(parent_path(folder, &path, hint).map_err(ChainError::from)),
        };
        out.links.push(found);
        match next {
            None => {
                out.complete = true;
                return out;
            }
            Some(Ok(parent)) => named_by = Some(std::mem::replace(&mut path, parent)),
            Some(Err(error)) => {
                out.troubles.push((out.links.len() - 1, error));
                return out;
            }
        }
    }
}

/// A child against its parent: one length, the CID it was made over, the long content id where both know one.
fn check_pair(child: &FoundLink, parent: &FoundLink) -> Option<ChainError> {
    let (path, below) = (child.path.clone(), parent.path.clone());
    let (sectors, parent_sectors) = (child.descriptor.sectors(), parent.descriptor.sectors());
    if sectors != parent_sectors {
        return Some(ChainError::Capacity { path, sectors, parent: below, parent_sectors });
    }
    let (expected, found) = (child.descriptor.parent_cid(), parent.descriptor.cid());
    if expected != found {
        return Some(ChainError::CidMismatch { path, parent: below, expected, found });
    }
    let noted = child.descriptor.get(PARENT_CONTENT_KEY);
    let content = parent.descriptor.get("ddb.longContentID");
    match noted.zip(content) {
        Some((noted, content)) if noted != content => {
            Some(ChainError::ContentMismatch { path, parent: below })
        }
        _ => None,
    }
}

/// The top of the chain that is being folded into a disk, when one is.
pub fn mixed(descriptor: &Descriptor) -> Option<&str> {
    descriptor.get(MIXED_KEY)
}

/// Children of `base` in its directory, by their hints: a disk with two cannot take a commit (R17).
pub async fn children(folder: &Rc<dyn Folder>, base: &str) -> Result<Vec<String>, ChainError> {
    let directory = crate::folder::directory(base);
    let mut out = Vec::new();
    for name in folder.list(if directory.is_empty() { "/" } else { directory }).await? {
        let path = format!("{directory}/{name}");
        if !name.ends_with(".vmdk") || path == base {
            continue;
        }
        // Extents end in .vmdk too: what is no descriptor is no child.
        let Ok(bytes) = folder.read_text(&path).await else { continue };
        let Ok(descriptor) = Descriptor::parse(&bytes) else { continue };
        if descriptor.parent_cid() == NO_PARENT {
            continue;
        }
        let parent = descriptor.parent_hint().map(|hint| parent_path(&**folder, &path, hint));
        if matches!(parent, Some(Ok(parent)) if parent == base) {
            out.push(path);
        }
    }
    Ok(out)
}
