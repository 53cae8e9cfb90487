//! Connections: Unix and TCP sockets on the lane, and simulated ones.
//!
//! A stream may have one receive and one send pending at a time, from two tasks. [`Stream::shutdown`] and
//! [`Listener::close`] end what is pending from outside. Unlike file operations, a pending socket operation may be
//! dropped: it is cancelled, and what it had received already is lost.

use std::cell::Cell;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType};

use crate::op::{self, Op, Operation, Pieces};
use crate::pool::on_worker;
use crate::sim::{self, SimListener, SimStream};
use crate::{Segments, SegmentsMut};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;

enum Wire {
    Real(OwnedFd),
    Sim(SimStream),
}

/// A connection. Dropping it closes it.
pub struct Stream {
    wire: Wire,
    peer: String,
}

impl Stream {
    fn real(fd: OwnedFd) -> Self {
        let peer = peer_of(fd.as_fd());
        tune(fd.as_fd());
        Self { wire: Wire::Real(fd), peer }
    }

    fn sim(stream: SimStream, peer: &str) -> Self {
        Self { wire: Wire::Sim(stream), peer: format!("simulated {peer}") }
    }

    /// Connects to a Unix socket.
    pub async fn connect_unix(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref().to_owned();
        if sim::is_on() {
            let address = unix_name(&path);
            return Ok(Self::sim(sim::connect(&address).await?, &address));
        }
        Ok(Self::real(on_worker(move || Ok(UnixStream::connect(path)?.into())).await?))
    }

    /// Connects by TCP to the first address of `to` ("host:port") that answers.
    pub async fn connect_tcp(to: &str) -> io::Result<Self> {
        if sim::is_on() {
            return Ok(Self::sim(sim::connect(to).await?, to));
        }
        let to = to.to_owned();
        Ok(Self::real(on_worker(move || Ok(TcpStream::connect(to)?.into())).await?))
    }

    /// Two ends of one connection.
    pub fn pair() -> io::Result<(Self, Self)> {
        if sim::is_on() {
            let (a, b) = SimStream::pair();
            return Ok((Self::sim(a, "pair"), Self::sim(b, "pair")));
        }
        let (a, b) = UnixStream::pair()?;
        Ok((Self::real(a.into()), Self::real(b.into())))
    }

    /// Who is at the other end, for lists and logs.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// The socket itself, for protocols that send descriptors along; `None` for a simulated one.
    pub fn into_fd(self) -> Option<OwnedFd> {
        match self.wire {
            Wire::Real(fd) => Some(fd),
            Wire::Sim(_) => None,
        }
    }

    /// `ADDRESS:PORT` of this end, for a TCP connection.
    pub fn local_address(&self) -> Option<String> {
        let Wire::Real(fd) = &self.wire else { return None };
        let address = rustix::net::getsockname(fd).ok()?;
        SocketAddr::try_from(address).ok().map(|address| address.to_string())
    }

    /// Receives at least one byte into the beginning of `into`; 0 when the other end is closed (or `into` is empty).
    #[allow(unsafe_code)]
    pub async fn recv(&self, into: &SegmentsMut<'_>) -> io::Result<usize> {
        let fd = match &self.wire {
            Wire::Sim(stream) => return Ok(stream.receive(into).await),
            Wire::Real(fd) => fd.as_raw_fd(),
        };
        if into.is_empty() {
            return Ok(0);
        }
        loop {
            let into = Pieces::of(into.iovecs());
            let mut message = op::message(into);
            let op = Op::Receive { fd, into, message: &raw mut message };
            // SAFETY: the pieces are borrowed, writable, by this future, which owns the message; `self` keeps the
            // descriptor.
            match unsafe { Operation::new(op) }.await {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => return result.map(|count| count as usize),
            }
        }
    }

