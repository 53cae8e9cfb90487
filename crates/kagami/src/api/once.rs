//! `Idempotency-Key` on POST: a request that is sent again with the same key is answered as the first one was, and done
//! once. Answers are kept for a day, over restarts of the daemon.
//!
//! A key is remembered when its request was done: one that was refused or failed may be sent again. A daemon that is
//! killed between doing and remembering does the request again; names that are taken show it then.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use super::Shared;
use crate::files::{self, RecordError, Versioned};
use crate::problem::{Kind, Outcome, Problem};

/// Longest key, in bytes.
const KEY_MAX: usize = 255;
/// Largest body of a request, in bytes, as axum has it.
const BODY_MAX: usize = 2 << 20;
/// Answers are kept for so long.
const KEPT: Duration = Duration::from_secs(86_400);
/// And at most so many.
const KEPT_MAX: usize = 1000;

/// An answer that was given.
#[derive(Clone, Serialize, Deserialize)]
struct Reply {
    format: u32,
    /// Hash of method, path and body: the same key for another request is a mistake.
    request: String,
    status: u16,
    content_type: String,
    location: Option<String>,
    body: String,
}

impl Versioned for Reply {
    const FORMAT: u32 = 1;
}

/// Answers that were given, and keys whose requests are under way.
#[derive(Clone)]
pub struct Replies {
    dir: PathBuf,
    running: Arc<Mutex<BTreeSet<String>>>,
}

/// A key is in use until this is dropped.
struct Running<'a> {
    replies: &'a Replies,
    name: String,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.replies.running.lock().unwrap_or_else(|e| e.into_inner()).remove(&self.name);
    }
}

impl Replies {
    /// In this directory.
    pub fn open(dir: PathBuf) -> Outcome<Self> {
        std::fs::create_dir_all(&dir)
            .map_err(|e| Problem::failed("KGM-SRV-0001", format!("cannot make {}", dir.display()), e))?;
        Ok(Self { dir, running: Arc::default() })
    }

    fn begin(&self, name: &str) -> Option<Running<'_>> {
        let mut running = self.running.lock().unwrap_or_else(|e| e.into_inner());
        running.insert(name.to_owned()).then(|| Running { replies: self, name: name.to_owned() })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.json"))
    }

    /// The answer that was given; an old one is none. One that a newer kagami gave is not read, and its request not done
    /// again.
    fn find(&self, name: &str) -> Outcome<Option<Reply>> {
        let path = self.path(name);
        let modified = std::fs::metadata(&path).and_then(|m| m.modified());
        let is_old = |time: std::time::SystemTime| time.elapsed().is_ok_and(|age| age > KEPT);
        if modified.is_ok_and(is_old) {
            return Ok(None);
        }
        match files::load(&path) {
            Err(RecordError::Newer { found, known }) => Err(files::newer(&path, found, known)),
            reply => Ok(reply.ok()),
        }
    }

    /// Keeps an answer, and lets go of the oldest ones.
    fn keep(&self, name: &str, reply: &Reply) {
        if let Err(error) = files::save(&self.path(name), reply) {
            tracing::warn!(%error, "an answer cannot be remembered: the request may be done again");
        }
        let mut all: Vec<_> = std::fs::read_dir(&self.dir)
            .into_iter()
            .flatten()
            .filter_map(|entry| {
                let path = entry.ok()?.path();
                Some((path.metadata().ok()?.modified().ok()?, path))
            })
            .collect();
        all.sort();
        let old = |time: &std::time::SystemTime| time.elapsed().is_ok_and(|age| age > KEPT);
        let spare = all.len().saturating_sub(KEPT_MAX);
        for (index, (time, path)) in all.iter().enumerate() {
            if index < spare || old(time) {
                let _ = std::fs::remove_file(path); // tried again at the next request
            }
        }
    }
}

fn answer(reply: Reply) -> Response {
    let status = StatusCode::from_u16(reply.status).unwrap_or(StatusCode::OK);
    let mut response = (status, reply.body).into_response();
    let headers = response.headers_mut();
    if let Ok(kind) = HeaderValue::from_str(&reply.content_type) {
        headers.insert(header::CONTENT_TYPE, kind);
    }
    if let Some(location) = reply.location.and_then(|l| HeaderValue::from_str(&l).ok()) {
        headers.insert(header::LOCATION, location);
    }
    headers.insert("idempotency-replayed", HeaderValue::from_static("true"));
    response
}

