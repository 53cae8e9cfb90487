//! The io_uring driver: one ring per lane, one system call per turn.
//!
//! New operations wait in the submission queue until the turn, which submits all of them, runs the kernel's deferred
//! work and waits, in one `io_uring_enter`. Transfers whose memory lies in the lane's registered [`Arena`] name it by
//! number, so the kernel need not pin pages each time; files are named by number too. While little is under way the lane
//! waits for sockets itself ([`super::held`]), which wakes it sooner. Another thread wakes the lane through a read of the mailbox's
//! eventfd that is always under way while the lane sleeps.
#![allow(unsafe_code)] // entries for the kernel name raw memory; each use has its reason

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::{IoUring, Probe, opcode, squeue, types};
use rustix::event::{EventfdFlags, eventfd};

use super::Wait;
use super::held::HeldReceives;
use super::patience::Patience;
use crate::arena::Arena;
use crate::executor::Mailbox;
use crate::op::{Op, Pieces};

/// Entries of the submission queue; more operations are submitted in between.
const ENTRIES: u32 = 256;
/// Entries of the completion queue; the kernel keeps what overflows.
const COMPLETIONS: u32 = 4096;

/// `user_data` of the read of the bell.
const BELL: u64 = u64::MAX;
/// `user_data` of cancellations, whose own result nobody asks for.
const CANCEL: u64 = u64::MAX - 1;
/// Beside the key of a wait for a descriptor to be ready: a bit that no key has.
const POLL: u64 = 1 << 32;

/// Files that are kept at hand.
const FILES: u32 = 256;

/// Most bytes of one piece in one operation; the rest follows as after any short transfer.
const PIECE_BYTES_MAX: usize = 1 << 30;

/// How long the lane waits, at most, when the kernel refused a call for want of memory.
const MOMENT: Duration = Duration::from_millis(1);

/// Index of the arena among the registered buffers.
const ARENA: u16 = 0;

/// See the module.
pub(crate) struct Ring {
    ring: IoUring,
    mailbox: Arc<Mailbox>,
    /// Where the kernel puts the bell's counter; boxed, because the kernel knows its address.
    rung: Box<u64>,
    bell_armed: bool,
    arena: Option<Arc<Arena>>,
    registered_bytes: usize,
    vectored_fixed: bool,
    files: FixedFiles,
    /// Results found outside of a turn.
    early: Vec<(u32, i32)>,
    patience: Patience,
    /// Where the ring rings while the lane sleeps outside of it.
    rings: OwnedFd,
    held: HeldReceives,
    /// Waits for a descriptor to be ready that the ring has: key, descriptor, events.
    polled: Vec<(u32, RawFd, i16)>,
}

/// Files that the kernel knows by a number of the ring, which saves it looking them up for each operation.
#[derive(Default)]
struct FixedFiles {
    /// By descriptor: the number.
    numbers: Vec<Option<u16>>,
    free: Vec<u16>,
}

impl Ring {
    pub(crate) fn new(registered_bytes: usize, mailbox: &Arc<Mailbox>) -> io::Result<Self> {
        Self::on(Flavour::best()?, registered_bytes, mailbox)
    }

