//! Commands on files and devices, which need no daemon.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// Verbs of `vmfs`. IMAGE is a file, a block device, or `POOLFILE:LUN[@SNAP]`.
#[derive(Subcommand, Debug)]
pub enum VmfsVerb {
    /// Make a VMFS volume
    Create {
        /// File or device
        image: PathBuf,
        /// Size of a new file
        #[arg(short, long)]
        size: Option<String>,
        /// VMFS version
        #[arg(long, default_value_t = 5)]
        version: u32,
        /// Name of the volume
        #[arg(long, default_value = "datastore1")]
        label: String,
        /// Overwrite what is there
        #[arg(long)]
        force: bool,
    },
    /// List a directory
    #[command(alias = "list")]
    Ls {
        /// IMAGE... [PATH]: a last word beginning with / is the path
        #[arg(required = true)]
        images: Vec<String>,
        /// With everything below
        #[arg(short = 'R', long)]
        recursive: bool,
    },
    /// Show a file's metadata, or the volume's
    Stat {
        /// IMAGE... [PATH]
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Write a file's bytes to stdout
    Cat {
        /// IMAGE... PATH
        #[arg(required = true, num_args = 2..)]
        images: Vec<String>,
    },
    /// Copy a file in (IMAGE:/PATH last) or out (IMAGE:/PATH first)
    Cp {
        /// FILE or IMAGE:/PATH
        from: String,
        /// FILE or IMAGE:/PATH
        to: String,
    },
    /// Make a directory
    Mkdir {
        /// IMAGE
        image: String,
        /// Path on the volume
        path: String,
        /// Parents too, and no error when it exists
        #[arg(short, long)]
        parents: bool,
    },
    /// Remove a file or an empty directory
    #[command(alias = "delete")]
    Rm {
        /// IMAGE
        image: String,
        /// Path on the volume
        path: String,
    },
    /// Check a volume: 0 clean, 1 could not check, 2 corrupt, 3 leaks only
    Check {
        /// IMAGE...
        #[arg(required = true)]
        images: Vec<String>,
        /// Give leaked blocks back
        #[arg(long)]
        repair: bool,
    },
}

/// Verbs of `vmdk`.
#[derive(Subcommand, Debug)]
pub enum VmdkVerb {
    /// Show a descriptor and its chain
    #[command(alias = "info")]
    Show {
        /// Descriptor on the host
        file: PathBuf,
    },
}

/// Arguments of `inspect`.
#[derive(Args, Debug)]
pub struct InspectArgs {
    /// File, device, or POOLFILE:LUN[@SNAP]
    pub file: String,
}
