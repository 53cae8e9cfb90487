//! Packs: frames of chunks, appended to a temporary file, sealed by a table at the end, never changed afterwards.
//!
//! A pack describes itself: head, frames, frame table, chunk table, trailer. The index is only a faster way to what
//! stands in the tables.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use uuid::Uuid;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::chunk::{ChunkId, Location};
use crate::envelope::{self, HEAD_BYTES};
use crate::error::{Error, corrupt};
use crate::format::{
    AREA_BYTES, ChunkEntry, FrameEntry, MAX_FRAME_BYTES, MAX_PACK_BYTES, PACK_BYTES, PACK_MAGIC,
    TRAILER_MAGIC, Trailer,
};
use crate::store::{Store, Writing, temporary};

/// Where packs lie in the repository.
pub(crate) const PACKS: &str = "packs";

/// Name of a pack's file, relative to the repository.
pub(crate) fn pack_name(number: u64) -> PathBuf {
    Path::new(PACKS).join(format!("{number:016x}.pack"))
}

/// The number in a pack's file name.
pub(crate) fn pack_number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".pack").filter(|d| d.len() == 16)?;
    u64::from_str_radix(digits, 16).ok()
}

/// A number nobody has: 64 random bits.
pub(crate) fn new_number() -> u64 {
    // The low half of a version-4 UUID: 62 random bits after the two variant bits.
    Uuid::new_v4().as_u64_pair().1
}

struct OpenPack {
    number: u64,
    writing: Writing,
    head: envelope::HeadBytes,
    frames: Vec<FrameEntry>,
    chunks: Vec<ChunkEntry>,
}

impl OpenPack {
    fn create(store: &Store, repository: Uuid) -> Result<Self, Error> {
        let number = new_number();
        let head = envelope::head_bytes(PACK_MAGIC, repository, envelope::numbered(number));
        let mut writing = store.create(&temporary(&pack_name(number)))?;
        writing.append(&head)?;
        Ok(Self { number, writing, head, frames: Vec::new(), chunks: Vec::new() })
    }

    fn seal(mut self) -> Result<(), Error> {
        let tables_at = self.writing.length();
        let tables = [self.frames.as_bytes(), self.chunks.as_bytes()].concat();
        let mut hash = blake3::Hasher::new();
        hash.update(&self.head).update(&tables);
        let mut trailer = Trailer::new_zeroed();
        trailer.magic = TRAILER_MAGIC;
        trailer.pack = self.number.into();
        trailer.tables_at = tables_at.into();
        trailer.frames = (self.frames.len() as u32).into();
        trailer.chunks = (self.chunks.len() as u32).into();
        trailer.tables_hash = *hash.finalize().as_bytes();
        trailer.crc = crc32c::crc32c(trailer.as_bytes()).into();
        self.writing.append(&[&tables, trailer.as_bytes()].concat())?;
        self.writing.publish(&pack_name(self.number))
    }
}

/// Told when a pack is durable: its number.
pub(crate) type Sealed = Arc<dyn Fn(u64) -> Result<(), Error> + Send + Sync>;

/// Done when every pack before it is durable.
pub(crate) type Afterwards = Box<dyn FnOnce() -> Result<(), Error> + Send>;

/// Work of the thread that seals, done in the order in which it was sent.
enum Work {
    Seal(Box<OpenPack>),
    Then(Afterwards),
}

impl Work {
    fn run(self, sealed: &Sealed) -> Result<(), Error> {
        match self {
            Self::Seal(pack) => {
                let number = pack.number;
                pack.seal()?;
                sealed(number)
            }
            Self::Then(afterwards) => afterwards(),
        }
    }
}

/// The thread that seals, if there is one.
#[derive(Default)]
enum Sealer {
    #[default]
    None,
    Running(SyncSender<Work>, JoinHandle<Result<(), Error>>),
    /// It ended early: nothing after that may count as durable.
    Failed(Error),
}

