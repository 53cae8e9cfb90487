//! The one cut: redo logs under VMs' disks on VMFS and snapshots of LUNs, in several pools and for several VMs, at one
//! instant and all or none (semantics page, chapter 10; R32 to R34).
//!
//! ```text
//! prepare    each J: INTENT, redo logs made, PREPARED; each pool: its leg in its journal       durable
//! close      the gates of all members; wait until they are empty and what lies above the LUNs is in them
//!            (500 ms at most in all: then the gates open, and there is no cut)
//! cut        redo logs take over and LUNs get a new top layer, in memory: no flush of a redo cut lies in the hold
//! open       the gates; flushes of the members are held from here on
//! settle     every base and every pool                                                         durable
//! DECIDE     one record                                                                        durable
//! keep       each J: FROZEN; each .vmx names the redo logs; each pool's leg, the deciding one last; flushes are answered
//! ```
//!
//! Which record decides: the group record in the pool of the first LUN member. With no LUN member, J of the first VM:
//! FROZEN there. Every prepared leg names its decider, so after a crash [`crate::vmsnap::resolve`] and the pools
//! ([`Pool::in_doubt`]) ask the same record: there, and each leg rolls forward; not there, and each rolls back. The
//! decider forgets last. A `.vmx` decides nothing here; it follows J.
//!
//! When the deciding record cannot be written, nobody knows whether it is there. VMs then stay on their redo logs, by
//! the word of their own J, so nothing their guests flush later can be rolled back; pools stay in doubt until they are
//! opened again.

use std::cell::RefCell;
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use array::{Decider, Lun, LunError, Pool, Prepared};
use block::{DiskError, Gate};
use lane::sync::together;
use uuid::Uuid;
use vmdisk::VmDisk;

use crate::faults::{Fault, planted};
use crate::job_record::{DecidedBy, State, Step};
use crate::registry::Datastore;
use crate::vmsnap::{PreparedVm, SwitchedVm, Vmsnap, VmsnapError};

pub use crate::vmsnap::Wanted as WantedVm;

/// No gate is closed longer than this: what is not still by then is named, and the cut is given up.
pub const BUDGET: Duration = Duration::from_millis(500);

/// What is to be cut together.
pub struct Wanted {
    /// Names the cut.
    pub group: Uuid,
    /// Name of the snapshots that the LUNs get.
    pub snapshot: String,
    /// LUNs, in one pool or several. The pool of the first decides.
    pub luns: Vec<Rc<Lun>>,
    /// Disks of VMs that write to these LUNs: their gates are closed too.
    pub above: Vec<Rc<VmDisk>>,
    /// Datastores that lie on these LUNs: they settle into them, so that what was acknowledged is in the cut whether or
    /// not a guest flushed it.
    pub datastores: Vec<Rc<Datastore>>,
    /// VMs whose disks go to redo logs.
    pub vms: Vec<WantedVm>,
}

/// A cut that was made.
pub struct Cut {
    /// Names it.
    pub group: Uuid,
    /// From the first gate closed to the last gate opened.
    pub hold: Duration,
    /// When.
    pub at: jiff::Timestamp,
    /// VMs that are on redo logs now, in the order in which they were given.
    pub vms: Vec<Vmsnap>,
}

/// Why there is no cut.
#[derive(Debug, thiserror::Error)]
pub enum CutError {
    /// Nothing is to be cut.
    #[error("a cut of nothing")]
    Empty,
    /// A member did not become still in time.
    #[error("writes under way on {member} did not end within {} ms", BUDGET.as_millis())]
    Late {
        /// The slow one.
        member: String,
    },
    /// A VM's disks cannot go to redo logs.
    #[error("VM {vm}: {source}")]
    Vm {
        /// The VM.
        vm: String,
        /// Why not.
        source: VmsnapError,
    },
    /// A pool says no.
    #[error("pool {pool}: {source}")]
    Pool {
        /// The pool.
        pool: String,
        /// Why not.
        source: LunError,
    },
    /// What lies on a member does not settle into it.
    #[error("{what} does not settle: {source}")]
    Settle {
        /// A disk or a datastore.
        what: String,
        /// Why not.
        source: Box<dyn std::error::Error>,
    },
    /// The deciding record may be there or not.
    #[error("the cut {group} is in doubt: its record was not written: {why}")]
    InDoubt {
        /// The cut.
        group: Uuid,
        /// What happened.
        why: String,
    },
}

