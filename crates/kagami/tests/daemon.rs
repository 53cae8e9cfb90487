//! The daemon's life: started by a command, one per home, killed, stopped, and its REST interface.

mod common;

use common::{Place, both};
use serde_json::Value;

#[test]
fn a_command_starts_the_daemon_and_it_stays() {
    let place = Place::new("start");
    assert!(place.fails(6, &["serve", "--status"]).contains("KGM-CLI-0006"));
    assert_eq!(place.json(&["pool", "ls"]), Value::Array(vec![]));
    let first = place.pid();
    place.ok(&["lun", "ls"]);
    assert_eq!(place.pid(), first);
    let status = place.json(&["serve", "--status"]);
    assert_eq!(status["pid"], first);
    let text = place.fails(4, &["serve"]);
    assert!(text.contains("KGM-SRV-0409") && text.contains(&first.to_string()), "{text}");
    place.ok(&["serve", "--stop"]);
    place.ok(&["serve", "--stop"]);
    place.fails(6, &["serve", "--status"]);
}

#[test]
fn a_killed_daemon_leaves_nothing_in_the_way() {
    let place = Place::new("kill");
    place.ok(&["pool", "ls"]);
    let first = place.pid();
    place.kill_daemon();
    assert!(place.home().join("api.sock").exists(), "the stale socket is there");
    place.ok(&["pool", "ls"]);
    assert_ne!(place.pid(), first);
}

#[test]
fn the_system_home_is_never_started_by_a_command() {
    let place = Place::new("system");
    let out = place.command(&["--home", "/var/lib/kagami", "pool", "ls"]).output().unwrap();
    assert_eq!(out.status.code(), Some(6), "{}", both(&out));
    assert!(both(&out).contains("systemctl start kagami"), "{}", both(&out));
}

#[test]
fn a_command_with_a_mistake_in_it_starts_nothing() {
    let place = Place::new("mistake");
    let text = place.fails(2, &["lun", "create", "x", "--size", "100"]);
    assert!(text.contains("100M for MiB"), "{text}");
    assert!(!place.home().exists());
    place.fails(2, &["lun", "frobnicate"]);
    place.fails(1, &["vmfs", "check"]);
    assert!(!place.home().exists());
}

#[test]
fn the_socket_is_its_owners_alone() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new("mode");
    place.ok(&["pool", "ls"]);
    let mode = |p: std::path::PathBuf| std::fs::metadata(p).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(place.home().join("api.sock")), 0o600);
    assert_eq!(mode(place.home()), 0o700);
}

#[test]
fn rest_describes_itself_and_reports_problems() {
    let place = Place::new("rest");
    place.ok(&["pool", "ls"]);
    let (status, _, body) = place.rest("GET", "/api/openapi.json", "");
    let document: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, &document["info"]["title"]), (200, &Value::from("kagami")));
    for path in ["/api/v1/pools", "/api/v1/luns/{lun}", "/api/v1/backups", "/api/v1/jobs/{id}", "/metrics"] {
        assert!(document["paths"].get(path).is_some(), "{path} is not described");
    }
    let (status, kind, body) = place.rest("GET", "/api/v1/luns/nobody", "");
    assert_eq!((status, kind.as_str()), (404, "application/problem+json"));
    let problem: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(problem["code"], "KGM-LUN-0404");
    let (status, kind, _) = place.rest("POST", "/api/v1/pools", "{\"nonsense\": 1}");
    assert_eq!((status, kind.as_str()), (400, "application/problem+json"));
    let (status, _, _) = place.rest("GET", "/api/v1/luns?trash=perhaps", "");
    assert_eq!(status, 400);
    let (status, kind, body) = place.rest("GET", "/metrics", "");
    assert!(status == 200 && kind.starts_with("application/openmetrics-text"), "{kind}");
    for wanted in [
        "kagami_build_info{version=",
        "# TYPE kagami_cut_hold_seconds histogram",
        "# TYPE kagami_commit_hold_seconds histogram",
        "# TYPE kagami_export_reads counter",
        "# UNIT kagami_export_write_bytes bytes",
        "# TYPE kagami_export_flush_seconds histogram",
    ] {
        assert!(body.contains(wanted), "{wanted} is not in {body}");
    }
}

#[test]
fn completions_and_manual_need_no_daemon() {
    let place = Place::new("man");
    assert!(place.ok(&["completions", "bash"]).contains("_kagami"));
    assert!(place.ok(&["man"]).contains(".TH kagami 1"));
    assert!(place.ok(&["--help"]).contains("Exit codes: 0 done"));
    assert!(!place.home().exists());
}
