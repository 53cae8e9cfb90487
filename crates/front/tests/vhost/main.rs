//! vhost-user against a front end without QEMU: the `vhost` crate's, with a driver of our own.
#![allow(clippy::unwrap_used)] // a test may

mod blk;
mod fuzz;
mod guest;
mod hostile;
mod life;
