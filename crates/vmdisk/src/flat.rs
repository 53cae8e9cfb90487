//! A flat file on VMFS as a disk: thin, lazily zeroed or eagerly zeroed.
//!
//! VMFS says where a range lies, the data goes straight to the device. Ranges that have data stay where they are as
//! long as the file is open, so they are remembered: the way of a read or write to one of them is a lookup and one
//! operation of the device. A write to a hole or to a block that was never written takes room first, then writes,
//! then commits in memory; the pointers are durable after the next flush.
//!
//! A thin file gives whole blocks back when the guest unmaps them. A block goes to another file only after everybody
//! is done who might have been told its place before: [`Grace`].

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use block::{
    Disk, DiskError, Extent, Extents, Gate, Generation, Io, Kind, SECTOR_BYTES, Safe, Sector, Segments,
    SegmentsMut, Shape, check_range,
};
use lane::Buffer;
use lane::sync::{Turn, Waiters};
use smallvec::SmallVec;
use vmfs::{Content, File, Place, Volume};

use crate::exclusive;
use crate::file::GrowingFile;
use crate::part::ready;
use crate::together;

/// So many extents are remembered; above that the memory is emptied and filled again (2 MiB).
const REMEMBERED: usize = 32 << 10;
/// A miss asks for so many sectors around (64 MiB), and takes so many places.
const LOOK_AHEAD: u64 = (64 << 20) / SECTOR_BYTES;
const PLACES: usize = 64;

/// A piece of the file with data: where it lies.
#[derive(Copy, Clone, Debug)]
struct Known {
    first: u64,
    count: u64,
    device: usize,
    at: u64,
}

/// Ranges that have data, by their first sector.
#[derive(Default)]
struct Map {
    extents: BTreeMap<u64, Known>,
    /// The last one found: runs of requests stay in it.
    last: Cell<Option<Known>>,
}

impl Map {
    /// Where `count` sectors from `at` on lie, when they are known and in one piece.
    #[inline]
    fn find(&self, at: u64, count: u64) -> Option<(usize, Sector)> {
        let inside = |k: &Known| k.first <= at && at + count <= k.first + k.count;
        let known = match self.last.get().filter(inside) {
            Some(known) => known,
            None => {
                let known = *self.extents.range(..=at).next_back()?.1;
                if !inside(&known) {
                    return None;
                }
                self.last.set(Some(known));
                known
            }
        };
        Some((known.device, Sector(known.at + (at - known.first))))
    }

    /// What lies in a range is not known any more.
    fn forget(&mut self, first: u64, end: u64) {
        self.last.set(None);
        let cut: SmallVec<[Known; 4]> = self
            .extents
            .range(..end)
            .rev()
            .map(|(_, known)| *known)
            .take_while(|known| known.first + known.count > first)
            .collect();
        for known in cut {
            self.extents.remove(&known.first);
            if known.first < first {
                self.extents.insert(known.first, Known { count: first - known.first, ..known });
            }
            let stop = known.first + known.count;
            if stop > end {
                let at = known.at + (end - known.first);
                self.extents.insert(end, Known { first: end, count: stop - end, at, ..known });
            }
        }
    }

    fn remember(&mut self, place: &Place) {
        let Content::Data { device, at } = place.content else { return };
        let mut new = Known { first: place.at.0, count: place.count, device, at: at.0 };
        if self.extents.len() >= REMEMBERED {
            self.extents.clear();
        }
        self.last.set(None);
        if let Some((_, before)) = self.extents.range(..=new.first).next_back() {
            let end = before.first + before.count;
            if end >= new.first + new.count {
                return;
            }
            if end >= new.first
                && before.device == new.device
                && before.at + (new.first - before.first) == new.at
            {
                new = Known { count: new.first + new.count - before.first, ..*before };
            }
        }
        let end = new.first + new.count;
        while let Some((_, after)) = self.extents.range(new.first + 1..=end).next() {
            let after = *after;
            let follows = after.device == new.device && new.at + (after.first - new.first) == after.at;
            if after.first == end && !follows {
                break;
            }
            self.extents.remove(&after.first);
            new.count = new.count.max(after.first + after.count - new.first);
        }
        self.extents.insert(new.first, new);
    }
}

