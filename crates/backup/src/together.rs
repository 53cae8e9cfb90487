//! Waiting for several operations at once.

use std::future::poll_fn;
use std::task::Poll;

use block::{DiskError, Io};

/// Runs all of them and gives their results in order. All are finished even when one fails: operations are never
/// dropped while the kernel has them.
pub(crate) async fn together(operations: Vec<Io<'_>>) -> Vec<Result<(), DiskError>> {
    let mut pending: Vec<Option<Io<'_>>> = operations.into_iter().map(Some).collect();
    let mut results: Vec<Option<Result<(), DiskError>>> = pending.iter().map(|_| None).collect();
    poll_fn(move |cx| {
        for (slot, result) in pending.iter_mut().zip(&mut results) {
            if let Some(operation) = slot
                && let Poll::Ready(done) = operation.as_mut().poll(cx)
            {
                (*slot, *result) = (None, Some(done));
            }
        }
        if pending.iter().any(Option::is_some) {
            return Poll::Pending;
        }
        Poll::Ready(results.drain(..).flatten().collect())
    })
    .await
}
