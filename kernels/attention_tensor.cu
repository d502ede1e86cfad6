// Attention of prompts on tensor cores, over pages of f16 and bf16; what attention.cu says of tiles and folds holds.
//
// A block takes up to 64 rows of a KV head (queries times query heads of the group), 16 to a warp. The keys of a tile
// come into shared memory while the values of the one before are used, and the other way round. Queries are rounded to
// the pages' type, once, and so are probabilities; sums are f32.
//
// A page's keys are (4 groups, head_dim, 16 positions) and its values (head_dim / 16 groups, 64 positions, 16
// dimensions): both are lines of 16 elements whose second operand's inner dimension runs from line to line, so that
// ldmatrix with .trans gives the fragments. Lines are swizzled: the halves of a line change places in every second four
// lines, and eight lines meet no bank twice.

constexpr u32 THREADS = 128;

struct AttentionTask {
    u32 segment, first_row, rows;
    u32 first_tile, num_tiles;
    u32 partial;
};

// A tile's keys or values into shared memory: `lines` of 32 bytes.
DEVICE void fetch(u8* to, const u8* from, u32 lines) {
    for (u32 i = threadIdx.x; i < 2 * lines; i += THREADS) {
        u32 line = i / 2, half = i % 2 ^ (line / 4 & 1);
        copy_async(to + line * 32 + half * 16, from + i * 16);
    }
    copy_async_commit();
}

// Where half `half` of a line lies.
DEVICE const u8* line_at(const u8* lines, u32 line, u32 half) {
    return lines + line * 32 + (half ^ (line / 4 & 1)) * 16;
}

// Fragments of the second operand for 16 lines from `first` on, by 16 elements: two for elements 0 to 7, two for the
// others.
DEVICE void load_fragments(const u8* lines, u32 first, u32* fragments) {
    u32 lane = threadIdx.x % WARP;
    load_matrices_transposed(line_at(lines, first + lane % 16, lane / 16), fragments);
}

// The keys k that a row sees: first <= k <= last.
struct Visible {
    u32 first, last;
};

