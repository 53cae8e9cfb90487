//! A lane as other threads see it.

use std::any::Any;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use super::{Lane, Mailbox, Options, block_on_with, spawn, until_stopped};

/// A lane on a thread of its own, as others see it.
#[derive(Clone)]
pub struct Handle {
    mailbox: Arc<Mailbox>,
}

/// Starts a lane on a new thread. It runs until [`Handle::stop`], or as long as the process.
pub fn start(options: Options) -> std::io::Result<Handle> {
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::Builder::new().name(options.name.clone()).spawn(move || {
        block_on_with(options, async move {
            tracing::info!(engine = super::in_use().engine, "lane started");
            let _ = send.send(Handle::current());
            until_stopped().await;
        })
    })?;
    receive.recv().map_err(|_| std::io::Error::other("the lane did not start"))
}

enum Answer<T> {
    Awaited(Option<Waker>),
    Value(T),
    Panic(Box<dyn Any + Send>),
    /// The lane ended before it answered, or the answer was taken.
    None,
}

struct Slot<T>(Mutex<Answer<T>>);

impl<T> Slot<T> {
    fn lock(&self) -> MutexGuard<'_, Answer<T>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn fill(&self, answer: Answer<T>) {
        let before = std::mem::replace(&mut *self.lock(), answer);
        if let Answer::Awaited(Some(waker)) = before {
            waker.wake();
        }
    }
}

/// The lane's end of a question. Dropped unanswered (the lane stopped), it says so.
struct Answering<T>(Arc<Slot<T>>);

impl<T> Drop for Answering<T> {
    fn drop(&mut self) {
        let open = matches!(*self.0.lock(), Answer::Awaited(_));
        if open {
            self.0.fill(Answer::None);
        }
    }
}

/// A future whose panic is a value.
struct Caught<F>(Pin<Box<F>>);

impl<F: Future> Future for Caught<F> {
    type Output = std::thread::Result<F::Output>;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match catch_unwind(AssertUnwindSafe(|| self.0.as_mut().poll(cx))) {
            Ok(Poll::Ready(value)) => Poll::Ready(Ok(value)),
            Ok(Poll::Pending) => Poll::Pending,
            Err(panic) => Poll::Ready(Err(panic)),
        }
    }
}

impl Handle {
    /// The lane of this thread. Panics when it runs none.
    pub fn current() -> Self {
        Lane::with(|lane| Self { mailbox: Arc::clone(&lane.mailbox) })
    }

    /// Runs a task on the lane: `make` is called there, and its future needs not be `Send`; the answer does.
    ///
    /// Any executor may wait for the answer; the task goes on when nobody does. A panic of the task is passed on to
    /// who waits, and so is a lane that stopped before it answered.
    pub fn run<M, F, T>(&self, make: M) -> impl Future<Output = T> + Send + use<M, F, T>
    where
        M: FnOnce() -> F + Send + 'static,
        F: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        let slot = Arc::new(Slot(Mutex::new(Answer::Awaited(None))));
        let far = Answering(Arc::clone(&slot));
        self.mailbox.send_job(Box::new(move || {
            let future = match catch_unwind(AssertUnwindSafe(make)) {
                Ok(future) => future,
                Err(panic) => return far.0.fill(Answer::Panic(panic)),
            };
            drop(spawn(async move {
                match Caught(Box::pin(future)).await {
                    Ok(value) => far.0.fill(Answer::Value(value)),
                    Err(panic) => far.0.fill(Answer::Panic(panic)),
                }
            }));
        }));
        std::future::poll_fn(move |cx| {
            let mut answer = slot.lock();
            if let Answer::Awaited(waker) = &mut *answer {
                *waker = Some(cx.waker().clone());
                return Poll::Pending;
            }
            let taken = std::mem::replace(&mut *answer, Answer::None);
            drop(answer);
            match taken {
                Answer::Value(value) => Poll::Ready(value),
                Answer::Panic(panic) => resume_unwind(panic),
                Answer::Awaited(_) | Answer::None => panic!("the lane has stopped"),
            }
        })
    }

    /// Ends the lane: operations under way end (sockets are cancelled, files finish), tasks are dropped where they
    /// are. Returns when the lane is over; called on the lane itself, at once. For lanes begun by [`start`]: one that
    /// runs in `block_on` ends when its future does, and this only waits for it.
    pub fn stop(&self) {
        let own = Lane::try_with(|lane| Arc::ptr_eq(&lane.mailbox, &self.mailbox)) == Some(true);
        if own {
            return Lane::with(Lane::stop);
        }
        if self.mailbox.send_job(Box::new(|| Lane::with(Lane::stop))) {
            self.mailbox.wait_ended();
        }
    }
}
