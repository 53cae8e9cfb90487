//! What descriptors and LUNs say about the mappings of a datastore, for `vmfs::check`: the volume alone can only tell
//! whether a record is well formed.

use std::collections::BTreeMap;

use vmfs::check::MappingFault;
use vmfs::format::{FdAddress, InodeKind};
use vmfs::{Entry, Volume};

use super::{
    Copies, Identity, IdentityError, LunIdentity, Mapping, Mode, Place, Resolution, VisibleLun, What, resolve,
};
use crate::descriptor::{Descriptor, ExtentKind};
use crate::folder::sibling;

/// Directories within each other that are looked into.
const DEPTH_MAX: usize = 32;
/// Descriptors are small; what is longer is a disk.
const DESCRIPTOR_BYTES_MAX: u64 = 64 << 10;

/// What is known of the mappings of one volume.
#[derive(Default)]
pub struct Facts {
    by_fd: BTreeMap<FdAddress, Fact>,
}

/// What is known beside the volume.
#[derive(Copy, Clone)]
pub struct Around<'a> {
    /// The LUNs that can be seen.
    pub visible: &'a [VisibleLun],
    /// The third copy (R7): the LUN that says it is mapped by the descriptor of this path, and the mode noted there.
    pub claim: &'a dyn Fn(&str) -> Option<(LunIdentity, Mode)>,
}

impl Around<'_> {
    /// Nothing: the volume alone.
    pub const NOTHING: Around<'static> = Around { visible: &[], claim: &|_| None };
}

/// A mapping as its descriptor tells it.
struct Fact {
    path: String,
    sectors: u64,
    mode: Mode,
    identity: Result<Identity, IdentityError>,
    /// Our own record behind the genuine one in the inode.
    tail: Vec<u8>,
}

impl Facts {
    /// Reads all descriptors of mappings. The volume may be damaged: what cannot be read tells nothing.
    pub async fn collect(volume: &Volume) -> Self {
        let mut facts = Self::default();
        let mut ahead = vec![(String::from("/"), 0)];
        while let Some((directory, depth)) = ahead.pop() {
            let Ok(entries) = volume.list(&directory).await else { continue };
            for entry in entries.iter().filter(|entry| entry.name != "." && entry.name != "..") {
                let path = format!("{}/{}", directory.trim_end_matches('/'), entry.name);
                if entry.kind == InodeKind::Directory && depth < DEPTH_MAX {
                    ahead.push((path, depth + 1));
                } else if may_be_descriptor(entry)
                    && let Some((fd, fact)) = read_fact(volume, path).await
                {
                    facts.by_fd.insert(fd, fact);
                }
            }
        }
        facts
    }

    /// Holds a mapping's record against its descriptor, and against claim and LUN when those are known. A LUN that
    /// cannot be seen, or that grew, is no fault of the record.
    pub fn judge(&self, mapping: &vmfs::check::Mapping, around: Around<'_>) -> Option<MappingFault> {
        let fact = self.by_fd.get(&mapping.fd)?;
        let told = fact.sectors.saturating_mul(block::SECTOR_BYTES);
        if mapping.length_bytes != told {
            let found = format!("{} bytes", mapping.length_bytes);
            return Some(MappingFault { found, expected: format!("{told} bytes, as {} says", fact.path) });
        }
        let (record, length_bytes) = (mapping.record, mapping.length_bytes);
        let inode = Mapping { record, length_bytes, tail: fact.tail.clone() }.identity(fact.mode);
        // A claim records no length: it tells that of the LUN as it is, which may have grown.
        let claim = (around.claim)(&fact.path).map(|(lun, mode)| {
            let sectors = inode.as_ref().map_or(lun.sectors, |i| i.lun.sectors.min(lun.sectors));
            (LunIdentity { sectors, ..lun }, mode)
        });
        let copies = Copies { inode: inode.clone(), descriptor: fact.identity.clone(), claim };
        for finding in copies.compare().findings {
            let found = match finding.what {
                What::Missing => continue,
                What::Damaged(error) | What::Newer(error) => error.to_string(),
                What::Differs(field) => format!("another {field}"),
            };
            let place = match finding.place {
                Place::Inode => "",
                Place::Descriptor => " in the descriptor",
                Place::Claim => " in the claim on the LUN",
            };
            let expected = format!("one identity of {} in all its places", fact.path);
            return Some(MappingFault { found: format!("{found}{place}"), expected });
        }
        let identity = inode.ok()?;
        // A mapping made by others has no identity but what this very record tells.
        if Identity::from_record(&fact.tail).is_ok()
            && let Ok(whole) = Mapping::new(&identity)
            && whole.record.id != mapping.record.id
        {
            let found = format!("SCSI id {}", mapping.record.id_text());
            return Some(MappingFault { found, expected: format!("that of {}", identity.lun.display()) });
        }
        let (found, lun) = match resolve(&identity, around.visible) {
            Resolution::Resolved(_) | Resolution::Larger(_) | Resolution::Missing(_) => return None,
            Resolution::Smaller(lun) => (format!("{} sectors", identity.lun.sectors), lun),
            Resolution::BlockSize(lun) => (format!("blocks of {} bytes", identity.lun.logical_block), lun),
            Resolution::Ambiguous(luns) => {
                let names: Vec<&str> = luns.iter().map(|lun| &lun.name[..]).collect();
                return Some(MappingFault { found: names.join(" and "), expected: "one LUN".into() });
            }
        };
        let (sectors, block) = (lun.identity.sectors, lun.identity.logical_block);
        let expected = format!("LUN {} has {sectors} sectors in blocks of {block} bytes", lun.name);
        Some(MappingFault { found, expected })
    }
}

