#!/usr/bin/env bash
# test.sh OUTDIR [SEEDS [sanitize]]: builds the emulator and its tests into OUTDIR and runs them with so many seeds (3),
# then, if asked, the tests of kernels with as many once more, with sanitizers.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
kernels=$here/../../kernels
out=$(mkdir -p "$1" && cd "$1" && pwd)
seeds=${2:-3}
sources=("$here"/test_{kernels,rows,attention,sampling}.cpp)

# build FOLDER [sanitize]: libraries and tests.
build() {
    local folder=$1 flags=(-std=c++17 -O1 -Wall -Wextra)
    shift
    "$here/build.sh" "$folder" "$@"
    [ "${1:-}" = sanitize ] && flags+=(-g -fsanitize=address,undefined -fno-sanitize-recover=undefined)
    local libraries=("$folder"/lib{cuda.so.1,nvrtc.so.12,cublas.so.12})
    flags+=('-Wl,-rpath,$ORIGIN')
    # Built once for what they are made from.
    local sum=$folder/tests.sum
    if ! cat "$here"/*.cpp "$here"/*.h "$folder/libcuda.so.1" | sha256sum | cmp -s - "$sum"; then
        "${CXX:-g++}" "${flags[@]}" -o "$folder/test_kernels" "${sources[@]}" "${libraries[@]}"
        "${CXX:-g++}" "${flags[@]}" -o "$folder/test_emulator" "$here/test_emulator.cpp" "$folder/faulty.o" \
            "${libraries[@]}"
        cat "$here"/*.cpp "$here"/*.h "$folder/libcuda.so.1" | sha256sum >"$sum"
    fi
}

build "$out"
mkdir -p "$out/faulty"
cp "$kernels/common.cuh" "$here/faulty.cu" "$out/faulty"
"$out/test_emulator" "$out/faulty"
for seed in $(seq "$seeds"); do TIDEMILL_EMULATOR_SEED=$seed "$out/test_kernels" "$kernels" "$seed"; done
[ "${3:-}" = sanitize ] || exit 0
build "$out/sanitized" sanitize
# What the emulator keeps until its end is no leak.
export ASAN_OPTIONS=detect_leaks=0
for seed in $(seq "$seeds"); do TIDEMILL_EMULATOR_SEED=$seed "$out/sanitized/test_kernels" "$kernels" "$seed"; done
