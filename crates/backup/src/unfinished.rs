//! Attempts at a backup that have not ended: how far each is, so that one that was cut off goes on from there.
//!
//! The record says "everything before this area is in sealed packs, and this tree has it". It is written when that is
//! so, and believed only as far as the packs still have what the tree names.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::chunk::ChunkId;
use crate::envelope::{self, HEAD_BYTES};
use crate::error::{Error, corrupt};
use crate::format::{AREA_BYTES, MAX_AREAS, MAX_DISKS, MAX_MANIFEST_BYTES, UNFINISHED_MAGIC};
use crate::manifest::{BackupId, Cut, DiskRecord, MANIFESTS, Manifest, Mode, Tracking};
use crate::repository::{Inner, Repository};
use crate::session::Session;
use crate::store::Store;
use crate::tree::first_missing;

/// How far the copy of one disk is.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct Partial {
    /// The disk's name in the backup.
    pub name: String,
    /// Its length in bytes.
    pub length_bytes: u64,
    /// The cut it shows.
    pub cut: Option<Cut>,
    /// What this pass over it is.
    pub mode: Mode,
    /// Incremental: changes are asked for since this cut.
    pub since: Option<Cut>,
    /// Whether change tracking was believed when the pass began.
    pub tracking: Tracking,
    /// Areas before this one are in the tree.
    pub reached: u64,
    /// The tree: what was read before `reached`, the base (or zeroes) behind it.
    pub root: Option<ChunkId>,
}

/// One attempt.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct Unfinished {
    /// The backup to be.
    pub id: BackupId,
    /// What it is compared with.
    pub base: Option<BackupId>,
    /// Disks whose copy is whole.
    pub done: Vec<DiskRecord>,
    /// The disk being copied.
    pub partial: Option<Partial>,
}

fn file(id: BackupId) -> PathBuf {
    Path::new(MANIFESTS).join(format!("{}.unfinished", id.0))
}

impl Unfinished {
    fn encode(&self, repository: Uuid) -> Result<Vec<u8>, Error> {
        let refused = |e: serde_json::Error| Error::Refused(format!("the metadata cannot be written: {e}"));
        let body = serde_json::to_vec_pretty(self).map_err(refused)?;
        Ok(envelope::seal(UNFINISHED_MAGIC, repository, *self.id.0.as_bytes(), &body))
    }

    fn decode(bytes: &[u8], repository: Option<Uuid>, id: Option<BackupId>) -> Result<Self, Error> {
        let name = id.map_or_else(PathBuf::new, file);
        let (head, body) = envelope::open(bytes, &name, "unfinished backup", UNFINISHED_MAGIC, repository)?;
        let bad = |found: String| {
            corrupt(&name, "unfinished backup", HEAD_BYTES as u64, found, "how far an attempt is")
        };
        let this: Self = serde_json::from_slice(body).map_err(|e| bad(e.to_string()))?;
        let areas = this.partial.as_ref().map_or(0, |p| p.length_bytes.div_ceil(AREA_BYTES));
        let reached = this.partial.as_ref().map_or(0, |p| p.reached);
        let own = head.own == *this.id.0.as_bytes() && id.is_none_or(|id| id == this.id);
        if !own || this.done.len() > MAX_DISKS || areas > MAX_AREAS || reached > areas {
            return Err(bad(format!("{} with area {reached} of {areas}", this.id)));
        }
        Ok(this)
    }

    /// Replaces the record, durably.
    pub fn write(&self, store: &Store, repository: Uuid) -> Result<(), Error> {
        store.put(&file(self.id), &self.encode(repository)?)
    }

    /// The record of an attempt, as far as the repository has what it names. A record that cannot be read, or a tree of
    /// which something is missing, costs reading again and nothing else.
    pub fn find(inner: &Inner, id: BackupId, base: Option<&Manifest>) -> Result<Option<Self>, Error> {
        let name = file(id);
        if !inner.store.path(&name).exists() {
            return Ok(None);
        }
        let bytes = inner.store.read(&name, MAX_MANIFEST_BYTES + HEAD_BYTES as u64)?;
        let mut this = match Self::decode(&bytes, Some(inner.id), Some(id)) {
            Ok(this) => this,
            Err(error) => {
                tracing::warn!(backup = %id, %error, "begun again from the start");
                return Ok(None);
            }
        };
        if this.base != base.map(|b| b.id) {
            return Ok(None);
        }
        let is_there = |name: &str, root| {
            let before = base.and_then(|b| b.disks.iter().find(|d| d.name == name)?.root);
            first_missing(inner, root, before).map(|missing| missing.is_none())
        };
        let mut done = Vec::with_capacity(this.done.len());
        for disk in this.done {
            if is_there(&disk.name, disk.root)? {
                done.push(disk);
            }
        }
        this.done = done;
        if let Some(partial) = &this.partial
            && !is_there(&partial.name, partial.root)?
        {
            tracing::warn!(backup = %id, disk = partial.name, "something of it is gone: it is read again");
            this.partial = None;
        }
        Ok(Some(this))
    }
}

/// Removes the record of an attempt that has become a backup, or never will.
pub(crate) fn forget(store: &Store, id: BackupId) -> Result<(), Error> {
    store.remove_if_there(&file(id))
}

/// Removes the records of all attempts; `_session`: nobody is at one now.
pub(crate) fn forget_all(store: &Store, _session: &Session) -> Result<(), Error> {
    for name in store.list(Path::new(MANIFESTS))?.iter().filter(|n| n.ends_with(".unfinished")) {
        store.remove(&Path::new(MANIFESTS).join(name))?;
    }
    Ok(())
}

impl Repository {
    /// Gives up an attempt that was cut off and will not go on: what it has stored counts as unused from now on.
    pub fn forget(&self, id: BackupId) -> Result<(), Error> {
        forget(&self.inner.store, id)
    }
}

/// For the fuzzer: reads hostile bytes as the record of an attempt.
pub(crate) fn fuzz(bytes: &[u8]) {
    if let Ok(this) = Unfinished::decode(bytes, None, None)
        && let Ok(sealed) = this.encode(Uuid::nil())
    {
        assert!(
            Unfinished::decode(&sealed, Some(Uuid::nil()), Some(this.id)).is_ok(),
            "what is written is read"
        );
    }
}
