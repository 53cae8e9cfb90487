//! Raw device mappings: made, shown with their three places, grown, remapped, converted, rebuilt.

use std::rc::Rc;

use array::Claim;
use block::{Disk as _, SECTOR_BYTES};
use vm::Datastore;
use vmdisk::rdm::{self, Copies, LunIdentity, Luns, Mode, Place, Resolution, What};

use super::Store;
use super::disks::{chain_problem, check_descriptor_name, folder};
use super::doing::Doing;
use super::luns::{FoundLun, visible_lun};
use super::pools::pool_problem;
use crate::api::Change;
use crate::model::{ConvertRdm, NewRdm, Plan, RdmView, RemapRdm};
use crate::names::FileName;
use crate::problem::{Kind, Outcome, Problem};
use crate::units::show_size;

/// A mode by its name.
pub fn parse_mode(text: &str) -> Outcome<Mode> {
    match text {
        "virtual" | "rdm" => Ok(Mode::Virtual),
        "physical" | "rdmp" => Ok(Mode::Physical),
        other => {
            Err(Problem::usage(format!("\"{other}\" is no mode of a mapping")).hint("virtual or physical"))
        }
    }
}

fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Virtual => "virtual",
        Mode::Physical => "physical",
    }
}

/// How a LUN looks now; `None` when it cannot be read.
async fn content_tag(found: &FoundLun) -> Option<rdm::ContentTag> {
    let now = u64::try_from(jiff::Timestamp::now().as_second()).unwrap_or_default();
    let tag = rdm::content_tag(&*found.lun, now).await;
    tag.inspect_err(|error| tracing::warn!(lun = found.lun.name(), %error, "no tag of its content")).ok()
}

impl Store {
    /// The LUN whose claim names this descriptor.
    pub(super) fn claimed_by(&self, datastore: &Datastore, path: &str) -> Option<FoundLun> {
        self.all_luns().into_iter().find(|found| match found.lun.claimed_by() {
            Some(Claim::Mapping { datastore: on, path: at, .. }) => on == datastore.name && at == path,
            _ => false,
        })
    }

    /// Claims a LUN; refused when somebody else has it.
    pub(super) async fn set_claim(&self, found: &FoundLun, claim: Claim) -> Outcome {
        self.change_claim(found, Some(claim)).await
    }

    /// Gives the claim on a LUN up.
    pub(super) async fn release(&self, found: &FoundLun) -> Outcome {
        self.change_claim(found, None).await
    }

    async fn change_claim(&self, found: &FoundLun, claim: Option<Claim>) -> Outcome {
        let title = || format!("the claim on LUN \"{}\" was not changed", found.lun.name());
        found.lun.claim(claim).await.map_err(|e| pool_problem(title(), &e))
    }

    /// The three copies of a mapping's identity.
    async fn copies(&self, datastore: &Rc<Datastore>, path: &str) -> Outcome<(Copies, Option<FoundLun>)> {
        let name = FileName { datastore: datastore.name.clone(), path: path.to_owned() };
        let mut copies = vmdisk::create::read_copies(&folder(datastore), path)
            .await
            .map_err(|e| chain_problem(format!("{name} is no mapping that can be read"), &e))?;
        copies.claim = self.claimed_identity(datastore, path);
        Ok((copies, self.claimed_by(datastore, path)))
    }

    /// The third copy of a mapping's identity: the LUN whose claim names this descriptor, and the mode noted there.
    pub(super) fn claimed_identity(&self, datastore: &Datastore, path: &str) -> Option<(LunIdentity, Mode)> {
        let found = self.claimed_by(datastore, path)?;
        let physical = matches!(found.lun.claimed_by(), Some(Claim::Mapping { physical: true, .. }));
        Some((visible_lun(&found.lun).identity, if physical { Mode::Physical } else { Mode::Virtual }))
    }

    /// What a mapping records of a LUN: with a tag of its content, for the day on which it is missing.
    async fn recorded_identity(&self, found: &FoundLun) -> LunIdentity {
        let tag = content_tag(found).await;
        LunIdentity { tag, ..visible_lun(&found.lun).identity }
    }

