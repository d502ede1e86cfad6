#!/usr/bin/env bash
# The unsafe parts under AddressSanitizer, with the stable toolchain (the runtime comes with rustc): unit tests of
# src/device and src/memory, and the integration tests that drive kernels, KV policies and disks.
# Not covered: overruns from buffer to buffer within an arena, which is one mapping; what assembly reads and writes
# (system calls, tile registers). From nothing it takes 15 minutes on two shared cores, 11 of them compiling.
# ThreadSanitizer and MemorySanitizer need a standard library that is built for them,
# which stable cannot.
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
