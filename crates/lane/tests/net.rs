//! Connections on every driver.
#![allow(clippy::unwrap_used)] // a test

use std::cell::Cell;
use std::io::ErrorKind;
use std::rc::Rc;

use lane::net::{Listener, Stream};
use lane::{Buffer, DriverKind, Options, Segments, SegmentsMut};

fn everywhere(test: impl AsyncFn(&str)) {
    for (name, driver) in
        [("ring", DriverKind::Ring), ("threads", DriverKind::Threads), ("sim", DriverKind::Sim { seed: 3 })]
    {
        let options = Options { driver, ..Default::default() };
        lane::block_on_with(options, test(name));
    }
}

/// Sends back what comes, until the end.
async fn echo(stream: Rc<Stream>) {
    let mut buffer = Buffer::for_overwrite(10_000);
    loop {
        let count = stream.recv(&SegmentsMut::new(&mut buffer)).await.unwrap();
        if count == 0 {
            return;
        }
        stream.send_all(&Segments::new(&buffer[..count])).await.unwrap();
    }
}

async fn round_trip(stream: Stream) {
    let stream = Rc::new(stream);
    let data: Vec<u8> = (0..300_000u32).map(|n| (n % 253) as u8).collect();
    let sending = {
        let (stream, data) = (Rc::clone(&stream), data.clone());
        lane::spawn(async move {
            let (a, b) = data.split_at(777);
            stream.send_all(&Segments::gather([a, b])).await.unwrap();
        })
    };
    let mut back = vec![0; data.len()];
    let (head, tail) = back.split_at_mut(100_001);
    stream.recv_all(&SegmentsMut::scatter([head, tail])).await.unwrap();
    sending.await;
    assert!(back == data);
}

#[test]
fn bytes_go_round_over_unix_and_tcp() {
    everywhere(async |name| {
        let path = std::env::temp_dir().join(format!("lane-net-{}-{name}", std::process::id()));
        let unix = Listener::unix(&path, 0o600).unwrap();
        let tcp = Listener::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = tcp.local_address().to_owned();
        let other = Listener::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        assert_ne!(other.local_address(), address);
        let serving = lane::spawn(async move {
            for listener in [&unix, &tcp] {
                let stream = listener.accept().await.unwrap();
                assert!(!stream.peer().is_empty());
                echo(Rc::new(stream)).await;
            }
        });
        round_trip(Stream::connect_unix(&path).await.unwrap()).await;
        round_trip(Stream::connect_tcp(&address).await.unwrap()).await;
        serving.await;
        assert!(!path.exists(), "the socket file goes with its listener");
    });
}

#[test]
fn shutdown_ends_what_is_pending() {
    everywhere(async |name| {
        let (near, far) = Stream::pair().unwrap();
        let near = Rc::new(near);
        let receiving = {
            let near = Rc::clone(&near);
            lane::spawn(async move { near.recv(&SegmentsMut::new(&mut [0; 10])).await.unwrap() })
        };
        let sending = {
            let near = Rc::clone(&near);
            let much = vec![0; 8 << 20];
            lane::spawn(async move { near.send_all(&Segments::new(&much)).await.is_err() })
        };
        lane::sleep(std::time::Duration::from_millis(5)).await;
        near.shutdown();
        assert_eq!(receiving.await, 0, "{name}");
        assert!(sending.await, "{name}");
        drop(far);
    });
}

#[test]
fn closing_a_listener_ends_accept() {
    everywhere(async |name| {
        let path = std::env::temp_dir().join(format!("lane-close-{}-{name}", std::process::id()));
        for listener in
            [Listener::unix(&path, 0o600).unwrap(), Listener::tcp("127.0.0.1:0".parse().unwrap()).unwrap()]
        {
            let listener = Rc::new(listener);
            let accepting = {
                let listener = Rc::clone(&listener);
                lane::spawn(async move { listener.accept().await.err().unwrap().kind() })
            };
            lane::sleep(std::time::Duration::from_millis(5)).await;
            listener.close();
            assert_eq!(accepting.await, ErrorKind::ConnectionAborted, "{name}");
        }
        assert!(Stream::connect_unix(&path).await.is_err());
    });
}

