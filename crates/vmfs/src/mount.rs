//! Which hosts have the volume open. A heartbeat slot in use is a host's claim on the volume; ours is also the mark
//! that tells the next opening whether this one ended well.
//!
//! A crash leaves leaks at most, and finding them takes a look at all metadata. So the look is taken when it is
//! needed and only then: the slot is acquired before the first change of metadata reaches the device, and released by
//! [`crate::Volume::close`]. Opening for writing and finding our slot in use means that somebody did not get that
//! far; the leaks are given back before anything else is done.

use crate::Error;
use crate::check::{self, CheckError, Severity, What};
use crate::format::{
    Expected, FdAddress, FsDescriptor, HEARTBEAT_FREE, HEARTBEAT_OFFSET, Heartbeat, VmfsUuid, ensure,
    heartbeat_slots, view,
};
use crate::space::Space;
use crate::volume::read_only;
use block::Buffer;
use std::cell::{Cell, RefCell};
use std::time::Duration;
use zerocopy::IntoBytes;

/// The host that this program is in heartbeat slots, on whatever machine it runs: the slot tells whether the volume
/// was closed, the caller's lock on the devices keeps a second writer away. The stamp is not renewed.
pub(crate) const HOST: VmfsUuid =
    VmfsUuid([b'k', b'a', b'g', b'a', b'm', b'i', 0, 0, 0, 0, 0x02, 0x4B, 0x47, 0, 0, 0]);

/// Our heartbeat slot.
pub(crate) struct Mark {
    /// Volume offset of the slot.
    at: u64,
    slot: RefCell<Heartbeat>,
    set: Cell<bool>,
    /// Leaks that were given back because the volume had not been closed.
    pub repaired: Option<u64>,
    /// Files with blocks behind their ends, found in that repair: they were being shortened.
    pub shortened: Vec<FdAddress>,
}

impl Mark {
    /// Nobody else has the volume open, and what an opening of ours left behind is repaired.
    pub async fn enter(
        space: &Space,
        fs: &FsDescriptor,
        stale_after: Option<Duration>,
    ) -> Result<Self, Error> {
        refuse_foreign_hosts(space, stale_after).await?;
        let slots = load_heartbeats(space).await?;
        let own = |(_, beat): &&(u64, Heartbeat)| beat.host == HOST;
        let unused =
            |(_, beat): &&(u64, Heartbeat)| beat.host.is_none() && beat.state.get() == HEARTBEAT_FREE;
        let slot = slots.iter().find(own).or_else(|| slots.iter().find(unused));
        let (number, slot) = slot.ok_or_else(|| read_only("no heartbeat slot is free"))?;
        let at = HEARTBEAT_OFFSET + number * size_of::<Heartbeat>() as u64;
        let mut mark = Self {
            at,
            slot: RefCell::new(slot.clone()),
            set: Cell::new(false),
            repaired: None,
            shortened: Vec::new(),
        };
        {
            let mut slot = mark.slot.borrow_mut();
            (slot.offset, slot.fs_major, slot.fs_minor) = (at.into(), fs.major, fs.minor);
        }
        if slot.in_use() {
            mark.set.set(true);
            let (repaired, shortened) = repair(space).await?;
            (mark.repaired, mark.shortened) = (Some(repaired), shortened);
            // Else the slot is released once they are as long as they say.
            if mark.shortened.is_empty() {
                mark.clear(space).await?;
            }
        }
        Ok(mark)
    }

    /// The slot is in use, durably.
    pub async fn set(&self, space: &Space) -> Result<(), Error> {
        if self.set.get() {
            return Ok(());
        }
        self.slot.borrow_mut().acquire(HOST, uptime_us());
        self.write(space).await?;
        self.set.set(true);
        Ok(())
    }

    /// The slot is free, durably. Everything else is on the devices.
    pub async fn clear(&self, space: &Space) -> Result<(), Error> {
        if !self.set.get() {
            return Ok(());
        }
        self.slot.borrow_mut().release();
        self.write(space).await?;
        self.set.set(false);
        Ok(())
    }

