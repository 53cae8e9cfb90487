//! A pool under fuzz: a small good pool whose metadata is edited, checksums made right again, then opened and used. Used
//! by the tests and by fuzz targets. Nothing may panic, run off the medium or go on for ever.

use std::cell::OnceCell;
use std::rc::Rc;

use block::fuzz::edits;
use block::{Disk, DiskError, Extents, Image, MemoryDisk, SECTOR_BYTES, Safe, Sector, Segments, SegmentsMut};
use uuid::Uuid;

use crate::{Claim, LEAST_MEDIUM_BYTES, LunError, NewLun, NewPool, Options, Pool, PoolError};

/// A page of metadata.
const PAGE: usize = 4096;
/// In an edit's place: the checksum stays as the edit left it.
const KEEP_CHECKSUM: u16 = 1 << 15;

#[derive(Debug, thiserror::Error)]
enum Unmade {
    #[error(transparent)]
    Pool(#[from] PoolError),
    #[error(transparent)]
    Lun(#[from] LunError),
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// A good pool, and the numbers of the pages that hold something.
#[derive(Clone)]
struct Template {
    image: Image,
    pages: Vec<u64>,
}

impl Template {
    async fn new() -> Result<Self, Unmade> {
        let disk = Rc::new(MemoryDisk::new(LEAST_MEDIUM_BYTES / SECTOR_BYTES));
        let new = NewPool { name: "fuzz".into(), uuid: Uuid::from_u128(5) };
        let pool = Pool::create(vec![disk.clone()], new, Options::default()).await?;
        let lun = NewLun { name: "a".into(), sectors: 70_000, uuid: Some(Uuid::from_u128(7)) };
        let lun = pool.create_lun(lun).await?;
        let bytes = vec![0x5A; 24 * SECTOR_BYTES as usize];
        for at in [3, 69_000, 40_000] {
            lun.write(Sector(at), &Segments::new(&bytes), Safe::AtNextFlush).await?;
        }
        lun.snapshot("s").await?;
        lun.write(Sector(8), &Segments::new(&bytes), Safe::AtNextFlush).await?;
        lun.zero(Sector(16), 8, true).await?;
        lun.snapshot("t").await?;
        let other = NewLun { uuid: Some(Uuid::from_u128(8)), ..NewLun::new("b", 0) };
        pool.clone_lun("a", "s", other).await?;
        lun.claim(Some(Claim::Datastore { uuid: Uuid::from_u128(9), label: "ds".into() })).await?;
        pool.settle().await?;
        // What the journal holds and the settled pages do not.
        lun.write(Sector(50_000), &Segments::new(&bytes), Safe::OnReturn).await?;
        let image = disk.image();
        let (mut pages, mut next) = (Vec::new(), 0);
        while let Some(page) = image.pages.next_page(next) {
            pages.push(page);
            next = page + 1;
        }
        Ok(Self { image, pages })
    }
}

/// Makes the checksum of a page right, if it is one that has one.
fn seal(page: &mut [u8; PAGE]) {
    let (at, length) = match &page[..4] {
        b"KAGA" => (12, PAGE),
        b"KGMP" => (4, PAGE),
        b"KGMJ" => {
            (4, (u32::from_le_bytes([page[32], page[33], page[34], page[35]]) as usize).saturating_add(64))
        }
        _ => return,
    };
    if length <= PAGE {
        page[at..at + 4].fill(0);
        let crc = crc32c::crc32c(&page[..length]);
        page[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Does with a pool what a user would. Each step may fail.
async fn use_pool(pool: &Rc<Pool>) {
    let _ = pool.check().await;
    for lun in pool.luns().into_iter().take(8) {
        let sectors = lun.shape().sectors;
        let mut bytes = [0; 8 * SECTOR_BYTES as usize];
        for at in [0, 8, 69_000, sectors.saturating_sub(8)] {
            let _ = lun.read(Sector(at), &SegmentsMut::new(&mut bytes)).await;
            let _ = lun.write(Sector(at), &Segments::new(&bytes), Safe::OnReturn).await;
        }
        let mut out = Extents::with_limit(16);
        let _ = lun.status(Sector(0), sectors, None, &mut out).await;
        for snapshot in lun.snapshots().iter().take(4) {
            if let Ok(disk) = lun.open_snapshot(&snapshot.name) {
                let _ = disk.read(Sector(0), &SegmentsMut::new(&mut bytes)).await;
            }
        }
    }
    let _ = pool.create_lun(NewLun::new("new", 8192)).await;
    if let Some(lun) = pool.lun("a") {
        let _ = lun.remove_snapshot("s").await;
    }
    for _ in 0..50 {
        if !matches!(pool.tidy_step().await, Ok(true)) {
            break;
        }
    }
    let _ = pool.settle().await;
}

thread_local! {
    static TEMPLATE: OnceCell<Option<Template>> = const { OnceCell::new() };
}

/// Applies the edits of an input ([`block::fuzz::edits`]) to the pages of a good pool, makes their checksums right
/// (unless bit 15 of the place is set) and uses what comes of it.
pub fn fuzz_pool(input: &[u8]) {
    lane::block_on(async {
        let known = TEMPLATE.with(|template| template.get().cloned());
        let template = match known {
            Some(template) => template,
            None => {
                let made = Template::new().await.ok();
                TEMPLATE.with(|template| template.get_or_init(|| made).clone())
            }
        };
        let Some(Template { image, pages }) = template else { panic!("no good pool could be made") };
        let Image { sectors, pages: mut content } = image;
        for edit in edits(input) {
            let number = pages[usize::from(edit.place & !KEEP_CHECKSUM) % pages.len()];
            let mut page = [0; PAGE];
            content.read(number * PAGE as u64, &SegmentsMut::new(&mut page));
            edit.apply(&mut page);
            if edit.place & KEEP_CHECKSUM == 0 {
                seal(&mut page);
            }
            content.write(number * PAGE as u64, &Segments::new(&page));
        }
        let medium = Rc::new(MemoryDisk::from(Image { sectors, pages: content }));
        if let Ok(pool) = Pool::open(vec![medium], Options::default()).await {
            use_pool(&pool).await;
        }
    });
}