/// Who may be moving data in a place that was told before: everybody who entered before a certain moment.
#[derive(Default)]
struct Grace {
    /// Which of the two counts those who enter now.
    now: Cell<usize>,
    inside: [Cell<u64>; 2],
    left: Waiters,
    turn: Turn,
}

/// Being inside; dropping it leaves.
struct Stay<'a> {
    grace: &'a Grace,
    side: usize,
}

impl Grace {
    #[inline]
    fn enter(&self) -> Stay<'_> {
        let side = self.now.get();
        self.inside[side].set(self.inside[side].get() + 1);
        Stay { grace: self, side }
    }

    /// Waits for all who are inside now; those who enter meanwhile are not waited for.
    async fn over(&self) {
        let _turn = self.turn.take().await;
        let side = self.now.get();
        self.now.set(1 - side);
        self.left.until(|| (self.inside[side].get() == 0).then_some(())).await;
    }
}

impl Drop for Stay<'_> {
    #[inline]
    fn drop(&mut self) {
        let inside = &self.grace.inside[self.side];
        inside.set(inside.get() - 1);
        if inside.get() == 0 && self.side != self.grace.now.get() {
            self.grace.left.wake_all();
        }
    }
}

/// A flat file as a disk.
pub struct FlatDisk {
    volume: Volume,
    file: File,
    devices: Vec<Rc<dyn Disk>>,
    map: RefCell<Map>,
    sectors: Cell<u64>,
    read_only: bool,
    unmap_reads_zero: bool,
    memory_align: u32,
    physical_block_bytes: u32,
    /// Room was taken that no flush has made durable yet: counts up with each, `settled` follows.
    allocations: Cell<u64>,
    settled: Cell<u64>,
    halted: Cell<bool>,
    gate: Rc<Gate>,
    /// Whole blocks that are unmapped are given back to the volume.
    thin: Cell<bool>,
    grace: Grace,
    /// Times that blocks were given back.
    releases: Cell<u64>,
}

impl FlatDisk {
    /// The file at `path` as a disk of its whole sectors.
    pub async fn open(volume: &Volume, path: &str, read_only: bool) -> Result<Rc<Self>, vmfs::Error> {
        let file = volume.open_file(path).await?;
        Self::new(volume, file, read_only)
    }

    /// An open file as a disk.
    pub fn new(volume: &Volume, file: File, read_only: bool) -> Result<Rc<Self>, vmfs::Error> {
        if file.is_resident() {
            return Err(vmfs::Error::Resident);
        }
        let devices: Vec<Rc<dyn Disk>> = volume.space().devices().to_vec();
        let shapes: Vec<Shape> = devices.iter().map(|d| d.shape()).collect();
        Ok(Rc::new(Self {
            volume: volume.clone(),
            sectors: Cell::new(file.length() / SECTOR_BYTES),
            file,
            map: RefCell::default(),
            read_only: read_only || shapes.iter().any(|s| s.read_only),
            unmap_reads_zero: shapes.iter().all(|s| s.unmap_reads_zero),
            memory_align: shapes.iter().map(|s| s.memory_align).max().unwrap_or(1),
            physical_block_bytes: shapes.iter().map(|s| s.physical_block_bytes).max().unwrap_or(512),
            devices,
            allocations: Cell::new(0),
            settled: Cell::new(0),
            halted: Cell::new(false),
            gate: Gate::new(),
            thin: Cell::new(false),
            grace: Grace::default(),
            releases: Cell::new(0),
        }))
    }

    /// The file, for whoever has to know where its blocks lie.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The volume it lies on.
    pub fn volume(&self) -> &Volume {
        &self.volume
    }

    fn check(&self, at: Sector, bytes: usize) -> Result<u64, DiskError> {
        assert!((bytes as u64).is_multiple_of(SECTOR_BYTES), "segments are whole sectors");
        let count = bytes as u64 / SECTOR_BYTES;
        check_range(self.sectors.get(), at, count)?;
        Ok(count)
    }

    fn may_change(&self) -> Result<(), DiskError> {
        match () {
            () if self.read_only => Err(DiskError::ReadOnly),
            () if self.halted.get() => Err(DiskError::Halted),
            () => Ok(()),
        }
    }

    #[inline]
    fn known(&self, at: Sector, count: u64) -> Option<(&Rc<dyn Disk>, Sector)> {
        let (device, at) = self.map.borrow().find(at.0, count)?;
        Some((&self.devices[device], at))
    }

