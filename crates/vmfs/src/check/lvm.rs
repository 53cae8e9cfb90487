//! Checks the volume manager's tables and puts the devices together.

use std::rc::Rc;

use block::Disk;
use zerocopy::FromZeros;

use super::span::{Piece, Span};
use super::{CheckError, Place, Report, What};
use crate::format::{
    DATA_OFFSET, EXTENDED_HEADER_0, EXTENDED_STEP, ExtendedHeader, FS_DESCRIPTOR_OFFSET, FS_MAGIC,
    FS_MAGIC_LOCAL, LVM_HEADER_OFFSET, LVM_MAGIC, LvmHeader, PE_BYTES_5, PE_ENTRY_BYTES, PE_PER_MAP, PeEntry,
    REGION_BYTES, VmfsUuid, VolumeDescriptor, lvm5, view,
};

/// Extents of all maps of a region.
const PE_PER_REGION: u64 = REGION_BYTES / PE_BYTES_5;

/// What the volume manager says about the whole.
pub(super) struct Volume {
    pub span: Span,
    /// Identity and snapshot id; `None` on a file system without volume manager.
    pub identity: Option<(VmfsUuid, u32)>,
}

struct Device {
    index: usize,
    header: LvmHeader,
    volume: VolumeDescriptor,
}

/// Checks all tables. What is contradictory is reported and the plain rule (extents in order, 256 MiB each) used.
pub(super) async fn assemble(devices: Vec<Rc<dyn Disk>>, report: &mut Report) -> Result<Volume, CheckError> {
    let mut found = Vec::with_capacity(devices.len());
    for (index, disk) in devices.iter().enumerate() {
        let raw = read(disk, LVM_HEADER_OFFSET, 1024).await?;
        let Some(header) = raw.as_deref().and_then(view::<LvmHeader>).filter(|h| h.magic.get() == LVM_MAGIC)
        else {
            return bare(devices, index).await;
        };
        let major = header.major.get();
        if major == 6 {
            return Err(CheckError::Version { name: "LVM", version: major });
        }
        let volume = raw.as_deref().and_then(|raw| view::<VolumeDescriptor>(&raw[512..])).cloned();
        let volume = volume.unwrap_or_else(VolumeDescriptor::new_zeroed);
        found.push(Device { index, header: header.clone(), volume });
    }
    let mut checker = Tables { report, devices: &devices };
    for device in &found {
        checker.header(device);
    }
    checker.agreement(&found);
    for device in &found {
        checker.extents(device).await?;
    }
    found.sort_by_key(|device| device.volume.first_unit.get());
    let pieces = checker.pieces(&found);
    let identity = found.first().map(|d| (d.volume.uuid, d.volume.snapshot_id.get()));
    Ok(Volume { span: Span { devices, pieces }, identity })
}

/// A file system formatted straight onto a device.
async fn bare(devices: Vec<Rc<dyn Disk>>, index: usize) -> Result<Volume, CheckError> {
    let not = Err(CheckError::NotVmfs { device: index });
    let [disk] = &devices[..] else { return not };
    let magic =
        read(disk, FS_DESCRIPTOR_OFFSET, 512).await?.map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    if !magic.is_some_and(|magic| magic == FS_MAGIC || magic == FS_MAGIC_LOCAL) {
        return not;
    }
    let pieces = vec![Piece { volume_at: 0, bytes: disk.shape().bytes(), device: 0, device_at: 0 }];
    Ok(Volume { span: Span { devices, pieces }, identity: None })
}

/// `None` when the device is shorter.
async fn read(disk: &Rc<dyn Disk>, at: u64, length: usize) -> Result<Option<Vec<u8>>, CheckError> {
    if at + length as u64 > disk.shape().bytes() {
        return Ok(None);
    }
    let mut bytes = vec![0; length];
    disk.read(block::Sector::at_byte(at), &block::SegmentsMut::new(&mut bytes)).await?;
    Ok(Some(bytes))
}

struct Tables<'a> {
    report: &'a mut Report,
    devices: &'a [Rc<dyn Disk>],
}

