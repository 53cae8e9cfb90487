//! What answers CDBs.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

use block::{Segments, SegmentsMut};

use crate::command::{Offered, Planned};
use crate::nexus::{Port, Seat};
use crate::reply::{Answer, Fail};
use crate::task::{Place, TaskSet};
use crate::unit::LogicalUnit;

/// A command under way, for [`ScsiLun::execute`].
pub struct Call<'a> {
    /// Who asks.
    pub seat: &'a Rc<Seat>,
    /// What [`ScsiLun::plan`] made of the CDB.
    pub planned: &'a Planned,
    /// What the initiator offered.
    pub offered: Offered,
    /// Its place in the task set, to see whether it was aborted.
    pub task: &'a Place,
    /// Data-out: as much as came.
    pub from: &'a Segments<'a>,
    /// Place for data-in.
    pub into: &'a SegmentsMut<'a>,
}

/// An operation of a logical unit under way.
pub type Executing<'a> = Pin<Box<dyn Future<Output = Result<Answer, Fail>> + 'a>>;

/// A logical unit: [`LogicalUnit`], which interprets commands for a [`block::Disk`], or a device that gets them as they are.
/// Front ends use it through [`crate::Nexus`] only.
pub trait ScsiLun {
    /// It can be reached through this port from now on.
    fn present(&self, port: &Rc<Port>);

    /// A nexus begins to use it.
    fn arrive(&self, seat: &Rc<Seat>);

    /// A nexus is lost.
    fn leave(&self, seat: &Rc<Seat>);

    /// Decides, at once, whether the command may go on and what data it moves.
    fn plan(&self, seat: &Rc<Seat>, cdb: &[u8], offered: Offered) -> Result<Planned, Fail>;

    /// Does it.
    fn execute<'a>(&'a self, call: Call<'a>) -> Executing<'a>;

    /// Its task set.
    fn tasks(&self) -> &Rc<TaskSet>;

    /// LUN reset; the tasks are marked already.
    fn reset(&self);

    /// Tasks that another nexus aborts are answered with TASK ABORTED (control mode page, TAS).
    fn tells_aborted(&self) -> bool;

    /// Sense data are in descriptor format (control mode page, D_SENSE).
    fn descriptor_sense(&self) -> bool;

    /// The emulation, if it is one.
    fn unit(&self) -> Option<&LogicalUnit> {
        None
    }
}
