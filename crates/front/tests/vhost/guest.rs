//! A guest with a front end and no QEMU: its memory, its virtqueues, its virtio-blk driver, over the `vhost` crate's front end.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use block::Disk;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// Where the front end has guest memory; no address of ours, and different from the guest's.
pub const USER: u64 = 0x7f00_0000_0000;
/// All of guest memory.
pub const MEMORY_BYTES: u64 = 32 << 20;
/// Where data of requests may lie.
pub const DATA: u64 = 1 << 20;
pub const EVENT_IDX: u64 = 1 << 29;
pub const INDIRECT: u64 = 1 << 28;
pub const VERSION_1: u64 = 1 << 32;
/// Longest time that anything may take; reached by nothing that works.
const PATIENCE: Duration = Duration::from_secs(30);

pub const READ: u32 = 0;
pub const WRITE: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

/// Guest memory that outlives front ends and back ends.
pub struct Memory {
    pub map: GuestMemoryMmap<()>,
    pub file: File,
}

impl Memory {
    pub fn new() -> Self {
        let file: File = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into();
        file.set_len(MEMORY_BYTES).unwrap();
        let part =
            (GuestAddress(0), MEMORY_BYTES as usize, Some(FileOffset::new(file.try_clone().unwrap(), 0)));
        Self { map: GuestMemoryMmap::from_ranges_with_files([part]).unwrap(), file }
    }

    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY_BYTES,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.map.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub fn read(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.map.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn number(&self, at: u64) -> u16 {
        self.map.load(GuestAddress(at), Ordering::SeqCst).unwrap()
    }

    fn set_number(&self, at: u64, value: u16) {
        self.map.store(value, GuestAddress(at), Ordering::SeqCst).unwrap();
    }
}

/// A piece of a chain: guest address, length, written by the device.
pub type Part = (u64, u32, bool);

/// The driver's side of a split virtqueue.
pub struct Queue {
    pub index: usize,
    pub size: u16,
    base: u64,
    event_idx: bool,
    free: Vec<u16>,
    chains: BTreeMap<u16, Vec<u16>>,
    pub next: u16,
    pub seen: u16,
    pub kick: EventFd,
    pub call: EventFd,
    pub error: EventFd,
}

impl Queue {
    pub fn new(index: usize, size: u16) -> Self {
        let bell = || EventFd::new(libc_nonblock()).unwrap();
        Self {
            index,
            size,
            base: 0x1_0000 * (index as u64 + 1),
            event_idx: false,
            free: (0..size).rev().collect(),
            chains: BTreeMap::new(),
            next: 0,
            seen: 0,
            kick: bell(),
            call: bell(),
            error: bell(),
        }
    }

    pub fn table(&self) -> u64 {
        self.base
    }

    pub fn available(&self) -> u64 {
        self.base + 0x8000
    }

    pub fn used(&self) -> u64 {
        self.base + 0xc000
    }

    pub fn descriptor(&self, memory: &Memory, index: u16, part: Part, flags: u16, next: u16) {
        put_descriptor(memory, self.table() + u64::from(index) * 16, part, flags, next);
    }

    /// Makes a chain known to the device.
    pub fn publish(&mut self, memory: &Memory, head: u16) {
        memory.set_number(self.available() + 4 + 2 * u64::from(self.next % self.size), head);
        self.next = self.next.wrapping_add(1);
        memory.set_number(self.available() + 2, self.next);
        self.kick.write(1).unwrap();
    }

    /// Puts a chain into the queue.
    pub fn submit(&mut self, memory: &Memory, parts: &[Part]) -> u16 {
        let list: Vec<u16> = parts.iter().map(|_| self.free.pop().unwrap()).collect();
        for (place, part) in parts.iter().enumerate() {
            let next = list.get(place + 1).copied();
            self.descriptor(memory, list[place], *part, u16::from(next.is_some()), next.unwrap_or(0));
        }
        let head = list[0];
        self.chains.insert(head, list);
        self.publish(memory, head);
        head
    }

    /// The same by one indirect descriptor, whose table lies at `at`.
    pub fn submit_indirect(&mut self, memory: &Memory, at: u64, parts: &[Part]) -> u16 {
        for (place, part) in parts.iter().enumerate() {
            let more = place + 1 < parts.len();
            put_descriptor(memory, at + 16 * place as u64, *part, u16::from(more), place as u16 + 1);
        }
        let head = self.free.pop().unwrap();
        self.descriptor(memory, head, (at, 16 * parts.len() as u32, false), 4, 0);
        self.chains.insert(head, vec![head]);
        self.publish(memory, head);
        head
    }

