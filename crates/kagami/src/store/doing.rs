//! Requests of several steps. Before the first step the home notes what is to be done, after the last one the note goes;
//! a note found at start says what a crash cut off. What was being made is taken away, unless it was whole already; what
//! was being taken away, or changed, is brought to its end.

use std::path::PathBuf;
use std::rc::Rc;

use array::Claim;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vm::Datastore;
use vmdisk::rdm::Mode;

use super::disks::{chain_problem, folder};
use super::pools::pool_problem;
use super::{Folder, Store};
use crate::files::Versioned;
use crate::model::Removal;
use crate::problem::{Outcome, Problem};

/// A request under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "kebab-case")]
pub enum Doing {
    /// A pool is made in these files, which were not there.
    MakePool { name: String, media: Vec<PathBuf> },
    /// A pool and what lies in it comes to this home.
    ImportPool { name: String },
    /// A pool and what lies in it goes out of this home.
    TakePoolOut { name: String },
    /// A datastore comes to be on a LUN; `made`: on one that is made for it, by this name.
    MakeDatastore { name: String, lun: String, made: bool },
    /// A datastore goes; with `all` its LUN too.
    RemoveDatastore { name: String, lun: Uuid, all: bool },
    /// A disk is made.
    MakeDisk { datastore: String, path: String },
    /// A disk is removed.
    RemoveDisk { datastore: String, path: String },
    /// A mapping is made or changed: its descriptor decides what it is.
    ChangeMapping { datastore: String, path: String },
    /// A VM is made in a directory of its name.
    MakeVm { name: String, datastore: String },
    /// A VM goes; with `all` its directory too.
    RemoveVm { name: String, datastore: String, home: String, all: bool },
}

/// The note.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DoingRecord {
    format: u32,
    id: Uuid,
    #[serde(flatten)]
    doing: Doing,
}

impl Versioned for DoingRecord {
    const FORMAT: u32 = 1;
}

impl Store {
    /// Does something of several steps with its note. Whatever comes of it, the note goes: what fails cleans up itself.
    pub(super) async fn noted<T>(&self, doing: Doing, work: impl AsyncFnOnce() -> Outcome<T>) -> Outcome<T> {
        let id = Uuid::now_v7();
        let record = DoingRecord { format: 1, id, doing };
        self.save(Folder::Doing, &id.to_string(), record).await?;
        let done = work().await;
        match (self.forget(Folder::Doing, &id.to_string()).await, done) {
            (Err(problem), Ok(_)) => Err(problem),
            (_, done) => done,
        }
    }

    /// After start, before anything is served: what a crash cut off is undone or ended.
    pub(super) async fn end_what_was_cut_off(&self) -> Outcome {
        let (records, bad) = self.load_files::<DoingRecord>(Folder::Doing).await?;
        for (name, error) in bad {
            self.is_unreadable(Folder::Doing, &name, &error);
        }
        for DoingRecord { id, doing, .. } in records {
            tracing::info!(?doing, "a request that was cut off is ended");
            match self.end_one(&doing).await {
                Ok(()) => self.forget(Folder::Doing, &id.to_string()).await?,
                // What it needs is not here: the next start tries again.
                Err(problem) => tracing::error!(?doing, %problem, "a request that was cut off stays so"),
            }
        }
        Ok(())
    }

    async fn end_one(&self, doing: &Doing) -> Outcome {
        let whole = Removal { dry_run: false, all: true };
        match doing {
            Doing::MakePool { name, media } => {
                if !self.pools.borrow().contains_key(name) {
                    let media = media.clone();
                    lane::offload(move || media.iter().try_for_each(|file| crate::files::remove(file)))
                        .await
                        .map_err(|e| Problem::failed("KGM-SRV-0011", "a file of a pool stays", e))?;
                }
                Ok(())
            }
            Doing::ImportPool { name } if self.pools.borrow().contains_key(name) => {
                self.import_what_lies_in(name).await
            }
            Doing::TakePoolOut { name } if self.pools.borrow().contains_key(name) => {
                self.remove_pool(name, whole).await.map(drop)
            }
            Doing::ImportPool { .. } | Doing::TakePoolOut { .. } => Ok(()),
            Doing::MakeDatastore { name, lun, made } => self.end_datastore(name, lun, *made).await,
            Doing::RemoveDatastore { name, lun, all } => {
                self.remove_rest_of_datastore(name, *lun, *all).await
            }
            Doing::MakeDisk { datastore, path } => {
                let on = self.open_datastore_now(datastore)?;
                if on.volume.entry(path).await.is_ok() {
                    Ok(())
                } else {
                    self.remove_extents(&on, path).await
                }
            }
            Doing::RemoveDisk { datastore, path } => {
                let on = self.open_datastore_now(datastore)?;
                if on.volume.entry(path).await.is_ok() {
                    self.delete_disk(&on, path).await?;
                }
                self.release_all(&on, |at| at == path).await
            }
            Doing::ChangeMapping { datastore, path } => {
                self.end_mapping(&self.open_datastore_now(datastore)?, path).await
            }
            Doing::MakeVm { name, .. } if self.vms.borrow().contains_key(name) => Ok(()),
            Doing::MakeVm { name, datastore } => self.remove_home(datastore, &format!("/{name}")).await,
            Doing::RemoveVm { name, datastore, home, all } => {
                if self.vms.borrow().contains_key(name) {
                    self.remove_vm(name, Removal { dry_run: false, all: *all }).await?;
                }
                if *all { self.remove_home(datastore, home).await } else { Ok(()) }
            }
        }
    }

