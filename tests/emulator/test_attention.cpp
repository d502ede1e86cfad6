// Kernels that store, attend, score and evict, against plain definitions over the pages that they leave.

#include <algorithm>

#include "tests.h"

namespace {

struct Segment {
    u32 first_row, len, start, first_page, num_pages, kept, first, recent, prompt_len, stretch, unused[2];
};
struct AttentionTask {
    u32 segment, first_row, rows, first_tile, num_tiles, partial;
};
struct FoldTask {
    u32 segment, first_row, rows, first_partial, num_partials;
};

enum { ALL, WINDOW, HEAVY };
constexpr u32 WHOLE = 0xffffffffu;

u32 ceil_div(u32 a, u32 b) { return (a + b - 1) / b; }

// The layout of a head of a frame, as src/kv/layout.rs defines it.
struct Layout {
    u32 dtype, dim, note_bytes;

    u32 codes() const { return dtype == INT4 ? 8 : 4; }
    bool integers() const { return dtype == INT8 || dtype == INT4; }
    u32 padded() const { return ceil_div(dim, 16) * 16; }
    size_t key_bytes() const {
        return integers() ? 256 * ceil_div(dim, codes()) + 256 : size_t(64) * dim * element_size(dtype);
    }
    size_t value_bytes() const {
        return integers() ? padded() * 4 * (64 / codes()) + 256 : size_t(64) * padded() * element_size(dtype);
    }
    size_t head_bytes() const { return key_bytes() + value_bytes() + note_bytes; }

    // The key or value in a slot.
    std::vector<float> read(const u8* head, bool key, u32 slot) const {
        const u8* part = key ? head : head + key_bytes();
        std::vector<float> x(dim);
        for (u32 d = 0; d < dim; d++) {
            if (integers()) {
                u32 word = key ? (slot / 16 * ceil_div(dim, codes()) + d / codes()) * 16 + slot % 16
                               : (d / 16 * (64 / codes()) + slot / codes()) * 16 + d % 16;
                u32 within = key ? d % codes() : slot % codes(), bits, count = 32 / codes();
                std::memcpy(&bits, part + 4 * word, 4);
                u16 grid[2];
                const u8* grids = part + (key ? key_bytes() : value_bytes()) - 256;
                std::memcpy(&grid[0], grids + 2 * slot, 2);
                std::memcpy(&grid[1], grids + 128 + 2 * slot, 2);
                x[d] = std::fma(float(bits >> count * within & ((1u << count) - 1)), half_value(grid[0]),
                                half_value(grid[1]));
            } else {
                u32 element = key ? (slot / 16 * dim + d) * 16 + slot % 16 : (d / 16 * 64 + slot) * 16 + d % 16;
                x[d] = get_element(part + element * element_size(dtype), dtype);
            }
        }
        return x;
    }

    // What a key or value becomes by being stored.
    std::vector<float> rounded(const float* x) const {
        std::vector<float> y(x, x + dim);
        if (!integers()) {
            for (float& value : y) {
                u8 bytes[4];
                put_element(bytes, dtype, value);
                value = get_element(bytes, dtype);
            }
            return y;
        }
        float most = dtype == INT4 ? 15.0f : 255.0f, low = *std::min_element(x, x + dim),
              high = *std::max_element(x, x + dim);
        if (!std::all_of(x, x + dim, [](float v) { return std::isfinite(v); })) return std::vector<float>(dim, NAN);
        float scale = saturated_half((high - low) / most), offset = saturated_half(low);
        float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        for (float& value : y)
            value =
                std::fma(std::nearbyintf(std::fmin(std::fmax((value - offset) * inverse, 0.0f), most)), scale, offset);
        return y;
    }
};

struct Shape {
    u32 num_heads, num_kv_heads, dim;
    u32 group() const { return num_heads / num_kv_heads; }
    u32 width() const { return (num_heads + 2 * num_kv_heads) * dim; }
};

// A sequence: its pages, and what each KV head has of it.
struct Slot {
    u32 position;
    double score;
    std::vector<float> key, value;
};
struct Sequence {
    u32 kept, first, recent, prompt_len, stretch;
    std::vector<u32> frames;
    u32 len = 0;
    std::vector<std::vector<Slot>> slots;  // by KV head, all that were ever stored (or, of HEAVY, what is left)

