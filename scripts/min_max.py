"""A copy of the demo model whose matrices are already rounded by FlexGen's rule: groups of 64 inputs, 4 bits, from the
least weight to the greatest (arXiv 2303.06865, section 5), scales and offsets in f16 as tidemill stores them.

    python3 scripts/min_max.py DIRECTORY
    python3 scripts/demo_quality.py -- --model DIRECTORY --weights f32 --kv-dtype f32

What it costs stands beside `--weights int4`, which fits scale and offset. Standard library only.
"""

import json
import pathlib
import shutil
import struct
import sys

DEMO = pathlib.Path(__file__).resolve().parent.parent / "demo"
GROUP, MOST = 64, 15


def floats(data, dtype):
    if dtype == "F32":
        return list(struct.unpack(f"<{len(data) // 4}f", data))
    halves = struct.unpack(f"<{len(data) // 2}H", data)
    if dtype == "BF16":
        return list(struct.unpack(f"<{len(halves)}f", struct.pack(f"<{len(halves)}I", *(h << 16 for h in halves))))
    assert dtype == "F16", dtype
    return list(struct.unpack(f"<{len(halves)}e", data))


def half(value):
    return struct.unpack("<e", struct.pack("<e", value))[0]


def rounded(group):
    low, high = min(group), max(group)
    scale, offset = half((high - low) / MOST), half(low)
    if scale == 0:
        return [offset] * len(group)
    return [offset + scale * min(MOST, max(0, round((value - offset) / scale))) for value in group]


def main():
    (target,) = sys.argv[1:]
    target = pathlib.Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for file in DEMO.glob("*.json"):
        shutil.copy(file, target)
    data = (DEMO / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    made, parts, at = {}, [], 0
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        begin, end = tensor["data_offsets"]
        values = floats(body[begin:end], tensor["dtype"])
        if len(tensor["shape"]) == 2:
            inputs = tensor["shape"][1]
            rows = (values[first : first + inputs] for first in range(0, len(values), inputs))
            values = [x for row in rows for k in range(0, inputs, GROUP) for x in rounded(row[k : k + GROUP])]
        parts.append(struct.pack(f"<{len(values)}f", *values))
        made[name] = {"dtype": "F32", "shape": tensor["shape"], "data_offsets": [at, at + len(parts[-1])]}
        at += len(parts[-1])
    text = json.dumps(made).encode()
    text += b" " * (-len(text) % 8)
    (target / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


if __name__ == "__main__":
    main()
