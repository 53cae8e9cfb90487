//! One front end: what it says, one message after the other, and the rings that follow from it.

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use vhost::vhost_user::message::{
    BackendReq, FrontendReq, VhostUserConfig, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemory, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserSingleMemoryRegion,
    VhostUserU64, VhostUserVirtioFeatures, VhostUserVringAddr, VhostUserVringAddrFlags, VhostUserVringState,
};
use vm_memory::ByteValued;

use super::Device;
use super::bell::{self, Bell};
use super::dirty::Log;
use super::inflight::Inflight;
use super::memory::{Memory, REGIONS_MAX};
use super::message::{Broken, Channel, Message};
use super::ring::{self, Addresses, Ring, SIZE_MAX, Shared};

/// What the transport adds to a device's features: logging, protocol features, indirect descriptors, event index, and
/// that there is no legacy device (`VIRTIO_F_VERSION_1`).
const TRANSPORT: u64 = VhostUserVirtioFeatures::all().bits() | 1 << 28 | EVENT_IDX | 1 << 32;
/// `VIRTIO_F_EVENT_IDX`.
const EVENT_IDX: u64 = 1 << 29;
/// In the argument of SET_VRING_KICK and its like: no descriptor comes with it.
const NO_FILE: u64 = 1 << 8;

fn protocol() -> VhostUserProtocolFeatures {
    use VhostUserProtocolFeatures as F;
    F::MQ
        | F::LOG_SHMFD
        | F::REPLY_ACK
        | F::BACKEND_REQ
        | F::CONFIG
        | F::INFLIGHT_SHMFD
        | F::RESET_DEVICE
        | F::CONFIGURE_MEM_SLOTS
}

/// What is answered to a message.
enum Answer {
    /// Nothing but an acknowledgement, where that is wanted.
    Done,
    Body(Vec<u8>, Option<OwnedFd>),
}

fn number(value: u64) -> Answer {
    Answer::Body(VhostUserU64::new(value).as_slice().to_vec(), None)
}

/// A front end and what it has set up.
pub(crate) struct Session<D> {
    pub channel: Channel,
    shared: Rc<Shared<D>>,
    rings: RefCell<Vec<Option<Rc<Ring<D>>>>>,
    features: Cell<u64>,
    protocol: Cell<VhostUserProtocolFeatures>,
    /// Where the front end hears from us.
    back: RefCell<Option<Rc<Channel>>>,
}

impl<D: Device> Session<D> {
    /// A front end that has said nothing yet.
    pub fn new(channel: Channel, device: &Rc<D>) -> Rc<Self> {
        device.begin();
        Rc::new(Self {
            channel,
            shared: Shared::new(Rc::clone(device)),
            rings: RefCell::default(),
            features: Cell::new(0),
            protocol: Cell::new(VhostUserProtocolFeatures::empty()),
            back: RefCell::default(),
        })
    }

    /// Listens to it until it goes away, then waits until nothing is under way.
    pub async fn run(&self) -> Result<(), Broken> {
        let ended = self.converse().await;
        self.drain().await;
        ended
    }

    /// Takes no more requests, and waits until all are answered.
    pub async fn drain(&self) {
        let rings = self.all_rings();
        rings.iter().for_each(|ring| ring.close());
        for ring in rings {
            ring.idle().await;
        }
    }

    /// The configuration is another one now.
    pub async fn configuration_changed(&self) {
        let back = self.back.borrow().clone();
        if let Some(back) = back
            && let Err(error) = back.tell(BackendReq::CONFIG_CHANGE_MSG.into()).await
        {
            tracing::warn!(device = self.shared.device.name(), %error, "the guest was not told of its new size");
        }
    }

    fn all_rings(&self) -> Vec<Rc<Ring<D>>> {
        self.rings.borrow().iter().flatten().cloned().collect()
    }

