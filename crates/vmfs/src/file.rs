//! Files: where their sectors lie. Data moves elsewhere; only small files are read as bytes here.

use crate::Error;
use crate::descriptor::Node;
use crate::format::{Address, InodeKind, Zla};
use crate::pointer::{Lookup, Tree};
use crate::volume::Inner;
use block::{Buffer, DiskError, SECTOR_BYTES, Sector};
use smallvec::SmallVec;
use std::rc::Rc;

/// What a range of a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Its data is on a device.
    Data {
        /// Index in [`crate::Space::devices`].
        device: usize,
        /// First sector there.
        at: Sector,
    },
    /// Has room on a device that was never written: reads as zero whatever lies there.
    ToBeZeroed {
        /// Index in [`crate::Space::devices`].
        device: usize,
        /// First sector there.
        at: Sector,
    },
    /// Has no room yet: reads as zero.
    Hole,
}

/// A range of a file that lies in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// First sector in the file.
    pub at: Sector,
    /// Length in sectors.
    pub count: u64,
    /// What it is.
    pub content: Content,
}

/// Places in the order of the file. Most requests lie in one or two.
pub type Places = SmallVec<[Place; 2]>;

/// An open file. It stays in place while it is open: it is not removed or replaced.
pub struct File {
    pub(crate) inner: Rc<Inner>,
    pub(crate) node: Rc<Node>,
}

impl Clone for File {
    fn clone(&self) -> Self {
        Self::new(Rc::clone(&self.inner), Rc::clone(&self.node))
    }
}

impl Drop for File {
    fn drop(&mut self) {
        self.node.handles.set(self.node.handles.get() - 1);
    }
}

impl File {
    pub(crate) fn new(inner: Rc<Inner>, node: Rc<Node>) -> Self {
        node.handles.set(node.handles.get() + 1);
        Self { inner, node }
    }

    /// Length (bytes).
    pub fn length(&self) -> u64 {
        self.node.length()
    }

    /// Unit in which the file gets room (bytes).
    pub fn unit(&self) -> u64 {
        self.node.state.borrow().fd.meta.block_bytes.get()
    }

    /// Units that have room now.
    pub fn units_allocated(&self) -> u64 {
        self.node.state.borrow().fd.meta.blocks.get()
    }

    /// Units that have room and were never written.
    pub fn units_to_be_zeroed(&self) -> u64 {
        self.node.state.borrow().fd.meta.tbz()
    }

    /// The content lies in the descriptor: only [`File::read_bytes`] finds it.
    pub fn is_resident(&self) -> bool {
        self.node.state.borrow().fd.zla == Zla::Resident
    }

    /// Where `count` sectors from `at` on lie, as far as `limit` places reach. The last sector of the file may be
    /// used in part.
    pub async fn locate(&self, at: Sector, count: u64, limit: usize) -> Result<Places, Error> {
        self.inner.locate(&self.node, at, count, limit).await
    }

    /// As [`File::locate`], without waiting: `None` when a pointer block has to be read first.
    pub fn locate_now(&self, at: Sector, count: u64, limit: usize) -> Result<Option<Places>, Error> {
        let mut places = Places::new();
        Ok(match self.inner.locate_step(&self.node, at, count, limit, &mut places)? {
            None => Some(places),
            Some(_) => None,
        })
    }

    /// Reads `into.len()` bytes at byte `at`; short only at the end of the file. For small files: data of disks is
    /// located and moved by callers.
    pub async fn read_bytes(&self, at: u64, into: &mut [u8]) -> Result<usize, Error> {
        self.inner.read_bytes(&self.node, at, into).await
    }
}

impl Inner {
    /// Volume offset and kind of a unit's address.
    fn unit_content(&self, address: Address, inside: u64, found_at: u64) -> Result<(u64, bool), Error> {
        let tbz =
            matches!(address, Address::FileBlock { tbz: true, .. } | Address::LargeBlock { tbz: true, .. });
        Ok((self.files.resolve(address, inside, found_at)?, tbz))
    }

    /// Locates as far as pointer blocks in memory tell. Answers the volume offset of the one that is missing.
    pub fn locate_step(
        &self,
        node: &Node,
        at: Sector,
        count: u64,
        limit: usize,
        out: &mut Places,
    ) -> Result<Option<u64>, Error> {
        let state = node.state.borrow();
        let sectors = state.fd.length().div_ceil(SECTOR_BYTES);
        block::check_range(sectors, at, count)?;
        let tree = Tree { files: &self.files, cache: &self.cache };
        let unit = 1u64 << state.fd.shift;
        let end = at.plus(count).bytes();
        let mut byte = out.last().map_or(at.bytes(), |p| p.at.plus(p.count).bytes());
        while byte < end {
            let n = byte / unit;
            let (start, bytes, content) = match tree.lookup(&state.fd, node.at.get(), n)? {
                Lookup::Need { at } => return Ok(Some(at)),
                Lookup::Holes { count } => {
                    let stop = n.saturating_add(count).saturating_mul(unit);
                    (None, stop.min(end) - byte, false)
                }
                Lookup::Unit { address, found_at } => {
                    let (start, tbz) = self.unit_content(address, n * unit, found_at)?;
                    let inside = byte % unit;
                    (Some(start + inside), (unit - inside).min(end - byte), tbz)
                }
            };
            if !self.push_places(out, byte, bytes, start, content, limit)? {
                return Ok(None);
            }
            byte += bytes;
        }
        Ok(None)
    }

