//! Backs up one disk image, to measure the repository against other programs:
//!
//! ```text
//! image_backup init REPO
//! image_backup backup IMAGE REPO        reads the image; compares with the newest backup
//! image_backup load IMAGE DIR           brings the tracked disk in DIR to the image's content, writing what differs
//! image_backup tracked DIR REPO         backs up the tracked disk: asks it what has changed
//! image_backup verify REPO              reads the newest backup back
//! image_backup restore REPO OUT         the newest backup to a raw file
//! image_backup prune REPO
//! ```
//!
//! The tracked disk stands for a LUN with change tracking: a file and a map of the 4 KiB blocks written since the cut.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Instant;

use backup::{Audit, Depth, Label, Options, Plan, Progress, Repository, SourceDisk, Trust};
use block::{Disk, DiskError, Extent, Extents, Generation, Io, Safe, Sector, Segments, SegmentsMut, Shape};

type Outcome = Result<(), Box<dyn std::error::Error>>;

const BLOCK: usize = 4096;
const BLOCK_SECTORS: u64 = 8;

/// A disk below, and which of its blocks were written since the cut before.
struct Tracked {
    below: Rc<dyn Disk>,
    counter: u64,
    changed: Vec<u8>,
}

fn generation(counter: u64) -> Generation {
    Generation { counter, id: u128::from(counter) + (1 << 64) }
}

impl Disk for Tracked {
    fn shape(&self) -> Shape {
        self.below.shape()
    }
    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        self.below.read(at, into)
    }
    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a> {
        self.below.write(at, from, safe)
    }
    fn zero(&self, at: Sector, count: u64, may_free: bool) -> Io<'_> {
        self.below.zero(at, count, may_free)
    }
    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        self.below.unmap(at, count)
    }
    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        Box::pin(async move {
            let Some(since) = since else { return self.below.status(at, count, None, out).await };
            if self.counter == 0 || since != generation(self.counter - 1) {
                return Err(DiskError::UnknownGeneration);
            }
            let mut below = Extents::with_limit(256);
            self.below.status(at, count, None, &mut below).await?;
            for extent in below.iter() {
                let (mut sector, end) = (extent.at.0, extent.at.0 + extent.count);
                while sector < end {
                    let block = sector / BLOCK_SECTORS;
                    let changed = self.changed.get(block as usize).is_none_or(|c| *c != 0);
                    let same = self.changed[block as usize..].iter().take_while(|c| (**c != 0) == changed);
                    let stop = ((block + same.count() as u64) * BLOCK_SECTORS).clamp(sector + 1, end);
                    let part =
                        Extent { at: Sector(sector), count: stop - sector, kind: extent.kind, changed };
                    if !out.push(part) {
                        return Ok(());
                    }
                    sector = stop;
                }
            }
            Ok(())
        })
    }
    fn compare_and_write<'a>(
        &'a self,
        at: Sector,
        expected: &'a Segments<'a>,
        new: &'a Segments<'a>,
    ) -> Io<'a> {
        self.below.compare_and_write(at, expected, new)
    }
    fn flush(&self) -> Io<'_> {
        self.below.flush()
    }
}

async fn image(path: &Path) -> Result<Rc<dyn Disk>, Box<dyn std::error::Error>> {
    let options = media::Options { read_only: true, direct: media::Direct::Never, lock: media::Lock::None };
    let disk = media::open(path, options).await?;
    println!("in use: kagami, the image read: {}", disk.in_use());
    Ok(disk)
}

