//! What went wrong, as every face shows it: what, why, what to do, and a stable code. The CLI prints three lines and
//! exits with the kind's code; REST answers `application/problem+json` (RFC 9457).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Class of a problem: decides the exit code and the HTTP status.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// It was tried and did not work.
    Failed,
    /// The command or the request makes no sense.
    Usage,
    /// There is no such object.
    NotFound,
    /// Another object, name or user is in the way.
    Conflict,
    /// The object is not what the client saw (`If-Match`).
    Changed,
    /// A safety check says no.
    Refused,
    /// The daemon does not answer.
    Unreachable,
    /// Some of many failed.
    Partial,
    /// What is on the medium is provably wrong.
    Corrupt,
}

impl Kind {
    /// Exit code of a command (ecosystem page, chapter 4).
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Conflict | Self::Changed => 4,
            Self::Refused => 5,
            Self::Unreachable => 6,
            Self::Partial => 7,
            Self::Corrupt => 1,
        }
    }

    /// HTTP status.
    pub fn status(self) -> u16 {
        match self {
            Self::Failed | Self::Partial | Self::Corrupt => 500,
            Self::Usage => 400,
            Self::NotFound => 404,
            Self::Conflict => 409,
            Self::Changed => 412,
            Self::Refused => 422,
            Self::Unreachable => 503,
        }
    }
}

/// One problem.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// Stable code, `KGM-XXX-NNNN`: the same in CLI, REST and logs.
    pub code: String,
    /// Class.
    pub kind: Kind,
    /// What did not happen, in one line.
    pub title: String,
    /// Why, in one line; may be empty.
    #[serde(default)]
    pub detail: String,
    /// What to type or to check next, in one line; may be empty.
    #[serde(default)]
    pub what_to_do: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.title)?;
        if !self.detail.is_empty() {
            write!(f, ": {}", self.detail)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problem {}

/// Result of whatever a user asked for.
pub type Outcome<T = ()> = Result<T, Problem>;

impl Problem {
    /// A problem with its code and the line that says what did not happen.
    pub fn new(code: &str, kind: Kind, title: impl Into<String>) -> Self {
        Self {
            code: code.to_owned(),
            kind,
            title: title.into(),
            detail: String::new(),
            what_to_do: look_at(code).to_owned(),
        }
    }

    /// Says why.
    pub fn why(mut self, detail: impl std::fmt::Display) -> Self {
        self.detail = detail.to_string();
        self
    }

    /// Says what to do next.
    pub fn hint(mut self, what_to_do: impl Into<String>) -> Self {
        let what_to_do = what_to_do.into();
        if !what_to_do.is_empty() {
            self.what_to_do = what_to_do;
        }
        self
    }

    /// Usage error in an argument.
    pub fn usage(title: impl Into<String>) -> Self {
        Self::new("KGM-CLI-0001", Kind::Usage, title)
    }

    /// There is no object of this noun with this name.
    pub fn not_found(noun: &str, name: &str) -> Self {
        let code = format!("KGM-{}-0404", short(noun));
        Self::new(&code, Kind::NotFound, format!("there is no {noun} \"{name}\""))
            .hint(format!("kagami {noun} ls"))
    }

    /// The name is taken.
    pub fn exists(noun: &str, name: &str) -> Self {
        let code = format!("KGM-{}-0409", short(noun));
        Self::new(&code, Kind::Conflict, format!("{noun} \"{name}\" exists already"))
            .hint(format!("kagami {noun} show {name}"))
    }

    /// Something below failed.
    pub fn failed(code: &str, title: impl Into<String>, why: impl std::fmt::Display) -> Self {
        Self::new(code, Kind::Failed, title).why(why)
    }

    /// Three lines for people: what, why, what to do.
    pub fn lines(&self) -> String {
        let mut out = format!("{} [{}]", self.title, self.code);
        for (label, text) in [("why:  ", &self.detail), ("next: ", &self.what_to_do)] {
            if !text.is_empty() {
                out.push_str("\n  ");
                out.push_str(label);
                out.push_str(text);
            }
        }
        out
    }
}

/// Where to look when nothing better is known: by the part of the code that names the noun.
fn look_at(code: &str) -> &'static str {
    match code.split('-').nth(1).unwrap_or_default() {
        "POL" => "kagami pool ls",
        "LUN" => "kagami lun ls",
        "SNP" => "kagami snap ls",
        "GRP" => "kagami group ls",
        "DST" => "kagami datastore ls",
        "DSK" => "kagami disk ls",
        "RDM" => "kagami rdm ls",
        "VMS" | "VMX" => "kagami vm ls",
        "BKP" => "kagami backup ls --repo DIR",
        "EXP" => "kagami export ls",
        "JOB" => "kagami job ls",
        "CFG" => "kagami config show",
        "IMG" | "VFS" | "VMD" => "kagami inspect FILE",
        "SRV" => "kagami serve --status",
        _ => "kagami NOUN VERB --help",
    }
}

/// The part of the code that names the noun.
fn short(noun: &str) -> &'static str {
    match noun {
        "pool" => "POL",
        "lun" => "LUN",
        "snap" => "SNP",
        "group" => "GRP",
        "datastore" => "DST",
        "disk" => "DSK",
        "rdm" => "RDM",
        "vm" => "VMS",
        "backup" => "BKP",
        "export" => "EXP",
        "job" => "JOB",
        _ => "GEN",
    }
}

/// A name for a pool, LUN, VM, ... that may be used as one.
///
/// Letters, digits, `.`, `_` and `-`, beginning with a letter or digit, at most 64: it becomes a file name, a word in
/// a command and a part of a URL.
pub fn check_name<'a>(noun: &str, name: &'a str) -> Outcome<&'a str> {
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let begins = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if begins && name.len() <= 64 && name.bytes().all(good) {
        return Ok(name);
    }
    Err(Problem::new(
        "KGM-GEN-0002",
        Kind::Usage,
        format!("\"{}\" is no name for a {noun}", name.escape_debug()),
    )
    .why("names have up to 64 letters, digits, '.', '_' and '-', and begin with a letter or digit"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_say_what_why_and_what_to_do() {
        let problem = Problem::not_found("lun", "a").why("it was removed");
        assert_eq!(
            problem.lines(),
            "there is no lun \"a\" [KGM-LUN-0404]\n  why:  it was removed\n  next: kagami lun ls"
        );
        assert_eq!((problem.kind.exit_code(), problem.kind.status()), (3, 404));
        let json = serde_json::to_string(&problem).unwrap();
        assert_eq!(serde_json::from_str::<Problem>(&json).unwrap(), problem);
    }

    #[test]
    fn names() {
        for good in ["a", "sql01-d", "A.b_c", "0"] {
            assert!(check_name("lun", good).is_ok(), "{good}");
        }
        for bad in ["", "..", ".a", "-a", "a/b", "a@b", "a b", "a\n", &"x".repeat(65), "\u{e9}"] {
            assert_eq!(check_name("lun", bad).unwrap_err().kind, Kind::Usage, "{bad}");
        }
    }
}