    /// LUNs that nobody holds and that look like one that is missing: shown, never chosen (semantics page 2.2, step 5).
    pub(super) async fn candidates(&self, identity: &rdm::Identity) -> Vec<String> {
        let Some(wanted) = identity.lun.tag else { return Vec::new() };
        let nothing = rdm::content_tag(&block::MemoryDisk::new(identity.lun.sectors), 0).await;
        if nothing.is_ok_and(|nothing| nothing.hash == wanted.hash) {
            return Vec::new(); // every empty LUN looks like it
        }
        let mut found = Vec::new();
        for lun in self.all_luns() {
            let fits = lun.lun.claimed_by().is_none() && lun.lun.shape().sectors == identity.lun.sectors;
            if fits && content_tag(&lun).await.is_some_and(|tag| tag.hash == wanted.hash) {
                found.push(lun.lun.name());
            }
        }
        found
    }

    /// Before the daemon ends: mappings record how their LUNs look now. Only where all three places are sound; what
    /// cannot be read or written stays as it was.
    pub(super) async fn refresh_tags(&self) {
        for datastore in self.open_datastores_now() {
            for path in self.descriptors_on(&datastore).await.unwrap_or_default() {
                let Some(found) = self.claimed_by(&datastore, &path) else { continue };
                let Ok((copies, _)) = self.copies(&datastore, &path).await else { continue };
                let verdict = copies.compare();
                let Some(mut identity) = verdict.identity.filter(|_| verdict.findings.is_empty()) else {
                    continue;
                };
                let tag = content_tag(&found).await;
                let hash = |tag: Option<rdm::ContentTag>| tag.map(|tag| tag.hash);
                if tag.is_none() || hash(tag) == hash(identity.lun.tag) {
                    continue;
                }
                identity.lun.tag = tag;
                let written = vmdisk::create::rebuild_rdm(&folder(&datastore), &path, &identity).await;
                if let Err(error) = written {
                    tracing::warn!(path, %error, "a mapping keeps an older tag of its content");
                }
            }
        }
    }

    pub(super) async fn rdm_view(&self, datastore: &Rc<Datastore>, path: &str) -> Outcome<RdmView> {
        let (copies, _) = self.copies(datastore, path).await?;
        let verdict = copies.compare();
        let place = |place: Place, name: &str| {
            let wrong = verdict.findings.iter().find(|f| f.place == place);
            let state = match wrong.map(|f| &f.what) {
                None => "ok".to_owned(),
                Some(What::Missing) => "missing".to_owned(),
                Some(What::Damaged(error)) => format!("damaged: {error}"),
                Some(What::Newer(error)) => format!("newer: {error}"),
                Some(What::Differs(field)) => format!("differs in {field}"),
            };
            format!("{name}: {state}")
        };
        let places = vec![
            place(Place::Inode, "mapping file"),
            place(Place::Descriptor, "descriptor"),
            place(Place::Claim, "claim on the LUN"),
        ];
        let name = FileName { datastore: datastore.name.clone(), path: path.to_owned() }.to_string();
        let Some(identity) = &verdict.identity else {
            return Ok(RdmView {
                name,
                mode: "unknown".into(),
                state: "identity lost".into(),
                lun: None,
                size_bytes: 0,
                naa: String::new(),
                uuid: None,
                candidates: Vec::new(),
                places,
            });
        };
        let visible = self.visible();
        let (state, lun) = match rdm::resolve(identity, &visible) {
            Resolution::Resolved(lun) => ("resolved", Some(lun)),
            Resolution::Larger(lun) => ("larger: kagami rdm grow", Some(lun)),
            Resolution::Smaller(lun) => ("smaller: read-only", Some(lun)),
            Resolution::BlockSize(lun) => ("another block size: refused", Some(lun)),
            Resolution::Missing(_) => ("missing", None),
            Resolution::Ambiguous(_) => ("ambiguous: refused", None),
        };
        let candidates = match lun {
            Some(_) => Vec::new(),
            None => self.candidates(identity).await,
        };
        Ok(RdmView {
            name,
            mode: mode_name(identity.mode).into(),
            state: state.into(),
            lun: lun.map(|l| l.name.clone()),
            size_bytes: identity.lun.sectors * SECTOR_BYTES,
            naa: identity.lun.display(),
            uuid: identity.lun.uuid.map(|u| u.to_string()),
            candidates,
            places,
        })
    }

