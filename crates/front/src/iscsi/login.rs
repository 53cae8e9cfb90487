//! Login (RFC 7143 sections 6.3 and 11.12): who it is, which target, what is agreed. No I/O here: requests go in, what
//! is to be answered comes out.

use std::rc::Rc;

use super::chap::{Chap, Exchange};
use super::codes::{LoginStatus, flag, stage};
use super::ending::{Fault, Refusal};
use super::format::LoginRequest;
use super::name::Name;
use super::negotiate::{Answer, Limits, Negotiation, Parameters, Phase};
use super::target::{Access, Target, Targets};
use super::text;

/// Most text of one exchange, over all its PDUs, in bytes.
const TEXT_BYTES_MAX: usize = 16 << 10;
/// Most requests of one login.
const REQUESTS_MAX: u32 = 64;

/// What a session is for.
#[derive(Clone)]
pub(super) enum Purpose {
    /// Only to ask for targets.
    Discovery,
    /// To use this target.
    Normal(Rc<Target>, Access),
}

/// A login that has come to its end.
pub(super) struct Agreed {
    pub initiator: Name,
    pub isid: [u8; 6],
    /// Of the session to be continued; 0: a new one.
    pub tsih: u16,
    pub cid: u16,
    pub purpose: Purpose,
    pub parameters: Parameters,
    /// CmdSN of the first command.
    pub cmd_sn: u32,
}

/// What to answer to one request.
pub(super) struct Turn {
    /// Flags of the response.
    pub flags: u8,
    /// Text of the response.
    pub text: Vec<u8>,
    /// The next stage is the full-feature phase.
    pub is_last: bool,
}

/// Who logs in, once it has said so.
struct Party {
    initiator: Name,
    purpose: Purpose,
    /// How it must show who it is.
    chap: Option<Chap>,
}

/// A login under way.
pub(super) struct Login {
    targets: Rc<Targets>,
    limits: Limits,
    group: u16,
    /// Identity of the first request, which all must have.
    begun: Option<Begun>,
    requests: u32,
    /// Text of requests that are to be continued.
    unfinished: Vec<u8>,
    party: Option<Party>,
    exchange: Option<Exchange>,
    /// AuthMethod was negotiated.
    method_chosen: bool,
    negotiation: Negotiation,
    /// MaxRecvDataSegmentLength was said.
    declared: bool,
}

/// What the first request fixes.
struct Begun {
    stage: u8,
    isid: [u8; 6],
    tsih: u16,
    cid: u16,
    cmd_sn: u32,
}

const fn refusal(status: LoginStatus, what: &'static str) -> Refusal {
    Refusal { status, what }
}

impl Login {
    /// Nothing said yet. `group` is the portal group of the portal.
    pub fn new(targets: &Rc<Targets>, limits: &Limits, group: u16) -> Self {
        Self {
            targets: Rc::clone(targets),
            limits: limits.clone(),
            group,
            begun: None,
            requests: 0,
            unfinished: Vec::new(),
            party: None,
            exchange: None,
            method_chosen: false,
            negotiation: Negotiation::default(),
            declared: false,
        }
    }

    /// Takes one request.
    pub fn take(&mut self, request: &LoginRequest, text: &[u8]) -> Result<Turn, Refusal> {
        self.requests += 1;
        if self.requests > REQUESTS_MAX {
            return Err(refusal(LoginStatus::InitiatorError, "a login without end"));
        }
        let (current, next) = (request.flags >> 2 & 3, request.flags & 3);
        let transit = request.flags & flag::TRANSIT != 0;
        let goes_on = request.flags & flag::CONTINUE != 0;
        self.check(request, current)?;
        if self.unfinished.len() + text.len() > TEXT_BYTES_MAX {
            return Err(refusal(LoginStatus::InitiatorError, "a login text without end"));
        }
        self.unfinished.extend(text);
        if goes_on {
            if transit {
                return Err(Fault::new("a login request with both T and C", "11.12.2").into());
            }
            return Ok(Turn { flags: current << 2, text: Vec::new(), is_last: false });
        }
        if transit && (next <= current || next == 2) {
            return Err(Fault::new("a login stage that cannot follow", "11.12.3").into());
        }
        let whole = std::mem::take(&mut self.unfinished);
        let keys = text::parse(&whole)?;
        let mut answer = Vec::new();
        let is_first = self.party.is_none();
        if is_first {
            self.introduce(&keys, &mut answer)?;
        }
        if current == stage::SECURITY {
            self.authenticate(&keys, &mut answer)?;
        } else if !self.is_authentic() {
            return Err(refusal(LoginStatus::AuthenticationFailure, "security negotiation was left out"));
        }
        self.operate(current, &keys, is_first, &mut answer)?;
        self.turn(current, next, transit, answer)
    }

