//! The volume manager's tables of a fresh volume.

use zerocopy::{FromZeros, IntoBytes};

use super::{DeviceIdentity, NewVolume};
use crate::format::{
    DATA_OFFSET, LVM_MAGIC, LvmHeader, PE_BYTES_5, PE_ENTRY_BYTES, PE_PER_MAP, PeEntry, VolumeDescriptor,
    lvm5,
};

/// A device's part of the volume.
#[derive(Copy, Clone, Debug)]
pub(super) struct Share {
    /// Length of the device in bytes.
    pub device_bytes: u64,
    /// First physical extent of this device, counted over the volume.
    pub first: u64,
    /// Extents on this device.
    pub extents: u64,
}

/// Physical extents that fit a device of `bytes`.
pub(super) fn extents_of(bytes: u64) -> u64 {
    bytes.saturating_sub(DATA_OFFSET) / PE_BYTES_5
}

/// The device's header: written last, it makes the device part of a volume.
pub(super) fn header(new: &NewVolume, device: &DeviceIdentity, share: &Share) -> LvmHeader {
    let mut header = LvmHeader::new_zeroed();
    header.magic = LVM_MAGIC.into();
    header.major = 5.into();
    header.minor = 21.into();
    header.disk_id = device.scsi;
    header.disk_block_bytes = 512.into();
    header.device_bytes = share.device_bytes.into();
    header.volumes = 1.into();
    header.extents = (share.extents as u32).into();
    header.last_extent = (share.extents as u32 - 1).into();
    header.generation = 3.into();
    header.data_offset = DATA_OFFSET.into();
    header.device_uuid = device.uuid;
    header.created_us = new.stamps.device_created_us.into();
    header.modified_us = new.stamps.device_modified_us.into();
    header.pe_maps = (share.extents.div_ceil(PE_PER_MAP) as u32).into();
    header
}

/// The volume descriptor as it stands on one device; `extents` and `devices` are those of the whole volume.
pub(super) fn volume(new: &NewVolume, share: &Share, extents: u64, devices: usize) -> VolumeDescriptor {
    let mut volume = VolumeDescriptor::new_zeroed();
    volume.volume_bytes = (extents * PE_BYTES_5).into();
    volume.generation = (extents + devices as u64).into();
    volume.state = 1.into();
    let name = new.volume_uuid.to_string();
    volume.name[..name.len()].copy_from_slice(name.as_bytes());
    volume.uuid = new.volume_uuid;
    volume.snapshot_id = 1.into();
    volume.created_us = new.stamps.volume_created_us.into();
    volume.units = (share.extents as u32).into();
    volume.first_unit = share.first.into();
    volume.last_unit = (share.first + share.extents - 1).into();
    volume.modified_us = new.stamps.volume_modified_us.into();
    volume.devices = (devices as u32).into();
    volume
}

/// Bitmap and table of map `map`, as they follow each other on the device, and the offset where they go.
pub(super) fn map(share: &Share, map: u64) -> (u64, Vec<u8>) {
    let first = map * PE_PER_MAP;
    let count = (share.extents - first).min(PE_PER_MAP);
    let table_at = (lvm5::PE_TABLE - lvm5::PE_BITMAP) as usize;
    let used = table_at + (count * PE_ENTRY_BYTES) as usize;
    let mut bytes = vec![0; used.next_multiple_of(512)];
    for i in 0..count {
        bytes[i as usize / 8] |= 1 << (i % 8);
        let mut entry = PeEntry::new_zeroed();
        entry.used = 1;
        entry.id = ((first + i) as u32).into();
        entry.device_offset = (DATA_OFFSET + (first + i) * PE_BYTES_5).into();
        entry.volume_offset = ((share.first + first + i) * PE_BYTES_5).into();
        entry.bytes = PE_BYTES_5.into();
        entry.version = 1.into();
        let at = table_at + (i * PE_ENTRY_BYTES) as usize;
        bytes[at..at + PE_ENTRY_BYTES as usize].copy_from_slice(entry.as_bytes());
    }
    (lvm5::PE_BITMAP + map * lvm5::MAP_STEP, bytes)
}

/// The table of device names: 256 bytes each, room for 32.
pub(super) fn names(devices: &[DeviceIdentity]) -> Vec<u8> {
    let mut bytes = vec![0; (devices.len() * 256).next_multiple_of(512)];
    for (slot, device) in bytes.chunks_exact_mut(256).zip(devices) {
        let name = &device.name.as_bytes()[..device.name.len().min(255)];
        slot[..name.len()].copy_from_slice(name);
    }
    bytes
}
