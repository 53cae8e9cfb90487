//! `backup`, `restore`, `vmsnap`: what the daemon does as a job, and what a repository alone answers.

use std::path::Path;
use std::time::{Duration, Instant};

use backup::{BackupId, Depth, Manifest, Progress, Repository};
use hyper::Method;
use serde_json::{Value, json};

use super::args::{BackupVerb, Global, RestoreArgs, VmsnapArgs};
use super::nouns::{absolute, via_name};
use super::session::output;
use super::{Session, columns, stdout_failed};
use crate::output::Show::{Size, Text, Time};
use crate::output::{Column, Format, Output, col, wide};
use crate::problem::{Kind, Outcome, Problem};
use crate::units::{parse_size, show_duration, show_rate, show_size};

/// Backups in a repository.
const BACKUP: &[Column] = &[
    col("id", "id", Text),
    col("vm", "vm", Text),
    col("created", "created_at", Time),
    col("label", "label", Text),
    col("kind", "kind", Text),
    col("size", "size_bytes", Size),
    col("read", "read_bytes", Size),
    col("stored", "stored_bytes", Size),
    wide("base", "base", Text),
    wide("files", "files", Text),
    wide("trouble", "trouble", Text),
];

/// Disks of a backup.
const BACKUP_DISK: &[Column] = &[
    col("disk", "name", Text),
    col("kind", "kind", Text),
    col("size", "size_bytes", Size),
    col("data", "allocated_bytes", Size),
    col("changed", "changed_bytes", Size),
    col("read", "read_bytes", Size),
    col("audited", "audited_bytes", Size),
    wide("cut", "cut", Text),
    wide("tracking", "tracking", Text),
];

/// What went wrong with a repository.
pub fn repository_problem(what: impl Into<String>, error: &backup::Error) -> Problem {
    use backup::Error;
    let (code, kind, hint) = match error {
        Error::NotARepository { .. } => {
            ("KGM-BKP-0405", Kind::NotFound, "kagami backup create VM --repo DIR makes one")
        }
        Error::NoBackup { .. } => ("KGM-BKP-0404", Kind::NotFound, "kagami backup ls --repo DIR"),
        Error::NoMember { .. } => ("KGM-BKP-0406", Kind::NotFound, "kagami backup show BACKUP --repo DIR"),
        Error::Exists { .. } => ("KGM-BKP-0409", Kind::Conflict, "another name, or remove it first"),
        Error::Locked { .. } => ("KGM-BKP-0410", Kind::Conflict, "wait for it, or end it"),
        Error::NoSpace { .. } => (
            "KGM-BKP-0013",
            Kind::Failed,
            "make room: kagami backup prune --repo DIR --keep N; what was stored is used by the next attempt",
        ),
        Error::Refused(_) => ("KGM-BKP-0014", Kind::Usage, "kagami restore --help"),
        Error::Ambiguous { .. } => ("KGM-BKP-0002", Kind::Usage, "write more of the id"),
        Error::NewerFormat { .. } | Error::UnknownFeatures { .. } => {
            ("KGM-BKP-0003", Kind::Refused, "use the kagami that wrote it")
        }
        _ if error.is_damage() => ("KGM-BKP-0004", Kind::Corrupt, "kagami backup verify --repo DIR"),
        _ => ("KGM-BKP-0005", Kind::Failed, "the daemon's log and kagami job ls tell more"),
    };
    Problem::new(code, kind, what).why(error).hint(hint)
}

/// Opens a repository that must be there.
pub fn open(repo: &Path) -> Outcome<Repository> {
    Repository::open(repo, backup::Options::default())
        .map_err(|e| repository_problem(format!("cannot use the repository {}", repo.display()), &e))
}

/// The backup that a word names: an id, the beginning of one, or a VM's name for its latest.
pub fn resolve(repository: &Repository, word: &str) -> Outcome<BackupId> {
    let title = format!("there is no backup \"{word}\"");
    match repository.resolve(word) {
        Err(error @ backup::Error::NoBackup { .. }) => {
            repository.resolve(&format!("{word}@latest")).map_err(|_| repository_problem(title, &error))
        }
        other => other.map_err(|e| repository_problem(title, &e)),
    }
}

/// How the disks of a backup were copied, in one word.
fn kind(manifest: &Manifest) -> &'static str {
    let incremental = |d: &backup::DiskRecord| d.mode == backup::Mode::Incremental;
    match (manifest.disks.iter().all(incremental), manifest.disks.iter().any(incremental)) {
        (true, true) => "incremental",
        (_, true) => "mixed",
        _ => "full",
    }
}

