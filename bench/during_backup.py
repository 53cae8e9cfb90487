#!/usr/bin/env python3
"""What a VM feels of its backup: write latency over NBD while nothing else runs, during full and during incremental backups.

  cargo build --release
  bench/during_backup.py --dir "$(bench/medium up)" [--rounds 5] [--seconds 3] [--size 512] [--limit 0] [--json FILE]

A daemon of its own in DIR serves C: (VMDK on VMFS) and D: (RDM) of one VM. fio writes 4 KiB at random places of D: at a steady pace, so
that a slower answer shows as latency and not as fewer writes. Rounds alternate: nothing else runs / full backups back to back / incremental
ones. "x" is the median over rounds of that round's p99 against the quiet one beside it (goal: at most 1.5). Nothing waits without a limit: the whole ends within --most seconds (150), with what was
measured by then, the daemon stopped and DIR as it was. Package: fio.
"""
import argparse, json, os, shutil, signal, statistics, subprocess, sys, threading, time


class Late(Exception):
    """The time of the whole is used up."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--size", type=int, default=512, help="MiB per disk")
    parser.add_argument("--rate", type=int, default=1000, help="writes per second")
    parser.add_argument("--limit", default="", help="pace of the backup's reads, such as 200M")
    parser.add_argument("--most", type=float, default=150.0, help="seconds for everything")
    parser.add_argument("--json")
    args = parser.parse_args()
    root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
    program = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(root, "target")), "release/kagami")
    if not os.path.exists(program) or not shutil.which("fio"):
        sys.exit(f"{program} and fio are needed")
    place = os.path.join(args.dir, "during-backup")
    shutil.rmtree(place, ignore_errors=True)
    home, repo = os.path.join(place, "home"), os.path.join(place, "repo")
    os.makedirs(place)
    end = time.monotonic() + args.most
    # As a terminal or a script would end it: by the way out that stops the daemon.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    def run(words):
        left = end - time.monotonic()
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

    def kagami(*words):
        out = run([program, "--home", home, *words, "-o", "json"])
        return json.loads(out) if out.strip() else None

    def sample():
        out = run(["fio", "--name=b", "--thread", "--ioengine=nbd", f"--uri=nbd+unix:///vm/scsi0:1?socket={home}/nbd.sock", "--rw=randwrite",
                   "--bs=4k", "--iodepth=1", f"--rate_iops={args.rate}", "--norandommap", "--randrepeat=0", "--time_based",
                   f"--runtime={int(args.seconds * 1000)}ms", f"--size={args.size}m", "--output-format=json"])
        side = json.loads(out[out.index("{"):])["jobs"][0]["write"]
        # fio's engine for NBD tells the time of a write as completion or as a whole, by its version.
        latency = next(side[key] for key in ("clat_ns", "lat_ns") if "percentile" in side[key])
        return {"p50": latency["percentile"]["50.000000"] / 1e3, "p99": latency["percentile"]["99.000000"] / 1e3, "iops": side["iops"]}

    limit = ["--limit", args.limit] if args.limit else []

    def sample_beside(*words):
        stop, begun, count, failed = threading.Event(), threading.Event(), [0], []

        def back_up():
            try:
                while not stop.is_set():
                    begun.set()
                    kagami("backup", "create", "vm", "--repo", repo, *limit, *words)
                    count[0] += 1
            except (Late, RuntimeError) as error:
                failed.append(error)
                begun.set()
        thread = threading.Thread(target=back_up)
        thread.start()
        try:
            begun.wait()
            return {**sample(), "backups": count[0]}
        finally:
            stop.set()
            thread.join()
            if failed:
                raise failed[0]

    ways = {"quiet": sample, "full backups": lambda: sample_beside("--full"), "incremental backups": sample_beside}
    seen = {name: [] for name in ways}
    why, failed = None, False
    try:
        kagami("pool", "create", "p", "--size", f"{args.size * 8}M")
        kagami("datastore", "create", "ds", "--size", f"{args.size + 1024}M")
        kagami("lun", "create", "d", "--size", f"{args.size}M")
        kagami("vm", "create", "vm", "--datastore", "ds", "--disk", f"{args.size}M", "--rdm", "d")
        for slot in ("scsi0:0", "scsi0:1"):
            kagami("export", "start", f"vm/{slot}")
            run(["fio", "--name=fill", "--thread", "--ioengine=nbd", f"--uri=nbd+unix:///vm/{slot}?socket={home}/nbd.sock",
                 "--rw=write", "--bs=1m", "--iodepth=8", f"--size={args.size}m"])
        # The first one reads what all others have stored already.
        kagami("backup", "create", "vm", "--repo", repo)
        for number in range(args.rounds):
            for name, way in ways.items():
                seen[name].append(way())
            print(f"round {number + 1} of {args.rounds}: " + ", ".join(f"{n} {s[-1]['p99']:.0f} us" for n, s in seen.items()), file=sys.stderr, flush=True)
    except Late:
        why = f"not all rounds fitted into {args.most:.0f} s"
    except RuntimeError as error:
        why, failed = str(error), True
    finally:
        stopped = subprocess.Popen([program, "--home", home, "serve", "--stop"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            stopped.wait(timeout=20)
        except subprocess.TimeoutExpired:
            stopped.kill()
            try:
                os.kill(int(open(os.path.join(home, "lock")).read()), signal.SIGKILL)
            except (OSError, ValueError):
                pass
        shutil.rmtree(place, ignore_errors=True)
    rounds = min(len(samples) for samples in seen.values())
    if rounds:
        print("| 4 KiB writes to D: while | p50 us | p99 us | writes/s | x of quiet p99 | backups |")
        print("| --- | --- | --- | --- | --- | --- |")
    for name, samples in seen.items():
        samples = samples[:rounds]
        if not samples:
            continue
        middle = lambda key: statistics.median(s[key] for s in samples)
        ratio = statistics.median(s["p99"] / q["p99"] for s, q in zip(samples, seen["quiet"]))
        backups = sum(s.get("backups", 0) for s in samples)
        print(f"| {name} | {middle('p50'):.0f} | {middle('p99'):.0f} | {middle('iops'):.0f} | {ratio:.2f} | {backups} |")
    if args.json:
        json.dump(seen, open(args.json, "w"), indent=1)
    if why:
        print(f"during_backup: {why} ({rounds} rounds)", file=sys.stderr)
    sys.exit(0 if rounds and not failed else 1)


if __name__ == "__main__":
    main()
