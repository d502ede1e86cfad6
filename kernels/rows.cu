// Everything that works on one row at a time: lookups, norms, rotation, activations, sums, conversions.
//
// All of these read and write each row once or twice and are bound by memory: expect 80 % of its bandwidth from a few
// hundred rows on; they are small beside the products. A block per row where a row is reduced or gathered, else a
// thread per element.

// to = from, `count` times 16 bytes; one of them in main memory, mapped. Grid: ceil(count / 64). Small: a copy of the
// driver's would wait for the large ones that are under way.
KERNEL BOUNDS(64) copy_lists(const uint4* from, uint4* to, u32 count) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) to[i] = from[i];
}

// out[r] = table row tokens[r]. Grid: rows. Moves rows * width * (size + 4) bytes; an element of a packed row is one of
// a sector of 16, so reading is up to 16 times that: few rows, once per pass.
template <u32 dtype> DEVICE void embed(const u8* panel, u32 width, u32 lane, float* out) {
    if constexpr (dtype == INT8 || dtype == INT4) {
        constexpr u32 codes = dtype == INT4 ? TILE * PANEL / 2 : TILE * PANEL;
        for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
            const u8* tile = panel + u64(i / TILE) * (codes + 4 * PANEL);
            const u16* grid = reinterpret_cast<const u16*>(tile + codes);
            u32 k = i % TILE;
            u32 shift = 0;
            if (dtype == INT4) {
                shift = 4 * (k / 32);
                k %= 32;
            }
            u32 code = tile[k / 4 * 64 + lane * 4 + k % 4] >> shift & (dtype == INT4 ? 15 : 255);
            out[i] = fmaf(float(code), f16_to_f32(grid[lane]), f16_to_f32(grid[PANEL + lane]));
        }
    } else {
        for (u32 i = threadIdx.x; i < width; i += blockDim.x) out[i] = load_as_f32<dtype>(panel, u64(i) * PANEL + lane);
    }
}

KERNEL BOUNDS(256) embed_rows(const Piece* pieces, u32 num_pieces, u32 dtype, u32 width, u32 vocab_size,
                              const u32* tokens, float* out) {
    u32 token = least(tokens[blockIdx.x], vocab_size - 1);
    const u8* panel = find_panel(pieces, num_pieces, token / PANEL, panel_bytes(dtype, width));
    u32 lane = token % PANEL;
    out += u64(blockIdx.x) * width;
    switch (dtype) {
    case F32: return embed<F32>(panel, width, lane, out);
    case BF16: return embed<BF16>(panel, width, lane, out);
    case F16: return embed<F16>(panel, width, lane, out);
    case INT8: return embed<INT8>(panel, width, lane, out);
    default: return embed<INT4>(panel, width, lane, out);
    }
}

// x[r] += table[indices[r]]. Grid: rows. Moves 12 * rows * width bytes.
KERNEL BOUNDS(256) add_rows(const float* table, const u32* indices, u32 width, float* x) {
    const float* from = table + u64(indices[blockIdx.x]) * width;
    float* to = x + u64(blockIdx.x) * width;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) to[i] += from[i];
}

// out[first + r] = x[indices[r]]. Grid: rows. Moves 8 * rows * width bytes.
KERNEL BOUNDS(256) gather_rows(const float* x, const u32* indices, u32 width, float* out, u32 first) {
    const float* from = x + u64(indices[blockIdx.x]) * width;
    float* to = out + u64(first + blockIdx.x) * width;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i];
}

