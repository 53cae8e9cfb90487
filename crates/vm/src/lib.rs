//! VMs: their configuration ([`vmx`], [`vmsd`], [`Slot`]), the registry, block lists, the one cut over everything that
//! VMs lie on ([`cut`]), and redo logs from their making to their commit ([`vmsnap`], with its [`job_record`]).
//!
//! A VM is its directory on the datastore: the `.vmx` names its disks, the disks name their extents, a mapping
//! names its LUN. Nothing else decides.

pub mod block_list;
pub mod cut;
mod faults;
pub mod identity;
pub mod job_record;
pub mod registry;
mod slot;
#[cfg(test)]
mod tests;
pub mod vmsd;
pub mod vmsnap;
pub mod vmx;

pub use registry::{Datastore, OpenDisk, Surroundings, Vm, VmError};
pub use slot::{Bus, Slot, SlotError};
