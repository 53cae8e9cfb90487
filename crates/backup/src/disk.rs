//! A disk of a backup, as a disk: read-only, at the same cost however many incrementals led to it.

use std::sync::Arc;

use block::{
    Disk, DiskError, Extent, Extents, Generation, Io, Kind, MediumFault, SECTOR_BYTES, Safe, Sector,
    Segments, SegmentsMut, Shape, check_range,
};

use crate::Error;
use crate::content::fill_area;
use crate::format::AREA_BYTES;
use crate::manifest::Manifest;
use crate::repository::{Inner, Repository};
use crate::stretch::Place;
use crate::survey::{AREA_SECTORS, PIECE_SECTORS, PIECES};
use crate::tree::{Entry, entry_at, walk};

/// Bytes loaded in one go on another thread.
const STEP_BYTES: u64 = 1 << 20;

/// A disk of a backup. Caches are bounded and shared by all disks of the repository.
pub struct BackupDisk {
    inner: Arc<Inner>,
    place: Place,
    shape: Shape,
}

impl Repository {
    /// A disk of a backup, to be read, exported, compared or copied. It goes on as long as the backup is there.
    pub fn disk(&self, manifest: &Manifest, name: &str) -> Result<BackupDisk, Error> {
        let record = manifest.disk(name)?;
        let shape = Shape {
            sectors: record.length_bytes / SECTOR_BYTES,
            physical_block_bytes: record.physical_block_bytes,
            read_only: true,
            unmap_reads_zero: false,
            memory_align: 1,
        };
        Ok(BackupDisk { inner: Arc::clone(&self.inner), place: Place::of(manifest, record), shape })
    }
}

/// What a front end can tell of it.
fn told(error: Error, at: Sector) -> DiskError {
    match error {
        Error::Disk { source, .. } => source,
        Error::Io { source, .. } if source.kind() != std::io::ErrorKind::NotFound => DiskError::Io(source),
        error => {
            tracing::error!(error = %error, "backup cannot be read");
            DiskError::Medium(MediumFault { at, what: "the backup is damaged here" })
        }
    }
}

fn refused<'a>() -> Io<'a> {
    Box::pin(std::future::ready(Err(DiskError::ReadOnly)))
}

/// Bytes from `at` on, `length` of them.
fn load(inner: &Inner, place: &Place, at: u64, length: usize) -> Result<Vec<u8>, Error> {
    let mut out = vec![0; length];
    let mut scratch = Vec::new();
    let mut done = 0;
    while done < length {
        let byte = at + done as u64;
        let (area, inside) = (byte / AREA_BYTES, (byte % AREA_BYTES) as usize);
        let whole = place.area_bytes(area);
        let count = (whole - inside).min(length - done);
        let mut fill = || {
            let entry = entry_at(&inner.reader, place.root, area)?;
            if count == whole {
                return fill_area(&inner.reader, &entry, &mut out[done..done + count]);
            }
            scratch.resize(whole, 0);
            fill_area(&inner.reader, &entry, &mut scratch)?;
            out[done..done + count].copy_from_slice(&scratch[inside..inside + count]);
            Ok(())
        };
        fill().map_err(|e| place.damaged(area, e))?;
        done += count;
    }
    Ok(out)
}

/// Describes sectors from `at` to `end`, as far as `limit` extents go.
fn describe(inner: &Inner, place: &Place, at: u64, end: u64, limit: usize) -> Result<Vec<Extent>, Error> {
    let mut out = Extents::with_limit(limit);
    let add = |out: &mut Extents, from: u64, to: u64, zero: bool| {
        let (from, to) = (from.max(at), to.min(end));
        let kind = if zero { Kind::Hole } else { Kind::Data };
        from >= to || out.push(Extent { at: Sector(from), count: to - from, kind, changed: true })
    };
    let areas = at / AREA_SECTORS..end.div_ceil(AREA_SECTORS);
    walk(&inner.reader, place.root, areas.start, areas.end, &mut |first, count, entry| {
        let start = first * AREA_SECTORS;
        Ok(match entry.map_err(|e| place.damaged(first, e))? {
            Entry::Zero => add(&mut out, start, start + count * AREA_SECTORS, true),
            Entry::Whole(_) => add(&mut out, start, start + AREA_SECTORS, false),
            mixed => mixed.runs().into_iter().all(|(piece, pieces, content)| {
                let from = (first * PIECES + u64::from(piece)) * PIECE_SECTORS;
                add(&mut out, from, from + u64::from(pieces) * PIECE_SECTORS, content.is_none())
            }),
        })
    })?;
    Ok(out.to_vec())
}

impl Disk for BackupDisk {
    fn shape(&self) -> Shape {
        self.shape
    }

    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        Box::pin(async move {
            let length = into.len() as u64;
            check_range(self.shape.sectors, at, length / SECTOR_BYTES)?;
            let mut done = 0;
            while done < length {
                let count = (length - done).min(STEP_BYTES);
                let (inner, place, from) = (Arc::clone(&self.inner), self.place.clone(), at.bytes() + done);
                let bytes = lane::offload(move || load(&inner, &place, from, count as usize)).await;
                into.copy_from(done as usize, &bytes.map_err(|e| told(e, at))?);
                done += count;
            }
            Ok(())
        })
    }

    fn write<'a>(&'a self, _at: Sector, _from: &'a Segments<'a>, _safe: Safe) -> Io<'a> {
        refused()
    }

    fn zero(&self, _at: Sector, _count: u64, _may_free: bool) -> Io<'_> {
        refused()
    }

    fn unmap(&self, _at: Sector, _count: u64) -> Io<'_> {
        refused()
    }

    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        Box::pin(async move {
            check_range(self.shape.sectors, at, count)?;
            if since.is_some() {
                return Err(DiskError::UnknownGeneration);
            }
            let (inner, place, end) = (Arc::clone(&self.inner), self.place.clone(), at.plus(count).0);
            let list = lane::offload(move || describe(&inner, &place, at.0, end, 1024)).await;
            for extent in list.map_err(|e| told(e, at))? {
                if !out.push(extent) {
                    break;
                }
            }
            Ok(())
        })
    }

    fn compare_and_write<'a>(
        &'a self,
        _at: Sector,
        _expected: &'a Segments<'a>,
        _new: &'a Segments<'a>,
    ) -> Io<'a> {
        refused()
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(std::future::ready(Ok(())))
    }
}
