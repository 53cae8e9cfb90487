//! Readers that are not ours: `debugvmfs`, `vmfs-fuse` and `fsck.vmfs` of Debian's vmfs-tools, and `dissect.vmfs` from PyPI in a
//! virtual environment. All are run as programs on sparse files. Where one is missing the test says so loudly and
//! passes; with `CI` set that is a failure.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use block::MemoryDisk;

const DISSECT: &str = "dissect.vmfs==3.13";

/// A sparse file with a disk's content, gone when dropped.
pub struct Image(pub PathBuf);

impl Image {
    pub fn of(disk: &MemoryDisk, name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}.img", std::process::id()));
        super::genuine::store(disk, &path);
        Self(path)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

pub fn skip(what: &str, why: impl std::fmt::Display) {
    assert!(std::env::var_os("CI").is_none(), "{what} is needed in CI: {why}");
    eprintln!("SKIPPED: {what}: {why}");
}

/// Output of a program, both streams, and whether it succeeded. `None` (and a loud line) when it is not installed.
pub fn run(program: &str, arguments: &[&str]) -> Option<(bool, String)> {
    // vmfs-tools lie in sbin, which a user's PATH may lack.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    match Command::new(program).args(arguments).env("PATH", path).output() {
        Ok(out) => {
            let text = [out.stdout, out.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
            Some((out.status.success(), text.concat()))
        }
        Err(why) => {
            skip(program, why);
            None
        }
    }
}

/// `debugvmfs IMAGE command...`
pub fn debugvmfs(image: &Image, command: &[&str]) -> Option<String> {
    let mut arguments = vec![image.0.to_str().unwrap()];
    arguments.extend(command);
    let (fine, text) = run("debugvmfs", &arguments)?;
    assert!(fine, "debugvmfs {command:?}: {text}");
    Some(text)
}

/// Runs a Python script with dissect.vmfs at hand: `vmfs` is the opened file system, `fh` the file; answers what it
/// printed.
pub fn dissect(image: &Image, script: &str) -> Option<String> {
    dissect_file(&image.0, script)
}

/// The same on a file that stays.
pub fn dissect_file(image: &Path, script: &str) -> Option<String> {
    let python = match python() {
        Ok(python) => python,
        Err(why) => {
            skip("dissect.vmfs", why);
            return None;
        }
    };
    let open = "import sys, hashlib\nfrom dissect.vmfs.vmfs import VMFS\nfrom dissect.vmfs.lvm import LVM\n\
                fh = open(sys.argv[1], 'rb')\nvmfs = VMFS(LVM(fh).volumes[0].open())\n";
    let script = format!("{open}{script}");
    let out = Command::new(&python).args(["-c", &script]).arg(image).output().unwrap();
    let errors = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "dissect.vmfs: {errors}");
    Some(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// The interpreter of an environment that has dissect.vmfs; made once.
fn python() -> io::Result<PathBuf> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("dissect");
    let (python, done) = (folder.join("bin/python"), folder.join("done"));
    if done.exists() {
        return Ok(python);
    }
    fs::create_dir_all(&folder)?;
    let lock = File::create(folder.with_extension("lock"))?;
    lock.lock()?;
    if done.exists() {
        return Ok(python);
    }
    let step = |program: &Path, arguments: &[&str]| {
        let out = Command::new(program).args(arguments).output()?;
        if out.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&out.stderr).trim().to_string();
        Err(io::Error::other(format!("{} {arguments:?}: {text}", program.display())))
    };
    step(Path::new("python3"), &["-m", "venv", folder.to_str().unwrap()])?;
    step(&python, &["-m", "pip", "install", "--quiet", "--disable-pip-version-check", DISSECT])?;
    fs::write(done, "")?;
    Ok(python)
}
