//! Makes a VMFS-5: on one device or several, from 768 MiB to 16 TiB each.
//!
//! Order of writes: what made an older volume recognisable is wiped; everything but the two headers is written; then
//! the file system descriptor; then the LVM headers, the first device's last. There is a flush between each of the
//! steps, so a power loss before the last write leaves devices that are not a volume, never half of one.
//!
//! docs/formats/vmfs.md says where each value comes from.

mod existing;
mod geometry;
mod metadata;
mod tables;

use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use block::{Disk, DiskError, SECTOR_BYTES, Safe, Sector, Segments};
use zerocopy::IntoBytes;

use crate::format::{
    DATA_OFFSET, FS_DESCRIPTOR_OFFSET, HEARTBEAT_OFFSET, LVM_HEADER_OFFSET, LockKind, PE_BYTES_5, PE_PER_MAP,
    RdmRecord, SystemFile, VmfsUuid, lvm5,
};
pub use existing::{Existing, existing_content};
pub use geometry::{Geometry, Run, Tuning};
use tables::{Share, extents_of};

/// Devices a volume may have.
const DEVICES_MAX: usize = 32;
/// Bytes of a label at most; the field has one more for its end.
pub const LABEL_MAX: usize = 127;
/// Backup partition tables lie in the last sectors of a device.
const TAIL_SECTORS: u64 = 34;

/// What a device is called, inside of the volume's tables.
#[derive(Clone, Debug)]
pub struct DeviceIdentity {
    /// Identity of this device as a part of volumes.
    pub uuid: VmfsUuid,
    /// Its SCSI identity.
    pub scsi: RdmRecord,
    /// Name and partition, such as `naa.6024b47...:1`; at most 255 bytes are kept.
    pub name: String,
}

impl DeviceIdentity {
    /// A device known by its NAA designator.
    pub fn naa(naa: [u8; 16], product: &[u8], uuid: VmfsUuid) -> Self {
        let scsi = RdmRecord::naa(naa, product);
        let name = format!("{}:1", scsi.id_text());
        Self { uuid, scsi, name }
    }
}

/// All times that go into a fresh volume.
#[derive(Copy, Clone, Debug)]
pub struct Stamps {
    /// Device header, creation (microseconds since 1970).
    pub device_created_us: u64,
    /// Device header, last change.
    pub device_modified_us: u64,
    /// Volume descriptor, creation.
    pub volume_created_us: u64,
    /// Volume descriptor, last change.
    pub volume_modified_us: u64,
    /// File system and system files (seconds since 1970).
    pub created_s: u32,
}

impl Stamps {
    /// Everything at one moment. Seconds that do not fit 32 bits (after 2106) are cut off at the largest.
    pub fn at(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let us = u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
        Self {
            device_created_us: us,
            device_modified_us: us,
            volume_created_us: us,
            volume_modified_us: us,
            created_s: u32::try_from(since.as_secs()).unwrap_or(u32::MAX),
        }
    }
}

/// What to make. Everything that two runs could choose differently is here, so a test can make the same bytes twice.
#[derive(Clone, Debug)]
pub struct NewVolume {
    /// VMFS version: 5.
    pub version: u8,
    /// Name of the datastore: UTF-8 without `/` and NUL, 1 to [`LABEL_MAX`] bytes.
    pub label: String,
    /// Bytes of a file block: 1 MiB, or 512 KiB as ESXi does on small volumes made with special options.
    pub block_bytes: u64,
    /// Sub-block size and number of pointer blocks.
    pub tuning: Tuning,
    /// Host that formats.
    pub host: VmfsUuid,
    /// Identity of the logical volume.
    pub volume_uuid: VmfsUuid,
    /// Identity of the file system.
    pub file_system_uuid: VmfsUuid,
    /// One for each device, in their order.
    pub devices: Vec<DeviceIdentity>,
    /// Times.
    pub stamps: Stamps,
    /// First value of the host's lock clock; consecutive values follow.
    pub first_clock: u64,
    /// Format even over something recognised.
    pub force: bool,
}

