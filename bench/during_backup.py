#!/usr/bin/env python3
"""What a VM feels of its backup: write latency over NBD of both its disks while nothing else runs, and during backups of each kind.

  cargo build --release
  bench/during_backup.py --dir "$(bench/medium up)" [--rounds 5] [--seconds 3] [--size 512] [--limit 200M] [--json FILE]

A daemon of its own in DIR serves C: (VMDK on VMFS) and D: (RDM) of one VM. fio writes 4 KiB at random places of both at a steady pace, so
that a slower answer shows as latency and not as fewer writes. Rounds go through: nothing else runs; full and incremental backups back to
back, by snapshot; the same by redo log, commits included. "x" is the median over rounds of that round's p99 against the quiet one of the
same disk beside it (goal: at most 1.5). Nothing waits without a limit: the whole ends within --most seconds, with what was measured by
then, the daemon stopped and DIR as it was. Package: fio.
"""
import argparse, json, os, shutil, signal, statistics, subprocess, sys, threading, time

from common import Daemon, figure, fill, in_use, medium, needed

DISKS = {"C:": "vm/scsi0:0", "D:": "vm/scsi0:1"}
WAYS = {"quiet": None, "full backups by snapshot": ["--full"], "incremental backups by snapshot": [],
        "full backups by redo log": ["--full", "--via", "redo"], "incremental backups by redo log": ["--via", "redo"]}


class Late(Exception):
    """The time of the whole is used up."""


class Bench:
    def __init__(self, args, place):
        self.args, self.end = args, time.monotonic() + args.most
        self.repo = os.path.join(place, "repo")
        self.daemon = Daemon(os.path.join(place, "home"))

    def run(self, words):
        """What a program printed; it ends when the time is up."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise Late()
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            out, error = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise Late() from None
        if process.returncode:
            raise RuntimeError(f"{' '.join(words)}: {error.strip() or out.strip()}")
        return out

    def set_up(self):
        size = self.args.size
        self.daemon("pool", "create", "p", "--size", f"{size * 8 + 1024}M")
        # A redo log wants room beside the disk.
        self.daemon("datastore", "create", "ds", "--size", f"{2 * size + 2048}M")
        self.daemon("lun", "create", "d", "--size", f"{size}M")
        self.daemon("vm", "create", "vm", "--datastore", "ds", "--disk", f"{size}M", "--rdm", "d")
        in_use("both disks", self.daemon.access("p"))
        for disk in DISKS.values():
            fill(self.daemon.export(disk), size)
        # The first one reads what all others have stored already.
        self.back_up([])

    def back_up(self, words):
        limit = ["--limit", self.args.limit] if self.args.limit else []
        self.run(self.daemon.words("backup", "create", "vm", "--repo", self.repo, *limit, *words))

    def sample(self):
        """Latency of a window, by disk."""
        command = ["fio", "--thread", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=1", f"--rate_iops={self.args.rate}",
                   "--norandommap", "--randrepeat=0", "--time_based", f"--runtime={int(self.args.seconds * 1000)}ms",
                   f"--size={self.args.size}m", "--output-format=json"]
        for name, disk in DISKS.items():
            command += [f"--name={name[0]}", f"--uri=nbd+unix:///{disk}?socket={self.daemon.sock}"]
        out = self.run(command)
        seen = {}
        for name, job in zip(DISKS, json.loads(out[out.index("{"):])["jobs"]):
            side = job["write"]
            # fio's engine for NBD tells the time of a write as completion or as a whole, by its version.
            latency = next(side[key] for key in ("clat_ns", "lat_ns") if "percentile" in side[key])["percentile"]
            seen[name] = {"p50": latency["50.000000"] / 1e3, "p99": latency["99.000000"] / 1e3, "iops": side["iops"]}
        return seen

    def sample_beside(self, words):
        """The same while backups run one after the other."""
        stop, begun, count, failed = threading.Event(), threading.Event(), [0], []

        def back_up():
            try:
                while not stop.is_set():
                    begun.set()
                    self.back_up(words)
                    count[0] += 1
            except (Late, RuntimeError) as error:
                failed.append(error)
                begun.set()

        thread = threading.Thread(target=back_up)
        thread.start()
        try:
            begun.wait()
            return {**self.sample(), "backups": count[0]}
        finally:
            stop.set()
            thread.join()
            if failed:
                raise failed[0]


def show(seen, rounds):
    print("| 4 KiB writes while | disk | p50 us | p99 us | writes/s | x of quiet p99 | backups |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for way, samples in seen.items():
        for disk in DISKS:
            middle = lambda key: statistics.median(s[disk][key] for s in samples[:rounds])
            print(f"| {way} | {disk} | {middle('p50'):.0f} | {middle('p99'):.0f} | {middle('iops'):.0f} | {beside_quiet(seen, way, disk, rounds):.2f} | "
                  f"{sum(s.get('backups', 0) for s in samples[:rounds])} |")


def beside_quiet(seen, way, disk, rounds):
    return statistics.median(s[disk]["p99"] / q[disk]["p99"] for s, q in zip(seen[way][:rounds], seen["quiet"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--size", type=int, default=512, help="MiB per disk")
    parser.add_argument("--rate", type=int, default=1000, help="writes per second to each disk")
    parser.add_argument("--limit", default="", help="pace of the backup's reads, such as 200M")
    parser.add_argument("--most", type=float, default=240.0, help="seconds for everything")
    parser.add_argument("--json")
    args = parser.parse_args()
    needed("fio")
    print(f"on {medium(args.dir)}, {args.size} MiB per disk, {args.rate} writes a second to each, {args.rounds} rounds of {args.seconds} s")
    place = os.path.join(args.dir, "during-backup")
    shutil.rmtree(place, ignore_errors=True)
    # As a terminal or a script would end it: by the way out that stops the daemon.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    bench = Bench(args, place)
    seen = {name: [] for name in WAYS}
    why, failed = None, False
    try:
        bench.set_up()
        for number in range(args.rounds):
            for name, words in WAYS.items():
                seen[name].append(bench.sample() if words is None else bench.sample_beside(words))
            last = ", ".join(f"{name} {' / '.join(str(round(s[-1][disk]['p99'])) for disk in DISKS)} us" for name, s in seen.items())
            print(f"round {number + 1} of {args.rounds}, p99 of C: / D:: {last}", file=sys.stderr, flush=True)
    except Late:
        why = f"not all rounds fitted into {args.most:.0f} s"
    except RuntimeError as error:
        why, failed = str(error), True
    finally:
        bench.daemon.stop()
        shutil.rmtree(place, ignore_errors=True)
    rounds = min(len(samples) for samples in seen.values())
    if rounds:
        show(seen, rounds)
        for way in list(WAYS)[1:]:
            for disk in DISKS:
                figure(f"p99 of a VM's writes to {disk} during {way} against before", beside_quiet(seen, way, disk, rounds), "<= 1.50")
    if args.json:
        with open(args.json, "w") as out:
            json.dump(seen, out, indent=1)
    if why:
        print(f"during_backup: {why} ({rounds} rounds)", file=sys.stderr)
    sys.exit(0 if rounds and not failed else 1)


if __name__ == "__main__":
    main()
