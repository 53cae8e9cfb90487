//! Snapshots, clones, group cuts.

use std::collections::BTreeMap;
use std::rc::Rc;

use array::catalog::SnapshotRecord;
use array::{Decider, InDoubt, NewLun, Snapshot};
use block::Disk;

use super::luns::{FoundLun, lun_view};
use super::pools::{disk_problem, pool_problem};
use super::{Store, rfc3339};
use crate::api::Change;
use crate::model::{
    GroupCutView, LunView, NewClone, NewGroupCut, NewSnap, Plan, Removal, ResolveGroup, SnapView,
};
use crate::names::SnapName;
use crate::problem::{Kind, Outcome, Problem, check_name};

fn snap_view(found: &FoundLun, record: &SnapshotRecord) -> SnapView {
    let lun = found.lun.name();
    let size = found.lun.open_snapshot(&record.name).map_or(0, |s| s.shape().bytes());
    SnapView {
        id: record.uuid.to_string(),
        name: format!("{lun}@{}", record.name),
        lun,
        pool: found.pool_name.clone(),
        size_bytes: size,
        used_bytes: None,
        created_at: rfc3339(record.created),
        group: record.group.map(|g| g.to_string()),
    }
}

/// A cut over several pools that is prepared in one and not decided.
struct Doubt {
    pool_name: String,
    pool: Rc<array::Pool>,
    cut: InDoubt,
    /// What the deciding pool says, where that is here.
    decided: Option<bool>,
}

fn was(happened: bool) -> &'static str {
    if happened { "happened" } else { "did not happen" }
}

impl Doubt {
    fn state(&self) -> String {
        match (self.decided, self.cut.decider) {
            (Some(decided), _) => format!("in doubt; it {}", was(decided)),
            (None, Decider::Pool(uuid)) => format!("in doubt: pool {uuid} decides, and is not here"),
            (None, Decider::Outside) => "in doubt: the record of a VM's job decides".into(),
        }
    }

    fn view(&self) -> GroupCutView {
        GroupCutView {
            id: self.cut.group.to_string(),
            name: self.cut.members.first().map_or_else(String::new, |(_, snap)| snap.clone()),
            members: self.cut.members.iter().map(|(lun, snap)| format!("{lun}@{snap}")).collect(),
            state: self.state(),
            hold_us: None,
        }
    }
}

impl Store {
    /// A snapshot by `lun@snap`.
    pub(super) fn snapshot(&self, name: &SnapName) -> Outcome<(FoundLun, Rc<Snapshot>)> {
        let found = self.lun(&name.of)?;
        let snapshot = found.open_snapshot(&name.snap)?;
        Ok((found, snapshot))
    }

    /// All snapshots, or those of one LUN.
    pub async fn snaps(&self, lun: Option<String>) -> Outcome<Vec<SnapView>> {
        let found = match lun {
            Some(lun) => vec![self.lun(&lun)?],
            None => self.all_luns(),
        };
        let mut all = Vec::new();
        for found in &found {
            for record in found.lun.snapshots() {
                let usage = found.lun.snapshot_use(&record.name).await;
                if let Err(error) = &usage {
                    tracing::warn!(snapshot = record.name, %error, "what the snapshot keeps is not known");
                }
                let used_bytes = usage.ok().map(|u| u.bytes());
                all.push(SnapView { used_bytes, ..snap_view(found, &record) });
            }
        }
        Ok(all)
    }

    /// All living LUNs.
    pub(super) fn all_luns(&self) -> Vec<FoundLun> {
        let mut all = Vec::new();
        for (pool_name, pool) in self.open_pools_now() {
            let luns = pool.pool.luns();
            all.extend(luns.into_iter().map(|lun| FoundLun {
                pool_name: pool_name.clone(),
                pool: pool.clone(),
                lun,
            }));
        }
        all
    }

    /// Takes a snapshot. Below a datastore the volume is settled first, so that what was acknowledged is in it.
    pub async fn create_snap(&self, new: NewSnap, dry: bool) -> Outcome<Change<SnapView>> {
        let _turn = self.turn.take().await;
        check_name("snapshot", &new.name)?;
        let found = self.lun(&new.lun)?;
        let name = format!("{}@{}", new.lun, new.name);
        if found.has_snapshot(&new.name) {
            return Err(Problem::exists("snap", &name));
        }
        if dry {
            return Ok(Change::would(format!("take snapshot {name}")));
        }
        let failed = |e: array::LunError| pool_problem(format!("snapshot {name} was not taken"), &e);
        let snapshot = match self.datastore_on(found.lun.uuid()) {
            Some(datastore) => self.cut_below(&datastore, &new.name).await?,
            None => found.lun.snapshot(&new.name).await.map_err(failed)?,
        };
        let record = snapshot.record().ok_or_else(|| Problem::not_found("snap", &name))?;
        self.refresh_changed(&found);
        Ok(Change::Done(snap_view(&found, &record)))
    }

