//! Files out of a volume, and into one.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;

use block::{Buffer, Disk, SECTOR_BYTES, Sector, SegmentsMut};
use indicatif::ProgressBar;
use vmfs::{Content, Mode, Volume};

use super::{open_for_reading, open_for_writing, vmfs_problem};
use crate::cli::args::Global;
use crate::names::clean_path;
use crate::output::Output;
use crate::problem::{Kind, Outcome, Problem};

/// Bytes moved at a time.
const STEP: u64 = 1 << 20;

/// Where bytes of a file go: stdout, or a file with holes.
enum Target {
    Stdout(std::io::StdoutLock<'static>),
    File(File),
}

impl Target {
    fn data(&mut self, at: u64, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Self::Stdout(out) => out.write_all(bytes),
            Self::File(file) if lane::memory::is_zero(bytes) => file.seek(SeekFrom::Start(at)).map(drop),
            Self::File(file) => file.write_all_at(bytes, at),
        }
    }

    fn zeroes(&mut self, count: u64) -> std::io::Result<()> {
        match self {
            Self::Stdout(out) => std::io::copy(&mut std::io::repeat(0).take(count), out).map(drop),
            Self::File(_) => Ok(()), // a hole
        }
    }

    fn end(&mut self, length: u64) -> std::io::Result<()> {
        match self {
            Self::Stdout(out) => out.flush(),
            Self::File(file) => {
                file.set_len(length)?;
                file.sync_all()
            }
        }
    }
}

/// The bytes of a file to stdout.
pub async fn cat(images: &[String], path: &str) -> Outcome {
    let volume = open_for_reading(images).await?.volume(Mode::Read).await?;
    copy_out(
        &volume,
        &clean_path(path)?,
        &mut Target::Stdout(std::io::stdout().lock()),
        &ProgressBar::hidden(),
    )
    .await
}

async fn copy_out(volume: &Volume, path: &str, target: &mut Target, bar: &ProgressBar) -> Outcome {
    let failed = |e: vmfs::Error| vmfs_problem(format!("cannot read {path}"), &e);
    let io = |e: std::io::Error| Problem::failed("KGM-IMG-0003", format!("cannot copy {path}"), e);
    let file = volume.open_file(path).await.map_err(failed)?;
    let length = file.length();
    bar.set_length(length);
    if file.is_resident() {
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        let read = file.read_bytes(0, &mut bytes).await.map_err(failed)?;
        target.data(0, &bytes[..read]).and_then(|()| target.end(length)).map_err(io)?;
        return Ok(());
    }
    let devices: Vec<Rc<dyn Disk>> = volume.space().devices().to_vec();
    let mut buffer = Buffer::zeroed(STEP as usize);
    let (mut at, end) = (0, length.div_ceil(SECTOR_BYTES));
    while at < end {
        let places = file.locate(Sector(at), end - at, 64).await.map_err(failed)?;
        for place in &places {
            let mut done = 0;
            while done < place.count {
                let count = (place.count - done).min(STEP / SECTOR_BYTES);
                let from = (place.at.0 + done) * SECTOR_BYTES;
                let bytes = (count * SECTOR_BYTES).min(length - from);
                match place.content {
                    Content::Data { device, at } => {
                        let into = SegmentsMut::new(&mut buffer[..(count * SECTOR_BYTES) as usize]);
                        let disk = devices.get(device).ok_or_else(|| {
                            Problem::new(
                                "KGM-VFS-0003",
                                Kind::Usage,
                                format!("{path} lies on a device not given"),
                            )
                        })?;
                        let read = disk.read(at.plus(done), &into).await;
                        read.map_err(|e| Problem::failed("KGM-IMG-0004", format!("cannot read {path}"), e))?;
                        target.data(from, &buffer[..bytes as usize]).map_err(io)?;
                    }
                    Content::ToBeZeroed { .. } | Content::Hole => target.zeroes(bytes).map_err(io)?,
                }
                done += count;
                bar.set_position(from + bytes);
            }
        }
        let Some(last) = places.last() else { break };
        at = last.at.0 + last.count;
    }
    target.end(length).map_err(io)
}

