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

template <typename F> DEVICE unsigned each_half(F f) {
    return f32_to_f16(float(f(0))) | unsigned(f32_to_f16(float(f(1)))) << 16;
}
DEVICE double half_of(unsigned pair, unsigned index) {
    return double(f16_to_f32((unsigned short)(pair >> 16 * index)));
}
DEVICE unsigned subtract_halves(unsigned a, unsigned b) {
    return each_half([=](unsigned i) { return half_of(a, i) - half_of(b, i); });
}
DEVICE unsigned multiply_add_halves(unsigned a, unsigned b, unsigned c) {
    return each_half([=](unsigned i) { return half_of(a, i) * half_of(b, i) + half_of(c, i); });
}

template <typename T> DEVICE T shuffle_from(T x, unsigned lane, const char* what) {
    const unsigned char* all = emulator::exchange(&x, sizeof x, what);
    T y;
    std::memcpy(&y, all + lane * emulator::EXCHANGE_BYTES, sizeof y);
    return y;
}
template <typename T> DEVICE T shuffle_xor(T x, unsigned lanes) {
    return shuffle_from(x, emulator::current->lane ^ lanes, "shuffle_xor");
}
DEVICE void sync_warp() {
    char nothing = 0;
    emulator::exchange(&nothing, 1, "sync_warp");
}

// One thread runs at a time.
DEVICE void atomic_or(unsigned* at, unsigned bits) { *at |= bits; }
DEVICE void atomic_and(unsigned* at, unsigned bits) { *at &= bits; }

DEVICE void copy_async(void* shared, const void* from) { emulator::copy_async(shared, from, 16); }
DEVICE void copy_async_commit() { emulator::copy_async_commit(); }
template <unsigned left> DEVICE void copy_async_wait() { emulator::copy_async_wait(left); }

#define BFLOAT_MATRICES 1

DEVICE void load_matrices_transposed(const void* row, unsigned* out) {
    const unsigned char* all = emulator::exchange(&row, sizeof row, "load_matrices_transposed");
    unsigned lane = emulator::current->lane;
    for (unsigned matrix = 0; matrix < 4; matrix++) {
        unsigned short pair[2];
        for (unsigned i = 0; i < 2; i++) {
            const unsigned short* from;
            unsigned giver = matrix * 8 + lane % 4 * 2 + i;
            std::memcpy(&from, all + giver * emulator::EXCHANGE_BYTES, sizeof from);
            pair[i] = from[lane / 4];
        }
        out[matrix] = pair[0] | unsigned(pair[1]) << 16;
    }
}

template <unsigned dtype> DEVICE float matrix_element(unsigned pair, unsigned index) {
    auto bits = (unsigned short)(pair >> 16 * index);
    // 1 is bf16, as common.cuh numbers the types.
    return dtype == 1 ? bits_float(unsigned(bits) << 16) : f16_to_f32(bits);
}

template <unsigned dtype> DEVICE void multiply_matrices(const unsigned* a, unsigned b0, unsigned b1, float* c) {
    unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1}, lane = emulator::current->lane;
    const unsigned char* all = emulator::exchange(mine, sizeof mine, "multiply_matrices");
    auto word = [&](unsigned giver, unsigned index) {
        unsigned value;
        std::memcpy(&value, all + giver * emulator::EXCHANGE_BYTES + 4 * index, 4);
        return value;
    };
    for (unsigned i = 0; i < 4; i++) {
        // Row and column of c; a's lanes are 4 * (row % 8) + pair of k, b's 4 * column + pair of k.
        unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = c[i];
        for (unsigned k = 0; k < 16; k++) {
            unsigned pair = k % 8 / 2, upper = k / 8;
            float x = matrix_element<dtype>(word(4 * (row % 8) + pair, row / 8 + 2 * upper), k % 2);
            float y = matrix_element<dtype>(word(4 * column + pair, 4 + upper), k % 2);
            sum += x * y;
        }
        c[i] = sum;
    }
}
