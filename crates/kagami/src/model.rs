//! The objects as REST shows and takes them; `-o json` prints the same. Fields are only ever added.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a changing request would do, with `?dry_run=true`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct Plan {
    /// Steps, in order.
    pub would: Vec<String>,
    /// What is lost, in words. Empty: nothing.
    #[serde(default)]
    pub loses: Vec<String>,
    /// Bytes that come back.
    #[serde(default)]
    pub frees_bytes: u64,
}

/// The daemon itself.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DaemonView {
    /// Program version.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// Its home.
    #[schema(value_type = String)]
    pub home: PathBuf,
    /// RFC 3339, UTC.
    pub started_at: String,
    /// Where NBD is served.
    pub nbd: Vec<String>,
    /// Objects that could not be opened, and why.
    pub troubles: Vec<String>,
}

/// A new pool.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct NewPool {
    /// Its name.
    pub name: String,
    /// Files or block devices, absolute. Empty: one file in the home.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub media: Vec<PathBuf>,
    /// Size of each file that is made; not for devices and existing files.
    pub size_bytes: Option<u64>,
    /// Succeed when it exists already.
    #[serde(default)]
    pub if_not_exists: bool,
}

/// A pool to be brought to this home.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ImportPool {
    /// Its files or block devices, absolute.
    #[schema(value_type = Vec<String>)]
    pub media: Vec<PathBuf>,
    /// A new name.
    pub name: Option<String>,
}

/// One medium of a pool.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct MediumView {
    /// File or device.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Length in bytes.
    pub size_bytes: u64,
    /// How it is accessed: engine, direct or buffered, registered buffers or plain.
    pub access: String,
}

/// A pool.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct PoolView {
    /// Identity.
    pub id: String,
    /// Name in this home.
    pub name: String,
    /// `ok`, `read-only` (after a failed flush: `pool reopen`), `missing`.
    pub state: String,
    /// Room for data in bytes.
    pub size_bytes: u64,
    /// Bytes allocated.
    pub used_bytes: u64,
    /// Bytes free.
    pub free_bytes: u64,
    /// LUNs in it, without those in the trash.
    pub luns: u64,
    /// Of the bytes allocated, those of hidden layers. Counted by `pool show` only.
    #[serde(default)]
    pub hidden_bytes: Option<u64>,
    /// The hidden layers. Counted by `pool show` only.
    #[serde(default)]
    pub hidden: Vec<HiddenView>,
    /// Its media.
    pub media: Vec<MediumView>,
    /// Why it is not `ok`.
    #[serde(default)]
    pub trouble: Option<String>,
}

/// A layer of deleted snapshots that stays: several disks stand on it, or somebody holds its generation.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct HiddenView {
    /// Its number in the pool.
    pub layer: u64,
    /// Bytes that it keeps.
    pub used_bytes: u64,
    /// Who holds its generation.
    pub held_by: Vec<String>,
}

/// Answer of a check.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CheckView {
    /// What was checked.
    pub name: String,
    /// `clean`, `leaks` or `corrupt`.
    pub verdict: String,
    /// One line per finding.
    pub findings: Vec<String>,
    /// What was given back, where that was asked for: no longer among the findings.
    #[serde(default)]
    pub repaired: Vec<String>,
}

/// A new LUN.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct NewLun {
    /// Its name.
    pub name: String,
    /// Its size, a multiple of 4096.
    pub size_bytes: u64,
    /// Pool; needed when there are several.
    pub pool: Option<String>,
    /// Succeed when it exists already with this size.
    #[serde(default)]
    pub if_not_exists: bool,
}

/// A LUN.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct LunView {
    /// UUID.
    pub id: String,
    /// Name.
    pub name: String,
    /// Its pool.
    pub pool: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Bytes allocated for it alone: what was written since its newest snapshot.
    #[serde(default)]
    pub used_bytes: Option<u64>,
    /// Bytes allocated below that: its snapshots', perhaps shared with other LUNs.
    #[serde(default)]
    pub below_bytes: Option<u64>,
    /// SCSI identity, `naa.6...`.
    pub naa: String,
    /// VPD page 0x80.
    pub serial: String,
    /// Its snapshots.
    pub snapshots: Vec<String>,
    /// Who stands on it (datastore or mapping), in words.
    pub claim: Option<String>,
    /// RFC 3339; absent when unknown.
    pub created_at: Option<String>,
    /// In the trash until then.
    pub trash_until: Option<String>,
    /// It was reverted, and what it held before is kept: `snap revert --accept` gives that up, `lun undo-revert`
    /// returns to it.
    #[serde(default)]
    pub reverted: bool,
}

