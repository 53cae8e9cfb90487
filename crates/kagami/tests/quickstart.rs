//! The quickstart as a user runs it: the page says what was done and proved, its commands work as typed, it is not run
//! over itself, one flipped byte is found, and it goes away without anything of the user's.
#![allow(clippy::unwrap_used)] // a test fails by panicking

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::both;

/// A directory of this test, which knows of no home.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("kagami-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    fn in_it(&self, program: &str, words: &[&str]) -> Output {
        let mut command = Command::new(program);
        command.args(words).env_remove("KAGAMI_HOME").env("NO_COLOR", "1").stdin(Stdio::null());
        command.current_dir(&self.0).output().unwrap()
    }

    fn run(&self, words: &[&str]) -> Output {
        self.in_it(env!("CARGO_BIN_EXE_kagami"), words)
    }

    /// Lines that are typed: one shell, as a user has one.
    fn shell(&self, lines: &[&str]) -> Output {
        self.in_it("sh", &["-e", "-c", &lines.join("\n")])
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        // Also when the test fails half way: the daemon is not left behind.
        let _ = self.run(&["quickstart", "--dir", "q", "--remove"]);
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

/// What was said, when it went well.
fn good(out: &Output) -> String {
    assert!(out.status.success(), "{}\n{}", out.status, both(out));
    String::from_utf8(out.stdout.clone()).unwrap()
}

/// The lines that a page wants to be typed: indented by four, between two lines of words.
fn commands<'a>(page: &'a str, after: &str) -> Vec<&'a str> {
    let (_, rest) = page.split_once(after).unwrap_or_else(|| panic!("no \"{after}\" in\n{page}"));
    rest.lines().skip(1).map_while(|line| line.strip_prefix("    ")).collect()
}

/// The number between two pieces of text, thousands apart as people write them.
fn number(text: &str, before: &str, after: &str) -> u64 {
    let (_, rest) = text.split_once(before).unwrap_or_else(|| panic!("no \"{before}\" in\n{text}"));
    let (digits, _) = rest.split_once(after).unwrap_or_else(|| panic!("no \"{after}\" after \"{before}\""));
    let digits: String = digits.chars().filter(char::is_ascii_digit).collect();
    digits.parse().unwrap_or_else(|_| panic!("no number after \"{before}\" in\n{text}"))
}

/// What the page says of one backup and its proof.
fn judge(part: &str, kind: &str, via: &str) -> u64 {
    assert!(part.contains(&format!("{kind}, via {via}, label crash")), "{part}");
    let meanwhile = number(part, "at the cut; ", " writes were acknowledged");
    assert!(meanwhile >= 1000, "{meanwhile} writes while it copied:\n{part}");
    for drive in ["C:", "D:"] {
        let proof = part.lines().find(|l| l.contains("proof") && l.contains(&format!(" {drive} ")));
        assert!(proof.is_some_and(|l| l.ends_with("equal")), "{drive}\n{part}");
    }
    assert_eq!(part.matches("blake3 ").count(), 2, "{part}");
    assert!(part.contains("one instant"), "{part}");
    let prefix = number(part, "C: and D: hold writes 1 to ", " made in turn");
    assert!(prefix > 0, "{part}");
    prefix
}

/// Flips one byte in the middle of the largest pack.
fn flip(repo: &Path) {
    let mut packs: Vec<PathBuf> =
        std::fs::read_dir(repo.join("packs")).unwrap().map(|e| e.unwrap().path()).collect();
    packs.sort_by_key(|p| std::fs::metadata(p).unwrap().len());
    let pack = packs.pop().unwrap();
    let mut bytes = std::fs::read(&pack).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&pack, bytes).unwrap();
}

#[test]
fn the_quickstart_does_and_proves_what_it_says() {
    let dir = Dir::new("quickstart");
    let page = good(&dir.run(&["quickstart", "--dir", "q", "--size", "64M"]));
    let (picture, rest) = page.split_once("  backup 1 ").unwrap();
    let mut last = 0;
    for word in ["VM ", "disk ", "mapping ", "LUN ", "snapshot ", "backup "] {
        let at = picture.lines().position(|l| l.trim_start().starts_with(word));
        let at = at.unwrap_or_else(|| panic!("no {word} in\n{picture}"));
        assert!(at >= last, "{word} is out of order:\n{picture}");
        last = at;
    }
    let (first, second) = rest.split_once("  backup 2 ").unwrap();
    let prefixes = (judge(first, "full", "redo"), judge(second, "incremental", "snapshot"));
    assert!(prefixes.0 + 1000 <= prefixes.1, "the second has what was written while the first was read");
    let writes = number(second, "in all ", " writes");
    assert!(writes >= prefixes.1 + 900, "{writes} in all, {prefixes:?}");

    // What it says to type works as it is typed.
    let typed = commands(&page, "What to type next");
    assert!(typed.len() > 6, "{page}");
    assert!(!typed.iter().any(|l| l.starts_with("kagami ")), "kagami is not in anybody's PATH: {typed:?}");
    good(&dir.shell(&typed));

    // Again: it says what is there and how it goes away, and does nothing.
    let again = good(&dir.run(&["quickstart", "--dir", "q"]));
    for there in ["pool1", "ds1", "sql01-d", "sql01, sql01-copy1, sql01-copy2"] {
        assert!(again.contains(there), "{there} is there:\n{again}");
    }
    good(&dir.shell(&commands(&again, "Look around")));

    // One byte of the repository.
    let repo = dir.0.join("q/repo");
    let verify = ["backup", "verify", "--repo", repo.to_str().unwrap()];
    good(&dir.run(&verify));
    flip(&repo);
    let out = dir.run(&verify);
    let said = both(&out);
    assert_eq!(out.status.code(), Some(2), "{said}");
    let named = said.split("disk scsi0:").nth(1).unwrap_or_else(|| panic!("no disk is named: {said}"));
    assert!(named.starts_with(['0', '1']), "{said}");
    assert!(number(named, ", byte ", ",") < 64 << 20, "{said}");

    // It goes, and what is the user's stays.
    std::fs::write(dir.0.join("q/mine"), "mine").unwrap();
    let remove = commands(&again, "Remove everything");
    assert_eq!(remove.len(), 1, "{again}");
    good(&dir.shell(&remove));
    let left: Vec<_> = std::fs::read_dir(dir.0.join("q")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["mine"]);
    assert_eq!(std::fs::read_to_string(dir.0.join("q/mine")).unwrap(), "mine");
    // A directory with something in it is not taken for a quickstart's.
    let out = dir.run(&["quickstart", "--dir", "q", "--size", "64M"]);
    assert_eq!(out.status.code(), Some(5), "{}", both(&out));
    assert_eq!(dir.run(&["quickstart", "--dir", "q", "--remove"]).status.code(), Some(3));
}

#[test]
fn a_quickstart_that_cannot_be_makes_nothing() {
    let dir = Dir::new("quicksmall");
    assert_eq!(dir.run(&["quickstart", "--dir", "q", "--size", "1M"]).status.code(), Some(2));
    assert!(!dir.0.join("q").exists());
    let said = good(&dir.run(&["quickstart", "--dir", "q", "-n"]));
    assert!(said.contains("would make") && !dir.0.join("q").exists(), "{said}");
}
