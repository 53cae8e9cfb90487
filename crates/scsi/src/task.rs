//! The task set of a logical unit (SAM-5 clause 8): order of execution, aborting, waiting for the end.
//!
//! A command that the disk works on is never cancelled: aborting marks it, its answer is dropped when it ends, and the
//! task management function is answered after that. So a fenced node's writes are over when PREEMPT AND ABORT is.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use lane::sync::Waiters;
use slab::Slab;

use crate::nexus::Seat;

/// Task attribute (SAM-5 clause 8.6).
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub enum Attribute {
    /// In any order.
    #[default]
    Simple,
    /// After all older ones, before all newer ones.
    Ordered,
    /// At once.
    HeadOfQueue,
    /// Only where an ACA exists: refused.
    Aca,
}

/// What becomes of an aborted task's answer.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Aborted {
    /// Nothing is answered.
    Silently,
    /// TASK ABORTED is answered (control mode page, TAS).
    WithStatus,
}

/// Most tasks of one nexus in one task set; more are answered with TASK SET FULL.
pub const TASKS_PER_NEXUS_MAX: u32 = 1024;

struct Entry {
    task: Rc<Task>,
    seat: Rc<Seat>,
}

/// One task, from its command's arrival to its end.
pub struct Task {
    tag: u64,
    number: u64,
    attribute: Attribute,
    aborted: Cell<Option<Aborted>>,
}

/// What one abort is about: the tasks it marked, and those it would have marked had another one not done so before.
#[derive(Default)]
pub(crate) struct Hit {
    /// Whose tasks were marked.
    pub seats: Vec<Rc<Seat>>,
    /// All of them, in order.
    numbers: Vec<u64>,
}

/// All tasks of a logical unit.
#[derive(Default)]
pub struct TaskSet {
    tasks: RefCell<Slab<Entry>>,
    next: Cell<u64>,
    /// Tasks in the set that are ORDERED: while there are none nobody waits for anybody.
    ordered: Cell<u32>,
    waiting: Cell<u32>,
    changed: Waiters,
}

/// A place in a task set; dropping it ends the task.
pub struct Place {
    set: Rc<TaskSet>,
    slot: usize,
    task: Rc<Task>,
}

impl TaskSet {
    /// Takes a task in. `None`: the nexus has too many.
    pub(crate) fn enter(self: &Rc<Self>, seat: &Rc<Seat>, tag: u64, attribute: Attribute) -> Option<Place> {
        if seat.tasks.get() >= TASKS_PER_NEXUS_MAX {
            return None;
        }
        seat.tasks.set(seat.tasks.get() + 1);
        let number = self.next.replace(self.next.get() + 1);
        if attribute == Attribute::Ordered {
            self.ordered.set(self.ordered.get() + 1);
        }
        let task = Rc::new(Task { tag, number, attribute, aborted: Cell::new(None) });
        let entry = Entry { task: Rc::clone(&task), seat: Rc::clone(seat) };
        let slot = self.tasks.borrow_mut().insert(entry);
        Some(Place { set: Rc::clone(self), slot, task })
    }

    /// Marks the tasks that `which` (seat and tag) names. A task that is marked already stays as it is.
    pub(crate) fn abort(&self, mut which: impl FnMut(&Rc<Seat>, u64) -> Option<Aborted>) -> Hit {
        let mut hit = Hit::default();
        for (_, entry) in self.tasks.borrow().iter() {
            let Some(how) = which(&entry.seat, entry.task.tag) else { continue };
            hit.numbers.push(entry.task.number);
            if entry.task.aborted.get().is_none() {
                entry.task.aborted.set(Some(how));
                if !hit.seats.iter().any(|s| Rc::ptr_eq(s, &entry.seat)) {
                    hit.seats.push(Rc::clone(&entry.seat));
                }
            }
        }
        hit.numbers.sort_unstable();
        if !hit.seats.is_empty() {
            self.changed.wake_all();
        }
        hit
    }

    /// Waits until the tasks that an abort was about have ended. A task that waits here stops waiting when it is aborted
    /// itself: its answer is dropped anyway, and two of them must not wait for each other.
    pub(crate) async fn have_ended(&self, hit: &Hit, asking: Option<&Task>) {
        self.until(|| {
            let tasks = self.tasks.borrow();
            let left = tasks.iter().any(|(_, e)| hit.numbers.binary_search(&e.task.number).is_ok());
            (!left || asking.is_some_and(Task::is_aborted)).then_some(())
        })
        .await
    }

    /// A task of this nexus with this tag is here (any tag for `None`).
    pub(crate) fn has(&self, seat: &Rc<Seat>, tag: Option<u64>) -> bool {
        let tasks = self.tasks.borrow();
        tasks.iter().any(|(_, e)| {
            Rc::ptr_eq(&e.seat, seat) && tag.is_none_or(|t| t == e.task.tag) && e.task.aborted.get().is_none()
        })
    }

    /// Tasks in the set.
    pub fn len(&self) -> usize {
        self.tasks.borrow().len()
    }

    /// No task is in the set.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    async fn until<T>(&self, ready: impl FnMut() -> Option<T> + Unpin) -> T {
        let _waiting = Waiting::new(&self.waiting);
        self.changed.until(ready).await
    }

    /// The task may begin: nothing that has to end first is in the set.
    fn may_begin(&self, task: &Task) -> bool {
        match task.attribute {
            Attribute::HeadOfQueue => true,
            Attribute::Simple | Attribute::Aca if self.ordered.get() == 0 => true,
            _ => !self.tasks.borrow().iter().any(|(_, e)| {
                e.task.number < task.number
                    && (task.attribute == Attribute::Ordered || e.task.attribute == Attribute::Ordered)
            }),
        }
    }
}

/// Counts who waits, also one that gives up waiting.
struct Waiting<'a>(&'a Cell<u32>);

impl<'a> Waiting<'a> {
    fn new(count: &'a Cell<u32>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl Place {
    /// Waits for the task's turn. At once unless ORDERED tasks are about.
    pub(crate) async fn turn(&self) {
        if self.set.may_begin(&self.task) {
            return;
        }
        self.set.until(|| (self.task.is_aborted() || self.set.may_begin(&self.task)).then_some(())).await
    }

    /// The task.
    pub(crate) fn task(&self) -> &Task {
        &self.task
    }

    /// Somebody has aborted the task: what goes on step by step need not go on.
    pub fn is_aborted(&self) -> bool {
        self.task.is_aborted()
    }

    /// Waits until somebody aborts the task.
    pub async fn aborted(&self) {
        self.set.until(|| self.task.is_aborted().then_some(())).await
    }
}

impl Task {
    /// Somebody has aborted it.
    pub fn is_aborted(&self) -> bool {
        self.aborted.get().is_some()
    }

    pub(crate) fn how_aborted(&self) -> Option<Aborted> {
        self.aborted.get()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let entry = self.set.tasks.borrow_mut().remove(self.slot);
        entry.seat.tasks.set(entry.seat.tasks.get() - 1);
        if self.task.attribute == Attribute::Ordered {
            self.set.ordered.set(self.set.ordered.get() - 1);
        }
        if self.set.waiting.get() > 0 {
            self.set.changed.wake_all();
        }
    }
}
