//! Login and full-feature phase under fuzz: any bytes whatever, to a server. Used by the tests and by fuzz targets.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use block::{MemoryDisk, Segments, SegmentsMut};
use scsi::{Identity, Keep, LogicalUnit, LunMap, Port, Settings};
use zerocopy::IntoBytes;

use super::chap::{Chap, Credentials};
use super::codes::{flag, opcode, stage};
use super::format::{HEADER_BYTES, LoginRequest, ScsiCommand, length_field, padding};
use super::name::Name;
use super::server::{Options, Server};
use super::target::{Access, NewTarget, Targets, Who};
use crate::wire::Wire;

/// Sectors of the disk under fuzz.
const SECTORS: u64 = 2048;
const GROUP: u16 = 1;
const OPEN: &str = "iqn.2024-01.kagami:open";
const LOCKED: &str = "iqn.2024-01.kagami:locked";
const CLOSED: &str = "iqn.2024-01.kagami:closed";

struct Forgetful;

impl Keep for Forgetful {
    fn save<'a>(&'a self, _record: &'a [u8]) -> block::Io<'a> {
        Box::pin(async { Ok(()) })
    }
}

/// Three targets: for everybody, with CHAP, for nobody.
fn server() -> Option<Rc<Server>> {
    let targets = Targets::new();
    for (number, name) in [OPEN, LOCKED, CLOSED].into_iter().enumerate() {
        let identity = Identity::lun(uuid::Uuid::from_u128(number as u128 + 1), [number as u8; 16]);
        let disk = Rc::new(MemoryDisk::new(SECTORS));
        let settings = Settings { atomic_blocks: 8, sanitize: true, ..Settings::default() };
        let unit = LogicalUnit::new(disk, identity, settings, Rc::new(Forgetful), &[]).ok()?;
        let luns = LunMap::new(Rc::new(Port {
            relative: number as u16 + 1,
            name: format!("{name},t,0x{GROUP:04x}"),
            device_name: name.into(),
            group: 1,
        }));
        luns.add(0, unit);
        let chap = match name {
            LOCKED => {
                let one = |name, secret: &str| Credentials::new(name, secret).ok();
                Some(Chap::new(one("user", "secretsecret1")?, one("target", "secretsecret2")).ok()?)
            }
            _ => None,
        };
        let rule = (Who::Anyone, Access { luns: BTreeMap::from([(GROUP, luns)]), chap });
        let access = if name == CLOSED { Vec::new() } else { vec![rule] };
        let name = Name::new(name).ok()?;
        targets.add(NewTarget { name, alias: String::new(), groups: vec![GROUP], access }).ok()?;
    }
    let short = Duration::from_secs(1);
    Some(Server::new(targets, Options { logout_time: short, linger: short, ..Options::default() }))
}

/// A PDU of a header and data, with padding.
fn pdu(head: impl IntoBytes + zerocopy::Immutable, data: &[u8]) -> Vec<u8> {
    let mut bytes = [head.as_bytes(), data, &[0; 3][..padding(data.len())]].concat();
    bytes[5..8].copy_from_slice(&length_field(data.len()));
    bytes
}

/// What a good initiator says to log in, in one step.
fn good_login(isid: u8, extra: &str) -> Vec<u8> {
    let head = LoginRequest {
        opcode: opcode::LOGIN | opcode::IMMEDIATE,
        flags: flag::TRANSIT | stage::OPERATIONAL << 2 | stage::FULL_FEATURE,
        isid: [0x80, 0, 0, 0, 0, isid],
        cmd_sn: 1.into(),
        ..LoginRequest::zeroed()
    };
    let text = format!("InitiatorName=iqn.2024-01.kagami:fuzz\0TargetName={OPEN}\0{extra}");
    pdu(head, text.as_bytes())
}

/// Takes from the front of what the fuzzer gave; zeroes when it is used up.
struct Source<'a>(&'a [u8]);

impl<'a> Source<'a> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }
}

/// Feeds a login to a server and insists that it comes to an end by itself and that a well-behaved initiator is
/// still served afterwards.
///
/// The first byte chooses: even, the rest is what the initiator sends; odd, it is made into login requests whose
/// lengths are right: flags, number of bytes of text, text, and so on.
pub fn fuzz_iscsi_login(input: &[u8]) {
    let mut source = Source(input);
    if source.byte() & 1 == 0 {
        return run(source.0);
    }
    let mut sent = Vec::new();
    while !source.0.is_empty() && sent.len() < 1 << 20 {
        let flags = source.byte();
        let length = usize::from(source.byte()) * 4;
        let head = LoginRequest {
            opcode: opcode::LOGIN | opcode::IMMEDIATE,
            flags,
            isid: [0x80, 0, 0, 0, 0, 1],
            cmd_sn: 1.into(),
            ..LoginRequest::zeroed()
        };
        sent.extend(pdu(head, source.bytes(length)));
    }
    run(&sent);
}

