//! Volumes: making, listing, looking at, checking.

use std::path::Path;
use std::time::SystemTime;

use serde_json::{Value, json};
use vmdisk::rdm::{Around, Facts};
use vmfs::format::InodeKind;
use vmfs::{Entry, Mode, NewVolume, Volume};

use super::open::media_problem;
use super::{Opened, open_for_reading, open_for_writing, time, vmfs_problem};
use crate::cli::args::Global;
use crate::cli::stdout_failed;
use crate::names::clean_path;
use crate::output::Show::{Count, Size, Text};
use crate::output::{Column, Output, col};
use crate::problem::{Kind, Outcome, Problem};
use crate::units::{parse_disk_size, show_size};

/// Directories below each other that a recursive listing follows.
const DEPTH_MAX: usize = 64;
/// Mappings are followed by links of this length.
const SECTOR: u64 = 512;

/// Makes a volume in a new file of `size`, or on what is there.
pub async fn create(
    global: &Global,
    out: &Output,
    image: &Path,
    size: Option<&str>,
    version: u32,
    label: &str,
    force: bool,
) -> Outcome {
    let bytes =
        size.map(|s| parse_disk_size(s, SECTOR)).transpose().map_err(|e| Problem::usage(e.to_string()))?;
    let shown = image.display();
    if let crate::names::Image::Lun { .. } = crate::names::Image::parse(&shown.to_string()) {
        return Err(Problem::new("KGM-IMG-0002", Kind::Refused, format!("{shown} is not written to"))
            .why("a LUN in a pool's file is opened read-only without the daemon")
            .hint("kagami datastore create NAME --lun LUN, through the daemon"));
    }
    let exists = image.exists();
    if global.dry_run {
        println!("would make a VMFS-{version} \"{label}\" on {shown}");
        return Ok(());
    }
    let disk = match (exists, bytes) {
        (false, Some(bytes)) => media::create(image, bytes / SECTOR, media::Options::default()).await,
        (true, None) => media::open(image, media::Options::default()).await,
        (true, Some(bytes)) => {
            let disk =
                media::open(image, media::Options::default()).await.map_err(|e| media_problem(image, &e))?;
            let has = block::Disk::shape(&*disk).bytes();
            if has > bytes {
                return Err(Problem::new(
                    "KGM-VFS-0010",
                    Kind::Refused,
                    format!("{shown} is larger than --size"),
                )
                .why(format!("it has {} and is never made smaller", show_size(has))));
            }
            disk.grow(bytes / SECTOR).await.map(|()| disk)
        }
        (false, None) => {
            return Err(Problem::new("KGM-IMG-0404", Kind::NotFound, format!("there is no {shown}"))
                .hint(format!("kagami vmfs create {shown} --size 1G")));
        }
    };
    let disk = disk.map_err(|e| media_problem(image, &e))?;
    let version = u8::try_from(version).unwrap_or(u8::MAX);
    let new = NewVolume { version, force, ..NewVolume::new(label, 1, SystemTime::now()) };
    let created = vmfs::create(vec![disk], &new).await.map_err(|e| create_problem(&shown.to_string(), &e));
    if created.is_err() && !exists {
        let _ = std::fs::remove_file(image); // it was ours, and the error below says more
    }
    let created = created?;
    let row = json!({
        "id": created.file_system_uuid.to_string(),
        "name": label,
        "version": format!("VMFS-{version}"),
        "size_bytes": created.bytes,
        "block_bytes": created.geometry.block_bytes,
    });
    out.object(&row, super::VOLUME).map_err(stdout_failed)
}

/// A volume could not be made.
pub fn create_problem(what: &str, error: &vmfs::create::CreateError) -> Problem {
    use vmfs::create::CreateError;
    let title = format!("no volume was made on {what}");
    match error {
        CreateError::Occupied { .. } => {
            Problem::new("KGM-VFS-0011", Kind::Refused, title).why(error).hint("--force overwrites it")
        }
        CreateError::Disk(_) => Problem::failed("KGM-VFS-0012", title, error),
        _ => Problem::new("KGM-VFS-0013", Kind::Usage, title).why(error),
    }
}

fn kind_name(kind: InodeKind) -> &'static str {
    match kind {
        InodeKind::Directory => "directory",
        InodeKind::File => "file",
        InodeKind::Symlink => "symlink",
        InodeKind::System => "system",
        InodeKind::Rdm => "rdm",
    }
}

