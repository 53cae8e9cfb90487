//! A VM's disk: the top of a chain, with the gate a cut closes.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use block::{Disk, DiskError, Extents, Gate, Generation, Io, Safe, Sector, Segments, SegmentsMut, Shape};
use lane::Buffer;
use lane::sync::Turn;

use crate::chain::{ChainError, FoundLink, MIXED_KEY, mixed, survey};
use crate::claims::{Claim, Hold};
use crate::commit::Mirror;
use crate::create::settled_sectors;
use crate::descriptor::{Cid, Descriptor, ExtentKind};
use crate::exclusive;
use crate::folder::{Folder, sibling};
use crate::latency::Latency;
use crate::layer::Layer;
use crate::part::{Part, ready};
use crate::rdm::{self, Identity, Luns, Mode};
use crate::redo::RedoDisk;
use crate::room::Room;
use crate::sesparse::SeSparseDisk;

/// Says `1` of a disk whose blocks are taken when they are written.
pub(crate) const THIN_KEY: &str = "ddb.thinProvisioned";

/// How to open a disk.
#[derive(Copy, Clone, Debug)]
pub struct Open {
    /// Nothing is written. Several may read; a link that somebody writes is refused.
    pub read_only: bool,
    /// The top is shared with other VMs: bus sharing or multi-writer (R5).
    pub shared: bool,
}

impl Open {
    /// For one VM that writes.
    pub const WRITE: Self = Self { read_only: false, shared: false };
    /// For reading.
    pub const READ: Self = Self { read_only: true, shared: false };
}

/// What a link of a chain is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LinkKind {
    /// A file of data.
    Flat,
    /// A mapped LUN.
    Rdm {
        /// Compatibility mode.
        mode: Mode,
        /// Which LUN.
        identity: Box<Identity>,
    },
    /// A redo log.
    Redo,
    /// A redo log that vSphere wrote; it is read, never written.
    SeSparse,
}

/// A link as others see it.
#[derive(Clone, Debug)]
pub struct LinkInfo {
    /// Its descriptor.
    pub path: String,
    /// Its extent, next to the descriptor.
    pub extent: String,
    /// What it is.
    pub kind: LinkKind,
    /// Its content id.
    pub cid: Cid,
}

pub(crate) struct Link {
    pub(crate) path: String,
    pub(crate) extent: String,
    pub(crate) kind: LinkKind,
    pub(crate) descriptor: RefCell<Descriptor>,
    pub(crate) layer: Rc<Layer>,
    pub(crate) redo: Option<Rc<RedoDisk>>,
    /// The descriptor, and the extent.
    pub(crate) claims: [Claim; 2],
}

/// A disk of a VM. Reads and writes go to the top of its chain.
pub struct VmDisk {
    pub(crate) folder: Rc<dyn Folder>,
    pub(crate) links: RefCell<Vec<Rc<Link>>>,
    pub(crate) top: RefCell<Rc<Layer>>,
    pub(crate) mirror: RefCell<Option<Rc<Mirror>>>,
    pub(crate) gate: Rc<Gate>,
    /// Closed between a switch and its durable record: flushes wait.
    pub(crate) flushes: Rc<Gate>,
    /// A switch ended without a durable record: nothing is promised to the guest until somebody knows.
    pub(crate) undecided: Cell<bool>,
    pub(crate) room: Room,
    /// Switches and commits of this chain take turns (the chain lock of R16).
    pub(crate) chain_lock: Rc<Cell<bool>>,
    /// The CID of this session is on disk (R19).
    touched: Cell<bool>,
    touching: Turn,
    pub(crate) latency: Latency,
    sectors: u64,
    read_only: bool,
    shared: bool,
}