/// New size of a LUN.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ResizeLun {
    /// In bytes; not smaller than it is.
    pub size_bytes: u64,
}

/// A new snapshot.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct NewSnap {
    /// Of which LUN.
    pub lun: String,
    /// Its name.
    pub name: String,
}

/// A snapshot of a LUN.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct SnapView {
    /// Identity of the cut (its generation), hex.
    pub id: String,
    /// `lun@snap`.
    pub name: String,
    /// Its LUN.
    pub lun: String,
    /// Pool.
    pub pool: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Bytes that it keeps: written between the snapshot before and this one.
    #[serde(default)]
    pub used_bytes: Option<u64>,
    /// RFC 3339.
    pub created_at: Option<String>,
    /// Group cut that it belongs to.
    pub group: Option<String>,
}

/// A revert.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct RevertSnap {
    /// Give up the content that was abandoned.
    #[serde(default)]
    pub accept: bool,
}

/// A new clone.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct NewClone {
    /// `lun@snap`.
    pub snap: String,
    /// Name of the new LUN.
    pub name: String,
}

/// A new group cut.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct NewGroupCut {
    /// Name of the snapshot that each member gets.
    pub name: String,
    /// LUNs.
    pub luns: Vec<String>,
}

/// A group cut.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GroupCutView {
    /// Identity, hex.
    pub id: String,
    /// Name.
    pub name: String,
    /// `lun@snap` of each member.
    pub members: Vec<String>,
    /// `cut`, or why it is in doubt (`group resolve` ends that).
    #[serde(default)]
    pub state: String,
    /// From the first gate closed to the last gate opened, in microseconds; only in the answer to its creation.
    pub hold_us: Option<u64>,
}

/// Cuts over several pools that are in doubt, to be ended.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct ResolveGroup {
    /// Identity of the cut. Absent: all.
    pub group: Option<String>,
    /// What the operator says: it happened, or not. Absent: what the deciding pool says, where that is here.
    pub happened: Option<bool>,
}

/// A volume that lies on a LUN, to be brought to this home.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct AttachDatastore {
    /// The LUN.
    pub lun: String,
    /// Under this name. Absent: the volume's label.
    pub name: Option<String>,
}

/// A new datastore.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct NewDatastore {
    /// Name and label.
    pub name: String,
    /// An existing LUN.
    pub lun: Option<String>,
    /// Or: size of a new LUN.
    pub size_bytes: Option<u64>,
    /// Pool of the new LUN.
    pub pool: Option<String>,
    /// Succeed when it exists already.
    #[serde(default)]
    pub if_not_exists: bool,
}

/// A datastore.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DatastoreView {
    /// UUID of the volume.
    pub id: String,
    /// Name.
    pub name: String,
    /// `ok` or `missing`.
    pub state: String,
    /// Its LUN.
    pub lun: String,
    /// `VMFS-5`.
    pub version: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Bytes free.
    pub free_bytes: u64,
    /// Bytes in a file block.
    pub block_bytes: u64,
    /// Why it is not `ok`.
    #[serde(default)]
    pub trouble: Option<String>,
}

/// A new disk.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct NewDisk {
    /// `datastore:dir/name.vmdk`.
    pub disk: String,
    /// Size, a multiple of 512.
    pub size_bytes: u64,
    /// `thin`, `thick` or `eager`.
    pub provisioning: String,
}

/// A disk on a datastore.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DiskView {
    /// `[datastore] dir/name.vmdk`.
    pub name: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// `thin`, `thick`, `rdm`, `rdmp`, `delta`.
    pub kind: String,
    /// createType of its descriptor.
    pub create_type: String,
    /// Content id.
    pub cid: String,
    /// For a mapping: its LUN.
    pub lun: Option<String>,
    /// Descriptors from this one down to the base.
    pub chain: Vec<String>,
    /// VM and slot that use it.
    pub used_by: Option<String>,
    /// What is wrong.
    #[serde(default)]
    pub trouble: Option<String>,
}

