//! What several test files share.
#![allow(dead_code, clippy::unwrap_used)] // each test binary uses its own part; a test that cannot go on panics

pub mod datastore;
pub mod editor;
pub mod genuine;
pub mod outside;
pub mod populated;

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

/// Runs work on disks in memory, which never wait: a lane, with its thread of the kernel, would be made and ended
/// for every look at a sector.
pub fn at_once<F: Future>(work: F) -> F::Output {
    match pin!(work).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("a disk in memory never waits"),
    }
}
