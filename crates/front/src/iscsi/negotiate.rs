//! Operational keys (RFC 7143 section 13, RFC 7144 section 7.1): what each side may say, and what comes out.

use super::ending::Fault;
use super::format::DEFAULT_SEGMENT_BYTES;
use super::text;

/// What a target is willing to do.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Longest data segment that it takes, in bytes (MaxRecvDataSegmentLength).
    pub segment_bytes_max: u32,
    /// Most unsolicited data of a command, in bytes (FirstBurstLength).
    pub first_burst_max: u32,
    /// Most data of one R2T or one sequence of Data-In, in bytes (MaxBurstLength).
    pub burst_max: u32,
    /// R2Ts of one task that may be open at once (MaxOutstandingR2T).
    pub outstanding_r2t_max: u16,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            segment_bytes_max: 256 << 10,
            first_burst_max: 256 << 10,
            burst_max: 1 << 20,
            outstanding_r2t_max: 8,
        }
    }
}

/// What is in force on a session. Begins with the defaults of the RFC.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Parameters {
    /// Headers carry a CRC32C.
    pub header_digest: bool,
    /// Data segments carry a CRC32C.
    pub data_digest: bool,
    /// No unsolicited Data-Out PDUs.
    pub initial_r2t: bool,
    /// A command may carry data.
    pub immediate_data: bool,
    /// Longest data segment that the initiator takes, in bytes.
    pub segment_bytes_max: usize,
    /// Most unsolicited data of a command, in bytes.
    pub first_burst: usize,
    /// Most data of one sequence, in bytes.
    pub max_burst: usize,
    /// R2Ts of one task that may be open at once.
    pub outstanding_r2t: usize,
    /// iSCSIProtocolLevel: 2 and above have RFC 7144's functions.
    pub protocol_level: u8,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            header_digest: false,
            data_digest: false,
            initial_r2t: true,
            immediate_data: true,
            segment_bytes_max: DEFAULT_SEGMENT_BYTES,
            first_burst: 65536,
            max_burst: 262_144,
            outstanding_r2t: 1,
            protocol_level: 1,
        }
    }
}

/// In which phase a key comes.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Login of a normal session.
    Login,
    /// Login of a discovery session, where most keys mean nothing.
    DiscoveryLogin,
    /// Full-feature phase: nothing is negotiated any more but MaxRecvDataSegmentLength.
    FullFeature,
}

/// What to say to a key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// Nothing: it was a declaration.
    Silent,
    /// This value.
    Value(String),
}

/// Operational keys that are negotiated, all of which take one offer per login (6.2).
const NEGOTIATED: [&str; 20] = [
    "HeaderDigest",
    "DataDigest",
    "MaxConnections",
    "InitialR2T",
    "ImmediateData",
    "MaxRecvDataSegmentLength",
    "MaxBurstLength",
    "FirstBurstLength",
    "DefaultTime2Wait",
    "DefaultTime2Retain",
    "MaxOutstandingR2T",
    "DataPDUInOrder",
    "DataSequenceInOrder",
    "ErrorRecoveryLevel",
    "TaskReporting",
    "iSCSIProtocolLevel",
    "IFMarker",
    "OFMarker",
    "IFMarkInt",
    "OFMarkInt",
];

/// A negotiation: parameters as they become, and which keys were offered already.
#[derive(Clone, Default, Debug)]
pub struct Negotiation {
    /// What was agreed so far.
    pub parameters: Parameters,
    offered: u32,
}

impl Negotiation {
    /// Takes one key of the initiator. Names that declare who is who are not for here.
    pub fn offer(&mut self, limits: &Limits, phase: Phase, key: &str, value: &str) -> Result<Answer, Fault> {
        let Some(place) = NEGOTIATED.iter().position(|known| *known == key) else {
            return Ok(Self::not_negotiated(key));
        };
        if phase == Phase::FullFeature {
            if key == "MaxRecvDataSegmentLength" {
                return self.declare_segment(value);
            }
            return Ok(reject()); // these belong into the login (13, "Use: LO, IO")
        }
        if self.offered & 1 << place != 0 {
            return Err(Fault::new("a key negotiated twice", "6.2"));
        }
        self.offered |= 1 << place;
        if phase == Phase::DiscoveryLogin && is_irrelevant_in_discovery(key) {
            return Ok(Answer::Value("Irrelevant".into()));
        }
        self.negotiate(limits, key, value)
    }

    fn not_negotiated(key: &str) -> Answer {
        match key {
            // Declarations that ask for nothing (13.7, 13.26).
            "InitiatorAlias" | "X#NodeArchitecture" => Answer::Silent,
            _ => Answer::Value("NotUnderstood".into()),
        }
    }

