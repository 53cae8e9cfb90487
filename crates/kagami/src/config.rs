//! `kagami.toml`: what the daemon does beyond its home. In the home, or `/etc/kagami/kagami.toml` for the system's home;
//! options of `serve` come before it. No secrets stand in it: keys are files that it names.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vm::vmsnap::Reserve;

use crate::home::Home;
use crate::problem::{Kind, Outcome, Problem};
use crate::store::parse_reserve;

/// The system's configuration.
const SYSTEM: &str = "/etc/kagami/kagami.toml";
/// Name of the file in a home.
pub const FILE: &str = "kagami.toml";
/// Longest file that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// A configuration. What is not written has its default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Exports over NBD.
    pub nbd: Nbd,
    /// Exports over iSCSI.
    pub iscsi: Iscsi,
    /// Backups.
    pub backup: Backup,
    /// The log.
    pub log: Log,
}

/// How backups are made, unless they say otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Backup {
    /// What must be free before disks go to redo logs, as a share of their length (`30%`) or a size (`2G`). Absent: 20 %,
    /// at least 1 GiB, at most the disk's length.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reserve: Option<String>,
}

impl Backup {
    /// The reserve, checked.
    pub fn ready(&self) -> Outcome<Reserve> {
        let parsed = self.reserve.as_deref().map_or(Ok(Reserve::default()), parse_reserve);
        parsed.map_err(|e| wrong(e.title).hint(e.what_to_do))
    }
}

/// How exports are served beyond the home's Unix socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Nbd {
    /// Address and port to serve on too; absent: the Unix socket alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcp: Option<SocketAddr>,
    /// Directory with `ca-cert.pem`, `server-cert.pem` and `server-key.pem`, as QEMU and libnbd name them. Clients need
    /// a certificate of that authority.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<PathBuf>,
    /// Serve on TCP without TLS: whoever reaches the port reads and writes all exports.
    pub plain: bool,
}

/// Where exports are served over iSCSI.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Iscsi {
    /// `ADDRESS:PORT` to serve on, or `ADDRESS:PORT=ANNOUNCED` where initiators must be told another one (behind
    /// address translation).
    pub portals: Vec<String>,
}

/// Where iSCSI is served.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct IscsiPortal {
    /// Address and port.
    pub address: SocketAddr,
    /// What initiators are told instead.
    pub announce: Option<String>,
}

impl Iscsi {
    /// The portals, checked.
    pub fn ready(&self) -> Outcome<Vec<IscsiPortal>> {
        let portal = |text: &String| {
            let (address, announce) = match text.split_once('=') {
                Some((address, announce)) => (address, Some(announce.to_owned())),
                None => (text.as_str(), None),
            };
            let wrong = |e: &dyn std::fmt::Display| {
                wrong(format!("\"{}\" is no iSCSI portal", text.escape_debug()))
                    .why(e)
                    .hint("for example 0.0.0.0:3260, or 0.0.0.0:3260=10.0.2.2:3260")
            };
            let address = address.parse().map_err(|e| wrong(&e))?;
            if announce.as_ref().is_some_and(|a| a.is_empty() || !a.bytes().all(|b| b.is_ascii_graphic())) {
                return Err(wrong(&"what is announced is no address"));
            }
            Ok(IscsiPortal { address, announce })
        };
        self.portals.iter().map(portal).collect()
    }
}

/// How the daemon logs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// Lines as JSON.
    pub json: bool,
    /// `error`, `warn`, `info`, `debug`, `trace`, or a filter such as `info,array=debug`; `KAGAMI_LOG` comes first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub level: Option<String>,
}

/// NBD on TCP, ready to serve.
#[derive(Clone)]
pub struct NbdTcp {
    /// Address and port.
    pub address: SocketAddr,
    /// What the server proves itself with; `None`: no TLS, as the operator said.
    pub tls: Option<front::nbd::Identity>,
}

/// Where exports are served besides the home's socket.
#[derive(Clone, Default)]
pub struct Serving {
    /// NBD on TCP.
    pub nbd_tcp: Option<NbdTcp>,
    /// iSCSI.
    pub iscsi: Vec<IscsiPortal>,
    /// What must be free before disks go to redo logs.
    pub reserve: Reserve,
}

fn wrong(title: impl Into<String>) -> Problem {
    Problem::new("KGM-CFG-0001", Kind::Usage, title).hint("kagami config check, and man kagami-serve")
}

impl Config {
    /// The configuration of a home: the file named, else the home's, else for the system's home the system's. With the
    /// file that it was read from; none is no error unless it was named.
    pub fn load(home: &Home, named: Option<&Path>) -> Outcome<(Self, Option<PathBuf>)> {
        if let Some(file) = named {
            return Self::read(file).map(|c| (c, Some(file.to_owned())));
        }
        let mut places = vec![home.join(FILE)];
        if home.is_system() {
            places.push(SYSTEM.into());
        }
        match places.into_iter().find(|p| p.exists()) {
            Some(file) => Self::read(&file).map(|c| (c, Some(file))),
            None => Ok((Self::default(), None)),
        }
    }

