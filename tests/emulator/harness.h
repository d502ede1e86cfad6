// What tests of kernels share: the driver as a program sees it, random numbers, the plain definitions of layouts.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <random>
#include <sstream>
#include <string>
#include <vector>

extern "C" {
int cuInit(unsigned);
int cuDevicePrimaryCtxRetain(void**, int);
int cuCtxSetCurrent(void*);
int cuMemAlloc_v2(uint64_t*, size_t);
int cuMemFree_v2(uint64_t);
int cuMemHostAlloc(void**, size_t, unsigned);
int cuMemcpyHtoD_v2(uint64_t, const void*, size_t);
int cuMemcpyDtoH_v2(void*, uint64_t, size_t);
int cuMemcpyHtoDAsync_v2(uint64_t, const void*, size_t, void*);
int cuMemcpyDtoHAsync_v2(void*, uint64_t, size_t, void*);
int cuStreamCreate(void**, unsigned);
int cuStreamSynchronize(void*);
int cuStreamWaitEvent(void*, void*, unsigned);
int cuEventCreate(void**, unsigned);
int cuEventRecord(void*, void*);
int cuEventSynchronize(void*);
int cuModuleLoadData(void**, const void*);
int cuModuleGetFunction(void**, void*, const char*);
int cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
int nvrtcCreateProgram(void**, const char*, const char*, int, const char* const*, const char* const*);
int nvrtcCompileProgram(void*, int, const char* const*);
int nvrtcGetCUBINSize(void*, size_t*);
int nvrtcGetCUBIN(void*, char*);
}

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

inline void check(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "FAILED: %s\n", what);
    std::exit(1);
}

inline void driver(int status) {
    if (status == 0) return;
    std::fprintf(stderr, "FAILED: the driver gives %d\n", status);
    std::exit(1);
}

inline std::string read_text(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::stringstream text;
    text << file.rdbuf();
    check(file.good(), path.c_str());
    return text.str();
}

// A device with the kernels of a folder.
class Device {
public:
    explicit Device(const std::string& folder) : folder(folder) {
        driver(cuInit(0));
        void* context = nullptr;
        driver(cuDevicePrimaryCtxRetain(&context, 0));
        driver(cuCtxSetCurrent(context));
        driver(cuStreamCreate(&stream, 1));
    }

    // Memory of exactly so many bytes: one element further is a guard.
    u64 allocate(size_t bytes) {
        u64 address = 0;
        driver(cuMemAlloc_v2(&address, bytes));
        allocated.push_back(address);
        return address;
    }

    template <typename T> T* upload(const std::vector<T>& values) {
        if (values.empty()) return nullptr;
        u64 address = allocate(values.size() * sizeof(T));
        driver(cuMemcpyHtoD_v2(address, values.data(), values.size() * sizeof(T)));
        return reinterpret_cast<T*>(address);
    }

    // Fresh memory, which holds poison.
    template <typename T> T* room(size_t count) { return reinterpret_cast<T*>(allocate(count * sizeof(T))); }

    template <typename T> std::vector<T> download(const T* from, size_t count) {
        driver(cuStreamSynchronize(stream));
        std::vector<T> values(count);
        driver(cuMemcpyDtoH_v2(values.data(), reinterpret_cast<u64>(from), count * sizeof(T)));
        return values;
    }

    void* function(const std::string& file, const std::string& name) {
        auto& found = functions[file + name];
        if (found) return found;
        auto& module = modules[file];
        if (!module) {
            std::string source = read_text(folder + "/common.cuh") + read_text(folder + "/" + file);
            void* program = nullptr;
            driver(nvrtcCreateProgram(&program, source.c_str(), file.c_str(), 0, nullptr, nullptr));
            driver(nvrtcCompileProgram(program, 0, nullptr));
            size_t bytes = 0;
            driver(nvrtcGetCUBINSize(program, &bytes));
            std::vector<char> image(bytes);
            driver(nvrtcGetCUBIN(program, image.data()));
            driver(cuModuleLoadData(&module, image.data()));
        }
        driver(cuModuleGetFunction(&found, module, name.c_str()));
        return found;
    }

    struct Shape {
        u32 x, y, block, shared;
    };

