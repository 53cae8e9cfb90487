use super::*;

fn scratch(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("lane-fs-{}-{name}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    path
}

#[test]
fn reads_back_at_any_alignment() {
    for direct in [Direct::Auto, Direct::Never] {
        let path = scratch(&format!("align-{direct:?}"));
        crate::block_on(async {
            let how = Open { create_bytes: Some(1 << 20), direct, ..Default::default() };
            let file = File::open(&path, &how).await.unwrap();
            let mut data = vec![0u8; 8192 + 1];
            for (n, byte) in data.iter_mut().enumerate() {
                *byte = (n % 251) as u8;
            }
            file.write_at(4096, &Segments::new(&data[1..]), true).await.unwrap();
            let mut back = vec![0u8; 4099];
            file.read_at(5001, &SegmentsMut::new(&mut back)).await.unwrap();
            assert_eq!(back, data[1 + 905..1 + 905 + 4099]);
            let (head, tail) = data.split_at(512);
            let list = Segments::gather([head, &tail[..3584]]);
            file.write_at(0, &list, false).await.unwrap();
            let mut all = Buffer::zeroed(4096);
            file.read_at(0, &SegmentsMut::new(&mut all)).await.unwrap();
            assert_eq!(all[..], data[..4096]);
            let over = file.read_at((1 << 20) - 512, &SegmentsMut::new(&mut all)).await.unwrap_err();
            assert_eq!(over.kind(), ErrorKind::UnexpectedEof);
            file.sync_data().await.unwrap();
        });
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn holes_are_seen_and_punched() {
    let path = scratch("holes");
    crate::block_on(async {
        let how = Open { create_bytes: Some(1 << 20), ..Default::default() };
        let file = File::open(&path, &how).await.unwrap();
        assert_eq!(file.stretch(0).await.unwrap(), Stretch { end: 1 << 20, data: false });
        let data = Buffer::zeroed(65536);
        file.write_at(65536, &Segments::new(&data), false).await.unwrap();
        file.sync_data().await.unwrap();
        assert_eq!(file.stretch(0).await.unwrap(), Stretch { end: 65536, data: false });
        assert_eq!(file.stretch(65536).await.unwrap(), Stretch { end: 131072, data: true });
        file.punch_hole(65536, 65536).await.unwrap();
        assert!(!file.stretch(65536).await.unwrap().data);
        file.set_length(1 << 16).await.unwrap();
        assert_eq!(file.length().await.unwrap(), 1 << 16);
        assert_eq!(file.stretch(1 << 16).await.unwrap_err().kind(), ErrorKind::InvalidInput);
    });
    std::fs::remove_file(path).unwrap();
}

#[test]
fn a_second_user_is_told_who_has_it() {
    let path = scratch("lock");
    crate::block_on(async {
        let file = File::open(&path, &Open { create_bytes: Some(4096), ..Default::default() }).await.unwrap();
        let error = File::open(&path, &Open::default()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceBusy);
        assert!(error.to_string().contains("in use by"), "{error}");
        drop(file);
        let shared = Open { lock: Lock::Shared, read_only: true, ..Default::default() };
        let _one = File::open(&path, &shared).await.unwrap();
        let _two = File::open(&path, &shared).await.unwrap();
    });
    std::fs::remove_file(path).unwrap();
}

#[test]
fn the_lock_of_a_killed_process_is_waited_for() {
    let path = scratch("killed");
    std::fs::write(&path, [0; 4096]).unwrap();
    let mut child =
        std::process::Command::new("flock").arg("-o").arg(&path).args(["sleep", "5"]).spawn().unwrap();
    crate::block_on(async {
        // Until the child has it.
        let error = loop {
            match File::open(&path, &Open::default()).await {
                Ok(file) => drop(file),
                Err(error) => break error,
            }
        };
        assert!(error.to_string().contains("process"), "{error}");
        child.kill().unwrap();
        File::open(&path, &Open::default()).await.unwrap();
        child.wait().unwrap();
    });
    std::fs::remove_file(path).unwrap();
}

#[test]
fn more_operations_than_the_queues_hold() {
    for driver in [crate::DriverKind::Ring, crate::DriverKind::Threads] {
        let path = scratch(&format!("many-{driver:?}"));
        crate::block_on_with(crate::Options { driver, ..Default::default() }, async {
            let how = Open { create_bytes: Some(1 << 20), direct: Direct::Never, ..Default::default() };
            let file = std::rc::Rc::new(File::open(&path, &how).await.unwrap());
            let tasks: Vec<_> = (0..10_000u64)
                .map(|n| {
                    let file = std::rc::Rc::clone(&file);
                    crate::spawn(async move {
                        let at = n % 256 * 4096;
                        let mut back = [0u8; 8];
                        file.write_at(at, &Segments::new(&at.to_le_bytes()), false).await.unwrap();
                        file.read_at(at, &SegmentsMut::new(&mut back)).await.unwrap();
                        assert_eq!(u64::from_le_bytes(back), at);
                    })
                })
                .collect();
            for task in tasks {
                task.await;
            }
        });
        std::fs::remove_file(path).unwrap();
    }
}
