#!/usr/bin/env python3
"""Our NBD server beside qemu-nbd, qemu-storage-daemon and nbdkit: IOPS, latency, CPU per I/O.

  cargo build --release -p front --example nbd_file && cargo build --release
  bench/nbd.py --dir "$(bench/medium up)" [--rounds 5] [--seconds 0.8] [--size 256] [--json FILE]

Every contender serves a disk of its own in DIR over a Unix socket, written over before; fio's nbd engine is the client of all.
"kagami file" is our server on a plain file, as theirs are; "kagami LUN" and "kagami VMDK" are what a VM gets: the daemon with a
thin LUN of a pool, and with a flat VMDK on VMFS on such a LUN. They take turns, workload by workload and round by round, the first
of a round changing. Figures are medians over rounds; "file x" and "LUN x" are the medians of the per-round ratios of our file and
our LUN to that contender (above 1: ours is faster). CPU is client and server together, without the kernel's own threads. All write
past the page cache but nbdkit, whose file plugin ends there (marked *): its reads of a file in memory never reach the loop device.
At the end the figures that have goals (common.py says how). Packages: fio qemu-utils qemu-system-common nbdkit.
"""
import argparse, glob, json, os, resource, shutil, statistics, subprocess, sys, time

from common import Daemon, built, figure, fill, in_use, medium, needed

WORKLOADS = [("4K random read, depth 1", "randread", "4k", 1), ("4K random write, depth 1", "randwrite", "4k", 1),
             ("4K random read, depth 32", "randread", "4k", 32), ("4K random write, depth 32", "randwrite", "4k", 32),
             ("128K read, depth 8", "read", "128k", 8), ("128K write, depth 8", "write", "128k", 8)]
NBDKIT = "nbdkit file *"
# Served by a program that takes a file: how it is started, and what carries its I/O.
OF_A_FILE = {
    "kagami file": (lambda image, sock: [built("examples/nbd_file", "cargo build --release -p front --example nbd_file"),
                                         image, f"unix:{sock}"], None),
    "qemu-nbd": (lambda image, sock: ["qemu-nbd", "-t", "-e", "4", "-f", "raw", "--cache=none", "--aio=io_uring", "-k", sock, image],
                 "io_uring, direct"),
    "qemu-storage-daemon": (lambda image, sock: [
        "qemu-storage-daemon", "--blockdev", f"driver=file,node-name=f,filename={image},cache.direct=on,aio=io_uring",
        "--nbd-server", f"addr.type=unix,addr.path={sock}", "--export", "type=nbd,id=e,node-name=f,name=,writable=on"],
        "io_uring, direct"),
    NBDKIT: (lambda image, sock: ["nbdkit", "-f", "-U", sock, "file", image], "threads, buffered"),
}
TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid):
    fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def sample(server, sock, rw, size, depth, args, export=""):
    command = ["fio", "--name=b", "--thread", "--ioengine=nbd", f"--uri=nbd+unix:///{export}?socket={sock}", f"--rw={rw}", f"--bs={size}",
               f"--iodepth={depth}", "--norandommap", "--randrepeat=0", "--time_based", f"--runtime={int(args.seconds * 1000)}ms",
               f"--size={args.size}m", "--lat_percentiles=1", "--clat_percentiles=0", "--output-format=json"]
    server_before, client_before = cpu_seconds(server), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    client_after, served = resource.getrusage(resource.RUSAGE_CHILDREN), cpu_seconds(server) - server_before
    client = sum(getattr(client_after, f) - getattr(client_before, f) for f in ("ru_utime", "ru_stime"))
    job = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]
    if job["error"]:
        sys.exit(f"fio reports error {job['error']}")
    side = job["read" if "read" in rw else "write"]
    count = max(1, side["total_ios"])
    return {"iops": side["iops"], "mb_s": side["bw_bytes"] / 1e6, "p50_us": side["lat_ns"]["percentile"]["50.000000"] / 1e3,
            "p99_us": side["lat_ns"]["percentile"]["99.000000"] / 1e3, "cpu_us": 1e6 * (client + served) / count,
            "server_us": 1e6 * served / count}


def ratio(ours, theirs, key="iops"):
    """Median of the per-round ratios."""
    return statistics.median(o[key] / t[key] for o, t in zip(ours, theirs))