    /// Removes a snapshot.
    pub async fn remove_snap(&self, word: &str, how: Removal) -> Outcome<Change<SnapView>> {
        let _turn = self.turn.take().await;
        let name = SnapName::parse(word)?;
        let (found, snapshot) = self.snapshot(&name)?;
        let record = snapshot.record().ok_or_else(|| Problem::not_found("snap", word))?;
        let view = snap_view(&found, &record);
        if let Some(export) = self.export_of_snapshot(found.lun.uuid(), &name.snap) {
            return Err(Problem::new(
                "KGM-SNP-0001",
                Kind::Conflict,
                format!("snapshot {word} is not removed"),
            )
            .why(format!("it is served as export \"{export}\""))
            .hint(format!("kagami export stop {export}")));
        }
        if how.dry_run {
            return Ok(Change::Would(Plan {
                would: vec![format!("remove snapshot {word}")],
                loses: vec![format!(
                    "snapshot {word}, taken {}",
                    view.created_at.clone().unwrap_or_default()
                )],
                frees_bytes: 0,
            }));
        }
        drop(snapshot);
        found
            .lun
            .remove_snapshot(&name.snap)
            .await
            .map_err(|e| pool_problem(format!("snapshot {word} was not removed"), &e))?;
        self.refresh_changed(&found);
        Ok(Change::Done(view))
    }

    /// Sets a LUN back to a snapshot, or gives up what an earlier revert left.
    pub async fn revert_snap(&self, word: &str, accept: bool, dry: bool) -> Outcome<Change<LunView>> {
        let _turn = self.turn.take().await;
        let name = SnapName::parse(word)?;
        let found = self.lun(&name.of)?;
        let failed = |e: array::LunError| pool_problem(format!("LUN \"{}\" was not reverted", name.of), &e);
        // What is accepted is the LUN's: its snapshot may be gone by now.
        if accept {
            if found.lun.record().is_none_or(|r| r.abandoned.is_none()) {
                return Err(failed(array::LunError::NotReverted(name.of.clone())));
            }
            if dry {
                return Ok(Change::Would(Plan {
                    would: vec![format!("accept the revert of LUN {}", name.of)],
                    loses: vec!["what the LUN held before the revert".into()],
                    frees_bytes: 0,
                }));
            }
            found.lun.accept().await.map_err(failed)?;
            return Ok(Change::Done(lun_view(&found.pool_name, &found.lun)));
        }
        found.open_snapshot(&name.snap)?;
        self.unclaimed(&found, "reverted")?;
        if found.lun.record().is_some_and(|r| r.abandoned.is_some()) {
            return Err(failed(array::LunError::Reverted(found.lun.name())));
        }
        if dry {
            return Ok(Change::Would(Plan {
                would: vec![format!("revert LUN {} to {word}", name.of)],
                loses: vec![format!("what was written since {word}; it is kept until --accept")],
                frees_bytes: 0,
            }));
        }
        found.lun.revert(&name.snap).await.map_err(failed)?;
        Ok(Change::Done(lun_view(&found.pool_name, &found.lun)))
    }

    /// Makes a writable LUN from a snapshot.
    pub async fn create_clone(&self, new: NewClone, dry: bool) -> Outcome<Change<LunView>> {
        let _turn = self.turn.take().await;
        check_name("LUN", &new.name)?;
        let name = SnapName::parse(&new.snap)?;
        let (found, _) = self.snapshot(&name)?;
        if found.pool.pool.lun(&new.name).is_some() {
            return Err(Problem::exists("lun", &new.name));
        }
        if dry {
            return Ok(Change::would(format!("make LUN {} from {} in constant time", new.name, new.snap)));
        }
        let lun = found
            .pool
            .pool
            .clone_lun(&found.lun.name(), &name.snap, NewLun::new(&new.name, 0))
            .await
            .map_err(|e| pool_problem(format!("LUN \"{}\" was not made", new.name), &e))?;
        Ok(Change::Done(lun_view(&found.pool_name, &lun)))
    }

    /// All group cuts: snapshots of one group, put together.
    pub async fn group_cuts(&self) -> Outcome<Vec<GroupCutView>> {
        let mut cuts: BTreeMap<String, GroupCutView> = BTreeMap::new();
        for view in self.snaps(None).await? {
            let Some(group) = view.group else { continue };
            let name = view.name.rsplit('@').next().unwrap_or_default().to_owned();
            let empty = || GroupCutView {
                id: group.clone(),
                name,
                members: Vec::new(),
                state: "cut".into(),
                hold_us: None,
            };
            cuts.entry(group.clone()).or_insert_with(empty).members.push(view.name);
        }
        let mut all: Vec<GroupCutView> = cuts.into_values().collect();
        all.extend(self.doubts().into_iter().map(|d| d.view()));
        Ok(all)
    }

