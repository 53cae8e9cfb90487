//! The command line: `kagami NOUN VERB [OBJECT] [OPTIONS]` (conventions: ecosystem page, chapters 2 to 4).

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use crate::cli::args_daemon::{ConfigVerb, QuickstartArgs, ServeArgs, VmsnapArgs, WriterArgs};
use crate::cli::args_images::{InspectArgs, VmdkVerb, VmfsVerb};
use crate::cli::old_names::VmkfstoolsArgs;
use crate::output::{Color, Format};

/// Text below `--help`.
const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 conflict or in use, 5 refused by a safety check, 6 daemon not
reachable, 7 some of many failed. check and verify: 0 clean, 1 could not check, 2 corrupt, 3 leaks only.

Sizes: 10G is 10 x 2^30 bytes (K M G T P, KiB ...), 10GB is 10 x 10^9, a bare number is bytes.
Home: --home, else $KAGAMI_HOME, else /var/lib/kagami where that may be used, else $XDG_DATA_HOME/kagami.
Start here: kagami quickstart";

/// VM storage with raw device mapping, snapshots, clones and online backup.
#[derive(Parser, Debug)]
#[command(name = "kagami", version, after_help = EXIT_CODES, max_term_width = 110, disable_help_subcommand = true)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub noun: Noun,
}

/// Options of every command.
#[derive(Args, Debug, Clone, Default)]
pub struct Global {
    /// Where the daemon keeps its state
    #[arg(long, global = true, value_name = "DIR", env = "KAGAMI_HOME", hide_env_values = true)]
    pub home: Option<PathBuf>,
    /// How data is printed
    #[arg(short, long, global = true, value_enum, default_value = "table", value_name = "FORMAT")]
    pub output: Format,
    /// Print identities alone
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Say what would be done, and do nothing
    #[arg(short = 'n', long, global = true)]
    pub dry_run: bool,
    /// Do not ask before something is destroyed
    #[arg(short = 'y', long, global = true)]
    pub yes: bool,
    /// Colours
    #[arg(long, global = true, value_enum, default_value = "auto", value_name = "WHEN")]
    pub color: Color,
    /// No progress lines
    #[arg(long, global = true)]
    pub no_progress: bool,
}