/// A new mapping.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct NewRdm {
    /// `datastore:dir/name.vmdk`.
    pub disk: String,
    /// LUN to map.
    pub lun: String,
    /// `virtual` or `physical`.
    pub mode: String,
}

/// A mapping.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RdmView {
    /// `[datastore] dir/name.vmdk`.
    pub name: String,
    /// `virtual` (rdm) or `physical` (rdmp).
    pub mode: String,
    /// What the resolver says: `resolved`, `larger`, `smaller`, `missing`, `ambiguous`, ...
    pub state: String,
    /// The LUN it resolves to.
    pub lun: Option<String>,
    /// Size as the record has it, in bytes.
    pub size_bytes: u64,
    /// Identity as the record has it.
    pub naa: String,
    /// UUID as the record has it.
    pub uuid: Option<String>,
    /// When its LUN is missing: LUNs of the same content that nobody holds. One of them may be it, to be remapped to.
    #[serde(default)]
    pub candidates: Vec<String>,
    /// The three places of the identity: record, descriptor, reverse pointer on the LUN.
    pub places: Vec<String>,
}

/// Target of a remap.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RemapRdm {
    /// The new LUN.
    pub to: String,
}

/// A repair of a chain of disks.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct RepairDisk {
    /// Who decided, and why: for the record. Wanted when something is changed.
    #[serde(default)]
    pub reason: Option<String>,
    /// A backup of the parent, taken when the child was made: sampled blocks are compared. Its id, or the beginning of it.
    #[serde(default)]
    pub backup: Option<String>,
    /// The repository of that backup, absolute.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub repo: Option<PathBuf>,
    /// The disk in that backup, such as `scsi0:0`.
    #[serde(default)]
    pub backup_disk: Option<String>,
}

/// Two links of a chain that do not fit together.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct MismatchView {
    /// The child's descriptor.
    pub child: String,
    /// The parent's descriptor.
    pub parent: String,
    /// The CID that the child noted of its parent.
    pub noted_cid: String,
    /// The CID that the parent has.
    pub found_cid: String,
    /// When the child's data changed last, RFC 3339.
    pub child_changed_at: Option<String>,
    /// When the parent's data changed last: later than the child's birth, it was written behind the child's back.
    pub parent_changed_at: Option<String>,
    /// A commit was overwriting the parent, from the chain with this top.
    pub commit_from: Option<String>,
    /// Blocks of 4 KiB of the parent that were compared with a backup.
    pub compared_blocks: Option<u64>,
    /// Blocks that were equal.
    pub equal_blocks: Option<u64>,
}

/// What a repair left behind.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RepairedView {
    /// The child's descriptor.
    pub child: String,
    /// The same as it was.
    pub kept: String,
    /// The evidence, who decided, why.
    pub record: String,
}

/// A chain of disks, what does not fit in it, and what was done about it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RepairView {
    /// `[datastore] dir/name.vmdk`.
    pub name: String,
    /// Descriptors from the top down.
    pub chain: Vec<String>,
    /// Pairs that did not fit together.
    pub mismatches: Vec<MismatchView>,
    /// What no repair mends.
    pub others: Vec<String>,
    /// What was changed.
    pub repaired: Vec<RepairedView>,
}

/// New mode of a mapping.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ConvertRdm {
    /// `virtual` or `physical`.
    pub mode: String,
}

/// Result of a scan.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ScanView {
    /// One line each.
    pub findings: Vec<String>,
    /// Mappings that were written again.
    pub rebuilt: Vec<String>,
}

/// A new VM.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct NewVm {
    /// Its name.
    pub name: String,
    /// Where its directory goes.
    pub datastore: String,
    /// Sizes of new disks on the datastore, in bytes.
    #[serde(default)]
    pub disks: Vec<u64>,
    /// LUNs to map.
    #[serde(default)]
    pub rdms: Vec<NewVmRdm>,
    /// Memory in MiB.
    pub memory_mib: u64,
}

