// Attention over pages: one tile of 64 keys at a time, folded in order.
//
// For each tile: s = scale * q k^T, m' = max(m, max s), p = exp(s - max s), and the running sum and output are rescaled
// by exp(m - m') and the tile's by exp(max s - m') (online softmax, Milakov and Gimelshein 2018). A block takes up to
// 16 rows of a KV head: queries times query heads of the group, so that pages are read once per group. Everything is
// f32 but what pages hold. Rows are taken 8 at a time: of a task of 9 or more, pages are read again, from the cache.
//
// A warp reads 128 bytes or more side by side. Of a tile's scores a warp makes those of 16 keys: a lane takes two keys
// that lie side by side and every fourth dimension (or word of codes); four lanes add up at the end. Of the outputs a
// warp makes every fourth group of 16 dimensions: a lane takes two dimensions and every fourth position, and four lanes
// add up after the last tile. Queries and probabilities come from shared memory, four rows at a time, and what a lane
// reads is used for 2 R sums. The next tile is brought into the second-level cache meanwhile.

constexpr u32 ROWS = 16;
constexpr u32 THREADS = 128;
constexpr u32 WARPS = THREADS / WARP;
constexpr u32 WHOLE = 0xffffffffu;

struct AttentionTask {
    u32 segment, first_row, rows;
    u32 first_tile, num_tiles;
    u32 partial;
};

struct FoldTask {
    u32 segment, first_row, rows;
    u32 first_partial, num_partials;
};

// What a block works on.
struct Block {
    u32 num_heads, num_kv_heads, head_dim, group, kv_head;
    // Rows, counted query by query, head by head.
    u32 first_row, rows;
    // How many rows of the task come before.
    u32 offset;
    // The row of the pass, and the position in the count of the tiles, that row 0 belongs to.
    u32 pass_row, position;
    u32 window, sinks;
    float scale;
};

// Shared memory of a block. Queries and probabilities are lines of R rows, one for each dimension or key.
struct Room {
    float *queries, *sink_queries;
    float *scores, *probabilities;  // scores are (rows, 64 keys)
    float *max, *sum, *old;
    float *value_scale, *value_offset;
    // A row sees the keys k <= last, and of those k >= first or k < sinks.
    u32 *first, *last;
};

// Where a row's query begins, or its output with `width` heads to a row.
DEVICE u64 query_at(const Block& block, u32 row, u32 width) {
    u32 flat = block.first_row + row;
    return (u64(block.pass_row + flat / block.group) * width + block.kv_head * block.group + flat % block.group) *
           block.head_dim;
}

// Where a row lies among lines of R. Quads of rows are permuted from line to line: lanes that read the same quad of
// lines 1, 4 or 8 apart meet few banks twice, of 16 rows none.
template <u32 R> DEVICE u32 line_at(u32 line, u32 row) {
    if (R == 1) return line;
    u32 turn = (line >> 1 & 1) ^ (line >> 2 & 3) ^ (line >> 4 & 1);
    return line * R + 4 * (row / 4 ^ (turn & (R / 4 - 1))) + row % 4;
}

template <u32 R>
DEVICE void load_queries(const Block& block, const Room& room, const float* qkv, const float* cos, const float* sin,
                         u32 rotary_dim) {
    u32 dims = block.head_dim, half = rotary_dim / 2;
    for (u32 i = threadIdx.x; i < dims * R; i += THREADS) {
        u32 row = i / dims, dim = i % dims;
        float x = 0.0f, turned = 0.0f;
        if (row < block.rows) {
            const float* from = qkv + query_at(block, row, block.num_heads + 2 * block.num_kv_heads);
            x = turned = from[dim];
            if (cos && dim < 2 * half) {
                u64 at = u64(block.pass_row + (block.first_row + row) / block.group) * half + dim % half;
                turned =
                    dim < half ? x * cos[at] - from[dim + half] * sin[at] : x * cos[at] + from[dim - half] * sin[at];
            }
        }
        room.queries[line_at<R>(dim, row)] = x;
        if (cos) room.sink_queries[line_at<R>(dim, row)] = turned;
    }
    if (threadIdx.x < R) {
        u32 row = threadIdx.x, position = block.position + (block.first_row + least(row, block.rows - 1)) / block.group;
        room.max[row] = -infinite();
        room.sum[row] = 0.0f;
        room.first[row] = position + 1 > block.window ? position + 1 - block.window : 0;
        room.last[row] = position;
    }
    sync_block();
}