    /// A volume is whole when its LUN is claimed for it: then the datastore is registered, with the VMs on it. Else a LUN
    /// that was made for it goes; any other stays as it is.
    async fn end_datastore(&self, name: &str, lun: &str, made: bool) -> Outcome {
        let Ok(found) = self.lun(lun) else { return Ok(()) };
        let known = self.datastores.borrow().contains_key(name);
        match found.lun.claimed_by() {
            Some(Claim::Datastore { .. }) => {
                if !known {
                    let datastore = self.open_volume(name, &found).await?;
                    self.remember_datastore(name, found.lun.uuid(), datastore).await?;
                }
                self.register_all_on(&self.open_datastore_now(name)?).await
            }
            None if made && !known => {
                let title = || format!("LUN \"{lun}\", made for a datastore, stays");
                let removed = found.pool.pool.remove_lun(&found.lun.name(), true).await;
                removed.map_err(|e| pool_problem(title(), &e))
            }
            _ => Ok(()),
        }
    }

    async fn remove_rest_of_datastore(&self, name: &str, lun: Uuid, all: bool) -> Outcome {
        if self.datastores.borrow().contains_key(name) {
            return self.remove_datastore(name, Removal { dry_run: false, all }).await.map(drop);
        }
        self.give_lun_up(lun, all).await
    }

    /// Takes away the extents that a disk of this name would have.
    async fn remove_extents(&self, on: &Rc<Datastore>, path: &str) -> Outcome {
        let stem = path.trim_end_matches(".vmdk");
        for suffix in ["-flat", Mode::Virtual.suffix(), Mode::Physical.suffix()] {
            let extent = format!("{stem}{suffix}.vmdk");
            if on.volume.entry(&extent).await.is_ok() {
                let removed = vmdisk::folder::Folder::remove(&*on.folder, &extent).await;
                removed.map_err(|e| chain_problem(format!("[{}] {extent} stays", on.name), &e.into()))?;
            }
        }
        Ok(())
    }

    /// Claims of mappings on a datastore whose descriptor is not there are given up.
    pub(super) async fn release_all(&self, on: &Rc<Datastore>, is_meant: impl Fn(&str) -> bool) -> Outcome {
        for found in self.all_luns() {
            if let Some(Claim::Mapping { datastore, path, .. }) = found.lun.claimed_by()
                && datastore == on.name
                && is_meant(&path)
                && on.volume.entry(&path).await.is_err()
            {
                self.release(&found).await?;
            }
        }
        Ok(())
    }

    /// The descriptor was written in one step, and decides: mapping file and claims follow it. Without it there is no
    /// mapping.
    async fn end_mapping(&self, on: &Rc<Datastore>, path: &str) -> Outcome {
        if on.volume.entry(path).await.is_err() {
            self.remove_extents(on, path).await?;
            return self.release_all(on, |at| at == path).await;
        }
        let failed = |e: &vmdisk::ChainError| chain_problem(format!("mapping [{}] {path}", on.name), e);
        let copies = vmdisk::create::read_copies(&folder(on), path).await.map_err(|e| failed(&e))?;
        let Ok(identity) = copies.descriptor else { return Ok(()) }; // rdm scan tells
        self.with_closed(on, path, "brought to its end", async || {
            vmdisk::create::rebuild_rdm(&folder(on), path, &identity).await.map_err(|e| failed(&e))
        })
        .await?;
        let wanted = self.mapping_claim(on, path, identity.mode);
        for found in self.all_luns() {
            let is_its = Some(found.lun.uuid()) == identity.lun.uuid;
            let claim = found.lun.claimed_by();
            let names_it = matches!(&claim, Some(Claim::Mapping { datastore, path: at, .. })
                if *datastore == on.name && at == path);
            if names_it && (!is_its || claim.as_ref() != Some(&wanted)) {
                self.release(&found).await?;
            }
            if is_its && found.lun.claimed_by().is_none() {
                self.set_claim(&found, wanted.clone()).await?;
            }
        }
        Ok(())
    }

    /// Takes a VM's directory away, with the claims of its mappings.
    async fn remove_home(&self, datastore: &str, home: &str) -> Outcome {
        let on = self.open_datastore_now(datastore)?;
        self.remove_vm_files(&on, home).await;
        self.release_all(&on, |at| at.starts_with(&format!("{home}/"))).await
    }
}