    /// Reads a file and checks what can be checked without starting anything. Relative paths in it are relative to it.
    pub fn read(file: &Path) -> Outcome<Self> {
        let shown = file.display();
        let length = std::fs::metadata(file).map(|m| m.len());
        let text = length.and_then(|length| match length {
            0..=MAX_BYTES => std::fs::read_to_string(file),
            _ => Err(std::io::Error::other("it is longer than 1 MiB")),
        });
        let text = text.map_err(|e| {
            let kind = if e.kind() == std::io::ErrorKind::NotFound { Kind::NotFound } else { Kind::Failed };
            Problem::new("KGM-CFG-0404", kind, format!("cannot read {shown}")).why(e)
        })?;
        let mut config: Self = toml::from_str(&text).map_err(|e| {
            wrong(format!("{shown} was not understood")).why(e.to_string().trim().replace('\n', "; "))
        })?;
        if let (Some(dir), Some(tls)) = (file.parent(), &mut config.nbd.tls) {
            *tls = dir.join(&*tls);
        }
        config.check()?;
        Ok(config)
    }

    /// What contradicts itself.
    fn check(&self) -> Outcome {
        if let Some(level) = &self.log.level {
            level
                .parse::<tracing_subscriber::filter::Targets>()
                .map_err(|e| wrong(format!("\"{level}\" is no log level")).why(e))?;
        }
        self.iscsi.ready()?;
        self.backup.ready()?;
        self.nbd.ready().map(drop)
    }
}

impl Nbd {
    /// Reads the certificates; `None` when TCP is not wanted.
    pub fn ready(&self) -> Outcome<Option<NbdTcp>> {
        let Some(address) = self.tcp else {
            return match (&self.tls, self.plain) {
                (None, false) => Ok(None),
                _ => {
                    Err(wrong("NBD with TLS or plain, and no address to serve on")
                        .hint("--nbd-tcp ADDRESS:PORT"))
                }
            };
        };
        match (&self.tls, self.plain) {
            (Some(dir), false) => Ok(Some(NbdTcp { address, tls: Some(identity(dir)?) })),
            (None, true) => Ok(Some(NbdTcp { address, tls: None })),
            (Some(_), true) => Err(wrong("NBD on TCP is either with TLS or plain")),
            (None, false) => Err(Problem::new(
                "KGM-CFG-0002",
                Kind::Refused,
                format!("NBD is not served on {address} without TLS"),
            )
            .why("whoever reaches the port could read and write every disk")
            .hint("--nbd-tls DIR with ca-cert.pem, server-cert.pem and server-key.pem (or --nbd-plain, knowing that)")),
        }
    }
}

/// The server's certificate, and the authority of its clients.
fn identity(dir: &Path) -> Outcome<front::nbd::Identity> {
    let pem = |name: &str| {
        let file = dir.join(name);
        std::fs::read(&file).map_err(|e| {
            Problem::new("KGM-CFG-0003", Kind::NotFound, format!("cannot read {}", file.display()))
                .why(e)
                .hint(format!("put ca-cert.pem, server-cert.pem and server-key.pem into {}", dir.display()))
        })
    };
    let (chain, key, authority) = (pem("server-cert.pem")?, pem("server-key.pem")?, pem("ca-cert.pem")?);
    front::nbd::Identity::from_pem(&chain, &key, Some(&authority)).map_err(|e| {
        Problem::new(
            "KGM-CFG-0004",
            Kind::Usage,
            format!("the certificates in {} are not used", dir.display()),
        )
        .why(e)
        .hint("openssl verify -CAfile ca-cert.pem server-cert.pem")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Outcome<Config> {
        let file =
            std::env::temp_dir().join(format!("kagami-config-{}-{}.toml", std::process::id(), text.len()));
        std::fs::write(&file, text).unwrap();
        let config = Config::read(&file);
        std::fs::remove_file(&file).unwrap();
        config
    }

    #[test]
    fn what_is_not_written_has_its_default() {
        assert_eq!(read("").unwrap(), Config::default());
        let config =
            read("[nbd]\ntcp = \"127.0.0.1:10809\"\nplain = true\n[log]\nlevel = \"info,array=debug\"\n")
                .unwrap();
        assert!(config.nbd.ready().unwrap().is_some_and(|n| n.tls.is_none()));
        assert_eq!(config.backup.ready().unwrap(), Reserve::default());
        let config = read("[backup]\nreserve = \"2G\"\n").unwrap();
        assert_eq!(config.backup.ready().unwrap(), Reserve::Bytes(2 << 30));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, code) in [
            ("nonsense", "KGM-CFG-0001"),
            ("[nbd]\nport = 1\n", "KGM-CFG-0001"),
            ("[nbd]\ntcp = \"everywhere\"\n", "KGM-CFG-0001"),
            ("[nbd]\ntcp = \"127.0.0.1:10809\"\n", "KGM-CFG-0002"),
            ("[nbd]\nplain = true\n", "KGM-CFG-0001"),
            ("[nbd]\ntcp = \"127.0.0.1:10809\"\ntls = \"nowhere\"\n", "KGM-CFG-0003"),
            ("[log]\nlevel = \"array=loud\"\n", "KGM-CFG-0001"),
            ("[backup]\nreserve = \"much\"\n", "KGM-CFG-0001"),
        ] {
            let problem = read(text).unwrap_err();
            assert_eq!(problem.code, code, "{text}: {problem}");
            assert!(!problem.what_to_do.is_empty(), "{problem}");
        }
    }
}