impl NewVolume {
    /// A VMFS-5 with 1 MiB blocks and fresh random identities. The devices are called after their identities; give
    /// `devices` their SCSI identities where they have any.
    pub fn new(label: &str, devices: usize, now: SystemTime) -> Self {
        let stamps = Stamps::at(now);
        let fresh = || fresh_uuid(stamps.created_s);
        let device = || {
            let uuid = fresh();
            let scsi = RdmRecord::serial(uuid.0.map(|b| format!("{b:02x}")).concat().as_bytes(), b"kagami");
            DeviceIdentity { uuid, scsi, name: format!("kagami.{uuid}:1") }
        };
        Self {
            version: 5,
            label: label.to_string(),
            block_bytes: 1 << 20,
            tuning: Tuning::default(),
            host: fresh(),
            volume_uuid: fresh(),
            file_system_uuid: fresh(),
            devices: (0..devices).map(|_| device()).collect(),
            stamps,
            first_clock: 1,
            force: false,
        }
    }
}

/// A new identity of VMFS form: seconds, random, and a locally administered address of ours.
pub fn fresh_uuid(seconds: u32) -> VmfsUuid {
    let random = uuid::Uuid::new_v4().into_bytes();
    let [a, b, c, d, e, f, _, _, _, g, h, i, ..] = random;
    VmfsUuid::new(
        seconds,
        u32::from_le_bytes([a, b, c, d]),
        u16::from_le_bytes([e, f]),
        [2, 0x4B, 0x47, g, h, i],
    )
}

/// Why a volume was not made.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CreateError {
    /// There is something on a device. Nothing was changed.
    #[error("device {device} holds {found}; use force to overwrite it")]
    Occupied {
        /// Index of the device.
        device: usize,
        /// What was recognised.
        found: Existing,
    },
    /// The devices together, or one of them, have too little room.
    #[error(
        "device {device} of {bytes} bytes is too small: a VMFS-5 needs 768 MiB, each further device 273 MiB"
    )]
    TooSmall {
        /// Index of the device.
        device: usize,
        /// Its length.
        bytes: u64,
    },
    /// More than one region of extent tables would be needed, or more blocks than an address can name.
    #[error("device {device} of {bytes} bytes is too large: at most 16 TiB")]
    TooLarge {
        /// Index of the device.
        device: usize,
        /// Its length.
        bytes: u64,
    },
    /// Not one identity for each device, or not 1 to 32 devices.
    #[error("{devices} devices with {identities} identities: one for each of 1 to 32 devices is needed")]
    Devices {
        /// Number of devices.
        devices: usize,
        /// Number of identities.
        identities: usize,
    },
    /// The label is empty, too long, or has `/` or NUL in it.
    #[error("the label {0:?} is not 1 to 127 bytes without slash")]
    Label(String),
    /// Only VMFS-5 is made.
    #[error("VMFS-{0} cannot be created, only VMFS-5")]
    Version(u8),
    /// Neither 1 MiB nor 512 KiB.
    #[error("a block size of {0} bytes is not possible: 1 MiB or 512 KiB")]
    BlockSize(u64),
    /// A device failed. What is on the devices is not a volume.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// What was made.
#[derive(Clone, Debug)]
pub struct Created {
    /// Identity of the logical volume.
    pub volume_uuid: VmfsUuid,
    /// Identity of the file system.
    pub file_system_uuid: VmfsUuid,
    /// Length of the volume in bytes.
    pub bytes: u64,
    /// Counts and places.
    pub geometry: Geometry,
}

