// What every kernel needs: types, conversions, and a wrapper for every intrinsic.
//
// A program is this text followed by one .cu file. It includes nothing, because NVRTC comes without the toolkit's
// headers: conversions and tensor-core instructions are inline PTX. Compiled with TIDEMILL_EMULATED, the wrappers that
// need a GPU are those of tests/emulator/shim.h.
//
// Shared memory is declared at the top of a kernel, outside of any branch: the emulator hands it out in this order.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned u32;
typedef unsigned long long u64;

// Element types, as README.md numbers them.
enum { F32 = 0, BF16 = 1, F16 = 2, INT8 = 3, INT4 = 4 };

// Positions of a page, which is also a tile of attention.
[[maybe_unused]] constexpr u32 PAGE = 64;
// Outputs of a panel, and inputs of a tile of one.
[[maybe_unused]] constexpr u32 PANEL = 16;
[[maybe_unused]] constexpr u32 TILE = 64;

[[maybe_unused]] constexpr u32 WARP = 32;
[[maybe_unused]] constexpr u32 WHOLE_WARP = 0xffffffffu;

struct Piece {
    const u8* data;
    u32 first_panel;
    u32 num_panels;
};

struct Segment {
    u32 first_row, len, start;
    u32 first_page, num_pages;
    u32 kept, first, recent, prompt_len, stretch;
    u32 unused[2];
};

enum { KEPT_ALL = 0, KEPT_WINDOW = 1, KEPT_HEAVY = 2 };

#ifndef TIDEMILL_EMULATED

#define DEVICE [[maybe_unused]] static __device__ __forceinline__
#define KERNEL extern "C" __global__ void
#define METHOD __device__ __forceinline__
// Threads of a block, and blocks that a processor should hold at least: without that number the compiler may prefer
// spilling to fewer blocks.
#define BOUNDS(...) __launch_bounds__(__VA_ARGS__)
#define UNROLL _Pragma("unroll")
#define UNROLL_NOT _Pragma("unroll 1")
#define UNROLL_TWO _Pragma("unroll 2")
#define UNROLL_FOUR _Pragma("unroll 4")
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define DYNAMIC_SHARED(type, name)                                         \
    extern __shared__ __align__(16) unsigned char dynamic_shared_memory[]; \
    type* const name = reinterpret_cast<type*>(dynamic_shared_memory)
#define ALIGNED(bytes) __align__(bytes)

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }

DEVICE u32 float_bits(float x) { return __float_as_uint(x); }
DEVICE float bits_float(u32 x) { return __uint_as_float(x); }

// A product that no sum is fused into.
DEVICE float multiply_rounded(float a, float b) { return __fmul_rn(a, b); }

DEVICE float f16_to_f32(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
// To the nearest, ties to even; beyond the range, infinite.
DEVICE u16 f32_to_f16(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// Two numbers in f16 at a time.
DEVICE u32 subtract_halves(u32 a, u32 b) {
    u32 c;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
DEVICE u32 multiply_add_halves(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

template <typename T> DEVICE T shuffle_xor(T x, u32 lanes) { return __shfl_xor_sync(WHOLE_WARP, x, lanes); }

DEVICE void atomic_or(u32* at, u32 bits) { atomicOr(at, bits); }
DEVICE void atomic_and(u32* at, u32 bits) { atomicAnd(at, bits); }

// Asks for a line of 128 bytes to be brought into the second-level cache.
DEVICE void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(at))); }

// Copies of 16 bytes from memory to shared memory, in groups: what was copied is there when all but the last `left`
// groups have been waited for and, for other threads, after a barrier. Before sm_80 they are there at once.
DEVICE void copy_async(void* shared, const void* from) {
#if __CUDA_ARCH__ >= 800
    u32 to = u32(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(__cvta_generic_to_global(from)) : "memory");
#else
    *static_cast<uint4*>(shared) = *static_cast<const uint4*>(from);
#endif
}
DEVICE void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <u32 left> DEVICE void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
#endif
}