/// `-rw-r--r--`.
fn mode_text(kind: InodeKind, mode: u32) -> String {
    let first = match kind {
        InodeKind::Directory => 'd',
        InodeKind::Symlink => 'l',
        InodeKind::Rdm => 'r',
        InodeKind::File | InodeKind::System => '-',
    };
    let mut text = String::from(first);
    for shift in [6, 3, 0] {
        for (bit, letter) in [(4, 'r'), (2, 'w'), (1, 'x')] {
            text.push(if mode >> shift & bit != 0 { letter } else { '-' });
        }
    }
    text
}

async fn row(volume: &Volume, path: &str, entry: &Entry) -> Value {
    let mut row = json!({
        "name": if entry.name.is_empty() { "/" } else { &entry.name },
        "path": path,
        "kind": kind_name(entry.kind),
        "mode": mode_text(entry.kind, entry.mode),
        "size_bytes": entry.length,
        "allocated_bytes": entry.blocks.saturating_mul(entry.block_bytes),
        "block_bytes": entry.block_bytes,
        "to_be_zeroed_blocks": entry.to_be_zeroed,
        "addressing": format!("{:?}", entry.zla),
        "links": entry.links,
        "owner": format!("{}:{}", entry.owner.0, entry.owner.1),
        "fd": entry.fd.to_string(),
        "modified_at": time(entry.times_s[0]),
    });
    // A link or mapping that cannot be read is still listed.
    match entry.kind {
        InodeKind::Symlink => {
            if let Ok(target) = volume.read_link(path).await {
                row["target"] = json!(target);
            }
        }
        InodeKind::Rdm => {
            if let Ok(rdm) = volume.read_rdm(path).await {
                row["lun_identity"] = json!(rdm.record.id_text());
            }
        }
        _ => {}
    }
    row
}

fn join(directory: &str, name: &str) -> String {
    format!("{}/{name}", directory.trim_end_matches('/'))
}

/// The entries of a directory, or the one that a path names.
pub async fn list(images: &[String], path: &str, recursive: bool) -> Outcome<Vec<Value>> {
    let volume = open_for_reading(images).await?.volume(Mode::Read).await?;
    let path = clean_path(path)?;
    let failed = |path: &str| {
        let title = format!("cannot list {path}");
        move |e: vmfs::Error| vmfs_problem(title.clone(), &e)
    };
    let entry = volume.entry(&path).await.map_err(failed(&path))?;
    if !matches!(entry.kind, InodeKind::Directory | InodeKind::Symlink) {
        return Ok(vec![row(&volume, &path, &entry).await]);
    }
    let mut rows = Vec::new();
    let mut left = vec![(path, 0)];
    while let Some((directory, depth)) = left.pop() {
        let mut below = Vec::new();
        for entry in volume.list(&directory).await.map_err(failed(&directory))? {
            let path = join(&directory, &entry.name);
            let mut row = row(&volume, &path, &entry).await;
            if recursive {
                row["name"] = json!(path);
                if entry.kind == InodeKind::Directory && depth < DEPTH_MAX {
                    below.push((path, depth + 1));
                }
            }
            rows.push(row);
        }
        left.extend(below.into_iter().rev());
    }
    Ok(rows)
}

/// One entry.
pub async fn stat(images: &[String], path: &str) -> Outcome<Value> {
    let volume = open_for_reading(images).await?.volume(Mode::Read).await?;
    let path = clean_path(path)?;
    let entry = volume.entry(&path).await.map_err(|e| vmfs_problem(format!("cannot look at {path}"), &e))?;
    Ok(row(&volume, &path, &entry).await)
}

/// The volume itself.
pub async fn describe(images: &[String]) -> Outcome<Value> {
    let volume = open_for_reading(images).await?.volume(Mode::Read).await?;
    Ok(volume_row(&volume))
}

/// A volume as `stat` and `inspect` show it.
pub fn volume_row(volume: &Volume) -> Value {
    let info = volume.info();
    json!({
        "id": info.uuid.to_string(),
        "name": info.label,
        "version": format!("VMFS-{} ({}.{})", info.version, info.fs_version.0, info.fs_version.1),
        "size_bytes": info.volume_bytes,
        "block_bytes": info.block_bytes,
        "blocks": info.blocks,
        "sub_block_bytes": info.sub_block_bytes,
        "pointer_block_bytes": info.pointer_block_bytes,
        "created_at": time(info.created_s),
        "lvm_uuid": volume.space().lvm().map(|l| l.uuid.to_string()),
        "devices": volume.space().devices().len(),
    })
}

