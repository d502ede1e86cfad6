#!/usr/bin/env python3
"""The disk lane of a streaming run beside a raw O_DIRECT read of the same files, in interleaved pairs.

usage: disk_rate.py PACKED_DIR [--pairs 5] [--cpu-memory 3GiB] [--planes RATE]

With --planes, of a model packed with compressed planes: runs with plain weights beside runs with planes, the disk
held to RATE (say 1GB/s), with enough prompt rows that cores have work too.

The raw read is four `dd iflag=direct bs=16M` at once, each over its share of the layers; the run is `tidemill generate` with few
sequences, so that the disk binds. Prints a line per pair and the median ratio.
"""

import argparse
import json
import pathlib
import re
import statistics
import subprocess
import tempfile
import time


def raw_rate(layers, readers=4):
    """Bytes per second of direct reads by several readers at once; one alone leaves the drive idle between requests."""
    started, total = time.monotonic(), 0

    def read(mine):
        command = 'for f in "$@"; do dd if="$f" of=/dev/null bs=16M iflag=direct; done'
        return subprocess.Popen(["sh", "-c", command, "sh", *mine], stderr=subprocess.PIPE)

    for reader in [read(layers[index::readers]) for index in range(readers)]:
        total += sum(int(count) for count in re.findall(rb"(\d+) bytes", reader.communicate()[1]))
    return total / (time.monotonic() - started)


def run(binary, model, cpu_memory, scratch, rows=8, compressed=False, flags=()):
    """The statistics of a run with weights on disk, `rows` prompt tokens in each of four lines, three passes."""
    source, output, stats = (scratch / name for name in ("in.jsonl", "out.jsonl", "stats.json"))
    lines = [{"prompt": [5 + i] * rows, "max_tokens": 3, "temperature": 0, "ignore_eos": True} for i in range(4)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for left in scratch.glob("out.jsonl*"):
        left.unlink()
    policy = scratch / "policy.toml"
    policy.write_text(
        f"sequences = 4\nchunk-tokens = {4 * rows}\npages = 9\nweight-slots = 2\nweights = {{ disk = 1.0 }}\n"
        f"compressed = {str(compressed).lower()}\n"
    )
    command = [binary, "generate", "--model", model, "--input", source, "--output", output, "--stats", stats]
    command += ["--policy", policy, "--cpu-memory", cpu_memory, "--progress", "none", "--cache-dir", scratch]
    subprocess.run([*command, *flags], check=True, capture_output=True)
    return json.loads(stats.read_text())


def lane_rate(*arguments):
    """Bytes per second of the disk lane over the whole run, waiting included, and its share of the time."""
    figures = run(*arguments)
    lane = figures["lanes"]["disk_read"]
    return lane["bytes"] / figures["wall_s"], lane["busy_s"] / figures["wall_s"]


def compare_planes(arguments, scratch):
    """Prints plain weights beside compressed planes, pair by pair."""
    gains = []
    for pair in range(arguments.pairs):
        secs, idle = [], []
        for compressed in (False, True):
            flags = ("--throttle", f"disk_read={arguments.planes}")
            figures = run(arguments.binary, arguments.model, arguments.cpu_memory, scratch, 24, compressed, flags)
            secs.append(figures["wall_s"] / figures["passes"])
            idle.append(1 - figures["lanes"]["cpu"]["busy_s"] / figures["wall_s"])
        gains.append(secs[0] / secs[1])
        print(f"pair {pair + 1}: a pass {secs[0]:.2f} s plain (cores {idle[0]:.0%} idle), {secs[1]:.2f} s with planes")
    print(f"median gain {statistics.median(gains):.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--cpu-memory", default="3GiB")
    parser.add_argument("--planes", metavar="RATE")
    parser.add_argument("--binary", default="target/release/tidemill")
    arguments = parser.parse_args()
    layers = sorted(arguments.model.glob("layer-*[0-9].safetensors"))[:12]
    ratios = []
    with tempfile.TemporaryDirectory() as directory:
        if arguments.planes:
            compare_planes(arguments, pathlib.Path(directory))
            return
        for pair in range(arguments.pairs):
            raw = raw_rate(layers)
            lane, share = lane_rate(arguments.binary, arguments.model, arguments.cpu_memory, pathlib.Path(directory))
            ratios.append(lane / raw)
            rates = f"raw {raw / 1e9:.2f} GB/s, lane {lane / 1e9:.2f} GB/s, busy {share:.0%}"
            print(f"pair {pair + 1}: {rates}: {ratios[-1]:.2f}")
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