    fn declare_segment(&mut self, value: &str) -> Result<Answer, Fault> {
        match text::number(value) {
            Some(bytes @ 512..=0xff_ffff) => {
                self.parameters.segment_bytes_max = bytes as usize;
                Ok(Answer::Silent)
            }
            _ => Err(Fault::new("a MaxRecvDataSegmentLength out of its range", "13.12")),
        }
    }

    fn negotiate(&mut self, limits: &Limits, key: &str, value: &str) -> Result<Answer, Fault> {
        let now = &mut self.parameters;
        Ok(match key {
            "HeaderDigest" => digest(value, &mut now.header_digest),
            "DataDigest" => digest(value, &mut now.data_digest),
            "MaxRecvDataSegmentLength" => return self.declare_segment(value),
            // OR; we do not insist.
            "InitialR2T" => boolean(value, |theirs| now.initial_r2t = theirs),
            // AND; we take it.
            "ImmediateData" => boolean(value, |theirs| now.immediate_data = theirs),
            "MaxBurstLength" => {
                least(value, 512..=0xff_ffff, limits.burst_max, |n| now.max_burst = n as usize)
            }
            "FirstBurstLength" => {
                let most = limits.first_burst_max;
                least(value, 512..=0xff_ffff, most, |n| now.first_burst = n as usize)
            }
            "MaxOutstandingR2T" => {
                let most = u32::from(limits.outstanding_r2t_max);
                least(value, 1..=0xffff, most, |n| now.outstanding_r2t = n as usize)
            }
            "MaxConnections" => least(value, 1..=0xffff, 1, |_| {}),
            "ErrorRecoveryLevel" => least(value, 0..=2, 0, |_| {}),
            // The larger of both; we need no wait. Nothing is retained at recovery level 0.
            "DefaultTime2Wait" => most(value, 0..=3600, 0),
            "DefaultTime2Retain" => least(value, 0..=3600, 0, |_| {}),
            "iSCSIProtocolLevel" => least(value, 0..=31, 2, |n| now.protocol_level = n as u8),
            // OR; we send and take everything in order.
            "DataPDUInOrder" | "DataSequenceInOrder" => constant(value, &["Yes", "No"], "Yes"),
            "TaskReporting" => match value.split(',').any(|offer| offer == "RFC3720") {
                true => Answer::Value("RFC3720".into()),
                false => reject(),
            },
            // Obsolete: may be answered "No" or "Reject", never "NotUnderstood" (13.25).
            "IFMarker" | "OFMarker" => Answer::Value("No".into()),
            _ => reject(),
        })
    }

    /// The parameters in force. What is first must fit into what is whole (13.14).
    pub fn settle(mut self) -> Parameters {
        let parameters = &mut self.parameters;
        parameters.first_burst = parameters.first_burst.min(parameters.max_burst);
        self.parameters
    }
}

fn is_irrelevant_in_discovery(key: &str) -> bool {
    matches!(
        key,
        "MaxConnections"
            | "InitialR2T"
            | "ImmediateData"
            | "MaxBurstLength"
            | "FirstBurstLength"
            | "MaxOutstandingR2T"
            | "DataPDUInOrder"
            | "DataSequenceInOrder"
            | "TaskReporting"
    )
}

fn reject() -> Answer {
    Answer::Value("Reject".into())
}

/// The first of the offered ones that we have (13.1).
fn digest(value: &str, chosen: &mut bool) -> Answer {
    for offer in value.split(',') {
        match offer {
            "None" => *chosen = false,
            "CRC32C" => *chosen = true,
            _ => continue,
        }
        return Answer::Value(offer.into());
    }
    reject()
}

fn boolean(value: &str, set: impl FnOnce(bool)) -> Answer {
    match value {
        "Yes" => set(true),
        "No" => set(false),
        _ => return reject(),
    }
    Answer::Value(value.into())
}

fn constant(value: &str, allowed: &[&str], answer: &str) -> Answer {
    if allowed.contains(&value) { Answer::Value(answer.into()) } else { reject() }
}

fn least(value: &str, range: std::ops::RangeInclusive<u64>, ours: u32, set: impl FnOnce(u32)) -> Answer {
    match text::number(value) {
        Some(theirs) if range.contains(&theirs) => {
            // The range ends below 2^32.
            let result = (theirs as u32).min(ours);
            set(result);
            Answer::Value(result.to_string())
        }
        _ => reject(),
    }
}