    fn on(mut ring: IoUring, registered_bytes: usize, mailbox: &Arc<Mailbox>) -> io::Result<Self> {
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
            opcode::Accept::CODE,
            opcode::Recv::CODE,
            opcode::Send::CODE,
            opcode::RecvMsg::CODE,
            opcode::SendMsg::CODE,
            opcode::PollAdd::CODE,
            opcode::AsyncCancel::CODE,
        ];
        let whole = ring.params().is_feature_ext_arg() && ring.params().is_feature_nodrop();
        if !whole || !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel is older than 5.11"));
        }
        let vectored_fixed =
            probe.is_supported(opcode::ReadvFixed::CODE) && probe.is_supported(opcode::WritevFixed::CODE);
        let rings = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        ring.submitter().register_eventfd(rings.as_raw_fd())?;
        ring.completion().disable_eventfd();
        let mut files = FixedFiles::default();
        if ring.submitter().register_files_sparse(FILES).is_ok() {
            files.free = (0..FILES as u16).rev().collect();
        }
        Ok(Self {
            ring,
            mailbox: Arc::clone(mailbox),
            rung: Box::new(0),
            bell_armed: false,
            arena: None,
            registered_bytes,
            vectored_fixed,
            files,
            early: Vec::new(),
            patience: Patience::default(),
            rings,
            held: HeldReceives::default(),
            polled: Vec::new(),
        })
    }

    pub(crate) fn arena(&self) -> Option<&Arc<Arena>> {
        self.arena.as_ref()
    }

    /// Pins memory for buffers, once: as much as wanted, halved until RLIMIT_MEMLOCK lets us, at least 1 MiB.
    pub(crate) fn register_memory(&mut self) {
        let mut bytes = std::mem::take(&mut self.registered_bytes);
        while bytes >= Arena::CHUNK_BYTES {
            match self.register(bytes) {
                Ok(arena) => {
                    tracing::info!(bytes, "buffers registered");
                    self.arena = Some(arena);
                    return;
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => bytes /= 2,
                Err(error) => {
                    tracing::warn!(%error, "cannot register buffers: using plain ones");
                    return;
                }
            }
            if bytes < Arena::CHUNK_BYTES {
                tracing::warn!("RLIMIT_MEMLOCK allows no registered buffers: using plain ones");
            }
        }
    }

    fn register(&self, bytes: usize) -> io::Result<Arc<Arena>> {
        let arena = Arena::new(bytes)?;
        let whole = libc::iovec { iov_base: arena.start().cast(), iov_len: arena.len() };
        // SAFETY: the arena is mapped as long as `self.arena` holds it, and that is dropped after the ring, whose end
        // gives the registration up.
        unsafe { self.ring.submitter().register_buffers(&[whole]) }?;
        Ok(arena)
    }

    /// Lets the kernel keep the file at hand.
    pub(crate) fn adopt_file(&mut self, fd: RawFd) {
        let place = fd as usize;
        let Some(number) = self.files.free.pop() else { return };
        if self.ring.submitter().register_files_update(number.into(), &[fd]).is_err() {
            return self.files.free.push(number);
        }
        if self.files.numbers.len() <= place {
            self.files.numbers.resize(place + 1, None);
        }
        self.files.numbers[place] = Some(number);
    }

    /// The file is about to be closed; nothing is under way on it.
    pub(crate) fn release_file(&mut self, fd: RawFd) {
        if let Some(number) = self.files.numbers.get_mut(fd as usize).and_then(Option::take) {
            // Cannot fail for a number that was given; would it, the number stays out of use.
            if self.ring.submitter().register_files_update(number.into(), &[-1]).is_ok() {
                self.files.free.push(number);
            }
        }
    }

    /// The file by its number, where it has one.
    #[inline]
    fn file(&self, fd: RawFd) -> (types::Fd, squeue::Flags) {
        match self.files.numbers.get(fd as usize) {
            Some(Some(number)) => (types::Fd(i32::from(*number)), squeue::Flags::FIXED_FILE),
            _ => (types::Fd(fd), squeue::Flags::empty()),
        }
    }

    /// Puts an entry into the queue, submitting first when it is full.
    #[inline]
    fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: what the entry names stays valid until its completion: the promise of `Operation::new` for
            // operations, a box of our own for the bell, nothing for cancellations.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            if !self.enter(self.ring.submitter().submit()) {
                self.sleep_in_ring(Some(MOMENT));
            }
            // Kernels before 5.19 take nothing as long as completions have no room.
            let mut early = std::mem::take(&mut self.early);
            self.collect(&mut early);
            self.early = early;
        }
    }

    pub(crate) fn submit(&mut self, key: u32, op: &Op) {
        if self.patience.is_calm() && self.held.hold(key, op) {
            return;
        }
        let entry = match *op {
            Op::Read { fd, at, into, .. } => self.read_entry(fd, at, into),
            Op::Write { fd, at, from, durable } => self.write_entry(fd, at, from, durable),
            Op::SyncData { fd } => {
                let (fd, flags) = self.file(fd);
                opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build().flags(flags)
            }
            Op::Allocate { fd, mode, at, length } => {
                let (fd, flags) = self.file(fd);
                opcode::Fallocate::new(fd, length).offset(at).mode(mode).build().flags(flags)
            }
            Op::Accept { fd } => {
                opcode::Accept::new(types::Fd(fd), std::ptr::null_mut(), std::ptr::null_mut())
                    .flags(libc::SOCK_CLOEXEC)
                    .build()
            }
            Op::Poll { fd, events } => {
                self.polled.push((key, fd, events));
                let entry = opcode::PollAdd::new(types::Fd(fd), events as u32).build();
                return self.push(&entry.user_data(POLL | u64::from(key)));
            }
            Op::Receive { fd, into, message } => match single(into) {
                Some(piece) => opcode::Recv::new(types::Fd(fd), piece.0, piece.1).build(),
                None => opcode::RecvMsg::new(types::Fd(fd), message).build(),
            },
            Op::Send { fd, from, message } => match single(from) {
                Some(piece) => opcode::Send::new(types::Fd(fd), piece.0, piece.1)
                    .flags(libc::MSG_NOSIGNAL | libc::MSG_WAITALL)
                    .build(),
                None => opcode::SendMsg::new(types::Fd(fd), message)
                    .flags((libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32)
                    .build(),
            },
        };
        self.push(&entry.user_data(u64::from(key)));
    }

    /// All pieces lie in registered memory.
    #[inline]
    fn is_fixed(&self, pieces: Pieces) -> bool {
        let Some(arena) = &self.arena else { return false };
        if pieces.count > 1 && !self.vectored_fixed {
            return false;
        }
        // SAFETY: the promise of `Operation::new`: the list is valid.
        let list = unsafe { std::slice::from_raw_parts(pieces.list, pieces.count as usize) };
        list.iter().all(|p| arena.contains(p.iov_base.cast(), p.iov_len))
    }

    #[inline]
    fn read_entry(&self, fd: RawFd, at: u64, into: Pieces) -> squeue::Entry {
        let (fd, file) = self.file(fd);
        let entry = match (single(into), self.is_fixed(into)) {
            (Some((start, length)), true) => {
                opcode::ReadFixed::new(fd, start, length, ARENA).offset(at).build()
            }
            (Some((start, length)), false) => opcode::Read::new(fd, start, length).offset(at).build(),
            (None, true) => opcode::ReadvFixed::new(fd, into.list, into.count, ARENA).offset(at).build(),
            (None, false) => opcode::Readv::new(fd, into.list, into.count).offset(at).build(),
        };
        entry.flags(file)
    }

    #[inline]
    fn write_entry(&self, fd: RawFd, at: u64, from: Pieces, durable: bool) -> squeue::Entry {
        let ((fd, file), flags) = (self.file(fd), if durable { libc::RWF_DSYNC } else { 0 });
        let entry = match (single(from), self.is_fixed(from)) {
            (Some((start, length)), true) => {
                opcode::WriteFixed::new(fd, start, length, ARENA).offset(at).rw_flags(flags).build()
            }
            (Some((start, length)), false) => {
                opcode::Write::new(fd, start, length).offset(at).rw_flags(flags).build()
            }
            (None, true) => {
                opcode::WritevFixed::new(fd, from.list, from.count, ARENA).offset(at).rw_flags(flags).build()
            }
            (None, false) => {
                opcode::Writev::new(fd, from.list, from.count).offset(at).rw_flags(flags).build()
            }
        };
        entry.flags(file)
    }

    pub(crate) fn cancel(&mut self, key: u32) {
        if self.held.cancel(key) {
            return self.early.push((key, -libc::ECANCELED));
        }
        let poll = self.polled.iter().any(|(polled, ..)| *polled == key);
        let data = if poll { POLL | u64::from(key) } else { u64::from(key) };
        self.push(&opcode::AsyncCancel::new(data).build().user_data(CANCEL));
    }

    pub(crate) fn turn(&mut self, wait: Wait, done: &mut Vec<(u32, i32)>) {
        let wait = if self.early.is_empty() { wait } else { Wait::No };
        done.append(&mut self.early);
        if !matches!(wait, Wait::No) && !self.bell_armed {
            let bell = types::Fd(self.mailbox.bell().as_raw_fd());
            let entry = opcode::Read::new(bell, (&raw mut *self.rung).cast(), 8).build();
            self.push(&entry.user_data(BELL));
            self.bell_armed = true;
        }
        match wait {
            Wait::No => {
                self.submit_new();
                self.held.receive(done);
            }
            Wait::Forever => self.sleep(None, done),
            Wait::For(time) => self.sleep(Some(time), done),
        }
        self.collect(done);
        if !matches!(wait, Wait::No) {
            self.patience.woke_for(done.len());
        }
        if !self.patience.is_calm() {
            while let Some(held) = self.held.take() {
                self.submit(held.key, &held.op());
            }
        }
    }

    /// The kernel has nothing to be called for: nothing new (also not of a call that it refused for want of memory), nothing
    /// deferred, no completions that had no room.
    fn is_quiet(&mut self) -> bool {
        let queue = self.ring.submission();
        queue.is_empty() && !queue.taskrun() && !queue.cq_overflow()
    }

    /// Hands over what is new and lets the kernel run what it deferred; waits for nothing. False: the kernel refused.
    fn submit_new(&mut self) -> bool {
        self.is_quiet() || self.enter(self.ring.submitter().submit())
    }

    /// Sleeps until something happens, or the time is over.
    fn sleep(&mut self, time: Option<Duration>, done: &mut Vec<(u32, i32)>) {
        if self.held.is_empty() { self.sleep_in_ring(time) } else { self.sleep_on_sockets(time, done) }
    }

    fn sleep_in_ring(&mut self, time: Option<Duration>) {
        let result = match time {
            None => self.ring.submitter().submit_and_wait(1),
            Some(time) => {
                let time = types::Timespec::from(time);
                let arguments = types::SubmitArgs::new().timespec(&time);
                self.ring.submitter().submit_with_args(1, &arguments)
            }
        };
        self.enter(result);
    }

    /// Sleeps outside of the ring, which rings when it has something: a ring whose work is deferred to us does not wake
    /// those who poll it.
    fn sleep_on_sockets(&mut self, time: Option<Duration>, done: &mut Vec<(u32, i32)>) {
        self.submit_new();
        self.ring.completion().enable_eventfd();
        // What came before that rings for nobody: looked at after it.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        if self.is_quiet() && self.ring.completion().is_empty() {
            let bell = self.mailbox.bell().as_raw_fd();
            let polled = self.polled.iter().map(|(_, fd, events)| (*fd, *events));
            self.held.sleep(&self.rings, bell, polled, time, done);
        }
        self.ring.completion().disable_eventfd();
        if !self.submit_new() {
            self.sleep_in_ring(Some(MOMENT));
        }
    }

    /// Judges the result of entering the kernel. False: it took nothing.
    fn enter(&self, result: io::Result<usize>) -> bool {
        match result {
            Ok(_) => true,
            Err(error) => match error.raw_os_error() {
                // Interrupted; timed out; completions wait to be collected first; no memory at the moment.
                Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN) => false,
                _ => panic!("io_uring_enter failed, the lane cannot go on: {error}"),
            },
        }
    }

    #[inline]
    fn collect(&mut self, done: &mut Vec<(u32, i32)>) {
        let mut bell_armed = self.bell_armed;
        for entry in self.ring.completion() {
            match entry.user_data() {
                BELL => bell_armed = false,
                CANCEL => {}
                data => {
                    let key = data as u32;
                    if data & POLL != 0 {
                        self.polled.retain(|(polled, ..)| *polled != key);
                    }
                    done.push((key, entry.result()));
                }
            }
        }
        self.bell_armed = bell_armed;
    }

    /// Ends the read of the bell, the last thing under way, so that the kernel forgets our memory.
    pub(crate) fn close(&mut self) {
        // The end of a ring is worked on later; files are to be closed now.
        let _ = self.ring.submitter().unregister_files();
        self.files = FixedFiles::default();
        if self.bell_armed {
            self.push(&opcode::AsyncCancel::new(BELL).build().user_data(CANCEL));
        }
        let mut done = std::mem::take(&mut self.early);
        while self.bell_armed {
            let result = self.ring.submitter().submit_and_wait(1);
            self.enter(result);
            self.collect(&mut done);
        }
        debug_assert!(done.is_empty(), "closed with operations under way");
    }
}