/// As [`fuzz_iscsi_login`], after a good login.
///
/// The first byte chooses: bit 0, PDUs are made whose lengths and numbers are right but for what the input says: code,
/// flags, a byte that is 255 for a wrong CmdSN, length of the data segment in words, 40 bytes of header, data; else
/// the rest is sent as it is. Bit 1: with digests (which then hardly ever match).
pub fn fuzz_iscsi_wire(input: &[u8]) {
    let mut source = Source(input);
    let choice = source.byte();
    let digests =
        if choice & 2 != 0 { "HeaderDigest=CRC32C\0DataDigest=CRC32C\0" } else { "InitialR2T=No\0" };
    let mut sent = good_login(1, digests);
    if choice & 1 == 0 {
        sent.extend(source.0);
        return run(&sent);
    }
    let mut cmd_sn = 1u32;
    while !source.0.is_empty() && sent.len() < 1 << 20 {
        let (code, flags, wrong) = (source.byte(), source.byte(), source.byte());
        let length = usize::from(source.byte()) * 4;
        let mut head = [0; HEADER_BYTES];
        (head[0], head[1]) = (code, flags);
        let rest = source.bytes(40);
        head[8..8 + rest.len()].copy_from_slice(rest);
        let numbered = code & opcode::IMMEDIATE == 0 && code & opcode::MASK != opcode::DATA_OUT;
        if numbered && wrong != 255 {
            head[24..28].copy_from_slice(&cmd_sn.to_be_bytes());
            cmd_sn = cmd_sn.wrapping_add(1);
        }
        sent.extend(pdu(head, source.bytes(length)));
    }
    run(&sent);
}

fn run(bytes: &[u8]) {
    lane::block_on(async {
        let Some(server) = server() else { panic!("the server under fuzz cannot be made") };
        converse(&server, bytes).await;
        for target in server.targets().all() {
            assert_eq!(target.counts().in_flight(), 0, "every command was answered or given up");
        }
        assert!(server.sessions().is_empty(), "the connection is off the list: {:?}", server.sessions());
        is_served(&server).await;
        server.close().await;
    });
}

/// Sends everything, takes every answer, closes.
async fn converse(server: &Rc<Server>, bytes: &[u8]) {
    let (near, far) = Wire::pair();
    let near = Rc::new(near);
    let serving = server.serve(far, "fuzz".into(), String::new(), GROUP);
    let drain = {
        let near = Rc::clone(&near);
        lane::spawn(async move {
            let mut sink = vec![0; 64 << 10];
            while near.receive(&SegmentsMut::new(&mut sink)).await.is_ok_and(|count| count > 0) {}
        })
    };
    let _ = near.send(&Segments::new(bytes)).await; // the server may have closed already
    near.finish().await;
    let ending = serving.await;
    tracing::trace!(%ending, "fuzzed");
    drain.await;
}

/// The next initiator logs in and has a command answered.
async fn is_served(server: &Rc<Server>) {
    let (near, far) = Wire::pair();
    let serving = server.serve(far, "next".into(), String::new(), GROUP);
    let command = ScsiCommand {
        opcode: opcode::SCSI_COMMAND,
        flags: flag::FINAL,
        tag: 7.into(),
        cmd_sn: 1.into(),
        ..ScsiCommand::zeroed() // TEST UNIT READY
    };
    let sent = [good_login(2, ""), pdu(command, &[])].concat();
    assert!(near.send(&Segments::new(&sent)).await.is_ok(), "the next initiator is listened to");
    let mut codes = Vec::new();
    while codes.len() < 2 {
        let mut head = [0; HEADER_BYTES];
        fill(&near, &mut head).await;
        let length = usize::from(head[6]) << 8 | usize::from(head[7]);
        let mut data = vec![0; length + padding(length)];
        fill(&near, &mut data).await;
        codes.push(head[0]);
    }
    assert_eq!(codes, [opcode::LOGIN_RESPONSE, opcode::SCSI_RESPONSE], "the next initiator is served");
    drop(near);
    serving.await;
}

async fn fill(wire: &Wire, into: &mut [u8]) {
    let mut done = 0;
    while done < into.len() {
        match wire.receive(&SegmentsMut::new(&mut into[done..])).await {
            Ok(count) if count > 0 => done += count,
            _ => panic!("the next initiator was hung up on"),
        }
    }
}
