//! The executor: tasks, the queue of ready ones, timers, and the turn of the driver.
//!
//! One pass: run what is ready until nothing is (or [`POLLS_PER_TURN`] polls are done), take the mail of other
//! threads, fire timers, then let the driver hand all new operations to the kernel at once and collect what is done;
//! it sleeps there when nothing is ready. Waking a task on its own lane is a store and a push: no lock, no atomic.

mod clock;
mod handle;
mod mailbox;
mod task;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::pin;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use crate::driver::{Driver, DriverKind, InUse, Wait};
use crate::op::Ops;
use crate::sim::Sim;

pub use clock::{now, sleep, yield_now};
pub use handle::{Handle, start};
pub(crate) use mailbox::Mailbox;
pub use task::{Task, spawn};

use clock::Clock;
use task::{MAIN, Sched};

/// Polls between two turns of the driver, so that busy tasks cannot starve the kernel's answers.
const POLLS_PER_TURN: u32 = 256;
/// The same on a simulated lane, where time passes by turns.
const SIM_POLLS_PER_TURN: u32 = 8;
/// Virtual time of a turn with ready tasks: who yields until something happens must see it happen.
const SIM_TURN: Duration = Duration::from_micros(1);

/// How a lane runs.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the thread and label of its metrics.
    pub name: String,
    /// What talks to the kernel.
    pub driver: DriverKind,
    /// Memory for registered buffers, in bytes: pinned when the lane opens its first direct file, as far as
    /// RLIMIT_MEMLOCK allows. 0: plain buffers only.
    pub registered_bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { name: String::new(), driver: DriverKind::Auto, registered_bytes: 4 << 20 }
    }
}

/// What a lane has done since it began.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Times that a task was run.
    pub polls: u64,
    /// Rounds of running what is ready and asking the kernel.
    pub turns: u64,
    /// Turns in which nothing was ready, and the lane slept.
    pub sleeps: u64,
    /// Operations of files and sockets begun.
    pub operations: u64,
}

/// The state of one lane. Lives on the stack of [`block_on_with`].
pub(crate) struct Lane {
    /// Never given twice in a process.
    pub(crate) serial: u64,
    pub(crate) sched: RefCell<Sched>,
    pub(crate) clock: RefCell<Clock>,
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) ops: RefCell<Ops>,
    pub(crate) driver: RefCell<Driver>,
    pub(crate) sim: Option<Sim>,
    pub(crate) counters: Cell<Counters>,
    stopping: Cell<bool>,
}

thread_local! {
    static LANE: Cell<*const Lane> = const { Cell::new(ptr::null()) };
}

impl Lane {
    /// The lane of this thread, if it runs one.
    #[inline]
    #[allow(unsafe_code)]
    pub(crate) fn try_with<R>(f: impl FnOnce(&Lane) -> R) -> Option<R> {
        let lane = LANE.get();
        // SAFETY: set by `Running::begin` to a lane that outlives it, cleared by its Drop on this same thread.
        if lane.is_null() { None } else { Some(f(unsafe { &*lane })) }
    }

    /// The lane of this thread. Panics when it runs none: a bug of the caller, who needs [`block_on`] or [`Handle`].
    #[inline]
    pub(crate) fn with<R>(f: impl FnOnce(&Lane) -> R) -> R {
        match Self::try_with(f) {
            Some(value) => value,
            None => panic!("this thread is no lane: use lane::block_on or Handle::run"),
        }
    }

    fn new(options: &Options) -> Self {
        static SERIAL: AtomicU64 = AtomicU64::new(1);
        let mailbox = Mailbox::register();
        let sim = match options.driver {
            DriverKind::Sim { seed } => Some(Sim::new(seed)),
            _ => None,
        };
        Lane {
            serial: SERIAL.fetch_add(1, Ordering::Relaxed),
            sched: RefCell::new(Sched::new(mailbox.id(), sim.as_ref().map(Sim::fork_rng))),
            clock: RefCell::new(Clock::new(sim.is_some())),
            driver: RefCell::new(Driver::new(options)),
            mailbox,
            ops: RefCell::default(),
            sim,
            counters: Cell::default(),
            stopping: Cell::new(false),
        }
    }

