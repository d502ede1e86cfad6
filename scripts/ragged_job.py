"""A job of ragged lengths beside FlexGen's way of doing it, on the same executor, kernels, placement and memory.

    python3 scripts/ragged_job.py [--bin target/release/tidemill] [--prompts 640] [--pages 140] [--grid 8,12,16]

Prompts have log-normal lengths from 32 to 2,048 tokens, answers geometric ones from 1 to 512: any of a few token ids
ends them, and nobody is told when. A small model of seeded weights is rehearsed in three tiers: all layers stream from
main memory and disk over throttled links, the cache of PAGES pages stays with the device. Measured are generated
tokens/s of

- `mixed`: mixed passes, prompts begin as the lengths learned so far allow; once with what paused sequences have
  computed kept in files, and once with it computed again,
- `sorted`: FlexGen's way at its best. Prompts are sorted by length and cut into batches; every batch is padded to its
  longest prompt, computed in phases, and runs until its last answer has ended (known beforehand here). A sample of the
  batches is run for every size of the grid,
- `as it is`: unsorted, every prompt padded to the longest, every answer run to its 512 tokens; one batch of as many as
  the cache holds.

The bound: a pass cannot be shorter than the slower link takes for the weights, and no more sequences are in flight than
the cache holds pages for, at the mean number of pages that these sequences have. Standard library only.
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
# Of the layers' weights.
DISK = 0.4


def trace(count, mean_answer, seed):
    """Lines of plain prompts, and the sampling that ends them."""
    chance = random.Random(seed)
    lengths = [min(LONGEST, max(SHORTEST, round(chance.lognormvariate(math.log(150), 0.9)))) for _ in range(count)]
    stops = chance.sample(range(5, 4096), 4096 // mean_answer)
    return [{"custom_id": f"p{index}", "prompt": [chance.randrange(5, 4096) for _ in range(length)],
             "max_tokens": ANSWER, "temperature": 2.0, "ignore_eos": True, "stop_token_ids": stops}
            for index, length in enumerate(lengths)]


def run(arguments, folder, lines):
    """Runs lines under the policy in the folder; gives statistics and answers."""
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for old in folder.glob("out.jsonl*"):
        old.unlink()
    done = subprocess.run(
        [arguments.bin, "generate", "--model", folder / "packed", "--input", folder / "in.jsonl", "--output",
         folder / "out.jsonl", "--device", "host", "--gpu-memory", "1GiB", "--policy", folder / "policy.toml",
         "--throttle", arguments.throttle, "--progress", "none", "--stats", folder / "stats.json"],
        stderr=subprocess.PIPE, encoding="utf-8", check=False)
    if done.returncode != 0:
        raise SystemExit(f"error: {done.stderr}")
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


def policy_text(sequences, chunk_tokens, blocks, block_rows, pages, schedule, paused=0):
    return "\n".join([
        f"sequences = {sequences}", f"chunk-tokens = {chunk_tokens}", f"blocks = {blocks}", f"block-rows = {block_rows}",
        "weight-slots = 3", "kv-slots = 2", f"pages = {pages}", f"block-pages = {pages}",
        f"paused-pages = {paused}",
        f"weights = {{ gpu = 0, cpu = {1 - DISK}, disk = {DISK} }}", "kv = { gpu = 1, cpu = 0, disk = 0 }",
        "hidden = { gpu = 1, cpu = 0, disk = 0 }", 'embed = "gpu"', 'head = "gpu"', f'schedule = "{schedule}"', ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", default="target/release/tidemill")
    parser.add_argument("--prompts", type=int, default=640)
    parser.add_argument("--pages", type=int, default=140)
    parser.add_argument("--answer", type=int, default=64, help="mean tokens of an answer")
    parser.add_argument("--grid", default="8,12,16", help="batch sizes of FlexGen's way; empty for `mixed` alone")
    parser.add_argument("--sample", type=int, default=5, help="batches that are run of every size")
    parser.add_argument("--link", type=float, default=400, help="h2d in MB/s; the disk does half of it")
    arguments = parser.parse_args()
    arguments.bin = str(pathlib.Path(arguments.bin).resolve())
    arguments.throttle = ",".join(f"{link}={arguments.link / part}MB/s" for link, part in
                                  [("h2d", 1), ("d2h", 1), ("disk_read", 2), ("disk_write", 2)])
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        subprocess.run([arguments.bin, "synth", "--config", folder / "config.json", "--seed", "1", "--output",
                        folder / "source"], check=True, stderr=subprocess.DEVNULL)
        subprocess.run([arguments.bin, "pack", "--model", folder / "source", "--output", folder / "packed"],
                       check=True, stderr=subprocess.DEVNULL)
        lines = trace(arguments.prompts, arguments.answer, 1)
        print("| way | batch | generated tokens/s | wall s | passes | rows computed | pauses |\n|---|---|---|---|---|---|---|",
              flush=True)

        def row(way, batch, lengths, lines, policy):
            """Runs `lines` under a policy; `lengths` are the useful tokens, none for all that are generated."""
            (folder / "policy.toml").write_text(policy, encoding="utf-8")
            stats, answers = run(arguments, folder, lines)
            useful = sum(lengths) if lengths else stats["generated_tokens"]
            rate = useful / stats["wall_s"]
            print(f"| {way} | {batch} | {rate:.1f} | {stats['wall_s']:.1f} | {stats['passes']} | "
                  f"{stats['computed_tokens']} | {stats['kv']['pauses']} |", flush=True)
            return rate, stats, answers

        pages = arguments.pages
        mixed, stats, answers = row("mixed", "as fits", None, lines,
                                    policy_text(96, 256, 1, 352, pages, "mixed", pages // 4))
        again, _, same = row("mixed, paused ones computed again", "as fits", None, lines,
                             policy_text(96, 256, 1, 352, pages, "mixed"))
        assert answers == same
        lengths = [answer["usage"]["completion_tokens"] for answer in answers]
        streamed = stats["lanes"]["h2d"]["bytes"] / stats["passes"]
        pass_secs = max(streamed / arguments.link / 1e6,
                        stats["lanes"]["disk_read"]["bytes"] / stats["passes"] / arguments.link * 2 / 1e6)
        # Pages that a sequence holds, on average over its passes.
        held = sum(-(-(len(line["prompt"]) + at) // PAGE) for line, length in zip(lines, lengths) for at in range(length))
        resident = pages / (held / sum(lengths))
        bound = resident / pass_secs
        best = 0.0
        print(f"\nA pass takes {1e3 * pass_secs:.1f} ms at least: bound {bound:.1f} generated tokens/s, "
              f"{100 * mixed / bound:.1f} % of it measured, {100 * again / bound:.1f} % where paused sequences are "
              f"computed again. {arguments.prompts / resident:.1f} prompts for each of {resident:.1f} resident.\n",
              flush=True)
        if not arguments.grid:
            return
        for size in [int(size) for size in arguments.grid.split(",")]:
            batches = padded(lines, lengths, size, False)
            sample = batches[len(batches) // arguments.sample // 2::max(1, len(batches) // arguments.sample)]
            tokens = max(sum(len(line["prompt"]) for line in batch) for _, batch in sample)
            policy = policy_text(size, tokens, -(-tokens // 1024) + 1, 1024 + LONGEST, pages, "phased")
            rate, _, _ = row(f"sorted, {len(sample)} of {len(batches)} batches", size,
                             [useful for useful, _ in sample], [line for _, batch in sample for line in batch], policy)
            best = max(best, rate)
        size = pages // -(-(LONGEST + ANSWER) // PAGE)
        useful, batch = padded(lines, lengths, size, True)[0]
        mean = sum(lengths) / len(lengths) * size
        policy = policy_text(size, size * LONGEST, size + 1, 1024 + LONGEST, pages, "phased")
        as_it_is, _, _ = row("as it is, one batch of the mean useful tokens", size, [mean], batch, policy)
        print(f"\nPrompts {sum(len(line['prompt']) for line in lines)} tokens, answers {sum(lengths)}, the longest "
              f"{max(lengths)}.\n"
              f"Mixed is {mixed / best:.2f} times FlexGen's way at its best, {mixed / as_it_is:.1f} times as it is.")


if __name__ == "__main__":
    main()