    /// Cuts over several pools that no pool which is here has decided.
    fn doubts(&self) -> Vec<Doubt> {
        let pools = self.open_pools_now();
        let mut doubts = Vec::new();
        for (pool_name, open) in &pools {
            for cut in open.pool.in_doubt() {
                let here = match cut.decider {
                    Decider::Pool(uuid) => pools.iter().find(|(_, p)| p.pool.uuid() == uuid),
                    Decider::Outside => None,
                };
                let decided = here.map(|(_, p)| p.pool.group_decided(cut.group));
                doubts.push(Doubt {
                    pool_name: pool_name.clone(),
                    pool: Rc::clone(&open.pool),
                    cut,
                    decided,
                });
            }
        }
        doubts
    }

    /// Ends cuts that are in doubt: as the deciding pool says where that is here, else as the operator says.
    pub async fn resolve_groups(&self, new: ResolveGroup, dry: bool) -> Outcome<Change<Vec<GroupCutView>>> {
        let _turn = self.turn.take().await;
        let wanted =
            |d: &Doubt| new.group.as_ref().is_none_or(|g| d.cut.group.to_string().starts_with(g.as_str()));
        let doubts: Vec<Doubt> = self.doubts().into_iter().filter(wanted).collect();
        if let (Some(group), true) = (&new.group, doubts.is_empty()) {
            return Err(Problem::not_found("group", group).why("no cut of this identity is in doubt"));
        }
        let mut plan = Plan::default();
        let mut ended = Vec::new();
        for doubt in doubts {
            let happened = match (doubt.decided, new.happened) {
                (Some(decided), Some(said)) if decided != said => {
                    return Err(Problem::new(
                        "KGM-GRP-0002",
                        Kind::Refused,
                        format!("cut {} is not resolved so", doubt.cut.group),
                    )
                    .why(format!("the deciding pool is here, and says that it {}", was(decided)))
                    .hint("kagami group resolve, without --happened"));
                }
                (Some(decided), _) => decided,
                (None, Some(said)) => said,
                (None, None) => {
                    return Err(Problem::new(
                        "KGM-GRP-0003",
                        Kind::Refused,
                        format!("cut {} stays in doubt", doubt.cut.group),
                    )
                    .why(doubt.state())
                    .hint(
                        "kagami pool import the deciding pool, or kagami group resolve ID --happened yes|no",
                    ));
                }
            };
            plan.would.push(format!(
                "resolve cut {} in pool {}: it {}",
                doubt.cut.group,
                doubt.pool_name,
                was(happened)
            ));
            if doubt.decided.is_none() {
                plan.loses.push("the certainty that all its members have it or none".into());
            }
            if !dry {
                let failed =
                    |e| disk_problem("KGM-GRP-0004", format!("cut {} was not resolved", doubt.cut.group), &e);
                doubt.pool.resolve(doubt.cut.group, happened).await.map_err(failed)?;
                tracing::warn!(group = %doubt.cut.group, happened, by_hand = doubt.decided.is_none(), "a cut was resolved");
                ended.push(GroupCutView { state: was(happened).into(), ..doubt.view() });
            }
        }
        Ok(if dry { Change::Would(plan) } else { Change::Done(ended) })
    }

    /// Cuts several LUNs at one instant.
    pub async fn create_group_cut(&self, new: NewGroupCut, dry: bool) -> Outcome<Change<GroupCutView>> {
        let _turn = self.turn.take().await;
        check_name("snapshot", &new.name)?;
        let mut members = Vec::new();
        for word in &new.luns {
            let found = self.lun(word)?;
            if found.has_snapshot(&new.name) {
                return Err(Problem::exists("snap", &format!("{word}@{}", new.name)));
            }
            members.push(found);
        }
        if members.is_empty() {
            return Err(Problem::usage("a cut of no LUN"));
        }
        if dry {
            return Ok(Change::would(format!("cut {} LUNs at one instant as @{}", members.len(), new.name)));
        }
        let (id, hold) = self.cut_luns(&members, &new.name).await?;
        members.iter().for_each(|found| self.refresh_changed(found));
        Ok(Change::Done(GroupCutView {
            id: id.to_string(),
            name: new.name.clone(),
            state: "cut".into(),
            members: new.luns.iter().map(|l| format!("{l}@{}", new.name)).collect(),
            hold_us: Some(u64::try_from(hold.as_micros()).unwrap_or(u64::MAX)),
        }))
    }
}
