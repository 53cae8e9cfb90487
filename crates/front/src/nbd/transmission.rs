//! Transmission: requests are read as they come, each becomes a task, answers leave in the order of completion.

use std::ops::Range;
use std::rc::Rc;

use block::{DiskError, Extents, Kind, SECTOR_BYTES, Safe, Sector, Segments, SegmentsMut};
use zerocopy::big_endian::U64;
use zerocopy::{FromBytes, IntoBytes};

use super::connection::Connection;
use super::edges;
use super::ending::Ending;
use super::errno::{Errno, errno};
use super::format::{
    CHUNK_MAGIC, ChunkHeader, DataChunk, ErrorChunk, HoleChunk, REQUEST_BYTES_MAX, REQUEST_MAGIC,
    RequestHeader, SIMPLE_REPLY_MAGIC, SimpleReply, chunk, command, flag,
};
use super::outgoing::{Answer, Piece};
use super::status;
use crate::credit::Held;
use crate::pool::{Pool, Pooled};
use crate::request::{Operation, Request};
use crate::wire::Input;

/// Length of a request on the wire.
const HEADER_BYTES: usize = size_of::<RequestHeader>();
/// A read of at least so many bytes is looked through for zeroes: a look at the first bytes of each 4 KiB, which
/// costs nothing beside sending them.
const ZERO_SCAN_BYTES_MIN: usize = 32 << 10;
/// A run of zeroes becomes a hole in the answer from this length on: a chunk costs the client a few small reads.
const HOLE_BYTES_MIN: usize = 16 << 10;
/// Unit in which zeroes are looked for.
const ZERO_UNIT: usize = 4096;
/// From this length on the disk is asked for its holes before it is read, so that holes are not read at all.
const ASK_STATUS_BYTES_MIN: usize = 1 << 20;
/// Extents asked for then; what they do not cover is read.
const ASK_STATUS_EXTENTS: usize = 64;
/// A message to the client is cut at this length.
const MESSAGE_BYTES_MAX: usize = 255;

/// A request as it came, its numbers unchecked.
#[derive(Copy, Clone, Debug)]
struct Command {
    kind: u16,
    flags: u16,
    cookie: U64,
    offset: u64,
    length: u32,
}

/// Reads requests until the client ends. Everything under way goes on by itself; the caller waits for it.
pub(crate) async fn receive(connection: &Rc<Connection>, input: &mut Input) -> Result<(), Ending> {
    loop {
        if !input.fill(HEADER_BYTES, "a request").await? {
            return Ok(());
        }
        let Ok((header, _)) = RequestHeader::ref_from_prefix(input.ready()) else {
            continue; // `fill` has made it long enough
        };
        if header.magic != REQUEST_MAGIC {
            let found = u64::from(header.magic.get());
            return Err(Ending::BadMagic { what: "a request", found });
        }
        let command = Command {
            kind: header.kind.get(),
            flags: header.flags.get(),
            cookie: header.cookie,
            offset: header.offset.get(),
            length: header.length.get(),
        };
        input.used(HEADER_BYTES);
        if command.kind == command::DISC {
            return Ok(());
        }
        take_up(connection, input, command).await?;
    }
}

/// Takes the payload, then answers at once or starts a task that will.
async fn take_up(connection: &Rc<Connection>, input: &mut Input, command: Command) -> Result<(), Ending> {
    let payload_length = if command.kind == command::WRITE { command.length as usize } else { 0 };
    if payload_length > REQUEST_BYTES_MAX as usize {
        return Err(Ending::WriteTooLong(command.length));
    }
    let checked = check(connection, &command);
    let footprint = if checked.is_ok() { footprint(connection, &command) } else { 0 };
    let Some(held) = connection.credit.hold(footprint).await else {
        return Err(Ending::Hangup("a request that waited for memory"));
    };
    let payload = match checked {
        Ok(_) if payload_length > 0 => {
            let mut payload = connection.pool.take(payload_length);
            input.payload(&mut payload, HEADER_BYTES).await?;
            Some(payload)
        }
        _ => {
            input.skip(payload_length, "a payload").await?;
            None
        }
    };
    let counts = &connection.export().counts;
    match checked {
        Ok(operation) => {
            let request = Request::begin(counts, operation, u64::from(command.length));
            let connection = Rc::clone(connection);
            drop(lane::spawn(async move { execute(&connection, request, command, payload, held).await }));
        }
        Err((errno, why)) => {
            let request = Request::begin(counts, Operation::Refused, 0);
            refuse(connection, request, &command, errno, why, None, held);
        }
    }
    Ok(())
}

