//! Opening what IMAGE names: a file, a device, a LUN or a snapshot in a pool's file.

use std::path::Path;
use std::rc::Rc;

use block::Disk;
use vmfs::{Mode, Volume};

use super::vmfs_problem;
use crate::names::Image;
use crate::problem::{Kind, Outcome, Problem};

/// Disks of one volume, and what they were opened from.
pub struct Opened {
    /// The devices, in the order given.
    pub disks: Vec<Rc<dyn Disk>>,
    /// What was typed, for messages.
    pub shown: String,
}

/// A medium could not be opened.
pub fn media_problem(path: &Path, error: &media::MediaError) -> Problem {
    let title = format!("cannot open {}", path.display());
    match error {
        media::MediaError::InUse(why) => Problem::new("KGM-IMG-0409", Kind::Conflict, title)
            .why(why)
            .hint("work through its daemon, or stop that first"),
        media::MediaError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            Problem::new("KGM-IMG-0404", Kind::NotFound, title)
                .why(source)
                .hint("bring the file back, or name the one that is meant")
        }
        other => Problem::failed("KGM-IMG-0001", title, other),
    }
}

/// Opens one image for reading. Files are locked against writers where that is possible.
pub async fn open_disk(image: &str) -> Outcome<Rc<dyn Disk>> {
    match Image::parse(image) {
        Image::File(path) => {
            let options =
                media::Options { read_only: true, lock: media::Lock::Shared, ..media::Options::default() };
            let disk = media::open(&path, options).await.map_err(|e| media_problem(&path, &e))?;
            Ok(disk)
        }
        Image::Lun { pool, lun, snap } => super::super::pool_image::open(&pool, &lun, snap.as_deref()).await,
    }
}

/// Opens the images of one volume for reading.
pub async fn open_for_reading(images: &[String]) -> Outcome<Opened> {
    let mut disks = Vec::new();
    for image in images {
        disks.push(open_disk(image).await?);
    }
    Ok(Opened { disks, shown: images.join(" ") })
}

/// Opens one image for writing: a file or device, never a LUN in a pool (that is the daemon's).
pub async fn open_for_writing(image: &str) -> Outcome<Opened> {
    match Image::parse(image) {
        Image::File(path) => {
            let disk =
                media::open(&path, media::Options::default()).await.map_err(|e| media_problem(&path, &e))?;
            Ok(Opened { disks: vec![disk], shown: image.to_owned() })
        }
        Image::Lun { .. } => {
            Err(Problem::new("KGM-IMG-0002", Kind::Refused, format!("{image} is not written to"))
                .why("a LUN in a pool's file is opened read-only without the daemon")
                .hint("kagami datastore ls; kagami disk create ... through the daemon"))
        }
    }
}

impl Opened {
    /// The volume on them.
    pub async fn volume(&self, mode: Mode) -> Outcome<Volume> {
        let failed = |e: vmfs::Error| vmfs_problem(format!("cannot open the volume on {}", self.shown), &e);
        Volume::open(self.disks.clone(), mode).await.map_err(failed)
    }
}
