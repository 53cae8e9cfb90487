//! What the tests share: a server with one export, and a client that sends single bytes.
#![allow(clippy::unwrap_used)] // a test may
#![allow(dead_code)] // no test uses all of it

pub mod certificates;
pub mod changing;

use std::rc::Rc;

use block::{Segments, SegmentsMut};
use front::nbd::format::{chunk, info, option, reply};
use front::nbd::{Exports, NewExport, Options, Server, Tls, Wire};

/// A server with one export.
pub fn serve(new: NewExport) -> Rc<Server> {
    let exports = Exports::new();
    exports.add(new).expect("the first of its name");
    Server::new(exports, Options::default())
}

/// A client that does what it is told, right or wrong.
pub struct Raw {
    pub wire: Rc<Wire>,
    pub flags: u16,
    pub structured: bool,
    pub received: usize,
}

impl Raw {
    /// Up to the client's flags.
    pub async fn greet(server: &Rc<Server>, flags: u32) -> Self {
        let (near, far) = Wire::pair();
        drop(server.serve(far, "raw".into(), &Tls::Off));
        let mut raw = Self { wire: Rc::new(near), flags: 0, structured: false, received: 0 };
        let greeting = raw.take(18).await;
        assert_eq!(greeting, b"NBDMAGICIHAVEOPT\0\x03");
        raw.send(&flags.to_be_bytes()).await;
        raw
    }

    /// Up to transmission.
    pub async fn go(server: &Rc<Server>, export: &str, structured: bool) -> Self {
        let mut raw = Self::greet(server, 3).await;
        if structured {
            raw.option(option::STRUCTURED_REPLY, &[]).await;
            assert_eq!(raw.reply().await.0, reply::ACK);
            raw.structured = true;
        }
        let data = [&(export.len() as u32).to_be_bytes()[..], export.as_bytes(), &[0, 0]].concat();
        raw.option(option::GO, &data).await;
        loop {
            match raw.reply().await {
                (reply::INFO, data) if data[..2] == info::EXPORT.to_be_bytes() => {
                    raw.flags = u16::from_be_bytes([data[10], data[11]]);
                }
                (reply::INFO, _) => {}
                (kind, _) => {
                    assert_eq!(kind, reply::ACK);
                    return raw;
                }
            }
        }
    }

    pub async fn send(&self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.wire.send(&Segments::new(bytes)).await.expect("the server receives");
        }
    }

    pub async fn take(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        let mut done = 0;
        while done < count {
            let got = self.wire.receive(&SegmentsMut::new(&mut bytes[done..])).await.expect("it answers");
            assert!(got > 0, "the server ended the connection");
            done += got;
        }
        self.received += count;
        bytes
    }

    /// Whether the server ends the connection.
    pub async fn ended(&mut self) -> bool {
        let mut sink = vec![0; 4096];
        loop {
            match self.wire.receive(&SegmentsMut::new(&mut sink)).await {
                Ok(0) | Err(_) => return true,
                Ok(_) => {}
            }
        }
    }

    pub async fn option(&self, number: u32, data: &[u8]) {
        let length = data.len() as u32;
        self.send(&[b"IHAVEOPT", &number.to_be_bytes()[..], &length.to_be_bytes(), data].concat()).await;
    }

    pub async fn reply(&mut self) -> (u32, Vec<u8>) {
        let header = self.take(20).await;
        let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
        let data = self.take(number(16) as usize).await;
        (number(12), data)
    }

    pub fn header(kind: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
        [
            &0x2560_9513u32.to_be_bytes()[..],
            &flags.to_be_bytes(),
            &kind.to_be_bytes(),
            &cookie.to_be_bytes(),
            &offset.to_be_bytes(),
            &length.to_be_bytes(),
        ]
        .concat()
    }

    pub async fn request(&self, kind: u16, flags: u16, cookie: u64, offset: u64, length: u32) {
        self.send(&Self::header(kind, flags, cookie, offset, length)).await;
    }

    /// Cookie and error of a simple reply.
    pub async fn simple(&mut self) -> (u64, u32) {
        let bytes = self.take(16).await;
        assert_eq!(bytes[..4], 0x6744_6698u32.to_be_bytes());
        let error = u32::from_be_bytes(bytes[4..8].try_into().unwrap());
        (u64::from_be_bytes(bytes[8..].try_into().unwrap()), error)
    }

    /// Kind, flags, cookie and payload of a chunk.
    pub async fn chunk(&mut self) -> (u16, u16, u64, Vec<u8>) {
        let bytes = self.take(20).await;
        assert_eq!(bytes[..4], 0x668e_33efu32.to_be_bytes());
        let short = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let cookie = u64::from_be_bytes(bytes[8..16].try_into().unwrap());
        let length = u32::from_be_bytes(bytes[16..].try_into().unwrap());
        let payload = self.take(length as usize).await;
        (short(6), short(4), cookie, payload)
    }

    pub async fn success(&mut self, cookie: u64) {
        assert_eq!(self.simple().await, (cookie, 0));
    }

    /// The error number with which a request is answered.
    pub async fn error(&mut self, cookie: u64) -> u32 {
        if !self.structured {
            let (found, error) = self.simple().await;
            assert_eq!(found, cookie);
            return error;
        }
        let (kind, flags, found, payload) = self.chunk().await;
        assert_eq!((kind, flags, found), (chunk::ERROR, chunk::DONE, cookie));
        u32::from_be_bytes(payload[..4].try_into().unwrap())
    }

    pub async fn read(&mut self, offset: u64, length: u32) -> Vec<u8> {
        self.request(0, 0, 77, offset, length).await;
        if !self.structured {
            self.success(77).await;
            return self.take(length as usize).await;
        }
        let mut data = vec![0xee; length as usize];
        let mut covered = 0;
        loop {
            let (kind, flags, cookie, payload) = self.chunk().await;
            assert_eq!(cookie, 77);
            let at = (u64::from_be_bytes(payload[..8].try_into().unwrap()) - offset) as usize;
            let count = match kind {
                chunk::OFFSET_DATA => {
                    data[at..at + payload.len() - 8].copy_from_slice(&payload[8..]);
                    payload.len() - 8
                }
                chunk::OFFSET_HOLE => {
                    let count = u32::from_be_bytes(payload[8..].try_into().unwrap()) as usize;
                    data[at..at + count].fill(0);
                    count
                }
                other => panic!("chunk {other}"),
            };
            covered += count;
            if flags & chunk::DONE != 0 {
                assert_eq!(covered, length as usize);
                return data;
            }
        }
    }
}
