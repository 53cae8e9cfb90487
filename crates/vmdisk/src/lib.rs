//! A VM's disk: a VMDK descriptor with its extents. Flat files on VMFS, redo logs, raw device mappings, and the
//! chains they form; a commit folds a redo log back while the VM writes.

pub mod chain;
pub mod claims;
pub mod commit;
pub mod create;
pub mod descriptor;
pub mod disk;
mod exclusive;
mod fault;
mod file;
pub mod flat;
pub mod folder;
pub mod fuzz;
mod host_folder;
mod latency;
mod layer;
mod pace;
mod part;
pub mod rdm;
pub mod redo;
pub mod repair;
mod room;
pub mod sesparse;
pub mod switch;
#[cfg(test)]
mod tests;
mod together;
mod vmfs_folder;

pub use chain::ChainError;
pub use commit::{Commit, LeftOver, Progress, recover_flip};
pub use disk::{LinkInfo, LinkKind, Open, VmDisk};
pub use file::GrowingFile;
pub use flat::FlatDisk;
pub use folder::{Folder, FolderError, Provision};
pub use host_folder::HostFolder;
pub use part::Part;
pub use room::{Held, HoldsWhenFull};
pub use switch::{PreparedRedo, SwitchedRedo, recover_switch, remove_link};
pub use vmfs_folder::VmfsFolder;
