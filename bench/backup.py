#!/usr/bin/env python3
"""Backup of a mixed disk image beside borg and restic: first copy, copy after 1 % of scattered changes, verify, restore.

  cargo build --release -p backup --example image_backup && cargo build --release
  bench/backup.py --dir "$(bench/medium up 8g)" [--size 2g] [--rounds 3] [--contenders kagami,daemon,borg,borg-fixed,restic] [--json FILE]

The image, the same every time: 40 % holes, 20 % random bytes, 30 % text of about 3:1, 10 % copies of earlier runs, in runs of 256 KiB. Then 1 %
of its blocks of 4 KiB, anywhere, get new random bytes. Contenders take turns within a round; MB/s is the image's length by wall time, CPU
seconds are user and system of the program and its children.

"kagami" is the repository alone: a program that reads a file which tracks its changes. "daemon" is what a user has: a VM with a mapped LUN, and
`kagami backup create`, that is the command line, REST, the cut, the copy; CPU and memory are the daemon's too. Both disks are brought to the next
state before, untimed, as a VM would have written it; the others read the image. `target` writes the second state to where the others restore
to, from memory: what the medium takes. Every restore is compared with the image byte by byte.

At the end the figures, those with goals among them (common.py says how). Ratios are medians of the ratios within a round. Packages:
borgbackup, restic.
"""
import argparse, json, os, random, shutil, signal, socket, statistics, struct, subprocess, sys, tempfile, threading, time

from common import Daemon, built, figure, in_use, medium
from nbd import cpu_seconds

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
        said.seek(0)
        text = said.read().decode(errors="replace").strip()
        if process.returncode:
            raise RuntimeError(f"{command}: {text[-500:]}")
    access = [line.removeprefix("in use: ") for line in text.splitlines() if line.startswith("in use: ")]
    return {"wall": wall, "cpu": used.ru_utime + used.ru_stime, "rss": used.ru_maxrss / 1024, "access": access}


class Writer:
    """Just enough of an NBD client to write with: one request at a time."""

    def __init__(self, sock, export):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(sock)
        self.take(18)  # its greeting
        self.socket.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, len(export)) + export.encode())
        self.take(10)  # length and flags

    def take(self, count):
        out = b""
        while len(out) < count:
            more = self.socket.recv(count - len(out))
            if not more:
                raise RuntimeError("the server has closed the connection")
            out += more
        return out

    def ask(self, kind, at, length, data=b""):
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, kind, 0, at, length) + data)
        _, error, _ = struct.unpack(">IIQ", self.take(16))
        if error:
            raise RuntimeError(f"NBD error {error}")

    def write(self, at, data):
        self.ask(1, at, len(data), data)

    def close(self):
        self.ask(3, 0, 0)
        self.socket.close()


def differing(old, new, size):
    """Runs of 4 KiB blocks in which a state differs from the one before (none: zeroes): where, and the new bytes."""
    with open(old or "/dev/zero", "rb") as before, open(new, "rb") as after:
        for at in range(0, size, RUN):
            a, b = before.read(RUN), after.read(RUN)
            if a == b:
                continue
            start = None
            for block in range(0, RUN + BLOCK, BLOCK):
                same = block == RUN or a[block:block + BLOCK] == b[block:block + BLOCK]
                if start is not None and same:
                    yield at + start, b[start:block]
                    start = None
                elif start is None and not same:
                    start = block


