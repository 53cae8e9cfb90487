//! Other people's NBD programs against our server and our client, over real sockets.
//!
//! A program that is not installed is SKIPPED loudly; with the environment variable CI that is a failure.
#![allow(clippy::unwrap_used)] // a test may

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::rc::Rc;
use std::time::Duration;

use block::decorate::{Decorated, Delay, Operation};
use block::{Disk, DiskError, Extents, Kind, MemoryDisk, Sector, Segments, SegmentsMut, conformance};
use common::certificates::certificates;
use common::changing::{Changing, FIVE};
use front::nbd::client::{self, Client};
use front::nbd::{Exports, Identity, NewExport, Options, Server, Tls, Trust, Wire};
use lane::net::{Listener, Stream};

/// Whether a program is installed.
fn has(program: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).exists()));
    told(found, program)
}

/// Whether a file is installed.
fn has_file(path: &str) -> bool {
    told(Path::new(path).exists(), path)
}

fn told(found: bool, what: &str) -> bool {
    if !found {
        assert!(std::env::var_os("CI").is_none(), "{what} is not installed, and CI skips nothing");
        eprintln!("SKIPPED: {what} is not installed");
    }
    found
}

/// A directory of this test alone.
fn scratch(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// Runs a program while the lane goes on serving.
async fn run(program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.arg("60").arg(program).args(arguments).stdin(Stdio::null());
    let name = format!("{program} {}", arguments.join(" "));
    let output = lane::offload(move || command.output()).await.unwrap();
    if !output.status.success() {
        eprintln!("{name}\n{}", String::from_utf8_lossy(&output.stderr));
        eprintln!("{}", String::from_utf8_lossy(&output.stdout));
    }
    output
}

/// Runs a program that must succeed; answers what it printed.
async fn good(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments).await;
    assert!(output.status.success(), "{program} {arguments:?} ended with {}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A server on a Unix socket and on TCP.
struct Served {
    server: Rc<Server>,
    dir: PathBuf,
    port: String,
}

impl Served {
    fn new(name: &str, exports: Vec<NewExport>, tls: Tls) -> Self {
        let dir = scratch(name);
        let list = Exports::new();
        for export in exports {
            list.add(export).unwrap();
        }
        let server = Server::new(list, Options::default());
        server.listen(Listener::unix(dir.join("sock"), 0o600).unwrap(), tls.clone());
        let tcp = Listener::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let port = tcp.local_address().rsplit(':').next().unwrap().to_string();
        server.listen(tcp, tls);
        Self { server, dir, port }
    }

    fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    /// As libnbd and QEMU write it.
    fn unix(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.path("sock"))
    }

    fn tcp(&self, export: &str) -> String {
        format!("nbd://127.0.0.1:{}/{export}", self.port)
    }

    async fn close(self) {
        self.server.close().await;
        assert!(!self.dir.join("sock").exists(), "the socket file is gone");
        for export in self.server.exports().list() {
            assert_eq!((export.connections, export.in_flight), (0, 0));
        }
        std::fs::remove_dir_all(&self.dir).unwrap();
    }
}

fn noise(bytes: usize, mut seed: u64) -> Vec<u8> {
    let next = |_| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) as u8
    };
    (0..bytes).map(next).collect()
}

/// Data, zeroes that were written, and holes.
fn mixed() -> Vec<u8> {
    let mut bytes = vec![0; 24 << 20];
    for (at, length) in [(0, 700), (1 << 20, 3 << 20), (9_000_000, 123_456), (23 << 20, 1 << 20)] {
        bytes[at..at + length].copy_from_slice(&noise(length, at as u64 + 1));
    }
    bytes
}

