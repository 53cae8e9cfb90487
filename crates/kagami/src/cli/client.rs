//! The CLI's side of REST: over the Unix socket of the home's daemon, which a command starts by itself in a user's own
//! home.

use std::cell::Cell;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

use crate::home::Home;
use crate::problem::{Kind, Outcome, Problem};

/// How long a started daemon may take until it answers: opening pools replays journals.
const START_TIME: Duration = Duration::from_secs(30);

/// A way to the daemon of one home.
#[derive(Debug)]
pub struct Client {
    home: Home,
    /// The daemon answered once: it is not started a second time by one command.
    reached: Cell<bool>,
}

impl Client {
    /// The home's daemon. Nothing happens before the first request, so that a command with a mistake in it starts none.
    pub fn new(home: Home) -> Self {
        Self { home, reached: Cell::new(false) }
    }

    /// The home's daemon if one runs.
    pub async fn running(home: &Home) -> Outcome<Self> {
        home.check_socket_length()?;
        match UnixStream::connect(home.api_socket()).await {
            Ok(_) => Ok(Self { home: home.clone(), reached: Cell::new(true) }),
            Err(_) => Err(unreachable(home).hint(format!("kagami --home {} serve", home.dir().display()))),
        }
    }

    /// Makes sure that a daemon answers; started when none runs and the home is a user's own.
    async fn reach(&self) -> Outcome {
        if self.reached.get() {
            return Ok(());
        }
        self.home.check_socket_length()?;
        if UnixStream::connect(self.home.api_socket()).await.is_err() {
            if self.home.is_system() {
                return Err(unreachable(&self.home).hint("systemctl start kagami"));
            }
            self.start_daemon().await?;
        }
        self.reached.set(true);
        Ok(())
    }

    async fn start_daemon(&self) -> Outcome {
        self.home.make()?;
        let log = self.home.join("daemon.log");
        let failed = |e: std::io::Error| Problem::failed("KGM-CLI-0010", "the daemon cannot be started", e);
        let err = std::fs::OpenOptions::new().create(true).append(true).open(&log).map_err(failed)?;
        let mut child = Command::new(std::env::current_exe().map_err(failed)?)
            .arg("--home")
            .arg(self.home.dir())
            .arg("serve")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(err)
            .current_dir("/")
            .process_group(0) // Ctrl-C in the terminal is for the command, not for the daemon
            .spawn()
            .map_err(failed)?;
        let begun = Instant::now();
        loop {
            if UnixStream::connect(self.home.api_socket()).await.is_ok() {
                return Ok(());
            }
            // It may have lost a race against another command's daemon: that one serves as well.
            let ended = child.try_wait().map_err(failed)?;
            if begun.elapsed() > START_TIME || (ended.is_some() && begun.elapsed() > Duration::from_secs(2)) {
                return Err(unreachable(&self.home)
                    .why(format!("it was started, but: {}", last_line(&log)))
                    .hint(format!("less {}", log.display())));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// GET.
    pub async fn get(&self, path: &str) -> Outcome<Value> {
        self.send(Method::GET, path, None).await
    }

    /// Any request; the answer's JSON, or the problem that the daemon reports.
    pub async fn send(&self, method: Method, path: &str, body: Option<Value>) -> Outcome<Value> {
        let (status, bytes) = self.exchange(method, path, body).await?;
        if status.is_success() {
            return serde_json::from_slice(&bytes).map_err(|e| broken(e.to_string()));
        }
        Err(serde_json::from_slice::<Problem>(&bytes).unwrap_or_else(|_| {
            Problem::new("KGM-API-0500", Kind::Failed, format!("the daemon answered {status} to {path}"))
                .why(String::from_utf8_lossy(&bytes))
        }))
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> Outcome<(StatusCode, Bytes)> {
        self.reach().await?;
        let lost = |e: String| unreachable(&self.home).why(e);
        let stream = UnixStream::connect(self.home.api_socket()).await.map_err(|e| lost(e.to_string()))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| lost(e.to_string()))?;
        let running = tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path).header("host", "kagami");
        let bytes = match body {
            Some(value) => {
                request = request.header("content-type", "application/json");
                Bytes::from(value.to_string())
            }
            None => Bytes::new(),
        };
        let request = request.body(Full::new(bytes)).map_err(|e| Problem::usage(e.to_string()))?;
        let response = sender.send_request(request).await.map_err(|e| broken(e.to_string()))?;
        let status = response.status();
        let bytes = response.into_body().collect().await.map_err(|e| broken(e.to_string()))?.to_bytes();
        drop(sender);
        running.abort();
        Ok((status, bytes))
    }
}

fn unreachable(home: &Home) -> Problem {
    Problem::new("KGM-CLI-0006", Kind::Unreachable, "the daemon does not answer")
        .why(format!("nothing listens on {}", home.api_socket().display()))
        .hint(format!("kagami --home {} serve --status", home.dir().display()))
}

fn broken(why: String) -> Problem {
    Problem::new("KGM-CLI-0011", Kind::Unreachable, "the daemon's answer broke off")
        .why(why)
        .hint("kagami serve --status, and daemon.log in the home; what was asked may have been done")
}

fn last_line(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let tail = &text[text.len().saturating_sub(4096)..];
    let text = String::from_utf8_lossy(tail).into_owned();
    text.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("it wrote nothing").to_owned()
}

/// One segment of a URL's path, percent-encoded.
pub fn segment(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'@' => {
                out.push(char::from(byte))
            }
            _ => {
                out.push('%');
                for half in [byte >> 4, byte & 15] {
                    out.push(char::from(b"0123456789ABCDEF"[usize::from(half)]));
                }
            }
        }
    }
    out
}

/// What [`segment`] was made from.
pub fn from_segment(segment: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = segment.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let code = after.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        match code.filter(|_| *first == b'%').and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_encoded() {
        assert_eq!(segment("[ds] a/b.vmdk"), "%5Bds%5D%20a%2Fb.vmdk");
        assert_eq!(segment("lun@snap"), "lun@snap");
    }
}
