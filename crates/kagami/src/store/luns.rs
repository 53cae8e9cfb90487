//! LUNs.

use std::rc::Rc;

use array::catalog::LunRecord;
use array::{Lun, NewLun as NewArrayLun, Snapshot, TRASH_SECONDS};
use block::{Disk, SECTOR_BYTES};

use vmdisk::rdm::{LunIdentity, Ours, VisibleLun};

use super::pools::{OpenPool, pool_problem};
use super::{Store, rfc3339};
use crate::api::Change;
use crate::model::{LunView, NewLun, Plan, Removal};
use crate::problem::{Kind, Outcome, Problem, check_name};
use crate::units::show_size;

/// LUNs are whole blocks.
const UNIT: u64 = 4096;
/// And at most this large, in bytes.
const LARGEST: u64 = 64 << 40;

/// A LUN and where it is.
#[derive(Clone)]
pub struct FoundLun {
    /// Name of its pool in this home.
    pub pool_name: String,
    /// Its pool.
    pub pool: OpenPool,
    /// The LUN.
    pub lun: Rc<Lun>,
}

impl FoundLun {
    /// Opens a snapshot of it.
    pub fn open_snapshot(&self, name: &str) -> Outcome<Rc<Snapshot>> {
        let full = || format!("{}@{name}", self.lun.name());
        self.lun.open_snapshot(name).map_err(|e| Problem::not_found("snap", &full()).why(e))
    }

    /// It has a snapshot of this name.
    pub fn has_snapshot(&self, name: &str) -> bool {
        self.lun.snapshots().iter().any(|s| s.name == name)
    }
}

/// A LUN as mappings know it: what INQUIRY and the VPD pages say of it.
pub fn visible_lun(lun: &Rc<Lun>) -> VisibleLun {
    let (uuid, shape) = (lun.uuid(), lun.shape());
    let identity = LunIdentity {
        naa: array::identity::naa(uuid).to_vec(),
        uuid: Some(uuid),
        serial: lun.serial().into_bytes(),
        vendor: *b"KAGAMI  ",
        product: *b"LUN             ",
        revision: *b"0001",
        sectors: shape.sectors,
        logical_block: block::SECTOR_BYTES as u32,
        physical_block: shape.physical_block_bytes,
        ours: Some(Ours { array: lun.pool().uuid(), lun: uuid, generation: None }),
        ..LunIdentity::default()
    };
    // One path to each LUN: its number is as good as any. Two pools may have the same, so the UUID counts in.
    let (high, low) = uuid.as_u64_pair();
    VisibleLun { unit: high ^ low, name: lun.name(), identity, disk: Rc::clone(lun) as Rc<dyn Disk> }
}

/// What a LUN looks like.
pub fn lun_view(pool_name: &str, lun: &Lun) -> LunView {
    let record = lun.record();
    LunView {
        id: lun.uuid().to_string(),
        name: lun.name(),
        pool: pool_name.to_owned(),
        size_bytes: lun.shape().bytes(),
        used_bytes: None,
        below_bytes: None,
        naa: lun.naa(),
        serial: lun.serial(),
        snapshots: lun.snapshots().into_iter().map(|s| s.name).collect(),
        claim: lun.claimed_by().map(|c| c.to_string()),
        reverted: record.as_ref().is_some_and(|r| r.abandoned.is_some()),
        created_at: record.and_then(|r| rfc3339(r.created)),
        trash_until: None,
    }
}

/// The same, with what it takes; left out when its map cannot be read.
async fn counted_view(pool_name: &str, lun: &Lun) -> LunView {
    let usage = lun.usage().await;
    if let Err(error) = &usage {
        tracing::warn!(lun = lun.name(), %error, "what the LUN takes is not known");
    }
    LunView {
        used_bytes: usage.as_ref().ok().map(|u| u.own.bytes()),
        below_bytes: usage.as_ref().ok().map(|u| u.below_bytes),
        ..lun_view(pool_name, lun)
    }
}

