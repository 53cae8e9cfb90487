//! Commands on files and devices, without the daemon: `vmfs`, `vmdk`, `inspect`.

mod inspect;
mod open;
mod transfer;
mod volume;
pub mod write_file;

use serde_json::{Value, json};

use super::args::{Global, Noun};
use super::args_images::{VmdkVerb, VmfsVerb};
use super::{output, stdout_failed};
use crate::output::Show::{Count, Size, Text, Time};
use crate::output::{Column, Output, col, wide};
use crate::problem::{Kind, Outcome, Problem};

pub use open::{Opened, media_problem, open_for_reading, open_for_writing};
pub use volume::{create_problem, make_directories};

/// Files in a directory.
const ENTRY: &[Column] = &[
    col("mode", "mode", Text),
    col("kind", "kind", Text),
    col("size", "size_bytes", Size),
    col("used", "allocated_bytes", Size),
    col("modified", "modified_at", Time),
    col("name", "name", Text),
    wide("path", "path", Text),
    wide("links", "links", Count),
    wide("owner", "owner", Text),
    wide("block", "block_bytes", Size),
    wide("to be zeroed", "to_be_zeroed_blocks", Count),
    wide("addressing", "addressing", Text),
    wide("descriptor", "fd", Text),
    wide("target", "target", Text),
    wide("lun", "lun_identity", Text),
];

/// A volume.
const VOLUME: &[Column] = &[
    col("version", "version", Text),
    col("label", "name", Text),
    col("uuid", "id", Text),
    col("size", "size_bytes", Size),
    col("block", "block_bytes", Size),
    col("blocks", "blocks", Count),
    col("sub-block", "sub_block_bytes", Size),
    col("pointer block", "pointer_block_bytes", Size),
    col("created", "created_at", Time),
    col("lvm uuid", "lvm_uuid", Text),
    col("devices", "devices", Text),
];

/// Runs one command on images; its exit code.
pub fn run(global: &Global, noun: &Noun) -> Outcome<u8> {
    let out = output(global);
    lane::block_on(async {
        match noun {
            Noun::Vmfs(verb) => vmfs(global, &out, verb).await,
            Noun::Vmdk(VmdkVerb::Show { file }) => inspect::vmdk(&out, file).map(|()| 0),
            Noun::Inspect(args) => inspect::inspect(&out, &args.file).await.map(|()| 0),
            _ => Ok(0), // other nouns do not come here
        }
    })
}

async fn vmfs(global: &Global, out: &Output, verb: &VmfsVerb) -> Outcome<u8> {
    match verb {
        VmfsVerb::Create { image, size, version, label, force } => {
            volume::create(global, out, image, size.as_deref(), *version, label, *force).await?;
        }
        VmfsVerb::Ls { images, recursive } => {
            let (images, path) = split_path(images);
            let rows = volume::list(&images, path.unwrap_or("/"), *recursive).await?;
            out.list(&rows, ENTRY).map_err(stdout_failed)?;
        }
        VmfsVerb::Stat { images } => match split_path(images) {
            (images, Some(path)) => {
                let row = volume::stat(&images, path).await?;
                out.object(&row, ENTRY).map_err(stdout_failed)?;
            }
            (images, None) => out.object(&volume::describe(&images).await?, VOLUME).map_err(stdout_failed)?,
        },
        VmfsVerb::Cat { images } => match split_path(images) {
            (images, Some(path)) => transfer::cat(&images, path).await?,
            _ => return Err(Problem::usage("cat needs a path").hint("kagami vmfs cat IMAGE... /dir/file")),
        },
        VmfsVerb::Cp { from, to } => transfer::copy(global, out, from, to).await?,
        VmfsVerb::Mkdir { image, path, parents } => volume::mkdir(global, image, path, *parents).await?,
        VmfsVerb::Rm { image, path } => volume::remove(global, image, path).await?,
        VmfsVerb::Check { images, repair } => return volume::check(global, out, images, *repair).await,
    }
    Ok(0)
}

/// `IMAGE... [PATH]`: a last word that begins with `/` and is no file on the host is the path on the volume.
fn split_path(words: &[String]) -> (Vec<String>, Option<&str>) {
    match words.split_last() {
        Some((last, rest)) if !rest.is_empty() && last.starts_with('/') && !is_host_image(last) => {
            (rest.to_vec(), Some(last))
        }
        _ => (words.to_vec(), None),
    }
}

/// A further device of the volume rather than a path on it: exists here, and is a file or device of some size.
fn is_host_image(word: &str) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(word)
        .is_ok_and(|m| m.file_type().is_block_device() || (m.is_file() && m.len() >= 64 << 20))
}

/// What went wrong on a volume.
pub fn vmfs_problem(what: impl Into<String>, error: &vmfs::Error) -> Problem {
    use vmfs::Error;
    let (code, kind, hint) = match error {
        Error::NotFound { .. } => ("KGM-VFS-0404", Kind::NotFound, "kagami vmfs ls IMAGE PATH"),
        Error::Exists { .. } => ("KGM-VFS-0409", Kind::Conflict, "another name, or kagami vmfs rm"),
        Error::Corrupt(_) | Error::Damaged { .. } => {
            ("KGM-VFS-0001", Kind::Corrupt, "kagami vmfs check IMAGE, or kagami datastore check")
        }
        Error::NotVmfs => ("KGM-VFS-0002", Kind::Failed, "kagami inspect FILE says what it is"),
        Error::WrongDevices { .. } => ("KGM-VFS-0003", Kind::Usage, "name all devices of the volume"),
        Error::BadPath { .. } | Error::WrongKind { .. } => {
            ("KGM-VFS-0004", Kind::Usage, "kagami vmfs stat IMAGE PATH")
        }
        Error::NotEmpty { .. } | Error::InUse { .. } => {
            ("KGM-VFS-0005", Kind::Conflict, "kagami vmfs ls IMAGE PATH")
        }
        Error::ReadOnly { .. } | Error::ForeignHost { .. } => {
            ("KGM-VFS-0006", Kind::Refused, "unmount it where it is in use")
        }
        Error::NoSpace { .. } => {
            ("KGM-VFS-0007", Kind::Failed, "make room: kagami vmfs ls -R IMAGE, kagami vmfs rm")
        }
        _ => ("KGM-VFS-0008", Kind::Failed, "kagami vmfs check IMAGE, or kagami datastore check"),
    };
    Problem::new(code, kind, what).why(error).hint(hint)
}

/// Seconds since 1970 as RFC 3339.
fn time(seconds: u32) -> Value {
    jiff::Timestamp::from_second(i64::from(seconds)).map_or(Value::Null, |t| json!(t.to_string()))
}