    /// What all requests of a login must have in common.
    fn check(&mut self, request: &LoginRequest, current: u8) -> Result<(), Refusal> {
        let Some(begun) = &mut self.begun else {
            if request.version_min > 0 {
                return Err(refusal(LoginStatus::UnsupportedVersion, "no common version"));
            }
            if current > stage::OPERATIONAL {
                return Err(Fault::new("a login that begins in no stage", "11.12.3").into());
            }
            self.begun = Some(Begun {
                stage: current,
                isid: request.isid,
                tsih: request.tsih.get(),
                cid: request.cid.get(),
                cmd_sn: request.cmd_sn.get(),
            });
            return Ok(());
        };
        let same =
            (begun.isid, begun.tsih, begun.cid) == (request.isid, request.tsih.get(), request.cid.get());
        if !same {
            return Err(Fault::new("a login that changes its ISID, TSIH or CID", "11.12").into());
        }
        if current != begun.stage {
            return Err(Fault::new("a login request of another stage", "11.12.3").into());
        }
        begun.cmd_sn = request.cmd_sn.get();
        Ok(())
    }

    /// The first whole text says who it is and what it wants (6.3.1).
    fn introduce(&mut self, keys: &[(&str, &str)], answer: &mut Vec<u8>) -> Result<(), Refusal> {
        let find = |name: &str| keys.iter().find(|(key, _)| *key == name).map(|(_, value)| *value);
        let missing = |what| refusal(LoginStatus::MissingParameter, what);
        let initiator = find("InitiatorName").ok_or(missing("no InitiatorName"))?;
        let initiator = Name::new(initiator)
            .map_err(|_| refusal(LoginStatus::InitiatorError, "an InitiatorName that is none"))?;
        let (purpose, chap) = match find("SessionType") {
            Some("Discovery") => (Purpose::Discovery, self.targets.discovery_chap()),
            Some("Normal") | None => {
                let name = find("TargetName").ok_or(missing("no TargetName"))?;
                let (target, access) = self.find_target(name, &initiator)?;
                let chap = access.chap.clone();
                text::push(answer, "TargetPortalGroupTag", &self.group.to_string());
                if !target.alias().is_empty() {
                    text::push(answer, "TargetAlias", target.alias());
                }
                (Purpose::Normal(target, access), chap)
            }
            Some(_) => {
                return Err(refusal(LoginStatus::SessionTypeNotSupported, "a SessionType that is none"));
            }
        };
        self.party = Some(Party { initiator, purpose, chap });
        Ok(())
    }

    fn find_target(&self, name: &str, initiator: &Name) -> Result<(Rc<Target>, Access), Refusal> {
        let not_found = refusal(LoginStatus::NotFound, "no such target here");
        let name = Name::new(name).map_err(|_| not_found)?;
        let target = self.targets.get(&name).ok_or(not_found)?;
        if !target.groups().contains(&self.group) {
            return Err(not_found);
        }
        let access = target.access(initiator).ok_or_else(|| {
            tracing::info!(%initiator, target = %target.name(), "not allowed to use the target");
            refusal(LoginStatus::AuthorizationFailure, "the initiator may not use this target")
        })?;
        Ok((target, access))
    }