    /// All mappings.
    pub async fn rdms(&self) -> Outcome<Vec<RdmView>> {
        let mut views = Vec::new();
        for datastore in self.open_datastores_now() {
            for path in self.descriptors_on(&datastore).await? {
                if let Ok(view) = self.rdm_view(&datastore, &path).await {
                    views.push(view);
                }
            }
        }
        Ok(views)
    }

    /// One mapping.
    pub async fn show_rdm(&self, text: &str) -> Outcome<RdmView> {
        let (datastore, name) = self.file(text)?;
        self.rdm_view(&datastore, &name.path).await
    }

    /// Maps a LUN.
    pub async fn create_rdm(&self, new: NewRdm, dry: bool) -> Outcome<Change<RdmView>> {
        let _turn = self.turn.take().await;
        let (datastore, name) = self.file(&new.disk)?;
        check_descriptor_name(&name)?;
        let (found, mode) = (self.lun(&new.lun)?, parse_mode(&new.mode)?);
        self.unclaimed(&found, "mapped")?;
        if dry {
            return Ok(Change::would(format!("map LUN {} as {name}, {} mode", new.lun, new.mode)));
        }
        self.changing(&datastore, &name.path, async || {
            self.make_rdm(&datastore, &name.path, &found, mode).await
        })
        .await?;
        self.rdm_view(&datastore, &name.path).await.map(Change::Done)
    }

    /// Changes a mapping, or makes it: in several places, with a note of it.
    async fn changing(
        &self,
        datastore: &Datastore,
        path: &str,
        work: impl AsyncFnOnce() -> Outcome,
    ) -> Outcome {
        let (datastore, path) = (datastore.name.clone(), path.to_owned());
        self.noted(Doing::ChangeMapping { datastore, path }, work).await
    }

    /// Claim first: a crash between leaves a claim that `rdm scan` shows, never a LUN that two map.
    pub(super) async fn make_rdm(
        &self,
        datastore: &Rc<Datastore>,
        path: &str,
        found: &FoundLun,
        mode: Mode,
    ) -> Outcome {
        self.make_parents(datastore, path).await?;
        self.unclaimed(found, "mapped")?;
        self.set_claim(found, self.mapping_claim(datastore, path, mode)).await?;
        let identity = self.recorded_identity(found).await;
        let made = vmdisk::create::create_rdm(&folder(datastore), path, &identity, mode).await;
        if let Err(error) = made {
            self.release(found).await?;
            let title = format!("LUN \"{}\" was not mapped", found.lun.name());
            return Err(chain_problem(title, &error));
        }
        Ok(())
    }

    pub(super) fn mapping_claim(&self, datastore: &Datastore, path: &str, mode: Mode) -> Claim {
        let physical = mode == Mode::Physical;
        Claim::Mapping { datastore: datastore.name.clone(), path: path.to_owned(), physical }
    }

    /// Does something to a mapping with all VMs closed that have it, and opens them again. Refused when one of them is on.
    pub(super) async fn with_closed<T>(
        &self,
        datastore: &Rc<Datastore>,
        path: &str,
        what: &str,
        work: impl AsyncFnOnce() -> Outcome<T>,
    ) -> Outcome<T> {
        self.file_not_served(datastore, path, what)?;
        let vms = self.vms_with(datastore, path);
        for vm in &vms {
            self.vm_is_quiet(
                vm,
                &format!("[{}] {} is not {what}", datastore.name, path.trim_start_matches('/')),
            )?;
        }
        self.close_some(&vms).await;
        let done = work().await;
        self.reopen_vms(&vms).await;
        done
    }

    /// The mode that a descriptor says, whatever became of the identity.
    async fn mode_of(&self, datastore: &Rc<Datastore>, name: &FileName) -> Outcome<Mode> {
        let survey = vmdisk::chain::survey(&*datastore.folder, &name.path).await;
        let Some(top) = survey.links.first() else {
            return Err(match survey.troubles.into_iter().next() {
                Some((_, error)) => chain_problem(format!("cannot read {name}"), &error),
                None => Problem::not_found("disk", &name.to_string()),
            });
        };
        Mode::of(top.descriptor.create_type()).ok_or_else(|| {
            Problem::new("KGM-RDM-0001", Kind::Usage, format!("{name} is no mapping"))
                .why(format!("it is a disk of type {}", top.descriptor.create_type()))
                .hint("kagami rdm ls")
        })
    }