// sums[0][row] += x * line[row], and sums[1][row] += y * line[row].
template <u32 R> DEVICE void multiply_add(float x, float y, const float* lines, u32 line, float (*sums)[R]) {
    if constexpr (R == 1) {
        sums[0][0] = fmaf(x, lines[line], sums[0][0]);
        sums[1][0] = fmaf(y, lines[line], sums[1][0]);
    } else {
        UNROLL
        for (u32 row = 0; row < R; row += 4) {
            float4 four = *reinterpret_cast<const float4*>(lines + line_at<R>(line, row));
            float f[4] = {four.x, four.y, four.z, four.w};
            UNROLL
            for (u32 i = 0; i < 4; i++) {
                sums[0][row + i] = fmaf(x, f[i], sums[0][row + i]);
                sums[1][row + i] = fmaf(y, f[i], sums[1][row + i]);
            }
        }
    }
}

template <u32 dtype, u32 R>
DEVICE void multiply_keys(const Block& block, const u8* head, const float* queries, float (*sums)[R]) {
    using P = Pages<dtype>;
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, pair = lane % 8, quarter = lane / 8,
        dims = block.head_dim;
    UNROLL
    for (u32 row = 0; row < R; row++) sums[0][row] = sums[1][row] = 0.0f;
    if constexpr (P::integers) {
        const u16* grid = reinterpret_cast<const u16*>(head + P::code_bytes(dims, true)) + warp * PANEL + 2 * pair;
        float scale[2] = {f16_to_f32(grid[0]), f16_to_f32(grid[1])};
        float offset[2] = {f16_to_f32(grid[PAGE]), f16_to_f32(grid[PAGE + 1])};
        u32 depth = ceil_div(dims, P::codes);
        const u32* words = reinterpret_cast<const u32*>(head) + warp * depth * PANEL + 2 * pair;
        UNROLL_NOT
        for (u32 line = quarter; line < depth; line += 4) {
            uint2 two = *reinterpret_cast<const uint2*>(words + line * PANEL);
            UNROLL_TWO
            for (u32 i = 0; i < P::codes; i++) {
                u32 dim = line * P::codes + i;
                if (dim >= dims) break;
                multiply_add<R>(fmaf(float(two.x >> P::bits * i & P::mask), scale[0], offset[0]),
                                fmaf(float(two.y >> P::bits * i & P::mask), scale[1], offset[1]), queries, dim, sums);
            }
        }
    } else {
        UNROLL_FOUR
        for (u32 dim = quarter; dim < dims; dim += 4) {
            float x, y;
            load_two<dtype>(head, (warp * dims + dim) * PANEL + 2 * pair, &x, &y);
            multiply_add<R>(x, y, queries, dim, sums);
        }
    }
    UNROLL
    for (u32 key = 0; key < 2; key++) {
        UNROLL
        for (u32 row = 0; row < R; row++) {
            sums[key][row] += shuffle_xor(sums[key][row], 8);
            sums[key][row] += shuffle_xor(sums[key][row], 16);
        }
    }
}

// Scores of a tile that begins at key `start`, scaled; minus infinity where a row does not see a key.
template <u32 dtype, u32 R> DEVICE void score_tile(const Block& block, const Room& room, const u8* head, u32 start) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, key = warp * PANEL + lane % 8 * 2, quarter = lane / 8;
    auto put = [&](const float (*sums)[R], u32 most) {
        UNROLL
        for (u32 row = 0; row < R; row++) {
            // The four lanes share the rows; they all have the sums.
            if (row % 4 != quarter) continue;
            UNROLL
            for (u32 i = 0; i < 2; i++) {
                u32 k = start + key + i;
                bool seen = k <= room.last[row] && (k >= room.first[row] || k < block.sinks) && row < block.rows;
                if (k < most) room.scores[row * PAGE + key + i] = seen ? sums[i][row] * block.scale : -infinite();
            }
        }
    };
    // Once more for the first keys, where queries are rotated back for them.
    u32 passes = room.sink_queries && start < block.sinks ? 2 : 1;
    UNROLL_NOT
    for (u32 pass = 0; pass < passes; pass++) {
        float sums[2][R];
        multiply_keys<dtype, R>(block, head, pass == 0 ? room.queries : room.sink_queries, sums);
        put(sums, pass == 0 ? WHOLE : block.sinks);
    }
    sync_block();
}

