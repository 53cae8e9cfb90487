//! The writer: a process of its own that writes to all disks in turn over NBD, each write after the answer to the one
//! before. It says on stdout how far it is, and ends when its stdin closes.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use block::{BLOCK_BYTES, Buffer, Disk, Safe, Sector, Segments};

use super::sequence::{fill, place, ring_at};
use super::wire::connect;
use crate::cli::args::WriterArgs;
use crate::problem::{Outcome, Problem};

/// A flush comes after so many writes, as a journalling file system sends them.
const FLUSH_EVERY: u64 = 128;
/// A line on stdout comes after so many acknowledged writes.
const LINE_EVERY: u64 = 16;

/// The process: writes until stdin closes.
pub fn run(args: &WriterArgs) -> Outcome {
    let stop = Arc::new(AtomicBool::new(false));
    let stopping = Arc::clone(&stop);
    std::thread::spawn(move || {
        let mut byte = [0];
        while matches!(std::io::stdin().read(&mut byte), Ok(1)) {}
        stopping.store(true, Ordering::Relaxed);
    });
    lane::block_on(write_all(&args.socket, &args.export, &stop))
}

async fn write_all(socket: &Path, exports: &[String], stop: &AtomicBool) -> Outcome {
    let mut disks = Vec::new();
    for export in exports {
        disks.push(connect(socket, export).await?);
    }
    let failed = |n: u64| move |e| Problem::failed("KGM-QST-0004", format!("write no. {n} failed"), e);
    let mut buffer = Buffer::zeroed(BLOCK_BYTES as usize);
    let mut number = 0;
    let mut out = std::io::stdout().lock();
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let (disk, index) = place(number, disks.len() as u64);
        let disk = &disks[disk as usize];
        fill(number, &mut buffer);
        let at = Sector::at_byte(ring_at(disk.shape().bytes()) + index * BLOCK_BYTES);
        disk.write(at, &Segments::new(&buffer), Safe::AtNextFlush).await.map_err(failed(number))?;
        if number.is_multiple_of(FLUSH_EVERY) {
            disk.flush().await.map_err(failed(number))?;
        }
        if number.is_multiple_of(LINE_EVERY) {
            let now = jiff::Timestamp::now().as_microsecond();
            if writeln!(out, "{number} {now}").and_then(|()| out.flush()).is_err() {
                break; // nobody listens any more
            }
        }
    }
    for disk in disks {
        disk.flush().await.map_err(failed(number))?;
        disk.disconnect().await;
    }
    Ok(())
}

/// How far the writer was, and when (microseconds since 1970).
type Marks = Arc<Mutex<Vec<(u64, i64)>>>;

/// The writer as the quickstart sees it.
pub struct Writer {
    child: Child,
    stdin: Option<ChildStdin>,
    marks: Marks,
    acknowledged: Arc<AtomicU64>,
}

impl Writer {
    /// Starts the process.
    pub fn start(socket: &Path, exports: &[String]) -> Outcome<Self> {
        let failed = |e: std::io::Error| Problem::failed("KGM-QST-0005", "the writer cannot be started", e);
        let program: PathBuf = std::env::current_exe().map_err(failed)?;
        let mut command = Command::new(program);
        command.arg("quickstart-writer").arg("--socket").arg(socket);
        for export in exports {
            command.arg("--export").arg(export);
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(failed)?;
        let (marks, acknowledged) = (Marks::default(), Arc::new(AtomicU64::new(0)));
        if let Some(stdout) = child.stdout.take() {
            let (marks, acknowledged) = (Arc::clone(&marks), Arc::clone(&acknowledged));
            std::thread::spawn(move || {
                use std::io::BufRead;
                for line in std::io::BufReader::new(stdout).lines().map_while(Result::ok) {
                    let mut words = line.split(' ').map(str::parse::<i64>);
                    if let (Some(Ok(number)), Some(Ok(time))) = (words.next(), words.next()) {
                        acknowledged.store(number.unsigned_abs(), Ordering::Relaxed);
                        marks.lock().unwrap_or_else(|e| e.into_inner()).push((number.unsigned_abs(), time));
                    }
                }
            });
        }
        let stdin = child.stdin.take();
        Ok(Self { child, stdin, marks, acknowledged })
    }

    /// Writes that were acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// It has not ended by itself.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Writes acknowledged between two moments (microseconds since 1970); never more than there were.
    pub fn between(&self, from_us: i64, to_us: i64) -> u64 {
        let marks = self.marks.lock().unwrap_or_else(|e| e.into_inner());
        let inside: Vec<u64> =
            marks.iter().filter(|(_, time)| (from_us..=to_us).contains(time)).map(|(n, _)| *n).collect();
        match (inside.first(), inside.last()) {
            (Some(first), Some(last)) => last - first,
            _ => 0,
        }
    }

    /// Writes acknowledged since a moment.
    pub fn since(&self, from_us: i64) -> u64 {
        self.between(from_us, i64::MAX)
    }

    /// Lets it finish its last write; how many it made.
    pub fn stop(mut self) -> Outcome<u64> {
        drop(self.stdin.take());
        let status = self
            .child
            .wait()
            .map_err(|e| Problem::failed("KGM-QST-0006", "the writer cannot be waited for", e))?;
        if !status.success() {
            return Err(Problem::failed("KGM-QST-0007", "the writer failed", status));
        }
        Ok(self.acknowledged())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        drop(self.stdin.take()); // its end, also when the quickstart fails half way
    }
}
