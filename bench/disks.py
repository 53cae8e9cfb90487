#!/usr/bin/env python3
"""A VM's disk on VMFS beside its RDM, both over NBD from one daemon: IOPS, latency, CPU per I/O.

  cargo build --release
  bench/disks.py --dir "$(bench/medium up)" [--rounds 7] [--seconds 0.8] [--size 256] [--json FILE]

A daemon of its own in DIR serves C: (a flat VMDK on a VMFS-5 datastore on a LUN) and D: (a raw device mapping of a LUN) of one VM, both
written over before. fio's nbd engine is the client; the disks take turns, workload by workload and round by round, the first of a
round changing. Figures are medians over rounds; "x" is the median of the per-round ratios of VMDK to RDM (goal: at least 0.97).
Package: fio.
"""
import argparse, json, os, shutil, statistics

from common import Daemon, figure, fill, in_use, medium, needed
from nbd import WORKLOADS, ratio, sample


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.8)
    parser.add_argument("--size", type=int, default=256, help="MiB per disk")
    parser.add_argument("--json")
    args = parser.parse_args()
    needed("fio")
    print(f"on {medium(args.dir)}, {args.size} MiB per disk, {args.rounds} rounds of {args.seconds} s")
    place = os.path.join(args.dir, "disks")
    shutil.rmtree(place, ignore_errors=True)
    daemon = Daemon(os.path.join(place, "home"))
    found = {}
    try:
        daemon("pool", "create", "pool1", "--size", f"{4 * args.size + 2048}M")
        daemon("lun", "create", "vm-d", "--size", f"{args.size}M")
        daemon("datastore", "create", "ds1", "--size", f"{2 * args.size + 1024}M")
        daemon("vm", "create", "vm", "--datastore", "ds1", "--disk", f"{args.size}M", "--rdm", "vm-d")
        in_use("VMDK and RDM", daemon.access("pool1"))
        disks = {"VMDK on VMFS": "vm/scsi0:0", "RDM": "vm/scsi0:1"}
        for disk in disks.values():
            fill(daemon.export(disk), args.size)
        for title, rw, size, depth in WORKLOADS:
            for number in range(args.rounds):
                order = list(disks.items())
                for name, disk in order if number % 2 else reversed(order):
                    found.setdefault(title, {}).setdefault(name, []).append(sample(daemon.pid, daemon.sock, rw, size, depth, args, disk))
    finally:
        daemon.stop()
        shutil.rmtree(place, ignore_errors=True)
    print("| workload | disk | IOPS | MB/s | p50 us | p99 us | CPU us/IO | of it server | VMDK x |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for title, by_name in found.items():
        for name, samples in by_name.items():
            middle = {key: statistics.median(s[key] for s in samples) for key in samples[0]}
            print(f"| {title} | {name} | {middle['iops']:,.0f} | {middle['mb_s']:,.0f} | {middle['p50_us']:.0f} | {middle['p99_us']:.0f} | "
                  f"{middle['cpu_us']:.1f} | {middle['server_us']:.1f} | {ratio(by_name['VMDK on VMFS'], samples):.3f} |")
    for title, by_name in found.items():
        figure(f"VMDK over NBD, {title}, IOPS against RDM over NBD", ratio(by_name["VMDK on VMFS"], by_name["RDM"]), ">= 0.97", 3)
    if args.json:
        with open(args.json, "w") as out:
            json.dump(found, out, indent=1)


if __name__ == "__main__":
    main()
