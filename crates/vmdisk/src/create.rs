//! Making, changing and deleting disks: flat files, mappings.

use std::rc::Rc;

use block::SECTOR_BYTES;

use crate::chain::{ChainError, children, load_descriptor};
use crate::claims::Hold;
use crate::descriptor::{
    Access, Cid, CreateType, Descriptor, ExtentKind, ExtentLine, NewDescriptor, long_content_id,
    new_disk_uuid,
};
use crate::disk::THIN_KEY;
use crate::folder::{Folder, Provision, directory, file_name, sibling};
use crate::rdm::{Copies, Identity, IdentityError, LunIdentity, Mapping, Mode, same_lun};
use crate::switch::remove_link;

/// Makes a flat disk of `sectors` sectors: `name.vmdk` and `name-flat.vmdk`.
pub async fn create_flat(
    folder: &Rc<dyn Folder>,
    path: &str,
    sectors: u64,
    provision: Provision,
) -> Result<(), ChainError> {
    let extent = extent_path(path, "-flat")?;
    refuse_size(path, sectors)?;
    refuse_taken(&**folder, path).await?;
    let mut ddb = new_ddb();
    if provision == Provision::Thin {
        ddb.push((THIN_KEY.to_owned(), "1".to_owned()));
    }
    let text = descriptor_text(path, CreateType::Vmfs, ExtentKind::Vmfs, &extent, sectors, ddb)?;
    drop(folder.create(&extent, sectors, sectors, provision).await?);
    let named = folder.replace(path, &text.to_bytes()).await;
    if named.is_err() {
        // Without its descriptor nobody finds the extent: it is taken away again.
        folder.remove(&extent).await?;
    }
    Ok(named?)
}

/// Maps a LUN: `name.vmdk` and `name-rdm.vmdk` or `name-rdmp.vmdk`, identity in both (R7). The third copy, the claim on
/// the LUN, is the caller's to make, before this: a LUN that is mapped elsewhere is refused there.
pub async fn create_rdm(
    folder: &Rc<dyn Folder>,
    path: &str,
    lun: &LunIdentity,
    mode: Mode,
) -> Result<(), ChainError> {
    let extent = extent_path(path, mode.suffix())?;
    refuse_size(path, lun.sectors)?;
    refuse_taken(&**folder, path).await?;
    let identity = Identity { mode, lun: lun.clone() };
    let failed = |source| ChainError::Identity { path: path.to_owned(), source };
    let mapping = Mapping::new(&identity).map_err(failed)?;
    let create_type = mode.create_type();
    let mut text = descriptor_text(path, create_type, ExtentKind::VmfsRdm, &extent, lun.sectors, new_ddb())?;
    identity.to_ddb(&mut text).map_err(failed)?;
    folder.write_mapping(&extent, &mapping).await?;
    let named = folder.replace(path, &text.to_bytes()).await;
    if named.is_err() {
        folder.remove(&extent).await?;
    }
    Ok(named?)
}

/// Deletes one link: descriptor and extent. A disk that is open, or that has children, is refused. The data of a
/// mapped LUN is not touched.
pub async fn delete(folder: &Rc<dyn Folder>, path: &str) -> Result<(), ChainError> {
    let _claim = folder.claims().take(path, Hold::Write)?;
    if let Some(child) = children(folder, path).await?.first() {
        return Err(ChainError::Refused(format!(
            "{path}: {child} is made over it; delete or commit that first"
        )));
    }
    // A torn descriptor is deleted too, but not what is no disk at all.
    folder.read_text(path).await?;
    remove_link(&**folder, path).await
}

/// Changes the mode of a mapping in place, VM off (R6). The descriptor's create type decides and changes in one atomic
/// write; the inode's copy of the mode follows.
pub async fn convert_rdm(folder: &Rc<dyn Folder>, path: &str, mode: Mode) -> Result<(), ChainError> {
    change_rdm(folder, path, |identity| {
        identity.mode = mode;
        Ok(())
    })
    .await
}