    #[inline]
    pub(crate) fn count(&self, change: impl FnOnce(&mut Counters)) {
        let mut counters = self.counters.get();
        change(&mut counters);
        self.counters.set(counters);
    }

    /// What carries its I/O.
    pub(crate) fn in_use(&self) -> InUse {
        self.driver.borrow_mut().in_use(&self.mailbox)
    }

    /// One turn of the driver: hands over what is new, collects what is done, waits as told.
    pub(crate) fn drive(&self, wait: Wait) {
        let mut done = self.ops.borrow_mut().take_done_list();
        self.driver.borrow_mut().turn(wait, &self.mailbox, &mut done);
        for (key, result) in done.drain(..) {
            // The borrow ends before anybody is woken.
            let waker = self.ops.borrow_mut().complete(key, result);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
        self.ops.borrow_mut().give_done_list(done);
    }

    /// Takes what other threads mailed.
    fn take_mail(&self) {
        let Some(mail) = self.mailbox.take() else { return };
        for (key, result) in mail.done {
            let waker = self.ops.borrow_mut().complete(key, result);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
        for key in mail.woken {
            self.sched.borrow_mut().make_ready(key);
        }
        for job in mail.jobs {
            job();
        }
    }

    fn run_task(&self, index: u32, task: Option<std::rc::Rc<dyn task::Run>>) {
        let Some(task) = task else { return };
        let waker = self.sched.borrow().waker(index);
        if task.poll(&mut Context::from_waker(&waker)) {
            self.sched.borrow_mut().remove(index);
        }
        // `task` is dropped here, after the borrow: its last reference may run any destructor.
    }

    /// Lets time, other threads and the kernel have their say; sleeps when nothing is ready.
    fn turn(&self) {
        self.take_mail();
        let next_timer = self.clock.borrow().next_timer();
        self.fire_timers(next_timer);
        if self.sched.borrow().has_ready() {
            self.clock.borrow_mut().pass(SIM_TURN);
            return self.drive(Wait::No);
        }
        if self.sim.is_some() {
            return self.turn_of_sim();
        }
        let next_timer = self.clock.borrow().next_timer();
        let wait = match next_timer {
            Some(at) => Wait::For(at.saturating_duration_since(now())),
            None => Wait::Forever,
        };
        if self.mailbox.may_sleep() {
            self.count(|c| c.sleeps += 1);
            self.drive(wait);
            self.mailbox.is_awake();
        }
    }

    /// Nothing is ready: virtual time jumps to the next timer. Without one only other threads can help.
    fn turn_of_sim(&self) {
        let next = self.clock.borrow().next_timer();
        if let Some(at) = next {
            self.clock.borrow_mut().jump(at);
            return;
        }
        assert!(
            self.mailbox.is_shared(),
            "deadlock: every task of this simulated lane waits, and nothing is under way"
        );
        if self.mailbox.may_sleep() {
            self.drive(Wait::Forever);
            self.mailbox.is_awake();
        }
    }

    fn fire_timers(&self, next: Option<Instant>) {
        let now = match next {
            Some(at) if at <= now() => now(),
            _ => return,
        };
        let due = self.clock.borrow_mut().take_due(now);
        due.into_iter().for_each(|waker| waker.wake());
    }

    /// Ends what is under way without running tasks: socket operations are cancelled, file operations finish.
    fn drain(&self) {
        loop {
            self.take_mail_of_operations();
            if self.ops.borrow().under_way() == 0 {
                break;
            }
            // Again in each round: one that was just being worked on may have gone back to waiting.
            let keys = self.ops.borrow().cancellable();
            for key in keys {
                self.driver.borrow_mut().cancel(key);
            }
            if self.mailbox.may_sleep() {
                self.drive(Wait::For(Duration::from_secs(1)));
                self.mailbox.is_awake();
            }
        }
    }

    fn take_mail_of_operations(&self) {
        if let Some(mail) = self.mailbox.take() {
            for (key, result) in mail.done {
                drop(self.ops.borrow_mut().complete(key, result));
            }
        }
    }

    /// Cancels one operation and waits until it is over.
    pub(crate) fn cancel_and_wait(&self, key: u32) {
        while !self.ops.borrow().is_done(key) {
            self.driver.borrow_mut().cancel(key);
            self.drive(Wait::For(Duration::from_millis(100)));
        }
    }

    pub(crate) fn stop(&self) {
        self.stopping.set(true);
        self.sched.borrow_mut().make_main_ready();
    }
}

/// A lane that this thread runs. Dropping it, also in a panic, drains what is under way and then drops the tasks.
struct Running<'a>(&'a Lane);

impl<'a> Running<'a> {
    fn begin(lane: &'a Lane) -> Self {
        assert!(LANE.get().is_null(), "this thread runs a lane already");
        LANE.set(lane);
        Self(lane)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let lane = self.0;
        lane.drain();
        // A destructor may spawn or start something: go on until nothing is left.
        loop {
            let tasks = lane.sched.borrow_mut().take_all();
            if tasks.is_empty() {
                break;
            }
            drop(tasks);
            lane.drain();
        }
        lane.driver.borrow_mut().close();
        let mail = lane.mailbox.close();
        drop(mail);
        LANE.set(ptr::null());
    }
}

/// Runs a lane on this thread until `future` is done. Tasks that are not finished then are dropped, after the
/// operations they wait for have ended.
pub fn block_on<F: Future>(future: F) -> F::Output {
    block_on_with(Options::default(), future)
}

/// As [`block_on`], with options.
pub fn block_on_with<F: Future>(options: Options, future: F) -> F::Output {
    assert!(LANE.get().is_null(), "this thread runs a lane already");
    let lane = Lane::new(&options);
    let _running = Running::begin(&lane);
    // The future is dropped inside, while the lane still runs.
    run_main(&lane, future)
}

struct DrainInPanic<'a>(&'a Lane);

