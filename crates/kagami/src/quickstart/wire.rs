//! The quickstart's side of NBD: exports of the daemon as disks of this process.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use block::{Buffer, Disk, DiskError, Safe, Sector, Segments, SegmentsMut};
use front::nbd::client::{Client, Options};

use super::sequence::{RING_BLOCKS, ring_at};
use crate::problem::{Outcome, Problem};

/// Bytes moved at a time.
const STEP: usize = 1 << 20;

/// Connects to an export. On a lane.
pub async fn connect(socket: &Path, export: &str) -> Outcome<Rc<Client>> {
    let failed = |e: String| Problem::failed("KGM-QST-0001", format!("cannot reach export \"{export}\""), e);
    let stream = lane::net::Stream::connect_unix(socket).await.map_err(|e| failed(e.to_string()))?;
    let options = Options { export: export.to_owned(), ..Options::default() };
    Client::connect(front::nbd::Wire::Socket(stream), &options).await.map_err(|e| failed(e.to_string()))
}

fn io(export: &str) -> impl Fn(DiskError) -> Problem {
    move |e| Problem::failed("KGM-QST-0002", format!("export \"{export}\" failed"), e)
}

/// Fills a disk from its start with what looks like a file system's content: text that compresses, blocks that repeat,
/// blocks that do neither. `bytes` is a multiple of 1 MiB.
pub async fn populate(socket: PathBuf, export: String, bytes: u64, seed: u64) -> Outcome {
    let disk = connect(&socket, &export).await?;
    let mut state = seed | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut buffer = Buffer::zeroed(STEP);
    for at in (0..bytes).step_by(STEP) {
        for block in buffer.chunks_exact_mut(4096) {
            match next() % 8 {
                0..4 => {
                    for (index, line) in block.chunks_exact_mut(64).enumerate() {
                        let text = format!(
                            "{:016x} record {index:4} of table {:04x}, value ........",
                            next(),
                            at >> 20
                        );
                        line.fill(b'.');
                        line[..text.len().min(64)].copy_from_slice(&text.as_bytes()[..text.len().min(64)]);
                    }
                }
                4..6 => block.fill(b'#'),
                _ => block.as_chunks_mut::<8>().0.iter_mut().for_each(|word| *word = next().to_le_bytes()),
            }
        }
        let write = disk.write(Sector::at_byte(at), &Segments::new(&buffer), Safe::AtNextFlush).await;
        write.map_err(io(&export))?;
    }
    disk.flush().await.map_err(io(&export))?;
    disk.disconnect().await;
    Ok(())
}

/// Reads the writer's ring of an export.
pub async fn ring(socket: PathBuf, export: String) -> Outcome<Vec<u8>> {
    let disk = connect(&socket, &export).await?;
    let mut bytes = vec![0; (RING_BLOCKS * block::BLOCK_BYTES) as usize];
    let at = ring_at(disk.shape().bytes());
    for (index, piece) in bytes.chunks_mut(STEP).enumerate() {
        let at = Sector::at_byte(at + (index * STEP) as u64);
        disk.read(at, &SegmentsMut::new(piece)).await.map_err(io(&export))?;
    }
    disk.disconnect().await;
    Ok(bytes)
}

/// What comparing two exports found.
#[derive(Clone, Debug)]
pub struct Compared {
    /// Length of both in bytes.
    pub bytes: u64,
    /// BLAKE3 of the whole content, hex; equal on both sides when they are.
    pub hashes: [String; 2],
    /// First byte that differs.
    pub differs_at: Option<u64>,
}

/// Reads two exports whole and compares them byte for byte.
pub async fn compare(socket: PathBuf, one: String, other: String) -> Outcome<Compared> {
    let disks = [connect(&socket, &one).await?, connect(&socket, &other).await?];
    let bytes = disks[0].shape().bytes();
    if bytes != disks[1].shape().bytes() {
        return Err(Problem::failed(
            "KGM-QST-0003",
            "the copies differ",
            format!("{one} and {other} differ in length"),
        ));
    }
    let mut hashes = [blake3::Hasher::new(), blake3::Hasher::new()];
    let mut buffers = [Buffer::zeroed(STEP), Buffer::zeroed(STEP)];
    let mut differs_at = None;
    let mut at = 0;
    while at < bytes {
        let count = (bytes - at).min(STEP as u64) as usize;
        for ((disk, buffer), name) in disks.iter().zip(&mut buffers).zip([&one, &other]) {
            let into = SegmentsMut::new(&mut buffer[..count]);
            disk.read(Sector::at_byte(at), &into).await.map_err(io(name))?;
        }
        if differs_at.is_none() && buffers[0][..count] != buffers[1][..count] {
            let inside = buffers[0].iter().zip(buffers[1].iter()).position(|(a, b)| a != b).unwrap_or(0);
            differs_at = Some(at + inside as u64);
        }
        for (hash, buffer) in hashes.iter_mut().zip(&buffers) {
            hash.update(&buffer[..count]);
        }
        at += count as u64;
    }
    for disk in disks {
        disk.disconnect().await;
    }
    Ok(Compared { bytes, hashes: hashes.map(|h| h.finalize().to_hex().to_string()), differs_at })
}
