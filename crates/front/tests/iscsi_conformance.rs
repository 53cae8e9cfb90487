//! The whole of libiscsi's conformance suite against our target and, where tgt is installed, against tgt beside it.
//! Takes a minute: `./test conformance`, which sets KAGAMI_CONFORMANCE.
#![allow(clippy::unwrap_used)] // a test may

#[path = "common/target.rs"]
mod target;

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use block::{Disk, MemoryDisk, Sector};
use front::iscsi::{Options, Portal};
use lane::net::Listener;
use target::{GROUP, open_to_all};

const DISK: &str = "iqn.2024-01.kagami:disk";
const MIBIBYTES: u64 = 100;
/// Tests of the program, and how many of them must pass.
const TESTS: usize = 230;
const PASSED_MIN: usize = 215;
/// The same with one connection, where those that need two initiators are skipped.
const PASSED_ALONE_MIN: usize = 211;
/// What may fail, and docs/iscsi.md says why.
const LAWFUL: [&str; 5] = [
    "SCSI.Reserve6.LUNReset",
    "SCSI.ModeSense6.Residuals",
    "SCSI.WriteSame10.UnmapUntilEnd",
    "SCSI.Sanitize.Reset",
    "SCSI.GetLBAStatus.UnmapSingle",
];

#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Verdict {
    Pass,
    Fail,
    Skip,
    /// The program ended or hung before it said anything.
    None,
}

fn has(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).exists()))
}

/// Names of all tests, each once: FAMILY.SUITE to its tests.
fn listed() -> BTreeMap<String, Vec<String>> {
    let out = Command::new("iscsi-test-cu").arg("--list").output().unwrap();
    let mut suites: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in String::from_utf8_lossy(&out.stdout).lines().map(str::trim) {
        let parts: Vec<&str> = line.split('.').collect();
        if let ["SCSI" | "iSCSI", _, test] = parts[..] {
            suites.entry(line.rsplit_once('.').unwrap().0.into()).or_default().push(test.into());
        }
    }
    suites
}

/// What the program's text says of each test. A skipped test it calls passed, and lines with `[FAILED]` are part of
/// tests in which a command has to fail: the verdict is the word at the beginning of a line.
fn verdicts(text: &str) -> BTreeMap<String, Verdict> {
    let mut found = BTreeMap::new();
    for part in text.split("  Test: ").skip(1) {
        let Some((name, body)) = part.split_once(" ...") else { continue };
        let said = body.lines().find_map(|line| match line.trim_start() {
            line if line.starts_with("passed") => Some(Verdict::Pass),
            line if line.starts_with("FAILED") => Some(Verdict::Fail),
            _ => None,
        });
        let verdict = match said {
            Some(Verdict::Pass) if body.contains("[SKIPPED]") => Verdict::Skip,
            said => said.unwrap_or(Verdict::None),
        };
        found.insert(name.to_owned(), verdict);
    }
    found
}

/// Runs every suite, each in a process of its own and after `clean`.
async fn run_all(urls: &[String], clean: impl AsyncFn()) -> BTreeMap<String, Verdict> {
    let mut all = BTreeMap::new();
    for (suite, tests) in listed() {
        clean().await;
        let mut command = Command::new("timeout");
        command.args(["60", "iscsi-test-cu", "--dataloss", "--allow-sanitize", "-t", &suite]).args(urls);
        let out = lane::offload(move || command.stdin(Stdio::null()).output()).await.unwrap();
        let said = verdicts(&String::from_utf8_lossy(&out.stdout));
        for test in tests {
            let verdict = said.get(&test).copied().unwrap_or(Verdict::None);
            all.insert(format!("{suite}.{test}"), verdict);
        }
    }
    all
}

fn count(all: &BTreeMap<String, Verdict>, verdict: Verdict) -> usize {
    all.values().filter(|v| **v == verdict).count()
}

/// tgtd with one LUN and two portals.
struct Tgt(Child);

