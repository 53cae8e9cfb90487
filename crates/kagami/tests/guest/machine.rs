//! A real Linux under QEMU (TCG): Debian's cloud kernel, an initramfs of busybox and e2fsprogs, two virtio disks.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Runs a shell script; panics with its output when it fails.
pub fn shell(script: &str) -> String {
    let out = Command::new("sh").args(["-euc", script]).stdin(Stdio::null()).output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{script}\n{stdout}\n{stderr}");
    stdout.trim().to_string()
}

/// What a guest boots from.
pub struct Boot {
    kernel: PathBuf,
    initramfs: PathBuf,
}

/// In the order of loading.
const MODULES: &str = "virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk";

impl Boot {
    /// Takes Debian's cloud kernel apart (downloaded once into `cache`) and packs the initramfs.
    pub fn prepare(cache: &Path) -> Boot {
        std::fs::create_dir_all(cache).unwrap();
        let dir = cache.display();
        shell(&format!(
            r#"cd {dir}
            if ! ls root/boot/vmlinuz-* >/dev/null 2>&1; then
                name() {{ apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/.*Depends: *//p' | head -1; }}
                package=$(name)
                [ -n "$package" ] || {{ apt-get update -qq; package=$(name); }}
                rm -f ./*.deb
                apt-get download -qq "$package" >/dev/null
                rm -rf root && mkdir root && dpkg-deb -x "$package"_*.deb root
            fi"#
        ));
        let init = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/init");
        shell(&format!(
            r#"cd {dir}
            rm -rf initramfs && mkdir -p initramfs/bin initramfs/sbin initramfs/mods initramfs/etc
            cp /bin/busybox initramfs/bin/
            cp /etc/mke2fs.conf initramfs/etc/
            for p in /sbin/mkfs.ext4 /sbin/e2fsck; do
                cp -L "$p" initramfs/sbin/
                for l in $(ldd "$p" | grep -o '/[^ ]*'); do mkdir -p "initramfs$(dirname "$l")"; cp -L "$l" "initramfs$l"; done
            done
            for m in {MODULES}; do
                f=$(find root/lib/modules -name "$m.ko")
                cp "$f" initramfs/mods/ && printf '%s\n' "$m.ko" >> initramfs/mods/order
            done
            install -m 755 {} initramfs/init
            cd initramfs && find . | cpio -o -H newc --quiet | gzip -1 > ../initramfs.gz"#,
            init.display()
        ));
        let kernel = PathBuf::from(shell(&format!("ls {dir}/root/boot/vmlinuz-*")));
        Boot { kernel, initramfs: cache.join("initramfs.gz") }
    }

    /// Boots in a mode of `tests/guest/init` with C: and D: at these places (anything QEMU opens as raw).
    pub fn start(&self, mode: &str, c: &str, d: &str) -> Guest {
        let drive = |file: &str| format!("file={file},format=raw,if=virtio,cache=none,discard=unmap");
        let mut child = Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1", "-m", "256", "-nodefaults"])
            .args(["-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"])
            .args(["-kernel", &self.kernel.to_string_lossy(), "-initrd", &self.initramfs.to_string_lossy()])
            .args([
                "-append",
                &format!("console=ttyS0 quiet rdinit=/init mitigations=off kagami.mode={mode}"),
            ])
            .args(["-drive", &drive(c), "-drive", &drive(d)])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-system-x86_64 starts");
        let (send, lines) = mpsc::channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in stdout.split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim().to_string();
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        Guest { child, lines, seen: Vec::new() }
    }
}

/// A running guest and what it said on its serial line.
pub struct Guest {
    child: Child,
    lines: mpsc::Receiver<String>,
    /// Every line so far.
    pub seen: Vec<String>,
}

impl Guest {
    /// Takes what has come since, without waiting.
    pub fn drain(&mut self) {
        self.seen.extend(self.lines.try_iter());
    }

    /// Waits for a line that `wanted` accepts; panics with the serial log after `limit`.
    pub fn wait(&mut self, limit: Duration, wanted: impl Fn(&str) -> bool) -> String {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    assert!(
                        !line.contains("FAILED") && !line.contains("Kernel panic"),
                        "{}",
                        self.seen.join("\n")
                    );
                    if wanted(&line) {
                        return line;
                    }
                }
                Err(_) => panic!("the guest did not say what was waited for:\n{}", self.seen.join("\n")),
            }
        }
    }

    /// The highest number of a file on `letter` that the guest said is on stable storage.
    pub fn wrote(&self, letter: &str) -> u64 {
        let number =
            |line: &String| line.strip_prefix(&format!("WROTE {letter} "))?.split(' ').next()?.parse().ok();
        self.seen.iter().filter_map(number).max().unwrap_or(0)
    }

    /// Pulls the plug.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.drain();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.kill();
    }
}
