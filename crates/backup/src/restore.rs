//! Restoring: into any disk, writing everything or only what differs; and comparing, which proves it.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use block::{Disk, DiskError, Extents, Kind, SECTOR_BYTES, Safe, Sector, Segments, SegmentsMut};
use lane::Buffer;

use crate::Error;
use crate::format::PIECE_BYTES;
use crate::manifest::Manifest;
use crate::progress::Progress;
use crate::repository::{Inner, Repository};
use crate::stretch::{PORTION_BYTES, Place, Portion};
use crate::tree::Entry;

/// What a restore did.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Restored {
    /// Bytes written to the target.
    pub written_bytes: u64,
    /// Bytes of the target made zero.
    pub zeroed_bytes: u64,
    /// Bytes of the target read to see whether they differ.
    pub compared_bytes: u64,
}

#[derive(Copy, Clone, PartialEq, Eq)]
enum How {
    Everything,
    Differences,
    Compare,
}

/// The outcome of one portion: what was done, and the first byte that differed when comparing.
type Done = (Restored, Option<u64>);

#[derive(Clone)]
struct Restore {
    inner: Arc<Inner>,
    place: Place,
    target: Rc<dyn Disk>,
    how: How,
    progress: Progress,
}

impl Repository {
    /// Writes a disk of a backup into `target`, which must be at least as long; what lies beyond stays as it is.
    /// With `only_differences` the target is read first and only pieces of 4 KiB that differ are written. Zero areas
    /// become zero by [`Disk::zero`], and only where the target holds data. Ends with a flush.
    pub async fn restore_into(
        &self,
        manifest: &Manifest,
        disk: &str,
        target: Rc<dyn Disk>,
        only_differences: bool,
        progress: &Progress,
    ) -> Result<Restored, Error> {
        let how = if only_differences { How::Differences } else { How::Everything };
        let (done, _) = self.go_over(manifest, disk, Rc::clone(&target), how, progress).await?;
        target.flush().await.map_err(|e| Error::disk(disk, 0, e))?;
        Ok(done)
    }

    /// Compares a disk of a backup with `target` byte by byte: the first byte that differs, if any (I7).
    pub async fn compare(
        &self,
        manifest: &Manifest,
        disk: &str,
        target: Rc<dyn Disk>,
        progress: &Progress,
    ) -> Result<Option<u64>, Error> {
        self.go_over(manifest, disk, target, How::Compare, progress).await.map(|(_, first)| first)
    }

    async fn go_over(
        &self,
        manifest: &Manifest,
        disk: &str,
        target: Rc<dyn Disk>,
        how: How,
        progress: &Progress,
    ) -> Result<Done, Error> {
        let record = manifest.disk(disk)?;
        let (have, need) = (target.shape().bytes(), record.length_bytes);
        if have < need {
            let text = format!("disk {disk} has {need} bytes, the target only {have}: make it larger first");
            return Err(Error::Refused(text));
        }
        progress.expect(need);
        let (inner, progress) = (Arc::clone(&self.inner), progress.clone());
        let restore = Restore { inner, place: Place::of(manifest, record), target, how, progress };
        let mut tasks = VecDeque::new();
        let mut total = (Restored::default(), None);
        let mut result = restore.send_all(&mut tasks, &mut total).await;
        // Portions under way are finished whatever happened: none may touch the target after this has returned.
        while let Some(task) = tasks.pop_front() {
            result = result.and(task.await.map(|done| add(&mut total, done)));
        }
        result.map(|()| total)
    }
}

fn add(total: &mut Done, (done, first): Done) {
    total.0.written_bytes += done.written_bytes;
    total.0.zeroed_bytes += done.zeroed_bytes;
    total.0.compared_bytes += done.compared_bytes;
    total.1 = match (total.1, first) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    };
}

type Tasks = VecDeque<lane::Task<Result<Done, Error>>>;

