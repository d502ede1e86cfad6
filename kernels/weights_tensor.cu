// Products of few rows with weights of small integers, on tensor cores, straight from the panels.
//
// The 16 outputs of a panel are the first operand of mma.m16n8k16, 8 rows of x the second. A word of codes holds four
// inputs of an output (int4: and the four that lie 32 further), which is what a thread gives to one instruction, so
// words become fragments where they are: the order of the inputs within an instruction is free as long as both operands
// have the same. A code is put into the mantissa of 1024 by one instruction for two, 1024 is subtracted and w = code *
// scale + offset made in f16. Sums are f32.

constexpr u32 THREADS = 256;
// Panels of a block, and warps that share a panel: each takes every fourth tile.
constexpr u32 PANELS = 2;
constexpr u32 SPLITS = 4;
// Rows of x of a step in shared memory, SPLITS tiles wide; the distance is odd in units of 32 bytes, so that what half
// a warp reads lies in different banks.
constexpr u32 LINE = SPLITS * TILE + 16;

template <u32 dtype> struct Tile {
    static constexpr u32 words = dtype == INT4 ? 8 : 16;
    static constexpr u32 bytes = words * PANEL * 4 + 4 * PANEL;
    // Words of a thread for each of its two outputs.
    static constexpr u32 own = words / 4;
    static constexpr u32 parts = dtype == INT4 ? 2 : 1;
};

// What a thread holds of a tile: its words of output lane / 4 and of the eighth output after it, and their grids.
template <u32 dtype> struct Held {
    u32 words[2][Tile<dtype>::own];
    u32 scale[2], offset[2];
};

template <u32 dtype> DEVICE void hold(const u8* tile, Held<dtype>& held) {
    u32 lane = threadIdx.x % WARP, output = lane / 4, quad = lane % 4;
    const u32* words = reinterpret_cast<const u32*>(tile);
    const u16* grid = reinterpret_cast<const u16*>(words + Tile<dtype>::words * PANEL);
    UNROLL
    for (u32 i = 0; i < 2; i++) {
        UNROLL
        for (u32 j = 0; j < Tile<dtype>::own; j++) held.words[i][j] = words[(quad + 4 * j) * PANEL + output + 8 * i];
        u32 scale = grid[output + 8 * i], offset = grid[PANEL + output + 8 * i];
        held.scale[i] = scale | scale << 16;
        held.offset[i] = offset | offset << 16;
    }
}

// Weights of the codes in the lowest bits of both halves of a word.
template <u32 dtype> DEVICE u32 decode_two(u32 word, u32 scale, u32 offset) {
    u32 codes = (word & (dtype == INT4 ? 0x000f000fu : 0x00ff00ffu)) | 0x64006400u;
    return multiply_add_halves(subtract_halves(codes, 0x64006400u), scale, offset);
}

// Copies the steps' inputs of all rows into shared memory; rows and inputs that there are none of become 0.
template <u32 N> DEVICE void fetch_rows(u16* to, const u16* x, u32 rows, u32 x_stride, u32 first_input) {
    constexpr u32 pieces = SPLITS * TILE / 8;
    for (u32 i = threadIdx.x; i < N * 8 * pieces; i += THREADS) {
        u32 row = i / pieces, piece = i % pieces, input = first_input + piece * 8;
        u16* at = to + row * LINE + piece * 8;
        if (row < rows && input < x_stride) copy_async(at, x + u64(row) * x_stride + input);
        else *reinterpret_cast<uint4*>(at) = uint4{0, 0, 0, 0};
    }
    copy_async_commit();
}

struct Product {
    const u16* x;
    u32 x_stride;
    const u8* panel;
    u32 inputs, first_output, outputs;
    const float* bias;
    float* y;
    u32 stride;
};

