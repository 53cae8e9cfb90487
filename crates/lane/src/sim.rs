//! The simulated world of a lane with [`crate::DriverKind::Sim`]: files and connections in memory, latencies and
//! completion orders drawn from the seed, virtual time, faults on request. The same seed gives the same run.
//!
//! A world belongs to its lane: files made by one `block_on` are gone with it. Work given to `offload` runs on the
//! lane's own thread, after a drawn delay.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use crate::executor::Lane;
use crate::fs::{Lock, Open, Stretch};
use crate::rng::Rng;
use crate::sync::Waiters;
use crate::{Segments, SegmentsMut};

/// Longest latency that is drawn, in nanoseconds of virtual time.
const LATENCY_NS_MAX: u64 = 200_000;
/// Unit in which writes tear, and in which files remember what was written.
const PAGE_BYTES: u64 = 512;
/// Most bytes on the way in one direction of a connection.
const PIPE_BYTES: usize = 64 << 10;

/// What a planned fault hits.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Reading.
    Read,
    /// Writing; nothing of it is written.
    Write,
    /// `sync_data`.
    Sync,
    /// Punching, zeroing, reserving, discarding.
    Allocate,
}

struct Planned {
    path: PathBuf,
    fault: Fault,
    skip: u64,
    errno: i32,
}

/// See the module.
pub(crate) struct Sim {
    rng: RefCell<Rng>,
    files: RefCell<HashMap<PathBuf, Rc<SimFile>>>,
    planned: RefCell<Vec<Planned>>,
    listeners: RefCell<HashMap<String, Rc<SimListener>>>,
    next_port: Cell<u16>,
}

impl Sim {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            rng: RefCell::new(Rng::new(seed)),
            files: RefCell::default(),
            planned: RefCell::default(),
            listeners: RefCell::default(),
            next_port: Cell::new(32768),
        }
    }

    /// Another generator that follows from this one.
    pub(crate) fn fork_rng(&self) -> Rng {
        Rng::new(self.rng.borrow_mut().next())
    }

    fn fault(&self, path: &Path, fault: Fault) -> io::Result<()> {
        let mut planned = self.planned.borrow_mut();
        let Some(place) = planned.iter().position(|p| p.fault == fault && p.path == path) else {
            return Ok(());
        };
        if planned[place].skip > 0 {
            planned[place].skip -= 1;
            return Ok(());
        }
        Err(io::Error::from_raw_os_error(planned.remove(place).errno))
    }
}

fn with<R>(f: impl FnOnce(&Sim) -> R) -> R {
    Lane::with(|lane| match &lane.sim {
        Some(sim) => f(sim),
        None => panic!("this lane is not simulated"),
    })
}

/// This lane is simulated.
pub(crate) fn is_on() -> bool {
    Lane::try_with(|lane| lane.sim.is_some()) == Some(true)
}

/// A number below `limit` (above zero), drawn from the lane's seed. Panics on a lane that is not simulated.
pub fn draw(limit: u64) -> u64 {
    with(|sim| sim.rng.borrow_mut().below(limit))
}

/// Lets one operation on `path` fail with `errno`: the next of its kind after `skip` that go well.
pub fn plan_fault(path: impl AsRef<Path>, fault: Fault, skip: u64, errno: i32) {
    let path = path.as_ref().to_owned();
    with(|sim| sim.planned.borrow_mut().push(Planned { path, fault, skip, errno }));
}

/// Turns bits of one byte of a file, as a medium does that rots: the bits set in `mask`, at byte `at`.
/// Panics when there is no such file.
pub fn rot(path: impl AsRef<Path>, at: u64, mask: u8) {
    let file = with(|sim| sim.files.borrow().get(path.as_ref()).cloned());
    let Some(file) = file else { panic!("{} is no simulated file", path.as_ref().display()) };
    let mut pages = file.pages.borrow_mut();
    let page = pages.entry(at / PAGE_BYTES).or_insert_with(|| Box::new([0; PAGE_BYTES as usize]));
    page[(at % PAGE_BYTES) as usize] ^= mask;
}

/// A port that no listener was given yet.
pub(crate) fn free_port() -> u16 {
    with(|sim| sim.next_port.replace(sim.next_port.get().wrapping_add(1).max(32768)))
}

/// Waits for a drawn time.
pub(crate) async fn delay() {
    crate::sleep(Duration::from_nanos(draw(LATENCY_NS_MAX))).await;
}

/// A file in memory that holds only the pages that were written.
pub(crate) struct SimFile {
    path: PathBuf,
    length: Cell<u64>,
    pages: RefCell<HashMap<u64, Box<[u8; PAGE_BYTES as usize]>>>,
    locked: Cell<bool>,
    sharers: Cell<u32>,
}

/// An open simulated file: holds its lock.
pub(crate) struct SimOpen {
    pub(crate) file: Rc<SimFile>,
    lock: Lock,
}

