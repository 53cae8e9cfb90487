//! vhost-user messages on a Unix socket, with the descriptors that come along.
//!
//! Bodies are the `vhost` crate's. Its own loop (`BackendReqHandler`) serves where a thread may wait; on a lane nothing may:
//! a front end may be slow, and the answer to GET_VRING_BASE must wait for requests under way. Nor can it tell the
//! front end that the configuration has changed.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use lane::ready::Watched;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use vhost::vhost_user::message::{FrontendReq, MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE, VhostUserMsgValidator};
use vm_memory::ByteValued;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Bits of [`Header::flags`].
mod flag {
    pub const VERSION_MASK: u32 = 3;
    pub const VERSION: u32 = 1;
    pub const REPLY: u32 = 4;
    pub const NEED_REPLY: u32 = 8;
}

/// Before every message; numbers are in the machine's own order.
#[derive(Copy, Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    request: u32,
    flags: u32,
    size: u32,
}

const _: () = assert!(size_of::<Header>() == 12);

/// Why a conversation ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    #[error("the front end went away in the middle of a message")]
    Hangup,
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    #[error("a message of version {version}, {bytes} bytes")]
    Header { version: u32, bytes: u32 },
    #[error("more descriptors than a message may have")]
    TooManyFiles,
    #[error("request {0} is unknown here")]
    Unknown(u32),
    #[error("{0:?} is damaged")]
    Damaged(FrontendReq),
    #[error("{0:?}: {1}")]
    Refused(FrontendReq, String),
}

/// What the front end says.
#[derive(Debug)]
pub(crate) struct Message {
    pub request: u32,
    pub needs_reply: bool,
    pub body: Vec<u8>,
    pub files: Vec<OwnedFd>,
}

impl Message {
    /// The request, if it is known.
    pub fn code(&self) -> Result<FrontendReq, Broken> {
        FrontendReq::try_from(self.request).map_err(|_| Broken::Unknown(self.request))
    }

    /// The body as a whole.
    pub fn body<T: ByteValued + Default + VhostUserMsgValidator>(&self) -> Result<T, Broken> {
        let (value, rest) = self.head()?;
        if rest.is_empty() { Ok(value) } else { Err(Broken::Damaged(self.code()?)) }
    }

    /// What the body begins with, and the rest.
    pub fn head<T: ByteValued + Default + VhostUserMsgValidator>(&self) -> Result<(T, &[u8]), Broken> {
        let damaged = Broken::Damaged(self.code()?);
        let Some((first, rest)) = self.body.split_at_checked(size_of::<T>()) else { return Err(damaged) };
        let mut value = T::default();
        value.as_mut_slice().copy_from_slice(first);
        if value.is_valid() { Ok((value, rest)) } else { Err(damaged) }
    }
}

/// A socket that carries messages.
pub(crate) struct Channel(Watched);

impl Channel {
    pub fn new(socket: OwnedFd) -> Self {
        Self(Watched::new(socket))
    }

    /// Ends both directions: whoever waits here comes back.
    pub fn shut(&self) {
        // Fails when the other end has gone already.
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
    }

    /// The next message; `None` when the front end has closed between two.
    pub async fn receive(&self) -> Result<Option<Message>, Broken> {
        let (mut header, mut files) = (Header::new_zeroed(), Vec::new());
        if !self.fill(header.as_mut_bytes(), &mut files).await? {
            return Ok(None);
        }
        let Header { request, flags, size } = header;
        let version = flags & flag::VERSION_MASK;
        if version != flag::VERSION || flags & flag::REPLY != 0 || size as usize > MAX_MSG_SIZE {
            return Err(Broken::Header { version, bytes: size });
        }
        let mut body = vec![0; size as usize];
        if !body.is_empty() && !self.fill(&mut body, &mut files).await? {
            return Err(Broken::Hangup);
        }
        Ok(Some(Message { request, needs_reply: flags & flag::NEED_REPLY != 0, body, files }))
    }

    /// Receives all of `into`; false when the other end has closed before the first byte.
    async fn fill(&self, into: &mut [u8], files: &mut Vec<OwnedFd>) -> Result<bool, Broken> {
        let mut done = 0;
        while done < into.len() {
            match self.receive_some(&mut into[done..], files) {
                Ok(0) if done == 0 => return Ok(false),
                Ok(0) => return Err(Broken::Hangup),
                Ok(count) => done += count,
                Err(Broken::Io(e)) if e.kind() == io::ErrorKind::WouldBlock => self.0.readable().await?,
                Err(Broken::Io(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn receive_some(&self, into: &mut [u8], files: &mut Vec<OwnedFd>) -> Result<usize, Broken> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_ATTACHED_FD_ENTRIES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let got = rustix::net::recvmsg(&self.0, &mut [IoSliceMut::new(into)], &mut control, flags)
            .map_err(io::Error::from)?;
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(list) = part {
                files.extend(list);
            }
        }
        if got.flags.contains(ReturnFlags::CTRUNC) || files.len() > MAX_ATTACHED_FD_ENTRIES {
            return Err(Broken::TooManyFiles);
        }
        Ok(got.bytes)
    }

    /// Answers a message.
    pub async fn reply(&self, to: &Message, body: &[u8], file: Option<BorrowedFd<'_>>) -> io::Result<()> {
        self.send(to.request, flag::VERSION | flag::REPLY, body, file).await
    }

    /// Tells the front end something of our own accord; nothing is answered.
    pub async fn tell(&self, request: u32) -> io::Result<()> {
        self.send(request, flag::VERSION, &[], None).await
    }

    async fn send(
        &self,
        request: u32,
        flags: u32,
        body: &[u8],
        file: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let header = Header { request, flags, size: u32::try_from(body.len()).map_err(io::Error::other)? };
        let whole = [header.as_bytes(), body].concat();
        let mut done = 0;
        while done < whole.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let files = file.map(|file| [file]);
            if let (0, Some(files)) = (done, &files) {
                control.push(SendAncillaryMessage::ScmRights(files));
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::sendmsg(&self.0, &[IoSlice::new(&whole[done..])], &mut control, flags) {
                Ok(count) => done += count,
                Err(rustix::io::Errno::AGAIN) => self.0.writable().await?,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
