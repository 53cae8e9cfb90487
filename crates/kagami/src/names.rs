//! How objects are named: `lun@snap`, `[datastore] dir/disk.vmdk` or `datastore:dir/disk.vmdk`, `POOLFILE:LUN[@SNAP]`.

use std::fmt;
use std::path::PathBuf;

use crate::problem::{Outcome, Problem, check_name};

/// A snapshot: `lun@snap`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapName {
    /// The LUN (or the group) it is of.
    pub of: String,
    /// The snapshot.
    pub snap: String,
}

impl SnapName {
    /// Reads `lun@snap`.
    pub fn parse(text: &str) -> Outcome<Self> {
        let Some((of, snap)) = text.split_once('@') else {
            return Err(Problem::usage(format!("\"{text}\" names no snapshot")).hint("write LUN@SNAPSHOT"));
        };
        check_name("snapshot", snap)?;
        Ok(Self { of: of.to_owned(), snap: snap.to_owned() })
    }
}

impl fmt::Display for SnapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.of, self.snap)
    }
}

/// A file on a datastore.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FileName {
    /// The datastore's name.
    pub datastore: String,
    /// Absolute path on it, `/` first, without `.`, `..` and empty parts.
    pub path: String,
}

impl FileName {
    /// Reads `[datastore] dir/file` or `datastore:dir/file`.
    pub fn parse(text: &str) -> Outcome<Self> {
        let bracketed = text.strip_prefix('[').and_then(|rest| rest.split_once(']'));
        let split = bracketed.or_else(|| text.split_once(':'));
        let Some((datastore, path)) = split else {
            return Err(Problem::usage(format!("\"{text}\" names no file on a datastore"))
                .hint("write datastore:dir/file.vmdk or '[datastore] dir/file.vmdk'"));
        };
        check_name("datastore", datastore)?;
        Ok(Self { datastore: datastore.to_owned(), path: clean_path(path.trim_start())? })
    }

    /// The last part.
    pub fn file(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or("")
    }
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}] {}", self.datastore, self.path.trim_start_matches('/'))
    }
}

/// A path on a volume: made absolute; `..` is refused rather than resolved, so that nothing leaves its directory.
pub fn clean_path(path: &str) -> Outcome<String> {
    let mut out = String::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                return Err(Problem::usage(format!("\"{path}\" has \"..\" in it"))
                    .hint("write the path from the root of the datastore"));
            }
            _ if part.len() > 127 || part.contains('\0') => {
                return Err(Problem::usage(format!("\"{}\" is no file name", part.escape_debug()))
                    .why("a name on VMFS has up to 127 bytes and no zero byte"));
            }
            _ => {
                out.push('/');
                out.push_str(part);
            }
        }
    }
    if out.is_empty() {
        out.push('/');
    }
    Ok(out)
}

/// An image given to a command that works without the daemon.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Image {
    /// A file or a block device.
    File(PathBuf),
    /// A LUN, or a snapshot of it, in a pool on this file.
    Lun {
        /// The pool's (first) file.
        pool: PathBuf,
        /// The LUN's name, UUID or `naa.` identity.
        lun: String,
        /// The snapshot's name.
        snap: Option<String>,
    },
}

impl Image {
    /// Reads `FILE` or `POOLFILE:LUN[@SNAP]`. A file that exists under the whole text is that file.
    pub fn parse(text: &str) -> Self {
        let whole = PathBuf::from(text);
        if whole.exists() {
            return Self::File(whole);
        }
        match text.rsplit_once(':') {
            Some((pool, lun)) if !lun.is_empty() && !lun.contains('/') && PathBuf::from(pool).exists() => {
                let (lun, snap) = match lun.split_once('@') {
                    Some((lun, snap)) => (lun, Some(snap.to_owned())),
                    None => (lun, None),
                };
                Self::Lun { pool: pool.into(), lun: lun.to_owned(), snap }
            }
            _ => Self::File(whole),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_on_datastores() {
        let file = FileName::parse("[ds1] mail/mail.vmdk").unwrap();
        assert_eq!(file, FileName::parse("ds1:mail/mail.vmdk").unwrap());
        assert_eq!(file, FileName::parse("ds1:/mail//./mail.vmdk").unwrap());
        assert_eq!(file.file(), "mail.vmdk");
        assert_eq!(file.to_string(), "[ds1] mail/mail.vmdk");
        for bad in ["mail.vmdk", "[ds1 mail", "../x:y", "ds1:../../etc/passwd", "ds1:a/../b"] {
            assert!(FileName::parse(bad).is_err(), "{bad}");
        }
        assert!(clean_path(&"x".repeat(128)).is_err());
    }

    #[test]
    fn snapshots() {
        assert_eq!(SnapName::parse("d@s1").unwrap().to_string(), "d@s1");
        assert!(SnapName::parse("d").is_err());
        assert!(SnapName::parse("d@a/b").is_err());
    }

    #[test]
    fn images() {
        assert_eq!(Image::parse("/nowhere:lun"), Image::File("/nowhere:lun".into()));
        let here = std::env::temp_dir();
        let text = format!("{}:l1@s", here.display());
        assert_eq!(Image::parse(&text), Image::Lun { pool: here, lun: "l1".into(), snap: Some("s".into()) });
    }
}
