// Packed weights: to rows of elements for cuBLAS, and products of few rows straight from the panels.
//
// A panel holds 16 outputs as tiles of 64 inputs, one after the other. A tile of a plain type is (64 inputs, 16
// outputs). A tile of integers holds words of four bytes, 16 outputs side by side: of int8, word (k / 4, output) has
// the codes of inputs k .. k + 3; of int4, inputs k and k + 32 share the byte that int8 would give k, the first in the
// low half. Then 16 scales and 16 offsets in f16: w = code * scale + offset.

template <u32 dtype> struct Format {
    static constexpr bool integers = dtype == INT8 || dtype == INT4;
    // Words of codes per output of a tile.
    static constexpr u32 words = dtype == INT4 ? 8 : 16;
    static constexpr u32 bytes = dtype == F32 ? TILE * PANEL * 4
                                 : integers   ? words * PANEL * 4 + 4 * PANEL
                                              : TILE * PANEL * 2;
};

// Scale and offset of an output of a tile.
template <u32 dtype> DEVICE void load_grid(const u8* tile, u32 output, float* scale, float* offset) {
    const u16* grid = reinterpret_cast<const u16*>(tile + Format<dtype>::words * PANEL * 4);
    *scale = f16_to_f32(grid[output]);
    *offset = f16_to_f32(grid[PANEL + output]);
}

// The weights of a word: of int8 those of inputs 4 * word .., of int4 those and then the ones 32 inputs further.
template <u32 dtype> DEVICE void decode_word(u32 word, float scale, float offset, float* out) {
    UNROLL
    for (u32 i = 0; i < 4; i++) {
        if (dtype == INT8) {
            out[i] = fmaf(float(word >> 8 * i & 255), scale, offset);
        } else {
            out[i] = fmaf(float(word >> 8 * i & 15), scale, offset);
            out[4 + i] = fmaf(float(word >> (8 * i + 4) & 15), scale, offset);
        }
    }
}

// Tiles of a panel that a block takes side by side, and the distance of rows in shared memory: no two outputs of a
// quarter of a warp meet in a bank.
constexpr u32 TILES = 4;
constexpr u32 ROW = TILES * TILE + 4;

// A tile into shared memory as (16 outputs, 64 inputs), by 64 threads.
template <u32 dtype> DEVICE void unpack_tile(const u8* tile, u32 thread, float* rows) {
    if constexpr (Format<dtype>::integers) {
        const u32* words = reinterpret_cast<const u32*>(tile);
        u32 output = thread % PANEL;
        float scale, offset;
        load_grid<dtype>(tile, output, &scale, &offset);
        UNROLL
        for (u32 i = 0; i < Format<dtype>::words / 4; i++) {
            u32 word = i * 4 + thread / PANEL;
            float w[8];
            decode_word<dtype>(words[word * PANEL + output], scale, offset, w);
            float* to = rows + output * ROW + 4 * word;
            *reinterpret_cast<float4*>(to) = float4{w[0], w[1], w[2], w[3]};
            if (dtype == INT4) *reinterpret_cast<float4*>(to + 32) = float4{w[4], w[5], w[6], w[7]};
        }
    } else {
        constexpr u32 per_load = dtype == F32 ? 4 : 8;
        UNROLL
        for (u32 i = 0; i < TILE * PANEL / per_load / 64; i++) {
            u32 load = i * 64 + thread;
            u32 input = load * per_load / PANEL, output = load * per_load % PANEL;
            uint4 bits = reinterpret_cast<const uint4*>(tile)[load];
            u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
            UNROLL
            for (u32 j = 0; j < per_load; j++) {
                float w;
                if constexpr (dtype == F32) {
                    w = bits_float(words[j]);
                } else {
                    u16 half = u16(words[j / 2] >> 16 * (j % 2));
                    w = dtype == F16 ? f16_to_f32(half) : bf16_to_f32(half);
                }
                rows[(output + j) * ROW + input] = w;
            }
        }
    }
}

template <u32 dtype> DEVICE void unpack_tiles(const u8* panel, u32 first, u32 tiles, float* rows) {
    u32 tile = threadIdx.x / 64;
    if (first + tile < tiles)
        unpack_tile<dtype>(panel + u64(first + tile) * Format<dtype>::bytes, threadIdx.x % 64, rows + tile * TILE);
}

