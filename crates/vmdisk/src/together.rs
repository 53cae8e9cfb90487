//! Several operations at once, and one operation for several callers.

use std::cell::Cell;
use std::future::Future;

use block::{DiskError, Io};
use lane::sync::Waiters;
use smallvec::SmallVec;

/// Runs all of them at the same time and answers when the last is done: the first error, if any. None is dropped
/// before its end, because the kernel may have its memory.
pub(crate) async fn all(mut list: SmallVec<[Io<'_>; 4]>) -> Result<(), DiskError> {
    if list.len() == 1 {
        // One operation is the usual case: no bookkeeping.
        return match list.pop() {
            Some(only) => only.await,
            None => Ok(()),
        };
    }
    lane::sync::together(list).await.into_iter().collect()
}

/// Runs operations that `make` produces, `width` at a time, so that memory stays bounded.
pub(crate) async fn in_turns<'a>(
    width: usize,
    makers: impl Iterator<Item = Io<'a>>,
) -> Result<(), DiskError> {
    let mut batch = SmallVec::new();
    for io in makers {
        batch.push(io);
        if batch.len() == width {
            all(std::mem::take(&mut batch)).await?;
        }
    }
    if batch.is_empty() { Ok(()) } else { all(batch).await }
}

/// Lets many flushes share one: a caller is served by a run that began after it asked.
#[derive(Default)]
pub(crate) struct Shared {
    begun: Cell<u64>,
    done: Cell<u64>,
    running: Cell<bool>,
    waiters: Waiters,
}

impl Shared {
    /// Waits for a run that began after this call, or does it. A failed run serves only the caller that did it:
    /// the others try by themselves and see their own error.
    pub(crate) async fn run<F>(&self, work: impl FnOnce() -> F) -> Result<(), DiskError>
    where
        F: Future<Output = Result<(), DiskError>>,
    {
        let wanted = self.begun.get() + 1;
        self.waiters.until(|| (self.done.get() >= wanted || !self.running.replace(true)).then_some(())).await;
        if self.done.get() >= wanted {
            return Ok(());
        }
        let number = wanted.max(self.begun.get() + 1);
        self.begun.set(number);
        let result = work().await;
        if result.is_ok() {
            self.done.set(number);
        }
        self.running.set(false);
        self.waiters.wake_all();
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;

    #[test]
    fn callers_share_a_run_that_began_after_they_asked() {
        lane::block_on(async {
            let (shared, runs) = (Rc::new(Shared::default()), Rc::new(Cell::new(0)));
            let call = |shared: &Rc<Shared>| {
                let (shared, runs) = (Rc::clone(shared), Rc::clone(&runs));
                lane::spawn(async move {
                    let work = || async {
                        runs.set(runs.get() + 1);
                        lane::sleep(std::time::Duration::from_millis(2)).await;
                        Ok(())
                    };
                    shared.run(work).await
                })
            };
            let first = call(&shared);
            lane::yield_now().await;
            let late: Vec<_> = (0..10).map(|_| call(&shared)).collect();
            first.await.unwrap();
            for task in late {
                task.await.unwrap();
            }
            assert_eq!(runs.get(), 2, "one that was under way, one for the ten who came too late for it");
            shared.run(|| async { Ok(()) }).await.unwrap();
        });
    }
}
