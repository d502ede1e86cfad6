// Keys and values into pages.

// Stores the keys and values of a pass's rows where their positions belong; not of segments that evict by attention.
//
// Grid: (rows, kv heads); one warp takes the key, one the value. Reads 8 * head_dim bytes a row and head and writes
// what they become, in pieces of an element: neighbouring rows fill the sectors in the second-level cache. Small beside
// the products.
template <u32 dtype>
DEVICE void append(const View& view, const Segment* segments, const u32* pages, const u32* row_segments,
                   const float* qkv, u32 num_heads, u32 num_kv_heads, u32 head_dim) {
    u32 row = blockIdx.x, head = blockIdx.y;
    const Segment& segment = segments[row_segments[row]];
    if (segment.kept == KEPT_HEAVY) return;
    u32 position = segment.start + row - segment.first_row;
    u32 frame = pages[segment.first_page + page_of_tile(segment, position / PAGE)];
    bool keys = threadIdx.x < WARP;
    u64 first = u64(row) * (num_heads + 2 * num_kv_heads) + num_heads + (keys ? 0 : num_kv_heads) + head;
    store_vector<dtype>(find_head<dtype>(view, head_dim, frame, head), head_dim, keys, position % PAGE,
                        qkv + first * head_dim);
}

KERNEL BOUNDS(64) append_kv(u8* resident, u32 num_resident, u8* streamed, u64 frame_stride, u32 note_bytes, u32 dtype,
                            const Segment* segments, const u32* pages, const u32* row_segments, const float* qkv,
                            u32 num_heads, u32 num_kv_heads, u32 head_dim) {
    View view = {resident, num_resident, streamed, frame_stride, note_bytes};
    switch (dtype) {
    case F32: return append<F32>(view, segments, pages, row_segments, qkv, num_heads, num_kv_heads, head_dim);
    case BF16: return append<BF16>(view, segments, pages, row_segments, qkv, num_heads, num_kv_heads, head_dim);
    case F16: return append<F16>(view, segments, pages, row_segments, qkv, num_heads, num_kv_heads, head_dim);
    case INT8: return append<INT8>(view, segments, pages, row_segments, qkv, num_heads, num_kv_heads, head_dim);
    default: return append<INT4>(view, segments, pages, row_segments, qkv, num_heads, num_kv_heads, head_dim);
    }
}
