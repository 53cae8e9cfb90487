//! What is on a device already: enough to refuse to format over something that somebody may miss.

use block::{Disk, DiskError, Sector, SegmentsMut};

/// Something recognised on a device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Existing {
    /// A device of a VMFS volume (its LVM header is there).
    VmfsDevice,
    /// A VMFS made without a volume manager.
    Vmfs,
    /// A partition table.
    Partitions(&'static str),
    /// A file system, by name.
    FileSystem(&'static str),
    /// Another volume manager, RAID, encryption or swap.
    Container(&'static str),
    /// A disk image lies at the start of the device.
    DiskImage(&'static str),
}

impl std::fmt::Display for Existing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::VmfsDevice => write!(f, "a device of a VMFS volume"),
            Self::Vmfs => write!(f, "a VMFS without volume manager"),
            Self::Partitions(name) => write!(f, "a partition table ({name})"),
            Self::FileSystem(name) => write!(f, "a file system ({name})"),
            Self::Container(name) => write!(f, "{name}"),
            Self::DiskImage(name) => write!(f, "a disk image ({name})"),
        }
    }
}

type Make = fn(&'static str) -> Existing;

fn vmfs_device(_: &'static str) -> Existing {
    Existing::VmfsDevice
}

fn vmfs(_: &'static str) -> Existing {
    Existing::Vmfs
}

/// Offset, bytes that must be there, what it is, its name. The most telling first: a file system inside of a
/// partition says less than the table around it, and a boot sector says least.
const SIGNATURES: &[(u64, &[u8], Make, &str)] = &[
    (0x100000, &[0x0D, 0xD0, 0x01, 0xC0], vmfs_device, ""),
    (0x200000, &[0x5E, 0xF1, 0xAB, 0x2F], vmfs, ""),
    (0x200000, &[0x5F, 0xF1, 0xAB, 0x2F], vmfs, ""),
    (512, b"EFI PART", Existing::Partitions, "GPT"),
    (4096, b"EFI PART", Existing::Partitions, "GPT"),
    (1080, &[0x53, 0xEF], Existing::FileSystem, "ext2, ext3 or ext4"),
    (0, b"XFSB", Existing::FileSystem, "XFS"),
    (0x10040, b"_BHRfS_M", Existing::FileSystem, "btrfs"),
    (0x1003, b"-FVE-FS-", Existing::Container, "BitLocker"),
    (3, b"-FVE-FS-", Existing::Container, "BitLocker"),
    (3, b"NTFS    ", Existing::FileSystem, "NTFS"),
    (3, b"EXFAT   ", Existing::FileSystem, "exFAT"),
    (3, b"ReFS\0\0\0\0", Existing::FileSystem, "ReFS"),
    (0x36, b"FAT1", Existing::FileSystem, "FAT"),
    (0x52, b"FAT32", Existing::FileSystem, "FAT32"),
    (0x8001, b"CD001", Existing::FileSystem, "ISO 9660"),
    (0x400, &[0x10, 0x20, 0xF5, 0xF2], Existing::FileSystem, "F2FS"),
    (512, b"LABELONE", Existing::Container, "an LVM2 physical volume"),
    (0, b"LABELONE", Existing::Container, "an LVM2 physical volume"),
    (0, b"KAGAMIPL", Existing::Container, "a medium of a kagami pool"),
    (0, b"LUKS\xBA\xBE", Existing::Container, "a LUKS container"),
    (0, b"bluestore block device", Existing::Container, "a Ceph OSD"),
    (0, &[0xFC, 0x4E, 0x2B, 0xA9], Existing::Container, "a Linux RAID member"),
    (4096, &[0xFC, 0x4E, 0x2B, 0xA9], Existing::Container, "a Linux RAID member"),
    (4086, b"SWAPSPACE2", Existing::Container, "Linux swap space"),
    (0, b"QFI\xFB", Existing::DiskImage, "qcow2"),
    (0, b"KDMV", Existing::DiskImage, "VMDK"),
    (0, b"COWD", Existing::DiskImage, "VMDK redo log"),
    (0, b"# Disk DescriptorFile", Existing::DiskImage, "VMDK descriptor"),
    (0, b"vhdxfile", Existing::DiskImage, "VHDX"),
    (0, b"conectix", Existing::DiskImage, "VHD"),
    (0, b"<<< ", Existing::DiskImage, "VDI"),
];

/// Looks for known signatures. `None` is no promise that the device is empty.
///
/// Errors are those of reading the device.
pub async fn existing_content(disk: &dyn Disk) -> Result<Option<Existing>, DiskError> {
    let sectors = disk.shape().sectors;
    for (offset, bytes, make, name) in SIGNATURES {
        if found(disk, sectors, *offset, bytes).await? {
            return Ok(Some(make(name)));
        }
    }
    let mut boot = [0; 512];
    if sectors > 0 {
        disk.read(Sector(0), &SegmentsMut::new(&mut boot)).await?;
    }
    // A boot signature alone means nothing; entries with a type and a length are a table.
    let entry = |i: usize| &boot[446 + 16 * i..462 + 16 * i];
    let is_table = boot[510..] == [0x55, 0xAA]
        && (0..4).all(|i| matches!(entry(i)[0], 0 | 0x80))
        && (0..4).any(|i| entry(i)[4] != 0 && entry(i)[12..] != [0; 4]);
    Ok(is_table.then_some(Existing::Partitions("MBR")))
}

async fn found(disk: &dyn Disk, sectors: u64, offset: u64, bytes: &[u8]) -> Result<bool, DiskError> {
    let (first, inside) = (offset / 512, (offset % 512) as usize);
    let count = (inside + bytes.len()).div_ceil(512);
    if first + count as u64 > sectors {
        return Ok(false);
    }
    let mut content = [0; 1024]; // no signature is longer than a sector, so two hold it
    disk.read(Sector(first), &SegmentsMut::new(&mut content[..count * 512])).await?;
    Ok(content[inside..inside + bytes.len()] == *bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::{MemoryDisk, Safe, Segments};

    fn disk_with(offset: u64, bytes: &[u8]) -> MemoryDisk {
        let disk = MemoryDisk::new(16384);
        let mut area = vec![0; 1024];
        let inside = (offset % 512) as usize;
        area[inside..inside + bytes.len()].copy_from_slice(bytes);
        let from = Segments::new(&area);
        lane::block_on(async { disk.write(Sector(offset / 512), &from, Safe::AtNextFlush).await.unwrap() });
        disk
    }

    #[test]
    fn every_signature_is_recognised() {
        for (offset, bytes, make, name) in SIGNATURES {
            let disk = disk_with(*offset, bytes);
            let found = lane::block_on(async { existing_content(&disk).await.unwrap() });
            assert_eq!(found, Some(make(name)), "{name} at {offset:#x}");
        }
    }

    #[test]
    fn a_partition_table_is_told_from_a_boot_signature() {
        let mut boot = [0; 512];
        boot[510..].copy_from_slice(&[0x55, 0xAA]);
        let look = |boot: &[u8]| {
            let disk = disk_with(0, boot);
            lane::block_on(async { existing_content(&disk).await.unwrap() })
        };
        assert_eq!(look(&boot), None);
        boot[446 + 4] = 0xFB;
        boot[446 + 12] = 1;
        assert_eq!(look(&boot), Some(Existing::Partitions("MBR")));
    }

    #[test]
    fn a_tiny_or_empty_device_holds_nothing() {
        for sectors in [0, 1, 3] {
            let disk = MemoryDisk::new(sectors);
            assert_eq!(lane::block_on(async { existing_content(&disk).await.unwrap() }), None);
        }
    }
}