/// The piece, when there is only one: address and length, at most what one call moves.
#[inline]
fn single(pieces: Pieces) -> Option<(*mut u8, u32)> {
    if pieces.count != 1 {
        return None;
    }
    // SAFETY: the promise of `Operation::new`: the list holds `count` pieces.
    let piece = unsafe { *pieces.list };
    Some((piece.iov_base.cast(), piece.iov_len.min(PIECE_BYTES_MAX) as u32))
}

/// How the kernel is asked to work on completions, best first.
#[derive(Copy, Clone, Debug)]
enum Flavour {
    /// 6.1: only when we ask, by the one thread that submits.
    Deferred,
    /// 5.19: without interrupting the thread for each.
    Cooperative,
    /// Before.
    Plain,
}

impl Flavour {
    const ALL: [Self; 3] = [Self::Deferred, Self::Cooperative, Self::Plain];

    fn build(self) -> io::Result<IoUring> {
        let mut builder = IoUring::builder();
        builder.setup_clamp().setup_cqsize(COMPLETIONS);
        match self {
            Self::Deferred => {
                builder.setup_single_issuer().setup_defer_taskrun().setup_coop_taskrun();
                builder.setup_taskrun_flag().setup_submit_all();
            }
            Self::Cooperative => {
                builder.setup_coop_taskrun().setup_taskrun_flag();
            }
            Self::Plain => {}
        }
        builder.build(ENTRIES)
    }

