//! PDUs on the wire (RFC 7143 section 11, with what RFC 7144 adds). Every PDU begins with 48 bytes of basic header
//! segment (BHS); each kind has its own view of them here. Numbers are big-endian.

use zerocopy::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::codes::{flag, opcode};

/// Length of a basic header segment, in bytes.
pub const HEADER_BYTES: usize = 48;
/// Length of a header or data digest, in bytes.
pub const DIGEST_BYTES: usize = 4;
/// A tag that names nothing (initiator or target task tag).
pub const NO_TAG: u32 = 0xffff_ffff;
/// Default of MaxRecvDataSegmentLength, in bytes (13.12); in force during login.
pub const DEFAULT_SEGMENT_BYTES: usize = 8192;

/// What all PDUs have in common.
#[derive(Copy, Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Operation code and immediate bit.
    pub opcode: u8,
    /// Final bit and bits of the kind.
    pub flags: u8,
    /// Of the kind.
    pub specific: [u8; 2],
    /// Length of the additional header segments, in words of four bytes.
    pub ahs_words: u8,
    /// Length of the data segment, in bytes, without padding.
    pub data_length: [u8; 3],
    /// LUN, or of the kind.
    pub lun: [u8; 8],
    /// Initiator task tag.
    pub tag: U32,
    /// Of the kind.
    pub rest: [u8; 28],
}

impl Header {
    /// Length of the data segment, in bytes.
    pub fn data_bytes(&self) -> usize {
        let [a, b, c] = self.data_length;
        usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c)
    }

    /// Operation code.
    pub fn code(&self) -> u8 {
        self.opcode & opcode::MASK
    }

    /// To be taken out of the order of CmdSN.
    pub fn is_immediate(&self) -> bool {
        self.opcode & opcode::IMMEDIATE != 0
    }

    /// The final bit.
    pub fn is_final(&self) -> bool {
        self.flags & flag::FINAL != 0
    }
}

/// A length as the header has it. It must be below 2^24, which every limit here is.
pub fn length_field(bytes: usize) -> [u8; 3] {
    debug_assert!(bytes < 1 << 24, "a data segment of {bytes} bytes");
    [(bytes >> 16) as u8, (bytes >> 8) as u8, bytes as u8]
}

/// Bytes that make `length` a multiple of four.
pub const fn padding(length: usize) -> usize {
    length.wrapping_neg() & 3
}

macro_rules! pdu {
    ($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Copy, Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[$fdoc])* pub $field: $type,)* }
        const _: () = assert!(size_of::<$name>() == HEADER_BYTES);
        impl $name {
            /// All zero.
            pub fn zeroed() -> Self {
                zerocopy::FromZeros::new_zeroed()
            }
        }
    };
}

const _: () = assert!(size_of::<Header>() == HEADER_BYTES);

pdu! {
    /// SCSI Command (11.3).
    ScsiCommand {
        /// Operation code and immediate bit.
        opcode: u8,
        /// FINAL, READ, WRITE, ATTRIBUTE.
        flags: u8,
        /// Reserved, and the command priority of RFC 7144.
        specific: [u8; 2],
        /// As in [`Header`].
        ahs_words: u8,
        /// As in [`Header`].
        data_length: [u8; 3],
        /// LUN.
        lun: [u8; 8],
        /// Initiator task tag.
        tag: U32,
        /// Expected data transfer length, in bytes.
        expected_length: U32,
        /// CmdSN.
        cmd_sn: U32,
        /// ExpStatSN.
        exp_stat_sn: U32,
        /// The first 16 bytes of the CDB.
        cdb: [u8; 16],
    }
}

pdu! {
    /// SCSI Response (11.4).
    ScsiResponse {
        /// Operation code.
        opcode: u8,
        /// FINAL, OVERFLOW, UNDERFLOW.
        flags: u8,
        /// 0: completed at target.
        response: u8,
        /// SCSI status.
        status: u8,
        /// As in [`Header`].
        ahs_words: u8,
        /// As in [`Header`].
        data_length: [u8; 3],
        /// Status qualifier of RFC 7144, reserved.
        qualifier: [u8; 8],
        /// Initiator task tag.
        tag: U32,
        /// SNACK tag, unused at recovery level 0.
        snack_tag: U32,
        /// StatSN.
        stat_sn: U32,
        /// ExpCmdSN.
        exp_cmd_sn: U32,
        /// MaxCmdSN.
        max_cmd_sn: U32,
        /// Number of Data-In and R2T PDUs sent.
        exp_data_sn: U32,
        /// Bidirectional read residual count.
        read_residual: U32,
        /// Residual count.
        residual: U32,
    }
}