    /// Takes over the size of a LUN that has grown.
    pub async fn grow_rdm(&self, text: &str, dry: bool) -> Outcome<Change<RdmView>> {
        let _turn = self.turn.take().await;
        let (datastore, name) = self.file(text)?;
        self.mode_of(&datastore, &name).await?;
        let verdict = self.copies(&datastore, &name.path).await?.0.compare();
        let view = self.rdm_view(&datastore, &name.path).await?;
        let refused = |why: String, hint: String| {
            let title = format!("{name} is not grown");
            Err(Problem::new("KGM-RDM-0004", Kind::Refused, title).why(why).hint(hint))
        };
        let Some(recorded) = &verdict.identity else {
            return refused(
                "its identity is lost".into(),
                format!("kagami rdm scan, or kagami rdm remap {text} --to LUN"),
            );
        };
        let visible = self.visible();
        // Power failed in an earlier attempt, between the two places: this one ends it.
        let half = |verdict: &rdm::Verdict| {
            let length = |f: &rdm::Finding| f.what == What::Differs("length");
            !verdict.findings.is_empty() && verdict.findings.iter().all(length)
        };
        let lun = match rdm::resolve(recorded, &visible) {
            Resolution::Larger(lun) => lun,
            Resolution::Resolved(lun) if half(&verdict) => lun,
            Resolution::Resolved(_) => return self.rdm_view(&datastore, &name.path).await.map(Change::Done),
            _ => return refused(format!("its LUN is {}", view.state), format!("kagami rdm show {text}")),
        };
        let identity = lun.identity.clone();
        let (old, new) = (view.size_bytes, identity.sectors * SECTOR_BYTES);
        if dry {
            return Ok(Change::would(format!("grow {name} from {} to {}", show_size(old), show_size(new))));
        }
        let grow = async || {
            vmdisk::create::grow_rdm(&folder(&datastore), &name.path, &identity)
                .await
                .map_err(|e| chain_problem(format!("{name} was not grown"), &e))
        };
        self.changing(&datastore, &name.path, async || {
            self.with_closed(&datastore, &name.path, "grown", grow).await
        })
        .await?;
        tracing::info!(mapping = %name, from_bytes = old, to_bytes = new, "grown");
        self.rdm_view(&datastore, &name.path).await.map(Change::Done)
    }

    /// Points a mapping at another LUN. Never by itself: the operator sees both identities, sizes and content tags.
    pub async fn remap_rdm(&self, text: &str, new: RemapRdm, dry: bool) -> Outcome<Change<RdmView>> {
        let _turn = self.turn.take().await;
        let (datastore, name) = self.file(text)?;
        let mode = self.mode_of(&datastore, &name).await?;
        let view = self.rdm_view(&datastore, &name.path).await?;
        let found = self.lun(&new.to)?;
        let identity = self.recorded_identity(&found).await;
        if view.uuid.is_some() && view.uuid == identity.uuid.map(|u| u.to_string()) {
            return Ok(Change::Done(view));
        }
        self.unclaimed(&found, "mapped")?;
        let size = identity.sectors * SECTOR_BYTES;
        if size < view.size_bytes {
            let title = format!("{name} is not remapped");
            return Err(Problem::new("KGM-RDM-0005", Kind::Refused, title)
                .why(format!(
                    "LUN {} has {}, the mapping {}",
                    new.to,
                    show_size(size),
                    show_size(view.size_bytes)
                ))
                .hint(format!("kagami lun resize {} {}", new.to, view.size_bytes)));
        }
        let audit = self.remap_audit(&view, &found, &identity).await;
        if dry {
            let old = view
                .lun
                .as_ref()
                .map_or_else(|| format!("a LUN that is {}", view.state), |l| format!("LUN {l}"));
            let would = vec![
                format!(
                    "remap {name} from {} ({}) to {} ({}, {})",
                    view.naa,
                    show_size(view.size_bytes),
                    identity.display(),
                    new.to,
                    show_size(size)
                ),
                format!("find that the content {}", audit["content"].as_str().unwrap_or_default()),
            ];
            return Ok(Change::Would(Plan {
                would,
                loses: vec![format!("the pointer of {name} to {} ({old})", view.naa)],
                frees_bytes: 0,
            }));
        }
        let old = self.claimed_by(&datastore, &name.path);
        self.note_audit(&audit).await?;
        self.set_claim(&found, self.mapping_claim(&datastore, &name.path, mode)).await?;
        let done = self
            .with_closed(&datastore, &name.path, "remapped", async || {
                let whole = rdm::Identity { mode, lun: identity.clone() };
                vmdisk::create::rebuild_rdm(&folder(&datastore), &name.path, &whole)
                    .await
                    .map_err(|e| chain_problem(format!("{name} was not remapped"), &e))
            })
            .await;
        // One of the two LUNs is the mapping's, the other is nobody's.
        match (&done, old) {
            (Ok(()), Some(old)) => self.release(&old).await?,
            (Ok(()), None) => {}
            (Err(_), _) => self.release(&found).await?,
        }
        done?;
        tracing::warn!(mapping = %name, from = view.naa, to = identity.display(), "remapped by the operator");
        self.rdm_view(&datastore, &name.path).await.map(Change::Done)
    }

