//! The main job in about a minute, through the doors that a user has: REST, NBD, the command line.
//!
//! Pool, VMFS datastore, VM with C: as a VMDK on VMFS and D: as an RDM; a writer process writes to both in turn; backup
//! online by redo logs, then incrementally by a snapshot; each restored as a new VM, and proved over NBD.

mod page;
mod sequence;
mod wire;
mod writer;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hyper::Method;
use lane::Handle;
use serde_json::{Value, json};

use crate::cli::args::{Global, QuickstartArgs, WriterArgs};
use crate::cli::{Client, output, segment, stop};
use crate::files;
use crate::home::Home;
use crate::problem::{Kind, Outcome, Problem};
use crate::units::{parse_disk_size, show_count, show_size};
use page::{BackupLine, Page, ProofLine, Proved, Steps, typed};
use writer::Writer;

/// Size of D: at least: the ring of the writer and some content.
const SMALLEST: u64 = 64 << 20;
/// Writes that must be acknowledged between a cut and the end of its copy.
const WRITES_WANTED: u64 = 1000;
/// The VMs that the backups are restored as.
const COPIES: [&str; 2] = ["sql01-copy1", "sql01-copy2"];

/// The writer process.
pub fn writer(args: &WriterArgs) -> Outcome {
    writer::run(args)
}

/// What lies in the directory of a quickstart.
struct Place {
    dir: PathBuf,
    home: Home,
    repo: PathBuf,
}

impl Place {
    fn at(dir: &Path) -> Outcome<Self> {
        let dir = crate::cli::absolute(dir)?;
        Ok(Self { home: Home::at(&dir.join("home"))?, repo: dir.join("repo"), dir })
    }

    /// The file that says a quickstart was here; written first, so that a removal never takes a directory for its own
    /// that is not.
    fn mark(&self) -> PathBuf {
        self.dir.join("quickstart.json")
    }
}

/// Runs the quickstart.
pub async fn run(global: &Global, args: &QuickstartArgs) -> Outcome {
    let place = Place::at(&args.dir)?;
    if args.remove {
        return remove(&place).await;
    }
    if place.mark().exists() {
        return tell(&place).await;
    }
    let size = parse_disk_size(&args.size, 1 << 20).map_err(|e| Problem::usage(e.to_string()))?;
    if size < SMALLEST {
        return Err(Problem::usage(format!("{} is too small for D:", args.size)).hint("--size 64M or more"));
    }
    if global.dry_run {
        println!("would make a pool, a datastore, a VM and backups in {}", place.dir.display());
        return Ok(());
    }
    prepare(&place)?;
    let page = Run::new(global, &place, size)?.whole(&program()).await?;
    println!("{page}");
    Ok(())
}

/// How to call this program in the lines to type: by its path, unless the shell found it by its name alone.
fn program() -> String {
    let called = std::env::args().next().unwrap_or_default();
    match std::env::current_exe() {
        Ok(path) if called.contains('/') => typed(&path),
        _ => "kagami".to_owned(),
    }
}

fn prepare(place: &Place) -> Outcome {
    let failed = |e: std::io::Error| {
        Problem::failed("KGM-QST-0010", format!("cannot use {}", place.dir.display()), e)
            .hint("kagami quickstart --dir DIR with a directory of your own")
    };
    std::fs::create_dir_all(&place.dir).map_err(failed)?;
    if std::fs::read_dir(&place.dir).map_err(failed)?.next().is_some() {
        return Err(Problem::new(
            "KGM-QST-0011",
            Kind::Refused,
            format!("{} is not empty", place.dir.display()),
        )
        .why("the quickstart wants a directory of its own")
        .hint("kagami quickstart --dir DIR with a new or empty directory"));
    }
    place.home.check_socket_length()?;
    let mark = json!({"made_at": jiff::Timestamp::now().to_string(), "version": env!("CARGO_PKG_VERSION")});
    files::write(&place.mark(), format!("{mark:#}\n").as_bytes()).map_err(failed)
}