/// A LUN in the trash.
fn trash_view(pool_name: &str, record: &LunRecord) -> LunView {
    LunView {
        id: record.uuid.to_string(),
        name: record.name.clone(),
        pool: pool_name.to_owned(),
        size_bytes: record.sectors * SECTOR_BYTES,
        used_bytes: None,
        below_bytes: None,
        naa: array::identity::naa_text(record.uuid),
        serial: array::identity::serial(record.uuid),
        snapshots: Vec::new(),
        claim: None,
        reverted: record.abandoned.is_some(),
        created_at: rfc3339(record.created),
        trash_until: record.trashed.and_then(|t| rfc3339(t + TRASH_SECONDS)),
    }
}

impl Store {
    /// A living LUN: `NAME`, `POOL/NAME`, UUID, NAA or serial.
    pub(super) fn lun(&self, word: &str) -> Outcome<FoundLun> {
        let (in_pool, name) = match word.split_once('/') {
            Some((pool, name)) => (Some(pool), name),
            None => (None, word),
        };
        let mut found = Vec::new();
        for (pool_name, pool) in self.open_pools_now() {
            if in_pool.is_some_and(|p| p != pool_name) {
                continue;
            }
            if let Some(lun) = pool.pool.lun(name) {
                found.push(FoundLun { pool_name, pool, lun });
            }
        }
        match found.len() {
            1 => Ok(found.remove(0)),
            0 => Err(Problem::not_found("lun", word)),
            _ => {
                Err(Problem::new("KGM-LUN-0001", Kind::Usage, format!("several LUNs are called \"{word}\""))
                    .why(
                        found
                            .iter()
                            .map(|f| format!("{}/{word}", f.pool_name))
                            .collect::<Vec<_>>()
                            .join(", "),
                    )
                    .hint("write POOL/LUN"))
            }
        }
    }

    /// All LUNs, or those in the trash.
    pub async fn luns(&self, trash: bool) -> Outcome<Vec<LunView>> {
        let mut all = Vec::new();
        for (name, open) in self.open_pools_now() {
            match trash {
                true => all.extend(open.pool.trash().iter().map(|record| trash_view(&name, record))),
                false => {
                    for lun in open.pool.luns() {
                        all.push(counted_view(&name, &lun).await);
                    }
                }
            }
        }
        Ok(all)
    }

    /// One LUN.
    pub async fn show_lun(&self, word: &str) -> Outcome<LunView> {
        let found = self.lun(word)?;
        Ok(counted_view(&found.pool_name, &found.lun).await)
    }

    /// Makes a LUN.
    pub async fn create_lun(&self, new: NewLun, dry: bool) -> Outcome<Change<LunView>> {
        let _turn = self.turn.take().await;
        if new.if_not_exists
            && let Ok(found) = self.lun(&new.name)
        {
            let view = lun_view(&found.pool_name, &found.lun);
            if view.size_bytes == new.size_bytes && new.pool.as_ref().is_none_or(|p| *p == view.pool) {
                return Ok(Change::Done(view));
            }
            return Err(
                Problem::exists("lun", &new.name).why(format!("it has {}", show_size(view.size_bytes)))
            );
        }
        let (pool_name, pool) = self.check_new_lun(&new.name, new.size_bytes, new.pool.as_deref())?;
        if dry {
            let size = show_size(new.size_bytes);
            return Ok(Change::would(format!(
                "make LUN {} with {size} (thin) in pool {pool_name}",
                new.name
            )));
        }
        let lun = self.make_lun(&pool, &new.name, new.size_bytes).await?;
        Ok(Change::Done(lun_view(&pool_name, &lun)))
    }

    /// Checks that a LUN of this name and size may be made; the pool where.
    pub(super) fn check_new_lun(
        &self,
        name: &str,
        size_bytes: u64,
        pool: Option<&str>,
    ) -> Outcome<(String, OpenPool)> {
        check_name("LUN", name)?;
        if size_bytes == 0 || !size_bytes.is_multiple_of(UNIT) || size_bytes > LARGEST {
            return Err(Problem::usage(format!("{size_bytes} bytes is no size for a LUN"))
                .why(format!("a multiple of {UNIT}, at most {}", show_size(LARGEST))));
        }
        let (pool_name, pool) = self.pool_for_new(pool)?;
        if pool.pool.lun(name).is_some() {
            return Err(Problem::exists("lun", name));
        }
        Ok((pool_name, pool))
    }

