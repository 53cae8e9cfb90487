//! Counts an eventfd up without ever waiting for it.
//!
//! A write to an eventfd that is full waits, unless the eventfd is in non-blocking mode. The mode is not ours: it belongs to the
//! front end, which may switch it between our look and our write, and a lane that waits serves nobody. The kernel
//! itself does not wait when it counts an eventfd up, and it does that for who wants to be told of the end of an asynchronous
//! read (`io_submit` with `IOCB_FLAG_RESFD`). So nothing is read from an empty file, and the bell is told of it.
#![allow(unsafe_code)] // system calls that no crate of ours wraps; each use has its reason

use std::cell::{Cell, OnceCell};
use std::ffi::{c_long, c_ulong};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;

use rustix::fs::MemfdFlags;

/// Ends that are not collected yet, at most.
const EVENTS_MAX: usize = 64;
/// `IOCB_CMD_PREAD`.
const PREAD: u16 = 0;
/// `IOCB_FLAG_RESFD`.
const TELL: u32 = 1;

/// `struct iocb` (linux/aio_abi.h).
#[repr(C)]
#[derive(Default)]
struct Control {
    data: u64,
    key: u32,
    read_flags: u32,
    command: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    told: u32,
}

const _: () = assert!(size_of::<Control>() == 64);

/// `struct io_event`.
type Event = [u64; 4];

/// One thread's way to ring.
struct Signals {
    context: c_ulong,
    empty: OwnedFd,
    /// Ends that were not collected yet.
    ended: Cell<usize>,
}

thread_local! {
    static SIGNALS: OnceCell<Option<Signals>> = const { OnceCell::new() };
}

fn checked(result: c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Signals {
    fn new() -> io::Result<Self> {
        let empty = rustix::fs::memfd_create("kagami-empty", MemfdFlags::CLOEXEC)?;
        let mut context: c_ulong = 0;
        // SAFETY: the kernel writes the context's number, and nothing else.
        checked(unsafe { libc::syscall(libc::SYS_io_setup, EVENTS_MAX as c_long, &raw mut context) })?;
        Ok(Self { context, empty, ended: Cell::new(0) })
    }

    fn ring(&self, bell: &OwnedFd) -> io::Result<()> {
        if self.ended.get() == EVENTS_MAX / 2 {
            self.collect();
        }
        let mut control = Control {
            command: PREAD,
            file: self.empty.as_raw_fd().cast_unsigned(),
            flags: TELL,
            told: bell.as_raw_fd().cast_unsigned(),
            ..Control::default()
        };
        let mut list = [&raw mut control];
        // SAFETY: the kernel has read the list of one when it returns, and no bytes are read into any memory.
        checked(unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1 as c_long, list.as_mut_ptr()) })?;
        self.ended.set(self.ended.get() + 1);
        Ok(())
    }

    /// Makes room for further ends.
    fn collect(&self) {
        let mut events: [Event; EVENTS_MAX] = [[0; 4]; EVENTS_MAX];
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: at most as many events are written as there is place for.
        unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                0 as c_long,
                EVENTS_MAX as c_long,
                events.as_mut_ptr(),
                ptr::from_ref(&now),
            );
        }
        self.ended.set(0);
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: the context is ours, and nothing is under way in it.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

/// Counts an eventfd up. False where the kernel has no such way, or refuses it.
pub(crate) fn ring(bell: &OwnedFd) -> bool {
    SIGNALS.with(|own| {
        let made = || {
            let made = Signals::new();
            if let Err(error) = &made {
                tracing::info!(%error, "no asynchronous I/O: guests are called by plain writes");
            }
            made.ok()
        };
        own.get_or_init(made).as_ref().is_some_and(|signals| signals.ring(bell).is_ok())
    })
}