/// Gates that are closed; dropping opens them, whatever happened (I8).
pub struct Closed {
    gates: Vec<(String, Rc<Gate>)>,
}

impl Closed {
    /// Closes gates, each with the name of its member.
    pub fn close(gates: Vec<(String, Rc<Gate>)>) -> Self {
        gates.iter().for_each(|(_, gate)| gate.close());
        Self { gates }
    }

    /// Waits until everybody is out, or until `deadline`: then names a member that is not still.
    pub async fn drained(&self, deadline: Instant) -> Result<(), CutError> {
        for (member, gate) in &self.gates {
            let drained = in_time(deadline, gate.drained()).await;
            if let Some(late) = late(deadline, member, drained.is_some()) {
                return Err(late);
            }
        }
        Ok(())
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        self.gates.iter().for_each(|(_, gate)| gate.open());
    }
}

/// Waits for something, no longer than until `deadline`: `None` then. Only for what may be dropped: a wait, or a task,
/// which goes on by itself.
async fn in_time<T>(deadline: Instant, work: impl Future<Output = T>) -> Option<T> {
    let mut work = pin!(work);
    let mut alarm = pin!(lane::sleep(deadline.saturating_duration_since(lane::now())));
    std::future::poll_fn(|cx| match work.as_mut().poll(cx) {
        Poll::Ready(answer) => Poll::Ready(Some(answer)),
        Poll::Pending => alarm.as_mut().poll(cx).map(|()| None),
    })
    .await
}

/// A member that was not still by the deadline; what became still after it is late too.
fn late(deadline: Instant, member: &str, still: bool) -> Option<CutError> {
    let is_late = !still || lane::now() >= deadline;
    is_late.then(|| CutError::Late { member: member.to_owned() })
}

/// Cuts everything wanted. On an error nothing is cut and nothing is left behind, but for [`CutError::InDoubt`].
pub async fn cut(wanted: &Wanted) -> Result<Cut, CutError> {
    if wanted.luns.is_empty() && wanted.vms.is_empty() {
        return Err(CutError::Empty);
    }
    // Most of what is to settle settles before anybody is held.
    settle(&wanted.datastores).await?;
    let legs = Legs::prepare(wanted).await?;
    let (cut, hold, at) = legs.hold(wanted).await?;
    let vms = cut.decide(wanted.group).await?;
    let members = wanted.luns.len() + vms.len();
    tracing::info!(cut = wanted.snapshot, group = %wanted.group, members, hold_us = hold.as_micros() as u64, "cut");
    Ok(Cut { group: wanted.group, hold, at, vms })
}

fn named(datastore: &Rc<Datastore>) -> String {
    format!("datastore {}", datastore.name)
}

async fn settle(datastores: &[Rc<Datastore>]) -> Result<(), CutError> {
    for datastore in datastores {
        let failed = |e| CutError::Settle { what: named(datastore), source: Box::new(e) };
        datastore.volume.settle().await.map_err(failed)?;
    }
    Ok(())
}

/// What is prepared, durably and without effect: a leg in each pool, the deciding one first, and one for each VM.
#[derive(Default)]
struct Legs {
    pools: Vec<Prepared>,
    names: Vec<String>,
    vms: Vec<PreparedVm>,
}

/// What is cut in memory, and not decided.
struct CutLegs {
    pools: Vec<Prepared>,
    names: Vec<String>,
    decider: Option<Rc<Pool>>,
    vms: Vec<SwitchedVm>,
}

impl Legs {
    async fn prepare(wanted: &Wanted) -> Result<Self, CutError> {
        let mut legs = Self::default();
        match legs.prepare_all(wanted).await {
            Ok(()) => Ok(legs),
            Err(error) => {
                legs.abandon().await;
                Err(error)
            }
        }
    }

