//! The daemon as a host runs it: its configuration, exports on TCP with TLS, systemd.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use crate::common::wire::{content, with_vm, write};
use crate::common::{Place, both, has, until};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

/// An authority, and certificates that it signs.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// A directory as QEMU and libnbd want it.
    fn issue(&self, dir: &Path, role: &str, purpose: ExtendedKeyUsagePurpose) -> PathBuf {
        std::fs::create_dir_all(dir).unwrap();
        let mut params = CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, role);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![purpose];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(dir.join("ca-cert.pem"), &self.pem).unwrap();
        std::fs::write(dir.join(format!("{role}-cert.pem")), certificate.pem()).unwrap();
        std::fs::write(dir.join(format!("{role}-key.pem")), key.serialize_pem()).unwrap();
        dir.to_owned()
    }
}

/// A daemon in the foreground; it ends with the test.
struct Daemon(Child);

impl Daemon {
    fn start(place: &Place, words: &[&str], variables: &[(&str, String)]) -> Self {
        let mut command = place.command(&[&["serve"], words].concat());
        command.envs(variables.iter().map(|(n, v)| (*n, v.clone())));
        let mut daemon = Self(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap());
        until("it serves", || {
            assert!(daemon.0.try_wait().unwrap().is_none(), "the daemon ended");
            place.run(&["serve", "--status"]).status.success()
        });
        daemon
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill(); // it may have ended already
        let _ = self.0.wait();
    }
}

fn run(program: &str, words: &[&str]) -> Output {
    Command::new(program).args(words).stdin(Stdio::null()).output().unwrap()
}

fn good(program: &str, words: &[&str]) -> String {
    let out = run(program, words);
    assert!(out.status.success(), "{program} {words:?}: {}", both(&out));
    both(&out)
}

#[test]
fn exports_on_tcp_are_encrypted_and_for_those_with_a_certificate() {
    let place = with_vm("tls");
    write(&place, "sql01/scsi0:1", &[0, 9], 0x31);
    let wanted = content(&place, "sql01/scsi0:1");
    place.ok(&["serve", "--stop"]);
    let ours = Authority::new("ours");
    let pki = ours.issue(&place.home().join("pki"), "server", ExtendedKeyUsagePurpose::ServerAuth);
    let client = ours.issue(&place.dir().join("client"), "client", ExtendedKeyUsagePurpose::ClientAuth);
    let theirs = Authority::new("theirs").issue(
        &place.dir().join("theirs"),
        "client",
        ExtendedKeyUsagePurpose::ClientAuth,
    );
    std::fs::copy(client.join("ca-cert.pem"), theirs.join("ca-cert.pem")).unwrap();

    // Not without TLS, not with half of it.
    place.refuses(5, "KGM-CFG-0002", &["serve", "--nbd-tcp", "127.0.0.1:0"]);
    let text =
        place.refuses(3, "KGM-CFG-0003", &["serve", "--nbd-tcp", "127.0.0.1:0", "--nbd-tls", "nowhere"]);
    assert!(text.contains("server-cert.pem"), "{text}");
    let half = place.dir().join("half");
    std::fs::create_dir(&half).unwrap();
    for file in ["ca-cert.pem", "server-cert.pem", "server-key.pem"] {
        std::fs::write(half.join(file), "nonsense").unwrap();
    }
    place.refuses(
        2,
        "KGM-CFG-0004",
        &["serve", "--nbd-tcp", "127.0.0.1:0", "--nbd-tls", half.to_str().unwrap()],
    );

    // By the configuration in the home.
    std::fs::write(place.home().join("kagami.toml"), "[nbd]\ntcp = \"127.0.0.1:0\"\ntls = \"pki\"\n")
        .unwrap();
    assert_eq!(place.json(&["config", "check"])["verdict"], "good");
    let _daemon = Daemon::start(&place, &[], &[]);
    let exports = place.json(&["export", "ls"]);
    let export = exports.as_array().unwrap().iter().find(|e| e["name"] == "sql01/scsi0:1").unwrap();
    let uri = export["uris"][1].as_str().unwrap();
    let port =
        uri.strip_prefix("nbds://127.0.0.1:").unwrap_or_else(|| panic!("{uri}")).split('/').next().unwrap();
    assert!(pki.exists() && uri.ends_with("/sql01/scsi0%3A1"), "{uri}");
    std::fs::write(place.dir().join("d.raw"), &wanted).unwrap();
    let raw = place.dir().join("d.raw").display().to_string();
    if has("nbdinfo") {
        let by = |dir: &Path| {
            format!("nbds://localhost:{port}/sql01/scsi0%3A1?tls-certificates={}", dir.display())
        };
        let info = good("nbdinfo", &[&by(&client)]);
        assert!(info.contains("TLS"), "{info}");
        let bad = run("nbdinfo", &[&by(&theirs)]);
        assert!(!bad.status.success(), "a certificate of another authority: {}", both(&bad));
        let plain = run("nbdinfo", &[&format!("nbd://localhost:{port}/sql01/scsi0%3A1")]);
        assert!(!plain.status.success(), "without TLS: {}", both(&plain));
        if has("nbdcopy") {
            let back = place.dir().join("back.raw").display().to_string();
            good("nbdcopy", &[&by(&client), &back]);
            assert!(std::fs::read(&back).unwrap() == wanted);
        }
    }
    if has("qemu-img") {
        let object = format!("tls-creds-x509,id=t,endpoint=client,dir={}", client.display());
        let image = format!("driver=nbd,host=localhost,port={port},export=sql01/scsi0:1,tls-creds=t");
        let other = format!("driver=raw,file.filename={raw}");
        good("qemu-img", &["compare", "--object", &object, "--image-opts", &image, &other]);
    }
    // The Unix socket is there as before.
    assert!(content(&place, "sql01/scsi0:1") == wanted);
}

