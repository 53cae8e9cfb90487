//! VMFS: files to places on the volume. Finds, never moves a file's data.

mod allocate;
mod bitmap;
pub mod check;
pub mod create;
mod descriptor;
mod directory;
mod error;
mod faults;
mod file;
pub mod format;
pub mod fuzz;
mod inode;
mod mount;
mod moving;
mod names;
mod pointer;
mod rdm;
mod release;
mod resource;
mod size;
mod space;
#[cfg(test)]
mod tests;
mod volume;
mod write;

// What tests in `tests/` share with those in here calls this crate by its name.
#[cfg(test)]
extern crate self as vmfs;

pub use allocate::Allocation;
pub use check::{Report, check};
pub use create::{NewVolume, create};
pub use directory::{Entry, Rdm};
pub use error::Error;
pub use file::{Content, File, Place, Places};
pub use names::{Layout, NewFile};
pub use rdm::RDM_TAIL_BYTES;
pub use release::Released;
pub use resource::VolumeInfo;
pub use space::{LvmInfo, Piece, Space};
pub use volume::{Mode, Options, Volume};
pub use write::FreeSpace;
