//! SG_IO on a real SCSI device: Linux' `scsi_debug` in a guest under QEMU (TCG). The program that runs in the guest is
//! this one. By `./test guest`.

#![allow(clippy::unwrap_used)] // a test

use std::path::Path;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use block::{Segments, SegmentsMut};
use lane::sg::SgDisk;
use scsi::pass_through::PassThrough;
use scsi::{Attribute, LunMap, Nexus, Offered, Port, Reply, Status, TransportId, lun_bytes};

/// Set in the guest: the device.
const DEVICE: &str = "KAGAMI_SG_DEVICE";

fn shell(script: &str) -> String {
    let out = Command::new("sh").args(["-euc", script]).stdin(Stdio::null()).output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{script}\n{stdout}\n{stderr}");
    stdout.trim().to_string()
}

const INIT: &str = r#"#!/bin/busybox sh
B=/bin/busybox
export PATH=/bin
$B mkdir -p /proc /sys /dev /tmp
$B mount -t proc p /proc
$B mount -t sysfs s /sys
$B mount -t devtmpfs d /dev
for m in $($B cat /mods/order); do
    case $m in scsi_debug) $B insmod /mods/$m.ko dev_size_mb=16 ;; *) $B insmod /mods/$m.ko ;; esac
done
i=0
while [ $i -lt 200 ] && ! [ -b /dev/sda ]; do $B usleep 50000; i=$((i + 1)); done
KAGAMI_SG_DEVICE=/dev/sda RUST_BACKTRACE=0 /bin/probe --exact in_the_guest --nocapture --include-ignored && echo PROBE WELL
$B poweroff -f
"#;

