// What a kernel's text is compiled with for the CPU: the names that the CUDA compiler knows by itself, and the wrappers
// of common.cuh that need a GPU.
#pragma once

#include <cmath>
#include <cstring>

#include "fibers.h"

#define TIDEMILL_EMULATED 1

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->block)
#define blockDim (emulator::current->block_size)
#define gridDim (emulator::current->grid_size)

#define DEVICE [[maybe_unused]] static inline
#define KERNEL extern "C" __attribute__((visibility("hidden"))) void
#define METHOD inline
#define BOUNDS(...)
#define UNROLL
#define UNROLL_NOT
#define UNROLL_TWO
#define UNROLL_FOUR
#define ALIGNED(bytes) alignas(bytes)
#define SHARED(type, name, count) type* const name = static_cast<type*>(emulator::shared_array(sizeof(type) * (count)))
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(emulator::dynamic_shared())

#define SHIM_TEXT2(x) #x
#define SHIM_TEXT(x) SHIM_TEXT2(x)
#define sync_block() emulator::sync_block("the barrier in line " SHIM_TEXT(__LINE__))

struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};

DEVICE unsigned float_bits(float x) {
    unsigned y;
    std::memcpy(&y, &x, 4);
    return y;
}
DEVICE float bits_float(unsigned x) {
    float y;
    std::memcpy(&y, &x, 4);
    return y;
}

DEVICE float f16_to_f32(unsigned short x) {
    unsigned sign = (x & 0x8000u) << 16, exponent = x >> 10 & 31, mantissa = x & 0x3ff;
    if (exponent == 31) return bits_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) return bits_float(sign | float_bits(float(mantissa) * 5.9604644775390625e-8f));
    return bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
DEVICE unsigned short f32_to_f16(float x) {
    unsigned bits = float_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fff;
    if (magnitude >= 0x477ff000u) return (unsigned short)(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {
        // Steps of 2^-24; rintf rounds ties to even.
        return (unsigned short)(sign | unsigned(rintf(bits_float(magnitude) * 16777216.0f)));
    }
    magnitude += 0xfffu + (magnitude >> 13 & 1);
    return (unsigned short)(sign | (magnitude - 0x38000000u) >> 13);
}

DEVICE float multiply_rounded(float a, float b) { return a * b; }

template <typename T> DEVICE T shuffle_from(T x, unsigned lane, const char* what) {
    const unsigned char* all = emulator::exchange(&x, sizeof x, what);
    T y;
    std::memcpy(&y, all + lane * emulator::EXCHANGE_BYTES, sizeof y);
    return y;
}
template <typename T> DEVICE T shuffle_xor(T x, unsigned lanes) {
    return shuffle_from(x, emulator::current->lane ^ lanes, "shuffle_xor");
}
template <typename T> DEVICE T shuffle_up(T x, unsigned lanes) {
    unsigned lane = emulator::current->lane;
    return shuffle_from(x, lane < lanes ? lane : lane - lanes, "shuffle_up");
}
DEVICE void sync_warp() {
    char nothing = 0;
    emulator::exchange(&nothing, 1, "sync_warp");
}

// One thread runs at a time.
DEVICE void atomic_or(unsigned* at, unsigned bits) { *at |= bits; }
DEVICE void atomic_and(unsigned* at, unsigned bits) { *at &= bits; }