    fn is_authentic(&self) -> bool {
        match (&self.party, &self.exchange) {
            (_, Some(exchange)) => exchange.is_passed(),
            (Some(party), None) => party.chap.is_none(),
            (None, None) => false,
        }
    }

    /// Keys of the security stage.
    fn authenticate(&mut self, keys: &[(&str, &str)], answer: &mut Vec<u8>) -> Result<(), Refusal> {
        if let Some((_, offers)) = keys.iter().find(|(key, _)| *key == "AuthMethod") {
            if std::mem::replace(&mut self.method_chosen, true) {
                return Err(Fault::new("AuthMethod negotiated twice", "6.2").into());
            }
            let chap = self.party.as_ref().and_then(|party| party.chap.clone());
            let method = if chap.is_some() { "CHAP" } else { "None" };
            if !offers.split(',').any(|offer| offer == method) {
                let what = match chap {
                    Some(_) => "the target wants CHAP, and the initiator does not offer it",
                    None => "the initiator wants to be asked, and the target knows no secret of it",
                };
                return Err(refusal(LoginStatus::AuthenticationFailure, what));
            }
            text::push(answer, "AuthMethod", method);
            self.exchange = chap.map(Exchange::new);
        }
        match &mut self.exchange {
            Some(exchange) => exchange.take(keys, answer),
            None => Ok(()),
        }
    }

    /// Operational keys, taken in either stage.
    fn operate(
        &mut self,
        current: u8,
        keys: &[(&str, &str)],
        is_first: bool,
        answer: &mut Vec<u8>,
    ) -> Result<(), Refusal> {
        let phase = match self.party.as_ref().map(|party| &party.purpose) {
            Some(Purpose::Discovery) => Phase::DiscoveryLogin,
            _ => Phase::Login,
        };
        for (key, value) in keys {
            match *key {
                "InitiatorName" | "SessionType" | "TargetName" if is_first => continue,
                "InitiatorName" | "SessionType" | "TargetName" => {
                    return Err(Fault::new("a name said again", "13.5").into());
                }
                "AuthMethod" | "CHAP_A" | "CHAP_N" | "CHAP_R" | "CHAP_I" | "CHAP_C"
                    if current == stage::SECURITY =>
                {
                    continue;
                }
                _ => {}
            }
            if let Answer::Value(value) = self.negotiation.offer(&self.limits, phase, key, value)? {
                text::push(answer, key, &value);
            }
        }
        if current == stage::OPERATIONAL && !self.declared {
            self.declared = true;
            text::push(answer, "MaxRecvDataSegmentLength", &self.limits.segment_bytes_max.to_string());
        }
        Ok(())
    }

    /// Whether the next stage may begin.
    fn turn(&mut self, current: u8, next: u8, transit: bool, text: Vec<u8>) -> Result<Turn, Refusal> {
        if !transit {
            return Ok(Turn { flags: current << 2, text, is_last: false });
        }
        if !self.is_authentic() {
            if self.exchange.is_none() {
                let what = "the target wants CHAP, and the initiator does not offer it";
                return Err(refusal(LoginStatus::AuthenticationFailure, what));
            }
            return Ok(Turn { flags: current << 2, text, is_last: false }); // not yet
        }
        if let Some(begun) = &mut self.begun {
            begun.stage = next;
        }
        let is_last = next == stage::FULL_FEATURE;
        Ok(Turn { flags: flag::TRANSIT | current << 2 | next, text, is_last })
    }

    /// What was agreed. `None` before a [`Turn`] that was the last.
    pub fn agreed(self) -> Option<Agreed> {
        let (begun, party) = (self.begun?, self.party?);
        Some(Agreed {
            initiator: party.initiator,
            isid: begun.isid,
            tsih: begun.tsih,
            cid: begun.cid,
            purpose: party.purpose,
            parameters: self.negotiation.settle(),
            cmd_sn: begun.cmd_sn,
        })
    }
}
