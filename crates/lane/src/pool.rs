//! Threads for what would make a lane wait: a bounded pool that grows on demand and is shared by all lanes.
//!
//! Two pools exist. [`offload`] runs computation (hashing, compression) on as many threads as there are cores, at
//! least two; `on_worker` runs system calls that block and is allowed more threads, because they sleep.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::task::{Context, Poll, Waker};

type Job = Box<dyn FnOnce() + Send>;

/// Most threads that wait in system calls at a time, all lanes together. Enough to keep a device's queue busy.
const IO_THREADS_MAX: usize = 16;

/// How much the threads of [`offload`] stand back: what they do is long, and a guest's request is not to wait for it.
const COMPUTE_NICE: i32 = 10;

struct Queue {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

/// A pool of threads. Threads start when work waits and none is idle, and stay.
pub(crate) struct Pool {
    name: &'static str,
    threads_max: usize,
    nice: i32,
    queue: Mutex<Queue>,
    bell: Condvar,
}

impl Pool {
    fn new(name: &'static str, threads_max: usize, nice: i32) -> Self {
        let queue = Queue { jobs: VecDeque::new(), threads: 0, idle: 0 };
        Self { name, threads_max, nice, queue: Mutex::new(queue), bell: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Jobs run outside of the lock, so a poisoned queue is still whole.
        self.queue.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Runs `job` on a thread of the pool. Without any thread (the system refuses to start one) it runs here.
    pub(crate) fn submit(&'static self, job: Job) {
        let mut queue = self.lock();
        queue.jobs.push_back(job);
        if queue.idle >= queue.jobs.len() {
            drop(queue);
            self.bell.notify_one();
            return;
        }
        if queue.threads < self.threads_max {
            queue.threads += 1;
            drop(queue);
            let name = format!("{}-worker", self.name);
            if let Err(error) = std::thread::Builder::new().name(name).spawn(move || self.work()) {
                tracing::warn!(%error, pool = self.name, "cannot start a thread");
                let mut queue = self.lock();
                queue.threads -= 1;
                let alone = if queue.threads == 0 { queue.jobs.pop_back() } else { None };
                drop(queue);
                if let Some(job) = alone {
                    job();
                }
            }
            return;
        }
        drop(queue);
        self.bell.notify_one();
    }

    fn work(&self) {
        // Of this thread alone: on Linux a thread has a niceness of its own. Where it may not be set all are equal.
        let own = Some(rustix::thread::gettid());
        if rustix::process::getpriority_process(own).is_ok_and(|nice| nice < self.nice) {
            let _ = rustix::process::setpriority_process(own, self.nice);
        }
        let mut queue = self.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                drop(queue);
                job();
                queue = self.lock();
                continue;
            }
            queue.idle += 1;
            queue = self.bell.wait(queue).unwrap_or_else(|e| e.into_inner());
            queue.idle -= 1;
        }
    }
}

fn compute() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(|| {
        let cores = std::thread::available_parallelism().map_or(2, |n| n.get());
        Pool::new("offload", cores.max(2), COMPUTE_NICE)
    })
}

/// The pool whose threads may wait in system calls.
pub(crate) fn blocking() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(|| Pool::new("io", IO_THREADS_MAX, 0))
}

struct Slot<T>(Mutex<(Option<std::thread::Result<T>>, Option<Waker>)>);

impl<T> Slot<T> {
    fn fill(&self, value: std::thread::Result<T>) {
        let mut slot = self.0.lock().unwrap_or_else(|e| e.into_inner());
        slot.0 = Some(value);
        let waker = slot.1.take();
        drop(slot);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// Work under way on another thread.
struct Working<T> {
    slot: Arc<Slot<T>>,
}

impl<T> Future for Working<T> {
    type Output = std::thread::Result<T>;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let value = {
            let mut slot = self.slot.0.lock().unwrap_or_else(|e| e.into_inner());
            let value = slot.0.take();
            if value.is_none() {
                slot.1 = Some(cx.waker().clone());
            }
            value
        };
        value.map_or(Poll::Pending, Poll::Ready)
    }
}

fn start<T: Send + 'static>(pool: &'static Pool, work: impl FnOnce() -> T + Send + 'static) -> Working<T> {
    let slot = Arc::new(Slot(Mutex::new((None, None))));
    let far = Arc::clone(&slot);
    pool.submit(Box::new(move || far.fill(catch_unwind(AssertUnwindSafe(work)))));
    Working { slot }
}

/// Runs something that takes long (hashing, compression, a blocking call) on another thread. At most as many run at a
/// time as there are cores (two on a machine with one). A panic of the work is passed on to the caller; dropping the
/// future lets the work go on unheard.
pub async fn offload<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    if crate::sim::is_on() {
        crate::sim::delay().await;
        return work();
    }
    start(compute(), work).await.unwrap_or_else(|panic| resume_unwind(panic))
}

/// Runs a system call that blocks on another thread. It owns what it works on, so the future may be dropped.
pub(crate) async fn on_worker<T: Send + 'static>(
    call: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    start(blocking(), call).await.unwrap_or_else(|panic| resume_unwind(panic))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    #[test]
    fn the_pool_is_bounded_and_finishes_everything() {
        static NOW: AtomicUsize = AtomicUsize::new(0);
        static MOST: AtomicUsize = AtomicUsize::new(0);
        let sum: u64 = crate::block_on(async {
            let all: Vec<_> = (0..64u64)
                .map(|n| {
                    crate::spawn(offload(move || {
                        MOST.fetch_max(NOW.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        std::thread::sleep(Duration::from_millis(1));
                        NOW.fetch_sub(1, Ordering::SeqCst);
                        n
                    }))
                })
                .collect();
            let mut sum = 0;
            for one in all {
                sum += one.await;
            }
            sum
        });
        assert_eq!(sum, 63 * 64 / 2);
        assert!(MOST.load(Ordering::SeqCst) <= compute().threads_max);
    }

    #[test]
    fn computation_stands_back() {
        let own = || rustix::process::getpriority_process(Some(rustix::thread::gettid())).unwrap();
        let before = own();
        assert_eq!(crate::block_on(offload(own)), before.max(COMPUTE_NICE));
        assert_eq!(own(), before, "the lane itself does not");
    }

    #[test]
    #[should_panic(expected = "passed on")]
    fn a_panic_reaches_the_caller() {
        crate::block_on(offload(|| panic!("passed on")));
    }
}
