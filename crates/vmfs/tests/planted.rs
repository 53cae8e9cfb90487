//! Every kind of fault, planted one at a time: the checker names it, at the severity it deserves, and repairs it if it
//! is a leak. On a volume that ESXi made and on one of ours.

#![allow(clippy::unwrap_used)] // a test that cannot go on panics

mod common;

use std::rc::Rc;

use block::crash::CrashLog;
use block::{Disk, MemoryDisk};
use common::editor::Editor;
use vmfs::check;
use vmfs::check::{MappingFault, Options, Report, Severity, What};
use vmfs::format::{
    Address, ClusterMeta5, FdAddress, FsDescriptor, Heartbeat, InodeKind, LockBlock, LvmHeader, PeEntry,
    RdmRecord, ResourceHeader, SystemFile, VmfsUuid, VolumeDescriptor, Zla, lvm5,
};

use InodeKind::{Directory, File, Symlink};
use Severity::{Corrupt, Leak};
use SystemFile::{Descriptors, FileBlocks, PointerBlocks, PointerBlocks2, SubBlocks};

fn look(editor: &Editor, repair_leaks: bool) -> Report {
    let disk: Rc<dyn Disk> = editor.disk.clone();
    common::at_once(check(vec![disk], Options { repair_leaks, mapping: None })).unwrap()
}

