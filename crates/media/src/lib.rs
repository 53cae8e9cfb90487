//! Pool blocks to stable storage: files and block devices as [`block::Disk`].
//!
//! [`open`] gives a [`FileDisk`]: locked against other processes, direct where the file system takes it, and honest
//! about it ([`FileDisk::in_use`]).

mod exclusion;
mod file_disk;

pub use file_disk::{Counters, FileDisk, InUse, MediaError, Options, create, open};
pub use lane::fs::{Direct, Lock};
