//! The thin device below the volume has no room for a while: what asked for room is told so, nothing is lost, and all goes
//! on when there is room again, without the volume being opened anew.

#![allow(clippy::unwrap_used)] // a test that cannot go on panics

mod common;

use std::cell::Cell;
use std::rc::Rc;

use block::decorate::{Decorated, Operation, Passing};
use block::{Disk, DiskError, Image, Io, MemoryDisk, Safe, Sector, Segments};
use common::datastore::{GIB, check, fresh, open, read};
use vmfs::check::Severity;
use vmfs::{Content, Error, File, Layout, NewFile, Volume};

/// Has no room from its n-th write on, until somebody makes some.
#[derive(Default)]
struct Thin {
    left: Cell<Option<u64>>,
    refused: Cell<u64>,
}

impl Passing for Thin {
    fn before(&self, operation: Operation, _at: Sector, _count: u64) -> Io<'_> {
        let takes = matches!(operation, Operation::Write | Operation::Zero);
        let full = takes
            && self.left.get().is_some_and(|left| {
                self.left.set(Some(left.saturating_sub(1)));
                left == 0
            });
        self.refused.set(self.refused.get() + u64::from(full));
        Box::pin(std::future::ready(if full { Err(DiskError::NoSpace) } else { Ok(()) }))
    }
}

async fn put(volume: &Volume, file: &File, at: u64, byte: u8) -> Result<(), DiskError> {
    let allocation = file.allocate(Sector(at), 8).await?;
    for place in allocation.places() {
        let Content::Data { device, at: to } = place.content else { panic!("no place for data: {place:?}") };
        let bytes = vec![byte; (place.count * 512) as usize];
        volume.space().devices()[device].write(to, &Segments::new(&bytes), Safe::AtNextFlush).await?;
    }
    allocation.commit()?;
    Ok(file.flush().await?)
}

/// Does something again until it works; there is room after the first refusal, but for a little while.
async fn until_there_is_room<T>(thin: &Thin, mut work: impl AsyncFnMut() -> Result<T, DiskError>) -> T {
    for tried in 0.. {
        match work().await {
            Ok(done) => return done,
            Err(DiskError::NoSpace) => thin.left.set(if tried == 0 { Some(1) } else { None }),
            Err(other) => panic!("{other}"),
        }
    }
    unreachable!()
}

/// Writes a thin file here and there, makes and removes another; the n-th write to the device finds no room.
async fn story(base: &Image, nth: u64) -> u64 {
    let device = Rc::new(MemoryDisk::from(base.clone()));
    let thin = Decorated::new(Rc::clone(&device) as Rc<dyn Disk>, Thin::default());
    let volume = open(Rc::clone(&thin) as Rc<dyn Disk>).await;
    let new = NewFile { length: 64 * GIB, layout: Layout::Thin, grows_to: 0 };
    let file = volume.create_file("a-flat.vmdk", new).await.unwrap();
    thin.passing.left.set(Some(nth));
    // Far apart, so that each takes a block, and some a pointer block.
    let places: Vec<u64> = (0..12).map(|n| n * 5 * GIB / 512 + n * 8).collect();
    for (n, at) in places.iter().enumerate() {
        until_there_is_room(&thin.passing, async || put(&volume, &file, *at, n as u8 + 1).await).await;
        if n == 6 {
            // What was half done when the room ended is there, or is not.
            let small = until_there_is_room(&thin.passing, async || {
                match volume.write_file("small", &[7; 20_000]).await {
                    Err(Error::Exists { .. }) => Ok(()),
                    other => other.map_err(DiskError::from),
                }
            });
            small.await;
        }
        let done_before = |answer: Result<(), Error>| match answer {
            Err(Error::NotFound { .. }) => Ok(()),
            other => other.map_err(DiskError::from),
        };
        if n == 8 {
            let renamed = async || done_before(volume.rename("small", "other").await);
            until_there_is_room(&thin.passing, renamed).await;
        }
        if n == 10 {
            until_there_is_room(&thin.passing, async || done_before(volume.remove("other").await)).await;
        }
    }
    until_there_is_room(&thin.passing, async || volume.settle().await.map_err(DiskError::from)).await;
    let refused = thin.passing.refused.get();
    drop((file, volume, thin));
    let report = check(Rc::clone(&device) as Rc<dyn Disk>).await;
    assert!(report.worst().is_none_or(|w| w <= Severity::Leak), "{nth}: {:#?}", report.findings());
    let volume = open(Rc::clone(&device) as Rc<dyn Disk>).await;
    let names: Vec<String> = volume.list("/").await.unwrap().into_iter().map(|e| e.name).collect();
    assert!(!names.iter().any(|n| n == "small" || n == "other"), "{nth}: {names:?}");
    let file = volume.open_file("a-flat.vmdk").await.unwrap();
    for (n, at) in places.iter().enumerate() {
        assert!(read(&volume, &file, *at, 8).await == vec![n as u8 + 1; 4096], "{nth}: write {n}");
    }
    refused
}

#[test]
fn a_thin_device_without_room_halts_nothing() {
    lane::block_on(async {
        let base = fresh(GIB).await.image();
        let mut nth = 0;
        while story(&base, nth).await > 0 {
            nth += 1;
        }
        assert!(nth > 30, "{nth}");
    });
}