/// A second run: what is there, and how it goes away.
async fn tell(place: &Place) -> Outcome {
    let [dir, home, repo] = [place.dir.as_path(), place.home.dir(), place.repo.as_path()].map(typed);
    println!("A quickstart was here already: {}", place.dir.display());
    let client = Client::new(place.home.clone());
    for (noun, path) in [
        ("pool", "/api/v1/pools"),
        ("LUN", "/api/v1/luns"),
        ("datastore", "/api/v1/datastores"),
        ("VM", "/api/v1/vms"),
        ("export", "/api/v1/exports"),
    ] {
        let list = client.get(path).await?;
        let names: Vec<&str> =
            list.as_array().into_iter().flatten().filter_map(|o| o.get("name")?.as_str()).collect();
        println!("  {noun:10} {}", if names.is_empty() { "none".to_owned() } else { names.join(", ") });
    }
    let me = program();
    println!("Look around:");
    println!("    export KAGAMI_HOME={home}");
    println!("    {me} backup ls --repo {repo}");
    println!("    {me} --help");
    println!("Remove everything:");
    println!("    {me} quickstart --dir {dir} --remove");
    Ok(())
}

/// Stops the daemon and removes what the quickstart made; nothing in a directory that it did not make.
async fn remove(place: &Place) -> Outcome {
    if !place.mark().exists() {
        return Err(Problem::new(
            "KGM-QST-0404",
            Kind::NotFound,
            format!("no quickstart in {}", place.dir.display()),
        ));
    }
    stop(&place.home).await?;
    let failed = |e: std::io::Error| {
        Problem::failed("KGM-QST-0012", format!("cannot remove {}", place.dir.display()), e)
    };
    for part in [place.home.dir(), &place.repo] {
        if part.exists() {
            std::fs::remove_dir_all(part).map_err(failed)?;
        }
    }
    std::fs::remove_file(place.mark()).map_err(failed)?;
    // A directory with something of the user's in it stays.
    let gone = std::fs::remove_dir(&place.dir).is_ok();
    println!(
        "removed {}",
        if gone { place.dir.display().to_string() } else { "what the quickstart made".into() }
    );
    Ok(())
}

/// One run under way.
struct Run<'a> {
    place: &'a Place,
    client: Client,
    steps: Steps,
    lane: Handle,
    socket: PathBuf,
    c_bytes: u64,
    d_bytes: u64,
}

/// Exports of the two disks of a VM.
fn disks_of(vm: &str) -> [String; 2] {
    [format!("{vm}/scsi0:0"), format!("{vm}/scsi0:1")]
}