    /// A ring of the best flavour that the kernel knows; the last error when it knows none.
    fn best() -> io::Result<IoUring> {
        let [first, second, last] = Self::ALL;
        first.build().or_else(|_| second.build()).or_else(|_| last.build())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn every_flavour_reads_sleeps_and_wakes() {
        for flavour in Flavour::ALL {
            let ring = match flavour.build() {
                Ok(ring) => ring,
                Err(error) => {
                    assert!(
                        std::env::var("CI").as_deref() != Ok("true"),
                        "SKIPPED in CI: {flavour:?}: {error}"
                    );
                    eprintln!("SKIPPED: {flavour:?}: {error}");
                    continue;
                }
            };
            crate::block_on(async {
                let mailbox = crate::executor::own_mailbox();
                let mut ring = Ring::on(ring, 1 << 20, &mailbox).unwrap();
                ring.register_memory();
                let file = std::fs::File::open("/proc/self/exe").unwrap();
                ring.adopt_file(file.as_raw_fd());
                let mut bytes = [0u8; 4];
                let piece = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: 4 };
                let into = Pieces { list: &raw const piece, count: 1 };
                ring.submit(7, &Op::Read { fd: file.as_raw_fd(), at: 0, into, cached: true });
                let mut done = Vec::new();
                while done.is_empty() {
                    ring.turn(Wait::Forever, &mut done);
                }
                assert_eq!(done, [(7, 4)], "{flavour:?}");
                assert_eq!(&bytes, b"\x7fELF");
                done.clear();
                // Nothing under way: a wait ends by its time, and by the bell.
                ring.turn(Wait::For(std::time::Duration::from_millis(1)), &mut done);
                let far = Arc::clone(&mailbox);
                let ringing = std::thread::spawn(move || rustix::io::write(far.bell(), &1u64.to_le_bytes()));
                ring.turn(Wait::Forever, &mut done);
                ringing.join().unwrap().unwrap();
                assert!(done.is_empty());
                ring.release_file(file.as_raw_fd());
                ring.close();
            });
        }
    }

