//! The server: portals, connections from the first byte to the last, sessions, limits.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use block::Segments;
use lane::Task;
use lane::net::Listener;
use lane::sync::Waiters;
use scsi::sense::{Key, Sense, asc};
use scsi::{Nexus, TransportId};
use zerocopy::IntoBytes;

use super::codes::{LoginStatus, opcode};
use super::ending::{Ending, Refusal};
use super::format::{Header, LoginRequest, LoginResponse, length_field, padding};
use super::full_feature;
use super::login::{Agreed, Login, Purpose, Turn};
use super::name::Name;
use super::negotiate::Limits;
use super::outgoing::{Numbers, Outgoing, Stat};
use super::reader::Reader;
use super::session::{Cut, Identity, Scsi, Session};
use super::target::{Target, Targets};
use super::text;
use crate::credit::{Budget, Credit, HELD_BYTES_MAX};
use crate::doors::{Door, Doors};
use crate::pool::Pool;
use crate::wire::{Input, Tether, Wire, first_of};

/// Bytes of the receive buffer during login: the longest PDU with all its segments.
const LOGIN_INPUT_BYTES: usize = 16 << 10;
/// Bytes of the receive buffer afterwards: some dozens of writes of 4 KiB with their headers.
const INPUT_BYTES: usize = 256 << 10;
/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(250);
/// StatSN of the first login response; any will do (11.13.4).
const FIRST_STAT_SN: u32 = 1;

/// Limits of a server.
#[derive(Clone, Debug)]
pub struct Options {
    /// Connections at once; one more is closed at once.
    pub connections_max: usize,
    /// Connections at once that have not logged in yet.
    pub logins_max: usize,
    /// An initiator that has not logged in after this time is cut off.
    pub login_time: Duration,
    /// An initiator that has ended is given so much time to take its last answers.
    pub linger: Duration,
    /// After so much silence an initiator is pinged.
    pub ping_after: Duration,
    /// One that does not answer a ping, or does not send data that it was asked for, is cut off after this time.
    pub silence_max: Duration,
    /// How long sessions may take to log out when their target is removed.
    pub logout_time: Duration,
    /// Commands of one session that may be under way at once.
    pub window: u32,
    /// Bytes of buffers kept for the next requests.
    pub pool_bytes: usize,
    /// Bytes of buffers that the commands of all sessions may hold together; at least 64 MiB make sense.
    pub held_bytes_max: usize,
    /// What is negotiated at most.
    pub limits: Limits,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connections_max: 256,
            logins_max: 64,
            login_time: Duration::from_secs(15),
            linger: Duration::from_secs(10),
            ping_after: Duration::from_secs(20),
            silence_max: Duration::from_secs(30),
            logout_time: Duration::from_secs(3),
            window: 128,
            pool_bytes: 64 << 20,
            held_bytes_max: 512 << 20,
            limits: Limits::default(),
        }
    }
}

/// Where initiators come in.
pub struct Portal {
    /// The socket.
    pub listener: Listener,
    /// Tag of its portal group.
    pub group: u16,
    /// `ADDRESS:PORT` that initiators are told instead of the socket's own: behind address translation, as with
    /// QEMU's 10.0.2.2.
    pub announce: Option<String>,
}

impl Door for Portal {
    fn listener(&self) -> &Listener {
        &self.listener
    }
}

impl Portal {
    /// Where initiators are told to come, when asked by one that came to `near`.
    fn address(&self, near: &str) -> String {
        if let Some(announce) = &self.announce {
            return announce.clone();
        }
        let own = self.listener.local_address();
        // A socket for all addresses: the one that this initiator has reached is one of them.
        match (own.parse::<SocketAddr>(), near.parse::<SocketAddr>()) {
            (Ok(own), Ok(near)) if own.ip().is_unspecified() => {
                SocketAddr::new(near.ip(), own.port()).to_string()
            }
            _ => own.to_string(),
        }
    }
}

/// A session as the server lists it.
#[derive(Clone, Debug)]
pub struct SessionInfo {
    /// Where it comes from.
    pub peer: String,
    /// Who it is; `None` before login.
    pub initiator: Option<Name>,
    /// The initiator's part of the session identifier.
    pub isid: [u8; 6],
    /// The target's part.
    pub tsih: u16,
    /// Its target; `None`: a discovery session, or before login.
    pub target: Option<Name>,
    /// How long the connection has been there.
    pub age: Duration,
}

