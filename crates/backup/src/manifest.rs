//! Manifests: one file per backup, written last. What has no manifest is no backup (I6).

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::chunk::ChunkId;
use crate::envelope::{self, HEAD_BYTES};
use crate::error::{Error, corrupt};
use crate::format::{
    AREA_BYTES, MANIFEST_MAGIC, MAX_AREAS, MAX_DISKS, MAX_FILE_BYTES, MAX_FILES, MAX_MANIFEST_BYTES,
};

/// Where manifests lie in the repository.
pub(crate) const MANIFESTS: &str = "manifests";

/// Names a backup. In order of time.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BackupId(pub Uuid);

impl BackupId {
    /// One that nobody has.
    #[expect(clippy::new_without_default, reason = "each is another one")]
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }

    pub(crate) fn file(&self) -> PathBuf {
        Path::new(MANIFESTS).join(format!("{}.manifest", self.0))
    }

    pub(crate) fn from_file_name(name: &str) -> Option<Self> {
        Uuid::try_parse(name.strip_suffix(".manifest")?).ok().map(Self)
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How consistent the image is, as reached, not as wished.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Label {
    /// As after a power loss at that instant.
    Crash,
    /// The guest's file systems were frozen.
    Filesystem,
    /// The applications were quiesced.
    Application,
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Crash => "crash",
            Self::Filesystem => "filesystem",
            Self::Application => "application",
        })
    }
}

/// A cut of a disk as a manifest names it.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Cut {
    /// [`block::Generation::counter`].
    pub counter: u64,
    /// [`block::Generation::id`].
    pub id: Uuid,
}

impl From<block::Generation> for Cut {
    fn from(generation: block::Generation) -> Self {
        Self { counter: generation.counter, id: Uuid::from_u128(generation.id) }
    }
}

impl From<Cut> for block::Generation {
    fn from(cut: Cut) -> Self {
        Self { counter: cut.counter, id: cut.id.as_u128() }
    }
}

/// How a disk was copied.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Everything that holds data was read.
    Full,
    /// Only what the disk said had changed since the base was read.
    Incremental,
}

/// Whether the disk's word on what changed is taken.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tracking {
    /// Yes.
    Trusted,
    /// No: an audit found a change that it had not told of (R46). Backups read everything until told otherwise.
    Off {
        /// Where the difference was, in bytes from the start of the disk.
        at_bytes: u64,
        /// The backup that found it.
        since: BackupId,
    },
}

/// One disk of a backup.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DiskRecord {
    /// Its name in the backup, unique there.
    pub name: String,
    /// Length in bytes.
    pub length_bytes: u64,
    /// The unit in which it writes without reading first, in bytes.
    pub physical_block_bytes: u32,
    /// Root of its tree; none for a disk of zeroes. The whole content follows from it (I7).
    pub root: Option<ChunkId>,
    /// The cut it shows: the next incremental asks for changes since this.
    pub cut: Option<Cut>,
    /// How it was copied.
    pub mode: Mode,
    /// Whether change tracking is believed.
    pub tracking: Tracking,
    /// Bytes read from the disk by the attempt that reached its end, the audit included.
    pub read_bytes: u64,
    /// Where that attempt went on after an earlier one: what lies before was not read again. In bytes from the start of
    /// the disk.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub resumed_at_bytes: u64,
    /// Bytes the disk said had changed since the base; the whole length in a full copy.
    pub changed_bytes: u64,
    /// Bytes read only to check what was said to be unchanged (R46).
    pub audited_bytes: u64,
    /// Bytes the disk said to hold data.
    pub allocated_bytes: u64,
    /// What the caller wants to know again: RDM identity and mode, redo log sizes, ...
    #[serde(default)]
    pub metadata: Map<String, Value>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives references")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl DiskRecord {
    /// Length in areas of 64 KiB.
    pub(crate) fn areas(&self) -> u64 {
        self.length_bytes.div_ceil(AREA_BYTES)
    }
}

/// One small file of a backup: configuration, descriptor, mapping record.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its name in the backup, unique there.
    pub name: String,
    /// Length in bytes.
    pub length_bytes: u64,
    /// Its content, one after the other.
    pub chunks: Vec<ChunkId>,
}

/// A backup.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// The backup.
    pub id: BackupId,
    /// What it is a backup of, usually a VM's name.
    pub name: String,
    /// When it was sealed (RFC 3339, UTC).
    pub created_at: jiff::Timestamp,
    /// The backup that incremental disks were compared with. Not needed for restoring.
    pub base: Option<BackupId>,
    /// Consistency as reached.
    pub label: Label,
    /// The disks.
    pub disks: Vec<DiskRecord>,
    /// The small files.
    pub files: Vec<FileRecord>,
    /// Bytes of chunks that were new to the repository, before compression.
    pub new_bytes: u64,
    /// Bytes by which packs grew.
    pub stored_bytes: u64,
    /// What the caller wants to know again.
    #[serde(default)]
    pub metadata: Map<String, Value>,
}

