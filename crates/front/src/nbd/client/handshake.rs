//! The client's half of the handshake.

use zerocopy::big_endian::{U16, U64};
use zerocopy::{FromBytes, IntoBytes};

use block::Segments;

use super::super::ending::Ending;
use super::super::format::{
    Greeting, HANDSHAKE_FIXED_NEWSTYLE, HANDSHAKE_NO_ZEROES, InfoBlockSize, InfoExport, NAME_BYTES_MAX,
    OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionHeader, OptionReplyHeader, REQUEST_BYTES_MAX, SERVER_MAGIC, info,
    option, reply,
};
use super::Agreed;
use crate::pool::Pool;
use crate::tls::{TlsWire, Trust};
use crate::wire::{Input, Wire};
use std::rc::Rc;

/// A reply to an option with more data than this is a broken server, in bytes.
const REPLY_BYTES_MAX: u32 = 64 << 10;
/// Replies to one option.
const REPLIES_MAX: u32 = 100_000;

/// Why there is no connection to an export.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The connection broke, or what came was no NBD.
    #[error("the server is not there or does not speak NBD: {0}")]
    Ending(#[from] Ending),
    /// The server does not speak the fixed newstyle handshake (it is older than 2013).
    #[error("the server does not speak the fixed newstyle handshake")]
    TooOld,
    /// The server refused an option.
    #[error("the server refused (error {kind:#x}): {message}")]
    Refused {
        /// The reply's number.
        kind: u32,
        /// What the server said about it.
        message: String,
    },
    /// A number that no server should send.
    #[error("the server sent a {0} that makes no sense")]
    Nonsense(&'static str),
}

async fn send(input: &Input, bytes: &[u8]) -> Result<(), Refusal> {
    input.wire().send(&Segments::new(bytes)).await.map_err(|error| Refusal::Ending(error.into()))
}

/// Takes `count` bytes.
async fn take(input: &mut Input, count: usize, what: &'static str) -> Result<Vec<u8>, Refusal> {
    if count > 0 && !input.fill(count, what).await.map_err(Ending::from)? {
        return Err(Ending::Hangup(what).into());
    }
    let bytes = input.ready()[..count].to_vec();
    input.used(count);
    Ok(bytes)
}

/// Takes a structure.
async fn structure<T: FromBytes>(input: &mut Input, what: &'static str) -> Result<T, Refusal> {
    let bytes = take(input, size_of::<T>(), what).await?;
    T::read_from_bytes(&bytes).map_err(|_| Refusal::Nonsense(what))
}

async fn greet(input: &mut Input) -> Result<u16, Refusal> {
    let greeting: Greeting = structure(input, "greeting").await?;
    for (found, expected) in [(greeting.magic, SERVER_MAGIC), (greeting.newstyle, OPTION_MAGIC)] {
        if found != expected {
            return Err(Ending::BadMagic { what: "a greeting", found: found.get() }.into());
        }
    }
    let offered = greeting.flags.get();
    if offered & HANDSHAKE_FIXED_NEWSTYLE == 0 {
        return Err(Refusal::TooOld);
    }
    let flags = offered & (HANDSHAKE_FIXED_NEWSTYLE | HANDSHAKE_NO_ZEROES);
    send(input, &u32::from(flags).to_be_bytes()).await?;
    Ok(flags)
}

async fn ask(input: &Input, number: u32, data: &[u8]) -> Result<(), Refusal> {
    let length = u32::try_from(data.len()).map_err(|_| Refusal::Nonsense("name"))?;
    let header = OptionHeader { magic: OPTION_MAGIC.into(), option: number.into(), length: length.into() };
    send(input, &[header.as_bytes(), data].concat()).await
}

/// One reply: its kind and data.
async fn answer(input: &mut Input, number: u32) -> Result<(u32, Vec<u8>), Refusal> {
    let header: OptionReplyHeader = structure(input, "reply").await?;
    if header.magic != OPTION_REPLY_MAGIC {
        return Err(Ending::BadMagic { what: "a reply", found: header.magic.get() }.into());
    }
    if header.option != number || header.length.get() > REPLY_BYTES_MAX {
        return Err(Refusal::Nonsense("reply"));
    }
    let data = take(input, header.length.get() as usize, "a reply").await?;
    Ok((header.kind.get(), data))
}

/// All replies up to the last; an error reply is an error.
async fn answers(input: &mut Input, number: u32) -> Result<Vec<(u32, Vec<u8>)>, Refusal> {
    let mut list = Vec::new();
    for _ in 0..REPLIES_MAX {
        match answer(input, number).await? {
            (reply::ACK, _) => return Ok(list),
            (kind, data) if kind & reply::ERROR != 0 => {
                let message = String::from_utf8_lossy(&data).into_owned();
                return Err(Refusal::Refused { kind, message });
            }
            other => list.push(other),
        }
    }
    Err(Refusal::Nonsense("number of replies"))
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

/// Talks the whole handshake for one export.
pub(super) async fn agree(
    input: &mut Input,
    export: &str,
    contexts: &[&str],
    tls: Option<&Trust>,
) -> Result<Agreed, Refusal> {
    if export.len() > NAME_BYTES_MAX {
        return Err(Refusal::Nonsense("name"));
    }
    let flags = greet(input).await?;
    if let Some(trust) = tls {
        start_tls(input, trust).await?;
    }
    let mut agreed = Agreed { maximum: REQUEST_BYTES_MAX, ..Agreed::default() };
    ask(input, option::STRUCTURED_REPLY, &[]).await?;
    agreed.structured = match answers(input, option::STRUCTURED_REPLY).await {
        Ok(_) => true,
        Err(Refusal::Refused { .. }) => false,
        Err(other) => return Err(other),
    };
    if agreed.structured {
        agreed.contexts = select_contexts(input, export, contexts).await?;
    }
    let data = [&string(export)[..], &[0, 1], &info::BLOCK_SIZE.to_be_bytes()].concat();
    ask(input, option::GO, &data).await?;
    match answers(input, option::GO).await {
        Ok(list) => take_infos(&mut agreed, &list)?,
        Err(Refusal::Refused { kind: reply::ERR_UNSUP, .. }) => {
            old_go(input, export, flags & HANDSHAKE_NO_ZEROES == 0, &mut agreed).await?;
        }
        Err(other) => return Err(other),
    }
    Ok(agreed)
}

/// Goes on encrypted, or not at all.
async fn start_tls(input: &mut Input, trust: &Trust) -> Result<(), Refusal> {
    ask(input, option::STARTTLS, &[]).await?;
    answers(input, option::STARTTLS).await?;
    if !input.ready().is_empty() {
        return Err(Ending::Injected.into());
    }
    let under = Rc::clone(input.wire());
    let wire = TlsWire::connect(under, trust).await.map_err(Ending::from)?;
    *input = Input::new(Rc::new(Wire::Tls(Box::new(wire))), Pool::new(0).take(REPLY_BYTES_MAX as usize));
    Ok(())
}

async fn select_contexts(
    input: &mut Input,
    export: &str,
    contexts: &[&str],
) -> Result<Vec<(u32, String)>, Refusal> {
    let mut data = string(export);
    data.extend((contexts.len() as u32 + 1).to_be_bytes());
    for context in ["base:allocation"].iter().chain(contexts) {
        data.extend(string(context));
    }
    ask(input, option::SET_META_CONTEXT, &data).await?;
    let list = match answers(input, option::SET_META_CONTEXT).await {
        Ok(list) => list,
        Err(Refusal::Refused { .. }) => return Ok(Vec::new()),
        Err(other) => return Err(other),
    };
    let mut selected = Vec::new();
    for (_, data) in list.iter().filter(|(kind, _)| *kind == reply::META_CONTEXT) {
        let (id, name) = data.split_first_chunk().ok_or(Refusal::Nonsense("context"))?;
        let name = std::str::from_utf8(name).map_err(|_| Refusal::Nonsense("context"))?;
        selected.push((u32::from_be_bytes(*id), name.to_string()));
    }
    Ok(selected)
}

fn take_infos(agreed: &mut Agreed, list: &[(u32, Vec<u8>)]) -> Result<(), Refusal> {
    let mut found = false;
    for (_, data) in list.iter().filter(|(kind, _)| *kind == reply::INFO) {
        if let Ok(export) = InfoExport::read_from_bytes(data)
            && export.kind == info::EXPORT
        {
            (agreed.bytes, agreed.flags, found) = (export.bytes.get(), export.flags.get(), true);
        } else if let Ok(sizes) = InfoBlockSize::read_from_bytes(data)
            && sizes.kind == info::BLOCK_SIZE
        {
            // A smaller limit is heeded; a larger one does not make our buffers larger.
            agreed.maximum = sizes.maximum.get().min(REQUEST_BYTES_MAX) & !511;
            if agreed.maximum == 0 || sizes.minimum > 512 {
                return Err(Refusal::Nonsense("block size"));
            }
        }
    }
    if found { Ok(()) } else { Err(Refusal::Nonsense("answer without the export's size")) }
}

/// The old way to choose an export, for servers without GO.
async fn old_go(
    input: &mut Input,
    export: &str,
    has_zeroes: bool,
    agreed: &mut Agreed,
) -> Result<(), Refusal> {
    ask(input, option::EXPORT_NAME, export.as_bytes()).await?;
    agreed.bytes = structure::<U64>(input, "size").await?.get();
    agreed.flags = structure::<U16>(input, "flags").await?.get();
    if has_zeroes {
        take(input, 124, "zeroes").await?;
    }
    Ok(())
}

/// Names of the exports that a server lists, and their descriptions.
pub async fn list(wire: Wire, tls: Option<&Trust>) -> Result<Vec<(String, String)>, Refusal> {
    let mut input = Input::new(Rc::new(wire), Pool::new(0).take(REPLY_BYTES_MAX as usize));
    greet(&mut input).await?;
    if let Some(trust) = tls {
        start_tls(&mut input, trust).await?;
    }
    ask(&input, option::LIST, &[]).await?;
    let mut names = Vec::new();
    for (_, data) in answers(&mut input, option::LIST).await? {
        let (length, rest) = data.split_first_chunk().ok_or(Refusal::Nonsense("list"))?;
        let (name, description) =
            rest.split_at_checked(u32::from_be_bytes(*length) as usize).ok_or(Refusal::Nonsense("list"))?;
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        names.push((text(name), text(description)));
    }
    // Good-bye; the server need not answer.
    let _ = ask(&input, option::ABORT, &[]).await;
    Ok(names)
}
