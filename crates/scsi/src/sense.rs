//! Sense data: what went wrong, in the words of SPC-4 clause 4.5, in both formats.

/// Sense key (SPC-4 table 47).
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Key {
    /// Nothing to say.
    NoSense = 0x0,
    /// Cannot be accessed now.
    NotReady = 0x2,
    /// A flaw in the medium.
    MediumError = 0x3,
    /// A failure that is not the medium's.
    HardwareError = 0x4,
    /// The CDB or the parameter list is wrong.
    IllegalRequest = 0x5,
    /// Something happened that the initiator has to know.
    UnitAttention = 0x6,
    /// Writing is not allowed.
    DataProtect = 0x7,
    /// EXTENDED COPY did not get to its end.
    CopyAborted = 0xa,
    /// The device server gave the command up; trying again may help.
    AbortedCommand = 0xb,
    /// Source and medium differ.
    Miscompare = 0xe,
}

/// Additional sense code and its qualifier as one number, ASC in the high byte (SPC-4 table F.1).
pub mod asc {
    /// Nothing to add.
    pub const NONE: u16 = 0x0000;
    /// A sanitize is under way.
    pub const SANITIZE_IN_PROGRESS: u16 = 0x041b;
    /// Too much data for the command.
    pub const TOO_MUCH_WRITE_DATA: u16 = 0x4b02;
    /// The disk behind the LUN is not there.
    pub const LOGICAL_UNIT_NOT_READY: u16 = 0x0400;
    /// Writing failed.
    pub const WRITE_ERROR: u16 = 0x0c00;
    /// Unsolicited data was expected and did not come.
    pub const NOT_ENOUGH_UNSOLICITED_DATA: u16 = 0x0c0d;
    /// Data came that was not asked for.
    pub const UNEXPECTED_UNSOLICITED_DATA: u16 = 0x0c0c;
    /// A third party could not be reached.
    pub const COPY_TARGET_NOT_REACHABLE: u16 = 0x0d02;
    /// The medium could not be read.
    pub const UNRECOVERED_READ_ERROR: u16 = 0x1100;
    /// The parameter list is not as long as it says.
    pub const PARAMETER_LIST_LENGTH_ERROR: u16 = 0x1a00;
    /// A comparison found a difference.
    pub const MISCOMPARE_DURING_VERIFY: u16 = 0x1d00;
    /// No such command.
    pub const INVALID_OPCODE: u16 = 0x2000;
    /// The medium is not as long.
    pub const LBA_OUT_OF_RANGE: u16 = 0x2100;
    /// A field of the CDB is wrong.
    pub const INVALID_FIELD_IN_CDB: u16 = 0x2400;
    /// Nothing at this LUN.
    pub const LOGICAL_UNIT_NOT_SUPPORTED: u16 = 0x2500;
    /// A field of the parameter list is wrong.
    pub const INVALID_FIELD_IN_PARAMETER_LIST: u16 = 0x2600;
    /// RELEASE of something else than what is held.
    pub const INVALID_RELEASE_OF_PERSISTENT_RESERVATION: u16 = 0x2604;
    /// More CSCD descriptors than can be taken.
    pub const TOO_MANY_TARGET_DESCRIPTORS: u16 = 0x2606;
    /// A CSCD descriptor of a type that is not known.
    pub const UNSUPPORTED_TARGET_DESCRIPTOR: u16 = 0x2607;
    /// More segment descriptors than can be taken.
    pub const TOO_MANY_SEGMENT_DESCRIPTORS: u16 = 0x2608;
    /// A segment descriptor of a type that is not known.
    pub const UNSUPPORTED_SEGMENT_DESCRIPTOR: u16 = 0x2609;
    /// The disk does not take writes.
    pub const WRITE_PROTECTED: u16 = 0x2700;
    /// The control mode page forbids writes.
    pub const SOFTWARE_WRITE_PROTECTED: u16 = 0x2702;
    /// The pool is full.
    pub const SPACE_ALLOCATION_FAILED: u16 = 0x2707;
    /// First contact since power on.
    pub const POWER_ON: u16 = 0x2900;
    /// A LUN reset.
    pub const BUS_DEVICE_RESET: u16 = 0x2903;
    /// The connection was lost in between.
    pub const I_T_NEXUS_LOSS: u16 = 0x2907;
    /// MODE SELECT by somebody else.
    pub const MODE_PARAMETERS_CHANGED: u16 = 0x2a01;
    /// CLEAR, or a preempted reservation.
    pub const RESERVATIONS_PREEMPTED: u16 = 0x2a03;
    /// A registrant's reservation ended.
    pub const RESERVATIONS_RELEASED: u16 = 0x2a04;
    /// The registration is gone.
    pub const REGISTRATIONS_PREEMPTED: u16 = 0x2a05;
    /// The LUN was resized.
    pub const CAPACITY_CHANGED: u16 = 0x2a09;
    /// Somebody else's CLEAR TASK SET or reset ended commands.
    pub const COMMANDS_CLEARED_BY_ANOTHER: u16 = 0x2f00;
    /// Not room enough for more registrations.
    pub const INSUFFICIENT_REGISTRATION_RESOURCES: u16 = 0x5504;
    /// A sanitize did not get to its end.
    pub const SANITIZE_FAILED: u16 = 0x3103;
    /// The list of LUNs is another.
    pub const REPORTED_LUNS_CHANGED: u16 = 0x3f0e;
    /// A failure inside.
    pub const INTERNAL_TARGET_FAILURE: u16 = 0x4400;
    /// Something in the data-out does not fit the command.
    pub const DATA_PHASE_ERROR: u16 = 0x4b00;
}

