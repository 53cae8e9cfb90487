//! What the kernel refuses: io_uring, memory to pin. And what we refuse: going on after a dropped operation.
//!
//! Each test changes its own thread or a child process, never the others.
#![allow(unsafe_code)] // seccomp, capabilities and limits have no safe calls
#![allow(clippy::unwrap_used)] // a test

use std::path::PathBuf;
use std::rc::Rc;

use lane::fs::{Direct, File, Open};
use lane::net::Stream;
use lane::{Buffer, DriverKind, Options, Segments, SegmentsMut};

fn scratch(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("lane-refused-{}-{name}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    path
}

/// Lets calls of this thread fail that a filter picks; the filter jumps over one statement for all others.
fn refuse(mut filter: Vec<libc::sock_filter>, error: i32) {
    filter.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | error as u32, 0, 0));
    filter.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0));
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: a valid program, which the kernel copies; both calls concern this thread only.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let set = libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program);
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    }
}

fn statement(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

/// Loads a word of the call's description: 0 is its number, the low half of argument n lies at 16 + 8 n.
fn load(at: u32) -> libc::sock_filter {
    statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, at, 0, 0)
}

/// Goes on if the word is this, else jumps over so many statements.
fn only(word: u32, otherwise: u8) -> libc::sock_filter {
    statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, word, 0, otherwise)
}

/// Goes on if the word has one of these bits, else jumps over so many statements.
fn any_bit(word: u32, otherwise: u8) -> libc::sock_filter {
    statement(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, word, 0, otherwise)
}

/// Lets O_DIRECT be refused when it is set on an open file, as a file system does that has no direct I/O. Holds for this
/// thread and those that it starts.
fn refuse_direct() {
    let set = libc::F_SETFL as u32;
    let filter = vec![
        load(0),
        only(libc::SYS_fcntl as u32, 5),
        load(16 + 8),
        only(set, 3),
        load(16 + 8 * 2),
        any_bit(libc::O_DIRECT as u32, 1),
    ];
    refuse(filter, libc::EINVAL);
}

/// Lets the reads fail that opening tries, as a file system does that takes the flag and not the reads.
fn refuse_to_read_direct() {
    refuse(vec![load(0), only(libc::SYS_pread64 as u32, 1)], libc::EINVAL);
}

/// Lets this thread's io_uring_setup fail with EPERM, as a container's seccomp profile does.
fn forbid_io_uring() {
    refuse(vec![load(0), only(libc::SYS_io_uring_setup as u32, 1)], libc::EPERM);
}

/// Lets each io_uring_enter of this thread fail that does not wait for anything, as for want of memory. Calls that
/// wait are taken: in the kernel's own shortage too the next call may be.
fn refuse_calls_that_do_not_wait(error: i32) {
    let enter = libc::SYS_io_uring_enter as u32;
    refuse(vec![load(0), only(enter, 3), load(16 + 8 * 2), only(0, 1)], error);
}

#[test]
fn without_io_uring_threads_do_it() {
    let path = scratch("seccomp");
    let engine = std::thread::spawn(move || {
        forbid_io_uring();
        lane::block_on_with(Options { driver: DriverKind::Ring, ..Default::default() }, async {
            let file =
                File::open(&path, &Open { create_bytes: Some(8192), ..Default::default() }).await.unwrap();
            let mut place = Buffer::for_overwrite(8192);
            file.read_at(0, &SegmentsMut::new(&mut place)).await.unwrap();
            assert!(place.iter().all(|b| *b == 0));
            std::fs::remove_file(&path).unwrap();
            lane::in_use().engine
        })
    });
    assert_eq!(engine.join().unwrap(), "threads");
}

/// Runs one test of this file in a child process with `name` set in its environment.
fn in_child(test: &str, name: &str) -> std::process::Output {
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(name, "1").output().unwrap()
}