    /// Where a range lies, asking VMFS and remembering what it says about the neighbourhood.
    async fn locate(&self, at: Sector, count: u64) -> Result<SmallVec<[Place; 4]>, DiskError> {
        let mut out: SmallVec<[Place; 4]> = SmallVec::new();
        let (mut here, end) = (at.0, at.0 + count);
        while here < end {
            let ahead = LOOK_AHEAD.max(end - here).min(self.sectors.get() - here);
            let releases = self.releases.get();
            let places = match self.file.locate_now(Sector(here), ahead, PLACES)? {
                Some(places) => places,
                None => self.file.locate(Sector(here), ahead, PLACES).await?,
            };
            if self.releases.get() != releases {
                continue; // what was found first may be somebody else's when what was found last was read
            }
            let mut map = self.map.borrow_mut();
            let before = here;
            for place in &places {
                map.remember(place);
                let stop = (place.at.0 + place.count).min(end);
                if place.at.0 < end {
                    out.push(Place { count: stop - place.at.0, ..*place });
                    here = stop;
                }
            }
            if here == before {
                let what = "VMFS does not say where a range of a file is";
                return Err(DiskError::Medium(block::MediumFault { at: Sector(here), what }));
            }
        }
        Ok(out)
    }

    /// Reads of a thin file are seen by whoever wants to give its blocks back.
    async fn read_staying(&self, at: Sector, into: &SegmentsMut<'_>) -> Result<(), DiskError> {
        let _stay = self.grace.enter();
        match self.known(at, into.len() as u64 / SECTOR_BYTES) {
            Some((device, at)) => device.read(at, into).await,
            None => self.read_slow(at, into).await,
        }
    }

