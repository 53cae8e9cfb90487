//! FileDisk on real files: every promise of `Disk`, direct and buffered.

use std::path::PathBuf;

use block::{Disk, DiskError, Extents, Kind, Safe, Sector, Segments, SegmentsMut};
use media::{Counters, Direct, MediaError, Options};

fn scratch(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("media-{}-{name}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    path
}

fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|n| (n as u64 * 31 + u64::from(seed)) as u8 | 1).collect()
}

#[test]
fn content_survives_reopening() {
    for direct in [Direct::Auto, Direct::Never] {
        let path = scratch(&format!("reopen-{direct:?}"));
        let options = Options { direct, ..Default::default() };
        let data = pattern(3 * 512, 1);
        lane::block_on(async {
            let disk = media::create(&path, 100, options.clone()).await.unwrap();
            assert_eq!(disk.shape().sectors, 100);
            disk.write(Sector(7), &Segments::new(&data), Safe::OnReturn).await.unwrap();
            disk.flush().await.unwrap();
            assert!(disk.in_use().to_string().contains(if direct == Direct::Never {
                "buffered"
            } else {
                ""
            }));
        });
        lane::block_on(async {
            let disk = media::open(&path, options).await.unwrap();
            let mut back = vec![9; 5 * 512];
            disk.read(Sector(6), &SegmentsMut::new(&mut back)).await.unwrap();
            assert_eq!(back, [vec![0; 512], data.clone(), vec![0; 512]].concat());
        });
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn ranges_and_rights_are_checked() {
    let path = scratch("ranges");
    lane::block_on(async {
        let disk = media::create(&path, 16, Options::default()).await.unwrap();
        let mut one = vec![0; 512];
        for at in [16, 17, u64::MAX / 512, u64::MAX] {
            let read = disk.read(Sector(at), &SegmentsMut::new(&mut one)).await;
            assert!(matches!(read, Err(DiskError::OutOfRange)), "{at}");
            assert!(matches!(disk.zero(Sector(at), 1, true).await, Err(DiskError::OutOfRange)));
            assert!(matches!(disk.unmap(Sector(at), 1).await, Err(DiskError::OutOfRange)));
        }
        assert!(matches!(disk.unmap(Sector(1), u64::MAX).await, Err(DiskError::OutOfRange)));
        disk.zero(Sector(16), 0, false).await.unwrap();
        let second = media::open(&path, Options::default()).await;
        assert!(matches!(second, Err(MediaError::InUse(_))));
        drop(disk);
        let disk = media::open(&path, Options { read_only: true, ..Default::default() }).await.unwrap();
        let write = disk.write(Sector(0), &Segments::new(&one), Safe::AtNextFlush).await;
        assert!(matches!(write, Err(DiskError::ReadOnly)));
        assert!(disk.shape().read_only);
        assert_eq!(disk.counters(), Counters { failed: 1, ..Counters::default() });
        let missing = media::open(path.with_extension("none"), Options::default()).await;
        assert!(matches!(missing, Err(MediaError::Io { .. })));
        assert!(matches!(media::create(&path, 16, Options::default()).await, Err(MediaError::Io { .. })));
    });
    std::fs::remove_file(path).unwrap();
}

#[test]
fn zeroing_unmapping_and_status_agree() {
    for direct in [Direct::Auto, Direct::Never] {
        let path = scratch(&format!("zero-{direct:?}"));
        lane::block_on(async {
            let options = Options { direct, ..Default::default() };
            let disk = media::create(&path, 4096, options).await.unwrap();
            let data = pattern(1 << 20, 3);
            disk.write(Sector(1024), &Segments::new(&data), Safe::AtNextFlush).await.unwrap();
            disk.flush().await.unwrap();
            let mut extents = Extents::with_limit(8);
            disk.status(Sector(0), 4096, None, &mut extents).await.unwrap();
            let kinds: Vec<_> = extents.iter().map(|e| (e.at.0, e.count, e.kind)).collect();
            assert_eq!(kinds, [(0, 1024, Kind::Hole), (1024, 2048, Kind::Data), (3072, 1024, Kind::Hole)]);
            disk.unmap(Sector(1025), 1000).await.unwrap();
            disk.zero(Sector(2100), 3, false).await.unwrap();
            let mut back = vec![0; 1 << 20];
            disk.read(Sector(1024), &SegmentsMut::new(&mut back)).await.unwrap();
            let mut want = data.clone();
            want[512..512 * 1001].fill(0);
            want[(2100 - 1024) * 512..(2103 - 1024) * 512].fill(0);
            assert!(back == want);
        });
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn compare_and_write_is_atomic() {
    let path = scratch("caw");
    lane::block_on(async {
        let disk = media::create(&path, 64, Options::default()).await.unwrap();
        // Forty increments of one counter from tasks that race: none may be lost.
        let tasks: Vec<_> = (0..40)
            .map(|_| {
                let disk = std::rc::Rc::clone(&disk);
                lane::spawn(async move {
                    let mut seen = vec![0; 512];
                    loop {
                        let mut next = seen.clone();
                        next[0] += 1;
                        let done = disk
                            .compare_and_write(Sector(9), &Segments::new(&seen), &Segments::new(&next))
                            .await;
                        match done {
                            Ok(()) => break,
                            Err(DiskError::Miscompare { at_bytes: 0 }) => {
                                disk.read(Sector(9), &SegmentsMut::new(&mut seen)).await.unwrap();
                            }
                            Err(error) => panic!("{error}"),
                        }
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await;
        }
        let mut seen = vec![0; 512];
        disk.read(Sector(9), &SegmentsMut::new(&mut seen)).await.unwrap();
        assert_eq!(seen[0], 40);
    });
    std::fs::remove_file(path).unwrap();
}

#[test]
fn a_disk_grows_and_never_shrinks() {
    let path = scratch("grow");
    lane::block_on(async {
        let disk = media::create(&path, 64, Options::default()).await.unwrap();
        disk.grow(128).await.unwrap();
        assert_eq!(disk.shape().sectors, 128);
        disk.write(Sector(127), &Segments::new(&[5; 512]), Safe::AtNextFlush).await.unwrap();
        assert!(matches!(disk.grow(100).await, Err(MediaError::Smaller { has: 128, wanted: 100, .. })));
        assert!(matches!(disk.grow(u64::MAX).await, Err(MediaError::Io { .. })));
        assert_eq!(disk.shape().sectors, 128);
    });
    std::fs::remove_file(path).unwrap();
}
