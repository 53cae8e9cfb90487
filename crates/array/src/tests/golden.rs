//! Golden images: pools as older programs wrote them stay in the tree, open, and are not changed by that.

use std::rc::Rc;

use block::{Disk, Extents, Image, MemoryDisk, Pages, SECTOR_BYTES, Safe, Sector, Segments, SegmentsMut};
use uuid::Uuid;

use super::{content, differences, dynamic, new_pool, pattern};
use crate::{Claim, Decider, Lun, NewLun, Options, Pool};

/// Length of each medium, in sectors.
const MEDIUM: u64 = 16 << 11;
/// Sectors of a grain.
const GRAIN: u64 = 128;
/// The bit of a record's number from which on the number of the medium follows.
const MEDIUM_SHIFT: u32 = 56;

fn path(name: &str) -> String {
    format!("{}/tests/golden/{name}.pages", env!("CARGO_MANIFEST_DIR"))
}

/// The media of a golden image as they lie in the tree: records of a page's number (with that of its medium in the
/// highest byte) and its 4 KiB. Pages of zeroes are left out.
pub(crate) fn golden(name: &str) -> Vec<Image> {
    let bytes = std::fs::read(path(name)).unwrap();
    let mut media = vec![Image { sectors: MEDIUM, pages: Pages::default() }];
    for record in bytes.chunks(8 + 4096) {
        let number = u64::from_le_bytes(record[..8].try_into().unwrap());
        let (medium, page) = ((number >> MEDIUM_SHIFT) as usize, number & ((1 << MEDIUM_SHIFT) - 1));
        while media.len() <= medium {
            media.push(Image { sectors: MEDIUM, pages: Pages::default() });
        }
        media[medium].pages.write(page * 4096, &Segments::new(&record[8..]));
    }
    media
}

/// Writes the image of a new format, when `KAGAMI_MAKE_GOLDEN=1` asks for it. What lies in the tree is never written
/// again.
fn keep(name: &str, media: &[Rc<MemoryDisk>]) {
    let mut out = Vec::new();
    for (number, medium) in media.iter().enumerate() {
        let (image, mut page) = (medium.image(), 0);
        while let Some(next) = image.pages.next_page(page) {
            let mut bytes = [0; 4096];
            image.pages.read(next * 4096, &SegmentsMut::new(&mut bytes));
            if !lane::memory::is_zero(&bytes) {
                out.extend(((number as u64) << MEDIUM_SHIFT | next).to_le_bytes());
                out.extend(bytes);
            }
            page = next + 1;
        }
    }
    std::fs::create_dir_all(std::path::Path::new(&path(name)).parent().unwrap()).unwrap();
    std::fs::write(path(name), out).unwrap();
}

fn wanted(name: &str) -> bool {
    std::env::var_os("KAGAMI_MAKE_GOLDEN").is_some() && !std::path::Path::new(&path(name)).exists()
}

async fn write(lun: &Lun, at: u64, count: u64, tag: u64) {
    lun.write(Sector(at), &Segments::new(&pattern(count, tag)), Safe::AtNextFlush).await.unwrap();
}

async fn reads(disk: &dyn Disk, at: u64, count: u64, tag: u64) -> bool {
    let mut bytes = vec![0; (count * SECTOR_BYTES) as usize];
    disk.read(Sector(at), &SegmentsMut::new(&mut bytes)).await.unwrap();
    bytes == pattern(count, tag)
}

/// Opens a golden image, hands the pool to `look`, and compares every byte of the media afterwards.
async fn opens_unchanged(name: &str, look: impl AsyncFn(&Rc<Pool>)) {
    let images = golden(name);
    for read_only in [true, false] {
        let media: Vec<_> = images.iter().cloned().map(|i| Rc::new(MemoryDisk::from(i))).collect();
        let disks = media.iter().rev().map(dynamic).collect();
        let pool = Pool::open(disks, Options { read_only, ..Options::default() }).await.unwrap();
        look(&pool).await;
        let report = pool.check().await.unwrap();
        assert!(report.findings.is_empty(), "{:?}", report.findings);
        for (number, (medium, image)) in media.iter().zip(&images).enumerate() {
            let now = medium.image();
            assert_eq!(now.sectors, image.sectors);
            let changed = differences(&now.pages, &image.pages);
            assert!(changed.is_empty(), "{name}, medium {number}: opening changed pages {changed:?}");
        }
    }
}

/// What the first golden image holds.
async fn content_of_first(pool: &Rc<Pool>) {
    let new = NewLun { name: "a".into(), sectors: 70_000, uuid: Some(Uuid::from_u128(7)) };
    let lun = pool.create_lun(new).await.unwrap();
    write(&lun, 3, 20, 1).await;
    write(&lun, 69_000, 8, 2).await;
    lun.snapshot("s").await.unwrap();
    write(&lun, 8, 8, 3).await;
    lun.zero(Sector(16), 8, true).await.unwrap();
    pool.clone_lun("a", "s", NewLun::new("b", 0)).await.unwrap();
    let claim = Claim::Datastore { uuid: Uuid::from_u128(9), label: "ds".into() };
    lun.claim(Some(claim)).await.unwrap();
}