/// Bytes of buffers that a good request will hold.
fn footprint(connection: &Connection, command: &Command) -> usize {
    match command.kind {
        command::READ | command::WRITE => {
            let (_, sectors) = edges::around(command.offset, u64::from(command.length));
            Pool::footprint((sectors * SECTOR_BYTES) as usize).min(REQUEST_BYTES_MAX as usize)
        }
        command::BLOCK_STATUS => {
            status::footprint(connection.contexts.len(), command.flags & flag::REQ_ONE != 0)
        }
        _ => 0,
    }
}

/// What a request asks, or why it is refused. Ranges that pass lie on the disk.
fn check(connection: &Connection, command: &Command) -> Result<Operation, (Errno, &'static str)> {
    let export = connection.export();
    let (operation, flags) = match command.kind {
        command::READ => (Operation::Read, if connection.structured { flag::DF } else { 0 }),
        command::WRITE => (Operation::Write, 0),
        command::FLUSH => (Operation::Flush, 0),
        command::TRIM => (Operation::Unmap, 0),
        command::CACHE => (Operation::Cache, 0),
        command::WRITE_ZEROES => {
            (Operation::Zero, flag::NO_HOLE | if export.fast_zero { flag::FAST_ZERO } else { 0 })
        }
        command::BLOCK_STATUS => (Operation::Status, flag::REQ_ONE),
        _ => return Err((Errno::Inval, "unknown command")),
    };
    if command.flags & !(flags | flag::FUA) != 0 {
        return Err((Errno::Inval, "unknown flag for this command"));
    }
    let writes = matches!(operation, Operation::Write | Operation::Unmap | Operation::Zero);
    if writes && export.read_only() {
        return Err((Errno::Perm, "the export is read-only"));
    }
    let bytes = export.disk.shape().bytes();
    if operation != Operation::Flush
        && command.offset.checked_add(u64::from(command.length)).is_none_or(|end| end > bytes)
    {
        return Err((errno(&DiskError::OutOfRange, operation), "beyond the end of the disk"));
    }
    if operation == Operation::Read && command.length > REQUEST_BYTES_MAX {
        return Err((Errno::Overflow, "more than 32 MiB at once"));
    }
    if operation == Operation::Status && (connection.contexts.is_empty() || command.length == 0) {
        return Err((Errno::Inval, "no context was selected, or nothing is asked"));
    }
    Ok(operation)
}

/// Does what is asked and answers it.
async fn execute(
    connection: &Rc<Connection>,
    request: Request,
    command: Command,
    payload: Option<Pooled>,
    mut held: Held,
) {
    let disk = &*connection.export().disk;
    let result = match request.operation() {
        Operation::Read => return read(connection, request, command, held).await,
        Operation::Status => return block_status(connection, request, command, held).await,
        Operation::Write => {
            let done = match &payload {
                Some(payload) => write(connection, &command, payload).await,
                None => Ok(()),
            };
            drop(payload);
            held.release_bytes();
            done
        }
        Operation::Flush => disk.flush().await,
        Operation::Unmap => unmap(connection, &command).await,
        Operation::Zero => {
            if command.flags & flag::FAST_ZERO != 0 && !is_fast(connection, &command) {
                let why = "not faster than writing zeroes";
                return refuse(connection, request, &command, Errno::NotSup, why, None, held);
            }
            zero(connection, &command).await
        }
        // A hint; the range was checked. Nothing is read ahead: what is above the disk caches by itself.
        Operation::Cache | Operation::Refused | Operation::Control => Ok(()),
    };
    match result {
        Ok(()) => succeed(connection, request, &command, held),
        Err(error) => fail(connection, request, &command, &error, held),
    }
}

async fn write(connection: &Connection, command: &Command, payload: &Pooled) -> Result<(), DiskError> {
    let disk = &*connection.export().disk;
    let safe = if command.flags & flag::FUA != 0 { Safe::OnReturn } else { Safe::AtNextFlush };
    if (command.offset | u64::from(command.length)).is_multiple_of(SECTOR_BYTES) {
        let at = Sector(command.offset / SECTOR_BYTES);
        return disk.write(at, &Segments::new(payload), safe).await;
    }
    edges::write(disk, &connection.pool, command.offset, payload, safe).await
}

/// Whether zeroing this range is as good as instant: whole blocks of a disk that says so, and space may go.
fn is_fast(connection: &Connection, command: &Command) -> bool {
    let block = u64::from(connection.export().disk.shape().physical_block_bytes);
    command.flags & flag::NO_HOLE == 0 && (command.offset | u64::from(command.length)).is_multiple_of(block)
}