impl VmDisk {
    /// Opens the chain whose top is the descriptor at `path` (R14). Writing needs the whole chain to be sound; a
    /// chain that is not may still be read from a lower link: [`crate::chain::Survey::readable`].
    pub async fn open(
        folder: Rc<dyn Folder>,
        path: &str,
        how: Open,
        luns: &dyn Luns,
    ) -> Result<Rc<Self>, ChainError> {
        let found = survey(&*folder, path).await;
        if let Some((_, trouble)) = found.troubles.into_iter().next() {
            return Err(trouble);
        }
        let top = &found.links[0];
        if let Some(from) = mixed(&top.descriptor) {
            return Err(ChainError::Mixed { path: top.path.clone(), from: from.to_owned() });
        }
        let depth = found.links.len();
        let mut links: Vec<Rc<Link>> = Vec::with_capacity(depth);
        for (index, link) in found.links.into_iter().enumerate().rev() {
            let is_top = index == 0;
            let hold = match (is_top && !how.read_only, how.shared) {
                (true, true) => Hold::SharedWrite,
                (true, false) => Hold::Write,
                (false, _) => Hold::Read,
            };
            let below = links.last().map(|l| Rc::clone(&l.layer));
            links.push(Rc::new(open_link(&folder, link, below, hold, how.read_only, luns).await?));
        }
        let Some(top) = links.last() else {
            return Err(ChainError::Missing { path: path.to_owned(), named_by: None });
        };
        let (sectors, layer) = (top.layer.shape().sectors, Rc::clone(&top.layer));
        Ok(Rc::new(Self {
            folder,
            top: RefCell::new(layer),
            links: RefCell::new(links),
            mirror: RefCell::new(None),
            gate: Gate::new(),
            flushes: Gate::new(),
            undecided: Cell::new(false),
            room: Room::default(),
            chain_lock: Rc::new(Cell::new(false)),
            touched: Cell::new(false),
            touching: Turn::new(),
            latency: Latency::default(),
            sectors,
            read_only: how.read_only,
            shared: how.shared,
        }))
    }

    /// Stands before everything that changes the disk: what a cut closes.
    pub fn gate(&self) -> &Rc<Gate> {
        &self.gate
    }

    /// The links, base first.
    pub fn links(&self) -> Vec<LinkInfo> {
        let info = |l: &Rc<Link>| LinkInfo {
            path: l.path.clone(),
            extent: l.extent.clone(),
            kind: l.kind.clone(),
            cid: l.descriptor.borrow().cid(),
        };
        self.links.borrow().iter().map(info).collect()
    }

    /// The descriptor of the top: what the VMX names.
    pub fn top_path(&self) -> String {
        self.top_link().path.clone()
    }

    /// The folder it lies in.
    pub fn folder(&self) -> &Rc<dyn Folder> {
        &self.folder
    }

    /// The mapping at the chain's base, when there is one.
    pub fn rdm(&self) -> Option<(Mode, Identity)> {
        match &self.links.borrow().first()?.kind {
            LinkKind::Rdm { mode, identity } => Some((*mode, (**identity).clone())),
            LinkKind::Flat | LinkKind::Redo | LinkKind::SeSparse => None,
        }
    }

    /// The disk up to link `index` (0 is the base), read-only: what a backup copies. `None` when there is no such
    /// link, or when it is the top, which is not frozen.
    pub fn frozen(&self, index: usize) -> Option<Rc<dyn Disk>> {
        let links = self.links.borrow();
        let layer = links.get(index).filter(|_| index + 1 < links.len())?;
        Some(Rc::clone(&layer.layer) as Rc<dyn Disk>)
    }

    /// A redo log took over and no durable record says so: flushes are refused, because a power loss might take away
    /// what they promise. Until [`VmDisk::decided`], or until the disk is opened again.
    pub fn is_undecided(&self) -> bool {
        self.undecided.get()
    }

    /// The caller has made durable that the redo logs of this disk count: flushes are answered again.
    pub fn decided(&self) {
        self.undecided.set(false);
    }

    /// A flush that does not wait for room: for whoever has the gate closed, or closes the disk.
    pub async fn flush_once(&self) -> Result<(), DiskError> {
        let mirror = self.mirror.borrow().clone();
        match mirror {
            Some(mirror) => mirror.flush().await?,
            None => self.top_layer().flush().await?,
        }
        // Held while a cut's record is not durable: what the guest hears as flushed must outlive its rollback.
        self.promise().await
    }

