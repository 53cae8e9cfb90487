//! The file system's own structures on a fresh volume: descriptor, resource files, system descriptors, directories.

use zerocopy::{FromZeros, IntoBytes};

use super::NewVolume;
use super::geometry::Geometry;
use crate::format::{
    Address, ClusterMeta5, DirEntry5, FS_MAGIC, FdMeta, FsDescriptor, GROUP0_OFFSET, Heartbeat, InodeKind,
    LockBlock, LockKind, SystemFile, Zla, config_flags, fd_layout, heartbeat_slots,
};

/// System files of VMFS-5: descriptors 0 to 7 of cluster 0.
pub(super) const SYSTEM_FILES: [SystemFile; 8] = [
    SystemFile::Root,
    SystemFile::FileBlocks,
    SystemFile::Descriptors,
    SystemFile::PointerBlocks,
    SystemFile::SubBlocks,
    SystemFile::VolumeHeader,
    SystemFile::PointerBlocks2,
    SystemFile::SystemData,
];

/// "Kept back" mark of the next-to-last cluster of two files, as genuine volumes carry it.
const PRIORITY: u32 = 80_000;
const FD_BYTES: usize = fd_layout::BYTES[0] as usize;

/// The descriptor: without it nobody finds a file system.
pub(super) fn descriptor(new: &NewVolume, geometry: &Geometry) -> FsDescriptor {
    let mut fs = FsDescriptor::new_zeroed();
    let fd_at = |file: SystemFile| geometry.place(SystemFile::Descriptors, fd_offset(geometry, file));
    fs.magic = FS_MAGIC.into();
    fs.major = 14.into();
    fs.minor = 81;
    fs.uuid = new.file_system_uuid;
    let dense = if new.tuning.large_sub_blocks { 0 } else { config_flags::DENSE };
    let optimized = if geometry.resource_optimized { config_flags::RESOURCE_OPTIMISED } else { 0 };
    fs.config = (config_flags::BASE | dense | optimized).into();
    fs.label[..new.label.len()].copy_from_slice(new.label.as_bytes());
    fs.disk_block_bytes = 512.into();
    fs.block_bytes = geometry.block_bytes.into();
    fs.created_s = new.stamps.created_s.into();
    fs.snapshot_id = 1.into();
    fs.lvm_uuid = new.volume_uuid;
    fs.lvm_snapshot_id = 1.into();
    fs.fdc_group_offset = (GROUP0_OFFSET as u32).into();
    fs.fdc_clusters_per_group = geometry.fdc.per_group.into();
    fs.sub_block_bytes = (geometry.sub_block_bytes as u32).into();
    fs.journal_slots = 8.into();
    fs.pb2_offset = fd_at(SystemFile::PointerBlocks2).into();
    fs.pb2_fd = SystemFile::PointerBlocks2.fd().0.into();
    fs.format_host = new.host;
    fs.generation = 1.into();
    fs.sdd_offset = fd_at(SystemFile::SystemData).into();
    fs.sdd_fd = SystemFile::SystemData.fd().0.into();
    fs
}

fn fd_offset(geometry: &Geometry, file: SystemFile) -> u64 {
    geometry
        .fdc
        .resource_offset(0, file as u32)
        .unwrap_or_else(|| unreachable!("cluster 0 holds the system files"))
}

/// Where each system file's lock clocks begin: a descriptor has one, its clusters follow.
pub(super) fn first_clocks(geometry: &Geometry, first: u64) -> [u64; 8] {
    let mut next = first;
    SYSTEM_FILES.map(|file| {
        let own = next;
        next += 1 + geometry.resources(file).map_or(0, |resources| resources.clusters());
        own
    })
}

/// All heartbeat slots, free.
pub(super) fn heartbeats() -> Vec<u8> {
    heartbeat_slots(5).flat_map(|at| Heartbeat::free(at).as_bytes().to_vec()).collect()
}

/// The eight system descriptors, as they lie behind each other.
pub(super) fn system_descriptors(new: &NewVolume, geometry: &Geometry, clocks: &[u64; 8]) -> Vec<u8> {
    let mut bytes = vec![0; SYSTEM_FILES.len() * FD_BYTES];
    for (file, fd) in SYSTEM_FILES.into_iter().zip(bytes.chunks_exact_mut(FD_BYTES)) {
        let at = geometry.place(SystemFile::Descriptors, fd_offset(geometry, file));
        let lock = LockBlock::free(LockKind::Descriptor, at, 1, clocks[file as usize]);
        fd[..512].copy_from_slice(lock.as_bytes());
        fd[512..1024].copy_from_slice(descriptor_of(new, geometry, file).as_bytes());
        for (slot, block) in fd[1024..].chunks_exact_mut(4).zip(geometry.blocks(file)) {
            let address = Address::file_block(block.into()).encode32();
            slot.copy_from_slice(
                &address.unwrap_or_else(|| unreachable!("26 bits, by Geometry::new")).to_le_bytes(),
            );
        }
    }
    bytes
}