/// A connection as the server keeps it.
struct Link {
    tether: Rc<Tether>,
    peer: String,
    near: String,
    group: u16,
    begun: Instant,
    session: RefCell<Option<Rc<Session>>>,
    /// Cut off then.
    deadline: Cell<Option<Instant>>,
    /// It was cut off by its deadline.
    late: Cell<bool>,
}

impl Link {
    fn session(&self) -> Option<Rc<Session>> {
        self.session.borrow().clone()
    }
}

/// Serves the targets of one list.
pub struct Server {
    targets: Rc<Targets>,
    options: Options,
    pool: Rc<Pool>,
    budget: Rc<Budget>,
    links: RefCell<slab::Slab<Rc<Link>>>,
    left: Waiters,
    doors: Doors<Portal>,
    last_tsih: Cell<u16>,
    closing: Cell<bool>,
    watching: Cell<bool>,
}

impl Server {
    /// A server without connections.
    pub fn new(targets: Rc<Targets>, options: Options) -> Rc<Self> {
        let pool = Pool::new(options.pool_bytes);
        let budget = Budget::new(options.held_bytes_max.max(HELD_BYTES_MAX));
        Rc::new(Self {
            targets,
            options,
            pool,
            budget,
            links: RefCell::default(),
            left: Waiters::new(),
            doors: Doors::default(),
            last_tsih: Cell::new(0),
            closing: Cell::new(false),
            watching: Cell::new(false),
        })
    }

    /// What it serves.
    pub fn targets(&self) -> &Rc<Targets> {
        &self.targets
    }

    /// Takes connections from now on until [`Server::close`]. A server may have several portals.
    pub fn listen(self: &Rc<Self>, portal: Portal) {
        let server = Rc::clone(self);
        self.doors.open(portal, move |portal, stream| {
            let peer = stream.peer().to_string();
            let near = stream.local_address().unwrap_or_default();
            drop(server.serve(Wire::Socket(stream), peer, near, portal.group));
        });
    }

    /// Serves one connection, in a task of its own that ends with it. `near` is the address that the initiator has
    /// reached, `group` the portal group.
    pub fn serve(self: &Rc<Self>, wire: Wire, peer: String, near: String, group: u16) -> Task<Ending> {
        let server = Rc::clone(self);
        lane::spawn(async move {
            let Some(key) = server.admit(wire, peer, near, group) else { return Ending::Crowded };
            let link = Rc::clone(&server.links.borrow()[key]);
            let mut ending = match server.converse(&link).await {
                Ok(()) => Ending::Logout,
                Err(ending) => ending,
            };
            let cut = link.session().and_then(|session| session.cut.get());
            if link.late.get() {
                ending = Ending::LateLogin;
            } else if let Some(cut) = cut {
                ending = cut.into();
            }
            link.tether.cut();
            if let Some(Scsi { nexus, .. }) =
                link.session().as_ref().and_then(|session| session.scsi.as_ref())
            {
                nexus.lost().await; // once more is harmless; when the last login response failed it is the first
            }
            match &ending {
                Ending::Logout | Ending::Closed => {
                    tracing::debug!(peer = link.peer, %ending, "iscsi connection ended")
                }
                other => tracing::info!(peer = link.peer, ending = %other, "iscsi connection ended"),
            }
            server.links.borrow_mut().remove(key);
            server.left.wake_all();
            ending
        })
    }

    /// Lists a new connection, unless there are too many.
    fn admit(self: &Rc<Self>, wire: Wire, peer: String, near: String, group: u16) -> Option<usize> {
        let mut links = self.links.borrow_mut();
        let logins = links.iter().filter(|(_, link)| link.session.borrow().is_none()).count();
        if self.closing.get()
            || links.len() >= self.options.connections_max
            || logins >= self.options.logins_max
        {
            tracing::warn!(peer, connections = links.len(), logins, "iscsi connection refused");
            return None;
        }
        let begun = lane::now();
        let key = links.insert(Rc::new(Link {
            tether: Tether::new(wire),
            peer,
            near,
            group,
            begun,
            session: RefCell::new(None),
            deadline: Cell::new(Some(begun + self.options.login_time)),
            late: Cell::new(false),
        }));
        drop(links);
        self.watch();
        Some(key)
    }

