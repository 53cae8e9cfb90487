//! The bare loop to compare with: the least that a program can do with io_uring. The benchmark of LUNs uses it too.
#![allow(unsafe_code)] // it hands raw memory to the kernel, which owns it until the end
#![allow(clippy::unwrap_used)] // a benchmark stops at the first error

use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use block::Buffer;
use io_uring::{IoUring, opcode, types};

pub(crate) const BLOCK: usize = 4096;

/// What is done: 4 KiB at random places, past the page cache.
#[derive(Copy, Clone)]
pub(crate) struct Bare<'a> {
    pub(crate) path: &'a Path,
    /// Bytes of the file that are used.
    pub(crate) bytes: u64,
    pub(crate) writes: bool,
    /// With registered buffers.
    pub(crate) fixed: bool,
    pub(crate) depth: usize,
    pub(crate) time: Duration,
}

/// What was measured.
pub(crate) struct Run {
    pub(crate) operations: u64,
    pub(crate) seconds: f64,
    pub(crate) cpu_seconds: f64,
}

impl Run {
    pub(crate) fn iops(&self) -> f64 {
        self.operations as f64 / self.seconds
    }

    pub(crate) fn cpu_us(&self) -> f64 {
        self.cpu_seconds * 1e6 / self.operations as f64
    }
}

/// User and system time of the process.
pub(crate) fn cpu_now() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// `depth` slots, each resubmitted when it completes.
pub(crate) fn run(bare: &Bare) -> Run {
    let Bare { bytes, writes, fixed, depth, time, .. } = *bare;
    let file =
        std::fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(bare.path);
    let file = file.unwrap();
    let mut ring: IoUring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_coop_taskrun()
        .build(256)
        .unwrap();
    let mut memory = Buffer::zeroed(depth * BLOCK);
    if fixed {
        let whole = libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: memory.len() };
        // SAFETY: `memory` outlives the ring.
        unsafe { ring.submitter().register_buffers(&[whole]) }.unwrap();
    }
    let (fd, start, blocks) = (types::Fd(file.as_raw_fd()), memory.as_mut_ptr(), bytes / BLOCK as u64);
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut entry = |slot: usize| {
        let at = random.below(blocks) * BLOCK as u64;
        // SAFETY: each slot has a block of its own.
        let place = unsafe { start.add(slot * BLOCK) };
        let length = BLOCK as u32;
        let entry = match (writes, fixed) {
            (false, false) => opcode::Read::new(fd, place, length).offset(at).build(),
            (false, true) => opcode::ReadFixed::new(fd, place, length, 0).offset(at).build(),
            (true, false) => opcode::Write::new(fd, place, length).offset(at).build(),
            (true, true) => opcode::WriteFixed::new(fd, place, length, 0).offset(at).build(),
        };
        entry.user_data(slot as u64)
    };
    let (began, cpu) = (Instant::now(), cpu_now());
    let (mut operations, mut flying) = (0, depth);
    for slot in 0..depth {
        // SAFETY: the memory lives until nothing is in flight.
        unsafe { ring.submission().push(&entry(slot)) }.unwrap();
    }
    let mut done = Vec::with_capacity(depth);
    while flying > 0 {
        ring.submit_and_wait(1).unwrap();
        done.extend(ring.completion().map(|c| (c.user_data(), c.result())));
        let more = began.elapsed() < time;
        for (slot, result) in done.drain(..) {
            assert_eq!(result, BLOCK as i32);
            operations += 1;
            if more {
                // SAFETY: as above.
                unsafe { ring.submission().push(&entry(slot as usize)) }.unwrap();
            } else {
                flying -= 1;
            }
        }
    }
    Run { operations, seconds: began.elapsed().as_secs_f64(), cpu_seconds: cpu_now() - cpu }
}