    /// A flush waits for the record of a cut, and is refused when there will be none.
    async fn promise(&self) -> Result<(), DiskError> {
        if self.flushes.is_closed() {
            drop(self.flushes.enter().await);
        }
        if self.undecided.get() {
            let what = "the disk is on a redo log that no durable record names: nothing can be promised";
            return Err(DiskError::Io(std::sync::Arc::new(std::io::Error::other(what))));
        }
        Ok(())
    }

    /// A commit is folding links of this chain together.
    pub fn is_committing(&self) -> bool {
        self.mirror.borrow().is_some()
    }

    /// Settles everything and closes redo logs properly. The disk may be used afterwards; what is written then is
    /// settled by the next flush as usual.
    pub async fn close(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Ok(());
        }
        self.flush_once().await?;
        let top = self.top_link();
        match &top.redo {
            Some(redo) => redo.close().await,
            None => Ok(()),
        }
    }

    pub(crate) fn top_link(&self) -> Rc<Link> {
        let links = self.links.borrow();
        Rc::clone(links.last().unwrap_or_else(|| unreachable!("a chain has a link")))
    }

    /// R19: the session's CID is durable before its first data. Links above keep what they noted of this one, so it
    /// changes at most once, before the first write.
    pub(crate) async fn touch(&self) -> Result<(), DiskError> {
        let _turn = self.touching.take().await;
        if self.touched.get() || self.shared {
            return Ok(());
        }
        let link = self.top_link();
        rewrite(&*self.folder, &link, |descriptor| {
            descriptor.set_cid(Cid::random());
            Ok(())
        })
        .await
        .map_err(|error| disk_error(&error))?;
        self.touched.set(true);
        Ok(())
    }

    pub(crate) fn set_touched(&self, touched: bool) {
        self.touched.set(touched);
    }

    /// Refuses what cannot be, and waits until writing is allowed.
    async fn enter(&self, at: Sector, count: u64) -> Result<block::Pass, DiskError> {
        block::check_range(self.sectors, at, count)?;
        if self.read_only {
            return Err(DiskError::ReadOnly);
        }
        let pass = match self.gate.try_enter() {
            Some(pass) => pass,
            None => self.gate.enter().await,
        };
        if !self.touched.get() {
            self.touch().await?;
        }
        Ok(pass)
    }

    pub(crate) fn top_layer(&self) -> Rc<Layer> {
        Rc::clone(&self.top.borrow())
    }

    async fn write_through(&self, at: Sector, from: &Segments<'_>, safe: Safe) -> Result<(), DiskError> {
        let mirror = self.mirror.borrow().clone();
        match mirror {
            Some(mirror) => mirror.write(at, from, safe).await,
            None => self.top_layer().write(at, from, safe).await,
        }
    }
}

/// Rewrites a link's descriptor by R10.
pub(crate) async fn rewrite(
    folder: &dyn Folder,
    link: &Link,
    change: impl FnOnce(&mut Descriptor) -> Result<(), ChainError>,
) -> Result<(), ChainError> {
    let mut new = link.descriptor.borrow().clone();
    change(&mut new)?;
    folder.replace(&link.path, &new.to_bytes()).await?;
    *link.descriptor.borrow_mut() = new;
    Ok(())
}

/// What the guest is told when a descriptor could not be rewritten.
pub(crate) fn disk_error(error: &ChainError) -> DiskError {
    match error {
        ChainError::Disk(error)
        | ChainError::Folder(crate::folder::FolderError::Disk { source: error, .. }) => error.clone(),
        other => DiskError::Io(std::sync::Arc::new(std::io::Error::other(other.to_string()))),
    }
}