// Asks for a head's keys and values to be brought nearer.
template <u32 dtype> DEVICE void prefetch_head(const u8* head, u32 dims) {
    u32 bytes = Pages<dtype>::notes_at(dims);
    for (u32 at = threadIdx.x * 128; at < bytes; at += THREADS * 128) prefetch(head + at);
}

// Outputs that a thread adds up: of groups of 16 dimensions warp, warp + 4, .. two dimensions each, for R rows.
constexpr u32 GROUPS = 256 / PANEL / WARPS;
template <u32 R> using Outputs = float[GROUPS][2][R];

// A tile into the running state.
template <u32 dtype, u32 R>
DEVICE void fold_tile(const Block& block, const Room& room, const u8* head, u32 start, Outputs<R>& out) {
    using P = Pages<dtype>;
    u32 dims = block.head_dim, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, pair = lane % 8,
        quarter = lane / 8;
    const u8* values = head + P::part_bytes(dims, true);
    // Of a task's tiles some lie past what these rows see.
    if (start > room.last[R - 1]) return;
    score_tile<dtype, R>(block, room, head, start);
    if constexpr (P::integers) {
        if (threadIdx.x < PAGE) {
            const u16* grid = reinterpret_cast<const u16*>(values + P::code_bytes(dims, false));
            room.value_scale[threadIdx.x] = f16_to_f32(grid[threadIdx.x]);
            room.value_offset[threadIdx.x] = f16_to_f32(grid[PAGE + threadIdx.x]);
        }
    }
    for (u32 row = warp; row < R; row += WARPS) {
        float a = room.scores[row * PAGE + lane], b = room.scores[row * PAGE + WARP + lane];
        float tile_max = reduce_warp<Max>(greatest(a, b)), before = room.max[row];
        float p = a == -infinite() ? 0.0f : exp_f32(a - tile_max), q = b == -infinite() ? 0.0f : exp_f32(b - tile_max);
        float tile_sum = reduce_warp<Sum>(p + q);
        float after = greatest(before, tile_max);
        // A row that has seen nothing, or sees nothing here, counts for exactly nothing; exp clamps its argument.
        float old = before == -infinite() ? 0.0f : exp_f32(before - after);
        float now = tile_max == -infinite() ? 0.0f : exp_f32(tile_max - after);
        if (tile_max == -infinite()) old = 1.0f;
        room.probabilities[line_at<R>(lane, row)] = p * now;
        room.probabilities[line_at<R>(WARP + lane, row)] = q * now;
        sync_warp();
        if (lane == 0) {
            room.max[row] = after;
            room.sum[row] = fmaf(tile_sum, now, room.sum[row] * old);
            room.old[row] = old;
        }
    }
    sync_block();
    // Slots past the last query's key may hold anything, even what is no number.
    u32 slots = least(room.last[R - 1] + 1 - start, PAGE), groups = ceil_div(dims, PANEL);
    UNROLL
    for (u32 row = 0; row < R; row++) {
        float old = room.old[row];
        UNROLL
        for (u32 g = 0; g < GROUPS; g++) {
            out[g][0][row] *= old;
            out[g][1][row] *= old;
        }
    }
    if constexpr (P::integers) {
        constexpr u32 depth = PAGE / P::codes;
        UNROLL_NOT
        for (u32 line = quarter; line < depth; line += 4) {
            UNROLL
            for (u32 g = 0; g < GROUPS; g++) {
                u32 group = warp + WARPS * g;
                if (group >= groups) break;
                uint2 two = *reinterpret_cast<const uint2*>(reinterpret_cast<const u32*>(values) +
                                                            (group * depth + line) * PANEL + 2 * pair);
                UNROLL_TWO
                for (u32 i = 0; i < P::codes; i++) {
                    u32 slot = line * P::codes + i;
                    float scale = room.value_scale[slot], offset = room.value_offset[slot];
                    float x = fmaf(float(two.x >> P::bits * i & P::mask), scale, offset);
                    float y = fmaf(float(two.y >> P::bits * i & P::mask), scale, offset);
                    multiply_add<R>(slot < slots ? x : 0.0f, slot < slots ? y : 0.0f, room.probabilities, slot, out[g]);
                }
            }
        }
    } else {
        UNROLL_FOUR
        for (u32 slot = quarter; slot < slots; slot += 4) {
            UNROLL
            for (u32 g = 0; g < GROUPS; g++) {
                u32 group = warp + WARPS * g;
                if (group >= groups) break;
                float x, y;
                load_two<dtype>(values, (group * PAGE + slot) * PANEL + 2 * pair, &x, &y);
                multiply_add<R>(x, y, room.probabilities, slot, out[g]);
            }
        }
    }
}