impl Drop for SimOpen {
    fn drop(&mut self) {
        match self.lock {
            Lock::Exclusive => self.file.locked.set(false),
            Lock::Shared => self.file.sharers.set(self.file.sharers.get() - 1),
            Lock::None => {}
        }
    }
}

pub(crate) async fn open(path: &Path, how: &Open) -> io::Result<SimOpen> {
    delay().await;
    let file = with(|sim| {
        let mut files = sim.files.borrow_mut();
        match (files.get(path), how.create_bytes) {
            (Some(_), Some(_)) => Err(io::Error::from(ErrorKind::AlreadyExists)),
            (None, None) => Err(io::Error::from(ErrorKind::NotFound)),
            (Some(file), None) => Ok(Rc::clone(file)),
            (None, Some(bytes)) => {
                let file = Rc::new(SimFile {
                    path: path.to_owned(),
                    length: Cell::new(bytes),
                    pages: RefCell::default(),
                    locked: Cell::new(false),
                    sharers: Cell::new(0),
                });
                files.insert(path.to_owned(), Rc::clone(&file));
                Ok(file)
            }
        }
    })?;
    let busy = match how.lock {
        Lock::Exclusive => file.locked.get() || file.sharers.get() > 0,
        Lock::Shared => file.locked.get(),
        Lock::None => false,
    };
    if busy {
        let text = format!("{} is in use by this process already", path.display());
        return Err(io::Error::new(ErrorKind::ResourceBusy, text));
    }
    match how.lock {
        Lock::Exclusive => file.locked.set(true),
        Lock::Shared => file.sharers.set(file.sharers.get() + 1),
        Lock::None => {}
    }
    Ok(SimOpen { file, lock: how.lock })
}

impl SimFile {
    pub(crate) fn length(&self) -> u64 {
        self.length.get()
    }

    pub(crate) async fn set_length(&self, bytes: u64) {
        delay().await;
        let old = self.length.replace(bytes);
        if bytes < old {
            self.clear(bytes, old);
        }
    }

    pub(crate) async fn read(&self, at: u64, into: &SegmentsMut<'_>) -> io::Result<()> {
        delay().await;
        with(|sim| sim.fault(&self.path, Fault::Read))?;
        if at.saturating_add(into.len() as u64) > self.length.get() {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let pages = self.pages.borrow();
        for (page, inside, done, count) in pieces(at, into.len()) {
            match pages.get(&page) {
                Some(content) => into.copy_from(done, &content[inside..inside + count]),
                None => into.zero(done, count),
            }
        }
        Ok(())
    }

    /// Arrives in two parts, cut at a drawn place between pages: who reads meanwhile sees it torn.
    pub(crate) async fn write(&self, at: u64, from: &Segments<'_>) -> io::Result<()> {
        delay().await;
        with(|sim| sim.fault(&self.path, Fault::Write))?;
        let pages = from.len() as u64 / PAGE_BYTES;
        let first = if pages > 1 { (draw(pages) * PAGE_BYTES) as usize } else { 0 };
        self.put(at, &from.slice(0, first));
        if first > 0 {
            delay().await;
        }
        self.put(at + first as u64, &from.slice(first, from.len() - first));
        Ok(())
    }

    fn put(&self, at: u64, from: &Segments<'_>) {
        let mut pages = self.pages.borrow_mut();
        for (page, inside, done, count) in pieces(at, from.len()) {
            let content = pages.entry(page).or_insert_with(|| Box::new([0; PAGE_BYTES as usize]));
            from.copy_to(done, &mut content[inside..inside + count]);
        }
        let end = at + from.len() as u64;
        self.length.set(self.length.get().max(end));
    }

    pub(crate) async fn sync(&self) -> io::Result<()> {
        delay().await;
        with(|sim| sim.fault(&self.path, Fault::Sync))
    }

    /// Punching and zeroing are one here; `reserve` grows the file.
    pub(crate) async fn allocate(&self, reserve: bool, at: u64, length: u64) -> io::Result<()> {
        delay().await;
        with(|sim| sim.fault(&self.path, Fault::Allocate))?;
        let end = at.saturating_add(length);
        match reserve {
            true => self.length.set(self.length.get().max(end)),
            false => self.clear(at, end),
        }
        Ok(())
    }

    fn clear(&self, from: u64, to: u64) {
        self.pages.borrow_mut().retain(|page, content| {
            let (first, end) = (page * PAGE_BYTES, (page + 1) * PAGE_BYTES);
            if from <= first && end <= to {
                return false;
            }
            if from < end && first < to {
                content[(from.max(first) - first) as usize..(to.min(end) - first) as usize].fill(0);
            }
            true
        });
    }

    pub(crate) fn stretch(&self, at: u64) -> io::Result<Stretch> {
        if at >= self.length.get() {
            return Err(ErrorKind::InvalidInput.into());
        }
        let pages = self.pages.borrow();
        let data = pages.contains_key(&(at / PAGE_BYTES));
        let end = match data {
            true => (at / PAGE_BYTES..).find(|p| !pages.contains_key(p)),
            false => pages.keys().copied().filter(|p| *p > at / PAGE_BYTES).min(),
        };
        let end = end.map_or(u64::MAX, |page| page * PAGE_BYTES);
        Ok(Stretch { end: end.min(self.length.get()), data })
    }
}

/// Page, offset in it, offset in the transfer, length.
fn pieces(at: u64, length: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        (done < length).then(|| {
            let byte = at + done as u64;
            let inside = (byte % PAGE_BYTES) as usize;
            let count = (PAGE_BYTES as usize - inside).min(length - done);
            let piece = (byte / PAGE_BYTES, inside, done, count);
            done += count;
            piece
        })
    })
}