#[test]
fn qemu_io_reads_and_writes() {
    if !has("qemu-io") {
        return;
    }
    lane::block_on(async {
        let disk = Rc::new(MemoryDisk::new(65536));
        let served = Served::new("qemu-io", vec![NewExport::new("c", Rc::clone(&disk) as _)], Tls::Off);
        for (n, uri) in [served.unix("c"), served.tcp("c")].iter().enumerate() {
            let pattern = 0x41 + n as u8;
            let write = format!("write -P {pattern} 1000 70000");
            let check = format!("read -P {pattern} 1000 70000");
            let fua = format!("write -f -P {pattern} 1M 4k");
            let out = good(
                "qemu-io",
                &[
                    "-f",
                    "raw",
                    "-t",
                    "none",
                    "-c",
                    &write,
                    "-c",
                    "flush",
                    "-c",
                    &check,
                    "-c",
                    &fua,
                    "-c",
                    "write -z -u 8k 16k",
                    "-c",
                    "read -P 0 8k 16k",
                    "-c",
                    "write -z 40k 1000",
                    "-c",
                    "read -P 0 40k 1000",
                    "-c",
                    "discard 64k 64k",
                    "-c",
                    "aio_write -P 7 2M 1M",
                    "-c",
                    "aio_write -P 8 3M 1M",
                    "-c",
                    "aio_flush",
                    "-c",
                    "read -P 8 3M 1M",
                    "-c",
                    "map",
                    uri,
                ],
            )
            .await;
            assert!(!out.contains("Pattern verification failed"), "{out}");
            let found = disk.to_bytes();
            assert!(found[1000..8192].iter().all(|b| *b == pattern));
            assert!(found[8192..24576].iter().all(|b| *b == 0));
            assert!(found[2 << 20..3 << 20].iter().all(|b| *b == 7));
        }
        served.close().await;
    });
}

#[test]
fn qemu_io_is_refused_on_a_read_only_export() {
    if !has("qemu-io") {
        return;
    }
    lane::block_on(async {
        let new = NewExport { read_only: true, ..NewExport::new("c", Rc::new(MemoryDisk::new(64))) };
        let served = Served::new("qemu-io-ro", vec![new], Tls::Off);
        assert!(
            !run("qemu-io", &["-f", "raw", "-c", "write 0 512", &served.unix("c")]).await.status.success()
        );
        good("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0 0 32k", &served.unix("c")]).await;
        assert!(!run("qemu-io", &["-r", "-f", "raw", &served.unix("nothing")]).await.status.success());
        served.close().await;
    });
}

#[test]
fn qemu_img_converts_and_compares() {
    if !has("qemu-img") {
        return;
    }
    lane::block_on(async {
        let disk = Rc::new(MemoryDisk::new((24 << 20) / 512));
        let served = Served::new("qemu-img", vec![NewExport::new("c", Rc::clone(&disk) as _)], Tls::Off);
        let (raw, back, uri) = (served.path("raw"), served.path("back.qcow2"), served.unix("c"));
        std::fs::write(&raw, mixed()).unwrap();
        good("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", "-W", &raw, &uri]).await;
        assert!(disk.to_bytes() == mixed());
        good("qemu-img", &["compare", "-f", "raw", "-F", "raw", &raw, &uri]).await;
        good("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &served.tcp("c"), &back]).await;
        good("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &raw, &back]).await;
        let map = good("qemu-img", &["map", "--output=json", "-f", "raw", &uri]).await;
        assert!(map.contains("\"zero\": true") && map.contains("\"data\": true"), "{map}");
        disk.write(Sector(5), &Segments::new(&[1; 512]), block::Safe::AtNextFlush).await.unwrap();
        assert_eq!(
            run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &raw, &uri]).await.status.code(),
            Some(1)
        );
        served.close().await;
    });
}

