"""What the measuring scripts share: programs, a daemon of their own, what carries the I/O, and how a figure is told.

A figure is one line, tabs between: what, value, goal such as ">= 0.90" (empty where there is none). bench/run collects
them. A line "in use: WHO: HOW" says what carried the I/O of a contender.
"""
import json, os, shutil, subprocess, sys, time

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
TARGET = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))


def built(name, build):
    """A program of ours, which cargo must have built."""
    path = os.path.abspath(os.path.join(TARGET, "release", name))
    if not os.path.exists(path):
        sys.exit(f"{path} is not there: {build}")
    return path


def needed(*tools):
    """Ends when a tool is not there."""
    for name in tools:
        if not shutil.which(name):
            sys.exit(f"{name} is not installed")


def figure(what, value, goal="", digits=2):
    print(f"{what}\t{value:.{digits}f}\t{goal}", flush=True)


def in_use(who, how):
    print(f"in use: {who}: {how}", flush=True)


def medium(directory):
    """On what a directory lies: "xfs on a loop device (direct I/O) over tmpfs"."""
    def find(path, what):
        said = subprocess.run(["findmnt", "-nro", what, "-T", path], capture_output=True, text=True).stdout.split()
        return said[-1] if said else ""

    kind, source = find(directory, "FSTYPE"), find(directory, "SOURCE")
    if not source.startswith("/dev/loop"):
        return kind or "unknown"
    said = subprocess.run(["losetup", "-nO", "DIO,BACK-FILE", source], capture_output=True, text=True).stdout.split()
    if len(said) < 2:
        return f"{kind} on a loop device"
    cache = "direct I/O" if said[0] == "1" else "buffered"
    return f"{kind} on a loop device ({cache}) over {find(os.path.dirname(said[1]), 'FSTYPE')}"


def fill(uri, mebibytes):
    """Writes all of an export once."""
    subprocess.run(["fio", "--name=fill", "--thread", "--ioengine=nbd", f"--uri={uri}", "--rw=write", "--bs=1m", "--iodepth=4",
                    f"--size={mebibytes}m"], check=True, stdout=subprocess.DEVNULL)


class Daemon:
    """`kagami serve` with a home of its own, from start to stop."""

    def __init__(self, home):
        self.program = built("kagami", "cargo build --release")
        self.home, self.sock = home, os.path.join(home, "nbd.sock")
        os.makedirs(home)
        self.log = open(os.path.join(home, "serve.log"), "wb")
        self.process = subprocess.Popen([self.program, "--home", home, "serve"], stdout=self.log, stderr=self.log)
        self.pid = self.process.pid
        while not os.path.exists(os.path.join(home, "api.sock")):
            if self.process.poll() is not None:
                sys.exit(f"the daemon ended: {open(self.log.name, errors='replace').read()[-500:]}")
            time.sleep(0.02)

    def words(self, *words):
        return [self.program, "--home", self.home, *words]

    def __call__(self, *words):
        done = subprocess.run(self.words(*words), capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise RuntimeError(f"kagami {' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def export(self, what):
        """Serves it over NBD; the URI."""
        self("export", "start", what)
        return f"nbd+unix:///{what}?socket={self.sock}"

    def access(self, pool):
        """What carries the I/O of a pool's first medium, as `pool show` says."""
        return json.loads(self("pool", "show", pool, "-o", "json"))["media"][0]["access"]

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()
