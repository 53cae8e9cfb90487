//! One JSON file per object, written so that after a crash the old or the new one is there, never a part.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Largest object file that is read, in bytes.
const MAX_BYTES: u64 = 16 << 20;

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
pub fn save<T: Serialize>(path: &Path, object: &T) -> io::Result<()> {
    let mut bytes = serde_json::to_vec_pretty(object)?;
    bytes.push(b'\n');
    write(path, &bytes)
}

/// Reads an object.
pub fn load<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_BYTES).read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

/// Objects that were read, and what could not be: file names with reasons.
pub type Loaded<T> = (Vec<T>, Vec<(String, io::Error)>);

/// Reads all objects of a directory, in order of their file names. What cannot be read is in the second list, with
/// its file name: one bad file must not hide the others.
pub fn load_all<T: DeserializeOwned>(dir: &Path) -> io::Result<Loaded<T>> {
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

/// Removes a file durably; no error when it is not there.
pub fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Ok(()) => path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bad_file_does_not_hide_the_others() {
        let dir = std::env::temp_dir().join(format!("kagami-files-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        save(&dir.join("b.json"), &2).unwrap();
        save(&dir.join("a.json"), &1).unwrap();
        std::fs::write(dir.join("c.json"), "{").unwrap();
        std::fs::write(dir.join("d.json.new"), "{").unwrap();
        let (good, bad) = load_all::<u32>(&dir).unwrap();
        assert_eq!(good, [1, 2]);
        assert_eq!(bad.len(), 1);
        remove(&dir.join("a.json")).unwrap();
        remove(&dir.join("a.json")).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
