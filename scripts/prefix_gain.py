"""What shared beginnings save on a job like MMLU: bench_results/prefix-sharing.md.

    python3 scripts/prefix_gain.py [--bin target/release/tidemill] [--subjects 57] [--questions 100] [--rounds 1]
        [--kv-policy full] [--print]

SUBJECTS few-shot headers of 400 to 900 tokens with QUESTIONS questions each, in order or mixed up, one token asked of
each, on the demo model; with and without sharing, alternating. Completions must be equal. Standard library only.
"""

import argparse
import datetime
import json
import pathlib
import random
import statistics
import subprocess
import tempfile

RESULTS = pathlib.Path(__file__).resolve().parent.parent / "bench_results"
PAGE = 64


def prompts(subjects, questions, mixed):
    chance = random.Random(7)
    tokens = lambda count: [chance.randrange(20, 620) for _ in range(count)]
    headers = [tokens(chance.randint(400, 900)) for _ in range(subjects)]
    job = [header + tokens(chance.randint(20, 100)) for header in headers for _ in range(questions)]
    if mixed:
        chance.shuffle(job)
    return job


def could_be_saved(job):
    """Tokens of whole pages that an earlier prompt has, if nothing is ever forgotten; a last token is always computed."""
    known, saved = set(), 0
    for prompt in job:
        pages = [tuple(prompt[:end]) for end in range(PAGE, len(prompt) + 1, PAGE)]
        saved += sum(PAGE for page in pages if page in known and len(page) < len(prompt))
        known.update(pages)
    return saved


def run(binary, folder, kv_policy, sharing):
    for old in folder.glob("out.jsonl*"):
        old.unlink()
    subprocess.run(
        [binary, "generate", "--model", "demo", "--input", folder / "in.jsonl", "--output", folder / "out.jsonl",
         "--kv-policy", kv_policy, "--prefix-sharing", sharing, "--progress", "none", "--stats", folder / "stats.json"],
        check=True, stderr=subprocess.DEVNULL)
    return json.loads((folder / "stats.json").read_text(encoding="utf-8")), (folder / "out.jsonl").read_bytes()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", default="target/release/tidemill")
    parser.add_argument("--subjects", type=int, default=57)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=1, help="pairs of runs")
    parser.add_argument("--kv-policy", default="full")
    parser.add_argument("--print", action="store_true", help="print the table and leave the record as it is")
    arguments = parser.parse_args()
    binary = str(pathlib.Path(arguments.bin).resolve())
    rows = []
    for mixed in (False, True):
        job = prompts(arguments.subjects, arguments.questions, mixed)
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            lines = (json.dumps({"prompt": prompt, "max_tokens": 1, "temperature": 0}) + "\n" for prompt in job)
            (folder / "in.jsonl").write_text("".join(lines), encoding="utf-8")
            way = lambda sharing: run(binary, folder, arguments.kv_policy, sharing)
            pairs = [(way("on"), way("off")) for _ in range(arguments.rounds)]
        if any(on[1] != off[1] for on, off in pairs):
            raise SystemExit("completions differ")
        on, off = pairs[0][0][0], pairs[0][1][0]
        gain = statistics.median(off["wall_s"] / on["wall_s"] for (on, _), (off, _) in pairs)
        saved = on["prefix_shared_tokens"] / could_be_saved(job)
        rows.append(
            f"| {'mixed up' if mixed else 'by subject'} | {len(job)} | {on['prompt_tokens']} | "
            f"{on['computed_tokens']} | {100 * saved:.1f} % | {off['wall_s']:.1f} s | {on['wall_s']:.1f} s | "
            f"{gain:.2f} |")
    head = ("| order | prompts | prompt tokens | computed | of what could be saved | without sharing | with | gain |",
            "|---|---|---|---|---|---|---|---|")
    text = "\n".join(line for line in (
        "# Prompts that begin alike", "",
        f"`python3 scripts/prefix_gain.py --subjects {arguments.subjects} --questions {arguments.questions} --rounds "
        f"{arguments.rounds}`, {datetime.date.today()}: few-shot headers", "of 400 to 900 tokens with questions of 20 to 100 behind them, one "
        "token asked of each, the demo model, a shared machine.", "Completions are equal byte for byte.", "",
        *head, *rows, ""))
    print(text)
    if arguments.print:
        return
    record = RESULTS / "prefix-sharing.md"
    # Sections behind the table are written by hand, and stay.
    _, mark, rest = record.read_text(encoding="utf-8").partition("\n## ") if record.exists() else ("", "", "")
    record.write_text(text + mark + rest, encoding="utf-8")


if __name__ == "__main__":
    main()
