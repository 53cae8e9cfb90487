//! An initiator that does what it is told, right or wrong: for what a real one cannot be made to do.
#![allow(dead_code)] // no test uses all of it

use std::rc::Rc;

use block::{Segments, SegmentsMut};
use front::iscsi::format::{
    DataOut, HEADER_BYTES, Header, LoginRequest, LoginResponse, NO_TAG, ScsiCommand, TaskManagement,
    length_field, padding,
};
use front::iscsi::{Ending, Server, flag, opcode, stage};
use front::nbd::Wire;
use lane::Task;
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub const NAME: &str = "iqn.2024-01.host:test";

/// A PDU as it came.
pub struct Pdu {
    pub head: [u8; HEADER_BYTES],
    pub data: Vec<u8>,
}

impl Pdu {
    pub fn view<T: FromBytes>(&self) -> T {
        T::read_from_bytes(&self.head).unwrap()
    }

    pub fn code(&self) -> u8 {
        self.head[0] & opcode::MASK
    }

    pub fn number(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.head[at..at + 4].try_into().unwrap())
    }

    /// Sense key, and code with its qualifier, of a SCSI Response.
    pub fn sense(&self) -> (u8, u16) {
        (self.data[4] & 15, u16::from_be_bytes([self.data[14], self.data[15]]))
    }
}

pub struct Initiator {
    wire: Wire,
    pub serving: Task<Ending>,
    pub cmd_sn: u32,
    pub isid: u8,
    header_digest: bool,
    data_digest: bool,
    /// The next digest is wrong: of a header, of data.
    pub spoil: (bool, bool),
}

impl Initiator {
    pub fn connect(server: &Rc<Server>, isid: u8) -> Self {
        let (near, far) = Wire::pair();
        let serving = server.serve(far, "test".into(), "192.0.2.1:3260".into(), super::target::GROUP);
        Self {
            wire: near,
            serving,
            cmd_sn: 1,
            isid,
            header_digest: false,
            data_digest: false,
            spoil: (false, false),
        }
    }

    pub async fn send(&mut self, head: &(impl IntoBytes + Immutable), data: &[u8]) {
        let mut bytes = head.as_bytes().to_vec();
        bytes[5..8].copy_from_slice(&length_field(data.len()));
        if self.header_digest {
            let wrong = u32::from(std::mem::take(&mut self.spoil.0));
            bytes.extend((crc32c::crc32c(&bytes) ^ wrong).to_le_bytes());
        }
        let padded = [data, &[0; 3][..padding(data.len())]].concat();
        bytes.extend(&padded);
        if self.data_digest && !data.is_empty() {
            let wrong = u32::from(std::mem::take(&mut self.spoil.1));
            bytes.extend((crc32c::crc32c(&padded) ^ wrong).to_le_bytes());
        }
        let _ = self.wire.send(&Segments::new(&bytes)).await; // the target may have closed
    }

    async fn take(&self, count: usize) -> Option<Vec<u8>> {
        let mut into = vec![0; count];
        let mut done = 0;
        while done < count {
            match self.wire.receive(&SegmentsMut::new(&mut into[done..])).await {
                Ok(0) | Err(_) => return None,
                Ok(more) => done += more,
            }
        }
        Some(into)
    }

    /// The next PDU; `None` when the target has closed. Digests are checked.
    pub async fn receive(&self) -> Option<Pdu> {
        let mut head = [0; HEADER_BYTES];
        head.copy_from_slice(&self.take(HEADER_BYTES).await?);
        if self.header_digest {
            assert_eq!(self.take(4).await?, crc32c::crc32c(&head).to_le_bytes());
        }
        let length = Header::read_from_bytes(&head).unwrap().data_bytes();
        let mut data = self.take(length + padding(length)).await?;
        if self.data_digest && length > 0 {
            assert_eq!(self.take(4).await?, crc32c::crc32c(&data).to_le_bytes());
        }
        data.truncate(length);
        Some(Pdu { head, data })
    }

