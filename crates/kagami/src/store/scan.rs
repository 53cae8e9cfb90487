//! `rdm scan`: the three places of every identity compared, mappings without LUN and LUNs without mapping, and what is
//! lost of a mapping written again from what is left (R7). Never guessed.

use std::collections::BTreeSet;
use std::rc::Rc;

use array::Claim;
use block::{Disk, Sector, SegmentsMut};
use vm::Datastore;
use vmdisk::ChainError;
use vmdisk::folder::Folder as _;
use vmdisk::rdm::Luns as _;
use vmdisk::rdm::{Copies, Identity, IdentityError, Mode, Place, Resolution, Verdict, What, resolve};
use vmfs::format::InodeKind;

use super::Store;
use super::disks::{chain_problem, folder};
use super::luns::{FoundLun, visible_lun};
use crate::model::ScanView;
use crate::problem::Outcome;
use crate::units::show_size;

/// How far into a LUN content is looked for, in bytes.
const LOOK_BYTES: usize = 128 << 10;

/// Name of the mapping file next to a descriptor.
fn mapping_path(path: &str, mode: Mode) -> String {
    format!("{}{}.vmdk", path.trim_end_matches(".vmdk"), mode.suffix())
}

/// The descriptor that a mapping file is named after.
fn descriptor_path(path: &str) -> Option<String> {
    let stem = path.strip_suffix(".vmdk")?;
    let stem =
        stem.strip_suffix(Mode::Physical.suffix()).or_else(|| stem.strip_suffix(Mode::Virtual.suffix()))?;
    Some(format!("{stem}.vmdk"))
}

fn place_name(place: Place) -> &'static str {
    match place {
        Place::Inode => "the mapping file",
        Place::Descriptor => "the descriptor",
        Place::Claim => "the claim on the LUN",
    }
}

fn what_text(what: &What) -> String {
    match what {
        What::Missing => "is missing".into(),
        What::Damaged(error) => format!("is damaged ({error})"),
        What::Newer(error) => format!("is not touched: {error}"),
        What::Differs(field) => format!("says another {field}"),
    }
}

impl Store {
    /// Compares the three places of all identities, and with `rebuild` writes again what is lost.
    pub async fn scan_rdms(&self, rebuild: bool) -> Outcome<ScanView> {
        let _turn = self.turn.take().await;
        let mut scan = ScanView { findings: Vec::new(), rebuilt: Vec::new() };
        for datastore in self.open_datastores_now() {
            let mut lost = BTreeSet::new();
            for (path, kind) in self.files_on(&datastore).await? {
                match kind {
                    InodeKind::File if super::disks::is_descriptor_name(&path) => {
                        self.scan_descriptor(&datastore, &path, rebuild, &mut scan, &mut lost).await?;
                    }
                    InodeKind::Rdm => {
                        let Some(descriptor) = descriptor_path(&path) else { continue };
                        if datastore.volume.entry(&descriptor).await.is_err() {
                            lost.insert(descriptor);
                        }
                    }
                    _ => {}
                }
            }
            for found in self.all_luns() {
                if let Some(Claim::Mapping { datastore: on, path, .. }) = found.lun.claimed_by()
                    && on == datastore.name
                    && datastore.volume.entry(&path).await.is_err()
                {
                    lost.insert(path);
                }
            }
            for path in lost {
                self.scan_lost(&datastore, &path, rebuild, &mut scan).await?;
            }
        }
        self.scan_luns(&mut scan).await;
        Ok(scan)
    }

    /// LUNs on which nobody stands, and those whose holder is not here.
    async fn scan_luns(&self, scan: &mut ScanView) {
        for found in self.all_luns() {
            let (lun, size) = (found.lun.name(), show_size(found.lun.shape().bytes()));
            match found.lun.claimed_by() {
                None => {
                    let content = content_of(&*found.lun).await;
                    scan.findings.push(format!("LUN {lun} ({size}, {content}) is mapped nowhere"));
                }
                Some(Claim::Mapping { datastore, .. } | Claim::Datastore { label: datastore, .. })
                    if self.open_datastore_now(&datastore).is_err()
                        && self.datastore_on(found.lun.uuid()).is_none() =>
                {
                    scan.findings.push(format!("LUN {lun} ({size}): datastore {datastore} is not here"));
                }
                Some(_) => {}
            }
        }
    }

