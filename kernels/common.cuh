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
constexpr u32 PANEL = 16;
constexpr u32 TILE = 64;

constexpr u32 WARP = 32;
constexpr u32 WHOLE_WARP = 0xffffffffu;

struct Piece {
    const u8* data;
    u32 first_panel;
    u32 num_panels;
};

struct Segment {
    u32 first_row, len, start;
    u32 first_page, num_pages;
    u32 kept, first, recent, prompt_len;
    u32 unused[3];
};

enum { KEPT_ALL = 0, KEPT_WINDOW = 1, KEPT_HEAVY = 2 };

#ifndef TIDEMILL_EMULATED

#define DEVICE [[maybe_unused]] static __device__ __forceinline__
#define KERNEL extern "C" __global__ void
// Threads of a block, and blocks that a processor should hold at least: without that number the compiler may prefer
// spilling to fewer blocks.
#define BOUNDS(...) __launch_bounds__(__VA_ARGS__)
#define UNROLL _Pragma("unroll")
#define UNROLL_TWO _Pragma("unroll 2")
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define DYNAMIC_SHARED(type, name)                                      \
    extern __shared__ __align__(16) unsigned char dynamic_shared_memory[]; \
    type* const name = reinterpret_cast<type*>(dynamic_shared_memory)
#define ALIGNED(bytes) __align__(bytes)

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }

DEVICE u32 float_bits(float x) { return __float_as_uint(x); }
DEVICE float bits_float(u32 x) { return __uint_as_float(x); }

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

template <typename T> DEVICE T shuffle_xor(T x, u32 lanes) { return __shfl_xor_sync(WHOLE_WARP, x, lanes); }
template <typename T> DEVICE T shuffle_up(T x, u32 lanes) { return __shfl_up_sync(WHOLE_WARP, x, lanes); }

DEVICE void atomic_or(u32* at, u32 bits) { atomicOr(at, bits); }
DEVICE void atomic_and(u32* at, u32 bits) { atomicAnd(at, bits); }

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

// Element i of a plain array.
template <u32 dtype> DEVICE float load_as_f32(const void* from, u64 i) {
    if constexpr (dtype == F32) return static_cast<const float*>(from)[i];
    if constexpr (dtype == BF16) return bf16_to_f32(static_cast<const u16*>(from)[i]);
    if constexpr (dtype == F16) return f16_to_f32(static_cast<const u16*>(from)[i]);
}
template <u32 dtype> DEVICE void store_f32(void* to, u64 i, float x) {
    if constexpr (dtype == F32) static_cast<float*>(to)[i] = x;
    if constexpr (dtype == BF16) static_cast<u16*>(to)[i] = f32_to_bf16(x);
    if constexpr (dtype == F16) static_cast<u16*>(to)[i] = f32_to_f16_saturated(x);
}

// e^x as the host has it: range reduction by ln 2 in two parts, then the Taylor polynomial of degree 6. The argument is
// clamped, so this is never 0: where nothing must come out, mask.
DEVICE float exp_f32(float x) {
    float clamped = x > -87.33654f ? x : -87.33654f;
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
