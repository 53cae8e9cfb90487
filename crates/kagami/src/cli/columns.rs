//! Which fields of each object people see, in tables and in `show`.

use crate::output::Show::{Count, Size, Text, Time};
use crate::output::{Column, col, wide};

/// Pools.
pub const POOL: &[Column] = &[
    col("name", "name", Text),
    col("state", "state", Text),
    col("size", "size_bytes", Size),
    col("used", "used_bytes", Size),
    col("free", "free_bytes", Size),
    col("luns", "luns", Count),
    wide("id", "id", Text),
    wide("hidden", "hidden_bytes", Size),
    wide("hidden layers", "hidden", Text),
    wide("media", "media", Text),
    wide("trouble", "trouble", Text),
];

/// LUNs.
pub const LUN: &[Column] = &[
    col("name", "name", Text),
    col("pool", "pool", Text),
    col("size", "size_bytes", Size),
    col("used", "used_bytes", Size),
    col("claim", "claim", Text),
    wide("below", "below_bytes", Size),
    wide("naa", "naa", Text),
    wide("id", "id", Text),
    wide("serial", "serial", Text),
    wide("snapshots", "snapshots", Text),
    wide("reverted", "reverted", Text),
    wide("created", "created_at", Time),
    wide("trash until", "trash_until", Time),
];

/// Snapshots.
pub const SNAP: &[Column] = &[
    col("name", "name", Text),
    col("size", "size_bytes", Size),
    col("used", "used_bytes", Size),
    col("created", "created_at", Time),
    wide("pool", "pool", Text),
    wide("group", "group", Text),
    wide("id", "id", Text),
];

/// Group cuts.
pub const GROUP: &[Column] = &[
    col("name", "name", Text),
    col("members", "members", Text),
    col("state", "state", Text),
    col("hold us", "hold_us", Count),
    wide("id", "id", Text),
];

/// Datastores.
pub const DATASTORE: &[Column] = &[
    col("name", "name", Text),
    col("state", "state", Text),
    col("version", "version", Text),
    col("lun", "lun", Text),
    col("size", "size_bytes", Size),
    col("free", "free_bytes", Size),
    wide("block", "block_bytes", Size),
    wide("id", "id", Text),
    wide("trouble", "trouble", Text),
];

/// Disks.
pub const DISK: &[Column] = &[
    col("name", "name", Text),
    col("kind", "kind", Text),
    col("size", "size_bytes", Size),
    col("lun", "lun", Text),
    col("used by", "used_by", Text),
    wide("create type", "create_type", Text),
    wide("cid", "cid", Text),
    wide("chain", "chain", Text),
    wide("trouble", "trouble", Text),
];

/// A chain that was looked at, and repaired or not.
pub const REPAIR: &[Column] = &[
    col("name", "name", Text),
    col("chain", "chain", Text),
    col("mismatches", "mismatches", Text),
    col("repaired", "repaired", Text),
];

/// Mappings.
pub const RDM: &[Column] = &[
    col("name", "name", Text),
    col("mode", "mode", Text),
    col("state", "state", Text),
    col("lun", "lun", Text),
    col("size", "size_bytes", Size),
    wide("naa", "naa", Text),
    wide("uuid", "uuid", Text),
    wide("places", "places", Text),
    wide("candidates", "candidates", Text),
];

/// VMs.
pub const VM: &[Column] = &[
    col("name", "name", Text),
    col("state", "state", Text),
    col("vmx", "vmx", Text),
    wide("id", "id", Text),
    wide("set aside", "set_aside", Text),
    wide("trouble", "trouble", Text),
];

/// Disks of a VM.
pub const VM_DISK: &[Column] = &[
    col("slot", "slot", Text),
    col("disk", "disk", Text),
    col("kind", "kind", Text),
    col("size", "size_bytes", Size),
    col("lun", "lun", Text),
    col("mode", "mode", Text),
    col("trouble", "trouble", Text),
];

/// Exports.
pub const EXPORT: &[Column] = &[
    col("name", "name", Text),
    col("state", "state", Text),
    col("size", "size_bytes", Size),
    col("read-only", "read_only", Text),
    col("as", "protocol", Text),
    col("uri", "uris", Text),
    wide("target", "target", Text),
    wide("trouble", "trouble", Text),
];

/// Jobs.
pub const JOB: &[Column] = &[
    col("id", "id", Text),
    col("kind", "kind", Text),
    col("object", "object", Text),
    col("state", "state", Text),
    col("phase", "phase", Text),
    col("done", "done_bytes", Size),
    col("of", "total_bytes", Size),
    wide("created", "created_at", Time),
    wide("ended", "ended_at", Time),
    wide("note", "note", Text),
    wide("result", "result", Text),
    wide("problem", "problem.title", Text),
    wide("why", "problem.detail", Text),
];

/// The daemon.
pub const DAEMON: &[Column] = &[
    col("home", "home", Text),
    col("pid", "pid", Text),
    col("version", "version", Text),
    col("started", "started_at", Time),
    col("nbd", "nbd", Text),
    col("troubles", "troubles", Text),
];

/// The configuration.
pub const CONFIG: &[Column] =
    &[col("file", "file", Text), col("verdict", "verdict", Text), col("text", "text", Text)];

/// A finished backup.
pub const BACKUP_DONE: &[Column] = &[
    col("backup", "id", Text),
    col("vm", "vm", Text),
    col("label", "label", Text),
    col("kind", "kind", Text),
    col("size", "size_bytes", Size),
    col("read", "read_bytes", Size),
    col("stored", "stored_bytes", Size),
    col("writes held", "hold", Text),
    col("time", "time", Text),
];

/// A finished restore.
pub const RESTORE_DONE: &[Column] = &[
    col("vm", "vm", Text),
    col("lun", "lun", Text),
    col("disks", "disks", Text),
    col("written", "written_bytes", Size),
    col("compared", "compared_bytes", Size),
    col("old state in", "undo", Text),
    col("time", "time", Text),
];
