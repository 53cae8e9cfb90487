//! Restoring to files, without a lane: raw, and VMDK with a flat extent. Several threads, sparse.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use vmdisk::descriptor::{Access, Cid, CreateType, Descriptor, ExtentKind, ExtentLine, NewDescriptor};

use crate::Error;
use crate::format::{AREA_BYTES, PIECE_BYTES};
use crate::manifest::Manifest;
use crate::progress::Progress;
use crate::repository::{Inner, Repository};
use crate::stretch::{Place, Portion};

/// What is left to be done, shared by the threads.
struct Plan {
    portions: std::vec::IntoIter<Portion>,
    next: u64,
    failed: Option<Error>,
}

impl Repository {
    /// Writes a disk of a backup to a new raw file, with holes where it is zero; durable when this returns. Blocks.
    pub fn restore_to_raw(
        &self,
        manifest: &Manifest,
        disk: &str,
        path: &Path,
        progress: &Progress,
    ) -> Result<(), Error> {
        let place = Place::of(manifest, manifest.disk(disk)?);
        let fail = |e: io::Error| match e.kind() {
            io::ErrorKind::AlreadyExists => Error::Exists { path: path.to_owned() },
            _ => Error::io("creating", path, e),
        };
        let file = OpenOptions::new().write(true).create_new(true).open(path).map_err(fail)?;
        let result = self.write_raw(&place, &file, path, progress);
        if result.is_err() {
            // Half a disk under the name that was asked for would be taken for the disk.
            let _ = std::fs::remove_file(path);
        }
        result
    }

    fn write_raw(&self, place: &Place, file: &File, path: &Path, progress: &Progress) -> Result<(), Error> {
        let fail = |e| Error::io("writing", path, e);
        file.set_len(place.length_bytes).map_err(fail)?;
        progress.expect(place.length_bytes);
        let plan = Mutex::new(Plan { portions: Vec::new().into_iter(), next: 0, failed: None });
        let threads = std::thread::available_parallelism().map_or(2, |n| n.get().min(8));
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    while let Some(portion) = next_portion(&plan, &self.inner, place, progress) {
                        if let Err(e) = write_portion(&self.inner, place, portion, (file, path), progress) {
                            plan.lock().unwrap_or_else(|e| e.into_inner()).failed.get_or_insert(e);
                        }
                    }
                });
            }
        });
        match plan.into_inner().unwrap_or_else(|e| e.into_inner()).failed {
            Some(error) => Err(error),
            None => file.sync_all().map_err(fail),
        }
    }

    /// Writes a disk of a backup as a VMDK of type monolithicFlat: the descriptor `path`, and beside it the content
    /// in `NAME-flat.vmdk`. Gives the path of the content. Blocks.
    pub fn restore_to_vmdk(
        &self,
        manifest: &Manifest,
        disk: &str,
        path: &Path,
        progress: &Progress,
    ) -> Result<PathBuf, Error> {
        let record = manifest.disk(disk)?;
        let stem = path.file_stem().and_then(|s| s.to_str());
        let Some(stem) = stem.filter(|_| path.extension().is_some_and(|e| e == "vmdk")) else {
            return Err(Error::Refused(format!("{}: a VMDK is named NAME.vmdk", path.display())));
        };
        if path.exists() {
            return Err(Error::Exists { path: path.to_owned() });
        }
        let flat = path.with_file_name(format!("{stem}-flat.vmdk"));
        let text = flat_descriptor(record.length_bytes, &format!("{stem}-flat.vmdk"))?;
        self.restore_to_raw(manifest, disk, &flat, progress)?;
        // Last: a descriptor says that the content is there.
        let write = || {
            let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
            io::Write::write_all(&mut file, &text)?;
            file.sync_all()
        };
        write().map_err(|e| Error::io("writing", path, e))?;
        Ok(flat)
    }
}

fn next_portion(plan: &Mutex<Plan>, inner: &Inner, place: &Place, progress: &Progress) -> Option<Portion> {
    let mut plan = plan.lock().unwrap_or_else(|e| e.into_inner());
    while plan.failed.is_none() {
        if let Some(portion) = plan.portions.next() {
            if let Err(e) = progress.check() {
                plan.failed = Some(e);
                break;
            }
            return Some(portion);
        }
        if plan.next >= place.areas() {
            break;
        }
        match place.plan(&inner.reader, plan.next) {
            Ok((portions, next)) => (plan.portions, plan.next) = (portions.into_iter(), next),
            Err(e) => plan.failed = Some(e),
        }
    }
    None
}

fn write_portion(
    inner: &Inner,
    place: &Place,
    portion: Portion,
    (file, path): (&File, &Path),
    progress: &Progress,
) -> Result<(), Error> {
    match portion {
        Portion::Zero(_, length) => progress.done(length),
        Portion::Data(first, entries) => {
            let content = place.load(&inner.reader, first, &entries)?;
            let (piece, mut from) = (PIECE_BYTES as usize, 0);
            while from < content.len() {
                let pieces = content[from..].chunks(piece);
                let run: usize = pieces.take_while(|p| !lane::memory::is_zero(p)).map(<[u8]>::len).sum();
                if run > 0 {
                    let at = first * AREA_BYTES + from as u64;
                    file.write_all_at(&content[from..from + run], at)
                        .map_err(|e| Error::io("writing", path, e))?;
                    progress.written(run as u64);
                }
                from += run.max(piece);
            }
            progress.done(content.len() as u64);
        }
    }
    Ok(())
}

/// The descriptor of a flat VMDK.
fn flat_descriptor(length_bytes: u64, flat: &str) -> Result<Vec<u8>, Error> {
    let extent = ExtentLine {
        access: Access::ReadWrite,
        sectors: length_bytes / block::SECTOR_BYTES,
        kind: ExtentKind::Flat,
        file: flat.to_owned(),
        offset: 0,
    };
    let new = NewDescriptor {
        cid: Cid::random(),
        parent: None,
        create_type: CreateType::MonolithicFlat,
        extents: vec![extent],
        ddb: Vec::new(),
    };
    let descriptor = Descriptor::new(&new).map_err(|e| Error::Refused(format!("{flat}: {e}")))?;
    Ok(descriptor.to_bytes())
}
