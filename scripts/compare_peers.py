"""The same jobs here and in programs that PyPI offers, in turn: bench_results/peers.md and peers-offload.md.

    python3 scripts/compare_peers.py memory [--batches 1,8,64,256] [--rounds 3]
    python3 scripts/compare_peers.py offload [--cap 2GiB] [--rounds 1]

`memory`: the 1.1 B Llama shape, which fits, with as many prompts as sequences in flight. `offload`: a 7 B shape in a
control group of 2 GiB, which it does not fit into; needs root, and 25 GB of disk in --work. All complete the same
prompts with random weights on the same threads: llama.cpp (Q4_0), transformers (bf16; with accelerate where the model
does not fit), and tidemill through `generate`. Runs alternate, so that what else the machine does hits all; ratios are
of runs of the same round. Loading never counts, except in tidemill's own core seconds. A peer whose package is missing
is left out and named. Peers with their settings: scripts/peers/. FlexGen, which needs a card, is not among them yet.
Notes at the end of a record stay when it is written anew.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
PEERS = ROOT / "scripts" / "peers"
sys.path.insert(0, str(PEERS))
import job  # noqa: E402
import llama_cpp_peer  # noqa: E402

OURS = ["--weights", "int4", "--kv-dtype", "int4", "--activations", "int8"]
NAMES = {"memory": "policies/models/llama-1.1b.json", "offload": "policies/models/mistral-7b.json"}
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
NOTES = "\n## Notes\n"
NEEDS = {"llama_cpp_peer": ("llama_cpp", "gguf", "numpy"), "transformers_peer": ("torch", "transformers", "accelerate")}


class Cap:
    """A control group that holds whatever runs in it to so many bytes, page cache included."""

    def __init__(self, size, name):
        self.bytes = size
        first = pathlib.Path("/sys/fs/cgroup/memory")
        self.old = first.is_dir()
        self.path = (first if self.old else first.parent) / f"tidemill-{name}-{os.getpid()}"
        self.path.mkdir()
        self.write("memory.limit_in_bytes" if self.old else "memory.max", self.bytes)

    def write(self, name, value):
        (self.path / name).write_text(str(value))

    def enter(self):
        self.write("cgroup.procs", os.getpid())

    def peak(self):
        return int((self.path / ("memory.max_usage_in_bytes" if self.old else "memory.peak")).read_text())

    def close(self):
        self.path.rmdir()


def size(text):
    """Bytes of such as `2GiB`."""
    number, unit = text[:-3], text[-3:]
    if unit not in UNITS or not number.replace(".", "", 1).isdigit():
        raise argparse.ArgumentTypeError(f"`{text}` is no size such as 2GiB or 600MiB")
    return int(float(number) * UNITS[unit])


def batches(text):
    """Numbers of prompts such as `1,8`."""
    counts = text.split(",")
    if not all(count.isdigit() and int(count) > 0 for count in counts):
        raise argparse.ArgumentTypeError(f"`{text}` is no list of numbers such as 1,8")
    return [int(count) for count in counts]


def forget(folder):
    """Takes files out of the page cache, so that nobody reads what others paid for."""
    os.sync()
    for path in pathlib.Path(folder).rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Failed(Exception):
    """A peer that ended before its job did."""


class Shape:
    """How much a job has to do."""

    def __init__(self, prompts, prompt_len, generated):
        self.prompts, self.prompt_len, self.generated = prompts, prompt_len, generated
        self.tokens = prompts * (prompt_len + generated)

    def __str__(self):
        return f"{self.prompts} x {self.prompt_len} + {self.generated}"


class Peer:
    """A peer's program in a process of its own, loaded when it is made."""

    def __init__(self, name, script, shape, given, threads, cap=None):
        self.name = name
        command = [sys.executable, PEERS / f"{script}.py", "--threads", threads, "--prompts", shape.prompts,
                   "--prompt-len", shape.prompt_len, "--generated", shape.generated, *given]
        try:
            self.process = subprocess.Popen(
                [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                preexec_fn=cap and cap.enter, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        except subprocess.SubprocessError as error:
            raise Failed(f"{name} did not start: {error}") from error
        self.facts = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        try:
            return json.loads(line)
        except ValueError:
            self.process.kill()
            code, said = self.process.wait(), f", after {line.strip()!r}" if line else ""
            raise Failed(f"{self.name} ended with exit code {code}{said}") from None

    def run(self):
        # Whoever has ended gives no answer.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        result = self.answer()
        return {"whole": result["prefill"] + result["decode"], **result}

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


class Tidemill:
    """Our program, which is started anew for every run."""

    def __init__(self, binary, packed, folder, shape, vocab, threads, cap=None):
        self.name, self.facts, self.shape, self.folder, self.cap = "tidemill", "", shape, folder, cap
        self.packed = str(packed)
        source = folder / "in.jsonl"
        with open(source, "w", encoding="utf-8") as file:
            for index in range(shape.prompts):
                line = {"prompt": job.prompt(index, shape.prompt_len, vocab), "max_tokens": shape.generated,
                        "temperature": 0, "ignore_eos": True}
                file.write(json.dumps(line) + "\n")
        # In a control group nearly all of it, rather than the 70 % that are the default; the process needs some itself.
        budget = ["--cpu-memory", str(cap.bytes - (128 << 20))] if cap else []
        self.command = [
            binary, "generate", "--model", packed, "--input", source, "--output", folder / "out.jsonl", "--stats",
            folder / "stats.json", "--progress", "none", "--threads", str(threads), "--device", "host", *budget, *OURS]

    def run(self):
        for old in self.folder.glob("out.jsonl*"):
            old.unlink()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(self.command, stderr=subprocess.PIPE, text=True, preexec_fn=self.cap and self.cap.enter)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode != 0:
            raise Failed(f"tidemill ended with exit code {done.returncode}: {done.stderr.strip()}")
        stats = json.loads((self.folder / "stats.json").read_text())
        assert stats["generated_tokens"] == self.shape.prompts * self.shape.generated
        planned = [line for line in done.stderr.splitlines() if line.startswith(("model ", "planned:"))]
        self.facts = "tidemill " + " ".join(OURS) + ": " + "; ".join(planned).replace(self.packed, "packed")
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {"whole": stats["wall_s"], "cpu": cpu, "bound": stats["bound_tokens_per_s"]}

    def close(self):
        pass


def started(failures, make, *given):
    """The runner that `make` gives, or none and the reason among `failures`."""
    try:
        return [make(*given)]
    except Failed as failed:
        failures.append(str(failed))
        return []


def alternate(runners, rounds, failures):
    """Runs of every runner by name: as many of them in turn as `rounds` says for it. A peer that fails ends, and
    nobody else with it; tidemill has to last."""
    runs = {runner.name: [] for runner in runners}
    with contextlib.ExitStack() as stack:
        for runner in runners:
            stack.callback(runner.close)
        for turn in range(max(rounds(runner.name) for runner in runners)):
            for runner in [runner for runner in runners if runner.name in runs and turn < rounds(runner.name)]:
                try:
                    runs[runner.name].append(runner.run())
                except Failed as failed:
                    if isinstance(runner, Tidemill):
                        raise
                    failures.append(str(failed))
                    del runs[runner.name]
                else:
                    print(runner.name, runs[runner.name][-1], file=sys.stderr)
    return runs


def middle(runs, key):
    return statistics.median(run[key] for run in runs)


def rows(shape, runs, failures):
    """A line for each runner and failure; what we are compared with is tidemill's run of the same round."""
    yield from (f"| {shape} | {failure} | | | | | | | |" for failure in failures)
    ours = runs["tidemill"]
    for name, own in runs.items():
        def rate(key, count):
            return f"{count / middle(own, key):.1f}" if key in own[0] and count else ""

        def ratio(key):
            return statistics.median(peer[key] / mine[key] for peer, mine in zip(own, ours))

        prefill = rate("prefill", shape.prompts * shape.prompt_len)
        decode = rate("decode", shape.prompts * (shape.generated - 1))
        ratios = ("", "") if name == "tidemill" else (f"**{ratio('whole'):.2f}**", f"{ratio('cpu'):.2f}")
        each = ", ".join(f"{run['whole']:.1f}" for run in own)
        yield (f"| {shape} | {name} | {shape.tokens / middle(own, 'whole'):.1f} | {prefill} | {decode} | {each} | "
               f"{middle(own, 'cpu'):.1f} | {ratios[0]} | {ratios[1]} |")


HEAD = ("| prompts x tokens + generated | program | tokens/s, whole job | prefill | decode | seconds of each round | "
        "core seconds | tidemill is faster by | by core seconds |\n|---|---|---|---|---|---|---|---|---|")


def command():
    """How this was called, without paths."""
    given = [part for part in sys.argv[1:] if "/" not in part and part not in ("--bin", "--work")]
    return " ".join(["python3 scripts/compare_peers.py", *given])


def quietly(parts):
    """Runs a command, whose complaints are shown if it fails."""
    done = subprocess.run([str(part) for part in parts], stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise Failed(f"{parts[1]} ended with exit code {done.returncode}: {done.stderr.strip()}")


def has(script):
    missing = [name for name in NEEDS[script] if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{script} is left out: no {', '.join(missing)}", file=sys.stderr)
    return not missing


def binary_of(arguments):
    return str(pathlib.Path(arguments.bin).resolve())


def pack(arguments, model, folder):
    quietly([binary_of(arguments), "pack", "--model", model, "--output", folder, "--weights", "int4"])


def in_memory(arguments, folder):
    """The 1.1 B shape, by sequences in flight. Yields lines of the report."""
    config = ROOT / NAMES["memory"]
    values = json.loads(config.read_text())
    gguf, packed = str(folder / "model.gguf"), folder / "packed"
    llama, transformers = has("llama_cpp_peer"), has("transformers_peer")
    if llama:
        llama_cpp_peer.make_gguf(gguf, values)
    pack(arguments, f"synth:{config}#1", packed)
    yield "# The whole job beside its peers, in memory\n"
    yield (f"`{command()}`, {datetime.date.today()}: the 1.1 B Llama shape with random weights, {arguments.threads} "
           "threads,\nrounds in turn, medians of as many as are listed. Prompts count, loading does not (but for "
           "tidemill's own core seconds,\nwhich contain it).\n")
    yield HEAD
    facts = {}
    for count in arguments.batches:
        shape = Shape(count, arguments.prompt_len, arguments.generated)
        # Many prompts take minutes: one round, unless more are asked for.
        failures, runners, rounds = [], [], arguments.rounds or (3 if count < 64 else 1)

        def peer(name, script, *given):
            runners.extend(started(failures, Peer, name, script, shape, given, arguments.threads))

        if llama:
            peer("llama.cpp", "llama_cpp_peer", "--model", gguf)
        if llama and count == 64:
            peer("llama.cpp, not rearranged", "llama_cpp_peer", "--model", gguf, "--plain")
        if transformers:
            peer("transformers", "transformers_peer", "--model", config)
        runners.append(Tidemill(binary_of(arguments), packed, folder, shape, values["vocab_size"], arguments.threads))
        # Without its rearranged weights llama.cpp takes long: one round tells enough.
        runs = alternate(runners, lambda name: 1 if "not rearranged" in name else rounds, failures)
        yield from rows(shape, runs, failures)
        facts.update((runner.name, runner.facts) for runner in runners)
    yield ""
    yield from (f"{text}.\n" for text in facts.values())


def offloaded(arguments, folder):
    """The 7 B shape where it does not fit. Yields lines of the report."""
    config = ROOT / NAMES["offload"]
    values = json.loads(config.read_text())
    Cap(arguments.cap, "trial").close()
    gguf, packed, whole = folder / "gguf" / "model.gguf", folder / "packed", folder / "whole"
    shape = Shape(arguments.prompts, arguments.prompt_len, arguments.generated)
    small = Shape(16, arguments.prompt_len, 8)
    pack(arguments, f"synth:{config}#1", packed)
    yield "# Bigger than memory beside its peers\n"
    yield (f"`{command()}`, {datetime.date.today()}: a 7 B shape with random weights, every program in a "
           f"control\ngroup of {arguments.cap / 2**30:g} GiB (page cache included, emptied before the first "
           f"round), {arguments.threads} threads, the same disk.\nPrompts count, loading does not.\n")
    yield HEAD
    facts, peaks, bound = {}, [], []

    def compare(peer, shape):
        cap, own = Cap(arguments.cap, "peer"), Cap(arguments.cap, "own")
        with contextlib.closing(cap), contextlib.closing(own):
            forget(folder)
            ours = Tidemill(binary_of(arguments), packed, folder, shape, values["vocab_size"], arguments.threads, own)
            failures = []
            runners = [*started(failures, peer, cap), ours]
            runs = alternate(runners, lambda name: arguments.rounds or 1, failures)
            facts.update((runner.name, runner.facts) for runner in runners)
            groups = [cap, own][-len(runners):]
            peaks.extend((f"{runner.name}, {shape}", group.peak()) for runner, group in zip(runners, groups))
            rate = shape.tokens / middle(runs["tidemill"], "whole")
            bound.append((shape, rate, middle(runs["tidemill"], "bound")))
        return rows(shape, runs, failures)

    if has("transformers_peer"):
        # Keys and values of 64 sequences are 1.3 GB in bf16, which leaves no room for a layer: a smaller job.
        quietly([binary_of(arguments), "synth", "--config", config, "--seed", "1", "--output", whole])
        given = ["--model", whole, "--cpu-memory", arguments.accelerate_memory, "--offload-dir", folder / "offload"]
        make = lambda cap: Peer("accelerate, bf16", "transformers_peer", small, given, arguments.threads, cap)
        yield from compare(make, small)
    if has("llama_cpp_peer"):
        gguf.parent.mkdir()
        llama_cpp_peer.make_gguf(str(gguf), values)
        given = ["--model", gguf, "--plain", "--kv", "q4_0", "--ubatch", "1024"]
        yield from compare(lambda cap: Peer("llama.cpp", "llama_cpp_peer", shape, given, arguments.threads, cap), shape)
    yield ""
    for shape, rate, limit in bound:
        share = 100 * rate / limit
        yield f"{shape}: {rate:.1f} tokens/s are {share:.1f} % of the bound from raw rates ({limit:.1f}).\n"
    yield "Peak of the control group: " + ", ".join(f"{name}: {peak / 2**20:.0f} MiB" for name, peak in peaks) + ".\n"
    yield from (f"{text}.\n" for text in facts.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=NAMES)
    parser.add_argument("--bin", default=str(ROOT / "target" / "release" / "tidemill"))
    parser.add_argument("--work", help="folder for models; the default is a temporary one")
    parser.add_argument("--rounds", type=int, help="3 in memory with less than 64 prompts, else 1")
    parser.add_argument("--batches", type=batches, default="1,8,64,256")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--generated", type=int, default=32)
    parser.add_argument("--cap", type=size, default="2GiB")
    parser.add_argument("--accelerate-memory", default="600MiB", help="what accelerate may keep of the weights")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    arguments = parser.parse_args()
    if not 1 <= arguments.prompt_len <= 2048:
        parser.error("--prompt-len is 1 to 2048")
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        make = {"memory": in_memory, "offload": offloaded}[arguments.which]
        lines = []
        for line in make(arguments, pathlib.Path(folder)):
            print(line, flush=True)
            lines.append(line)
    if not arguments.no_write:
        record = ROOT / "bench_results" / {"memory": "peers.md", "offload": "peers-offload.md"}[arguments.which]
        # What somebody wrote about the figures stays, to be looked through.
        _, mark, notes = record.read_text(encoding="utf-8").partition(NOTES) if record.exists() else ("", "", "")
        record.write_text("\n".join(lines) + "\n" + mark + notes, encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (Failed, OSError) as error:
        sys.exit(f"error: {error}")