/// A mapping of a new VM.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct NewVmRdm {
    /// The LUN.
    pub lun: String,
    /// `virtual` or `physical`.
    pub mode: String,
}

/// A VM that lies on a datastore.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RegisterVm {
    /// `datastore:dir/name.vmx`.
    pub vmx: String,
    /// Under this name.
    pub name: Option<String>,
}

/// A disk to be plugged in.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct AttachDisk {
    /// `datastore:dir/name.vmdk`.
    pub disk: String,
    /// `scsi0:1`; absent: the first free one.
    pub slot: Option<String>,
    /// `persistent` (also when absent), or `independent-persistent`: snapshots and backups leave it out.
    #[serde(default)]
    pub mode: Option<String>,
}

/// A disk to be unplugged.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DetachDisk {
    /// `scsi0:1`.
    pub slot: String,
}

/// A disk of a VM.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct VmDiskView {
    /// `scsi0:0`.
    pub slot: String,
    /// `[datastore] dir/name.vmdk`.
    pub disk: String,
    /// `thin`, `thick`, `rdm`, `rdmp`, `delta`.
    pub kind: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// For a mapping: its LUN.
    pub lun: Option<String>,
    /// `persistent`, `independent-persistent`, ...
    pub mode: String,
    /// Its writes wait: a redo log or a snapshot of a backup finds no room.
    #[serde(default)]
    pub held: Option<HeldView>,
    /// What is wrong.
    #[serde(default)]
    pub trouble: Option<String>,
}

/// Writes of a disk that wait for room.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct HeldView {
    /// So many operations.
    pub operations: u64,
    /// For so long.
    pub seconds: f64,
}

/// A VM.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct VmView {
    /// `uuid.bios`.
    pub id: String,
    /// Name.
    pub name: String,
    /// `[datastore] dir/name.vmx`.
    pub vmx: String,
    /// `ok`, `needs consolidation`, `held: no room`, `in doubt: flushes are refused`, `disk missing`, `missing`.
    pub state: String,
    /// Its disks.
    pub disks: Vec<VmDiskView>,
    /// Files of it that no job record and no `.vmx` names, set aside at a start: never deleted, never attached.
    #[serde(default)]
    pub set_aside: Vec<String>,
    /// How long writes of its disks were held for want of room since it was opened.
    #[serde(default)]
    pub held_seconds: f64,
    /// Why it is not `ok`.
    #[serde(default)]
    pub trouble: Option<String>,
}

/// Options of a removal.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Removal {
    /// Only say what would be done.
    #[serde(default)]
    pub dry_run: bool,
    /// LUN: give the space back at once. VM: remove its files. Datastore: remove its LUN.
    #[serde(default)]
    pub all: bool,
}

/// A new export.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct NewExport {
    /// `VM/SLOT`, LUN, `LUN@SNAP` or `datastore:dir/disk.vmdk`.
    pub target: String,
    /// Name on the wire.
    pub name: Option<String>,
    /// Takes no writes.
    #[serde(default)]
    pub read_only: bool,
    /// By which protocol.
    #[serde(default)]
    pub protocol: Protocol,
    /// Others may serve the same disk, too: clusters, which keep out of each other's way by reservations.
    #[serde(default)]
    pub shared: bool,
    /// iSCSI: names of the initiators that may use it; `*` is everybody.
    #[serde(default)]
    pub initiators: Vec<String>,
    /// iSCSI: name of the target. Absent: made from the export's name.
    #[serde(default)]
    pub iqn: Option<String>,
    /// iSCSI: how initiators show who they are.
    #[serde(default)]
    pub chap: Option<NewChap>,
}

/// How an export is served.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// NBD.
    #[default]
    Nbd,
    /// iSCSI.
    Iscsi,
}

/// Names and secrets for CHAP.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NewChap {
    /// Name that initiators say.
    pub user: String,
    /// What they must know, 12 to 255 bytes.
    pub secret: String,
    /// Name that the target says when it is asked (mutual CHAP).
    #[serde(default)]
    pub target_user: Option<String>,
    /// What the target knows then.
    #[serde(default)]
    pub target_secret: Option<String>,
}

impl std::fmt::Debug for NewChap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewChap").field("user", &self.user).finish_non_exhaustive() // secrets are in no log
    }
}

