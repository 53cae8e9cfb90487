//! A writer at work: takes content, stores what is new in frames of packs, and makes all of it findable at the end.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use uuid::Uuid;

use crate::Error;
use crate::chunk::{ChunkId, Location};
use crate::format::{AREA_BYTES, FRAME_BYTES, MAX_FRAME_BYTES};
use crate::index::Index;
use crate::manifest::MANIFESTS;
use crate::pack::{Afterwards, PACKS, PackWriter};
use crate::segment::INDEX;
use crate::store::Store;

const LOCK: &str = "lock";
/// Level 2 in frames of 512 KiB packs VM disks tighter than level 3 in chunks of 64 KiB, at twice its speed.
const LEVEL: i32 = 2;
/// The level of the trial that tells whether suspicious content packs at all.
const TRIAL_LEVEL: i32 = -7;

/// The right to write, held by one process at a time and given up by the kernel when it dies.
pub(crate) struct WriterLock {
    file: File,
}

impl WriterLock {
    /// Takes the lock or says who has it. `doing` is what others are told.
    pub fn take(store: &Store, doing: &str) -> Result<Self, Error> {
        let path = store.path(Path::new(LOCK));
        let fail = |e| Error::io("locking", &path, e);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(fail)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => {
                let mut holder = String::new();
                file.take(4096).read_to_string(&mut holder).map_err(fail)?;
                let holder = match holder.trim() {
                    "" => "another process".to_owned(),
                    known => known.to_owned(),
                };
                return Err(Error::Locked { holder });
            }
            Err(std::fs::TryLockError::Error(e)) => return Err(fail(e)),
        }
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let (pid, since) = (std::process::id(), jiff::Timestamp::now());
        let text = format!("{doing}, process {pid} on {}, since {since:.0}\n", host.trim());
        file.set_len(0).and_then(|()| file.write_all(text.as_bytes())).map_err(fail)?;
        Ok(Self { file })
    }
}

impl Drop for WriterLock {
    fn drop(&mut self) {
        // The name of a holder that is gone would only mislead.
        let _ = self.file.set_len(0);
    }
}

/// What kind of frame a chunk goes to.
#[derive(Copy, Clone, PartialEq, Eq)]
enum Class {
    /// Packs well: frames of 512 KiB, compressed together.
    Loose,
    /// Does not pack: stored as it is, so any part is read by itself.
    Dense,
    /// Nodes of trees: hashes do not pack, and walking trees should not read data.
    Node,
}

/// Chunks on their way into one frame.
#[derive(Default)]
struct Gathering {
    bytes: Vec<u8>,
    chunks: Vec<(ChunkId, u32)>,
}

/// What a session has written.
#[derive(Default)]
pub(crate) struct Written {
    /// Bytes of chunks that were new, before compression.
    pub new_bytes: AtomicU64,
    /// Bytes of frames.
    pub stored_bytes: AtomicU64,
    /// Chunks that were new.
    pub new_chunks: AtomicU64,
}

/// A writer at work. Threads share it.
pub(crate) struct Session {
    index: Arc<Index>,
    packs: PackWriter,
    gathering: [Mutex<Gathering>; 3],
    compressors: Mutex<Vec<zstd::bulk::Compressor<'static>>>,
    trials: Mutex<Vec<zstd::bulk::Compressor<'static>>>,
    pub written: Written,
    /// Stored since packs were last settled.
    unsettled_bytes: AtomicU64,
    _lock: WriterLock,
}

impl Session {
    /// Begins: clears away what an earlier writer left unfinished and makes the index complete.
    pub fn begin(
        store: &Store,
        repository: Uuid,
        index: Arc<Index>,
        lock: WriterLock,
        pack_bytes: Option<u64>,
    ) -> Result<Self, Error> {
        for directory in [PACKS, INDEX, MANIFESTS, ""] {
            let directory = Path::new(directory);
            for name in store.list(directory)?.iter().filter(|n| n.ends_with(".tmp")) {
                store.remove(&directory.join(name))?;
            }
        }
        index.recover()?;
        let sealed = {
            let index = Arc::clone(&index);
            Arc::new(move |pack| index.sealed(pack)) as crate::pack::Sealed
        };
        Ok(Self {
            packs: PackWriter::new(store.clone(), repository, pack_bytes, sealed),
            index,
            gathering: Default::default(),
            compressors: Mutex::default(),
            trials: Mutex::default(),
            written: Written::default(),
            unsettled_bytes: AtomicU64::new(0),
            _lock: lock,
        })
    }

