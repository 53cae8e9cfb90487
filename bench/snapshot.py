#!/usr/bin/env python3
"""What a snapshot costs the writer, over NBD: 4 KiB random writes before it and in the seconds after it, beside other ways to take one.

  cargo build --release
  bench/snapshot.py --dir "$(bench/medium up 8g)" [--size 512] [--rounds 5] [--seconds 1] [--after 4] [--contenders A,B] [--json FILE]

All lie on one file system in DIR (XFS, for the reflink), are written over in full before, are served over NBD by a server that goes on
while the snapshot is taken, and loaded by fio's nbd engine at depth 16. Windows of --seconds: "before" (the better of two), then the
snapshot, then --after windows: the first has most of the first touches. Contenders take turns, each round with a disk made anew.

  kagami LUN       a thin LUN of the daemon; kagami snap create
  qcow2 external   qemu-storage-daemon; a new overlay goes on top (blockdev-snapshot)
  qcow2 internal   qemu-storage-daemon; blockdev-snapshot-internal-sync
  XFS reflink      a raw file served by qemu-storage-daemon; FICLONE
  none             a raw file, no snapshot: the noise (only when named)

Figures are medians over rounds. The best peer in p99 is the one with the lowest median; ours is held against it round by round. Packages:
fio qemu-utils qemu-system-common xfsprogs.
"""
import argparse, fcntl, json, os, shutil, socket, statistics, subprocess, sys, time

from common import Daemon, figure, fill, in_use, medium, needed
from nbd import ratio, sample

OURS = "kagami LUN"
CONTENDERS = [OURS, "qcow2 external", "qcow2 internal", "XFS reflink"]
FICLONE = 0x40049409
DEPTH = 16


class Lun:
    """A LUN of a daemon, with a pool made anew."""

    def __init__(self, name, place, mebibytes):
        self.daemon = Daemon(os.path.join(place, "home"))
        try:
            # The LUN, all of it once more after the snapshot, and the pool's own.
            self.daemon("pool", "create", "p", "--size", f"{2 * mebibytes + mebibytes // 4 + 512}M")
            self.daemon("lun", "create", "d", "--size", f"{mebibytes}M")
            self.daemon.export("d")
            self.access = self.daemon.access("p")
        except BaseException:
            self.daemon.stop()
            raise
        self.pid, self.sock, self.export = self.daemon.pid, self.daemon.sock, "d"

    def snapshot(self):
        self.daemon("snap", "create", "d@s1")

    def stop(self):
        self.daemon.stop()


