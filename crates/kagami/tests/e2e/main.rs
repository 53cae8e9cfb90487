//! What a user has, end to end: the program as it is called, and the daemon behind it. One program for all, so that it is
//! linked once.
#![allow(clippy::unwrap_used)] // a test fails by panicking

#[path = "../common/mod.rs"]
mod common;

mod commands;
mod engines;
mod exports;
mod faults;
mod golden;
mod images;
mod in_place;
mod incremental;
mod iscsi;
mod mappings;
mod rest;
mod restores;
mod resume;
mod service;
mod together;
mod versions;
