//! Other people's initiators against our target, over real sockets: libiscsi's programs and QEMU.
//!
//! A program that is not installed is SKIPPED loudly; with the environment variable CI that is a failure.
#![allow(clippy::unwrap_used)] // a test may

#[path = "common/target.rs"]
mod target;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::rc::Rc;

use block::{Disk, MemoryDisk};
use front::iscsi::{Access, Chap, Credentials, NewTarget, Options, Portal, Server, Targets, Who};
use lane::net::Listener;
use target::{GROUP, luns, name, open_to_all, unit};

const DISK: &str = "iqn.2024-01.kagami:disk";
const OTHER: &str = "iqn.2024-01.kagami:other";

fn told(found: bool, what: &str) -> bool {
    if !found {
        assert!(std::env::var_os("CI").is_none(), "{what} is not installed, and CI skips nothing");
        eprintln!("SKIPPED: {what} is not installed");
    }
    found
}

fn has(program: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).exists()));
    told(found, program)
}

/// QEMU's iSCSI driver is a package of its own.
fn has_qemu() -> bool {
    let module = format!("/usr/lib/{}-linux-gnu/qemu/block-iscsi.so", std::env::consts::ARCH);
    has("qemu-io") && told(Path::new(&module).exists(), "qemu-block-extra")
}

/// Runs a program while the lane goes on serving.
async fn run(program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.arg("60").arg(program).args(arguments).stdin(Stdio::null());
    lane::offload(move || command.output()).await.unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Runs a program that must succeed; answers what it printed.
async fn good(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments).await;
    assert!(
        output.status.success(),
        "{program} {arguments:?} ended with {}\n{}",
        output.status,
        text(&output)
    );
    text(&output)
}

/// Runs a program that must fail; answers what it printed.
async fn bad(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments).await;
    assert!(!output.status.success(), "{program} {arguments:?} went well\n{}", text(&output));
    text(&output)
}

/// Opens a portal; answers `ADDRESS:PORT`.
fn portal(server: &Rc<Server>, address: &str, announce: Option<&str>) -> String {
    let listener = Listener::tcp(address.parse().unwrap()).unwrap();
    let port = listener.local_address().rsplit(':').next().unwrap().to_string();
    server.listen(Portal { listener, group: GROUP, announce: announce.map(Into::into) });
    format!("127.0.0.1:{port}")
}

