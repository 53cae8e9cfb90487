//! The two directions of a connection as bytes: a socket, a pipe in memory, TLS over either; and the receive buffer.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;

use block::{Segments, SegmentsMut};
use lane::net::Stream;
use lane::sync::Waiters;

use crate::pool::Pooled;
use crate::tls::TlsWire;

/// Why nothing more can be received.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    /// The peer closed in the middle of something.
    #[error("the peer went away in the middle of {0}")]
    Hangup(&'static str),
    /// The socket failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
}

/// A stream of bytes in both directions. One task may receive while another sends.
pub enum Wire {
    /// A pipe in memory.
    Pipe(Pipe),
    /// A socket.
    Socket(Stream),
    /// TLS over another.
    Tls(Box<TlsWire>),
}

impl Wire {
    /// Two ends of a connection in memory, for tests and fuzzing.
    pub fn pair() -> (Self, Self) {
        let (a, b) = (Rc::new(Channel::default()), Rc::new(Channel::default()));
        (
            Self::Pipe(Pipe { inward: Rc::clone(&a), outward: Rc::clone(&b) }),
            Self::Pipe(Pipe { inward: b, outward: a }),
        )
    }

    /// Receives at least one byte, or none when the other side has closed.
    pub async fn receive(&self, into: &SegmentsMut<'_>) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => pipe.receive(into).await,
            Self::Socket(stream) => stream.recv(into).await,
            Self::Tls(tls) => Box::pin(tls.receive(into)).await,
        }
    }

    /// Sends everything.
    pub async fn send(&self, from: &Segments<'_>) -> io::Result<()> {
        match self {
            Self::Pipe(pipe) => pipe.send_all(from).await,
            Self::Socket(stream) => stream.send_all(from).await,
            Self::Tls(tls) => Box::pin(tls.send(from)).await,
        }
    }

    /// Nothing more will be sent; where the transport can tell the other side so, it does.
    pub async fn finish(&self) {
        match self {
            Self::Pipe(pipe) => pipe.finish(),
            Self::Socket(_) => {}
            // The peer may be gone, which is as good.
            Self::Tls(tls) => drop(Box::pin(tls.say_goodbye()).await),
        }
    }

    /// Ends both directions at once: whatever waits on them comes back.
    pub fn shut(&self) {
        match self {
            Self::Pipe(pipe) => pipe.shut(),
            Self::Socket(stream) => stream.shutdown(),
            Self::Tls(tls) => tls.shut(),
        }
    }

    /// Bytes are encrypted.
    pub fn is_encrypted(&self) -> bool {
        matches!(self, Self::Tls(_))
    }
}

/// A client's connection as others hold it, to cut it off: whatever waits on the connection comes back, and so does
/// whoever waits for something else on its behalf.
pub(crate) struct Tether {
    wire: Rc<Wire>,
    cut: Cell<bool>,
    noticed: Waiters,
}

impl Tether {
    pub fn new(wire: Wire) -> Rc<Self> {
        Rc::new(Self { wire: Rc::new(wire), cut: Cell::new(false), noticed: Waiters::new() })
    }

    /// The connection, not encrypted.
    pub fn wire(&self) -> &Rc<Wire> {
        &self.wire
    }

    /// Ends it.
    pub fn cut(&self) {
        self.cut.set(true);
        self.wire.shut();
        self.noticed.wake_all();
    }

    /// Waits until `ready` answers something, asked again after each waking of `waiters`; `None` when it is cut.
    pub async fn unless_cut<T>(
        &self,
        waiters: &Waiters,
        ready: impl FnMut() -> Option<T> + Unpin,
    ) -> Option<T> {
        let mut ready = waiters.until(ready);
        let mut cut = self.noticed.until(|| self.cut.get().then_some(()));
        std::future::poll_fn(|cx| match Pin::new(&mut ready).poll(cx) {
            Poll::Ready(value) => Poll::Ready(Some(value)),
            Poll::Pending => Pin::new(&mut cut).poll(cx).map(|()| None),
        })
        .await
    }
}

/// What `work` answers; `None` when `end` comes first.
pub(crate) async fn first_of<T>(work: impl Future<Output = T>, end: impl Future) -> Option<T> {
    let (mut work, mut end) = (pin!(work), pin!(end));
    std::future::poll_fn(|cx| match work.as_mut().poll(cx) {
        Poll::Ready(value) => Poll::Ready(Some(value)),
        Poll::Pending => end.as_mut().poll(cx).map(|_| None),
    })
    .await
}

/// One direction of a pipe.
#[derive(Default)]
struct Channel {
    bytes: RefCell<VecDeque<u8>>,
    closed: Cell<bool>,
    changed: Waiters,
}

/// One end of a connection in memory.
pub struct Pipe {
    inward: Rc<Channel>,
    outward: Rc<Channel>,
}

impl Pipe {
    /// Bytes that one direction holds before its sender waits.
    const CAPACITY: usize = 128 << 10;

    async fn receive(&self, into: &SegmentsMut<'_>) -> io::Result<usize> {
        let channel = &self.inward;
        let count = channel
            .changed
            .until(|| {
                let mut bytes = channel.bytes.borrow_mut();
                let count = bytes.len().min(into.len());
                if count == 0 {
                    return channel.closed.get().then_some(0);
                }
                let taken: Vec<u8> = bytes.drain(..count).collect();
                into.copy_from(0, &taken);
                Some(count)
            })
            .await;
        channel.changed.wake_all();
        Ok(count)
    }

