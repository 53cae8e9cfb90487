//! CHAP and mutual CHAP (RFC 1994; RFC 7143 section 12.1.3): who knows the secret, shown without saying it.

use std::fmt;

use md5::Md5;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::codes::LoginStatus;
use super::ending::Refusal;
use super::text;

/// Shortest secret, in bytes: 96 bits (RFC 7143 section 9.2.1).
pub const SECRET_BYTES_MIN: usize = 12;
/// Longest secret and longest name, in bytes (values of a key are at most 255 bytes, 6.1).
pub const SECRET_BYTES_MAX: usize = 255;
/// Length of our challenges, in bytes; longest challenge of an initiator.
const CHALLENGE_BYTES: usize = 32;
const CHALLENGE_BYTES_MAX: usize = 1024;

/// A name and its secret. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    name: String,
    secret: Vec<u8>,
}

/// Why something is no name and secret for CHAP.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadCredentials {
    /// The secret is too short to be one, or too long.
    #[error("a CHAP secret has 12 to 255 bytes, this one has {0}")]
    Secret(usize),
    /// The name is empty or too long.
    #[error("a CHAP name has 1 to 255 bytes, this one has {0}")]
    Name(usize),
    /// Both directions with one secret: an initiator could be made to answer for us.
    #[error("the two directions of mutual CHAP must have different secrets")]
    Same,
}

impl Credentials {
    /// Checks the lengths.
    pub fn new(name: impl Into<String>, secret: impl Into<Vec<u8>>) -> Result<Self, BadCredentials> {
        let (name, secret) = (name.into(), secret.into());
        if name.is_empty() || name.len() > SECRET_BYTES_MAX || name.contains('\0') {
            return Err(BadCredentials::Name(name.len()));
        }
        if !(SECRET_BYTES_MIN..=SECRET_BYTES_MAX).contains(&secret.len()) {
            return Err(BadCredentials::Secret(secret.len()));
        }
        Ok(Self { name, secret })
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({:?})", self.name)
    }
}

/// What an initiator must know, and what we answer when it asks the same of us.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Chap {
    initiator: Credentials,
    target: Option<Credentials>,
}

impl Chap {
    /// One direction, or with `target` both.
    pub fn new(initiator: Credentials, target: Option<Credentials>) -> Result<Self, BadCredentials> {
        if target.as_ref().is_some_and(|target| target.secret == initiator.secret) {
            return Err(BadCredentials::Same);
        }
        Ok(Self { initiator, target })
    }
}

/// Digests of CHAP (numbers of IANA's registry of PPP authentication algorithms).
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Algorithm {
    Md5,
    Sha256,
}

impl Algorithm {
    fn of(number: &str) -> Option<Self> {
        match text::number(number) {
            Some(5) => Some(Self::Md5),
            Some(7) => Some(Self::Sha256),
            _ => None,
        }
    }

    fn number(self) -> &'static str {
        match self {
            Self::Md5 => "5",
            Self::Sha256 => "7",
        }
    }

    /// The digest of identifier, secret and challenge.
    fn response(self, id: u8, secret: &[u8], challenge: &[u8]) -> Vec<u8> {
        match self {
            Self::Md5 => {
                Md5::new().chain_update([id]).chain_update(secret).chain_update(challenge).finalize().to_vec()
            }
            Self::Sha256 => Sha256::new()
                .chain_update([id])
                .chain_update(secret)
                .chain_update(challenge)
                .finalize()
                .to_vec(),
        }
    }
}

/// How far an exchange has come.
enum State {
    /// The initiator has not chosen an algorithm.
    Begun,
    /// It was asked.
    Asked { algorithm: Algorithm, id: u8, challenge: [u8; CHALLENGE_BYTES] },
    /// It has shown that it knows the secret.
    Passed,
}

/// One exchange.
pub struct Exchange {
    chap: Chap,
    state: State,
}

const fn failure(what: &'static str) -> Refusal {
    Refusal { status: LoginStatus::AuthenticationFailure, what }
}