    /// The next answer: head and bytes written.
    pub fn poll(&mut self, memory: &Memory) -> Option<(u16, u32)> {
        if memory.number(self.used() + 2) == self.seen {
            return None;
        }
        let at = self.used() + 4 + 8 * u64::from(self.seen % self.size);
        let element = memory.read(at, 8);
        self.seen = self.seen.wrapping_add(1);
        if self.event_idx {
            memory.set_number(self.available() + 4 + 2 * u64::from(self.size), self.seen);
        }
        let head = u32::from_le_bytes(element[..4].try_into().unwrap()) as u16;
        self.free.extend(self.chains.remove(&head).expect("an answer to something that was asked"));
        Some((head, u32::from_le_bytes(element[4..].try_into().unwrap())))
    }

    /// Waits for the next answer, by the bell.
    pub fn wait(&mut self, memory: &Memory) -> (u16, u32) {
        let begun = Instant::now();
        loop {
            if let Some(answer) = self.poll(memory) {
                return answer;
            }
            assert!(begun.elapsed() < PATIENCE, "queue {}: no answer", self.index);
            wait_for(&self.call, PATIENCE);
            let _ = self.call.read();
        }
    }
}

fn libc_nonblock() -> i32 {
    rustix::event::EventfdFlags::NONBLOCK.bits() as i32
}

/// Waits until a bell was rung; false when it was not in this time.
pub fn wait_for(bell: &EventFd, time: Duration) -> bool {
    let epoll = Epoll::new().unwrap();
    epoll.ctl(ControlOperation::Add, bell.as_raw_fd(), EpollEvent::new(EventSet::IN, 0)).unwrap();
    epoll.wait(time.as_millis() as i32, &mut [EpollEvent::default()]).unwrap() == 1
}

fn put_descriptor(memory: &Memory, at: u64, (address, length, writes): Part, flags: u16, next: u16) {
    let flags = flags | if writes { 2 } else { 0 };
    let bytes =
        [&address.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()]
            .concat();
    memory.write(at, &bytes);
}

/// How a front end sets a device up.
#[derive(Clone)]
pub struct Setup {
    pub queues: usize,
    pub size: u16,
    pub features: u64,
    /// One message for each region instead of a table.
    pub slots: bool,
    /// What was in flight before, and the memory that says so.
    pub inflight: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self { queues: 1, size: 128, features: u64::MAX, slots: false, inflight: false }
    }
}

/// A guest that is connected.
pub struct Guest {
    pub front: Frontend,
    pub memory: Memory,
    pub queues: Vec<Queue>,
    pub features: u64,
    pub inflight: Option<(VhostUserInflight, File)>,
    setup: Setup,
}

impl Guest {
    /// Connects, sets up queues and starts them.
    pub fn connect(socket: &Path, setup: Setup) -> Self {
        let queues = (0..setup.queues).map(|index| Queue::new(index, setup.size)).collect();
        Self::resume(socket, setup, Memory::new(), queues, None)
    }

    /// As a front end that lost its back end: memory and queues are what they were.
    pub fn resume(
        socket: &Path,
        setup: Setup,
        memory: Memory,
        queues: Vec<Queue>,
        inflight: Option<(VhostUserInflight, File)>,
    ) -> Self {
        let begun = Instant::now();
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) => assert!(begun.elapsed() < PATIENCE, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let front = Frontend::from_stream(stream, 256);
        let mut guest = Self { front, memory, queues, features: 0, inflight, setup };
        guest.agree();
        guest.start();
        guest
    }