/// What a file system does not take directly goes through the page cache, and is as durable: nobody has to ask for that.
#[test]
fn without_direct_io_files_are_buffered() {
    // The workers that open files are shared by all threads: each way of refusing has a process of its own.
    const WAYS: [(&str, fn()); 2] = [("flag", refuse_direct), ("read", refuse_to_read_direct)];
    let Some(way) = std::env::var_os("LANE_TEST_DIRECT") else {
        for (name, _) in WAYS {
            let mut child = std::process::Command::new(std::env::current_exe().unwrap());
            child.args([
                "--exact",
                "without_direct_io_files_are_buffered",
                "--nocapture",
                "--test-threads=1",
            ]);
            let output = child.env("LANE_TEST_DIRECT", name).output().unwrap();
            assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        }
        return;
    };
    let (_, refuse) = WAYS.into_iter().find(|(name, _)| way == *name).unwrap();
    std::thread::spawn(move || {
        refuse();
        for driver in [DriverKind::Ring, DriverKind::Threads] {
            let path = scratch(&format!("direct-{}", way.to_string_lossy()));
            lane::block_on_with(Options { driver, ..Default::default() }, async {
                let how = Open { create_bytes: Some(1 << 16), ..Default::default() };
                assert_eq!(how.direct, Direct::Auto, "what is opened without saying how");
                let file = File::open(&path, &how).await.unwrap();
                assert!(!file.is_direct());
                // At any place and length, which direct I/O would refuse.
                let data: Vec<u8> = (0..5000u32).map(|n| n as u8).collect();
                file.write_at(777, &Segments::new(&data), true).await.unwrap();
                file.sync_data().await.unwrap();
                let mut back = vec![0; 5000];
                file.read_at(777, &SegmentsMut::new(&mut back)).await.unwrap();
                assert!(back == data);
                drop(file);
                let how = Open { direct: Direct::Auto, ..Default::default() };
                assert!(!File::open(&path, &how).await.unwrap().is_direct(), "a file with data too");
                let must = Open { direct: Direct::Must, ..Default::default() };
                let refused = File::open(&path, &must).await.err().unwrap();
                assert_eq!(refused.kind(), std::io::ErrorKind::Unsupported, "{refused}");
                assert!(refused.to_string().contains("does not take direct I/O"), "{refused}");
            });
            std::fs::remove_file(&path).unwrap();
        }
    })
    .join()
    .unwrap();
}

/// Takes away the right to pin memory without a limit, and sets the limit.
fn limit_memory_to_pin(bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: 8 << 20 };
    let header = [0x2008_0522u32, 0]; // _LINUX_CAPABILITY_VERSION_3, this thread
    let none = [0u32; 6];
    // SAFETY: valid structures; the capabilities are those of this thread, the limit is that of this process.
    unsafe {
        assert_eq!(libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit), 0);
        assert_eq!(libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()), 0);
    }
}

/// What a lane has in use that may pin so much, after a write and a read; and whether its file is direct.
fn in_use_with(bytes: u64) -> (lane::InUse, bool) {
    std::thread::spawn(move || {
        limit_memory_to_pin(bytes);
        let path = scratch(&format!("memlock-{bytes}"));
        lane::block_on_with(Options { driver: DriverKind::Ring, ..Default::default() }, async {
            let how = Open { create_bytes: Some(8192), ..Default::default() };
            let file = File::open(&path, &how).await.unwrap();
            std::fs::remove_file(&path).unwrap();
            let mut place = Buffer::for_overwrite(8192);
            place.fill(7);
            file.write_at(0, &Segments::new(&place), true).await.unwrap();
            place.fill(0);
            file.read_at(0, &SegmentsMut::new(&mut place)).await.unwrap();
            assert!(place.iter().all(|b| *b == 7));
            (lane::in_use(), file.is_direct())
        })
    })
    .join()
    .unwrap()
}