impl Exchange {
    /// CHAP was agreed on.
    pub fn new(chap: Chap) -> Self {
        Self { chap, state: State::Begun }
    }

    /// The initiator is who it says.
    pub fn is_passed(&self) -> bool {
        matches!(self.state, State::Passed)
    }

    /// Takes the CHAP keys of one text and appends what is to be answered.
    pub fn take(&mut self, keys: &[(&str, &str)], answer: &mut Vec<u8>) -> Result<(), Refusal> {
        let find = |name: &str| keys.iter().find(|(key, _)| *key == name).map(|(_, value)| *value);
        let is_ours = |key: &str| matches!(key, "CHAP_A" | "CHAP_N" | "CHAP_R" | "CHAP_I" | "CHAP_C");
        if !keys.iter().any(|(key, _)| is_ours(key)) {
            return Ok(());
        }
        match self.state {
            State::Begun => {
                let offers = find("CHAP_A").ok_or(failure("CHAP without CHAP_A"))?;
                self.ask(offers, answer)
            }
            State::Asked { algorithm, id, challenge } => {
                let name = find("CHAP_N").ok_or(failure("CHAP without CHAP_N"))?;
                let response = find("CHAP_R").ok_or(failure("CHAP without CHAP_R"))?;
                let response = text::binary(response).ok_or(failure("a CHAP_R that is no binary value"))?;
                let known = &self.chap.initiator;
                let expected = algorithm.response(id, &known.secret, &challenge);
                // Both are looked at, whatever the first one says.
                let well = response.ct_eq(&expected) & name.as_bytes().ct_eq(known.name.as_bytes());
                if !bool::from(well) {
                    return Err(failure("wrong CHAP name or response"));
                }
                if let Some(number) = find("CHAP_I") {
                    let theirs = find("CHAP_C").ok_or(failure("CHAP_I without CHAP_C"))?;
                    self.show(algorithm, number, theirs, &challenge, answer)?;
                }
                self.state = State::Passed;
                Ok(())
            }
            State::Passed => Err(failure("CHAP keys after CHAP had ended")),
        }
    }

    fn ask(&mut self, offers: &str, answer: &mut Vec<u8>) -> Result<(), Refusal> {
        let chosen = offers.split(',').find_map(Algorithm::of);
        let algorithm = chosen.ok_or(failure("no CHAP algorithm in common"))?;
        let mut random = [0; CHALLENGE_BYTES + 1];
        getrandom::fill(&mut random).map_err(|_| Refusal {
            status: LoginStatus::OutOfResources,
            what: "the system gives no random numbers",
        })?;
        let id = random[CHALLENGE_BYTES];
        let mut challenge = [0; CHALLENGE_BYTES];
        challenge.copy_from_slice(&random[..CHALLENGE_BYTES]);
        text::push(answer, "CHAP_A", algorithm.number());
        text::push(answer, "CHAP_I", &id.to_string());
        text::push(answer, "CHAP_C", &text::to_hexadecimal(&challenge));
        self.state = State::Asked { algorithm, id, challenge };
        Ok(())
    }