/// Takes note of a LUN that has grown (chapter 2.2): record, descriptor and geometry get the LUN's length of now.
/// Refused with a redo log over it: a chain has one length.
pub async fn grow_rdm(folder: &Rc<dyn Folder>, path: &str, lun: &LunIdentity) -> Result<(), ChainError> {
    change_rdm(folder, path, |identity| {
        if lun.sectors < identity.lun.sectors {
            let (was, is) = (identity.lun.sectors, lun.sectors);
            return Err(ChainError::Refused(format!(
                "the LUN is shorter than it was: {is} sectors, {was} mapped"
            )));
        }
        identity.lun.sectors = lun.sectors;
        identity.lun.seen = lun.seen.clone();
        Ok(())
    })
    .await
}

/// Points a mapping to another LUN, after the operator has seen both. Answers the old identity, for the audit record
/// and for undoing it.
pub async fn remap_rdm(
    folder: &Rc<dyn Folder>,
    path: &str,
    to: &LunIdentity,
) -> Result<Identity, ChainError> {
    let mut old = None;
    change_rdm(folder, path, |identity| {
        old = Some(identity.clone());
        identity.lun = to.clone();
        Ok(())
    })
    .await?;
    old.ok_or_else(|| ChainError::Refused(format!("{path}: has no identity")))
}

/// Writes the identity that counts into inode and descriptor, whatever is in them: after a comparison of the three
/// copies ([`crate::rdm::Copies::compare`]) or a scan found it.
pub async fn rebuild_rdm(folder: &Rc<dyn Folder>, path: &str, identity: &Identity) -> Result<(), ChainError> {
    let _claim = folder.claims().take(path, Hold::Write)?;
    let descriptor = match load_descriptor(&**folder, path, None).await {
        Ok(descriptor) => descriptor,
        Err(ChainError::Missing { .. } | ChainError::Descriptor { .. }) => {
            let extent = extent_path(path, identity.mode.suffix())?;
            let (create_type, sectors) = (identity.mode.create_type(), identity.lun.sectors);
            descriptor_text(path, create_type, ExtentKind::VmfsRdm, &extent, sectors, new_ddb())?
        }
        Err(error) => return Err(error),
    };
    write_identity(&**folder, path, descriptor, identity).await
}

/// Reads the copies that lie in the folder; the third, the LUN's claim, the caller fills in.
pub async fn read_copies(folder: &Rc<dyn Folder>, path: &str) -> Result<Copies, ChainError> {
    let descriptor = load_descriptor(&**folder, path, None).await?;
    let mode = rdm_mode(path, &descriptor)?;
    let extent = sibling(path, &descriptor.extents()[0].file)?;
    let inode = match folder.read_mapping(&extent).await {
        Ok(mapping) => mapping.identity(mode),
        Err(crate::FolderError::NotFound { .. }) => Err(IdentityError::None),
        Err(error) => return Err(error.into()),
    };
    Ok(Copies { inode, descriptor: Identity::from_ddb(&descriptor), claim: None })
}

async fn change_rdm(
    folder: &Rc<dyn Folder>,
    path: &str,
    change: impl FnOnce(&mut Identity) -> Result<(), ChainError>,
) -> Result<(), ChainError> {
    let descriptor = load_descriptor(&**folder, path, None).await?;
    let mode = rdm_mode(path, &descriptor)?;
    let extent = sibling(path, &descriptor.extents()[0].file)?;
    // Both files, so that an open disk is refused whatever it is opened by.
    let _claims = [folder.claims().take(path, Hold::Write)?, folder.claims().take(&extent, Hold::Write)?];
    if let Some(child) = children(folder, path).await?.first() {
        return Err(ChainError::Refused(format!("{path}: has a redo log, {child}; commit it first")));
    }
    let failed = |source| ChainError::Identity { path: path.to_owned(), source };
    let mut identity = folder.read_mapping(&extent).await?.identity(mode).map_err(failed)?;
    identity.mode = mode;
    change(&mut identity)?;
    write_identity(&**folder, path, descriptor, &identity).await
}

