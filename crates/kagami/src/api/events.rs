//! What happens, as server-sent events (WHATWG HTML, "Server-sent events"): jobs that begin and end, objects that were
//! changed. A listener that comes back with `Last-Event-ID` hears what it missed, as far as that is still known.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hyper::body::{Body, Bytes, Frame};
use serde::Serialize;
use tokio::sync::mpsc;

use super::Shared;

/// Events kept for listeners that come back.
const KEPT: usize = 256;
/// Events that a listener may be behind; a slower one is cut off, and comes back.
const BEHIND: usize = 256;
/// A line at least so often, so that both ends notice when the other is gone.
const HEARTBEAT: Duration = Duration::from_secs(15);

#[derive(Default)]
struct Inner {
    number: u64,
    kept: VecDeque<(u64, Bytes)>,
    listeners: Vec<mpsc::Sender<Bytes>>,
    closed: bool,
}

/// Whoever listens, and what happened lately.
#[derive(Clone, Default)]
pub struct Events(Arc<Mutex<Inner>>);

impl Events {
    /// Nobody listens yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Tells everybody.
    pub fn tell(&self, kind: &str, object: &impl Serialize) {
        let data = serde_json::to_string(object).unwrap_or_default(); // plain data always serialises, in one line
        let mut inner = self.inner();
        inner.number += 1;
        let number = inner.number;
        let text = Bytes::from(format!("id: {number}\nevent: {kind}\ndata: {data}\n\n"));
        inner.kept.push_back((number, text.clone()));
        if inner.kept.len() > KEPT {
            inner.kept.pop_front();
        }
        inner.listeners.retain(|l| l.try_send(text.clone()).is_ok());
    }

    /// Ends all listening: the daemon stops.
    pub fn close(&self) {
        let mut inner = self.inner();
        inner.closed = true;
        inner.listeners.clear();
    }

    /// Listens from now on, and hears first what came after event number `after`.
    fn listen(&self, after: Option<u64>) -> Stream {
        let (sender, receiver) = mpsc::channel(BEHIND + KEPT);
        let mut inner = self.inner();
        if let Some(after) = after {
            for (_, text) in inner.kept.iter().filter(|(number, _)| *number > after) {
                let _ = sender.try_send(text.clone()); // there is room for all that is kept
            }
        }
        if !inner.closed {
            inner.listeners.push(sender);
        }
        let mut beat = tokio::time::interval(HEARTBEAT);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        Stream { receiver, beat }
    }
}

/// The body of an answer that does not end by itself.
struct Stream {
    receiver: mpsc::Receiver<Bytes>,
    beat: tokio::time::Interval,
}

impl Body for Stream {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match self.receiver.poll_recv(cx) {
            Poll::Ready(Some(text)) => return Poll::Ready(Some(Ok(Frame::data(text)))),
            Poll::Ready(None) => return Poll::Ready(None),
            Poll::Pending => {}
        }
        match self.beat.poll_tick(cx) {
            Poll::Ready(_) => Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b": alive\n\n"))))),
            Poll::Pending => Poll::Pending,
        }
    }
}

/// What happens, as server-sent events: `job.running`, `job.done`, `job.failed`, `job.cancelled` with the job, and
/// `changed` with method and path of a request that changed something.
#[utoipa::path(get, path = "/api/v1/events", params(("last-event-id" = Option<u64>, Header, description = "Hear first what came after this event")),
    responses((status = 200, content_type = "text/event-stream", body = String)))]
pub async fn events(State(daemon): State<Shared>, headers: HeaderMap) -> Response {
    let after = headers.get("last-event-id").and_then(|v| v.to_str().ok()?.parse().ok());
    let body = axum::body::Body::new(daemon.events.listen(after));
    let head = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store")];
    (head, body).into_response()
}

/// Tells listeners of every request that changed something.
pub async fn tell_changes(State(daemon): State<Shared>, request: Request, next: Next) -> Response {
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let answer = next.run(request).await;
    let changes = matches!(method, Method::POST | Method::PATCH | Method::DELETE)
        && !uri.query().is_some_and(|q| q.split('&').any(|p| p == "dry_run=true"))
        && !uri.path().ends_with("/check");
    if changes && answer.status().is_success() {
        let what = serde_json::json!({"method": method.as_str(), "path": uri.path()});
        daemon.events.tell("changed", &what);
    }
    answer
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    #[tokio::test]
    async fn a_listener_that_comes_back_hears_what_it_missed() {
        let events = Events::new();
        events.tell("changed", &serde_json::json!({"path": "/a"}));
        events.tell("changed", &serde_json::json!({"path": "/b"}));
        let mut stream = events.listen(Some(1));
        events.tell("changed", &serde_json::json!({"path": "/c"}));
        events.close();
        let mut text = String::new();
        while let Some(Ok(frame)) = stream.frame().await {
            text.push_str(&String::from_utf8_lossy(frame.data_ref().unwrap()));
        }
        assert!(
            !text.contains("\"/a\"") && text.contains("id: 2\nevent: changed\ndata: {\"path\":\"/b\"}\n\n"),
            "{text}"
        );
        assert!(text.contains("\"/c\""), "{text}");
    }

    #[tokio::test]
    async fn who_does_not_listen_is_cut_off() {
        let events = Events::new();
        let stream = events.listen(None);
        for _ in 0..=BEHIND + KEPT {
            events.tell("changed", &0);
        }
        assert!(events.inner().listeners.is_empty());
        drop(stream);
    }
}