    async fn send(&self, from: &Segments<'_>) -> io::Result<usize> {
        let channel = &self.outward;
        let result = channel
            .changed
            .until(|| {
                if channel.closed.get() {
                    return Some(Err(io::Error::from(io::ErrorKind::BrokenPipe)));
                }
                let mut bytes = channel.bytes.borrow_mut();
                let count = from.len().min(Self::CAPACITY - bytes.len());
                if count == 0 {
                    return from.is_empty().then_some(Ok(0));
                }
                bytes.extend(from.slice(0, count).to_vec());
                Some(Ok(count))
            })
            .await;
        channel.changed.wake_all();
        result
    }

    async fn send_all(&self, from: &Segments<'_>) -> io::Result<()> {
        let mut done = self.send(from).await?;
        while done < from.len() {
            done += self.send(&from.slice(done, from.len() - done)).await?;
        }
        Ok(())
    }

    fn finish(&self) {
        self.outward.closed.set(true);
        self.outward.changed.wake_all();
    }

    fn shut(&self) {
        for channel in [&self.inward, &self.outward] {
            channel.closed.set(true);
            channel.changed.wake_all();
        }
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.shut();
    }
}

/// A payload at least this long is received straight into its own buffer, in bytes; a shorter one is copied out of
/// the receive buffer, which is cheaper than another system call.
const DIRECT_BYTES_MIN: usize = 32 << 10;

/// What was received and not used yet.
pub(crate) struct Input {
    wire: Rc<Wire>,
    buffer: Pooled,
    start: usize,
    end: usize,
    /// The payload just taken was long: the next one may be too, and should not be received here along with its header.
    long: bool,
}

impl Input {
    /// Receives into `buffer`, whose length bounds what can be [`Input::fill`]ed at once.
    pub fn new(wire: Rc<Wire>, buffer: Pooled) -> Self {
        Self { wire, buffer, start: 0, end: 0, long: false }
    }

    /// Where it receives from.
    pub fn wire(&self) -> &Rc<Wire> {
        &self.wire
    }

    /// What is there now.
    pub fn ready(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Marks bytes as used.
    pub fn used(&mut self, count: usize) {
        self.start += count;
        debug_assert!(self.start <= self.end, "used more than was there");
    }

    /// Goes on with a larger buffer.
    pub fn enlarge(&mut self, mut buffer: Pooled) {
        let count = self.ready().len();
        buffer[..count].copy_from_slice(self.ready());
        (self.buffer, self.start, self.end) = (buffer, 0, count);
    }

    /// Waits until `count` bytes are there. False when the client closed before the first of them.
    pub async fn fill(&mut self, count: usize, what: &'static str) -> Result<bool, Broken> {
        debug_assert!(count <= self.buffer.len());
        while self.end - self.start < count {
            if self.start == self.end {
                (self.start, self.end) = (0, 0);
            } else if self.start + count > self.buffer.len() {
                self.buffer.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            }
            let to = if self.long { self.start + count } else { self.buffer.len() };
            let received = self.wire.receive(&SegmentsMut::new(&mut self.buffer[self.end..to])).await?;
            if received == 0 {
                return if self.start == self.end { Ok(false) } else { Err(Broken::Hangup(what)) };
            }
            self.end += received;
        }
        self.long = false;
        Ok(true)
    }

    /// Fills `into` with what comes next. `ahead` bytes more are taken along if they are there.
    pub async fn payload(&mut self, into: &mut [u8], ahead: usize) -> Result<(), Broken> {
        let mut done = self.ready().len().min(into.len());
        into[..done].copy_from_slice(&self.ready()[..done]);
        self.used(done);
        self.long = into.len() >= DIRECT_BYTES_MIN;
        if done == into.len() {
            return Ok(());
        }
        (self.start, self.end) = (0, 0);
        let ahead = if self.long { ahead } else { self.buffer.len() };
        while done < into.len() {
            let rest = into.len() - done;
            let places = SegmentsMut::scatter([&mut into[done..], &mut self.buffer[..ahead]]);
            let received = self.wire.receive(&places).await?;
            if received == 0 {
                return Err(Broken::Hangup("a payload"));
            }
            done += received.min(rest);
            self.end = received.saturating_sub(rest);
        }
        Ok(())
    }

    /// Passes over `count` bytes.
    pub async fn skip(&mut self, mut count: usize, what: &'static str) -> Result<(), Broken> {
        loop {
            let there = self.ready().len().min(count);
            self.used(there);
            count -= there;
            if count == 0 {
                return Ok(());
            }
            if !self.fill(count.min(self.buffer.len()), what).await? {
                return Err(Broken::Hangup(what));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::Pool;

    #[test]
    fn payloads_and_headers_in_any_pieces() {
        lane::block_on(async {
            let (near, far) = Wire::pair();
            let sender = lane::spawn(async move {
                let all: Vec<u8> = (0..200_000u32).map(|n| (n % 251) as u8).collect();
                for piece in all.chunks(7001) {
                    far.send(&Segments::new(piece)).await.unwrap();
                }
            });
            let pool = Pool::new(0);
            let mut input = Input::new(Rc::new(near), pool.take(8192));
            let mut at = 0u32;
            let check = |bytes: &[u8], at: &mut u32| {
                for byte in bytes {
                    assert_eq!(u32::from(*byte), *at % 251);
                    *at += 1;
                }
            };
            for length in [3, 5000, 40_000, 1, 70_000, 28] {
                assert!(input.fill(28, "test").await.unwrap());
                check(&input.ready()[..28], &mut at);
                input.used(28);
                let mut payload = vec![0; length];
                input.payload(&mut payload, 28).await.unwrap();
                check(&payload, &mut at);
            }
            let rest = 200_000 - at as usize;
            input.skip(rest, "test").await.unwrap();
            assert!(!input.fill(1, "test").await.unwrap());
            sender.await;
        });
    }
}