/// Makes a volume on `devices`. The caller holds them exclusively.
///
/// # Errors
/// See [`CreateError`]; unless it is `Disk`, nothing was written.
pub async fn create(devices: Vec<Rc<dyn Disk>>, new: &NewVolume) -> Result<Created, CreateError> {
    let (shares, geometry) = plan(&devices, new)?;
    if !new.force {
        for (device, disk) in devices.iter().enumerate() {
            if let Some(found) = existing_content(disk).await? {
                return Err(CreateError::Occupied { device, found });
            }
        }
    }
    let span = Span { devices: &devices, shares: &shares };
    let extents = shares.iter().map(|share| share.extents).sum();

    span.forget().await?;
    span.flush().await?;

    span.zero(0, u64::from(geometry.used_blocks) * geometry.block_bytes).await?;
    span.write_tables(new, extents).await?;
    write_metadata(&span, new, &geometry).await?;
    span.flush().await?;

    span.write(FS_DESCRIPTOR_OFFSET, metadata::descriptor(new, &geometry).as_bytes()).await?;
    span.flush().await?;

    for (index, share) in shares.iter().enumerate().rev() {
        let header = tables::header(new, &new.devices[index], share);
        write(&devices[index], LVM_HEADER_OFFSET, header.as_bytes()).await?;
        devices[index].flush().await?;
    }
    tracing::info!(volume = %new.volume_uuid, label = new.label, extents, "VMFS-5 created");
    let (volume_uuid, file_system_uuid) = (new.volume_uuid, new.file_system_uuid);
    Ok(Created { volume_uuid, file_system_uuid, bytes: extents * PE_BYTES_5, geometry })
}

fn plan(devices: &[Rc<dyn Disk>], new: &NewVolume) -> Result<(Vec<Share>, Geometry), CreateError> {
    if new.version != 5 {
        return Err(CreateError::Version(new.version));
    }
    if !matches!(new.block_bytes, 0x8_0000 | 0x10_0000) {
        return Err(CreateError::BlockSize(new.block_bytes));
    }
    let label = &new.label;
    if label.is_empty() || label.len() > LABEL_MAX || label.contains(['/', '\0']) {
        return Err(CreateError::Label(label.clone()));
    }
    let identities = new.devices.len();
    if !(1..=DEVICES_MAX).contains(&devices.len()) || identities != devices.len() {
        return Err(CreateError::Devices { devices: devices.len(), identities });
    }
    let mut first = 0;
    let mut shares = Vec::with_capacity(identities);
    for (device, disk) in devices.iter().enumerate() {
        let bytes = disk.shape().bytes();
        let extents = extents_of(bytes);
        if extents == 0 {
            return Err(CreateError::TooSmall { device, bytes });
        }
        if extents > u64::from(lvm5::MAPS_MAX) * PE_PER_MAP {
            return Err(CreateError::TooLarge { device, bytes });
        }
        shares.push(Share { device_bytes: bytes, first, extents });
        first += extents;
    }
    let bytes = shares[0].device_bytes;
    let geometry = Geometry::new(first, new.block_bytes, new.tuning).ok_or(if first < 8 {
        CreateError::TooSmall { device: 0, bytes }
    } else {
        CreateError::TooLarge { device: 0, bytes }
    })?;
    Ok((shares, geometry))
}