    fn agree(&mut self) {
        let front = &mut self.front;
        front.set_owner().unwrap();
        let offered = front.get_features().unwrap();
        assert!(offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0);
        self.features = offered & self.setup.features & !VhostUserVirtioFeatures::LOG_ALL.bits();
        self.features |= VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let protocol = front.get_protocol_features().unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD));
        front.set_protocol_features(protocol).unwrap();
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        assert!(front.get_queue_num().unwrap() >= self.setup.queues as u64);
        front.set_features(self.features).unwrap();
        if self.setup.inflight && self.inflight.is_none() {
            let wanted = VhostUserInflight::new(0, 0, self.setup.queues as u16, self.setup.size);
            self.inflight = Some(front.get_inflight_fd(&wanted).unwrap());
        }
        if let Some((about, file)) = &self.inflight {
            front.set_inflight_fd(about, file.as_raw_fd()).unwrap();
        }
        self.share_memory();
    }

    /// Tells the device of guest memory.
    pub fn share_memory(&mut self) {
        let region = self.memory.region();
        if self.setup.slots {
            assert!(self.front.get_max_mem_slots().unwrap() >= 8);
            self.front.add_mem_region(&region).unwrap();
        } else {
            self.front.set_mem_table(&[region]).unwrap();
        }
    }

    /// Starts every queue.
    pub fn start(&mut self) {
        for queue in &mut self.queues {
            queue.event_idx = self.features & EVENT_IDX != 0;
            self.front.set_vring_num(queue.index, queue.size).unwrap();
            self.front.set_vring_base(queue.index, queue.seen).unwrap();
            self.front.set_vring_addr(queue.index, &addresses(queue, false)).unwrap();
            self.front.set_vring_call(queue.index, &queue.call).unwrap();
            self.front.set_vring_err(queue.index, &queue.error).unwrap();
            self.front.set_vring_kick(queue.index, &queue.kick).unwrap();
            self.front.set_vring_enable(queue.index, true).unwrap();
        }
    }

    /// Submits a virtio-blk request whose data are `parts`, by queue `q`. Header and status lie in the slot.
    pub fn request(&mut self, q: usize, slot: u64, kind: u32, sector: u64, parts: &[Part]) -> u16 {
        let at = self.header(slot, kind, sector);
        let whole: Vec<Part> = std::iter::once((at, 16, false))
            .chain(parts.iter().copied())
            .chain([(at + 16, 1, true)])
            .collect();
        self.queues[q].submit(&self.memory, &whole)
    }

    /// Writes a request's header; answers where it is. The status follows it.
    pub fn header(&self, slot: u64, kind: u32, sector: u64) -> u64 {
        let at = 0x8_0000 + slot * 32;
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes(), &[0xff]].concat();
        self.memory.write(at, &header);
        at
    }

    pub fn status(&self, slot: u64) -> u8 {
        self.memory.read(0x8_0000 + slot * 32 + 16, 1)[0]
    }

    /// One request from beginning to end; answers its status.
    pub fn once(&mut self, kind: u32, sector: u64, parts: &[Part]) -> u8 {
        let head = self.request(0, 0, kind, sector, parts);
        assert_eq!(self.queues[0].wait(&self.memory).0, head);
        self.status(0)
    }

    pub fn write(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        self.memory.write(DATA, bytes);
        self.once(WRITE, sector, &[(DATA, bytes.len() as u32, false)])
    }

    pub fn read(&mut self, sector: u64, length: u32) -> Vec<u8> {
        assert_eq!(self.once(READ, sector, &[(DATA, length, true)]), 0);
        self.memory.read(DATA, length as usize)
    }

    pub fn config(&mut self, length: u32) -> Vec<u8> {
        let flags = VhostUserConfigFlags::WRITABLE;
        self.front.get_config(0, length, flags, &vec![0; length as usize]).unwrap().1
    }

    /// Size of the disk in sectors, as the configuration says.
    pub fn capacity(&mut self) -> u64 {
        u64::from_le_bytes(self.config(60)[..8].try_into().unwrap())
    }
}

/// Where the rings of a queue are, in the front end's addresses.
pub fn addresses(queue: &Queue, log: bool) -> VringConfigData {
    VringConfigData {
        queue_max_size: queue.size,
        queue_size: queue.size,
        flags: u32::from(log),
        desc_table_addr: USER + queue.table(),
        used_ring_addr: USER + queue.used(),
        avail_ring_addr: USER + queue.available(),
        log_addr: log.then(|| queue.used()),
    }
}

/// A back end on a thread of its own.
pub struct Server {
    stop: UnixStream,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    /// Serves what `make` makes until it is stopped. Each byte sent to it calls `asked`.
    pub fn start<D: Disk + 'static>(
        socket: &Path,
        make: impl FnOnce() -> Rc<D> + Send + 'static,
        mut asked: impl FnMut(&D) + Send + 'static,
    ) -> Self {
        let (stop, other) = UnixStream::pair().unwrap();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let path = socket.to_owned();
        let thread = std::thread::spawn(move || {
            lane::block_on(async move {
                let disk = make();
                let listener = lane::net::Listener::unix(&path, 0o600).unwrap();
                let new = front::vhost::NewExport {
                    name: "test".into(),
                    disk: Rc::clone(&disk) as Rc<dyn Disk>,
                    read_only: false,
                    serial: "serial-of-the-disk-and-more".into(),
                };
                let export = front::vhost::Export::start(listener, new);
                ready.send(()).unwrap();
                let asking = lane::ready::Watched::new(other.into());
                loop {
                    asking.readable().await.unwrap();
                    let mut byte = [0];
                    if rustix::io::read(asking.as_fd(), &mut byte).unwrap() == 0 {
                        break;
                    }
                    asked(&disk);
                    export.resized().await;
                    rustix::io::write(asking.as_fd(), &byte).unwrap();
                }
                export.close().await;
                assert_eq!(export.counts().in_flight(), 0);
            });
        });
        is_ready.recv().unwrap();
        Self { stop, thread: Some(thread) }
    }

    /// Lets it do what it was started with, and waits until it has.
    pub fn ask(&mut self) {
        self.stop.write_all(&[1]).unwrap();
        self.stop.read_exact(&mut [0]).unwrap();
    }

    /// Lets it run, unwatched, as long as the process: a daemon that was killed, as far as anybody can see.
    pub fn leave(mut self) {
        drop(self.thread.take());
        let stream = std::mem::replace(&mut self.stop, UnixStream::pair().unwrap().0);
        Box::leak(Box::new(stream));
    }

    /// Ends it as a daemon ends.
    pub fn stop(mut self) {
        let _ = self.stop.shutdown(std::net::Shutdown::Both);
        self.thread.take().unwrap().join().unwrap();
    }
}
