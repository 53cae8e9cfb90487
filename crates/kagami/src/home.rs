//! The home of a daemon: where it keeps its state, and the files in it.
//!
//! ```text
//! HOME/
//!   lock        held by the one daemon; its process id
//!   api.sock    REST, mode 0600
//!   nbd.sock    exports
//!   daemon.log  of a daemon that a command started
//!   pools/ datastores/ vms/ exports/ jobs/    one JSON file per object
//!   scsi/       registrations and reservations, one file per logical unit
//!   media/      pool files that were given no place
//! ```

use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD};

use crate::problem::{Kind, Outcome, Problem};

/// The home of packages.
const SYSTEM: &str = "/var/lib/kagami";

/// A daemon's home.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Home {
    dir: PathBuf,
    /// The system's own home: no command starts a daemon there.
    system: bool,
}

impl Home {
    /// The home named on the command line or in the environment, else the default one.
    pub fn find(named: Option<&Path>) -> Outcome<Self> {
        if let Some(dir) = named.filter(|d| !d.as_os_str().is_empty()) {
            return Self::at(dir);
        }
        let usable = |dir: &Path| {
            rustix::fs::accessat(
                CWD,
                dir,
                Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK,
                AtFlags::EACCESS,
            )
            .is_ok()
        };
        if usable(Path::new(SYSTEM)) {
            return Self::at(Path::new(SYSTEM));
        }
        let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
        let data = absolute("XDG_DATA_HOME").or_else(|| Some(absolute("HOME")?.join(".local/share")));
        match data {
            Some(data) => Self::at(&data.join("kagami")),
            None => Err(Problem::new("KGM-CLI-0003", Kind::Usage, "no home for the daemon")
                .why("neither KAGAMI_HOME nor XDG_DATA_HOME nor HOME is set")
                .hint("kagami --home DIR ...")),
        }
    }

    /// The home in this directory, which need not exist yet.
    pub fn at(dir: &Path) -> Outcome<Self> {
        let dir = std::path::absolute(dir)
            .map_err(|e| Problem::failed("KGM-CLI-0004", format!("cannot use {}", dir.display()), e))?;
        let system = dir == Path::new(SYSTEM);
        Ok(Self { dir, system })
    }

    /// Makes the directory and those of the objects; the home itself is for its owner only.
    pub fn make(&self) -> Outcome {
        use std::os::unix::fs::DirBuilderExt;
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        for name in [
            "",
            "pools",
            "datastores",
            "vms",
            "exports",
            "cuts",
            "restores",
            "doing",
            "scsi",
            "jobs",
            "media",
        ] {
            let dir = self.dir.join(name);
            builder.create(&dir).map_err(|e| {
                Problem::failed("KGM-SRV-0001", format!("cannot make {}", dir.display()), e)
                    .hint("kagami --home DIR ... with a directory that you may write to")
            })?;
        }
        Ok(())
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Commands may not start a daemon here.
    pub fn is_system(&self) -> bool {
        self.system
    }

    /// A file or directory in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Socket of the REST interface.
    pub fn api_socket(&self) -> PathBuf {
        self.join("api.sock")
    }

    /// Socket of the exports.
    pub fn nbd_socket(&self) -> PathBuf {
        self.join("nbd.sock")
    }

    /// Refuses a home whose socket paths are longer than the kernel takes (108 bytes with the final zero).
    pub fn check_socket_length(&self) -> Outcome {
        let longest = self.join("api.sock.new");
        if longest.as_os_str().len() < 108 {
            return Ok(());
        }
        Err(Problem::new(
            "KGM-SRV-0002",
            Kind::Usage,
            format!("{} is too long a path for a home", self.dir.display()),
        )
        .why("a Unix socket's path has at most 107 bytes")
        .hint("kagami --home DIR ... with a shorter path"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_is_absolute_and_short_enough() {
        let home = Home::at(Path::new("x")).unwrap();
        assert!(home.dir().is_absolute() && !home.is_system());
        assert!(Home::at(Path::new("/var/lib/kagami")).unwrap().is_system());
        assert!(Home::at(Path::new("/tmp")).unwrap().check_socket_length().is_ok());
        let long = format!("/{}", "x".repeat(120));
        assert!(Home::at(Path::new(&long)).unwrap().check_socket_length().is_err());
    }
}