class Qmp:
    """The storage daemon's monitor."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.lines = self.socket.makefile("rw")
        self.lines.readline()
        self("qmp_capabilities")

    def __call__(self, command, **arguments):
        self.lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.lines.flush()
        while True:
            answer = json.loads(self.lines.readline())
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def close(self):
        self.lines.close()
        self.socket.close()


class Image:
    """A raw file or a qcow2 image of 64 KiB clusters, served by qemu-storage-daemon (whose 7.2 dies of an NBD export with an iothread)."""

    def __init__(self, name, place, mebibytes):
        self.name, self.place, self.mebibytes = name, place, mebibytes
        self.image, self.sock = os.path.join(place, "image"), os.path.join(place, "nbd.sock")
        self.export, self.access = "e", "io_uring, direct"
        if name.startswith("qcow2"):
            self.create(self.image)
            device = f"driver=qcow2,node-name=f,cache.direct=on,file.driver=file,file.filename={self.image},file.cache.direct=on,file.aio=io_uring"
        else:
            with open(self.image, "wb") as out:
                out.truncate(mebibytes << 20)
            device = f"driver=file,node-name=f,filename={self.image},cache.direct=on,aio=io_uring"
        monitor = os.path.join(place, "monitor.sock")
        self.process = subprocess.Popen([
            "qemu-storage-daemon", "--blockdev", device, "--chardev", f"socket,path={monitor},server=on,wait=off,id=c",
            "--monitor", "chardev=c", "--nbd-server", f"addr.type=unix,addr.path={self.sock}",
            "--export", "type=nbd,id=x,node-name=f,name=e,writable=on"])
        self.pid = self.process.pid
        while not os.path.exists(self.sock):
            if self.process.poll() is not None:
                raise RuntimeError("qemu-storage-daemon ended")
            time.sleep(0.02)
        self.monitor = Qmp(monitor)

    def create(self, path):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=64k,lazy_refcounts=off", path, f"{self.mebibytes}M"], check=True)

    def snapshot(self):
        if self.name == "qcow2 external":
            overlay = os.path.join(self.place, "overlay")
            self.create(overlay)
            self.monitor("blockdev-add", driver="qcow2", **{"node-name": "o"}, cache={"direct": True}, backing=None,
                         file={"driver": "file", "filename": overlay, "cache": {"direct": True}, "aio": "io_uring"})
            self.monitor("blockdev-snapshot", node="f", overlay="o")
        elif self.name == "qcow2 internal":
            self.monitor("blockdev-snapshot-internal-sync", device="f", name="s1")
        elif self.name == "XFS reflink":
            with open(self.image, "rb") as source, open(self.image + ".clone", "wb") as clone:
                fcntl.ioctl(clone, FICLONE, source.fileno())

    def stop(self):
        self.monitor.close()
        self.process.terminate()
        self.process.wait()


def once(name, place, args):
    """One contender, with a disk made anew, through all windows."""
    shutil.rmtree(place, ignore_errors=True)
    os.makedirs(place)
    server = (Lun if name == OURS else Image)(name, place, args.size)
    try:
        fill(f"nbd+unix:///{server.export}?socket={server.sock}", args.size)

        def window():
            return sample(server.pid, server.sock, "randwrite", "4k", DEPTH, args, server.export)

        before = max((window() for _ in range(2)), key=lambda w: w["iops"])
        began = time.monotonic()
        server.snapshot()
        took = time.monotonic() - began
        return server.access, {"before": before, "took_ms": took * 1e3, "after": [window() for _ in range(args.after)]}
    finally:
        server.stop()
        shutil.rmtree(place, ignore_errors=True)


def of(rounds, which):
    """A window of each round: before, or the n-th after."""
    return [r["before"] if which == "before" else r["after"][which] for r in rounds]


def show(found, after):
    numbers = [f"w{n + 1}" for n in range(after)]
    print(f"| contender | before IOPS | {' | '.join(numbers)} | w1/before | last/before | p99 before, us | p99 in w1, us | CPU us/IO in w1 | snapshot ms |")
    print("| --- " * (after + 8) + "|")
    for name, rounds in found.items():
        middle = lambda which, key: statistics.median(w[key] for w in of(rounds, which))
        windows = " | ".join(f"{middle(n, 'iops'):,.0f}" for n in range(after))
        print(f"| {name} | {middle('before', 'iops'):,.0f} | {windows} | {ratio(of(rounds, 0), of(rounds, 'before')):.2f} | "
              f"{ratio(of(rounds, after - 1), of(rounds, 'before')):.2f} | {middle('before', 'p99_us'):,.0f} | {middle(0, 'p99_us'):,.0f} | "
              f"{middle(0, 'cpu_us'):.1f} | {statistics.median(r['took_ms'] for r in rounds):.1f} |")


def figures(found, size):
    peers = [name for name in found if name not in (OURS, "none")]
    if OURS not in found:
        return
    ours = found[OURS]
    held = {name: ratio(of(rounds, 0), of(rounds, "before")) for name, rounds in found.items()}
    start = f"4 KiB writes over NBD in the first second after a snapshot, {size} MiB"
    figure(f"{start}, against before", held[OURS], ">= 0.90")
    if not peers:
        return
    kept = max(peers, key=held.get)
    figure(f"the best peer's, {size} MiB ({kept})", held[kept])
    p99 = {name: statistics.median(w["p99_us"] for w in of(found[name], 0)) for name in peers}
    best = min(p99, key=p99.get)
    figure(f"{start}, p99 against the best peer's ({best}, {p99[best]:,.0f} us)", ratio(of(ours, 0), of(found[best], 0), "p99_us"), "<= 1.00")
    figure(f"{start}, IOPS against the best peer's there", statistics.median(
        w["iops"] / max(found[p][n]["after"][0]["iops"] for p in peers) for n, w in enumerate(of(ours, 0))))
    figure(f"snapshot of a LUN by the command line under that load, {size} MiB, ms", statistics.median(r["took_ms"] for r in ours), digits=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--size", type=int, default=512, help="MiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--after", type=int, default=4, help="windows after the snapshot")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--json")
    args = parser.parse_args()
    needed("fio", "qemu-storage-daemon", "qemu-img")
    names = args.contenders.split(",")
    wrong = [name for name in names if name not in [*CONTENDERS, "none"]]
    if wrong:
        sys.exit(f"no contender: {', '.join(wrong)}")
    print(f"on {medium(args.dir)}, {args.size} MiB, depth {DEPTH}, windows of {args.seconds} s, {args.rounds} rounds")
    found, told = {name: [] for name in names}, set()
    for number in range(args.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            access, seen = once(name, os.path.join(args.dir, "snapshot"), args)
            found[name].append(seen)
            if name not in told:
                in_use(name, access)
                told.add(name)
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
    show(found, args.after)
    figures(found, args.size)
    if args.json:
        with open(args.json, "w") as out:
            json.dump({"size": args.size, "rounds": found}, out, indent=1)


if __name__ == "__main__":
    main()