    /// Fills all of `into`. `UnexpectedEof` when the other end closes before.
    pub async fn recv_all(&self, into: &SegmentsMut<'_>) -> io::Result<()> {
        let mut done = 0;
        while done < into.len() {
            match self.recv(&into.slice_mut(done, into.len() - done)).await? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                count => done += count,
            }
        }
        Ok(())
    }

    /// Sends some of `from`, from its beginning; answers how much.
    #[allow(unsafe_code)]
    pub async fn send(&self, from: &Segments<'_>) -> io::Result<usize> {
        let fd = match &self.wire {
            Wire::Sim(stream) => return stream.send(from).await,
            Wire::Real(fd) => fd.as_raw_fd(),
        };
        if from.is_empty() {
            return Ok(0);
        }
        loop {
            let from = Pieces::of(from.iovecs());
            let mut message = op::message(from);
            let op = Op::Send { fd, from, message: &raw mut message };
            // SAFETY: the pieces are borrowed by this future, which owns the message; `self` keeps the descriptor.
            match unsafe { Operation::new(op) }.await {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => return result.map(|count| count as usize),
            }
        }
    }

    /// Sends all of `from`.
    pub async fn send_all(&self, from: &Segments<'_>) -> io::Result<()> {
        let mut done = self.send(from).await?;
        while done < from.len() {
            match self.send(&from.slice(done, from.len() - done)).await? {
                0 => return Err(ErrorKind::WriteZero.into()),
                count => done += count,
            }
        }
        Ok(())
    }

    /// Ends both directions, from any task: a pending receive answers 0, a pending send fails.
    pub fn shutdown(&self) {
        match &self.wire {
            Wire::Sim(stream) => stream.shutdown(),
            // Fails when the other end is gone already, which is what is wanted.
            Wire::Real(fd) => drop(rustix::net::shutdown(fd, Shutdown::Both)),
        }
    }
}

/// Kernel memory for bytes on the way to the other end of a Unix socket. With the usual 208 KiB a batch of answers
/// is sent in pieces, a wake-up each; measured at 128 KiB reads, this saves half of the system calls.
const UNIX_SEND_BYTES: usize = 1 << 20;

/// On TCP, small answers must not wait for large ones, and a peer that has vanished without a word must be found out:
/// after a minute of silence it is asked, every ten seconds, six times. TCP sizes its buffers by itself, Unix sockets
/// do not. All of it is a wish: a socket works without.
fn tune(fd: BorrowedFd<'_>) {
    use rustix::net::sockopt;
    if sockopt::set_tcp_nodelay(fd, true).is_ok() {
        let _ = sockopt::set_socket_keepalive(fd, true);
        let _ = sockopt::set_tcp_keepidle(fd, Duration::from_secs(60));
        let _ = sockopt::set_tcp_keepintvl(fd, Duration::from_secs(10));
        let _ = sockopt::set_tcp_keepcnt(fd, 6);
    } else {
        let _ = sockopt::set_socket_send_buffer_size(fd, UNIX_SEND_BYTES);
    }
}

fn peer_of(fd: BorrowedFd<'_>) -> String {
    let address = rustix::net::getpeername(fd).ok().flatten().and_then(|a| SocketAddr::try_from(a).ok());
    if let Some(address) = address {
        return address.to_string();
    }
    match rustix::net::sockopt::socket_peercred(fd) {
        Ok(who) => format!("process {} of user {}", who.pid.as_raw_nonzero(), who.uid.as_raw()),
        Err(_) => "unknown".into(),
    }
}

fn unix_name(path: &Path) -> String {
    format!("unix:{}", path.display())
}

enum Door {
    Real(OwnedFd),
    Sim(Rc<SimListener>),
}

/// Accepts connections. Dropping it closes it and removes its socket file.
pub struct Listener {
    door: Door,
    address: String,
    closed: Cell<bool>,
    /// The socket file and its inode, to be removed if it is still ours.
    file: Option<(PathBuf, u64)>,
}