    u32 page(u32 tile) const {
        if (kept != WINDOW) return tile;
        u32 before = ceil_div(first, 64), ring = ceil_div(recent - 1, 64) + 1;
        return tile < before ? tile : before + (tile - before) % ring;
    }
    u32 pages(u32 positions) const {
        u32 most = kept == ALL      ? WHOLE
                   : kept == WINDOW ? ceil_div(first, 64) + ceil_div(recent - 1, 64) + 1
                                    : ceil_div(first + recent + stretch, 64);
        return std::min(ceil_div(positions, 64), most);
    }
    // The first position that a segment from `len` on may not reach.
    u32 reach() const {
        if (kept != WINDOW) return WHOLE;
        u32 oldest = len + 1 > recent ? len + 1 - recent : 0;
        return (std::max(oldest / 64, ceil_div(first, 64)) + ceil_div(recent - 1, 64) + 1) * 64;
    }
};

// Frames on the device, some of them in a second place.
struct Frames {
    Layout layout;
    u32 num_kv_heads, resident, streamed;
    size_t stride;
    u8 *first = nullptr, *second = nullptr;

    Frames(Device& device, Layout layout, u32 num_kv_heads, u32 resident, u32 streamed)
        : layout(layout),
          num_kv_heads(num_kv_heads),
          resident(resident),
          streamed(streamed),
          stride((layout.head_bytes() * num_kv_heads + 63) / 64 * 64) {
        first = device.room<u8>(resident * stride);
        second = device.room<u8>(streamed * stride);
    }
    std::vector<u8> read(Device& device) const {
        auto all = device.download(first, resident * stride), more = device.download(second, streamed * stride);
        all.insert(all.end(), more.begin(), more.end());
        return all;
    }
};

struct Pass {
    std::vector<Segment> segments;
    std::vector<u32> pages, row_segments, heavy;
    std::vector<float> qkv;
    u32 rows = 0;
};

// The next tokens of every sequence.
Pass compose(Random& random, const Shape& shape, std::vector<Sequence>& sequences, const std::vector<u32>& lens) {
    Pass pass;
    for (u32 i = 0; i < sequences.size(); i++) {
        Sequence& s = sequences[i];
        u32 len = std::min(lens[i], s.reach() - s.len);
        pass.segments.push_back({pass.rows,
                                 len,
                                 s.len,
                                 u32(pass.pages.size()),
                                 s.pages(s.len + len),
                                 s.kept,
                                 s.first,
                                 s.recent,
                                 s.prompt_len,
                                 s.stretch,
                                 {}});
        for (u32 page = 0; page < s.pages(s.len + len); page++) pass.pages.push_back(s.frames[page]);
        pass.row_segments.insert(pass.row_segments.end(), len, i);
        if (s.kept == HEAVY) pass.heavy.push_back(i);
        pass.rows += len;
    }
    pass.qkv = random.normal_values(pass.rows * shape.width());
    return pass;
}

const float* key_of(const Shape& shape, const Pass& pass, u32 row, u32 head, bool key) {
    return &pass.qkv[row * shape.width() + (shape.num_heads + (key ? 0 : shape.num_kv_heads) + head) * shape.dim];
}

double dot(const float* a, const std::vector<float>& b) {
    double sum = 0.0;
    for (size_t i = 0; i < b.size(); i++) sum += double(a[i]) * b[i];
    return sum;
}

// Softmax over scores.
void softmax(std::vector<double>& scores) {
    double max = *std::max_element(scores.begin(), scores.end()), sum = 0.0;
    for (double& s : scores) sum += s = std::exp(s - max);
    for (double& s : scores) s /= sum;
}

// Attention of a segment that evicts, for one KV head; the rule of src/device/host/evict.rs.
void heavy_reference(const Shape& shape, const Layout& layout, const Pass& pass, const Segment& segment, u32 head,
                     float scale, std::vector<Slot>& slots, std::vector<float>& out) {
    u32 end = segment.start + segment.len, capacity = segment.first + segment.recent;
    for (u32 position = segment.start; position < end;) {
        u32 stretch = segment.stretch, whole = std::min((position / stretch + 1) * stretch, segment.prompt_len);
        if (position >= segment.prompt_len) whole = position + 1;
        u32 stop = std::min(whole, end), taken = u32(slots.size());
        for (u32 p = position; p < stop; p++) {
            u32 row = segment.first_row + p - segment.start;
            slots.push_back({p, 0.0, layout.rounded(key_of(shape, pass, row, head, true)),
                             layout.rounded(key_of(shape, pass, row, head, false))});
        }
        for (u32 p = position; p < stop; p++) {
            u32 row = segment.first_row + p - segment.start, seen = taken + p - position + 1;
            for (u32 g = 0; g < shape.group(); g++) {
                u32 query = head * shape.group() + g;
                std::vector<double> scores(seen);
                for (u32 k = 0; k < seen; k++)
                    scores[k] = scale * dot(&pass.qkv[row * shape.width() + query * shape.dim], slots[k].key);
                softmax(scores);
                for (u32 d = 0; d < shape.dim; d++) {
                    double sum = 0.0;
                    for (u32 k = 0; k < seen; k++) sum += scores[k] * slots[k].value[d];
                    out[(row * shape.num_heads + query) * shape.dim + d] = float(sum);
                }
                for (u32 k = 0; k < seen; k++) slots[k].score += scores[k];
            }
        }
        while (stop == whole && slots.size() > capacity) {
            u32 left = std::max(capacity, u32(slots.size()) - std::min(64u, u32(slots.size())));
            u32 latest = stop - std::min(segment.recent, stop);
            std::vector<u32> older;
            for (u32 k = 0; k < slots.size(); k++)
                if (slots[k].position < latest) older.push_back(k);
            std::sort(older.begin(), older.end(), [&](u32 a, u32 b) {
                return slots[a].score != slots[b].score ? slots[a].score < slots[b].score
                                                        : slots[a].position < slots[b].position;
            });
            older.resize(slots.size() - left);
            std::sort(older.begin(), older.end());
            auto gone = [&](u32 k) { return std::binary_search(older.begin(), older.end(), k); };
            std::vector<u32> moves;
            for (u32 k = left; k < slots.size(); k++)
                if (!gone(k)) moves.push_back(k);
            for (u32 i = 0; i < moves.size(); i++) slots[older[i]] = slots[moves[i]];
            slots.resize(left);
        }
        position = stop;
    }
}

struct Case {
    u32 dtype;
    Shape shape;
    u32 window;
    bool rotated;
};

// One pass through append_kv, attend, fold_partials and attend_heavy; compares outputs, and what lies in the pages.
void run_pass(Device& device, Random& random, const Case& c, Frames& frames, std::vector<Sequence>& sequences,
              const std::vector<u32>& lens) {
    const Shape& shape = c.shape;
    Pass pass = compose(random, shape, sequences, lens);
    const float scale = 0.7f / std::sqrt(float(shape.dim));
    u32 half = c.rotated ? std::max(shape.dim / 4, 1u) : 0;
    std::vector<float> cos, sin;
    for (u32 i = 0; i < pass.rows * half; i++) {
        float angle = random.normal();
        cos.push_back(std::cos(angle));
        sin.push_back(std::sin(angle));
    }
    std::vector<float> wanted(pass.rows * shape.num_heads * shape.dim);
    std::vector<AttentionTask> tasks, tensor_tasks;
    std::vector<FoldTask> folds;
    bool tensor = (c.dtype == F16 || c.dtype == BF16) && (shape.dim == 64 || shape.dim == 96 || shape.dim == 128);
    std::vector<bool> by_tensor(pass.rows);
    u32 partials = 0;
    for (u32 i = 0; i < sequences.size(); i++) {
        Sequence& s = sequences[i];
        const Segment& segment = pass.segments[i];
        s.slots.resize(shape.num_kv_heads);
        if (s.kept == HEAVY) {
            for (u32 head = 0; head < shape.num_kv_heads; head++)
                heavy_reference(shape, frames.layout, pass, segment, head, scale, s.slots[head], wanted);
            continue;
        }
        u32 window = c.window ? c.window : WHOLE, sinks = 0;
        if (s.kept == WINDOW) {
            if (window >= s.first + s.recent) sinks = s.first;
            window = std::min(window, s.recent);
        }
        for (u32 head = 0; head < shape.num_kv_heads; head++)
            for (u32 n = 0; n < segment.len; n++)
                s.slots[head].push_back(
                    {segment.start + n, 0.0,
                     frames.layout.rounded(key_of(shape, pass, segment.first_row + n, head, true)),
                     frames.layout.rounded(key_of(shape, pass, segment.first_row + n, head, false))});
        for (u32 n = 0; n < segment.len; n++) {
            u32 position = segment.start + n, row = segment.first_row + n;
            for (u32 head = 0; head < shape.num_heads; head++) {
                auto& slots = s.slots[head / shape.group()];
                std::vector<float> query(&pass.qkv[row * shape.width() + head * shape.dim],
                                         &pass.qkv[row * shape.width() + (head + 1) * shape.dim]),
                    turned = query;
                for (u32 d = 0; d < half; d++) {
                    turned[d] = query[d] * cos[row * half + d] - query[d + half] * sin[row * half + d];
                    turned[d + half] = query[d + half] * cos[row * half + d] + query[d] * sin[row * half + d];
                }
                std::vector<u32> seen;
                std::vector<double> scores;
                for (u32 k = 0; k <= position; k++) {
                    if (k >= sinks && position - k >= window) continue;
                    seen.push_back(k);
                    scores.push_back(scale * dot((k < sinks ? turned : query).data(), slots[k].key));
                }
                softmax(scores);
                for (u32 d = 0; d < shape.dim; d++) {
                    double sum = 0.0;
                    for (u32 k = 0; k < seen.size(); k++) sum += scores[k] * slots[seen[k]].value[d];
                    wanted[(row * shape.num_heads + head) * shape.dim + d] = float(sum);
                }
            }
        }
        u32 rows = segment.len * shape.group();
        for (u32 first = 0; tensor && sinks == 0 && first < rows;) {
            u32 count = std::min(rows - first, 1 + random.below(64));
            u32 p0 = segment.start + first / shape.group(), p1 = segment.start + (first + count - 1) / shape.group();
            u32 oldest = (p0 + 1 > window ? p0 + 1 - window : 0) / 64;
            tensor_tasks.push_back({i, first, count, 0, p1 / 64 - oldest + 1, WHOLE});
            first += count;
        }
        std::fill_n(by_tensor.begin() + segment.first_row, segment.len, sinks == 0);
        for (u32 first = 0; first < rows;) {
            u32 count = std::min(rows - first, 1 + random.below(16));
            u32 p0 = segment.start + first / shape.group(), p1 = segment.start + (first + count - 1) / shape.group();
            u32 oldest = (p0 + 1 > window ? p0 + 1 - window : 0) / 64, before = std::min(ceil_div(sinks, 64), oldest);
            u32 tiles = before + p1 / 64 - oldest + 1;
            if (random.below(2)) {
                u32 first_partial = partials;
                for (u32 tile = 0; tile < tiles;) {
                    u32 some = std::min(tiles - tile, 1 + random.below(3));
                    tasks.push_back({i, first, count, tile, some, partials++});
                    tile += some;
                }
                folds.push_back({i, first, count, first_partial, partials - first_partial});
            } else {
                tasks.push_back({i, first, count, 0, tiles, WHOLE});
            }
            first += count;
        }
    }

    Segment* segments = device.upload(pass.segments);
    u32 *pages = device.upload(pass.pages), heads = shape.num_heads, kv_heads = shape.num_kv_heads, dim = shape.dim;
    float *qkv = device.upload(pass.qkv), *out = device.room<float>(wanted.size());
    float *cosines = device.upload(cos), *sines = device.upload(sin);
    std::string suffix = DTYPE_NAMES[c.dtype];
    u32 notes = frames.layout.note_bytes;
    device.launch("cache.cu", "append_kv", {pass.rows, kv_heads, 64, 0}, frames.first, frames.resident, frames.second,
                  u64(frames.stride), notes, c.dtype, segments, pages, device.upload(pass.row_segments), qkv, heads,
                  kv_heads, dim);
    if (!tasks.empty()) {
        float* room = partials ? device.room<float>(partials * kv_heads * 16 * (2 + dim)) : nullptr;
        device.launch("attention.cu", "attend_" + suffix,
                      {u32(tasks.size()), kv_heads, 128, 4 * 16 * dim * (c.rotated ? 2 : 1)}, frames.first,
                      frames.resident, frames.second, u64(frames.stride), notes, segments, pages, device.upload(tasks),
                      qkv, heads, kv_heads, dim, c.window, scale, cosines, sines, 2 * half, room, out);
        if (!folds.empty())
            device.launch("attention.cu", "fold_partials", {u32(folds.size()), kv_heads, 128, 0}, segments,
                          device.upload(folds), heads, kv_heads, dim, room, out);
    }
    if (!pass.heavy.empty())
        device.launch("attention.cu", "attend_heavy_" + suffix, {u32(pass.heavy.size()), kv_heads, 128, 4 * 16 * dim},
                      frames.first, frames.resident, frames.second, u64(frames.stride), notes, segments, pages,
                      device.upload(pass.heavy), qkv, heads, kv_heads, dim, scale, out);
    float* out_tensor = device.room<float>(wanted.size());
    if (!tensor_tasks.empty())
        device.launch("attention_tensor.cu", "attend_tensor_" + suffix + "_" + std::to_string(dim),
                      {u32(tensor_tasks.size()), kv_heads, 128, 0}, frames.first, frames.resident, frames.second,
                      u64(frames.stride), notes, segments, pages, device.upload(tensor_tasks), qkv, heads, kv_heads,
                      c.window, scale, out_tensor);
    std::string what = "attention over " + suffix + " with heads of " + std::to_string(dim);
    near(device.download(out, wanted.size()), wanted, 3e-6, what);
    if (!tensor_tasks.empty()) {
        auto got = device.download(out_tensor, wanted.size());
        // Rows that others compute hold poison.
        for (size_t i = 0; i < got.size(); i++)
            if (!by_tensor[i / (heads * dim)]) got[i] = wanted[i];
        near(got, wanted, c.dtype == F16 ? 1e-3 : 8e-3, what + " on tensor cores");
    }

    auto bytes = frames.read(device);
    for (Sequence& s : sequences) {
        s.len += pass.segments[&s - sequences.data()].len;
        for (u32 head = 0; head < kv_heads; head++) {
            auto& slots = s.slots[head];
            for (u32 k = 0; k < slots.size(); k++) {
                // Of a window only the positions that nothing was stored over.
                if (s.kept == WINDOW && k >= s.first && k + s.recent < s.len) continue;
                const u8* at = &bytes[s.frames[s.page(k / 64)] * frames.stride + head * frames.layout.head_bytes()];
                auto key = frames.layout.read(at, true, k % 64), value = frames.layout.read(at, false, k % 64);
                check(key == slots[k].key && value == slots[k].value, (what + ": a page holds something else").c_str());
                if (s.kept != HEAVY) continue;
                u32 position;
                float score;
                const u8* note = at + frames.layout.key_bytes() + frames.layout.value_bytes();
                std::memcpy(&position, note + 4 * (k % 64), 4);
                std::memcpy(&score, note + 256 + 4 * (k % 64), 4);
                check(position == slots[k].position, (what + ": other keys were evicted").c_str());
                check(std::fabs(score - slots[k].score) <= 1e-5 * (1.0 + slots[k].score), (what + ": scores").c_str());
            }
        }
    }
}

void sequences_of(Device& device, Random& random, const Case& c, bool heavy) {
    u32 note_bytes = heavy ? (random.below(2) ? 512 : 528) : 0;
    Frames frames(device, {c.dtype, c.shape.dim, note_bytes}, c.shape.num_kv_heads, 12, 14);
    std::vector<u32> free;
    for (u32 i = 0; i < 26; i++) free.push_back(i);
    auto take = [&](u32 count) {
        std::vector<u32> taken;
        for (u32 i = 0; i < count; i++) {
            u32 which = random.below(u32(free.size()));
            taken.push_back(free[which]);
            free.erase(free.begin() + which);
        }
        return taken;
    };
    std::vector<Sequence> sequences;
    auto add = [&](u32 kept, u32 first, u32 recent, u32 prompt_len, u32 pages, u32 stretch = 64) {
        Sequence s{kept, first, recent, prompt_len, stretch, take(pages), 0, {}};
        sequences.push_back(s);
    };
    if (heavy) {
        add(HEAVY, 20, 13, 100 + random.below(60), 2);
        add(HEAVY, 70, 30, 130, 3);
        add(HEAVY, 15, 10, 150 + random.below(60), 4, random.below(2) ? 128 : 1 << 24);
        add(ALL, 0, 0, 0, 4);
    } else {
        add(ALL, 0, 0, 0, 5);
        add(WINDOW, 4, 60, 0, 3);
        add(WINDOW, 70, 100, 0, 5);
        add(ALL, 0, 0, 0, 5);
    }
    for (u32 pass = 0; pass < 5; pass++) {
        std::vector<u32> lens;
        for (size_t i = 0; i < sequences.size(); i++) lens.push_back(pass % 2 ? 1 : 1 + random.below(i == 0 ? 90 : 70));
        run_pass(device, random, c, frames, sequences, lens);
    }
    device.clear();
}

// What is not finite, or too great, as it is stored.
void strange_values(Device& device, Random& random, u32 dtype) {
    const Shape shape = {1, 1, 37};
    Frames frames(device, {dtype, shape.dim, 0}, 1, 1, 1);
    std::vector<Sequence> sequences = {{ALL, 0, 0, 0, 64, {1}, 0, {}}};
    Pass pass = compose(random, shape, sequences, {6});
    auto row = [&](u32 i) { return pass.qkv.begin() + i * shape.width() + shape.dim; };
    *row(0) = 3e5f;
    std::fill(row(1), row(2) - shape.dim, -0.75f);
    std::for_each(row(2), row(3) - shape.dim, [](float& x) { x *= 1e-41f; });
    *row(3) = NAN;
    *row(4) = INFINITY;
    device.launch("cache.cu", "append_kv", {6, 1, 64, 0}, frames.first, 1u, frames.second, u64(frames.stride), 0u,
                  dtype, device.upload(pass.segments), device.upload(pass.pages), device.upload(pass.row_segments),
                  device.upload(pass.qkv), 1u, 1u, shape.dim);
    auto bytes = frames.read(device);
    for (u32 slot = 0; slot < 6; slot++) {
        for (bool key : {true, false}) {
            auto got = frames.layout.read(&bytes[frames.stride], key, slot);
            auto wanted = frames.layout.rounded(key_of(shape, pass, slot, 0, key));
            for (u32 d = 0; d < shape.dim; d++)
                check(got[d] == wanted[d] || (std::isnan(got[d]) && std::isnan(wanted[d])),
                      "append_kv of strange values");
        }
    }
    device.clear();
}

}  // namespace

void test_attention(Device& device, Random& random) {
    const Shape shapes[] = {{4, 4, 16}, {5, 1, 20}, {4, 2, 64}, {6, 2, 130}, {17, 1, 36}};
    for (u32 dtype = F32; dtype <= INT4; dtype++) {
        strange_values(device, random, dtype);
        const Shape& shape = shapes[random.below(5)];
        sequences_of(device, random, {dtype, shape, random.below(2) ? 0 : 50 + random.below(200), random.below(2) == 0},
                     false);
        sequences_of(device, random, {dtype, shapes[random.below(5)], 0, false}, true);
    }
    sequences_of(device, random, {F16, {2, 1, 256}, 0, true}, false);
    for (u32 dtype : {BF16, F16})
        for (u32 dim : {64u, 96u, 128u})
            sequences_of(device, random, {dtype, {3, 1, dim}, dim == 96 ? 70u : 0, false}, false);
}