#[test]
fn nbdinfo_shows_exports_and_maps() {
    if !has("nbdinfo") {
        return;
    }
    lane::block_on(async {
        let disk = Changing(MemoryDisk::new(4096));
        disk.write(Sector(64), &Segments::new(&[1; 65536]), block::Safe::AtNextFlush).await.unwrap();
        let new = NewExport {
            description: "the data disk".into(),
            changed: vec![("mon".into(), FIVE)],
            ..NewExport::new("d", Rc::new(disk))
        };
        let also = NewExport { read_only: true, ..NewExport::new("c", Rc::new(MemoryDisk::new(8))) };
        let served = Served::new("nbdinfo", vec![new, also], Tls::Off);
        let uri = served.unix("d");
        let info = good("nbdinfo", &[&uri]).await;
        for wanted in [
            "export=\"d\"",
            "the data disk",
            "export-size: 2097152",
            "base:allocation",
            "kagami:changed:mon",
            "can_multi_conn: true",
            "can_fua: true",
            "can_df: true",
            "is_read_only: false",
            "block_size_minimum: 1",
            "block_size_preferred: 4096",
            "block_size_maximum: 33554432",
        ] {
            assert!(info.contains(wanted), "{wanted:?} is missing in\n{info}");
        }
        let list = good("nbdinfo", &["--list", "--json", &served.tcp("")]).await;
        assert!(
            list.contains("\"c\"") && list.contains("\"d\"") && list.contains("\"is_read_only\": true"),
            "{list}"
        );
        let lines = |out: String| -> Vec<Vec<String>> {
            out.lines().map(|l| l.split_whitespace().map(String::from).collect()).collect()
        };
        let map = lines(good("nbdinfo", &["--map", &uri]).await);
        let row = |cells: [&str; 4]| cells.map(String::from).to_vec();
        assert_eq!(map[0], row(["0", "32768", "3", "hole,zero"]));
        assert_eq!(map[1], row(["32768", "65536", "0", "data"]));
        let changed = lines(good("nbdinfo", &["--map=kagami:changed:mon", &uri]).await);
        assert_eq!(
            (&changed[0][..3], &changed[1][..3]),
            (&row(["0", "1048576", "0", ""])[..3], &row(["1048576", "1048576", "1", ""])[..3],)
        );
        served.close().await;
    });
}

#[test]
fn nbdcopy_copies_both_ways_over_many_connections() {
    if !has("nbdcopy") {
        return;
    }
    lane::block_on(async {
        let disk = Rc::new(MemoryDisk::new((24 << 20) / 512));
        let served = Served::new("nbdcopy", vec![NewExport::new("c", Rc::clone(&disk) as _)], Tls::Off);
        let (raw, back) = (served.path("raw"), served.path("back"));
        std::fs::write(&raw, mixed()).unwrap();
        good("nbdcopy", &["--connections=4", "--requests=16", "--flush", &raw, &served.unix("c")]).await;
        assert!(disk.to_bytes() == mixed());
        good("nbdcopy", &["--connections=4", "--requests=16", &served.tcp("c"), &back]).await;
        assert!(std::fs::read(&back).unwrap() == mixed());
        served.close().await;
    });
}

/// Asserts in Python: what libnbd sees.
const SCRIPT: &str = r#"
import nbd, errno
def connect(structured=True, contexts=()):
    h = nbd.NBD()
    h.set_strict_mode(0)            # wrong requests are sent as they are
    h.set_request_structured_replies(structured)
    for c in contexts: h.add_meta_context(c)
    h.connect_uri(URI)
    return h
def fails(call, number):
    try: call()
    except nbd.Error as e:
        assert e.errnum == number, (e, number)
        return
    raise AssertionError("succeeded")
h = connect(contexts=["base:allocation"])
size = h.get_size()
assert h.can_multi_conn() and h.can_flush() and h.can_fua() and h.can_zero() and h.can_trim() and h.can_df()
assert h.can_cache() and h.can_fast_zero() == 1 and not h.is_rotational()
assert h.get_structured_replies_negotiated()
g = connect(structured=False)
# Odd bytes, written on one connection, seen on another, flushed on a third.
for at, n in [(1, 3), (511, 2), (5000, 9999), (size - 1, 1)]:
    data = bytes((i * 7 + at) % 256 for i in range(n))
    h.pwrite(data, at)
    assert g.pread(n, at) == data
    assert h.pread(n, at) == data
