//! The daemon is killed at any moment of any request, under a writer that waits for each of its writes to be durable:
//! afterwards each request was done or was not, what was answered is there, nothing of it lies about, the checkers find
//! leaks at most, and the writer's disks hold what it was told.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;
#[path = "kill/world.rs"]
mod world;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::wire::{content, contents, write};
use common::writer::{SLOTS, Writer, one_prefix, prefix};
use common::{Place, both, until};
use fastrand::Rng;
use serde_json::{Value, json};
use vmfs::format::InodeKind;
use world::{Op, World, lun_fact};

/// Everything that one may wait for.
const PATIENCE: Duration = Duration::from_secs(60);

/// One request over the socket: nothing when the daemon is gone before it answered.
fn ask(place: &Place, method: &str, path: &str, body: &Value) -> Option<(u16, Value)> {
    let mut stream = UnixStream::connect(place.home().join("api.sock")).ok()?;
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: kagami\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).ok()?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n")?;
    let length =
        head.lines().find_map(|l| l.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
    if length.is_some_and(|length: usize| body.len() < length) {
        return None;
    }
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some((status, serde_json::from_str(body).unwrap_or(Value::Null)))
}

fn list(place: &Place, path: &str) -> Vec<Value> {
    match ask(place, "GET", &format!("/api/v1/{path}"), &Value::Null) {
        Some((200, Value::Array(all))) => all,
        other => panic!("{path}: {other:?}"),
    }
}

/// Everything that the daemon shows, as [`World::facts`] has it.
fn observe(place: &Place) -> BTreeSet<String> {
    let text = |v: &Value, name: &str| v[name].as_str().unwrap_or_default().to_owned();
    let file = |name: String| name.replacen("[", "", 1).replacen("] ", ":", 1);
    let mut all = BTreeSet::new();
    for v in list(place, "pools") {
        all.insert(format!("pool {} {}", text(&v, "name"), text(&v, "state")));
    }
    for v in list(place, "luns") {
        let claim = v["claim"].as_str().unwrap_or("nobody");
        let mut snaps: Vec<&str> =
            v["snapshots"].as_array().unwrap().iter().map(|s| s.as_str().unwrap()).collect();
        // What a restore in place keeps of what was there is its user's to remove.
        snaps.retain(|s| !s.starts_with("before-restore-"));
        snaps.sort_unstable();
        let (size, reverted) = (v["size_bytes"].as_u64().unwrap(), v["reverted"] == true);
        all.insert(lun_fact(&text(&v, "name"), &text(&v, "pool"), size, claim, reverted, &snaps));
    }
    for v in list(place, "luns?trash=true") {
        all.insert(format!("trash {} {}", text(&v, "name"), v["size_bytes"]));
    }
    for v in list(place, "datastores") {
        all.insert(format!("datastore {} {} {}", text(&v, "name"), text(&v, "state"), text(&v, "lun")));
    }
    for v in list(place, "disks") {
        let trouble = v["trouble"].as_str().map_or_else(String::new, |t| format!(" {t}"));
        all.insert(format!(
            "disk {} {} {}{trouble}",
            file(text(&v, "name")),
            v["size_bytes"],
            text(&v, "kind")
        ));
    }
    for v in list(place, "rdms") {
        let places: Vec<&str> = v["places"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| p.as_str().unwrap().split_once(": ").unwrap().1)
            .collect();
        let state = text(&v, "state");
        let state = state.split(':').next().unwrap();
        let (name, mode, lun) = (file(text(&v, "name")), text(&v, "mode"), text(&v, "lun"));
        all.insert(format!("mapping {name} {mode} {state} {lun} {} {}", v["size_bytes"], places.join(" ")));
    }
    for v in list(place, "vms") {
        let disks = v["disks"].as_array().unwrap().iter();
        let disks: Vec<String> = disks.map(|d| file(text(d, "disk"))).collect();
        let mut state = text(&v, "state");
        if let Some(aside) = v["set_aside"].as_array().filter(|a| !a.is_empty()) {
            state = format!("{state}, set aside {aside:?}");
        }
        all.insert(format!("vm {} {state} {}", text(&v, "name"), disks.join(" ")));
    }
    all
}

fn backups(place: &Place) -> u64 {
    let repo = place.dir().join("repo");
    place.json(&["backup", "ls", "--repo", repo.to_str().unwrap()]).as_array().unwrap().len() as u64
}

