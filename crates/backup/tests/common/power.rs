//! A directory that loses power: replays a recorded sequence of changes up to a cut and gives what a file system may
//! then hold. What was synced is there; every other sector of 512 bytes and every other change of a directory is
//! there or not, each by itself.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use backup::{Change, Watch};

use super::Noise;

/// A [`Change`] that owns its bytes.
#[derive(Clone, Debug)]
pub enum Recorded {
    Create(PathBuf),
    Write(PathBuf, u64, Vec<u8>),
    Sync(PathBuf),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
    SyncDirectory(PathBuf),
    MakeDirectory,
}

/// Records everything, in order.
#[derive(Clone, Default)]
pub struct Recorder(Arc<Mutex<Vec<Recorded>>>);

impl Recorder {
    pub fn watch(&self) -> Watch {
        let list = Arc::clone(&self.0);
        Arc::new(move |change| {
            let own = |p: &Path| p.to_owned();
            list.lock().unwrap().push(match change {
                Change::MakeDirectory(_) => Recorded::MakeDirectory,
                Change::Create(p) => Recorded::Create(own(p)),
                Change::Write(p, at, bytes) => Recorded::Write(own(p), *at, bytes.to_vec()),
                Change::Sync(p) => Recorded::Sync(own(p)),
                Change::Rename(a, b) => Recorded::Rename(own(a), own(b)),
                Change::Remove(p) => Recorded::Remove(own(p)),
                Change::SyncDirectory(p) => Recorded::SyncDirectory(own(p)),
            });
            Ok(())
        })
    }

    pub fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    pub fn take(&self) -> Vec<Recorded> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// Fails change number `n` with an error number.
pub fn failing(n: usize, errno: i32) -> Watch {
    let seen = Mutex::new(0);
    Arc::new(move |_| {
        let mut seen = seen.lock().unwrap();
        *seen += 1;
        // Everything from there on: a full disk stays full.
        if *seen > n { Err(io::Error::from_raw_os_error(errno)) } else { Ok(()) }
    })
}

/// Files by name: what is on the medium after the power is back.
pub type Image = BTreeMap<PathBuf, Vec<u8>>;

#[derive(Clone, Default)]
struct Inode {
    durable: Vec<u8>,
    pending: Vec<(u64, Vec<u8>)>,
}

impl Inode {
    fn put(content: &mut Vec<u8>, at: usize, bytes: &[u8]) {
        content.resize(content.len().max(at + bytes.len()), 0);
        content[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn after_the_cut(&self, noise: &mut Noise) -> Vec<u8> {
        let mut content = self.durable.clone();
        let all = noise.below(4) == 0;
        for (at, bytes) in &self.pending {
            for (n, sector) in bytes.chunks(512).enumerate() {
                if all || noise.below(2) == 0 {
                    Self::put(&mut content, *at as usize + n * 512, sector);
                }
            }
        }
        content
    }
}

#[derive(Clone)]
enum NameChange {
    Set(PathBuf, usize),
    Gone(PathBuf),
    Move(PathBuf, PathBuf, usize),
}

/// What syncs are believed: to prove that a missing one is noticed.
#[derive(Copy, Clone, PartialEq, Eq)]
pub enum Believe {
    All,
    NoPackSync,
    NoManifestSync,
    NoDirectorySync,
    NoIndexSync,
}

/// Replays `changes[..cut]` on `before` and loses power.
pub fn cut(before: &Image, changes: &[Recorded], seed: u64, believe: Believe) -> Image {
    let mut noise = Noise::new(seed);
    let mut inodes: Vec<Inode> = Vec::new();
    let mut durable: BTreeMap<PathBuf, usize> = BTreeMap::new();
    for (name, content) in before {
        durable.insert(name.clone(), inodes.len());
        inodes.push(Inode { durable: content.clone(), pending: Vec::new() });
    }
    let mut live = durable.clone();
    let mut pending: Vec<(PathBuf, NameChange)> = Vec::new();
    let parent = |p: &Path| p.parent().unwrap_or(Path::new("")).to_owned();
    for change in changes {
        match change {
            Recorded::MakeDirectory => {}
            Recorded::Create(name) => {
                live.insert(name.clone(), inodes.len());
                pending.push((parent(name), NameChange::Set(name.clone(), inodes.len())));
                inodes.push(Inode::default());
            }
            Recorded::Write(name, at, bytes) => inodes[live[name]].pending.push((*at, bytes.clone())),
            Recorded::Sync(name) => {
                let ignored = match believe {
                    Believe::NoPackSync => name.starts_with("packs"),
                    Believe::NoManifestSync => name.starts_with("manifests"),
                    Believe::NoIndexSync => name.starts_with("index"),
                    Believe::All | Believe::NoDirectorySync => false,
                };
                let inode = &mut inodes[live[name]];
                if !ignored {
                    for (at, bytes) in std::mem::take(&mut inode.pending) {
                        Inode::put(&mut inode.durable, at as usize, &bytes);
                    }
                }
            }
            Recorded::Rename(from, to) => {
                let inode = live.remove(from).unwrap();
                live.insert(to.clone(), inode);
                pending.push((parent(to), NameChange::Move(from.clone(), to.clone(), inode)));
            }
            Recorded::Remove(name) => {
                live.remove(name);
                pending.push((parent(name), NameChange::Gone(name.clone())));
            }
            Recorded::SyncDirectory(directory) if believe != Believe::NoDirectorySync => {
                for (_, change) in pending.extract_if(.., |(d, _)| d == directory) {
                    apply(&mut durable, change);
                }
            }
            Recorded::SyncDirectory(_) => {}
        }
    }
    // Journaled file systems keep directory changes in order; nothing promises it.
    let (in_order, keep) = (noise.below(2) == 0, noise.below(pending.len() as u64 + 1) as usize);
    for (n, (_, change)) in pending.into_iter().enumerate() {
        if if in_order { n < keep } else { noise.below(2) == 0 } {
            apply(&mut durable, change);
        }
    }
    durable.into_iter().map(|(name, inode)| (name, inodes[inode].after_the_cut(&mut noise))).collect()
}

fn apply(names: &mut BTreeMap<PathBuf, usize>, change: NameChange) {
    match change {
        NameChange::Set(name, inode) => drop(names.insert(name, inode)),
        NameChange::Gone(name) => drop(names.remove(&name)),
        NameChange::Move(from, to, inode) => {
            names.remove(&from);
            names.insert(to, inode);
        }
    }
}

/// Puts an image into a directory, which is made anew.
pub fn materialise(image: &Image, directory: &Path) {
    let _ = std::fs::remove_dir_all(directory);
    for name in ["packs", "index", "manifests"] {
        std::fs::create_dir_all(directory.join(name)).unwrap();
    }
    for (name, content) in image {
        std::fs::write(directory.join(name), content).unwrap();
    }
}

/// Reads a directory of a repository as an image; the lock is nobody's content.
pub fn image_of(directory: &Path) -> Image {
    let mut image = Image::new();
    for folder in ["", "packs", "index", "manifests"] {
        for entry in std::fs::read_dir(directory.join(folder)).unwrap().map(|e| e.unwrap()) {
            if entry.file_type().unwrap().is_file() && entry.file_name() != "lock" {
                let name = Path::new(folder).join(entry.file_name());
                image.insert(name, std::fs::read(entry.path()).unwrap());
            }
        }
    }
    image
}