    /// Stores a piece of a disk or file unless it is there, and names it.
    pub fn store(&self, content: &[u8]) -> Result<ChunkId, Error> {
        let id = ChunkId::of(content);
        self.store_as(id, content)?;
        Ok(id)
    }

    /// As [`Session::store`], for content whose name is known.
    pub fn store_as(&self, id: ChunkId, content: &[u8]) -> Result<(), Error> {
        if self.index.claim(id)? { self.store_again(id, content) } else { Ok(()) }
    }

    /// The chunk is there, or on its way.
    pub fn has(&self, id: &ChunkId) -> Result<bool, Error> {
        self.index.known(id)
    }

    /// Stores a tree node.
    pub fn store_node(&self, node: &[u8]) -> Result<ChunkId, Error> {
        let id = ChunkId::of(node);
        if self.index.claim(id)? {
            self.gather(Class::Node, id, node)?;
        }
        Ok(id)
    }

    /// Stores a chunk anew wherever else it is: for moving it out of a pack.
    pub fn store_again(&self, id: ChunkId, content: &[u8]) -> Result<(), Error> {
        let dense = looks_like_noise(content) && !packs(&self.trials, content)?;
        self.gather(if dense { Class::Dense } else { Class::Loose }, id, content)
    }

    fn gather(&self, class: Class, id: ChunkId, content: &[u8]) -> Result<(), Error> {
        assert!(content.len() as u64 <= AREA_BYTES, "no chunk is longer than an area");
        self.written.new_chunks.fetch_add(1, Ordering::Relaxed);
        self.written.new_bytes.fetch_add(content.len() as u64, Ordering::Relaxed);
        let full = {
            let mut open = self.gathering[class as usize].lock().unwrap_or_else(|e| e.into_inner());
            if open.bytes.capacity() == 0 {
                open.bytes.reserve_exact(FRAME_BYTES + AREA_BYTES as usize);
            }
            open.bytes.extend_from_slice(content);
            open.chunks.push((id, content.len() as u32));
            (open.bytes.len() >= FRAME_BYTES).then(|| std::mem::take(&mut *open))
        };
        full.map_or(Ok(()), |frame| self.write_frame(class, &frame))
    }

    fn write_frame(&self, class: Class, frame: &Gathering) -> Result<(), Error> {
        let packed = if class == Class::Loose { self.compress(&frame.bytes)? } else { None };
        let stored = packed.as_deref().unwrap_or(&frame.bytes);
        let raw = frame.bytes.len() as u32;
        assert!(raw <= MAX_FRAME_BYTES, "a frame is closed before it is too long");
        let frame_stored = stored.len() as u32;
        self.written.stored_bytes.fetch_add(u64::from(frame_stored), Ordering::Relaxed);
        self.unsettled_bytes.fetch_add(u64::from(frame_stored), Ordering::Relaxed);
        self.packs.append(stored, raw, &frame.chunks, |pack, frame_at| {
            let mut inside_at = 0;
            for (id, length) in &frame.chunks {
                let at =
                    Location { pack, frame_at, frame_stored, frame_raw: raw, inside_at, length: *length };
                self.index.place(*id, at);
                inside_at += length;
            }
        })
    }

    /// Compresses; `None` when it does not get smaller.
    fn compress(&self, bytes: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        let packed = compress(&self.compressors, LEVEL, bytes)?;
        Ok((packed.len() < bytes.len()).then_some(packed))
    }

    /// Makes everything stored so far durable and findable.
    pub fn finish(&self) -> Result<(), Error> {
        self.write_gathered()?;
        self.packs.finish()?;
        self.index.spill()
    }