    async fn prepare_all(&mut self, wanted: &Wanted) -> Result<(), CutError> {
        let decider = wanted.luns.first().map(|lun| lun.pool().uuid());
        for (number, vm) in wanted.vms.iter().enumerate() {
            let decided_by = match decider {
                Some(pool) => DecidedBy::Pool(pool),
                None if number == 0 => DecidedBy::Job,
                None => DecidedBy::FirstJob,
            };
            let prepared = PreparedVm::prepare(vm, wanted.group, decided_by, wanted.vms.len()).await;
            let failed = |source| CutError::Vm { vm: vm.vm.name.clone(), source };
            self.vms.push(prepared.map_err(failed)?);
        }
        let Some(decider) = decider else { return Ok(()) };
        let mut pools: Vec<&Rc<Pool>> = Vec::new();
        for lun in &wanted.luns {
            if pools.iter().all(|p| p.uuid() != lun.pool().uuid()) {
                pools.push(lun.pool());
            }
        }
        for pool in pools {
            let here = wanted.luns.iter().filter(|lun| lun.pool().uuid() == pool.uuid());
            let members: Vec<_> = here.map(|lun| (Rc::clone(lun), wanted.snapshot.clone())).collect();
            let prepared = pool.prepare_cut(wanted.group, Decider::Pool(decider), &members).await;
            self.pools.push(prepared.map_err(|source| CutError::Pool { pool: pool.name(), source })?);
            self.names.push(pool.name());
        }
        Ok(())
    }

    /// There is no cut: nothing prepared is left.
    async fn abandon(self) {
        for vm in self.vms {
            vm.abandon().await;
        }
        abandon(self.pools, &self.names).await;
    }

    /// Closes all gates, settles, cuts, opens: how long that held writes back, and when it was.
    async fn hold(self, wanted: &Wanted) -> Result<(CutLegs, Duration, jiff::Timestamp), CutError> {
        let begun = lane::now();
        let disks = wanted.above.iter().chain(self.vms.iter().flat_map(|vm| vm.disks().map(|d| &d.disk)));
        let gates = Closed::close(disks.map(|d| (d.top_path(), Rc::clone(d.gate()))).collect());
        let mut settling = None;
        let below = match still(wanted, &gates, begun + BUDGET, &mut settling).await {
            Ok(below) => below,
            Err(error) => {
                drop(gates);
                // No task is cancelled. Nobody is held by this one any more; what was prepared goes when it has ended.
                if let Some(task) = settling
                    && let Err(error) = task.await
                {
                    tracing::warn!(cut = wanted.snapshot, %error, "what made a cut late failed in the end");
                }
                self.abandon().await;
                return Err(error);
            }
        };
        let at = jiff::Timestamp::now();
        let vms = self.vms.into_iter().map(PreparedVm::switch).collect();
        self.pools.iter().for_each(Prepared::cut);
        drop(below);
        drop(gates);
        let hold = lane::now() - begun;
        let decider = wanted.luns.first().map(|lun| Rc::clone(lun.pool()));
        Ok((CutLegs { pools: self.pools, names: self.names, decider, vms }, hold, at))
    }
}

/// Puts what lies above LUN members into them.
struct Settling {
    disks: Vec<Rc<VmDisk>>,
    datastores: Vec<Rc<Datastore>>,
    /// What it is at.
    at: RefCell<String>,
}

impl Settling {
    /// `None` when nothing lies above.
    fn of(wanted: &Wanted) -> Option<Rc<Self>> {
        // Tables of redo logs that are still in memory.
        let disks: Vec<_> = wanted.above.iter().filter(|d| d.links().len() > 1).cloned().collect();
        let datastores = wanted.datastores.clone();
        let first = disks.first().map(|d| d.top_path()).or_else(|| datastores.first().map(named));
        Some(Rc::new(Self { disks, datastores, at: RefCell::new(first?) }))
    }

    async fn run(self: Rc<Self>) -> Result<(), CutError> {
        for disk in &self.disks {
            *self.at.borrow_mut() = disk.top_path();
            let failed = |e: DiskError| CutError::Settle { what: disk.top_path(), source: Box::new(e) };
            disk.flush_once().await.map_err(failed)?;
        }
        for datastore in &self.datastores {
            *self.at.borrow_mut() = named(datastore);
            settle(std::slice::from_ref(datastore)).await?;
        }
        Ok(())
    }
}