#define ROOM()                                                                                     \
    DYNAMIC_SHARED(float, queries);                                                                \
    SHARED(float, scores, ROWS * PAGE);                                                                \
    SHARED(float, probabilities, ROWS * PAGE);                                                         \
    SHARED(float, state, 3 * ROWS + 2 * PAGE);                                                             \
    SHARED(u32, sight, 2 * ROWS);                                                                      \
    Room room = {queries,      nullptr,          scores,           probabilities,           state, \
                 state + ROWS, state + 2 * ROWS, state + 3 * ROWS, state + 3 * ROWS + PAGE, sight, \
                 sight + ROWS}

// Results of the rows of a block, or what a fold needs of them: greatest scores, sums, and outputs before division.
template <u32 R>
DEVICE void write_rows(const Block& block, const Room& room, Outputs<R>& sums, float* partial, float* out) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, quarter = lane / 8;
    UNROLL
    for (u32 row = 0; row < R; row++) {
        float *to = nullptr, scale = 1.0f;
        if (row < block.rows) {
            to = partial ? partial + 2 * ROWS + (block.offset + row) * block.head_dim
                         : out + query_at(block, row, block.num_heads);
            if (!partial) scale = 1.0f / room.sum[row];
        }
        UNROLL
        for (u32 g = 0; g < GROUPS; g++) {
            UNROLL
            for (u32 i = 0; i < 2; i++) {
                float sum = sums[g][i][row];
                sum += shuffle_xor(sum, 8);
                sum += shuffle_xor(sum, 16);
                u32 dim = (warp + WARPS * g) * PANEL + lane % 8 * 2 + i;
                if (to && quarter == row % 4 && dim < block.head_dim) to[dim] = sum * scale;
            }
        }
    }
    if (partial && threadIdx.x < block.rows) {
        partial[block.offset + threadIdx.x] = room.max[threadIdx.x];
        partial[ROWS + block.offset + threadIdx.x] = room.sum[threadIdx.x];
    }
}

struct Call {
    View view;
    const Segment* segments;
    const u32* pages;
    const float* qkv;
    const float *cos, *sin;
    u32 rotary_dim;
    float* partials;
    float* out;
};

template <u32 R> DEVICE void clear(Outputs<R>& out) {
    UNROLL
    for (u32 g = 0; g < GROUPS; g++) {
        UNROLL
        for (u32 row = 0; row < R; row++) out[g][0][row] = out[g][1][row] = 0.0f;
    }
}

template <u32 dtype, u32 R>
DEVICE void attend_rows(const Call& call, const Segment& segment, const AttentionTask& task, const Block& block,
                        const Room& room) {
    Outputs<R> out;
    clear<R>(out);
    load_queries<R>(block, room, call.qkv, room.sink_queries ? call.cos : nullptr, call.sin, call.rotary_dim);
    u32 first = block.position + task.first_row / block.group;
    u32 oldest = (first + 1 > block.window ? first + 1 - block.window : 0) / PAGE;
    u32 before = least(ceil_div(block.sinks, PAGE), oldest), end = task.first_tile + task.num_tiles;
    auto tile = [&](u32 i) { return i < before ? i : oldest + i - before; };
    auto head = [&](u32 i) {
        u32 frame = call.pages[segment.first_page + page_of_tile(segment, tile(i))];
        return find_head<dtype>(call.view, block.head_dim, frame, block.kv_head);
    };
    const u8* next = head(task.first_tile);
    for (u32 i = task.first_tile; i < end; i++) {
        const u8* here = next;
        if (i + 1 < end) {
            next = head(i + 1);
            prefetch_head<dtype>(next, block.head_dim);
        }
        fold_tile<dtype, R>(block, room, here, tile(i) * PAGE, out);
    }
    float* partial = nullptr;
    if (task.partial != WHOLE)
        partial =
            call.partials + (u64(task.partial) * block.num_kv_heads + block.kv_head) * ROWS * (2 + block.head_dim);
    write_rows<R>(block, room, out, partial, call.out);
}

