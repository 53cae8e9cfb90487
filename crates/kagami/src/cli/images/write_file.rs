//! A stream into a file on a volume, sparse: blocks of zeroes get no room.

use block::{Buffer, Disk, SECTOR_BYTES, Safe, Sector, Segments};
use vmfs::{Content, Layout, NewFile, Volume};

/// Files up to this length are written as a whole, so that they may lie in sub-blocks, and replace an older one.
const SMALL: u64 = 64 << 10;
/// Bytes moved at a time: one file block.
const STEP: u64 = 1 << 20;

/// Which side failed.
#[derive(Debug)]
pub enum Fault {
    /// The stream.
    Source(std::io::Error),
    /// The volume.
    Volume(vmfs::Error),
}

impl From<vmfs::Error> for Fault {
    fn from(error: vmfs::Error) -> Self {
        Self::Volume(error)
    }
}

/// Writes `length` bytes that `read` fills in, piece by piece, to a new file at `path` (a small one replaces a file
/// that is there). A failure leaves no file of that name that was not there before.
pub async fn write(
    volume: &Volume,
    path: &str,
    length: u64,
    read: &mut dyn FnMut(&mut [u8]) -> std::io::Result<()>,
) -> Result<(), Fault> {
    if length <= SMALL {
        let mut bytes = vec![0; length as usize];
        read(&mut bytes).map_err(Fault::Source)?;
        volume.write_file(path, &bytes).await?;
        return Ok(volume.close().await?);
    }
    let written = large(volume, path, length, read).await;
    if let Err(fault) = &written
        && !matches!(fault, Fault::Volume(vmfs::Error::Exists { .. }))
    {
        // Half a file would be taken for the file.
        volume.remove(path).await?;
    }
    volume.close().await?;
    written
}

async fn large(
    volume: &Volume,
    path: &str,
    length: u64,
    read: &mut dyn FnMut(&mut [u8]) -> std::io::Result<()>,
) -> Result<(), Fault> {
    let file = volume.create_file(path, NewFile { length, layout: Layout::Thin, grows_to: 0 }).await?;
    let devices = volume.space().devices().to_vec();
    let mut buffer = Buffer::zeroed(STEP as usize);
    for at in (0..length).step_by(STEP as usize) {
        let bytes = (length - at).min(STEP);
        let sectors = bytes.div_ceil(SECTOR_BYTES);
        let whole = (sectors * SECTOR_BYTES) as usize;
        buffer[..whole].fill(0);
        read(&mut buffer[..bytes as usize]).map_err(Fault::Source)?;
        if lane::memory::is_zero(&buffer[..whole]) {
            continue;
        }
        let allocation = file.allocate(Sector(at / SECTOR_BYTES), sectors).await?;
        let mut done = 0;
        for place in allocation.places() {
            let count = (place.count * SECTOR_BYTES) as usize;
            if let Content::Data { device, at } = place.content {
                let from = Segments::new(&buffer[done..done + count]);
                let write = devices[device].write(at, &from, Safe::AtNextFlush).await;
                write.map_err(vmfs::Error::from)?;
            }
            done += count;
        }
        allocation.commit()?;
    }
    Ok(file.flush().await?)
}