/// An export.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ExportView {
    /// Name on the wire.
    pub name: String,
    /// What is served.
    pub target: String,
    /// `serving` or `down`.
    pub state: String,
    /// Takes no writes.
    pub read_only: bool,
    /// Size in bytes.
    pub size_bytes: u64,
    /// By which protocol.
    #[serde(default)]
    pub protocol: Protocol,
    /// Addresses.
    pub uris: Vec<String>,
    /// Why it is down.
    #[serde(default)]
    pub trouble: Option<String>,
}

/// A backup to be made.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct NewBackup {
    /// The VM.
    pub vm: String,
    /// More VMs, cut at the same instant; each gets a backup of its own.
    #[serde(default)]
    pub also: Vec<String>,
    /// The repository's directory, absolute.
    #[schema(value_type = String)]
    pub repo: PathBuf,
    /// `snapshot` or `redo`.
    pub via: String,
    /// Read everything.
    #[serde(default)]
    pub full: bool,
    /// Keep the frozen images as exports `VM@backup/SLOT` until the next backup (the quickstart compares with them).
    #[serde(default)]
    pub keep_frozen: bool,
    /// Read at most so many bytes a second from each disk, so that a long copy leaves the media to the VMs.
    #[serde(default)]
    pub limit_bytes_per_second: Option<u64>,
    /// By redo logs: room that must be free on the datastore and in the pool below it, as a share of the disks' length
    /// (`20%`) or a size (`2G`).
    #[serde(default)]
    pub reserve: Option<String>,
}

impl NewBackup {
    /// All VMs that are cut together.
    pub fn vms(&self) -> Vec<String> {
        std::iter::once(&self.vm).chain(&self.also).cloned().collect()
    }
}

/// A restore.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct NewRestore {
    /// Backup id, the beginning of it, or a VM's name.
    pub backup: String,
    /// The repository's directory, absolute.
    #[schema(value_type = String)]
    pub repo: PathBuf,
    /// As a new VM of this name.
    pub new_vm: Option<String>,
    /// Over the VM it was made from.
    #[serde(default)]
    pub in_place: bool,
    /// Into a new LUN of this name, mapped nowhere; with `disk` when the backup has several.
    #[serde(default)]
    pub new_lun: Option<String>,
    /// Only the disk in this slot.
    pub disk: Option<String>,
    /// Datastore of the new VM.
    pub datastore: Option<String>,
    /// Pool of new LUNs.
    pub pool: Option<String>,
    /// Map the new LUN as this disk, in the mode of the mapping that was backed up.
    #[serde(default)]
    pub map: Option<String>,
    /// Checks that are overridden: `identity`, that a disk is the one that was backed up.
    #[serde(default)]
    pub force: Vec<String>,
    /// Move at most so many bytes a second of each disk.
    #[serde(default)]
    pub limit_bytes_per_second: Option<u64>,
}

/// A hold on a LUN's past that is let go.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ReleaseHold {
    /// Who holds it, as the pool shows it.
    pub holder: String,
}

/// A VM whose latest restore in place is undone or accepted.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct UndoRestore {
    /// The VM.
    pub vm: String,
}

/// A job.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct JobView {
    /// Identity; later jobs sort later.
    pub id: String,
    /// `backup`, `restore`, `undo-restore`.
    pub kind: String,
    /// What it works on.
    pub object: String,
    /// `running`, `done`, `failed`, `cancelled`.
    pub state: String,
    /// What it does just now.
    pub phase: String,
    /// What its owner should know of its way: that a backup went on with an earlier cut, or why it made a new one.
    #[serde(default)]
    pub note: Option<String>,
    /// Bytes done.
    pub done_bytes: u64,
    /// Bytes to do; 0 while unknown.
    pub total_bytes: u64,
    /// RFC 3339.
    pub created_at: String,
    /// RFC 3339.
    pub ended_at: Option<String>,
    /// How often it was begun (again after a restart of the daemon).
    pub attempts: u32,
    /// Its answer.
    #[schema(value_type = Object)]
    pub result: Option<serde_json::Value>,
    /// Why it failed.
    pub problem: Option<crate::problem::Problem>,
}