/// One direction of a connection.
#[derive(Default)]
struct Pipe {
    bytes: RefCell<std::collections::VecDeque<u8>>,
    closed: Cell<bool>,
    changed: Waiters,
}

impl Pipe {
    fn close(&self) {
        self.closed.set(true);
        self.changed.wake_all();
    }
}

/// One end of a simulated connection.
pub(crate) struct SimStream {
    incoming: Rc<Pipe>,
    outgoing: Rc<Pipe>,
}

impl SimStream {
    pub(crate) fn pair() -> (Self, Self) {
        let (a, b) = (Rc::new(Pipe::default()), Rc::new(Pipe::default()));
        let one = Self { incoming: Rc::clone(&a), outgoing: Rc::clone(&b) };
        (one, Self { incoming: b, outgoing: a })
    }

    pub(crate) async fn receive(&self, into: &SegmentsMut<'_>) -> usize {
        delay().await;
        let pipe = &self.incoming;
        let ready = || (!pipe.bytes.borrow().is_empty() || pipe.closed.get()).then_some(());
        pipe.changed.until(ready).await;
        let there = pipe.bytes.borrow().len().min(into.len());
        if there == 0 {
            return 0;
        }
        let count = 1 + draw(there as u64) as usize;
        let taken: Vec<u8> = pipe.bytes.borrow_mut().drain(..count).collect();
        into.copy_from(0, &taken);
        pipe.changed.wake_all();
        count
    }

    pub(crate) async fn send(&self, from: &Segments<'_>) -> io::Result<usize> {
        delay().await;
        let pipe = &self.outgoing;
        let ready = || (pipe.bytes.borrow().len() < PIPE_BYTES || pipe.closed.get()).then_some(());
        pipe.changed.until(ready).await;
        if pipe.closed.get() {
            return Err(ErrorKind::BrokenPipe.into());
        }
        let room = (PIPE_BYTES - pipe.bytes.borrow().len()).min(from.len());
        let count = if room > 0 { 1 + draw(room as u64) as usize } else { 0 };
        pipe.bytes.borrow_mut().extend(from.slice(0, count).to_vec());
        pipe.changed.wake_all();
        Ok(count)
    }

    pub(crate) fn shutdown(&self) {
        self.incoming.close();
        self.outgoing.close();
    }
}

impl Drop for SimStream {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// A simulated listener: connections wait in a queue.
#[derive(Default)]
pub(crate) struct SimListener {
    queue: RefCell<Vec<SimStream>>,
    closed: Cell<bool>,
    changed: Waiters,
}

impl SimListener {
    pub(crate) fn bind(address: &str) -> io::Result<Rc<Self>> {
        let listener = Rc::new(Self::default());
        with(|sim| match sim.listeners.borrow_mut().entry(address.to_owned()) {
            std::collections::hash_map::Entry::Occupied(mut old) if old.get().closed.get() => {
                old.insert(Rc::clone(&listener));
                Ok(listener)
            }
            std::collections::hash_map::Entry::Occupied(_) => Err(ErrorKind::AddrInUse.into()),
            std::collections::hash_map::Entry::Vacant(place) => {
                place.insert(Rc::clone(&listener));
                Ok(listener)
            }
        })
    }

    pub(crate) async fn accept(&self) -> io::Result<SimStream> {
        delay().await;
        let next = || match (self.closed.get(), self.queue.borrow_mut().pop()) {
            (true, _) => Some(None),
            (false, Some(stream)) => Some(Some(stream)),
            (false, None) => None,
        };
        self.changed.until(next).await.ok_or_else(|| ErrorKind::ConnectionAborted.into())
    }

    pub(crate) fn close(&self) {
        self.closed.set(true);
        self.queue.borrow_mut().clear();
        self.changed.wake_all();
    }
}

pub(crate) async fn connect(address: &str) -> io::Result<SimStream> {
    delay().await;
    let listener = with(|sim| sim.listeners.borrow().get(address).cloned());
    match listener.filter(|l| !l.closed.get()) {
        Some(listener) => {
            let (near, far) = SimStream::pair();
            listener.queue.borrow_mut().insert(0, far);
            listener.changed.wake_all();
            Ok(near)
        }
        None => Err(ErrorKind::ConnectionRefused.into()),
    }
}
