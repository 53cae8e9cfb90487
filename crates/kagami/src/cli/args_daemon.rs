//! Commands around the daemon: running it, its configuration, the quickstart, old hands' names.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// Arguments of `serve`.
#[derive(Args, Debug)]
pub struct ServeArgs {
    /// Ask the running daemon to end, and wait for it
    #[arg(long, group = "other")]
    pub stop: bool,
    /// Say whether a daemon runs: 0 it does, 6 it does not
    #[arg(long, group = "other")]
    pub status: bool,
    /// Log lines as JSON
    #[arg(long)]
    pub log_json: bool,
    /// Read this configuration (else kagami.toml in the home; for the system's home also /etc/kagami/kagami.toml)
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Serve NBD on this TCP address too, for example 0.0.0.0:10809; needs --nbd-tls
    #[arg(long, value_name = "ADDRESS")]
    pub nbd_tcp: Option<String>,
    /// Directory with ca-cert.pem, server-cert.pem and server-key.pem: clients need a certificate of that authority
    #[arg(long, value_name = "DIR")]
    pub nbd_tls: Option<PathBuf>,
    /// No TLS on TCP: whoever reaches the port reads and writes all exports
    #[arg(long, conflicts_with = "nbd_tls")]
    pub nbd_plain: bool,
    /// Serve iSCSI on this address; with =ANNOUNCED initiators are told that one instead (may be given several times)
    #[arg(long, value_name = "ADDRESS[=ANNOUNCED]")]
    pub iscsi: Vec<String>,
}

/// Verbs of `config`.
#[derive(Subcommand, Debug)]
pub enum ConfigVerb {
    /// Say what is wrong with a configuration, and start nothing
    Check {
        /// The file (else the one that the daemon of the home would read)
        file: Option<PathBuf>,
    },
    /// Show the configuration with its defaults
    Show {
        /// The file (else the one that the daemon of the home would read)
        file: Option<PathBuf>,
    },
}

/// Arguments of `quickstart`.
#[derive(Args, Debug)]
pub struct QuickstartArgs {
    /// Where everything goes
    #[arg(long, default_value = "kagami-quickstart")]
    pub dir: PathBuf,
    /// Size of D: (C: is half of it)
    #[arg(long, default_value = "2G")]
    pub size: String,
    /// Stop the daemon and remove what an earlier quickstart left in the directory
    #[arg(long)]
    pub remove: bool,
}

/// Arguments of `vmsnap`.
#[derive(Args, Debug)]
pub struct VmsnapArgs {
    /// The VM; without it, all
    pub vm: Option<String>,
    /// The repository
    #[arg(long)]
    pub repo: PathBuf,
    /// Refuse unless so much of the datastore is free: see `backup create --reserve`
    #[arg(long, value_name = "SHARE|SIZE")]
    pub reserve: Option<String>,
}

/// Arguments of the quickstart's writer.
#[derive(Args, Debug)]
pub struct WriterArgs {
    /// NBD socket
    #[arg(long)]
    pub socket: PathBuf,
    /// Exports to write to, in turn
    #[arg(long, required = true)]
    pub export: Vec<String>,
}