// Calls `run` with as many rows as a thread has registers for, until all are done.
template <typename F> DEVICE void in_parts(Block block, F run) {
    constexpr u32 most = 8;
    u32 rows = block.rows;
    UNROLL_NOT
    for (u32 done = 0; done < rows; done += most) {
        block.rows = least(most, rows - done);
        run(block);
        sync_block();
        block.first_row += most;
        block.offset += most;
    }
}

template <u32 dtype>
DEVICE void attend(const Call& call, const AttentionTask* tasks, u32 num_heads, u32 num_kv_heads, u32 head_dim,
                   u32 window, float scale, Room room) {
    AttentionTask task = tasks[blockIdx.x];
    const Segment& segment = call.segments[task.segment];
    u32 widest = window ? window : WHOLE, sinks = 0;
    if (segment.kept == KEPT_WINDOW) {
        // A layer with a window of its own that is narrower counts positions within the cache too.
        if (widest >= segment.first + segment.recent) sinks = segment.first;
        widest = least(widest, segment.recent);
    }
    Block block = {num_heads,      num_kv_heads, head_dim, num_heads / num_kv_heads, blockIdx.y,
                   task.first_row, task.rows,    0,        segment.first_row,        segment.start,
                   widest,         sinks,        scale};
    if (sinks > 0 && call.cos) room.sink_queries = room.queries + ROWS * head_dim;
    in_parts(block, [&](const Block& part) {
        if (part.rows == 1) attend_rows<dtype, 1>(call, segment, task, part, room);
        else if (part.rows <= 4) attend_rows<dtype, 4>(call, segment, task, part, room);
        else attend_rows<dtype, 8>(call, segment, task, part, room);
    });
}

// Attention of the rows of a task over its tiles.
//
// Grid: (tasks, kv heads). Reads every page of a task once: 2 * 64 * head_dim * size bytes a tile and head; 4 * rows *
// head_dim operations per key. Decoding is bound by those bytes while a group has few heads: expect 60 to 80 % of the
// memory's bandwidth. Prompts are bound by multiply-adds in f32.
#define ATTEND(name, dtype)                                                                                            \
    KERNEL BOUNDS(128, 3)                                                                                              \
        attend_##name(u8* resident, u32 num_resident, u8* streamed, u64 frame_stride, u32 note_bytes,                  \
                      const Segment* segments, const u32* pages, const AttentionTask* tasks, const float* qkv,         \
                      u32 num_heads, u32 num_kv_heads, u32 head_dim, u32 window, float scale, const float* sink_cos,   \
                      const float* sink_sin, u32 rotary_dim, float* partials, float* out) {                            \
        ROOM();                                                                                                        \
        View view = {resident, num_resident, streamed, frame_stride, note_bytes};                                      \
        Call call = {view, segments, pages, qkv, sink_cos, sink_sin, rotary_dim, partials, out};                       \
        attend<dtype>(call, tasks, num_heads, num_kv_heads, head_dim, window, scale, room);                            \
    }
ATTEND(f32, F32)
ATTEND(bf16, BF16)
ATTEND(f16, F16)
ATTEND(int8, INT8)
ATTEND(int4, INT4)