/// Opens one link over the one below it.
async fn open_link(
    folder: &Rc<dyn Folder>,
    found: FoundLink,
    below: Option<Rc<Layer>>,
    hold: Hold,
    read_only: bool,
    luns: &dyn Luns,
) -> Result<Link, ChainError> {
    let FoundLink { path, descriptor } = found;
    let unsupported = |what: String| ChainError::Unsupported { path: path.clone(), what };
    let [extent] = descriptor.extents() else {
        return Err(unsupported(format!("has {} extents, one is opened", descriptor.extents().len())));
    };
    let (kind, sectors, offset) = (extent.kind.clone(), extent.sectors, extent.offset);
    if descriptor.create_type().extent_kind().as_ref() != Some(&kind) {
        let what = format!("extent type {kind} does not belong to create type {}", descriptor.create_type());
        return Err(unsupported(what));
    }
    let file = sibling(&path, &extent.file)?;
    if file == path && hold != Hold::Read {
        let what = "is a disk of ESX 2, data without a descriptor, which is only read: copy it to a new disk";
        return Err(unsupported(what.into()));
    }
    let claims = [folder.claims().take(&path, hold)?, folder.claims().take(&file, hold)?];
    let (kind, disk, redo): (LinkKind, Rc<dyn Disk>, Option<Rc<RedoDisk>>) = match (kind, below) {
        (ExtentKind::Vmfs | ExtentKind::Flat, None) => {
            let data = folder.open(&file, read_only).await.map_err(|e| missing(e, &path))?;
            if descriptor.get(THIN_KEY) == Some("1") && !read_only {
                data.give_back_unmapped();
            }
            let has = data.shape().sectors;
            if has.checked_sub(offset).is_none_or(|rest| rest < sectors) {
                return Err(unsupported(format!("{file} has {has} sectors, the descriptor says {sectors}")));
            }
            let disk: Rc<dyn Disk> = match has == sectors && offset == 0 {
                true => data,
                false => Part::new(data, Sector(offset), sectors, read_only)?,
            };
            (LinkKind::Flat, disk, None)
        }
        (ExtentKind::VmfsRdm, None) => {
            let mode = Mode::of(descriptor.create_type()).unwrap_or(Mode::Virtual);
            let mapping = folder.read_mapping(&file).await.map_err(|e| missing(e, &path))?;
            let mut identity = mapping
                .identity(mode)
                .map_err(|source| ChainError::Identity { path: path.clone(), source })?;
            // The descriptor's create type is what convert (R6) changes in one atomic write; it decides.
            identity.mode = mode;
            if identity.lun.sectors != sectors {
                let mapped = identity.lun.sectors;
                let differs = || unsupported(format!("maps {mapped} sectors, the descriptor says {sectors}"));
                identity.lun.sectors = settled_sectors(&identity, &descriptor).ok_or_else(differs)?;
                tracing::warn!(
                    path,
                    mapped,
                    sectors,
                    "a change of this mapping was cut short: it opens as it was"
                );
            }
            let disk = match luns.watch() {
                Some(watch) => rdm::open_held(&identity, watch, read_only, rdm::HOLD),
                None => rdm::open(&identity, &luns.visible(), read_only),
            }
            .map_err(|source| ChainError::Lun { path: path.clone(), source })?;
            (LinkKind::Rdm { mode, identity: Box::new(identity) }, disk, None)
        }
        (ExtentKind::VmfsSparse, Some(below)) => {
            let data = folder.open(&file, read_only).await.map_err(|e| missing(e, &path))?;
            let redo = RedoDisk::open(data, below, read_only, false)
                .await
                .map_err(|source| ChainError::Redo { path: path.clone(), source })?;
            (LinkKind::Redo, Rc::clone(&redo) as Rc<dyn Disk>, Some(redo))
        }
        (ExtentKind::SeSparse, Some(below)) if hold == Hold::Read => {
            let data = folder.open(&file, true).await.map_err(|e| missing(e, &path))?;
            let redo = SeSparseDisk::open(data, below)
                .await
                .map_err(|source| ChainError::SeSparse { path: path.clone(), source })?;
            (LinkKind::SeSparse, redo, None)
        }
        (ExtentKind::SeSparse, Some(_)) => {
            let what = "is an SEsparse redo log, which is only read: open it read-only and copy the disk";
            return Err(unsupported(what.into()));
        }
        (kind, below) => {
            let place = if below.is_some() { "above another disk" } else { "as a base" };
            return Err(unsupported(format!("an extent of type {kind} is not opened {place}")));
        }
    };
    let layer = Layer::new(disk, hold == Hold::Read && !read_only);
    Ok(Link { path, extent: file, kind, descriptor: RefCell::new(descriptor), layer, redo, claims })
}