#[test]
fn a_golden_pool_of_format_1_opens() {
    const NAME: &str = "pool-format-1";
    lane::block_on(async {
        if wanted(NAME) {
            let medium = Rc::new(MemoryDisk::new(MEDIUM));
            let pool = Pool::create(vec![medium.clone()], new_pool(), Options::default()).await.unwrap();
            content_of_first(&pool).await;
            keep(NAME, &[medium]);
        }
        opens_unchanged(NAME, async |pool: &Rc<Pool>| {
            let (a, b) = (pool.lun("a").unwrap(), pool.lun("b").unwrap());
            assert_eq!(a.uuid(), Uuid::from_u128(7));
            assert!(matches!(a.claimed_by(), Some(Claim::Datastore { .. })));
            let frozen = content(&*a.open_snapshot("s").unwrap()).await.unwrap();
            assert!(differences(&frozen.pages, &content(&*b).await.unwrap().pages).is_empty());
            let mut bytes = [0; 24 * 512];
            a.read(Sector(0), &SegmentsMut::new(&mut bytes)).await.unwrap();
            assert_eq!(bytes[3 * 512..8 * 512], pattern(20, 1)[..5 * 512]);
            assert_eq!(bytes[8 * 512..16 * 512], pattern(8, 3));
            assert!(lane::memory::is_zero(&bytes[16 * 512..]));
        })
        .await;
    });
}

fn mapping() -> Claim {
    Claim::Mapping { datastore: "ds".into(), path: "vm/vm_1.vmdk".into(), physical: true }
}

fn group() -> Uuid {
    Uuid::from_u128(5)
}

/// Who decides about the group: a pool that is not there.
fn decider() -> Decider {
    Decider::Pool(Uuid::from_u128(42))
}

/// Every kind of object there is, on two media; most of it in the pages, the end of it in the journal.
async fn content_of_full(pool: &Rc<Pool>) {
    let new = |name: &str, number: u128| NewLun {
        name: name.into(),
        sectors: 70_000,
        uuid: Some(Uuid::from_u128(number)),
    };
    // A generation that outlived its snapshot, with blocks given up, moved up and copied.
    let held = pool.create_lun(new("held", 11)).await.unwrap();
    write(&held, 0, 4 * GRAIN, 1).await;
    let generation = held.snapshot("gone").await.unwrap().generation();
    held.hold(generation, "backup").await.unwrap();
    write(&held, GRAIN, 8, 2).await;
    held.remove_snapshot("gone").await.unwrap();
    pool.tidy().await.unwrap();
    write(&held, 2 * GRAIN + 8, 8, 3).await;
    held.unmap(Sector(3 * GRAIN), GRAIN).await.unwrap();
    // Reverted and not accepted; a raw device mapping refers to it.
    let mapped = pool.create_lun(new("mapped", 12)).await.unwrap();
    write(&mapped, 0, 8, 4).await;
    mapped.snapshot("base").await.unwrap();
    write(&mapped, 0, 8, 5).await;
    mapped.revert("base").await.unwrap();
    write(&mapped, 8, 8, 6).await;
    mapped.claim(Some(mapping())).await.unwrap();
    let clone = pool.clone_lun("mapped", "base", new("clone", 13)).await.unwrap();
    clone.claim(Some(Claim::Datastore { uuid: Uuid::from_u128(9), label: "ds".into() })).await.unwrap();
    // The first medium is full: a grain whose only block is zero leaves nothing in the image.
    let full = pool.create_lun(new("full", 14)).await.unwrap();
    for grain in 0..240 {
        let zero = Segments::new(&[0; 4096]);
        full.write(Sector(grain * GRAIN), &zero, Safe::AtNextFlush).await.unwrap();
    }
    write(&clone, 69_000, 8, 7).await;
    pool.settle().await.unwrap();
    // From here on in the journal. A removed LUN with its snapshot.
    let removed = pool.create_lun(new("removed", 15)).await.unwrap();
    write(&removed, 0, 8, 8).await;
    removed.snapshot("kept").await.unwrap();
    pool.remove_lun("removed", false).await.unwrap();
    // A leg of a cut that another pool decides about, and what was written after it.
    let member = pool.create_lun(new("member", 16)).await.unwrap();
    write(&member, 0, 8, 9).await;
    let members = [(Rc::clone(&member), "cut".to_owned())];
    let leg = pool.prepare_cut(group(), decider(), &members).await.unwrap();
    leg.cut();
    leg.settle().await.unwrap();
    write(&member, 8, 8, 10).await;
    drop(leg);
    pool.commit().await.unwrap();
}

/// Where blocks were changed since a cut: first sector and how many.
async fn changed(lun: &Lun, since: block::Generation) -> Vec<(u64, u64)> {
    let mut out = Extents::with_limit(64);
    lun.status(Sector(0), lun.shape().sectors, Some(since), &mut out).await.unwrap();
    out.iter().filter(|e| e.changed).map(|e| (e.at.0, e.count)).collect()
}