#[test]
fn without_memory_to_pin_buffers_are_plain() {
    if std::env::var_os("LANE_TEST_MEMLOCK").is_none() {
        let output = in_child("without_memory_to_pin_buffers_are_plain", "LANE_TEST_MEMLOCK");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        eprint!("{}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    // Enough for the ring itself, which newer kernels count too, and not for the smallest piece of buffers.
    // What a process pinned that ended a moment ago counts until the kernel has cleaned up, and nothing says when.
    let (mut little, mut direct) = in_use_with(512 << 10);
    for _ in 0..100 {
        if little.engine == "io_uring" {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
        (little, direct) = in_use_with(512 << 10);
    }
    // Threads and the page cache have no use for registered buffers: with them the test shows nothing.
    if little.engine != "io_uring" || !direct {
        assert!(std::env::var_os("CI").is_none(), "SKIPPED in CI: {little:?}, direct: {direct}");
        return eprintln!("SKIPPED: {little:?}, direct: {direct}");
    }
    assert!(!little.registered);
    // None at all: plain buffers, or threads where the kernel counts the ring.
    let (none, direct) = in_use_with(0);
    assert!(!none.registered && direct && ["io_uring", "threads"].contains(&none.engine), "{none:?}");
    // It was the limit and nothing else.
    let (enough, direct) = in_use_with(4 << 20);
    assert_eq!((enough.engine, enough.registered, direct), ("io_uring", true, true));
}

#[test]
fn an_operation_dropped_under_way_aborts() {
    if std::env::var_os("LANE_TEST_DROP").is_none() {
        let output = in_child("an_operation_dropped_under_way_aborts", "LANE_TEST_DROP");
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("dropped while it was under way"));
        return;
    }
    let path = scratch("drop");
    lane::block_on(async {
        let file = File::open(&path, &Open { create_bytes: Some(8192), ..Default::default() }).await.unwrap();
        std::fs::remove_file(&path).unwrap();
        let mut place = Buffer::zeroed(8192);
        let place = SegmentsMut::new(&mut place);
        let mut reading = Box::pin(file.read_at(0, &place));
        std::future::poll_fn(|cx| {
            assert!(reading.as_mut().poll(cx).is_pending());
            std::task::Poll::Ready(())
        })
        .await;
        drop(reading);
    });
}

/// What the kernel does not take at once waits for the next call: also while the lane waits for a socket itself, where
/// nobody would make one.
#[test]
fn operations_that_the_kernel_refuses_at_first_are_not_forgotten() {
    for error in [libc::EAGAIN, libc::EBUSY] {
        let path = scratch(&format!("refused{error}"));
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            lane::block_on_with(Options { driver: DriverKind::Ring, ..Default::default() }, async {
                let how = Open { create_bytes: Some(8192), ..Default::default() };
                let file = Rc::new(File::open(&path, &how).await.unwrap());
                std::fs::remove_file(&path).unwrap();
                if lane::in_use().engine != "io_uring" {
                    assert!(std::env::var_os("CI").is_none(), "SKIPPED in CI: no io_uring");
                    return eprintln!("SKIPPED: no io_uring");
                }
                // One operation at a time: the lane becomes calm, and waits for sockets itself.
                for _ in 0..100 {
                    file.sync_data().await.unwrap();
                }
                let (near, far) = Stream::pair().unwrap();
                let waiting = lane::spawn(async move {
                    let mut byte = [0; 1];
                    near.recv_all(&SegmentsMut::new(&mut byte)).await.unwrap();
                    byte
                });
                lane::yield_now().await;
                refuse_calls_that_do_not_wait(error);
                for _ in 0..20 {
                    file.sync_data().await.unwrap();
                }
                // More at once than the queue has room for.
                let many: Vec<_> = (0..600)
                    .map(|_| {
                        let file = Rc::clone(&file);
                        lane::spawn(async move { file.sync_data().await })
                    })
                    .collect();
                for one in many {
                    one.await.unwrap();
                }
                far.send_all(&Segments::new(&[7])).await.unwrap();
                assert_eq!(waiting.await, [7]);
            });
            tell.send(()).unwrap();
        });
        let ended = told.recv_timeout(std::time::Duration::from_secs(120));
        assert!(ended.is_ok(), "error {error}: an operation never came to the kernel, or it failed");
    }
}
