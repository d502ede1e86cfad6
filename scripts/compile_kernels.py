#!/usr/bin/env python3
"""Compiles every kernel with the real NVRTC for every architecture that is supported, without a GPU.

Prints registers, spills and shared memory of every kernel; fails where one does not compile or spills. NVRTC comes
from PyPI into .cache/nvrtc; results are kept in .cache/kernels by the checksum of program, compiler and architecture.
"""

import ctypes
import hashlib
import json
import re
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90"]
PACKAGE = "nvidia-cuda-nvrtc-cu12==12.8.93"
OPTIONS = ["--std=c++17", "--ptxas-options=-v"]


def find_nvrtc():
    """The path of NVRTC, fetched from PyPI if it is not there."""
    place = ROOT / ".cache" / "nvrtc" / PACKAGE.split("==")[1]
    if not (libraries := list(place.rglob("libnvrtc.so.12"))):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place), PACKAGE]
        subprocess.run(command, check=True)
        for wheel in place.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(place)
            wheel.unlink()
        libraries = list(place.rglob("libnvrtc.so.12"))
    # NVRTC finds its builtins by itself only where they are loaded already.
    for builtins in libraries[0].parent.glob("libnvrtc-builtins.so*"):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return libraries[0]


def compile_program(nvrtc, source, name, architecture):
    """Whether it compiled, and the compiler's log."""
    program = ctypes.c_void_p()
    created = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, name.encode(), 0, None, None)
    assert created == 0, f"nvrtcCreateProgram gives {created}"
    options = [option.encode() for option in [f"--gpu-architecture={architecture}", *OPTIONS]]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return status == 0, log.value.decode()


def resources(log):
    """(kernel, registers, bytes of static shared memory, bytes spilled) of every kernel that a log names."""
    found = []
    for part in re.split(r"Compiling entry function '", log)[1:]:
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
        registers = int(re.search(r"Used (\d+) registers", part).group(1))
        shared = re.search(r"(\d+) bytes smem", part)
        found.append((part.split("'")[0], registers, int(shared.group(1)) if shared else 0, spilled))
    return found


def main():
    library = find_nvrtc()
    nvrtc = ctypes.CDLL(str(library))
    common = (ROOT / "kernels" / "common.cuh").read_bytes()
    cache = ROOT / ".cache" / "kernels"
    cache.mkdir(parents=True, exist_ok=True)

    def results(work):
        path, architecture = work
        source = common + path.read_bytes()
        key = hashlib.sha256(b"\0".join([source, PACKAGE.encode(), architecture.encode(), repr(OPTIONS).encode()]))
        kept = cache / f"{path.stem}-{architecture}-{key.hexdigest()[:16]}.json"
        if kept.exists():
            return json.loads(kept.read_text())
        compiled, log = compile_program(nvrtc, source, path.name, architecture)
        if compiled:
            for old in cache.glob(f"{path.stem}-{architecture}-*.json"):
                old.unlink()
            kept.write_text(json.dumps([compiled, log]))
        return [compiled, log]

    work = [(path, arch) for path in sorted((ROOT / "kernels").glob("*.cu")) for arch in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        logs = dict(zip(work, pool.map(results, work)))
    failed, table = False, {}
    for (path, arch), (compiled, log) in logs.items():
        if not compiled or "warning" in log:
            print(f"{path.name} for {arch}:\n{log}", file=sys.stderr)
            failed |= not compiled
        for kernel, registers, shared, spilled in resources(log):
            table.setdefault((path.name, kernel), {})[arch] = f"{registers}/{shared}" + "!" * (spilled > 0)
            if spilled > 0:
                print(f"{kernel} spills {spilled} bytes on {arch}", file=sys.stderr)
                failed = True
    print(f"{'registers/shared bytes':44}", *(f"{arch:>12}" for arch in ARCHITECTURES))
    for (file, kernel), by_arch in table.items():
        print(f"{file + ' ' + kernel:44}", *(f"{by_arch.get(arch, '-'):>12}" for arch in ARCHITECTURES))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
