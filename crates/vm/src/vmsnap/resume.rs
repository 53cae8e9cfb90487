//! Going on with a backup that a restart interrupted: the VM is on its redo logs and the bases are still frozen.

use std::rc::Rc;

use array::Lun;

use super::file::{JobFile, volume_id};
use super::{FrozenBase, Reserve, Vmsnap, VmsnapError};
use crate::job_record::Step;
use crate::registry::{OpenDisk, Vm};

impl Vmsnap {
    /// Takes up the job of a VM whose J says frozen, with its bases as they were at the cut. `None` when there is no such
    /// job, or not every disk that it names is open on its one redo log: what is left then is for
    /// [`consolidate`](super::consolidate).
    pub async fn take_up(
        vm: &Rc<Vm>,
        mapped: &[Rc<Lun>],
        reserve: Reserve,
    ) -> Result<Option<Self>, VmsnapError> {
        let Some(job) = JobFile::open(&vm.datastore, &vm.vmx_path).await? else { return Ok(None) };
        if job.record.state().step != Step::Frozen {
            return Ok(None);
        }
        let (mut frozen, mut disks) = (Vec::new(), Vec::<OpenDisk>::new());
        for entry in &job.record.payload.disks {
            let fits = |d: &OpenDisk| {
                let links = d.disk.links();
                d.slot.to_string() == entry.slot
                    && volume_id(&d.datastore) == entry.volume
                    && links.len() == 2
                    && links[0].path == entry.base
                    && entry.redos.contains(&links[1].path)
                    && !d.disk.is_committing()
            };
            let Some(open) = vm.disks().into_iter().find(fits) else { return Ok(None) };
            let Some(disk) = open.disk.frozen(0) else { return Ok(None) };
            frozen.push(FrozenBase { open: open.clone(), disk });
            disks.push(open);
        }
        if frozen.is_empty() {
            return Ok(None);
        }
        let floors = reserve.floors(&disks, mapped);
        Ok(Some(Self { vm: Rc::clone(vm), job, frozen, floors }))
    }
}
