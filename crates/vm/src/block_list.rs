//! What changed on a disk that is a file on VMFS: the changes of the LUN below, seen through the file's block list.
//!
//! A block counts as unchanged only if it lay in the same place at the earlier backup *and* the LUN says that nothing
//! was written there since, or if it was a hole then and is one now: zero at both cuts, whatever was in between. Whatever
//! is newly mapped, unmapped, or lies elsewhere counts as changed: no false negative (R43), whatever was renamed, punched
//! or moved.

use std::rc::Rc;

use block::{
    Disk, DiskError, Extent, Extents, Generation, Io, Kind, Safe, Sector, Segments, SegmentsMut, Shape,
    check_range,
};
use vmfs::{Content, File};

/// Runs that are kept at most; a file in more pieces has no list, and its next backup reads everything.
const RUNS_MAX: usize = 1 << 21;
/// Bytes of a run in the written form.
const RUN_BYTES: usize = 24;
/// First bytes of the written form; a digit that says its format follows.
const MAGIC: &[u8; 7] = b"KGMBLKS";
/// Format written and the newest one understood.
const VERSION: u8 = 1;
/// Magic and format.
const HEAD_BYTES: usize = MAGIC.len() + 1;

/// A run of sectors of a file that lies in one piece on one device.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
struct Run {
    at: u64,
    count: u64,
    place: u64,
}

/// Where the data of a file lies on the one device of its volume.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BlockList {
    runs: Vec<Run>,
}

/// Why a written block list is not used.
#[derive(Copy, Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ListError {
    /// A newer program wrote it.
    #[error("the block list has format {found}; this program knows up to {VERSION}: use the newer program")]
    Newer {
        /// Format found.
        found: u8,
    },
    /// It makes no sense.
    #[error("the block list is damaged at byte {at}")]
    Damaged {
        /// Where.
        at: usize,
    },
}

impl BlockList {
    /// Reads the list of a file; `None` when it is in too many pieces, or on several devices.
    pub async fn of(file: &File) -> Result<Option<Self>, vmfs::Error> {
        let mut runs: Vec<Run> = Vec::new();
        if file.is_resident() {
            return Ok(None);
        }
        let (mut at, end) = (0, file.length().div_ceil(block::SECTOR_BYTES));
        while at < end {
            let places = file.locate(Sector(at), end - at, 1024).await?;
            for place in &places {
                let Content::Data { device, at: on } = place.content else { continue };
                if device != 0 || runs.len() == RUNS_MAX {
                    return Ok(None);
                }
                match runs.last_mut() {
                    Some(last) if last.at + last.count == place.at.0 && last.place + last.count == on.0 => {
                        last.count += place.count;
                    }
                    _ => runs.push(Run { at: place.at.0, count: place.count, place: on.0 }),
                }
            }
            let Some(last) = places.last() else { break };
            at = last.at.0 + last.count;
        }
        Ok(Some(Self { runs }))
    }

    /// As it goes into a backup: magic and format, then first sector, length and place of each run, little-endian.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.push(b'0' + VERSION);
        for run in &self.runs {
            for number in [run.at, run.count, run.place] {
                out.extend_from_slice(&number.to_le_bytes());
            }
        }
        out
    }

    /// Reads what [`BlockList::encode`] wrote; nothing in it is believed that is not in order.
    pub fn decode(bytes: &[u8]) -> Result<Self, ListError> {
        let damaged = |at| ListError::Damaged { at };
        let (version, body) =
            bytes.strip_prefix(MAGIC.as_slice()).and_then(|rest| rest.split_first()).ok_or(damaged(0))?;
        match version.wrapping_sub(b'0') {
            VERSION => {}
            found @ 2..=9 => return Err(ListError::Newer { found }),
            _ => return Err(damaged(MAGIC.len())),
        }
        if !body.len().is_multiple_of(RUN_BYTES) || body.len() / RUN_BYTES > RUNS_MAX {
            return Err(damaged(bytes.len()));
        }
        let (mut runs, mut end) = (Vec::with_capacity(body.len() / RUN_BYTES), 0);
        for (index, raw) in body.chunks_exact(RUN_BYTES).enumerate() {
            let wrong = damaged(HEAD_BYTES + index * RUN_BYTES);
            let number = |n: usize| {
                let mut bytes = [0; 8];
                bytes.copy_from_slice(&raw[n * 8..n * 8 + 8]);
                u64::from_le_bytes(bytes)
            };
            let run = Run { at: number(0), count: number(1), place: number(2) };
            let (next, fits) = (run.at.checked_add(run.count), run.place.checked_add(run.count));
            if run.at < end || run.count == 0 || fits.is_none() {
                return Err(wrong);
            }
            end = next.ok_or(wrong)?;
            runs.push(run);
        }
        Ok(Self { runs })
    }

    /// Where a sector lies and how many from there on lie behind it; else how many until the next run (or the end).
    fn find(&self, at: u64) -> (Option<u64>, u64) {
        let index = self.runs.partition_point(|r| r.at + r.count <= at);
        match self.runs.get(index) {
            Some(run) if run.at <= at => (Some(run.place + (at - run.at)), run.at + run.count - at),
            Some(run) => (None, run.at - at),
            None => (None, u64::MAX - at),
        }
    }
}