impl Tables<'_> {
    fn expect(&mut self, what: What, device: usize, at: u64, found: u64, expected: u64) {
        if found != expected {
            self.report.corrupt(what, Place::Device { device, at }, found, expected);
        }
    }

    fn header(&mut self, device: &Device) {
        let (header, volume, index) = (&device.header, &device.volume, device.index);
        if let Err(wrong) = header.check(LVM_HEADER_OFFSET) {
            let place = Place::Device { device: index, at: wrong.at };
            self.report.corrupt(What::VolumeManager, place, wrong.found, wrong.expected);
        }
        let (extents, actual) = (u64::from(header.extents.get()), self.devices[index].shape().bytes());
        let at = |offset| LVM_HEADER_OFFSET + offset;
        let own = header.device_bytes.get();
        if own > actual {
            let place = Place::Device { device: index, at: at(0x5E) };
            self.report.corrupt(
                What::VolumeManager,
                place,
                format!("{own} bytes"),
                format!("{actual} bytes"),
            );
        } else if own < actual {
            let place = Place::Device { device: index, at: at(0x5E) };
            self.report.note(What::VolumeManager, place, format!("{own} bytes"), format!("{actual} bytes"));
        }
        self.expect(What::VolumeManager, index, at(0x5A), header.disk_block_bytes.get().into(), 512);
        self.expect(What::VolumeManager, index, at(0x66), header.volumes.get().into(), 1);
        self.expect(
            What::VolumeManager,
            index,
            at(0x6E),
            header.last_extent.get().into(),
            extents.saturating_sub(1),
        );
        let maps = extents.min(PE_PER_REGION).div_ceil(PE_PER_MAP);
        let own_maps = u64::from(header.pe_maps.get());
        // LVM 3 leaves the number zero.
        let maps = if header.major.get() == 3 && own_maps == 0 { 0 } else { maps };
        self.expect(What::VolumeManager, index, at(0xBE), own_maps, maps);
        let next = if extents > PE_PER_REGION { EXTENDED_HEADER_0 } else { 0 };
        self.expect(What::VolumeManager, index, at(0xC2), header.next_extended.get(), next);
        let regions = extents.div_ceil(PE_PER_REGION).max(1);
        let needed = DATA_OFFSET + (regions - 1) * (EXTENDED_STEP - REGION_BYTES) + extents * PE_BYTES_5;
        if extents == 0 || needed > own {
            let place = Place::Device { device: index, at: at(0x6A) };
            self.report.corrupt(
                What::Extents,
                place,
                format!("{extents} extents"),
                format!("what fits {own} bytes"),
            );
        }
        let at = |offset| lvm5::VOLUME + offset;
        self.expect(What::VolumeManager, index, at(0x10), volume.state.get().into(), 1);
        self.expect(What::VolumeManager, index, at(0x70), volume.index.get().into(), 0);
        self.expect(What::Extents, index, at(0x74), volume.units.get().into(), extents);
        let last = (volume.first_unit.get().saturating_add(extents)).saturating_sub(1);
        self.expect(What::Extents, index, at(0x80), volume.last_unit.get(), last);
        let name = volume.uuid.to_string();
        if !volume.name.starts_with(name.as_bytes()) || volume.name[name.len()..].iter().any(|b| *b != 0) {
            let own = String::from_utf8_lossy(&volume.name).trim_end_matches('\0').to_string();
            let place = Place::Device { device: index, at: at(0x14) };
            // Volumes below a file system are called so; others were given names by people.
            self.report.note(What::VolumeManager, place, own, name);
        }
    }

    /// The devices say the same about the volume, and their extents fill it without gap or overlap.
    fn agreement(&mut self, devices: &[Device]) {
        let Some(first) = devices.first().map(|d| d.volume.clone()) else { return };
        let extents: u64 = devices.iter().map(|d| u64::from(d.header.extents.get())).sum();
        for Device { index, volume, .. } in devices {
            let place = |offset| Place::Device { device: *index, at: lvm5::VOLUME + offset };
            if volume.uuid != first.uuid || volume.snapshot_id != first.snapshot_id {
                let (own, other) = (volume.uuid, first.uuid);
                self.report.corrupt(
                    What::VolumeManager,
                    place(0x54),
                    format!("volume {own}"),
                    format!("volume {other}"),
                );
            }
            self.expect(
                What::VolumeManager,
                *index,
                lvm5::VOLUME + 0x90,
                volume.devices.get().into(),
                devices.len() as u64,
            );
            self.expect(
                What::Extents,
                *index,
                lvm5::VOLUME,
                volume.volume_bytes.get(),
                extents.saturating_mul(PE_BYTES_5),
            );
            let generation = extents + devices.len() as u64;
            self.expect(What::VolumeManager, *index, lvm5::VOLUME + 8, volume.generation.get(), generation);
        }
        let mut order: Vec<&Device> = devices.iter().collect();
        order.sort_by_key(|device| device.volume.first_unit.get());
        let mut next = 0;
        for device in order {
            self.expect(
                What::Extents,
                device.index,
                lvm5::VOLUME + 0x78,
                device.volume.first_unit.get(),
                next,
            );
            next += u64::from(device.header.extents.get());
        }
    }

    /// Bitmap and table of every map.
    async fn extents(&mut self, device: &Device) -> Result<(), CheckError> {
        let disk = &self.devices[device.index];
        let total = u64::from(device.header.extents.get()).min(1 << 20);
        let (mut done, mut region) = (0, 0);
        while done < total {
            let base = if region == 0 {
                LVM_HEADER_OFFSET
            } else {
                EXTENDED_HEADER_0 + (region - 1) * EXTENDED_STEP
            };
            let data = base + (DATA_OFFSET - LVM_HEADER_OFFSET);
            let here = (total - done).min(PE_PER_REGION);
            if region > 0 {
                let raw = read(disk, base, 512).await?;
                let header = raw.as_deref().and_then(view::<ExtendedHeader>).copied();
                let header = header.unwrap_or_else(ExtendedHeader::new_zeroed);
                self.expect(
                    What::VolumeManager,
                    device.index,
                    base,
                    header.magic.get().into(),
                    LVM_MAGIC.into(),
                );
                self.expect(What::VolumeManager, device.index, base + 8, header.data_offset.get(), data);
            }
            for map in 0..here.div_ceil(PE_PER_MAP) {
                let at = base + (lvm5::PE_BITMAP - LVM_HEADER_OFFSET) + map * lvm5::MAP_STEP;
                let first = done + map * PE_PER_MAP;
                let count = (here - map * PE_PER_MAP).min(PE_PER_MAP);
                self.map(device, at, first, count, data + map * PE_PER_MAP * PE_BYTES_5).await?;
            }
            done += here;
            region += 1;
        }
        Ok(())
    }

    async fn map(
        &mut self,
        device: &Device,
        at: u64,
        first: u64,
        count: u64,
        data: u64,
    ) -> Result<(), CheckError> {
        let index = device.index;
        let Some(bytes) = read(&self.devices[index], at, lvm5::MAP_STEP as usize).await? else {
            self.report.corrupt(
                What::Extents,
                Place::Device { device: index, at },
                "the end of the device",
                "a table",
            );
            return Ok(());
        };
        let (bitmap, table) = bytes.split_at((lvm5::PE_TABLE - lvm5::PE_BITMAP) as usize);
        for (i, raw) in (0..PE_PER_MAP).zip(table.chunks_exact(PE_ENTRY_BYTES as usize)) {
            let Some(entry) = view::<PeEntry>(raw) else { continue };
            let used = bitmap[i as usize / 8] >> (i % 8) & 1;
            let wanted = u64::from(i < count);
            self.expect(What::Extents, index, at + i / 8, used.into(), wanted);
            let entry_at = at + bitmap.len() as u64 + i * PE_ENTRY_BYTES;
            self.expect(What::Extents, index, entry_at, entry.used.into(), wanted);
            if i >= count {
                continue;
            }
            self.expect(What::Extents, index, entry_at + 1, entry.id.get().into(), first + i);
            self.expect(What::Extents, index, entry_at + 5, entry.volume_index.get().into(), 0);
            self.expect(What::Extents, index, entry_at + 9, entry.device_offset.get(), data + i * PE_BYTES_5);
            let volume_at =
                device.volume.first_unit.get().saturating_add(first + i).saturating_mul(PE_BYTES_5);
            self.expect(What::Extents, index, entry_at + 17, entry.volume_offset.get(), volume_at);
            self.expect(What::Extents, index, entry_at + 25, entry.bytes.get(), PE_BYTES_5);
        }
        Ok(())
    }

    /// The plain rule, cut to what the devices hold.
    fn pieces(&self, devices: &[Device]) -> Vec<Piece> {
        let (mut pieces, mut volume_at) = (Vec::new(), 0);
        for device in devices {
            let actual = self.devices[device.index].shape().bytes();
            let mut left = u64::from(device.header.extents.get()).min(1 << 20) * PE_BYTES_5;
            let mut device_at = DATA_OFFSET;
            while left > 0 && device_at < actual {
                let bytes = left.min(REGION_BYTES).min(actual - device_at);
                pieces.push(Piece { volume_at, bytes, device: device.index, device_at });
                volume_at += bytes;
                left -= bytes;
                device_at += EXTENDED_STEP;
            }
        }
        pieces
    }
}
