//! Backups: a repository of content-addressed chunks, and everything that consumes frozen disks.
//!
//! ```text
//!  frozen disk --status since--> what changed --read--> areas and pieces --BLAKE3, zstd--> packs
//!                                                            |
//!                                                   tree of 64 KiB areas (shared nodes)
//!                                                            |
//!                                            index, then manifest: written last, by rename
//! ```
//!
//! The crate knows no VM and no array: it is given disks, small files, and what the caller wants to know again.
//! `docs/formats/backup.md` has the bytes, the order of writing and why a crash at any point loses nothing.
#![allow(non_ascii_idents)] // zerocopy's derive makes such names of our fields; the lint knows whole crates only

mod backup;
mod cache;
mod chunk;
mod content;
mod copy;
mod disk;
mod envelope;
mod error;
mod export;
pub mod format;
mod index;
mod manifest;
mod pack;
mod progress;
mod prune;
mod reader;
mod repair;
mod repository;
mod restore;
mod segment;
mod session;
mod store;
mod stretch;
mod survey;
mod together;
mod tree;
mod unfinished;
mod verify;

pub use backup::{Audit, Plan, SourceDisk, Trust};
pub use chunk::ChunkId;
pub use disk::BackupDisk;
pub use error::Error;
pub use manifest::{BackupId, Cut, DiskRecord, FileRecord, Label, Manifest, Mode, Tracking, fuzz_manifest};
pub use progress::Progress;
pub use prune::Pruned;
pub use reader::Reads;
pub use repair::Repaired;
pub use repository::{Listed, Options, Repository};
pub use restore::Restored;
pub use store::{Change, Watch};
pub use verify::{Damage, Depth, Finding, Report};
