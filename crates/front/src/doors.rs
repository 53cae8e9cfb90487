//! The doors of a server: the sockets that it listens on, each with a task that lets clients in.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use lane::Task;
use lane::net::{Listener, Stream};

/// How long a door that cannot let anybody in waits before it tries again.
const AGAIN: Duration = Duration::from_millis(250);

/// What a server listens on: a socket, and what it wants to know of it.
pub(crate) trait Door: 'static {
    /// The socket.
    fn listener(&self) -> &Listener;
}

impl Door for Listener {
    fn listener(&self) -> &Listener {
        self
    }
}

/// The open doors of one server.
pub(crate) struct Doors<D> {
    open: RefCell<Vec<(Rc<D>, Task<()>)>>,
}

impl<D> Default for Doors<D> {
    fn default() -> Self {
        Self { open: RefCell::default() }
    }
}

impl<D: Door> Doors<D> {
    /// Lets clients in from now on until [`Doors::close`]: each is given to `welcome`, which must not wait.
    pub(crate) fn open(&self, door: D, welcome: impl Fn(&D, Stream) + 'static) {
        let door = Rc::new(door);
        let accepting = lane::spawn(accept(Rc::clone(&door), welcome));
        self.open.borrow_mut().push((door, accepting));
    }

    /// Shows all open doors.
    pub(crate) fn each(&self, mut look: impl FnMut(&D)) {
        self.open.borrow().iter().for_each(|(door, _)| look(door));
    }

    /// Lets nobody in any more.
    pub(crate) async fn close(&self) {
        let doors = std::mem::take(&mut *self.open.borrow_mut());
        for (door, accepting) in doors {
            door.listener().close();
            accepting.await;
        }
    }
}

async fn accept<D: Door>(door: Rc<D>, welcome: impl Fn(&D, Stream)) {
    loop {
        match door.listener().accept().await {
            Ok(stream) => welcome(&door, stream),
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => return,
            Err(error) => {
                // Out of descriptors, most likely: others may give some back.
                tracing::warn!(address = door.listener().local_address(), %error, "cannot accept");
                lane::sleep(AGAIN).await;
            }
        }
    }
}
