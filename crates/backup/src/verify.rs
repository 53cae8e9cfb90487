//! Reading backups back: a backup counts once that has been done.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::Error;
use crate::chunk::ChunkId;
use crate::format::{AREA_BYTES, PIECE_BYTES};
use crate::manifest::{BackupId, Manifest};
use crate::pack::{PACKS, check_frames, pack_name, pack_number, read_tables};
use crate::progress::Progress;
use crate::repository::{Inner, Repository};
use crate::segment::{INDEX, Segment, segment_name, segment_number};
use crate::stretch::{Place, Portion};
use crate::tree::{Entry, walk};

/// Findings kept; further ones are counted.
const MOST_FINDINGS: usize = 1000;

/// How thoroughly to look.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Depth {
    /// Every node of the trees is read; every chunk must be findable, its pack present and long enough.
    Shallow,
    /// Every chunk is read, unpacked, and its hash compared.
    Deep,
}

/// Where something is wrong.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Damage {
    /// Part of a disk of a backup.
    Disk {
        /// The backup.
        backup: BackupId,
        /// The disk's name in it.
        disk: String,
        /// First byte of the disk that is lost.
        at_bytes: u64,
        /// How many bytes are.
        length_bytes: u64,
    },
    /// A small file of a backup.
    File {
        /// The backup.
        backup: BackupId,
        /// The file's name in it.
        file: String,
    },
    /// A backup's manifest.
    Manifest {
        /// The backup.
        backup: BackupId,
    },
    /// A file of the repository itself.
    Repository {
        /// Relative to the repository.
        file: PathBuf,
    },
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk { backup, disk, at_bytes, length_bytes } => {
                write!(f, "backup {backup}, disk {disk}, byte {at_bytes}, {length_bytes} bytes")
            }
            Self::File { backup, file } => write!(f, "backup {backup}, file {file}"),
            Self::Manifest { backup } => write!(f, "backup {backup}, manifest"),
            Self::Repository { file } => write!(f, "{}", file.display()),
        }
    }
}

/// One thing that is wrong.
#[derive(Clone, Debug)]
pub struct Finding {
    /// Where.
    pub damage: Damage,
    /// What was seen.
    pub error: Error,
}

/// What a verification found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Bytes of disks gone over.
    pub checked_bytes: u64,
    /// What is wrong, at most 1000 entries.
    pub findings: Vec<Finding>,
    /// How many more there are.
    pub further: u64,
}

impl Report {
    /// Nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty()
    }

    fn add(&mut self, damage: Damage, error: Error) {
        if let (
            Some(Finding { damage: Damage::Disk { backup, disk, at_bytes, length_bytes }, error: last }),
            Damage::Disk { backup: b, disk: d, at_bytes: a, length_bytes: l },
        ) = (self.findings.last_mut(), &damage)
            && (*backup == *b && *disk == *d && *at_bytes + *length_bytes == *a)
            && last.to_string() == error.to_string()
        {
            *length_bytes += l;
            return;
        }
        if self.findings.len() < MOST_FINDINGS {
            self.findings.push(Finding { damage, error });
        } else {
            self.further += 1;
        }
    }
}

impl Repository {
    /// Verifies one backup. Damage is reported, not an error; an error means that it could not be looked at. Blocks.
    pub fn verify(&self, id: BackupId, depth: Depth, progress: &Progress) -> Result<Report, Error> {
        let mut report = Report::default();
        match self.manifest(id) {
            Ok(manifest) => self.verify_manifest(&manifest, depth, progress, &mut report)?,
            Err(e) if e.is_damage() => report.add(Damage::Manifest { backup: id }, e),
            Err(e) => return Err(e),
        }
        Ok(report)
    }