// Adds a row to another, unless it is null, and normalises the sum.
DEVICE void norm(float* x, const float* y, u32 width, const float* weight, const float* bias, u32 kind, float eps,
                 float* out, float* room) {
    x += u64(blockIdx.x) * width;
    out += u64(blockIdx.x) * width;
    if (y) {
        // A thread reads below what it wrote here.
        y += u64(blockIdx.x) * width;
        for (u32 i = threadIdx.x; i < width; i += blockDim.x) x[i] += y[i];
    }
    float mean = 0.0f;
    if (kind == 1) {
        float sum = 0.0f;
        for (u32 i = threadIdx.x; i < width; i += blockDim.x) sum += x[i];
        mean = reduce_block<Sum>(sum, room) / float(width);
    }
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) squares = fmaf(x[i] - mean, x[i] - mean, squares);
    float scale = 1.0f / sqrtf(reduce_block<Sum>(squares, room) / float(width) + eps);
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
        float z = (x[i] - mean) * scale;
        out[i] = bias ? fmaf(z, weight[i], bias[i]) : z * weight[i];
    }
}

// RMSNorm: out = x / sqrt(mean(x^2) + eps) * weight (+ bias). LayerNorm: the same of x - mean(x).
// Grid: rows. Moves 8 * rows * width bytes; rows are read again from the cache.
KERNEL BOUNDS(256)
    norm_rows(const float* x, u32 width, const float* weight, const float* bias, u32 kind, float eps, float* out) {
    SHARED(float, room, 256 / WARP);
    norm(const_cast<float*>(x), nullptr, width, weight, bias, kind, eps, out, room);
}

// x += y, then out = norm(x), as norm_rows has it. Grid: rows. Moves 16 * rows * width bytes, 4 * rows * width fewer
// than the two alone.
KERNEL BOUNDS(256) add_norm_rows(float* x, const float* y, u32 width, const float* weight, const float* bias, u32 kind,
                                 float eps, float* out) {
    SHARED(float, room, 256 / WARP);
    norm(x, y, width, weight, bias, kind, eps, out, room);
}

// RMSNorm of every query and key head, in place. Grid: (rows, heads + kv heads). Moves 8 bytes per element.
KERNEL BOUNDS(32) norm_heads(float* qkv, u32 num_heads, u32 num_kv_heads, u32 head_dim, float eps,
                             const float* query_weight, const float* key_weight) {
    u64 row = u64(blockIdx.x) * (num_heads + 2 * num_kv_heads);
    float* x = qkv + (row + blockIdx.y) * head_dim;
    const float* weight = blockIdx.y < num_heads ? query_weight : key_weight;
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < head_dim; i += WARP) squares = fmaf(x[i], x[i], squares);
    float scale = 1.0f / sqrtf(reduce_warp<Sum>(squares) / float(head_dim) + eps);
    for (u32 i = threadIdx.x; i < head_dim; i += WARP) x[i] = x[i] * scale * weight[i];
}

// Rotates the leading dimensions of query and key heads, in place: pairs (i, i + rotary_dim / 2).
// Grid: rows. Moves 8 bytes per element that rotates.
KERNEL BOUNDS(256) rotate_heads(float* qkv, u32 num_heads, u32 num_kv_heads, u32 head_dim, const float* cos,
                                const float* sin, u32 rotary_dim) {
    u32 half = rotary_dim / 2;
    u64 row = u64(blockIdx.x) * (num_heads + 2 * num_kv_heads) * head_dim;
    for (u32 i = threadIdx.x; i < (num_heads + num_kv_heads) * half; i += blockDim.x) {
        u32 dim = i % half;
        float* at = qkv + row + u64(i / half) * head_dim + dim;
        float c = cos[u64(blockIdx.x) * half + dim], s = sin[u64(blockIdx.x) * half + dim];
        float a = at[0], b = at[half];
        at[0] = a * c - b * s;
        at[half] = b * c + a * s;
    }
}

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + exp_f32(-x)); }

// erf, absolute error below 2e-7 (Abramowitz and Stegun 7.1.26).
DEVICE float erf_f32(float x) {
    float a = fabsf(x);
    float t = 1.0f / fmaf(a, 0.3275911f, 1.0f);
    float p = 1.0614054f;
    p = fmaf(p, t, -1.453152f);
    p = fmaf(p, t, 1.4214138f);
    p = fmaf(p, t, -0.28449674f);
    p = fmaf(p, t, 0.2548296f);
    return copysignf(1.0f - p * t * exp_f32(-(a * a)), x);
}

