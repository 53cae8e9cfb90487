//! Putting a redo log on top of a running disk, in two phases, for the one cut (semantics page, chapter 10).
//!
//! [`VmDisk::prepare_redo`] makes everything durable that the switch needs. Inside the closed gate
//! [`PreparedRedo::switch`] only changes memory. The caller's record decides: until it is durable the guest's flushes
//! are held, so what is rolled back was never promised.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use block::Disk;

use crate::chain::{ChainError, MAX_LINKS, PARENT_CONTENT_KEY};
use crate::claims::Hold;
use crate::commit;
use crate::descriptor::{
    Access, Cid, CreateType, Descriptor, ExtentKind, ExtentLine, NewDescriptor, long_content_id,
};
use crate::disk::{Link, LinkKind, VmDisk, rewrite};
use crate::folder::{Folder, FolderError, Provision, directory, file_name, sibling};
use crate::layer::Layer;
use crate::rdm::Mode;
use crate::redo::RedoDisk;

/// Grains of a new redo log, in sectors: one, as ESX makes its deltas, so a write never reads what it replaces.
pub const GRAIN_SECTORS: u64 = 1;

/// The chain lock (R16): one switch or commit at a time.
pub(crate) struct ChainLock {
    taken: Rc<Cell<bool>>,
    stuck: Cell<bool>,
}

impl ChainLock {
    pub(crate) fn take(disk: &VmDisk) -> Result<Self, ChainError> {
        if disk.chain_lock.replace(true) {
            let what = format!("{}: a cut or a commit of this disk is under way", disk.top_path());
            return Err(ChainError::Refused(what));
        }
        Ok(Self { taken: Rc::clone(&disk.chain_lock), stuck: Cell::new(false) })
    }

    /// Nobody takes it again until the disk is opened anew.
    pub(crate) fn stick(&self) {
        self.stuck.set(true);
    }
}

impl Drop for ChainLock {
    fn drop(&mut self) {
        if !self.stuck.get() {
            self.taken.set(false);
        }
    }
}

/// A redo log that is there, durable, and not in use yet.
pub struct PreparedRedo {
    disk: Rc<VmDisk>,
    link: Rc<Link>,
    lock: ChainLock,
}

/// A redo log that took over; the record that makes it last is not durable yet.
pub struct SwitchedRedo {
    disk: Rc<VmDisk>,
    below: Rc<Layer>,
    /// Taken out by whatever ends this state.
    lock: Option<ChainLock>,
}

impl VmDisk {
    /// The descriptor that the next redo log of this disk gets: the next free name in the row `disk-000001.vmdk`.
    pub async fn next_redo_path(&self) -> Result<String, ChainError> {
        next_name(&*self.folder, &self.top_path()).await
    }

    /// As [`VmDisk::prepare_redo_at`], under the next free name.
    pub async fn prepare_redo(self: &Rc<Self>) -> Result<PreparedRedo, ChainError> {
        let path = self.next_redo_path().await?;
        self.prepare_redo_at(&path).await
    }

    /// Makes an empty redo log for this disk: its file, its descriptor at `path` (R15), all durable. Nothing is in use
    /// yet. Whoever keeps a job record asks for the name first, so that the record has it before the file is there.
    pub async fn prepare_redo_at(self: &Rc<Self>, path: &str) -> Result<PreparedRedo, ChainError> {
        let lock = ChainLock::take(self)?;
        let parent = self.top_link();
        self.refuse_redo()?;
        let (path, extent) = (path.to_owned(), extent_of(path));
        // The parent's CID must not change any more: the session's is written now if it was not yet (R19).
        self.touch().await?;
        let sectors = self.shape().sectors;
        let file = self.folder.create(&extent, 0, RedoDisk::longest_file(sectors), Provision::Thin).await?;
        let redo_error = |source| ChainError::Redo { path: path.clone(), source };
        RedoDisk::create(&*file, sectors, GRAIN_SECTORS).await.map_err(redo_error)?;
        let descriptor = child_descriptor(&parent, &extent, sectors)
            .map_err(|source| ChainError::Descriptor { path: path.clone(), source })?;
        self.folder.replace(&path, &descriptor.to_bytes()).await?;
        let below = Rc::clone(&parent.layer) as Rc<dyn Disk>;
        let redo = RedoDisk::open(file, below, false, true).await.map_err(redo_error)?;
        let claims = [
            self.folder.claims().take(&path, Hold::Write)?,
            self.folder.claims().take(&extent, Hold::Write)?,
        ];
        let link = Rc::new(Link {
            path,
            extent,
            kind: LinkKind::Redo,
            descriptor: RefCell::new(descriptor),
            layer: Layer::new(Rc::clone(&redo) as Rc<dyn Disk>, false),
            redo: Some(redo),
            claims,
        });
        // Its first write needs a CID of its own (R15, R19). Written now, so that no write waits for it.
        rewrite(&*self.folder, &link, |descriptor| {
            descriptor.set_cid(Cid::random());
            Ok(())
        })
        .await?;
        Ok(PreparedRedo { disk: Rc::clone(self), link, lock })
    }

