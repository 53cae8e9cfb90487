//! Datastores that come to this home and leave it, with the VMs on them. What they hold stays on their LUNs.

use std::rc::Rc;

use array::Claim;
use block::{Disk, Sector, SegmentsMut};
use uuid::Uuid;
use vm::Datastore;
use vmfs::format::{LVM_HEADER_OFFSET, LVM_MAGIC, LvmHeader};
use zerocopy::FromBytes;

use super::datastores::{DatastoreEntry, DatastoreRecord};
use super::doing::Doing;
use super::luns::FoundLun;
use super::pools::disk_problem;
use super::{Folder, Store};
use crate::api::Change;
use crate::files::Versioned as _;
use crate::model::{AttachDatastore, DatastoreView, Plan, Removal};
use crate::problem::{Kind, Outcome, Problem, check_name};

impl Store {
    /// Datastores of the home on these LUNs.
    pub(super) fn datastores_on(&self, luns: &[Uuid]) -> Vec<String> {
        let datastores = self.datastores.borrow();
        let on = |e: &&DatastoreEntry| luns.contains(&e.record.lun);
        datastores.values().filter(on).map(|e| e.record.name.clone()).collect()
    }

    /// VMs of the home whose directories lie on these datastores.
    pub(super) fn vms_on(&self, datastores: &[String]) -> Vec<String> {
        let vms = self.vms.borrow();
        let on = |e: &&super::vms::VmEntry| datastores.contains(&e.record.datastore);
        vms.values().filter(on).map(|e| e.record.name.clone()).collect()
    }

    /// The home does not have this datastore any more. Nobody has a file of it open.
    pub(super) async fn forget_datastore(&self, name: &str) -> Outcome {
        while let Some(export) = self.export_below(name, "") {
            self.drop_export(&export).await?;
        }
        self.forget(Folder::Datastores, name).await?;
        let entry = self.datastores.borrow_mut().remove(name);
        if let Some(Ok(datastore)) = entry.map(|e| e.state)
            && let Err(error) = datastore.volume.settle().await
        {
            tracing::warn!(datastore = name, %error, "not everything was settled");
        }
        Ok(())
    }

    /// Mappings on a datastore: LUN and path.
    fn mappings_on(&self, name: &str) -> Vec<(String, String)> {
        let of = |f: &FoundLun| match f.lun.claimed_by() {
            Some(Claim::Mapping { datastore, path, .. }) if datastore == name => Some((f.lun.name(), path)),
            _ => None,
        };
        self.all_luns().iter().filter_map(of).collect()
    }

    /// Takes a datastore out of the home. Its LUN stays as it is and belongs to nobody; with `all` it goes to the trash.
    pub async fn remove_datastore(&self, name: &str, how: Removal) -> Outcome<Change<DatastoreView>> {
        let _turn = self.turn.take().await;
        let view = self.show_datastore(name).await?;
        let refused = |why: String, hint: String| {
            let title = format!("datastore \"{name}\" is not taken out");
            Err(Problem::new("KGM-DST-0004", Kind::Conflict, title).why(why).hint(hint))
        };
        let uses = |vm: &Rc<vm::Vm>| {
            vm.datastore.name == name || vm.disks().iter().any(|d| d.datastore.name == name)
        };
        let mut vms = self.vms_on(&[name.to_owned()]);
        vms.extend(self.open_vms_now().iter().filter(|vm| uses(vm)).map(|vm| vm.name.clone()));
        if let Some(vm) = vms.first() {
            return refused(format!("VM {vm} lies on it"), format!("kagami vm rm {vm}"));
        }
        if let Some(export) = self.export_below(name, "") {
            let stop = format!("kagami export stop {export}");
            return refused(format!("a disk on it is served as export \"{export}\""), stop);
        }
        if how.all
            && let Some((lun, path)) = self.mappings_on(name).into_iter().next()
        {
            let hint = format!("kagami disk rm {name}:{}", path.trim_start_matches('/'));
            return refused(format!("LUN {lun} is mapped on it"), hint);
        }
        let uuid = self.datastores.borrow().get(name).map(|e| e.record.lun);
        if how.dry_run {
            let (would, loses) = match how.all {
                true => (
                    "remove",
                    vec![format!(
                        "datastore {name} with everything on it; LUN {} lies in the trash for 7 days",
                        view.lun
                    )],
                ),
                false => ("take out", Vec::new()),
            };
            let stays = if how.all { "" } else { "; its LUN stays with what it holds" };
            return Ok(Change::Would(Plan {
                would: vec![format!("{would} datastore {name}{stays}")],
                loses,
                frees_bytes: 0,
            }));
        }
        let lun = uuid.unwrap_or_default();
        self.noted(Doing::RemoveDatastore { name: name.to_owned(), lun, all: how.all }, async || {
            self.forget_datastore(name).await?;
            self.give_lun_up(lun, how.all).await
        })
        .await?;
        tracing::info!(datastore = name, lun_too = how.all, "datastore taken out");
        Ok(Change::Done(view))
    }

