"""HELM with Tidemill's runner beside `tidemill eval` on what a dry run wrote: the same results, the same metrics."""

import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile

from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.common.codec import from_json

ENTRIES = [
    "tidemill_fact:seed=1", "tidemill_fact:seed=2", "tidemill_joint:seed=1", "tidemill_joint:seed=2",
    "tidemill_pattern:mode=pattern_match", "tidemill_natural:difficulty=easy", "tidemill_summary:seed=1",
    "tidemill_separate:method=original", "tidemill_separate:method=calibrated", "tidemill_text:",
]
# What HELM computes beside: how long things took and how sure the model was, by other programs' means.
BESIDE = ("num_prompt_tokens", "num_completion_tokens", "num_output_tokens", "inference_", "training_", "batch_size",
          "ece_", "platt_", "selective_")
CONFIG = {
    "model_deployments.yaml": {"model_deployments": [{
        "name": "tidemill/demo", "model_name": "tidemill/demo", "tokenizer_name": "tidemill/demo",
        "max_sequence_length": 900, "client_spec": {"class_name": "helm.clients.simple_client.SimpleClient"}}]},
    "model_metadata.yaml": {"models": [{
        "name": "tidemill/demo", "display_name": "Demo", "description": "Demo.", "access": "open",
        "creator_organization_name": "Tidemill", "release_date": None,
        "tags": ["TEXT_MODEL_TAG", "FULL_FUNCTIONALITY_TEXT_MODEL_TAG"]}]},
}


def tokenizer():
    directory = str(pathlib.Path("demo").resolve())
    config = json.loads(pathlib.Path("demo/tokenizer_config.json").read_text())
    named = {key: config.get(key) if isinstance(config.get(key), str) else "" for key in ("bos_token", "eos_token")}
    return {"tokenizer_configs": [{
        "name": "tidemill/demo", "end_of_text_token": named["eos_token"], "prefix_token": named["bos_token"],
        "tokenizer_spec": {"class_name": "helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer",
                           "args": {"pretrained_model_name_or_path": directory}}}]}


def helm(folder, suite, *flags):
    binary = pathlib.Path(sys.executable).with_name("helm-run")
    # The text adapter makes no prompts from models, so its entry has no arguments of its own.
    entries = [f"{entry}{'' if entry.endswith(':') else ','}model=tidemill/demo" for entry in ENTRIES]
    command = [binary, "--plugins", "helm_plugin", "--run-entries", *entries, "--suite", suite, "-m", "20", "-n", "1",
               "--local-path", folder / "config", "--output-path", folder / "out", "--disable-cache", *flags]
    path = os.pathsep.join([str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TIDEMILL_MODEL": "demo", "TIDEMILL_PROGRESS": "none", "PYTHONPATH": path,
                   "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment)
    return sorted(path.parent for path in (folder / "out" / "runs" / suite).glob("*/scenario_state.json"))


def key(stat):
    return json.dumps(stat["name"], sort_keys=True)


def compare_stats(theirs, mine, where):
    theirs = {key(stat): stat for stat in theirs}
    mine = {key(stat): stat for stat in mine}
    counted = 0
    for name, stat in theirs.items():
        short = stat["name"]["name"]
        if short.startswith(BESIDE):
            continue
        if stat["count"] == 0 and name not in mine:
            continue
        assert name in mine, f"{where}: no {name}"
        for field in ("count", "sum", "sum_squared", "min", "max", "mean", "variance", "stddev"):
            a, b = stat.get(field, 0), mine[name][field]
            # A deviation is the root of a difference of nearly equal numbers.
            close = math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-6 if field in ("variance", "stddev") else 1e-12)
            assert close, f"{where}: {name} {field} {b}, HELM has {a}"
        counted += 1
    more = [name for name in mine if name not in theirs]
    assert not more, f"{where}: HELM has no {more}"
    return counted


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "config").mkdir()
        for name, content in {**CONFIG, "tokenizer_configs.yaml": tokenizer()}.items():
            (folder / "config" / name).write_text(json.dumps(content))
        ran = helm(folder, "ran", "--runner-class-name", "tidemill.helm.BatchRunner")
        dry = helm(folder, "dry", "--dry-run")
        assert len(ran) == len(dry) == len(ENTRIES), f"{len(ran)} and {len(dry)} of {len(ENTRIES)} entries ran"
        results = folder / "eval"
        command = [os.environ["TIDEMILL_BIN"], "eval", "--model", "demo", "--progress", "none", "--output", results]
        subprocess.run([*command, "--scenario", *(run / "scenario_state.json" for run in dry)], check=True)
        for run in ran:
            read = lambda place, name: json.loads((place / f"{name}.json").read_text())
            mine = results / run.name
            # HELM's own reader takes our copy, and finds in it what its own run got.
            states = [from_json((place / "scenario_state.json").read_text(), ScenarioState) for place in (run, mine)]
            pairs = list(zip(*(state.request_states for state in states), strict=True))
            for theirs, ours in pairs:
                assert theirs.request == ours.request and theirs.result.completions == ours.result.completions, run.name
            stats = compare_stats(read(run, "stats"), read(mine, "stats"), run.name)
            instances = [
                {(entry["instance_id"], json.dumps(entry.get("perturbation")), entry["train_trial_index"], index): entry
                 for index, entry in enumerate(sorted(read(place, "per_instance_stats"), key=order))}
                for place in (run, mine)]
            assert instances[0].keys() == instances[1].keys(), f"{run.name}: other instances"
            for name, entry in instances[0].items():
                compare_stats(entry["stats"], instances[1][name]["stats"], f"{run.name} {name}")
            print(f"{run.name}: {len(pairs)} results identical, {stats} statistics equal")


def order(entry):
    # The sort is stable: windows of a text stay in order.
    return entry["instance_id"], json.dumps(entry.get("perturbation")), entry["train_trial_index"]


if __name__ == "__main__":
    sys.exit(main())