    fn refuse_redo(&self) -> Result<(), ChainError> {
        let path = self.top_path();
        if let Some((Mode::Physical, identity)) = self.rdm() {
            let lun = identity.lun.display();
            return Err(ChainError::Refused(format!(
                "{path}: a physical RDM has no redo log (R4); the same cut takes an array snapshot of {lun} instead"
            )));
        }
        if self.shape().read_only {
            return Err(ChainError::Refused(format!("{path}: is open read-only")));
        }
        let (told, sectors) = (self.top_link().descriptor.borrow().sectors(), self.shape().sectors);
        if told != sectors {
            return Err(ChainError::Refused(format!(
                "{path}: its descriptor says {told} sectors and its mapping {sectors}: a change was cut short; \
                 `kagami rdm scan --rebuild` ends it"
            )));
        }
        let links = self.links.borrow();
        if links.last().is_some_and(|l| l.claims[0].is_shared()) {
            return Err(ChainError::Refused(format!("{path}: a disk shared by several VMs has no redo log")));
        }
        if links.len() >= MAX_LINKS {
            return Err(ChainError::TooDeep { path });
        }
        Ok(())
    }
}

/// The child's descriptor as it is born (R15): parentCID and CID are the parent's.
fn child_descriptor(
    parent: &Link,
    extent: &str,
    sectors: u64,
) -> Result<Descriptor, crate::descriptor::DescriptorError> {
    let above = parent.descriptor.borrow();
    let mut ddb = vec![("ddb.longContentID".to_owned(), long_content_id(above.cid()))];
    if let Some(content) = above.get("ddb.longContentID") {
        ddb.push((PARENT_CONTENT_KEY.to_owned(), content.to_owned()));
    }
    let extent = ExtentLine {
        access: Access::ReadWrite,
        sectors,
        kind: ExtentKind::VmfsSparse,
        file: file_name(extent).to_owned(),
        offset: 0,
    };
    Descriptor::new(&NewDescriptor {
        cid: above.cid(),
        parent: Some((above.cid(), file_name(&parent.path).to_owned())),
        create_type: CreateType::VmfsSparse,
        extents: vec![extent],
        ddb,
    })
}

/// The extent of the redo log whose descriptor is at `path`.
fn extent_of(path: &str) -> String {
    format!("{}-delta.vmdk", path.strip_suffix(".vmdk").unwrap_or(path))
}

/// The next name in the row `disk-000001.vmdk`.
async fn next_name(folder: &dyn Folder, parent: &str) -> Result<String, ChainError> {
    let name = file_name(parent);
    let stem = name.strip_suffix(".vmdk").unwrap_or(name);
    let stem = match stem.rsplit_once('-') {
        Some((before, digits)) if digits.len() == 6 && digits.bytes().all(|b| b.is_ascii_digit()) => before,
        _ => stem,
    };
    let place = directory(parent);
    let number = |name: &String| -> Option<u32> {
        let rest = name.strip_prefix(stem)?.strip_prefix('-')?;
        rest.get(..6)?.parse().ok()
    };
    let list = folder.list(if place.is_empty() { "/" } else { place }).await?;
    let next = list.iter().filter_map(number).max().unwrap_or(0) + 1;
    Ok(format!("{place}/{stem}-{next:06}.vmdk"))
}

impl PreparedRedo {
    /// The redo log's descriptor: what the VMX names once the switch counts.
    pub fn redo_path(&self) -> &str {
        &self.link.path
    }

    /// The descriptor that is frozen by the switch.
    pub fn frozen_path(&self) -> String {
        self.disk.top_path()
    }

    /// The disk it belongs to.
    pub fn disk(&self) -> &Rc<VmDisk> {
        &self.disk
    }

    /// Takes over, in memory only. The gate must be closed and drained; flushes are held from here on, until
    /// [`SwitchedRedo::keep`] or [`SwitchedRedo::roll_back`].
    pub fn switch(self) -> SwitchedRedo {
        let disk = self.disk;
        assert!(
            disk.gate.is_closed() && disk.gate.inside() == 0,
            "a switch happens inside a closed, empty gate"
        );
        let below = disk.top_layer();
        below.freeze(true);
        let frozen = disk.top_link();
        for claim in &frozen.claims {
            // This disk is the one holder: nobody else can have opened what it writes.
            if let Err(error) = claim.change(Hold::Read) {
                tracing::error!(%error, "the claim on a frozen link could not be lowered");
            }
        }
        *disk.top.borrow_mut() = Rc::clone(&self.link.layer);
        disk.links.borrow_mut().push(self.link);
        disk.set_touched(true);
        disk.flushes.close();
        SwitchedRedo { disk, below, lock: Some(self.lock) }
    }

