//! Serves one file or block device by iSCSI, for measuring and for conformance suites:
//! `iscsi_file FILE ADDRESS:PORT... [--chap NAME:SECRET] [--mutual NAME:SECRET] [--sanitize]`.
//!
//! The target is `iqn.2024-01.kagami:file`, LUN 1, open to every initiator. Reservations are kept as long as the
//! program runs. Prints what carries the I/O and the portals, then serves until it is killed.

use std::collections::BTreeMap;
use std::error::Error;
use std::rc::Rc;

use front::iscsi::{Access, Chap, Credentials, Name, NewTarget, Options, Portal, Server, Targets, Who};
use lane::net::Listener;
use scsi::{Identity, Keep, LogicalUnit, LunMap, Port, Settings};

const TARGET: &str = "iqn.2024-01.kagami:file";
const GROUP: u16 = 1;
const LUN: u16 = 1;
const ATOMIC_BLOCKS: u16 = 256;

/// Keeps nothing: reservations end with the program.
struct Forgetful;

impl Keep for Forgetful {
    fn save<'a>(&'a self, _record: &'a [u8]) -> block::Io<'a> {
        Box::pin(async { Ok(()) })
    }
}

struct Arguments {
    file: String,
    portals: Vec<String>,
    chap: Option<Credentials>,
    mutual: Option<Credentials>,
    sanitize: bool,
}

fn arguments() -> Result<Arguments, Box<dyn Error>> {
    let usage =
        "usage: iscsi_file FILE ADDRESS:PORT... [--chap NAME:SECRET] [--mutual NAME:SECRET] [--sanitize]";
    let mut list = std::env::args().skip(1);
    let mut plain = Vec::new();
    let (mut chap, mut mutual, mut sanitize) = (None, None, false);
    while let Some(argument) = list.next() {
        let credentials = |text: Option<String>| {
            let text = text.ok_or(usage)?;
            let (name, secret) = text.split_once(':').ok_or(usage)?;
            Ok::<_, Box<dyn Error>>(Credentials::new(name, secret)?)
        };
        match argument.as_str() {
            "--chap" => chap = Some(credentials(list.next())?),
            "--mutual" => mutual = Some(credentials(list.next())?),
            "--sanitize" => sanitize = true,
            _ => plain.push(argument),
        }
    }
    if plain.len() < 2 {
        return Err(usage.into());
    }
    let file = plain.remove(0);
    Ok(Arguments { file, portals: plain, chap, mutual, sanitize })
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = arguments()?;
    lane::block_on(async {
        let disk = media::open(&arguments.file, media::Options::default()).await?;
        println!("{}", disk.in_use());
        let uuid = uuid::Uuid::from_u128(0x6b61_6761_6d69_4000_8000_0000_0000_0001);
        let mut naa = *uuid.as_bytes();
        naa[..4].copy_from_slice(&[0x60, 0x24, 0xb4, 0x70]);
        let settings =
            Settings { sanitize: arguments.sanitize, atomic_blocks: ATOMIC_BLOCKS, ..Settings::default() };
        let unit = LogicalUnit::new(disk, Identity::lun(uuid, naa), settings, Rc::new(Forgetful), &[])?;
        let luns = LunMap::new(Rc::new(Port {
            relative: 1,
            name: format!("{TARGET},t,0x{GROUP:04x}"),
            device_name: TARGET.into(),
            group: 1,
        }));
        luns.add(LUN, unit);
        let chap = arguments.chap.map(|chap| Chap::new(chap, arguments.mutual)).transpose()?;
        let targets = Targets::new();
        targets.add(NewTarget {
            name: Name::new(TARGET)?,
            alias: String::new(),
            groups: vec![GROUP],
            access: vec![(Who::Anyone, Access { luns: BTreeMap::from([(GROUP, luns)]), chap })],
        })?;
        let server = Server::new(targets, Options::default());
        for portal in &arguments.portals {
            let listener = Listener::tcp(portal.parse()?)?;
            println!("iscsi://{}/{TARGET}/{LUN}", listener.local_address());
            server.listen(Portal { listener, group: GROUP, announce: None });
        }
        std::future::pending::<()>().await;
        Ok(())
    })
}