impl Listener {
    /// Listens at a path with the given permission bits. A socket file that nobody listens at any more is replaced;
    /// `AddrInUse` when somebody does, or when the path is something else.
    pub fn unix(path: impl AsRef<Path>, mode: u32) -> io::Result<Self> {
        let path = path.as_ref();
        if sim::is_on() {
            return Self::sim(&unix_name(path));
        }
        let fd =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        // The socket's own mode becomes that of the file: it is never more open than asked for.
        rustix::fs::fchmod(&fd, rustix::fs::Mode::from_raw_mode(mode))?;
        let address = rustix::net::SocketAddrUnix::new(path)?;
        if let Err(error) = rustix::net::bind(&fd, &address) {
            if error != rustix::io::Errno::ADDRINUSE || !is_dead_socket(path) {
                return Err(error.into());
            }
            std::fs::remove_file(path)?;
            rustix::net::bind(&fd, &address)?;
        }
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
        rustix::net::listen(&fd, BACKLOG)?;
        let inode = std::fs::symlink_metadata(path)?.ino();
        Self::real(fd, unix_name(path), Some((path.to_owned(), inode)))
    }

    /// Listens at a TCP address; port 0 takes any that is free.
    pub fn tcp(address: SocketAddr) -> io::Result<Self> {
        if sim::is_on() {
            let port = if address.port() == 0 { sim::free_port() } else { address.port() };
            return Self::sim(&SocketAddr::new(address.ip(), port).to_string());
        }
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?.to_string();
        Self::real(listener.into(), address, None)
    }

    fn real(fd: OwnedFd, address: String, file: Option<(PathBuf, u64)>) -> io::Result<Self> {
        // The ring waits inside the kernel, which it does for blocking sockets only; threads poll.
        rustix::io::ioctl_fionbio(&fd, crate::in_use().engine != "io_uring")?;
        Ok(Self { door: Door::Real(fd), address, closed: Cell::new(false), file })
    }

    fn sim(address: &str) -> io::Result<Self> {
        let door = Door::Sim(SimListener::bind(address)?);
        Ok(Self { door, address: address.to_owned(), closed: Cell::new(false), file: None })
    }

    /// Where it listens: `unix:PATH`, or `ADDRESS:PORT`.
    pub fn local_address(&self) -> &str {
        &self.address
    }

    /// Waits for the next connection. `ConnectionAborted` once it is closed.
    #[allow(unsafe_code)]
    pub async fn accept(&self) -> io::Result<Stream> {
        let fd = match &self.door {
            Door::Sim(listener) => return Ok(Stream::sim(listener.accept().await?, &self.address)),
            Door::Real(fd) => fd.as_raw_fd(),
        };
        loop {
            if self.closed.get() {
                return Err(ErrorKind::ConnectionAborted.into());
            }
            // SAFETY: no memory is named; `self` keeps the descriptor.
            match unsafe { Operation::new(Op::Accept { fd }) }.await {
                // SAFETY: the kernel has just made this descriptor for us.
                Ok(fd) => return Ok(Stream::real(unsafe { OwnedFd::from_raw_fd(fd as i32) })),
                Err(_) if self.closed.get() => {}
                // The caller before the one who is waiting has gone away again: not the listener's fault.
                Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes no more connections: a pending accept and later ones answer `ConnectionAborted`.
    pub fn close(&self) {
        self.closed.set(true);
        match &self.door {
            Door::Sim(listener) => listener.close(),
            // Wakes who waits in accept.
            Door::Real(fd) => drop(rustix::net::shutdown(fd, Shutdown::Both)),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.close();
        if let Some((path, inode)) = &self.file
            && std::fs::symlink_metadata(path).is_ok_and(|m| m.ino() == *inode)
        {
            let _ = std::fs::remove_file(path); // at worst the next one replaces it
        }
    }
}

/// A socket file whose listener has died.
fn is_dead_socket(path: &Path) -> bool {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    match UnixStream::connect(path) {
        _ if !is_socket => false,
        Err(error) => error.kind() == ErrorKind::ConnectionRefused,
        Ok(_) => false,
    }
}