/// What became of a request.
enum Outcome {
    Done,
    /// The daemon is gone; it had accepted the job, or nothing was heard.
    Lost {
        accepted: bool,
    },
}

/// Does one request and waits for its job. A refusal is a mistake of the model or a bug.
fn perform(place: &Place, op: &Op, random: &mut Rng) -> Outcome {
    let lost = Outcome::Lost { accepted: false };
    let Some((method, path, body)) = op.request(place.dir()) else { return alone(place, op, random) };
    let begun = Instant::now();
    let (status, answer) = loop {
        match ask(place, method, &path, &body) {
            None => return lost,
            // Its last client is going just now.
            Some((_, answer)) if answer["code"] == "KGM-VMS-0008" && begun.elapsed() < PATIENCE => {}
            Some(other) => break other,
        }
    };
    assert!(status < 300, "{op:?} was refused: {status} {answer}");
    if !op.is_job() {
        return Outcome::Done;
    }
    let look = format!("/api/v1/jobs/{}?wait_seconds=30", answer["id"].as_str().unwrap());
    loop {
        match ask(place, "GET", &look, &Value::Null) {
            None => return Outcome::Lost { accepted: true },
            Some((200, job)) if job["state"] == "running" => {}
            Some((200, job)) if job["state"] == "done" => return Outcome::Done,
            other => panic!("{op:?}: {other:?}"),
        }
    }
}

/// What needs no daemon: it is killed itself as often as not.
fn alone(place: &Place, op: &Op, random: &mut Rng) -> Outcome {
    match op {
        Op::RemovePoolFile => std::fs::remove_file(place.dir().join("p3.pool")).unwrap(),
        _ => {
            let repo = place.dir().join("repo");
            let words = ["backup", "prune", "--repo", repo.to_str().unwrap(), "--keep", "2", "--yes"];
            let mut child = place.command(&words).stderr(std::process::Stdio::null()).spawn().unwrap();
            if random.bool() {
                std::thread::sleep(Duration::from_millis(random.u64(0..40)));
                let _ = child.kill(); // it may have ended
                child.wait().unwrap();
                return Outcome::Lost { accepted: false };
            }
            assert!(child.wait().unwrap().success(), "{op:?}");
        }
    }
    Outcome::Done
}

/// Makes what [`World::at_first`] says, and how far the writer was.
fn first(name: &str) -> (Place, u64) {
    let place = Place::new(name);
    let (p2, repo, off) =
        (place.dir().join("p2.pool"), place.dir().join("repo"), place.dir().join("repo-off"));
    let [p2, repo, off] = [&p2, &repo, &off].map(|p| p.to_str().unwrap());
    place.ok(&["pool", "create", "p1", "--size", "4G"]);
    place.ok(&["pool", "create", "p2", p2, "--size", "1536M"]);
    place.ok(&["datastore", "create", "ds1", "--size", "1G", "--pool", "p1"]);
    place.ok(&["datastore", "create", "ds2", "--size", "1G", "--pool", "p2"]);
    for (vm, store, pool, lun, c) in [
        ("sql01", "ds1", "p1", "w-d", "8M"),
        ("off1", "ds1", "p1", "off-d", "4M"),
        ("guest2", "ds2", "p2", "g-d", "2M"),
    ] {
        place.ok(&["lun", "create", lun, "--size", "4M", "--pool", pool]);
        let rdm = format!("{lun}:physical");
        place.ok(&["vm", "create", vm, "--datastore", store, "--disk", c, "--rdm", &rdm]);
        for slot in SLOTS.iter().filter(|_| vm != "guest2") {
            place.ok(&["export", "start", &format!("{vm}/{slot}")]);
        }
    }
    change_off1(&place, 1);
    let writer = Writer::start(&place, "sql01", 0);
    until("it writes", || writer.so_far() > 20);
    place.ok(&["backup", "create", "sql01", "--repo", repo]);
    place.ok(&["backup", "create", "off1", "--repo", off]);
    (place, writer.end())
}

/// Gives the VM that is restored in place another content.
fn change_off1(place: &Place, fill: u8) {
    for slot in SLOTS {
        write(place, &format!("off1/{slot}"), &[0, 3, 500, 1000], fill);
    }
}