    /// Verifies every backup and every file of the repository, used or not. Blocks.
    pub fn check(&self, depth: Depth, progress: &Progress) -> Result<Report, Error> {
        let mut report = Report::default();
        for listed in self.list()? {
            match listed.manifest {
                Ok(manifest) => self.verify_manifest(&manifest, depth, progress, &mut report)?,
                Err(e) => report.add(Damage::Manifest { backup: listed.id }, e),
            }
        }
        let inner = &self.inner;
        for number in inner.store.list(Path::new(INDEX))?.iter().filter_map(|n| segment_number(n)) {
            let looked = Segment::open(&inner.store, inner.id, number).and_then(|s| s.each(|_, _, _| Ok(())));
            keep(&mut report, segment_name(number), looked)?;
        }
        for number in inner.store.list(Path::new(PACKS))?.iter().filter_map(|n| pack_number(n)) {
            progress.check()?;
            let looked = read_tables(&inner.store, inner.id, number).and_then(|tables| match depth {
                Depth::Shallow => Ok(()),
                Depth::Deep => check_frames(&inner.store, number, &tables),
            });
            keep(&mut report, pack_name(number), looked)?;
        }
        Ok(report)
    }

    fn verify_manifest(
        &self,
        manifest: &Manifest,
        depth: Depth,
        progress: &Progress,
        report: &mut Report,
    ) -> Result<(), Error> {
        let backup = manifest.id;
        for file in &manifest.files {
            match self.file(manifest, &file.name) {
                Ok(_) => {}
                Err(e) if e.is_damage() => report.add(Damage::File { backup, file: file.name.clone() }, e),
                Err(e) => return Err(e),
            }
        }
        for disk in &manifest.disks {
            progress.expect(disk.length_bytes);
            let place = Place::of(manifest, disk);
            match depth {
                Depth::Shallow => shallow(&self.inner, &place, progress, report)?,
                Depth::Deep => deep(&self.inner, &place, progress, report)?,
            }
            report.checked_bytes += disk.length_bytes;
        }
        Ok(())
    }
}

fn keep(report: &mut Report, file: PathBuf, looked: Result<(), Error>) -> Result<(), Error> {
    match looked {
        Err(e) if e.is_damage() || matches!(e, Error::NewerFormat { .. } | Error::UnknownFeatures { .. }) => {
            report.add(Damage::Repository { file }, e);
            Ok(())
        }
        other => other,
    }
}

/// Runs of an area as bytes of the disk: first byte, length, chunk.
fn parts(place: &Place, area: u64, entry: &Entry) -> Vec<(u64, u64, ChunkId)> {
    let (start, bytes) = (area * AREA_BYTES, place.area_bytes(area) as u64);
    let run = |(first, count, piece): (u8, u8, Option<(ChunkId, u8)>)| {
        let from = (u64::from(first) * PIECE_BYTES).min(bytes);
        let to = (u64::from(first + count) * PIECE_BYTES).min(bytes);
        piece.map(|(id, _)| (start + from, to - from, id))
    };
    entry.runs().into_iter().filter_map(run).collect()
}

fn shallow(inner: &Inner, place: &Place, progress: &Progress, report: &mut Report) -> Result<(), Error> {
    let mut packs: HashMap<u64, Result<u64, Error>> = HashMap::new();
    let mut present = |id: &ChunkId| {
        let at = inner.reader.locate(id)?;
        let length = packs.entry(at.pack).or_insert_with(|| {
            let name = pack_name(at.pack);
            let file = inner.store.open(&name)?;
            file.metadata().map(|m| m.len()).map_err(|e| Error::io("reading", &name, e))
        });
        let end = u64::from(at.frame_at) + u64::from(at.frame_stored);
        match length {
            Ok(length) if *length >= end => Ok(()),
            Ok(length) => {
                Err(crate::error::corrupt(&pack_name(at.pack), "pack length", *length, *length, end))
            }
            Err(e) => Err(e.clone()),
        }
    };
    walk(&inner.reader, place.root, 0, place.areas(), &mut |area, count, entry| {
        progress.check()?;
        progress.done((count * AREA_BYTES).min(place.length_bytes - area * AREA_BYTES));
        let found = match entry {
            Ok(entry) if *entry == Entry::Zero => return Ok(true),
            Ok(entry) => parts(place, area, entry)
                .into_iter()
                .try_for_each(|(at, length, id)| present(&id).map_err(|e| (at, length, e))),
            Err(e) => Err((area * AREA_BYTES, count * AREA_BYTES, e)),
        };
        if let Err((at, length, e)) = found {
            add_disk(place, at, length, e, report)?;
        }
        Ok(true)
    })?;
    Ok(())
}

