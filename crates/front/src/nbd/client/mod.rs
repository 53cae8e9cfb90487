//! An NBD client that is a [`Disk`]: the other end of our own server, of `qemu-nbd`, of `nbdkit`.
//!
//! One connection, many requests at once; a task receives the answers and wakes whoever waits for them.

mod handshake;
mod receive;
mod status;

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use block::{
    Disk, DiskError, Extents, Gate, Generation, Io, SECTOR_BYTES, Safe, Sector, Segments, SegmentsMut, Shape,
    check_range,
};
use lane::Task;
use lane::sync::{Turn, Waiters};
use zerocopy::IntoBytes;

pub use handshake::{Refusal, list};

use super::format::{REQUEST_MAGIC, RequestHeader, can, command, flag};
use crate::pool::{Pool, Pooled};
use crate::tls::Trust;
use crate::wire::{Input, Wire};

/// TRIM and WRITE_ZEROES go out in pieces of this many bytes: they move no data, so the limit is the field's width.
const DATALESS_BYTES_MAX: u64 = 1 << 30;
/// Bytes of buffers kept for the next reads.
const POOL_BYTES: usize = 8 << 20;

/// What to connect to.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Name of the export; empty for the server's default.
    pub export: String,
    /// Contexts that answer [`Disk::status`] with `since`: which generation, and the name of the context
    /// (`kagami:changed:SNAP`; with bit 0 as "changed", so `qemu:dirty-bitmap:NAME` works as well).
    pub changed: Vec<(Generation, String)>,
    /// Encrypt, or do not connect.
    pub tls: Option<Trust>,
}

/// What was agreed in the handshake.
#[derive(Clone, Debug, Default)]
struct Agreed {
    bytes: u64,
    flags: u16,
    structured: bool,
    /// No request moves more, in bytes.
    maximum: u32,
    /// Number and name of the contexts.
    contexts: Vec<(u32, String)>,
}

/// A request that waits for its answer.
struct Waiting {
    command: u16,
    offset: u64,
    /// Where a read goes.
    data: Option<Pooled>,
    /// Bytes of a read that have come.
    received: u64,
    /// Context and descriptors (bytes, flags) of a BLOCK_STATUS.
    status: Vec<(u32, Vec<(u32, u32)>)>,
    /// First error that was told.
    error: u32,
    done: bool,
}

/// A connection to a server, as a disk. [`Client::disconnect`] ends it well; dropping it cuts it.
pub struct Client {
    wire: Rc<Wire>,
    agreed: Agreed,
    changed: Vec<(Generation, String)>,
    pool: Rc<Pool>,
    line: Rc<Line>,
    receiver: RefCell<Option<Task<()>>>,
    /// Before whatever changes the disk, so that compare-and-write can be alone.
    gate: Rc<Gate>,
    comparing: Turn,
}

/// What the receiving task shares with the client.
struct Line {
    waiting: RefCell<slab::Slab<Waiting>>,
    answered: Waiters,
    sending: Turn,
    /// No answer will come any more.
    lost: Cell<bool>,
}

impl Client {
    /// Talks the handshake over a fresh connection.
    pub async fn connect(wire: Wire, options: &Options) -> Result<Rc<Self>, Refusal> {
        let pool = Pool::new(POOL_BYTES);
        let mut input = Input::new(Rc::new(wire), pool.take(64 << 10));
        let contexts: Vec<&str> = options.changed.iter().map(|(_, name)| name.as_str()).collect();
        let agreed = handshake::agree(&mut input, &options.export, &contexts, options.tls.as_ref()).await?;
        let wire = Rc::clone(input.wire());
        let line = Rc::new(Line {
            waiting: RefCell::default(),
            answered: Waiters::new(),
            sending: Turn::new(),
            lost: Cell::new(false),
        });
        let receiver = lane::spawn(receive::receive(Rc::clone(&line), input));
        Ok(Rc::new(Self {
            wire,
            agreed,
            changed: options.changed.clone(),
            pool,
            line,
            receiver: RefCell::new(Some(receiver)),
            gate: Gate::new(),
            comparing: Turn::new(),
        }))
    }

    /// Names of the metadata contexts that were agreed.
    pub fn contexts(&self) -> impl Iterator<Item = &str> {
        self.agreed.contexts.iter().map(|(_, name)| name.as_str())
    }