// Up to 8 N rows. `staged` holds two steps of rows, `parts` the sums of the warps that share a panel.
template <u32 dtype, u32 N> DEVICE void multiply(const Product& p, u32 rows, u16* staged, float* parts) {
    using T = Tile<dtype>;
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, split = warp / PANELS;
    u32 tiles = ceil_div(p.inputs, TILE), steps = ceil_div(tiles, SPLITS);
    float sums[N][4];
    UNROLL
    for (u32 n = 0; n < N; n++) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;
    Held<dtype> next;
    if (p.panel && split < tiles) hold<dtype>(p.panel + u64(split) * T::bytes, next);
    fetch_rows<N>(staged, p.x, rows, p.x_stride, 0);
    UNROLL_NOT
    for (u32 step = 0; step < steps; step++) {
        if (step + 1 < steps)
            fetch_rows<N>(staged + (step + 1) % 2 * N * 8 * LINE, p.x, rows, p.x_stride, (step + 1) * SPLITS * TILE);
        else copy_async_commit();
        Held<dtype> held = next;
        u32 tile = step * SPLITS + split;
        if (p.panel && tile + SPLITS < tiles) hold<dtype>(p.panel + u64(tile + SPLITS) * T::bytes, next);
        copy_async_wait<1>();
        sync_block();
        if (p.panel && tile < tiles) {
            const u16* x = staged + step % 2 * N * 8 * LINE + (lane / 4) * LINE + split * TILE + lane % 4 * 4;
            UNROLL
            for (u32 j = 0; j < T::own; j++) {
                UNROLL
                for (u32 part = 0; part < T::parts; part++) {
                    u32 a[4];
                    UNROLL
                    for (u32 i = 0; i < 4; i++) {
                        // Of outputs lane / 4 and 8 further: inputs 0 and 2 of the word, then 1 and 3.
                        u32 word = held.words[i % 2][j] >> (4 * part + 8 * (i / 2));
                        a[i] = decode_two<dtype>(word, held.scale[i % 2], held.offset[i % 2]);
                    }
                    UNROLL
                    for (u32 n = 0; n < N; n++) {
                        uint2 four = *reinterpret_cast<const uint2*>(x + n * 8 * LINE + 16 * j + 32 * part);
                        u32 even = (four.x & 0xffff) | four.y << 16, odd = four.x >> 16 | (four.y & 0xffff0000u);
                        multiply_matrices<F16>(a, even, odd, sums[n]);
                    }
                }
            }
        }
        sync_block();
    }
    copy_async_wait<0>();
    UNROLL
    for (u32 n = 0; n < N; n++) {
        UNROLL
        for (u32 i = 0; i < 4; i++) parts[(warp * N + n) * 128 + i * 32 + lane] = sums[n][i];
    }
    sync_block();
    for (u32 i = threadIdx.x; i < PANELS * N * 128; i += THREADS) {
        u32 panel = i / (N * 128), within = i % (N * 128), from = within % 32, part = within / 32 % 4;
        u32 row = within / 128 * 8 + from % 4 * 2 + part % 2;
        u32 output = p.first_output + panel * PANEL + from / 4 + part / 2 * 8;
        if (row >= rows || output >= p.outputs) continue;
        float sum = 0.0f;
        UNROLL
        for (u32 other = 0; other < SPLITS; other++) sum += parts[(other * PANELS + panel) * N * 128 + within];
        p.y[u64(row) * p.stride + output] = p.bias ? sum + p.bias[output] : sum;
    }
    sync_block();
}

template <u32 dtype> DEVICE void multiply_rows(Product p, u32 rows, u16* staged, float* parts) {
    if (rows <= 8) return multiply<dtype, 1>(p, rows, staged, parts);
    if (rows <= 16) return multiply<dtype, 2>(p, rows, staged, parts);
    for (u32 first = 0; first < rows; first += 32) {
        multiply<dtype, 4>(p, least(32u, rows - first), staged, parts);
        p.x += u64(32) * p.x_stride;
        p.y += u64(32) * p.stride;
    }
}

// y[r] = x[r] w^T + bias; x in f16, w int8 or int4.
//
// Grid: ceil(outputs / 32). Reads the packed weights once per 32 rows, and x once per block from the second-level
// cache. Bound by memory up to 32 rows: expect 70 % of its bandwidth for matrices of some thousand outputs.
KERNEL BOUNDS(256, 2)
    linear_tensor_rows(const u16* x, u32 rows, u32 x_stride, const Piece* pieces, u32 num_pieces, u32 dtype, u32 inputs,
                       u32 outputs, const float* bias, float* y, u32 stride, u32 column) {
    SHARED(u16, staged, 2 * 32 * LINE);
    // The sums are made when no rows are needed any more.
    float* parts = reinterpret_cast<float*>(staged);
    u32 first = blockIdx.x * PANELS, own = first + threadIdx.x / WARP % PANELS;
    const u8* panel = nullptr;
    if (own < ceil_div(outputs, PANEL)) panel = find_panel(pieces, num_pieces, own, panel_bytes(dtype, inputs));
    Product p = {x, x_stride, panel, inputs, first * PANEL, outputs, bias, y + column, stride};
    if (dtype == INT8) multiply_rows<INT8>(p, rows, staged, parts);
    else multiply_rows<INT4>(p, rows, staged, parts);
}
