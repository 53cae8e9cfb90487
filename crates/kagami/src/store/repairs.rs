//! `disk repair`: a chain whose links do not fit together any more (R18). Shows the evidence, and does nothing until
//! somebody who has looked at it says why.

use std::time::SystemTime;

use backup::{BackupDisk, Repository};
use serde_json::json;
use vmdisk::repair::{Evidence, Mismatch, evidence, repair};

use super::Store;
use super::disks::{chain_problem, folder};
use crate::api::Change;
use crate::cli::backups::repository_problem;
use crate::model::{MismatchView, Plan, RepairDisk, RepairView, RepairedView};
use crate::problem::{Kind, Outcome, Problem};

/// The evidence as REST and `-o json` show it.
fn mismatch_view(found: &Mismatch) -> MismatchView {
    let time = |time: Option<SystemTime>| {
        let at = time.and_then(|t| jiff::Timestamp::try_from(t).ok());
        at.map(|at| at.to_string())
    };
    MismatchView {
        child: found.child.clone(),
        parent: found.parent.clone(),
        noted_cid: found.noted.to_string(),
        found_cid: found.found.to_string(),
        child_changed_at: time(found.child_changed),
        parent_changed_at: time(found.parent_changed),
        commit_from: found.mixed.clone(),
        compared_blocks: found.samples.map(|s| s.compared),
        equal_blocks: found.samples.map(|s| s.equal),
    }
}

/// One line for people.
fn words(found: &MismatchView) -> String {
    let unknown = || "at an unknown time".to_owned();
    let child = found.child_changed_at.clone().unwrap_or_else(unknown);
    let parent = found.parent_changed_at.clone().unwrap_or_else(unknown);
    let compared = match (found.compared_blocks, found.equal_blocks) {
        (Some(compared), Some(equal)) => {
            format!("; {equal} of {compared} sampled blocks are as in the backup")
        }
        _ => String::new(),
    };
    format!(
        "note in {} that its parent {} has CID {} (it noted {}); the child's data changed {child}, the parent's \
         {parent}{compared}",
        found.child, found.parent, found.found_cid, found.noted_cid
    )
}

impl Store {
    /// The disk of a backup, to compare with.
    async fn backup_disk(&self, new: &RepairDisk) -> Outcome<Option<BackupDisk>> {
        let (Some(repo), Some(backup), Some(slot)) = (&new.repo, &new.backup, &new.backup_disk) else {
            return match (&new.repo, &new.backup, &new.backup_disk) {
                (None, None, None) => Ok(None),
                _ => Err(Problem::usage("a backup to compare with has three parts")
                    .hint("--backup BACKUP --repo DIR --backup-disk SLOT")),
            };
        };
        let (dir, word) = (repo.clone(), backup.clone());
        let opened = lane::offload(move || {
            let repository = Repository::open(&dir, backup::Options::default())?;
            let manifest = repository.resolve(&word).and_then(|id| repository.manifest(id))?;
            Ok::<_, backup::Error>((repository, manifest))
        });
        let failed = |e| repository_problem(format!("backup {backup} cannot be compared with"), &e);
        let (repository, manifest) = opened.await.map_err(failed)?;
        repository.disk(&manifest, slot).map(Some).map_err(failed)
    }

    /// Shows what does not fit together in a chain, and makes the children say what their parents are now, when somebody
    /// gave a reason for the record.
    pub async fn repair_disk(&self, text: &str, new: RepairDisk, dry: bool) -> Outcome<Change<RepairView>> {
        let _turn = self.turn.take().await;
        let (datastore, name) = self.file(text)?;
        let backup = self.backup_disk(&new).await?;
        let folder = folder(&datastore);
        let compare = backup.as_ref().map(|disk| disk as &dyn block::Disk);
        let Evidence { links, mismatches, others } = evidence(&folder, &name.path, compare, self).await;
        let mut view = RepairView {
            name: name.to_string(),
            chain: links,
            mismatches: mismatches.iter().map(mismatch_view).collect(),
            others: others.iter().map(ToString::to_string).collect(),
            repaired: Vec::new(),
        };
        let title = || format!("the chain of {name} is not repaired");
        if let Some(error) = others.first() {
            // What is missing, of another length or in the middle of a commit is not mended by a changed CID.
            return Err(chain_problem(title(), error));
        }
        if mismatches.is_empty() {
            return Ok(Change::Done(view));
        }
        if dry {
            let loses = mismatches.iter().map(|m| {
                let since = "the sign that its parent was written after it was made";
                format!("{since}: {} noted CID {} (kept in its old descriptor)", m.child, m.noted)
            });
            let plan = Plan {
                would: view.mismatches.iter().map(words).collect(),
                loses: loses.collect(),
                frees_bytes: 0,
            };
            return Ok(Change::Would(plan));
        }
        let reason = new.reason.as_deref().map(str::trim).filter(|reason| !reason.is_empty());
        let Some(reason) = reason else {
            return Err(Problem::new("KGM-DSK-0006", Kind::Refused, title())
                .why("the record wants to know who decided, and why")
                .hint(format!("kagami disk repair {text} --reason TEXT")));
        };
        let audit = json!({
            "at": jiff::Timestamp::now().to_string(),
            "what": "disk repair",
            "disk": view.name,
            "reason": reason,
            "mismatches": view.mismatches,
        });
        self.note_audit(&audit).await?;
        let repaired = self.with_closed(&datastore, &name.path, "repaired", async || {
            let mut done = Vec::new();
            // From the base up: what a child notes is final by then.
            for found in mismatches.iter().rev() {
                let repaired = repair(&folder, found, reason, SystemTime::now()).await;
                let repaired = repaired.map_err(|e| chain_problem(title(), &e))?;
                let (kept, record) = (repaired.kept, repaired.record);
                done.push(RepairedView { child: found.child.clone(), kept, record });
            }
            Ok(done)
        });
        view.repaired = repaired.await?;
        tracing::warn!(disk = view.name, reason, "a chain was repaired by the operator");
        Ok(Change::Done(view))
    }
}