fn add_disk(place: &Place, at: u64, length: u64, error: Error, report: &mut Report) -> Result<(), Error> {
    if !error.is_damage() {
        return Err(error);
    }
    let length_bytes = length.min(place.length_bytes - at);
    let (backup, disk) = (place.manifest_id, place.disk.clone());
    report.add(Damage::Disk { backup, disk, at_bytes: at, length_bytes }, error);
    Ok(())
}

/// What one thread found: first byte, length, error.
type Found = Vec<(u64, u64, Error)>;

struct Walking<'a> {
    portions: std::vec::IntoIter<Portion>,
    next: u64,
    place: &'a Place,
    found: Found,
    failed: Option<Error>,
}

impl Walking<'_> {
    /// The next portion with data. A damaged subtree is noted and stepped over.
    fn next(&mut self, inner: &Inner, progress: &Progress) -> Option<(u64, Vec<Entry>)> {
        while self.failed.is_none() {
            match self.portions.next() {
                Some(Portion::Data(first, entries)) => return Some((first, entries)),
                Some(Portion::Zero(_, length)) => {
                    progress.done(length);
                    continue;
                }
                None if self.next >= self.place.areas() => return None,
                None => {}
            }
            if let Err(e) = progress.check().and_then(|()| self.plan(inner)) {
                self.failed = Some(e);
            }
        }
        None
    }

    fn plan(&mut self, inner: &Inner) -> Result<(), Error> {
        match self.place.plan(&inner.reader, self.next) {
            Ok((portions, next)) => {
                (self.portions, self.next) = (portions.into_iter(), next);
                Ok(())
            }
            Err(e) if e.is_damage() => self.plan_around(inner),
            Err(e) => Err(e),
        }
    }

    /// As the plan of the place, but in one go up to the first damaged node, and over it.
    fn plan_around(&mut self, inner: &Inner) -> Result<(), Error> {
        let (mut portions, mut next) = (Vec::new(), self.next);
        let (place, found) = (self.place, &mut self.found);
        walk(&inner.reader, place.root, self.next, place.areas(), &mut |at, count, entry| {
            next = at + count;
            match entry {
                Ok(Entry::Zero) => portions.push(Portion::Zero(at * AREA_BYTES, 0)),
                Ok(entry) => portions.push(Portion::Data(at, vec![entry.clone()])),
                Err(e) => {
                    found.push((at * AREA_BYTES, count * AREA_BYTES, e));
                    return Ok(false);
                }
            }
            Ok(portions.len() < 4096)
        })?;
        (self.portions, self.next) = (portions.into_iter(), next);
        Ok(())
    }
}

fn deep(inner: &Inner, place: &Place, progress: &Progress, report: &mut Report) -> Result<(), Error> {
    let portions = Vec::new().into_iter();
    let walking = Mutex::new(Walking { portions, next: 0, place, found: Vec::new(), failed: None });
    let lock = || walking.lock().unwrap_or_else(|e| e.into_inner());
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get().min(8));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let next = lock().next(inner, progress);
                    let Some((first, entries)) = next else { return };
                    for (n, entry) in entries.iter().enumerate() {
                        let area = first + n as u64;
                        for (at, length, id) in parts(place, area, entry) {
                            if let Err(e) = inner.reader.chunk(&id) {
                                lock().found.push((at, length, e));
                            }
                        }
                        progress.done(place.area_bytes(area) as u64);
                    }
                }
            });
        }
    });
    let Walking { mut found, failed, .. } = walking.into_inner().unwrap_or_else(|e| e.into_inner());
    if let Some(e) = failed {
        return Err(e);
    }
    found.sort_by_key(|(at, ..)| *at);
    found.into_iter().try_for_each(|(at, length, e)| add_disk(place, at, length, e, report))
}
