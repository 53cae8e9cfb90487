//! The wire under fuzz: any bytes whatever, to a server and to a client. Used by the tests and by fuzz targets.

use std::rc::Rc;

use block::{Disk, Generation, MemoryDisk, Sector, Segments, SegmentsMut};

use super::client::{self, Client};
use super::ending::Ending;
use super::export::{Exports, NewExport};
use super::format::option;
use super::server::{Options, Server};
use crate::tls::Tls;
use crate::wire::Wire;

/// Sectors of the disk under fuzz: large enough for the largest request.
const SECTORS: u64 = (64 << 20) / 512;

/// What a good client sends before its first request, for an export named "d" with all that can be agreed.
fn good_handshake() -> Vec<u8> {
    let option = |number: u32, data: &[u8]| {
        let length = (data.len() as u32).to_be_bytes();
        [b"IHAVEOPT", &number.to_be_bytes()[..], &length, data].concat()
    };
    let contexts =
        [&b"\0\0\0\x01d\0\0\0\x02\0\0\0\x0fbase:allocation"[..], b"\0\0\0\x10kagami:changed:s"].concat();
    [
        vec![0, 0, 0, 3],
        option(option::STRUCTURED_REPLY, b""),
        option(option::SET_META_CONTEXT, &contexts),
        option(option::GO, b"\0\0\0\x01d\0\0"),
    ]
    .concat()
}

/// Feeds bytes to a server and to a client and insists that both come to an end by themselves, that no request is left
/// unanswered, and that a well-behaved client is still served afterwards.
///
/// The first byte chooses: even, the rest is what a client sends from its very first byte on; odd, it follows a good
/// handshake. Bit 1: the server's export is read-only. Bit 2: the rest goes to our client instead, as if a server
/// had sent it.
pub fn fuzz_nbd_wire(input: &[u8]) {
    let Some((choice, bytes)) = input.split_first() else { return };
    lane::block_on(async {
        if choice & 4 != 0 {
            to_client(bytes).await;
        } else {
            to_server(bytes, choice & 1 != 0, choice & 2 != 0).await;
        }
    });
}

async fn to_server(bytes: &[u8], after_handshake: bool, read_only: bool) {
    let exports = Exports::new();
    let generation = Generation { counter: 1, id: 1 };
    let new = NewExport {
        read_only,
        fast_zero: true,
        changed: vec![("s".into(), generation)],
        ..NewExport::new("d", Rc::new(MemoryDisk::new(SECTORS)))
    };
    let Ok(export) = exports.add(new) else { return };
    let server = Server::new(exports, Options::default());
    let ending = converse(&server, bytes, after_handshake).await;
    tracing::trace!(%ending, "fuzzed");
    assert_eq!(export.counts().in_flight(), 0, "every request was answered");
    assert!(server.connections().is_empty(), "the connection is off the list");
    // The next client is served as ever.
    let (near, far) = Wire::pair();
    drop(server.serve(far, "next".into(), &Tls::Off));
    let options = client::Options { export: "d".into(), ..client::Options::default() };
    match Client::connect(near, &options).await {
        Ok(client) => {
            let read = client.read(Sector(0), &SegmentsMut::new(&mut [0; 512])).await;
            assert!(read.is_ok(), "the next client reads");
            client.disconnect().await;
        }
        Err(refusal) => panic!("the next client was refused: {refusal}"),
    }
    server.close().await;
}

/// Sends everything, takes every answer, closes.
async fn converse(server: &Rc<Server>, bytes: &[u8], after_handshake: bool) -> Ending {
    let (near, far) = Wire::pair();
    let near = Rc::new(near);
    let serving = server.serve(far, "fuzz".into(), &Tls::Off);
    let drain = {
        let near = Rc::clone(&near);
        lane::spawn(async move {
            let mut sink = vec![0; 64 << 10];
            while near.receive(&SegmentsMut::new(&mut sink)).await.is_ok_and(|count| count > 0) {}
        })
    };
    // The server may have closed already.
    if after_handshake {
        let _ = near.send(&Segments::new(&good_handshake())).await;
    }
    let _ = near.send(&Segments::new(bytes)).await;
    near.finish().await;
    let ending = serving.await;
    drain.await;
    ending
}

async fn to_client(bytes: &[u8]) {
    let (near, far) = Wire::pair();
    let far = Rc::new(far);
    let server = {
        let (far, bytes) = (Rc::clone(&far), bytes.to_vec());
        lane::spawn(async move {
            let _ = far.send(&Segments::new(&bytes)).await;
            far.finish().await;
        })
    };
    let drain = lane::spawn(async move {
        let mut sink = vec![0; 64 << 10];
        while far.receive(&SegmentsMut::new(&mut sink)).await.is_ok_and(|count| count > 0) {}
    });
    let options = client::Options { export: "d".into(), ..client::Options::default() };
    if let Ok(client) = Client::connect(near, &options).await {
        let mut extents = block::Extents::with_limit(8);
        let end = client.shape().sectors.min(64);
        let mut data = vec![0; end as usize * 512];
        // Every answer is as good as any other; only an end must come.
        let _ = client.read(Sector(0), &SegmentsMut::new(&mut data)).await;
        let _ = client.status(Sector(0), end, None, &mut extents).await;
        let _ = client.flush().await;
        client.disconnect().await;
    }
    server.await;
    drain.await;
}