fn disk_row(disk: &backup::DiskRecord) -> Value {
    json!({
        "name": disk.name,
        "kind": match disk.mode { backup::Mode::Full => "full", backup::Mode::Incremental => "incremental" },
        "size_bytes": disk.length_bytes,
        "allocated_bytes": disk.allocated_bytes,
        "changed_bytes": disk.changed_bytes,
        "read_bytes": disk.read_bytes,
        "resumed_at_bytes": disk.resumed_at_bytes,
        "audited_bytes": disk.audited_bytes,
        "cut": disk.cut.map(|c| format!("{} {}", c.counter, c.id)),
        "tracking": disk.tracking,
        "metadata": disk.metadata,
    })
}

/// A backup as REST, `-o json` and tables show it.
pub fn manifest_row(manifest: &Manifest) -> Value {
    let sum = |of: fn(&backup::DiskRecord) -> u64| manifest.disks.iter().map(of).sum::<u64>();
    json!({
        "id": manifest.id.to_string(),
        "name": manifest.id.to_string(),
        "vm": manifest.name,
        "created_at": manifest.created_at.to_string(),
        "label": manifest.label.to_string(),
        "kind": kind(manifest),
        "base": manifest.base.map(|b| b.to_string()),
        "size_bytes": sum(|d| d.length_bytes),
        "read_bytes": sum(|d| d.read_bytes),
        "resumed_at_bytes": sum(|d| d.resumed_at_bytes),
        "stored_bytes": manifest.stored_bytes,
        "disks": manifest.disks.iter().map(disk_row).collect::<Vec<_>>(),
        "files": manifest.files.iter().map(|f| f.name.clone()).collect::<Vec<_>>(),
        "metadata": manifest.metadata,
    })
}

/// One verb of `backup`; its exit code.
pub async fn backup(global: &Global, verb: &BackupVerb) -> Outcome<u8> {
    let out = output(global);
    match verb {
        BackupVerb::Create { vms, repo, via, full, limit, reserve, detach } => {
            let rate = |text: &String| parse_size(text.trim_end_matches("/s"));
            let limit = limit.as_ref().map(rate).transpose().map_err(|e| Problem::usage(e.to_string()))?;
            let body = json!({
                "vm": vms.first(),
                "also": vms.get(1..),
                "repo": absolute(repo)?,
                "via": via_name(*via),
                "full": full,
                "limit_bytes_per_second": limit,
                "reserve": reserve,
            });
            let session = Session::open(global)?;
            if let Some(done) = session.job("/api/v1/backups", body, *detach).await? {
                print_backups(&session.out, done)?;
            }
        }
        BackupVerb::Ls { repo } => {
            let listed = open(repo)?.list().map_err(|e| repository_problem("cannot list the backups", &e))?;
            let rows: Vec<Value> = listed
                .into_iter()
                .map(|l| match l.manifest {
                    Ok(manifest) => manifest_row(&manifest),
                    Err(e) => {
                        let id = l.id.to_string();
                        json!({"id": id, "name": id, "kind": "damaged", "trouble": e.to_string()})
                    }
                })
                .collect();
            out.list(&rows, BACKUP).map_err(stdout_failed)?;
        }
        BackupVerb::Show { backup, repo } => show(&out, &open(repo)?, backup)?,
        BackupVerb::Verify { backup, repo } => return verify(&out, &open(repo)?, backup.as_deref()),
        BackupVerb::Rm { backup, repo } => remove(global, &out, &open(repo)?, backup)?,
        BackupVerb::Prune { repo, keep, vm } => prune(global, &out, &open(repo)?, *keep, vm.as_deref())?,
    }
    Ok(0)
}

/// The result of a backup: one, or several that were cut together.
fn print_backups(out: &Output, done: Value) -> Outcome {
    match done.get("backups").and_then(Value::as_array) {
        None => print_done(out, done, columns::BACKUP_DONE),
        Some(_) if matches!(out.format, Format::Json | Format::Jsonl) => {
            out.object(&done, &[]).map_err(stdout_failed)
        }
        Some(rows) => out.list(rows, BACKUP).map_err(stdout_failed),
    }
}