connect().flush()
h.pwrite(b"x" * 4096, 0, nbd.CMD_FLAG_FUA)
h.zero(1000, 1000, nbd.CMD_FLAG_NO_HOLE)
assert g.pread(1002, 999) == b"x" + bytes(1000) + b"x"
h.zero(8192, 8192, nbd.CMD_FLAG_FAST_ZERO)
fails(lambda: h.zero(100, 8193, nbd.CMD_FLAG_FAST_ZERO), errno.ENOTSUP)
h.trim(65536, 4096, nbd.CMD_FLAG_FUA)
h.cache(size, 0)
fails(lambda: h.pread(1, size), errno.EINVAL)
fails(lambda: h.pwrite(b"1", size), errno.ENOSPC)
fails(lambda: h.zero(2, size - 1), errno.ENOSPC)
fails(lambda: h.trim(2, size - 1), errno.EINVAL)
fails(lambda: h.cache(2, size - 1), errno.EINVAL)
fails(lambda: g.pwrite(b"1", size), errno.ENOSPC)
assert h.pread(size, 0) == g.pread(size, 0)
# Chunks of a sparse read, and in one piece with DF.
h.zero(1 << 20, 1 << 20)
h.pwrite(b"z" * 4096, (1 << 20) + 65536)
seen = []
def chunk(buf, offset, status, err): seen.append((offset, len(buf), status)); return 0
h.pread_structured(1 << 20, 1 << 20, chunk)
assert sum(n for _, n, _ in seen) == 1 << 20 and any(s == nbd.READ_HOLE for _, _, s in seen), seen
seen.clear()
assert h.pread_structured(1 << 20, 1 << 20, chunk, nbd.CMD_FLAG_DF).count(b"z") == 4096
assert seen == [(1 << 20, 1 << 20, nbd.READ_DATA)], seen
# Extents, and only one of them.
extents = []
def extent(context, offset, entries, err): extents.extend(entries); return 0
h.block_status(1 << 20, 1 << 20, extent)
assert sum(extents[0::2]) == 1 << 20 and extents[1] & 2 and 0 in extents[1::2], extents
extents.clear()
h.block_status(1 << 20, 1 << 20, extent, nbd.CMD_FLAG_REQ_ONE)
assert len(extents) == 2, extents
extents.clear()
h.block_status(1000, (1 << 20) + 60000 + 77, extent)
assert sum(extents[0::2]) <= 1000, extents
# Many at once.
cookies = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([i]) * 4096), 4096 * i) for i in range(200)]
while h.aio_in_flight(): h.poll(-1)
assert all(h.aio_command_completed(c) for c in cookies)
for i in range(200): assert g.pread(4096, 4096 * i) == bytes([i]) * 4096
h.shutdown(); g.shutdown()
"#;

#[test]
fn libnbd_sees_what_the_protocol_says() {
    if !has("nbdsh") || !has_file("/usr/lib/python3/dist-packages/nbd.py") {
        return;
    }
    lane::block_on(async {
        let disk = Rc::new(MemoryDisk::new((4 << 20) / 512));
        let new = NewExport { fast_zero: true, ..NewExport::new("c", Rc::clone(&disk) as _) };
        let served = Served::new("nbdsh", vec![new], Tls::Off);
        for uri in [served.unix("c"), served.tcp("c")] {
            let script = format!("URI = {uri:?}\n{SCRIPT}");
            // Debian's module is for Debian's Python, whatever else comes first in PATH.
            good("env", &["PATH=/usr/bin:/bin", "nbdsh", "-c", &script]).await;
        }
        served.close().await;
    });
}

