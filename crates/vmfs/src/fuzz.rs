//! VMFS under fuzz: a small good volume whose metadata is edited, then checked, walked, repaired and written. Used by the
//! tests and by fuzz targets. Whatever the bytes are, nothing may panic, run off the device or go on for ever.

use crate::format::{
    Address, FdAddress, FdMeta, FsDescriptor, InodeKind, LockBlock, LockKind, LvmHeader, RdmRecord,
    ResourceGeometry, ResourceHeader, directory6, view,
};
use crate::{Content, Error, Layout, Mode, NewFile, NewVolume, Rdm, Volume, check, create};
use block::fuzz::edits;
use block::{Disk, Image, MemoryDisk, SECTOR_BYTES, Safe, Sector, Segments, SegmentsMut};
use std::cell::OnceCell;
use std::rc::Rc;
use std::time::{Duration, UNIX_EPOCH};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A good volume with something of everything, and where its metadata lies.
#[derive(Clone)]
pub struct Template {
    /// The volume.
    pub image: Image,
    /// Sectors with something in them: few that are all different, and thousands of cluster headers and heartbeats.
    pub sectors: [Vec<u64>; 2],
}

impl Template {
    /// Makes one.
    pub async fn new() -> Result<Self, Error> {
        let disk = Rc::new(MemoryDisk::new(768 * MIB / SECTOR_BYTES));
        let new = NewVolume::new("fuzz", 1, UNIX_EPOCH + Duration::from_secs(1_760_000_000));
        let made = create(vec![disk.clone()], &new).await;
        made.map_err(|error| Error::ReadOnly { why: error.to_string() })?;
        let volume = Volume::open(vec![disk.clone()], Mode::Write).await?;
        populate(&volume).await?;
        volume.close().await?;
        let sectors = metadata(&disk).await?;
        Ok(Self { image: disk.image(), sectors })
    }
}

async fn populate(volume: &Volume) -> Result<(), Error> {
    volume.make_directory("vm").await?;
    volume.write_file("vm/resident", &[1; 900]).await?;
    volume.write_file("vm/sub", &[2; 5000]).await?;
    volume.write_file("vm/block", &[3; 90_000]).await?;
    volume.make_symlink("link", "vm/sub").await?;
    for (path, length) in [("vm/single", 69 * GIB), ("vm/double", 42 << 40), ("vm/direct", 200 * MIB)] {
        let file = volume.create_file(path, NewFile { length, layout: Layout::Thin, grows_to: 0 }).await?;
        let allocation = file.allocate(Sector(length / SECTOR_BYTES - 9), 8).await?;
        allocation.commit()?;
    }
    let rdm = Rdm { record: RdmRecord::naa([6; 16], b"KAGAMI"), length: GIB, tail: vec![5; 99] };
    volume.create_rdm("vm/rdm", &rdm).await
}

async fn metadata(disk: &MemoryDisk) -> Result<[Vec<u64>; 2], Error> {
    let mut list = [Vec::new(), Vec::new()];
    let mut header_follows = false;
    let mut bytes = [0; 512];
    // File data begins behind the system files.
    for sector in 0..80 * MIB / SECTOR_BYTES {
        disk.read(Sector(sector), &SegmentsMut::new(&mut bytes)).await?;
        let header = bytes[1..4] == [0, 0xC0, 0x10] && bytes[0] != 1;
        let common =
            header || std::mem::replace(&mut header_follows, header) || bytes[1..4] == [0xEF, 0xCD, 0xAB];
        if bytes.iter().any(|b| *b != 0) {
            list[usize::from(!common)].push(sector);
        }
    }
    Ok(list)
}

/// Uses whatever is on the disk: reads it, checks and repairs it, changes it. Answers whether it could be opened to be
/// read, and whether every change was made.
pub async fn use_volume(disk: &Rc<MemoryDisk>) -> (bool, bool) {
    let opened = match Volume::open(vec![disk.clone()], Mode::Read).await {
        Ok(volume) => walk(&volume).await.is_ok(),
        Err(_) => false,
    };
    let written = match Volume::open(vec![disk.clone()], Mode::Write).await {
        Ok(volume) => change(&volume).await.is_ok(),
        Err(_) => false,
    };
    (opened, written)
}

/// Everything that can be read is read, as far as it goes.
async fn walk(volume: &Volume) -> Result<(), Error> {
    let mut folders = vec![String::new()];
    let mut visited = 0;
    while let Some(folder) = folders.pop() {
        let Ok(list) = volume.list(&folder).await else { continue };
        for entry in list {
            visited += 1;
            if visited > 500 {
                return Ok(());
            }
            let path = format!("{folder}/{}", entry.name);
            match entry.kind {
                InodeKind::Directory => folders.push(path),
                InodeKind::Symlink => drop(volume.read_link(&path).await),
                InodeKind::Rdm => drop(volume.read_rdm(&path).await),
                InodeKind::File | InodeKind::System => drop(look_at(volume, &path).await),
            }
        }
    }
    Ok(())
}