impl Sealer {
    fn start(sealed: Sealed) -> Self {
        // One pack being sealed, one waiting: beyond that whoever fills packs waits.
        let (send, receive) = sync_channel::<Work>(1);
        let seal_all = move || receive.into_iter().try_for_each(|work| work.run(&sealed));
        Self::Running(send, std::thread::spawn(seal_all))
    }

    fn send(&mut self, work: Work, sealed: &Sealed) -> Result<(), Error> {
        if matches!(self, Self::None) {
            *self = Self::start(Arc::clone(sealed));
        }
        let taken = match self {
            Self::Running(send, _) => send.send(work).is_ok(),
            Self::Failed(error) => return Err(error.clone()),
            Self::None => true,
        };
        // Only a thread that has failed does not take it: its end says why.
        if taken { Ok(()) } else { self.end() }
    }

    /// Waits until everything that was sent is done.
    fn end(&mut self) -> Result<(), Error> {
        match std::mem::take(self) {
            Self::None => Ok(()),
            Self::Running(send, thread) => {
                drop(send);
                let result = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                if let Err(error) = &result {
                    *self = Self::Failed(error.clone());
                }
                result
            }
            Self::Failed(error) => {
                *self = Self::Failed(error.clone());
                Err(error)
            }
        }
    }
}

/// Writes frames into packs. Several threads may append; sealing goes on beside them.
pub(crate) struct PackWriter {
    store: Store,
    repository: Uuid,
    target_bytes: u64,
    current: Mutex<Option<OpenPack>>,
    sealer: Mutex<Sealer>,
    sealed: Sealed,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl PackWriter {
    pub fn new(store: Store, repository: Uuid, target_bytes: Option<u64>, sealed: Sealed) -> Self {
        let target_bytes = target_bytes.unwrap_or(PACK_BYTES).min(MAX_PACK_BYTES / 2);
        Self { store, repository, target_bytes, current: Mutex::default(), sealer: Mutex::default(), sealed }
    }

    /// Length at which a pack is sealed.
    pub fn target_bytes(&self) -> u64 {
        self.target_bytes
    }

    /// Length of the pack that is being filled, in bytes.
    pub fn open_bytes(&self) -> u64 {
        locked(&self.current).as_ref().map_or(0, |pack| pack.writing.length())
    }

    /// Appends one frame that unpacks to `raw` bytes and holds `chunks` one after the other. Tells pack and offset to
    /// `placed` before the pack can be sealed: once it is, the index takes its chunks, and none may come late.
    pub fn append(
        &self,
        stored: &[u8],
        raw: u32,
        chunks: &[(ChunkId, u32)],
        placed: impl FnOnce(u64, u32),
    ) -> Result<(), Error> {
        let crc = crc32c::crc32c(stored);
        let mut current = locked(&self.current);
        let pack = match &mut *current {
            Some(pack) => pack,
            none => none.insert(OpenPack::create(&self.store, self.repository)?),
        };
        let at = pack.writing.length() as u32;
        pack.writing.append(stored)?;
        pack.frames.push(FrameEntry {
            at: at.into(),
            stored: (stored.len() as u32).into(),
            raw: raw.into(),
            crc: crc.into(),
            chunks: (chunks.len() as u32).into(),
            spare: 0.into(),
        });
        pack.chunks
            .extend(chunks.iter().map(|(id, length)| ChunkEntry { id: id.0, length: (*length).into() }));
        placed(pack.number, at);
        if pack.writing.length() >= self.target_bytes
            && let Some(full) = current.take()
        {
            // The lock is held until it was sent: what is asked to come afterwards may not overtake it.
            self.do_in_order(Work::Seal(Box::new(full)))?;
        }
        Ok(())
    }

    /// Seals what is open, and does `afterwards` when everything appended so far is durable. Does not wait for that.
    pub fn seal_and_then(&self, afterwards: Afterwards) -> Result<(), Error> {
        let mut current = locked(&self.current);
        if let Some(pack) = current.take() {
            self.do_in_order(Work::Seal(Box::new(pack)))?;
        }
        self.do_in_order(Work::Then(afterwards))
    }

    /// On a thread of its own, so that the caller goes on compressing while the medium syncs. Under a watch everything
    /// happens at once.
    fn do_in_order(&self, work: Work) -> Result<(), Error> {
        if self.store.is_watched() {
            return work.run(&self.sealed);
        }
        locked(&self.sealer).send(work, &self.sealed)
    }

    /// Seals what is open and waits until everything is durable.
    pub fn finish(&self) -> Result<(), Error> {
        let last = locked(&self.current).take();
        last.map_or(Ok(()), |pack| self.do_in_order(Work::Seal(Box::new(pack))))?;
        locked(&self.sealer).end()
    }
}

impl Drop for PackWriter {
    /// An unfinished pack is no pack: its temporary file goes away now, or by the next writer.
    fn drop(&mut self) {
        // A failure was told to who sent the work, or nobody asked any more.
        let _ = locked(&self.sealer).end();
        if let Some(pack) = locked(&self.current).take() {
            pack.writing.abandon();
        }
    }
}

/// What a pack says about itself, checked.
pub(crate) struct Tables {
    pub frames: Vec<FrameEntry>,
    pub chunks: Vec<ChunkEntry>,
}

impl Tables {
    /// Every chunk with its place.
    pub fn locations(&self, pack: u64) -> impl Iterator<Item = (ChunkId, Location)> + '_ {
        let mut chunks = self.chunks.iter();
        self.frames.iter().flat_map(move |frame| {
            let mut inside_at = 0;
            let (frame_at, frame_stored, frame_raw) = (frame.at.get(), frame.stored.get(), frame.raw.get());
            chunks
                .by_ref()
                .take(frame.chunks.get() as usize)
                .map(move |chunk| {
                    let length = chunk.length.get();
                    let at = Location { pack, frame_at, frame_stored, frame_raw, inside_at, length };
                    inside_at += length;
                    (ChunkId(chunk.id), at)
                })
                .collect::<Vec<_>>()
        })
    }
}