async fn zero(connection: &Connection, command: &Command) -> Result<(), DiskError> {
    let disk = &*connection.export().disk;
    let may_free = command.flags & flag::NO_HOLE == 0;
    edges::zero(disk, &connection.pool, command.offset, command.length, may_free).await?;
    if command.flags & flag::FUA != 0 { disk.flush().await } else { Ok(()) }
}

/// A hint: the whole sectors in the range are given up, odd ends stay.
async fn unmap(connection: &Connection, command: &Command) -> Result<(), DiskError> {
    let disk = &*connection.export().disk;
    let (at, bytes) = edges::cut(command.offset, command.length as usize).middle;
    if bytes == 0 {
        return Ok(());
    }
    disk.unmap(at, bytes as u64 / SECTOR_BYTES).await?;
    if command.flags & flag::FUA != 0 { disk.flush().await } else { Ok(()) }
}

async fn block_status(connection: &Connection, request: Request, command: Command, held: Held) {
    let disk = &*connection.export().disk;
    let only_one = command.flags & flag::REQ_ONE != 0;
    let Command { cookie, offset, length, .. } = command;
    match status::answer(disk, &connection.contexts, cookie, offset, length, only_one).await {
        Ok(bytes) => connection.outgoing.answer(request, Ok(()), Answer::bytes(&[0u8; 0], bytes), held),
        Err(error) => fail(connection, request, &command, &error, held),
    }
}

async fn read(connection: &Connection, request: Request, command: Command, held: Held) {
    if command.length == 0 {
        return succeed(connection, request, &command, held);
    }
    let (first, sectors) = edges::around(command.offset, u64::from(command.length));
    let mut data = connection.pool.take((sectors * SECTOR_BYTES) as usize);
    let from = (command.offset - first.bytes()) as usize;
    let range = from..from + command.length as usize;
    let may_split = connection.structured && command.flags & flag::DF == 0;
    let disk = &*connection.export().disk;
    let mut holes = Vec::new();
    let result = if may_split && range.len() >= ASK_STATUS_BYTES_MIN {
        read_data_only(disk, first, &mut data, &mut holes).await
    } else {
        disk.read(first, &SegmentsMut::new(&mut data)).await
    };
    if let Err(error) = result {
        return fail(connection, request, &command, &error, held);
    }
    if may_split && range.len() >= ZERO_SCAN_BYTES_MIN {
        find_zeroes(&data, &range, &mut holes);
    }
    let answer = if !connection.structured {
        let head = SimpleReply { magic: SIMPLE_REPLY_MAGIC.into(), error: 0.into(), cookie: command.cookie };
        Answer::data(&head, data, range)
    } else if holes.is_empty() {
        Answer::data(&data_chunk(&command, command.offset, range.len(), chunk::DONE), data, range)
    } else {
        chunks(&command, data, range, &holes)
    };
    connection.outgoing.answer(request, Ok(()), answer, held);
}

fn data_chunk(command: &Command, offset: u64, length: usize, flags: u16) -> DataChunk {
    // A request is at most 32 MiB, so length + 8 fits.
    let header = ChunkHeader::new(chunk::OFFSET_DATA, flags, command.cookie, length as u32 + 8);
    DataChunk { header, offset: offset.into() }
}

/// Reads what the disk calls data; what it calls zero or hole is only noted, as ranges of `data`.
async fn read_data_only(
    disk: &dyn block::Disk,
    first: Sector,
    data: &mut Pooled,
    holes: &mut Vec<Range<usize>>,
) -> Result<(), DiskError> {
    let sectors = data.len() as u64 / SECTOR_BYTES;
    let mut extents = Extents::with_limit(ASK_STATUS_EXTENTS);
    if disk.status(first, sectors, None, &mut extents).await.is_err() {
        extents.clear(); // a disk that cannot tell is read
    }
    let mut done = 0; // bytes of `data` that are settled: known holes, or read
    for extent in extents.iter().filter(|extent| extent.kind != Kind::Data) {
        let from = ((extent.at.0 - first.0) * SECTOR_BYTES) as usize;
        let to = (from + (extent.count * SECTOR_BYTES) as usize).min(data.len());
        if to - from < HOLE_BYTES_MIN {
            continue;
        }
        if from > done {
            let at = first.plus(done as u64 / SECTOR_BYTES);
            disk.read(at, &SegmentsMut::new(&mut data[done..from])).await?;
        }
        holes.push(from..to);
        done = to;
    }
    if done < data.len() {
        let at = first.plus(done as u64 / SECTOR_BYTES);
        disk.read(at, &SegmentsMut::new(&mut data[done..])).await?;
    }
    Ok(())
}

