//! Making redo logs for a VM and putting its disks on them: steps 0 to 4 of chapter 7, as a leg of a cut.

use std::rc::Rc;

use array::Lun;
use uuid::Uuid;
use vmdisk::chain::children;
use vmdisk::folder::Folder;
use vmdisk::{PreparedRedo, SwitchedRedo};

use super::file::{JobFile, has_catalogue, volume_id};
use super::reserve::Floors;
use super::{FrozenBase, Reserve, Vmsnap, VmsnapError, name_top};
use crate::faults::{Fault, planted};
use crate::job_record::{DecidedBy, Payload, State, Step, Switched};
use crate::registry::{OpenDisk, Vm};
use crate::vmx::Vmx;

/// A VM whose disks are to go to redo logs in a cut.
pub struct Wanted {
    /// The VM.
    pub vm: Rc<Vm>,
    /// Its disks that switch: on VMFS, one link each.
    pub disks: Vec<OpenDisk>,
    /// Its mapped LUNs that are cut at the same instant.
    pub mapped: Vec<Rc<Lun>>,
    /// Where the backup goes, for the record.
    pub repository: String,
    /// Room that must be free.
    pub reserve: Reserve,
}

/// Redo logs that are there, durable, and not in use; J says so.
pub(crate) struct PreparedVm {
    pub(crate) vm: Rc<Vm>,
    job: JobFile,
    redos: Vec<(OpenDisk, PreparedRedo)>,
    floors: Floors,
}

/// Redo logs that took over; whether that lasts is not decided.
pub(crate) struct SwitchedVm {
    pub(crate) vm: Rc<Vm>,
    pub(crate) job: JobFile,
    redos: Vec<(OpenDisk, SwitchedRedo)>,
    floors: Floors,
}

/// Step 0: what could not be folded back afterwards is not begun.
async fn preflight(wanted: &Wanted) -> Result<(), VmsnapError> {
    let vm = &wanted.vm;
    if has_catalogue(&vm.datastore, &vm.vmx_path).await? {
        let slot = wanted.disks.first().map_or_else(String::new, |d| d.slot.to_string());
        let why = "the VM has snapshots: its redo logs are the user's and are not committed".to_owned();
        return Err(VmsnapError::Refused { slot, why });
    }
    for open in &wanted.disks {
        let refused = |why: String| Err(VmsnapError::Refused { slot: open.slot.to_string(), why });
        if let Some(why) = open.mode.left_out() {
            return refused(why.to_owned());
        }
        if open.disk.links().len() > 1 {
            return refused("the disk is on a redo log that is not ours".to_owned());
        }
        let folder: Rc<dyn Folder> = Rc::clone(&open.datastore.folder) as Rc<dyn Folder>;
        let path = open.disk.top_path();
        let others = children(&folder, &path).await;
        let others =
            others.map_err(VmsnapError::chain(format!("the disks next to {path} cannot be read")))?;
        if let Some(other) = others.first() {
            return refused(format!("{path} has a redo log already that the VM does not use: {other}"));
        }
    }
    Ok(())
}

async fn payload(wanted: &Wanted, vms: usize) -> Result<Payload, VmsnapError> {
    let mut disks = Vec::new();
    for open in &wanted.disks {
        let named = open.disk.next_redo_path().await;
        let redo = named.map_err(VmsnapError::chain(format!("{}: no name for a redo log", open.slot)))?;
        let base_cid = open.disk.links().first().map_or(0, |l| l.cid.0);
        disks.push(Switched {
            slot: open.slot.to_string(),
            volume: volume_id(&open.datastore),
            base: open.disk.top_path(),
            base_cid,
            redos: vec![redo],
        });
    }
    Ok(Payload {
        vmx: wanted.vm.vmx_path.clone(),
        disks,
        vms: u32::try_from(vms).unwrap_or(u32::MAX),
        repository: wanted.repository.clone(),
        begun_at: jiff::Timestamp::now().to_string(),
    })
}

impl PreparedVm {
    /// Steps 0 to 2. When it returns J is PREPARED, and everything that the switch needs is durable.
    pub(crate) async fn prepare(
        wanted: &Wanted,
        group: Uuid,
        decided_by: DecidedBy,
        vms: usize,
    ) -> Result<Self, VmsnapError> {
        let vm = Rc::clone(&wanted.vm);
        preflight(wanted).await?;
        let floors = wanted.reserve.check(&wanted.disks, &wanted.mapped).await?;
        let payload = payload(wanted, vms).await?;
        let names: Vec<String> = payload.disks.iter().flat_map(|d| d.redos.clone()).collect();
        let mut redos = Vec::new();
        if planted(Fault::RedoBeforeJob) {
            redos = make(wanted, &names).await.map_err(|(error, _)| error)?;
        }
        let state = State { step: Step::Intent, group, decided_by, flipped: 0 };
        let job = JobFile::create(&vm.datastore, &vm.vmx_path, payload, state).await?;
        if !planted(Fault::RedoBeforeJob) {
            redos = match make(wanted, &names).await {
                Ok(redos) => redos,
                Err((error, all_gone)) => {
                    // J stays as long as what it names: the next job of this VM, or the next start, tries again.
                    if all_gone {
                        job.remove().await?;
                    }
                    return Err(error);
                }
            };
        }
        let prepared = Self { vm, job, redos, floors };
        if !planted(Fault::JobNotPrepared)
            && let Err(error) = prepared.job.step(Step::Prepared).await
        {
            prepared.abandon().await;
            return Err(error);
        }
        Ok(prepared)
    }