#[test]
fn a_configuration_is_checked_before_it_is_used() {
    let place = Place::new("config");
    let none = place.json(&["config", "check"]);
    assert!(none["verdict"].as_str().unwrap().contains("no file") && none["file"].is_null(), "{none}");
    std::fs::create_dir(place.home()).unwrap();
    let file = place.home().join("kagami.toml");
    std::fs::write(&file, "[nbd]\nport = 10809\n").unwrap();
    for words in [&["config", "check"][..], &["config", "show"], &["serve"]] {
        let text = place.refuses(2, "KGM-CFG-0001", words);
        assert!(text.contains("port") && text.contains("kagami.toml"), "{text}");
    }
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../contrib/kagami.toml");
    let shown = place.ok(&["config", "show", example.to_str().unwrap()]);
    assert!(shown.contains("plain = false") && shown.contains("level = \"info\""), "{shown}");
    place.refuses(3, "KGM-CFG-0404", &["config", "check", "/nowhere.toml"]);
    std::fs::write(&file, "[nbd]\ntcp = \"127.0.0.1:0\"\nplain = true\n[log]\njson = true\n").unwrap();
    // A daemon that a command starts has it too.
    let nbd = place.json(&["pool", "ls"]);
    assert_eq!(nbd, serde_json::json!([]));
    let status = place.json(&["serve", "--status"]);
    assert!(status["nbd"][1].as_str().unwrap().starts_with("nbd://127.0.0.1:"), "{status}");
    let log = std::fs::read_to_string(place.home().join("daemon.log")).unwrap();
    assert!(log.lines().next().unwrap().starts_with("{\""), "{log}");
}

#[test]
fn systemd_hears_that_it_is_ready_alive_and_ending() {
    let place = Place::new("notify");
    let socket = place.dir().join("notify.sock");
    let heard = UnixDatagram::bind(&socket).unwrap();
    heard.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let hear = || {
        let mut bytes = [0; 256];
        let length = heard.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    };
    let variables = [("NOTIFY_SOCKET", socket.display().to_string()), ("WATCHDOG_USEC", "400000".into())];
    let _daemon = Daemon::start(&place, &[], &variables);
    assert!(hear().contains("READY=1"));
    for _ in 0..3 {
        assert!(hear().contains("WATCHDOG=1"));
    }
    place.ok(&["serve", "--stop"]);
    while !hear().contains("STOPPING=1") {}
}

