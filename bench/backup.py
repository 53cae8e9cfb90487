#!/usr/bin/env python3
"""Backup of a mixed disk image beside borg and restic: first copy, copy after 1 % of scattered changes, verify, restore.

  cargo build --release -p backup --example image_backup
  bench/backup.py --dir "$(bench/medium up)" [--size 2g] [--rounds 3] [--contenders kagami,borg,borg-fixed,restic] [--json FILE]

The image, the same every time: 40 % holes, 20 % random bytes, 30 % text of about 3:1, 10 % copies of earlier runs, in runs of 256 KiB. Then 1 %
of its blocks of 4 KiB, anywhere, get new random bytes. Contenders take turns within a round; MB/s is the image's length by wall time, CPU
seconds are user and system of the program and its children. Ours reads a disk that tracks its changes, which is brought to the second
state before, untimed, as a VM would have written it; theirs read the image. `target` writes the second state to where the others restore
to, from memory: what the medium takes. Every restore is compared with the image byte by byte.

At the end each figure that has a goal, one a line, tabs between: what, value. Ratios are medians of the ratios within a round. Packages:
borgbackup, restic.
"""
import argparse, json, os, random, shutil, signal, statistics, subprocess, sys, tempfile, threading, time

RUN = 256 << 10
BLOCK = 4096


def words():
    rng = random.Random(7)
    return [bytes(rng.choice(b"etaoinshrdlucmfwypvbgk") for _ in range(rng.randrange(2, 11))) for _ in range(4000)]


def text(rng, length, known):
    out = bytearray()
    while len(out) < length:
        at = rng.randrange(len(known) - 40)
        out += b" ".join(known[at:at + 3]) + b" %d\n" % rng.randrange(10 ** 9)
    return bytes(out[:length])


