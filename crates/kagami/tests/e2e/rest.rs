//! The REST interface: what it describes is what it serves; sent twice and done once; changed only as seen; told as it
//! happens.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::common::{Place, header};
use serde_json::{Value, json};

fn with_lun(name: &str) -> Place {
    let place = Place::new(name);
    place.ok(&["pool", "create", "p1", "--size", "256M"]);
    place.ok(&["lun", "create", "a", "--size", "16M"]);
    place
}

#[test]
fn everything_described_is_served_and_nothing_else() {
    let place = with_lun("openapi");
    let (_, kind, body) = place.rest("GET", "/api/openapi.json", "");
    assert_eq!(kind, "application/json");
    let document: Value = serde_json::from_str(&body).unwrap();
    let mut operations = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        let filled = path.replace("{", "no-such-").replace("}", "");
        for (method, operation) in methods.as_object().unwrap() {
            if !["get", "post", "patch", "delete", "put"].contains(&method.as_str()) {
                continue;
            }
            operations += 1;
            assert!(
                operation["summary"].is_string() || operation["description"].is_string(),
                "{method} {path}"
            );
            if path.ends_with("/daemon/stop") || path.ends_with("/events") {
                continue; // would end the daemon, or not end itself
            }
            let dry = if method == "get" { "" } else { "?dry_run=true" };
            // What takes no body is sent none: an answer may come before somebody reads it.
            let body = if ["get", "delete"].contains(&method.as_str()) { "" } else { "{}" };
            let (status, _, text) = place.rest(&method.to_uppercase(), &format!("{filled}{dry}"), body);
            assert!(
                !text.contains("KGM-API-0404") && !text.contains("KGM-API-0405"),
                "{method} {path}: {text}"
            );
            assert!(status < 500, "{method} {path}: {status} {text}");
            // A refusal is always a problem with a code.
            if status >= 400 {
                let problem: Value = serde_json::from_str(&text).unwrap();
                assert!(problem["code"].as_str().unwrap().starts_with("KGM-"), "{method} {path}: {text}");
            }
        }
    }
    assert!(operations > 45, "{operations}");
    // Every $ref leads somewhere.
    for reference in body.split("\"$ref\":\"#/components/schemas/").skip(1) {
        let name = reference.split('"').next().unwrap();
        assert!(document["components"]["schemas"].get(name).is_some(), "{name} is not described");
    }
    let (status, kind, text) = place.rest("GET", "/api/v1/nonsense", "");
    assert!(status == 404 && kind == "application/problem+json" && text.contains("KGM-API-0404"), "{text}");
    let (status, kind, text) = place.rest("PUT", "/api/v1/luns", "{}");
    assert!(status == 400 && kind == "application/problem+json" && text.contains("KGM-API-0405"), "{text}");
}