/// A frozen disk on VMFS that can say what changed since an earlier backup.
pub struct SeenThrough {
    /// The disk.
    disk: Rc<dyn Disk>,
    /// The device under its volume, as it was at the same cut.
    device: Rc<dyn Disk>,
    now: BlockList,
    before: Option<BlockList>,
}

impl SeenThrough {
    /// `now` is the file's list at the cut, `before` the one at the backup that will be asked about.
    pub fn new(disk: Rc<dyn Disk>, device: Rc<dyn Disk>, now: BlockList, before: Option<BlockList>) -> Self {
        Self { disk, device, now, before }
    }

    async fn changes(
        &self,
        at: Sector,
        count: u64,
        since: Generation,
        out: &mut Extents,
    ) -> Result<(), DiskError> {
        check_range(self.shape().sectors, at, count)?;
        // Without the old list nothing can be said: read all, never "unchanged" (R45).
        let before = self.before.as_ref().ok_or(DiskError::UnknownGeneration)?;
        let (mut at, end) = (at.0, at.0 + count);
        while at < end {
            let (place, left) = self.now.find(at);
            let (old, old_left) = before.find(at);
            let count = left.min(old_left).min(end - at);
            let whole = |kind, changed| Extent { at: Sector(at), count, kind, changed };
            let taken = match (place, old) {
                // Not mapped, or to be zeroed: zeroes now. Then too, unless it had a place.
                (None, old) => out.push(whole(Kind::Hole, old.is_some())),
                (Some(place), old) if old != Some(place) => out.push(whole(Kind::Data, true)),
                (Some(place), _) => {
                    let mut part = Extents::with_limit(256);
                    self.device.status(Sector(place), count, Some(since), &mut part).await?;
                    let mut going = true;
                    for extent in part.iter() {
                        let moved = Extent { at: Sector(at + (extent.at.0 - place)), ..*extent };
                        going = out.push(moved);
                        if !going {
                            break;
                        }
                    }
                    let covered = out.end().map_or(at, |e| e.0);
                    if !going || covered <= at {
                        return Ok(());
                    }
                    at = covered;
                    continue;
                }
            };
            if !taken {
                return Ok(());
            }
            at += count;
        }
        Ok(())
    }
}

