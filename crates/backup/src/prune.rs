//! Giving space back: mark what the sealed backups need, move what is left of half-empty packs, drop the rest.
//!
//! Order: new packs durable, new index durable, only then old packs removed. A crash anywhere leaves chunks twice,
//! never not at all. Readers beside it look again when a pack has gone.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use crate::Error;
use crate::chunk::ChunkId;
use crate::format::{FANOUT, LEVELS};
use crate::pack::{PACKS, pack_name};
use crate::progress::Progress;
use crate::repository::Repository;
use crate::segment::Segment;
use crate::session::Session;
use crate::tree::Entry;

/// What a prune did, or would do.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Pruned {
    /// Packs there were.
    pub packs: u64,
    /// Packs removed.
    pub removed_packs: u64,
    /// Of these, packs whose used chunks were moved first.
    pub moved_packs: u64,
    /// Bytes of chunks moved, before compression.
    pub moved_bytes: u64,
    /// Bytes of pack files removed (new ones not deducted).
    pub removed_bytes: u64,
    /// Chunks that no backup needs, by count.
    pub unused_chunks: u64,
}

#[derive(Default)]
struct Usage {
    live_bytes: u64,
    dead_bytes: u64,
}

/// One bit per entry of the index.
struct Marks {
    segment: Arc<Segment>,
    bits: Vec<u64>,
}

impl Marks {
    /// Marks a chunk; true when it was not marked before.
    fn mark(&mut self, id: &ChunkId) -> Result<bool, Error> {
        let Some((position, _)) = self.segment.find(id)? else {
            return Err(Error::MissingChunk { chunk: id.to_string() });
        };
        let (word, bit) = (position as usize / 64, 1 << (position % 64));
        let new = self.bits[word] & bit == 0;
        self.bits[word] |= bit;
        Ok(new)
    }

    fn is_marked(&self, position: u64) -> bool {
        self.bits[position as usize / 64] & (1 << (position % 64)) != 0
    }
}

impl Repository {
    /// Gives back the space of removed backups and unfinished ones. With `only_look` nothing is removed. Blocks;
    /// needs a bit of memory for each chunk. Refused when a manifest or a tree cannot be read: what it needs is
    /// not known.
    pub fn prune(&self, only_look: bool, progress: &Progress) -> Result<Pruned, Error> {
        let session = self.begin("kagami backup prune")?;
        let packs = self.inner.store.list(Path::new(PACKS))?.len() as u64;
        let mut done = Pruned { packs, ..Pruned::default() };
        let Some(mut marks) = self.one_segment()? else { return Ok(done) };
        for listed in self.list()? {
            let manifest = listed.manifest?;
            for id in manifest.files.iter().flat_map(|f| &f.chunks) {
                marks.mark(id)?;
            }
            for root in manifest.disks.iter().filter_map(|d| d.root) {
                self.mark_tree(&mut marks, root, LEVELS - 1, progress)?;
            }
        }
        let (dropped, moved) = self.choose(&marks, &mut done, progress)?;
        if only_look || dropped.is_empty() {
            return Ok(done);
        }
        // What attempts that were cut off had stored is unused like anything else: they begin anew.
        crate::unfinished::forget_all(&self.inner.store, &session)?;
        self.move_chunks(&session, &marks, &moved, &mut done, progress)?;
        self.drop_packs(&dropped, &done)?;
        Ok(done)
    }

    /// Merges the index into one segment, so that an entry's position names a chunk. None when there are none.
    fn one_segment(&self) -> Result<Option<Marks>, Error> {
        let segments = self.inner.index.segments();
        if segments.len() > 1 {
            self.inner.index.replace(&segments, &HashSet::new())?;
        }
        let segments = self.inner.index.segments();
        Ok(segments.first().map(|segment| Marks {
            bits: vec![0; segment.entries.div_ceil(64) as usize],
            segment: Arc::clone(segment),
        }))
    }