// Panels to rows: out[o][i] = w of output o, input i; 0 past the inputs.
//
// Grid: (panels, ceil(out_stride / 256)). A block takes four tiles of a panel: it reads them once, words side by side,
// turns them in shared memory and writes 16 rows of up to 256 elements. Moves the packed bytes once and the rows once:
// int4 to f16 is 0.56 + 2 bytes per weight. Expect 80 % of the memory's bandwidth.
KERNEL BOUNDS(256) dequantize_panels(const Piece* pieces, u32 num_pieces, u32 dtype, u32 inputs, u32 outputs,
                                     u32 first_panel, void* out, u32 out_stride, u32 out_dtype) {
    SHARED(float, rows, PANEL * ROW);
    u32 panel = first_panel + blockIdx.x, first = blockIdx.y * TILES, tiles = ceil_div(inputs, TILE);
    const u8* from = find_panel(pieces, num_pieces, panel, panel_bytes(dtype, inputs));
    switch (dtype) {
    case F32: unpack_tiles<F32>(from, first, tiles, rows); break;
    case BF16: unpack_tiles<BF16>(from, first, tiles, rows); break;
    case F16: unpack_tiles<F16>(from, first, tiles, rows); break;
    case INT8: unpack_tiles<INT8>(from, first, tiles, rows); break;
    default: unpack_tiles<INT4>(from, first, tiles, rows); break;
    }
    sync_block();
    for (u32 i = threadIdx.x; i < PANEL * TILES * TILE; i += blockDim.x) {
        u32 output = i / (TILES * TILE), column = i % (TILES * TILE), input = first * TILE + column;
        if (input >= out_stride || panel * PANEL + output >= outputs) continue;
        float w = input < inputs ? rows[output * ROW + column] : 0.0f;
        u64 at = (u64(blockIdx.x) * PANEL + output) * out_stride + input;
        switch (out_dtype) {
        case F32: store_f32<F32>(out, at, w); break;
        case BF16: store_f32<BF16>(out, at, w); break;
        default: store_f32<F16>(out, at, w); break;
        }
    }
}

constexpr u32 WARPS = 8;

// Adds a tile's part of the products of R rows with an output; half a warp takes half of the inputs.
template <u32 dtype, u32 R> DEVICE void multiply_tile(const u8* tile, const float* x, float* sums) {
    u32 output = threadIdx.x % PANEL, half = threadIdx.x % WARP / PANEL;
    if constexpr (Format<dtype>::integers) {
        const u32* words = reinterpret_cast<const u32*>(tile);
        float scale, offset;
        load_grid<dtype>(tile, output, &scale, &offset);
        UNROLL_TWO
        for (u32 i = 0; i < Format<dtype>::words / 2; i++) {
            u32 word = 2 * i + half;
            float w[8];
            decode_word<dtype>(words[word * PANEL + output], scale, offset, w);
            UNROLL
            for (u32 r = 0; r < R; r++) {
                UNROLL
                for (u32 part = 0; part < (dtype == INT4 ? 2u : 1u); part++) {
                    float4 four = *reinterpret_cast<const float4*>(x + r * TILE + part * 32 + 4 * word);
                    sums[r] = fmaf(four.x, w[4 * part], sums[r]);
                    sums[r] = fmaf(four.y, w[4 * part + 1], sums[r]);
                    sums[r] = fmaf(four.z, w[4 * part + 2], sums[r]);
                    sums[r] = fmaf(four.w, w[4 * part + 3], sums[r]);
                }
            }
        }
    } else {
        UNROLL_TWO
        for (u32 i = 0; i < TILE / 2; i += 4) {
            u32 input = half * (TILE / 2) + i;
            float w[4];
            UNROLL
            for (u32 j = 0; j < 4; j++) w[j] = load_as_f32<dtype>(tile, (input + j) * PANEL + output);
            UNROLL
            for (u32 r = 0; r < R; r++) {
                float4 four = *reinterpret_cast<const float4*>(x + r * TILE + input);
                sums[r] = fmaf(four.x, w[0], sums[r]);
                sums[r] = fmaf(four.y, w[1], sums[r]);
                sums[r] = fmaf(four.z, w[2], sums[r]);
                sums[r] = fmaf(four.w, w[3], sums[r]);
            }
        }
    }
}