/// Descriptor first, in one atomic write: it decides the mode. The inode follows and decides the LUN; a power loss in
/// between leaves a mapping that opens as it was (see [`settled_sectors`]) until the same is done again, or until the
/// comparison of the copies mends it. What a newer program wrote stays.
async fn write_identity(
    folder: &dyn Folder,
    path: &str,
    mut descriptor: Descriptor,
    identity: &Identity,
) -> Result<(), ChainError> {
    let failed = |source| ChainError::Identity { path: path.to_owned(), source };
    let mapping = Mapping::new(identity).map_err(failed)?;
    let extent = ExtentLine { sectors: identity.lun.sectors, ..descriptor.extents()[0].clone() };
    let file = sibling(path, &extent.file)?;
    let in_inode = folder.read_mapping(&file).await.map(|m| Identity::from_record(&m.tail));
    for found in [Identity::from_ddb(&descriptor), in_inode.unwrap_or(Err(IdentityError::None))] {
        if let Err(newer) = found
            && newer.is_newer()
        {
            return Err(failed(newer));
        }
    }
    let invalid = |source| ChainError::Descriptor { path: path.to_owned(), source };
    descriptor.set_extent(0, extent).map_err(invalid)?;
    descriptor.set_create_type(identity.mode.create_type());
    identity.to_ddb(&mut descriptor).map_err(failed)?;
    folder.replace(path, &descriptor.to_bytes()).await?;
    folder.write_mapping(&file, &mapping).await?;
    Ok(())
}

/// The length of a mapping whose inode and descriptor say different ones: power failed between the two writes of a
/// change. The same LUN in both was about to grow: the smaller length. Another one was about to take its place: the inode
/// still has the old one. `None` when that cannot be told, as the descriptor's copy of the identity is not ours or damaged.
pub(crate) fn settled_sectors(inode: &Identity, descriptor: &Descriptor) -> Option<u64> {
    let other = Identity::from_ddb(descriptor).ok()?;
    match same_lun(&inode.lun, &other.lun) {
        true => Some(inode.lun.sectors.min(other.lun.sectors)),
        false => Some(inode.lun.sectors),
    }
}

fn rdm_mode(path: &str, descriptor: &Descriptor) -> Result<Mode, ChainError> {
    let what = format!("is no raw device mapping but {}", descriptor.create_type());
    let refused = ChainError::Unsupported { path: path.to_owned(), what };
    match Mode::of(descriptor.create_type()) {
        Some(mode) if descriptor.extents().len() == 1 => Ok(mode),
        _ => Err(refused),
    }
}

fn extent_path(path: &str, suffix: &str) -> Result<String, ChainError> {
    let name = file_name(path);
    match name.strip_suffix(".vmdk") {
        Some(stem) if !stem.is_empty() => Ok(format!("{}/{stem}{suffix}.vmdk", directory(path))),
        _ => Err(ChainError::Refused(format!("{path}: a disk's name ends in .vmdk"))),
    }
}

fn refuse_size(path: &str, sectors: u64) -> Result<(), ChainError> {
    if sectors == 0 || sectors > crate::descriptor::MAX_SECTORS {
        let bytes = sectors.saturating_mul(SECTOR_BYTES);
        return Err(ChainError::Refused(format!(
            "{path}: a disk has 512 bytes to 64 TiB, not {bytes} bytes"
        )));
    }
    Ok(())
}

async fn refuse_taken(folder: &dyn Folder, path: &str) -> Result<(), ChainError> {
    match folder.read_text(path).await {
        Err(crate::FolderError::NotFound { .. }) => Ok(()),
        Ok(_) => Err(crate::FolderError::Exists { path: path.to_owned() }.into()),
        Err(error) => Err(error.into()),
    }
}

fn new_ddb() -> Vec<(String, String)> {
    vec![("ddb.uuid".to_owned(), new_disk_uuid())]
}

fn descriptor_text(
    path: &str,
    create_type: CreateType,
    kind: ExtentKind,
    extent: &str,
    sectors: u64,
    mut ddb: Vec<(String, String)>,
) -> Result<Descriptor, ChainError> {
    let cid = Cid::random();
    ddb.push(("ddb.longContentID".to_owned(), long_content_id(cid)));
    let file = file_name(extent).to_owned();
    let extents = vec![ExtentLine { access: Access::ReadWrite, sectors, kind, file, offset: 0 }];
    let new = NewDescriptor { cid, parent: None, create_type, extents, ddb };
    Descriptor::new(&new).map_err(|source| ChainError::Descriptor { path: path.to_owned(), source })
}