fn descriptor_of(new: &NewVolume, geometry: &Geometry, file: SystemFile) -> FdMeta {
    let blocks = geometry.blocks(file).count() as u64;
    let shift = geometry.block_bytes.trailing_zeros();
    let entries = |entries: u64| entries * size_of::<DirEntry5>() as u64;
    let (kind, links, length, mode) = match file {
        SystemFile::Root => (InodeKind::Directory, 3, entries(9), 0o1755),
        SystemFile::SystemData => (InodeKind::System, 2, entries(2), 0o40700),
        SystemFile::VolumeHeader => (InodeKind::System, 1, blocks * geometry.block_bytes, 0o400),
        _ => (InodeKind::System, 1, geometry.resources(file).map_or(0, |r| r.file_bytes()), 0o400),
    };
    let mut meta = FdMeta::empty();
    meta.address = file.fd().0.into();
    meta.generation = 1.into();
    meta.links = links.into();
    meta.kind = (kind as u32).into();
    meta.length = length.into();
    meta.block_bytes = geometry.block_bytes.into();
    meta.blocks = blocks.into();
    meta.modified_s = new.stamps.created_s.into();
    meta.changed_s = new.stamps.created_s.into();
    meta.accessed_s = new.stamps.created_s.into();
    meta.mode = mode.into();
    meta.zla = (Zla::FileBlocks as u32).into();
    // The descriptor file is born with one block and grows, and its counter shows it.
    meta.set_new(if file == SystemFile::Descriptors { 1 } else { blocks });
    meta.address2 = meta.address;
    meta.tbz_shift = shift.into();
    meta.block_shift = shift as u8;
    meta
}

/// Entries of the root directory, then those of `.sdd.sf`.
pub(super) fn directories() -> (Vec<u8>, Vec<u8>) {
    let root = SystemFile::Root.fd();
    let directory = InodeKind::Directory as u32;
    let mut of_root = vec![DirEntry5::new(directory, root, 1, "."), DirEntry5::new(directory, root, 1, "..")];
    let files = SYSTEM_FILES[1..].iter();
    of_root.extend(files.map(|file| DirEntry5::new(InodeKind::System as u32, file.fd(), 1, file.name())));
    let data = SystemFile::SystemData.fd();
    let of_data =
        [DirEntry5::new(InodeKind::System as u32, data, 1, "."), DirEntry5::new(directory, root, 1, "..")];
    let sectors = |entries: &[DirEntry5]| {
        let mut bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.as_bytes().to_vec()).collect();
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes
    };
    (sectors(&of_root), sectors(&of_data))
}

/// The cluster headers of one group of a resource file. `clock` is that of cluster 0.
pub(super) fn group(
    geometry: &Geometry,
    file: SystemFile,
    kind: LockKind,
    group: u64,
    clock: u64,
) -> Option<Vec<u8>> {
    let resources = geometry.resources(file)?;
    let first = group * u64::from(resources.per_group);
    let last = (first + u64::from(resources.per_group)).min(resources.clusters());
    let mut bytes = vec![0; resources.per_group as usize * 1024];
    for (cluster, header) in (first..last).zip(bytes.chunks_exact_mut(1024)) {
        let at = geometry.place(file, resources.header_offset(cluster)?);
        header[..512].copy_from_slice(LockBlock::free(kind, at, 1, clock + cluster).as_bytes());
        header[512..]
            .copy_from_slice(cluster_meta(geometry, file, cluster, resources.clusters())?.as_bytes());
    }
    Some(bytes)
}

fn cluster_meta(geometry: &Geometry, file: SystemFile, cluster: u64, clusters: u64) -> Option<ClusterMeta5> {
    let resources = geometry.resources(file)?;
    let total = resources.in_cluster(cluster);
    let mut meta = ClusterMeta5::all_free(cluster as u32, total);
    let used = match file {
        SystemFile::FileBlocks => {
            let before = cluster * u64::from(resources.per_cluster);
            u64::from(geometry.used_blocks).saturating_sub(before).min(total.into()) as u32
        }
        SystemFile::Descriptors if cluster == 0 => SYSTEM_FILES.len() as u32,
        _ => 0,
    };
    (0..used).for_each(|i| meta.set_free(i, false));
    meta.free = (total - used).into();
    meta.next_hint = if used < total { used.into() } else { 0.into() };
    let kept_back = matches!(file, SystemFile::FileBlocks | SystemFile::PointerBlocks);
    if kept_back && cluster + 2 == clusters {
        meta.priority = PRIORITY.into();
    }
    Some(meta)
}