pdu! {
    /// Task Management Function Request (11.5).
    TaskManagement {
        /// Operation code and immediate bit.
        opcode: u8,
        /// FINAL and the function.
        function: u8,
        /// Reserved.
        specific: [u8; 2],
        /// As in [`Header`].
        ahs_words: u8,
        /// As in [`Header`].
        data_length: [u8; 3],
        /// LUN.
        lun: [u8; 8],
        /// Initiator task tag.
        tag: U32,
        /// Referenced task tag.
        referenced_tag: U32,
        /// CmdSN.
        cmd_sn: U32,
        /// ExpStatSN.
        exp_stat_sn: U32,
        /// CmdSN of the referenced task.
        ref_cmd_sn: U32,
        /// For TASK REASSIGN.
        exp_data_sn: U32,
        /// Reserved.
        reserved: [u8; 8],
    }
}

pdu! {
    /// SCSI Data-Out (11.7).
    DataOut {
        /// Operation code.
        opcode: u8,
        /// FINAL.
        flags: u8,
        /// Reserved.
        specific: [u8; 2],
        /// As in [`Header`].
        ahs_words: u8,
        /// As in [`Header`].
        data_length: [u8; 3],
        /// LUN.
        lun: [u8; 8],
        /// Initiator task tag.
        tag: U32,
        /// Target transfer tag of the R2T; [`NO_TAG`]: unsolicited.
        transfer_tag: U32,
        /// Reserved.
        reserved1: U32,
        /// ExpStatSN.
        exp_stat_sn: U32,
        /// Reserved.
        reserved2: U32,
        /// DataSN, from 0 in each sequence.
        data_sn: U32,
        /// Buffer offset, in bytes.
        offset: U32,
        /// Reserved.
        reserved3: U32,
    }
}

pdu! {
    /// SCSI Data-In (11.7).
    DataIn {
        /// Operation code.
        opcode: u8,
        /// FINAL, OVERFLOW, UNDERFLOW, STATUS.
        flags: u8,
        /// Reserved.
        reserved: u8,
        /// SCSI status, with STATUS.
        status: u8,
        /// As in [`Header`].
        ahs_words: u8,
        /// As in [`Header`].
        data_length: [u8; 3],
        /// LUN.
        lun: [u8; 8],
        /// Initiator task tag.
        tag: U32,
        /// Target transfer tag, unused at recovery level 0.
        transfer_tag: U32,
        /// StatSN, with STATUS.
        stat_sn: U32,
        /// ExpCmdSN.
        exp_cmd_sn: U32,
        /// MaxCmdSN.
        max_cmd_sn: U32,
        /// DataSN.
        data_sn: U32,
        /// Buffer offset, in bytes.
        offset: U32,
        /// Residual count, with STATUS.
        residual: U32,
    }
}

pdu! {
    /// Ready To Transfer (11.8).
    ReadyToTransfer {
        /// Operation code.
        opcode: u8,
        /// FINAL.
        flags: u8,
        /// Reserved.
        specific: [u8; 2],
        /// As in [`Header`].
        ahs_words: u8,
        /// As in [`Header`].
        data_length: [u8; 3],
        /// LUN.
        lun: [u8; 8],
        /// Initiator task tag.
        tag: U32,
        /// Target transfer tag.
        transfer_tag: U32,
        /// The StatSN to come; an R2T uses none.
        stat_sn: U32,
        /// ExpCmdSN.
        exp_cmd_sn: U32,
        /// MaxCmdSN.
        max_cmd_sn: U32,
        /// R2TSN.
        r2t_sn: U32,
        /// Buffer offset, in bytes.
        offset: U32,
        /// Desired data transfer length, in bytes.
        length: U32,
    }
}

pdu! {
    /// Asynchronous Message (11.9).
    AsyncMessage {
        /// Operation code.
        opcode: u8,
        /// FINAL.
        flags: u8,
        /// Reserved.
        specific: [u8; 2],
        /// As in [`Header`].
        ahs_words: u8,
        /// As in [`Header`].
        data_length: [u8; 3],
        /// LUN, for SCSI events.
        lun: [u8; 8],
        /// [`NO_TAG`].
        tag: U32,
        /// Reserved.
        reserved1: U32,
        /// StatSN.
        stat_sn: U32,
        /// ExpCmdSN.
        exp_cmd_sn: U32,
        /// MaxCmdSN.
        max_cmd_sn: U32,
        /// The event.
        event: u8,
        /// Vendor's code.
        vendor_code: u8,
        /// Connection, or reserved.
        parameter1: U16,
        /// Time2Wait in seconds, or reserved.
        parameter2: U16,
        /// Time2Retain or time for the logout, in seconds.
        parameter3: U16,
        /// Reserved.
        reserved2: U32,
    }
}

