//! Power fails while a mapping is changed: it opens as it was or as it was to be, and the same change ends it.

use block::crash::CrashLog;
use block::{Image, MemoryDisk};
use vmfs::Volume;

use super::datastore::{descriptor_of, dynamic, folder_on, fresh, lun};
use super::*;
use crate::create::{convert_rdm, create_rdm, grow_rdm, read_copies, remap_rdm};
use crate::rdm::{Copies, Identity, LunIdentity, Mode, VisibleLun};
use crate::{ChainError, VmfsFolder};

const PATH: &str = "/vm/d.vmdk";
const SMALL: u64 = 4096;
const LARGE: u64 = 1 << 20;

#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Change {
    Convert,
    Grow,
    /// To another LUN of the same length.
    Remap,
    /// To another LUN of another length.
    RemapLonger,
}

/// What a mapping says: mode, LUN, length.
type Said = (Mode, Vec<u8>, u64);

fn said(identity: &Identity) -> Said {
    (identity.mode, identity.lun.naa.clone(), identity.lun.sectors)
}

impl Change {
    async fn make(self, folder: &Rc<VmfsFolder>) -> Result<(), ChainError> {
        let folder = dynamic(folder);
        match self {
            Self::Convert => convert_rdm(&folder, PATH, Mode::Physical).await,
            Self::Grow => grow_rdm(&folder, PATH, &lun(1, LARGE).0).await,
            Self::Remap => remap_rdm(&folder, PATH, &lun(2, SMALL).0).await.map(drop),
            Self::RemapLonger => remap_rdm(&folder, PATH, &lun(3, LARGE).0).await.map(drop),
        }
    }

    fn wanted(self) -> Identity {
        let (mode, lun) = match self {
            Self::Convert => (Mode::Physical, lun(1, SMALL).0),
            Self::Grow => (Mode::Virtual, lun(1, LARGE).0),
            Self::Remap => (Mode::Virtual, lun(2, SMALL).0),
            Self::RemapLonger => (Mode::Virtual, lun(3, LARGE).0),
        };
        Identity { mode, lun }
    }

    /// The LUNs as they are: the first has grown where it is to be noted.
    fn luns(self) -> Vec<VisibleLun> {
        let first = if self == Self::Grow { LARGE } else { SMALL };
        vec![lun(1, first).1, lun(2, SMALL).1, lun(3, LARGE).1]
    }
}

async fn made() -> Image {
    let disk = fresh().await;
    let folder = folder_on(disk.clone()).await;
    folder.volume().make_directory("/vm").await.unwrap();
    create_rdm(&dynamic(&folder), PATH, &lun(1, SMALL).0, Mode::Virtual).await.unwrap();
    folder.volume().settle().await.unwrap();
    disk.image()
}

/// The mapping as it opens; its disk is as long as it says.
async fn opened(folder: &Rc<VmfsFolder>, change: Change) -> Result<Said, ChainError> {
    let disk = VmDisk::open(dynamic(folder), PATH, Open::WRITE, &change.luns()).await?;
    let (mode, identity) = disk.rdm().unwrap();
    assert_eq!((mode, disk.shape().sectors), (identity.mode, identity.lun.sectors));
    if disk.rdm().unwrap().0 == Mode::Virtual
        && descriptor_of(folder, PATH).await.sectors() != disk.shape().sectors
    {
        let refused = disk.prepare_redo().await.err().unwrap().to_string();
        assert!(refused.contains("cut short"), "a chain of two lengths would not open: {refused}");
    }
    Ok(said(&identity))
}