impl Tgt {
    fn start(file: &str, port: u16) -> (Self, Vec<String>) {
        let control = (port % 1000).to_string();
        let portal = format!("portal=127.0.0.1:{port}");
        let tgtd = Command::new("tgtd")
            .args(["-f", "-C", &control, "--iscsi", &portal])
            .stderr(Stdio::null())
            .spawn();
        let tgt = Self(tgtd.unwrap());
        let begun = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(20), "tgtd does not listen");
            std::thread::sleep(Duration::from_millis(50));
        }
        let second = format!("portal=127.0.0.1:{}", port + 1);
        for words in [
            format!("--op new --mode target --tid 1 -T {DISK}"),
            format!("--op new --mode logicalunit --tid 1 --lun 1 --bstype rdwr -b {file}"),
            "--op update --mode logicalunit --tid 1 --lun 1 --params thin_provisioning=1".into(),
            format!("--op new --mode portal --param {second}"),
            "--op bind --mode target --tid 1 -I ALL".into(),
        ] {
            let out = Command::new("tgtadm")
                .args(["-C", &control, "--lld", "iscsi"])
                .args(words.split(' '))
                .output();
            let out = out.unwrap();
            assert!(out.status.success(), "{words}: {}", String::from_utf8_lossy(&out.stderr));
        }
        let url = |port| format!("iscsi://127.0.0.1:{port}/{DISK}/1");
        (tgt, vec![url(port), url(port + 1)])
    }
}

impl Drop for Tgt {
    fn drop(&mut self) {
        let _ = self.0.kill(); // it may have ended
        let _ = self.0.wait();
    }
}

/// Our target by so many portals; with two of them the program plays two initiators in some tests.
async fn ours(portals: usize) -> BTreeMap<String, Verdict> {
    let disk = Rc::new(MemoryDisk::new(MIBIBYTES << 11));
    let server = open_to_all(DISK, Rc::clone(&disk), None, Options::default());
    let portal = || {
        let listener = Listener::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_address().to_owned();
        server.listen(Portal { listener, group: GROUP, announce: None });
        format!("iscsi://{address}/{DISK}/1")
    };
    let urls: Vec<String> = (0..portals).map(|_| portal()).collect();
    // No suite is judged by what another has left.
    let clean = async || disk.zero(Sector(0), MIBIBYTES << 11, true).await.unwrap();
    let all = run_all(&urls, clean).await;
    server.close().await;
    all
}

async fn tgts() -> Option<BTreeMap<String, Verdict>> {
    if !has("tgtd") || !has("tgtadm") {
        return None;
    }
    let file = format!("{}/tgt-{}.img", env!("CARGO_TARGET_TMPDIR"), std::process::id());
    std::fs::File::create(&file).unwrap().set_len(MIBIBYTES << 20).unwrap();
    let port = 33_000 + (std::process::id() % 500) as u16 * 2;
    let all = {
        let (_tgt, urls) = Tgt::start(&file, port);
        run_all(&urls, async || ()).await
    };
    std::fs::remove_file(file).unwrap();
    Some(all)
}

#[test]
fn conformance_of_libiscsi() {
    if std::env::var_os("KAGAMI_CONFORMANCE").is_none() {
        return; // a part of its own: it takes a minute
    }
    if !has("iscsi-test-cu") {
        assert!(std::env::var_os("CI").is_none(), "iscsi-test-cu is not installed, and CI skips nothing");
        return eprintln!("SKIPPED: iscsi-test-cu is not installed");
    }
    let (alone, ours, theirs) = lane::block_on(async { (ours(1).await, ours(2).await, tgts().await) });
    let column = |all: &BTreeMap<String, Verdict>| {
        [Verdict::Pass, Verdict::Fail, Verdict::Skip, Verdict::None].map(|v| count(all, v))
    };
    println!("iscsi-test-cu, {} tests: passed, failed, skipped, no verdict", ours.len());
    println!("  kagami, one connection  {:?}", column(&alone));
    println!("  kagami, two connections {:?}", column(&ours));
    match &theirs {
        Some(theirs) => println!("  tgt, two connections    {:?}", column(theirs)),
        None => println!("  tgt                     is not installed"),
    }
    for (test, verdict) in ours.iter().filter(|(_, verdict)| **verdict != Verdict::Pass) {
        let theirs = theirs.as_ref().and_then(|all| all.get(test));
        println!("  {verdict:?} {test} (tgt: {theirs:?})");
    }
    let bad: Vec<_> = (alone.iter().chain(&ours))
        .filter(|(test, verdict)| {
            matches!(verdict, Verdict::Fail | Verdict::None) && !LAWFUL.contains(&test.as_str())
        })
        .collect();
    assert!(bad.is_empty(), "{bad:?}");
    assert_eq!((alone.len(), ours.len()), (TESTS, TESTS));
    assert!(count(&ours, Verdict::Pass) >= PASSED_MIN);
    assert!(count(&alone, Verdict::Pass) >= PASSED_ALONE_MIN);
}