/// The result of a job, with hold and time in words.
fn print_done(out: &Output, mut done: Value, columns: &[Column]) -> Outcome {
    if let Some(hold) = done.get("hold_us").and_then(Value::as_u64) {
        done["hold"] = json!(show_duration(Duration::from_micros(hold)));
    }
    if let Some(seconds) = done.get("seconds").and_then(Value::as_f64) {
        done["time"] = json!(show_duration(Duration::from_secs_f64(seconds.max(0.0))));
    }
    out.object(&done, columns).map_err(stdout_failed)
}

fn show(out: &Output, repository: &Repository, word: &str) -> Outcome {
    let id = resolve(repository, word)?;
    let manifest =
        repository.manifest(id).map_err(|e| repository_problem(format!("cannot read backup {id}"), &e))?;
    let row = manifest_row(&manifest);
    out.object(&row, BACKUP).map_err(stdout_failed)?;
    if matches!(out.format, crate::output::Format::Table | crate::output::Format::Wide) && !out.quiet {
        println!();
        let disks: Vec<Value> = manifest.disks.iter().map(disk_row).collect();
        out.list(&disks, BACKUP_DISK).map_err(stdout_failed)?;
        let planned = row["metadata"]["disks"].as_array().into_iter().flatten();
        for left in planned.filter(|disk| disk["in"] == json!(false)) {
            let text = |key: &str| left[key].as_str().unwrap_or_default();
            println!("{} is not in it: {}", text("slot"), text("why"));
        }
    }
    Ok(())
}

/// Shows the progress of work that blocks this thread, on stderr.
fn watched<T: Send>(out: &Output, what: &str, work: impl FnOnce(&Progress) -> T + Send) -> T {
    let progress = Progress::new();
    if !out.progress() {
        return work(&progress);
    }
    let (ended, end) = std::sync::mpsc::channel::<()>();
    let seen = progress.clone();
    let bar = crate::cli::session::progress_bar();
    bar.set_message(what.to_owned());
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while end
                .recv_timeout(Duration::from_millis(200))
                .is_err_and(|e| e == std::sync::mpsc::RecvTimeoutError::Timeout)
            {
                bar.set_length(seen.total_bytes());
                bar.set_position(seen.done_bytes());
            }
            bar.finish_and_clear();
        });
        let result = work(&progress);
        drop(ended);
        result
    })
}

fn verify(out: &Output, repository: &Repository, word: Option<&str>) -> Outcome<u8> {
    const COLUMNS: &[Column] = &[
        col("backup", "name", Text),
        col("verdict", "verdict", Text),
        col("checked", "checked_bytes", Size),
        col("time", "time", Text),
        col("findings", "findings", Text),
    ];
    let begun = Instant::now();
    let (name, report) = match word {
        Some(word) => {
            let id = resolve(repository, word)?;
            (id.to_string(), watched(out, "verify", |p| repository.verify(id, Depth::Deep, p)))
        }
        None => ("all".to_owned(), watched(out, "verify", |p| repository.check(Depth::Deep, p))),
    };
    let report = report.map_err(|e| repository_problem("cannot verify", &e))?;
    let mut findings: Vec<String> =
        report.findings.iter().map(|f| format!("{}: {}", f.damage, f.error)).collect();
    if report.further > 0 {
        findings.push(format!("and {} more", report.further));
    }
    let row = json!({
        "name": name,
        "verdict": if report.is_clean() { "clean" } else { "corrupt" },
        "checked_bytes": report.checked_bytes,
        "time": format!("{} ({})", show_duration(begun.elapsed()), show_rate(report.checked_bytes, begun.elapsed())),
        "findings": findings,
    });
    out.object(&row, COLUMNS).map_err(stdout_failed)?;
    Ok(if report.is_clean() { 0 } else { 2 })
}

fn remove(global: &Global, out: &Output, repository: &Repository, word: &str) -> Outcome {
    let id = resolve(repository, word)?;
    if global.dry_run {
        println!("would remove backup {id} and give back the space that only it needs");
        return Ok(());
    }
    if !global.yes {
        super::session::confirm_loss(&[format!("backup {id}")], 0, "backup", word)?;
    }
    repository.remove(id).map_err(|e| repository_problem(format!("cannot remove backup {id}"), &e))?;
    let pruned = watched(out, "prune", |p| repository.prune(false, p))
        .map_err(|e| repository_problem("the backup is removed, but its space was not given back", &e))?;
    eprintln!("removed backup {id}; {} of packs given back", show_size(pruned.removed_bytes));
    Ok(())
}

