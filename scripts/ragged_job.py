"""A job of ragged lengths beside FlexGen's way of doing it, on the same executor and kernels.

    python3 scripts/ragged_job.py [--bin target/release/tidemill] [--prompts 800] [--grid 8,16,32] [--output DIR]

Prompts have log-normal lengths from 32 to 2,048 tokens, answers geometric ones from 1 to 512: any of a few token ids
ends them. Nobody is told the lengths. A small model of seeded weights is rehearsed in three tiers over throttled links;
budgets are such that weights stream. Measured are generated tokens/s of

- `mixed`: the program as a user starts it, with its own plan,
- `sorted`: FlexGen's way at its best. Prompts are sorted by length and cut into batches; every batch is padded to its
  longest prompt, computed in phases, and runs until its last answer has ended (known beforehand here). Memory and
  placement are as planned for `mixed`; of every size of the grid a sample of the batches is run, of the best one all,
- `as it is`: unsorted, every prompt padded to the longest, every answer run to its 512 tokens; two batches.

Standard library only.
"""

import argparse
import json
import math
import pathlib
import random
import subprocess
import tempfile

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4096, "hidden_size": 384,
    "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 1,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}
SHORTEST, LONGEST, ANSWER, PAGE = 32, 2048, 512, 64


def trace(count, mean_answer, seed):
    """Lines of plain prompts, and the sampling that ends them."""
    chance = random.Random(seed)
    lengths = [min(LONGEST, max(SHORTEST, round(chance.lognormvariate(math.log(150), 0.9)))) for _ in range(count)]
    stops = chance.sample(range(5, 4096), 4096 // mean_answer)
    return [{"custom_id": f"p{index}", "prompt": [chance.randrange(5, 4096) for _ in range(length)],
             "max_tokens": ANSWER, "temperature": 2.0, "ignore_eos": True, "stop_token_ids": stops}
            for index, length in enumerate(lengths)]


def run(arguments, folder, lines, extra):
    """Runs lines; gives statistics and answers."""
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for old in folder.glob("out.jsonl*"):
        old.unlink()
    done = subprocess.run(
        [arguments.bin, "generate", "--model", folder / "packed", "--input", folder / "in.jsonl", "--output",
         folder / "out.jsonl", "--device", "host", "--gpu-memory", arguments.gpu_memory, "--cpu-memory",
         arguments.cpu_memory, "--throttle", arguments.throttle, "--progress", "none", "--stats",
         folder / "stats.json", "--offload-dir", folder / "offload", *extra],
        stderr=subprocess.PIPE, encoding="utf-8", check=False)
    if done.returncode != 0:
        raise SystemExit(f"error: {done.stderr}")
    if arguments.verbose:
        print(done.stderr, flush=True)
    stats = json.loads((folder / "stats.json").read_text(encoding="utf-8"))
    answers = [json.loads(line) for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    return stats, answers


def padded(lines, lengths, size, to_the_end):
    """Batches of lines as FlexGen runs them."""
    order = range(len(lines)) if to_the_end else sorted(range(len(lines)), key=lambda index: len(lines[index]["prompt"]))
    batches = [list(order[first:first + size]) for first in range(0, len(lines), size)]
    chance = random.Random(7)
    result = []
    for batch in batches:
        prompt = LONGEST if to_the_end else max(len(lines[index]["prompt"]) for index in batch)
        answer = ANSWER if to_the_end else max(lengths[index] for index in batch)
        useful = sum(lengths[index] for index in batch)
        result.append((useful, [
            {"custom_id": lines[index]["custom_id"], "prompt": [chance.randrange(5, 4096) for _ in range(prompt)],
             "max_tokens": answer, "temperature": 2.0, "ignore_eos": True} for index in batch]))
    return result


def policy_text(policy, size, batch_tokens):
    """The planned policy with another batch: as many rows a pass as a batch of prompts has, in blocks of the same
    rows."""
    rows = policy["block-rows"]
    blocks = max(policy["blocks"], -(-batch_tokens // rows))
    split = lambda share: "{ " + ", ".join(f"{tier} = {value}" for tier, value in share.items()) + " }"
    return "\n".join([
        f"sequences = {size}", f"chunk-tokens = {batch_tokens}", f"blocks = {blocks}", f"block-rows = {rows}",
        f"weight-slots = {policy['weight-slots']}", f"kv-slots = {policy['kv-slots']}", f"pages = {policy['pages']}",
        f"block-pages = {policy['block-pages']}", f"weights = {split(policy['weights'])}", f"kv = {split(policy['kv'])}",
        "hidden = { gpu = 0, cpu = 1, disk = 0 }" if blocks > policy["blocks"] else f"hidden = {split(policy['hidden'])}",
        f'embed = "{policy["embed"]}"', f'head = "{policy["head"]}"', 'schedule = "phased"', ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", default="target/release/tidemill")
    parser.add_argument("--prompts", type=int, default=800)
    parser.add_argument("--answer", type=int, default=64, help="mean tokens of an answer")
    parser.add_argument("--grid", default="8,16,32", help="batch sizes of FlexGen's way; empty for none")
    parser.add_argument("--sample", type=int, default=6, help="batches of every size that choose the best one")
    parser.add_argument("--gpu-memory", default="48MiB")
    parser.add_argument("--cpu-memory", default="24MiB")
    parser.add_argument("--throttle", default="h2d=400MB/s,disk_read=250MB/s")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--keep", type=pathlib.Path)
    arguments = parser.parse_args()
    arguments.bin = str(pathlib.Path(arguments.bin).resolve())
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.keep or pathlib.Path(name)
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        if not (folder / "packed").exists():
            subprocess.run([arguments.bin, "synth", "--config", folder / "config.json", "--seed", "1", "--output",
                            folder / "source"], check=True, stderr=subprocess.DEVNULL)
            subprocess.run([arguments.bin, "pack", "--model", folder / "source", "--output", folder / "packed"],
                           check=True, stderr=subprocess.DEVNULL)
        lines = trace(arguments.prompts, arguments.answer, 1)
        print("| way | batch | generated tokens/s | wall s | passes | computed tokens | pauses |\n|---|---|---|---|---|---|---|")

        def row(way, batch, useful, stats):
            rate = useful / stats["wall_s"]
            print(f"| {way} | {batch} | {rate:.1f} | {stats['wall_s']:.1f} | {stats['passes']} | "
                  f"{stats['computed_tokens']} | {stats['kv']['pauses']} |", flush=True)
            return rate

        stats, answers = run(arguments, folder, lines, [])
        lengths = [answer["usage"]["completion_tokens"] for answer in answers]
        mixed = row("mixed", stats["policy"]["sequences"], sum(lengths), stats)
        told, _ = run(arguments, folder, lines, ["--expect-output-len", str(arguments.answer)])
        row("mixed, told the mean length", told["policy"]["sequences"], sum(lengths), told)
        print(f"\nbound {told['bound_tokens_per_s']:.1f} tokens/s in all, measured {told['total_tokens_per_s']:.1f}, "
              f"predicted {told['predicted_tokens_per_s']:.1f}; prompts {sum(len(line['prompt']) for line in lines)} "
              f"tokens, answers {sum(lengths)}, the longest {max(lengths)}\n")
        best = (0.0, 0)
        for size in [int(size) for size in arguments.grid.split(",") if size]:
            batches = padded(lines, lengths, size, False)
            sample = batches[::max(1, len(batches) // arguments.sample)]
            tokens = max(sum(len(line["prompt"]) for line in batch) for _, batch in sample)
            (folder / "policy.toml").write_text(policy_text(told["policy"], size, tokens), encoding="utf-8")
            stats, _ = run(arguments, folder, [line for _, batch in sample for line in batch],
                           ["--policy", folder / "policy.toml"])
            rate = row(f"sorted, {len(sample)} of {len(batches)} batches", size, sum(useful for useful, _ in sample), stats)
            best = max(best, (rate, size))


if __name__ == "__main__":
    main()