fn most(value: &str, range: std::ops::RangeInclusive<u64>, ours: u64) -> Answer {
    match text::number(value) {
        Some(theirs) if range.contains(&theirs) => Answer::Value(theirs.max(ours).to_string()),
        _ => reject(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(phase: Phase, key: &str, value: &str) -> String {
        match Negotiation::default().offer(&Limits::default(), phase, key, value) {
            Ok(Answer::Silent) => "-".into(),
            Ok(Answer::Value(value)) => value,
            Err(fault) => format!("fault {}", fault.clause),
        }
    }

    #[test]
    fn every_key_has_its_answer() {
        let table = [
            ("HeaderDigest", "CRC32C,None", "CRC32C"),
            ("HeaderDigest", "None,CRC32C", "None"),
            ("HeaderDigest", "X-own,CRC32C", "CRC32C"),
            ("DataDigest", "X-own", "Reject"),
            ("MaxConnections", "8", "1"),
            ("MaxConnections", "0", "Reject"),
            ("InitialR2T", "No", "No"),
            ("InitialR2T", "Yes", "Yes"),
            ("InitialR2T", "maybe", "Reject"),
            ("ImmediateData", "No", "No"),
            ("ImmediateData", "Yes", "Yes"),
            ("MaxRecvDataSegmentLength", "262144", "-"),
            ("MaxRecvDataSegmentLength", "511", "fault 13.12"),
            ("MaxRecvDataSegmentLength", "16777216", "fault 13.12"),
            ("MaxBurstLength", "16776192", "1048576"),
            ("MaxBurstLength", "0x1000", "4096"),
            ("MaxBurstLength", "100", "Reject"),
            ("FirstBurstLength", "65536", "65536"),
            ("FirstBurstLength", "16776192", "262144"),
            ("DefaultTime2Wait", "2", "2"),
            ("DefaultTime2Wait", "3601", "Reject"),
            ("DefaultTime2Retain", "20", "0"),
            ("MaxOutstandingR2T", "1", "1"),
            ("MaxOutstandingR2T", "100", "8"),
            ("DataPDUInOrder", "No", "Yes"),
            ("DataSequenceInOrder", "Yes", "Yes"),
            ("DataSequenceInOrder", "1", "Reject"),
            ("ErrorRecoveryLevel", "2", "0"),
            ("ErrorRecoveryLevel", "3", "Reject"),
            ("TaskReporting", "FastAbort,ResponseFence,RFC3720", "RFC3720"),
            ("TaskReporting", "FastAbort", "Reject"),
            ("iSCSIProtocolLevel", "1", "1"),
            ("iSCSIProtocolLevel", "31", "2"),
            ("IFMarker", "No", "No"),
            ("OFMarker", "Yes", "No"),
            ("IFMarkInt", "2048", "Reject"),
            ("OFMarkInt", "2048", "Reject"),
            ("InitiatorAlias", "me", "-"),
            ("X-com.example.speed", "11", "NotUnderstood"),
            ("RDMAExtensions", "Yes", "NotUnderstood"),
        ];
        for (key, value, expected) in table {
            assert_eq!(answer(Phase::Login, key, value), expected, "{key}={value}");
        }
    }

    #[test]
    fn phases_bound_what_may_be_negotiated() {
        assert_eq!(answer(Phase::DiscoveryLogin, "MaxBurstLength", "4096"), "Irrelevant");
        assert_eq!(answer(Phase::DiscoveryLogin, "HeaderDigest", "None"), "None");
        assert_eq!(answer(Phase::FullFeature, "MaxRecvDataSegmentLength", "4096"), "-");
        assert_eq!(answer(Phase::FullFeature, "MaxBurstLength", "4096"), "Reject");
        assert_eq!(answer(Phase::FullFeature, "X-k", "v"), "NotUnderstood");
    }

    #[test]
    fn a_key_is_offered_once() {
        let (mut talk, limits) = (Negotiation::default(), Limits::default());
        assert!(talk.offer(&limits, Phase::Login, "InitialR2T", "No").is_ok());
        assert!(talk.offer(&limits, Phase::Login, "InitialR2T", "No").is_err());
    }

    #[test]
    fn what_was_agreed_is_in_force() {
        let (mut talk, limits) = (Negotiation::default(), Limits::default());
        for (key, value) in [
            ("HeaderDigest", "CRC32C"),
            ("InitialR2T", "No"),
            ("MaxBurstLength", "8192"),
            ("FirstBurstLength", "65536"),
            ("MaxOutstandingR2T", "3"),
            ("MaxRecvDataSegmentLength", "1024"),
            ("iSCSIProtocolLevel", "2"),
        ] {
            talk.offer(&limits, Phase::Login, key, value).unwrap();
        }
        let expected = Parameters {
            header_digest: true,
            initial_r2t: false,
            max_burst: 8192,
            first_burst: 8192,
            outstanding_r2t: 3,
            segment_bytes_max: 1024,
            protocol_level: 2,
            ..Parameters::default()
        };
        assert_eq!(talk.settle(), expected);
    }
}