// Four 8 x 8 matrices of 16 bits, turned: lane i gives a row (of 16 bytes) of matrix i / 8, and gets of each matrix
// rows 2 * (lane % 4) and the next in column lane / 4.
DEVICE void load_matrices_transposed(const void* row, u32* out) {
    u32 at = u32(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
}

#if __CUDA_ARCH__ >= 800
#define BFLOAT_MATRICES 1
#else
#define BFLOAT_MATRICES 0
#endif

// c += a b, a (16, 16) and b (16, 8) of 16 bits, c (16, 8) of f32, as fragments of mma.m16n8k16.
template <u32 dtype> DEVICE void multiply_matrices(const u32* a, u32 b0, u32 b1, float* c) {
#if __CUDA_ARCH__ >= 800
    if constexpr (dtype == BF16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    static_assert(dtype == F16, "tensor cores before sm_80 know no bf16");
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

#endif

template <typename T> DEVICE T least(T a, T b) { return a < b ? a : b; }
template <typename T> DEVICE T greatest(T a, T b) { return a > b ? a : b; }
DEVICE u32 ceil_div(u32 a, u32 b) { return (a + b - 1) / b; }
DEVICE u32 round_up(u32 a, u32 b) { return ceil_div(a, b) * b; }

DEVICE float infinite() { return bits_float(0x7f800000u); }

DEVICE float bf16_to_f32(u16 x) { return bits_float(u32(x) << 16); }
// To the nearest, ties to even; NaN stays NaN.
DEVICE u16 f32_to_bf16(float x) {
    u32 bits = float_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return u16(bits >> 16 | 0x40);
    return u16((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
// As f32_to_f16, but what is too great becomes the greatest: an infinite value would reach others of its tile, as zero
// times infinity. NaN stays NaN.
DEVICE u16 f32_to_f16_saturated(float x) {
    if (x > 65504.0f) x = 65504.0f;
    if (x < -65504.0f) x = -65504.0f;
    return f32_to_f16(x);
}

// Two numbers of 16 bits side by side, the first in the lower half.
template <u32 dtype> DEVICE u32 pack(float first, float second) {
    if constexpr (dtype == BF16) return f32_to_bf16(first) | u32(f32_to_bf16(second)) << 16;
    else return f32_to_f16_saturated(first) | u32(f32_to_f16_saturated(second)) << 16;
}

// Element i of a plain array.
template <u32 dtype> DEVICE float load_as_f32(const void* from, u64 i) {
    if constexpr (dtype == F32) return static_cast<const float*>(from)[i];
    if constexpr (dtype == BF16) return bf16_to_f32(static_cast<const u16*>(from)[i]);
    if constexpr (dtype == F16) return f16_to_f32(static_cast<const u16*>(from)[i]);
}
// Elements i and i + 1, where i is even.
template <u32 dtype> DEVICE void load_two(const void* from, u64 i, float* first, float* second) {
    if constexpr (dtype == F32) {
        uint2 two = static_cast<const uint2*>(from)[i / 2];
        *first = bits_float(two.x);
        *second = bits_float(two.y);
    } else {
        u32 two = static_cast<const u32*>(from)[i / 2];
        *first = dtype == F16 ? f16_to_f32(u16(two)) : bits_float(two << 16);
        *second = dtype == F16 ? f16_to_f32(u16(two >> 16)) : bits_float(two & 0xffff0000u);
    }
}
template <u32 dtype> DEVICE void store_f32(void* to, u64 i, float x) {
    if constexpr (dtype == F32) static_cast<float*>(to)[i] = x;
    if constexpr (dtype == BF16) static_cast<u16*>(to)[i] = f32_to_bf16(x);
    if constexpr (dtype == F16) static_cast<u16*>(to)[i] = f32_to_f16_saturated(x);
}

// e^x as the host has it: range reduction by ln 2 in two parts, then the Taylor polynomial of degree 6. The argument is
// clamped, so this is never 0 and products with it are no denormal numbers: where nothing must come out, mask.
constexpr float EXP_LEAST = -69.07755f;
DEVICE float exp_f32(float x) {
    float clamped = x > EXP_LEAST ? x : EXP_LEAST;
    clamped = clamped < 88.0f ? clamped : 88.0f;
    float n = rintf(clamped * 1.44269504f);
    float r = fmaf(n, -0.693359375f, clamped);
    r = fmaf(n, 2.12194440e-4f, r);
    float p = 1.0f / 720.0f;
    p = fmaf(p, r, 1.0f / 120.0f);
    p = fmaf(p, r, 1.0f / 24.0f);
    p = fmaf(p, r, 1.0f / 6.0f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    return p * bits_float(u32(int(n) + 127) << 23);
}

struct Sum {
    template <typename T> DEVICE T of(T a, T b) { return a + b; }
};
struct Max {
    template <typename T> DEVICE T of(T a, T b) { return greatest(a, b); }
};
struct Min {
    template <typename T> DEVICE T of(T a, T b) { return least(a, b); }
};

// Reduces over a warp, in an order that is the same for every lane; every lane gets the result.
template <typename Op, typename T> DEVICE T reduce_warp(T x) {
    UNROLL
    for (u32 lanes = WARP / 2; lanes > 0; lanes /= 2) x = Op::of(x, shuffle_xor(x, lanes));
    return x;
}

// Reduces over a block of whole warps; `room` has an element per warp and is free again on return.
template <typename Op, typename T> DEVICE T reduce_block(T x, T* room) {
    x = reduce_warp<Op>(x);
    if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = x;
    sync_block();
    T result = room[0];
    for (u32 warp = 1; warp < blockDim.x / WARP; warp++) result = Op::of(result, room[warp]);
    sync_block();
    return result;
}

// Bytes of a panel.
DEVICE u64 panel_bytes(u32 dtype, u32 inputs) {
    u32 elements = TILE * PANEL;
    u32 tile = dtype == F32    ? elements * 4
               : dtype == INT8 ? elements + 4 * PANEL
               : dtype == INT4 ? elements / 2 + 4 * PANEL
                               : elements * 2;
    return u64(ceil_div(inputs, TILE)) * tile;
}

// Where a panel lies.
DEVICE const u8* find_panel(const Piece* pieces, u32 num_pieces, u32 panel, u64 bytes) {
    u32 low = 0, high = num_pieces;
    while (high - low > 1) {
        u32 middle = (low + high) / 2;
        if (pieces[middle].first_panel <= panel) low = middle;
        else high = middle;
    }
    return pieces[low].data + (panel - pieces[low].first_panel) * bytes;
}

// ---- pages of keys and values

// Frames of the cache: those that stay, then those that were brought in.
struct View {
    u8* resident;
    u32 num_resident;
    u8* streamed;
    u64 frame_stride;
    u32 note_bytes;
};

// How a head lies within a frame; src/kv/layout.rs is the definition. Integers lie in words of `codes` codes, and 64
// scales and 64 offsets in f16 follow the codes of the keys, and those of the values.
template <u32 dtype> struct Pages {
    static constexpr bool integers = dtype == INT8 || dtype == INT4;
    static constexpr u32 codes = dtype == INT4 ? 8 : 4;
    static constexpr u32 bits = 32 / codes;
    static constexpr u32 mask = (1u << bits) - 1;
    static constexpr u32 size = dtype == F32 ? 4 : 2;

    DEVICE u32 code_bytes(u32 dim, bool keys) {
        return keys ? PAGE * 4 * ceil_div(dim, codes) : round_up(dim, PANEL) * 4 * (PAGE / codes);
    }
    DEVICE u32 part_bytes(u32 dim, bool keys) {
        if (integers) return code_bytes(dim, keys) + 4 * PAGE;
        return PAGE * size * (keys ? dim : round_up(dim, PANEL));
    }
    DEVICE u32 notes_at(u32 dim) { return part_bytes(dim, true) + part_bytes(dim, false); }

    DEVICE u64 head_bytes(u32 dim, u32 note_bytes) { return notes_at(dim) + note_bytes; }

    // Index of an element of a plain type.
    DEVICE u32 key_element(u32 dims, u32 slot, u32 dim) { return (slot / PANEL * dims + dim) * PANEL + slot % PANEL; }
    DEVICE u32 value_element(u32 slot, u32 dim) { return (dim / PANEL * PAGE + slot) * PANEL + dim % PANEL; }
    // Index of the word that holds a code.
    DEVICE u32 key_word(u32 dims, u32 slot, u32 dim) {
        return (slot / PANEL * ceil_div(dims, codes) + dim / codes) * PANEL + slot % PANEL;
    }
    DEVICE u32 value_word(u32 slot, u32 dim) {
        return (dim / PANEL * (PAGE / codes) + slot / codes) * PANEL + dim % PANEL;
    }
};

// A head of a frame: keys, values, notes.
template <u32 dtype> DEVICE u8* find_head(const View& view, u32 dims, u32 frame, u32 head) {
    u8* from = frame < view.num_resident ? view.resident + frame * view.frame_stride
                                         : view.streamed + (frame - view.num_resident) * view.frame_stride;
    return from + head * Pages<dtype>::head_bytes(dims, view.note_bytes);
}

// Which of a sequence's pages holds a tile.
DEVICE u32 page_of_tile(const Segment& segment, u32 tile) {
    if (segment.kept != KEPT_WINDOW) return tile;
    u32 first = ceil_div(segment.first, PAGE), ring = ceil_div(segment.recent - 1, PAGE) + 1;
    return tile < first ? tile : first + (tile - first) % ring;
}

// Stores a key (or value) in a slot of a head, by one warp. The least element is code 0, the greatest the last; what is
// not finite poisons scale and offset, so that it is not rounded to something that is.
template <u32 dtype> DEVICE void store_vector(u8* head, u32 dims, bool keys, u32 slot, const float* x) {
    using P = Pages<dtype>;
    u32 lane = threadIdx.x % WARP;
    u8* to = keys ? head : head + P::part_bytes(dims, true);
    if constexpr (!P::integers) {
        for (u32 dim = lane; dim < dims; dim += WARP)
            store_f32<dtype>(to, keys ? P::key_element(dims, slot, dim) : P::value_element(slot, dim), x[dim]);
    } else {
        float low = infinite(), high = -infinite(), poison = 0.0f;
        for (u32 dim = lane; dim < dims; dim += WARP) {
            low = fminf(low, x[dim]);
            high = fmaxf(high, x[dim]);
            poison += 0.0f * x[dim];
        }
        low = reduce_warp<Min>(low);
        high = reduce_warp<Max>(high);
        poison = reduce_warp<Sum>(poison);
        constexpr float most = float(P::mask);
        u16 scale_bits = f32_to_f16_saturated((high - low) / most + poison);
        u16 offset_bits = f32_to_f16_saturated(low + poison);
        float scale = f16_to_f32(scale_bits), offset = f16_to_f32(offset_bits);
        float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        auto code = [&](u32 dim) {
            float steps = (x[dim] - offset) * inverse;
            steps = steps > 0.0f ? steps : 0.0f;
            return u32(rintf(steps < most ? steps : most));
        };
        u32* words = reinterpret_cast<u32*>(to);
        if (keys) {
            for (u32 first = lane * P::codes; first < dims; first += WARP * P::codes) {
                u32 word = 0;
                for (u32 i = 0; i < P::codes && first + i < dims; i++) word |= code(first + i) << P::bits * i;
                words[P::key_word(dims, slot, first)] = word;
            }
        } else {
            // Other positions share these words, and are stored at the same time.
            u32 shift = slot % P::codes * P::bits;
            for (u32 dim = lane; dim < dims; dim += WARP) {
                u32* word = words + P::value_word(slot, dim);
                atomic_and(word, ~(P::mask << shift));
                atomic_or(word, code(dim) << shift);
            }
        }
        if (lane == 0) {
            u16* grid = reinterpret_cast<u16*>(to + P::code_bytes(dims, keys));
            grid[slot] = scale_bits;
            grid[PAGE + slot] = offset_bits;
        }
    }
}