class OwnDaemon:
    """A daemon with a VM whose one disk is a mapped LUN."""

    def __init__(self, place, size):
        self.place, self.size, self.state = place, size, None
        shutil.rmtree(f"{place}/home", ignore_errors=True)
        self.daemon = Daemon(f"{place}/home")
        self.daemon("pool", "create", "p", "--size", f"{(size >> 20) * 5 // 4 + 2048}M")
        self.daemon("datastore", "create", "ds", "--size", "1G")
        self.daemon("lun", "create", "d", "--size", f"{size >> 20}M")
        self.daemon("vm", "create", "vm", "--datastore", "ds", "--rdm", "d")
        self.daemon.export("vm/scsi0:0")
        self.access = self.daemon.access("p")

    def load(self, state):
        """Brings the disk to a state, writing what differs."""
        writer = Writer(self.daemon.sock, "vm/scsi0:0")
        for at, data in differing(self.state, state, self.size):
            writer.write(at, data)
        writer.close()
        self.state = state

    def run(self, command, most):
        """As the function of this name, the daemon's part included."""
        before = cpu_seconds(self.daemon.pid)
        seen = run(command, most)
        seen["cpu"] += cpu_seconds(self.daemon.pid) - before
        status = open(f"/proc/{self.daemon.pid}/status").read()
        seen["rss"] = max(seen["rss"], int(status.split("VmHWM:")[1].split()[0]) / 1024)
        return seen


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
    kagami = f"{ours['daemon']} --home {place}/home"
    return {
        "kagami": {
            "init": f"{ours['kagami']} init {repo}",
            "load": f"{ours['kagami']} load {image} {place}/tracked",
            "backup": f"{ours['kagami']} tracked {place}/tracked {repo}",
            "verify": f"{ours['kagami']} verify {repo}",
            "restore": f"{ours['kagami']} restore {repo} {out}",
        },
        "daemon": {
            "init": "true",  # the first backup makes it
            "backup": f"{kagami} backup create vm --repo {repo}",
            "verify": f"{kagami} backup verify latest --repo {repo}",
            "restore": f"{kagami} restore vm@latest --repo {repo} --disk scsi0:0 --to {out}",
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
    for path in ("repo", "cache", "out", "out.d", "tracked", "home", "disk.img"):
        subprocess.run(["rm", "-rf", f"{place}/{path}"], check=True)
    own = OwnDaemon(place, os.path.getsize(states[0])) if name == "daemon" else None
    try:
        seen = steps(name, place, states, lines, own)
        if own:
            seen["first"]["access"] = [f"daemon: {own.access}"]
    finally:
        if own:
            own.daemon.stop()
    if subprocess.run(["cmp", "-s", out, states[1]]).returncode:
        raise RuntimeError(f"{name}: what was restored is not what was backed up")
    return seen


def steps(name, place, states, lines, own):
    """Both backups, the verification and the restore, in order."""
    image, timed = f"{place}/disk.img", own.run if own else run
    timed(lines["init"], 60)
    seen = {}
    for number, (step, state) in enumerate(zip(("first", "scattered"), states)):
        if os.path.exists(image):
            os.unlink(image)
        os.link(state, image)
        os.utime(image)
        if own:
            own.load(state)
        elif "load" in lines:
            run(lines["load"], 600)
        os.sync()
        seen[step] = timed(lines["backup"].replace("{state}", str(number)), 1800)
        begun = time.monotonic()
        os.sync()
        seen[step]["sync"] = time.monotonic() - begun
        seen[step]["repository"] = allocated(f"{place}/repo")
    seen["verify"] = timed(lines["verify"], 1800)
    begun = time.monotonic()
    seen["restore"] = timed(lines["restore"], 1800)
    os.sync()
    seen["restore"]["wall"] = time.monotonic() - begun
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
    parser.add_argument("--contenders", default="kagami,daemon,borg,borg-fixed,restic")
    parser.add_argument("--json")
    args = parser.parse_args()
    ours = {"kagami": built("examples/image_backup", "cargo build --release -p backup --example image_backup"),
            "daemon": built("kagami", "cargo build --release")}
    names = []
    for name in args.contenders.split(","):
        program = ours.get(name, name.split("-")[0])
        if shutil.which(program):
            names.append(name)
        else:
            print(f"SKIPPED: {name}: {program} is not installed (apt-get install borgbackup restic)", file=sys.stderr)
    size = int(args.size[:-1]) << {"m": 20, "g": 30}[args.size[-1].lower()]
    where = medium(args.dir)
    print(f"on {where}, image of {size >> 20} MiB, {args.rounds} rounds")
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
        with open(args.json, "w") as out:
            json.dump({"size": size, "changed": changed, "rounds": rounds}, out, indent=1)
    show(names, rounds, size)
    for line in sorted({line for name in names for step in rounds[0][name].values() for line in step["access"]}):
        in_use(*line.split(": ", 1))
    for name in ("kagami", "daemon"):
        if name in names:
            figures(name, names, rounds, size, changed, where)


def show(names, rounds, size):
    print("| contender | first MB/s | CPU s | 1 % scattered MB/s | CPU s | verify MB/s | restore MB/s | CPU s | repository MiB 1 / 2 | peak MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in names:
        middle = lambda step, key: statistics.median(r[name][step][key] for r in rounds)
        speed = lambda step: f"{size / 1e6 / middle(step, 'wall'):.0f}"
        peak = max(r[name][step]["rss"] for r in rounds for step in r[name])
        print(f"| {name} | {speed('first')} | {middle('first', 'cpu'):.1f} | {speed('scattered')} | {middle('scattered', 'cpu'):.2f} | {speed('verify')} "
              f"| {speed('restore')} | {middle('restore', 'cpu'):.1f} | {middle('first', 'repository') / 2**20:.0f} / {middle('scattered', 'repository') / 2**20:.0f} | {peak:.0f} |")


def figures(name, names, rounds, size, changed, where):
    peers = [peer for peer in names if peer not in ("kagami", "daemon")]
    by = " by the daemon" if name == "daemon" else ""

    def beside(step, key):
        return statistics.median(min(r[p][step][key] for p in peers) / r[name][step][key] for r in rounds)

    def ours(of):
        return statistics.median(of(r[name]) for r in rounds)
    figure(f"first backup{by}, MB/s", ours(lambda k: size / 1e6 / k["first"]["wall"]), ">= 650", 0)
    if "borg-fixed" in peers:
        figure(f"first backup{by}, speed against borg with fixed chunks and zstd",
               statistics.median(r["borg-fixed"]["first"]["wall"] / r[name]["first"]["wall"] for r in rounds), ">= 3.00")
    if peers:
        figure(f"first backup{by}, speed against the fastest peer, whatever its repository", beside("first", "wall"))
        figure(f"first backup{by}, CPU seconds of the thriftiest peer against ours", beside("first", "cpu"))
        figure(f"backup after 1 % scattered changes{by}, speed against the fastest peer", beside("scattered", "wall"), ">= 20", 1)
        figure(f"repository after the first backup{by} against the smallest peer's", 1 / beside("first", "repository"), "<= 1.00", 3)
    figure(f"repository grows after 1 % scattered changes{by}, against the bytes changed",
           ours(lambda k: (k["scattered"]["repository"] - k["first"]["repository"]) / changed), "<= 2.00")
    figure(f"restore{by}, speed against a copy of the image to the same place ({where})",
           statistics.median(r["target"]["restore"]["wall"] / r[name]["restore"]["wall"] for r in rounds), ">= 0.90")
    figure(f"peak memory of a backup or restore{by} in MiB", max(s["rss"] for r in rounds for s in r[name].values()), "<= 512", 0)


if __name__ == "__main__":
    main()
