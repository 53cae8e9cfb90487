//! What carries the I/O: the daemon takes the best that the kernel grants, and says in `pool show` and in its log which.

use std::process::Command;

use crate::common::{Place, both, has, skip};

/// Makes a pool by a command that is changed in some way; the daemon that it starts inherits that. What `pool show`
/// says of the medium.
fn access(place: &Place, mut make: Command) -> String {
    let out = make.output().unwrap();
    assert!(out.status.success(), "{}", both(&out));
    let pool = place.json(&["pool", "show", "p1"]);
    let access = pool["media"][0]["access"].as_str().unwrap().to_owned();
    // The daemon's log says the same, from the moment when it was opened.
    let log = std::fs::read_to_string(place.home().join("daemon.log")).unwrap();
    let opened = log.lines().find(|line| line.contains("medium opened") && line.contains("p1.pool"));
    let opened = opened.unwrap_or_else(|| panic!("the log does not say what carries the I/O:\n{log}"));
    assert!(opened.contains(&access), "{access}: {opened}");
    // It works, and the table shows it too.
    place.ok(&["lun", "create", "a", "--size", "16M"]);
    place.ok(&["snap", "create", "a@s"]);
    assert_eq!(place.json(&["pool", "check", "p1"])["verdict"], "clean");
    access
}

const CREATE: [&str; 5] = ["pool", "create", "p1", "--size", "64M"];

/// What this machine grants by default: the other tests are compared with it.
fn by_default() -> String {
    let place = Place::new("engine");
    let command = place.command(&CREATE);
    access(&place, command)
}

#[test]
fn pool_show_and_the_log_say_what_carries_the_io() {
    let best = by_default();
    if !best.starts_with("io_uring, ") {
        skip(&format!("io_uring is not granted here: {best}"));
    } else if !best.contains("direct") {
        skip(&format!("no direct I/O in {}: {best}", std::env::temp_dir().display()));
    } else {
        assert_eq!(best, "io_uring, direct, registered buffers");
    }
    // By the environment: the same but for the engine, and threads have no use for registered buffers.
    let place = Place::new("threads");
    let mut command = place.command(&CREATE);
    command.env("KAGAMI_LANE", "threads");
    let cache = best.split(", ").nth(1).unwrap();
    assert_eq!(access(&place, command), format!("threads, {cache}, plain buffers"));
}

/// The program with a limit of memory to pin. Root may pin without one, unless it gives that right away for good.
fn limited(place: &Place, bytes: u64) -> Command {
    let mut command = Command::new("prlimit");
    command.arg(format!("--memlock={bytes}:{bytes}"));
    if rustix::process::geteuid().is_root() {
        command.args(["setpriv", "--bounding-set", "-ipc_lock", "--inh-caps", "-ipc_lock"]);
    }
    let kagami = place.command(&CREATE);
    command.arg(kagami.get_program()).args(kagami.get_args()).current_dir(place.dir());
    for (name, value) in kagami.get_envs() {
        value.map(|value| command.env(name, value));
    }
    command.stdin(std::process::Stdio::null());
    command
}

#[test]
fn without_memory_to_pin_the_daemon_takes_plain_buffers() {
    if !has("prlimit") || !has("setpriv") {
        return;
    }
    let best = by_default();
    if !best.contains("registered") {
        return skip(&format!("nothing to lose: {best}"));
    }
    // Nothing may be pinned: older kernels do not count the ring itself, newer ones do, and threads take over.
    let place = Place::new("memlock");
    let found = access(&place, limited(&place, 0));
    let plain = best.replace("registered", "plain");
    assert!([plain.clone(), plain.replace("io_uring", "threads")].contains(&found), "{found}");
    // The rings fit in, the buffers do not.
    let place = Place::new("memlock-little");
    assert_eq!(access(&place, limited(&place, 900 << 10)), plain);
}