fn scratch(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

async fn close(server: Rc<Server>) {
    server.close().await;
    assert!(server.sessions().is_empty());
    for target in server.targets().all() {
        assert_eq!(target.counts().in_flight(), 0);
    }
}

#[test]
fn an_initiator_sees_what_it_may_see() {
    if !has("iscsi-ls") || !has("iscsi-inq") {
        return;
    }
    let targets = Targets::new();
    let (one, two) = (unit(Rc::new(MemoryDisk::new(8192)), 1), unit(Rc::new(MemoryDisk::new(16384)), 2));
    let (first, second) = (name("iqn.2024-01.host:first"), name("iqn.2024-01.host:second"));
    let rule = |who: &front::iscsi::Name, luns| (Who::Named(who.clone()), Access { luns, chap: None });
    let access = vec![
        rule(&first, luns(DISK, 1, &[(0, &one), (3, &two)])),
        rule(&second, luns(DISK, 2, &[(0, &two)])),
    ];
    targets.add(NewTarget { name: name(DISK), alias: String::new(), groups: vec![GROUP], access }).unwrap();
    let access = vec![rule(&second, luns(OTHER, 3, &[(0, &one)]))];
    targets.add(NewTarget { name: name(OTHER), alias: String::new(), groups: vec![GROUP], access }).unwrap();
    lane::block_on(async {
        let server = Server::new(targets, Options::default());
        let at = portal(&server, "127.0.0.1:0", None);
        let announced = portal(&server, "0.0.0.0:0", Some("10.0.2.2:3260"));
        let url = format!("iscsi://{at}");
        let list = good("iscsi-ls", &["-i", first.as_str(), &url]).await;
        assert!(list.contains(DISK) && !list.contains(OTHER), "{list}");
        assert!(list.contains(&format!("{at},1")) && list.contains("10.0.2.2:3260,1"), "{list}");
        let list = good("iscsi-ls", &["-i", second.as_str(), &url]).await;
        assert!(list.contains(DISK) && list.contains(OTHER), "{list}");
        let list = run("iscsi-ls", &["-i", "iqn.2024-01.host:third", &url]).await;
        assert!(!text(&list).contains(DISK), "a stranger sees nothing");

        let lun = |number: u16| format!("iscsi://{announced}/{DISK}/{number}");
        good("iscsi-inq", &["-i", first.as_str(), &lun(3)]).await;
        good("iscsi-inq", &["-i", second.as_str(), &lun(0)]).await;
        bad("iscsi-inq", &["-i", "iqn.2024-01.host:third", &lun(0)]).await;
        let serial = |host| {
            let (url, host) = (lun(0), String::from(host));
            async move { good("iscsi-inq", &["-i", &host, "-e", "1", "-c", "128", &url]).await }
        };
        let (to_first, to_second) = (serial(first.as_str()).await, serial(second.as_str()).await);
        assert_ne!(to_first, to_second, "LUN 0 is another disk for each");
        close(server).await;
    });
}

#[test]
fn chap_lets_in_who_knows_the_secret() {
    if !has("iscsi-inq") {
        return;
    }
    let known = |user, secret: &str| Credentials::new(user, secret).unwrap();
    let chap = Chap::new(known("user", "secretsecret1"), Some(known("target", "secretsecret2"))).unwrap();
    lane::block_on(async {
        let disk = Rc::new(MemoryDisk::new(8192));
        let server = open_to_all(DISK, disk, Some(chap), Options::default());
        let at = portal(&server, "127.0.0.1:0", None);
        let url = |user: &str, more: &str| format!("iscsi://{user}{at}/{DISK}/1{more}");
        good("iscsi-inq", &[&url("user%secretsecret1@", "")]).await;
        let mutual = "?target_user=target&target_password=secretsecret2";
        good("iscsi-inq", &[&url("user%secretsecret1@", mutual)]).await;
        bad("iscsi-inq", &[&url("user%secretsecret2@", "")]).await;
        bad("iscsi-inq", &[&url("other%secretsecret1@", "")]).await;
        bad("iscsi-inq", &[&url("", "")]).await;
        let mutual = "?target_user=target&target_password=anothersecret";
        bad("iscsi-inq", &[&url("user%secretsecret1@", mutual)]).await;
        close(server).await;
    });
}

/// 8 MiB there and back: long writes by R2T, long reads in many PDUs; with and without digests.
#[test]
fn qemu_writes_and_reads() {
    if !has_qemu() || !has("qemu-img") {
        return;
    }
    let dir = scratch("iscsi-qemu");
    lane::block_on(async {
        let disk = Rc::new(MemoryDisk::new(16384));
        let server = open_to_all(DISK, Rc::clone(&disk), None, Options::default());
        let at = portal(&server, "127.0.0.1:0", None);
        for digest in ["none", "crc32c"] {
            let options = format!(
                "driver=iscsi,transport=tcp,portal={at},target={DISK},lun=1,header-digest={digest},\
                 initiator-name=iqn.2024-01.host:qemu"
            );
            let io = |commands: &'static [&'static str]| {
                let options = options.clone();
                async move {
                    let mut arguments = vec!["--image-opts"];
                    commands.iter().for_each(|command| arguments.extend(["-c", command]));
                    arguments.push(&options);
                    let printed = good("qemu-io", &arguments).await;
                    assert!(!printed.contains("failed"), "{printed}");
                }
            };
            io(&[
                "write -P 0x11 0 8M",
                "write -P 0x22 4k 512",
                "write -P 0x33 1M 3M",
                "write -z 2M 64k",
                "discard 3M 64k",
                "flush",
            ])
            .await;
            io(&[
                "read -P 0x11 0 4k",
                "read -P 0x22 4k 512",
                "read -P 0x11 4608 1043968",
                "read -P 0x33 1M 1M",
                "read -P 0 2M 64k",
                "read -P 0 3M 64k",
                "read -P 0x11 4M 4M",
                "aio_write -P 0x44 0 1M",
                "aio_write -P 0x55 1M 1M",
                "aio_write -P 0x66 2M 1M",
                "aio_flush",
                "read -P 0x44 0 1M",
                "read -P 0x66 2M 1M",
            ])
            .await;
        }
        let bytes = disk.to_bytes();
        assert!(bytes[..1 << 20].iter().all(|byte| *byte == 0x44));

        let noise: Vec<u8> = {
            let mut dice = fastrand::Rng::with_seed(7);
            (0..disk.shape().bytes()).map(|_| dice.u8(..)).collect()
        };
        let (there, back) = (dir.join("there"), dir.join("back"));
        std::fs::write(&there, &noise).unwrap();
        let url = format!("iscsi://{at}/{DISK}/1");
        let (there, back) = (there.display().to_string(), back.display().to_string());
        good("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &there, &url]).await;
        assert!(disk.to_bytes() == noise, "what was sent is on the disk");
        good("qemu-img", &["convert", "-f", "raw", "-O", "raw", &url, &back]).await;
        assert!(std::fs::read(back).unwrap() == noise, "what is on the disk comes back");
        close(server).await;
    });
    std::fs::remove_dir_all(dir).unwrap();
}

/// Suites of iscsi-test-cu that are about iSCSI itself; the others are run by `./test conformance`.
#[test]
fn libiscsi_finds_the_protocol_right() {
    if !has("iscsi-test-cu") {
        return;
    }
    lane::block_on(async {
        let disk = Rc::new(MemoryDisk::new(200 << 11));
        let server = open_to_all(DISK, disk, None, Options::default());
        let url = format!("iscsi://{}/{DISK}/1", portal(&server, "127.0.0.1:0", None));
        for suite in ["iSCSIcmdsn", "iSCSIdatasn", "iSCSIResiduals", "iSCSITMF"] {
            let suite = format!("iSCSI.{suite}");
            let printed = good("iscsi-test-cu", &["--dataloss", "-t", &suite, &url]).await;
            assert!(!printed.contains("SKIPPED") && printed.contains("passed"), "{printed}");
        }
        close(server).await;
    });
}
