//! The lock of a home. The kernel drops it when the process ends, however it ends.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::{FlockOperation, flock};

use super::in_use;
use crate::home::Home;
use crate::problem::{Outcome, Problem};

/// Holding it means being the daemon of this home.
pub struct HomeLock {
    _file: File,
}

impl HomeLock {
    /// Takes it, or says who has it.
    pub fn take(home: &Home) -> Outcome<Self> {
        let path = home.join("lock");
        let failed =
            |e: std::io::Error| Problem::failed("KGM-SRV-0006", format!("cannot lock {}", path.display()), e);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let mut pid = String::new();
            let _ = (&file).take(32).read_to_string(&mut pid); // only for the message
            return Err(in_use(home, pid.trim()));
        }
        let write = |file: &mut File| {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())
        };
        write(&mut file).map_err(failed)?;
        Ok(Self { _file: file })
    }

    /// Nobody holds it.
    pub fn is_free(home: &Home) -> bool {
        match File::open(home.join("lock")) {
            Ok(file) => flock(&file, FlockOperation::NonBlockingLockShared).is_ok(),
            Err(_) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_daemon_per_home() {
        let dir = std::env::temp_dir().join(format!("kagami-lock-{}", std::process::id()));
        let home = Home::at(&dir).unwrap();
        home.make().unwrap();
        assert!(HomeLock::is_free(&home));
        let lock = HomeLock::take(&home).unwrap();
        assert!(!HomeLock::is_free(&home));
        let problem = HomeLock::take(&home).err().unwrap();
        assert!(problem.detail.contains(&std::process::id().to_string()), "{problem}");
        drop(lock);
        assert!(HomeLock::is_free(&home));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
