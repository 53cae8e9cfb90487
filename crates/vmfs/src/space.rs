//! The logical volume: devices put together by their LVM tables, addressed by one offset.
//!
//! LVM 3, 4 and 5 map 256 MiB at a time, in tables that repeat behind every 16 TiB of data; LVM 6 maps 16 TiB at a
//! time. A volume without LVM is one device as it is.

use crate::Error;
use crate::format::{
    Corrupt, EXTENDED_STEP, Expected, ExtendedHeader, FS_DESCRIPTOR_OFFSET, FS_MAGIC, FS_MAGIC_LOCAL,
    LVM_HEADER_OFFSET, LVM_MAGIC, LvmHeader, PE_BYTES_5, PE_ENTRY_BYTES, PE_PER_MAP, PeEntry, VmfsUuid,
    VolumeDescriptor, ensure, lvm5, lvm6, view,
};
use block::{Buffer, Disk, DiskError, SECTOR_BYTES, Safe, Sector, Segments, SegmentsMut};
use std::rc::Rc;

/// A contiguous piece of the volume on one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Offset in the volume (bytes).
    pub volume: u64,
    /// Length (bytes).
    pub bytes: u64,
    /// Index of the device in [`Space::devices`].
    pub device: usize,
    /// Offset on the device (bytes).
    pub at: u64,
}

/// What the LVM header and volume descriptor say.
#[derive(Clone, Debug)]
pub struct LvmInfo {
    /// LVM version: 3, 4, 5 or 6.
    pub version: u32,
    /// Identity of the logical volume.
    pub uuid: VmfsUuid,
    /// 1; a resignatured copy has another.
    pub snapshot_id: u32,
    /// VMFS-L: for one host.
    pub local: bool,
}

/// The volume's bytes on its devices.
pub struct Space {
    devices: Vec<Rc<dyn Disk>>,
    pieces: Vec<Piece>,
    bytes: u64,
    lvm: Option<LvmInfo>,
}

struct Member {
    device: Rc<dyn Disk>,
    header: LvmHeader,
    volume: VolumeDescriptor,
}

impl Space {
    /// Puts the devices of one volume together, in whatever order they come.
    pub async fn open(devices: Vec<Rc<dyn Disk>>) -> Result<Self, Error> {
        let mut members = Vec::new();
        for device in &devices {
            match load_member(device).await? {
                Some(member) => members.push(member),
                None if devices.len() == 1 => return Self::without_lvm(Rc::clone(device)).await,
                None => return Err(wrong("a device has no LVM header")),
            }
        }
        members.sort_by_key(|m| m.volume.first_unit.get());
        let Some(first) = members.first() else { return Err(wrong("no device was given")) };
        let lvm = LvmInfo {
            version: first.header.major.get(),
            uuid: first.volume.uuid,
            snapshot_id: first.volume.snapshot_id.get(),
            local: first.header.flags.get() & 1 == 1,
        };
        let bytes = first.volume.volume_bytes.get();
        let needed = first.volume.devices.get();
        for member in &members {
            let (uuid, id) = (member.volume.uuid, member.volume.snapshot_id.get());
            if uuid != lvm.uuid || id != lvm.snapshot_id {
                return Err(wrong(format!("volumes {} and {uuid} are mixed", lvm.uuid)));
            }
        }
        if members.len() as u64 != u64::from(needed) {
            let given = members.len();
            return Err(wrong(format!("volume {} lies on {needed} devices, {given} given", lvm.uuid)));
        }
        let mut pieces = Vec::new();
        for (index, member) in members.iter().enumerate() {
            load_pieces(member, index, &mut pieces).await?;
        }
        let pieces = join(pieces, bytes)?;
        Ok(Self { devices: members.into_iter().map(|m| m.device).collect(), pieces, bytes, lvm: Some(lvm) })
    }

    async fn without_lvm(device: Rc<dyn Disk>) -> Result<Self, Error> {
        let bytes = device.shape().bytes();
        if bytes < FS_DESCRIPTOR_OFFSET + SECTOR_BYTES {
            return Err(Error::NotVmfs);
        }
        let sector = read_device(&*device, FS_DESCRIPTOR_OFFSET, 512).await?;
        let magic = u32::from_le_bytes([sector[0], sector[1], sector[2], sector[3]]);
        if magic != FS_MAGIC && magic != FS_MAGIC_LOCAL {
            return Err(Error::NotVmfs);
        }
        let pieces = vec![Piece { volume: 0, bytes, device: 0, at: 0 }];
        Ok(Self { devices: vec![device], pieces, bytes, lvm: None })
    }

    /// Length of the volume (bytes).
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The devices, in the order of the volume.
    pub fn devices(&self) -> &[Rc<dyn Disk>] {
        &self.devices
    }

    /// What LVM says; `None` when the volume was formatted without.
    pub fn lvm(&self) -> Option<&LvmInfo> {
        self.lvm.as_ref()
    }