    async fn read_slow(&self, at: Sector, into: &SegmentsMut<'_>) -> Result<(), DiskError> {
        let places = self.locate(at, into.len() as u64 / SECTOR_BYTES).await?;
        let mut parts: SmallVec<[(usize, Sector, SegmentsMut<'_>); 4]> = SmallVec::new();
        for place in &places {
            let start = ((place.at.0 - at.0) * SECTOR_BYTES) as usize;
            let length = (place.count * SECTOR_BYTES) as usize;
            match place.content {
                Content::Data { device, at } => parts.push((device, at, into.slice_mut(start, length))),
                Content::ToBeZeroed { .. } | Content::Hole => into.zero(start, length),
            }
        }
        if parts.is_empty() {
            return Ok(());
        }
        together::all(parts.iter().map(|(device, at, part)| self.devices[*device].read(*at, part)).collect())
            .await
    }

    /// Writes where room may have to be taken first.
    async fn write_slow(&self, at: Sector, from: &Segments<'_>, safe: Safe) -> Result<(), DiskError> {
        let count = from.len() as u64 / SECTOR_BYTES;
        let places = self.locate(at, count).await?;
        if places.iter().all(|p| matches!(p.content, Content::Data { .. })) {
            if self.is_settled() {
                return self.write_places(at, from, &places, safe).await;
            }
            self.write_places(at, from, &places, Safe::AtNextFlush).await?;
        } else {
            let allocation = self.file.allocate(at, count).await?;
            self.write_places(at, from, allocation.places(), Safe::AtNextFlush).await?;
            let places: SmallVec<[Place; 4]> = allocation.places().iter().copied().collect();
            allocation.commit()?;
            self.allocations.set(self.allocations.get() + 1);
            let mut map = self.map.borrow_mut();
            places.iter().for_each(|place| map.remember(place));
        }
        // A block whose pointer is not durable is not found after a power loss, however safe its data is: one flush
        // covers both.
        if safe == Safe::OnReturn { self.flush_now().await } else { Ok(()) }
    }

    /// Every room taken is durable.
    fn is_settled(&self) -> bool {
        self.allocations.get() == self.settled.get()
    }

    async fn write_places(
        &self,
        at: Sector,
        from: &Segments<'_>,
        places: &[Place],
        safe: Safe,
    ) -> Result<(), DiskError> {
        let mut parts: SmallVec<[(usize, Sector, Segments<'_>); 4]> = SmallVec::new();
        for place in places {
            let start = ((place.at.0 - at.0) * SECTOR_BYTES) as usize;
            let Content::Data { device, at } = place.content else { continue };
            parts.push((device, at, from.slice(start, (place.count * SECTOR_BYTES) as usize)));
        }
        let operations = parts.iter().map(|(device, at, part)| self.devices[*device].write(*at, part, safe));
        together::all(operations.collect()).await
    }

    async fn change_data(&self, at: Sector, count: u64, change: Change) -> Result<(), DiskError> {
        check_range(self.sectors.get(), at, count)?;
        self.may_change()?;
        let _pass = self.gate.enter().await;
        let frees = matches!(change, Change::Unmap | Change::Zero { may_free: true });
        // Piece by piece: a range may be the whole disk.
        let (mut here, end) = (at.0, at.0 + count);
        while here < end {
            let step = (end - here).min(LOOK_AHEAD);
            if frees && self.thin.get() {
                self.release(Sector(here), step).await?;
            }
            let _stay = self.grace.enter();
            let places = self.locate(Sector(here), step).await?;
            let operations = places.iter().filter_map(|place| {
                // Holes and blocks that were never written read as zero already.
                let Content::Data { device, at } = place.content else { return None };
                let device = &self.devices[device];
                Some(match change {
                    Change::Zero { may_free } => device.zero(at, place.count, may_free),
                    Change::Unmap => device.unmap(at, place.count),
                })
            });
            together::in_turns(32, operations).await?;
            here += step;
        }
        Ok(())
    }

    /// Gives the blocks that lie wholly in the range back to the volume.
    async fn release(&self, at: Sector, count: u64) -> Result<(), DiskError> {
        let released = self.file.release(at, count).await?;
        if released.is_empty() {
            return Ok(());
        }
        let (first, sectors) = released.range();
        self.map.borrow_mut().forget(first.0, first.0 + sectors);
        self.releases.set(self.releases.get() + 1);
        self.allocations.set(self.allocations.get() + 1);
        self.grace.over().await;
        Ok(released.finish()?)
    }

    async fn status_of(&self, at: Sector, count: u64, out: &mut Extents) -> Result<(), DiskError> {
        let (mut here, end) = (at.0, at.0 + count);
        while here < end && !out.is_full() {
            let step = (end - here).min(LOOK_AHEAD);
            for place in self.locate(Sector(here), step).await? {
                let taken = match place.content {
                    Content::Data { device, at } => self.status_of_data(&place, device, at, out).await?,
                    Content::ToBeZeroed { .. } => {
                        out.push(Extent { at: place.at, count: place.count, kind: Kind::Zero, changed: true })
                    }
                    Content::Hole => {
                        out.push(Extent { at: place.at, count: place.count, kind: Kind::Hole, changed: true })
                    }
                };
                if !taken {
                    return Ok(());
                }
            }
            here += step;
        }
        Ok(())
    }

    /// What the device says of a place: a thin LUN knows what was never written in a block. False when `out` is full.
    async fn status_of_data(
        &self,
        place: &Place,
        device: usize,
        at: Sector,
        out: &mut Extents,
    ) -> Result<bool, DiskError> {
        let mut done = 0;
        while done < place.count {
            let mut part = Extents::with_limit(64);
            self.devices[device].status(at.plus(done), place.count - done, None, &mut part).await?;
            for extent in part.iter() {
                let here = Sector(extent.at.0 - at.0 + place.at.0);
                if !out.push(Extent { at: here, ..*extent }) {
                    return Ok(false);
                }
            }
            done = part.end().map_or(place.count, |e| e.0 - at.0);
        }
        Ok(true)
    }

    async fn flush_now(&self) -> Result<(), DiskError> {
        self.may_change()?;
        let allocations = self.allocations.get();
        match self.file.flush().await {
            Ok(()) => {
                self.settled.set(self.settled.get().max(allocations));
                Ok(())
            }
            Err(error) => {
                let error = DiskError::from(error);
                if !matches!(error, DiskError::NoSpace) {
                    self.halted.set(true);
                }
                Err(error)
            }
        }
    }
}

#[derive(Copy, Clone)]
enum Change {
    Zero { may_free: bool },
    Unmap,
}

impl Disk for FlatDisk {
    fn shape(&self) -> Shape {
        Shape {
            sectors: self.sectors.get(),
            physical_block_bytes: self.physical_block_bytes,
            read_only: self.read_only,
            unmap_reads_zero: self.unmap_reads_zero,
            memory_align: self.memory_align,
        }
    }

    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        let count = match self.check(at, into.len()) {
            Ok(count) => count,
            Err(error) => return ready(Err(error)),
        };
        if self.thin.get() {
            return Box::pin(self.read_staying(at, into));
        }
        match self.known(at, count) {
            Some((device, at)) => device.read(at, into),
            None => Box::pin(self.read_slow(at, into)),
        }
    }

    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a> {
        Box::pin(async move {
            let count = self.check(at, from.len())?;
            self.may_change()?;
            let _pass = self.gate.enter().await;
            let _stay = self.grace.enter();
            match self.known(at, count) {
                Some((device, at)) if safe == Safe::AtNextFlush || self.is_settled() => {
                    device.write(at, from, safe).await
                }
                Some(_) | None => self.write_slow(at, from, safe).await,
            }
        })
    }

    fn zero(&self, at: Sector, count: u64, may_free: bool) -> Io<'_> {
        Box::pin(self.change_data(at, count, Change::Zero { may_free }))
    }

    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        Box::pin(self.change_data(at, count, Change::Unmap))
    }

    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        Box::pin(async move {
            check_range(self.sectors.get(), at, count)?;
            match since {
                // The LUN below knows its changes; which blocks were the file's then, only a backup's list knows.
                Some(_) => Err(DiskError::UnknownGeneration),
                None => self.status_of(at, count, out).await,
            }
        })
    }

