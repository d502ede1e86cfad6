// Attention over pages: one tile of 64 keys at a time, folded in order.
//
// For each tile: s = scale * q k^T, m' = max(m, max s), p = exp(s - max s), and the running sum and output are rescaled
// by exp(m - m') and the tile's by exp(max s - m') (online softmax, Milakov and Gimelshein 2018). A block takes up to
// 16 rows of a KV head: queries times query heads of the group, so that pages are read once per group. Everything is
// f32 but what pages hold.
//
// Of a tile's scores a thread makes those of one key, over half of the dimensions: neighbouring threads read
// neighbouring keys, which lie side by side, and every element is used for all rows. Of the outputs a thread makes
// those of one dimension, or two. Queries and probabilities come from shared memory, four rows at a time, the same for
// a whole warp.

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
    // The row of the pass, and the position in the count of the tiles, that row 0 belongs to.
    u32 pass_row, position;
    u32 window, sinks;
    float scale;
};

// Shared memory of a block; what is per row and key is (key, R rows) or (16 rows, 64 keys).
struct Room {
    float *queries, *sink_queries;  // (head_dim, R rows)
    float *scores, *halves, *probabilities;
    float *max, *sum, *old;
    float *value_scale, *value_offset;
};

// The keys k that a row sees: k <= last, and k >= first or k < sinks.
struct Visible {
    u32 first, last;
};

DEVICE Visible visible(const Block& block, u32 row) {
    u32 position = block.position + (block.first_row + row) / block.group;
    return {position + 1 > block.window ? position + 1 - block.window : 0, position};
}

DEVICE bool sees(const Block& block, const Visible& visible, u32 key) {
    return key <= visible.last && (key >= visible.first || key < block.sinks);
}

// Where a row's query begins, or its output with `width` heads to a row.
DEVICE u64 query_at(const Block& block, u32 row, u32 width) {
    u32 flat = block.first_row + row;
    return (u64(block.pass_row + flat / block.group) * width + block.kv_head * block.group + flat % block.group) *
           block.head_dim;
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
        room.queries[dim * R + row] = x;
        if (cos) room.sink_queries[dim * R + row] = turned;
    }
    if (threadIdx.x < R) {
        room.max[threadIdx.x] = -infinite();
        room.sum[threadIdx.x] = 0.0f;
    }
    sync_block();
}

// sums[row] += x * rows[row].
template <u32 R> DEVICE void multiply_add(float x, const float* rows, float* sums) {
    if constexpr (R == 1) {
        sums[0] = fmaf(x, rows[0], sums[0]);
    } else {
        UNROLL
        for (u32 row = 0; row < R; row += 4) {
            float4 four = *reinterpret_cast<const float4*>(rows + row);
            sums[row] = fmaf(x, four.x, sums[row]);
            sums[row + 1] = fmaf(x, four.y, sums[row + 1]);
            sums[row + 2] = fmaf(x, four.z, sums[row + 2]);
            sums[row + 3] = fmaf(x, four.w, sums[row + 3]);
        }
    }
}

// Scores of a tile that begins at key `start`, scaled; minus infinity where a row does not see a key.
template <u32 dtype, u32 R> DEVICE void score_tile(const Block& block, const Room& room, const u8* head, u32 start) {
    using P = Pages<dtype>;
    u32 key = threadIdx.x % PAGE, dims = block.head_dim;
    // The second half begins with a whole word.
    u32 middle = least(round_up(dims / 2, 8), dims);
    u32 from = threadIdx.x < PAGE ? 0 : middle, to = threadIdx.x < PAGE ? middle : dims;
    bool sink = start + key < block.sinks && room.sink_queries;
    const float* queries = sink ? room.sink_queries : room.queries;
    float sums[R];
    UNROLL
    for (u32 row = 0; row < R; row++) sums[row] = 0.0f;
    if constexpr (P::integers) {
        const u16* grid = reinterpret_cast<const u16*>(head + P::code_bytes(dims, true));
        float scale = f16_to_f32(grid[key]), offset = f16_to_f32(grid[PAGE + key]);
        for (u32 first = from; first < to; first += P::codes) {
            u32 word = reinterpret_cast<const u32*>(head)[P::key_word(dims, key, first)];
            for (u32 i = 0; i < P::codes && first + i < to; i++)
                multiply_add<R>(fmaf(float(word >> P::bits * i & P::mask), scale, offset), queries + (first + i) * R,
                                sums);
        }
    } else {
        UNROLL_FOUR
        for (u32 dim = from; dim < to; dim++)
            multiply_add<R>(load_as_f32<dtype>(head, P::key_element(dims, key, dim)), queries + dim * R, sums);
    }
    if (threadIdx.x >= PAGE) {
        UNROLL
        for (u32 row = 0; row < R; row++) room.halves[row * PAGE + key] = sums[row];
    }
    sync_block();
    if (threadIdx.x < PAGE) {
        UNROLL
        for (u32 row = 0; row < R; row++) {
            float score = (sums[row] + room.halves[row * PAGE + key]) * block.scale;
            bool seen = row < block.rows && sees(block, visible(block, row), start + key);
            room.scores[row * PAGE + key] = seen ? score : -infinite();
        }
    }
    sync_block();
}