fn text(value: &Value, name: &str) -> String {
    value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn number(value: &Value, name: &str) -> u64 {
    value.get(name).and_then(Value::as_u64).unwrap_or(0)
}

impl<'a> Run<'a> {
    fn new(global: &Global, place: &'a Place, size: u64) -> Outcome<Self> {
        let lane = lane::start(lane::Options { name: "quickstart".into(), ..Default::default() })
            .map_err(|e| Problem::failed("KGM-QST-0013", "the quickstart cannot start", e))?;
        Ok(Self {
            place,
            client: Client::new(place.home.clone()),
            steps: Steps::new(&output(global), 11),
            lane,
            socket: place.home.nbd_socket(),
            c_bytes: (size / 2).next_multiple_of(1 << 20),
            d_bytes: size,
        })
    }

    async fn post(&self, path: &str, body: Value) -> Outcome<Value> {
        self.client.send(Method::POST, path, Some(body)).await
    }

    async fn whole(mut self, program: &str) -> Outcome<String> {
        self.steps.next("start the daemon in a home of its own");
        self.client.get("/api/v1/daemon").await?;
        self.steps.next("make a pool, a VMFS-5 datastore on a LUN, a LUN for D:");
        let naa = self.make_storage().await?;
        self.steps.next("make VM sql01: C: a VMDK on VMFS, D: a raw device mapping");
        self.make_vm().await?;
        self.steps.next("fill both disks over NBD");
        self.fill().await?;
        self.steps.next("start the writer: C: and D: in turn, each write acknowledged");
        let begun = Instant::now();
        let mut writer = Writer::start(&self.socket, &disks_of("sql01"))?;
        self.wait_for_writes(&mut writer, WRITES_WANTED / 2).await?;
        // The copy of a small disk is over in a moment. It is held to a rate at which the writer, as fast as this
        // machine lets it be, gets on well past what is wanted while the disks are read.
        let time = (begun.elapsed() * 5).clamp(Duration::from_secs(3), Duration::from_secs(90));
        let rate = |bytes: u64| (bytes as f64 / time.as_secs_f64()) as u64;
        self.steps.next("backup 1, online, by redo logs (vmsnap): everything");
        let first = self.back_up(&mut writer, "redo", rate(self.d_bytes / 3)).await?;
        let first = self.prove(1, first).await?;
        let so_far = writer.acknowledged();
        self.wait_for_writes(&mut writer, so_far + 500).await?;
        // What changed since is what the writer wrote: at most its ring on each of the two disks.
        let blocks = (writer.since(first.backup.cut_at_us) / 2).min(sequence::RING_BLOCKS);
        self.steps.next("backup 2, online, by a snapshot: only what changed");
        let second = self.back_up(&mut writer, "snapshot", rate(2 * blocks * block::BLOCK_BYTES)).await?;
        let writes = writer.stop()?;
        let second = self.prove(2, second).await?;
        self.steps.done("");
        let page = Page {
            dir: &self.place.dir,
            home: self.place.home.dir(),
            repo: &self.place.repo,
            c_bytes: self.c_bytes,
            d_bytes: self.d_bytes,
            naa: &naa,
            proved: &[first, second],
            writes,
            total: self.steps.elapsed(),
            program,
        };
        Ok(page.render())
    }

    /// Pool, datastore and D:'s LUN; the LUN's NAA identity.
    async fn make_storage(&self) -> Outcome<String> {
        // VMFS-5 needs 768 MiB at least; C:, its redo log and two restored C: must fit. The pool is a sparse file.
        let datastore = (self.c_bytes * 4 + (1 << 30)).next_multiple_of(1 << 20);
        let pool = (datastore + self.d_bytes * 4 + (1 << 30)).next_multiple_of(1 << 20);
        self.post("/api/v1/pools", json!({"name": "pool1", "size_bytes": pool})).await?;
        self.post("/api/v1/datastores", json!({"name": "ds1", "size_bytes": datastore})).await?;
        let lun = self.post("/api/v1/luns", json!({"name": "sql01-d", "size_bytes": self.d_bytes})).await?;
        Ok(text(&lun, "naa"))
    }

    async fn make_vm(&self) -> Outcome {
        let vm = json!({
            "name": "sql01",
            "datastore": "ds1",
            "disks": [self.c_bytes],
            "rdms": [{"lun": "sql01-d", "mode": "physical"}],
            "memory_mib": 1024,
        });
        self.post("/api/v1/vms", vm).await?;
        for target in disks_of("sql01") {
            self.post("/api/v1/exports", json!({"target": target})).await?;
        }
        Ok(())
    }

    async fn fill(&mut self) -> Outcome {
        let mut filled = 0;
        for (export, bytes, seed) in disks_of("sql01")
            .into_iter()
            .zip([self.c_bytes, self.d_bytes])
            .zip([1, 2])
            .map(|((e, b), s)| (e, b, s))
        {
            // A third of the disk, the ring at its end left out.
            let content = (bytes / 3) >> 20 << 20;
            let socket = self.socket.clone();
            self.lane.run(move || wire::populate(socket, export, content, seed)).await?;
            filled += content;
        }
        self.steps.done(&show_size(filled));
        Ok(())
    }

    async fn wait_for_writes(&self, writer: &mut Writer, wanted: u64) -> Outcome {
        let begun = Instant::now();
        while writer.acknowledged() < wanted {
            if !writer.is_running() || begun.elapsed() > Duration::from_secs(60) {
                return Err(Problem::new("KGM-QST-0014", Kind::Failed, "the writer does not get on")
                    .why(format!("{} writes were acknowledged", writer.acknowledged())));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Follows a job to its end; its result.
    async fn job(&self, path: &str, body: Value) -> Outcome<Value> {
        let job = self.post(path, body).await?;
        let look = format!("/api/v1/jobs/{}?wait_seconds=30", segment(&text(&job, "id")));
        loop {
            let job = self.client.get(&look).await?;
            if let Some(problem) = job.get("problem").filter(|p| !p.is_null()) {
                return Err(serde_json::from_value(problem.clone())
                    .unwrap_or_else(|e| Problem::failed("KGM-QST-0015", "a job failed", e)));
            }
            if text(&job, "state") != "running" {
                return Ok(job.get("result").cloned().unwrap_or_default());
            }
        }
    }

    async fn back_up(&mut self, writer: &mut Writer, via: &str, limit: u64) -> Outcome<BackupLine> {
        let body = json!({
            "vm": "sql01",
            "repo": self.place.repo,
            "via": via,
            "keep_frozen": true,
            "limit_bytes_per_second": limit,
        });
        let begun = Instant::now();
        let done = self.job("/api/v1/backups", body).await?;
        let time = begun.elapsed();
        let moment = |name: &str| done.get(name).and_then(Value::as_i64).unwrap_or(0);
        let line = BackupLine {
            id: text(&done, "id"),
            via: via.to_owned(),
            kind: text(&done, "kind"),
            label: text(&done, "label"),
            size_bytes: number(&done, "size_bytes"),
            read_bytes: number(&done, "read_bytes"),
            stored_bytes: number(&done, "stored_bytes"),
            hold: Duration::from_micros(number(&done, "hold_us")),
            time,
            cut_at_us: moment("cut_at_us"),
            writes_meanwhile: writer.between(moment("cut_at_us"), moment("copied_at_us")),
        };
        self.steps.done(&format!(
            "{} read, {} writes meanwhile",
            show_size(line.read_bytes),
            line.writes_meanwhile
        ));
        if line.writes_meanwhile < WRITES_WANTED {
            return Err(Problem::new(
                "KGM-QST-0016",
                Kind::Failed,
                "the writer wrote too little during the copy",
            )
            .why(format!(
                "{} writes were acknowledged between the cut and the end of the copy, {} are wanted",
                show_count(line.writes_meanwhile),
                show_count(WRITES_WANTED)
            ))
            .hint(format!(
                "{} quickstart --dir {} --remove, then again when the machine has less to do",
                program(),
                typed(&self.place.dir)
            )));
        }
        Ok(line)
    }

    /// Restores a backup as a new VM, and compares that with what was frozen.
    async fn prove(&mut self, nth: usize, backup: BackupLine) -> Outcome<Proved> {
        let vm = COPIES[nth - 1];
        self.steps.next(&format!("restore backup {nth} as a new VM, {vm}"));
        let begun = Instant::now();
        let body = json!({"backup": backup.id, "repo": self.place.repo, "new_vm": vm});
        let done = self.job("/api/v1/restores", body).await?;
        for target in disks_of(vm) {
            self.post("/api/v1/exports", json!({"target": target, "read_only": true})).await?;
        }
        let (restored_bytes, restore_time) = (number(&done, "written_bytes"), begun.elapsed());
        self.steps.done(&format!("{} written", show_size(restored_bytes)));
        self.steps.next("prove it: byte for byte over NBD, and one instant");
        let disks = self.compare(vm, &backup.id).await?;
        let prefix = self.prefix(vm).await?;
        self.steps.done(&format!("writes 1 to {}", show_count(prefix)));
        Ok(Proved { backup, vm: vm.to_owned(), restored_bytes, restore_time, disks, prefix })
    }

    /// The restored disks against the frozen images, both read over NBD.
    async fn compare(&self, vm: &str, backup: &str) -> Outcome<Vec<ProofLine>> {
        let mut lines = Vec::new();
        let frozen = disks_of("sql01@backup");
        for ((restored, frozen), drive) in disks_of(vm).into_iter().zip(frozen).zip(["C:", "D:"]) {
            let socket = self.socket.clone();
            let compared = self.lane.run(move || wire::compare(socket, restored, frozen)).await?;
            if let Some(at) = compared.differs_at {
                return Err(Problem::new(
                    "KGM-QST-0017",
                    Kind::Corrupt,
                    format!("{drive} was not restored right"),
                )
                .why(format!("it differs from the frozen image of {backup} at byte {at}")));
            }
            let [hash, _] = compared.hashes;
            lines.push(ProofLine { drive: drive.to_owned(), bytes: compared.bytes, hash });
        }
        Ok(lines)
    }

    /// The newest write that both restored disks hold, with all before it and none after.
    async fn prefix(&self, vm: &str) -> Outcome<u64> {
        let mut rings = Vec::new();
        for restored in disks_of(vm) {
            let socket = self.socket.clone();
            rings.push(self.lane.run(move || wire::ring(socket, restored)).await?);
        }
        let prefix = sequence::check_prefix(&rings).map_err(|why| {
            Problem::new("KGM-QST-0018", Kind::Corrupt, "C: and D: are not of one instant").why(why)
        })?;
        Ok(prefix.last)
    }
}