    /// The server allows several connections to one export.
    pub fn multi_conn(&self) -> bool {
        self.agreed.flags & can::MULTI_CONN != 0
    }

    /// Says good-bye and waits until the server has ended the connection. No request may be under way.
    pub async fn disconnect(&self) {
        let header = self.header(command::DISC, 0, 0, 0, 0);
        {
            let _turn = self.line.sending.take().await;
            // The server may be gone already, which is as good.
            let _ = self.wire.send(&Segments::new(header.as_bytes())).await;
            self.wire.finish().await;
        }
        let receiver = self.receiver.borrow_mut().take();
        if let Some(receiver) = receiver {
            receiver.await;
        }
    }

    /// Cuts the connection without good-bye; whatever waits for an answer gets [`DiskError::Gone`].
    pub fn cut(&self) {
        self.wire.shut();
    }

    fn header(&self, kind: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> RequestHeader {
        RequestHeader {
            magic: REQUEST_MAGIC.into(),
            flags: flags.into(),
            kind: kind.into(),
            cookie: cookie.into(),
            offset: offset.into(),
            length: length.into(),
        }
    }

    /// Sends one request and waits for its answer.
    async fn ask(
        &self,
        kind: u16,
        flags: u16,
        offset: u64,
        length: u32,
        payload: Option<&Segments<'_>>,
    ) -> Result<Waiting, DiskError> {
        if self.line.lost.get() {
            return Err(DiskError::Gone);
        }
        let data = (kind == command::READ).then(|| self.pool.take(length as usize));
        let key = self.line.waiting.borrow_mut().insert(Waiting {
            command: kind,
            offset,
            data,
            received: 0,
            status: Vec::new(),
            error: 0,
            done: false,
        });
        let header = self.header(kind, flags, key as u64, offset, length);
        let sent = {
            let _turn = self.line.sending.take().await;
            match self.wire.send(&Segments::new(header.as_bytes())).await {
                Ok(()) => match payload {
                    Some(payload) => self.wire.send(payload).await,
                    None => Ok(()),
                },
                Err(error) => Err(error),
            }
        };
        if sent.is_err() {
            self.wire.shut(); // the receiving task ends, and everybody waiting learns it
        }
        let line = &self.line;
        line.answered.until(|| (line.waiting.borrow()[key].done || line.lost.get()).then_some(())).await;
        let answer = line.waiting.borrow_mut().remove(key);
        match answer.error {
            _ if !answer.done => Err(DiskError::Gone),
            0 => Ok(answer),
            number => Err(disk_error(number)),
        }
    }

    /// TRIM or WRITE_ZEROES of any length.
    async fn dataless(&self, kind: u16, flags: u16, at: Sector, count: u64) -> Result<(), DiskError> {
        check_range(self.shape().sectors, at, count)?;
        let (mut offset, end) = (at.bytes(), at.plus(count).bytes());
        while offset < end {
            let length = (end - offset).min(DATALESS_BYTES_MAX);
            self.ask(kind, flags, offset, length as u32, None).await?;
            offset += length;
        }
        Ok(())
    }

    fn refuse_writes(&self) -> Result<(), DiskError> {
        if self.agreed.flags & can::READ_ONLY != 0 { Err(DiskError::ReadOnly) } else { Ok(()) }
    }

    async fn write_all(&self, at: Sector, from: &Segments<'_>, safe: Safe) -> Result<(), DiskError> {
        check_range(self.shape().sectors, at, from.len() as u64 / SECTOR_BYTES)?;
        self.refuse_writes()?;
        let has_fua = self.agreed.flags & can::SEND_FUA != 0;
        let flags = if safe == Safe::OnReturn && has_fua { flag::FUA } else { 0 };
        let mut done = 0;
        while done < from.len() {
            let length = (from.len() - done).min(self.agreed.maximum as usize);
            let piece = from.slice(done, length);
            let offset = at.bytes() + done as u64;
            self.ask(command::WRITE, flags, offset, length as u32, Some(&piece)).await?;
            done += length;
        }
        if safe == Safe::OnReturn && !has_fua { self.flush().await } else { Ok(()) }
    }

    /// Zeroes by writing, for servers that cannot do it otherwise.
    async fn write_zeroes(&self, at: Sector, count: u64) -> Result<(), DiskError> {
        check_range(self.shape().sectors, at, count)?;
        let zeroes = vec![0; 1 << 20];
        let (mut offset, end) = (at.bytes(), at.plus(count).bytes());
        while offset < end {
            let length = (end - offset).min(zeroes.len() as u64);
            let piece = Segments::new(&zeroes[..length as usize]);
            self.write_all(Sector::at_byte(offset), &piece, Safe::AtNextFlush).await?;
            offset += length;
        }
        Ok(())
    }
}

/// A gate is closed as long as this lives.
struct Closed<'a>(&'a Gate);