impl Restore {
    /// Plans, and keeps a few portions under way.
    async fn send_all(&self, tasks: &mut Tasks, total: &mut Done) -> Result<(), Error> {
        let at_once = std::thread::available_parallelism().map_or(2, |n| n.get().min(8)) + 2;
        let mut next = 0;
        while next < self.place.areas() {
            let (inner, place) = (Arc::clone(&self.inner), self.place.clone());
            let (portions, after) = lane::offload(move || place.plan(&inner.reader, next)).await?;
            next = after;
            for portion in portions {
                self.progress.check()?;
                let this = self.clone();
                tasks.push_back(lane::spawn(async move { this.portion(portion).await }));
                while tasks.len() >= at_once {
                    if let Some(task) = tasks.pop_front() {
                        add(total, task.await?);
                    }
                }
                if self.how == How::Compare && total.1.is_some() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn failed(&self, at: u64, error: DiskError) -> Error {
        Error::disk(&self.place.disk, at, error)
    }

    async fn portion(&self, portion: Portion) -> Result<Done, Error> {
        match portion {
            Portion::Zero(at, length) => {
                let done = self.zero(at, length).await?;
                self.progress.done(length);
                Ok(done)
            }
            Portion::Data(first, entries) => {
                let at = first * crate::format::AREA_BYTES;
                let content = self.load(first, entries).await?;
                let done = match self.how {
                    How::Everything => {
                        self.write(at, &content).await?;
                        let written_bytes = content.len() as u64;
                        (Restored { written_bytes, ..Restored::default() }, None)
                    }
                    How::Differences | How::Compare => self.differences(at, &content).await?,
                };
                self.progress.done(content.len() as u64);
                Ok(done)
            }
        }
    }

    async fn load(&self, first: u64, entries: Vec<Entry>) -> Result<Buffer, Error> {
        let (inner, place) = (Arc::clone(&self.inner), self.place.clone());
        lane::offload(move || place.load(&inner.reader, first, &entries)).await
    }

    async fn write(&self, at: u64, bytes: &[u8]) -> Result<(), Error> {
        let from = Segments::new(bytes);
        let result = self.target.write(Sector::at_byte(at), &from, Safe::AtNextFlush).await;
        result.map_err(|e| self.failed(at, e))?;
        self.progress.written(bytes.len() as u64);
        Ok(())
    }

    async fn read(&self, at: u64, into: &mut [u8]) -> Result<(), Error> {
        let count = into.len() as u64;
        let into = SegmentsMut::new(into);
        self.target.read(Sector::at_byte(at), &into).await.map_err(|e| self.failed(at, e))?;
        self.progress.read(count);
        Ok(())
    }

    /// Reads the target beside `content` and writes runs of pieces that differ, or tells the first byte.
    async fn differences(&self, at: u64, content: &[u8]) -> Result<Done, Error> {
        let mut there = Buffer::zeroed(content.len());
        self.read(at, &mut there).await?;
        let mut done = Restored { compared_bytes: content.len() as u64, ..Restored::default() };
        if self.how == How::Compare {
            let first = content.iter().zip(there.iter()).position(|(a, b)| a != b);
            return Ok((done, first.map(|f| at + f as u64)));
        }
        let piece = PIECE_BYTES as usize;
        let mut from = 0;
        while from < content.len() {
            let differing = content[from..].chunks(piece).zip(there[from..].chunks(piece));
            let run = differing.take_while(|(a, b)| a != b).count() * piece;
            let to = (from + run).min(content.len());
            if from < to {
                self.write(at + from as u64, &content[from..to]).await?;
                done.written_bytes += (to - from) as u64;
            }
            from = to.max(from + piece);
        }
        Ok((done, None))
    }

    /// Makes a stretch of the target zero where it is not, or tells the first byte that is not.
    async fn zero(&self, at: u64, length: u64) -> Result<Done, Error> {
        let mut total = (Restored::default(), None);
        let (mut sector, end) = (at / SECTOR_BYTES, (at + length) / SECTOR_BYTES);
        let mut extents = Extents::with_limit(256);
        while sector < end {
            extents.clear();
            let asked = self.target.status(Sector(sector), end - sector, None, &mut extents).await;
            asked.map_err(|e| self.failed(sector * SECTOR_BYTES, e))?;
            let Some(next) = extents.end().filter(|next| next.0 > sector) else {
                let stuck = std::io::Error::other("the disk says nothing of a range");
                return Err(self.failed(sector * SECTOR_BYTES, DiskError::Io(Arc::new(stuck))));
            };
            for extent in extents.iter().filter(|e| e.kind == Kind::Data) {
                self.progress.check()?;
                add(&mut total, self.zero_data(extent.at, extent.count).await?);
            }
            sector = next.0;
        }
        Ok(total)
    }

    /// As [`Restore::zero`], for sectors that hold data.
    async fn zero_data(&self, at: Sector, count: u64) -> Result<Done, Error> {
        if self.how == How::Everything {
            self.target.zero(at, count, true).await.map_err(|e| self.failed(at.bytes(), e))?;
            return Ok((Restored { zeroed_bytes: count * SECTOR_BYTES, ..Restored::default() }, None));
        }
        let mut total = (Restored::default(), None);
        let (mut from, end) = (at.bytes(), at.plus(count).bytes());
        let mut there = Buffer::zeroed(PORTION_BYTES.min((end - from) as usize));
        while from < end {
            let bytes = PORTION_BYTES.min((end - from) as usize);
            let there = &mut there[..bytes];
            self.read(from, there).await?;
            total.0.compared_bytes += bytes as u64;
            if self.how == How::Compare {
                if let Some(first) = there.iter().position(|b| *b != 0) {
                    total.1 = Some(from + first as u64);
                    return Ok(total);
                }
            } else {
                total.0.zeroed_bytes += self.zero_pieces(from, there).await?;
            }
            from += bytes as u64;
        }
        Ok(total)
    }

    /// Makes the pieces of the target zero that are not; `there` is what it holds from byte `at` on.
    async fn zero_pieces(&self, at: u64, there: &[u8]) -> Result<u64, Error> {
        let (mut from, mut zeroed_bytes) = (0, 0);
        while from < there.len() {
            let pieces = there[from..].chunks(PIECE_BYTES as usize);
            let run: usize = pieces.take_while(|p| !lane::memory::is_zero(p)).map(<[u8]>::len).sum();
            if run > 0 {
                let (start, sectors) = (at + from as u64, run as u64 / SECTOR_BYTES);
                let zeroed = self.target.zero(Sector::at_byte(start), sectors, true).await;
                zeroed.map_err(|e| self.failed(start, e))?;
                zeroed_bytes += run as u64;
            }
            from += run.max(PIECE_BYTES as usize);
        }
        Ok(zeroed_bytes)
    }
}