impl Disk for SeenThrough {
    fn shape(&self) -> Shape {
        self.disk.shape()
    }
    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        self.disk.read(at, into)
    }
    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a> {
        self.disk.write(at, from, safe)
    }
    fn zero(&self, at: Sector, count: u64, may_free: bool) -> Io<'_> {
        self.disk.zero(at, count, may_free)
    }
    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        self.disk.unmap(at, count)
    }
    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        match since {
            None => self.disk.status(at, count, None, out),
            Some(since) => Box::pin(self.changes(at, count, since, out)),
        }
    }
    fn compare_and_write<'a>(
        &'a self,
        at: Sector,
        expected: &'a Segments<'a>,
        new: &'a Segments<'a>,
    ) -> Io<'a> {
        self.disk.compare_and_write(at, expected, new)
    }
    fn flush(&self) -> Io<'_> {
        self.disk.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::MemoryDisk;
    use proptest::prelude::*;

    fn list(runs: &[(u64, u64, u64)]) -> BlockList {
        BlockList {
            runs: runs
                .iter()
                .map(|(at, count, place)| Run { at: *at, count: *count, place: *place })
                .collect(),
        }
    }

    /// Says that nothing ever changed: what is told as changed above it comes from the lists alone.
    struct Unchanged(MemoryDisk);
    impl Disk for Unchanged {
        fn shape(&self) -> Shape {
            self.0.shape()
        }
        fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
            self.0.read(at, into)
        }
        fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a> {
            self.0.write(at, from, safe)
        }
        fn zero(&self, at: Sector, count: u64, may_free: bool) -> Io<'_> {
            self.0.zero(at, count, may_free)
        }
        fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
            self.0.unmap(at, count)
        }
        fn status<'a>(
            &'a self,
            at: Sector,
            count: u64,
            _: Option<Generation>,
            out: &'a mut Extents,
        ) -> Io<'a> {
            out.push(Extent { at, count, kind: Kind::Data, changed: false });
            Box::pin(std::future::ready(Ok(())))
        }
        fn compare_and_write<'a>(&'a self, at: Sector, a: &'a Segments<'a>, b: &'a Segments<'a>) -> Io<'a> {
            self.0.compare_and_write(at, a, b)
        }
        fn flush(&self) -> Io<'_> {
            self.0.flush()
        }
    }

    const SINCE: Generation = Generation { counter: 1, id: 1 };

    #[test]
    fn r43_only_what_lies_where_it_lay_can_be_unchanged() {
        lane::block_on(async {
            let disk: Rc<dyn Disk> = Rc::new(MemoryDisk::new(100));
            let device: Rc<dyn Disk> = Rc::new(Unchanged(MemoryDisk::new(1000)));
            // 0..10 stays, 10..20 lies elsewhere, 20..30 is new, 30..40 was unmapped, the rest was never there.
            let now = list(&[(0, 10, 100), (10, 10, 500), (20, 10, 600)]);
            let before = list(&[(0, 20, 100), (30, 10, 700)]);
            let seen = SeenThrough::new(Rc::clone(&disk), Rc::clone(&device), now.clone(), Some(before));
            let mut out = Extents::with_limit(100);
            seen.status(Sector(0), 100, Some(SINCE), &mut out).await.unwrap();
            let told: Vec<_> = out.iter().map(|e| (e.at.0, e.count, e.kind, e.changed)).collect();
            let expected = [
                (0, 10, Kind::Data, false),
                (10, 20, Kind::Data, true),
                (30, 10, Kind::Hole, true),
                (40, 60, Kind::Hole, false),
            ];
            assert_eq!(told, expected);
            let unknown = SeenThrough::new(disk, device, now, None);
            out.clear();
            let answer = unknown.status(Sector(0), 100, Some(SINCE), &mut out).await;
            assert!(matches!(answer, Err(DiskError::UnknownGeneration)), "r45: never an empty set");
        });
    }

    #[test]
    fn the_golden_block_list_is_read_and_still_made() {
        let made = list(&[(0, 10, 100), (10, 5, 7), (2048, 1 << 40, 1 << 33)]);
        let golden = crate::tests::golden("block-list-1.bin", &made.encode());
        assert_eq!(BlockList::decode(&golden).unwrap(), made);
        assert_eq!(made.encode(), golden, "the format changed");
        let mut newer = golden;
        newer[7] = b'2';
        let refused = BlockList::decode(&newer).unwrap_err();
        assert_eq!(refused, ListError::Newer { found: 2 });
        let said = refused.to_string();
        assert!(said.contains("format 2") && said.contains("up to 1"), "{said}");
    }

    #[test]
    fn r45_lists_that_are_damaged_are_no_lists() {
        let good = list(&[(0, 10, 100), (10, 5, 7)]).encode();
        assert_eq!(BlockList::decode(&good).unwrap().encode(), good);
        for bad in [&good[1..], &good[..good.len() - 1], b"", &list(&[(5, 10, 0), (0, 5, 9)]).encode()] {
            assert!(BlockList::decode(bad).is_err());
        }
        assert!(BlockList::decode(&list(&[(u64::MAX, 2, 0)]).encode()).is_err());
    }

    /// Whether a sector is told as changed, by the definition.
    fn by_definition(now: &BlockList, before: &BlockList, at: u64) -> (Kind, bool) {
        match (now.find(at).0, before.find(at).0) {
            (None, None) => (Kind::Hole, false),
            (None, Some(_)) => (Kind::Hole, true),
            (Some(place), old) => (Kind::Data, old != Some(place)),
        }
    }

    fn any_list() -> impl Strategy<Value = BlockList> {
        // Few places, so that runs of two lists often lie on top of each other.
        let run = (0..6u64, 1..8u64, 0..4u64);
        proptest::collection::vec(run, 0..12).prop_map(|pieces| {
            let (mut runs, mut at) = (Vec::new(), 0);
            for (gap, count, place) in pieces {
                runs.push(Run { at: at + gap, count, place: at + gap + place * 100 });
                at += gap + count;
            }
            BlockList { runs }
        })
    }

    proptest! {
        #[test]
        fn r43_a_sector_is_unchanged_only_in_its_old_place_or_in_a_hole_that_was_one(
            now in any_list(), before in any_list(),
        ) {
            let told = lane::block_on(async {
                let disk: Rc<dyn Disk> = Rc::new(MemoryDisk::new(200));
                let device: Rc<dyn Disk> = Rc::new(Unchanged(MemoryDisk::new(1000)));
                let seen = SeenThrough::new(disk, device, now.clone(), Some(before.clone()));
                let mut out = Extents::with_limit(1000);
                seen.status(Sector(0), 200, Some(SINCE), &mut out).await.unwrap();
                out.iter().flat_map(|e| (0..e.count).map(|_| (e.kind, e.changed))).collect::<Vec<_>>()
            });
            let expected: Vec<_> = (0..200).map(|at| by_definition(&now, &before, at)).collect();
            prop_assert_eq!(told, expected);
        }

        #[test]
        fn fuzz_any_bytes_are_a_list_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut whole = b"KGMBLKS1".to_vec();
            whole.extend(bytes);
            if let Ok(list) = BlockList::decode(&whole) {
                prop_assert_eq!(list.encode(), whole);
            }
        }
    }
}