/// Backups of each VM that are not among its newest `keep`. Damaged ones are nobody's and stay.
fn older(repository: &Repository, keep: usize, vm: Option<&str>) -> Outcome<Vec<Manifest>> {
    let listed = repository.list().map_err(|e| repository_problem("cannot list the backups", &e))?;
    let mut sealed: Vec<Manifest> = listed.into_iter().filter_map(|l| l.manifest.ok()).collect();
    sealed.retain(|m| vm.is_none_or(|vm| vm == m.name));
    sealed.sort_by_key(|m| std::cmp::Reverse((m.created_at, m.id.to_string())));
    let mut seen = std::collections::BTreeMap::new();
    sealed.retain(|m| {
        let count = seen.entry(m.name.clone()).or_insert(0_usize);
        *count += 1;
        *count > keep
    });
    Ok(sealed)
}

/// Removes older backups, and gives back the space that no backup needs.
fn prune(
    global: &Global,
    out: &Output,
    repository: &Repository,
    keep: Option<usize>,
    vm: Option<&str>,
) -> Outcome {
    if keep == Some(0) {
        return Err(Problem::usage("to keep none is no pruning").hint("kagami backup rm BACKUP removes one"));
    }
    let old = keep.map(|keep| older(repository, keep, vm)).transpose()?.unwrap_or_default();
    let named: Vec<String> =
        old.iter().map(|m| format!("backup {} of {}, {}", m.id, m.name, m.created_at)).collect();
    let failed = |e: &backup::Error| repository_problem("the space was not given back", e);
    if global.dry_run {
        named.iter().for_each(|line| println!("would remove {line}"));
        // What the older ones hold is not known before they are gone: this is what nobody needs already.
        let now = watched(out, "prune", |p| repository.prune(true, p)).map_err(|e| failed(&e))?;
        println!("would give back {} of packs that no backup needs now", show_size(now.removed_bytes));
        return Ok(());
    }
    if !global.yes && !named.is_empty() {
        let name = vm.unwrap_or("all");
        super::session::confirm_loss(&named, 0, "VM whose backups go", name)?;
    }
    for manifest in &old {
        let title = format!("cannot remove backup {}", manifest.id);
        repository.remove(manifest.id).map_err(|e| repository_problem(title, &e))?;
        eprintln!("removed backup {} of {}", manifest.id, manifest.name);
    }
    let pruned = watched(out, "prune", |p| repository.prune(false, p)).map_err(|e| failed(&e))?;
    let row = json!({
        "removed": old.iter().map(|m| m.id.to_string()).collect::<Vec<_>>(),
        "packs": pruned.packs,
        "removed_packs": pruned.removed_packs,
        "given_back_bytes": pruned.removed_bytes,
        "moved_bytes": pruned.moved_bytes,
    });
    const COLUMNS: &[Column] = &[
        col("removed", "removed", Text),
        col("packs removed", "removed_packs", Text),
        col("given back", "given_back_bytes", Size),
        col("moved", "moved_bytes", Size),
    ];
    out.object(&row, COLUMNS).map_err(stdout_failed)
}

/// `restore`.
pub async fn restore(global: &Global, args: &RestoreArgs) -> Outcome {
    if args.undo || args.accept {
        return undo_or_accept(global, args).await;
    }
    let Some(repo) = &args.repo else {
        return Err(Problem::usage("from which repository?").hint("--repo DIR"));
    };
    if let Some(file) = &args.to {
        return restore_to_file(global, args, repo, file);
    }
    if args.r#as.is_none() && !args.in_place && args.to_lun.is_none() {
        return Err(Problem::usage("where to?").hint(
            "--as NAME for a new VM, --in-place over the old one, --to FILE or --to-lun NAME for one disk",
        ));
    }
    let rate = |text: &String| parse_size(text.trim_end_matches("/s"));
    let limit = args.limit.as_ref().map(rate).transpose().map_err(|e| Problem::usage(e.to_string()))?;
    let body = json!({
        "backup": args.backup, "repo": absolute(repo)?, "new_vm": args.r#as, "in_place": args.in_place,
        "new_lun": args.to_lun, "map": args.map, "force": args.force, "limit_bytes_per_second": limit,
        "disk": args.disk, "datastore": args.datastore, "pool": args.pool,
    });
    let session = Session::open(global)?;
    if args.in_place && !global.yes && !global.dry_run {
        let loss = format!(
            "what {} holds now, where it differs from the backup",
            args.disk.as_deref().unwrap_or("the VM")
        );
        super::session::confirm_loss(&[loss], 0, "backup", &args.backup)?;
    }
    if let Some(done) = session.job("/api/v1/restores", body, args.detach).await? {
        print_done(&session.out, done, columns::RESTORE_DONE)?;
    }
    Ok(())
}

