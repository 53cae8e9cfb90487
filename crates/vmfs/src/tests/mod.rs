//! Tests that see the inside: the planted fault is in no other build.
#![allow(clippy::unwrap_used)] // a test that cannot go on panics

mod crash;
#[allow(dead_code, missing_docs)] // the tests outside use the rest
#[path = "../../tests/common/datastore.rs"]
mod datastore;