/// Makes a directory.
pub async fn mkdir(global: &Global, image: &str, path: &str, parents: bool) -> Outcome {
    let path = clean_path(path)?;
    let failed = |e: vmfs::Error| vmfs_problem(format!("cannot make {path}"), &e);
    let volume = open_for_writing(image).await?.volume(Mode::Write).await?;
    if global.dry_run {
        println!("would make the directory {path}");
        return Ok(());
    }
    if parents {
        make_directories(&volume, &path).await.map_err(failed)?;
    } else {
        volume.make_directory(&path).await.map_err(failed)?;
    }
    volume.close().await.map_err(failed)
}

/// Makes a directory and those above it that are not there.
pub async fn make_directories(volume: &Volume, path: &str) -> Result<(), vmfs::Error> {
    let mut so_far = String::new();
    for part in path.split('/').filter(|p| !p.is_empty()) {
        so_far = format!("{so_far}/{part}");
        match volume.make_directory(&so_far).await {
            Ok(()) | Err(vmfs::Error::Exists { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Removes a file or an empty directory.
pub async fn remove(global: &Global, image: &str, path: &str) -> Outcome {
    let path = clean_path(path)?;
    let failed = |e: vmfs::Error| vmfs_problem(format!("cannot remove {path}"), &e);
    let volume = open_for_writing(image).await?.volume(Mode::Write).await?;
    let entry = volume.entry(&path).await.map_err(failed)?;
    if global.dry_run {
        println!("would remove {path}, {}", show_size(entry.length));
        return Ok(());
    }
    volume.remove(&path).await.map_err(failed)?;
    volume.close().await.map_err(failed)
}

/// Checks a volume; the exit code.
pub async fn check(global: &Global, out: &Output, images: &[String], repair: bool) -> Outcome<u8> {
    const COLUMNS: &[Column] = &[
        col("verdict", "verdict", Text),
        col("findings", "findings", Text),
        col("repaired", "repaired", Text),
        col("files", "files", Count),
        col("directories", "directories", Count),
        col("mappings", "mappings", Count),
        col("size", "size_bytes", Size),
        col("used", "used_bytes", Size),
    ];
    let opened: Opened = match (repair && !global.dry_run, images) {
        (true, [image]) => open_for_writing(image).await?,
        (true, _) => return Err(Problem::usage("repair works on one image")),
        (false, images) => open_for_reading(images).await?,
    };
    // A volume that is too damaged to be opened tells nothing of its mappings; the check says what is wrong.
    let facts = match Volume::open(opened.disks.clone(), Mode::Read).await {
        Ok(volume) => Facts::collect(&volume).await,
        Err(_) => Facts::default(),
    };
    let judge = |mapping: &vmfs::check::Mapping| facts.judge(mapping, Around::NOTHING);
    let repair_leaks = repair && !global.dry_run;
    let options = vmfs::check::Options { repair_leaks, mapping: Some(&judge) };
    let report = vmfs::check(opened.disks.clone(), options)
        .await
        .map_err(|e| Problem::failed("KGM-VFS-0014", format!("cannot check {}", opened.shown), e))?;
    let list =
        |findings: &[vmfs::check::Finding]| findings.iter().map(ToString::to_string).collect::<Vec<_>>();
    let row = json!({
        "name": opened.shown,
        "verdict": match report.exit_code() { 0 => "clean", 3 => "leaks", _ => "corrupt" },
        "findings": list(report.findings()),
        "repaired": list(&report.repaired),
        "files": report.totals.files,
        "directories": report.totals.directories,
        "mappings": report.totals.mappings,
        "blocks": report.totals.blocks,
        "blocks_used": report.totals.blocks_used,
    });
    out.object(&row, COLUMNS).map_err(stdout_failed)?;
    Ok(report.exit_code())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_as_ls_shows_them() {
        assert_eq!(mode_text(InodeKind::File, 0o644), "-rw-r--r--");
        assert_eq!(mode_text(InodeKind::Directory, 0o1755), "drwxr-xr-x");
        assert_eq!(join("/", "a"), "/a");
        assert_eq!(join("/a", "b"), "/a/b");
    }
}
