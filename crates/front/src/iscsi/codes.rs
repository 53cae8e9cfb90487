//! Numbers of the protocol (RFC 7143 section 11, RFC 7144): operation codes, flags, reasons, states.

/// Operation codes (11.2.1.2), without the immediate bit.
pub mod opcode {
    /// NOP-Out.
    pub const NOP_OUT: u8 = 0x00;
    /// SCSI Command.
    pub const SCSI_COMMAND: u8 = 0x01;
    /// Task Management Function Request.
    pub const TASK_MANAGEMENT: u8 = 0x02;
    /// Login Request.
    pub const LOGIN: u8 = 0x03;
    /// Text Request.
    pub const TEXT: u8 = 0x04;
    /// SCSI Data-Out.
    pub const DATA_OUT: u8 = 0x05;
    /// Logout Request.
    pub const LOGOUT: u8 = 0x06;
    /// SNACK Request.
    pub const SNACK: u8 = 0x10;
    /// NOP-In.
    pub const NOP_IN: u8 = 0x20;
    /// SCSI Response.
    pub const SCSI_RESPONSE: u8 = 0x21;
    /// Task Management Function Response.
    pub const TASK_MANAGEMENT_RESPONSE: u8 = 0x22;
    /// Login Response.
    pub const LOGIN_RESPONSE: u8 = 0x23;
    /// Text Response.
    pub const TEXT_RESPONSE: u8 = 0x24;
    /// SCSI Data-In.
    pub const DATA_IN: u8 = 0x25;
    /// Logout Response.
    pub const LOGOUT_RESPONSE: u8 = 0x26;
    /// Ready To Transfer.
    pub const R2T: u8 = 0x31;
    /// Asynchronous Message.
    pub const ASYNC_MESSAGE: u8 = 0x32;
    /// Reject.
    pub const REJECT: u8 = 0x3f;

    /// The bits of the first byte that hold the code.
    pub const MASK: u8 = 0x3f;
    /// The PDU is to be taken out of the order of CmdSN (11.2.1.1).
    pub const IMMEDIATE: u8 = 0x40;
}

/// Bits of the second byte, by kind of PDU.
pub mod flag {
    /// Final: last of a sequence (all kinds that have it).
    pub const FINAL: u8 = 0x80;
    /// SCSI Command: data go to the initiator.
    pub const READ: u8 = 0x40;
    /// SCSI Command: data come from the initiator.
    pub const WRITE: u8 = 0x20;
    /// SCSI Command: the task attribute.
    pub const ATTRIBUTE: u8 = 0x07;
    /// Login and Text: the text goes on in the next PDU.
    pub const CONTINUE: u8 = 0x40;
    /// Login: transit to the next stage.
    pub const TRANSIT: u8 = 0x80;
    /// SCSI Response, Data-In: the residual count is of an overflow.
    pub const OVERFLOW: u8 = 0x04;
    /// SCSI Response, Data-In: the residual count is of an underflow.
    pub const UNDERFLOW: u8 = 0x02;
    /// Data-In: carries the status.
    pub const STATUS: u8 = 0x01;
}

/// Task attributes (11.3.1).
pub mod attribute {
    /// Untagged, treated as simple.
    pub const UNTAGGED: u8 = 0;
    /// Simple.
    pub const SIMPLE: u8 = 1;
    /// Ordered.
    pub const ORDERED: u8 = 2;
    /// Head of queue.
    pub const HEAD_OF_QUEUE: u8 = 3;
    /// ACA.
    pub const ACA: u8 = 4;
}

/// Reasons of a Reject (11.17.1).
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Reason {
    /// A data segment did not match its digest.
    DataDigest = 0x02,
    /// SNACK is not for this level of recovery.
    Snack = 0x03,
    /// The protocol was broken.
    Protocol = 0x04,
    /// The command is not known.
    NotSupported = 0x05,
    /// Too many immediate commands.
    TooManyImmediate = 0x06,
    /// A task of this tag is under way.
    TaskInProgress = 0x07,
    /// A data acknowledgement nobody asked for.
    DataAck = 0x08,
    /// A field has a value that it must not have.
    InvalidField = 0x09,
    /// The text negotiation ran into a limit.
    LongOperation = 0x0a,
}

