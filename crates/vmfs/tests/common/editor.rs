//! Finds structures on a VMFS-5 volume of one device and changes them, without any of the code under test but the
//! structures themselves.

use std::rc::Rc;

use block::{Disk, MemoryDisk, Safe, Sector, Segments, SegmentsMut};
use vmfs::format::{
    Address, ClusterMeta5, DirEntry5, FdAddress, FdMeta, FsDescriptor, InodeKind, ResourceGeometry,
    ResourceHeader, SystemFile, Zla, view, view_mut,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Where the volume begins on a device with a volume manager.
const DATA_AT: u64 = 0x110_0000;

pub struct Editor {
    pub disk: Rc<MemoryDisk>,
    block_bytes: u64,
}

/// A file block, sub-block, ... as it is counted in a resource file.
pub type Numbered = (SystemFile, u64, u32);

impl Editor {
    pub fn new(disk: Rc<MemoryDisk>) -> Self {
        let mut editor = Self { disk, block_bytes: 0 };
        let fs: FsDescriptor = editor.get(0x20_0000);
        fs.check().unwrap();
        editor.block_bytes = fs.block_bytes.get();
        editor
    }

    /// A volume of its own with the same content.
    pub fn fork(&self) -> Self {
        Self { disk: Rc::new(MemoryDisk::from(self.disk.image())), block_bytes: self.block_bytes }
    }

    pub fn device_bytes(&self, at: u64, length: usize) -> Vec<u8> {
        let (first, inside) = (at & !511, (at & 511) as usize);
        let mut bytes = vec![0; (inside + length).next_multiple_of(512)];
        let into = SegmentsMut::new(&mut bytes);
        super::at_once(async { self.disk.read(Sector::at_byte(first), &into).await.unwrap() });
        bytes[inside..inside + length].to_vec()
    }

    pub fn put_device_bytes(&self, at: u64, new: &[u8]) {
        let (first, inside) = (at & !511, (at & 511) as usize);
        let mut bytes = self.device_bytes(first, (inside + new.len()).next_multiple_of(512));
        bytes[inside..inside + new.len()].copy_from_slice(new);
        let from = Segments::new(&bytes);
        super::at_once(async {
            self.disk.write(Sector::at_byte(first), &from, Safe::AtNextFlush).await.unwrap()
        });
    }

    pub fn bytes(&self, at: u64, length: usize) -> Vec<u8> {
        self.device_bytes(DATA_AT + at, length)
    }

    pub fn put(&self, at: u64, new: &[u8]) {
        self.put_device_bytes(DATA_AT + at, new);
    }

    pub fn get<T: FromBytes + Immutable + KnownLayout + Unaligned + Clone>(&self, at: u64) -> T {
        view::<T>(&self.bytes(at, size_of::<T>())).unwrap().clone()
    }

    /// Changes a structure at a volume offset.
    pub fn edit<T: FromBytes + IntoBytes + KnownLayout + Unaligned>(
        &self,
        at: u64,
        change: impl FnOnce(&mut T),
    ) {
        self.edit_device(DATA_AT + at, change);
    }

    /// Changes a structure at a device offset.
    pub fn edit_device<T: FromBytes + IntoBytes + KnownLayout + Unaligned>(
        &self,
        at: u64,
        change: impl FnOnce(&mut T),
    ) {
        let mut bytes = self.device_bytes(at, size_of::<T>());
        change(view_mut::<T>(&mut bytes).unwrap());
        self.put_device_bytes(at, &bytes);
    }

    /// Volume offset of a descriptor. The file of descriptors has a direct block list on all volumes we edit.
    pub fn fd_at(&self, fd: FdAddress) -> u64 {
        let first_block = 0x40_0000;
        let header: ResourceHeader = self.get(first_block);
        let geometry = ResourceGeometry::load(&header, 512, 0).unwrap();
        let own = first_block + geometry.resource_offset(0, SystemFile::Descriptors as u32).unwrap();
        let offset = geometry.resource_offset(fd.cluster().into(), fd.resource()).unwrap();
        self.file_byte(own, offset)
    }

    /// Volume offset of a byte of a file with a direct block list, whose descriptor is at `fd_at`.
    fn file_byte(&self, fd_at: u64, offset: u64) -> u64 {
        let slot = self.bytes(fd_at + 0x400 + offset / self.block_bytes * 4, 4);
        let raw = u32::from_le_bytes(slot.try_into().unwrap());
        let Some(Address::FileBlock { block, .. }) = Address::decode32(raw) else {
            panic!("no block at {offset}")
        };
        block * self.block_bytes + offset % self.block_bytes
    }

    pub fn geometry(&self, file: SystemFile) -> ResourceGeometry {
        let header: ResourceHeader = self.get(self.header_at(file));
        ResourceGeometry::load(&header, 512, 0).unwrap()
    }

    pub fn header_at(&self, file: SystemFile) -> u64 {
        self.file_byte(self.fd_at(file.fd()), 0)
    }

    /// Volume offset of a cluster's lock block.
    pub fn cluster_at(&self, file: SystemFile, cluster: u64) -> u64 {
        let offset = self.geometry(file).header_offset(cluster).unwrap();
        self.file_byte(self.fd_at(file.fd()), offset)
    }

    pub fn resource_at(&self, (file, cluster, resource): Numbered) -> u64 {
        let offset = self.geometry(file).resource_offset(cluster, resource).unwrap();
        self.file_byte(self.fd_at(file.fd()), offset)
    }

    /// Marks a resource and keeps the cluster's count right.
    pub fn mark(&self, (file, cluster, resource): Numbered, free: bool) {
        self.edit::<ClusterMeta5>(self.cluster_at(file, cluster) + 512, |meta| {
            assert_ne!(meta.is_free(resource), free);
            meta.set_free(resource, free);
            meta.free = meta.free_bits().into();
        });
    }

    /// The first free resource.
    pub fn free_one(&self, file: SystemFile) -> Numbered {
        let geometry = self.geometry(file);
        for cluster in 0..geometry.clusters() {
            let meta: ClusterMeta5 = self.get(self.cluster_at(file, cluster) + 512);
            if let Some(resource) = (0..geometry.in_cluster(cluster)).find(|i| meta.is_free(*i)) {
                return (file, cluster, resource);
            }
        }
        panic!("nothing is free in {}", file.name());
    }

    /// Descriptors in use, system files aside.
    pub fn files(&self) -> Vec<(FdAddress, FdMeta)> {
        let geometry = self.geometry(SystemFile::Descriptors);
        let mut files = Vec::new();
        for cluster in 0..geometry.clusters() {
            let meta: ClusterMeta5 = self.get(self.cluster_at(SystemFile::Descriptors, cluster) + 512);
            for resource in (0..geometry.in_cluster(cluster)).filter(|i| !meta.is_free(*i)) {
                let fd = FdAddress::new(cluster as u32, resource);
                if cluster > 0 || resource > 7 {
                    files.push((fd, self.get(self.fd_at(fd) + 512)));
                }
            }
        }
        files
    }

    /// The first file that is like this.
    pub fn find(&self, kind: InodeKind, zla: Zla, like: impl Fn(&FdMeta) -> bool) -> FdAddress {
        let fits =
            |meta: &FdMeta| meta.kind.get() == kind as u32 && meta.zla.get() == zla as u32 && like(meta);
        let (fd, _) = self
            .files()
            .into_iter()
            .find(|(_, meta)| fits(meta))
            .unwrap_or_else(|| panic!("no {kind:?} {zla:?}"));
        fd
    }

    pub fn meta(&self, fd: FdAddress) -> FdMeta {
        self.get(self.fd_at(fd) + 512)
    }

    pub fn edit_meta(&self, fd: FdAddress, change: impl FnOnce(&mut FdMeta)) {
        self.edit(self.fd_at(fd) + 512, change);
    }

    /// The n-th address in a descriptor.
    pub fn slot(&self, fd: FdAddress, slot: u64) -> Option<Address> {
        Address::decode32(u32::from_le_bytes(
            self.bytes(self.fd_at(fd) + 0x400 + slot * 4, 4).try_into().unwrap(),
        ))
    }

    pub fn put_slot(&self, fd: FdAddress, slot: u64, address: Address) {
        self.put_address(self.fd_at(fd) + 0x400 + slot * 4, address);
    }

    /// The first slot of a descriptor that is not a hole.
    pub fn used_slot(&self, fd: FdAddress) -> (u64, Address) {
        let used = |slot| {
            self.slot(fd, slot).filter(|address| *address != Address::Hole).map(|address| (slot, address))
        };
        (0..256).find_map(used).unwrap()
    }

    /// What an address names, as it is counted.
    pub fn numbered(&self, address: Address) -> Numbered {
        match address {
            Address::FileBlock { block, .. } => {
                let per_cluster = u64::from(self.geometry(SystemFile::FileBlocks).per_cluster);
                (SystemFile::FileBlocks, block / per_cluster, (block % per_cluster) as u32)
            }
            Address::SubBlock { cluster, resource, .. } => (SystemFile::SubBlocks, cluster, resource),
            Address::PointerBlock { cluster, resource, second, .. } => {
                let file = if second { SystemFile::PointerBlocks2 } else { SystemFile::PointerBlocks };
                (file, cluster, resource)
            }
            Address::Descriptor(fd) => (SystemFile::Descriptors, fd.cluster().into(), fd.resource()),
            other => panic!("{other:?} is not counted"),
        }
    }

    /// Volume offset of what an address names.
    pub fn address_at(&self, address: Address) -> u64 {
        match address {
            Address::FileBlock { block, .. } => block * self.block_bytes,
            other => self.resource_at(self.numbered(other)),
        }
    }

    /// The first address in a pointer block that is not a hole: where it lies on the volume, and what it is.
    pub fn used_in(&self, block: Address) -> (u64, Address) {
        let at = self.address_at(block);
        let bytes = self.bytes(at, 4096);
        let raw = |slot: usize| u32::from_le_bytes(bytes[slot * 4..slot * 4 + 4].try_into().unwrap());
        let slot = (0..1024).find(|slot| raw(*slot) != 0).unwrap();
        (at + slot as u64 * 4, Address::decode32(raw(slot)).unwrap())
    }

    /// Writes an address anywhere on the volume.
    pub fn put_address(&self, at: u64, address: Address) {
        self.put(at, &address.encode32().unwrap().to_le_bytes());
    }

    /// Volume offset of a directory's n-th entry; the first block only.
    pub fn entry_at(&self, directory: FdAddress, index: u64) -> u64 {
        self.address_at(self.slot(directory, 0).unwrap()) + index * 140
    }

    /// The entry that leads to a file: directory and index.
    pub fn entry_to(&self, fd: FdAddress) -> (FdAddress, u64) {
        let directories =
            self.files().into_iter().filter(|(_, meta)| meta.kind.get() == InodeKind::Directory as u32);
        for directory in [FdAddress::ROOT].into_iter().chain(directories.map(|(fd, _)| fd)) {
            let entries = self.meta(directory).length.get() / 140;
            for index in 2..entries {
                let entry: DirEntry5 = self.get(self.entry_at(directory, index));
                if entry.fd.get() == fd.0 {
                    return (directory, index);
                }
            }
        }
        panic!("no entry leads to {fd}");
    }

    pub fn edit_entry(&self, directory: FdAddress, index: u64, change: impl FnOnce(&mut DirEntry5)) {
        self.edit(self.entry_at(directory, index), change);
    }
}