#[test]
fn the_unit_is_one_that_systemd_takes() {
    let contrib = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../contrib/systemd");
    let unit = std::fs::read_to_string(contrib.join("kagami.service")).unwrap();
    for line in
        ["Type=notify", "ExecStart=/usr/bin/kagami --home /var/lib/kagami serve", "StateDirectory=kagami"]
    {
        assert!(unit.lines().any(|l| l == line), "{line}");
    }
    // The command in it is one that the program has.
    let place = Place::new("unit");
    place.ok(&["--home", "/var/lib/kagami", "serve", "--help"]);
    if !std::process::Command::new("systemd-analyze")
        .arg("--version")
        .output()
        .is_ok_and(|o| o.status.success())
    {
        eprintln!("systemd-analyze is not here: the unit's words were looked at, not verified");
        return;
    }
    let copy = place.dir().join("kagami.service");
    let here = env!("CARGO_BIN_EXE_kagami");
    std::fs::write(&copy, unit.replace("/usr/bin/kagami", here)).unwrap();
    let out = run("systemd-analyze", &["verify", "--man=no", copy.to_str().unwrap()]);
    let said = both(&out);
    assert!(!said.contains("kagami.service"), "{said}");
}

#[test]
fn manual_and_completions_know_every_command() {
    let place = Place::new("pages");
    let man = place.dir().join("man");
    place.ok(&["man", man.to_str().unwrap()]);
    let nouns = [
        "pool",
        "lun",
        "snap",
        "clone",
        "group",
        "datastore",
        "disk",
        "rdm",
        "vm",
        "backup",
        "restore",
        "export",
        "job",
        "vmfs",
        "vmdk",
        "inspect",
        "serve",
        "config",
        "quickstart",
        "vmsnap",
    ];
    for noun in nouns {
        let page = std::fs::read_to_string(man.join(format!("kagami-{noun}.1"))).unwrap();
        assert!(page.contains(".TH") && page.len() > 300, "{noun}");
    }
    for verb in
        ["rdm-remap", "lun-undo-revert", "group-resolve", "backup-prune", "pool-import", "datastore-attach"]
    {
        assert!(man.join(format!("kagami-{verb}.1")).exists(), "{verb}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = place.ok(&["completions", shell]);
        assert!(nouns.iter().all(|noun| script.contains(noun)), "{shell}");
        let file = place.dir().join(shell);
        std::fs::write(&file, script).unwrap();
        if shell == "bash" {
            good("bash", &["-n", file.to_str().unwrap()]);
        }
    }
    assert!(!place.home().exists(), "no daemon was needed");
}

/// The commands of the README's jobs, each as it is written there, one after the other in a home of their own.
#[test]
fn the_readmes_commands_run_as_written() {
    let place = Place::new("readme");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    let (_, jobs) = readme.split_once("\n## Each real job\n").unwrap();
    let (jobs, _) = jobs.split_once("\n## ").unwrap();
    std::fs::copy(root.join("README.md"), place.dir().join("README.md")).unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_kagami")).parent().unwrap();
    let path = format!("{}:{}", program.display(), std::env::var("PATH").unwrap());
    let repo = place.dir().join("backup1").display().to_string();
    let commands: Vec<&str> = jobs.lines().filter_map(|l| l.strip_prefix("    ")).collect();
    assert!(commands.len() > 35, "{commands:?}");
    for command in commands {
        let mut shell = Command::new("sh");
        shell.args(["-c", &command.replace("/tmp/backup1", &repo)]).current_dir(place.dir());
        shell.env("PATH", &path).env("KAGAMI_HOME", place.home()).stdin(Stdio::null());
        let out = shell.output().unwrap();
        assert!(out.status.success(), "{command}\n{}", both(&out));
    }
}
