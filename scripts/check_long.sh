#!/usr/bin/env bash
# What is too heavy for scripts/check.sh: the tests marked `#[ignore]`, optimised, and the dependencies once more.
# A thousand random placements over three tiers (tests/placement.rs draws 30 in the check).
# Jobs on the card or its emulator (tests/cuda.rs draws 20 in the check).
# Ignored tests: tests/long.rs (100,000 lines in bounded memory, 50 kills) and model::synth::tests::speed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/parts.sh

part "cargo-deny install" install_cargo_deny
part "licences, sources" cargo_deny check bans licenses sources
part "advisories" advisories
part "long tests" cargo test --locked --release -- --ignored
part "address sanitizer" scripts/sanitize.sh
part "emulator, sanitized" tests/emulator/test.sh target/emulator 10 sanitize
part "pauses and re-planning" env REPLANS=200 cargo test --locked --release --test replanning
part "a thousand placements" env PLACEMENTS=1000 cargo test --locked --release --test placement
part "two thousand jobs on the card" env CUDA_SEEDS=2000 OPS=50 cargo test --locked --release --test cuda --test ops
summary