#[test]
fn a_request_with_an_idempotency_key_is_done_once() {
    let place = with_lun("once");
    let key = [("idempotency-key", "0b8e5a5e-once")];
    let body = r#"{"name": "b", "size_bytes": 16777216}"#;
    let (status, head, first) = place.rest_with("POST", "/api/v1/luns", &key, body);
    assert!(status == 200 && header(&head, "idempotency-replayed").is_empty(), "{first}");
    let (status, head, again) = place.rest_with("POST", "/api/v1/luns", &key, body);
    assert_eq!((status, header(&head, "idempotency-replayed").as_str(), &again), (200, "true", &first));
    assert_eq!(header(&head, "content-type"), "application/json");
    // Without the key it is a second request; with the key another request is a mistake.
    assert_eq!(place.rest("POST", "/api/v1/luns", body).0, 409);
    let other = r#"{"name": "c", "size_bytes": 16777216}"#;
    let (status, _, text) = place.rest_with("POST", "/api/v1/luns", &key, other);
    assert!(status == 422 && text.contains("KGM-API-0422"), "{text}");
    assert_eq!(place.rest_with("POST", "/api/v1/luns", &[("idempotency-key", "")], other).0, 400);
    // What was refused may be sent again with its key.
    let retry = [("idempotency-key", "retry")];
    assert_eq!(place.rest_with("POST", "/api/v1/snaps", &retry, r#"{"lun": "c", "name": "s"}"#).0, 404);
    place.ok(&["lun", "create", "c", "--size", "1M"]);
    assert_eq!(place.rest_with("POST", "/api/v1/snaps", &retry, r#"{"lun": "c", "name": "s"}"#).0, 200);
    // Over a restart.
    place.kill_daemon();
    place.ok(&["lun", "ls"]);
    let (status, head, again) = place.rest_with("POST", "/api/v1/luns", &key, body);
    assert_eq!((status, header(&head, "idempotency-replayed").as_str(), &again), (200, "true", &first));
    assert_eq!(place.json(&["lun", "ls"]).as_array().unwrap().len(), 3);
}

#[test]
fn an_object_is_changed_only_as_it_was_seen() {
    let place = with_lun("etag");
    let (_, head, _) = place.rest_with("GET", "/api/v1/luns/a", &[], "");
    let tag = header(&head, "etag");
    assert!(tag.starts_with('"') && tag.len() == 34, "{head}");
    assert_eq!(place.rest_with("GET", "/api/v1/luns/a", &[("if-none-match", &tag)], "").0, 304);
    let grow = |bytes: u64, tag: &str| {
        let body = json!({"size_bytes": bytes}).to_string();
        place.rest_with("PATCH", "/api/v1/luns/a", &[("if-match", tag)], &body)
    };
    assert_eq!(grow(32 << 20, &tag).0, 200);
    let (status, head, text) = grow(64 << 20, &tag);
    assert!(status == 412 && text.contains("KGM-API-0412"), "{text}");
    let now = header(&head, "etag");
    assert_ne!(now, tag, "the answer tells the tag of what is there");
    assert_eq!(place.json(&["lun", "show", "a"])["size_bytes"], 32 << 20);
    assert_eq!(grow(64 << 20, &now).0, 200);
    assert_eq!(place.rest_with("DELETE", "/api/v1/luns/a", &[("if-match", &tag)], "").0, 412);
    assert_eq!(place.rest_with("DELETE", "/api/v1/luns/nobody", &[("if-match", "*")], "").0, 412);
    assert_eq!(place.rest_with("DELETE", "/api/v1/luns/a", &[("if-match", "*")], "").0, 200);
}

#[test]
fn what_happens_is_told_as_it_happens() {
    let place = with_lun("events");
    let listen = |after: &str| {
        let mut stream = UnixStream::connect(place.home().join("api.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        write!(stream, "GET /api/v1/events HTTP/1.1\r\nhost: k\r\n{after}\r\n").unwrap();
        BufReader::new(stream)
    };
    let mut events = listen("");
    let next = |wanted: &str, events: &mut BufReader<UnixStream>| {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(events.read_line(&mut line).unwrap() > 0, "it ended before {wanted}");
            if line.contains(wanted) {
                return line.clone();
            }
        }
    };
    next("text/event-stream", &mut events);
    place.ok(&["lun", "create", "b", "--size", "1M", "-n"]);
    place.ok(&["lun", "create", "b", "--size", "1M"]);
    next("event: changed", &mut events);
    let data = next("data: ", &mut events);
    assert!(data.contains("\"method\":\"POST\"") && data.contains("\"path\":\"/api/v1/luns\""), "{data}");
    place.ok(&["datastore", "create", "ds1", "--size", "768M"]);
    place.ok(&["vm", "create", "v", "--datastore", "ds1", "--disk", "1M"]);
    let repo = place.dir().join("repo").display().to_string();
    place.ok(&["backup", "create", "v", "--repo", &repo]);
    next("event: job.running", &mut events);
    next("event: job.done", &mut events);
    let data = next("data: ", &mut events);
    assert!(data.contains("\"kind\":\"backup\"") && data.contains("\"state\":\"done\""), "{data}");
    // Who comes back hears what it missed.
    let mut back = listen("last-event-id: 1\r\n");
    next("id: 2", &mut back);
    // A daemon that stops ends the listening, and is not kept from stopping by it.
    place.ok(&["serve", "--stop"]);
    let mut rest = String::new();
    while events.read_line(&mut rest).unwrap_or(0) > 0 {}
}