    template <typename... A> void launch(const char* file, const std::string& name, Shape shape, A... values) {
        void* arguments[] = {&values...};
        driver(cuLaunchKernel(function(file, name), shape.x, shape.y, 1, shape.block, 1, 1, shape.shared, stream,
                              arguments, nullptr));
    }

    // Frees everything: one test's memory is not found by the next.
    void clear() {
        driver(cuStreamSynchronize(stream));
        for (u64 address : allocated) driver(cuMemFree_v2(address));
        allocated.clear();
    }

    void* stream = nullptr;

private:
    std::string folder;
    std::vector<u64> allocated;
    std::map<std::string, void*> functions, modules;
};

class Random {
public:
    explicit Random(u32 seed) : generator(seed) {}
    float normal() { return normals(generator); }
    u32 below(u32 count) { return generator() % count; }
    std::vector<float> normal_values(size_t count) {
        std::vector<float> values(count);
        for (float& value : values) value = normal();
        return values;
    }

private:
    std::mt19937 generator;
    std::normal_distribution<float> normals;
};

enum { F32, BF16, F16, INT8, INT4 };
inline const char* const DTYPE_NAMES[] = {"f32", "bf16", "f16", "int8", "int4"};

// Conversions by the compiler's own half type, and by arithmetic.
inline float half_value(u16 bits) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return float(half);
}
inline u16 half_bits(float x) {
    auto half = _Float16(x);
    u16 bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
inline float saturated_half(float x) {
    return std::isnan(x) ? x : half_value(half_bits(std::fmin(std::fmax(x, -65504.0f), 65504.0f)));
}
inline float bf16_value(u16 bits) {
    u32 wide = u32(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}
inline u16 bf16_bits(float x) {
    u32 wide;
    std::memcpy(&wide, &x, 4);
    if (std::isnan(x)) return 0x7fc0;
    u32 rest = wide & 0xffff, upper = wide >> 16;
    if (rest > 0x8000 || (rest == 0x8000 && upper % 2 == 1)) upper++;
    return u16(upper);
}
inline u32 element_size(u32 dtype) { return dtype == F32 ? 4 : 2; }
inline void put_element(u8* at, u32 dtype, float x) {
    u16 bits = dtype == BF16 ? bf16_bits(x) : half_bits(saturated_half(x));
    if (dtype == F32) std::memcpy(at, &x, 4);
    else std::memcpy(at, &bits, 2);
}
inline float get_element(const u8* at, u32 dtype) {
    float x;
    u16 bits;
    if (dtype == F32) std::memcpy(&x, at, 4);
    else std::memcpy(&bits, at, 2);
    return dtype == F32 ? x : dtype == BF16 ? bf16_value(bits) : half_value(bits);
}

// Whether two vectors agree within `bound` of the greatest value.
inline void near(const std::vector<float>& got, const std::vector<float>& wanted, double bound,
                 const std::string& what) {
    check(got.size() == wanted.size(), what.c_str());
    double greatest = 1e-30, worst = 0.0;
    for (float x : wanted) greatest = std::fmax(greatest, std::fabs(x));
    for (size_t i = 0; i < got.size(); i++) {
        double off = std::fabs(double(got[i]) - double(wanted[i]));
        if (!(off <= bound * greatest)) {
            std::fprintf(stderr, "FAILED: %s: element %zu is %g, not %g\n", what.c_str(), i, double(got[i]),
                         double(wanted[i]));
            std::exit(1);
        }
        worst = std::fmax(worst, off);
    }
}

struct Piece {
    const u8* data;
    u32 first_panel, num_panels;
};

// A packed matrix, and what its weights are.
struct Packed {
    u32 dtype, inputs, outputs;
    std::vector<u8> bytes;
    std::vector<float> weights;  // (outputs, inputs)
    std::vector<Piece> pieces;   // by offset within bytes

    u32 panels() const { return (outputs + 15) / 16; }
    size_t tile_bytes() const {
        return dtype == INT8 ? 1024 + 64 : dtype == INT4 ? 512 + 64 : 1024 * element_size(dtype);
    }
    size_t panel_bytes() const { return (inputs + 63) / 64 * tile_bytes(); }
};

Packed random_matrix(Random& random, u32 dtype, u32 inputs, u32 outputs);
// Uploads a matrix in a few pieces.
std::vector<Piece> upload_pieces(Device& device, Random& random, const Packed& matrix);