async fn write_metadata(span: &Span<'_>, new: &NewVolume, geometry: &Geometry) -> Result<(), DiskError> {
    let clocks = metadata::first_clocks(geometry, new.first_clock);
    let kinds = [
        (SystemFile::FileBlocks, LockKind::FileBlocks),
        (SystemFile::Descriptors, LockKind::Descriptors),
        (SystemFile::PointerBlocks, LockKind::PointerBlocks),
        (SystemFile::SubBlocks, LockKind::SubBlocks),
        (SystemFile::PointerBlocks2, LockKind::PointerBlocks2),
    ];
    for (file, kind) in kinds {
        let Some(resources) = geometry.resources(file) else { continue };
        let mut header = [0; 512];
        header[..0x20].copy_from_slice(resources.header().as_bytes());
        span.write(geometry.place(file, 0), &header).await?;
        for group in 0..resources.groups() {
            let clock = clocks[file as usize] + 1;
            let Some(bytes) = metadata::group(geometry, file, kind, group, clock) else { continue };
            // A group's headers may cross from one block to the next, and blocks of a file need not be neighbours.
            let at = resources.header_offset(group * u64::from(resources.per_group));
            let mut at = at.unwrap_or_else(|| unreachable!("a group has a first cluster"));
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let room = geometry.block_bytes - at % geometry.block_bytes;
                let (head, tail) = rest.split_at(rest.len().min(room as usize));
                span.write(geometry.place(file, at), head).await?;
                at += head.len() as u64;
                rest = tail;
            }
        }
    }
    let descriptors =
        geometry.fdc.resource_offset(0, 0).unwrap_or_else(|| unreachable!("there is a first one"));
    let bytes = metadata::system_descriptors(new, geometry, &clocks);
    span.write(geometry.place(SystemFile::Descriptors, descriptors), &bytes).await?;
    let (root, data) = metadata::directories();
    span.write(geometry.place(SystemFile::Root, 0), &root).await?;
    span.write(geometry.place(SystemFile::SystemData, 0), &data).await?;
    span.write(HEARTBEAT_OFFSET, &metadata::heartbeats()).await
}

/// The devices as one volume, for writing.
struct Span<'a> {
    devices: &'a [Rc<dyn Disk>],
    shares: &'a [Share],
}

impl Span<'_> {
    /// Wipes what old headers, tables and signatures there may be.
    async fn forget(&self) -> Result<(), DiskError> {
        for (disk, share) in self.devices.iter().zip(self.shares) {
            disk.zero(Sector(0), DATA_OFFSET / SECTOR_BYTES, true).await?;
            let tail = share.device_bytes / SECTOR_BYTES - TAIL_SECTORS;
            disk.zero(Sector(tail), TAIL_SECTORS, true).await?;
        }
        Ok(())
    }

    async fn write_tables(&self, new: &NewVolume, extents: u64) -> Result<(), DiskError> {
        for (disk, share) in self.devices.iter().zip(self.shares) {
            let volume = tables::volume(new, share, extents, self.devices.len());
            write(disk, lvm5::VOLUME, volume.as_bytes()).await?;
            for map in 0..share.extents.div_ceil(PE_PER_MAP) {
                let (at, bytes) = tables::map(share, map);
                write(disk, at, &bytes).await?;
            }
        }
        write(&self.devices[0], lvm5::NAMES, &tables::names(&new.devices)).await
    }

    /// Calls for each device that holds a part of the range: device, offset on it, bytes.
    fn pieces(&self, at: u64, length: u64) -> impl Iterator<Item = (&Rc<dyn Disk>, u64, u64)> {
        let parts = self.devices.iter().zip(self.shares);
        parts.filter_map(move |(disk, share)| {
            let (start, end) = (share.first * PE_BYTES_5, (share.first + share.extents) * PE_BYTES_5);
            let (from, to) = (at.max(start), (at + length).min(end));
            (from < to).then(|| (disk, DATA_OFFSET + from - start, to - from))
        })
    }

    async fn zero(&self, at: u64, length: u64) -> Result<(), DiskError> {
        for (disk, at, bytes) in self.pieces(at, length) {
            disk.zero(Sector::at_byte(at), bytes / SECTOR_BYTES, true).await?;
        }
        Ok(())
    }

    async fn write(&self, at: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let mut rest = bytes;
        for (disk, at, count) in self.pieces(at, bytes.len() as u64) {
            let (head, tail) = rest.split_at(count as usize);
            write(disk, at, head).await?;
            rest = tail;
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), DiskError> {
        for disk in self.devices {
            disk.flush().await?;
        }
        Ok(())
    }
}

async fn write(disk: &Rc<dyn Disk>, at: u64, bytes: &[u8]) -> Result<(), DiskError> {
    disk.write(Sector::at_byte(at), &Segments::new(bytes), Safe::AtNextFlush).await
}