    /// What is written down of a remap: both identities in full, so that it can be undone, and whether their content is
    /// the same as far as the sample tells.
    async fn remap_audit(
        &self,
        view: &RdmView,
        to: &FoundLun,
        identity: &rdm::LunIdentity,
    ) -> serde_json::Value {
        let from = view.uuid.as_ref().and_then(|u| self.lun(u).ok());
        let tag = async |lun: &FoundLun| rdm::content_tag(&*lun.lun, 0).await.ok();
        let content = match &from {
            None => "cannot be compared: the old LUN is not here",
            Some(from) => match (tag(from).await, tag(to).await) {
                (Some(a), Some(b)) if a.hash == b.hash => "is the same, as far as samples tell",
                (Some(_), Some(_)) => "differs",
                _ => "cannot be compared: a LUN cannot be read",
            },
        };
        serde_json::json!({
            "at": jiff::Timestamp::now().to_string(),
            "what": "rdm remap",
            "mapping": view.name,
            "mode": view.mode,
            "from": {"naa": view.naa, "uuid": view.uuid, "size_bytes": view.size_bytes, "lun": view.lun, "state": view.state},
            "to": {"naa": identity.display(), "uuid": identity.uuid.map(|u| u.to_string()),
                "size_bytes": identity.sectors * SECTOR_BYTES, "lun": to.lun.name()},
            "content": content,
            "undo": view.lun.as_ref().or(view.uuid.as_ref()).map(|lun| format!("kagami rdm remap '{}' --to {lun}", view.name)),
        })
    }

    /// One line into the home's `audit.log`, durable before what it tells of is done.
    pub(super) async fn note_audit(&self, record: &serde_json::Value) -> Outcome {
        let (path, line) = (self.home.join("audit.log"), format!("{record}\n"));
        lane::offload(move || {
            use std::io::Write;
            use std::os::unix::fs::OpenOptionsExt;
            let mut file = std::fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
            file.write_all(line.as_bytes())?;
            file.sync_all()
        })
        .await
        .map_err(|e: std::io::Error| {
            Problem::failed("KGM-SRV-0010", "the audit log cannot be written", e)
                .hint("make room for the home")
        })
    }

    /// Changes the compatibility mode (R6).
    pub async fn convert_rdm(&self, text: &str, new: ConvertRdm, dry: bool) -> Outcome<Change<RdmView>> {
        let _turn = self.turn.take().await;
        let (datastore, name) = self.file(text)?;
        let mode = parse_mode(&new.mode)?;
        self.mode_of(&datastore, &name).await?;
        if dry {
            return Ok(Change::would(format!("convert {name} to {} mode", new.mode)));
        }
        let convert = async || {
            vmdisk::create::convert_rdm(&folder(&datastore), &name.path, mode)
                .await
                .map_err(|e| chain_problem(format!("{name} was not converted"), &e))?;
            // A claim is never replaced by another in one step. Without it the two other places tell what it was.
            if let Some(found) = self.claimed_by(&datastore, &name.path) {
                self.release(&found).await?;
                self.set_claim(&found, self.mapping_claim(&datastore, &name.path, mode)).await?;
            }
            Ok(())
        };
        self.changing(&datastore, &name.path, async || {
            self.with_closed(&datastore, &name.path, "converted", convert).await
        })
        .await?;
        self.rdm_view(&datastore, &name.path).await.map(Change::Done)
    }
}