/// Jobs that go on after the restart end, and so do commits.
fn at_rest(place: &Place) -> Vec<Value> {
    let begun = Instant::now();
    loop {
        let jobs = list(place, "jobs");
        let busy = jobs.iter().any(|j| j["state"] == "running")
            || list(place, "vms").iter().any(|vm| vm["state"] == "needs consolidation");
        if !busy {
            return jobs;
        }
        assert!(begun.elapsed() < PATIENCE, "no rest: {jobs:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What the checkers say: clean, or leaks at most on a volume.
fn checkers(place: &Place, pools: &BTreeSet<String>) {
    for line in pools {
        let mut words = line.split(' ');
        let (path, worst) = match (words.next(), words.next()) {
            (Some("pool"), Some(name)) => (format!("/api/v1/pools/{name}/check"), "clean"),
            (Some("datastore"), Some(name)) => (format!("/api/v1/datastores/{name}/check"), "leaks"),
            _ => continue,
        };
        let (_, found) = ask(place, "POST", &path, &Value::Null).unwrap();
        let fits = found["verdict"] == "clean" || found["verdict"] == worst;
        assert!(fits, "{path}: {found}");
    }
    assert_eq!(place.json(&["serve", "--status"])["troubles"], json!([]));
    let down: Vec<Value> = list(place, "exports").into_iter().filter(|e| e["state"] != "serving").collect();
    assert!(down.is_empty(), "{down:?}");
}

/// All files on ds1 belong to somebody, and nobody's are missing. Stops the daemon.
fn files_on_ds1(place: &Place) -> BTreeSet<String> {
    place.on_volume(async |volume| {
        let (mut left, mut files) = (vec![String::new()], BTreeSet::new());
        while let Some(dir) = left.pop() {
            let path = if dir.is_empty() { "/" } else { &dir };
            for entry in volume.list(path).await.unwrap() {
                let path = format!("{dir}/{}", entry.name);
                match entry.kind {
                    InodeKind::Directory => left.push(path),
                    InodeKind::File | InodeKind::Rdm => drop(files.insert(path)),
                    _ => {}
                }
            }
        }
        files
    })
}

/// Content of what was restored.
fn restored(place: &Place, op: &Op, before: Option<&[Vec<u8>; 2]>, backed_up: &[Vec<u8>; 2]) {
    match op {
        Op::RestoreAs { name } => {
            let exports: Vec<String> = SLOTS.iter().map(|slot| format!("{name}/{slot}")).collect();
            for export in &exports {
                place.ok(&["export", "start", export, "--read-only"]);
            }
            prefix(place, name);
            for export in &exports {
                place.ok(&["export", "stop", export, "--yes"]);
            }
        }
        Op::RestoreToLun { name } => {
            place.ok(&["export", "start", name, "--read-only"]);
            assert!(content(place, name).iter().any(|b| *b != 0), "{name} has what was backed up");
            place.ok(&["export", "stop", name, "--yes"]);
        }
        Op::RestoreInPlace => {
            let now = contents(place, "off1");
            assert!(now == *backed_up || before.is_some_and(|b| now == *b), "off1 is neither old nor new");
            // What it held is kept in snapshots until they are removed.
            for lun in list(place, "luns") {
                for snap in lun["snapshots"].as_array().unwrap() {
                    let snap = format!("{}@{}", lun["name"].as_str().unwrap(), snap.as_str().unwrap());
                    if snap.contains("@before-restore-") {
                        place.ok(&["snap", "rm", &snap, "--yes"]);
                    }
                }
            }
        }
        _ => {}
    }
}

struct Test {
    place: Place,
    world: World,
    last: u64,
    backed_up: [Vec<u8>; 2],
}

impl Test {
    /// Requests until the daemon is killed; all is as it must be afterwards. What was done, and what was cut off.
    fn round(&mut self, mut random: Rng, look_at_files: bool) -> (Vec<Op>, Option<Op>) {
        let place = &self.place;
        let fill = random.u8(2..);
        change_off1(place, fill);
        let before = contents(place, "off1");
        let writer = Writer::start(place, "sql01", self.last);
        let (delay, killed) = (Duration::from_millis(random.u64(0..300)), AtomicBool::new(false));
        let (mut done, mut cut_off) = (Vec::new(), None);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(delay);
                killed.store(true, Ordering::Relaxed);
                place.kill_daemon();
            });
            while !killed.load(Ordering::Relaxed) {
                let op = self.world.pick(&mut random);
                match perform(place, &op, &mut random) {
                    Outcome::Done => {
                        self.world.apply(&op);
                        done.push(op);
                    }
                    Outcome::Lost { .. } if matches!(op, Op::Prune) => {
                        self.world.backups.0 = self.world.backups.0.min(2);
                    }
                    Outcome::Lost { accepted } => {
                        cut_off = Some((op, accepted));
                        break;
                    }
                }
            }
        });
        let durable = writer.end();
        place.ok(&["vm", "ls"]); // starts it anew
        self.last = one_prefix(place, "sql01", durable);
        let jobs = at_rest(place);
        self.judge(cut_off.as_ref(), &jobs);
        let place = &self.place;
        assert_eq!(
            prefix(place, "sql01"),
            self.last,
            "what was there before all came to rest is there after it"
        );
        if let Some((op, accepted)) = &cut_off {
            let undone = Some(&before).filter(|_| !accepted);
            self.restored(op, undone);
        }
        done.iter().for_each(|op| self.restored(op, None));
        checkers(place, &self.world.facts());
        if look_at_files {
            assert_eq!(files_on_ds1(place), self.world.files(), "files on ds1: found, wanted");
            place.ok(&["vm", "ls"]);
            assert_eq!(observe(place), self.world.facts(), "after it was stopped and started");
        }
        let repo = place.dir().join("repo");
        let out = place.run(&["backup", "verify", "sql01", "--repo", repo.to_str().unwrap()]);
        assert!(out.status.success(), "{}", both(&out));
        (done, cut_off.map(|(op, _)| op))
    }

    /// What was restored has the content of its backup, unless it was removed again.
    fn restored(&self, op: &Op, before: Option<&[Vec<u8>; 2]>) {
        let facts = self.world.facts();
        let there = match op {
            Op::RestoreAs { name } => facts.iter().any(|f| f.starts_with(&format!("vm {name} "))),
            Op::RestoreToLun { name } => {
                facts.iter().any(|f| f.starts_with(&format!("lun p1/{name} 4194304 [nobody]")))
            }
            _ => true,
        };
        if there {
            restored(&self.place, op, before, &self.backed_up);
        }
    }

    /// All that was answered is there, and what was cut off is there whole or not at all.
    fn judge(&mut self, cut_off: Option<&(Op, bool)>, jobs: &[Value]) {
        let (found, count) = (observe(&self.place), backups(&self.place));
        let fits =
            |world: &World| found == world.facts() && (world.backups.0..=world.backups.1).contains(&count);
        let mut after = self.world.clone();
        let mut wanted = "all that was answered".to_owned();
        let mut may_be_undone = true;
        if let Some((op, accepted)) = cut_off {
            after.apply(op);
            if matches!(op, Op::Backup { .. }) {
                after.backups.1 += 1; // it had ended, and was begun again all the same
            }
            wanted =
                format!("{op:?}, whole{}", if *accepted { ", as it was accepted" } else { " or not at all" });
            may_be_undone = !accepted;
        }
        if fits(&after) {
            self.world = after;
        } else if !(may_be_undone && fits(&self.world)) {
            let missing: Vec<_> = after.facts().difference(&found).cloned().collect();
            let strange: Vec<_> = found.difference(&after.facts()).cloned().collect();
            panic!(
                "wanted {wanted}\nmissing: {missing:#?}\nnot wanted: {strange:#?}\nbackups: {count}, wanted {:?}\n\
                 the last jobs: {:#?}",
                after.backups,
                jobs.iter().rev().take(2).collect::<Vec<_>>()
            );
        }
        self.world.backups = (count, count);
    }
}

#[test]
fn soak_kill_at_any_moment_of_any_command() {
    let kills = if std::env::var_os("KAGAMI_SOAK").is_some() { 500 } else { 20 };
    let given = std::env::var("KAGAMI_SEED").ok().and_then(|s| s.parse::<u64>().ok());
    let seed = given.unwrap_or_else(|| fastrand::u64(..));
    eprintln!("KAGAMI_SEED={seed}");
    let (place, last) = first("killall");
    let backed_up = contents(&place, "off1");
    let mut test = Test { place, world: World::at_first(), last, backed_up };
    assert_eq!(observe(&test.place), test.world.facts(), "at first");
    for round in 0..kills {
        let random = Rng::with_seed(seed.wrapping_add(round));
        eprintln!("round {round}");
        let (done, cut_off) = test.round(random, true);
        eprintln!("round {round}: {} requests were done, cut off: {cut_off:?}", done.len());
    }
    let repo = test.place.dir().join("repo");
    test.place.ok(&["backup", "verify", "--repo", repo.to_str().unwrap()]);
}