    fn compare_and_write<'a>(
        &'a self,
        at: Sector,
        expected: &'a Segments<'a>,
        new: &'a Segments<'a>,
    ) -> Io<'a> {
        Box::pin(async move {
            let count = self.check(at, new.len())?;
            self.may_change()?;
            let pass = self.gate.enter().await;
            if let Some((device, at)) = self.known(at, count) {
                let _stay = self.grace.enter();
                return device.compare_and_write(at, expected, new).await;
            }
            drop(pass);
            let _alone = self.gate.alone().await;
            let _stay = self.grace.enter();
            let mut found = Buffer::zeroed(expected.len());
            self.read_slow(at, &SegmentsMut::new(&mut found)).await?;
            exclusive::compare(expected, &found)?;
            self.write_slow(at, new, Safe::AtNextFlush).await
        })
    }

    fn flush(&self) -> Io<'_> {
        if self.read_only {
            return ready(Ok(()));
        }
        Box::pin(self.flush_now())
    }
}

impl GrowingFile for FlatDisk {
    fn give_back_unmapped(&self) {
        self.thin.set(true);
    }

    fn grow(&self, sectors: u64) -> Io<'_> {
        Box::pin(async move {
            self.may_change()?;
            if sectors > self.sectors.get() {
                let bytes = sectors.checked_mul(SECTOR_BYTES).ok_or(DiskError::OutOfRange)?;
                self.file.set_length(bytes).await?;
                self.allocations.set(self.allocations.get() + 1);
                self.sectors.set(self.file.length() / SECTOR_BYTES);
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_joins_what_follows_and_finds_only_what_is_inside() {
        let mut map = Map::default();
        let place = |first: u64, count, at| Place {
            at: Sector(first),
            count,
            content: Content::Data { device: 0, at: Sector(at) },
        };
        map.remember(&place(100, 50, 1100));
        map.remember(&place(200, 50, 5000));
        map.remember(&place(150, 50, 1150));
        map.remember(&place(120, 10, 1120));
        map.remember(&Place { at: Sector(0), count: 9, content: Content::Hole });
        assert_eq!(map.extents.len(), 2);
        assert_eq!(map.find(100, 100), Some((0, Sector(1100))));
        assert_eq!(map.find(199, 1), Some((0, Sector(1199))));
        assert_eq!((map.find(199, 2), map.find(99, 1), map.find(0, 1)), (None, None, None));
        assert_eq!(map.find(249, 1), Some((0, Sector(5049))));
        map.remember(&place(50, 50, 1050));
        assert_eq!(map.extents.len(), 2);
        assert_eq!(map.find(50, 150), Some((0, Sector(1050))));
        map.forget(60, 190);
        assert_eq!((map.find(50, 10), map.find(59, 2)), (Some((0, Sector(1050))), None));
        assert_eq!((map.find(189, 1), map.find(190, 10)), (None, Some((0, Sector(1190)))));
        assert_eq!(map.find(249, 1), Some((0, Sector(5049))));
        map.forget(0, 1000);
        assert!(map.extents.is_empty());
    }
}
