//! The handshake: fixed newstyle, options until the client has chosen an export.

use std::rc::Rc;

use block::{BLOCK_BYTES, Segments};
use zerocopy::{FromBytes, IntoBytes};

use super::ending::Ending;
use super::export::{Export, Exports, Stay};
use super::format::options::{self, Malformed};
use super::format::{
    Greeting, HANDSHAKE_FIXED_NEWSTYLE, HANDSHAKE_NO_ZEROES, InfoBlockSize, InfoExport, OPTION_BYTES_MAX,
    OPTION_BYTES_SKIPPED_MAX, OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionHeader, OptionReplyHeader,
    REQUEST_BYTES_MAX, SERVER_MAGIC, info, option, reply,
};
use super::status::{self, Selected};
use crate::pool::Pool;
use crate::tls::{Tls, TlsWire};
use crate::wire::{Input, Tether, Wire};

/// Options that one client may send.
const OPTIONS_MAX: u32 = 1000;
/// Bytes of the receive buffer during the handshake: the longest option fits.
const INPUT_BYTES: usize = OPTION_BYTES_MAX as usize;

/// What was agreed.
pub(crate) struct Agreed {
    /// Received and not used yet: a client need not wait for the last reply.
    pub input: Input,
    /// The stay on the export that was chosen.
    pub stay: Stay,
    /// Structured replies.
    pub structured: bool,
    /// Metadata contexts.
    pub contexts: Vec<Selected>,
}

/// What goes on after an option.
enum Next {
    Option,
    Go(Stay),
    End,
}

struct Handshake<'a> {
    /// The socket itself, by which the export can cut the client off.
    link: &'a Rc<Tether>,
    input: Input,
    exports: &'a Exports,
    pool: &'a Rc<Pool>,
    tls: &'a Tls,
    no_zeroes: bool,
    fixed: bool,
    structured: bool,
    /// Contexts, and the name of the export for which they were selected.
    contexts: (String, Vec<Selected>),
}

/// Talks to a client until it has chosen an export (`Some`) or gone without one (`None`).
pub(crate) async fn negotiate(
    link: &Rc<Tether>,
    exports: &Exports,
    pool: &Rc<Pool>,
    tls: &Tls,
) -> Result<Option<Agreed>, Ending> {
    let input = Input::new(Rc::clone(link.wire()), pool.take(INPUT_BYTES));
    let mut handshake = Handshake {
        link,
        input,
        exports,
        pool,
        tls,
        no_zeroes: false,
        fixed: false,
        structured: false,
        contexts: Default::default(),
    };
    handshake.greet().await?;
    for _ in 0..OPTIONS_MAX {
        match handshake.option().await? {
            Next::Option => {}
            Next::End => return Ok(None),
            Next::Go(stay) => {
                let Handshake { input, structured, contexts: (name, contexts), .. } = handshake;
                // Contexts hold for the export for which they were selected and no other.
                let contexts = if name == stay.export().name() { contexts } else { Vec::new() };
                return Ok(Some(Agreed { input, stay, structured, contexts }));
            }
        }
    }
    Err(Ending::TooManyOptions)
}