    /// Sends everything stored so far on its way to the medium, and does `afterwards` when it is there. Goes on beside
    /// what is stored meanwhile.
    pub fn settle(&self, afterwards: Afterwards) -> Result<(), Error> {
        self.unsettled_bytes.store(0, Ordering::Relaxed);
        self.write_gathered()?;
        self.packs.seal_and_then(afterwards)
    }

    /// What was stored since [`Session::settle`] fills a pack, nearly, and much of it is not in a sealed one: to settle now
    /// makes hardly more packs than there are anyway, and none that holds little but nodes of a tree in the making.
    pub fn fills_a_pack(&self) -> bool {
        let target = self.packs.target_bytes();
        let nearly = target - (target / 32).min(2 * FRAME_BYTES as u64);
        if self.unsettled_bytes.load(Ordering::Relaxed) < nearly {
            return false;
        }
        let gathered = |class| locked(&self.gathering[class as usize]).bytes.len() as u64;
        self.packs.open_bytes() + gathered(Class::Loose) + gathered(Class::Dense) >= target / 2
    }

    fn write_gathered(&self) -> Result<(), Error> {
        for class in [Class::Loose, Class::Dense, Class::Node] {
            let frame = std::mem::take(&mut *locked(&self.gathering[class as usize]));
            if !frame.chunks.is_empty() {
                self.write_frame(class, &frame)?;
            }
        }
        Ok(())
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Drop for Session {
    fn drop(&mut self) {
        self.index.forget_pending();
    }
}

/// Compresses with a compressor of the pool: making one costs as much as compressing some 20 KiB.
fn compress(
    pool: &Mutex<Vec<zstd::bulk::Compressor<'static>>>,
    level: i32,
    bytes: &[u8],
) -> Result<Vec<u8>, Error> {
    let fail = |e| Error::io("compressing for", Path::new(PACKS), e);
    let known = pool.lock().unwrap_or_else(|e| e.into_inner()).pop();
    let mut compressor = match known {
        Some(compressor) => compressor,
        None => zstd::bulk::Compressor::new(level).map_err(fail)?,
    };
    let packed = compressor.compress(bytes).map_err(fail)?;
    pool.lock().unwrap_or_else(|e| e.into_inner()).push(compressor);
    Ok(packed)
}

/// A fast trial on the whole content: noise costs a tenth of compressing it for nothing.
fn packs(pool: &Mutex<Vec<zstd::bulk::Compressor<'static>>>, content: &[u8]) -> Result<bool, Error> {
    Ok(compress(pool, TRIAL_LEVEL, content)?.len() <= content.len() - content.len() / 32)
}

/// A sample of the content has no skew: compression may not help.
fn looks_like_noise(content: &[u8]) -> bool {
    const SAMPLE: usize = 2048;
    if content.len() < SAMPLE {
        return false;
    }
    let mut counts = [0u32; 256];
    let step = content.len() / (SAMPLE / 64);
    for part in content.chunks(step) {
        for byte in part.iter().take(64) {
            counts[usize::from(*byte)] += 1;
        }
    }
    // The chance that two sampled bytes are equal: 1/256 for noise, 1/180 and up for what has any skew.
    let total: u64 = counts.iter().map(|c| u64::from(*c)).sum();
    let pairs: u64 = counts.iter().map(|c| u64::from(*c) * u64::from(*c)).sum();
    (pairs - total.min(pairs)) * 220 <= total * total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_dense_and_text_is_not() {
        let pool = Mutex::default();
        let is_dense = |content: &[u8]| looks_like_noise(content) && !packs(&pool, content).unwrap();
        let mut noise = vec![0; 65536];
        blake3::Hasher::new().update(b"noise").finalize_xof().fill(&mut noise);
        assert!(is_dense(&noise));
        assert!(is_dense(&noise[..4096]));
        let twice = [&noise[..4096], &noise[..4096]].concat();
        assert!(!is_dense(&twice), "repeated noise packs");
        let text: Vec<u8> = b"the quick brown fox ".iter().copied().cycle().take(65536).collect();
        assert!(!is_dense(&text));
        assert!(!is_dense(&[0; 4096]));
    }
}