/// What the sense-key specific bytes say (SPC-4 clause 4.5.2.4).
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Specific {
    None,
    /// Where the wrong field is.
    Field {
        in_cdb: bool,
        byte: u16,
        bit: Option<u8>,
    },
    /// How far along, in 65536ths.
    Progress(u16),
    /// Segment descriptor of an EXTENDED COPY and the wrong byte in it.
    Segment {
        byte: u16,
    },
}

/// One sense answer, in no format yet.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Sense {
    /// Sense key.
    pub key: Key,
    /// ASC and ASCQ: see [`asc`].
    pub code: u16,
    information: Option<u64>,
    command_specific: Option<u64>,
    specific: Specific,
}

impl Sense {
    /// A key and a code.
    pub const fn new(key: Key, code: u16) -> Self {
        Self { key, code, information: None, command_specific: None, specific: Specific::None }
    }

    /// ILLEGAL REQUEST with this code.
    pub const fn illegal(code: u16) -> Self {
        Self::new(Key::IllegalRequest, code)
    }

    /// INVALID FIELD IN CDB, pointing at the byte and, if given, the leftmost bit of the field.
    pub const fn cdb(byte: u16, bit: Option<u8>) -> Self {
        let mut sense = Self::illegal(asc::INVALID_FIELD_IN_CDB);
        sense.specific = Specific::Field { in_cdb: true, byte, bit };
        sense
    }

    /// INVALID FIELD IN PARAMETER LIST, pointing at the byte and bit.
    pub const fn parameter(byte: u16, bit: Option<u8>) -> Self {
        let mut sense = Self::illegal(asc::INVALID_FIELD_IN_PARAMETER_LIST);
        sense.specific = Specific::Field { in_cdb: false, byte, bit };
        sense
    }

    /// With the INFORMATION field valid.
    pub const fn with_information(mut self, information: u64) -> Self {
        self.information = Some(information);
        self
    }

    /// With COMMAND-SPECIFIC INFORMATION.
    pub const fn with_command_specific(mut self, value: u64) -> Self {
        self.command_specific = Some(value);
        self
    }

    /// With a progress indication, in 65536ths.
    pub const fn with_progress(mut self, progress: u16) -> Self {
        self.specific = Specific::Progress(progress);
        self
    }