def make(path, size):
    """The first state."""
    rng, known = random.Random(1), words()
    pages = [text(rng, RUN, known) for _ in range(64)]
    with open(path, "wb") as image:
        for _ in range(size // RUN):
            kind = rng.random()
            if kind < .40:
                image.seek(RUN, 1)
            elif kind < .60:
                image.write(rng.randbytes(RUN))
            elif kind < .90:
                page, turn = bytearray(pages[rng.randrange(64)]), rng.randrange(RUN)
                page = page[turn:] + page[:turn]
                for at in range(0, RUN, 64):
                    page[at:at + 8] = rng.randbytes(4).hex().encode()
                image.write(page)
            else:
                image.write(pages[rng.randrange(64)])
        image.truncate(size)


def change(path, size):
    """The second state: 1 % of the blocks are new. Gives the bytes changed."""
    rng = random.Random(2)
    blocks = rng.sample(range(size // BLOCK), size // BLOCK // 100)
    with open(path, "r+b") as image:
        for block in blocks:
            image.seek(block * BLOCK)
            image.write(rng.randbytes(BLOCK))
        os.fsync(image.fileno())
    return len(blocks) * BLOCK


def run(command, most):
    """Wall and CPU seconds and peak memory of a shell line that must succeed within so many seconds."""
    begun = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, shell=True, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True)
        late = threading.Timer(most, os.killpg, (process.pid, signal.SIGKILL))
        late.start()
        try:
            # What its children used is in the answer of this call only.
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            late.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.monotonic() - begun
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{command}: {said.read().decode(errors='replace').strip()[-500:]}")
    return {"wall": wall, "cpu": used.ru_utime + used.ru_stime, "rss": used.ru_maxrss / 1024}


def commands(name, place, ours):
    """Shell lines of a contender: make a repository, load a state, back up, verify, restore to {place}/out."""
    image, repo, out = f"{place}/disk.img", f"{place}/repo", f"{place}/out"
    borg = f"BORG_REPO={repo} BORG_BASE_DIR={place}/cache BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes "
    restic = f"RESTIC_PASSWORD=x RESTIC_REPOSITORY={repo} RESTIC_CACHE_DIR={place}/cache restic -q "
    back = f"mkdir {out}.d && cd {out}.d && {{}} && mv {out}.d{image} {out}"
    options = "--chunker-params fixed,1048576 -C zstd,3" if name == "borg-fixed" else ""
    borg_lines = {
        "init": borg + "borg init -e none",
        "backup": borg + f"borg create --sparse {options} ::{{state}} {image}",
        "verify": borg + "borg check --verify-data",
        "restore": back.format(borg + "borg extract --sparse ::1"),
    }
    return {
        "kagami": {
            "init": f"{ours} init {repo}",
            "load": f"{ours} load {image} {place}/tracked",
            "backup": f"{ours} tracked {place}/tracked {repo}",
            "verify": f"{ours} verify {repo}",
            "restore": f"{ours} restore {repo} {out}",
        },
        "borg": borg_lines,
        "borg-fixed": borg_lines,
        "restic": {
            "init": restic + "init",
            "backup": restic + f"backup {image}",
            "verify": restic + "check --read-data",
            "restore": f"{restic} restore latest --target {out}.d && mv {out}.d{image} {out}",
        },
    }[name]


def allocated(path):
    return int(subprocess.run(["du", "-sB1", path], capture_output=True, text=True, check=True).stdout.split()[0])


def measure(name, place, states, ours):
    """One contender through everything."""
    image, out, lines = f"{place}/disk.img", f"{place}/out", commands(name, place, ours)
    for path in ("repo", "cache", "out", "out.d", "tracked", "disk.img"):
        subprocess.run(["rm", "-rf", f"{place}/{path}"], check=True)
    run(lines["init"], 60)
    seen = {}
    for number, (step, state) in enumerate(zip(("first", "scattered"), states)):
        if os.path.exists(image):
            os.unlink(image)
        os.link(state, image)
        os.utime(image)
        if "load" in lines:
            run(lines["load"], 600)
        os.sync()
        seen[step] = run(lines["backup"].replace("{state}", str(number)), 1800)
        begun = time.monotonic()
        os.sync()
        seen[step]["sync"] = time.monotonic() - begun
        seen[step]["repository"] = allocated(f"{place}/repo")
    seen["verify"] = run(lines["verify"], 1800)
    begun = time.monotonic()
    seen["restore"] = run(lines["restore"], 1800)
    os.sync()
    seen["restore"]["wall"] = time.monotonic() - begun
    if subprocess.run(["cmp", "-s", out, states[1]]).returncode:
        raise RuntimeError(f"{name}: what was restored is not what was backed up")
    return seen


def target(place, states):
    """How fast the medium takes what a restore writes."""
    begun = time.monotonic()
    run(f"rm -f {place}/out && cp --reflink=never --sparse=always {states[1]} {place}/out && sync", 600)
    return {"restore": {"wall": time.monotonic() - begun}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--size", default="2g")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", default="kagami,borg,borg-fixed,restic")
    parser.add_argument("--json")
    args = parser.parse_args()
    root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
    ours = os.path.abspath(os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(root, "target")), "release/examples/image_backup"))
    if not os.path.exists(ours):
        sys.exit(f"{ours} is not there: cargo build --release -p backup --example image_backup")
    names = []
    for name in args.contenders.split(","):
        program = ours if name == "kagami" else name.split("-")[0]
        if shutil.which(program):
            names.append(name)
        else:
            print(f"SKIPPED: {name}: {program} is not installed (apt-get install borgbackup restic)", file=sys.stderr)
    size = int(args.size[:-1]) << {"m": 20, "g": 30}[args.size[-1].lower()]
    place = os.path.join(os.path.abspath(args.dir), "backup")
    shutil.rmtree(place, ignore_errors=True)
    os.makedirs(place)
    try:
        states = [f"{place}/state1", f"{place}/state2"]
        make(states[0], size)
        subprocess.run(["cp", "--reflink=never", "--sparse=always", *states], check=True)
        changed = change(states[1], size)
        print(f"image {size >> 20} MiB, {allocated(states[0]) >> 20} allocated, then {changed >> 20} MiB changed", file=sys.stderr, flush=True)
        rounds = []
        for number in range(args.rounds):
            rounds.append({"target": target(place, states)})
            for name in names:
                rounds[-1][name] = measure(name, place, states, ours)
                print(f"round {number + 1} of {args.rounds}: {name}", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if args.json:
        json.dump({"size": size, "changed": changed, "rounds": rounds}, open(args.json, "w"), indent=1)
    show(names, rounds, size)
    if "kagami" in names:
        figures(names, rounds, size, changed)


def show(names, rounds, size):
    print("| contender | first MB/s | CPU s | 1 % scattered MB/s | CPU s | verify MB/s | restore MB/s | CPU s | repository MiB 1 / 2 | peak MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in names:
        middle = lambda step, key: statistics.median(r[name][step][key] for r in rounds)
        speed = lambda step: f"{size / 1e6 / middle(step, 'wall'):.0f}"
        peak = max(r[name][step]["rss"] for r in rounds for step in r[name])
        print(f"| {name} | {speed('first')} | {middle('first', 'cpu'):.1f} | {speed('scattered')} | {middle('scattered', 'cpu'):.2f} | {speed('verify')} "
              f"| {speed('restore')} | {middle('restore', 'cpu'):.1f} | {middle('first', 'repository') / 2**20:.0f} / {middle('scattered', 'repository') / 2**20:.0f} | {peak:.0f} |")


def figures(names, rounds, size, changed):
    peers = [name for name in names if name != "kagami"]

    def beside(step, key):
        return statistics.median(min(r[p][step][key] for p in peers) / r["kagami"][step][key] for r in rounds)

    def ours(of):
        return statistics.median(of(r["kagami"]) for r in rounds)
    if "borg-fixed" in peers:
        print(f"first backup, speed against borg with fixed chunks and zstd\t{statistics.median(r['borg-fixed']['first']['wall'] / r['kagami']['first']['wall'] for r in rounds):.2f}")
    if peers:
        print(f"first backup, speed against the fastest peer, whatever its repository\t{beside('first', 'wall'):.2f}")
        print(f"first backup, CPU seconds of the thriftiest peer against ours\t{beside('first', 'cpu'):.2f}")
        print(f"backup after 1 % scattered changes, speed against the fastest peer\t{beside('scattered', 'wall'):.1f}")
        print(f"repository after the first backup against the smallest peer's\t{1 / beside('first', 'repository'):.3f}")
    print(f"first backup, MB/s\t{ours(lambda k: size / 1e6 / k['first']['wall']):.0f}")
    print(f"repository grows after 1 % scattered changes, against the bytes changed\t{ours(lambda k: (k['scattered']['repository'] - k['first']['repository']) / changed):.2f}")
    restored = statistics.median(r["target"]["restore"]["wall"] / r["kagami"]["restore"]["wall"] for r in rounds)
    print(f"restore, speed against a copy of the image to the same place\t{restored:.2f}")
    print(f"peak memory of a backup or restore in MiB\t{max(s['rss'] for r in rounds for s in r['kagami'].values()):.0f}")


if __name__ == "__main__":
    main()