#[test]
fn fio_verifies_what_it_wrote() {
    if !has("fio") {
        return;
    }
    lane::block_on(async {
        // Answers in another order than requests.
        let delay = Delay(Box::new({
            let count = std::cell::Cell::new(0u64);
            move |operation| {
                count.set(count.get() + 1);
                Duration::from_micros(if operation == Operation::Flush { 500 } else { count.get() % 7 * 30 })
            }
        }));
        let disk = Decorated::new(Rc::new(MemoryDisk::new((16 << 20) / 512)), delay);
        let served = Served::new("fio", vec![NewExport::new("c", disk as _)], Tls::Off);
        for (uri, size) in [(served.unix("c"), "4k-64k"), (served.tcp("c"), "512-8k")] {
            let (uri, size) = (format!("--uri={uri}"), format!("--bsrange={size}"));
            let out = good(
                "fio",
                &[
                    "--name=v",
                    "--ioengine=nbd",
                    &uri,
                    "--rw=randwrite",
                    &size,
                    "--size=16m",
                    "--iodepth=32",
                    "--verify=crc32c",
                    "--verify_fatal=1",
                    "--verify_state_save=0",
                    "--fsync=64",
                    "--randseed=5",
                    "--output-format=terse",
                ],
            )
            .await;
            assert!(!out.contains("verify:"), "{out}");
        }
        let done = served.server.exports().list()[0].tallies.clone();
        assert!(done.iter().all(|(_, tally)| tally.failed == 0), "{done:?}");
        served.close().await;
    });
}

#[test]
fn a_client_killed_in_the_middle_leaves_nothing_behind() {
    if !has("fio") {
        return;
    }
    lane::block_on(async {
        let disk = Rc::new(MemoryDisk::new((16 << 20) / 512));
        let served = Served::new("killed", vec![NewExport::new("c", disk as _)], Tls::Off);
        for uri in [served.unix("c"), served.tcp("c")] {
            let reads = || served.server.exports().list()[0].tallies[0].1.done;
            let before = reads();
            let fio = Command::new("fio")
                .args(["--name=k", "--ioengine=nbd", "--rw=randrw", "--bs=64k", "--iodepth=16", "--size=16m"])
                .args(["--time_based", "--runtime=30", "--thread", &format!("--uri={uri}")])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            let fio = Foreign(fio);
            for _ in 0..1000 {
                if reads() > before + 50 {
                    break;
                }
                lane::sleep(Duration::from_millis(20)).await;
            }
            assert!(reads() > before + 50, "it has begun");
            drop(fio);
            for _ in 0..100 {
                if served.server.connections().is_empty() {
                    break;
                }
                lane::sleep(Duration::from_millis(20)).await;
            }
            assert!(served.server.connections().is_empty(), "the connection is noticed to be gone");
        }
        served.close().await;
    });
}

/// A foreign server, killed at the end.
struct Foreign(std::process::Child);

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn connect(socket: &str, export: &str) -> Rc<Client> {
    let options = client::Options { export: export.into(), ..client::Options::default() };
    for _ in 0..200 {
        if let Ok(stream) = Stream::connect_unix(socket).await {
            return Client::connect(Wire::Socket(stream), &options).await.unwrap();
        }
        lane::sleep(Duration::from_millis(50)).await;
    }
    panic!("the server does not come up");
}

