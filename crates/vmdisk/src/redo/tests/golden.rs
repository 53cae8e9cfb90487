//! A redo log as version 0.1 wrote it: it opens for ever, and the same steps still give the same bytes.

use super::*;

/// The first 56 sectors of the file; the rest is zero up to 16 MiB.
const GOLDEN: &[u8] = include_bytes!("golden.cowd");

async fn steps(disk: &RedoDisk) {
    write(disk, 5, &[0x11; 2 * UNIT]).await;
    write(disk, 60, &[0x22; 4 * UNIT]).await;
    disk.flush().await.unwrap();
    write(disk, 6, &[0x33; UNIT]).await;
    write(disk, 20, &[0x44; 8 * UNIT]).await;
    disk.close().await.unwrap();
}

#[test]
fn the_golden_redo_log_opens_and_is_still_made() {
    lane::block_on(async {
        let (file, disk) = fresh(64, 1, Rc::new(MemoryDisk::new(64))).await;
        steps(&disk).await;
        let made = read(&*file, 0, GROW_SECTORS).await;
        if std::env::var_os("KAGAMI_WRITE_GOLDEN").is_some() {
            let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/redo/tests/golden.cowd");
            std::fs::write(path, &made[..56 * UNIT]).unwrap();
        }
        assert!(made[..GOLDEN.len()] == *GOLDEN, "the format changed");
        assert!(lane::memory::is_zero(&made[GOLDEN.len()..]));

        let mut whole = GOLDEN.to_vec();
        whole.resize(GROW_SECTORS as usize * UNIT, 0);
        let (bytes, below) = random_disk(64, 1);
        let golden =
            RedoDisk::open(Rc::new(MemoryDisk::from_bytes(&whole)), below, true, false).await.unwrap();
        let mut expected = bytes;
        for (at, count, byte) in [(5, 1, 0x11), (6, 1, 0x33), (20, 8, 0x44), (60, 4, 0x22)] {
            expected[at * UNIT..(at + count) * UNIT].fill(byte);
        }
        assert!(read(&*golden, 0, 64).await == expected);
    });
}