// Folds partials in the order of their tiles, and divides by the sums. Grid: (tasks, kv heads). Reads each partial
// once.
KERNEL BOUNDS(128) fold_partials(const Segment* segments, const FoldTask* tasks, u32 num_heads, u32 num_kv_heads,
                                 u32 head_dim, const float* partials, float* out) {
    FoldTask task = tasks[blockIdx.x];
    const Segment& segment = segments[task.segment];
    Block block = {num_heads,
                   num_kv_heads,
                   head_dim,
                   num_heads / num_kv_heads,
                   blockIdx.y,
                   task.first_row,
                   task.rows,
                   0,
                   segment.first_row,
                   segment.start,
                   WHOLE,
                   0,
                   1.0f};
    u64 stride = u64(num_kv_heads) * ROWS * (2 + head_dim);
    const float* first = partials + task.first_partial * stride + u64(blockIdx.y) * ROWS * (2 + head_dim);
    for (u32 row = 0; row < task.rows; row++) {
        float max = -infinite(), sum = 0.0f, sums[2] = {0.0f, 0.0f};
        for (u32 i = 0; i < task.num_partials; i++) {
            const float* partial = first + i * stride;
            float tile_max = partial[row];
            if (tile_max == -infinite()) continue;
            float after = greatest(max, tile_max);
            float old = max == -infinite() ? 0.0f : exp_f32(max - after), now = exp_f32(tile_max - after);
            sum = fmaf(partial[ROWS + row], now, sum * old);
            UNROLL
            for (u32 part = 0; part < 2; part++) {
                u32 dim = part * THREADS + threadIdx.x;
                if (dim < head_dim) sums[part] = fmaf(partial[2 * ROWS + row * head_dim + dim], now, sums[part] * old);
            }
            max = after;
        }
        float* to = out + query_at(block, row, num_heads);
        UNROLL
        for (u32 part = 0; part < 2; part++) {
            u32 dim = part * THREADS + threadIdx.x;
            if (dim < head_dim) to[dim] = sums[part] / sum;
        }
    }
}

// ---- segments that evict by attention (H2O); src/device/host/evict.rs is the definition

// Keys that an eviction takes at most at once.
constexpr u32 VICTIMS = PAGE;

// One KV head of a sequence's cache.
template <u32 dtype> struct Cache {
    View view;
    const u32* frames;
    u32 dims, kv_head;

    // The page that holds a slot.
    METHOD u8* head(u32 slot) const { return find_head<dtype>(view, dims, frames[slot / PAGE], kv_head); }
    // Of every slot of a page the position of its key, then the attention that it received.
    METHOD u32* positions(u8* head) const { return reinterpret_cast<u32*>(head + Pages<dtype>::notes_at(dims)); }
    METHOD float* scores(u8* head) const { return reinterpret_cast<float*>(positions(head) + PAGE); }
};

// Slots that are taken when a position is about to be stored.
DEVICE u32 taken_slots(const Segment& segment, u32 position) {
    u32 evicted = position < segment.prompt_len ? position / segment.stretch * segment.stretch : position;
    return least(evicted, segment.first + segment.recent) + position - evicted;
}

// Where the stretch that a position belongs to ends: what follows is computed after an eviction.
DEVICE u32 stretch_end(const Segment& segment, u32 position) {
    if (position >= segment.prompt_len) return position + 1;
    return least((position / segment.stretch + 1) * segment.stretch, segment.prompt_len);
}

// Copies what a slot holds, bit by bit, to another slot.
template <u32 dtype> DEVICE void move_slot(const Cache<dtype>& cache, u32 from_slot, u32 to_slot) {
    using P = Pages<dtype>;
    u8 *from = cache.head(from_slot), *to = cache.head(to_slot);
    u32 a = from_slot % PAGE, b = to_slot % PAGE, dims = cache.dims;
    for (u32 part = 0; part < 2; part++) {
        bool keys = part == 0;
        const u8* source = keys ? from : from + P::part_bytes(dims, true);
        u8* target = keys ? to : to + P::part_bytes(dims, true);
        if constexpr (P::integers) {
            const u32* words = reinterpret_cast<const u32*>(source);
            u32* to_words = reinterpret_cast<u32*>(target);
            if (keys) {
                for (u32 dim = threadIdx.x * P::codes; dim < dims; dim += THREADS * P::codes)
                    to_words[P::key_word(dims, b, dim)] = words[P::key_word(dims, a, dim)];
            } else {
                u32 shift = b % P::codes * P::bits;
                for (u32 dim = threadIdx.x; dim < dims; dim += THREADS) {
                    u32 code = words[P::value_word(a, dim)] >> a % P::codes * P::bits & P::mask;
                    u32* word = to_words + P::value_word(b, dim);
                    *word = (*word & ~(P::mask << shift)) | code << shift;
                }
            }
            if (threadIdx.x < 2) {
                u32 at = P::code_bytes(dims, keys) / 2 + threadIdx.x * PAGE;
                reinterpret_cast<u16*>(target)[at + b] = reinterpret_cast<const u16*>(source)[at + a];
            }
        } else {
            for (u32 dim = threadIdx.x; dim < dims; dim += THREADS) {
                u32 i = keys ? P::key_element(dims, a, dim) : P::value_element(a, dim);
                u32 j = keys ? P::key_element(dims, b, dim) : P::value_element(b, dim);
                if constexpr (dtype == F32) reinterpret_cast<u32*>(target)[j] = reinterpret_cast<const u32*>(source)[i];
                else reinterpret_cast<u16*>(target)[j] = reinterpret_cast<const u16*>(source)[i];
            }
        }
    }
    if (threadIdx.x == 0) {
        cache.positions(to)[b] = cache.positions(from)[a];
        cache.scores(to)[b] = cache.scores(from)[a];
    }
    sync_block();
}