fn back_up(repository: &Path, path: &Path, tracked: Option<(u64, Vec<u8>)>) -> Outcome {
    let begin = Instant::now();
    let repository = Repository::open_or_create(repository, Options::default())?;
    let base = repository.list()?.last().map(|l| l.id);
    let manifest = lane::block_on(async {
        let below = image(path).await?;
        let (disk, cut): (Rc<dyn Disk>, _) = match tracked {
            Some((counter, changed)) => {
                (Rc::new(Tracked { below, counter, changed }), Some(generation(counter)))
            }
            None => (below, None),
        };
        let trust = Trust::default();
        let disks = vec![SourceDisk { name: "disk".into(), disk, cut, trust, metadata: Default::default() }];
        let (label, audit) = (Label::Crash, Audit::default());
        let plan = Plan {
            id: backup::BackupId::new(),
            name: "image".into(),
            label,
            base,
            disks,
            files: vec![],
            metadata: Default::default(),
            audit,
        };
        Ok::<_, Box<dyn std::error::Error>>(repository.backup(plan, &Progress::new()).await?)
    })?;
    let (disk, seconds) = (&manifest.disks[0], begin.elapsed().as_secs_f64());
    println!(
        "{} {:?}: read {} MiB (audit {}), new {} MiB, stored {} MiB, {:.0} MB/s",
        manifest.id,
        disk.mode,
        disk.read_bytes >> 20,
        disk.audited_bytes >> 20,
        manifest.new_bytes >> 20,
        manifest.stored_bytes >> 20,
        disk.length_bytes as f64 / 1e6 / seconds
    );
    Ok(())
}

/// Copies what differs from the image into the tracked disk and marks it. Sparse.
fn load(from: &Path, directory: &Path) -> Outcome {
    std::fs::create_dir_all(directory)?;
    let from = File::open(from)?;
    let length = from.metadata()?.len();
    let (path, map) = (directory.join("disk"), directory.join("changed"));
    let to = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    to.set_len(length)?;
    let blocks = length.div_ceil(BLOCK as u64) as usize;
    let mut changed = std::fs::read(&map).unwrap_or_default();
    changed.resize(blocks, 0);
    let (mut a, mut b) = (vec![0; 256 * BLOCK], vec![0; 256 * BLOCK]);
    for at in (0..length).step_by(256 * BLOCK) {
        let count = (length - at).min(256 * BLOCK as u64) as usize;
        from.read_exact_at(&mut a[..count], at)?;
        to.read_exact_at(&mut b[..count], at)?;
        for (n, (new, old)) in a[..count].chunks(BLOCK).zip(b[..count].chunks(BLOCK)).enumerate() {
            if new != old {
                to.write_all_at(new, at + (n * BLOCK) as u64)?;
                changed[at as usize / BLOCK + n] = 1;
            }
        }
    }
    to.sync_all()?;
    Ok(std::fs::write(map, changed)?)
}

/// Cuts the tracked disk and backs it up.
fn tracked(directory: &Path, repository: &Path) -> Outcome {
    let (map, counter) = (directory.join("changed"), directory.join("counter"));
    let changed = std::fs::read(&map)?;
    let count = std::fs::read_to_string(&counter).ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0u64);
    let none = vec![0; changed.len()];
    back_up(repository, &directory.join("disk"), Some((count, changed)))?;
    std::fs::write(map, none)?;
    Ok(std::fs::write(counter, (count + 1).to_string())?)
}

fn main() -> Outcome {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let list: Vec<&Path> = arguments.iter().map(PathBuf::as_path).collect();
    let (verb, rest) = list.split_first().ok_or("init, backup, load, tracked, verify, restore or prune")?;
    let newest = |path: &Path| {
        let repository = Repository::open(path, Options::default())?;
        let manifest = repository.manifest(repository.resolve("latest")?)?;
        Ok::<_, backup::Error>((repository, manifest))
    };
    match (verb.to_str().unwrap_or_default(), rest) {
        ("init", [repository]) => drop(Repository::create(repository, Options::default())?),
        ("backup", [image, repository]) => back_up(repository, image, None)?,
        ("load", [image, directory]) => load(image, directory)?,
        ("tracked", [directory, repository]) => tracked(directory, repository)?,
        ("verify", [path]) => {
            let (repository, manifest) = newest(path)?;
            let report = repository.verify(manifest.id, Depth::Deep, &Progress::new())?;
            report.findings.iter().for_each(|f| println!("{}: {}", f.damage, f.error));
            if !report.is_clean() {
                return Err("damaged".into());
            }
        }
        ("restore", [path, out]) => {
            let (repository, manifest) = newest(path)?;
            repository.restore_to_raw(&manifest, "disk", out, &Progress::new())?;
        }
        ("prune", [path]) => {
            let repository = Repository::open(path, Options::default())?;
            println!("{:?}", repository.prune(false, &Progress::new())?);
        }
        _ => return Err("init, backup, load, tracked, verify, restore or prune, with their paths".into()),
    }
    Ok(())
}
