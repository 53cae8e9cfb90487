//! Tasks: one allocation each, polled in place, woken by a number.
//!
//! A waker is no pointer but a number: lane, generation, index. Cloning and dropping it costs nothing, and one that
//! outlives its task or lane at worst wakes somebody for nothing, which every future must bear anyway.
#![allow(unsafe_code)] // polling in place, and wakers that are numbers; each use has its reason

use std::cell::{Cell, UnsafeCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::ptr;
use std::rc::Rc;
use std::task::{Context, Poll, RawWaker, RawWakerVTable, Waker};

use super::{Lane, Mailbox};
use crate::rng::Rng;

/// Index of the main future of a lane.
pub(super) const MAIN: u32 = u32::MAX;

const _: () = assert!(size_of::<usize>() == 8, "a waker's number needs 64 bits");

/// Who is woken: lane (16 bits), generation (16 bits), index (32 bits).
#[derive(Copy, Clone, Debug)]
pub(crate) struct Key(u64);

impl Key {
    fn new(lane: u16, generation: u16, index: u32) -> Self {
        Self(u64::from(lane) << 48 | u64::from(generation) << 32 | u64::from(index))
    }
    pub(super) fn lane(self) -> u16 {
        (self.0 >> 48) as u16
    }
    fn generation(self) -> u16 {
        (self.0 >> 32) as u16
    }
    fn index(self) -> u32 {
        self.0 as u32
    }
}

static VTABLE: RawWakerVTable = RawWakerVTable::new(
    |data| RawWaker::new(data, &VTABLE),
    |data| wake(Key(data.addr() as u64)),
    |data| wake(Key(data.addr() as u64)),
    |_| {},
);

#[inline]
fn wake(key: Key) {
    let here = Lane::try_with(|lane| {
        let mut sched = lane.sched.borrow_mut();
        let mine = sched.lane == key.lane();
        if mine {
            sched.make_ready(key);
        }
        mine
    });
    if here != Some(true) {
        Mailbox::wake(key);
    }
}

/// A future that the executor can run.
pub(super) trait Run {
    /// Polls it; true when it is finished.
    fn poll(&self, cx: &mut Context<'_>) -> bool;
}

/// A task whose result can be waited for.
trait Joined<T> {
    fn take(&self, cx: &mut Context<'_>) -> Poll<T>;
}

struct Body<F: Future> {
    future: UnsafeCell<Option<F>>,
    result: Cell<Option<F::Output>>,
    waiter: Cell<Option<Waker>>,
}

impl<F: Future> Run for Body<F> {
    fn poll(&self, cx: &mut Context<'_>) -> bool {
        // SAFETY: only the run loop polls tasks, and it does not run inside of itself (a second lane on the thread is
        // refused), so this is the only reference. Nothing else touches `future`.
        let slot = unsafe { &mut *self.future.get() };
        let Some(future) = slot else { return true };
        // SAFETY: the body lives in an Rc and is never moved out of it; the future is dropped in place.
        match unsafe { Pin::new_unchecked(future) }.poll(cx) {
            Poll::Ready(value) => {
                *slot = None;
                self.result.set(Some(value));
                if let Some(waker) = self.waiter.take() {
                    waker.wake();
                }
                true
            }
            Poll::Pending => false,
        }
    }
}

impl<F: Future> Joined<F::Output> for Body<F> {
    fn take(&self, cx: &mut Context<'_>) -> Poll<F::Output> {
        match self.result.take() {
            Some(value) => Poll::Ready(value),
            None => {
                self.waiter.set(Some(cx.waker().clone()));
                Poll::Pending
            }
        }
    }
}

/// The result of a spawned task. Dropping it lets the task go on by itself.
pub struct Task<T> {
    body: Rc<dyn Joined<T>>,
}

impl<T> Future for Task<T> {
    type Output = T;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        self.body.take(cx)
    }
}

/// Starts a task on this lane. It runs until it is finished, whether or not anybody waits for it.
///
/// A panic of a task ends its lane: what the task owned may be in any state, and nothing that others can see of it must
/// be written. Tasks started by [`super::Handle::run`] pass their panic to who asked, who is to judge.
pub fn spawn<F>(future: F) -> Task<F::Output>
where
    F: Future + 'static,
{
    let body = Rc::new(Body {
        future: UnsafeCell::new(Some(future)),
        result: Cell::new(None),
        waiter: Cell::new(None),
    });
    let run: Rc<dyn Run> = Rc::clone(&body) as Rc<dyn Run>;
    Lane::with(|lane| lane.sched.borrow_mut().insert(run));
    Task { body }
}

struct Entry {
    generation: u16,
    queued: bool,
    task: Option<Rc<dyn Run>>,
}

/// All tasks of a lane and the queue of ready ones.
pub(crate) struct Sched {
    lane: u16,
    entries: Vec<Entry>,
    free: Vec<u32>,
    ready: VecDeque<u32>,
    main_queued: bool,
    /// Draws the next task, where the order is to be stirred.
    choose: Option<Rng>,
}

impl Sched {
    pub(super) fn new(lane: u16, choose: Option<Rng>) -> Self {
        Self {
            lane,
            entries: Vec::new(),
            free: Vec::new(),
            ready: VecDeque::new(),
            main_queued: false,
            choose,
        }
    }

    pub(super) fn waker(&self, index: u32) -> Waker {
        let generation = self.entries.get(index as usize).map_or(0, |e| e.generation);
        let key = Key::new(self.lane, generation, index);
        // SAFETY: the functions of the table only read the number.
        unsafe { Waker::from_raw(RawWaker::new(ptr::without_provenance(key.0 as usize), &VTABLE)) }
    }

    fn insert(&mut self, task: Rc<dyn Run>) {
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                self.entries.push(Entry { generation: 0, queued: false, task: None });
                (self.entries.len() - 1) as u32
            }
        };
        let entry = &mut self.entries[index as usize];
        entry.queued = true;
        entry.task = Some(task);
        self.ready.push_back(index);
    }

    /// Takes a finished task out; the caller still holds it, so nothing is dropped here.
    pub(super) fn remove(&mut self, index: u32) {
        let entry = &mut self.entries[index as usize];
        entry.task = None;
        entry.generation = entry.generation.wrapping_add(1);
        // A wake-up that came while it finished stays in the queue and finds no task, or a new one, for nothing.
        self.free.push(index);
    }

    #[inline]
    pub(super) fn make_ready(&mut self, key: Key) {
        let index = key.index();
        if index == MAIN {
            return self.make_main_ready();
        }
        if let Some(entry) = self.entries.get_mut(index as usize)
            && entry.generation == key.generation()
            && entry.task.is_some()
            && !entry.queued
        {
            entry.queued = true;
            self.ready.push_back(index);
        }
    }

    pub(super) fn make_main_ready(&mut self) {
        if !self.main_queued {
            self.main_queued = true;
            self.ready.push_back(MAIN);
        }
    }

    pub(super) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// The next to be polled.
    #[inline]
    pub(super) fn next(&mut self) -> Option<(u32, Option<Rc<dyn Run>>)> {
        let index = match &mut self.choose {
            Some(rng) if self.ready.len() > 1 => {
                let pick = rng.below(self.ready.len() as u64) as usize;
                self.ready.swap_remove_back(pick)
            }
            _ => self.ready.pop_front(),
        }?;
        if index == MAIN {
            self.main_queued = false;
            return Some((MAIN, None));
        }
        let entry = &mut self.entries[index as usize];
        entry.queued = false;
        Some((index, entry.task.clone()))
    }

    /// All tasks, to be dropped by the caller.
    pub(super) fn take_all(&mut self) -> Vec<Rc<dyn Run>> {
        self.ready.clear();
        self.free.clear();
        self.main_queued = false;
        self.entries.drain(..).filter_map(|e| e.task).collect()
    }
}
