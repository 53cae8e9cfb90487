//! kagami: VM storage with raw device mapping, snapshots, clones and online backup.
//!
//! One binary: the command line, the daemon, its REST interface, metrics, and the quickstart.

mod api;
mod cli;
mod config;
mod daemon;
mod files;
mod home;
mod jobs;
mod metrics;
mod model;
mod names;
mod output;
mod problem;
mod quickstart;
mod store;
mod units;

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(cli::main())
}