// DIM is head_dim, a multiple of 16.
template <u32 dtype, u32 DIM>
DEVICE void attend(const View& view, const Segment& segment, const u32* pages, const AttentionTask& task,
                   const float* qkv, u32 num_heads, u32 num_kv_heads, u32 window, float scale, u8* keys, u8* values,
                   float* out) {
    constexpr u32 STEPS = DIM / 16;
    u32 group = num_heads / num_kv_heads, kv_head = blockIdx.y, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u32 quad = lane % 4;
    // The thread's rows: one, and the eighth after it.
    u32 rows[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
    Visible sight[2];
    u32 queries[STEPS][4];
    UNROLL
    for (u32 i = 0; i < 2; i++) {
        u32 flat = task.first_row + least(rows[i], task.rows - 1), position = segment.start + flat / group;
        sight[i] = {position + 1 > window ? position + 1 - window : 0, position};
        u64 row =
            u64(segment.first_row + flat / group) * (num_heads + 2 * num_kv_heads) + kv_head * group + flat % group;
        const float* from = qkv + row * DIM;
        UNROLL
        for (u32 step = 0; step < STEPS; step++) {
            UNROLL
            for (u32 half = 0; half < 2; half++) {
                u32 dim = step * 16 + half * 8 + quad * 2;
                queries[step][half * 2 + i] = pack<dtype>(from[dim], from[dim + 1]);
            }
        }
    }
    u32 first = segment.start + task.first_row / group, last = segment.start + (task.first_row + task.rows - 1) / group;
    u32 oldest = (first + 1 > window ? first + 1 - window : 0) / PAGE;
    auto head = [&](u32 i) {
        u32 frame = pages[segment.first_page + page_of_tile(segment, oldest + i)];
        return find_head<dtype>(view, DIM, frame, kv_head);
    };
    u32 end = task.first_tile + task.num_tiles, key_bytes = Pages<dtype>::part_bytes(DIM, true);

    float outputs[DIM / 8][4], max[2] = {-infinite(), -infinite()}, sum[2] = {0.0f, 0.0f};
    UNROLL
    for (u32 n = 0; n < DIM / 8; n++) outputs[n][0] = outputs[n][1] = outputs[n][2] = outputs[n][3] = 0.0f;
    fetch(keys, head(task.first_tile), 4 * DIM);
    fetch(values, head(task.first_tile) + key_bytes, 4 * DIM);
    UNROLL_NOT
    for (u32 i = task.first_tile; i < end; i++) {
        u32 start = (oldest + i) * PAGE;
        copy_async_wait<1>();
        sync_block();
        float scores[PAGE / 8][4];
        UNROLL
        for (u32 n = 0; n < PAGE / 8; n++) scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.0f;
        UNROLL
        for (u32 part = 0; part < 4; part++) {
            UNROLL
            for (u32 step = 0; step < STEPS; step++) {
                u32 b[4];
                load_fragments(keys, part * DIM + step * 16, b);
                multiply_matrices<dtype>(queries[step], b[0], b[1], scores[2 * part]);
                multiply_matrices<dtype>(queries[step], b[2], b[3], scores[2 * part + 1]);
            }
        }
        sync_block();
        // An empty group at the end keeps the number of groups in flight the same.
        if (i + 1 < end) fetch(keys, head(i + 1), 4 * DIM);
        else copy_async_commit();
        UNROLL
        for (u32 r = 0; r < 2; r++) {
            float tile_max = -infinite();
            UNROLL
            for (u32 n = 0; n < PAGE / 8; n++) {
                UNROLL
                for (u32 j = 0; j < 2; j++) {
                    u32 key = start + n * 8 + quad * 2 + j;
                    float& score = scores[n][2 * r + j];
                    score = key >= sight[r].first && key <= sight[r].last ? score * scale : -infinite();
                    tile_max = greatest(tile_max, score);
                }
            }
            tile_max = greatest(tile_max, shuffle_xor(tile_max, 1));
            tile_max = greatest(tile_max, shuffle_xor(tile_max, 2));
            float before = max[r], after = greatest(before, tile_max), tile_sum = 0.0f;
            // A row that has seen nothing counts for exactly nothing; exp clamps its argument.
            float old = before == -infinite() ? 0.0f : exp_f32(before - after);
            UNROLL
            for (u32 n = 0; n < PAGE / 8; n++) {
                UNROLL
                for (u32 j = 0; j < 2; j++) {
                    float& score = scores[n][2 * r + j];
                    score = score == -infinite() ? 0.0f : exp_f32(score - after);
                    tile_sum += score;
                }
            }
            tile_sum += shuffle_xor(tile_sum, 1);
            tile_sum += shuffle_xor(tile_sum, 2);
            sum[r] = fmaf(sum[r], old, tile_sum);
            max[r] = after;
            UNROLL
            for (u32 n = 0; n < DIM / 8; n++) {
                outputs[n][2 * r] *= old;
                outputs[n][2 * r + 1] *= old;
            }
        }
        copy_async_wait<1>();
        sync_block();
        // Slots past the last query's key may hold anything, even what is no number.
        if (start + PAGE > last + 1) {
            for (u32 line = threadIdx.x; line < 4 * DIM; line += THREADS) {
                if (start + line % PAGE <= last) continue;
                *reinterpret_cast<uint4*>(values + line * 32) = uint4{0, 0, 0, 0};
                *reinterpret_cast<uint4*>(values + line * 32 + 16) = uint4{0, 0, 0, 0};
            }
            sync_block();
        }
        UNROLL
        for (u32 part = 0; part < 4; part++) {
            u32 a[4];
            UNROLL
            for (u32 j = 0; j < 4; j++) {
                const float* pair = &scores[2 * part + j / 2][j % 2 * 2];
                a[j] = pack<dtype>(pair[0], pair[1]);
            }
            UNROLL
            for (u32 step = 0; step < STEPS; step++) {
                u32 b[4];
                load_fragments(values, step * PAGE + part * 16, b);
                multiply_matrices<dtype>(a, b[0], b[1], outputs[2 * step]);
                multiply_matrices<dtype>(a, b[2], b[3], outputs[2 * step + 1]);
            }
        }
        sync_block();
        if (i + 1 < end) fetch(values, head(i + 1) + key_bytes, 4 * DIM);
        else copy_async_commit();
    }
    copy_async_wait<0>();
    UNROLL
    for (u32 r = 0; r < 2; r++) {
        if (rows[r] >= task.rows) continue;
        u32 flat = task.first_row + rows[r];
        u64 row = u64(segment.first_row + flat / group) * num_heads + kv_head * group + flat % group;
        float *to = out + row * DIM, inverse = 1.0f / sum[r];
        UNROLL
        for (u32 n = 0; n < DIM / 8; n++) {
            to[n * 8 + quad * 2] = outputs[n][2 * r] * inverse;
            to[n * 8 + quad * 2 + 1] = outputs[n][2 * r + 1] * inverse;
        }
    }
}

// Attention of up to 64 rows of a task over all of its tiles.
//
// Grid: (tasks, kv heads). Reads a task's pages once, 4 * 64 * head_dim bytes a tile, and computes 4 * 64 * head_dim
// operations per row and tile in matrix instructions. Bound by those: expect 35 to 50 % of what mma.sync reaches.

#define ATTEND_TENSOR(name, dtype, dims)                                                                               \
    KERNEL BOUNDS(128, 2)                                                                                              \
        attend_tensor_##name##_##dims(u8* resident, u32 num_resident, u8* streamed, u64 frame_stride, u32 note_bytes,  \
                                      const Segment* segments, const u32* pages, const AttentionTask* tasks,           \
                                      const float* qkv, u32 num_heads, u32 num_kv_heads, u32 window, float scale,      \
                                      float* out) {                                                                    \
        SHARED(u8, keys, 128 * dims);                                                                                  \
        SHARED(u8, values, 128 * dims);                                                                                \
        View view = {resident, num_resident, streamed, frame_stride, note_bytes};                                      \
        AttentionTask task = tasks[blockIdx.x];                                                                        \
        attend<dtype, dims>(view, segments[task.segment], pages, task, qkv, num_heads, num_kv_heads,                   \
                            window ? window : 0xffffffffu, scale, keys, values, out);                                  \
    }
ATTEND_TENSOR(f16, F16, 64)
ATTEND_TENSOR(f16, F16, 96)
ATTEND_TENSOR(f16, F16, 128)
#if BFLOAT_MATRICES
ATTEND_TENSOR(bf16, BF16, 64)
ATTEND_TENSOR(bf16, BF16, 96)
ATTEND_TENSOR(bf16, BF16, 128)
#endif
