//! What a LUN costs: in one process, against the bare file on the same medium, 4 KiB random.
//!
//!   dir=$(bench/medium up)
//!   cargo run --release -p array --example lun_bench -- "$dir" [--size MIB] [--seconds S] [--rounds N] [--sparse] [PART...]
//!
//! Parts, all of them when none is named:
//!   base      a LUN against the bare file, depth 32: by a bare io_uring loop with registered buffers, and by our lane
//!   depth     reads through 32 snapshots against none: blocks only in the lowest layer, and spread over all of them
//!   cache     a map ten times larger than its cache, against one that fits
//!   snapshot  writes in the first second after a snapshot, windows as in cow.py (depth 16), at 512 MiB and 2 GiB; beside
//!             it the same loop on a raw file of which XFS makes a reflink
//!   mapped    time of a snapshot and a clone, with 1 GiB and with 10 TiB mapped, in order and scattered (simulated map)
//!   group     how long a cut over 64 LUNs holds their writers
//!
//! The pool's medium is written once before, unless `--sparse`: what a file system takes to allocate is not the LUN's.
//! Pools have the product's options. Contenders alternate; figures are medians over rounds, ratios medians of the
//! ratios within a round.

#[path = "../../../lane/examples/lane_bench/bare.rs"]
mod bare;
mod load;
mod mapped;
mod parts;
mod simulated;
mod snapshot;

use std::path::{Path, PathBuf};
use std::rc::Rc;

use array::{Lun, NewLun, NewPool, Options, Pool};
use block::Disk;

struct Arguments {
    directory: PathBuf,
    mebibytes: Option<u64>,
    seconds: f64,
    rounds: usize,
    sparse: bool,
    parts: Vec<String>,
}

const PARTS: [&str; 6] = ["base", "depth", "cache", "snapshot", "mapped", "group"];

fn arguments() -> Result<Arguments, String> {
    let mut out = Arguments {
        directory: PathBuf::new(),
        mebibytes: None,
        seconds: 1.0,
        rounds: 5,
        sparse: false,
        parts: Vec::new(),
    };
    let mut list = std::env::args().skip(1);
    while let Some(word) = list.next() {
        let mut value = || list.next().ok_or(format!("{word} wants a value"));
        match word.as_str() {
            "--size" => out.mebibytes = Some(value()?.parse().map_err(|e| format!("--size: {e}"))?),
            "--sparse" => out.sparse = true,
            "--seconds" => out.seconds = value()?.parse().map_err(|e| format!("--seconds: {e}"))?,
            "--rounds" => out.rounds = value()?.parse().map_err(|e| format!("--rounds: {e}"))?,
            part if PARTS.contains(&part) => out.parts.push(word),
            _ if out.directory.as_os_str().is_empty() => out.directory = word.into(),
            _ => return Err(format!("{word}: no part; there are {}", PARTS.join(", "))),
        }
    }
    if !out.directory.is_dir() {
        let usage = "usage: lun_bench DIR [--size MIB] [--seconds S] [--rounds N] [--sparse] [PART...]";
        return Err(format!("{usage}\nparts: {}", PARTS.join(", ")));
    }
    Ok(out)
}

impl Arguments {
    fn mebibytes(&self) -> u64 {
        self.mebibytes.unwrap_or(512)
    }

    /// The directory has room for so much; else says what is skipped.
    fn has_room(&self, part: &str, mebibytes: u64) -> bool {
        let free = rustix::fs::statvfs(&self.directory).map_or(0, |s| (s.f_bavail * s.f_frsize) >> 20);
        // The file system wants some for itself.
        let enough = free > mebibytes + mebibytes / 64 + 16;
        if !enough {
            eprintln!(
                "SKIPPED {part}: needs {mebibytes} MiB in {}, free are {free}",
                self.directory.display()
            );
        }
        enough
    }
}

async fn medium(path: &Path, mebibytes: u64) -> Rc<dyn Disk> {
    let _ = std::fs::remove_file(path);
    let disk = media::create(path, mebibytes << 11, media::Options::default()).await;
    let disk = disk.unwrap_or_else(|e| panic!("{e}"));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    println!("in use: {name}: {}", disk.in_use());
    disk
}

/// A pool of `room` MiB with one LUN, written in full.
async fn new_lun(a: &Arguments, mebibytes: u64, room: u64) -> (Rc<Pool>, Rc<Lun>) {
    let medium = medium(&a.directory.join("bench.pool"), room).await;
    if !a.sparse {
        load::fill(&*medium).await;
    }
    let new = NewPool::new("bench");
    let pool = Pool::create(vec![medium], new, Options::default()).await.expect("a pool is made");
    let lun = pool.create_lun(NewLun::new("lun", mebibytes << 11)).await.expect("a LUN is made");
    load::fill(&*lun).await;
    (pool, lun)
}

fn main() {
    let a = match arguments() {
        Ok(a) => a,
        Err(message) => {
            eprintln!("{message}");
            std::process::exit(2);
        }
    };
    lane::block_on(async {
        for part in PARTS.into_iter().filter(|part| a.parts.is_empty() || a.parts.iter().any(|p| p == part)) {
            println!("\n== {part}");
            match part {
                "base" => parts::base(&a).await,
                "depth" => parts::depth(&a).await,
                "cache" => parts::cache(&a).await,
                "snapshot" => snapshot::snapshot(&a).await,
                "mapped" => mapped::mapped(&a).await,
                _ => parts::group(&a).await,
            }
            for file in ["bench.pool", "bench.raw", "bench.clone"] {
                let _ = std::fs::remove_file(a.directory.join(file));
            }
        }
    });
}