    pub(super) async fn make_lun(&self, pool: &OpenPool, name: &str, size_bytes: u64) -> Outcome<Rc<Lun>> {
        let new = NewArrayLun::new(name, size_bytes / SECTOR_BYTES);
        let lun = pool
            .pool
            .create_lun(new)
            .await
            .map_err(|e| pool_problem(format!("LUN \"{name}\" was not made"), &e))?;
        tracing::info!(lun = name, size_bytes, "LUN made");
        Ok(lun)
    }

    /// Refuses what may not be done to a LUN on which somebody stands (and names them).
    pub(super) fn unclaimed(&self, found: &FoundLun, what: &str) -> Outcome {
        let name = found.lun.name();
        if let Some(claim) = found.lun.claimed_by() {
            return Err(Problem::new("KGM-LUN-0002", Kind::Refused, format!("LUN \"{name}\" is not {what}"))
                .why(format!("it is in use: {claim}"))
                .hint("work on that datastore or VM instead"));
        }
        if let Some(export) = self.export_of_lun(found.lun.uuid()) {
            return Err(Problem::new(
                "KGM-LUN-0003",
                Kind::Conflict,
                format!("LUN \"{name}\" is not {what}"),
            )
            .why(format!("it is served as export \"{export}\""))
            .hint(format!("kagami export stop {export}")));
        }
        Ok(())
    }

    /// Grows a LUN.
    pub async fn resize_lun(&self, word: &str, size_bytes: u64, dry: bool) -> Outcome<Change<LunView>> {
        let _turn = self.turn.take().await;
        let found = self.lun(word)?;
        let has = found.lun.shape().bytes();
        if size_bytes < has {
            return Err(Problem::new(
                "KGM-LUN-0004",
                Kind::Refused,
                format!("LUN \"{word}\" is not made smaller"),
            )
            .why(format!("it has {}, and shrinking would cut data off", show_size(has))));
        }
        if !size_bytes.is_multiple_of(UNIT) || size_bytes > LARGEST {
            return Err(Problem::usage(format!("{size_bytes} bytes is no size for a LUN")));
        }
        if dry {
            return Ok(Change::would(format!(
                "grow LUN {word} from {} to {}",
                show_size(has),
                show_size(size_bytes)
            )));
        }
        found
            .lun
            .resize(size_bytes / SECTOR_BYTES)
            .await
            .map_err(|e| pool_problem(format!("LUN \"{word}\" was not grown"), &e))?;
        Ok(Change::Done(lun_view(&found.pool_name, &found.lun)))
    }

    /// Removes a LUN.
    pub async fn remove_lun(&self, word: &str, how: Removal) -> Outcome<Change<LunView>> {
        let _turn = self.turn.take().await;
        let found = match self.lun(word) {
            Err(missing) if how.all => return self.empty_trash(word, how.dry_run, missing).await,
            found => found?,
        };
        self.unclaimed(&found, "removed")?;
        let view = lun_view(&found.pool_name, &found.lun);
        if let Some(export) = self.export_on_lun(found.lun.uuid()) {
            let title = format!("LUN \"{}\" is not removed", view.name);
            return Err(Problem::new("KGM-LUN-0003", Kind::Conflict, title)
                .why(format!("a snapshot of it is served as export \"{export}\""))
                .hint(format!("kagami export stop {export}")));
        }
        if how.dry_run {
            let kept = if how.all { "at once" } else { "into the trash, for 7 days" };
            let mut loses =
                vec![format!("LUN {} ({}) and what it holds", view.name, show_size(view.size_bytes))];
            if !view.snapshots.is_empty() {
                loses.push(format!("its snapshots {}", view.snapshots.join(", ")));
            }
            return Ok(Change::Would(Plan {
                would: vec![format!("remove LUN {} {kept}", view.name)],
                loses,
                frees_bytes: 0,
            }));
        }
        found
            .pool
            .pool
            .remove_lun(&view.name, how.all)
            .await
            .map_err(|e| pool_problem(format!("LUN \"{word}\" was not removed"), &e))?;
        tracing::info!(lun = view.name, now = how.all, "LUN removed");
        Ok(Change::Done(view))
    }