struct Product {
    const float* x;
    const u8* panel;
    u32 inputs, outputs;
    const float* bias;
    float* y;
    u32 stride;
};

// R rows times a panel: warps take tiles in turn, halves of warps take halves of a tile, and the parts are added in
// order.
template <u32 dtype, u32 R> DEVICE void multiply_rows(const Product& p, u32 rows, float* staged, float* parts) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float* x = staged + warp * R * TILE;
    float sums[R];
    UNROLL
    for (u32 r = 0; r < R; r++) sums[r] = 0.0f;
    u32 tiles = ceil_div(p.inputs, TILE);
    for (u32 tile = warp; tile < tiles; tile += WARPS) {
        UNROLL
        for (u32 i = 0; i < R * TILE / WARP; i++) {
            u32 r = i / (TILE / WARP), k = i % (TILE / WARP) * WARP + lane, input = tile * TILE + k;
            x[r * TILE + k] = r < rows && input < p.inputs ? p.x[u64(r) * p.inputs + input] : 0.0f;
        }
        sync_warp();
        multiply_tile<dtype, R>(p.panel + u64(tile) * Format<dtype>::bytes, x, sums);
        sync_warp();
    }
    UNROLL
    for (u32 r = 0; r < R; r++) {
        float sum = sums[r] + shuffle_xor(sums[r], PANEL);
        if (lane < PANEL) parts[(warp * R + r) * PANEL + lane] = sum;
    }
    sync_block();
    u32 output = blockIdx.x * PANEL + threadIdx.x % PANEL, r = threadIdx.x / PANEL;
    if (r < rows && output < p.outputs) {
        float sum = 0.0f;
        for (u32 part = 0; part < WARPS; part++) sum += parts[(part * R + r) * PANEL + threadIdx.x % PANEL];
        p.y[u64(r) * p.stride + output] = p.bias ? sum + p.bias[output] : sum;
    }
    sync_block();
}

template <u32 dtype> DEVICE void multiply(Product p, u32 rows, float* staged, float* parts) {
    if (rows == 1) return multiply_rows<dtype, 1>(p, rows, staged, parts);
    if (rows == 2) return multiply_rows<dtype, 2>(p, rows, staged, parts);
    if (rows <= 4) return multiply_rows<dtype, 4>(p, rows, staged, parts);
    for (u32 first = 0; first < rows; first += 8) {
        multiply_rows<dtype, 8>(p, least(8u, rows - first), staged, parts);
        p.x += u64(8) * p.inputs;
        p.y += u64(8) * p.stride;
    }
}

// y[r] = x[r] w^T + bias for few rows, in f32 throughout.
//
// Grid: panels. Reads the packed weights once per 8 rows, and the rows once per panel (from the second-level cache).
// Bound by memory for one or two rows: expect 60 % of its bandwidth there; from 4 rows on by the multiply-adds and by
// the reads of shared memory that feed them, one of 16 bytes for four multiply-adds.
KERNEL BOUNDS(256, 2) linear_rows(const float* x, u32 rows, const Piece* pieces, u32 num_pieces, u32 dtype, u32 inputs,
                                  u32 outputs, const float* bias, float* y, u32 stride, u32 column) {
    SHARED(float, staged, WARPS * 8 * TILE);
    SHARED(float, parts, WARPS * 8 * PANEL);
    const u8* panel = find_panel(pieces, num_pieces, blockIdx.x, panel_bytes(dtype, inputs));
    Product p = {x, panel, inputs, outputs, bias, y + column, stride};
    switch (dtype) {
    case F32: return multiply<F32>(p, rows, staged, parts);
    case BF16: return multiply<BF16>(p, rows, staged, parts);
    case F16: return multiply<F16>(p, rows, staged, parts);
    case INT8: return multiply<INT8>(p, rows, staged, parts);
    default: return multiply<INT4>(p, rows, staged, parts);
    }
}