impl Manifest {
    /// The disk named `name`.
    pub fn disk(&self, name: &str) -> Result<&DiskRecord, Error> {
        let missing = || Error::NoMember { backup: self.id, what: "disk", name: name.to_owned() };
        self.disks.iter().find(|d| d.name == name).ok_or_else(missing)
    }

    /// The file named `name`.
    pub fn file(&self, name: &str) -> Result<&FileRecord, Error> {
        let missing = || Error::NoMember { backup: self.id, what: "file", name: name.to_owned() };
        self.files.iter().find(|f| f.name == name).ok_or_else(missing)
    }

    pub(crate) fn encode(&self, repository: Uuid) -> Result<Vec<u8>, Error> {
        let refused = |e: serde_json::Error| Error::Refused(format!("the metadata cannot be written: {e}"));
        let body = serde_json::to_vec_pretty(self).map_err(refused)?;
        if body.len() as u64 > MAX_MANIFEST_BYTES {
            let found = body.len();
            return Err(Error::Refused(format!("a manifest of {found} bytes: at most {MAX_MANIFEST_BYTES}")));
        }
        Ok(envelope::seal(MANIFEST_MAGIC, repository, *self.id.0.as_bytes(), &body))
    }

    /// Reads a manifest file; `repository` and `id` are compared when given. Nothing in it is believed that the
    /// limits of the format do not allow.
    pub(crate) fn decode(
        bytes: &[u8],
        repository: Option<Uuid>,
        id: Option<BackupId>,
    ) -> Result<Self, Error> {
        let file = id.map_or_else(PathBuf::new, |id| id.file());
        let (head, body) = envelope::open(bytes, &file, "manifest", MANIFEST_MAGIC, repository)?;
        let at = HEAD_BYTES as u64;
        let manifest: Self =
            serde_json::from_slice(body).map_err(|e| corrupt(&file, "manifest body", at, e, "a manifest"))?;
        if head.own != *manifest.id.0.as_bytes() || id.is_some_and(|id| id != manifest.id) {
            return Err(corrupt(&file, "manifest id", 40, manifest.id, "the id of its file and head"));
        }
        manifest.check().map_err(|(found, wanted)| corrupt(&file, "manifest body", at, found, wanted))?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), (String, &'static str)> {
        if self.disks.len() > MAX_DISKS || self.files.len() > MAX_FILES {
            let found = format!("{} disks, {} files", self.disks.len(), self.files.len());
            return Err((found, "at most 1024 disks and 65536 files"));
        }
        let mut names = HashSet::new();
        for disk in &self.disks {
            let whole = disk.length_bytes.is_multiple_of(block::SECTOR_BYTES);
            if !whole || disk.areas() > MAX_AREAS || !names.insert(&disk.name) {
                let found = format!("disk {} of {} bytes", disk.name, disk.length_bytes);
                return Err((found, "unique names, whole sectors, at most 2 PiB"));
            }
        }
        names.clear();
        for file in &self.files {
            let chunks = file.length_bytes.div_ceil(AREA_BYTES);
            let fits = file.length_bytes <= MAX_FILE_BYTES && file.chunks.len() as u64 == chunks;
            if !fits || !names.insert(&file.name) {
                let found =
                    format!("file {} of {} bytes in {}", file.name, file.length_bytes, file.chunks.len());
                return Err((found, "unique names, at most 64 MiB, a chunk for each 64 KiB"));
            }
        }
        Ok(())
    }
}

/// For the fuzzer: reads hostile bytes as a manifest file, as its body, and as a tree node.
pub fn fuzz_manifest(bytes: &[u8]) {
    let _ = Manifest::decode(bytes, None, None);
    crate::unfinished::fuzz(bytes);
    if let Ok(manifest) = serde_json::from_slice::<Manifest>(bytes)
        && manifest.check().is_ok()
        && let Ok(sealed) = manifest.encode(Uuid::nil())
    {
        let again = Manifest::decode(&sealed, Some(Uuid::nil()), Some(manifest.id));
        assert!(again.is_ok(), "what is written is read");
    }
    for level in 0..crate::format::LEVELS {
        if let Ok(node) = crate::tree::Node::decode(bytes, level) {
            let again = crate::tree::Node::decode(&node.encode(), level);
            assert_eq!(again.as_ref(), Ok(&node), "what is written is read");
        }
    }
}
