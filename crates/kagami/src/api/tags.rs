//! Entity tags (RFC 9110, 8.8.3 and 13): every GET answer in JSON has one; `If-None-Match` saves the body, and `If-Match`
//! lets a PATCH or DELETE through only when the object is still what the client saw.
//!
//! A tag covers what requests change. Counters that move by themselves (bytes used, bytes done) are left out: else no
//! tag of a LUN in use would ever match again.

use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use tokio::sync::Mutex;

use crate::problem::{Kind, Problem};

/// Answers are objects and lists of them; one that is larger gets no tag.
const MAX_BYTES: usize = 64 << 20;
/// Fields that move by themselves.
const MOVING: [&str; 7] =
    ["used_bytes", "free_bytes", "below_bytes", "hidden_bytes", "done_bytes", "held", "held_seconds"];

/// Conditional changes go one at a time: between the look and the change there is no other.
static TURN: Mutex<()> = Mutex::const_new(());

fn without_moving(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|key, _| !MOVING.iter().any(|m| key.ends_with(m)));
            map.values_mut().for_each(without_moving);
        }
        Value::Array(list) => list.iter_mut().for_each(without_moving),
        _ => {}
    }
}

/// The tag of a JSON text; `None` when it is none.
fn tag_of(bytes: &[u8]) -> Option<HeaderValue> {
    let mut value: Value = serde_json::from_slice(bytes).ok()?;
    without_moving(&mut value);
    let hash = blake3::hash(value.to_string().as_bytes()).to_hex();
    HeaderValue::from_str(&format!("\"{}\"", &hash[..32])).ok()
}

/// One of the tags in a header fits; `*` fits whatever is there.
fn fits(headers: &HeaderMap, name: header::HeaderName, tag: &HeaderValue) -> bool {
    let wanted = headers.get_all(name).iter().filter_map(|v| v.to_str().ok());
    let mut all = wanted.flat_map(|v| v.split(',')).map(str::trim);
    all.any(|one| one == "*" || one.as_bytes() == tag.as_bytes())
}

/// Puts a tag on an answer to GET.
async fn tagged(answer: Response) -> Response {
    let json = answer.headers().get(header::CONTENT_TYPE).is_some_and(|t| t == "application/json");
    if answer.status() != StatusCode::OK || !json {
        return answer;
    }
    let (mut parts, body) = answer.into_parts();
    match to_bytes(body, MAX_BYTES).await {
        Ok(bytes) => {
            if let Some(tag) = tag_of(&bytes) {
                parts.headers.insert(header::ETAG, tag);
            }
            Response::from_parts(parts, Body::from(bytes))
        }
        Err(error) => Problem::failed("KGM-API-0500", "the answer is too large", error).into_response(),
    }
}

/// The middleware.
pub async fn tags(request: Request, next: Next) -> Response {
    let headers = request.headers().clone();
    if request.method() == Method::GET {
        let answer = tagged(next.run(request).await).await;
        return match answer.headers().get(header::ETAG).cloned() {
            Some(tag) if fits(&headers, header::IF_NONE_MATCH, &tag) => {
                (StatusCode::NOT_MODIFIED, [(header::ETAG, tag)]).into_response()
            }
            _ => answer,
        };
    }
    if !matches!(*request.method(), Method::PATCH | Method::DELETE) {
        return next.run(request).await;
    }
    let _turn = TURN.lock().await;
    if headers.contains_key(header::IF_MATCH) {
        let look = Request::builder().method(Method::GET).uri(request.uri().path());
        let seen = match look.body(Body::empty()) {
            Ok(look) => tagged(next.clone().run(look).await).await,
            Err(error) => return Problem::usage(error.to_string()).into_response(),
        };
        let tag = seen.headers().get(header::ETAG).cloned();
        if !tag.as_ref().is_some_and(|tag| fits(&headers, header::IF_MATCH, tag)) {
            let problem = Problem::new("KGM-API-0412", Kind::Changed, "nothing was changed")
                .why("the object is not what it was when it was read")
                .hint(format!("GET {} again", request.uri().path()));
            return match tag {
                Some(tag) => ([(header::ETAG, tag)], problem).into_response(),
                None => problem.into_response(),
            };
        }
    }
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_do_not_change_a_tag() {
        let tag = |text: &str| tag_of(text.as_bytes()).unwrap();
        assert_eq!(tag("{\"name\": \"a\", \"used_bytes\": 1}"), tag("{\"name\":\"a\",\"used_bytes\":2}"));
        assert_ne!(tag("{\"name\": \"a\", \"size_bytes\": 1}"), tag("{\"name\":\"a\",\"size_bytes\":2}"));
        assert!(tag_of(b"nonsense").is_none());
        let mut headers = HeaderMap::new();
        headers.insert(header::IF_MATCH, HeaderValue::from_static("\"x\", \"y\""));
        assert!(fits(&headers, header::IF_MATCH, &HeaderValue::from_static("\"y\"")));
        assert!(!fits(&headers, header::IF_MATCH, &HeaderValue::from_static("\"z\"")));
    }
}