impl Handshake<'_> {
    async fn send(&self, bytes: &[u8]) -> Result<(), Ending> {
        Ok(self.input.wire().send(&Segments::new(bytes)).await?)
    }

    async fn greet(&mut self) -> Result<(), Ending> {
        let offered = HANDSHAKE_FIXED_NEWSTYLE | HANDSHAKE_NO_ZEROES;
        let greeting =
            Greeting { magic: SERVER_MAGIC.into(), newstyle: OPTION_MAGIC.into(), flags: offered.into() };
        self.send(greeting.as_bytes()).await?;
        if !self.input.fill(4, "the client's flags").await? {
            return Err(Ending::Hangup("the client's flags"));
        }
        let mut flags = [0; 4];
        flags.copy_from_slice(&self.input.ready()[..4]);
        self.input.used(4);
        let flags = u32::from_be_bytes(flags);
        if flags & !u32::from(offered) != 0 {
            return Err(Ending::ClientFlags(flags));
        }
        self.fixed = flags & u32::from(HANDSHAKE_FIXED_NEWSTYLE) != 0;
        self.no_zeroes = flags & u32::from(HANDSHAKE_NO_ZEROES) != 0;
        Ok(())
    }

    /// Receives one option and answers it.
    async fn option(&mut self) -> Result<Next, Ending> {
        if !self.input.fill(size_of::<OptionHeader>(), "an option").await? {
            return Ok(Next::End);
        }
        let Ok((header, _)) = OptionHeader::read_from_prefix(self.input.ready()) else {
            return Err(Ending::Hangup("an option")); // cannot be: it was filled
        };
        if header.magic != OPTION_MAGIC {
            return Err(Ending::BadMagic { what: "an option", found: header.magic.get() });
        }
        self.input.used(size_of::<OptionHeader>());
        let (number, length) = (header.option.get(), header.length.get());
        if length > OPTION_BYTES_MAX {
            if length > OPTION_BYTES_SKIPPED_MAX || number == option::EXPORT_NAME || !self.fixed {
                return Err(Ending::OptionTooLong(length));
            }
            self.input.skip(length as usize, "an option's data").await?;
            return self.refuse(number, reply::ERR_TOO_BIG, "more data than any option needs").await;
        }
        if length > 0 && !self.input.fill(length as usize, "an option's data").await? {
            return Err(Ending::Hangup("an option's data"));
        }
        let data = self.input.ready()[..length as usize].to_vec();
        self.input.used(length as usize);
        if self.must_encrypt() && !matches!(number, option::STARTTLS | option::ABORT) {
            if number == option::EXPORT_NAME || !self.fixed {
                return Err(Ending::NoSuchExport);
            }
            return self.refuse(number, reply::ERR_TLS_REQD, "this server wants TLS first").await;
        }
        if number == option::EXPORT_NAME {
            return self.export_name(&data).await;
        }
        if !self.fixed {
            // Without fixed newstyle the client would not understand an option reply.
            return Err(Ending::NoSuchExport);
        }
        match number {
            option::ABORT => {
                // The client need not wait for the answer.
                let _ = self.reply(number, reply::ACK, &[]).await;
                Ok(Next::End)
            }
            option::LIST => self.list(&data).await,
            option::INFO | option::GO => self.info_or_go(number, &data).await,
            option::STARTTLS => self.start_tls(&data).await,
            option::STRUCTURED_REPLY => self.structured_reply(&data).await,
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(number, &data).await,
            _ => self.refuse(number, reply::ERR_UNSUP, "this server does not know that option").await,
        }
    }

    fn must_encrypt(&self) -> bool {
        matches!(self.tls, Tls::Required(_)) && !self.input.wire().is_encrypted()
    }

    /// Goes on encrypted. Nothing that was agreed before counts any more, and nothing that came before is taken.
    async fn start_tls(&mut self, data: &[u8]) -> Result<Next, Ending> {
        let Some(identity) = self.tls.identity() else {
            return self.refuse(option::STARTTLS, reply::ERR_UNSUP, "this server has no TLS").await;
        };
        if !data.is_empty() {
            return self.malformed(option::STARTTLS, Malformed::LeftOver).await;
        }
        if self.input.wire().is_encrypted() {
            return self.refuse(option::STARTTLS, reply::ERR_INVALID, "TLS is on already").await;
        }
        if !self.input.ready().is_empty() {
            return Err(Ending::Injected);
        }
        self.reply(option::STARTTLS, reply::ACK, &[]).await?;
        let wire = TlsWire::accept(Rc::clone(self.link.wire()), identity).await?;
        let wire = Rc::new(Wire::Tls(Box::new(wire)));
        self.input = Input::new(wire, self.pool.take(INPUT_BYTES));
        (self.structured, self.contexts) = (false, Default::default());
        Ok(Next::Option)
    }

    async fn reply(&self, number: u32, kind: u32, data: &[u8]) -> Result<(), Ending> {
        self.send(&reply_bytes(number, kind, data)).await
    }

    async fn refuse(&self, number: u32, kind: u32, why: &str) -> Result<Next, Ending> {
        self.reply(number, kind, why.as_bytes()).await?;
        Ok(Next::Option)
    }

    async fn malformed(&self, number: u32, why: Malformed) -> Result<Next, Ending> {
        self.refuse(number, reply::ERR_INVALID, &why.to_string()).await
    }

    async fn export_name(&mut self, data: &[u8]) -> Result<Next, Ending> {
        let name = options::export_name(data).map_err(|_| Ending::NoSuchExport)?;
        let export = self.exports.get(name).ok_or(Ending::NoSuchExport)?;
        let stay = export.enter(self.link).ok_or(Ending::NoSuchExport)?;
        let mut answer = info_export(&export, self.structured).as_bytes()[2..].to_vec();
        if !self.no_zeroes {
            answer.extend([0; 124]);
        }
        self.send(&answer).await?;
        Ok(Next::Go(stay))
    }

    async fn list(&mut self, data: &[u8]) -> Result<Next, Ending> {
        if !data.is_empty() {
            return self.malformed(option::LIST, Malformed::LeftOver).await;
        }
        for export in self.exports.all() {
            let (name, description) = (export.name().as_bytes(), export.description().as_bytes());
            let entry = [&(name.len() as u32).to_be_bytes()[..], name, description].concat();
            self.reply(option::LIST, reply::SERVER, &entry).await?;
        }
        self.reply(option::LIST, reply::ACK, &[]).await?;
        Ok(Next::Option)
    }

    async fn info_or_go(&mut self, number: u32, data: &[u8]) -> Result<Next, Ending> {
        let asked = match options::info_request(data) {
            Ok(asked) => asked,
            Err(why) => return self.malformed(number, why).await,
        };
        let Some(export) = self.exports.get(asked.name) else {
            return self.refuse(number, reply::ERR_UNKNOWN, "no export of that name").await;
        };
        let stay = match number {
            option::GO => match export.enter(self.link) {
                Some(stay) => Some(stay),
                None => return self.refuse(number, reply::ERR_SHUTDOWN, "the export is being removed").await,
            },
            _ => None,
        };
        let text = |kind: u16, text: &str| {
            reply_bytes(number, reply::INFO, &[&kind.to_be_bytes()[..], text.as_bytes()].concat())
        };
        let mut answer = reply_bytes(number, reply::INFO, info_export(&export, self.structured).as_bytes());
        if asked.wants_name {
            answer.extend(text(info::NAME, export.name()));
        }
        if asked.wants_description {
            answer.extend(text(info::DESCRIPTION, export.description()));
        }
        // Told whether or not it was asked for: a client that does not know it passes over it.
        let sizes = InfoBlockSize {
            kind: info::BLOCK_SIZE.into(),
            minimum: 1.into(),
            preferred: (BLOCK_BYTES as u32).into(),
            maximum: REQUEST_BYTES_MAX.into(),
        };
        answer.extend(reply_bytes(number, reply::INFO, sizes.as_bytes()));
        answer.extend(reply_bytes(number, reply::ACK, &[]));
        self.send(&answer).await?;
        Ok(stay.map_or(Next::Option, Next::Go))
    }

    async fn structured_reply(&mut self, data: &[u8]) -> Result<Next, Ending> {
        if !data.is_empty() {
            return self.malformed(option::STRUCTURED_REPLY, Malformed::LeftOver).await;
        }
        self.structured = true;
        self.reply(option::STRUCTURED_REPLY, reply::ACK, &[]).await?;
        Ok(Next::Option)
    }

    async fn meta_context(&mut self, number: u32, data: &[u8]) -> Result<Next, Ending> {
        if !self.structured {
            return self.refuse(number, reply::ERR_INVALID, "structured replies come first").await;
        }
        let asked = match options::context_request(data) {
            Ok(asked) => asked,
            Err(why) => return self.malformed(number, why).await,
        };
        let Some(export) = self.exports.get(asked.name) else {
            return self.refuse(number, reply::ERR_UNKNOWN, "no export of that name").await;
        };
        let context = |id: u32, name: &str| {
            reply_bytes(number, reply::META_CONTEXT, &[&id.to_be_bytes()[..], name.as_bytes()].concat())
        };
        let mut answer = Vec::new();
        if number == option::LIST_META_CONTEXT {
            for name in status::list(&export, &asked.queries) {
                answer.extend(context(0, &name));
            }
        } else {
            let selected = status::select(&export, &asked.queries);
            for Selected { id, name, .. } in &selected {
                answer.extend(context(*id, name));
            }
            self.contexts = (asked.name.to_string(), selected);
        }
        answer.extend(reply_bytes(number, reply::ACK, &[]));
        self.send(&answer).await?;
        Ok(Next::Option)
    }
}

/// A reply to an option, with its data.
fn reply_bytes(number: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let header = OptionReplyHeader {
        magic: OPTION_REPLY_MAGIC.into(),
        option: number.into(),
        kind: kind.into(),
        // Our own data: names of at most 4096 bytes and short texts.
        length: (data.len() as u32).into(),
    };
    [header.as_bytes(), data].concat()
}

fn info_export(export: &Export, structured: bool) -> InfoExport {
    InfoExport {
        kind: info::EXPORT.into(),
        bytes: export.disk().shape().bytes().into(),
        flags: export.flags(structured).into(),
    }
}