impl Drop for DrainInPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.drain();
        }
    }
}

fn run_main<F: Future>(lane: &Lane, future: F) -> F::Output {
    let mut main = pin!(future);
    // Dropped before `main`: when a task panics, what the main future has under way ends first.
    let _drain = DrainInPanic(lane);
    lane.sched.borrow_mut().make_main_ready();
    let polls = if lane.sim.is_some() { SIM_POLLS_PER_TURN } else { POLLS_PER_TURN };
    loop {
        let mut polled = 0;
        while polled < polls {
            let next = lane.sched.borrow_mut().next();
            polled += 1;
            match next {
                None => break,
                Some((MAIN, _)) => {
                    let waker = lane.sched.borrow().waker(MAIN);
                    if let Poll::Ready(out) = main.as_mut().poll(&mut Context::from_waker(&waker)) {
                        return out;
                    }
                }
                Some((index, task)) => lane.run_task(index, task),
            }
        }
        lane.count(|c| (c.polls, c.turns) = (c.polls + u64::from(polled), c.turns + 1));
        lane.turn();
    }
}

/// What this lane has done since it began.
pub fn counters() -> Counters {
    Lane::with(|lane| lane.counters.get())
}

/// What carries the I/O of this lane.
pub fn in_use() -> InUse {
    Lane::with(Lane::in_use)
}

/// The mailbox of this lane, for tests of drivers.
#[cfg(test)]
pub(crate) fn own_mailbox() -> Arc<Mailbox> {
    Lane::with(|lane| Arc::clone(&lane.mailbox))
}

/// Ends when [`Handle::stop`] was called.
pub(crate) async fn until_stopped() {
    std::future::poll_fn(|_| match Lane::with(|lane| lane.stopping.get()) {
        true => Poll::Ready(()),
        false => Poll::Pending,
    })
    .await
}

#[cfg(test)]
mod tests;