    /// Marks a node and all it refers to. What is marked already has been gone through.
    fn mark_tree(&self, marks: &mut Marks, id: ChunkId, level: u8, progress: &Progress) -> Result<(), Error> {
        progress.check()?;
        if !marks.mark(&id)? {
            return Ok(());
        }
        let node = self.inner.reader.node(&id, level)?;
        debug_assert_eq!(node.entries.len(), FANOUT, "a node has all its entries");
        for entry in &node.entries {
            match entry {
                Entry::Whole(child) if level > 0 => self.mark_tree(marks, *child, level - 1, progress)?,
                entry => {
                    for (_, _, piece) in entry.runs() {
                        if let Some((chunk, _)) = piece {
                            marks.mark(&chunk)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Which packs go, and which of these have something to be moved: those of which less than half is used.
    fn choose(
        &self,
        marks: &Marks,
        done: &mut Pruned,
        progress: &Progress,
    ) -> Result<(HashSet<u64>, HashSet<u64>), Error> {
        let mut usage: HashMap<u64, Usage> =
            marks.segment.packs.iter().map(|pack| (*pack, Usage::default())).collect();
        marks.segment.each(|position, _, at| {
            let pack = usage.entry(at.pack).or_default();
            if marks.is_marked(position) {
                pack.live_bytes += u64::from(at.length);
            } else {
                pack.dead_bytes += u64::from(at.length);
                done.unused_chunks += 1;
            }
            Ok(())
        })?;
        let dropped = |u: &Usage| u.live_bytes == 0 || u.dead_bytes > u.live_bytes;
        let moved = |u: &Usage| dropped(u) && u.live_bytes > 0;
        let with =
            |what: &dyn Fn(&Usage) -> bool| usage.iter().filter(|(_, u)| what(u)).map(|(p, _)| *p).collect();
        let (dropped, moved): (HashSet<u64>, HashSet<u64>) = (with(&dropped), with(&moved));
        progress.expect(moved.iter().map(|pack| usage[pack].live_bytes).sum());
        (done.removed_packs, done.moved_packs) = (dropped.len() as u64, moved.len() as u64);
        for pack in &dropped {
            let path = self.inner.store.path(&pack_name(*pack));
            done.removed_bytes += std::fs::metadata(path).map_or(0, |m| m.len());
        }
        Ok((dropped, moved))
    }

    /// Writes what is used in the packs to be moved into new ones, pack by pack in the order of the old ones, so
    /// that neighbours stay neighbours.
    fn move_chunks(
        &self,
        session: &Session,
        marks: &Marks,
        moved: &HashSet<u64>,
        done: &mut Pruned,
        progress: &Progress,
    ) -> Result<(), Error> {
        for pack in moved {
            progress.check()?;
            let tables = crate::pack::read_tables(&self.inner.store, self.inner.id, *pack)?;
            for (id, at) in tables.locations(*pack) {
                let Some((position, chosen)) = marks.segment.find(&id)? else { continue };
                if chosen.pack != *pack || !marks.is_marked(position) {
                    continue;
                }
                let content = self.inner.reader.read(&id, &at)?;
                session.store_again(id, &content)?;
                done.moved_bytes += content.len() as u64;
                progress.done(content.len() as u64);
            }
        }
        session.finish()
    }

    /// Makes the index forget the old packs, then removes them. Unused chunks of packs that stay are remembered:
    /// they are there, and count when the pack is looked at again.
    fn drop_packs(&self, dropped: &HashSet<u64>, done: &Pruned) -> Result<(), Error> {
        let index = &self.inner.index;
        index.replace(&index.segments(), dropped)?;
        for pack in dropped {
            self.inner.store.remove(&pack_name(*pack))?;
        }
        self.inner.store.sync_directory(Path::new(PACKS))?;
        tracing::info!(packs = done.removed_packs, bytes = done.removed_bytes, "pruned");
        Ok(())
    }
}