async fn look_at(volume: &Volume, path: &str) -> Result<(), Error> {
    let file = volume.open_file(path).await?;
    let sectors = file.length().div_ceil(SECTOR_BYTES);
    let mut at = 0;
    for _ in 0..50 {
        let places = file.locate(Sector(at), sectors.saturating_sub(at), 64).await?;
        let Some(last) = places.last() else { break };
        at = last.at.0 + last.count;
        for place in &places {
            if let Content::Data { device, at } = place.content {
                let shape = volume.space().devices()[device].shape();
                assert!(at.0 + place.count <= shape.sectors, "{path} leads off the device");
            }
        }
    }
    let mut bytes = vec![0; 70_000];
    file.read_bytes(file.length().saturating_sub(60_000), &mut bytes).await?;
    Ok(())
}

async fn change(volume: &Volume) -> Result<(), Error> {
    // Each may fail; none may panic.
    let _ = volume.make_directory("new").await;
    let _ = volume.write_file("new/file", &[1; 3000]).await;
    let _ = volume.rename("vm/sub", "vm/resident").await;
    let _ = volume.rename("new", "vm/new").await;
    if let Ok(file) = volume.open_file("vm/single").await {
        if let Ok(allocation) = file.allocate(Sector(5), 8).await {
            let _ = allocation.commit();
        }
        if let Ok(released) = file.release(Sector(0), 64 * MIB / SECTOR_BYTES).await {
            let _ = released.finish();
        }
        let _ = file.set_length(300).await;
        let _ = file.flush().await;
    }
    for path in ["vm/double", "vm/direct", "vm/block", "vm/rdm", "link", "new/file", "new", "vm/new"] {
        let _ = volume.remove(path).await;
    }
    volume.close().await
}

thread_local! {
    static TEMPLATE: OnceCell<Option<Template>> = const { OnceCell::new() };
}

/// Applies the edits of an input ([`block::fuzz::edits`]) to a good volume and uses what comes of it. An even place is
/// one of the sectors that are all different, an odd one a cluster header or a heartbeat.
pub fn fuzz_volume(input: &[u8]) {
    lane::block_on(async {
        let known = TEMPLATE.with(|template| template.get().cloned());
        let template = match known {
            Some(template) => template,
            None => {
                let made = Template::new().await.ok();
                TEMPLATE.with(|template| template.get_or_init(|| made).clone())
            }
        };
        let Some(template) = template else { panic!("no good volume could be made") };
        let disk = Rc::new(MemoryDisk::from(template.image));
        for edit in edits(input) {
            let list = &template.sectors[usize::from(edit.place % 2)];
            let sector = Sector(list[usize::from(edit.place / 2) % list.len()]);
            let mut bytes = [0; 512];
            let read = disk.read(sector, &SegmentsMut::new(&mut bytes)).await;
            edit.apply(&mut bytes);
            let written = disk.write(sector, &Segments::new(&bytes), Safe::AtNextFlush).await;
            assert!(read.is_ok() && written.is_ok(), "memory does not fail");
        }
        let options = check::Options { repair_leaks: true, mapping: None };
        if let Ok(report) = check::check(vec![disk.clone()], options).await
            && !report.repaired.is_empty()
        {
            assert!(report.is_clean() || report.cut_short, "not repaired: {:#?}", report.findings());
        }
        use_volume(&disk).await;
    });
}

/// Reads hostile bytes as each structure; what decodes encodes to the same.
pub fn fuzz_structures(input: &[u8]) {
    if let Some(header) = view::<LvmHeader>(input) {
        let _ = header.check(0);
        let _ = header.volume_descriptor_offset();
    }
    if let Some(fs) = view::<FsDescriptor>(input) {
        let _ = (fs.check(), fs.version(), fs.metadata_bytes(), fs.label_text());
    }
    if let Some(header) = view::<ResourceHeader>(input) {
        for metadata_bytes in [512, 4096] {
            let Ok(geometry) = ResourceGeometry::load(header, metadata_bytes, 0) else { continue };
            let clusters = geometry.clusters();
            for cluster in [0, 1, clusters / 2, clusters.saturating_sub(1), clusters, u64::MAX] {
                let _ = (geometry.header_offset(cluster), geometry.resource_offset(cluster, 3));
            }
            let _ = (geometry.groups(), geometry.group_bytes(), geometry.file_bytes());
        }
    }
    if let Some(lock) = view::<LockBlock>(input) {
        let _ = lock.check(LockKind::Descriptor, lock.offset.get());
    }
    if let Some(meta) = view::<FdMeta>(input) {
        let _ = (meta.check(FdAddress(meta.address.get()), 0), meta.tbz());
    }
    if let Some(record) = view::<RdmRecord>(input) {
        let _ = (record.check(0), record.id_text());
    }
    let _ = crate::directory::entries5(&input[..input.len() / 140 * 140], 0);
    for raw in input.as_chunks::<8>().0.iter().take(64).map(|raw| u64::from_le_bytes(*raw)) {
        let _ = directory6::location(raw as u32);
        if let Some(address) = Address::decode32(raw as u32)
            && let Some(again) = address.encode32()
        {
            assert_eq!(Address::decode32(again), Some(address), "{raw:#x}");
        }
        if let Some(address) = Address::decode64(raw)
            && let Some(again) = address.encode64()
        {
            assert_eq!(Address::decode64(again), Some(address), "{raw:#x}");
        }
    }
}