/// Adds the runs of zeroes in what was read to the holes that are known (in order, their bytes never read), and
/// clips everything to `range`.
fn find_zeroes(data: &Pooled, range: &Range<usize>, holes: &mut Vec<Range<usize>>) {
    let known = std::mem::take(holes);
    let mut at = range.start;
    for hole in known.into_iter().chain(std::iter::once(range.end..range.end)) {
        let hole = hole.start.clamp(at, range.end)..hole.end.clamp(at, range.end);
        find_zeroes_between(data, at..hole.start, holes);
        at = hole.end;
        if !hole.is_empty() {
            holes.push(hole);
        }
    }
}

/// The runs of zeroes in one stretch that was read.
fn find_zeroes_between(data: &Pooled, stretch: Range<usize>, holes: &mut Vec<Range<usize>>) {
    let (mut run, mut at) = (stretch.start, stretch.start);
    while at < stretch.end {
        let to = (at + ZERO_UNIT - at % ZERO_UNIT).min(stretch.end);
        if !lane::memory::is_zero(&data[at..to]) {
            if at - run >= HOLE_BYTES_MIN {
                holes.push(run..at);
            }
            run = to;
        }
        at = to;
    }
    if at - run >= HOLE_BYTES_MIN {
        holes.push(run..at);
    }
}

/// An answer of data and holes.
fn chunks(command: &Command, data: Pooled, range: Range<usize>, holes: &[Range<usize>]) -> Answer {
    let (mut heads, mut pieces) = (Vec::new(), Vec::new());
    let offset_of = |place: usize| command.offset + (place - range.start) as u64;
    let mut head = |bytes: &[u8]| {
        heads.extend(bytes);
        Piece::Head(heads.len() - bytes.len()..heads.len())
    };
    let mut done = range.start;
    for hole in holes {
        if hole.start > done {
            let part = data_chunk(command, offset_of(done), hole.start - done, 0);
            pieces.push(head(part.as_bytes()));
            pieces.push(Piece::Data(done..hole.start));
        }
        let last = if hole.end == range.end { chunk::DONE } else { 0 };
        let part = HoleChunk {
            header: ChunkHeader::new(chunk::OFFSET_HOLE, last, command.cookie, 12),
            offset: offset_of(hole.start).into(),
            bytes: (hole.len() as u32).into(),
        };
        pieces.push(head(part.as_bytes()));
        done = hole.end;
    }
    if done < range.end {
        let part = data_chunk(command, offset_of(done), range.end - done, chunk::DONE);
        pieces.push(head(part.as_bytes()));
        pieces.push(Piece::Data(done..range.end));
    }
    Answer::chunks(heads, pieces, data)
}

/// Success of a request that moves no data to the client.
fn succeed(connection: &Connection, request: Request, command: &Command, held: Held) {
    let answer = if connection.structured && command.kind == command::READ {
        Answer::head(&ChunkHeader::new(chunk::NONE, chunk::DONE, command.cookie, 0))
    } else {
        let magic = SIMPLE_REPLY_MAGIC.into();
        Answer::head(&SimpleReply { magic, error: 0.into(), cookie: command.cookie })
    };
    connection.outgoing.answer(request, Ok(()), answer, held);
}

/// The disk refused.
fn fail(connection: &Connection, request: Request, command: &Command, error: &DiskError, held: Held) {
    let number = errno(error, request.operation());
    refuse(connection, request, command, number, &error.to_string(), Some(error), held);
}

/// Tells the client an error.
fn refuse(
    connection: &Connection,
    request: Request,
    command: &Command,
    number: Errno,
    why: &str,
    error: Option<&DiskError>,
    held: Held,
) {
    let answer = if connection.structured {
        let message = &why.as_bytes()[..why.floor_char_boundary(MESSAGE_BYTES_MAX)];
        let length = message.len() as u16;
        let header = ChunkHeader {
            magic: CHUNK_MAGIC.into(),
            flags: chunk::DONE.into(),
            kind: chunk::ERROR.into(),
            cookie: command.cookie,
            length: (u32::from(length) + 6).into(),
        };
        let head = ErrorChunk { header, error: (number as u32).into(), message_length: length.into() };
        Answer::bytes(&head, message.to_vec())
    } else {
        let magic = SIMPLE_REPLY_MAGIC.into();
        Answer::head(&SimpleReply { magic, error: (number as u32).into(), cookie: command.cookie })
    };
    connection.outgoing.answer(request, Err(error.unwrap_or(&DiskError::OutOfRange)), answer, held);
}
