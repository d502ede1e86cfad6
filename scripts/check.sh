#!/usr/bin/env bash
# The whole check: installs what it needs (into .cache/ and target/), runs every part, prints the minutes of each.
# Needs rustup, gcc, g++, git, Python 3 with pip, and reach of the crate registry and PyPI. What is heavier:
# scripts/check_long.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/parts.sh

clippy() {
    cargo clippy --locked --all-targets -- -D warnings
}

documentation() {
    RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --document-private-items
}

# The client and the Ray actor, which need nothing but the program.
adapters() {
    TIDEMILL_BIN=$1 PYTHONPATH=python python3 - <<'PYTHON'
from tidemill import Worker
from tidemill.ray import TidemillActor

rows = {"prompt": ["Story: Mia", "Sum: 1 + 2 ="], "sampling_params": [{"max_tokens": 3}, {"max_tokens": 2}]}
out = TidemillActor("demo", progress="none")(rows)
assert out["num_generated_tokens"] == [3, 2] and out["__inference_error__"] == ["", ""], out
with Worker("demo", progress="none") as worker:
    answers = worker.run([{"context": "Sum:", "continuation": " 7"}, {"prompt": "Mia", "max_tokens": 1}, {"text": "Story: Mia"}])
    assert answers[0]["logprob"] < 0 and answers[1]["text"] is not None and answers[2]["logprob"] < 0, answers
assert worker.process.returncode == 0
PYTHON
}

# The README's examples, and the promise that a policy changes no byte.
examples() {
    local directory generate
    directory=$(mktemp -d)
    generate=(cargo run --quiet --locked -- generate --model demo)
    "${generate[@]}" --input examples/prompts.jsonl --output "$directory/results.jsonl"
    "${generate[@]}" --input examples/prompts.jsonl --output "$directory/policy.jsonl" \
        --policy examples/policy.toml --threads 1
    cmp "$directory/results.jsonl" "$directory/policy.jsonl"
    "${generate[@]}" --input examples/openai-batch.jsonl --output "$directory/batch.jsonl"
    cargo run --quiet --locked -- eval --model demo --output "$directory/eval" \
        --scenario examples/helm/sums/scenario_state.json examples/tasks/labelling.jsonl
    adapters "$(cargo metadata --format-version 1 --no-deps --locked \
        | python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')/debug/tidemill"
    rm -r "$directory"
}

part "format" cargo fmt --check
part "python" python3 -m py_compile scripts/*.py
part "kernels" python3 scripts/compile_kernels.py
part "emulator" tests/emulator/test.sh target/emulator 1
part "clippy" clippy
part "documentation" documentation
part "cargo-deny install" install_cargo_deny
part "licences, sources" cargo_deny check bans licenses sources
part "advisories" advisories
part "tests" cargo test --locked --no-fail-fast
part "adapters" python3 -m py_compile scripts/ecosystem/*.py python/tidemill/*.py examples/*.py
part "examples" examples
summary
