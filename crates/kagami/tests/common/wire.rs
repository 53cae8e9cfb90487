//! VMs of tests, and their disks as a client on the NBD socket sees them.

use std::rc::Rc;

use block::{Disk, DiskError, Safe, Sector, Segments, SegmentsMut};
use front::nbd::Wire;
use front::nbd::client::{Client, Options};

use super::Place;

/// Pool, datastore, VM `sql01` with C: (64 MiB, VMFS) and D: (32 MiB, RDM), both served.
pub fn with_vm(name: &str) -> Place {
    let place = with_vm_unserved(name);
    place.ok(&["export", "start", "sql01/scsi0:0"]);
    place.ok(&["export", "start", "sql01/scsi0:1"]);
    place
}

/// The same, not served.
pub fn with_vm_unserved(name: &str) -> Place {
    let place = Place::new(name);
    place.ok(&["pool", "create", "p1", "--size", "2G"]);
    place.ok(&["datastore", "create", "ds1", "--size", "1G"]);
    place.ok(&["lun", "create", "sql01-d", "--size", "32M"]);
    place.ok(&["vm", "create", "sql01", "--datastore", "ds1", "--disk", "64M", "--rdm", "sql01-d:physical"]);
    place
}

/// A client of an export.
pub async fn connect(place: &Place, export: &str) -> Rc<Client> {
    let stream = lane::net::Stream::connect_unix(place.home().join("nbd.sock")).await.unwrap();
    let options = Options { export: export.to_owned(), ..Options::default() };
    Client::connect(Wire::Socket(stream), &options).await.unwrap()
}

/// Does something while a client is connected to an export.
pub fn while_connected(place: &Place, export: &str, work: impl FnOnce()) {
    lane::block_on(async {
        let disk = connect(place, export).await;
        work();
        disk.disconnect().await;
    });
}

/// Writes a pattern to some blocks of an export, and flushes.
pub fn write(place: &Place, export: &str, blocks: &[u64], fill: u8) {
    try_write(place, export, blocks, fill).unwrap();
}

/// The same; the first error that the server tells.
pub fn try_write(place: &Place, export: &str, blocks: &[u64], fill: u8) -> Result<(), DiskError> {
    lane::block_on(async {
        let disk = connect(place, export).await;
        let done = async {
            for block in blocks {
                let bytes = vec![fill ^ (*block as u8); 4096];
                disk.write(Sector(block * 8), &Segments::new(&bytes), Safe::AtNextFlush).await?;
            }
            disk.flush().await
        };
        let done = done.await;
        disk.disconnect().await;
        done
    })
}

/// Writes bytes that do not pack, from the beginning of an export on, and flushes.
pub fn write_noise(place: &Place, export: &str, mebibytes: u64, seed: u64) {
    lane::block_on(async {
        let disk = connect(place, export).await;
        let mut state = seed * 2 + 1;
        for at in 0..mebibytes {
            let mut bytes = vec![0_u8; 1 << 20];
            for word in bytes.chunks_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_le_bytes());
            }
            disk.write(Sector(at * 2048), &Segments::new(&bytes), Safe::AtNextFlush).await.unwrap();
        }
        disk.flush().await.unwrap();
        disk.disconnect().await;
    });
}

/// The whole content of an export.
pub fn content(place: &Place, export: &str) -> Vec<u8> {
    lane::block_on(async {
        let disk = connect(place, export).await;
        let mut bytes = vec![0; disk.shape().bytes() as usize];
        for (index, piece) in bytes.chunks_mut(1 << 20).enumerate() {
            disk.read(Sector(index as u64 * 2048), &SegmentsMut::new(piece)).await.unwrap();
        }
        disk.disconnect().await;
        bytes
    })
}

/// The content of C: and D: of a VM.
pub fn contents(place: &Place, vm: &str) -> [Vec<u8>; 2] {
    [content(place, &format!("{vm}/scsi0:0")), content(place, &format!("{vm}/scsi0:1"))]
}
