//! A stock QEMU and a real Linux on a disk of `examples/vhost_file`, which is killed in the middle again and again. Run by
//! `./test guest`, which brings QEMU and the kernel.
#![allow(clippy::unwrap_used)] // a test may

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Longest time that the guest may take for anything, emulated on a machine with other things to do.
const PATIENCE: Duration = Duration::from_secs(300);
const DISK_BYTES: u64 = 64 << 20;
/// Files that the guest writes; each fifth time one goes again.
const FILES: u64 = 60;
/// In the order of loading.
const MODULES: &str = "virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk";

/// Runs a shell script; panics with its output when it fails.
fn shell(script: &str) -> String {
    let out = Command::new("sh").args(["-euc", script]).stdin(Stdio::null()).output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{script}\n{stdout}\n{stderr}");
    stdout.trim().to_string()
}

/// Takes Debian's cloud kernel apart (downloaded once into `cache`) and packs the initramfs; answers both.
fn boot(cache: &Path) -> (String, String) {
    std::fs::create_dir_all(cache).unwrap();
    let dir = cache.display();
    let init = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/init");
    shell(&format!(
        r#"cd {dir}
        if ! ls root/boot/vmlinuz-* >/dev/null 2>&1; then
            name() {{ apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/.*Depends: *//p' | head -1; }}
            package=$(name)
            [ -n "$package" ] || {{ apt-get update -qq; package=$(name); }}
            rm -f ./*.deb
            apt-get download -qq "$package" >/dev/null
            rm -rf root && mkdir root && dpkg-deb -x "$package"_*.deb root
        fi
        rm -rf vhost && mkdir -p vhost/bin vhost/sbin vhost/mods vhost/etc
        cp /bin/busybox vhost/bin/
        cp /etc/mke2fs.conf vhost/etc/
        for p in /sbin/mkfs.ext4 /sbin/e2fsck; do
            cp -L "$p" vhost/sbin/
            for l in $(ldd "$p" | grep -o '/[^ ]*'); do mkdir -p "vhost$(dirname "$l")"; cp -L "$l" "vhost$l"; done
        done
        for m in {MODULES}; do
            f=$(find root/lib/modules -name "$m.ko")
            cp "$f" vhost/mods/ && printf '%s\n' "$m.ko" >> vhost/mods/order
        done
        install -m 755 {} vhost/init
        cd vhost && find . | cpio -o -H newc --quiet | gzip -1 > ../vhost.gz"#,
        init.display()
    ));
    (shell(&format!("ls {dir}/root/boot/vmlinuz-*")), format!("{dir}/vhost.gz"))
}

/// The example, which cargo has built beside this test.
fn serve(disk: &Path, socket: &Path) -> Child {
    let own = std::env::current_exe().unwrap();
    let example = own.parent().and_then(Path::parent).unwrap().join("examples/vhost_file");
    assert!(example.exists(), "cargo build --release -p front --example vhost_file");
    let child = Command::new(example).args([disk, socket]).stdout(Stdio::null()).spawn().unwrap();
    let begun = Instant::now();
    while !socket.exists() {
        assert!(begun.elapsed() < PATIENCE, "it does not listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    child
}

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

struct Guest {
    child: Child,
    lines: mpsc::Receiver<String>,
    seen: Vec<String>,
}

impl Guest {
    fn start((kernel, initramfs): &(String, String), socket: &Path) -> Self {
        let chardev = format!("socket,id=d,path={},reconnect=1", socket.display());
        let mut child = Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "256", "-nodefaults"])
            .args(["-object", "memory-backend-memfd,id=m,size=256M,share=on", "-numa", "node,memdev=m"])
            .args(["-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"])
            .args(["-kernel", kernel, "-initrd", initramfs])
            .args(["-append", "console=ttyS0 quiet rdinit=/init mitigations=off"])
            .args(["-chardev", &chardev, "-device", "vhost-user-blk-pci,chardev=d,num-queues=2"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-system-x86_64 starts");
        let (send, lines) = mpsc::channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in stdout.split(b'\n').map_while(Result::ok) {
                if send.send(String::from_utf8_lossy(&line).trim().to_string()).is_err() {
                    return;
                }
            }
        });
        Self { child, lines, seen: Vec::new() }
    }

    /// What follows `word` in the next line that begins with it.
    fn wait(&mut self, word: &str) -> String {
        loop {
            let Ok(line) = self.lines.recv_timeout(PATIENCE) else {
                panic!("the guest did not say {word}:\n{}", self.seen.join("\n"));
            };
            self.seen.push(line.clone());
            let bad = ["FAILED", "Kernel panic", "I/O error"].iter().any(|bad| line.contains(bad));
            assert!(!bad, "{}", self.seen.join("\n"));
            if let Some(rest) = line.strip_prefix(word) {
                return rest.trim().to_string();
            }
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended
        let _ = self.child.wait();
    }
}

#[test]
fn a_guest_of_qemu_goes_on_over_a_back_end_that_is_killed_and_killed_again() {
    if std::env::var_os("KAGAMI_GUEST").is_none() {
        return eprintln!("SKIPPED: guest tests run by ./test guest");
    }
    let place: PathBuf = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vhost-guest");
    let _ = std::fs::remove_dir_all(&place); // of a run that failed
    std::fs::create_dir_all(&place).unwrap();
    let boot = boot(&Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest-cache"));
    let (disk, socket) = (place.join("disk"), place.join("sock"));
    std::fs::File::create(&disk).unwrap().set_len(DISK_BYTES).unwrap();
    let mut server = serve(&disk, &socket);
    let mut guest = Guest::start(&boot, &socket);
    assert_eq!(guest.wait("DISK "), format!("{} kagami-file 2", DISK_BYTES / 512));
    for number in 1..=FILES {
        assert_eq!(guest.wait("WROTE "), number.to_string());
        if number % 12 == 0 {
            // Requests are under way; the front end keeps what says so, and the next back end does them.
            kill(server);
            std::fs::remove_file(&socket).unwrap();
            server = serve(&disk, &socket);
        }
    }
    assert_eq!(guest.wait("GOOD "), (FILES - FILES / 5).to_string());
    let hash = guest.wait("HASH ");
    guest.wait("END");
    assert!(guest.child.wait().unwrap().success());
    kill(server);
    assert_eq!(shell(&format!("sha256sum {}", disk.display())).split(' ').next(), Some(&*hash));
    std::fs::remove_dir_all(&place).unwrap();
}