// Orders as floats are ordered, then by position.
DEVICE u64 rank_of(float score, u32 position) {
    u32 bits = float_bits(score);
    return u64(bits >> 31 ? ~bits : bits | 0x80000000u) << 32 | position;
}

// Of `count` keys leaves `capacity`, all from position `latest` on among them: those that received least go, the older
// of equals, and what stays beyond the capacity moves to the slots that became free.
template <u32 dtype>
DEVICE void evict(const Cache<dtype>& cache, u32 count, u32 capacity, u32 latest, u64* room, u32* gone, u32* sorted,
                  u32* moves) {
    constexpr u64 none = ~u64(0);
    u32 victims = count - capacity;
    u64 before = 0;
    for (u32 victim = 0; victim < victims; victim++) {
        u64 best = none;
        u32 slot_of_best = 0;
        for (u32 slot = threadIdx.x; slot < count; slot += THREADS) {
            u8* head = cache.head(slot);
            u32 position = cache.positions(head)[slot % PAGE];
            u64 rank = rank_of(cache.scores(head)[slot % PAGE], position);
            if (position < latest && rank < best && (victim == 0 || rank > before)) {
                best = rank;
                slot_of_best = slot;
            }
        }
        before = reduce_block<Min>(best, room);
        if (best == before && best != none) gone[victim] = slot_of_best;
    }
    sync_block();
    if (threadIdx.x < victims) {
        u32 slot = gone[threadIdx.x], beyond = capacity + threadIdx.x, smaller = 0, kept = 0;
        bool stays = true;
        for (u32 i = 0; i < victims; i++) {
            smaller += gone[i] < slot;
            stays = stays && gone[i] != beyond;
            kept += gone[i] >= capacity && gone[i] < beyond;
        }
        sorted[smaller] = slot;
        if (stays) moves[threadIdx.x - kept] = beyond;
    }
    sync_block();
    for (u32 i = 0; i < victims && sorted[i] < capacity; i++) move_slot(cache, moves[i], sorted[i]);
}

// Some rows of a stretch: their outputs, then what every key receives of each of their queries, one after the other.
template <u32 dtype, u32 R>
DEVICE void heavy_rows(const Call& call, const Cache<dtype>& cache, const Block& block, const Room& room) {
    Outputs<R> out;
    clear<R>(out);
    load_queries<R>(block, room, call.qkv, nullptr, nullptr, 0);
    u32 last = block.position + (block.first_row + block.rows - 1) / block.group;
    for (u32 start = 0; start <= last; start += PAGE) {
        if (start + PAGE <= last) prefetch_head<dtype>(cache.head(start + PAGE), block.head_dim);
        fold_tile<dtype, R>(block, room, cache.head(start), start, out);
    }
    write_rows<R>(block, room, out, nullptr, call.out);
    for (u32 start = 0; start <= last; start += PAGE) {
        u8* head = cache.head(start);
        score_tile<dtype, R>(block, room, head, start);
        if (threadIdx.x < PAGE) {
            float* score = cache.scores(head) + threadIdx.x;
            float total = 0.0f;
            for (u32 row = 0; row < block.rows; row++) {
                float s = room.scores[row * PAGE + threadIdx.x];
                if (s != -infinite()) total = fmaf(exp_f32(s - room.max[row]), 1.0f / room.sum[row], total);
                if ((block.first_row + row + 1) % block.group == 0 || row + 1 == block.rows) {
                    // Keys that the query does not see may have no score yet that is a number.
                    if (total != 0.0f) *score += total;
                    total = 0.0f;
                }
            }
        }
        sync_block();
    }
}