fn read_at(file: &File, name: &Path, at: u64, length: usize) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, at).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => {
            corrupt(name, "pack", at, "end of file", format!("{length} bytes"))
        }
        _ => Error::io("reading", name, e),
    })?;
    Ok(bytes)
}

/// Reads and checks a pack's head, tables and trailer: every length is compared with the file's, every range with
/// its neighbours, before anything is believed.
pub(crate) fn read_tables(store: &Store, repository: Uuid, number: u64) -> Result<Tables, Error> {
    let name = pack_name(number);
    let file = store.open(&name)?;
    let file_bytes = file.metadata().map_err(|e| Error::io("reading", &name, e))?.len();
    let least = (HEAD_BYTES + size_of::<Trailer>()) as u64;
    if !(least..=MAX_PACK_BYTES).contains(&file_bytes) {
        let expected = format!("{least} to {MAX_PACK_BYTES} bytes");
        return Err(corrupt(&name, "pack length", 0, file_bytes, expected));
    }
    let head_bytes = read_at(&file, &name, 0, HEAD_BYTES)?;
    let head = envelope::check_head(&head_bytes, &name, "pack head", PACK_MAGIC, Some(repository))?;
    if head.own != envelope::numbered(number) {
        return Err(corrupt(&name, "pack number", 40, "another number", format!("{number:016x}")));
    }
    let trailer_at = file_bytes - size_of::<Trailer>() as u64;
    let trailer = read_trailer(&read_at(&file, &name, trailer_at, size_of::<Trailer>())?, &name, trailer_at)?;
    let frames_bytes = u64::from(trailer.frames.get()) * size_of::<FrameEntry>() as u64;
    let chunks_bytes = u64::from(trailer.chunks.get()) * size_of::<ChunkEntry>() as u64;
    let tables_at = trailer.tables_at.get();
    if trailer.pack.get() != number || tables_at.checked_add(frames_bytes + chunks_bytes) != Some(trailer_at)
    {
        return Err(corrupt(&name, "pack trailer", trailer_at, "tables that do not fit", "tables before it"));
    }
    let tables = read_at(&file, &name, tables_at, (frames_bytes + chunks_bytes) as usize)?;
    let mut hash = blake3::Hasher::new();
    hash.update(&head_bytes).update(&tables);
    if *hash.finalize().as_bytes() != trailer.tables_hash {
        return Err(corrupt(&name, "pack tables", tables_at, "another hash", "the hash in the trailer"));
    }
    let (frames, chunks) = tables.split_at(frames_bytes as usize);
    let (Ok(frames), Ok(chunks)) =
        (<[FrameEntry]>::ref_from_bytes(frames), <[ChunkEntry]>::ref_from_bytes(chunks))
    else {
        return Err(corrupt(&name, "pack tables", tables_at, "odd length", "whole entries"));
    };
    let tables = Tables { frames: frames.to_vec(), chunks: chunks.to_vec() };
    check_tables(&tables, &name, tables_at)?;
    Ok(tables)
}

