#!/usr/bin/env bash
# Checks the CUDA device on a machine that has one, without a Rust toolchain.
#
#   scripts/gpu_check.sh pack DIR       with a toolchain: puts binaries, models and this script into DIR (below 60 MB)
#   DIR/scripts/gpu_check.sh ops        doctor; every operation and small jobs against the host
#   DIR/scripts/gpu_check.sh sanitize   every operation under compute-sanitizer: memcheck, racecheck
#   DIR/scripts/gpu_check.sh rates      calibrate: links, memory, kernels
#   DIR/scripts/gpu_check.sh e2e NAME   a job with seeded weights: tiny, opt-30b, llama-70b, opt-175b
#
# Results go to $OUT (default: gpu_check in the working directory): a log per part, JSON per stage. A part that fails or
# runs over its limit does not stop the next; the summary comes last, and the exit code is 1 if any part failed.
# $SECONDS_MOST lowers every limit.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${OUT:-gpu_check}
stage=${1:-}
results=()
failed=0

# part NAME LIMIT COMMAND...: runs a part within its limit and notes how it went.
part() {
    local name=$1 limit=$2 began code=0
    shift 2
    if [ "${SECONDS_MOST:-$limit}" -lt "$limit" ]; then limit=$SECONDS_MOST; fi
    began=$(date +%s)
    echo "== $name (at most $limit s)"
    timeout --kill-after=10 "$limit" "$@" >"$out/$stage-$name.log" 2>&1 || code=$?
    local took=$(($(date +%s) - began))
    local how=ok
    if [ "$code" -eq 124 ]; then how="over its limit"; elif [ "$code" -ne 0 ]; then how="failed ($code)"; fi
    [ "$code" -eq 0 ] || { failed=1; tail -n 20 "$out/$stage-$name.log"; }
    results+=("$(printf '{"part": "%s", "result": "%s", "seconds": %d}' "$name" "$how" "$took")")
}

finish() {
    local IFS=,
    echo "{\"stage\": \"$stage\", \"name\": \"${name:-}\", \"parts\": [${results[*]}]}" >"$out/$stage${name:+-$name}.json"
    echo "== summary"
    cat "$out/$stage${name:+-$name}.json"
    exit "$failed"
}

pack() {
    local directory=$1 messages
    mkdir -p "$directory/bin" "$directory/scripts" "$directory/tests" "$directory/policies"
    cd "$root"
    cargo build --locked --release --bin tidemill
    messages=$(cargo test --locked --release --no-run --test ops --test cuda --message-format=json)
    for test in ops cuda; do
        file=$(echo "$messages" | grep "\"name\":\"$test\"" | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
        cp "$file" "$directory/bin/$test"
    done
    cp "${CARGO_TARGET_DIR:-target}/release/tidemill" "$directory/bin/"
    strip "$directory"/bin/*
    cp scripts/gpu_check.sh "$directory/scripts/"
    cp -r tests/goldens "$directory/tests/"
    cp -r policies/models "$directory/policies/"
    du -sh "$directory"
}

# What test binaries are told of where they are.
export TIDEMILL_TEST_ROOT=$root TIDEMILL_TEST_BINARY=$root/bin/tidemill REQUIRE_GPU=1
tidemill=$root/bin/tidemill

# prompts COUNT LENGTH: JSONL of token ids.
prompts() {
    awk -v count="$1" -v length_="$2" 'BEGIN {
        for (line = 1; line <= count; line++) {
            printf "{\"prompt\": ["
            for (i = 0; i < length_; i++) printf "%s%d", i ? "," : "", 5 + (line * 7919 + i * 104729) % 600
            print "], \"ignore_eos\": true}"
        }
    }'
}

# job MODEL GPU CPU PROMPTS PROMPT_LEN GEN_LEN FLAGS...
job() {
    local model=$1 gpu=$2 cpu=$3 count=$4 prompt_len=$5 gen_len=$6
    shift 6
    prompts "$count" "$prompt_len" >"$out/$name.in.jsonl"
    part "$name" 470 "$tidemill" generate --model "$model" --input "$out/$name.in.jsonl" \
        --output "$out/$name.out.jsonl" --device cuda --gpu-memory "$gpu" --cpu-memory "$cpu" --temperature 0 \
        --max-tokens "$gen_len" --stats "$out/$name.stats.json" --progress line "$@"
}

case $stage in
pack)
    set -e
    pack "${2:?where to}"
    exit
    ;;
ops)
    mkdir -p "$out"
    export TIDEMILL_TEST_SCRATCH=$out/scratch
    mkdir -p "$TIDEMILL_TEST_SCRATCH"
    part doctor 60 "$tidemill" doctor
    part operations 300 env OPS="${OPS:-10}" "$root/bin/ops" --nocapture --test-threads=1
    part jobs 450 env CUDA_SEEDS="${CUDA_SEEDS:-48}" "$root/bin/cuda" --nocapture --test-threads=1
    ;;
sanitize)
    mkdir -p "$out"
    export TIDEMILL_TEST_SCRATCH=$out/scratch
    mkdir -p "$TIDEMILL_TEST_SCRATCH"
    for tool in memcheck racecheck; do
        part "$tool" 450 env OPS=1 compute-sanitizer --tool "$tool" --error-exitcode 9 "$root/bin/ops" --test-threads=1
    done
    ;;
rates)
    mkdir -p "$out"
    part doctor 60 "$tidemill" doctor
    part calibrate 240 "$tidemill" calibrate --device cuda --save "$out/hardware.toml"
    ;;
e2e)
    mkdir -p "$out"
    name=${2:-}
    models=$root/policies/models
    case $name in
    tiny) job demo 700MiB 400MiB 4 40 4 ;;
    opt-30b) job "synth:$models/opt-30b.json#1" 16GiB 100GiB 600 512 32 --weights int4 ;;
    llama-70b) job "synth:$models/llama-3.1-70b.json#1" 24GiB 100GiB 300 2048 128 --weights int4 ;;
    opt-175b) job "synth:$models/opt-175b.json#1" 16GiB 110GiB 200 512 32 --weights int4 --kv-dtype int4 ;;
    *)
        echo "e2e: tiny, opt-30b, llama-70b or opt-175b" >&2
        exit 2
        ;;
    esac
    ;;
*)
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
finish