pdu! {
    /// Text Request (11.10).
    TextRequest {
        /// Operation code and immediate bit.
        opcode: u8,
        /// FINAL, CONTINUE.
        flags: u8,
        /// Reserved.
        specific: [u8; 2],
        /// As in [`Header`].
        ahs_words: u8,
        /// As in [`Header`].
        data_length: [u8; 3],
        /// LUN.
        lun: [u8; 8],
        /// Initiator task tag.
        tag: U32,
        /// Target transfer tag of the response that this goes on from, or [`NO_TAG`].
        transfer_tag: U32,
        /// CmdSN.
        cmd_sn: U32,
        /// ExpStatSN.
        exp_stat_sn: U32,
        /// Reserved.
        reserved: [u8; 16],
    }
}

pdu! {
    /// Text Response (11.11).
    TextResponse {
        /// Operation code.
        opcode: u8,
        /// FINAL, CONTINUE.
        flags: u8,
        /// Reserved.
        specific: [u8; 2],
        /// As in [`Header`].
        ahs_words: u8,
        /// As in [`Header`].
        data_length: [u8; 3],
        /// LUN.
        lun: [u8; 8],
        /// Initiator task tag.
        tag: U32,
        /// With which the initiator goes on; [`NO_TAG`]: this was all.
        transfer_tag: U32,
        /// StatSN.
        stat_sn: U32,
        /// ExpCmdSN.
        exp_cmd_sn: U32,
        /// MaxCmdSN.
        max_cmd_sn: U32,
        /// Reserved.
        reserved: [u8; 12],
    }
}

pdu! {
    /// Login Request (11.12).
    LoginRequest {
        /// Operation code and immediate bit, which is always set.
        opcode: u8,
        /// TRANSIT, CONTINUE, current stage (bits 2 and 3), next stage (bits 0 and 1).
        flags: u8,
        /// Highest version.
        version_max: u8,
        /// Lowest version.
        version_min: u8,
        /// As in [`Header`].
        ahs_words: u8,
        /// As in [`Header`].
        data_length: [u8; 3],
        /// The initiator's part of the session identifier.
        isid: [u8; 6],
        /// The target's part; 0: a new session.
        tsih: U16,
        /// Initiator task tag.
        tag: U32,
        /// Connection identifier.
        cid: U16,
        /// Reserved.
        reserved1: U16,
        /// CmdSN.
        cmd_sn: U32,
        /// ExpStatSN.
        exp_stat_sn: U32,
        /// Reserved.
        reserved2: [u8; 16],
    }
}

pdu! {
    /// Login Response (11.13).
    LoginResponse {
        /// Operation code.
        opcode: u8,
        /// As in [`LoginRequest`].
        flags: u8,
        /// Highest version.
        version_max: u8,
        /// The version in use.
        version_active: u8,
        /// As in [`Header`].
        ahs_words: u8,
        /// As in [`Header`].
        data_length: [u8; 3],
        /// The initiator's part of the session identifier.
        isid: [u8; 6],
        /// The target's part, in the last response.
        tsih: U16,
        /// Initiator task tag.
        tag: U32,
        /// Reserved.
        reserved1: U32,
        /// StatSN.
        stat_sn: U32,
        /// ExpCmdSN.
        exp_cmd_sn: U32,
        /// MaxCmdSN.
        max_cmd_sn: U32,
        /// Class and detail of [`LoginStatus`](super::codes::LoginStatus).
        status: U16,
        /// Reserved.
        reserved2: [u8; 10],
    }
}

pdu! {
    /// Logout Request (11.14).
    LogoutRequest {
        /// Operation code and immediate bit.
        opcode: u8,
        /// FINAL and the reason: 0 close the session, 1 close the connection, 2 remove it for recovery.
        reason: u8,
        /// Reserved.
        specific: [u8; 2],
        /// As in [`Header`].
        ahs_words: u8,
        /// As in [`Header`].
        data_length: [u8; 3],
        /// Reserved.
        reserved1: [u8; 8],
        /// Initiator task tag.
        tag: U32,
        /// Connection identifier.
        cid: U16,
        /// Reserved.
        reserved2: U16,
        /// CmdSN.
        cmd_sn: U32,
        /// ExpStatSN.
        exp_stat_sn: U32,
        /// Reserved.
        reserved3: [u8; 16],
    }
}

