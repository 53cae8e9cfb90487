//! One JSON file per object, written so that after a crash the old or the new one is there, never a part.
//!
//! Every record says in which format it was written. One that a newer kagami wrote is neither read nor written over nor
//! removed: what this program does not know of it would be lost.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::problem::{Kind, Problem};

/// Largest object file that is read, in bytes.
const MAX_BYTES: u64 = 16 << 20;

/// A kind of record.
pub trait Versioned: DeserializeOwned {
    /// The format that this program writes, and the newest that it reads.
    const FORMAT: u32;
}

/// A record of an object with a name: also when it cannot be read, the object is shown.
pub trait Named: Versioned {
    /// The format that this one was written in.
    fn format(&self) -> u32;
    /// Stands for a record of which only the name of its file is understood.
    fn unknown(name: String, format: u32) -> Self;
}

/// Why a record was not read, or not replaced.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file cannot be read or written.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is none of ours any more.
    #[error("it is damaged: {0}")]
    Damaged(#[from] serde_json::Error),
    /// A newer program wrote it.
    #[error(
        "a newer kagami wrote it: its format is {found}, this one ({}) knows formats up to {known}",
        env!("CARGO_PKG_VERSION")
    )]
    Newer {
        /// The file's format.
        found: u32,
        /// The newest that is known here.
        known: u32,
    },
}

impl RecordError {
    /// What is told of it; `what` did not happen.
    pub fn problem(&self, code: &str, what: impl Into<String>) -> Problem {
        match self {
            Self::Newer { .. } => Problem::new("KGM-SRV-0013", Kind::Refused, what)
                .why(self)
                .hint("use that kagami with this home; the file is left as it is"),
            other => Problem::failed(code, what, other),
        }
    }
}

/// A record that is of a newer format, named by its file.
pub fn newer(path: &Path, found: u32, known: u32) -> Problem {
    let error = RecordError::Newer { found, known };
    error.problem("KGM-SRV-0013", format!("{} cannot be used", path.display()))
}

/// What every format of every record has.
#[derive(Deserialize)]
struct Head {
    format: u32,
}

/// Writes a file by temporary file, fsync, rename, fsync of the directory.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let dir = path.parent().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut temp = path.as_os_str().to_owned();
    temp.push(".new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temp)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&temp, path)?;
    File::open(dir)?.sync_all()
}

/// Writes an object as JSON.
pub fn save<T: Versioned + Serialize>(path: &Path, object: &T) -> Result<(), RecordError> {
    not_newer(path, T::FORMAT)?;
    let mut bytes = serde_json::to_vec_pretty(object)?;
    bytes.push(b'\n');
    Ok(write(path, &bytes)?)
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Refuses a file that is there in a newer format than this.
fn not_newer(path: &Path, known: u32) -> Result<(), RecordError> {
    match read(path).ok().and_then(|bytes| serde_json::from_slice::<Head>(&bytes).ok()) {
        Some(Head { format }) if format > known => Err(RecordError::Newer { found: format, known }),
        _ => Ok(()),
    }
}

/// Reads an object.
pub fn load<T: Versioned>(path: &Path) -> Result<T, RecordError> {
    let bytes = read(path)?;
    // The format first: a newer one may lack what this program wants.
    match serde_json::from_slice::<Head>(&bytes)?.format {
        found if found > T::FORMAT => Err(RecordError::Newer { found, known: T::FORMAT }),
        _ => Ok(serde_json::from_slice(&bytes)?),
    }
}

/// What stands for a record of a newer format: as much of it as is understood, to be shown and never to be written.
pub fn stand_in<T: Named>(path: &Path, found: u32) -> T {
    let understood = read(path).ok().and_then(|bytes| serde_json::from_slice::<T>(&bytes).ok());
    let name = || {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        crate::cli::from_segment(&stem)
    };
    understood.unwrap_or_else(|| T::unknown(name(), found))
}

/// Objects that were read, and what could not be: file names with reasons.
pub type Loaded<T> = (Vec<T>, Vec<(String, RecordError)>);

/// Reads all objects of a directory, in order of their file names. What cannot be read is in the second list, with
/// its file name: one bad file must not hide the others.
pub fn load_all<T: Versioned>(dir: &Path) -> io::Result<Loaded<T>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".json") {
            names.push(name);
        }
    }
    names.sort();
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    for name in names {
        match load(&dir.join(&name)) {
            Ok(object) => good.push(object),
            Err(error) => bad.push((name, error)),
        }
    }
    Ok((good, bad))
}