impl<'a> Closed<'a> {
    fn new(gate: &'a Gate) -> Self {
        gate.close();
        Self(gate)
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.0.open();
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.wire.shut();
    }
}

/// What an error number of a server means for a disk.
fn disk_error(number: u32) -> DiskError {
    match number {
        1 => DiskError::ReadOnly,
        28 => DiskError::NoSpace,
        108 => DiskError::Gone,
        other => {
            let number = i32::try_from(other).unwrap_or(5);
            DiskError::Io(Arc::new(io::Error::from_raw_os_error(number)))
        }
    }
}

impl Disk for Client {
    fn shape(&self) -> Shape {
        Shape {
            sectors: self.agreed.bytes / SECTOR_BYTES,
            physical_block_bytes: 4096,
            read_only: self.agreed.flags & can::READ_ONLY != 0,
            unmap_reads_zero: false,
            memory_align: 1,
        }
    }

    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        Box::pin(async move {
            check_range(self.shape().sectors, at, into.len() as u64 / SECTOR_BYTES)?;
            let mut done = 0;
            while done < into.len() {
                let length = (into.len() - done).min(self.agreed.maximum as usize);
                let offset = at.bytes() + done as u64;
                let answer = self.ask(command::READ, 0, offset, length as u32, None).await?;
                match answer.data {
                    Some(data) if answer.received == length as u64 => into.copy_from(done, &data),
                    _ => return Err(DiskError::Gone), // the server left something out
                }
                done += length;
            }
            Ok(())
        })
    }

    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a> {
        Box::pin(async move {
            let _pass = self.gate.enter().await;
            self.write_all(at, from, safe).await
        })
    }

    fn zero(&self, at: Sector, count: u64, may_free: bool) -> Io<'_> {
        Box::pin(async move {
            self.refuse_writes()?;
            let _pass = self.gate.enter().await;
            if self.agreed.flags & can::SEND_WRITE_ZEROES == 0 {
                return self.write_zeroes(at, count).await;
            }
            let flags = if may_free { 0 } else { flag::NO_HOLE };
            self.dataless(command::WRITE_ZEROES, flags, at, count).await
        })
    }

    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        Box::pin(async move {
            self.refuse_writes()?;
            let _pass = self.gate.enter().await;
            if self.agreed.flags & can::SEND_TRIM == 0 {
                return check_range(self.shape().sectors, at, count); // it was only a hint
            }
            self.dataless(command::TRIM, 0, at, count).await
        })
    }

    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        Box::pin(async move {
            check_range(self.shape().sectors, at, count)?;
            self.ask_status(at, count, since, out).await
        })
    }

    /// Atomic against everybody who uses the disk through this client: NBD has no such request, so other clients of
    /// the server are not kept out.
    fn compare_and_write<'a>(
        &'a self,
        at: Sector,
        expected: &'a Segments<'a>,
        new: &'a Segments<'a>,
    ) -> Io<'a> {
        Box::pin(async move {
            self.refuse_writes()?;
            let _turn = self.comparing.take().await;
            let _closed = Closed::new(&self.gate);
            self.gate.drained().await;
            let (wanted, mut found) = (expected.to_vec(), vec![0; expected.len()]);
            self.read(at, &SegmentsMut::new(&mut found)).await?;
            match wanted.iter().zip(&found).position(|(a, b)| a != b) {
                Some(byte) => Err(DiskError::Miscompare { at_bytes: byte as u64 }),
                None => self.write_all(at, new, Safe::AtNextFlush).await,
            }
        })
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(async move {
            if self.agreed.flags & can::SEND_FLUSH == 0 {
                return Ok(()); // the server has promised nothing to lose
            }
            self.ask(command::FLUSH, 0, 0, 0, None).await.map(|_| ())
        })
    }
}