    /// With a pointer to a byte of a segment descriptor.
    pub const fn with_segment_byte(mut self, byte: u16) -> Self {
        self.specific = Specific::Segment { byte };
        self
    }

    /// The three sense-key specific bytes.
    fn specific_bytes(&self) -> Option<[u8; 3]> {
        match self.specific {
            Specific::None => None,
            Specific::Field { in_cdb, byte, bit } => {
                let [high, low] = byte.to_be_bytes();
                Some([0x80 | u8::from(in_cdb) << 6 | bit.map_or(0, |b| 0x08 | b & 7), high, low])
            }
            Specific::Progress(progress) => {
                let [high, low] = progress.to_be_bytes();
                Some([0x80, high, low])
            }
            Specific::Segment { byte } => {
                let [high, low] = byte.to_be_bytes();
                Some([0x80 | 0x20, high, low])
            }
        }
    }

    /// The bytes: descriptor format (SPC-4 4.5.2) if `descriptor`, else fixed format (4.5.3). An INFORMATION value that
    /// does not fit the 32 bits of the fixed format is left out there, as the standard demands.
    pub fn encode(&self, descriptor: bool) -> Vec<u8> {
        if descriptor { self.encode_descriptor() } else { self.encode_fixed() }
    }

    fn encode_fixed(&self) -> Vec<u8> {
        let [code, qualifier] = self.code.to_be_bytes();
        let mut out = vec![0; 18];
        (out[0], out[2], out[7]) = (0x70, self.key as u8, 10);
        if let Some(value) = self.information.and_then(|i| u32::try_from(i).ok()) {
            out[0] |= 0x80;
            out[3..7].copy_from_slice(&value.to_be_bytes());
        }
        if let Some(value) = self.command_specific.and_then(|i| u32::try_from(i).ok()) {
            out[8..12].copy_from_slice(&value.to_be_bytes());
        }
        (out[12], out[13]) = (code, qualifier);
        if let Some(specific) = self.specific_bytes() {
            out[15..18].copy_from_slice(&specific);
        }
        out
    }

    fn encode_descriptor(&self) -> Vec<u8> {
        let [code, qualifier] = self.code.to_be_bytes();
        let mut out = vec![0x72, self.key as u8, code, qualifier, 0, 0, 0, 0];
        if let Some(value) = self.information {
            out.extend([0x00, 0x0a, 0x80, 0]);
            out.extend(value.to_be_bytes());
        }
        if let Some(value) = self.command_specific {
            out.extend([0x01, 0x0a, 0, 0]);
            out.extend(value.to_be_bytes());
        }
        if let Some(specific) = self.specific_bytes() {
            out.extend([0x02, 0x06, 0, 0]);
            out.extend(specific);
            out.push(0);
        }
        out[7] = (out.len() - 8) as u8;
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_format_spc4_4_5_3() {
        let sense = Sense::cdb(2, Some(7)).with_information(0x1234);
        let bytes = sense.encode(false);
        assert_eq!(bytes, [0xf0, 0, 5, 0, 0, 0x12, 0x34, 10, 0, 0, 0, 0, 0x24, 0, 0, 0xcf, 0, 2]);
        let far = Sense::new(Key::MediumError, asc::UNRECOVERED_READ_ERROR).with_information(1 << 40);
        assert_eq!(far.encode(false)[0], 0x70, "INFORMATION that does not fit is not valid");
    }

    #[test]
    fn descriptor_format_spc4_4_5_2() {
        let far = Sense::new(Key::MediumError, asc::UNRECOVERED_READ_ERROR).with_information(1 << 40);
        let bytes = far.encode(true);
        assert_eq!(bytes[..8], [0x72, 3, 0x11, 0, 0, 0, 0, 12]);
        assert_eq!(bytes[8..], [0, 10, 0x80, 0, 0, 0, 1, 0, 0, 0, 0, 0]);
        let field = Sense::parameter(20, None).encode(true);
        assert_eq!(field[8..], [2, 6, 0, 0, 0x80, 0, 20, 0]);
    }
}