async fn check_full(pool: &Rc<Pool>) {
    let names: Vec<String> = pool.luns().iter().map(|l| l.name()).collect();
    assert_eq!(names, ["held", "mapped", "clone", "full", "member"]);
    let lun = |name: &str| pool.lun(name).unwrap();
    for (number, name) in (11..).zip(["held", "mapped", "clone", "full"]) {
        assert_eq!((lun(name).uuid(), lun(name).shape().sectors), (Uuid::from_u128(number), 70_000));
    }

    let held = lun("held");
    let [(generation, holder)] = &held.holds()[..] else { panic!("one hold") };
    assert_eq!(holder, "backup");
    assert!(held.snapshots().is_empty());
    let wanted = [(GRAIN, 8), (2 * GRAIN + 8, 8), (3 * GRAIN, GRAIN)];
    assert_eq!(changed(&held, *generation).await, wanted);
    assert!(reads(&*held, 2 * GRAIN + 8, 8, 3).await && reads(&*held, GRAIN, 8, 2).await);
    assert_eq!(pool.hidden_layers().await.unwrap()[0].2, ["backup"]);
    assert!(held.usage().await.unwrap().own.copied_blocks > 0);

    let (mapped, clone) = (lun("mapped"), lun("clone"));
    assert_eq!(mapped.claimed_by(), Some(mapping()));
    assert!(matches!(clone.claimed_by(), Some(Claim::Datastore { label, .. }) if label == "ds"));
    assert!(reads(&*mapped, 0, 8, 4).await && reads(&*mapped, 8, 8, 6).await);
    assert!(mapped.record().unwrap().abandoned.is_some());
    assert!(reads(&*clone, 0, 8, 4).await && reads(&*clone, 69_000, 8, 7).await);
    let base = mapped.open_snapshot("base").unwrap();
    assert!(reads(&*base, 0, 8, 4).await);
    assert_eq!(changed(&mapped, base.generation()).await, [(8, 8)]);

    assert_eq!(pool.info().media, 2);
    let entry = pool.entry(clone.record().unwrap().top, 69_000 / GRAIN).await.unwrap();
    assert_eq!(pool.media.medium_of(entry.grain().into()), Some(1), "the second medium holds data");

    let [removed] = &pool.trash()[..] else { panic!("one LUN in the trash") };
    assert_eq!((removed.name.as_str(), removed.uuid), ("removed", Uuid::from_u128(15)));

    let [doubt] = &pool.in_doubt()[..] else { panic!("one cut in doubt") };
    assert_eq!((doubt.group, doubt.decider), (group(), decider()));
    assert_eq!(doubt.members, [("member".to_owned(), "cut".to_owned())]);
    let member = lun("member");
    assert!(reads(&*member, 0, 8, 9).await && reads(&*member, 8, 8, 10).await);
}

/// And everything in it can be used by a program of today.
async fn use_full(pool: &Rc<Pool>) {
    let lun = |name: &str| pool.lun(name).unwrap();
    let mapped = lun("mapped");
    mapped.claim(None).await.unwrap();
    mapped.undo_revert().await.unwrap();
    assert!(reads(&*mapped, 0, 8, 5).await, "the branch that was left is there");
    pool.undelete_lun("removed").await.unwrap();
    let kept = lun("removed").open_snapshot("kept").unwrap();
    assert!(reads(&*kept, 0, 8, 8).await);
    pool.resolve(group(), true).await.unwrap();
    let cut = lun("member").open_snapshot("cut").unwrap();
    assert!(reads(&*cut, 0, 8, 9).await && changed(&lun("member"), cut.generation()).await == [(8, 8)]);
    let generation = lun("held").holds()[0].0;
    lun("held").release(generation, "backup").await.unwrap();
    pool.tidy().await.unwrap();
    assert!(pool.hidden_layers().await.unwrap().is_empty());
    assert!(reads(&*lun("held"), 2 * GRAIN + 8, 8, 3).await);
    let report = pool.check().await.unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
}

#[test]
fn a_golden_pool_of_format_1_with_every_kind_of_object_opens() {
    const NAME: &str = "pool-format-1-full";
    lane::block_on(async {
        if wanted(NAME) {
            let media = [(); 2].map(|()| Rc::new(MemoryDisk::new(MEDIUM)));
            let disks = media.iter().map(dynamic).collect();
            let pool = Pool::create(disks, new_pool(), Options::default()).await.unwrap();
            content_of_full(&pool).await;
            keep(NAME, &media);
        }
        opens_unchanged(NAME, async |pool: &Rc<Pool>| check_full(pool).await).await;
        let media = golden(NAME).into_iter().map(|i| Rc::new(MemoryDisk::from(i)) as Rc<dyn Disk>);
        use_full(&Pool::open(media.collect(), Options::default()).await.unwrap()).await;
    });
}