/// Nouns, and the few commands that are none.
#[derive(Subcommand, Debug)]
pub enum Noun {
    /// Pools: files or block devices that hold LUNs
    #[command(subcommand)]
    Pool(PoolVerb),
    /// LUNs: thin disks in a pool
    #[command(subcommand)]
    Lun(LunVerb),
    /// Snapshots of LUNs
    #[command(subcommand)]
    Snap(SnapVerb),
    /// Clones: writable LUNs on top of a snapshot
    #[command(subcommand)]
    Clone(CloneVerb),
    /// Consistency groups of LUNs
    #[command(subcommand)]
    Group(GroupVerb),
    /// Datastores: VMFS on a LUN
    #[command(subcommand)]
    Datastore(DatastoreVerb),
    /// Disks of VMs on a datastore (VMDK)
    #[command(subcommand)]
    Disk(DiskVerb),
    /// Raw device mappings
    #[command(subcommand)]
    Rdm(RdmVerb),
    /// Virtual machines
    #[command(subcommand)]
    Vm(VmVerb),
    /// Online backup
    #[command(subcommand)]
    Backup(BackupVerb),
    /// Restore a backup: as a new VM, in place, one disk, or to a file
    #[command(visible_alias = "vmres")]
    Restore(RestoreArgs),
    /// Disks, LUNs and snapshots served over NBD
    #[command(subcommand)]
    Export(ExportVerb),
    /// Long work of the daemon
    #[command(subcommand)]
    Job(JobVerb),
    /// VMFS in files and devices, without the daemon
    #[command(subcommand)]
    Vmfs(VmfsVerb),
    /// VMDK descriptors, without the daemon
    #[command(subcommand)]
    Vmdk(VmdkVerb),
    /// Say what a file is and what it holds, without the daemon
    Inspect(InspectArgs),
    /// Run the daemon of a home
    Serve(ServeArgs),
    /// The daemon's configuration, kagami.toml
    #[command(subcommand)]
    Config(ConfigVerb),
    /// See the whole main job in about a minute: pool, datastore, VM, backup online, restore, proof
    Quickstart(QuickstartArgs),
    /// Back a VM up by redo logs, as ESX 2.5's vmsnap.pl does
    Vmsnap(VmsnapArgs),
    /// Map a LUN (-r, -z) or make a disk (-c), as ESX's vmkfstools does
    Vmkfstools(VmkfstoolsArgs),
    /// Print a completion script
    Completions {
        /// For which shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages
    Man {
        /// Into which directory (else kagami(1) on stdout)
        directory: Option<PathBuf>,
    },
    /// The writer of the quickstart, a process of its own
    #[command(name = "quickstart-writer", hide = true)]
    QuickstartWriter(WriterArgs),
}

/// Verbs of `pool`.
#[derive(Subcommand, Debug)]
pub enum PoolVerb {
    /// Make a pool
    Create {
        /// Its name
        name: String,
        /// Files or block devices; without any, one file in the home
        media: Vec<PathBuf>,
        /// Size of each new file
        #[arg(short, long)]
        size: Option<String>,
        /// Succeed when it exists already
        #[arg(long)]
        if_not_exists: bool,
    },
    /// List pools
    #[command(alias = "list")]
    Ls,
    /// Show a pool
    #[command(alias = "info")]
    Show {
        /// Its name
        name: String,
    },
    /// Check a pool's metadata: 0 clean, 1 could not check, 2 corrupt, 3 leaks only
    Check {
        /// Its name
        name: String,
        /// Give back what is marked as used and belongs to nobody; guests go on meanwhile, and nothing else is changed
        #[arg(long)]
        repair: bool,
    },
    /// Bring a pool with all its LUNs, snapshots and mappings to this home
    Import {
        /// Its files or block devices
        #[arg(required = true)]
        media: Vec<PathBuf>,
        /// A new name (else the one it has)
        #[arg(long)]
        name: Option<String>,
    },
    /// Open a pool again after a failed flush, without restarting the daemon
    Reopen {
        /// Its name
        name: String,
    },
    /// Take a pool out of this home, with its datastores, VMs and exports; its files stay (see import)
    #[command(alias = "delete")]
    Rm {
        /// Its name
        name: String,
    },
}

/// Verbs of `lun`.
#[derive(Subcommand, Debug)]
pub enum LunVerb {
    /// Make a thin LUN
    Create {
        /// Its name
        name: String,
        /// Its size
        #[arg(short, long)]
        size: String,
        /// In which pool (needed when there are several)
        #[arg(short, long)]
        pool: Option<String>,
        /// Succeed when it exists already with this size
        #[arg(long)]
        if_not_exists: bool,
    },
    /// List LUNs
    #[command(alias = "list")]
    Ls {
        /// Those in the trash
        #[arg(long)]
        trash: bool,
    },
    /// Show a LUN
    #[command(alias = "info")]
    Show {
        /// Name, UUID or naa. identity
        lun: String,
    },
    /// Grow a LUN
    Resize {
        /// Name, UUID or naa. identity
        lun: String,
        /// New size
        size: String,
    },
    /// Remove a LUN: it lies in the trash for 7 days
    #[command(alias = "delete")]
    Rm {
        /// Name, UUID or naa. identity
        lun: String,
        /// Give the space back at once
        #[arg(long)]
        now: bool,
    },
    /// Take a LUN out of the trash
    Undelete {
        /// Name or UUID
        lun: String,
    },
    /// Let go what somebody who will not come back holds of the LUN's past, as backups to a repository that is gone
    Release {
        /// Name, UUID or naa. identity
        lun: String,
        /// Who holds it: kagami pool show POOL -o wide
        holder: String,
    },
    /// Return to what the LUN held before it was reverted; what was written since is given up
    UndoRevert {
        /// Name, UUID or naa. identity
        lun: String,
    },
}

/// Verbs of `snap`.
#[derive(Subcommand, Debug)]
pub enum SnapVerb {
    /// Take a snapshot of a LUN
    Create {
        /// LUN@SNAPSHOT
        snap: String,
    },
    /// List snapshots
    #[command(alias = "list")]
    Ls {
        /// Of this LUN only
        lun: Option<String>,
    },
    /// Remove a snapshot
    #[command(alias = "delete")]
    Rm {
        /// LUN@SNAPSHOT
        snap: String,
    },
    /// Set a LUN back to a snapshot; what it held is kept until --accept
    Revert {
        /// LUN@SNAPSHOT
        snap: String,
        /// Give up the abandoned content
        #[arg(long)]
        accept: bool,
    },
}

/// Verbs of `clone`.
#[derive(Subcommand, Debug)]
pub enum CloneVerb {
    /// Make a writable LUN from a snapshot, in constant time
    Create {
        /// LUN@SNAPSHOT
        snap: String,
        /// Name of the new LUN
        name: String,
    },
}

/// Verbs of `group`.
#[derive(Subcommand, Debug)]
pub enum GroupVerb {
    /// Cut several LUNs at one instant
    Create {
        /// Name of the cut: each member gets a snapshot of this name
        name: String,
        /// LUNs
        #[arg(required = true)]
        luns: Vec<String>,
    },
    /// List group cuts
    #[command(alias = "list")]
    Ls,
    /// End cuts over several pools that are in doubt because the deciding pool is not here
    Resolve {
        /// Identity of the cut (else all that the pools which are here can decide)
        group: Option<String>,
        /// Say yourself: the cut happened (yes) or not (no)
        #[arg(long, value_enum, value_name = "ANSWER", requires = "group")]
        happened: Option<Answer>,
    },
}

/// An operator's answer.
#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum)]
pub enum Answer {
    /// It did.
    Yes,
    /// It did not.
    No,
}

/// Verbs of `datastore`.
#[derive(Subcommand, Debug)]
pub enum DatastoreVerb {
    /// Make a VMFS datastore on a LUN
    Create {
        /// Its name and label
        name: String,
        /// An existing LUN (its content is lost)
        #[arg(long, conflicts_with = "size")]
        lun: Option<String>,
        /// Make a LUN of this size for it
        #[arg(short, long)]
        size: Option<String>,
        /// In which pool the new LUN goes
        #[arg(short, long)]
        pool: Option<String>,
        /// Succeed when it exists already
        #[arg(long)]
        if_not_exists: bool,
    },
    /// List datastores
    #[command(alias = "list")]
    Ls,
    /// Show a datastore
    #[command(alias = "info")]
    Show {
        /// Its name
        name: String,
    },
    /// Check the volume: 0 clean, 1 could not check, 2 corrupt, 3 leaks only
    Check {
        /// Its name
        name: String,
    },
    /// Bring a volume that lies on a LUN of ours to this home, with the VMs on it
    Attach {
        /// The LUN
        lun: String,
        /// Under this name (else the volume's label)
        #[arg(long)]
        name: Option<String>,
    },
    /// Take a datastore out of this home; its LUN stays with what it holds, or goes to the trash with --lun
    #[command(alias = "delete")]
    Rm {
        /// Its name
        name: String,
        /// The LUN too
        #[arg(long)]
        lun: bool,
    },
}

/// How the space of a disk is taken.
#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum, Default)]
pub enum Provisioning {
    /// Blocks when they are first written.
    #[default]
    Thin,
    /// All blocks now, zeroed when first written.
    Thick,
    /// All blocks now, zeroed now.
    Eager,
}

/// Verbs of `disk`.
#[derive(Subcommand, Debug)]
pub enum DiskVerb {
    /// Make a disk on a datastore
    Create {
        /// DATASTORE:DIR/NAME.vmdk
        disk: String,
        /// Its size
        #[arg(short, long)]
        size: String,
        /// How its space is taken
        #[arg(short, long, value_enum, default_value = "thin")]
        provisioning: Provisioning,
    },
    /// List the disks on a datastore
    #[command(alias = "list")]
    Ls {
        /// The datastore (else all)
        datastore: Option<String>,
    },
    /// Show a disk: descriptor, chain, place
    #[command(alias = "info")]
    Show {
        /// DATASTORE:DIR/NAME.vmdk
        disk: String,
    },
    /// Join links of a chain that do not fit together any more (a CID mismatch), after a look at the evidence (-n)
    Repair {
        /// The top of the chain: DATASTORE:DIR/NAME.vmdk
        disk: String,
        /// Who decided, and why: stands in the record
        #[arg(long)]
        reason: Option<String>,
        /// A backup of the parent from when the child was made: sampled blocks are compared with it
        #[arg(long, requires = "repo", requires = "backup_disk")]
        backup: Option<String>,
        /// The repository of that backup
        #[arg(long, requires = "backup")]
        repo: Option<PathBuf>,
        /// The disk in that backup, such as scsi0:0
        #[arg(long, value_name = "SLOT", requires = "backup")]
        backup_disk: Option<String>,
    },
    /// Remove a disk and its extents
    #[command(alias = "delete")]
    Rm {
        /// DATASTORE:DIR/NAME.vmdk
        disk: String,
    },
}

/// Compatibility mode of a mapping.
#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum, Default)]
pub enum RdmMode {
    /// Reads and writes reach the LUN; takes part in VM snapshots (vmkfstools -r).
    #[default]
    Virtual,
    /// Every SCSI command reaches the LUN (vmkfstools -z).
    Physical,
}

/// Verbs of `rdm`.
#[derive(Subcommand, Debug)]
pub enum RdmVerb {
    /// Map a LUN: makes the mapping file and its descriptor
    Create {
        /// DATASTORE:DIR/NAME.vmdk
        disk: String,
        /// The LUN to map
        #[arg(long)]
        lun: String,
        /// Compatibility mode
        #[arg(short, long, value_enum, default_value = "virtual")]
        mode: RdmMode,
    },
    /// List mappings
    #[command(alias = "list")]
    Ls,
    /// Show a mapping: identity in its three places, and what it resolves to
    #[command(alias = "info")]
    Show {
        /// DATASTORE:DIR/NAME.vmdk
        disk: String,
    },
    /// Take over the size of a LUN that has grown
    Grow {
        /// DATASTORE:DIR/NAME.vmdk
        disk: String,
    },
    /// Point a mapping at another LUN
    Remap {
        /// DATASTORE:DIR/NAME.vmdk
        disk: String,
        /// The new LUN
        #[arg(long)]
        to: String,
    },
    /// List LUNs that no mapping points to and mappings without LUN; rebuild a lost mapping
    Scan {
        /// Write the mapping files that are lost
        #[arg(long)]
        rebuild: bool,
    },
    /// Change the compatibility mode; the data is not touched
    Convert {
        /// DATASTORE:DIR/NAME.vmdk
        disk: String,
        /// New mode
        #[arg(short, long, value_enum)]
        mode: RdmMode,
    },
}

/// Verbs of `vm`.
#[derive(Subcommand, Debug)]
pub enum VmVerb {
    /// Make a VM: its directory, its .vmx, its disks
    Create {
        /// Its name
        name: String,
        /// Where its directory goes
        #[arg(short, long)]
        datastore: String,
        /// A new disk of this size on the datastore (may be repeated)
        #[arg(long, value_name = "SIZE")]
        disk: Vec<String>,
        /// Map this LUN as a disk, LUN or LUN:physical (may be repeated)
        #[arg(long, value_name = "LUN[:MODE]")]
        rdm: Vec<String>,
        /// Memory, for the .vmx
        #[arg(long, default_value = "1G")]
        memory: String,
    },
    /// Register a .vmx that lies on a datastore
    Register {
        /// DATASTORE:DIR/NAME.vmx
        vmx: String,
        /// Under this name (else its displayName)
        #[arg(long)]
        name: Option<String>,
    },
    /// List VMs
    #[command(alias = "list")]
    Ls,
    /// Show a VM and its disks
    #[command(alias = "info")]
    Show {
        /// Its name
        name: String,
    },
    /// Plug a disk into a VM
    Attach {
        /// Its name
        name: String,
        /// DATASTORE:DIR/NAME.vmdk
        disk: String,
        /// Where, for example scsi0:1 (else the first free slot)
        #[arg(long)]
        slot: Option<String>,
        /// How it takes part in snapshots and backups
        #[arg(long, default_value = "persistent", value_parser = ["persistent", "independent-persistent"])]
        mode: String,
    },
    /// Unplug a disk from a VM; its files stay
    Detach {
        /// Its name
        name: String,
        /// Where, for example scsi0:1
        slot: String,
    },
    /// Unregister a VM; with --files its directory goes too (mapped LUNs stay)
    #[command(alias = "delete")]
    Rm {
        /// Its name
        name: String,
        /// Remove its files
        #[arg(long)]
        files: bool,
    },
}

/// How the disks on VMFS are frozen.
#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum, Default)]
pub enum Via {
    /// A redo log on each disk on VMFS, committed afterwards.
    Redo,
    /// A cut of the datastore's LUN below VMFS: no redo log, nothing to commit.
    #[default]
    Snapshot,
}

/// Verbs of `backup`.
#[derive(Subcommand, Debug)]
pub enum BackupVerb {
    /// Back VMs up while they run, all as they are at one instant; only what changed since the last backup is read
    Create {
        /// The VM; several are cut together, and each gets a backup of its own
        #[arg(required = true, value_name = "VM")]
        vms: Vec<String>,
        /// The repository (made when it is not there)
        #[arg(long)]
        repo: PathBuf,
        /// How disks on VMFS are frozen
        #[arg(long, value_enum, default_value = "snapshot")]
        via: Via,
        /// Read everything
        #[arg(long)]
        full: bool,
        /// Read at most so much a second from each disk, such as 100M/s
        #[arg(long, value_name = "RATE")]
        limit: Option<String>,
        /// By redo logs: refuse unless so much of the datastore and of its pool is free, such as 30% (of the disks) or 2G;
        /// 20%, at least 1G, at most the disks' length, unless kagami.toml says otherwise
        #[arg(long, value_name = "SHARE|SIZE")]
        reserve: Option<String>,
        /// Print the job and do not wait for it
        #[arg(long)]
        detach: bool,
    },
    /// List backups
    #[command(alias = "list")]
    Ls {
        /// The repository
        #[arg(long)]
        repo: PathBuf,
    },
    /// Show a backup
    #[command(alias = "info")]
    Show {
        /// Its id, the beginning of it, or a VM's name (its latest)
        backup: String,
        /// The repository
        #[arg(long)]
        repo: PathBuf,
    },
    /// Read a backup back and prove it: 0 clean, 1 could not check, 2 corrupt
    Verify {
        /// Its id, the beginning of it, or a VM's name (its latest); without it, all
        backup: Option<String>,
        /// The repository
        #[arg(long)]
        repo: PathBuf,
    },
    /// Remove a backup and what only it needs
    #[command(alias = "delete")]
    Rm {
        /// Its id, or the beginning of it
        backup: String,
        /// The repository
        #[arg(long)]
        repo: PathBuf,
    },
    /// Remove older backups of each VM, and give back the space that no backup needs
    Prune {
        /// The repository
        #[arg(long)]
        repo: PathBuf,
        /// Keep so many of each VM, the newest (else all: only space is given back)
        #[arg(long, value_name = "N")]
        keep: Option<usize>,
        /// Of this VM only
        #[arg(long, requires = "keep")]
        vm: Option<String>,
    },
}

/// Arguments of `restore`.
#[derive(Args, Debug)]
pub struct RestoreArgs {
    /// Backup id, the beginning of it, or a VM's name (its latest); the VM's name for --undo and --accept
    pub backup: String,
    /// The repository
    #[arg(long, required_unless_present_any = ["undo", "accept"])]
    pub repo: Option<PathBuf>,
    /// As a new VM of this name, with new identities
    #[arg(long, value_name = "NAME", group = "target")]
    pub r#as: Option<String>,
    /// Over the VM it was made from: only what differs is written
    #[arg(long, group = "target")]
    pub in_place: bool,
    /// Into this file (needs --disk): raw, or VMDK when it ends in .vmdk; no daemon needed
    #[arg(long, value_name = "FILE", group = "target")]
    pub to: Option<PathBuf>,
    /// Into a new LUN of this name (needs --disk), unmapped unless --map says where
    #[arg(long, value_name = "NAME", group = "target")]
    pub to_lun: Option<String>,
    /// Bring back what the VM held before the latest restore in place, whether that came to its end or not
    #[arg(long, group = "target")]
    pub undo: bool,
    /// Give up what the VM held before the latest restore in place
    #[arg(long, group = "target")]
    pub accept: bool,
    /// Map the new LUN as DATASTORE:DIR/NAME.vmdk, in the mode of the mapping that was backed up (else virtual)
    #[arg(long, value_name = "DISK")]
    pub map: Option<String>,
    /// In place: write over a disk though it is not the one that was backed up
    #[arg(long, value_name = "CHECK", require_equals = true, value_parser = ["identity"])]
    pub force: Vec<String>,
    /// Move at most so much a second of each disk, such as 100M/s
    #[arg(long, value_name = "RATE", conflicts_with = "to")]
    pub limit: Option<String>,
    /// One disk only, by its slot (scsi0:1)
    #[arg(long, value_name = "SLOT")]
    pub disk: Option<String>,
    /// Where the new VM goes (else where it was)
    #[arg(short, long)]
    pub datastore: Option<String>,
    /// In which pool new LUNs go (else where they were)
    #[arg(short, long)]
    pub pool: Option<String>,
    /// Print the job and do not wait for it
    #[arg(long)]
    pub detach: bool,
}

/// Verbs of `export`.
#[derive(Subcommand, Debug)]
pub enum ExportVerb {
    /// Serve something over NBD or iSCSI, now and after every restart of the daemon
    Start {
        /// VM/SLOT, LUN, LUN@SNAPSHOT or DATASTORE:DIR/NAME.vmdk
        target: String,
        /// Its name on the wire (else the target as written)
        #[arg(long)]
        name: Option<String>,
        /// Take no writes
        #[arg(short, long)]
        read_only: bool,
        /// By which protocol
        #[arg(long = "as", value_enum, default_value = "nbd")]
        protocol: crate::model::Protocol,
        /// Others may serve the same disk too (clusters); every export of it must say so
        #[arg(long)]
        shared: bool,
        /// iSCSI: name of an initiator that may use it, or '*' (may be given several times)
        #[arg(long, value_name = "IQN")]
        initiator: Vec<String>,
        /// iSCSI: name of the target (else made from the export's name)
        #[arg(long)]
        iqn: Option<String>,
        /// iSCSI: file with "NAME SECRET" that initiators must know and, on a second line, what the target answers
        #[arg(long, value_name = "FILE")]
        chap: Option<std::path::PathBuf>,
    },
    /// Stop serving it
    Stop {
        /// Its name
        name: String,
    },
    /// List exports and their addresses
    #[command(alias = "list")]
    Ls,
}

/// Verbs of `job`.
#[derive(Subcommand, Debug)]
pub enum JobVerb {
    /// List jobs
    #[command(alias = "list")]
    Ls,
    /// Show a job
    #[command(alias = "info")]
    Show {
        /// Its id, or the beginning of it
        id: String,
    },
    /// Wait for a job to end
    Wait {
        /// Its id, or the beginning of it
        id: String,
        /// Give up waiting after this time (the job goes on): 30s, 15m, 2h
        #[arg(long, value_name = "TIME")]
        timeout: Option<String>,
    },
    /// Ask a job to end early, leaving everything in order
    Cancel {
        /// Its id, or the beginning of it
        id: String,
    },
}
