"""How much a bounded cache gains where the cache's memory decides the batch: generated tokens/s beside `full`.

    python3 scripts/kv_bound.py [--bin target/release/tidemill] [--places 12] [--requests 120]

A small model of seeded weights, prompts of 512 tokens and 512 generated; its weights stream over a throttled link, its
cache stays with the device and holds PLACES sequences in full. The same bytes of cache are given to every policy, and
to `full` once more before and after. Standard library only.
"""

import argparse
import json
import pathlib
import random
import subprocess
import tempfile

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4096, "hidden_size": 512,
    "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}
PROMPT, ANSWER, PAGE = 512, 512, 64
FULL, HEAVY, SINK = "full", "h2o:heavy=103,recent=102", "sink:start=4,recent=201"
WHOLE = "h2o:keep=205,recent=8,stretch=1.0"
# Pages of a sequence that answers: all positions but the last; what is kept and one token more; the first positions'
# page, and the latest positions' with one that is being written. Then those that it holds more while its prompt is read:
# a stretch before evictions, or all of it.
PAGES_EACH = {FULL: (-(-(PROMPT + ANSWER - 1) // PAGE), 0), HEAVY: (-(-206 // PAGE), 1),
              WHOLE: (-(-206 // PAGE), -(-PROMPT // PAGE) - -(-206 // PAGE)), SINK: (1 + -(-200 // PAGE) + 1, 0)}
# Prompts that are read at the same time.
READING = 2


def policy_text(places, pages):
    return "\n".join([
        f"sequences = {places}", f"chunk-tokens = {max(64, places)}", "blocks = 1", f"block-rows = {2 * places + 64}",
        "weight-slots = 3", "kv-slots = 1", f"pages = {pages}", f"block-pages = {pages}",
        "weights = { gpu = 0, cpu = 1, disk = 0 }", "kv = { gpu = 1, cpu = 0, disk = 0 }",
        "hidden = { gpu = 1, cpu = 0, disk = 0 }", 'embed = "gpu"', 'head = "gpu"', ""])


def run(folder, binary, link, requests, kv_policy, frame_pages):
    """Generated tokens/s, sequences in flight and bytes with the device."""
    each, more = PAGES_EACH[kv_policy]
    places = min((frame_pages - READING * more) // each, requests)
    (folder / "policy.toml").write_text(policy_text(places, frame_pages), encoding="utf-8")
    for old in folder.glob("out.jsonl*"):
        old.unlink()
    subprocess.run(
        [binary, "generate", "--model", f"synth:{folder / 'config.json'}#1", "--input", folder / "in.jsonl", "--output",
         folder / "out.jsonl", "--policy", folder / "policy.toml", "--kv-policy", kv_policy, "--device", "host",
         "--gpu-memory", "4GiB", "--throttle", f"h2d={link}", "--progress", "none", "--stats", folder / "stats.json"],
        check=True, stderr=subprocess.DEVNULL)
    stats = json.loads((folder / "stats.json").read_text(encoding="utf-8"))
    return stats["generated_tokens_per_s"], places, stats["passes"], stats["peak_bytes"]["gpu"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", default="target/release/tidemill")
    parser.add_argument("--places", type=int, default=12)
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--link", default="1GB/s")
    arguments = parser.parse_args()
    binary = str(pathlib.Path(arguments.bin).resolve())
    pages = arguments.places * (PROMPT + ANSWER) // PAGE
    # A page that keeps scores has 512 bytes more for every 16 KiB.
    scored = pages * 32 // 33
    chance = random.Random(1)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        lines = [{"prompt": [chance.randrange(5, 4000) for _ in range(PROMPT)], "max_tokens": ANSWER, "temperature": 0,
                  "ignore_eos": True} for _ in range(arguments.requests)]
        (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        print("| kv policy | sequences in flight | passes | device memory | generated tokens/s |\n|---|---|---|---|---|")
        rates = {}
        for kv_policy, room in (
                (FULL, pages), (HEAVY, scored), (WHOLE, scored), (SINK, pages), (FULL, pages)):
            rate, places, passes, used = run(folder, binary, arguments.link, arguments.requests, kv_policy, room)
            rates.setdefault(kv_policy, []).append(rate)
            print(f"| {kv_policy} | {places} | {passes} | {used / 1e6:.0f} MB | {rate:.1f} |", flush=True)
        full = sum(rates[FULL]) / len(rates[FULL])
        for kv_policy, found in rates.items():
            print(f"\n{kv_policy}: {found[0] / full:.2f} times full")


if __name__ == "__main__":
    main()