    /// More operations than the queues have room for: each is done, and told once.
    #[test]
    fn more_operations_than_room_end_once_each() {
        const OPERATIONS: u32 = 100;
        let Ok(ring) = IoUring::builder().setup_cqsize(8).build(4) else {
            assert!(std::env::var("CI").as_deref() != Ok("true"), "SKIPPED in CI: no io_uring");
            return eprintln!("SKIPPED: no io_uring");
        };
        crate::block_on(async {
            let mailbox = crate::executor::own_mailbox();
            let mut ring = Ring::on(ring, 0, &mailbox).unwrap();
            let file = std::fs::File::open("/proc/self/exe").unwrap();
            let mut places = [[0u8; 4]; OPERATIONS as usize];
            let pieces =
                places.each_mut().map(|p| libc::iovec { iov_base: p.as_mut_ptr().cast(), iov_len: 4 });
            for (key, piece) in (0..).zip(&pieces) {
                let into = Pieces { list: piece, count: 1 };
                ring.submit(key, &Op::Read { fd: file.as_raw_fd(), at: 0, into, cached: true });
            }
            let mut done = Vec::new();
            while done.len() < OPERATIONS as usize {
                ring.turn(Wait::Forever, &mut done);
            }
            done.sort_unstable();
            let wanted: Vec<_> = (0..OPERATIONS).map(|key| (key, 4)).collect();
            assert_eq!(done, wanted);
            assert!(places.iter().all(|p| p == b"\x7fELF"));
            ring.close();
        });
    }
}
