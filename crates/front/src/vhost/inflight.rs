//! Which requests are under way, in memory that the front end keeps when we die: the next daemon takes them up again
//! (vhost-user, "In-flight I/O tracking").
//!
//! The layout is ours alone; the front end only carries the descriptor. Every change is one store, in an order that makes
//! any moment a good one to be killed:
//!
//! ```text
//!   taken     counter, then in flight := 1
//!   answered  last := head;  used ring;  in flight := 0;  used index
//! ```
//!
//! A used ring that is further than the used index says that `last` was answered and only its mark is left.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::{AtomicInteger, VolatileMemory};

use super::memory::{BadMemory, Mapped, map_file};

/// Says that the memory is laid out as here: "kagamiQ1".
const MAGIC: u64 = u64::from_le_bytes(*b"kagamiQ1");
/// What comes before the queues: magic, queues and their size, write cache.
const PROLOGUE_BYTES: usize = 64;
/// What comes before the descriptors of a queue: last answered, used index.
const QUEUE_BYTES: usize = 16;
/// Per descriptor: in flight, counter.
const DESCRIPTOR_BYTES: usize = 16;

/// Offset in the prologue.
mod prologue {
    pub const MAGIC: usize = 0;
    pub const QUEUES: usize = 8;
    pub const SIZE: usize = 10;
    pub const WRITE_CACHE: usize = 12;
}

/// Offset from the start of a queue.
mod queue {
    pub const LAST: usize = 0;
    pub const USED: usize = 2;
}

/// Offset from the start of a descriptor's entry.
mod entry {
    pub const IN_FLIGHT: usize = 0;
    pub const COUNTER: usize = 8;
}