#[test]
fn guest_sg_io_on_a_real_device() {
    if std::env::var_os("KAGAMI_GUEST").is_none() {
        eprintln!("SKIPPED: guest tests run by ./test guest");
        return;
    }
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest-cache");
    std::fs::create_dir_all(cache.join("sg")).unwrap();
    std::fs::write(cache.join("sg/init"), INIT).unwrap();
    let probe = std::env::current_exe().unwrap();
    // The kernel is the one of kagami's guests, fetched once.
    shell(&format!(
        r#"cd {}
        if ! ls root/boot/vmlinuz-* >/dev/null 2>&1; then
            name() {{ apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/.*Depends: *//p' | head -1; }}
            package=$(name)
            [ -n "$package" ] || {{ apt-get update -qq; package=$(name); }}
            rm -f ./*.deb
            apt-get download -qq "$package" >/dev/null
            rm -rf root && mkdir root && dpkg-deb -x "$package"_*.deb root
        fi
        cd sg
        rm -rf fs && mkdir -p fs/bin fs/mods
        cp /bin/busybox fs/bin/
        install -m 755 init fs/init
        cp {} fs/bin/probe
        for l in $(ldd fs/bin/probe | grep -o '/[^ ]*'); do mkdir -p "fs$(dirname "$l")"; cp -L "$l" "fs$l"; done
        load() {{
            [ -f "fs/mods/$1.ko" ] && return
            f=$(find ../root/lib/modules -name "$1.ko" -o -name "$(echo "$1" | tr _ -).ko" | head -1)
            [ -n "$f" ] || return 0
            cp "$f" "fs/mods/$1.ko"
            for d in $(grep -ao 'depends=[a-zA-Z0-9_,-]*' "$f" | cut -d= -f2 | tr ',-' ' _'); do load "$d"; done
            echo "$1" >> fs/mods/order
        }}
        # Modules before what needs them: each is named after those it depends on.
        load_in_order() {{ for m in "$@"; do load "$m"; done; }}
        load_in_order sd_mod scsi_debug
        cd fs && find . | cpio -o -H newc --quiet | gzip -1 > ../fs.gz"#,
        cache.display(),
        probe.display()
    ));
    let seen = shell(&format!(
        "timeout 120 qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 1 -m 384 -nodefaults -no-user-config \
         -display none -no-reboot -serial stdio -kernel {0}/root/boot/vmlinuz-* -initrd {0}/sg/fs.gz \
         -append 'console=ttyS0 quiet rdinit=/init mitigations=off' < /dev/null || true",
        cache.display()
    ));
    assert!(seen.contains("PROBE WELL"), "{seen}");
    eprintln!("{}", seen.lines().find(|l| l.contains("passed ")).unwrap_or_default());
}

async fn run(nexus: &Rc<Nexus>, cdb: &[u8], data: &Segments<'_>, into: &SegmentsMut<'_>) -> Reply {
    let offered = Offered { out: data.len() as u64, into: into.len() as u64 };
    let command = nexus.begin(lun_bytes(0), 1, Attribute::Simple, cdb, offered);
    assert_eq!((command.out_bytes(), command.in_bytes()), (data.len(), into.len()));
    command.run(data, into).await.unwrap()
}

async fn get(nexus: &Rc<Nexus>, cdb: &[u8], room: usize) -> (Reply, Vec<u8>) {
    let mut into = vec![0xee; room];
    let reply = run(nexus, cdb, &Segments::new(&[]), &SegmentsMut::new(&mut into)).await;
    into.truncate(reply.in_moved);
    (reply, into)
}

/// What the device answers through us is what it answers by itself.
async fn probe(path: &str) {
    let disk = Rc::new(SgDisk::open(path).await.unwrap());
    assert!(disk.transfer_bytes_max() >= 64 << 10);
    let unit = PassThrough::new(Rc::clone(&disk) as _);
    let port = Port { relative: 1, name: String::new(), device_name: String::new(), group: 1 };
    let luns = LunMap::new(Rc::new(port));
    luns.add(0, Rc::clone(&unit) as _);
    let nexus = Nexus::new(TransportId::iscsi("iqn.2026-01.test:vm", Some([1; 6])).unwrap(), luns);
    // Unit attentions since its power on.
    while run(&nexus, &[0; 6], &Segments::new(&[]), &SegmentsMut::new(&mut [])).await.status != Status::Good {
    }
    let questions: [&[u8]; 7] = [
        &[0x12, 0, 0, 0, 96, 0],
        &[0x12, 1, 0x83, 0, 255, 0],
        &[0x12, 1, 0x80, 0, 255, 0],
        &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[0x4d, 0, 0x40, 0, 0, 0, 0, 0, 64, 0],
        &[0x5a, 0, 0x3f, 0, 0, 0, 0, 0, 255, 0],
        &[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0],
    ];
    for cdb in questions {
        let (reply, data) = get(&nexus, cdb, 255).await;
        assert_eq!(reply.status, Status::Good, "{cdb:02x?}");
        let mut own = vec![0xee; 255];
        let direct =
            disk.execute(cdb, &Segments::new(&[]), &SegmentsMut::new(&mut own), Duration::from_secs(5)).await;
        assert_eq!((direct.unwrap().moved, &own[..data.len()]), (data.len(), &data[..]), "{cdb:02x?}");
        if cdb[..2] == [0x12, 0] {
            assert!(data[8..].starts_with(b"Linux   scsi_debug"), "its own identity");
        }
    }
    // Data in scattered pieces, both ways, at the end of a large command.
    let bytes: Vec<u8> = (0..64 << 10).map(|n: usize| (n / 512 * 13 + n) as u8).collect();
    let (head, tail) = bytes.split_at(12 << 10);
    let write = [0x2a, 0, 0, 0, 1, 0, 0, 0, 128, 0];
    let reply = run(&nexus, &write, &Segments::gather([head, tail]), &SegmentsMut::new(&mut [])).await;
    assert_eq!(reply.status, Status::Good, "{:02x?}", reply.sense);
    let mut back = vec![0; bytes.len()];
    {
        let (first, second) = back.split_at_mut(4096);
        let into = SegmentsMut::scatter([second, first]);
        let read = [0x28, 0, 0, 0, 1, 0, 0, 0, 128, 0];
        let reply = run(&nexus, &read, &Segments::new(&[]), &into).await;
        assert_eq!((reply.status, reply.in_moved), (Status::Good, 64 << 10));
    }
    back.rotate_left(4096);
    assert!(back == bytes);
    // Its own sense: no such command; beyond the end.
    let (reply, _) = get(&nexus, &[0xc7; 16], 512).await;
    assert_eq!((reply.status, reply.sense[2] & 15, reply.sense[12]), (Status::CheckCondition, 5, 0x20));
    let (reply, _) = get(&nexus, &[0x28, 0, 0x7f, 0, 0, 0, 0, 0, 1, 0], 512).await;
    assert_eq!((reply.status, reply.sense[2] & 15, reply.sense[12]), (Status::CheckCondition, 5, 0x21));
    nexus.manage(lun_bytes(0), scsi::Function::LogicalUnitReset).await;
    assert!(unit.passed() > 10);
    println!("passed {} commands to {path}", unit.passed());
}

#[test]
#[ignore = "runs inside the guest of the test above"]
fn in_the_guest() {
    let device = std::env::var(DEVICE).expect("the guest names its device");
    lane::block_on(probe(&device));
}