// A tile into the running state. `out` are the thread's dimensions of all rows.
template <u32 dtype, u32 R>
DEVICE void fold_tile(const Block& block, const Room& room, const u8* head, u32 start, float (*out)[2]) {
    using P = Pages<dtype>;
    u32 dims = block.head_dim, lane = threadIdx.x % WARP;
    const u8* values = head + P::part_bytes(dims, true);
    if constexpr (P::integers) {
        if (threadIdx.x < PAGE) {
            const u16* grid = reinterpret_cast<const u16*>(values + P::code_bytes(dims, false));
            room.value_scale[threadIdx.x] = f16_to_f32(grid[threadIdx.x]);
            room.value_offset[threadIdx.x] = f16_to_f32(grid[PAGE + threadIdx.x]);
        }
    }
    score_tile<dtype, R>(block, room, head, start);
    for (u32 row = threadIdx.x / WARP; row < R; row += WARPS) {
        float a = room.scores[row * PAGE + lane], b = room.scores[row * PAGE + WARP + lane];
        float tile_max = reduce_warp<Max>(greatest(a, b)), before = room.max[row];
        float p = a == -infinite() ? 0.0f : exp_f32(a - tile_max), q = b == -infinite() ? 0.0f : exp_f32(b - tile_max);
        float tile_sum = reduce_warp<Sum>(p + q);
        float after = greatest(before, tile_max);
        // A row that has seen nothing, or sees nothing here, counts for exactly nothing; exp clamps its argument.
        float old = before == -infinite() ? 0.0f : exp_f32(before - after);
        float now = tile_max == -infinite() ? 0.0f : exp_f32(tile_max - after);
        if (tile_max == -infinite()) old = 1.0f;
        room.probabilities[lane * R + row] = p * now;
        room.probabilities[(WARP + lane) * R + row] = q * now;
        sync_warp();
        if (lane == 0) {
            room.max[row] = after;
            room.sum[row] = fmaf(tile_sum, now, room.sum[row] * old);
            room.old[row] = old;
        }
    }
    sync_block();
    // Slots past the last query's key may hold anything, even what is no number.
    u32 last = block.position + (block.first_row + block.rows - 1) / block.group;
    u32 slots = least(last + 1 - start, PAGE);
    UNROLL
    for (u32 part = 0; part < 2; part++) {
        u32 dim = part * THREADS + threadIdx.x;
        if (dim >= dims) break;
        float sums[R];
        UNROLL
        for (u32 row = 0; row < R; row++) sums[row] = out[row][part] * room.old[row];
        if constexpr (P::integers) {
            for (u32 slot = 0; slot < slots; slot += P::codes) {
                u32 word = reinterpret_cast<const u32*>(values)[P::value_word(slot, dim)];
                UNROLL
                for (u32 i = 0; i < P::codes; i++) {
                    float code = float(word >> P::bits * i & P::mask);
                    float x = fmaf(code, room.value_scale[slot + i], room.value_offset[slot + i]);
                    multiply_add<R>(slot + i < slots ? x : 0.0f, room.probabilities + (slot + i) * R, sums);
                }
            }
        } else {
            UNROLL_FOUR
            for (u32 slot = 0; slot < slots; slot++)
                multiply_add<R>(load_as_f32<dtype>(values, P::value_element(slot, dim)), room.probabilities + slot * R,
                                sums);
        }
        UNROLL
        for (u32 row = 0; row < R; row++) out[row][part] = sums[row];
    }
    sync_block();
}

#define ROOM()                                                                             \
    DYNAMIC_SHARED(float, queries);                                                        \
    SHARED(float, scores, ROWS * PAGE);                                                     \
    SHARED(float, halves, ROWS * PAGE);                                                     \
    SHARED(float, probabilities, ROWS * PAGE);                                              \
    SHARED(float, state, 3 * ROWS + 2 * PAGE);                                             \
    Room room = {queries, nullptr,      scores,           halves,           probabilities, \
                 state,   state + ROWS, state + 2 * ROWS, state + 3 * ROWS, state + 3 * ROWS + PAGE}