    /// Brings a volume on a LUN to the home: claims the LUN, registers the VMs on it.
    pub async fn attach_datastore(&self, new: AttachDatastore, dry: bool) -> Outcome<Change<DatastoreView>> {
        let _turn = self.turn.take().await;
        let found = self.lun(&new.lun)?;
        self.unclaimed(&found, "attached")?;
        own_signature(&found).await?;
        let name = match new.name {
            Some(name) => name,
            None => {
                let volume =
                    super::cut::frozen_volume(&new.lun, Rc::clone(&found.lun) as Rc<dyn Disk>).await?;
                volume.info().label.clone()
            }
        };
        check_name("datastore", &name).map_err(|p| p.hint("--name NAME"))?;
        if self.datastores.borrow().contains_key(&name) {
            return Err(Problem::exists("datastore", &name).hint("--name OTHER"));
        }
        if dry {
            return Ok(Change::would(format!("attach the volume on LUN {} as datastore {name}", new.lun)));
        }
        let doing =
            Doing::MakeDatastore { name: name.clone(), lun: found.lun.uuid().to_string(), made: false };
        self.noted(doing, async || self.attach_volume(&name, &found).await).await?;
        self.retry_exports().await;
        tracing::info!(datastore = name, "datastore attached");
        self.show_datastore(&name).await.map(Change::Done)
    }

    async fn attach_volume(&self, name: &str, found: &FoundLun) -> Outcome {
        let datastore: Rc<Datastore> = self.open_volume(name, found).await?;
        let uuid = Uuid::from_bytes(datastore.volume.info().uuid.0);
        self.set_claim(found, Claim::Datastore { uuid, label: name.to_owned() }).await?;
        self.remember_datastore(name, found.lun.uuid(), Rc::clone(&datastore)).await?;
        self.register_all_on(&datastore).await
    }

    /// The home has this datastore from now on.
    pub(super) async fn remember_datastore(&self, name: &str, lun: Uuid, open: Rc<Datastore>) -> Outcome {
        let record = DatastoreRecord { format: DatastoreRecord::FORMAT, name: name.to_owned(), lun };
        self.save(Folder::Datastores, name, record.clone()).await?;
        let entry = DatastoreEntry { record, state: Ok(open) };
        self.datastores.borrow_mut().insert(name.to_owned(), entry);
        Ok(())
    }

    /// A datastore that the home does not have any more gives its LUN up; with `all` that goes to the trash.
    pub(super) async fn give_lun_up(&self, lun: Uuid, all: bool) -> Outcome {
        let Ok(found) = self.lun(&lun.to_string()) else { return Ok(()) };
        self.release(&found).await?;
        if all {
            let name = found.lun.name();
            let failed = |e| super::pools::pool_problem(format!("LUN \"{name}\" was not removed"), &e);
            found.pool.pool.remove_lun(&name, false).await.map_err(failed)?;
        }
        Ok(())
    }
}

/// A volume carries the identity of the LUN that it was made on. One that carries another is a copy, and is not opened
/// for writing (R47).
async fn own_signature(found: &FoundLun) -> Outcome {
    let lun = found.lun.name();
    let mut bytes = vec![0; 512];
    let at = Sector(LVM_HEADER_OFFSET / block::SECTOR_BYTES);
    let read = found.lun.read(at, &SegmentsMut::new(&mut bytes)).await;
    read.map_err(|e| disk_problem("KGM-DST-0005", format!("LUN \"{lun}\" cannot be read"), &e))?;
    let header = LvmHeader::read_from_prefix(&bytes).ok().map(|(header, _)| header);
    let Some(header) = header.filter(|h| h.magic.get() == LVM_MAGIC) else {
        return Err(Problem::new(
            "KGM-DST-0006",
            Kind::NotFound,
            format!("there is no VMFS volume on LUN \"{lun}\""),
        )
        .hint(format!("kagami datastore create NAME --lun {lun}")));
    };
    let own = array::identity::naa(found.lun.uuid());
    if header.disk_id.id.get(..own.len()) == Some(&own[..]) {
        return Ok(());
    }
    Err(Problem::new("KGM-DST-0007", Kind::Refused, format!("the volume on LUN \"{lun}\" is a copy"))
        .why(format!("its signature is that of {}", header.disk_id.id_text()))
        .hint(format!("read it: kagami export start {lun} --read-only, kagami vmfs ls POOLFILE:{lun}")))
}