    /// Login, full-feature phase, and the end of what is under way.
    async fn converse(self: &Rc<Self>, link: &Rc<Link>) -> Result<(), Ending> {
        let wire = link.tether.wire();
        let mut reader = Reader::new(Input::new(Rc::clone(wire), self.pool.take(LOGIN_INPUT_BYTES)));
        let session = self.log_in(link, &mut reader).await?;
        link.deadline.set(None);
        let agreed = &session.parameters;
        let segment = self.options.limits.segment_bytes_max as usize;
        reader.agree(agreed.header_digest, agreed.data_digest, segment);
        reader.input().enlarge(self.pool.take(INPUT_BYTES));
        let sender = {
            let session = Rc::clone(&session);
            lane::spawn(async move {
                let sent = session.outgoing.send_all(session.tether.wire()).await;
                session.tether.cut(); // nothing more will be said
                sent
            })
        };
        drop(lane::spawn(tell_events(Rc::clone(&session))));
        let received = full_feature::receive(self, &session, &mut reader, &link.near).await;
        link.deadline.set(Some(lane::now() + self.options.linger));
        session.end();
        if let Some(scsi) = &session.scsi {
            scsi.nexus.lost().await;
        }
        session.idle().await;
        let received = received.map(|goodbye| session.outgoing.push_one(&goodbye, Vec::new(), Stat::Takes));
        session.outgoing.complete();
        let sent = sender.await;
        received.and(sent)
    }

    /// Login requests and responses, until there is a session.
    async fn log_in(self: &Rc<Self>, link: &Rc<Link>, reader: &mut Reader) -> Result<Rc<Session>, Ending> {
        let mut login = Login::new(&self.targets, &self.options.limits, link.group);
        let mut stat_sn = FIRST_STAT_SN;
        loop {
            let Some(pdu) = reader.next().await? else { return Err(Ending::Closed) };
            let header: Header = pdu.view();
            let request: LoginRequest = pdu.view();
            let mut text = vec![0; header.data_bytes()]; // at most 8192, the reader has checked it
            let length = text.len();
            reader.data(&mut text, length).await?;
            let taken = match header.code() {
                opcode::LOGIN => login.take(&request, &text),
                _ => Err(Refusal { status: LoginStatus::InvalidDuringLogin, what: "no login request" }),
            };
            let turn = match taken {
                Ok(turn) => turn,
                Err(refusal) => return self.refuse(link, &request, stat_sn, refusal).await,
            };
            if !turn.is_last {
                self.respond(link, &request, stat_sn, 0, turn).await?;
                stat_sn += 1;
                continue;
            }
            let Some(agreed) = login.agreed() else { unreachable!("the last turn comes after the first") };
            return match self.establish(link, agreed, stat_sn + 1).await {
                Ok(session) => {
                    self.respond(link, &request, stat_sn, session.tsih, turn).await?;
                    Ok(session)
                }
                Err(refusal) => self.refuse(link, &request, stat_sn, refusal).await,
            };
        }
    }

    async fn refuse<T>(
        &self,
        link: &Link,
        request: &LoginRequest,
        stat_sn: u32,
        refusal: Refusal,
    ) -> Result<T, Ending> {
        let head = LoginResponse {
            opcode: opcode::LOGIN_RESPONSE,
            isid: request.isid,
            tag: request.tag,
            stat_sn: stat_sn.into(),
            exp_cmd_sn: request.cmd_sn,
            max_cmd_sn: request.cmd_sn,
            status: (refusal.status as u16).into(),
            ..LoginResponse::zeroed()
        };
        link.tether.wire().send(&Segments::new(head.as_bytes())).await?;
        Err(refusal.into())
    }

    async fn respond(
        &self,
        link: &Link,
        request: &LoginRequest,
        stat_sn: u32,
        tsih: u16,
        turn: Turn,
    ) -> Result<(), Ending> {
        let first = request.cmd_sn.get();
        let head = LoginResponse {
            opcode: opcode::LOGIN_RESPONSE,
            flags: turn.flags,
            data_length: length_field(turn.text.len()),
            isid: request.isid,
            tsih: if turn.is_last { tsih.into() } else { request.tsih },
            tag: request.tag,
            stat_sn: stat_sn.into(),
            exp_cmd_sn: first.into(),
            max_cmd_sn: first.wrapping_add(self.options.window - 1).into(),
            ..LoginResponse::zeroed()
        };
        let pad = [0; 3];
        let pieces = [head.as_bytes(), &turn.text, &pad[..padding(turn.text.len())]];
        Ok(link.tether.wire().send(&Segments::gather(pieces)).await?)
    }

