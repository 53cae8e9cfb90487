//! Chains, switches and commits, on a small file store that can lose power.

mod chain;
mod commit;
mod crash;
mod datastore;
mod host;
mod model;
mod rdm_crash;
mod room;
mod store;
mod thin;
mod whole_way;

use std::rc::Rc;

use block::{Disk, SECTOR_BYTES, Safe, Sector, Segments, SegmentsMut};

use crate::descriptor::{Access, Cid, CreateType, Descriptor, ExtentKind, ExtentLine, NewDescriptor};
use crate::folder::{Folder, Provision};
use crate::{Open, VmDisk};
use store::Store;

/// The large counts are wanted.
pub(crate) fn soak() -> bool {
    std::env::var_os("KAGAMI_SOAK").is_some()
}

/// The seeds of a test: `few` by default, `many` for the soak, one when `KAGAMI_SEED` names it.
pub(crate) fn seeds(few: u64, many: u64) -> Vec<u64> {
    if let Some(seed) = std::env::var("KAGAMI_SEED").ok().and_then(|s| s.parse().ok()) {
        return vec![seed];
    }
    (0..if soak() { many } else { few }).collect()
}

/// Every `step`-th point of a story, another one first with each seed, so that `step` seeds look at each; all of them in
/// the soak.
pub(crate) fn points(from: usize, to: usize, step: usize, seed: u64) -> impl Iterator<Item = usize> {
    let step = if soak() { 1 } else { step };
    (from + seed as usize % step..=to).step_by(step)
}

const UNIT: usize = SECTOR_BYTES as usize;
const BASE: &str = "/d.vmdk";
const CHILD: &str = "/d-000001.vmdk";

/// A base of `sectors` sectors in a store.
async fn new_base(folder: &Rc<Store>, sectors: u64) {
    folder.create("/d-flat.vmdk", sectors, 0, Provision::Thin).await.unwrap();
    let extent = ExtentLine {
        access: Access::ReadWrite,
        sectors,
        kind: ExtentKind::Vmfs,
        file: "d-flat.vmdk".into(),
        offset: 0,
    };
    let create_type = CreateType::Vmfs;
    let new = NewDescriptor { cid: Cid(0x11), parent: None, create_type, extents: vec![extent], ddb: vec![] };
    folder.replace(BASE, &Descriptor::new(&new).unwrap().to_bytes()).await.unwrap();
}

async fn open(folder: &Rc<Store>, path: &str) -> Rc<VmDisk> {
    VmDisk::open(Rc::clone(folder) as Rc<dyn Folder>, path, Open::WRITE, &()).await.unwrap()
}

async fn descriptor(folder: &Store, path: &str) -> Descriptor {
    Descriptor::parse(&folder.read_text(path).await.unwrap()).unwrap()
}

async fn read(disk: &dyn Disk, at: u64, count: u64) -> Vec<u8> {
    let mut bytes = vec![0xdd; count as usize * UNIT];
    disk.read(Sector(at), &SegmentsMut::new(&mut bytes)).await.unwrap();
    bytes
}

async fn write(disk: &dyn Disk, at: u64, bytes: &[u8]) {
    disk.write(Sector(at), &Segments::new(bytes), Safe::AtNextFlush).await.unwrap();
}

/// The whole switch of one disk, undisturbed.
async fn switch(disk: &Rc<VmDisk>) {
    let prepared = disk.prepare_redo().await.unwrap();
    disk.gate().close();
    disk.gate().drained().await;
    let switched = prepared.switch();
    disk.gate().open();
    switched.settle().await.unwrap();
    switched.keep();
}