    /// All pieces, in order.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The first piece of `bytes` bytes at volume offset `volume`: as long as one device holds it contiguously.
    pub fn piece(&self, volume: u64, bytes: u64) -> Result<Piece, DiskError> {
        let found = self.pieces.partition_point(|p| p.volume <= volume);
        let piece = found.checked_sub(1).and_then(|i| self.pieces.get(i)).ok_or(DiskError::OutOfRange)?;
        let inside = volume - piece.volume;
        if inside >= piece.bytes {
            return Err(DiskError::OutOfRange);
        }
        let bytes = bytes.min(piece.bytes - inside);
        Ok(Piece { volume, bytes, device: piece.device, at: piece.at + inside })
    }

    /// Reads whole sectors at volume offset `volume`.
    pub async fn read(&self, volume: u64, into: &mut [u8]) -> Result<(), Error> {
        let mut done = 0;
        while done < into.len() {
            let piece = self.piece(volume + done as u64, (into.len() - done) as u64)?;
            let part = &mut into[done..done + piece.bytes as usize];
            done += part.len();
            self.devices[piece.device].read(sector(piece.at)?, &SegmentsMut::new(part)).await?;
        }
        Ok(())
    }

    /// Writes whole sectors at volume offset `volume`; durable after [`Space::flush`].
    pub async fn write(&self, volume: u64, from: &[u8]) -> Result<(), Error> {
        let mut done = 0;
        while done < from.len() {
            let piece = self.piece(volume + done as u64, (from.len() - done) as u64)?;
            let part = Segments::new(&from[done..done + piece.bytes as usize]);
            done += part.len();
            self.devices[piece.device].write(sector(piece.at)?, &part, Safe::AtNextFlush).await?;
        }
        Ok(())
    }

    /// Makes whole sectors at volume offset `volume` read as zero.
    pub async fn zero(&self, volume: u64, bytes: u64) -> Result<(), Error> {
        let mut done = 0;
        while done < bytes {
            let piece = self.piece(volume + done, bytes - done)?;
            done += piece.bytes;
            self.devices[piece.device].zero(sector(piece.at)?, piece.bytes / SECTOR_BYTES, true).await?;
        }
        Ok(())
    }

    /// Tells the devices that nobody needs the content of whole sectors at volume offset `volume`.
    pub async fn unmap(&self, volume: u64, bytes: u64) -> Result<(), Error> {
        let mut done = 0;
        while done < bytes {
            let piece = self.piece(volume + done, bytes - done)?;
            done += piece.bytes;
            self.devices[piece.device].unmap(sector(piece.at)?, piece.bytes / SECTOR_BYTES).await?;
        }
        Ok(())
    }

    /// Makes everything written so far durable, on every device.
    pub async fn flush(&self) -> Result<(), Error> {
        for device in &self.devices {
            device.flush().await?;
        }
        Ok(())
    }
}

fn wrong(what: impl Into<String>) -> Error {
    Error::WrongDevices { what: what.into() }
}

/// Metadata offsets come from the medium: one that is not on a sector boundary is refused.
fn sector(bytes: u64) -> Result<Sector, DiskError> {
    if bytes.is_multiple_of(SECTOR_BYTES) {
        Ok(Sector(bytes / SECTOR_BYTES))
    } else {
        Err(DiskError::OutOfRange)
    }
}

async fn read_device(device: &dyn Disk, at: u64, bytes: usize) -> Result<Buffer, Error> {
    let mut buffer = Buffer::zeroed(bytes);
    device.read(sector(at)?, &SegmentsMut::new(&mut buffer)).await?;
    Ok(buffer)
}

async fn load_member(device: &Rc<dyn Disk>) -> Result<Option<Member>, Error> {
    if device.shape().bytes() < crate::format::DATA_OFFSET {
        return Ok(None);
    }
    let sector = read_device(&**device, LVM_HEADER_OFFSET, 512).await?;
    let Some(header) = view::<LvmHeader>(&sector).filter(|h| h.magic.get() == LVM_MAGIC) else {
        return Ok(None);
    };
    header.check(LVM_HEADER_OFFSET)?;
    let at = header.volume_descriptor_offset();
    let raw = read_device(&**device, at, 512).await?;
    let Some(volume) = view::<VolumeDescriptor>(&raw) else { return Err(Error::NotVmfs) };
    let bytes = volume.volume_bytes.get();
    let whole = bytes > 0 && bytes.is_multiple_of(PE_BYTES_5) && bytes < 1 << 56;
    ensure(whole, "volume length", at, bytes, Expected::Words("a multiple of 256 MiB, below 64 PiB"))?;
    let devices = volume.devices.get();
    ensure(
        (1..=32).contains(&devices),
        "number of devices",
        at + 0x90,
        devices.into(),
        Expected::AtMost(32),
    )?;
    Ok(Some(Member { device: Rc::clone(device), header: header.clone(), volume: volume.clone() }))
}

