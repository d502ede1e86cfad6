"""lm-evaluation-harness on Tidemill beside its own `hf` backend: same models, same tasks, sample by sample."""

import os
import sys

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lm_eval
import lm_eval.models  # registers hf
import lm_eval.tasks

import tidemill.lm_eval  # registers the model

TASKS = ["tidemill_labelling", "tidemill_stories", "tidemill_arithmetic"]
TOLERANCE = 1e-3


def evaluate(model, arguments, limit, chat):
    manager = lm_eval.tasks.TaskManager(include_path="examples/lm-eval")
    return lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=TASKS, task_manager=manager, limit=limit, bootstrap_iters=0,
        apply_chat_template=chat, batch_size=8 if model == "hf" else None, device="cpu" if model == "hf" else None)


def compare(directory, limit, chat=False, context=None):
    bound = {"max_length": context} if context else {}
    hf = evaluate("hf", {"pretrained": directory, "dtype": "float32", **bound}, limit, chat)
    flags = {"weights": "f32", "kv_dtype": "f32", "progress": "none"}
    ours = evaluate("tidemill", {"model": directory, **flags, **bound}, limit, chat)
    worst, decisions = 0.0, 0
    for task in TASKS:
        for theirs, mine in zip(hf["samples"][task], ours["samples"][task], strict=True):
            for their, my in zip(theirs["filtered_resps"], mine["filtered_resps"], strict=True):
                if isinstance(their, str):
                    assert my == their, f"{task}: {my!r}, hf has {their!r}"
                    decisions += 1
                    continue
                values = [(my, their)] if isinstance(their, float) else [(my[0], their[0])]
                worst = max(worst, *(abs(a - b) for a, b in values))
                if not isinstance(their, float):
                    assert my[1] == their[1], f"{task}: greedy {my}, hf has {their}"
                    decisions += 1
        for name, value in hf["results"][task].items():
            if isinstance(value, float):
                difference = abs(value - ours["results"][task][name]) / max(1.0, abs(value))
                assert difference <= TOLERANCE, f"{task} {name}: {ours['results'][task][name]}, hf has {value}"
        shown = {name: round(value, 5) for name, value in ours["results"][task].items() if isinstance(value, float)}
        print(f"{directory} {task}: {shown}")
    assert worst <= TOLERANCE, f"log-likelihoods differ by {worst}"
    print(f"{directory}{', chat' if chat else ''}: log-likelihoods within {worst:.2e} of hf, "
          f"{decisions} decisions and texts identical")


def main():
    compare("demo", limit=40)
    compare("demo", limit=10, chat=True)
    # Windows: texts of some hundred tokens in a context of 128.
    compare("demo", limit=10, context=128)
    compare("tests/goldens/qwen2-tied", limit=10)


if __name__ == "__main__":
    sys.exit(main())