    /// The disks whose gates a cut closes.
    pub(crate) fn disks(&self) -> impl Iterator<Item = &OpenDisk> {
        self.redos.iter().map(|(open, _)| open)
    }

    /// Takes over, in memory only; all gates are closed and empty.
    pub(crate) fn switch(self) -> SwitchedVm {
        let redos = self.redos.into_iter().map(|(open, redo)| (open, redo.switch())).collect();
        SwitchedVm { vm: self.vm, job: self.job, redos, floors: self.floors }
    }

    /// Nothing was switched: the redo logs go, then J.
    pub(crate) async fn abandon(self) {
        let mut all_gone = true;
        for (open, redo) in self.redos {
            if let Err(error) = redo.abandon().await {
                all_gone = false;
                tracing::warn!(vm = self.vm.name, slot = %open.slot, %error, "a redo log that was not used stays");
            }
        }
        // J stays as long as what it names: the next job of this VM, or the next start, tries again.
        if all_gone && let Err(error) = self.job.remove().await {
            tracing::warn!(vm = self.vm.name, %error, "a job record stays");
        }
    }
}

/// Makes the redo logs. On failure they are removed again; whether that went well is said too.
async fn make(
    wanted: &Wanted,
    names: &[String],
) -> Result<Vec<(OpenDisk, PreparedRedo)>, (VmsnapError, bool)> {
    let mut redos: Vec<(OpenDisk, PreparedRedo)> = Vec::new();
    for (open, name) in wanted.disks.iter().zip(names) {
        let source = match open.disk.prepare_redo_at(name).await {
            Ok(redo) => {
                redos.push((open.clone(), redo));
                continue;
            }
            Err(source) => source,
        };
        drop(redos);
        let mut all_gone = true;
        for (open, name) in wanted.disks.iter().zip(names) {
            if let Err(error) = vmdisk::remove_link(&*open.datastore.folder, name).await {
                all_gone = false;
                tracing::warn!(vm = wanted.vm.name, %error, "a redo log that was not used stays");
            }
        }
        let what = format!("{} gets no redo log", open.slot);
        return Err((VmsnapError::Chain { what, source }, all_gone));
    }
    Ok(redos)
}

impl SwitchedVm {
    /// Makes the bases durable: before the decision, after the gates.
    pub(crate) async fn settle(&self) -> Result<(), VmsnapError> {
        for (open, redo) in &self.redos {
            let failed = VmsnapError::chain(format!("the frozen disk {} is not durable", open.slot));
            redo.settle().await.map_err(failed)?;
        }
        Ok(())
    }

    /// The `.vmx` names the redo logs.
    pub(crate) async fn write_vmx(&self) -> Result<(), VmsnapError> {
        let moved: Vec<_> = self.redos.iter().map(|(open, _)| (open.slot, open.disk.top_path())).collect();
        let edit = |vmx: &mut Vmx| {
            for ((open, _), (_, top)) in self.redos.iter().zip(&moved) {
                name_top(&self.vm, vmx, open, top, true);
            }
        };
        Ok(self.vm.edit_vmx(edit, &moved).await?)
    }

    /// The cut was decided: J says so, held flushes are answered, the `.vmx` follows. When J cannot say so flushes are
    /// refused until [`super::consolidate`] could write it, or until recovery did.
    pub(crate) async fn keep(self) -> Result<Vmsnap, VmsnapError> {
        if self.job.record.state().step != Step::Frozen {
            self.job.step(Step::Frozen).await?;
        }
        // From here on J counts, whatever the `.vmx` says.
        let named = self.write_vmx().await;
        let Self { vm, job, redos, floors } = self;
        let mut frozen = Vec::new();
        for (open, redo) in redos {
            let path = open.disk.top_path();
            frozen.push(FrozenBase { open: OpenDisk { path, ..open }, disk: redo.frozen() });
            redo.keep();
        }
        named?;
        Ok(Vmsnap { vm, job, frozen, floors })
    }

    /// It cannot be said whether the cut was decided, as the deciding record fails: this VM stays on its redo logs by the
    /// word of its own J, so that nothing that its guest flushes from now on can be rolled back. Where J fails too the
    /// guest's flushes are refused: they would promise what a rollback takes away.
    pub(crate) async fn stay(self) {
        let state = State { step: Step::Frozen, decided_by: DecidedBy::Known, ..self.job.record.state() };
        let name = self.vm.name.clone();
        let kept = match self.job.set(state).await {
            Ok(()) => self.keep().await.map(drop),
            Err(error) => Err(error),
        };
        if let Err(error) = kept {
            tracing::error!(vm = name, %error, "on redo logs that no record names: its flushes are refused");
        }
    }

    /// There is no cut: the redo logs are folded back and removed, then J. The gates are open again.
    pub(crate) async fn roll_back(self) {
        let Self { vm, job, redos, .. } = self;
        let (mut back, mut left) = (0, Vec::new());
        for (number, (open, redo)) in redos.into_iter().enumerate() {
            match redo.roll_back().await {
                Ok(()) => back |= 1 << number,
                Err(error) => {
                    tracing::error!(vm = vm.name, slot = %open.slot, %error, "a redo log was not folded back");
                    left.push(open);
                }
            }
        }
        let ended = if left.is_empty() {
            job.remove().await
        } else {
            // What could not be folded back goes on as a commit that a later one finishes.
            let decided_by = DecidedBy::Known;
            let state = State { step: Step::Committing, decided_by, flipped: back, ..job.record.state() };
            job.set(state).await.inspect(|()| left.iter().for_each(|open| open.disk.decided()))
        };
        if let Err(error) = ended {
            tracing::error!(vm = vm.name, %error, "a job record stays");
        }
    }
}
