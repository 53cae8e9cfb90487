//! The devices as one volume. Other than [`crate::Space`] it does not refuse tables that contradict each other.

use std::rc::Rc;

use block::{Disk, DiskError, SECTOR_BYTES, Safe, Sector, Segments, SegmentsMut};

/// A part of the volume that lies in one piece on one device.
#[derive(Copy, Clone, Debug)]
pub(super) struct Piece {
    /// Where it begins in the volume.
    pub volume_at: u64,
    /// Its length.
    pub bytes: u64,
    /// Index of the device.
    pub device: usize,
    /// Where it begins on the device.
    pub device_at: u64,
}

/// Maps volume offsets to devices. Pieces are in order, without gap or overlap.
pub(super) struct Span {
    pub devices: Vec<Rc<dyn Disk>>,
    pub pieces: Vec<Piece>,
}

impl Span {
    /// Length of the volume.
    pub fn bytes(&self) -> u64 {
        self.pieces.last().map_or(0, |piece| piece.volume_at + piece.bytes)
    }

    fn find(&self, at: u64) -> Option<(&Rc<dyn Disk>, u64, u64)> {
        let index = self.pieces.partition_point(|piece| piece.volume_at + piece.bytes <= at);
        let piece = self.pieces.get(index)?;
        let inside = at.checked_sub(piece.volume_at)?;
        Some((self.devices.get(piece.device)?, piece.device_at + inside, piece.bytes - inside))
    }

    /// Reads whole sectors at a volume offset.
    pub async fn read(&self, at: u64, into: &mut [u8]) -> Result<(), DiskError> {
        let (mut at, mut rest) = (at, into);
        while !rest.is_empty() {
            let (disk, device_at, room) = self.find(at).ok_or(DiskError::OutOfRange)?;
            let count = (rest.len() as u64).min(room) as usize;
            let (head, tail) = rest.split_at_mut(count);
            disk.read(sector(device_at)?, &SegmentsMut::new(head)).await?;
            at += count as u64;
            rest = tail;
        }
        Ok(())
    }

    /// Reads `length` bytes.
    pub async fn get(&self, at: u64, length: usize) -> Result<Vec<u8>, DiskError> {
        let mut bytes = vec![0; length];
        self.read(at, &mut bytes).await?;
        Ok(bytes)
    }

    /// Writes one sector, which is atomic.
    pub async fn write_sector(&self, at: u64, bytes: &[u8; 512]) -> Result<(), DiskError> {
        let (disk, device_at, _) = self.find(at).ok_or(DiskError::OutOfRange)?;
        disk.write(sector(device_at)?, &Segments::new(bytes), Safe::AtNextFlush).await
    }

    /// Makes everything written durable.
    pub async fn flush(&self) -> Result<(), DiskError> {
        for disk in &self.devices {
            disk.flush().await?;
        }
        Ok(())
    }
}

fn sector(at: u64) -> Result<Sector, DiskError> {
    if at.is_multiple_of(SECTOR_BYTES) { Ok(Sector::at_byte(at)) } else { Err(DiskError::OutOfRange) }
}