fn read_trailer(bytes: &[u8], name: &Path, at: u64) -> Result<Trailer, Error> {
    let Ok(trailer) = Trailer::read_from_bytes(bytes) else {
        return Err(corrupt(name, "pack trailer", at, format!("{} bytes", bytes.len()), "a trailer"));
    };
    let mut plain = trailer;
    plain.crc = 0.into();
    if trailer.magic != TRAILER_MAGIC || crc32c::crc32c(plain.as_bytes()) != trailer.crc.get() {
        return Err(corrupt(name, "pack trailer", at, "wrong magic or checksum", "a trailer"));
    }
    Ok(trailer)
}

/// Frames follow each other from the head to the tables; chunks fill their frame.
fn check_tables(tables: &Tables, name: &Path, tables_at: u64) -> Result<(), Error> {
    let bad = |found: &str| {
        corrupt(name, "pack tables", tables_at, found, "frames in order, chunks that fill them")
    };
    let (mut at, mut chunks) = (HEAD_BYTES as u64, tables.chunks.iter());
    for frame in &tables.frames {
        let (stored, raw) = (frame.stored.get(), frame.raw.get());
        if u64::from(frame.at.get()) != at || stored > raw || raw > MAX_FRAME_BYTES {
            return Err(bad("a frame out of place"));
        }
        at += u64::from(stored);
        let mut inside = 0u64;
        for chunk in chunks.by_ref().take(frame.chunks.get() as usize) {
            if u64::from(chunk.length.get()) > AREA_BYTES {
                return Err(bad("a chunk that is too long"));
            }
            inside += u64::from(chunk.length.get());
        }
        if inside != u64::from(raw) {
            return Err(bad("chunks that do not fill their frame"));
        }
    }
    if at != tables_at || chunks.next().is_some() {
        return Err(bad("frames that do not reach the tables"));
    }
    Ok(())
}

/// Reads every frame of a pack against its checksum. Gives the offset of the first bad one in the error.
pub(crate) fn check_frames(store: &Store, number: u64, tables: &Tables) -> Result<(), Error> {
    let name = pack_name(number);
    let file = store.open(&name)?;
    for frame in &tables.frames {
        let at = u64::from(frame.at.get());
        let stored = read_at(&file, &name, at, frame.stored.get() as usize)?;
        let crc = crc32c::crc32c(&stored);
        if crc != frame.crc.get() {
            let (found, expected) = (format!("checksum {crc:08x}"), format!("{:08x}", frame.crc.get()));
            return Err(corrupt(&name, "frame", at, found, expected));
        }
    }
    Ok(())
}