pdu! {
    /// Logout Response (11.15).
    LogoutResponse {
        /// Operation code.
        opcode: u8,
        /// FINAL.
        flags: u8,
        /// 0 closed, 1 no such connection, 2 recovery not supported, 3 clean-up failed.
        response: u8,
        /// Reserved.
        reserved0: u8,
        /// As in [`Header`].
        ahs_words: u8,
        /// As in [`Header`].
        data_length: [u8; 3],
        /// Reserved.
        reserved1: [u8; 8],
        /// Initiator task tag.
        tag: U32,
        /// Reserved.
        reserved2: U32,
        /// StatSN.
        stat_sn: U32,
        /// ExpCmdSN.
        exp_cmd_sn: U32,
        /// MaxCmdSN.
        max_cmd_sn: U32,
        /// Reserved.
        reserved3: U32,
        /// Time2Wait, in seconds.
        time2wait: U16,
        /// Time2Retain, in seconds.
        time2retain: U16,
        /// Reserved.
        reserved4: U32,
    }
}

pdu! {
    /// Reject (11.17). The header of the PDU that was rejected is its data.
    Reject {
        /// Operation code.
        opcode: u8,
        /// FINAL.
        flags: u8,
        /// See [`Reason`](super::codes::Reason).
        reason: u8,
        /// Reserved.
        reserved0: u8,
        /// As in [`Header`].
        ahs_words: u8,
        /// As in [`Header`].
        data_length: [u8; 3],
        /// Reserved.
        reserved1: [u8; 8],
        /// [`NO_TAG`].
        tag: U32,
        /// Reserved.
        reserved2: U32,
        /// StatSN.
        stat_sn: U32,
        /// ExpCmdSN.
        exp_cmd_sn: U32,
        /// MaxCmdSN.
        max_cmd_sn: U32,
        /// DataSN or R2TSN, where one is meant.
        data_sn: U32,
        /// Reserved.
        reserved3: [u8; 8],
    }
}

pdu! {
    /// NOP-Out (11.18) and, with the sequence numbers of a target, NOP-In (11.19).
    Nop {
        /// Operation code and immediate bit.
        opcode: u8,
        /// FINAL.
        flags: u8,
        /// Reserved.
        specific: [u8; 2],
        /// As in [`Header`].
        ahs_words: u8,
        /// As in [`Header`].
        data_length: [u8; 3],
        /// LUN.
        lun: [u8; 8],
        /// Initiator task tag; [`NO_TAG`]: no answer is wanted.
        tag: U32,
        /// Target transfer tag of a ping by the target, or [`NO_TAG`].
        transfer_tag: U32,
        /// NOP-Out: CmdSN. NOP-In: StatSN.
        number1: U32,
        /// NOP-Out: ExpStatSN. NOP-In: ExpCmdSN.
        number2: U32,
        /// NOP-In: MaxCmdSN.
        number3: U32,
        /// Reserved.
        reserved: [u8; 12],
    }
}

const _: () = {
    use std::mem::offset_of;
    // Fields whose place the RFC's pictures name.
    assert!(offset_of!(Header, tag) == 16);
    assert!(offset_of!(ScsiCommand, cmd_sn) == 24 && offset_of!(ScsiCommand, cdb) == 32);
    assert!(offset_of!(ScsiResponse, stat_sn) == 24 && offset_of!(ScsiResponse, residual) == 44);
    assert!(offset_of!(TaskManagement, cmd_sn) == 24 && offset_of!(TaskManagement, ref_cmd_sn) == 32);
    assert!(offset_of!(DataOut, data_sn) == 36 && offset_of!(DataOut, offset) == 40);
    assert!(offset_of!(DataIn, stat_sn) == 24 && offset_of!(DataIn, residual) == 44);
    assert!(offset_of!(ReadyToTransfer, r2t_sn) == 36 && offset_of!(ReadyToTransfer, length) == 44);
    assert!(offset_of!(AsyncMessage, stat_sn) == 24 && offset_of!(AsyncMessage, parameter3) == 42);
    assert!(offset_of!(TextRequest, cmd_sn) == 24 && offset_of!(TextResponse, stat_sn) == 24);
    assert!(offset_of!(LoginRequest, cid) == 20 && offset_of!(LoginRequest, cmd_sn) == 24);
    assert!(offset_of!(LoginResponse, stat_sn) == 24 && offset_of!(LoginResponse, status) == 36);
    assert!(offset_of!(LogoutRequest, cid) == 20 && offset_of!(LogoutResponse, time2wait) == 40);
    assert!(offset_of!(Reject, stat_sn) == 24 && offset_of!(Reject, data_sn) == 36);
    assert!(offset_of!(Nop, number1) == 24 && offset_of!(Nop, number3) == 32);
};
