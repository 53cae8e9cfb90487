//! The media of a pool as one row of grains.

use std::cell::Cell;
use std::rc::Rc;

use block::{Disk, DiskError, Safe, Sector, Segments, SegmentsMut};

use crate::format::{GRAIN_BYTES, Head, RawMedium};

/// One medium and its place in the row.
pub struct Medium {
    /// Where the bytes go.
    pub disk: Rc<dyn Disk>,
    /// Its first grain in the pool's numbering.
    pub first: u64,
    /// Grains on it.
    pub grains: u64,
    /// Local grain where its bitmap begins.
    pub bitmap_grain: u64,
    /// Local grains at its start that hold no data.
    pub reserved: u64,
    /// Writes that have returned.
    written: Cell<u64>,
    /// Of these, the ones that a finished flush covers.
    flushed: Cell<u64>,
}

/// All media of a pool.
pub struct MediaSet {
    /// In the order of the head's table.
    pub list: Vec<Medium>,
}

impl MediaSet {
    /// Joins disks (in the order of the table) with what the head says of them.
    pub fn new(disks: Vec<Rc<dyn Disk>>, head: &Head) -> Self {
        let join = |(disk, raw): (Rc<dyn Disk>, &RawMedium)| Medium {
            disk,
            first: raw.first_grain.get(),
            grains: raw.grains.get(),
            bitmap_grain: raw.bitmap_grain.get(),
            reserved: raw.reserved_grains.get(),
            written: Cell::new(1),
            flushed: Cell::new(0),
        };
        Self { list: disks.into_iter().zip(&head.table).map(join).collect() }
    }

    /// Grains of all media.
    pub fn grains(&self) -> u64 {
        self.list.iter().map(|m| m.grains).sum()
    }

    /// The medium that holds a grain.
    #[inline]
    pub fn medium_of(&self, grain: u64) -> Option<usize> {
        self.list.iter().position(|m| grain.wrapping_sub(m.first) < m.grains)
    }

    /// Where a byte of the row lies: medium and sector. `length` bytes from there must be on one medium.
    #[inline]
    fn place(&self, byte: u64, length: usize) -> Result<(&Medium, Sector), DiskError> {
        let grain = byte / GRAIN_BYTES;
        let medium = self.medium_of(grain).ok_or(DiskError::OutOfRange)?;
        let medium = &self.list[medium];
        let local = byte - medium.first * GRAIN_BYTES;
        if local + length as u64 > medium.grains * GRAIN_BYTES {
            return Err(DiskError::OutOfRange);
        }
        Ok((medium, Sector::at_byte(local)))
    }

    /// Reads from a byte of the row.
    #[inline]
    pub async fn read(&self, byte: u64, into: &SegmentsMut<'_>) -> Result<(), DiskError> {
        let (medium, at) = self.place(byte, into.len())?;
        medium.disk.read(at, into).await
    }

    /// Writes at a byte of the row.
    #[inline]
    pub async fn write(&self, byte: u64, from: &Segments<'_>, safe: Safe) -> Result<(), DiskError> {
        let (medium, at) = self.place(byte, from.len())?;
        let answer = medium.disk.write(at, from, safe).await;
        medium.written.set(medium.written.get() + 1);
        answer
    }

    /// Says that bytes of the row (on one medium) are not needed any more. A hint; nothing relies on it being durable.
    pub async fn unmap(&self, byte: u64, bytes: u64) -> Result<(), DiskError> {
        let (medium, at) = self.place(byte, bytes as usize)?;
        medium.disk.unmap(at, bytes / block::SECTOR_BYTES).await
    }

    /// Makes durable what returned before: every medium that was written since, at the same time. Flushes that run
    /// at the same time do not rely on each other.
    pub async fn flush(&self) -> Result<(), DiskError> {
        let wanting = || self.list.iter().filter(|m| m.flushed.get() != m.written.get());
        let mut all = wanting();
        match (all.next(), all.next()) {
            (None, _) => Ok(()),
            (Some(one), None) => one.flush().await,
            _ => {
                let under_way = wanting().map(|m| Box::pin(m.flush()) as block::Io<'_>).collect();
                together(under_way).await.into_iter().fold(Ok(()), Result::and)
            }
        }
    }
}

impl Medium {
    async fn flush(&self) -> Result<(), DiskError> {
        let upto = self.written.get();
        self.disk.flush().await?;
        self.flushed.set(self.flushed.get().max(upto));
        Ok(())
    }
}

/// Runs operations at the same time and waits for all of them.
pub async fn together<T>(mut list: Vec<block::Io<'_, T>>) -> Vec<Result<T, DiskError>> {
    let mut answers: Vec<Option<Result<T, DiskError>>> = list.iter().map(|_| None).collect();
    std::future::poll_fn(|cx| {
        let mut waiting = false;
        for (operation, answer) in list.iter_mut().zip(&mut answers) {
            if answer.is_none() {
                match operation.as_mut().poll(cx) {
                    std::task::Poll::Ready(value) => *answer = Some(value),
                    std::task::Poll::Pending => waiting = true,
                }
            }
        }
        if waiting { std::task::Poll::Pending } else { std::task::Poll::Ready(()) }
    })
    .await;
    answers.into_iter().flatten().collect()
}