    /// Makes the session, after the one that it takes the place of has gone (6.3.5).
    async fn establish(
        self: &Rc<Self>,
        link: &Rc<Link>,
        agreed: Agreed,
        stat_sn: u32,
    ) -> Result<Rc<Session>, Refusal> {
        let refusal = |status, what| Refusal { status, what };
        let target = match &agreed.purpose {
            Purpose::Discovery => None,
            Purpose::Normal(target, _) => Some(target.name().clone()),
        };
        let identity = Identity { initiator: agreed.initiator, isid: agreed.isid, target, group: link.group };
        let mut tsih = agreed.tsih;
        if tsih != 0 {
            let old = self.find(|session| session.tsih == tsih && session.identity == identity);
            let old = old.ok_or(refusal(LoginStatus::SessionDoesNotExist, "no session of this TSIH"))?;
            if old.cid != agreed.cid {
                return Err(refusal(LoginStatus::TooManyConnections, "a second connection"));
            }
        }
        if identity.target.is_some() {
            while let Some(old) = self.find(|session| session.identity == identity) {
                old.cut_off(Cut::Reinstated);
                let gone = || self.find(|session| Rc::ptr_eq(session, &old)).is_none().then_some(());
                self.left.until(gone).await;
            }
        }
        if tsih == 0 {
            tsih = self.free_tsih();
        }
        let scsi = match agreed.purpose {
            Purpose::Discovery => None,
            Purpose::Normal(target, access) => {
                if target.is_removed() {
                    return Err(refusal(LoginStatus::TargetRemoved, "the target was removed"));
                }
                let luns = access.luns.get(&link.group).cloned();
                let luns =
                    luns.ok_or(refusal(LoginStatus::NotFound, "nothing for it in this portal group"))?;
                let id = TransportId::iscsi(identity.initiator.as_str(), Some(identity.isid));
                let id =
                    id.map_err(|_| refusal(LoginStatus::InitiatorError, "an InitiatorName that is none"))?;
                Some(Scsi { nexus: Nexus::new(id, luns), target })
            }
        };
        let numbers = Numbers::new(stat_sn, agreed.cmd_sn, self.options.window);
        let parameters = agreed.parameters;
        let outgoing = Outgoing::new(numbers, parameters.header_digest, parameters.data_digest);
        let session = Session::new(
            identity,
            (tsih, agreed.cid),
            scsi,
            parameters,
            outgoing,
            Rc::clone(&self.pool),
            Credit::new(&self.budget, &link.tether),
            Rc::clone(&link.tether),
        );
        *link.session.borrow_mut() = Some(Rc::clone(&session));
        Ok(session)
    }

    fn find(&self, wanted: impl Fn(&Rc<Session>) -> bool) -> Option<Rc<Session>> {
        self.links.borrow().iter().filter_map(|(_, link)| link.session()).find(|session| wanted(session))
    }

    fn sessions_where(&self, wanted: impl Fn(&Session) -> bool) -> Vec<Rc<Session>> {
        let links = self.links.borrow();
        links.iter().filter_map(|(_, link)| link.session()).filter(|session| wanted(session)).collect()
    }

    /// A number above 0 that no session has. There are fewer connections than numbers.
    fn free_tsih(&self) -> u16 {
        loop {
            let next = self.last_tsih.get().checked_add(1).unwrap_or(1);
            self.last_tsih.set(next);
            if self.find(|session| session.tsih == next).is_none() {
                return next;
            }
        }
    }

    /// The answer to SendTargets (RFC 7143 appendix C): in a discovery session all that the initiator may see or one of
    /// them, in a normal one only its own. `None`: to be rejected.
    pub(super) fn send_targets(&self, asking: &Identity, value: &str, near: &str) -> Option<Vec<u8>> {
        let visible = self.targets.visible_to(&asking.initiator);
        let named = Name::new(value).ok();
        let chosen: Vec<Rc<Target>> = match (&asking.target, value) {
            (None, "All") => visible,
            (None, "") => return None,
            (Some(own), "") => visible.into_iter().filter(|target| target.name() == own).collect(),
            (Some(_), "All") => return None,
            (own, _) => (visible.into_iter())
                .filter(|target| Some(target.name()) == named.as_ref())
                .filter(|target| own.as_ref().is_none_or(|own| own == target.name()))
                .collect(),
        };
        let mut list = Vec::new();
        for target in chosen {
            text::push(&mut list, "TargetName", target.name().as_str());
            self.doors.each(|portal| {
                if target.groups().contains(&portal.group) {
                    let address = format!("{},{}", portal.address(near), portal.group);
                    text::push(&mut list, "TargetAddress", &address);
                }
            });
        }
        Some(list)
    }

    /// Ends all sessions of a target whose initiator has asked for a cold reset; what is queued is still sent.
    pub(super) fn reset_target(&self, asking: &Session) {
        for session in self.sessions_where(|session| session.identity.target == asking.identity.target) {
            session.outgoing.complete();
        }
    }