DEVICE float activation_of(u32 activation, float x) {
    switch (activation) {
    case 0: return x > 0.0f ? x : 0.0f;
    case 1: return x / (1.0f + exp_f32(-x));
    case 2: return fmaf(x * 0.5f, erf_f32(x * 0.70710678f), x * 0.5f);
    default: return x * sigmoid(2.0f * 0.7978846f * fmaf(x * x * x, 0.044715f, x));
    }
}

// out = act(up), or act(gate) * up of rows [gate | up]. Grid: (ceil(width / 256), rows). Moves 8 or 12 bytes per
// element.
KERNEL BOUNDS(256) activate_rows(u32 activation, u32 gated, const float* up, u32 width, float* out) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= width) return;
    const float* from = up + u64(blockIdx.y) * width * (gated ? 2 : 1);
    float y = activation_of(activation, from[i]);
    out[u64(blockIdx.y) * width + i] = gated ? y * from[width + i] : y;
}

// x += y. Grid: ceil(elements / 1024), four elements a thread. Moves 12 * elements bytes.
KERNEL BOUNDS(256) add_elements(float* x, const float* y, u64 elements) {
    UNROLL
    for (u32 part = 0; part < 4; part++) {
        u64 i = u64(blockIdx.x) * 1024 + part * 256 + threadIdx.x;
        if (i < elements) x[i] += y[i];
    }
}

// y[r * stride + column + c] += bias[c]. Grid: (ceil(width / 256), rows). Moves 8 * rows * width bytes.
KERNEL BOUNDS(256) add_bias(float* y, u32 stride, u32 column, const float* bias, u32 width) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < width) y[u64(blockIdx.y) * stride + column + i] += bias[i];
}

// Rows of f32 in another type, padded with zeros. Grid: (ceil(out_stride / 256), rows). Moves 4 + size bytes per
// element.
KERNEL BOUNDS(256) convert_rows(const float* x, u32 width, void* out, u32 out_stride, u32 dtype) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= out_stride) return;
    float value = i < width ? x[u64(blockIdx.y) * width + i] : 0.0f;
    u64 at = u64(blockIdx.y) * out_stride + i;
    switch (dtype) {
    case F32: return store_f32<F32>(out, at, value);
    case BF16: return store_f32<BF16>(out, at, value);
    default: return store_f32<F16>(out, at, value);
    }
}

// Rows rounded to 8 bits and back: of every 64 inputs, multiples of the largest magnitude / 127, ties to even, in
// another type, padded with zeros. What is not finite stays so. Grid: (ceil(out_stride / 512), rows), a warp for 64
// inputs. Moves 4 + size bytes per element.
KERNEL BOUNDS(256) round_rows(const float* x, u32 width, void* out, u32 out_stride, u32 dtype) {
    u32 lane = threadIdx.x % WARP;
    u32 first = (blockIdx.x * (256 / WARP) + threadIdx.x / WARP) * TILE;
    if (first >= out_stride) return;
    const float* from = x + u64(blockIdx.y) * width;
    u64 row = u64(blockIdx.y) * out_stride;
    float values[2], most = 0.0f;
    UNROLL
    for (u32 part = 0; part < 2; part++) {
        u32 i = first + part * WARP + lane;
        values[part] = i < width ? from[i] : 0.0f;
        most = fmaxf(most, fabsf(values[part]));
    }
    most = reduce_warp<Max>(most);
    // The inverse of less might be infinite.
    float inverse = most > 1e-30f ? 127.0f / most : 0.0f;
    UNROLL
    for (u32 part = 0; part < 2; part++) {
        u32 i = first + part * WARP + lane;
        if (i >= out_stride) break;
        float value = rintf(values[part] * inverse) * (most / 127.0f);
        switch (dtype) {
        case F32: store_f32<F32>(out, row + i, value); break;
        case BF16: store_f32<BF16>(out, row + i, value); break;
        default: store_f32<F16>(out, row + i, value);
        }
    }
}
