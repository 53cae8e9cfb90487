//! A writer that waits for each of its writes to be durable, and what a disk must hold of them then.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use block::{Disk, DiskError, Safe, Sector, Segments, SegmentsMut};
use front::nbd::Wire;
use front::nbd::client::{Client, Options};

use super::Place;

/// The disks of a VM that it writes to in turn.
pub const SLOTS: [&str; 2] = ["scsi0:0", "scsi0:1"];
/// Blocks of 4 KiB of each disk that the numbers go to, one after the other.
pub const RING: u64 = 512;
const BLOCK: usize = 4096;

/// A client of an export; an error when there is no server.
pub async fn connect(socket: &Path, export: &str) -> Result<Rc<Client>, String> {
    let stream = lane::net::Stream::connect_unix(socket).await.map_err(|e| e.to_string())?;
    let options = Options { export: export.to_owned(), ..Options::default() };
    Client::connect(Wire::Socket(stream), &options).await.map_err(|e| e.to_string())
}

/// Write number `n` goes to disk `n % 2`, and is flushed before `n + 1` begins.
pub struct Writer {
    stop: Arc<AtomicBool>,
    durable: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Writer {
    /// Goes on after `last`; ends when told, or when the daemon is gone.
    pub fn start(place: &Place, vm: &str, last: u64) -> Self {
        let (stop, durable) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(last)));
        let (stopping, answered) = (Arc::clone(&stop), Arc::clone(&durable));
        let (socket, vm): (PathBuf, String) = (place.home().join("nbd.sock"), vm.to_owned());
        let thread = std::thread::spawn(move || {
            lane::block_on(async {
                let mut disks = Vec::new();
                for slot in SLOTS {
                    match connect(&socket, &format!("{vm}/{slot}")).await {
                        Ok(disk) => disks.push(disk),
                        Err(_) => return,
                    }
                }
                for number in last + 1.. {
                    if stopping.load(Ordering::Relaxed) || put(&disks, number).await.is_err() {
                        return;
                    }
                    answered.store(number, Ordering::Relaxed);
                }
            });
        });
        Self { stop, durable, thread }
    }

    /// The last number that was answered as durable so far.
    pub fn so_far(&self) -> u64 {
        self.durable.load(Ordering::Relaxed)
    }

    /// The last number that was answered as durable.
    pub fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        self.durable.load(Ordering::Relaxed)
    }
}

async fn put(disks: &[Rc<Client>], number: u64) -> Result<(), DiskError> {
    let disk = &disks[(number % 2) as usize];
    let bytes: Vec<u8> = number.to_le_bytes().into_iter().cycle().take(BLOCK).collect();
    disk.write(Sector(number / 2 % RING * 8), &Segments::new(&bytes), Safe::AtNextFlush).await?;
    disk.flush().await
}

/// The newest number on both disks of a VM, which hold all numbers up to it and none else.
pub fn prefix(place: &Place, vm: &str) -> u64 {
    let socket = place.home().join("nbd.sock");
    let found = lane::block_on(async {
        let mut found = Vec::new();
        for slot in SLOTS {
            let disk = connect(&socket, &format!("{vm}/{slot}")).await.unwrap();
            let mut bytes = vec![0; RING as usize * BLOCK];
            disk.read(Sector(0), &SegmentsMut::new(&mut bytes)).await.unwrap();
            disk.disconnect().await;
            let number = |block: &[u8]| {
                let number = u64::from_le_bytes(block[..8].try_into().unwrap());
                assert!(block.as_chunks::<8>().0.iter().all(|w| *w == number.to_le_bytes()), "a torn block");
                number
            };
            found.push(bytes.chunks(BLOCK).map(number).collect::<Vec<u64>>());
        }
        found
    });
    let last = found.iter().flatten().copied().max().unwrap();
    for (disk, numbers) in found.iter().enumerate() {
        for (place, number) in numbers.iter().enumerate() {
            let fits = |n: &u64| n % 2 == disk as u64 && n / 2 % RING == place as u64;
            // The newest number that went here, up to the last; 0 when none did.
            let newest = (0..2 * RING).filter_map(|back| last.checked_sub(back)).find(|n| *n > 0 && fits(n));
            assert_eq!(*number, newest.unwrap_or(0), "{vm}: disk {disk}, block {place}, last {last}");
        }
    }
    last
}

/// The same of a VM whose writer was answered up to `durable`: that, or the one more that was under way.
pub fn one_prefix(place: &Place, vm: &str, durable: u64) -> u64 {
    let last = prefix(place, vm);
    assert!(last == durable || last == durable + 1, "{vm}: answered up to {durable}, found up to {last}");
    last
}
