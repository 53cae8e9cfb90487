//! Exports over iSCSI: who may use them, with what secret, that they come back, and that reservations hold on every
//! front end and outlive the daemon.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Output, Stdio};

use front::iscsi::format::{HEADER_BYTES, LoginRequest, ScsiCommand, length_field, padding};
use front::iscsi::{flag, opcode, stage};
use zerocopy::IntoBytes;

use crate::common::wire::try_write;
use crate::common::{Place, both, has, until};

const HOST: &str = "iqn.1993-08.org.debian:01:host";
const OTHER: &str = "iqn.1993-08.org.debian:01:other";
const KEY: u64 = 0x6b61_6761_6d69_0001;

fn run(program: &str, words: &[&str]) -> Output {
    Command::new("timeout").arg("60").arg(program).args(words).stdin(Stdio::null()).output().unwrap()
}

/// A home with a LUN, whose daemon serves iSCSI on a port that stays the same.
fn place(name: &str) -> Place {
    let place = Place::new(name);
    place.ok(&["pool", "create", "p1", "--size", "1G"]);
    place.ok(&["lun", "create", "data", "--size", "64M"]);
    let text =
        place.refuses(5, "KGM-EXP-0005", &["export", "start", "data", "--as", "iscsi", "--initiator", HOST]);
    assert!(text.contains("--iscsi"), "{text}");
    place.ok(&["serve", "--stop"]);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let config = format!("[iscsi]\nportals = [\"127.0.0.1:{port}\"]\n");
    std::fs::write(place.home().join("kagami.toml"), config).unwrap();
    place
}

fn uri(place: &Place, name: &str) -> String {
    let exports = place.json(&["export", "ls"]);
    let export = exports.as_array().unwrap().iter().find(|e| e["name"] == name).unwrap().clone();
    assert_eq!((&export["state"], &export["protocol"]), (&"serving".into(), &"iscsi".into()));
    export["uris"][0].as_str().unwrap().to_owned()
}

#[test]
fn an_iscsi_export_is_for_who_is_named_and_comes_back() {
    if !has("iscsi-inq") {
        return;
    }
    let place = place("iscsi");
    place.refuses(5, "KGM-EXP-0005", &["export", "start", "data", "--as", "iscsi"]);
    place.fails(2, &["export", "start", "data", "--as", "iscsi", "--initiator", "nonsense"]);
    place.fails(2, &["export", "start", "data", "--initiator", HOST]);
    let secrets = place.dir().join("chap");
    std::fs::write(&secrets, "user secretsecret1\ntarget secretsecret2\n").unwrap();
    let words = ["export", "start", "data", "--as", "iscsi", "--initiator", HOST, "--chap"];
    place.ok(&[&words[..], &[secrets.to_str().unwrap()]].concat());
    let url = uri(&place, "data");
    assert!(url.ends_with("/iqn.2026-01.kagami:data/0"), "{url}");
    let known = url.replace("iscsi://", "iscsi://user%secretsecret1@");
    let served = |url: &str, host| run("iscsi-inq", &["-i", host, url]);
    let out = served(&known, HOST);
    assert!(out.status.success(), "{}", both(&out));
    assert!(!served(&url, HOST).status.success(), "without the secret");
    assert!(!served(&known, OTHER).status.success(), "from elsewhere");
    let view = place.ok(&["export", "ls", "-o", "json"]);
    assert!(!view.contains("secretsecret"), "no secret is shown");

    // Sharing is declared by both, or it is not.
    let text = place.refuses(5, "KGM-EXP-0008", &["export", "start", "data", "--name", "again"]);
    assert!(text.contains("\"data\""), "{text}");

    place.kill_daemon();
    assert_eq!(uri(&place, "data"), url, "it is back");
    let out = served(&known, HOST);
    assert!(out.status.success(), "{}", both(&out));
    place.ok(&["export", "stop", "data", "--yes"]);
    assert!(!served(&known, HOST).status.success());
}

/// An initiator without a library: logs in, sends one command at a time.
struct Initiator {
    stream: TcpStream,
    cmd_sn: u32,
}

impl Initiator {
    fn connect(url: &str, name: &str) -> Self {
        let rest = url.strip_prefix("iscsi://").unwrap();
        let (address, target) = rest.split_once('/').unwrap();
        let mut initiator = Self { stream: TcpStream::connect(address).unwrap(), cmd_sn: 1 };
        let head = LoginRequest {
            opcode: opcode::LOGIN | opcode::IMMEDIATE,
            flags: flag::TRANSIT | stage::OPERATIONAL << 2 | stage::FULL_FEATURE,
            isid: [0x80, 0, 0, 0, 0, 1],
            cmd_sn: 1.into(),
            ..LoginRequest::zeroed()
        };
        let target = target.strip_suffix("/0").unwrap();
        let text = format!("InitiatorName={name}\0TargetName={target}\0");
        let (answer, _) = initiator.exchange(head.as_bytes(), text.as_bytes());
        assert_eq!(answer[36..38], [0, 0], "the login is accepted");
        initiator
    }