    /// The other direction.
    fn show(
        &self,
        algorithm: Algorithm,
        number: &str,
        theirs: &str,
        ours: &[u8],
        answer: &mut Vec<u8>,
    ) -> Result<(), Refusal> {
        let Some(known) = &self.chap.target else {
            return Err(failure("mutual CHAP was asked for, and no secret of the target is set"));
        };
        let id = text::number(number).and_then(|id| u8::try_from(id).ok());
        let id = id.ok_or(failure("a CHAP_I that is no identifier"))?;
        let challenge = text::binary(theirs).ok_or(failure("a CHAP_C that is no binary value"))?;
        if challenge.is_empty() || challenge.len() > CHALLENGE_BYTES_MAX {
            return Err(failure("a CHAP_C of no sensible length"));
        }
        if challenge == ours {
            return Err(failure("our own challenge sent back")); // 12.1.3: reflected
        }
        let response = algorithm.response(id, &known.secret, &challenge);
        text::push(answer, "CHAP_N", &known.name);
        text::push(answer, "CHAP_R", &text::to_hexadecimal(&response));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chap() -> Chap {
        let initiator = Credentials::new("user", "secretsecret1").unwrap();
        Chap::new(initiator, Some(Credentials::new("target", "secretsecret2").unwrap())).unwrap()
    }

    fn value<'a>(answer: &'a [(&str, &'a str)], key: &str) -> &'a str {
        answer.iter().find(|(name, _)| *name == key).map(|(_, value)| *value).unwrap()
    }

    /// Plays an initiator that knows `secret`; with a challenge it asks the target, too.
    fn play(name: &str, secret: &str, algorithms: &str, ask: Option<&str>) -> Result<Vec<u8>, Refusal> {
        let mut exchange = Exchange::new(chap());
        let mut out = Vec::new();
        exchange.take(&[("CHAP_A", algorithms)], &mut out)?;
        let asked = text::parse(&out).unwrap();
        let algorithm = Algorithm::of(value(&asked, "CHAP_A")).unwrap();
        let challenge = value(&asked, "CHAP_C");
        let id = value(&asked, "CHAP_I").parse().unwrap();
        let response = algorithm.response(id, secret.as_bytes(), &text::binary(challenge).unwrap());
        let response = text::to_hexadecimal(&response);
        let mut keys = vec![("CHAP_N", name), ("CHAP_R", &*response)];
        if let Some(ask) = ask {
            keys.extend([("CHAP_I", "9"), ("CHAP_C", if ask == "reflect" { challenge } else { ask })]);
        }
        let mut answer = Vec::new();
        exchange.take(&keys, &mut answer)?;
        assert!(exchange.is_passed());
        Ok(answer)
    }

    #[test]
    fn who_knows_the_secret_passes() {
        assert_eq!(play("user", "secretsecret1", "5", None), Ok(vec![]));
        assert_eq!(play("user", "secretsecret1", "7,5", None), Ok(vec![]));
        assert_eq!(play("user", "secretsecret1", "6,8,5", None), Ok(vec![]));
        for (name, secret, algorithms) in [
            ("user", "secretsecret2", "5"),
            ("other", "secretsecret1", "5"),
            ("user", "secretsecret1", "6,8"),
        ] {
            let refused = play(name, secret, algorithms, None).unwrap_err();
            assert_eq!(refused.status, LoginStatus::AuthenticationFailure);
        }
    }

    #[test]
    fn the_target_shows_its_secret_too() {
        for (number, algorithm) in [("5", Algorithm::Md5), ("7", Algorithm::Sha256)] {
            let answer = play("user", "secretsecret1", number, Some("0x0102030405060708")).unwrap();
            let answer = text::parse(&answer).unwrap();
            let expected = algorithm.response(9, b"secretsecret2", &[1, 2, 3, 4, 5, 6, 7, 8]);
            assert_eq!(value(&answer, "CHAP_R"), text::to_hexadecimal(&expected));
            assert_eq!(value(&answer, "CHAP_N"), "target");
        }
        for bad in ["reflect", "", "0x", "zz"] {
            assert!(play("user", "secretsecret1", "5", Some(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn secrets_are_long_and_differ() {
        assert_eq!(Credentials::new("u", "short"), Err(BadCredentials::Secret(5)));
        assert_eq!(Credentials::new("", "secretsecret1"), Err(BadCredentials::Name(0)));
        let one = Credentials::new("u", "secretsecret1").unwrap();
        assert_eq!(Chap::new(one.clone(), Some(one.clone())), Err(BadCredentials::Same));
        assert_eq!(format!("{one:?}"), "Credentials(\"u\")");
    }

    #[test]
    fn rfc_1994_is_what_is_computed() {
        // MD5 of 0x01, "secretsecret1", 0x00..0x0f, by md5sum.
        let challenge: Vec<u8> = (0..16).collect();
        let found = Algorithm::Md5.response(1, b"secretsecret1", &challenge);
        assert_eq!(text::to_hexadecimal(&found), EXPECTED_MD5);
    }

    const EXPECTED_MD5: &str = "0x71133038ef3394e5d0284e40a4a27ea2";
}