template <u32 dtype>
DEVICE void attend_heavy(const Call& call, const Segment& segment, u32 num_heads, u32 num_kv_heads, u32 head_dim,
                         float scale, const Room& room, u64* reduction, u32* lists) {
    Cache<dtype> cache = {call.view, call.pages + segment.first_page, head_dim, blockIdx.y};
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, group = num_heads / num_kv_heads;
    u32 end = segment.start + segment.len, capacity = segment.first + segment.recent;
    u32 position = segment.start, taken = taken_slots(segment, position), whole = stretch_end(segment, position);
    while (position < end) {
        u32 stop = least(whole, end);
        u32 pass_row = segment.first_row + position - segment.start;
        for (u32 i = warp; i < 2 * (stop - position); i += WARPS) {
            u32 slot = taken + i / 2;
            bool keys = i % 2 == 0;
            u8* head = cache.head(slot);
            u64 first = u64(pass_row + i / 2) * (num_heads + 2 * num_kv_heads) + num_heads + (keys ? 0 : num_kv_heads) +
                        blockIdx.y;
            store_vector<dtype>(head, head_dim, keys, slot % PAGE, call.qkv + first * head_dim);
            if (keys && lane == 0) {
                cache.positions(head)[slot % PAGE] = position + i / 2;
                cache.scores(head)[slot % PAGE] = 0.0f;
            }
        }
        sync_block();
        u32 rows = (stop - position) * group;
        for (u32 first = 0; first < rows; first += ROWS) {
            Block block = {num_heads, num_kv_heads, head_dim, group, blockIdx.y, first, least(ROWS, rows - first),
                           0,         pass_row,     taken,    WHOLE, 0,          scale};
            in_parts(block, [&](const Block& part) {
                if (part.rows == 1) heavy_rows<dtype, 1>(call, cache, part, room);
                else heavy_rows<dtype, 8>(call, cache, part, room);
            });
        }
        taken += stop - position;
        position = stop;
        if (stop != whole) break;
        // Those that go first are those that received least: nobody depends on who goes with it.
        while (taken > capacity) {
            u32 left = taken - least(VICTIMS, taken - capacity);
            evict(cache, taken, left, stop - least(segment.recent, stop), reduction, lists, lists + VICTIMS,
                  lists + 2 * VICTIMS);
            taken = left;
        }
        // A prompt's stretches but its last end at multiples.
        whole = stop < segment.prompt_len ? least(stop + segment.stretch, segment.prompt_len) : stop + 1;
    }
}

// Segments that evict by attention: for each stretch of positions its keys are stored in the next free slots, its
// queries attend, every key adds up what it receives, and what is too much is evicted.
//
// Grid: (such segments, kv heads); a block goes through a head of a segment alone, because every stretch needs what the
// one before left. Reads the keys of a tile twice and the values once per 16 rows. Decoding with some hundred sequences
// times heads fills the card: expect 40 % of the memory's bandwidth; a long prompt of few sequences does not.
#define ATTEND_HEAVY(name, dtype)                                                                                      \
    KERNEL BOUNDS(128, 3)                                                                                              \
        attend_heavy_##name(u8* resident, u32 num_resident, u8* streamed, u64 frame_stride, u32 note_bytes,            \
                            const Segment* segments, const u32* pages, const u32* heavy, const float* qkv,             \
                            u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale, float* out) {                  \
        ROOM();                                                                                                        \
        SHARED(u64, reduction, WARPS);                                                                                 \
        SHARED(u32, lists, 3 * VICTIMS);                                                                               \
        View view = {resident, num_resident, streamed, frame_stride, note_bytes};                                      \
        Call call = {view, segments, pages, qkv, nullptr, nullptr, 0, nullptr, out};                                   \
        attend_heavy<dtype>(call, segments[heavy[blockIdx.x]], num_heads, num_kv_heads, head_dim, scale, room,         \
                            reduction, lists);                                                                         \
    }
ATTEND_HEAVY(f32, F32)
ATTEND_HEAVY(bf16, BF16)
ATTEND_HEAVY(f16, F16)
ATTEND_HEAVY(int8, INT8)
ATTEND_HEAVY(int4, INT4)
