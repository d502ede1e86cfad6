"""Held-out quality of the demo model, measured through tidemill itself.

    python3 scripts/demo_quality.py [--bin target/release/tidemill] [-- FLAGS OF generate]

Stories are scored (echo, max_tokens 0) and compared with their exact perplexity under the grammar; tasks are answered
greedily and count as solved when the answer is the reference. Standard library only.
"""

import argparse
import json
import math
import pathlib
import subprocess
import tempfile

TASKS = pathlib.Path(__file__).resolve().parent.parent / "examples" / "tasks"


def read(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def generate(binary, lines, flags):
    """Answers to the lines, in order."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = pathlib.Path(folder, "in.jsonl"), pathlib.Path(folder, "out.jsonl")
        source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        model = [] if "--model" in flags else ["--model", "demo"]
        command = [binary, "generate", "--input", source, "--output", output, "--progress", "none"]
        subprocess.run(command + model + flags, check=True, stderr=subprocess.DEVNULL)
        return read(output)


def perplexity(binary, flags):
    stories = read(TASKS / "stories.jsonl")
    lines = [{"prompt": story["text"], "max_tokens": 0, "echo": True, "logprobs": 0} for story in stories]
    nats = tokens = 0
    for answer in generate(binary, lines, flags):
        scores = [score for score in answer["logprobs"]["token_logprobs"] if score is not None]
        nats, tokens = nats - sum(scores), tokens + len(scores)
    exact_nats, exact_tokens = (sum(story[key] for story in stories) for key in ("nats", "tokens"))
    assert tokens == exact_tokens, f"{tokens} tokens scored, {exact_tokens} expected"
    model, exact = math.exp(nats / tokens), math.exp(exact_nats / exact_tokens)
    return f"perplexity {model:.4f}, exact {exact:.4f}, excess {100 * (model / exact - 1):.2f} % over {tokens} tokens"


def solves(text, reference):
    """Whether the answer begins with the reference as whole words."""
    rest = text.strip().removeprefix(reference.strip())
    return rest != text.strip() and not rest[:1].isalnum()


def accuracy(binary, task, flags):
    cases = read(TASKS / f"{task}.jsonl")
    lines = [{"prompt": case["prompt"], "max_tokens": 8, "temperature": 0} for case in cases]
    answers = generate(binary, lines, flags)
    solved = sum(
        any(solves(answer["text"], reference) for reference in case["references"])
        for answer, case in zip(answers, cases))
    return f"{solved} of {len(cases)} = {100 * solved / len(cases):.1f} %"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", default="target/release/tidemill")
    parser.add_argument("flags", nargs="*", help="flags of generate, such as --kv-dtype f16")
    arguments = parser.parse_args()
    print(f"stories     {perplexity(arguments.bin, arguments.flags)}")
    for task in ("recall", "labelling", "arithmetic"):
        print(f"{task:<11} {accuracy(arguments.bin, task, arguments.flags)}")


if __name__ == "__main__":
    main()