    /// Gives back at once what lies in the trash under this name or UUID.
    async fn empty_trash(&self, word: &str, dry: bool, missing: Problem) -> Outcome<Change<LunView>> {
        let mut found = self.in_trash(word);
        if found.len() > 1 {
            let uuids: Vec<String> = found.iter().map(|(_, _, r)| r.uuid.to_string()).collect();
            return Err(Problem::new(
                "KGM-LUN-0001",
                Kind::Usage,
                format!("several LUNs called \"{word}\" lie in the trash"),
            )
            .why(uuids.join(", "))
            .hint("kagami lun rm UUID --now"));
        }
        let Some((pool_name, open, record)) = found.pop() else { return Err(missing) };
        let view = trash_view(&pool_name, &record);
        if dry {
            return Ok(Change::Would(Plan {
                would: vec![format!("remove LUN {} from the trash at once", view.name)],
                loses: vec![format!("LUN {} ({}) and what it holds", view.name, show_size(view.size_bytes))],
                frees_bytes: 0,
            }));
        }
        open.pool
            .empty_trash(&record.uuid.to_string())
            .await
            .map_err(|e| pool_problem(format!("LUN \"{word}\" stays in the trash"), &e))?;
        Ok(Change::Done(view))
    }

    /// LUNs in the trash of this name or UUID.
    fn in_trash(&self, word: &str) -> Vec<(String, OpenPool, LunRecord)> {
        let mut found = Vec::new();
        for (name, open) in self.open_pools_now() {
            for record in open.pool.trash() {
                if record.name == word || record.uuid.to_string() == word {
                    found.push((name.clone(), open.clone(), record));
                }
            }
        }
        found
    }

    /// Returns to what a LUN held before it was reverted.
    pub async fn undo_revert(&self, word: &str, dry: bool) -> Outcome<Change<LunView>> {
        let _turn = self.turn.take().await;
        let found = self.lun(word)?;
        self.unclaimed(&found, "set back")?;
        let name = found.lun.name();
        if found.lun.record().is_none_or(|r| r.abandoned.is_none()) {
            return Err(Problem::new(
                "KGM-LUN-0005",
                Kind::Conflict,
                format!("LUN \"{name}\" was not reverted"),
            )
            .why("or the revert was accepted already")
            .hint(format!("kagami snap ls {name}")));
        }
        if dry {
            return Ok(Change::Would(Plan {
                would: vec![format!("revert LUN {name} to what it held before it was reverted")],
                loses: vec!["what was written since it was reverted".into()],
                frees_bytes: 0,
            }));
        }
        found
            .lun
            .undo_revert()
            .await
            .map_err(|e| pool_problem(format!("LUN \"{name}\" was not set back"), &e))?;
        Ok(Change::Done(lun_view(&found.pool_name, &found.lun)))
    }

    /// Takes a LUN out of the trash.
    pub async fn undelete_lun(&self, word: &str, dry: bool) -> Outcome<Change<LunView>> {
        let _turn = self.turn.take().await;
        let mut found = self.in_trash(word);
        // The youngest of several with one name.
        found.sort_by_key(|(_, _, record)| record.trashed);
        let Some((pool_name, open, record)) = found.pop() else {
            return Err(Problem::not_found("lun", word)
                .why("there is no such LUN in the trash")
                .hint("kagami lun ls --trash"));
        };
        if dry {
            return Ok(Change::would(format!("take LUN {word} out of the trash of pool {pool_name}")));
        }
        let lun = open
            .pool
            .undelete_lun(&record.uuid.to_string())
            .await
            .map_err(|e| pool_problem(format!("LUN \"{word}\" stays in the trash"), &e))?;
        Ok(Change::Done(lun_view(&pool_name, &lun)))
    }
}
