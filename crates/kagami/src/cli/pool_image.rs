//! A pool's file as an image: `POOLFILE:LUN[@SNAP]`, read-only, without the daemon.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use array::{Options, Pool};
use block::Disk;
use serde_json::{Value, json};

use super::images::media_problem;
use crate::problem::{Outcome, Problem};
use crate::store::open_problem;

/// Opens the pool that the file belongs to: other media of it are looked for next to it.
async fn open_pool(file: &Path) -> Outcome<Rc<Pool>> {
    let media = |path: PathBuf| async move {
        let options =
            media::Options { read_only: true, lock: media::Lock::Shared, ..media::Options::default() };
        let disk = media::open(&path, options).await.map_err(|e| media_problem(&path, &e))?;
        Ok::<Rc<dyn Disk>, Problem>(disk)
    };
    let failed = |e| open_problem(format!("cannot open the pool in {}", file.display()), &e);
    let options = || Options { read_only: true, ..Options::default() };
    let first = media(file.to_owned()).await?;
    let wanted = match Pool::open(vec![Rc::clone(&first)], options()).await {
        Err(array::PoolError::Media { wanted, .. }) => wanted,
        other => return other.map_err(failed),
    };
    // Each neighbour that lessens what is missing belongs to it.
    let mut disks = vec![first];
    let mut neighbours: Vec<PathBuf> = std::fs::read_dir(file.parent().unwrap_or_else(|| Path::new(".")))
        .map(|dir| dir.filter_map(|e| Some(e.ok()?.path())).filter(|p| p.is_file() && p != file).collect())
        .unwrap_or_default();
    neighbours.sort();
    for path in neighbours {
        if disks.len() == wanted {
            break;
        }
        let Ok(disk) = media(path).await else { continue };
        disks.push(disk);
        match Pool::open(disks.clone(), options()).await {
            Err(array::PoolError::Media { given, .. }) if given == disks.len() => {}
            Ok(pool) => return Ok(pool),
            Err(_) => drop(disks.pop()),
        }
    }
    Pool::open(disks, options()).await.map_err(failed)
}

/// The LUN, or a snapshot of it, as a disk.
pub async fn open(file: &Path, lun: &str, snap: Option<&str>) -> Outcome<Rc<dyn Disk>> {
    let pool = open_pool(file).await?;
    let found = pool.lun(lun).ok_or_else(|| {
        let names: Vec<String> = pool.luns().iter().map(|l| l.name()).collect();
        Problem::not_found("lun", lun).why(format!("the pool has {}", names.join(", "))).hint("")
    })?;
    let Some(snap) = snap else { return Ok(found) };
    let found = found.open_snapshot(snap).map_err(|_| {
        let names: Vec<String> = found.snapshots().into_iter().map(|s| s.name).collect();
        Problem::not_found("snap", snap).why(format!("the LUN has {}", names.join(", "))).hint("")
    })?;
    Ok(found)
}

/// What a pool's file holds; `None` when it is none.
pub async fn describe(file: &Path) -> Option<Value> {
    let pool = match open_pool(file).await {
        Ok(pool) => pool,
        Err(problem) if problem.code == "KGM-POL-0405" => return None,
        Err(problem) if problem.code.starts_with("KGM-POL") => {
            return Some(json!({"file": file, "is": "pool medium", "trouble": problem.to_string()}));
        }
        Err(_) => return None,
    };
    let info = pool.info();
    let holds: Vec<String> = pool
        .luns()
        .iter()
        .map(|lun| {
            let claim = lun.claimed_by().map_or(String::new(), |c| format!(", {c}"));
            let snaps: Vec<String> = lun.snapshots().iter().map(|s| format!("@{}", s.name)).collect();
            let size = crate::units::show_size(lun.shape().bytes());
            format!("LUN {} ({size}{claim}) {}", lun.name(), snaps.join(" "))
        })
        .collect();
    Some(json!({
        "file": file,
        "is": "pool",
        "name": info.name,
        "id": info.uuid.to_string(),
        "size_bytes": info.bytes,
        "holds": holds,
    }))
}