    /// Appends a range; false when `limit` places are full.
    pub fn push_places(
        &self,
        out: &mut Places,
        file: u64,
        bytes: u64,
        volume: Option<u64>,
        tbz: bool,
        limit: usize,
    ) -> Result<bool, Error> {
        let mut done = 0;
        while done < bytes {
            let (length, content) = match volume {
                None => (bytes, Content::Hole),
                Some(volume) => {
                    let piece = self.space.piece(volume + done, bytes - done)?;
                    let (device, at) = (piece.device, Sector(piece.at / SECTOR_BYTES));
                    let content =
                        if tbz { Content::ToBeZeroed { device, at } } else { Content::Data { device, at } };
                    (piece.bytes, content)
                }
            };
            let place =
                Place { at: Sector((file + done) / SECTOR_BYTES), count: length / SECTOR_BYTES, content };
            let full = out.len() >= limit.max(1);
            match out.last_mut() {
                Some(last) if follows(last, &place) => last.count += place.count,
                _ if full => return Ok(false),
                _ => out.push(place),
            }
            done += length;
        }
        Ok(true)
    }

    /// Locates, reading pointer blocks as needed.
    pub async fn locate(&self, node: &Node, at: Sector, count: u64, limit: usize) -> Result<Places, Error> {
        let mut places = Places::new();
        // A pointer block read here may be pushed out before it is used only if hundreds are read at once; each
        // turn of the loop gets further.
        while let Some(missing) = self.locate_step(node, at, count, limit, &mut places)? {
            self.cache.load(&self.space, &self.files.sizes, missing).await?;
        }
        Ok(places)
    }

    /// Reads bytes of a file of any kind.
    pub async fn read_bytes(&self, node: &Node, at: u64, into: &mut [u8]) -> Result<usize, Error> {
        let length = node.length();
        let count = length.saturating_sub(at).min(into.len() as u64) as usize;
        let into = &mut into[..count];
        if count == 0 {
            return Ok(0);
        }
        {
            let state = node.state.borrow();
            match state.fd.zla {
                Zla::Resident => {
                    into.copy_from_slice(&state.fd.tail[at as usize..at as usize + count]);
                    return Ok(count);
                }
                Zla::None => return Err(Error::Resident),
                _ => {}
            }
        }
        let first = at / SECTOR_BYTES;
        let end = (at + count as u64).div_ceil(SECTOR_BYTES);
        let mut from = first;
        while from < end {
            for place in self.locate(node, Sector(from), end - from, 64).await? {
                self.read_place(&place, at, into).await?;
                from = place.at.plus(place.count).0;
            }
        }
        Ok(count)
    }

    /// Reads what `place` and the bytes wanted (`into`, at byte `at` of the file) have in common.
    async fn read_place(&self, place: &Place, at: u64, into: &mut [u8]) -> Result<(), Error> {
        let stop = place.at.plus(place.count).bytes().min(at + into.len() as u64);
        let mut byte = place.at.bytes().max(at);
        let mut buffer = Buffer::zeroed(0);
        while byte < stop {
            let sector = byte / SECTOR_BYTES;
            let sectors = (stop.div_ceil(SECTOR_BYTES) - sector).min(2048);
            let skip = (byte % SECTOR_BYTES) as usize;
            let count = (sectors * SECTOR_BYTES) as usize - skip;
            let count = count.min((stop - byte) as usize);
            let part = &mut into[(byte - at) as usize..(byte - at) as usize + count];
            match place.content {
                Content::Hole | Content::ToBeZeroed { .. } => part.fill(0),
                Content::Data { device, at } => {
                    if buffer.len() != (sectors * SECTOR_BYTES) as usize {
                        buffer = Buffer::zeroed((sectors * SECTOR_BYTES) as usize);
                    }
                    let from = at.plus(sector - place.at.0);
                    let device = self.space.devices().get(device).ok_or(DiskError::Gone)?;
                    device.read(from, &block::SegmentsMut::new(&mut buffer)).await?;
                    part.copy_from_slice(&buffer[skip..skip + count]);
                }
            }
            byte += count as u64;
        }
        Ok(())
    }

    /// The whole content of a node, at most `limit` bytes.
    pub async fn read_all(&self, node: &Node, limit: u64) -> Result<Vec<u8>, Error> {
        let length = node.length();
        if length > limit {
            let what = match node.kind() {
                InodeKind::Directory => "directory",
                InodeKind::Symlink => "target of a symbolic link",
                _ => "file to be read as a whole",
            };
            return Err(Error::TooLarge { what, bytes: length, limit });
        }
        let mut content = vec![0; length as usize];
        self.read_bytes(node, 0, &mut content).await?;
        Ok(content)
    }
}

/// `next` continues `last` in the file and on the device.
fn follows(last: &Place, next: &Place) -> bool {
    if last.at.plus(last.count) != next.at {
        return false;
    }
    match (last.content, next.content) {
        (Content::Hole, Content::Hole) => true,
        (Content::Data { device: a, at: x }, Content::Data { device: b, at: y })
        | (Content::ToBeZeroed { device: a, at: x }, Content::ToBeZeroed { device: b, at: y }) => {
            a == b && x.plus(last.count) == y
        }
        _ => false,
    }
}
