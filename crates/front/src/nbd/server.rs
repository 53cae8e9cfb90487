//! The server: connections from the first byte to the last, their limits and their list.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use lane::Task;
use lane::net::Listener;
use lane::sync::Waiters;

use super::connection::Connection;
use super::ending::Ending;
use super::export::Exports;
use super::handshake;
use super::outgoing::Outgoing;
use super::transmission;
use crate::credit::{Budget, Credit, HELD_BYTES_MAX};
use crate::doors::Doors;
use crate::pool::Pool;
use crate::tls::Tls;
use crate::wire::{Tether, Wire};

/// Bytes of the receive buffer of a connection in transmission: 31 writes of 4 KiB with their headers.
const INPUT_BYTES: usize = 128 << 10;
/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(250);

/// Limits of a server.
#[derive(Clone, Debug)]
pub struct Options {
    /// Connections at once; one more is closed at once.
    pub connections_max: usize,
    /// Connections at once that have not chosen an export yet.
    pub handshakes_max: usize,
    /// A client that has not chosen an export after this time is cut off.
    pub handshake_time: Duration,
    /// A client that has said good-bye is given so much time to take its last answers.
    pub linger: Duration,
    /// Bytes of buffers kept for the next requests.
    pub pool_bytes: usize,
    /// Bytes of buffers that the requests of all clients may hold together; at least 64 MiB make sense. A client that
    /// holds at most 256 KiB is always served.
    pub held_bytes_max: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connections_max: 256,
            handshakes_max: 64,
            handshake_time: Duration::from_secs(10),
            linger: Duration::from_secs(10),
            pool_bytes: 64 << 20,
            held_bytes_max: 512 << 20,
        }
    }
}

/// How far a connection has come.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum State {
    /// Choosing an export.
    Handshake,
    /// Requests and answers.
    Transmission,
    /// No further requests; what is under way is finished.
    Ending,
}

/// A connection as the server lists it.
#[derive(Clone, Debug)]
pub struct ConnectionInfo {
    /// Who it is.
    pub peer: String,
    /// The export it uses, once chosen.
    pub export: Option<String>,
    /// How far it has come.
    pub state: State,
    /// By TLS, once in transmission.
    pub encrypted: bool,
    /// How long it has been there.
    pub age: Duration,
}

/// A connection as the server keeps it.
struct Link {
    tether: Rc<Tether>,
    peer: String,
    export: RefCell<Option<String>>,
    encrypted: Cell<bool>,
    state: Cell<State>,
    begun: Instant,
    /// Cut off then.
    deadline: Cell<Option<Instant>>,
    /// It was cut off by its deadline.
    late: Cell<bool>,
}

/// Serves the exports of one list.
pub struct Server {
    exports: Rc<Exports>,
    options: Options,
    pool: Rc<Pool>,
    budget: Rc<Budget>,
    links: RefCell<slab::Slab<Rc<Link>>>,
    left: Waiters,
    doors: Doors<Listener>,
    closing: Cell<bool>,
    watching: Cell<bool>,
}

impl Server {
    /// A server without connections.
    pub fn new(exports: Rc<Exports>, options: Options) -> Rc<Self> {
        let pool = Pool::new(options.pool_bytes);
        // The largest request must get in when nobody else holds anything.
        let budget = Budget::new(options.held_bytes_max.max(HELD_BYTES_MAX));
        Rc::new(Self {
            exports,
            options,
            pool,
            budget,
            links: RefCell::default(),
            left: Waiters::new(),
            doors: Doors::default(),
            closing: Cell::new(false),
            watching: Cell::new(false),
        })
    }

    /// What it serves.
    pub fn exports(&self) -> &Rc<Exports> {
        &self.exports
    }

    /// Takes connections from now on until [`Server::close`]. A server may listen in several places.
    pub fn listen(self: &Rc<Self>, listener: Listener, tls: Tls) {
        let server = Rc::clone(self);
        self.doors.open(listener, move |_, stream| {
            let peer = stream.peer().to_string();
            drop(server.serve(Wire::Socket(stream), peer, &tls));
        });
    }

    /// Serves one connection, in a task of its own that ends with it.
    pub fn serve(self: &Rc<Self>, wire: Wire, peer: String, tls: &Tls) -> Task<Ending> {
        let (server, tls) = (Rc::clone(self), tls.clone());
        lane::spawn(async move {
            let Some(key) = server.admit(wire, peer) else { return Ending::Crowded };
            let link = Rc::clone(&server.links.borrow()[key]);
            let ending = match server.converse(&link, &tls).await {
                _ if link.late.get() => Ending::TimedOut,
                Ok(()) => Ending::Clean,
                Err(ending) => ending,
            };
            link.tether.cut();
            match &ending {
                Ending::Clean => tracing::debug!(peer = link.peer, "nbd connection ended"),
                other => tracing::info!(peer = link.peer, ending = %other, "nbd connection ended"),
            }
            server.links.borrow_mut().remove(key);
            server.left.wake_all();
            ending
        })
    }

