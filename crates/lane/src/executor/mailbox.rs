//! What other threads may touch of a lane: jobs, wake-ups and finished operations mailed to it.
//!
//! A sender rings the bell (an eventfd) only when the lane said that it goes to sleep. Both sides store before they
//! load, sequentially consistent, so one of them sees the other: a lane that misses a letter is not asleep, and a
//! sender that misses the sleeper has its letter seen.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, RwLock};

use super::task::Key;

type Job = Box<dyn FnOnce() + Send>;

/// Letters not taken yet.
#[derive(Default)]
pub(crate) struct Mail {
    pub(super) jobs: Vec<Job>,
    pub(super) woken: Vec<Key>,
    pub(super) done: Vec<(u32, i32)>,
}

/// See the module.
pub(crate) struct Mailbox {
    id: u16,
    /// `None` when the lane is over.
    mail: Mutex<Option<Mail>>,
    ended: Condvar,
    some: AtomicBool,
    sleeping: AtomicBool,
    bell: OwnedFd,
}

/// All lanes of the process, by number. A number is given again when its lane is over.
static LANES: RwLock<Vec<Option<Arc<Mailbox>>>> = RwLock::new(Vec::new());

impl Mailbox {
    /// A mailbox with a free number. Panics when the process has no file descriptor left or 65,536 lanes run.
    pub(super) fn register() -> Arc<Self> {
        let bell = match rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC) {
            Ok(bell) => bell,
            Err(error) => panic!("cannot start a lane: eventfd: {error}"),
        };
        let mut lanes = LANES.write().unwrap_or_else(|e| e.into_inner());
        let place = lanes.iter().position(Option::is_none).unwrap_or(lanes.len());
        let Ok(id) = u16::try_from(place) else { panic!("cannot start a lane: 65536 run already") };
        let mailbox = Arc::new(Self {
            id,
            mail: Mutex::new(Some(Mail::default())),
            ended: Condvar::new(),
            some: AtomicBool::new(false),
            sleeping: AtomicBool::new(false),
            bell,
        });
        if place == lanes.len() {
            lanes.push(None);
        }
        lanes[place] = Some(Arc::clone(&mailbox));
        mailbox
    }

    pub(super) fn id(&self) -> u16 {
        self.id
    }

    /// The eventfd that is rung when the lane sleeps.
    pub(crate) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Mail>> {
        self.mail.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Mails something. False when the lane is over; the letter is dropped then.
    fn send(&self, put: impl FnOnce(&mut Mail)) -> bool {
        match &mut *self.lock() {
            Some(mail) => put(mail),
            None => return false,
        }
        self.some.store(true, Ordering::SeqCst);
        if self.sleeping.swap(false, Ordering::SeqCst) {
            self.ring();
        }
        true
    }

    fn ring(&self) {
        // Any number above zero rings. Fails only when the counter is full, and then the lane is rung already.
        let _ = rustix::io::write(&self.bell, &1u64.to_le_bytes());
    }

    /// Runs a job on the lane.
    pub(crate) fn send_job(&self, job: Job) -> bool {
        let mut job = Some(job);
        self.send(|mail| mail.jobs.extend(job.take()))
    }

    /// Tells that operation `key` ended.
    pub(crate) fn send_done(&self, key: u32, result: i32) {
        self.send(|mail| mail.done.push((key, result)));
    }

    /// Wakes a task of any lane, from any thread.
    pub(super) fn wake(key: Key) {
        let lanes = LANES.read().unwrap_or_else(|e| e.into_inner());
        if let Some(Some(mailbox)) = lanes.get(usize::from(key.lane())) {
            mailbox.send(|mail| mail.woken.push(key));
        }
    }

    /// Takes all letters, if there are any.
    #[inline]
    pub(super) fn take(&self) -> Option<Mail> {
        if !self.some.load(Ordering::Acquire) {
            return None;
        }
        self.some.store(false, Ordering::SeqCst);
        self.lock().as_mut().map(std::mem::take)
    }

    /// Says that the lane goes to sleep; false when there is mail and it must not.
    pub(super) fn may_sleep(&self) -> bool {
        self.sleeping.store(true, Ordering::SeqCst);
        if self.some.load(Ordering::SeqCst) {
            self.sleeping.store(false, Ordering::SeqCst);
            return false;
        }
        true
    }

    pub(super) fn is_awake(&self) {
        self.sleeping.store(false, Ordering::SeqCst);
    }

    /// Somebody besides the lane and the list of lanes can send letters.
    pub(super) fn is_shared(self: &Arc<Self>) -> bool {
        Arc::strong_count(self) > 2 || self.some.load(Ordering::SeqCst)
    }

    /// Takes no letters any more, and frees the number. The last letters are for the caller to drop.
    pub(super) fn close(&self) -> Option<Mail> {
        let last = self.lock().take();
        let mut lanes = LANES.write().unwrap_or_else(|e| e.into_inner());
        let own = lanes[usize::from(self.id)].take();
        drop(lanes);
        drop(own);
        self.ended.notify_all();
        last
    }

    /// Blocks until the lane is over.
    pub(super) fn wait_ended(&self) {
        let mut mail = self.lock();
        while mail.is_some() {
            mail = self.ended.wait(mail).unwrap_or_else(|e| e.into_inner());
        }
    }
}
