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
    rm -r "$directory"
}

part "format" cargo fmt --check
part "python" python3 -m py_compile scripts/*.py
part "kernels" python3 scripts/compile_kernels.py
part "emulator" tests/emulator/test.sh target/emulator
part "clippy" clippy
part "documentation" documentation
part "cargo-deny install" install_cargo_deny
part "licences, sources" cargo_deny check bans licenses sources
part "advisories" advisories
part "tests" cargo test --locked --no-fail-fast
part "examples" examples
summary
