//! A virtqueue on the lane: kicks are waited for, chains become requests, answers go into the used ring.
//!
//! ```text
//!   kick -> take: available ring -> chain -> task: Device::serve -> answer: used ring -> (all of a batch) call
//! ```
//!
//! A request under way is never dropped. Its descriptor cannot be taken twice before it is answered, so a queue has no more
//! requests under way than descriptors, whatever the guest does; and all queues together no more than the [`Budget`] has room for.
//!
//! The front end may take the memory away that the rings lie in, and give it back: so long nothing is taken, and answers wait.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;

use lane::Task;
use lane::ready::Watched;
use lane::sync::Waiters;
use smallvec::SmallVec;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::Device;
use super::bell::Bell;
use super::budget::{Budget, Cost};
use super::chain::{BadChain, Chain};
use super::dirty::Log;
use super::inflight::{Inflight, Tracked};
use super::memory::{Memory, Outside};
use crate::wire::first_of;

/// Descriptors of one queue at most.
pub(crate) const SIZE_MAX: u16 = 1024;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT`.
const NO_INTERRUPT: u16 = 1;

/// Why a queue was stopped. The guest has broken its rules, or the front end its own.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    #[error("the rings are not in guest memory")]
    Rings,
    #[error(transparent)]
    Outside(#[from] Outside),
    #[error("size or alignment of the rings, or more available than there are descriptors: {0}")]
    Queue(#[from] virtio_queue::Error),
    #[error("descriptor {0} is no head of a chain, or is under way already")]
    Head(u16),
    #[error("the chain at {0}: {1}")]
    Chain(u16, BadChain),
    #[error("the in-flight region has no room for this queue")]
    Untracked,
    #[error("waiting for the guest failed: {0}")]
    Kick(std::io::Error),
}

/// What all queues of a device share.
pub(crate) struct Shared<D> {
    pub device: Rc<D>,
    memory: RefCell<Rc<Memory>>,
    /// Pages written to are marked here while the guest migrates.
    pub log: RefCell<Option<Rc<Log>>>,
    pub logging: Cell<bool>,
    pub event_idx: Cell<bool>,
    pub inflight: RefCell<Option<Rc<Inflight>>>,
    budget: Budget,
    /// How often it was complained about this front end.
    complaints: Cell<u32>,
}

/// Complaints about one front end that are logged: it could fill a disk with them.
const COMPLAINTS_MAX: u32 = 20;

impl<D> Shared<D> {
    pub fn new(device: Rc<D>) -> Rc<Self> {
        Rc::new(Self {
            device,
            memory: RefCell::new(Memory::none()),
            log: RefCell::default(),
            logging: Cell::new(false),
            event_idx: Cell::new(false),
            inflight: RefCell::default(),
            budget: Budget::default(),
            complaints: Cell::new(0),
        })
    }

    /// Whether another complaint is worth a line of the log.
    pub fn may_complain(&self) -> bool {
        let count = self.complaints.get();
        self.complaints.set(count.saturating_add(1));
        count < COMPLAINTS_MAX
    }

    pub fn memory(&self) -> Rc<Memory> {
        Rc::clone(&self.memory.borrow())
    }

    pub fn set_memory(&self, memory: Rc<Memory>) {
        *self.memory.borrow_mut() = memory;
    }

    /// No request is under way.
    pub fn is_idle(&self) -> bool {
        self.budget.is_whole()
    }

    fn log(&self) -> Option<Rc<Log>> {
        self.logging.get().then(|| self.log.borrow().clone()).flatten()
    }
}

/// Where a ring is, as the front end says.
#[derive(Copy, Clone, Default, PartialEq, Eq, Debug)]
pub(crate) struct Addresses {
    /// In the front end's own address space.
    pub table: u64,
    pub available: u64,
    pub used: u64,
    /// Guest address under which writes to the used ring are logged.
    pub log: Option<u64>,
}

/// A queue of a device.
pub(crate) struct Ring<D> {
    index: u16,
    shared: Rc<Shared<D>>,
    size: Cell<u16>,
    base: Cell<u16>,
    addresses: Cell<Option<Addresses>>,
    queue: RefCell<Option<Queue>>,
    tracked: RefCell<Option<Tracked>>,
    /// Taken over from the daemon before us, to be done first.
    left: RefCell<Vec<u16>>,
    kick: RefCell<Option<Rc<Watched>>>,
    call: RefCell<Option<Bell>>,
    error: RefCell<Option<Bell>>,
    enabled: Cell<bool>,
    /// Stopped for good, until it is set up again.
    broken: Cell<bool>,
    /// Its rings are in guest memory.
    placed: Cell<bool>,
    /// Answers that wait until the rings are in memory again, with the number of bytes written to the guest.
    held: RefCell<Vec<(Chain, u32)>>,
    /// What the next request takes, for which there was no room.
    starved: Cell<Option<Cost>>,
    closed: Cell<bool>,
    taken: RefCell<Vec<bool>>,
    under_way: Cell<u16>,
    call_planned: Cell<bool>,
    /// Changes with everything that the waiting task must know.
    epoch: Cell<u64>,
    changed: Waiters,
    task: RefCell<Option<Task<()>>>,
}

impl<D: Device> Ring<D> {
    /// A queue that is not set up.
    pub fn new(index: u16, shared: &Rc<Shared<D>>) -> Rc<Self> {
        Rc::new(Self {
            index,
            shared: Rc::clone(shared),
            size: Cell::new(0),
            base: Cell::new(0),
            addresses: Cell::new(None),
            queue: RefCell::default(),
            tracked: RefCell::default(),
            left: RefCell::default(),
            kick: RefCell::default(),
            call: RefCell::default(),
            error: RefCell::default(),
            enabled: Cell::new(false),
            broken: Cell::new(false),
            placed: Cell::new(true),
            held: RefCell::default(),
            starved: Cell::new(None),
            closed: Cell::new(false),
            taken: RefCell::default(),
            under_way: Cell::new(0),
            call_planned: Cell::new(false),
            epoch: Cell::new(0),
            changed: Waiters::new(),
            task: RefCell::default(),
        })
    }

    fn change(&self) {
        self.epoch.set(self.epoch.get() + 1);
        self.changed.wake_all();
    }

    /// It takes requests, or would as soon as it is enabled.
    pub fn is_started(&self) -> bool {
        self.queue.borrow().is_some()
    }

    /// Number of descriptors; false when that is no size for a ring.
    pub fn set_size(&self, size: u32) -> bool {
        let good = size <= u32::from(SIZE_MAX) && size.is_power_of_two() && !self.is_started();
        if good {
            self.size.set(size as u16);
        }
        good
    }

    /// Where in the available ring it begins; false when it has begun.
    pub fn set_base(&self, base: u32) -> bool {
        let good = base <= u32::from(u16::MAX) && !self.is_started();
        if good {
            self.base.set(base as u16);
        }
        good
    }

    /// Where its rings are. May come again while it runs, to switch logging.
    pub fn set_addresses(self: &Rc<Self>, addresses: Addresses) -> Result<(), Broken> {
        self.addresses.set(Some(addresses));
        self.place()
    }

    /// Finds the rings in memory as it is now. Where they are not in it the queue rests until they are again: a front
    /// end may exchange memory piece by piece.
    pub fn place(self: &Rc<Self>) -> Result<(), Broken> {
        let found = match &mut *self.queue.borrow_mut() {
            Some(queue) => self.place_queue(queue),
            None => return Ok(()),
        };
        if self.placed.replace(found.is_ok()) != found.is_ok() {
            match &found {
                Ok(()) => {
                    self.held.take().into_iter().for_each(|(chain, written)| self.answer(chain, written))
                }
                Err(why) => {
                    let (device, queue) = (self.shared.device.name(), self.index);
                    tracing::debug!(device, queue, %why, "a queue rests");
                }
            }
            self.change();
        }
        found
    }

    fn place_queue(&self, queue: &mut Queue) -> Result<(), Broken> {
        let addresses = self.addresses.get().ok_or(Broken::Rings)?;
        let memory = self.shared.memory();
        queue.try_set_desc_table_address(memory.guest_address(addresses.table)?)?;
        queue.try_set_avail_ring_address(memory.guest_address(addresses.available)?)?;
        queue.try_set_used_ring_address(memory.guest_address(addresses.used)?)?;
        if queue.is_valid(memory.map()) { Ok(()) } else { Err(Broken::Rings) }
    }

    /// Whom to wake about answers.
    pub fn set_call(self: &Rc<Self>, call: Option<Bell>) {
        *self.call.borrow_mut() = call;
        self.call_anyway();
    }

    /// Whom to tell that the queue was stopped.
    pub fn set_error(&self, error: Option<Bell>) {
        *self.error.borrow_mut() = error;
    }

    /// May take requests, or may not.
    pub fn enable(&self, enabled: bool) {
        self.enabled.set(enabled);
        self.change();
    }

    /// The guest's bell: the ring starts, if it has not.
    pub fn start(self: &Rc<Self>, kick: OwnedFd) -> Result<(), Broken> {
        if !self.is_started() {
            self.broken.set(false);
            let queue = self.set_up()?;
            *self.queue.borrow_mut() = Some(queue);
            self.placed.set(true);
        }
        *self.kick.borrow_mut() = Some(Rc::new(Watched::new(kick)));
        if self.task.borrow().is_none() {
            let ring = Rc::clone(self);
            *self.task.borrow_mut() = Some(lane::spawn(async move { ring.run().await }));
        }
        self.change();
        self.call_anyway();
        Ok(())
    }

    fn set_up(&self) -> Result<Queue, Broken> {
        let size = self.size.get();
        let mut queue = Queue::new(SIZE_MAX)?;
        queue.try_set_size(size)?;
        queue.set_event_idx(self.shared.event_idx.get());
        queue.set_ready(true);
        self.place_queue(&mut queue)?;
        let memory = self.shared.memory();
        let used = queue.used_idx(memory.map(), std::sync::atomic::Ordering::Acquire)?.0;
        queue.set_next_used(used);
        queue.set_next_avail(self.base.get());
        self.left.borrow_mut().clear();
        *self.tracked.borrow_mut() = None;
        if let Some(whole) = &*self.shared.inflight.borrow() {
            let mut tracked = whole.queue(self.index, size).ok_or(Broken::Untracked)?;
            let left = tracked.recover(used);
            queue.set_next_avail(used.wrapping_add(left.len() as u16));
            *self.left.borrow_mut() = left;
            *self.tracked.borrow_mut() = Some(tracked);
        }
        *self.taken.borrow_mut() = vec![false; usize::from(size)];
        Ok(queue)
    }

    /// Takes no more, waits until everything taken is answered, and says where in the available ring it has stopped.
    pub async fn stop(self: &Rc<Self>) -> u16 {
        self.kick.borrow_mut().take();
        self.change();
        self.idle().await;
        self.call();
        let queue = self.queue.borrow_mut().take();
        queue.map_or(self.base.get(), |queue| {
            self.base.set(queue.next_avail());
            queue.next_avail()
        })
    }

    /// Takes no more.
    pub fn close(&self) {
        self.closed.set(true);
        self.change();
    }

    /// Waits until everything taken is answered; after [`Ring::close`] nothing of it is left.
    pub async fn idle(&self) {
        let held = || self.held.borrow().len();
        self.changed.until(|| (usize::from(self.under_way.get()) == held()).then_some(())).await;
        self.lose_held();
        if self.closed.get() {
            let task = self.task.borrow_mut().take();
            if let Some(task) = task {
                task.await;
            }
            self.call();
        }
    }

    /// Answers for rings that are gone reach nobody. Where requests are tracked, they are done again.
    fn lose_held(&self) {
        let held = self.held.take();
        if !held.is_empty() && self.shared.may_complain() {
            let (device, queue, count) = (self.shared.device.name(), self.index, held.len());
            tracing::warn!(device, queue, count, "answers were lost: the memory of the rings was taken away");
        }
        held.into_iter().for_each(|(chain, _)| self.free(&chain));
    }

    fn active(&self) -> Option<Rc<Watched>> {
        let may = self.enabled.get() && !self.broken.get() && self.placed.get() && self.is_started();
        if may { self.kick.borrow().clone() } else { None }
    }

    async fn run(self: Rc<Self>) {
        loop {
            let kick = self
                .changed
                .until(|| match self.active() {
                    _ if self.closed.get() => Some(None),
                    Some(kick) => Some(Some(kick)),
                    None => None,
                })
                .await;
            let Some(kick) = kick else { return };
            let epoch = self.epoch.get();
            let heard = match self.take() {
                Ok(()) => self.hear(&kick, epoch).await,
                Err(broken) => Err(broken),
            };
            if let Err(broken) = heard {
                self.break_down(&broken);
            }
        }
    }

    /// Waits for the guest, or for a change; after [`Ring::take`] found no room, for room.
    async fn hear(&self, kick: &Watched, epoch: u64) -> Result<(), Broken> {
        if let Some(cost) = self.starved.get() {
            let (budget, changed) = (&self.shared.budget, || self.epoch.get() != epoch);
            let room = budget.freed.until(|| self.has_room(cost).then_some(()));
            first_of(room, self.changed.until(|| changed().then_some(()))).await;
            return Ok(());
        }
        let mut rung = pin!(kick.readable());
        let mut changed = self.changed.until(|| (self.epoch.get() != epoch).then_some(()));
        let ready = std::future::poll_fn(|cx| match rung.as_mut().poll(cx) {
            Poll::Ready(result) => Poll::Ready(Some(result)),
            Poll::Pending => Pin::new(&mut changed).poll(cx).map(|()| None),
        });
        match ready.await {
            Some(result) => result.and_then(|()| super::bell::hear(kick)).map_err(Broken::Kick),
            None => Ok(()),
        }
    }

    /// Stops the queue; what was taken is still answered.
    fn break_down(&self, why: &Broken) {
        if self.shared.may_complain() {
            tracing::warn!(device = self.shared.device.name(), queue = self.index, %why, "a queue was stopped");
        }
        self.broken.set(true);
        if let Some(error) = &*self.error.borrow() {
            error.ring();
        }
    }

    /// Takes everything that is available, as far as there is room for it.
    fn take(self: &Rc<Self>) -> Result<(), Broken> {
        self.starved.set(None);
        let memory = self.shared.memory();
        let mut queue = self.queue.borrow_mut();
        let Some(queue) = &mut *queue else { return Ok(()) };
        let table = queue.desc_table();
        loop {
            let Some(head) = self.left.borrow().first().copied() else { break };
            if !self.begin(&memory, table, head, true)? {
                return Ok(());
            }
            self.left.borrow_mut().remove(0);
        }
        if self.shared.device.is_lazy(self.index) {
            queue.enable_notification(memory.map())?;
            return Ok(());
        }
        loop {
            queue.disable_notification(memory.map())?;
            let heads: SmallVec<[u16; 64]> =
                queue.iter(memory.map())?.map(|chain| chain.head_index()).collect();
            for (place, head) in heads.iter().enumerate() {
                if !self.begin(&memory, table, *head, false)? {
                    let rest = heads.len() - place; // no more than descriptors
                    queue.set_next_avail(queue.next_avail().wrapping_sub(rest as u16));
                    self.log_used();
                    return Ok(());
                }
            }
            if !queue.enable_notification(memory.map())? {
                break;
            }
        }
        self.log_used();
        Ok(())
    }

    /// Takes one chain and begins to serve it; false when there is no room for it.
    fn begin(
        self: &Rc<Self>,
        memory: &Rc<Memory>,
        table: u64,
        head: u16,
        again: bool,
    ) -> Result<bool, Broken> {
        let Some(chain) = self.occupy(memory, table, head, again)? else { return Ok(false) };
        let ring = Rc::clone(self);
        drop(lane::spawn(async move {
            let written = ring.shared.device.serve(ring.index, &chain).await;
            ring.answer(chain, written);
        }));
        Ok(true)
    }

    /// There is room for a request: a queue that has nothing under way need not ask.
    fn has_room(&self, cost: Cost) -> bool {
        self.under_way.get() == 0 || self.shared.budget.fits(cost)
    }

    fn occupy(
        &self,
        memory: &Rc<Memory>,
        table: u64,
        head: u16,
        again: bool,
    ) -> Result<Option<Chain>, Broken> {
        let mut taken = self.taken.borrow_mut();
        let place = taken.get_mut(usize::from(head)).filter(|taken| !**taken).ok_or(Broken::Head(head))?;
        let chain =
            Chain::follow(memory, table, self.size.get(), head).map_err(|bad| Broken::Chain(head, bad))?;
        let cost = chain.cost(D::PART_BYTES);
        if !self.has_room(cost) {
            self.starved.set(Some(cost));
            return Ok(None);
        }
        self.shared.budget.take(cost);
        *place = true;
        self.under_way.set(self.under_way.get() + 1);
        if let Some(tracked) = &mut *self.tracked.borrow_mut()
            && !again
        {
            tracked.begin(head);
        }
        Ok(Some(chain))
    }

    /// Puts an answer into the used ring, with the number of bytes written to the guest.
    fn answer(self: &Rc<Self>, chain: Chain, written: u32) {
        if let Some(log) = self.shared.log() {
            for piece in chain.into.list() {
                log.mark(piece.at, u64::from(piece.length));
            }
        }
        if !self.placed.get() {
            self.held.borrow_mut().push((chain, written));
            return self.changed.wake_all();
        }
        if let Some(tracked) = &*self.tracked.borrow() {
            tracked.answering(chain.head);
        }
        let put = match &mut *self.queue.borrow_mut() {
            Some(queue) => {
                let memory = self.shared.memory();
                queue.add_used(memory.map(), chain.head, written).map(|()| queue.next_used())
            }
            None => return, // `stop` waits for all answers first
        };
        match put {
            Ok(used) => {
                if let Some(tracked) = &*self.tracked.borrow() {
                    tracked.answered(chain.head, used);
                }
                self.log_used();
            }
            Err(error) => self.break_down(&error.into()),
        }
        self.free(&chain);
        self.plan_call();
        if self.under_way.get() == 0 {
            self.changed.wake_all();
        }
    }

    /// The request is over: its descriptor may come again, and others have its room.
    fn free(&self, chain: &Chain) {
        if let Some(taken) = self.taken.borrow_mut().get_mut(usize::from(chain.head)) {
            *taken = false;
        }
        self.under_way.set(self.under_way.get() - 1);
        self.shared.budget.give_back(chain.cost(D::PART_BYTES));
    }

    /// Our own writes to the used ring are writes to guest memory, too.
    fn log_used(&self) {
        if let (Some(log), Some(at)) = (self.shared.log(), self.addresses.get().and_then(|a| a.log)) {
            log.mark(at, 6 + 8 * u64::from(self.size.get()));
        }
    }

    /// Wakes the guest once for all answers of this turn.
    fn plan_call(self: &Rc<Self>) {
        if self.call_planned.replace(true) {
            return;
        }
        let ring = Rc::clone(self);
        drop(lane::spawn(async move {
            ring.call_planned.set(false);
            ring.call();
        }));
    }

    /// Wakes the guest whatever it wants. There may be answers that it was never called for: of a daemon that was killed before it
    /// could, or by a bell that was exchanged.
    fn call_anyway(&self) {
        if let Some(call) = &*self.call.borrow() {
            call.ring();
        }
    }

    /// Wakes the guest if it wants to be.
    fn call(&self) {
        if !self.placed.get() {
            return; // planned again with the answers
        }
        let wanted = match &mut *self.queue.borrow_mut() {
            Some(queue) => self.wants_call(queue),
            None => return,
        };
        match (wanted, &*self.call.borrow()) {
            (Ok(true), Some(call)) => call.ring(),
            (Ok(_), _) => {}
            (Err(broken), _) => self.break_down(&broken),
        }
    }

    fn wants_call(&self, queue: &mut Queue) -> Result<bool, Broken> {
        let memory = self.shared.memory();
        if !queue.needs_notification(memory.map())? {
            return Ok(false);
        }
        if queue.event_idx_enabled() {
            return Ok(true);
        }
        // `virtio-queue` leaves this flag to us.
        let flags = GuestAddress(queue.avail_ring());
        let flags: u16 = memory
            .map()
            .load(flags, std::sync::atomic::Ordering::Relaxed)
            .map_err(|_| Outside(queue.avail_ring()))?;
        Ok(u16::from_le(flags) & NO_INTERRUPT == 0)
    }
}