#[test]
fn a_dead_socket_file_is_replaced_and_a_live_one_is_not() {
    let path = std::env::temp_dir().join(format!("lane-dead-{}", std::process::id()));
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    lane::block_on(async {
        let listener = Listener::unix(&path, 0o640).unwrap();
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        let second = Listener::unix(&path, 0o600).err().unwrap();
        assert_eq!(second.kind(), ErrorKind::AddrInUse);
        drop(listener);
        std::fs::write(&path, "a file").unwrap();
        assert!(Listener::unix(&path, 0o600).is_err(), "other people's files stay");
        std::fs::remove_file(&path).unwrap();
    });
}

#[test]
fn a_pending_receive_may_be_dropped() {
    everywhere(async |_| {
        let (near, far) = Stream::pair().unwrap();
        let mut bytes = [0; 4];
        {
            let place = SegmentsMut::new(&mut bytes);
            let mut pending = std::pin::pin!(near.recv(&place));
            std::future::poll_fn(|cx| {
                assert!(pending.as_mut().poll(cx).is_pending());
                std::task::Poll::Ready(())
            })
            .await;
            lane::yield_now().await;
        }
        far.send_all(&Segments::new(&[1, 2, 3, 4])).await.unwrap();
        near.recv_all(&SegmentsMut::new(&mut bytes)).await.unwrap();
        assert_eq!(bytes, [1, 2, 3, 4]);
    });
}

#[test]
fn a_lane_ends_with_connections_pending() {
    let served = Rc::new(Cell::new(0));
    for driver in [DriverKind::Ring, DriverKind::Threads] {
        let served = Rc::clone(&served);
        lane::block_on_with(Options { driver, ..Default::default() }, async move {
            let listener = Listener::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
            let address = listener.local_address().to_owned();
            drop(lane::spawn(async move {
                loop {
                    let stream = Rc::new(listener.accept().await.unwrap());
                    served.set(served.get() + 1);
                    drop(lane::spawn(echo(stream)));
                }
            }));
            let stream = Stream::connect_tcp(&address).await.unwrap();
            stream.send_all(&Segments::new(b"hello")).await.unwrap();
            stream.recv_all(&SegmentsMut::new(&mut [0; 5])).await.unwrap();
        });
    }
    assert_eq!(served.get(), 2);
}

/// One byte asks for `byte` times one byte back, read from a file that holds nothing but sevens.
async fn serve_bytes(stream: Rc<Stream>, file: Rc<lane::fs::File>) {
    let (mut asked, mut page) = ([0; 1], Buffer::for_overwrite(4096));
    while stream.recv(&SegmentsMut::new(&mut asked)).await.is_ok_and(|count| count > 0) {
        file.read_at(0, &SegmentsMut::new(&mut page)).await.unwrap();
        stream.send_all(&Segments::new(&page[..asked[0].into()])).await.unwrap();
    }
}