#[test]
fn our_client_takes_qemu_nbd_for_a_disk() {
    if !has("qemu-nbd") {
        return;
    }
    let dir = scratch("our-client-qemu");
    let (image, socket) = (dir.join("image").display().to_string(), dir.join("s").display().to_string());
    std::fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let child = Command::new("qemu-nbd")
        .args(["-f", "raw", "-t", "-x", "c", "--discard=unmap", "-k", &socket, &image])
        .spawn()
        .unwrap();
    let _server = Foreign(child);
    lane::block_on(async {
        let client = connect(&socket, "c").await;
        assert_eq!(client.shape().sectors, (8 << 20) / 512);
        conformance::check(Rc::clone(&client) as Rc<dyn Disk>, 11).await;
        client.zero(Sector(0), 16384, true).await.unwrap();
        client.write(Sector(2048), &Segments::new(&[5; 1 << 20]), block::Safe::OnReturn).await.unwrap();
        let mut extents = Extents::with_limit(100);
        client.status(Sector(0), 16384, None, &mut extents).await.unwrap();
        assert_eq!(extents.iter().map(|e| e.count).sum::<u64>(), 16384);
        let data: u64 = extents.iter().filter(|e| e.kind == Kind::Data).map(|e| e.count).sum();
        assert_eq!(data, 2048, "{extents:?}");
        client.disconnect().await;
        // Killed under us: everything after is "gone", nothing hangs.
        let client = connect(&socket, "c").await;
        drop(_server);
        let mut back = [0; 512];
        assert!(matches!(client.read(Sector(0), &SegmentsMut::new(&mut back)).await, Err(DiskError::Gone)));
    });
    assert!(std::fs::read(&image).unwrap()[1 << 20..2 << 20].iter().all(|b| *b == 5));
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn our_client_takes_nbdkit_for_a_disk() {
    if !has("nbdkit") {
        return;
    }
    let dir = scratch("our-client-nbdkit");
    let socket = dir.join("s").display().to_string();
    let child = Command::new("nbdkit").args(["-f", "-U", &socket, "memory", "4M"]).spawn().unwrap();
    let server = Foreign(child);
    lane::block_on(async {
        let client = connect(&socket, "").await;
        conformance::check(Rc::clone(&client) as Rc<dyn Disk>, 12).await;
        client.disconnect().await;
    });
    drop(server);
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn foreign_clients_come_by_tls() {
    if !has("nbdinfo") || !has("qemu-img") {
        return;
    }
    lane::block_on(async {
        let made = certificates();
        let identity = Identity::from_pem(
            made.server.0.as_bytes(),
            made.server.1.as_bytes(),
            Some(made.authority.as_bytes()),
        )
        .unwrap();
        let disk = Rc::new(MemoryDisk::from_bytes(&mixed()));
        let new = NewExport::new("c", Rc::clone(&disk) as _);
        let served = Served::new("tls", vec![new], Tls::Required(identity));
        let pki = served.dir.join("pki");
        std::fs::create_dir(&pki).unwrap();
        for (name, pem) in [
            ("ca-cert.pem", &made.authority),
            ("client-cert.pem", &made.client.0),
            ("client-key.pem", &made.client.1),
        ] {
            std::fs::write(pki.join(name), pem).unwrap();
        }
        let pki = pki.display().to_string();
        let uri = format!("nbds://localhost:{}/c?tls-certificates={pki}", served.port);
        let info = good("nbdinfo", &[&uri]).await;
        assert!(info.contains("with TLS") || info.contains("TLS"), "{info}");
        assert!(!run("nbdinfo", &[&served.tcp("c")]).await.status.success(), "not without TLS");
        let (raw, back) = (served.path("raw"), served.path("back"));
        std::fs::write(&raw, mixed()).unwrap();
        if has("nbdcopy") {
            good("nbdcopy", &[&uri, &back]).await;
            assert!(std::fs::read(&back).unwrap() == mixed());
        }
        let object = format!("tls-creds-x509,id=t,endpoint=client,dir={pki}");
        let image = format!("driver=nbd,host=localhost,port={},export=c,tls-creds=t", served.port);
        let other = format!("driver=raw,file.filename={raw}");
        good("qemu-img", &["compare", "--object", &object, "--image-opts", &image, &other]).await;
        let own = Some((made.client.0.as_bytes(), made.client.1.as_bytes()));
        let tls = Some(Trust::from_pem(made.authority.as_bytes(), "127.0.0.1", own).unwrap());
        let options = client::Options { export: "c".into(), tls, ..client::Options::default() };
        let stream = Stream::connect_tcp(&format!("127.0.0.1:{}", served.port)).await.unwrap();
        let client = Client::connect(Wire::Socket(stream), &options).await.unwrap();
        conformance::check(Rc::clone(&client) as Rc<dyn Disk>, 13).await;
        client.disconnect().await;
        served.close().await;
    });
}