    async fn scan_descriptor(
        &self,
        datastore: &Rc<Datastore>,
        path: &str,
        rebuild: bool,
        scan: &mut ScanView,
        lost: &mut BTreeSet<String>,
    ) -> Outcome {
        let name = format!("[{}] {}", datastore.name, path.trim_start_matches('/'));
        let mut copies = match vmdisk::create::read_copies(&folder(datastore), path).await {
            Ok(copies) => copies,
            // A plain disk, or a text that is none of ours.
            Err(ChainError::Unsupported { .. }) => {
                if let Some(found) = self.claimed_by(datastore, path) {
                    let lun = found.lun.name();
                    scan.findings
                        .push(format!("{name}: is no mapping, though LUN {lun} says that it maps it"));
                }
                return Ok(());
            }
            Err(ChainError::Descriptor { source, .. }) => {
                if self.is_mapping_by_others(datastore, path).await {
                    scan.findings.push(format!("{name}: the descriptor is damaged ({source})"));
                    lost.insert(path.to_owned());
                }
                return Ok(());
            }
            Err(error) => {
                scan.findings.push(format!("{name}: cannot be read: {error}"));
                return Ok(());
            }
        };
        let claiming = self.all_claiming(datastore, path);
        copies.claim = claiming.first().map(|f| (visible_lun(&f.lun).identity, claimed_mode(f)));
        let verdict = copies.compare();
        for finding in &verdict.findings {
            scan.findings.push(format!("{name}: {} {}", place_name(finding.place), what_text(&finding.what)));
        }
        let Some(identity) = &verdict.identity else {
            if !verdict.findings.iter().any(|f| matches!(f.what, What::Newer(_))) {
                scan.findings
                    .push(format!("{name}: its identity is lost: kagami rdm remap '{name}' --to LUN"));
            }
            return Ok(());
        };
        self.scan_lun_of(&name, identity, scan).await;
        let stray = claiming.iter().filter(|f| Some(f.lun.uuid()) != identity.lun.uuid).count();
        if rebuild && (stray > 0 || !verdict.findings.is_empty()) {
            self.rebuild_places(datastore, path, &verdict, identity).await?;
            scan.rebuilt.push(name);
        }
        Ok(())
    }

    /// What became of the LUN that a mapping means.
    async fn scan_lun_of(&self, name: &str, identity: &Identity, scan: &mut ScanView) {
        let visible = self.visible();
        let told = match resolve(identity, &visible) {
            Resolution::Resolved(_) => return,
            Resolution::Larger(lun) => format!("LUN {} has grown: kagami rdm grow '{name}'", lun.name),
            Resolution::Smaller(lun) => format!("LUN {} has shrunk: it opens read-only at most", lun.name),
            Resolution::BlockSize(lun) => format!("LUN {} has another block size: refused", lun.name),
            Resolution::Missing(_) => {
                let missing = format!("LUN {} is not here: bring it back", identity.lun.display());
                match &self.candidates(identity).await[..] {
                    [] => format!("{missing}, or kagami rdm remap"),
                    list => format!(
                        "{missing}; the same content, as far as samples tell, is on {}: kagami rdm remap '{name}' --to {}",
                        list.join(", "),
                        list[0]
                    ),
                }
            }
            Resolution::Ambiguous(luns) => {
                let names: Vec<&str> = luns.iter().map(|l| l.name.as_str()).collect();
                format!("several LUNs say that they are it: {}: refused", names.join(", "))
            }
        };
        scan.findings.push(format!("{name}: {told}"));
    }

    /// A descriptor that is gone or cannot be read: what the mapping file and the claim say of it.
    async fn scan_lost(
        &self,
        datastore: &Rc<Datastore>,
        path: &str,
        rebuild: bool,
        scan: &mut ScanView,
    ) -> Outcome {
        let name = format!("[{}] {}", datastore.name, path.trim_start_matches('/'));
        let (mut inode, mut leftovers) = (Err(IdentityError::None), Vec::new());
        for mode in [Mode::Virtual, Mode::Physical] {
            let file = mapping_path(path, mode);
            if let Ok(mapping) = datastore.folder.read_mapping(&file).await {
                inode = mapping.identity(mode);
                leftovers.push(file);
            }
        }
        let claim = self.claimed_by(datastore, path);
        let claim = claim.map(|f| (visible_lun(&f.lun).identity, claimed_mode(&f)));
        let verdict = Copies { inode, descriptor: Err(IdentityError::None), claim }.compare();
        let Some(identity) = &verdict.identity else {
            scan.findings.push(format!(
                "{name}: its descriptor is gone, and what is left does not agree: kagami rdm remap"
            ));
            return Ok(());
        };
        scan.findings.push(format!("{name}: its descriptor is gone; it maps {}", identity.lun.display()));
        if !rebuild {
            return Ok(());
        }
        self.make_parents(datastore, path).await?;
        self.rebuild_places(datastore, path, &verdict, identity).await?;
        // After a conversion the mapping file had the name of the other mode.
        for file in leftovers.iter().filter(|f| **f != mapping_path(path, identity.mode)) {
            if let Err(error) = datastore.volume.remove(file).await {
                tracing::warn!(file, %error, "a mapping file that is not used any more stays");
            }
        }
        scan.rebuilt.push(name);
        Ok(())
    }