/// A fault: its name, what must be found, how bad it is, and how it is made.
type Plant = (&'static str, What, Severity, fn(&Editor));

/// A regular file with blocks of its own.
fn big(e: &Editor) -> FdAddress {
    e.find(File, Zla::FileBlocks, |meta| meta.blocks.get() >= 2)
}

fn thin(e: &Editor) -> FdAddress {
    e.find(File, Zla::Single, |meta| meta.blocks.get() >= 1)
}

fn rdm(e: &Editor) -> FdAddress {
    e.find(InodeKind::Rdm, Zla::None, |_| true)
}

fn directory(e: &Editor) -> FdAddress {
    e.find(Directory, Zla::SubBlocks, |_| true)
}

fn symlink(e: &Editor) -> FdAddress {
    e.find(Symlink, Zla::SubBlocks, |_| true)
}

/// The user file that an entry of the root leads to.
fn entry_of(e: &Editor, fd: FdAddress, change: impl FnOnce(&mut vmfs::format::DirEntry5)) {
    let (directory, index) = e.entry_to(fd);
    e.edit_entry(directory, index, change);
}

/// Takes a descriptor that nothing leads to.
fn a_free_descriptor(e: &Editor) -> FdAddress {
    e.mark((Descriptors, 1, 150), false);
    FdAddress::new(1, 150)
}

fn mark_first(e: &Editor, fd: FdAddress, free: bool) {
    e.mark(e.numbered(e.used_slot(fd).1), free);
}

const BITMAPS: &[Plant] = &[
    ("a file's block marked free", What::UsedButFree, Corrupt, |e| mark_first(e, big(e), true)),
    ("a sub-block marked free", What::UsedButFree, Corrupt, |e| mark_first(e, symlink(e), true)),
    ("a pointer block marked free", What::UsedButFree, Corrupt, |e| mark_first(e, thin(e), true)),
    ("a free block marked used", What::FreeButUsed, Leak, |e| e.mark(e.free_one(FileBlocks), false)),
    ("a free sub-block marked used", What::FreeButUsed, Leak, |e| e.mark(e.free_one(SubBlocks), false)),
    ("a free pointer block marked used", What::FreeButUsed, Leak, |e| {
        e.mark(e.free_one(PointerBlocks), false)
    }),
    ("a descriptor never written", What::FreeButUsed, Leak, |e| e.mark((Descriptors, 1, 150), false)),
    ("a descriptor given up", What::FreeButUsed, Leak, |e| {
        let fd = big(e);
        entry_of(e, fd, |entry| entry.fd = 0.into());
        e.edit_meta(fd, |meta| meta.links = 0.into());
    }),
    ("a block of two files", What::OwnedTwice, Corrupt, |e| {
        e.put_slot(symlink(e), 1, e.used_slot(directory(e)).1)
    }),
    ("a block twice in a file", What::OwnedTwice, Corrupt, |e| {
        e.put_slot(big(e), 1, e.slot(big(e), 0).unwrap())
    }),
    ("a pointer block of two places", What::OwnedTwice, Corrupt, |e| {
        let (slot, address) = e.used_slot(thin(e));
        e.put_slot(thin(e), slot + 1, address);
    }),
    ("a free count too low", What::ClusterCount, Corrupt, |e| {
        e.edit::<ClusterMeta5>(e.cluster_at(FileBlocks, 9) + 512, |meta| {
            meta.free = (meta.free.get() - 1).into()
        });
    }),
    ("a total too high", What::ClusterCount, Corrupt, |e| {
        e.edit::<ClusterMeta5>(e.cluster_at(SubBlocks, 3) + 512, |meta| {
            meta.total = (meta.total.get() + 1).into()
        });
    }),
    ("another cluster's number", What::ClusterCount, Corrupt, |e| {
        e.edit::<ClusterMeta5>(e.cluster_at(Descriptors, 3) + 512, |meta| meta.cluster = 4.into());
    }),
    ("a hint behind the end", What::ClusterCount, Corrupt, |e| {
        e.edit::<ClusterMeta5>(e.cluster_at(PointerBlocks, 5) + 512, |meta| meta.next_hint = 17.into());
    }),
    ("free bits behind the end", What::ClusterCount, Corrupt, |e| {
        e.edit::<ClusterMeta5>(e.cluster_at(FileBlocks, 5) + 512, |meta| meta.set_free(200, true));
    }),
];

const LOCKS: &[Plant] = &[
    ("a lock of another kind", What::LockBlock, Corrupt, |e| {
        e.edit::<LockBlock>(e.cluster_at(FileBlocks, 5), |lock| lock.kind = 0x10C0_0003.into());
    }),
    ("a lock from elsewhere", What::LockBlock, Corrupt, |e| {
        e.edit::<LockBlock>(e.cluster_at(SubBlocks, 5), |lock| lock.offset = 0x1000.into());
    }),
    ("an impossible mode", What::LockBlock, Corrupt, |e| {
        e.edit::<LockBlock>(e.fd_at(big(e)), |lock| lock.mode = 4.into());
    }),
    ("held by nobody", What::LockBlock, Corrupt, |e| {
        e.edit::<LockBlock>(e.fd_at(big(e)), |lock| {
            lock.mode = 1.into();
            lock.holder = VmfsUuid::NONE;
        });
    }),
    ("free, with a holder", What::LockBlock, Corrupt, |e| {
        e.edit::<LockBlock>(e.fd_at(rdm(e)), |lock| lock.holder = VmfsUuid([7; 16]));
    }),
    ("a heartbeat of no state", What::Heartbeat, Corrupt, |e| {
        e.edit::<Heartbeat>(0x30_0000 + 77 * 512, |slot| slot.state = 0xABCD_EF03.into());
    }),
    ("a heartbeat from elsewhere", What::Heartbeat, Corrupt, |e| {
        e.edit::<Heartbeat>(0x30_0000 + 77 * 512, |slot| slot.offset = 0x30_0000.into());
    }),
];

const FILES: &[Plant] = &[
    ("an address past the volume", What::BadAddress, Corrupt, |e| {
        let blocks = e.geometry(FileBlocks).count;
        e.put_slot(big(e), 0, Address::file_block(blocks));
    }),
    ("a sub-block past the end", What::BadAddress, Corrupt, |e| {
        e.put_slot(symlink(e), 0, Address::sub_block(e.geometry(SubBlocks).clusters(), 0));
    }),
    ("a pointer block past the end", What::BadAddress, Corrupt, |e| {
        e.put_slot(thin(e), 0, Address::pointer_block(e.geometry(PointerBlocks).clusters(), 0));
    }),
    ("a sub-block among file blocks", What::BadAddress, Corrupt, |e| {
        e.put_slot(big(e), 0, Address::sub_block(1, 1))
    }),
    ("an address of no kind", What::BadAddress, Corrupt, |e| {
        e.put(e.fd_at(big(e)) + 0x400, &[6, 0, 0, 0]);
    }),
    ("a descriptor's wrong own address", What::OwnAddress, Corrupt, |e| {
        e.edit_meta(big(e), |meta| meta.address = 0x1234_0004.into());
    }),
    ("a wrong second own address", What::OwnAddress, Corrupt, |e| {
        e.edit_meta(big(e), |meta| meta.address2 = 0x1234_0004.into());
    }),
    ("a wrong generation", What::WrongGeneration, Corrupt, |e| {
        e.edit_meta(big(e), |meta| meta.generation = (meta.generation.get() + 1).into());
    }),
    ("an unknown type", What::BadDescriptor, Corrupt, |e| e.edit_meta(big(e), |meta| meta.kind = 9.into())),
    ("another type", What::EntryTarget, Corrupt, |e| {
        e.edit_meta(big(e), |meta| meta.kind = (Symlink as u32).into())
    }),
    ("a wrong block size", What::BadDescriptor, Corrupt, |e| {
        e.edit_meta(big(e), |meta| meta.block_bytes = 8192.into())
    }),
    ("a wrong block shift", What::BadDescriptor, Corrupt, |e| {
        e.edit_meta(big(e), |meta| meta.block_shift = 13)
    }),
    ("an unknown ZLA", What::WrongZla, Corrupt, |e| e.edit_meta(big(e), |meta| meta.zla = 7.into())),
    ("the ZLA of a mapping in a file", What::WrongZla, Corrupt, |e| {
        e.edit_meta(big(e), |meta| meta.zla = 0.into())
    }),
    ("another ZLA", What::BadAddress, Corrupt, |e| e.edit_meta(thin(e), |meta| meta.zla = 1.into())),
    ("pointer blocks of the wrong file", What::WrongZla, Corrupt, |e| {
        e.edit_meta(thin(e), |meta| meta.zla = 5.into())
    }),
    ("too few blocks counted", What::BlockCount, Corrupt, |e| {
        e.edit_meta(big(e), |meta| meta.blocks = (meta.blocks.get() - 1).into());
    }),
    ("too many blocks counted", What::BlockCount, Leak, |e| {
        e.edit_meta(big(e), |meta| meta.blocks = (meta.blocks.get() + 1).into());
    }),
    ("too many to be zeroed counted", What::ToBeZeroedCount, Leak, |e| {
        e.edit_meta(big(e), |meta| meta.set_tbz(1))
    }),
    ("too few to be zeroed counted", What::ToBeZeroedCount, Corrupt, |e| {
        let (slot, address) = e.used_slot(big(e));
        let Address::FileBlock { block, cow, .. } = address else { panic!() };
        e.put_slot(big(e), slot, Address::FileBlock { block, tbz: true, cow });
    }),
    ("copies counted that are none", What::CopyOnWriteCount, Corrupt, |e| {
        e.edit_meta(big(e), |meta| meta.cow_low = 1.into());
    }),
    ("a length past what the list can hold", What::WrongLength, Corrupt, |e| {
        e.edit_meta(big(e), |meta| meta.length = (257 << 20).into());
    }),
    ("a length that cannot be", What::WrongLength, Corrupt, |e| {
        e.edit_meta(big(e), |meta| meta.length = (1 << 60).into());
    }),
    ("a symlink longer than its block", What::WrongLength, Corrupt, |e| {
        e.edit_meta(symlink(e), |meta| meta.length = 9000.into());
    }),
    ("a system file's length", What::WrongLength, Corrupt, |e| {
        e.edit_meta(SubBlocks.fd(), |meta| meta.length = (meta.length.get() - 512).into());
    }),
];

/// A file with two levels of pointer blocks.
fn double(e: &Editor) -> FdAddress {
    e.find(File, Zla::Double, |meta| meta.blocks.get() >= 1)
}

/// What the pointer block of the thin disk holds first: where the address lies, and the block's.
fn leaf_of_thin(e: &Editor) -> (u64, Address) {
    e.used_in(e.used_slot(thin(e)).1)
}

/// The same of the upper pointer block of the file with two levels: the lower one's address.
fn inner_of_double(e: &Editor) -> (u64, Address) {
    e.used_in(e.used_slot(double(e)).1)
}

fn leaf_of_double(e: &Editor) -> (u64, Address) {
    e.used_in(inner_of_double(e).1)
}

/// Puts the thin disk's pointer blocks into `.pb2.sf`, soundly: the file, its first slot, and the new address there.
fn move_to_second(e: &Editor) -> (FdAddress, u64, Address) {
    let fd = thin(e);
    let first = e.used_slot(fd).0;
    for slot in first..256 {
        let Some(old @ Address::PointerBlock { .. }) = e.slot(fd, slot) else { continue };
        let (_, cluster, resource) = e.free_one(PointerBlocks2);
        let new = Address::PointerBlock { cluster, resource, second: true, cow: false };
        e.put(e.address_at(new), &e.bytes(e.address_at(old), 4096));
        e.mark(e.numbered(new), false);
        e.mark(e.numbered(old), true);
        e.put_slot(fd, slot, new);
    }
    e.edit_meta(fd, |meta| meta.zla = (Zla::SinglePb2 as u32).into());
    (fd, first, e.slot(fd, first).unwrap())
}

/// Faults inside of pointer blocks, one level down and two.
const POINTERS: &[Plant] = &[
    ("an address past the volume, one level down", What::BadAddress, Corrupt, |e| {
        e.put_address(leaf_of_thin(e).0, Address::file_block(e.geometry(FileBlocks).count));
    }),
    ("an address past the volume, two levels down", What::BadAddress, Corrupt, |e| {
        e.put_address(leaf_of_double(e).0, Address::file_block(e.geometry(FileBlocks).count));
    }),
    ("a pointer block past the end, one level down", What::BadAddress, Corrupt, |e| {
        let clusters = e.geometry(PointerBlocks).clusters();
        e.put_address(inner_of_double(e).0, Address::pointer_block(clusters, 0));
    }),
    ("an address of no kind, two levels down", What::BadAddress, Corrupt, |e| {
        e.put(leaf_of_double(e).0, &[6, 0, 0, 0]);
    }),
    ("a sub-block in a pointer block", What::BadAddress, Corrupt, |e| {
        e.put_address(leaf_of_thin(e).0, Address::sub_block(1, 1));
    }),
    ("a pointer block where data belongs", What::BadAddress, Corrupt, |e| {
        e.put_address(leaf_of_thin(e).0, e.used_slot(thin(e)).1);
    }),
    ("data where a pointer block belongs", What::BadAddress, Corrupt, |e| {
        e.put_address(inner_of_double(e).0, leaf_of_double(e).1);
    }),
    ("a block twice in a pointer block", What::OwnedTwice, Corrupt, |e| {
        let (at, block) = leaf_of_thin(e);
        e.put_address(at + 4, block);
    }),
    ("a block of two files, by pointer blocks", What::OwnedTwice, Corrupt, |e| {
        e.put_address(leaf_of_double(e).0, leaf_of_thin(e).1);
    }),
    ("a lower pointer block of two places", What::OwnedTwice, Corrupt, |e| {
        let (at, block) = inner_of_double(e);
        e.put_address(at + 4, block);
    }),
    ("a pointer block of two files", What::OwnedTwice, Corrupt, |e| {
        e.put_address(inner_of_double(e).0, e.used_slot(thin(e)).1);
    }),
    ("a pointer block that is its own", What::OwnedTwice, Corrupt, |e| {
        e.put_address(inner_of_double(e).0, e.used_slot(double(e)).1);
    }),
    ("a block of a pointer block marked free", What::UsedButFree, Corrupt, |e| {
        e.mark(e.numbered(leaf_of_thin(e).1), true);
    }),
    ("a block two levels down marked free", What::UsedButFree, Corrupt, |e| {
        e.mark(e.numbered(leaf_of_double(e).1), true);
    }),
    ("a lower pointer block marked free", What::UsedButFree, Corrupt, |e| {
        e.mark(e.numbered(inner_of_double(e).1), true);
    }),
    ("an upper pointer block marked free", What::UsedButFree, Corrupt, |e| mark_first(e, double(e), true)),
    ("a pointer block that has forgotten its block", What::FreeButUsed, Leak, |e| {
        e.put_address(leaf_of_thin(e).0, Address::Hole);
    }),
    ("a pointer block that has forgotten the lower one", What::FreeButUsed, Leak, |e| {
        e.put_address(inner_of_double(e).0, Address::Hole);
    }),
    ("too few to be zeroed counted, two levels down", What::ToBeZeroedCount, Corrupt, |e| {
        let (at, address) = leaf_of_double(e);
        let Address::FileBlock { block, cow, .. } = address else { panic!() };
        e.put_address(at, Address::FileBlock { block, tbz: true, cow });
    }),
    ("a free block of .pb2.sf marked used", What::FreeButUsed, Leak, |e| {
        e.mark(e.free_one(PointerBlocks2), false);
    }),
    ("a block of .pb2.sf where the other file's belongs", What::WrongZla, Corrupt, |e| {
        let (_, cluster, resource) = e.free_one(PointerBlocks2);
        let second = Address::PointerBlock { cluster, resource, second: true, cow: false };
        e.put_address(inner_of_double(e).0, second);
    }),
    ("a block past the end of .pb2.sf", What::BadAddress, Corrupt, |e| {
        let (fd, slot, _) = move_to_second(e);
        let cluster = e.geometry(PointerBlocks2).clusters();
        e.put_slot(fd, slot, Address::PointerBlock { cluster, resource: 0, second: true, cow: false });
    }),
    ("an address past the volume, in .pb2.sf", What::BadAddress, Corrupt, |e| {
        let (_, _, block) = move_to_second(e);
        e.put_address(e.used_in(block).0, Address::file_block(e.geometry(FileBlocks).count));
    }),
    ("a block of .pb2.sf of two places", What::OwnedTwice, Corrupt, |e| {
        let (fd, slot, block) = move_to_second(e);
        e.put_slot(fd, slot + 1, block);
    }),
    ("a block of .pb2.sf marked free", What::UsedButFree, Corrupt, |e| {
        let (_, _, block) = move_to_second(e);
        e.mark(e.numbered(block), true);
    }),
];

const DIRECTORIES: &[Plant] = &[
    ("a link too few", What::LinkCount, Corrupt, |e| {
        e.edit_meta(FdAddress::ROOT, |meta| meta.links = (meta.links.get() - 1).into());
    }),
    ("a link too many", What::LinkCount, Leak, |e| e.edit_meta(big(e), |meta| meta.links = 2.into())),
    ("a directory's link too many", What::LinkCount, Leak, |e| {
        e.edit_meta(directory(e), |meta| meta.links = (meta.links.get() + 1).into());
    }),
    ("an entry to a free descriptor", What::EntryTarget, Corrupt, |e| {
        e.mark(e.numbered(Address::Descriptor(big(e))), true);
    }),
    ("an entry to another file", What::WrongGeneration, Corrupt, |e| {
        let other = rdm(e);
        entry_of(e, big(e), |entry| {
            entry.fd = other.0.into();
            entry.kind = (InodeKind::Rdm as u32).into();
        });
    }),
    ("an entry to nothing", What::EntryTarget, Corrupt, |e| {
        entry_of(e, big(e), |entry| entry.fd = 0xFFFF_FFC4.into())
    }),
    ("an entry to no descriptor", What::EntryTarget, Corrupt, |e| {
        entry_of(e, big(e), |entry| entry.fd = 0x141.into())
    }),
    ("an entry of another type", What::EntryTarget, Corrupt, |e| {
        entry_of(e, big(e), |entry| entry.kind = (Symlink as u32).into());
    }),
    ("an entry of another generation", What::WrongGeneration, Corrupt, |e| {
        entry_of(e, big(e), |entry| entry.generation = (entry.generation.get() + 1).into());
    }),
    ("an orphan file", What::OrphanDescriptor, Leak, |e| entry_of(e, big(e), |entry| entry.fd = 0.into())),
    ("an orphan thin disk", What::OrphanDescriptor, Leak, |e| {
        entry_of(e, thin(e), |entry| entry.fd = 0.into())
    }),
    ("an orphan that shares its blocks with a file", What::OrphanDescriptor, Leak, |e| {
        let copy = a_free_descriptor(e);
        let at = e.fd_at(copy);
        e.put(at, &e.bytes(e.fd_at(big(e)), 2048));
        e.edit::<LockBlock>(at, |lock| lock.offset = at.into());
        e.edit_meta(copy, |meta| (meta.address, meta.address2) = (copy.0.into(), copy.0.into()));
    }),
    ("a torn orphan", What::OrphanDescriptor, Leak, |e| {
        e.put(e.fd_at(a_free_descriptor(e)) + 512, &[0x5A; 512])
    }),
    ("an orphan directory with files", What::OrphanDescriptor, Corrupt, |e| {
        entry_of(e, directory(e), |entry| entry.fd = 0.into());
    }),
    ("a system file without entry", What::OrphanDescriptor, Corrupt, |e| {
        e.edit_entry(FdAddress::ROOT, 3, |entry| entry.fd = 0.into());
    }),
    ("a directory of half an entry", What::WrongLength, Corrupt, |e| {
        e.edit_meta(directory(e), |meta| meta.length = (meta.length.get() + 1).into());
    }),
    ("a directory longer than its blocks", What::WrongLength, Corrupt, |e| {
        e.edit_meta(directory(e), |meta| meta.length = (140 * 10_000).into());
    }),
    ("a name twice", What::BadEntry, Corrupt, |e| {
        let name = e.get::<vmfs::format::DirEntry5>(e.entry_at(FdAddress::ROOT, 3)).name;
        e.edit_entry(FdAddress::ROOT, 4, |entry| entry.name = name);
    }),
    ("no name", What::BadEntry, Corrupt, |e| entry_of(e, big(e), |entry| entry.name[0] = 0)),
    ("a slash", What::BadEntry, Corrupt, |e| entry_of(e, big(e), |entry| entry.name[0] = b'/')),
    ("dot leads elsewhere", What::EntryTarget, Corrupt, |e| {
        e.edit_entry(directory(e), 0, |entry| entry.fd = 4.into());
    }),
    ("dot-dot leads elsewhere", What::EntryTarget, Corrupt, |e| {
        let own = directory(e);
        let generation = e.meta(own).generation;
        e.edit_entry(own, 1, |entry| {
            entry.fd = own.0.into();
            entry.generation = generation;
        });
    }),
    ("dot is called otherwise", What::BadEntry, Corrupt, |e| {
        e.edit_entry(directory(e), 0, |entry| entry.name[0] = b'x')
    }),
    ("a second entry to a directory", What::BadEntry, Corrupt, |e| {
        let target = directory(e);
        let (own, index) = e.entry_to(target);
        let mut entry: vmfs::format::DirEntry5 = e.get(e.entry_at(own, index));
        entry.name[0] = b'~';
        entry_of(e, big(e), |other| *other = entry);
    }),
];

const VOLUME: &[Plant] = &[
    ("fewer blocks than the volume has", What::ResourceHeader, Corrupt, |e| {
        e.edit::<ResourceHeader>(e.header_at(FileBlocks), |header| {
            header.count_low = (header.count_low.get() - 1).into()
        });
    }),
    ("another cluster size", What::ResourceHeader, Corrupt, |e| {
        e.edit::<ResourceHeader>(e.header_at(SubBlocks), |header| header.per_cluster = 32.into());
    }),
    ("another group size", What::ResourceHeader, Corrupt, |e| {
        e.edit::<ResourceHeader>(e.header_at(PointerBlocks), |header| header.group_bytes = 0x1000.into());
    }),
    ("another number of groups", What::ResourceHeader, Corrupt, |e| {
        e.edit::<ResourceHeader>(e.header_at(SystemFile::PointerBlocks2), |header| header.groups = 2.into());
    }),
    ("another start of groups", What::ResourceHeader, Corrupt, |e| {
        e.edit::<ResourceHeader>(e.header_at(SubBlocks), |header| header.group0 = 0x2000.into());
    }),
    ("more descriptors than fit", What::ResourceHeader, Corrupt, |e| {
        e.edit::<ResourceHeader>(e.header_at(Descriptors), |header| header.count_high = 1.into());
    }),
    ("another volume's file system", What::FileSystemDescriptor, Corrupt, |e| {
        e.edit::<FsDescriptor>(0x20_0000, |fs| fs.lvm_uuid.0[3] ^= 1);
    }),
    ("a wrong place of .pb2.sf", What::FileSystemDescriptor, Corrupt, |e| {
        e.edit::<FsDescriptor>(0x20_0000, |fs| fs.pb2_offset = 0x42_2800.into());
    }),
    ("a wrong address of .sdd.sf", What::FileSystemDescriptor, Corrupt, |e| {
        e.edit::<FsDescriptor>(0x20_0000, |fs| fs.sdd_fd = 0x0180_0004.into());
    }),
    ("no magic", What::FileSystemDescriptor, Corrupt, |e| {
        e.edit::<FsDescriptor>(0x20_0000, |fs| fs.magic = 1.into())
    }),
    ("overlapping extents", What::Extents, Corrupt, |e| {
        e.edit_device::<PeEntry>(lvm5::PE_TABLE + 128, |entry| entry.volume_offset = 0.into());
    }),
    ("extents on the same place", What::Extents, Corrupt, |e| {
        e.edit_device::<PeEntry>(lvm5::PE_TABLE + 128, |entry| entry.device_offset = 0x110_0000.into());
    }),
    ("a missing extent", What::Extents, Corrupt, |e| {
        e.edit_device::<PeEntry>(lvm5::PE_TABLE + 128, |entry| entry.used = 0);
    }),
    ("a missing extent in the bitmap", What::Extents, Corrupt, |e| {
        e.edit_device::<[u8; 1]>(lvm5::PE_BITMAP, |byte| byte[0] &= !2);
    }),
    ("an extent too many", What::Extents, Corrupt, |e| {
        e.edit_device::<LvmHeader>(0x10_0000, |header| header.extents = (header.extents.get() + 1).into());
    }),
    ("a wrong volume size", What::Extents, Corrupt, |e| {
        e.edit_device::<VolumeDescriptor>(lvm5::VOLUME, |volume| volume.volume_bytes = (1 << 28).into());
    }),
    ("a wrong first unit", What::Extents, Corrupt, |e| {
        e.edit_device::<VolumeDescriptor>(lvm5::VOLUME, |volume| volume.first_unit = 1.into());
    }),
    ("a wrong last extent", What::VolumeManager, Corrupt, |e| {
        e.edit_device::<LvmHeader>(0x10_0000, |header| header.last_extent = 77.into());
    }),
    ("a device that is not there", What::VolumeManager, Corrupt, |e| {
        e.edit_device::<VolumeDescriptor>(lvm5::VOLUME, |volume| volume.devices = 2.into());
    }),
    ("a wrong generation of the volume", What::VolumeManager, Corrupt, |e| {
        e.edit_device::<VolumeDescriptor>(lvm5::VOLUME, |volume| volume.generation = 1.into());
    }),
    ("a device cut off", What::VolumeManager, Corrupt, |e| {
        e.edit_device::<LvmHeader>(0x10_0000, |header| header.device_bytes = (1 << 50).into());
    }),
];

const MAPPINGS: &[Plant] = &[
    ("an unknown kind of identity", What::MappingRecord, Corrupt, |e| {
        e.edit::<RdmRecord>(e.fd_at(rdm(e)) + 0x400, |record| record.id_kind = 9);
    }),
    ("an identity longer than its field", What::MappingRecord, Corrupt, |e| {
        e.edit::<RdmRecord>(e.fd_at(rdm(e)) + 0x400, |record| record.id_length = 45);
    }),
    ("an identity cut short", What::MappingRecord, Corrupt, |e| {
        e.edit::<RdmRecord>(e.fd_at(rdm(e)) + 0x400, |record| record.id_length = 3);
    }),
    ("no identity", What::MappingRecord, Corrupt, |e| {
        e.edit::<RdmRecord>(e.fd_at(rdm(e)) + 0x400, |record| record.id = [0; 44]);
    }),
    ("a LUN of half a sector", What::WrongLength, Corrupt, |e| {
        e.edit_meta(rdm(e), |meta| meta.length = (meta.length.get() + 1).into());
    }),
    ("a mapping with blocks", What::BlockCount, Corrupt, |e| {
        e.edit_meta(rdm(e), |meta| meta.blocks = 1.into())
    }),
    ("a mapping with a block list", What::WrongZla, Corrupt, |e| {
        e.edit_meta(rdm(e), |meta| meta.zla = 1.into())
    }),
];

fn plant_all(base: &Editor) {
    let before = look(base, false);
    assert!(before.is_clean(), "{:?}", before.findings());
    let moved = base.fork();
    move_to_second(&moved);
    assert!(look(&moved, false).is_clean(), "a pointer block in .pb2.sf is as good");
    for (name, what, severity, plant) in
        [BITMAPS, LOCKS, FILES, POINTERS, DIRECTORIES, VOLUME, MAPPINGS].concat()
    {
        let volume = base.fork();
        plant(&volume);
        let report = look(&volume, false);
        let met = report.findings().iter().any(|f| f.what == what && f.severity == severity);
        assert!(met, "{name}: wanted {what:?}, {severity:?} in {:#?}", report.findings());
        assert_eq!(report.worst(), Some(severity), "{name}: {:#?}", report.findings());
        assert_eq!(report.exit_code(), if severity == Leak { 3 } else { 2 }, "{name}");

        if severity == Leak {
            let repaired = look(&volume, true);
            assert!(
                repaired.is_clean() && !repaired.repaired.is_empty(),
                "{name}: {:#?}",
                repaired.findings()
            );
            assert_eq!(repaired.repaired.len() as u64, report.count(Leak), "{name}");
            let again = look(&volume, true);
            assert!(again.is_clean() && again.repaired.is_empty(), "{name}");
        } else {
            // Nothing is written to a corrupt volume: a disk that refuses writes is enough.
            let disk: Rc<dyn Disk> = Rc::new(MemoryDisk::from(volume.disk.image()).read_only());
            let options = Options { repair_leaks: true, mapping: None };
            let untouched = common::at_once(check(vec![disk], options)).unwrap();
            assert_eq!(untouched.worst(), Some(Corrupt), "{name}");
        }
    }
}

#[test]
fn every_fault_is_found_on_a_genuine_volume() {
    let Some(disk) = common::genuine::disk("vmfs/vmfs5") else { return };
    plant_all(&Editor::new(disk));
}

#[test]
fn every_fault_is_found_on_a_volume_of_ours() {
    plant_all(&Editor::new(common::populated::populated()));
}

/// What only the caller knows: descriptor and LUN say something else than the record.
#[test]
fn a_mapping_is_held_against_what_the_caller_knows() {
    let Some(disk) = common::genuine::disk("vmfs/vmfs5") else { return };
    let judge = |mapping: &vmfs::check::Mapping| {
        assert_eq!(mapping.record.id_text(), "QM00015");
        let expected = 512 * 1024;
        (mapping.length_bytes != expected)
            .then(|| MappingFault { found: mapping.length_bytes.to_string(), expected: expected.to_string() })
    };
    let options = Options { repair_leaks: false, mapping: Some(&judge) };
    let report = common::at_once(check(vec![disk], options)).unwrap();
    let faults: Vec<_> = report.findings().iter().filter(|f| f.what == What::MappingRecord).collect();
    assert_eq!((faults.len(), faults[0].severity, report.exit_code()), (1, Corrupt, 2));
}

#[test]
fn findings_name_the_file_and_the_first_owner() {
    let Some(disk) = common::genuine::disk("vmfs/vmfs5") else { return };
    let volume = Editor::new(disk);
    let file = volume.find(File, Zla::FileBlocks, |meta| meta.length.get() == (1 << 20) + 1);
    volume.put_slot(file, 1, volume.slot(SubBlocks.fd(), 3).unwrap());
    let report = look(&volume, false);
    let twice: Vec<_> = report.findings().iter().filter(|f| f.what == What::OwnedTwice).collect();
    let owner = format!("which belongs to {} block 3", SubBlocks.fd());
    assert!(twice.len() == 1 && twice[0].found.ends_with(&owner), "{twice:?}");
    assert_eq!(report.paths.get(&file).map(String::as_str), Some("/big"), "{:?}", report.paths);
    assert_eq!(report.totals.files, 131); // going through the files again counts nothing twice
}

/// Power fails at every event of a repair: what is left has leaks at worst, and the next repair ends them.
#[test]
fn crash_during_a_repair_leaves_leaks_at_worst() {
    let Some(disk) = common::genuine::disk("vmfs/vmfs5") else { return };
    let volume = Editor::new(disk);
    let (file, disk) = (big(&volume), thin(&volume));
    entry_of(&volume, file, |entry| entry.fd = 0.into());
    entry_of(&volume, disk, |entry| entry.fd = 0.into());
    volume.mark(volume.free_one(FileBlocks), false);
    volume.edit_meta(directory(&volume), |meta| meta.links = 9.into());
    let log = CrashLog::new(3);
    let recorded = log.disk_from(volume.disk.image());
    let options = Options { repair_leaks: true, mapping: None };
    let report = common::at_once(check(vec![recorded.clone()], options)).unwrap();
    assert!(report.is_clean() && report.repaired.len() >= 4, "{:?}", report.repaired);
    for point in 0..=log.points() {
        for seed in 0..3 {
            let image = log.cut(point, seed).remove(0);
            let cut = Editor::new(Rc::new(MemoryDisk::from(image)));
            let report = look(&cut, false);
            assert!(report.worst() <= Some(Leak), "point {point} seed {seed}: {:#?}", report.findings());
            assert!(look(&cut, true).is_clean(), "point {point} seed {seed}");
        }
    }
}