    /// Takes the files away again.
    pub async fn abandon(self) -> Result<(), ChainError> {
        let (folder, path) = (Rc::clone(&self.disk.folder), self.link.path.clone());
        drop(self);
        remove_link(&*folder, &path).await
    }
}

impl SwitchedRedo {
    /// Undoes the switch inside the still closed gate: no write has seen it.
    pub fn undo(mut self) -> Option<PreparedRedo> {
        let disk = Rc::clone(&self.disk);
        assert!(disk.gate.is_closed() && disk.gate.inside() == 0, "undone only inside the closed gate");
        let lock = self.lock.take()?;
        let link = disk.links.borrow_mut().pop()?;
        *disk.top.borrow_mut() = Rc::clone(&self.below);
        self.below.freeze(false);
        for claim in &disk.top_link().claims {
            if let Err(error) = claim.change(Hold::Write) {
                tracing::error!(%error, "the claim on a link could not be raised again");
            }
        }
        disk.flushes.open();
        Some(PreparedRedo { disk, link, lock })
    }

    /// The disk as it was at the cut, read-only.
    pub fn frozen(&self) -> Rc<dyn Disk> {
        Rc::clone(&self.below) as Rc<dyn Disk>
    }

    /// Makes the frozen disk durable: before the record, after the gate.
    pub async fn settle(&self) -> Result<(), ChainError> {
        Ok(self.below.flush().await?)
    }

    /// The record is durable: the switch lasts, held flushes are answered.
    pub fn keep(mut self) {
        self.end();
    }

    /// The record could not be written: the redo log is folded back and removed, then held flushes are answered. The
    /// gate must be open again.
    pub async fn roll_back(mut self) -> Result<(), ChainError> {
        let Some(lock) = self.lock.take() else { return Ok(()) };
        let into = self.disk.links.borrow().len().saturating_sub(2);
        let commit = commit::Commit::start(&self.disk, into, lock, commit::Mark::None).await;
        let result = async {
            let commit = commit?;
            commit.copy(&mut |_| true).await?;
            // Nothing was promised since the switch, so the fold needs no record of its own.
            commit.flip(async || Ok(())).await
        };
        let left = result.await;
        // Not folded back, the redo log holds what the flushes that wait would promise, and no record names it.
        self.disk.undecided.set(left.is_err());
        self.disk.flushes.open();
        left?.remove().await
    }

    fn end(&mut self) {
        if self.lock.take().is_some() {
            self.disk.flushes.open();
        }
    }
}

impl Drop for SwitchedRedo {
    fn drop(&mut self) {
        // I8: a guest is never left waiting by us. Whoever drops this undecided has failed already, and the guest is
        // told, since a power loss may take the redo log away again.
        if self.lock.is_some() {
            self.disk.undecided.set(true);
        }
        self.end();
    }
}

/// Takes a link's files away: its extent, then its descriptor. What is gone already is no error.
pub async fn remove_link(folder: &dyn Folder, path: &str) -> Result<(), ChainError> {
    let gone = |result: Result<(), FolderError>| match result {
        Ok(()) | Err(FolderError::NotFound { .. }) => Ok(()),
        Err(error) => Err(error),
    };
    // An unreadable descriptor names no extent: by its name it is found all the same.
    let mut extents = vec![extent_of(path)];
    match folder.read_text(path).await {
        Ok(bytes) => {
            if let Ok(descriptor) = Descriptor::parse(&bytes) {
                extents = Vec::new();
                for extent in descriptor.extents() {
                    extents.push(sibling(path, &extent.file)?);
                }
            }
        }
        Err(FolderError::NotFound { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    for extent in extents {
        gone(folder.remove(&extent).await)?;
    }
    gone(folder.remove(path).await)?;
    Ok(())
}

/// After a crash: a switch was prepared, and the record is there (`decided`) or not. Decided, the redo log at `path`
/// is the top and everything it needs is durable; else its files are removed. Runs before the disk opens.
pub async fn recover_switch(folder: &dyn Folder, path: &str, decided: bool) -> Result<(), ChainError> {
    if decided {
        crate::chain::load_descriptor(folder, path, None).await?;
        return Ok(());
    }
    remove_link(folder, path).await
}