    async fn write(&self, space: &Space) -> Result<(), Error> {
        let slot = self.slot.borrow().clone();
        space.write(self.at, slot.as_bytes()).await?;
        space.flush().await
    }
}

/// Gives back what a crash leaked; answers how many leaks there were, and which files have blocks behind their ends.
/// Damage is left alone and forbids writing.
async fn repair(space: &Space) -> Result<(u64, Vec<FdAddress>), Error> {
    let options = check::Options { repair_leaks: true, ..check::Options::default() };
    let report = check::check(space.devices().to_vec(), options).await.map_err(|error| match error {
        CheckError::Disk(error) => Error::Disk(error),
        other => read_only(other.to_string()),
    })?;
    let corrupt = report.findings().iter().find(|finding| finding.severity == Severity::Corrupt);
    match corrupt {
        None if report.cut_short => {
            Err(read_only("after an unclean stop it could not be checked to its end"))
        }
        None => {
            let behind = report.findings().iter().filter(|finding| finding.what == What::WrongLength);
            let files = behind.filter_map(|finding| finding.place.file()).collect();
            Ok((report.repaired.len() as u64, files))
        }
        Some(first) => {
            Err(Error::Damaged { findings: report.count(Severity::Corrupt), first: first.to_string() })
        }
    }
}

/// No other host has the volume open, and none that died left a journal to replay.
async fn refuse_foreign_hosts(space: &Space, stale_after: Option<Duration>) -> Result<(), Error> {
    let foreign = async || {
        let mut slots = load_heartbeats(space).await?;
        slots.retain(|(_, beat)| beat.in_use() && beat.host != HOST);
        Ok::<_, Error>(slots)
    };
    let before = foreign().await?;
    let Some(first) = before.first() else { return Ok(()) };
    let refuse = |(slot, beat): &(u64, Heartbeat)| Error::ForeignHost { host: beat.host, slot: *slot };
    let Some(patience) = stale_after else { return Err(refuse(first)) };
    lane::sleep(patience).await;
    let after = foreign().await?;
    for beat in &after {
        if !before.iter().any(|old| old.0 == beat.0 && old.1.as_bytes() == beat.1.as_bytes()) {
            return Err(refuse(beat));
        }
    }
    refuse_journals(space, &after).await
}

/// Numbers and content of the slots that are in use or can be used.
async fn load_heartbeats(space: &Space) -> Result<Vec<(u64, Heartbeat)>, Error> {
    let slots: Vec<u64> = heartbeat_slots(5).collect();
    let mut raw = Buffer::zeroed(slots.len() * 512);
    space.read(slots[0], &mut raw).await?;
    let beats = raw.chunks_exact(512).filter_map(view::<Heartbeat>).zip(slots).zip(0u64..);
    let sound = |((beat, at), _): &((&Heartbeat, u64), u64)| beat.in_use() || beat.offset.get() == *at;
    Ok(beats.filter(sound).map(|((beat, _), number)| (number, beat.clone())).collect())
}

/// A journal is idle when the header of its transaction is zero.
async fn refuse_journals(space: &Space, beats: &[(u64, Heartbeat)]) -> Result<(), Error> {
    for (slot, beat) in beats {
        let at = beat.journal_offset.get();
        if at == 0 {
            continue;
        }
        let inside = at.is_multiple_of(512) && at < space.bytes();
        ensure(inside, "offset of a journal", at, *slot, Expected::AtMost(space.bytes()))?;
        let mut head = Buffer::zeroed(512);
        space.read(at, &mut head).await?;
        if !lane::memory::is_zero(&head) {
            return Err(read_only(format!("host {} left a journal to replay (slot {slot})", beat.host)));
        }
    }
    Ok(())
}

/// Microseconds since this machine started, as far as it tells.
fn uptime_us() -> u64 {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = text.split_whitespace().next().and_then(|word| word.parse::<f64>().ok());
    seconds.map_or(0, |seconds| (seconds * 1e6) as u64)
}