// Results of the rows of a block, or what a fold needs of them: greatest scores, sums, and outputs before division.
template <u32 R>
DEVICE void write_rows(const Block& block, const Room& room, const float (*sums)[2], float* partial, float* out) {
    UNROLL
    for (u32 row = 0; row < R; row++) {
        if (row >= block.rows) break;
        float scale = partial ? 1.0f : 1.0f / room.sum[row];
        float* to = partial ? partial + 2 * ROWS + row * block.head_dim : out + query_at(block, row, block.num_heads);
        UNROLL
        for (u32 part = 0; part < 2; part++) {
            u32 dim = part * THREADS + threadIdx.x;
            if (dim < block.head_dim) to[dim] = sums[row][part] * scale;
        }
        if (partial && threadIdx.x == 0) {
            partial[row] = room.max[row];
            partial[ROWS + row] = room.sum[row];
        }
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

template <u32 dtype, u32 R>
DEVICE void attend_rows(const Call& call, const Segment& segment, const AttentionTask& task, const Block& block,
                        const Room& room) {
    float out[R][2];
    UNROLL
    for (u32 row = 0; row < R; row++) out[row][0] = out[row][1] = 0.0f;
    load_queries<R>(block, room, call.qkv, room.sink_queries ? call.cos : nullptr, call.sin, call.rotary_dim);
    u32 first = block.position + block.first_row / block.group;
    u32 oldest = (first + 1 > block.window ? first + 1 - block.window : 0) / PAGE;
    u32 before = least(ceil_div(block.sinks, PAGE), oldest);
    for (u32 i = task.first_tile; i < task.first_tile + task.num_tiles; i++) {
        u32 tile = i < before ? i : oldest + i - before;
        u32 frame = call.pages[segment.first_page + page_of_tile(segment, tile)];
        fold_tile<dtype, R>(block, room, find_head<dtype>(call.view, block.head_dim, frame, block.kv_head), tile * PAGE,
                            out);
    }
    float* partial = nullptr;
    if (task.partial != WHOLE)
        partial =
            call.partials + (u64(task.partial) * block.num_kv_heads + block.kv_head) * ROWS * (2 + block.head_dim);
    write_rows<R>(block, room, out, partial, call.out);
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
    Block block = {num_heads,     num_kv_heads,   head_dim,  num_heads / num_kv_heads,
                   blockIdx.y,    task.first_row, task.rows, segment.first_row,
                   segment.start, widest,         sinks,     scale};
    if (sinks > 0 && call.cos) room.sink_queries = room.queries + ROWS * head_dim;
    if (task.rows == 1) attend_rows<dtype, 1>(call, segment, task, block, room);
    else if (task.rows <= 4) attend_rows<dtype, 4>(call, segment, task, block, room);
    else attend_rows<dtype, 16>(call, segment, task, block, room);
}

// Attention of the rows of a task over its tiles.
//
// Grid: (tasks, kv heads). Reads every page of a task once: 2 * 64 * head_dim * size bytes a tile and head; 4 * rows *
// head_dim operations per key. Decoding is bound by those bytes while a group has few heads: expect 60 to 80 % of the
// memory's bandwidth. Prompts are bound by multiply-adds in f32.
KERNEL BOUNDS(128, 3)
    attend_f32(u8* resident, u32 num_resident, u8* streamed, u64 frame_stride, u32 note_bytes, const Segment* segments,
               const u32* pages, const AttentionTask* tasks, const float* qkv, u32 num_heads, u32 num_kv_heads,
               u32 head_dim, u32 window, float scale, const float* sink_cos, const float* sink_sin, u32 rotary_dim,
               float* partials, float* out) {
    ROOM();
    View view = {resident, num_resident, streamed, frame_stride, note_bytes};
    Call call = {view, segments, pages, qkv, sink_cos, sink_sin, rotary_dim, partials, out};
    attend<F32>(call, tasks, num_heads, num_kv_heads, head_dim, window, scale, room);
}

KERNEL BOUNDS(128, 3)
    attend_bf16(u8* resident, u32 num_resident, u8* streamed, u64 frame_stride, u32 note_bytes, const Segment* segments,
                const u32* pages, const AttentionTask* tasks, const float* qkv, u32 num_heads, u32 num_kv_heads,
                u32 head_dim, u32 window, float scale, const float* sink_cos, const float* sink_sin, u32 rotary_dim,
                float* partials, float* out) {
    ROOM();
    View view = {resident, num_resident, streamed, frame_stride, note_bytes};
    Call call = {view, segments, pages, qkv, sink_cos, sink_sin, rotary_dim, partials, out};
    attend<BF16>(call, tasks, num_heads, num_kv_heads, head_dim, window, scale, room);
}

KERNEL BOUNDS(128, 3)
    attend_f16(u8* resident, u32 num_resident, u8* streamed, u64 frame_stride, u32 note_bytes, const Segment* segments,
               const u32* pages, const AttentionTask* tasks, const float* qkv, u32 num_heads, u32 num_kv_heads,
               u32 head_dim, u32 window, float scale, const float* sink_cos, const float* sink_sin, u32 rotary_dim,
               float* partials, float* out) {
    ROOM();
    View view = {resident, num_resident, streamed, frame_stride, note_bytes};
    Call call = {view, segments, pages, qkv, sink_cos, sink_sin, rotary_dim, partials, out};
    attend<F16>(call, tasks, num_heads, num_kv_heads, head_dim, window, scale, room);
}

KERNEL BOUNDS(128, 3)
    attend_int8(u8* resident, u32 num_resident, u8* streamed, u64 frame_stride, u32 note_bytes, const Segment* segments,
                const u32* pages, const AttentionTask* tasks, const float* qkv, u32 num_heads, u32 num_kv_heads,
                u32 head_dim, u32 window, float scale, const float* sink_cos, const float* sink_sin, u32 rotary_dim,
                float* partials, float* out) {
    ROOM();
    View view = {resident, num_resident, streamed, frame_stride, note_bytes};
    Call call = {view, segments, pages, qkv, sink_cos, sink_sin, rotary_dim, partials, out};
    attend<INT8>(call, tasks, num_heads, num_kv_heads, head_dim, window, scale, room);
}

KERNEL BOUNDS(128, 3)
    attend_int4(u8* resident, u32 num_resident, u8* streamed, u64 frame_stride, u32 note_bytes, const Segment* segments,
                const u32* pages, const AttentionTask* tasks, const float* qkv, u32 num_heads, u32 num_kv_heads,
                u32 head_dim, u32 window, float scale, const float* sink_cos, const float* sink_sin, u32 rotary_dim,
                float* partials, float* out) {
    ROOM();
    View view = {resident, num_resident, streamed, frame_stride, note_bytes};
    Call call = {view, segments, pages, qkv, sink_cos, sink_sin, rotary_dim, partials, out};
    attend<INT4>(call, tasks, num_heads, num_kv_heads, head_dim, window, scale, room);
}

// Folds partials in the order of their tiles, and divides by the sums. Grid: (tasks, kv heads). Reads each partial
// once.
KERNEL BOUNDS(128) fold_partials(const Segment* segments, const FoldTask* tasks, u32 num_heads, u32 num_kv_heads,
                                 u32 head_dim, const float* partials, float* out) {
    FoldTask task = tasks[blockIdx.x];
    const Segment& segment = segments[task.segment];
    Block block = {num_heads,     num_kv_heads,   head_dim,  num_heads / num_kv_heads,
                   blockIdx.y,    task.first_row, task.rows, segment.first_row,
                   segment.start, WHOLE,          0,         1.0f};
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

// Keys that an eviction takes at most: those of a stretch.
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
    u32 evicted = position < segment.prompt_len ? position / PAGE * PAGE : position;
    return least(evicted, segment.first + segment.recent) + position - evicted;
}

// Where the stretch that a position belongs to ends: what follows is computed after an eviction.
DEVICE u32 stretch_end(const Segment& segment, u32 position) {
    if (position >= segment.prompt_len) return position + 1;
    return least((position / PAGE + 1) * PAGE, segment.prompt_len);
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
    float out[R][2];
    UNROLL
    for (u32 row = 0; row < R; row++) out[row][0] = out[row][1] = 0.0f;
    load_queries<R>(block, room, call.qkv, nullptr, nullptr, 0);
    u32 last = block.position + (block.first_row + block.rows - 1) / block.group;
    for (u32 start = 0; start <= last; start += PAGE) fold_tile<dtype, R>(block, room, cache.head(start), start, out);
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
    for (u32 position = segment.start; position < end;) {
        u32 taken = taken_slots(segment, position), whole = stretch_end(segment, position), stop = least(whole, end);
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
                           pass_row,  taken,        WHOLE,    0,     scale};
            if (block.rows <= 4) heavy_rows<dtype, 4>(call, cache, block, room);
            else heavy_rows<dtype, 16>(call, cache, block, room);
        }
        u32 count = taken + stop - position;
        if (stop == whole && count > capacity)
            evict(cache, count, capacity, stop - least(segment.recent, stop), reduction, lists, lists + VICTIMS,
                  lists + 2 * VICTIMS);
        position = stop;
    }
}

