//! Reads chunks: finds them by the index, unpacks their frame, and believes the content only when its hash is the
//! chunk's name. Any number of threads, beside a writer and beside a prune.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::Error;
use crate::cache::Cache;
use crate::chunk::{ChunkId, Location};
use crate::error::corrupt;
use crate::index::Index;
use crate::pack::pack_name;
use crate::store::Store;
use crate::tree::Node;

/// Unpacked frames kept: 48 MiB, whatever the size of the repository.
const FRAME_CACHE_BYTES: usize = 48 << 20;
/// Tree nodes kept, counted at their encoded length: some 16 MiB.
const NODE_CACHE_BYTES: usize = 8 << 20;
/// Pack files kept open.
const OPEN_PACKS: usize = 64;

/// Content of a chunk: part of a shared frame.
#[derive(Clone)]
pub(crate) struct Content {
    frame: Arc<Vec<u8>>,
    range: Range<usize>,
}

impl std::ops::Deref for Content {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.frame[self.range.clone()]
    }
}

/// What reading has cost so far.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Reads {
    /// Chunks that were asked for, nodes of trees among them.
    pub chunks: u64,
    /// Bytes read from packs.
    pub bytes: u64,
    /// Packs opened.
    pub packs: u64,
}

#[derive(Default)]
struct Counters {
    chunks: AtomicU64,
    bytes: AtomicU64,
    packs: AtomicU64,
}

/// Unpacked frames by pack and offset.
type Frames = Cache<(u64, u32), Arc<Vec<u8>>>;

/// Reads chunks.
pub(crate) struct Reader {
    store: Store,
    pub index: Arc<Index>,
    files: Mutex<Cache<u64, Arc<File>>>,
    frames: Mutex<Frames>,
    nodes: Mutex<Cache<ChunkId, Arc<Node>>>,
    counters: Counters,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Reader {
    pub fn new(store: Store, index: Arc<Index>) -> Self {
        Self {
            store,
            index,
            files: Mutex::new(Cache::new(OPEN_PACKS)),
            frames: Mutex::new(Cache::new(FRAME_CACHE_BYTES)),
            nodes: Mutex::new(Cache::new(NODE_CACHE_BYTES)),
            counters: Counters::default(),
        }
    }

    /// What reading has cost so far.
    pub fn reads(&self) -> Reads {
        let Counters { chunks, bytes, packs } = &self.counters;
        let now = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Reads { chunks: now(chunks), bytes: now(bytes), packs: now(packs) }
    }

    /// The content of a chunk, its hash checked. A chunk that a prune has moved is looked for again.
    pub fn chunk(&self, id: &ChunkId) -> Result<Content, Error> {
        let mut first = self.index.find(id)?;
        if first.is_none() {
            self.index.refresh()?;
            first = self.index.find(id)?;
        }
        let at = first.ok_or_else(|| Error::MissingChunk { chunk: id.to_string() })?;
        match self.read(id, &at) {
            Err(e) if e.is_damage() => {
                self.index.refresh()?;
                let other = self.index.find_elsewhere(id, at.pack)?;
                other.map_or(Err(e), |at| self.read(id, &at))
            }
            other => other,
        }
    }

    /// Where the chunk is, without reading it; an error when it is nowhere.
    pub fn locate(&self, id: &ChunkId) -> Result<Location, Error> {
        self.index.find(id)?.ok_or_else(|| Error::MissingChunk { chunk: id.to_string() })
    }

    /// Reads one place and compares the hash.
    pub fn read(&self, id: &ChunkId, at: &Location) -> Result<Content, Error> {
        self.counters.chunks.fetch_add(1, Ordering::Relaxed);
        let (inside, length) = (at.inside_at as usize, at.length as usize);
        let content = if at.frame_stored == at.frame_raw {
            let start = u64::from(at.frame_at) + u64::from(at.inside_at);
            Content { frame: Arc::new(self.read_pack(at.pack, start, length)?), range: 0..length }
        } else {
            Content { frame: self.frame(at)?, range: inside..inside + length }
        };
        let found = ChunkId::of(&content);
        if found != *id {
            locked(&self.frames).remove(&(at.pack, at.frame_at));
            let place = u64::from(at.frame_at);
            return Err(corrupt(&pack_name(at.pack), "chunk", place, found, id));
        }
        Ok(content)
    }

    /// A compressed frame, unpacked.
    fn frame(&self, at: &Location) -> Result<Arc<Vec<u8>>, Error> {
        let key = (at.pack, at.frame_at);
        if let Some(frame) = locked(&self.frames).get(&key) {
            return Ok(frame);
        }
        let stored = self.read_pack(at.pack, u64::from(at.frame_at), at.frame_stored as usize)?;
        let raw = at.frame_raw as usize;
        let bad = |found: String| {
            corrupt(
                &pack_name(at.pack),
                "frame",
                u64::from(at.frame_at),
                found,
                format!("{raw} bytes, compressed"),
            )
        };
        let frame = zstd::bulk::decompress(&stored, raw).map_err(|e| bad(e.to_string()))?;
        if frame.len() != raw {
            return Err(bad(format!("{} bytes", frame.len())));
        }
        let frame = Arc::new(frame);
        locked(&self.frames).put(key, Arc::clone(&frame), raw);
        Ok(frame)
    }

    fn read_pack(&self, pack: u64, at: u64, length: usize) -> Result<Vec<u8>, Error> {
        let name = pack_name(pack);
        let open = locked(&self.files).get(&pack);
        let file = match open {
            Some(file) => file,
            None => {
                let file = Arc::new(self.store.open(&name)?);
                self.counters.packs.fetch_add(1, Ordering::Relaxed);
                locked(&self.files).put(pack, Arc::clone(&file), 1);
                file
            }
        };
        self.counters.bytes.fetch_add(length as u64, Ordering::Relaxed);
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, at).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => {
                corrupt(&name, "pack", at, "end of file", format!("{length} bytes"))
            }
            _ => Error::io("reading", &name, e),
        })?;
        Ok(bytes)
    }

    /// A node of a tree, checked.
    pub fn node(&self, id: &ChunkId, level: u8) -> Result<Arc<Node>, Error> {
        let known = locked(&self.nodes).get(id);
        if let Some(node) = known
            && node.level == level
        {
            return Ok(node);
        }
        let bytes = self.chunk(id)?;
        let node = Arc::new(Node::decode(&bytes, level).map_err(|found| {
            corrupt(
                std::path::Path::new(&id.to_string()),
                "tree node",
                0,
                found,
                format!("a node of level {level}"),
            )
        })?);
        locked(&self.nodes).put(*id, Arc::clone(&node), bytes.len());
        Ok(node)
    }
}
