"""What compression and bounded caches cost the demo model: bench_results/quality.json and quality.md.

    python3 scripts/quality.py [--bin target/release/tidemill] [--jobs N] [--only TEXT]

Every setting is measured as `scripts/demo_quality.py` does, on held-out stories (perplexity) and tasks (share solved).
With `--only`, settings that contain the text are, and the others are taken from quality.json. Standard library only.
"""

import argparse
import json
import pathlib
from concurrent.futures import ThreadPoolExecutor

import demo_quality

RESULTS = pathlib.Path(__file__).resolve().parent.parent / "bench_results"
TASKS = ("recall", "labelling", "arithmetic")
SHARES = (0.5, 0.2, 0.1, 0.05)


def h2o(share):
    return f"h2o:heavy={share / 2:g},recent={share / 2:g}"


def pyramid(share):
    return f"pyramid:heavy={share / 2:g},recent={share / 2:g}"


def per_head(share):
    return f"per-head:heavy={share / 2:g},recent={share / 2:g}"


def few_latest(share):
    return f"h2o:keep={share:g},recent=8"


def whole_prompt(share):
    return f"h2o:keep={share:g},recent=8,stretch=1.0"


def local(share):
    return f"sink:start=0,recent={share:g}"


def sink(share):
    return f"sink:start=4,recent={share:g}"


def sections():
    """Titles, and the settings below them: flags beside those of the baseline."""
    yield "Weights and activations", [
        ["--weights", weights, "--activations", activations]
        for weights, activations in (
            ("f32", "f32"), ("bf16", "f32"), ("f16", "f32"), ("int8", "f32"), ("int8", "int8"), ("int4", "f32"),
            ("int4", "int8"))
    ]
    yield "KV dtype", [["--kv-dtype", dtype] for dtype in ("f32", "bf16", "f16", "int8", "int4")]
    yield "KV policy, share of prompt + max_tokens", [["--kv-policy", "full"]] + [
        ["--kv-policy", policy(share)] for share in SHARES
        for policy in (h2o, few_latest, whole_prompt, pyramid, per_head, sink, local)]
    yield "Together", [
        ["--weights", "int4", "--activations", "int8", "--kv-dtype", "int8"],
        ["--weights", "int4", "--activations", "int8", "--kv-dtype", "int4"],
        ["--weights", "int4", "--activations", "int8", "--kv-dtype", "int4", "--kv-policy", h2o(0.5)],
        ["--weights", "int4", "--activations", "int8", "--kv-dtype", "int4", "--kv-policy", h2o(0.2)],
        ["--weights", "int4", "--activations", "int8", "--kv-dtype", "int4", "--kv-policy", whole_prompt(0.2)],
    ]


def measure(binary, flags):
    """Perplexity and shares solved, as numbers."""
    given = set(flags[::2])
    base = [flag for pair in (("--weights", "f32"), ("--kv-dtype", "f32")) if pair[0] not in given for flag in pair]
    perplexity = demo_quality.perplexity(binary, flags + base)
    result = {"flags": " ".join(flags), "perplexity": float(perplexity.split()[1].rstrip(","))}
    for task in TASKS:
        solved, _, total, *_ = demo_quality.accuracy(binary, task, flags + base).split()
        result[task] = 100 * int(solved) / int(total)
    return result


def table(title, rows, baseline):
    yield f"## {title}\n"
    yield "| flags | perplexity | change | " + " | ".join(TASKS) + " |"
    yield "|---" * (3 + len(TASKS)) + "|"
    for row in rows:
        change = 100 * (row["perplexity"] / baseline["perplexity"] - 1)
        solved = " | ".join(f"{row[task]:.1f}" for task in TASKS)
        yield f"| `{row['flags']}` | {row['perplexity']:.4f} | {change:+.2f} % | {solved} |"
    yield ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", default="target/release/tidemill")
    parser.add_argument("--jobs", type=int, default=2, help="settings that are measured at the same time")
    parser.add_argument("--only", help="measure settings that contain this")
    arguments = parser.parse_args()
    binary = str(pathlib.Path(arguments.bin).resolve())
    known = {}
    if arguments.only:
        record = json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))
        known = {row["flags"]: row for rows in record.values() for row in rows if arguments.only not in row["flags"]}

    def run(flags):
        return known.get(" ".join(flags)) or measure(binary, flags + ["--threads", "1"])

    with ThreadPoolExecutor(arguments.jobs) as pool:
        measured = [(title, pool.map(run, settings)) for title, settings in sections()]
        measured = [(title, list(rows)) for title, rows in measured]
    for _, rows in measured:
        for row in rows:
            row["flags"] = row["flags"].removesuffix(" --threads 1")
    baseline = measured[0][1][0]
    (RESULTS / "quality.json").write_text(json.dumps(dict(measured), indent=1) + "\n", encoding="utf-8")
    # What was written above the tables stays.
    text = (RESULTS / "quality.md").read_text(encoding="utf-8").partition("## ")[0]
    for title, rows in measured:
        text += "\n".join(table(title, rows, baseline)) + "\n"
    (RESULTS / "quality.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