fn missing(error: crate::folder::FolderError, named_by: &str) -> ChainError {
    match error {
        crate::folder::FolderError::NotFound { path } => {
            ChainError::Missing { path, named_by: Some(named_by.to_owned()) }
        }
        other => other.into(),
    }
}

/// The mark that a commit leaves on the disk it overwrites.
pub(crate) fn set_mixed(descriptor: &mut Descriptor, from: Option<&str>) -> Result<(), ChainError> {
    let refuse = |source| ChainError::Refused(format!("the commit cannot be noted: {source}"));
    match from {
        Some(from) => descriptor.set_ddb(MIXED_KEY, from).map_err(refuse),
        None => {
            descriptor.remove_ddb(MIXED_KEY);
            Ok(())
        }
    }
}

impl Disk for VmDisk {
    fn shape(&self) -> Shape {
        let shape = self.top.borrow().shape();
        Shape { sectors: self.sectors, read_only: self.read_only, ..shape }
    }

    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        // The layer lives as long as the read: a switch or flip may put another in its place meanwhile.
        let top = self.top_layer();
        Box::pin(async move { top.inner().read(at, into).await })
    }

    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a> {
        Box::pin(async move {
            self.when_there_is_room(async || {
                let begun = lane::now();
                let pass = self.enter(at, from.len() as u64 / block::SECTOR_BYTES).await?;
                let result = self.write_through(at, from, safe).await;
                drop(pass);
                self.latency.note(begun);
                result?;
                // Outside the gate: what ends the cut that it waits for may have to close it.
                match safe {
                    Safe::OnReturn => self.promise().await,
                    Safe::AtNextFlush => Ok(()),
                }
            })
            .await
        })
    }

    fn zero(&self, at: Sector, count: u64, may_free: bool) -> Io<'_> {
        Box::pin(self.when_there_is_room(async move || {
            let _pass = self.enter(at, count).await?;
            let mirror = self.mirror.borrow().clone();
            match mirror {
                Some(mirror) => mirror.zero(at, count, may_free).await,
                None => self.top_layer().zero(at, count, may_free).await,
            }
        }))
    }

    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        Box::pin(self.when_there_is_room(async move || {
            let _pass = self.enter(at, count).await?;
            // During a commit both sides would have to agree on what it reads as: the hint is not taken.
            if self.mirror.borrow().is_some() {
                return Ok(());
            }
            self.top_layer().unmap(at, count).await
        }))
    }

    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        let top = self.top_layer();
        Box::pin(async move { top.status(at, count, since, out).await })
    }

    fn compare_and_write<'a>(
        &'a self,
        at: Sector,
        expected: &'a Segments<'a>,
        new: &'a Segments<'a>,
    ) -> Io<'a> {
        // Not held for want of room: tried again it could miscompare with a part of its own work.
        Box::pin(async move {
            let pass = self.enter(at, new.len() as u64 / block::SECTOR_BYTES).await?;
            let mirrored = self.mirror.borrow().is_some();
            if !mirrored && self.links.borrow().len() == 1 {
                return self.top_layer().compare_and_write(at, expected, new).await;
            }
            drop(pass);
            let _alone = self.gate.alone().await;
            let mut found = Buffer::zeroed(expected.len());
            self.top_layer().read(at, &SegmentsMut::new(&mut found)).await?;
            exclusive::compare(expected, &found)?;
            self.write_through(at, new, Safe::AtNextFlush).await
        })
    }

    fn flush(&self) -> Io<'_> {
        if self.read_only {
            return ready(Ok(()));
        }
        Box::pin(self.when_there_is_room(async move || self.flush_once().await))
    }
}