    /// Looks at deadlines and silence as long as there are connections.
    fn watch(self: &Rc<Self>) {
        if self.watching.replace(true) {
            return;
        }
        let server = Rc::clone(self);
        drop(lane::spawn(async move {
            while !server.links.borrow().is_empty() {
                lane::sleep(TICK).await;
                let now = lane::now();
                let links: Vec<_> = server.links.borrow().iter().map(|(_, link)| Rc::clone(link)).collect();
                for link in links {
                    server.look_at(&link, now);
                }
            }
            server.watching.set(false);
        }));
    }

    fn look_at(&self, link: &Link, now: Instant) {
        if let Some(deadline) = link.deadline.get() {
            if deadline <= now {
                link.late.set(link.session.borrow().is_none());
                link.deadline.set(None);
                link.tether.cut();
            }
            return;
        }
        let Some(session) = link.session() else { return };
        let silent = |since: Instant| now.saturating_duration_since(since) >= self.options.silence_max;
        if session.pinged.get().is_some_and(silent) || session.oldest_gather().is_some_and(silent) {
            session.cut_off(Cut::Silent);
        } else if session.pinged.get().is_none()
            && now.saturating_duration_since(session.heard.get()) >= self.options.ping_after
        {
            session.ping();
        }
    }

    /// All connections there are.
    pub fn sessions(&self) -> Vec<SessionInfo> {
        let now = lane::now();
        let info = |link: &Rc<Link>| {
            let session = link.session();
            let identity = session.as_ref().map(|session| &session.identity);
            SessionInfo {
                peer: link.peer.clone(),
                initiator: identity.map(|identity| identity.initiator.clone()),
                isid: identity.map_or([0; 6], |identity| identity.isid),
                tsih: session.as_ref().map_or(0, |session| session.tsih),
                target: identity.and_then(|identity| identity.target.clone()),
                age: now.saturating_duration_since(link.begun),
            }
        };
        self.links.borrow().iter().map(|(_, link)| info(link)).collect()
    }

    /// Takes a target away: its sessions are asked to log out, then cut off. When this returns nothing here refers to
    /// its LUNs. False when there is none of that name.
    pub async fn remove(&self, name: &Name) -> bool {
        let Some(target) = self.targets.take(name) else { return false };
        self.end_sessions(|session| {
            session.scsi.as_ref().is_some_and(|scsi| Rc::ptr_eq(&scsi.target, &target))
        })
        .await;
        true
    }

    /// Ends the sessions of one initiator with a target, as [`Server::remove`] does.
    pub async fn drop_sessions(&self, target: &Name, initiator: &Name) {
        self.end_sessions(|session| {
            session.identity.target.as_ref() == Some(target) && session.identity.initiator == *initiator
        })
        .await;
    }

    async fn end_sessions(&self, wanted: impl Fn(&Session) -> bool) {
        let seconds = u16::try_from(self.options.logout_time.as_secs()).unwrap_or(u16::MAX);
        self.sessions_where(&wanted).iter().for_each(|session| session.ask_for_logout(seconds));
        let deadline = lane::now() + self.options.logout_time;
        while !self.sessions_where(&wanted).is_empty() && lane::now() < deadline {
            lane::sleep(TICK / 5).await;
        }
        self.sessions_where(&wanted).iter().for_each(|session| session.cut_off(Cut::Removed));
        self.left.until(|| self.sessions_where(&wanted).is_empty().then_some(())).await;
    }

    /// Cuts off every initiator, lets nobody in any more, and waits until the last command has ended. Initiators see a
    /// lost connection, and come back by themselves when the server does.
    pub async fn close(&self) {
        self.closing.set(true);
        self.doors.close().await;
        let links: Vec<_> = self.links.borrow().iter().map(|(_, link)| Rc::clone(link)).collect();
        for link in links {
            match link.session() {
                Some(session) => session.cut_off(Cut::Removed),
                None => link.tether.cut(),
            }
        }
        self.left.until(|| self.links.borrow().is_empty().then_some(())).await;
    }
}

/// Tells the initiator what its nexus learns besides commands (11.9.1), until the connection ends.
async fn tell_events(session: Rc<Session>) {
    let Some(scsi) = &session.scsi else { return };
    while let Some(event) = first_of(scsi.nexus.event(), session.ended()).await {
        // What an initiator would not find out by itself; the rest meets it at its next command.
        if matches!(event.code, asc::REPORTED_LUNS_CHANGED | asc::CAPACITY_CHANGED) {
            let sense = Sense::new(Key::UnitAttention, event.code).encode(false);
            session.tell_event(event.lun, &sense);
        }
    }
}