/// Requests one at a time make a lane wait for its sockets by itself, requests in numbers make it stop doing so: whatever
/// it does, nobody else may starve.
#[test]
fn a_calm_lane_forgets_nobody() {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;
    let path = std::env::temp_dir().join(format!("lane-calm-{}", std::process::id()));
    let sevens = path.with_extension("sevens");
    std::fs::write(&sevens, [7; 4096]).unwrap();
    for driver in [DriverKind::Ring, DriverKind::Threads] {
        lane::block_on_with(Options { driver, ..Default::default() }, async {
            let how = lane::fs::Open { direct: lane::fs::Direct::Never, ..Default::default() };
            let file = Rc::new(lane::fs::File::open(&sevens, &how).await.unwrap());
            let listener = Listener::unix(&path, 0o600).unwrap();
            let (near, idle) = Stream::pair().unwrap();
            drop(lane::spawn(serve_bytes(Rc::new(near), Rc::clone(&file))));
            drop(lane::spawn(async move {
                while let Ok(stream) = listener.accept().await {
                    drop(lane::spawn(serve_bytes(Rc::new(stream), Rc::clone(&file))));
                }
            }));
            let handle = lane::Handle::current();
            let path = path.clone();
            let (told, heard) = (handle.clone(), std::sync::mpsc::channel());
            let client = std::thread::spawn(move || {
                let ask = |stream: &mut UnixStream, bytes: u8| {
                    stream.write_all(&[bytes]).unwrap();
                    let mut answer = vec![0; bytes.into()];
                    stream.read_exact(&mut answer).unwrap();
                    assert!(answer.iter().all(|b| *b == 7));
                };
                let mut first = UnixStream::connect(&path).unwrap();
                for round in 0..4 {
                    (0..100).for_each(|_| ask(&mut first, 1));
                    // Another connection, another thread's job and a timer, each while the lane sleeps on its sockets.
                    ask(&mut UnixStream::connect(&path).unwrap(), 3);
                    let (sender, receiver) = std::sync::mpsc::channel();
                    drop(handle.run(move || async move {
                        lane::sleep(std::time::Duration::from_millis(2)).await;
                        sender.send(round).unwrap();
                    }));
                    assert_eq!(receiver.recv().unwrap(), round);
                    // In numbers, from many: more than are held.
                    let mut many: Vec<_> = (0..20).map(|_| UnixStream::connect(&path).unwrap()).collect();
                    many.iter_mut().for_each(|s| s.write_all(&[9]).unwrap());
                    many.iter_mut().for_each(|s| s.read_exact(&mut [0; 9]).unwrap());
                    (0..100).for_each(|n| ask(&mut many[n % 20], 2));
                }
                heard.0.send(()).unwrap();
                drop(told.run(|| async {}));
            });
            while heard.1.try_recv().is_err() {
                lane::sleep(std::time::Duration::from_millis(1)).await;
            }
            client.join().unwrap();
            // Who was silent all the time is answered still.
            idle.send_all(&Segments::new(&[5])).await.unwrap();
            let mut answer = [0; 5];
            idle.recv_all(&SegmentsMut::new(&mut answer)).await.unwrap();
            assert_eq!(answer, [7; 5]);
        });
    }
    std::fs::remove_file(&sevens).unwrap();
}

/// A lane that sleeps on its sockets hears the threads that work for it, also where no timer ever wakes it.
#[test]
fn a_calm_lane_hears_its_workers() {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;
    let path = std::env::temp_dir().join(format!("lane-workers-{}", std::process::id()));
    for driver in [DriverKind::Ring, DriverKind::Threads] {
        lane::block_on_with(Options { driver, ..Default::default() }, async {
            let listener = Listener::unix(&path, 0o600).unwrap();
            let path = path.clone();
            let client = std::thread::spawn(move || {
                let mut stream = UnixStream::connect(&path).unwrap();
                // A wake-up that is lost ends the test, it does not hang it.
                stream.set_read_timeout(Some(std::time::Duration::from_secs(30))).unwrap();
                for n in 0..200 {
                    stream.write_all(&[n]).unwrap();
                    stream.read_exact(&mut [0]).expect("the lane has heard its worker");
                }
            });
            let stream = Rc::new(listener.accept().await.unwrap());
            let mut asked = [0];
            // The next receive waits at its socket while the last answer is still being worked on.
            while stream.recv(&SegmentsMut::new(&mut asked)).await.unwrap() > 0 {
                let (stream, answer) = (Rc::clone(&stream), asked);
                drop(lane::spawn(async move {
                    lane::offload(|| std::thread::sleep(std::time::Duration::from_micros(300))).await;
                    stream.send_all(&Segments::new(&answer)).await.unwrap();
                }));
            }
            client.join().unwrap();
        });
    }
}