    fn exchange(&mut self, head: &[u8], data: &[u8]) -> ([u8; HEADER_BYTES], Vec<u8>) {
        let mut bytes = [head, data, &[0; 3][..padding(data.len())]].concat();
        bytes[5..8].copy_from_slice(&length_field(data.len()));
        self.stream.write_all(&bytes).unwrap();
        let mut head = [0; HEADER_BYTES];
        self.stream.read_exact(&mut head).unwrap();
        let length = usize::from(head[6]) << 8 | usize::from(head[7]);
        let mut data = vec![0; length + padding(length)];
        self.stream.read_exact(&mut data).unwrap();
        (head, data)
    }

    /// One command; unit attentions are passed over. Answers the status and the data.
    fn command(&mut self, cdb: &[u8], out: &[u8], into: u32) -> (u8, Vec<u8>) {
        loop {
            let mut head = ScsiCommand {
                opcode: opcode::SCSI_COMMAND,
                flags: flag::FINAL
                    | if out.is_empty() { 0 } else { flag::WRITE }
                    | if into > 0 { flag::READ } else { 0 },
                expected_length: (into + out.len() as u32).into(),
                tag: self.cmd_sn.into(),
                cmd_sn: self.cmd_sn.into(),
                ..ScsiCommand::zeroed()
            };
            head.cdb[..cdb.len()].copy_from_slice(cdb);
            self.cmd_sn += 1;
            let (answer, data) = self.exchange(head.as_bytes(), out);
            let attention = answer[3] == 2 && data.get(4).is_some_and(|key| key & 15 == 6);
            if !attention {
                return (answer[3], data);
            }
        }
    }

    fn write(&mut self) -> u8 {
        self.command(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[7; 512], 0).0
    }

    /// PERSISTENT RESERVE OUT of a service action, write exclusive - registrants only.
    fn reserve(&mut self, action: u8, key: u64, new_key: u64) -> u8 {
        let mut list = [key.to_be_bytes(), new_key.to_be_bytes(), [0; 8]].concat();
        list[20] = 0;
        self.command(&[0x5f, action, 5, 0, 0, 0, 0, 0, 24, 0], &list, 0).0
    }

    fn keys(&mut self) -> Vec<u64> {
        let (status, data) = self.command(&[0x5e, 0, 0, 0, 0, 0, 0, 1, 0, 0], &[], 256);
        assert_eq!(status, 0);
        let length = u32::from_be_bytes(data[4..8].try_into().unwrap()) as usize;
        data[8..8 + length].chunks(8).map(|key| u64::from_be_bytes(key.try_into().unwrap())).collect()
    }
}

#[test]
fn r52_a_reservation_outlives_the_daemon_and_holds_on_every_front_end() {
    const CONFLICT: u8 = 0x18;
    let place = place("iscsi-reserve");
    let shared = ["export", "start", "data", "--shared"];
    let iscsi = ["--name", "cluster", "--as", "iscsi", "--initiator", HOST, "--initiator", OTHER];
    place.ok(&[&shared[..], &iscsi].concat());
    place.ok(&[&shared[..], &["--name", "plain"]].concat());
    let url = uri(&place, "cluster");
    let mut host = Initiator::connect(&url, HOST);
    let mut other = Initiator::connect(&url, OTHER);
    assert_eq!((host.write(), other.write()), (0, 0));
    try_write(&place, "plain", &[1], 1).unwrap();
    assert_eq!(host.reserve(0, 0, KEY), 0, "register");
    assert_eq!(host.reserve(1, KEY, 0), 0, "reserve");
    assert_eq!((host.write(), other.write()), (0, CONFLICT));
    assert!(try_write(&place, "plain", &[1], 2).is_err(), "fenced off over NBD, too");

    place.kill_daemon();
    until("it serves", || {
        place.run(&["serve", "--status"]).status.success() || {
            place.run(&["export", "ls"]);
            false
        }
    });
    let mut host = Initiator::connect(&url, HOST);
    let mut other = Initiator::connect(&url, OTHER);
    assert_eq!(other.keys(), [KEY]);
    assert_eq!((host.write(), other.write()), (0, CONFLICT));
    assert!(try_write(&place, "plain", &[1], 3).is_err());
    assert_eq!(host.reserve(3, KEY, 0), 0, "clear");
    assert_eq!(other.write(), 0);
    try_write(&place, "plain", &[1], 4).unwrap();

    // Reservations that a newer program wrote are not guessed, and not written over.
    assert_eq!(host.reserve(0, 0, KEY), 0, "register");
    place.ok(&["serve", "--stop"]);
    let files: Vec<_> =
        std::fs::read_dir(place.home().join("scsi")).unwrap().map(|e| e.unwrap().path()).collect();
    let [file] = &files[..] else { panic!("one logical unit: {files:?}") };
    let old = std::fs::read(file).unwrap();
    let mut newer = old.clone();
    newer[8..12].copy_from_slice(&2_u32.to_le_bytes());
    std::fs::write(file, &newer).unwrap();
    for export in place.json(&["export", "ls"]).as_array().unwrap() {
        let why = export["trouble"].as_str().unwrap();
        assert!(export["state"] == "down" && why.contains("a newer kagami wrote"), "{export}");
        assert!(why.contains("has version 2") && why.contains("up to 1"), "{export}");
    }
    place.ok(&["serve", "--stop"]);
    assert!(std::fs::read(file).unwrap() == newer, "left as it is");
    std::fs::write(file, &old).unwrap();
    assert_eq!(uri(&place, "cluster"), url);
    assert_eq!(Initiator::connect(&url, OTHER).keys(), [KEY]);
}
