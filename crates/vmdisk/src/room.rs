//! A disk whose writes find no room. While a backup keeps what was there before (a redo log grows, or the LUN below has a
//! snapshot), that is the backup's doing and not the guest's: its writes are held, and go on by themselves when there is
//! room again (semantics page, chapter 7, "Space rules"). Reads go on all the while.
//!
//! What is held stands outside the write gate, so a cut, a commit or its flip, which may be what brings the room back,
//! never waits for it.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use block::DiskError;

use crate::disk::VmDisk;

/// What is held is tried again so often.
const TRY_EVERY: Duration = Duration::from_millis(200);

/// What a disk knows of the room below it.
#[derive(Default)]
pub(crate) struct Room {
    /// Backups under way that hold what is refused.
    backups: Cell<u32>,
    /// The disk is about to be closed: nothing waits any more.
    closing: Cell<bool>,
    /// Operations that wait now, and since when the first of them does.
    waiting: Cell<u64>,
    since: Cell<Option<Instant>>,
    /// How long operations of this disk were held, all spells that have ended.
    held: Cell<Duration>,
}

/// Writes that are held.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Held {
    /// Operations that wait.
    pub operations: u64,
    /// Since then the disk found no room.
    pub for_now: Duration,
}

/// A backup of the disk is under way: until this is dropped, writes that find no room wait.
pub struct HoldsWhenFull {
    disk: Rc<VmDisk>,
}

impl Drop for HoldsWhenFull {
    fn drop(&mut self) {
        let backups = &self.disk.room.backups;
        backups.set(backups.get() - 1);
    }
}

/// One operation that waits.
struct Waiting<'a>(&'a VmDisk);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let room = &self.0.room;
        room.waiting.set(room.waiting.get() - 1);
        if room.waiting.get() == 0
            && let Some(since) = room.since.take()
        {
            let spell = lane::now().saturating_duration_since(since);
            room.held.set(room.held.get() + spell);
            let seconds = spell.as_secs_f32();
            tracing::info!(disk = self.0.top_path(), seconds, "writes are not held any more");
        }
    }
}

impl VmDisk {
    /// Holds writes that find no room from now on, until the answer is dropped. A disk on a redo log does so anyway.
    pub fn hold_when_full(self: &Rc<Self>) -> HoldsWhenFull {
        self.room.backups.set(self.room.backups.get() + 1);
        HoldsWhenFull { disk: Rc::clone(self) }
    }

    /// The disk is about to be closed: what is held now, or would be, is answered that there is no room.
    pub fn hold_no_more(&self) {
        self.room.closing.set(true);
    }

    /// Somebody said [`VmDisk::hold_no_more`].
    pub fn is_closing(&self) -> bool {
        self.room.closing.get()
    }

    /// Writes that are held now, as there is no room for them.
    pub fn held(&self) -> Option<Held> {
        let since = self.room.since.get()?;
        let for_now = lane::now().saturating_duration_since(since);
        Some(Held { operations: self.room.waiting.get(), for_now })
    }

    /// How long writes of this disk were held for want of room since it was opened, this spell included.
    pub fn held_in_all(&self) -> Duration {
        self.room.held.get() + self.held().map_or(Duration::ZERO, |held| held.for_now)
    }

    fn may_hold(&self) -> bool {
        let ours = self.room.backups.get() > 0 || self.links.borrow().len() > 1 || self.is_committing();
        ours && !self.room.closing.get()
    }

    /// Does it, and again until there is room. `operation` takes its pass of the gate itself and gives it back.
    pub(crate) async fn when_there_is_room(
        &self,
        operation: impl AsyncFn() -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        let answer = operation().await;
        if !matches!(answer, Err(DiskError::NoSpace)) || !self.may_hold() {
            return answer;
        }
        let room = &self.room;
        room.waiting.set(room.waiting.get() + 1);
        let _waiting = Waiting(self);
        if room.since.get().is_none() {
            room.since.set(Some(lane::now()));
            tracing::error!(disk = self.top_path(), "no room: writes are held until there is some");
        }
        loop {
            lane::sleep(TRY_EVERY).await;
            let answer = operation().await;
            if !matches!(answer, Err(DiskError::NoSpace)) || !self.may_hold() {
                return answer;
            }
        }
    }
}
