#!/usr/bin/env python3
"""Our NBD server beside qemu-nbd, qemu-storage-daemon and nbdkit: IOPS, latency, CPU per I/O.

  cargo build --release -p front --example nbd_file
  bench/nbd.py --dir "$(bench/medium up)" [--rounds 5] [--seconds 0.8] [--size 256] [--json FILE]

Every contender serves its own file in DIR over a Unix socket; fio's nbd engine is the client of all. They take turns, workload by
workload and round by round. Figures are medians over rounds; "x" is the median of the per-round ratios of ours to that contender
(above 1: ours is faster). CPU is client and server together, without the kernel's own threads. All write past the page cache but
nbdkit, whose file plugin ends there (marked *): its reads of a file in memory never reach the loop device.
Packages: fio qemu-utils qemu-system-common nbdkit.
"""
import argparse, json, os, resource, shutil, statistics, subprocess, sys, time

WORKLOADS = [("4K random read, depth 1", "randread", "4k", 1), ("4K random write, depth 1", "randwrite", "4k", 1),
             ("4K random read, depth 32", "randread", "4k", 32), ("4K random write, depth 32", "randwrite", "4k", 32),
             ("128K read, depth 8", "read", "128k", 8), ("128K write, depth 8", "write", "128k", 8)]
CONTENDERS = {
    "kagami": lambda image, sock: [OURS, image, f"unix:{sock}"],
    "qemu-nbd": lambda image, sock: ["qemu-nbd", "-t", "-e", "4", "-f", "raw", "--cache=none", "--aio=io_uring", "-k", sock, image],
    "qemu-storage-daemon": lambda image, sock: [
        "qemu-storage-daemon", "--blockdev", f"driver=file,node-name=f,filename={image},cache.direct=on,aio=io_uring",
        "--nbd-server", f"addr.type=unix,addr.path={sock}", "--export", "type=nbd,id=e,node-name=f,name=,writable=on"],
    "nbdkit file *": lambda image, sock: ["nbdkit", "-f", "-U", sock, "file", image],
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


def main():
    global OURS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.8)
    parser.add_argument("--size", type=int, default=256, help="MiB per file")
    parser.add_argument("--one-cpu", action="store_true", help="servers and client on one processor: no luck of the scheduler")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.one_cpu:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # children inherit it
    root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
    OURS = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(root, "target")), "release/examples/nbd_file")
    servers = {}
    try:
        for number, (name, command) in enumerate(CONTENDERS.items()):
            image, sock = os.path.join(args.dir, f"nbd{number}.img"), os.path.join(args.dir, f"nbd{number}.sock")
            words = command(image, sock)
            if name == "kagami" and not shutil.which(words[0]):
                sys.exit(f"{words[0]} is not there: build it first (see above)")
            if not shutil.which(words[0]):
                print(f"SKIPPED: {words[0]} is not there", file=sys.stderr)
                continue
            with open(image, "wb") as out:
                for _ in range(args.size):
                    out.write(os.urandom(1 << 20))
                os.fsync(out.fileno())
            if os.path.exists(sock):
                os.unlink(sock)
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
            servers[name] = (process, sock)
            while not os.path.exists(sock) and process.poll() is None:
                time.sleep(0.05)
            time.sleep(0.2)
        found = {}
        for title, rw, size, depth in WORKLOADS:
            for _ in range(args.rounds):
                for name, (process, sock) in servers.items():
                    found.setdefault(title, {}).setdefault(name, []).append(sample(process.pid, sock, rw, size, depth, args))
    finally:
        for process, _ in servers.values():
            process.kill()
            process.wait()
    print("| workload | server | IOPS | MB/s | p50 us | p99 us | CPU us/IO | of it server | kagami x |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for title, by_name in found.items():
        for name, samples in by_name.items():
            middle = {key: statistics.median(s[key] for s in samples) for key in samples[0]}
            ratio = statistics.median(o["iops"] / s["iops"] for o, s in zip(by_name["kagami"], samples))
            print(f"| {title} | {name} | {middle['iops']:,.0f} | {middle['mb_s']:,.0f} | {middle['p50_us']:.0f} | {middle['p99_us']:.0f} | "
                  f"{middle['cpu_us']:.1f} | {middle['server_us']:.1f} | {ratio:.2f} |")
    if args.json:
        json.dump(found, open(args.json, "w"), indent=1)


if __name__ == "__main__":
    main()