async fn load_pieces(member: &Member, device: usize, out: &mut Vec<Piece>) -> Result<(), Error> {
    let mut left = u64::from(member.header.extents.get());
    if member.header.major.get() >= 6 {
        ensure(
            left <= PE_PER_MAP,
            "number of extents",
            LVM_HEADER_OFFSET + 0x6A,
            left,
            Expected::AtMost(PE_PER_MAP),
        )?;
        return load_map(member, device, lvm6::PE_TABLE, left, out).await;
    }
    let (mut base, mut maps) = (LVM_HEADER_OFFSET, u64::from(member.header.pe_maps.get()).max(1));
    let mut next = member.header.next_extended.get();
    loop {
        ensure(
            maps <= lvm5::MAPS_MAX.into(),
            "extent maps of a region",
            base,
            maps,
            Expected::AtMost(lvm5::MAPS_MAX.into()),
        )?;
        for map in 0..maps {
            let table = base - LVM_HEADER_OFFSET + lvm5::PE_TABLE + map * lvm5::MAP_STEP;
            let count = left.min(PE_PER_MAP);
            left -= count;
            load_map(member, device, table, count, out).await?;
        }
        if next == 0 || left == 0 {
            return Ok(());
        }
        // Regions only go forward, in fixed steps: a chain cannot run in a circle.
        ensure(
            next >= base.saturating_add(EXTENDED_STEP),
            "offset of extended metadata",
            base,
            next,
            Expected::AtLeast(base.saturating_add(EXTENDED_STEP)),
        )?;
        let raw = read_device(&*member.device, next, 512).await?;
        let Some(header) = view::<ExtendedHeader>(&raw) else { return Err(Error::NotVmfs) };
        let magic = header.magic.get();
        ensure(
            magic == LVM_MAGIC,
            "extended metadata magic",
            next,
            magic.into(),
            Expected::Value(LVM_MAGIC.into()),
        )?;
        (base, maps, next) = (next, header.pe_maps.get().into(), header.next.get());
    }
}

/// Reads `count` entries of one extent table and appends those in use, joining neighbours at once.
async fn load_map(
    member: &Member,
    device: usize,
    table: u64,
    count: u64,
    out: &mut Vec<Piece>,
) -> Result<(), Error> {
    const CHUNK: u64 = 1024;
    let limit = member.device.shape().bytes();
    for first in (0..count).step_by(CHUNK as usize) {
        let entries = CHUNK.min(count - first);
        let bytes = (entries * PE_ENTRY_BYTES).next_multiple_of(SECTOR_BYTES);
        let at = table + first * PE_ENTRY_BYTES;
        let raw = read_device(&*member.device, at, bytes as usize).await?;
        for index in 0..entries {
            let at = at + index * PE_ENTRY_BYTES;
            let Some(entry) = view::<PeEntry>(&raw[(index * PE_ENTRY_BYTES) as usize..]) else { break };
            if entry.used == 0 {
                continue;
            }
            let piece = Piece {
                volume: entry.volume_offset.get(),
                bytes: entry.bytes.get(),
                device,
                at: entry.device_offset.get(),
            };
            let fits = piece.at.checked_add(piece.bytes).is_some_and(|end| end <= limit);
            ensure(fits, "extent on the device", at + 9, piece.at, Expected::AtMost(limit))?;
            let whole = (piece.at | piece.bytes | piece.volume).is_multiple_of(4096) && piece.bytes > 0;
            ensure(whole, "extent boundaries", at + 9, piece.bytes, Expected::Words("multiples of 4096"))?;
            let end = piece.volume.checked_add(piece.bytes);
            ensure(
                end.is_some_and(|end| end <= member.volume.volume_bytes.get()),
                "extent in the volume",
                at + 17,
                piece.volume,
                Expected::AtMost(member.volume.volume_bytes.get()),
            )?;
            match out.last_mut() {
                Some(last)
                    if last.device == device
                        && last.volume + last.bytes == piece.volume
                        && last.at + last.bytes == piece.at =>
                {
                    last.bytes += piece.bytes;
                }
                _ => out.push(piece),
            }
        }
    }
    Ok(())
}

/// Sorts the pieces and proves that they cover the volume without overlap or gap.
fn join(mut pieces: Vec<Piece>, bytes: u64) -> Result<Vec<Piece>, Corrupt> {
    pieces.sort_by_key(|p| p.volume);
    let mut end = 0;
    for piece in &pieces {
        ensure(
            piece.volume == end,
            "extents of the volume (overlapping or missing)",
            piece.at,
            piece.volume,
            Expected::Value(end),
        )?;
        end += piece.bytes;
    }
    ensure(end == bytes, "extents of the volume (missing at the end)", 0, end, Expected::Value(bytes))?;
    Ok(pieces)
}