/// Asynchronous events (11.9.1).
pub mod event {
    /// SCSI sense data.
    pub const SCSI: u8 = 0;
    /// The target asks for a logout.
    pub const LOGOUT_REQUEST: u8 = 1;
    /// The target drops this connection.
    pub const CONNECTION_DROP: u8 = 2;
    /// The target drops all connections of the session.
    pub const SESSION_DROP: u8 = 3;
}

/// Task management functions (11.5.1; RFC 7144 section 6).
pub mod function {
    /// ABORT TASK.
    pub const ABORT_TASK: u8 = 1;
    /// ABORT TASK SET.
    pub const ABORT_TASK_SET: u8 = 2;
    /// CLEAR ACA.
    pub const CLEAR_ACA: u8 = 3;
    /// CLEAR TASK SET.
    pub const CLEAR_TASK_SET: u8 = 4;
    /// LOGICAL UNIT RESET.
    pub const LOGICAL_UNIT_RESET: u8 = 5;
    /// TARGET WARM RESET.
    pub const TARGET_WARM_RESET: u8 = 6;
    /// TARGET COLD RESET.
    pub const TARGET_COLD_RESET: u8 = 7;
    /// TASK REASSIGN.
    pub const TASK_REASSIGN: u8 = 8;
    /// QUERY TASK.
    pub const QUERY_TASK: u8 = 9;
    /// QUERY TASK SET.
    pub const QUERY_TASK_SET: u8 = 10;
    /// I_T NEXUS RESET.
    pub const I_T_NEXUS_RESET: u8 = 11;
    /// QUERY ASYNCHRONOUS EVENT.
    pub const QUERY_ASYNCHRONOUS_EVENT: u8 = 12;
}

/// Answers to task management functions (11.6.1; RFC 7144 section 6.2).
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Outcome {
    /// Function complete.
    Complete = 0,
    /// Task does not exist.
    NoSuchTask = 1,
    /// LUN does not exist.
    NoSuchLun = 2,
    /// Task allegiance reassignment not supported.
    ReassignNotSupported = 4,
    /// Function not supported.
    NotSupported = 5,
    /// Function succeeded.
    Succeeded = 7,
    /// Function rejected.
    Rejected = 255,
}

/// Stages of a login (11.12.3).
pub mod stage {
    /// SecurityNegotiation.
    pub const SECURITY: u8 = 0;
    /// LoginOperationalNegotiation.
    pub const OPERATIONAL: u8 = 1;
    /// FullFeaturePhase.
    pub const FULL_FEATURE: u8 = 3;
}

/// Answers to logins: status class in the high byte, detail in the low one (11.13.5).
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum LoginStatus {
    /// Success.
    Success = 0x0000,
    /// The initiator did something wrong.
    InitiatorError = 0x0200,
    /// Authentication failure.
    AuthenticationFailure = 0x0201,
    /// The initiator may not use this target.
    AuthorizationFailure = 0x0202,
    /// There is no such target.
    NotFound = 0x0203,
    /// The target was removed.
    TargetRemoved = 0x0204,
    /// No common protocol version.
    UnsupportedVersion = 0x0205,
    /// Too many connections.
    TooManyConnections = 0x0206,
    /// A key is missing.
    MissingParameter = 0x0207,
    /// The session type is not known.
    SessionTypeNotSupported = 0x0209,
    /// There is no such session.
    SessionDoesNotExist = 0x020a,
    /// This has no place in a login.
    InvalidDuringLogin = 0x020b,
    /// The target has no resources left.
    OutOfResources = 0x0302,
}