def serve_files(args, servers, processes):
    """Starts what serves a plain file each."""
    for number, (name, (command, how)) in enumerate(OF_A_FILE.items()):
        image, sock, log = (os.path.join(args.dir, f"nbd{number}.{end}") for end in ("img", "sock", "log"))
        words = command(image, sock)
        if not shutil.which(words[0]):
            print(f"SKIPPED: {words[0]} is not there", file=sys.stderr)
            continue
        with open(image, "wb") as out:
            for _ in range(args.size):
                out.write(os.urandom(1 << 20))
            os.fsync(out.fileno())
        if os.path.exists(sock):
            os.unlink(sock)
        with open(log, "wb") as said:
            process = subprocess.Popen(words, stdout=said)
        processes.append(process)
        while not os.path.exists(sock) and process.poll() is None:
            time.sleep(0.02)
        time.sleep(0.2)
        # Ours says by itself what carries its I/O.
        in_use(name, how or open(log).read().strip())
        servers[name] = (process.pid, sock, "")


def serve_disks(args, servers):
    """Starts our daemon with a LUN and with a VM's disk on VMFS."""
    daemon = Daemon(os.path.join(args.dir, "nbd-home"))
    try:
        daemon("pool", "create", "p", "--size", f"{4 * args.size + 2048}M")
        daemon("lun", "create", "lun", "--size", f"{args.size}M")
        daemon("datastore", "create", "ds", "--size", f"{args.size + 1024}M")
        daemon("vm", "create", "vm", "--datastore", "ds", "--disk", f"{args.size}M")
        for name, disk in {"kagami LUN": "lun", "kagami VMDK": "vm/scsi0:0"}.items():
            fill(daemon.export(disk), args.size)
            servers[name] = (daemon.pid, daemon.sock, disk)
        in_use("kagami LUN and VMDK", daemon.access("p"))
    except BaseException:
        daemon.stop()
        raise
    return daemon


def measure(args):
    servers, processes, daemon, found = {}, [], None, {}
    try:
        serve_files(args, servers, processes)
        daemon = serve_disks(args, servers)
        for title, rw, size, depth in WORKLOADS:
            for number in range(args.rounds):
                names = list(servers)
                for name in names[number % len(names):] + names[:number % len(names)]:
                    pid, sock, export = servers[name]
                    found.setdefault(title, {}).setdefault(name, []).append(sample(pid, sock, rw, size, depth, args, export))
    finally:
        for process in processes:
            process.kill()
            process.wait()
        if daemon:
            daemon.stop()
        shutil.rmtree(os.path.join(args.dir, "nbd-home"), ignore_errors=True)
        for left in glob.glob(os.path.join(args.dir, "nbd[0-9].*")):
            os.unlink(left)
    return found


def show(found):
    print("| workload | server | IOPS | MB/s | p50 us | p99 us | CPU us/IO | of it server | file x | LUN x |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for title, by_name in found.items():
        for name in [*OF_A_FILE, "kagami LUN", "kagami VMDK"]:
            if name not in by_name:
                continue
            middle = {key: statistics.median(s[key] for s in by_name[name]) for key in by_name[name][0]}
            print(f"| {title} | {name} | {middle['iops']:,.0f} | {middle['mb_s']:,.0f} | {middle['p50_us']:.0f} | {middle['p99_us']:.0f} | "
                  f"{middle['cpu_us']:.1f} | {middle['server_us']:.1f} | {ratio(by_name['kagami file'], by_name[name]):.2f} | "
                  f"{ratio(by_name['kagami LUN'], by_name[name]):.2f} |")


def figures(found):
    for ours in ("kagami file", "kagami LUN", "kagami VMDK"):
        what = ours.removeprefix("kagami ")
        judged = ours != "kagami VMDK"  # bench/disks.py judges it beside the RDM
        for title, by_name in found.items():
            for peer in ("qemu-nbd", "qemu-storage-daemon", NBDKIT):
                if peer not in by_name or peer == NBDKIT and not judged:
                    continue
                # Its writes end in the page cache: shown, no goal.
                goal = "> 1.00" if judged and not (peer == NBDKIT and "write" in title) else ""
                figure(f"NBD, {what}, {title}, IOPS against {peer}", ratio(by_name[ours], by_name[peer]), goal)
            if NBDKIT in by_name and judged:
                figure(f"NBD, {what}, {title}, CPU per I/O against {NBDKIT}", ratio(by_name[ours], by_name[NBDKIT], "cpu_us"), "< 1.00")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.8)
    parser.add_argument("--size", type=int, default=256, help="MiB per disk")
    parser.add_argument("--one-cpu", action="store_true", help="servers and client on one processor: no luck of the scheduler")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.one_cpu:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # children inherit it
    needed("fio")
    print(f"on {medium(args.dir)}, {args.size} MiB per disk, {args.rounds} rounds of {args.seconds} s")
    found = measure(args)
    show(found)
    figures(found)
    if args.json:
        with open(args.json, "w") as out:
            json.dump(found, out, indent=1)


if __name__ == "__main__":
    main()
