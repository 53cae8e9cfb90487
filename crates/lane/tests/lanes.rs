//! Several lanes that talk through their handles while each does I/O of its own.
#![allow(clippy::unwrap_used)] // a test

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use lane::fs::{File, Open};
use lane::{Buffer, DriverKind, Handle, Options, Segments, SegmentsMut};

const BLOCK: usize = 4096;
const BLOCKS: u64 = 64;

thread_local! {
    /// Files live with their lane; who asks names them.
    static FILES: RefCell<HashMap<u32, Rc<File>>> = RefCell::default();
}

fn file(number: u32) -> Rc<File> {
    FILES.with(|files| Rc::clone(&files.borrow()[&number]))
}

async fn open(number: u32) {
    let path = std::env::temp_dir().join(format!("lane-lanes-{}-{number}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let how = Open { create_bytes: Some(BLOCKS * BLOCK as u64), ..Default::default() };
    let file = File::open(&path, &how).await.unwrap();
    std::fs::remove_file(&path).unwrap();
    FILES.with(|files| files.borrow_mut().insert(number, Rc::new(file)));
}

async fn write(number: u32, block: u64, fill: u8) {
    let mut data = Buffer::for_overwrite(BLOCK);
    data.fill(fill);
    file(number).write_at(block * BLOCK as u64, &Segments::new(&data), false).await.unwrap();
}

/// The byte that fills the block, as a buffer that changes lanes.
async fn read(number: u32, block: u64) -> Buffer {
    let mut data = Buffer::for_overwrite(BLOCK);
    file(number).read_at(block * BLOCK as u64, &SegmentsMut::new(&mut data)).await.unwrap();
    data
}

#[test]
fn lanes_with_files_ask_each_other() {
    let drivers = [DriverKind::Ring, DriverKind::Threads, DriverKind::Ring];
    let lanes: Vec<Handle> = drivers
        .iter()
        .map(|driver| lane::start(Options { driver: *driver, ..Default::default() }).unwrap())
        .collect();
    lane::block_on(async {
        for (number, lane) in lanes.iter().enumerate() {
            lane.run(move || open(number as u32)).await;
        }
        // On each lane, tasks write to the file of the next lane and read it back, all at once.
        let asked: Vec<_> = (0..lanes.len())
            .map(|own| {
                let (next, other) = ((own + 1) % lanes.len(), lanes[(own + 1) % lanes.len()].clone());
                lane::spawn(lanes[own].run(move || async move {
                    let tasks: Vec<_> = (0..BLOCKS)
                        .map(|block| {
                            let (other, fill) = (other.clone(), (block * 3 + own as u64) as u8 | 1);
                            lane::spawn(async move {
                                other.run(move || write(next as u32, block, fill)).await;
                                write(own as u32, BLOCKS - 1 - block, 0).await;
                                other.run(move || write(next as u32, block, fill)).await;
                                let back = other.run(move || read(next as u32, block)).await;
                                back.len() == BLOCK && back.iter().all(|b| *b == fill || *b == 0)
                            })
                        })
                        .collect();
                    let mut right = 0;
                    for task in tasks {
                        right += u64::from(task.await);
                    }
                    right
                }))
            })
            .collect();
        for answer in asked {
            assert_eq!(answer.await, BLOCKS);
        }
    });
    // Stopping with writes under way: they end first, nothing aborts.
    for (number, lane) in lanes.iter().enumerate() {
        drop(lane.run(move || async move {
            for block in 0..BLOCKS {
                drop(lane::spawn(write(number as u32, block, 9)));
            }
            lane::yield_now().await;
        }));
        lane.stop();
    }
}