    /// Lists a new connection, unless there are too many.
    fn admit(self: &Rc<Self>, wire: Wire, peer: String) -> Option<usize> {
        let mut links = self.links.borrow_mut();
        let handshakes = links.iter().filter(|(_, link)| link.state.get() == State::Handshake).count();
        if self.closing.get()
            || links.len() >= self.options.connections_max
            || handshakes >= self.options.handshakes_max
        {
            tracing::warn!(peer, connections = links.len(), handshakes, "nbd connection refused");
            return None;
        }
        let begun = lane::now();
        let key = links.insert(Rc::new(Link {
            tether: Tether::new(wire),
            peer,
            export: RefCell::new(None),
            encrypted: Cell::new(false),
            state: Cell::new(State::Handshake),
            begun,
            deadline: Cell::new(Some(begun + self.options.handshake_time)),
            late: Cell::new(false),
        }));
        drop(links);
        self.watch();
        Some(key)
    }

    /// Handshake, transmission, and the end of what is under way.
    async fn converse(self: &Rc<Self>, link: &Rc<Link>, tls: &Tls) -> Result<(), Ending> {
        let agreed = handshake::negotiate(&link.tether, &self.exports, &self.pool, tls).await?;
        let Some(agreed) = agreed else { return Ok(()) };
        link.encrypted.set(agreed.input.wire().is_encrypted());
        *link.export.borrow_mut() = Some(agreed.stay.export().name().to_string());
        link.state.set(State::Transmission);
        link.deadline.set(None);
        let mut input = agreed.input;
        input.enlarge(self.pool.take(INPUT_BYTES));
        let wire = Rc::clone(input.wire());
        let connection = Rc::new(Connection {
            pool: Rc::clone(&self.pool),
            structured: agreed.structured,
            contexts: agreed.contexts,
            outgoing: Outgoing::default(),
            credit: Credit::new(&self.budget, &link.tether),
            stay: agreed.stay,
        });
        let sender = {
            let connection = Rc::clone(&connection);
            lane::spawn(async move {
                let sent = connection.outgoing.send_all(&wire).await;
                wire.finish().await;
                sent
            })
        };
        let received = transmission::receive(&connection, &mut input).await;
        link.state.set(State::Ending);
        link.deadline.set(Some(lane::now() + self.options.linger));
        self.watch();
        if !matches!(received, Ok(()) | Err(Ending::Hangup(_))) {
            link.tether.cut(); // whoever breaks the protocol is owed no answers
        }
        connection.credit.idle().await;
        connection.outgoing.complete();
        let sent = sender.await;
        received.and(sent)
    }

    /// Looks at deadlines as long as there are any.
    fn watch(self: &Rc<Self>) {
        if self.watching.replace(true) {
            return;
        }
        let server = Rc::clone(self);
        drop(lane::spawn(async move {
            while server.links.borrow().iter().any(|(_, link)| link.deadline.get().is_some()) {
                lane::sleep(TICK).await;
                let now = lane::now();
                let late: Vec<_> = (server.links.borrow().iter())
                    .filter(|(_, link)| link.deadline.get().is_some_and(|deadline| deadline <= now))
                    .map(|(_, link)| Rc::clone(link))
                    .collect();
                for link in late {
                    link.late.set(true);
                    link.deadline.set(None);
                    link.tether.cut();
                }
            }
            server.watching.set(false);
        }));
    }

    /// All connections there are.
    pub fn connections(&self) -> Vec<ConnectionInfo> {
        let now = lane::now();
        let info = |link: &Rc<Link>| ConnectionInfo {
            peer: link.peer.clone(),
            export: link.export.borrow().clone(),
            state: link.state.get(),
            encrypted: link.encrypted.get(),
            age: now.saturating_duration_since(link.begun),
        };
        self.links.borrow().iter().map(|(_, link)| info(link)).collect()
    }

    /// Cuts off every client, lets nobody in any more, and waits until the last request has ended.
    pub async fn close(&self) {
        self.closing.set(true);
        self.doors.close().await;
        let tethers: Vec<_> = self.links.borrow().iter().map(|(_, link)| Rc::clone(&link.tether)).collect();
        tethers.iter().for_each(|tether| tether.cut());
        self.left.until(|| self.links.borrow().is_empty().then_some(())).await;
    }
}