    async fn converse(&self) -> Result<(), Broken> {
        while let Some(mut message) = self.channel.receive().await? {
            let code = message.code()?;
            let outcome = self.obey(code, &mut message).await;
            if let Err(error) = &outcome
                && self.shared.may_complain()
            {
                tracing::warn!(device = self.shared.device.name(), %error, "a front end was refused");
            }
            let acknowledged =
                message.needs_reply && self.protocol.get().contains(VhostUserProtocolFeatures::REPLY_ACK);
            match outcome {
                Ok(Answer::Body(body, file)) => {
                    self.channel.reply(&message, &body, file.as_ref().map(AsFd::as_fd)).await?;
                }
                Ok(Answer::Done) if acknowledged => {
                    self.channel.reply(&message, VhostUserU64::new(0).as_slice(), None).await?;
                }
                Ok(Answer::Done) => {}
                Err(Broken::Refused(..)) if acknowledged => {
                    self.channel.reply(&message, VhostUserU64::new(1).as_slice(), None).await?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn obey(&self, code: FrontendReq, message: &mut Message) -> Result<Answer, Broken> {
        match code {
            FrontendReq::GET_FEATURES => Ok(number(self.shared.device.features() | TRANSPORT)),
            FrontendReq::SET_FEATURES => {
                let features: VhostUserU64 = message.body()?;
                self.set_features(features.value);
                Ok(Answer::Done)
            }
            FrontendReq::GET_PROTOCOL_FEATURES => Ok(number(protocol().bits())),
            FrontendReq::SET_PROTOCOL_FEATURES => {
                let features: VhostUserU64 = message.body()?;
                self.protocol.set(protocol() & VhostUserProtocolFeatures::from_bits_truncate(features.value));
                Ok(Answer::Done)
            }
            FrontendReq::SET_OWNER => Ok(Answer::Done),
            FrontendReq::RESET_OWNER | FrontendReq::RESET_DEVICE => self.reset().await,
            FrontendReq::GET_QUEUE_NUM => Ok(number(self.shared.device.queues().into())),
            FrontendReq::GET_MAX_MEM_SLOTS => Ok(number(REGIONS_MAX as u64)),
            FrontendReq::SET_MEM_TABLE
            | FrontendReq::ADD_MEM_REG
            | FrontendReq::REM_MEM_REG
            | FrontendReq::SET_LOG_BASE
            | FrontendReq::SET_LOG_FD => self.memory(code, message),
            FrontendReq::GET_INFLIGHT_FD => self.new_inflight(message),
            FrontendReq::SET_INFLIGHT_FD => self.set_inflight(message),
            FrontendReq::GET_CONFIG => self.config(message),
            FrontendReq::SET_CONFIG => self.set_config(message),
            FrontendReq::SET_BACKEND_REQ_FD => {
                let file = message.files.pop().ok_or(Broken::Damaged(code))?;
                *self.back.borrow_mut() = Some(Rc::new(Channel::new(file)));
                Ok(Answer::Done)
            }
            FrontendReq::GET_VRING_BASE => {
                let state: VhostUserVringState = message.body()?;
                let base = self.ring(code, state.index)?.stop().await;
                let state = VhostUserVringState::new(state.index, base.into());
                Ok(Answer::Body(state.as_slice().to_vec(), None))
            }
            _ => self.set_ring(code, message),
        }
    }

    /// A feature that we did not offer is none: QEMU acknowledges some that it only hopes for.
    fn set_features(&self, features: u64) {
        let features = features & (self.shared.device.features() | TRANSPORT);
        self.features.set(features);
        self.shared.event_idx.set(features & EVENT_IDX != 0);
        self.shared.logging.set(features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0);
        self.shared.device.negotiated(features);
    }

    async fn reset(&self) -> Result<Answer, Broken> {
        for ring in self.all_rings() {
            ring.enable(false);
            ring.stop().await;
        }
        // What was kept is about a guest that is no more: the next one brings its own, or this, which says nothing then.
        if let Some(kept) = self.shared.inflight.take() {
            kept.forget();
        }
        self.set_features(0);
        self.shared.device.begin();
        Ok(Answer::Done)
    }

    fn ring(&self, code: FrontendReq, index: u32) -> Result<Rc<Ring<D>>, Broken> {
        let wrong = || Broken::Refused(code, format!("there is no queue {index}"));
        let index = u16::try_from(index).map_err(|_| wrong())?;
        if index >= self.shared.device.queues() {
            return Err(wrong());
        }
        let mut rings = self.rings.borrow_mut();
        let place = usize::from(index);
        if rings.len() <= place {
            rings.resize_with(place + 1, || None);
        }
        Ok(Rc::clone(rings[place].get_or_insert_with(|| Ring::new(index, &self.shared))))
    }

    fn set_ring(&self, code: FrontendReq, message: &mut Message) -> Result<Answer, Broken> {
        let good = match code {
            FrontendReq::SET_VRING_NUM => {
                let state: VhostUserVringState = message.body()?;
                self.ring(code, state.index)?.set_size(state.num)
            }
            FrontendReq::SET_VRING_BASE => {
                let state: VhostUserVringState = message.body()?;
                self.ring(code, state.index)?.set_base(state.num)
            }
            FrontendReq::SET_VRING_ENABLE => {
                let state: VhostUserVringState = message.body()?;
                self.ring(code, state.index)?.enable(state.num != 0);
                state.num <= 1
            }
            FrontendReq::SET_VRING_ADDR => {
                let to: VhostUserVringAddr = message.body()?;
                let log = to.flags & VhostUserVringAddrFlags::VHOST_VRING_F_LOG.bits() != 0;
                let addresses = Addresses {
                    table: to.descriptor,
                    available: to.available,
                    used: to.used,
                    log: log.then_some(to.log),
                };
                let ring = self.ring(code, to.index)?;
                return self.judge(code, ring.set_addresses(addresses));
            }
            FrontendReq::SET_VRING_KICK | FrontendReq::SET_VRING_CALL | FrontendReq::SET_VRING_ERR => {
                return self.set_bell(code, message);
            }
            other => return Err(Broken::Unknown(other.into())),
        };
        let wrong = || Broken::Refused(code, "no such size or place, or the ring is running".into());
        good.then_some(Answer::Done).ok_or_else(wrong)
    }

    fn judge(&self, code: FrontendReq, result: Result<(), ring::Broken>) -> Result<Answer, Broken> {
        result.map(|()| Answer::Done).map_err(|e| Broken::Refused(code, e.to_string()))
    }

    fn set_bell(&self, code: FrontendReq, message: &mut Message) -> Result<Answer, Broken> {
        let what: VhostUserU64 = message.body()?;
        let file = message.files.pop();
        if (what.value & NO_FILE == 0) != file.is_some() {
            return Err(Broken::Damaged(code));
        }
        let ring = self.ring(code, (what.value & 0xff) as u32)?;
        let refused = |why: String| Broken::Refused(code, why);
        if code == FrontendReq::SET_VRING_KICK {
            let kick = file.ok_or_else(|| refused("rings without a kick are not polled here".into()))?;
            bell::must_be_eventfd(&kick).map_err(|e| refused(format!("no eventfd: {e}")))?;
            if self.features.get() & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
                ring.enable(true);
            }
            return self.judge(code, ring.start(kick));
        }
        let bell = file.map(Bell::new).transpose().map_err(|e| refused(format!("no eventfd: {e}")))?;
        if code == FrontendReq::SET_VRING_CALL {
            ring.set_call(bell)
        } else {
            ring.set_error(bell)
        }
        Ok(Answer::Done)
    }

    fn memory(&self, code: FrontendReq, message: &mut Message) -> Result<Answer, Broken> {
        let files = std::mem::take(&mut message.files);
        let refused = |e: super::memory::BadMemory| Broken::Refused(code, e.to_string());
        let one = |mut files: Vec<OwnedFd>| match (files.pop(), files.is_empty()) {
            (Some(file), true) => Ok(file),
            _ => Err(Broken::Damaged(code)),
        };
        let now = self.shared.memory();
        let new = match code {
            FrontendReq::SET_LOG_BASE => {
                let about: VhostUserLog = message.body()?;
                let log = Log::map(&about, one(files)?).map_err(refused)?;
                *self.shared.log.borrow_mut() = Some(Rc::new(log));
                return Ok(Answer::Body(about.as_slice().to_vec(), None));
            }
            FrontendReq::SET_LOG_FD => return Ok(Answer::Done), // rung by nobody: QEMU looks at the log by itself
            FrontendReq::ADD_MEM_REG => {
                let region: VhostUserSingleMemoryRegion = message.body()?;
                now.with(&region, one(files)?).map_err(refused)?
            }
            FrontendReq::REM_MEM_REG => {
                let region: VhostUserSingleMemoryRegion = message.body()?;
                now.without(&region).map_err(refused)?
            }
            _ => Memory::table(memory_table(message, files)?).map_err(refused)?,
        };
        self.shared.set_memory(new);
        for ring in self.all_rings() {
            let _ = ring.place(); // one that is not in it rests, and says so
        }
        Ok(Answer::Done)
    }

    fn new_inflight(&self, message: &Message) -> Result<Answer, Broken> {
        let wanted: VhostUserInflight = message.body()?;
        let code = FrontendReq::GET_INFLIGHT_FD;
        if wanted.num_queues > self.shared.device.queues() || wanted.queue_size > SIZE_MAX {
            return Err(Broken::Refused(code, "more or larger queues than there can be".into()));
        }
        let (about, file) = Inflight::create(wanted.num_queues, wanted.queue_size)
            .map_err(|e| Broken::Refused(code, e.to_string()))?;
        Ok(Answer::Body(about.as_slice().to_vec(), Some(file)))
    }

    fn set_inflight(&self, message: &mut Message) -> Result<Answer, Broken> {
        let about: VhostUserInflight = message.body()?;
        let code = FrontendReq::SET_INFLIGHT_FD;
        let file = message.files.pop().ok_or(Broken::Damaged(code))?;
        let kept = Inflight::open(&about, file).map_err(|e| Broken::Refused(code, e.to_string()))?;
        self.shared.device.adopt(&kept);
        *self.shared.inflight.borrow_mut() = Some(kept);
        Ok(Answer::Done)
    }

    fn config(&self, message: &Message) -> Result<Answer, Broken> {
        let (wanted, place): (VhostUserConfig, _) = message.head()?;
        if place.len() != wanted.size as usize {
            return Err(Broken::Damaged(FrontendReq::GET_CONFIG));
        }
        let mut bytes = vec![0; place.len()];
        let config = self.shared.device.config();
        let rest = config.get(wanted.offset as usize..).unwrap_or_default();
        let known = rest.len().min(bytes.len());
        bytes[..known].copy_from_slice(&rest[..known]);
        let flags = VhostUserConfigFlags::from_bits_truncate(wanted.flags);
        let head = VhostUserConfig::new(wanted.offset, wanted.size, flags);
        Ok(Answer::Body([head.as_slice(), &bytes].concat(), None))
    }

    fn set_config(&self, message: &Message) -> Result<Answer, Broken> {
        let (wanted, bytes): (VhostUserConfig, _) = message.head()?;
        let code = FrontendReq::SET_CONFIG;
        if bytes.len() != wanted.size as usize {
            return Err(Broken::Damaged(code));
        }
        let taken = self.shared.device.set_config(wanted.offset as usize, bytes);
        let wrong = || Broken::Refused(code, "this part of the configuration is read-only".into());
        taken.then_some(Answer::Done).ok_or_else(wrong)
    }
}

/// The regions of a SET_MEM_TABLE, each with its file.
fn memory_table(
    message: &Message,
    files: Vec<OwnedFd>,
) -> Result<Vec<(VhostUserMemoryRegion, OwnedFd)>, Broken> {
    let damaged = || Broken::Damaged(FrontendReq::SET_MEM_TABLE);
    let (head, rest): (VhostUserMemory, _) = message.head()?;
    let (regions, odd) = rest.as_chunks::<{ size_of::<VhostUserMemoryRegion>() }>();
    let count = head.num_regions as usize;
    if !odd.is_empty() || regions.len() != count || files.len() != count {
        return Err(damaged());
    }
    let region = |bytes: &[u8; size_of::<VhostUserMemoryRegion>()]| {
        let mut region = VhostUserMemoryRegion::default();
        region.as_mut_slice().copy_from_slice(bytes);
        region
    };
    let list: Vec<_> = regions.iter().map(region).zip(files).collect();
    let whole = |r: &VhostUserMemoryRegion| {
        let ends = [r.guest_phys_addr, r.user_addr, r.mmap_offset].map(|at| at.checked_add(r.memory_size));
        r.memory_size > 0 && ends.iter().all(Option::is_some)
    };
    if list.iter().all(|(r, _)| whole(r)) { Ok(list) } else { Err(damaged()) }
}