/// Why tracking was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadInflight {
    #[error("{0} bytes are too few")]
    TooShort(u64),
    #[error("it was not laid out by us")]
    Foreign,
    #[error(transparent)]
    Memory(#[from] BadMemory),
    #[error("no memory: {0}")]
    Io(#[from] rustix::io::Errno),
}

/// The memory of all queues.
pub(crate) struct Inflight {
    map: Mapped,
    queues: u16,
    size: u16,
}

fn queue_bytes(size: u16) -> usize {
    (QUEUE_BYTES + DESCRIPTOR_BYTES * usize::from(size)).next_multiple_of(64)
}

fn whole_bytes(queues: u16, size: u16) -> u64 {
    (PROLOGUE_BYTES + queue_bytes(size) * usize::from(queues)) as u64
}

impl Inflight {
    /// New memory, and what to tell the front end of it.
    pub fn create(queues: u16, size: u16) -> Result<(VhostUserInflight, OwnedFd), BadInflight> {
        let bytes = whole_bytes(queues, size);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("kagami-inflight", flags)?;
        rustix::fs::ftruncate(&file, bytes)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let map = map_file(rustix::io::fcntl_dupfd_cloexec(&file, 0)?, 0, bytes)?;
        let new = Self { map, queues, size };
        new.at::<AtomicU16>(prologue::QUEUES).store(queues, Ordering::Relaxed);
        new.at::<AtomicU16>(prologue::SIZE).store(size, Ordering::Relaxed);
        new.at::<AtomicU64>(prologue::MAGIC).store(MAGIC, Ordering::Release);
        Ok((VhostUserInflight::new(bytes, 0, queues, size), file))
    }

    /// What the front end kept.
    pub fn open(about: &VhostUserInflight, file: OwnedFd) -> Result<Rc<Self>, BadInflight> {
        let (queues, size) = (about.num_queues, about.queue_size);
        if about.mmap_size < whole_bytes(queues, size) {
            return Err(BadInflight::TooShort(about.mmap_size));
        }
        let map = map_file(file, about.mmap_offset, whole_bytes(queues, size))?;
        let kept = Self { map, queues, size };
        let same = kept.at::<AtomicU64>(prologue::MAGIC).load(Ordering::Acquire) == MAGIC
            && kept.at::<AtomicU16>(prologue::QUEUES).load(Ordering::Relaxed) == queues
            && kept.at::<AtomicU16>(prologue::SIZE).load(Ordering::Relaxed) == size;
        if same { Ok(Rc::new(kept)) } else { Err(BadInflight::Foreign) }
    }

    fn at<T: AtomicInteger>(&self, offset: usize) -> &T {
        let whole = self.map.get_atomic_ref(offset);
        whole.expect("offsets follow from the shape, for which the memory is large enough")
    }

    /// The guest's choice of the write cache, which must outlive us: it would think writes durable that are not.
    pub fn write_cache(&self) -> Option<bool> {
        match self.at::<AtomicU8>(prologue::WRITE_CACHE).load(Ordering::Relaxed) {
            1 => Some(false),
            2 => Some(true),
            _ => None,
        }
    }

    /// Keeps the guest's choice.
    pub fn keep_write_cache(&self, on: bool) {
        self.at::<AtomicU8>(prologue::WRITE_CACHE).store(1 + u8::from(on), Ordering::Relaxed);
    }

    /// Nothing is under way, and nothing was chosen: the device was reset.
    pub fn forget(&self) {
        self.at::<AtomicU8>(prologue::WRITE_CACHE).store(0, Ordering::Relaxed);
        for queue in 0..usize::from(self.queues) {
            let start = PROLOGUE_BYTES + queue_bytes(self.size) * queue;
            self.at::<AtomicU16>(start + queue::USED).store(0, Ordering::Relaxed);
            for head in 0..usize::from(self.size) {
                let entry = start + QUEUE_BYTES + DESCRIPTOR_BYTES * head;
                self.at::<AtomicU8>(entry + entry::IN_FLIGHT).store(0, Ordering::Release);
            }
        }
    }

    /// One queue of at most so many descriptors; `None` when there is no room for it.
    pub fn queue(self: &Rc<Self>, index: u16, size: u16) -> Option<Tracked> {
        let start = PROLOGUE_BYTES + queue_bytes(self.size) * usize::from(index);
        let fits = index < self.queues && size <= self.size;
        fits.then(|| Tracked { whole: Rc::clone(self), start, size, counter: 0 })
    }
}

/// The requests of one queue.
pub(crate) struct Tracked {
    whole: Rc<Inflight>,
    start: usize,
    size: u16,
    counter: u64,
}

impl Tracked {
    fn of<T: AtomicInteger>(&self, head: u16, offset: usize) -> &T {
        self.whole.at(self.start + QUEUE_BYTES + DESCRIPTOR_BYTES * usize::from(head) + offset)
    }

    /// A request was taken from the guest; `head` is below the size of the queue.
    pub fn begin(&mut self, head: u16) {
        self.of::<AtomicU64>(head, entry::COUNTER).store(self.counter, Ordering::Relaxed);
        self.of::<AtomicU8>(head, entry::IN_FLIGHT).store(1, Ordering::Release);
        self.counter = self.counter.wrapping_add(1); // what it begins with is the front end's word
    }

    /// It is about to be put into the used ring.
    pub fn answering(&self, head: u16) {
        self.whole.at::<AtomicU16>(self.start + queue::LAST).store(head, Ordering::Release);
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    /// It is in the used ring, whose index is now `used`.
    pub fn answered(&self, head: u16, used: u16) {
        std::sync::atomic::fence(Ordering::SeqCst);
        self.of::<AtomicU8>(head, entry::IN_FLIGHT).store(0, Ordering::Release);
        self.whole.at::<AtomicU16>(self.start + queue::USED).store(used, Ordering::Release);
    }

    /// What was under way when the one before us ended, in the order in which it was taken. `used` is the index of the
    /// used ring.
    pub fn recover(&mut self, used: u16) -> Vec<u16> {
        let seen = self.whole.at::<AtomicU16>(self.start + queue::USED);
        if seen.load(Ordering::Acquire) != used {
            let last = self.whole.at::<AtomicU16>(self.start + queue::LAST).load(Ordering::Acquire);
            if last < self.size {
                self.of::<AtomicU8>(last, entry::IN_FLIGHT).store(0, Ordering::Release);
            }
            seen.store(used, Ordering::Release);
        }
        let in_flight =
            |head: &u16| self.of::<AtomicU8>(*head, entry::IN_FLIGHT).load(Ordering::Acquire) == 1;
        let counter = |head: u16| self.of::<AtomicU64>(head, entry::COUNTER).load(Ordering::Relaxed);
        let mut list: Vec<u16> = (0..self.size).filter(in_flight).collect();
        // Numbers that may have gone round: earlier and later is what the distance says.
        let any = list.first().map_or(0, |head| counter(*head));
        list.sort_by_key(|head| counter(*head).wrapping_sub(any).cast_signed());
        self.counter = list.last().map_or(0, |head| counter(*head).wrapping_add(1));
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reopen(about: &VhostUserInflight, file: &OwnedFd) -> Rc<Inflight> {
        Inflight::open(about, file.try_clone().unwrap()).unwrap()
    }

    #[test]
    fn what_was_under_way_is_found_again_in_its_order() {
        let (about, file) = Inflight::create(2, 8).unwrap();
        let whole = reopen(&about, &file);
        let mut queue = whole.queue(1, 8).unwrap();
        for head in [5, 2, 7] {
            queue.begin(head);
        }
        queue.answering(2);
        queue.answered(2, 1);
        whole.keep_write_cache(false);
        // Killed here.
        let whole = reopen(&about, &file);
        assert_eq!(whole.write_cache(), Some(false));
        assert!(whole.queue(0, 8).unwrap().recover(0).is_empty());
        let mut queue = whole.queue(1, 8).unwrap();
        assert_eq!(queue.recover(1), [5, 7]);
        queue.begin(1);
        queue.answering(7);
        // Killed when the used ring said 2 and the mark was still there.
        let mut queue = reopen(&about, &file).queue(1, 8).unwrap();
        assert_eq!(queue.recover(2), [5, 1]);
        // Killed before the used ring said so: 5 is done again.
        queue.answering(5);
        assert_eq!(reopen(&about, &file).queue(1, 8).unwrap().recover(2), [5, 1]);
    }

    #[test]
    fn numbers_go_round_whatever_the_front_end_has_put_there() {
        let (about, file) = Inflight::create(1, 8).unwrap();
        let mut queue = reopen(&about, &file).queue(0, 8).unwrap();
        queue.counter = u64::MAX - 1;
        for head in [3, 6, 1, 4] {
            queue.begin(head);
        }
        let mut queue = reopen(&about, &file).queue(0, 8).unwrap();
        assert_eq!(queue.recover(0), [3, 6, 1, 4]);
        queue.begin(0);
        queue.of::<AtomicU64>(2, entry::COUNTER).store(u64::MAX, Ordering::Relaxed);
        queue.of::<AtomicU8>(2, entry::IN_FLIGHT).store(1, Ordering::Relaxed);
        let mut queue = reopen(&about, &file).queue(0, 8).unwrap();
        assert_eq!(queue.recover(0).len(), 6);
        queue.begin(5);
    }

    #[test]
    fn what_is_not_ours_or_too_small_is_refused() {
        let (about, file) = Inflight::create(1, 8).unwrap();
        let open = |about: VhostUserInflight| Inflight::open(&about, file.try_clone().unwrap());
        assert!(matches!(
            open(VhostUserInflight::new(about.mmap_size, 0, 2, 8)),
            Err(BadInflight::TooShort(_))
        ));
        assert!(matches!(open(VhostUserInflight::new(1 << 20, 0, 2, 8)), Err(BadInflight::Memory(_))));
        let other = VhostUserInflight::new(about.mmap_size, 0, 1, 4);
        assert!(matches!(open(other), Err(BadInflight::Foreign)));
        let whole = open(about).unwrap();
        assert!(whole.queue(1, 8).is_none() && whole.queue(0, 16).is_none());
    }
}