/// The middleware.
pub async fn once(State(daemon): State<Shared>, request: Request, next: Next) -> Response {
    let key = request.headers().get("idempotency-key").cloned();
    let (Some(key), &Method::POST) = (key, request.method()) else { return next.run(request).await };
    match done_once(&daemon, key, request, next).await {
        Ok(response) => response,
        Err(problem) => problem.into_response(),
    }
}

async fn done_once(daemon: &Shared, key: HeaderValue, request: Request, next: Next) -> Outcome<Response> {
    if key.is_empty() || key.len() > KEY_MAX {
        return Err(Problem::new("KGM-API-0402", Kind::Usage, "the idempotency key is not used")
            .why(format!("it has {} bytes", key.len()))
            .hint(format!("1 to {KEY_MAX} bytes, a UUID for example")));
    }
    let replies = &daemon.replies;
    let name = blake3::hash(key.as_bytes()).to_hex().to_string();
    let Some(_running) = replies.begin(&name) else {
        return Err(Problem::new("KGM-API-0409", Kind::Conflict, "the request is under way already")
            .why("another one with its idempotency key came first")
            .hint("send it again in a moment"));
    };
    let (parts, body) = request.into_parts();
    let too_large = |e| Problem::new("KGM-API-0400", Kind::Usage, "the request's body cannot be read").why(e);
    let bytes = to_bytes(body, BODY_MAX).await.map_err(too_large)?;
    let mut hash = blake3::Hasher::new();
    for part in [parts.method.as_str().as_bytes(), b" ", parts.uri.to_string().as_bytes(), b" ", &bytes] {
        hash.update(part);
    }
    let hash = hash.finalize().to_hex().to_string();
    let (known, looked) = (replies.clone(), name.clone());
    let found = tokio::task::spawn_blocking(move || known.find(&looked)).await;
    if let Some(reply) =
        found.map_err(|e| Problem::failed("KGM-API-0500", "the answer was not found", e))??
    {
        if reply.request != hash {
            return Err(Problem::new("KGM-API-0422", Kind::Refused, "the idempotency key was used before")
                .why("for another request")
                .hint("a key of its own for each request"));
        }
        return Ok(answer(reply));
    }
    let done = next.run(Request::from_parts(parts, Body::from(bytes))).await;
    if !done.status().is_success() {
        return Ok(done);
    }
    let (parts, body) = done.into_parts();
    let failed = |e| Problem::failed("KGM-API-0500", "the answer cannot be read", e);
    let bytes = to_bytes(body, usize::MAX).await.map_err(failed)?;
    let text = |name| parts.headers.get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let reply = Reply {
        format: Reply::FORMAT,
        request: hash,
        status: parts.status.as_u16(),
        content_type: text(header::CONTENT_TYPE).unwrap_or_default(),
        location: text(header::LOCATION),
        body: String::from_utf8_lossy(&bytes).into_owned(),
    };
    let (kept, replies, name) = (reply.clone(), replies.clone(), name.clone());
    let saved = tokio::task::spawn_blocking(move || replies.keep(&name, &kept)).await;
    saved.map_err(|e| Problem::failed("KGM-API-0500", "the answer was not remembered", e))?;
    Ok(Response::from_parts(parts, Body::from(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_answers_of_format_1_are_read() {
        let reply = files::golden::<Reply>("replies/created.json");
        assert_eq!((reply.status, reply.location.as_deref()), (201, Some("/api/v1/luns/a")));
    }

    #[test]
    fn an_answer_of_a_newer_kagami_is_not_read_and_its_request_not_done_again() {
        let dir = std::env::temp_dir().join(format!("kagami-once-{}", std::process::id()));
        let replies = Replies::open(dir.clone()).unwrap();
        assert!(replies.find("x").unwrap().is_none());
        std::fs::write(replies.path("x"), r#"{"format": 2, "answers": []}"#).unwrap();
        let problem = replies.find("x").err().unwrap();
        assert!(problem.code == "KGM-SRV-0013" && problem.detail.contains("up to 1"), "{problem}");
        let reply = files::golden::<Reply>("replies/created.json");
        replies.keep("x", &reply);
        assert!(std::fs::read_to_string(replies.path("x")).unwrap().contains("answers"));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
