#!/usr/bin/env bash
# build.sh OUTDIR [sanitize]: builds the emulated CUDA libraries, with all kernels of kernels/ inside, into OUTDIR:
# libcuda.so.1, libnvrtc.so.12, libcublas.so.12. Objects are kept in OUTDIR/objects by the checksum of all that they are
# made from. `sanitize` builds everything with the address and undefined-behaviour sanitizers (for test.sh).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
kernels=$here/../../kernels
out=$(mkdir -p "$1" && cd "$1" && pwd)
mkdir -p "$out/objects"
flags=(-std=c++17 -O2 -fPIC -fvisibility=hidden -ffp-contract=off -fno-strict-aliasing -Wall -Wextra
    -Wno-unknown-pragmas "-I$here")
if [ "${2:-}" = sanitize ]; then
    flags+=(-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer)
fi
compiler=${CXX:-g++}

# The objects of this build, as their compilations were begun.
objects=()
waiting=()

# compile NAME SOURCE...: begins an object of the first source, unless it is there; the others are what it depends on.
compile() {
    local name=$1 source=$2 sum object
    shift
    sum=$( (echo "${flags[@]}" && "$compiler" --version && cat "$@" "$here/runtime.h" "$here/fibers.h" "$here/shim.h") |
        sha256sum | cut -c 1-16)
    object=$out/objects/$name-$sum.o
    objects+=("$object")
    [ -e "$object" ] && return
    { "$compiler" "${flags[@]}" -c "$source" -o "$object.part" && mv "$object.part" "$object"; } &
    waiting+=($!)
    if [ ${#waiting[@]} -ge "$(nproc)" ]; then
        wait "${waiting[0]}"
        waiting=("${waiting[@]:1}")
    fi
}

# A kernel's program as the CUDA compiler would get it, and its registration.
program() {
    local file=$1 name program sum
    name=$(basename "$file" .cu)
    program=$out/objects/$name.program
    cat "$kernels/common.cuh" "$file" >"$program"
    sum=$(cksum <"$program" | awk '{ print $1 "-" $2 }')
    {
        echo '#include "shim.h"'
        echo "#line 1 \"$name.program\""
        cat "$program"
        # With the file's own macros expanded, and those of common.cuh as they are written.
        "$compiler" -E -P -DBFLOAT_MATRICES=1 -x c++ "$file" 2>/dev/null | tr '\n' ' ' |
            grep -o 'KERNEL BOUNDS([0-9, ]*) *[a-z0-9_]*(' |
            sed 's/KERNEL BOUNDS(\([0-9]*\)[^)]*) *\(.*\)(/\1 \2/' | while read -r threads kernel; do
            echo "static emulator::Registration registration_$kernel(\"$sum\", \"$kernel\", $threads,"
            echo "    [](void** arguments) { return emulator::bind(&$kernel, arguments); });"
        done
    } >"$out/objects/$name.cpp"
    compile "kernel-$name" "$out/objects/$name.cpp"
}

for file in "$kernels"/*.cu; do program "$file"; done
for name in fibers memory streams driver; do compile "$name" "$here/$name.cpp"; done
runtime=("${objects[@]}")
objects=()
program "$here/faulty.cu"
faulty=${objects[0]}
objects=()
compile nvrtc "$here/nvrtc.cpp"
compile cublas "$here/cublas.cpp"
for job in "${waiting[@]}"; do wait "$job"; done

# Kernels that are wrong, for test.sh.
ln -sf "$faulty" "$out/faulty.o"

link() {
    local library=$1
    shift
    "$compiler" "${flags[@]}" -shared -Wl,--no-undefined -Wl,-soname,"$library" -o "$out/$library.part" "$@"
    mv "$out/$library.part" "$out/$library"
}
link libcuda.so.1 "${runtime[@]}"
link libnvrtc.so.12 "${objects[0]}"
link libcublas.so.12 "${objects[1]}" "$out/libcuda.so.1" '-Wl,-rpath,$ORIGIN'