async fn cut_everywhere(change: Change, seed: u64) {
    let log = CrashLog::new(seed);
    let folder = folder_on(log.disk_from(made().await)).await;
    let old = said(&Identity { mode: Mode::Virtual, lun: lun(1, SMALL).0 });
    let begin = log.points();
    change.make(&folder).await.unwrap();
    let (end, new) = (log.points(), said(&change.wanted()));
    let mut seen = (0, 0);
    for point in begin..=end {
        for fate in [0, 1, 2 + (seed + point as u64) % 5] {
            let at = format!("KAGAMI_SEED={seed} {change:?} point {point} of {begin}..{end}, fate {fate}");
            let image = Rc::new(MemoryDisk::from(log.cut(point, fate).remove(0)));
            let folder = folder_on(image as Rc<dyn Disk>).await;
            let found = opened(&folder, change).await.unwrap_or_else(|e| panic!("{at}: {e}"));
            assert!(found == old || found == new, "{at}: {found:?}");
            assert!(point > begin || found == old, "{at}: changed before it began");
            assert!(point < end || found == new, "{at}: not durable");
            seen.0 += u32::from(found == old);
            seen.1 += u32::from(found == new);
            // The same again ends it, in all places.
            change.make(&folder).await.unwrap_or_else(|e| panic!("{at}: again: {e}"));
            assert_eq!(opened(&folder, change).await.unwrap(), new, "{at}: again");
            let copies = read_copies(&dynamic(&folder), PATH).await.unwrap();
            let claim: (LunIdentity, Mode) = (change.wanted().lun, change.wanted().mode);
            let verdict = Copies { claim: Some(claim), ..copies }.compare();
            assert!(verdict.findings.is_empty(), "{at}: {:?}", verdict.findings);
        }
    }
    assert!(seen.0 > 0 && seen.1 > 0, "{change:?}: {seen:?}");
}

fn everywhere(change: Change) {
    lane::block_on(async {
        for seed in seeds(1, 20) {
            cut_everywhere(change, seed).await;
        }
    });
}

#[test]
fn r6_crash_in_a_conversion_leaves_one_mode_or_the_other() {
    everywhere(Change::Convert);
}

#[test]
fn crash_while_a_mapping_grows_leaves_it_open_with_one_length_or_the_other() {
    everywhere(Change::Grow);
}

#[test]
fn crash_while_a_mapping_is_pointed_elsewhere_leaves_one_lun_or_the_other() {
    everywhere(Change::Remap);
    everywhere(Change::RemapLonger);
}

/// The state between the two writes, made by hand: the descriptor is the new one, the mapping file the old one.
#[test]
fn crash_between_the_two_places_of_a_grown_mapping_is_opened_with_the_smaller_length() {
    lane::block_on(async {
        let disk = Rc::new(MemoryDisk::from(made().await));
        let folder = folder_on(disk.clone()).await;
        let old = folder.read_mapping("/vm/d-rdm.vmdk").await.unwrap();
        Change::Grow.make(&folder).await.unwrap();
        let new = folder.read_mapping("/vm/d-rdm.vmdk").await.unwrap();
        folder.write_mapping("/vm/d-rdm.vmdk", &old).await.unwrap();
        assert_eq!(opened(&folder, Change::Grow).await.unwrap().2, SMALL);
        // The other way round as well: a descriptor that was put back from a copy.
        let grown = folder.read_text(PATH).await.unwrap();
        let mut text = descriptor_of(&folder, PATH).await;
        Identity { mode: Mode::Virtual, lun: lun(1, SMALL).0 }.to_ddb(&mut text).unwrap();
        let shorter = ExtentLine { sectors: SMALL, ..text.extents()[0].clone() };
        text.set_extent(0, shorter).unwrap();
        folder.replace(PATH, &text.to_bytes()).await.unwrap();
        folder.write_mapping("/vm/d-rdm.vmdk", &new).await.unwrap();
        assert_eq!(opened(&folder, Change::Grow).await.unwrap().2, SMALL);
        // Without a sound second copy nobody guesses.
        let damaged = String::from_utf8(grown).unwrap().replace("rdm.crc32c = \"", "rdm.crc32c = \"f");
        folder.replace(PATH, damaged.as_bytes()).await.unwrap();
        folder.write_mapping("/vm/d-rdm.vmdk", &old).await.unwrap();
        let refused = opened(&folder, Change::Grow).await.err().unwrap();
        assert!(refused.to_string().contains("maps 4096 sectors"), "{refused}");
        let volume: &Volume = folder.volume();
        volume.settle().await.unwrap();
    });
}
