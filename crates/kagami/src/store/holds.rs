//! What backups hold of the past of LUNs: the generation that the next one compares with, and nothing else.

use array::{Lun, LunError};
use backup::Repository;
use block::Generation;

use super::Store;
use super::backups::Frozen;
use super::luns::lun_view;
use super::pools::pool_problem;
use crate::api::Change;
use crate::model::{LunView, Plan, ReleaseHold};
use crate::problem::{Kind, Outcome, Problem};

impl Store {
    /// The generations of this backup are kept for the next one; all others that earlier ones held are let go, on whatever
    /// LUN: a disk may have left the VM, and the backup before may be gone (R42).
    pub(super) async fn hold_generations(
        &self,
        vm: &str,
        repository: &Repository,
        frozen: &Frozen,
    ) -> Outcome {
        let holder = format!("backup of {vm} to {}", repository.id());
        let failed =
            |e: LunError| pool_problem(format!("the next backup of \"{vm}\" will read everything"), &e);
        for disk in &frozen.disks {
            disk.below.lun.hold(disk.generation, &holder).await.map_err(failed)?;
        }
        let kept: Vec<Generation> = frozen.disks.iter().map(|disk| disk.generation).collect();
        for found in self.all_luns() {
            // What stays costs room, not the backup; the next one tries again.
            if let Err(error) = release_others(&found.lun, &kept, &holder).await {
                tracing::warn!(lun = found.lun.name(), holder, %error, "an older generation stays held");
            }
        }
        Ok(())
    }

    /// Lets go what a holder keeps of a LUN: one that will not come back, as the backups of a repository that is gone.
    pub async fn release_holder(&self, word: &str, new: ReleaseHold, dry: bool) -> Outcome<Change<LunView>> {
        let _turn = self.turn.take().await;
        let found = self.lun(word)?;
        let held: Vec<String> = found.lun.holds().into_iter().map(|(_, by)| by).collect();
        if !held.contains(&new.holder) {
            let title = format!("LUN \"{word}\" is not held by \"{}\"", new.holder);
            let why = if held.is_empty() {
                "nobody holds it".into()
            } else {
                format!("held by: {}", held.join("; "))
            };
            return Err(Problem::new("KGM-LUN-0010", Kind::NotFound, title)
                .why(why)
                .hint("kagami pool show POOL -o wide"));
        }
        if dry {
            return Ok(Change::Would(Plan {
                would: vec![format!("let go what \"{}\" holds of LUN {word}", new.holder)],
                loses: vec!["that the next backup there reads only what changed: it reads everything".into()],
                frees_bytes: 0,
            }));
        }
        let failed = |e| pool_problem(format!("LUN \"{word}\" is held as before"), &e);
        release_others(&found.lun, &[], &new.holder).await.map_err(failed)?;
        Ok(Change::Done(lun_view(&found.pool_name, &found.lun)))
    }
}

/// Lets go whatever a holder keeps of a LUN, but these. One that is kept for another LUN may be in the history of this
/// one, where it is a clone.
async fn release_others(lun: &Lun, kept: &[Generation], holder: &str) -> Result<(), LunError> {
    let held = lun.holds().into_iter().filter(|(_, by)| by == holder).map(|(generation, _)| generation);
    let (stay, go): (Vec<Generation>, Vec<Generation>) =
        held.partition(|generation| kept.contains(generation));
    if let ([only], false) = (&stay[..], go.is_empty()) {
        return lun.release_all_but(*only, holder).await.map(drop);
    }
    for generation in go {
        lun.release(generation, holder).await?;
    }
    Ok(())
}