/// Ends what a restore in place began: back to what was there before, or for good.
async fn undo_or_accept(global: &Global, args: &RestoreArgs) -> Outcome {
    let (session, body) = (Session::open(global)?, json!({"vm": args.backup}));
    let path = if args.undo { "/api/v1/restores/undo" } else { "/api/v1/restores/accept" };
    if args.accept {
        return session.destroy(Method::POST, path, Some(body), "restore of VM", &args.backup).await;
    }
    if !global.yes && !global.dry_run {
        let loss = format!("what {} holds now, where it differs from before the restore", args.backup);
        super::session::confirm_loss(&[loss], 0, "VM", &args.backup)?;
    }
    if let Some(done) = session.job(path, body, args.detach).await? {
        print_done(&session.out, done, columns::RESTORE_DONE)?;
    }
    Ok(())
}

fn restore_to_file(global: &Global, args: &RestoreArgs, repo: &Path, file: &Path) -> Outcome {
    let repository = open(repo)?;
    let id = resolve(&repository, &args.backup)?;
    let manifest =
        repository.manifest(id).map_err(|e| repository_problem(format!("cannot read backup {id}"), &e))?;
    let names: Vec<&str> = manifest.disks.iter().map(|d| d.name.as_str()).collect();
    let disk = match (&args.disk, names.as_slice()) {
        (Some(disk), _) => disk.clone(),
        (None, [only]) => (*only).to_owned(),
        (None, _) => {
            return Err(Problem::usage("the backup has several disks")
                .hint(format!("--disk with one of {}", names.join(", "))));
        }
    };
    if global.dry_run {
        println!("would write disk {disk} of backup {id} to {}", file.display());
        return Ok(());
    }
    let out = output(global);
    let vmdk = file.extension().is_some_and(|e| e == "vmdk");
    let begun = Instant::now();
    watched(&out, "restore", |p| match vmdk {
        true => repository.restore_to_vmdk(&manifest, &disk, file, p).map(drop),
        false => repository.restore_to_raw(&manifest, &disk, file, p),
    })
    .map_err(|e| repository_problem(format!("cannot restore to {}", file.display()), &e))?;
    if !out.quiet {
        eprintln!("disk {disk} of backup {id} -> {} in {}", file.display(), show_duration(begun.elapsed()));
    }
    Ok(())
}

/// `vmsnap`: a backup by redo logs of one VM, or of all; one that fails does not stop the others.
pub async fn vmsnap(global: &Global, args: &VmsnapArgs) -> Outcome<u8> {
    let session = Session::open(global)?;
    let repo = absolute(&args.repo)?;
    let vms: Vec<String> = match &args.vm {
        Some(vm) => vec![vm.clone()],
        None => {
            let list = session.get("/api/v1/vms").await?;
            let names = list.as_array().into_iter().flatten().filter_map(|v| v.get("name")?.as_str());
            names.map(str::to_owned).collect()
        }
    };
    let (mut failed, mut last) = (0, None);
    for vm in &vms {
        let body = json!({"vm": vm, "repo": repo, "via": "redo", "reserve": args.reserve});
        match session.job("/api/v1/backups", body, false).await {
            Ok(Some(done)) => print_done(&session.out, done, columns::BACKUP_DONE)?,
            Ok(None) => {}
            Err(problem) => {
                eprintln!("kagami: {vm}: {}", problem.lines());
                (failed, last) = (failed + 1, Some(problem));
            }
        }
    }
    match last {
        Some(problem) if vms.len() == 1 => Err(problem),
        Some(_) => {
            Err(Problem::new("KGM-BKP-0007", Kind::Partial, format!("{failed} of {} VMs failed", vms.len())))
        }
        None => Ok(0),
    }
}

/// A directory as `inspect` sees it.
pub fn inspect(directory: &Path) -> Outcome<Value> {
    match Repository::open(directory, backup::Options::default()) {
        Ok(repository) => {
            let count = repository.list().map(|l| l.len()).unwrap_or(0);
            Ok(json!({
                "file": directory,
                "is": "backup repository",
                "id": repository.id().to_string(),
                "holds": format!("{count} backups: kagami backup ls --repo {}", directory.display()),
            }))
        }
        Err(backup::Error::NotARepository { .. }) => {
            Ok(json!({"file": directory, "is": "a directory that is no repository"}))
        }
        Err(e) => Err(repository_problem(format!("cannot read {}", directory.display()), &e)),
    }
}