/// Removes a record, unless a newer program wrote it.
pub fn forget(path: &Path, known: u32) -> Result<(), RecordError> {
    not_newer(path, known)?;
    Ok(remove(path)?)
}

/// Removes a file durably; no error when it is not there.
pub fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Ok(()) => path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

/// Reads a record of the tree's golden home, for the tests of each kind of record: all that stands in it is written
/// again.
#[cfg(test)]
pub fn golden<T: Versioned + Serialize>(name: &str) -> T {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let shown = path.display();
    let was: serde_json::Value = serde_json::from_slice(&read(&path).unwrap()).unwrap();
    let record = load::<T>(&path).unwrap_or_else(|e| panic!("{shown}: {e}"));
    let now = serde_json::to_value(&record).unwrap_or_default();
    assert!(holds(&now, &was), "{shown} was {was}, and is written as {now}");
    record
}

/// Everything that is in one value is in the other too; fields that came later are there besides.
#[cfg(test)]
fn holds(now: &serde_json::Value, was: &serde_json::Value) -> bool {
    match (now, was) {
        (serde_json::Value::Object(now), serde_json::Value::Object(was)) => {
            was.iter().all(|(key, was)| now.get(key).is_some_and(|now| holds(now, was)))
        }
        (now, was) => now == was,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(PartialEq, Debug, Serialize, Deserialize)]
    struct Thing {
        format: u32,
        name: String,
    }

    impl Versioned for Thing {
        const FORMAT: u32 = 3;
    }

    impl Named for Thing {
        fn format(&self) -> u32 {
            self.format
        }
        fn unknown(name: String, format: u32) -> Self {
            Self { format, name }
        }
    }

    fn thing(name: &str) -> Thing {
        Thing { format: 3, name: name.into() }
    }

    fn place(name: &str) -> std::path::PathBuf {
        let dir = std::env::temp_dir().join(format!("kagami-files-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn one_bad_file_does_not_hide_the_others() {
        let dir = place("bad");
        save(&dir.join("b.json"), &thing("b")).unwrap();
        save(&dir.join("a.json"), &thing("a")).unwrap();
        std::fs::write(dir.join("c.json"), "{").unwrap();
        std::fs::write(dir.join("d.json.new"), "{").unwrap();
        let (good, bad) = load_all::<Thing>(&dir).unwrap();
        assert_eq!(good, [thing("a"), thing("b")]);
        assert_eq!(bad.len(), 1);
        remove(&dir.join("a.json")).unwrap();
        remove(&dir.join("a.json")).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_newer_record_is_not_read_not_written_over_and_not_removed() {
        let dir = place("newer");
        // With a field that is not known, and without one that is wanted.
        for (text, shown) in [
            (r#"{"format": 4, "name": "a", "colour": "red"}"#, "a"),
            (r#"{"format": 4, "called": "a"}"#, "db/scsi0:1"),
        ] {
            let path = dir.join("db%2Fscsi0%3A1.json");
            std::fs::write(&path, text).unwrap();
            let error = load::<Thing>(&path).unwrap_err();
            assert!(matches!(error, RecordError::Newer { found: 4, known: 3 }), "{error}");
            let problem = newer(&path, 4, 3);
            assert!(problem.title.contains("db%2Fscsi0%3A1.json"), "{problem}");
            assert!(
                problem.detail.contains("format is 4") && problem.detail.contains("up to 3"),
                "{problem}"
            );
            let stands = stand_in::<Thing>(&path, 4);
            assert_eq!((stands.name.as_str(), stands.format()), (shown, 4));
            assert!(matches!(save(&path, &thing("a")), Err(RecordError::Newer { .. })));
            assert!(matches!(forget(&path, 3), Err(RecordError::Newer { .. })));
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
        // Of the own format, or damaged: written over as ever.
        std::fs::write(dir.join("x.json"), "{").unwrap();
        save(&dir.join("x.json"), &thing("x")).unwrap();
        forget(&dir.join("x.json"), 3).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