// Segments that evict by attention: for each stretch of positions its keys are stored in the next free slots, its
// queries attend, every key adds up what it receives, and what is too much is evicted.
//
// Grid: (such segments, kv heads); a block goes through a head of a segment alone, because every stretch needs what the
// one before left. Reads the keys of a tile twice and the values once per 16 rows. Decoding with some hundred sequences
// times heads fills the card: expect 40 % of the memory's bandwidth; a long prompt of few sequences does not.
KERNEL BOUNDS(128, 3) attend_heavy_f32(u8* resident, u32 num_resident, u8* streamed, u64 frame_stride, u32 note_bytes,
                                       const Segment* segments, const u32* pages, const u32* heavy, const float* qkv,
                                       u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale, float* out) {
    ROOM();
    SHARED(u64, reduction, WARPS);
    SHARED(u32, lists, 3 * VICTIMS);
    View view = {resident, num_resident, streamed, frame_stride, note_bytes};
    Call call = {view, segments, pages, qkv, nullptr, nullptr, 0, nullptr, out};
    attend_heavy<F32>(call, segments[heavy[blockIdx.x]], num_heads, num_kv_heads, head_dim, scale, room, reduction,
                      lists);
}

KERNEL BOUNDS(128, 3) attend_heavy_bf16(u8* resident, u32 num_resident, u8* streamed, u64 frame_stride, u32 note_bytes,
                                        const Segment* segments, const u32* pages, const u32* heavy, const float* qkv,
                                        u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale, float* out) {
    ROOM();
    SHARED(u64, reduction, WARPS);
    SHARED(u32, lists, 3 * VICTIMS);
    View view = {resident, num_resident, streamed, frame_stride, note_bytes};
    Call call = {view, segments, pages, qkv, nullptr, nullptr, 0, nullptr, out};
    attend_heavy<BF16>(call, segments[heavy[blockIdx.x]], num_heads, num_kv_heads, head_dim, scale, room, reduction,
                       lists);
}