/// With the disks' gates closed: nobody is inside, what lies above the LUN members is settled into them, and their own
/// gates are closed and empty too. All of it before the deadline; what is not over by then is left in `settling`.
async fn still(
    wanted: &Wanted,
    gates: &Closed,
    deadline: Instant,
    settling: &mut Option<lane::Task<Result<(), CutError>>>,
) -> Result<Closed, CutError> {
    gates.drained(deadline).await?;
    if let Some(work) = Settling::of(wanted) {
        let task = settling.insert(lane::spawn(Rc::clone(&work).run()));
        let settled = in_time(deadline, task).await;
        let ended = settled.is_some();
        if let Some(answer) = settled {
            *settling = None;
            answer?;
        }
        if let Some(late) = late(deadline, &work.at.borrow(), ended) {
            return Err(late);
        }
    }
    // What works in the background writes to the LUN itself.
    let below = Closed::close(wanted.luns.iter().map(|l| (l.name(), l.gate())).collect());
    below.drained(deadline).await?;
    Ok(below)
}

async fn abandon(pools: Vec<Prepared>, names: &[String]) {
    for (leg, pool) in pools.into_iter().zip(names) {
        if let Err(error) = leg.abandon().await {
            tracing::error!(pool, %error, "a cut that was given up is forgotten at the next start");
        }
    }
}

impl CutLegs {
    /// Settles, writes the one record, and lets every leg follow it.
    async fn decide(self, group: Uuid) -> Result<Vec<Vmsnap>, CutError> {
        if let Err(error) = self.settle().await {
            for vm in self.vms {
                vm.roll_back().await;
            }
            abandon(self.pools, &self.names).await;
            return Err(error);
        }
        if planted(Fault::VmxBeforeRecord) {
            for vm in &self.vms {
                let failed = |source| CutError::Vm { vm: vm.vm.name.clone(), source };
                vm.write_vmx().await.map_err(failed)?;
            }
        }
        let decided = match (&self.decider, self.vms.first()) {
            (Some(pool), _) => pool.write_group_record(group).await.map_err(|e| e.to_string()),
            (None, Some(first)) => first.job.step(Step::Frozen).await.map_err(|e| e.to_string()),
            (None, None) => Ok(()),
        };
        if let Err(why) = decided {
            for vm in self.vms {
                vm.stay().await;
            }
            // Dropped, the legs stay in their pools' journals, in doubt, and hold no flush.
            return Err(CutError::InDoubt { group, why });
        }
        self.follow().await
    }

    /// Everything that was acknowledged before the cut is durable, in every leg.
    async fn settle(&self) -> Result<(), CutError> {
        let last = self.pools.len().saturating_sub(usize::from(planted(Fault::LegNotSettled)));
        let pools = together(self.pools[..last].iter().map(Prepared::settle)).await;
        for (settled, pool) in pools.into_iter().zip(&self.names) {
            let source = LunError::Disk;
            settled.map_err(|e| CutError::Pool { pool: pool.clone(), source: source(e) })?;
        }
        let vms = together(self.vms.iter().map(SwitchedVm::settle)).await;
        for (settled, vm) in vms.into_iter().zip(&self.vms) {
            settled.map_err(|source| CutError::Vm { vm: vm.vm.name.clone(), source })?;
        }
        Ok(())
    }

    /// The cut is decided: VMs first, then the pools, the deciding one last, as it is the one that is asked.
    async fn follow(self) -> Result<Vec<Vmsnap>, CutError> {
        let (mut vms, mut failed) = (Vec::new(), None);
        for vm in self.vms {
            let name = vm.vm.name.clone();
            match vm.keep().await {
                Ok(kept) => vms.push(kept),
                Err(source) => failed = Some(CutError::Vm { vm: name, source }),
            }
        }
        if failed.is_none()
            && vms.len() > 1
            && let Some(first) = vms.first()
            && first.state().decided_by == DecidedBy::Job
        {
            let known = State { decided_by: DecidedBy::Known, ..first.state() };
            let written = first.job.set(known).await;
            failed = written.err().map(|source| CutError::Vm { vm: first.vm.name.clone(), source });
        }
        for (leg, pool) in self.pools.into_iter().zip(self.names).rev() {
            if let Err(error) = leg.commit().await {
                failed = Some(CutError::Pool { pool, source: LunError::Disk(error) });
            }
        }
        match failed {
            None => Ok(vms),
            Some(error) => Err(error),
        }
    }
}
