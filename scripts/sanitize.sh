#!/usr/bin/env bash
# The unsafe parts under AddressSanitizer, with the stable toolchain: unit tests of src/device and src/memory, and the
# integration tests that drive kernels, KV policies and disks. Needs clang's runtime, which rustup brings along.
# Not covered: overruns inside an arena (one mapping holds all buffers); what assembly reads and writes (system calls, tile registers) is invisible to it; ThreadSanitizer and
# MemorySanitizer need a standard library built for them, which stable cannot; leaks are looked for at exit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

target=x86_64-unknown-linux-gnu
if [ "$(rustc -vV | sed -n 's/^host: //p')" != "$target" ]; then
    echo "AddressSanitizer is set up for $target only" >&2
    exit 77
fi
export RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address" CARGO_TARGET_DIR="${SANITIZE_TARGET_DIR:-target/sanitize}"
export ASAN_OPTIONS="${ASAN_OPTIONS:-detect_stack_use_after_return=1}"
sanitized=(cargo test --locked --target "$target")
"${sanitized[@]}" --lib -- device:: memory::
"${sanitized[@]}" --test instruction_sets --test kv_policies --test faults
