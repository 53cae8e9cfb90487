//! The SCSI core: SPC-4 and SBC-3 as a disk needs them, knowing no transport.
//!
//! A front end makes a [`Port`], puts [`LogicalUnit`]s into a [`LunMap`], and for each initiator a [`Nexus`]. A command
//! goes [`Nexus::begin`] (at once, in order) then [`Command::run`] (with the data); every failure is a [`Reply`].
//!
//! ```text
//!  front     Nexus --begin--> Command --run--> Reply
//!              | LunMap          |
//!            Seat (attentions)   | opcode table: CDB, reservations
//!              |                 v
//!            LogicalUnit ---- task set, modes, pr::State --Keep--> with the LUN
//!              | range lock
//!            block::Disk
//! ```

mod bytes;
mod command;
mod copy;
mod data;
pub mod fuzz;
mod guarded;
mod inquiry;
mod lun;
mod mode;
mod nexus;
mod opcode;
pub mod pass_through;
pub mod pr;
mod provisioning;
mod reply;
mod report;
mod reserve;
mod sanitize;
pub mod sense;
mod task;
mod transport_id;
mod unit;

pub use command::{Command, Offered, Planned, PlannedCdb};
pub use inquiry::Identity;
pub use lun::{Call, Executing, ScsiLun};
pub use nexus::{Event, Function, LUN_MAX, LunMap, Nexus, Port, Response, Seat, lun_bytes, lun_number};
pub use opcode::Cdb;
pub use reply::{Answer, Fail, Reply, Status};
pub use task::{Aborted, Attribute, Place, TASKS_PER_NEXUS_MAX, Task, TaskSet};
pub use transport_id::{BadName, NAME_MAX, TransportId};
pub use unit::{Keep, LogicalUnit, Settings, limits};

#[cfg(test)]
mod tests;