fn may_be_descriptor(entry: &Entry) -> bool {
    entry.kind == InodeKind::File && entry.name.ends_with(".vmdk") && entry.length <= DESCRIPTOR_BYTES_MAX
}

async fn read_fact(volume: &Volume, path: String) -> Option<(FdAddress, Fact)> {
    let text = volume.read_file(&path, DESCRIPTOR_BYTES_MAX).await.ok()?;
    let descriptor = Descriptor::parse(&text).ok()?;
    let mode = Mode::of(descriptor.create_type())?;
    let [extent] = descriptor.extents() else { return None };
    if extent.kind != ExtentKind::VmfsRdm {
        return None;
    }
    let file = sibling(&path, &extent.file).ok()?;
    let fd = volume.entry(&file).await.ok().filter(|entry| entry.kind == InodeKind::Rdm)?.fd;
    let tail = volume.read_rdm(&file).await.ok()?.tail;
    let identity = Identity::from_ddb(&descriptor);
    Some((fd, Fact { path, sectors: extent.sectors, mode, identity, tail }))
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;
    use std::time::{Duration, UNIX_EPOCH};

    use block::{Disk, MemoryDisk, SECTOR_BYTES};
    use vmfs::check::{Options, Report, What};
    use vmfs::{NewVolume, check, create};

    use super::*;
    use crate::{Folder, VmfsFolder};

    const SECTORS: u64 = 1 << 20;

    fn lun(serial: &[u8]) -> LunIdentity {
        LunIdentity {
            naa: vec![0x60; 16],
            serial: serial.to_vec(),
            sectors: SECTORS,
            logical_block: 512,
            physical_block: 4096,
            ..LunIdentity::default()
        }
    }

    async fn datastore(change: impl AsyncFnOnce(&Volume)) -> Rc<MemoryDisk> {
        let disk = Rc::new(MemoryDisk::new((1 << 30) / SECTOR_BYTES));
        let new = NewVolume::new("facts", 1, UNIX_EPOCH + Duration::from_secs(1_760_000_000));
        create(vec![disk.clone()], &new).await.unwrap();
        let volume = Volume::open(vec![disk.clone()], vmfs::Mode::Write).await.unwrap();
        let folder: Rc<dyn Folder> = VmfsFolder::new(volume.clone());
        volume.make_directory("/vm").await.unwrap();
        crate::create::create_rdm(&folder, "/vm/data.vmdk", &lun(b"S1"), Mode::Virtual).await.unwrap();
        change(&volume).await;
        volume.settle().await.unwrap();
        disk
    }

    async fn look(disk: Rc<MemoryDisk>, visible: &[VisibleLun]) -> Report {
        look_around(disk, Around { visible, claim: &|_| None }).await
    }

    /// The LUN that claims to be mapped by the datastore's one descriptor: the right one has serial number S1.
    fn claim(path: &str, serial: &[u8]) -> Option<(LunIdentity, Mode)> {
        assert_eq!(path, "/vm/data.vmdk");
        let naa = if serial == b"S1" { vec![0x60; 16] } else { vec![0x61; 16] };
        Some((LunIdentity { naa, ..lun(serial) }, Mode::Virtual))
    }

    async fn look_around(disk: Rc<MemoryDisk>, around: Around<'_>) -> Report {
        let volume = Volume::open(vec![disk.clone()], vmfs::Mode::Read).await.unwrap();
        let facts = Facts::collect(&volume).await;
        assert_eq!(facts.by_fd.len(), 1);
        let judge = |mapping: &vmfs::check::Mapping| facts.judge(mapping, around);
        check(vec![disk], Options { repair_leaks: false, mapping: Some(&judge) }).await.unwrap()
    }

    fn seen(name: &str, unit: u64, sectors: u64) -> VisibleLun {
        let disk: Rc<dyn Disk> = Rc::new(MemoryDisk::new(sectors));
        VisibleLun { unit, name: name.into(), identity: LunIdentity { sectors, ..lun(b"S1") }, disk }
    }

    fn faults(report: &Report) -> Vec<String> {
        let faults = report.findings().iter().filter(|finding| finding.what == What::MappingRecord);
        faults.map(ToString::to_string).collect()
    }

    #[test]
    fn a_mapping_is_held_against_its_descriptor_and_its_lun() {
        lane::block_on(async {
            let disk = datastore(async |_| ()).await;
            let clean = look(disk.clone(), &[seen("lun", 1, SECTORS)]).await;
            assert!(clean.is_clean() && clean.totals.mappings == 1, "{:?}", clean.findings());
            assert!(look(disk.clone(), &[]).await.is_clean(), "a LUN out of sight is no fault");
            assert!(look(disk.clone(), &[seen("lun", 1, SECTORS * 2)]).await.is_clean(), "nor one that grew");
            let shrunk = faults(&look(disk.clone(), &[seen("lun", 1, SECTORS / 2)]).await);
            assert!(shrunk.len() == 1 && shrunk[0].contains("LUN lun has 524288 sectors"), "{shrunk:?}");
            let claimed =
                look_around(disk.clone(), Around { visible: &[], claim: &|path| claim(path, b"S1") });
            assert!(claimed.await.is_clean());
            let grown = |path: &str| {
                claim(path, b"S1").map(|(l, m)| (LunIdentity { sectors: l.sectors * 2, ..l }, m))
            };
            let grown = look_around(disk.clone(), Around { visible: &[], claim: &grown });
            assert!(grown.await.is_clean(), "nor is one that grew under its claim");
            let other = look_around(disk.clone(), Around { visible: &[], claim: &|path| claim(path, b"S2") });
            let other = faults(&other.await);
            assert!(other.len() == 1 && other[0].contains("another LUN in the claim"), "{other:?}");
            let twice = faults(&look(disk, &[seen("a", 1, SECTORS), seen("b", 2, SECTORS)]).await);
            assert!(twice.len() == 1 && twice[0].contains("a and b"), "{twice:?}");
        });
    }

    #[test]
    fn a_record_that_its_descriptor_contradicts_is_found() {
        lane::block_on(async {
            let path = "/vm/data-rdm.vmdk";
            let longer = datastore(async |volume| {
                let mut rdm = volume.read_rdm(path).await.unwrap();
                rdm.length *= 2;
                volume.replace_rdm(path, &rdm).await.unwrap();
            });
            let longer = faults(&look(longer.await, &[]).await);
            assert!(longer.len() == 1 && longer[0].contains("as /vm/data.vmdk says"), "{longer:?}");
            let other = datastore(async |volume| {
                let mut rdm = volume.read_rdm(path).await.unwrap();
                rdm.record = vmfs::format::RdmRecord::naa([0x61; 16], b"");
                volume.replace_rdm(path, &rdm).await.unwrap();
            });
            let other = faults(&look(other.await, &[]).await);
            assert!(other.len() == 1 && other[0].contains("SCSI id"), "{other:?}");
            let torn = datastore(async |volume| {
                let mut rdm = volume.read_rdm(path).await.unwrap();
                rdm.tail[40] ^= 1;
                volume.replace_rdm(path, &rdm).await.unwrap();
            });
            let torn = faults(&look(torn.await, &[]).await);
            assert!(torn.len() == 1 && torn[0].contains("damaged"), "{torn:?}");
        });
    }
}