KERNEL BOUNDS(128, 3) attend_heavy_f16(u8* resident, u32 num_resident, u8* streamed, u64 frame_stride, u32 note_bytes,
                                       const Segment* segments, const u32* pages, const u32* heavy, const float* qkv,
                                       u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale, float* out) {
    ROOM();
    SHARED(u64, reduction, WARPS);
    SHARED(u32, lists, 3 * VICTIMS);
    View view = {resident, num_resident, streamed, frame_stride, note_bytes};
    Call call = {view, segments, pages, qkv, nullptr, nullptr, 0, nullptr, out};
    attend_heavy<F16>(call, segments[heavy[blockIdx.x]], num_heads, num_kv_heads, head_dim, scale, room, reduction,
                      lists);
}

KERNEL BOUNDS(128, 3) attend_heavy_int8(u8* resident, u32 num_resident, u8* streamed, u64 frame_stride, u32 note_bytes,
                                        const Segment* segments, const u32* pages, const u32* heavy, const float* qkv,
                                        u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale, float* out) {
    ROOM();
    SHARED(u64, reduction, WARPS);
    SHARED(u32, lists, 3 * VICTIMS);
    View view = {resident, num_resident, streamed, frame_stride, note_bytes};
    Call call = {view, segments, pages, qkv, nullptr, nullptr, 0, nullptr, out};
    attend_heavy<INT8>(call, segments[heavy[blockIdx.x]], num_heads, num_kv_heads, head_dim, scale, room, reduction,
                       lists);
}

KERNEL BOUNDS(128, 3) attend_heavy_int4(u8* resident, u32 num_resident, u8* streamed, u64 frame_stride, u32 note_bytes,
                                        const Segment* segments, const u32* pages, const u32* heavy, const float* qkv,
                                        u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale, float* out) {
    ROOM();
    SHARED(u64, reduction, WARPS);
    SHARED(u32, lists, 3 * VICTIMS);
    View view = {resident, num_resident, streamed, frame_stride, note_bytes};
    Call call = {view, segments, pages, qkv, nullptr, nullptr, 0, nullptr, out};
    attend_heavy<INT4>(call, segments[heavy[blockIdx.x]], num_heads, num_kv_heads, head_dim, scale, room, reduction,
                       lists);
}
