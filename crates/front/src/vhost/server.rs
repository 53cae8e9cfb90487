//! Exports: a socket each, one front end at a time.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use block::Disk;
use lane::Task;
use lane::net::Listener;

use super::Device;
use super::blk::Blk;
use super::message::Channel;
use super::session::Session;
use crate::request::Counts;

/// Between attempts to accept when there are no descriptors left.
const PAUSE: Duration = Duration::from_millis(250);

/// A disk to be served.
pub struct NewExport {
    /// For logs and lists.
    pub name: String,
    /// The disk.
    pub disk: Rc<dyn Disk>,
    /// Refuse writes though the disk takes them.
    pub read_only: bool,
    /// What the guest sees as the disk's serial number: the first 20 bytes.
    pub serial: String,
}

/// A device on a socket.
struct Door<D> {
    device: Rc<D>,
    listener: Listener,
    session: RefCell<Option<(Rc<Session<D>>, String)>>,
    closing: Cell<bool>,
    task: RefCell<Option<Task<()>>>,
}

impl<D: Device> Door<D> {
    fn open(listener: Listener, device: Rc<D>) -> Rc<Self> {
        let door = Rc::new(Self {
            device,
            listener,
            session: RefCell::default(),
            closing: Cell::new(false),
            task: RefCell::default(),
        });
        let own = Rc::clone(&door);
        *door.task.borrow_mut() = Some(lane::spawn(async move { own.accept().await }));
        door
    }

    /// One front end after the other: who comes next may go on with the requests of who went, so those end first.
    async fn accept(&self) {
        loop {
            match self.listener.accept().await {
                Ok(_) if self.closing.get() => return,
                Ok(stream) => {
                    let peer = stream.peer().to_owned();
                    let Some(socket) = stream.into_fd() else { continue };
                    let session = Session::new(Channel::new(socket), &self.device);
                    *self.session.borrow_mut() = Some((Rc::clone(&session), peer.clone()));
                    let device = self.device.name();
                    tracing::info!(device, peer, "vhost-user front end connected");
                    match session.run().await {
                        Ok(()) => tracing::info!(device, peer, "vhost-user front end left"),
                        Err(ending) => tracing::warn!(device, peer, %ending, "vhost-user front end cut off"),
                    }
                    self.session.borrow_mut().take();
                }
                Err(_) if self.closing.get() => return,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => return,
                Err(error) => {
                    tracing::warn!(device = self.device.name(), %error, "cannot accept");
                    lane::sleep(PAUSE).await;
                }
            }
        }
    }

    fn session(&self) -> Option<Rc<Session<D>>> {
        self.session.borrow().as_ref().map(|(session, _)| Rc::clone(session))
    }

    async fn close(&self) {
        self.closing.set(true);
        self.listener.close();
        if let Some(session) = self.session() {
            session.drain().await;
            session.channel.shut();
        }
        let task = self.task.borrow_mut().take();
        if let Some(task) = task {
            task.await;
        }
    }
}

/// A disk served over vhost-user-blk.
pub struct Export {
    door: Rc<Door<Blk>>,
    counts: Rc<Counts>,
}

impl Export {
    /// Begins to serve.
    pub fn start(listener: Listener, new: NewExport) -> Self {
        let counts = Counts::new();
        let device = Blk::new(new.name, new.disk, new.read_only, new.serial, Rc::clone(&counts));
        Self { door: Door::open(listener, device), counts }
    }

    /// The disk behind it.
    pub fn disk(&self) -> &Rc<dyn Disk> {
        self.door.device.disk()
    }

    /// Writes are refused.
    pub fn read_only(&self) -> bool {
        self.door.device.is_read_only()
    }

    /// What was done, for metrics.
    pub fn counts(&self) -> &Rc<Counts> {
        &self.counts
    }

    /// Who is connected.
    pub fn peer(&self) -> Option<String> {
        self.door.session.borrow().as_ref().map(|(_, peer)| peer.clone())
    }

    /// The disk has another size: the guest is told.
    pub async fn resized(&self) {
        if let Some(session) = self.door.session() {
            session.configuration_changed().await;
        }
    }

    /// Takes no more requests, answers those under way, then lets the front end go.
    pub async fn close(&self) {
        self.door.close().await;
    }
}
