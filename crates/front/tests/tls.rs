//! TLS between our own client and server over a connection in memory. Foreign clients are in `peers.rs`.

#![allow(clippy::unwrap_used)] // a test may

mod common;

use std::rc::Rc;
use std::time::Duration;

use block::{Disk, MemoryDisk, Safe, Sector, Segments, SegmentsMut, conformance};
use common::certificates::{Certificates, certificates};
use common::serve;
use front::nbd::client::{self, Client, Refusal};
use front::nbd::format::reply;
use front::nbd::{Ending, Exports, Identity, NewExport, Options, Server, Tls, Trust, Wire};

fn identity(made: &Certificates, clients: bool) -> Identity {
    let clients = clients.then_some(made.authority.as_bytes());
    Identity::from_pem(made.server.0.as_bytes(), made.server.1.as_bytes(), clients).unwrap()
}

fn trust(made: &Certificates, with_own: bool) -> Trust {
    let own = with_own.then_some((made.client.0.as_bytes(), made.client.1.as_bytes()));
    Trust::from_pem(made.authority.as_bytes(), "localhost", own).unwrap()
}

async fn connect(server: &Rc<Server>, tls: &Tls, trust: Option<Trust>) -> Result<Rc<Client>, Refusal> {
    let (near, far) = Wire::pair();
    drop(server.serve(far, "test".into(), tls));
    let options = client::Options { export: "d".into(), tls: trust, ..client::Options::default() };
    Client::connect(near, &options).await
}

#[test]
fn a_disk_over_tls_is_a_disk() {
    lane::block_on(async {
        let made = certificates();
        let server = serve(NewExport::new("d", Rc::new(MemoryDisk::new(65536))));
        for clients in [false, true] {
            let tls = Tls::Required(identity(&made, clients));
            let client = connect(&server, &tls, Some(trust(&made, clients))).await.unwrap();
            assert!(server.connections().iter().all(|connection| connection.encrypted));
            conformance::check(Rc::clone(&client) as Rc<dyn Disk>, 3).await;
            // Longer than any buffer on the way, both ways at once.
            let bytes: Vec<u8> = (0..3_000_320u32).map(|n| (n % 249) as u8).collect();
            client.write(Sector(9), &Segments::new(&bytes), Safe::OnReturn).await.unwrap();
            let mut tasks = Vec::new();
            for n in 0..4 {
                let (client, bytes) = (Rc::clone(&client), bytes.clone());
                tasks.push(lane::spawn(async move {
                    let mut back = vec![0; bytes.len()];
                    client.read(Sector(9), &SegmentsMut::new(&mut back)).await.unwrap();
                    assert!(back == bytes);
                    let at = Sector(10_000 + n * 10_000);
                    client.write(at, &Segments::new(&bytes), Safe::AtNextFlush).await.unwrap();
                }));
            }
            for task in tasks {
                task.await;
            }
            client.disconnect().await;
        }
        server.close().await;
    });
}

#[test]
fn whoever_is_not_trusted_does_not_get_in() {
    lane::block_on(async {
        let (made, other) = (certificates(), certificates());
        let server = serve(NewExport::new("d", Rc::new(MemoryDisk::new(8))));
        let open = identity(&made, false);
        let refused = connect(&server, &Tls::Required(open.clone()), None).await;
        // Without TLS the option is not understood, and then the connection is of no use.
        assert!(matches!(refused, Err(Refusal::Refused { kind: reply::ERR_TLS_REQD, .. })));
        let refused = connect(&server, &Tls::Off, Some(trust(&made, false))).await;
        assert!(matches!(refused, Err(Refusal::Refused { kind: reply::ERR_UNSUP, .. })));
        let refused = connect(&server, &Tls::Required(open.clone()), Some(trust(&other, false))).await;
        assert!(matches!(refused, Err(Refusal::Ending(_))), "a server of another authority");
        let closed = Tls::Required(identity(&made, true));
        for own in [trust(&made, false), trust(&other, true)] {
            // The client learns it with the first answer that does not come.
            assert!(connect(&server, &closed, Some(own)).await.is_err());
        }
        let optional = Tls::Optional(open);
        connect(&server, &optional, None).await.unwrap().disconnect().await;
        connect(&server, &optional, Some(trust(&made, false))).await.unwrap().disconnect().await;
        server.close().await;
    });
}

#[test]
fn hostile_bytes_instead_of_tls_end_the_connection() {
    lane::block_on(async {
        let made = certificates();
        let exports = Exports::new();
        exports.add(NewExport::new("d", Rc::new(MemoryDisk::new(8)))).unwrap();
        let options = Options { handshake_time: Duration::from_millis(300), ..Options::default() };
        let server = Server::new(exports, options);
        let tls = Tls::Optional(identity(&made, false));
        let start = b"\0\0\0\x03IHAVEOPT\0\0\0\x05\0\0\0\0";
        let mut dice = fastrand::Rng::with_seed(9);
        let noise: Vec<u8> = (0..100_000).map(|_| dice.u8(..)).collect();
        for (after, injected) in
            [(&noise[..], true), (&noise[..], false), (b"", false), (b"\x16\x03\x01\x01\x00", false)]
        {
            let (near, far) = Wire::pair();
            let ending = server.serve(far, "hostile".into(), &tls);
            let mut sink = vec![0; 4096];
            near.receive(&SegmentsMut::new(&mut sink)).await.unwrap();
            if injected {
                near.send(&Segments::new(&[&start[..], after].concat())).await.unwrap();
            } else {
                near.send(&Segments::new(start)).await.unwrap();
                assert_eq!(near.receive(&SegmentsMut::new(&mut sink)).await.unwrap(), 20, "the ACK");
                let _ = near.send(&Segments::new(after)).await; // the server may be fed up half way
            }
            match ending.await {
                Ending::Injected => assert!(injected),
                Ending::Io(error) => assert!(after.len() > 10 && !injected, "{error}"),
                Ending::TimedOut => assert!(after.len() < 10),
                other => panic!("{other}"),
            }
        }
        server.close().await;
    });
}

#[test]
fn wrong_certificates_are_told_apart() {
    let made = certificates();
    let (chain, key) = (made.server.0.as_bytes(), made.server.1.as_bytes());
    assert!(Identity::from_pem(b"no pem", key, None).is_err());
    assert!(Identity::from_pem(chain, b"no key", None).is_err());
    assert!(Identity::from_pem(chain, made.client.1.as_bytes(), None).is_err(), "a key of another");
    assert!(Trust::from_pem(made.authority.as_bytes(), "no name at all", None).is_err());
}
