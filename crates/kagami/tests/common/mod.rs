//! A home of a test: its own directory, its own daemon, and the program as a user calls it.
#![allow(dead_code, clippy::unwrap_used)] // each test program uses its part; a test fails by panicking

pub mod wire;
pub mod writer;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A directory with a home in it; stops the daemon and goes away with the test.
pub struct Place {
    dir: PathBuf,
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

impl Place {
    /// A new one.
    pub fn new(name: &str) -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("kagami-{name}-{}-{number}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        Self { dir }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The home in it.
    pub fn home(&self) -> PathBuf {
        self.dir.join("home")
    }

    /// The program, with this home.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kagami"));
        command.args(words).env("KAGAMI_HOME", self.home()).env("NO_COLOR", "1").stdin(Stdio::null());
        command.current_dir(&self.dir);
        command
    }

    /// Runs it.
    pub fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// Runs it; it must succeed. What it prints.
    pub fn ok(&self, words: &[&str]) -> String {
        let out = self.run(words);
        assert!(out.status.success(), "{words:?} ended with {}\n{}", out.status, both(&out));
        String::from_utf8(out.stdout).unwrap()
    }

    /// Runs it with `-o json`; it must succeed.
    pub fn json(&self, words: &[&str]) -> Value {
        let text = self.ok(&[words, &["-o", "json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{words:?}: {e}\n{text}"))
    }

    /// Runs it; it must end with this code. What it says on stderr.
    pub fn fails(&self, code: i32, words: &[&str]) -> String {
        let out = self.run(words);
        assert_eq!(out.status.code(), Some(code), "{words:?}\n{}", both(&out));
        String::from_utf8(out.stderr).unwrap()
    }

    /// Process id of the daemon.
    pub fn pid(&self) -> u32 {
        std::fs::read_to_string(self.home().join("lock")).unwrap().trim().parse().unwrap()
    }

    /// Kills the daemon as a power loss would, and waits until it is gone.
    pub fn kill_daemon(&self) {
        let pid = rustix::process::Pid::from_raw(self.pid() as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        // Its last thread closes the sockets: until then a connection would go to the dead.
        let gone = |socket: &str| UnixStream::connect(self.home().join(socket)).is_err();
        until("the daemon is gone", || gone("api.sock") && gone("nbd.sock"));
        let lock = std::fs::File::open(self.home().join("lock")).unwrap();
        let shared = rustix::fs::FlockOperation::NonBlockingLockShared;
        until("its lock is free", || rustix::fs::flock(&lock, shared).is_ok());
    }

    /// One REST request over the socket: status, content type, body.
    pub fn rest(&self, method: &str, path: &str, body: &str) -> (u16, String, String) {
        let (status, head, body) = self.rest_with(method, path, &[], body);
        (status, header(&head, "content-type"), body)
    }

    /// One REST request with these headers: status, all headers of the answer, body.
    pub fn rest_with(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> (u16, String, String) {
        let mut stream = UnixStream::connect(self.home().join("api.sock")).unwrap();
        let more: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: kagami\r\nconnection: close\r\n{more}\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        // A server may answer and close before it has read everything; what it said is judged below.
        match stream.write_all(request.as_bytes()) {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                panic!("{method} {path}: {error}")
            }
            _ => {}
        }
        let mut bytes = Vec::new();
        let read = stream.read_to_end(&mut bytes);
        let text = String::from_utf8(bytes).unwrap();
        // A server that answers before it has read everything may close as it likes.
        assert!(read.is_ok() || text.contains("\r\n\r\n"), "{method} {path}: {read:?}");
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, head.to_owned(), body.to_owned())
    }

    /// Runs a command that must fail: with this exit code, this stable code, and the next command named.
    pub fn refuses(&self, exit: i32, code: &str, words: &[&str]) -> String {
        let text = self.fails(exit, words);
        assert!(text.contains(&format!("[{code}]")), "{words:?}: not {code}: {text}");
        assert!(text.contains("next: "), "{words:?}: says not what to do: {text}");
        text
    }

    /// Stops the daemon, and does something with what its pools hold. The next command starts it again.
    pub fn offline<T>(&self, pool: &str, work: impl AsyncFnOnce(Rc<array::Pool>) -> T) -> T {
        self.ok(&["serve", "--stop"]);
        let file = self.home().join(format!("media/{pool}.pool"));
        lane::block_on(async {
            let disk = media::open(&file, media::Options::default()).await.unwrap();
            let pool = array::Pool::open(vec![disk], array::Options::default()).await.unwrap();
            let done = work(Rc::clone(&pool)).await;
            pool.settle().await.unwrap();
            done
        })
    }

    /// As [`Place::offline`], with the volume on LUN `ds1` of pool `p1`.
    pub fn on_volume<T>(&self, work: impl AsyncFnOnce(&vmfs::Volume) -> T) -> T {
        self.offline("p1", async |pool| {
            let volume = vmfs::Volume::open(vec![pool.lun("ds1").unwrap()], vmfs::Mode::Write).await.unwrap();
            let done = work(&volume).await;
            volume.settle().await.unwrap();
            done
        })
    }
}

/// A header of an answer; empty when it has none.
pub fn header(head: &str, name: &str) -> String {
    let start = format!("{name}: ");
    let found = head.lines().find(|l| l.to_ascii_lowercase().starts_with(&start));
    found.map_or_else(String::new, |l| l[start.len()..].to_owned())
}

/// Waits until something holds.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(60), "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The program is installed; else the test is skipped loudly, and fails in CI.
pub fn has(program: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&paths).any(|dir| dir.join(program).exists()) {
        return true;
    }
    skip(&format!("{program} is not installed"));
    false
}

/// Says that a test cannot run here.
pub fn skip(why: &str) {
    assert!(std::env::var_os("CI").is_none(), "in CI nothing is skipped: {why}");
    eprintln!("SKIPPED: {why}");
}

/// What a program said.
pub fn both(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.home().join("lock").exists() {
            let _ = self.run(&["serve", "--stop"]);
        }
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}