    /// The next PDU, which must be of this kind.
    pub async fn expect(&self, code: u8) -> Pdu {
        let pdu = self.receive().await.expect("the target has closed");
        assert_eq!(pdu.code(), code, "{:02x?} {:02x?}", pdu.head, pdu.data);
        pdu
    }

    pub fn login_request(&self, flags: u8) -> LoginRequest {
        LoginRequest {
            opcode: opcode::LOGIN | opcode::IMMEDIATE,
            flags,
            isid: [0x80, 0, 0, 0, 0, self.isid],
            cmd_sn: self.cmd_sn.into(),
            ..LoginRequest::zeroed()
        }
    }

    /// Logs in to a target in one step; answers the status and the text.
    pub async fn log_in(&mut self, target: &str, keys: &str) -> (u16, String) {
        let request = self.login_request(flag::TRANSIT | stage::OPERATIONAL << 2 | stage::FULL_FEATURE);
        let who = match target {
            "" => "SessionType=Discovery\0".to_string(),
            target => format!("TargetName={target}\0"),
        };
        self.send(&request, format!("InitiatorName={NAME}\0{who}{keys}").as_bytes()).await;
        let answer = self.expect(opcode::LOGIN_RESPONSE).await;
        let head: LoginResponse = answer.view();
        let text = String::from_utf8(answer.data).unwrap();
        self.header_digest = text.contains("HeaderDigest=CRC32C");
        self.data_digest = text.contains("DataDigest=CRC32C");
        (head.status.get(), text)
    }

    /// A command with the next CmdSN.
    pub fn command(&mut self, tag: u32, flags: u8, length: u32, cdb: &[u8]) -> ScsiCommand {
        let mut head = ScsiCommand {
            opcode: opcode::SCSI_COMMAND,
            flags: flags | 1, // a simple task
            lun: [0, 1, 0, 0, 0, 0, 0, 0],
            tag: tag.into(),
            expected_length: length.into(),
            cmd_sn: self.cmd_sn.into(),
            ..ScsiCommand::zeroed()
        };
        head.cdb[..cdb.len()].copy_from_slice(cdb);
        self.cmd_sn += 1;
        head
    }

    /// Until the unit attentions of a new nexus are over.
    pub async fn settle(&mut self) {
        loop {
            let head = self.command(0xffff, flag::FINAL, 0, &[0; 6]);
            self.send(&head, &[]).await;
            if self.expect(opcode::SCSI_RESPONSE).await.head[3] == 0 {
                return;
            }
        }
    }

    pub fn data_out(tag: u32, transfer_tag: u32, data_sn: u32, offset: u32, is_final: bool) -> DataOut {
        DataOut {
            opcode: opcode::DATA_OUT,
            flags: if is_final { flag::FINAL } else { 0 },
            tag: tag.into(),
            transfer_tag: transfer_tag.into(),
            data_sn: data_sn.into(),
            offset: offset.into(),
            ..DataOut::zeroed()
        }
    }

    pub fn function(&self, tag: u32, number: u8, referenced: u32) -> TaskManagement {
        TaskManagement {
            opcode: opcode::TASK_MANAGEMENT | opcode::IMMEDIATE,
            function: flag::FINAL | number,
            lun: [0, 1, 0, 0, 0, 0, 0, 0],
            tag: tag.into(),
            referenced_tag: referenced.into(),
            cmd_sn: self.cmd_sn.into(),
            ref_cmd_sn: (self.cmd_sn - 1).into(),
            ..TaskManagement::zeroed()
        }
    }

    pub fn hang_up(&self) {
        self.wire.shut();
    }
}

pub fn write10(at: u32, blocks: u16) -> [u8; 10] {
    let mut cdb = [0; 10];
    cdb[0] = 0x2a;
    cdb[2..6].copy_from_slice(&at.to_be_bytes());
    cdb[7..9].copy_from_slice(&blocks.to_be_bytes());
    cdb
}

pub fn read10(at: u32, blocks: u16) -> [u8; 10] {
    let mut cdb = write10(at, blocks);
    cdb[0] = 0x28;
    cdb
}

pub const UNSOLICITED: u32 = NO_TAG;