/// `IMAGE:/PATH` to (image, path).
fn on_volume(text: &str) -> Option<(&str, &str)> {
    let colon = text.find(":/")?;
    (colon > 0).then(|| (&text[..colon], &text[colon + 1..]))
}

/// Copies a file out of an image or into one.
pub async fn copy(global: &Global, out: &Output, from: &str, to: &str) -> Outcome {
    match (on_volume(from), on_volume(to)) {
        (Some((image, path)), None) => {
            let volume = open_for_reading(&[image.to_owned()]).await?.volume(Mode::Read).await?;
            let path = clean_path(path)?;
            let mut target = Path::new(to).to_owned();
            if target.is_dir() {
                target.push(path.rsplit('/').next().unwrap_or_default());
            }
            if global.dry_run {
                println!("would copy {path} to {}", target.display());
                return Ok(());
            }
            let io = |e| Problem::failed("KGM-IMG-0005", format!("cannot write {}", target.display()), e);
            let file = File::create(&target).map_err(io)?;
            let bar = progress(out, &path);
            let copied = copy_out(&volume, &path, &mut Target::File(file), &bar).await;
            bar.finish_and_clear();
            copied?;
            say(out, &path, &target.display().to_string());
            Ok(())
        }
        (None, Some((image, path))) => {
            let path = clean_path(path)?;
            if global.dry_run {
                println!("would copy {from} to {path}");
                return Ok(());
            }
            let bar = progress(out, from);
            let copied = copy_in(from, image, &path, &bar).await;
            bar.finish_and_clear();
            copied?;
            say(out, from, to);
            Ok(())
        }
        _ => Err(Problem::usage("one side must be IMAGE:/PATH and the other a file")
            .hint("kagami vmfs cp disk.img:/vm/vm.vmx . or kagami vmfs cp vm.vmx disk.img:/vm/")),
    }
}

/// How far a copy is, where somebody can see it.
fn progress(out: &Output, what: &str) -> ProgressBar {
    if !out.progress() {
        return ProgressBar::hidden();
    }
    let bar = crate::cli::session::progress_bar();
    bar.set_message(what.to_owned());
    bar
}

fn say(out: &Output, from: &str, to: &str) {
    if !out.quiet {
        eprintln!("{from} -> {to}");
    }
}

/// A host file into a volume; zeroes at whole blocks become holes.
async fn copy_in(from: &str, image: &str, path: &str, bar: &ProgressBar) -> Outcome {
    let read = |e: std::io::Error| Problem::failed("KGM-IMG-0006", format!("cannot read {from}"), e);
    let mut source = File::open(from).map_err(read)?;
    let length = source.metadata().map_err(read)?.len();
    bar.set_length(length);
    let volume = open_for_writing(image).await?.volume(Mode::Write).await?;
    let is_directory = volume.entry(path).await.is_ok_and(|e| e.kind == vmfs::format::InodeKind::Directory);
    let path = match (is_directory, Path::new(from).file_name()) {
        (true, Some(name)) => format!("{}/{}", path.trim_end_matches('/'), name.to_string_lossy()),
        _ => path.to_owned(),
    };
    let failed = |e: vmfs::Error| vmfs_problem(format!("cannot write {path}"), &e);
    super::write_file::write(&volume, &path, length, &mut |into| {
        source.read_exact(into)?;
        bar.inc(into.len() as u64);
        Ok(())
    })
    .await
    .map_err(|e| match e {
        super::write_file::Fault::Source(e) => read(e),
        super::write_file::Fault::Volume(e) => failed(e),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_on_images() {
        assert_eq!(on_volume("a.img:/x/y"), Some(("a.img", "/x/y")));
        assert_eq!(on_volume("pool:lun:/x"), Some(("pool:lun", "/x")));
        assert_eq!(on_volume("a.img"), None);
        assert_eq!(on_volume(":/x"), None);
    }
}