    /// Writes the identity that counts to the places that say something else.
    async fn rebuild_places(
        &self,
        datastore: &Rc<Datastore>,
        path: &str,
        verdict: &Verdict,
        identity: &Identity,
    ) -> Outcome {
        if verdict.findings.iter().any(|f| f.place != Place::Claim) {
            self.with_closed(datastore, path, "rebuilt", async || {
                vmdisk::create::rebuild_rdm(&folder(datastore), path, identity)
                    .await
                    .map_err(|e| chain_problem(format!("[{}] {path} was not rebuilt", datastore.name), &e))
            })
            .await?;
        }
        let wanted = self.mapping_claim(datastore, path, identity.mode);
        for found in self.all_claiming(datastore, path) {
            if Some(found.lun.uuid()) != identity.lun.uuid || found.lun.claimed_by().as_ref() != Some(&wanted)
            {
                self.release(&found).await?;
            }
        }
        let mapped = self.all_luns().into_iter().find(|f| Some(f.lun.uuid()) == identity.lun.uuid);
        if let Some(found) = mapped.filter(|f| f.lun.claimed_by().is_none()) {
            self.set_claim(&found, wanted).await?;
        }
        self.retry_exports().await;
        Ok(())
    }

    /// LUNs that say they are mapped by this descriptor; more than one after a remap that was cut short.
    fn all_claiming(&self, datastore: &Datastore, path: &str) -> Vec<FoundLun> {
        let says = |f: &FoundLun| match f.lun.claimed_by() {
            Some(Claim::Mapping { datastore: on, path: at, .. }) => on == datastore.name && at == path,
            _ => false,
        };
        self.all_luns().into_iter().filter(says).collect()
    }

    /// A mapping file or a claim says that this damaged text was the descriptor of a mapping.
    async fn is_mapping_by_others(&self, datastore: &Rc<Datastore>, path: &str) -> bool {
        for mode in [Mode::Virtual, Mode::Physical] {
            if datastore.folder.read_mapping(&mapping_path(path, mode)).await.is_ok() {
                return true;
            }
        }
        self.claimed_by(datastore, path).is_some()
    }
}

fn claimed_mode(found: &FoundLun) -> Mode {
    match found.lun.claimed_by() {
        Some(Claim::Mapping { physical: true, .. }) => Mode::Physical,
        _ => Mode::Virtual,
    }
}

/// What lies on a LUN, in words: file system and label, or partition table.
async fn content_of(disk: &dyn Disk) -> String {
    let whole = usize::try_from(disk.shape().bytes()).unwrap_or(usize::MAX);
    let mut bytes = vec![0; LOOK_BYTES.min(whole) / 512 * 512];
    match disk.read(Sector(0), &SegmentsMut::new(&mut bytes)).await {
        Ok(()) => known_content(&bytes),
        Err(error) => format!("cannot be read: {error}"),
    }
}

/// Signatures at the offsets that each format's own documentation names.
fn known_content(bytes: &[u8]) -> String {
    let at = |offset: usize, magic: &[u8]| bytes.get(offset..).is_some_and(|b| b.starts_with(magic));
    let label = |offset: usize, length: usize| {
        let raw = bytes.get(offset..offset + length).unwrap_or_default();
        let text: String = raw.iter().take_while(|b| **b != 0).map(|b| char::from(*b)).collect();
        let clean = text.trim();
        if clean.is_empty() || !clean.bytes().all(|b| b.is_ascii_graphic() || b == b' ') {
            String::new()
        } else {
            format!(" \"{clean}\"")
        }
    };
    if at(1080, &[0x53, 0xef]) {
        return format!("ext file system{}", label(1144, 16));
    }
    if at(0, b"XFSB") {
        return format!("XFS{}", label(108, 12));
    }
    if at(0x1_0040, b"_BHRfS_M") {
        return format!("btrfs{}", label(0x1_012b, 64));
    }
    for (offset, magic, name) in [
        (3, &b"NTFS    "[..], "NTFS"),
        (512, b"EFI PART", "GPT partition table"),
        (512, b"LABELONE", "LVM physical volume"),
        (4086, b"SWAPSPACE2", "swap space"),
        (510, &[0x55, 0xaa], "MBR partition table"),
    ] {
        if at(offset, magic) {
            return name.to_owned();
        }
    }
    if bytes.iter().all(|b| *b == 0) { "nothing at its beginning" } else { "unknown content" }.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapping_files_are_named_after_their_descriptors() {
        for mode in [Mode::Virtual, Mode::Physical] {
            let file = mapping_path("/vm/d.vmdk", mode);
            assert_eq!(descriptor_path(&file).as_deref(), Some("/vm/d.vmdk"), "{file}");
        }
        assert_eq!(descriptor_path("/vm/d-flat.vmdk"), None);
    }

    #[test]
    fn contents_are_known_by_their_signatures() {
        let mut bytes = vec![0; 4096];
        assert_eq!(known_content(&bytes), "nothing at its beginning");
        bytes[1080..1082].copy_from_slice(&[0x53, 0xef]);
        bytes[1144..1148].copy_from_slice(b"data");
        assert_eq!(known_content(&bytes), "ext file system \"data\"");
        bytes[1144] = 7;
        assert_eq!(known_content(&bytes), "ext file system");
        assert_eq!(known_content(b"short"), "unknown content");
    }
}
