//! The task that receives answers. A server is as foreign as a client: every number is checked.

use std::rc::Rc;

use zerocopy::FromBytes;

use super::super::ending::Ending;
use super::super::format::{CHUNK_MAGIC, ChunkHeader, SIMPLE_REPLY_MAGIC, SimpleReply, chunk, command};
use super::{Line, Waiting};
use crate::wire::Input;

/// Descriptors of one BLOCK_STATUS chunk, in bytes: no server sends more.
const STATUS_BYTES_MAX: usize = 4 << 20;
/// Error messages are shorter, in bytes.
const ERROR_BYTES_MAX: usize = 8192;

/// Receives answers until the connection ends, then lets everybody know.
pub(super) async fn receive(line: Rc<Line>, mut input: Input) {
    match answers(&line, &mut input).await {
        Ok(()) => tracing::debug!("the nbd server ended the connection"),
        Err(ending) => tracing::warn!(%ending, "the connection to the nbd server is lost"),
    }
    input.wire().shut();
    line.lost.set(true);
    line.answered.wake_all();
}

async fn answers(line: &Line, input: &mut Input) -> Result<(), Ending> {
    loop {
        if !input.fill(4, "an answer").await? {
            return Ok(());
        }
        let mut magic = [0; 4];
        magic.copy_from_slice(&input.ready()[..4]);
        match u32::from_be_bytes(magic) {
            SIMPLE_REPLY_MAGIC => simple(line, input).await?,
            CHUNK_MAGIC => structured(line, input).await?,
            other => return Err(Ending::BadMagic { what: "an answer", found: other.into() }),
        }
    }
}

fn nonsense(what: &str) -> Ending {
    Ending::Io(std::io::Error::new(std::io::ErrorKind::InvalidData, format!("a {what} that makes no sense")))
}

/// Takes the structure that begins here.
async fn structure<T: FromBytes>(input: &mut Input) -> Result<T, Ending> {
    if !input.fill(size_of::<T>(), "an answer").await? {
        return Err(Ending::Hangup("an answer"));
    }
    let bytes = &input.ready()[..size_of::<T>()];
    let value = T::read_from_bytes(bytes).map_err(|_| nonsense("header"))?;
    input.used(size_of::<T>());
    Ok(value)
}

/// Changes the request that an answer names.
fn with<T>(line: &Line, cookie: u64, change: impl FnOnce(&mut Waiting) -> T) -> Result<T, Ending> {
    let mut waiting = line.waiting.borrow_mut();
    let key = usize::try_from(cookie).map_err(|_| nonsense("cookie"))?;
    match waiting.get_mut(key) {
        Some(request) if !request.done => Ok(change(request)),
        _ => Err(nonsense("cookie")),
    }
}

fn finish(line: &Line, cookie: u64) -> Result<(), Ending> {
    with(line, cookie, |request| request.done = true)?;
    line.answered.wake_all();
    Ok(())
}

async fn simple(line: &Line, input: &mut Input) -> Result<(), Ending> {
    let reply: SimpleReply = structure(input).await?;
    let cookie = reply.cookie.get();
    let data = with(line, cookie, |request| {
        request.error = reply.error.get();
        if request.command == command::READ && request.error == 0 { request.data.take() } else { None }
    })?;
    if let Some(mut data) = data {
        input.payload(&mut data, size_of::<SimpleReply>()).await?;
        with(line, cookie, |request| {
            request.received = data.len() as u64;
            request.data = Some(data);
        })?;
    }
    finish(line, cookie)
}

async fn structured(line: &Line, input: &mut Input) -> Result<(), Ending> {
    let header: ChunkHeader = structure(input).await?;
    let (cookie, kind, length) = (header.cookie.get(), header.kind.get(), header.length.get() as usize);
    match kind {
        chunk::NONE if length == 0 => {}
        chunk::OFFSET_DATA if length > 8 => data(line, input, cookie, length - 8).await?,
        chunk::OFFSET_HOLE if length == 12 => hole(line, input, cookie).await?,
        chunk::BLOCK_STATUS if length > 4 && length % 8 == 4 && length <= STATUS_BYTES_MAX => {
            descriptors(line, input, cookie, length).await?;
        }
        kind if kind & chunk::ERROR_BIT != 0 && (6..=ERROR_BYTES_MAX).contains(&length) => {
            let bytes = take(input, length).await?;
            let number = bytes.first_chunk().map_or(5, |number| u32::from_be_bytes(*number));
            let message = String::from_utf8_lossy(&bytes[6..]).into_owned();
            tracing::debug!(number, message, "the nbd server reports an error");
            with(line, cookie, |request| request.error = if number == 0 { 5 } else { number })?;
        }
        _ => return Err(nonsense("chunk")),
    }
    if header.flags.get() & chunk::DONE != 0 { finish(line, cookie) } else { Ok(()) }
}

async fn take(input: &mut Input, count: usize) -> Result<Vec<u8>, Ending> {
    let mut bytes = vec![0; count];
    input.payload(&mut bytes, 0).await?;
    Ok(bytes)
}

async fn offset(input: &mut Input) -> Result<u64, Ending> {
    Ok(structure::<zerocopy::big_endian::U64>(input).await?.get())
}

/// Where a part of a read belongs in its buffer.
fn place(request: &Waiting, offset: u64, length: usize) -> Option<std::ops::Range<usize>> {
    let from = usize::try_from(offset.checked_sub(request.offset)?).ok()?;
    let to = from.checked_add(length)?;
    (to <= request.data.as_ref()?.len()).then_some(from..to)
}

async fn data(line: &Line, input: &mut Input, cookie: u64, length: usize) -> Result<(), Ending> {
    let offset = offset(input).await?;
    let taken = with(line, cookie, |request| {
        let place = place(request, offset, length)?;
        Some((request.data.take()?, place))
    })?;
    let (mut buffer, place) = taken.ok_or_else(|| nonsense("place of data"))?;
    input.payload(&mut buffer[place], size_of::<ChunkHeader>() + 8).await?;
    with(line, cookie, |request| {
        request.received += length as u64;
        request.data = Some(buffer);
    })
}

async fn hole(line: &Line, input: &mut Input, cookie: u64) -> Result<(), Ending> {
    let offset = offset(input).await?;
    let length = structure::<zerocopy::big_endian::U32>(input).await?.get();
    let placed = with(line, cookie, |request| {
        let place = place(request, offset, length as usize)?;
        request.data.as_mut()?[place].fill(0);
        request.received += u64::from(length);
        Some(())
    })?;
    placed.ok_or_else(|| nonsense("place of a hole"))
}

async fn descriptors(line: &Line, input: &mut Input, cookie: u64, length: usize) -> Result<(), Ending> {
    let bytes = take(input, length).await?;
    let (numbers, _) = bytes.as_chunks::<4>();
    let mut numbers = numbers.iter().map(|number| u32::from_be_bytes(*number));
    let id = numbers.next().unwrap_or(0);
    let mut list = Vec::with_capacity(length / 8);
    while let (Some(length), Some(flags)) = (numbers.next(), numbers.next()) {
        list.push((length, flags));
    }
    with(line, cookie, |request| request.status.push((id, list)))
}
